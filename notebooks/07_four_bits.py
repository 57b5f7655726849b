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
# - quantize a weight in blocks, and restore it;
# - derive NF4's values and its constant `0.9677083`;
# - compare formats fairly, by their error *and* by the bits they store;
# - save memory by rounding each block's largest weight, too: **double quantization**;
# - write a test that finds wrongly restored weights;
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
from peft_from_scratch.course import code_books, constants, curves, formats, minilm
from peft_from_scratch.course import over_seeds, rounding_pictures, runs
from peft_from_scratch.course import storage_pictures
from peft_from_scratch.course.checks import four_bits as checks

# %% [markdown]
# ## The result first
#
# **Quantizing** a weight means rounding it to one of a few allowed values, so that it
# takes fewer bits. SmolLM2 answers three orders of notebook 00: a sentence goes in, and
# one line of JSON comes out. Untrained for this task, it sees five solved examples.
# Then we quantize every **projection** to four bits: every weight matrix in the
# attention and the MLP of each layer.

# %%
model, tokenizer = lesson.load_model()
task = pfs.tasks.load_task("orders")
shots = [(r["prompt"], r["completion"]) for r in task.train.select(range(5))]
asked = task.test.select(range(3))
ask = dict(rows=asked, template="chat", examples=shots)
before = pfs.evaluation.answer_rows(model, tokenizer, task, **ask).answers
names = nf4.quantize_model(model)
after = pfs.evaluation.answer_rows(model, tokenizer, task, **ask).answers
for row, first, second in zip(asked, before, after, strict=True):
    print(f"{row['prompt']}\n  32 bits: {first}\n  4 bits:  {second}")

# %%
packed = [model.get_submodule(name).quantized for name in names]
n, held = sum(q.numel for q in packed), sum(q.nbytes for q in packed)
print(f"{len(names)} projections, {n:,} weights: {4 * n / 1e6:.1f} MB in 32 bits")
rows = {
    "16-bit weights": {"weights as numbers": 16},
    "four bits, a 32-bit constant for 64 weights": {"codes": 4, "constants": 32 / 64},
    "NF4, as stored here": {"codes": 4, "constants": 8 * held / n - 4},
}
figure = storage_pictures.bit_bars(rows, title="NF4 takes a quarter of 16 bits")
words = f"4 bits of codes, {8 * held / n - 4:.3f} of constants; {held / 1e6:.1f} MB"
lesson.show(figure, f"NF4: {words}.")

# %% [markdown]
# The projections shrink from 424.7 to 54.8 MB. Two of three answers were right, and
# none is right now. Notebook 08 measures this cost. Our copy of SmolLM2 was once
# rounded to another four-bit format (see "A trap"), so these weights are rounded twice.
# A copy that never was may lose less. This notebook explains the four bits of codes and
# the 0.127 bits of constants.
#
# ## Idea one: a scale for each block
#
# Four bits can tell sixteen values apart. So we choose sixteen values from -1 to 1, the
# **code book**, and round every weight to the nearest. The position of that value, from
# 0 to 15, is the weight's **code**. Before that, we divide by **absmax**: the largest
# absolute value in the **block**, a group of weights that share this scale.
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
# For example, in a block whose absmax is 2, the weight `0.5` has the ratio `0.25`. The
# nearest value of NF4 is `0.2461`, whose code is 10. The weight comes back as `0.4922`.
#
# The picture shows one block of 64 weights, and the value that each is rounded to.

# %%
torch.manual_seed(0)
block_of_64 = torch.randn(64)
NF4 = torch.tensor(nf4.CODES["nf4"])


def look(times):
    w = block_of_64.clone()
    w[w.abs().argmax()] *= times
    figure = rounding_pictures.block_on_line(w.tolist(), NF4.tolist())
    lesson.show(figure, f"Largest weight times {times}: absmax {w.abs().max():.2f}.")


look(1)

# %% [markdown]
# The largest weight decides how far apart the sixteen squares are. It comes back
# exactly, because absmax is stored exactly. No weight uses a hollow square.
#
# Suppose that the largest weight becomes five times as large. The errors of the others
# form a vector. By which factor does its length grow? Before you run, replace None by
# the ends of a range that you are `90` % sure of, here and further down.

# %%
lesson.predict("7.1", low=None, high=None, unit="times the error")

