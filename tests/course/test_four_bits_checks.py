"""Notebook 07's checks: what the common mistakes are told, and what else is right."""

import build
import pytest
import torch
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch import nf4
from peft_from_scratch.course.checks import four_bits as checks
from peft_from_scratch.nf4.codes import book, normal_float
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
        "n shares alone": "the last share of n shares alone",
        "n - 1 shares alone": "the last share of n - 1 shares alone",
        "the start of the last share": "not in its middle",
        "n and n + 1 shares": "n and n - 1 are asked for",
        "the constant of sixteen": "it depends on n",
        "not divided": "not divided by the last quantile",
        "more below zero": "more values below zero",
        "no zero in common": "no zero in common",
        "zero twice": "the zero is there twice",
        "one value too few": "one is missing",
        "one value too many": "one too many",
        "one run from end to end": "zero is not among the values",
        "the middles of equal shares": "the middles of n equal shares",
        "evenly spaced values": "the shares are evenly spaced",
        "falling": "the values rise from -1 to 1",
        "the halves not turned": "one half is not turned round",
        "the positive half alone": "the positive half alone",
        "the shares": "not their quantiles",
        "the last share is one": "the last share stays below 1",
        "sixteen values": "sixteen values, whatever n is",
        "the table": "quantile was never called",
        "all shares at once": "call it for each share",
        "always the normal": "whatever is given",
        "a list": "a tensor is needed",
    },
    "7.3": {
        "all zeros": "no offset",
        "ceiling": "the value above the ratio",
        "the median for the mean": "the median",
        "an offset for each block": "one for the whole tensor",
        "padded before the offset is off": "before the offset was taken off",
        "one scale for the tensor": "one scale for the whole tensor",
        "a single scale": "a single scale",
        "no second absmax": "no scale",
        "scales without abs": "not the largest absolute value",
        "the last short block dropped": "the last, short block is missing",
        "not divided by the scale": "not divided by the scale",
        "floor": "the value below the ratio",
        "codes in 64 bits": "eight bits for each constant",
        "codes alone": "`return codes, scales, offset`",
        "the constants changed in place": "absmax itself was changed",
        "the offset forgotten on the way back": "the offset is forgotten",
        "the offset twice": "added twice",
        "the second absmax forgotten": "the scale is forgotten",
        "the codes, not their values": "the code itself was used",
        "the first scale for all": "the first scale for all",
    },
    "7.4": {
        "two draws": "draw w once",
        "all ones": "all weights are equal",
        "positive weights": "no weight is negative",
        "equal blocks": "all blocks have the same absmax",
        "weights of plus and minus one": "all blocks have the same absmax",
        "a rule about the last side": "theirs was never called",
        "an error above fifteen percent, without ours": "ours was never called",
        "a flat tensor beside it": "ours was never called",
        "flat weights": "has only seen flat weights",
        "the mean error": "an average, a norm or a wide limit",
        "norms": "an average, a norm or a wide limit",
        "sorted weights": "another order",
        "the largest error, NaN forgotten": "NaN > limit is False",
        "bit by bit": "is rounding, no fault",
        "against the weights": "is rounding, no fault",
        "the sound ones": "return the bad ones",
        "the first alone": "go on to the last",
        "true or false": "return the shapes themselves",
        "how many": "return a list of shapes",
        "turned round": "in another order",
        "the shapes are used up": "shapes itself was changed",
        "nothing at all": "`return` is missing",
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
        "both halves in a loop": (
            "def my_values(n, quantile):\n"
            "    last = 1 - (1 / (2 * n) + 1 / (2 * n - 2)) / 2\n"
            "    row = [0.0]\n"
            "    for sign, many in ((-1, n // 2 - 1), (1, n // 2)):\n"
            "        for i in range(1, many + 1):\n"
            "            p = 0.5 + (last - 0.5) * i / many\n"
            "            row.append(sign * quantile(p) / quantile(last))\n"
            "    return torch.tensor(sorted(row))\n"
        ),
    },
    "7.3": {
        "block by block": (
            "def my_double(absmax, values, block=256):\n"
            "    offset = sum(absmax) / len(absmax)\n"
            "    codes, scales = [], []\n"
            "    for part in (absmax - offset).split(block):\n"
            "        scales.append(part.abs().max())\n"
            "        ratios = part / scales[-1].clamp(min=1e-30)\n"
            f"        codes.append({NEAR})\n"
            "    return torch.cat(codes).byte(), torch.stack(scales), offset\n\n\n"
            "def my_restored(codes, scales, offset, values, block=256):\n"
            "    parts = zip(codes.split(block), scales)\n"
            "    return torch.cat([values[c.int()] * u for c, u in parts]) + offset\n"
        ),
    },
    "7.4": {
        "no larger than the limit": (
            "def my_bad_shapes(theirs, ours, shapes):\n"
            "    bad = []\n"
            "    for shape in shapes:\n"
            "        w = torch.randn(shape) * torch.rand(shape)\n"
            "        off = (theirs(w) - ours(w)).abs().max().item()\n"
            "        if not off <= 1e-5 * float(w.abs().max()):\n"
            "            bad.append(shape)\n"
            "    return bad\n"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


def test_what_checks_compare_with_is_what_the_library_does():
    """Codes, values and constants that a check works out for itself."""
    for name in ("nf4", "int4"):
        values = torch.tensor(nf4.CODES[name])
        ratios = 2 * torch.rand(1000) - 1
        codes = checks.nearest(ratios, values)
        assert torch.equal(codes, nf4.blocks.nearest(ratios, name).long())
    derived = checks.normal_values(16, checks.QUANTILES["normal"])
    assert torch.allclose(derived, normal_float(), rtol=0, atol=1e-15)
    absmax = 1 + torch.rand(700)
    for name in ("fp8", "int8"):
        theirs = double_quantize(absmax, name)
        values = book(name, absmax.device).values
        codes, scales, offset = checks.doubled(absmax, values)
        assert torch.equal(offset, theirs.offset)
        assert torch.equal(scales, theirs.nested_absmax)
        off = codes.long() - theirs.codes.long()
        assert off.abs().max() <= 1 and (off != 0).float().mean() < 0.01
        back = checks.undoubled(theirs.codes, scales, offset, values)
        assert torch.allclose(back, theirs.dequantize())


def test_what_stands_in_for_an_answer_is_right():
    checks.absmax_blocks(checks.ratios_and_absmax)
    checks.derived_values(checks.normal_values)
    checks.double_quantization(checks.doubled, checks.undoubled)
    checks.finds_bad_shapes(checks.bad_shapes)


@pytest.mark.parametrize("name", checks.FAULTS)
def test_a_fault_shows_on_the_shapes_that_it_hits_and_on_no_other(name):
    fault = checks.FAULTS[name]
    theirs = checks._Watched(fault, 0.0)
    expected = [shape for shape in checks.SHAPES if fault.hits(shape)]
    assert checks.bad_shapes(theirs, checks.exact, checks.SHAPES) == expected
    assert len(theirs.seen) == len(checks.SHAPES)


def test_the_fault_of_the_lesson_is_among_those_of_the_check():
    """bitsandbytes on a CPU, where it has the fault: the same shapes, or none."""
    bnb = pytest.importorskip("bitsandbytes.functional")

    def theirs(w):
        code, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
        return bnb.dequantize_4bit(code, state)

    shapes = [(128, 128), (96, 128), (128, 96), (12288,), (64, 32), (32, 160)]
    hits = checks.FAULTS["constants are looked up row by row"].hits
    bad = checks.bad_shapes(theirs, checks.exact, shapes)
    assert bad in ([], [shape for shape in shapes if hits(shape)])
