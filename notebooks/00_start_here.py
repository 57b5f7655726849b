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
# # Start here: a real language model, fine-tuned in ten lines
#
# A real language model goes from 0 to 11 right answers of 20 when we train a small
# added part, 1.82 % of the model's size.
#
# **You need** some Python, no graphics card, and no mathematics beyond "a matrix times
# a vector".
#
# **At the end you can**
#
# - fine-tune a model (train it further) in ten lines with LoRA, which trains small
#   added matrices;
# - score answers exactly, and give the score an interval;
# - count the trained parameters, save them, and merge them into (add them to) the
#   model's own;
# - build a control, a run that tests your explanation of a result, and make it fair;
# - pad a batch of prompts so that the answers stay right.
#
# **Only ten minutes?** Write `start("00", quick=True)` below, and run the cells in
# turn. Stop before the section "The control", and leave out the exercises.

# %%
from peft_from_scratch.course import start

lesson = start("00")

# %% [markdown]
# The cell above prints the model, and the time and memory that the lesson needs. Press
# Shift and Enter to run a cell.
#
# - **Guesses.** Before a measurement, put the ends of a range in place of None, such as
#   `low=2, high=5`. Make it wide enough to be right nine times of ten. You can skip the
#   guesses.
# - **Exercises.** In your own copy, in the folder `work`, put your code in place of
#   `raise NotImplementedError(…)`. The cell below checks it, and prints nothing if all
#   is well. "Run all" stops at the first blank; with `start("00", quick=True)` it
#   passes over the blanks.
#
# ## The result first
#
# A small model that fails when it is only instructed learns the task when a small share
# of its parameters is trained. **Parameters** are the numbers that a model consists of.
# Training few of them is **parameter-efficient fine-tuning**, PEFT. The **task** is to
# turn an order, written as a sentence, into one exact line of JSON. The model, SmolLM2,
# is a stack of **layers**, which are blocks of matrices.
#
# The next cell prints the scores of several methods on test sentences, none of which
# was used for training.
#
# - **Zero-shot** gives one sentence of instruction; **few-shot** adds solved examples.
# - **Full fine-tuning** trains all parameters.
# - **LoRA** adds two small matrices to each matrix of a layer ("all linear"), and
#   trains only these. **QLoRA** also stores the model in four bits per parameter, with
#   our code or with bitsandbytes, another library.
# - **Bottleneck adapters** are small networks inside each layer.
# - **Prompt tuning** trains vectors prepended to the prompt, and **prefix tuning** such
#   vectors for each layer.

# %%
import json
import math
from pathlib import Path

import torch

from peft_from_scratch import merge, trainable
from peft_from_scratch.course import adapters, answer_rows, block_picture, curves
from peft_from_scratch.course import encode_prompt, figures, findings, left_pad
from peft_from_scratch.course import provenance, quiet_transformers, wilson
from peft_from_scratch.course.checks import start_here as checks

shipped = provenance.ROOT / "data" / "results" / "compare.json"
compared = json.loads(shipped.read_text("utf-8"))
for row in compared["rows"]:
    right = f"{row['exact']['k']:.0f} of {row['exact']['n']} right"
    print(f"{row['label']:17} {right:17} {row['trainable']:12,} parameters trained")

# %%
lesson.show(
    figures.quality_against_parameters(compared),
    f"{findings.headline(compared)}.",
)

# %% [markdown]
# How to read the figure:
#
# - **Exact match** is the share of sentences whose answer is exactly right.
# - A score is the mean of three training runs. A bar is its **95 % interval**: it shows
#   how uncertain the score is, since other sentences and other runs would give another.
# - The **letters** after the names compare methods in pairs. Two methods that share a
#   letter, such as (ab) and (b), are *not told apart*: the data leave open which is
#   better. Two that share none, such as (a) and (b), are told apart. Trust the
#   letters, not the overlap of bars.
# - Methods that train equally many parameters are drawn side by side.
#
# The letter a marks the best method, and all that are not told apart from it. The
# sentence below the figure leaves out bitsandbytes, which is another library. So it
# counts six fine-tuned methods, where the figure shows seven. Each method has the
# settings, such as its learning rate, that won in trial runs on sentences that are
# neither trained on nor tested. The next cell shows one sentence, with two answers.

# %%
ways = {row["key"]: row["samples"] for row in compared["rows"]}
pairs = list(zip(ways["zero-shot"], ways["lora"], strict=True))
asked, tuned = next((a, b) for a, b in pairs if b["correct"] and not a["correct"])
print("sentence: ", asked["prompt"])
print("zero-shot:", " ".join(asked["answer"].split())[:90], "…")
print("LoRA:     ", tuned["answer"])

