"""The parity table: each method on each architecture, and how far it is from PEFT.

    pytest tests/parity                                   prints it
    pytest tests/parity --table tests/parity/PARITY.md    writes it

A difference is max |ours - theirs| over max |theirs|, in float32, of models with random
weights. "File" is the logits of a saved adapter after the other program has read it.
"""

import re
from pathlib import Path

import pytest

COLUMNS = {  # column -> what the tests call what belongs there
    "Logits": ("logits", "BA", "residual"),
    "Gradients": ("gradients", "in training", "3 steps"),
    "File": ("file",),
    "Merged weights": ("merged weights",),
}
HEAD = """\
# Parity

Largest difference from an independent implementation, over its largest value: float32,
random two-layer models, {reference}. Allowed is 1e-5. Written by
`pytest tests/parity --table tests/parity/PARITY.md`; `make test` measures it anew.

The reference is HF PEFT, read and written in both directions. For bottleneck adapters
and BitFit, which PEFT lacks, it is the paper's equation on hooks, with autograd.

"""


def pytest_addoption(parser):
    parser.addoption("--table", type=Path, help="where to write the parity table")


@pytest.fixture
def measure(record_property):
    """measure(what, ours, theirs): keep the difference, and fail above `allowed`."""
    from model_state import largest

    def check(what, ours, theirs, allowed=1e-5):
        difference = largest(ours, theirs)
        record_property(what, difference)
        assert difference <= allowed, f"{what} differ by {difference:.1e}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    rows = table(terminalreporter.getreports("passed"))
    if not rows:
        return
    terminalreporter.section("largest difference from peft, over the largest value")
    for (method, architecture), cells in sorted(rows.items()):
        shown = "  ".join(
            f"{what.lower()} {value:.1e}" for what, value in cells.items()
        )
        terminalreporter.write_line(f"{method:<24} {architecture:<6} {shown}")
    path = config.getoption("--table", default=None)
    if path:
        path.write_text(markdown(rows), encoding="utf-8")


def table(reports) -> dict[tuple[str, str], dict[str, float]]:
    """{(method, architecture): {column: largest difference}} of tests[method-arch]."""
    rows = {}
    for report in reports:
        label = re.search(r"\[(.+)-(\w+)\]$", report.nodeid)
        if "parity" in report.nodeid and label and report.user_properties:
            cells = rows.setdefault(label.groups(), {})
            for column, names in COLUMNS.items():
                found = [v for name, v in report.user_properties if name in names]
                if found:
                    cells[column] = max([*found, cells.get(column, 0.0)])
    return rows


def markdown(rows) -> str:
    import peft
    import torch

    reference = f"peft {peft.__version__}, torch {torch.__version__.partition('+')[0]}"
    lines = [
        "| Method | Architecture | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for (method, architecture), cells in sorted(rows.items()):
        shown = (f"{cells[c]:.1e}" if c in cells else "" for c in COLUMNS)
        lines.append(f"| {method} | {architecture} | " + " | ".join(shown) + " |")
    return HEAD.format(reference=reference) + "\n".join(lines) + "\n"
