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
# # Rank, scale, targets: the LoRA family
#
# **At one shared learning rate, LoRA and its relatives look very different; at its own
# learning rate each, they can hardly be told apart.**
#
# **You need** notebooks 00, 01 and 04: the task, intervals and LoRA.
#
# **At the end you can**
#
# - measure an update's size under LoRA's and rsLoRA's scales;
# - say when alpha and the learning rate are one setting;
# - compare targets at an equal number of parameters;
# - write what DoRA (weight), PiSSA (initialization) and LoRA+ (learning rate) change;
# - find the bug that makes a good adapter too weak;
# - choose rank, alpha, targets and learning rate, and say why.
#
# **Only ten minutes?** Write `start("05", quick=True)` below and run all cells. Read
# "The result first", do exercise 5.1, and read "So what do I set?".

# %%
from peft_from_scratch.course import start

lesson = start("05")

# %%
import json
import math
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

import peft_from_scratch as pfs
from peft_from_scratch.course import adapters, curves, finetune, ledger, over_seeds
from peft_from_scratch.course import paired, rank_and_place, rates, runs, scaling
from peft_from_scratch.course import starts
from peft_from_scratch.course.checks import rank_scale_targets as checks

# %% [markdown]
# ## The result first
#
# A comparison at one shared learning rate measures the method and the learning rate at
# once. The table separates the two, for LoRA and four relatives (see idea four) whose
# papers report them ahead of LoRA. We trained all five in SmolLM2, on the orders task
# of notebook 00, at four or five learning rates each. A number is how many of `60`
# validation rows were right, with one seed. A star marks the learning rate that the
# search chose: the most right answers, and of equals the lower loss.

# %%
found = json.loads((runs.FOLDER.parent / "family_search.json").read_text("utf-8"))
family = ("lora", "rslora", "dora", "pissa", "lora-plus")
searches = {n: found["searches"][f"smollm2/orders/{n}"] for n in family}
right = {
    name: {run["setting"]["lr"]: run["correct"] for run in search["runs"]}
    for name, search in searches.items()
}
tried = sorted({lr for by_rate in right.values() for lr in by_rate})
print(f"{'learning rate':13}", *(f"{lr:>7g}" for lr in tried))
for name, by_rate in right.items():
    best = searches[name]["chosen"]["lr"]
    marked = (f"{by_rate.get(lr, '-')}{'*' if lr == best else ' '}" for lr in tried)
    print(f"{name:13}", *(f"{entry:>7}" for entry in marked))

# %% [markdown]
# In the column of LoRA's learning rate, 0.003, the methods differ: PiSSA has 44 rows
# right and LoRA+ has 25. At their own stars all five have 58 or 59. So the column shows
# the cost of a borrowed learning rate, and no difference between methods. The starred
# numbers do not rank the methods either: the same rows chose the learning rate, nearly
# all of them are right, and a difference of a few rows is chance.
#
# Does a setting change what can be learned, or only how far an optimizer step moves the
# model? Most runs ask this of `tiny`, a model of a million parameters. Its tasks turn
# `On Friday Ada found three lamps in Oslo.` into a record. The **gap** is the distance
# of a task from the model's pretraining:
#
# - `gap-0`: nothing is new, `who Ada, did find, …`
# - `gap-1`: a new format, `Oslo - Friday …`
# - `gap-2`: new words too, `Oslo - funek …`
# - `gap-3`: a new language, `sudaf Ada ti bafobu …`
# - `gap-4`: a cipher, `ibsi - rleguw …`
#
# Five textbook claims are on trial. A **rule** turns each result into a verdict, shown
# on a **card**; **holds when** means true under a condition. The verdicts rest on
# **stored runs**, printed as `Shipped`. The **live** cells train short versions, and
# decide nothing.
#
# A **seed** fixes the random draws. Runs with equal seeds are **paired**: we subtract
# them, and give the mean of five differences with its `95 %` interval in brackets. If
# the interval allows two verdicts, the claim is **undecided**: a difference is neither
# shown nor excluded. Losses are in **nats per token**: at `0.04` nats the right token
# gets a probability of `96 %` on average.
#
# ## Idea one: how large is an update?
#
# A larger update at the same learning rate means that training moved the model further.
# This is LoRA with its scale $s$:
#
# $$h = W_0\,x + s\,B\,A\,x \qquad
# s = \frac{\alpha}{r} \;\text{(LoRA)} \qquad
# s = \frac{\alpha}{\sqrt{r}} \;\text{(rsLoRA)}$$
#
# The size of the update, $\rho$, compares what LoRA adds with the output of the frozen
# layer, bias included:
#
# $$\rho = \frac{\operatorname{rms}(s\,B\,A\,x)}{\operatorname{rms}(\text{base}(x))}
# \qquad \operatorname{rms}(y) = \sqrt{\text{mean of } y_i^2}$$
#
# Why two scales? $B A x$ is a sum over $r$ **directions**, each a row of $A$ with its
# column of $B$. With random signs the terms partly cancel, and the sum grows with
# $\sqrt{r}$. If all point the same way, it grows with $r$. The next cell shows both.

# %%
torch.manual_seed(0)
x = torch.randn(2000, 64)
for r in (1, 16, 64):
    A, B = torch.randn(r, 64) / 8, torch.randn(64, r)
    apart = (x @ A.T @ B.T).square().mean().sqrt()
    A, B = A[:1].repeat(r, 1), B[:, :1].repeat(1, r)
    together = (x @ A.T @ B.T).square().mean().sqrt()
    print(f"rank {r:2}: rms {apart:5.1f} with random signs, {together:5.1f} together")

