# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A Triton LoRA kernel
#
# **A single kernel (a function for a GPU) computes a matrix product with LoRA, and asks
# the memory for only `3` to `13 %` more bytes than the product alone. Only a clock on a
# GPU can tell whether this saves time.**
#
# **You need** notebook 04 and some PyTorch, and no GPU: kernels run on the CPU, in
# Triton's **interpreter**. (Triton has wheels for Linux only; elsewhere, read along.)
#
# **At the end you can**
#
# - write a Triton kernel with programs, tiles, masks and strides;
# - multiply matrices tile by tile, with a `float32` total;
# - count a kernel's bytes, and say which of them a cache can serve;
# - decide by arithmetic where a kernel could save time;
# - compute LoRA's output in one kernel that compiles for a GPU;
# - say why one rounding keeps small updates, and two lose them.
#
# **Only ten minutes?** Write `start("10", quick=True)` below and run all cells. Read
# "The result first", "The memory of a GPU" and "On trial: claim K1".

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # read at import: run kernels without a GPU

from peft_from_scratch.course import start

lesson = start("10")

# %%
import numpy as np
import torch
import triton
import triton.language as tl
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.course import access_picture, fusing, gpu_pictures
from peft_from_scratch.course import lora_bytes, roofline, roundings, runs
from peft_from_scratch.course.checks import triton_lora_kernel as checks
from peft_from_scratch.kernels import lora_linear
from peft_from_scratch.kernels.language import Tiles, dot, load, matrix, observed
from peft_from_scratch.kernels.language import rounded, store, within
from peft_from_scratch.kernels.lora import product
from peft_from_scratch.kernels.roofline import SHOWN as H100
from peft_from_scratch.kernels.trace import trace

# %% [markdown]
# ## The result first
#
# The course's kernel computes a LoRA projection of SmolLM2 from real activations, and
# agrees with PyTorch. $B$ is filled with noise: with LoRA's initial zeros, a wrong
# update would go unnoticed.
#
# PyTorch runs four **kernels** here: the products with $W$, $A$ and $B$, and a sum.
# Each reads its inputs from memory and writes its output back. A **fused** kernel
# does all of it in one launch (one call). A launch runs many **programs**, and each
# computes a part of $y$. A **tracer** records every load and store of the fused kernel.
# Their bytes, with all repeats, are the **issued bytes**.

# %%
model, tokenizer = lesson.load_model()
pfs.lora.inject(model, r=8, alpha=16, targets="all-linear")
layer = model.get_submodule("model.layers.0.mlp.down_proj")
nn.init.normal_(layer.B, std=0.02)
arrived = []
layer.register_forward_pre_hook(lambda _, inputs: arrived.append(inputs[0]))
sentence = "Ada orders two lamps and a chair, and wants them on Monday morning."
with torch.no_grad(), trace() as seen:
    model(**tokenizer(sentence, return_tensors="pt"))
    real = arrived[0][0], layer.base.weight, layer.A.detach(), layer.B.detach()
    y = lora_linear(*real, layer.scale, backend="triton")
    off = (y - layer(real[0])).abs().max() / y.abs().max()
print(f"one launch, {len({access.program for access in seen.accesses})} programs")
for name, tensor in zip("xWABy", (*real, y), strict=True):
    share = seen.bytes(tensor=name) / seen.bytes()
    times = f"{seen.bytes(tensor=name) / tensor.nbytes:4.1f} times its size"
    print(f"{name} {tuple(tensor.shape)!s:12} {times}, {share:5.1%} of issued bytes")
lesson.control("The fused kernel gives PyTorch's output, up to rounding.", off < 1e-5)

# %% [markdown]
# $A$ and $B$ cause less than a tenth of the issued bytes. Each of the 9 programs reads
# all of $x$, with or without LoRA.
#
# ## Idea one: one program for each tile
#
# Triton lets you write code for a whole **tile**, a piece of a tensor, instead of for
# single elements. (Names in code say *block*: `BLOCK`, `BM`.) A program loads tiles,
# computes, and stores a tile. All programs run the same code, and only their index
# differs. They may run in any order, so none may rely on another's result.
#
# - `kernel[grid]` launches the kernel; the **grid** is the number of programs;
# - `tl.program_id(0)` is the index of this program;
# - `tl.constexpr` marks an argument that is known when the kernel is compiled;
# - a tensor arrives as a **pointer**, the address of its first element.
#
# The first kernel adds `u` to `y`, with 64 elements for each of four programs. The cell
# prints the accesses of the first two.


