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
# learning rate each, most of the difference is gone, but not all of it.**
#
# **You need** notebooks 00, 01 and 04: the task, intervals and LoRA.
#
# **At the end you can**
#
# - measure an update's size under LoRA's and rsLoRA's scales;
# - judge two methods at their own learning rates, or say that the runs cannot;
# - say when alpha and the learning rate are one setting;
# - compare targets at an equal number of parameters;
# - write DoRA's forward pass, and find the bug that makes a good adapter too weak;
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
from tempfile import TemporaryDirectory

import peft
import torch
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.course import adapters, family, family_runs, finetune
from peft_from_scratch.course import over_seeds, own_rates, rank_and_place, rates
from peft_from_scratch.course import runs, scaling, starts, tuning_pictures
from peft_from_scratch.course import tuning_runs, wilson
from peft_from_scratch.course.checks import rank_scale_targets as checks

# %% [markdown]
# ## The result first
#
# Four relatives of LoRA are ahead of it in their papers. A comparison at one learning
# rate measures the method and the learning rate at once. So we trained all five in
# SmolLM2 on the orders task of notebook 00, at four or five learning rates each. The
# picture has every run. (rsLoRA is explained in idea one, and DoRA, PiSSA and LoRA+ in
# idea four. For now they are four methods with names.)

# %%
found = json.loads((runs.FOLDER.parent / "family_search.json").read_text("utf-8"))
keys = ("lora", "rslora", "dora", "pissa", "lora-plus")
names = dict(zip(("LoRA", "rsLoRA", "DoRA", "PiSSA", "LoRA+"), keys, strict=True))
searches = {n: found["searches"][f"smollm2/orders/{key}"] for n, key in names.items()}
lesson.show(*tuning_runs.search_grid(searches))

# %% [markdown]
# In the dashed column the methods differ: PiSSA has 44 rows right and LoRA+ has 25. At
# their stars all five have 58 or 59. So the column shows the cost of a borrowed
# learning rate. The stars do not rank the methods. A difference of one row is chance,
# there was one seed, and the rows that chose the learning rates also gave these scores.
#
# Most runs below use `tiny`, a model of a million parameters. Its tasks turn `On Friday
# Ada found three lamps in Oslo.` into a record. The **gap** is the distance of a task
# from the model's pretraining:
#
# - `gap-0`: nothing is new, `who Ada, did find, …`
# - `gap-1`: a new format, `Oslo - Friday …`
# - `gap-2`: new words too, `Oslo - funek …`
# - `gap-3`: a new language, `sudaf Ada ti bafobu …`
# - `gap-4`: a cipher, `ibsi - rleguw …`
#
# Five textbook claims and a newer one are on trial. A **rule** turns a result into a
# verdict, shown on a **card**; **holds when** means true under a condition. Verdicts
# rest on **stored runs**, printed as `Shipped`. The **live** cells train short
# versions, and decide nothing.
#
# A **seed** fixes the random draws. Runs with equal seeds are **paired**: we subtract
# them, and give the mean difference with its `95 %` interval in brackets. If the
# interval allows two verdicts, the claim is **undecided**. Losses are in **nats per
# token**: at `0.04` nats the right token gets a probability of `96 %` on average.
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
# With $\alpha = 8$ and $r = 4$, the scale is 2 in LoRA and 4 in rsLoRA. The size of the
# update, $\rho$, compares what LoRA adds with the output of the frozen layer, bias
# included:
#
# $$\rho = \frac{\operatorname{rms}(s\,B\,A\,x)}{\operatorname{rms}(\text{base}(x))}
# \qquad \operatorname{rms}(y) = \sqrt{\text{mean of } y_i^2}$$
#
# ### Exercise 5.1: the size of an update
#
# Difficulty two of five, importance five of five, about ten minutes. Return $\rho$ as a
# `float`, with each rms over all entries. `base` is the frozen module; `x (…, d_in)`,
# `A (r, d_in)` and `B (d_out, r)` are `float32`; `rslora` is `True` or `False`. If the
# base gives `[3.0, 4.0]` and the update is `[0.6, 0.8]`, $\rho$ is `0.2`. Your function
# draws the next picture.
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
# <details><summary>Hint three: the structure</summary>
#
# The scale, then what is added, then one rms over the other.
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
# Why are there two scales? $B A x$ is a sum over $r$ **directions**, each a row of $A$
# with its column of $B$. Independent directions partly cancel, so the sum grows with
# $\sqrt{r}$. If all point the same way, it grows with $r$.

