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
# You will have shown that LoRA's product fits into one kernel that moves hardly more
# bytes than the plain product, because what $A$ needs of $x$ passes by anyway, while
# the same four steps, each by itself, read and write far more; and that fewer bytes are
# not yet a shorter time.
#
# **You need** notebook 04, and some PyTorch. No GPU: kernels run in Triton's
# interpreter, on the CPU. (Triton has wheels for Linux only; elsewhere, read along.)
#
# **At the end you can**
#
# - write a kernel in Triton: programs, blocks, masks, strides;
# - multiply two matrices block by block, and say why the sum is kept in `float32`;
# - count every byte that a kernel reads and writes, and draw who reads what;
# - fuse LoRA's update into the product, and say what that costs in bytes;
# - say what a compiler can tell about a GPU that is not there, and what it cannot;
# - judge from arithmetic alone where fusing can help at all.
#
# **Only ten minutes?** Write `start("09", quick=True)` below and run all cells. Read
# "The result first", do exercise 9.1, and read the verdict on claim K1.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # read at import: run kernels without a GPU

from peft_from_scratch.course import start

lesson = start("09")

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
# One projection of SmolLM2, with LoRA beside it, and the numbers that really arrive
# there when the model reads a sentence. ($B$ is filled with noise. It would start as
# zeros, and then a wrong update would look right.)

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
# PyTorch computes LoRA in four steps, and each of them reads its inputs from memory and
# writes its output back. The course's kernel does all of it in one step. What a
# **tracer** notes while it runs:

# %%
with torch.no_grad(), trace() as seen:
    y = lora_linear(x, W, A, B, layer.scale, backend="triton")
    off = (y - layer(x)).abs().max() / y.abs().max()
programs = len({access.program for access in seen.accesses})
print(f"one kernel, {programs} programs; off by {off:.0e} of the largest output")
for name, tensor in {"x": x, "W": W, "A": A, "B": B, "y": y}.items():
    share = seen.bytes(tensor=name) / seen.bytes()
    times = seen.bytes(tensor=name) / tensor.nbytes
    print(f"{name}: {times:4.1f} times its bytes, {share:5.1%} of all that is moved")

# %% [markdown]
# $A$ and $B$, the whole of LoRA, are less than a tenth of the traffic, and no program
# reads $x$ a second time on their account. The output is PyTorch's, but for rounding.
# How such a kernel is built, who reads what, and what that can be worth: that is this
# notebook.
#
# ## Idea one: a program for each block
#
# A GPU runs thousands of threads at once. Triton lets you write for a *block* of
# numbers instead: one **program** loads a block, computes, and stores a block. The same
# code runs once for each number of a program, in no promised order, all at the same
# time as far as you may assume.
#
# | word | what it is |
# |---|---|
# | kernel | the function, marked `@triton.jit` |
# | program | one run of it; `tl.program_id(0)` is its number |
# | grid | how many programs there are: `kernel[grid]` is called with the arguments |
# | block | what one program works on; its sizes are powers of two |
# | `tl.constexpr` | a number that is known when the kernel is compiled |
# | pointer | where a tensor begins in memory; a kernel gets no shape |
#
# Here is one. It adds `u` to `y`, a block for each program:


# %%
@triton.jit
def add_into(y, u, BLOCK: tl.constexpr):
    """y += u, where both hold a whole number of blocks."""
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
# `y + at` is a block of *pointers*, and `tl.load` fetches what they point to. Nobody
# checks whether that still belongs to `y`. Here `y` is the first 100 of 128 numbers,
# and two programs of 64 do the work. How many numbers that are none of its business
# does the kernel change? Guess before you run. Put two numbers in place of None, the
# ends of a range that you are nine tenths sure of, here and further down.

# %%
lesson.predict("9.1", low=None, high=None, unit="numbers behind the end")

# %%
memory = torch.zeros(128)
y, u = memory[:100], torch.ones(128)
add_into[(2,)](y, u, BLOCK=64)
lesson.measured("9.1", int(memory[100:].count_nonzero()))