# %%
@triton.jit
def add_into(y, u, BLOCK: tl.constexpr):
    """y += u, where both hold a whole number of tiles."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(y + at) + tl.load(u + at))


y, u = torch.arange(256.0), torch.ones(256)
with trace(y=y, u=u) as seen:
    add_into[(4,)](y, u, BLOCK=64)
assert torch.equal(y, torch.arange(256.0) + 1)
for a in seen.accesses[:6]:
    did = f"{a.kind}s {a.tensor}[{a.elements[0]} … {a.elements[-1]}]"
    print(f"program {a.program[0]} {did}")

# %% [markdown]
# `y + at` is a tile of pointers, and `tl.load` fetches what they point to. Triton does
# not check whether that still belongs to `y`.
#
# Below, `y` is the first 100 elements of a buffer of 128, and two programs of 64
# elements run. How many elements past the end of `y` does the kernel change? Before you
# run the cell, replace the two `None` by a range that you are `90 %` sure of, here and
# later.

# %%
lesson.predict("10.1", low=None, high=None, unit="elements past the end")

# %%
memory = torch.zeros(128)
y, u = memory[:100], torch.ones(128)
add_into[(2,)](y, u, BLOCK=64)
lesson.measured("10.1", int(memory[100:].count_nonzero()))
title = "Program 1 needs a mask: 28 of its elements do not exist"
figure = gpu_pictures.masked(len(y), 64, title)
lesson.show(figure, "Elements 0 to 99 exist. Elements 100 to 127 are past the end.")

# %% [markdown]
# The kernel changed 28 elements that do not belong to `y`, without an error. On a GPU,
# this corrupts another tensor or crashes the process later. The remedy is a **mask**, a
# boolean for each element. Where it is false, nothing is loaded or stored:
# `tl.load(pointers, mask=keep, other=0.0)`, `tl.store(pointers, values, mask=keep)`.
#
# ### Exercise 10.1: a sum with a mask
#
# Difficulty one of five, importance five of five, about five minutes. Write
# `out = x + y`. The arguments are pointers to vectors of `size` elements, all `float32`
# or all `float16`. Example: with `size = 100` and `BLOCK = 64`, program `1` writes
# elements `64` to `99`. The check rejects every read or write past the end.
#
# <details><summary>Hint one: a question</summary>
#
# Which positions of program `1` exist in the example?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `at` and `at < size` are both `(BLOCK,)`. Both loads and the store need the mask.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)`
#
# </details>


# %% tags=["exercise-10.1"]
@triton.jit
def my_add(x, y, out, size, BLOCK: tl.constexpr):
    """out = x + y, all of them `size` elements; program i computes the i-th tile."""
    ### BEGIN SOLUTION
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    total = tl.load(x + at, mask=keep) + tl.load(y + at, mask=keep)
    tl.store(out + at, total, mask=keep)
    ### END SOLUTION


# %% tags=["check-10.1", "points-1"]
checks.vector_add(my_add)

# %% [markdown]
# ## Idea two: a matrix product, tile by tile
#
# A kernel finds matrix elements by **strides**, so it can read plain, transposed and
# sliced matrices alike. A stride is a distance in memory, counted in elements: `down`
# to the next row, `along` to the next column.
#
# $$\text{address}(i, j) = \text{pointer} + i \cdot \text{down} + j \cdot \text{along}$$
#
# A matrix with 100 columns, stored row by row, has the strides `(100, 1)`. Its element
# `(2, 3)` is `203` elements after the first.
#
# The library passes a matrix as the triple `(pointer, down, along)`, made by
# `matrix(x)`. These helpers take such triples and vectors of indices:
#
# - `load(M, rows, columns, keep)` gives the tile of M, with zeros where `keep` is
#   false;
# - `store(M, rows, columns, values, keep)` writes a tile, rounded to M's dtype;
# - `within(rows, columns, height, width)` gives the mask of what lies inside;
# - `dot(a, b, total)` gives `total` + $a\,b$, summed in `float32`;
# - `rounded(values, dtype)` rounds a tile.
#
# The next kernel adds up each row, `BK` columns at a time.


# %%
@triton.jit
def row_sums(x, out, m_size, k_size, BM: tl.constexpr, BK: tl.constexpr):
    """out[i] = the sum of row i of x; a program for BM rows."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, k_size, BK):
        k = first + tl.arange(0, BK)
        total += tl.sum(load(x, m, k, within(m, k, m_size, k_size)), axis=1)
    tl.store(out + m, total, mask=m < m_size)


for rows in (torch.randn(40, 100), torch.randn(100, 40).T):
    sums = torch.empty(40)
    row_sums[(3,)](matrix(rows), sums, 40, 100, BM=16, BK=32)
    print(f"strides {rows.stride()}: off by {(sums - rows.sum(1)).abs().max():.0e}")

# %% [markdown]
# The sums of both matrices are right: the zeros past the edge do not change them.
#
# A product $y = x W^T$ needs the same loop over $k$, for two matrices. Program $(i, j)$
# computes the tile of $y$ in tile row $i$ and tile column $j$:
#
# $$y_{mn} = \sum_{k} x_{mk} W_{nk} \qquad
# \text{total} \mathrel{+}= x_{\text{BM} \times \text{BK}}\,
# W_{\text{BN} \times \text{BK}}^T$$
#
# ### The memory of a GPU
#
# A fast kernel rarely goes to the large, slow memory. A program runs on one of the
# GPU's processors, a **multiprocessor**.

# %%
title = "The closer a memory is to the arithmetic, the smaller it is"
figure = gpu_pictures.memory(title, f"NVIDIA {H100.name}. Sizes as NVIDIA states them.")
lesson.show(
    figure,
    "Each of 132 multiprocessors has registers (256 KiB), for the total of a tile, and "
    "shared memory (227 KiB), for tiles of x and W. All share the L2 cache (50 MB) and "
    "the HBM (80 GB, 3.35 TB/s).",
)