# %%
size = lesson.mine(my_size, checks.update_size_by)
torch.manual_seed(0)
base, x = nn.Linear(64, 64), torch.randn(1000, 64)
names = {"LoRA": False, "rsLoRA": True}
sides = {s: {n: [] for n in names} for s in ("Independent directions", "All agree")}
for r in (1, 4, 16, 64):
    A, B = torch.randn(r, 64) / 8, torch.randn(64, r) / 8
    same = A[:1].repeat(r, 1), B[:, :1].repeat(1, r)
    for side, pair in zip(sides, ((A, B), same), strict=True):
        for name, rslora in names.items():
            sides[side][name].append((r, size(base, *pair, 1, x, rslora)))
lesson.show(*tuning_runs.two_scales(sides))

# %% [markdown]
# rsLoRA keeps the size if the directions are independent. LoRA keeps it if they agree.
# Training decides which case is nearer.
#
# ## On trial: claim L3
#
# *Dividing alpha by the rank makes the size of the update independent of the rank.* We
# fit $\rho \propto r^p$ to LoRAs with the same $\alpha$ and learning rate. The claim
# says that the **exponent** $p$ is 0; independent directions would give `-0.5`. Guess
# $p$.

# %%
lesson.rule("L3")
lesson.predict("5.1", low=None, high=None, unit="(exponent)")

# %% [markdown]
# **Live**: $\rho$ of two ranks, with two seeds, after a fifth of the optimizer steps.
# In **the stored runs**, LoRA has $\alpha = 16$ and rsLoRA $\alpha = 8$. At rank 4 both
# scales are 4, so the curves must meet there.

# %%
SHORT = dict(steps=20, warmup=2, test=50, validation=50)
live_sizes = {}
for r in (1, 64):
    each = [scaling.config("lora", r, 16, scaling.SIZED_AT, s) for s in (0, 1)]
    live_sizes[r] = [scaling.compute(config | SHORT)["ratio"] for config in each]
sized = [runs.stored(config) for config in scaling.size_configs("tiny")]
lesson.show(*tuning_runs.sizes(sized, live_sizes))