# %%
others = block_of_64.abs() < block_of_64.abs().max()
errors = []
for times in (1, 5):
    w = block_of_64.where(others, times * block_of_64)
    back = nf4.dequantize(nf4.quantize(w, double=False))
    errors.append((back - w)[others].norm().item())
lesson.measured("7.1", errors[1] / errors[0])
slider = ipywidgets.SelectionSlider(options=[1, 2, 5, 10, 20], value=5)
_ = ipywidgets.interact(look, times=slider)
look(5)

# %% [markdown]
# The error of the others grows 3.97 times, because only a few values are left for them.
# So an **outlier**, a weight far larger than most, must not set the scale of a whole
# matrix. (The slider shows other factors.) The remedy is to cut the matrix into blocks
# of, say, 64 weights, row after row. An outlier then spoils only its own block.
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
# ### The whole format
#
# Exercise 7.1 is the first half of the format. The rest is to find the nearest value,
# look it up, and multiply by absmax. The code of a ratio is the number of **midpoints**
# below it, which lie halfway between neighboring values; `bucketize` counts them.
#
# We measure the **error**: the root mean square (rms) of the rounding errors, in
# percent of the rms of the weights.

# %%
ratios_of = lesson.mine(my_blocks, checks.ratios_and_absmax)


def restored(w, block, values):
    ratios, absmax = ratios_of(w, block)
    codes = torch.bucketize(ratios, (values[1:] + values[:-1]) / 2)
    scale = absmax.repeat_interleave(block)[: w.numel()].view(w.shape)
    return values[codes] * scale


def off(w, back, which=slice(None)):
    """The rms of the rounding errors, in % of the rms of the weights."""
    return 100 * ((back - w)[which].norm() / w[which].norm()).item()


plain = torch.randn(2**18)
ours = restored(plain, 64, NF4)
print(f"error of NF4: {off(plain, ours):.2f} %")
theirs = nf4.dequantize(nf4.quantize(plain, double=False))
lesson.control("Our library restores the same weights.", off(theirs, ours) < 1e-3)

# %% [markdown]
# ### How large should a block be?
#
# The next figure compares normal weights with the same weights after one in 1,000 was
# multiplied by 20. These outliers are left out of the error.

# %%
ordinary = torch.rand(len(plain)) > 0.001
wild = torch.where(ordinary, plain, 20 * plain)
series = {"normal weights": [], "one in 1,000 is 20 times as large": []}
for block in (2**k for k in range(3, 13)):
    for line, w in zip(series.values(), (plain, wild), strict=True):
        line.append((block, off(w, restored(w, block, NF4), ordinary)))
figure = curves.lines(
    series,
    x="Weights in a block, count",
    y="Error of ordinary weights, % of their rms",
    title="An outlier spoils its whole block, so blocks should be small",
    log="x",
    names="foot",
    height=2.3,
)
ends = (f"{line[0][1]:.0f} to {line[-1][1]:.0f} %" for line in series.values())
lesson.show(figure, "From blocks of 8 to 4,096: " + "; with outliers ".join(ends))

# %% [markdown]
# In blocks of 4,096, outliers raise the error of the ordinary weights from 11 to 64 %.
# In blocks of 8, they raise it only from 7 to 8 %.
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
# PyTorch stores whole bytes, so two codes share one: $\text{byte} = 16\,c_0 + c_1$.
# Shifting by four places (`<< 4`) multiplies by 16; `& 15` keeps the low half.

# %%
codes = torch.tensor([9, 3], dtype=torch.uint8)
packed = (codes[::2] << 4) | codes[1::2]
unpacked = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
figure = storage_pictures.byte(*codes.tolist())
lesson.show(figure, f"{codes.tolist()} -> {packed.tolist()} -> {unpacked.tolist()}")

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
# - NF4 has eight values from -1 to 0 and nine from 0 to 1. The halves share the zero.
#   Thus zero stays zero, and the largest weight of a block can come back exactly.
# - For the values above zero, $p$ runs evenly from one half to $p_{\text{last}}$. For
#   those below zero, it runs evenly from $1 - p_{\text{last}}$ to one half.
# - Dividing by the last quantile makes the ends -1 and 1.
#
# In the picture, each evenly spaced $p$ meets the curve, and drops to its quantile.

