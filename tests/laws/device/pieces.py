"""Laws of the pieces on a device: four bits, files, combining, kernels, optimizers.

As in models.py, they hold on the CPU itself, and on the device that pretends to be one
if no tensor is made in the wrong place.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from adapter_files import saved
from architectures import build
from device import DEVICE
from model_state import assert_same, logits, tokens
from safetensors.torch import load_file
from small_runs import TOKENIZER
from torch import Tensor, nn

import peft_from_scratch as pfs
from laws.device.models import CPU, moved
from peft_from_scratch import kernels, nf4
from peft_from_scratch.files.combine import combine
from peft_from_scratch.kernels import Plan, Stack
from peft_from_scratch.memory.mixed_adamw import MixedAdamW
from peft_from_scratch.methods import prefix, qlora
from peft_from_scratch.nf4 import Affine, NF4Linear, codes, spec
from peft_from_scratch.paged import PagedAdamW, states
from peft_from_scratch.training.chunked_loss import summed_loss_in_chunks
from peft_from_scratch.training.evaluation import general_losses
from peft_from_scratch.training.gradient_checkpointing import checkpointed

PLACES = (DEVICE, CPU)


def drawn(*shape, dtype=torch.float32, seed=0):
    """The same numbers on the device and on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator).to(dtype)
    return w.to(DEVICE), w


def equal(found: Tensor, expected: Tensor) -> bool:
    """Whether what was found is on the device and equals, bit for bit, the CPU's."""
    on_it = found.device.type == DEVICE.type
    return (
        on_it and found.dtype == expected.dtype and torch.equal(found.cpu(), expected)
    )


def four_bits_are_the_cpus():
    """Codes, constants and values; a book is made anew, as in a new process."""
    for made_once in (codes.book, codes.pairs):
        made_once.cache_clear()
    for dtype in (torch.float32, torch.bfloat16):
        for code in nf4.CODES:
            for double in (False, True, "fp8", "int8"):
                _a_tensor_in_four_bits(dtype, 64, double, code)
    _a_tensor_in_four_bits(torch.float32, 7, True, "nf4")


def _a_tensor_in_four_bits(dtype, block, double, code):
    found, expected = (
        nf4.quantize(w, block, double, code) for w in drawn(37, 45, dtype=dtype)
    )
    assert equal(found.packed, expected.packed)
    assert equal(found.constants(), expected.constants())
    assert equal(found.codes(), expected.codes())
    assert equal(nf4.dequantize(found), nf4.dequantize(expected))
    out = torch.empty(37, 45, dtype=torch.float64, device=DEVICE)
    nf4.dequantize(found, out=out)
    assert equal(out.float(), nf4.dequantize(expected, torch.float32))
    assert equal(nf4.dequantize(expected.to(DEVICE)), nf4.dequantize(expected))


def the_spec_of_four_bits_is_the_cpus():
    for code in nf4.CODES:
        (found, constants), (expected, theirs) = (
            spec.spec_quantize(w, 16, code) for w in drawn(5, 9)
        )
        assert equal(found, expected) and equal(constants, theirs)
        values = spec.spec_dequantize(found, constants, 16, code)
        assert equal(values, spec.spec_dequantize(expected, theirs, 16, code))
    found, expected = (Affine.of(w, 16).dequantize() for w in drawn(5, 9))
    assert equal(found, expected)


def a_weight_that_is_not_finite_is_named():
    for w in drawn(6, 8):
        w[2, 3] = torch.inf
        with pytest.raises(ValueError, match=r"w\[2, 3\] is inf"):
            nf4.quantize(w)


def a_projection_in_four_bits_is_the_cpus():
    """Value and gradient; moved and converted at once; and a plain one again."""
    found, expected = (_four_bit_projection(w) for w in drawn(24, 40))
    assert_same(moved(found), expected)
    packed = NF4Linear(nf4.quantize(drawn(24, 40)[1]))
    packed.to(DEVICE, torch.bfloat16)
    assert {b.device.type for b in packed.buffers()} == {DEVICE.type}
    assert packed.absmax_units.dtype == torch.float32


def _four_bit_projection(w):
    bias = nn.Parameter(w[:, 0].clone())
    module = NF4Linear(nf4.quantize(w), bias)
    x = w[:3].clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return {"y": y, "dx": x.grad, "plain": module.plain().weight, "W": module.weight}


