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
# You will have shown that a real model's weights fit into little more than four bits
# each, because every small block of them brings its own unit of length, while one unit
# for a whole tensor lets a single outlier spoil them all.
#
# **You need** notebook 04, and some PyTorch. You have seen a normal distribution.
#
# **At the end you can**
#
# - quantize a weight in blocks, pack it two codes a byte, and restore it;
# - derive the values of NF4, and say where `0.9677083` comes from;
# - compare formats by two numbers, bits and error, and never by one;
# - quantize the constants too, and say what that saves;
# - say what gradients pass through, and what they do not;
# - count the bytes of a model of `65` billion weights before you rent the machine.
#
# **Only ten minutes?** Write `start("07", quick=True)` below and run all cells. Read
# "The result first", do exercise 7.3, and read the verdict on claim Q3.

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
# Here is SmolLM2, and the orders of notebook 00: a sentence in, a line of JSON out.
# Nobody has trained it for that. It sees five solved examples before each question.
# First as it is:

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
# Now put every projection of every layer into four bits, which takes a second or two,
# and ask again.

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
# Each weight kept little more than an eighth of its bits, and the model still follows
# the order, more or less. Compare letter by letter: a word may have broken, or a
# quotation mark. Four bits are not free, least of all for a model as small as this one,
# whose weights went through four other bits before (a trap, further down). What the
# difference costs, and whether training can win it back, is the business of notebook
# 08. This notebook is about the format: what the four bits say, and where the odd
# fraction behind the point comes from.
#
# In the picture of a layer, it is the strip of four cells in every projection. (What
# else has a colour there is LoRA. That comes back in notebook 08.)

# %%
lesson.show(
    block_picture(lit="qlora"),
    "Every projection of a layer holds its weight in four bits, and stays frozen.",
)

# %% [markdown]
# ## Idea one: a unit for each block
#
# Four bits can name sixteen things. So choose sixteen **values** between minus one and
# one, the *code book*, and give each a number, its *code*. A weight can be any size, so
# it is first measured in a unit: the largest absolute value around, **absmax**.
#
# $$c_i = \text{the number of the value nearest to } \frac{w_i}{\text{absmax}}
# \qquad\qquad w'_i = \text{values}[c_i] \cdot \text{absmax}$$
#
# | symbol | what it is | stored as |
# |---|---|---|
# | $w_i$ | a weight | not stored any more |
# | absmax | the largest $\lvert w \rvert$ of its block | `float32`, one a block |
# | $c_i$ | the code, from 0 to 15 | four bits |
# | values | the code book, from -1 to 1 | once for all |
# | $w'_i$ | what the code stands for | computed when needed |
#
# By hand, with eight weights and the simplest code book: even steps of one seventh.
# (These are fifteen values. One code stays unused.)

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
# The largest comes back exactly. Every other one is off by half a step at most, and a
# step is a seventh of absmax. That is the trouble: *the step is made by one weight*.
# Let that one grow tenfold, and leave the seven others as they are. By which factor
# does the error of the seven grow? Guess before you run. Put two numbers in place
# of None, the ends of a range that you are nine tenths sure of, here and further down.

# %%
lesson.predict("7.1", low=None, high=None, unit="times the error")

# %%
spoiled, others = w.clone(), torch.arange(8) != 6
spoiled[6] *= 10
off_then = (by_hand(spoiled) - spoiled)[others].norm()
lesson.measured("7.1", (off_then / (back - w)[others].norm()).item())

