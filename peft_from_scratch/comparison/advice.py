"""Should I prompt or fine-tune, and how? The answer that a result's intervals allow.

A method is advised over another for its score only where the two are told apart. Of the
methods that no other is told to beat, which are not told apart from each other, the
cheapest is advised. Cost is, in this order: any training, examples before each prompt,
the seconds of training. Training must pay: where no way of prompting is among these
methods, the advised one is told to beat every way of prompting.

With few rows, all may be among these methods, and yet prompting got nothing right. So
training that beats every way of prompting by its own 95 % intervals, and not by those
that allow for the number of pairs, is advised with a "probably".
"""

from math import inf

from .apart import better, leaders, measured, own, pair, told_apart
from .background import settings_of
from .columns import found, percent

FORGETS = 0.1  # nats a token on general text: tokens there about 10 % less probable


def advice(result: dict) -> list[str]:
    """What to do with these rows, as sentences of one paragraph."""
    rows = own(measured(result))
    if not any(row["exact"]["rate"] for row in rows):
        return ["Nothing worked: no method answers any of the test rows right."]
    row = choice(result)
    say = _fine_tune if row.get("trainable") else _prompt
    return [
        *say(result, row, rows),
        *_undecided(result, row, rows),
        *_forgets(result, row, rows),
        f"Settings of {_name(row)}: {settings_of(row)}.",
    ]


def choice(result: dict) -> dict | None:
    """The row that is advised; None where no score was measured."""
    rows = own(measured(result))
    first = leaders(result, rows)
    if any(not row.get("trainable") for row in first):
        return min(_leaning(result, first, rows) or first, key=cost)
    paid = [row for row in first if _beats_prompting(result, row, rows)]
    return min(paid or first[:1], key=cost, default=None)


def cost(row: dict) -> tuple:
    """What the advice spares; the smaller is the cheaper."""
    if not row.get("trainable"):
        return False, row["key"] != "zero-shot"
    seconds = found(row, "seconds", "train")
    return True, inf if seconds is None else seconds


def _prompting(rows: list[dict]) -> list[dict]:
    """The rows that train nothing, the highest score first."""
    untrained = [row for row in rows if not row.get("trainable")]
    return sorted(untrained, key=lambda row: -row["exact"]["rate"])


def _beats_prompting(result: dict, row: dict, rows: list[dict]) -> bool:
    return all(better(result, row["key"], p["key"]) for p in _prompting(rows))


def _leaning(result: dict, first: list[dict], rows: list[dict]) -> list[dict]:
    """Of these, the trained rows that beat prompting by their intervals alone."""
    prompting = [row["key"] for row in _prompting(rows)]
    return [
        row
        for row in first
        if row.get("trainable")
        and all(_gain(result, row["key"], key) > 0 for key in prompting)
    ]


def _gain(result: dict, of: str, over: str) -> float:
    """The low end of the 95 % interval of one score minus the other."""
    compared = pair(result, of, over)
    return compared["low"] if compared else -inf


# Prompt ------------------------------------------------------------------------------


def _prompt(result: dict, row: dict, rows: list[dict]) -> list[str]:
    """Nothing that trains is told to beat this."""
    others = [other for other in rows if other.get("trainable")]
    if not others:
        return [f"Prompt with {_name(row)}: no fine-tuned method was measured."]
    equal = [o for o in others if not told_apart(result, row["key"], o["key"])]
    if not equal:
        return [f"Prompt: {_name(row)} is better than every fine-tuned method here."]
    return [
        f"Prompt: no fine-tuned method is shown to beat {_name(row)}.",
        *_answering(row, min(equal, key=cost)),
    ]


def _answering(prompting: dict, other: dict) -> list[str]:
    """What prompting costs at answering, where it takes clearly longer."""
    spent = [found(row, "seconds", "answer") for row in (prompting, other)]
    if None in spent or spent[0] <= 1.2 * spent[1]:
        return []
    return [
        "It needs no training, but answering takes longer: it took "
        f"{spent[0]:.0f} s, and {spent[1]:.0f} s with {_name(other)}."
    ]


# Fine-tune ---------------------------------------------------------------------------


def _fine_tune(result: dict, row: dict, rows: list[dict]) -> list[str]:
    """What the advised row is told to beat, and what it is not told apart from."""
    equal = [
        other
        for other in rows
        if other.get("trainable")
        and other is not row
        and not told_apart(result, row["key"], other["key"])
    ]
    faster = [other for other in equal if cost(other) < cost(row)]
    slower = [other for other in equal if other not in faster]
    return [
        _paid(result, row, rows),
        *_slower(row, slower),
        *_faster(result, faster, rows),
        *([] if equal else _alone(result, row, rows)),
    ]