# %%
normal = NormalDist()
last = 1 - (1 / 30 + 1 / 32) / 2
figure = rounding_pictures.quantiles_on_curve(
    NF4.tolist(), normal.cdf, normal.inv_cdf(last)
)
words = f"p_last is {last:.7f}; its quantile {normal.inv_cdf(last):.3f} becomes 1."
lesson.show(figure, words)

# %% [markdown]
# **Where does 0.9677083 come from?** It is $p_{\text{last}}$, which cannot be 1, since
# $\Phi^{-1}(1)$ is infinite. Instead, cut the distribution into $k$ equal shares, and
# put the last value in the middle of the last share, at $p = 1 - 1/(2k)$. NF4 takes the
# mean of two such $p$: one for $k = 16$, its number of values, and one for $k = 15$. We
# know of no text that says why 15, and of no proof that the mean is best. bitsandbytes,
# the library that NF4 comes from, has the constant in a comment.
#
# ### Exercise 7.2: derive NF4, for any number of values
#
# Difficulty four of five, importance five of five, about twenty minutes. Write the
# construction above for `n` values, with `k = n` and `k = n - 1`, and for any
# distribution that is symmetric around zero. `n` is even, and 4 at least. `quantile`
# takes one number `p` and returns one number. Return the values, `(n,)` in `float32` or
# `float64`, rising: `n / 2` from -1 to 0 and `n / 2 + 1` from 0 to 1, which share the
# zero. For example, `n=4` and the quantile `2 * p - 1` give `[-1, 0, 0.5, 1]`.
#
# <details><summary>Hint one: a question</summary>
#
# Which two numbers of shares does NF4 average for sixteen values? Which are they for
# `n` values?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Leave the zero out of one half, and turn one half round: `(n / 2 - 1,)` and
# `(n / 2 + 1,)` join to `(n,)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `last = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2`
#
# </details>


