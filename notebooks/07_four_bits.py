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
# # Four bits: NF4 and double quantization
#
# **NF4** stores a weight as one of sixteen values, in `4.127` bits all told, and no
# other sixteen values are much more accurate.
#
# **You need** notebook 04, some PyTorch, and the normal distribution.
#
# **At the end you can**
#
# - quantize a weight in blocks, pack two codes in a byte, and restore it;
# - explain where NF4's values and the constant `0.9677083` come from;
# - compare formats fairly, by their error *and* by the bits they store;
# - save memory by rounding each block's largest weight, too: **double quantization**;
# - explain how gradients pass a quantized weight;
# - count the bytes of a model of `65` billion parameters.
#
# **Only ten minutes?** Write `start("07", quick=True)` below and run all cells. Read
# "The result first" and the three **verdict cards**: a textbook claim, our verdict, and
# a number.

# %%
from peft_from_scratch.course import start

lesson = start("07")

# %%
import math
from statistics import NormalDist

import bitsandbytes.functional as bnb
import ipywidgets
import torch
import torch.nn.functional as F

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.course import block_picture, code_books, constants, curves
from peft_from_scratch.course import formats, minilm, over_seeds, runs
from peft_from_scratch.course.checks import four_bits as checks

# %% [markdown]
# ## The result first
#
# **Quantizing** a weight means rounding it to one of a few allowed values, so that it
# takes fewer bits. First, SmolLM2 answers the orders of notebook 00 without it: a
# sentence goes in, and one line of JSON comes out. Untrained for this task, it sees
# five solved examples first.

# %%
model, tokenizer = lesson.load_model()
task = pfs.tasks.load_task("orders")
shots = [(r["prompt"], r["completion"]) for r in task.train.select(range(5))]
asked = task.test.select(range(3))
ask = dict(rows=asked, template="chat", examples=shots)
found = pfs.evaluation.answer_rows(model, tokenizer, task, **ask)
for row, answer in zip(asked, found.answers, strict=True):
    print(f"sentence: {row['prompt']}\nanswer:   {answer}")

# %% [markdown]
# Two of the three answers are right. Now we quantize every **projection** to four bits:
# every weight matrix in the attention and the MLP of each layer.

# %%
names = nf4.quantize_model(model)
packed = [model.get_submodule(name).quantized for name in names]
n, held = sum(q.numel for q in packed), sum(q.nbytes for q in packed)
print(f"{len(names)} projections hold {n:,} weights")
print(f"in 32 bits: {4 * n / 1e6:6.1f} MB; in 16 bits: {2 * n / 1e6:.1f} MB")
print(f"held now:   {held / 1e6:6.1f} MB, {8 * held / n:.3f} bits a weight")
rest = sum(p.numel() for p in model.parameters())
print(f"embeddings and norms stay as they were: {rest:,} weights\n")
print(*pfs.evaluation.answer_rows(model, tokenizer, task, **ask).answers, sep="\n")

# %% [markdown]
# The projections shrink from 424.7 to 54.8 MB, but none of the three answers is right
# now. Notebook 08 measures this cost. It may be overstated here: our copy of SmolLM2
# was rounded to another four-bit format before, so its weights are now rounded twice
# (see "A trap"). This notebook explains NF4, and why it takes 4.127 bits and not four.
#
# In the picture, a strip of four cells marks a four-bit weight. **QLoRA**, the topic of
# notebook 08, freezes it and trains LoRA (orange) in parallel. Ignore the pale boxes.

# %%
lesson.show(
    block_picture(lit="qlora"),
    "Every projection holds its weight in four bits, and the weight stays frozen.",
)

# %% [markdown]
# ## Idea one: a scale for each block
#
# Four bits can tell sixteen values apart. So we choose sixteen values from -1 to 1, the
# **code book**, and round every weight to the nearest. Its position there, from 0 to
# 15, is the weight's **code**. Before that, we divide by a scale: **absmax**, the
# largest absolute value in the **block**, which is a group of weights that share one
# scale.
#
# $$c_i = \text{the position of the value nearest to } \frac{w_i}{\text{absmax}}
# \qquad\qquad w'_i = \text{values}[c_i] \cdot \text{absmax}$$
#
# | symbol | what it is | stored as |
# |---|---|---|
# | $w_i$ | a weight | not stored |
# | absmax | the largest $\lvert w \rvert$ of its block | `float32`, one per block |
# | $c_i$ | the code | four bits |
# | $w'_i$ | the restored, or **dequantized**, weight | computed when needed |
#
# The next cell quantizes one block of eight weights. Its code book is **int4**: fifteen
# evenly spaced values, one seventh apart; the sixteenth code stays unused. The distance
# between neighbors, times absmax, is the **quantization step**.

# %%
w = torch.tensor([0.9, -0.3, 0.15, 0.05, -0.6, 0.4, -1.2, 0.7])
values = torch.arange(-7, 8) / 7


def by_hand(w):
    absmax = w.abs().max()
    codes = (7 * w / absmax).round().long() + 7
    back = values[codes] * absmax
    for name, row in (("weight", w), ("code", codes), ("restored", back)):
        print(f"{name:8}", *(f"{x:7.3g}" for x in row.tolist()))
    return back


back = by_hand(w)

# %% [markdown]
# The largest weight comes back exactly, because absmax is stored exactly. The others
# are off by up to half a quantization step. The step is a seventh of absmax, so the
# largest weight alone decides how coarsely the others are rounded.
#
# Suppose that weight becomes ten times as large. The errors of the seven others form a
# vector. By which factor does its length grow? Before you run, replace None by the ends
# of a range that you are `90` % sure of, here and further down.

