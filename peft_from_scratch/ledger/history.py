"""Verdicts whose rule was replaced: data/ledger_history.json.

When `verdicts.write` meets a row whose rule_hash is not the stored one, the row that
was there goes to the end of this file. It is computed, never typed. An entry:

    id           of the claim
    until        the day on which the rule was replaced
    replaced_by  the hash of the next rule
    …            the old row's rule, rule_hash, scale, verdict, condition, measured,
                 interval and seeds, as they stood in data/ledger.json

A claim's entries stand in the order of time, so that each one's replaced_by is the
next one's rule_hash, unless rules came and went without a verdict: a row that was "not
run yet" had none, and leaves no entry. A verdict that changed under the same rule, by
new runs, leaves none either; git has it.
"""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from ..common import atomic, records
from .claim import NOT_RUN

KEPT = "rule rule_hash scale verdict condition measured interval seeds".split()


def beside(ledger: Path) -> Path:
    """The file of the history that belongs to a ledger's file."""
    return ledger.with_name(f"{ledger.stem}_history.json")


def replaced(before: Sequence[dict], now: Sequence[dict], day: str = "") -> list[dict]:
    """An entry for each row of before whose rule is another one now.

    Args
        day  of the change, as 2026-11-30; by default today
    """
    rules = {row["id"]: row["rule_hash"] for row in now}
    return [
        {
            "id": row["id"],
            "until": day or date.today().isoformat(),
            "replaced_by": rules[row["id"]],
        }
        | {name: row.get(name) for name in KEPT}
        for row in before
        if rules.get(row["id"], row["rule_hash"]) != row["rule_hash"]
        and row["verdict"] != NOT_RUN
    ]


def read(ledger: Path) -> list[dict]:
    """The entries beside a ledger's file, the oldest first; [] where there are none."""
    file = beside(ledger)
    return records.read(file) if file.exists() else []


def append(entries: Sequence[dict], ledger: Path) -> None:
    """Write entries behind those that are there; one that is there stays alone."""
    entries_before = read(ledger)
    new = [entry for entry in entries if entry not in entries_before]
    if not new:
        return
    with atomic.new_file(beside(ledger)) as partial:
        text = json.dumps([*entries_before, *new], indent=1, ensure_ascii=False)
        partial.write_text(text + "\n", "utf-8")