# %% [markdown]
# All but one of the seven have become zero: the steps are now wider than they are. So
# an outlier should not rule over a whole matrix. Cut the matrix into **blocks** of,
# say, `64` weights in the order in which they lie in memory, row after row, and let
# each block have an absmax of its own. An outlier then makes the rest of *its* block
# coarse, and no others.
#
# ### Exercise 7.1: absmax by blocks
#
# Difficulty two of five, importance five of five, about ten minutes. Return every
# weight over its block's absmax, and absmax itself. The last block may be short, a
# block may run on from one row into the next, and where a block is all zeros its
# ratios are zeros.
#
# <details><summary>Hint one: a question</summary>
#
# How many zeros must you put behind the flattened weight, so that it can be cut into
# rows of `block`? Would zeros change any absmax?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `(…)` becomes `(n,)`, then `(blocks, block)`. The absmax are `(blocks,)`; the ratios
# have the shape of `w` again. `-n % block` is what `n` lacks to the next multiple.
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
# ### How large a block?
#
# Normal weights, and the same with a few outliers in between. We measure the error of
# the *ordinary* weights only, as a share of their own size.

# %%
torch.manual_seed(0)
plain = torch.randn(2**18)
ordinary = torch.rand(len(plain)) > 0.001
wild = torch.where(ordinary, plain, 20 * plain)


def off(w, restored, which=slice(None)):
    """The error's root mean square, in % of the weights' own."""
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
    y="Error of ordinary weights, % of their size",
    title="An outlier spoils its block, so blocks are small",
    subtitle="Even steps of one seventh, times the absmax of the block.",
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
# Then why not blocks of eight? Because a constant costs `32` bits, and the block shares
# them. **A format has two numbers**: its error, and its bits for each value:
#
# $$\text{bits} = 4 + \frac{32}{\text{block}}$$
#
# ### Two codes a byte
#
# PyTorch reckons in whole bytes. So two codes share a byte, the first of a pair in its
# high half:
#
# $$\text{byte} = 16\,c_0 + c_1$$
#
# In bits: `1001` and `0011` become `10010011`. Multiplying by 16 shifts by four places
# (`<< 4`); a byte's low half is what is left by `& 15`.
#
# ### Exercise 7.2: pack and unpack
#
# Difficulty two of five, importance three of five, about ten minutes. Codes are
# `torch.uint8`, from 0 to 15; bytes are `torch.uint8` too. If the number of codes is
# odd, the last low half is zero, and `my_unpack` leaves it out: that is why it is told
# $n$.
#
# <details><summary>Hint one: a question</summary>
#
# Which codes are the first of a pair, and how do you take every second element of a
# tensor? To unpack: in which order must high and low halves stand?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `(n,)` becomes `(⌈n / 2⌉,)`. Back: a high and a low half for each byte,
# `(bytes, 2)`; flattened, that is the right order; then cut to `n`.
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
# A trap for later: what PyTorch calls `numel()` of a packed weight is its bytes, half
# of the weights that it stands for. More than one library has printed wrong counts of
# parameters because of that.
#
# ## Idea two: sixteen values for a bell
#
# Even steps treat all ratios alike. But weights of a trained network look much like a
# normal distribution: many near zero, few far out. So put the values where the weights
# are. **NF4**, *normal float*, does it by quantiles. If $\Phi$ is the share of a normal
# distribution below a point, then even steps of $p$ in $\Phi^{-1}(p)$ cut it into
# parts of equal share, and every code would be used equally often:
#
# $$\text{value}_i = \frac{\Phi^{-1}(p_i)}{\Phi^{-1}(p_{\text{last}})}$$
#
# | symbol | what it is |
# |---|---|
# | $\Phi^{-1}(p)$ | the point below which the share $p$ of a normal distribution lies |
# | $p_i$ | even steps, from one half outward |
# | $p_{\text{last}}$ | the last; dividing by its quantile makes the ends -1 and 1 |
#
# Two wishes bend it. Zero must be a value, so that a zero stays zero. And both ends
# must be there, so that the largest stays what it is. So eight values go from -1 to 0
# and nine from 0 to 1, and they share the zero.
#
# **Where does the last step lie?** Not at one: $\Phi^{-1}(1)$ is infinite. The middle
# of the last of sixteen equal shares is half a share below it, at $1 - 1/32$; of
# fifteen, at $1 - 1/30$. NF4 takes the mean of the two. For years users asked in issue
# threads where the number came from:

# %%
quantile = NormalDist().inv_cdf
last = 1 - (1 / 30 + 1 / 32) / 2


