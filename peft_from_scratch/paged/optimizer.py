"""PagedAdamW: a step walks over the pages.

    for run, next_run of pages:         at most 1 MiB, at most half of the budget
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
from itertools import chain, islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.check import whole
from .adamw import FusedAdamW, SlicedAdamW
from .layout import StatePages, allocate, in_order, neighbours
from .pages import Counters, Page, Pager
from .states import (
    DECOUPLED,
    OTHERS,
    SETTINGS,
    STATES,
    check_budget,
    check_form,
    check_gradient,
    check_parameter,
    check_settings,
    checked_states,
    full_states,
    is_fused,
    merged_groups,
    other_entries,
    refuse_others,
    state_count,
    step_dtype,
)
from .stores import WORD, FileStore, PinnedStore

PAGE_BYTES = 1 << 16
RUN_BYTES = 1 << 20  # of the pages that are updated together


class PageEntry(NamedTuple):
    """An entry of the page table."""

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
        fused         False: the bits of torch's plain loop, foreach=False. True: those
                      of its fused kernel, which passes over a page once, as in train()
        budget_bytes  of the arena, at least one page. It can be set at any time, and
                      `lent` gives some of it up for a while
        page_bytes    of a page: a multiple of 8. 65536 are 8192 values in float32. On
                      CUDA a page is a copy of its own, and if fused a call of the
                      kernel: for parameters of millions of values, 1 << 22 asks for a
                      sixtieth of them
        directory     CPU: the folder of the file; None for tempfile.gettempdir(). On
                      many systems /tmp is in memory: then name a folder on a disk
    Raises   ValueError   an argument out of its range, a parameter that is complex or
             on another device; OSError: no room for the states. In a new group, the
             optimizer is as it was before
    Memory   device: the arena, at most budget_bytes, a slot a page, however short; and
             during a step half of the bytes of a run (so at most 512 KiB, or half a
             page; none if fused), a copy of a gradient whose strides are not its
             parameter's, and of a parameter with gaps. Store: 2 · parameters ·
             itemsize bytes (3 with amsgrad), for frozen ones too: pass what trains. On
             CUDA it is page-locked host memory, rounded up to a power of two
    Departs  `state` holds the step count and what hooks write there; state_dict() has
             the moments too, in torch's format, in a new file on CPU. Interrupted in
             the middle of a step, some slices of the weights have made it and others
             have not, and the slice in work may be between the two, as with torch's; no
             page is lost. Take a checkpoint then. foreach, capturable and
             differentiable are refused. On a CPU, torch's fused kernel goes wrong where
             a gradient's strides are not its parameter's; here it does not
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
        fused: bool | None = None,
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
        self._state_pages: dict[Tensor, StatePages] = {}
        self.pager = Pager(page_bytes, budget_bytes)
        self._directory = directory
        self._process = os.getpid()
        self._walks = 0
        super().__init__(params, defaults | DECOUPLED | {"fused": fused} | others)
        for name in others:
            del self.defaults[name]

    # ------------------------------------------------------------- what can be watched

    def page_table(self) -> list[PageEntry]:
        """An entry for each page, in the order of the parameters."""
        return [
            PageEntry(
                param=state_pages.index,
                page=page.number,
                resident=page.slot is not None,
                dirty=page.dirty,
                group=number,
                name=state_pages.name,
                start=page.start,
                stop=page.stop,
                slot=page.slot,
                bytes=page.bytes,
                used=page.used,
            )
            for number, group in enumerate(self.param_groups)
            for state_pages in (self._state_pages[p] for p in group["params"])
            for page in state_pages.pages
        ]

    @property
    def counters(self) -> Counters:
        return self.pager.counters

    @property
    def page_bytes(self) -> int:
        return self.pager.page_bytes

    @property
    def budget_bytes(self) -> int:
        return self.pager.budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget_bytes: int) -> None:
        """A smaller budget drives pages out now, a larger one serves the next step."""
        check_budget(budget_bytes, self.page_bytes)
        before, self.pager.budget_bytes = self.budget_bytes, budget_bytes
        if budget_bytes < before:
            self.pager.fit()

    @property
    def states_bytes(self) -> int:
        """Bytes of all states. A slot for every page takes more if pages are short."""
        return sum(page.bytes for page in self.pager.pages)

    @property
    def arena(self) -> Tensor | None:
        """The slots, one tensor on the device; None before the first step."""
        return self.pager.arena

    @property
    def stores(self) -> list[Tensor]:
        """The tensors in which pages have their places: files, or pinned memory."""
        stores = {id(page.store): page.store.words for page in self.pager.pages}
        return list(stores.values())

    @contextmanager
    def lent(self, bytes: int) -> Iterator[None]:
        """Temporarily give up this many bytes, while another part of a program peaks.

        Raises  ValueError  no whole number, or less than a page would be left
        """
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
        self.pager.fit()
        with self.pager.consistent_on_error():
            self._walk(work)
        return loss

    def _work(self) -> list[tuple[Tensor, dict, StatePages]]:
        """Parameters with a gradient, their groups and pages, in the walk's order."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this optimizer belongs to the process that made it: after a fork both "
                "would write to one file. Make a new one and load its state_dict()"
            )
        work = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state_pages = self._state_pages[p]
                    check_gradient(p, state_pages, group)
                    work.append((p, group, state_pages))
        return work[::-1] if self._walks % 2 else work

    def _walk(self, work: list[tuple[Tensor, dict, StatePages]]) -> None:
        """Update all parameters, in this order; in odd steps each from its end."""
        pager, order = self.pager, -1 if self._walks % 2 else 1
        length = max(1, min(RUN_BYTES // self.page_bytes, pager.slots // 2))
        for p, _, state_pages in work:
            if "step" not in self.state[p]:  # the first step, or somebody cleared it
                for page in state_pages.pages:
                    pager.forget(page)
        runs = [state_pages.runs(length)[::order] for _, _, state_pages in work]
        plain = [pages for _, _, pages in work if not pages.fused]
        words = max((pages.words(length) for pages in plain), default=0)
        scratch = torch.empty(words, dtype=torch.int64, device=pager.device)
        walk = pairwise(chain(*runs, [[]]))  # (run, the next one)
        self._walks += 1
        for (p, group, state_pages), own in zip(work, runs, strict=True):
            state = self.state[p]
            first = "step" not in state
            dtype = step_dtype(group)
            step = torch.tensor(0.0, dtype=dtype) if first else state["step"]
            update_of = FusedAdamW if state_pages.fused else SlicedAdamW
            update = update_of(p, group, step.item() + 1, scratch)
            try:
                for run, next_run in islice(walk, len(own)):
                    self._bring(run[::order], next_run[::order])
                    for part in neighbours(run):
                        states = pager.rows(part, p.dtype, state_pages.states)
                        if not p.dim():
                            states = [state.view(()) for state in states]
                        update(part[0].start, part[-1].stop, *states)
            finally:
                update.finish()
            state["step"] = step.add_(1)

    def _bring(self, run: list[Page], next_run: list[Page]) -> None:
        """Bring all pages of a run into slots, to be written to; ask for the next."""
        for page in run:
            self.pager.use(page)
        if self.pager.slots > 1:
            for page in next_run:
                self.pager.prefetch(page)
        for page in run:
            page.dirty = True

    # -------------------------------------------------------------- groups and states

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; makes the pages of the group and reserves room for them."""
        super().add_param_group(param_group)
        try:
            state_pages = self._lay_out(self.param_groups[-1:], self._state_pages)
        except BaseException:
            del self.param_groups[-1]
            raise
        self._state_pages |= state_pages
        self.pager.pages += _pages(state_pages)

    def state_dict(self) -> dict:
        """The state dict of torch.optim.AdamW, the moments in a new file on CPU.

        torch's refers to its tensors; these stay as they are when steps go on.
        """
        pages = {p: own for p, own in self._state_pages.items() if p in self.state}
        started = {p: own for p, own in pages.items() if "step" in self.state[p]}
        moments = full_states(started, self.pager.peek, self._directory)
        full = {key: s for key, s in self.state.items() if s or key not in pages}
        for p, own in moments.items():
            full[p] = full[p] | own | {"step": full[p]["step"].clone()}
        paged, self.state = self.state, full
        try:
            return super().state_dict()
        finally:
            self.state = paged

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the states, and the groups' settings, of an AdamW: ours or torch's.

        As in torch, a state dict from before `amsgrad` or `maximize` has False for it,
        and the decay is AdamW's, also where the dict is of torch.optim.Adam.

        Raises  ValueError  what is missing or has another form, by name; the optimizer
                is as it was. OSError: no room, likewise
        """
        check_form(state_dict)
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        check_form(state_dict)
        groups = merged_groups(self.param_groups, state_dict["param_groups"])
        states = checked_states(groups, state_dict)
        state_pages = self._lay_out(groups, {})
        for p, saved in states.items():
            for number, name in enumerate(STATES[: state_pages[p].states]):
                state_pages[p].fill(number, in_order(saved[name], p))
        state = type(self.state)(dict)
        state |= other_entries(groups, state_dict)
        for p, saved in states.items():
            state[p]["step"] = saved["step"]
        self._state_pages, self.state, self.param_groups = state_pages, state, groups
        self.pager.replace(_pages(state_pages))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self):
        raise TypeError(
            "a PagedAdamW cannot be copied or pickled: its states are in a file of its "
            "own. Make a new one and load state_dict() into it"
        )

    def _lay_out(self, groups: list[dict], before: dict[Tensor, StatePages]):
        """{parameter: its pages} of these groups, in a store of their own."""
        new: dict[Tensor, StatePages] = {}
        device = self.pager.device
        for group in groups:
            refuse_others(group)
            states, fused = state_count(group), is_fused(group)
            for number, p in enumerate(group["params"]):
                index = len(before) + len(new)
                names = group.get("param_names", {number: f"parameter {index}"})
                name = names[number]
                check_parameter(p, name, states, self.page_bytes, fused)
                device = p.device if device is None else device
                if p.device != device:
                    raise ValueError(
                        f"{name} is on {p.device} and others are on {device}; an arena "
                        "is on one device: make an optimizer for each"
                    )
                if p in new:
                    raise ValueError(f"{name} is in the group twice; list it once")
                of = p, index, name, states, self.page_bytes, fused
                new[p] = StatePages.of(*of)
        if device is not None and device.type == "cuda":
            allocate(new.values(), lambda words: PinnedStore(words, device))
        else:
            allocate(new.values(), lambda words: FileStore(words, self._directory))
        for group in groups:
            for name in OTHERS if is_fused(group) else (*OTHERS, "fused"):
                group.pop(name, None)
        self.pager.device = device
        return new


def _pages(state_pages: dict[Tensor, StatePages]) -> list[Page]:
    return [page for own in state_pages.values() for page in own.pages]
