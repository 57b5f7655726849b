"""Wrong answers to the exercises of notebook 07; each must be refused by its check."""

from attacks import Attack, first, remembered

from peft_from_scratch.course.checks import four_bits as checks  # noqa: F401

ROWS = "F.pad(w.flatten(), (0, -w.numel() % block)).view(-1, block)"
BACK = "ratios.flatten()[: w.numel()].view(w.shape), absmax"


def blocks(
    rows=ROWS,
    absmax="rows.abs().amax(1)",
    ratios="(rows / absmax[:, None]).nan_to_num(0.0)",
    back=BACK,
):
    return f"""\
def my_blocks(w, block):
    rows = {rows}
    absmax = {absmax}
    ratios = {ratios}
    return {back}
"""


def nibbles(
    pad="F.pad(codes, (0, len(codes) % 2))",
    pack="(codes[::2] << 4) | codes[1::2]",
    unpack="torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]",
):
    return f"""\
def my_pack(codes):
    codes = {pad}
    return {pack}


def my_unpack(packed, n):
    return {unpack}
"""


MIDDLE = "(values[1:] + values[:-1]) / 2"


def nearest(codes):
    return f"def my_nearest(ratios, values):\n    return {codes}\n"


def double(
    offset="absmax.mean()",
    rows="F.pad(absmax - offset, (0, -len(absmax) % block)).view(-1, block)",
    units="rows.abs().amax(1)",
    ratios="(rows / units[:, None]).nan_to_num(0.0).flatten()[: len(absmax)]",
    codes=f"torch.bucketize(ratios, {MIDDLE}).to(torch.uint8)",
    back="codes, units, offset",
    unit="units.repeat_interleave(block)[: len(codes)]",
    restored="values[codes.long()] * unit + offset",
):
    return f"""\
def my_double(absmax, values, block=256):
    offset = {offset}
    rows = {rows}
    units = {units}
    ratios = {ratios}
    codes = {codes}
    return {back}


def my_restored(codes, units, offset, values, block=256):
    unit = {unit}
    return {restored}
"""


def count(
    rest="2 * sum(math.prod(shape) for shape in plain)",
    n="math.prod(shape)",
    blocks="-(-n // block)",
    codes="-(-n // 2)",
    doubled="blocks + 4 * -(-blocks // 256) + 4",
    single="4 * blocks",
    back="total",
):
    return f"""\
def my_bytes(packed, plain, block=64, double=True):
    total = {rest}
    for shape in packed:
        n = {n}
        blocks = {blocks}
        total += {codes}
        total += {doubled} if double else {single}
    return {back}
"""


