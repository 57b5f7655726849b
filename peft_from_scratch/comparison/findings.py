"""What a comparison found, in plain sentences.

Every sentence is computed from the result, so that none can outlive its numbers. The
terminal table, the page and the figures' titles all take their words from here.
"""

from itertools import combinations

from ..training.config import History
from .apart import (
    REFERENCE,
    leaders,
    measured,
    own,
    pair,
    reference,
    told_apart,
    trained,
    verdict,
)
from .background import number
from .columns import (
    exact_match,
    found,
    megabytes,
    parameter_share,
    percent,
    score_words,
)

SAME_SIZE = 0.15  # parameters that differ by less count as equally many
SMOOTHED = 5  # steps whose mean loss is told

# Titles ------------------------------------------------------------------------------


def headline(result: dict) -> str:
    """The one sentence to remember: who beats few-shot prompting, and how cheaply."""
    judged = [row for row in own(trained(result)) if verdict(result, row)]
    winners = [row for row in judged if verdict(result, row) == "beats"]
    if not judged:
        return best(result)
    if not winners:
        return "No fine-tuned method is shown to beat few-shot prompting here"
    smallest = min(winners, key=lambda row: row["trainable"])
    share = f"{parameter_share(smallest)} % of the parameters"
    if len(winners) == 1:
        others = f"; {len(judged) - 1} others do not" if len(judged) > 2 else ""
        others = "; the other one does not" if len(judged) == 2 else others
        return (
            f"{smallest['label']} beats few-shot prompting by training {share}{others}"
        )
    many = number(len(judged)).lower()
    who = f"All {many}" if len(judged) > 2 else "Both"
    if len(winners) < len(judged):
        who = f"{number(len(winners))} of {many}"
    return (
        f"{who} fine-tuned methods beat few-shot prompting; "
        f"the smallest of them trains {share}"
    )


def best(result: dict) -> str:
    """What the rows reach that no other is told to beat, and few-shot's beside it."""
    rows = measured(result)
    if not rows:
        return "No score was measured"
    if not any(row["exact"]["rate"] for row in rows):
        return "No method answers any of the test rows right"
    few_shot, first = reference(result), leaders(result, rows)
    sentence = _alone(result, first[0]) if len(first) == 1 else _together(result, first)
    if few_shot and few_shot not in first:
        sentence += f"; few-shot prompting, {_rate(few_shot)}"
    return sentence


def _alone(result: dict, row: dict) -> str:
    sentence = f"{row['label']} {score_words(result)[1].format(_rate(row))}"
    if row.get("trainable"):
        share = "all" if row.get("share") == 1 else f"{parameter_share(row)} % of the"
        sentence += f", training {share} parameters"
    return sentence


def _together(result: dict, rows: list[dict]) -> str:
    """Rows that are not told apart, without a word on which is higher."""
    rates = " to ".join(dict.fromkeys((_rate(rows[-1]), _rate(rows[0]))))
    many = number(len(rows))
    if not result.get("pairs"):
        return f"{many} methods reach {rates}"
    shared = set.intersection(*(set(row.get("letters", "")) for row in rows))
    which = f" (letter {min(shared)})" if shared else ""
    return f"{many} methods{which} reach {rates} and are not told apart"


def peak_memory(result: dict) -> str:
    """The lowest and the highest peak of the rows that train."""
    rows = [row for row in trained(result) if found(row, "memory", "peak")]
    if not rows:
        return "Memory by what holds it"
    rows.sort(key=lambda row: row["memory"]["peak"])
    ends = rows[:1] if len(rows) == 1 else (rows[0], rows[-1])
    peaks = (f"{megabytes(row['memory']['peak'])} MB ({row['label']})" for row in ends)
    return f"A training step takes {' to '.join(peaks)} at its peak"


def training(history: History) -> str:
    """Where the loss of a training run went."""
    seen = [loss for _, loss in history.validation] or history.loss
    what = "Validation loss" if history.validation else "Training loss"
    return (
        f"{what} went from {seen[0]:.2f} to {seen[-1]:.2f} nats per token "
        f"in {history.steps} steps"
    )


def _rate(row: dict) -> str:
    return f"{percent(row, row['exact']['rate'])} %"


# Under the table ---------------------------------------------------------------------


def verdicts(result: dict) -> list[str]:
    """For each fine-tuned row, whether it beats few-shot prompting."""
    if not reference(result):
        return ["Few-shot prompting was not among the rows: none is compared with it."]
    return [_verdict(result, row) for row in trained(result)]


