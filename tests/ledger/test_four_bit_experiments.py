"""What the experiments on four bits compute: closed forms, other ways to the same, and
planted faults."""

import math

import pytest
import torch
from architectures import build, byte_tokenizer
from planting import Bug, each_is_caught, law
from torch import nn
from transformers import LlamaConfig

from peft_from_scratch import lora
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.core.merge import merge
from peft_from_scratch.ledger.experiments import (
    constants,
    finetune,
    formats,
    four_bit_cost,
    four_bit_training,
    one_gpu,
    paging,
)
from peft_from_scratch.ledger.experiments.counting import SHAPES
from peft_from_scratch.memory.formulas import lora_parameters
from peft_from_scratch.methods import lora_fast, qlora
from peft_from_scratch.nf4 import CODES, NF4Linear, quantize_model

SMALL = dict(task="orders", n=24, steps=10, batch=4, test=12, validation=6)


# ------------------------------------------------------------------------ Best values


@law
def sixteen_clusters_are_found():
    """Ratios that take sixteen values only: those are the best ones, without error."""
    torch.manual_seed(0)
    values = torch.linspace(-1, 1, 16) + 0.02 * torch.randn(16)
    values[0], values[-1] = -1, 1
    ratios = values[torch.randint(16, (500, 32))]
    ratios[:, 0] = 1.0
    rows = ratios * (0.1 + torch.rand(500, 1))
    found = formats.best_values(rows)
    assert torch.allclose(found, values, atol=1e-5)
    assert formats.error(rows, formats.to_nearest(rows, found)) < 1e-3


@law
def two_points_meet_at_their_weighted_mean():
    """Each value is at sum(absmax² ratio) / sum(absmax²) of what is nearest to it."""
    ratios = torch.tensor([-1.0, 0.3, 0.4, 1.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    start = torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64)
    found = formats.alternate(ratios, weights, start)
    assert found.tolist() == pytest.approx([-1.0, (0.3 + 3 * 0.4) / 4, 1.0])
    pinned = formats.alternate(ratios, weights, start, pins=(1,))
    assert pinned.tolist() == start.tolist()


@law
def no_other_values_are_better():
    """A step away from the values found, on either side, has a larger error."""
    torch.manual_seed(1)
    rows = torch.randn(20_000, 64)
    found = formats.best_values(rows)
    least = formats.error(rows, formats.to_nearest(rows, found))
    assert least < formats.error(
        rows, formats.to_nearest(rows, torch.tensor(CODES["nf4"]))
    )
    for k in range(16):
        for by in (-0.01, 0.01):
            moved = found.clone()
            moved[k] += by
            assert formats.error(rows, formats.to_nearest(rows, moved)) > least


@law
def every_format_is_measured_on_what_was_held_out():
    config = formats.config("gaussian", 32) | {"values": 1 << 14}
    result = formats.compute(config)
    names = {*CODES, "nf4-double", "affine", "best", "best-pinned"}
    assert result["error"].keys() == result["bits"].keys() == names
    assert result["bits"]["nf4"] == result["bits"]["best"] == 5.0
    assert result["bits"]["affine"] == 6.0
    assert result["distinct"] == 32
    pinned = result["values"]["best-pinned"]
    assert pinned[0] == -1 and pinned[7] == 0 and pinned[15] == 1
    errors = result["error"]
    assert errors["best"] < errors["best-pinned"] < errors["nf4"] < errors["int4"]


@law
def equal_use_is_four_bits_of_entropy():
    """Sixteen codes used equally often, and one of them alone."""
    values = torch.tensor(CODES["nf4"]).repeat(4, 1).view(-1)
    books = {"best": torch.tensor(CODES["nf4"])}
    assert formats.rounded(values, 64, books)[2] == pytest.approx(4.0)
    assert formats.rounded(torch.ones(64), 64, books)[2] == pytest.approx(0.0)


def test_the_trap_is_weights_with_sixteen_values_a_block():
    """Affine int4 finds again what affine int4 has made; that ranks no formats."""
    torch.manual_seed(0)
    w = formats.Affine.of(torch.randn(64, 32), 32).dequantize().flatten()
    restored, _, _ = formats.rounded(w, 32, {})
    w = w.view(-1, 32)
    assert formats.error(w, restored["affine"]) < 1e-4
    assert formats.error(w, restored["nf4"]) > 1


# ---------------------------------------------------------------------- Constants


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n", [64, 4096, 64 * 256 * 3])
def test_bytes_in_four_bits_are_the_formulas(n, double):
    held = constants.four_bit_bytes(n, double)
    assert held["codes"] == n // 2
    single = 4 * n // 64
    double_ = n // 64 + 4 * math.ceil(n / 64 / 256) + 4
    assert held["constants"] == (double_ if double else single)


@pytest.mark.parametrize("double", [False, True])
def test_the_formula_is_what_a_model_holds(double):
    for architecture in ("llama", "gpt2", "opt"):
        model = build(architecture)
        found = constants.by_formula(model, double)
        assert found["formula"] == constants.tensor_bytes(model, double)["held"]
        assert found["formula"] < found["whole"]


@law
def gradients_in_four_bits_are_those_of_plain_weights():
    model = build("gpt2")
    plain = build("gpt2")
    quantize_model(model, double=False)
    names = [n for n, m in model.named_modules() if isinstance(m, NF4Linear)]
    for name in names:
        weight = model.get_submodule(name).weight
        plain.get_submodule(name).weight.data.copy_(weight)
    ours, theirs = (constants.gradient(m, 3) for m in (model, plain))
    assert constants._difference(ours, theirs) < 1e-3
    assert constants._difference(ours, constants.gradient(build("gpt2"), 3)) > 1


# ------------------------------------------------------------------- A moved LoRA


@law
def a_moved_lora_is_the_same_adapter_on_four_bits():
    base = build("llama")
    model = build("llama")
    lora.inject(model, r=4, alpha=8)
    finetune.randomize(model)
    before = {n: (m.A.clone(), m.B.clone()) for n, m in adapters(model).items()}
    finetune.transplant(model, dict(r=4, alpha=8, targets="all-linear"))
    after = adapters(model)
    assert after.keys() == before.keys()
    for name, module in after.items():
        assert isinstance(module.base, NF4Linear)
        assert torch.equal(module.A, before[name][0])
        assert torch.equal(module.B, before[name][1])
    quantize_model(base)
    lora.inject(base, r=4, alpha=8)
    for name, module in adapters(base).items():
        module.A.data, module.B.data = before[name]
    ids = torch.arange(3, 20)[None]
    assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-5)


