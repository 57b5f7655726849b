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
# **A single kernel (a function for a GPU) adds LoRA to a matrix product and moves only
# `3` to `13 %` more bytes than without LoRA. Only a clock on a GPU can tell whether
# this saves time.**
#
# **You need** notebook 04 and some PyTorch, and no GPU: kernels run on the CPU, in
# Triton's **interpreter**. (Triton has wheels for Linux only; elsewhere, read along.)
#
# **At the end you can**
#
# - write a Triton kernel with programs, tiles, masks and strides;
# - multiply matrices tile by tile, with the total in `float32`, and say why;
# - count the bytes that a kernel asks for, and say what a cache can serve;
# - compute the product and LoRA's update in one kernel, and state its cost in bytes;
# - say what interpreter and compiler can tell you without a GPU;
# - judge by arithmetic where this could save time, and compared with what.
#
# **Only ten minutes?** Write `start("10", quick=True)` below and run all cells. Read
# "The result first", "The memory of a GPU" and "On trial: claim K1".

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # read at import: run kernels without a GPU

from peft_from_scratch.course import start

lesson = start("10")

# %%
import json

import numpy as np
import peft
import torch
import triton
import triton.language as tl
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.course import access_picture, fusing, roofline, runs
from peft_from_scratch.course.checks import triton_lora_kernel as checks
from peft_from_scratch.kernels import gpu_targets, lora_linear
from peft_from_scratch.kernels.language import (
    Tiles,
    dot,
    load,
    matrix,
    observed,
    store,
    within,
)
from peft_from_scratch.kernels.lora import product
from peft_from_scratch.kernels.trace import trace

# %% [markdown]
# ## The result first
#
# The course's kernel computes a LoRA projection of SmolLM2, and its result agrees with
# PyTorch's. The inputs are real activations. $B$ is filled with noise, because LoRA
# initializes $B$ to zero, and then a wrong update would go unnoticed.

# %%
model, tokenizer = lesson.load_model()
pfs.lora.inject(model, r=8, alpha=16, targets="all-linear")
layer = model.get_submodule("model.layers.0.mlp.down_proj")
nn.init.normal_(layer.B, std=0.02)
arrived = []
layer.register_forward_pre_hook(lambda _, inputs: arrived.append(inputs[0]))
sentence = "Ada orders two lamps and a chair, and wants them on Monday morning."
with torch.no_grad():
    model(**tokenizer(sentence, return_tensors="pt"))
x, W, A, B = arrived[0][0], layer.base.weight, layer.A.detach(), layer.B.detach()
print(f"x {tuple(x.shape)}, W {tuple(W.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}")

# %% [markdown]
# PyTorch runs four kernels here: the products with $W$, $A$ and $B$, and a sum. Each
# one reads its inputs from memory and writes its output back. A **fused** kernel does
# all of it in one launch (one call). A launch runs many **programs**, and each
# computes a part of $y$. A **tracer** records every load and store of the fused kernel:

# %%
with torch.no_grad(), trace() as seen:
    y = lora_linear(x, W, A, B, layer.scale, backend="triton")
    off = (y - layer(x)).abs().max() / y.abs().max()
programs = len({access.program for access in seen.accesses})
print(f"one launch, {programs} programs; error {off:.0e} of the largest output")
for name, tensor in {"x": x, "W": W, "A": A, "B": B, "y": y}.items():
    share = seen.bytes(tensor=name) / seen.bytes()
    times = seen.bytes(tensor=name) / tensor.nbytes
    print(f"{name}: moved {times:4.1f} times, {share:5.1%} of all moved bytes")

# %% [markdown]
# The output is PyTorch's up to rounding, and $A$ and $B$ cause less than a tenth of all
# moved bytes. Each of the 9 programs reads all of $x$, with or without LoRA.
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
for access in seen.accesses[:6]:
    first, last = access.elements[0], access.elements[-1]
    did = f"{access.kind}s {access.tensor}[{first} … {last}]"
    print(f"program {access.program[0]} {did}")

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

