"""Laws of projections in four bits, against dense weights in float64."""

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from architectures import CONFIGS, SHARED, build
from model_state import assert_same, gradients, largest, logits, loss, refused, train
from planting import law
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import peft_from_scratch as pfs
from laws.core import contract as laws
from peft_from_scratch import nf4
from peft_from_scratch.core import adapter
from peft_from_scratch.core.counting import count
from peft_from_scratch.core.targets import resolve
from peft_from_scratch.memory.meter import Meter, measure_step
from peft_from_scratch.nf4 import NF4Linear, linear

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def two_threads_on(model):
    """A function that has two threads at once ask the model ten times each.

    It returns a thread's number for each answer unlike the one of now, without threads.
    """
    ids = [torch.randint(3, 320, (2, 8)) for _ in range(2)]
    expected, wrong = [logits(model, each) for each in ids], []

    def work(i):
        for _ in range(10):
            if not torch.equal(logits(model, ids[i]), expected[i]):
                wrong.append(i)

    def run():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return wrong

    return run


def in_four_bits(architecture="llama", **arguments):
    model = build(architecture, dtype=arguments.pop("of", torch.float32))
    nf4.quantize_model(model, **arguments)
    return model


def packed(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def layer(d_out=48, d_in=40, bias=True, **arguments):
    """Both sizes are no multiple of the block, and differ."""
    q = nf4.quantize(drawn(d_out, d_in), arguments.pop("block", 64))
    return NF4Linear(q, nn.Parameter(drawn(d_out)) if bias else None, **arguments)


def dense(module, dtype=torch.float64):
    """(W' (d_out, d_in), bias or None), from the codes."""
    W = nf4.dequantize(module.quantized).to(dtype)
    return W, None if module.bias is None else module.bias.detach().to(dtype)


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def product_and_gradient_are_those_of_the_dense_weight(architecture="gpt2"):
    for name, module in packed(in_four_bits(architecture)).items():
        x = drawn(2, 5, module.in_features).requires_grad_()
        exact = x.detach().double().requires_grad_()
        y, expected = module(x), F.linear(exact, *dense(module))
        dy = drawn(*y.shape)
        y.backward(dy)
        expected.backward(dy.double())
        assert y.dtype == x.dtype and y.shape == expected.shape
        assert largest(y, expected) < 2e-6, name
        assert largest(x.grad, exact.grad) < 2e-6, name


def made_plain(model):
    """A copy with the dequantized weights as parameters."""
    model = copy.deepcopy(model)
    for module in packed(model).values():
        adapter.replace_modules(model, {module: module.plain()})
    return model


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def a_model_computes_what_its_dense_twin_computes(architecture="gpt2"):
    model = in_four_bits(architecture)
    twin, original = made_plain(model), build(architecture)
    assert laws.types(twin) == laws.types(original)
    assert str(twin) == str(original)
    for name, parameter in original.named_parameters():
        found = twin.get_parameter(name)
        assert found.shape == parameter.shape and found.is_contiguous()
        assert 0 <= largest(found, parameter) < 0.16, name
    assert largest(logits(model), logits(twin)) < 1e-5
    assert largest(logits(twin), logits(original)) > 1e-3
    found = []
    for each in (model, twin):
        each.zero_grad()
        loss(each.train()).backward()
        named = dict(each.named_parameters())
        found.append({n: p.grad for n, p in named.items() if n in shared(model)})
    assert largest(*found) < 1e-5


def shared(model):
    """Parameters that four bits leave: embeddings, norms, biases, heads."""
    return {name for name, _ in model.named_parameters()}


@law
def both_derivatives_are_those_of_the_dense_weight():
    """A function of the gradient, differentiated again; and finite differences."""
    module = layer(7, 5)
    W, bias = dense(module)
    found = []
    for f in (module, lambda x: F.linear(x, W, bias)):
        torch.manual_seed(1)
        x = drawn(3, 5, dtype=torch.float64).requires_grad_()
        (g,) = torch.autograd.grad((f(x) ** 3).sum(), x, create_graph=True)
        (g**2).sum().backward()
        found.append(torch.cat([g.detach(), x.grad]))
    assert largest(*found) < 1e-12
    x = drawn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


@law
def each_layer_has_the_buffer_for_itself_while_it_needs_it():
    """Two layers, one after the other, and back: neither sees the other's weight."""
    first, second = layer(48, 40), layer(40, 48)
    nf4.share_buffer(nn.Sequential(first, second))
    assert first.buffer is second.buffer
    x = drawn(6, 40).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y = second(first(x).relu())
    expected = F.linear(F.linear(exact, *dense(first)).relu(), *dense(second))
    assert largest(y, expected) < 2e-6
    y.sum().backward()
    expected.sum().backward()
    assert largest(x.grad, exact.grad) < 2e-6


class Slow(NF4Linear):
    """Waits, after dequantizing, for the other thread to have done the same."""

    barrier: threading.Barrier
    patience = 20.0  # seconds

    @contextmanager
    def dequantized(self, dtype):
        with super().dequantized(dtype) as W:
            with suppress(threading.BrokenBarrierError):
                self.barrier.wait(self.patience)
            yield W


@law
def threads_do_not_write_into_each_others_buffer(patience=Slow.patience):
    x, products = drawn(4, 24), {}
    modules = [Slow(layer(16, 24).quantized) for _ in range(2)]
    nf4.share_buffer(nn.Sequential(*modules))
    barrier = threading.Barrier(2)
    with modules[0].buffer.of((16, 24), x.dtype, x.device):
        pass  # this thread's own buffer
    for module in modules:
        module.barrier, module.patience = barrier, patience

    def work(i):
        with torch.no_grad():
            products[i] = modules[i](x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join(timeout=30) for thread in threads]
    for i, module in enumerate(modules):
        assert largest(products[i], F.linear(x.double(), dense(module)[0])) < 2e-6
    return barrier


def as_if_with_streams():
    """The CPU, for the buffer, is a device to which all threads send their work."""
    return mock.patch.object(linear, "has_streams", lambda device: True)


@law
def threads_on_one_stream_do_not_write_into_its_buffer():
    """The second thread waits outside; so the first one's patience must end."""
    with as_if_with_streams():
        barrier = threads_do_not_write_into_each_others_buffer(patience=0.2)
    assert barrier.broken


@law
def backward_in_another_thread_has_the_streams_buffer():
    """As on a GPU, where autograd runs it in a lasting thread of its own."""
    model, reference = in_four_bits(), in_four_bits()
    for each in (model, reference):
        torch.manual_seed(0)
        pfs.lora.inject(each, r=2)
    buffers = next(iter(packed(model).values())).buffer._of_stream
    with as_if_with_streams(), ThreadPoolExecutor(1) as autograd:
        for _ in range(2):
            step_loss = loss(model)
            assert not buffers, "the buffer stands beside the logits"
            autograd.submit(step_loss.backward).result()
            assert len(buffers) == 1
    for _ in range(2):
        loss(reference).backward()
    expected = pfs.trainable(reference)
    for name, parameter in pfs.trainable(model).items():
        assert torch.equal(parameter.grad, expected[name].grad)


@law
def the_buffer_is_as_large_as_the_largest_weight_and_one_for_all():
    model = in_four_bits()
    logits(model)
    assert len({id(m.buffer) for m in packed(model).values()}) == 1
    buffer = model.model.layers[0].mlp.up_proj.buffer
    (held,) = vars(buffer._of_thread).values()
    assert held.nbytes == 4 * max(m.values for m in packed(model).values())
    loss(model)  # where gradients will follow, nothing of it stands beside the logits
    assert not vars(buffer._of_thread)
    assert [m.is_last for m in packed(model).values()] == [False] * 13 + [True]


@law
def inference_first_and_training_afterwards():
    model = in_four_bits()
    with torch.inference_mode():
        expected = model(torch.arange(3, 9)[None]).logits.clone()
    pfs.lora.inject(model)
    train(model, 1)
    assert all(p.grad is None for p in model.parameters())
    pfs.remove(model)
    assert torch.equal(logits(model, torch.arange(3, 9)[None]), expected)


@law
def half_precision_keeps_the_constants():
    """.half() and the like convert what trains; the constants' digits stay."""
    for double in (False, True):
        for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
            module = NF4Linear(
                nf4.quantize(drawn(32, 40), double=double), nn.Parameter(drawn(32))
            )
            before = {name: b.clone() for name, b in module.named_buffers()}
            dtype = convert(module).bias.dtype
            assert_same(dict(module.named_buffers()), before)
            x = drawn(3, 40, dtype=dtype)
            exact = F.linear(x.double(), *dense(module))
            assert module(x).dtype == dtype
            assert largest(module(x), exact) < (1e-6 if dtype == torch.double else 0.02)


@law
def a_copy_has_a_buffer_of_its_own():
    model = in_four_bits()
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        ours, theirs = (
            {id(m.buffer) for m in packed(each).values()} for each in (model, other)
        )
        assert len(theirs) == 1 and not ours & theirs
        for module in packed(other).values():
            module.packed.zero_()
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(model), expected)