def half(many):
    """`many` values from 1 down to 0: even steps of p, from `last` to one half."""
    steps = torch.linspace(last, 0.5, many, dtype=torch.float64).tolist()
    return [quantile(p) / quantile(last) for p in steps]


derived = [-value for value in half(8)[:-1]] + half(9)[::-1]
gap = max(abs(a - b) for a, b in zip(derived, nf4.CODES["nf4"], strict=True))
print(f"the last step is at p = {last:.7f}")
print("derived:", *(f"{value:.3f}" for value in derived))
print(f"largest difference from the published values: {gap:.0e}")
assert gap < 3e-7

# %% [markdown]
# The published table cannot be had to the last bit any more: nobody wrote down which
# program computed it, in which precision. A file that says `nf4` means the published
# numbers. So a library must *store* them, and a test may derive them.
#
# ### Which value is the nearest?
#
# The values rise. Half way between two neighbours lies a **midpoint**; a ratio above it
# belongs to the upper one. So the code of a ratio is a count: *how many midpoints lie
# below it?*
#
# ### Exercise 7.3: the nearest code
#
# Difficulty two of five, importance five of five, about ten minutes. `values` rise, and
# there may be any number of them, evenly spaced or not. A ratio exactly on a midpoint
# goes to the lower value.
#
# <details><summary>Hint one: a question</summary>
#
# Sixteen values have how many midpoints? And which function of torch says between which
# entries of a sorted list a number falls?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `ratios` may have any shape, and the codes have the same. `values[1:]` and
# `values[:-1]` are both one shorter than `values`.
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
# ### All of it at once
#
# Blocks, nearest code, and back, for any code book. If you skipped the exercises, stop:
# it gives them away. With NF4's values it must do what the library does, bit for bit.


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
print("bit for bit the library's:", torch.equal(restored(plain, 64, NF4), theirs))

# %% [markdown]
# NF4 was made so that its sixteen codes are used equally often on normal weights. Are
# they? Of perfectly normal weights, in blocks of `64`: how many times as often as the
# rarest code is the most frequent one used?

# %%
lesson.predict("7.2", low=None, high=None, unit="times as often")

# %%
codes = nf4.quantize(plain, 64, double=False).codes().long()
share = codes.bincount(minlength=16) / len(codes)
entropy = -(share * share.log2()).sum()
print("% of all weights, code by code:")
print(*(f"{100 * each:.1f}" for each in share.tolist()))
print(f"information in a code: {entropy:.2f} of 4 bits")
lesson.measured("7.2", (share.max() / share.min()).item())

# %% [markdown]
# Not equally. The derivation speaks of a normal distribution in one fixed unit. A block
# of `64` is measured in its own largest value, which is usually further out than the
# last quantile, and the larger the block, the further. So the inner codes get more than
# their share. This has been noticed in print (see the links).
#
# ### What would be best?
#
# That depends on the word. If it means *the least squared error*, there is an old
# answer: the method of **Lloyd and Max**. Give each ratio $\rho_i$ its nearest value;
# move each value to the mean of those that chose it; repeat. An error of a ratio counts
# times its block's absmax, so the mean is weighted:
#
# $$\text{value}_k = \frac{\sum_i \text{absmax}_i^2\ \rho_i}
# {\sum_i \text{absmax}_i^2} \qquad \text{over the } i \text{ nearest to } k$$

# %%
fitted = formats.best_values(plain.view(-1, 64))
print("fitted:", *(f"{value:.2f}" for value in fitted.tolist()))
print("NF4:   ", *(f"{value:.2f}" for value in NF4.tolist()))
books = {
    "NF4": NF4,
    "FP4": sorted(set(nf4.CODES["fp4"])),
    "int4, even steps": nf4.CODES["int4"][1:],
    "fitted by Lloyd and Max": fitted,
}
ratios, _ = scaled(plain[: 2**16], 64)
figure = code_books.code_books(
    ratios.flatten().tolist(),
    {name: torch.as_tensor(book).tolist() for name, book in books.items()},
    title="Where four code books put their values",
    subtitle="Normal weights in blocks of 64, in units of the absmax of the block.",
)
inner = {k: int((torch.as_tensor(v).abs() < 0.5).sum()) for k, v in books.items()}
said = ", ".join(f"{k} {count}" for k, count in inner.items())
lesson.show(figure, f"Values between -0.5 and 0.5: {said}.")

