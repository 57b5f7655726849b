"""A parameter's states, cut into pages; and in which order their values stand.

The values of a parameter, its gradient and its states are taken in the order in which
the *parameter's memory* has them. For a contiguous one that is the order of its
indices; for a transposed one it is another, and a slice is a view there as well. Only
where the memory has gaps (every other column of something larger) the order is that of
the indices, and the values have to be copied.

A page holds its states one after the other, m then v, each contiguous:

    full page    | m (n) | v (n) |          n = page_bytes // (states · itemsize)
    last page    | m | v |                  as many values as are left
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from .pages import Page
from .stores import WORD, FileStore


@dataclass
class Cut:
    """The pages of one parameter."""

    index: int  # of the parameter in the optimizer
    name: str
    like: tuple  # see likeness
    states: int  # 2, or 3 with amsgrad
    pages: list[Page] = field(default_factory=list)

    @classmethod
    def of(cls, p: Tensor, index: int, name: str, states: int, page_bytes: int):
        """All pages of `p`, without a place yet."""
        cut = cls(index, name, likeness(p), states)
        length = page_bytes // (states * p.itemsize)  # values
        for number, start in enumerate(range(0, p.numel(), length)):
            stop = min(start + length, p.numel())
            size = states * (stop - start) * p.itemsize
            cut.pages.append(Page(number, start, stop, size))
        return cut

    def rows(self, page: Page, words: Tensor) -> Tensor:
        """The states that a page's words hold: (states, values), a view."""
        n = page.stop - page.start
        return words.view(self.like[0])[: self.states * n].view(self.states, n)

    def fill(self, state: int, values: Tensor) -> None:
        """Write one of the states, (n,) in order, to the store."""
        for page in self.pages:
            rows = self.rows(page, page.store.place(page))
            rows[state].copy_(values[page.start : page.stop])
            page.stored = True

    def runs(self, length: int) -> list[list[Page]]:
        """Pages that follow each other, `length` at a time."""
        return [self.pages[i : i + length] for i in range(0, len(self.pages), length)]

    def words(self, length: int) -> int:
        """Of one state of the longest run."""
        size = sum(page.bytes for page in self.pages[:length]) // self.states
        return -(-size // WORD)


def place(cuts: list[Cut], store) -> FileStore:
    """Give every page its place in a new store.

    Args
        store  called with the words that all of them need
    """
    pages = [page for cut in cuts for page in cut.pages]
    words = 0
    for page in pages:
        page.place, words = words, words + page.words
    made = store(words)
    for page in pages:
        page.store = made
    return made


def neighbours(run: list[Page]) -> Iterator[list[Page]]:
    """A run in parts: pages of one size whose slots follow each other as they do."""

    def alike(page):
        return page.slot - page.number, page.stop - page.start

    return (list(part) for _, part in groupby(run, alike))


def likeness(p: Tensor) -> tuple:
    """What must stay: dtype, device, shape, and the strides where not contiguous."""
    return p.dtype, p.device, p.shape, None if p.is_contiguous() else p.stride()


def in_order(t: Tensor, p: Tensor) -> Tensor:
    """The values of `t`, which has p's shape, in the order of p's memory: (n,).

    A view of `t` wherever its strides allow one.
    """
    if not _permuted(p):
        return t.reshape(-1)
    if t.stride() != p.stride():
        t = torch.empty_like(p, dtype=t.dtype, device=t.device).copy_(t)
    return t.as_strided((p.numel(),), (1,))


def shaped(values: Tensor, p: Tensor) -> Tensor:
    """The inverse of in_order: (n,) as a view with p's shape."""
    if not _permuted(p):
        return values.view(p.shape)
    return values.as_strided(p.shape, p.stride())


def _permuted(p: Tensor) -> bool:
    """Whether p's memory has no gaps, but another order than its indices."""
    if p.is_contiguous():
        return False
    return torch.empty_like(p, device="meta").stride() == p.stride()
