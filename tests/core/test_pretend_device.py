"""Every law on a device that is not there: no tensor is made in the wrong place.

The cases run in two processes of their own (device_runs.py), which the first test
starts; the tests then look at how each case ended.
"""

import os

import device_runs
import pytest
import torch.utils.backend_registration as registration
from laws.device.bugs import BUGS, anew
from laws.device.cases import SOUND

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device that is written in Python",
)


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory):
    """{case: its outcome}, of the cases that this session looks at."""
    items = [item for item in request.session.items if "outcomes" in item.fixturenames]
    base = tmp_path_factory.getbasetemp()
    both = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return device_runs.shared(
        [item.callspec.params["case"] for item in items], both / "device"
    )


@pytest.mark.parametrize("case", SOUND, ids=SOUND)
def test_a_law_holds_on_the_device(case, outcomes):
    assert outcomes[case].error is None, outcomes[case].error


@pytest.mark.parametrize("case", BUGS, ids=BUGS)
def test_a_tensor_in_the_wrong_place_is_caught(case, outcomes):
    assert outcomes[case].error is None, outcomes[case].error


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_and_is_not_noticed_on_the_cpu(bug):
    with anew(bug):
        device_runs.hold(bug.law)


# ------------------------------------------------------------- the device, and the runs

# What CUDA refuses; `there` is a tensor of the device, `here` one of the CPU.
REFUSED = {
    "an operand": "there + here",
    "a result": "here.clone().add_(there)",
    "a result that is one number": "here[0].add_(there[0])",
    "a number in a list": "torch.stack([there[0], here[0]])",
    "a mask": "torch.where(here > 0, there, 0.0)",
    "a gradient": "Twice.apply(there.clone().requires_grad_()).sum().backward()",
}
INVENTED = """
import os
import torch

there, here = torch.ones(3, device="pretend"), torch.ones(3)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return dy * here


def allowed():
    assert torch.equal((there + here[0]).cpu(), 2 * here)
    assert there[torch.tensor([0, 2])].device.type == "pretend"
    assert there[[0, 2]].tolist() == [1.0, 1.0] and there.sum().item() == 3
    assert torch.equal(here.clone().copy_(2 * there), 2 * here)
    assert torch.tensor([1, 2], device="pretend").device.type == "pretend"


def fails():
    raise ValueError("as it was asked to")


CASES = {"allowed": allowed, "fails": fails, "dies": os.abort, "after it": allowed}
CASES["numpy"] = lambda: there.numpy()
"""


def test_the_device_refuses_what_cuda_refuses(tmp_path, monkeypatch):
    """And a case that fails, or that takes its process with it, is told of."""
    lines = [f"CASES[{name!r}] = lambda: {code}" for name, code in REFUSED.items()]
    (tmp_path / "invented_meetings.py").write_text("\n".join([INVENTED, *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(device_runs, "PROCESSES", 1)
    names = [*REFUSED, "numpy", "allowed", "fails", "dies", "after it"]
    outcomes = device_runs.run(names, tmp_path, "invented_meetings")
    errors = {name: outcome.error for name, outcome in outcomes.items()}
    assert errors["allowed"] is errors["after it"] is None, errors
    for name in REFUSED:
        assert "tensors on two devices, pretend:0 and cpu" in errors[name], name
    assert ".numpy() is not supported" in errors["numpy"]
    assert "as it was asked to" in errors["fails"]
    assert "ended in this case: status -6" in errors["dies"]