# %% [markdown]
# From rank 1 to 64 the sum grows to 7.8 with random signs, and to 62.0 when all
# directions agree. The scale $\alpha / \sqrt{r}$ undoes the first growth, $\alpha / r$
# the second.
#
# ### Exercise 5.1: the size of an update
#
# Difficulty two of five, importance five of five, about ten minutes. Return $\rho$ as a
# `float`, with each rms over all entries. `base` is the frozen module; `x (…, d_in)`,
# `A (r, d_in)` and `B (d_out, r)` are `float32`. With `alpha=8` and `r=4`, the scale is
# `2` for `rslora=False` and `4` for `True`.
#
# <details><summary>Hint one: a question</summary>
#
# Is $\alpha$ under rsLoRA's root, or only $r$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Both `base(x)` and what is added are `(…, d_out)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `scale = alpha / math.sqrt(r) if rslora else alpha / r`
#
# </details>


# %% tags=["exercise-5.1"]
def my_size(base, A, B, alpha, x, rslora):
    """rms(scale B A x) / rms(base(x)), a number.    A (r, d_in), B (d_out, r)"""
    ### BEGIN SOLUTION
    r = A.shape[0]
    scale = alpha / math.sqrt(r) if rslora else alpha / r
    added = scale * (x @ A.T @ B.T)
    return (added.square().mean() / base(x).square().mean()).sqrt().item()
    ### END SOLUTION


# %% tags=["check-5.1", "points-2"]
checks.update_size(my_size)

# %% [markdown]
# ## On trial: claim L3
#
# *Dividing alpha by the rank makes the size of the update independent of the rank.* We
# fit $\rho \propto r^p$ to LoRAs with the same $\alpha$ and learning rate. The claim
# says that the **exponent** $p$ is 0. Guess $p$.

# %%
lesson.rule("L3")
lesson.predict("5.1", low=None, high=None, unit="(exponent)")

# %% [markdown]
# **Live**: $\rho$ of two ranks, with two seeds, after a fifth of the optimizer steps.

# %%
SHORT = dict(steps=20, warmup=2, test=50, validation=50)
live_sizes = {}
for r in (1, 64):
    chosen = [scaling.config("lora", r, 16, scaling.SIZED_AT, s) for s in (0, 1)]
    live_sizes[r] = [scaling.compute(each | SHORT)["ratio"] for each in chosen]
    print(f"rank {r:2}:", *(f"{size:.3f}" for size in live_sizes[r]), "of the output")

# %% [markdown]
# In **the stored runs**, LoRA has $\alpha = 16$ and rsLoRA $\alpha = 8$. At rank 4 both
# scales are 4, so the lines meet.

# %%
sized = [runs.stored(config) for config in scaling.size_configs("tiny")]
series = {}
for method in ("lora", "rslora"):
    series[method] = []
    for r in scaling.SIZED:
        own = [x.result["ratio"] for x in sized if runs.matches(x, method=method, r=r)]
        series[method].append((r, fmean(own), min(own), max(own)))
series["live, short"] = [(r, fmean(v), min(v), max(v)) for r, v in live_sizes.items()]
figure = curves.lines(
    series,
    x="Rank r, directions",
    y="Size of the update, share of the output",
    title="At one learning rate, a higher rank gets a smaller update",
    subtitle="tiny on gap-3, 100 optimizer steps (live: 20). Bands: range of seeds.",
    log="xy",
    names="foot",
)
powers = {m: over_seeds(scaling.exponents(sized, m))[0] for m in ("lora", "rslora")}
lesson.show(figure, ", ".join(f"{m}: r^{p:+.2f}" for m, p in powers.items()) + ".")

