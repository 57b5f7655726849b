"""Orders: a sentence in, one line of JSON out. It teaches an *output format*.

    "Could you ship a dozen candles and two ropes to Oslo for Ines by Friday?"
    {"customer":"Ines","items":{"candle":12,"rope":2},"city":"Oslo","day":"Friday"}

The facts stand in the sentence, so nothing has to be known; what has to be learned is
the form: four fixed keys however the sentence goes, items in the singular, number
words as numbers. A line that is wrong in one value is wrong.

What the splits have in common, and what not:

    share        most names, items and cities, and every turn of phrase
    don't share  a prompt; a customer with a set of items; and some names, items and
                 cities, which only validation or only test has, so that copying is
                 tested and not recall

Two more splits are made as the test is, a quarter of their words their own, but from
longer lists of them: "search", on which settings are searched, and "final", on which
the comparison scores all methods. Which new words a method gets right differs so much
from word to word that a few of them would choose the setting, or the winner. Rows that
share a new word are right or wrong together (`clusters`): the 300 rows of the test have
17 new words, too few draws to speak of other words.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from random import Random

from ..common.records import unique

INSTRUCTION = "Reply with the order as JSON: customer, items, city, day."
SIZES = {"train": 600, "validation": 100, "test": 300}
LATER = {"search": 150, "final": 300}  # drawn after SIZES, each by dice of its own
OWN_WORDS = 0.25  # share of the words of a split that has some of its own

CUSTOMERS = {
    "shared": "Ada Ben Carla Dario Elif Fatima Goran Hana Ines Jonas Kofi Leila Marek "
    "Nadia Omar Priya Quinn Rosa Samir Tessa Umar Vera Wanda Yusuf Zoe Anton Bianca "
    "Cyril Dora Emil Freya Gustav Helga Ivan Judit Karim Lena Milan Noor Olga",
    "validation": "Pavel Ruth Stefan Thea",
    "test": "Amara Bruno Chiara Diego Esther Farid Greta Hiro",
    "search": "Bogdan Fiona Ingrid Keiko Lorenzo Mateus Osman Rashid Sunita Thabo "
    "Ulrike Yelena Agnes Baraka Camille Dmitri Edith Felipe Gita Hamza Ilse Jorge "
    "Kenji Ludmila Miriam Nikolai Oskar Paola Rafael Sigrid Tomas Ursula Valentin "
    "Wiktor Xenia Yuki Zainab Aroha Birgit Conrad",
    "final": "Adrian Beatriz Carmen Daniel Elena Fabio Gloria Henrik Isabel Jasper "
    "Katya Leonie Mikael Nora Olivia Petra Quentin Ramona Simone Tariq Uma Viktor "
    "Wendy Ximena Yolanda Zacharias Amina Boris Clara Duncan Erika Florian Giulia "
    "Harriet Imran Jolanda Kasper Lucia Magnus Nikita Otto Pilar Roland Selma Tobias "
    "Violet Werner Zelda",
}
CITIES = {
    "shared": "Oslo Lima Cairo Porto Riga Turin Quito Delhi Seoul Dakar Perth Bergen "
    "Lyon Tunis Osaka Bilbao Hanoi Accra Malmo Zagreb",
    "validation": "Tampa Gdansk",
    "test": "Nairobi Leeds Basel Kyoto",
    "search": "Adelaide Bogota Hobart Krakow Manila Mombasa Tallinn Vienna Antwerp "
    "Brisbane Cork Dresden Lagos Lisbon Madrid Naples Ottawa Prague Rabat Santiago "
    "Sofia Tbilisi Toronto Utrecht",
    "final": "Amsterdam Barcelona Cologne Dublin Edinburgh Florence Geneva Helsinki "
    "Istanbul Jakarta Karachi London Marseille Nantes Odessa Palermo Rotterdam Seville "
    "Trieste Uppsala Valencia Warsaw Yokohama Zurich Aarhus Bremen Caracas Durban",
}
ITEMS = {
    "shared": "lamp rope candle kettle blanket ladder bucket hammer basket mirror "
    "bottle chair pillow carpet drum shovel ticket helmet tent clock spoon jacket "
    "lantern whistle brush box torch bench glass watch",
    "validation": "teapot wrench",
    "test": "saddle trumpet pencil paddle sandwich",
    "search": "barrel blender compass curtain hatchet needle pitcher ribbon suitcase "
    "bicycle broom bugle cradle cushion drawer flute funnel globe goblet hinge ladle "
    "magnet napkin poster rake sieve stool towel trolley vase violin wallet",
    "final": "anchor apron badge balloon bell bowl bracelet button cabinet calendar "
    "camera carton chisel coat coin collar comb cork crayon cupboard desk doll "
    "doorbell envelope eraser fan flag flask folder fork frame glove guitar hairbrush "
    "hat hook iron jar jug keyboard kite lock mattress mop mug necklace notebook oven "
    "pan plate pump quilt razor rug scooter shirt sofa stamp table tray tripod "
    "umbrella wagon whisk wig yoyo zipper",
}
AMOUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

PATTERNS = (
    "{who} wants {items} sent to {city} by {day}.",
    "Please send {items} to {who} in {city}, {day} at the latest.",
    "{items} for {who}, please, to {city} on {day}.",
    "On {day} {who} in {city} needs {items}.",
    "Hello, {who} here: {items} to {city} before {day}.",
    "Order from {who}: {items}. Deliver to {city} on {day}.",
    "We promised {who} {items} in {city} for {day}.",
    "By {day}, {city} should see {items} for {who}.",
    "Could you ship {items} to {city} for {who} by {day}?",
    "{who} called from {city} and asked for {items}, no later than {day}.",
    "{who} in {city} would like {items} this {day}.",
    "To {city}, next {day}: {items}, in the name of {who}.",
)


def rows(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The five splits as {"prompt", "completion"} rows; the same for the same seed."""
    random = Random(f"orders {seed}")
    taken = set()
    splits = {split: _split(random, split, n, taken) for split, n in SIZES.items()}
    for split, n in LATER.items():
        splits[split] = _split(Random(f"orders {split} {seed}"), split, n, taken)
    return splits


