"""The command line: `python -m peft_from_scratch --help`.

Reading order: command_line.py (the commands and their options; it imports nothing heavy
until a command runs), commands.py (train and merge), ranks.py (train on several
processes), masks.py (which tokens would be
trained), chat.py (talk to a model), serve.py (many adapters over HTTP), budget.py (a
memory bill), doctor.py (what is here, what is missing, and what work costs on this
machine).
"""
