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
# After full fine-tuning, SmolLM2 keeps 99 % of its improvement when each weight change
# is cut to a product of two thin matrices, the form that LoRA trains.
#
# **You need** notebook 00, some PyTorch (tensors, `nn.Module`, `backward()`), and
# matrix products.
#
# **At the end you can**
#
# - write LoRA yourself, put it into a model, and later add it to the weights;
# - count its trainable parameters in your head;
# - explain why $B$ is initialized to zero, and why $A$ must not be zero as well;
# - find the bug in that addition that corrupts GPT-2 without an error;
# - measure how far a weight change can be simplified before the test loss suffers;
# - name the evidence for such simple changes, and the runs that are still missing.
#
# **Only ten minutes?** Write `start("04", quick=True)` below and run all cells. Read
# "The result first", "Idea one" and the end of "What a low-rank part is worth".

# %%
from peft_from_scratch.course import start

lesson = start("04")

# %%
import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2

import peft_from_scratch as pfs
from peft_from_scratch.course import block_picture, counting, curves, finetune, ledger
from peft_from_scratch.course import runs, spectrum, starts
from peft_from_scratch.course.checks import lora_from_scratch as checks

# %% [markdown]
# ## The result first
#
# A small part of what full fine-tuning changes in SmolLM2's weights brings almost all
# of the improvement. We trained all parameters on the task of notebook 00, turning
# orders into JSON. Three runs differ in their **seed**, which fixes the training rows
# and their order.
#
# Each layer has seven weight matrices, the **projections** of attention and MLP. A
# projection's **update** is what training added to it:
#
# $$\Delta W = W_{\text{fine-tuned}} - W_0$$
#
# Then we replaced each update by its best approximation of low **rank**. A matrix of
# rank one is a column $u$ times a row $v^T$. All its outputs, $u\,(v^T x)$, are
# multiples of $u$, so they have one **direction**. A matrix of rank 8 is a sum of eight
# of these.
#
# Each line below adds a part of the updates to the pretrained projections and changes
# nothing else. A random update has the **norm** of the real one, the root of the sum of
# its squared entries.
#
# **Test loss** is the negative logarithm of the right token's probability, averaged
# over answers that no run has trained on. A loss of `0.04` **nats per token** means a
# probability of about `96 %`, since $e^{-0.04} \approx 0.96$.

# %%
full = [runs.stored(config) for config in spectrum.configs("smollm2")]
cuts = {
    "nothing": "the pretrained model",
    "random": "+ random updates of the same norm",
    "rank 1": "+ the best rank-1 part of each update",
    "rank 8": "+ the best rank-8 part of each update",
    "update": "+ the whole updates",
}
for cut, said in cuts.items():
    losses = [run.result["function"][cut] for run in full]
    print(
        f"{said:40} test loss {min(losses):.3f} to {max(losses):.3f}, {len(full)} seeds"
    )

# %% [markdown]
# One direction per matrix lowers the test loss from 1.456 to 0.116 or less; whole
# updates reach 0.022 to 0.028. Random updates of the same norm do not lower the loss,
# so size is not the explanation.
#
# So we may not need to train whole matrices. **LoRA**, low-rank adaptation, freezes the
# pretrained model and trains two thin matrices for each projection, shown in color
# below. The pale shapes belong to other lessons; "norm" is a normalization layer.

# %%
lesson.show(
    block_picture(lit="lora"),
    "LoRA trains A and B in parallel with each of the seven projections of a layer.",
)

# %% [markdown]
# ## Idea one: a second path in parallel
#
# LoRA leaves the pretrained weight $W_0$ alone and adds a cheap path in parallel with
# it. The path compresses the input $x$ to $r$ values with a matrix $A$, and expands
# these to the output with a matrix $B$:
#
# $$h = W_0\,x + \frac{\alpha}{r}\,B\,A\,x$$
#
# | symbol | what it is | shape |
# |---|---|---|
# | $x$ | the input of the projection | $d_{in}$ |
# | $W_0$ | its pretrained weight, frozen | $d_{out} \times d_{in}$ |
# | $A$ | compresses $x$, trained | $r \times d_{in}$ |
# | $B$ | expands $A\,x$, trained | $d_{out} \times r$ |
#
# You choose the rank $r$, far below $d_{in}$ and $d_{out}$, and $\alpha$. The factor
# $\alpha / r$ is the **scale**. Dividing by $r$ should keep the path from growing with
# the rank; notebook 05 tests that. With one value for each matrix, $W_0 = 2$,
# $A = 0.5$, $B = 3$, a scale of $1$ and $x = 4$ give
# $h = 2 \cdot 4 + 3 \cdot 0.5 \cdot 4 = 14$.
#
# The next cell computes $h$ without ever building the whole matrix $B A$.