def weights_that_stay_dequantized_are_the_cpus():
    found, expected = [], []
    for w, products in zip(drawn(24, 40), (found, expected), strict=True):
        module = NF4Linear(nf4.quantize(w))
        with torch.no_grad(), nf4.unpacked(module, budget_bytes=1 << 20) as kept:
            products += [module(w[:3]) for _ in range(2)]
            assert kept.nbytes == 4 * 24 * 40
    assert_same(moved(dict(enumerate(found))), dict(enumerate(expected)))


def quantized_models_go_to_disk_and_back():
    model = build("gpt2")
    twin = copy.deepcopy(model).cpu()
    with TemporaryDirectory() as folder:
        for each, name in ((model, "device"), (twin, "cpu")):
            nf4.quantize_model(each)
            nf4.save(each, Path(folder, name))
        weights = [Path(folder, n, "model.safetensors") for n in ("device", "cpu")]
        assert_same(*map(load_file, weights))
        loaded = nf4.load(Path(folder, "cpu"), device=DEVICE)
    assert torch.equal(logits(loaded), logits(model))
    assert nf4.dequantize_model(loaded) == nf4.dequantize_model(twin)
    assert_same(moved(loaded.state_dict()), twin.state_dict())


def three_merges_cost_what_they_cost_on_the_cpu():
    for onto in qlora.ONTO:
        (found, merged), (expected, theirs) = (_merged(onto, place) for place in PLACES)
        assert found == expected
        assert_same(moved(merged), theirs)


def _merged(onto, place):
    model = build("llama").to(place)
    original = copy.deepcopy(model)
    torch.manual_seed(1)
    qlora.inject(model, r=4, alpha=8)
    for module in pfs.core.adapter.adapters(model).values():
        nn.init.constant_(module.B, 0.01)
    errors = qlora.merge(model, onto, original=original)
    return errors, model.state_dict()


def adapters_combined_stand_on_the_device():
    with TemporaryDirectory() as folder:
        folders = [
            saved(Path(folder, name), alpha=a) for name, a in (("1", 8), ("2", 3))
        ]
        for how, options in (("concatenation", {}), ("svd", {"r": 4})):
            combine(folders, Path(folder, how), how=how, **options)
            both = [build("llama").to(place) for place in PLACES]
            for model in both:
                pfs.load(model, Path(folder, how))
            assert_same(moved(both[0].state_dict()), both[1].state_dict())


def the_loss_on_prose_is_the_cpus():
    found, expected = (build("llama").to(place) for place in PLACES)
    for model in (found, expected):
        model.set_attn_implementation("eager")
    few = dict(windows=2, length=24)
    losses = general_losses(found, TOKENIZER, **few)
    assert losses == general_losses(expected, TOKENIZER, **few)


def a_prefix_without_its_mlp_is_the_cpus():
    both = [build("llama").to(place) for place in PLACES]
    for model in both:
        torch.manual_seed(3)
        prefix.inject(model, n=3, hidden=8)
        prefix.drop_mlp(model)
    assert_same(moved(both[0].state_dict()), both[1].state_dict())


def positions_without_a_mask_are_the_cpus():
    """Both soft prompts on tokens alone, whole or in two pieces through the cache."""
    for method in (pfs.prompt, pfs.prefix):
        found, expected = (_in_two_pieces(method, place) for place in PLACES)
        assert_same(moved(found), expected)


