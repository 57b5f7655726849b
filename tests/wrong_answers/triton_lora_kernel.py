"""Wrong answers to the exercises of notebook 10; each must be refused by its check."""

from attacks import every_time_but, fixed, remembered, returned, stale, where

from peft_from_scratch.course.checks import triton_lora_kernel as checks  # noqa: F401

PREAMBLE = """\
import triton
import triton.language as tl
from peft_from_scratch.kernels.language import dot, load, rounded, store, within
"""

ADD = """\
@triton.jit
def my_add(x, y, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    total = tl.load(x + at, mask=keep) + tl.load(y + at, mask=keep)
    tl.store(out + at, total, mask=keep)
"""

PRODUCT = """\
@triton.jit
def my_product(
    x, W, y, m_size, n_size, k_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, k_size, BK):
        k = first + tl.arange(0, BK)
        part = load(x, m, k, within(m, k, m_size, k_size))
        wide = load(W, n, k, within(n, k, n_size, k_size))
        total = dot(part, tl.trans(wide), total)
    store(y, m, n, total, within(m, n, m_size, n_size))
"""

CHOICE = """\
def my_choice(m, n, k, r, columns, peak, bandwidth):
    def bound(*launches):
        return sum(max(f / peak, 2 * v / bandwidth) for f, v in launches)
    programs = -(-n // columns)
    flops = 2 * m * (n * k + programs * r * k + n * r)
    fused = bound((flops, m * k + n * k + r * k + n * r + m * n))
    rival = bound(
        (2 * m * n * k, m * k + n * k + m * n),
        (2 * m * r * k, m * k + r * k + m * r),
        (2 * m * n * r, m * r + n * r + 2 * m * n),
    )
    saving = 100 * (1 - fused / rival)
    return saving, "fused" if saving >= 5 else "rival"
"""

UPDATE = """\
@triton.jit
def my_update(total, low, B, n, n_size, r, scale, RANK: tl.constexpr):
    rank = tl.arange(0, RANK)
    b = load(B, n, rank, within(n, rank, n_size, r))
    return dot(low * scale, tl.trans(b), total)
"""

LORA = """\
@triton.jit
def my_lora(
    x, W, A, B, y, m_size, n_size, k_size, r, scale, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr, SWEEP: tl.constexpr,
):
    m, rank = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RANK)
    low = tl.zeros((BM, RANK), tl.float32)
    for step in tl.static_range(SWEEP):
        n = (tl.program_id(1) * SWEEP + step) * BN + tl.arange(0, BN)
        total = tl.zeros((BM, BN), tl.float32)
        for first in range(0, k_size, BK):
            k = first + tl.arange(0, BK)
            part = load(x, m, k, within(m, k, m_size, k_size))
            wide = load(W, n, k, within(n, k, n_size, k_size))
            total = dot(part, tl.trans(wide), total)
            if step == 0:
                a = load(A, rank, k, within(rank, k, r, k_size))
                low = dot(part, tl.trans(a), low)
        b = load(B, n, rank, within(n, rank, n_size, r))
        total = dot(rounded(low * scale, B[0].dtype.element_ty), tl.trans(b), total)
        store(y, m, n, total, within(m, n, m_size, n_size))
"""


def changed(source, *pieces):
    """A source with some (right, wrong) pieces exchanged, each of which it has."""
    for right, wrong in pieces:
        assert right in source, right
        source = source.replace(right, wrong)
    return source


def table(source, rows):
    return {name: changed(source, *pieces) for name, pieces in rows.items()}


ROUNDED = "rounded(low * scale, B[0].dtype.element_ty)"
FINISH = f"dot({ROUNDED}, tl.trans(b), total)"
FINISH_MORE = FINISH.replace("low", "more")
ZEROS = "tl.zeros((BM, BN), tl.float32)"
PART = "within(m, k, m_size, k_size)"
WIDE = "within(n, k, n_size, k_size)"
OUT = "within(m, n, m_size, n_size)"
THIN = "within(n, rank, n_size, r)"
EACH = ("            if step == 0:\n", "            if True:\n")
AGAIN = (
    "        total = tl.zeros((BM, BN), tl.float32)\n",
    "        total = tl.zeros((BM, BN), tl.float32)\n"
    "        low = tl.zeros((BM, RANK), tl.float32)\n",
)

