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
# # Prefix and prompt tuning
#
# Sixteen trained vectors prepended to the input take a frozen SmolLM2 from 0 to 55 %
# right answers. Trained keys and values in every layer take it to 67 %, and LoRA to
# 66 %.
#
# **You need** notebook 04 (LoRA), and what attention computes: queries, keys, values,
# softmax, causal mask.
#
# **At the end you can**
#
# - prepend trained vectors to a padded batch;
# - find the bug that makes a row's answer depend on its neighbors;
# - write attention with a prefix, and compute the prefix's share of it;
# - say why a prefix cannot be merged, and which ratio it cannot change;
# - count the parameters of both methods, and the cache that they fill;
# - choose the run that decides between two explanations.
#
# **Only ten minutes?** Write `start("12", quick=True)` below and run all cells. Read
# "The result first", do exercise 12.4, and read the verdict on claim T3.

# %%
from peft_from_scratch.course import start

lesson = start("12")

# %%
import json
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import peft
import torch
import torch.nn.functional as F

import peft_from_scratch as pfs
from peft_from_scratch.course import block_picture, challengers, counting, curves
from peft_from_scratch.course import finetune, ledger, mean_of, nested_bootstrap, paired
from peft_from_scratch.course import provenance, runs
from peft_from_scratch.course.checks import prefix_and_prompt as checks

# %% [markdown]
# ## The result first
#
# A few trained vectors help the real model a lot, though less than LoRA.
#
# The next cell prints results of SmolLM2 on the task of notebook 00: a sentence in, one
# exact line of JSON out. Brackets hold 95 % intervals over three hundred test rows and
# three seeds. The last column counts **optimizer steps**, the updates of the
# parameters. QLoRA and bottlenecks are in notebooks 08 and 11.

# %%
file = provenance.ROOT / "data" / "results" / "compare.json"
comparison = json.loads(file.read_text("utf-8"))
print("                     trained parameters   exactly right [95 %]   steps")
for row in comparison["rows"]:
    exact = "{rate:5.0%} [{low:.0%}, {high:.0%}]".format(**row["exact"])
    print(f"{row['label']:22} {row['trainable']:16,} {exact:>22} {row['steps']:7}")

# %% [markdown]
# Zero-shot, with an instruction alone, gets 0 %. Prompt tuning trains the fewest
# parameters, 9,216, and gets 55 %, with twice the optimizer steps of the others. Prefix
# tuning gets 67 % with 184,320 parameters. LoRA gets 66 % with over ten times as many.
# The last two cannot be told apart. Prompt tuning is behind both.
#
# The next picture shows one layer, with what prompt tuning trains in color. Pale
# outlines belong to other methods.

# %%
lesson.show(
    block_picture(lit="prompt"),
    "A soft prompt is prepended to the embedded tokens; every weight stays frozen.",
)

# %% [markdown]
# ## Idea one: a prompt of trained vectors
#
# A prompt need not consist of words. A model looks up a vector for each token, its
# **embedding**, and computes with vectors from there on. So we can prepend $n$ vectors
# that belong to no token. **Prompt tuning** trains these vectors, the **soft prompt**
# $P$, and freezes all weights:
#
# $$h = f([P;\ E(x)])$$
#
# | symbol | what it is | shape |
# |---|---|---|
# | $E(x)$ | embeddings of the tokens $x$ | $t \times d_{model}$ |
# | $P$ | the soft prompt, trained | $n \times d_{model}$ |
# | $[P;\ E(x)]$ | $P$, then $E(x)$ | $(n + t) \times d_{model}$ |
# | $f$ | the frozen model after its embedding | |
# | $h$ | **logits**: scores of the next token | $(n + t) \times$ vocabulary |
#
# If $P$ holds the embeddings of real tokens, the logits must be those of that text. The
# next cell compares both for the task's instruction.

# %%
model, tokenizer = lesson.load_model()
task = pfs.tasks.load_task("orders")
text = tokenizer(task.instruction, return_tensors="pt").input_ids
row = tokenizer(" " + task.test[0]["prompt"], return_tensors="pt").input_ids
n, t = text.shape[1], row.shape[1]
with torch.no_grad():
    as_text = model(torch.cat([text, row], 1)).logits[:, n:]
    P, E = model.get_input_embeddings()(text), model.get_input_embeddings()(row)
    as_P = model(inputs_embeds=torch.cat([P, E], 1)).logits[:, n:]
print(f"n = {n} vectors, prepended to t = {t} tokens")
print(f"largest difference of a logit: {(as_P - as_text).abs().max():.1g}")

