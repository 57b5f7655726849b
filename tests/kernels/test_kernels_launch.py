"""Where and when a kernel runs: which device, thread, backend, dtype and graph.

No GPU is here: CUDA's answers are stand-ins, and threads are Python's own.
"""

import threading
from contextlib import contextmanager

import pytest
import torch
from planting import Bug, each_is_caught, law
from torch.nn import functional as F

from peft_from_scratch import nf4
from peft_from_scratch.kernels import (
    Stack,
    choose,
    gather_lora,
    language,
    lora_linear,
    nf4_lora_linear,
)

pytestmark = pytest.mark.skipif(not language.INSTALLED, reason="Triton: Linux alone")
BRAIN = torch.bfloat16


def operands(m=5, k=24, n=17, r=3):
    """x, W, A, B and bias, all with gradients."""
    shapes = ((m, k), (n, k), (r, k), (n, r), (n,))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


# ------------------------------------------------------------------------ The device


class Kernel:
    """Notes which tensor's device is current as it runs."""

    def __init__(self):
        self.current, self.ran_on = [], []

    def __getitem__(self, grid):
        return lambda **_: self.ran_on.append(self.current[-1])

    @contextmanager
    def device_of(self, tensor):
        self.current.append(tensor)
        yield
        self.current.pop()


@law
def a_kernel_runs_on_its_tensors_device(monkeypatch):
    """Triton launches on the current device, which need not be the tensors' one."""
    kernel, x = Kernel(), torch.ones(3)
    kernel.current.append("another GPU")
    monkeypatch.setattr(torch.cuda, "device_of", kernel.device_of)
    for arguments in ({"size": 3, "x": x}, {"h": None, "x": (x, 1, 1)}):
        language.launch(kernel, (1,), arguments, {})
    assert all(tensor is x for tensor in kernel.ran_on) and len(kernel.ran_on) == 2


# ----------------------------------------------------------------------- The threads


