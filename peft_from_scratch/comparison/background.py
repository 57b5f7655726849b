"""What a reader must know about a comparison: what was compared, where, and how surely.

findings.py says what came out. Every sentence here is computed from the result, too.
"""

import math
from statistics import median

from .apart import own, trained
from .columns import ABSENT, LETTERS, found, score_words, significant

LONG_SEEDS, LONG_ROWS = 3, 300  # of the long comparison
NUMBERS = "No One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()
NOT_RECORDED = "not recorded"
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
    ways = own(result["rows"])
    sizes = [row["total"] for row in ways if row.get("total")]
    large = f" of {significant(min(sizes) / 1e6)} million parameters" if sizes else ""
    return (
        f"{number(len(ways))} ways to adapt {_base(result)}, a "
        f"language model{large}, to one task. Each "
        f"answered the same {result['rows_tested']} test rows, which none had seen. "
        f"The task: {_task(result)}"
    )


def clock(result: dict) -> str:
    """What the times were taken with: dtype, processor, threads, other programs."""
    machine, before = result.get("machine") or {}, result["provenance"]
    threads = machine.get("threads") or before.get("threads")
    others = machine.get("busy_elsewhere")
    if machine.get("cores"):
        place = f"{machine.get('cpu') or result['device']}, {machine['cores']} cores"
    else:  # a result of an older version: its machine has the cores, if recorded
        place = before.get("machine") or f"{result['device']}, cores {NOT_RECORDED}"
    beside = NOT_RECORDED if others is None else f"{others:.1f} cores at most"
    return (
        f"Times: {result['dtype']} on {place}, {_threads(threads)}; load of other "
        f"programs {beside}."
    )


def _threads(count: int | None) -> str:
    if not count:
        return f"threads {NOT_RECORDED}"
    return f"{count} thread{'s' * (count > 1)}"


def _task(result: dict) -> str:
    asked = result["instruction"]
    return (
        f"“{asked}”" if asked else f"the prompts and completions of {result['task']}."
    )


def _base(result: dict) -> str:
    return result["base_name"].rstrip("/").split("/")[-1]


def number(count: int) -> str:
    """A count as a word that may begin a sentence."""
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


# How sure -----------------------------------------------------------------------------


def resolution(result: dict) -> list[str]:
    """The smallest difference that this run could tell, and what a longer one could."""
    least = least_difference(result)
    if least is None:
        return []
    seeds, rows = len(result["seeds"]), result["rows_tested"]
    run = f"This run ({seeds} seed{'s' * (seeds > 1)}, {rows} test rows)"
    if least > 1:
        sentences = [f"{run} is too short to tell any two methods apart."]
    else:
        sentences = [
            f"{run} tells methods apart that differ by about {_points(least)} or more."
        ]
    if seeds == 1 and trained(result):
        sentences.append(
            "It cannot tell how much the result changes with another seed."
        )
    there = min(LONG_ROWS, found(result, "data", "rows", "test") or LONG_ROWS)
    if seeds < LONG_SEEDS or rows < there:
        sentences.append(
            _longer(least, seeds, rows, max(rows, there), clustered(result))
        )
    return sentences


def least_difference(result: dict) -> float | None:
    """The median, over pairs of fine-tuned methods, of the difference that was needed.

    Of all pairs where no two methods train; None where a result has no pairs.
    """
    keys = {row["key"] for row in trained(result)}
    every = [p for p in result.get("pairs") or () if p.get("least") is not None]
    both = [p for p in every if {p["of"], p["over"]} <= keys]
    return median(p["least"] for p in both or every) if every else None


