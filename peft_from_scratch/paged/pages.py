"""Pages: a budget of fast memory, a store for the rest, and who must leave.

Virtual memory in small. What does not fit is cut into pages. A page that is in use has
a slot in the *arena*, one tensor on the device that never exceeds the budget; every
page has a place in the *store*, which is large and slow.

    fault       a page is needed that has no slot: it is copied in
    hit         it has one already
    eviction    no slot is free: the page that was used longest ago leaves (LRU)
    dirty       its slot holds what the store does not. Only a dirty page is written
                back when it leaves; a clean one is dropped
    zeros       a page that was never written is known to be zero: nothing is read
    prefetch    the pages of the next run are asked for before they are needed: on CUDA
                they come while kernels run, on a CPU at once

The policy is in `Pager` and knows nothing of devices: copying is in stores.py.

A page has no state but its slot and a few flags, and each step of the bookkeeping sets
them in such an order that an interrupted one loses nothing: `Pager.mend` works out the
rest from them.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .stores import WORD, FileStore


@dataclass
class Counters:
    """What happened so far; counts of pages, and bytes of their contents.

    Each use of a page is a fault or a hit; a prefetched page that was not there is a
    fault as well, and counts in both.
    """

    faults: int = 0
    hits: int = 0
    prefetches: int = 0
    evictions: int = 0
    write_backs: int = 0
    bytes_in: int = 0  # from the store to the arena
    bytes_out: int = 0  # from the arena to the store
    peak_resident_bytes: int = 0  # slots in use at one moment, in bytes of whole slots


@dataclass(eq=False, slots=True)
class Page:
    """All the states of one slice of one parameter."""

    number: int  # within its parameter
    start: int  # the slice, in values
    stop: int
    bytes: int  # of its states
    store: FileStore | None = None
    place: int = 0  # its first word there
    slot: int | None = None  # in the arena
    dirty: bool = False  # the slot holds what the store does not
    stored: bool = False  # written to the store at least once; else it is zero
    ahead: bool = False  # prefetched, and not used since
    used: int = 0  # when it was last used or asked for, counted in such events
    copied: object = None  # the event of its last copy on a side stream

    @property
    def words(self) -> int:
        return -(-self.bytes // WORD)


@dataclass
class Pager:
    """Who is resident, and who leaves.

    Args
        page_bytes    of a slot
        budget_bytes  of the arena, at most
        device        of the arena
    """

    page_bytes: int
    budget_bytes: int
    device: torch.device | None = None
    pages: list[Page] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    arena: Tensor | None = None  # (slots · words of a slot), int64
    slots: int = 0
    free: list[int] = field(default_factory=list)
    resident: OrderedDict = field(default_factory=OrderedDict)  # oldest use first
    clock: int = 0

    def use(self, page: Page) -> None:
        """The page is in its slot now, and stays until `slots` others were used."""
        if page.slot is None:
            self._bring(page)
        elif not page.ahead:
            self.counters.hits += 1
        page.ahead = False
        self._touch(page)
        page.store.arrive(page)

    def prefetch(self, page: Page) -> None:
        """Ask for a page that will be used soon; it counts as used from now on."""
        if page.slot is None:
            self._bring(page)
            page.ahead = True
            self.counters.prefetches += 1
        self._touch(page)

    def fit(self) -> None:
        """As many slots as the budget allows and the pages need; a moved arena.

        Where there are fewer than before, the least recently used leave. The others
        move through the store: two arenas at once would exceed the budget.
        """
        slots = min(self.budget_bytes // self.page_bytes, len(self.pages))
        if slots == self.slots:
            return
        with self.mending():
            while len(self.resident) > slots:
                self._evict(next(iter(self.resident)))
            staying = list(self.resident)
            for page in staying:
                self._write_back(page)
            self._settle()
            for page in staying:
                page.slot = None
            self.resident.clear()
            self.slots, self.free, self.arena = 0, [], None
            words = slots * (self.page_bytes // WORD)
            self.arena = torch.empty(words, dtype=torch.int64, device=self.device)
            self.slots, self.free = slots, list(reversed(range(slots)))
            for page in staying:
                self._place(page)

    def forget(self, page: Page) -> None:
        """The page is zero again, as if it had never been used."""
        page.stored = page.dirty = page.ahead = False
        if page.slot is not None:
            self._evict(page)

    def replace(self, pages: list[Page]) -> None:
        """Other pages, none of them resident; the old ones are dropped."""
        self._settle()
        self.pages, self.slots, self.free = pages, 0, []
        self.resident.clear()
        self.arena = None

    def look(self, page: Page) -> Tensor:
        """The words of a page where it is now; nobody moves."""
        page.store.settle()
        if page.slot is not None:
            return self._slot(page.slot, page)
        return page.store.place(page)

    def rows(self, run: list[Page], dtype: torch.dtype, states: int) -> list[Tensor]:
        """Each state of resident pages in neighbouring slots: (pages, values)."""
        size = self.page_bytes // dtype.itemsize  # from slot to slot
        n, first = run[0].stop - run[0].start, run[0].slot * size
        flat = self.arena.view(dtype)
        shape, stride = (len(run), n), (size, 1)
        return [flat.as_strided(shape, stride, first + j * n) for j in range(states)]

    @contextmanager
    def mending(self) -> Iterator[None]:
        """Where the block ends in an error, an interrupt too, the lists are mended."""
        try:
            yield
        except BaseException:
            self.mend()
            raise

    def mend(self) -> None:
        """Lists that agree with the pages' own slots; no copy is under way."""
        self._settle()
        held = [page for page in self.pages if page.slot is not None]
        self.resident = OrderedDict.fromkeys(sorted(held, key=lambda page: page.used))
        taken = {page.slot for page in held}
        self.free = [slot for slot in reversed(range(self.slots)) if slot not in taken]

    def _bring(self, page: Page) -> None:
        self.counters.faults += 1
        if not self.free:
            self._evict(next(iter(self.resident)))
        self._place(page)

    def _place(self, page: Page) -> None:
        slot = self.free.pop()
        page.store.read(page, self._slot(slot, page))
        page.slot = slot
        self.resident[page] = None
        self.counters.bytes_in += page.bytes if page.stored else 0
        self.counters.peak_resident_bytes = max(
            self.counters.peak_resident_bytes, len(self.resident) * self.page_bytes
        )

    def _evict(self, page: Page) -> None:
        self._write_back(page)
        slot, page.slot = page.slot, None
        del self.resident[page]
        self.free.append(slot)
        self.counters.evictions += 1

    def _write_back(self, page: Page) -> None:
        if page.dirty:
            page.store.write(page, self._slot(page.slot, page))
            page.stored = True
            page.dirty = False
            self.counters.bytes_out += page.bytes
            self.counters.write_backs += 1

    def _touch(self, page: Page) -> None:
        self.resident.move_to_end(page)
        self.clock += 1
        page.used = self.clock

    def _slot(self, slot: int, page: Page) -> Tensor:
        first = slot * (self.page_bytes // WORD)
        return self.arena[first : first + page.words]

    def _settle(self) -> None:
        for store in {id(page.store): page.store for page in self.pages}.values():
            store.settle()
