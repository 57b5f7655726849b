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
# # Bottleneck adapters
#
# You will have shown what it costs to put a small network *behind* the layers of a
# language model, because you timed it against LoRA *beside* them, while the same model
# timed twice shows what your clock can tell.
#
# **You need** notebook 04 (LoRA from scratch), and notebook 03 or some memory of what
# an interval is.
#
# **At the end you can**
#
# - write a bottleneck adapter, and say where in a layer it stands;
# - size it so that a comparison with LoRA is fair;
# - find the places for it in a model whose parts have other names;
# - say why it cannot be merged, and what would have to go so that it could;
# - tell which of the two is slower when a token is decoded, and why;
# - say what the evidence for "superseded" is.
#
# **Only ten minutes?** Write `start("10", quick=True)` below and run all cells. Read
# "The result first", do exercise 10.1, and read the verdict on claim A1.

# %%
from peft_from_scratch.course import start

lesson = start("10")

# %%
from collections import Counter
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_from_scratch as pfs
from peft_from_scratch.course import block_picture, challengers, curves, finetune
from peft_from_scratch.course import intervals, latency, ledger, runs, step_seconds
from peft_from_scratch.course.checks import bottleneck_adapters as checks

# %% [markdown]
# ## The result first
#
# Two ways to fine-tune a model with few numbers. A **LoRA** stands beside each
# projection. A **bottleneck adapter** stands behind each sublayer, so that everything
# must pass through it, one after the other. The textbook says that this is why adapters
# add latency and LoRA does not.
#
# We gave both the same number of parameters in SmolLM2, and timed one **decoding
# step**: the work for one new token. Five candidates took turns. The base model is in
# there twice, so that you see what the clock makes of no difference at all.

# %%
found = [runs.stored(config) for config in latency.configs("smollm2")]
candidates = {
    "again": "the base model, timed again",
    "merged": "LoRA, merged into the weights",
    "houlsby": "bottlenecks, behind each sublayer",
    "lora": "LoRA, beside each projection",
}
print("Time of a decoding step of SmolLM2, in units of the base model's:")
for name, said in candidates.items():
    value, low, high = latency.ratio(found, name, "base", 1)
    print(f"{said:34} {value:.2f} [{low:.2f}, {high:.2f}]")

# %% [markdown]
# Look at the last two lines, and then at the second. It is not the order that the
# textbook has, and the reason that it gives is not the whole reason. The rest of this
# notebook takes the bottleneck apart to find out why.
#
# ## Where it stands
#
# In this picture of one layer, the bottlenecks are what has a colour.

# %%
lesson.show(
    block_picture(lit="houlsby"),
    "Two bottlenecks in a layer: behind attention's output projection and behind the "
    "MLP's, each before the sum with the stream.",
)

# %% [markdown]
# The textbook places adapters "between transformer layers". That is a fair picture from
# far away: something small is inserted, and all else is frozen. From near, the paper
# (Houlsby and others, section two) puts them *inside* each layer, and twice: after
# attention's output projection and after the MLP's, **before** what comes out is added
# to the residual stream.
#
# It matters. Between layers, a bottleneck would change the whole stream. Inside, it
# corrects what one sublayer has to say, and the stream flows past it untouched.
#
# ## Idea one: a small network behind a projection
#
# $y$ is what the last projection of a sublayer returns. The bottleneck squeezes it into
# $m$ numbers, bends them, spreads them out again, and adds the result to $y$:
#
# $$h = y + U\,\sigma(D\,y + b_D) + b_U$$
#
# | symbol | what it is | shape | trained? |
# |---|---|---|---|
# | $y$ | output of the frozen projection | $d$ | no |
# | $D$, $b_D$ | down: reads $y$ | $m \times d$ and $m$ | yes |
# | $\sigma$ | a nonlinearity, number by number | | |
# | $U$, $b_U$ | up: writes the correction | $d \times m$ and $d$ | yes |
# | $m$ | units of the bottleneck, far below $d$ | a number | you choose |
# | $h$ | what the layer adds to its stream | $d$ | |
#
# Small enough to look at, for one column $y$:

# %%
torch.manual_seed(0)
d, m = 6, 2
y = torch.randn(d)
D, b_D = torch.randn(m, d), torch.randn(m)
U, b_U = torch.randn(d, m), torch.randn(d)
narrow = F.gelu(D @ y + b_D)  # (m,)
h = y + U @ narrow + b_U  # (d,)
numbers = D.numel() + b_D.numel() + U.numel() + b_U.numel()
print(f"y has {len(y)} numbers, the middle has {len(narrow)}, h has {len(h)}")
print(f"trained: {numbers}; the formula 2md + d + m says {2 * m * d + d + m}")