# %%
torch.manual_seed(0)
d_in, d_out, r, alpha = 6, 4, 2, 4.0
x = torch.randn(d_in)
W0 = torch.randn(d_out, d_in)
A, B = torch.randn(r, d_in), torch.randn(d_out, r)
z = A @ x  # (r,)
h = W0 @ x + alpha / r * (B @ z)  # (d_out,)
print(f"x has {len(x)} values, z has {len(z)}, h has {len(h)}")

# %% [markdown]
# The second path carries only 2 values, $z = A\,x$. It has the same effect as changing
# the weight by $\Delta W = \frac{\alpha}{r}\,B\,A$, as the next cell checks.

# %%
dW = alpha / r * (B @ A)
torch.testing.assert_close((W0 + dW) @ x, h)
print("shape of the update:", tuple(dW.shape))
print("its rank:", int(torch.linalg.matrix_rank(dW)), "of at most", min(dW.shape))
print("rank of W0 + update:", int(torch.linalg.matrix_rank(W0 + dW)))

# %% [markdown]
# LoRA makes the *change* of the weight low-rank, here of rank 2. The changed weight
# keeps its full rank 4.
#
# ### What does it cost? Claim L4
#
# For a matrix of `4096 x 4096`, what share of its parameters does LoRA of rank `16`
# train? Put a range that you are `90 %` sure of in place of None before you run the
# next cell, since it prints the answer.
#
# L4 is a **claim** that this course tests. Its **rule**, fixed before any run, says
# which value gives which **verdict**. This rule counts parameters, which needs no run,
# so the verdict on the card below is *computed*. "Shipped" results are stored with the
# course.

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
# Remember the formula $r\,(d_{in} + d_{out})$. For a square matrix of width $d$ the
# share is $2r / d$, so twice the width halves the share.
#
# ### Exercise 4.1: the forward pass
#
# Difficulty two of five, importance five of five, about ten minutes. The equation has
# one column $x$; write `forward` for tokens stored as *rows*.
#
# - Input: `x` of shape `(…, d_in)`, with any number of leading dimensions.
# - Given: `self.base`, `self.A` `(r, d_in)`, `self.B` `(d_out, r)`, `self.alpha`. Call
#   `self.base(x)` for $W_0\,x$, since it may have a bias or a transposed weight.
# - Output: `h` of shape `(…, d_out)`, in the one dtype that `x`, `A` and `B` share.
#
# Example: if the base returns zero, `A = [[1, 1]]`, `B = [[2]]`, `alpha = 3` and
# `x = [[1, 2]]` give `[[18]]`.
#
# <details><summary>Hint one: a question</summary>
#
# For a column, you compute $A x$. What is the same product for the row $x^T$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `x` is `(…, d_in)`, then `(…, r)`, then `(…, d_out)`. `self.A` has `r` rows.
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
# ## Idea two: initialize the update to zero
#
# Fine-tuning should begin at the pretrained model, since random changes can destroy
# what it knows. So the **initialization** should make $B A = 0$: with $B = 0$, with
# $A = 0$, or with both. The gradients show which of the three can learn. Let $g$ be the
# gradient of the loss $L$ with respect to $h$:
#
# $$\frac{\partial L}{\partial A} = \frac{\alpha}{r}\,B^T g\,x^T
# \qquad\qquad
# \frac{\partial L}{\partial B} = \frac{\alpha}{r}\,g\,(A\,x)^T$$
#
# Each gradient contains the *other* matrix, and is zero if the other one is. For the
# small matrices, the next cell prints the norms of both gradients, at first and after
# one small step of gradient descent.


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
print(f"{'norm of':17}   dL/dA   dL/dB  after a step:     dL/dA   dL/dB")
for name, pair in tried.items():
    now = gradients(*pair)
    later = gradients(*(m - 0.001 * d for m, d in zip(pair, now, strict=True)))
    now, later = ([f"{d.norm():7.1f}" for d in each] for each in (now, later))
    print(f"{name:17}", *now, " " * 13, *later)