# %% [markdown]
# The largest difference is 0, so every text prompt is also a soft prompt. Most soft
# prompts correspond to no text.
#
# ### Mask, positions and outputs
#
# A wrong mask or position raises no error. In a batch, shorter rows get **padding**, on
# the left when text is generated. Here are two rows, with a $P$ of two vectors (`P`),
# real tokens (`x`) and padding (`.`):
#
# ```
#            row one        row two
# input      P P x x x x    P P . . x x
# mask       1 1 1 1 1 1    1 1 0 0 1 1
# positions  0 1 2 3 4 5    0 1 1 1 2 3
# ```
#
# - The **mask** gets $n$ ones on the left. Without them, no token attends to $P$.
# - The **positions** count $P$ and real tokens. Those of padding do not matter.
# - The first $n$ **outputs** are cut off. One per token is left.
#
# ### Exercise 12.1: a soft prompt before a batch
#
# Difficulty three of five, importance five of five, about fifteen minutes.
#
# Write `my_prompt(model, P, input_ids, attention_mask)`. `P` is a float tensor `(n,
# d_model)`. The others are int64, `(b, t)`, and the mask is zero at padding, on either
# side. Prepend `P` to each row, before any padding. Give the model embeddings (from
# `model.get_input_embeddings()`), mask and positions. Return the logits of the caller's
# tokens, `(b, t, vocabulary)`. Gradients must reach `P`; the model stays as it is.
#
# Two vectors and the mask `[[1, 1, 1, 1], [0, 0, 1, 1]]` give the table above.
#
# <details><summary>Hint one: a question</summary>
#
# How many ones of the wide mask come before a given token? Which function of torch
# computes running counts?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `P` becomes `(b, n, d_model)`; mask and positions are `(b, n + t)`. Which dimension do
# you cut at the end?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `E = model.get_input_embeddings()(input_ids)`
#
# </details>