# %% [markdown]
# From here on, "memory" means **HBM** (high-bandwidth memory). The **L2 cache** keeps
# copies of recent reads. The total stays in **registers**, and always in `float32`. The
# next cell shows why: it adds up 8192 terms of 0.53 in two dtypes.

# %%
terms = torch.full((8192,), 0.53, dtype=torch.float16).numpy()
for kept in (np.float32, np.float16):
    print(f"{kept.__name__}: {np.add.accumulate(terms, dtype=kept)[-1]:,.0f}")

# %% [markdown]
# The `float32` sum is right, 4,340, but the `float16` sum stops at 2,048. There,
# neighboring `float16` values are `2` apart. A term of 0.53 is less than half this
# spacing, so each addition rounds back to 2,048.
#
# ### Exercise 10.2: the tiled product
#
# Difficulty three of five, importance five of five, about fifteen minutes. Write
# $y = x W^T$. `x` `(m, k)`, `W` `(n, k)` and `y` `(m, n)` are triples, all `float32` or
# all `float16`, of any sizes and strides. Keep the total in `float32`.
# `tl.program_id(0)` is the tile row, `tl.program_id(1)` the tile column;
# `tl.trans(tile)` transposes. Example: with `n = 100`, `m = 20`, `BM = 16`, `BN = 32`,
# program `(1, 3)` writes rows `16` to `19` of columns `96` to `99`.
#
# <details><summary>Hint one: a question</summary>
#
# Which second tile must the loop of `row_sums` load, and what replaces `tl.sum`?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The tiles of $x$ and $W$ are `(BM, BK)` and `(BN, BK)`; the total is `(BM, BN)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `m = tl.program_id(0) * BM + tl.arange(0, BM)`
#
# </details>


# %% tags=["exercise-10.2"]
@triton.jit
def my_product(x, W, y, m_size, n_size, k_size, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr):  # fmt: skip
    """y = x Wᵀ for matrices x (m, k), W (n, k), y (m, n); program (i, j): a tile."""
    ### BEGIN SOLUTION
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, k_size, BK):
        k = first + tl.arange(0, BK)
        part = load(x, m, k, within(m, k, m_size, k_size))
        wide = load(W, n, k, within(n, k, n_size, k_size))
        total = dot(part, tl.trans(wide), total)
    store(y, m, n, total, within(m, n, m_size, n_size))
    ### END SOLUTION


# %% tags=["check-10.2", "points-3"]
checks.tiled_product(my_product)

# %% [markdown]
# ### Who reads what
#
# The tile sizes decide how often a matrix is read. The library's `product` is the
# kernel of exercise 10.2 with more options: `sweep=1` gives each program one tile, and
# `group=1` numbers the programs row by row. Below, $y$ has three tile rows and six tile
# columns.

# %%
torch.manual_seed(0)
x, W, y = torch.randn(48, 64), torch.randn(96, 64), torch.empty(48, 96)
with trace() as plain:
    tiles = Tiles(m=16, n=16, k=32, sweep=1, group=1)
    product(x, matrix(W), 96, tiles=tiles, out=y)
tensors = dict(x=x, W=W, y=y)
shown = "Darker: read more often (y: written). Outlined: what program 1 uses."
look = dict(program=1, subtitle=shown)
title = "A tile of y needs its rows of x and its rows of W"
figure = access_picture.picture(plain, tensors, title=title, **look)
lesson.show(figure, access_picture.words(plain, tensors))

# %% [markdown]
# Each element of $x$ is read once for each tile column of $y$, and each element of $W$
# once for each tile row. Larger tiles mean fewer reads, until the registers are full.
#
# Issued bytes count each of these reads. **Distinct bytes** count each element once.
# Memory can deliver fewer bytes than are issued, because the cache serves repeated
# reads. Memory can also deliver more, in sectors of `32` bytes: single `float16`
# values, far apart, cost `16` times their size.
#
# The order of the programs decides how much they share in the cache. A GPU starts them
# roughly by index. In the **grouped order** of Triton's tutorials, programs go down
# four tile rows (`group=4`) before they move to the next column. The cell compares the
# distinct bytes of eight consecutive programs.

# %%
x, W, y = torch.randn(64, 32), torch.randn(128, 32), torch.empty(64, 128)
orders = {}
for group, name in {1: "row by row", 4: "in groups of four rows"}.items():
    with trace() as orders[name]:
        tiles = Tiles(m=16, n=16, k=32, sweep=1, group=group)
        product(x, matrix(W), 128, tiles=tiles, out=y)
needed = [access_picture.window_bytes(seen, 8) for seen in orders.values()]
for (name, seen), window in zip(orders.items(), needed, strict=True):
    print(f"{name:23} issued {seen.bytes('load'):,}; distinct for eight: {window:,.0f}")
print(f"{100 * (1 - needed[1] / needed[0]):.1f} % fewer distinct bytes")
shown = "Each box is a tile of y with the index of its program. Blue: 0 to 7."
title = "Grouped order: eight programs need a third fewer rows of x and W"
figure = access_picture.order_picture(orders, y, window=8, title=title, subtitle=shown)
lesson.show(figure, "The first eight programs: a row of tiles, or a patch four high.")

