"""What the exercises of notebook 07, four bits, are compared with.

Blocks, codes, bytes and constants are compared with what nf4/ holds for the same
tensors. Where rounding of the last bit may take a neighbour, both are right.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import nf4
from ...nf4.codes import dynamic, integer8
from . import Wrong, close, judged, unchanged

KEPT = "what the call before returned: something is kept from call to call"
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
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


@judged
def nibbles(my_pack: Callable, my_unpack: Callable) -> None:
    """7.2: my_pack(codes): two a byte; my_unpack(packed, n): the codes again."""
    earlier = None
    for codes, other in zip(_some_codes(1), _some_codes(2), strict=True):
        bytes_ = _judge_pack(my_pack, codes, earlier)
        earlier = bytes_, _judge_unpack(my_unpack, other, earlier)


def _some_codes(seed: int) -> Iterator[Tensor]:
    """Random codes of several lengths, each length twice; then the special ones."""
    draw = torch.Generator().manual_seed(seed)
    for n in (8, 8, 7, 7, 1, 2, 33, 33, 300):
        codes = torch.randint(16, (n,), generator=draw).to(torch.uint8)
        if n == 8:
            codes[:2] = torch.tensor([9, 3])
        yield codes
    for special in ([15] * 6, [0] * 5, [0] * 4, [7, 0, 3, 0], [1, 2, 0], [15, 8, 15]):
        yield torch.tensor(special, dtype=torch.uint8)


def _packed(codes: Tensor) -> Tensor:
    """In whole numbers: 16 times the first of a pair, plus the second."""
    pairs = _rows(codes.long(), 2)
    return (16 * pairs[:, 0] + pairs[:, 1]).to(torch.uint8)


def _judge_pack(my_pack: Callable, codes: Tensor, earlier) -> Tensor:
    n, given = len(codes), codes.clone()
    with unchanged(codes=given, **{"what was returned before": earlier}):
        got = my_pack(given)
    what = f"my_pack of {n} codes, {codes[:5].tolist()}{', …' * (n > 5)}"
    _demand_bytes(got, what)
    pairs = _rows(codes.long(), 2)
    first, second = pairs[:, 0], pairs[:, 1]
    wrong = {
        "the first of a pair belongs into the high half": 16 * second + first,
        "added without shifting: the two cannot be told apart any more": first + second,
        "times 15, or shifted by another number than 4": 15 * first + second,
        "+ comes before <<: put brackets around the shift": (
            (first << (4 + second)) % 256
        ),
        "shifted by 3 bits; a code has 4": (8 * first) | second,
        "the second is lost": 16 * first,
        "the first is lost": second,
        "the last code of an odd number is lost": _packed(codes)[: n // 2],
        "neighbours share a byte, not the first half with the second": _halves(codes),
        "one code a byte: nothing is packed": codes,
    }
    if n % 2:
        lone = _packed(codes).long()
        lone[-1] = codes[-1]
        twice = _packed(codes).long()
        twice[-1] = 17 * codes[-1].long()
        wrong["the last of an odd number belongs into the high half too"] = lone
        wrong["the last of an odd number stands there twice"] = twice
    close(got, _packed(codes), what=what, mistakes=wrong)
    return got


def _halves(codes: Tensor) -> Tensor:
    padded = F.pad(codes.long(), (0, len(codes) % 2))
    first, second = padded.chunk(2)
    return 16 * first + second


def _judge_unpack(my_unpack: Callable, codes: Tensor, earlier) -> Tensor:
    packed, n = _packed(codes), len(codes)
    given = packed.clone()
    with unchanged(packed=given, **{"what was returned before": earlier}):
        got = my_unpack(given, n)
    what = f"my_unpack({packed[:3].tolist()}{', …' * (n > 6)}, n={n})"
    if isinstance(got, Tensor) and got.dtype not in INTEGERS:
        raise Wrong(
            f"{what}: codes are whole numbers, got {got.dtype}. Likely mistake: / in "
            "the place of // or >>"
        )
    high, low = packed.long() // 16, packed.long() % 16

    def woven(first, second) -> Tensor:
        return torch.stack([first, second], 1).flatten()[:n]

    every = torch.stack([high, low], 1).flatten()
    close(
        got,
        codes,
        what=what,
        mistakes={
            "the low half came first": woven(low, high),
            "the low half is not cut out: & 15": woven(high, packed.long()),
            "all high halves, then all low ones: weave them": torch.cat([high, low])[
                :n
            ],
            "the half that no code fills is still there: cut to n": every,
            "divided by 15; the high half counts sixteens": woven(
                packed.long() // 15, low
            ),
            "the sign of a byte: the highest bit is no sign here": woven(
                packed.view(torch.int8).long() >> 4, low
            ),
            "the high half alone": high,
            "the low half alone": low,
            "the same half twice": woven(high, high),
            "nothing was unpacked": packed,
        },
    )
    return got


def _demand_bytes(got, what: str) -> None:
    if not isinstance(got, Tensor) or got.dtype == torch.uint8:
        return
    raise Wrong(
        f"{what}: expected torch.uint8, a byte for two codes; got {got.dtype}, of "
        f"{got.element_size()} bytes. Likely mistake: a detour through another dtype; "
        "come back with .to(torch.uint8)"
    )


# 7.3 ----------------------------------------------------------------------------------


def books() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, values, ratios), no ratio near a midpoint, but for those that are on one.

    Ratios on a midpoint are in a book of eighths, where every sum is exact.
    """
    draw = torch.Generator().manual_seed(7)
    uneven = torch.tensor([-1.0, -0.9, -0.1, 0.0, 0.05, 0.6, 1.0])
    eighths = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.125, 0.5, 1.0])
    for name, values, shape in (
        ("seven uneven values", uneven, (5, 40)),
        ("the values of NF4", torch.tensor(nf4.CODES["nf4"]), (5, 40)),
        ("sixteen even steps", torch.tensor(nf4.CODES["int4"]), (5, 40)),
        ("256 even steps", integer8(), (400,)),
        ("values far from one", 100 * torch.tensor([1.0, 2.5, 20, 25, 40]), (30,)),
        ("values below zero", torch.tensor([-9.0, -7.0, -2.5]), (2, 3, 4)),
        ("values near to zero", 1e-4 * uneven, (4, 1, 5, 2)),
        ("two values", torch.tensor([-0.2, 0.9]), (9,)),
        ("a single value", torch.tensor([0.5]), (3, 2)),
        ("seven uneven values", uneven, ()),
    ):
        for _ in range(2):
            yield name, values, _ratios_for(values, shape, draw)
    yield "eighths, ratios on the midpoints", eighths, _midpoints(eighths)
    yield "eighths, ratios on the values", eighths, eighths


