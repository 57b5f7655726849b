"""docs/memory_budget.md: predicted bills beside measured ones, never typed.

    python -m tools.memory_page --measure    takes the steps that are not there yet
    python -m tools.memory_page              writes the page from what was measured

memory_cells.py takes the steps, memory_held_out.py has those that no formula was
written beside, memory_phases.py those of other phases, and memory_estimators.py what
other estimators say. data/results/memory_budget.json keeps what was measured, and, of
the held-out steps, what was predicted when they were taken for the first time.
"""

import argparse
import json
from collections.abc import Sequence

from peft_from_scratch.common import atomic, provenance
from peft_from_scratch.common.marks import between_marks, markdown
from peft_from_scratch.common.units import megabytes
from peft_from_scratch.memory.budget import bill
from peft_from_scratch.memory.setups import Setup

from . import memory_cells, memory_estimators, memory_held_out, memory_phases
from .memory_cells import ROWS, config_of, predicted

PAGE = provenance.ROOT / "docs" / "memory_budget.md"
RESULT = provenance.ROOT / "data" / "results" / "memory_budget.json"
GOALS = dict.fromkeys(ROWS[:3], 5.0) | dict.fromkeys(ROWS[3:], 10.0)  # %
KINDS = ("cells", "held_out", "phases")
COMPARED = ("full", "lora", "qlora")  # with other estimators


def measure(before: dict, kinds: Sequence[str] = KINDS) -> dict:
    """What was measured before, and the steps that are not there yet.

    Args
        kinds  of KINDS, those whose steps are taken now
    """
    takes = {
        "cells": (memory_cells.cells, _taken),
        "held_out": (memory_held_out.cells, _held_out),
        "phases": (memory_phases.cells, _phase),
    }
    result = before | {"provenance": provenance.provenance(seed=0)}
    for kind in kinds:
        listed, take = takes[kind]
        known = {_key(cell): cell for cell in before.get(kind, ())}
        result[kind] = []
        for base, setup in listed():
            cell = {"base": base, "setup": vars(setup)}
            cell = known.get(_key(cell), cell)
            result[kind].append(cell if "measured" in cell else cell | take(cell))
    asked = {
        f"{base}, {setup.dtype}": (base, setup.dtype)
        for base, setup in memory_cells.cells()
        if _compared_with_others(base, setup)
    }
    result["accelerate"] = {
        name: memory_estimators.accelerate(config_of(base), dtype)
        for name, (base, dtype) in asked.items()
    }
    return result


def _key(cell: dict) -> str:
    return json.dumps([cell["base"], vars(Setup(**cell["setup"]))], sort_keys=True)


def _taken(cell: dict) -> dict:
    setup = Setup(**cell["setup"])
    return {"measured": memory_cells.measured(cell["base"], setup)}


def _phase(cell: dict) -> dict:
    setup = Setup(**cell["setup"])
    return {"measured": {"peak": memory_phases.measured(cell["base"], setup)}}


def _held_out(cell: dict) -> dict:
    """A held-out step: predicted for the first time, and then measured."""
    first = cell.get("first") or today(cell)
    try:
        return {"first": first} | _taken(cell)
    except ValueError as error:  # BitFit, where a model has no biases
        return {"first": first, "impossible": str(error)}


def today(cell: dict) -> dict:
    """{"predicted": bytes, "way": …} by today's formulas, or {"refused": sentence}."""
    try:
        budget = bill(config_of(cell["base"]), Setup(**cell["setup"]))
    except ValueError as error:
        return {"refused": str(error)}
    return {"predicted": predicted(budget), "way": budget.way}


def compared(cell: dict, answer: dict | None = None) -> dict:
    """A cell with a bill, today's if no other is given, and its errors in %."""
    answer = answer or today(cell)
    figures = answer["predicted"]
    errors = {r: 100 * (figures[r] / cell["measured"][r] - 1) for r in ROWS}
    about = {
        "base": cell["base"],
        "setup": Setup(**cell["setup"]),
        "way": answer["way"],
    }
    return about | {"figures": figures, "errors": errors}


def tables(result: dict) -> str:
    """All that is between the marks."""
    rows = [compared(cell) for cell in result["cells"]]
    torch_version = result["provenance"]["packages"]["torch"]
    parts = (
        f"{len(rows)} steps, torch {torch_version}. The largest error of all: "
        f"{worst(rows)}.",
        "### SmolLM2 and random models",
        "Predicted bytes in MB, and the error against the measured step in %:",
        _detailed([row for row in rows if row["base"] != "tiny"]),
        "### tiny",
        "The largest error of each group, in %; 4 rows of 64 and of 256 tokens:",
        _grouped([row for row in rows if row["base"] == "tiny"]),
        "### Held-out steps",
        _drawn(result["held_out"]),
        "### Evaluation, generation, DPO, group sampling",
        "The peak of a whole step, tiny, in MB; `labels` as `--labels`:",
        _phases(result["phases"]),
        "### Beside other estimators",
        "The measured peak of the same steps, and how far each is from it, in %:",
        _beside(result),
        markdown(("estimator", "leaves out"), memory_estimators.LEAVES_OUT.items()),
    )
    return "\n\n".join(parts) + "\n"


def worst(rows: list[dict]) -> str:
    """The largest error of each row of the bill."""
    most = {r: max((row["errors"][r] for row in rows), key=abs) for r in ROWS}
    return ", ".join(f"{name} {most[name]:+.1f} %" for name in ROWS)


