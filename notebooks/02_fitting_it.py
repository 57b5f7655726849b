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
# # Fitting it: checkpointing, accumulation, ZeRO
#
# **A training step has to fit at its worst moment. Each remedy shortens one row of the
# bill: chunks the logits, checkpointing the activations, ZeRO the rest. A remedy for
# another moment saves nothing.**
#
# **You need** notebook 01: AdamW, mixed precision, and the memory bill, a table whose
# rows say what takes how many bytes.
#
# **At the end you can**
#
# - name the moment at which a step needs most memory, and what is there;
# - compute a loss without holding all logits at once;
# - write gradient checkpointing, and say what it costs;
# - accumulate gradients with the right divisor;
# - take a step of ZeRO, and compute what each rank keeps;
# - choose the one change that makes a step fit.
#
# **Only ten minutes?** Write `start("02", quick=True)` below and run all cells. Read
# "The result first", "Idea one", and the cards of claims F2 and F3.

# %%
from peft_from_scratch.course import start

lesson = start("02")

# %%
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils import checkpoint as torchs

import peft_from_scratch as pfs  # the course's library
from peft_from_scratch.course import Setup, budget, changes, curves, fitting_pictures
from peft_from_scratch.course import meter, read_config, recomputing, runs, summed_loss
from peft_from_scratch.course import step_picture, summed_loss_in_chunks, zero_ranks
from peft_from_scratch.course.checks import fitting_it as checks

# %% [markdown]
# ## The result first
#
# Out of memory is the error that ends most first attempts at fine-tuning. To mend it,
# you need to know *when* memory runs out. We train a LoRA of rank `16` on SmolLM2, on
# one row of `256` tokens, in `float32`. The weights take `0.54` GB.
#
# The project's command `budget` predicts the bytes of a step from the model's
# configuration, before any weight is loaded. The next cells let it predict, and then
# follow every tensor of the real step. Guess first: how high is the peak?

# %%
lesson.predict("2.1", low=None, high=None, unit="GB at the peak")

# %%
config = read_config(lesson.base)
setup = Setup(method="lora", dtype="float32", length=256, options={"r": 16})
levels = step_picture.predicted(budget.bill(config, setup).moments)
model, _ = lesson.load_model()
torch.manual_seed(0)
pfs.lora.inject(model, r=16, alpha=32)
seen = step_picture.followed(model, summed_loss, length=256)

# %%
figure = step_picture.over_time(
    seen,
    levels,
    title="The step needs most memory for a moment: in its loss",
    subtitle=f"LoRA on {lesson.base}, one row of 256 tokens. Dashed: predicted.",
)
peaks = seen.peaks()
at = max(peaks, key=peaks.get)
most = peaks[at] / 1e9
lesson.show(figure, f"The peak is {most:.2f} GB, in the moment {at!r}.")
print(step_picture.table(seen, levels))
lesson.measured("2.1", most)
off = max(abs(levels[name] / peaks[name] - 1) for name in ("forward", "loss"))
lesson.control("Forward and loss are predicted to 5 %.", off < 0.05)

# %% [markdown]
# The peak is a spike in the loss. It is gone a moment later, but the step has to fit
# all the same. The prediction is right to a percent.
#
# ## Idea one: the peak is one moment
#
# Parts of the bill are there at different times. When the gradients are complete, the
# activations are gone. So the **peak** is the largest sum at one moment, and less than
# the sum of all parts:
#
# $$\text{peak} = \max_{\text{moment}}\ \sum_{\text{part}} \text{bytes}
# (\text{part}, \text{moment})$$
#
# For example, a step has 5 of weights and 2 of states all the time, 9 of activations in
# forward, and 6 of temporaries in the update. Its peak is 16, and not 22.
#
# What is the spike? After the last layer, each token becomes one score for every word
# of the vocabulary: the **logits**. The loss works in `float32`. From the logits it
# computes the logarithms of the probabilities, and can then forget the logits. At its
# worst moment three tables of that size are there: these logarithms, the gradient with
# respect to them, and the gradient with respect to the logits. With $T$ label tokens
# and a vocabulary of $V$:
#
# $$\text{logits} = 3 \cdot 4 \cdot T \cdot V\ \text{bytes}$$

# %%
T, V = 255, config.vocab_size  # the first token has no label
kept = peaks["forward"] - seen.total[0]
print(f"logits: 12 x {T} x {V:,} = {12 * T * V / 1e6:.0f} MB, for one short row")
print(f"all that the layers keep of that row: {kept / 1e6:.0f} MB")

# %% [markdown]
# ### Exercise 2.1: the peak
#
# A warm-up. Difficulty one of five, importance four of five, about two minutes. Write
# `my_peak`. `moments` is a dictionary `{moment: {part: bytes}}` of whole numbers, not
# empty. Return the name of the moment with the largest sum, and that sum. Of equal
# moments, the first one counts.
#
# Example: `{"forward": {"a": 5, "b": 9}, "update": {"a": 8, "c": 7}}` gives
# `("update", 15)`.
#
# <details><summary>Hint one: a question</summary>
#
# What do you add up before you compare?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The result is a pair: a text and a whole number.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `sums = {name: sum(parts.values()) for name, parts in moments.items()}`
#
# </details>


