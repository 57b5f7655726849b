"""Tasks: what is learned, and what counts as right.

A task is a module with an INSTRUCTION, `rows(split, …)` and a scorer.

Reading order: task.py (`Task`, `load_task`), orders.py (the main one: a sentence in,
JSON out), terms.py (new words), gap.py and kinds.py (for sweeps on tiny; world.py has
what they tell of), jsonl.py (rows of your own), messages.py (rows of several turns),
scorers.py (what counts as right on your own rows), score_file.py and score_worker.py (a
scorer of your own, in a process of its own), templates.py (how a row becomes tokens and
labels), conversations.py (which text of a chat template is an answer), plain_text.py
(text stays text), manner.py (how an adapter was spoken to in training).
"""

from ..common import lazy

__getattr__, __dir__, __all__ = lazy.names(
    {}, lazy.homes({"tasks.task": ("load_task",)})
)