@law
def compiled_equals_eager():
    """The products are no graph of the compiler's; all else is, and gradients pass."""
    model = in_four_bits(targets="mlp", exclude=".*up_proj")
    pfs.lora.inject(model)
    train(model, 1)
    exact = gradients(model.train())
    assert largest(gradients(torch.compile(model, backend="eager")), exact) < 1e-5


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def heads_and_embeddings_stay_and_every_projection_goes(architecture="llama"):
    model, original = in_four_bits(architecture), build(architecture)
    names = list(resolve(original, "all-linear"))
    assert list(packed(model)) == names
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, original.get_parameter(name))
        assert parameter.requires_grad
    for name, module in packed(model).items():
        before = original.get_submodule(name)
        W = before.weight.T if architecture == "gpt2" else before.weight
        expected = nf4.quantize(W.detach())
        assert torch.equal(module.packed, expected.packed), name
        assert torch.equal(nf4.dequantize(module.quantized), nf4.dequantize(expected))
        assert not module.training
        assert (module.bias is None) == (getattr(before, "bias", None) is None)
    assert count(model).total == count(original).total


@law
def arguments_reach_every_projection():
    model = build("gpt2").train()
    asked = dict(block=32, double=False, code="fp4", compute_dtype=torch.bfloat16)
    names = nf4.quantize_model(model, targets="mlp", exclude="h.0.*", **asked)
    assert names == [f"transformer.h.1.mlp.{part}" for part in ("c_fc", "c_proj")]
    assert list(packed(model)) == names
    for module in packed(model).values():
        assert (module.block, module.constant_codebook, module.codebook) == (
            32,
            None,
            "fp4",
        )
        assert module.compute_dtype == torch.bfloat16
        assert module.training and module.transposed


