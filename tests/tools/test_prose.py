"""The measure of our prose: what counts as a sentence, and which have a verb."""

import pytest

from tools import prose

TEXT = """\
---
kernelspec: python
---
# A heading is no sentence. Nor is this.

The loss falls. It falls for $x^2$ and `code. Here`, as [a link](https://a.b/c.d) says.

| a table | is none. |
|---|---|

- One thin matrix beside another.
- **Bold** words stay.

```python
print("No prose. At all.")
```

No.

$$ a = b. C $$
"""


def test_sentences_are_those_of_the_prose():
    assert prose.sentences(TEXT) == [
        "The loss falls.",
        "It falls for X and X, as a link says.",
        "One thin matrix beside another.",
        "Bold words stay.",
    ]


def test_length_and_verbs_are_counted():
    measured = prose.measure(prose.sentences(TEXT))
    assert measured.sentences == 4 and measured.median == 4
    assert measured.verbless == 0.25 and measured.short == 0.75
    assert "4 sentences, median  4.0 words" in str(measured)


@pytest.mark.parametrize(
    ("verb", "forms"),
    [
        ("copy", "copies copied copying"),
        ("plot", "plots plotted plotting"),
        ("merge", "merges merged merging"),
        ("match", "matches matched matching"),
    ],
)
def test_verbs_are_known_in_their_forms(verb, forms):
    assert {verb, *forms.split()} <= prose.VERBS


def test_of_a_notebook_the_markdown_counts():
    text = "# %% [markdown]\n# It falls.\n#\n# So.\n\n# %%\nx = 1  # It rises.\n"
    assert prose.sentences(prose.of_notebook(text)) == ["It falls.", "So."]
