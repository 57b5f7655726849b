"""What a comparison found, in plain sentences.

Every sentence is computed from the result, so that none can outlive its numbers. The
terminal table, the page and the figures' titles all take their words from here.
"""

from ..training.config import History
from .columns import (
    ABSENT,
    exact_match,
    found,
    megabytes,
    parameter_share,
    percent,
    significant,
)

REFERENCE = "few-shot"  # the row that a fine-tuned one has to beat
SAME_SIZE = 0.15  # parameters that differ by less count as equally many
SMOOTHED = 5  # steps whose mean loss is told
NUMBERS = "No One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()
SETTINGS = {  # how a setting is said; any other is "name value"
    "lr": "learning rate {:g}",
    "template": "{} template",
    "k": "{} examples",
    "order": "drawn with seed {}",
    "r": "rank r = {}",
    "alpha": "alpha = {}",
    "m": "bottleneck m = {}",
    "n": "{} positions",
    "start": "started from {}",
    "lr_ratio": "B at {:g} times the rate",
}


# Which rows --------------------------------------------------------------------------


def trained(result: dict) -> list[dict]:
    """The rows that train parameters."""
    return [row for row in result["rows"] if row.get("trainable")]


def own(result: dict) -> list[dict]:
    """Those of them that are this library's, not another's to stand beside."""
    return [row for row in trained(result) if not row.get("library")]


def measured(result: dict) -> list[dict]:
    """The rows that have an exact match with its interval."""
    return [
        row
        for row in result["rows"]
        if None not in [found(row, "exact", end) for end in ("rate", "low", "high")]
    ]


def reference(result: dict) -> dict | None:
    """The few-shot row, where it was measured."""
    return next((row for row in measured(result) if row["key"] == REFERENCE), None)


def verdict(row: dict) -> str | None:
    """What the paired interval says against few-shot: "beats", "trails" or "open"."""
    low, high = (found(row, "against", REFERENCE, end) for end in ("low", "high"))
    if low is None or high is None:
        return None
    if low > 0:
        return "beats"
    return "trails" if high < 0 else "open"


# Titles ------------------------------------------------------------------------------


def headline(result: dict) -> str:
    """The one sentence to remember: who beats few-shot prompting, and how cheaply."""
    judged = [row for row in own(result) if verdict(row)]
    winners = [row for row in judged if verdict(row) == "beats"]
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
    many = _number(len(judged)).lower()
    who = f"All {many}" if len(judged) > 2 else "Both"
    if len(winners) < len(judged):
        who = f"{_number(len(winners))} of {many}"
    return (
        f"{who} fine-tuned methods beat few-shot prompting; "
        f"the smallest of them trains {share}"
    )


def best(result: dict) -> str:
    """The highest exact match, and few-shot's beside it."""
    rows = measured(result)
    if not rows:
        return "No exact match was measured"
    few_shot = reference(result)
    top = max(rows, key=lambda r: (r["exact"]["rate"], -(r.get("trainable") or 0)))
    if not top["exact"]["rate"]:
        return "No method answers any of the test rows exactly"
    sentence = f"{top['label']} answers {_rate(top)} of the test rows exactly"
    if top.get("trainable"):
        share = "all" if top.get("share") == 1 else f"{parameter_share(top)} % of the"
        sentence += f", training {share} parameters"
    if few_shot and few_shot is not top:
        sentence += f"; few-shot prompting, {_rate(few_shot)}"
    return sentence


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


def setting(result: dict) -> str:
    """What was compared, on what: base, task, rows, seeds, number format and device."""
    seeds = result["seeds"]
    return (
        f"{_base(result)} on the task {result['task']}: "
        f"{result['rows_tested']} test rows, seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}, {result['dtype']} on {result['device']}"
    )


def introduction(result: dict) -> str:
    """What was done, for somebody who has not heard of it."""
    ways = [row for row in result["rows"] if not row.get("library")]
    sizes = [row["total"] for row in ways if row.get("total")]
    large = f" of {significant(min(sizes) / 1e6)} million parameters" if sizes else ""
    return (
        f"{_number(len(ways))} ways to adapt {_base(result)}, a "
        f"language model{large}, to one task. Each "
        f"answered the same {result['rows_tested']} test rows, which none had seen. "
        f"The task: {_task(result)}"
    )


def _task(result: dict) -> str:
    asked = result["instruction"]
    return (
        f"“{asked}”" if asked else f"the prompts and completions of {result['task']}."
    )


def _base(result: dict) -> str:
    return result["base_name"].rstrip("/").split("/")[-1]


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _rate(row: dict) -> str:
    return f"{percent(row, row['exact']['rate'])} %"