# %% [markdown]
# No error, no warning. On a GPU the same: a neighbour's numbers have changed, or the
# process dies somewhere else, later. The cure is a **mask**, a truth value for each
# element of a block. Where it is false, nothing is loaded and nothing is stored:
# `tl.load(pointers, mask=keep, other=0.0)` and `tl.store(pointers, values, mask=keep)`.
#
# ### Exercise 9.1: a sum with a mask
#
# Difficulty one of five, importance five of five, about ten minutes. Write
# `out = x + y` for vectors of any `size`. The check runs your kernel under the tracer
# too: it must not even *read* behind the end.
#
# <details><summary>Hint one: a question</summary>
#
# Which numbers does the last program work on if there are `100` and a block has `64`?
# Which comparison is true for those that exist?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `at` and `at < size` are both `(BLOCK,)`. All three accesses need the mask.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)`
#
# </details>


# %% tags=["exercise-9.1"]
@triton.jit
def my_add(x, y, out, size, BLOCK: tl.constexpr):
    """out = x + y, all of them `size` numbers; program i does the i-th block."""
    ### BEGIN SOLUTION
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    total = tl.load(x + at, mask=keep) + tl.load(y + at, mask=keep)
    tl.store(out + at, total, mask=keep)
    ### END SOLUTION


# %% tags=["check-9.1", "points-1"]
checks.vector_add(my_add)

# %% [markdown]
# ## Idea two: a product, block by block
#
# A matrix is a vector in memory, too. Where its element $(i, j)$ lies is said by two
# **strides**, how many numbers to go on for the next row and for the next column:
#
# $$\text{address}(i, j) = \text{pointer} + i \cdot \text{down} + j \cdot \text{along}$$
#
# So a kernel is handed three things a matrix, `(pointer, down, along)`. The library's
# `matrix(x)` makes them, and four small helpers use them:
#
# | helper | what it does |
# |---|---|
# | `load(M, rows, columns, keep)` | the block; zeros where `keep` is false |
# | `store(M, rows, columns, values, keep)` | write it, rounded to M's dtype |
# | `within(rows, columns, height, width)` | the mask: what lies inside |
# | `dot(a, b, total)` | `total` + $a\,b$, summed in `float32` |
#
# With them, the sums of a matrix's rows. A row may be too long for one block, so the
# program walks along it, `BK` columns at a time:


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
# The second matrix is a transposed view, with its columns one after the other. The same
# kernel reads it, because it asks for strides. And zeros behind the edge do no harm to
# a sum: that is why `load` fills with zeros.
#
# A product $y = x W^T$ is such a walk with two matrices: program $(i, j)$ owns a block
# of $y$, and sums over $k$ what `BM` rows of $x$ and `BN` rows of $W$ give:
#
# $$y_{mn} = \sum_{k} x_{mk} W_{nk} \qquad
# \text{total} \mathrel{+}= x_{\text{BM} \times \text{BK}}\,
# W_{\text{BN} \times \text{BK}}^T$$
#
# **Where is the total kept?** In registers, and in `float32`, whatever the dtype of the
# matrices. Watch a sum in `float16` of many numbers of about one half:

# %%
terms = torch.full((8192,), 0.53, dtype=torch.float16).numpy()
for kept in (np.float32, np.float16):
    print(f"{kept.__name__}: {np.add.accumulate(terms, dtype=kept)[-1]:,.0f}")

# %% [markdown]
# From some point on, adding a half changes nothing: the next number that `float16` has
# is further away than that. `float32` has room to spare.
#
# ### Exercise 9.2: the tiled product
#
# Difficulty three of five, importance five of five, about twenty minutes. Write
# $y = x W^T$, with any sizes, any strides, and `float16` or `float32`. The grid has two
# axes here: `tl.program_id(0)` counts blocks of rows, `tl.program_id(1)` blocks of
# columns.
#
# <details><summary>Hint one: a question</summary>
#
# `row_sums` has the loop already. Which second block is loaded in it, and what takes
# the place of `tl.sum`?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The blocks of $x$ and $W$ are `(BM, BK)` and `(BN, BK)`. `tl.trans` turns the second;
# the total is `(BM, BN)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `m = tl.program_id(0) * BM + tl.arange(0, BM)`
#
# </details>


# %% tags=["exercise-9.2"]
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


# %% tags=["check-9.2", "points-3"]
checks.tiled_product(my_product)

# %% [markdown]
# ### Who reads what
#
# From here on we use the library's kernel, which is this one with a few more arguments.
# Its tracer is what your exercise was checked with. Below, $y$ has three rows of blocks
# and six columns. How often is each element of $x$ read?