# %% [markdown]
# With both zero, LoRA never learns: both gradients stay zero. With only $B$ zero, $B$
# has a gradient of norm 263.0. One step makes $B$ nonzero, and then $A$ has a gradient
# too, of norm 19.7. The reverse works as well. LoRA's paper sets $B$ to zero, which
# tolerates larger learning rates (Hayou and others, at the end).
#
# **Which variance should $A$ have?** The paper gives none. Its authors' code draws $A$
# uniformly, with variance $1 / (3\,d_{in})$; we use a Gaussian of that variance. The
# next cell prints the standard deviation (std) of $A\,x$, with variance one and with
# ours.

# %%
for width in (64, 512, 4096):
    wide_x = torch.randn(width)
    plain = torch.randn(64, width) @ wide_x
    scaled = plain / math.sqrt(3 * width)
    print(f"d_in {width:4}: std of A x {plain.std():5.1f}; scaled {scaled.std():.2f}")

# %% [markdown]
# With variance one, $A\,x$ grows with the layer's width, from 6.9 to 62.4. With ours,
# it stays between 0.50 and 0.56.
#
# ### Exercise 4.2: the start
#
# Difficulty one of five, importance four of five, about five minutes. A warm-up of two
# lines: initialize $A$ and $B$.
#
# - Input: whole numbers `d_out`, `d_in`, `r`.
# - Output: two new `float32` tensors. `A` `(r, d_in)` is Gaussian with mean zero and
#   variance $1 / (3\,d_{in})$, from torch's global generator; `B` `(d_out, r)` is zero.
#
# Example: `my_start(4, 12, 2)` returns `A` `(2, 12)` with std `1 / 6`, and `B`
# `(4, 2)`.
#
# <details><summary>Hint one: a question</summary>
#
# `torch.randn` has variance one. Which factor gives its values the variance $v$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The rows of $A$ are as long as $x$, and the columns of $B$ as long as $h$.
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
# We test this on a whole model. Before its first step, LoRA must not change any
# **logit**, the score of a possible next token. So the largest difference of a logit,
# which cannot be negative, must be exactly zero. The shipped runs compare eight test
# rows, the cell below two.
#
# Two of the three initializations below are **controls** with a known result. *Both
# random* must change the logits, and *both zero* must have no gradient; only then is
# the measurement valid. Guess how far *both random* moves a logit at most.
# (`template="chat"` means SmolLM2's chat format, `"raw"` none.)

# %%
lesson.rule("L2")
lesson.predict("4.2", low=None, high=None, unit="as a difference of logits")

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
# A newly injected LoRA changes no logit; *both random* moved one by 24.2. So if your
# model differs before the first optimizer step, look for a bug in the injection.
#
# Does LoRA *need* this initialization to learn? The figure shows shipped runs, three
# seeds each. They are **paired**: with one seed, all three initializations see the same
# rows in the same order.

# %%
series = {}
for how in starts.STARTS:
    found = [runs.stored(c) for c in starts.configs("smollm2") if c["start"] == how]
    steps = zip(*(run.result["losses"] for run in found), strict=True)
    series[how] = [(i, sum(s) / len(s), min(s), max(s)) for i, s in enumerate(steps, 1)]
figure = curves.lines(
    series,
    x="Optimizer step, count",
    y="Training loss, nats per token",
    title="Three initializations of LoRA in SmolLM2",
    subtitle="Mean of three seeds; the band is their range. Controls in gray.",
    control=("both-random", "both-zero"),
)
figure.axes[0].set_xticks([1, 5, 10, 15, 20])
ends = {how: f"{rows[0][1]:.2f} to {rows[-1][1]:.2f}" for how, rows in series.items()}
lesson.show(figure, "; ".join(f"{how}: loss {end}" for how, end in ends.items()) + ".")

