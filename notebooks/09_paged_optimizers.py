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
# # Paged optimizers, and the bill of a 65B model
#
# **A paged optimizer frees at most the bytes of AdamW's states during a memory spike,
# and changes no bit of the weights.**
#
# **You need** notebook 01 (weights, gradients, optimizer states, activations) and
# notebook 08 (QLoRA).
#
# **At the end you can**
#
# - say which bytes paging can free, and which it cannot;
# - write a page table that throws out the page used longest ago;
# - choose the order of the pages that needs the fewest copies;
# - update AdamW's states one page at a time, and lose none;
# - compute the longest sequence that fits on one GPU, and choose the one change that
#   makes the most room.
#
# **Only ten minutes?** Write `start("09", quick=True)` below and run all cells. Read
# "The result first" and "Idea one", and the card of claim Q6.

# %%
from peft_from_scratch.course import start

lesson = start("09")

# %%
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig

import peft_from_scratch as pfs
from peft_from_scratch.course import count, curves, formulas, memory_picture
from peft_from_scratch.course import memory_plan, meta_model, meter, one_gpu
from peft_from_scratch.course import page_picture, paging, runs
from peft_from_scratch.course.checks import paged_optimizers as checks

# %% [markdown]
# ## The result first
#
# One long row can end a training run that went well for hours. The memory for
# **activations** grows with the number of tokens. So a long row makes a **spike**, and
# the GPU runs out of memory. All that time, AdamW's **states** $m$ and $v$ lie in
# memory, although only the update uses them.
#
# We fully fine-tune SmolLM2 in `float32` for four optimizer steps. The third one has a
# row of 768 tokens, the others have rows of 64 tokens. How large is the spike, compared
# with AdamW's states?

# %%
lesson.predict("9.1", low=None, high=None, unit="% of the bytes of the states")
base, _ = lesson.load_model()
pfs.full.inject(base)
real = paging.learn_bytes(base, torch.randint(5, 1000, (1, 64)))

# %% [markdown]
# The next cell counts the bytes of these steps on a **ghost**: SmolLM2 on torch's
# device `meta`, where a tensor has a shape and no values. A ghost takes the same steps
# in seconds, and a **meter** notes each tensor that is made or freed. The training loop
# is complete. Only the data have no values.


# %%
def learn(model, tokens):
    """Forward and backward pass on one row, without values."""
    ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
    mask = torch.empty(1, 1, 1, 1, device="meta")  # transformers reads no values of it
    logits = model(ids, attention_mask=mask).logits[0, :-1]
    F.cross_entropy(logits, ids[0, 1:]).backward()


ghost = meta_model.ghost(base.config, "float32")
pfs.full.inject(ghost)
optimizer = torch.optim.AdamW(ghost.parameters(), foreach=False)
lengths, updates, ends = (64, 64, 768, 64), [], []
with meter.Meter(ghost) as seen:
    for tokens in lengths:
        learn(ghost, tokens)
        updates.append(len(seen.events))
        optimizer.step()
        optimizer.zero_grad()
        ends.append(len(seen.events))

# %%
times = memory_picture.timeline(seen, updates, ends)
peaks = times.peaks()
states, spike = max(times.bytes["optimizer"]), peaks[2] - peaks[1]
labels, gpu = [f"{tokens} tokens" for tokens in lengths], 2.5e9
figure = memory_picture.picture(
    times,
    labels,
    limit=gpu,
    title=f"A long row needs {spike / 1e9:.2f} GB more, while AdamW's states lie idle",
    subtitle="SmolLM2, full fine-tuning in float32. In each optimizer step: forward "
    "pass, backward pass, update.",
)
said = "Short rows peak at {:.2f} GB, the long row at {:.2f} GB. Spike: {:.2f} GB. "
said += "AdamW's states: {:.2f} GB"
sizes = (peaks[1], peaks[2], spike, states)
lesson.show(figure, said.format(*(size / 1e9 for size in sizes)))

# %%
lesson.measured("9.1", 100 * spike / states)
ghostly = times.total[: updates[0]].max()
print(f"64 tokens, no update: real {real / 1e9:.2f} GB, ghost {ghostly / 1e9:.2f} GB")
near = abs(ghostly / real - 1) < 0.02
lesson.control("The ghost's bytes are the real model's within 2 %.", near)

