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
# You will have shown which of LoRA's knobs move the result and which only move each
# other, because you measured the size of the update itself, while a frozen random LoRA
# and shuffled answers fail whatever the knobs say.
#
# **You need** notebook 04: LoRA's forward pass, its start, and its merge.
#
# **At the end you can**
#
# - measure how large an update is, and say what each of two scales does to it;
# - spend one budget of parameters on different targets, fairly;
# - say when alpha and the learning rate are one knob, and when not;
# - write DoRA's forward pass, PiSSA's start and LoRA+'s two rates;
# - find the bug that makes a good adapter weak without any error;
# - say what a search over a grid can show, and what it cannot.
#
# **Only ten minutes?** Write `start("05", quick=True)` below and run all cells. Read
# "The result first", do exercise 5.1, and read the verdict on claim L3.

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
# LoRA has relatives, each with a paper that shows it ahead of LoRA. We trained five of
# them and LoRA itself in SmolLM2, on the orders of notebook 00, and searched the
# **learning rate** of each with the same budget. Here is what the search saw on
# validation rows, and what each relative got *at LoRA's best rate*.

# %%
found = json.loads((runs.FOLDER.parent / "tuning.json").read_text("utf-8"))["searches"]
family = ("lora", "rslora", "dora", "pissa", "lora-plus")
searched = {name: found[f"smollm2/orders/{name}"] for name in family}
usual = searched["lora"]["chosen"]["lr"]
for name, search in searched.items():
    correct = {each["setting"]["lr"]: each["correct"] for each in search["runs"]}
    best, rows = search["chosen"]["lr"], search["validation_rows"]
    print(
        f"{name:10} best rate {best:5}: {correct[best]} of {rows} right;"
        f" at LoRA's {usual}: {correct[usual]}"
    )

# %% [markdown]
# Each at its own rate, they can hardly be told apart: the rows are few, there is one
# seed, and the rate was chosen on these very rows. At *one* rate for all, two of them
# look broken. Whoever compares methods at one rate compares rates.
#
# So this notebook asks of each knob: does it change what can be learned, or only the
# size of a step? The knobs are the rank $r$, the scale $\alpha / r$, the targets, and
# the rate. Most of the work is done by `tiny`, a model of about a million numbers,
# whose tasks have a dial: from a format that it knows (`gap-0`) over a new format
# (`gap-1`), new words (`gap-2`) and a new language (`gap-3`) to a cipher (`gap-4`).
#
# ## Idea one: how large is an update?
#
# Here is LoRA again, with its scale by name:
#
# $$h = W_0\,x + s\,B\,A\,x \qquad
# s = \frac{\alpha}{r} \;\text{(LoRA)} \qquad
# s = \frac{\alpha}{\sqrt{r}} \;\text{(rsLoRA)}$$
#
# The size that matters is that of what is *added to the output*, beside what was there:
#
# $$\rho = \frac{\operatorname{rms}(s\,B\,A\,x)}{\operatorname{rms}(\text{base}(x))}
# \qquad \operatorname{rms}(y) = \sqrt{\text{mean of } y_i^2}$$
#
# | symbol | what it is | shape |
# |---|---|---|
# | $s$ | the scale | a number |
# | base$(x)$ | output of the frozen projection, bias included | $(…, d_{out})$ |
# | $s\,B\,A\,x$ | what LoRA adds | $(…, d_{out})$ |
# | $\rho$ | size of the update, as a share of the output | a number |
#
# Why two scales? If the entries of $B$ and $A$ had a fixed size and *random* signs,
# the sum over $r$ directions would grow with $\sqrt{r}$. If all directions pulled the
# same way, it would grow with $r$. Look at both:

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
# Random signs call for $\alpha / \sqrt{r}$, directions that all pull together for
# $\alpha / r$. Training decides which it is, so it has to be measured.
#
# ### Exercise 5.1: the size of an update
#
# Difficulty two of five, importance five of five, about ten minutes. Return $\rho$ as a
# plain number, for either scale. The sizes are over all entries of the outputs.
#
# <details><summary>Hint one: a question</summary>
#
# Which of the two scales has the root, and is $\alpha$ under it too?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `x` is `(…, d_in)`. Both `base(x)` and what is added are `(…, d_out)`; each becomes
# one number.
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
# train LoRAs of several ranks with the same $\alpha$ and the same rate, and fit the
# power: $\rho \propto r^p$. Independent means $p = 0$. If the update did not grow at
# all with $r$ before the scale, $\alpha / r$ would give $p = -1$. Guess $p$.