# %% tags=["exercise-2.1"]
def my_peak(moments):
    """(name, bytes) of the largest moment of {moment: {part: bytes}}."""
    ### BEGIN SOLUTION
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    name = max(sums, key=sums.get)
    return name, sums[name]
    ### END SOLUTION


# %% tags=["check-2.1", "points-1"]
checks.largest_moment(my_peak)

# %% [markdown]
# What would remedies save? The next cell predicts the peak with each of them alone.
# Guess what both save together of all that the step adds to weights, adapters and
# states. We measure it below, once both are built.

# %%
lesson.predict("2.2", low=None, high=None, unit="% of what the step adds")
peak_of = lesson.mine(my_peak, checks.our_peak)
remedies = {"as it is": {}, "the loss in chunks": {"chunk": 64}}
remedies["checkpointing"] = {"checkpointing": True}
for words, more in remedies.items():
    moment, most = peak_of(budget.bill(config, replace(setup, **more)).moments)
    print(f"{words:20} predicted peak {most / 1e9:.2f} GB, in {moment!r}")

# %% [markdown]
# ## Idea two: the loss in chunks
#
# Each token's loss needs its own row of logits only. So take a **chunk** of tokens,
# compute its logits, its loss and its gradient, and forget the logits before the next
# chunk comes. What stays is the gradient with respect to the hidden states $H$, which
# are $d$ wide and not $V$:
#
# $$\ell = \sum_{\text{chunks}} \ell_c(H_c)
# \qquad
# \frac{\partial \ell}{\partial H_c} = \frac{\partial \ell_c}{\partial H_c}$$


# %%
def loss_in_chunks(H, head, y, chunk):
    """(summed loss, its gradient by H); logits of `chunk` tokens at a time."""
    total, dH = 0.0, torch.empty_like(H)
    for i in range(0, len(H), chunk):
        h = H[i : i + chunk].detach().requires_grad_()  # (chunk, d)
        loss = F.cross_entropy(head(h), y[i : i + chunk], reduction="sum")
        dH[i : i + chunk] = torch.autograd.grad(loss, h)[0]
        total += loss.item()
    return total, dH


head, y = model.get_output_embeddings(), torch.randint(V, (T,))
H = torch.randn(T, config.hidden_size, requires_grad=True)
whole = F.cross_entropy(head(H), y, reduction="sum")
(right,) = torch.autograd.grad(whole, H)
total, dH = loss_in_chunks(H.detach(), head, y, chunk=64)
off = max(abs(total / whole.item() - 1), ((dH - right).norm() / right.norm()).item())
lesson.control("Chunks give the same loss and gradient.", off < 1e-5)

# %% [markdown]
# Nothing is computed twice, so chunks should cost next to no time. The library's
# `summed_loss_in_chunks` does the same for a whole model, also where the head trains.
#
# ## Idea three: compute it again
#
# Backward needs what forward computed on the way. **Gradient checkpointing** keeps only
# each layer's input. In backward, it runs the layer once more, right before that
# layer's gradients are due.

# %%
lesson.show(
    fitting_pictures.kept_by_layers(6),
    "Without checkpointing, activations pile up layer by layer. With it, inputs do, "
    "and one layer's activations are there at a time.",
)

# %% [markdown]
# With $L$ layers, $k$ bytes that a layer keeps, and $i$ bytes of its input:
#
# | | bytes | FLOPs per token, full fine-tuning | LoRA |
# |---|---|---|---|
# | without | $L\,k$ | $2P + 4P = 6P$ | $2P + 2P = 4P$ |
# | checkpointed | $L\,i + k$ | $6P + 2P = 8P$ | $4P + 2P = 6P$ |
#
# $P$ is the number of parameters, and a **FLOP** is one addition or multiplication of
# two numbers. A forward pass takes $2P$ FLOPs per token. Backward
# takes as many for the gradient of the inputs, and as many again for the gradient of
# the weights, which LoRA leaves out for the frozen ones. So one more forward makes a
# step `1.33` times as long, or `1.5` times with LoRA. For example, with 4 layers,
# $k = 10$ and $i = 1$, the bytes fall from `40` to `14`.
#
# In torch, a function with a backward of its own is a `torch.autograd.Function`. What
# `forward` of such a function computes is not recorded. A dozen lines are enough:


# %%
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, x):
        ctx.f = f
        ctx.save_for_backward(x)  # the input, and nothing else
        return f(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.f(x)  # once more, and recorded this time
        torch.autograd.backward(y, dy)  # leaves gradients at f's parameters
        return None, x.grad  # for f, for x


# %% [markdown]
# ### Two real bugs
#
# Each decoder layer of transformers has an attribute for such a function. The next
# cells set it in `tiny`, our model of one million parameters, with a LoRA that has
# dropout. They compare its gradients with those of the same model without
# checkpointing.


# %%
def checkpoint_layers(model, recompute):
    """Run every decoder layer as recompute(layer, x); None: as usual."""
    for layer in model.get_decoder().layers:
        layer.gradient_checkpointing = recompute is not None
        layer._gradient_checkpointing_func = recompute


def gradients(model):
    """All gradients in one row, of a step that draws the same random numbers."""
    torch.manual_seed(0)
    summed_loss(model, step_picture.tokens(model, 64)).backward()
    own = [p for p in model.parameters() if p.requires_grad]
    row = torch.cat([p.grad.flatten() for p in own])
    model.zero_grad()
    return row


# %%
small, _ = pfs.load_model("tiny", device="cpu")
torch.manual_seed(0)
pfs.lora.inject(small, r=8, alpha=16, dropout=0.1)
small.train()
right = gradients(small)
checkpoint_layers(small, Again.apply)
try:
    gradients(small)
except RuntimeError as error:
    print("first bug: ", str(error)[:66])
small.enable_input_require_grads()  # the embedding's output needs a gradient now
off = ((gradients(small) - right).norm() / right.norm()).item()
print(f"second bug: the gradients are off by {100 * off:.0f} % of their norm")
small.disable_input_require_grads()
checkpoint_layers(small, None)

# %% [markdown]
# The first bug is loud. autograd looks only at the arguments of `apply`. The embedding
# is frozen, so the first layer's input needs no gradient. The result is then taken for
# a constant, although the adapters in the layer need gradients. The workaround in the
# cell makes the embedding's output need a gradient.
#
# The second bug is silent: the gradients are off by 15 %. **Dropout** sets random
# values to zero. When the layer runs again, it draws *other* random numbers. The
# gradients then belong to another function than the loss.
#
# ### Exercise 2.2: checkpointing
#
# Difficulty four of five, importance five of five, about twenty-five minutes. Write
# `my_checkpoint(f, x)`, which returns `f(x)` and has neither bug.
#
# - `x` is a floating-point tensor of any shape, which may or may not need a gradient.
#   `f` takes one tensor, returns one, and may have parameters and draw random numbers.
# - `f` runs once in forward and once in backward. Values and gradients, of `x` and of
#   parameters, are those of `f(x)`.
# - From forward on, only `x` and the state of torch's random generator are kept.
# - The result needs a gradient even where `x` needs none.
# - Other code that draws random numbers, before or after backward, gets the same ones
#   as without your function.
#
# `torch.get_rng_state()` gives the generator's state, and `torch.set_rng_state(state)`
# sets it. Example: for `x = torch.tensor([2.0], requires_grad=True)` and `f` the
# square, the result is `4`, and `backward()` leaves `4` in `x.grad`.
#
# <details><summary>Hint one: a question</summary>
#
# When must you note the generator's state, when must you set it, and which state has to
# stand there when backward goes on?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `apply` can take a second tensor that needs a gradient, of shape `(0,)`. `backward`
# then returns two values, of which the second one is `None`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# Begin with `class Again(torch.autograd.Function):` inside of your function, and let
# `f` come from outside of it.
#
# </details>


# %% tags=["exercise-2.2"]
def my_checkpoint(f, x):
    """f(x), of which only x and the random state are kept for backward."""

    ### BEGIN SOLUTION
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, needed):
            ctx.save_for_backward(x)
            ctx.random = torch.get_rng_state()
            return f(x)

        @staticmethod
        def backward(ctx, dy):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            now = torch.get_rng_state()
            torch.set_rng_state(ctx.random)
            with torch.enable_grad():
                y = f(x)
            torch.set_rng_state(now)
            torch.autograd.backward(y, dy)
            return x.grad, None

    return Again.apply(x, torch.empty(0, requires_grad=True))
    ### END SOLUTION


# %% tags=["check-2.2", "points-5"]
checks.recomputed(my_checkpoint)

# %% [markdown]
# ### Beside torch's and transformers' own
#
# `torch.utils.checkpoint` has the same function, and transformers uses it where you
# write `model.gradient_checkpointing_enable()`. All ways are compared on the LoRA with
# dropout.

# %%
recompute = lesson.mine(my_checkpoint, checks.our_checkpoint)
theirs = partial(torchs.checkpoint, use_reentrant=False)
for name, way in (("without", None), ("yours", recompute), ("torch's", theirs)):
    checkpoint_layers(small, way)
    off = ((gradients(small) - right).norm() / right.norm()).item()
    used = meter.measure_step(small, lambda: gradients(small)).activations
    print(f"{name:10} gradients off by {off:.0e}, activations {used / 1e6:.2f} MB")
    lesson.control(f"Gradients are right ({name}).", off < 1e-5)
checkpoint_layers(small, None)

# %% [markdown]
# The gradients are the same to the bit, with 1.48 MB of activations in place of 5.08.
#
# Now both remedies together, on SmolLM2: your checkpoint around its layers, and the
# library's loss in chunks.

# %%
checkpoint_layers(model, recompute)
in_chunks = partial(summed_loss_in_chunks, chunk=64)
less = step_picture.followed(model, in_chunks, length=256)
both = replace(setup, chunk=64, checkpointing=True)
figure = step_picture.over_time(
    less,
    step_picture.predicted(budget.bill(config, both).moments),
    title="With chunks and checkpointing, little is left besides the weights",
    subtitle=f"The same step of {lesson.base}. Dashed: predicted.",
    top=1.2 * max(peaks.values()),
)
top, base = max(less.peaks().values()), seen.total[0]
saved = 100 * (1 - (top - base) / (max(peaks.values()) - base))
lesson.show(
    figure, f"The peak is {top / 1e9:.2f} GB: {saved:.0f} % of what it added is gone."
)
lesson.measured("2.2", saved)
del model, head

