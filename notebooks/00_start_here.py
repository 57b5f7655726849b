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
# You will teach a small but real language model to turn an order, written as a plain
# sentence, into one exact line of JSON; and you will do it by training a tiny share of
# its numbers.
#
# **You need** some Python. No graphics card, no account, no mathematics beyond "a
# matrix times a vector". `make lab` has installed everything and fetched the model.
#
# **At the end you can**
#
# - fine-tune a language model with LoRA, and say what the ten lines do;
# - measure whether that helped, and say how sure the measurement is;
# - count what was trained, save it, and see how small the file is;
# - fold the training into the model, and check that nothing else changed.

# %% [markdown]
# ## The model and the job
#
# Ten lines do the whole work. They are counted in comments; every other cell only looks
# at what they did. The first four fetch the tools.

# %%
from peft_from_scratch import load_model, lora, save  # line 1
from peft_from_scratch.recipe import Recipe  # line 2
from peft_from_scratch.tasks import load_task  # line 3
from peft_from_scratch.train import train  # line 4

# %% [markdown]
# Line 5 loads **SmolLM2-135M-Instruct**: a language model that was trained to follow
# instructions, and is small enough for any laptop. A model is a long list of numbers,
# called *parameters*. The *tokenizer* cuts text into the pieces that the model reads.

# %%
model, tokenizer = load_model("smollm2")  # line 5

# %%
# NBVAL_CHECK_OUTPUT
total = model.num_parameters()
print(f"{total:,} parameters")

# %% [markdown]
# (A cell that begins with `NBVAL_CHECK_OUTPUT` prints the same on every machine, and
# `make test` holds it to that. Times and scores may differ a little on yours.)
#
# Line 6 loads the **task**: many sentences, each with the one line of JSON that is
# right for it. They come in parts. The model learns from `train`; it never learns from
# `test`, which even has names and things that `train` does not mention.

# %%
task = load_task("orders")  # line 6

# %%
# NBVAL_CHECK_OUTPUT
print("instruction:", task.instruction)
print("sentence:   ", task.test[0]["prompt"])
print("right:      ", task.test[0]["completion"])

# %% [markdown]
# ## Before: it knows JSON, but not your JSON
#
# Ask the model as it is. It gets the instruction and the sentence, as in a chat. An
# answer counts when it is the right JSON value and nothing else: one wrong word, one
# missing key or a friendly "Here you are:" makes it wrong.
#
# **Guess first:** how many of the test sentences will it get right?

# %%
from peft_from_scratch.evaluate import answer_rows, wilson

rows = task.test.select(range(20))
before = answer_rows(model, tokenizer, task, rows, template="chat")
print(f"right: {sum(before.correct)} of {len(rows)}")

# %% [markdown]
# What does it say instead? The first two answers:

# %%
for row, answer in zip(rows.select(range(2)), before.answers, strict=False):
    print("sentence:", row["prompt"])
    print("right:   ", row["completion"])
    print("answer:  ", answer, "\n")

# %% [markdown]
# The model has an idea of the *facts*. What it cannot know is the *form* that you want:
# which keys, in which spelling, and what to do with "a dozen". A form can be learned
# from examples.

# %% [markdown]
# ## LoRA: leave the model alone, train a small thing beside it
#
# Most of a language model is matrices. Each takes a vector $x$ and returns another one,
# $W_0 x$. Full fine-tuning changes every number of every $W_0$. **LoRA** freezes them
# and adds a correction beside each:
#
# $$h = W_0\,x + \frac{\alpha}{r}\,B\,A\,x$$
#
# | symbol | what it is | shape | trained? |
# |---|---|---|---|
# | $x$ | what comes in | $d_{in}$ | |
# | $W_0$ | the model's own matrix | $d_{out} \times d_{in}$ | no, frozen |
# | $A$ | squeezes $x$ into $r$ numbers | $r \times d_{in}$ | yes, starts random |
# | $B$ | spreads them out again | $d_{out} \times r$ | yes, starts at zero |
# | $r$ | the *rank*: how narrow the squeeze is | one number | you choose it |
# | $\alpha$ | how loud the correction speaks | one number | you choose it |
# | $h$ | what comes out | $d_{out}$ | |
#
# Because $B$ starts at zero, the correction starts at zero too: training begins with
# exactly the model that you know.
#
# Line 7 puts an $A$ and a $B$ beside every matrix of every layer. $A$ is drawn at
# random, so the cell fixes the dice first: your numbers will be close to these.

# %%
import torch

torch.manual_seed(0)
wrapped = lora.inject(model, r=8, alpha=16)  # line 7

# %%
# NBVAL_CHECK_OUTPUT
from peft_from_scratch import trainable

trained = sum(parameter.numel() for parameter in trainable(model).values())
print(f"{len(wrapped)} matrices have an A and a B beside them now")
print(f"{trained:,} numbers will be trained: {trained / total:.2%} of the model")

# %% [markdown]
# One of them by hand, so that the count is no magic: $r\,(d_{in} + d_{out})$ numbers
# stand beside a matrix that has $d_{in} \cdot d_{out}$.

# %%
# NBVAL_CHECK_OUTPUT
first = model.get_submodule(wrapped[0])
print(wrapped[0])
print("W0", tuple(first.base.weight.shape), f"{first.base.weight.numel():,} numbers")
print("A ", tuple(first.A.shape), f"{first.A.numel():,} numbers")
print("B ", tuple(first.B.shape), f"{first.B.numel():,} numbers")

