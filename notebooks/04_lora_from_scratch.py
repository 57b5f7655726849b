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
# - write LoRA, inject it into SmolLM2, train it, and merge it into the weights;
# - count its trainable parameters in your head;
# - explain why $B$ is initialized to zero, and why $A$ must not be zero as well;
# - find the bug in a merge that corrupts GPT-2 without an error;
# - choose a rank by test loss, with a control;
# - name the evidence for low ranks, and what it does not show.
#
# **Only ten minutes?** Write `start("04", quick=True)` below and run all cells. Read
# "The result first", "Idea one" and "What a low-rank part is worth".

# %%
from peft_from_scratch.course import start

lesson = start("04")

# %%
import math
from statistics import mean, median

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2

import peft_from_scratch as pfs
from peft_from_scratch.course import block_picture, counting, finetune, low_rank
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
# multiples of $u$: they have one **direction**. A matrix of rank 8 is a sum of eight
# of these.
#
# Each line below adds a part of the updates to the pretrained model. A random update is
# as large as the real one: it has the same **norm**, the root of the sum of the squared
# entries. **Test
# loss** is the negative logarithm of the right token's probability, averaged over
# answers that no run has trained on. A loss of `0.04` **nats per token** means a
# probability of about `96 %`. The **gain** is how much the whole updates lower the test
# loss.

# %%
full = [runs.stored(config) for config in spectrum.configs("smollm2")]
tests = [run.result["function"] for run in full]
cuts = {
    "nothing": "the pretrained model",
    "random": "+ random updates of the same norm",
    "rank 1": "+ the best rank-1 part of each update",
    "rank 8": "+ the best rank-8 part of each update",
    "update": "+ the whole updates",
    "everything": "+ trained embeddings and norms as well",
}
kept = {}
for cut, words in cuts.items():
    losses = [test[cut] for test in tests]
    gains = [(t["nothing"] - t[cut]) / (t["nothing"] - t["update"]) for t in tests]
    kept[cut] = round(100 * mean(gains), 1)
    ends = f"{min(losses):.3f} to {max(losses):.3f}"
    print(f"{words:39} loss {ends}, {kept[cut]:5.1f} % of the gain")
lesson.control("Random updates keep less than 5 % of the gain.", kept["random"] < 5)

# %% [markdown]
# One direction per matrix keeps 94.1 % of the gain, and eight keep 99.4 %. Random
# updates keep nothing, so the size of an update is not what helps. Full fine-tuning
# also trains embeddings and normalization layers; here they add nothing.
#
# So **LoRA**, low-rank adaptation, freezes the pretrained model and trains two thin
# matrices for each projection, in color below. The pale shapes belong to other lessons.
# The residual stream carries each token's vector through the layers; SiLU is the MLP's
# nonlinear function.

# %%
lesson.show(
    block_picture(lit="lora"),
    "LoRA trains A and B in parallel with each of the seven projections of a layer.",
)

# %% [markdown]
# ## Idea one: a second path in parallel
#
# LoRA leaves the pretrained weight $W_0$ alone and adds a path in parallel with it. The
# picture shows why the path is cheap.

# %%
lesson.show(
    low_rank.thin_matrices(576, 576, r=8),
    "For a projection of 576 x 576, A and B of rank 8 hold 2.8 % of the parameters.",
)

# %% [markdown]
# The path compresses the input $x$ to $r$ values with a matrix $A$, and expands these
# to the output with a matrix $B$:
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
# You choose the rank $r$ and $\alpha$. The factor $\alpha / r$ is the **scale**;
# notebook 05 tests it. With one value for each matrix, $W_0 = 2$, $A = 0.5$, $B = 3$, a
# scale of $1$ and $x = 4$ give $h = 2 \cdot 4 + 3 \cdot 0.5 \cdot 4 = 14$.
#
# The next cell computes $h$ without building $B A$. Then it checks that changing the
# weight by $\Delta W = \frac{\alpha}{r}\,B\,A$ gives the same $h$.

# %%
torch.manual_seed(0)
d_in, d_out, r, alpha = 6, 4, 2, 4.0
x = torch.randn(d_in)
W0 = torch.randn(d_out, d_in)
A, B = torch.randn(r, d_in), torch.randn(d_out, r)
z = A @ x  # (r,)
h = W0 @ x + alpha / r * (B @ z)  # (d_out,)
dW = alpha / r * (B @ A)
torch.testing.assert_close((W0 + dW) @ x, h)
print("rank of the update:", int(torch.linalg.matrix_rank(dW)), "of", min(dW.shape))
print("rank of W0 + update:", int(torch.linalg.matrix_rank(W0 + dW)))