@law
def no_full_copy_survives():
    """Each weight is gone before the next one is quantized."""
    model = build("llama")
    names = list(resolve(model, "all-linear"))
    weights = [weakref.ref(model.get_submodule(n).weight) for n in names]
    alive = []

    def swapped(model, exchanged):
        adapter.replace_modules(model, exchanged)
        alive.append(sum(weight() is not None for weight in weights))

    original, linear.replace_modules = linear.replace_modules, swapped
    try:
        nf4.quantize_model(model)
    finally:
        linear.replace_modules = original
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert alive == [len(names) - i for i in range(len(names))]  # the one in work, too


LARGE = {  # weights beside which the pieces that are worked on are small
    "llama": LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        **SHARED,
    ),
    "gpt2": GPT2Config(n_embd=256, n_layer=2, n_head=4, **SHARED),
}


@law
@pytest.mark.parametrize("architecture", LARGE)
def quantizing_takes_no_copy_of_the_model(architecture="llama"):
    """Counted: the most bytes at a time, in units of the largest projection."""
    model = AutoModelForCausalLM.from_config(LARGE[architecture], dtype=torch.float32)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    one = max(m.weight.nbytes for m in resolve(model, "all-linear").values())
    with Meter(model) as meter:
        nf4.quantize_model(model)
    more = (meter.memory().peak - held) / one
    assert more < (1.25 if architecture == "gpt2" else 0.5)


@law
def a_step_holds_one_dequantized_weight_at_a_time():
    """QLoRA's against LoRA's on the dense twin: four bits less, one weight more."""
    found = {}
    for name in ("four bits", "dense"):
        model = in_four_bits()
        if name == "dense":
            model = made_plain(model)
        pfs.lora.inject(model)
        optimizer = torch.optim.AdamW(pfs.trainable(model).values(), foreach=False)

        def step(model=model, optimizer=optimizer):
            loss(model.train()).backward()
            optimizer.step()

        tensors = [*model.parameters(), *model.buffers()]
        memory = measure_step(model, step)
        assert memory.weights == sum(t.nbytes for t in tensors)
        found[name] = memory
    values = [m.values for m in packed(in_four_bits()).values()]
    saved = found["dense"].weights - found["four bits"].weights
    bits = 4 * sum(values) - saved
    assert bits < 0.7 * sum(values)  # bytes: below 5.6 bits in so small blocks
    more = found["four bits"].peak - (found["dense"].peak - saved)
    # The buffer, and the same weight on its way there: 4 bytes a value, in pairs. Less
    # where the peak is at the logits, beside which there is no buffer.
    assert more < 4 * max(values) * 3 < 4 * sum(values) / 2


