"""Notebook 07's checks: what the common mistakes are told, and what else is right."""

import build
import pytest
import torch
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch import nf4
from peft_from_scratch.course.checks import four_bits as checks
from peft_from_scratch.nf4.codes import book
from peft_from_scratch.nf4.double import double_quantize

LESSON = lesson(build.FOLDER / "07_four_bits.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "7.1": {
        "all zeros": "all entries are zero",
        "no abs": "not the largest absolute value",
        "the signed extreme": "take its absolute value",
        "the whole tensor's absmax": "one absmax for the whole tensor",
        "blocks down the columns": "run down the columns",
        "a block for each row": "one for each row",
        "absmax of the ratios": "absmax of the ratios, which is 1",
        "multiplies": "multiplied by the absmax; divide",
        "the wrong way round": "the wrong way round",
        "divided twice": "divided by the absmax twice",
        "divided by the whole's absmax": "the absmax of the whole tensor",
        "zero by zero": "0 / 0",
        "the last short block dropped": "the last, short block is missing",
        "the mean": "the mean of the absolute values",
        "the range": "the distance from zero counts",
        "an absmax for each value": "one for each block is asked for",
        "inverses": "its inverse",
        "ratios rounded": "rounded; that comes later",
        "ratios alone": "`return ratios, absmax`",
        "w is divided in place": "w itself was changed",
    },
    "7.2": {
        "all zeros": "all entries are zero",
        "low half first": "belongs into the high half",
        "unpacked low half first": "the low half came first",
        "added, not shifted": "added without shifting",
        "times 15": "times 15",
        "shifted by 3": "shifted by 3 bits",
        "the first half beside the second": "neighbours share a byte",
        "the second is lost": "the second is lost",
        "the odd one dropped": "of an odd number is lost",
        "the odd one in the low half": "belongs into the high half too",
        "the odd one twice": "stands there twice",
        "one code a byte": "nothing is packed",
        "bytes of eight bytes": "a byte for two codes",
        "codes changed in place": "codes itself was changed",
        "the sign of a byte": "the highest bit is no sign",
        "no mask": "& 15",
        "divided, with a point": "// or >>",
        "not woven": "weave them",
        "n forgotten": "cut to n",
    },
    "7.3": {
        "all zeros": "all entries are zero",
        "floor": "the value below the ratio",
        "ceiling": "the value above the ratio",
        "one too many": "one too many",
        "one too few": "one too few",
        "ties up": "on a midpoint, the lower",
        "counts those above": "counted from the other end",
        "the values": "values[code] was returned",
        "codes as fractions": "a code is a whole number",
        "even steps": "these values are not even",
        "the furthest": "the furthest value",
        "the sign ignored": "the sign counts",
        "flat": "in another shape",
    },
    "7.4": {
        "all zeros": "no offset",
        "ceiling": "the value above the ratio",
        "the median for the mean": "the median",
        "an offset for each block": "one for the whole tensor",
        "padded before the offset is off": "before the offset was taken off",
        "one unit for the tensor": "one unit for the whole tensor",
        "a single unit": "a single unit",
        "no second absmax": "no unit",
        "units without abs": "not the largest absolute value",
        "the last short block dropped": "the last, short block is missing",
        "not divided by the unit": "not divided by the unit",
        "floor": "the value below the ratio",
        "codes in 64 bits": "eight bits for each constant",
        "codes alone": "`return codes, units, offset`",
        "the constants changed in place": "absmax itself was changed",
        "the offset forgotten on the way back": "the offset is forgotten",
        "the offset twice": "added twice",
        "the second absmax forgotten": "the unit is forgotten",
        "the codes, not their values": "the code itself was used",
        "the first unit for all": "the first unit for all",
    },
    "7.5": {
        "all zeros": "expected",
        "the constants forgotten": "the constants are forgotten",
        "the second level forgotten": "the second level is forgotten",
        "the units forgotten": "the units are forgotten",
        "the offset forgotten": "the offset of each tensor is forgotten",
        "one offset for all": "each tensor has one",
        "never double": "though they are quantized",
        "doubled constants in 32 bits": "and their units too",
        "single constants in 8 bits": "though they are not quantized",
        "blocks that end with each row": "they run on into the next",
        "a byte for each code": "two share one",
        "embeddings quantized": "it stays in sixteen",
        "the rest in 32 bits": "the rest in 32 bits",
        "the rest forgotten": "the rest is forgotten",
        "bits": "8 of them are a byte",
        "all tensors as one": "each tensor has one",
    },
}
NEAR = "(ratios[..., None] - values).abs().argmin(-1)"
RIGHT = {  # exercise: {name: another right answer}
    "7.1": {
        "block by block": (
            "def my_blocks(w, block):\n"
            "    parts = w.flatten().split(block)\n"
            "    absmax = torch.stack([part.abs().max() for part in parts])\n"
            "    scaled = [p / m if m else p for p, m in zip(parts, absmax)]\n"
            "    return torch.cat(scaled).reshape(w.shape), absmax\n"
        ),
        "times the inverse": (
            "def my_blocks(w, block):\n"
            "    rows = F.pad(w.reshape(-1), (0, -w.numel() % block)).view(-1, block)\n"
            "    absmax = torch.maximum(rows.amax(1), -rows.amin(1))\n"
            "    unit = absmax.repeat_interleave(block)[: w.numel()].view(w.shape)\n"
            "    return w * torch.where(unit > 0, 1 / unit, 0 * unit), absmax\n"
        ),
    },
    "7.2": {
        "with whole numbers": (
            "def my_pack(codes):\n"
            "    pairs = F.pad(codes.long(), (0, len(codes) % 2)).view(-1, 2)\n"
            "    return (pairs * torch.tensor([16, 1])).sum(1).to(torch.uint8)\n\n\n"
            "def my_unpack(packed, n):\n"
            "    codes = torch.empty(2 * len(packed), dtype=torch.long)\n"
            "    codes[::2], codes[1::2] = packed // 16, packed % 16\n"
            "    return codes[:n]\n"
        ),
        "one by one": (
            "def my_pack(codes):\n"
            "    codes = codes.tolist() + [0] * (len(codes) % 2)\n"
            "    pairs = zip(codes[::2], codes[1::2])\n"
            "    return torch.tensor([16 * a + b for a, b in pairs]).byte()\n\n\n"
            "def my_unpack(packed, n):\n"
            "    halves = [half for b in packed.tolist() for half in divmod(b, 16)]\n"
            "    return torch.tensor(halves[:n], dtype=torch.uint8)\n"
        ),
    },
    "7.3": {
        "every distance": f"def my_nearest(ratios, values):\n    return {NEAR}\n",
        "a count of midpoints": (
            "def my_nearest(ratios, values):\n"
            "    midpoints = values[:-1] + values.diff() / 2\n"
            "    above = ratios[..., None] > midpoints\n"
            "    return above.sum(-1).to(torch.uint8)\n"
        ),
    },
    "7.4": {
        "block by block": (
            "def my_double(absmax, values, block=256):\n"
            "    offset = sum(absmax) / len(absmax)\n"
            "    codes, units = [], []\n"
            "    for part in (absmax - offset).split(block):\n"
            "        units.append(part.abs().max())\n"
            "        ratios = part / units[-1].clamp(min=1e-30)\n"
            f"        codes.append({NEAR})\n"
            "    return torch.cat(codes).byte(), torch.stack(units), offset\n\n\n"
            "def my_restored(codes, units, offset, values, block=256):\n"
            "    parts = zip(codes.split(block), units)\n"
            "    return torch.cat([values[c.int()] * u for c, u in parts]) + offset\n"
        ),
    },
    "7.5": {
        "of real tensors": (
            "def my_bytes(packed, plain, block=64, double=True):\n"
            "    ones = map(torch.ones, packed)\n"
            "    held = [pfs.nf4.quantize(w, block, double) for w in ones]\n"
            "    rest = [torch.empty(shape).half().nbytes for shape in plain]\n"
            "    return sum(q.nbytes for q in held) + sum(rest)\n"
        ),
        "with ceil": (
            "def my_bytes(packed, plain, block=64, double=True):\n"
            "    up, total = math.ceil, 0\n"
            "    for shape in packed:\n"
            "        n = math.prod(shape)\n"
            "        units = up(up(n / block) / 256) + 1\n"
            "        total += up(n / 2) + up(n / block) * (1 if double else 4)\n"
            "        total += 4 * units * double\n"
            "    return total + sum(2 * math.prod(shape) for shape in plain)\n"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


def test_what_checks_compare_with_is_what_the_library_does():
    """Codes, bytes and constants that a check works out for itself."""
    for name in ("nf4", "int4"):
        values = torch.tensor(nf4.CODES[name])
        ratios = 2 * torch.rand(1000) - 1
        codes = checks.nearest(ratios, values)
        assert torch.equal(codes, nf4.blocks.nearest(ratios, name).long())
    codes = torch.randint(16, (500,)).to(torch.uint8)
    assert torch.equal(checks._packed(codes), nf4.spec.pack(codes))
    absmax = 1 + torch.rand(700)
    for name in ("fp8", "int8"):
        theirs = double_quantize(absmax, name)
        offset, units, ratios = checks._doubled(absmax, 256)
        assert torch.equal(offset, theirs.offset) and torch.equal(
            units, theirs.nested_absmax
        )
        values = book(name, absmax.device).values
        off = checks.nearest(ratios, values) - theirs.codes.long()
        assert off.abs().max() <= 1 and (off != 0).float().mean() < 0.01


def test_no_ratio_but_those_that_are_meant_to_be_lies_on_a_midpoint():
    exact = 0
    for name, values, ratios in checks.books():
        if len(values) > 1:
            gap = (ratios[..., None] - checks._midpoints(values)).abs().min()
            assert gap > 1e-5 * (values[-1] - values[0]) or "midpoints" in name
            exact += "midpoints" in name and gap == 0
    assert exact == 1


@pytest.mark.parametrize("block", [7, 64])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("packed, plain", checks.MODELS.values(), ids=checks.MODELS)
def test_bytes_are_counted_as_tensors_have_them(packed, plain, block, double):
    quantized = (nf4.quantize(torch.ones(s), block, double).nbytes for s in packed)
    rest = (torch.empty(shape, dtype=torch.bfloat16).nbytes for shape in plain)
    expected = sum(quantized) + sum(rest)
    assert checks.counted(packed, plain, block, double) == expected
