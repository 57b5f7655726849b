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
# # Many adapters on one base
#
# **One base can answer for many adapters in one pass, if each row of the batch brings
# its own adapter. A loop over the adapters pays for a pass each.**
#
# **You need** notebook 04 (LoRA from scratch) and notebook 11 (what an adapter costs
# that is not merged).
#
# **At the end you can**
#
# - compute a batch whose rows have different adapters, in three ways;
# - say which of these ways pays for the number of adapters, and which does not;
# - handle adapters of different rank without paying the largest rank everywhere;
# - divide the memory of a server between rows and adapters;
# - find out which cached keys and values an adapter may use, and build that cache.
#
# **Only ten minutes?** Write `start("13", quick=True)` below and run all cells. Read
# "The result first", "Idea one", and what follows the two headings "On trial".

# %%
from peft_from_scratch.course import start

lesson = start("13")

# %%
import math
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel

import peft_from_scratch as pfs  # the course's library
from peft_from_scratch.course import Engine, Request, Slots, bottleneck_pictures
from peft_from_scratch.course import curves, intervals, ledger, many_adapters
from peft_from_scratch.course import page_picture, runs, serving_pictures, wrong_cache
from peft_from_scratch.course.checks import many_adapters as checks

# %% [markdown]
# ## The result first
#
# Suppose that a hundred teams each trained a LoRA on the same model. A server with a
# hundred merged models needs a hundred times the memory. A server with one base and a
# hundred adapters needs little more than one model. But requests of different teams
# then arrive at the same time, and each wants its own adapter.
#
# The next cells take one **decoding step** (one new token for each row) of SmolLM2. The
# batch has eight **rows**, which are sequences that are written at the same time. Each
# row has an adapter of its own. The **loop** makes a pass of the model for each
# adapter. The **gather** makes one pass for all rows.
#
# A second pass without adapters is the **control**: it should take the same time.
#
# Predict: how many times as long as one pass without adapters does the loop take?

# %%
lesson.predict("13.1", low=None, high=None, unit="times a pass without adapters")

# %%
model, _ = lesson.load_model()
slots = Slots(model.eval())  # lets each row of a batch have an adapter of its own
torch.manual_seed(0)
eight = [many_adapters.random_lora(model, {"r": 8, "size": 0.1}) for _ in range(8)]
ids = torch.randint(3, model.config.vocab_size, (8, 17))  # 16 tokens are cached
one_pass, looped = many_adapters.gathered, many_adapters.looped
steps = {
    "no adapter": one_pass(slots, ids, [None] * 8),
    "no adapter, timed again (control)": one_pass(slots, ids, [None] * 8),
    "one adapter for all rows": one_pass(slots, ids, eight[:1] * 8),
    "eight adapters, gather": one_pass(slots, ids, eight),
    "eight adapters, loop": looped(slots, ids, eight),
}
one, other = (steps[f"eight adapters, {way}"]() for way in ("gather", "loop"))
gap = ((one - other).norm() / other.norm()).item()
lesson.control("Gather and loop compute the same logits.", gap < 1e-4)

# %%
seconds = many_adapters.in_turn(steps, rounds=6)
times = many_adapters.relative(seconds, "no adapter")
times = {name: {"8 rows": each} for name, each in times.items()}
figure = bottleneck_pictures.ratios(
    times,
    title="In a loop, each adapter costs a pass; gathered, all share one",
    subtitle="SmolLM2, eight rows, on this machine: median with its 95 % interval.",
    control=["no adapter, timed again (control)"],
)
lesson.show(figure, bottleneck_pictures.ratios_in_words(times) + ".")
lesson.measured("13.1", times["eight adapters, loop"]["8 rows"][0])
del model, slots, steps

# %% [markdown]
# Both ways compute the same logits. The gather takes little longer than one adapter for
# all rows, and the loop takes several times as long.
#
# ## Three adapters to work with
#
# The base is `tiny`, our model of one million parameters, so that training takes
# seconds. Each adapter learns to answer the same sentences in another way: `gap-1` with
# a record, `gap-2` with a record in invented words, and `gap-3` in an invented
# language. With `template="raw"`, the model reads plain text, without a chat format.