# %% [markdown]
# LoRA makes the *change* of the weight low-rank, here of rank 2. The changed weight
# keeps its full rank 4.
#
# ### What does it cost? Claim L4
#
# LoRA trains $r\,(d_{in} + d_{out})$ parameters of a projection's
# $d_{in} \cdot d_{out}$. For a square matrix of width $d$, the share is $2r / d$. The
# next cell counts it for rank 16.
#
# L4 is a **claim** that this course tests. A **rule**, fixed before any run, says which
# measured value gives which **verdict**. L4 only counts
# parameters, and no run could change the count; its verdict is called *computed*.
# The cell compares the **live** result, computed here, with the **shipped** one, stored
# with the course.

# %%
for width in (512, 1024, 2048, 4096, 8192):
    print(f"{width} x {width}: {counting.count(width, width, 16) / width**2:.2%}")
counted = counting.count(4096, 4096, 16)
lesson.live("L4", counted, low=counted, high=counted)  # a count has no interval

# %% tags=["nbval-check-output"]
lesson.verdict("L4")

# %% [markdown]
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
# tolerates larger learning rates (Hayou and others, at the end). Our $A$ is Gaussian
# with the variance of the authors' code, $1 / (3\,d_{in})$, so that $A\,x$ does not
# grow with the layer's width.
#
# ### On trial: claim L2
#
# *With $A$ Gaussian and $B$ zero, training starts from exactly the pretrained weights.*
# A **logit** is the score of a possible next token. Before its first step, LoRA may
# change no logit of SmolLM2: the largest difference must be exactly zero. Logits have
# no unit, so `(of a logit)` stands where a unit would. The shipped runs compare eight
# test rows, and the cell below compares two.
#
# Two other initializations are **controls**, whose results are known beforehand. With
# *both random*, the logits must change. With *both zero*, there must be no gradient.
# Otherwise the measurement is void.

# %%
lesson.rule("L2")

# %%
model, tokenizer = lesson.load_model()
task = pfs.tasks.load_task("orders")
encode = pfs.templates.encode_rows  # template="chat": SmolLM2's; "raw": none
test = encode(tokenizer, task.instruction, task.test.select(range(2)), template="chat")
before, moved, steepest = starts.logits(model, test), {}, {}
for how, name in low_rank.NAMES.items():
    torch.manual_seed(0)
    pfs.lora.inject(model, r=8, alpha=16)
    starts.begin(model, how)
    moved[how] = starts.largest_difference(starts.logits(model, test), before)
    pfs.loss.accumulate_gradients(model, [pfs.loss.batch_of(test, model.device)])
    steepest[how] = max(p.grad.abs().max() for p in pfs.trainable(model).values())
    print(f"{name:16} logits move by {moved[how]:.3g}, gradient {steepest[how]:.2g}")
    pfs.remove(model)
lesson.control("Both random moves the logits.", moved["both-random"] > 0)
lesson.control("Both zero has no gradient.", steepest["both-zero"] == 0)
largest = moved["gaussian-zero"]
lesson.live("L2", largest, low=largest, high=largest)  # a maximum has no interval

# %% tags=["nbval-check-output"]
lesson.verdict("L2")

# %% [markdown]
# A newly injected LoRA changes no logit; *both random* moved one by 24.2. So if your
# model differs before the first optimizer step, look for a bug in the injection.
#
# Does LoRA *need* this initialization to learn? The figure shows shipped runs, which
# are **paired**: with one seed, all initializations see the same rows in the same
# order.

# %%
configs, shipped = starts.configs("smollm2"), {}
for how in starts.STARTS:
    shipped[how] = [runs.stored(c) for c in configs if c["start"] == how]
figure = low_rank.initializations(
    shipped, title="LoRA learns unless A and B are both zero at first"
)
lesson.show(figure, low_rank.losses_in_words(shipped))