def test_a_moved_lora_is_tested_before_and_after(base):
    config = finetune.config(
        base=base, method="lora-transplanted", lr=1e-2, template="raw", **SMALL
    )
    result = finetune.compute(config)
    alone = finetune.compute(config | {"method": "lora"})
    assert result["before"]["test_items"] == alone["test_items"]
    assert result["test_items"] != alone["test_items"]
    assert result["before"].keys() == {"test_items", "test_loss", "validation_loss"}


@law
def a_moved_lora_goes_home(folder):
    """Beside the full weights again it answers as before it was moved."""
    build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    home, _ = four_bit_cost.load_model(str(folder), device="cpu")
    config = dict(base=str(folder), r=4, alpha=8, targets="all-linear")
    lora.inject(home, r=4, alpha=8)
    finetune.randomize(home)
    ids = torch.arange(3, 20)[None]
    before = home(ids).logits
    finetune.transplant(home, config)
    assert not torch.allclose(home(ids).logits, before, atol=1e-3)
    assert torch.equal(four_bit_cost.moved_back(home, config)(ids).logits, before)


def test_a_cost_run_reads_general_text(base):
    config = finetune.config(
        base=base, method="lora-transplanted", lr=1e-2, template="raw", **SMALL
    )
    general = {"general": "orders", "general_rows": SMALL["test"]}
    result = four_bit_cost.compute(config | general)
    # The general task is the task itself here: so the losses are the same.
    assert result["general_items"] == result["test_items"]
    assert result["before"]["general_items"] == result["before"]["test_items"]


def test_the_controls_in_four_bits_do_not_train(base):
    def run(method):
        config = dict(base=base, method=method, lr=1e-2, template="raw") | SMALL
        return finetune.compute(finetune.config(**config))

    untouched, packed, frozen = map(run, ("base", "nf4-base", "qlora-frozen"))
    assert packed["steps"] == frozen["steps"] == 0
    assert len({r["test_loss"] for r in (untouched, packed, frozen)}) == 3
    assert run("qlora-bf16")["test_loss"] < packed["test_loss"]


