"""`budget`: the memory bill of a step, predicted from a config.json, offline."""

import json
from dataclasses import asdict
from pathlib import Path

from ..common import atomic
from ..memory import bill_text, timeline
from ..memory.budget import Budget, bill
from ..memory.changes import CARDS, changes, most_rows, size_in_bytes
from ..memory.pieces import shared
from ..memory.setups import RECIPES, Setup
from ..memory.shapes import read_config
from ..memory.weighing import OPTIONS
from .commands import given

ASKED = ("method", "dtype", "batch", "attention", "chunk", "zero", "ranks", "phase")


def budget(options) -> None:
    """Print the bill, or one JSON object with its bytes; --out draws it.

    Raises  ValueError  no such configuration, an option out of its range, a model that
            the method cannot adapt
    """
    room = None if options.fit is None else size_in_bytes(options.fit)
    setup = Setup(
        length=options.seq,
        checkpointing=options.checkpointing,
        options=given(options, *OPTIONS),
        **given(options, *ASKED),
    )
    if setup.zero and setup.ranks == 1:
        raise ValueError(
            f"--zero {setup.zero} divides among several devices: say --ranks N"
        )
    config = read_config(options.config)
    made = bill(config, setup)
    fit = None if room is None else _fit(config, made, room)
    if options.out:
        _draw(made, options)
    if options.json:
        print(json.dumps(as_json(made, options.config) | _fit_json(fit), indent=1))
        return
    sections = [bill_text.table(made), bill_text.bar(made), bill_text.steps(made)]
    if fit is not None:
        sections.append(bill_text.fitting(made, *fit))
    print("\n\n".join([*sections, bill_text.omitted(made)]))


def as_json(made: Budget, source: str) -> dict:
    """The bill as whole numbers of bytes; see `--json` in the documentation."""
    w, (moment, most) = made.weighed, timeline.peak(made.moments)
    return made.parts | {
        "total": made.total,
        "peak": most,
        "peak_moment": moment,
        "low": made.low,
        "expected": most,
        "high": made.high,
        "range_because": list(made.because),
        "weights_frozen": made.parts["weights"] - _own_weights(made),
        "weights_trained": _own_weights(made),
        "parameters": w.total,
        "parameters_active": w.active,
        "parameters_trained": w.own + w.added,
        "transients": made.transients,
        "timeline": {name: sum(at.values()) for name, at in made.moments.items()},
        "activations_by": made.way,
        "not_counted": list(made.not_counted),
        "inputs": {"config": str(source)} | asdict(made.setup),
    }


def _own_weights(made: Budget) -> int:
    """Bytes of the base's weights that train, on one device."""
    own = RECIPES[made.setup.dtype].weights * made.weighed.own
    return shared(own, made.setup, 3)


def _fit(config, made: Budget, room: int) -> tuple:
    cards = sorted({*(card * 10**9 for card in CARDS), room})
    return (
        room,
        changes(config, made),
        [(card, most_rows(config, made, card)) for card in cards],
    )


def _fit_json(fit: tuple | None) -> dict:
    if fit is None:
        return {}
    room, rows, cards = fit
    changed = [{"name": r.name, "peak": r.peak, "saved": r.saved} for r in rows]
    return {
        "fit": {
            "bytes": room,
            "changes": changed,
            "largest_batch": {str(card): most for card, most in cards},
        }
    }


def _draw(made: Budget, options) -> None:
    out = Path(options.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out}: the name of a .png, .svg or .pdf is needed")
    with atomic.new_file(out) as file:
        bill_text.figure(made, str(options.config)).savefig(
            file, dpi=150, format=out.suffix[1:]
        )