# %% [markdown]
# Compare with LoRA, $h = W_0 x + \frac{\alpha}{r} B A\,x$. Two things differ. LoRA
# reads $x$, the *input* of the projection, and a bottleneck reads $y$, its *output*: it
# has to wait. And between LoRA's two matrices stands nothing, between these two a
# $\sigma$.
#
# ### Exercise 10.1: the forward pass
#
# Difficulty two of five, importance five of five, about ten minutes. Write `forward`
# for a model's tokens, each a *row*: `x` is `(…, d_in)`. First let `self.base` do its
# own part, whatever kind of projection it is. `self.sigma` is a function such as
# `F.gelu`.
#
# <details><summary>Hint one: a question</summary>
#
# The equation has two things that are added to the correction $U\,\sigma(\dots)$. Which
# are they, and is $x$ among them?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `y` is `(…, d)`. After $D$ it is `(…, m)`, so is $b_D$'s last side. After $U$ it is
# `(…, d)` again. With rows, a matrix comes from the right and turned.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `y = self.base(x)`
#
# </details>


# %% tags=["exercise-10.1"]
class MyBottleneck(nn.Module):
    """h = y + U sigma(D y + b_D) + b_U, where y = base(x).    x (…, d_in), h (…, d)"""

    def __init__(self, base, D, b_D, U, b_U, sigma):
        super().__init__()
        self.base = base  # frozen
        self.D, self.b_D = nn.Parameter(D), nn.Parameter(b_D)  # (m, d), (m,)
        self.U, self.b_U = nn.Parameter(U), nn.Parameter(b_U)  # (d, m), (d,)
        self.sigma = sigma

    def forward(self, x):
        ### BEGIN SOLUTION
        y = self.base(x)
        narrow = self.sigma(y @ self.D.T + self.b_D)  # (…, m)
        return y + narrow @ self.U.T + self.b_U
        ### END SOLUTION


# %% tags=["check-10.1", "points-2"]
checks.bottleneck_forward(MyBottleneck)

# %% [markdown]
# ## Idea two: start near the identity
#
# LoRA starts at exactly the pretrained model, with $B = 0$. The adapters' paper starts
# *near* it: it draws $D$ and $U$ with a standard deviation of `0.01`, and sets the
# biases to zero. Then $h \approx y$. The paper reports that training holds up while
# that deviation is small, and gets worse when it grows.
#
# | start | $h$ at first | gradient of $D$ | gradient of $U$ |
# |---|---|---|---|
# | both zero | $y$ exactly | zero | zero for $\sigma(0) = 0$ |
# | small | nearly $y$ | small | small |
# | large | something else | large | large |
#
# Guess before you run: we put bottlenecks into `tiny`, our model of a million numbers,
# with a start of deviation one in the place of `0.01`. How much does its loss on
# ordinary text rise, in nats a token?

# %%
lesson.predict("10.1", low=None, high=None, unit="nats per token")

# %%
tiny, tiny_tokenizer = pfs.load_model("tiny", device="cpu")
task = pfs.tasks.load_task("gap-1")
rows = list(task.test.select(range(16)))
encode = pfs.templates.encode_rows
test = encode(tiny_tokenizer, task.instruction, rows, template="raw")
batch = pfs.loss.batch_of(test, tiny.device)


def loss_and_gradient():
    loss = tiny(**batch).loss
    loss.backward()
    trained = pfs.trainable(tiny).values()
    size = torch.cat([p.grad.flatten() for p in trained]).norm()
    tiny.zero_grad()
    return loss.item(), size.item()


# %%
with torch.no_grad():
    untouched = tiny(**batch).loss.item()
print(f"the model as it was:   loss {untouched:.4f}")
losses = {}
for std in (0.0, 0.01, 1.0):
    torch.manual_seed(0)
    pfs.houlsby.inject(tiny, m=39)
    for name, parameter in pfs.trainable(tiny).items():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=std)
    losses[std], gradient = loss_and_gradient()
    print(f"a start with std {std:4}: loss {losses[std]:.4f}, gradient {gradient:.2g}")
    pfs.remove(tiny)
lesson.measured("10.1", losses[1.0] - untouched)

