"""docs/kernels.md: its tables and its figure, made from results and never typed.

    python -m tools.kernels_page     writes them between the two marks

A test holds the page to data/results/kernels.json and to the formulas of count.py.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence

import torch

from peft_from_scratch.common import atomic
from peft_from_scratch.common.marks import between_marks, markdown
from peft_from_scratch.common.provenance import ROOT
from peft_from_scratch.kernels.cases import (
    DTYPES,
    RANKS,
    SHAPES,
    for_dx,
    forward,
    forward_in_four_bits,
)
from peft_from_scratch.kernels.count import (
    LaunchCost,
    count,
    fused,
    in_three,
    plain,
    total,
    unfused,
)
from peft_from_scratch.kernels.gpu_targets import LARGEST, RESULT, TARGETS, described
from peft_from_scratch.kernels.language import Launch
from peft_from_scratch.kernels.nf4 import DENSE_FROM
from peft_from_scratch.kernels.roofline import DEVICES, SHOWN, bound, counts_of
from peft_from_scratch.plotting.roofline import alt, figure
from peft_from_scratch.plotting.theme import svg

PAGE = ROOT / "docs" / "kernels.md"
FIGURE = PAGE.with_name("roofline.svg")
KIND = r"v_mfma|[a-z0-9]+"  # at the start of an instruction's name
LIMIT = 1.1  # times the bytes of x W^T alone, that the fused product should issue
NVIDIAS = [target for target, (kind, *_) in TARGETS.items() if kind == "cuda"]
BF16 = torch.bfloat16


def tables(result: dict) -> str:
    """All that is between the marks."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    parts = (
        f"## Compiled\n\n{len(result['rows'])} kernels, {versions}.",
        summary(result["rows"]),
        "### What spills",
        spills(result["rows"]),
        "## Bytes against x Wᵀ alone",
        "Forward:",
        against_plain(forward),
        "dx:",
        against_plain(for_dx),
        "## Bytes against four steps, few rows",
        against_steps(),
        "## Roofline",
        f"![{alt()}]({FIGURE.name})",
        devices(),
        "What fusing takes off the bound on the time, % of the bound of four steps (of "
        "three), bf16:",
        bounds(),
        "## Four bits",
        "A weight in four bits, with its constants in eight: bytes (issued, "
        "compulsory) and the bound on the time, over those of the product with W in "
        "bf16, r 16. Each has its own blocks. The bound knows bytes and FLOPs, and no "
        f"instructions of unpacking. From {DENSE_FROM} rows on W' is written once, and "
        "the bound is the sum over that launch and the dense one:",
        in_four_bits(),
        "Instructions of the loop that unpacks, for each weight, r 16 and bf16. They "
        "were counted in the machine code; what a look-up in the table costs in the "
        "L1 cache was not measured:",
        instructions(result["rows"]),
        f"What that is on the {SHOWN.name}, 4,096 → 4,096, r 16, in microseconds at "
        "least. Its multiprocessors issue an instruction for 128 lanes a clock, which "
        "is half of the float32 FLOP/s above. None of these is a measured time:",
        waits(result["rows"]),
    )
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[dict]) -> str:
    """For each dtype and target: the most registers and bytes, and what multiplies."""
    lines = []
    for dtype in DTYPES:
        of = [row for row in rows if row["dtype"] == dtype]
        for target in TARGETS:
            on = [row["targets"][target] for row in of]
            lines.append(
                [
                    *(dtype, target, len(on)),
                    max(one["registers"] for one in on),
                    f"{max(one['shared'] for one in on) / 1024:.0f}",
                    sum(one["shared"] > LARGEST[target] * 1024 for one in on),
                    sum(one["spilled"] > 0 for one in on),
                    ", ".join(_kinds(on)) or "none: sums of float32 products",
                ]
            )
    heads = ("dtype", "target", "kernels", "registers", "shared, KiB")
    heads = (*heads, "too much", "spill", "matrix instructions")
    return markdown(heads, lines)


def _kinds(compiled: Iterable[dict]) -> list[str]:
    """Instructions without their sizes: "mma bf16"."""
    kinds = set()
    for name in {name for one in compiled for name in one["instructions"]}:
        dtypes = re.findall(r"b?f(?:16|32)", name.removeprefix("tcgen05.mma.kind::f16"))
        kinds.add(f"{re.match(KIND, name)[0]} {'/'.join(_multiplied(dtypes))}")
    return sorted(kinds)