def _paid(result: dict, row: dict, rows: list[dict]) -> str:
    """What the training gained over prompting."""
    prompting = _prompting(rows)
    if not prompting:
        return f"Fine-tune with {_name(row)}. Prompting was not measured."
    if any(p in leaders(result, rows) for p in prompting):
        return _probably(result, row, prompting[0])
    if not _beats_prompting(result, row, rows):
        return (
            f"Fine-tune with {_name(row)}. Every way of prompting is beaten, though "
            "not all by this method."
        )
    gain = pair(result, row["key"], prompting[0]["key"])
    low, high = (percent(row, gain[end]) for end in ("low", "high"))
    return (
        f"Fine-tune with {_name(row)}: it is better than {_name(prompting[0])}, by "
        f"{low} to {high} points."
    )


def _probably(result: dict, row: dict, prompting: dict) -> str:
    """The row is ahead of prompting, but only by the interval of this one pair."""
    gain = pair(result, row["key"], prompting["key"])
    low, high = (percent(row, gain[end]) for end in ("low", "high"))
    return (
        f"Probably fine-tune with {_name(row)}: by itself, its 95 % interval is {low} "
        f"to {high} points above {_name(prompting)}. Allowing for all "
        f"{len(result['pairs'])} pairs of methods, that is undecided: more than "
        f"{result['rows_tested']} test rows would tell."
    )


def _alone(result: dict, row: dict, rows: list[dict]) -> list[str]:
    others = [other for other in rows if other.get("trainable") and other is not row]
    return ["It is better than every other fine-tuned method here."] * bool(others)


def _slower(row: dict, others: list[dict]) -> list[str]:
    if not others:
        return []
    seconds = found(row, "seconds", "train")
    spent = "" if seconds is None else f": {seconds:.0f} s"
    return [f"It is not told apart from {_list(others)}, but trains faster{spent}."]


def _faster(result: dict, others: list[dict], rows: list[dict]) -> list[str]:
    """Why rows that train faster are not advised."""
    first = leaders(result, rows)
    beaten = [other for other in others if other not in first]
    unpaid = [other for other in others if other in first]
    reasons = (
        (beaten, "beaten by another method"),
        (unpaid, "not told apart from prompting"),
    )
    return [
        f"Faster to train, but {reason}: {_list(group)}."
        for group, reason in reasons
        if group
    ]


def _undecided(result: dict, row: dict, rows: list[dict]) -> list[str]:
    """How far the highest score may be above the advised one."""
    top = max(rows, key=lambda other: other["exact"]["rate"])
    difference = pair(result, top["key"], row["key"])
    if top["exact"]["rate"] == row["exact"]["rate"] or not difference:
        return []
    low, high = (percent(row, difference[end], "+") for end in ("low", "high"))
    return [
        f"Undecided is not equal: the 95 % interval of {_name(top)} minus {_name(row)} "
        f"is {low} to {high} points."
    ]


def _forgets(result: dict, row: dict, rows: list[dict]) -> list[str]:
    """What the advised row lost on general text, and which equal one lost the least.

    Said where the loss there certainly rose by more than FORGETS.
    """
    low, high = _forgetting(row)
    if low is None or low <= FORGETS:
        return []
    lost = (
        f"What it learned before suffers: the loss on general text rose by {low:.2f} "
        f"to {high:.2f} nats a token"
    )
    spared = [
        other
        for other in rows
        if other.get("trainable")
        and not told_apart(result, row["key"], other["key"])
        and None not in _forgetting(other)
        and _forgetting(other)[1] < low
    ]
    if not spared:
        return [f"{lost}."]
    least = min(spared, key=lambda other: _forgetting(other)[1])
    ends = " to ".join(f"{end:.2f}" for end in _forgetting(least))
    return [f"{lost}; with {_name(least)}, which is not told apart from it, by {ends}."]


def _forgetting(row: dict) -> tuple[float | None, float | None]:
    return tuple(found(row, "forgetting", end) for end in ("low", "high"))


def _name(row: dict) -> str:
    """The row's name inside a sentence; a comma in it would read as a list."""
    label, comma, more = row["label"].partition(", ")
    name = f"{label} ({more})" if comma else label
    if row.get("trainable"):
        return name
    return f"{name[0].lower()}{name[1:]} prompting"


def _list(rows: list[dict]) -> str:
    *most, last = [_name(row) for row in rows]
    return f"{', '.join(most)} and {last}" if most else last