# %% [markdown]
# *Both random* begins with a spoiled model, at 4.00, and still reaches 0.07, like the
# standard initialization. So learning does not require a zero update here. The zero
# update keeps the model intact at first; which initialization *ends* best is open.
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
# still train, and the falling loss hides this. If you freeze *after* replacing, $A$ and
# $B$ are frozen too.
#
# ### Exercise 4.2: inject
#
# Difficulty three of five, importance five of five, about fifteen minutes. Inject LoRA.
#
# - Input: a `model`, a list `targets` such as `["q_proj", "v_proj"]`, and a function
#   `wrap`: `wrap(module)` returns the LoRA of one module.
# - Effect: all parameters are frozen. Then `wrap(module)` replaces every `nn.Linear`
#   and every `Conv1D` whose name's last part is in `targets`. Call `wrap` once for each
#   of them.
# - Output: the list of the replaced modules' full names, in the model's order.
#
# Example: in a Llama with one layer, `["q_proj"]` gives
# `["model.layers.0.self_attn.q_proj"]`. `get_submodule("")` is the model itself.
#
# <details><summary>Hint one: a question</summary>
#
# What must happen first, so that only $A$ and $B$ train?
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


# %% tags=["exercise-4.2"]
def my_inject(model, targets, wrap):
    """Freeze the model; wrap every target in its place; returns the names."""
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    names = []
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in targets and isinstance(module, nn.Linear | Conv1D):
            setattr(model.get_submodule(parent), child, wrap(module))
            names.append(name)
    return names
    ### END SOLUTION


# %% tags=["check-4.2", "points-3"]
checks.lora_inject(my_inject)

# %% [markdown]
# ### Train SmolLM2 with your code
#
# The next cell injects LoRA of rank 8 into every projection of SmolLM2. It uses *your*
# class and injection if they passed their checks.

# %%
Layer = lesson.mine(MyLoRA, checks.LoRA)
inject = lesson.mine(my_inject, checks.inject)


def wrap(base):
    d_out, d_in = base.weight.shape
    A = torch.randn(8, d_in).to(base.weight) / math.sqrt(3 * d_in)
    return Layer(base, A, base.weight.new_zeros(d_out, 8), alpha=16)


kinds = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
total = model.num_parameters()
torch.manual_seed(0)
names = inject(model, kinds, wrap)
trained = [p for p in model.parameters() if p.requires_grad]
size = sum(p.numel() for p in trained)
print(f"{len(names)} projections; {size:,} parameters train, {size / total:.2%} of all")
print(model.get_submodule(names[0]))

# %% [markdown]
# Now train it in plain PyTorch. `model(**batch).loss` is the mean loss over the
# answers' tokens. After ten optimizer steps, the model answers two test rows.

# %%
examples = task.train.select(range(40))
rows = encode(tokenizer, task.instruction, examples, template="chat")
optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
for step in range(10):
    batch = pfs.loss.batch_of(rows[4 * step : 4 * step + 4], model.device)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 3 == 0:
        print(f"step {step + 1:2}: training loss {loss.item():.3f}")
asked = task.test.select(range(2))
asked = pfs.evaluation.answer_rows(model, tokenizer, task, asked, template="chat")
for answer, right in zip(asked.answers, asked.correct, strict=True):
    print("right:" if right else "wrong:", answer)

# %% [markdown]
# The training loss fell from 1.438 to 0.044. One of the two answers is wrong.
#
# ### Now with the library
#
# An **adapter** is the set of trained $A$ and $B$. PEFT, Hugging Face's library,
# injects LoRA in one call; there, `"all-linear"` means every projection. The next cell
# loads your adapter into PEFT's model, and compares every logit.

# %%
import peft

ours = starts.logits(model, test)
config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
theirs = peft.get_peft_model(lesson.load_model()[0], config)
layers, adapter = {name: model.get_submodule(name) for name in names}, {}
for name, layer in layers.items():
    adapter[f"base_model.model.{name}.lora_A.weight"] = layer.A.detach()
    adapter[f"base_model.model.{name}.lora_B.weight"] = layer.B.detach()
peft.set_peft_model_state_dict(theirs, adapter)
gap = starts.largest_difference(starts.logits(theirs, test), ours)
lesson.control("PEFT computes the same logits.", gap < 1e-3)

# %% [markdown]
# So adapters can move between libraries.
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
# A forgotten transpose can corrupt a model without an error, as it once did in PEFT
# (last link). The picture shows the weights of three layers, each next to its $B A$.
# The next cell tries such a merge on them.