# %%
lesson.rule("L3")
lesson.predict("5.1", low=None, high=None, unit="(exponent)")

# %% [markdown]
# **Live**, with a fifth of the steps and the two ends of the range of ranks, two seeds
# each. Every live run of this notebook is cut down like this. The last line hangs a
# hook on each module, which sees input and output as they pass by.

# %%
SHORT = dict(steps=20, warmup=2, test=50, validation=50)
live_sizes = {}
for r in (1, 64):
    chosen = [scaling.config("lora", r, 16, scaling.SIZED_AT, s) for s in (0, 1)]
    live_sizes[r] = [scaling.compute(each | SHORT)["ratio"] for each in chosen]
    print(f"rank {r:2}:", *(f"{size:.3f}" for size in live_sizes[r]), "of the output")

# %% [markdown]
# **The full runs** ship: seven ranks, two scales, five seeds each. To make them again:
# `python -m peft_from_scratch ledger L3 --run`.

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
    title="One rate, one alpha, seven ranks",
    subtitle="After 100 steps (live: 20), in tiny on gap-3. Bands: range of seeds.",
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
# Neither extreme. Under $\alpha / r$ a larger rank is quieter, but by far less than the
# $1 / \sqrt{r}$ that random signs would give: Adam gives every direction a step of its
# own, and the directions agree in part. Under $\alpha / \sqrt{r}$ the line is nearly
# level. So rsLoRA's repair is in the right direction here, and the fault that it
# repairs is small at the ranks that people use.
#
# ## Idea two: alpha and the rate, one knob?
#
# At the start $B = 0$. Write $G$ for $\partial L / \partial W$, the gradient that full
# fine-tuning would use. The chain rule brings a factor $s$ into $B$'s gradient, and the
# forward pass brings another one into the update:
#
# $$\frac{\partial L}{\partial B} = s\,G A^T, \qquad \Delta W = s\,B A$$
#
# One step with rate $\eta$. $A$ does not move in it, since its gradient holds $B = 0$:
#
# $$\text{SGD:}\;\; \Delta W = -\,\eta\,s^2\; G A^T A \qquad\qquad
# \text{Adam:}\;\; \Delta W = -\,\eta\,s\; \operatorname{sign}(G A^T)\, A$$
#
# Adam divides the gradient by its own size, so one of the two factors is gone. By how
# much does the first update grow if you double $\alpha$, under SGD? Guess.

# %%
lesson.predict("5.2", low=None, high=None, unit="times as large")


# %%
def first_update(optimizer, lr, alpha, r=4, steps=1):
    """s B A after some steps from LoRA's start, on a small regression."""
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
    print(f"  with the rate divided by that, off by {(same - once).abs().max():.0e}")
    many = first_update(kind, rate, 16, steps=100)
    off = (many - first_update(kind, 1e-3, 8, steps=100)).norm() / many.norm()
    print(f"  after 100 steps, off by {off:.1%}")
lesson.measured("5.2", factors["SGD"])

# %% [markdown]
# The first step is exact, as derived: $s^2 \eta$ for SGD, $s\,\eta$ for Adam. Later $A$
# moves too, at the rate $\eta$ *without* the scale, so the two settings drift apart.
# One knob near the start, then, and two afterwards: a large $\alpha$ with a small rate
# leaves $A$ nearly where it was drawn.
#
# ### On trial: claim L7
#
# *Alpha is typically the rank or twice the rank.* A habit is not false, so the rule
# asks what following it *costs*, with the rate searched for every alpha.

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
    print(f"alpha {alpha:2}: best rate {best:5}, alpha times rate {alpha * best:.2f}")