# %% [markdown]
# Without training, the answer is not the right JSON. With LoRA, it is.
#
# ## Ten lines
#
# Ten numbered lines do all of the fine-tuning. Lines 1 to 4 import the tools.

# %%
from peft_from_scratch import load_model, lora, save  # line 1
from peft_from_scratch.course import TrainConfig  # line 2
from peft_from_scratch.course import load_task  # line 3
from peft_from_scratch.course import train  # line 4

# %% [markdown]
# Line 5 loads the model and its **tokenizer**, which cuts text into **tokens**, the
# pieces that the model reads and writes.

# %%
model, tokenizer = load_model(lesson.base)  # line 5: "smollm2"

# %% tags=["nbval-check-output"]
total = model.num_parameters()
print(f"{total:,} parameters")
tokens = tokenizer("Three kettles to Lima").input_ids
print("tokens:", [tokenizer.decode(token) for token in tokens])

# %% [markdown]
# Rare words such as "kettles" are several tokens. Line 6 loads the task: rows with a
# sentence and the right line of JSON. Rows in `train` are for training, and rows in
# `test` for testing. Some names, items and cities occur only in `test`.

# %% tags=["nbval-check-output"]
task = load_task("orders")  # line 6
print(len(task.train), "rows to learn from,", len(task.test), "to test with")
print("instruction:", task.instruction)
print("sentence:   ", task.test[0]["prompt"])
print("right:      ", task.test[0]["completion"])

# %% [markdown]
# ## What counts as right?
#
# An answer is right if it is the right JSON value and nothing else, because a program
# will read it. Choose such a rule before you see answers; later, it is tempting to
# choose one that your model passes.

# %%
right = '{"customer":"Ines","items":{"rope":2}}'
for answer in (
    right,
    '{"items": {"rope": 2}, "customer": "Ines"}',
    '{"customer":"Ines","items":{"rope":3}}',
    f"Here you are: {right}",
):
    print(f"{task.score(answer, right)!s:6} {answer}")

# %% [markdown]
# The second answer is right, because JSON ignores the order of keys. The third has a
# wrong value, and the fourth is not JSON.
#
# ### Exercise 0.1: an exact scorer
#
# Difficulty two of five, importance five of five, about ten minutes.
#
# Write `my_score(answer, right)`. Both arguments are strings, and the result is `True`
# or `False`. `right` is valid JSON. `answer` can be any text, and is wrong if it is not
# JSON. The order of keys, and spaces between the parts, make no difference. So
# `my_score('{"b": 2, "a": 1}', '{"a":1,"b":2}')` is `True`, and `my_score("Sure!",
# "{}")` is `False`. No key occurs twice.
#
# <details><summary>Hint one: a question</summary>
#
# Two texts can hold the same value. What does `json.loads` return for each?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# One `bool` comes out in every case. How does Python compare two dicts whose keys are
# in a different order?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `try:`, because `json.loads` raises a `ValueError` for text that is not JSON.
#
# </details>


# %% tags=["exercise-0.1"]
def my_score(answer, right):
    """True where the answer is the same JSON value as `right`, and nothing else."""
    ### BEGIN SOLUTION
    try:
        said = json.loads(answer)
    except ValueError:
        return False
    return said == json.loads(right)
    ### END SOLUTION


# %% tags=["check-0.1", "points-2"]
checks.score(my_score)

# %% [markdown]
# The library's scorer is stricter. It rejects JSON's `true` in place of `1`, although
# Python says `True == 1`. It also rejects a key that occurs twice.
#
# ## Before: ask the model as it is
#
# We measure the untrained model first. It gets the instruction and the sentence in its
# **chat format** (`template="chat"`), with special tokens around each message. Guess
# how many of twenty answers will be JSON at all.


# %%
def is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


lesson.predict("0.1", low=None, high=None, unit="JSON answers of 20")

# %%
rows = task.test.select(range(20))
before = answer_rows(model, tokenizer, task, rows, template="chat")
lesson.measured("0.1", sum(map(is_json, before.answers)))
print(f"{sum(before.correct)} of {len(rows)} right")
for row, answer in zip(rows.select(range(2)), before.answers, strict=False):
    print("\nsentence:", row["prompt"])
    print("right:   ", row["completion"])
    print("answer:  ", " ".join(answer.split())[:90], "…")