# %%
def learn(name, steps=60):
    """Train a LoRA on a task and save it; the model is as before."""
    task = pfs.tasks.load_task(name)
    rows = list(task.train.select(range(16 * steps)))
    rows = pfs.templates.encode_rows(tokenizer, task.instruction, rows, template="raw")
    torch.manual_seed(0)
    pfs.lora.inject(tiny, r=8, alpha=16)
    optimizer = torch.optim.AdamW(pfs.trainable(tiny).values(), lr=1e-2)
    for step in range(steps):
        batch = pfs.loss.batch_of(rows[16 * step : 16 * step + 16], tiny.device)
        loss = tiny(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{name}: training loss {loss.item():.2f}")
    pfs.save(tiny, folder / name)
    pfs.remove(tiny)


# %%
tiny, tokenizer = pfs.load_model("tiny", device="cpu")
folder, tasks = Path(tempfile.mkdtemp()), ["gap-1", "gap-2", "gap-3"]
for name in tasks:
    learn(name)
pool = pfs.AdapterPool(tiny, budget_bytes=2_000_000)
for name in tasks:
    pool.add(name, folder / name)

# %% [markdown]
# An **adapter pool** knows adapters by name. Inside `pool.batch(names)`, row $i$ of the
# model's batch is answered with the adapter `names[i]`, and `None` is the base alone.
# The next cell asks the same sentence four times in one batch.

# %%
task = pfs.tasks.load_task("gap-2")
some = list(task.test.select(range(40)))
test = pfs.templates.encode_rows(tokenizer, "", some, template="raw")
prompt = [i for i, label in zip(*test[0], strict=True) if label == -100]
names, four = [*tasks, None], torch.tensor([prompt] * 4)
with torch.no_grad(), pool.batch(names):
    more = {"attention_mask": torch.ones_like(four), "max_new_tokens": 14}
    out = tiny.generate(four, do_sample=False, **more)
print(tokenizer.decode(prompt))
for name, row in zip(names, out, strict=True):
    answer = tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)
    print(f"{name or 'base':6}{answer}")

# %% [markdown]
# Four rows of one batch gave four different answers to one sentence. (Sixty steps are
# few for a new language: `gap-3` names the wrong town.)
#
# ## Idea one: each row brings its own matrices
#
# The base's product $W_0 x$ is the same for all rows, so it should be computed once for
# all. Only the small update differs. Let $v(i)$ be the adapter of row $i$:
#
# $$h_i = W_0\,x_i + B_{v(i)}\,A_{v(i)}\,x_i$$
#
# | symbol | what it is | shape |
# |---|---|---|
# | $x_i$, $h_i$ | input and output of a projection in row $i$ | $d_{in}$, $d_{out}$ |
# | $W_0$ | the frozen weight, shared by all | $d_{out} \times d_{in}$ |
# | $A_a$ | first matrix of adapter $a$ | $r \times d_{in}$ |
# | $B_a$ | its second matrix, times the scale $\alpha / r$ | $d_{out} \times r$ |
# | $v(i)$ | the number of row $i$'s adapter | an integer |
#
# For example, all sizes are one, $W_0 = 2$, adapter 0 has $B A = 1$, and adapter 1 has
# $B A = -2$. Two rows with $x = 3$ and $v = (0, 1)$ give $6 + 3 = 9$ and $6 - 6 = 0$.
#
# There are three ways to compute this for a whole batch.

# %%
lesson.show(
    serving_pictures.three_ways("abac"),
    "Four rows with three adapters: three passes in a loop; one pass with twelve "
    "products, eight of them for nothing; or one pass, each row with its own A and B.",
)

# %% [markdown]
# **The loop** sorts the rows by adapter and handles each group alone. It reads $W_0$
# from memory once for each adapter. **The masked product** multiplies each row with the
# $A$ of *every* adapter, and sets what belongs to others to zero. **The gather** copies
# the row's own $A$ and $B$ when the row joins the batch. Then two **batched products**
# (`bmm`: one small product for each row, in one call) compute all updates.
#
# Here are the three for one projection. `A` is `(m, r, d_in)`, `B` is `(m, d_out, r)`
# and `x` is `(rows, tokens, d_in)`.


# %%
def by_loop(x, W0, A, B, v):
    h = x.new_empty(*x.shape[:2], len(W0))
    for a in v.unique():
        rows = v == a
        h[rows] = x[rows] @ W0.T + x[rows] @ A[a].T @ B[a].T
    return h


def masked(x, W0, A, B, v):
    m, r, _ = A.shape
    z = x @ A.flatten(0, 1).T  # (rows, tokens, m r): each row with every adapter
    own = v[:, None] == torch.arange(m).repeat_interleave(r)  # (rows, m r)
    return x @ W0.T + (z * own[:, None]) @ B.transpose(1, 2).flatten(0, 1)


def gathered(x, W0, own_A, own_B):  # own_A = A[v], own_B = B[v]
    z = torch.bmm(x, own_A.transpose(1, 2))  # (rows, tokens, r)
    return torch.baddbmm(x @ W0.T, z, own_B.transpose(1, 2))


