"""train() that keeps less: layers computed twice, and the loss in chunks."""

import inspect
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch
from kill_and_resume import contents
from laws.core.contract import fresh, original
from laws.methods.table import METHODS
from model_state import assert_same, largest, refused, values
from planting import Bug, each_is_caught, law
from small_runs import ROWS, TASK, TOKENIZER, adapted, recipe, run

from peft_from_scratch.memory import meter
from peft_from_scratch.training import abilities, checkpoint, chunked_loss, loop
from peft_from_scratch.training.config import TrainConfig
from peft_from_scratch.training.gradient_checkpointing import decoder_layers

BY_NAME = {method.name: method for method in METHODS}
CASES = [
    (method.name, architecture)
    for method in METHODS
    for architecture in ("gpt2", "llama")
    if architecture in method.architectures
]
LESS = dict(checkpointing=True, chunk=5)
WAYS = {
    "checkpointing": dict(checkpointing=True),
    "chunks": dict(chunk=5),
    "both": LESS,
}
CHAT = {  # of several turns: labels in two places of a row
    "messages": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "abab"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "ab"},
    ]
}


def figures(history):
    """What a run says of itself, as float64."""
    whole = asdict(history)
    names = [name for name in ("loss", "norm", "validation") if whole[name]]
    return {n: torch.tensor(whole[n], dtype=torch.float64) for n in names}


# The same training --------------------------------------------------------------------


@law
@pytest.mark.parametrize("method, architecture", CASES)
def every_method_trains_the_same(method="lora-dropout", architecture="gpt2"):
    """Three steps that are packed, accumulated and validated, with dropout on.

    In float64 where the model computes in it: Llama's norms and weights in four bits
    do so in float32.
    """
    method = BY_NAME[method]
    exact = architecture == "gpt2" and not method.prepare
    dtype = torch.float64 if exact else torch.float32
    original(architecture, dtype, method.prepare)  # so that it draws no numbers below
    results = []
    for changes in ({}, LESS):
        torch.manual_seed(0)
        model, _ = fresh(method, architecture, steps=1, dtype=dtype)
        steps = recipe(steps=3, warmup=0, validate_every=3, **changes)
        results.append(figures(run(model, steps)))
    assert largest(results[1], results[0]) < (1e-12 if exact else 1e-6)


@law
@pytest.mark.parametrize("way", WAYS)
def rows_of_several_turns_train_the_same(way="both"):
    task = SimpleNamespace(**vars(TASK) | {"train": [*ROWS, CHAT, CHAT]})
    results = []
    for changes in ({}, WAYS[way]):
        model = adapted(architecture="gpt2", dtype=torch.float64)
        steps = recipe(steps=4, **changes)
        history = loop.train(model, TOKENIZER, task, steps, progress=False)
        results.append(figures(history) | values(model))
    assert history.packing.startswith("packed")
    assert largest(results[1], results[0]) < 1e-12


HALF = {
    "lora": dict(dtype=torch.bfloat16),
    "full": dict(architecture="gpt2"),  # float32 masters
}


@law
@pytest.mark.parametrize("method", HALF)
def in_half_precision_a_layer_computed_twice_has_the_same_bits(method="lora"):
    """And chunks add up in another order: the losses agree within rounding."""
    changes = dict(steps=4, autocast="bfloat16" if method == "full" else None)
    ends = {}
    for name, way in {"without": {}, **WAYS}.items():
        model = adapted(method, **HALF[method])
        ends[name] = figures(run(model, recipe(**changes, **way))) | values(model)
    assert_same(ends["checkpointing"], ends["without"])
    assert_same(ends["both"], ends["chunks"])
    assert largest(ends["chunks"]["loss"], ends["without"]["loss"]) < 1e-2


# Less is kept -------------------------------------------------------------------------


def watched(model, settings):
    """(runs of the first layer, rows of the head in its largest batch) of a run."""
    inner = next(m for m in decoder_layers(model)[0].modules() if not [*m.children()])
    runs, rows = [], []
    hooks = [
        inner.register_forward_hook(lambda *_: runs.append(1)),
        model.lm_head.register_forward_hook(
            lambda module, x, y: rows.append(y[..., 0].numel())
        ),
    ]
    run(model, settings)
    for hook in hooks:
        hook.remove()
    return len(runs), max(rows)


@law
def layers_run_twice_and_the_head_on_a_chunk():
    """In training; a validation runs each layer once, and its head on a chunk too."""
    steps = recipe(steps=2, warmup=0, validate_every=2)
    once, all_rows = watched(adapted(), steps)
    twice, most = watched(adapted(), replace(steps, checkpointing=True, chunk=5))
    micro_batches = steps.steps * steps.accumulate
    # Before the first step the model is asked: at once, for 2 rows of 6 labels.
    assert all_rows > 12 and most == 12
    asked = 3 + 12 // abilities.CHUNK - 1  # of layers: at once, and in chunks
    assert once + micro_batches < twice < once + micro_batches + asked


@law
@pytest.mark.parametrize("way", WAYS)
def a_measured_step_is_that_of_the_recipe(way="checkpointing"):
    model = adapted(architecture="llama")
    whole = meter.measured_step(model, TOKENIZER, TASK, recipe())
    less = meter.measured_step(model, TOKENIZER, TASK, recipe(**WAYS[way]))
    assert less.activations < 0.98 * whole.activations
    assert (less.weights, less.optimizer) == (whole.weights, whole.optimizer)