# %% [markdown]
# The kernel changed 28 elements that do not belong to `y`, without an error. On a GPU,
# this corrupts another tensor or crashes the process later. The remedy is a **mask**, a
# boolean for each element. Where it is false, nothing is loaded or stored:
# `tl.load(pointers, mask=keep, other=0.0)`, `tl.store(pointers, values, mask=keep)`.
#
# ### Exercise 10.1: a sum with a mask
#
# Difficulty one of five, importance five of five, about ten minutes. Write
# `out = x + y`. The arguments are pointers to vectors of `size` elements, all `float32`
# or all `float16`, of any `size`. Example: with `size = 100` and `BLOCK = 64`, program
# `1` writes elements `64` to `99`. The check rejects every read or write past the end.
#
# <details><summary>Hint one: a question</summary>
#
# Which positions of program `1` exist in the example? Which comparison says so?
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
    """out = x + y, all of them `size` numbers; program i does the i-th block."""
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
# `matrix(x)`. Four helpers take such triples and vectors of indices:
#
# - `load(M, rows, columns, keep)` gives the tile of M, with zeros where `keep` is
#   false;
# - `store(M, rows, columns, values, keep)` writes a tile, rounded to M's dtype;
# - `within(rows, columns, height, width)` gives the mask of what lies inside;
# - `dot(a, b, total)` gives `total` + $a\,b$, summed in `float32`.
#
# The next kernel adds up each row of a matrix, `BK` columns at a time.


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
# Both matrices come out right; the second is a transposed view, with the strides
# `(1, 40)`. The zeros that `load` fills in past the edge do not change a sum.
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
# GPU's processors, a **multiprocessor**; an NVIDIA H100 has `132`. From fast to slow,
# its memories are:
#
# | memory | belongs to | size | holds here |
# |---|---|---|---|
# | **registers** | a multiprocessor | `256 KiB` | the total of a tile |
# | **shared memory** | a multiprocessor | `227 KiB` | tiles of $x$ and $W$ |
# | **L2 cache** | the GPU | `50 MB` | copies of recent reads |
# | **HBM** (high-bandwidth memory) | the GPU | `80 GB`, `3.35 TB/s` | all matrices |
#
# From here on, "memory" means HBM. The total stays in registers, and always in
# `float32`. The next cell shows why: it adds up 8192 terms of 0.53 in two dtypes.

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
# Difficulty three of five, importance five of five, about twenty minutes. Write
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
    """y = x Wᵀ for matrices x (m, k), W (n, k), y (m, n); program (i, j): a block."""
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
# kernel of exercise 10.2 with more options: `sweep=1` gives each program one tile,
# `group=1` orders them row by row. Below, $y$ has three tile rows and six tile columns.
# How often is each element of $x$ read?

# %%
lesson.predict("10.2", low=None, high=None, unit="reads of each element")

# %%
torch.manual_seed(0)
x, W = torch.randn(48, 64), torch.randn(96, 64)
y, blocks = torch.empty(48, 96), Tiles(m=16, n=16, k=32, sweep=1, group=1)
with trace() as plain:
    product(x, matrix(W), 96, tiles=blocks, out=y)
lesson.measured("10.2", plain.bytes(tensor="x") / x.nbytes)

# %%
tensors = dict(x=x, W=W, y=y)
figure = access_picture.picture(
    plain,
    tensors,
    program=1,
    title="A tile of y needs its rows of x and its rows of W",
    subtitle="Darker: read more often (y: written). Outlined: what program 1 uses.",
)
said = access_picture.words(plain, tensors)
lesson.show(figure, f"Reads of each element (y: writes; 6 x: 6 times): {said}.")

# %% [markdown]
# Each element of $x$ is read 6 times, once for each tile column of $y$, and each
# element of $W$ 3 times, once for each tile row. Larger tiles mean fewer reads, until
# the registers are full. We tell two counts apart:
#
# - **issued bytes**: all that the programs load and store;
# - **distinct bytes**: each element counted once.
#
# Memory can deliver fewer bytes than are issued, because the cache serves repeated
# reads. It can deliver more, because it moves sectors of `32` bytes: single `float16`
# values, far apart, cost `16` times their size.
#
# ### The order of the programs
#
# The order of the programs decides how much they share in the cache. A GPU starts them
# roughly by index. Row by row, programs 0 to 7 compute the first tile row of the next
# $y$, from one tile row of $x$ and eight of $W$.
#
# In the **grouped order** of Triton's tutorials, programs go down four tile rows before
# they move to the next column. By how many percent do the distinct bytes of eight
# consecutive programs fall?