def _multiplied(dtypes: Sequence[str]) -> list[str]:
    """Of an instruction's dtypes those of its factors: float32 is that of the sum."""
    return sorted(set(dtypes) - {"f32"}) or ["f32"]


def spills(rows: Sequence[dict]) -> str:
    """Each kernel with bytes on the stack, by target; the others are not listed."""
    lines = [
        [
            *_words(row),
            *(row["targets"][target]["spilled"] or "" for target in TARGETS),
        ]
        for row in rows
        if any(row["targets"][target]["spilled"] for target in TARGETS)
    ]
    if not lines:
        return "Nothing, on any target."
    heads = ("kernel", "dtype", "rank in tile", "tile", "sweep", "transposed")
    unit = (f"{target}, bytes" for target in TARGETS)
    return markdown((*heads, *unit), _unique(lines))


def _words(row: dict) -> tuple[str, ...]:
    constants = row["constants"]
    tile = [str(v) for name, v in constants.items() if re.fullmatch("B[A-Z]", name)]
    update = f" {constants['UPDATE']}" if "UPDATE" in constants else ""
    return (
        f"{row['kernel'].lstrip('_')}{update}",
        row["dtype"],
        str(constants["RANK"]) if update == " fused" else "",
        " x ".join(tile) or str(constants.get("BLOCK", "")),
        str(constants.get("SWEEP", "")),
        " ".join(row["transposed"]),
    )


def _unique(lines: list[list]) -> list[list]:
    """One line for those that differ by bytes alone: each target's most."""
    merged: dict[tuple, list] = {}
    for line in lines:
        words, bytes_ = tuple(line[: -len(TARGETS)]), line[-len(TARGETS) :]
        known = merged.setdefault(words, bytes_)
        merged[words] = [
            max(a or 0, b or 0) or "" for a, b in zip(known, bytes_, strict=True)
        ]
    return [[*words, *bytes_] for words, bytes_ in merged.items()]


def against_plain(make: Callable) -> str:
    """Issued, and compulsory, bytes over those of the product without an update."""

    def cell(shape: tuple, r: int) -> str:
        launches = fused(*shape, r, BF16, make)
        ours, alone = total(launches), total(plain(launches))
        issued = ours.issued / alone.issued
        text = f"{issued:.3f}" if issued <= LIMIT else f"**{issued:.3f}**"
        return f"{text}, {ours.compulsory / alone.compulsory:.2f}"

    return _by_rank(SHAPES, cell)


def against_steps() -> str:
    """The same over those of four steps one after another."""

    def cell(shape: tuple, r: int) -> str:
        ours = total(fused(*shape, r, BF16))
        steps = unfused(*shape, r, BF16)
        issued = ours.issued / sum(step.issued for step in steps)
        compulsory = ours.compulsory / sum(step.compulsory for step in steps)
        return f"{issued:.2f}, {compulsory:.3f}"

    return _by_rank([shape for shape in SHAPES if shape[0] < 100], cell)


def devices() -> str:
    """The datasheets' figures."""
    lines = [
        [
            d.name,
            *(f"{rate / 1e12:,g}" for rate in (d.matrix, d.plain, d.bandwidth)),
            f"{d.matrix / d.bandwidth:.0f}",
            d.source,
        ]
        for d in DEVICES
    ]
    heads = ("device", "bf16, TFLOP/s", "float32, TFLOP/s", "memory, TB/s")
    return markdown((*heads, "FLOPs per byte at the ridge", "source"), lines)


def bounds() -> str:
    """By how much fusing lowers the bound, for ranks 16 and 256."""

    def cell(shape: tuple, r: int, device) -> str:
        ours = bound(counts_of(shape, r, BF16), device, BF16)
        rivals = [
            bound(of(*shape, r, BF16), device, BF16) for of in (unfused, in_three)
        ]
        four, three = (f"{100 * (1 - ours / rival):.1f}" for rival in rivals)
        return f"{four} ({three})"

    lines = [
        [_shape(shape), r, *(cell(shape, r, device) for device in DEVICES)]
        for shape in SHAPES
        for r in (16, 64, 256)
    ]
    return markdown(("shape", "r", *(d.name for d in DEVICES)), lines)