# %%
lesson.predict("7.1", low=None, high=None, unit="times the error")

# %%
spoiled, others = w.clone(), torch.arange(8) != 6
spoiled[6] *= 10
off_then = (by_hand(spoiled) - spoiled)[others].norm()
lesson.measured("7.1", (off_then / (back - w)[others].norm()).item())

# %% [markdown]
# The error of the seven grows 10.1 times, and six of them become zero. So an
# **outlier**, a weight far larger than most, must not set the scale of a whole matrix.
# The remedy is to cut the matrix into blocks of, say, 64 weights, row after row. Each
# has its own absmax, so an outlier spoils only its own block.
#
# ### Exercise 7.1: absmax by blocks
#
# Difficulty two of five, importance five of five, about ten minutes. Divide every
# weight of `w`, a `float32` tensor of any shape, by the absmax of its block. Return
# these ratios, in the shape of `w`, and the absmax, `(blocks,)`. Blocks run on from one
# row into the next, and the last may be short. In a block of zeros, the ratios are
# zeros. For example, `[2, -4, 1]` with `block=2` gives `[0.5, -1, 1]` and `[4, 1]`.
#
# <details><summary>Hint one: a question</summary>
#
# How many zeros fill up the last row of `block`? Would they change any absmax?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `(…)` becomes `(n,)`, then `(blocks, block)`. `-n % block` is what `n` lacks to the
# next multiple.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `rows = F.pad(w.flatten(), (0, -w.numel() % block)).view(-1, block)`
#
# </details>


# %% tags=["exercise-7.1"]
def my_blocks(w, block):
    """(ratios, absmax): w over its block's absmax, of w's shape; absmax (blocks,)."""
    ### BEGIN SOLUTION
    rows = F.pad(w.flatten(), (0, -w.numel() % block)).view(-1, block)
    absmax = rows.abs().amax(1)
    ratios = (rows / absmax[:, None]).nan_to_num(0.0)  # 0 / 0 where all is zero
    return ratios.flatten()[: w.numel()].view(w.shape), absmax
    ### END SOLUTION


# %% tags=["check-7.1", "points-2"]
checks.absmax_blocks(my_blocks)

# %% [markdown]
# ### How large should a block be?
#
# The next figure shows how small blocks limit the damage of outliers. It compares
# normal weights with the same weights after one in 1,000 was multiplied by 20. The
# **error** is the root mean square (rms) of the rounding errors, in percent of the rms
# of the weights. Outliers are left out of it. `double=False` keeps each absmax in 32
# bits (see idea three).

# %%
torch.manual_seed(0)
plain = torch.randn(2**18)
ordinary = torch.rand(len(plain)) > 0.001
wild = torch.where(ordinary, plain, 20 * plain)


def off(w, restored, which=slice(None)):
    """The rms of the rounding errors, in % of the rms of the weights."""
    return 100 * ((restored - w)[which].norm() / w[which].norm()).item()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


blocks = [2**k for k in range(3, 13)]
series = {"normal weights": [], "one in 1,000 is 20 times as large": []}
for block in blocks:
    for line, w in zip(series.values(), (plain, wild), strict=True):
        q = nf4.quantize(w, block, double=False, code="int4")
        line.append((block, off(w, nf4.dequantize(q), ordinary)))

# %%
figure = curves.lines(
    series,
    x="Weights in a block, count",
    y="Error of ordinary weights, % of their rms",
    title="An outlier spoils its whole block, so blocks should be small",
    subtitle="int4; each block is scaled by its own absmax.",
    log="x",
    names="foot",
)
ends = {k: f"{line[0][1]:.0f} to {line[-1][1]:.0f} %" for k, line in series.items()}
span = f"from blocks of {blocks[0]} to {blocks[-1]:,}"
lesson.show(figure, f"Error {span}: " + "; ".join(f"{k}, {v}" for k, v in ends.items()))
for block in blocks[::3]:
    q = nf4.quantize(plain, block, double=False)
    print(f"blocks of {block:5,}: {q.bits_per_value:6.4f} bits a weight")
    assert q.bits_per_value == 4 + 32 / block

# %% [markdown]
# In blocks of 4,096, outliers raise the error of the ordinary weights from 16 to 81 %.
# In blocks of 8, they raise it only from 7 to 9 %.
#
# But small blocks cost memory. Each block stores its absmax in 32 bits, as its
# **quantization constant**, or *constant* for short:
#
# $$\text{bits per weight} = 4 + \frac{32}{\text{block}}$$
#
# Blocks of 64 make `4 + 0.5 = 4.5` bits, and blocks of 8 make `4 + 4 = 8`. **To compare
# formats, we need both: the error and the bits per weight.**
#
# ### Two codes in a byte
#
# PyTorch stores whole bytes, so two codes share one. The first goes into the high half:
#
# $$\text{byte} = 16\,c_0 + c_1$$
#
# For example, `9` and `3`, in binary `1001` and `0011`, become `10010011`, which is
# `147`. Shifting by four places (`<< 4`) multiplies by 16; `& 15` keeps the low half.
#
# ### Exercise 7.2: pack and unpack
#
# Difficulty two of five, importance three of five, about ten minutes. A warm-up of one
# or two lines for each function. `my_pack` turns codes from 0 to 15, `(n,)`, into
# bytes, `(⌈n / 2⌉,)`; both are `torch.uint8`. If `n` is odd, the last low half is
# zero. `my_unpack` gets the bytes and `n`, and returns the `n` codes. For example,
# `[9, 3, 7]` is packed as `[147, 112]`.
#
# <details><summary>Hint one: a question</summary>
#
# How do you take every second element of a tensor? Which half of a byte comes first?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# To unpack, stack the high and low halves as `(bytes, 2)`, flatten, and cut to `n`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `codes = F.pad(codes, (0, len(codes) % 2))`
#
# </details>


