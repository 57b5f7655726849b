"""The tasks for sweeps: a dial, what tiny half knows, senseless twins."""

import re
from collections import Counter, defaultdict

import pytest
from planting import each_is_caught, law

from peft_from_scratch.tasks import gap as task_gap
from peft_from_scratch.tasks import kinds, world
from peft_from_scratch.tasks import task as tasks
from peft_from_scratch.tasks.task import load_task

SPLITS = ("train", "validation", "test")
SMALL = dict(zip(SPLITS, (300, 100, 200), strict=True))
NUMBERS = "zero a two three four five six seven eight nine ten eleven twelve".split()


def gap(level, seed=0, sizes=SMALL):
    """The rows of a level; few of them, where a law does not need them all."""
    task_gap.dictionary.cache_clear()  # or a bug planted in it would not be met
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_gap, "SIZES", sizes)
        return task_gap.rows(task_gap.LEVELS[f"gap-{level}"], seed)


def every(splits):
    return [row for split in SPLITS for row in splits[split]]


def happened(text):
    """The event of a sentence: read by words, which the generator does not do."""
    words = re.findall(r"[\w]+", text)
    deeds = {did: deed for deed, did in world.DEEDS.items()}
    (place,) = (w for w in words if w in world.PLACES)
    (who,) = (w for w in words if w in world.PEOPLE)
    (day,) = (w for w in words if w in world.DAYS)
    (deed,) = (deeds[w] for w in words if w in deeds)
    (at,) = (i for i, w in enumerate(words) if singular(w) in world.THINGS)
    many = NUMBERS.index(words[at - 1].lower())
    return world.Event(who, deed, singular(words[at]), many, place, day)


def singular(word):
    found = [t for t in world.THINGS if word in (t, f"{t}s", f"{t}es")]
    return found[0] if found else word


# Laws. Each is run by a test below and, with a bug planted, by the last test.


@law
def rows_repeat_with_the_seed_alone():
    assert gap(1, seed=3) == gap(1, seed=3) != gap(1, seed=4)
    assert kinds.rows(3) == kinds.rows(3) != kinds.rows(4)


@law
def no_event_is_in_two_splits_or_twice():
    events = Counter(
        happened(row["prompt"]) for row in every(gap(0, sizes=task_gap.SIZES))
    )
    assert max(events.values()) == 1
    prompts = Counter(row["prompt"] for row in every(kinds.rows()))
    assert max(prompts.values()) == 1


@law
def every_level_asks_the_same():
    prompts = [[row["prompt"] for row in every(gap(level))] for level in range(5)]
    assert all(each == prompts[0] for each in prompts)


@law
def outputs_say_what_happened():
    for row in gap(0)["test"]:
        event = happened(row["prompt"])
        told = dict(part.split(" ") for part in row["completion"].split(", "))
        assert list(told.values()) == list(event.fields().values())
    for row in gap(1)["test"]:
        event = happened(row["prompt"])
        where, things, who = row["completion"].split(" | ")
        assert where == f"{event.place} - {event.day}"
        assert things == f"{event.thing} & {event.many}"
        assert who == f"{event.who} - {event.deed}"


@law
def meanings_are_one_to_one():
    """Different events are written differently, at every level."""
    for level in range(5):
        written = defaultdict(set)
        for row in gap(level)["validation"] + gap(level)["test"]:
            written[row["completion"]].add(happened(row["prompt"]))
        assert all(len(events) == 1 for events in written.values())


@law
def each_level_keeps_fewer_known_words():
    known = {*world.PEOPLE, *world.PLACES, *world.THINGS, *world.DAYS, *world.DEEDS}
    shares = []
    for level in range(1, 5):
        words = re.findall(
            r"[A-Za-z]+", " ".join(r["completion"] for r in gap(level)["test"])
        )
        shares.append(sum(word in known for word in words) / len(words))
    assert shares == sorted(shares, reverse=True) and len(set(shares)) > 2
    assert shares[-1] < 0.01