# %%
lesson.predict("9.2", low=None, high=None, unit="times")

# %%
torch.manual_seed(0)
x, W = torch.randn(48, 64), torch.randn(96, 64)
y, blocks = torch.empty(48, 96), Tiles(m=16, n=16, k=32, sweep=1, group=1)
with trace() as plain:
    product(x, matrix(W), 96, tiles=blocks, out=y)
lesson.measured("9.2", plain.bytes(tensor="x") / x.nbytes)

# %%
tensors = dict(x=x, W=W, y=y)
figure = access_picture.picture(
    plain,
    tensors,
    program=1,
    title="A block of y needs its rows of x and its rows of W",
    subtitle="The darker, the more often read (y: written). Outlined: program 1.",
)
said = access_picture.words(plain, tensors)
lesson.show(figure, f"A product in blocks. Each element is read or written: {said}.")

# %% [markdown]
# Once for every *column* of blocks of $y$; and each element of $W$ once for every *row*
# of them. Larger blocks mean fewer reads, until a block no longer fits into the
# registers. Two counts have to be told apart from now on:
#
# - bytes **issued**: all loads and stores that a mask lets through;
# - **distinct** bytes: each element once, the least that must come from memory.
#
# Between the two stands the cache. What was read a moment ago is often still there, and
# comes from the chip instead of from memory.
#
# ### The order of the programs
#
# Programs run roughly in the order of their numbers, so *which block has which number*
# decides what the cache can do. Row by row, eight programs in a row share one strip of
# $x$ and need eight strips of $W$. In **groups** of four rows they share more. Guess:
# by how many percent do the bytes shrink that eight programs in a row need, each
# element counted once? The bytes issued are the same.

# %%
lesson.predict("9.3", low=None, high=None, unit="% fewer bytes")

# %%
x, W, y = torch.randn(64, 32), torch.randn(128, 32), torch.empty(64, 128)
orders = {}
for group, name in {1: "row by row", 4: "in groups of four rows"}.items():
    with trace() as orders[name]:
        tiles = Tiles(m=16, n=16, k=32, sweep=1, group=group)
        product(x, matrix(W), 128, tiles=tiles, out=y)
needed = [access_picture.window_bytes(seen, 8) for seen in orders.values()]
for (name, seen), window in zip(orders.items(), needed, strict=True):
    print(f"{name:23} issued {seen.bytes('load'):,}; eight programs need {window:,.0f}")
lesson.measured("9.3", 100 * (1 - needed[1] / needed[0]))

# %%
figure = access_picture.order_picture(
    orders,
    y,
    window=8,
    title="The same blocks, numbered in another order",
    subtitle="Each box is a block of y with the number of its program. Blue: 0 to 7.",
)
lesson.show(figure, "The first eight programs: a row of blocks, or a patch four high.")

# %% [markdown]
# The more nearly square the patch of $y$, the fewer rows and columns surround it. It is
# one line in the kernel, and no sum comes out differently.
#
# ### A weight that lies the other way
#
# Notebook 04 met GPT-2's `Conv1D`, whose weight is stored as $(d_{in}, d_{out})$: the
# transpose of what `nn.Linear` has. Should we copy it? No: to a kernel, a transpose is
# nothing but two strides that change places. The library's kernel takes a **reader**,
# the function that fetches a block of $W$, so that is all you need to write.
#
# ### Exercise 9.3: read a transposed weight
#
# Difficulty two of five, importance three of five, about fifteen minutes. The matrix
# `W` is a `Conv1D` weight of `k_size` rows and `n_size` columns, in memory with any
# strides. Return the block that the product needs: `BN` rows, which are columns of `W`
# from number `n` on, and `BK` columns, its rows from number `k` on; zeros where there
# is nothing.
#
# <details><summary>Hint one: a question</summary>
#
# One step to the right in the block goes to the next *row* of this matrix. Which of the
# two strides is that?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# With `rows` for the block's rows and `columns` for its columns, `rows[:, None]` is
# `(BN, 1)` and `columns[None, :]` is `(1, BK)`; together they make `(BN, BK)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `rows, columns = n + tl.arange(0, BN), k + tl.arange(0, BK)`
#
# </details>


