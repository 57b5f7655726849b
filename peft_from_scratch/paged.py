"""Paged AdamW: the optimizer's states live in a file, a few pages of them in memory.

AdamW keeps two numbers for every one that it trains, twice the bytes of the weights.
They are needed once a step, one after the other. So they need not all be there: QLoRA
(arXiv:2305.14314, section 3) pages them between GPU and host. Here that is written out,
on any machine, so that it can be watched: who is resident, who leaves, what is copied.

A *page* holds all states (m, v, and the largest v with amsgrad) of one slice of one
parameter. A step walks over the pages: bring some in, update their slice of the weights,
go on. Every operation of AdamW is elementwise, so the slices do not know of each other,
and the weights are those of torch.optim.AdamW(foreach=False), bit for bit, whatever
the budget. pages.py has the pages and the policy, this file the optimizer:

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

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .pages import WORD, Counters, FileStore, Page, Pager, PinnedStore

RUN_BYTES = 1 << 20  # of the pages that are updated together
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # torch's names of m, v, largest v
OTHERS = ("foreach", "fused", "capturable", "differentiable")  # torch's, not ours
NEEDED = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")


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


@dataclass
class Cut:
    """A parameter's states, cut into pages."""

    index: int
    name: str
    like: tuple  # dtype, device, shape at that time
    states: int  # 2, or 3 with amsgrad
    pages: list[Page] = field(default_factory=list)


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
    Memory   device: the arena, at most budget_bytes; beside it, during a step, one or
             two values for each one of a run (at most RUN_BYTES / 2 each), a copy of a
             gradient whose strides are not its parameter's, of a parameter with gaps.
             Store: the states, 2 · parameters · itemsize bytes (3 with amsgrad)
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
        page_bytes: int = 65536,
        directory: str | os.PathLike | None = None,
        **others,
    ):
        values = (lr, betas, eps, weight_decay, amsgrad, maximize)
        defaults = dict(zip(NEEDED, values, strict=True))
        _check(defaults)
        for name in others.keys() - set(OTHERS):
            raise TypeError(f"PagedAdamW has no argument {name!r}")
        _whole("page_bytes", page_bytes, WORD)
        if page_bytes % WORD:
            raise ValueError(f"{page_bytes=}: allowed are multiples of {WORD} bytes")
        _refuse_small(budget_bytes, page_bytes)
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
        _refuse_small(budget_bytes, self.page_bytes)
        before, self._pager.budget_bytes = self.budget_bytes, budget_bytes
        if budget_bytes < before:
            self._pager.fit()

    @contextmanager
    def lent(self, bytes: int) -> Iterator[None]:
        """Inside, the budget is smaller by that much: a spike of somebody else's."""
        _whole("bytes", bytes, 0)
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

    def _work(self) -> list[tuple[Tensor, dict]]:
        """The parameters with a gradient, each with its group, in the walk's order."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this optimizer belongs to the process that made it: after a fork both "
                "would write to one file. Make a new one and load its state_dict()"
            )
        work = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _refuse_changed(p, self._cuts[p], group)
                    work.append((p, group))
        return work[::-1] if self._walks % 2 else work

    def _walk(self, work: list[tuple[Tensor, dict]]) -> None:
        pager, order = self._pager, -1 if self._walks % 2 else 1
        length = max(1, min(RUN_BYTES // self.page_bytes, pager.slots // 2))
        runs = {p: _runs(self._cuts[p].pages, length)[::order] for p, _ in work}
        coming = chain(chain.from_iterable(runs.values()), [[]])
        next(coming)
        self._walks += 1
        for p, group in work:
            cut, state = self._cuts[p], self.state[p]
            if not state:  # the first step, or the state was cleared
                for page in cut.pages:
                    pager.forget(page)
            step = state.get("step", torch.tensor(0.0, dtype=_step_dtype()))
            update = Update(p, group, step.item() + 1, _values(cut, length))
            for run in runs[p]:
                for page in run[::order]:
                    pager.use(page)
                following = next(coming)
                if pager.slots > 1:
                    for page in following[::order]:
                        pager.prefetch(page)
                for page in run:
                    page.dirty = True
                for _, part in groupby(run, _neighbours):
                    part = list(part)
                    rows = pager.rows(part, p.dtype, cut.states)
                    update(part[0].start, part[-1].stop, *rows)
            update.finish()
            state["step"] = step.add_(1)

    # -------------------------------------------------------------- groups and states

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; the pages of the group are made, and room for them is reserved."""
        super().add_param_group(param_group)
        try:
            cuts = self._lay_out(self.param_groups[-1:], first=len(self._cuts))
        except BaseException:
            del self.param_groups[-1]
            raise
        self._cuts |= cuts
        self._pager.pages += _pages(cuts)

    def state_dict(self) -> dict:
        """What torch.optim.AdamW's would be, the moments in a new file on CPU.

        Not references, as torch's: the tensors stay as they are when steps go on.
        """
        paged, self.state = self.state, self._gathered()
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
        groups = _merged_groups(self.param_groups, state_dict["param_groups"])
        states = _checked_states(groups, state_dict)
        cuts = self._lay_out(groups, first=0)
        state = type(self.state)(dict)
        for p, saved in states.items():
            state[p] = {"step": saved["step"]}
            for name, values in list(saved.items())[1:]:
                _fill(cuts[p], STATES.index(name), _in_order(values, p))
        self._cuts, self.state, self.param_groups = cuts, state, groups
        self._pager.replace(_pages(cuts))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self):
        raise TypeError(
            "a PagedAdamW cannot be copied or pickled: its states are in a file of its "
            "own. Make a new one and load state_dict() into it"
        )

    def _lay_out(self, groups: list[dict], first: int) -> dict[Tensor, Cut]:
        """Pages for all parameters of these groups, in a store of their own."""
        cuts, words = {}, 0
        for group in groups:
            for name in OTHERS:
                if group.get(name):
                    raise ValueError(
                        f"{name}={group[name]!r}: PagedAdamW computes page by page, in "
                        "the order of torch's foreach=False; leave it out"
                    )
                group.pop(name, None)
            for number, p in enumerate(group["params"]):
                index = first + len(cuts)
                name = group.get("param_names", {number: f"parameter {index}"})[number]
                if p in cuts or (first and p in self._cuts):
                    raise ValueError(f"{name} is listed twice; list it once")
                states = 3 if group["amsgrad"] else 2
                self._refuse(p, name, states)
                cuts[p] = Cut(index, name, _likeness(p), states)
                words += self._cut(p, cuts[p], words)
        if self._pager.device.type == "cuda":
            store = PinnedStore(words, self._pager.device)
        else:
            store = FileStore(words, self._directory)
        for page in _pages(cuts):
            page.store = store
        return cuts

    def _refuse(self, p: Tensor, name: str, states: int) -> None:
        """ValueError for a parameter that cannot be paged here."""
        if p.layout != torch.strided or p.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {p.layout} and {p.dtype}; allowed are dense tensors of "
                f"{', '.join(map(str, DTYPES))}"
            )
        if p.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} is on {p.device}; allowed are cpu and cuda")
        if self._pager.device is None:
            self._pager.device = p.device
        if p.device != self._pager.device:
            raise ValueError(
                f"{name} is on {p.device} and others are on {self._pager.device}; the "
                "arena is on one device: make an optimizer for each"
            )
        if states * p.itemsize > self.page_bytes:
            raise ValueError(
                f"page_bytes={self.page_bytes}: {name} needs at least "
                f"{states * p.itemsize}, {states} states of {p.itemsize} bytes"
            )

    def _cut(self, p: Tensor, cut: Cut, place: int) -> int:
        """Make a parameter's pages, the first at `place`; returns their words."""
        length = self.page_bytes // (cut.states * p.itemsize)  # values in a page
        first = place
        for start in range(0, p.numel(), length):
            stop = min(start + length, p.numel())
            size = cut.states * (stop - start) * p.itemsize
            page = Page(len(cut.pages), start, stop, None, place, size)
            cut.pages.append(page)
            place += page.words
        return place - first

    def _gathered(self) -> dict[Tensor, dict]:
        """The full states of every parameter that has any."""
        held = [(p, self._cuts[p]) for p, state in self.state.items() if state]
        words = [cut.states * -(-p.nbytes // WORD) for p, cut in held]
        room, gathered = FileStore(sum(words), self._directory).words, {}
        for (p, cut), size in zip(held, words, strict=True):
            mine, room = room[:size], room[size:]
            full = mine.view(cut.states, -1).view(p.dtype)[:, : p.numel()]
            for page in cut.pages:
                rows = _rows(self._pager.look(page), page, p.dtype, cut.states)
                full[:, page.start : page.stop] = rows if _known(page) else 0
            moments = {n: _shaped(x, p) for n, x in zip(STATES, full, strict=False)}
            gathered[p] = {"step": self.state[p]["step"].clone(), **moments}
        return gathered


class Update:
    """AdamW on one parameter, [1] Algorithm 2, slice by slice.

    The letters are the paper's, but for γ (lr) and λ (weight_decay) as torch has them.
    The order of operations is that of torch's _single_tensor_adam, so that the bits are.
    """

    def __init__(self, p: Tensor, group: dict, t: float, largest: int):
        self.beta1, self.beta2 = group["betas"]
        self.eps, self.maximize = group["eps"], group["maximize"]
        lr, weight_decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = lr.squeeze()
        self.decay = 1 - lr * weight_decay if weight_decay != 0 else None
        self.size = lr / (1 - self.beta1**t)
        self.root = (1 - self.beta2**t) ** 0.5
        self.whole, self.p = p, _in_order(p.detach(), p)
        self.g = _in_order(p.grad.detach(), p)
        self.scratch = torch.empty_like(self.p[:largest])
        self.negative = torch.empty_like(self.scratch) if self.maximize else None

    def __call__(
        self, start: int, stop: int, m: Tensor, v: Tensor, top: Tensor | None = None
    ) -> None:
        """Values start … stop; all tensors (pages, values of a page), or scalars."""
        shape = m.shape if self.whole.dim() else ()
        m, v = m.view(shape), v.view(shape)
        p, g = self.p[start:stop].view(shape), self.g[start:stop].view(shape)
        h = self.scratch[: stop - start].view(shape)
        # g ← −g, where the objective is maximized
        if self.maximize:
            g = torch.neg(g, out=self.negative[: stop - start].view(shape))
        # θ ← θ − γ λ θ
        if self.decay is not None:
            p.mul_(self.decay)
        # m ← β1 m + (1 − β1) g
        m.lerp_(g, 1 - self.beta1)
        # v ← β2 v + (1 − β2) g²
        v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        # v_max ← max(v_max, v), which takes v's place below
        if top is not None:
            top = top.view(shape)
            v = torch.maximum(top, v, out=top)
        # h = √v / √(1 − β2^t) + ε
        torch.sqrt(v, out=h).div_(self.root).add_(self.eps)
        # θ ← θ − γ / (1 − β1^t) · m / h
        p.addcdiv_(m, h, value=-self.size)

    def finish(self) -> None:
        """A parameter with gaps was worked on in a copy."""
        if self.p._base is None or self.p.data_ptr() != self.whole.data_ptr():
            self.whole.detach().copy_(self.p.view(self.whole.shape))


def _in_order(t: Tensor, p: Tensor) -> Tensor:
    """The values of `t`, of p's shape, in the order in which p's memory has them: (n,).

    A view of `t` where its strides allow it. Where p has gaps, the order is that of its
    indices, and the values are a copy.
    """
    if p.is_contiguous() or not _dense(p):
        return t.reshape(-1)
    if t.stride() != p.stride():
        t = torch.empty_like(p, dtype=t.dtype, device=t.device).copy_(t)
    return t.as_strided((p.numel(),), (1,))


def _shaped(values: Tensor, p: Tensor) -> Tensor:
    """The inverse of `_in_order`: (n,) in the shape of p."""
    if p.is_contiguous() or not _dense(p):
        return values.view(p.shape)
    return values.as_strided(p.shape, p.stride())


def _dense(p: Tensor) -> bool:
    """Whether p's values lie side by side, in whatever order."""
    return torch.empty_like(p, device="meta").stride() == p.stride()


def _likeness(p: Tensor) -> tuple:
    return p.dtype, p.device, p.shape, None if p.is_contiguous() else p.stride()


def _pages(cuts: dict[Tensor, Cut]) -> list[Page]:
    return [page for cut in cuts.values() for page in cut.pages]


def _runs(pages: list[Page], length: int) -> list[list[Page]]:
    return [pages[i : i + length] for i in range(0, len(pages), length)]


def _values(cut: Cut, length: int) -> int:
    """The values of the parameter's longest run."""
    return sum(page.stop - page.start for page in cut.pages[:length])


def _neighbours(page: Page) -> tuple:
    """Equal for pages of one size whose slots follow each other as they do."""
    return page.slot - page.number, page.stop - page.start


def _known(page: Page) -> bool:
    return page.stored or page.slot is not None


def _rows(words: Tensor, page: Page, dtype: torch.dtype, states: int) -> Tensor:
    """A page's words as (states, values)."""
    n = page.stop - page.start
    return words.view(dtype)[: states * n].view(states, n)


def _fill(cut: Cut, state: int, values: Tensor) -> None:
    """Write one state of a parameter, in order, to the store."""
    for page in cut.pages:
        words = page.store.words[page.place : page.place + page.words]
        rows = _rows(words, page, cut.like[0], cut.states)
        rows[state].copy_(values[page.start : page.stop])
        page.stored = True


def _merged_groups(ours: list[dict], saved: list[dict]) -> list[dict]:
    """New groups: the saved settings, our parameters; ValueError unless they fit."""
    sizes = [len(group["params"]) for group in ours], [len(g["params"]) for g in saved]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state dict has groups of {sizes[1]} parameters, this optimizer of "
            f"{sizes[0]}; they must be the same"
        )
    merged = []
    for number, (mine, theirs) in enumerate(zip(ours, saved, strict=True)):
        missing = [name for name in NEEDED if name not in theirs]
        if missing:
            raise ValueError(f"group {number} of the state dict has no {missing[0]!r}")
        ignored = (*OTHERS, "params", "decoupled_weight_decay")
        group = {k: copy.deepcopy(v) for k, v in theirs.items() if k not in ignored}
        names = {k: v for k, v in mine.items() if k == "param_names"}
        merged.append({"params": mine["params"]} | names | group)
    return merged


def _checked_states(groups: list[dict], state_dict: dict) -> dict[Tensor, dict]:
    """{parameter: {"step": …, "exp_avg": …, …}}; ValueError unless all is there."""
    keys = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    ours = [(p, group) for group in groups for p in group["params"]]
    places = dict(zip(keys, ours, strict=True))
    states = {}
    for key, saved in state_dict["state"].items():
        if key not in places:
            raise ValueError(
                f"the state dict has a state of parameter {key!r}; its groups do not"
            )
        p, group = places[key]
        needed = STATES if group["amsgrad"] else STATES[:2]
        if saved:  # {} is a parameter that made no step yet
            states[p] = {"step": _checked_step(key, saved.get("step"))}
            states[p] |= {n: _checked_moment(key, n, saved.get(n), p) for n in needed}
    return states


def _checked_step(key, step) -> Tensor:
    value = math.nan if step is None else float(step)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"'step' of parameter {key!r} in the state dict is {step!r}; it must be a "
            "number of steps"
        )
    return torch.tensor(value, dtype=_step_dtype())


