"""The walk of a step over the pages.

    for run of pages:                   at most 1 MiB, at most half of the budget
        bring the run in, and ask for the next one
        for neighbours in the arena:    one call for all of their values
            update(p, g, m, v)

Two choices decide the speed. A *run* of pages is small enough for the cache: eight
operations on it read the states from there and not from memory. One page alone would be
smaller still, but then calling the operations takes longer than computing them.

And the walk goes *back and forth*: even steps from the first page to the last, odd ones
from the last to the first. A walk that starts over is the worst case of LRU: the page
needed next is always the one that has just left, and with room for S of N pages none is
ever found. Going back, the S pages used last are the first ones needed:

    starting over       faults N a step             hits 0
    back and forth      faults N - S a step         hits S
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .adamw import SlicedAdamW
from .cuts import Cut, in_order, neighbours, place
from .pages import Counters, Page, Pager
from .states import (
    OTHERS,
    SETTINGS,
    STATES,
    check_budget,
    check_gradient,
    check_parameter,
    check_settings,
    checked_states,
    full_states,
    merged_groups,
    refuse_others,
    state_count,
    step_dtype,
    whole,
)
from .stores import WORD, FileStore, PinnedStore

PAGE_BYTES = 1 << 16
RUN_BYTES = 1 << 20  # of the pages that are updated together


class PageRow(NamedTuple):
    """A row of the page table."""

    param: int  # the parameter's place in the optimizer
    page: int  # the page's place in the parameter
    resident: bool
    dirty: bool  # its slot holds what the store does not
    group: int
    name: str  # where the optimizer was given names, else "parameter 0"
    start: int  # the slice: its first value
    stop: int  # and the one after its last
    slot: int | None  # in the arena
    bytes: int  # of its states
    used: int  # when it was last used; larger is later, 0 is never


class PagedAdamW(torch.optim.Optimizer):
    """AdamW whose states are paged between an arena and a store.

    Args
        params        as torch.optim takes them: tensors, (name, tensor) or groups; all
                      on one device, CPU or CUDA
        lr … maximize as torch.optim.AdamW
        budget_bytes  of the arena, at least one page. It can be set at any time, and
                      `lent` takes some of it away for a while
        page_bytes    of a page: a multiple of 8. 65536 are 8192 values in float32
        directory     CPU: the folder of the file; None for tempfile.gettempdir(). On
                      many systems /tmp is in memory: then name a folder on a disk
    Raises   ValueError   an argument out of its range, a parameter that is complex or
             on another device; OSError: no room for the states. In a new group, the
             optimizer is as it was before
    Memory   device: the arena, at most budget_bytes, a slot a page, however short; and
             during a step half of the bytes of a run (so at most 512 KiB, or half a
             page), a copy of a gradient whose strides are not its parameter's, and of a
             parameter with gaps. Store: 2 · parameters · itemsize bytes (3 with
             amsgrad), for frozen ones too: pass what trains
    Departs  `state` holds the step count alone; state_dict() has the moments, in
             torch's format, in a new file on CPU. Interrupted in the middle of a step,
             some slices of the weights have made it and others have not, and the slice
             in work may be between the two, as with torch's; no page is lost. Take a
             checkpoint then. foreach, fused, capturable and differentiable are refused
    Source   [1] AdamW, arXiv:1711.05101; amsgrad, arXiv:1904.09237
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        budget_bytes: int,
        page_bytes: int = PAGE_BYTES,
        directory: str | os.PathLike | None = None,
        **others,
    ):
        values = (lr, betas, eps, weight_decay, amsgrad, maximize)
        defaults = dict(zip(SETTINGS, values, strict=True))
        check_settings(defaults)
        for name in others.keys() - set(OTHERS):
            raise TypeError(f"PagedAdamW has no argument {name!r}")
        whole("page_bytes", page_bytes, WORD)
        if page_bytes % WORD:
            raise ValueError(f"{page_bytes=}: allowed are multiples of {WORD} bytes")
        check_budget(budget_bytes, page_bytes)
        self._cuts: dict[Tensor, Cut] = {}
        self._pager = Pager(page_bytes, budget_bytes)
        self._directory = directory
        self._process = os.getpid()
        self._walks = 0
        super().__init__(params, defaults | others)
        for name in others:
            del self.defaults[name]

    # ------------------------------------------------------------- what can be watched

    def page_table(self) -> list[PageRow]:
        """A row a page, in the order of the parameters."""
        return [
            PageRow(
                cut.index,
                page.number,
                page.slot is not None,
                page.dirty,
                number,
                cut.name,
                page.start,
                page.stop,
                page.slot,
                page.bytes,
                page.used,
            )
            for number, group in enumerate(self.param_groups)
            for cut in (self._cuts[p] for p in group["params"])
            for page in cut.pages
        ]

    @property
    def counters(self) -> Counters:
        return self._pager.counters

    @property
    def page_bytes(self) -> int:
        return self._pager.page_bytes

    @property
    def budget_bytes(self) -> int:
        return self._pager.budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget_bytes: int) -> None:
        """Smaller: pages leave, now. Larger: the room is there for the next step."""
        check_budget(budget_bytes, self.page_bytes)
        before, self._pager.budget_bytes = self.budget_bytes, budget_bytes
        if budget_bytes < before:
            self._pager.fit()

    @property
    def states_bytes(self) -> int:
        """Of all states. A slot for every page takes more, where pages are short."""
        return sum(page.bytes for page in self._pager.pages)

    @property
    def arena(self) -> Tensor | None:
        """The slots, one tensor on the device; None before the first step."""
        return self._pager.arena

    @property
    def stores(self) -> list[Tensor]:
        """Where every page has its place: tensors over files, or in pinned memory."""
        found = {id(page.store): page.store.words for page in self._pager.pages}
        return list(found.values())

    @contextmanager
    def lent(self, bytes: int) -> Iterator[None]:
        """Inside, the budget is smaller by that much: a spike of somebody else's."""
        whole("bytes", bytes, 0)
        self.budget_bytes -= bytes
        try:
            yield
        finally:
            self.budget_bytes += bytes

    # ------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None):
        """One step of AdamW on every parameter that has a gradient.

        Returns  what the closure returned
        Raises   RuntimeError  a gradient that is sparse or does not fit its parameter,
                 or a parameter that is not what it was; nothing is changed
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._work()
        self._pager.fit()
        with self._pager.mending():
            self._walk(work)
        return loss

    def _work(self) -> list[tuple[Tensor, dict, Cut]]:
        """Every parameter with a gradient, its group and its pages, as they come."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this optimizer belongs to the process that made it: after a fork both "
                "would write to one file. Make a new one and load its state_dict()"
            )
        work = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    cut = self._cuts[p]
                    check_gradient(p, cut, group)
                    work.append((p, group, cut))
        return work[::-1] if self._walks % 2 else work

    def _walk(self, work: list[tuple[Tensor, dict, Cut]]) -> None:
        """Update all of them, in this order; every second time, each from its end."""
        pager, order = self._pager, -1 if self._walks % 2 else 1
        length = max(1, min(RUN_BYTES // self.page_bytes, pager.slots // 2))
        for p, _, cut in work:
            if not self.state[p]:  # the first step, or somebody cleared the state
                for page in cut.pages:
                    pager.forget(page)
        runs = [cut.runs(length)[::order] for _, _, cut in work]
        words = max((cut.words(length) for _, _, cut in work), default=0)
        scratch = torch.empty(words, dtype=torch.int64, device=pager.device)
        coming = chain(*runs, [[]])
        next(coming)
        self._walks += 1
        for (p, group, cut), own in zip(work, runs, strict=True):
            state = self.state[p]
            step = state["step"] if state else torch.tensor(0.0, dtype=step_dtype())
            update = SlicedAdamW(p, group, step.item() + 1, scratch)
            try:
                for run in own:
                    self._bring(run[::order], next(coming)[::order])
                    for part in neighbours(run):
                        rows = pager.rows(part, p.dtype, cut.states)
                        if not p.dim():
                            rows = [row.view(()) for row in rows]
                        update(part[0].start, part[-1].stop, *rows)
            finally:
                update.finish()
            state["step"] = step.add_(1)

    def _bring(self, run: list[Page], coming: list[Page]) -> None:
        """Every page of the run in a slot, to be written to; the next ones coming."""
        for page in run:
            self._pager.use(page)
        if self._pager.slots > 1:
            for page in coming:
                self._pager.prefetch(page)
        for page in run:
            page.dirty = True

    # -------------------------------------------------------------- groups and states

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; makes the pages of the group and reserves room for them."""
        super().add_param_group(param_group)
        try:
            cuts = self._lay_out(self.param_groups[-1:], self._cuts)
        except BaseException:
            del self.param_groups[-1]
            raise
        self._cuts |= cuts
        self._pager.pages += _pages(cuts)

    def state_dict(self) -> dict:
        """What torch.optim.AdamW's would be, the moments in a new file on CPU.

        Not references, as torch's: the tensors stay as they are when steps go on.
        """
        held = {p: self._cuts[p] for p, state in self.state.items() if state}
        full = full_states(held, self._pager.look, self._directory)
        for p, state in full.items():
            state["step"] = self.state[p]["step"].clone()
        paged, self.state = self.state, full
        try:
            return super().state_dict()
        finally:
            self.state = paged

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the states, and the groups' settings, of an AdamW: ours or torch's.

        Raises  ValueError  what is missing or has another shape, by name; the optimizer
                is as it was. OSError: no room, likewise
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = merged_groups(self.param_groups, state_dict["param_groups"])
        states = checked_states(groups, state_dict)
        cuts = self._lay_out(groups, {})
        for p, saved in states.items():
            for number, name in enumerate(STATES[: cuts[p].states]):
                cuts[p].fill(number, in_order(saved[name], p))
        state = type(self.state)(dict)
        state |= {p: {"step": saved["step"]} for p, saved in states.items()}
        self._cuts, self.state, self.param_groups = cuts, state, groups
        self._pager.replace(_pages(cuts))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self):
        raise TypeError(
            "a PagedAdamW cannot be copied or pickled: its states are in a file of its "
            "own. Make a new one and load state_dict() into it"
        )

    def _lay_out(self, groups: list[dict], before: dict[Tensor, Cut]):
        """{parameter: its pages} of these groups, in a store of their own."""
        cuts: dict[Tensor, Cut] = {}
        device = self._pager.device
        for group in groups:
            refuse_others(group)
            states = state_count(group)
            for number, p in enumerate(group["params"]):
                index = len(before) + len(cuts)
                names = group.get("param_names", {number: f"parameter {index}"})
                name = names[number]
                check_parameter(p, name, states, self.page_bytes)
                device = p.device if device is None else device
                if p.device != device:
                    raise ValueError(
                        f"{name} is on {p.device} and others are on {device}; an arena "
                        "is on one device: make an optimizer for each"
                    )
                if p in cuts:
                    raise ValueError(f"{name} is in the group twice; list it once")
                cuts[p] = Cut.of(p, index, name, states, self.page_bytes)
        if device is not None and device.type == "cuda":
            place(cuts.values(), lambda words: PinnedStore(words, device))
        else:
            place(cuts.values(), lambda words: FileStore(words, self._directory))
        for group in groups:
            for name in OTHERS:
                group.pop(name, None)
        self._pager.device = device
        return cuts


def _pages(cuts: dict[Tensor, Cut]) -> list[Page]:
    return [page for cut in cuts.values() for page in cut.pages]