# %% tags=["exercise-9.3"]
@triton.jit
def my_reader(W, n, k, n_size, k_size, BN: tl.constexpr, BK: tl.constexpr):
    """W[k:, n:]ᵀ: (BN, BK), from a weight W (k_size, n_size)."""
    ### BEGIN SOLUTION
    pointer, down, along = W
    rows, columns = n + tl.arange(0, BN), k + tl.arange(0, BK)
    at = pointer + columns[None, :] * down + rows[:, None] * along
    return tl.load(at, mask=within(rows, columns, n_size, k_size), other=0.0)
    ### END SOLUTION


# %% tags=["check-9.3", "points-2"]
checks.conv1d_reader(my_reader)

# %% [markdown]
# ## Idea three: count LoRA's bytes, then fuse
#
# $$y = x W^T + s\,(x A^T)\,B^T$$
#
# | symbol | shape | note |
# |---|---|---|
# | $x$, $W$, $y$ | $(m, k)$, $(n, k)$, $(m, n)$ | as above; $W$ is frozen |
# | $A$, $B$ | $(r, k)$, $(n, r)$ | thin: $r$ is much smaller than $k$ and $n$ |
# | $s$ | | the scale, $\alpha / r$ |
# | $h = s\,x A^T$ | $(m, r)$ | what goes through the bottleneck |
#
# In steps: the product with $W$, the product with $A$, the product with $B$, and a sum.
# Four kernels, each with its own reading and writing. How many times the bytes of the
# plain product $x W^T$ do the four issue together?

# %%
lesson.predict("9.4", low=None, high=None, unit="times the plain product's bytes")

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
lesson.measured("9.4", unfused.bytes() / plain.bytes())

# %% [markdown]
# A third as much again, for an update that needs a sixteenth of the arithmetic.
# Where it goes: $x$ once more for $A$; the update, as large as $y$, written out and
# read back; $y$ read and written again for the sum.
#
# Now look at the walk over $k$ in your product. A block of $x$ is loaded for $W$. It is
# *in registers*. So load the same columns of $A$ too, and sum $x A^T$ beside $x W^T$.
# When the walk is over, both are complete for these rows, and
#
# $$\text{total} \mathrel{+}= (s \cdot \text{low})\, B_{\text{BN} \times r}^T$$
#
# finishes the block, right before it is stored. Neither $h$ nor the update ever goes to
# memory.
#
# ### Exercise 9.4: finish the block
#
# Difficulty two of five, importance five of five, about ten minutes. `total` is the
# block of $x W^T$, `(BM, BN)`. `low` is $x A^T$ for its rows, `(BM, RANK)`, where
# `RANK` is $r$ rounded up to a power of two, and `low` has zeros in the columns behind
# $r$. Return the finished block.
#
# <details><summary>Hint one: a question</summary>
#
# Which rows of $B$ belong to this block of $y$? And must they still be read where `low`
# is zero?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The block of $B$ is `(BN, RANK)`; `dot` needs it the other way round. It also takes a
# total to add to.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `rank = tl.arange(0, RANK)`
#
# </details>


# %% tags=["exercise-9.4"]
@triton.jit
def my_update(total, low, B, n, n_size, r, scale, RANK: tl.constexpr):
    """total + scale · low Bᵀ: (BM, BN), from low (BM, RANK) and a matrix B (n, r)."""
    ### BEGIN SOLUTION
    rank = tl.arange(0, RANK)
    b = load(B, n, rank, within(n, rank, n_size, r))
    return dot(low * scale, tl.trans(b), total)
    ### END SOLUTION


# %% tags=["check-9.4", "points-2"]
checks.fused_update(my_update)

# %% [markdown]
# ### $A$ is read too often
#
# One flaw is left. Every program needs `low` for its rows, and programs side by side
# have the *same* rows: each reads all of $A$ for itself. A program that computes some
# blocks side by side, one after the other, needs `low` once. That is a **sweep**:

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
# Why not always a long sweep, then? It leaves fewer programs, and a GPU with more than
# a hundred processors wants all of them busy. Block sizes and sweep are a trade, and
# the library's choices stand in one small function, `tiles_for`.

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
    title="Fused: A is read beside W, for the first of three blocks only",
    subtitle="The darker, the more often read (y: written). Outlined: program 1.",
)
said = access_picture.words(fused, tensors)
lesson.show(figure, f"The fused product, a sweep of three blocks: {said}.")