def _ratios_for(values: Tensor, shape: tuple, draw: torch.Generator) -> Tensor:
    """From below the lowest value to above the highest, and these two."""
    low, high = values[0], values[-1]
    width = high - low if len(values) > 1 else torch.tensor(1.0)
    ratios = low + width * (1.4 * torch.rand(shape, generator=draw) - 0.2)
    if ratios.numel() > 2:
        ratios.view(-1)[:3] = torch.stack([high, low, 0 * low])
    gap = (ratios[..., None] - _midpoints(values)).abs()
    near = (gap < 1e-4 * width).any(-1)
    return torch.where(near, ratios + 3e-4 * width, ratios).contiguous()


def _midpoints(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


def nearest(ratios: Tensor, values: Tensor) -> Tensor:
    """The number of the nearest value, the lower of two; by looking at all of them."""
    return (ratios[..., None] - values).abs().argmin(-1)


@judged
def nearest_code(my_nearest: Callable) -> None:
    """7.3: my_nearest(ratios, values): the number of the nearest value, for each."""
    got = None
    for name, values, ratios in books():
        given, lent, before = ratios.clone(), values.clone(), got
        with unchanged(
            ratios=given, values=lent, **{"what was returned before": before}
        ):
            got = my_nearest(given, lent)
        what = f"the codes for ratios of shape {tuple(ratios.shape)}, {name}"
        if isinstance(got, Tensor) and got.dtype not in INTEGERS:
            likely = (
                "values[code] was returned; the code, its number, is asked for"
                if got.shape == ratios.shape
                and not got.is_complex()
                and torch.equal(got.float(), values[nearest(ratios, values)])
                else "a code is a whole number: .to(torch.uint8)"
            )
            raise Wrong(f"{what}: got {got.dtype}. Likely mistake: {likely}")
        close(
            got,
            nearest(ratios, values),
            what=what,
            mistakes={KEPT: before} | _wrong_codes(ratios, values),
        )


def _wrong_codes(ratios: Tensor, values: Tensor) -> dict[str, Tensor]:
    right, last = nearest(ratios, values), len(values) - 1
    floor = torch.bucketize(ratios, values, right=True) - 1
    ceiling = torch.bucketize(ratios, values)
    middles = _midpoints(values)
    steps = torch.linspace(values[0].item(), values[-1].item(), len(values))
    even = ((ratios + 1) / 2 * last).round().long()
    wrong = {
        "on a midpoint, the lower of the two counts": torch.bucketize(
            ratios, middles, right=True
        ),
        "the value below the ratio, not the nearest: search the midpoints": floor,
        "the value above the ratio, not the nearest: search the midpoints": ceiling,
        "one too many: as many midpoints as lie below the ratio": right + 1,
        "one too few: as many midpoints as lie below the ratio": right - 1,
        "counted from the other end": last - right,
        "even steps from -1 to 1; these values are not even": even,
        "even steps from the first value to the last; these are not even": (
            torch.bucketize(ratios, _midpoints(steps))
        ),
        "eight bits with a sign count up to 127": right.to(torch.int8),
        "the ratios were sorted, and so the codes are": (
            right.flatten().sort().values.view(right.shape)
        ),
        "the furthest value, not the nearest": (ratios[..., None] - values)
        .abs()
        .argmax(-1),
        "the nearest in size alone: the sign counts": (
            (ratios.abs()[..., None] - values.abs()).abs().argmin(-1)
        ),
    }
    return {text: codes for text, codes in wrong.items() if not codes.equal(right)}


# 7.4 ----------------------------------------------------------------------------------


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
    half = torch.tensor([1.0, 3.0, 2.0, 2.0, 1.5, 2.5])  # the second block: a unit of 0
    yield "eight-bit steps", integer8(), half, 2


@judged
def double_quantization(my_double: Callable, my_restored: Callable) -> None:
    """7.4: my_double(absmax, values, block) and back: my_restored(codes, …)."""
    got = None
    for name, values, absmax, block in constants():
        what = f"{len(absmax)} constants, {name}, block={block}"
        got = _judge_double(my_double, values, absmax, block, what, before=got)
    # Back from other codes, in another order: nothing is left of what was just made.
    draw, restored = torch.Generator().manual_seed(8), None
    for name, values, absmax, block in [*constants()][1:] + [*constants()][:1]:
        n = len(absmax)
        codes = torch.randint(len(values), (n,), generator=draw).to(torch.uint8)
        units = 0.5 + torch.rand(-(-n // block), generator=draw)
        offset = 1 + torch.rand((), generator=draw)
        what = f"{n} constants, {name}, block={block}"
        lent = dict(codes=codes, units=units, offset=offset, values=values.clone())
        restored = _judge_restored(my_restored, lent, block, what, before=restored)
    _judge_default_block(my_double, my_restored)


def _judge_double(my_double, values, absmax, block, what: str, before) -> tuple:
    offset, units, ratios = _doubled(absmax, block)
    given, lent = absmax.clone(), values.clone()
    with unchanged(absmax=given, values=lent, **{"what was returned before": before}):
        got = my_double(given, lent, block)
    if not (isinstance(got, tuple | list) and len(got) == 3):
        raise Wrong(
            f"for {what}: expected codes, units and offset; got "
            f"{type(got).__name__}. Likely mistake: `return codes, units, offset`"
        )
    _, old_units, old_offset = before or (None, None, None)
    close(
        got[2],
        offset,
        what=f"the offset of {what}",
        mistakes={KEPT: old_offset} | _wrong_offsets(absmax, block),
    )
    close(
        got[1],
        units,
        what=f"the offset is right, but not the units, of {what}",
        mistakes={KEPT: old_units} | _wrong_second(absmax, offset, block),
    )
    _demand_codes(got[0], ratios, values, absmax, units, block, what)
    return got


def _judge_default_block(my_double: Callable, my_restored: Callable) -> None:
    """Where no block is given, it is 256, as the cell says."""
    absmax = 1 + torch.rand(300, generator=torch.Generator().manual_seed(9))
    values = integer8()
    codes, units, offset = my_double(absmax.clone(), values.clone())
    _, expected, _ = _doubled(absmax, 256)
    mistakes = {"another default than block=256": _doubled(absmax, 64)[1]}
    what = "without a block, of 300 constants"
    close(units, expected, what=f"the units {what}", mistakes=mistakes)
    back = my_restored(codes, units, offset, values.clone())
    unit = expected.repeat_interleave(256)[:300]
    close(back, values[codes.long()] * unit + offset, what=f"restored {what}")


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
    """(offset, units, ratios)"""
    offset = absmax.mean()
    rest = absmax - offset
    units = torch.stack([part.abs().max() for part in rest.split(block)])
    return offset, units, _over(rest, units, block)


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
        "one unit for the whole tensor; one for each block": rest.abs()
        .max()
        .expand(count),
        "a single unit; one for each block": rest.abs().max(),
        "the last, short block is missing": torch.stack(
            [part.abs().max() for part in parts if len(part) == block] or [rest[0]]
        ),
        "the mean of the absolute values": torch.stack(
            [part.abs().mean() for part in parts]
        ),
        "half the distance from the smallest to the largest; the distance from zero "
        "counts": torch.stack([(part.max() - part.min()) / 2 for part in parts]),
        "the inverse of the units": 1
        / torch.stack([part.abs().max() for part in parts]),
        "a unit too many": F.pad(
            torch.stack([part.abs().max() for part in parts]), (0, 1)
        ),
        "no unit: all are 1": torch.ones(count),
    }


def _demand_codes(got, ratios, values, absmax, units, block, what) -> None:
    what = f"offset and units are right, but not the codes, of {what}"
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
    unit = units.repeat_interleave(block)[: len(absmax)]
    off = (values[got.long()] - ratios).abs() - (values[right] - ratios).abs()
    if bool((off[unit > 0] <= CLOSE).all()):
        return
    rest = absmax - absmax.mean()
    below = torch.bucketize(ratios, values, right=True) - 1
    wrong = {
        "the offset was not taken off": nearest(absmax / unit, values),
        "not divided by the unit": nearest(rest, values),
        "multiplied by the unit; divide": nearest(rest * unit, values),
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
    codes, units, offset, values = lent.values()
    with unchanged(**lent, **{"what was returned before": before}):
        got = my_restored(*lent.values(), block)
    unit = units.repeat_interleave(block)[: len(codes)]
    near = values[codes.long()]
    expected = near * unit + offset
    strided = units.repeat(block)[: len(codes)]
    close(
        got,
        expected,
        what=f"the constants restored, of {what}",
        mistakes={
            KEPT: before,
            "the offset is forgotten": near * unit,
            "the offset was added twice": near * unit + 2 * offset,
            "the offset was taken off again: add it": near * unit - offset,
            "the offset was added before multiplying": (near + offset) * unit,
            "the unit is forgotten": near + offset,
            "the code itself was used, not the value that it stands for": (
                codes.float() * unit + offset
            ),
            "even steps from -1 to 1; the code's value is values[code]": (
                (codes / 127.5 - 1) * unit + offset
            ),
            "divided by the unit; multiply": near / unit + offset,
            "the first unit for all blocks": near * units[0] + offset,
            "the largest unit for all blocks": near * units.max() + offset,
            "each unit belongs to a block, not to every so-many-th constant": (
                near * strided + offset
            )
            if len(strided) == len(near)
            else None,
            "the values that were filled in are still there": F.pad(
                near, (0, -len(near) % block)
            )
            * units.repeat_interleave(block)
            + offset,
        },
        tolerance=1e-6,
    )
    return got


# 7.5 ----------------------------------------------------------------------------------

MODELS = {  # (four-bit tensors, sixteen-bit rest)
    "a model with one projection": ([(64, 1032)], []),
    "a model with an embedding": ([(64, 128), (128, 96)], [(300, 64), (64,)]),
    "a model whose rows are no whole blocks": ([(33, 100), (7, 9)], [(10, 33)]),
    "a model of some size": ([(256, 256)] * 2 + [(512, 257)], [(1000, 256), (256,)]),
    "a model with nothing in four bits": ([], [(10, 33), (7,), (2, 3, 4)]),
    "a model with vectors and stacks": ([(101,), (3, 5, 7), ()], [(), (2, 3, 4)]),
    "a model of many layers": ([(16, 24), (24, 17)] * 16, [(16,)] * 33),
    "a model of more bytes than float32 counts": ([(64, 128)], [(4097, 4099)]),
}


# More weights than float32 counts; too many to be made in a test.
LARGE = {"a model of an odd and large tensor": ([(20_011, 4_099)], [(3,)])}


@judged
def model_bytes(my_bytes: Callable) -> None:
    """7.5: my_bytes(packed, plain, block, double): what a quantized model takes."""
    for name, (packed, plain) in (MODELS | LARGE).items():
        for block in (64, 128, 32, 7):
            for double in (True, False):
                _judge_bytes(my_bytes, packed, plain, block, double, name)
    packed, plain = MODELS["a model of some size"]
    close(
        my_bytes([*packed], [*plain]),
        counted(packed, plain, 64, True),
        what="the bytes of a model of some size, without a block and a `double`",
        mistakes={
            "another default than block=64": counted(packed, plain, 32, True),
            "another default than double=True": counted(packed, plain, 64, False),
        },
        tolerance=0.0,
    )


def counted(packed, plain, block: int, double: bool) -> int:
    """Bytes, by a formula; tests compare it with tensors that are made."""
    sizes = [math.prod(shape) for shape in packed]
    blocks = [-(-n // block) for n in sizes]
    codes = sum(-(-n // 2) for n in sizes)
    constants = sum(4 * count for count in blocks)
    if double:
        constants = sum(count + 4 * -(-count // 256) + 4 for count in blocks)
    return codes + constants + 2 * sum(math.prod(shape) for shape in plain)


def _judge_bytes(my_bytes, packed, plain, block, double, name) -> None:
    what = f"the bytes of {name}: {packed[:2]} in four bits, {plain[:2]} in sixteen"
    lent = dict(packed=list(packed), plain=list(plain))
    with unchanged(**lent):
        got = my_bytes(*lent.values(), block, double)
    expected = counted(packed, plain, block, double)
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.item()
    wrong = _wrong_bytes(packed, plain, block, double)
    if not isinstance(got, int | float) or got == expected:
        close(got, expected, what=what, tolerance=0.0, kind=int)
    else:  # a count is a count: a byte too many is wrong
        likely = next((text for text, n in wrong.items() if n == got), None)
        raise Wrong(
            f"{what}, block={block}, double={double}\n"
            f"  expected  {expected:,}\n  got       {got:,}"
            + (f"\nLikely mistake: {likely}" if likely else "")
        )


def _wrong_bytes(packed, plain, block: int, double: bool) -> dict[str, float]:
    sizes = [math.prod(shape) for shape in packed]
    counts = [-(-n // block) for n in sizes]
    codes = sum(-(-n // 2) for n in sizes)
    rest = 2 * sum(math.prod(shape) for shape in plain)
    second = [-(-c // 256) for c in counts]
    firsts = sum(counts) if double else 4 * sum(counts)
    right = codes + rest + firsts + (4 * sum(second) + 4 * len(sizes)) * double
    rows = [math.prod(s[:-1]) * -(-math.prod(s[-1:]) // block) for s in packed]
    a_value = 4 + (8 / block + 32 / (256 * block) if double else 32 / block)
    wrong = {
        "the constants are forgotten": codes + rest,
        **_wrong_constants(codes + rest, sum(counts), right, double),
        "the offset of each tensor is forgotten": right - 4 * len(sizes),
        "one offset for all; each tensor has one": right - 4 * (len(sizes) - 1),
        "the units are forgotten": right - 4 * sum(second),
        "a unit for each block of values; for each 256 of the constants": (
            right - 4 * sum(second) + 4 * sum(counts)
        ),
        "blocks that end with each row; they run on into the next": (
            right - firsts + (sum(rows) if double else 4 * sum(rows))
        ),
        "a unit for each 256 of the weights; for each 256 of the constants": (
            right - 4 * sum(second) + 4 * sum(-(-n // 256) for n in sizes)
        ),
        "a unit for each 16384 of the weights; that is so for blocks of 64 alone": (
            right - 4 * sum(second) + 4 * sum(-(-n // 16384) for n in sizes)
        ),
        "a block more than there are: // block + 1 is too many where all are whole": (
            right - firsts + (1 if double else 4) * sum(n // block + 1 for n in sizes)
        ),
        "a unit more than there are: // 256 + 1 is too many where all are whole": (
            right - 4 * sum(second) + 4 * sum(c // 256 + 1 for c in counts)
        ),
        "`a + b if double else c` leaves out a, too, where not double: brackets": (
            right - codes
        ),
        "the codes of all tensors are rounded up together; each by itself": (
            right - codes - (-sum(sizes) // 2)
        ),
        "equal shapes are counted once; each tensor is there": counted(
            sorted(set(packed)), sorted(set(plain)), block, double
        ),
        "the rest is forgotten": right - rest,
        "the rest in four bits; it stays in sixteen": right - rest + rest // 4,
        "the rest in 32 bits": right + rest,
        "a byte for every code; two share one": right + sum(n // 2 for n in sizes),
        "bits; 8 of them are a byte": 8 * right,
        "the average of bits a value; whole bytes and blocks are counted": (
            sum(sizes) * a_value / 8 + rest
        ),
        "rounded down; a block that has begun counts": (
            sum(n // 2 for n in sizes)
            + rest
            + (
                sum(n // block for n in sizes)
                + 4 * sum(n // block // 256 for n in sizes)
                + 4 * len(sizes)
                if double
                else 4 * sum(n // block for n in sizes)
            )
        ),
        "all tensors counted as one: each has blocks of its own": _as_one(
            sizes, rest, block, double
        ),
    }
    return {text: count for text, count in wrong.items() if count != right}


def _wrong_constants(rest: int, blocks: int, right: int, double: bool) -> dict:
    if not double:
        return {
            "the constants in 8 bits, though they are not quantized": rest + blocks,
            "the constants in 16 bits; a float32 has 32": rest + 2 * blocks,
        }
    return {
        "the constants in 32 bits, though they are quantized": rest + 4 * blocks,
        "the constants in 32 bits, and their units too": right + 3 * blocks,
        "the second level is forgotten: units and offset": rest + blocks,
    }


def _as_one(sizes: list[int], rest: int, block: int, double: bool) -> int:
    n = sum(sizes)
    count = -(-n // block)
    firsts = count + 4 * -(-count // 256) + 4 if double else 4 * count
    return -(-n // 2) + firsts + rest