# %% [markdown]
# The model gets 0 of 20 right, and no answer is valid JSON. The first one chats, and
# the second invents its own keys. The model cannot know which format *you* want.
# Examples can teach it.
#
# ## LoRA: freeze the model, train a small update
#
# LoRA trains small matrices in parallel with the model's own. A matrix $W_0$ of the
# model takes a vector $x$ of $d_{in}$ entries and returns $W_0 x$, with $d_{out}$
# entries. Full fine-tuning changes every $W_0$. **LoRA**, low-rank adaptation,
# **freezes** $W_0$, so that it never changes, and adds an **update**:
#
# $$h = W_0\,x + \frac{\alpha}{r}\,B\,A\,x$$
#
# | symbol | what it is | shape | trained? |
# |---|---|---|---|
# | $W_0$ | the model's own matrix | $d_{out} \times d_{in}$ | no, frozen |
# | $A$ | takes $x$ to $r$ entries | $r \times d_{in}$ | yes, random initialization |
# | $B$ | takes them to $d_{out}$ | $d_{out} \times r$ | yes, initialized to zero |
#
# You choose the **rank** $r$, and $\alpha$, which sets the **scale** $\alpha / r$ of
# the update. The next cell computes $h$ for a small example, with rank two.

# %%
torch.manual_seed(0)
x, W0 = torch.randn(6), torch.randn(4, 6)
A, B = torch.randn(2, 6), torch.zeros(4, 2)
r, alpha = 2, 4.0
squeezed = A @ x
h = W0 @ x + alpha / r * (B @ squeezed)
print(len(x), "entries in,", len(squeezed), "between A and B,", len(h), "out")
print("the same as without the update:", torch.equal(h, W0 @ x))

# %% [markdown]
# $B$ is zero before training, so the update is zero, and training begins with exactly
# the original model. The next figure shows one layer of the model. Gray parts are
# frozen; LoRA adds the blue ones. For now, ignore all names but $W$, $A$ and $B$.

# %%
lesson.show(
    block_picture(lit="lora"),
    "Each of the seven matrices of a layer has its own A and B, in parallel with it.",
)

# %% [markdown]
# Each gray $W$ has a blue pair.
#
# Line 7 adds $A$ and $B$ to every layer. $A$ is random, so the cell fixes the **seed**,
# the number that decides all random draws. It also counts the parameters of one matrix,
# `q_proj`, which is $W_q$ in the figure.

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
wrapped = lora.inject(model, r=8, alpha=16)  # line 7
trained = sum(parameter.numel() for parameter in trainable(model).values())
print(f"{len(wrapped)} matrices, {trained:,} parameters to train,", end=" ")
print(f"{trained / total:.2%} of the model's own")
first = model.get_submodule(wrapped[0])
print("one of them:", wrapped[0])
print("W0", tuple(first.base.weight.shape), f"{first.base.weight.numel():,} parameters")
print("A ", tuple(first.A.shape), f"{first.A.numel():,} parameters")
print("B ", tuple(first.B.shape), f"{first.B.numel():,} parameters")

# %% [markdown]
# All $A$ and $B$ together are 1.82 % of the model's size. This frozen $W_0$ has 331,776
# parameters; its $A$ and $B$ have 4,608 each.
#
# ### Exercise 0.2: count what trains
#
# Difficulty one of five, importance four of five, about three minutes.
#
# This is a warm-up. Write `my_count(shapes, r)`, where `shapes` lists `(d_out, d_in)`
# of each matrix that gets LoRA. Return two integers: the parameters in all $A$ and $B$,
# and those in all $W_0$. For example, `my_count([(3, 5)], 2)` is `(16, 15)`.
#
# <details><summary>Hint one: a question</summary>
#
# For one matrix, what do you multiply to count the parameters in $A$, $B$ and $W_0$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# $A$ is $r \times d_{in}$, and $B$ is $d_{out} \times r$. Add up all shapes.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `trained = frozen = 0`, then a loop `for d_out, d_in in shapes:`.
#
# </details>


# %% tags=["exercise-0.2"]
def my_count(shapes, r):
    """(trained, frozen): parameters in all A and B, and in all W0.

    shapes: a list of (d_out, d_in), one for each matrix."""
    ### BEGIN SOLUTION
    trained = sum(r * (d_in + d_out) for d_out, d_in in shapes)
    frozen = sum(d_in * d_out for d_out, d_in in shapes)
    return trained, frozen
    ### END SOLUTION


# %% tags=["check-0.2", "points-1"]
checks.lora_count(my_count)

# %% [markdown]
# ## Train
#
# Sixteen optimizer steps teach the model the format. In an **optimizer step**, the
# model sees a **batch** of rows, here four. Then the **optimizer**, here AdamW, changes
# every $A$ and $B$ a little, to make the right answers more probable. Line 8 sets how.
#
# - The **training loss** says how improbable the right answers were: the mean of $-\ln
#   p$ over their tokens, where $p$ is the probability that the model gave the token.
#   Its unit is **nats per token**. At 0.04 nats, a typical $p$ is $e^{-0.04}$, about
#   `96 %`.
# - The **learning rate**, `lr`, sets how large the changes are. `3e-3` is Python's way
#   to write `0.003`. AdamW moves a parameter by at most about `lr` in an optimizer
#   step.
#
# Line 9 trains, in about half a minute. The runs at the top were longer, with other
# settings, so their answers differ.