# %% [markdown]
# Compare with the first picture: $x$ and $W$ are read exactly as often as without LoRA.
#
# ### Exercise 9.5: fuse it, and be judged by bytes
#
# Difficulty four of five, importance five of five, about thirty minutes. The whole
# kernel: program $(i, j)$ computes `SWEEP` blocks of $y$, side by side. It must be
# right, and it must issue at most `1.1` times the bytes of the plain product. The check
# counts, and shows you the two numbers. For `step` in `tl.static_range(SWEEP)`, the
# block's columns begin at (number of the program on axis one times `SWEEP`, plus
# `step`) times `BN`. Because `step` is known when the kernel is compiled, so is
# `if step == 0`.
#
# <details><summary>Hint one: a question</summary>
#
# What must start at zero for each block, and what only once for each program?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `low` is `(BM, RANK)`, the block of $A$ is `(RANK, BK)`. Around the loop of exercise
# 9.2 goes the one over `step`; after it come the lines of exercise 9.4.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `m, rank = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RANK)`
#
# </details>


# %% tags=["exercise-9.5"]
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


# %% tags=["check-9.5", "points-4"]
checks.fewest_bytes(my_lora)

# %% [markdown]
# ## Idea four: backward, with the same kernel
#
# Training needs three gradients. With $g$ for the gradient that arrives at $y$:
#
# $$\frac{\partial L}{\partial x} = g W + s\,(g B) A \qquad
# \frac{\partial L}{\partial A} = s\,(g B)^T x \qquad
# \frac{\partial L}{\partial B} = s\,g^T (x A^T)$$
#
# Look at the first. It is *the forward product*, of $g$, with $W^T$ in the place of
# $W$, $B^T$ in that of $A$, and $A^T$ in that of $B$. Transposes are strides. So there
# is nothing to write: the same kernel runs again. The other two are sums over the
# *rows* of $x$, of which there are thousands, for a result that is tiny. One program
# alone would take for ever. So the rows are split into **shares**, a program sums each,
# and a last kernel adds the shares up.

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
# Why a kernel more, when a GPU has *atomic* additions, with which all programs could
# add to one result as they finish? Because they finish in another order each time. Take
# a hundred shares and add them up in a thousand random orders. How many different sums
# are there?

# %%
lesson.predict("9.5", low=None, high=None, unit="different sums")

# %%
shares = np.random.default_rng(0).normal(size=100).astype(np.float32)
orders = (np.random.default_rng(i).permutation(shares) for i in range(1000))
sums = {float(np.add.accumulate(order)[-1]) for order in orders}
lesson.measured("9.5", len(sums))
print(f"furthest apart: {max(sums) - min(sums):.0e}")
again = all(map(torch.equal, ours, gradients("triton")))
print("our kernels, run twice: equal to the last bit:", again)
assert again

# %% [markdown]
# Each sum is as good as any other. But a training run whose last bits differ from one
# run to the next cannot be compared with itself: a kill and a resume are no longer the
# same run, and a bug of one part in a million cannot be told from noise. The extra
# kernel reads a few thousand numbers. That is a cheap price for equal bits.

# %% [markdown]
# ## What the compiler says, without a GPU
#
# Triton's compiler needs no GPU to make code for one. So the course compiled every
# kernel it has for three generations of NVIDIA's and one of AMD's, and keeps what came
# out: how many **registers** a thread takes; how many bytes had to be **spilled** to
# memory, because the registers did not suffice; how much **shared** memory a program
# takes; and whether the **matrix instructions** are there, without which a GPU does a
# small part of what it could. Here is the fused product in `bf16`, at rank eight:

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
# A thread has `255` registers at most, and the threads of a program hold its total
# together (`sm_100` has a memory of its own for that): this is what limits the size of
# a block. Each target has matrix instructions of its own, made from the same source.
# What the compiler can *not* say is how long anything takes.
#
# ## On trial: claim K1
#
# *Fusing the LoRA product into one kernel makes it faster.* It is our own claim, the
# one that everybody makes who writes such a kernel. We have no GPU, so no clock. But
# arithmetic goes a long way. A launch takes at least
#
# $$t \ge \max\left(\frac{\text{FLOPs}}{\text{FLOP/s}},\;
# \frac{\text{bytes}}{\text{bytes/s}}\right)
# \qquad
# \text{intensity} = \frac{\text{FLOPs}}{\text{bytes}}$$
#
# and a sequence of launches takes the sum of such terms. Both speeds stand in the
# datasheet, and their ratio is the intensity from which on arithmetic is the limit: the
# corner of the **roofline**. Fewer bytes help below it, and not above it. The bytes
# here are *distinct* ones, as if caches were perfect. A product with one row of $x$
# reads all of $W$ for a single use; a product with thousands of rows uses each element
# thousands of times.
#
# **Control:** the same steps, not fused, under the same bound. In how many percent of
# the cases (shapes, ranks and devices) does fusing lower the bound by five percent or
# more? Guess.

