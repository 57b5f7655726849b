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
# You will have shown that a real language model learns a job at which it had failed,
# because a sliver of new numbers beside its own was trained on examples, while the same
# numbers in a shuffled order fail.
#
# **You need** some Python. No graphics card, no account, and no mathematics beyond "a
# matrix times a vector". `make lab` has installed everything and fetched the model.
#
# **At the end you can**
#
# - fine-tune a language model with LoRA, and say what the ten lines do;
# - score answers exactly, and say how sure the score is;
# - count what was trained, save it, and fold it into the model;
# - say what a control is for;
# - have many sentences answered at once without spoiling the answers.
#
# **Only ten minutes?** Run the cells in turn, down to "The control". Do exercise 0.1,
# and leave out the others.

# %%
from peft_from_scratch.course import start

lesson = start("00")

# %% [markdown]
# That is how each notebook begins. It says which model it will use, and what it will
# cost you in time and memory. Press Shift and Enter to run a cell and go on to the
# next. Three more things to know:
#
# - **Guesses.** Before each measurement you are asked what you expect. Put two numbers
#   in place of None: a range that you are nine tenths sure of. Nobody marks it, and a
#   lesson runs without guesses too. At the end you see how good your ranges were.
# - **Exercises.** In your own copy, in the folder `work`, they are blank: replace the
#   line that says so. The cell below each one checks your answer, and says nothing if
#   all is well. No later cell needs an answer, so leave out what you like. "Run all"
#   stops at the first blank. With `start("00", quick=True)` it passes over the blanks.
#   The copies in `notebooks` are solved.
# - **Marked cells.** A cell that begins with `NBVAL_CHECK_OUTPUT` prints the same on
#   every machine, and our tests hold it to that. Times and scores may differ a little.
#
# ## The result first
#
# The job: turn an order, written as a plain sentence, into one exact line of JSON. The
# model: SmolLM2, a real language model, small enough for a laptop. We tried it in
# several ways, on test sentences that no training had seen:
#
# - *zero-shot*: only ask, with an instruction of one sentence;
# - *few-shot*: show it a few solved examples in the question;
# - *full fine-tuning*: train every number of the model on examples;
# - *LoRA*: train a few new numbers beside the model's own. You are about to do it.

# %%
import json
import math
from pathlib import Path

import torch

from peft_from_scratch import merge, trainable
from peft_from_scratch.course import answer_rows, block_picture, curves, encode_prompt
from peft_from_scratch.course import figures, findings, left_pad, provenance
from peft_from_scratch.course import quiet_transformers, wilson
from peft_from_scratch.course.checks import start_here as checks

shipped = provenance.ROOT / "data" / "results" / "compare.json"
compared = json.loads(shipped.read_text("utf-8"))
for row in compared["rows"]:
    right = f"{row['exact']['k']:.0f} of {row['exact']['n']} right"
    print(f"{row['label']:17} {right:17} {row['trainable']:12,} numbers trained")

# %%
lesson.show(
    figures.quality_against_parameters(compared),
    f"{findings.headline(compared)}.",
)

# %% [markdown]
# The bars are intervals: they say how far chance may have moved a score. You will make
# such an interval yourself. What did the model say, before and after?

# %%
ways = {row["key"]: row["samples"] for row in compared["rows"]}
pairs = list(zip(ways["zero-shot"], ways["lora"], strict=True))
asked, tuned = next((a, b) for a, b in pairs if b["correct"] and not a["correct"])
print("sentence: ", asked["prompt"])
print("zero-shot:", " ".join(asked["answer"].split())[:90], "…")
print("LoRA:     ", tuned["answer"])

# %% [markdown]
# ## Ten lines
#
# Ten lines do the whole work. They are counted in comments; every other cell only looks
# at what they did. The first four fetch the tools.

# %%
from peft_from_scratch import load_model, lora, save  # line 1
from peft_from_scratch.course import TrainConfig  # line 2
from peft_from_scratch.course import load_task  # line 3
from peft_from_scratch.course import train  # line 4