# %%
torch.manual_seed(0)
d, r = 576, 8  # a projection of SmolLM2's size
x, W0 = torch.randn(16, 1, d), torch.randn(d, d) / d**0.5
calls = {("no adapter", 0): lambda: x @ W0.T}
for m in (1, 2, 4, 8, 16):
    A, B = torch.randn(m, r, d) / d**0.5, torch.randn(m, d, r) / r
    v = torch.arange(16)[torch.randperm(16)] % m
    calls["loop", m] = partial(by_loop, x, W0, A, B, v)
    calls["masked", m] = partial(masked, x, W0, A, B, v)
    calls["gather", m] = partial(gathered, x, W0, A[v], B[v])
    for way in ("loop", "masked"):
        assert torch.allclose(calls[way, m](), calls["gather", m](), atol=1e-4)
print("The three ways agree for 1, 2, 4, 8 and 16 adapters.")

# %%
seconds = many_adapters.in_turn(calls, rounds=9, repeat=20)
print("microseconds, sixteen rows    adapters: 1     2     4     8    16")
for way in ("loop", "masked", "gather"):
    middle = [1e6 * sorted(seconds[way, m])[4] for m in (1, 2, 4, 8, 16)]
    print(f"{way:36}", *(f"{each:5.0f}" for each in middle))
print(f"without adapters: {1e6 * sorted(seconds['no adapter', 0])[4]:.0f}")

# %% [markdown]
# The loop's time grows with each adapter, and the gather's stays nearly flat. (The
# gather's copies are made once for each request, not in each decoding step, and are not
# timed here.) The masked product is fast for a few adapters, as long as $m r$ is small
# beside $d$. Its arithmetic grows with $m$, so a thousand adapters would rule it out.
#
# ### Exercise 13.1: the gathered product, with ranks of different size
#
# Difficulty three of five, importance five of five, about fifteen minutes. Real
# adapters have different ranks, and some rows want the base alone. Write `my_gather`:
#
# - `x` is `(rows, tokens, d_in)` and `W0` is `(d_out, d_in)`;
# - `A` and `B` are lists: adapter `a` has `A[a]`, `(r_a, d_in)`, and `B[a]`,
#   `(d_out, r_a)`; there is at least one adapter;
# - `v` is a list with a number or `None` for each row; `None` is no adapter, and all
#   rows may be `None`.
#
# Return $h$, `(rows, tokens, d_out)`. All tensors have one dtype, and so has $h$. Use
# at most eight matrix products, however many rows and adapters there are; three are
# enough. Leave the arguments unchanged. Example: with all sizes one, `W0` `[[2.]]`,
# `A = [[[1.]], [[1.]]]`, `B = [[[1.]], [[-2.]]]` (as tensors), `v = [1, None]` and `x`
# all `3.`, the result is `0.` and `6.`.
#
# <details><summary>Hint one: a question</summary>
#
# What do rows of zeros in `A[a]`, and columns of zeros in `B[a]`, do to $B A$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# With the largest rank `r`, all adapters fit into `(m, r, d_in)` and `(m, d_out, r)`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `r = max(len(a) for a in A)`, and then
# `torch.stack([F.pad(a, (0, 0, 0, r - len(a))) for a in A])`
#
# </details>


# %% tags=["exercise-13.1"]
def my_gather(x, W0, A, B, v):
    """h (rows, tokens, d_out), where row i has adapter v[i], or none."""
    ### BEGIN SOLUTION
    r = max(len(a) for a in A)
    wide_A = torch.stack([F.pad(a, (0, 0, 0, r - len(a))) for a in A])  # (m, r, d_in)
    wide_B = torch.stack([F.pad(b, (0, r - b.shape[1])) for b in B])  # (m, d_out, r)
    rows = [i for i, a in enumerate(v) if a is not None]
    own = [v[i] for i in rows]
    h = x @ W0.T
    z = torch.bmm(x[rows], wide_A[own].transpose(1, 2))
    h[rows] += torch.bmm(z, wide_B[own].transpose(1, 2))
    return h
    ### END SOLUTION


# %% tags=["check-13.1", "points-4"]
checks.gathered_product(my_gather)

# %% [markdown]
# ## Idea two: a small adapter should not pay for a large one
#
# Padding to the largest rank makes one large adapter expensive for all rows. We call
# the added arithmetic the **rank tax**. Suppose that fifteen rows of a batch have rank
# `4` and one has rank `64`. Their ranks sum up to $15 \cdot 4 + 64 = 124$. After
# padding they sum up to $16 \cdot 64 = 1024$, and the arithmetic grows with that sum.
#
# An answer to exercise 13.1 that pads to the largest rank pays this tax. The library
# sorts the rows of a batch into **classes** instead: each rank is rounded up to a power
# of two, at least four, and each class has its own two products.