# %%
W0_then = first.base.weight.clone()
recipe = TrainConfig(steps=16, batch=4, lr=3e-3)  # line 8
history = train(model, tokenizer, task, recipe)  # line 9

# %% tags=["nbval-check-output"]
print("the matrix W0 from above is as it was:", torch.equal(first.base.weight, W0_then))

# %% [markdown]
# The model's own matrix has not changed. The next figure shows the training loss of
# each optimizer step, on its four rows. **Label tokens** are the right answers' tokens.

# %%
start_loss, end_loss = history.loss[0], sum(history.loss[-4:]) / 4
figure = figures.training_curve(history)
figure.axes[0].set_xticks(range(0, recipe.steps + 1, 4))
lesson.show(
    figure,
    f"The training loss starts at {start_loss:.2f}; its mean over the last four steps "
    f"is {end_loss:.2f}. One optimizer step took {history.median_step_seconds:.1f} s.",
)

# %% [markdown]
# The training loss falls from 1.57 to 0.04 nats per token, the mean of the last four
# optimizer steps. (The second number in the figure's title is the last optimizer step
# alone.) This shows only that the model predicts its *training* rows well.
#
# ## After: the same question again
#
# Only new sentences show whether the model has learned the task. We ask the same twenty
# test rows again.

# %%
lesson.predict("0.2", low=None, high=None, unit="right answers of 20")

# %%
after = answer_rows(model, tokenizer, task, rows, template="chat")
lesson.measured("0.2", sum(after.correct))
for i, fine in list(enumerate(after.correct))[:4]:
    print("\nsentence:", rows[i]["prompt"])
    print("answer:  ", after.answers[i], "" if fine else "(wrong)")

# %% [markdown]
# The model now gets 11 of 20 right. The first answer has the right format and a wrong
# city, "Kyron". Kyoto occurs in no training row.
#
# ## The control: the same parameters, shuffled
#
# A better score does not say what made it better. Perhaps *any* update of this size
# would help. A **control** is a run that keeps everything except the suspected cause.
# The suspected cause is *which* update training found. So the control keeps the values
# of each $A$ and $B$ and shuffles their places.
#
# Is the shuffled update as large as the trained one? In the product $B A$, each entry
# of $B$ is now multiplied by other entries of $A$. The next cell compares the **norm**
# $\|BA\|$, the root of the sum of the squared entries, before and after shuffling.

# %%
torch.manual_seed(0)
kept = []
for module in adapters(model).values():
    A, B = module.A.detach(), module.B.detach()
    order_A, order_B = torch.randperm(A.numel()), torch.randperm(B.numel())
    A2, B2 = A.flatten()[order_A].view_as(A), B.flatten()[order_B].view_as(B)
    kept.append(100 * ((B2 @ A2).norm() / (B @ A).norm()).item())
kept.sort()
shares = f"{kept[0]:.0f} to {kept[-1]:.0f} %, median {kept[len(kept) // 2]:.0f} %"
print(f"norm of BA after shuffling, in % of the norm before: {shares}")

# %% [markdown]
# The median matrix keeps 96 % of its norm, and one keeps only 73 %. If the shuffled
# model does worse, a smaller update could be the reason. A fair control is exactly as
# large.
#
# ### Exercise 0.3: a fair control
#
# Difficulty three of five, importance five of five, about fifteen minutes.
#
# Write `my_control(A, B, order_A, order_B)`. It returns a pair `(A2, B2)` of the same
# shapes, `A2 (r, d_in)` and `B2 (d_out, r)`, such that
#
# - the entries of $A$ and $B$ are shuffled: entry `i` of the flattened result comes
#   from place `order_A[i]` of the flattened $A$, and likewise for $B$;
# - one factor makes the update as large as before: $\|B_2 A_2\| = \|B A\|$. Put the
#   factor where you like.
#
# `A` and `B` are `float32`, the orders are permutations in `int64`, and no update is
# zero. For example, with `A = [[3, 4]]`, `B = [[2]]`, `order_A = [1, 0]` and
# `order_B = [0]`, both updates have norm `10`, and `([[4, 3]], [[2]])` is right.
#
# <details><summary>Hint one: a question</summary>
#
# By which number must you multiply a matrix of norm `5` to give it norm `10`?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# The norm that counts is that of the product, `(d_out, d_in)`. The norms of `A` and `B`
# themselves do not change when entries move.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `A2 = A.flatten()[order_A].view_as(A)`
#
# </details>