def test_a_qlora_run_merges_three_ways(base):
    config = finetune.config(
        base=base, method="qlora", lr=1e-2, template="raw", **SMALL
    )
    result = four_bit_training.compute(config | {"experiment": "four_bit_training"})
    merges = result["merges"]
    assert list(merges) == list(qlora.ONTO)
    assert merges["dequantized"]["test_loss"] == pytest.approx(
        result["test_loss"], abs=1e-4
    )
    assert merges["requantized"]["bytes"] == result["bytes"]
    assert merges["dequantized"]["bytes"] > 1.5 * result["bytes"]
    assert merges["dequantized"]["update"] < 1e-4
    for onto in ("original", "requantized"):
        assert merges[onto]["update"] > merges[onto]["weight"] > 0.01


@law
def weights_are_counted_without_adapters():
    model = build("llama")
    plain = sum(p.nbytes for p in model.parameters())
    assert four_bit_training.weight_bytes(model) == plain
    lora.inject(model, r=4)
    assert four_bit_training.weight_bytes(model) == plain
    merge(model)
    assert four_bit_training.weight_bytes(model) == plain
    packed = build("llama")
    expected = constants.by_formula(packed, True)["formula"]
    qlora.inject(packed, r=4)
    assert four_bit_training.weight_bytes(packed) == expected


# ------------------------------------------------------------------------ One GPU


@pytest.mark.parametrize("room", [5, 12, 4_000, 123_456])
@pytest.mark.parametrize("curve", [0.0, 1e-4])
def test_the_longest_is_the_last_that_fits(room, curve):
    moving = lambda t: 7 + 3 * t + int(curve * t * t)  # noqa: E731
    found = one_gpu.longest(moving, room)
    assert found == max((t for t in range(1, 50_000) if moving(t) <= room), default=0)


@law
def few_steps_find_the_longest():
    """Each costs seconds: a curve that bends twice, as bytes do, takes a dozen."""
    tried = set()

    def moving(t):
        tried.add(t)
        return max(1_600_000 + 200 * t, 1830 * t, 2000 * t - 400_000)

    assert one_gpu.longest(moving, 3_580_000) == 1956
    assert len(tried) <= 12


@law
def the_sum_is_a_real_steps(checkpointing=True):
    """But for the buffer: ours is not there when the logits are, the worst moment."""
    settings = dict(one_gpu.check_config("tiny", checkpointing), length=96)
    result = one_gpu.compute(settings)
    buffer = 2 * 128 * 384
    assert 0.99 * result["measured"] < result["summed"]
    assert result["summed"] < 1.01 * result["measured"] + buffer


@law
def the_sum_is_a_real_steps_without_checkpointing():
    the_sum_is_a_real_steps(checkpointing=False)


@law
def a_token_is_taken_where_activations_set_the_peak():
    """From the longest sequence on; below, gradients set it, and a token adds less."""
    curve = lambda length: max(1_000 + 2 * length, 5 * length)  # noqa: E731
    fixed = dict.fromkeys(("weights", "buffer", "adapters", "states"), 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_gpu, "bill", lambda *_: (dict(fixed), curve))
        result = one_gpu.compute(one_gpu.config(gpu=10_400))
    assert result["tokens"] == 2_000 and result["a_token"] == 5
    assert {"1024", "2048", "2000", "4000"} == set(result["moving"])


@law
def the_fixed_part_is_the_formulas():
    shape = LlamaConfig(**SHAPES["Llama-7B"])
    config = dict(r=64, adapters="bfloat16", checkpointing=True)
    fixed, _ = one_gpu.bill(shape, config)
    sides = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    n = 32 * lora_parameters(sides, 64)
    assert fixed["adapters"] == 2 * n
    assert fixed["states"] == 8 * n + 4 * 2 * 7 * 32
    assert fixed["buffer"] == 2 * 4096 * 11008
    assert fixed["weights"] / 6.738e9 * 8 == pytest.approx(4.6, abs=0.1)


# ---------------------------------------------------------------------------- Pages