# %%
pairs = zip(live_sizes[1], live_sizes[64], strict=True)
live = over_seeds([math.log(large / small) / math.log(64) for small, large in pairs])
lesson.measured("5.1", live[0])
lesson.live("L3", *live, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("L3", guess="5.1")

# %% [markdown]
# LoRA's update shrinks by about `12 %` with each doubling of the rank, and rsLoRA's
# hardly does. The right panel shows the price: at 0.003 LoRA gains little from more
# directions. But this is one learning rate for all, as in the dashed column.
#
# ## rsLoRA is a learning rate in disguise
#
# At any one rank, rsLoRA is LoRA with another $\alpha$. So its lead may be the learning
# rate's. A fair comparison gives each method its own search. You now write its judge.
#
# ### Exercise 5.2: a fair winner
#
# Difficulty four of five, importance five of five, about twenty minutes. `runs` is a
# list of dicts, in any order, of exactly two methods:
# `{"method": "lora", "lr": 0.01, "seed": 0, "validation": 0.7, "test": 0.8}`. Both
# losses are better if lower. The search ran with seed 0: every method has a run at each
# learning rate of its own grid. Other seeds were run at some learning rates only.
# Return a `str`:
#
# - `"search further"` if a method's own learning rate is an end of its grid. Its own
#   learning rate is the one with the smallest validation loss at seed 0. An end is the
#   smallest or the largest learning rate that the method was tried at;
# - else the name of the method with the lower test loss at its own learning rate, if
#   the `95 %` interval of the paired differences excludes zero;
# - else `"undecided"`.
#
# At the two learning rates that you compare, leave out a seed that only one method has.
# At least two seeds remain.
# `over_seeds(values)` gives the mean, the low and the high end of the interval. For
# differences `a - b` of `[-0.11, -0.09, -0.10]`, `a` wins.
#
# <details><summary>Hint one: a question</summary>
#
# Which loss may choose, and which may judge? What if the best is at an end?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# A dict `{seed: test loss}` for each method makes pairs easy.
#
# </details>
# <details><summary>Hint three: the structure</summary>
#
# For each method: its grid with seed 0, its best, the ends, its test losses there. Then
# pairs of equal seeds, one interval, three answers.
#
# </details>


# %% tags=["exercise-5.2"]
def my_winner(runs):
    """The better of two methods, "undecided" or "search further"."""
    ### BEGIN SOLUTION
    at_own = {}
    for name in sorted({run["method"] for run in runs}):
        own = [run for run in runs if run["method"] == name]
        grid = {run["lr"]: run["validation"] for run in own if run["seed"] == 0}
        lr = min(grid, key=grid.get)
        if lr in (min(grid), max(grid)):
            return "search further"
        at_own[name] = {run["seed"]: run["test"] for run in own if run["lr"] == lr}
    (a, first), (b, second) = at_own.items()
    _, low, high = over_seeds([first[s] - second[s] for s in first if s in second])
    return "undecided" if low <= 0 <= high else a if high < 0 else b
    ### END SOLUTION


# %% tags=["check-5.2", "points-4"]
checks.fair_winner(my_winner)

# %% [markdown]
# ## On trial: claim L8
#
# *Thanks to alpha / r, hyperparameters transfer across ranks.* The rule takes the
# learning rate that was searched at rank 8 to ranks 1 and 64. It asks how much higher
# the test loss is there than at the rank's own learning rate, where that costs more.
# The search has finer steps, of a factor of `1.8`, and three seeds. Eight other seeds
# give the losses.

# %%
lesson.rule("L8")
lesson.predict("5.2", low=None, high=None, unit="nats per token")

# %%
by_rank = [runs.stored(config) for config in own_rates.rank_configs("tiny")]
for r, pool in own_rates.rank_pools(by_rank).items():
    means = {lr: fmean(losses) for lr, losses in sorted(pool.table.items())}
    shown = "  ".join(f"{lr:g}: {loss:.2f}" for lr, loss in means.items())
    print(f"rank {r:2}, validation loss by learning rate: {shown}")
for r, (cost, low, high) in own_rates.transfer_costs(by_rank).items():
    print(
        f"rank {r:2} at rank 8's learning rate: {cost:+.3f} [{low:+.3f}, {high:+.3f}]"
    )
lesson.measured("5.2", own_rates.rank_measured(by_rank).value)

# %% [markdown]
# All three ranks chose the same learning rate, 0.01. So rank 8's learning rate cost
# nothing at ranks 1 and 64. But the choice is not sure: at ranks 1 and 8, 0.006 comes
# close, and other draws of the search seeds choose it. At rank 64 that would cost
# about 0.087 nats, so the interval reaches there.
#
# **Live**: two ranks at two learning rates, with two seeds and 20 optimizer steps.

# %%
tried = {}
for r in (4, 64):
    for lr in (1e-2, 3e-2):
        each = [scaling.config("lora", r, 16, lr, seed) | SHORT for seed in (0, 1)]
        tried[r, lr] = [finetune.compute(config)["test_loss"] for config in each]
        shown = ", ".join(f"{loss:.2f}" for loss in tried[r, lr])
        print(f"rank {r:2} at {lr}: test losses {shown}")
costs = [a - b for a, b in zip(tried[64, 1e-2], tried[64, 3e-2], strict=True)]
lesson.live("L8", *over_seeds(costs), scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("L8")

# %% [markdown]
# In these short runs, rank 4 does better at 0.01 and rank 64 at 0.03, with both seeds.
# The longer shipped runs chose 0.01 at every rank. So the best learning rate can move
# with the rank, and with the number of optimizer steps.
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


lesson.predict("5.3", low=None, high=None, unit="times as large")

# %%
factors = {}
for name, kind in {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}.items():
    once = first_update(kind, 1e-3, 8)
    factors[name] = (first_update(kind, 1e-3, 16).norm() / once.norm()).item()
    print(f"{name}: twice alpha, update {factors[name]:.3f} times as large")
    rate = 1e-3 / factors[name]
    many = first_update(kind, rate, 16, steps=100)
    off = (many - first_update(kind, 1e-3, 8, steps=100)).norm() / many.norm()
    print(f"  learning rate divided by that, 100 steps: updates differ by {off:.1%}")
    same = torch.allclose(first_update(kind, rate, 16), once, atol=1e-6)
    lesson.control("Divided by it, the first update is the same.", same)
lesson.measured("5.3", factors["SGD"])

# %% [markdown]
# Twice the alpha makes the first update four times as large under SGD and twice as
# large under Adam. Dividing the learning rate by that restores it. But after 100
# optimizer steps under Adam, the updates differ by 39.9 %. Adam moves $A$ by about
# $\eta$ each time, whatever $s$ is, so half the learning rate moves $A$ half as far.
# Under SGD, $A$ hardly moves here. So alpha and the learning rate act as one setting
# only while $A$ stays near its initialization.
#
# ### On trial: claim L7
#
# *Alpha is typically the rank or twice the rank.* The rule asks how far the worse of
# these two is behind the best of four alphas, each with its own search.

# %%
lesson.rule("L7")
tuned = [runs.stored(config) for config in own_rates.alpha_configs("tiny")]
lesson.show(*tuning_runs.alphas(tuned))

# %% [markdown]
# If only the product mattered, the four curves would coincide. From $\alpha = 2$ to 64,
# alpha grows `32`-fold, but the chosen learning rate falls only from 0.03 to 0.003. So
# the product triples, from 0.06 to 0.19. The lowest losses hardly differ: they lie
# between 0.46 and 0.51, and the bars of the seeds overlap.
#
# **Live**: two alphas, with two seeds each.

# %%
live_losses = {}
for alpha, lr in ((16, 1e-2), (64, 3e-3)):
    each = [scaling.config("lora", 8, alpha, lr, seed) | SHORT for seed in (0, 1)]
    live_losses[alpha] = [finetune.compute(config)["test_loss"] for config in each]
differences = [a - b for a, b in zip(*live_losses.values(), strict=True)]
lesson.live("L7", *over_seeds(differences), scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("L7")

# %% [markdown]
# In the mean, $\alpha = 64$ was ahead of the usual alphas by 0.0653 nats. But the
# interval holds zero, and reaches 0.173. Keep the usual alpha, and spend your runs on
# the learning rate.
#
# ## Idea three: where to add LoRA
#
# Compare targets at one budget of parameters, and let the rank follow. A Llama layer
# has seven weight matrices, or **projections**: four in attention (`q_proj`, `k_proj`,
# `v_proj`, `o_proj`), three larger ones in the MLP (`gate_proj`, `up_proj`,
# `down_proj`). LoRA on one costs $r\,(d_{in} + d_{out})$ parameters: at rank 4, `1,024`
# for a projection of `128` by `128`.
#
# ### Exercise 5.3: the rank for a budget
#
# Difficulty two of five, importance four of five, about eight minutes. Return the
# largest rank, an `int`, at which LoRA on the `targets` of all `layers` trains at most
# `budget` parameters. `shapes` maps each projection's name to `(d_out, d_in)`;
# `targets` lists at least one name. Return `0` if rank one does not fit, and never more
# than the smallest side of all targets. For two targets of shape `(6, 4)`, `layers=3`
# and `budget=130`, return `2`. Your function sets the ranks of the next trial.
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
# <details><summary>Hint three: the structure</summary>
#
# The cost of rank one, the smallest side, and the smaller of two limits.
#
# </details>


# %% tags=["exercise-5.3"]
def my_rank(shapes, targets, layers, budget):
    """The largest r at which LoRA on `targets` trains at most `budget` parameters."""
    ### BEGIN SOLUTION
    one = layers * sum(sum(shapes[target]) for target in targets)
    smallest_side = min(min(shapes[target]) for target in targets)
    return min(budget // one, smallest_side)
    ### END SOLUTION


# %% tags=["check-5.3", "points-2"]
checks.rank_for_budget(my_rank)

# %%
fit = lesson.mine(my_rank, checks.rank_within)
tiny, tiny_tokenizer = pfs.load_model("tiny", device="cpu")
first_layer = list(pfs.targets.projections(tiny).items())[:7]
shapes = {n.rpartition(".")[2]: tuple(m.weight.shape) for n, m in first_layer}
groups = {"attention": [*shapes][:4], "MLP": [*shapes][4:], "all linear": [*shapes]}
ranks, places, counts = {}, {}, []
for name, targets in groups.items():
    ranks[name] = r = fit(shapes, targets, 4, 49_152)
    pfs.lora.inject(tiny, r=r, targets=targets)
    counts.append(sum(p.numel() for p in pfs.trainable(tiny).values()))
    pfs.remove(tiny)
    places[f"{name}, rank {r}: {counts[-1]:,} parameters"] = targets, r
lesson.control("No choice is over the budget.", max(counts) <= 49_152)
figure = tuning_pictures.target_rows(
    shapes,
    places,
    title="One budget, three places: more targets, lower rank",
    subtitle="To scale: a colored area is a number of parameters.",
)
lesson.show(figure, "; ".join(places) + ".")

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
ranked = [runs.stored(config) for config in rank_and_place.rank_configs("tiny")]
kinds = ("attention", "mlp", "all-linear")
spots = dict(zip(ranks, zip(kinds, ranks.values(), strict=True), strict=True))
cells = tuning_runs.at_targets([*placed, *ranked], spots)
for gap, row in cells.items():
    means = {n: fmean(x.result["test_loss"] for x in own) for n, own in row.items()}
    shown = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    print(f"{gap}, mean test loss in nats per token: {shown}")
lesson.show(*tuning_runs.targets(cells))

# %% [markdown]
# On the new language and the cipher the MLP is ahead, by 0.330 and 0.366 nats, and so
# are all linear layers. On `gap-1` and `gap-2` the intervals of MLP hold zero.
#
# **Live**: two tasks with two seeds. Attention can win four times, and the interval of
# its share is Wilson's, from notebook 00.

# %%
won = []
for gap in ("gap-1", "gap-3"):
    losses = []
    for place in (("attention", 12), ("mlp", 8)):
        each = [rank_and_place.config(gap, *place, 1e-2, s) | SHORT for s in (0, 1)]
        losses.append([finetune.compute(config)["test_loss"] for config in each])
    gained = [b - a for a, b in zip(*losses, strict=True)]
    won += [each > 0 for each in gained]
    mean, low, high = over_seeds(gained)
    print(f"{gap}: MLP minus attention {mean:+.2f} [{low:+.2f}, {high:+.2f}] nats")
share = rank_and_place.wins(placed, ("attention", 12), ("mlp", 8))
lesson.measured("5.4", fmean(share))
ends = [100 * end for end in wilson(sum(won), len(won))]
lesson.live("L5", 100 * fmean(won), *ends, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("L5", guess="5.4")

# %% [markdown]
# The percentage on the card counts tasks, and a tiny difference on `gap-0` counts as
# much as a large one. The figure shows the sizes, so decide by the figure. All linear
# layers have the fewest parameters, and are nowhere clearly behind the better of the
# others. We added them after the verdict, so new runs should confirm this.
#
# ### On trial: claim L6
#
# *A rank of sixteen is robust; a higher one overfits; a larger domain gap needs a
# higher one.* How far is rank 16 behind the best of four ranks, on the task where it is
# furthest behind? And does rank 64 overfit a hundred training rows? The printed line
# has the stored answer; the **live** runs are on the cipher.

# %%
lesson.rule("L6")
lesson.predict("5.5", low=None, high=None, unit="nats per token")

# %%
lesson.show(*tuning_runs.excess_by_rank(ranked))
few, low, high = rank_and_place.overfit(ranked)
print(f"a hundred rows, rank 64 minus rank 16: {few:+.3f} [{low:+.3f}, {high:+.3f}]")
losses = {}
for r, lr in ((16, 1e-2), (64, 3e-3)):
    each = [rank_and_place.config("gap-4", "all-linear", r, lr, s) for s in (0, 1)]
    losses[r] = [finetune.compute(config | SHORT)["test_loss"] for config in each]
excess = [a - b for a, b in zip(losses[16], losses[64], strict=True)]
lesson.measured("5.5", rank_and_place.rank_measured(ranked).value)
lesson.live("L6", *over_seeds(excess), scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("L6", guess="5.5")

# %% [markdown]
# Rank 1 loses nothing on `gap-0` and 1.23 nats on the cipher. Rank 16 is a good first
# choice. It lost most on the cipher, where rank 64 was best. The card's 0.0968 is the
# largest of five differences, so it is probably too high. Overfitting is open, at
# +0.015 nats with a wide interval.
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
ended = {name: finetune.compute(each)["test_loss"] for name, each in controls.items()}
for name, loss in ended.items():
    print(f"{name:18} test loss {loss:6.2f}")
others = [loss for name, loss in ended.items() if name != "LoRA"]
far = ended["LoRA"] < 0.5 * min(others)
lesson.control("LoRA ends below half the loss of every control.", far)

# %% [markdown]
# Training on right answers is what helps. But shuffled answers lower the loss from 3.46
# (alpha nearly zero) to 1.46, since they show the *form* of an answer. A falling loss
# alone does not show that the task was learned.
#
# ## Idea four: the rest of the family
#
# Each relative changes one thing and, with it, how far an optimizer step moves the
# model. So each needs its own search.
#
# - **rsLoRA** changes the scale: $s = \alpha / \sqrt{r}$.
# - **DoRA** changes the form of the weight, as shown below.
# - **PiSSA** changes the initialization: $s\,B A$ starts as the $r$ largest singular
#   directions of $W_0$, and the rest of $W_0$ is frozen.
# - **LoRA+** changes the learning rate of $B$ to $\lambda\,\eta$, here with
#   $\lambda = 16$.
#
# DoRA trains the length and the direction of each weight row separately. The lengths
# are parameters $m$, initialized with those of the rows of $W_0$:
#
# $$h = \frac{m}{\lVert V \rVert} \odot (V x), \qquad V = W_0 + s\,B A$$
#
# $\lVert V \rVert$ is the length of each *row*, so $A$ and $B$ can only turn a row. The
# backward pass holds it constant to save memory, which changes gradients, but no
# output. Take one row of $W_0$, `[3, 4]`, of length 5, and the update `[1, -2]`. Then
# $V$ is `[4, 2]` of length `4.47`, and DoRA's row is `5 / 4.47` times it.
#
# ### Exercise 5.4: DoRA's forward pass
#
# Difficulty three of five, importance four of five, about fifteen minutes. Return
# `h (…, d_out)` from `x (…, d_in)`, `W0 (d_out, d_in)`, `A (r, d_in)`, `B (d_out, r)`
# and `m (d_out,)`, all of one dtype, without a bias. Gradients must reach `A`, `B` and
# `m`, with $\lVert V \rVert$ constant. In the row above, `x = [1.0, 0.0]` gives
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
# <details><summary>Hint three: the structure</summary>
#
# $V$ first, then the constant lengths of its rows, then one product.
#
# </details>


# %% tags=["exercise-5.4"]
def my_dora(x, W0, A, B, m, scale):
    """m / ‖V‖ ⊙ (V x), V = W0 + scale B A.    x (…, d_in) -> (…, d_out)"""
    ### BEGIN SOLUTION
    V = W0 + scale * (B @ A)
    length = V.norm(dim=1).detach()  # (d_out,)
    return m / length * (x @ V.T)
    ### END SOLUTION


# %% tags=["check-5.4", "points-3"]
checks.dora_forward(my_dora)

# %% [markdown]
# ## On trial: claim X1
#
# *At learning rates of their own, LoRA's relatives end no more than 2 % ahead of it.*
# This is the opening picture again, as a trial. All five methods get the same finer
# search: learning rates a factor of `1.8` apart, three seeds each. Eight other seeds
# then compare them. So no seed that chose a learning rate gives a score.

# %%
lesson.rule("X1")
lesson.predict("5.6", low=None, high=None, unit="nats per token")

# %%
trial = [runs.stored(config) for config in family.configs("tiny")]
lesson.show(*family_runs.valleys(trial))
lesson.show(*family_runs.leads(trial))
judge = lesson.mine(my_winner, checks.winner)
for method, name in family.RELATIVES.items():
    pair = tuning_runs.records(trial, family.LORA, method)
    print(f"LoRA or {name}? The judge of exercise 5.2 says: {judge([*pair])}")

# %% [markdown]
# The valleys lie at different learning rates, from 0.003 for LoRA+ to 0.01 for LoRA.
# At LoRA's, LoRA+ looks useless, 2.48 nats behind; at its own it is 0.13 ahead. rsLoRA
# goes from 0.04 behind to 0.09 ahead. DoRA and PiSSA stay, since they chose LoRA's. So
# a shared learning rate can turn a ranking around.
#
# The judge takes the chosen learning rates as given, and calls three relatives better.
# The intervals of the picture are wider. They include that other search seeds might
# have chosen other learning rates.
#
# **Live**: LoRA and rsLoRA at their own learning rates, with two seeds and 20 optimizer
# steps.

# %%
pools, ended = family.pools(trial), {}
for method in ("lora", "rslora"):
    lr = rates.chosen(pools[method].table)
    each = [family.config(method, lr, seed) | SHORT for seed in (0, 1)]
    ended[method] = [finetune.compute(config)["test_loss"] for config in each]
gained = [a - b for a, b in zip(*ended.values(), strict=True)]
lesson.measured("5.6", family.measured(trial).value)
lesson.live("X1", *over_seeds(gained), scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("X1", guess="5.6")

# %% [markdown]
# So most of the difference came from the learning rate: the five methods spread over
# 2.60 nats at one, and over 0.14 at their own. But LoRA+ and DoRA stay ahead of LoRA,
# LoRA+ by more than the claim's 2 %. Its source trained larger models for longer: after
# `200` optimizer steps, a method that learns faster looks better. Also, rsLoRA and
# LoRA+ are LoRA with a larger alpha: rsLoRA's scale is that of $\alpha = 45$, and under
# Adam LoRA+ trains as with $\alpha = 256$. A larger alpha might
# close the gap: claim L7 left that undecided.
#
# ## Now with the library
#
# PEFT has the switches `use_rslora` and `use_dora`. We save an adapter of random
# values, load it in PEFT, and compare all logits.

# %%
model, tokenizer = lesson.load_model()
task, encode = pfs.tasks.load_task("orders"), pfs.templates.encode_rows
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
        off = starts.largest_difference(starts.logits(theirs, rows), ours)
        lesson.control(f"PEFT's logits of {name} are ours, within 0.001.", off < 1e-3)
        model = theirs.unload()

# %% [markdown]
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
        saved = fmean(scaling.update_ratios(tiny, batch).values())
        pfs.save(tiny, f"{folder}/{rslora}")
        pfs.remove(tiny)
        broken_load(tiny, f"{folder}/{rslora}")
        read = fmean(scaling.update_ratios(tiny, batch).values())
        print(f"update {saved:.2f} when saved, {read:.2f} when loaded")
        pfs.remove(tiny)

# %% [markdown]
# The last line of `broken_load` ignores the flag `use_rslora`. Without any error, the
# rsLoRA comes back too weak by $\sqrt{r}$, which is 4. A loader should **refuse** a
# field that it does not know.
#
# ## So what do I set?
#
# Search the learning rate first: no other setting moved the results more.
#
# - **Learning rate: search it.** Try rates a factor of three apart, then finer ones on
#   several seeds. Known: a shared learning rate cost LoRA+ 2.48 nats against LoRA.
# - **Method: LoRA first, then LoRA+ or DoRA, each with a search.** Known: at their own
#   learning rates these two were 0.13 and 0.12 nats ahead here. Not known: whether that
#   lead survives longer training, a larger alpha for LoRA, or a larger model.
# - **Targets: all linear layers.** Known: at one budget, near the better of attention
#   and MLP. Not known: whether larger models agree.
# - **Rank: 16, more for a task far from pretraining.** Known: rank 1 lost more, the
#   farther the task. Not known: when a higher rank overfits.
# - **Alpha: the rank or twice the rank, then keep it.** Known: at first it acts as a
#   learning rate, and none from 2 to 64 was clearly better. Not known: which is best.
#
# After any change, search the learning rate again. Only the opening picture is of
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
# Right. The opening picture separates the two.
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
# **4. The best learning rate of a method is the highest that was tried. What now?**
#
# <details><summary>Compare at that learning rate, since it is the best known</summary>
#
# No. A better one may lie above, and the method would look too weak.
#
# </details>
# <details><summary>Try higher ones until the best is inside the grid</summary>
#
# Right. Until then the comparison says nothing.
#
# </details>
# <details><summary>Give the other method the same learning rate</summary>
#
# No. That is the confound again.
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
# ## Limits
#
# The controls rule out two other reasons for the low losses: that untrained parameters
# help as well, and that the form of an answer suffices. `tiny` has layers of width
# `128`, but rsLoRA and LoRA+ are meant for large ranks and wide layers. The rsLoRA
# paper reports its gains at high ranks in Llama 2, which we cannot test.
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
