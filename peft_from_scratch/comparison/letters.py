"""Compact letters: methods that share a letter cannot be told apart.

One method can carry several letters. If x and y cannot be told apart, nor y and z, but
x and z can, then x has the letter a, y has a and b, and z has b.
"""

from collections.abc import Collection, Iterator, Sequence


def letters(keys: Sequence[str], apart: Collection[frozenset[str]]) -> dict[str, str]:
    """Each key's letters; "a" goes to the first key, and letters follow its order.

    Insert and absorb [1]. All start in one group. For each pair that is told apart,
    every group that holds both is split in two, one without the first and one without
    the second; then a group that lies inside another is dropped.

    Args
        keys   the methods, best first
        apart  the pairs that are told apart
    Returns  {key: letters}: two keys share a letter if and only if not told apart
    Source   [1] Piepho, J. Comput. Graph. Statist. 13 (2004) 456-466
    """
    groups = [frozenset(keys)]
    for pair in apart:
        parts = []
        for group in groups:
            parts += [group - {key} for key in pair] if pair <= group else [group]
        groups = _absorbed(parts)
    place = {key: i for i, key in enumerate(keys)}
    groups.sort(key=lambda group: sorted(place[key] for key in group))
    named = list(zip(_names(), groups, strict=False))
    return {key: "".join(n for n, group in named if key in group) for key in keys}


def _absorbed(groups: list[frozenset[str]]) -> list[frozenset[str]]:
    """The groups that lie inside no other one, each once."""
    distinct = set(groups)
    return [g for g in distinct if not any(g < other for other in distinct)]


def _names() -> Iterator[str]:
    """a to z, then lower-case letters of other alphabets: one character each."""
    return (chr(code) for code in range(ord("a"), 0x600) if chr(code).islower())