# %% tags=["exercise-7.2"]
def my_pack(codes):
    """Two codes a byte, the first in the high half: (n,) uint8 -> (⌈n / 2⌉,) uint8."""
    ### BEGIN SOLUTION
    codes = F.pad(codes, (0, len(codes) % 2))
    return (codes[::2] << 4) | codes[1::2]
    ### END SOLUTION


def my_unpack(packed, n):
    """The n codes that were packed: (⌈n / 2⌉,) uint8 -> (n,) uint8."""
    ### BEGIN SOLUTION
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]
    ### END SOLUTION


# %% tags=["check-7.2", "points-2"]
checks.nibbles(my_pack, my_unpack)

# %% [markdown]
# ## Idea two: sixteen values for a normal distribution
#
# Trained weights are roughly normally distributed: many are near zero, and few far out.
# **NF4** (*normal float*) places its values accordingly, at **quantiles**. The quantile
# $\Phi^{-1}(p)$ is the point below which the share $p$ of a normal distribution lies.
# Between quantiles at evenly spaced $p$ lie equal shares of the weights, so all codes
# would be used about equally often:
#
# $$\text{value}_i = \frac{\Phi^{-1}(p_i)}{\Phi^{-1}(p_{\text{last}})}$$
#
# NF4 has eight values from -1 to 0 and nine from 0 to 1, and the halves share the zero.
# Thus zero stays zero, and the largest weight of a block can come back exactly. In each
# half, $p$ runs evenly from one half to $p_{\text{last}}$, which is `0.9677`. Dividing
# by the last quantile makes the end 1. The negative half then gets a minus sign.
#
# For example, the eight values of the negative half are `0.0668` apart in $p$. The last
# has the quantile `1.848`. The one before it has $p$ = `0.9009` and the quantile
# `1.287`. The ratio of these quantiles is `0.696`, so `-0.696` is a value of NF4.
#
# **Where does `0.9677083` come from?** It is $p_{\text{last}}$, which cannot be 1,
# since $\Phi^{-1}(1)$ is infinite. Instead, cut the distribution into equal shares, and
# put the last value in the middle of the last share. With sixteen shares, this middle
# has $p = 1 - 1/32$; with fifteen, $p = 1 - 1/30$. NF4 takes the mean of these two.
# We know of no proof that the mean is best. The next cell derives all values (`half`
# counts down from 1 to 0).

# %%
quantile = NormalDist().inv_cdf
last = 1 - (1 / 30 + 1 / 32) / 2


def half(many):
    """`many` values from 1 down to 0, at evenly spaced p from `last` to one half."""
    steps = torch.linspace(last, 0.5, many, dtype=torch.float64).tolist()
    return [quantile(p) / quantile(last) for p in steps]


derived = [-value for value in half(8)[:-1]] + half(9)[::-1]
gap = max(abs(a - b) for a, b in zip(derived, nf4.CODES["nf4"], strict=True))
print(f"the last p is {last:.7f}")
print("derived:", *(f"{value:.3f}" for value in derived))
print(f"largest difference from the published values: {gap:.0e}")
assert gap < 3e-7

# %% [markdown]
# The mean reproduces all digits of the constant, and the derived values agree with the
# published ones to `2e-07`. bitsandbytes, the library that NF4 comes from, has the same
# constant in a comment above its table of values.
#
# ### Which value is nearest?
#
# A **midpoint** lies halfway between two neighboring values, and a ratio above it
# belongs to the upper one. So the code of a ratio is the number of midpoints below it.
#
# ### Exercise 7.3: the nearest code
#
# Difficulty two of five, importance five of five, about ten minutes. A warm-up of two
# lines. `values`, `(k,)`, rise with any spacing. Return the code of each of the
# `ratios`, from 0 to `k - 1`, in the shape of `ratios`; `torch.int64` is fine. A ratio
# on a midpoint gets the lower value. For example, the values `[-1, 0, 1]` and the
# ratios `[-0.7, 0.2, 0.5]` give `[0, 1, 1]`.
#
# <details><summary>Hint one: a question</summary>
#
# Which function of torch tells you where a number falls in a sorted list?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `values[1:]` and `values[:-1]` are as long as the list of midpoints.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `midpoints = (values[1:] + values[:-1]) / 2`
#
# </details>


# %% tags=["exercise-7.3"]
def my_nearest(ratios, values):
    """For each ratio, the number of the nearest of the rising values, from 0 on."""
    ### BEGIN SOLUTION
    midpoints = (values[1:] + values[:-1]) / 2
    return torch.bucketize(ratios, midpoints)
    ### END SOLUTION


# %% tags=["check-7.3", "points-2"]
checks.nearest_code(my_nearest)

# %% [markdown]
# ### The whole format
#
# The next cell combines exercises 7.1 and 7.3. With NF4's values, it must equal our
# library `peft_from_scratch.nf4`, bit for bit. It does not treat blocks of zeros.