# %%
lesson.predict("10.3", low=None, high=None, unit="% fewer bytes")

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
lesson.measured("10.3", 100 * (1 - needed[1] / needed[0]))

# %%
figure = access_picture.order_picture(
    orders,
    y,
    window=8,
    title="The same tiles, numbered in another order",
    subtitle="Each box is a tile of y with the index of its program. Blue: 0 to 7.",
)
lesson.show(figure, "The first eight programs: a row of tiles, or a patch four high.")

# %% [markdown]
# The distinct bytes fall by 33.3 %: eight programs now need four tile rows of $x$ and
# two of $W$. The issued bytes stay the same.
#
# ### A weight that is stored transposed
#
# A kernel needs no transposed copy of a weight, because a transpose only swaps two
# strides. GPT-2's `Conv1D`, from notebook 04, stores its weight as $(d_{in}, d_{out})$.
# The library's kernel takes a **reader**, a function that loads a tile of $W$, so you
# only write another reader.
#
# ### Exercise 10.3: read a transposed weight
#
# Difficulty two of five, importance three of five, about fifteen minutes. `W` is the
# triple of a `Conv1D` weight, with `k_size` rows and `n_size` columns. The numbers `n`
# and `k` are the indices at which the tile begins. Return the tile of $W^T$, of shape
# `(BN, BK)`: its element `(i, j)` is `W[k + j, n + i]`, or `0.0` outside of the matrix.
# Example: with `n = 32` and `k = 0`, the first row is the start of `W`'s column `32`.
#
# <details><summary>Hint one: a question</summary>
#
# One column to the right in the tile is one *row* down in `W`. Which stride is that?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `rows[:, None]` is `(BN, 1)`, `columns[None, :]` is `(1, BK)`, their sum `(BN, BK)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `rows, columns = n + tl.arange(0, BN), k + tl.arange(0, BK)`
#
# </details>


# %% tags=["exercise-10.3"]
@triton.jit
def my_reader(W, n, k, n_size, k_size, BN: tl.constexpr, BK: tl.constexpr):
    """The tile of Wᵀ, (BN, BK), at row n and column k; W is (k_size, n_size)."""
    ### BEGIN SOLUTION
    pointer, down, along = W
    rows, columns = n + tl.arange(0, BN), k + tl.arange(0, BK)
    at = pointer + columns[None, :] * down + rows[:, None] * along
    return tl.load(at, mask=within(rows, columns, n_size, k_size), other=0.0)
    ### END SOLUTION


# %% tags=["check-10.3", "points-2"]
checks.conv1d_reader(my_reader)

# %% [markdown]
# ## Idea three: count LoRA's bytes, then fuse
#
# LoRA's update needs little arithmetic, but many bytes in separate kernels:
#
# $$y = x W^T + s\,(x A^T)\,B^T$$
#
# | symbol | shape | note |
# |---|---|---|
# | $x$, $W$, $y$ | $(m, k)$, $(n, k)$, $(m, n)$ | $W$ is frozen |
# | $A$, $B$ | $(r, k)$, $(n, r)$ | the rank $r$ is small |
# | $h = s\,x A^T$ | $(m, r)$ | $s$ is the scale, $\alpha / r$ |
#
# **The matrix $B A$ is never built.** It is as large as $W$, training would rebuild it
# after every optimizer step, and $x (B A)^T$ takes as much arithmetic as $x W^T$. The
# order $(x A^T) B^T$ takes $r\,(n + k) / (n k)$ of that: `6 %` for the sizes below.
#
# How many times the bytes of the plain product $x W^T$ do the four kernels issue?

# %%
lesson.predict("10.4", low=None, high=None, unit="times the plain product's bytes")

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
assert torch.allclose(y, expected, rtol=0, atol=1e-3)
lesson.measured("10.4", unfused.bytes() / plain.bytes())