# %%
ranks = [4, 4, 6, 8, 8, 12, 16, 64]
figure = serving_pictures.rank_classes(ranks)
classes = [serving_pictures.class_of(rank) for rank in ranks]
largest = len(ranks) * max(ranks)
said = f"Ranks sum up to {sum(ranks)}; in classes to {sum(classes)}; padded to the "
lesson.show(figure, f"{said}largest to {largest}.")
gather = lesson.mine(my_gather, checks.our_gather)
lists = [torch.randn(k, d) / d for k in ranks], [torch.randn(d, k) for k in ranks]
h = gather(x[:8], W0, *lists, [*range(7, 0, -1), None])  # the last row has none
print("without an adapter, off by", (h[7] - (x @ W0.T)[7]).abs().max().item())

# %% [markdown]
# The eight ranks above sum up to 122. Classes make it 128, and one rank for all makes
# it 512. Finer classes would save more arithmetic, but each class costs two more calls
# in every projection.
#
# ## Idea three: rows join and leave between two steps
#
# A batch of requests that begins together does not end together. If it waits for its
# longest answer, the places of finished rows stay empty. In **continuous batching**, a
# finished row leaves after its step, and a waiting request takes its place at once,
# with its own adapter.
#
# The library's `Engine` does this, turn by turn. In each **turn** it reads the prompt
# of one waiting request at most, which also gives the first token of that answer. Then
# it takes one decoding step for all rows. So requests start one after another. An
# answer of six tokens takes five turns, since its first turn gives two tokens.
#
# We call the turns by hand, with three places and eight requests of different length.
# The figure compares them with **fixed groups**, computed from the same lengths: three
# requests at a time, and each group waits for its longest answer.

# %%
served, served_tokenizer = pfs.load_model("tiny", device="cpu")
own_pool = pfs.AdapterPool(served, budget_bytes=2_000_000)
for name in tasks:
    own_pool.add(name, folder / name)
engine = Engine(served, served_tokenizer, own_pool, rows=3)
lengths = [6, 20, 4, 12, 5, 14, 7, 3]
turn, seen = 0, [[] for _ in lengths]
for number, length in enumerate(lengths):
    request = Request(tuple(prompt), tasks[number % 3], length)
    engine.submit(request, lambda piece, own=seen[number]: own.append(turn))
while engine.running or engine.waiting:
    engine.turn()
    turn += 1
engine.close()

# %%
ways = serving_pictures.both_ways([tasks[i % 3] for i in range(8)], seen, rows=3)
figure = serving_pictures.over_time(
    ways,
    title="A place that becomes free is taken at once",
    subtitle="Eight requests in three places. Hatched: an empty place.",
)
took = {way: max(span.stop for span in spans) for way, spans in ways.items()}
said = ", ".join(f"{way} {turns} turns" for way, turns in took.items())
lesson.show(figure, f"Until the last answer is complete: {said}.")

# %% [markdown]
# The same eight answers take fewer turns, because almost no place is empty. Each row
# had its own adapter all the time.
#
# ## Idea four: a pool within a budget
#
# Thousands of adapters fit on a disk, but not in memory. A pool keeps some of them in
# memory, within a **budget** of bytes. If a request wants another one, the adapter
# whose last use is longest ago leaves (LRU, as in notebook 09), unless a row still uses
# it. Here the budget has room for two of our three adapters. `add` loads each adapter
# once, to check it. So the last two are in memory when the first request comes.

# %%
small = pfs.AdapterPool(tiny, budget_bytes=700_000)
for name in tasks:
    small.add(name, folder / name)
uses = []
for name in ["gap-2", "gap-3", "gap-2", "gap-1", "gap-2", "gap-3", "gap-1", "gap-3"]:
    loaded = not small.is_resident(name)
    small.release(small.acquire(name))  # in use from here to there
    inside = frozenset(each for each in tasks if small.is_resident(each))
    uses.append(serving_pictures.Use(name, inside, loaded))
figure = serving_pictures.pool(
    uses,
    title="The adapter used longest ago makes room",
    subtitle=f"{small.cards()[0].bytes:,} bytes each, {small.budget_bytes:,} in all.",
)
loads = sum(use.loaded for use in uses)
lesson.show(figure, f"{loads} of {len(uses)} requests had to load their adapter.")
lesson.control("The budget was kept.", small.bytes <= small.budget_bytes)

# %% [markdown]
# A name is only a label. What an adapter *is* are the bytes of its folder, and their
# **digest** (a hash, `sha256` here) identifies them. If someone trains again and adds
# the result under the old name, the digest changes. Requests in progress go on with the
# old content, and new ones get the new content. What if a name is unknown?

