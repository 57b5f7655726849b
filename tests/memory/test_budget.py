"""A bill equals what is counted on a real step, closed forms, and published figures."""

import dataclasses
import itertools

import pytest
import torch
from architectures import CONFIGS, build
from planting import Bug, each_is_caught, law
from transformers import DynamicCache, GPT2Config, LlamaConfig, MixtralConfig

import peft_from_scratch as pfs
from peft_from_scratch.core import adapter
from peft_from_scratch.memory import (
    changes,
    formulas,
    meta_model,
    pieces,
    timeline,
    weighing,
)
from peft_from_scratch.memory.budget import bill
from peft_from_scratch.memory.meter import Meter
from peft_from_scratch.memory.mixed_adamw import MixedAdamW
from peft_from_scratch.memory.setups import RECIPES, Setup
from peft_from_scratch.memory.shapes import read_config, shape_of
from peft_from_scratch.memory.step_bill import step_bill
from peft_from_scratch.methods import METHODS, named
from peft_from_scratch.models import smollm2
from peft_from_scratch.models.load import load_model
from peft_from_scratch.training.loss import accumulate_gradients, mean_loss

SEVEN = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32_000,
)
SIXTY_FIVE = LlamaConfig(
    hidden_size=8192,
    intermediate_size=22_016,
    num_hidden_layers=80,
    num_attention_heads=64,
    vocab_size=32_000,
)
GPT3 = GPT2Config(n_embd=12_288, n_layer=96, n_head=96, n_positions=2048)
HELD = ("weights", "gradients", "optimizer", "master")


def real_step(architecture, setup):
    """(the bill of memory/step_bill.py for a real step, the model)"""
    recipe = RECIPES[setup.dtype]
    model = build(architecture, dtype=getattr(torch, recipe.base))
    model.set_attn_implementation(setup.attention)
    named(setup.method).module.inject(model, **setup.options)
    if setup.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = list(adapter.trainable(model).values())
    masters = recipe.master and setup.method == "full"
    optimizer = (MixedAdamW if masters else torch.optim.AdamW)(trained, lr=1e-5)
    ids = torch.randint(64, 320, (setup.batch, setup.length))
    model.train()
    rows = [{"input_ids": ids, "labels": ids}]
    step = step_bill(model, lambda: accumulate_gradients(model, rows), optimizer)
    return step, model


def assert_predicted(architecture, setup, close=0.01):
    real, _ = real_step(architecture, setup)
    made = bill(CONFIGS[architecture](), setup)
    parts = made.parts
    assert parts["weights"] + parts["adapter"] == real["weights"]
    assert parts["gradients"] == real["gradients"]
    assert parts["optimizer"] + parts["master"] == real["optimizer"]
    most = timeline.activations(made.moments)
    assert most == pytest.approx(real["activations"], rel=close)
    assert made.peak == pytest.approx(real["peak"], rel=close)


# Against real steps -------------------------------------------------------------------