# %% [markdown]
# The four kernels issue 1.34 times the bytes of the plain product. So `6 %` more
# arithmetic adds `34 %` more bytes: $x$ is read again, the update is written and read,
# and $y$ is read and written again.
#
# **The `34 %` overstates the cost in real layers.** Each tile of $y$ needs a loop
# over $k$, so the plain product's bytes grow with $m n k$. Most extra bytes are for $y$
# and the update, which have $m n$ elements. As multiples of the plain product, the same
# tiles give:
#
# | $n = k$ | `256` | `576` | `1024` | `4096` |
# |---|---|---|---|---|
# | four kernels | `1.34` | `1.16` | `1.09` | `1.02` |
# | fused, four tiles for each program | `1.04` | `1.04` | `1.03` | `1.03` |
#
# At 4096, the fused kernel issues *more* bytes than the four kernels, because each of
# its programs reads all of $A$. The cache can serve such repeated reads, so "On trial"
# below counts distinct bytes.
#
# **Fusing reuses a tile that is already loaded.** While a program has a tile of $x$, it
# also loads the same columns of $A$, and adds up $\text{low} = x A^T$ in parallel with
# $x W^T$. A small product finishes the tile:
#
# $$\text{total} \mathrel{+}= (s \cdot \text{low})\, B_{\text{BN} \times r}^T$$
#
# Neither $h$ nor the update is written to memory.
#
# ### Exercise 10.4: finish the block
#
# Difficulty two of five, importance five of five, about ten minutes. Return the
# finished tile, `total + scale · low Bᵀ`. `total` `(BM, BN)` and `low` `(BM, RANK)` are
# `float32` tiles; `low` is not scaled yet. `B` is the triple of a `float32` matrix
# `(n_size, r)`. Here `n` is a vector, the `BN` row indices of $B$ for this tile. `RANK`
# is `r` rounded up to a power of two, at least `16`. Example: with `r = 5`, columns `5`
# to `15` of `low` are zero, and $B$ has no such columns.
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
    return dot(low * scale, tl.trans(b), total)
    ### END SOLUTION


# %% tags=["check-10.4", "points-2"]
checks.fused_update(my_update)

# %% [markdown]
# ### One program, several tiles
#
# All programs of a tile row compute the same `low`, and each reads all of $A$. The
# remedy is **thread coarsening**: a program computes several neighboring tiles in turn,
# and `low` only for the first. The library calls this a **sweep**. The cell counts
# sweeps of 1 to 8 tiles.

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
# work. The picture shows a sweep of three.

# %%
x, W, A, B = (torch.randn(s) for s in ((48, 64), (96, 64), (8, 64), (96, 8)))
y, tiles = torch.empty(48, 96), Tiles(m=16, n=16, k=32, sweep=3, group=1)
with trace() as fused:
    product(x, matrix(W), 96, A=A, B=B, tiles=tiles, out=y)
tensors = dict(x=x, W=W, A=A, B=B, y=y)
figure = access_picture.picture(
    fused,
    tensors,
    program=1,
    title="Fused: A is read along with W, for the first of three tiles only",
    subtitle="Darker: read more often (y: written). Outlined: what program 1 uses.",
)
said = access_picture.words(fused, tensors)
lesson.show(figure, f"Fused: reads of each element (y: writes; 6 x: 6 times): {said}.")

# %% [markdown]
# $x$ and $W$ are read exactly as often as without LoRA. Each tile repeats the loop over
# $k$, so a sweep saves no read of $x$. $A$ is read 6 times instead of `18`: by two
# programs in each of three tile rows.
#
# ### Exercise 10.5: fuse it, and be judged by bytes
#
# Difficulty four of five, importance five of five, about thirty minutes. Write the
# whole kernel, for triples of `float32` matrices. Program `(i, j)` computes `SWEEP`
# tiles, in tile row `i` and the tile columns `j * SWEEP + step`. The compiler unrolls
# `for step in tl.static_range(SWEEP)`. So `if step == 0` costs no time, and may
# assign `low` in the inner loop. Example: with `BN = 32` and `SWEEP = 4`, program
# `(0, 1)` computes columns `128` to `255`.
#
# The kernel may issue at most `1.1` times the bytes of the plain product, so it cannot
# read $A$ for every tile. `RANK` is as in exercise 10.4, and you may call your
# `my_update`.
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
    """y = x Wᵀ + scale · (x Aᵀ) Bᵀ; program (i, j): SWEEP blocks side by side."""
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
        total = dot(low * scale, tl.trans(b), total)
        store(y, m, n, total, within(m, n, m_size, n_size))
    ### END SOLUTION


# %% tags=["check-10.5", "points-4"]
checks.fewest_bytes(my_lora)

# %% [markdown]
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
# it.
#
# The other two are small, but sums over all rows of $x$, often thousands. One program
# would leave the GPU idle. With **split-K**, each program sums a part of the rows, and
# a second kernel adds up the partial sums. Three numbers in a printed grid count tile
# rows, tile columns and partial sums.

