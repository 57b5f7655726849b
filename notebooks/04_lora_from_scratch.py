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
# # LoRA from scratch
#
# You will have shown that a real language model learns a job through two thin matrices
# beside each of its projections, because what the job needs lies in few directions,
# while a random change of the same size does nothing.
#
# **You need** notebook 00, and some PyTorch: tensors, `nn.Module`, `backward()`. You
# have multiplied matrices on paper once.
#
# **At the end you can**
#
# - write LoRA yourself: its forward pass, its start, its injection, its merge;
# - count its parameters in your head;
# - say why $B$ starts at zero, and why not $A$ and $B$ both;
# - find the bug that spoils a merged GPT-2 without any error;
# - read the spectrum of an update, and tell its *energy* from its *use*;
# - say what the evidence for "low rank" is, and what it is not.
#
# **Only ten minutes?** Write `start("04", quick=True)` below and run all cells. Read
# "The result first", do exercise 4.1, and read the verdict on claim L1.

# %%
from peft_from_scratch.course import start

lesson = start("04")

# %%
import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_from_scratch as pfs
from peft_from_scratch.course import block_picture, counting, curves, finetune, ledger
from peft_from_scratch.course import runs, spectrum, starts
from peft_from_scratch.course.checks import lora_from_scratch as checks

# %% [markdown]
# ## The result first
#
# We fine-tuned all of SmolLM2 on the orders of notebook 00: a sentence in, a line of
# JSON out. *Every* number of the model moved, in three runs with different seeds. For
# each matrix, the **update** is what training added:
#
# $$\Delta W = W_{\text{fine-tuned}} - W_0$$
#
# Then we threw most of the update away. A matrix of **rank** one is a column times a
# row: whatever comes in, it can only answer in a single direction. Of each update we
# kept the best such matrix, and measured the loss on test rows that nobody had trained
# on. (The loss is the surprise at the right answer, in nats a token; lower is better.)

# %%
full = [runs.stored(config) for config in spectrum.configs("smollm2")]
cuts = {
    "nothing": "the model as it was",
    "random": "+ a random update of the same size",
    "rank 1": "+ of each update, its best rank-1 part",
    "rank 8": "+ its best rank-8 part",
    "update": "+ the whole update",
}
for cut, said in cuts.items():
    losses = [run.result["function"][cut] for run in full]
    print(
        f"{said:40} test loss {min(losses):.3f} to {max(losses):.3f}, {len(full)} seeds"
    )

# %% [markdown]
# One direction a matrix, and most of the gain is there. If so little is needed, why
# train everything? Train only a thin thing from the start: that is **LoRA**, low-rank
# adaptation. In this picture of one layer, it is what has a colour.

# %%
lesson.show(
    block_picture(lit="lora"),
    "LoRA stands beside the seven projections of a layer; all else stays frozen.",
)

# %% [markdown]
# ## Idea one: beside, not instead
#
# A projection multiplies its input by a matrix $W_0$. LoRA leaves $W_0$ alone and adds
# a second path, which squeezes $x$ into $r$ numbers and spreads them out again:
#
# $$h = W_0\,x + \frac{\alpha}{r}\,B\,A\,x$$
#
# | symbol | what it is | shape | trained? |
# |---|---|---|---|
# | $x$ | the input of the projection | $d_{in}$ | |
# | $W_0$ | its pretrained weight | $d_{out} \times d_{in}$ | no |
# | $A$ | reads $x$ | $r \times d_{in}$ | yes |
# | $B$ | writes into $h$ | $d_{out} \times r$ | yes |
# | $r$ | the rank, far below $d_{in}$ and $d_{out}$ | a number | you choose |
# | $\alpha$ | how loud the second path is | a number | you choose |
# | $h$ | the output | $d_{out}$ | |
#
# Why divide by $r$? So that a larger $r$ is not louder by itself. Whether that works
# out is on trial in notebook 05.
#
# Small enough to look at. $A\,x$ is all that the second path will ever know about $x$;
# then it joins what $W_0$ says. Note the order: $B A$, a whole matrix, is never built.

# %%
torch.manual_seed(0)
d_in, d_out, r, alpha = 6, 4, 2, 4.0
x = torch.randn(d_in)
W0 = torch.randn(d_out, d_in)
A, B = torch.randn(r, d_in), torch.randn(d_out, r)
z = A @ x  # (r,)
h = W0 @ x + alpha / r * (B @ z)  # (d_out,)
print(f"x has {len(x)} numbers, z has {len(z)}, h has {len(h)}")

# %% [markdown]
# Yet it is *as if* the weight had changed by $\Delta W = \frac{\alpha}{r}\,B\,A$. That
# matrix is as large as $W_0$, and its rank is at most $r$.

# %%
dW = alpha / r * (B @ A)
torch.testing.assert_close((W0 + dW) @ x, h)
print("shape of the update:", tuple(dW.shape))
print("its rank:", int(torch.linalg.matrix_rank(dW)), "of at most", min(dW.shape))
print("rank of W0 + update:", int(torch.linalg.matrix_rank(W0 + dW)))

