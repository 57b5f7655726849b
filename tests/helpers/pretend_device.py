"""A device that is not there: "pretend", whose tensors keep their numbers on the CPU.

    import pretend_device
    model.to("pretend")

Every operator runs, and computes on the CPU; but one that gets tensors of two devices
raises, as it does on CUDA. So a machine without a GPU can test that a piece of code
makes no tensor on the wrong device. Importing this file registers the device with
torch, for good: it is for a process of its own (device_runs.py starts one), which has
to end with `leave`.

What it does as CUDA does:

    allowed    copies from one device to another; .item(); a CPU tensor of no dimension
               as an operand, though not inside a list and not to be written to;
               positions on the CPU that index a tensor of the device
    refused    all other meetings; .numpy(), and what else would read its memory

What it cannot show: its numbers are the CPU's, and so are their order of summation,
random generators and speed. It has no streams, no autocast and no memory of its own.
"""

import copy
import os
import sys

import torch
import torch.utils.backend_registration as registration
from torch import Tensor

NAME = "pretend"
CPU = torch.device("cpu")


class Module(registration._DummyBackendModule):
    """torch.pretend, as far as torch asks for it."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []  # no autocast


registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
DEVICE = torch.device(NAME, 0)

MOVES = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}
INDEXES = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}


class Pretend(Tensor):
    """A tensor of the device, around the tensor on the CPU that has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})

    def __repr__(self, **_):
        return f"Pretend({self.held})"

    # What torch reads from memory, and not by an operator.

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new: Tensor):
        Tensor.data.__set__(self, new)  # shape, strides and dtype
        self.held = new.held

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __deepcopy__(self, memo):
        assert self.is_leaf, "torch copies the leaves of a graph only"
        if id(self) not in memo:
            copied = Pretend(copy.deepcopy(self.held, memo))
            others = {
                name: value for name, value in vars(self).items() if name != "held"
            }
            vars(copied).update(copy.deepcopy(others, memo))
            copied.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __getitem__(self, index):
        return super().__getitem__(_listless(index))

    def __setitem__(self, index, value):
        super().__setitem__(_listless(index), value)

    def new_tensor(self, data, **options):
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE} | options)


def compute(operator, args: tuple, kwargs: dict):
    """Run an operator on the CPU's tensors, and give the device what belongs there."""
    ours, others = [], []
    plain = [_held(value, ours, others) for value in args]
    named = {name: _held(value, ours, others) for name, value in kwargs.items()}
    if ours and others:
        _refuse_two_devices(operator, args, kwargs)
    device = kwargs.get("device")
    if device is not None:
        named["device"] = CPU
    if kwargs.get("pin_memory"):
        named["pin_memory"] = False
    result = operator(*plain, **named)
    if ours if device is None else torch.device(device).type == NAME:
        written = {id(t.held): t for t in ours} if operator._schema.is_mutable else {}
        return _ours(result, written)
    return result


def _held(value, ours: list[Pretend], others: list[Tensor]):
    """The value with the CPU's tensors in the place of ours; both kinds are listed."""
    kind = type(value)
    if kind is Pretend:
        ours.append(value)
        return value.held
    if kind is list or kind is tuple:
        return kind([_held(each, ours, others) for each in value])
    if isinstance(value, Tensor):
        others.append(value)
    return value


def _ours(value, written: dict[int, Pretend]):
    """The value with tensors of the device in the place of the CPU's."""
    if isinstance(value, Tensor):
        return written[id(value)] if id(value) in written else Pretend(value)
    if isinstance(value, list | tuple):
        return type(value)(_ours(each, written) for each in value)
    return value


def _refuse_two_devices(operator, args: tuple, kwargs: dict) -> None:
    """RuntimeError where CUDA would raise one for tensors of two devices."""
    schema = operator._schema
    if schema.name in MOVES:
        return
    named = {argument.name: argument for argument in schema.arguments}
    given = dict(zip(named, args, strict=False)) | kwargs
    for name, value in given.items():
        argument = named[name]
        written = argument.alias_info is not None and argument.alias_info.is_write
        positions = schema.name in INDEXES and name == "indices"
        _held(value, [], strangers := [])
        for tensor in strangers:
            operand = tensor.dim() == 0 and tensor is value and not written
            if not operand and not positions:
                raise RuntimeError(
                    f"{schema.name} got tensors on two devices, {DEVICE} and cpu: its "
                    f"{name!r} {tuple(tensor.shape)} is on the cpu"
                )


def _listless(index):
    """An index with tensors in the place of lists, which torch would fill itself."""
    if isinstance(index, tuple):
        return tuple(map(_listless, index))
    return torch.tensor(index, device=DEVICE) if isinstance(index, list) else index


def _placed(make):
    """torch.tensor or torch.as_tensor, which fill memory without an operator."""

    def placed(data, *, device=None, requires_grad=False, **options):
        there = device is not None and torch.device(device).type == NAME
        made = make(data, device=CPU if there else device, **options)
        return (made.to(DEVICE) if there else made).requires_grad_(requires_grad)

    return placed


def leave(status: int) -> None:
    """End the process at once: torch does not unload such a device cleanly."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _kernel(operator):
    return lambda *args, **kwargs: compute(operator, args, kwargs)


# For any device at all torch has no kernel of this one, and rounds in between.
KERNELS = torch.library.Library("aten", "IMPL")
KERNELS.impl(
    "silu_backward", _kernel(torch.ops.aten.silu_backward.default), "PrivateUse1"
)
FALLBACK = torch.library.Library("_", "IMPL")
FALLBACK.fallback(lambda op, *args, **kwargs: compute(op, args, kwargs), "PrivateUse1")
torch.tensor, torch.as_tensor = _placed(torch.tensor), _placed(torch.as_tensor)
# In the thread that asks: torch's threads of a device do not survive an error here.
torch.autograd.set_multithreading_enabled(False)