def _split(random, split, size, taken) -> list[dict[str, str]]:
    examples = []
    while len(examples) < size:
        order = _order(random, split)
        key = order["customer"], frozenset(order["items"])
        if key not in taken:
            taken.add(key)
            line = json.dumps(order, separators=(",", ":"))
            examples.append({"prompt": _sentence(random, order), "completion": line})
    return examples


def _order(random, split) -> dict:
    """The meaning of a row, before it is put into words."""
    items = {}
    for _ in range(random.choice((1, 1, 2))):
        items[_word(random, ITEMS, split)] = random.choice(AMOUNTS)
    return {
        "customer": _word(random, CUSTOMERS, split),
        "items": items,
        "city": _word(random, CITIES, split),
        "day": random.choice(DAYS),
    }


def _word(random, words, split) -> str:
    """One of the shared words, or at times one that only this split has."""
    own = split in words and random.random() < OWN_WORDS
    return random.choice(words[split if own else "shared"].split())


def _sentence(random, order) -> str:
    pattern = random.choice(PATTERNS)
    listed = " and ".join(_amount(random, *item) for item in order["items"].items())
    text = pattern.format(
        who=order["customer"], items=listed, city=order["city"], day=order["day"]
    )
    return text[0].upper() + text[1:]


def _amount(random, item, n) -> str:
    """In words or digits: a lamp, three lamps, 3 lamps, a pair of lamps, …"""
    if n == 1:
        return f"{random.choice(('a', 'one'))} {item}"
    spoken = {2: ["a pair of"], 12: ["a dozen"]}.get(n, [])
    return f"{random.choice([str(n), NUMBERS[n], *spoken])} {plural(item)}"


def plural(item: str) -> str:
    """More than one of it."""
    return item + ("es" if item.endswith(("s", "x", "ch", "sh")) else "s")


def clusters(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """For each row of a split, the new word that it shares with most of the others.

    A method gets a word right that training lacks, or not, in all rows that hold it.

    Returns  a name for each row: a new word, or the prompt of a row without one
    """
    new = [_new_words(row["completion"]) for row in rows]
    frequency = Counter(chain(*new))
    prompts = [row["prompt"] for row in rows]
    return [
        max(words, key=frequency.__getitem__) if words else prompt
        for words, prompt in zip(new, prompts, strict=True)
    ]


def _new_words(completion: str) -> list[str]:
    """Those of the order's words that training lacks."""
    order = json.loads(completion)
    words = ((order["customer"],), order["items"], (order["city"],))
    lists = CUSTOMERS, ITEMS, CITIES
    return [
        word
        for some, known in zip(words, lists, strict=True)
        for word in some
        if word not in known["shared"].split()
    ]


def score(answer: str, completion: str) -> bool:
    """True where both are the same JSON value: types exact, key order free.

    No text around the JSON, no key twice, no NaN; 1, 1.0 and true are three values.
    """
    try:
        return canonical(answer) == canonical(completion)
    except (ValueError, RecursionError):
        return False


def canonical(text: str) -> str:
    """The JSON value as text that is the same for equal values, and only for those.

    Raises  ValueError      no JSON, a key twice, NaN or an infinity
            RecursionError  too many brackets in brackets
    """
    value = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse)
    return json.dumps(value, sort_keys=True)


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON")