# %% [markdown]
# ### What it costs
#
# The table says `1.33` times the time for full fine-tuning and `1.5` times for LoRA.
# Predict the measured ratio for LoRA on SmolLM2. The control is the step without
# checkpointing, timed again.

# %%
lesson.predict("2.3", low=None, high=None, unit="times as long, LoRA on SmolLM2")

# %%
timed = runs.select(experiment="recomputing", base="smollm2", length=128)
timed = {run.config["method"]: run.result for run in timed if "method" in run.config}
timed["LoRA on tiny, here"] = {"seconds": recomputing.timed(small, 256, rounds=9)}
for name, result in timed.items():
    own = recomputing.slower(result["seconds"])
    again = recomputing.slower(result["seconds"], recomputing.AGAIN)
    print("{:19}{:.2f} [{:.2f}, {:.2f}] times as long".format(name, *own), end="")
    print(f"; without, again: {again[0]:.2f}")
lesson.measured("2.3", recomputing.slower(timed["lora"]["seconds"])[0])

# %% [markdown]
# SmolLM2 takes 1.31 times as long in full fine-tuning and 1.41 times with LoRA. That is
# a little less than the arithmetic says. One reason: a fifth of its parameters are the
# head, which comes after the layers and is not computed again.
#
# ## On trial: claim F2
#
# The textbook gives full fine-tuning of a 7B model `112` GB and says: *gradient
# checkpointing can reduce this*. Those GB are weights, gradients and states. No
# activation is among them.
#
# So the rule asks for something that can come out either way: at which length does the
# saving reach a tenth of the step's peak? The answer is an interval between two tested
# lengths, the last one below a tenth and the next one. The trial is **void** (it
# decides nothing) if checkpointing changes a gradient, or the bytes of weights,
# gradients or states.

# %%
lesson.rule("F2")
lesson.predict("2.4", low=None, high=None, unit="tokens, on SmolLM2")

# %%
asked = [c for c in recomputing.configs("tiny") if c.get("layers", 0) is None]
here = [recomputing.compute(each) for each in asked]
same = max(map(recomputing.bill_change, here)) < 0.1
same = same and max(each["gap"] for each in here) < 1e-6
lesson.control("The three rows of the bill and the gradients are the same.", same)
yours = [(c["length"], recomputing.saved(r)) for c, r in zip(asked, here, strict=True)]
value, low, high = recomputing.threshold(yours)

# %%
series = {}
for name in ("tiny", "smollm2"):
    rows = runs.select(experiment="recomputing", base=name, layers=None)
    points = [(run.config["length"], recomputing.saved(run.result)) for run in rows]
    series[name] = sorted(points)
series["tiny, you"] = yours
lesson.measured("2.4", recomputing.threshold(series["smollm2"])[0])
for layers in recomputing.DEPTHS["tiny"]:
    (run,) = runs.select(experiment="recomputing", base="tiny", layers=layers)
    sizes = [
        run.result[way]["activations"] / 1e6 for way in ("without", "checkpointed")
    ]
    print("{:2} layers: {:4.1f} MB, checkpointed {:.1f}".format(layers, *sizes))
figure = curves.lines(
    series,
    x="Tokens of a step, count (logarithmic)",
    y="Saved of the step's peak, %",
    title="Checkpointing saves much of the peak only where there are many tokens",
    subtitle="Full fine-tuning in mixed precision, one row, every layer checkpointed.",
    log="x",
    names="foot",
)
said = ", ".join(f"{name} {rows[-1][1]:.0f} %" for name, rows in series.items())
lesson.show(figure, f"Saved at the longest row: {said}.")

