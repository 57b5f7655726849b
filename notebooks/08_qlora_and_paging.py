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
# # QLoRA and paged optimizers
#
# You will have shown that LoRA trains beside weights of four bits, because a gradient
# needs a weight only while it is multiplied with it; and that an optimizer's states can
# be away for most of a step without a trace in one bit, while the same adapter beside
# the *full* weights is another model.
#
# **You need** notebooks 04 and 07: LoRA, and what NF4 does to a weight. Of notebook 01,
# the four kinds of bytes in a training step.
#
# **At the end you can**
#
# - write QLoRA's product, forward and backward, so that the weight is never kept;
# - say what is in four bits, what is not, and what share of a model really trains;
# - test whether an adapter *compensates*, with a transplant as the control;
# - merge a QLoRA in three ways, and say what each one costs;
# - write a page table that sends the right page away, and AdamW on one page at a time;
# - tell paging from offloading, and paged optimizers from PagedAttention.
#
# **Only ten minutes?** Write `start("08", quick=True)` below and run all cells. Read
# "The result first", do exercise 8.1, and read the verdict on claim Q4b.

# %%
from peft_from_scratch.course import start

lesson = start("08")

# %%
import copy
import warnings
from tempfile import TemporaryDirectory

import bitsandbytes as bnb
import numpy as np
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import peft_from_scratch as pfs
from peft_from_scratch.course import bit_costs, block_picture, count, curves
from peft_from_scratch.course import finetune, formulas, intervals, one_gpu
from peft_from_scratch.course import page_picture, paging, quiet_transformers, runs
from peft_from_scratch.course import spectrum
from peft_from_scratch.course.checks import qlora_and_paging as checks

# %% [markdown]
# ## The result first
#
# The job is that of notebook 00: a sentence in, a line of JSON out. We train SmolLM2
# twice, from the same start, on the same rows, with the same adapters. The one
# difference: in the second run the projections of the base are in four bits. The bytes
# are counted in the first step, tensor by tensor. (The loss is in nats a token.)

# %%
live = {}
for name, method in {"LoRA": pfs.lora, "QLoRA": pfs.qlora}.items():
    live[name] = run = bit_costs.Steps(lesson.base, method, "orders", rows=4)
    run.step(), run.step()
    said = f"weights {run.memory.weights / 1e6:4.0f} MB, {run.seconds:.2f} s a step, "
    said += f"loss {run.losses[0]:.2f} to {run.losses[-1]:.2f}, all bytes of a step "
    print(f"{name:5} {said}{run.memory.peak / 1e6:5,.0f} MB")

# %% [markdown]
# A third of the bytes for the weights, some more time for each step, and it learns. The
# picture shows where the four bits are; *only* the large matrices have them.

# %%
lesson.show(
    block_picture(lit="qlora"),
    "QLoRA: the seven projections of a layer are in four bits, each with a LoRA.",
)

# %% [markdown]
# ## Idea one: a gradient needs no stored weight
#
# A code is a number from zero to fifteen. It has no gradient, and cannot be nudged. So
# how can one train *through* it? By not training *it*. LoRA needs two things of a
# frozen weight: its product with $x$, and the gradient that it passes on to the layer
# below. Both are products with a matrix, and for both the matrix may be made anew:
#
# $$h = W'x + s\,B A\,x
# \qquad\qquad
# \frac{\partial L}{\partial x} = W'^T g + s\,A^T B^T g$$
#
# | symbol | what it is | shape | kept between the passes? |
# |---|---|---|---|
# | $q$ | the codes and constants of notebook 07 | | yes: four bits a weight |
# | $W'$ | what they stand for: dequantize($q$) | $d_{out} \times d_{in}$ | no |
# | $A$, $B$ | the adapter, and its scale $s = \alpha / r$ | LoRA's | yes: they train |
# | $x$, $h$ | input and output | $d_{in}$, $d_{out}$ | $x$, for the gradient of $A$ |
# | $g$ | the gradient that arrives at $h$ | $d_{out}$ | |
#
# $W'$ is written into one buffer, multiplied with, and overwritten by the next layer.
# In the backward pass the same again. Plain autograd would not do that: it *keeps* what
# a product was made of, so that of every layer a whole $W'$ would stay. Let us see what
# is kept, on one layer of the real model's size.

# %%
torch.manual_seed(0)
W0 = torch.randn(576, 1536) / 40
q = pfs.nf4.quantize(W0)
x = torch.randn(8, 1536, requires_grad=True)
products = {
    "W0 in float32": lambda x: x @ W0.T,
    "dequantize, then autograd": lambda x: x @ pfs.nf4.dequantize(q).T,
    "the library's NF4Linear": pfs.nf4.NF4Linear(q),
}
for name, product in products.items():
    print(
        f"{name:26} keeps {bit_costs.kept(product, x):9,} bytes; the codes {q.nbytes:,}"
    )

