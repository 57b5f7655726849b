"""What the exercises of notebook 07, four bits, are compared with.

Blocks and constants are compared with what nf4/ holds for the same tensors. Where
rounding of the last bit may take a neighbour, both are right. In 7.4 the learner writes
a check, which is tried on round trips with planted faults. Five functions do what an
answer does, for lessons to go on without one: ratios_and_absmax, normal_values,
doubled, undoubled and bad_shapes.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import nf4
from ...nf4.codes import dynamic, integer8
from . import Wrong, close, judged, unchanged

KEPT = "what the call before returned: something is kept from call to call"
CLOSE = 2e-6  # two values are equally near to a ratio within this

# 7.1 ----------------------------------------------------------------------------------


def blocks() -> Iterator[tuple[str, Tensor, int]]:
    """(what it is, w, block): the same at every call; the telling ones come first."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape) -> Tensor:
        return torch.randn(shape, generator=draw)

    ladder = normal(4, 6) * torch.tensor([1.0, 5.0, 0.2, 30.0])[:, None]
    holed, ended = normal(3, 8), normal(5, 4)
    holed[1] = 0
    ended[[1, 4]] = 0
    yield "", -normal(3, 8).abs(), 4
    yield "", ladder, 4
    yield "", normal(10), 4
    yield "its second row zero", holed, 8
    yield "", normal(2, 3, 5), 7
    yield "", 1e-3 * normal(5), 64
    yield "", normal(6), 1
    yield "of the size of 1e-10", 1e-10 * normal(3, 7), 5
    yield "of the size of 1e-34", 1e-34 * normal(3, 7), 5
    yield "of the size of 1e25", 1e25 * normal(6), 4
    yield "its second and last row zero", ended, 4
    yield "all of it zero", torch.zeros(3, 4), 5
    yield "", normal(13, 9), 8
    yield "", normal(2, 40), 16
    yield "", normal(2, 3, 2, 2), 5
    yield "", normal(2, 200), 150


@judged
def absmax_blocks(my_blocks: Callable) -> None:
    """7.1: my_blocks(w, block): (w over its block's absmax, absmax of the blocks)."""
    for name, first, block in blocks():
        earlier = None
        for which, w in (("", first), ("a second ", -0.7 * first.flip(-1))):
            given, before = w.clone(), earlier
            with unchanged(w=given, **{"what was returned before": before}):
                earlier = my_blocks(given, block)
            shape = f"{which}w of shape {tuple(w.shape)}{name and ', '}{name}"
            _judge_blocks(earlier, before, w, block, f"for {shape}, block={block}")


def _judge_blocks(got, before, w: Tensor, block: int, what: str) -> None:
    if not (isinstance(got, tuple | list) and len(got) == 2):
        raise Wrong(
            f"{what}: expected two things, the ratios and the absmax; got "
            f"{type(got).__name__}. Likely mistake: `return ratios, absmax`"
        )
    ratios, absmax = got
    old_ratios, old_absmax = before or (None, None)
    expected = nf4.quantize(w, block, double=False).absmax
    _demand_no_zero_by_zero(ratios, w, expected, block, what)
    close(
        absmax,
        expected,
        what=f"the absmax {what}",
        mistakes={KEPT: old_absmax} | _units(w, block),
    )
    close(
        ratios,
        _over(w, expected, block),
        what=f"the absmax is right, but not the ratios, {what}",
        mistakes={KEPT: old_ratios} | _ratios(w, expected, block),
    )


def _demand_no_zero_by_zero(ratios, w: Tensor, absmax, block: int, what: str) -> None:
    """Wrong where the ratios are NaN in the blocks of zeros, and nowhere else."""
    if not isinstance(ratios, Tensor) or ratios.shape != w.shape:
        return
    empty = absmax.repeat_interleave(block)[: w.numel()].view(w.shape) == 0
    if empty.any() and ratios.isnan().equal(empty):
        raise Wrong(
            f"the ratios {what}: some are NaN. Likely mistake: 0 / 0, in a block of "
            "zeros; its ratios are 0"
        )


def ratios_and_absmax(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(w over its block's absmax, of w's shape; absmax of the blocks, (blocks,))."""
    absmax = nf4.quantize(w, block, double=False).absmax
    return _over(w, absmax, block), absmax


def _rows(flat: Tensor, block: int) -> Tensor:
    """(blocks, block), the last one filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % block)).view(-1, block)


