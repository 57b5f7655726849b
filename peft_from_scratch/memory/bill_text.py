"""A bill as text for a terminal, and as a figure: table, bar, timeline, what fits."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..common.units import GB, MB
from ..plotting import curves
from ..plotting.theme import AMBER, ASH, RED, TAN
from .budget import Budget
from .changes import Change
from .timeline import peak

WIDTH = 60  # characters of the longest bar
LETTERS = {  # of the bar, in the order of stacking
    "weights": "W",
    "adapter": "+",
    "gradients": "G",
    "master": "M",
    "optimizer": "O",
    "reference": "R",
    "activations": "a",
    "logits": "l",
    "keys_and_values": "k",
    "transients": "t",
}
COLORS = curves.HOLDERS | {
    "adapter": RED,
    "logits": AMBER,
    "keys_and_values": TAN,
    "reference": ASH,
    "transients": "#e1e4e8",
}
NOTES = {
    "weights": "of the base, on one device",
    "adapter": "float32",
    "gradients": "of what trains",
    "master": "float32 copy of trained half-precision weights",
    "optimizer": "AdamW's m and v",
    "reference": "what trains of the base, as it was before",
    "activations": "kept from forward to backward",
    "logits": "and their gradient, at the worst moment of the loss",
    "keys_and_values": "the cache of all positions",
}


def size(count: float) -> str:
    """Bytes with their unit: GB of 10^9, MB of 10^6."""
    return f"{count / GB:,.2f} GB" if count >= GB else f"{count / MB:,.2f} MB"


def table(budget: Budget) -> str:
    """The rows of the bill, their total, and the peak with its range."""
    w = budget.weighed
    trained = w.own + w.added
    lines = [
        f"{w.total:,} parameters, {trained:,} of them and of adapters train"
        + (f"; a token uses {w.active:,}" if w.active < w.total else "")
    ]
    for name in LETTERS:
        count = budget.parts.get(name)
        if count:
            lines.append(f"  {words(name):<16}{size(count):>12}   {NOTES[name]}")
    lines.append(f"  {'total':<16}{size(budget.total):>12}   not all at one moment")
    moment, most = peak(budget.moments)
    lines.append(f"  {'peak':<16}{size(most):>12}   {moment}")
    ends = {"low": budget.low, "expected": most, "high": budget.high}
    lines.append("Peak, by implementation:")
    lines += [f"  {name:<16}{size(end):>12}" for name, end in ends.items()]
    lines += [f"    {reason}" for reason in budget.because]
    lines.append(f"Activations: {budget.way}.")
    return "\n".join(lines)


def bar(budget: Budget) -> str:
    """The moment of the peak as one bar of letters, with their legend."""
    moment, most = peak(budget.moments)
    at = budget.moments[moment]
    return f"At the peak ({moment}):\n  {_bar(at, most)}\n  {_legend([at])}"


def steps(budget: Budget) -> str:
    """The timeline: each moment's bytes and bar; the peak is marked."""
    moment, most = peak(budget.moments)
    lines = ["The step, moment by moment:"]
    for name, at in budget.moments.items():
        mark = "  <- peak" if name == moment else ""
        total = size(sum(at.values()))
        lines.append(f"  {name:<16}{total:>12} {_bar(at, most, WIDTH - 15)}{mark}")
    lines.append(f"  {_legend(budget.moments.values())}")
    return "\n".join(lines)


def fitting(
    budget: Budget,
    room: int,
    rows: Sequence[Change],
    idle: Sequence[str],
    cards: Sequence[tuple[int, int | None]],
) -> str:
    """Whether it fits, what single changes save, and how much fits on which card.

    Args
        rows   the changes that lower the peak; idle: the names of the others
        cards  (bytes, largest batch that fits, or None where it is not known)
    """
    verdict = "fits" if budget.peak <= room else "does not fit"
    lines = [f"{size(budget.peak)} {verdict} in {size(room)}."]
    if rows:
        lines.append(f"Most is saved by: {rows[0].name}. Each change alone:")
    for row in rows:
        mark = "fits" if row.peak <= room else ""
        saved = f"{size(row.saved):>12} less, peak {size(row.peak):>12}"
        lines.append(f"  {row.name:<38}{saved}  {mark}".rstrip())
    if idle:
        lines.append(f"Alone, these save nothing at the peak: {', '.join(idle)}.")
    lines.append("On one card, as it is:")
    for there, batch in cards:
        fits = "fits" if budget.peak <= there else "does not fit"
        count = "" if batch is None else f"; batch of {batch:,} at most"
        none = "; not one row fits" if batch == 0 else count
        lines.append(f"  {size(there):>10}  {fits}{none}")
    return "\n".join(lines)


def omitted(budget: Budget) -> str:
    return "\n".join(["Not counted:", *(f"  {line}" for line in budget.not_counted)])


def figure(budget: Budget, name: str) -> Figure:
    """The timeline as bars, a moment each."""
    moment, most = peak(budget.moments)
    setup = budget.setup
    phase = "" if setup.phase == "train" else f"{setup.phase}, "
    return curves.bars(
        {
            f"{label}, the peak" if label == moment else label: _positive(at)
            for label, at in budget.moments.items()
        },
        kinds={words(part): COLORS[part] for part in LETTERS},
        title=f"{name}, {setup.method}: {size(most)} at the peak, {moment}",
        subtitle=f"{phase}{setup.dtype}, batch {setup.batch}, {setup.length} tokens; "
        f"activations: {budget.way}.",
    )


def _positive(at: dict[str, int]) -> dict[str, int]:
    return {words(part): count for part, count in at.items() if count > 0}


def words(part: str) -> str:
    return part.replace("_", " ")


def _bar(at: dict[str, int], most: int, width: int = WIDTH) -> str:
    """Letters in proportion; their number is rounded where each part ends."""
    text, end = "", 0
    for part, letter in LETTERS.items():
        end += at.get(part, 0)
        text += letter * (round(width * end / most) - len(text))
    return text


def _legend(moments) -> str:
    used = {part for at in moments for part, count in at.items() if count > 0}
    return "  ".join(
        f"{letter} {words(part)}" for part, letter in LETTERS.items() if part in used
    )
