"""Checks of what a paged AdamW is given, and the state dicts that it gives and takes.

Every check is made before anything changes, and names what was wrong, its value, what
is allowed and what to do.
"""

import copy
import math
from collections.abc import Callable, Hashable, Mapping
from numbers import Real

import torch
from torch import Tensor

from ..common.check import shortened, whole
from .layout import REGISTER, StatePages, layout_of, shaped
from .stores import WORD, FileStore

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda")
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # torch's names: m, v, largest v
OF_ADAMW = ("step", *STATES)
SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
OLD = {"amsgrad": False, "maximize": False}  # of state dicts that are older than these
DECOUPLED = {"decoupled_weight_decay": True}  # tells torch.optim.Adam whose decay it is
OTHERS = ("foreach", "capturable", "differentiable")  # torch's, not ours


def state_count(group: dict) -> int:
    return 3 if group["amsgrad"] else 2


def is_fused(group: dict) -> bool:
    return bool(group.get("fused"))


def step_dtype(group: dict) -> torch.dtype:
    """Of torch's step counts: float32; not fused, float64 where that is the default."""
    if is_fused(group):
        return torch.float32
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


# -------------------------------------------------------------- settings, parameters


def check_budget(budget_bytes: int, page_bytes: int) -> None:
    whole("budget_bytes", budget_bytes, 0)
    if budget_bytes < page_bytes:
        raise ValueError(
            f"budget_bytes={budget_bytes} is less than one page, page_bytes="
            f"{page_bytes}; raise the one or lower the other"
        )


def check_settings(settings: dict) -> None:
    """ValueError for a setting out of its range; the ranges are torch's."""
    lr, betas = settings["lr"], settings["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} values; a tensor must have 1")
    for name in ("lr", "eps", "weight_decay"):
        value = settings[name]
        if not (isinstance(value, Real | Tensor) and value >= 0):
            raise ValueError(f"{name}={value!r}: allowed is a number from 0 on")
    pair = betas if isinstance(betas, tuple | list) else ()
    if [isinstance(b, Real) and 0 <= b < 1 for b in pair] != [True, True]:
        raise ValueError(f"{betas=}: allowed are two numbers in [0, 1)")


def refuse_others(group: dict) -> None:
    """ValueError where the group asks for one of torch's other loops, or L2 decay."""
    if not group.get("decoupled_weight_decay", True):
        raise ValueError(
            "decoupled_weight_decay=False is the decay of torch.optim.Adam; PagedAdamW "
            "has that of AdamW: leave it out"
        )
    fused = group.get("fused")
    if fused not in (None, False, True):
        raise ValueError(f"{fused=}: allowed are True and False")
    for name in OTHERS:
        if group.get(name):
            raise ValueError(
                f"{name}={group[name]!r}: PagedAdamW computes page by page, in the "
                "order of torch's foreach=False, or with fused=True by torch's fused "
                "kernel; leave it out"
            )


def check_parameter(
    p: Tensor, name: str, states: int, page_bytes: int, fused: bool = False
) -> None:
    """ValueError for a parameter whose states cannot be paged here."""
    if p.layout != torch.strided or p.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {p.layout} and {p.dtype}; allowed are dense tensors of "
            f"{', '.join(map(str, DTYPES))}"
        )
    if p.device.type not in DEVICES:
        raise ValueError(f"{name} is on {p.device}; allowed are {', '.join(DEVICES)}")
    if any(s == 0 and n > 1 for s, n in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{name} is expanded: its values share memory; clone it first")
    if states * p.itemsize > page_bytes:
        raise ValueError(
            f"{page_bytes=}: {name} needs at least {states * p.itemsize}, one value of "
            f"each of {states} states"
        )
    if fused and states * REGISTER > page_bytes:
        raise ValueError(
            f"{page_bytes=}: with fused=True, {name} needs at least "
            f"{states * REGISTER}, {REGISTER} bytes of each of {states} states"
        )


def check_gradient(p: Tensor, pages: StatePages, group: dict) -> None:
    """RuntimeError unless parameter, gradient and group fit the pages."""
    if layout_of(p) != pages.layout:
        raise RuntimeError(
            f"{pages.name} was {pages.layout} when its pages were made and is "
            f"{layout_of(p)} now (dtype, device, shape, strides); make the optimizer "
            "afterwards"
        )
    if state_count(group) != pages.states:
        raise RuntimeError(
            f"amsgrad={group['amsgrad']} was set after the pages of {pages.name} were "
            "made; make a new optimizer with it"
        )
    if is_fused(group) != pages.fused:
        raise RuntimeError(
            f"fused={group.get('fused')} was set after the pages of {pages.name} were "
            "made; make a new optimizer with it"
        )
    if p.grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {pages.name} is {p.grad.layout}; AdamW needs all of its "
            "values. Use sparse=False where it comes from, or torch.optim.SparseAdam"
        )
    of_gradient = p.grad.dtype, p.grad.device, p.grad.shape
    if of_gradient != pages.layout[:3]:
        raise RuntimeError(
            f"the gradient of {pages.name} is {of_gradient}, the parameter "
            f"{pages.layout[:3]} (dtype, device, shape); they must be the same"
        )


# ------------------------------------------------------------------------- a state dict