# %% [markdown]
# What the first row keeps is $W_0$ itself, which is there anyway. The middle row is the
# mistake: right numbers, and a whole $W'$ a layer *beside* the codes, more than with no
# quantization at all. You will write the last row.
#
# ### Exercise 8.1: QLoRA, forward and backward
#
# Difficulty three of five, importance five of five, about fifteen minutes. In
# PyTorch, a product with its own backward pass is a `torch.autograd.Function`. What is
# set on `ctx` in `forward` is there again in `backward`, which gets `dy`, the gradient
# of the output, and returns one for each input: `x` has one, `q` has `None`. As in
# notebook 04, `x` holds *rows*. The check looks at the values, at all gradients, and at
# whether $W'$ is still in memory after the forward pass.
#
# <details><summary>Hint one: a question</summary>
#
# For rows, $y = x W'^T$. Which matrix takes `dy`, `(…, d_out)`, to the shape of `x`,
# and is it transposed?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `pfs.nf4.dequantize(q)` is `(d_out, d_in)`: call it in both passes. `x @ A.T` is
# `(…, r)`. Use the class by `MyProduct.apply(x, q)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `ctx.q = q`
#
# </details>


# %% tags=["exercise-8.1"]
class MyProduct(torch.autograd.Function):
    """y = x W'ᵀ for the codes q: W' exists during a product, and at no other time."""

    @staticmethod
    def forward(ctx, x, q):
        ### BEGIN SOLUTION
        ctx.q = q
        return x @ pfs.nf4.dequantize(q).T
        ### END SOLUTION

    @staticmethod
    def backward(ctx, dy):
        ### BEGIN SOLUTION
        return dy @ pfs.nf4.dequantize(ctx.q), None
        ### END SOLUTION


def my_qlora(x, q, A, B, scale):
    """h = W' x + scale · B A x.    x (…, d_in) -> h (…, d_out)"""
    ### BEGIN SOLUTION
    return MyProduct.apply(x, q) + scale * (x @ A.T @ B.T)
    ### END SOLUTION


# %% tags=["check-8.1", "points-3"]
checks.qlora_forward(my_qlora)

# %% [markdown]
# ### The price is time
#
# "QLoRA is slower than LoRA" is a standing question in the trackers of the libraries.
# Now it can be counted. In one training step, how often is each weight dequantized?

# %%
lesson.predict("8.1", low=None, high=None, unit="times a step")

# %%
qlora, lora = live["QLoRA"], live["LoRA"]
packed = [m for m in qlora.model.modules() if isinstance(m, pfs.nf4.NF4Linear)]
calls = bit_costs.dequantized(qlora.step)
print(f"{len(packed)} projections, {calls} calls")
print(f"a step takes {qlora.seconds - lora.seconds:+.2f} s more than LoRA's")
lesson.measured("8.1", calls / len(packed))

# %% [markdown]
# Once forward, once backward; but for three projections of the first layer, below which
# nothing learns, so that no gradient need be passed on. The cost does not depend on the
# rows of a batch: large batches hide it. (With gradient checkpointing, of notebook 02,
# the forward pass runs twice: that makes three.)
#
# ### What is in four bits, and what is not
#
# The embedding, the head and the norms stay as they were. In a small model that is a
# lot; SmolLM2 has a large vocabulary for its size.
#
# Two traps lie here, and both have hurt real users.
#
# **The share that trains is told wrongly.** bitsandbytes stores two codes in a byte,
# and its `numel()` counts bytes. Ours has its codes in buffers, where a sum over
# parameters does not look at all. Guess what a plain sum over SmolLM2 says:

# %%
lesson.predict("8.2", low=None, high=None, unit="% of the model, by the plain sum")

# %%
for kind, size in bit_costs.held(qlora.model).items():
    print(f"{kind:10} {size / 1e6:6.1f} MB")
layer = bnb.nn.Linear4bit(1536, 576, bias=False, quant_type="nf4").to("cpu")
print(f"bitsandbytes: 1536 x 576 = {1536 * 576:,}; numel() is {layer.weight.numel():,}")
plain = sum(p.numel() for p in qlora.model.parameters())
true = count(qlora.model)
print(
    f"{true.trainable:,} train, of {plain:,} by the plain sum, of {true.total:,} truly"
)
print(f"by the plain sum {true.trainable / plain:.2%}, in truth {true.share:.2%}")
lesson.measured("8.2", 100 * true.trainable / plain)

# %% [markdown]
# **"Preparing" a model can undo the saving.** PEFT's `prepare_model_for_kbit_training`
# turns everything that is not in four bits into `float32`. For the norms that is wise.
# For an embedding in sixteen bits it doubles the largest tensor that is left:

# %%
half, _ = lesson.load_model()
pfs.nf4.quantize_model(half.to(torch.bfloat16))
half.is_loaded_in_4bit = True  # what PEFT looks at
before = sum(bit_costs.held(half).values())
peft.prepare_model_for_kbit_training(half, use_gradient_checkpointing=False)
after = sum(bit_costs.held(half).values())
print(
    f"before {before / 1e6:.0f} MB, after {after / 1e6:.0f} MB: {after / before:.2f} x"
)
del half, live, qlora, lora, run