# %%
x, W, A, B = (torch.randn(s) for s in ((192, 64), (96, 64), (8, 64), (96, 8)))
trained = [t.requires_grad_() for t in (x, A, B)]
g, launches = torch.randn(192, 96), []


def gradients(backend):
    y = lora_linear(x, W, A, B, scale, backend=backend)
    return torch.autograd.grad(y, trained, g)


with observed(launches.append):
    ours = gradients("triton")
for launch in launches:
    print(f"{launch.kernel.fn.__name__:11} grid {launch.grid}")
for name, mine, theirs in zip("xAB", ours, gradients("torch"), strict=True):
    off = (mine - theirs).abs().max() / theirs.abs().max()
    print(f"gradient of {name}: off by {off:.0e} of its largest entry")

# %% [markdown]
# All gradients agree with PyTorch's. `_product` ran forward and for the gradient of
# $x$. For $A$ and for $B$, `_over_rows` made 3 partial sums, and `_add_up` added them.
#
# **Atomic additions**, with which many programs can add to the same element, would save
# the second kernel. But programs finish in a different order each time. The cell adds
# 100 numbers in 1000 random orders. How many different sums come out?

# %%
lesson.predict("10.5", low=None, high=None, unit="different sums")

# %%
shares = np.random.default_rng(0).normal(size=100).astype(np.float32)
orders = (np.random.default_rng(i).permutation(shares) for i in range(1000))
sums = {float(np.add.accumulate(order)[-1]) for order in orders}
lesson.measured("10.5", len(sums))
print(f"furthest apart: {max(sums) - min(sums):.0e}")
again = all(map(torch.equal, ours, gradients("triton")))
print("our kernels, run twice: equal to the last bit:", again)
assert again

# %% [markdown]
# The 100 numbers give 13 different sums, all valid. With atomic additions, two runs
# from the same seed would differ in their last bits. You could not check that a resumed
# run equals an uninterrupted one. The second kernel costs little and gives equal bits.

# %% [markdown]
# ## What the compiler says, without a GPU
#
# Triton can compile for a GPU that is not there. The course did so for `sm_80` (NVIDIA
# A100), `sm_90` (H100), `sm_100` (B200) and `gfx942` (AMD MI300X), and kept:
#
# - **registers** of a **thread**, one of many that share a program's work (NVIDIA
#   allows `255`), and **spilled** bytes, which did not fit and go to memory, slowly;
# - **shared** memory of a program;
# - the **matrix instruction**, which multiplies two small tiles at once.
#
# Here is the library's fused product in `bf16`, at rank eight:

# %%
rows = json.loads(gpu_targets.RESULT.read_text("utf-8"))["rows"]
case = "lora 4096 x 4096 -> 4096, r 8, bf16"
fused = next(row for row in rows if case in row["cases"])
for name, made in fused["targets"].items():
    said = f"{made['registers']} registers, {made['spilled']} bytes spilled"
    print(f"{name:7} {said}, {made['shared']:,} shared, {made['instructions'][0]}")
for name in fused["targets"]:
    spilled = [row for row in rows if row["targets"][name]["spilled"]]
    print(f"{name:7} spills in {len(spilled)} of {len(rows)} kernels compiled")

