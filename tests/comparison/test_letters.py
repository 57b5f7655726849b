"""Letters say which methods are told apart: no more of them, and no fewer."""

import itertools
import random

from planting import Bug, each_is_caught, law

from peft_from_scratch.comparison import letters as lettering
from peft_from_scratch.comparison.letters import letters


def graphs():
    """Random methods with random pairs told apart, from none to all."""
    for seed in range(60):
        dice = random.Random(seed)
        keys = [f"m{i}" for i in dice.sample(range(50), dice.randint(1, 9))]
        share = dice.choice((0, 0.2, 0.5, 0.8, 1))
        every = map(frozenset, itertools.combinations(keys, 2))
        yield keys, {pair for pair in every if dice.random() < share}


@law
def two_methods_share_a_letter_if_and_only_if_not_told_apart():
    for keys, apart in graphs():
        given = letters(keys, apart)
        assert list(given) == keys and all(given.values())
        for a, b in itertools.combinations(keys, 2):
            assert (frozenset((a, b)) not in apart) == bool(
                set(given[a]) & set(given[b])
            )


@law
def the_groups_are_the_largest_ones():
    """Every set of methods is tried: no letter could be given to one method more."""
    for keys, apart in graphs():
        given = letters(keys, apart)
        kept = {
            frozenset(k for k in keys if letter in given[k])
            for letter in set("".join(given.values()))
        }
        whole = [
            frozenset(some)
            for size in range(1, len(keys) + 1)
            for some in itertools.combinations(keys, size)
            if not any(
                map(apart.__contains__, map(frozenset, itertools.combinations(some, 2)))
            )
        ]
        assert kept == {group for group in whole if not any(group < g for g in whole)}
        assert sum(map(len, given.values())) == sum(map(len, kept))


@law
def letters_follow_the_order():
    """The first method has an "a", and each next letter begins no earlier."""
    for keys, apart in graphs():
        given = letters(keys, apart)
        assert given[keys[0]].startswith("a")
        assert all(text == "".join(sorted(text)) for text in given.values())
        used = sorted(set("".join(given.values())))
        starts = [next(i for i, k in enumerate(keys) if u in given[k]) for u in used]
        assert starts == sorted(starts)
        assert used == list(itertools.islice(lettering._names(), len(used)))


def test_there_are_letters_enough():
    """Fifteen methods in five trios, each told apart within: 3^5 groups."""
    keys = [f"{trio}{one}" for trio in range(5) for one in range(3)]
    apart = {
        frozenset(p) for p in itertools.combinations(keys, 2) if p[0][0] == p[1][0]
    }
    given = letters(keys, apart)
    assert len(set("".join(given.values()))) == 3**5
    assert all(letter.isalpha() for letter in "".join(given.values()))


BUGS = {
    "a pair told apart splits a group into its wrong half": Bug(
        letters,
        "for key in pair",
        "for key in sorted(pair)[:1]",
        two_methods_share_a_letter_if_and_only_if_not_told_apart,
    ),
    "groups without the pair are lost": Bug(
        letters,
        "else [group]",
        "else []",
        two_methods_share_a_letter_if_and_only_if_not_told_apart,
    ),
    "small groups stay": Bug(
        lettering._absorbed,
        "if not any(g < other for other in distinct)",
        "if g",
        the_groups_are_the_largest_ones,
    ),
    "the order is turned": Bug(
        letters,
        "sorted(place[key] for",
        "sorted(-place[key] for",
        letters_follow_the_order,
    ),
}
test_a_planted_bug_is_caught = each_is_caught(BUGS)