# %% tags=["exercise-0.3"]
def my_control(A, B, order_A, order_B):
    """(A2, B2): the entries shuffled, and one factor that keeps the norm of B A."""
    ### BEGIN SOLUTION
    A2 = A.flatten()[order_A].view_as(A)
    B2 = B.flatten()[order_B].view_as(B)
    return A2, B2 * ((B @ A).norm() / (B2 @ A2).norm())
    ### END SOLUTION


# %% tags=["check-0.3", "points-3"]
checks.fair_control(my_control)

# %% [markdown]
# The next cell gives every pair of $A$ and $B$ its control, and asks the same twenty
# rows. If your answer passed its check, the lesson uses your function.

# %%
lesson.predict("0.3", low=None, high=None, unit="right answers of 20")

# %%
control_of = lesson.mine(my_control, checks.control_of)
learned = {name: p.detach().clone() for name, p in trainable(model).items()}
with torch.no_grad():
    for module in adapters(model).values():
        A, B = module.A, module.B
        orders = [torch.randperm(p.numel(), device=p.device) for p in (A, B)]
        for p, shuffled in zip((A, B), control_of(A, B, *orders), strict=True):
            p.copy_(shuffled)
control = answer_rows(model, tokenizer, task, rows, template="chat")
with torch.no_grad():  # and back to what was learned
    for name, parameter in trainable(model).items():
        parameter.copy_(learned[name])
lesson.measured("0.3", sum(control.correct))
print("first answer:", " ".join(control.answers[0].split())[:80], "…")
fewer = sum(control.correct) < sum(after.correct) / 2
lesson.control("Shuffled, it gets less than half as many right as LoRA.", fewer)

# %% [markdown]
# The control gets 0 of 20 right. So the size of the update does not explain the score;
# the places of the values, which training found, do.
#
# ## How sure is that?
#
# Twenty rows leave a wide range of scores possible. The **true share** is the share of
# right answers among endlessly many such rows. A 95 % **interval** is computed so that
# it contains the true share in about 95 of 100 such tests, each with new rows.
#
# With $k$ right answers of $n$, the plain interval goes up and down from the share
# $p = k / n$ by $z\,\sqrt{p\,(1 - p) / n}$. The root is the typical error of $p$. A
# normal distribution has 95 % of its values within `1.96` typical errors, so $z$ is
# `1.96`. The next cell computes this interval for two examples, 14 of 20 and 0 of 20.

# %%
z = 1.96
for k, n in ((14, 20), (0, 20)):
    p = k / n
    margin = z * math.sqrt(p * (1 - p) / n)
    print(f"{k:2} of {n} right: from {p - margin:.0%} to {p + margin:.0%}")

# %% [markdown]
# For 0 of 20, the plain interval has no width, as if the model could *never* be right.
# Wilson's interval mends this. It goes from $c - m$ to $c + m$:
#
# $$c = \frac{k + z^2/2}{n + z^2}
# \qquad
# m = \frac{z}{n + z^2}\,\sqrt{\frac{k\,(n - k)}{n} + \frac{z^2}{4}}$$
#
# The center $c$ is the share after adding $z^2$ rows, about four, half of them right.
# For 0 of 20, both $c$ and $m$ are `0.081`, so the interval goes from 0 to 16 %.
#
# ### Exercise 0.4: Wilson's interval
#
# Difficulty two of five, importance four of five, about ten minutes.
#
# This is a warm-up: put the two formulas into code. `k` and `n` are integers. Return
# two floats, $c - m$ and $c + m$, not rounded. For example, `my_interval(14, 20)` is
# about `(0.481, 0.855)`.
#
# <details><summary>Hint one: a question</summary>
#
# Does the four divide $z^2$, or everything under the root?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Return the low end first. What should the high end be for $k = n$?
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# Start with `square = z**2`, then compute `c`, then `m`.
#
# </details>


# %% tags=["exercise-0.4"]
def my_interval(k, n, z=1.96):
    """(low, high): the true shares that fit with k right of n, from zero to one."""
    ### BEGIN SOLUTION
    centre = (k + z**2 / 2) / (n + z**2)
    margin = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    return centre - margin, centre + margin
    ### END SOLUTION


# %% tags=["check-0.4", "points-2"]
checks.interval(my_interval)

# %% [markdown]
# The next cell gives each of the three results its interval.