# %% [markdown]
# The long row needs 0.86 GB more than a short one. On a GPU with `2.5` GB it does not
# fit (hatched). The purple band of AdamW's states is larger than the spike, and it is
# used only in the short update at the end of each optimizer step.
#
# The states appear in the first update. From then on they stay in memory.
#
# ## Idea one: during a spike, the states can leave
#
# A **paged optimizer** moves states to slower memory (the host's) when fast memory (the
# GPU's) runs out, and back for the update. Paging can free the bytes of the states and
# nothing else:
#
# | holds memory | needed in | can paging free it during the spike? |
# |---|---|---|
# | weights | forward, backward, update | no |
# | activations | forward, backward | no: they are the spike |
# | gradients | backward, update | no |
# | AdamW's states | update | yes |
#
# Let $S$ be the bytes of the states, and let the spike be the peak of a long row minus
# the peak of a short row. The share of the spike that paging absorbs is
#
# $$\text{absorbed} = \min\left(1,\; \frac{S}{\text{spike}}\right)$$
#
# States of `8` MB absorb a spike of `6` MB whole, and `57 %` of a spike of `14` MB.
#
# The picture shows the same four steps with paging. States leave as far as they must,
# and come back in the next update.

# %%
paged = memory_picture.paged_out(times, gpu)
figure = memory_picture.picture(
    paged,
    labels,
    limit=gpu,
    before=times,
    title="With paging, AdamW's states make room for the spike",
    subtitle="Computed from the steps above. Dashed: the sum without paging.",
)
least = paged.bytes["optimizer"][ends[1] : updates[2]].min()
said = "Peak with paging: {:.2f} GB. States in GPU memory in the long row: {:.2f} GB"
lesson.show(figure, said.format(max(paged.peaks()) / 1e9, least / 1e9))
lesson.control("With paging, all four steps fit.", max(paged.peaks()) <= gpu)

# %% [markdown]
# The peak is now 2.50 GB, as much as the GPU has. During the long row, 0.33 GB of the
# states stay, and the others wait in slower memory.
#
# Would paging help a LoRA in the same way? The next cell compares the states.

# %%
lora = meta_model.ghost(base.config, "float32")
pfs.lora.inject(lora, r=8)
for method, model in {"full fine-tuning": ghost, "LoRA, rank 8": lora}.items():
    own = formulas.adamw_bytes(count(model).trainable, 0)
    share = 100 * min(1, own / spike)
    print(f"{method:16}: states {own / 1e6:7.1f} MB absorb {share:5.1f} % of the spike")

# %% [markdown]
# A LoRA's states would absorb 2.3 % of this spike. LoRA has removed most of these bytes
# already, so that paging has little left to free. Compare your states with your largest
# spike before you rely on paging.
#
# ## Idea two: pages, and who leaves
#
# The states are moved in small pieces. AdamW treats every value by itself, so that one
# slice can be updated while all other states are away.
#
# | word | meaning |
# |---|---|
# | page | $m$ and $v$ of one slice of one parameter |
# | slot | room for one page in fast memory; the **budget** is a number of slots |
# | store | slower memory, with a place for every page |
# | resident | in a slot |
# | hit, fault | a needed page is resident, or must be copied in |
# | dirty, clean | updated in its slot, or still equal to its copy in the store |
# | request | the optimizer asks for a page: to use it now, or ahead of its use |
#
# `PagedAdamW` is the library's paged optimizer. It takes the budget and the size of a
# page in bytes: `256` and `64` make four slots. The cell takes three optimizer steps
# with eight pages. A hook notes which page is in which slot, after each request. The
# picture shows the seventh request, for page 4, when pages 0 to 3 fill the slots. (Two
# of the six requests before it asked for a page ahead of its use.)

# %%
p = nn.Parameter(torch.randn(64))
small = pfs.PagedAdamW([p], lr=1e-2, budget_bytes=256, page_bytes=64)
with page_picture.watched(small) as moments:
    for _ in range(3):
        p.grad = torch.randn(64)
        small.step()