# %% [markdown]
# *Both zero* stays at 1.43. *Both random* begins with a spoiled model, at 4.00, and
# still reaches 0.07, like the standard initialization. So learning does not require a
# zero update here; the advantage is an intact model at the beginning. Which
# initialization *ends* best is open. Test losses for several variances of a random $B$
# would show it.
#
# ## Idea three: inject LoRA into a whole model
#
# **Injecting** LoRA takes two actions: freeze every parameter of the model, then
# replace each chosen projection by a LoRA that contains it as `.base`. A PyTorch model
# is a tree of modules:
#
# | you need | you write |
# |---|---|
# | all modules and their names | `model.named_modules()` |
# | the parent of `"layers.0.q_proj"` | `model.get_submodule("layers.0")` |
# | another child in its place | `setattr(parent, "q_proj", new)` |
#
# Two mistakes are common. If you freeze only what you wrap, embeddings and norm layers
# still train, and nobody notices, because the loss falls. If you freeze *after*
# replacing, $A$ and $B$ are frozen too.
#
# ### Exercise 4.3: inject
#
# Difficulty three of five, importance five of five, about fifteen minutes. Inject LoRA
# into a model.
#
# - Input: a `model`, a list `targets` such as `["q_proj", "v_proj"]`, `r` and `alpha`.
# - Effect: all parameters are frozen. Then `pfs.lora.LoRA(module, r, alpha)` replaces
#   every `nn.Linear` and every `Conv1D` (GPT-2's linear layer) whose name's last part
#   is in `targets`.
# - Output: the list of the replaced modules' full names, in the model's order.
#
# Example: in a Llama with one layer, `["q_proj"]` gives
# `["model.layers.0.self_attn.q_proj"]`. Make a list of `named_modules()` first, since
# it walks the tree while you loop. `get_submodule("")` is the model itself.
#
# <details><summary>Hint one: a question</summary>
#
# What must happen first, so that only $A$ and $B$ train? How do you split a full name
# into parent and last part?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Loop over `(name, module)` pairs. `name.rpartition(".")` is
# `(parent, ".", last part)`.
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
# ### Train SmolLM2 with it
#
# If your answers to 4.1 and 4.2 passed their checks, *your* class and *your*
# initialization train SmolLM2 below. Otherwise the code of the next cell is used, which
# gives both solutions away. A second copy of SmolLM2 gets the LoRA of `pfs`, the
# course's library, with the same seed. Guess: with rank `8` in every projection, what
# share of the parameters will train?


# %%
class HandLoRA(nn.Module):
    def __init__(self, base, A, B, alpha):
        super().__init__()
        self.base, self.A, self.B = base, nn.Parameter(A), nn.Parameter(B)
        self.scale = alpha / A.shape[0]

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def hand_start(d_out, d_in, r):
    return torch.randn(r, d_in) / math.sqrt(3 * d_in), torch.zeros(d_out, r)


Layer = lesson.mine(MyLoRA, HandLoRA)
begin = lesson.mine(my_start, hand_start)

# %%
lesson.predict("4.3", low=None, high=None, unit="% of the model")

# %%
total = model.num_parameters()
model.requires_grad_(False)
torch.manual_seed(0)
for name in pfs.targets.kinds(model):  # every projection of every layer
    base = model.get_submodule(name)
    A, B = (m.to(base.weight.device) for m in begin(*base.weight.shape, 8))
    model.set_submodule(name, Layer(base, A, B, alpha=16))
library, _ = lesson.load_model()
torch.manual_seed(0)
wrapped = pfs.lora.inject(library, r=8, alpha=16)
pairs = [(model.get_submodule(n), library.get_submodule(n)) for n in wrapped]
trained = [p for p in model.parameters() if p.requires_grad]
size = sum(p.numel() for p in trained)
print(f"{len(wrapped)} projections, {size:,} parameters to train")
print("the same A, bit for bit:", all(torch.equal(m.A, t.A) for m, t in pairs))
lesson.measured("4.3", 100 * size / total)

# %% [markdown]
# In 210 projections, 1.82 % of the model's parameters train. Now train the first copy,
# in plain PyTorch. `model(**batch).loss` is the mean loss over the answers' tokens.
# After ten optimizer steps, the model answers two test rows.

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
        print(f"step {step + 1:2}: training loss {loss.item():.3f}")

# %%
asked = task.test.select(range(2))
found = pfs.evaluation.answer_rows(model, tokenizer, task, asked, template="chat")
for answer, right in zip(found.answers, found.correct, strict=True):
    print("right:" if right else "wrong:", answer)

# %% [markdown]
# The training loss fell from 1.438 to 0.044. Both answers have the right form, and one
# has a wrong value.
#
# The library's LoRA computes its gradients by hand, which is faster. The next cell
# gives it our trained $A$ and $B$, and compares all logits and gradients.

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
print(f"gradients of A and B differ by {off:.1e} of their norm at most")
kept = all(torch.equal(m.base.weight, t.base.weight) for m, t in pairs)
print("every pretrained matrix is unchanged, bit for bit:", kept)
assert gap < 1e-3 and off < 1e-3 and kept