@law
def the_cipher_is_a_cipher():
    plain = [row["completion"].lower() for row in gap(1)["test"]]
    secret = [row["completion"] for row in gap(4)["test"]]
    table = {}
    for a, b in zip("".join(plain), "".join(secret), strict=True):
        assert table.setdefault(a, b) == b
        assert a.isalpha() == b.isalpha()
    assert len(set(table.values())) == len(table)
    moved = [a for a in table if a.isalnum() and table[a] != a]
    assert len(moved) > 0.7 * sum(map(str.isalnum, table))


@law
def half_of_the_kinds_are_told():
    assert {t: k for k, words in world.KINDS.items() for t in words.split()} == (
        world.KIND_OF
    )
    assert sorted(world.KIND_OF) == sorted(world.THINGS)
    for kind in world.KINDS:
        things = [t for t in world.THINGS if world.KIND_OF[t] == kind]
        assert 0.4 < sum(t in world.TOLD for t in things) / len(things) < 0.6
    for row in kinds.rows()["test"]:
        thing = happened(row["prompt"].removesuffix(" Which kind of thing?")).thing
        assert world.KIND_OF[thing] == row["completion"]


@law
def a_twin_has_the_same_texts_and_no_sense():
    for name in ("gap-1", "kinds", "orders"):
        own, twin = load_task(name), load_task(f"{name}-random")
        assert twin.score is own.score and twin.instruction == own.instruction
        for split in SPLITS:
            ours, theirs = getattr(own, split), getattr(twin, split)
            assert ours["prompt"] == theirs["prompt"]
            assert Counter(ours["completion"]) == Counter(theirs["completion"])
            kept = zip(ours["completion"], theirs["completion"], strict=True)
            chance = sum(
                (n / len(ours)) ** 2 for n in Counter(ours["completion"]).values()
            )
            assert sum(a == b for a, b in kept) / len(ours) < chance + 0.1


def test_sizes_and_scorers():
    for name in ("gap-0", "gap-4", "kinds"):
        task = load_task(name, seed=1)
        sizes = (kinds if name == "kinds" else task_gap).SIZES
        assert {split: len(getattr(task, split)) for split in SPLITS} == sizes
        right = task.test[0]["completion"]
        assert task.score(f" {right}\n", right)
        assert not task.score(f"{right} Done.", right) and not task.score("", right)


def test_the_page_shows_what_comes_out():
    """The module's own examples, up to where they are cut."""
    event = world.Event("Ada", "find", "lamp", 3, "Oslo", "Friday")
    for name, write in task_gap.LEVELS.items():
        (shown,) = re.findall(rf"^    {name}  (.*?) …", task_gap.__doc__, re.MULTILINE)
        assert write(event).startswith(shown.rstrip(" ,-|")), name


def test_a_twin_of_nothing_is_no_task():
    with pytest.raises(ValueError, match=r"'gap-9-random' is no task: .*'-random'"):
        load_task("gap-9-random")


BUGS = {
    "a leak between the splits": (
        task_gap.rows,
        "if new not in seen:",
        "if True:",
        no_event_is_in_two_splits_or_twice,
    ),
    "the seed is ignored": (
        task_gap.rows,
        'Random(f"gap {seed}")',
        "Random(0)",
        rows_repeat_with_the_seed_alone,
    ),
    "the sentence of another event": (
        task_gap.rows,
        '"completion": write(e)',
        '"completion": write(events[0])',
        outputs_say_what_happened,
    ),
    "one word for two things": (
        task_gap.dictionary.__wrapped__,
        "while new in taken:",
        "new = words.get('lamp', new)\n        while False:",
        meanings_are_one_to_one,
    ),
    "a cipher that moves nothing": (
        task_gap.cipher,
        ".translate(_alphabet())",
        "",
        the_cipher_is_a_cipher,
    ),
    "a twin that keeps its labels": (
        tasks.shuffled,
        'random.sample([row["completion"] for row in rows], len(rows))',
        '[row["completion"] for row in rows]',
        a_twin_has_the_same_texts_and_no_sense,
    ),
    "a twin with one label": (
        tasks.shuffled,
        '"completion": answer',
        '"completion": answers[0]',
        a_twin_has_the_same_texts_and_no_sense,
    ),
    "kinds of other things": (
        world.kind_pair,
        "KIND_OF[thing]",
        'KIND_OF["lamp"]',
        half_of_the_kinds_are_told,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
