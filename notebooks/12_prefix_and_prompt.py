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
# **Sixteen trained vectors prepended to the input teach a frozen SmolLM2 a task. A
# prefix, which trains keys and values, can move a head's output, but it cannot change
# how the head weighs two tokens against each other.**
#
# **You need** notebook 04 (LoRA), and what attention computes: queries, keys, values,
# softmax, causal mask.
#
# **At the end you can**
#
# - prepend trained vectors to a padded batch, and train them;
# - find the bug that makes a row's answer depend on its neighbors;
# - write attention with a prefix;
# - show which ratio a prefix cannot change, and why it cannot be merged;
# - count the parameters of both methods;
# - decide which vectors of a soft prompt can go.
#
# **Only ten minutes?** Write `start("12", quick=True)` below and run all cells. Read
# "The result first", "What a prefix does to a head", and the verdict on claim T3.

# %%
from peft_from_scratch.course import start

lesson = start("12")

# %%
import json
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import peft_from_scratch as pfs
from peft_from_scratch.course import block_picture, challengers, counting, finetune
from peft_from_scratch.course import nested_bootstrap, paired, provenance, runs
from peft_from_scratch.course import soft_prompt_pictures as pictures
from peft_from_scratch.course.checks import prefix_and_prompt as checks

# %% [markdown]
# ## The result first
#
# The next cell prints results of SmolLM2 on the task of notebook 00: a sentence in, one
# exact line of JSON out. Brackets hold 95 % intervals over three hundred test rows and
# three seeds. The last column counts **optimizer steps**, the updates of the
# parameters. The picture shows one layer, with what prompt tuning trains in color. Pale
# outlines are other methods' places.

# %%
file = provenance.ROOT / "data" / "results" / "compare.json"
comparison = json.loads(file.read_text("utf-8"))
print("                     trained parameters   exactly right [95 %]   letters  steps")
for row in comparison["rows"]:
    exact = "{rate:5.0%} [{low:.0%}, {high:.0%}]".format(**row["exact"])
    print(f"{row['label']:22} {row['trainable']:16,} {exact:>22}", end="")
    print(f" {row['letters']:>9} {row['steps']:6}")
lesson.show(
    block_picture(lit="prompt", width=6.0),
    "A soft prompt is prepended to the embedded tokens; every weight stays frozen.",
)

# %% [markdown]
# Zero-shot, with an instruction alone, gets 0 %. Prompt tuning trains the fewest
# parameters, 9,216, with twice the optimizer steps of the others. Prefix tuning trains
# 184,320, and LoRA over ten times as many. The other rows are methods of other
# notebooks. The **letters** say which differences are real: two methods that share a
# letter cannot be told apart.
#
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
# The largest difference is 0, so every text prompt is also a soft prompt.
#
# ### Mask, positions and outputs
#
# A wrong mask or position raises no error. In a batch, shorter rows get **padding**, on
# the left when text is generated.
#
# - The **mask** gets $n$ ones on the left. Without them, no token attends to $P$.
# - The **positions** count $P$ and real tokens. Those of padding do not matter.
# - The first $n$ **outputs** are cut off.
#
# The next cell draws two rows of a batch, with a $P$ of two vectors.

# %%
mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
wide = F.pad(mask, (2, 0), value=1)
numbers = {
    "right: positions count P and tokens": (wide.cumsum(1) - 1).clamp(min=0),
    "wrong: positions count every place": torch.arange(6).expand(2, -1),
}
title = "Counting the padding moves a short row away from its prompt"
said = "Numbers are positions: 2 and 3 are right for the short row, 4 and 5 are wrong."
lesson.show(pictures.padded_rows(mask, 2, numbers, title=title), said)