# %% [markdown]
# The small start hardly moves the loss. The large one spoils the model before the first
# step: this is our **control**, and it says that it is the *size* of the start that
# keeps the model, not the shape of the adapter.
#
# With all weights zero there is still a gradient, which may surprise you. Whose is it?
# $U$ and $D$ block each other as in notebook 04, but $b_U$ stands at the end of the
# line, and nothing multiplies it. It alone would train, for ever.
#
# ### Break it on purpose
#
# Somebody writes a bottleneck in a hurry. It runs, all shapes fit, and every part of
# it trains. One term of the equation is missing. Which? Read it before you read on.


# %%
class HastyBottleneck(nn.Module):
    def __init__(self, base, m=39):
        super().__init__()
        self.base, d = base, base.weight.shape[0]
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        return self.up(F.gelu(self.down(self.base(x))))


# %%
broken, _ = pfs.load_model("tiny", device="cpu")
torch.manual_seed(0)
ends = ("o_proj", "down_proj")
for name in [n for n, _ in broken.named_modules() if n.endswith(ends)]:
    broken.set_submodule(name, HastyBottleneck(broken.get_submodule(name)))
with torch.no_grad():
    spoiled = broken(**batch).loss.item()
print(f"as it was {untouched:.2f}, with the library's start {losses[0.01]:.2f}")
print(f"with the hasty one {spoiled:.2f}")
repaired = "return (y := self.base(x)) + self.up(F.gelu(self.down(y)))"
print("the repair:", repaired)

# %% [markdown]
# The residual is gone: $y$ itself is not added. With a small start the sublayer now
# says almost nothing, so that all layers are as good as switched off. And it *would*
# train. The loss would fall from up there, and a learner who never looks at step zero
# would see a curve that goes down. Look at the loss before the first step, always: it
# should be the base model's.
#
# ## Idea three: a fair size
#
# To compare two methods, give them the same number of parameters. One bottleneck has
#
# $$\underbrace{m\,d + m}_{D,\;b_D} + \underbrace{d\,m + d}_{U,\;b_U} = 2md + d + m$$
#
# and a layer has two. A LoRA of rank $r$ has $r\,(d_{in} + d_{out})$ beside each of the
# layer's seven projections. Count that one first, in SmolLM2:

# %%
model, tokenizer = lesson.load_model()
kinds = pfs.targets.kinds(model)
first = pfs.targets.layer_of(model, next(iter(kinds)))
layer = {n: model.get_submodule(n) for n in kinds if n.startswith(f"{first}.")}
budget = 0
for name, module in layer.items():
    d_out, d_in = module.weight.shape
    budget += 8 * (d_in + d_out)
    print(f"{name.removeprefix(first):18} {d_in:4} to {d_out:4}")
print(f"LoRA of rank 8 in this layer: {budget:,} numbers")

# %% [markdown]
# ### Exercise 10.2: the same budget
#
# Difficulty two of five, importance three of five, about ten minutes. A layer may train
# about `budget` numbers. Which $m$ comes closest, with two bottlenecks in the layer,
# and how many numbers do these two have?
#
# <details><summary>Hint one: a question</summary>
#
# Write down the count of *two* bottlenecks. Which of its terms have an $m$ in them?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Two whole numbers, `(m, count)`. The count need not be the budget: for the layer above
# it is a little more.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `m = round((budget - 2 * d) / …)`
#
# </details>


# %% tags=["exercise-10.2"]
def my_units(d, budget):
    """(m, count): the m whose two bottlenecks come closest to the budget of a layer."""
    ### BEGIN SOLUTION
    m = round((budget - 2 * d) / (2 * (2 * d + 1)))
    return m, 2 * (2 * m * d + d + m)
    ### END SOLUTION


# %% tags=["check-10.2", "points-2"]
checks.bottleneck_units(my_units)

# %% [markdown]
# These are the sizes of everything that is measured below: rank eight against the $m$
# that comes closest. The library counts what it injects:

# %%
for base, each in (("smollm2", model), ("tiny", tiny)):
    sizes, counts = latency.SIZES[base], {}
    for method, how in (("lora", {"r": sizes["r"]}), ("houlsby", {"m": sizes["m"]})):
        getattr(pfs, method).inject(each, **how)
        counts[method] = sum(p.numel() for p in pfs.trainable(each).values())
        pfs.remove(each)
    lora, ours = counts["lora"], counts["houlsby"]
    said = f"{base:8} LoRA r = {sizes['r']}: {lora:,}; bottlenecks m = {sizes['m']}: "
    print(f"{said}{ours:,}, {100 * (ours / lora - 1):+.1f} %")