# %%
try:
    small.acquire("gap-9")
except KeyError as error:
    print("refused:", error.args[0])

# %% [markdown]
# An unknown name is refused. `python -m peft_from_scratch serve` puts the engine behind
# HTTP; its server answers a request for an unknown adapter with the status `404` ("not
# found"), and never with the base. The base's answer would look plausible, so nobody
# would notice the wrong name.
#
# ### Exercise 13.2: rows or adapters?
#
# Difficulty four of five, importance four of five, about twenty minutes. A server has
# `memory` bytes. Each row of the batch takes `row` bytes (keys, values and a copy of
# its adapter), and each **slot** of the pool holds one adapter of `adapter` bytes. More
# rows answer more requests at once. More slots avoid loads. Decide how to divide the
# memory.
#
# - `trace` is a list of adapter names, one for each request, in order. Each load takes
#   `load` seconds. `page_picture.faults(slots, trace)` counts the loads under LRU.
# - Requests are answered in groups of `rows`; the last group may be smaller. A group
#   takes `seconds[rows]`, a smaller one too. The keys of this dictionary are the
#   allowed numbers of rows.
# - There must be at least as many slots as rows, since each row of a group may need an
#   adapter of its own.
#
# Return `(rows, slots, time)` with the smallest total time: all loads plus all groups.
# Every plan with this time is accepted. Return `None` if no plan fits.
#
# Example:
# `my_plan(100, 10, 10, ["a", "b", "a", "c", "a"], 3.0, {1: 1.0, 2: 1.5, 4: 2.5})` may
# be `(2, 8, 13.5)`. Three loads take `9.0` s, and three groups `4.5` s.
#
# <details><summary>Hint one: a question</summary>
#
# For a given number of rows, why should all of the remaining memory become slots?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# You compare at most `len(seconds)` plans. Each is a tuple of two `int` and a number.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `best = None`, and then `for rows, group in seconds.items():`
#
# </details>


# %% tags=["exercise-13.2"]
def my_plan(memory, row, adapter, trace, load, seconds):
    """(rows, slots, time) of the fastest division of the memory, or None."""
    ### BEGIN SOLUTION
    best = None
    for rows, group in seconds.items():
        slots = (memory - rows * row) // adapter
        if slots < rows:
            continue
        loads = page_picture.faults(slots, trace)
        time = load * loads + group * math.ceil(len(trace) / rows)
        if best is None or time < best[2]:
            best = rows, slots, time
    return best
    ### END SOLUTION


# %% tags=["check-13.2", "points-4"]
checks.cheapest_plan(my_plan)

# %% [markdown]
# The next cell asks for the best plan as loads become slower. The traffic is the same:
# two hundred requests for forty adapters, of which a few are popular.

# %%
plan = lesson.mine(my_plan, checks.our_plan)
torch.manual_seed(0)
popular = 1 / torch.arange(1.0, 41)
trace = [f"a{i}" for i in torch.multinomial(popular, 200, replacement=True).tolist()]
group = {rows: 1 + 0.05 * rows for rows in (1, 2, 4, 8, 16, 32)}  # seconds
for load in (0.0, 0.1, 1.0, 10.0):
    rows, free, time = plan(300, 10, 8, trace, load, group)
    print(f"a load takes {load:4} s: {rows:2} rows, {free:2} slots, {time:6.1f} s")

# %% [markdown]
# If loads take no time or little, memory should go to rows. Once a load takes as long
# as a group of requests, it should go to slots, so that popular adapters stay in
# memory.
#
# ## Idea five: keys and values belong to an adapter
#
# A server saves work by keeping the **keys and values** of prompts that it has read.
# The next request with the same beginning skips that part: a **prefix cache**. But an
# adapter changes keys and values. It may sit at the projections that compute them. If
# not, it changes the output of earlier layers, from which they are computed. So the
# same prompt has other keys and values under each adapter.
#
# The next cell reads a prompt under adapter `gap-1`, keeps the cache of all but its
# last token, and lets `gap-2` go on from there. The tokens themselves are the same.


# %%
def preferred(model, cache, row, kept):
    """The answer's tokens that a model prefers, with `kept` tokens of a cache."""
    cache = deepcopy(cache)
    cache.crop(kept - row.shape[1])  # a negative number: so many tokens go
    logits = model(input_ids=row[:, kept:], past_key_values=cache).logits[0]
    return logits[n - 1 - kept : -1].argmax(-1).tolist()  # from the prompt's last on


a, b = (pfs.load_model("tiny", device="cpu")[0].eval() for _ in range(2))
for each, name in ((a, "gap-1"), (b, "gap-2")):
    pfs.load(each, folder / name)