# %% [markdown]
# ## Idea two: is it the adapters' doing?
#
# The textbook says: *the quality loss is minimal, because the LoRA adapters compensate
# for the quantization error.* That is two sentences. The first can be measured by
# comparing two losses. The second, the **because**, needs an experiment of its own:
# what would have happened *without* the compensation?
#
# Here is one. Train LoRA on the full weights, where there is no error to compensate.
# Then move its $A$ and $B$, as they are, beside the four-bit weights: a **transplant**.
#
# | | trained beside | tested beside |
# |---|---|---|
# | LoRA | $W_0$ | $W_0$ |
# | transplant | $W_0$ | $W'$ |
# | QLoRA | $W'$ | $W'$ |
#
# The transplant never saw the error. If adapters compensate, it must be clearly worse
# than QLoRA:
#
# $$\text{damage} = L_{\text{transplant}} - L_{\text{LoRA}}
# \qquad
# \text{mended} = L_{\text{transplant}} - L_{\text{QLoRA}}
# \qquad
# \text{compensation} = \frac{\text{mended}}{\text{damage}}$$
#
# **Live** on `tiny`: two seeds, fewer steps than in the stored runs, one of their three
# jobs. SmolLM2 is no honest witness alone: the copy that this course uses had been in
# four bits before, so that NF4 finds little left to round. `tiny` was trained in
# `float32`. The row `bf16` is for a later page.

# %%
lesson.rule("Q4")
lesson.rule("Q4b")
lesson.predict("8.3", low=None, high=None, unit="nats of damage in the transplant")

# %%
arms = ("base", "nf4-base", "qlora-frozen", "lora-transplanted", "qlora", "qlora-bf16")
tuned, items = {}, {}
for method in arms:
    for seed in (0, 1):
        chosen = dict(base="tiny", task="gap-1", method=method, lr=1e-2, seed=seed)
        chosen = finetune.config(**chosen, steps=30, validation=20)
        tuned[method, seed], tiny_tokenizer, result = finetune.fine_tuned(chosen)
        items.setdefault(method, []).append(result["test_items"])
        if "before" in result:
            items.setdefault("lora", []).append(result["before"]["test_items"])
items = {method: np.array(rows) for method, rows in items.items()}
for method, rows in items.items():
    print(f"{method:18} test loss", *(f"{loss:.4f}" for loss in rows.mean(1)))