# %%
def scaled(w, block):
    rows = F.pad(w.flatten(), (0, -w.numel() % block)).view(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return rows * (1 / absmax), absmax


def restored(w, block, values):
    ratios, absmax = scaled(w, block)
    codes = torch.bucketize(ratios, (values[1:] + values[:-1]) / 2)
    return (values[codes] * absmax).flatten()[: w.numel()].view(w.shape)


NF4 = torch.tensor(nf4.CODES["nf4"])
theirs = nf4.dequantize(nf4.quantize(plain, 64, double=False))
print("equal to our library:", torch.equal(restored(plain, 64, NF4), theirs))

# %% [markdown]
# NF4 was designed for equal use of its codes. The next cell counts how often each code
# is used in blocks of 64 normal weights. It also prints their **entropy**: 4 bits if
# all are used equally often, and less otherwise. Predict the largest count, divided by
# the smallest.

# %%
lesson.predict("7.2", low=None, high=None, unit="times as often")

# %%
codes = nf4.quantize(plain, 64, double=False).codes().long()
share = codes.bincount(minlength=16) / len(codes)
entropy = -(share * share.log2()).sum()
print("% of all weights, code by code:")
print(*(f"{100 * each:.1f}" for each in share.tolist()))
print(f"entropy of the codes: {entropy:.2f} of 4 bits")
lesson.measured("7.2", (share.max() / share.min()).item())

# %% [markdown]
# The codes are not used equally often: one is used 5.4 times as often as another. In
# the derivation, the value 1 stands for `1.85` standard deviations, the last quantile.
# In a block, it stands for the largest weight, typically `2.5` standard deviations. So
# more ratios lie near zero than the derivation assumes. The entropy is 3.88 bits.
#
# ### Which sixteen values are best?
#
# The answer depends on what *best* means. We use: the smallest mean squared error. The
# **Lloyd-Max algorithm**, or Lloyd's alternation, finds these values. It assigns each
# ratio $\rho_i$ to its nearest value, moves each value to the mean of its ratios, and
# repeats. A weight's error is its ratio's error times absmax, so absmax is squared in
# the squared error. Therefore each ratio counts with absmax squared in the mean:
#
# $$\text{value}_k = \frac{\sum_i \text{absmax}_i^2\ \rho_i}
# {\sum_i \text{absmax}_i^2} \qquad \text{over the } i \text{ assigned to } k$$
#
# For example, `0.4` from a block with absmax `1`, and `0.5` from a block with absmax
# `2`, have the weighted mean `(1 · 0.4 + 4 · 0.5) / 5 = 0.48`.
#
# The figure shows the fitted values and three other code books under a histogram of the
# ratios. **FP4** is a floating-point number of four bits: sign, two of exponent,
# mantissa.

# %%
fitted = formats.best_values(plain.view(-1, 64))
print("fitted:", *(f"{value:.2f}" for value in fitted.tolist()))
print("NF4:   ", *(f"{value:.2f}" for value in NF4.tolist()))
books = {
    "NF4": NF4,
    "FP4": sorted(set(nf4.CODES["fp4"])),
    "int4, evenly spaced": nf4.CODES["int4"][1:],
    "fitted (Lloyd-Max)": fitted,
}
ratios, _ = scaled(plain[: 2**16], 64)
figure = code_books.code_books(
    ratios.flatten().tolist(),
    {name: torch.as_tensor(book).tolist() for name, book in books.items()},
    title="NF4's values are close to the fitted ones",
    subtitle="Normal weights in blocks of 64, each divided by the absmax of its block.",
)
inner = {k: int((torch.as_tensor(v).abs() < 0.5).sum()) for k, v in books.items()}
said = ", ".join(f"{k} {count}" for k, count in inner.items())
lesson.show(figure, f"Values between -0.5 and 0.5: {said}.")

# %% [markdown]
# NF4 is close to the fitted values: both have 10 values between -0.5 and 0.5. Unlike
# the fitted ones, NF4 restores zero and the largest weight of a block exactly, which
# costs some squared error. FP4 wastes codes on 0 and ±`0.0052`, the three squares in
# the middle.
#
# ## On trial: claim Q1
#
# The textbook that this course tests calls NF4 "optimized" for normal weights. QLoRA's
# paper calls it "information theoretically optimal", and means equally used codes. We
# test another meaning, the smallest error: no other sixteen values may do better.
#
# The rule, written before any run and printed below, asks by how many percent NF4's
# error exceeds that of the best values. Up to 1 %, the claim holds; above 5 %, it does
# not; in between, it holds under a condition (`holds when`).
#
# Even 5 % is strict. One more bit per weight about halves the error, so an error `f`
# times as large costs about `log2(f)` bits. For 5 %, that is `log2(1.05) = 0.07` bits.
#
# Values are fitted on half of the blocks, and tested on the other half. Five **seeds**
# of the random generator give five sets of weights. We print the mean result and, in
# brackets, an **interval** likely to contain the true mean (see notebook 01). The
# **control** is FP4: if it were not clearly worse, the measure would be blind.
#
# **Affine int4** has sixteen evenly spaced values from the smallest to the largest
# weight of a block, and needs two constants. `best-pinned` is a fit that keeps -1, 0
# and 1.

# %%
lesson.rule("Q1")
lesson.predict("7.3", low=None, high=None, unit="% more error than the best")

# %%
configs = [formats.config("gaussian", 64, seed) for seed in formats.SEEDS]
tried = [formats.compute(config | {"values": 2**18}) for config in configs]
for name in ("best", "best-pinned", "nf4", "int4", "fp4", "affine"):
    bits, error = tried[0]["bits"][name], tried[0]["error"][name]
    print(f"{name:11} {bits:.2f} bits a weight, error {error:5.2f} %")
excess = [100 * (t["error"]["nf4"] / t["error"]["best"] - 1) for t in tried]
live = over_seeds(excess)
lesson.measured("7.3", live[0])

# %% [markdown]
# NF4's error is 5.29 % above that of the best values, and about half of this gap pays
# for keeping -1, 0 and 1. The control, FP4, is clearly worse.
#
# Affine int4 has a smaller error than NF4, but takes half a bit more per weight. So we
# compare at equal bits, with **shipped** runs, which are stored with the course. They
# use normal weights and two trained models: **MiniLM**, a sentence encoder, and
# **tiny**, our language model of one million parameters.

# %%
names = dict(nf4="NF4", affine="affine int4", best="fitted", int4="int4", fp4="FP4")
places = [(s, block) for s in formats.HONEST for block in formats.BLOCKS]
shipped = {place: runs.stored(formats.config(*place)).result for place in places}
print("error in % [bits]     " + "".join(f"{label:>15}" for label in names.values()))
for (source, block), found in shipped.items():
    cells = [f"{found['error'][k]:8.2f} [{found['bits'][k]:.2f}]" for k in names]
    print(f"{source:9} block {block:4}  {''.join(cells)}")

# %%
names["nf4-double"] = "NF4, constants in 8 bits"
real = [shipped["minilm", block] for block in formats.BLOCKS[::-1]]
series = {
    label: [(run["bits"][k], run["error"][k]) for run in real]
    for k, label in names.items()
}
figure = curves.lines(
    series,
    x="Bits for each weight, constants included",
    y="Error, % of the rms of the weights",
    title="Formats can only be compared at equal bits",
    subtitle="Weights of MiniLM in blocks of 128, 64 and 32. Lower and left is better.",
    control=("FP4",),
    names="foot",
)
said = [f"{k}, {x[0][0]:.2f} bits and {x[0][1]:.1f} %" for k, x in series.items()]
lesson.show(figure, f"With the fewest bits: {'; '.join(said)}.")
lesson.live("Q1", *live)

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("Q1", guess="7.3")

# %% [markdown]
# NF4 is near-optimal, not optimal: the best values gain a few percent. On MiniLM, in
# blocks of 64, NF4 has 9.40 % and the fitted values 9.09 %. So there is little reason
# to replace NF4.
#
# **NF4 or affine int4?** The answer depends on how the constants are stored. In
# `float32`, NF4 is ahead: at 5 bits on MiniLM, it has 8.81 % and affine int4 9.38 %.
# But practical int4 formats often store the two constants of a block in `20` bits. In
# blocks of 32, that makes `4 + 20 / 32 = 4.625` bits per weight. We have not run such a
# format, so whether it beats NF4 at equal bits is open.
#
# ### A trap: weights that came from four bits
#
# Never rank formats on weights that one of them has made. Our copy of SmolLM2 was once
# packed in affine int4, in blocks of 32. MiniLM's weights were never in four bits. The
# next cell quantizes one matrix of each.

# %%
W = next(iter(formats.matrices("smollm2").values()))
honest = next(iter(minilm.matrices().values()))
for name, w in (("SmolLM2", W), ("MiniLM", honest)):
    affine = off(w, nf4.Affine.of(w, 32).dequantize())
    ours = off(w, nf4.dequantize(nf4.quantize(w, 32, double=False)))
    most = max(len(row.unique()) for row in w.flatten().view(-1, 32)[:2000])
    print(f"{name:8} affine int4 {affine:.2g} %, NF4 {ours:.2g} %; ", end="")
    print(f"at most {most} different values in a block of 32")

# %% [markdown]
# On SmolLM2, affine int4 has an error of 0 %, because it finds its own values again. On
# MiniLM it has 7.9 %.
#
# ## Idea three: quantize the constants, too
#
# In blocks of 64, the constants take half a bit per weight. **Double quantization**
# stores them in eight bits each, which cuts this to about an eighth of a bit. Constants
# are all positive and similar in size, so their mean, the offset, is subtracted first.
# The differences are quantized as the weights were: a group of 256 constants shares a
# **second-level scale**, and the code book has 256 values.
#
# $$\text{code}_b = \text{the position of the value nearest to }
# \frac{\text{absmax}_b - \text{offset}}{\text{scale}}$$
#
# $$\text{absmax}'_b = \text{values}[\text{code}_b] \cdot \text{scale} + \text{offset}$$
#
# | symbol | what it is | stored as |
# |---|---|---|
# | offset | the mean of all absmax of a tensor | `float32`, one per tensor |
# | scale | largest absolute difference of a group | `float32`, one per group |
#
# For example, the constants `2`, `4` and `6` have the offset `4` and the scale `2`, and
# give the ratios `-1`, `0` and `1`. The bits per weight are
#
# $$\text{bits} = 4 + \frac{8}{64} + \frac{32}{64 \cdot 256} \approx 4.127$$
#
# ### Exercise 7.4: double quantization
#
# Difficulty three of five, importance four of five, about fifteen minutes.
# `absmax`, `(n,)`, are the constants in `float32`. `values` is a code book
# of at most 256 values, rising from about -1 to 1. `my_double` returns the codes,
# `(n,)` in `torch.uint8`; the scales, called `units`, `(⌈n / block⌉,)`; and the
# offset, `()`. `my_restored` returns the constants, `(n,)`. The last group may be
# short. Where a scale is zero, any code from 0 to `len(values) - 1` will do. Index with
# `codes.long()`, because PyTorch takes a `uint8` index for a mask. For example,
# `[2, 4, 6]` with the values `[-1, 0, 1]` gives the codes `[0, 1, 2]`, the units `[2]`
# and the offset `4`.
#
# <details><summary>Hint one: a question</summary>
#
# Must you fill up the last group with zeros before you subtract the offset, or after?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `repeat_interleave(block)` turns `units`, `(⌈n / block⌉,)`, into a scale for every
# constant; then cut to `n`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `offset = absmax.mean()`
#
# </details>


# %% tags=["exercise-7.4"]
def my_double(absmax, values, block=256):
    """(codes (n,) uint8, units (⌈n / block⌉,), offset ()) of the constants (n,)."""
    ### BEGIN SOLUTION
    offset = absmax.mean()
    rows = F.pad(absmax - offset, (0, -len(absmax) % block)).view(-1, block)
    units = rows.abs().amax(1)
    ratios = (rows / units[:, None]).nan_to_num(0.0).flatten()[: len(absmax)]
    midpoints = (values[1:] + values[:-1]) / 2
    return torch.bucketize(ratios, midpoints).to(torch.uint8), units, offset
    ### END SOLUTION


def my_restored(codes, units, offset, values, block=256):
    """The constants (n,) that the codes stand for."""
    ### BEGIN SOLUTION
    unit = units.repeat_interleave(block)[: len(codes)]
    return values[codes.long()] * unit + offset
    ### END SOLUTION


# %% tags=["check-7.4", "points-3"]
checks.double_quantization(my_double, my_restored)

# %% [markdown]
# ### Three recipes
#
# Libraries use different code books for the constants. That of bitsandbytes has its
# values closest together near zero. QLoRA's paper says "FP8", an eight-bit
# floating-point number. torchao, PyTorch's quantization library, spaces its values
# evenly. The next cell compares them on all weights of MiniLM.

# %%
matrices = list(minilm.matrices().values())
absmax = [nf4.quantize(w, double=False).absmax for w in matrices]
recipes = {"none": False, "bitsandbytes": True, "FP8": "fp8", "torchao": "int8"}
for name, recipe in recipes.items():
    packed = [nf4.quantize(w, double=recipe) for w in matrices]
    bits = 8 * sum(q.nbytes for q in packed) / sum(q.numel for q in packed)
    constant = off(flat(absmax), flat(q.constants() for q in packed))
    weight = off(flat(matrices), flat(map(nf4.dequantize, packed)))
    print(f"{name:12} {bits:.3f} bits; error: constants {constant:.2f} %, ", end="")
    print(f"weights {weight:.3f} %")

# %% [markdown]
# All three recipes go from 4.500 to 4.127 bits per weight. The error of the weights
# rises from 9.389 to 9.414 % at most. **But the largest weight of a block no longer
# comes back exactly**: it becomes the rounded absmax, about 0.39 % off in bitsandbytes.
#
# ## On trial: claim Q2
#
# The textbook says that one backpropagates through quantized weights "using double
# quantization".
#
# **Can a code have a gradient?** No, a code is a whole number. And the restored weight,
# as a function of the original one, is a staircase with slope zero between the jumps.
# The next cell asks for a gradient of the codes, then changes each weight by about
# `0.001` %.

# %%
codes = nf4.quantize(honest, double=False).codes()
try:
    codes.requires_grad_()
except RuntimeError as error:
    print("codes:", error)
torch.manual_seed(0)
nudged = honest * (1 + 1e-5 * torch.randn_like(honest))
same = nf4.quantize(nudged, double=False).codes() == codes
kept = 100 * same.float().mean()
print(f"codes that stay when weights change by 0.001 %: {kept:.2f} %")

# %% [markdown]
# PyTorch refuses, and 100.00 % of the codes stay the same. QLoRA needs no gradient of
# the codes, because they are frozen. For each product, it restores the weight $W'$ from
# them. The gradient of the input $x$ passes through $W'$, and so reaches the LoRA
# parameters in earlier layers:
#
# $$y = x\,W'^T \qquad
# \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\,W'$$
#
# How the constants of $W'$ are stored appears in neither formula. To test this, we
# switch double quantization **off**, and compare the gradients with those of a model
# that holds the same $W'$ in `float32`. We compare the gradients of a LoRA on every
# projection and of the embedded tokens, the output of the embedding. By how many
# percent do they differ, at most over the seeds? Up to 0.01 %, the claim is wrong as
# stated.
#
# The formulas say zero, so this checks the code more than the theory. The **control**
# uses the original weights $W_0$; its gradients must differ clearly. The run here is on
# tiny.

# %%
lesson.rule("Q2")
lesson.predict("7.4", low=None, high=None, unit="% gradient error without it")

# %%
found = {}
for double in (False, True):
    asked = [constants.gradient_config("tiny", double, seed) for seed in (0, 1, 2)]
    found[double] = [constants.compute(config) for config in asked]
    error = max(each["error"] for each in found[double])
    control = min(each["control"] for each in found[double])
    how = f"double quantization {'on' if double else 'off':3}"
    print(f"{how}: error {error:.1g} %, control {control:.0f} %")
errors = [each["error"] for each in found[False]]
lesson.measured("7.4", max(errors))
lesson.live("Q2", max(errors), min(errors), max(errors), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("Q2", guess="7.4")

# %% [markdown]
# Use double quantization to save memory; gradients do not need it. Rounding the weights
# does change gradients. The control is the length of this change, in percent of the
# length of the gradient with $W_0$: at least `106` % on SmolLM2, and 19 % on tiny.
#
# ## Idea four: count the bytes
#
# Embeddings, norms and the output head usually stay in 16 bits. They are a fifth of
# SmolLM2's parameters, but a small part of a large model.
#
# ### Exercise 7.5: the bytes of a quantized model
#
# Difficulty two of five, importance four of five, about ten minutes. `packed` lists the
# shapes of the four-bit tensors, and `plain` those of the 16-bit tensors. Return the
# bytes, a whole number. Each four-bit tensor has codes, two in a byte, and one constant
# per block. A constant takes four bytes, or one with `double`. With `double`, each
# tensor also has a `float32` scale per 256 constants and one `float32` offset. Within
# each tensor, round its bytes, blocks and groups of 256 up to whole ones. For example,
# `packed=[(64, 64)]` and `plain=[(10,)]` take `2048 + 64 + 4 + 4 + 20 = 2140`.
#
# <details><summary>Hint one: a question</summary>
#
# How many blocks has a tensor of `n` weights? How many groups of 256 do their constants
# make?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `math.prod(shape)` is `n`. `-(-n // block)` divides and rounds up.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `total = 2 * sum(math.prod(shape) for shape in plain)`
#
# </details>


# %% tags=["exercise-7.5"]
def my_bytes(packed, plain, block=64, double=True):
    """Bytes of a model: shapes of `packed` in four bits, of `plain` in sixteen."""
    ### BEGIN SOLUTION
    total = 2 * sum(math.prod(shape) for shape in plain)
    for shape in packed:
        n = math.prod(shape)
        blocks = -(-n // block)
        total += -(-n // 2)
        total += blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks
    return total
    ### END SOLUTION


# %% tags=["check-7.5", "points-2"]
checks.model_bytes(my_bytes)

# %% [markdown]
# ## On trial: claim Q3
#
# The textbook says that a model of `65` billion parameters takes about 130 GB (billion
# bytes) in fp16, and about 33 GB with QLoRA. This can be counted from the tensor shapes
# of such a model, Llama-65B. Predict the second number. The rule compares each of the
# two numbers with the count, and keeps the larger error. It accepts the count only if
# the formula of exercise 7.5 fits real tensors; the cell checks this on SmolLM2.

# %%
lesson.rule("Q3")
lesson.predict("7.5", low=None, high=None, unit="GB")

# %%
configs = [constants.bytes_config("Llama-65B", double) for double in (True, False)]
large, single = map(constants.compute, configs)
rows = {
    "in 16 bits": large["whole"],
    "codes": large["codes"],
    "constants, quantized": large["constants"],
    "the rest, in 16 bits": large["rest"],
    "sum, 8-bit constants": large["formula"],
    "sum, float32 constants": single["formula"],
}
for label, count in rows.items():
    print(f"{label:26} {count / 1e9:7.2f} GB")
lesson.measured("7.5", large["formula"] / 1e9)
small = constants.compute(constants.bytes_config("smollm2", True))
print(f"SmolLM2 by the formula: {small['formula']:,} bytes")
print(f"SmolLM2 in its tensors: {small['held']:,} bytes")
assert small["formula"] == small["held"]
wrong = [large["formula"] / 33e9 - 1, large["whole"] / 130e9 - 1]
worse = 100 * max(map(abs, wrong))
lesson.live("Q3", worse, worse, worse)

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("Q3")

# %% [markdown]
# Plan with 34.5 GB for the weights. The textbook's 33 GB is about what the projections
# alone take, 32.38 GB of codes and 1.03 GB of constants. Another 1.05 GB stays in 16
# bits. Adapters, gradients, optimizer states and activations come on top (see notebook
# 08).
#
# ## Now with the library
#
# bitsandbytes must agree with our code to the last bit. `compress_statistics` is its
# name for double quantization.

# %%
torch.manual_seed(0)
w = torch.randn(256, 512)
code, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
back, ours = bnb.dequantize_4bit(code, state), nf4.quantize(w, double=False)
print("codes:    ", torch.equal(code.flatten(), ours.packed))
print("constants:", torch.equal(state.absmax, ours.absmax))
print("restored: ", torch.equal(back, restored(w, 64, NF4)))
code, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
twice = torch.equal(bnb.dequantize_4bit(code, state), nf4.dequantize(nf4.quantize(w)))
print("with double quantization:", twice)
assert twice

# %% [markdown]
# ### Break it on purpose
#
# On a CPU, bitsandbytes restores one of these four tensors wrongly. Which one, and what
# is special about its shape? Are its codes wrong, or only the restored weights?

# %%
for shape in ((128, 128), (96, 128), (128, 96), (128 * 96,)):
    w = torch.randn(shape)
    code, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = bnb.dequantize_4bit(code, state)
    right = torch.equal(code.flatten(), nf4.quantize(w, double=False).packed)
    print(f"{shape!s:11} codes as ours: {right}; error: ours ", end="")
    print(f"{off(w, restored(w, 64, NF4)):.1f} %, bitsandbytes {off(w, theirs):.1f} %")

# %% [markdown]
# <details><summary>What goes wrong</summary>
#
# The `(128, 96)` tensor has the right codes, but an error of 25.3 % in place of 9.1 %.
# Its rows of `96` are not whole blocks of 64. The quantizer lets blocks run on from row
# to row. The dequantizer of bitsandbytes `0.50.2` on a CPU begins a new block with
# every row, and so takes wrong constants, without any warning. (GPUs and newer versions
# may do better.) The remedy is to flatten the tensor first, as in the last line.
#
# </details>
#
# ## Play
#
# The slider sets the block size of NF4 with double quantization. Where it does not
# move, read the table.


# %%
def look(block):
    cells, all_ = [f"block {block:5}"], slice(None)
    tried = ("normal", plain, all_), ("MiniLM", honest, all_)
    for name, w, which in (*tried, ("ordinary among outliers", wild, ordinary)):
        q = nf4.quantize(w, block)
        cells.append(f"{name} {off(w, nf4.dequantize(q), which):5.2f} %")
    print(f"{', '.join(cells)}; {q.bits_per_value:.3f} bits")


slider = ipywidgets.SelectionSlider(options=blocks, value=64, description="block")
_ = ipywidgets.interact(look, block=slider)
for block in blocks:
    look(block)

# %% [markdown]
# From blocks of 8 to 4,096, the error grows from 7.17 to 11.00 % on normal weights, but
# to 64.28 % among outliers. MiniLM lies between, at 19.49 %.
#
# ## Quiz
#
# Answer for yourself, then open the options.
#
# **1. A format has a smaller error than NF4 on your weights. What do you ask first?**
#
# <details><summary>How fast it is</summary>
#
# No. First make sure that the comparison is fair.
#
# </details>
# <details><summary>How many bits it stores, and whether it made these weights</summary>
#
# Right. Affine int4 took half a bit more, and was perfect on weights of its own.
#
# </details>
# <details><summary>Nothing: the smaller error wins</summary>
#
# No. Blocks of eight weights have a small error too, and take eight bits.
#
# </details>
#
# **2. What does one huge weight do to a matrix in NF4?**
#
# <details><summary>It makes the whole matrix coarse</summary>
#
# No. That would take one scale for the whole tensor.
#
# </details>
# <details><summary>It is cut off at the largest value</summary>
#
# No. It sets absmax, so it comes back exactly, or almost so with double quantization.
#
# </details>
# <details><summary>It makes the other weights of its block coarse</summary>
#
# Right. The other blocks have their own absmax.
#
# </details>
#
# **3. What is double quantization for?**
#
# <details><summary>To let gradients through the quantized weights</summary>
#
# No. Gradients pass through the restored weights, with it or without.
#
# </details>
# <details><summary>To shrink the constants</summary>
#
# Right. From half a bit per weight to about an eighth.
#
# </details>
# <details><summary>To quantize the weights a second time</summary>
#
# No. The codes of the weights do not change.
#
# </details>
#
# **4. (From notebook 04.) You add LoRA to this model. What is zero at initialization?**
#
# <details><summary>The output of the adapters</summary>
#
# Right. $B$ is zero, so the model begins as the *quantized* model.
#
# </details>
# <details><summary>The difference from the original model</summary>
#
# No. Untrained adapters do not correct the rounding.
#
# </details>
# <details><summary>All gradients of the adapters</summary>
#
# No. The gradient of $A$ is zero, because $B$ is. The gradient of $B$ is not.
#
# </details>
#
# **5. (From notebook 05.) You use rank `64` in place of `8`. What grows?**
#
# <details><summary>The codes</summary>
#
# No. They are frozen, and do not depend on adapters.
#
# </details>
# <details><summary>The adapters, their gradients and their optimizer states</summary>
#
# Right. Each grows eightfold, which is no longer small next to a four-bit base.
#
# </details>
# <details><summary>The quantization error</summary>
#
# No. It was made before the first optimizer step.
#
# </details>
#
# ### In your own words
#
# A colleague says: "NF4 is information-theoretically optimal, so nothing in four bits
# can beat it." Answer in three sentences, with what you measured.
#
# <details><summary>A model answer</summary>
#
# "That *optimal* means equally used codes, but one code is used 5.4 times as often as
# another. The error of sixteen fitted values is about 5 % smaller at the same bits. So
# NF4 is near-optimal, and a comparison must name the bits as stored."
#
# </details>
#
# ### Transfer: spend one more bit
#
# You may spend about five bits per weight: on thirty-two values in blocks of 64, or on
# NF4 in smaller blocks. Predict which has the smaller error on normal weights, and
# defend it. Which other weights would you test, as a control?
#
# <details><summary>A model answer</summary>
#
# With double quantization, NF4 in blocks of 8 takes 5.016 bits and has an error of 7.17
# %. Thirty-two values in blocks of 64 take `5.127` bits. They halve the gaps between
# values, and so roughly the error of 9.21 %: they win on normal weights. (Check this
# with `half(16)`, `half(17)` and `restored`.) The control is weights with outliers.
# There, small blocks help more, from 14.04 down to 8.03 %, and the choice is close.
#
# </details>
#
# ## Limits
#
# - **The measure.** All errors here are of *weights*, but a model's answers depend more
#   on some weights than on others.
# - **The weights.** Large language models may have outliers that ours lack.
# - **The paper** (its results, not ours) reports that NF4 with double quantization
#   matched 16-bit fine-tuning on academic benchmarks, and that FP4 was about one point
#   behind.
#
# ## Your guesses
#
# Nine in ten of your ranges should hold the measured value.

# %%
lesson.calibration()

# %% [markdown]
# ## Receipt

# %%
lesson.receipt()

# %% [markdown]
# ## Where to go next
#
# - Dettmers and others, [QLoRA](https://arxiv.org/abs/2305.14314): sections two and
#   three.
# - Yoshida, [NF4 isn't information theoretically optimal (and that's
#   good)](https://arxiv.org/abs/2306.06965).
# - Dettmers and others, [8-bit optimizers via block-wise
#   quantization](https://arxiv.org/abs/2110.02861).
# - A user asks where the constant comes from: [issue
#   968](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/968).