# %% [markdown]
# The two agree up to rounding.
#
# ## Idea four: merge the update into the weight
#
# After training you can **merge** LoRA: add its update to the weight and remove the
# second path. The model is then as fast as before:
#
# $$W = W_0 + \frac{\alpha}{r}\,B\,A$$
#
# With the single values from above, $W = 2 + 3 \cdot 0.5 = 3.5$, and again $W x = 14$.
# But GPT-2's `Conv1D` stores its weight transposed, as $d_{in} \times d_{out}$, while
# $B A$ is $d_{out} \times d_{in}$ as in `nn.Linear`.
#
# ### Break it on purpose
#
# A forgotten transpose can corrupt a model without an error, as it once did in PEFT,
# Hugging Face's library (see the last link). The next cell tries such a merge on three
# layers, and prints how far the outputs are off.


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
# The non-square `Conv1D` raises an error, so somebody will notice. The **square** one
# raises none, and its outputs are off by about `40`. GPT-2 has a square one in every
# layer, `attn.c_proj`.
#
# `broken_merge` has a second, smaller fault. In `bfloat16`, a 16-bit format with two to
# three significant digits, it rounds the update before adding it, and then the sum
# again.
#
# ### Exercise 4.4: a merge that is right
#
# Difficulty three of five, importance four of five, about ten minutes. Repair
# `broken_merge`.
#
# - Input: `base`, an `nn.Linear` or `Conv1D` with a weight of any floating-point dtype;
#   `A` `(r, d_in)` and `B` `(d_out, r)` in `float32`; `alpha`.
# - Effect: `base.weight` holds $W_0 + \frac{\alpha}{r} B A$, added in `float32` and
#   rounded once. Parameter object, shape, dtype and bias stay the same; nothing is
#   returned.
#
# Example: `nn.Linear(1, 1)` with weight `[[2.0]]`, `A = [[0.5]]`, `B = [[3.0]]` and
# `alpha = 1` ends with weight `[[3.5]]`.
#
# <details><summary>Hint one: a question</summary>
#
# Which class needs the update transposed? In which dtype do you add?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The update is `(d_out, d_in)`, and a `Conv1D` needs `(d_in, d_out)`. `copy_` rounds to
# the dtype of the weight.
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
# Keep a copy of the base: a merge rounds, so subtracting the update does not restore
# $W_0$ exactly.
#
# ## Idea five: how low is the rank of an update?
#
# LoRA rests on a hypothesis: *the weight updates of fine-tuning have a low intrinsic
# rank*. An update may have many directions although the task needs only a few;
# "intrinsic" counts those few. The **singular value decomposition** writes an update as
# a sum of rank-one pieces:
#
# $$\Delta W = s_1\,u_1 v_1^T + s_2\,u_2 v_2^T + \dots
# \qquad s_1 \ge s_2 \ge \dots \ge 0$$
#
# Here $v_i$ is a direction of the input and $u_i$ one of the output, both of length
# one. The **singular value** $s_i$ is the size of the piece; all of them are the
# **spectrum**. The first $k$ pieces are the best approximation of rank $k$. Its
# **energy** is its share of the squared norm:
#
# $$E_k = \frac{s_1^2 + \dots + s_k^2}{s_1^2 + s_2^2 + \dots}$$
#
# Singular values of $3$ and $1$ give $E_1 = 9 / (9 + 1) = 0.9$. The rest of the squared
# norm, here `0.1`, is the relative error of the approximation. The next cell computes
# both for one strong direction plus noise. `U` holds the $u_i$ as columns, and `Vt` the
# $v_i$ as rows.

# %%
torch.manual_seed(0)
dW = 3 * torch.outer(torch.randn(8), torch.randn(8)) + torch.randn(8, 8)
U, s, Vt = torch.linalg.svd(dW)
print("singular values:", [round(value, 1) for value in s.tolist()])
cut = s[0] * torch.outer(U[:, 0], Vt[0])
print(f"energy of rank 1:   {s[0] ** 2 / s.square().sum():.3f}")
print(f"1 - relative error: {1 - (dW - cut).norm() ** 2 / dW.norm() ** 2:.3f}")
print("rank of dW itself:", int(torch.linalg.matrix_rank(dW)))