# Under the table ---------------------------------------------------------------------


def verdicts(result: dict) -> list[str]:
    """For each fine-tuned row, whether it beats few-shot prompting."""
    if not reference(result):
        return ["Few-shot prompting was not among the rows: none is compared with it."]
    return [_verdict(row) for row in trained(result)]


def _verdict(row: dict) -> str:
    kind = verdict(row)
    if kind is None:
        return f"{row['label']}: not compared with few-shot."
    paired = row["against"][REFERENCE]
    low, high = (percent(row, paired[end], "+") for end in ("low", "high"))
    does = {
        "beats": "beats few-shot",
        "trails": "does worse than few-shot",
        "open": "is not shown to differ from few-shot",
    }
    zero = "includes" if kind == "open" else "excludes"
    return (
        f"{row['label']}: {does[kind]}. The 95 % interval of the difference, {low} to "
        f"{high} points, {zero} zero."
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
        f"{size:,}: {scores}."
    )


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


def certainty(result: dict) -> list[str]:
    """What the brackets are, and what they do not cover."""
    seeds = result["seeds"]
    judged = sum(verdict(row) is not None for row in trained(result))
    sentences = [
        "Brackets after an exact match hold its 95 % Wilson interval: the true shares "
        "that so many test rows cannot rule out.",
        "Brackets after a difference to another row hold a paired bootstrap 95 % "
        "interval: test rows are drawn again and again, with replacement, the same "
        "ones for both methods, and 95 % of the differences so found lie inside.",
        "Brackets after a decoding time hold the smallest and the largest ratio of "
        "the timing rounds; the figure before them is the median.",
    ]
    if judged > 1:
        sentences.append(
            f"{judged} fine-tuned methods are compared with few-shot; at 95 %, one "
            "comparison in twenty between equals would exclude zero by chance."
        )
    if len(seeds) == 1:
        sentences.append(
            "There was one seed: the intervals cover which test rows were drawn, not "
            "the luck of one training run."
        )
    else:
        sentences.append(
            f"Exact match of a method that trains is its mean over {len(seeds)} seeds; "
            f"the other columns are those of seed {seeds[0]}."
        )
    return sentences


def settings(result: dict) -> list[tuple[str, str]]:
    """(label, what it was run with and where that comes from) for each row."""
    return [(row["label"], _settings(row)) for row in result["rows"]]


def _settings(row: dict) -> str:
    parts = [
        SETTINGS.get(name, name + " {}").format(value)
        for name, value in (row.get("settings") or {}).items()
        if value is not None
    ]
    if row.get("steps") and row.get("batch"):
        parts.append(f"{row['steps']} steps of {row['batch']} rows")
    if row.get("settings_from"):
        parts.append(row["settings_from"])
    if len(row.get("per_seed") or []) > 1:
        parts.append("right by seed: " + ", ".join(f"{k:g}" for k in row["per_seed"]))
    return "; ".join(parts) or ABSENT


def tuning(result: dict) -> list[str]:
    """What the settings mean, and how they were found where a search is known."""
    sentences = [
        "A template is how prompt and answer are joined: by the chat model's own "
        "markers (chat) or as plain text (raw)."
    ]
    tuned = result.get("tuned")
    if tuned:
        sentences.append(
            f"The settings were searched in {tuned['runs']} runs on validation rows, "
            f"never on test rows ({tuned['file']}, {tuned['when']}). "
            f"Rule: {tuned['rule']}."
        )
    return sentences


def notes(result: dict) -> list[str]:
    """What a reader must know to compare the columns fairly."""
    sentences = [
        "MB is a million bytes. Memory counts the bytes that tensors hold, and not the "
        "Python process or what the device's kernels and allocator take besides. Each "
        "kind is given at its own highest moment: their sum may exceed the peak."
    ]
    idle = [row["label"] for row in result["rows"] if row.get("trainable") == 0]
    if idle:
        sentences.append(
            "Memory is that of one training step; for rows that train nothing "
            f"({'; '.join(idle)}) it is that of answering one batch."
        )
    return sentences + [
        f"Merging: {reason} ({'; '.join(labels)})."
        for reason, labels in _merge_reasons(result).items()
    ]


def _merge_reasons(result: dict) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        reason = found(row, "merge", "reason")
        if reason:
            reasons.setdefault(reason.rstrip("."), []).append(row["label"])
    return reasons


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
        for row in measured(result)
        if row.get("trainable") is not None
    )
    return (
        "Exact match in percent, with 95 % intervals, against trainable parameters. "
        f"{'. '.join(points)}."
    )


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