def in_a_thread(act):
    """Run `act` as autograd runs a CUDA device's backward pass: in another thread."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


@law
def the_backward_pass_is_observed_in_any_thread():
    x, W, A, B, bias = operands()
    seen = []
    y = lora_linear(x, W.detach(), A, B, 0.5, bias, backend="triton")
    with language.observed(lambda launch: seen.append(launch.kernel.__name__)):
        in_a_thread(lambda: y.sum().backward())
    assert seen.count("_product") == 1 and seen.count("_over_rows") == 2
    assert A.grad is not None


@law
def the_backward_pass_is_recorded_in_any_thread():
    """Recorded, nothing runs: tensors without memory would be read."""
    meta = [t.detach().to("meta").requires_grad_() for t in operands()]
    with language.recorded() as log:
        y = lora_linear(*meta[:4], 0.5, meta[4], backend="triton")
        forward = len(log)
        in_a_thread(lambda: y.backward(torch.empty_like(y)))
    assert len(log) == forward + 4  # dx and dh, dW, dA, dB


@law
def the_innermost_listener_hears(monkeypatch):
    for name in ("_recorders", "_observers"):  # a listener that stays, stays in these
        monkeypatch.setattr(language, name, {})
    outer, inner = [], []
    with language.observed(outer.append), language.recorded() as log:
        with language.observed(inner.append), language.recorded() as own:
            language.launch(None, (1,), {}, {})
        language.launch(None, (2,), {}, {})
    assert (
        [launch.grid for launch in inner] == [launch.grid for launch in own] == [(1,)]
    )
    assert (
        [launch.grid for launch in outer] == [launch.grid for launch in log] == [(2,)]
    )


# ----------------------------------------------------------------------- The backend


def on_a_gpu_of(monkeypatch, capability, hip=None):
    monkeypatch.setattr(language, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


@law
def triton_is_taken_where_it_has_matrix_units(monkeypatch):
    on_a_gpu_of(monkeypatch, (7, 5))  # a T4
    assert choose("cuda:0") == choose("cuda:0", "torch") == "torch"
    with pytest.raises(ValueError, match=r"cuda:0, of compute capability 7\.5.*torch'"):
        choose("cuda:0", "triton")
    for capability, hip in (((8, 0), None), ((12, 0), None), ((7, 5), "6.4")):
        on_a_gpu_of(monkeypatch, capability, hip)
        assert choose("cuda:0") == choose("cuda:0", "triton") == "triton"


# ------------------------------------------------------------------ Autocast, compile


@law
@pytest.mark.parametrize("backend", ["torch", "triton"])
def autocast_is_that_of_a_linear_layer(backend="triton"):
    """The result's dtype and values, and the gradients' dtypes; a mixed x as well."""
    x, W, A, B, bias = operands()
    with torch.autocast("cpu", BRAIN):
        for given in (x, x.to(BRAIN)):
            y = lora_linear(given, W, A, B, 0.5, bias, backend=backend)
            assert y.dtype == F.linear(given, W, bias).dtype == BRAIN
            low = [t.detach().to(BRAIN) for t in (x, W, A, B)]
            same = lora_linear(*low, 0.5, bias.detach().to(BRAIN), backend=backend)
            assert torch.equal(y, same)
        q = nf4.quantize(W.detach())
        in_four = nf4_lora_linear(x, q, A, B, 0.5, bias, backend=backend)
        assert in_four.dtype == BRAIN
    grads = torch.autograd.grad(y.float().sum(), (x, W, A, B, bias))
    assert all(grad.dtype == torch.float32 for grad in grads)


@law
def float64_is_left_alone_by_autocast():
    x, W, A, B, bias = (t.detach().double() for t in operands())
    with torch.autocast("cpu", BRAIN):
        assert lora_linear(x, W, A, B, 0.5, bias).dtype == torch.float64


@law
def a_compiled_model_may_call_the_kernels():
    """A graph break: torch.compile does not look into a launch."""
    x, W, A, B, bias = (t.detach() for t in operands())
    q, stack = nf4.quantize(W), Stack.of([(A, B, 0.5)])

    def model(x):
        y = lora_linear(x + 1, W, A, B, 0.5, bias, backend="triton")
        y = y + nf4_lora_linear(x, q, A, B, 0.5, backend="triton")
        which = torch.zeros(len(x), dtype=torch.int64)
        return gather_lora(y, x, stack, which, backend="triton") * 2

    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


# ----------------------------------------------------------------------- Planted bugs

BUGS = {
    "on the current device": Bug(
        language.launch,
        "with torch.cuda.device_of(first_tensor(arguments)):",
        "if True:",
        a_kernel_runs_on_its_tensors_device,
    ),
    "the outermost listener hears": Bug(
        language.launch, "(_recorders.values())[-1]", "(_recorders.values())[0]",
        the_innermost_listener_hears,
    ),
    "a listener stays": Bug(
        language._entered.__wrapped__, "del listeners[token]", "pass",
        the_innermost_listener_hears,
    ),
    "None is Triton on a T4": Bug(
        language.choose, " and not _too_old(device)", "",
        triton_is_taken_where_it_has_matrix_units,
    ),
    "Triton runs on a T4": Bug(
        language.choose, "raise ValueError(reason)", "pass",
        triton_is_taken_where_it_has_matrix_units,
    ),
    "AMD's numbers for NVIDIA's": Bug(
        language._too_old, " or torch.version.hip is not None", "",
        triton_is_taken_where_it_has_matrix_units,
    ),
    "x alone is cast": Bug(
        lora_linear,
        "x, W, A, B, bias = as_autocast(x.device, x, W, A, B, bias)",
        "x, = as_autocast(x.device, x)",
        autocast_is_that_of_a_linear_layer,
    ),
    "four bits without autocast": Bug(
        nf4_lora_linear, "= as_autocast(x.device, x, A, B, bias)", "= x, A, B, bias",
        autocast_is_that_of_a_linear_layer,
    ),
    "float64 is cast": Bug(
        language.as_autocast, "t is None or t.dtype == torch.float64", "t is None",
        float64_is_left_alone_by_autocast,
    ),
}  # fmt: skip


CAUGHT = (AssertionError, ValueError, pytest.fail.Exception)
test_a_planted_bug_is_caught = each_is_caught(BUGS, CAUGHT)


def test_context_variables_would_be_caught(monkeypatch):
    """What was here before: a backward pass of another thread was neither seen …"""
    of_a_thread = threading.local()

    class OfThisThread(dict):
        def values(self):
            return getattr(of_a_thread, "values", {}).values()

        def __setitem__(self, token, listener):
            of_a_thread.values = {token: listener}

        def __delitem__(self, token):
            del of_a_thread.values

    monkeypatch.setattr(language, "_observers", OfThisThread())
    with pytest.raises(AssertionError):
        the_backward_pass_is_observed_in_any_thread()


@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
def test_a_compiler_that_looks_into_a_launch_is_caught(monkeypatch):
    import peft_from_scratch.kernels as kernels

    monkeypatch.setitem(globals(), "lora_linear", kernels.lora.lora_linear.__wrapped__)
    with pytest.raises(Exception):  # noqa: B017  of the compiler's many kinds
        a_compiled_model_may_call_the_kernels()