# %% [markdown]
# The distinct bytes fall by 33.3 %: eight programs need 64 rows of $x$ and 32 of $W$,
# instead of 16 and 128. The issued bytes stay the same.
#
# ## Idea three: count first, then fuse
#
# LoRA's update needs little arithmetic, but many bytes in separate kernels:
#
# $$y = x W^T + s\,(x A^T)\,B^T$$
#
# | symbol | shape | note |
# |---|---|---|
# | $x$, $W$, $y$ | $(m, k)$, $(n, k)$, $(m, n)$ | $W$ is frozen |
# | $A$, $B$ | $(r, k)$, $(n, r)$ | the rank $r$ is small |
# | $\text{low} = x A^T$; $h = s\,\text{low}$ | $(m, r)$ | scale $s = \alpha / r$ |
#
# **The matrix $B A$ is never built.** It is as large as $W$, and $x (B A)^T$ takes as
# much arithmetic as $x W^T$. The order $(x A^T) B^T$ takes $r\,(n + k) / (n k)$ of
# that: `6 %` for the sizes below.
#
# How many times the bytes of the plain product $x W^T$ do the four kernels issue?

# %%
lesson.predict("10.2", low=None, high=None, unit="times the plain product's bytes")

# %%
m, n, k, r, scale = 128, 256, 256, 8, 2.0
x, W, A, B = (torch.randn(s) for s in ((m, k), (n, k), (r, k), (n, r)))
cut = dict(m=32, n=32, k=64, group=4)
with trace() as plain:
    y, _ = product(x, matrix(W), n, tiles=Tiles(**cut))
