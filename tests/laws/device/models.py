"""Laws of an adapted model on a device: bit for bit it is its twin on the CPU.

A law is a function (method, architecture). The device is `device.DEVICE`. On the CPU
itself the laws hold; on the device that only pretends to be one, they hold if no tensor
is made in the wrong place. Attention is "eager": its operators are the same on both.
"""

import copy
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from adapter_files import parsed
from device import DEVICE
from model_state import assert_same, gradients, logits, tokens, values
from small_runs import TASK, TOKENIZER, recipe, run

import peft_from_scratch as pfs
from laws.core.contract import Method, original
from laws.methods.table import low_rank
from peft_from_scratch.memory.meter import measured_step
from peft_from_scratch.methods import loftq
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.evaluation import answer_rows
from peft_from_scratch.training.loop import encode_splits
from peft_from_scratch.training.loss import mean_loss, token_losses

CPU = torch.device("cpu")
STEPS = recipe(steps=3, batch=4, validate_every=3, lr=3e-3)
SHORT = SimpleNamespace(
    instruction=TASK.instruction,
    rows=[{"prompt": "ab" * i, "completion": "a"} for i in (1, 4, 2)],
    score=str.__eq__,
)
# Methods that put the model into four bits themselves.
PACKING = [
    Method("qlora-itself", partial(pfs.qlora.inject, r=4, alpha=8), low_rank),
    Method("loftq", partial(loftq.inject, r=4, alpha=8), low_rank),
]


def untouched(method, architecture, device):
    """A model before the injection, on a device."""
    model = copy.deepcopy(original(architecture, prepare=method.prepare)).to(device)
    model.set_attn_implementation("eager")
    return model


def twins(method, architecture):
    """(a model on the device, its twin on the CPU), each injected where it is."""
    both = [untouched(method, architecture, device) for device in (DEVICE, CPU)]
    for model in both:
        torch.manual_seed(7)
        method.inject(model)
    return both


@cache
def trained(method, architecture):
    """The twins after three steps each, and their histories; to be copied, or read."""
    both = twins(method, architecture)
    return both, [run(model, STEPS) for model in both]


def moved(tensors):
    """{name: tensor} with all tensors on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def what_is_injected_is_there(method, architecture):
    """Bit for bit what is injected on the CPU, and every tensor of it on the device."""
    model, twin = twins(method, architecture)
    assert_same(moved(model.state_dict()), twin.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == DEVICE.type, f"{name} is on {tensor.device}"


def logits_and_gradients_are_the_cpus(method, architecture):
    ids = tokens()
    model, twin = trained(method, architecture)[0]
    assert torch.equal(logits(model, ids).cpu(), logits(twin, ids.cpu()))
    found, expected = gradients(model, ids=ids), gradients(twin, ids=ids.cpu())
    assert_same(moved(found), expected)


def the_loop_trains_as_on_the_cpu(method, architecture):
    (model, twin), (history, expected) = trained(method, architecture)
    for figures in ("loss", "lr", "norm", "validation"):
        assert getattr(history, figures) == getattr(expected, figures), figures
    assert_same(moved(values(model)), values(twin))
    assert_same(moved(model.state_dict()), twin.state_dict())


def answers_and_losses_are_the_cpus(method, architecture):
    """Answers in padded batches from a cached prefix; losses of rows and of tokens."""
    found, expected = map(_answers_and_losses, trained(method, architecture)[0])
    assert found == expected


def _answers_and_losses(model):
    rows, validation = encode_splits(TOKENIZER, TASK, STEPS)
    batch = batch_of(validation, model.device)
    with torch.no_grad():
        losses, labelled = token_losses(model, batch)
    answers = answer_rows(model, TOKENIZER, SHORT, SHORT.rows, template="chat", batch=3)
    return (
        answers.answers,
        mean_loss(model, rows[:3], batch=2),
        losses.tolist(),
        labelled.tolist(),
    )


def files_are_the_cpus(method, architecture):
    """The same bytes are written, and what is loaded stands on the device."""
    model, twin = trained(method, architecture)[0]
    with TemporaryDirectory() as folder:
        for each, name in ((model, "device"), (twin, "cpu")):
            pfs.save(each, Path(folder, name))
        (tensors, *said), (expected, *expected_said) = (
            parsed(Path(folder, name)) for name in ("device", "cpu")
        )
        assert_same(tensors, expected)
        assert said == expected_said
        if not method.saved:
            return
        fresh = untouched(method, architecture, DEVICE)
        pfs.load(fresh, Path(folder, "cpu"))
    assert_same(moved(values(fresh)), values(twin))


def merged_and_removed_are_the_cpus(method, architecture):
    model, twin = copy.deepcopy(trained(method, architecture)[0])
    for undo in (pfs.merge, pfs.remove):
        both = copy.deepcopy([model, twin])
        if undo is pfs.remove or method.mergeable:
            found, expected = (undo(each) for each in both)
            assert found == expected
            assert_same(moved(both[0].state_dict()), both[1].state_dict())


def a_resumed_run_is_the_straight_run(method, architecture):
    straight, stopped = (twins(method, architecture)[0] for _ in range(2))
    settings = recipe(steps=3, batch=4, checkpoint_every=1)
    expected = run(straight, settings)
    with TemporaryDirectory() as folder:
        with suppress(StopIteration):
            run(stopped, settings, checkpoints=folder, on_step=_stop_after_two)
        history = run(stopped, settings, checkpoints=folder)
    assert history.resumed_from == 2 and history.loss == expected.loss
    assert_same(values(stopped), values(straight))


def _stop_after_two(history):
    if history.steps == 2:
        raise StopIteration


def a_step_takes_the_cpus_bytes(method, architecture):
    """As counted tensor by tensor, with what only the eager loss makes."""
    found, expected = (
        measured_step(copy.deepcopy(model), TOKENIZER, TASK, STEPS)
        for model in trained(method, architecture)[0]
    )
    assert found == expected


LAWS = [
    what_is_injected_is_there,
    the_loop_trains_as_on_the_cpu,
    logits_and_gradients_are_the_cpus,
    answers_and_losses_are_the_cpus,
    files_are_the_cpus,
    merged_and_removed_are_the_cpus,
    a_step_takes_the_cpus_bytes,
]