# %%
lesson.live("F2", value, low, high, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("F2", guess="2.4")

# %% [markdown]
# In short steps the peak is in the update, where AdamW has temporaries of its own and
# no activation is left. There, checkpointing saves nothing. On `1,024` tokens it saves
# 22 % of SmolLM2's peak. The deeper the model, the more it is worth: from 4 to 32
# layers, activations grow from 9.7 to 54.0 MB, and checkpointed from 3.7 to 5.5.
#
# On `tiny`, the verdict is undecided: the saving reaches a tenth between 64 and 128
# tokens, or just above, and 64 is the rule's limit. In no run did checkpointing change
# a row of the 112 GB.
#
# ## Idea four: fewer rows at a time
#
# **Gradient accumulation** divides the rows of an optimizer step into
# **micro-batches**, takes one after the other, and adds up the gradients. Only one
# micro-batch's activations and logits are there at a time. It costs no arithmetic. But
# the divisor must be the number $T$ of label tokens in the *whole* optimizer step, as
# notebook 01 showed for the loss:
#
# $$g = \frac{1}{T} \sum_{\text{micro-batches}}\ \sum_{\text{label tokens}}
# \nabla\,\text{loss}$$
#
# For example, one micro-batch has a single label token of gradient 4, the other has
# three of gradient 0. The right mean is $4 / 4 = 1$. A mean of the two means gives 2.
# The next cell shows what that does to the gradient of `tiny`.

# %%
plain, _ = pfs.load_model("tiny", device="cpu")
pfs.full.inject(plain)
torch.manual_seed(0)
ids, answers = torch.randint(3, 1000, (4, 64)), torch.tensor([[4], [8], [30], [60]])
labels = ids.where(torch.arange(64) >= 64 - answers, -100)
whole = {"input_ids": ids, "labels": labels}
parts = [{"input_ids": ids[[i]], "labels": labels[[i]]} for i in range(4)]
own = [pfs.loss.label_tokens(part) for part in parts]
T = sum(own)


def gradient_of(losses):
    """What these losses leave at the parameters of `plain`, in one row."""
    for loss in losses:
        loss.backward()
    row = torch.cat([p.grad.flatten() for p in plain.parameters()])
    plain.zero_grad()
    return row


# %%
steps = {
    "all at once": lambda: [summed_loss(plain, whole) / T],
    "one by one, divided by T": lambda: (summed_loss(plain, p) / T for p in parts),
    "one by one, mean of means": lambda: (
        summed_loss(plain, p) / n / 4 for p, n in zip(parts, own, strict=True)
    ),
}
right, off = gradient_of(steps["all at once"]()), {}
for name, losses in steps.items():
    off[name] = ((gradient_of(losses()) - right).norm() / right.norm()).item()
    used = meter.measure_step(plain, lambda f=losses: gradient_of(f())).activations
    print(f"{name:25} off by {100 * off[name]:4.1f} %, activations {used / 1e6:.1f} MB")
lesson.control("Divided by T, they add up.", off["one by one, divided by T"] < 1e-4)

# %% [markdown]
# Divided by $T$, they add up to the gradient of the whole, with 3.9 MB of
# activations in place of 13.1. The mean of means is off by 48.3 % of the gradient's
# norm, and no error is raised.
#
# ## Idea five: ZeRO, a part for each rank
#
# Several GPUs often train one model in **data parallel**: each process, called a
# **rank**, reads rows of its own, and all average their gradients. Each then holds the
# same weights, gradients and states. **ZeRO**, the zero redundancy optimizer, leaves
# these copies out, in three stages.

# %%
lesson.show(
    fitting_pictures.stages(4),
    "On four ranks, stage 1 leaves 7 of 16 bytes a parameter, stage 2 leaves 5.5, and "
    "stage 3 leaves 4.",
)

# %% [markdown]
# With $P$ parameters, $N$ ranks, and mixed precision (`2 + 2 + 12` bytes):
#
# | stage | cut | bytes per rank | sent by a rank in a step |
# |---|---|---|---|
# | none | nothing | $16 P$ | $2 \cdot 2 P\,(N-1)/N$ |
# | 1 | states | $4 P + 12 P / N$ | the same |
# | 2 | gradients, too | $2 P + 14 P / N$ | the same |
# | 3 | weights, too | $16 P / N$ | about $3 \cdot 2 P\,(N-1)/N$ |
#
# For example, $P = 7 \cdot 10^9$ and $N = 8$ make `112` GB, then `38.5`, `26.25` and
# `14` GB. Activations are not cut: they belong to a rank's own rows.
#
# A step of stage 2 has three parts. Every tensor is cut into $N$ parts of
# $n = \lceil P / N \rceil$ values, and rank $r$ looks after part $r$.
#
# 1. **Reduce-scatter**: rank $r$ gets the sum of all ranks' gradients of part $r$.
# 2. Rank $r$ updates part $r$ of the weights.
# 3. **All-gather**: every rank gets all new parts.
#
# The ranks stand in a ring. In each **hop**, every rank sends one part to the next rank
# and receives one from the rank before. Reduce-scatter takes $N - 1$ hops: in hop
# $h = 1, 2, \dots$, rank $r$ sends part $r - h$ and adds what comes to part $r - h - 1$
# (both modulo $N$). All-gather takes $N - 1$ hops, too: in hop $h = 0, 1, \dots$, rank
# $r$ sends part $r - h$ and puts what comes in place of part $r - h - 1$.
#
# For example, follow part 2 on three ranks. In hop 1, rank 0 sends its part 2 to rank
# 1, which adds it to its own. In hop 2, rank 1 sends this sum to rank 2, which adds its
# own part 2. Rank 2 now has the sum of all three.
#
# ### Exercise 2.3: a step of ZeRO
#
# Difficulty four of five, importance four of five, about twenty-five minutes. Write
# `my_zero_step(weights, gradients, exchange, update)` for $N$ ranks, which are
# simulated in one process.
#
# - `weights`: a list of $N$ equal tensors `(size,)`; `gradients`: a list of $N$ tensors
#   `(size,)`, each of a rank's own rows. Do not change them.
# - `exchange(tensors)` is one hop: it takes a list with one part for each rank, each of
#   `n` values, and returns what each rank receives, in the order of the ranks.
# - `update(rank, w, g)` gives new weights `(n,)` for a part. Call it once for each
#   rank, with part `rank` of its weights and of the **mean** gradient.
# - Return the new weights of every rank: a list of $N$ tensors `(size,)`.
#
# Fill the last part with zeros where $N$ does not divide `size`. A rank knows only its
# own tensors and what `exchange` brings. Example: two ranks with gradients `[2, 4]` and
# `[4, 8]`, weights `[1, 1]`, and the update $w - g$ give `[-2, -5]` on both.
#
# <details><summary>Hint one: a question</summary>
#
# After reduce-scatter, which part of its own list does rank $r$ use, and by what does
# it divide?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `F.pad(t, (0, N * n - size)).view(N, n)` is a tensor in parts. Take a `.clone()` of
# what you write into.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `N, size = len(weights), weights[0].numel()`
#
# </details>


# %% tags=["exercise-2.3"]
def my_zero_step(weights, gradients, exchange, update):
    """The new weights of every rank: reduce-scatter, update, all-gather."""
    ### BEGIN SOLUTION
    N, size = len(weights), weights[0].numel()
    n = -(-size // N)

    def cut(t):
        return F.pad(t, (0, N * n - size)).view(N, n).clone()

    parts, whole = [cut(g) for g in gradients], [cut(w) for w in weights]
    for h in range(1, N):
        came = exchange([parts[r][(r - h) % N] for r in range(N)])
        for r in range(N):
            parts[r][(r - h - 1) % N] += came[r]
    for r in range(N):
        whole[r][r] = update(r, whole[r][r].clone(), parts[r][r] / N)
    for h in range(N - 1):
        came = exchange([whole[r][(r - h) % N] for r in range(N)])
        for r in range(N):
            whole[r][(r - h - 1) % N] = came[r]
    return [w.view(-1)[:size] for w in whole]
    ### END SOLUTION


# %% tags=["check-2.3", "points-5"]
checks.zero_step(my_zero_step)

# %%
zero_step = lesson.mine(my_zero_step, checks.our_zero_step)
start = torch.cat([p.detach().flatten() for p in plain.parameters()])
each = [gradient_of([summed_loss(plain, part) * 4 / T]) for part in parts]
wire = checks.Wire(4)
new = zero_step([start] * 4, each, wire, lambda rank, w, g: w - 0.1 * g)
off = max((w - (start - 0.1 * right)).norm().item() for w in new)
lesson.control("All ranks have the weights of one rank.", off < 1e-4)
print(f"each rank sent {sum(wire.sent) / len(start):.3f} values for each parameter")

# %% [markdown]
# Four simulated ranks trained `tiny`, each on a row of its own. Each sent
# $2\,(N-1)/N$ values for each parameter, as the table says.
#
# ### On real ranks
#
# The library's `memory/zero.py` does this on processes that talk through
# `torch.distributed`. The next cell starts two and then four of them on this machine.
# Each takes two steps of full fine-tuning on `tiny` in every stage, and adds up what it
# keeps. A third run, in `float32`, compares the weights with those of one rank that
# reads all rows.

# %%
ranks = {}
for recipe, N in (("mixed", 2), ("mixed", 4), ("float32", 2)):
    asked = zero_ranks.config("tiny", recipe, N)
    ranks[recipe, N] = runs.Run("here", asked, zero_ranks.compute(asked), {})
reports = ranks["float32", 2].result["ranks"].values()
off = max(report["off"] for stage in reports for report in stage)
lesson.control("Two ranks learn what one rank does.", off < zero_ranks.CLOSE)

# %%
P = ranks["mixed", 2].result["parameters"]
rows = {"one rank": dict(weights=2 * P, gradients=2 * P, states=12 * P)}
for N in (2, 4):
    for stage, reports in ranks["mixed", N].result["ranks"].items():
        sizes = [reports[0][kind] for kind in zero_ranks.KINDS]  # of rank 0
        kept = dict(zip(fitting_pictures.KINDS, sizes, strict=True))
        rows[f"stage {stage} on {N} ranks"] = kept
        own, formula = sum(kept.values()) / P, zero_ranks.by_paper(1, N, int(stage))
        print(f"stage {stage} on {N}: {own:.3f} bytes a parameter, formula {formula}")
figure = curves.bars(
    rows,
    kinds=fitting_pictures.KINDS,
    title="Each stage cuts one more row, and more ranks cut deeper",
    subtitle="tiny in mixed precision: bytes that a real rank keeps.",
)
lesson.show(figure, "Stage 1 cuts states, stage 2 gradients, and stage 3 weights.")

# %% [markdown]
# ## On trial: claim F3
#
# The textbook: *DeepSpeed ZeRO can reduce this across multiple GPUs*. The rule compares
# what ZeRO really saves on a rank with the paper's formula, over all stages. It could
# fail. Code that never drops the whole gradients would train as well, and reach only
# `86 %` of the saving in stage 2.

# %%
lesson.rule("F3")
mixed = [ranks["mixed", 2], ranks["mixed", 4]]
reached = zero_ranks.measured_saving([*mixed, ranks["float32", 2]])
lesson.live("F3", reached.value, reached.low, reached.high, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("F3")

# %% [markdown]
# ## On trial: claim Y3
#
# Our table has $2P + 14P/N$ bytes for stage 2. DeepSpeed, the library of ZeRO's
# authors, has an estimator that computes `2 P + 18 P / N`. Its comment explains the
# `18`: four more bytes for gradients in `float32`. Who is right depends on what the
# code holds, and when. So the rule counts $c$ in $2P + cP/N$ on real ranks, between
# backward and update.

# %%
lesson.rule("Y3")
lesson.predict("2.5", low=None, high=None, unit="bytes a parameter of the part")

# %%
held = zero_ranks.measured_factor(mixed)
print("at the worst moment of the update:", held.figures["peak"])
lesson.measured("2.5", held.value)
lesson.live("Y3", held.value, held.low, held.high, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("Y3", guess="2.5")

# %% [markdown]
# Our `zero.py` turns one gradient at a time into `float32`. So it holds 14 between
# backward and update, and more for a moment in each update. (The cell above shows that
# moment on `tiny`, the card on SmolLM2.) DeepSpeed turns all gradients of its part into
# `float32` first, as its comment says; `docs/many_devices.md` has what it then holds.
#
# ## Idea six: choose the one change
#
# You now have four ways to make a step fit. They differ in price:
#
# | change | what it shortens | price |
# |---|---|---|
# | `"nothing"` | nothing | none |
# | `"chunks"` | the logits, to an eighth | next to none |
# | `"halves"` of the rows | activations and logits, to a half | smaller products |
# | `"checkpointing"` | activations, to inputs | one more forward |
# | `"four GPUs"` | states and gradients, to a quarter | three more GPUs |
#
# The rule: predict the bytes of every moment, then take the cheapest change after which
# *all* moments fit. A change that shortens the loss does not help if the update still
# needs too much.
#
# ### Exercise 2.4: which change?
#
# Difficulty three of five, importance five of five, about fifteen minutes. Write
# `my_choice(bill, room)`. `bill` has eight whole numbers: `layers`, and the bytes of
# `weights`, `states`, `gradients`, of what a `layer` keeps, of its `input`, of the
# `logits`, and of the update's `temporaries`. Three moments count:
#
# | moment | what is there |
# |---|---|
# | `"loss"` | weights, states, `layers` x `layer`, logits |
# | `"backward"` | weights, states, `layers` x `layer` |
# | `"update"` | weights, states, gradients, temporaries |
#
# - `"chunks"` divides the logits by 8.
# - `"halves"` divides `layers` x `layer` and the logits by 2.
# - `"checkpointing"` keeps `layers` x `input` in place of `layers` x `layer`, and
#   computes one `layer` again in backward, which then is there besides.
# - `"four GPUs"` is stage 2 on four ranks: it divides states and gradients by 4.
#
# Only one change is allowed. Return the first one, in this order and beginning with
# `"nothing"`, whose peak is at most `room`, with the proof: `(change, moment, peak)`,
# where `moment` is the first of the largest with the change. Return `None` if no change
# fits. Divide with `//`, after you multiplied.
#
# Example: with 4 layers of `40`, an input of `8`, logits of `800`, weights of `80`,
# states of `160`, gradients of `80` and temporaries of `16`, the peak is `1200` in the
# loss. In `500` bytes, the answer is `("chunks", "loss", 500)`.
#
# <details><summary>Hint one: a question</summary>
#
# Which of the three moments does a change shorten? Which one is then the largest?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# For each change, build `{moment: bytes}` with three entries.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `for change in ("nothing", "chunks", "halves", "checkpointing", "four GPUs"):`
#
# </details>


# %% tags=["exercise-2.4"]
def my_choice(bill, room):
    """(change, moment, peak) of the cheapest change that fits; None if none does."""
    ### BEGIN SOLUTION
    for change in ("nothing", "chunks", "halves", "checkpointing", "four GPUs"):
        half = 2 if change == "halves" else 1
        share = 4 if change == "four GPUs" else 1
        again = change == "checkpointing"
        kept = bill["layers"] * bill["input" if again else "layer"] // half
        logits = bill["logits"] // (8 if change == "chunks" else half)
        base = bill["weights"] + bill["states"] // share
        moments = {
            "loss": base + kept + logits,
            "backward": base + kept + (bill["layer"] if again else 0),
            "update": base + bill["gradients"] // share + bill["temporaries"],
        }
        moment = max(moments, key=moments.get)
        if moments[moment] <= room:
            return change, moment, moments[moment]
    return None
    ### END SOLUTION


# %% tags=["check-2.4", "points-4"]
checks.cheapest_change(my_choice)

# %% [markdown]
# Now use it. Here is the bill of full fine-tuning in mixed precision on SmolLM2, in a
# short step and in two longer ones, each with a memory of its own. First say where each
# peak is without a change.

# %%
choose = lesson.mine(my_choice, checks.our_choice)
L = config.num_hidden_layers
for length, room in ((256, 2.0e9), (1024, 2.8e9), (4096, 4.5e9)):
    asked = Setup(method="full", dtype="mixed", length=length)
    now = budget.bill(config, asked)
    less = budget.bill(config, replace(asked, checkpointing=True)).parts["activations"]
    row = {name: now.parts[name] for name in ("weights", "gradients", "logits")}
    row["states"] = now.parts["optimizer"] + now.parts["master"]
    row |= dict(layers=L, layer=now.parts["activations"] // L, input=less // L)
    row["temporaries"] = now.transients["the optimizer's temporaries"]
    print(f"{length:5}: peak in {peak_of(now.moments)[0]}; {choose(row, int(room))}")

# %% [markdown]
# In the short step, the peak is in the update. There, only more GPUs help, and the
# cheaper changes save nothing. In the longer steps, logits and activations make the
# peak.
#
# The library tries every single change, and orders them by what they save at the peak.
# `python -m peft_from_scratch budget` with `--fit 24GB` prints this for any model.

# %%
asked = Setup(method="full", dtype="mixed", length=1024)
rows, _ = changes.changes(config, budget.bill(config, asked))
for row in rows[:5]:
    print(f"{row.name:32} saves {row.saved / 1e9:.2f} GB")

# %% [markdown]
# ZeRO-1 and ZeRO-2 save the same here, 1.41 GB: at the peak, in the loss, there are no
# gradients yet.
#
# ## Quiz
#
# Answer first, then open the options.
#
# **1. A LoRA step on one long row runs out of memory in the loss. What helps?**
#
# <details><summary>A smaller rank</summary>
#
# No. Adapters, their gradients and their states are a small part of this step.
#
# </details>
# <details><summary>The loss in chunks</summary>
#
# Right. The logits of all tokens, three times in `float32`, make the spike.
#
# </details>
# <details><summary>ZeRO stage 2</summary>
#
# No. It cuts gradients and states, which LoRA hardly has.
#
# </details>
#
# **2. Which part of the textbook's 112 GB does checkpointing reduce?**
#
# <details><summary>None of it</summary>
#
# Right. It reduces activations, and those GB hold none.
#
# </details>
# <details><summary>The gradients</summary>
#
# No. Every weight has the same gradient as before.
#
# </details>
# <details><summary>Adam's states</summary>
#
# No. They do not depend on how the gradients were computed.
#
# </details>
#
# **3. Why does checkpointing cost LoRA relatively more time?**
#
# <details><summary>The adapters run twice</summary>
#
# No. They take little time.
#
# </details>
# <details><summary>Its step is shorter, and the additional forward is as long</summary>
#
# Right. Frozen weights need no gradient, so the step has $4P$ FLOPs and not $6P$.
#
# </details>
# <details><summary>The frozen base has to be read from disk</summary>
#
# No. It stays in memory.
#
# </details>
#
# **4. Four micro-batches have 4, 8, 30 and 60 label tokens. By what do you divide each
# sum?**
#
# <details><summary>By the label tokens of the micro-batch</summary>
#
# No. Then a token of the first one counts fifteen times as much as one of the last.
#
# </details>
# <details><summary>By the label tokens of all four</summary>
#
# Right. Then every token counts the same, as in one batch.
#
# </details>
# <details><summary>By four</summary>
#
# No. Then the gradient grows with the number of tokens in a micro-batch.
#
# </details>
#
# **5. On 64 ranks, which row of the bill still has its full size in stage 2?**
#
# <details><summary>The states</summary>
#
# No. They are cut from stage 1 on.
#
# </details>
# <details><summary>The gradients</summary>
#
# No. Stage 2 cuts them.
#
# </details>
# <details><summary>The weights</summary>
#
# Right. Only stage 3 cuts them, and pays with more traffic.
#
# </details>
#
# ### In your own words
#
# A colleague fine-tunes a 7B model in full, with one short row in each step. The step
# does not fit. "I will turn on checkpointing", she says. What do you ask her first, and
# what do you expect?
#
# <details><summary>A model answer</summary>
#
# "At which moment is the peak? With one short row, weights, gradients and states are
# nearly all of it, and the update may be the worst moment. Checkpointing shortens none
# of these. I would predict the bill first. Then the choice is among LoRA, more GPUs
# with ZeRO, and states in fewer bits."
#
# </details>
#
# ## Limits
#
# - **What the controls rule out.** The gradients are equal, so a cheaper step is not
#   another step. The weights are equal, so ranks do not save bytes by learning less.
# - **Not tested.** No GPU was used. There, buffers of the communication come on top,
#   and free memory in pieces that are too small to use. The ranks are processes of one
#   machine, so no time of ZeRO was measured.
# - **The paper's figures.** ZeRO's authors give `120` GB for 7.5B parameters, and
#   `31.4`, `16.6` and `1.9` GB on 64 GPUs. A test of this project computes these four.
#
# ## Your guesses
#
# Each range should hold the measured value nine times out of ten.

# %%
lesson.calibration()

# %% [markdown]
# ## Receipt

# %%
lesson.receipt()

# %% [markdown]
# ## Where to go next
#
# - Chen and others, [Training deep nets with sublinear memory
#   cost](https://arxiv.org/abs/1604.06174): checkpointing.
# - Rajbhandari and others, [ZeRO](https://arxiv.org/abs/1910.02054).
# - PyTorch's [fully\_shard](https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html):
#   stage 3 as torch has it.
# - Notebook 09: paged optimizers, for spikes that are rare.