# %% [markdown]
# The last line matters: LoRA does not make the *weight* low-rank. It makes the *change*
# low-rank.
#
# ### What does it cost? Claim L4
#
# The textbook says: beside a matrix of `4096 x 4096`, LoRA of rank `16` trains
# `131,072` numbers. Which share of the matrix is that? Guess before you run. Put two
# numbers in place of None, here and further down: a range that you are nine tenths
# sure of.

# %%
lesson.predict("4.1", low=None, high=None, unit="% of the matrix")
lesson.rule("L4")

# %%
side, rank = 4096, 16
formula = rank * (side + side)
counted = counting.count(side, side, rank)
print(f"formula {formula:,}, counted {counted:,}, the matrix has {side * side:,}")
lesson.measured("4.1", 100 * counted / side**2)
lesson.live("L4", counted, counted, counted)

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L4")

# %% [markdown]
# $r \cdot d_{in}$ numbers are in $A$ and $d_{out} \cdot r$ in $B$, together
# $r\,(d_{in} + d_{out})$. The share is small *because the matrix is large*. For a
# square one it is $2r / d$: twice the width, half the share.
#
# ### Exercise 4.1: the forward pass
#
# Difficulty two of five, importance five of five, about ten minutes. The equation
# above has one column $x$. A model has many tokens at once, each a *row*: `x` has the
# shape `(…, d_in)`, with any number of sides in front. Write `forward` for that. Let
# `self.base` do its own part: it may have a bias, or store its weight in another way.
#
# <details><summary>Hint one: a question</summary>
#
# For a column, $A x$. If $x^T$ is the row, what is $(A x)^T$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `x` is `(…, d_in)`. After $A$ it must be `(…, r)`, and after $B$ `(…, d_out)`. And `r`
# is a side of `self.A`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `z = x @ self.A.T`
#
# </details>


# %% tags=["exercise-4.1"]
class MyLoRA(nn.Module):
    """h = W0 x + (alpha / r) B A x.    x (…, d_in) -> h (…, d_out)"""

    def __init__(self, base, A, B, alpha):
        super().__init__()
        self.base = base  # a module: base(x) is W0 x, and the bias where it has one
        self.A = nn.Parameter(A)  # (r, d_in)
        self.B = nn.Parameter(B)  # (d_out, r)
        self.alpha = alpha

    def forward(self, x):
        ### BEGIN SOLUTION
        r = self.A.shape[0]
        z = x @ self.A.T  # (…, r)
        return self.base(x) + self.alpha / r * (z @ self.B.T)
        ### END SOLUTION


# %% tags=["check-4.1", "points-2"]
checks.lora_forward(MyLoRA)

# %% [markdown]
# ## Idea two: start where the model is
#
# A pretrained model is worth a lot. The first step should start *from it*, not from a
# model with noise in every matrix. So the update must be zero at first: $B A = 0$.
#
# There are three simple ways to have that: $B = 0$, or $A = 0$, or both. The gradients
# tell them apart. With $g$ for the gradient that arrives at $h$ (one number an output):
#
# $$\frac{\partial L}{\partial A} = \frac{\alpha}{r}\,B^T g\,x^T
# \qquad\qquad
# \frac{\partial L}{\partial B} = \frac{\alpha}{r}\,g\,(A\,x)^T$$
#
# | symbol | shape | zero when |
# |---|---|---|
# | $g$ | $d_{out}$ | nothing is left to learn |
# | $\partial L / \partial A$ | $r \times d_{in}$, as $A$ | $B$ is zero |
# | $\partial L / \partial B$ | $d_{out} \times r$, as $B$ | $A$ is zero |
#
# Each one's gradient runs through the *other*. Watch it, on the small numbers from
# above, with a target that $h$ should reach; and once more after one small step:


# %%
def gradients(A, B):
    A, B = (matrix.clone().requires_grad_() for matrix in (A, B))
    h = W0 @ x + alpha / r * (B @ (A @ x))
    (h - target).square().sum().backward()
    return A.grad, B.grad


target = torch.randn(d_out)
tried = {
    "A random, B zero": (A, 0 * B),
    "A zero, B random": (0 * A, B),
    "both zero": (0 * A, 0 * B),
    "both random": (A, B),
}
print(f"{'size of':17}   dL/dA   dL/dB; a step later   dL/dA   dL/dB")
for name, pair in tried.items():
    now = gradients(*pair)
    later = gradients(*(m - 0.001 * d for m, d in zip(pair, now, strict=True)))
    now, later = ([f"{d.norm():7.1f}" for d in each] for each in (now, later))
    print(f"{name:17}", *now, " " * 13, *later)

