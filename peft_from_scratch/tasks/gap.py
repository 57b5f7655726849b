"""Gaps: one task with a dial, from what tiny has read a thousand times to a cipher.

The input is a sentence of tiny's world (world.py), the output a record of the event:

    "On Friday Ada found three lamps in Oslo."

    gap-0  who Ada, did find, what lamp, …      the format of its pretraining
    gap-1  Oslo - Friday | lamp & 3 | Ada - …   a new format, of words that it knows
    gap-2  Oslo - funek | bafo & 3 | Ada - …    the same, with new words
    gap-3  sudaf Ada ti bafobu guna Oslo ru …   a new language: words, endings, order
    gap-4  ibsi - rleguw | sumv & 4 | ugu - …   gap-1 in a cipher, letter by letter

Each level takes away something that a model of that world could have used. Up to gap-3
every token occurs in pretraining. LoRA leaves the output head frozen, so that a token
which the head has never learned is a gap of another kind, and a larger one. (A first
gap-1 had new marks, and no LoRA learned them. Of gap-4's tokens, one in eight is new.)
The new words and the cipher are fixed, like a dictionary; the seed draws the events.
The splits share all words and have no event in common.
"""

import string
from collections.abc import Callable
from functools import lru_cache
from random import Random

from .orders import AMOUNTS, DAYS
from .world import (
    CONSONANTS,
    DEEDS,
    THINGS,
    VOWELS,
    Event,
    event,
    invented,
    record,
    sentence,
)

INSTRUCTION = ""  # tiny follows none: the examples say what is asked
SIZES = {"train": 10_000, "validation": 200, "test": 300}
Example = dict[str, str]


def rows(write: Callable[[Event], str], seed: int = 0) -> dict[str, list[Example]]:
    """The three splits; the same events for every `write`, which makes the outputs."""
    random = Random(f"gap {seed}")
    events = [event(random)]
    seen = set(events)
    while len(events) < sum(SIZES.values()):
        new = event(random)
        if new not in seen:
            seen.add(new)
            events.append(new)
    examples = [{"prompt": sentence(random, e), "completion": write(e)} for e in events]
    rest = iter(examples)
    return {split: [next(rest) for _ in range(size)] for split, size in SIZES.items()}


def score(answer: str, completion: str) -> bool:
    """True where both are the same text."""
    return answer.strip() == completion.strip()


# -------------------------------------------------------------- outputs of each level


def new_format(event: Event) -> str:
    return (
        f"{event.place} - {event.day} | {event.thing} & {event.many} | "
        f"{event.who} - {event.deed}"
    )


def new_words(event: Event) -> str:
    say = dictionary()
    return (
        f"{event.place} - {say[event.day]} | {say[event.thing]} & {event.many} | "
        f"{event.who} - {say[event.deed]}"
    )


def new_language(event: Event) -> str:
    """Verb, who and its particle, thing with its ending, number, place, day."""
    say = dictionary()
    subject, plural, place = (say[ending] for ending in ENDINGS)
    thing = say[event.thing] + (plural if event.many > 1 else "")
    return (
        f"{say[event.deed]} {event.who} {subject} {thing} {say[str(event.many)]} "
        f"{event.place} {place} {say[event.day]}"
    )


def cipher(event: Event) -> str:
    """new_format in small letters, with each letter and digit replaced by another."""
    return new_format(event).lower().translate(_alphabet())


LEVELS: dict[str, Callable[[Event], str]] = {
    "gap-0": record,
    "gap-1": new_format,
    "gap-2": new_words,
    "gap-3": new_language,
    "gap-4": cipher,
}
ENDINGS = ("-subject", "-plural", "-place")


@lru_cache
def dictionary() -> dict[str, str]:
    """The new word for every deed, thing, day and number, and the three endings."""
    random, words, taken = Random("dictionary"), {}, set()
    for word in [*DEEDS, *THINGS, *DAYS, *map(str, AMOUNTS)]:
        new = invented(random)
        while new in taken:
            new = invented(random)
        taken.add(new)
        words[word] = new
    return words | dict(zip(ENDINGS, ("ti", "bu", "ru"), strict=True))


@lru_cache
def _alphabet() -> dict[int, int]:
    """A permutation within vowels, consonants and digits: tokens stay known ones."""
    random, table = Random("cipher"), {}
    rare = "".join(sorted({*string.ascii_lowercase} - {*CONSONANTS, *VOWELS}))
    for letters in (VOWELS, CONSONANTS, rare, string.digits):
        table |= str.maketrans(letters, "".join(random.sample(letters, len(letters))))
    return table
