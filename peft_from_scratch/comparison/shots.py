"""How many examples of few-shot fit before the rows of a task.

A prompt with its examples and its answer has to fit the model's positions. The examples
take MOST_TOKENS at most as well: the keys and values of a batch of 32 rows are held for
all of them, about 3 GB on SmolLM2 at that length.
"""

import math

from ..tasks.messages import prompt_of
from ..tasks.templates import encode_prompt
from ..training.evaluation import answer_room
from .adapt import few_shot_examples
from .setup import Setup

MOST_TOKENS = 2048  # of the examples


def fitted(setup: Setup, values: dict) -> dict:
    """A setting with `k` cut to what fits, 0 where nothing does; another as it is."""
    if "k" not in values:
        return values
    k = min(values["k"], len(setup.task.train))
    while k and not _fits(setup, values["template"], k, values["order"]):
        k -= 1
    return values | {"k": k}


def _fits(setup: Setup, template: str, k: int, order: int) -> bool:
    task, tokenizer = setup.task, setup.tokenizer
    rows = [*task.validation, *task.test]
    longest = max(rows, key=lambda row: len(row["prompt"]))
    alone, with_examples = (
        len(
            encode_prompt(
                tokenizer,
                task.instruction,
                prompt_of(longest),
                template=template,
                examples=examples,
            )
        )
        for examples in ((), few_shot_examples(task, k, order))
    )
    most = math.inf if setup.positions is None else setup.positions
    room = answer_room(tokenizer, rows)
    return with_examples + room <= most and with_examples - alone <= MOST_TOKENS