# %% [markdown]
# The fitted values have no zero, and their ends are not at one. A zero is then no
# longer a zero, and the largest of a block no longer exact. NF4 keeps both, and that
# is a part of its squared error. (How large a part? `best-pinned` below are the best
# values of those that keep -1, 0 and 1.)
#
# ## On trial: claim Q1
#
# *NF4 is the optimal four-bit type for normally distributed weights.* The chapter says
# "optimized", QLoRA's paper "information theoretically optimal": a fine idea with a
# strong word on it. The rule was written before any run. It takes the word to mean the
# least error, and measures how far NF4 is from the best that there is.
#
# **Live**, on fewer weights than in the full runs. Values are fitted on one half of the
# blocks, and every format is tested on the other. **Control**: FP4, a four-bit number
# with exponent and mantissa, made for nobody's weights in particular; and two kinds of
# int4. The *symmetric* one has even steps from -1 to 1. The *affine* one has even steps
# from the smallest to the largest of a block, and so needs two constants.

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
# Look at the last line before you judge. In error alone, affine int4 is ahead of NF4
# here. But it takes half a bit more for each weight, and NF4 with half a bit more would
# have blocks of half the size. So compare *at equal bits*. The full runs ship: normal
# weights, and the weights of two trained models. (`python -m peft_from_scratch ledger
# Q1 --run` makes what is missing.)

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
    y="Error, % of the weights",
    title="A format has two numbers",
    subtitle="Weights of MiniLM in blocks of 128, 64 and 32; low and left is better.",
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
# At equal bits, NF4 is below affine int4 in all three kinds of weights: the half bit is
# better spent on smaller blocks. A comparison without the bits would have misled you.
# (The line at the left has its constants in eight bits, which is the next idea. Affine
# int4 could have that, too.)
#
# And "optimal"? How far NF4 is from the best depends on the weights, as the sentence
# under the verdict tells; on normal ones it is near the edge of our rule. Keep what the
# paper's word was about. NF4 spreads the *use* of its codes, as far as the last
# quantile is the right unit. Least error is another goal, with other values. And a
# small error of weights is not yet a good model: some weights matter more than others.
#
# ### A trap: weights that were born in four bits
#
# Why MiniLM, when SmolLM2 is at hand? Watch affine int4 on one matrix of SmolLM2.

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
# A perfect score, and it means nothing. The copy of SmolLM2 used in this course was
# packed in four bits before it came here: affine, in blocks of 32. The format finds its
# own traces again. So **never rank formats on weights that one of them has made**. It
# is a leak, like a test row among the training rows.
#
# ## Idea three: the constants, too
#
# In blocks of `64`, the constants take half a bit a weight, an eighth of what the codes
# take. **Double quantization** quantizes them as well. They are all positive and much
# alike, so first their mean is taken off. What is left goes, in blocks of `256`
# constants, through the same steps as the weights did, with a code book of `256`
# values:
#
# $$\text{code}_b = \text{nearest to }
# \frac{\text{absmax}_b - \text{offset}}{\text{unit}}$$
#
# $$\text{absmax}'_b = \text{values}[\text{code}_b] \cdot \text{unit} + \text{offset}$$
#
# | symbol | what it is | stored as |
# |---|---|---|
# | offset | the mean of all absmax of a tensor | `float32`, one a tensor |
# | unit | the largest of what is left, without sign | `float32`, one for 256 |
# | $\text{code}_b$ | which of 256 values | eight bits a block |
#
# $$\text{bits} = 4 + \frac{8}{64} + \frac{32}{64 \cdot 256} \approx 4.127$$
#
# ### Exercise 7.4: double quantization
#
# Difficulty three of five, importance four of five, about fifteen minutes. Write both
# ways. `values` rise from about -1 to 1; the codes are `torch.uint8`. The last block of
# constants may be short; and where a unit is zero, any code will do.
#
# <details><summary>Hint one: a question</summary>
#
# You can use what you wrote in the exercises before. But: if you fill up the last block
# with zeros, must that happen before the offset is taken off, or after?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `absmax` is `(n,)`, `units` are `(⌈n / block⌉,)`, `offset` is one number, `()`. On the
# way back, `repeat_interleave(block)` gives every constant its unit; then cut to `n`.
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
# Which `256` values? Libraries differ. bitsandbytes takes a *dynamic* type, finest near
# zero. The paper says "FP8", without saying which. torchao takes whole steps, equally
# fine everywhere. All weights of MiniLM, one tensor after the other; how much more
# error do they bring?