MUTANTS = {
    "10.1": table(
        ADD,
        {
            "all zeros": [("out + at, total", "out + at, total * 0")],
            "no mask at all": [(", mask=keep", "")],
            "no mask in the store": [("total, mask=keep", "total")],
            "no mask in a load": [("tl.load(x + at, mask=keep)", "tl.load(x + at)")],
            "the mask one too far": [("at < size", "at <= size")],
            "the mask one too short": [("at < size", "at < size - 1")],
            "the mask of the block": [("at < size", "tl.arange(0, BLOCK) < size")],
            "program_id forgotten": [("tl.program_id(0) * BLOCK + ", "")],
            "program_id not times BLOCK": [("(0) * BLOCK", "(0)")],
            "the second axis": [("program_id(0)", "program_id(1)")],
            "the short block left out": [("at < size", "at < size // BLOCK * BLOCK")],
            "subtracts": [("keep) + tl", "keep) - tl")],
            "x twice": [("tl.load(y", "tl.load(x")],
            "y alone": [("tl.load(x + at, mask=keep) + ", "")],
            "written over x": [("tl.store(out", "tl.store(x")],
            "no jit": [("@triton.jit\n", "")],
            "wrapped round": [
                ("tl.arange(0, BLOCK)\n", "tl.arange(0, BLOCK)) % size\n"),
                ("at = ", "at = ("),
            ],
            "the mask of the programs": [
                ("at < size", "at < tl.num_programs(0) * BLOCK")
            ],
            "only where x is not zero": [
                (
                    "    tl.store",
                    "    keep = keep & (tl.load(x + at, mask=keep, other=0.0) != 0)\n"
                    "    tl.store",
                )
            ],
        },
    ),
    "10.2": table(
        PRODUCT,
        {
            "W's sizes exchanged": [(WIDE, "within(n, k, k_size, n_size)")],
            "rounded in each turn": [
                (
                    "wide), total)\n",
                    "wide), total).to(tl.float16).to(tl.float32)\n",
                )
            ],
            "half a step": [("range(0, k_size, BK)", "range(0, k_size, BK // 2)")],
            "all zeros": [("n, total,", "n, total * 0,")],
            "no loop": [("range(0, k_size, BK)", "range(0, BK, BK)")],
            "k without the loop's first": [("k = first + ", "k = ")],
            "the last part left out": [("range(0, k_size,", "range(0, k_size - BK,")],
            "total not added to": [("trans(wide), total)", f"trans(wide), {ZEROS})")],
            "total begins at one": [(ZEROS, f"{ZEROS} + 1")],
            "a total in x's dtype": [
                (
                    "trans(wide), total)",
                    "trans(wide), total).to(x[0].dtype.element_ty).to(tl.float32)",
                )
            ],
            "k mask missing": [(PART, "(m < m_size)[:, None]")],
            "m mask missing": [(PART, "(k < k_size)[None, :]")],
            "n mask missing": [(WIDE, "(k < k_size)[None, :]")],
            "no mask in the store": [(OUT, "True")],
            "the mask one too far": [(OUT, "within(m, n, m_size, n_size + 1)")],
            "W not transposed": [("tl.trans(wide)", "wide")],
            "programs exchanged": [
                ("program_id(0)", "program_id(9)"),
                ("program_id(1)", "program_id(0)"),
                ("program_id(9)", "program_id(1)"),
            ],
            "the first rows always": [("tl.program_id(0) * BM + ", "")],
            "BN for BM": [("program_id(1) * BN", "program_id(1) * BM")],
            "strides taken for granted": [("load(x,", "load((x[0], k_size, 1),")],
            "rows of W for rows of x": [("part = load(x, m,", "part = load(x, n,")],
        },
    ),
    "10.3": table(
        CHOICE,
        {
            "all zeros": [("return saving, ", "return 0.0, ")],
            "against four kernels": [
                (
                    "m * r + n * r + 2 * m * n),",
                    "m * r + n * r + m * n), (0, 3 * m * n),",
                )
            ],
            "low computed once": [("programs * r * k", "r * k")],
            "programs rounded down": [("-(-n // columns)", "max(1, n // columns)")],
            "all launches in one bound": [
                (
                    "sum(max(f / peak, 2 * v / bandwidth) for f, v in launches)",
                    "max(sum(f for f, _ in launches) / peak,"
                    " 2 * sum(v for _, v in launches) / bandwidth)",
                )
            ],
            "issued bytes": [
                (
                    "fused = bound((flops, m * k + n * k + r * k",
                    "fused = bound((flops, programs * (m * k + r * k) + n * k",
                )
            ],
            "y is not read": [("2 * m * n),\n    )", "m * n),\n    )")],
            "no launch for h": [
                ("        (2 * m * r * k, m * k + r * k + m * r),\n", "")
            ],
            "four bytes": [("2 * v /", "4 * v /")],
            "one FLOP": [("max(f / peak", "max(f / 2 / peak")],
            "both times": [
                ("max(f / peak, 2 * v / bandwidth)", "f / peak + 2 * v / bandwidth")
            ],
            "the smaller time": [("sum(max(", "sum(min(")],
            "percent of the fused bound": [("1 - fused / rival", "rival / fused - 1")],
            "a fraction": [
                ("100 * (1", "(1"),
                ("saving >= 5", "saving >= 0.05"),
            ],
            "the sign": [("1 - fused / rival", "fused / rival - 1")],
            "any saving": [("saving >= 5", "saving > 0")],
            "always fused": [(' if saving >= 5 else "rival"', "")],
            "exchanged": [("saving >= 5", "saving < 5")],
            "only the choice": [("return saving, ", "return ")],
            "only the saving": [(', "fused" if saving >= 5 else "rival"', "")],
        },
    ),
    "10.4": table(
        UPDATE,
        {
            "nothing where total is zero": [
                (
                    "return dot(low * scale, tl.trans(b), total)",
                    "new = dot(low * scale, tl.trans(b), total)\n"
                    "    return tl.where(total == 0, total, new)",
                )
            ],
            "low without its negative entries": [
                ("low * scale", "tl.maximum(low, 0.0) * scale")
            ],
            "all zeros": [("total)", "total) * 0")],
            "no scale": [("low * scale", "low")],
            "the scale twice": [("low * scale", "low * scale * scale")],
            "the scale of all": [
                ("return dot(", "return scale * dot("),
                (" * scale,", ","),
            ],
            "divided by the scale": [("low * scale", "low / scale")],
            "divided by r": [("low * scale", "low * scale / r")],
            "the update alone": [(", total)", ", tl.zeros_like(total))")],
            "total alone": [
                ("return dot(low * scale, tl.trans(b), total)", "return total")
            ],
            "taken away": [("low * scale", "-low * scale")],
            "added twice": [("tl.trans(b), total)", "tl.trans(b), total) + total")],
            "B not turned": [("tl.trans(b)", "b")],
            "r mask missing": [(THIN, "(n < n_size)[:, None]")],
            "n mask missing": [(THIN, "(rank < r)[None, :]")],
            "one column less": [(THIN, "within(n, rank, n_size, r - 1)")],
            "the next column": [("rank, within", "rank + 1, within")],
            "the first rows of B": [("load(B, n,", "load(B, tl.arange(0, 16),")],
        },
    ),
    "10.5": table(
        LORA,
        {
            "low in the last step": [("step == 0", "step == SWEEP - 1")],
            "the scale once more in each step": [
                (
                    f"        total = {FINISH}",
                    "        low = low * scale\n"
                    "        total = dot(low, tl.trans(b), total)",
                )
            ],
            "low of the first part": [("step == 0", "step == 0 and first == 0")],
            "all zeros": [("n, total,", "n, total * 0,")],
            "A for each block": [EACH, AGAIN],
            "low summed on": [EACH],
            "low lost": [AGAIN],
            "no scale": [("low * scale", "low")],
            "the scale of all": [
                ("low * scale", "low"),
                ("n, total,", "n, total * scale,"),
            ],
            "no update": [(f"        total = {FINISH}\n", "")],
            "low is not rounded": [(ROUNDED, "low * scale")],
            "RANK 8": [
                (
                    ", tl.arange(0, RANK)\n",
                    "\n    HALF: tl.constexpr = 8 if RANK == 16 else RANK\n"
                    "    rank = tl.arange(0, HALF)\n"
                    "    more = tl.zeros((BM, HALF), tl.float32)\n",
                ),
                ("    m, rank = ", "    m = "),
                ("low = tl.zeros((BM, RANK)", "low = tl.zeros((BM, HALF)"),
                (
                    "                low = dot(part, tl.trans(a), low)\n",
                    "                low = dot(part, tl.trans(a), low)\n"
                    "                rest = rank + HALF\n"
                    "                a = load(A, rest, k, within(rest, k, r, k_size))\n"
                    "                more = dot(part, tl.trans(a), more)\n",
                ),
                (
                    f"        total = {FINISH}\n",
                    f"        total = {FINISH}\n"
                    "        rest = rank + HALF\n"
                    "        b = load(B, n, rest, within(n, rest, n_size, r))\n"
                    f"        total = {FINISH_MORE}\n",
                ),
            ],
            "x again for A": [
                (
                    "low = dot(part, tl",
                    f"low = dot(load(x, m, k, {PART}), tl",
                )
            ],
            "x and W twice": [
                (
                    "            total = dot(part",
                    f"            part = load(x, m, k, {PART})\n"
                    f"            wide = load(W, n, k, {WIDE})\n"
                    "            total = dot(part",
                )
            ],
            "a product of its own for low": [
                (
                    "            if step == 0:\n"
                    "                a = load(A, rank, k, within(rank, k, r, k_size))\n"
                    "                low = dot(part, tl.trans(a), low)\n",
                    "",
                ),
                (
                    "    for step in",
                    "    for first in range(0, k_size, BK):\n"
                    "        k = first + tl.arange(0, BK)\n"
                    f"        part = load(x, m, k, {PART})\n"
                    "        a = load(A, rank, k, within(rank, k, r, k_size))\n"
                    "        low = dot(part, tl.trans(a), low)\n"
                    "    for step in",
                ),
            ],
            "total not set to zero": [
                (f"        total = {ZEROS}\n", ""),
                ("    for step", f"    total = {ZEROS}\n    for step"),
            ],
            "the first block again": [("(1) * SWEEP + step)", "(1) * SWEEP)")],
            "SWEEP forgotten": [("(1) * SWEEP + step)", "(1) + step)")],
            "one block": [("static_range(SWEEP)", "static_range(1)")],
            "B for each part": [
                (
                    "            if step == 0:\n",
                    f"            b = load(B, n, rank, {THIN})\n"
                    "            if step == 0:\n",
                )
            ],
            "A's mask missing": [
                ("within(rank, k, r, k_size)", "(k < k_size)[None, :]")
            ],
            "the k mask missing": [(PART, "(m < m_size)[:, None]")],
            "no mask in the store": [(OUT, "True")],
            "low of the last part": [
                ("tl.trans(a), low)", "tl.trans(a), tl.zeros((BM, RANK), tl.float32))")
            ],
        },
    ),
}