# %% [markdown]
# Line 5 loads the model: SmolLM2-135M-Instruct, unless you asked for another one. A
# model is a long list of numbers, called *parameters*. The *tokenizer* cuts text into
# the pieces that the model reads and writes, its *tokens*.

# %%
model, tokenizer = load_model(lesson.base)  # line 5: "smollm2"

# %%
# NBVAL_CHECK_OUTPUT
total = model.num_parameters()
print(f"{total:,} parameters")
tokens = tokenizer("Three kettles to Lima").input_ids
print("tokens:", [tokenizer.decode(token) for token in tokens])

# %% [markdown]
# Line 6 loads the **task**: many sentences, each with the line of JSON that is right
# for it. They come in parts. The model learns from `train`. It never learns from
# `test`, which even has names and things that `train` does not mention.

# %%
# NBVAL_CHECK_OUTPUT
task = load_task("orders")  # line 6
print(len(task.train), "rows to learn from,", len(task.test), "to test with")
print("instruction:", task.instruction)
print("sentence:   ", task.test[0]["prompt"])
print("right:      ", task.test[0]["completion"])

# %% [markdown]
# ## What counts as right?
#
# Decide that before you look at any answer, or the answers will decide it for you. Here
# a program will read the answer, so we are strict. It must be the right JSON value, and
# nothing else:

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
# Keys may stand in any order, for JSON says so. But a friendly word breaks the program
# that reads it. So does a missing bracket.
#
# ### Exercise 0.1: an exact scorer
#
# Difficulty two of five, importance five of five, about ten minutes. Write the function
# that says whether an answer is right. `right` is always good JSON; the answer can be
# any text at all.
#
# <details><summary>Hint one: a question</summary>
#
# Two texts can differ and still hold the same value. What does `json.loads` turn a text
# into, and what does it do with a text that is no JSON?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Two texts go in, one `True` or `False` comes out, in all cases. A JSON object becomes
# a `dict`; and two dicts with the same keys and values are equal, in any order.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `try:`, and under it `said = json.loads(answer)`. What it raises is a `ValueError`.
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
# (The library's scorer is stricter still. In Python `True == 1`, but in JSON they are
# two values; and it refuses an object that has a key twice.)
#
# ## Before: ask the model as it is
#
# It gets the instruction and the sentence, as in a chat. The table at the top has
# spoiled the score. So guess something else: of twenty answers, how many will be JSON
# at all, right or wrong?


# %%
def is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


lesson.predict("0.1", low=None, high=None, unit="of 20 are JSON")

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
# It knows English, and it has heard of JSON. What it cannot know is the form that *you*
# want: which keys, in which spelling, and what to do with "a dozen". A form can be
# learned from examples.
#
# ## LoRA: leave the model alone, train a small thing beside it
#
# Most of a language model is matrices. Each takes a vector $x$ and returns another one,
# $W_0 x$. Full fine-tuning changes every number of every $W_0$. **LoRA**, low-rank
# adaptation, freezes them all, and adds a correction beside each:
#
# $$h = W_0\,x + \frac{\alpha}{r}\,B\,A\,x$$
#
# | symbol | what it is | shape | trained? |
# |---|---|---|---|
# | $x$ | what comes in | $d_{in}$ | |
# | $W_0$ | the model's own matrix | $d_{out} \times d_{in}$ | no, frozen |
# | $A$ | squeezes $x$ into $r$ numbers | $r \times d_{in}$ | yes, starts random |
# | $B$ | spreads them out again | $d_{out} \times r$ | yes, starts at zero |
# | $r$ | the *rank*: how narrow the squeeze is | a number | you choose it |
# | $\alpha$ | how loud the correction speaks | a number | you choose it |
# | $h$ | what comes out | $d_{out}$ | |
#
# By hand, with six numbers in and four out, squeezed through two:

# %%
torch.manual_seed(0)
x, W0 = torch.randn(6), torch.randn(4, 6)
A, B = torch.randn(2, 6), torch.zeros(4, 2)
r, alpha = 2, 4.0
squeezed = A @ x
h = W0 @ x + alpha / r * (B @ squeezed)
print(len(x), "numbers in,", len(squeezed), "in the squeeze,", len(h), "out")
print("the same as without a correction:", torch.equal(h, W0 @ x))

# %% [markdown]
# Because $B$ starts at zero, the correction starts at zero: training begins with
# exactly the model that you know. Where does it stand in the model? Here is one of its
# layers, as a wiring diagram. You need not understand all of it now. Grey is the
# model's own; colour is what LoRA adds.

# %%
lesson.show(
    block_picture(lit="lora"),
    "An A and a B stand beside each of the seven matrices of a layer.",
)

# %% [markdown]
# Line 7 puts them there, in every layer. $A$ is drawn at random, so the cell fixes the
# seed of the dice first. Guess: how many numbers will train, in percent of the model's?

# %%
lesson.predict("0.2", low=None, high=None, unit="% of the model")

# %%
torch.manual_seed(0)
wrapped = lora.inject(model, r=8, alpha=16)  # line 7
trained = sum(parameter.numel() for parameter in trainable(model).values())
lesson.measured("0.2", 100 * trained / total)

# %% [markdown]
# Look at one of them, so that the count is no magic. Beside a matrix of
# $d_{out} \times d_{in}$ numbers stand $r \times d_{in}$ in $A$, and
# $d_{out} \times r$ in $B$:

# %%
# NBVAL_CHECK_OUTPUT
print(f"{len(wrapped)} matrices, {trained:,} numbers to train")
first = model.get_submodule(wrapped[0])
print("one of them:", wrapped[0])
print("W0", tuple(first.base.weight.shape), f"{first.base.weight.numel():,} numbers")
print("A ", tuple(first.A.shape), f"{first.A.numel():,} numbers")
print("B ", tuple(first.B.shape), f"{first.B.numel():,} numbers")

# %% [markdown]
# ### Exercise 0.2: count what trains
#
# Difficulty one of five, importance four of five, about five minutes. Given the shapes
# of all matrices that get a LoRA, how many numbers train, and how many are frozen
# beside them?
#
# <details><summary>Hint one: a question</summary>
#
# For one matrix: what do you multiply to count the numbers in $A$? In $B$? In $W_0$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# $A$ is $r \times d_{in}$ and $B$ is $d_{out} \times r$: together
# $r\,(d_{in} + d_{out})$ numbers. Two whole numbers come back, each a sum over all
# shapes.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `trained = sum(r * (d_in + d_out) for d_out, d_in in shapes)`
#
# </details>