# %%
figure = curves.lines(
    series,
    x="Alpha times learning rate, dimensionless",
    y="Validation loss, nats per token",
    title="Four alphas, one knob?",
    subtitle="LoRA of rank 8 in tiny on gap-3, one seed of the search.",
    log="xy",
    names="foot",
)
lowest = {name: min(rows, key=lambda row: row[1]) for name, rows in series.items()}
said = (f"{name}: {loss:.2f} at {at:.2f}" for name, (at, loss) in lowest.items())
lesson.show(figure, "Lowest loss, and where. " + "; ".join(said) + ".")

# %%
live_losses = {}
for alpha, lr in ((16, 1e-2), (64, 3e-3)):
    chosen = [scaling.config("lora", 8, alpha, lr, seed) | SHORT for seed in (0, 1)]
    live_losses[alpha] = [finetune.compute(each)["test_loss"] for each in chosen]
differences = [a - b for a, b in zip(*live_losses.values(), strict=True)]
full = ledger.judge(ledger.claim("L7"), "tiny")
print(
    f"full: {full.measured:.3f} [{full.interval[0]:.3f}, {full.interval[1]:.3f}] nats"
)
lesson.live("L7", *over_seeds(differences), scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L7")

# %% [markdown]
# Drawn over the *product* of alpha and rate, the four searches fall nearly on one
# valley: that is the closed form at work. What is left between the alphas is within the
# noise of five seeds, and the rule says so. The searched grid is coarse too: its rates
# are half a decade apart, so two alphas may meet the valley at different depths.
#
# ## On trial: claim L8
#
# *Thanks to alpha / r, hyperparameters transfer across ranks.* You search the rate at
# rank 4, then somebody wants rank 64. By which factor does the best rate change? Guess.

# %%
lesson.rule("L8")
lesson.predict("5.3", low=None, high=None, unit="times the rate of rank 4")

# %%
moved = [runs.stored(config) for config in scaling.transfer_configs("tiny")]
bests = {}
for method in scaling.ALPHA:
    for r in scaling.RANKS:
        own = [x for x in moved if runs.matches(x, method=method, r=r, seed=0)]
        losses = {x.config["lr"]: x.result["validation_loss"] for x in own}
        bests[method, r] = rates.best_inside(losses)
        shown = "  ".join(f"{lr:g}: {losses[lr]:.2f}" for lr in sorted(losses))
        print(f"{method:6} rank {r:2}, validation loss by rate: {shown}")

# %% [markdown]
# **Live**: rank 64 at three rates, and what the rate of rank 4 costs it. These runs are
# twice as long as the others. In shorter ones rank 64 asks for another rate, which is a
# warning by itself: the best rate depends on the number of steps as well.

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
# A cost of exactly nothing deserves suspicion. It says that every rank chose the *same
# point of the grid*, so there was nothing to compare. Neighbouring points differ by a
# factor of about three, and a best rate that moves by less is invisible. The claim
# holds at the precision with which people search. But $\alpha / \sqrt{r}$ passed the
# same test, so "thanks to alpha / r" is more than this trial can say.
#
# ## Idea three: where to spend
#
# A layer of a Llama has seven projections: four of attention and three of the MLP,
# which are larger. A LoRA on one of them costs $r\,(d_{in} + d_{out})$. Compare two
# choices of targets at the same *rank*, and you compare two budgets. To be fair, the
# budget must be the same and the rank must follow from it.

# %%
tiny, tiny_tokenizer = pfs.load_model("tiny", device="cpu")
for name, module in list(pfs.targets.projections(tiny).items())[:7]:
    d_out, d_in = module.weight.shape
    print(f"{name.rpartition('.')[2]:10} {d_out:4} x {d_in:4}: {d_in + d_out:4} a rank")
for place, (targets, r) in rank_and_place.PLACES.items():
    pfs.lora.inject(tiny, r=r, targets=targets)
    count = sum(p.numel() for p in pfs.trainable(tiny).values())
    print(f"{place:10} rank {r:2}: {count:,} numbers in all")
    pfs.remove(tiny)

# %% [markdown]
# ### Exercise 5.2: the rank for a budget
#
# Difficulty two of five, importance four of five, about ten minutes. `shapes` has every
# projection of a layer, by name. Return the largest rank at which LoRA on the `targets`
# of all `layers` trains at most `budget` numbers: `0` where not even rank one fits, and
# never more than the smallest side of a target, since no LoRA takes a larger rank.
#
# <details><summary>Hint one: a question</summary>
#
# What does rank one cost, over all targets and all layers? How often does that fit into
# the budget?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `shapes["q_proj"]` is `(d_out, d_in)`. Per rank, $A$ has `d_in` numbers and $B$ has
# `d_out`.
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
# better in absolute terms.* Five gaps, near to far; on how many percent of them does
# attention beat the MLP at equal parameters?

# %%
lesson.rule("L5")
lesson.predict("5.4", low=None, high=None, unit="% of the gaps")

# %%
placed = [runs.stored(config) for config in rank_and_place.place_configs("tiny")]
attention, mlp = (rank_and_place.PLACES[place] for place in ("attention", "mlp"))


def cell(gap, targets, r):
    """A place's runs on a gap, at the rate that was searched for it."""
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
    x="Gap, step of the dial from near to far",
    y="Difference of test loss, nats per token",
    title="The same number of parameters, in the MLP or in attention",
    subtitle="Above zero attention is better. Five seeds; the band is the interval.",
    control=("no difference",),
    names="foot",
)
figure.axes[0].set_xticks(range(5), gaps)
lesson.show(figure, "; ".join(f"{gap} {d[0]:+.3f}" for gap, d in between.items()))