@law
@pytest.mark.parametrize("dtype", ["float32", "mixed", "bf16-pure"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def a_llamas_bill_is_that_of_its_step(method="full", dtype="mixed"):
    """Logits decide: 200 tokens of 320 words."""
    assert_predicted("llama", Setup(method=method, dtype=dtype, batch=4, length=50))


@law
def a_tied_models_bill_is_that_of_its_step():
    """Few tokens: at the peak are gradients, and the embedding's in two parts."""
    for length in (3, 80):
        assert_predicted("qwen", Setup(method="full", batch=2, length=length), 0.05)


@law
@pytest.mark.parametrize("architecture", ["opt", "gemma", "qwen"])
def other_architectures_are_measured(architecture="qwen"):
    """On the meta device. The architectures of no formula, with dropout off."""
    setup = Setup(method="lora", batch=4, length=64, attention="eager")
    made = bill(CONFIGS[architecture](), setup)
    assert made.way == pieces.MEASURED
    assert_predicted(architecture, setup, 0.05)


@law
def measurement_and_formula_agree():
    """On a model that has both. Of the logits' positions, the last is not computed."""
    setup, config = Setup(method="full", batch=4, length=64), CONFIGS["llama"]()
    _, model = weighing.weigh(config, "full", {}, "bfloat16")
    saved, most = meta_model.kept_for_backward(model, 4, 64)
    made = bill(config, setup)
    assert made.way == pieces.BY_FORMULA
    assert saved == pytest.approx(made.parts["activations"], rel=0.01)
    assert most == pytest.approx(timeline.activations(made.moments), rel=0.01)


@pytest.mark.parametrize("method", ["ia3", "bitfit", "houlsby"])
def test_methods_of_few_parameters_on_gpt2(method):
    options = {"m": 8} if method == "houlsby" else {}
    setup = Setup(method=method, dtype="float32", batch=4, length=64, options=options)
    # On "meta", a LayerNorm that is frozen keeps its output as well.
    assert_predicted("gpt2", setup, 0.10)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_is_within_ten_percent(method):
    setup = Setup(method=method, batch=4, length=64, checkpointing=True)
    assert_predicted("llama", setup, 0.10)


@law
def every_method_has_a_bill_of_the_right_size():
    """Weights of each method against the model that really has it."""
    for method in METHODS:
        options = {"m": 8} if method.name == "houlsby" else {}
        setup = Setup(method=method.name, length=64, options=options)
        made = bill(CONFIGS["gpt2"](), setup)
        model = build("gpt2", dtype=torch.bfloat16)
        method.module.inject(model, **options)
        there = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert made.parts["weights"] + made.parts["adapter"] == there, method.name
        trained = sum(p.numel() for p in adapter.trainable(model).values())
        assert made.weighed.own + made.weighed.added == trained, method.name


# Against closed forms -----------------------------------------------------------------


@law
def what_is_frozen_has_no_gradient():
    """LoRA at q, k, v and o: r (d_in + d_out) parameters, 4 + 4 + 8 bytes each."""
    options = {"r": 16, "targets": "attention"}
    made = bill(SEVEN, Setup(method="lora", options=options))
    count = formulas.lora_parameters([(4096, 4096)] * 4 * 32, r=16)
    assert made.parts["gradients"] == made.parts["adapter"] == 4 * count
    assert made.parts["optimizer"] == 8 * count + 4 * 2 * 4 * 32
    assert made.parts["master"] == 0


@law
def zero_divides_what_its_stage_says():
    """arXiv:1910.02054: 16 P; then 4 P + 12 P / N, 2 P + 14 P / N, 16 P / N."""
    whole = bill(SEVEN, Setup(method="full")).weighed.total
    for ranks, (stage, kept, divided) in itertools.product(
        (2, 8), ((0, 16, 0), (1, 4, 12), (2, 2, 14), (3, 0, 16))
    ):
        setup = Setup(method="full", zero=stage, ranks=ranks)
        parts = bill(SEVEN, setup).parts
        lasting = sum(parts[name] for name in HELD)
        assert lasting == pytest.approx(whole * (kept + divided / ranks), rel=1e-5)


@law
def frozen_weights_are_divided_in_stage_three_only():
    plain = bill(SEVEN, Setup())
    for stage, divisor in ((1, 1), (2, 1), (3, 4)):
        parts = bill(SEVEN, Setup(zero=stage, ranks=4)).parts
        assert parts["weights"] == pytest.approx(plain.parts["weights"] / divisor)


@law
def tied_embeddings_count_once():
    tied, untied = (
        bill(
            CONFIGS["llama"]().__class__(**{**SMALL, "tie_word_embeddings": tie}), FULL
        )
        for tie in (True, False)
    )
    table = SMALL["vocab_size"] * SMALL["hidden_size"]
    assert untied.weighed.total - tied.weighed.total == table
    assert untied.parts["weights"] - tied.parts["weights"] == 2 * table
    assert tied.transients["a tied weight's second gradient"] == 2 * table
    assert untied.transients["a tied weight's second gradient"] == 0


FULL = Setup(method="full")
SMALL = dict(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
)


@law
def nf4_takes_what_quantize_makes():
    for n in (1, 63, 64, 65, 64 * 256, 64 * 256 + 1, 5 * 64 * 256 + 7):
        w = torch.randn(n)
        for double in (True, False):
            q = pfs.nf4.quantize(w, double=double)
            assert formulas.nf4_bytes(n, double=double) == q.nbytes


@law
def a_cache_is_as_large_as_transformers_makes_it():
    model = build("llama", dtype=torch.bfloat16)  # 4 heads, keys and values for 2
    cache = DynamicCache(config=model.config)
    ids = torch.randint(64, 320, (3, 40))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    setup = Setup(method="lora", batch=3, length=40, phase="generate")
    made = bill(model.config, setup)
    assert made.parts["keys_and_values"] == real
    assert made.parts["gradients"] == made.parts["optimizer"] == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("phase", ["evaluate", "generate"])
def test_a_forward_pass_keeps_nothing(phase, attention):
    model, _ = load_model("tiny", device="cpu", dtype="bfloat16")
    model.set_attn_implementation(attention)
    pfs.lora.inject(model)
    setup = Setup(batch=4, length=256, attention=attention)
    one = bill(model.config, dataclasses.replace(setup, phase=phase))
    ids = torch.randint(3, 1000, (4, 256))
    with Meter(model) as meter, torch.no_grad():
        if phase == "evaluate":
            row = ids[0].tolist()
            mean_loss(model, [(row, row)] * 4)
        else:
            model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)
    assert one.peak == pytest.approx(meter.memory().peak, rel=0.1)
    assert one.peak < bill(model.config, setup).peak
    assert one.parts["optimizer"] == one.parts["gradients"] == 0


def test_a_mixture_has_active_parameters():
    sizes = dict(SMALL, num_key_value_heads=2, num_local_experts=8)
    config = MixtralConfig(**sizes, num_experts_per_tok=2)
    made = bill(config, Setup(length=64))
    an_expert = 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    idle = sizes["num_hidden_layers"] * 6 * an_expert
    assert made.weighed.total - made.weighed.active == idle
    assert made.way == pieces.MEASURED
    four = bill(config, Setup(method="qlora", length=64))
    assert any("experts in four bits" in line for line in four.not_counted)
    apart = torch.nn.ModuleDict({"experts": torch.nn.ModuleList()})
    apart["experts"].extend(torch.nn.Linear(8, 8, bias=False) for _ in range(8))
    assert weighing._idle_experts(apart, config) == 6 * 64  # a module each


@law
def doras_activations_are_counted_where_they_are_measured():
    setup = Setup(method="dora", batch=4, length=64)
    assert bill(CONFIGS["qwen"](), setup).way == pieces.MEASURED
    assert_predicted("qwen", setup, 0.05)


# Published figures, with the assumptions that make each true --------------------------


def per_parameter(config, setup, parts=HELD):
    made = bill(config, setup)
    return sum(made.parts[name] for name in parts) / made.weighed.total


def test_112_gb_for_seven_billion_parameters():
    """16 bytes a parameter, which mixed precision and float32 have in common."""
    for dtype in ("mixed", "float32"):
        each = per_parameter(SEVEN, Setup(method="full", dtype=dtype))
        assert 7e9 * each / 1e9 == pytest.approx(112, abs=0.01)


def test_780_gb_and_48_gb_for_65_billion():
    """arXiv:2305.14314v1: 12 bytes a parameter, without a master copy; and QLoRA."""
    without = ("weights", "gradients", "optimizer")
    each = per_parameter(SIXTY_FIVE, Setup(method="full"), without)
    assert 65e9 * each / 1e9 == pytest.approx(780, abs=0.1)
    setup = Setup(method="qlora", length=512, checkpointing=True, options={"r": 64})
    assert 45e9 < bill(SIXTY_FIVE, setup).peak < 48e9


def test_1_2_tb_and_350_gb_for_gpt3():
    """arXiv:2106.09685v2: 1.2 TB is between 16-bit AdamW without gradients and with."""
    pure = Setup(method="full", dtype="bf16-pure")
    without = ("weights", "optimizer")
    low, high = (per_parameter(GPT3, pure, parts) for parts in (without, HELD))
    assert 175e9 * low == pytest.approx(1.05e12, rel=1e-3)
    assert 175e9 * high == pytest.approx(1.40e12, rel=1e-3)
    assert 175e9 * low < 1.2e12 < 175e9 * high
    lora = bill(GPT3, Setup(options={"r": 4, "targets": "attention"}))
    lasting = sum(lora.parts[name] for name in (*HELD, "adapter"))
    assert lasting / 1e9 == pytest.approx(350, rel=0.01)


def test_130_gb_and_33_gb_for_65_billion():
    half = bill(SIXTY_FIVE, Setup(method="lora"))
    assert half.parts["weights"] / 1e9 == pytest.approx(130, abs=1)
    assert half.weighed.total / 2 / 1e9 == pytest.approx(33, abs=0.5)
    four = bill(SIXTY_FIVE, Setup(method="qlora"))
    assert four.parts["weights"] / 1e9 == pytest.approx(34.5, abs=0.1)


# Changes ------------------------------------------------------------------------------


@law
def changes_are_bills_and_the_best_is_first():
    made = bill(SEVEN, Setup(method="full", batch=4, length=2048))
    rows, idle = changes.changes(SEVEN, made)
    assert not {row.name for row in rows} & set(idle)
    names = [row.name for row in rows]
    assert {"LoRA", "QLoRA", "gradient checkpointing", "half the batch (2)"} <= {*names}
    assert [row.saved for row in rows] == sorted((r.saved for r in rows), reverse=True)
    for row in rows[:3]:
        assert row.peak == bill(SEVEN, row.setup).peak == made.peak - row.saved
    room = bill(SEVEN, Setup(method="full", batch=5, length=2048)).peak
    assert changes.most_rows(SEVEN, made, room) == 5
    assert changes.most_rows(SEVEN, made, room - 1) == 4
    assert changes.most_rows(SEVEN, made, 10**9) == 0


def test_sizes_are_read_and_others_refused():
    assert changes.size_in_bytes("16GB") == changes.size_in_bytes("16") == 16 * 10**9
    assert changes.size_in_bytes("1.5 GiB") == 3 * 2**29
    for wrong in ("", "GB", "16TB", "-3GB", "0GB"):
        with pytest.raises(ValueError, match="a size above 0"):
            changes.size_in_bytes(wrong)


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="--m is no option of --method lora"):
        bill(SEVEN, Setup(options={"m": 3}))
    with pytest.raises(ValueError, match="zero=4: allowed is"):
        Setup(zero=4)
    with pytest.raises(ValueError, match="no bias among"):
        bill(SEVEN, Setup(method="bitfit"))
    with pytest.raises(ValueError, match="the hub client's cache"):
        read_config("nobody/nothing")
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    for text, words in (
        ("{", "cannot read it"),
        ('{"model_type": "llama", "hidden_size": -1}', "cannot read it"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000}', "num_hidden_layers"),
        ('{"model_type": "llama", "quantization_config": {}}', None),
        ('{"model_type": "llama", "quantization_config": {"a": 1}}', "quantized"),
    ):
        file.write_text(text)
        if words:
            with pytest.raises(ValueError, match=words):
                read_config(file)