# %%
found = {"before": (0, before), "control": (trained, control), "LoRA": (trained, after)}
points = {}
for name, (added, answers) in found.items():
    k, n = sum(answers.correct), len(answers.correct)
    # x: millions of parameters; y: percent right, and both ends of its interval
    points[name] = (added / 1e6, *(100 * share for share in (k / n, *wilson(k, n))))
    _, _, low, high = points[name]
    valid = sum(map(is_json, answers.answers))
    print(f"{name:8} {valid:2} of {n} are JSON, {k:2} are right:", end=" ")
    print(f"true share {low:2.0f} to {high:.0f} %")
figure = curves.points(
    points,
    x="Added parameters, millions",
    y="Right, % of test rows",
    title="The trained LoRA beats the untrained model and the shuffled control",
    subtitle="Twenty test rows. Bars: 95 % intervals. Gray: the control.",
    control=("control",),
    log="",
)
gap = points["LoRA"][2] - max(points["before"][3], points["control"][3])
lesson.show(
    figure, f"LoRA's interval begins {gap:.0f} percentage points above the others."
)
lesson.control("LoRA's interval touches neither of the others.", gap > 0)

# %% [markdown]
# LoRA's interval goes from 34 to 74 %, and the other two end at 16 %. They do not
# touch, so this training worked. All 20 answers are now JSON: the model has learned the
# format.
#
# Such a wide interval cannot rank two good methods. Guess how many rows would narrow it
# to five percentage points up and down, at the same share.

# %%
lesson.predict("0.4", low=None, high=None, unit="test rows")

# %%
share = sum(after.correct) / len(after.correct)


def width(n):
    low, high = wilson(round(share * n), n)
    return high - low


lesson.measured("0.4", next(n for n in range(20, 10_000) if width(n) < 0.1))

# %% [markdown]
# It takes 377 rows. To halve the width of an interval, you need about four times as
# many rows. The interval accounts only for the choice of rows. Another seed would train
# another LoRA, with another score; notebook 01 has intervals over seeds.
#
# ## Break it on purpose
#
# Wrong padding ruins the answers of a good model, and no error is raised. All rows of a
# batch must be equally long, so short ones are filled up with **padding**. A **mask**
# tells the model what to ignore: it is `1` for a real token, and `0` for padding.
#
# The next cell adds padding in the obvious way. We try it on eight rows that were just
# answered right.

# %%
good = [row for row, fine in zip(rows, after.correct, strict=True) if fine][:8]
prompts = [
    encode_prompt(tokenizer, task.instruction, row["prompt"], template="chat")
    for row in good
]