# %% tags=["exercise-12.1"]
def my_prompt(model, P, input_ids, attention_mask):
    """The logits (b, t, vocabulary) of the tokens after P (n, d_model).

    Call model(inputs_embeds=…, attention_mask=…, position_ids=…), and take its .logits.
    """
    ### BEGIN SOLUTION
    b, n = len(input_ids), len(P)
    E = model.get_input_embeddings()(input_ids)
    joined = torch.cat([P.expand(b, -1, -1), E], dim=1)  # (b, n + t, d_model)
    mask = torch.cat([attention_mask.new_ones(b, n), attention_mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(inputs_embeds=joined, attention_mask=mask, position_ids=positions)
    return out.logits[:, n:]
    ### END SOLUTION


# %% tags=["check-12.1", "points-3"]
checks.prompt_forward(my_prompt)

# %% [markdown]
# ### Break it on purpose
#
# Without explicit positions, a soft prompt fails in padded batches. The function below
# leaves them out, so the model counts padding too. (It gives most of exercise 12.1
# away.) We run it on a short row, alone and with padding. Predict the largest change of
# a logit at the last token.


# %%
def broken_prompt(model, P, input_ids, attention_mask):
    b, n = len(input_ids), len(P)
    E = model.get_input_embeddings()(input_ids)
    joined = torch.cat([P.expand(b, -1, -1), E], dim=1)
    mask = torch.cat([attention_mask.new_ones(b, n), attention_mask], dim=1)
    return model(inputs_embeds=joined, attention_mask=mask).logits[:, n:]


lesson.predict("12.1", low=None, high=None, unit="(largest change of a logit)")

# %%
longer = F.pad(row, (24, 0), value=tokenizer.eos_token_id)
alone, beside = torch.ones_like(row), F.pad(torch.ones_like(row), (24, 0))
with torch.no_grad():
    one = broken_prompt(model, P[0], row, alone)[0, -1]
    two = broken_prompt(model, P[0], longer, beside)[0, -1]
lesson.measured("12.1", (two - one).abs().max())

# %% [markdown]
# A logit changes by 5.41, because the padding now lies between $P$ and the text.
# SmolLM2 has **rotary positions**: an attention score depends on the distance between
# query and key.
#
# Our library inserts $P$ after the left padding, with the same positions and so the
# same logits. Its argument `start` sets the **initialization**, the values before
# training: random vectors (`random`), random tokens (`vocabulary`), or given tokens.
# The next cell initializes from the instruction, and asserts that the logits of a
# padded row are those of plain text. It also prints the length of the **cache**, which
# keeps keys and values for later tokens.

# %%
with torch.no_grad():
    pfs.prompt.inject(model, n=n, start=text[0].tolist())
    ours = model(longer, attention_mask=beside).logits[:, -t:]
    cache = model(row, use_cache=True).past_key_values
    pfs.remove(model)
gap = (ours - as_text).abs().max()
print(f"largest difference from plain text, padded, as a prompt: {gap:.1g}")
print(f"the cache holds {cache.get_seq_length()} positions for {t} tokens")
assert gap < 1e-3

# %% [markdown]
# The logits agree up to rounding. The last line shows the running cost: 12 tokens take
# 28 positions, computed in every layer and cached for every row.
#
# ## Idea two: a prefix in every layer
#
# A soft prompt is trained at the input only; frozen weights compute its keys and values
# in each layer. **Prefix tuning** trains the keys and values themselves, $n$ of each in
# every layer, called the **prefix**. A prefix has no queries; tokens can only attend to
# it.
#
# In the picture, $K, V$ are the prefix and $k, v$ the tokens. In text and code, the
# prefix is $P_K, P_V$ and the tokens have $K, V$.

# %%
lesson.show(
    block_picture(lit="prefix"),
    "A prefix adds keys and values (here K and V) to every layer, and no query.",
)

# %% [markdown]
# For one attention head, and the query $q$ of one token:
#
# $$\text{head} = \text{softmax}\!\left(\frac{q\,[P_K;\ K]^T}{\sqrt{d}}\right)
# [P_V;\ V]$$
#
# | symbol | what it is | shape |
# |---|---|---|
# | $q$ | the query | $d$, the size of a head |
# | $K, V$ | keys and values of the tokens that it sees | $t \times d$ |
# | $P_K, P_V$ | keys and values of the prefix, trained | $n \times d$ |
#
# Every token sees the whole prefix, because the prefix comes first. Here is the table
# of scores, `(t, n + t)`, with `1` where a query sees something:
#
# ```
#                prefix    tokens
# first query     1  1     1  0  0
# second query    1  1     1  1  0
# third query     1  1     1  1  1
# ```
#
# ### Exercise 12.2: attention with a prefix
#
# Difficulty three of five, importance five of five, about ten minutes.
#
# Write `my_attention(q, K, V, P_K, P_V)` for one head, without a batch. The first three
# are float tensors `(t, d)`, the other two `(n, d)`. Return all outputs, `(t, d)`, in
# the same dtype. Mask only the future of each token; gradients must reach all inputs.
# If all keys are zero and $n$ is two, the first output is the mean of `P_V[0]`,
# `P_V[1]` and `V[0]`.
#
# <details><summary>Hint one: a question</summary>
#
# Which of the `n + t` columns may the very first token see?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# `torch.ones(t, n + t).tril(k)` keeps column `j` of row `i` where `j <= i + k`. Which
# `k` gives the table above?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `scores = q @ torch.cat([P_K, K]).T / …`
#
# </details>


# %% tags=["exercise-12.2"]
def my_attention(q, K, V, P_K, P_V):
    """One causal head: q, K, V (t, d); the prefix P_K, P_V (n, d). Returns (t, d)."""
    ### BEGIN SOLUTION
    (t, d), n = q.shape, len(P_K)
    scores = q @ torch.cat([P_K, K]).T / d**0.5  # (t, n + t)
    seen = torch.ones(t, n + t, dtype=torch.bool).tril(n)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return weights @ torch.cat([P_V, V])
    ### END SOLUTION


# %% tags=["check-12.2", "points-3"]
checks.prefix_attention(my_attention)

# %% [markdown]
# ### What a prefix does to a head
#
# A prefix scales the output of the frozen head down, and adds an output of its own. Let
# $\lambda$ be the **share** of attention on the prefix. Then this holds exactly:
#
# $$\text{head} = (1 - \lambda)\ \text{attn}(q, K, V)
# + \lambda\ \text{attn}(q, P_K, P_V)$$
#
# $$\lambda = \frac{\sum_i e^{s_i}}{\sum_i e^{s_i} + \sum_j e^{s_j}}$$
#
# Here $\text{attn}(q, K, V)$ is the output of the frozen head. The scores are $s_i = q
# \cdot P_{K,i} / \sqrt{d}$ for the prefix and $s_j = q \cdot K_j / \sqrt{d}$ for the
# tokens. With one score of zero on each side, $\lambda$ is one half. The next cell
# computes both sides for one query.

# %%
torch.manual_seed(0)
d = 4
q, K, V = torch.randn(d), torch.randn(6, d), torch.randn(6, d)
P_K, P_V = torch.randn(2, d), torch.randn(2, d)


def attn(q, K, V):
    return (K @ q / d**0.5).softmax(0) @ V


weights = (torch.cat([P_K, K]) @ q / d**0.5).softmax(0)
share = weights[:2].sum()
mixed = (1 - share) * attn(q, K, V) + share * attn(q, P_K, P_V)
joined = attn(q, torch.cat([P_K, K]), torch.cat([P_V, V]))
print(f"share of the prefix: {share:.2f}")
print(f"largest difference of both sides: {(mixed - joined).abs().max():.0e}")

# %% [markdown]
# Both sides agree up to rounding, and the prefix gets a share of 0.31.
#
# **A prefix cannot change the ratio of attention between two tokens**, because it
# multiplies all tokens' weights by the same $1 - \lambda$. If a head gives two tokens
# `0.6` and `0.3`, then $\lambda$ = `0.5` leaves `0.30` and `0.15`, still two to one
# (Petrov and others, [arXiv 2310.19698](https://arxiv.org/abs/2310.19698)). This holds
# within a head, for given inputs. In deeper layers the inputs change, and so can
# ratios. LoRA on the query or key projection changes ratios directly.
#
# **A prefix cannot be merged.** Merging adds a fixed matrix to a weight, but $\lambda$
# differs for every query and text. The library refuses to do it:

# %%
pfs.prefix.inject(model, n=4)
try:
    pfs.merge(model)
except pfs.CannotMerge as error:
    print(error)
pfs.remove(model)

# %% [markdown]
# ### Exercise 12.3: the prefix's share
#
# Difficulty two of five, importance four of five, about ten minutes.
#
# This is a warm-up, close to exercise 12.2. Write `my_share(q, K, P_K)`, with float
# tensors `(t, d)`, `(t, d)` and `(n, d)`. Return $\lambda$ for each query of a causal
# head, `(t,)`. Scores can be in the hundreds, so use softmax, not bare exponentials. If
# all keys are zero and $n$ is two, the first two shares are `2/3` and `2/4`.
#
# <details><summary>Hint one: a question</summary>
#
# Which part of exercise 12.2 already holds the share of each position?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The weights are `(t, n + t)`. Which columns do you sum to get `(t,)`?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `scores = q @ torch.cat([P_K, K]).T / q.shape[-1] ** 0.5`
#
# </details>


# %% tags=["exercise-12.3"]
def my_share(q, K, P_K):
    """(t,): the prefix's share of each query's attention. q, K (t, d), P_K (n, d)"""
    ### BEGIN SOLUTION
    (t, d), n = q.shape, len(P_K)
    scores = q @ torch.cat([P_K, K]).T / d**0.5  # (t, n + t)
    seen = torch.ones(t, n + t, dtype=torch.bool).tril(n)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return weights[:, :n].sum(-1)
    ### END SOLUTION


# %% tags=["check-12.3", "points-2"]
checks.prefix_share(my_share)

# %% [markdown]
# ### A prefix can imitate a prompt
#
# With the same number of positions, a prefix can imitate every soft prompt. In a causal
# model, no position sees a later one. So the keys and values of a soft prompt do not
# depend on the text after it. Copied into a prefix, they have the same effect. The next
# cell does this with the instruction.

# %%
with torch.no_grad():
    pfs.prefix.inject(model, n=n, start=text[0].tolist())
    as_prefix = model(longer, attention_mask=beside).logits[:, -t:]
    cache = model(row, use_cache=True).past_key_values
    pfs.remove(model)
gap = (as_prefix - as_text).abs().max()
print(f"largest difference from plain text, padded, as a prefix: {gap:.1g}")
print(f"our cache holds {cache.get_seq_length()} positions for {t} tokens")
assert gap < 1e-3

# %% [markdown]
# The logits agree again. So a prefix is at least as expressive as a soft prompt. The
# limit on ratios holds for soft prompts too, since a prefix can imitate them.
#
# The cache holds only 12 positions. Our library stores the prefix elsewhere, once for
# all rows. Each query still reads $n$ more keys and values.
#
# ## Idea three: what it costs
#
# The size depends on the length and on the model, so learn the formula. A prompt has
# $n$ vectors as wide as the model. In SmolLM2, several query heads share one
# **key-value head** (**grouped queries**). A prefix has $n$ keys and $n$ values for
# each key-value head of each layer:
#
# $$\text{prompt: } n \cdot d_{model} \qquad\qquad \text{prefix: } n \cdot 2 \cdot
# \text{layers} \cdot h_{kv} \cdot d$$
#
# | symbol | what it is | in `config` |
# |---|---|---|
# | $d_{model}$ | width of the embeddings | `hidden_size` |
# | layers | number of layers | `num_hidden_layers` |
# | $h_{kv}$ | number of key-value heads | `num_key_value_heads` |
# | $d$ | size of a head | `head_dim` |
#
# Because of the sharing, $h_{kv} \cdot d$ is smaller than $d_{model}$.
#
# ### Exercise 12.4: count
#
# Difficulty two of five, importance three of five, about five minutes.
#
# This is a warm-up. Write `my_counts(config, n)`, with a model's configuration and an
# `int`. Return two `int`: the parameters of a prefix, then those of a prompt. Do not
# derive the size of a head from the width. Two layers, one key-value head of size 4, a
# hidden size of 8 and `n = 3` give `(48, 24)`.
#
# <details><summary>Hint one: a question</summary>
#
# How many layers have a prefix of their own, and how many a prompt?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# In one layer, a prefix is two tensors `(n, h_kv, d)`; a prompt is `(n, d_model)`. How
# many values do they hold?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `layers, heads = config.num_hidden_layers, config.num_key_value_heads`
#
# </details>


# %% tags=["exercise-12.4"]
def my_counts(config, n):
    """(parameters of a prefix of n positions, parameters of a prompt of n)."""
    ### BEGIN SOLUTION
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    prefix = n * 2 * layers * heads * config.head_dim
    return prefix, n * config.hidden_size
    ### END SOLUTION


# %% tags=["check-12.4", "points-1"]
checks.soft_counts(my_counts)

# %% [markdown]
# ### Claim T1, computed
#
# This course tests claims of a textbook. T1: *Prefix tuning trains less than 0.1 % of
# the parameters, prompt tuning less than 0.01 %.* This is arithmetic, so the
# **verdict** on its **card** is "computed". The claim names no model and no length, so
# our rule does. Predict the percentage of cases within the bounds. The line `Shipped`
# repeats the result stored with the course.

# %%
lesson.rule("T1")
lesson.predict("12.2", low=None, high=None, unit="% of the cases")

# %%
cases = [
    runs.Run("live", c, counting.compute(c), {})
    for c in counting.soft_configs("smollm2")
]
for case in cases:
    asked, percent = case.config, case.result["percent"]
    within = "within" if percent < counting.BOUNDS[asked["method"]] else "above"
    print(
        "{method:7} n={n:3} on {shape:13}".format(**asked), f"{percent:.4f} %", within
    )
found = counting.soft_measured(cases)
lesson.measured("12.2", found.value)
lesson.live("T1", found.value, found.low, found.high)

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("T1")

# %% [markdown]
# Quote a share only together with a model and a length. On SmolLM2, ten positions of a
# prefix are within the bound (0.0856 %), and two hundred are not (1.7128 %). The 66.7 %
# only describes our list of cases.
#
# The next cell computes the cost of answering: the cache of a soft prompt on SmolLM2,
# in `bfloat16`.

# %%
config = model.config
size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
lora = next(row for row in comparison["rows"] if row["key"] == "lora")
print(f"one position: {size:,} values, {2 * size / 1e3:.0f} kB of cache in each row")
for positions in (16, 100):
    print(
        f"{positions:3} positions, 32 rows: {32 * positions * 2 * size / 1e6:6.1f} MB"
    )
print(f"the weights of a LoRA, once for all rows: {2 * lora['trainable'] / 1e6:.1f} MB")

# %% [markdown]
# For 32 rows, 16 vectors take 11.8 MB of cache, more than the 4.9 MB of a whole LoRA.
# In return, each row of a batch can have its own soft prompt.
#
# ## Does the initialization matter?
#
# LoRA begins exactly at the pretrained model. A soft prompt or prefix cannot: even a
# zero key takes attention, because its score is zero and $e^0 = 1$.
#
# From here on, we train `tiny`, a model of about a million parameters. Three tasks,
# called `gap-1` to `gap-3`, turn a sentence like "On Friday Ada found three lamps in
# Oslo." into a record. A higher number means farther from its pretraining:
#
# ```
# gap-1   Oslo - Friday …         a new format, of known words
# gap-2   Oslo - funek …          also new words
# gap-3   sudaf Ada ti bafobu …   a new language: words, endings, order
# ```
#
# Losses are in **nats per token**, the mean of $-\log p$ of the right token. At `0.04`
# nats, the right token gets `96 %` on average.
#
# The next cells train 16 vectors on `gap-1` from three initializations: random vectors,
# random tokens (`vocabulary`), and tokens of training rows (`text`). All else is equal.
# Predict the final training loss of the random one, divided by that of the text one.


# %%
def trained(method, start, *, lr=0.1, steps=50):
    asked = challengers.config(method, "gap-1", lr, 0, start, steps=steps)
    asked |= dict(n=400, batch=8, test=60, validation=10)
    tiny, reader = pfs.load_model("tiny", device="cpu")
    split = pfs.tasks.load_task("gap-1")
    rows = finetune.chosen_rows(split, asked)
    untouched = pfs.templates.encode_rows(reader, "", rows["test"], template="raw")
    history, _ = finetune.train_model(tiny, reader, split.instruction, rows, asked)
    return tiny, reader, history.loss, untouched


lesson.predict("12.3", low=None, high=None, unit="times the loss of the text one")

# %%
made = {how: trained("prompt", how) for how in ("random", "vocabulary", "text")}

# %%
series = {}
for how, (_, _, losses, _) in made.items():
    parts = [losses[i : i + 5] for i in range(0, len(losses), 5)]
    series[how] = [(5 * i + 3, fmean(p), min(p), max(p)) for i, p in enumerate(parts)]
figure = curves.lines(
    series,
    x="Optimizer step, count",
    y="Training loss, nats per token",
    title="Initialized from a text, a soft prompt ends at half the loss",
    subtitle="Means and ranges of five optimizer steps; one seed, tiny, gap-1.",
)
ends = {how: rows[-1][1] for how, rows in series.items()}
said = "; ".join(f"{how} {loss:.2f}" for how, loss in ends.items())
lesson.show(figure, f"Training loss in the last five optimizer steps: {said}.")
lesson.measured("12.3", ends["random"] / ends["text"])

# %% [markdown]
# The random initialization ends with 2.05 times the training loss of the text one: 1.19
# against 0.58. A **seed** fixes a run's random choices. One seed at one learning rate
# shows that the initialization can matter, not how much in general.
#
# **The control** asks whether any vectors would help. The next cell measures the **test
# loss**, on rows not used in training.

# %%
tiny, reader, _, rows = made["text"]
plain, _ = pfs.load_model("tiny", device="cpu")
losses = {"no prompt": fmean(finetune.item_losses(plain, rows))}
for how in ("random", "text"):
    other, _ = pfs.load_model("tiny", device="cpu")
    begin = how if how == "random" else challengers.text_ids("gap-1", 16)
    pfs.prompt.inject(other, n=16, start=begin)
    losses[f"{how}, untrained"] = fmean(finetune.item_losses(other, rows))
losses["text, trained"] = fmean(finetune.item_losses(tiny, rows))
for said, loss in losses.items():
    print(f"{said:18} test loss {loss:.2f}")

# %% [markdown]
# Untrained vectors make the loss worse: 3.97 and 4.14, against 3.47 without a prompt.
# Only training helps: the loss falls to 0.60.
#
# ### Do the trained vectors spell words?
#
# Soft prompts are often read by their nearest tokens, by **cosine** (one for the same
# direction). This needs a control, because even a random vector has a nearest token.
# Predict how many of the 16 vectors, initialized as tokens, still have that token as
# their nearest.

# %%
lesson.predict("12.4", low=None, high=None, unit="of 16 vectors")

# %%
table = F.normalize(tiny.get_input_embeddings().weight, dim=1)
starts = torch.tensor(challengers.text_ids("gap-1", 16))
(P,) = (parameter.detach() for parameter in pfs.trainable(tiny).values())
near = (F.normalize(P, dim=1) @ table.T).max(1)
noise = (F.normalize(torch.randn(16, P.shape[1]), dim=1) @ table.T).max(1)
for i in range(0, 16, 4):
    was, now, drawn = (reader.decode(x) for x in (starts[i], near[1][i], noise[1][i]))
    print(f"{was!r:8} -> {now!r:8} cosine {near[0][i]:.2f}", end="    ")
    print(f"a random vector: {drawn!r:8} {noise[0][i]:.2f}")
print(f"mean cosine: trained {near[0].mean():.2f}, random {noise[0].mean():.2f}")
lesson.measured("12.4", (near[1] == starts).sum())

# %% [markdown]
# The nearest tokens, such as "Seoul" and "Input", spell no instruction. Only 3 of 16
# vectors are still nearest to their initial token. The mean cosine of all 16 is 0.39,
# against 0.24 for random vectors. The initialization may explain part of it. To learn
# what a vector does, remove it and measure the test loss; we have not run this.
#
# ### How much attention a prefix gets
#
# The share $\lambda$ shows in which layers a prefix is read. The next cell trains a
# prefix on `gap-1`, and prints $\lambda$ averaged over heads and tokens of one test
# row. The cell uses `eager` attention, which returns its weights.

# %%
learned, *_ = trained("prefix", "text", lr=0.3)
(after,) = (parameter.detach() for parameter in pfs.trainable(learned).values())
eager, _ = pfs.load_model("tiny", device="cpu")
eager.set_attn_implementation("eager")
pfs.prefix.inject(eager, n=16, start=challengers.text_ids("gap-1", 16))
(P,) = pfs.trainable(eager).values()
ids = torch.tensor([rows[0][0]])
for when, values in (("before", P.detach().clone()), ("after", after)):
    with torch.no_grad():
        P.copy_(values)
        weights = eager(ids, output_attentions=True).attentions
    heard = [100 * layer[..., :16].sum(-1).mean().item() for layer in weights]
    print(f"{when:6} training, layers 1 to 4:", *(f"{x:5.0f} %" for x in heard))

# %% [markdown]
# Training raises $\lambda$ in all four layers, for example from 38 % to 75 % in the
# third. This is one row and one seed, and a large share does not prove a large effect.
#
# ## On trial: claims T2 and T3
#
# T2: *Prompt tuning is less expressive than prefix tuning, and approaches full
# fine-tuning above ten billion parameters.* T3: *Prefix and prompt tuning are weaker
# than LoRA.*
#
# The rules ask which test loss each method *reaches* on `tiny`, with the same rows and
# optimizer steps, not what it *can* express. Each rule averages a difference, in nats,
# over three tasks. The **band** with this average gives the verdict:
#
# - T2: prompt minus prefix. Up to `0.02`: "does not hold here"; above: "holds when".
# - T3: prefix minus LoRA or prompt minus LoRA, whichever average is smaller. Up to
#   `0.02`: "does not hold here"; up to `0.1`: "holds when"; above: "holds".
#
# **Holds when** means true under a condition, which the card names. **Undecided** means
# that the interval lies in more than one band, not that there is no difference.
#
# For each task, a search chose each method's learning rate, and the initialization of
# prefix and prompt ("rate" and "start" in the rules). Runs with the same seed see the
# same rows, so their losses are **paired**, that is, subtracted row by row. Five seeds
# give a mean and its 95 % interval (notebook 01).
#
# Predict both differences, the second one for a short live run.

# %%
print("T2:", ledger.claim("T2").rule)
print("T3:", ledger.claim("T3").rule)
lesson.predict("12.5", low=None, high=None, unit="nats, prompt minus prefix")
lesson.predict(
    "12.6", low=None, high=None, unit="nats, the better of the two minus LoRA"
)

# %% [markdown]
# **Live**, we compare the methods after 20 optimizer steps, with two seeds. The second
# cell prints paired differences, task by task.


# %%
def small_run(name, task, seed):
    _, (start, lr) = challengers.cell(name, task)
    asked = challengers.config(name, task, lr, seed, start, steps=20)
    asked |= dict(n=160, batch=8, test=40, validation=10)
    return runs.Run("live", asked, finetune.compute(asked), {})


live = {
    (name, task): [small_run(name, task, seed) for seed in (0, 1)]
    for name in ("lora", "prefix", "prompt")
    for task in challengers.TASKS
}
for (name, task), pair in live.items():
    print(f"{name:7} {task}", *(f"{run.result['test_loss']:6.2f}" for run in pair))


# %%
def behind(name, other):
    return [paired(live[name, task], live[other, task]) for task in challengers.TASKS]


for pair in (("prompt", "prefix"), ("prefix", "lora"), ("prompt", "lora")):
    print("{:6} minus {:6}".format(*pair), end="")
    print(*("{:7.2f} [{:.2f}, {:.2f}]".format(*each) for each in behind(*pair)))

# %% [markdown]
# With two seeds, an interval is the standard error times `12.7`, against `2.8` with
# five. For prompt minus prefix on `gap-2`, it goes from -2.94 to 5.48. Some others
# exclude zero, but only after 20 optimizer steps.
#
# **The stored runs** decide: five seeds, 100 optimizer steps. The next cell prints
# their mean test losses; `prefix-80` has 80 positions, as many parameters as LoRA. The
# cell after it varies one learning rate.

# %%
names = ("full", "lora", "prefix-80", "prefix", "prompt")
every = [runs.stored(c) for c in challengers.configs_of(*names)("tiny")]
best = {
    (name, task): challengers.chosen(every, name, task)
    for name in names
    for task in challengers.TASKS
}
print("test loss, mean of five seeds; with the initialization and learning rate found")
for (name, task), cell in best.items():
    asked, loss = cell[0].config, fmean(run.result["test_loss"] for run in cell)
    how = asked.get("start", "-") if isinstance(asked.get("start"), str) else "text"
    how = how if name in challengers.SOFT else "-"
    print(f"{name:10} {task} {loss:7.3f}   from {how:10} learning rate {asked['lr']:g}")

# %%
asked = dict(method="prefix", positions=16, task="gap-2", seed=0, steps=100)
tried = [r for r in every if runs.matches(r, **asked) and r.config["start"] != "random"]
print("test loss of a prefix on gap-2, initialized from text, one seed:")
for run in sorted(tried, key=lambda run: run.config["lr"]):
    print(f"  learning rate {run.config['lr']:<5g} loss {run.result['test_loss']:.2f}")

# %% [markdown]
# The learning rate decides the order. At LoRA's best one, 0.01, this prefix ends at
# 4.34, above the prompt's 2.715. At its own best one it ends at 1.08.

# %%
said = {
    "full": "Full fine-tuning",
    "lora": "LoRA, rank 8",
    "prefix-80": "Prefix, 80 positions",
    "prefix": "Prefix tuning",
    "prompt": "Prompt tuning",
}
series = {}
for name, label in said.items():
    cells = [best[name, task] for task in challengers.TASKS]
    seeds = [
        fmean(r.result["test_loss"] for r in of) for of in zip(*cells, strict=True)
    ]
    size = cells[0][0].result["trainable"]
    series[label] = (size, fmean(seeds), min(seeds), max(seeds))

# %%
figure = curves.points(
    series,
    x="Trained parameters, count",
    y="Test loss, nats per token",
    title="On tiny, LoRA ends below prefix and prompt after 100 optimizer steps",
    subtitle="Mean of three tasks and five seeds; seeds differ by less than a marker.",
)
ends = (
    f"{label}: {size:,} trained, {y:.2f}" for label, (size, y, *_) in series.items()
)
lesson.show(figure, "; ".join(ends) + ".")


# %% [markdown]
# LoRA ends at 0.38 nats, the prefix at 0.94 and the prompt at 2.33.
#
# The next cell trains prompt and prefix on `gap-2` with all 100 optimizer steps, for
# one seed; `nested_bootstrap` gives an interval over test rows. The line `T2 here` has
# this run's difference, but an interval widened to span the short runs.


# %%
def full_run(name, task="gap-2"):
    _, (start, lr) = challengers.cell(name, task)
    asked = challengers.config(name, task, lr, 0, start)
    return finetune.compute(asked)["test_items"]


whole = nested_bootstrap([np.subtract(full_run("prompt"), full_run("prefix"))])
print("live, all steps, gap-2, one seed: {:+.3f} [{:+.3f}, {:+.3f}]".format(*whole))
found = ledger.judge(ledger.claim("T2"), "tiny")
print("stored: {:+.3f} [{:+.3f}, {:+.3f}]".format(found.measured, *found.interval))
lesson.measured("12.5", found.measured)
ends = [each[1:] for each in (*behind("prompt", "prefix"), whole)]
widest = min(low for low, _ in ends), max(high for _, high in ends)
lesson.live("T2", whole[0], *widest, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("T2", guess="12.5")

# %% [markdown]
# For SmolLM2, T2 was not tried with several seeds; in the first table the prefix is
# ahead.
#
# On `tiny`, prefer the prefix if you can afford eight times as many parameters. Its
# size is a **confound**: size alone could explain the lower loss. A prompt of `128`
# vectors, as large as the prefix, would decide; it was not run.
#
# The losses are close on `gap-1` (0.322 against 0.254), and far apart on `gap-2` (2.715
# against 1.074). Speed explains a part. With 100 optimizer steps each, the prompt on
# `gap-2` ends `1.64` nats above the prefix; with `300` for the prompt alone, `0.97`.
#
# The next cell compares both methods with LoRA, task by task.

# %%
found = ledger.judge(ledger.claim("T3"), "tiny")
print("stored: {:+.3f} [{:+.3f}, {:+.3f}]".format(found.measured, *found.interval))
for task in challengers.TASKS:
    parts = [
        (n, paired(best[n, task], best["lora", task])) for n in ("prefix", "prompt")
    ]
    print(task, *("{} {:+.2f} [{:+.2f}, {:+.2f}]".format(n, *p) for n, p in parts))
closer = min(mean_of(behind(name, "lora")) for name in ("prefix", "prompt"))
lesson.measured("12.6", closer[0])
lesson.live("T3", *closer, scale="tiny")

# %%
# NBVAL_CHECK_OUTPUT
lesson.verdict("T3", guess="12.6")

# %% [markdown]
# For SmolLM2, the opening table answers, with three seeds. Prompt tuning, at 55 %, is
# behind LoRA, at 66 %. The prefix, at 67 %, is not told apart from LoRA.
#
# On `tiny`, use LoRA for new words or a new language. The prefix is +0.82 nats above
# LoRA on `gap-2`, and +0.80 on `gap-3`. On `gap-1`, both intervals contain zero, so
# five seeds do not tell which is ahead.
#
# More training helps: with `300` optimizer steps, the prefix on `gap-2` ends 0.556 nats
# above LoRA with 100. (By chance, this equals the mean on the card.)
#
# LoRA's lead has four possible reasons:
#
# - **Fewer parameters** explain only a part: with as many as LoRA, `prefix-80` is still
#   `0.411` nats above it, on average.
# - **Slower training.** Both methods with `300` optimizer steps would tell.
# - **Hard optimization.** The prefix paper trains a small network that produces the
#   prefix (**reparametrization**). We did not, and our best learning rates, 0.3 to 1,
#   are suspiciously high. Training with and without such a network would tell, both
#   initialized at random, as the network requires.
# - **The ratio limit.** New words may need attention in other ratios, which only LoRA
#   changes directly. This is a hypothesis; "In your own words" asks for its test.
#
# ## Now with the library
#
# Hugging Face's PEFT reads our files. The next cell asserts that it gives our logits;
# the differences are 0.

# %%
for kind, ours in (("prompt", tiny), ("prefix", learned)):
    with TemporaryDirectory() as folder, torch.no_grad():
        pfs.save(ours, folder)
        base, _ = pfs.load_model("tiny", device="cpu")
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        seen = torch.ones_like(ids)
        expected = ours(ids, attention_mask=seen).logits
        got = theirs(ids, attention_mask=seen).logits[:, -ids.shape[1] :]
    gap = (got - expected).abs().max()
    print(f"{kind}: the largest difference of a logit is {gap:.1g}")
    assert gap < 1e-3

# %% [markdown]
# ## Quiz
#
# **1. You initialize a soft prompt from your instruction, and do not train it. What do
# you have?**
#
# <details><summary>The model without any prompt</summary>
#
# No. The model reads these vectors as it reads tokens.
#
# </details>
# <details><summary>The model with the instruction as text</summary>
#
# Right. The first experiment compared every logit.
#
# </details>
# <details><summary>Something close to it, because the positions differ</summary>
#
# No. The text begins at position $n$ in both cases.
#
# </details>
#
# **2. With a soft prompt, answers are right one by one, and wrong in some rows of a
# batch. Where do you look first?**
#
# <details><summary>At the learning rate</summary>
#
# No. The trained parameters are the same.
#
# </details>
# <details><summary>At the labels of the padding</summary>
#
# No. Labels matter in training only.
#
# </details>
# <details><summary>At mask and positions</summary>
#
# Right. They are all that a longer neighbor changes.
#
# </details>
#
# **3. Why can a prefix not be merged into the weights?**
#
# <details><summary>Its share of attention differs from text to text</summary>
#
# Right. A matrix does the same to every input.
#
# </details>
# <details><summary>Its shape is not that of a projection</summary>
#
# No. Nor is that of LoRA's $A$, and LoRA merges.
#
# </details>
# <details><summary>It is too small</summary>
#
# No. A longer prefix cannot be merged either.
#
# </details>
#
# **4. (From notebook 04.) LoRA begins training exactly at the pretrained model. Which
# method does not?**
#
# <details><summary>A soft prompt, initialized at random</summary>
#
# Right. Tokens attend to it from the first forward pass on.
#
# </details>
# <details><summary>Full fine-tuning</summary>
#
# No. It begins with the pretrained weights themselves.
#
# </details>
# <details><summary>LoRA with $A$ zero and $B$ random</summary>
#
# No. The product $B A$ is still zero.
#
# </details>
#
# **5. (From notebook 01.) Which part of the training memory does a soft prompt *not*
# shrink?**
#
# <details><summary>The optimizer's running means</summary>
#
# No. They exist for trained parameters only.
#
# </details>
# <details><summary>The stored gradients</summary>
#
# No. They too exist for trained parameters only.
#
# </details>
# <details><summary>The activations of every layer</summary>
#
# Right. The gradient of $P$ passes back through the whole model.
#
# </details>
#
# ### In your own words: choose the run
#
# You can afford one more set of runs on `gap-2`, to test whether the ratio limit is why
# the prefix ends above LoRA. Choose (a) the prefix with `300` optimizer steps, (b) a
# prefix of 80 positions, or (c) LoRA on every projection but query and key, with as
# many parameters as before. (Like the prefix, (c) changes ratios only through the
# inputs of deeper layers.) Predict the outcome, and say which one would speak against
# the explanation.
#
# <details><summary>A model answer</summary>
#
# I choose (c), since (a) tests speed and (b) size. If the explanation is right, (c)
# ends well above the full LoRA. If (c) ends within a margin of it that I set
# beforehand, the explanation fails. (c) also has fewer places, so support is no proof.
#
# </details>
#
# ## Limits
#
# T2 and T3 are judged on `tiny`, after 100 optimizer steps, without reparametrization.
# The papers report more: Li and Liang came near full fine-tuning with `0.1` % of the
# parameters, and Lester and others in a T5 of `11` billion.
#
# ## Your guesses
#
# Nine of ten of your ranges should contain the measured value.

# %%
lesson.calibration()

# %% [markdown]
# ## Receipt

# %%
lesson.receipt()

# %% [markdown]
# ## Where to go next
#
# - Li and Liang, [Prefix-tuning](https://arxiv.org/abs/2101.00190).
# - Lester and others, [The power of scale for parameter-efficient prompt
#   tuning](https://arxiv.org/abs/2104.08691).
# - Petrov and others, [When do prompting and prefix-tuning
#   work?](https://arxiv.org/abs/2310.19698).
# - He and others, [Towards a unified view of parameter-efficient transfer
#   learning](https://arxiv.org/abs/2110.04366).
# - A prompt before the padding, in PEFT: [issue
#   1093](https://github.com/huggingface/peft/issues/1093). A mask that did not grow, in
#   sentence-transformers: [issue
#   2995](https://github.com/huggingface/sentence-transformers/issues/2995).
