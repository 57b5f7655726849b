"""The small world that tiny was pretrained on: who did what with which thing, where.

    "On Friday Ada found three lamps in Oslo."
    who Ada, did find, what lamp, many 3, where Oslo, when Friday

An `Event` is the meaning; `sentence` puts it into words, `record` writes it down.
People, cities and things are those of the task orders (the ones that all of its splits
share). Everything is drawn from a `random.Random` that the caller brings.
"""

from dataclasses import dataclass, replace
from random import Random

from .orders import AMOUNTS, CITIES, CUSTOMERS, DAYS, ITEMS, NUMBERS, plural

PEOPLE = CUSTOMERS["shared"].split()
PLACES = CITIES["shared"].split()
THINGS = ITEMS["shared"].split()
DEEDS = {  # verb: how a sentence says it, as past tense and as participle
    "buy": "bought",
    "sell": "sold",
    "lose": "lost",
    "find": "found",
    "paint": "painted",
    "mend": "mended",
    "lend": "lent",
    "keep": "kept",
}
KINDS = {  # what kind of thing each thing is
    "tool": "rope ladder hammer shovel brush spoon whistle",
    "home": "lamp blanket mirror chair pillow carpet clock bench",
    "vessel": "kettle bucket basket bottle box glass drum",
    "travel": "candle ticket helmet tent jacket lantern torch watch",
}
KIND_OF = {thing: kind for kind, words in KINDS.items() for thing in words.split()}
# Pretraining tells the kind of these alone: every other thing of each kind.
TOLD = {thing for words in KINDS.values() for thing in words.split()[::2]}

PATTERNS = (
    "{who} {did} {things} in {place} on {day}.",
    "On {day} {who} {did} {things} in {place}.",
    "In {place}, {who} {did} {things} on {day}.",
    "{things} {were} {did} by {who} in {place} on {day}.",
    "It was {who} who {did} {things} in {place} on {day}.",
    "{who}, who was in {place} on {day}, {did} {things}.",
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    who: str
    deed: str
    thing: str
    many: int
    place: str
    day: str

    def fields(self) -> dict[str, str]:
        """What a record says of it, by name."""
        return {
            "who": self.who,
            "did": self.deed,
            "what": self.thing,
            "many": str(self.many),
            "where": self.place,
            "when": self.day,
        }


def event(random: Random) -> Event:
    """Any of some four million events."""
    return Event(
        who=random.choice(PEOPLE),
        deed=random.choice(list(DEEDS)),
        thing=random.choice(THINGS),
        many=random.choice(AMOUNTS),
        place=random.choice(PLACES),
        day=random.choice(DAYS),
    )


def sentence(random: Random, event: Event) -> str:
    """The event in words; one of several ways to say it."""
    text = random.choice(PATTERNS).format(
        who=event.who,
        did=DEEDS[event.deed],
        things=amount(event),
        were="was" if event.many == 1 else "were",
        place=event.place,
        day=event.day,
    )
    return text[0].upper() + text[1:]


def amount(event: Event) -> str:
    """ "a lamp", "three lamps"."""
    if event.many == 1:
        return f"a {event.thing}"
    return f"{NUMBERS[event.many]} {plural(event.thing)}"


def record(event: Event) -> str:
    """The event as pretraining writes it down."""
    return ", ".join(f"{name} {value}" for name, value in event.fields().items())


def kind_pair(random: Random, thing: str) -> tuple[str, str]:
    """(a sentence with this thing and a question, the kind that it is)"""
    changed = replace(event(random), thing=thing)
    return f"{sentence(random, changed)} Which kind of thing?", KIND_OF[thing]


def invented(random: Random, syllables: int = 2) -> str:
    """A word that means nothing: "velo", "kiram"."""
    letters = [
        random.choice(CONSONANTS) + random.choice(VOWELS) for _ in range(syllables)
    ]
    return "".join(letters) + random.choice(["", "", random.choice(CONSONANTS)])