def _over(w: Tensor, absmax: Tensor, block: int) -> Tensor:
    unit = absmax.repeat_interleave(block)[: w.numel()].view(w.shape)
    return torch.where(unit > 0, w / unit, 0 * w)


def _units(w: Tensor, block: int) -> dict[str, Tensor]:
    """What each likely mistake gives for the absmax."""
    flat = w.flatten()
    rows, count = _rows(flat, block), -(-len(flat) // block)
    largest = rows.abs().amax(1)
    at = rows.abs().argmax(1, keepdim=True)
    across = _rows(w.movedim(0, -1).flatten(), block).abs().amax(1)
    strided = F.pad(flat, (0, -len(flat) % block)).view(block, -1)
    wrong = {
        "the largest value, not the largest absolute value": rows.amax(1),
        "squares, which overflow or vanish": rows.square().amax(1).sqrt(),
        "the value that is largest, with its sign: take its absolute value": (
            rows.gather(1, at)[:, 0]
        ),
        "one absmax for the whole tensor": largest.amax().expand(count),
        "the blocks run down the columns; values stand row after row": across,
        "each block takes values that stand far apart": strided.abs().amax(0),
        "absmax of the ratios, which is 1": torch.ones(count),
        "the mean of the absolute values": rows.abs().mean(1),
        "the last, short block is missing": largest[: len(flat) // block],
        "largest minus smallest; the distance from zero counts": (
            rows.amax(1) - rows.amin(1)
        ),
        "one for each value; one for each block is asked for": (
            largest.repeat_interleave(block)[: len(flat)]
        ),
        "its inverse": 1 / largest,
        "one where a block is all zeros: its absmax is 0, and so are its ratios": (
            largest.masked_fill(largest == 0, 1)
        ),
        "a block too many: where n is a multiple, nothing is filled up; -n % block": (
            F.pad(largest, (0, 1))
        ),
    }
    if w.dim() == 2:
        wide = F.pad(w, (0, -w.shape[1] % block)).view(-1, block)
        wrong["blocks begin anew with each row; they run on into the next"] = (
            wide.abs().amax(1)
        )
        wrong["one for each row: a block may be shorter or longer"] = w.abs().amax(1)
    return wrong


def _ratios(w: Tensor, absmax: Tensor, block: int) -> dict[str, Tensor]:
    unit = absmax.repeat_interleave(block)[: w.numel()].view(w.shape)
    over = _over(w, absmax, block)
    return {
        "multiplied by the absmax; divide": w * unit,
        "not divided by anything": w,
        "divided by the absmax of the whole tensor": w / w.abs().max(),
        "divided the wrong way round": unit / w,
        "the signs are lost": over.abs(),
        "divided by the absmax twice": _over(over, absmax, block),
        "a small number was added to the absmax: only in a block of zeros is the "
        "division one by zero": w / (unit + 1e-8),
        "a small number is the least absmax: only in a block of zeros is the division "
        "one by zero": w / unit.clamp(min=1e-8),
        "rounded; that comes later": over.round(),
    }


# 7.2 ----------------------------------------------------------------------------------


def laplace(p: float) -> float:
    """The quantile of the Laplace distribution, of scale one."""
    return -math.log(2 - 2 * p) if p >= 0.5 else math.log(2 * p)


def logistic(p: float) -> float:
    """The quantile of the logistic distribution, of scale one."""
    return math.log(p / (1 - p))


QUANTILES = {  # each of a distribution that is symmetric around zero
    "normal": NormalDist().inv_cdf,
    "Laplace": laplace,
    "uniform": lambda p: 2 * p - 1,
    "normal of standard deviation 3": NormalDist(0, 3).inv_cdf,
    "logistic": logistic,
}


COUNTS = (16, 32, 8, 4, 6, 64, 256)


def normal_values(n: int, quantile: Callable[[float], float]) -> Tensor:
    """The n values of quantile quantization with a zero: (n,) float64, -1 to 1.

    n / 2 values run from -1 to 0, and n / 2 + 1 from 0 to 1; they share the zero. In
    each half the shares p are evenly spaced between 1/2 and `last_share(n)`.

    Args
        n         an even number, 4 at least
        quantile  of a distribution that is symmetric around zero: p -> x
    """
    low, high = (_half(many, last_share(n), quantile) for many in (n // 2, n // 2 + 1))
    return torch.cat([-low[:-1], high.flip(0)])


def last_share(n: int) -> float:
    """The p of the last value: the mean of two, with n and with n - 1 equal shares."""
    return 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2


def _half(many: int, last: float, quantile: Callable) -> Tensor:
    """`many` values from 1 down to 0."""
    shares = np.linspace(last, 0.5, many).tolist()
    xs = [quantile(p) for p in shares]
    return torch.tensor(xs, dtype=torch.float64) / xs[0]


@judged
def derived_values(my_values: Callable) -> None:
    """7.2: my_values(n, quantile): NF4's construction, for n values."""
    before = None
    for n in COUNTS:
        for name, quantile in QUANTILES.items():
            asked = []

            def lent(p, quantile=quantile, asked=asked) -> float:
                asked.append(p)
                return quantile(_demand_share(p))

            with unchanged(**{"what was returned before": before}):
                got = my_values(n, lent)
            _judge_values(got, n, name, quantile, asked, before)
            before = got


def _demand_share(p) -> float:
    """p as a number strictly between 0 and 1; Wrong where it is none."""
    if torch.as_tensor(p).numel() != 1:
        raise Wrong(
            "quantile was called with several shares at once. Likely mistake: it takes "
            "one number; call it for each share"
        )
    p = float(p)
    if not 0 < p < 1:
        raise Wrong(
            f"quantile was called with p = {p:.6g}, whose quantile is infinite or does "
            "not exist. Likely mistake: the last share stays below 1, and the first "
            "above 0"
        )
    return p


def _judge_values(got, n: int, name: str, quantile, asked: list, before) -> None:
    what = f"the values for n={n}, {name} distribution"
    if not asked:
        raise Wrong(
            f"{what}: quantile was never called. Likely mistake: the values of another "
            "distribution, or a table"
        )
    right = normal_values(n, quantile)
    mistakes = _wrong_values(n, quantile) | {KEPT: before}
    close(got, right, what=what, mistakes=mistakes, tolerance=2e-5)
    if not got.is_floating_point() or got.element_size() < 4:
        raise Wrong(
            f"{what}: got {got.dtype}. Likely mistake: float32 or float64 is needed"
        )


def _wrong_values(n: int, quantile) -> dict[str, Tensor]:
    """What each likely mistake gives; a few of them need more values than there are."""
    half, last = n // 2, last_share(n)

    def joined(low: Tensor, high: Tensor) -> Tensor:
        return torch.cat([-low[:-1], high.flip(0)])

    def with_last(p: float) -> Tensor:
        return joined(_half(half, p, quantile), _half(half + 1, p, quantile))

    def raw(many: int) -> Tensor:
        return _half(many, last, quantile) * quantile(last)

    low, high = (_half(many, last, quantile) for many in (half, half + 1))
    spread = np.linspace(1 - last, last, n).tolist()
    middles = ((np.arange(n) + 0.5) / n).tolist()
    through, centered = (
        torch.tensor([quantile(p) for p in shares], dtype=torch.float64)
        for shares in (spread, middles)
    )
    even = np.linspace(1, 0, half), np.linspace(1, 0, half + 1)
    return {
        "the last share of n shares alone; the mean of two is asked for": with_last(
            1 - 1 / (2 * n)
        ),
        "the last share of n - 1 shares alone; the mean of two is asked for": (
            with_last(1 - 1 / (2 * (n - 1)))
        ),
        "the last value at the start of the last share, not in its middle": with_last(
            1 - (1 / n + 1 / (n - 1)) / 2
        ),
        "the last share of sixteen values; it depends on n": with_last(last_share(16)),
        "n and n + 1 shares; n and n - 1 are asked for": with_last(last_share(n + 1)),
        "not divided by the last quantile": joined(raw(half), raw(half + 1)),
        "more values below zero than above it": joined(high, low),
        "n / 2 values on either side, and so no zero in common": torch.cat(
            [-low, low.flip(0)]
        ),
        "the zero is there twice": torch.cat([-low, high.flip(0)]),
        "n / 2 values in each half: one is missing": joined(low, low),
        "n / 2 + 1 values in each half: one too many": joined(high, high),
        "evenly spaced shares over both halves at once: zero is not among the values": (
            through / through[-1]
        ),
        "the middles of n equal shares: zero is not among the values": (
            centered / centered[-1]
        ),
        "evenly spaced values; the shares are evenly spaced": joined(
            *(torch.tensor(part) for part in even)
        ),
        "falling; the values rise from -1 to 1": joined(low, high).flip(0),
        "one half is not turned round": torch.cat([-low[:-1], high]),
        "sixteen values, whatever n is": normal_values(16, quantile),
        "the normal distribution's quantiles, whatever is given": normal_values(
            n, NormalDist().inv_cdf
        ),
        "the signs are exchanged": -joined(low, high),
        "the positive half alone": high.flip(0),
        "the shares p, not their quantiles": joined(
            *(
                torch.tensor(np.linspace(last, 0.5, many) / last)
                for many in (half, half + 1)
            )
        ),
    }


# 7.3 ----------------------------------------------------------------------------------


def constants() -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """(the values' name, values, absmax, block): the telling ones come first."""
    draw = torch.Generator().manual_seed(7)
    sixteen = torch.tensor(nf4.CODES["nf4"])
    for name, values, n, block, scale in (
        ("eight-bit steps", integer8(), 12, 4, 1.0),
        ("eight-bit steps", integer8(), 10, 4, 1.0),
        ("eight-bit steps", integer8(), 10, 4, 1.0),
        ("the dynamic type", dynamic(), 700, 256, 1.0),
        ("the dynamic type", dynamic(), 5, 256, 1.0),
        ("eight-bit steps", integer8(), 300, 64, 1e-5),
        ("sixteen values", sixteen, 50, 4, 1e4),
        ("sixteen values", sixteen, 9, 4, 1e-3),
        ("sixteen values", sixteen, 1, 4, 1.0),
    ):
        absmax = 2 + torch.rand(n, generator=draw)
        absmax[n // 2] = 9.0
        yield name, values, scale * absmax, block
    yield "eight-bit steps", integer8(), torch.full((6,), 2.5), 4
    half = torch.tensor(
        [1.0, 3.0, 2.0, 2.0, 1.5, 2.5]
    )  # the second block: a scale of 0
    yield "eight-bit steps", integer8(), half, 2


def nearest(ratios: Tensor, values: Tensor) -> Tensor:
    """The number of the nearest value, the lower of two; by looking at all of them."""
    return (ratios[..., None] - values).abs().argmin(-1)


def doubled(
    absmax: Tensor, values: Tensor, block: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (n,) uint8, scales (⌈n / block⌉,), offset ()) of the constants (n,)."""
    offset, scales, ratios = _doubled(absmax, block)
    codes = torch.bucketize(ratios, (values[1:] + values[:-1]) / 2)
    return codes.to(torch.uint8), scales, offset


def undoubled(
    codes: Tensor, scales: Tensor, offset: Tensor, values: Tensor, block: int = 256
) -> Tensor:
    """The constants (n,) that the codes stand for."""
    scale = scales.repeat_interleave(block)[: len(codes)]
    return values[codes.long()] * scale + offset


@judged
def double_quantization(my_double: Callable, my_restored: Callable) -> None:
    """7.3: my_double(absmax, values, block) and back: my_restored(codes, …)."""
    got = None
    for name, values, absmax, block in constants():
        what = f"{len(absmax)} constants, {name}, block={block}"
        got = _judge_double(my_double, values, absmax, block, what, before=got)
    # Back from other codes, in another order: nothing is left of what was just made.
    draw, restored = torch.Generator().manual_seed(8), None
    for name, values, absmax, block in [*constants()][1:] + [*constants()][:1]:
        n = len(absmax)
        codes = torch.randint(len(values), (n,), generator=draw).to(torch.uint8)
        scales = 0.5 + torch.rand(-(-n // block), generator=draw)
        offset = 1 + torch.rand((), generator=draw)
        what = f"{n} constants, {name}, block={block}"
        lent = dict(codes=codes, scales=scales, offset=offset, values=values.clone())
        restored = _judge_restored(my_restored, lent, block, what, before=restored)
    _judge_default_block(my_double, my_restored)


def _judge_double(my_double, values, absmax, block, what: str, before) -> tuple:
    offset, scales, ratios = _doubled(absmax, block)
    given, lent = absmax.clone(), values.clone()
    with unchanged(absmax=given, values=lent, **{"what was returned before": before}):
        got = my_double(given, lent, block)
    if not (isinstance(got, tuple | list) and len(got) == 3):
        raise Wrong(
            f"for {what}: expected codes, scales and offset; got "
            f"{type(got).__name__}. Likely mistake: `return codes, scales, offset`"
        )
    _, old_scales, old_offset = before or (None, None, None)
    close(
        got[2],
        offset,
        what=f"the offset of {what}",
        mistakes={KEPT: old_offset} | _wrong_offsets(absmax, block),
    )
    close(
        got[1],
        scales,
        what=f"the offset is right, but not the scales, of {what}",
        mistakes={KEPT: old_scales} | _wrong_second(absmax, offset, block),
    )
    _demand_codes(got[0], ratios, values, absmax, scales, block, what)
    return got


def _judge_default_block(my_double: Callable, my_restored: Callable) -> None:
    """Where no block is given, it is 256, as the cell says."""
    absmax = 1 + torch.rand(300, generator=torch.Generator().manual_seed(9))
    values = integer8()
    codes, scales, offset = my_double(absmax.clone(), values.clone())
    _, expected, _ = _doubled(absmax, 256)
    mistakes = {"another default than block=256": _doubled(absmax, 64)[1]}
    what = "without a block, of 300 constants"
    close(scales, expected, what=f"the scales {what}", mistakes=mistakes)
    back = my_restored(codes, scales, offset, values.clone())
    scale = expected.repeat_interleave(256)[:300]
    close(back, values[codes.long()] * scale + offset, what=f"restored {what}")


def _wrong_offsets(absmax: Tensor, block: int) -> dict[str, Tensor]:
    return {
        "no offset": torch.zeros(()),
        "the largest in the place of the mean": absmax.max(),
        "the median in the place of the mean": absmax.median(),
        "the middle of the largest and the smallest in the place of the mean": (
            absmax.max() + absmax.min()
        )
        / 2,
        "the mean of the first block; of the whole tensor": absmax[:block].mean(),
        "the offset with the wrong sign": -absmax.mean(),
        "a mean for each block; one for the whole tensor": _means(absmax, block),
        "the sum, not divided by the count": absmax.sum(),
        "the mean with what was filled in": _rows(absmax, block).mean(),
    }


def _doubled(absmax: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offset, scales, ratios)"""
    offset = absmax.mean()
    rest = absmax - offset
    scales = torch.stack([part.abs().max() for part in rest.split(block)])
    return offset, scales, _over(rest, scales, block)


def _means(absmax: Tensor, block: int) -> Tensor:
    return torch.stack([part.mean() for part in absmax.split(block)])


def _wrong_second(absmax: Tensor, offset: Tensor, block: int) -> dict[str, Tensor]:
    rest, count = absmax - offset, -(-len(absmax) // block)
    parts = rest.split(block)
    filled = _rows(absmax, block) - offset
    return {
        "the padding was put in before the offset was taken off: it became -offset, "
        "the largest of its block": filled.abs().amax(1),
        "the largest of the constants; of what is left without the offset": torch.stack(
            [part.abs().max() for part in absmax.split(block)]
        ),
        "the largest value, not the largest absolute value": torch.stack(
            [part.max() for part in parts]
        ),
        "one scale for the whole tensor; one for each block": rest.abs()
        .max()
        .expand(count),
        "a single scale; one for each block": rest.abs().max(),
        "the last, short block is missing": torch.stack(
            [part.abs().max() for part in parts if len(part) == block] or [rest[0]]
        ),
        "the mean of the absolute values": torch.stack(
            [part.abs().mean() for part in parts]
        ),
        "half the distance from the smallest to the largest; the distance from zero "
        "counts": torch.stack([(part.max() - part.min()) / 2 for part in parts]),
        "the inverse of the scales": 1
        / torch.stack([part.abs().max() for part in parts]),
        "a scale too many": F.pad(
            torch.stack([part.abs().max() for part in parts]), (0, 1)
        ),
        "no scale: all are 1": torch.ones(count),
    }


def _demand_codes(got, ratios, values, absmax, scales, block, what) -> None:
    what = f"offset and scales are right, but not the codes, of {what}"
    right = nearest(ratios, values)
    if not isinstance(got, Tensor) or got.shape != right.shape:
        close(got, right, what=what)
    _demand_eight(got, what)
    if int(got.max()) >= len(values):
        raise Wrong(
            f"{what}: there are {len(values)} values, so codes go up to "
            f"{len(values) - 1}; got {got.max()}. Likely mistake: more values, or a "
            "count that begins at one"
        )
    scale = scales.repeat_interleave(block)[: len(absmax)]
    off = (values[got.long()] - ratios).abs() - (values[right] - ratios).abs()
    if bool((off[scale > 0] <= CLOSE).all()):
        return
    rest = absmax - absmax.mean()
    below = torch.bucketize(ratios, values, right=True) - 1
    wrong = {
        "the offset was not taken off": nearest(absmax / scale, values),
        "not divided by the scale": nearest(rest, values),
        "multiplied by the scale; divide": nearest(rest * scale, values),
        "counted from the other end": len(values) - 1 - right,
        "the value below the ratio, not the nearest": below.clamp(min=0),
        "the value above the ratio, not the nearest": torch.bucketize(
            ratios, values
        ).clamp(max=len(values) - 1),
        "even steps; these values are not even": ((ratios + 1) * 127.5).round().long(),
    }
    wrong = {text: codes for text, codes in wrong.items() if not codes.equal(right)}
    likely = [text for text, codes in wrong.items() if codes.equal(got.long())]
    worst = int(off.argmax())
    raise Wrong(
        f"{what}: for the ratio {ratios[worst]:.4g}, code {got[worst]} stands for "
        f"{values[got[worst].long()]:.4g}, and code {right[worst]} for "
        f"{values[right[worst]]:.4g}, which is nearer"
        + (f"\nLikely mistake: {likely[0]}" if likely else "")
    )


def _demand_eight(got: Tensor, what: str) -> None:
    if got.dtype != torch.uint8:
        raise Wrong(
            f"{what}: expected torch.uint8, eight bits for each constant; got "
            f"{got.dtype}. Likely mistake: .to(torch.uint8) is missing"
        )


def _judge_restored(my_restored, lent: dict, block: int, what: str, before) -> Tensor:
    codes, scales, offset, values = lent.values()
    with unchanged(**lent, **{"what was returned before": before}):
        got = my_restored(*lent.values(), block)
    scale = scales.repeat_interleave(block)[: len(codes)]
    near = values[codes.long()]
    expected = near * scale + offset
    strided = scales.repeat(block)[: len(codes)]
    close(
        got,
        expected,
        what=f"the constants restored, of {what}",
        mistakes={
            KEPT: before,
            "the offset is forgotten": near * scale,
            "the offset was added twice": near * scale + 2 * offset,
            "the offset was taken off again: add it": near * scale - offset,
            "the offset was added before multiplying": (near + offset) * scale,
            "the scale is forgotten": near + offset,
            "the code itself was used, not the value that it stands for": (
                codes.float() * scale + offset
            ),
            "even steps from -1 to 1; the code's value is values[code]": (
                (codes / 127.5 - 1) * scale + offset
            ),
            "divided by the scale; multiply": near / scale + offset,
            "the first scale for all blocks": near * scales[0] + offset,
            "the largest scale for all blocks": near * scales.max() + offset,
            "each scale belongs to a block, not to every so-many-th constant": (
                near * strided + offset
            )
            if len(strided) == len(near)
            else None,
            "the values that were filled in are still there": F.pad(
                near, (0, -len(near) % block)
            )
            * scales.repeat_interleave(block)
            + offset,
        },
        tolerance=1e-6,
    )
    return got


# 7.4 ----------------------------------------------------------------------------------

BLOCK = 64  # of all round trips here
FAULT = 1e-5  # of the largest weight: what is further off is no rounding
SHAPES = (
    *((128, 128), (96, 128), (128, 96), (8, 100), (4, 5, 64), (3, 7, 33), (640,)),
    *((63, 64), (1, 129), (129, 1), (64, 64), (65, 63), (2, 3, 4, 32), (131,)),
    *((1, 64), (64, 1), (200, 3), (1001,), (16, 16, 16), (5, 13)),
)


def exact(w: Tensor) -> Tensor:
    """The right round trip: NF4 in blocks of 64, which run on from row to row."""
    return nf4.dequantize(nf4.quantize(w, BLOCK, double=False))


def bad_shapes(theirs: Callable, ours: Callable, shapes: Sequence[tuple]) -> list:
    """Those shapes, in order, whose weights `theirs` does not restore as `ours` does.

    Args
        theirs, ours  w -> w', float32, of the shape of w
    """
    bad = []
    for shape in shapes:
        w = torch.randn(shape)
        limit = FAULT * w.abs().max().item()
        if not torch.allclose(theirs(w), ours(w), rtol=0, atol=limit):
            bad.append(shape)
    return bad


class Fault(NamedTuple):
    """A library that restores the weights of some shapes wrongly."""

    restore: Callable[[Tensor], Tensor]
    hits: Callable[[tuple], bool]  # whether a shape is restored wrongly


def _rows_begin_blocks(w: Tensor) -> Tensor:
    """Right codes, but constants looked up as if each row began a new block."""
    absmax = nf4.quantize(w, BLOCK, double=False).absmax
    width = w.shape[-1]
    column = torch.arange(w.numel()) % width
    row = torch.arange(w.numel()) // width
    taken = row * -(-width // BLOCK) + column // BLOCK
    return _with_constants(w, absmax[taken % len(absmax)])


def _with_constants(w: Tensor, taken: Tensor) -> Tensor:
    """Restored with these constants, one for each weight, in place of its own."""
    own = nf4.quantize(w, BLOCK, double=False).absmax.repeat_interleave(BLOCK)
    own = own[: w.numel()]
    ratio = torch.where(own > 0, taken / own, torch.ones_like(own))
    return exact(w) * ratio.view(w.shape)


def _short_block_takes_the_one_before(w: Tensor) -> Tensor:
    absmax = nf4.quantize(w, BLOCK, double=False).absmax
    last = len(absmax) - 1
    number = (torch.arange(w.numel()) // BLOCK).clamp(max=last - 1)
    return _with_constants(w, absmax[number])


def _changed(change: Callable) -> Callable:
    """The right round trip, but for the last weight: change(last, largest in size)."""

    def restore(w: Tensor) -> Tensor:
        flat = exact(w).flatten()
        flat[-1] = change(flat[-1], flat.abs().max())
        return flat.view(w.shape)

    return restore


def _is_short(shape: tuple) -> bool:
    return math.prod(shape) % BLOCK > 0


FAULTS = {
    "everything, in every shape": Fault(lambda w: 0.5 * exact(w), lambda s: True),
    "nothing": Fault(exact, lambda s: False),
    "constants are looked up row by row": Fault(
        _rows_begin_blocks,
        lambda s: math.prod(s[:-1]) > 1 and s[-1] % BLOCK > 0 and math.prod(s) > BLOCK,
    ),
    "the last weight of an odd number is a tenth too large": Fault(
        _changed(lambda last, most: last + 0.1 * most),
        lambda s: math.prod(s) % 2 == 1,
    ),
    "square matrices come back transposed": Fault(
        lambda w: exact(w).mT.contiguous(), lambda s: len(s) == 2 and s[0] == s[1]
    ),
    "all signs are lost where a side is one": Fault(
        lambda w: exact(w).abs(), lambda s: 1 in s
    ),
    "a short last block takes the constant before it": Fault(
        _short_block_takes_the_one_before,
        lambda s: _is_short(s) and math.prod(s) > BLOCK,
    ),
    "a short last block comes back as NaN": Fault(
        _changed(lambda last, most: last * math.nan), _is_short
    ),
    "the largest weight is a hundredth too small in three sides or more": Fault(
        lambda w: torch.where(w.abs() == w.abs().max(), 0.99 * exact(w), exact(w)),
        lambda s: len(s) > 2,
    ),
}


class _Watched:
    """A round trip that keeps what it was asked, and leaves rounding of its own."""

    def __init__(self, fault: Fault, noise: float):
        self.fault, self.noise, self.seen = fault, noise, []

    def __call__(self, w: Tensor) -> Tensor:
        if not isinstance(w, Tensor) or w.dtype != torch.float32 or not w.numel():
            kind = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise Wrong(
                f"a round trip was given {kind}, or nothing at all. Likely mistake: it "
                "takes float32 weights, torch.randn(shape) for example"
            )
        self.seen.append(w.detach().clone())
        hit = self.fault.hits(tuple(w.shape))
        restored = self.fault.restore(w.detach()) if hit else exact(w.detach())
        return restored * (1 + self.noise)


@judged
def finds_bad_shapes(my_bad_shapes: Callable) -> None:
    """7.4: my_bad_shapes(theirs, ours, shapes): shapes that theirs restores wrongly."""
    draw, before = random.Random(7), None
    for fault_name, fault in FAULTS.items():
        for count in (len(SHAPES), 6, 1, 0):
            shapes = draw.sample(SHAPES, count)
            given = list(shapes)
            theirs, ours = _Watched(fault, 2e-7), _Watched(FAULTS["nothing"], 0.0)
            with unchanged(shapes=given, **{"what was returned before": before}):
                got = my_bad_shapes(theirs, ours, given)
            _judge_shapes(got, shapes, fault, fault_name, theirs, ours)
            before = got


def _judge_shapes(got, shapes, fault: Fault, name: str, theirs, ours) -> None:
    right = [shape for shape in shapes if fault.hits(shape)]
    what = f"{len(shapes)} shapes, of a library in which this is wrong: {name}"
    if not isinstance(got, list | tuple):
        likely = "`return` is missing" if got is None else "return a list of shapes"
        raise Wrong(f"{what}: got {type(got).__name__}. Likely mistake: {likely}")
    named = [tuple(shape) if isinstance(shape, Sequence) else shape for shape in got]
    if named == right:
        return
    missed = [shape for shape in right if shape not in named]
    extra = [shape for shape in named if shape not in right]
    likely = _why_inputs(theirs, ours) or _why_shapes(named, shapes, right)
    raise Wrong(
        f"{what}\n  missed   {_few(missed)}\n  accused  {_few(extra)}\n"
        f"Likely mistake: {likely or _why_missed(missed, theirs)}"
    )


def _few(shapes: list) -> str:
    more = ", …" if len(shapes) > 3 else ""
    return (", ".join(map(str, shapes[:3])) or "none") + more


def _why_shapes(named: list, shapes: list, right: list) -> str | None:
    """What is wrong with the list itself; None where it only lacks some shapes."""
    sound = [shape for shape in shapes if shape not in right]
    if sorted(map(str, named)) == sorted(map(str, right)):
        return "the right shapes in another order; keep that of `shapes`"
    if any(not isinstance(shape, tuple) for shape in named):
        return "something else than shapes; return the shapes themselves"
    if right and named == sound:
        return "the sound shapes, or none at all; return the bad ones"
    if named == right[:1]:
        return "the search ended at the first bad shape; go on to the last"
    if any(shape in sound for shape in named):
        return (
            f"what differs by less than {FAULT:g} of the largest weight is rounding, "
            "no fault; and w' is not w even where all is right"
        )
    return None


def _why_inputs(theirs, ours) -> str | None:
    """What is wrong with the weights themselves; None if nothing is."""
    if not theirs.seen:
        return "theirs was never called: a rule about shapes, where a test is needed"
    if not ours.seen:
        return (
            "ours was never called; an error of some percent is usual, so only another "
            "round trip tells what is right"
        )
    if all(w.dim() == 1 for w in theirs.seen) and len(theirs.seen) > 1:
        return "theirs has only seen flat weights; the fault is in the shape"
    pairs = zip(theirs.seen, ours.seen, strict=False)
    if not all(torch.equal(a.flatten(), b.flatten()) for a, b in pairs):
        return "theirs and ours were given different weights; draw w once"
    large = [w for w in theirs.seen if w.numel() > BLOCK]
    if any(w.unique().numel() == 1 for w in large):
        return (
            "all weights are equal, so all constants are too, and a wrong one is not "
            "seen; take random weights"
        )
    if all((w >= 0).all() for w in theirs.seen):
        return "no weight is negative, so a lost sign is not seen; torch.randn"
    constants = [nf4.quantize(w, BLOCK, double=False).absmax for w in large]
    if any(c.numel() > 1 and c.unique().numel() == 1 for c in constants):
        return (
            "all blocks have the same absmax, so a wrong constant is not seen; take "
            "weights that differ from block to block"
        )
    return None


def _why_missed(missed: list, theirs: _Watched) -> str:
    restored = [theirs(w) for w in [*theirs.seen] if tuple(w.shape) in missed]
    if any(w.isnan().any() for w in restored):
        return "NaN > limit is False; ask whether all are close, as torch.allclose does"
    return (
        "an average, a norm or a wide limit, in which one lost weight or another order "
        "is not seen; compare weight by weight"
    )