# %%
matrices = list(minilm.matrices().values())
absmax = [nf4.quantize(w, double=False).absmax for w in matrices]
recipes = {"none": False, "bitsandbytes": True, "FP8": "fp8", "torchao": "int8"}
for name, recipe in recipes.items():
    packed = [nf4.quantize(w, double=recipe) for w in matrices]
    bits = 8 * sum(q.nbytes for q in packed) / sum(q.numel for q in packed)
    constant = off(flat(absmax), flat(q.constants() for q in packed))
    weight = off(flat(matrices), flat(map(nf4.dequantize, packed)))
    print(f"{name:12} {bits:.3f} bits; constants {constant:.2f} % off, ", end="")
    print(f"weights {weight:.3f} %")

# %% [markdown]
# The constants lose a little, the weights next to nothing: their own rounding is far
# coarser. The bits saved are the same for all three.
#
# ## On trial: claim Q2
#
# The chapter says that one backpropagates through the quantized weights "using double
# quantization". Two true things stand side by side there, and a wrong "by" has joined
# them. It is easily done: both are in QLoRA, and in the same paragraph of many texts.
# Take them apart.
#
# **Can a code have a gradient?** It is a whole number. And what it stands for is a
# staircase: move a weight a little, and nothing happens, until it jumps.

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
print(f"codes that a nudge of a 100,000th leaves as they are: {kept:.2f} %")

# %% [markdown]
# So nobody goes *through* quantization. In QLoRA the codes are frozen. For a product,
# the weight $W'$ is computed from them. The gradient of $x$ goes through that copy, and
# reaches the adapters below:
#
# $$y = x\,W'^T \qquad
# \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\,W'$$
#
# How the constants of $W'$ were kept makes no difference to either formula. The test:
# switch double quantization **off**. If it were the way, gradients would now be wrong.
# By how many percent will they differ from those of a model that holds the very same
# $W'$ as plain numbers? **Control**: the gradients of the model before it was
# quantized, to see that the measure can see.

# %%
lesson.rule("Q2")
lesson.predict("7.4", low=None, high=None, unit="% off without it")

# %%
found = {}
for double in (False, True):
    asked = [constants.gradient_config("tiny", double, seed) for seed in (0, 1, 2)]
    found[double] = [constants.compute(config) for config in asked]
    error = max(each["error"] for each in found[double])
    control = min(each["control"] for each in found[double])
    how = f"double quantization {'on' if double else 'off':3}"
    print(f"{how}: gradients {error:.1g} % off; control {control:.0f} % off")
