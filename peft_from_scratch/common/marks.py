"""Blocks of a page that are computed, between two marks in its text."""

import re
from collections.abc import Iterable, Sequence


def markdown(heads: Sequence, lines: Iterable[Sequence]) -> str:
    """A table, without a new line at its end."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in rows)


def between_marks(page: str, block: str, name: str = "results") -> str:
    """The page with this block, which ends in a new line, between the marks.

    The marks are `<!-- name: how it was made -->` and `<!-- end of name -->`; a page
    without them stays as it is.
    """

    def marked(match: re.Match) -> str:
        return f"{match[1]}\n{block}\n{match[2]}"

    return block_pattern(name).sub(marked, page)


def block_pattern(name: str = "results") -> re.Pattern:
    """The block of this name, with its marks as groups 1 and 2."""
    return re.compile(
        rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.DOTALL
    )
