"""Which rows of a result are told apart: what every sentence about it must ask first.

Not told apart means undecided, never equal: more rows or seeds may still show a
difference.
"""

from .columns import found

REFERENCE = "few-shot"  # the row that a fine-tuned one has to beat


def trained(result: dict) -> list[dict]:
    """The rows that train parameters."""
    return [row for row in result["rows"] if row.get("trainable")]


def own(rows: list[dict]) -> list[dict]:
    """Those of the rows that are this library's, not another's to stand beside."""
    return [row for row in rows if not row.get("library")]


def measured(result: dict) -> list[dict]:
    """The rows that have a score with its interval."""
    return [
        row
        for row in result["rows"]
        if None not in [found(row, "exact", end) for end in ("rate", "low", "high")]
    ]


def reference(result: dict) -> dict | None:
    """The few-shot row, where it was measured."""
    return next((row for row in measured(result) if row["key"] == REFERENCE), None)


def pair(result: dict, of: str, over: str) -> dict | None:
    """The score of `of` minus that of `over`: difference, low, high, least, apart.

    A result of an older version has each row's difference to few-shot only, whose
    interval then decides alone. None where the two were not compared.
    """
    for compared in result.get("pairs") or ():
        if (compared["of"], compared["over"]) == (of, over):
            return compared
        if (compared["of"], compared["over"]) == (over, of):
            return _turned(compared)
    return _before_pairs(result, of, over) if not result.get("pairs") else None


def better(result: dict, of: str, over: str) -> bool:
    """Whether `of` is told apart from `over`, with the higher score."""
    compared = pair(result, of, over)
    return bool(compared and compared["apart"] and compared["difference"] > 0)


def told_apart(result: dict, of: str, over: str) -> bool:
    """Whether the scores of two rows are told apart."""
    return better(result, of, over) or better(result, over, of)


def leaders(result: dict, rows: list[dict]) -> list[dict]:
    """The rows that none of the others is told to beat; no two of them are told apart.

    Returns  the highest score first
    """
    kept = [
        row
        for row in rows
        if not any(better(result, other["key"], row["key"]) for other in rows)
    ]
    return sorted(kept, key=lambda row: -row["exact"]["rate"])


def verdict(result: dict, row: dict) -> str | None:
    """Against few-shot: "beats", "trails" or "open"; None where not compared."""
    if not pair(result, row["key"], REFERENCE):
        return None
    if better(result, row["key"], REFERENCE):
        return "beats"
    return "trails" if better(result, REFERENCE, row["key"]) else "open"


def _turned(compared: dict) -> dict:
    ends = {"low": -compared["high"], "high": -compared["low"]}
    return compared | ends | {"difference": -compared["difference"]}


def _before_pairs(result: dict, of: str, over: str) -> dict | None:
    rows = {row["key"]: row for row in result["rows"]}
    for a, b, turn in ((of, over, dict), (over, of, _turned)):
        ends = {
            end: found(rows.get(a), "against", b, end)
            for end in ("difference", "low", "high")
        }
        if None not in ends.values():
            apart = ends["low"] > 0 or ends["high"] < 0
            return turn(ends | {"apart": apart, "least": None})
    return None
