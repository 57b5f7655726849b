"""The outcomes of a sweep as text: methods by checks, and what failed."""

from collections import Counter
from collections.abc import Iterable

from .checks import CHECKS
from .outcomes import FAILED
from .subject import BASE
from .sweep import BUILD

COUNTED = ("passed", "refused", *FAILED)
ALL = "all"


def summary(rows: list[dict]) -> str:
    """The table, every failure, what the models cannot do, and who was not built."""
    built = [row for row in rows if row["method"] != BUILD]
    of_methods = [row for row in built if row["method"] != BASE]
    parts = {
        f"{'/'.join(COUNTED)}, of {len({row['type'] for row in built})} types": counts(
            built
        ),
        "What failed": failures(of_methods),
        "What a model cannot do itself": failures(
            r for r in built if r["method"] == BASE
        ),
        "What could not be built": failures(r for r in rows if r["method"] == BUILD),
    }
    return "\n\n".join(f"{head}\n{body or '  nothing'}" for head, body in parts.items())


def counts(rows: Iterable[dict]) -> str:
    """A line a method, a column a check; the last column counts types, by `worst`."""
    cells: dict[str, dict[str, Counter]] = {}
    for row in rows:
        line = cells.setdefault(row["method"], {})
        for outcome in row["outcomes"]:
            line.setdefault(outcome["check"], Counter())[outcome["outcome"]] += 1
        line.setdefault(ALL, Counter())[worst(row["outcomes"])] += 1
    checks = [*(check.__name__ for check in CHECKS), ALL]
    lines = [["", *checks]]
    for method, line in cells.items():
        lines.append([method, *(shown(line.get(check)) for check in checks)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def worst(outcomes: list[dict]) -> str:
    """Of a method on a type: wrong, crashed, refused or passed.

    That a method cannot merge is no refusal of the type.
    """
    kinds = {o["outcome"] for o in outcomes if o["outcome"] in FAILED}
    if any(o["outcome"] == "refused" and o["check"] != "merge" for o in outcomes):
        kinds.add("refused")
    return max(kinds, key=COUNTED.index, default="passed")


def shown(cell: Counter | None) -> str:
    if cell is None:
        return ""
    return "/".join(str(cell[outcome]) for outcome in COUNTED)


def failures(rows: Iterable[dict]) -> str:
    """Every check and message that is no pass and no refusal, with who got it.

    Where numbers differ, the largest difference stands behind the message.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    apart: dict[str, float] = {}
    for row in rows:
        for outcome in row["outcomes"]:
            if outcome["outcome"] in FAILED:
                line = "{outcome}, {check}: {message}".format(**outcome)
                methods = groups.setdefault(line, {})
                methods.setdefault(row["method"], []).append(row["type"])
                if measured := outcome.get("apart"):
                    apart[line] = max(measured, apart.get(line, 0))
    lines = []
    for line, methods in sorted(groups.items()):
        lines.append(f"  {line}" + (f": {apart[line]:.1g}" if line in apart else ""))
        lines += [f"      {method}: {', '.join(on)}" for method, on in methods.items()]
    return "\n".join(lines)
