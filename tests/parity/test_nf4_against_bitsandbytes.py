"""NF4 against bitsandbytes on a CPU: the same bits, in memory and on disk.

Compared is what both compute from one tensor, flat: where a block crosses the end of a
row, bitsandbytes 0.50.2 dequantizes matrices wrongly on a CPU, as a test here shows.
And its product for machines with AVX512-BF16, which rounds x and W' to bfloat16 in
evaluation, is switched off.
"""

import copy
import json
import logging
from functools import partial

import pytest
import torch
from against import answers, gradients_of, our_name, ours, quietly
from architectures import SHARED
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from model_state import assert_same, largest, logits, loss, train
from planting import assert_caught
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
)

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.common.quiet import quiet_transformers
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.core.counting import count
from peft_from_scratch.files import quantized
from peft_from_scratch.nf4.codes import dynamic
from peft_from_scratch.nf4.double import double_quantize

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks at import
bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
functional = bitsandbytes.functional
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_check_is_size:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.jit.script:DeprecationWarning"),
]

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = ("nf4", "fp4")
WIDE = dict(n_embd=64, n_layer=2, n_head=4, n_positions=64)


def theirs(w, block, code, double=False):
    """(packed bytes, state, dequantized values), flat where they are tensors."""
    options = dict(blocksize=block, quant_type=code, compress_statistics=double)
    packed, state = functional.quantize_4bit(w.flatten(), **options)
    return packed.flatten(), state, functional.dequantize_4bit(packed, state).flatten()


def same(found, reference):
    assert found.dtype == reference.dtype
    return torch.equal(found, reference)


@st.composite
def tensors(draw):
    """Normal values of many sizes, whole blocks of zeros and single outliers in them.

    Blocks whose largest is below 1e-37 are where we differ: test_blocks.py.
    """
    dtype = draw(st.sampled_from(DTYPES))
    n = draw(st.one_of(st.integers(1, 9), st.integers(1, 9000)))
    smallest = {torch.float16: -4, torch.bfloat16: -30}.get(dtype, -33)
    exponent = draw(st.integers(smallest, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.randn(n, generator=generator, dtype=torch.float64) * 10.0**exponent
    if draw(st.booleans()):
        start = draw(st.integers(0, n - 1))
        w[start : start + draw(st.integers(1, 300))] = 0
    if draw(st.booleans()):
        w[draw(st.integers(0, n - 1))] = draw(st.sampled_from([-1, 1])) * 10.0 ** (
            exponent + 1
        )
    return w.to(dtype)


@settings(max_examples=150, deadline=None)
@given(w=tensors(), block=st.sampled_from(BLOCKS), code=st.sampled_from(CODES))
def test_codes_constants_and_values_are_bit_equal(w, block, code):
    packed, state, values = theirs(w, block, code)
    q = nf4.quantize(w, block, False, code)
    assert same(q.packed, packed)
    # It writes 1e-38 for the largest of a short last block of zeros; we write 0.
    assert same(torch.where(state.absmax > 2e-38, state.absmax, 0), q.absmax)
    assert same(nf4.dequantize(q), values)


@settings(max_examples=40, deadline=None)
@given(w=tensors(), block=st.sampled_from(BLOCKS), code=st.sampled_from(CODES))
def test_doubled_constants_are_bit_equal(w, block, code):
    short = len(w) % block
    assume(not short or w[-short:].any())  # or its 1e-38 would be in the mean
    packed, state, values = theirs(w, block, code, double=True)
    q = nf4.quantize(w, block, True, code)
    assert same(q.packed, packed)
    assert same(q.absmax.offset, state.offset)
    assert same(q.absmax.nested_absmax, state.state2.absmax)
    assert same(q.absmax.codes, state.absmax)
    assert same(nf4.dequantize(q), values)


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5000, 12_345])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_eight_bit_codes_of_many_constants(blocks, spread):
    """The 65,536 steps of its CPU code are in our recipe: not one code of many differs.

    A tensor of one block is a case of its own: the constant is its own mean, the unit
    0, and both take the lowest code, which stands for nothing then.
    """
    absmax = 1 + torch.randn(blocks).abs() ** 3 * spread
    doubled = double_quantize(absmax, "dynamic")
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    restored = functional.dequantize_blockwise(codes, state) + offset
    assert same(doubled.codes, codes)
    assert same(doubled.nested_absmax, state.absmax)
    assert same(doubled.dequantize(), restored)
    assert same(dynamic(), state.code)
    if blocks == 1:
        assert doubled.nested_absmax == 0 and same(doubled.dequantize(), absmax)