errors = [each["error"] for each in found[False]]
lesson.measured("7.4", max(errors))
lesson.live("Q2", max(errors), min(errors), max(errors), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("Q2", guess="7.4")

# %% [markdown]
# What the gradient *does* see is that $W'$ is not $W_0$. The control shows what that
# changes. Whether the adapters make up for it is on trial in notebook 08.
#
# ## Idea four: count it
#
# A model has more than projections. Embeddings, norms and the head stay in sixteen
# bits: they are a small part of a large model, and a large part of a small one.
#
# ### Exercise 7.5: the bytes of a quantized model
#
# Difficulty two of five, importance four of five, about ten minutes. Two lists of
# shapes: tensors in four bits, and tensors in sixteen. Count every byte that must be
# kept, each tensor by itself: its codes, its constants; with `double` the eight-bit
# constants, a `float32` unit for each `256` of them, and a `float32` offset. What has
# begun counts in full.
#
# <details><summary>Hint one: a question</summary>
#
# How many blocks has a tensor of `n` weights, if the last may be short? And if those
# blocks' constants stand in blocks of `256`, how many units are there?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `math.prod(shape)` is `n`. `-(-n // block)` divides and rounds up. The sum is a whole
# number.
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
# *A model of 65B takes about 130 GB in fp16, and about 33 GB with QLoRA.* `65B` is
# short for `65` billion weights, and a GB is a billion bytes. Such a model does not fit
# on this machine, but its *shapes* do. Guess the second number. Then count: once by
# formula for the large model, and once in a model that is really here, to see that the
# formula is what tensors hold.

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
    "sum": large["formula"],
    "with constants in float32": single["formula"],
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
# That is the *weights*. Adapters, their gradients, the optimizer and the activations
# come on top. Whether all of it fits on one card is on trial in notebook 08.
#
# ## Now with the library
#
# bitsandbytes is where NF4 comes from. Codes, constants and restored values must be
# equal to the last bit: to those of the few lines above, and with double quantization
# to those of our library.

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
# Now with other shapes. One of the lines below is out of order. Which one, and what is
# special about its shape? Is it the codes that are wrong, or what is made of them?

# %%
for shape in ((128, 128), (96, 128), (128, 96), (128 * 96,)):
    w = torch.randn(shape)
    code, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = bnb.dequantize_4bit(code, state)
    right = torch.equal(code.flatten(), nf4.quantize(w, double=False).packed)
    print(f"{shape!s:11} codes as ours: {right}; error: ours ", end="")
    print(f"{off(w, restored(w, 64, NF4)):.1f} %, bitsandbytes {off(w, theirs):.1f} %")

# %% [markdown]
# <details><summary>What it is</summary>
#
# `(128, 96)`: rows of `96` are not whole blocks of `64`. Blocks run on from row to row,
# and the quantizer does that. The dequantizer of bitsandbytes `0.50.2` on a CPU starts
# a new block with every row, and so takes the wrong constant for part of the weights.
# No error, no warning. (If your version shows no such line, it has been mended, or you
# run on a GPU, whose code is another.) The repair: flatten before quantizing, and give
# the shape back afterwards. The last line is the same number of weights, flat.
#
# </details>
#
# Projections of real models rarely have such rows, which is how a bug like that can
# live. A quantizer of your own, even a slow one, is what finds it.
#
# ## Play
#
# Move the block size. The table under it is for readers without a running kernel.


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
# ## Quiz
#
# Answer for yourself, then open the options. None needs the kernel.
#
# **1. A format has a smaller error than NF4 on your weights. What do you ask first?**
#
# <details><summary>How fast it is</summary>
#
# No. A good question, but not the first: the comparison itself may not be fair yet.
#
# </details>
# <details><summary>How many bits it takes, and whether it made these weights</summary>
#
# Right. Bits with the constants in them. You saw both: half a bit more, and a perfect
# score on weights of its own.
#
# </details>
# <details><summary>Nothing: the smaller error wins</summary>
#
# No. Blocks of eight weights have a small error too, and take eight bits.
#
# </details>
#
# **2. What does a single huge weight do to a matrix in NF4, in blocks of 64?**
#
# <details><summary>It makes the whole matrix coarse</summary>
#
# No. That is what one unit for the whole tensor would do.
#
# </details>
# <details><summary>It is cut off at the largest value</summary>
#
# No. It sets absmax, so it is the one weight that is restored exactly.
#
# </details>
# <details><summary>It makes the other weights of its block coarse</summary>
#
# Right. Their ratios crowd around zero. No other block notices, except through the
# constants that share a unit with its own.
#
# </details>
#
# **3. What is double quantization for?**
#
# <details><summary>To let gradients through the quantized weights</summary>
#
# No. They pass through the dequantized copy, and were exact without it.
#
# </details>
# <details><summary>To shrink the constants</summary>
#
# Right. From half a bit a weight to about an eighth.
#
# </details>
# <details><summary>To quantize the weights a second time, more finely</summary>
#
# No. The codes of the weights are the same with it and without.
#
# </details>
#
# **4. (From notebook 04.) LoRA on this four-bit model: what is zero at the start?**
#
# <details><summary>The adapters' output</summary>
#
# Right. $B$ is zero, so the model starts as it is: as the *quantized* one, here.
#
# </details>
# <details><summary>The difference from the model before it was quantized</summary>
#
# No. That is what rounding has changed, and no adapter has been trained against it.
#
# </details>
# <details><summary>All gradients of the adapters</summary>
#
# No. The gradient of $A$ is, for one step. That of $B$ is not, since $A$ is random.
#
# </details>
#
# **5. (From notebook 05.) Rank `64` beside every projection in place of rank `8`. What
# of the four-bit model grows?**
#
# <details><summary>The codes</summary>
#
# No. They are frozen, and know nothing of adapters.
#
# </details>
# <details><summary>The adapters, their gradients and their optimizer states</summary>
#
# Right. Eightfold, each of them. On a four-bit base they are no longer so small beside
# it.
#
# </details>
# <details><summary>The error of quantizing</summary>
#
# No. That was made before the first step.
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
# "Optimal needs a goal: NF4 was built so that all codes are used equally often, and on
# normal weights in blocks they are not, since a block's largest weight is not a fixed
# quantile. If the goal is the least squared error, sixteen fitted values do better on
# the same bits, but lose the exact zero and the exact ends. And a comparison has to
# name bits beside error, on weights that no format has touched before."
#
# </details>
#
# ### Transfer
#
# You get five bits a weight, not four. Spend the fifth in two ways: on thirty-two
# values, or on smaller blocks for sixteen. Which leaves the smaller error on normal
# weights?
#
# <details><summary>A model answer</summary>
#
# Blocks of `32` make 4 + 1 = 5 bits; you have their error above. Thirty-two
# values halve the steps, and so nearly the error; in blocks of `512` they take
# `5.06` bits. Build them like NF4, with `half(16)` and `half(17)`, and ask `restored`.
# Halving the steps wins clearly: smaller blocks only shrink the unit, and on normal
# weights absmax grows very slowly with the block.
#
# </details>
#
# ## Limits
#
# - **What the controls rule out.** That the measure cannot tell formats apart (FP4 is
#   far off), and that gradients look alike whatever the weights are.
# - **What they do not.** All errors here are of *weights*. A model's answers depend on
#   some weights more than on others: methods that look at activations (GPTQ, AWQ) use
#   that, and NF4 does not. What quantizing costs in answers is measured in notebook 08.
# - **The weights.** Normal numbers, one encoder of `22` million numbers, and `tiny`.
#   Large language models may have outliers that none of these has.
# - **The bill** counts tensors. A process needs more: the program, its buffers, and
#   room for one dequantized weight at a time.
# - **The paper beside us** (its numbers, not ours). QLoRA reports that NF4 with double
#   quantization matched sixteen-bit fine-tuning on academic benchmarks, and that FP4
#   was about one point behind.
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
# - Dettmers and others, [QLoRA](https://arxiv.org/abs/2305.14314): sections two and
#   three are easy reading now; the sixteen values are in an appendix.
# - Yoshida, [NF4 isn't information theoretically optimal (and that's
#   good)](https://arxiv.org/abs/2306.06965): the use of the codes depends on the block
#   size, and what is best for the model is another question again.
# - Dettmers and others, [8-bit optimizers via block-wise
#   quantization](https://arxiv.org/abs/2110.02861): blocks and the dynamic type, before
#   there was NF4.
# - Someone asks where the offset comes from: [issue
#   968](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/968).