row, n, pictured = torch.tensor([test[0][0]]), len(prompt), {}
words = serving_pictures.words_of(tokenizer)
with torch.no_grad():
    cache, right = a(input_ids=row, use_cache=True).past_key_values, None
    for kept in (0, n - 1):
        got = preferred(b, cache, row, kept)
        right = right or got  # with nothing from the cache
        pictured[f"{kept} tokens from the cache of gap-1"] = serving_pictures.tokens(
            words(prompt), words(got), words(right), kept, ("gap-1", "gap-2")
        )

# %%
figure = serving_pictures.strips(
    pictured,
    title="With the keys and values of another adapter, other tokens are preferred",
    subtitle="The prompt, then what gap-2 prefers at each place of the answer.",
)
counts = [sum(token.changed for token in each) for each in pictured.values()]
lesson.show(figure, "Changed tokens: {} and {}.".format(*counts))

# %% [markdown]
# No error is raised: the shapes fit, and the text looks plausible. That makes this bug
# hard to notice.
#
# ### A real bug
#
# Serving engines had this bug: their caches looked at the tokens alone. The cache below
# also looks at the adapter's name. Is that enough? A team trains its adapter again and
# adds it under the same name, `mail`. No cached token may be given to the new content.
# How many are?


# %%
class NamedCache:
    """Keys and values of prompts that were read before."""

    def __init__(self):
        self.kept = {}

    def keep(self, version, tokens, cache):
        self.kept[version.name, tuple(tokens)] = cache

    def find(self, version, prompt):
        for n in range(len(prompt) - 1, 0, -1):  # the longest first
            if (version.name, tuple(prompt[:n])) in self.kept:
                return n, self.kept[version.name, tuple(prompt[:n])]
        return 0, None


# %%
def tokens_after_retraining(cache):
    """How many cached tokens `mail` is given right after its content has changed."""
    for content in ("gap-1", "gap-2"):
        pool.add("mail", folder / content)
        version = pool.acquire("mail")
        n, _ = cache.find(version, prompt)
        cache.keep(version, prompt[:-1], "its keys and values")
        pool.release(version)
    return n


print("tokens from the old content:", tokens_after_retraining(NamedCache()))

# %% [markdown]
# For all but one token of the prompt, the new adapter gets the keys and values of the
# old one. Find out what the key of this cache should be.
#
# ### Exercise 13.3: a cache that cannot mix up adapters
#
# Difficulty three of five, importance five of five, about fifteen minutes. Write
# `MyPrefixCache` with two methods:
#
# - `keep(version, tokens, cache)` keeps `cache`, any object, for these tokens. What is
#   kept again replaces what was kept before.
# - `find(version, prompt)` returns `(n, cache)` for the longest kept `tokens` that are
#   the first `n` of `prompt`. They must have been read under the same *content*, and at
#   least one token of the prompt must be left to read. Without such, it returns
#   `(0, None)`.
#
# A `version` has a `name` and a `digest`, both texts; it is `None` for the base, which
# has keys and values of its own. The same content under two names is the same.
# `tokens` (never empty) and `prompt` are lists or tuples of integers that belong to the
# caller.
#
# Example: after `keep(v, [5, 6], c)`, `find(v, [5, 6, 7])` is `(2, c)`, while
# `find(v, [5, 6])` is `(0, None)`, since nothing would be left to read.
#
# <details><summary>Hint one: a question</summary>
#
# What does a second `add` under the same name change: the name, the digest, or both?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# A key is a pair: a text or `None`, and a tuple of integers.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `content = None if version is None else version.digest`
#
# </details>


# %% tags=["exercise-13.3"]
class MyPrefixCache:
    """Keys and values of prompts, told apart by the content that read them."""

    def __init__(self):
        self.kept = {}

    def keep(self, version, tokens, cache):
        ### BEGIN SOLUTION
        content = None if version is None else version.digest
        self.kept[content, tuple(tokens)] = cache
        ### END SOLUTION

    def find(self, version, prompt):
        ### BEGIN SOLUTION
        content = None if version is None else version.digest
        for n in range(len(prompt) - 1, 0, -1):
            if (content, tuple(prompt[:n])) in self.kept:
                return n, self.kept[content, tuple(prompt[:n])]
        return 0, None
        ### END SOLUTION


# %% tags=["check-13.3", "points-4"]
checks.prefix_cache(MyPrefixCache)

# %%
Cache = lesson.mine(MyPrefixCache, checks.OurPrefixCache)
n = tokens_after_retraining(Cache())
lesson.control("No cached token comes from the old content.", n == 0)

