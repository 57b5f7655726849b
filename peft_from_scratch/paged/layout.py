"""A parameter's states cut into pages, and the order of their values.

The values of a parameter, its gradient and its states are taken in the order of the
*parameter's memory*. A contiguous parameter has its values in the order of its indices.
A transposed one has them in another order, and its slices are views as well. Only where
the memory has gaps (every other column of a larger tensor) the order of the indices is
taken, and the values have to be copied.

A page holds its states one after the other, m then v, each contiguous:

    full page    | m (n) | v (n) |          n = page_bytes // (states · itemsize)
    last page    | m | v |                  as many values as are left

For torch's fused kernel n is rounded down to whole vector registers (adamw.py).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from .pages import Page
from .stores import WORD, FileStore

REGISTER = 64  # bytes of the widest vector register that there is


@dataclass
class StatePages:
    """The pages that hold the optimizer's states of one parameter."""

    index: int  # of the parameter in the optimizer
    name: str
    layout: tuple  # of the parameter; see layout_of
    states: int  # 2, or 3 with amsgrad
    fused: bool = False  # whether each page begins at a whole vector register
    pages: list[Page] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        p: Tensor,
        index: int,
        name: str,
        states: int,
        page_bytes: int,
        fused: bool = False,
    ):
        """All pages of `p`, without a place yet."""
        state_pages = cls(index, name, layout_of(p), states, fused)
        length = page_bytes // (states * p.itemsize)  # values
        if fused:
            length -= length % (REGISTER // p.itemsize)
        for number, start in enumerate(range(0, p.numel(), length)):
            stop = min(start + length, p.numel())
            size = states * (stop - start) * p.itemsize
            state_pages.pages.append(Page(number, start, stop, size))
        return state_pages

    def rows(self, page: Page, words: Tensor) -> Tensor:
        """A view of a page's words as its states: (states, values)."""
        n = page.stop - page.start
        return words.view(self.layout[0])[: self.states * n].view(self.states, n)

    def fill(self, state: int, values: Tensor) -> None:
        """Write one state of the whole parameter, (n,) in order, to the store."""
        for page in self.pages:
            rows = self.rows(page, page.store.place(page))
            rows[state].copy_(values[page.start : page.stop])
            page.stored = True

    def runs(self, length: int) -> list[list[Page]]:
        """Pages that follow each other, `length` at a time."""
        return [self.pages[i : i + length] for i in range(0, len(self.pages), length)]

    def words(self, length: int) -> int:
        """Words of one state of the longest run."""
        size = sum(page.bytes for page in self.pages[:length]) // self.states
        return -(-size // WORD)


def allocate(
    parameters: Iterable[StatePages], make_store: Callable[[int], FileStore]
) -> None:
    """Give every page its place in a new store.

    Args
        make_store  called with the number of words that all pages need
    """
    pages = [page for state_pages in parameters for page in state_pages.pages]
    words = 0
    for page in pages:
        page.place, words = words, words + page.words
    store = make_store(words)
    for page in pages:
        page.store = store


def neighbours(run: list[Page]) -> Iterator[list[Page]]:
    """The parts of a run: pages of one size in slots that follow each other too."""

    def alike(page):
        return page.slot - page.number, page.stop - page.start

    return (list(part) for _, part in groupby(run, alike))


def layout_of(p: Tensor) -> tuple:
    """dtype, device, shape, and strides if not contiguous: what must stay the same."""
    return p.dtype, p.device, p.shape, None if p.is_contiguous() else p.stride()


def in_order(t: Tensor, p: Tensor) -> Tensor:
    """The values of a tensor of p's shape, in the order of p's memory: (n,).

    Returns  a view of `t` wherever its strides allow one
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
    """Whether p's memory has no gaps, and another order than its indices."""
    if p.is_contiguous():
        return False
    return torch.empty_like(p, device="meta").stride() == p.stride()