def _detailed(rows: list[dict]) -> str:
    lines = [
        [
            *(row["base"], row["setup"].method, _recipe(row["setup"]), row["way"]),
            *(
                f"{megabytes(row['figures'][r])} ({row['errors'][r]:+.1f})"
                for r in ROWS
            ),
        ]
        for row in rows
    ]
    return markdown(("base", "method", "step", "activations by", *ROWS), lines)


def _recipe(setup: Setup) -> str:
    return f"{setup.dtype}, {setup.batch} x {setup.length}"


def _grouped(rows: list[dict]) -> str:
    """By method, dtype and way: the largest error of each row of the bill."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        s = row["setup"]
        way = "checkpointing" if s.checkpointing else s.attention
        groups.setdefault((s.method, s.dtype, way), []).append(row["errors"])
    lines = [
        [*key, *(f"{max((e[r] for e in errors), key=abs):+.1f}" for r in ROWS)]
        for key, errors in groups.items()
    ]
    return markdown(("method", "dtype", "way", *ROWS), lines)


def _drawn(cells: list[dict]) -> str:
    """Held-out steps: how many were within the goals, and each that was not."""
    possible = [c for c in cells if "measured" in c]
    refused = [c for c in possible if "refused" in c["first"]]
    billed = [c for c in possible if "predicted" in c["first"]]
    rows = [compared(c, c["first"]) for c in billed]
    missed = [c for c, row in zip(billed, rows, strict=True) if misses(row)]
    within = {r: sum(abs(row["errors"][r]) <= GOALS[r] for row in rows) for r in ROWS}
    counts = ", ".join(f"{name} {count}" for name, count in within.items())
    lines = [_missed(c) for c in missed]
    return (
        f"{len(cells)} steps were drawn; {len(cells) - len(possible)} of them are "
        "impossible (BitFit on a model without biases), and the bill refused "
        f"{len(refused)} others. Of the {len(rows)} with a bill, so many were within "
        f"the goals (5 % for the first three rows, 10 % for the others): {counts}. The "
        f"largest errors: {worst(rows)}. Those outside, with the error in % when the "
        "step was first taken, and by today's formulas:\n\n"
        + markdown(("model", "step", "activations", "peak", "today"), lines)
        + "\n\nWhat was refused:\n\n"
        + markdown(("steps", "because", "of"), _refused(refused))
    )


def misses(row: dict) -> bool:
    return any(abs(row["errors"][name]) > most for name, most in GOALS.items())


def _missed(cell: dict) -> list[str]:
    first, now = (compared(cell, answer)["errors"] for answer in (cell["first"], None))
    ends = [f"{first[r]:+.1f}" for r in ROWS[3:]]
    return [*_about(cell), *ends, ", ".join(f"{now[r]:+.1f}" for r in ROWS[3:])]


def _refused(cells: list[dict]) -> list[list]:
    """How many steps were refused by each sentence, and of which models."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        sentence = cell["first"]["refused"].partition("; ")[0].partition(" (")[0]
        groups.setdefault(sentence, []).append(cell["base"])
    return [
        [len(bases), sentence, ", ".join(dict.fromkeys(bases))]
        for sentence, bases in groups.items()
    ]


def _about(cell: dict) -> list[str]:
    s = Setup(**cell["setup"])
    more = ", checkpointing" if s.checkpointing else ""
    return [cell["base"], f"{s.method}, {_recipe(s)}, {s.attention}{more}"]


def _phases(cells: list[dict]) -> str:
    lines = []
    for cell in cells:
        s = Setup(**cell["setup"])
        budget, real = bill(config_of(cell["base"]), s), cell["measured"]["peak"]
        peak = memory_phases.predicted(budget)
        error = f"{100 * (peak / real - 1):+.1f}"
        about = (s.phase, s.method, _recipe(s), s.labels or "all", s.group or "")
        lines.append([*about, megabytes(real), megabytes(peak), error])
    heads = ("phase", "method", "step", "labels", "group", "measured", "predicted")
    return markdown((*heads, "error, %"), lines)


def _compared_with_others(base: str, s: Setup) -> bool:
    plain = s.attention == "sdpa" and not s.checkpointing
    usual = s.dtype in ("float32", "mixed") and s.method in COMPARED
    return base in ("tiny", "smollm2") and plain and usual


def _beside(result: dict) -> str:
    lines = []
    for cell in result["cells"]:
        base, s = cell["base"], Setup(**cell["setup"])
        if not _compared_with_others(base, s):
            continue
        config, real = config_of(base), cell["measured"]["peak"]
        ours, of_accelerate = (
            bill(config, s),
            result["accelerate"][f"{base}, {s.dtype}"],
        )
        theirs = memory_estimators.all_of_them(config, s, ours.weighed, of_accelerate)
        off = [f"{100 * (n / real - 1):+,.0f}" for n in theirs.values()]
        here = f"{100 * (ours.peak / real - 1):+.1f}"
        lines.append([base, s.method, _recipe(s), megabytes(real), here, *off])
    heads = ("base", "method", "step", "measured, MB", "this bill")
    return markdown((*heads, *memory_estimators.LEAVES_OUT), lines)


def write(result: dict) -> None:
    page = between_marks(PAGE.read_text("utf-8"), tables(result))
    with atomic.new_file(PAGE) as partial:
        partial.write_text(page, encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--measure",
        nargs="*",
        choices=KINDS,
        help="take the steps that are not there yet, of these kinds or of all",
    )
    kinds = options.parse_args().measure
    result = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    if kinds is not None:
        result = measure(result, kinds or KINDS)
        with atomic.new_file(RESULT) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
    write(result)


if __name__ == "__main__":
    main()