# %% [markdown]
# One singular value, 19.7, dominates, and rank one holds 0.877 of the energy. The
# matrix itself has rank 8, because a little noise fills every direction. So we ask
# which rank holds 90 % of the energy.
#
# ### Exercise 4.5: energy, and the rank that holds it
#
# Difficulty two of five, importance four of five, about ten minutes. Compute both.
#
# - Input: `dW` `(d_out, d_in)`, `float32` and not all zero; a share `held` below one.
# - Output: a pair. `energy` is a tensor `(min(d_out, d_in),)`, and `energy[i]` belongs
#   to rank `i + 1`. `k` is an `int`, the smallest rank whose energy is at least `held`.
#
# Example: `torch.diag(torch.tensor([3.0, 2.0, 1.0]))` has the energies
# `[0.643, 0.929, 1.0]`, and `k` is `2` for `held=0.9`.
#
# <details><summary>Hint one: a question</summary>
#
# Which function of torch computes a running sum? Which rank is at index zero?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `torch.linalg.svdvals(dW)` is `(min(d_out, d_in),)`, from large to small.
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
# *The weight updates of fine-tuning have a low intrinsic rank* (LoRA's paper, section
# one). For each matrix, the rule takes the rank that holds 90 % of the energy, in
# percent of the **full rank**, the matrix's smaller side. Up to a median of `10 %`, the
# claim holds; above `30 %`, it does not. In between, it *holds when* a condition is
# met, which the verdict names. The result is valid only if the updates reach a lower
# test loss than random ones of the same norm.
#
# Guess the median for `tiny`, a model of about a million parameters.

# %%
lesson.rule("L1")
lesson.predict("4.5", low=None, high=None, unit="% of the full rank")

# %% [markdown]
# `tiny` was trained on generated text. The next cell fine-tunes it to turn a sentence,
# such as `On Friday Ada found three lamps in Oslo.`, into a record with new words,
# `Oslo - funek | bafo & 3 | …`. As a control, each update gets a random matrix of the
# same shape and norm.
# Brackets show a `95 %` interval of the median: how far it could move with other
# matrices of this kind.

# %%
chosen = spectrum.config("tiny", seed=0)
tuned, tiny_tokenizer, result = finetune.fine_tuned(chosen)
tiny, _ = pfs.load_model("tiny", device="cpu")
changed = spectrum.updates(tuned, tiny)
control = {n: spectrum.random_like(dW, i) for i, (n, dW) in enumerate(changed.items())}
live = spectrum.median_share(changed)
noise, *_ = spectrum.median_share(control)
print(f"{len(changed)} updates; rank for 90 % of the energy, in % of the full rank:")
print("median update {:.0f} [{:.0f}, {:.0f}],".format(*live), f"random {noise:.0f}")
lesson.measured("4.5", live[0])

# %% [markdown]
# The median update needs 20 % of the full rank, and a random matrix 52 %. So updates
# have structure, but fill many directions.
#
# ### What a low-rank part is worth
#
# Energy does not tell what a part of the update does for the model. So we also measure
# the **gain**: how much an update lowers the test loss. We cut all updates to rank $k$
# and put them back into the model. Guess for `tiny`: what share of the gain does rank
# one keep?

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
losses["+ embeddings, norms"] = result["test_loss"]
gain = losses["nothing"] - losses["whole update"]
kept = {said: 100 * (losses["nothing"] - loss) / gain for said, loss in losses.items()}
for said, loss in losses.items():
    print(f"{said:21} loss {loss:5.2f}, {round(kept[said]):4} % of the gain")
lesson.measured("4.6", kept["rank 1"])

# %% [markdown]
# In `tiny`, rank one keeps 46 % of the gain and rank 8 keeps 87 %; random updates keep
# none. The last line adds the trained embeddings and norm layers, which lower the loss
# from 0.36 to 0.02. It exceeds 100 %, which is the gain of the projections alone.
#
# The figure shows what SmolLM2's updates keep at rank $k$ in the shipped runs.


# %%
def band(kind):
    low, middle, high = ([100 * e for e in row] for row in energies[kind])
    return list(zip(ranks, middle, low, high, strict=True))