# %% [markdown]
# Both zero is a trap with no way out: both gradients are zero, now and after every
# step. With one of them random, *one* gradient is alive. It moves its matrix off zero,
# and from then on the other one learns too. So either could be the zero one. LoRA's
# paper draws $A$ and zeroes $B$, and later work found that this way round bears higher
# learning rates (links at the end).
#
# **How large is the random one?** The paper says "Gaussian" and gives no variance. Its
# own code draws $A$ uniformly, with the variance $1 / (3\,d_{in})$. The shape of the
# draw hardly matters; with this variance the size of $A x$ does not depend on how wide
# the layer is:

# %%
for width in (64, 512, 4096):
    wide_x = torch.randn(width)
    plain = torch.randn(64, width) @ wide_x
    scaled = plain / math.sqrt(3 * width)
    print(f"d_in {width:4}: A x is about {plain.std():5.1f}; scaled {scaled.std():.2f}")

# %% [markdown]
# ### Exercise 4.2: the start
#
# Difficulty one of five, importance four of five, about five minutes. Write the
# function that draws a new $A$ and a new $B$: Gaussian with the variance
# $1 / (3\,d_{in})$, and zeros.
#
# <details><summary>Hint one: a question</summary>
#
# `torch.randn` has the variance one. By what do you multiply to get the variance $v$?
# (Not by $v$.)
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# $A$ reads $x$, so its rows are as long as $x$. $B$ writes $h$, so its columns are as
# long as $h$.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `A = torch.randn(r, d_in) / …`
#
# </details>


# %% tags=["exercise-4.2"]
def my_start(d_out, d_in, r):
    """(A, B) as LoRA starts: A (r, d_in) Gaussian, B (d_out, r) zero."""
    ### BEGIN SOLUTION
    A = torch.randn(r, d_in) / math.sqrt(3 * d_in)
    B = torch.zeros(d_out, r)
    return A, B
    ### END SOLUTION


# %% tags=["check-4.2", "points-1"]
checks.lora_start(my_start)

# %% [markdown]
# ### On trial: claim L2
#
# *With $A$ Gaussian and $B$ zero, training starts from exactly the pretrained weights.*
# "Exactly" is a strong word. We take it at its word: every bit of every logit. (A
# logit is the score that the model gives to one possible next token.) Three starts go
# into the real model, without a step of training. The guess is for the control: by how
# much will *both random* move a logit, at most?

# %%
lesson.rule("L2")
lesson.predict("4.2", low=None, high=None, unit="(of a logit)")

# %%
model, tokenizer = lesson.load_model()
task = pfs.tasks.load_task("orders")
encode = pfs.templates.encode_rows
test = encode(tokenizer, task.instruction, task.test.select(range(2)), template="chat")
before, moved = starts.logits(model, test), {}
for how in starts.STARTS:
    torch.manual_seed(0)
    pfs.lora.inject(model, r=8, alpha=16)
    starts.begin(model, how)
    moved[how] = starts.largest_difference(starts.logits(model, test), before)
    pfs.loss.accumulate_gradients(model, [pfs.loss.batch_of(test, model.device)])
    largest = max(p.grad.abs().max() for p in pfs.trainable(model).values())
    print(f"{how:14} logits move by {moved[how]:.3g}; largest gradient {largest:.2g}")
    pfs.remove(model)
lesson.measured("4.2", moved["both-random"])
own = moved["gaussian-zero"]
lesson.live("L2", own, own, own)

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L2")

# %% [markdown]
# And how do they learn? The full runs ship: three seeds each, on rows of the same
# order. (To make them again: `python -m peft_from_scratch ledger L2 --run`.)

# %%
series = {}
for how in starts.STARTS:
    found = [runs.stored(c) for c in starts.configs("smollm2") if c["start"] == how]
    steps = zip(*(run.result["losses"] for run in found), strict=True)
    series[how] = [(i, sum(s) / len(s), min(s), max(s)) for i, s in enumerate(steps, 1)]
figure = curves.lines(
    series,
    x="Step, count",
    y="Training loss, nats per token",
    title="Three starts of LoRA in SmolLM2",
    subtitle="Mean of three seeds; the band is their range. Controls in grey.",
    control=("both-random", "both-zero"),
)
figure.axes[0].set_xticks([1, 5, 10, 15, 20])
ends = {how: f"{rows[0][1]:.2f} to {rows[-1][1]:.2f}" for how, rows in series.items()}
lesson.show(figure, "; ".join(f"{how}: loss {end}" for how, end in ends.items()) + ".")