def _verdict(result: dict, row: dict) -> str:
    kind = verdict(result, row)
    if kind is None:
        return f"{row['label']}: not compared with few-shot."
    paired = pair(result, row["key"], REFERENCE)
    low, high = (percent(row, paired[end], "+") for end in ("low", "high"))
    does = {
        "beats": "beats few-shot",
        "trails": "does worse than few-shot",
        "open": "is not told apart from few-shot",
    }
    outside = paired["low"] > 0 or paired["high"] < 0
    counted = ""
    if kind == "open" and outside:
        counted = f" With {len(result['pairs'])} pairs, that can be chance."
    return (
        f"{row['label']}: {does[kind]}. The 95 % interval of the difference, {low} to "
        f"{high} points, {'excludes' if outside else 'includes'} zero.{counted}"
    )


def views(result: dict) -> list[str]:
    """The fair comparisons within the table: of equal size, and of equal time."""
    return [view for view in (equal_parameters(result), equal_seconds(result)) if view]


def equal_parameters(result: dict) -> str | None:
    """The rows that train about as many parameters as LoRA, and their exact match."""
    size = next((r["trainable"] for r in trained(result) if r["key"] == "lora"), 0)
    rows = [
        row
        for row in measured(result)
        if size and abs((row.get("trainable") or 0) - size) <= SAME_SIZE * size
    ]
    if len(rows) < 2:
        return None
    scores = ", ".join(f"{row['label']} {exact_match(row)} %" for row in rows)
    return (
        f"At equal parameters, those within {100 * SAME_SIZE:.0f} % of LoRA's "
        f"{size:,}: {scores}.{_apart_among(result, rows)}"
    )


def _apart_among(result: dict, rows: list[dict]) -> str:
    """Which of these rows are told apart; nothing where a result has no pairs."""
    if not result.get("pairs"):
        return ""
    names = [
        f"{a['label']} from {b['label']}"
        for a, b in combinations(rows, 2)
        if told_apart(result, a["key"], b["key"])
    ]
    if not names:
        return " They are not told apart."
    return f" Told apart: {'; '.join(names)}."


def equal_seconds(result: dict) -> str | None:
    """Where each method's training loss was when the quickest of them was done."""
    curves = loss_by_second(result)
    if len(curves) < 2:
        return None
    until = min(points[-1][0] for points in curves.values())
    there = {
        label: [loss for second, loss in points if second <= until][-1]
        for label, points in curves.items()
    }
    losses = ", ".join(f"{label} {loss:.3f}" for label, loss in there.items())
    return (
        f"At equal seconds, {until:.0f} s of training, when the first of them is done: "
        f"{losses}. Nats per label token, mean of {SMOOTHED} steps, on rows that are "
        "being seen for the first time."
    )


def final_losses(result: dict) -> str:
    """The range in which the training losses ended."""
    last = [points[-1][1] for points in loss_by_second(result).values()]
    return f"Training losses end between {min(last):.3f} and {max(last):.3f}"


def loss_by_second(result: dict) -> dict[str, list[tuple[float, float]]]:
    """{label: [(seconds, mean loss of the last SMOOTHED steps)]} of what trained."""
    curves = {}
    for row in trained(result):
        curve = row.get("curve") or {"loss": [], "seconds": []}
        loss, seconds = curve["loss"], curve["seconds"]
        if len(loss) >= SMOOTHED:
            curves[row["label"]] = [
                (seconds[i], sum(loss[i + 1 - SMOOTHED : i + 1]) / SMOOTHED)
                for i in range(SMOOTHED - 1, len(loss))
            ]
    return curves


# The pictures, for those who cannot see them -----------------------------------------


def loss_in_words(result: dict) -> str:
    """The figure of loss against seconds as text."""
    ends = (
        f"{label}: {points[-1][1]:.3f} after {points[-1][0]:.0f} s"
        for label, points in loss_by_second(result).items()
    )
    return f"Training loss in nats per label token, against seconds. {'. '.join(ends)}."


def quality_in_words(result: dict) -> str:
    """The quality figure as text."""
    points = (
        f"{row['label']}: {row['trainable']:,} parameters, {exact_match(row)} %"
        f"{_letters(row)}"
        for row in measured(result)
        if row.get("trainable") is not None
    )
    return (
        f"{score_words(result)[0]} in percent, with 95 % intervals, against trainable "
        "parameters. "
        f"{'. '.join(points)}."
    )


def _letters(row: dict) -> str:
    return f", letters {row['letters']}" if row.get("letters") else ""


def memory_in_words(result: dict) -> str:
    """The memory figure as text."""
    bars = (
        f"{row['label']}, {row['memory']['when']}: peak "
        f"{megabytes(row['memory']['peak'])} MB"
        for row in result["rows"]
        if row.get("memory")
    )
    kinds = "weights, gradients, optimizer state and activations"
    return f"Memory in bars stacked from {kinds}. {'. '.join(bars)}."