# %% [markdown]
# The fused product fits all four targets: at most 128 registers, nothing spilled, and
# each target's matrix instruction. The compiler does not say how long a kernel takes.
#
# **A kernel that passes the interpreter may not compile for a GPU.** In `bf16`, the
# compiler refuses the sample solution of exercise 10.5:
# `Both operands must be same dtype`. The remedy: round `low` to the dtype of $B$. With
# `RANK = 8` the compiler demands `K >= 16` for the inner size. The library's kernel
# obeys both.
#
# ## On trial: claim K1
#
# **The claim: fusing the LoRA product into one kernel makes it faster.** No GPU has
# timed our kernel, so the claim cannot be tested here. Arithmetic gives a **bound**,
# the least time that a launch can take:
#
# $$t \ge \max\left(\frac{\text{FLOPs}}{\text{FLOP/s}},\;
# \frac{\text{bytes}}{\text{bytes/s}}\right)
# \qquad
# \text{intensity} = \frac{\text{FLOPs}}{\text{bytes}}$$
#
# FLOPs are floating-point operations, both speeds come from the datasheet, and the
# bytes are distinct ones. If the left term is larger, the launch is **compute-bound**,
# and fewer bytes do not help; otherwise it is **memory-bound**. The bounds of several
# launches add up.
#
# A **roofline** draws the bound against the intensity; at its corner both terms are
# equal. An H100, with `989 TFLOP/s` and `3.35 TB/s`, has its corner at `295` FLOPs for
# each byte. In `bf16`, $x W^T$ with one row of $x$ has an intensity of about `1`: two
# FLOPs for each weight of two bytes. With 4,096 rows at 4096 x 4096, the intensity is
# `2 · 4096³ / (3 · 4096² · 2) = 1365`: three matrices, two bytes for each value.
#
# **The rule** asks in how many percent of the cases fusing lowers the bound by 5 % or
# more, compared with the four kernels. The cases are twelve shapes, six ranks and six
# devices. A stronger rival has three kernels: its last product adds in place
# (`torch.addmm`).
#
# The printed rule's verdict words do not apply, because a bound is not a measured time.
# What is your guess?

# %%
lesson.rule("K1")
lesson.predict("10.6", low=None, high=None, unit="% of the cases")

# %%
lesson.show(roofline.figure(), roofline.alt())

# %% [markdown]
# At SmolLM2's width (b), fusing raises the bound on the speed from 282 to 817 TFLOP/s.
# At 4096 x 4096 (a), it rises from 732 to 883, or from 819 against three kernels. With
# one row (d), as when a model generates text, all three versions wait for $W$. The
# speed counts only the FLOPs that the product needs, not repeated ones. Ignore the
# purple triangles: they assume no cache for the fused kernel, but one for its rivals.
#
# The next cell has all cases. Its last line, *Shipped*, is the course's stored verdict.

# %%
config = fusing.config()
run = runs.Run("live", config, fusing.compute(config), {})
for m in (4096, 16, 1):
    four, three = (fusing.values(run, how, m) for how in ("in_four", "in_three"))
    print(
        f"{m:5,} rows: bound falls {min(four):.0f} to {max(four):.0f} %, four kernels"
    )
    shares = f"{fusing.share(four):.0f} % of the cases, four kernels"
    print(f"            5 % or more in {shares}; {fusing.share(three):.0f} %, three")
found = fusing.measured([run])
lesson.measured("10.6", found.value)
lesson.live("K1", found.value, found.low, found.high)

# %% [markdown]
# The 53.9 % depends on our list, of which three quarters have SmolLM2's sizes. By size,
# fusing lowers the bound by
#
# | size, rows | against four kernels | against three |
# |---|---|---|
# | SmolLM2's, 4,096 | `15` to `67 %` | `4` to `54 %` |
# | 4096 x 4096, 4,096 | `-6` to `19 %` | `-14` to `10 %` |
#
# **The bound at 4096 x 4096, the width of a 7B model, is the figure that counts.**
# There, fusing saves 5 % or more in `29` of `108` cases against four kernels, and in
# `13` against three. All of these cases have 4,096 rows. At rank `64` and 4,096 rows,
# the fused bound is even *higher* than that of three kernels, on all six devices. Each
# program then computes `256` columns of $y$ and, once more, the `64` columns of `low`:
# `64 / 256 = 25 %` more arithmetic.

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("K1")

# %% [markdown]
# Do not choose a fused kernel because of this lesson. If you have a GPU, time it at
# your own size and rank, also against three kernels. A clock also sees the saved
# launches, which the bound leaves out.
#
# **Others have timed LoRA kernels.** [LoRAFusion](https://arxiv.org/abs/2510.00206)
# uses two kernels. The first computes $h$ once, and the second adds $h B^T$ inside the
# large product. Its authors report kernels `1.27` times as fast on average.
#
# ## Now with the library
#
# The kernel agrees with PEFT, which computes LoRA's products one by one:

# %%
torch.manual_seed(0)
config = peft.LoraConfig(
    r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False
)
theirs = peft.get_peft_model(nn.Sequential(nn.Linear(64, 96)), config)
layer = theirs.base_model.model[0]
base, A, B = layer.base_layer, layer.lora_A.default.weight, layer.lora_B.default.weight
x = torch.randn(2, 25, 64, requires_grad=True)
scale = layer.scaling["default"]
y = lora_linear(x, base.weight, A, B, scale, base.bias, backend="triton")
g, asked = torch.randn_like(y), (x, A, B)
mine, other = (torch.autograd.grad(out, asked, g) for out in (y, theirs(x)))
for name, a, b in zip("yxAB", (y, *mine), (theirs(x), *other), strict=True):
    off = ((a - b).abs().max() / b.abs().max()).item()
    print(f"{name if name == 'y' else 'gradient of ' + name:13} off by {off:.0e}")
    assert off < 1e-5

# %% [markdown]
# Output and gradients agree to `3e-07`. Without `backend`,
# `lora_linear(x, W, A, B, scale)` takes Triton on a recent NVIDIA GPU, and PyTorch
# elsewhere. The library's own layers do not call it, because no GPU has run it yet.
#
# ### Break it on purpose
#
# The interpreter is wrong for one of three dtypes. The cell prints the error of a
# single `tl.dot`, and **eps**, the relative spacing of the dtype's values. Which error
# is not rounding, and where does it come from?


# %%
@triton.jit
def one_dot(a, b, c):
    at = tl.arange(0, 16)
    full = within(at, at, 16, 16)
    right = tl.trans(load(b, at, at, full))
    store(c, at, at, tl.dot(load(a, at, at, full), right), full)


for dtype in (torch.float32, torch.float16, torch.bfloat16):
    a, b = (torch.randn(16, 16).to(dtype) for _ in "ab")
    c = torch.empty(16, 16)
    one_dot[(1,)](matrix(a), matrix(b), matrix(c))
    expected = a.float() @ b.float().T
    off = (c - expected).abs().max() / expected.abs().max()
    print(
        f"{dtype!s:14} off by {off:.0e}; eps of the dtype {torch.finfo(dtype).eps:.0e}"
    )

# %% [markdown]
# <details><summary>What it is</summary>
#
# `bfloat16` is off by `2e+09`. Triton's [debugging
# guide](https://triton-lang.org/main/programming-guide/chapter-3/debugging.html) says
# that the interpreter does not support it, and advises a cast to `float32`. NumPy has
# no `bfloat16`, so the interpreter stores integers, and `tl.dot` multiplies these. The
# library's `dot` casts, in the interpreter only.
#
# </details>
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
# No. Tiles of $y$ would be missing every time, not sometimes.
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
# No. Only a product *without* such a kernel needs that buffer.
#
# </details>
# <details><summary>In registers, a tile at a time</summary>
#
# Right. Only the reader changes: it also turns codes into values.
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
# ### In your own words
#
# Decide. A colleague timed our fused kernel against PEFT's four, on a 576 x 576 layer
# with 4,096 rows, and it won. She plans to train at 4096 x 4096 and rank `64`. What
# differs? What do you time first? Which result makes you refuse?
#
# <details><summary>A model answer</summary>
#
# "The size differs, and the rival is weak. At your size and rank, three kernels have
# the lower bound. I would time forward and backward at that size, in turns with
# `addmm`. Unless fusing wins by more than repeated runs differ, we keep three kernels."
#
# </details>
#
# ### Transfer
#
# Your fused kernel gets a bias, one `float32` value for each of $n$ columns. Where do
# you add it? With $t$ tile rows in $y$, how many bytes do all programs issue for it?
#
# <details><summary>A model answer</summary>
#
# Once for each tile, right before the store:
# `total += tl.load(bias + n, mask=n < n_size, other=0.0)[None, :]`. The
# programs of each tile row read all of it: $4\,t\,n$ bytes.
#
# </details>
#
# ## Limits
#
# - **No GPU.** No time was measured on one. Distinct bytes are a lower bound on
#   memory's traffic only if the cache starts empty.
# - **Other projects.** Unsloth's `matmul_lora` is a product and an `addmm_`: K1's three
#   kernels.
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
#   multiplication](https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html):
#   the grouped order. Tillet, Kung and Cox, *Triton: an intermediate language and
#   compiler for tiled neural network computations*.
# - Williams, Waterman and Patterson, *Roofline: an insightful visual performance model
#   for multicore architectures*.
# - Dao et al., [FlashAttention](https://arxiv.org/abs/2205.14135): counting reads and
#   writes.
# - Chen et al., [Punica](https://arxiv.org/abs/2310.18547): many LoRAs at once.
