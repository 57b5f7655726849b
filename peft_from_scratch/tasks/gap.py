"""Gaps: one task with a dial, from what tiny has read a thousand times to a cipher.

The input is a sentence of tiny's world (world.py), the output says what happened:

    "On Friday Ada found three lamps in Oslo."

    gap-0  who Ada, did find, what lamp, …      the format of its pretraining
    gap-1  Oslo - Friday | lamp & 3 | Ada - …   a new format, of words that it knows
    gap-2  Oslo - funek | bafo & 3 | Ada - …    the same, with new words
    gap-3  sudaf Ada ti bafobu guna Oslo ru …   a new language: words, endings, order
    gap-4  ibsi - rleguw | sumv & 4 | ugu - …   gap-1 in a cipher, letter by letter

Each step of the dial takes away something that a model of that world could have used.
Up to gap-3 all tokens are such as pretraining used: a head that never learned to tell a
token from others is frozen in LoRA, which is a gap of another kind, and a larger one.
(A first gap-1 with new marks showed it: no LoRA learned them. Of gap-4's tokens, one in
eight is new.)
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
Row = dict[str, str]


def rows(write: Callable[[Event], str], seed: int = 0) -> dict[str, list[Row]]:
    """The three splits, with `write` for the outputs: the same events for every one."""
    random = Random(f"gap {seed}")
    events = [event(random)]
    seen = set(events)
    while len(events) < sum(SIZES.values()):
        new = event(random)
        if new not in seen:
            seen.add(new)
            events.append(new)
    made = [{"prompt": sentence(random, e), "completion": write(e)} for e in events]
    rest = iter(made)
    return {split: [next(rest) for _ in range(size)] for split, size in SIZES.items()}


def score(answer: str, completion: str) -> bool:
    """True where both are the same text."""
    return answer.strip() == completion.strip()


# ---------------------------------------------------------------------- how it is said


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
    """new_format in small letters, each of them and each digit for another one."""
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
    """Vowels for vowels, and so on: what comes out can be cut into known tokens."""
    random, table = Random("cipher"), {}
    rare = "".join(sorted({*string.ascii_lowercase} - {*CONSONANTS, *VOWELS}))
    for letters in (VOWELS, CONSONANTS, rare, string.digits):
        table |= str.maketrans(letters, "".join(random.sample(letters, len(letters))))
    return table