# %% [markdown]
# ## Train
#
# Line 8 is the recipe. A *step* shows the model a *batch* of rows, asks how surprised
# it was by the right answers (the *loss*; lower is better), and moves every $A$ and $B$
# a little to be less surprised next time. `lr`, the *learning rate*, says how far.
#
# Line 9 does it. Give it a minute.


# %%
def tell(history):
    if history.steps % 5 == 0:
        print(f"step {history.steps:2}: loss {history.loss[-1]:.3f}")


recipe = Recipe(steps=20, batch=8, lr=1e-3)  # line 8
history = train(model, tokenizer, task, recipe, progress=False, on_step=tell)  # line 9

# %% [markdown]
# The loss at every step. It jumps about, because every step sees other rows; what
# counts is where it goes.

# %%
from io import BytesIO

from IPython.display import Image, display

from peft_from_scratch.figures import training_curve

picture = BytesIO()
training_curve(history, width=6).savefig(picture, dpi=100)
alt = f"The loss falls from {history.loss[0]:.2f} to {history.loss[-1]:.2f}."
display(Image(picture.getvalue(), alt=f"Training loss at each step. {alt}"))
print(alt, f"One step took {history.median_step_seconds:.1f} seconds.")

# %% [markdown]
# ## After: the same question again
#
# The same rows of `test`, the same scorer. The model has seen none of these sentences.

# %%
after = answer_rows(model, tokenizer, task, rows, template="chat")
print(f"right: {sum(after.correct)} of {len(rows)}")

# %%
print("right:  ", rows[0]["completion"])
print("before: ", before.answers[0])
print("after:  ", after.answers[0])

# %% [markdown]
# ### How sure is that?
#
# So few rows are a small sample. With other rows the share would come out a little
# differently. **Wilson's interval** says which true shares fit with what was seen; in
# the long run, intervals made this way miss the truth one time in twenty.


# %%
def share(answers):
    k, n = sum(answers.correct), len(answers.correct)
    low, high = wilson(k, n)
    return f"{k / n:4.0%}, true share between {low:.0%} and {high:.0%}", low, high


said, _, most_before = share(before)
print("before:", said)
said, least, most = share(after)
print("after: ", said)
print(f"The second interval is {100 * (most - least):.0f} points wide.")

# %% [markdown]
# An interval so wide is enough to tell "it helps" from "it does not", when the two do
# not touch. It is far too wide to rank two good methods. For that you need more rows,
# and a comparison row by row; `make compare` does both.

# %%
# NBVAL_CHECK_OUTPUT
assert sum(after.correct) > sum(before.correct)
print("The intervals do not touch:", least > most_before)

# %% [markdown]
# And the rows that are still wrong? Looking at mistakes teaches more than any average.

# %%
mistakes = [i for i, fine in enumerate(after.correct) if not fine]
for i in mistakes[:3]:
    print("sentence:", rows[i]["prompt"])
    print("right:   ", rows[i]["completion"])
    print("answer:  ", after.answers[i], "\n")
print(len(mistakes), "mistakes in all")

# %% [markdown]
# ## Keep it: a small file
#
# Line 10 saves what was trained, and only that. The file is in the layout of Hugging
# Face's PEFT, so that other programs can read it.

# %%
from pathlib import Path

adapter = Path("out/orders-lora")
save(model, adapter)  # line 10

# %%
model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
for file in sorted(adapter.iterdir()):
    print(f"{file.name:27}{file.stat().st_size:12,} bytes")
print(f"{'the whole model in memory':27}{model_bytes:12,} bytes")

# %% [markdown]
# That is why adapters are so handy: one model on the disk, and a small file for each
# thing that it has learned.
#
# ## Fold it in: no cost when used
#
# $W_0 x + \frac{\alpha}{r} B A x$ is the same as $(W_0 + \frac{\alpha}{r} B A)\,x$. So
# the correction can be added to $W_0$ once and for all. The model then has its old
# shape and its old speed. The check: its *logits*, the scores that it gives to every
# possible next piece of text, must not move, apart from rounding.

# %%
# NBVAL_CHECK_OUTPUT
from peft_from_scratch import merge

ids = tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    beside = model(ids).logits
    merge(model)
    folded = model(ids).logits
moved = (folded - beside).abs().max().item()
assert moved < 1e-3
print("every logit moved by less than 0.001:", moved < 1e-3)
print(f"{model.num_parameters():,} parameters, as at the start")

# %%
print(f"the largest move of a logit: {moved:.1g}")
print(f"the largest logit itself:    {folded.abs().max():.3g}")

# %% [markdown]
# ## What you have shown, and what not
#
# You took a model that failed at a job, trained a sliver of new numbers beside it, and
# measured on unseen rows that it does the job better. The model's own weights were
# never touched until you chose to fold the change in.
#
# You have *not* shown that LoRA is as good as full fine-tuning, or better than a few
# examples in the prompt, or that the model forgot nothing else. One seed, one task and
# few rows cannot tell. Those are the questions of this course.
#
# ## Where to go next
#
# - **Change one thing and run again.** Make `r` smaller; train twice as long; choose
#   another `lr`. Guess first.
# - **Your own job.** Write rows `{"prompt": "…", "completion": "…"}` into a file, one a
#   line, and load it in line 6: `load_task("my_rows.jsonl")`.
# - **The comparison.** `make compare` trains every method on one task, with intervals,
#   and writes a page.
# - **Read the code.** [The contract](../peft_from_scratch/adapter.py), then
#   [LoRA](../peft_from_scratch/methods/lora.py), then
#   [the training loop](../peft_from_scratch/train.py). They are written to be read.
# - **The paper.** Hu and others, [LoRA: Low-Rank Adaptation of Large Language
#   Models](https://arxiv.org/abs/2106.09685).