# %%
bases = [nn.Linear(16, 24), Conv1D(16, 16), Conv1D(24, 16)]
lesson.show(
    low_rank.orientations(bases),
    "B A has the shape of a square Conv1D's weight, but its rows belong in columns.",
)


# %%
def broken_merge(base, A, B, alpha):
    with torch.no_grad():
        base.weight += (alpha / A.shape[0] * B @ A).to(base.weight.dtype)


torch.manual_seed(0)
for base, d_out in zip(bases, (24, 16, 24), strict=True):
    A, B, x = torch.randn(2, 16), torch.randn(d_out, 2), torch.randn(5, 16)
    expected = base(x) + 3.0 / 2 * (x @ A.T @ B.T)
    try:
        broken_merge(base, A, B, 3.0)
        print(f"{base}: off by {(base(x) - expected).abs().max():.2g} at most")
    except RuntimeError as error:
        print(f"{base}: {error}")

# %% [markdown]
# The non-square `Conv1D` raises an error. The **square** one raises none, and its
# outputs are off by up to 17. GPT-2 has a square one in every layer, `attn.c_proj`.
#
# `broken_merge` has a second fault. In `bfloat16`, which has two to three significant
# digits, it rounds the update, and then the sum again.
#
# ### Exercise 4.3: a merge that is right
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


# %% tags=["exercise-4.3"]
def my_merge(base, A, B, alpha):
    """Write W0 + (alpha / r) B A into base.weight, which keeps its shape and dtype."""
    ### BEGIN SOLUTION
    update = alpha / A.shape[0] * (B @ A)  # (d_out, d_in), float32
    if isinstance(base, Conv1D):
        update = update.T
    with torch.no_grad():
        base.weight.copy_(base.weight.float() + update)
    ### END SOLUTION


# %% tags=["check-4.3", "points-3"]
checks.lora_merge(my_merge)

# %% [markdown]
# The next cell merges all LoRAs of the trained SmolLM2, with your merge if it passed.

# %%
merge = lesson.mine(my_merge, checks.merge)
for name, layer in layers.items():
    merge(layer.base, layer.A.detach(), layer.B.detach(), 16)
    model.set_submodule(name, layer.base)
gap = starts.largest_difference(starts.logits(model, test), ours)
print(f"{model.num_parameters():,} parameters; logits moved by {gap:.1g} at most")
lesson.control("Merging keeps all logits, up to rounding.", gap < 1e-3)

# %% [markdown]
# The model has its old size, and computes what you trained. Keep a copy of the base: a
# merge rounds, so subtracting the update does not restore $W_0$ exactly.
#
# ## Idea five: how low is the rank of an update?
#
# LoRA assumes that a task needs only a few directions of an update. Their number is the
# **intrinsic rank**. The **singular value decomposition** writes an update as a sum of
# rank-one pieces:
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
# Singular values of $3$ and $1$ give $E_1 = 9 / (9 + 1) = 0.9$. The next cell
# decomposes a matrix that is one strong piece plus noise.

# %%
torch.manual_seed(0)
dW = 3 * torch.outer(torch.randn(8), torch.randn(8)) + torch.randn(8, 8)
s = torch.linalg.svdvals(dW)
energy = s.square().cumsum(0) / s.square().sum()
print("rank of dW:", int(torch.linalg.matrix_rank(dW)))
lesson.show(
    low_rank.outer_products(dW, title="One column times one row holds most of dW"),
    f"The first piece holds {energy[0]:.1%} of the energy, two hold {energy[1]:.1%}.",
)

# %% [markdown]
# The matrix has rank 8, because noise fills every direction. So we ask which rank
# holds 90 % of the energy.
#
# ## On trial: claim L1
#
# *The weight updates of fine-tuning have a low intrinsic rank* (LoRA's paper, section
# one). For each matrix, the rule takes the rank that holds 90 % of the energy, in
# percent of the **full rank**, the matrix's smaller side. A low value means a
# **narrow** spectrum: a few pieces hold most of the energy. *Holds when* means: true
# under a condition, which the **verdict card** below names. An update *beats* a random
# one if its test loss is lower.
#
# The next cells fine-tune `tiny`, a model of about a million parameters, trained on
# generated text. It turns a sentence, such as
# `On Friday Ada found three lamps in Oslo.`, into a record:
# `Oslo - funek | bafo & 3 | Ada - sudaf`. The invented words `funek`, `bafo` and
# `sudaf` stand for `Friday`, `lamp` and `found`. As a control, each update gets a
# random matrix of the same shape and norm.
#
# Guess the median for `tiny`. Brackets will show its `95 %` interval. We draw as many
# updates as there are, at random and with repeats, compute their median, and do this
# many times (the **bootstrap**); 95 % of these medians lie inside. For the live
# interval, the matrices of one run are drawn; for the shipped one, the seeds.