@torch.no_grad()
def _in_two_pieces(method, place):
    model, ids = build("llama").to(place), tokens().to(place)
    model.set_attn_implementation("eager")
    torch.manual_seed(3)
    method.inject(model, n=3, start=[5, 6])
    first = model(ids[:, :6], use_cache=True)
    rest = model(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    return {"first": first.logits, "rest": rest.logits} | dict(enumerate(states))


def kernels_in_torch_are_the_cpus():
    found, expected = (_products(*place) for place in zip(*_operands(), strict=True))
    assert_same(moved(found), expected)


def _operands():
    shapes = {"x": (3, 5, 16), "W": (12, 16), "A": (4, 16), "B": (12, 4), "bias": (12,)}
    return [drawn(*shape, seed=i) for i, shape in enumerate(shapes.values())]


def _products(x, W, A, B, bias):
    """lora_linear and its form in four bits, with gradients, and gathered adapters."""
    trained = [t.clone().requires_grad_() for t in (x, A, B, bias)]
    x, A, B, bias = trained
    q = nf4.quantize(W)
    dense = kernels.lora_linear(x, W, A, B, 0.5, bias)
    packed = kernels.nf4_lora_linear(x, q, A, B, 0.5, bias)
    (dense.square().sum() + packed.sum()).backward()
    gradients = {f"gradient {i}": t.grad for i, t in enumerate(trained)}
    return gradients | {
        "gathered": _gathered(x.detach(), A.detach(), B.detach()),
        "dense": dense,
        "packed": packed,
        "W": kernels.nf4_dequantize(q),
    }


def _gathered(x, A, B):
    """Rows of two adapters and of none, whose numbers the CPU or the device has."""
    stack, results = Stack.of([(A, B, 0.5), (A[:2], B[:, :2], 2.0)]), []
    for place in (CPU, x.device):
        which = torch.tensor([1, -1, 0], device=place)
        for rows in (which, Plan.of(which, x, stack)):
            y = x.new_zeros(3, 5, 12)
            kernels.gather_lora(y, x, stack, rows)
            results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)
    return results[0]


def optimizers_in_pages_refuse_a_device_they_do_not_know():
    """They name it, and take nothing; on the CPU they are made."""
    parameter = nn.Parameter(drawn(3, 4)[0])
    if DEVICE.type in states.DEVICES:
        PagedAdamW([parameter], budget_bytes=1 << 16)
        return
    with pytest.raises(ValueError, match=f"{DEVICE.type}.*allowed are cpu, cuda"):
        PagedAdamW([parameter], budget_bytes=1 << 16)
    assert torch.equal(parameter.cpu(), drawn(3, 4)[1])


def optimizers_step_as_on_the_cpu(monkeypatch):
    """PagedAdamW, were the device one of its own, and the one of mixed precision."""
    monkeypatch.setattr(states, "DEVICES", (*states.DEVICES, DEVICE.type))
    makers = (
        lambda p: PagedAdamW([p], budget_bytes=64, page_bytes=64),
        lambda p: PagedAdamW([p], amsgrad=True, budget_bytes=1 << 16),
        lambda p: MixedAdamW([p]),
    )
    for make in makers:
        found, expected = (_stepped(make, w) for w in drawn(5, 7))
        assert_same(moved(found), expected)


def _stepped(make, w):
    parameter = nn.Parameter(w.clone())
    optimizer = make(parameter)
    for step in range(3):
        parameter.grad = (w * (step + 1)).sin()
        optimizer.step()
        again = optimizer.state_dict()
        optimizer.load_state_dict(again)
    moments = again["state"][0]
    return {"p": parameter} | {k: moments[k].to(w.device) for k in sorted(moments)}


def chunks_and_checkpoints_learn_as_on_the_cpu():
    """The loss in chunks, of a model that computes its layers twice."""
    found, expected = (_in_chunks(place) for place in PLACES)
    for name, gradient in expected.items():
        assert torch.allclose(moved(found)[name], gradient, rtol=1e-4, atol=1e-6), name


def _in_chunks(place):
    model = build("llama").to(place).train()
    torch.manual_seed(1)
    pfs.lora.inject(model, r=4, alpha=8)
    ids = tokens().to(place)
    with checkpointed(model):
        batch = {"input_ids": ids, "labels": ids}
        summed_loss_in_chunks(model, batch, chunk=5).backward()
    return {name: p.grad for name, p in pfs.trainable(model).items()}


LAWS = [
    four_bits_are_the_cpus,
    the_spec_of_four_bits_is_the_cpus,
    a_weight_that_is_not_finite_is_named,
    a_projection_in_four_bits_is_the_cpus,
    quantized_models_go_to_disk_and_back,
    three_merges_cost_what_they_cost_on_the_cpu,
    adapters_combined_stand_on_the_device,
    the_loss_on_prose_is_the_cpus,
    a_prefix_without_its_mlp_is_the_cpus,
    positions_without_a_mask_are_the_cpus,
    kernels_in_torch_are_the_cpus,
    optimizers_in_pages_refuse_a_device_they_do_not_know,
    optimizers_step_as_on_the_cpu,
    chunks_and_checkpoints_learn_as_on_the_cpu,
]