# %%
damaged = items["lora-transplanted"] - items["lora"]
mended = items["lora-transplanted"] - items["qlora"]
lesson.measured("8.3", damaged.mean())
lesson.live("Q4", *bit_costs.span(items["qlora"] - items["lora"]), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("Q4")

# %%
print("damage of each seed:", *(f"{row:+.4f} nats" for row in damaged.mean(1)))
lesson.live("Q4b", *intervals.share_of(mended, damaged), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("Q4b")

# %% [markdown]
# Do not trust the live intervals far: two seeds that happen to agree make a narrow one.
# The stored runs have more of them. (`python -m peft_from_scratch ledger Q4b --run`
# makes what is missing.) And look at the damage itself: where the transplant is as good
# as the LoRA that it was taken from, there is nothing that anybody could have mended.
# Then the share has no meaning, however it comes out, and the loss is small because the
# *error* does little harm. In the stored runs of `tiny` the damage is some thousandths
# of a nat, and two seeds of the *same* method lie much further apart than that.
#
# The control is a QLoRA with random adapters that never train. Its loss says what an
# adapter does that was not *trained*: harm.
#
# ### A start that does compensate
#
# Compensation can be had by design. The error $W_0 - W'$ is a matrix, known before any
# training. **LoftQ** puts as much of it into the adapter as a rank of $r$ can hold:
# notebook 04's singular values, and its words for them, do the rest.
#
# $$W_0 - W' = U S V^T \qquad
# B = \tfrac{1}{s}\,U_r\,S_r^{1/2} \qquad A = S_r^{1/2}\,V_r^T
# \qquad W' + s\,B A \approx W_0$$
#
# ### Exercise 8.2: start from what was lost
#
# Difficulty three of five, importance three of five, about ten minutes. Return $A$ and
# $B$ so that `scale * B @ A` is the best approximation of rank `r` to $W_0 - W'$. How
# the singular values are split between the two is yours to choose; the check looks at
# the product. (LoftQ itself then quantizes $W_0 - s B A$ and repeats; one round will
# do here.)
#
# <details><summary>Hint one: a question</summary>
#
# The adapter adds `scale * B @ A` to $W'$. To which matrix do you want to get, and what
# is then the sign of the difference?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `torch.linalg.svd(D, full_matrices=False)` gives `U (d_out, k)`, `s (k,)` and
# `Vt (k, d_in)`, the largest first. `A` is `(r, d_in)`, `B` is `(d_out, r)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `D = W0 - pfs.nf4.dequantize(q)`
#
# </details>


# %% tags=["exercise-8.2"]
def my_start(W0, q, r, scale):
    """(A, B), (r, d_in) and (d_out, r): scale · B A is the best rank r of W0 - W'."""
    ### BEGIN SOLUTION
    D = W0 - pfs.nf4.dequantize(q)
    U, s, Vt = torch.linalg.svd(D, full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root / scale
    ### END SOLUTION


# %% tags=["check-8.2", "points-2"]
checks.loftq_start(my_start)

# %% [markdown]
# How much can that give? As much as the error is low-rank. Guess: which share of the
# error's squared norm does a rank of eight hold, in the matrices of `tiny`?

# %%
lesson.predict("8.4", low=None, high=None, unit="% of the error's energy at rank 8")

# %%
base, _ = pfs.load_model("tiny", device="cpu")
W0s = [m.weight.detach() for m in pfs.targets.projections(base).values()]
errors = [W - pfs.nf4.dequantize(pfs.nf4.quantize(W)) for W in W0s]
noise = [spectrum.random_like(D, i) for i, D in enumerate(errors)]
at_8 = {}
for name, matrices in {"W0": W0s, "W0 - W'": errors, "random": noise}.items():
    at_8[name] = 100 * np.median([spectrum.energy(D)[7] for D in matrices])
    print(f"of {name:8} rank 8 holds {at_8[name]:4.1f} %")
lesson.measured("8.4", at_8["W0 - W'"])

# %% [markdown]
# Rounding errors look like noise, and noise fills all directions. So a thin adapter can
# take off a small part of the error and no more. Where the error is large (two or three
# bits) even that part is worth having, and this is where LoftQ's paper reports its
# gains.
#
# ## Idea three: merge, but into what?
#
# The table of the textbook has two cells for QLoRA: overhead *none (merged)*, and
# merging *yes*. A merge needs a weight to merge into, and here there are three:
#
# | onto | result | in four bits | what it computes |
# |---|---|---|---|
# | dequantized | $W' + \Delta W$ | no | exactly the model that was trained |
# | original | $W_0 + \Delta W$ | no | off by $W_0 - W'$: the adapter never saw $W_0$ |
# | requantized | NF4$(W' + \Delta W)$ | yes | off by rounding once more |
#
# The second is what one gets by loading the adapter on the usual base. Guess how far it
# is from the trained weight, in units of *what was learned*:

# %%
lesson.predict(
    "8.5", low=None, high=None, unit="% of the update's norm, onto the original"
)

# %%
split = pfs.tasks.load_task("gap-1")
rows = split.test.select(range(200))
rows = finetune.encode_rows(tiny_tokenizer, split.instruction, rows, template="raw")
trained = tuned["qlora", 0]
own = bit_costs.held(trained)
print(f"{'before':12} bytes {sum(own.values()) - own['adapters']:9,}")
costs, off = {}, {}
for onto in pfs.qlora.ONTO:
    merged = [copy.deepcopy(tuned["qlora", seed]) for seed in (0, 1)]
    found = [pfs.qlora.merge(model, onto, original=base) for model in merged]
    after = [finetune.item_losses(model, rows) for model in merged]
    costs[onto] = np.array(after) - items["qlora"]
    off[onto] = 100 * np.median([error.update for error in found[0].values()])
    print(f"{onto:12} bytes {sum(bit_costs.held(merged[0]).values()):9,},", end=" ")
    print(f"off by {off[onto]:4.1f} % of the update, loss {costs[onto].mean():+.4f}")
lesson.measured("8.5", off["original"])

# %% [markdown]
# ### Exercise 8.3: what a merge loses
#
# Difficulty two of five, importance four of five, about ten minutes. For one layer,
# compute how far the second and the third merge are from the trained weight
# $W' + \Delta W$, as a share of $\|\Delta W\|$ (`norm()` of the differences).
# Requantize as the codes `q` were made: with the defaults of `pfs.nf4.quantize`.
#
# <details><summary>Hint one: a question</summary>
#
# Beside which weight was the adapter trained? That sum is the truth here, whatever the
# model was before it was quantized.
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# All three weights are `(d_out, d_in)`, and so is the update `scale * (B @ A)`. Two
# numbers are returned.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `update = scale * (B @ A)`
#
# </details>


# %% tags=["exercise-8.3"]
def my_errors(W0, q, A, B, scale):
    """(original, requantized): ‖W - (W' + ΔW)‖ / ‖ΔW‖ of these two merges W."""
    ### BEGIN SOLUTION
    update = scale * (B @ A)
    trained = pfs.nf4.dequantize(q) + update
    again = pfs.nf4.dequantize(pfs.nf4.quantize(trained))
    merges = W0 + update, again
    return tuple(((W - trained).norm() / update.norm()).item() for W in merges)
    ### END SOLUTION


# %% tags=["check-8.3", "points-2"]
checks.merge_errors(my_errors)

# %% [markdown]
# ### On trial: claims Q5 and M4
#
# Claim Q5 is about the adapters: QLoRA's paper has $A$ and $B$ in `bfloat16`, which
# rounds away every change below `1/256` of a value. Claim M4 is about the merge.

# %%
lesson.rule("Q5")
lesson.live("Q5", *bit_costs.span(items["qlora-bf16"] - items["qlora"]), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("Q5")

# %%
lesson.rule("M4")
lesson.live("M4", *bit_costs.span(costs["requantized"]), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("M4")

# %% [markdown]
# An error of a quarter of the update sounds fatal, and here the loss
# hardly notices. The update points somewhere; the rounding error points everywhere, a
# little. What the loss says and what the norm says are two things, as with energy and
# use in notebook 04.
#
# "Merging: yes" is true, and so is "four bits"; both at once, and exactly, is not. The
# exact merge takes as many bytes as the model had before it was quantized.
#
# ### Break it on purpose
#
# Somebody trains a QLoRA, saves it, and loads it on the model that everybody uses: in
# full precision. Nothing fails. Every shape fits. Run it, and find out what the library
# has to say; then mend it in one line.


# %%
folder = TemporaryDirectory()
pfs.save(trained, folder.name)
broken, _ = pfs.load_model("tiny", device="cpu")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    pfs.load(broken, folder.name)
print(f"{len(said)} warning:", str(said[0].message).partition(folder.name)[2])

# %%
mended, _ = pfs.load_model("tiny", device="cpu")
pfs.nf4.quantize_model(mended)  # the line
pfs.load(mended, folder.name)
one = pfs.loss.batch_of(rows[:1], "cpu")["input_ids"]
with torch.no_grad():
    truth = trained(one).logits
    for name, model in {"broken": broken, "mended": mended}.items():
        gap = (model(one).logits - truth).abs().max()
        print(f"{name}: logits off by {gap:.2g}, of up to {truth.abs().max():.0f}")

# %% [markdown]
# The file itself notes how the base was quantized, so that a loader can tell. Most file
# formats do not, and then nobody is warned.
#
# ## Idea four: pages
#
# Now the second half of QLoRA's paper. The weights are small. What kills a run at night
# is a **spike**: one batch with a long row. Activations grow with the tokens of a
# batch, and the largest batch of all decides whether the run lives. Here on `tiny`,
# trained in full, where AdamW's states are twice the weights:


# %%
model, _ = pfs.load_model("tiny", device="cpu")
pfs.full.inject(model)
states = formulas.adamw_bytes(model.num_parameters(), 0)
print("tokens   forward and backward   with the states of AdamW")
for tokens in (32, 64, 128, 192):
    held = paging.learn_bytes(model, torch.randint(5, 1000, (1, tokens)))
    print(f"{tokens:6} {held / 1e6:19.1f} MB {(held + states) / 1e6:23.1f} MB")

# %% [markdown]
# The states are there all the time, and used only in the update, one after the other.
# During the spike, in the forward and backward pass, nobody needs them. So let them
# make room. **Paging** does that in small pieces:
#
# | word | what it is |
# |---|---|
# | page | all states ($m$ and $v$) of one slice of one parameter |
# | slot | room for one page in fast memory; a *budget* of bytes is a number of slots |
# | store | slow memory, with a place for every page |
# | resident | the page is in a slot |
# | fault | a page is needed that is not: it is copied in |
# | dirty | its slot holds what the store does not: it must be written back |
#
# Every operation of AdamW works number by number. So a slice can be updated while the
# others are away, and not a bit changes. Eight pages of one parameter, and four slots,
# after one step:

# %%
p = nn.Parameter(torch.randn(64))
small = pfs.PagedAdamW([p], lr=1e-2, budget_bytes=256, page_bytes=64)
with page_picture.watched(small) as moments:
    for step in range(3):
        p.grad = torch.randn(64)
        small.step()
        for row in small.page_table() if step == 0 else ():
            state = "resident, dirty" if row.dirty else "in the store"
            print(f"page {row.page}: values {row.start:2} to {row.stop - 1:2}, {state}")
figure = page_picture.picture(moments, pages=8, title="Eight pages, four slots")
said = "{0.faults} faults, {0.hits} hits, {0.write_backs} pages written back"
lesson.show(figure, said.format(small.counters))

# %% [markdown]
# Follow page zero. It comes in by a fault, is updated and so dirty, is written back
# when somebody needs its slot, and is away until the walk comes round again. Some pages
# are asked for *ahead*: on a GPU their copy runs beside the arithmetic.
#
# ### Exercise 8.4: who leaves?
#
# Difficulty two of five, importance four of five, about ten minutes. When no slot is
# free, the page that was used longest ago leaves: **LRU**, least recently used. Write
# the table: `use(page)` makes a page resident, counts a fault where it was not, and
# returns the page that had to leave, or `None`.
#
# <details><summary>Hint one: a question</summary>
#
# A page that came first may have been used a moment ago. Where must it stand in the
# list after that use?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Keep `self.resident` in the order of the last use, and never longer than
# `self.slots`. `list.remove(page)` takes a page out, `list.pop(0)` the first one.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `left = None`, then `if page in self.resident:`
#
# </details>


# %% tags=["exercise-8.4"]
class MyPages:
    """A page table: which pages are resident, and who leaves."""

    def __init__(self, slots):
        self.slots = slots
        self.resident = []  # numbers of pages
        self.faults = 0

    def use(self, page):
        """Make the page resident; return the one that had to leave, or None."""
        ### BEGIN SOLUTION
        left = None
        if page in self.resident:
            self.resident.remove(page)
        else:
            self.faults += 1
            if len(self.resident) == self.slots:
                left = self.resident.pop(0)
        self.resident.append(page)  # the one used last stands last
        return left
        ### END SOLUTION


# %% tags=["check-8.4", "points-2"]
checks.lru_pages(MyPages)

# %% [markdown]
# ### The budget as a dial
#
# A step walks over all pages, and the next step does the same. If every walk starts
# over at the first page, LRU fails completely: the page needed next is always the one
# that has just left. The cure is cheap: walk *back and forth*. Guess: with slots for
# half of the pages, which share of the uses are faults then? Beside it stands a claim
# that is easy to make: the weights are those of torch's AdamW, to the last bit, at
# every budget. The cell stops where it does not hold.

# %%
lesson.predict(
    "8.6", low=None, high=None, unit="% faults at half of the pages, back and forth"
)

# %%


def run_paged(make, steps=20):
    """(optimizer, weights) after some steps on 128 numbers."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(128))
    optimizer = make([p])
    for _ in range(steps):
        p.grad = torch.randn(128)
        optimizer.step()
    return optimizer, p.detach()


dial = {"starting over": [], "back and forth": []}
_, exact = run_paged(lambda p: torch.optim.AdamW(p, foreach=False))
for slots in (1, 2, 4, 6, 8, 10, 12, 14, 16):
    bytes_ = dict(budget_bytes=64 * slots, page_bytes=64)
    optimizer, weights = run_paged(lambda p, o=bytes_: pfs.PagedAdamW(p, **o))
    assert torch.equal(weights, exact)  # every bit, at every budget
    found = page_picture.faults(slots, [*range(16)] * 20), optimizer.counters.faults
    for rows, met in zip(dial.values(), found, strict=True):
        rows.append((100 * slots / 16, 100 * met / (16 * 20)))

# %%
figure = curves.lines(
    dial,
    x="Budget, % of the states",
    y="Faults, % of the uses",
    title="Faults against the budget: LRU on two walks",
    subtitle="Sixteen pages, twenty steps. What is left at 100 % are the first uses.",
    control=("starting over",),
    names="foot",
)
half = [dict(rows)[50] for rows in dial.values()]
said = "Faults at half of the pages: starting over {:.0f} %, back and forth {:.0f} %"
lesson.show(figure, said.format(*half))
lesson.measured("8.6", half[1])

# %% [markdown]
# ### Exercise 8.5: AdamW, one page at a time
#
# Difficulty four of five, importance four of five, about twenty minutes. Write a pager
# with a single slot, and the update of one page. AdamW, for step number $t$ (the step
# of the *parameter*, the same for all of its pages):
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\,g \qquad
# v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2 \qquad
# p \leftarrow (1 - \eta\lambda)\,p
# - \eta\,\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}$$
#
# ($\eta$ is `lr`, $\lambda$ is `decay`.) `store.read(page)` gives a copy of a page,
# `store.write(page, states)` puts one back; both are counted. The check compares the
# weights with torch's AdamW, and the copies with what is needed: a page that stays is
# not read again, a clean one is not written.
#
# <details><summary>Hint one: a question</summary>
#
# When does the slot hold something that the store does not? And which page's place does
# that belong to, when another one is coming?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `self.states` is `(2, n)`; `m, v = self.states` gives two views, `(n,)` each. Change
# them in place, by `mul_` and `add_`, and `p` too.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# Of `bring`: `if page != self.page:`; of `update`: `m, v = self.states`.
#
# </details>


# %% tags=["exercise-8.5"]
class MyPager:
    """One slot, in which m and v of one page stand: self.states (2, n)."""

    def __init__(self, store):
        self.store, self.page, self.states, self.dirty = store, None, None, False

    def bring(self, page):
        """Put the page into the slot; the old one goes back only if it must."""
        ### BEGIN SOLUTION
        if page != self.page:
            if self.dirty:
                self.store.write(self.page, self.states)
            self.page, self.states, self.dirty = page, self.store.read(page), False
        ### END SOLUTION

    def update(self, p, g, t, lr, beta1, beta2, eps, decay):
        """Step t of AdamW on the slice p (n,), in place; its page is in the slot."""
        ### BEGIN SOLUTION
        m, v = self.states
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g**2)
        p *= 1 - lr * decay
        p -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        self.dirty = True
        ### END SOLUTION


# %% tags=["check-8.5", "points-3"]
checks.paged_adamw(MyPager)

# %% [markdown]
# ### On trial: claim P1
#
# *Paged attention moves optimizer states to the CPU, and so absorbs the memory spikes
# of long sequences.* The experiment: two runs on the same sequences, some long ones
# among them. One has torch's AdamW. The other has the library's `PagedAdamW`, which is
# your two classes put together, with more slots. It *lends* the bytes of the
# spike while a long sequence is in the model: `with optimizer.lent(bytes)`. Guess which
# share of the spike is gone then.

# %%
lesson.rule("P1")
lesson.predict("8.7", low=None, high=None, unit="% of the spike")

# %%
chosen = paging.config("tiny", "within the states", seed=0)
one_run = runs.Run("live", chosen, paging.compute(chosen), {})
held, names = one_run.result["held"], {"adamw": "AdamW", "paged": "paged, lending"}
held = {names[key]: [size / 1e6 for size in sizes] for key, sizes in held.items()}
figure = curves.lines(
    {name: list(enumerate(sizes, 1))[1:] for name, sizes in held.items()},
    x="Step, count",
    y="Most bytes at one moment, MB",
    title="Full fine-tuning of tiny: long sequences among short ones",
    subtitle="{order}, from step 2: s {short} tokens, L {long}".format(**chosen),
    control=("AdamW",),
    names="foot",
)
said = "AdamW holds {:.1f} MB at most, the paged one {:.1f} MB; the same bits: {}"
lesson.show(figure, said.format(*map(max, held.values()), one_run.result["equal"]))
share = paging.absorbed(one_run)
lesson.measured("8.7", share)
lesson.live("P1", share, share, share, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("P1")

# %% [markdown]
# The bits are the same, whatever was lent when: a
# budget changes where the states *are*, never what they say.
#
# **The name.** The chapter says "paged attention". It is an easy slip: both ideas take
# their pages from operating systems, and came out within four months of each other. But
# **PagedAttention** is a method of a serving engine, vLLM, for the keys and values of
# many requests; it has nothing to do with training. What QLoRA has are **paged
# optimizers**.
#
# **Paging is not offloading.** To offload is to decide once that the states live in the
# host's memory; every step then pays for the trip, or computes the update there. To
# page is to let them live on the device as long as there is room: without a spike the
# price is nearly nothing, and with one it is some copies.
#
# **Larger than memory.** The store here is a file that is mapped into memory. The
# system keeps as much of it as it can spare. With a limit on the process's own memory
# in which half of the states would fit, torch's AdamW dies, and this one finishes with
# the same bits. It takes three processes and some seconds, so it is a script:
# `python benchmarks/beyond_memory.py` (Linux).
#
# ## On trial: claim Q6
#
# *QLoRA fine-tunes a model of 65B numbers on a single GPU of 48 GB.* Nobody here has
# one. But bytes can be counted without any: on torch's device `meta`, a tensor has a
# shape and no memory. Which sequence length would still fit?

#
# Counting eighty layers takes minutes. All layers are alike, so we count two lower
# stacks and go on along the line. (The stored run counts all of them, at every length
# that it tries.)

# %%
lesson.rule("Q6")
lesson.predict("8.8", low=None, high=None, unit="tokens at most")


# %%
def bill_of(layers, tokens):
    shape = one_gpu.SHAPES["Llama-65B"] | {"num_hidden_layers": layers}
    fixed, moving = one_gpu.bill(LlamaConfig(**shape), one_gpu.config())
    return np.array([*fixed.values(), moving(tokens)]) / 1e9


bills = {}
for tokens in (2048, 4096):
    low, high = bill_of(8, tokens), bill_of(12, tokens)
    bills[tokens] = high + (80 - 12) / (12 - 8) * (high - low)
    parts = " + ".join(f"{part:.1f}" for part in bills[tokens])
    print(f"{tokens} tokens: {parts} = {bills[tokens].sum():.1f} GB")
slope = (bills[4096].sum() - bills[2048].sum()) / 2048
fits = int(2048 + (one_gpu.GPU / 1e9 - bills[2048].sum()) / slope)
print(f"with the states paged out: {fits + bills[2048][3] / slope:,.0f} tokens")
lesson.measured("8.8", fits)
lesson.live("Q6", fits, fits, fits)

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("Q6")

# %% [markdown]
# The five numbers are the weights, the buffer for one $W'$, the adapters, their AdamW
# states, and what comes and goes in a step. The weights take most of it, and the
# tokens get what is left. What paging can give is the fourth number: in tokens it is as
# much again and more.
#
# ## Now with the library
#
# Our four-bit model is written in the layout of bitsandbytes, and our adapter in that
# of PEFT. transformers reads the one, PEFT puts the other on it; then every logit is
# compared. (On a CPU that has the instructions for it, bitsandbytes computes in
# `bfloat16`. We tell it not to, so that the comparison is one of bits, not of digits.)

# %%
pfs.remove(mended)  # what is left is the model in four bits
with TemporaryDirectory() as quantized, quiet_transformers():
    pfs.nf4.save(mended, quantized)
    theirs = AutoModelForCausalLM.from_pretrained(quantized)
for module in theirs.modules():
    module.support_avx512bf16_for_cpu = False
theirs = peft.PeftModel.from_pretrained(theirs, folder.name)
with torch.no_grad():
    gap = (theirs(one).logits - truth).abs().max()
print(f"the largest difference of a logit: {gap:.1g}")
assert gap < 1e-3

# %% [markdown]
# Their paged optimizer is `bnb.optim.PagedAdamW`. It asks the CUDA driver for memory
# that moves by itself between GPU and host. On a CPU it warns and is not paged, so
# there is nothing to compare here.
#
# ## Quiz
#
# Answer for yourself, then open the options. None needs the kernel.
#
# **1. What does QLoRA update in a step?**
#
# <details><summary>The four-bit codes, by rounding the new weight</summary>
#
# No. The codes never change. A step is far smaller than the gap between two of the
# sixteen values, so rounding would undo it.
#
# </details>
# <details><summary>$A$ and $B$, and nothing else</summary>
#
# Right. The gradient passes through $W'$ on its way down, and stops at nothing but the
# adapters.
#
# </details>
# <details><summary>$A$, $B$ and the constants of the blocks</summary>
#
# No. The constants are frozen too. There are methods that train them; this is not one.
#
# </details>
#
# **2. A QLoRA step is slower than a LoRA step on the same machine. Why?**
#
# <details><summary>Arithmetic in four bits is slow</summary>
#
# No. There is no arithmetic in four bits: the products have the usual precision.
#
# </details>
# <details><summary>Each weight is dequantized for each product</summary>
#
# Right. You counted it: once forward, once backward, whatever the batch.
#
# </details>
# <details><summary>The gradients of the codes must be computed</summary>
#
# No. There are none.
#
# </details>
#
# **3. The transplant is as good as QLoRA. What follows?**
#
# <details><summary>The adapters compensated well</summary>
#
# No. The transplanted adapter never saw the error, so it cannot have learned it.
#
# </details>
# <details><summary>Here there was nothing to compensate</summary>
#
# Right. The loss was small because the error did little harm. At fewer bits it may be
# otherwise.
#
# </details>
# <details><summary>Quantization has no effect at all</summary>
#
# No. The weights changed by some percent, and the logits too. It did not matter *for
# this loss*.
#
# </details>
#
# **4. (From notebook 07.) What does double quantization have to do with backward?**
#
# <details><summary>Nothing: it makes the constants smaller</summary>
#
# Right. The gradient passes through the dequantized weight, whichever way the constants
# were stored.
#
# </details>
# <details><summary>It makes the codes differentiable</summary>
#
# No. Nothing does; they need not be.
#
# </details>
# <details><summary>It quantizes the gradients as well</summary>
#
# No. Gradients have the precision of the activations.
#
# </details>
#
# **5. (From notebook 06.) An unmerged LoRA and a merged one differ a little in
# `bfloat16`. A QLoRA merged onto its *dequantized* base in `float32`?**
#
# <details><summary>Differs by the quantization error</summary>
#
# No. That error is in both: it was there while training.
#
# </details>
# <details><summary>Differs by rounding of `float32` alone</summary>
#
# Right. It is the model that was trained, in a format nearly eight times as large.
#
# </details>
# <details><summary>Cannot be done: codes cannot be added to</summary>
#
# No. Codes cannot, but what they stand for can.
#
# </details>
#
# ### In your own words
#
# A colleague says: "QLoRA merges into the four-bit model, so I get a small *and* fast
# model for free." Answer in three sentences, with what you measured.
#
# <details><summary>A model answer</summary>
#
# "The merge that is exact leaves four bits, and takes as many bytes as the model had in
# the beginning. You can quantize once more; the weights are then off by a good part of
# what was learned, although the loss on our test rows hardly moved, so measure it on
# yours. And four bits are not fast by themselves: every product dequantizes first."
#
# </details>
#
# ### Transfer
#
# The *gradients* are needed only between backward and update. Could they be paged too?
# What would a page be, who would use it when, and what would a walk of backward and
# update look like?
#
# <details><summary>A model answer</summary>
#
# A page would be the gradient of one slice of a parameter. Backward makes them from the
# last layer to the first, each one once; the update then uses each one once. So let the
# update walk from the first layer to the last: the gradients made last, which are still
# resident, are used first. Better still is not to store them: update each parameter as
# soon as its gradient is there, and drop it. (PyTorch has a hook for that; but then the
# norm of *all* gradients cannot be clipped.)
#
# </details>
#
# ## Limits
#
# - **What the transplant rules out.** That a small loss beside four bits proves
#   compensation. It does not rule out compensation where the error is large.
# - **The scale.** `tiny` has one million numbers, SmolLM2 `135` million, and the jobs
#   are short. QLoRA's paper compares at up to `65` billion.
# - **Speed.** A CPU dequantizes by looking up bytes. A GPU does it inside of the
#   product's kernel, and other ratios hold there.
# - **The store.** A file on this machine is fast. Between GPU and host there is a bus,
#   and what a fault costs depends on it. Bits and counts carry over, seconds do not.
# - **Q6 is counted, not run.** What no tensor holds is left out: the context of CUDA,
#   workspaces, and gaps between tensors.
# - **The papers beside us** (their numbers, not ours). QLoRA's paper reports that
#   four-bit NF4 with double quantization matches sixteen-bit LoRA on a test of
#   knowledge, within half a point on average. LoftQ's reports its largest gains at two
#   bits.
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
# - Dettmers and others, [QLoRA](https://arxiv.org/abs/2305.14314): section three is
#   this notebook in three pages.
# - Li and others, [LoftQ](https://arxiv.org/abs/2310.08659): the start of exercise 8.2,
#   in rounds.
# - Kwon and others, [PagedAttention](https://arxiv.org/abs/2309.06180): pages, but for
#   keys and values.
# - Loshchilov and Hutter, [Decoupled weight decay
#   regularization](https://arxiv.org/abs/1711.05101): AdamW.
# - The wrong base, as users met it: [PEFT issue
#   2321](https://github.com/huggingface/peft/issues/2321); the share that lies: [QLoRA
#   issue 260](https://github.com/artidoro/qlora/issues/260).