with trace(y=y) as unfused:
    y, _ = product(x, matrix(W), n, tiles=Tiles(**cut))
    h, _ = product(x, matrix(A), r, tiles=Tiles(**cut), scale=scale)
    update, _ = product(h, matrix(B), n, tiles=Tiles(**cut))
    add_into[(m * n // 1024,)](y, update, BLOCK=1024)
expected = x @ W.T + scale * (x @ A.T @ B.T)
lesson.measured("10.2", unfused.bytes() / plain.bytes())
same = torch.allclose(y, expected, rtol=0, atol=1e-3)
lesson.control("The four kernels compute LoRA's output.", same)

# %% [markdown]
# The four kernels issue 1.34 times the bytes of the plain product. So `6 %` more
# arithmetic adds `34 %` more bytes: $x$ is read again, the update is written and read,
# and $y$ is read and written again.
#
# **How much this matters depends on the layer's size and on the cache.** A stronger
# rival has three kernels: its last product adds $h B^T$ to $y$ in place
# (`torch.addmm`).

# %%
widths = (256, 576, 1024, 2048, 4096)
table = lora_bytes.ratios(widths, m=4096, r=16)
low, *_, high = sorted(table[lora_bytes.FOUR]["distinct"])
title = f"Four kernels need {low:.1f} to {high:.1f} times the distinct bytes of x Wᵀ"
shown = "4,096 rows, rank 16, bf16. Distinct bytes: each element once in each launch."
figure = lora_bytes.curves(widths, table, title=title, subtitle=shown)
lesson.show(figure, lora_bytes.words(widths, table))

# %% [markdown]
# At 4,096 columns, all versions issue 1.05 to 1.08 times the bytes of $x W^T$, because
# this product itself reads $x$ and $W$ so often. In distinct bytes, four kernels need
# 2.67 times as many as $x W^T$, and three 2.01 times. With a real cache, the traffic is
# between issued and distinct bytes.
#
# ### A bound on the time
#
# Bytes cost time only where a launch waits for memory. A launch's **bound** is the
# least time that it can take:
#
# $$t \ge \max\left(\frac{\text{FLOPs}}{\text{peak}},\;
# \frac{\text{distinct bytes}}{\text{bandwidth}}\right)$$
#
# FLOPs are floating-point operations, `2` for each multiplication with its addition;
# both speeds come from the datasheet. If the left term is larger, the launch is
# **compute-bound**, and fewer bytes do not help; otherwise it is **memory-bound**. The
# bounds of several launches add up.
#
# ### Exercise 10.3: decide before you write a kernel
#
# Difficulty four of five, importance five of five, about twenty minutes. Compute the
# bounds of these versions, and decide whether fusing beats the stronger rival:
#
# - four kernels: $x W^T$; $h$; $u = h B^T$; $y + u$;
# - three kernels: $x W^T$; $h$; the last reads $y$, adds $h B^T$ and writes $y$;
# - fused: one launch reads $x$, $W$, $A$ and $B$, and writes $y$. Each program computes
#   `columns` columns of $y$, or what is left of its tile row. It also computes `low`
#   for its rows, so the FLOPs of `low` count once for each program: `ceil(n / columns)`
#   times in a tile row.
#
# **Bytes**: count the distinct bytes of each launch, two for each `bf16` value.
# **FLOPs**: count matrix products only; the sum $y + u$ and the scale add none.
#
# Return `(saving, choice)`. The saving is in percent of the stronger rival's bound,
# negative where fusing loses. The choice is `"fused"` from `5 %` on, else `"rival"`.
# Example: `my_choice(4096, 576, 576, 16, 128, 989.4e12, 3.35e12)` gives
# about `(56.3, "fused")`.
#
# <details><summary>Hint one: a question</summary>
#
# Which of the two rivals can never have the larger bound?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# A launch is a pair, FLOPs and bytes. The fused one has $2m\,(nk + p\,rk + nr)$ FLOPs,
# with $p$ programs in each tile row.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `bound = lambda *launches: sum(max(f / peak, b / bandwidth) for f, b in launches)`
#
# </details>


# %% tags=["exercise-10.3"]
def my_choice(m, n, k, r, columns, peak, bandwidth):
    """(saving in percent of the stronger rival's bound, "fused" or "rival")."""

    ### BEGIN SOLUTION
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
    ### END SOLUTION


# %% tags=["check-10.3", "points-4"]
checks.worth_fusing(my_choice)

# %% [markdown]
# Your function now shows where fusing pays. As in the library, each program computes
# 128 columns at rank 16, and 256 above.

# %%
choose = lesson.mine(my_choice, checks.fused_or_rival)
speeds = H100.matrix, H100.bandwidth
savings = {}
for r, columns in {16: 128, 32: 256, 64: 256}.items():
    widths = (576, 1024, 1536, 2048, 4096, 8192)
    savings[r] = {k: choose(4096, k, k, r, columns, *speeds)[0] for k in widths}
title = "Fusing pays for narrow layers, and costs time for very wide ones"
shown = f"4,096 rows, bf16, {H100.name}. Framed: 5 % or more."
figure = lora_bytes.grid(savings, worth=5, title=title, subtitle=shown)
ends = [f"{s[576]:.1f} to {s[8192]:.1f} % at rank {r}" for r, s in savings.items()]
lesson.show(figure, f"Saved, from 576 to 8,192 columns: {'; '.join(ends)}.")

# %% [markdown]
# At 4,096 columns and rank 64, the rival wins: for 256 columns of $y$, a fused program
# also computes 64 columns of `low`, `64 / 256 = 25 %` more arithmetic. Against four
# kernels, fusing would seem to save `7 %`. **The weaker rival reverses the decision.**
#
# ### Fuse
#
# While a program has a tile of $x$, it also loads the same columns of $A$, and adds up
# $\text{low} = x A^T$ in parallel with $x W^T$. A small product finishes the tile:
#
# $$\text{total} \mathrel{+}= (s \cdot \text{low})\, B_{\text{BN} \times r}^T$$
#
# Neither $h$ nor the update is written to memory.
#
# ### Exercise 10.4: finish the tile
#
# Difficulty one of five, importance five of five, about two minutes. Return the
# finished tile, `total + scale · low Bᵀ`. `total` `(BM, BN)` and `low` `(BM, RANK)`
# are `float32` tiles; `low` is not scaled yet. `B` is the triple of a matrix
# `(n_size, r)`; here `n` is a vector, the `BN` row indices of $B$ for this tile. `RANK`
# is `r` rounded up to a power of two, at least `16`. The columns of `low` from `r` on
# are zero; $B$ has only `r` columns. A GPU multiplies operands of one dtype, so round
# the scaled `low` to the dtype of $B$, `B[0].dtype.element_ty`. Example: for `r = 5`,
# `RANK` is `16`.
#
# <details><summary>Hint one: a question</summary>
#
# Which helper gives the mask for `RANK` columns where $B$ has only `r`?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The tile of $B$ is `(BN, RANK)`; `dot` needs `(RANK, BN)`, and takes a total.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `rank = tl.arange(0, RANK)`
#
# </details>


# %% tags=["exercise-10.4"]
@triton.jit
def my_update(total, low, B, n, n_size, r, scale, RANK: tl.constexpr):
    """total + scale · low Bᵀ: (BM, BN), from low (BM, RANK) and a matrix B (n, r)."""
    ### BEGIN SOLUTION
    rank = tl.arange(0, RANK)
    b = load(B, n, rank, within(n, rank, n_size, r))
    return dot(rounded(low * scale, B[0].dtype.element_ty), tl.trans(b), total)
    ### END SOLUTION


# %% tags=["check-10.4", "points-1"]
checks.fused_update(my_update)

# %% [markdown]
# ### One program, several tiles
#
# Each program of a tile row reads all of $A$. The remedy is **coarsening**: a program
# computes several neighboring tiles in turn, and `low` only for the first. The library
# calls this a **sweep**.

# %%
print(f"{'':18} {'bytes':>9}   times the plain product's")
rows = {"plain x W^T": plain, "four kernels": unfused}
for sweep in (1, 2, 4, 8):
    with trace() as fused:
        tiles = Tiles(**cut, sweep=sweep)
        y, _ = product(x, matrix(W), n, A=A, B=B, scale=scale, tiles=tiles)
    assert torch.allclose(y, expected, rtol=0, atol=1e-3)
    rows[f"fused, sweep of {sweep}"] = fused
for name, seen in rows.items():
    print(f"{name:18} {seen.bytes():9,}   {seen.bytes() / plain.bytes():.3f}")

# %% [markdown]
# A sweep of 8 brings the fused kernel from 1.132 down to 1.029 times the plain
# product's bytes. But a long sweep leaves fewer programs, and all multiprocessors need
# work.

# %%
x, W, A, B = (torch.randn(s) for s in ((48, 64), (96, 64), (8, 64), (96, 8)))
y, tiles = torch.empty(48, 96), Tiles(m=16, n=16, k=32, sweep=3, group=1)
with trace() as fused:
    product(x, matrix(W), 96, A=A, B=B, tiles=tiles, out=y)
tensors = dict(x=x, W=W, A=A, B=B, y=y)
title = "Fused: A is read along with W, for the first of three tiles only"
figure = access_picture.picture(fused, tensors, title=title, **look)
lesson.show(figure, access_picture.words(fused, tensors))

# %% [markdown]
# $x$ and $W$ are read as often as without LoRA. $A$ is read 6 times instead of
# `18`: by two programs in each of three tile rows.
#
# ### What a compiler says, without a GPU
#
# **A kernel that passes the interpreter may not compile.** Triton can compile for a GPU
# that is not there. It refuses a product of a `float32` and a `bf16` tile, and one with
# an inner size below `16`. The compiler also counts
#
# - **registers** of a **thread**, one of many that share a program's work (NVIDIA
#   allows `255`), and **spilled** bytes, which did not fit and go to memory, slowly;
# - the **matrix instructions**, which multiply two small tiles at once.
#
# ### Exercise 10.5: fuse it, and be judged by bytes
#
# Difficulty four of five, importance five of five, about twenty-five minutes. Write the
# whole kernel, for triples of matrices. Program `(i, j)` computes `SWEEP` tiles, in
# tile row `i` and the tile columns `j * SWEEP + step`. Tiles past the edge need no
# special case. Example: with `BN = 32` and `SWEEP = 4`, program `(0, 1)` computes
# columns `128` to `255`. `RANK` is as in exercise 10.4, and you may call `my_update`.
#
# The compiler writes the loop `for step in tl.static_range(SWEEP)` out in full, and
# decides `if step == 0` itself. So this `if` costs no time when the kernel runs. Lines
# under it may assign to `low`, also inside the loop over $k$.
#
# Your kernel may issue at most `1.1` times the bytes of the plain product, so it cannot
# read $A$ for every tile. The check runs it on `float32` matrices, and compiles it in
# `bf16` for an A100 (`sm_80`) and an H100 (`sm_90`).
#
# <details><summary>Hint one: a question</summary>
#
# Which of `total` and `low` starts at zero for each tile, and which for each program?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `low` is `(BM, RANK)`, the tile of $A$ is `(RANK, BK)`. The loop over `step` goes
# around that of exercise 10.2; the lines of exercise 10.4 follow the inner loop.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `m, rank = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RANK)`
#
# </details>


# %% tags=["exercise-10.5"]
@triton.jit
def my_lora(x, W, A, B, y, m_size, n_size, k_size, r, scale, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr,
            SWEEP: tl.constexpr):  # fmt: skip
    """y = x Wᵀ + scale · (x Aᵀ) Bᵀ; program (i, j): SWEEP neighboring tiles."""
    ### BEGIN SOLUTION
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
    ### END SOLUTION


# %% tags=["check-10.5", "points-4"]
checks.fewest_bytes(my_lora)

# %%
fuse = lesson.mine(my_lora, checks.our_lora)
x, W, A, B = real
y, sizes = torch.empty(len(x), len(W)), (len(x), len(W), x.shape[1], len(A))
with torch.no_grad(), trace(x=x, W=W, A=A, B=B, y=y) as seen:
    given = *map(matrix, (x, W, A, B, y)), *sizes, layer.scale
    fuse[(1, 3)](*given, BM=16, BN=64, BK=64, RANK=16, SWEEP=3)
    off = (y - layer(x)).abs().max() / y.abs().max()
times = seen.bytes(tensor="A") / A.nbytes
print(f"error {off:.0e} of the largest output; A is read {times:.0f} times")
lesson.control("This kernel gives PyTorch's output, up to rounding.", off < 1e-5)

# %% [markdown]
# With a sweep of three, SmolLM2's projection reads $A$ 3 times: once in each program.
#
# ## Idea four: backward, with the same kernel
#
# Most of the backward pass needs no new kernel. With $g$ for the gradient that arrives
# at $y$, training needs
#
# $$\frac{\partial L}{\partial x} = g W + s\,(g B) A \qquad
# \frac{\partial L}{\partial A} = s\,(g B)^T x \qquad
# \frac{\partial L}{\partial B} = s\,g^T (x A^T)$$
#
# For the first one, replace $x$ by $g$, $W$ by $W^T$, $A$ by $B^T$ and $B$ by $A^T$:
# then $x W^T + s\,(x A^T)\,B^T$ becomes $g W + s\,(g B) A$. The same kernel computes
# it, and a transpose only swaps two strides. Both launches keep their scaled `low`,
# $s\,x A^T$ and $s\,g B$, for the other two gradients.
#
# These two are small, but sums over thousands of rows. One program would leave the GPU
# idle. With **split-K**, each program sums a part of the rows, and a second kernel adds
# up the partial sums.

# %%
title = "Split-K: three programs sum a third of the rows each"
figure = gpu_pictures.split_sum(192, 3, ("g B", "x", "gradient of A"), title)
lesson.show(figure, "Each program makes a partial sum; a second kernel adds the three.")

# %%
x, W, A, B = (torch.randn(s) for s in ((192, 64), (96, 64), (8, 64), (96, 8)))
trained = [t.requires_grad_() for t in (x, A, B)]
g, launches = torch.randn(192, 96), []


def gradients(backend):
    y = lora_linear(x, W, A, B, scale, backend=backend)
    return torch.autograd.grad(y, trained, g)


with observed(launches.append):
    ours = gradients("triton")
made = ("y", *(f"gradient of {name}" for name in "xAABB"))
for result, launch in zip(made, launches, strict=True):
    print(f"{result:13}  {launch.kernel.fn.__name__:11} grid {launch.grid}")
for name, mine, theirs in zip("xAB", ours, gradients("torch"), strict=True):
    off = (mine - theirs).abs().max() / theirs.abs().max()
    print(f"gradient of {name}: off by {off:.0e} of its largest entry")
again = all(map(torch.equal, ours, gradients("triton")))
lesson.control("Our kernels, run twice, give equal bits.", again)

# %% [markdown]
# All gradients agree with PyTorch's. The grid of `_over_rows` counts the tile rows and
# tile columns of the gradient, and the 3 partial sums; `_add_up` adds these.
#
# With **atomic additions**, many programs add to one element, without a second kernel.
# But their order changes from run to run, and so do the last bits of the sum.
#
# ## On trial: claim K1
#
# **The claim, K1 in the course's list: fusing the LoRA product into one kernel makes it
# faster.** No GPU has timed our kernel, so the claim cannot be tested here. Instead, we
# compute the bound of exercise 10.3 for the library's own launches. A tile that an edge
# cuts off costs a full tile's FLOPs there.
#
# The least time also sets a **speed limit**: the FLOPs that $y$ needs, without repeats,
# divided by that time. The line of a **roofline** is this limit, drawn against the
# **intensity**, the FLOPs for each byte. A point is one product; it lies below the line
# where it repeats work. At its corner, arithmetic and memory take equal time: for an
# H100, at `295` FLOPs for each byte.

# %%
lesson.show(roofline.figure(devices=[H100]), roofline.alt(devices=[H100]))

# %% [markdown]
# **The rule** counts the cases in which fusing lowers the bound on the time by 5 % or
# more, compared with the four kernels. A case is a layer's size, a number of rows, a
# rank and a GPU. (A model that generates text for one user has a single row.) The
# rule's three verdicts need a measured time, so none of them applies.
#
# In how many percent of the cases is the bound so much lower? After your guess, a table
# splits them by size and rival.

# %%
lesson.rule("K1")
lesson.predict("10.3", low=None, high=None, unit="% of the cases")

# %%
config = fusing.config()
run = runs.Run("live", config, fusing.compute(config), {})
sizes = {"SmolLM2's": (576, 1536), "4096 x 4096": (4096,)}
four, three = (np.array(run.result[how]) for how in ("in_four", "in_three"))
lesson.control("Three kernels have no larger bound than four.", (three <= four).all())
rows, width = np.array(config["shapes"]).T[:2]
rest = "cases of all rows with 5 % or more"
print(f"{'fusing saves':27} {'%, 4,096 rows':15}   {rest}")
for size, here in sizes.items():
    for rival, each in {"four": four, "three": three}.items():
        every = each[np.isin(width, here)]
        many = each[np.isin(width, here) & (rows == 4096)]
        worth = f"{(every >= 5).sum()} of {every.size}"
        span = f"{many.min():3.0f} to {many.max():2.0f}"
        print(f"{size:11} against {rival:5}   {span:15}   {worth}")
r64 = three[(width == 4096) & (rows == 4096), config["ranks"].index(64)]
print(f"4096 x 4096, rank 64, against three: {r64.min():.1f} to {r64.max():.1f} %")

# %% [markdown]
# **The bound at 4096 x 4096, the width of a 7B model, is the figure that counts.**
# There, fusing saves 5 % or more in 29 of 108 cases against four kernels, and in 13
# against three. At rank 64 and 4,096 rows, the fused bound is *higher* than that of
# three kernels on all six GPUs.
#
# The next cell prints the share over all cases, three quarters of which have SmolLM2's
# sizes. Below it stands the verdict of the **shipped runs**, which come with the
# course.

# %%
found = fusing.measured([run])
lesson.measured("10.3", found.value)
lesson.live("K1", found.value, found.low, found.high)

# %% tags=["nbval-check-output"]
lesson.verdict("K1")

# %% [markdown]
# Do not choose a fused kernel because of this lesson. Time it on a GPU at your own size
# and rank, also against three kernels. The bound leaves out what fewer launches save.
#
# **Others have timed LoRA kernels.** [LoRAFusion](https://arxiv.org/abs/2510.00206)
# computes $h$ first and adds $h B^T$ inside the large product. It reports kernels
# `1.27` times as fast on average.
#
# ## On trial: claim K2
#
# Our kernel adds the update to a `float32` total, and rounds the sum once. Most
# libraries add it to a finished `bf16` output. So they round twice.
#
# For example, let the values of a format be `1` apart, and let the update be `0.2`. An
# output of `3.4` is rounded to `3`. Then `3 + 0.2` is rounded back to `3`, whatever the
# output was: the update is lost. With one rounding, `3.4 + 0.2` becomes `4`. Two of ten
# outputs cross the middle in this way, and move by `1`. On average, that is `0.2`.
#
# **Claim K2: in `bf16`, two roundings lose small updates, and one rounding keeps
# them.** The rule compares test losses after eight optimizer steps at a rate of `1e-4`,
# the lowest that our textbook has for LoRA. The **control** is a rate of `3e-3`, where
# updates are large. A **unit in the last place** is the distance between two values of
# `bf16` at an output.
#
# The cell trains `tiny`, a language model of a million parameters, with two seeds.

# %%
lesson.rule("K2")
lived = []
for lr in roundings.RATES:
    asked = [(way, seed) for way in roundings.WAYS for seed in (0, 1)]
    each = [roundings.config("tiny", way, lr, seed) for way, seed in asked]
    lived += [runs.Run("live", one, roundings.compute(one), {}) for one in each]
    twice, once = (roundings.of_way(lived, way, lr) for way in ("twice", "once"))
    shares = [100 * roundings.middle(own, "kept") for own in (twice, once)]
    size = roundings.middle(once, "size")
    print(f"rate {lr:g}: the update has {size:.1f} units in the last place;", end=" ")
    print("two roundings keep {:.0f} %, one {:.0f} %".format(*shares))
curves = {}
for way in roundings.WAYS:
    own = roundings.of_way(lived, way, roundings.SMALL)
    curves[way] = np.mean([run.result["losses"] for run in own], 0)
learned = curves["float32"][0] - curves["float32"][1:]
behind = 100 * (curves["twice"] - curves["once"])[1:] / learned
print("of the training loss, lost after 1, 2, … steps at 1e-4, in %:", behind.round())
lost = roundings.lost(lived, roundings.LARGE)[0]
lesson.control("Large updates survive two roundings.", abs(lost) < roundings.SAME)
lesson.live("K2", *roundings.lost(lived, roundings.SMALL), scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("K2")

# %% [markdown]
# On `tiny`, two roundings lose 25 % of what `float32` learns in eight steps at `1e-4`.
# One rounding loses nothing. The first step loses most of its learning. Later updates
# are larger, so two roundings catch up. At `3e-3`, the control, both ways learn alike.
#
# So a kernel that adds before it rounds does not only save time.
#
# ## Quiz
#
# **1. A kernel is right for multiples of its tile sizes, and sometimes wrong otherwise.
# Where do you look?**
#
# <details><summary>At the masks</summary>
#
# Right. The last tile reaches past the edge.
#
# </details>
# <details><summary>At the grid: too few programs</summary>
#
# No. Tiles of $y$ would be missing every time.
#
# </details>
# <details><summary>At the dtype of the total</summary>
#
# No. Rounding does not depend on tiles.
#
# </details>
#
# **2. What did the grouped order change?**
#
# <details><summary>The issued bytes</summary>
#
# No. Each program reads what it read before.
#
# </details>
# <details><summary>The result, slightly</summary>
#
# No. Each tile is computed as before.
#
# </details>
# <details><summary>The distinct bytes of consecutive programs</summary>
#
# Right. A cache can serve what they share.
#
# </details>
#
# **3. What of LoRA does the fused kernel write to memory during inference?**
#
# <details><summary>The update</summary>
#
# No. It is added in registers.
#
# </details>
# <details><summary>Nothing: only y is written</summary>
#
# Right. Training also keeps $h$, for the gradient of $B$.
#
# </details>
# <details><summary>h, for other programs</summary>
#
# No. Programs share nothing; each computes `low`.
#
# </details>
#
# **4. (From notebook 08.) The base weights are stored as four-bit codes. Where would
# $W'$, the decoded weights, be in our kernel?**
#
# <details><summary>In memory</summary>
#
# No. A fused kernel needs no such buffer.
#
# </details>
# <details><summary>In registers, a tile at a time</summary>
#
# Right. Loading $W$ also decodes it.
#
# </details>
# <details><summary>Nowhere: codes are multiplied</summary>
#
# No. A code is only the index of a value.
#
# </details>
#
# **5. (From notebook 04.) A model with one LoRA is served for months. What beats any
# LoRA kernel?**
#
# <details><summary>A larger rank</summary>
#
# No. That means more arithmetic and bytes.
#
# </details>
# <details><summary>Merging the update into W</summary>
#
# Right. Kernels are for training, many adapters, or four bits.
#
# </details>
# <details><summary>Leaving out the scale</summary>
#
# No. The result would be wrong.
#
# </details>
#
# ## Limits
#
# - **No GPU.** The bound assumes that each launch starts with an empty cache, but the
#   previous launch may have left inputs there.
# - **`bf16`.** Triton's interpreter [does not support
#   it](https://triton-lang.org/main/programming-guide/chapter-3/debugging.html).
# - **Other projects.** Unsloth's `matmul_lora` runs three kernels: $x W^T$, $x A^T$ and
#   an `addmm_`.
#
# ## Your guesses
#
# Nine of ten ranges should hold the measured value.

# %%
lesson.calibration()

# %% [markdown]
# ## Receipt

# %%
lesson.receipt()

# %% [markdown]
# ## Where to go next
#
# - Triton's [tutorial on matrix
#   multiplication](https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html).
# - Williams, Waterman and Patterson, *Roofline: an insightful visual performance model
#   for multicore architectures*.
# - Dao et al., [FlashAttention](https://arxiv.org/abs/2205.14135).
# - Chen et al., [Punica](https://arxiv.org/abs/2310.18547).