figure = memory_picture.hierarchy(
    moments[5],
    moments[6],
    pages=8,
    title="A page fault copies one page in, and first a dirty page back",
    subtitle="Request 7 of the first optimizer step. Eight pages, four slots.",
)
lesson.show(figure, "Page 0 is dirty and goes back first; page 4 takes its slot.")

# %% [markdown]
# A clean page is dropped without a copy, since the store has the same values. Only a
# dirty page must be written back. In QLoRA, the store is the host's memory, and the
# GPU's driver moves the pages. Here the store is a file, so that it works on a laptop.
#
# ### Exercise 9.1: who leaves?
#
# Difficulty one of five, importance four of five, about two minutes. A warm-up. When no
# slot is free, the page whose last use is longest ago leaves: **LRU**, least recently
# used. `use(page)` makes a page resident, and returns the page that had to leave, or
# `None`. Hits are done for you. Write what happens at a fault: count it in
# `self.faults`, and take out the page that leaves if all `self.slots` are taken.
#
# For example, with two slots, the uses `5, 6, 5, 7` return `None, None, None, 6` and
# make `3` faults.
#
# <details><summary>Hint one: a question</summary>
#
# The page used last stands last in `self.resident`. Where stands the one used longest
# ago?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `self.resident` is a list of at most `self.slots` page numbers.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `self.faults += 1`
#
# </details>


# %% tags=["exercise-9.1"]
class MyPages:
    """A page table: which pages are resident, and who leaves."""

    def __init__(self, slots):
        self.slots = slots
        self.resident = []  # numbers of pages, the one used longest ago first
        self.faults = 0

    def use(self, page):
        """Make the page resident; return the one that had to leave, or None."""
        left = None
        if page in self.resident:
            self.resident.remove(page)
        else:
            ### BEGIN SOLUTION
            self.faults += 1
            if len(self.resident) == self.slots:
                left = self.resident.pop(0)
            ### END SOLUTION
        self.resident.append(page)  # the one used last stands last
        return left


# %% tags=["check-9.1", "points-1"]
checks.lru_pages(MyPages)

# %% [markdown]
# ## Idea three: the order decides the faults
#
# Each fault is a copy over a slow link, so that faults are the price of paging. Every
# optimizer step updates every page once. The *order* of the pages is free.
#
# The obvious order starts over at the first page in every step. With LRU, it fails
# completely: the page needed next is always the one that has just left. With three
# pages and two slots, the uses `0, 1, 2, 0, 1, 2` are all faults.
#
# A better order exists. With slots for half of the pages, what share of the uses are
# still faults in the best order? Take sixteen pages and twenty optimizer steps.

# %%
lesson.predict("9.2", low=None, high=None, unit="% faults at half of the pages")

# %% [markdown]
# ### Exercise 9.2: the order with the fewest faults
#
# Difficulty three of five, importance four of five, about ten minutes. Write
# `my_order(pages, slots, steps)`. It returns a list with one list for each optimizer
# step: the numbers from `0` to `pages - 1`, each once, in the order in which this step
# updates the pages. All slots are empty at first, and LRU decides who leaves. Find an
# order with the fewest faults over all steps. All such orders are accepted.
#
# For example, `my_order(3, 2, 2)` must return an order with four faults, the minimum.
# `[[0, 1, 2], [0, 1, 2]]` has six.
#
# <details><summary>Hint one: a question</summary>
#
# Which pages are resident when an optimizer step ends?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `steps` lists of `pages` integers. A step has at least `pages - slots` faults, and at
# most `slots` hits. When does it have all these hits?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `forward = list(range(pages))`
#
# </details>


# %% tags=["exercise-9.2"]
def my_order(pages, slots, steps):
    """For each optimizer step the pages 0 … pages - 1, in the order of their update."""
    ### BEGIN SOLUTION
    forward = list(range(pages))
    return [forward[::-1] if step % 2 else forward for step in range(steps)]
    ### END SOLUTION


# %% tags=["check-9.2", "points-3"]
checks.fewest_faults(my_order)

# %% [markdown]
# The library's `PagedAdamW` goes *back and forth*: in reverse in every second optimizer
# step. (This order is this course's choice. The QLoRA paper names none.) The picture
# shows the three optimizer steps with eight pages and four slots. Each column is the
# page table after one request.

