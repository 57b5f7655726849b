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

A page has no state but its slot and a few flags. The bookkeeping sets them in such an
order that an interrupt loses nothing: `Pager.rebuild_lists` works out the rest from
them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .stores import WORD, FileStore

FAULT, HIT, PREFETCH = "fault", "hit", "prefetch"  # what on_use is told


@dataclass
class Counters:
    """Counts of pages since the optimizer was made, and bytes of their contents.

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
    copied: object = None  # the event of its arrival, where a stream brings it

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
        on_use        functions called after a page was used, with the page and FAULT or
                      HIT, and after a page that had no slot was prefetched
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
    on_use: list[Callable[["Page", str], object]] = field(default_factory=list)

    def use(self, page: Page) -> None:
        """Bring the page into a slot, where it stays until `slots` others were used."""
        event = FAULT if page.slot is None else HIT
        if page.slot is None:
            self._bring(page)
        elif not page.ahead:
            self.counters.hits += 1
        page.ahead = False
        self._touch(page)
        page.store.wait_for(page)
        self._tell(page, event)

    def prefetch(self, page: Page) -> None:
        """Ask for a page that will be used soon; it counts as used from now on."""
        if page.slot is not None:
            self._touch(page)
            return
        self._bring(page)
        page.ahead = True
        self.counters.prefetches += 1
        self._touch(page)
        self._tell(page, PREFETCH)

    def fit(self) -> None:
        """Make a new arena, of as many slots as the budget allows and the pages need.

        If there are fewer than before, the least recently used pages leave. The others
        move through the store: two arenas at once would exceed the budget.
        """
        slots = min(self.budget_bytes // self.page_bytes, len(self.pages))
        if slots == self.slots:
            return
        with self.consistent_on_error():
            while len(self.resident) > slots:
                self._evict(next(iter(self.resident)))
            staying = list(self.resident)
            for page in staying:
                self._write_back(page)
            self._synchronize()
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
        """Make the page zero again, as if it had never been used."""
        page.stored = page.dirty = page.ahead = False
        if page.slot is not None:
            self._evict(page)

    def replace(self, pages: list[Page]) -> None:
        """Take other pages, none of them resident; the old ones are dropped."""
        self._synchronize()
        self.pages, self.slots, self.free = pages, 0, []
        self.resident.clear()
        self.arena = None

    def peek(self, page: Page) -> Tensor:
        """The words of a page where they are now, in its slot or in the store."""
        page.store.synchronize()
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
    def consistent_on_error(self) -> Iterator[None]:
        """Rebuild the lists if the block ends in an error or an interrupt."""
        try:
            yield
        except BaseException:
            self.rebuild_lists()
            raise

    def rebuild_lists(self) -> None:
        """Make `resident` and `free` agree with the pages' own slots."""
        self._synchronize()
        resident = [page for page in self.pages if page.slot is not None]
        resident.sort(key=lambda page: page.used)
        self.resident = OrderedDict.fromkeys(resident)
        used = {page.slot for page in resident}
        self.free = [slot for slot in reversed(range(self.slots)) if slot not in used]

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

    def _synchronize(self) -> None:
        for store in {id(page.store): page.store for page in self.pages}.values():
            store.synchronize()

    def _tell(self, page: Page, event: str) -> None:
        for observer in self.on_use:
            observer(page, event)
