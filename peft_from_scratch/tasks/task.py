"""Tasks: what is learned, and what counts as right.

Every task has an instruction, splits without a leak, and a scorer:

    "orders"           a sentence -> JSON: an output format               orders.py
    "terms"            an invented trade: domain knowledge                terms.py
    "gap-0" … "gap-4"  a dial: from tiny's pretraining to a cipher        gap.py
    "kinds"            a classification that tiny half knows              kinds.py
    "path/rows.jsonl"  your own prompts and completions, or conversations jsonl.py
    "hub:owner/name"   any data set of the hub, or a folder that holds one

Each generated task has a twin for control, "orders-random": the same prompts, the same
completions, and nothing that ties one to the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol

from datasets import Dataset

from . import gap, jsonl, kinds, messages, orders, scorers, terms

Splits = Mapping[str, list[dict]]  # split: its rows
Rows = Sequence[Mapping[str, str]]  # a split, or some of its rows


class TaskModule(Protocol):
    """The names that a module with a generated task has: orders for example."""

    INSTRUCTION: str  # one sentence for every row; "" for none

    def rows(self, seed: int = 0) -> Splits:
        """train, validation and test, and perhaps search and final: see Task.

        The same rows in the same order for the same seed.
        """

    def score(self, answer: str, completion: str) -> bool:
        """Whether an answer is right."""

    # A module may have clusters(rows), as Task has it; else jsonl's is taken.


@dataclass(frozen=True)
class Source:
    """The parts of a generated task; gap's levels share one module."""

    instruction: str
    rows: Callable[[int], Splits]  # seed -> the rows of each split
    score: Callable[[str, str], bool]
    clusters: Callable[[Rows], list[str]] = jsonl.clusters


GENERATED = {
    name: Source(
        module.INSTRUCTION,
        module.rows,
        module.score,
        getattr(module, "clusters", jsonl.clusters),
    )
    for name, module in (
        ("orders", orders),
        ("terms", terms),
        ("kinds", kinds),
    )
} | {
    name: Source(gap.INSTRUCTION, partial(gap.rows, write), gap.score)
    for name, write in gap.LEVELS.items()
}
RANDOM = "-random"  # ends the name of a twin


@dataclass(frozen=True)
class Task:
    """A task. The splits have the columns `prompt` and `completion`, both text.

    Rows that are not generated have a third, `place`: where they come from ("line 31").
    Where some of them are conversations there is a fourth, `messages`: the turns, None
    for a row without. Their `completion` is the last answer, and their `prompt` shows
    what stands before it; encode_prompt takes `messages.prompt_of(row)`.
    """

    name: str
    instruction: str  # one sentence for every row; "" for none
    train: Dataset
    validation: Dataset
    test: Dataset
    search: Dataset  # to search settings on; a task without such rows has validation's
    final: Dataset  # the comparison's test; a task without such rows has test's
    score: Callable[[str, str], scorers.Score]  # (answer, completion) -> is it right?
    # A name for each row: rows of one name are right or wrong together, so that an
    # interval counts them as one draw.
    clusters: Callable[[Rows], list[str]] = jsonl.clusters


def load_task(
    name: str,
    *,
    seed: int = 0,
    prompt: str = "prompt",
    completion: str = "completion",
    config: str | None = None,
    scorer: str | None = None,
    instruction: str | None = None,
) -> Task:
    """The task called `name`; the same rows in the same order for the same seed.

    Args
        name        one of GENERATED, "-random" behind it for the twin; a path that
                    ends in .jsonl, "hub:" and the id of a data set, or a folder which
                    `datasets.load_dataset` can read
        seed        draws the generated rows, or which of your rows go into which split
    Only for rows of your own, since a generated task has both:
        scorer      what counts as right: a name of scorers.SCORERS, or the path of a
                    Python file with a function score(answer, completion); None: "exact"
        instruction what to do, in a sentence, for every row; None: nothing is said
    Only for data sets and folders:
        prompt      the column that holds the prompts
        completion  the column that holds the completions; without these columns, the
                    conversations of a column `messages` are the rows
        config      the configuration, where a data set has several
    Raises  ValueError   an unknown name; bad rows, each with its number and reason; too
            few rows; a column that is not there, or chosen where rows have fixed ones;
            a scorer that does not suit the completions
            OSError      a file or data set that cannot be had
    """
    chosen = (prompt, completion, config) != ("prompt", "completion", None)
    plain = name.removesuffix(RANDOM)
    if chosen and (plain in GENERATED or name.endswith(".jsonl")):
        raise ValueError(
            f"{name!r} is no data set of the hub and no folder: only for those can "
            "prompt=, completion= and config= be chosen; a .jsonl file has the keys "
            "prompt and completion, or messages"
        )
    if plain in GENERATED:
        if (scorer, instruction) != (None, None):
            raise ValueError(
                f"{name!r} has an instruction and a scorer: only for rows of your own "
                "can others be chosen"
            )
        source = GENERATED[plain]
        splits = source.rows(seed)
        splits = splits if plain == name else shuffled(splits, seed)
        return _task(name, source.instruction, splits, source.score, source.clusters)
    if name.endswith(".jsonl"):
        splits = jsonl.read_jsonl(name, seed)
    elif (dataset := jsonl.dataset_id(name)) is not None:
        splits = jsonl.read_dataset(dataset, seed, prompt, completion, config)
    else:
        raise ValueError(
            f"{name!r} is no task: write {', '.join(map(repr, GENERATED))}, one of "
            f"these with {RANDOM!r} behind it, a path to a .jsonl file, 'hub:' and the "
            "id of a data set, or the path of a folder"
        )
    scored_by = scorers.scorer(scorer or "exact")
    scorers.refuse_unfit(scored_by, splits, name)
    system, splits = messages.shared_system(splits)
    if system and instruction:
        raise ValueError(
            f"the rows of {name} have a system turn, {system[:60]!r}: take it out, or "
            "leave the instruction out"
        )
    return _task(name, system or instruction or "", splits, scored_by)


def shuffled(splits: Splits, seed: int) -> Splits:
    """Every split with its own completions, dealt out anew: nothing is to be learned
    from a prompt, and all that can be learned of completions alone still can be."""
    random = Random(f"random labels {seed}")
    dealt = {}
    for split, rows in splits.items():
        answers = random.sample([row["completion"] for row in rows], len(rows))
        dealt[split] = [
            {**row, "completion": answer}
            for row, answer in zip(rows, answers, strict=True)
        ]
    return dealt


def _task(name, instruction, splits, score, clusters=jsonl.clusters) -> Task:
    data = {split: _data(rows) for split, rows in splits.items()}
    data.setdefault("search", data["validation"])
    data.setdefault("final", data["test"])
    return Task(name, instruction, **data, score=score, clusters=clusters)


def _data(rows) -> Dataset:
    """The rows with the columns that any of them has; None where a row has it not."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
