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

ASKED = (
    "method",
    "dtype",
    "batch",
    "labels",
    "attention",
    "chunk",
    "zero",
    "ranks",
    "device",
    "phase",
    "group",
)


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
    predicted = bill(config, setup)
    fit = None if room is None else _fit(config, predicted, room)
    if options.out:
        _draw(predicted, options)
    if options.json:
        print(json.dumps(as_json(predicted, options.config) | _fit_json(fit), indent=1))
        return
    sections = [
        bill_text.table(predicted),
        bill_text.bar(predicted),
        bill_text.steps(predicted),
    ]
    if fit is not None:
        sections.append(bill_text.fitting(predicted, *fit))
    print("\n\n".join([*sections, bill_text.omitted(predicted)]))


def as_json(predicted: Budget, source: str) -> dict:
    """The bill as whole numbers of bytes; see `--json` in the documentation."""
    w, (moment, most) = predicted.weighed, timeline.peak(predicted.moments)
    return predicted.parts | {
        "total": predicted.total,
        "peak": most,
        "peak_moment": moment,
        "low": predicted.low,
        "expected": most,
        "high": predicted.high,
        "range_because": list(predicted.because),
        "weights_frozen": predicted.parts["weights"] - _own_weights(predicted),
        "weights_trained": _own_weights(predicted),
        "parameters": w.total,
        "parameters_active": w.active,
        "parameters_trained": w.own + w.added,
        "transients": predicted.transients,
        "timeline": {name: sum(at.values()) for name, at in predicted.moments.items()},
        "activations_by": predicted.way,
        "not_counted": list(predicted.not_counted),
        "inputs": {"config": str(source)} | asdict(predicted.setup),
    }


def _own_weights(predicted: Budget) -> int:
    """Bytes of the base's weights that train, on one device."""
    own = RECIPES[predicted.setup.dtype].weights * predicted.weighed.own
    return shared(own, predicted.setup, 3)


def _fit(config, predicted: Budget, room: int) -> tuple:
    cards = sorted({*(card * 10**9 for card in CARDS), room})
    return (
        room,
        *changes(config, predicted),
        [(card, most_rows(config, predicted, card)) for card in cards],
    )


def _fit_json(fit: tuple | None) -> dict:
    if fit is None:
        return {}
    room, rows, idle, cards = fit
    changed = [{"name": r.name, "peak": r.peak, "saved": r.saved} for r in rows]
    return {
        "fit": {
            "bytes": room,
            "changes": changed,
            "changes_that_save_nothing": idle,
            "largest_batch": {str(card): most for card, most in cards},
        }
    }


def _draw(predicted: Budget, options) -> None:
    out = Path(options.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out}: the name of a .png, .svg or .pdf is needed")
    with atomic.new_file(out) as file:
        bill_text.figure(predicted, Path(options.config).name).savefig(
            file, dpi=150, format=out.suffix[1:]
        )
