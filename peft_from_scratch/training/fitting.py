"""All rows of a task as tokens, or a list of those that are too long or no text.

Nothing is trained on a part of a file by accident: the rows of all three splits are
looked at before the first step, and every bad one is named at once.
"""

from torch import nn

from ..core.decoder import positions, positions_in_words
from ..tasks import templates
from ..tasks.jsonl import in_order, refuse_bad
from ..tasks.task import Task
from .batch import Row
from .config import TrainConfig

SPLITS = ("train", "validation", "test")


def row_limit(model: nn.Module, asked: int | None) -> int:
    """The longest row in tokens: as asked for, else TrainConfig's, or all positions.

    Raises  ValueError  more than the model has positions was asked for
    """
    limit, most = asked or TrainConfig.max_tokens, positions(model)
    if most is None or limit <= most:
        return limit
    if asked is not None:
        raise ValueError(
            f"--max-tokens {limit}: the model has {positions_in_words(model)}; allowed "
            "is that many at most"
        )
    return most


def encode_task(
    tokenizer, task: Task, *, template: str, max_tokens: int
) -> dict[str, list[Row]]:
    """{split: its rows as tokens} of all three splits.

    Raises  ValueError  an empty split, or a list of the bad rows of all three
    """
    encoded, bad = {}, []
    for split in SPLITS:
        rows = getattr(task, split)
        if not len(rows):
            raise ValueError(f"{task.name} has no rows left for its {split} split")
        encoded[split], bad_rows = templates.encode_all(
            tokenizer,
            task.instruction,
            rows,
            template=template,
            max_tokens=max_tokens,
        )
        # A generated row has no place in a file, only one in its split.
        of_split = "" if "place" in rows.column_names else f" of {split}"
        bad += [(place + of_split, reason) for place, reason in bad_rows]
    refuse_bad(in_order(bad), task.name)
    return encoded
