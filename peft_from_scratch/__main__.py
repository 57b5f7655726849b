"""`python -m peft_from_scratch`: the command line, cli/command_line.py."""

import sys

from .cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