# %%
pairs = zip(live_sizes[1], live_sizes[64], strict=True)
live = over_seeds([math.log(large / small) / math.log(64) for small, large in pairs])
lesson.measured("5.1", live[0])
lesson.live("L3", *live, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L3", guess="5.1")

# %% [markdown]
# LoRA's update shrinks by about `12 %` with each doubling of the rank. rsLoRA's stays
# nearly the same.
#
# ### What the shrinking costs
#
# At a shared learning rate the smaller update costs LoRA a lot; at the best one it
# costs little. These are mean test losses of five stored runs on `gap-3`. The figure's
# learning rate is `0.003`; the best one tried, at every rank, is `0.01`.
#
# | rank | LoRA, `0.003` | rsLoRA, `0.003` | LoRA, `0.01` | rsLoRA, `0.01` |
# |---|---|---|---|---|
# | 1 | `1.43` | `1.80` | `1.00` | `1.07` |
# | 16 | `1.29` | `0.88` | `0.71` | `0.58` |
# | 64 | `1.31` | `0.73` | `0.67` | `0.64` |
#
# At `0.003` LoRA gains almost nothing from rank, and rsLoRA leads by `0.41` nats at
# rank 16 and `0.58` at rank 64. At `0.01` its lead is `0.13` and `0.03`. A finer search
# would tell whether the `0.13` remain. At any one rank, rsLoRA is LoRA with another
# $\alpha$.
#
# ## Idea two: alpha and the learning rate, one setting?
#
# If $\alpha$ and the learning rate $\eta$ did the same thing, you would search only
# one. With $G = \partial L / \partial W$, the gradient of full fine-tuning, the scale
# $s$ enters the gradient of $B$ and then the update:
#
# $$\frac{\partial L}{\partial B} = s\,G A^T, \qquad \Delta W = s\,B A$$
#
# $B$ is zero at initialization, so in the first optimizer step only $B$ moves. Adam
# divides the gradient by its own size, and only the sign is left:
#
# $$\text{SGD:}\;\; \Delta W = -\,\eta\,s^2\; G A^T A \qquad\qquad
# \text{Adam:}\;\; \Delta W = -\,\eta\,s\; \operatorname{sign}(G A^T)\, A$$
#
# You double $\alpha$. How many times as large is the first update under SGD?

# %%
lesson.predict("5.2", low=None, high=None, unit="times as large")


# %%
def first_update(optimizer, lr, alpha, r=4, steps=1):
    """s B A after optimizer steps from LoRA's initialization, on a regression."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 16, generator=draw) for _ in range(2))
    A = nn.Parameter(torch.randn(r, 16, generator=draw) / math.sqrt(48))
    B = nn.Parameter(torch.zeros(16, r))
    moving = optimizer([A, B], lr=lr)
    for _ in range(steps):
        moving.zero_grad()
        (alpha / r * x @ A.T @ B.T - y).square().mean().backward()
        moving.step()
    return (alpha / r * B @ A).detach()


# %%
factors = {}
for name, kind in {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}.items():
    once = first_update(kind, 1e-3, 8)
    factors[name] = (first_update(kind, 1e-3, 16).norm() / once.norm()).item()
    rate = 1e-3 / factors[name]
    same = first_update(kind, rate, 16)
    print(f"{name}: twice alpha, update {factors[name]:.3f} times as large;")
    print(f"  learning rate divided by that: error {(same - once).abs().max():.0e}")
    many = first_update(kind, rate, 16, steps=100)
    off = (many - first_update(kind, 1e-3, 8, steps=100)).norm() / many.norm()
    print(f"  after 100 optimizer steps the updates differ by {off:.1%}")
lesson.measured("5.2", factors["SGD"])

# %% [markdown]
# Twice the alpha makes the first update four times as large under SGD and twice as
# large under Adam. Dividing the learning rate by that restores it. After 100 optimizer
# steps under Adam, the updates differ by 39.9 %. Adam moves $A$ by about $\eta$ each
# time, whatever $s$ is: half the learning rate moves $A$ half as far. SGD hardly moves
# $A$ here. So alpha and the learning rate act as one setting only while $A$ stays near
# its initialization.
#
# ### On trial: claim L7
#
# *Alpha is typically the rank or twice the rank.* The rule asks how far the worse of
# these two is behind the best of four alphas, each with its own search.

# %%
lesson.rule("L7")
tuned = [runs.stored(config) for config in scaling.alpha_configs("tiny")]
cells, series = {}, {}
for alpha in scaling.ALPHAS:
    own = [run for run in tuned if runs.matches(run, alpha=alpha)]
    cells[alpha] = scaling.at_best(own)
    first = [run for run in own if runs.matches(run, seed=0)]
    losses = {x.config["lr"]: x.result["validation_loss"] for x in first}
    series[f"alpha {alpha}"] = [(alpha * lr, losses[lr]) for lr in sorted(losses)]
    best = cells[alpha][0].config["lr"]
    print(f"alpha {alpha:2}: best learning rate {best:5}, product {alpha * best:.2f}")

# %%
figure = curves.lines(
    series,
    x="Alpha times learning rate, dimensionless",
    y="Validation loss, nats per token",
    title="The product of alpha and learning rate does not fix the loss",
    subtitle="LoRA of rank 8 in tiny on gap-3, one seed of the search.",
    log="xy",
    names="foot",
)
lowest = {name: min(rows, key=lambda row: row[1]) for name, rows in series.items()}
said = (f"{name}: {loss:.2f} at {at:.2f}" for name, (at, loss) in lowest.items())
lesson.show(figure, "Lowest loss, and where. " + "; ".join(said) + ".")

# %% [markdown]
# If only the product mattered, the four curves would coincide. Near 0.2, $\alpha = 2$
# has a loss of `2.62` and $\alpha = 64$ has 0.60. At 0.06 the order is reversed, with
# 0.62 and `1.35`. At an equal product, a small $\alpha$ needs a large learning rate,
# which moves $A$ further.
#
# **Live**: two alphas, with two seeds each.

# %%
live_losses = {}
for alpha, lr in ((16, 1e-2), (64, 3e-3)):
    chosen = [scaling.config("lora", 8, alpha, lr, seed) | SHORT for seed in (0, 1)]
    live_losses[alpha] = [finetune.compute(each)["test_loss"] for each in chosen]
differences = [a - b for a, b in zip(*live_losses.values(), strict=True)]
full = ledger.judge(ledger.claim("L7"), "tiny")
print(
    f"stored: {full.measured:.3f} [{full.interval[0]:.3f}, {full.interval[1]:.3f}] nats"
)
lesson.live("L7", *over_seeds(differences), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L7")

# %% [markdown]
# Keep the usual alpha, and spend your runs on the learning rate. Alpha may still
# matter: the interval reaches 0.303 nats. The card's 0.147 nats are for $\alpha = 8$.
# The figure shows only its best seed, with 0.60, which chose the learning rate. The
# other four end at `0.68` to `0.92`.
#
# ## On trial: claim L8
#
# *Thanks to alpha / r, hyperparameters transfer across ranks.* The rule asks what the
# learning rate of rank 4 costs the rank that it suits worst. By which factor does the
# best learning rate change from rank 4 to 64?

# %%
lesson.rule("L8")
lesson.predict("5.3", low=None, high=None, unit="times the learning rate of rank 4")

# %%
moved = [runs.stored(config) for config in scaling.transfer_configs("tiny")]
bests = {}
for method in scaling.ALPHA:
    for r in scaling.RANKS:
        own = [x for x in moved if runs.matches(x, method=method, r=r, seed=0)]
        losses = {x.config["lr"]: x.result["validation_loss"] for x in own}
        bests[method, r] = rates.best_inside(losses)
        shown = "  ".join(f"{lr:g}: {losses[lr]:.2f}" for lr in sorted(losses))
        print(f"{method:6} rank {r:2}, validation loss by learning rate: {shown}")

# %% [markdown]
# All lines have their lowest loss at 0.01. At rank 4 LoRA and rsLoRA have equal scales,
# so equal losses.
#
# **Live**: rank 64 at three learning rates. We chose 40 optimizer steps because with 20
# another learning rate was best. So these runs are no evidence.

# %%
reference, losses = bests["lora", scaling.REFERENCE], {}
for lr in (reference / 3.3, reference, reference * 3):
    chosen = scaling.config("lora", 64, 16, round(lr, 3), 0) | SHORT
    result = finetune.compute(chosen | dict(steps=40, warmup=4))
    losses[chosen["lr"]] = result["validation_loss"], result["test_loss"]
    print(f"rank 64 at {chosen['lr']}: test loss {result['test_loss']:.2f}")
own = min(losses, key=losses.get)
cost = losses[reference][1] - losses[own][1]
lesson.measured("5.3", own / reference)
lesson.live("L8", cost, cost, cost, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L8")

# %% [markdown]
# Every rank chose the same learning rate, so the rule subtracted losses from
# themselves. Neighboring rates are a factor of three apart, and a smaller shift is
# invisible. A finer grid on several seeds would decide L7 and L8.
#
# ## Idea three: where to add LoRA
#
# Compare targets at one budget of parameters, and let the rank follow. A Llama layer
# has seven weight matrices, or **projections**: four in attention (`q_proj`, `k_proj`,
# `v_proj`, `o_proj`), three larger ones in the MLP (`gate_proj`, `up_proj`,
# `down_proj`). LoRA on one costs $r\,(d_{in} + d_{out})$ parameters.

# %%
tiny, tiny_tokenizer = pfs.load_model("tiny", device="cpu")
for name, module in list(pfs.targets.projections(tiny).items())[:7]:
    d_out, d_in = module.weight.shape
    print(f"{name.rpartition('.')[2]:10} {d_out:4} x {d_in:4}: {d_in + d_out:4} a rank")
for place, (targets, r) in rank_and_place.PLACES.items():
    pfs.lora.inject(tiny, r=r, targets=targets)
    count = sum(p.numel() for p in pfs.trainable(tiny).values())
    print(f"{place:10} rank {r:2}: {count:,} parameters")
    pfs.remove(tiny)

# %% [markdown]
# Attention and the MLP have equal budgets. All seven, `both`, exceed it at rank 5; rank
# 4 would fit.
#
# ### Exercise 5.2: the rank for a budget
#
# Difficulty two of five, importance four of five, about ten minutes. Return the largest
# rank, an `int`, at which LoRA on the `targets` of all `layers` trains at most `budget`
# parameters. `shapes` maps each projection's name to `(d_out, d_in)`; `targets` lists
# at least one name. Return `0` if rank one does not fit, and never more than the
# smallest side of all targets. For all of `tiny`, with `layers=4, budget=49_152`,
# return `4`.
#
# <details><summary>Hint one: a question</summary>
#
# What does rank one cost, over all targets and layers?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# For each rank, $A$ has `d_in` parameters and $B$ has `d_out`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `one = layers * sum(sum(shapes[target]) for target in targets)`
#
# </details>


# %% tags=["exercise-5.2"]
def my_rank(shapes, targets, layers, budget):
    """The largest r at which LoRA on `targets` trains at most `budget` numbers."""
    ### BEGIN SOLUTION
    one = layers * sum(sum(shapes[target]) for target in targets)
    smallest_side = min(min(shapes[target]) for target in targets)
    return min(budget // one, smallest_side)
    ### END SOLUTION


# %% tags=["check-5.2", "points-2"]
checks.rank_for_budget(my_rank)

# %% [markdown]
# ### On trial: claim L5
#
# *Attention projections give the best accuracy per parameter; all linear layers are
# better in absolute terms.* At equal parameters, on what percentage of the tasks does
# attention beat the MLP, on average over seeds?

# %%
lesson.rule("L5")
lesson.predict("5.4", low=None, high=None, unit="% of the gaps")

# %%
placed = [runs.stored(config) for config in rank_and_place.place_configs("tiny")]
attention, mlp = (rank_and_place.PLACES[place] for place in ("attention", "mlp"))


def cell(gap, targets, r):
    """A place's runs on a gap, at the learning rate searched for it."""
    own = [x for x in placed if runs.matches(x, task=gap, targets=targets, r=r)]
    return rank_and_place.at_best(own)


# %%
gaps = rank_and_place.GAPS
between = {gap: paired(cell(gap, *mlp), cell(gap, *attention)) for gap in gaps}
figure = curves.lines(
    {
        "MLP minus attention": [(i, *row) for i, row in enumerate(between.values())],
        "no difference": [(0, 0), (4, 0)],
    },
    x="Task, from near to far",
    y="Difference of test loss, nats per token",
    title="At equal parameters, the MLP is ahead on the far tasks",
    subtitle="Above zero attention is better. Five seeds; the band is the interval.",
    control=("no difference",),
    names="foot",
)
figure.axes[0].set_xticks(range(5), gaps)
lesson.show(figure, "; ".join(f"{gap} {d[0]:+.3f}" for gap, d in between.items()))

# %% [markdown]
# On the new language and the cipher the MLP is ahead, by 0.330 and 0.366 nats. On
# `gap-1` and `gap-2` the intervals hold zero. On `gap-1`, the difference comes from
# **stuck** runs: all five in the MLP and two in attention ended near `0.25` nats, the
# other three below `0.10`.
#
# **Live**: two tasks. One seed gives no interval, so the cell prints the whole range.

# %%
won = []
for gap in ("gap-1", "gap-3"):
    tried = [rank_and_place.config(gap, *place, 1e-2, 0) for place in (attention, mlp)]
    losses = [finetune.compute(each | SHORT)["test_loss"] for each in tried]
    won.append(losses[0] < losses[1])
    print(f"{gap}: attention {losses[0]:.2f}, MLP {losses[1]:.2f}")
share = fmean(rank_and_place.wins(placed, attention, mlp))
everywhere = fmean(rank_and_place.wins(placed, rank_and_place.EVERYWHERE, attention))
print(
    f"stored: attention beats the MLP on {share:.0f} %;"
    f" LoRA everywhere, at equal rank, beats attention on {everywhere:.0f} %"
)
lesson.measured("5.4", share)
lesson.live("L5", 100 * fmean(won), 0, 100, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L5", guess="5.4")

# %% [markdown]
# Use the figure. The percentage counts `gap-0`, where attention loses by only `0.0004`
# nats, but on every seed. Without `gap-0`, attention wins on `40 % [23, 57]`:
# undecided, since the verdict changes at 50 %. LoRA everywhere beats attention on 96 %,
# but with more parameters.
#
# At *one* budget, the mean test losses of five stored runs are:
#
# | task | attention, `r=12` | MLP, `r=8` | all, `r=5` | all, `r=4` |
# |---|---|---|---|---|
# | `gap-1` | `0.13` | `0.25` | `0.08` | `0.16` |
# | `gap-2` | `0.52` | `0.54` | `0.39` | `0.41` |
# | `gap-3` | `1.04` | `0.71` | `1.02` | `0.71` |
# | `gap-4` | `2.48` | `2.11` | `2.01` | `2.14` |
#
# All seven at rank 4, below the budget, are at most `0.03` nats behind the better of
# attention and MLP. On `gap-3` rank 5 does worse: its one-seed search chose `0.03`, not
# `0.01`. We looked at rank 4 only after that; new runs should confirm it.
#
# ### On trial: claim L6
#
# *A rank of sixteen is robust; a higher one overfits; a larger domain gap needs a
# higher one.* How far is rank 16 behind the best of four ranks, on the task where it is
# furthest behind?

# %%
lesson.rule("L6")
lesson.predict("5.5", low=None, high=None, unit="nats per token")

# %%
ranked = [runs.stored(config) for config in rank_and_place.rank_configs("tiny")]
many = [run for run in ranked if run.config["n"] == rank_and_place.N]
series = {}
for gap in rank_and_place.GAPS:
    series[gap] = []
    for r in rank_and_place.RANKS:
        own = [run for run in many if runs.matches(run, task=gap, r=r)]
        losses = [x.result["test_loss"] for x in rank_and_place.at_best(own)]
        series[gap].append((r, fmean(losses), min(losses), max(losses)))
figure = curves.lines(
    series,
    x="Rank r, directions",
    y="Test loss, nats per token",
    title="The farther the task, the more a higher rank helps",
    subtitle="LoRA everywhere in tiny, learning rate searched. Bands: five seeds.",
    log="xy",
)
measured = rank_and_place.rank_measured(ranked)
lesson.show(
    figure, f"Smallest rank within 0.05 nats of the best: {measured.figures['needed']}."
)

# %% [markdown]
# The farther the task, the more rank 1 loses against the best rank: `0.000`, `0.05`,
# `0.45`, `0.55` and `1.23` nats, from `gap-0` to `gap-4`. The smallest rank printed for
# `gap-1` is less reliable, because it depends on stuck runs.
#
# Does rank 64 overfit a hundred training rows? The **live** runs are on the cipher.

# %%
few, low, high = rank_and_place.overfit(ranked)
print(f"a hundred rows, rank 64 minus rank 16: {few:+.3f} [{low:+.3f}, {high:+.3f}]")
losses = {}
for r, lr in ((16, 1e-2), (64, 3e-3)):
    chosen = [rank_and_place.config("gap-4", "all-linear", r, lr, s) for s in (0, 1)]
    losses[r] = [finetune.compute(each | SHORT)["test_loss"] for each in chosen]
excess = [a - b for a, b in zip(losses[16], losses[64], strict=True)]
lesson.measured("5.5", measured.value)
lesson.live("L6", *over_seeds(excess), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L6", guess="5.5")

# %% [markdown]
# Rank 16 is a good first choice here. It lost most on the cipher, where rank 64 was
# best. The card's 0.0968 is probably too high, as the largest of five differences.
# Overfitting is open too, at +0.015 nats with a wide interval. More seeds would decide
# both.
#
# ### Negative controls
#
# Would anything added to the model lower the loss? Three controls, at rank 16 on
# `gap-1` with one seed: a random LoRA, never trained, one with an $\alpha$ too small to
# matter, and one trained on shuffled answers.

# %%
plain = rank_and_place.config("gap-1", "all-linear", 16, 1e-2, 0) | SHORT
controls = {
    "LoRA": plain,
    "random, frozen": plain | dict(method="lora-frozen"),
    "alpha nearly zero": plain | dict(alpha=1e-6),
    "shuffled answers": plain | dict(task="gap-1-random"),
}
control_losses = {}
for name, chosen in controls.items():
    control_losses[name] = finetune.compute(chosen)["test_loss"]
    print(f"{name:18} test loss {control_losses[name]:6.2f}")
assert control_losses["LoRA"] < min(list(control_losses.values())[1:])

# %% [markdown]
# All controls end far above LoRA's loss, so training on right answers helps. But
# shuffled answers lower the loss from 3.46 (alpha nearly zero) to 1.46, since they show
# the *form* of an answer. A falling loss alone does not show that the task was learned.
#
# ## Idea four: the family
#
# Each relative changes one thing and, with it, how far an optimizer step moves the
# model. rsLoRA changes the scale, DoRA the form of the weight, PiSSA the
# initialization, LoRA+ the learning rate of $B$. So each needs its own search.
#
# ### DoRA: length and direction
#
# DoRA trains the length and the direction of each weight row separately. The lengths
# are parameters $m$, initialized with those of $W_0$. DoRA scales each row of $V$, the
# weight with its update, to its length in $m$, so $A$ and $B$ can only turn the row:
#
# $$h = \frac{m}{\lVert V \rVert} \odot (V x), \qquad V = W_0 + s\,B A$$
#
# $\lVert V \rVert$ is the length of each *row*. The backward pass holds it constant to
# save memory, which changes gradients, but no output. The next cell updates two rows.

# %%
W0 = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
dW = torch.tensor([[1.0, -2.0], [0.0, 2.0]])
V, m = W0 + dW, W0.norm(dim=1)
W = m[:, None] * V / V.norm(dim=1, keepdim=True)
for old, added, new in zip(W0, V, W, strict=True):
    turned = F.cosine_similarity(old, new, dim=0)
    print(f"length: W0 {old.norm():.2f}, V {added.norm():.2f}, DoRA {new.norm():.2f};")
    print(f"  cosine of DoRA's row with W0's row {turned:.2f}")

# %% [markdown]
# DoRA keeps the row lengths, 5.00 and 1.00, and turns the rows.
#
# ### Exercise 5.3: DoRA's forward pass
#
# Difficulty three of five, importance four of five, about fifteen minutes. Return
# `h (…, d_out)` from `x (…, d_in)`, `W0 (d_out, d_in)`, `A (r, d_in)`, `B (d_out, r)`
# and `m (d_out,)`, all of one dtype, without a bias. Gradients must reach `A`, `B` and
# `m`, with $\lVert V \rVert$ constant. In the first row above, `x = [1.0, 0.0]` gives
# `5 / 4.47 * 4 = 4.47`.
#
# <details><summary>Hint one: a question</summary>
#
# How do you tell autograd that a tensor is a constant?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The lengths of $V$ and `m` are `(d_out,)`; `x @ V.T` is `(…, d_out)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `V = W0 + scale * (B @ A)`
#
# </details>


# %% tags=["exercise-5.3"]
def my_dora(x, W0, A, B, m, scale):
    """m / ‖V‖ ⊙ (V x), V = W0 + scale B A.    x (…, d_in) -> (…, d_out)"""
    ### BEGIN SOLUTION
    V = W0 + scale * (B @ A)
    length = V.norm(dim=1).detach()  # (d_out,)
    return m / length * (x @ V.T)
    ### END SOLUTION


# %% tags=["check-5.3", "points-3"]
checks.dora_forward(my_dora)

# %% [markdown]
# ### PiSSA: initialize with the largest directions
#
# PiSSA trains the largest part of the weight itself. The **singular value
# decomposition** writes $W_0$ as a sum of directions, ordered by size. The first $r$
# become $A$ and $B$; the rest, $W_{res}$, is frozen:
#
# $$W_0 = U S V^T, \quad
# s\,B A = U_r S_r V_r^T, \quad
# W_{res} = W_0 - s\,B A$$
#
# $$A = \sqrt{S_r / s}\;V_r^T \qquad B = U_r\,\sqrt{S_r / s}$$
#
# $U_r$ has the first $r$ columns of $U$, $V_r^T$ the first $r$ rows of $V^T$. The model
# computes the same as before, but trains differently, since $A$ has another size and
# $B$ is not zero. How much of the **energy**, the sum of the squared singular values,
# do eight directions hold?

# %%
model, tokenizer = lesson.load_model()
W0 = model.get_submodule("model.layers.10.self_attn.q_proj").weight.detach()
squares = torch.linalg.svdvals(W0).square()
noise = torch.linalg.svdvals(torch.randn_like(W0)).square()
for name, each in {"q_proj": squares, "random": noise}.items():
    print(
        f"{name}: 8 of {len(each)} hold {each[:8].sum() / each.sum():.1%} of the energy"
    )

# %% [markdown]
# Eight of 576 directions hold 13.3 % of the energy, against 5.3 % in a random matrix.
#
# ### Exercise 5.4: PiSSA's start
#
# Difficulty three of five, importance three of five, about ten minutes. Return
# `W_res (d_out, d_in)`, `A (r, d_in)` and `B (d_out, r)`, in the dtype of `W0`,
# `float32` or `float64`. `scale` is $s$. For a singular value of `8` and `scale=2`,
# both `A` and `B` get the factor `2`.
#
# <details><summary>Hint one: a question</summary>
#
# Which two equal factors have the product $S_r / s$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `root` is `(r,)`. It multiplies the *rows* of `Vt[:r]` and the *columns* of
# `U[:, :r]`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `U, S, Vt = torch.linalg.svd(W0, full_matrices=False)`
#
# </details>


# %% tags=["exercise-5.4"]
def my_pissa(W0, r, scale):
    """(W_res, A, B): W_res + scale B A is W0, and scale B A its best rank-r part."""
    ### BEGIN SOLUTION
    U, S, Vt = torch.linalg.svd(W0, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    A, B = root[:, None] * Vt[:r], U[:, :r] * root
    return W0 - scale * (B @ A), A, B
    ### END SOLUTION


# %% tags=["check-5.4", "points-2"]
checks.pissa_start(my_pissa)

# %% [markdown]
# ### LoRA+: two learning rates
#
# LoRA+ trains $B$ at the learning rate $\lambda\,\eta$ and $A$ at $\eta$; our runs use
# $\lambda = 16$. The paper argues that in wide layers $B$ should move faster. An
# optimizer takes **groups** of parameters for this.
#
# ### Exercise 5.5: LoRA+'s groups
#
# Difficulty two of five, importance three of five, about ten minutes. Return a list of
# two groups, in any order, for `torch.optim.AdamW`: the `B` of every `pfs.lora.LoRA`
# (see notebook 04) in `model` at `lr * ratio`, and all else that trains, such as
# biases, at `lr`. No parameter appears twice, and no frozen one at all. With
# `lr=1e-3, ratio=16`:
# `[{"params": [A, …], "lr": 0.001}, {"params": [B, …], "lr": 0.016}]`.
#
# <details><summary>Hint one: a question</summary>
#
# Which parameters must an optimizer not get?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `id(p)` tells whether two names mean one parameter.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `fast = [m.B for m in model.modules() if isinstance(m, pfs.lora.LoRA)]`
#
# </details>


# %% tags=["exercise-5.5"]
def my_groups(model, lr, ratio):
    """Groups for AdamW: every LoRA's B at lr · ratio, all else that trains at lr."""
    ### BEGIN SOLUTION
    fast = [m.B for m in model.modules() if isinstance(m, pfs.lora.LoRA)]
    known = {id(p) for p in fast}
    training = [p for p in model.parameters() if p.requires_grad]
    slow = [p for p in training if id(p) not in known]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    ### END SOLUTION


# %% tags=["check-5.5", "points-2"]
checks.loraplus_groups(my_groups)

# %% [markdown]
# LoRA+'s first update is $\lambda$ times as large, as with a larger $\alpha$. So expect
# a lower best learning rate.
#
# ## Now with the library
#
# PEFT has the switches `use_rslora` and `use_dora`. We fill our adapter with random
# values, save it, load it in PEFT, and compare all logits.

# %%
from tempfile import TemporaryDirectory

import peft

task = pfs.tasks.load_task("orders")
encode = pfs.templates.encode_rows
rows = encode(tokenizer, task.instruction, task.test.select(range(2)), template="chat")
switches = {"rslora": (pfs.lora, {"rslora": True}), "dora": (pfs.dora, {})}
with TemporaryDirectory() as folder:
    for name, (method, options) in switches.items():
        method.inject(model, r=16, alpha=1, **options)
        finetune.randomize(model)
        ours = starts.logits(model, rows)
        pfs.save(model, f"{folder}/{name}")
        pfs.remove(model)
        theirs = peft.PeftModel.from_pretrained(model, f"{folder}/{name}")
        gap = starts.largest_difference(starts.logits(theirs, rows), ours)
        print(f"{name}: the largest difference of a logit is {gap:.0e}")
        assert gap < 1e-3
        model = theirs.unload()

# %% [markdown]
# PEFT and our code agree up to rounding.
#
# ### Break it on purpose
#
# This loader has one wrong line, as several real programs had. The cell loads a LoRA,
# then an rsLoRA, and prints the mean $\rho$ of each. Find the line.


# %%
def broken_load(model, folder):
    pfs.load(model, folder)
    config = json.loads(Path(folder, "adapter_config.json").read_text("utf-8"))
    for module in adapters(model).values():
        module.scale = config["lora_alpha"] / config["r"]


near = pfs.tasks.load_task("gap-1").test.select(range(8))
batch = pfs.loss.batch_of(encode(tiny_tokenizer, "", near, template="raw"), "cpu")
with TemporaryDirectory() as folder:
    for rslora in (False, True):
        pfs.lora.inject(tiny, r=16, alpha=4, rslora=rslora)
        finetune.randomize(tiny)
        right = fmean(scaling.update_ratios(tiny, batch).values())
        pfs.save(tiny, f"{folder}/{rslora}")
        pfs.remove(tiny)
        broken_load(tiny, f"{folder}/{rslora}")
        read = fmean(scaling.update_ratios(tiny, batch).values())
        print(f"update {right:.2f} when saved, {read:.2f} when loaded")
        pfs.remove(tiny)

# %% [markdown]
# The last line of `broken_load` ignores the flag `use_rslora`. The rsLoRA comes back
# too weak by $\sqrt{r}$, which is 4 at rank 16, without any error. A loader should
# **refuse** a field that it does not know.
#
# ## So what do I set?
#
# Search the learning rate first: no other setting moved the results more.
#
# - **Learning rate: search it.** Try rates a factor of three apart, then finer ones on
#   several seeds. Known: one-seed searches misled us.
# - **Method: LoRA.** Known: most of rsLoRA's lead vanished at the best learning rate.
#   Not known: whether a relative is a little better.
# - **Targets: all linear layers.** Known: at one budget, near the better of attention
#   and MLP. Not known: whether larger models agree.
# - **Rank: 16, more for a task far from pretraining.** Known: rank 1 lost more, the
#   farther the task. Not known: when a higher rank overfits.
# - **Alpha: the rank or twice the rank, then keep it.** Known: at first it acts as a
#   learning rate. Not known: which is best.
#
# After any change, search the learning rate again. Only the opening table comes from
# SmolLM2; test the rest on your model.
#
# ## Quiz
#
# **1. What does a comparison at one learning rate compare?**
#
# <details><summary>The methods, since all else is equal</summary>
#
# No. The same learning rate moves each method differently.
#
# </details>
# <details><summary>The methods and how well that learning rate suits each</summary>
#
# Right. The opening table separates the two.
#
# </details>
# <details><summary>Nothing that can be repeated</summary>
#
# No. It can be repeated.
#
# </details>
#
# **2. You double alpha. Under SGD, which learning rate gives the same first update?**
#
# <details><summary>Half of it</summary>
#
# No. That is Adam's answer.
#
# </details>
# <details><summary>A quarter of it</summary>
#
# Right. The scale enters the gradient of $B$ and again the update.
#
# </details>
# <details><summary>The same</summary>
#
# No. The update would be four times as large.
#
# </details>
#
# **3. A loader ignores `use_rslora`. Which alpha in the file repairs this at rank 16?**
#
# <details><summary>Sixteen times as much</summary>
#
# No. The update would be four times too large.
#
# </details>
# <details><summary>Four times as much</summary>
#
# Right. $4\,\alpha / 16 = \alpha / \sqrt{16}$. Remove the flag too.
#
# </details>
# <details><summary>None: train again</summary>
#
# No. Only the scale is wrong.
#
# </details>
#
# **4. What must the file of a trained DoRA hold besides $A$ and $B$?**
#
# <details><summary>Nothing</summary>
#
# No. The lengths $m$ were trained too.
#
# </details>
# <details><summary>The lengths $m$</summary>
#
# Right. $W_0$ stays in the pretrained model.
#
# </details>
# <details><summary>The lengths $m$ and $\lVert V \rVert$</summary>
#
# No. $W_0$, $A$ and $B$ give $\lVert V \rVert$.
#
# </details>
#
# **5. Learning rates a factor of three apart give the same best one for every rank.
# What follows?**
#
# <details><summary>The best learning rate does not depend on the rank</summary>
#
# No. It may change by a factor of two, unseen.
#
# </details>
# <details><summary>If it changes, the grid is too coarse to show it</summary>
#
# Right. That is less than independence.
#
# </details>
# <details><summary>The search was broken</summary>
#
# No. Its answer is only coarse.
#
# </details>
#
# ### In your own words
#
# A colleague says: "At alpha 16 and learning rate 0.003, rank 64 was no better than
# rank 8. So rank does not matter here." Find the confound, and plan at most eight runs
# that test the conclusion.
#
# <details><summary>A model answer</summary>
#
# The scale fell with the rank, from `16 / 8 = 2` to `16 / 64 = 0.25`, so rank 64
# trained with a smaller update. Try both ranks at `0.01` and `0.03`: four runs. Add two
# seeds for each at its best learning rate: four more. I agree if the interval of the
# paired differences excludes a gain that would matter.
#
# </details>
#
# ### Transfer
#
# You trained a PiSSA of rank eight. Which rank, $A$ and $B$ must an ordinary LoRA have
# to do the same to the *original* weight?
#
# <details><summary>A model answer</summary>
#
# The change is $s\,(B A - B_0 A_0)$, with the initial $A_0$ and $B_0$: two matrices of
# rank eight, so rank sixteen suffices. Stack the rows of $A$ and $A_0$, and the columns
# of $B$ and $-B_0$. Double $\alpha$ with the rank, to keep the scale.
#
# </details>
#
# ## Limits
#
# `tiny` has layers of width 128. rsLoRA and LoRA+ are meant for large ranks and wide
# layers.
#
# ## Your guesses
#
# If you are nine tenths sure of each range, nine of ten measured values should fall
# into it.

# %%
lesson.calibration()

# %% [markdown]
# ## Receipt

# %%
lesson.receipt()

# %% [markdown]
# ## Where to go next
#
# - Kalajdzievski, [A rank stabilization scaling factor for fine-tuning with
#   LoRA](https://arxiv.org/abs/2312.03732), rsLoRA.
# - Hayou and others, [LoRA+](https://arxiv.org/abs/2402.12354).
# - Liu and others, [DoRA](https://arxiv.org/abs/2402.09353), and Meng and others,
#   [PiSSA](https://arxiv.org/abs/2404.02948).
# - Which layers matter: Biderman and others, [LoRA learns less and forgets
#   less](https://arxiv.org/abs/2405.09673); Dettmers and others,
#   [QLoRA](https://arxiv.org/abs/2305.14314).
# - The ignored flag: [TensorRT-LLM, issue
#   1668](https://github.com/NVIDIA/TensorRT-LLM/issues/1668), and [vLLM, issue
#   10798](https://github.com/vllm-project/vllm/issues/10798).