# %% [markdown]
# Both zero never learns. Both random starts from a spoiled model, and then *does* learn
# the job. So the zero start is no condition for learning: it is a promise that nothing
# is lost before you begin. How much noise a start can bear depends on its size; ours
# draws $B$ by the same rule as $A$. (Smaller noise can even help: see the links.)
#
# ## Idea three: into a whole model
#
# A model is a tree of modules. Injecting LoRA means: freeze everything, walk the tree,
# and put a LoRA in the place of each module that you want. Three things to know:
#
# | you need | you write |
# |---|---|
# | all modules and their names | `model.named_modules()` |
# | the parent of `"layers.0.q_proj"` | `model.get_submodule("layers.0")` |
# | another child in its place | `setattr(parent, "q_proj", new)` |
#
# The pretrained layer then lives one floor deeper, inside of the LoRA, as `.base`.
#
# Two mistakes are easy here. One freezes only what it wraps, and forgets embeddings and
# norms: the run is then no LoRA, and nobody notices, because the loss falls nicely. The
# other freezes last, and so freezes $A$ and $B$ too.
#
# ### Exercise 4.3: inject
#
# Difficulty three of five, importance five of five, about fifteen minutes. Take the
# library's `pfs.lora.LoRA(module, r, alpha)` as the part to put in. It fits both
# `nn.Linear` and GPT-2's `Conv1D`: so should your walk.
#
# <details><summary>Hint one: a question</summary>
#
# What must come first, so that only $A$ and $B$ train in the end? And what is the last
# part of `"model.layers.0.self_attn.q_proj"`, what the name of its parent?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# A list of `(name, module)` pairs: those whose name's last part is one of `targets`,
# and which are an `nn.Linear` or a `Conv1D`. One `setattr` for each.
# `name.rpartition(".")` is `(parent, ".", last part)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `model.requires_grad_(False)`
#
# </details>


# %% tags=["exercise-4.3"]
def my_inject(model, targets, r, alpha):
    """Freeze the model; put a LoRA in the place of every Linear and Conv1D whose
    name's last part is in `targets`. Returns their names, in the model's order."""
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    names = []
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in targets and isinstance(module, nn.Linear | Conv1D):
            wrapped = pfs.lora.LoRA(module, r, alpha)
            setattr(model.get_submodule(parent), child, wrapped)
            names.append(name)
    return names
    ### END SOLUTION


# %% tags=["check-4.3", "points-3"]
checks.lora_inject(my_inject)

# %% [markdown]
# ### All of it at once
#
# Here is everything so far in one class. If you skipped the exercises, stop: it gives
# them away. It goes into SmolLM2, and the library's LoRA into a second copy, from the
# same seed. Guess first: of all the numbers in the model, how many will train, with
# rank `8`?


