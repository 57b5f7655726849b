"""Changes that undo themselves: training mode, random generators, Ctrl-C.

Training needs dropout on, a seed of its own and steps that are not torn apart; the
caller gets model flags, generators and signal handler back as they were, whatever
happens inside the block.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """model.train(training) inside; every module's own flag as it was afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators start from `seed` inside, and are as they were afterwards."""
    before = rng_state(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(before, device)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators: the CPU's, and that of the model's device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Undo every draw since rng_state; a generator that `state` lacks is left alone."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def held_ctrl_c() -> Iterator[threading.Event]:
    """Ctrl-C only sets the event that is yielded; a second one interrupts at once.

    An interrupt in the middle of an optimizer step would leave weights, moments and
    generators that belong to no step, and that no checkpoint may hold. A Ctrl-C that
    the block did not look at any more is raised at its end, never swallowed.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed  # only the main thread may set a handler
        return

    def answer(number, frame):
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, answer)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if pressed.is_set():
        raise KeyboardInterrupt