MUTANTS = {
    "7.1": {
        "blocks begin anew with each row": """\
def my_blocks(w, block):
    rows, n = w.reshape(-1, w.shape[-1]), w.shape[-1]
    rows = F.pad(rows, (0, -n % block)).view(len(rows), -1, block)
    absmax = rows.abs().amax(-1)
    ratios = (rows / absmax[..., None]).nan_to_num(0.0).flatten(1)
    return ratios[:, :n].reshape(w.shape), absmax.flatten()
""",
        "a block too many": blocks(ROWS.replace("-w.numel()", "block - w.numel()")),
        "one where all is zero": blocks(
            absmax="torch.where(rows.any(1), rows.abs().amax(1), 1.0)"
        ),
        "all zeros": blocks(back="0 * w, 0 * absmax"),
        "no abs": blocks(absmax="rows.amax(1)"),
        "the signed extreme": blocks(
            absmax="rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]"
        ),
        "the whole tensor's absmax": blocks(
            absmax="w.abs().max().expand(len(rows)).clone()"
        ),
        "a single absmax": blocks(
            absmax="w.abs().max()", ratios="(rows / absmax).nan_to_num(0.0)"
        ),
        "blocks down the columns": blocks(
            rows="F.pad(w.movedim(0, -1).flatten(), (0, -w.numel() % block))"
            ".view(-1, block)"
        ),
        "a block for each row": blocks(rows="w.reshape(len(w), -1)"),
        "as many blocks as a block has values": blocks(
            rows="F.pad(w.flatten(), (0, -w.numel() % block)).view(block, -1).T"
        ),
        "blocks counted across the rows": blocks(
            rows="F.pad(w.flatten(), (0, -w.numel() % block)).view(block, -1)"
        ),
        "absmax of the ratios": blocks(
            ratios="(rows / absmax[:, None]).nan_to_num(0.0)"
            ";    absmax = ratios.abs().amax(1)"
        ),
        "absmax of the rounded": blocks(absmax="rows.round().abs().amax(1)"),
        "multiplies": blocks(ratios="rows * absmax[:, None]"),
        "the wrong way round": blocks(
            ratios="(absmax[:, None] / rows).nan_to_num(0.0)"
        ),
        "not divided": blocks(ratios="rows"),
        "divided twice": blocks(
            ratios="(rows / absmax[:, None] / absmax[:, None]).nan_to_num(0.0)"
        ),
        "divided by the whole's absmax": blocks(ratios="rows / w.abs().max()"),
        "divided by the next block's": blocks(
            ratios="(rows / absmax.roll(1)[:, None]).nan_to_num(0.0)"
        ),
        "ratios without sign": blocks(
            ratios="(rows / absmax[:, None]).nan_to_num(0.0).abs()"
        ),
        "ratios rounded": blocks(
            ratios="(rows / absmax[:, None]).nan_to_num(0.0).round()"
        ),
        "zero by zero": blocks(ratios="rows / absmax[:, None]"),
        "zeros become ones": blocks(ratios="(rows / absmax[:, None]).nan_to_num(1.0)"),
        "a thousandth is added": blocks(ratios="rows / (absmax[:, None] + 1e-3)"),
        "the last short block dropped": blocks(
            rows="w.flatten()[: w.numel() // block * block].view(-1, block)",
            back="F.pad(ratios.flatten(), (0, w.numel() - ratios.numel()))"
            ".view(w.shape), absmax",
        ),
        "the last short block joined to the one before": blocks(
            absmax="rows.abs().amax(1)"
            "\n    if w.numel() % block and len(rows) > 1:"
            "\n        absmax[-2:] = absmax[-2:].max()"
        ),
        "padded with ones": blocks(
            rows="F.pad(w.flatten(), (0, -w.numel() % block), value=1.0)"
            ".view(-1, block)"
        ),
        "the mean": blocks(absmax="rows.abs().mean(1)"),
        "the standard deviation": blocks(absmax="rows.square().mean(1).sqrt()"),
        "the range": blocks(absmax="rows.amax(1) - rows.amin(1)"),
        "half the range": blocks(absmax="(rows.amax(1) - rows.amin(1)) / 2"),
        "an absmax for each value": blocks(
            back="ratios.flatten()[: w.numel()].view(w.shape),"
            " absmax.repeat_interleave(block)[: w.numel()]"
        ),
        "absmax as a column": blocks(
            back="ratios.flatten()[: w.numel()].view(w.shape), absmax[:, None]"
        ),
        "inverses": blocks(
            back="ratios.flatten()[: w.numel()].view(w.shape), 1 / absmax"
        ),
        "the ratios lie flat": blocks(back="ratios.flatten()[: w.numel()], absmax"),
        "the ratios in blocks": blocks(back="ratios, absmax"),
        "the two swapped": blocks(
            back="absmax, ratios.flatten()[: w.numel()].view(w.shape)"
        ),
        "ratios alone": blocks(back="ratios.flatten()[: w.numel()].view(w.shape)"),
        "in sixteen bits": blocks(absmax="rows.abs().amax(1).half().float()"),
        "w is divided in place": (
            "def my_blocks(w, block):\n"
            f"    rows = {ROWS}\n"
            "    absmax = rows.abs().amax(1)\n"
            "    unit = absmax.repeat_interleave(block)[: w.numel()].view(w.shape)\n"
            "    return w.div_(unit).nan_to_num_(0.0), absmax\n"
        ),
        "always blocks of four": "def my_blocks(w, block):\n    block = 4\n"
        + blocks().split("\n", 1)[1],
    },
    "7.2": {
        "no brackets around the shift": nibbles(pack="codes[::2] << 4 + codes[1::2]"),
        "divided by 15": nibbles(
            unpack="torch.stack([packed // 15, packed & 15], 1).flatten()[:n]"
        ),
        "another order, both ways": nibbles(
            pack="(codes[::2] << 4 | codes[1::2]) ^ 255",
            unpack="torch.stack([packed >> 4, packed & 15], 1).flatten()[:n] ^ 15",
        ),
        "all zeros": nibbles(pack="0 * codes[::2]", unpack="torch.zeros(n).byte()"),
        "low half first": nibbles(
            pack="(codes[1::2] << 4) | codes[::2]",
            unpack="torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:n]",
        ),
        "packed low half first": nibbles(pack="(codes[1::2] << 4) | codes[::2]"),
        "unpacked low half first": nibbles(
            unpack="torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:n]"
        ),
        "added, not shifted": nibbles(pack="codes[::2] + codes[1::2]"),
        "joined, not shifted": nibbles(pack="codes[::2] | codes[1::2]"),
        "times 15": nibbles(pack="codes[::2] * 15 + codes[1::2]"),
        "shifted by 3": nibbles(pack="(codes[::2] << 3) | codes[1::2]"),
        "shifted by 5": nibbles(pack="(codes[::2] << 5) | codes[1::2]"),
        "and for or": nibbles(pack="(codes[::2] << 4) & codes[1::2]"),
        "three bits of each": nibbles(
            pack="((codes[::2] & 7) << 4) | (codes[1::2] & 7)"
        ),
        "the first half beside the second": nibbles(
            pack="(codes[: len(codes) // 2] << 4) | codes[len(codes) // 2 :]"
        ),
        "the two halves, both ways": nibbles(
            pack="(codes[: len(codes) // 2] << 4) | codes[len(codes) // 2 :]",
            unpack="torch.cat([packed >> 4, packed & 15])[:n]",
        ),
        "the second is lost": nibbles(pack="codes[::2] << 4"),
        "the first is lost": nibbles(pack="codes[1::2]"),
        "the odd one dropped": nibbles(pad="codes[: len(codes) // 2 * 2]"),
        "the odd one in the low half": nibbles(
            pad="torch.cat([codes[:-1], 0 * codes[:1], codes[-1:]])"
            " if len(codes) % 2 else codes"
        ),
        "the odd one twice": nibbles(
            pad="torch.cat([codes, codes[-1:]]) if len(codes) % 2 else codes"
        ),
        "the odd one beside fifteen": nibbles(
            pad="F.pad(codes, (0, len(codes) % 2), value=15)"
        ),
        "always a pad": nibbles(pad="F.pad(codes, (0, 2 - len(codes) % 2))"),
        "one code a byte": nibbles(pack="codes", unpack="packed[:n]"),
        "bytes of eight bytes": nibbles(pad="F.pad(codes, (0, len(codes) % 2)).long()"),
        "bytes with a sign": nibbles(pack="((codes[::2] << 4) | codes[1::2]).char()"),
        "a list": nibbles(pack="((codes[::2] << 4) | codes[1::2]).tolist()"),
        "codes changed in place": nibbles(
            pack="codes[::2].mul_(16) + codes[1::2]",
            pad="codes if len(codes) % 2 == 0 else F.pad(codes, (0, 1))",
        ),
        "the sign of a byte": nibbles(
            unpack="torch.stack([packed.char() >> 4, packed.char() & 15], 1)"
            ".flatten()[:n]"
        ),
        "no mask": nibbles(
            unpack="torch.stack([packed >> 4, packed], dim=1).flatten()[:n]"
        ),
        "a mask of 16": nibbles(
            unpack="torch.stack([packed >> 4, packed & 16], dim=1).flatten()[:n]"
        ),
        "the rest by 15": nibbles(
            unpack="torch.stack([packed // 15, packed % 15], dim=1).flatten()[:n]"
        ),
        "divided, with a point": nibbles(
            unpack="torch.stack([packed / 16, packed % 16], dim=1).flatten()[:n]"
        ),
        "not woven": nibbles(unpack="torch.cat([packed >> 4, packed & 15])[:n]"),
        "stacked the other way": nibbles(
            unpack="torch.stack([packed >> 4, packed & 15]).flatten()[:n]"
        ),
        "n forgotten": nibbles(
            unpack="torch.stack([packed >> 4, packed & 15], dim=1).flatten()"
        ),
        "n bytes": nibbles(
            unpack="torch.stack([packed >> 4, packed & 15], dim=1)[:n].flatten()"
        ),
        "the last code always dropped": nibbles(
            unpack="torch.stack([packed >> 4, packed & 15], dim=1)"
            ".flatten()[: n // 2 * 2]"
        ),
        "high halves alone": nibbles(unpack="(packed >> 4)[:n]"),
        "in pairs": nibbles(unpack="torch.stack([packed >> 4, packed & 15], dim=1)"),
    },
    "7.3": {
        "even steps between the ends": nearest(
            "torch.bucketize(ratios, torch.linspace(values[0].item(),"
            " values[-1].item(), 2 * len(values) - 1)[1::2].contiguous())"
        ),
        "in the order of size": nearest(
            f"torch.bucketize(ratios.flatten().sort()[0].view(ratios.shape), {MIDDLE})"
        ),
        "the last of equal ones": nearest(
            "len(values) - 1 - (ratios[..., None] - values).abs().flip(-1).argmin(-1)"
        ),
        "all zeros": nearest("torch.zeros_like(ratios, dtype=torch.long)"),
        "floor": nearest("torch.bucketize(ratios, values, right=True) - 1"),
        "ceiling": nearest("torch.bucketize(ratios, values)"),
        "values for midpoints, cut": nearest("torch.bucketize(ratios, values[1:])"),
        "values for midpoints, cut below": nearest(
            "torch.bucketize(ratios, values[:-1])"
        ),
        "one too many": nearest(f"torch.bucketize(ratios, {MIDDLE}) + 1"),
        "one too few": nearest(f"torch.bucketize(ratios, {MIDDLE}) - 1"),
        "one too few, never below zero": nearest(
            f"(torch.bucketize(ratios, {MIDDLE}) - 1).clamp(min=0)"
        ),
        "ties up": nearest(f"torch.bucketize(ratios, {MIDDLE}, right=True)"),
        "ties to the even code": nearest(
            f"torch.where(torch.bucketize(ratios, {MIDDLE}) % 2 == 1,"
            f" torch.bucketize(ratios, {MIDDLE}, right=True),"
            f" torch.bucketize(ratios, {MIDDLE}))"
        ),
        "ties toward zero": nearest(
            f"torch.where(ratios < 0, torch.bucketize(ratios, {MIDDLE}, right=True),"
            f" torch.bucketize(ratios, {MIDDLE}))"
        ),
        "midpoints not halved": nearest(
            "torch.bucketize(ratios, values[1:] + values[:-1])"
        ),
        "differences for midpoints": nearest(
            "torch.bucketize(ratios, (values[1:] - values[:-1]) / 2)"
        ),
        "midpoints of every second value": nearest(
            "torch.bucketize(ratios, (values[2:] + values[:-2]) / 2)"
        ),
        "a third of the way": nearest(
            "torch.bucketize(ratios, values[:-1] + (values[1:] - values[:-1]) / 3)"
        ),
        "the last midpoint missing": nearest(
            "torch.bucketize(ratios, (values[1:-1] + values[:-2]) / 2)"
        ),
        "counts those above": nearest(
            f"len(values) - 1 - torch.bucketize(ratios, {MIDDLE})"
        ),
        "the values": nearest(f"values[torch.bucketize(ratios, {MIDDLE})]"),
        "codes as fractions": nearest(f"torch.bucketize(ratios, {MIDDLE}).float()"),
        "even steps": nearest("((ratios + 1) / 2 * (len(values) - 1)).round().long()"),
        "the furthest": nearest("(ratios[..., None] - values).abs().argmax(-1)"),
        "no absolute value": nearest("(ratios[..., None] - values).argmin(-1)"),
        "the sign ignored": nearest(
            "(ratios.abs()[..., None] - values.abs()).abs().argmin(-1)"
        ),
        "the nearest in ratio": nearest(
            "(ratios[..., None] / (values + 1e-9) - 1).abs().argmin(-1)"
        ),
        "for each value, the nearest ratio": nearest(
            "(values[:, None] - ratios.flatten()).abs().argmin(-1)"
        ),
        "flat": nearest(f"torch.bucketize(ratios, {MIDDLE}).flatten()"),
        "the first row alone": nearest(
            f"torch.bucketize(ratios[:1], {MIDDLE}).expand(ratios.shape)"
        ),
        "always sixteen values": nearest(
            f"torch.bucketize(ratios, {MIDDLE}).clamp(max=15) % 16 if len(values) == 16"
            " else torch.bucketize(ratios, values)"
        ),
        "always NF4": nearest(
            "torch.bucketize(ratios, (lambda v: (v[1:] + v[:-1]) / 2)"
            "(torch.tensor(pfs.nf4.CODES['nf4'])))"
        ),
        "a list": nearest(f"torch.bucketize(ratios, {MIDDLE}).tolist()"),
        "rounded first": nearest(f"torch.bucketize(ratios.round(), {MIDDLE})"),
        "squeezed between codes and values": nearest(
            f"torch.bucketize(ratios, {MIDDLE}), values"
        ),
    },
    "7.4": {
        "the middle of the ends for the mean": double(
            "(absmax.max() + absmax.min()) / 2"
        ),
        "half the range for the unit": double(
            units="(rows.amax(1) - rows.amin(1)) / 2"
        ),
        "inverse units, both ways": double(
            back="codes, 1 / units, offset",
            restored="values[codes.long()] / unit + offset",
        ),
        "codes from the other end, both ways": double(
            back="(len(values) - 1 - codes).to(torch.uint8), units, offset",
            restored="values[len(values) - 1 - codes.long()] * unit + offset",
        ),
        "the offset's sign, both ways": double(
            back="codes, units, -offset",
            restored="values[codes.long()] * unit - offset",
        ),
        "a unit too many": double(back="codes, F.pad(units, (0, 1)), offset"),
        "a mask of bytes": double(restored="values[codes] * unit + offset"),
        "codes as even steps": double(restored="(codes / 127.5 - 1) * unit + offset"),
        "all zeros": double(
            back="0 * codes, 0 * units, 0 * offset", restored="0 * unit"
        ),
        "no offset": double(
            offset="absmax.new_zeros(())", restored="values[codes.long()] * unit"
        ),
        "the largest for the mean": double(offset="absmax.max()"),
        "the median for the mean": double(offset="absmax.median()"),
        "the smallest for the mean": double(offset="absmax.min()"),
        "an offset for each block": double(
            offset="torch.stack([part.mean() for part in absmax.split(block)])",
            rows="F.pad(absmax - offset.repeat_interleave(block)[: len(absmax)],"
            " (0, -len(absmax) % block)).view(-1, block)",
        ),
        "the mean with the padding": double(
            offset="F.pad(absmax, (0, -len(absmax) % block)).mean()"
        ),
        "padded before the offset is off": double(
            rows="F.pad(absmax, (0, -len(absmax) % block)).view(-1, block) - offset"
        ),
        "the offset not taken off": double(
            rows="F.pad(absmax, (0, -len(absmax) % block)).view(-1, block)"
        ),
        "the offset added": double(
            rows="F.pad(absmax + offset, (0, -len(absmax) % block)).view(-1, block)"
        ),
        "one unit for the tensor": double(
            units="rows.abs().max().expand(len(rows)).clone()"
        ),
        "a single unit": double(
            units="rows.abs().max()",
            ratios="(rows / units).nan_to_num(0.0).flatten()[: len(absmax)]",
            unit="units",
        ),
        "no second absmax": double(units="torch.ones(len(rows))"),
        "units without abs": double(units="rows.amax(1)"),
        "units of the constants": double(
            units="torch.stack([part.max() for part in absmax.split(block)])"
        ),
        "the mean as a unit": double(units="rows.abs().mean(1)"),
        "the last short block dropped": double(
            rows="(absmax - offset)[: len(absmax) // block * block].view(-1, block)",
            ratios="F.pad((rows / units[:, None]).flatten(),"
            " (0, len(absmax) - rows.numel()))",
        ),
        "always blocks of 256": double(
            rows="F.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)"
        ),
        "not divided by the unit": double(ratios="rows.flatten()[: len(absmax)]"),
        "multiplied by the unit": double(
            ratios="(rows * units[:, None]).flatten()[: len(absmax)]"
        ),
        "the wrong unit": double(
            ratios="(rows / units.flip(0)[:, None]).nan_to_num(0.0).flatten()"
            "[: len(absmax)]"
        ),
        "the padding coded too": double(
            ratios="(rows / units[:, None]).nan_to_num(0.0).flatten()"
        ),
        "floor": double(
            codes="(torch.bucketize(ratios, values, right=True) - 1)"
            ".clamp(min=0).to(torch.uint8)"
        ),
        "ceiling": double(
            codes="torch.bucketize(ratios, values).clamp(max=255).to(torch.uint8)"
        ),
        "even steps": double(codes="((ratios + 1) * 127.5).round().to(torch.uint8)"),
        "four bits": double(
            codes=f"(torch.bucketize(ratios, {MIDDLE}) // 16 * 16).to(torch.uint8)"
        ),
        "codes in 64 bits": double(codes=f"torch.bucketize(ratios, {MIDDLE})"),
        "values for codes": double(codes=f"values[torch.bucketize(ratios, {MIDDLE})]"),
        "codes alone": double(back="codes"),
        "another order": double(back="codes, offset, units"),
        "the constants changed in place": double(
            rows="F.pad(absmax.sub_(offset), (0, -len(absmax) % block)).view(-1, block)"
        ),
        "the offset forgotten on the way back": double(
            restored="values[codes.long()] * unit"
        ),
        "the offset twice": double(
            restored="values[codes.long()] * unit + offset + offset"
        ),
        "the offset subtracted": double(
            restored="values[codes.long()] * unit - offset"
        ),
        "the offset multiplied too": double(
            restored="(values[codes.long()] + offset) * unit"
        ),
        "the second absmax forgotten": double(restored="values[codes.long()] + offset"),
        "the codes, not their values": double(restored="codes * unit + offset"),
        "the first unit for all": double(unit="units[0]"),
        "the largest unit for all": double(unit="units.max()"),
        "units in turn": double(
            unit="units.repeat(-(-len(codes) // len(units)))[: len(codes)]"
        ),
        "units of blocks of 256": double(
            unit="units.repeat_interleave(256)[: len(codes)]"
        ),
        "divided by the unit": double(restored="values[codes.long()] / unit + offset"),
        "not cut to n": double(
            unit="units.repeat_interleave(block)",
            restored="F.pad(values[codes.long()], (0, len(unit) - len(codes)))"
            " * unit + offset",
        ),
        "never below zero": double(
            restored="(values[codes.long()] * unit).clamp(min=0) + offset"
        ),
        "the units changed in place": double(
            unit="units.mul_(2).repeat_interleave(block)[: len(codes)] / 2"
        ),
    },
    "7.5": {
        "units of 16384 weights": count(doubled="blocks + 4 * -(-n // 16384) + 4"),
        "units of 256 weights": count(doubled="blocks + 4 * -(-n // 256) + 4"),
        "a unit more where all are whole": count(
            doubled="blocks + 4 * (blocks // 256 + 1) + 4"
        ),
        "a block more where all are whole": count(blocks="n // block + 1"),
        "no brackets around the condition": count(
            codes="0", doubled="-(-n // 2) + blocks + 4 * -(-blocks // 256) + 4"
        ),
        "codes rounded up together": count(
            codes="0", back="total - (-sum(map(math.prod, packed)) // 2)"
        ),
        "equal shapes once": count().replace("in packed", "in set(packed)"),
        "all zeros": count(back="0"),
        "the constants forgotten": count(doubled="0", single="0"),
        "the second level forgotten": count(doubled="blocks"),
        "the units forgotten": count(doubled="blocks + 4"),
        "the offset forgotten": count(doubled="blocks + 4 * -(-blocks // 256)"),
        "one offset for all": count(
            rest="4 * double + 2 * sum(math.prod(shape) for shape in plain)",
            doubled="blocks + 4 * -(-blocks // 256)",
        ),
        "a unit for each block": count(doubled="blocks + 4 * blocks + 4"),
        "units of 64": count(doubled="blocks + 4 * -(-blocks // 64) + 4"),
        "units of a block's size": count(
            doubled="blocks + 4 * -(-blocks // block) + 4"
        ),
        "never double": count(doubled="4 * blocks"),
        "always double": count(single="blocks + 4 * -(-blocks // 256) + 4"),
        "doubled constants in 32 bits": count(
            doubled="4 * blocks + 4 * -(-blocks // 256) + 4"
        ),
        "single constants in 8 bits": count(single="blocks"),
        "single constants in 16 bits": count(single="2 * blocks"),
        "single with an offset": count(single="4 * blocks + 4"),
        "units in 16 bits": count(doubled="blocks + 2 * -(-blocks // 256) + 4"),
        "blocks rounded down": count(blocks="n // block"),
        "units rounded down": count(doubled="blocks + 4 * (blocks // 256) + 4"),
        "bytes rounded down": count(codes="n // 2"),
        "blocks of 64 always": count(blocks="-(-n // 64)"),
        "blocks that end with each row": count(
            blocks="shape[0] * -(-shape[1] // block)"
        ),
        "a constant for each row": count(blocks="shape[0]"),
        "a constant for each column": count(blocks="shape[1]"),
        "a constant for the tensor": count(blocks="1"),
        "a byte for each code": count(codes="n"),
        "a bit for each code": count(codes="-(-n // 8)"),
        "two bytes for each code": count(codes="2 * n"),
        "codes forgotten": count(codes="0"),
        "embeddings quantized": count(
            rest="sum(-(-math.prod(shape) // 2) for shape in plain)"
        ),
        "the rest in 32 bits": count(
            rest="4 * sum(math.prod(shape) for shape in plain)"
        ),
        "the rest in 8 bits": count(rest="sum(math.prod(shape) for shape in plain)"),
        "the rest forgotten": count(rest="0"),
        "vectors forgotten": count(
            rest="2 * sum(math.prod(shape) for shape in plain if len(shape) > 1)"
        ),
        "sides added": count(n="sum(shape)"),
        "one side": count(n="shape[0]"),
        "bits": count(back="8 * total"),
        "megabytes": count(back="total / 1e6"),
        "the average": (
            "def my_bytes(packed, plain, block=64, double=True):\n"
            "    constants = 8 / block + 32 / (256 * block)\n"
            "    bits = 4 + (constants if double else 32 / block)\n"
            "    n = sum(math.prod(shape) for shape in packed)\n"
            "    rest = 2 * sum(math.prod(shape) for shape in plain)\n"
            "    return round(n * bits / 8) + rest\n"
        ),
        "4.127 bits for all": (
            "def my_bytes(packed, plain, block=64, double=True):\n"
            "    n = sum(math.prod(shape) for shape in packed)\n"
            "    rest = 2 * sum(math.prod(shape) for shape in plain)\n"
            "    return round(n * 4.127 / 8) + rest\n"
        ),
        "all tensors as one": (
            "def my_bytes(packed, plain, block=64, double=True):\n"
            "    packed = [(sum(math.prod(shape) for shape in packed),)]\n"
            + count().split("\n", 1)[1]
        ),
        "the shapes": count(back="packed"),
    },
}


