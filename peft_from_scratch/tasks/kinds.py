"""Kinds: a sentence in, a kind of thing out. A classification that tiny half knows.

    "On Friday Ada found three lamps in Oslo. Which kind of thing?"      home

Four kinds, thirty things. Pretraining taught the kind of every other thing, in just
these words (world.TOLD); the kinds of the rest have to be learned from the rows. So one
task shows what a method adds and what it keeps.
"""

from random import Random

from .world import THINGS, kind_pair

INSTRUCTION = ""
SIZES = {"train": 2000, "validation": 200, "test": 300}


def rows(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The three splits; all things in each, no sentence in two."""
    random, seen, examples = Random(f"kinds {seed}"), set(), []
    while len(examples) < sum(SIZES.values()):
        prompt, completion = kind_pair(random, random.choice(THINGS))
        if prompt not in seen:
            seen.add(prompt)
            examples.append({"prompt": prompt, "completion": completion})
    rest = iter(examples)
    return {split: [next(rest) for _ in range(size)] for split, size in SIZES.items()}


def score(answer: str, completion: str) -> bool:
    """True where both are the same kind."""
    return answer.strip() == completion.strip()
