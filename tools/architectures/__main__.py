"""The command line: python -m tools.architectures [--types a,b] [--methods lora,…]."""

import argparse
from pathlib import Path

from peft_from_scratch.methods import METHODS

from . import sweep, table, tiny


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    out = options.out
    sweep.sweep(
        options.types, options.methods, out, jobs=options.jobs, limit=options.limit
    )
    print(table.summary(sweep.read(out)))
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.architectures",
        description="Every method on a tiny random model of every causal language "
        "model type of transformers. A run that was broken off goes on where it was.",
    )
    names = [method.name for method in METHODS]
    parser.add_argument("--types", type=listed, default=tiny.types(), metavar="A,B")
    parser.add_argument("--methods", type=listed, default=names, metavar="A,B")
    parser.add_argument("--jobs", type=int, default=1, help="children at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a child")
    parser.add_argument("--out", type=Path, default=Path("out/architectures.jsonl"))
    options = parser.parse_args(arguments)
    for given, known in ((options.types, tiny.types()), (options.methods, names)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{unknown[0]!r} is unknown; known are {', '.join(known)}")
    return options


def listed(text: str) -> list[str]:
    """The names between commas."""
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    raise SystemExit(main())