@law
def a_paged_run_absorbs_the_spike():
    config = paging.config("tiny", "within the states", 0) | {"order": "sLs"}
    result = paging.compute(config)
    assert result["equal"] and not result["exceeded"]
    assert result["lent"][0] == 0 < result["lent"][1] < result["states"]
    ordinary, lent = (result["held"][name] for name in ("adamw", "paged"))
    assert max(lent) < 1.01 * ordinary[0]
    assert max(ordinary) - ordinary[0] == pytest.approx(result["lent"][1], rel=0.01)


def test_what_an_adamw_holds_is_counted():
    model = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert paging.state_bytes(optimizer) == 2 * 400 + 4


# --------------------------------------------------------------------- Planted faults

BUGS = {
    "unweighted values": Bug(
        formats.alternate,
        "(weights * ratios)",
        "ratios",
        two_points_meet_at_their_weighted_mean,
    ),
    "pins that move": Bug(
        formats.alternate,
        "& ~stays",
        "",
        two_points_meet_at_their_weighted_mean,
    ),
    "no alternation": Bug(
        formats.best_values,
        "alternate(ratios, weights, start.double(), pins)",
        "start.double()",
        no_other_values_are_better,
    ),
    "values on the midpoints": Bug(
        formats.to_nearest,
        "bucketize(rows / absmax, midpoints)",
        "bucketize(rows / absmax, values[1:])",
        sixteen_clusters_are_found,
    ),
    "entropy in nats": Bug(
        formats.rounded, "/ math.log(2)", "", equal_use_is_four_bits_of_entropy
    ),
    "a gradient through the codes of another layer": Bug(
        lora_fast._plus_dh_W0,
        "return C.addmm_(dh, W)",
        "return C.addmm_(0.9 * dh, W)",
        gradients_in_four_bits_are_those_of_plain_weights,
    ),
    "only A moves": Bug(
        finetune.transplant,
        "parameter.copy_(value)",
        "parameter.copy_(value) if parameter is module.A else None",
        a_moved_lora_is_the_same_adapter_on_four_bits,
    ),
    "the base stays in full": Bug(
        finetune.transplant,
        'kind_of("qlora")',
        'kind_of("lora")',
        a_moved_lora_is_the_same_adapter_on_four_bits,
    ),
    "only A goes home": Bug(
        four_bit_cost.moved_back,
        "module.B.copy_(trained[name].B)",
        "pass",
        a_moved_lora_goes_home,
    ),
    "adapters counted as weights": Bug(
        four_bit_training.weight_bytes,
        "if id(p) not in added",
        "",
        weights_are_counted_without_adapters,
    ),
    "codes not counted": Bug(
        four_bit_training.weight_bytes,
        "[*own, *buffers]",
        "own",
        weights_are_counted_without_adapters,
    ),
    "halving": Bug(
        one_gpu.longest,
        "(room - moving(low)) / (moving(high) - moving(low))",
        "0.5",
        few_steps_find_the_longest,
    ),
    "a token where gradients set the peak": Bug(
        one_gpu.compute,
        "(moving(ends[1]) - moving(ends[0])) / ends[0]",
        "(moving(200) - moving(100)) / 100",
        a_token_is_taken_where_activations_set_the_peak,
    ),
    "no buffer": Bug(
        one_gpu.bill,
        "buffer = max(",
        "buffer = 0 * max(",
        the_fixed_part_is_the_formulas,
    ),
    "checkpointing left out": Bug(
        one_gpu.bill,
        'if config["checkpointing"]',
        "if False",
        the_sum_is_a_real_steps,
    ),
    "states in half precision": Bug(
        one_gpu.bill,
        "adamw_bytes(numbers, len(trained))",
        "adamw_bytes(numbers, len(trained), 2)",
        the_fixed_part_is_the_formulas,
    ),
    "gradients forgotten": Bug(
        one_gpu.bill,
        'step["peak"] - step["weights"]',
        'step["activations"] - 0 * step["weights"]',
        the_sum_is_a_real_steps_without_checkpointing,
    ),
    "nothing lent": Bug(
        paging.paged_steps,
        "lent.append(min(needed - usual, optimizer.budget_bytes - page))",
        "lent.append(0)",
        a_paged_run_absorbs_the_spike,
    ),
    "another rate": Bug(
        paging.paged_adamw,
        'lr=config["lr"]',
        'lr=1.001 * config["lr"]',
        a_paged_run_absorbs_the_spike,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