# %% tags=["exercise-0.2"]
def my_count(shapes, r):
    """(trained, frozen): numbers in all A and B, and in all W0.

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
# Line 8 is the recipe. A *step* shows the model a *batch* of rows, and asks how
# surprised it was by the right answers: that is the *loss*, in nats a token, and lower
# is better. Then it moves every $A$ and $B$ a little, so as to be less surprised next
# time. `lr`, the *learning rate*, says how far.
#
# Line 9 does it. Give it a minute. (It is a short run. Those in the table at the top
# were longer; `make compare` makes them again.)

# %%
W0_then = first.base.weight.clone()
recipe = TrainConfig(steps=16, batch=4, lr=3e-3)  # line 8
history = train(model, tokenizer, task, recipe)  # line 9

# %%
# NBVAL_CHECK_OUTPUT
print("the matrix W0 from above is as it was:", torch.equal(first.base.weight, W0_then))

# %%
start_loss, end_loss = history.loss[0], sum(history.loss[-4:]) / 4
figure = figures.training_curve(history)
figure.axes[0].set_xticks(range(0, recipe.steps + 1, 4))
lesson.show(
    figure,
    f"The loss falls from {start_loss:.2f} to {end_loss:.2f} (mean of the last four "
    f"steps). One step took {history.median_step_seconds:.1f} seconds.",
)

# %% [markdown]
# The curve jumps about, because each step sees other rows. What counts is where it
# goes. But a falling loss only says that the model gets used to its *training* rows.
# Can it do the job?
#
# ## After: the same question again
#
# The same twenty rows, the same scorer. The model has seen none of these sentences.
# Read the answers as well, the wrong ones above all: mistakes teach more than averages.

# %%
lesson.predict("0.3", low=None, high=None, unit="of 20 right")

# %%
after = answer_rows(model, tokenizer, task, rows, template="chat")
lesson.measured("0.3", sum(after.correct))
for i, fine in list(enumerate(after.correct))[:4]:
    print("\nsentence:", rows[i]["prompt"])
    print("answer:  ", after.answers[i], "" if fine else "(wrong)")

# %% [markdown]
# ## The control: the same numbers, shuffled
#
# It got better. *Why?* Perhaps any numbers beside the matrices would have done it:
# shake a model that rambles, and it rambles less. A **control** is a run that differs
# in the one thing that you believe in, here the training. Shuffle the numbers within
# each trained $A$ and $B$. They are the same numbers, as many and as large. Only what
# training has put into their order is gone.

# %%
lesson.predict("0.4", low=None, high=None, unit="of 20 right")

# %%
learned = {name: p.detach().clone() for name, p in trainable(model).items()}
with torch.no_grad():
    for name, parameter in trainable(model).items():
        order = torch.randperm(parameter.numel())
        parameter.copy_(learned[name].flatten()[order].view_as(parameter))
control = answer_rows(model, tokenizer, task, rows, template="chat")
lesson.measured("0.4", sum(control.correct))
print("first answer:", " ".join(control.answers[0].split())[:80], "…")

with torch.no_grad():  # and back to what was learned
    for name, parameter in trainable(model).items():
        parameter.copy_(learned[name])

# %% [markdown]
# So it is the training. A result without a control is half a result: whenever somebody
# shows you a better score, ask what *else* would have raised it.
#
# ## How sure is that?
#
# Twenty rows are a small sample. With other rows the share would come out a little
# differently. The *true share* is the one that endlessly many rows would show, and an
# **interval** says which true shares fit with what was seen. The first idea is to take
# the share $p = k / n$, and go up and down by $z\,\sqrt{p\,(1 - p) / n}$. It breaks
# where you need it most:

# %%
z = 1.96
for k, n in ((14, 20), (0, 20)):
    p = k / n
    margin = z * math.sqrt(p * (1 - p) / n)
    print(f"{k:2} of {n} right: from {p - margin:.0%} to {p + margin:.0%}")

# %% [markdown]
# Nothing right in twenty would prove that it *never* gets one right. Wilson's interval
# does better. It acts as if a few more rows had been seen, half of them right:
#
# $$c = \frac{k + z^2/2}{n + z^2}
# \qquad
# m = \frac{z}{n + z^2}\,\sqrt{\frac{k\,(n - k)}{n} + \frac{z^2}{4}}$$
#
# | symbol | what it is |
# |---|---|
# | $k$ | how many are right |
# | $n$ | how many were asked |
# | $z$ | how careful to be; `1.96` misses the truth one time in twenty |
# | $c$ | the centre of the interval, a share |
# | $m$ | its margin: it goes from $c - m$ to $c + m$ |
#
# ### Exercise 0.3: Wilson's interval
#
# Difficulty two of five, importance four of five, about ten minutes. Write it down as
# it stands.
#
# <details><summary>Hint one: a question</summary>
#
# What is under the root, and what stands in front of it? Is $z^2$ divided by four, or
# is $z$?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Two shares between zero and one come back: $c - m$, then $c + m$. For no right answer
# in twenty, the low end is zero and the high end is not.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `centre = (k + z**2 / 2) / (n + z**2)`
#
# </details>


# %% tags=["exercise-0.3"]
def my_interval(k, n, z=1.96):
    """(low, high): the true shares that fit with k right of n, from zero to one."""
    ### BEGIN SOLUTION
    centre = (k + z**2 / 2) / (n + z**2)
    margin = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    return centre - margin, centre + margin
    ### END SOLUTION


# %% tags=["check-0.3", "points-2"]
checks.interval(my_interval)

# %% [markdown]
# Now the three results of this notebook, each with its interval:

# %%
found = {"before": (0, before), "control": (trained, control), "LoRA": (trained, after)}
points = {}
for name, (added, answers) in found.items():
    k, n = sum(answers.correct), len(answers.correct)
    points[name] = (added / 1e6, *(100 * share for share in (k / n, *wilson(k, n))))
    _, _, low, high = points[name]
    valid = sum(map(is_json, answers.answers))
    print(f"{name:8} {valid:2} of {n} are JSON, {k:2} are right:", end=" ")
    print(f"true share {low:2.0f} to {high:.0f} %")
figure = curves.points(
    points,
    x="Numbers added, millions",
    y="Right, % of test rows",
    title="Right answers against numbers added",
    subtitle="Twenty test rows; bars are 95 % intervals. The control in grey.",
    control=("control",),
    log="",
)
gap = points["LoRA"][2] - max(points["before"][3], points["control"][3])
lesson.show(figure, f"Between LoRA's interval and the others: {gap:.0f} points.")

# %%
# NBVAL_CHECK_OUTPUT
print("LoRA's interval touches neither of the others:", gap > 0)

# %% [markdown]
# That is enough to tell "it works" from "it does not". Look at the JSON, too: the
# *form* was learned from a handful of steps, and what is still wrong are values.
#
# But the interval is far too wide to rank two good methods. How many rows would it
# take, at the same share, for an interval of five points up and down?

# %%
lesson.predict("0.5", low=None, high=None, unit="test rows")

# %%
share = sum(after.correct) / len(after.correct)


def width(n):
    low, high = wilson(round(share * n), n)
    return high - low


lesson.measured("0.5", next(n for n in range(20, 10_000) if width(n) < 0.1))

# %% [markdown]
# Width shrinks with the root of the rows: half as wide costs four times as many.
#
# ## Break it on purpose
#
# `answer_rows` asked twenty sentences at once, as a batch; that is much faster than one
# by one. But a batch is a table, and its rows must be equally long. So short rows are
# filled up with *padding*, and a *mask* tells the model to ignore it: `1` for a real
# token, `0` for padding. Here is how one would write it first. It takes rows that the
# model has just answered right. Guess how many stay right.

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


lesson.predict("0.6", low=None, high=None, unit=f"of {len(good)} stay right")

# %%
broken = answers_with(pad_first_try)
lesson.measured("0.6", count_right(broken))
for prompt, answer in zip(prompts, broken, strict=True):
    print(f"{len(prompt)} tokens: {' '.join(answer.split())[:76]}")

# %% [markdown]
# No error, and the mask is right. Who sees only the score concludes that the training
# was no good. Compare the answers with the lengths, and find the mistake before you
# open this.
#
# <details><summary>What is wrong</summary>
#
# The model writes on from the *last* place of a row. In the longest row that is the end
# of the question. In all others it is padding: the first new token is guessed from
# there, and the answer does not recover. The mask keeps tokens from looking at padding.
# It does not keep you from asking the padding. Put it on the *left*, and each row ends
# with its own last token. (transformers warns of this now; we have hidden the warning.)
#
# </details>
#
# ### Exercise 0.4: padding that does no harm
#
# Difficulty one of five, importance four of five, about five minutes. Repair it. Make
# the mask by counting, not by comparing with `pad`: in many models, SmolLM2 among them,
# the token for padding is a real one as well, and stands inside of prompts.
#
# <details><summary>Hint one: a question</summary>
#
# How many places of a row are left over, if the longest prompt fills a whole row?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# Both tensors are `(rows, longest)`. Each row of `ids` is padding and then the prompt;
# each row of `mask` is as many zeros, and then ones.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `longest = max(len(prompt) for prompt in prompts)`
#
# </details>


# %% tags=["exercise-0.4"]
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


# %% tags=["check-0.4", "points-2"]
checks.padding(my_padding)

# %% [markdown]
# The library pads on the left, too:

# %%
repaired = answers_with(lambda prompts, pad: left_pad(prompts, 0, pad))
print(f"{count_right(repaired)} of {len(good)} right")

# %% [markdown]
# ## Keep it: a small file
#
# Line 10 saves what was trained, and only that. The file is in the layout of Hugging
# Face's PEFT, so that other programs can read it. Guess its size.

# %%
lesson.predict("0.7", low=None, high=None, unit="MB")

# %%
save(model, "out/orders-lora")  # line 10
adapter = Path("out/orders-lora")
lesson.measured("0.7", (adapter / "adapter_model.safetensors").stat().st_size / 1e6)
print(f"the model's own numbers: {4 * total / 1e6:.0f} MB, at four bytes each")

# %% [markdown]
# That is why adapters are so handy: one model on the disk, and a small file for each
# thing that it has learned. And those were the ten lines. Here they are, in one piece.
# (In a program of your own, write the model's name in line 5.)

# %%
import re

from IPython import get_ipython

said = "\n".join(get_ipython().user_ns["In"])  # all that was run so far
ten = re.findall(r".*# line \d.*", said)
print(*dict.fromkeys(ten), sep="\n")

# %% [markdown]
# ## Fold it in: no cost when used
#
# $W_0 x + \frac{\alpha}{r} B A x$ is the same as $(W_0 + \frac{\alpha}{r} B A)\,x$. So
# the correction can be added to $W_0$ once and for all. The model then has its old
# shape and its old speed. The check: its *logits*, the scores that it gives to every
# possible next token, must not move, apart from rounding.

# %%
# NBVAL_CHECK_OUTPUT
ids = tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    beside = model(ids).logits
    merge(model)
    folded = model(ids).logits
moved = (folded - beside).abs().max().item()
assert moved < 1e-3
print("every logit moved by less than 0.001:", moved < 1e-3)
print(f"{model.num_parameters():,} parameters, as at the start")

# %% [markdown]
# ## The map
#
# LoRA is one method of many. Here is the layer again, with each method of this course
# at its place. They differ in *where* they add or change numbers, and in how many.

# %%
lesson.show(
    block_picture(),
    "Ten methods: beside the matrices, on vectors, after a part of the layer, in "
    "attention, or before the first token.",
)

# %% [markdown]
# You have used LoRA; notebook 04 builds it from nothing. Notebook 01 has full
# fine-tuning, and says where the memory goes.
#
# ## Quiz
#
# Answer for yourself, then open the options. None needs the kernel.
#
# **1. The training loss has fallen to nearly zero. What does that show?**
#
# <details><summary>The model can do the job</summary>
#
# No. It knows its training rows. Whether it can do the job, only other rows can say.
#
# </details>
# <details><summary>Its training rows surprise it no longer</summary>
#
# Right. That is all that a training loss says.
#
# </details>
# <details><summary>It has forgotten everything else</summary>
#
# No. It may have or not; this loss does not look at anything else.
#
# </details>
#
# **2. You have put in LoRA, and trained nothing yet. What does the model answer?**
#
# <details><summary>Exactly what it answered before</summary>
#
# Right. $B$ is zero, so the correction is zero, whatever $A$ may be.
#
# </details>
# <details><summary>Nonsense, since $A$ is random</summary>
#
# No. What $A$ makes of $x$ is random, but $B$ multiplies it by zero.
#
# </details>
# <details><summary>Nothing: the model is frozen</summary>
#
# No. Frozen means that its numbers do not change. It answers all the same.
#
# </details>
#
# **3. None of twenty test rows is right. What may you say of the true share?**
#
# <details><summary>It is zero</summary>
#
# No. A model that gets one in ten right has none of twenty every now and then.
#
# </details>
# <details><summary>It is hardly above one in five</summary>
#
# Right. Wilson's interval for it ends below that.
#
# </details>
# <details><summary>Nothing, the sample is too small</summary>
#
# No. It is small, but it does rule out a half.
#
# </details>
#
# **4. What does the shuffled control rule out?**
#
# <details><summary>That the twenty rows were lucky ones</summary>
#
# No. How far luck goes, the interval says.
#
# </details>
# <details><summary>That the sentences were learned by heart</summary>
#
# No. That is ruled out by test rows that are not in `train`.
#
# </details>
# <details><summary>That any numbers of that size would have done it</summary>
#
# Right. One doubt, one tool: three doubts need three.
#
# </details>
#
# **5. Asked one by one, your model does well. Asked twenty at once, it does badly.
# Where do you look first?**
#
# <details><summary>At the learning rate</summary>
#
# No. It is the same trained model both times.
#
# </details>
# <details><summary>At padding and mask</summary>
#
# Right. A batch should answer as its rows do alone. If it does not, look there.
#
# </details>
# <details><summary>At the scorer</summary>
#
# No. It saw only the answers, and is the same both times.
#
# </details>
#
# ### In your own words
#
# A friend says: "You have fine-tuned it, so now it is another model." Answer in three
# sentences, with what you counted.
#
# <details><summary>A model answer</summary>
#
# "Not one number of the model has changed while I trained: I put an A and a B beside
# 210 of its matrices, which is a fiftieth of its numbers, and trained those. They are
# in a small file; without it the model is what it was. Only when I fold them in do I
# get another model, and I can keep the first."
#
# </details>
#
# ### Transfer
#
# Think of a job of your own, and write three rows of it: `{"prompt": "…",
# "completion": "…"}`, one a line, in a file that ends in `.jsonl`. Line 6 reads it:
# `load_task("my_rows.jsonl")`. What counts as right there? How many test rows will you
# need? What is your control?
#
# <details><summary>A model answer</summary>
#
# It depends on the job. For a file of yours, the library's scorer wants the very text
# of the completion, which suits labels and short forms, and no free prose. Twenty test
# rows tell a working model from a failing one; to rank two good ones takes hundreds. As
# a control, shuffle the numbers as above; or, stronger, shuffle the completions among
# the rows and train again: who still does well then has not learned your job.
#
# </details>
#
# ## Limits
#
# - **What the control rules out.** That a change of that size was enough, whatever it
#   was. It does not say that LoRA is the best way to train.
# - **What you have not shown.** That LoRA is as good as full fine-tuning, or that the
#   model forgot nothing else. One seed, one job and twenty rows cannot tell. Even in
#   the table at the top, with more rows, some intervals overlap.
# - **The scale.** SmolLM2 is small. A large model knows more forms, and would not start
#   from nothing.
# - **The paper beside us** (its number, not ours). On GPT-3, LoRA's authors trained
#   `10,000` times fewer numbers than full fine-tuning would. You trained a fiftieth:
#   wider matrices, and a LoRA beside fewer of them, make the share small.
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
# - **Change one thing and run again**: `r`, `steps` or `lr`. Guess first.
# - **The comparison.** `make compare` trains every method on one job, with intervals,
#   and writes a page.
# - **The code**, written to be read: [the
#   contract](../peft_from_scratch/core/adapter.py),
#   [LoRA](../peft_from_scratch/methods/lora.py), [the training
#   loop](../peft_from_scratch/training/loop.py).
# - Hu and others, [LoRA: Low-Rank Adaptation of Large Language
#   Models](https://arxiv.org/abs/2106.09685).
# - Brown, Cai and DasGupta, [Interval estimation for a binomial
#   proportion](https://doi.org/10.1214/ss/1009213286): why not the plain interval.
# - Hugging Face's guide to writing with a model, [wrong padding
#   included](https://huggingface.co/docs/transformers/llm_tutorial#wrong-padding-side).