# ---------------------------------------------------------------------------- Attacks


def lending(method=""):
    """As it is; but what is returned is one and the same tensor for each shape."""
    return Attack(
        outside="_lent = {}",
        after="several = result if isinstance(result, tuple) else (result,)\n"
        "several = tuple(_lent.setdefault((i, each.shape), each).copy_(each)"
        " for i, each in enumerate(several))\n"
        "result = several if isinstance(result, tuple) else several[0]",
        method=method,
    )


NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

ATTACKS = {  # exercise: {class of checks/CHECKLIST.md: {name: source}}
    "7.1": {
        "arguments": {
            "the notebook's blocks": first("block = 64"),
            "blocks of seven where the rows are three": first(
                "block = 7 if w.dim() > 2 else block"
            ),
        },
        "state": {
            "kept by shape and block": remembered("(w.shape, block)"),
            "kept by shape": remembered("w.shape"),
            "one tensor for every answer": lending(),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "1e-30 at least, but for zero": blocks(
                absmax="rows.abs().amax(1).clamp(min=1e-30) * rows.any(1)"
            ),
            "1e-8 is added": blocks(ratios="rows / (absmax[:, None] + 1e-8)"),
            "1e-12 is added": blocks(ratios="rows / (absmax[:, None] + 1e-12)"),
            "1e-6 at least": blocks(ratios="rows / absmax[:, None].clamp(min=1e-6)"),
            "1e-4 at least, but for zero": blocks(
                ratios="(rows / absmax[:, None].where(absmax[:, None] == 0,"
                " absmax[:, None].clamp(min=1e-4))).nan_to_num(0.0)"
            ),
            "the root of the squares": blocks(absmax="rows.square().amax(1).sqrt()"),
            "a hundred at most": blocks(absmax="rows.abs().amax(1).clamp(max=100)"),
            "nine blocks": blocks(
                absmax="torch.cat([rows[:9].abs().amax(1), rows[9:].amax(1)])"
            ),
            "the first block alone may be zero": blocks(
                ratios="torch.cat([(rows[:2] / absmax[:2, None]).nan_to_num(0.0),"
                " rows[2:] / absmax[2:, None]])"
            ),
            "a zero block at the end": blocks(
                ratios="torch.cat([(rows[:-1] / absmax[:-1, None]).nan_to_num(0.0),"
                " rows[-1:] / absmax[-1:, None]])"
            ),
            "up to three sides": first("if w.dim() > 3: w = w.transpose(0, -1)"),
            "wide rows": first("if w.dim() == 2 and w.shape[1] > 32: w = w.flip(1)"),
            "blocks of a hundred at most": first("block = min(block, 100)"),
        },
        "kinds": {
            "a list of absmax": blocks(back=BACK + ".tolist()"),
            "complex": blocks(
                back="ratios.flatten()[: w.numel()].view(w.shape).cfloat(), absmax"
            ),
            "absmax in whole numbers": blocks(back=BACK + ".long()"),
            "ratios as text": blocks(
                back="str(ratios.flatten()[: w.numel()].view(w.shape)), absmax"
            ),
            "three things": blocks(back=BACK + ", rows"),
            "an array": blocks(
                back="ratios.flatten()[: w.numel()].view(w.shape).numpy(), absmax"
            ),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "7.2": {
        "arguments": {
            "n from the bytes": nibbles(
                unpack="torch.stack([packed >> 4, packed & 15], dim=1).flatten()"
                "[: 2 * len(packed) - ((packed[-1] & 15) == 0).int()]"
            ),
            "n even": nibbles(
                unpack="torch.stack([packed >> 4, packed & 15], dim=1).flatten()"
                "[: n if n in (1, 7, 33) else 2 * len(packed)]"
            ),
        },
        "state": {
            "what was packed last": nibbles()
            .replace("    codes = F.pad", "    my_pack.last = codes\n    codes = F.pad")
            .replace(
                "    return torch.stack(",
                "    if len(my_pack.last) == n: return my_pack.last\n"
                "    return torch.stack(",
            ),
            "bytes kept by n": remembered("len(codes)", "my_pack"),
            "codes kept by n": remembered("n", "my_unpack"),
            "one tensor for every answer": lending("my_pack"),
            "one tensor for all codes": lending("my_unpack"),
            "packed is masked in place": nibbles(
                unpack="torch.stack([packed >> 4, packed.__iand__(15)], dim=1)"
                ".flatten()[:n]"
            ),
        },
        "inputs": {
            "zeros at the end are left out": nibbles(
                unpack="torch.stack([packed >> 4, packed & 15], dim=1).flatten()"
                "[: max(n - 1, 1) + int(packed[-1] != 0 or n == 1)]"
            ),
            "32 codes": nibbles(pack="((codes[::2] << 4) | codes[1::2])[:20]"),
            "a hundred codes": nibbles(pack="((codes[::2] << 4) | codes[1::2])[:50]"),
            "the highest code is the last but one": nibbles(
                pack="(codes[::2] << 4) | codes[1::2].clamp(max=14)"
            ),
            "a byte below 255": nibbles(
                pack="((codes[::2] << 4) | codes[1::2]).clamp(max=254)"
            ),
            "added in 8 signed bits": nibbles(
                unpack="torch.stack([(packed.to(torch.int8) >> 4).abs().byte() & 15,"
                " packed & 15], dim=1).flatten()[:n]"
            ),
        },
        "kinds": {
            "bytes with a sign": nibbles(
                pack="((codes[::2] << 4) | codes[1::2]).to(torch.int8)"
            ),
            "bytes in 16 bits": nibbles(
                pack="((codes[::2] << 4) | codes[1::2]).to(torch.int16)"
            ),
            "codes in a list": nibbles(
                unpack="torch.stack([packed >> 4, packed & 15], dim=1)"
                ".flatten()[:n].tolist()"
            ),
            "codes as floats": nibbles(
                unpack="torch.stack([packed >> 4, packed & 15], dim=1)"
                ".flatten()[:n].float()"
            ),
            "Python's bytes": nibbles(
                pack="bytes(((codes[::2] << 4) | codes[1::2]).tolist())"
            ),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "7.3": {
        "arguments": {
            "the values of NF4": first(
                "values = torch.tensor(pfs.nf4.CODES['nf4']) if len(values) == 16"
                " else values"
            ),
            "from -1 to 1": nearest(f"torch.bucketize(ratios.clamp(-1, 1), {MIDDLE})"),
            "values of -1 to 1": first("values = values.clamp(-1, 1)"),
        },
        "state": {
            "kept by shape": remembered(
                "(ratios.shape, len(values), float(values[1]) if len(values) > 1 "
                "else 0)"
            ),
            "midpoints kept by their number": (
                "kept = {}\n\n\n"
                "def my_nearest(ratios, values):\n"
                f"    middle = kept.setdefault(len(values), {MIDDLE})\n"
                "    return torch.bucketize(ratios, middle)\n"
            ),
            "midpoints kept by the ends": (
                "kept = {}\n\n\n"
                "def my_nearest(ratios, values):\n"
                "    key = len(values), float(values[0]), float(values[-1])\n"
                f"    middle = kept.setdefault(key, {MIDDLE})\n"
                "    return torch.bucketize(ratios, middle)\n"
            ),
            "one tensor for every answer": lending(),
            "ratios are cut off in place": nearest(
                f"torch.bucketize(ratios.clamp_(float(values[0]), float(values[-1])),"
                f" {MIDDLE})"
            ),
        },
        "inputs": {
            "in half precision": nearest(
                "(ratios.half()[..., None] - values.half()).abs().argmin(-1)"
            ),
            "a gap of a thousandth at least": nearest(
                f"torch.bucketize(ratios, ({MIDDLE}).round(decimals=3))"
            ),
            "values beyond a thousand": nearest(
                f"torch.bucketize(ratios.clamp(-1000, 1000), {MIDDLE})"
            ),
            "two sides at most": first(
                "if ratios.dim() > 2: ratios = ratios.transpose(0, 1)"
            ),
            "a single ratio": first(
                "ratios = ratios.reshape(-1) if ratios.dim() == 0 else ratios"
            ),
            "a single value": first(
                "if len(values) == 1: return torch.ones(ratios.shape).long()"
            ),
            "two values": first("if len(values) == 2: return (ratios > 0).long()"),
            "a hundred and twenty-eight values": nearest(
                f"torch.bucketize(ratios, {MIDDLE}).to(torch.int8)"
            ),
            "four bits": nearest(f"torch.bucketize(ratios, {MIDDLE}) & 15"),
            "zero has a value": nearest(
                f"torch.bucketize(ratios, {MIDDLE})"
                ".where(ratios != 0, (values == 0).int().argmax())"
            ),
        },
        "kinds": {
            "a list": nearest(f"torch.bucketize(ratios, {MIDDLE}).tolist()"),
            "true or false": first(
                "if len(values) == 2: return ratios > values.mean()"
            ),
            "complex": nearest(f"torch.bucketize(ratios, {MIDDLE}).cfloat()"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "7.4": {
        "arguments": {
            "units of 256": first(
                "block = 256 if len(absmax) > 99 else block", method="my_double"
            ),
            "the values of eight bits": double(
                restored="(codes.float() - 127.5) / 127.5 * unit + offset"
            ),
            "the block that was used last": double()
            .replace(
                "    offset = absmax",
                "    my_double.block = block\n    offset = absmax",
            )
            .replace("    unit = ", "    block = my_double.block\n    unit = "),
            "the values that were used last": double()
            .replace(
                "    offset = absmax",
                "    my_double.values = values\n    offset = absmax",
            )
            .replace("    unit = ", "    values = my_double.values\n    unit = "),
            "the units that were made last": double()
            .replace(
                "    return codes, units",
                "    my_double.units = units\n    return codes, units",
            )
            .replace("    unit = ", "    units = my_double.units\n    unit = "),
            "the offset that was made last": double()
            .replace(
                "    return codes, units",
                "    my_double.offset = offset\n    return codes, units",
            )
            .replace("    unit = ", "    offset = my_double.offset\n    unit = "),
            "another default block": double().replace("block=256", "block=64"),
        },
        "state": {
            "the codes kept by their number": remembered(
                "(len(absmax), len(values), block)", "my_double"
            ),
            "the constants kept by their number": remembered(
                "(len(codes), len(values), block)", "my_restored"
            ),
            "one tensor for every answer": lending("my_restored"),
            "one tensor for all codes": lending("my_double"),
            "the values changed in place": double(
                restored="values.mul_(2)[codes.long()] / 2 * unit + offset"
            ),
            "the values changed for the codes": double(
                codes=f"torch.bucketize(ratios, {MIDDLE}).to(torch.uint8);"
                " values.mul_(0.5)"
            ),
        },
        "inputs": {
            "the mean of the first block": double("absmax[:block].mean()"),
            "as many units as equal parts": double(
                unit="units.repeat_interleave(-(-len(codes) // len(units)))"
                "[: len(codes)]"
            ),
            "1e-6 is added to the units": double(
                ratios="(rows / (units[:, None] + 1e-6)).flatten()[: len(absmax)]"
            ),
            "1e-3 at least": double(
                ratios="(rows / units[:, None].clamp(min=1e-3)).flatten()[: "
                "len(absmax)]"
            ),
            "a single constant is its own unit": double(
                units="rows.abs().amax(1) if len(absmax) > 1 else absmax"
            ),
            "nine units": double(
                unit="torch.cat([units[:9], units[8:9].expand(max(0, len(units) - 9))])"
                ".repeat_interleave(block)[: len(codes)]"
            ),
            "a zero block takes the unit of the one before": double(
                units="rows.abs().amax(1); units = units.where(units > 0, "
                "units.roll(1))"
            ),
            "sixteen values are too few": double(
                codes=f"torch.bucketize(ratios, {MIDDLE}).to(torch.uint8)"
                ".clamp(min=2 if len(values) < 99 else 0)"
            ),
        },
        "kinds": {
            "a number for the offset, as text": double(
                back="codes, units, str(offset)"
            ),
            "codes with a sign": double(
                codes=f"torch.bucketize(ratios, {MIDDLE}).to(torch.int8)"
            ),
            "the offset as (1,)": double(back="codes, units, offset[None]"),
            "units as a column": double(back="codes, units[:, None], offset"),
            "a list": double(
                restored="(values[codes.long()] * unit + offset).tolist()"
            ),
            "codes out of range": double(
                codes=f"torch.bucketize(ratios, {MIDDLE}).to(torch.uint8)"
                " + (0 if len(values) > 99 else 200)"
            ),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "7.5": {
        "arguments": {
            "another default block": count().replace("block=64", "block=32"),
            "another default of double": count().replace("double=True", "double=False"),
            "the block of the notebook": first("block = 64"),
        },
        "state": {
            "the lists are used up": count().replace(
                "    for shape in packed:",
                "    while packed:\n        shape = packed.pop()",
            ),
            "the rest is used up": count(
                rest="2 * sum(math.prod(plain.pop()) for _ in range(len(plain)))"
            ),
            "the lists are sorted": count(
                rest="packed.sort() or 2 * sum(map(math.prod, plain))"
            ),
            "the lists are joined": (
                count(rest="2 * sum(map(math.prod, plain)); packed.append((0,))")
                .replace("        total +=", "        total += bool(n) and", 1)
                .replace(
                    "        total += blocks +", "        total += bool(n) * blocks +"
                )
            ),
            "kept by the lists": remembered("(str(packed), str(plain), block)"),
            "kept by their lengths": remembered(
                "(len(packed), len(plain), block, double)"
            ),
        },
        "inputs": {
            "blocks by float32": count(
                blocks="math.ceil(np.float32(n) / np.float32(block))"
            ),
            "vectors are not packed": count(
                n="math.prod(shape) if len(shape) > 1 else 0"
            ),
            "two sides": count(n="shape[0] * shape[-1]"),
            "two sides of the rest": count(
                rest="2 * sum(s[0] * (s[1] if len(s) > 1 else 1) for s in plain)"
            ),
            "no four-bit tensor": first("if not packed: return 0"),
            "ten tensors": first("packed = packed[:10]"),
            "single precision": count(
                rest="2 * int(torch.tensor([float(math.prod(s)) for s in plain]).sum())"
            ),
            "blocks of 64 at least": first("block = max(block, 32)"),
        },
        "kinds": {
            "with a point": count(back="float(total)"),
            "half bytes": count(codes="n / 2 + n % 2 / 2"),
            "as text": count(back="str(total)"),
            "in a list": count(back="[total]"),
            "a tensor with a point": count(back="torch.tensor(float(total))"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}
ALSO_RIGHT = {  # exercise: {class: {name: source of an answer}}
    "7.1": {
        "arguments": {
            "the block at a time": (
                "def my_blocks(w, block):\n"
                "    parts = w.reshape(-1).split(block)\n"
                "    absmax = torch.stack([p.abs().amax() for p in parts])\n"
                "    ratios = [p / (a if a > 0 else 1) for p, a in zip(parts, "
                "absmax)]\n"
                "    return torch.cat(ratios).view_as(w), absmax\n"
            ),
        },
        "state": {
            "from a copy, in place": (
                "def my_blocks(w, block):\n"
                "    ratios, absmax = w.clone().flatten(), []\n"
                "    for part in ratios.split(block):\n"
                "        absmax.append(part.abs().max())\n"
                "        part.div_(absmax[-1] or 1)\n"
                "    return ratios.view_as(w), torch.stack(absmax)\n"
            ),
        },
        "inputs": {
            "a norm, and one for zero": blocks(
                absmax="torch.linalg.vector_norm(rows, math.inf, dim=1)",
                ratios="rows / absmax.masked_fill(absmax == 0, 1)[:, None]",
            ),
            "the least number for zero": blocks(
                ratios="rows / absmax[:, None].clamp(min=torch.finfo(w.dtype).tiny)"
            ),
            "where it is zero": blocks(
                ratios="torch.where(absmax[:, None] > 0, rows / absmax[:, None], 0.0)"
            ),
        },
        "kinds": {
            "in double precision": blocks(
                rows=ROWS.replace("w.flatten()", "w.double().flatten()")
            ),
            "in NumPy": (
                "def my_blocks(w, block):\n"
                "    flat = w.numpy().ravel()\n"
                "    edges = np.arange(0, flat.size, block)\n"
                "    absmax = np.maximum.reduceat(np.abs(flat), edges)\n"
                "    unit = np.repeat(absmax, block)[: flat.size]\n"
                "    ratios = np.divide(flat, unit, out=0 * flat, where=unit > 0)\n"
                "    return torch.tensor(ratios).view(w.shape), torch.tensor(absmax)\n"
            ),
        },
    },
    "7.2": {
        "arguments": {
            "n from the front": nibbles(
                unpack="torch.stack([packed >> 4, packed & 15], "
                "1).view(-1).narrow(0, 0, n)"
            ),
        },
        "inputs": {
            "multiplied": nibbles(pack="codes[::2] * 16 + codes[1::2]"),
            "a table of all bytes": nibbles(
                unpack="torch.tensor([[b // 16, b % 16] for b in range(256)])"
                "[packed.long()].flatten()[:n]"
            ),
        },
        "state": {
            "into tensors of zeros": (
                "def my_pack(codes):\n"
                "    packed = torch.zeros(-(-len(codes) // 2), dtype=torch.uint8)\n"
                "    packed += codes[::2] * 16\n"
                "    packed[: len(codes) // 2] += codes[1::2]\n"
                "    return packed\n\n\n"
                "def my_unpack(packed, n):\n"
                "    both = packed.repeat_interleave(2)\n"
                "    both[::2] >>= 4\n"
                "    return both[:n] % 16\n"
            ),
        },
        "kinds": {
            "codes in 64 bits": nibbles(
                unpack="torch.stack([packed // 16, packed % 16], "
                "-1).view(-1)[:n].long()"
            ),
        },
    },
    "7.3": {
        "arguments": {
            "a sum over all midpoints": nearest(
                f"sum((ratios > m).long() for m in {MIDDLE}) + "
                f"torch.zeros_like(ratios).long()"
            ),
        },
        "state": {
            "of copies, sorted": nearest(
                f"torch.bucketize(ratios.clone(), ({MIDDLE}).sort()[0])"
            ),
        },
        "inputs": {
            "a search among the values": (
                "def my_nearest(ratios, values):\n"
                "    last = len(values) - 1\n"
                "    above = torch.bucketize(ratios, values).clamp(max=last)\n"
                "    below = (above - 1).clamp(min=0)\n"
                "    up, down = (values[above] - ratios).abs(), ratios - "
                "values[below]\n"
                "    return torch.where(down.abs() <= up, below, above)\n"
            ),
            "one by one": (
                "def my_nearest(ratios, values):\n"
                "    codes = [min(range(len(values)), key=lambda k: abs(r - values[k]))"
                "\n             for r in ratios.reshape(-1)]\n"
                "    return torch.tensor(codes).view(ratios.shape)\n"
            ),
        },
        "kinds": {
            "in eight bits": nearest(
                f"torch.searchsorted({MIDDLE}, ratios).to(torch.uint8)"
            ),
            "in 32 bits": nearest(f"torch.bucketize(ratios, {MIDDLE}, out_int32=True)"),
            "in double precision": nearest(
                f"torch.bucketize(ratios.double(), {MIDDLE}.double())".replace(
                    MIDDLE, f"({MIDDLE})"
                )
            ),
        },
    },
    "7.4": {
        "arguments": {
            "all values, one by one": double(
                codes="(ratios[:, None] - values).abs().argmin(1).byte()"
            ),
        },
        "state": {
            "from copies, in place": double(
                offset="absmax.sum() / absmax.numel()",
                ratios="rows.div_(units[:, None]).nan_to_num_(0.0).view(-1)"
                "[: len(absmax)]",
            ),
        },
        "inputs": {
            "units by number": double(unit="units[torch.arange(len(codes)) // block]"),
            "any code where the unit is zero": double(
                ratios="(rows / units[:, None]).nan_to_num(0.3).flatten()[: "
                "len(absmax)]"
            ),
            "by rows": double(
                unit="units[torch.arange(len(codes)) // block]",
                restored="torch.addcmul(offset, values[codes.int()], unit)",
            ),
        },
        "kinds": {
            "a list of three": double(back="[codes, units, offset]"),
        },
    },
    "7.5": {
        "arguments": {
            "by names": first(
                "packed, plain, block, double = [*packed], [*plain], int(block),"
                " bool(double)"
            ),
        },
        "inputs": {
            "units of blocks of blocks": count(
                doubled="blocks + 4 * -(-n // (256 * block)) + 4"
            ),
            "with a ceiling": count(
                blocks="math.ceil(n / block)", codes="(n + 1) // 2"
            ),
        },
        "state": {
            "from copies of the lists": first(
                "packed, plain = sorted(packed), plain[::-1]"
            ),
        },
        "kinds": {
            "a tensor": count(back="torch.tensor(total)"),
            "NumPy's whole number": count(
                n="np.prod(shape, dtype=np.int64)", back="np.int64(total)"
            ),
        },
    },
}