def _longer(least: float, seeds: int, rows: int, more: int, clustered: bool) -> str:
    """What three seeds and `more` test rows would change.

    Args
        clustered  more rows then bring fewer new clusters: by how much they help is
                   not known
    """
    run = f"SEEDS={max(seeds, LONG_SEEDS)} ROWS={more}"
    if rows == more:
        return f"SEEDS={LONG_SEEDS} measures what seeds change."
    if seeds > 1:
        return f"{run} can tell smaller differences."
    if clustered:
        return f"{run} can tell smaller differences, and measures what seeds change."
    rows_alone = min(1.0, least * (rows / more) ** 0.5)
    return (
        f"With {run}, about {_points(rows_alone)} are enough if seeds change nothing; "
        "that run also measures what they change."
    )


def _points(share: float) -> str:
    return f"{100 * share:.0f} points"


def certainty(result: dict) -> list[str]:
    """What the brackets and the letters are, and what they do not cover."""
    seeds, name = len(result["seeds"]), score_words(result)[0]
    return [
        f"Brackets after “{name}” hold its 95 % interval: the true scores that "
        f"{_covered(seeds)} cannot rule out.",
        "Brackets after a difference hold its 95 % interval on the same test rows, "
        "which is narrower than two separate intervals.",
        *_lettered(result),
        *_clusters(result),
        "Brackets after a decoding time hold the smallest and the largest ratio of "
        "the timing rounds; the figure before them is the median.",
        *_seeds(result),
    ]


def _covered(seeds: int) -> str:
    return "these test rows and seeds" if seeds > 1 else "so many test rows"


def _lettered(result: dict) -> list[str]:
    pairs = result.get("pairs") or ()
    if not pairs:
        return []
    return [
        LETTERS,
        f"{len(pairs)} pairs were compared, so some intervals may exclude zero by "
        "chance. Letters follow Holm's rule, which allows for the number of pairs.",
    ]


def clustered(result: dict) -> bool:
    """Whether some test rows are right or wrong together."""
    return result.get("clusters_tested", math.inf) < result["rows_tested"]


def _clusters(result: dict) -> list[str]:
    if not clustered(result):
        return []
    return [
        "Test rows that share a word which training lacks, or a prompt, are right or "
        f"wrong together. The intervals count such rows as one: the "
        f"{result['rows_tested']} rows are {result['clusters_tested']} clusters."
    ]


def _seeds(result: dict) -> list[str]:
    seeds = result["seeds"]
    if len(seeds) == 1:
        return [
            "There was one seed. The intervals count which test rows were drawn, and "
            "do not count seeds: another training run may give another result."
        ]
    return [
        f"The score of a method that trains is its mean over {len(seeds)} seeds; the "
        f"other columns are those of seed {seeds[0]}.",
        "Intervals count test rows and seeds. A few seeds of one method say little, so "
        "all trained methods share one variance. A method that varies more keeps its "
        "own.",
    ]


# Settings and columns -----------------------------------------------------------------


def settings(result: dict) -> list[tuple[str, str]]:
    """(label, what it was run with and where that comes from) for each row."""
    return [(row["label"], settings_of(row)) for row in result["rows"]]


def settings_of(row: dict) -> str:
    """What a row was run with."""
    parts = [
        SETTINGS.get(name, name + " {}").format(value)
        for name, value in (row.get("settings") or {}).items()
        if value is not None
    ]
    if row.get("steps") and row.get("batch"):
        parts.append(f"{row['steps']} steps of {row['batch']} rows")
    if row.get("settings_from"):
        parts.append(row["settings_from"])
    if row.get("tried"):
        shares = ", ".join(f"{lr:g}: {100 * k:.0f} %" for lr, k in row["tried"])
        parts.append(f"right in the search by learning rate: {shares}")
    sums = row.get("per_seed") or []
    if len(sums) > 1:
        name = "right" if all(k == int(k) for k in sums) else "sum of scores"
        parts.append(f"{name} by seed: " + ", ".join(f"{k:.4g}" for k in sums))
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
            f"The settings were searched in {tuned['runs']} runs on rows of their own, "
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
            "Memory is the peak of one training step; for rows that train nothing "
            f"({'; '.join(idle)}) it is the peak of answering one batch."
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