# %% tags=["exercise-7.2"]
def my_values(n, quantile):
    """The n values of NF4's construction for this distribution: (n,), -1 to 1."""
    ### BEGIN SOLUTION
    last = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2

    def half(many):  # values from 1 down to 0
        shares = torch.linspace(last, 0.5, many, dtype=torch.float64).tolist()
        return [quantile(p) / quantile(last) for p in shares]

    negative = [-value for value in half(n // 2)[:-1]]
    return torch.tensor(negative + half(n // 2 + 1)[::-1])
    ### END SOLUTION


# %% tags=["check-7.2", "points-4"]
checks.derived_values(my_values)

# %%
values_for = lesson.mine(my_values, checks.normal_values)
derived = values_for(16, normal.inv_cdf)
gap = (derived - NF4).abs().max().item()
print("derived:", *(f"{value:.3f}" for value in derived.tolist()))
print(f"largest difference from the table: {gap:.0e}")
lesson.control("The derived values are those of the table.", gap < 1e-6)

# %% [markdown]
# ### Predict the winner
#
# Suppose that the weights follow a Laplace distribution, with more weights near zero,
# and more far out. You can make values from *its* quantiles, or take NF4: sixteen
# values each, in blocks of 64. How large is the error of the Laplace values, in percent
# of NF4's? Below `100`, they win.

# %%
lesson.predict("7.2", low=None, high=None, unit="% of NF4's error")

# %%
laplace = torch.distributions.Laplace(0.0, 1.0)
heavy = laplace.sample((2**18,))
own = values_for(16, lambda p: laplace.icdf(torch.tensor(p)).item()).float()
theirs, ours = (off(heavy, restored(heavy, 64, book)) for book in (own, NF4))
print(f"on Laplace weights: Laplace values {theirs:.2f} %, NF4 {ours:.2f} %")
lesson.measured("7.2", 100 * theirs / ours)
print("\nerror on normal weights [distance of the two largest values]")
for n in (8, 16, 32, 64):
    pair = values_for(n, normal.inv_cdf).float(), torch.linspace(-1, 1, n)
    errors = [off(plain, restored(plain, 64, book)) for book in pair]
    gaps = [(book[-1] - book[-2]).item() for book in pair]
    print(f"{n:2} values: quantiles {errors[0]:5.2f} % [{gaps[0]:.2f}], ", end="")
    print(f"even steps {errors[1]:5.2f} % [{gaps[1]:.2f}]")

# %% [markdown]
# NF4 wins, on weights that it was not made for: the Laplace values have 9 % more error.
# And with 32 values or more, evenly spaced ones beat the quantiles, on normal weights.
#
# The reason is the same: equal use of the codes is not the smallest error. Quantiles
# leave wide gaps at the ends, 0.18 even with 64 values. Few weights lie there, but the
# error of each is large.
#
# Nor are the codes used equally. In the derivation, the value 1 stands for 1.848
# standard deviations. In a block, it stands for the largest weight, which is further
# out: the next cell prints how far.

# %%
codes = nf4.quantize(plain, double=False).codes().long()
share = codes.bincount(minlength=16) / len(codes)
largest = plain.view(-1, 64).abs().amax(1).median() / plain.std()
print(f"typical absmax of a block: {largest:.1f} standard deviations")
print(f"the most used code, over the least used: {share.max() / share.min():.1f}")

# %% [markdown]
# The largest weight is typically 2.6 standard deviations. So more ratios lie near zero
# than the derivation assumes, and one code is used 5.4 times as often as another.
#
# ### Which sixteen values are best?
#
# We take *best* as: of the smallest mean squared error. The **Lloyd-Max algorithm**
# finds these values. It assigns each ratio $\rho_i$ to its
# nearest value, moves each value to the mean of its ratios, and repeats. A weight's
# error is its ratio's error times absmax, so each ratio counts with absmax squared:
#
# $$\text{value}_k = \frac{\sum_i \text{absmax}_i^2\ \rho_i}
# {\sum_i \text{absmax}_i^2} \qquad \text{over the } i \text{ assigned to } k$$
#
# For example, `0.4` from a block with absmax `1`, and `0.5` from one with absmax `2`,
# have the weighted mean `(1 · 0.4 + 4 · 0.5) / 5 = 0.48`.
#
# The figure shows the fitted values and three other code books. **int4** has fifteen
# evenly spaced values from -1 to 1; its sixteenth code stays unused. **FP4** is a
# floating-point number of four bits.

# %%
fitted = formats.best_values(plain.view(-1, 64))
books = {
    "NF4": NF4.tolist(),
    "FP4": sorted(set(nf4.CODES["fp4"])),
    "int4, evenly spaced": nf4.CODES["int4"][1:],
    "fitted (Lloyd-Max)": fitted.tolist(),
}
figure = code_books.code_books(
    ratios_of(plain[: 2**16], 64)[0].tolist(),
    books,
    title="NF4's values are close to the fitted ones",
    subtitle="Normal weights in blocks of 64, each divided by the absmax of its block.",
)
lesson.show(figure, "NF4 and the fitted values are closest together near zero.")

# %% [markdown]
# Unlike the fitted values, NF4 restores zero and the largest weight of a block exactly,
# which costs some squared error. FP4 wastes codes on 0 and ±`0.0052`, the three squares
# in the middle.
#
# ## On trial: claim Q1
#
# The textbook that this course tests calls NF4 "optimized" for normal weights. QLoRA's
# paper calls it "information theoretically optimal", and means equally used codes. We
# test another meaning: no other sixteen values have a smaller error.
#
# The rule, written before any run, asks by how many percent NF4's error exceeds that of
# the best values. Up to 1 %, the claim holds; above 5 %, it does not; in between, it
# holds under a condition (`holds when`). These limits are narrow. One more bit per
# weight about halves the error, so an error that is 5 % smaller saves only
# `log2(1.05) = 0.07` bits per weight.
#
# Values are fitted on half of the blocks, and tested on the other half, with five
# **seeds** of the random generator. The **control** is FP4: if it were not clearly
# worse, the measure would be blind. `best-pinned` is a fit that keeps -1, 0 and 1.

# %%
lesson.rule("Q1")
lesson.predict("7.3", low=None, high=None, unit="% more error than the best")

# %%
configs = [formats.config("gaussian", 64, seed) for seed in formats.SEEDS]
tried = [formats.compute(config | {"values": 2**18})["error"] for config in configs]
for name in ("best", "best-pinned", "nf4", "int4", "fp4"):
    print(f"{name:11} {over_seeds([error[name] for error in tried])[0]:5.2f} %")
real = runs.stored(formats.config("minilm", 64)).result["error"]
print(f"MiniLM's weights: NF4 {real['nf4']:.2f} %, fitted {real['best']:.2f} %")
live = over_seeds([100 * (each["nf4"] / each["best"] - 1) for each in tried])
worse = min(each["fp4"] / each["nf4"] for each in tried)
lesson.control("FP4's error is 20 % above NF4's, or more.", worse > 1.2)
lesson.measured("7.3", live[0])
lesson.live("Q1", *live)

# %% tags=["nbval-check-output"]
lesson.verdict("Q1", guess="7.3")

# %% [markdown]
# NF4 is near-optimal, not optimal: the best values gain a few percent. They gain half
# as much if they must include -1, 0 and 1, as NF4 does. On **MiniLM**, a trained
# sentence encoder, they gain even less. There is little reason to replace NF4's values.
#
# ### NF4 or affine int4?
#
# **Affine int4** has sixteen evenly spaced values from the smallest to the largest
# weight of a block. It needs two constants for a block: the distance between values,
# and the **zero point**, which is the code that stands for zero.
#
# A fair comparison needs the bits *as stored*. Practical formats store absmax or the
# distance in 16 bits or in eight (see idea three), and the zero point in four. In
# blocks of 32 with 16 bits, that makes `4 + 16 / 32 = 4.5` bits for NF4, and
# `4 + 20 / 32 = 4.625` for affine int4.
#
# Affine int4 follows a block that leans to one side, as small blocks often do. But
# small blocks have many constants. At how many stored bits does affine int4 overtake
# NF4, with constants in 16 bits, on normal weights?

# %%
lesson.predict("7.4", low=None, high=None, unit="bits per weight")

# %%
honest = list(minilm.matrices().values())
smol = list(formats.matrices("smollm2").values())
sources = {"normal": [plain], "MiniLM": honest[:6], "SmolLM2": smol[5::70]}
lines = {}
for name, matrices in sources.items():
    lines[name] = formats.stored_curves(torch.cat([w.flatten() for w in matrices]))
    for bits, place in formats.crossings(lines[name]).items():
        print(f"{name:8} {bits:2}-bit constants: affine overtakes at {place:.2f}")
lesson.measured("7.4", formats.crossings(lines["normal"])[16])

# %%
figure = curves.lines(
    lines["MiniLM"],
    x="Stored bits per weight, bits",
    y="Error, % of the rms of the weights",
    title="NF4 is ahead at few bits, affine int4 at more",
    subtitle="Weights of MiniLM in blocks of 128, 64, 32 and 16, from left to right.",
    names="foot",
    width=6.8,
    height=2.5,
)
lesson.show(figure, "Left of the crossing NF4 is ahead, right of it affine int4.")

# %% [markdown]
# Neither format wins everywhere. With constants in 16 bits, affine int4 overtakes NF4
# at 4.34 bits on normal weights, and at 4.40 on MiniLM; with constants in eight bits, a
# tenth of a bit earlier. NF4 takes 4.34 bits in blocks of `47` weights. So in blocks of
# 64 or more, take NF4; in blocks of 32 or fewer, affine int4.
#
# ### A trap: weights that came from four bits
#
# Never rank formats on weights that one of them has made. Our copy of SmolLM2 was once
# packed in affine int4, in blocks of 32 with two `float32` constants; MiniLM never was.
# The next cell repacks one matrix of each in just this format.

# %%
for name, w in (("SmolLM2", smol[0]), ("MiniLM", honest[0])):
    affine = off(w, nf4.Affine.of(w, 32).dequantize())
    most = max(len(row.unique()) for row in w.flatten().view(-1, 32)[:2000])
    print(f"{name:8} error {affine:.2g} %, up to {most} different values in a block")

# %% [markdown]
# On SmolLM2, this format has an error of 0 %, because it finds its own values again. On
# MiniLM it has 7.9 %. (The comparison at equal bits gave affine int4 other constants,
# in fewer bits. With those it does not find SmolLM2's own values again.)
#
# ## Idea three: quantize the constants, too
#
# In blocks of 64, `float32` constants take half a bit per weight. **Double
# quantization** stores them in eight bits each. Constants are all positive and similar
# in size, so their mean, the offset, is subtracted first. The differences are quantized
# as the weights were: a group of 256 constants shares a **second-level scale**, and the
# code book has 256 values.
#
# $$\text{code}_b = \text{the position of the value nearest to }
# \frac{\text{absmax}_b - \text{offset}}{\text{scale}}$$
#
# $$\text{absmax}'_b = \text{values}[\text{code}_b] \cdot \text{scale} + \text{offset}$$
#
# For example, the constants `2`, `4` and `6` have the offset `4` and the scale `2`, and
# give the ratios `-1`, `0` and `1`.

# %%
figure = storage_pictures.levels(2**16)
total = sum(count * bits for _, count, bits in storage_pictures.level_rows(2**16))
lesson.show(figure, f"Together: {total / 2**16:.3f} bits for each of 65,536 weights.")

# %% [markdown]
# ### Exercise 7.3: double quantization
#
# Difficulty three of five, importance four of five, about fifteen minutes.
# `absmax`, `(n,)`, are the constants in `float32`. `values` is a code book
# of at most 256 values, rising from about -1 to 1. `my_double` returns the codes,
# `(n,)` in `torch.uint8`; the scales, `(⌈n / block⌉,)`; and the offset, `()`.
# `my_restored` returns the constants, `(n,)`. The last group may be short. Where a
# scale is zero, any code from 0 to `len(values) - 1` will do. Index with
# `codes.long()`, because PyTorch takes a `uint8` index for a mask. For example,
# `[2, 4, 6]` with the values `[-1, 0, 1]` gives the codes `[0, 1, 2]`, the scales `[2]`
# and the offset `4`.
#
# <details><summary>Hint one: a question</summary>
#
# Must you fill up the last group with zeros before you subtract the offset, or after?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `repeat_interleave(block)` turns `scales`, `(⌈n / block⌉,)`, into a scale for every
# constant; then cut to `n`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `offset = absmax.mean()`
#
# </details>


# %% tags=["exercise-7.3"]
def my_double(absmax, values, block=256):
    """(codes (n,) uint8, scales (⌈n / block⌉,), offset ()) of the constants (n,)."""
    ### BEGIN SOLUTION
    offset = absmax.mean()
    rows = F.pad(absmax - offset, (0, -len(absmax) % block)).view(-1, block)
    scales = rows.abs().amax(1)
    ratios = (rows / scales[:, None]).nan_to_num(0.0).flatten()[: len(absmax)]
    midpoints = (values[1:] + values[:-1]) / 2
    return torch.bucketize(ratios, midpoints).to(torch.uint8), scales, offset
    ### END SOLUTION


def my_restored(codes, scales, offset, values, block=256):
    """The constants (n,) that the codes stand for."""
    ### BEGIN SOLUTION
    scale = scales.repeat_interleave(block)[: len(codes)]
    return values[codes.long()] * scale + offset
    ### END SOLUTION


# %% tags=["check-7.3", "points-3"]
checks.double_quantization(my_double, my_restored)

# %% [markdown]
# Now your functions quantize the constants of a matrix of MiniLM. The code book is that
# of bitsandbytes, whose 256 values are closest together near zero.

# %%
double = lesson.mine(my_double, checks.doubled)
undouble = lesson.mine(my_restored, checks.undoubled)
w, book = honest[0], nf4.codes.dynamic()
absmax = ratios_of(w, 64)[1]
back = undouble(*double(absmax, book), book)
print(f"the constants are off by {off(absmax, back):.2f} %")
for q in (nf4.quantize(w, double=False), nf4.quantize(w)):
    error = off(w, nf4.dequantize(q))
    print(f"{q.bits_per_value:.3f} bits a weight, error {error:.3f} %")
lesson.control("Our library has the same constants.", off(q.constants(), back) < 0.1)

# %% [markdown]
# Double quantization saves three eighths of a bit per weight, and the error hardly
# changes. **But the largest weight of a block no longer comes back
# exactly**: it becomes the rounded absmax, typically 0.41 % off.
#
# ## On trial: claim Q2
#
# The textbook says that one backpropagates through quantized weights "using double
# quantization". A code is a whole number, so it has no gradient. QLoRA (see notebook
# 08) needs none, because it freezes the codes and restores $W'$ for each product. The
# gradient of the input $x$ passes through $W'$, and so reaches LoRA in earlier layers:
#
# $$y = x\,W'^T \qquad
# \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\,W'$$
#
# How the constants of $W'$ are stored appears in neither formula. To test this, we
# switch double quantization **off**, and compare the gradients with those of a model
# that holds the same $W'$ in `float32`. The formulas say zero, so the verdict is
# **computed**: it has no interval, and the run only checks the code. The **control**, a
# model with the original weights, must differ clearly. The run here is on **tiny**, our
# language model of one million parameters.

# %%
lesson.rule("Q2")
for double_on in (True, False):
    asked = [constants.gradient_config("tiny", double_on, seed) for seed in (0, 1, 2)]
    each = [constants.compute(config) for config in asked]
    errors = [result["error"] for result in each]
    how = f"double quantization {'on' if double_on else 'off'}"
    print(f"{how}: gradients differ by {max(errors):.1g} %")
least = min(result["control"] for result in each)
print(f"with the original weights, they differ by {least:.0f} %, or more")
lesson.control("Other weights change the gradients by 5 %, or more.", least > 5)
largest = round(max(errors), 2)  # without double quantization, in percent
lesson.live("Q2", largest, largest, largest, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("Q2")

# %% [markdown]
# Use double quantization to save memory; gradients do not need it. Rounding the weights
# does change gradients: by 19 % on tiny. On SmolLM2 it was `106` % or more in the
# **shipped runs**, which come with the course and decide its verdicts.
#
# ## On trial: claim Q3
#
# The textbook says that a model of `65` billion parameters takes about 130 GB (billion
# bytes) in fp16, and about 33 GB with QLoRA. We count both from the tensor shapes of
# such a model, Llama-65B. Embeddings, norms and the output head stay in 16 bits.
# Predict the second number.

# %%
lesson.rule("Q3")
lesson.predict("7.5", low=None, high=None, unit="GB")


# %%
def four_bit_bytes(shape, block=64):
    """Bytes of a tensor of this shape in NF4 with double quantization."""
    n = math.prod(shape)
    blocks = -(-n // block)  # divided, and rounded up
    return -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4


counted = constants.compute(constants.bytes_config("Llama-65B", True))
ours = sum(four_bit_bytes(W.shape) for W in smol)
held = sum(nf4.quantize(W).nbytes for W in smol)
lesson.control("The count is what SmolLM2's tensors hold.", ours == held)
print(f"in 16 bits: {counted['whole'] / 1e9:.2f} GB; in NF4, part by part:")
for part in ("codes", "constants", "rest"):
    print(f"  {part:10} {counted[part] / 1e9:6.2f} GB")
lesson.measured("7.5", counted["formula"] / 1e9)
wrong = counted["formula"] / 33e9 - 1, counted["whole"] / 130e9 - 1
worse = 100 * max(map(abs, wrong))
lesson.live("Q3", worse, worse, worse)

# %% tags=["nbval-check-output"]
lesson.verdict("Q3")

# %% [markdown]
# Plan with 34.5 GB for the weights. The textbook's 33 GB is about what the projections
# alone take: 32.38 GB of codes and 1.03 GB of constants. Another 1.05 GB stays in 16
# bits. Adapters, gradients, optimizer states and activations come on top.
#
# ## Now with the library
#
# bitsandbytes must agree with our code to the last bit. `compress_statistics` is its
# name for double quantization.

# %%
w = torch.randn(256, 512)
for both in (False, True):
    code, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=both)
    ours = nf4.quantize(w, double=both)
    same = torch.equal(code.flatten(), ours.packed)
    same &= torch.equal(bnb.dequantize_4bit(code, state), nf4.dequantize(ours))
    lesson.control(f"Double quantization {both}: all bits are equal.", same)

# %% [markdown]
# ### Exercise 7.4: break it on purpose
#
# Difficulty four of five, importance four of five, about fifteen minutes. A library
# restores tensors of some shapes wrongly, without any warning. Write a test that finds
# them. `theirs` and `ours` take a `float32` tensor, quantize it in blocks of 64, and
# return the restored tensor, of the same shape; `ours` is right. Return the list of
# those `shapes`, in their order, that `theirs` restores wrongly.
#
# You choose the weights of each tensor. Many choices, such as all zeros, would hide a
# fault. Yours must expose wrong constants, wrong or NaN weights, lost signs, and
# weights in another order. A difference below `1e-5` of the largest weight is rounding,
# and no fault. If `theirs` returns zeros for vectors alone, for example, the shapes
# `[(4, 64), (256,)]` give `[(256,)]`.
#
# <details><summary>Hint one: a question</summary>
#
# Suppose that all weights are ones. Which of the faults would you still see?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Both functions get the same `w`, of `shape`. Compare the restored tensors weight by
# weight. What is `NaN > 1`?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `w = torch.randn(shape)`
#
# </details>


# %% tags=["exercise-7.4"]
def my_bad_shapes(theirs, ours, shapes):
    """Those of the shapes, in order, whose weights theirs restores wrongly."""
    ### BEGIN SOLUTION
    bad = []
    for shape in shapes:
        w = torch.randn(shape)
        limit = 1e-5 * w.abs().max().item()
        if not torch.allclose(theirs(w), ours(w), rtol=0, atol=limit):
            bad.append(shape)
    return bad
    ### END SOLUTION


# %% tags=["check-7.4", "points-4"]
checks.finds_bad_shapes(my_bad_shapes)

# %% [markdown]
# Now try bitsandbytes on random shapes. What do the wrong ones have in common?

# %%
search = lesson.mine(my_bad_shapes, checks.bad_shapes)


def theirs(w):
    code, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    return bnb.dequantize_4bit(code, state)


torch.manual_seed(7)
shapes = [tuple(row) for row in (32 * torch.randint(1, 7, (9, 2))).tolist()]
shapes += [(128 * 96,), (128, 96)]
bad = search(theirs, lambda w: restored(w, 64, NF4), shapes)
print("wrong:", *(shape for shape in shapes if shape in bad))
print("right:", *(shape for shape in shapes if shape not in bad))

# %% [markdown]
# <details><summary>What goes wrong</summary>
#
# In the wrong ones, a row is not a number of whole blocks of 64. The quantizer lets
# blocks run on from row to row. The dequantizer of bitsandbytes `0.50.2` on a CPU
# begins a new block with every row, and so takes wrong constants. (GPUs and newer
# versions may do better.) The remedy is to flatten the tensor first.
#
# </details>
#
# ## Quiz
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
# Right. Both decide which of NF4 and affine int4 is ahead.
#
# </details>
# <details><summary>Nothing: the smaller error wins</summary>
#
# No. Blocks of eight weights have a small error, and many bits.
#
# </details>
#
# **2. What does one huge weight do to a matrix in NF4?**
#
# <details><summary>It makes the whole matrix coarse</summary>
#
# No. Other blocks have their own absmax.
#
# </details>
# <details><summary>It is cut off at the largest value</summary>
#
# No. It sets absmax, so it comes back (almost) exactly.
#
# </details>
# <details><summary>It makes the other weights of its block coarse</summary>
#
# Right. They share its absmax.
#
# </details>
#
# **3. What is double quantization for?**
#
# <details><summary>To let gradients through the quantized weights</summary>
#
# No. They pass through the restored weights either way.
#
# </details>
# <details><summary>To shrink the constants</summary>
#
# Right. From half a bit per weight to about an eighth.
#
# </details>
# <details><summary>To quantize the weights a second time</summary>
#
# No. Their codes do not change.
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
# No. The gradient of $A$ is zero; that of $B$ is not.
#
# </details>
#
# **5. You test a quantizer on a matrix of ones, and all is well. What have you shown?**
#
# <details><summary>That it is right for this shape</summary>
#
# No. All constants are equal, so a wrong one is not seen.
#
# </details>
# <details><summary>Little: ones hide wrong constants, signs and orders</summary>
#
# Right. Test with weights on which a fault makes a difference.
#
# </details>
# <details><summary>That its codes are right</summary>
#
# No. All codes are equal, in whatever order.
#
# </details>
#
# ## Limits
#
# - All errors here are of *weights*, but answers depend more on some weights than on
#   others.
# - Large language models may have outliers that ours lack.
# - The paper (its results, not ours) reports that NF4 with double quantization matched
#   16-bit fine-tuning, and that FP4 was about one point behind.
#
# ## Your guesses
#
# Nine in ten of your ranges should hold the measured value.

# %%
lesson.calibration()

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