# ---------------------------------------------------------------------------- Attacks

FAR = "tl.program_id(0) * 0 + 10_000_000"
AT = "at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
ADD_ALL = """\
@triton.jit
def my_add(x, y, out, size, BLOCK: tl.constexpr):
    {only}
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keep = at < size
        total = tl.load(x + at, mask=keep) + tl.load(y + at, mask=keep)
        tl.store(out + at, total, mask=keep{more})
"""
PRODUCT_ALL = """\
@triton.jit
def my_product(
    x, W, y, m_size, n_size, k_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    {only}
    for row in range({rows}):
        for column in range({columns}):
            m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
            total = tl.zeros((BM, BN), tl.float32)
            for first in range(0, k_size, BK):
                k = first + tl.arange(0, BK)
                part = load(x, m, k, within(m, k, m_size, k_size))
                wide = load(W, n, k, within(n, k, n_size, k_size))
                total = dot(part, tl.trans(wide), total)
            store(y, m, n, total, within(m, n, m_size, n_size))
"""
ROWS, COLUMNS = "0, tl.cdiv(m_size, BM)", "0, tl.cdiv(n_size, BN)"
OWN_ROW = "tl.program_id(0), tl.program_id(0) + 1"
OWN_COLUMN = "tl.program_id(1), tl.program_id(1) + 1"
STORE = "    store(y, m, n, total, within(m, n, m_size, n_size))\n"

NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
STATELESS = "a kernel keeps nothing: Triton lets it see no variable from outside"

ATTACKS = {  # exercise: {class of checks/CHECKLIST.md: {name: source}}
    "10.1": {
        "arguments": table(
            ADD,
            {
                "blocks of 64": [
                    ("    at = ", "    tl.static_assert(BLOCK >= 1)\n    at = "),
                    ("at < size", "(at < size) & (tl.arange(0, BLOCK) < 128)"),
                ],
            },
        ),
        "state": STATELESS,
        "inputs": table(
            ADD,
            {
                "four programs": [
                    ("at < size", "(at < size) & (tl.program_id(0) < 4)")
                ],
                "large sums are cut off": [
                    (
                        "tl.load(y + at, mask=keep)\n",
                        "tl.load(y + at, mask=keep)\n"
                        "    total = tl.minimum(total, 1e4)\n",
                    )
                ],
                "a size of one": [("at < size", "(at < size) & (size > 1)")],
                "a single number more": [("at < size", "at < tl.maximum(size, 2)")],
                "a full block is cut": [
                    ("at < size", "(at < size) & (at < size - (size == BLOCK))")
                ],
            },
        ),
        "kinds": table(
            ADD,
            {
                "in half precision": [
                    (
                        "mask=keep)\n    tl",
                        "mask=keep)\n"
                        "    total = total.to(tl.float16).to(tl.float32)\n    tl",
                    )
                ],
            },
        ),
        "randomness": NOTHING_DRAWN,
        "kernels": {
            "the first program does all": ADD_ALL.format(
                only="pass", more=" & (tl.program_id(0) == 0)"
            ),
            "each program does all": ADD_ALL.format(only="pass", more=""),
            "the last program does all": ADD_ALL.format(
                only="pass", more=" & (tl.program_id(0) == tl.num_programs(0) - 1)"
            ),
            "from last to first": changed(
                ADD, ("tl.program_id(0)", "(tl.num_programs(0) - 1 - tl.program_id(0))")
            ),
            "in strides": changed(
                ADD,
                (
                    "tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
                    "tl.program_id(0) + tl.arange(0, BLOCK) * tl.num_programs(0)",
                ),
            ),
            "stored twice": changed(
                ADD,
                (
                    "    tl.store(out",
                    "    tl.store(out + at, total * 0, mask=keep)\n    tl.store(out",
                ),
            ),
            "all of x is read": changed(
                ADD,
                (
                    "    total =",
                    "    for first in range(0, size, BLOCK):\n"
                    "        more = first + tl.arange(0, BLOCK)\n"
                    "        tl.load(x + more, mask=more < size)\n"
                    "    total =",
                ),
            ),
            "stores far away": changed(
                ADD,
                (
                    "    tl.store(out",
                    "    tl.store(out + at + 10_000_000_000, total, mask=keep)\n"
                    "    tl.store(out",
                ),
            ),
            "reads far away": changed(
                ADD, ("    total =", "    tl.load(x - 10_000_000_000)\n    total =")
            ),
            "a second store beside": changed(
                ADD,
                (
                    "    tl.store(out",
                    "    tl.store(out + at - 1, total, mask=keep & (at == 0))\n"
                    "    tl.store(out",
                ),
            ),
            "what is hidden is counted": changed(
                ADD,
                (
                    "    tl.store(out",
                    "    hidden = tl.sum(tl.where(keep, 0.0, tl.load(x + at, "
                    "mask=keep)))\n"
                    "    total += hidden\n    tl.store(out",
                ),
            ),
            "through out": changed(
                ADD,
                (
                    "    total = tl.load(x + at, mask=keep) + tl.load(y + at, "
                    "mask=keep)\n",
                    "    tl.store(out + at, tl.load(x + at, mask=keep), mask=keep)\n"
                    "    total = tl.load(out + at, mask=keep) + tl.load(y + at, "
                    "mask=keep)\n",
                ),
            ),
        },
    },
    "10.2": {
        "arguments": table(
            PRODUCT,
            {
                "sixteen rows": [("tl.program_id(0) * BM", "tl.program_id(0) * 16")],
                "the columns of x packed": [
                    ("part = load(x, m,", "part = load((x[0], x[1], 1), m,"),
                ],
                "y's strides taken for granted": [
                    ("store(y, m,", "store((y[0], n_size, 1), m,"),
                ],
            },
        ),
        "state": STATELESS,
        "inputs": table(
            PRODUCT,
            {
                "four blocks of columns": [
                    (OUT, f"{OUT} & (tl.program_id(1) < 4)"),
                ],
                "two blocks of rows": [(OUT, f"{OUT} & (tl.program_id(0) < 2)")],
                "large sums are cut off": [
                    ("n, total,", "n, tl.minimum(total, 1e4),"),
                ],
                "a k of one": [
                    ("range(0, k_size,", "range(0, tl.where(k_size == 1, 0, k_size),")
                ],
            },
        ),
        "kinds": table(
            PRODUCT,
            {
                "half precision for all": [
                    ("n, total,", "n, total.to(tl.float16),"),
                ],
                "operands in half precision": [
                    (
                        "dot(part, tl.trans(wide)",
                        "dot(part.to(tl.float16), tl.trans(wide).to(tl.float16)",
                    ),
                ],
            },
        ),
        "randomness": NOTHING_DRAWN,
        "kernels": {
            "the first program does all": PRODUCT_ALL.format(
                only="pass", rows=ROWS, columns=COLUMNS
            ).replace(OUT, f"{OUT} & (tl.program_id(0) + tl.program_id(1) == 0)"),
            "each program does all": PRODUCT_ALL.format(
                only="pass", rows=ROWS, columns=COLUMNS
            ),
            "each program does its row": PRODUCT_ALL.format(
                only="pass", rows=OWN_ROW, columns=COLUMNS
            ),
            "each program does its column": PRODUCT_ALL.format(
                only="pass", rows=ROWS, columns=OWN_COLUMN
            ),
            "the first of each row does the row": PRODUCT_ALL.format(
                only="pass", rows=OWN_ROW, columns=COLUMNS
            ).replace(OUT, f"{OUT} & (tl.program_id(1) == 0)"),
            "blocks from the other end": changed(
                PRODUCT,
                ("tl.program_id(1)", "(tl.num_programs(1) - 1 - tl.program_id(1))"),
            ),
            "stored in each turn": changed(PRODUCT, (STORE, f"    {STORE}")),
            "summed in y": changed(
                PRODUCT,
                (
                    "        total = dot(part, tl.trans(wide), total)\n" + STORE,
                    "        before = load(y, m, n, within(m, n, m_size, n_size)"
                    " & (first > 0))\n"
                    "        total = dot(part, tl.trans(wide), before.to(tl.float32))\n"
                    f"    {STORE}",
                ),
            ),
            "all of W is read": changed(
                PRODUCT,
                (
                    "    total = tl.zeros",
                    "    for more in range(0, n_size, BN):\n"
                    "        every = more + tl.arange(0, BN)\n"
                    "        load(W, every, tl.arange(0, BK), within(every,"
                    " tl.arange(0, BK), n_size, k_size))\n"
                    "    total = tl.zeros",
                ),
            ),
            "hidden lanes of x are not zero": changed(
                PRODUCT,
                (
                    f"part = load(x, m, k, {PART})",
                    "part = tl.load(x[0] + m[:, None] * x[1] + k[None, :] * x[2],"
                    f" mask={PART})",
                ),
            ),
            "hidden lanes of both are not zero": changed(
                PRODUCT,
                (
                    f"part = load(x, m, k, {PART})",
                    "part = tl.load(x[0] + m[:, None] * x[1] + k[None, :] * x[2],"
                    f" mask={PART})",
                ),
                (
                    f"wide = load(W, n, k, {WIDE})",
                    "wide = tl.load(W[0] + n[:, None] * W[1] + k[None, :] * W[2],"
                    f" mask={WIDE})",
                ),
            ),
            "stores far away": changed(
                PRODUCT,
                (
                    STORE,
                    "    tl.store(y[0] + 10_000_000_000 + n, tl.sum(total, 0))\n"
                    + STORE,
                ),
            ),
        },
    },
    "10.3": {
        "arguments": {
            "the first m": stale("m"),
            "the first n": stale("n"),
            "the first k": stale("k"),
            "the first r": stale("r"),
            "always 256 columns": fixed("columns", "256"),
            "always an H100": fixed("peak", "989.4e12"),
            "an H100's memory": fixed("bandwidth", "3.35e12"),
        },
        "state": {
            "kept for the sizes": remembered("(m, n, k)"),
            "the first result for ever": remembered("0"),
            "wrong from the second call on": every_time_but(2, "(0.0, 'rival')"),
        },
        "inputs": {
            "columns divide n": where("n % columns", "(result[0] + 1, result[1])"),
            "one row": where("m == 1", "(0.0, 'fused')"),
            "small matrices": where("n * k < 10_000", "(0.0, 'rival')"),
            "more columns than n": where("columns > n", "(0.0, 'rival')"),
            "a threshold of four": changed(CHOICE, ("saving >= 5", "saving >= 4")),
            "a threshold of six": changed(CHOICE, ("saving >= 5", "saving >= 6")),
        },
        "kinds": {
            "a truth for the choice": returned("(result[0], result[1] == 'fused')"),
            "a text for the saving": returned("(f'{result[0]:.2f}', result[1])"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": "no kernel: a function of seven numbers",
    },
    "10.4": {
        "arguments": table(
            UPDATE,
            {
                "a rank of sixteen": [
                    (THIN, "within(n, rank, n_size, r) & (rank < 16)[None, :]")
                ],
                "sixteen columns": [
                    (
                        THIN,
                        "within(n, rank, n_size, r) & (n % 16 < 16)[:, None]"
                        " & ((n - tl.min(n, 0)) < 16)[:, None]",
                    )
                ],
                "sixteen rows": [
                    (
                        "return dot(low * scale",
                        "return dot(low * scale *"
                        " (tl.arange(0, low.shape[0]) < 16)[:, None]",
                    )
                ],
                "the columns packed": [
                    ("load(B, n,", "load((B[0], r, 1) if True else B, n,")
                ],
                "positive scales": [("low * scale", "low * tl.abs(scale + 0.0)")],
            },
        ),
        "state": STATELESS,
        "inputs": table(
            UPDATE,
            {
                "three blocks of columns": [
                    ("tl.trans(b), total)", "tl.trans(b) * (tl.min(n, 0) < 48), total)")
                ],
                "large updates are cut off": [
                    (
                        "return dot(low * scale, tl.trans(b), total)",
                        "return total + tl.minimum(dot(low * scale, tl.trans(b), "
                        "total * 0), 1e4)",
                    )
                ],
                "a rank of one": [("low * scale", "low * scale * (r > 1)")],
            },
        ),
        "kinds": table(
            UPDATE,
            {
                "in half precision": [
                    ("low * scale", "(low * scale).to(tl.float16).to(tl.float32)")
                ],
            },
        ),
        "randomness": NOTHING_DRAWN,
        "kernels": table(
            UPDATE,
            {
                "more of B is read": [
                    (
                        "    return",
                        "    load(B, rank, rank, within(rank, rank, n_size, r))\n"
                        "    return",
                    )
                ],
                "B is written to": [
                    (
                        "    return",
                        "    store(B, n, rank, b, within(n, rank, n_size, r))\n"
                        "    return",
                    )
                ],
                "nothing said of what is hidden": [
                    (
                        f"load(B, n, rank, {THIN})",
                        "tl.load(B[0] + n[:, None] * B[1]"
                        f" + rank[None, :] * B[2], mask={THIN})",
                    )
                ],
                "the low is written beyond r": [
                    ("low * scale", "(low + (rank >= r)[None, :]) * scale"),
                    (
                        f"load(B, n, rank, {THIN})",
                        "tl.load(B[0] + n[:, None] * B[1]"
                        f" + rank[None, :] * B[2], mask={THIN}, other=0.1)",
                    ),
                ],
            },
        ),
    },
    "10.5": {
        "arguments": table(
            LORA,
            {
                "a scale of a half": [("low * scale", "low * 0.5")],
                "positive scales": [("low * scale", "low * tl.abs(scale + 0.0)")],
                "sixteen ranks": [
                    ("tl.arange(0, RANK)", "tl.arange(0, 16)"),
                    ("(BM, RANK)", "(BM, 16)"),
                ],
                "four blocks": [("* SWEEP + step", "* 4 + step")],
                "x packed": [
                    ("part = load(x, m,", "part = load((x[0], k_size, 1), m,")
                ],
                "W packed": [
                    ("wide = load(W, n,", "wide = load((W[0], k_size, 1), n,")
                ],
                "A packed": [
                    ("a = load(A, rank,", "a = load((A[0], k_size, 1), rank,")
                ],
                "B packed": [("b = load(B, n,", "b = load((B[0], r, 1), n,")],
                "y packed": [("store(y, m,", "store((y[0], n_size, 1), m,")],
                "sixteen rows": [
                    ("tl.program_id(0) * BM", "tl.program_id(0) * tl.minimum(BM, 32)")
                ],
            },
        ),
        "state": STATELESS,
        "inputs": table(
            LORA,
            {
                "two programs along": [(OUT, f"{OUT} & (tl.program_id(1) < 2)")],
                "two programs down": [(OUT, f"{OUT} & (tl.program_id(0) < 2)")],
                "a rank of one": [("low * scale", "low * scale * (r > 1)")],
            },
        ),
        "kinds": table(
            LORA,
            {
                "in half precision": [
                    ("low * scale", "(low * scale).to(tl.float16).to(tl.float32)")
                ],
                "stored in half precision": [("n, total,", "n, total.to(tl.float16),")],
            },
        ),
        "randomness": NOTHING_DRAWN,
        "kernels": {
            "stores far away": changed(
                LORA,
                (
                    "        store(y, m",
                    "        tl.store(y[0] + 10_000_000_000 + n, tl.sum(total, 0))\n"
                    "        store(y, m",
                ),
            ),
            "stored in each turn": changed(
                LORA,
                (
                    "            if step == 0:\n",
                    "            store(y, m, n, total, within(m, n, m_size, n_size))\n"
                    "            if step == 0:\n",
                ),
            ),
            "the first rows do all": changed(
                LORA,
                (
                    "    m, rank = tl.program_id(0) * BM + tl.arange(0, BM), "
                    "tl.arange(0, RANK)\n",
                    "    rank = tl.arange(0, RANK)\n"
                    "    for row in range(0, m_size, BM):\n"
                    "     m = row + tl.arange(0, BM)\n",
                ),
                (
                    "    low = tl.zeros((BM, RANK), tl.float32)\n    for step",
                    "     low = tl.zeros((BM, RANK), tl.float32)\n     for step",
                ),
                (OUT, f"{OUT} & (tl.program_id(0) == 0)"),
            ),
            "columns in strides": changed(
                LORA,
                (
                    "(tl.program_id(1) * SWEEP + step)",
                    "(tl.program_id(1) + step * tl.num_programs(1))",
                ),
            ),
            "hidden lanes of both are not zero": changed(
                LORA,
                (
                    f"part = load(x, m, k, {PART})",
                    "part = tl.load(x[0] + m[:, None] * x[1] + k[None, :] * x[2],"
                    f" mask={PART})",
                ),
                (
                    f"wide = load(W, n, k, {WIDE})",
                    "wide = tl.load(W[0] + n[:, None] * W[1] + k[None, :] * W[2],"
                    f" mask={WIDE})",
                ),
            ),
            "from the last rows to the first": changed(
                LORA,
                ("tl.program_id(0)", "(tl.num_programs(0) - 1 - tl.program_id(0))"),
            ),
        },
    },
}
ALSO_RIGHT = {  # exercise: {class: {name: source of an answer}}
    "10.1": {
        "arguments": {
            "the end of the block": changed(
                ADD, ("tl.arange(0, BLOCK)", "tl.arange(0, BLOCK) % BLOCK")
            ),
        },
        "inputs": {
            "the last number again, where there is none": changed(
                ADD,
                ("    total =", "    near = tl.minimum(at, size - 1)\n    total ="),
                ("tl.load(x + at, mask=keep)", "tl.load(x + near)"),
                ("tl.load(y + at, mask=keep)", "tl.load(y + near)"),
            ),
        },
        "kinds": {
            "in single precision": changed(
                ADD,
                (
                    "tl.load(x + at, mask=keep)",
                    "tl.load(x + at, mask=keep).to(tl.float32)",
                ),
            ),
        },
        "kernels": {
            "y first": changed(
                ADD,
                (
                    "tl.load(x + at, mask=keep) + tl.load(y + at, mask=keep)",
                    "tl.load(y + at, mask=keep) + tl.load(x + at, mask=keep)",
                ),
            ),
        },
    },
    "10.2": {
        "arguments": {
            "steps counted": changed(
                PRODUCT,
                (
                    "for first in range(0, k_size, BK)",
                    "for step in range(tl.cdiv(k_size, BK))",
                ),
                ("k = first +", "k = step * BK +"),
            ),
        },
        "inputs": {
            "from the last columns to the first": changed(
                PRODUCT,
                ("k = first + ", "k = tl.cdiv(k_size, BK) * BK - BK - first + "),
            ),
        },
        "kinds": {
            "operands in single precision": changed(
                PRODUCT,
                (
                    "dot(part, tl.trans(wide)",
                    "dot(part.to(tl.float32), tl.trans(wide).to(tl.float32)",
                ),
            ),
        },
        "kernels": {
            "hidden lanes of x are one": changed(
                PRODUCT,
                (
                    f"part = load(x, m, k, {PART})",
                    "part = tl.load(x[0] + m[:, None] * x[1] + k[None, :] * x[2],"
                    f" mask={PART}, other=1.0)",
                ),
            ),
            "hidden lanes set to zero afterwards": changed(
                PRODUCT,
                (
                    f"part = load(x, m, k, {PART})",
                    f"some = {PART}\n"
                    "        part = tl.load(x[0] + m[:, None] * x[1] + k[None, :] "
                    "* x[2],"
                    " mask=some)\n"
                    "        part = tl.where(some, part, 0.0)",
                ),
            ),
        },
    },
    "10.3": {
        "arguments": {
            "the ceiling of math": changed(
                CHOICE,
                ("-(-n // columns)", "__import__('math').ceil(n / columns)"),
            ),
        },
        "state": {
            "a helper outside": "def slower(f, v, peak, bandwidth):\n"
            "    return max(f / peak, 2 * v / bandwidth)\n\n"
            + changed(
                CHOICE,
                (
                    "max(f / peak, 2 * v / bandwidth)",
                    "slower(f, v, peak, bandwidth)",
                ),
            ),
        },
        "inputs": {
            "both rivals, and the better of them": changed(
                CHOICE,
                (
                    "    saving =",
                    "    four = bound(\n"
                    "        (2 * m * n * k, m * k + n * k + m * n),\n"
                    "        (2 * m * r * k, m * k + r * k + m * r),\n"
                    "        (2 * m * n * r, m * r + n * r + m * n),\n"
                    "        (0, 3 * m * n),\n"
                    "    )\n"
                    "    rival = min(rival, four)\n"
                    "    saving =",
                ),
            ),
        },
        "kinds": {
            "a list": returned("[*result]"),
            "a tensor of one number": returned(
                "(torch.tensor(result[0], dtype=torch.float64), result[1])"
            ),
        },
    },
    "10.4": {
        "arguments": {
            "the scale of the update": changed(
                UPDATE,
                (
                    "dot(low * scale, tl.trans(b), total)",
                    "total + scale * dot(low, tl.trans(b), total * 0)",
                ),
            ),
        },
        "inputs": {
            "the scale in B": changed(
                UPDATE,
                ("low * scale, tl.trans(b)", "low, tl.trans(b * scale)"),
            ),
        },
        "kinds": {
            "in single precision": changed(
                UPDATE, ("tl.trans(b)", "tl.trans(b).to(tl.float32)")
            ),
        },
        "kernels": {
            "B turned while it is read": changed(
                UPDATE,
                (
                    f"b = load(B, n, rank, {THIN})",
                    "b = load((B[0], B[2], B[1]), rank, n, within(rank, n, r, n_size))",
                ),
                ("tl.trans(b)", "b"),
            ),
        },
    },
    "10.5": {
        "arguments": {
            "low is scaled once": changed(
                LORA,
                (
                    "        b = load",
                    "        if step == 0:\n            low *= scale\n        b = load",
                ),
                ("low * scale", "low"),
            ),
        },
        "inputs": {
            "a depth of its own": changed(
                LORA,
                ("range(0, k_size, BK)", "range(0, tl.cdiv(k_size, BK) * BK, BK)"),
            ),
        },
        "kinds": {
            "low in single precision": changed(
                LORA,
                (
                    f"{ROUNDED}, tl.trans(b)",
                    "low * scale, tl.trans(b).to(tl.float32)",
                ),
            ),
        },
        "kernels": {
            "A before W": changed(
                LORA,
                ("            total = dot(part, tl.trans(wide), total)\n", ""),
                (
                    "                low = dot(part, tl.trans(a), low)\n",
                    "                low = dot(part, tl.trans(a), low)\n"
                    "            total = dot(part, tl.trans(wide), total)\n",
                ),
            ),
        },
    },
}