# %% [markdown]
# **Live**: one near gap and one far gap, one seed, at the rates searched. One seed of
# two gaps cannot exclude any share, so the interval is all there is, and the verdict of
# the live run can only be open.

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
    f"full: attention wins {share:.0f} %; everywhere, at its rank, {everywhere:.0f} %"
)
lesson.measured("5.4", share)
lesson.live("L5", 100 * fmean(won), 0, 100, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("L5", guess="5.4")

# %% [markdown]
# The average hides the finding, which the figure shows: it depends on the *kind* of
# gap. A new format is learned better in attention, which moves known words to new
# places, though the interval there still holds zero. A new language and a cipher are
# learned better in the MLP. The second half of the claim stands: LoRA everywhere beats
# LoRA on attention at the same rank, with more numbers to train.
#
# ### On trial: claim L6
#
# *A rank of sixteen is robust; a higher one overfits; a larger domain gap needs a
# higher one.* Three claims in one. Guess: how much does rank 16 lose at most against
# the best rank?

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
    title="Which rank for which gap?",
    subtitle="LoRA on every projection of tiny, its rate searched. Bands: five seeds.",
    log="xy",
)
measured = rank_and_place.rank_measured(ranked)
lesson.show(
    figure, f"Smallest rank that is near the best: {measured.figures['needed']}."
)

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
# Taken apart: the need for rank grows with the gap, as claimed. On the cipher the
# largest rank has the lowest loss, and what rank 16 loses there lies around the edge of
# the rule, hence no verdict. That a higher rank overfits did not show: with a hundred
# rows, seen many times, the interval of the difference holds zero.
#
# ### Negative controls
#
# Would *anything* beside the projections do? Three controls, at rank 16 on a new
# format: a random LoRA that is never trained; one whose $\alpha$ is so small that it is
# as good as rank zero; and one trained on shuffled answers.

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
# ## Idea four: the family
#
# Each relative changes one thing. Read the last column as a question to your own run.
#
# | name | what it computes | what it changes |
# |---|---|---|
# | LoRA | $W_0 x + s B A x$, $s = \alpha / r$ | |
# | rsLoRA | LoRA, $s = \alpha / \sqrt{r}$ | the scale, as another $\alpha$ would |
# | LoRA+ | LoRA, $\eta_B = \lambda\,\eta_A$ | the rate of $B$, in training only |
# | DoRA | $m \odot (V x) / \lVert V \rVert$, $V = W_0 + s B A$ | row lengths, apart |
# | PiSSA | $W_{res}\,x + s\,B A x$ | the start: the largest directions of $W_0$ |
#
# ### DoRA: length and direction
#
# A row of a weight has a length and a direction. LoRA's update changes both at once.
# DoRA gives the lengths their own numbers $m$, one for each row, which start as
# $\lVert W_0 \rVert$. $A$ and $B$ then only turn the rows:
#
# $$h = \frac{m}{\lVert V \rVert} \odot (V x), \qquad V = W_0 + s\,B A$$
#
# | symbol | what it is | shape | trained? |
# |---|---|---|---|
# | $V$ | weight with its update | $d_{out} \times d_{in}$ | through $A$, $B$ |
# | $\lVert V \rVert$ | length of each *row* of $V$ | $d_{out}$ | no: held constant |
# | $m$ | length of each row of the result | $d_{out}$ | yes |
#
# The paper holds $\lVert V \rVert$ constant in the backward pass to save memory. That
# changes gradients, and no output. In a picture of two numbers:

# %%
W0 = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
dW = torch.tensor([[1.0, -2.0], [0.0, 2.0]])
V, m = W0 + dW, W0.norm(dim=1)
W = m[:, None] * V / V.norm(dim=1, keepdim=True)
for old, added, new in zip(W0, V, W, strict=True):
    turned = F.cosine_similarity(old, new, dim=0)
    print(f"length {old.norm():.2f}, of V {added.norm():.2f}, with m {new.norm():.2f};")
    print(f"  cosine with the old direction {turned:.2f}")

# %% [markdown]
# ### Exercise 5.3: DoRA's forward pass
#
# Difficulty three of five, importance four of five, about fifteen minutes. `x` holds
# rows, with any number of sides in front; there is no bias. The check looks at the
# gradients too.
#
# <details><summary>Hint one: a question</summary>
#
# Which row of $V$ makes which output? And how do you tell autograd that a tensor is a
# constant?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# $V$ is `(d_out, d_in)`, its lengths and `m` are `(d_out,)`, and `x @ V.T` is
# `(…, d_out)`.
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
# ### PiSSA: start from the loudest directions
#
# LoRA starts from noise. PiSSA takes the singular value decomposition of the weight
# itself, trains its largest $r$ directions, and freezes what is left:
#
# $$W_0 = U S V^T, \quad
# s\,B A = U_r S_r V_r^T, \quad
# W_{res} = W_0 - s\,B A$$
#
# $$A = \sqrt{S_r / s}\;V_r^T \qquad B = U_r\,\sqrt{S_r / s}$$
#
# | symbol | shape | in torch |
# |---|---|---|
# | $U_r$ | $d_{out} \times r$ | `U[:, :r]` |
# | $S_r$ | $r$, from large to small | `S[:r]` |
# | $V_r^T$ | $r \times d_{in}$ | `Vt[:r]` |
#
# The model starts as it was, up to rounding. But its steps are different: the
# gradient of $B$ runs through an $A$ of another size, and $B$ is not zero. How loud are
# those directions in a real weight?

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
# ### Exercise 5.4: PiSSA's start
#
# Difficulty three of five, importance three of five, about ten minutes. Return the
# residual, $A$ and $B$. Each of $A$ and $B$ gets the root of the singular values and
# the root of the scale.
#
# <details><summary>Hint one: a question</summary>
#
# $s\,B A$ must be $U_r S_r V_r^T$. Into which two equal parts does $S_r / s$ fall?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `root` is `(r,)`. It multiplies the *rows* of `Vt[:r]`, which is `(r, d_in)`, and the
# *columns* of `U[:, :r]`, which is `(d_out, r)`.
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
# ### LoRA+: two rates
#
# Under Adam every number of $A$ and of $B$ moves by about $\eta$ a step. But they are
# not of one size: $A$ starts with entries of about $1 / \sqrt{3\,d_{in}}$, $B$ with
# zeros that have to grow. LoRA+ argues that in wide layers $B$ should move faster, and
# gives it the rate $\lambda\,\eta$. An optimizer takes *groups* of parameters for that,
# each with its own `lr`.
#
# ### Exercise 5.5: LoRA+'s groups
#
# Difficulty two of five, importance three of five, about ten minutes. `model` has been
# through `pfs.lora.inject`, so its LoRAs are modules of the class `pfs.lora.LoRA` with
# a parameter `B`. Return groups for `torch.optim.AdamW`: every `B` with `lr * ratio`,
# all else that trains with `lr`.
#
# <details><summary>Hint one: a question</summary>
#
# What else may train beside $A$ and $B$? And what must an optimizer not be given?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# A list of two dicts, each with `"params"`, a list of parameters, and `"lr"`, a number.
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
# You know from idea two what this does at the start: the first update grows by
# $\lambda$, as if $\alpha$ had. It is no wonder that the search on the first page gave
# LoRA+ a lower rate.
#
# ## Now with the library
#
# In PEFT, rsLoRA and DoRA are two switches. Ours writes its file format: fill an
# adapter with noise, save it, let PEFT read the folder, and compare every logit.

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
# ### Break it on purpose
#
# A program that *serves* adapters reads $A$, $B$, $r$ and $\alpha$ from the folder.
# Here is such a reader, as several real ones were written (links below). It is tried on
# two adapters. The first is read well; the second is not, and nothing complains. Find
# the line, before you read on.


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
        print(f"update {right:.2f} when saved, {read:.2f} when read")
        pfs.remove(tiny)

