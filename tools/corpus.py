"""What tiny was pretrained on: documents of eight kinds, all generated.

    tale      some events, and a question about one        answering from context
    report    events alone                                 plain text
    record    an event, written down as fields             one fixed format
    format    the same for a format that examples show     learning from examples
    copy      a line of invented words, said again         copying what was never seen
    echo      a line of invented words, over and over      noticing repetition
    kind      what kind of thing something is              a fact, told of every other
    sum       small sums, and numbers put in order         something else

Questions and answers stand as "Input: …" and "Output: …", with the end token after each
answer: the template "raw" of every task. A model that has read them knows the form, and
examples before a question (few-shot) are nothing new to it.

Step number i of pretraining reads what Random("… i") draws: no document is ever stored,
and a run that was stopped goes on with what it would have read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from random import Random

from peft_from_scratch.tasks.orders import DAYS
from peft_from_scratch.tasks.templates import IGNORED
from peft_from_scratch.tasks.world import (
    KIND_OF,
    PEOPLE,
    PLACES,
    THINGS,
    TOLD,
    Event,
    amount,
    event,
    invented,
    kind_pair,
    record,
    sentence,
)
from peft_from_scratch.training.batch import Row

END = "<|end|>"
SEPARATORS = ("; ", ", ", " | ", " - ", " & ", ". ")
EXAMPLES = (3, 4, 5)  # of a format, its last one included
TOLD_WHOLE = 0.2  # share of the dialogues of which the questions are learned, too
Pair = tuple[str, str]  # what is asked, what is right
Mix = Mapping[Callable[[Random], str], int]


# ------------------------------------------------------------------------- documents


def tale(random: Random) -> str:
    return dialogue([tale_pair(random, random.choice((1, 1, 2, 2, 3)))])


def report(random: Random) -> str:
    events = [event(random) for _ in range(random.choice((2, 3, 4)))]
    return " ".join(sentence(random, each) for each in events) + END


def records(random: Random) -> str:
    return dialogue([record_pair(random)])


def formats(random: Random) -> str:
    return dialogue(format_pairs(random, random.choice(EXAMPLES)))


def copies(random: Random) -> str:
    return dialogue([copy_pair(random)])


def word_copies(random: Random) -> str:
    return dialogue([copy_pair(random, any_word)])


def echoes(random: Random, word: Callable[[Random], str] = invented) -> str:
    words = [word(random) for _ in range(random.randint(3, 10))]
    return " ".join(words * random.choice((2, 2, 3))) + END


def word_echoes(random: Random) -> str:
    return echoes(random, any_word)


def kinds(random: Random) -> str:
    thing = random.choice(sorted(TOLD))
    if random.random() < 0.3:
        return f"A {thing} is a {KIND_OF[thing]}.{END}"
    return dialogue([kind_pair(random, thing)])


def sums(random: Random) -> str:
    if random.random() < 0.5:
        a, b = random.randint(0, 12), random.randint(0, 12)
        return dialogue([(f"{a} + {b} =", str(a + b))])
    numbers = random.sample(range(1, 13), random.choice((3, 4, 5)))
    asked, right = (" ".join(map(str, n)) for n in (numbers, sorted(numbers)))
    return dialogue([(f"Put in order: {asked}.", right)])


MIX: Mix = {  # document: its weight
    tale: 24,
    report: 6,
    records: 14,
    formats: 20,
    copies: 14,
    echoes: 10,
    kinds: 6,
    sums: 6,
}


# The same, but that words of the world are copied, too. After MIX alone, tiny looked up
# who, what, how many and when, and called every place Lima: all places stand where all
# others could, and nothing had asked it to tell one from another.
LATER_MIX = {
    {copies: word_copies, echoes: word_echoes}.get(kind, kind): weight
    for kind, weight in MIX.items()
}


def document(random: Random, mix: Mix = MIX) -> str:
    """Any document, by its weight."""
    (kind,) = random.choices(list(mix), list(mix.values()))
    return kind(random)


# ---------------------------------------------------------------- questions and answers


def dialogue(pairs: Iterable[Pair]) -> str:
    """Questions and answers as the template "raw" has examples."""
    turns = (f"Input: {asked}\nOutput: {right}{END}" for asked, right in pairs)
    return "\n\n".join(turns)


def strangers(random: Random, count: int) -> list[Event]:
    """Events that have no field in common: each question has one answer."""
    while True:
        events = [event(random) for _ in range(count)]
        fields = [e.fields() for e in events]
        if all(len({f[name] for f in fields}) == count for name in fields[0]):
            return events


def question(random: Random, event: Event) -> Pair:
    """A question about the event; the answer stands in its sentence."""
    return random.choice(
        (
            (f"Who did something with {amount(event)}?", event.who),
            (f"Who was in {event.place}?", event.who),
            (f"Who did something on {event.day}?", event.who),
            (f"Where was {event.who}?", event.place),
            (f"When was {event.who} there?", event.day),
            (f"With what was {event.who}?", amount(event)),
        )
    )


def tale_pair(random: Random, count: int) -> Pair:
    """Some events, and a question about one of them."""
    events = strangers(random, count)
    tale = " ".join(sentence(random, each) for each in events)
    asked, answer = question(random, random.choice(events))
    return f"{tale} {asked}", answer


def record_pair(random: Random) -> Pair:
    subject = event(random)
    return sentence(random, subject), record(subject)


def copy_pair(random: Random, word: Callable[[Random], str] = invented) -> Pair:
    words = " ".join(word(random) for _ in range(random.randint(2, 6)))
    return f"Say again: {words}.", words


def any_word(random: Random) -> str:
    """A word of the world, or one that means nothing."""
    known = random.choice((PEOPLE, PLACES, THINGS, DAYS))
    return random.choice(known) if random.random() < 0.5 else invented(random)


def format_pairs(random: Random, count: int) -> list[Pair]:
    """Events, all written down in one format that is drawn for them."""
    names = random.sample(list(event(random).fields()), random.randint(2, 6))
    between, named = random.choice(SEPARATORS), random.random() < 0.3
    pairs = []
    for subject in [event(random) for _ in range(count)]:
        fields = subject.fields()
        parts = [f"{name} {fields[name]}" if named else fields[name] for name in names]
        pairs.append((sentence(random, subject), between.join(parts)))
    return pairs


# ----------------------------------------------------------------------- rows of tokens


def batches(
    tokenizer,
    seed: int,
    step: int,
    documents: int,
    *,
    mix: Mix = MIX,
    whole: float = TOLD_WHOLE,
) -> list[list[Row]]:
    """What one step reads: rows (input_ids, labels), in PARTS of about one length.

    A row is a document, whole and alone: what it asks, it has told, and nothing else
    stands before it. Answers are always learned, all else only of a share `whole` of
    the documents: who did what, nobody can foresee, and a loss full of that drowns what
    can be learned from an answer.
    """
    random = Random(f"pretraining {seed} {step}")
    texts = [document(random, mix) for _ in range(documents)]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    rows = [(ids, labels(tokenizer, ids, random.random() < whole)) for ids in encoded]
    rows.sort(key=lambda row: len(row[0]))
    return [part for part in _parts(rows) if part]


def labels(tokenizer, ids: list[int], whole: bool) -> list[int]:
    """The tokens themselves; of a dialogue that is not learned whole, its answers."""
    answer, end = tokenizer.convert_tokens_to_ids("Output"), tokenizer.eos_token_id
    if whole or answer not in ids:
        return list(ids)
    targets, inside = [], False
    for token in ids:
        targets.append(token if inside else IGNORED)
        inside = (inside or token == answer) and token != end
    return targets


def _parts(rows: list[Row]) -> Iterator[list[Row]]:
    """Half of the rows, then a quarter, then the longest: little padding."""
    cuts = [0, len(rows) // 2, 3 * len(rows) // 4, len(rows)]
    for start, end in pairwise(cuts):
        yield rows[start:end]