# %% [markdown]
# ## Idea four: the same places under other names
#
# In a Llama, the two projections are `o_proj` and `down_proj`. In other models they are
# called something else. So do not go by names: go by structure. A layer has a sublayer
# of attention and one of the MLP, and each ends in a projection back to the width of
# the stream. The library can tell two things about every projection of a model:

# %%
for name, kind in list(pfs.targets.kinds(tiny).items())[:7]:
    width = tiny.get_submodule(name).weight.shape[0]
    where = pfs.targets.layer_of(tiny, name)
    print(f"{name:32} {kind:10} in {where}, returns {width}")

# %% [markdown]
# ### Exercise 10.3: find the places
#
# Difficulty three of five, importance four of five, about fifteen minutes. Return the
# full names of the projections behind which Houlsby's bottlenecks go, in the model's
# order: two in every layer, of any Llama, GPT-2 and OPT. `pfs.targets.kinds(model)` has
# the projections of each layer in the order in which the model defines them, and that
# is here the order in which data flows.
#
# <details><summary>Hint one: a question</summary>
#
# For one layer and one kind there are several projections in that list. Which of them
# do you want: and what does a dictionary do when you set the same key again?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# A dictionary with the key `(layer, kind)` and the value `name`. At the end it has two
# entries a layer.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `last = {}`, and then `for name, kind in pfs.targets.kinds(model).items():`
#
# </details>


# %% tags=["exercise-10.3"]
def my_places(model):
    """The names of the last projection of attention and of the MLP, layer by layer."""
    ### BEGIN SOLUTION
    last = {}
    for name, kind in pfs.targets.kinds(model).items():
        last[pfs.targets.layer_of(model, name), kind] = name
    return list(last.values())
    ### END SOLUTION


# %% tags=["check-10.3", "points-3"]
checks.bottleneck_places(my_places)

# %% [markdown]
# Later work (Pfeiffer and others) asked whether both are needed, and kept one a layer,
# behind the MLP. It has half of the parameters and half of the waiting. In the
# library it is an option:

# %%
for placement in ("houlsby", "pfeiffer"):
    names = pfs.houlsby.inject(tiny, m=39, placement=placement)
    count = sum(p.numel() for p in pfs.trainable(tiny).values())
    parts = sorted({name.rpartition(".")[2] for name in names})
    print(f"{placement:8} {len(names)} bottlenecks, {count:,} numbers, behind {parts}")
    pfs.remove(tiny)

# %% [markdown]
# ## Idea five: what does the waiting cost?
#
# Arithmetic first. A product with a matrix of $n$ entries takes about $2n$ operations a
# token. So methods of the same size do the same arithmetic. By that count, which is
# slower?

# %%
frozen = sum(module.weight.numel() for module in layer.values())
d, units = model.config.hidden_size, latency.SIZES["smollm2"]["m"]
work = {"the layer itself": frozen, "+ LoRA": budget, "+ bottlenecks": 4 * units * d}
for said, entries in work.items():
    share = 100 * entries / frozen
    print(
        f"{said:17} {2 * entries:9,} operations a token, {share:5.1f} % of the layer's"
    )

# %% [markdown]
# By arithmetic both are next to free, and equal. Yet in the first result both took
# several times that share. So arithmetic is not what costs.
#
# When one token is decoded, every matrix meets a single row. Such a product is over in
# microseconds, and a good part of its time goes into *starting* it: Python, dispatch,
# on a GPU the launch of a kernel. What counts then is **how many** products there are,
# not how large they are. LoRA has two for each of seven projections, a bottleneck two
# for each of two places. PyTorch lets us watch:


# %%
class Calls(TorchDispatchMode):
    """Counts the operations that reach PyTorch's kernels."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket.__name__.rstrip("_")] += 1
        return operation(*args, **(kwargs or {}))


# %%
config = latency.config("tiny", batch=1, seed=0)
models = {name: model.eval() for name, model in latency.candidates(config).items()}
for name in ("base", "merged", "houlsby", "lora"):
    with torch.no_grad(), Calls() as calls:
        models[name](torch.tensor([[5]]))
    products = calls.counts["mm"] + calls.counts["addmm"]
    layers = models[name].config.num_hidden_layers
    print(f"{name:8} {products} products of matrices in {layers} layers of tiny")

# %% [markdown]
# The bottlenecks wait *in line*, and LoRA works *beside*. But "parallel" is a word for
# the drawing. PyTorch starts one product after the other, and LoRA's two stand in the
# same queue as all the others. To be parallel in time, somebody would have to write a
# kernel that does both paths at once.
#
# ### On trial: claim A1
#
# *Adapters compute in sequence and add latency, unlike LoRA, which is parallel* (the
# textbook, and in part the introduction of LoRA's paper). Here is the rule, written
# before the runs. You saw SmolLM2. `tiny` has narrower matrices and fewer layers.
# Guess: what is the ratio there?

# %%
lesson.rule("A1")
lesson.predict("10.2", low=None, high=None, unit="times LoRA's time")

# %% [markdown]
# **Live**, on `tiny`: five candidates take turns within each round, so that a machine
# that slows down slows all of them. **Control**: the base model again. If its interval
# were far from one, nothing else here would mean anything.

# %%
tokens = list(range(3, 3 + config["prompt"]))
prompts = {name: (model, tokens) for name, model in models.items()}
seconds = step_seconds(prompts, tokens=6, rounds=25)


def times(name, other):
    pairs = zip(seconds[name], seconds[other], strict=True)
    return intervals.of_median([mine / theirs for mine, theirs in pairs])


for name in ("again", "merged", "houlsby", "lora"):
    print("{:8} {:.2f} [{:.2f}, {:.2f}] times base".format(name, *times(name, "base")))
live = times("houlsby", "lora")
lesson.measured("10.2", live[0])

# %% [markdown]
# **The full results** ship: both models, one sequence and eight at once, three repeats
# of seven rounds. (`python -m peft_from_scratch ledger A1 --run` makes what is
# missing.)

# %%
names = {
    "lora": "LoRA, unmerged",
    "houlsby": "bottlenecks",
    "merged": "LoRA, merged",
    "again": "base, again",
}
series = {
    said: [(b, *latency.ratio(found, name, "base", b)) for b in latency.BATCHES]
    for name, said in names.items()
}
figure = curves.lines(
    series,
    x="Sequences decoded at once, count",
    y="Time of a step, times the base's",
    title="A decoding step of SmolLM2 with each method",
    subtitle="Median of 21 rounds; the band is its interval. Control in grey.",
    control=("base, again",),
    names="foot",
)
figure.axes[0].set_xticks(latency.BATCHES)
told = [
    f"{said} {rows[0][1]:.2f} and {rows[1][1]:.2f}" for said, rows in series.items()
]
lesson.show(figure, "For one sequence and for eight: " + "; ".join(told) + ".")

# %%
for scale in ("tiny", "smollm2"):
    shipped = ledger.judge(ledger.claim("A1"), scale)
    low, high = shipped.interval
    ratio = f"{shipped.measured:.2f} [{low:.2f}, {high:.2f}]"
    print(f"{scale:8} bottlenecks take {ratio} times as long as unmerged LoRA")
lesson.live("A1", *live, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("A1", guess="10.2")

# %% [markdown]
# Half of the claim stands: adapters do add time to every token. The other half does
# not, as it is said. LoRA beside the projections adds *more*, because it starts more
# products. It adds nothing only once it is **merged**, and then it is no longer beside
# anything: it is gone. Being parallel is not what saves LoRA. Being a matrix is.
#
# One thing in the figure asks for care. Merged, with eight sequences, LoRA comes out a
# little *faster* than the base, though you counted the same products in both. We have
# not found out why; where the weights lie in memory is a candidate. A difference as
# small as that one should not be believed here, whatever its interval says.
#
# ## Idea six: why this one cannot be merged
#
# A weight can only hold what a matrix does, and a matrix has one property that is easy
# to test: what it does to a sum is the sum of what it does to the parts. So test
# it, with the constant part $f(0)$ taken off first. With $\sigma$ and without:

# %%
torch.manual_seed(0)
W0, b = torch.randn(6, 5).double(), torch.randn(6).double()
D, b_D, U, b_U = (each.double() for each in (D, b_D, U, b_U))


def f(x, sigma):
    y = W0 @ x + b
    return y + U @ sigma(D @ y + b_D) + b_U


def plain(z):  # no nonlinearity
    return z


x1, x2, zero = torch.randn(5).double(), torch.randn(5).double(), torch.zeros(5).double()
for sigma in (F.gelu, plain):
    whole = f(x1 + x2, sigma) - f(zero, sigma)
    parts = f(x1, sigma) + f(x2, sigma) - 2 * f(zero, sigma)
    print(
        f"{sigma.__name__:6} sum and parts differ by {(whole - parts).abs().max():.2g}"
    )

# %% [markdown]
# With GELU the two differ, so *no* matrix does what this bottleneck does. Take the
# nonlinearity away, and multiply out what is left:
#
# $$y + U(D\,y + b_D) + b_U = \underbrace{(I + U D)\,W_0}_{W}\,x
# + \underbrace{(I + U D)\,b + U\,b_D + b_U}_{\text{bias}}$$
#
# | symbol | what it is | shape |
# |---|---|---|
# | $I + U D$ | identity and a matrix of rank $m$ at most | $d \times d$ |
# | $W$ | the merged weight | $d \times d_{in}$ |
#
# A linear bottleneck folds in exactly:

# %%
fold = torch.eye(6).double() + U @ D
W, bias = fold @ W0, fold @ b + U @ b_D + b_U
print(f"folded and in line differ by {(W @ x1 + bias - f(x1, plain)).abs().max():.1g}")
print("rank of the change W - W0:", int(torch.linalg.matrix_rank(W - W0)))
try:
    pfs.houlsby.inject(tiny, m=39)
    pfs.merge(tiny)
except pfs.CannotMerge as error:
    print("the library:", error)
finally:
    pfs.remove(tiny)

# %% [markdown]
# Look at that rank. Without its $\sigma$, a bottleneck changes the weight by
# $U D\,W_0$: a change of rank $m$, with $U$ in the place of $B$ and $D\,W_0$ in the
# place of $A$. It is a LoRA that reads the layer's output. So the two methods are
# closer relatives than they look, and the nonlinearity is what one has to pay for in
# time.
#
# ## On trial: claim A2
#
# *Adapter layers have been superseded by LoRA* (the textbook). "Superseded" could be a
# fact about fashion. As a fact about models, it should show in what is learned. The
# rule compares test loss at equal parameters, and each method gets its own best
# learning rate from a search of the same size:

# %%
lesson.rule("A2")
lesson.predict("10.3", low=None, high=None, unit="nats behind LoRA")

# %%
jobs = {"gap-1": "new format", "gap-2": "new words", "gap-3": "new language"}
chosen = {}
for job, said in jobs.items():
    for name in ("houlsby", "lora"):
        _, (_, chosen[name, job]) = challengers.cell(name, job)
    ours, theirs = (chosen[name, job] for name in ("houlsby", "lora"))
    print(f"{said:13} bottlenecks learn at {ours:g}, LoRA at {theirs:g}")

# %% [markdown]
# **Live**: one seed of each method on each of the three jobs, at the rate that the
# search chose. **Control**, on the last of them: a LoRA whose $A$ and $B$ are random
# and never trained. The two methods meet the same rows in the same order, so their
# losses are paired.

# %%
less = {"test": 100, "validation": 5}


def test_rows(name, job, **other):
    config = challengers.config(name, job, chosen[name, job], seed=0)
    return finetune.compute(config | less | other)["test_items"]


lag = {}
for job, said in jobs.items():
    ours, theirs = (test_rows(name, job) for name in ("houlsby", "lora"))
    lag[job] = fmean(ours) - fmean(theirs)
    print(f"{said:13} bottlenecks {fmean(ours):.3f}, LoRA {fmean(theirs):.3f}")
frozen = fmean(test_rows("lora", job, method="lora-frozen"))
print(f"{said:13} a LoRA that is random and frozen {frozen:.3f}")
mean_lag = fmean(lag.values())
lesson.measured("10.3", mean_lag)

# %% [markdown]
# One seed has no interval of its own. The five seeds that ship say how far apart seeds
# lie, so we borrow their spread for this one: $\pm\, t\, s$, with $s$ their standard
# deviation. The picture has the shipped runs, job by job.


# %%
claim = ledger.claim("A2")
stored = [runs.stored(config) for config in claim.configs("tiny")]
points, per_seed = {}, []
for job, said in jobs.items():
    pair = [challengers.chosen(stored, name, job) for name in ("houlsby", "lora")]
    ours, theirs = (sorted(each, key=lambda run: run.config["seed"]) for each in pair)
    level = fmean(run.result["test_loss"] for run in theirs)
    points[said] = (level, *intervals.paired(ours, theirs))
    both = zip(ours, theirs, strict=True)
    per_seed.append([a.result["test_loss"] - b.result["test_loss"] for a, b in both])
    print(f"{said:13} each seed", *(f"{value:+.3f}" for value in per_seed[-1]))
spread = stdev(fmean(seeds) for seeds in zip(*per_seed, strict=True))
half = intervals.t_quantile(0.975, len(challengers.SEEDS) - 1) * spread
print(f"seeds lie {spread:.4f} apart; one seed: {mean_lag:.3f} ± {half:.3f}")

# %%
figure = curves.points(
    points,
    x="Test loss of LoRA, nats per token",
    y="Bottlenecks minus LoRA, nats",
    title="How far bottlenecks end behind LoRA: three jobs for tiny",
    subtitle="Above zero LoRA is better. Five seeds, paired by row; 95 % intervals.",
    log="",
)
figure.axes[0].axhline(0, color="grey", linewidth=0.8, linestyle=":")
told = [
    f"{said} {value:+.3f} [{low:+.3f}, {high:+.3f}]"
    for said, (_, value, low, high) in points.items()
]
lesson.show(figure, "Bottlenecks minus LoRA, in nats: " + "; ".join(told) + ".")

# %%
shipped = ledger.judge(claim, "tiny")
low, high = shipped.interval
print(f"all three jobs: {shipped.measured:+.3f} nats [{low:+.3f}, {high:+.3f}]")
lesson.live("A2", mean_lag, mean_lag - half, mean_lag + half, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("A2", guess="10.3")

# %% [markdown]
# Read the seeds, and not the mean alone. On new words and on the new language every
# seed says the same: after as many steps, the bottlenecks are behind. On the new format
# most seeds see next to no difference, and the mean comes from a single one in which
# LoRA got past a point where all others, of both methods, were still stuck. So the
# interval holds zero there.
#
# Why are they behind? We have tested no reason. Bottlenecks stand at two places in a
# layer and LoRA at seven. And their two small matrices start by holding each other's
# gradients down. More steps might close the gap; the rule fixes the steps.
#
# Keep two questions apart. *Does it learn as well?* Here it did not, on small jobs and
# one small model. *Is it used?* There LoRA has won, and one reason stands above: a
# merged LoRA costs nothing at inference, and a bottleneck costs something for ever.
#
# ## Now with the library
#
# Hugging Face's PEFT has no bottleneck adapters, though people have asked for them for
# years. So there is no second implementation to compare with. What remains is
# the equation itself, in double precision: the library's module against five
# tensors, in value and in every gradient.

# %%
import peft

known = {kind.value for kind in peft.PeftType}
print("PEFT has a bottleneck:", bool({"BOTTLENECK", "HOULSBY", "ADAPTER"} & known))
base = nn.Linear(5, 6).double()
module = pfs.houlsby.Bottleneck(base, m=2)
D, b_D, U, b_U = (*module.down.parameters(), *module.up.parameters())
for parameter in (D, b_D, U, b_U):
    nn.init.normal_(parameter)
x = torch.randn(3, 5).double()
y = base(x)
by_hand = y + F.gelu(y @ D.T + b_D) @ U.T + b_U
ways = torch.randn(3, 6).double()
grads = [torch.autograd.grad((h * ways).sum(), (D, b_D, U, b_U))
         for h in (module(x), by_hand)]  # fmt: skip
gap = max((a - b).abs().max() for a, b in zip(*grads, strict=True))
off = (module(x) - by_hand).abs().max()
print(f"values differ by {off:.0e}, gradients by {gap:.0e}")
assert max(off, gap) < 1e-12

# %% [markdown]
# ## Quiz
#
# Answer for yourself, then open the options. None needs the kernel.
#
# **1. Where do Houlsby's adapters stand?**
#
# <details><summary>Between two layers, on the residual stream</summary>
#
# No. That is how it is often told. On the stream, they would change everything that
# earlier layers have written.
#
# </details>
# <details><summary>Twice in each layer, before each sum with the stream</summary>
#
# Right. They correct what a sublayer is about to add, and nothing else.
#
# </details>
# <details><summary>Beside each projection, on the same input</summary>
#
# No. That is LoRA. A bottleneck reads what the projection returns.
#
# </details>
#
# **2. Unmerged LoRA and bottlenecks of the same size do the same arithmetic. Why does
# one take longer for a token?**
#
# <details><summary>It starts more products</summary>
#
# Right. For a single row, starting a product costs about as much as doing it, and LoRA
# has two for each projection.
#
# </details>
# <details><summary>Its matrices are larger</summary>
#
# No. All together they have the same number of entries, give or take one in a hundred.
#
# </details>
# <details><summary>It stands beside the projection, and must wait for it</summary>
#
# No. It is the bottleneck that must wait. That alone does not make it the slower one.
#
# </details>
#
# **3. You replace GELU by nothing at all. What have you got?**
#
# <details><summary>A bottleneck that learns nothing</summary>
#
# No. A linear one learns, as LoRA does.
#
# </details>
# <details><summary>An adapter that merges, and changes the weight by a low
# rank</summary>
#
# Right. It is $(I + U D)\,W_0$, and $U D\,W_0$ has rank $m$ at most.
#
# </details>
# <details><summary>An adapter that still cannot be merged, because of its
# biases</summary>
#
# No. They go into the projection's bias, or become one.
#
# </details>
#
# **4. (From notebook 04.) A LoRA starts at exactly the pretrained model. Does it need
# to?**
#
# <details><summary>Yes, or it cannot learn</summary>
#
# No. With both matrices random it started from a spoiled model and still learned.
#
# </details>
# <details><summary>No: it is a promise that nothing is lost before you begin</summary>
#
# Right. A bottleneck makes the promise only nearly, and that is good enough here too.
#
# </details>
# <details><summary>Yes, or it cannot be merged</summary>
#
# No. What is merged is the update at the *end* of training.
#
# </details>
#
# **5. (From notebook 03.) The base model, timed twice, gives a ratio whose interval
# holds one. What does that say?**
#
# <details><summary>The two are exactly equally fast</summary>
#
# No. Here they are, since they are the same model, but the interval does not prove it.
#
# </details>
# <details><summary>The measurement is of no use</summary>
#
# No. It tells you how small a difference it can see, which you need to know.
#
# </details>
# <details><summary>Differences inside of that interval cannot be told from
# none</summary>
#
# Right. That is what a control is for.
#
# </details>
#
# ### In your own words
#
# A colleague says: "We use LoRA, because adapters are slow and LoRA is parallel."
# Answer in three sentences, with what you measured.
#
# <details><summary>A model answer</summary>
#
# "Adapters do slow down every token. An unmerged LoRA of the same size slows it down
# more, because it starts two products for each projection, and PyTorch starts them one
# after the other. What makes LoRA free is that it merges, so use it if you will merge;
# if you serve many adapters unmerged on one base, measure."
#
# </details>
#
# ### Transfer
#
# Somebody wants a bottleneck that merges *and* has a nonlinearity, and proposes to put
# $\sigma$ behind the sum: $h = \sigma(y + U D\,y)$. What merges, what does not, and
# what happens at the start?
#
# <details><summary>A model answer</summary>
#
# $(I + U D)\,W_0$ merges, and $\sigma$ stays as an operation of its own. But at the
# start $U D \approx 0$, so $h \approx \sigma(y)$, which is not $y$: the pretrained
# model is spoiled before the first step. Whatever stands in line must be the identity
# at first.
#
# </details>
#
# ## Limits
#
# - **What the controls rule out.** The clock can tell one from the other: the base
#   timed again stays near one. The large start shows that being small is what keeps the
#   model. The frozen LoRA shows that adding random numbers teaches nothing.
# - **What they do not.** Time was measured on a CPU, in eager PyTorch. A GPU has other
#   costs of starting, compiled graphs remove many of them, and fused kernels can do a
#   LoRA and its projection in one go. With long prompts or large batches, arithmetic
#   counts and starting does not.
# - **The scale.** Claim A2 was tried on `tiny`, with three jobs of its own. What large
#   models do with either, it cannot say.
# - **The paper beside us** (its numbers, not ours). Houlsby and others came within
#   `0.4` points of full fine-tuning on GLUE, with `3.6 %` of the parameters a task, on
#   BERT. LoRA's paper timed adapters in GPT-2 medium on one short sequence, and found
#   steps `20` to `30 %` longer. It compared with LoRA *merged*.
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
# - Houlsby and others, [Parameter-efficient transfer learning for
#   NLP](https://arxiv.org/abs/1902.00751): figure two has the picture from above.
# - Pfeiffer and others, [AdapterFusion](https://arxiv.org/abs/2005.00247): one a layer,
#   and how to combine several.
# - He and others, [Towards a unified view of parameter-efficient transfer
#   learning](https://arxiv.org/abs/2110.04366): adapters, prefixes and LoRA as one
#   family, with a bottleneck *beside* the sublayer.
# - Hu and others, [LoRA](https://arxiv.org/abs/2106.09685): section three on latency,
#   and the appendix with its table.
# - The [adapters](https://github.com/adapter-hub/adapters) library, where bottlenecks
#   live on.