# %% [markdown]
# ## On trial: claim M3
#
# This course tests claims of a textbook. M3: *Multiple LoRA adapters can be served
# simultaneously with a shared base model.* The sentence leaves open what this costs. So
# the **rule**, which says how the claim is judged, asks for the **throughput**, in
# tokens per second, of sixteen rows with sixteen adapters in one gathered batch. It is
# compared with one adapter for all rows, where nothing has to be gathered.
#
# The base is timed twice, and the two times should be equal. Their difference shows how
# far a clock errs. The shipped runs count only if it is below ten percent. Your run
# below is much shorter, so its interval is made wider by that difference.

# %%
lesson.rule("M3")
lesson.predict("13.2", low=None, high=None, unit="% of the throughput")

# %%
config = many_adapters.config("tiny", 0) | {"adapters": [1, 16], "steps": 4}
live = many_adapters.compute(config)
ms = live["ms"]
kept = [100 * a / b for a, b in zip(ms["gather 1"], ms["gather 16"], strict=True)]
kept, low, high = intervals.of_median(kept)
_, less, more = many_adapters.relative(ms, "base")["again"]  # how far the clock errs
low, high = low * min(1, less), high * max(1, more)  # and so much wider
lesson.control("The mixed batch equals its rows one by one.", live["apart"] < 1e-4)
lesson.control("Swapped adapters change the logits.", live["swapped"] > 1e-2)
lesson.measured("13.2", kept)

# %%
stored = [runs.stored(each) for each in ledger.claim("M3").configs("smollm2")]
series = {way: many_adapters.throughput(stored, way) for way in ("gather", "loop")}
series["gather, tiny, you"] = [(16, kept, low, high)]
figure = curves.lines(
    series,
    x="Adapters among sixteen rows, count",
    y="Throughput, % of that with one adapter",
    title="A gathered batch keeps most of its throughput; a loop loses it",
    subtitle="SmolLM2, three times seven rounds; bands are 95 % intervals.",
    names="foot",
)
figure.axes[0].set_ylim(0, 110)
said = ", ".join(f"{share:.0f}" for _, share, _, _ in series["gather"])
lesson.show(figure, f"Gathered, with 1, 2, 4, 8 and 16 adapters: {said} %.")