# %%
figure = page_picture.picture(
    moments, pages=8, title="Back and forth: half of the uses in steps 2 and 3 are hits"
)
said = "24 uses: {0.faults} faults, {0.hits} hits. {0.write_backs} pages written back"
lesson.show(figure, said.format(small.counters))

# %% [markdown]
# Pages 0 and 1 are asked for when they are used (crosses). From then on, the optimizer
# asks for the next two pages *ahead* of their use (triangles), so that a GPU can copy
# and compute at the same time. A page asked for ahead is requested again when it is
# used, so there are more requests than uses. An update waits until the next two pages
# have been asked for. So pages 0 and 1 are updated when pages 2 and 3 are in, and are
# dirty from column 5 on.
#
# Counting only the 24 uses, there are 16 faults and 8 hits. The hits are the first four
# uses of optimizer steps 2 and 3: each step begins with the pages that the step before
# left in the slots.
#
# How much does the order save at other budgets? The cell counts the faults from one
# slot to sixteen. The grey order starts over, and the other is yours, or ours.

# %%
order = lesson.mine(my_order, page_picture.back_and_forth)
dial = {"starting over": [], "the best order": []}
for slots in (1, 2, 4, 6, 8, 10, 12, 14, 16):
    walks = [[*range(16)]] * 20, order(16, slots, 20)
    for name, walk in zip(dial, walks, strict=True):
        faults = page_picture.faults(slots, [page for step in walk for page in step])
        dial[name].append((100 * slots / 16, 100 * faults / (16 * 20)))

# %%
figure = curves.lines(
    dial,
    x="Budget, % of the states",
    y="Faults, % of the uses",
    title="With the best order, each slot saves its share of the faults",
    subtitle="Sixteen pages, twenty optimizer steps, LRU.",
    control=("starting over",),
    names="foot",
)
figure.axes[0].set_ylim(0, 105)
half = [dict(rows)[50] for rows in dial.values()]
said = "Faults at half of the pages: starting over {:.1f} %, the best order {:.1f} %"
lesson.show(figure, said.format(*half))
lesson.measured("9.2", half[1])

# %% [markdown]
# With slots for half of the pages, starting over has 100 % faults, and the best order
# 52.5 %. Each slot saves one copy in each optimizer step but the first.
#
# ### Exercise 9.3: AdamW, one page at a time
#
# Difficulty three of five, importance four of five, about ten minutes. The update of
# one page is given: these are AdamW's equations from notebook 01, in place. Write the
# paging around it, for a single slot:
#
# - `bring(page)` puts a page into `self.states (2, n)`, `float32`. `store.read(page)`
#   returns a copy, and `store.write(page, states)` writes one back. A page that is in
#   the slot is not read again. A page that leaves is written back only if it is dirty.
# - `update(…)` must also keep account of `self.dirty`.
#
# For example, `bring(0)`, an update, `bring(0)` and `bring(1)` make two reads and one
# write. The check counts both, and compares the weights with torch's. The page that is
# in the slot at the end need not be written.
#
# <details><summary>Hint one: a question</summary>
#
# When does the slot hold values that the store does not have?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `self.page` and `self.dirty` describe the one page in `self.states (2, n)`. Three
# attributes change when another page comes in.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# Of `bring`: `if page != self.page:`
#
# </details>


# %% tags=["exercise-9.3"]
class MyPager:
    """One slot, which holds m and v of one page: self.states (2, n)."""

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
        m, v = self.states
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g**2)
        p *= 1 - lr * decay
        p -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        ### BEGIN SOLUTION
        self.dirty = True
        ### END SOLUTION


# %% tags=["check-9.3", "points-3"]
checks.paged_adamw(MyPager)