# Checkpoints on the disk --------------------------------------------------------------


class Stop(Exception):
    """What ends a run in the middle."""


@law
@pytest.mark.parametrize("case", ["lora", "lora in bfloat16", "full under autocast"])
@pytest.mark.parametrize("stop", [4, 7])
def a_resumed_run_has_the_bits_of_the_straight_one(folder, case="lora", stop=7):
    half = case != "lora"
    method = case.split()[0]
    settings = recipe(
        validate_every=2,
        patience=9,
        autocast="bfloat16" if method == "full" else None,
        **LESS,
    )

    def model():
        return adapted(method, **(HALF[method] if half else {}))

    def stopped(history):
        if history.steps == stop:
            raise Stop

    straight, resumed = model(), model()
    history = run(straight, settings, checkpoints=folder / "straight")
    with pytest.raises(Stop):
        run(model(), settings, checkpoints=folder / "cut", on_step=stopped)
    torch.rand(5)  # a new process has another generator
    again = run(resumed, settings, checkpoints=folder / "cut")
    assert again.resumed_from == 4
    assert_same(values(resumed), values(straight))
    assert_same(figures(again), figures(history))
    assert_same(contents(folder / "cut"), contents(folder / "straight"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@law
def older_runs_are_the_runs_of_the_defaults():
    """What a run records of its recipe has no name that older runs do not have."""
    older = {field.name for field in fields(TrainConfig)} - set(checkpoint.LATER)
    recorded = checkpoint._recipe(TrainConfig())
    assert set(recorded) == older - set(checkpoint.NO_MATTER)
    for changes in (*WAYS.values(), dict(buckets=2)):
        new = checkpoint._recipe(TrainConfig(**changes))
        assert new == recorded | changes


def test_a_run_that_kept_more_is_another_run(tmp_path):
    run(adapted(), recipe(steps=4, warmup=0), checkpoints=tmp_path)
    with refused(adapted(), "recipe.chunk is absent there, 5 here"):
        run(adapted(), recipe(steps=4, warmup=0, chunk=5), checkpoints=tmp_path)


# What is refused ----------------------------------------------------------------------


@law
def what_a_model_cannot_is_refused_by_name(monkeypatch):
    """Before anything is trained, and the model is as it was."""
    model = adapted()

    def nothing(*_):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(loop, "optimizer_steps", nothing)
    with monkeypatch.context() as patch:
        patch.setattr(abilities, "decoder_layers", _no_layers)
        with refused(model, "no decoder layers"):
            run(model, recipe(checkpointing=True))
    with monkeypatch.context() as patch:
        patch.setattr(chunked_loss, "can_choose_logits", lambda model: False)
        with refused(model, "LlamaForCausalLM computes the logits of all positions"):
            run(model, recipe(chunk=5))
    forward = type(model).forward

    def more(self, input_ids, **given):
        """A head that reads the number of tokens as well."""
        output = forward(self, input_ids, **given)
        output.logits[..., 0] += input_ids.numel()
        return output

    more.__signature__ = inspect.signature(forward)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", more)
        with refused(model, "of this LlamaForCausalLM in chunks is", "chunk at None"):
            run(model, recipe(chunk=5))


def _no_layers(model):
    raise ValueError("this model has no decoder layers")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("checkpointing", 1, "allowed are True and False"),
        ("chunk", 0, "allowed is a whole number of label tokens"),
        ("chunk", True, "or None for all at once"),
        ("buckets", 0, "a whole number >= 1"),
    ],
)
def test_what_is_no_recipe_is_refused(field, value, words):
    with pytest.raises(ValueError, match=f"^{field}={value!r}") as caught:
        TrainConfig(**{field: value})
    assert words in str(caught.value)


BUGS = {
    "all logits at once": Bug(
        loop.optimizer_steps,
        "loss_of(config.chunk)",
        "loss_of(None)",
        layers_run_twice_and_the_head_on_a_chunk,
    ),
    "all logits at once, in a validation": Bug(
        loop._validate,
        "loss_of(config.chunk)",
        "loss_of(None)",
        layers_run_twice_and_the_head_on_a_chunk,
    ),
    "layers keep all": Bug(
        loop.train,
        "recomputed(model, config.checkpointing)",
        "recomputed(model, False)",
        layers_run_twice_and_the_head_on_a_chunk,
    ),
    "layers keep all, where bytes are counted": Bug(
        meter.measured_step,
        "recomputed(model, config.checkpointing)",
        "recomputed(model, False)",
        a_measured_step_is_that_of_the_recipe,
    ),
    "older checkpoints are strangers": Bug(
        checkpoint._recipe,
        "name in LATER and",
        "False and",
        older_runs_are_the_runs_of_the_defaults,
    ),
    "what is kept does not count": Bug(
        checkpoint._recipe,
        "value == usual[name]",
        "True",
        older_runs_are_the_runs_of_the_defaults,
    ),
    "nothing is refused": Bug(
        loop.train,
        "refuse_unable(model, config)",
        "pass",
        what_a_model_cannot_is_refused_by_name,
    ),
    "the model is not asked": Bug(
        abilities._refuse_chunks,
        "if not abs(chunked - plain)",
        "if False and abs(chunked - plain)",
        what_a_model_cannot_is_refused_by_name,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(
    BUGS, errors=(AssertionError, TypeError, pytest.fail.Exception)
)