# %%
class HandLoRA(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base, device = base, base.weight.device
        self.A = nn.Parameter(torch.randn(r, d_in, device=device) / math.sqrt(3 * d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r, device=device))
        self.scale = alpha / r

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


# %%
lesson.predict("4.3", low=None, high=None, unit="% of the model")

# %%
total = model.num_parameters()
model.requires_grad_(False)
torch.manual_seed(0)
for name in pfs.targets.kinds(model):  # every projection of every layer
    model.set_submodule(name, HandLoRA(model.get_submodule(name), r=8, alpha=16))
library, _ = lesson.load_model()
torch.manual_seed(0)
wrapped = pfs.lora.inject(library, r=8, alpha=16)
pairs = [(model.get_submodule(n), library.get_submodule(n)) for n in wrapped]
trained = [p for p in model.parameters() if p.requires_grad]
size = sum(p.numel() for p in trained)
print(f"{len(wrapped)} projections, {size:,} numbers to train")
print("the same A, bit for bit:", all(torch.equal(m.A, t.A) for m, t in pairs))
lesson.measured("4.3", 100 * size / total)

# %% [markdown]
# Now train it, with nothing but PyTorch: a loss, its gradient, a step. In
# `model(**batch)`, transformers computes the mean surprise at the answers' tokens; the
# question's tokens carry no label. Then let it answer two sentences of `test`, which it
# has never seen.

# %%
rows = task.train.select(range(40))
rows = encode(tokenizer, task.instruction, rows, template="chat")
optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
for step in range(10):
    batch = pfs.loss.batch_of(rows[4 * step : 4 * step + 4], model.device)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 3 == 0:
        print(f"step {step + 1:2}: loss {loss.item():.3f}")

# %%
asked = task.test.select(range(2))
found = pfs.evaluation.answer_rows(model, tokenizer, task, asked, template="chat")
for answer, right in zip(found.answers, found.correct, strict=True):
    print("right:" if right else "wrong:", answer)

# %% [markdown]
# Two rows prove nothing about how *well* it does: that took notebook 00 more rows. What
# they show is that the form has been learned.
#
# Is it the same mathematics as the library's, which computes its gradients by hand and
# adds in place? Put the trained $A$ and $B$ into it, and compare every logit and every
# gradient:

# %%
twins = [(getattr(m, name), getattr(t, name)) for m, t in pairs for name in "AB"]
with torch.no_grad():
    for mine, theirs in twins:
        theirs.copy_(mine)
one = pfs.loss.batch_of(test[:1], model.device)
outputs = [each(**one) for each in (model, library)]
for output in outputs:
    output.loss.backward()
ours, theirs = (output.logits.detach() for output in outputs)
gap = (ours - theirs).abs().max()
off = max((m.grad - t.grad).norm() / t.grad.norm() for m, t in twins)
print(f"logits up to {theirs.abs().max():.0f} differ by {gap:.1g} at most")
print(f"gradients of A and B differ by {off:.1e} of their size at most")
kept = all(torch.equal(m.base.weight, t.base.weight) for m, t in pairs)
print("every pretrained matrix is as it was, bit for bit:", kept)
assert gap < 1e-3 and off < 1e-3 and kept

# %% [markdown]
# ## Idea four: fold it in
#
# When training is done, the second path can go. It is a matrix product like the first,
# so both fit into one weight, and the model is as fast as it ever was:
#
# $$W = W_0 + \frac{\alpha}{r}\,B\,A$$
#
# | symbol | shape in `nn.Linear` | shape in GPT-2's `Conv1D` |
# |---|---|---|
# | the stored weight | $d_{out} \times d_{in}$ | $d_{in} \times d_{out}$ |
# | $B A$ | $d_{out} \times d_{in}$ | $d_{out} \times d_{in}$ |
#
# ### Break it on purpose
#
# The right-hand column has hurt real libraries (see the last link). Here is a merge as
# one would write it, tried on three layers:


# %%
def broken_merge(base, A, B, alpha):
    with torch.no_grad():
        base.weight += (alpha / A.shape[0] * B @ A).to(base.weight.dtype)


def try_merge(merge, base, d_in, d_out, dtype=torch.float32):
    torch.manual_seed(0)
    A, B, x = torch.randn(2, d_in), torch.randn(d_out, 2), torch.randn(5, d_in)
    expected = base(x) + 3.0 / 2 * (x @ A.T @ B.T)
    merge(base, A, B, 3.0)
    return (base(x) - expected).abs().max().item()


print(f"Linear, 16 to 24: {try_merge(broken_merge, nn.Linear(16, 24), 16, 24):.0e} off")
print(f"Conv1D, 16 to 16: {try_merge(broken_merge, Conv1D(16, 16), 16, 16):.0e} off")
try:
    try_merge(broken_merge, Conv1D(24, 16), 16, 24)
except RuntimeError as error:
    print("Conv1D, 16 to 24:", error)

# %% [markdown]
# The oblong layer fails loudly, and somebody fixes it or leaves it out. The **square**
# one is worse: all shapes fit, nothing complains, and the model is wrong. GPT-2 has a
# square one in every layer, `attn.c_proj`.
#
# A second, quieter thing. Weights are often kept in sixteen bits, in `bfloat16`, where
# a number has two or three digits. Rounding the update *before* it is added, as
# `broken_merge` does, rounds twice. Add in `float32`, and round once at the end.
#
# ### Exercise 4.4: a merge that is right
#
# Difficulty three of five, importance four of five, about ten minutes. Repair it: for
# `nn.Linear` and `Conv1D`, with the weight in any dtype. $A$ and $B$ are `float32`.
# Write into the `base.weight` that is there; leave its shape, its dtype and the bias as
# they are.
#
# <details><summary>Hint one: a question</summary>
#
# In which of the two classes is the update turned round? In which dtype is the sum
# exact enough, and when should the rounding happen?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The update is `(d_out, d_in)`; a `Conv1D` needs its transpose, `(d_in, d_out)`. The
# sum is `float32`; `copy_` rounds it into whatever the weight is.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `update = alpha / A.shape[0] * (B @ A)`
#
# </details>


# %% tags=["exercise-4.4"]
def my_merge(base, A, B, alpha):
    """Write W0 + (alpha / r) B A into base.weight, which keeps its shape and dtype."""
    ### BEGIN SOLUTION
    update = alpha / A.shape[0] * (B @ A)  # (d_out, d_in), float32
    if isinstance(base, Conv1D):
        update = update.T
    with torch.no_grad():
        base.weight.copy_(base.weight.float() + update)
    ### END SOLUTION


# %% tags=["check-4.4", "points-3"]
checks.lora_merge(my_merge)

# %% [markdown]
# What was rounded away is gone. So keep a copy of the base, and never "unmerge" by
# subtracting. Notebook 06 puts the claim that merging is exact on trial.
#
# ## Idea five: how many directions?
#
# LoRA rests on one sentence: *the weight updates of fine-tuning have a low intrinsic
# rank*. The paper calls it a hypothesis. To test it, take a full update apart. Every
# matrix is a sum of rank-one pieces, each with a size:
#
# $$\Delta W = s_1\,u_1 v_1^T + s_2\,u_2 v_2^T + \dots
# \qquad s_1 \ge s_2 \ge \dots \ge 0$$
#
# | symbol | what it is | shape |
# |---|---|---|
# | $v_i$ | a direction of the input | $d_{in}$ |
# | $u_i$ | where it is sent | $d_{out}$ |
# | $s_i$ | singular value: how strongly | a number |
#
# The first $k$ pieces are the best approximation of rank $k$ that there is. Their
# share of the squared norm is their **energy**:
#
# $$E_k = \frac{s_1^2 + \dots + s_k^2}{s_1^2 + s_2^2 + \dots}$$
#
# One loud direction and some noise:

# %%
torch.manual_seed(0)
dW = 3 * torch.outer(torch.randn(8), torch.randn(8)) + torch.randn(8, 8)
U, s, Vt = torch.linalg.svd(dW)
print("singular values:", [round(value, 1) for value in s.tolist()])
cut = s[0] * torch.outer(U[:, 0], Vt[0])
print(f"energy of rank 1: {s[0] ** 2 / s.square().sum():.3f}")
print(f"1 - error:        {1 - (dW - cut).norm() ** 2 / dW.norm() ** 2:.3f}")
print("rank of dW itself:", int(torch.linalg.matrix_rank(dW)))

# %% [markdown]
# The list of singular values shows the loud one. Rank one holds a lot of the energy,
# and what is left of the squared norm is exactly that of the pieces cut off. The exact
# rank says eight, since a little noise fills every direction. That is why we ask
# instead: *which rank holds most of the energy?*
#
# ### Exercise 4.5: energy, and the rank that holds it
#
# Difficulty two of five, importance four of five, about ten minutes. Return the energy
# at every rank from one up, and the smallest rank whose energy is at least `held`.
#
# <details><summary>Hint one: a question</summary>
#
# Which function of torch sums up a list as it goes along? And to which rank does the
# entry with index zero belong?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `torch.linalg.svdvals(dW)` is `(min(d_out, d_in),)`, from large to small; the energies
# have the same shape, rise, and end at one.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `squares = torch.linalg.svdvals(dW).square()`
#
# </details>


# %% tags=["exercise-4.5"]
def my_spectrum(dW, held=0.9):
    """(energy, k): energy[i] is that of rank i + 1; k the smallest rank with held."""
    ### BEGIN SOLUTION
    squares = torch.linalg.svdvals(dW).square()
    energy = squares.cumsum(0) / squares.sum()
    return energy, int((energy < held).sum()) + 1
    ### END SOLUTION


# %% tags=["check-4.5", "points-2"]
checks.lora_spectrum(my_spectrum)

# %% [markdown]
# ## On trial: claim L1
#
# *The weight updates of fine-tuning have a low intrinsic rank* (section one of LoRA's
# paper, and the textbook). The rule was written before any run. It counts the rank that
# holds most of the energy, in percent of the largest rank possible:

# %%
lesson.rule("L1")
lesson.predict("4.5", low=None, high=None, unit="% of the full rank")

# %% [markdown]
# **Live**, we fine-tune all of `tiny`: a model of about a million numbers, trained from
# zero by this project on text that it generates. Its job here is a new format with new
# words. It takes seconds, where SmolLM2 takes minutes. **Control**: random matrices of
# the same shapes and the same norms.

# %%
chosen = spectrum.config("tiny", seed=0)
tuned, tiny_tokenizer, result = finetune.fine_tuned(chosen)
tiny, _ = pfs.load_model("tiny", device="cpu")
changed = spectrum.updates(tuned, tiny)
control = {n: spectrum.random_like(dW, i) for i, (n, dW) in enumerate(changed.items())}
live = spectrum.median_share(changed)
noise, *_ = spectrum.median_share(control)
print(f"{len(changed)} updates; 90 % of the energy takes, in % of the full rank:")
print("of the updates {:.0f} [{:.0f}, {:.0f}],".format(*live), f"of noise {noise:.0f}")
lesson.measured("4.5", live[0])

# %% [markdown]
# ### Energy is not use
#
# Energy asks how large a piece is. It does not ask what the piece is *good for*. So cut
# the update, put it back into the model, and measure the loss on test rows. Guess: how
# much of the gain does rank one keep?

# %%
lesson.predict("4.6", low=None, high=None, unit="% of the gain")

# %%
split = pfs.tasks.load_task(chosen["task"])
held_out = finetune.chosen_rows(split, chosen)["test"]
held_out = encode(tiny_tokenizer, split.instruction, held_out, template="raw")
modules = pfs.targets.projections(tiny)
W0s = {name: modules[name].weight.detach().clone() for name in changed}


@torch.no_grad()
def loss_with(updates):
    for name, W0 in W0s.items():
        modules[name].weight.copy_(W0 + updates.get(name, 0))
    losses = finetune.item_losses(tiny, held_out)
    return sum(losses) / len(losses)


# %%
tried = {"nothing": {}, "random": control}
for k in (1, 8):
    tried[f"rank {k}"] = {n: spectrum.truncated(dW, k) for n, dW in changed.items()}
tried["whole update"] = changed
losses = {said: loss_with(updates) for said, updates in tried.items()}
losses["embeddings, norms too"] = result["test_loss"]
gain = losses["nothing"] - losses["whole update"]
kept = {said: 100 * (losses["nothing"] - loss) / gain for said, loss in losses.items()}
for said, loss in losses.items():
    print(f"{said:21} loss {loss:5.2f}, {round(kept[said]):4} % of the gain")
lesson.measured("4.6", kept["rank 1"])

# %% [markdown]
# **The full results** ship. On SmolLM2 they are the three runs of the first page, some
# minutes each. On `tiny` there are five seeds, and three runs on the same job with the
# answers shuffled: each stands with another sentence, so that nothing can be learned
# but their form. (`python -m peft_from_scratch ledger L1 --run` makes what is missing.)


# %%
def band(kind):
    low, middle, high = ([100 * e for e in row] for row in energies[kind])
    return list(zip(ranks, middle, low, high, strict=True))


ranks, energies = full[0].result["ranks"], full[0].result["energy"]
use = {k: [spectrum.kept(run, k) for run in full] for k in spectrum.RANKS}
lines = {
    "use: gain in test loss": [(k, sum(u) / 3, min(u), max(u)) for k, u in use.items()],
    "energy of the updates": band("all"),
    "energy, random": band("random"),
}
figure = curves.lines(
    lines,
    x="Rank k, singular values kept",
    y="Kept, % of the whole update",
    title="Full fine-tuning of SmolLM2: what a cut update keeps",
    subtitle="Use: three seeds. Energy: median matrix; bands hold eight of ten.",
    control=("energy, random",),
    log="x",
    names="foot",
)

# %%
held, noise_held = (band(kind)[ranks.index(8)][1] for kind in ("all", "random"))
lesson.show(
    figure,
    f"At rank 8 the updates keep {held:.0f} % of their energy, noise keeps "
    f"{noise_held:.0f} %; of their use the updates keep {min(use[8]):.1f} % or more.",
)

# %%
for scale in ("tiny", "smollm2"):
    found = ledger.judge(ledger.claim("L1"), scale)
    share = "{:.1f} % [{:.1f}, {:.1f}]".format(found.measured, *found.interval)
    print(f"{scale:8} {share} of the full rank, {len(found.seeds)} seeds")
stored = [runs.stored(config) for config in spectrum.configs("tiny")]
blind = [r.result["median_share"] for r in stored if "random" in r.config["task"]]
print(f"shuffled {min(blind):.1f} to {max(blind):.1f} %, {len(blind)} seeds")
lesson.live("L1", *live, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L1", guess="4.5")

# %% [markdown]
# Four things are true at once.
#
# - **By energy**, the updates are far from random, and far from rank eight. They take a
#   fifth of the full rank in `tiny`, a seventh in SmolLM2.
# - **By use**, few directions do most of the work. How many, depends on the job.
#   SmolLM2 learned a form for things that it knows: rank eight lacks less than a
#   hundredth of the gain. `tiny` had new words to learn: rank one has less than half of
#   the gain, and rank eight lacks an eighth.
# - **A low spectrum is no sign that something was understood.** Shuffled answers gave
#   one as low.
# - **The projections are not all.** In `tiny` the embeddings and norms moved too, and
#   brought the loss further down. LoRA leaves them alone.
#
# One likely reason for the many faint directions, which we have not tested: Adam moves
# every number by about the same amount, whether its gradient is signal or noise, and
# noise fills all directions.
#
# ## Now with the library
#
# In Hugging Face's PEFT all this is a call. Ours writes PEFT's file format, so your
# trained adapter can move over. Then every logit is compared.

# %%
from tempfile import TemporaryDirectory

import peft
from safetensors.torch import load_file

trained = starts.logits(library, test)
with TemporaryDirectory() as folder:
    pfs.save(library, folder)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
pfs.remove(library)
config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
theirs = peft.get_peft_model(library, config)
peft.set_peft_model_state_dict(theirs, tensors)
gap = starts.largest_difference(starts.logits(theirs, test), trained)
print(f"the largest difference of a logit: {gap:.1g}")
assert gap < 1e-3

# %% [markdown]
# ## Quiz
#
# Answer for yourself, then open the options. None needs the kernel.
#
# **1. Our LoRA trains a fiftieth of the numbers. What else shrinks that much?**
#
# <details><summary>The time of a training step</summary>
#
# No. The forward pass is all there, and the gradient must travel back through every
# frozen layer to reach the adapters. What is saved is the product that makes the
# gradient of each $W_0$: about a third.
#
# </details>
# <details><summary>The gradients and AdamW's moments, in bytes</summary>
#
# Right. They exist for trained numbers only. Notebook 01 has the bill.
#
# </details>
# <details><summary>The weights in memory</summary>
#
# No. $W_0$ must be there, frozen or not; $A$ and $B$ come on top.
#
# </details>
#
# **2. Somebody swaps the start: $A$ zero, $B$ Gaussian. What happens?**
#
# <details><summary>Nothing is ever learned</summary>
#
# No. That is *both* zero. Here $A$ gets a gradient through $B$ from the first step on.
#
# </details>
# <details><summary>The model starts spoiled</summary>
#
# No. $B A$ is zero as soon as one of them is.
#
# </details>
# <details><summary>It starts at the pretrained model, and learns</summary>
#
# Right. It starts as exactly as LoRA does. Which way round *trains* better is another
# question, and this notebook has not measured it.
#
# </details>
#
# **3. What is the rank of $W_0 + \frac{\alpha}{r} B A$ for $r = 8$?**
#
# <details><summary>Eight</summary>
#
# No. Eight bounds the rank of the *change*. $W_0$ brings all of its own.
#
# </details>
# <details><summary>Usually that of $W_0$</summary>
#
# Right. You saw it on the small matrices.
#
# </details>
# <details><summary>That of $W_0$, minus eight</summary>
#
# No. Adding a matrix of rank eight can lower the rank by that much, but it takes a
# change that cancels parts of $W_0$ exactly.
#
# </details>
#
# **4. (From notebook 00.) Your LoRA gets seventeen of twenty test rows right, a
# colleague's gets eighteen. Whose is better?**
#
# <details><summary>The colleague's</summary>
#
# No. One row of twenty is well inside either interval.
#
# </details>
# <details><summary>These rows cannot say</summary>
#
# Right. More rows, and a comparison row by row, could.
#
# </details>
# <details><summary>They are equally good</summary>
#
# No. That is a claim as well, and twenty rows do not carry it.
#
# </details>
#
# **5. (From notebook 01.) You have a fully fine-tuned model, and an adapter of your own
# LoRA. Which of the two files works alone?**
#
# <details><summary>Both</summary>
#
# No. The adapter's file holds $A$ and $B$. Without $W_0$ they say nothing.
#
# </details>
# <details><summary>The model's</summary>
#
# Right. The adapter needs its base; in return it is some fifty times smaller here.
#
# </details>
# <details><summary>Neither: both need the base</summary>
#
# No. Full fine-tuning leaves a whole model behind.
#
# </details>
#
# ### In your own words
#
# A colleague says: "LoRA works because fine-tuning is low-rank." Answer in three
# sentences, with what you measured.
#
# <details><summary>A model answer</summary>
#
# "Depends on what you call low. By energy, the update of full fine-tuning is far from
# random, but it takes many more than eight directions to hold nine tenths of it, and
# about as many where the answers were shuffled. By use, a few directions did nearly the
# whole of an easy job and most of a harder one; but that a low-rank part of a full
# update is enough does not yet prove that training with a low rank finds it."
#
# </details>
#
# ### Transfer
#
# An `nn.Embedding` has no $W_0 x$: it looks up row $i$ of a matrix $E$, of
# `(vocabulary, hidden)`. Write LoRA for it. Which shapes have $A$ and $B$, and which
# one may be zero at first?
#
# <details><summary>A model answer</summary>
#
# Looking up row $i$ is multiplying by a one-hot $x$. So $W_0 = E^T$, $A$ is
# `(r, vocabulary)`, $B$ is `(hidden, r)`, and $A x$ is column $i$ of $A$:
# `h = E[i] + alpha / r * A.T[i] @ B.T`. One of them must be zero. If it is $B$, only
# the columns of $A$ whose tokens occur are ever trained, the others stay random; so
# here it is wise to zero $A$: a token that training never saw then keeps its embedding.
#
# </details>
#
# ## Limits
#
# - **What the control rules out.** The updates' spectrum does not come from shapes or
#   size: random matrices of the same shapes and norms look different, and do nothing.
# - **What it does not.** We cut updates that full fine-tuning had found. LoRA has to
#   *find* its directions while it trains. That it does so as well, and which rank it
#   needs for which job, is the business of notebook 05.
# - **The scale.** SmolLM2 has `135` million numbers, `tiny` one million, and both jobs
#   are short and easy. Nothing here speaks of code, mathematics, long training or large
#   models.
# - **The papers beside us** (their numbers, not ours). Aghajanyan and others got nine
#   tenths of full performance out of RoBERTa with `200` trained numbers, on one task of
#   sentence pairs. Biderman and others trained Llama on code and mathematics: there the
#   updates of full fine-tuning had ranks `10` to `100` times those in usual LoRA
#   settings, and LoRA learned less.
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
# - Hu and others, [LoRA](https://arxiv.org/abs/2106.09685): sections one to four are
#   easy reading now.
# - Aghajanyan and others, [Intrinsic dimensionality explains the effectiveness of
#   language model fine-tuning](https://arxiv.org/abs/2012.13255): the idea before LoRA.
# - Biderman and others, [LoRA learns less and forgets
#   less](https://arxiv.org/abs/2405.09673): where the updates are *not* low-rank.
# - Hayou and others, [The impact of initialization on LoRA finetuning
#   dynamics](https://arxiv.org/abs/2406.08447), and, on starts that are not zero,
#   [Beyond zero initialization](https://arxiv.org/abs/2505.23194).
# - Kalajdzievski, [A rank stabilization scaling
#   factor](https://arxiv.org/abs/2312.03732): why $\alpha / \sqrt{r}$. Notebook 05
#   tries it.
# - A square layer spoiled in silence, where PEFT took DoRA, a relative of LoRA, out of
#   a merged GPT-2: [issue 3531](https://github.com/huggingface/peft/issues/3531).
