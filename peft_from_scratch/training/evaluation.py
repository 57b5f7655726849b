"""The answers of a model, how many are right, and how sure that number is.

Three questions, in this order:

    answer_rows                 what does the model answer, and what is right?
    wilson, paired_bootstrap    is 84 of 100 better than 76 of 100? That depends on the
                                rows: ask for the interval of the paired difference
    general_losses              what has the model forgotten meanwhile?
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch.nn import functional as F

from ..common import atomic, records, scoped
from ..common.digest import digest, sampled_crc
from ..tasks.messages import prompt_of
from ..tasks.scorers import Score, score_all
from ..tasks.task import Task
from ..tasks.templates import Pair, encode_prompt, stop_token
from .generation import generate


@dataclass(frozen=True)
class Answers:
    """What a model answered to some rows, in their order."""

    answers: list[str]
    correct: list[Score]  # right or wrong, or from 0 to 1
    seconds: float  # wall clock, for all rows together


def answer_rows(
    model,
    tokenizer,
    task: Task,
    rows,
    *,
    template: str,
    examples: Sequence[Pair] = (),
    batch: int = 32,
    progress: bool = False,
    keep: Path | None = None,
    unpacked_bytes: int = 0,
) -> Answers:
    """Answer every row and score it by the task's own scorer.

    Args
        rows      a split of the task, or a part of one, not empty
        template  "chat" or "raw", as in training
        examples  (prompt, completion) pairs shown before each row: few-shot
        batch     rows answered at once
        progress  show a bar
        keep      a file where the answers are before they are scored: a scorer that
                  fails does not lose them. The next call with the same weights and
                  prompts only scores; any other overwrites the file
        unpacked_bytes  see generate
    An answer that does not end is cut: a quarter and eight tokens past the longest
    completion of `rows`. What all prompts begin with is computed once (generation.py).

    Raises    ValueError   no rows, or prompts too long for the model
    """
    if not len(rows):
        raise ValueError("there are no rows to answer; give at least one")
    prompts = [
        encode_prompt(
            tokenizer,
            task.instruction,
            prompt_of(row),
            template=template,
            examples=examples,
        )
        for row in rows
    ]
    shared = shared_tokens(prompts)
    most = answer_room(tokenizer, rows)
    asked = digest(_weights(model), prompts, most) if keep else ""
    kept = _kept(keep, asked)
    if kept is None:
        start = time.perf_counter()
        answers = generate(
            model,
            tokenizer,
            [prompt[shared:] for prompt in prompts],
            stop_id=stop_token(tokenizer, template),
            max_new_tokens=most,
            batch=batch,
            prefix=prompts[0][:shared],
            progress=progress,
            unpacked_bytes=unpacked_bytes,
        )
        seconds = time.perf_counter() - start
        kept = [answer.strip() for answer in answers], seconds
        _keep(keep, asked, *kept)
    answers, seconds = kept
    return Answers(answers, score_all(task.score, answers, rows), seconds)


def answer_room(tokenizer, rows) -> int:
    """Tokens after which an answer to one of the rows is cut, if it has not ended."""
    # As text: letters that spell a control token are several tokens of an answer.
    longest = max(
        len(tokenizer(row["completion"], split_special_tokens=True).input_ids)
        for row in rows
    )
    return longest + longest // 4 + 8


def _kept(file: Path | None, asked: str) -> tuple[list[str], float] | None:
    """The answers in a file and their seconds; None where there are none to `asked`.

    A file that cannot be read is said, and the rows are answered again.
    """
    if file is None or not file.exists():
        return None
    try:
        record = _read_answers(file)
    except ValueError as error:
        print(f"{error}: the rows are answered again")
        return None
    same = record["asked"] == asked
    return (record["answers"], record["seconds"]) if same else None


def _read_answers(file: Path) -> dict:
    """What `_keep` wrote; ValueError for another content."""
    record = records.read_object(file)
    answers = record.get("answers")
    texts = isinstance(answers, list) and all(isinstance(a, str) for a in answers)
    if record.keys() != {"asked", "answers", "seconds"} or not texts:
        raise ValueError(f"{file} does not hold the answers of a model")
    return record


def _keep(file: Path | None, asked: str, answers: list[str], seconds: float) -> None:
    if file is not None:
        record = {"asked": asked, "answers": answers, "seconds": seconds}
        with atomic.new_file(file) as new:
            new.write_text(json.dumps(record))


def _weights(model) -> list[int]:
    """Numbers that another model, or the same after a training step, does not have."""
    return [sampled_crc(tensor) for tensor in model.state_dict().values()]


@torch.no_grad()
def general_losses(
    model, tokenizer, *, windows: int = 8, length: int = 256
) -> list[float]:
    """Next-token loss on stretches of general prose, which measures forgetting.

    The prose is the language reference inside Python's own help(): it is on every
    learner's disk, no task of ours trains on it, and it is not redistributed here. It
    changes from one Python version to the next, so compare within one run only.

    Args
        windows  stretches of the text, evenly spaced, always the same ones
        length   tokens in each
    Returns  nats per token of each window
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    starts = np.linspace(0, len(ids) - length, windows).astype(int)
    losses = []
    with scoped.mode(model, training=False):
        for start in starts:
            window = torch.tensor([ids[start : start + length]], device=model.device)
            logits = model(window).logits[0, :-1].float()
            losses.append(F.cross_entropy(logits, window[0, 1:]).item())
    return losses


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    return min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
