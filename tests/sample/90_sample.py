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
# # A sample lesson
#
# You will have shown that twice three is six. Every part of a lesson is here, as small
# as can be: the tests build it, break it and blank it.
#
# **You need** nothing.
#
# **At the end you can**
#
# - double a number;
# - guess before you measure;
# - read a verdict;
# - open a hint.
#
# **Only ten minutes?** Do exercise 90.1.

# %%
from peft_from_scratch.course import start

lesson = start("90", model="tiny")

# %%
import sample_lesson as checks
import torch

from peft_from_scratch.course import curves

checks.stand_in()

# %% [markdown]
# ## Idea
#
# Doubling adds a number to itself, $2 x = x + x$; see [the text of this
# lesson](90_sample.py) and [the contract](../../peft_from_scratch/core/adapter.py).
#
# | symbol | shape |
# |---|---|
# | $x$ | any |

# %%
lesson.predict("90.1", low=None, high=None, unit="in all")

# %%
x = torch.tensor([1.0, 2.0, 3.0])
print(2 * x)
figure = curves.lines(
    {"twice": [(i, 2 * i) for i in range(1, 4)]},
    x="x, count",
    y="Twice x, count",
    title="Doubling",
    subtitle="By hand",
)
lesson.show(figure, "Twice one is 2, twice three is 6.")

# %% [markdown]
# Twice three is 6, as printed above.
#
# ### Exercise 90.1: twice
#
# Difficulty one of five, importance one of five, about one minute. Return $x + x$; the
# result has the shape of `x`.
#
# <details><summary>Hint one: a question</summary>
#
# What is added to what?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# That of `x`.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `return x + …`
#
# </details>


# %% tags=["exercise-90.1"]
def my_twice(x):
    """x + x, in the shape of x."""
    ### BEGIN SOLUTION
    return x + x
    ### END SOLUTION


# %% tags=["check-90.1", "points-1"]
checks.twice(my_twice)
### BEGIN HIDDEN TESTS
assert my_twice(2) == 4
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 90.2: powers
#
# Difficulty two of five, importance one of five, about two minutes. A class, whose
# instances compute $x^k$.
#
# <details><summary>Hint one: a question</summary>
#
# Which operator is it?
#
# </details>
# <details><summary>Hint two: a shape</summary>
#
# That of `x`, again.
#
# </details>
# <details><summary>Hint three: the first line</summary>
#
# `return x ** …`
#
# </details>


# %% tags=["exercise-90.2"]
class MyPower:
    """MyPower(k)(x) is x to the power of k."""

    def __init__(self, k):
        ### BEGIN SOLUTION
        self.k = k
        ### END SOLUTION

    def __call__(self, x):
        ### BEGIN SOLUTION
        return x**self.k
        ### END SOLUTION


# %% tags=["check-90.2", "points-2"]
checks.power(MyPower)

# %% [markdown]
# ## On trial: claim S1

# %%
lesson.measured("90.1", 6)
lesson.live("S1", 6, 6, 6)

# %% tags=["nbval-check-output"]
lesson.verdict("S1", guess="90.1")

# %% [markdown]
# ## Quiz
#
# **1. Twice one?**
#
# <details><summary>One</summary>
#
# No. That is once one.
#
# </details>
# <details><summary>Two</summary>
#
# Right. One and one more.
#
# </details>
# <details><summary>Three</summary>
#
# No. That is three times one.
#
# </details>
#
# **2. Twice two?**
#
# <details><summary>Four</summary>
#
# Right. Two and two more.
#
# </details>
# <details><summary>Five</summary>
#
# No. That is one too many.
#
# </details>
# <details><summary>Two</summary>
#
# No. That is once two.
#
# </details>
#
# **3. Twice nothing?**
#
# <details><summary>Nothing</summary>
#
# Right. Nothing and nothing more.
#
# </details>
# <details><summary>One</summary>
#
# No. Where would it come from?
#
# </details>
# <details><summary>Two</summary>
#
# No. That is twice one.
#
# </details>
#
# **4. What is a guess good for?**
#
# <details><summary>It shows what you believed before</summary>
#
# Right. After the measurement nobody knows any more.
#
# </details>
# <details><summary>It saves measuring</summary>
#
# No. It is compared with the measurement.
#
# </details>
# <details><summary>It counts for the grade</summary>
#
# No. Wrong guesses teach the most.
#
# </details>
#
# **5. And a control?**
#
# <details><summary>It rules out another cause</summary>
#
# Right. That is all it is for.
#
# </details>
# <details><summary>It makes the result larger</summary>
#
# No. It often makes it smaller.
#
# </details>
# <details><summary>It is a matter of style</summary>
#
# No. Without one, other causes remain.
#
# </details>
#
# ## Receipt

# %%
lesson.receipt()