# %% [markdown]
# ## On trial: claim P1
#
# *Paged attention moves optimizer states to the CPU, and so absorbs the memory spikes
# of long sequences.* The right name is **paged optimizer**. PagedAttention is another
# thing: it stores the keys and values of a serving engine in blocks.
#
# The share that is absorbed is arithmetic, by the equation of idea one. So the claim's
# **verdict card** (notebook 00) says **computed**, and no measurement could refute it.
# The cell shows that the bytes are really given up, on `tiny`, our model of one million
# parameters. It takes the same eight steps with torch's AdamW and with `PagedAdamW`.
# The control is that no weight differs in one bit.
#
# During a long row, `optimizer.lent(bytes)` gives up the bytes of the spike. (`lent` is
# this course's invention. With QLoRA, nobody tells the optimizer: the GPU's driver
# moves pages when memory runs out.)

# %%
chosen = paging.config("tiny", "within the states", seed=0)
one_run = runs.Run("live", chosen, paging.compute(chosen), {})
result = one_run.result
rows = zip(("AdamW", "PagedAdamW"), result["held"].values(), strict=True)
peaks = {name: [size / 1e6 for size in row] for name, row in rows}
figure = curves.lines(
    {name: list(enumerate(row, 1))[1:] for name, row in peaks.items()},
    x="Optimizer step, count",
    y="Most bytes at one moment, MB",
    title="PagedAdamW gives up its states during long rows",
    subtitle="Steps 1 to 8: {order}; s: {short} tokens, L: {long}. Step 1 is left out: "
    "it makes the states.".format(**chosen),
    control=("AdamW",),
    names="foot",
)
figure.axes[0].set_ylim(bottom=0)
said = "AdamW holds at most {:.1f} MB, PagedAdamW {:.1f} MB."
lesson.show(figure, said.format(*map(max, peaks.values())))