def test_smollm2_needs_no_file(monkeypatch, tmp_path):
    real = bill(read_config("smollm2"), Setup(length=64))
    wheel = dataclasses.replace(smollm2.WHEEL, name="nothing here")
    monkeypatch.setattr(smollm2, "WHEEL", wheel)
    monkeypatch.setenv("PEFT_FROM_SCRATCH_CACHE", str(tmp_path))
    assert bill(read_config("smollm2"), Setup(length=64)).moments == real.moments


def test_the_shape_of_tiny():
    shape = shape_of(read_config("tiny"))
    assert (shape.kind, shape.layers, shape.d, shape.f) == ("llama", 4, 128, 384)
    assert shape_of(CONFIGS["gemma"]()) is None


# Planted bugs -------------------------------------------------------------------------

BUGS = {
    "a frozen parameter counted as trained": Bug(
        weighing.weigh,
        "apart = {id(p) for p in [*own.values(), *added]}",
        "added += [model.get_input_embeddings().weight]; apart = {*map(id, added)}",
        what_is_frozen_has_no_gradient,
    ),
    "the second copy of the logits forgotten": Bug(
        pieces.pieces_of,
        "logits=LOGITS * scores",
        "logits=LOGITS * scores * 2 // 3",
        a_llamas_bill_is_that_of_its_step,
    ),
    "ZeRO stage 2 divides weights": Bug(
        pieces.lasting_bytes,
        "recipe.weights * w.own, setup, 3)",
        "recipe.weights * w.own, setup, 2)",
        frozen_weights_are_divided_in_stage_three_only,
    ),
    "ZeRO stage 1 divides gradients": Bug(
        pieces.pieces_of,
        "gradients=shared(own, setup, 2)",
        "gradients=shared(own, setup, 1)",
        zero_divides_what_its_stage_says,
    ),
    "keys and values counted for all heads": Bug(
        weighing.prefix_values,
        'getattr(config, "num_key_value_heads", None)',
        "None",
        a_cache_is_as_large_as_transformers_makes_it,
    ),
    "tied embeddings counted twice": Bug(
        weighing.weigh,
        "rest = [p for p in model.parameters() if id(p) not in apart]",
        "rest = [p for _, p in model.named_parameters(remove_duplicate=False)"
        " if id(p) not in apart or p is model.get_input_embeddings().weight]",
        tied_embeddings_count_once,
    ),
    "a tied weight's gradient in one part": Bug(
        pieces.pieces_of,
        "embedding = head if w.tied else 0",
        "embedding = 0",
        tied_embeddings_count_once,
    ),
    "the master copy forgotten": Bug(
        pieces.lasting_bytes,
        "shared(recipe.master * w.own, setup, 1) if training else 0",
        "0",
        a_llamas_bill_is_that_of_its_step,
    ),
    "NF4's constants forgotten": Bug(
        formulas.nf4_bytes,
        "math.ceil(values / 2) + constants",
        "math.ceil(values / 2)",
        nf4_takes_what_quantize_makes,
    ),
    "the optimizer's states absent until the update": Bug(
        timeline.moments,
        '"loss": p.lasting',
        '"loss": {"weights": p.lasting["weights"]}',
        a_llamas_bill_is_that_of_its_step,
    ),
    "the change that saves least first": Bug(
        changes.changes,
        "-row.saved",
        "row.saved",
        changes_are_bills_and_the_best_is_first,
    ),
    "DoRA measured as LoRA": Bug(
        pieces.pieces_of,
        "saved, worst = saved + more, worst + more",
        "pass",
        doras_activations_are_counted_where_they_are_measured,
    ),
    "a measurement without the loss": Bug(
        meta_model.kept_for_backward,
        "return sum(s.nbytes() for s in kept.values())",
        "return len(kept)",
        measurement_and_formula_agree,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