def test_without_the_steps_some_codes_would_differ():
    law = partial(test_eight_bit_codes_of_many_constants, 12_345, 1.0)
    assert_caught(double_quantize, 'if codebook == "dynamic":', "if False:", law)


def test_zero_blocks():
    w = torch.randn(64 * 6)
    w[64:192] = 0
    for double in (False, True):
        packed, _, values = theirs(w, 64, "nf4", double)
        q = nf4.quantize(w, 64, double)
        assert same(q.packed, packed) and same(nf4.dequantize(q), values)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "shape", [(4096, 3), (24, 4096), (2, 3, 4096), (1, 1), (4096,)]
)
def test_shapes(shape, block):
    w = torch.randn(shape)
    packed, state, values = theirs(w, block, "nf4")
    q = nf4.quantize(w, block, False)
    assert same(q.packed, packed) and same(q.absmax, state.absmax)
    assert same(nf4.dequantize(q), values.view(shape))


@pytest.mark.parametrize("block", BLOCKS)
def test_matrices_whose_rows_are_whole_blocks(block):
    w = torch.randn(6, 4096)
    packed, state = functional.quantize_4bit(w, blocksize=block, quant_type="nf4")
    q = nf4.quantize(w, block, False)
    assert same(q.packed, packed.flatten())
    assert same(nf4.dequantize(q), functional.dequantize_4bit(packed, state))


@pytest.mark.skipif(bitsandbytes.__version__ != "0.50.2", reason="a bug of 0.50.2")
def test_its_cpu_kernel_is_wrong_where_a_block_crosses_rows():
    """Rows of 96 in blocks of 64: it starts a new block at each row when it reads."""
    w = torch.randn(128, 96)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    q = nf4.quantize(w, 64, False)
    assert same(q.packed, packed.flatten()) and same(q.absmax, state.absmax)
    read = functional.dequantize_4bit(packed, state)
    wrong, right = (error(w, each) for each in (read, nf4.dequantize(q)))
    assert wrong > 2 * right
    state.shape = torch.Size([w.numel()])
    flat = functional.dequantize_4bit(packed, state).view(w.shape)
    assert same(flat, nf4.dequantize(q))


def error(w, read):
    return (read - w).square().mean().sqrt().item()


# ------------------------------------------------------------------------ Products


def their_linear(w, bias=None, double=True, **options):
    """A Linear4bit that multiplies in the precision that it is asked for."""
    d_out, d_in = w.shape
    options = dict(compute_dtype=torch.float32, quant_type="nf4") | options
    linear = bitsandbytes.nn.Linear4bit(
        d_in, d_out, bias is not None, compress_statistics=double, **options
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        w.clone(), requires_grad=False, compress_statistics=double, quant_type="nf4"
    )
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias.clone())
    return exact(linear.to("cpu"))