def in_four_bits() -> str:
    """Bytes and bounds of QLoRA's product over LoRA's."""
    lines = []
    for shape in SHAPES:
        four, bf16 = (
            [count(one) for one in fused(*shape, 16, BF16, make)]
            for make in (forward_in_four_bits, forward)
        )
        packed, dense = (sum(costs, LaunchCost()) for costs in (four, bf16))
        bytes_ = packed.issued / dense.issued, packed.compulsory / dense.compulsory
        bounds = [bound(four, d, BF16) / bound(bf16, d, BF16) for d in DEVICES]
        cells = ", ".join(f"{share:.2f}" for share in bytes_)
        lines.append([_shape(shape), cells, *(f"{share:.2f}" for share in bounds)])
    return markdown(("shape", "bytes", *(d.name for d in DEVICES)), lines)


def instructions(rows: Sequence[dict]) -> str:
    """What unpacking a weight takes, by kernel and block."""
    lines = []
    for row in rows:
        on = row["targets"]
        if row["dtype"] == "bf16" and row["constants"].get("RANK", 16) == 16:
            each = [on[target].get("a_weight") for target in NVIDIAS]
            if all(each):
                kernel, _, _, tile, *_ = _words(row)
                reader = row["constants"].get("LOAD", "")
                lines.append([kernel, reader, tile, *each])
    most: dict[tuple, list] = {}
    for *words, a, b, c in lines:
        known = most.setdefault(tuple(words), [a, b, c])
        most[tuple(words)] = [max(*both) for both in zip(known, (a, b, c), strict=True)]
    return markdown(
        ("kernel", "reader", "tile", *NVIDIAS),
        [[*words, *each] for words, each in most.items()],
    )


def waits(rows: Sequence[dict]) -> str:
    """The bound of bytes and FLOPs, and of instructions, beside that of bf16."""
    lines = []
    for m in (4096, 128, 64, 16, 1):
        shape = (m, 4096, 4096)
        launches = fused(*shape, 16, BF16, forward_in_four_bits)
        costs = [count(one) for one in launches]
        dense = [count(one) for one in fused(*shape, 16, BF16)]
        issued = sum(_unpacking(one, rows) for one in launches)
        times = (
            bound(costs, SHOWN, BF16),
            issued / (SHOWN.plain / 2),
            bound(dense, SHOWN, BF16),
        )
        lines.append([f"{m:,}", *(f"{1e6 * seconds:.1f}" for seconds in times)])
    heads = ("rows of x", "four bits: bytes or FLOPs", "four bits: instructions")
    return markdown((*heads, "bf16: bytes or FLOPs"), lines)


def _unpacking(launch: Launch, rows: Sequence[dict]) -> float:
    """Instructions, of all threads together, of the loop that unpacks in a launch."""
    kind, arguments = described(launch), launch.arguments
    alike = ("LOAD", "RANK", "BM", "BN", "BK", "SPLIT", "CHUNK")
    for row in rows:
        each = row["targets"]["sm_90"].get("a_weight")
        same = all(
            row["constants"].get(name) == kind["constants"].get(name) for name in alike
        )
        if each and same and row["dtype"] == kind["dtype"]:
            blocks = math.ceil(
                arguments.get("m_size", 1) / kind["constants"].get("BM", 1)
            )
            sizes = (arguments.get(name, 1) for name in ("n_size", "k_size", "size"))
            return each * blocks * math.prod(sizes)
    return 0


def _by_rank(shapes: Iterable[tuple], cell: Callable) -> str:
    lines = [[_shape(shape), *(cell(shape, r) for r in RANKS)] for shape in shapes]
    return markdown(("shape", *(f"r {r}" for r in RANKS)), lines)


def _shape(shape: tuple) -> str:
    m, d_in, d_out = shape
    return f"{m:,} x {d_in:,} → {d_out:,}"


def with_tables(page: str, result: dict) -> str:
    """The page with what is between the marks made new."""
    return between_marks(page, tables(result))


def write() -> None:
    """The page and its figure, from the stored result."""
    page = with_tables(PAGE.read_text("utf-8"), json.loads(RESULT.read_text("utf-8")))
    for path, text in ((PAGE, page), (FIGURE, svg(figure()))):
        with atomic.new_file(path) as partial:
            partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
