"""A comparison in bfloat16: what trains stays in float32, whatever the base is in."""

from dataclasses import replace

import pytest
import torch

from peft_from_scratch.comparison import compare as comparing
from peft_from_scratch.comparison import setup
from peft_from_scratch.comparison.adapt import adapt
from peft_from_scratch.comparison.candidates import CANDIDATES
from peft_from_scratch.comparison.plan import Plan
from peft_from_scratch.core import adapter
from peft_from_scratch.models import speed
from peft_from_scratch.training import loop, precision

CANDIDATE = {candidate.key: candidate for candidate in CANDIDATES}
SETTING = {"template": "raw", "lr": 1e-3}


@pytest.fixture
def in_bfloat16(tmp_path):
    plan = Plan("tiny", "terms", rows=4, steps=4, batch=2, out=str(tmp_path))
    return setup.load_setup(replace(plan, dtype="bfloat16"))


@pytest.fixture
def products(monkeypatch):
    """(dtype of the trainable parameters, of the loss's logits) of each step."""
    seen, sound = [], loop.micro_batch_loss

    def watched(model, batch, tokens, summed):
        trained = {p.dtype for p in adapter.trainable(model).values()}
        head = model.get_output_embeddings()
        logits = []
        hook = head.register_forward_hook(lambda _, __, y: logits.append(y.dtype))
        try:
            return sound(model, batch, tokens, summed)
        finally:
            hook.remove()
            seen.append((trained, logits[0]))

    monkeypatch.setattr(loop, "micro_batch_loss", watched)
    return seen


@pytest.mark.parametrize("key", ["full", "lora", "qlora", "houlsby", "prompt"])
def test_what_trains_is_in_float32_and_products_are_not(in_bfloat16, products, key):
    ready = adapt(CANDIDATE[key], in_bfloat16, SETTING, 0, search=True)
    assert {dtype for trained, _ in products for dtype in trained} == {torch.float32}
    assert {dtype for _, dtype in products} == {torch.bfloat16}
    of_base = ready.model.get_input_embeddings().weight
    assert of_base.dtype == torch.bfloat16


def test_rounding_spares_the_buffers(in_bfloat16):
    """Rotary frequencies in bfloat16 would put each token elsewhere."""
    ready = adapt(CANDIDATE["full"], in_bfloat16, SETTING, 0, search=True)
    loaded, _ = in_bfloat16.load()
    buffers = dict(loaded.named_buffers())
    assert buffers
    for name, buffer in ready.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name])


def test_master_weights_keep_an_update_that_bfloat16_loses(in_bfloat16):
    """A rate of 1e-6 moves no weight of a bfloat16 checkpoint; its masters, all."""
    model, tokenizer = in_bfloat16.load(precision.loaded_in("full", "bfloat16"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    CANDIDATE["full"].inject(model)
    config = replace(
        loop.TrainConfig(steps=1, batch=2, lr=1e-6, template="raw"),
        autocast="bfloat16",
    )
    loop.train(model, tokenizer, in_bfloat16.task, config)
    moved = {n: (p - before[n]).abs().max() for n, p in model.named_parameters()}
    assert all(0 < change < 1e-5 for change in moved.values())


@pytest.mark.parametrize(
    ("method", "dtype", "loaded", "autocast"),
    [
        ("full", "bfloat16", "float32", "bfloat16"),
        ("bitfit", "bfloat16", "float32", "bfloat16"),
        ("full", "float16", "float32", None),
        ("full", "float32", "float32", None),
        ("full", "float64", "float64", None),
        ("lora", "bfloat16", "bfloat16", None),
        ("qlora", "float16", "float16", None),
    ],
)
def test_the_dtypes_of_a_method(method, dtype, loaded, autocast):
    assert precision.loaded_in(method, dtype) == loaded
    assert precision.autocast_of(method, dtype) == autocast


def test_prompting_loads_what_is_asked_for():
    assert precision.loaded_in(None, "bfloat16") == "bfloat16"


def test_the_choice_is_printed_with_its_reason_and_kept(tmp_path, capsys, monkeypatch):
    chosen = speed.Choice(torch.bfloat16, "a test wants it")
    monkeypatch.setattr(speed, "fast_dtype", lambda device: chosen)
    plan = Plan("tiny", "terms", ("zero-shot",), rows=4, out=str(tmp_path))
    result = comparing.compare(plan)
    assert "bfloat16, since a test wants it" in capsys.readouterr().out
    assert result["dtype"] == "bfloat16" and result["plan"]["dtype"] == "auto"
    assert result["rows"][0]["configuration"]["dtype"] == "bfloat16"


def test_a_row_in_another_dtype_is_measured_again(tmp_path, capsys):
    plan = Plan("tiny", "terms", ("zero-shot",), rows=4, out=str(tmp_path))
    for dtype in ("float32", "bfloat16"):
        comparing.compare(replace(plan, dtype=dtype))
        assert "measured before" not in capsys.readouterr().out
    comparing.compare(replace(plan, dtype="float32"))
    assert "measured before" in capsys.readouterr().out


def test_no_plan_has_an_unknown_dtype():
    with pytest.raises(ValueError, match="dtype='bf16': allowed are auto, float32"):
        Plan(dtype="bf16")
