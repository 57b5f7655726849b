"""tiny's model card, data/tiny/README.md: written from what was measured, never typed.

    python -m tools.tiny_card          write it
    python -m tools.tiny_card --run    make the runs that it lacks first

What pretraining measured stands in data/tiny/pretraining.json; whether methods differ
on tiny by more than seeds do, in the run store (experiments/separation.py).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from peft_from_scratch.common import atomic
from peft_from_scratch.common.progress import bar
from peft_from_scratch.comparison import estimate
from peft_from_scratch.ledger import runs
from peft_from_scratch.ledger.experiments import finetune, separation
from peft_from_scratch.models import tiny
from tools import corpus, pretrain

TEMPLATE = Path(__file__).with_name("tiny_card.md")
FILE = tiny.FOLDER / "README.md"
MEASURED = tiny.FOLDER / "pretraining.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write tiny's model card.")
    parser.add_argument("--run", action="store_true", help="make missing runs first")
    if parser.parse_args(arguments).run:
        make_runs()
    with atomic.new_file(FILE) as new:
        new.write_text(text(), "utf-8")
    print(f"written: {FILE.relative_to(tiny.FOLDER.parents[1])}")
    return 0


def make_runs() -> None:
    """Make what the table lacks; each run is stored as soon as it is done."""
    while missing := [c for c in separation.configs() if not runs.stored(c)]:
        with bar("tiny's table", "run", len(missing)) as shown:
            for config in missing:
                runs.result(config, lambda config=config: finetune.compute(config))
                shown.update()


def text() -> str:
    """The card, as the files in data/ have it to be."""
    record = json.loads(MEASURED.read_text("utf-8"))
    words = record | _written(record)
    words |= {
        "kinds": "\n".join(f"| {name} | {weight} |" for name, weight in _mix()),
        "abilities_table": "\n".join(_abilities(record)),
        "samples": "\n\n".join(_samples(record)),
        "methods": "\n\n".join(_methods()),
        "gates": ", ".join(f"{name} {g:.0%}" for name, g in pretrain.GATES.items()),
    }
    return TEMPLATE.read_text("utf-8").format(**words)


def _written(record: dict) -> dict[str, str]:
    return {
        "duration": estimate.duration(record["seconds"]),
        "size": f"{(tiny.FOLDER / 'model.safetensors').stat().st_size / 1e6:.1f} MB",
        "recipe_words": _recipe(record),
        "torch": record["packages"]["torch"],
    }


def _recipe(record: dict) -> str:
    settings = [f"{name} {value}" for name, value in record["recipe"].items()]
    parts = [f"{p['steps']:,} steps at {p['lr']:g}" for p in record["phases"]]
    return ", ".join([*settings, f"highest rate: {', then '.join(parts)}"])


def _mix() -> Iterator[tuple[str, int]]:
    for kind, weight in corpus.MIX.items():
        yield kind.__name__, weight


def _abilities(record: dict) -> Iterator[str]:
    """A line a checkpoint, the finished model last."""
    names = list(record["abilities"])
    yield f"| steps | loss | {' | '.join(names)} |"
    yield "| ---: | ---: |" + " ---: |" * len(names)
    for row in [*record["checkpoints"], {**record, "loss": record["held_out_loss"]}]:
        shares = " | ".join(f"{row['abilities'][name]:.0%}" for name in names)
        yield f"| {row['steps']:,} | {row['loss']:.3f} | {shares} |"


def _samples(record: dict) -> Iterator[str]:
    for sample in record["samples"]:
        lines = f"{sample['asked']}{sample['answer']}".splitlines()
        quoted = "\n".join(f"    {line}".rstrip() for line in lines)
        yield f"{sample['what']}:\n\n{quoted}"


def _methods() -> Iterator[str]:
    rows = list(separation.rows())
    apart = [row for row in rows if row.told_apart]
    compared = [row for row in rows if row.over]
    yield (
        f"Of {len(compared)} differences to {separation.REFERENCE}, {len(apart)} are "
        "larger than the seeds' noise: their 95 % interval excludes zero."
    )
    for task in separation.TASKS:
        yield f"**{task}**, test loss in nats per token:\n\n" + "\n".join(
            _table([row for row in rows if row.task == task])
        )


def _table(rows: Sequence[separation.Row]) -> Iterator[str]:
    over = f"over {separation.REFERENCE} [95 %]"
    yield f"| method | trained | rate | loss [95 %] | {over} | s a run |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for row in rows:
        over = _interval(row.over, "+") if row.over else ""
        cells = (
            row.method,
            f"{row.trainable:,}",
            "" if row.lr is None else f"{row.lr:g}",
            _interval(row.loss),
            f"**{over}**" if row.told_apart else over,
            f"{row.seconds:.0f}" if row.lr else "",
        )
        yield f"| {' | '.join(cells)} |"


def _interval(values: Sequence[float], sign: str = "") -> str:
    middle, low, high = (f"{value:{sign}.3f}" for value in values)
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    raise SystemExit(main())