# %%
lesson.rule("L1")
lesson.predict("4.1", low=None, high=None, unit="% of the full rank")

# %%
chosen = spectrum.config("tiny", seed=0)
tuned, tiny_tokenizer, result = finetune.fine_tuned(chosen)
tiny, _ = pfs.load_model("tiny", device="cpu")
changed = spectrum.updates(tuned, tiny)
noise = {n: spectrum.random_like(dW, i) for i, (n, dW) in enumerate(changed.items())}
live, (random_share, *_) = map(spectrum.median_share, (changed, noise))
print(f"{len(changed)} updates; rank for 90 % of the energy, in % of the full rank:")
print("median {:.0f} [{:.0f}, {:.0f}],".format(*live), f"random {random_share:.0f}")
lesson.control("A random matrix needs more of the rank.", random_share > live[2])
lesson.measured("4.1", live[0])

# %% [markdown]
# The median update needs 20 % of the full rank, and a random matrix 52 %. So updates
# have structure, but fill many directions.
#
# ### What a low-rank part is worth
#
# Energy does not tell what a part of an update does for the model; its gain in test
# loss does. The next cell defines `loss_at(k)`: it cuts all updates of `tiny` to rank
# $k$, puts them into the model, and measures the test loss.

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
    return mean(finetune.item_losses(tiny, held_out))


def loss_at(k):
    return loss_with({n: spectrum.truncated(dW, k) for n, dW in changed.items()})


# %%
losses = dict(nothing=loss_with({}), random=loss_with(noise))
losses |= dict(update=loss_with(changed), everything=result["test_loss"])
for name, loss in losses.items():
    print(f"{name:10} loss {loss:.2f}")

# %% [markdown]
# `everything` also has the trained embeddings and norm layers, which lower the loss
# from 0.36 to 0.02.
#
# ### Exercise 4.4: how small a rank is enough?
#
# Difficulty four of five, importance five of five, about twenty-five minutes. Find the
# smallest rank that keeps a `share` of the projections' gain. You decide which losses
# define the gain, which one is the control, and which ranks to measure.
#
# - Input: `loss_at(k)` returns the test loss with all updates cut to rank `k`, from `1`
#   to the `int` `full_rank`. `losses` is a dict with the four keys above. `share` lies
#   between zero and one.
# - Output: the smallest rank, an `int`, that keeps at least `share` of the gain.
# - Void measurement: return `None` if the updates gain nothing. A rank may lose
#   `1 - share` of the gain, by default `5 %`. Return `None` too if the control keeps
#   that much or more.
# - Budget: each `loss_at` evaluates the whole test set. Call it twenty times at most,
#   for any full rank up to `576`. You may assume that if a rank keeps the share, so
#   does every larger rank.
#
# Example: `losses` are `8.0`, `8.5`, `4.0` and `2.0`, in the order above. Ranks `1` to
# `4` have the losses `7.0`, `5.0`, `4.25` and `4.0`. For `share=0.9`, the answer is
# `3`, which keeps `94 %`.
#
# <details><summary>Hint one: a question</summary>
#
# Which trained parameters does `loss_at(full_rank)` include? Which of the four losses
# should it equal?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Keep an interval of ranks, two `int`s, that contains the answer. Each call should
# halve it.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `low, high = 1, full_rank`
#
# </details>


# %% tags=["exercise-4.4"]
def my_smallest_rank(loss_at, full_rank, losses, share=0.95):
    """The smallest rank that keeps `share` of the gain; None where that is void."""
    ### BEGIN SOLUTION
    gain = losses["nothing"] - losses["update"]
    if gain <= 0 or losses["nothing"] - losses["random"] >= (1 - share) * gain:
        return None
    low, high = 1, full_rank
    while low < high:
        middle = (low + high) // 2
        if losses["nothing"] - loss_at(middle) >= share * gain:
            high = middle
        else:
            low = middle + 1
    return low
    ### END SOLUTION


