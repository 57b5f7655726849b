"""The command line: `python -m peft_from_scratch --help`.

Reading order: commands.py (train and merge), chat.py (talk to a model), doctor.py (what
is here, what is missing, and what work costs on this machine).
"""
