"""Wrong answers to the exercises of notebook 09; each must be refused by its check."""

from peft_from_scratch.course.checks import triton_lora_kernel as checks  # noqa: F401

PREAMBLE = """\
import triton
import triton.language as tl
from peft_from_scratch.kernels.language import dot, load, store, within
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

READER = """\
@triton.jit
def my_reader(W, n, k, n_size, k_size, BN: tl.constexpr, BK: tl.constexpr):
    pointer, down, along = W
    rows, columns = n + tl.arange(0, BN), k + tl.arange(0, BK)
    at = pointer + columns[None, :] * down + rows[:, None] * along
    return tl.load(at, mask=within(rows, columns, n_size, k_size), other=0.0)
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
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    rank = tl.arange(0, RANK)
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
        total = dot(low * scale, tl.trans(b), total)
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
    "9.1": table(
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
        },
    ),
    "9.2": table(
        PRODUCT,
        {
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
    "9.3": table(
        READER,
        {
            "all zeros": [("other=0.0)", "other=0.0) * 0")],
            "W as it stands": [("down, along = W", "along, down = W")],
            "along taken for one": [("rows[:, None] * along", "rows[:, None]")],
            "down taken for n_size": [("* down", "* n_size")],
            "down forgotten": [("columns[None, :] * down", "columns[None, :]")],
            "no mask": [("mask=within(rows, columns, n_size, k_size), other=0.0", "")],
            "the sizes exchanged": [("n_size, k_size), o", "k_size, n_size), o")],
            "no n": [("n + tl.arange", "tl.arange")],
            "no k": [("k + tl.arange", "tl.arange")],
            "the block turned": [
                ("columns[None, :]", "columns[:, None]"),
                ("rows[:, None]", "rows[None, :]"),
                ("rows, columns, n_size, k_size)", "columns, rows, k_size, n_size)"),
            ],
            "twice": [("return tl", "return 2 * tl")],
            "the sign": [("return ", "return -")],
            "the stride in bytes": [("* down", "* down * 4")],
            "the next column": [
                ("rows[:, None] * along", "(rows[:, None] + 1) * along")
            ],
        },
    ),
    "9.4": table(
        UPDATE,
        {
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
    "9.5": table(
        LORA,
        {
            "all zeros": [("n, total,", "n, total * 0,")],
            "A for each block": [EACH, AGAIN],
            "low summed on": [EACH],
            "low lost": [AGAIN],
            "no scale": [("low * scale", "low")],
            "the scale of all": [
                ("low * scale", "low"),
                ("n, total,", "n, total * scale,"),
            ],
            "no update": [
                ("        total = dot(low * scale, tl.trans(b), total)\n", "")
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