def exact(model):
    """Without the kernel that rounds x and W' to bfloat16 on machines that have it."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_products_and_gradients_are_those_of_linear4bit(biased, double):
    w, x = torch.randn(48, 128), torch.randn(5, 128)
    bias = torch.randn(48) if biased else None
    reference = their_linear(w, bias, double)
    layer = nf4.NF4Linear(
        nf4.quantize(w, double=double), torch.nn.Parameter(bias) if biased else None
    )
    dense = nf4.dequantize(layer.quantized).double()
    exactly, found = x.double().requires_grad_(), []
    y = exactly @ dense.T + (bias.double() if biased else 0)
    y.pow(3).sum().backward()
    for module in (layer, reference):
        x_ = x.clone().requires_grad_()
        out = module(x_)
        out.pow(3).sum().backward()
        assert largest(out, y) < 1e-6 and largest(x_.grad, exactly.grad) < 1e-5
        found.append((out, x_.grad))
    assert largest(found[0][0], found[1][0]) < 1e-6
    assert largest(found[0][1], found[1][1]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_in_the_dtype_of_the_model_values_and_products_have_its_bits(rows, dtype):
    """W' rounded once to the dtype; forward, backward, and while it is kept."""
    w, x = torch.randn(192, 128).to(dtype), torch.randn(rows, 128).to(dtype)
    reference = their_linear(w, compute_dtype=dtype)
    layer = nf4.NF4Linear(nf4.quantize(w))
    state = reference.weight.quant_state
    packed = reference.weight.data.view(-1)
    state.shape, shape = torch.Size([w.numel()]), state.shape
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state).view(w.shape)
    state.shape = shape
    assert theirs.dtype == layer.weight.dtype == dtype
    assert torch.equal(layer.weight, theirs)
    found = []
    for module in (layer, reference):
        x_ = x.clone().requires_grad_()
        y = module(x_)
        y.float().pow(3).sum().backward()
        found.append((y.detach(), x_.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    with torch.no_grad(), nf4.unpacked(layer, budget_bytes=1 << 20):
        assert torch.equal(layer(x), found[1][0])


def test_shares_are_of_values_in_bitsandbytes_too():
    """Its weight has half of a matrix's elements, one byte for two values."""
    model = torch.nn.Sequential(their_linear(torch.randn(64, 128)))
    assert sum(p.numel() for p in model.parameters()) == 64 * 128 // 2
    assert count(model).total == 64 * 128


# ------------------------------------------------------------------------- On disk


def wide(architecture):
    """A small model whose rows are whole blocks of 64."""
    torch.manual_seed(0)
    config = (
        GPT2Config(**WIDE, **SHARED)
        if architecture == "gpt2"
        else LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **SHARED,
        )
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def model_of(name):
    return pfs.load_model("tiny", device="cpu")[0] if name == "tiny" else wide(name)


def read_by_transformers(folder):
    with quiet_transformers():
        return exact(AutoModelForCausalLM.from_pretrained(folder).eval())


def linears(model):
    found = model.named_modules()
    return {n: m for n, m in found if isinstance(m, bitsandbytes.nn.Linear4bit)}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", ["tiny", "gpt2"])
def test_transformers_and_bitsandbytes_read_our_file(name, double, tmp_path):
    model = model_of(name)
    names = nf4.quantize_model(model, double=double)
    nf4.save(model, tmp_path)
    reference = read_by_transformers(tmp_path)
    assert list(linears(reference)) == names
    for name, module in linears(reference).items():
        state = module.weight.quant_state
        values = functional.dequantize_4bit(module.weight.data, state)
        assert same(nf4.dequantize(model.get_submodule(name).quantized), values)
    assert largest(logits(model), logits(reference)) < 1e-5


def as_bitsandbytes_writes(model, folder, double):
    """Exchange every projection's tensors for those of bitsandbytes' own state."""
    nf4.save(model, folder)
    tensors = load_file(folder / quantized.WEIGHTS)
    for name, module in model.named_modules():
        if isinstance(module, nf4.NF4Linear):
            w = nf4.dequantize(module.quantized)
            options = dict(blocksize=64, quant_type="nf4", compress_statistics=double)
            packed, state = functional.quantize_4bit(w, **options)
            held = {key for key in tensors if key.startswith(f"{name}.weight.")}
            written = {
                f"{name}.weight.{key}": value
                for key, value in state.as_dict(packed=True).items()
            }
            assert held == set(written)
            tensors |= written | {f"{name}.weight": packed}
    save_file(tensors, folder / quantized.WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_we_read_what_bitsandbytes_writes(architecture, double, tmp_path):
    """On a model that was rounded once before: both quantize the same new weight."""
    model = wide(architecture)
    nf4.quantize_model(model, double=double)
    as_bitsandbytes_writes(model, tmp_path, double)
    found, again = nf4.load(tmp_path), copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nf4.NF4Linear):
            w = nf4.dequantize(module.quantized)
            q = nf4.quantize(w, double=double)
            assert same(found.get_submodule(name).packed, q.packed)
            assert same(
                nf4.dequantize(found.get_submodule(name).quantized).flatten(),
                theirs(w, 64, "nf4", double)[2],
            )
            again.get_submodule(name).load_state_dict(
                nf4.NF4Linear(q).state_dict(), strict=False
            )
    assert_same(dict(found.state_dict()), dict(again.state_dict()))
    assert torch.equal(logits(found), logits(again))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", ["tiny", "llama", "gpt2"])
def test_we_read_what_transformers_quantizes_and_saves(name, double, tmp_path):
    """Every projection is in four bits on both sides, and no head."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "full")
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with quiet_transformers():
        reference = AutoModelForCausalLM.from_pretrained(
            tmp_path / "full", quantization_config=asked
        )
        reference.save_pretrained(tmp_path / "four")
    nf4.quantize_model(model, double=double)
    found = nf4.load(tmp_path / "four")
    assert_same(dict(found.state_dict()), dict(model.state_dict()))
    assert largest(logits(found), logits(exact(reference.eval()))) < 1e-5


def test_our_states_are_written_as_theirs(tmp_path):
    """Field by field, but for the order: JSON has none."""
    model = wide("llama")
    nf4.quantize_model(model)
    nf4.save(model, tmp_path)
    tensors = load_file(tmp_path / quantized.WEIGHTS)
    start = "model.layers.0.mlp.up_proj.weight"
    held = {k.removeprefix(f"{start}."): v for k, v in tensors.items() if start in k}
    w = nf4.dequantize(model.model.layers[0].mlp.up_proj.quantized)
    packed, state = functional.quantize_4bit(
        w, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    reference = state.as_dict(packed=True)
    assert held.pop(start).shape == packed.shape
    assert set(held) == set(reference)
    for key, value in reference.items():
        if "quant_state" in key:
            states = [json.loads(bytes(t.tolist())) for t in (held[key], value)]
            offsets = [state.pop("nested_offset") for state in states]
            assert offsets[0] == pytest.approx(offsets[1], 0.1)
            assert states[0] == states[1]
        else:
            assert held[key].dtype == value.dtype and held[key].shape == value.shape


@pytest.mark.parametrize("name", ["tiny", "gpt2"])
def test_peft_reads_a_qlora_file_beside_bitsandbytes_codes(name, tmp_path):
    """Logits, and the gradients of A and B, on one base and one adapter file."""
    model = model_of(name)
    pfs.qlora.inject(model, r=4, alpha=6)
    train(model, 2)
    pfs.save(model, tmp_path / "adapter")
    bare = copy.deepcopy(model)
    pfs.remove(bare)
    nf4.save(bare, tmp_path / "base")
    reference = quietly(
        peft.PeftModel.from_pretrained,
        read_by_transformers(tmp_path / "base"),
        tmp_path / "adapter",
        is_trainable=True,
    ).eval()
    assert len(linears(reference)) == len(adapters(model))
    assert largest(answers(model)[0], answers(reference)[0]) < 1e-5
    theirs = {
        our_name(n): p for n, p in reference.named_parameters() if p.requires_grad
    }
    assert largest(ours(model), gradients_of(reference, theirs)) < 1e-5


def test_a_step_beside_linear4bit_is_a_step_beside_ours(tmp_path):
    """The gradients of every embedding and norm, through eight projections and back."""
    model = wide("llama")
    nf4.quantize_model(model)
    nf4.save(model, tmp_path)
    reference = read_by_transformers(tmp_path)
    found = []
    for each in (model, reference):
        each.requires_grad_(False)
        each.model.embed_tokens.weight.requires_grad_(True)
        loss(each).backward()
        found.append(each.model.embed_tokens.weight.grad)
    assert largest(*found) < 1e-5