def _checked_moment(key, name: str, moment, p: Tensor) -> Tensor:
    if not isinstance(moment, Tensor) or moment.shape != p.shape:
        found = list(moment.shape) if isinstance(moment, Tensor) else repr(moment)
        raise ValueError(
            f"{name!r} of parameter {key!r} in the state dict is {found}; it must be a "
            f"tensor of shape {list(p.shape)}"
        )
    return moment.detach()


def _step_dtype() -> torch.dtype:
    """Of torch's step counts: float32, float64 where that is the default."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _refuse_changed(p: Tensor, cut: Cut, group: dict) -> None:
    """RuntimeError unless the parameter, its gradient and its group fit the pages."""
    if _likeness(p) != cut.like:
        raise RuntimeError(
            f"{cut.name} is {_likeness(p)} now, and was {cut.like} (dtype, device, "
            "shape, strides) when its pages were made; make the optimizer afterwards"
        )
    if (3 if group["amsgrad"] else 2) != cut.states:
        raise RuntimeError(
            f"amsgrad={group['amsgrad']} was set after the pages of {cut.name} were "
            "made; make a new optimizer with it"
        )
    if p.grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {cut.name} is {p.grad.layout}: AdamW needs all values of "
            "it. Use sparse=False where it comes from, or torch.optim.SparseAdam"
        )
    like = p.grad.dtype, p.grad.device, p.grad.shape
    if like != cut.like[:3]:
        raise RuntimeError(
            f"the gradient of {cut.name} is {like}, the parameter {cut.like[:3]} "
            "(dtype, device, shape); they must be the same"
        )


def _check(defaults: dict) -> None:
    """ValueError for a setting out of its range."""
    lr, betas = defaults["lr"], defaults["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} values; a tensor must have 1")
    for name in ("lr", "eps", "weight_decay"):
        if not defaults[name] >= 0:
            raise ValueError(f"{name}={defaults[name]}: allowed is a number from 0 on")
    for beta in betas:
        if isinstance(beta, Tensor) or not 0 <= beta < 1:
            raise ValueError(f"{betas=}: allowed are two numbers in [0, 1)")


def _whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: allowed is a whole number from {least} on")


def _refuse_small(budget_bytes: int, page_bytes: int) -> None:
    _whole("budget_bytes", budget_bytes, 0)
    if budget_bytes < page_bytes:
        raise ValueError(
            f"budget_bytes={budget_bytes} is less than one page, page_bytes="
            f"{page_bytes}; raise the one or lower the other"
        )