# %% [markdown]
# ### Exercise 12.1: a soft prompt before a batch
#
# Difficulty three of five, importance five of five, about fifteen minutes.
#
# Write `my_prompt(model, P, input_ids, attention_mask)`. `P` is a float tensor `(n,
# d_model)`. The others are int64, `(b, t)`, and the mask is zero at padding, on either
# side. `P` comes first in each row, also where the row begins with padding. Give the
# model embeddings (from `model.get_input_embeddings()`), mask and positions. Return the
# logits of the caller's tokens, `(b, t, vocabulary)`. Gradients must reach `P`; the
# model stays as it is.
#
# Two vectors and the mask `[[1, 1, 1, 1], [0, 0, 1, 1]]` give the positions above.
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
# Without explicit positions, a soft prompt fails in padded batches. The next cell pads
# our row on the left and leaves the positions out, so the model counts padding too.
# Then it uses your function, or the library's if yours has not passed. Both are
# compared with the logits of the text prompt, which has no padding.

# %%
prompted = lesson.mine(my_prompt, checks.library_prompt)
longer = F.pad(row, (24, 0), value=tokenizer.eos_token_id)
alone, beside = torch.ones_like(row), F.pad(torch.ones_like(row), (24, 0))
with torch.no_grad():
    joined = torch.cat([P, model.get_input_embeddings()(longer)], dim=1)
    broken = model(inputs_embeds=joined, attention_mask=F.pad(beside, (n, 0), value=1))
    right = prompted(model, P[0], longer, beside)[:, -t:]
    cache = model(inputs_embeds=torch.cat([P, E], 1), use_cache=True).past_key_values
changes = [(x[:, -t:] - as_text).abs().max() for x in (broken.logits, right)]
print("largest change of a logit by 24 places of padding:")
print("  without positions: {:.2f}\n  with positions:    {:.1g}".format(*changes))
print(f"the cache holds {cache.get_seq_length()} positions for {t} tokens")
lesson.control("Padding changes no logit, if positions are right.", changes[1] < 1e-3)

# %% [markdown]
# In the padded row, 24 places of padding lie between $P$ and the text. Without
# positions, this moves the text away from $P$, and a logit changes by several units.
# With them it does not. SmolLM2 has **rotary positions**: an attention score depends on
# the distance between query and key.
#
# The last line shows the running cost. The **cache** keeps keys and values for later
# tokens; here 12 tokens take 28 positions, in every layer and for every row.
#
# ## Idea two: a prefix in every layer
#
# A soft prompt is trained at the input only; frozen weights compute its keys and values
# in each layer. **Prefix tuning** trains the keys and values themselves, $n$ of each in
# every layer, called the **prefix**. A prefix has no queries; tokens can only attend to
# it.