# %%
share = paging.absorbed(one_run)
lesson.control("Every weight is AdamW's, bit by bit.", result["equal"])
lesson.live("P1", share, share, share, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("P1")

# %% [markdown]
# The peak falls from 23.2 to 16.8 MB. The spike was smaller than the states, so all of
# it was absorbed. The next cell reads one of the **shipped runs**, which come with the
# course and decide its verdicts. Its rows are longer.

# %%
longer = runs.select(experiment="paging", spike="beyond the states", seed=0)[0]
sizes = longer.result["held"]["adamw"]
figures = longer.result["states"] / 1e6, (max(sizes) - min(sizes)) / 1e6
said = "states of {:.1f} MB, a spike of {:.1f} MB: {:.0f} % of it is absorbed"
print(said.format(*figures, paging.absorbed(longer)))
copied = result["copied"] / len(chosen["order"])
print(f"the live run copied {copied / 1e6:.1f} MB an optimizer step, both ways")

# %% [markdown]
# Of a spike of 14.0 MB, states of 7.9 MB absorb only 56 %. Paging also has a price: the
# live run copied 6.6 MB in each optimizer step.
#
# ## On trial: claim Q6
#
# *QLoRA fine-tunes a model of 65B (billion) parameters on one GPU of 48 GB.* Whether it
# fits can be computed without the GPU. We count a ghost again, at batch size one: the
# fixed parts, and the bytes that come with each token.
#
# - **weights** in NF4, with double quantization;
# - a **buffer** for the largest weight matrix, dequantized for its product;
# - **adapters** of rank 64 on every projection, in `bfloat16`;
# - AdamW's **states** of the adapters, in `float32`;
# - for **a token**: activations, with gradient checkpointing, which keeps only the
#   input of each layer and computes the rest again in the backward pass.
#
# $$\text{tokens} = \left\lfloor
# \frac{\text{bytes of the GPU} - \text{bytes of the fixed parts}}
# {\text{bytes of one token}} \right\rfloor$$
#
# With `60` bytes, `44` of them fixed, and `2` bytes a token, `8` tokens fit. For short
# sequences, the peak comes at the end of the backward pass, when all gradients of the
# adapters are there. For long ones it comes earlier, with all activations, and grows in
# proportion to the tokens. So two long lengths give the bytes of one token. All
# layers of Llama-65B are alike. So the cell counts 8 and 12 layers and extrapolates to
# 80. How long is the longest sequence?

# %%
lesson.predict("9.3", low=None, high=None, unit="tokens at most")


# %%
def bill_of(layers):
    """Fixed parts, then all that comes and goes at 2048 and at 4096 tokens; bytes."""
    shape = one_gpu.SHAPES["Llama-65B"] | {"num_hidden_layers": layers}
    fixed, moving = one_gpu.bill(LlamaConfig(**shape), one_gpu.config())
    return np.array([*fixed.values(), moving(2048), moving(4096)])


low, high = bill_of(8), bill_of(12)
bill = high + (80 - 12) / (12 - 8) * (high - low)
parts = dict(zip(("weights", "buffer", "adapters", "states"), bill[:4], strict=True))
a_token, parts["rest"] = memory_plan.line(2048, bill[4], 4096, bill[5])
for name, size in parts.items():
    print(f"{name:9} {size / 1e9:5.2f} GB")
print(f"together  {sum(parts.values()) / 1e9:5.2f} GB; {a_token / 1e6:.2f} MB a token")
stored = [run for run in runs.select(experiment="one_gpu") if "base" in run.config]
worst = max(map(one_gpu.off, stored))
print(f"the same sum for real steps of tiny and SmolLM2: at most {worst:.1f} % off")
lesson.control("The sum is within 5 % of real steps.", worst < one_gpu.CLOSE)

# %% [markdown]
# The weights take 34.46 GB, and all fixed parts 42.82 GB. (The **rest** is a few
# megabytes that come and go, but do not grow with the tokens.) The answer is one
# division away. Write the planner that makes it.
#
# ### Exercise 9.4: will it fit, and what makes the most room?
#
# Difficulty four of five, importance five of five, about twenty minutes. Write
# `my_plan(parts, a_token, budget, changes)`.
#
# - `parts`: a dictionary of names and bytes, held all the time; `a_token`: the bytes of
#   one token; `budget`: the bytes of the GPU.
# - `changes`: a dictionary. Each change has a name, and a dictionary of factors. A
#   factor multiplies one of the parts, or, under the key `"a token"`, the bytes of one
#   token. `{"states": 0}` pages the states out.
#
# Return three values: the tokens of the longest sequence that fits now, the name of the
# *single* change that lets the longest sequence fit, and the tokens of that sequence.
# Each change is judged alone. Tokens are integers, and `0` where nothing fits. Of equal
# changes, return the first. Where no change gains a token, return `None` as the name,
# and the tokens now. Leave the arguments as they are. All factors in the check are
# exact in binary, such as `0.25`.
#
# For example, take `parts = {"weights": 36, "states": 8}`, `a_token = 2` and
# `changes = {"page": {"states": 0}, "cheap": {"a token": 0.5}}`. With a budget of `60`,
# the answer is `(8, "cheap", 16)`. With a budget of `48`, it is `(2, "page", 6)`.
#
# <details><summary>Hint one: a question</summary>
#
# In the example, paging always frees `8` bytes. Why is "cheap" better with more room?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# A helper `fits(change)` returns one integer. `change.get(name, 1)` is the factor of a
# part. The empty change `{}` gives the tokens now.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# Of the helper: `fixed = sum(size * change.get(part, 1) for part, size in …)`
#
# </details>


# %% tags=["exercise-9.4"]
def my_plan(parts, a_token, budget, changes):
    """(tokens now, name of the best single change or None, tokens with it)."""

    ### BEGIN SOLUTION
    def fits(change):
        fixed = sum(size * change.get(part, 1) for part, size in parts.items())
        return max(0, int((budget - fixed) // (a_token * change.get("a token", 1))))

    now = fits({})
    best, most = None, now
    for name, change in changes.items():
        if fits(change) > most:
            best, most = name, fits(change)
    return now, best, most
    ### END SOLUTION


# %% tags=["check-9.4", "points-4"]
checks.best_change(my_plan)

# %% [markdown]
# Now the planner answers for the 65B model. There are four changes:
#
# - page the states out;
# - train rank 16 in place of 64;
# - store the states in 8 bits in place of 32;
# - keep half of the checkpoints in host memory. A **checkpoint** is the input of a
#   layer, kept for the backward pass: $80 \times 8{,}192$ values of two bytes a token.

# %%
plan = lesson.mine(my_plan, memory_plan.plan)
checkpoints = 80 * 8192 * 2  # bytes a token
changes = {
    "page the states": {"states": 0},
    "rank 16": {"adapters": 1 / 4, "states": 1 / 4},
    "8-bit states": {"states": 1 / 4},
    "half the checkpoints on the host": {"a token": 1 - checkpoints / 2 / a_token},
}
fits, best, longest = plan(parts, a_token, one_gpu.GPU, changes)
print(f"checkpoints: {checkpoints / 1e6:.2f} of the {a_token / 1e6:.2f} MB of a token")
print(f"now {fits:,} tokens; best change: {best}, {longest:,} tokens")

# %%
kinds = dict(weights=curves.GREY, buffer=curves.BROWN, adapters=curves.AMBER)
kinds |= {"states": curves.PURPLE, "room for tokens": curves.SKY}
rows = {"QLoRA": parts, "QLoRA, states paged out": parts | {"states": 0}}
for name, row in rows.items():
    room = {"room for tokens": one_gpu.GPU - sum(row.values())}
    rows[name] = {kind: (row | room)[kind] for kind in kinds}
room = [row["room for tokens"] / 1e9 for row in rows.values()]
title = f"Paging the states gives {room[1] / room[0]:.1f} times the room for tokens"
figure = curves.bars(rows, kinds=kinds, title=title, subtitle="65B model, 48 GB")
lesson.show(figure, "Room for tokens: {:.2f} GB, paged {:.2f} GB".format(*room))
lesson.measured("9.3", fits)
lesson.live("Q6", fits, fits, fits)

# %% tags=["nbval-check-output"]
lesson.verdict("Q6")

# %% [markdown]
# The 48 GB leave room for one sequence of 2,949 tokens, at 1.76 MB a token. (The paper
# trains on at most `512` tokens.) Paging the states more than doubles the length, to
# 6,590 tokens.
#
# Paging frees the same bytes on every GPU. A cheaper token gains more where more room
# is left. Suppose that you rent a larger GPU. From how many GB on is another change
# better than paging the states?

# %%
lesson.predict("9.4", low=None, high=None, unit="GB of GPU memory")

# %%
lines = {name: [] for name in changes}
for size in range(44, 81, 4):
    for name, change in changes.items():
        now, _, longest = plan(parts, a_token, size * 1e9, {name: change})
        lines[name].append((size, longest - now))
best = {size: plan(parts, a_token, size * 1e9, changes)[1] for size in range(44, 81)}
first = min(size for size in best if best[size] != "page the states")
figure = curves.lines(
    lines,
    x="Memory of the GPU, GB",
    y="Gain in the longest sequence, tokens",
    title=f"Paging gains the same on every GPU. From {first} GB, cheaper tokens win",
    subtitle="Llama-65B in QLoRA, one sequence an optimizer step. Computed, not run.",
    names="foot",
)

# %%
lesson.show(figure, f"Best up to {first - 1} GB: {best[44]}; then: {best[80]}.")
lesson.measured("9.4", first)
s = changes["half the checkpoints on the host"]["a token"]
edge = (sum(parts.values()) + parts["states"] / (1 / s - 1)) / 1e9
print(f"a factor of {s:.2f} on a token: by the equation below, from {edge:.1f} GB on")
lesson.control("Equation and sweep agree.", first - 1 <= edge <= first)
print(f"Paging copies {2 * parts['states'] / 25e9:.1f} s a step, at 25 GB/s")

# %% [markdown]
# The best change depends on the room that is left. On 48 GB, paging is best. From 54 GB
# on, keeping half of the checkpoints on the host gains more. The threshold follows from
# the bill. Let $R$ be the room, and $c$ the bytes of a token, so that $R / c$ tokens
# fit. A factor $s$ on the bytes of a token makes room for $R / (s c)$ tokens, and $F$
# freed bytes for $(R + F) / c$. The factor gains more where
#
# $$R \left(\frac{1}{s} - 1\right) > F$$
#
# Here $s$ is 0.63 and $F$ is 6.40 GB, so that the threshold is at 53.6 GB. Each change
# has its price. Paging copies the states both ways in every optimizer step: about 0.5
# seconds over a link of 25 GB/s. A smaller rank trains another model.
#
# ## Quiz
#
# Answer for yourself, then open the options.
#
# **1. A long row does not fit. Which bytes can a paged optimizer free?**
#
# <details><summary>The activations of the long row</summary>
#
# No. Forward and backward pass need them: they are the spike.
#
# </details>
# <details><summary>AdamW's states</summary>
#
# Right. Only the update needs them, and it comes after the spike.
#
# </details>
# <details><summary>The weights of layers that are not at work</summary>
#
# No. A paged optimizer moves its own states and nothing else.
#
# </details>
#
# **2. A clean page must leave its slot. What is copied?**
#
# <details><summary>Nothing</summary>
#
# Right. The store has the same values.
#
# </details>
# <details><summary>Its $m$ and $v$, to the store</summary>
#
# No. Only a dirty page holds values that the store does not have.
#
# </details>
# <details><summary>Its slice of the weights</summary>
#
# No. A page holds states. The weights stay where they are.
#
# </details>
#
# **3. Why does LRU fail when every step starts over at the first page?**
#
# <details><summary>It throws out dirty pages first</summary>
#
# No. LRU looks at the last use, and not at what was written.
#
# </details>
# <details><summary>It has too few slots for one step</summary>
#
# No. With the same slots, the best order has far fewer faults.
#
# </details>
# <details><summary>The page needed next is the one that has just left</summary>
#
# Right. Among the resident pages, its use was longest ago.
#
# </details>
#
# **4. Your GPU has much free room, and you want longer sequences. What helps most?**
#
# <details><summary>Cheaper tokens</summary>
#
# Right. Half the bytes a token double what fits, however much room there is.
#
# </details>
# <details><summary>Paging the states</summary>
#
# No. Paging adds a fixed number of bytes, which matters most where room is scarce.
#
# </details>
# <details><summary>A smaller rank</summary>
#
# No. A smaller rank also frees a fixed number of bytes.
#
# </details>
#
# **5. (From notebook 08.) What takes most memory in QLoRA on 48 GB?**
#
# <details><summary>The adapters and their states</summary>
#
# No. Together they take about a quarter of what the weights take.
#
# </details>
# <details><summary>The weights, although they have four bits</summary>
#
# Right. They take about seven tenths of the GPU.
#
# </details>
# <details><summary>The dequantized weights</summary>
#
# No. Only one matrix at a time is dequantized.
#
# </details>
#
# ### In your own words
#
# A colleague trains a LoRA, whose states take `0.3` GB. Rare long rows make a spike of
# `4` GB, and the run dies. She wants a paged optimizer. What do you decide, and why?
# Answer in three sentences.
#
# <details><summary>A model answer</summary>
#
# "Paging can absorb min(1, `0.3 / 4`), about `8 %` of the spike, so I would not rely on
# it. I would shrink the spike itself: gradient checkpointing, or a limit on the length
# of rows. With full fine-tuning, whose states are larger than the spike, I would page."
#
# </details>
#
# ## Limits
#
# - **Counted, not run.** Our control compares the sum with real steps of small models
#   on a CPU. No 65B model was trained here, and CUDA's context and the allocator's gaps
#   are in no tensor.
# - **Bytes, not time.** We did not measure what page faults cost on a GPU.
# - **The paper** (its result, not ours) trains a 65B model on one GPU of 48 GB. It
#   reports that paging costs no time at batch size 16, and that it did not study when
#   paging is slow.
#
# ## Your guesses
#
# Of ranges that you are `90 %` sure of, nine in ten should hold the measured value.

# %%
lesson.calibration()

# %% [markdown]
# ## Receipt

# %%
lesson.receipt()

# %% [markdown]
# ## Where to go next
#
# - Dettmers and others, [QLoRA](https://arxiv.org/abs/2305.14314): section three, on
#   paged optimizers.
# - Loshchilov and Hutter, [AdamW](https://arxiv.org/abs/1711.05101): the states that
#   are paged here.
# - bitsandbytes, [paged
#   AdamW](https://huggingface.co/docs/bitsandbytes/reference/optim/adamw): the same on
#   a GPU, by CUDA's unified memory.
# - Kwon and others, [PagedAttention](https://arxiv.org/abs/2309.06180): another thing,
#   for keys and values in serving.