ranks, energies = full[0].result["ranks"], full[0].result["energy"]
use = {k: [spectrum.kept(run, k) for run in full] for k in spectrum.RANKS}
lines = {
    "gain in test loss": [(k, sum(u) / 3, min(u), max(u)) for k, u in use.items()],
    "energy of the updates": band("all"),
    "energy, random": band("random"),
}
figure = curves.lines(
    lines,
    x="Rank k, singular values kept",
    y="Kept, % of what the whole updates have",
    title="SmolLM2's updates: low ranks keep more gain than energy",
    subtitle="Gain: mean and range of 3 seeds. Energy, one seed: the median matrix, "
    "with a band for the middle 80 %.",
    control=("energy, random",),
    log="x",
    names="foot",
)

# %%
held, noise_held = (band(kind)[ranks.index(8)][1] for kind in ("all", "random"))
lesson.show(
    figure,
    f"Cut to rank 8, the updates keep {min(use[8]):.1f} % or more of their gain and "
    f"{held:.0f} % of their energy; random matrices keep {noise_held:.0f} %.",
)

# %% [markdown]
# Rank 8, `1.4 %` of SmolLM2's usual full rank of `576`, holds 57 % of the energy and at
# least 99.2 % of the gain.
#
# The next cell prints the rule's number for both models. Brackets now show how far it
# could move with other *seeds*. Only the line "L1 here", your own run, has the interval
# over *matrices*. The line "tiny, shuffled" is a control: each sentence gets the record
# of another one, so `tiny` can learn the form of a record but not its content.

# %%
for scale in ("tiny", "smollm2"):
    found = ledger.judge(ledger.claim("L1"), scale)
    share = "{:.1f} % [{:.1f}, {:.1f}]".format(found.measured, *found.interval)
    print(f"{scale:8} {share} of the full rank, {len(found.seeds)} seeds")