# %%
lesson.show(
    block_picture(lit="prefix", width=6.0),
    "A prefix adds keys and values, P_K and P_V, to every layer, and no query.",
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
# Every token sees the whole prefix, because the prefix comes first. The next cell draws
# the attention weights of four tokens, without and with a random prefix of two.

# %%
torch.manual_seed(1)
d = 4
q, K, V = (torch.randn(4, d) for _ in range(3))
P_K, P_V = (torch.randn(2, d) for _ in range(2))
tables = [checks.library_weights(q, K, prefix) for prefix in (P_K[:0], P_K)]
title = "A prefix takes a share of attention; the ratio of two tokens stays"
figure = pictures.score_tables(*tables, query=2, pair=(0, 1), title=title)
said = "With a prefix, all weights of tokens are smaller, and their ratio is the same."
lesson.show(figure, said)

# %% [markdown]
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
# The scores are $s_i = q \cdot P_{K,i} / \sqrt{d}$ for the prefix and $s_j = q \cdot
# K_j / \sqrt{d}$ for the tokens. With one score of zero on each side, $\lambda$ is one
# half.
#
# **A prefix cannot change the ratio of attention between two tokens**, because it
# multiplies all tokens' weights by the same $1 - \lambda$. If a head gives two tokens
# `0.6` and `0.3`, then $\lambda$ = `0.5` leaves `0.30` and `0.15`, still two to one
# (Petrov and others, [arXiv 2310.19698](https://arxiv.org/abs/2310.19698)). This holds
# within a head, for given inputs. In deeper layers the inputs change, and so can
# ratios. LoRA on the query or key projection changes ratios directly.
#
# ### Exercise 12.3: prove the ratio in code
#
# Difficulty three of five, importance five of five, about ten minutes.
#
# Write `my_split(q, K, P_K)` for one causal head. All three are float32 tensors, `(t,
# d)`, `(t, d)` and `(n, d)`. Return two float32 tensors:
#
# - `share`, `(t,)`: $\lambda$ for each query;
# - `among`, `(t, t)`: the attention of each query on the tokens, divided by its sum, so
#   that each row adds up to 1. Later tokens get zero.
#
# The check gives only inputs whose shares are at most `0.99`, so you need not handle a
# share of 1. If all keys are zero and $n$ is two, the shares begin
# with `2/3` and `2/4`, and the second row of `among` with `1/2` and `1/2`.
#
# <details><summary>Hint one: a question</summary>
#
# Your exercise 12.2 computes weights of prefix and tokens. Which columns belong to
# which?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The weights are `(t, n + t)`. Which columns do you sum to get `(t,)`? What do you
# divide the others by?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `scores = q @ torch.cat([P_K, K]).T / q.shape[-1] ** 0.5`
#
# </details>


# %% tags=["exercise-12.3"]
def my_split(q, K, P_K):
    """share (t,) of the prefix; among (t, t), attention among the tokens alone."""
    ### BEGIN SOLUTION
    (t, d), n = q.shape, len(P_K)
    scores = q @ torch.cat([P_K, K]).T / d**0.5  # (t, n + t)
    seen = torch.ones(t, n + t, dtype=torch.bool).tril(n)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    share, own = weights[:, :n].sum(-1), weights[:, n:]
    return share, own / own.sum(-1, keepdim=True)
    ### END SOLUTION


# %% tags=["check-12.3", "points-3"]
checks.attention_split(my_split)

# %% [markdown]
# The next cell gives the third query of the table no prefix, a weak one and a strong
# one. It asserts that the ratio stays, and that the equation of the mixture holds.

# %%
attend = lesson.mine(my_attention, checks.library_attention)
split = lesson.mine(my_split, checks.library_split)
ratios = []
for name, prefix in {"no": P_K[:0], "weak": P_K, "strong": 3 * q[2:3]}.items():
    share, among = split(q, K, prefix)
    ratios.append(among[2, 0] / among[2, 1])
    print(f"{name:6} prefix: share {share[2]:.2f}, x1 / x2 = {ratios[-1]:.4f}")
unchanged = max(ratios) - min(ratios) < 1e-5
lesson.control("No prefix changes the ratio of two tokens.", unchanged)

share = split(q, K, P_K)[0][:, None]
alone = torch.softmax(q @ P_K.T / d**0.5, -1) @ P_V
mixed = (1 - share) * attend(q, K, V, P_K[:0], P_V[:0]) + share * alone
gap = (mixed - attend(q, K, V, P_K, P_V)).abs().max()
lesson.control("A head with a prefix is the mixture of both outputs.", gap < 1e-5)

# %% [markdown]
# The share rises with the prefix, and the ratio stays. Two results follow.
#
# **A prefix cannot be merged.** Merging adds a fixed matrix to a weight, but $\lambda$
# differs for every query and text.
#
# **A prefix can imitate every soft prompt** with as many positions. In a causal model,
# no position sees a later one. So the keys and values of a soft prompt do not depend on
# the text after it. Copied into a prefix, they have the same effect. The next cell does
# this with the instruction, and then tries to merge.

# %%
with torch.no_grad():
    pfs.prefix.inject(model, n=n, start=text[0].tolist())
    as_prefix = model(longer, attention_mask=beside).logits[:, -t:]
gap = (as_prefix - as_text).abs().max()
lesson.control("This prefix has the effect of the text.", gap < 1e-3)
try:
    pfs.merge(model)
except pfs.CannotMerge as error:
    print(error)
pfs.remove(model)

# %% [markdown]
# So a prefix is at least as expressive as a soft prompt, and the limit on ratios holds
# for soft prompts too.
#
# ## Idea three: the size depends on the length
#
# A prompt has $n$ vectors as wide as the model. In SmolLM2, several query heads share
# one **key-value head**. A prefix has $n$ keys and $n$ values for each key-value head
# of each layer:
#
# $$\text{prompt: } n \cdot d_{model} \qquad\qquad \text{prefix: } n \cdot 2 \cdot
# \text{layers} \cdot h_{kv} \cdot d$$
#
# Here $h_{kv}$ is the number of key-value heads, and $d$ the size of a head. SmolLM2
# has `30` layers and three key-value heads of size `64`. So one position of a prefix
# has `11,520` parameters, and one of a prompt has `576`.
#
# ### Claim T1, computed
#
# This course tests claims of a textbook. T1: *Prefix tuning trains less than 0.1 % of
# the parameters, prompt tuning less than `0.01` %.* This is arithmetic: no run could
# have given another answer. So the **card** below, which sums up the claim, has the
# **verdict** "computed". The claim names no model and no length. Our **rule**, the text
# that says how a claim is judged, names both. Predict how long a prefix may be on
# SmolLM2.

# %%
lesson.rule("T1")
lesson.predict("12.1", low=None, high=None, unit="positions of a prefix within 0.1 %")

# %%
configs = counting.soft_configs("smollm2")
cases = [runs.Run("live", each, counting.compute(each), {}) for each in configs]
slopes = {"prefix": {}, "prompt": {}}  # % of all parameters in one position
for case in cases:
    method, model_name = case.config["method"], case.config["shape"]
    slopes[method][model_name] = case.result["percent"] / case.config["n"]
title = "The same percentage means another length for every model"
figure = pictures.shares(slopes, counting.BOUNDS, longest=1024, title=title)
longest = int(counting.BOUNDS["prefix"] / slopes["prefix"]["SmolLM2-135M"])
lesson.show(figure, f"On SmolLM2, {longest} positions of a prefix are within 0.1 %.")

# %%
config = model.config
sizes = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
print("{} layers, {} key-value heads of size {}".format(*sizes))
print(f"a position: {2 * np.prod(sizes):,} parameters, or {config.hidden_size}")
lesson.measured("12.1", longest)
found = counting.soft_measured(cases)
lesson.live("T1", found.value, found.low, found.high)

# %% tags=["nbval-check-output"]
lesson.verdict("T1")

# %% [markdown]
# Quote a share only together with a model and a length. The card's percentage describes
# our list of twelve cases alone.
#
# ## Idea four: training, and what the vectors do
#
# LoRA begins exactly at the pretrained model. A soft prompt or prefix cannot: even a
# zero key takes attention, because its score is zero and $e^0 = 1$. So the
# **initialization**, the values before training, can matter.
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
# Losses are in **nats per token**, the mean of $-\log p$ of the right token.
#
# We train 16 vectors from two initializations: random vectors, and the embeddings of
# the first tokens of the training rows. All else is equal. The **test loss** is
# measured on rows not used in training. Predict the final test loss of the random one,
# divided by that of the text one. The loss uses your function from exercise 12.1, and
# the loop is the whole training.

# %%
tiny, reader = pfs.load_model("tiny", device="cpu")
split_of = pfs.tasks.load_task("gap-1")
rows = {
    name: pfs.templates.encode_rows(
        reader, "", getattr(split_of, name).select(range(count)), template="raw"
    )
    for name, count in {"train": 400, "validation": 40, "test": 100}.items()
}


def padded(lists, value):
    tensors = [torch.tensor(each) for each in lists]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def loss_of(P, rows):
    ids = padded([ids for ids, _ in rows], 0)
    mask = padded([[1] * len(ids) for ids, _ in rows], 0)
    labels = padded([labels for _, labels in rows], -100)  # -100: no label
    logits = prompted(tiny, P, ids, mask)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %%
def train(P, steps=50):
    P = P.clone().requires_grad_()
    optimizer = torch.optim.Adam([P], lr=0.03)
    for step in range(steps):
        loss = loss_of(P, rows["train"][8 * step : 8 * step + 8])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([P], 1.0)
        optimizer.step()
    return P.detach()


lesson.predict("12.2", low=None, high=None, unit="times the test loss of the text one")

# %% [markdown]
# **The control** asks whether it takes training, or whether random vectors help as
# well. The last lines of the next cell assert that untrained vectors make the loss
# *worse*.

# %%
table = tiny.get_input_embeddings().weight.detach()
starts = {
    "random": torch.rand(16, table.shape[1]) - 0.5,
    "text": table[list(challengers.text_ids("gap-1", 16))],
}
learned = {name: train(P) for name, P in starts.items()}
with torch.no_grad():
    without = loss_of(table[:0], rows["test"])
    before = {name: loss_of(P, rows["test"]) for name, P in starts.items()}
    after = {name: loss_of(P, rows["test"]) for name, P in learned.items()}
print(f"test loss without a prompt: {without:.2f}")
for name in starts:
    print(f"{name:6} vectors: untrained {before[name]:.2f}, trained {after[name]:.2f}")
worse = min(before.values()) > without > max(after.values())
lesson.control("Untrained vectors make the loss worse; training lowers it.", worse)
lesson.measured("12.2", after["random"] / after["text"])

# %% [markdown]
# The prompt that began as text ends at less than half the test loss of the random one.
# One seed at one learning rate shows that the initialization can matter, not how much
# in general.
#
# ### Do the trained vectors spell words?
#
# Soft prompts are often read by their nearest tokens, by **cosine** (one for the same
# direction). This needs two controls. Even a random vector has a nearest token. And a
# vector that began as a token may simply not have moved far. So the next cell also
# reads the prompt that began at random.

# %%
unit = F.normalize(table, dim=1)
read = learned | {"random, untrained": starts["random"]}
for name, P in read.items():
    cosine, nearest = (F.normalize(P, dim=1) @ unit.T).max(1)
    words = " ".join(repr(reader.decode(i)) for i in nearest[:6])
    print(f"{name:17}  mean cosine {cosine.mean():.2f}  {words} …")
first = torch.tensor(challengers.text_ids("gap-1", 16))
same = ((F.normalize(learned["text"], dim=1) @ unit.T).argmax(1) == first).sum()
print(f"text: {same} of 16 vectors are still nearest to the token that they began as")

# %% [markdown]
# No prompt spells an instruction. The higher cosine of the text prompt comes from its
# initialization: the prompt that began at random stays about as far from all tokens as
# it was.
#
# ### Take one vector away
#
# To learn what a vector does, remove it and measure the loss again. This is a
# **leave-one-out** measurement. We use validation rows, since a choice will follow: a
# choice made on test rows would make the test loss look too good.

# %%
LIMIT = 0.1  # nats that we are willing to pay


def validation_loss(keep, split="validation"):
    with torch.no_grad():
        return loss_of(learned["text"][list(keep)], rows[split]).item()


whole = validation_loss(range(16))
rest = {i: [j for j in range(16) if j != i] for i in range(16)}
costs = [validation_loss(rest[i]) - whole for i in range(16)]
harmless = [i for i in range(16) if costs[i] <= LIMIT]
needed = [i for i in range(16) if i not in harmless]
together = validation_loss(needed) - whole
title = "Each of the hatched vectors can go alone, but not all of them together"
figure = pictures.leave_one_out(costs, together, limit=LIMIT, title=title)
most = max(costs[i] for i in harmless)
said = f"Removed alone, each of {harmless} adds at most {most:.2f} nats."
lesson.show(figure, f"{said} Together, they add {together:.2f}.")

# %% [markdown]
# Leave-one-out measures a vector *given all others*. Two vectors that do the same work
# both look useless. This **redundancy** makes leave-one-out misleading.
#
# ### Exercise 12.4: which vectors can go?
#
# Difficulty four of five, importance five of five, about twenty minutes.
#
# A shorter prompt is cheaper in every layer, for every row. Decide how to find one, and
# write `my_keep(loss, n, most)`. `n` is an `int`, the number of vectors. `most` is a
# `float`, in nats. `loss(keep)` returns the loss of the prompt with only the vectors in
# the list `keep`: int indices in rising order, at least one.
#
# Return such a list, with these properties:
#
# - The loss is at most `most` above the loss with all `n` vectors.
# - The list cannot be made shorter: if any one of the vectors that stay were removed as
#   well, the loss would exceed this limit. (One vector always stays.)
# - `loss` is called at most `n * (n + 1)` times. All subsets are too many.
#
# Example: of three vectors, the first two do the same work. If only one of these two is
# removed, the loss stays `1.0`. If both are removed, it is `3.0`. If the third is
# removed, it is at least `2.0`. With `most = 0.25`, `[0, 2]` and `[1, 2]` are right.
#
# <details><summary>Hint one: a question</summary>
#
# After the first vector is gone, which of your measurements are still valid?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# With `k` vectors left, there are `k` lists of `k - 1` vectors. Which of them is the
# cheapest? When do you stop?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `keep, limit = list(range(n)), loss(list(range(n))) + most`
#
# </details>


# %% tags=["exercise-12.4"]
def my_keep(loss, n, most):
    """The indices of the vectors that stay, a rising list of int."""
    ### BEGIN SOLUTION
    keep, limit = list(range(n)), loss(list(range(n))) + most
    while len(keep) > 1:
        trials = [[j for j in keep if j != i] for i in keep]
        losses = [loss(trial) for trial in trials]
        best = losses.index(min(losses))
        if losses[best] > limit:
            break
        keep = trials[best]
    return keep
    ### END SOLUTION


# %% tags=["check-12.4", "points-4"]
checks.kept_vectors(my_keep)

# %%
choose = lesson.mine(my_keep, checks.library_keep)
kept = choose(validation_loss, 16, LIMIT)
for name, keep in {"all": range(16), "chosen": kept, "needed": needed}.items():
    scores = validation_loss(keep), validation_loss(keep, "test")
    print(f"{name:6} {len(keep):2} vectors: ", end="")
    print("validation loss {:.2f}, test loss {:.2f}".format(*scores))
lesson.control("The choice keeps the limit.", validation_loss(kept) <= whole + LIMIT)

# %% [markdown]
# The line `needed` drops every vector that looks harmless alone, and exceeds the limit.
# The line `chosen` measures again after each removal, and stays within the limit. The
# test loss agrees, although it had no part in the choice.
#
# ## On trial: claims T2 and T3
#
# T2: *Prompt tuning is less expressive than prefix tuning, and approaches full
# fine-tuning above ten billion parameters.* T3: *Prefix and prompt tuning are weaker
# than LoRA.*
#
# The rules ask which test loss each method *reaches* on `tiny`, with the same rows and
# optimizer steps, not what it *can* express. Each rule averages a difference, in nats,
# over three tasks. It divides the possible values into **bands**, one for each verdict,
# and the band with the average gives the verdict. **Holds when** means true under a
# condition, which the card names.
#
# For each task, a search chose each method's learning rate, and the initialization of
# prefix and prompt. Runs with the same seed see the same rows, so their losses are
# **paired**, that is, subtracted row by row. Five seeds give a mean and its 95 %
# interval (notebook 01). Predict both differences.

# %%
lesson.rule("T2")
lesson.rule("T3")
lesson.predict("12.3", low=None, high=None, unit="nats, prompt minus prefix")
lesson.predict("12.4", low=None, high=None, unit="nats, better of the two minus LoRA")

# %% [markdown]
# The next cell reads the stored runs, five seeds of 100 optimizer steps. The prefix of
# 80 positions has as many parameters as LoRA.

# %%
LABELS = {
    "full": "Full fine-tuning",
    "lora": "LoRA, rank 8",
    "prefix-80": "Prefix, 80 positions",
    "prefix": "Prefix tuning",
    "prompt": "Prompt tuning",
}
asked = challengers.configs_of(*LABELS, longer=("prefix", "prompt"))("tiny")
every = [runs.stored(each) for each in asked]

# %%
tasks = challengers.TASKS
best = {(m, k): challengers.chosen(every, m, k) for m in LABELS for k in tasks}
cells = {label: [best[m, k] for k in tasks] for m, label in LABELS.items()}
figure = pictures.by_size(
    cells,
    title="On tiny, LoRA ends below prefix and prompt after 100 optimizer steps",
    subtitle="Mean of three tasks and five seeds; bars, where visible: range of seeds.",
)
lesson.show(figure, pictures.by_size_words(cells))

# %% [markdown]
# **Live**, we train prompt, prefix and LoRA on `gap-2` with all 100 optimizer steps,
# for one seed. The interval is over test rows only. It says nothing about other seeds
# or tasks, so the stored runs decide.


# %%
def full_run(name, task="gap-2"):
    _, (start, lr) = challengers.cell(name, task)
    asked = challengers.config(name, task, lr, 0, start)
    return finetune.compute(asked)["test_items"]


items = {name: full_run(name) for name in ("prompt", "prefix", "lora")}
for name, losses in items.items():
    print(f"{name:6} on gap-2, live: test loss {fmean(losses):.2f}")
found = challengers.prompt_measured(every)
print("gap-2, five seeds, prompt (300 optimizer steps) minus prefix (100):", end=" ")
print(found.figures["longer"])
lesson.measured("12.3", found.value)
gap = nested_bootstrap([np.subtract(items["prompt"], items["prefix"])])
lesson.live("T2", *gap, scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("T2", guess="12.3")

# %% [markdown]
# On `tiny`, prefer the prefix if you can afford eight times as many parameters. Its
# size is a **confound**: size alone could explain the lower loss. A prompt of `128`
# vectors, as large as the prefix, would decide; it was not run. Speed explains a part
# of the difference: three times as many optimizer steps help the prompt, as the line
# with 300 steps shows.
#
# The next cell compares both methods with LoRA, task by task, five seeds each.

# %%
for each in tasks:
    for name in ("prefix", "prompt"):
        gap = paired(best[name, each], best["lora", each])
        print(f"{each}, {name} minus LoRA:", "{:+.2f} [{:+.2f}, {:+.2f}]".format(*gap))
found = challengers.soft_measured(every)
print(f"a prefix as large as LoRA, minus LoRA; three tasks: {found.figures['large']}")
print(f"gap-2, prefix (300 steps) minus LoRA (100): {found.figures['longer']}")
lesson.measured("12.4", found.value)
better = min(items["prefix"], items["prompt"], key=fmean)
lesson.live("T3", *nested_bootstrap([np.subtract(better, items["lora"])]), scale="tiny")

# %% tags=["nbval-check-output"]
lesson.verdict("T3", guess="12.4")

# %% [markdown]
# For SmolLM2, look at the letters of the opening table: they compare LoRA with the
# prefix and with the prompt, on one task with three seeds.
#
# On `tiny`, use LoRA for new words or a new language. On `gap-1`, both intervals
# contain zero, so five seeds do not tell which is ahead. LoRA's lead has four possible
# reasons:
#
# - **Fewer parameters** explain only a part: a prefix as large as LoRA is still above
#   it.
# - **Slower training.** Runs of LoRA *and* prefix with 300 optimizer steps would tell.
#   Here only the prefix had 300.
# - **Hard optimization.** The prefix paper trains a small network that produces the
#   prefix (**reparametrization**). We did not.
# - **The ratio limit.** New words may need attention in other ratios, which only LoRA
#   changes directly. LoRA on every projection but query and key would test this.
#
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
# **4. Removing vector 3 of a soft prompt changes nothing. Removing vector 7 changes
# nothing. What do you know about removing both?**
#
# <details><summary>It changes nothing</summary>
#
# No. If both do the same work, the prompt needs one of them.
#
# </details>
# <details><summary>It changes little, the sum of both costs</summary>
#
# No. Costs add up only if the vectors work independently.
#
# </details>
# <details><summary>Nothing, before it is measured</summary>
#
# Right. Leave-one-out holds with all other vectors in place.
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
# - A prompt before the padding, in PEFT: [issue
#   1093](https://github.com/huggingface/peft/issues/1093). A mask that did not grow, in
#   sentence-transformers: [issue
#   2995](https://github.com/huggingface/sentence-transformers/issues/2995).