@torch.no_grad()
def full_states(
    state_pages: dict[Tensor, StatePages], peek: Callable, directory
) -> dict:
    """{parameter: {"exp_avg": …, …}}, each moment whole, all in one new file.

    Args
        state_pages  {parameter: its pages}
        peek         page -> its words, wherever they are
    """
    sizes = [own.states * -(-p.nbytes // WORD) for p, own in state_pages.items()]
    parts = FileStore(sum(sizes), directory).words[: sum(sizes)].split(sizes)
    full = {}
    for (p, own), words in zip(state_pages.items(), parts, strict=True):
        moments = words.view(own.states, -1).view(p.dtype)[:, : p.numel()]
        for page in own.pages:
            moments[:, page.start : page.stop] = own.rows(page, peek(page))
        named = zip(STATES[: own.states], moments, strict=True)
        full[p] = {name: shaped(moment, p) for name, moment in named}
    return full


def check_form(state_dict) -> None:
    """ValueError unless it is {"state": {…}, "param_groups": [{"params": […]}, …]}."""
    _require(state_dict, Mapping, "it", "a dict")
    for part, kind, of_kind in (
        ("state", Mapping, "a dict"),
        ("param_groups", list | tuple, "a list"),
    ):
        if part not in state_dict:
            has = ", ".join(map(repr, state_dict)) or "no key"
            raise ValueError(f"the state dict has no {part!r}; it has {has}")
        _require(state_dict[part], kind, repr(part), of_kind)
    for number, group in enumerate(state_dict["param_groups"]):
        _require(group, Mapping, f"group {number}", "a dict")
        params = group.get("params")
        _require(params, list | tuple, f"'params' of group {number}", "a list")
        for key in params:
            _require(key, Hashable, f"a key in 'params' of group {number}", "a number")


def _require(value, kind, what: str, of_kind: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(
            f"the state dict cannot be loaded: {what} is {shortened(value)}; it must "
            f"be {of_kind}, as state_dict() gives it"
        )


def merged_groups(ours: list[dict], saved: list[dict]) -> list[dict]:
    """New groups with the saved settings and our parameters."""
    sizes = [[len(group["params"]) for group in groups] for groups in (ours, saved)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state dict has groups of {sizes[1]} parameters, this optimizer of "
            f"{sizes[0]}; they must be the same"
        )
    merged = []
    for number, (mine, their) in enumerate(zip(ours, saved, strict=True)):
        theirs = OLD | {**their}
        missing = [name for name in SETTINGS if name not in theirs]
        if missing:
            raise ValueError(f"group {number} of the state dict has no {missing[0]!r}")
        left = (*OTHERS, *DECOUPLED, "params")
        settings = {k: copy.deepcopy(v) for k, v in theirs.items() if k not in left}
        check_settings(settings)
        names = {k: v for k, v in mine.items() if k == "param_names"}
        merged.append({"params": mine["params"]} | names | settings | DECOUPLED)
    return merged


def checked_states(groups: list[dict], state_dict: dict) -> dict[Tensor, dict]:
    """{parameter: {"step": …, "exp_avg": …, …}} of those that have made a step."""
    places, states = _places(groups, state_dict), {}
    for key, saved in state_dict["state"].items():
        if key not in places and _is_of_adamw(saved):
            raise ValueError(
                f"the state dict has a state of {key!r}, which is in none of its groups"
            )
        if key in places:
            _require(saved, Mapping, f"the state of parameter {key!r}", "a dict")
            p, group = places[key]
            if _is_of_adamw(saved):
                moments = {
                    name: _moment(key, name, saved.get(name), p)
                    for name in STATES[: state_count(group)]
                }
                step = _step(key, saved.get("step"), step_dtype(group))
                states[p] = {"step": step, **moments}
    return states


def other_entries(groups: list[dict], state_dict: dict) -> dict:
    """What hooks wrote into the states, in the parameter's dtype, as torch keeps it.

    Returns  {parameter: {name: value}} without what AdamW itself keeps, and the entries
             that are of no parameter
    """
    places, others = _places(groups, state_dict), {}
    for key, saved in state_dict["state"].items():
        if key in places:
            p, _ = places[key]
            others[p] = {
                name: value.to(p) if isinstance(value, Tensor) else copy.deepcopy(value)
                for name, value in saved.items()
                if name not in OF_ADAMW
            }
        else:
            others[key] = saved
    return others


def _places(groups: list[dict], state_dict: dict) -> dict[Hashable, tuple]:
    """{key in the state dict: (our parameter, its new group)}."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    ours = [(p, group) for group in groups for p in group["params"]]
    if len(set(keys)) < len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the groups of the state dict name {twice!r} twice")
    return dict(zip(keys, ours, strict=True))


def _is_of_adamw(saved) -> bool:
    """Whether this is the state of a parameter that has made a step."""
    return isinstance(saved, Mapping) and not saved.keys().isdisjoint(OF_ADAMW)


def _step(key, step, dtype: torch.dtype) -> Tensor:
    try:
        value = float(step)
    except (TypeError, ValueError, RuntimeError):  # None, a word, a tensor of two
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"'step' of parameter {key!r} in the state dict is {step!r}; it must be a "
            "number of steps"
        )
    return torch.tensor(value, dtype=dtype)


def _moment(key, name: str, moment, p: Tensor) -> Tensor:
    if not isinstance(moment, Tensor) or moment.shape != p.shape:
        value = list(moment.shape) if isinstance(moment, Tensor) else repr(moment)
        raise ValueError(
            f"{name!r} of parameter {key!r} in the state dict is {value}; it must be a "
            f"tensor of shape {list(p.shape)}"
        )
    return moment.detach()