stored = [runs.stored(config) for config in spectrum.configs("tiny")]
blind = [r.result["median_share"] for r in stored if "random" in r.config["task"]]
print(f"tiny, shuffled {min(blind):.1f} to {max(blind):.1f} %, {len(blind)} seeds")
lesson.live("L1", *live, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L1", guess="4.5")

# %% [markdown]
# The verdict depends on what "low" means. In SmolLM2, few directions carry the gain on
# this task: in this sense, the rank is low. But many hold the energy, so the spectrum
# is not narrow: of `576` singular values, 14.6 % are about `84`, ten times the usual
# rank `8`. So choose a rank by test loss.
#
# `tiny` keeps less of its gain at rank 8. The cause is open, since model, task and
# training settings all differ. A `tiny` run without new words would test one cause.
#
# - **A low rank does not show that content was learned.** In `tiny`, updates for
#   shuffled records need even less of the full rank (18.4 to 19.1 %) than those for
#   right ones (20.5 %).
# - **Full fine-tuning also trains embeddings and norm layers.** They help `tiny`, but
#   not SmolLM2: its test loss is `0.024` to `0.031` with them, and 0.022 to 0.028
#   without. LoRA freezes both. So comparing it with full fine-tuning mixes rank with
#   the choice of parameters.
#
# ## Now with the library
#
# In PEFT, all this is one call. An **adapter** is the set of trained $A$ and $B$. The
# next cell saves ours in PEFT's format, loads it into PEFT, and compares every logit.
# There, `"all-linear"` means every projection.

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
# The logits agree up to rounding, so adapters can move between the libraries.
#
# ## Quiz
#
# **1. Our LoRA trains a fiftieth of the parameters. What else shrinks that much?**
#
# <details><summary>The time of an optimizer step</summary>
#
# No. The forward pass, the gradient of $x$ and the gradient of $W_0$ cost the same.
# LoRA saves only the last, so the time shrinks by a third.
#
# </details>
# <details><summary>The bytes of the gradients and of AdamW's averages of them</summary>
#
# Right. They exist only for trained parameters.
#
# </details>
# <details><summary>The bytes of the weights</summary>
#
# No. $W_0$ stays in memory.
#
# </details>
#
# **2. Somebody makes $A$ zero and $B$ Gaussian. What happens?**
#
# <details><summary>Nothing is ever learned</summary>
#
# No. That needs *both* to be zero.
#
# </details>
# <details><summary>Training begins at a spoiled model</summary>
#
# No. $B A$ is still zero.
#
# </details>
# <details><summary>Training begins at the pretrained model, and LoRA learns</summary>
#
# Right. Which initialization *trains* better was not measured here.
#
# </details>
#
# **3. What is the rank of $W_0 + \frac{\alpha}{r} B A$ for $r = 8$?**
#
# <details><summary>Eight</summary>
#
# No. Eight bounds the rank of the *change*.
#
# </details>
# <details><summary>Usually that of $W_0$</summary>
#
# Right. You saw this on the small matrices.
#
# </details>
# <details><summary>That of $W_0$, minus eight</summary>
#
# No. The change would have to cancel parts of $W_0$ exactly.
#
# </details>
#
# **4. (From notebook 00.) Your LoRA gets seventeen of twenty test rows right, a
# colleague's eighteen. Which is better?**
#
# <details><summary>The colleague's</summary>
#
# No. For seventeen of twenty, the `95 %` interval is about `64` to `95 %`, which
# includes eighteen (`90 %`).
#
# </details>
# <details><summary>These rows cannot tell</summary>
#
# Right. More rows, compared in pairs, could.
#
# </details>
# <details><summary>They are equally good</summary>
#
# No. Twenty rows do not support that claim either.
#
# </details>
#
# **5. You have a fully fine-tuned model and a LoRA adapter. Which file works alone?**
#
# <details><summary>Both</summary>
#
# No. $A$ and $B$ are useless without $W_0$.
#
# </details>
# <details><summary>The model's</summary>
#
# Right. The adapter needs its base, but is about fifty times smaller here.
#
# </details>
# <details><summary>Neither: both need the base</summary>
#
# No. Full fine-tuning leaves a complete model.
#
# </details>
#
# ### In your own words
#
# A colleague reads the table of `tiny` and says: "LoRA of rank 8 will get 87 % of what
# full fine-tuning gains there." Give two reasons why this does not follow. Then plan a
# test: which two methods would you train, which control would you add, and which result
# would refute the sentence?
#
# <details><summary>A model answer</summary>
#
# First, we cut updates that full fine-tuning had found; LoRA may find other directions.
# Second, full fine-tuning also trained embeddings and norm layers. I would train LoRA
# and full fine-tuning of the projections alone, with five paired seeds, each at its own
# best learning rate on validation rows. As a control, an untrained random LoRA must
# gain nothing. The sentence is refuted if the interval of LoRA's share excludes 87 %.
#
# </details>
#
# ### Transfer
#
# An `nn.Embedding` looks up row $i$ of a matrix $E$ of shape `(vocabulary, hidden)`.
# Write LoRA for it, where $A$ compresses and $B$ expands. Which shapes do $A$ and $B$
# have? Choose which one is zero at first, and defend the choice.
#
# <details><summary>A model answer</summary>
#
# The lookup is $E^T x$ with an $x$ that is one at position $i$ and zero elsewhere. So
# $A$ is `(r, vocabulary)`, $B$ is `(hidden, r)`, and the output is
# `E[i] + alpha / r * A.T[i] @ B.T`. I would make $A$ zero. Then training changes only
# the columns of tokens that occur, so all others keep their embedding.
#
# </details>
#
# ## Limits
#
# - **What stays open.** We cut finished updates. Whether LoRA finds directions as good
#   is a question for notebook 05.
# - **Scale.** Both models are small and both tasks easy. Code, mathematics or long
#   training may differ.
# - **What the papers report.** Aghajanyan and others reached `90 %` of RoBERTa's full
#   performance on one task with `200` trained parameters. Biderman and others trained
#   Llama on code and mathematics: updates had ranks `10` to `100` times LoRA's usual
#   ones, and LoRA learned less.
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
# - Hu and others, [LoRA](https://arxiv.org/abs/2106.09685).
# - Aghajanyan and others, [Intrinsic dimensionality explains the effectiveness of
#   language model fine-tuning](https://arxiv.org/abs/2012.13255).
# - Biderman and others, [LoRA learns less and forgets
#   less](https://arxiv.org/abs/2405.09673).
# - Hayou and others, [The impact of initialization on LoRA finetuning
#   dynamics](https://arxiv.org/abs/2406.08447); and [Beyond zero
#   initialization](https://arxiv.org/abs/2505.23194).
# - Kalajdzievski, [A rank stabilization scaling
#   factor](https://arxiv.org/abs/2312.03732): a scale of $\alpha / \sqrt{r}$ (notebook
#   05).
# - PEFT's [issue 3531](https://github.com/huggingface/peft/issues/3531): removing a
#   merged DoRA (a relative of LoRA) silently corrupted square layers of GPT-2.
