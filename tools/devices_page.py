"""docs/many_devices.md: bills of 8 and 64 devices, and what two and four ranks kept.

    python -m tools.devices_page

The bills are computed by memory/budget.py and the formulas. What was measured is in
benchmarks/results/, made by benchmarks/zero_bytes.py.
"""

import json
from pathlib import Path

from peft_from_scratch.common import atomic, provenance
from peft_from_scratch.common.marks import between_marks, markdown
from peft_from_scratch.common.units import megabytes
from peft_from_scratch.memory.budget import Budget, bill
from peft_from_scratch.memory.formulas import zero_traffic
from peft_from_scratch.memory.setups import ADAPTER, RECIPES, Setup

from .memory_cells import SEVEN

PAGE = provenance.ROOT / "docs" / "many_devices.md"
RESULTS = provenance.ROOT / "benchmarks" / "results"
DEVICES = ((1, 0), *((ranks, stage) for ranks in (8, 64) for stage in (1, 2, 3)))
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations")


def bills() -> str:
    """A row for each method, number of devices and stage."""
    lines = []
    for method in ("full", "lora"):
        for ranks, stage in DEVICES:
            setup = Setup(
                method=method, length=2048, checkpointing=True, zero=stage, ranks=ranks
            )
            lines.append(_line(setup, bill(SEVEN, setup)))
    heads = [f"{part}, GB" for part in ("weights", "gradients", "states", "peak")]
    return markdown(("method", "devices", "stage", *heads, "sent a step, GB"), lines)


def _line(setup: Setup, predicted: Budget) -> list:
    lasting = predicted.moments["optimizer step"]
    figures = (
        lasting["weights"] + lasting["adapter"],
        predicted.parts["gradients"],
        lasting["optimizer"] + lasting["master"],
        predicted.peak,
        sent(setup, predicted),
    )
    stage = setup.zero or "-"
    return [setup.method, setup.ranks, stage, *(f"{n / 1e9:,.2f}" for n in figures)]


def sent(setup: Setup, predicted: Budget) -> int:
    """Bytes that one device sends in a step of one micro-batch: zero_traffic.

    What trains in the dtype that the recipe holds it in; in stage 3 the frozen base
    too, gathered for forward and for backward.
    """
    if setup.ranks == 1:
        return 0
    w, recipe = predicted.weighed, RECIPES[setup.dtype]
    total, sizes = 0, dict(ranks=setup.ranks, stage=setup.zero)
    frozen = w.total - w.own
    for trained, itemsize in ((w.own, recipe.weights), (w.added, ADAPTER.weights)):
        total += zero_traffic(
            [trained], **sizes, itemsize=itemsize, gathered=[trained] * 2
        )
    total += zero_traffic([], **sizes, itemsize=recipe.weights, gathered=[frozen] * 2)
    return total


def measured() -> Path:
    """The newest result of benchmarks/zero_bytes.py that was recorded."""
    return max(RESULTS.glob("zero_bytes-*.json"), key=lambda file: file.stat().st_mtime)


def kept(result: dict) -> str:
    """A row for each engine, stage, method, dtype and number of ranks."""
    lines = []
    for row in result["rows"]:
        total, formula = (sum(row[k].values()) for k in ("kept", "kept_formula"))
        name = row["engine"] + (f", stage {row['stage']}" if row["stage"] else "")
        figures = [*row["kept"].values(), total, formula]
        lines.append(
            [
                name,
                f"{row['method']}, {row['dtype']}",
                row["ranks"],
                *(megabytes(n, ".3f") for n in figures),
                f"{100 * (total / formula - 1):+.1f} %",
            ]
        )
    heads = ("weights", "gradients", "states", "kept", "formula")
    about = ("engine", "trains", "ranks", *(f"{head}, MB" for head in heads), "off by")
    versions = f"torch {result['provenance']['packages']['torch']}"
    if result["deepspeed"]:
        versions += f", DeepSpeed {result['deepspeed']}"
    base = f"Base {result['base']}, {versions}."
    return "\n\n".join((base, markdown(about, lines), *_estimates(result["rows"])))


def _estimates(rows: list[dict]) -> list[str]:
    """DeepSpeed's estimator beside what DeepSpeed kept and the formula."""
    sentences = []
    for row in rows:
        if "deepspeed_estimate" in row:
            total, formula = (sum(row[k].values()) for k in ("kept", "kept_formula"))
            figures = (total, formula, row["deepspeed_estimate"])
            here, ours, theirs = (megabytes(n, ".3f") for n in figures)
            sentences.append(
                f"Stage 2, bfloat16, {row['ranks']} ranks: DeepSpeed kept {here} MB. "
                f"The formula, 2 Ψ + 14 Ψ / N, says {ours} MB, and DeepSpeed's own "
                f"estimator, 2 Ψ + 18 Ψ / N, {theirs} MB."
            )
    return sentences


def page(text: str) -> str:
    """The page with its blocks computed."""
    text = between_marks(text, bills() + "\n", "bill")
    result = json.loads(measured().read_text("utf-8"))
    return between_marks(text, kept(result) + "\n", "kept")


def main() -> None:
    text = page(PAGE.read_text("utf-8"))
    with atomic.new_file(PAGE) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