# %%
lesson.rule("K1")
lesson.predict("9.6", low=None, high=None, unit="% of the cases")

# %%
lesson.show(roofline.figure(), roofline.alt())

# %%
config = fusing.config()
run = runs.Run("live", config, fusing.compute(config), {})
for m in (4096, 16, 1):
    four, three = (fusing.values(run, how, m) for how in ("in_four", "in_three"))
    print(
        f"{m:5,} rows: {min(four):.0f} to {max(four):.0f} % off the bound of four steps"
    )
    shares = f"{fusing.share(four):.0f} % of the cases over four steps"
    print(f"            worth it in {shares}, {fusing.share(three):.0f} % over three")
found = fusing.measured([run])
lesson.measured("9.6", found.value)
lesson.live("K1", found.value, found.low, found.high)

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("K1")

# %% [markdown]
# Read it by rows. With thousands of rows, and matrices that are not large, the four
# steps move so much for so little that fusing lowers the bound by a lot. With one row,
# as when a model writes token by token, $W$ is nearly all that is read, and nobody can
# save that. What fusing saves there are *launches*, some microseconds each, which the
# bound leaves out. And against a good rival, three steps whose last product adds by
# itself, the gain is smaller: a baseline can always be made slow.
#
# **A time: not measured.** No GPU was at hand. It would take one, a clock, and both
# rivals, and its figures would be true of that GPU.
#
# ## Now with the library
#
# The same layer in PEFT, which runs LoRA's steps one by one: values and gradients of
# the library's kernel against its.

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
# In training code you would write `lora_linear(x, W, A, B, scale)` and leave `backend`
# out: it takes Triton on a GPU, and four plain lines of PyTorch elsewhere.
#
# ### Break it on purpose
#
# The kernel below is one `tl.dot`, with nothing around it. Three dtypes, and one line
# is out of order. Which one? Is it the rounding of a coarse dtype, or something else?


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
# `bfloat16`: off by far more than any rounding. NumPy has no such type, so Triton's
# interpreter keeps it as whole numbers of sixteen bits, and its `tl.dot` multiplies
# *those*. (If your version shows no such line, it has been mended.) It is a bug of the
# *stand-in* for the GPU, not of the kernel, and a test that only ran there would blame
# the kernel. The repair is in the library's `dot`: when interpreted, and only then, it
# widens both blocks to `float32` first, which changes no value. A stand-in is a
# program, too: check it against something else before you believe it.
#
# </details>
#
# ## Quiz
#
# Answer for yourself, then open the options. None needs the kernel.
#
# **1. A kernel is right for all sizes that are multiples of its blocks, and sometimes
# wrong otherwise. Where do you look first?**
#
# <details><summary>At the masks</summary>
#
# Right. The last block reaches beyond the edge, and what lies there is anybody's.
#
# </details>
# <details><summary>At the grid: there are too few programs</summary>
#
# No. Then a part of the output would never be written, and wrong each time.
#
# </details>
# <details><summary>At the dtype of the total</summary>
#
# No. Rounding does not ask whether a size is a multiple of a block.
#
# </details>
#
# **2. Grouping the programs changed which number?**
#
# <details><summary>The bytes that are issued</summary>
#
# No. You saw the same count for both orders: each program reads what it always read.
#
# </details>
# <details><summary>The result, slightly</summary>
#
# No. Each block is computed by one program, in the same way, whatever its number.
#
# </details>
# <details><summary>How many different bytes neighbours in time need</summary>
#
# Right. That is what a cache can use.
#
# </details>
#
# **3. In the fused kernel, what of LoRA is written to memory during inference?**
#
# <details><summary>The update, before it is added</summary>
#
# No. It goes straight into the block's total.
#
# </details>
# <details><summary>Nothing but y</summary>
#
# Right. (For training $h$ is kept as well, for the gradient of $B$: $r$ numbers a row.)
#
# </details>
# <details><summary>h, for the other blocks of the row</summary>
#
# No. Programs do not talk to each other: each computes the `low` of its rows itself.
#
# </details>
#
# **4. (From notebook 08.) The base is in four bits. Where would $W'$ exist in a kernel
# like this one?**
#
# <details><summary>In memory, for as long as the product takes</summary>
#
# No. That is what a product *without* such a kernel needs: a buffer for a whole $W'$.
#
# </details>
# <details><summary>In registers, a block at a time</summary>
#
# Right. Only the reader changes: it loads bytes, and unpacks them on the way. You wrote
# another reader in exercise 9.3.
#
# </details>
# <details><summary>Nowhere: the product is computed with the codes</summary>
#
# No. A code is the number of a value; products need the value.
#
# </details>
#
# **5. (From notebook 04.) A model with one LoRA is served for months. What beats any
# kernel for LoRA's product?**
#
# <details><summary>A larger rank</summary>
#
# No. That is more work, not less.
#
# </details>
# <details><summary>Merging: adding the update to W once</summary>
#
# Right. Then no product is left but the plain one. Kernels are for training, for a base
# that many adapters share, and for one in four bits.
#
# </details>
# <details><summary>Leaving out the scale</summary>
#
# No. It is one multiplication of a thin block, and without it the result is wrong.
#
# </details>
#
# ### In your own words
#
# A colleague says: "I fused it, it moves a third fewer bytes, so it is a third faster."
# Answer in three sentences.
#
# <details><summary>A model answer</summary>
#
# "Which bytes: those issued, or those that come from memory? A cache may have answered
# most of what you saved. And if the product is limited by arithmetic, as large ones
# are, then fewer bytes save nothing that anybody waits for: show me the intensity, and
# then a clock."
#
# </details>
#
# ### Transfer
#
# Your fused kernel gets a bias, one number for each column of $y$. Where do you load
# it, where do you add it, and how many bytes does it add for $n$ columns and a grid
# with $i$ rows of programs?
#
# <details><summary>A model answer</summary>
#
# Once for each block, right before the store: `total += tl.load(bias + n, mask=n <
# n_size, other=0.0)[None, :]`. Each row of programs reads all of it, so that it adds
# $i \cdot n$ numbers. Added inside the loop over $k$ it would be there several times.
#
# </details>
#
# ## Limits
#
# - **What the controls rule out.** That the count is blind: the four separate kernels
#   were counted by the same tracer, with the same blocks, and come out far higher.
# - **What it does not see.** Caches, the width of a memory transaction, several
#   programs on one processor, and all that happens while a load is under way. Issued
#   bytes are a bound from above on what memory must deliver, distinct ones from below.
# - **No GPU was at hand.** The kernels were run by an interpreter, and compiled for
#   GPUs that were not there. No second in this notebook was measured on a GPU.
# - **Sizes.** The products here are small so that an interpreter can run them. The
#   *ratios* depend on block sizes and rank alone, once the matrices are large.
# - **Others beside us** (their claims, not ours). Unsloth and Liger-Kernel report
#   faster training with fused kernels of this kind, on GPUs, along with other changes.
#
# ## Your guesses
#
# Ranges that you are nine tenths sure of should hold nine of ten measured values. Most
# people's first ranges are too narrow.

# %%
lesson.calibration()

# %% [markdown]
# ## Receipt

# %%
lesson.receipt()

# %% [markdown]
# ## Where to go next
#
# - Triton's own [tutorial on the
#   product](https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html),
#   where the grouped order comes from. Tillet, Kung and Cox, *Triton: an intermediate
#   language and compiler for tiled neural network computations*, is the paper.
# - Williams, Waterman and Patterson, *Roofline: an insightful visual performance model
#   for multicore architectures*: the arithmetic of the verdict.
# - Dao and others, [FlashAttention](https://arxiv.org/abs/2205.14135): the same
#   thought, count the reads and the writes, where it changed a field.
# - Chen and others, [Punica](https://arxiv.org/abs/2310.18547): many LoRAs beside one
#   product, which is notebook 12.