# %%
lesson.live("M3", kept, low, high, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("M3", guess="13.2")

# %% [markdown]
# The second adapter costs the most: from then on, the engine has to gather. Further
# adapters cost hardly anything. SmolLM2 keeps more than `tiny`, most likely because its
# own products take longer, so that the gather is a smaller share of a decoding step.
#
# ## On trial: claim Y2
#
# The next claim is not from the textbook. It is what the faulty cache of idea five took
# for granted: *keys and values that were cached under one adapter can be used under
# another*. As in the picture there, `gap-2` reads the right answer, token by token, and
# we ask at each place which token it prefers. A **changed token** is a place where this
# differs once the cache comes from `gap-1`. The control is the adapter's own cache,
# which must change nothing. The trial is void unless the two adapters differ clearly.

# %%
lesson.rule("Y2")
lesson.predict("13.3", low=None, high=None, unit="% of the tokens")

# %%
who = {"other task": a, "own": b}
live = wrong_cache.counted(b, who, test, (25, 50, 75, 100))
yours = wrong_cache.by_share([live], "other task")  # an interval over rows; one seed
_, changed, low, high = yours[-1]
own = [share for _, share, _, _ in wrong_cache.by_share([live], "own")]
lesson.control("Its own cache changes nothing.", not any(own))
lesson.measured("13.3", changed)

# %%
results = [runs.stored(each).result for each in ledger.claim("Y2").configs("tiny")]
fillers = ("other task", "same task", "base", "own")
series = {who: wrong_cache.by_share(results, who) for who in fillers}
series["other task, you"] = [(share, mean) for share, mean, _, _ in yours]
figure = curves.lines(
    series,
    x="Prompt that comes from the cache, %",
    y="Changed tokens, %",
    title="The more of the prompt a foreign cache holds, the more tokens change",
    subtitle="tiny, five seeds, two hundred rows each, by who filled the cache.",
    control=("own",),
    names="foot",
)
said = ", ".join(f"{label} {rows[-1][1]:.1f} %" for label, rows in series.items())
lesson.show(figure, f"Whole prompt cached: {said}.")

# %%
lesson.live("Y2", changed, low, high, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("Y2", guess="13.3")

# %% [markdown]
# The figure says who filled the cache. Even an adapter for the same task, trained with
# another seed, changes tokens. So does the base. A cache is safe under one content
# only.
#
# ## Now with the library
#
# PEFT's **mixed batch** takes a list of names, too: `adapter_names`. It loops over the
# adapters in each layer, and `__base__` stands for no adapter. Its logits are ours.

# %%
theirs, _ = pfs.load_model("tiny", device="cpu")
theirs = PeftModel.from_pretrained(theirs, folder / tasks[0], adapter_name=tasks[0])
for name in tasks[1:]:
    theirs.load_adapter(folder / name, adapter_name=name)
mixed = [name or "__base__" for name in names]
with torch.no_grad(), pool.batch(names):
    expected = theirs.eval()(input_ids=four, adapter_names=mixed).logits
    got = tiny(input_ids=four).logits
gap = ((got - expected).norm() / expected.norm()).item()
lesson.control("PEFT and this library agree.", gap < 1e-5)

# %% [markdown]
# ## Quiz
#
# Answer first, then open the options.
#
# **1. Sixteen rows have sixteen adapters. Why is the loop slow?**
#
# <details><summary>It does more arithmetic for the updates</summary>
#
# No. Each row's update is computed once in both ways.
#
# </details>
# <details><summary>It makes sixteen passes, each over all base weights</summary>
#
# Right. A pass over one row is far more expensive than a sixteenth of one over all.
#
# </details>
# <details><summary>It loads the adapters from disk again</summary>
#
# No. They stay in memory between the passes.
#
# </details>
#
# **2. When is the masked product a bad choice?**
#
# <details><summary>When there are many adapters</summary>
#
# Right. Each row is multiplied with every adapter, so its work grows with $m$.
#
# </details>
# <details><summary>When all rows have the same adapter</summary>
#
# No. Then $m$ is one, and nothing is masked.
#
# </details>
# <details><summary>When the rows are in shuffled order</summary>
#
# No. The mask does not depend on the order.
#
# </details>
#
# **3. A request for rank 64 joins a batch of rank 4. What do classes of rank prevent?**
#
# <details><summary>That the new row waits for a place</summary>
#
# No. Places have nothing to do with ranks.
#
# </details>
# <details><summary>That the other rows are padded to rank 64</summary>
#
# Right. Each class has its own two products.
#
# </details>
# <details><summary>That its logits change</summary>
#
# No. Zeros change no result. They only cost time.
#
# </details>
#
# **4. (From notebook 11.) Why not merge each adapter, which costs no time?**
#
# <details><summary>A merged weight serves one adapter only</summary>
#
# Right. Each row would need a base of its own.
#
# </details>
# <details><summary>Merging is not exact enough to be used</summary>
#
# No. In 16 bits or more it is nearly exact.
#
# </details>
# <details><summary>Merged models cannot be batched</summary>
#
# No. The rows of one merged model can.
#
# </details>
#
# **5. Two names in the pool have the same digest. May they share cached prompts?**
#
# <details><summary>No, they belong to different teams</summary>
#
# No. Who may *see* an answer is another question; the numbers are equal.
#
# </details>
# <details><summary>Only if they have the same rank</summary>
#
# No. With equal bytes, everything is equal.
#
# </details>
# <details><summary>Yes, since equal bytes compute equal keys and values</summary>
#
# Right. That is why the digest is the key.
#
# </details>
#
# ### In your own words
#
# A colleague merges one adapter into the base "for speed", and serves forty other
# adapters on the result, each for some of the requests. Which requests are now answered
# wrongly, and which test with two rows shows it?
#
# <details><summary>A model answer</summary>
#
# "All of them. A request for the base gets an update that nobody asked for. A request
# for one of the forty gets the merged update on top of its own. I would send one prompt
# twice in a batch, once with no adapter and once with one of the forty. The first row's
# logits must equal those of the untouched base. The second row's must equal those of
# the untouched base with that adapter alone."
#
# </details>
#
# ## Limits
#
# - **Not tested: GPUs.** One program on a GPU can gather and multiply without copies.
# - **What the controls rule out.** The logits are equal, so a fast batch is not a wrong
#   one. Its own cache changes nothing for an adapter, so it is not cutting a cache that
#   changes tokens.
# - **The papers' figures.** S-LoRA reports up to `4` times the throughput of the first
#   LoRA support of vLLM, a serving engine, and thousands of adapters on one GPU. These
#   are theirs.
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
# - Chen and others, [Punica](https://arxiv.org/abs/2310.18547): the gather as a CUDA
#   kernel.
# - Sheng and others, [S-LoRA](https://arxiv.org/abs/2311.03285): a pool of thousands of
#   adapters.
# - Yu and others, [Orca](https://www.usenix.org/conference/osdi22/presentation/yu):
#   batching between decoding steps.
# - Sheng and others, [Fairness in serving](https://arxiv.org/abs/2401.00588): whose
#   request comes next.
