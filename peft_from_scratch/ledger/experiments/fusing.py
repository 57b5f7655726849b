"""K1: what fusing the LoRA product can save, by arithmetic.

    fused      our launches: x W^T + (scale x A^T) B^T in one, or two for large ranks
    in four    x W^T, then h = x A^T, then h B^T, then their sum: as adapters are run
    in three   the same with the sum inside the last product (addmm): the better rival

Each launch takes at least max(FLOPs / peak, compulsory bytes / bandwidth), a sequence
the sum of that (kernels/roofline.py); FLOPs are of whole blocks, so that what the fused
kernel computes twice counts against it. No time is measured: that would take the GPUs.
"""

from collections.abc import Sequence
from dataclasses import astuple

from ...common.digest import digest
from ...kernels.cases import DTYPES, RANKS, SHAPES
from ...kernels.count import in_three, unfused
from ...kernels.lora import columns_of, tiles_for
from ...kernels.roofline import DEVICES, bound, counts_of
from ..claim import BASES, LARGE_HOLDS, Claim, Measured, Rule
from ..runs import Run

DTYPE = "bf16"
WORTH = 5.0  # %, that a saving must have to be called one


def config() -> dict:
    """The cases, the devices, and a digest of the tiles; asked where Triton is not."""
    tiles = []
    for m, d_in, d_out in SHAPES:
        for r in RANKS:
            cut = tiles_for(m, d_out, r, DTYPES[DTYPE])
            tiles.append([*astuple(cut), columns_of(m, d_out, d_in, cut)])
    return {
        "experiment": "fusing",
        "dtype": DTYPE,
        "shapes": [list(shape) for shape in SHAPES],  # rows, d_in, d_out
        "ranks": list(RANKS),
        "devices": {d.name: [d.matrix, d.bandwidth] for d in DEVICES},
        "tiles": digest(tiles),
    }


def compute(config: dict) -> dict:
    """What fusing saves of the time bound, in %: negative where it takes longer.

    Returns  in_four, in_three    [shape][rank][device], over that sequence
             fewer                launches that the fused product saves over in_four,
                                  [shape][rank]
    """
    return {
        "in_four": _each(lambda *case: [saved(*case, unfused, d) for d in DEVICES]),
        "in_three": _each(lambda *case: [saved(*case, in_three, d) for d in DEVICES]),
        "fewer": _each(lambda shape, r: 4 - len(counts_of(shape, r, DTYPES[DTYPE]))),
    }


def saved(shape: Sequence[int], r: int, rival, device) -> float:
    """100 (1 - bound of the fused launches / bound of the rival's), in %."""
    dtype = DTYPES[DTYPE]
    ours = bound(counts_of(shape, r, dtype), device, dtype)
    return round(100 * (1 - ours / bound(rival(*shape, r, dtype), device, dtype)), 3)


def _each(value) -> list[list]:
    return [[value(shape, r) for r in RANKS] for shape in SHAPES]


# What it says -------------------------------------------------------------------------


def measured(all_runs: Sequence[Run]) -> Measured:
    """In how many percent of the cases the bound falls by WORTH or more."""
    (run,) = all_runs
    every = values(run, "in_four")
    value = share(every)
    rows = {m: values(run, "in_four", m) for m in (4096, 16, 1)}
    figures = {
        "many": f"{min(rows[4096]):.0f} to {max(rows[4096]):.0f}",
        "loses": f"{100 * sum(v < 0 for v in rows[4096]) / len(rows[4096]):.0f}",
        "sixteen": f"{max(rows[16]):.0f}",
        "one": f"{max(rows[1]):.1f}",
        "three": f"{share(values(run, 'in_three')):.0f}",
        "share": f"{value:.0f}",
    }
    return Measured(value, value, value, (), figures)


def values(run: Run, rival: str, m: int | None = None) -> list[float]:
    """The savings over a rival, of all shapes or of those with m rows."""
    shapes = zip(run.config["shapes"], run.result[rival], strict=True)
    kept = [ranks for (rows, *_), ranks in shapes if m in (None, rows)]
    return [value for ranks in kept for row in ranks for value in row]


def share(savings: Sequence[float]) -> float:
    """Percent of them that are WORTH it."""
    return 100 * sum(value >= WORTH for value in savings) / len(savings)


BOUNDS = (
    "By arithmetic, and no GPU has timed it here: with 4,096 rows the bound on the "
    "time is {many} % lower than that of four separate steps (higher in {loses} % of "
    "those cases, where the kernel computes x A^T again in every column of blocks), "
    "with 16 rows it falls by {sixteen} % at most, and with one row, where W is nearly "
    "all that is read, by {one} %. {share} % of all cases save 5 % or more, and "
    "{three} % over three steps, whose last product adds. Fusing also saves up to "
    "three launches a product, which this does not count: where few rows are decoded "
    "they are nearly all that there is to gain"
)
CLAIMS = (
    Claim(
        id="K1",
        notebook="10",
        source="ours",
        statement="Fusing the LoRA product into one kernel makes it faster",
        rule=Rule(
            words=(
                "Percent of the cases in which fusing lowers the roofline's bound on "
                "the time by 5 % or more, over x W^T, x A^T, h B^T and their sum one "
                "after another: projections of 4096 and of SmolLM2's sizes with 4,096, "
                "16 and 1 rows, ranks 8 to 256, bf16, six devices by their "
                "datasheets. A bound, counted from our launches; no time"
            ),
            unit="%",
            verdicts=LARGE_HOLDS,
            edges=(10.0, 90.0),
        ),
        configs=lambda scale: [config()],
        measured=measured,
        untestable=dict.fromkeys(BASES, BOUNDS),
        number="cases in which the bound falls by 5 % or more",
        so={
            "cannot be tested here": (
                "Only a clock decides. Time it on your GPU: python -m "
                "benchmarks.kernel_times"
            ),
        },
    ),
)