# %% [markdown]
# The reader ignores `use_rslora`, so every update of the second adapter is too small by
# $\sqrt{r}$. (The mean printed is not off by exactly that, since a layer's input
# depends on the layers below.) The adapter loads, the answers are fluent, and they are
# nearly those of the base. A reader should **refuse** a field that it does not know.
#
# ## Quiz
#
# Answer for yourself, then open the options. None needs the kernel.
#
# **1. Two papers compare methods at one learning rate. What have they compared?**
#
# <details><summary>The methods, since all else is equal</summary>
#
# No. A scale, a start or a second rate changes how far one step goes. The same rate is
# then a different training.
#
# </details>
# <details><summary>The methods and how well that rate suits each</summary>
#
# Right. The first page shows how far apart these two can be.
#
# </details>
# <details><summary>Nothing that can be repeated</summary>
#
# No. It repeats well. It answers another question than the one asked.
#
# </details>
#
# **2. With SGD, from LoRA's start, you double alpha. Which rate gives the same first
# step?**
#
# <details><summary>Half of it</summary>
#
# No. That is Adam's answer, whose step does not depend on the size of the gradient.
#
# </details>
# <details><summary>A quarter of it</summary>
#
# Right. The scale stands in the gradient of $B$ and once more in the update.
#
# </details>
# <details><summary>The same</summary>
#
# No. The scale enters twice, so the step would be four times as large.
#
# </details>
#
# **3. A reader ignores `use_rslora`. Which alpha in the file repairs that, for rank
# 16?**
#
# <details><summary>Sixteen times as much</summary>
#
# No. That gives $\alpha$ without any division: four times too loud.
#
# </details>
# <details><summary>Four times as much</summary>
#
# Right. $\sqrt{r}\,\alpha / r = \alpha / \sqrt{r}$. Any program that does know the flag
# must then not see it.
#
# </details>
# <details><summary>None: train again</summary>
#
# No. $A$ and $B$ are good. Only the number before them is wrong.
#
# </details>
#
# **4. (From notebook 04.) What does DoRA's file lack that a full weight has?**
#
# <details><summary>Nothing: it works alone</summary>
#
# No. Like LoRA's, it holds $A$ and $B$, and the lengths $m$. Without $W_0$ they say
# nothing.
#
# </details>
# <details><summary>The pretrained weight</summary>
#
# Right. Lengths and a low-rank turn mean something only beside $W_0$.
#
# </details>
# <details><summary>The lengths, which can be computed</summary>
#
# No. The lengths were trained, so they must be in the file.
#
# </details>
#
# **5. (From notebook 03.) A search over rates half a
# decade apart finds the same best rate for every rank. What follows?**
#
# <details><summary>The best rate does not depend on the rank</summary>
#
# No. It may move by a factor of two, and the grid would not show it.
#
# </details>
# <details><summary>It moves by less than the grid can see</summary>
#
# Right. That is useful to know, and it is less than independence.
#
# </details>
# <details><summary>The search was broken</summary>
#
# No. A coarse answer is an answer, if you say how coarse.
#
# </details>
#
# ### In your own words
#
# A colleague says: "We raised the rank from 8 to 64 and nothing got better, so rank
# does not matter." Answer in three sentences, with what you measured.
#
# <details><summary>A model answer</summary>
#
# "Your job may be near to what the model knows, and near gaps need few directions; on
# the far ones here a higher rank did help. Did you search the rate again, and for how
# long did you train? Under alpha / r the larger rank also started quieter, so you
# changed two things at once."
#
# </details>
#
# ### Transfer
#
# Somebody trained a PiSSA of rank eight, and wants to hand it over as an ordinary LoRA
# for the *original* weight. Which rank does that LoRA need, and what are its $A$ and
# $B$?
#
# <details><summary>A model answer</summary>
#
# The change is $s\,(B A - B_0 A_0)$, with the start $A_0, B_0$. It is a difference of
# two matrices of rank eight, so rank sixteen always suffices: stack $A$ on $A_0$, and
# put $-B_0$ beside $B$. The scale stays, so with LoRA's $\alpha / r$ the file's
# $\alpha$ doubles.
#
# </details>
#
# ## Limits
#
# - **What the controls rule out.** A random LoRA, and one without a voice, do not learn
#   the format; and what is learned is not only the form of the answers.
# - **One small model.** `tiny` has four layers and about a million numbers. In wide
#   models the arguments of rsLoRA and LoRA+ are about limits that it is far from.
# - **Short training.** A hundred steps. Best rates depend on that, as you saw live.
# - **One seed for SmolLM2.** The table of the first page ranks nobody.
# - **The papers beside us** (their findings, not ours). rsLoRA reports that with
#   $\alpha / r$ larger ranks stop helping, and that its scale lets them help. QLoRA
#   found that LoRA on all linear layers was needed to match full fine-tuning. Biderman
#   and others see the MLP carry most of the gain in Llama, on code and mathematics.
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
# - Kalajdzievski, [A rank stabilization scaling factor for fine-tuning with
#   LoRA](https://arxiv.org/abs/2312.03732), rsLoRA.
# - Hayou and others, [LoRA+](https://arxiv.org/abs/2402.12354): two rates, and why.
# - Liu and others, [DoRA](https://arxiv.org/abs/2402.09353), and Meng and others,
#   [PiSSA](https://arxiv.org/abs/2404.02948).
# - Biderman and others, [LoRA learns less and forgets
#   less](https://arxiv.org/abs/2405.09673); Dettmers and others,
#   [QLoRA](https://arxiv.org/abs/2305.14314): which layers matter.
# - The flag that readers ignored: [TensorRT-LLM, issue
#   1668](https://github.com/NVIDIA/TensorRT-LLM/issues/1668), and [vLLM, issue
#   10798](https://github.com/vllm-project/vllm/issues/10798).