def dequantized_per_step(model, **options):
    """{name: how often its weight was dequantized in a forward and a backward pass}."""
    wanted = {id(m.packed): n for n, m in packed(model).items()}
    names = {k: n.removesuffix(".base") for k, n in wanted.items()}
    calls, sound = dict.fromkeys(names.values(), 0), linear.dequantize

    def counting(q, *rest, **named):
        calls[names[id(q.packed)]] += 1
        return sound(q, *rest, **named)

    linear.dequantize = counting
    try:
        loss(model.train(), **options).backward()
    finally:
        linear.dequantize = sound
    return calls


@law
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def a_step_dequantizes_each_weight_twice(architecture="llama"):
    """That is why QLoRA is slower: once for y = x W'ᵀ and once for dx = dy W'.

    The first layer's projections that read the frozen embeddings need no dx, and a
    layer under checkpointing computes its y a second time.
    """
    model = in_four_bits(architecture)
    pfs.lora.inject(model)
    calls = dequantized_per_step(model)
    first = ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")
    once = {n for n in calls if n.endswith((*first, "0.attn.c_attn"))}
    assert calls == {n: 1 if n in once else 2 for n in calls} and once
    model.enable_input_require_grads()
    assert set(dequantized_per_step(model).values()) == {2}
    model.gradient_checkpointing_enable()
    assert set(dequantized_per_step(model).values()) == {3}


@law
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def dequantized_it_is_the_dense_twin(architecture="gpt2"):
    model = in_four_bits(architecture)
    expected, twin = logits(model), made_plain(model)
    adapted = copy.deepcopy(model)
    pfs.lora.inject(adapted)
    with refused(adapted, "carries lora adapters already"):
        nf4.dequantize_model(adapted)
    names = list(packed(model))
    assert nf4.dequantize_model(model) == names and not packed(model)
    assert_same(model.state_dict(), twin.state_dict())
    assert largest(logits(model), expected) < 1e-5
    assert nf4.dequantize_model(model) == []


def with_a_nan(model):
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan


def tied_to_the_first(model):
    first, last = model.model.layers[0].mlp, model.model.layers[1].mlp
    last.up_proj.weight = first.up_proj.weight


def half_done_before(model):
    nf4.quantize_model(model, targets=r".*layers\.1\.mlp\.down_proj")


REFUSED = {  # what is wrong with a model -> (how, arguments, words of the error)
    "a NaN in the last weight": (
        with_a_nan,
        {},
        ("layers.1.mlp.down_proj: w[3, 5] is nan",),
    ),
    "a weight that two modules share": (
        tied_to_the_first,
        {},
        ("up_proj.weight is one tensor with model.layers.0.mlp.up_proj.weight",),
    ),
    "the head, tied": (
        lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
        dict(targets=["all-linear", "lm_head"]),
        ("lm_head.weight is one tensor with model.embed_tokens.weight",),
    ),
    "quantized before": (half_done_before, {}, ("in four bits already", "down_proj")),
    "adapters on it": (pfs.lora.inject, {}, ("carries lora adapters already",)),
    "adapters on a part of it": (
        lambda model: pfs.lora.inject(model.model),
        {},
        ("is a LoRA already",),
    ),
    "in float64": (
        lambda model: model.double(),
        {},
        ("q_proj: a tensor of torch.float64 cannot be quantized",),
    ),
    "no such target": (lambda model: 0, dict(targets="q_prj"), ("matches no module",)),
    "everything excluded": (
        lambda model: 0,
        dict(exclude="all-linear"),
        ("leaves no module",),
    ),
    "a block of 0": (lambda model: 0, dict(block=0), ("q_proj: block=0",)),
    "no such code": (lambda model: 0, dict(code="nf5"), ("code='nf5'",)),
    "no such recipe": (lambda model: 0, dict(double="x"), ("double='x'",)),
    "a compute dtype that is none": (
        lambda model: 0,
        dict(compute_dtype=torch.int8),
        ("compute_dtype=torch.int8",),
    ),
}


@law
@pytest.mark.parametrize("name", REFUSED)
def a_refusal_leaves_the_model_as_it_was(name="a NaN in the last weight"):
    how, arguments, words = REFUSED[name]
    model = build("llama")
    how(model)
    with refused(model, *words):
        nf4.quantize_model(model, **arguments)


@law
def what_changes_weights_is_refused_on_four_bits():
    """PiSSA takes a part out of the weight; full fine-tuning moves all of it."""
    model = in_four_bits()
    with refused(model, "q_proj is a NF4Linear", "PiSSA", "use LoRA"):
        pfs.pissa.inject(model, r=2)
    with refused(model, "q_proj is a NF4Linear", "full fine-tuning"):
        pfs.full.inject(model, keep_original=True)
    some = build("llama")
    nf4.quantize_model(some, targets="mlp")
    pfs.pissa.inject(some, r=2, targets="attention")