def pad_first_try(prompts, pad):
    longest = max(len(prompt) for prompt in prompts)
    holes = [longest - len(prompt) for prompt in prompts]
    ids = [p + [pad] * hole for p, hole in zip(prompts, holes, strict=True)]
    mask = [[1] * len(p) + [0] * h for p, h in zip(prompts, holes, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


# %%
@torch.no_grad()
def answers_with(padding):
    ids, mask = (each.to(model.device) for each in padding(prompts, 0))
    how = dict(attention_mask=mask, max_new_tokens=40, do_sample=False)
    with quiet_transformers():
        written = model.generate(ids, **how)[:, ids.shape[1] :]
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]


def count_right(answers):
    pairs = zip(answers, good, strict=True)
    return sum(task.score(answer, row["completion"]) for answer, row in pairs)


lesson.predict("0.5", low=None, high=None, unit=f"right answers of {len(good)}")

# %%
broken = answers_with(pad_first_try)
lesson.measured("0.5", count_right(broken))
for prompt, answer in zip(prompts, broken, strict=True):
    print(f"{len(prompt)} tokens: {' '.join(answer.split())[:76]}")

# %% [markdown]
# Only 1 of 8 answers is still right, although the mask is right. Compare the answers
# with the lengths before you open this.
#
# <details><summary>What is wrong</summary>
#
# The padding is on the wrong side. A model writes its answer after the *last* place of
# a row. In the longest row, with 49 tokens, the last place holds the end of the
# question. In all other rows, the last place holds padding. The mask keeps real tokens
# from using the padding, but does not change where the answer begins. Pad on the
# *left*, and each row ends with its own last token.
#
# </details>
#
# ### Exercise 0.5: padding that does no harm
#
# Difficulty one of five, importance four of five, about five minutes.
#
# Write `my_padding(prompts, pad)`, which pads on the left. `prompts` is a list of one
# or more lists of integers. Return `ids` and `mask`, two int64 tensors of shape `(rows,
# longest)`. For example, `[[5, 6], [7]]` with `pad` `0` gives `[[5, 6], [0, 7]]` and
# `[[1, 1], [0, 1]]`. A prompt can contain `pad` as a real token; the mask is `1` there.
#
# <details><summary>Hint one: a question</summary>
#
# How many places must be filled in a shorter row?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# A row of `mask` has a zero for each place filled, then a one for each token.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `longest = max(len(prompt) for prompt in prompts)`
#
# </details>


# %% tags=["exercise-0.5"]
def my_padding(prompts, pad):
    """(ids, mask), tensors of whole numbers, of prompts that are lists of tokens.

    Padded on the left with `pad`; the mask is 1 on real tokens, 0 on padding."""
    ### BEGIN SOLUTION
    longest = max(len(prompt) for prompt in prompts)
    holes = [longest - len(prompt) for prompt in prompts]
    ids = [[pad] * hole + p for p, hole in zip(prompts, holes, strict=True)]
    mask = [[0] * hole + [1] * len(p) for p, hole in zip(prompts, holes, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)
    ### END SOLUTION


# %% tags=["check-0.5", "points-2"]
checks.padding(my_padding)

# %% [markdown]
# The next cell pads on the left. (The `0` in `left_pad(prompts, 0, pad)` says that no
# vectors of prefix tuning come before the prompts.)

# %%
padding = lesson.mine(my_padding, lambda prompts, pad: left_pad(prompts, 0, pad))
repaired = answers_with(padding)
print(f"{count_right(repaired)} of {len(good)} right")

# %% [markdown]
# All 8 of 8 are right again: the training was never the problem.
#
# ## Keep it: a small file
#
# A trained LoRA fits in a small file. Line 10 saves only the trained parameters, in the
# format of Hugging Face's library PEFT. The small part that a method adds and trains is
# called an **adapter**. Guess the size of the file.

# %%
lesson.predict("0.6", low=None, high=None, unit="MB")

# %%
save(model, "out/orders-lora")  # line 10
adapter = Path("out/orders-lora")
lesson.measured("0.6", (adapter / "adapter_model.safetensors").stat().st_size / 1e6)
print(f"the model's own parameters: {4 * total / 1e6:.0f} MB, at four bytes each")

# %% [markdown]
# The adapter takes 9.82 MB, and the model 538 MB. So you can keep one model, and a
# small file for each task. The next cell collects the ten lines.

# %%
import re

from IPython import get_ipython

said = "\n".join(get_ipython().user_ns["In"])  # all that was run so far
ten = re.findall(r".*# line \d.*", said)
print(*dict.fromkeys(ten), sep="\n")

# %% [markdown]
# ## Merge: no cost in use
#
# A LoRA that is **merged** into the model costs no extra time. To merge means to add
# $\frac{\alpha}{r} B A$ to $W_0$, once. The result is the same, because $W_0 x +
# \frac{\alpha}{r} B A x = (W_0 + \frac{\alpha}{r} B A)\,x$. The next cell checks that
# the **logits**, the scores of every possible next token, stay the same apart from
# rounding.

# %% tags=["nbval-check-output"]
ids = tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    beside = model(ids).logits
    merge(model)
    folded = model(ids).logits
moved = (folded - beside).abs().max().item()
assert moved < 1e-3
print("every logit moved by less than 0.001:", moved < 1e-3)
print(f"{model.num_parameters():,} parameters, as before LoRA")

# %% [markdown]
# No logit moved by 0.001 or more, and the model has its old size again.
#
# ## The map
#
# The methods of this course differ in *where* they add or change parameters. The next
# figure shows all of them. **DoRA** is LoRA that also trains the norm of each row of
# $W$. **PiSSA** is LoRA with another initialization: $BA$ is the matrix of rank $r$
# that is closest to $W$. It is subtracted from the frozen $W$, so that the sum is as
# before. **IA3** and **BitFit** train only vectors.

# %%
lesson.show(
    block_picture(),
    "LoRA, DoRA, PiSSA and QLoRA work at every matrix W. Bottleneck adapters follow "
    "each half of a layer. Prefix tuning works in attention, prompt tuning on the "
    "prompt, and IA3 and BitFit on vectors. Full fine-tuning trains everything.",
)

# %% [markdown]
# ## Verdict cards
#
# Later lessons test textbook claims. A **verdict card** shows the claim, the verdict,
# and a number with its interval. It ends with a sentence to remember, which begins with
# "So:". A rule, written before the runs, turns the interval into a verdict. Take an
# invented claim: "LoRA's score, minus that of full fine-tuning, is at least `-5`
# percentage points."
#
# | interval of this difference | verdict |
# |---|---|
# | `[-3, +2]`, all above `-5` | holds |
# | `[-20, -8]`, all below `-5` | does not hold here |
# | `[-9, +1]`, on both sides | undecided |
#
# "Undecided" does not mean "no difference". These runs cannot decide; more runs might.
#
# ## Quiz
#
# **1. The training loss has fallen to nearly zero. What does that show?**
#
# <details><summary>The model can do the task</summary>
#
# No. Only rows outside of `train` can show that.
#
# </details>
# <details><summary>The model predicts its training rows well</summary>
#
# Right. A training loss says nothing else.
#
# </details>
# <details><summary>The model has forgotten everything else</summary>
#
# No. The loss is computed on training rows only.
#
# </details>
#
# **2. You have added LoRA, and trained nothing. What does the model answer?**
#
# <details><summary>Exactly what it answered before</summary>
#
# Right. $B$ is zero, so the update is zero.
#
# </details>
# <details><summary>Nonsense, because $A$ is random</summary>
#
# No. $B$ multiplies the random part by zero.
#
# </details>
# <details><summary>Nothing, because the model is frozen</summary>
#
# No. A frozen model still answers.
#
# </details>
#
# **3. None of twenty rows is right. What can you say about the true share?**
#
# <details><summary>It is zero</summary>
#
# No. A model that gets one row in ten right can also miss twenty in a row.
#
# </details>
# <details><summary>It is probably below one in five</summary>
#
# Right. Wilson's interval ends at 16 %.
#
# </details>
# <details><summary>Nothing, the sample is too small</summary>
#
# No. The sample rules out one half.
#
# </details>
#
# **4. What does the shuffled control rule out?**
#
# <details><summary>That we were lucky with the rows</summary>
#
# No. The interval accounts for the choice of rows.
#
# </details>
# <details><summary>That the model knows the test rows by heart</summary>
#
# No. None of them is in `train`.
#
# </details>
# <details><summary>That any update of this size would do</summary>
#
# Right. The control has the same values and the same size, in other places.
#
# </details>
#
# **5. One by one, your model answers well. Twenty at once, it does badly. Where do you
# look first?**
#
# <details><summary>At the learning rate</summary>
#
# No. It is the same trained model.
#
# </details>
# <details><summary>At the padding and the mask</summary>
#
# Right. A batch must not change the answers.
#
# </details>
# <details><summary>At the scorer</summary>
#
# No. The scorer is the same, too.
#
# </details>
#
# ### In your own words: find the confound
#
# A **confound** is a second difference that could also explain a result. A colleague
# reports: "The plain model gets `0` of `50` right, and our LoRA `40`. So LoRA training
# works." The LoRA's prompts also held three solved examples. Which run do you ask for,
# and what would support the claim?
#
# <details><summary>A model answer</summary>
#
# The training and the prompt both changed. I ask for the plain model with the same
# three examples. If it also gets about `40` right, the data do not show that training
# helped. If it gets `5`, the intervals are far apart, and the claim is supported.
#
# </details>
#
# ### Transfer
#
# Write three sample rows of your own task, `{"prompt": "…", "completion": "…"}`, one
# per line, for `load_task("my_rows.jsonl")`. How many test rows do you need to tell a
# working model from a failing one? What is your control?
#
# <details><summary>A model answer</summary>
#
# Twenty; ranking two good models takes hundreds. As a control, train on the same rows
# with their completions shuffled. If that model scores as well, its score does not come
# from reading the prompt.
#
# </details>
#
# ## Limits
#
# - **One control.** The shuffled update is as large as LoRA's, and it does not help.
#   One such update cannot show that no other of this size would help.
# - **Not shown:** that LoRA is as good as full fine-tuning, or that the model forgot
#   nothing. One seed, one task and twenty rows of a small model cannot show that.
# - **The paper's number.** LoRA's authors trained `10,000` times fewer parameters than
#   full fine-tuning on GPT-3; here it is `55` times fewer.
#
# ## Your guesses
#
# Over several lessons, nine of ten ranges should contain the measured value. If fewer
# do, make your ranges wider.

# %%
lesson.calibration()

# %% [markdown]
# ## Receipt
#
# The last cell compares the forecast at the top with this run.

# %%
lesson.receipt()

# %% [markdown]
# ## Where to go next
#
# - **Change one thing and run again**: `r`, `steps` or `lr`. Guess first.
# - **The code**: [what every method promises](../peft_from_scratch/core/adapter.py),
#   [LoRA](../peft_from_scratch/methods/lora.py), [the training
#   loop](../peft_from_scratch/training/loop.py).
# - Hu and others, [LoRA: Low-Rank Adaptation of Large Language
#   Models](https://arxiv.org/abs/2106.09685).
# - Brown, Cai and DasGupta, [Interval estimation for a binomial
#   proportion](https://doi.org/10.1214/ss/1009213286): why the plain interval fails.
# - Hugging Face's guide to writing with a model, [wrong padding
#   included](https://huggingface.co/docs/transformers/llm_tutorial#wrong-padding-side).
