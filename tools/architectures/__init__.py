"""The sweep over architectures: every method on every causal language model type.

    python -m tools.architectures                      all types, all methods
    python -m tools.architectures --types llama,mamba --methods lora,prompt --jobs 2

The library finds its way in a model by structure, not by a table of names. The sweep
says where that holds: it builds each type that transformers knows as a tiny random
model, puts each method on it, and runs a dozen checks. Nothing is downloaded. Results
are JSON lines in `--out`, written as they come: a sweep that was broken off goes on
where it was, and one of another version of the library wants another file.

In which order to read:

    tiny.py         a type's configuration made small, a model drawn at random
    subject.py      a method on a model: what all checks look at
    checks.py       what a method promises, a function each
    peft_files.py   PEFT, which two of the checks compare with
    outcomes.py     passed, refused, crashed, wrong or skipped
    sweep.py        a child process for each type, with a time limit
    table.py        methods by checks, and what failed
"""

import logging

# At import it asks for a package that would fetch kernels from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