# %% tags=["check-4.4", "points-4"]
checks.lora_smallest_rank(my_smallest_rank)

# %% [markdown]
# Which rank of `128` keeps 95 % of the gain in `tiny`? In SmolLM2, rank one kept
# 94.1 %.

# %%
lesson.predict("4.2", low=None, high=None, unit="of 128 ranks")

# %%
smallest = lesson.mine(my_smallest_rank, checks.smallest_rank)
k = smallest(loss_at, 128, losses)
lesson.control("Random updates keep less than 5 % of the gain.", k is not None)
lesson.measured("4.2", k)
gain = losses["nothing"] - losses["update"]
for rank in (1, 8, k):
    part = (losses["nothing"] - loss_at(rank)) / gain
    print(f"tiny, rank {rank} keeps {part:.1%} of the gain")
for run in full:
    few = next(k for k in spectrum.RANKS if spectrum.kept(run, k) >= 95)
    print(f"SmolLM2, seed {run.config['seed']}: rank {few} keeps 95 % or more")

# %% [markdown]
# `tiny` needs rank 18; rank 8 keeps 86.8 %. For SmolLM2, rank 2 is enough in every
# seed. The figure shows its shipped runs.

# %%
title = "SmolLM2's updates: low ranks keep more gain than energy"
figure = low_rank.gain_and_energy(full, title=title)
lesson.show(figure, low_rank.kept_in_words(full, rank=8))

# %% [markdown]
# The rule's number is one median over all projections; the next cell splits it by kind.
# The *shuffled* runs are a control: each sentence gets the record of another one, so
# `tiny` can learn the form of a record but not its content.

# %%
sides = {n.rpartition(".")[2]: min(layers[n].base.weight.shape) for n in names}
print("SmolLM2, the rank that holds 90 % of the energy: in % of the full rank, counted")
for kind, side in sides.items():
    share = median(s for run in full for s in run.result["shares"][kind])
    print(f"  {kind:9} {share:4.1f} % of {side}, that is {share * side / 100:3.0f}")
stored = [runs.stored(config) for config in spectrum.configs("tiny")]
for words, shuffled in (("right records", False), ("shuffled", True)):
    group = [r for r in stored if ("random" in r.config["task"]) == shuffled]
    share = mean(run.result["median_share"] for run in group)
    use = mean(spectrum.kept(run, 8) for run in group)
    print(f"tiny, {words}: {share:.1f} % of the full rank for 90 % of the energy")
    print(f"  rank 8 keeps {use:.0f} % of the gain")
lesson.live("L1", *live, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("L1", guess="4.1")

# %% [markdown]
# The verdict depends on what "low" means. In SmolLM2, few directions carry the gain on
# this task: in this sense, the rank is low. But many hold the energy: the spectrum is
# not narrow. So choose a rank by test loss.
#
# - **The unit matters.** In percent, `v_proj` needs far more than `q_proj`, because its
#   full rank is smaller. Counted in ranks, attention needs 34 to 45, and the MLP 83 to
#   99.
# - **A low rank does not show that content was learned.** From shuffled records, `tiny`
#   can learn only the form. Those updates need *less* of the full rank. At rank 8 they
#   keep *more* of what they gained on their own test records.
# - **LoRA freezes embeddings and norm layers.** They help `tiny`, but not SmolLM2. So
#   comparing LoRA with full fine-tuning mixes rank with the choice of parameters.
# - **Why `tiny` needs more ranks is open**: model, task and training differ.
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
# Right. The gradient of $A$ is not zero.
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
# No. Twenty rows cannot show that.
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
# ## Limits
#
# - **What stays open.** We cut finished updates of full fine-tuning. Notebook 05 asks
#   whether LoRA finds directions as good.
# - **Scale.** Both models are small and both tasks easy. Code, mathematics or long
#   training may differ.
# - **What the papers report.** Aghajanyan and others reached `90 %` of RoBERTa's full
#   performance on one task with `200` trained parameters. In Biderman and others, on
#   code and mathematics, updates had ranks `10` to `100` times LoRA's usual ones, and
#   LoRA learned less.
#
# ## Your guesses, and the receipt
#
# Nine in ten of your ranges should hold the measured value.

# %%
lesson.calibration()

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
# - PEFT's [issue 3531](https://github.com/huggingface/peft/issues/3531): removing a
#   merged DoRA (a relative of LoRA) silently corrupted square layers of GPT-2.
