"""Laws of DoRA, PiSSA, (IA)³, BitFit and LoRA+: closed forms of their papers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import CONFIGS, GATED, build
from kill_and_resume import contents, differences
from model_state import (
    assert_same,
    largest,
    logits,
    loss,
    refused,
    snapshot,
    train,
    values,
)
from planting import law
from small_runs import adapted, recipe, run
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

import peft_from_scratch as pfs
from laws.core.contract import original
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.methods import bitfit, dora, ia3, loftq, lora, pissa
from peft_from_scratch.methods.dora import DoRA
from peft_from_scratch.methods.ia3 import IA3
from peft_from_scratch.methods.pissa import PiSSA

DOUBLE = dict(dtype=torch.float64)
KINDS = [nn.Linear, Conv1D]


def projection(kind=nn.Linear, d_in=5, d_out=6):
    """A random projection in float64, its bias far from zero."""
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out) if kind is nn.Linear else Conv1D(d_out, d_in)
    for parameter in base.double().parameters():
        nn.init.normal_(parameter)
    return base


def matrix(base):
    """W0 (d_out, d_in)"""
    return base.weight if isinstance(base, nn.Linear) else base.weight.T


def dora_after_training(kind=nn.Linear, **options):
    layer = DoRA(projection(kind), r=2, alpha=6, **options)
    for parameter in (layer.A, layer.B, layer.m):
        nn.init.normal_(parameter)
    return layer


def dora_is_its_equation(kind=nn.Linear, detached=True):
    """h = m / ‖V‖ ⊙ V x + b; the norm of each row, of which nothing is trained."""
    layer = dora_after_training(kind)
    x = torch.randn(2, 3, 5, **DOUBLE).requires_grad_()
    dh = torch.randn(2, 3, 6, **DOUBLE)
    V = matrix(layer.base) + 3 * layer.B @ layer.A
    norm = V.square().sum(1).sqrt()
    norm = norm.detach() if detached else norm
    h = x @ (V * (layer.m / norm)[:, None]).T + layer.base.bias
    wanted = (x, layer.A, layer.B, layer.m)
    ours = [layer(x), *torch.autograd.grad(layer(x), wanted, dh)]
    theirs = [h, *torch.autograd.grad(h, wanted, dh)]
    return [
        torch.allclose(found, expected, rtol=1e-11, atol=1e-11)
        for found, expected in zip(ours, theirs, strict=True)
    ]


@law
@pytest.mark.parametrize("kind", KINDS)
def the_norm_is_no_part_of_the_gradient(kind=nn.Linear):
    """h, and the gradients of x, A, B and m; those of A and B would differ."""
    assert dora_is_its_equation(kind) == [True] * 5
    assert dora_is_its_equation(kind, detached=False) == [
        True,
        True,
        False,
        False,
        True,
    ]


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def merged_rows_have_the_length_m(architecture="gpt2"):
    model = copy.deepcopy(original(architecture))
    dora.inject(model, r=3, alpha=6)
    train(model, 3)
    lengths = {
        name: layer.m.detach().clone() for name, layer in adapters(model).items()
    }
    biases = {n: p.clone() for n, p in model.state_dict().items() if n.endswith("bias")}
    unmerged = logits(model)
    pfs.merge(model)
    assert largest(logits(model), unmerged) < 1e-5
    for name, m in lengths.items():
        W = matrix(model.get_submodule(name))
        assert largest(W.norm(dim=1), m.abs()) < 1e-6, name
        assert largest(W.norm(dim=1), W.norm(dim=1).mean().expand_as(m)) > 1e-3
    after = model.state_dict()
    assert_same({n: after[n.replace(".base", "")] for n in biases}, biases)


@law
def dropout_falls_on_the_change_alone():
    """x itself goes through W0 and b once; the change of both parts is dropped."""
    layer = dora_after_training(dropout=0.5).train()
    x = torch.randn(40, 5, **DOUBLE)
    torch.manual_seed(3)
    kept = F.dropout(torch.ones_like(x), 0.5)
    torch.manual_seed(3)
    found = layer(x)
    W, V = matrix(layer.base), matrix(layer.base) + 3 * layer.B @ layer.A
    g = layer.m / V.norm(dim=1)
    expected = layer.base(x) + (x * kept) @ (g[:, None] * V - W).T
    assert torch.allclose(found, expected)


@law
def a_row_of_zeros_is_refused():
    """Its m and its norm are zero: 0 / 0, and NaN in every logit."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = 0
    with refused(model, "layers.1.mlp.down_proj", "row 3", "exclude"):
        dora.inject(model)


@law
@pytest.mark.parametrize("kind", KINDS)
def A_and_B_are_the_principal_triplets(kind=nn.Linear):
    base = projection(kind, 7, 6)
    W0 = matrix(base).detach().clone()
    layer = PiSSA(base, r=2, alpha=6)
    layer.on_attach()
    U, S, Vt = torch.linalg.svd(W0)
    top = U[:, :2] @ S[:2].diag() @ Vt[:2]
    torch.testing.assert_close(3 * layer.B @ layer.A, top)
    assert_same({"A": layer.A0, "B": layer.B0}, {"A": layer.A.data, "B": layer.B.data})
    for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):  # S / scale, in each half
        torch.testing.assert_close(gram, (S[:2] / 3).diag())
    left = torch.linalg.svdvals(matrix(layer.base))
    torch.testing.assert_close(left[:4], S[2:])
    assert left[4:].abs().max() < 1e-12
    x = torch.randn(3, 7, **DOUBLE)
    torch.testing.assert_close(layer(x), x @ W0.T + base.bias)


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", CONFIGS)
def removed_after_training_to_the_last_bit(architecture="gpt2", dtype=torch.float32):
    model = copy.deepcopy(original(architecture, dtype))
    before, expected = snapshot(model), logits(model)
    pissa.inject(model, r=4)
    start = logits(model)
    train(model, 2)
    close = 1e-5 if dtype == torch.float32 else 0.1
    assert largest(start, expected) < close < largest(logits(model), expected)
    pfs.remove(model)
    assert_same(snapshot(model), before)


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def a_file_is_a_lora_of_twice_the_rank(folder, architecture="llama"):
    model, loaded = copy.deepcopy(original(architecture)), build(architecture)
    pissa.inject(model, r=3, alpha=5)
    train(model, 3)
    pfs.save(model, folder)
    pfs.load(loaded, folder)
    assert largest(logits(loaded), logits(model)) < 1e-5
    for layer in adapters(loaded).values():
        assert type(layer) is lora.LoRA
        assert layer.A.shape[0] == 6 and layer.scale == 5 / 3
    assert largest(logits(loaded), logits(build(architecture))) > 1e-3


@law
def a_weight_of_fewer_directions_gives_all_of_them(folder):
    """k_proj is 16 x 32: 16 singular values are in its A and B, and nothing is left."""
    model, loaded = build("llama"), build("llama")
    expected = logits(model)
    pissa.inject(model, r=20, alpha=5)
    assert largest(logits(model), expected) < 1e-5
    for name, layer in adapters(model).items():
        narrow = name.endswith(("k_proj", "v_proj"))
        assert len(layer.A) == layer.B.shape[1] == (16 if narrow else 20)
        assert layer.scale == 5 / 20
        assert not narrow or layer.base.weight.abs().max() < 1e-6
    train(model, 2)
    pfs.save(model, folder)
    pfs.load(loaded, folder)
    assert largest(logits(loaded), logits(model)) < 1e-5


@law
def loftq_starts_at_what_was_lost_in_narrow_weights_too():
    """More than the 16 directions of k_proj: the others start as LoRA's do."""
    model, original = build("llama"), build("llama")
    loftq.inject(model, r=20)
    for name, layer in adapters(model).items():
        lost = original.get_submodule(name).weight - layer.base.weight
        if name.endswith(("k_proj", "v_proj")):
            assert largest(layer.delta(), lost.detach()) < 1e-5, name
            assert not layer.B[:, 16:].any() and layer.A[16:].any(dim=1).all()


@law
def a_tied_weight_is_refused():
    model = build("gpt2")
    with refused(model, "lm_head", "one tensor", "wte"):
        pissa.inject(model, r=2, targets=["all-linear", "lm_head"])


@law
def a_split_that_fails_halfway_leaves_no_trace(monkeypatch):
    model, sound, done = build("llama"), PiSSA.on_attach, []

    def fails_at_the_third(layer):
        if len(done) == 2:
            raise MemoryError("planted")
        done.append(layer)
        sound(layer)

    failing = refused(model, "planted", error=MemoryError)
    with monkeypatch.context() as patched, failing:
        patched.setattr(PiSSA, "on_attach", fails_at_the_third)
        pissa.inject(model, r=2)


@law
@pytest.mark.parametrize("kind", KINDS)
def ia3_is_its_equation(kind=nn.Linear):
    """Keys and values: what comes out, bias included. The MLP: what goes in."""
    for feedforward in (False, True):
        layer = IA3(projection(kind), feedforward)
        assert torch.equal(layer.l, torch.ones_like(layer.l))
        nn.init.normal_(layer.l)
        W, b, l = matrix(layer.base), layer.base.bias, layer.l.flatten()  # noqa: E741
        x = torch.randn(2, 3, 5, **DOUBLE).requires_grad_()
        dh = torch.randn(2, 3, 6, **DOUBLE)
        h = (x * l) @ W.T + b if feedforward else l * (x @ W.T + b)
        merged = copy.deepcopy(layer.base)
        for name, tensor in layer.merged(torch.float64).items():
            merged.get_parameter(name).data = tensor.detach()
        torch.testing.assert_close(merged(x), h)
        torch.testing.assert_close(layer(x), h)
        ours, theirs = (
            torch.autograd.grad(out, (x, layer.l), dh) for out in (layer(x), h)
        )
        torch.testing.assert_close(ours, theirs)


SCALED = {  # ends of the names: scaled behind, and in front
    "gpt2": (("attn.c_attn",), ("mlp.c_proj",)),
    "opt": (("k_proj", "v_proj"), ("fc2",)),
} | dict.fromkeys(("llama", "qwen", "gemma"), (("k_proj", "v_proj"), ("down_proj",)))


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def keys_values_and_the_last_of_the_mlp_are_scaled(architecture="llama", given=None):
    """The untouched model's own weights, multiplied by the same vectors."""
    model, untouched = copy.deepcopy(original(architecture)), build(architecture)
    ia3.inject(model, **(given or {}))
    train(model, 3)
    behind, front = SCALED[architecture]
    every = [name for name, _ in untouched.named_modules()]
    wanted = [n for n in every if n.endswith(tuple(f".{e}" for e in behind + front))]
    assert list(adapters(model)) == wanted
    with torch.no_grad():
        for name, layer in adapters(model).items():
            base, l = untouched.get_submodule(name), layer.l.flatten()  # noqa: E741
            inside = name.endswith(front)
            matrix(base).mul_(l[None, :] if inside else l[:, None])
            if not inside and base.bias is not None:
                base.bias.mul_(l)
    assert largest(logits(model), logits(untouched)) < 1e-5
    pfs.merge(model)
    assert largest(logits(model), logits(untouched)) < 1e-6


def with_biases():
    torch.manual_seed(0)
    config = LlamaConfig(**GATED, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@law
def the_bias_of_a_key_counts_in_rotary_models_only():
    """Where positions are added to embeddings it shifts all of a query's scores."""
    ratios = {}
    for name, model in (("opt", build("opt")), ("llama", with_biases())):
        bitfit.inject(model)
        loss(model).backward()
        norms = {n: p.grad.norm() for n, p in pfs.trainable(model).items()}
        keys = [v for n, v in norms.items() if n.endswith("k_proj.bias")]
        others = [
            v for n, v in norms.items() if n.endswith(("q_proj.bias", "v_proj.bias"))
        ]
        ratios[name] = (max(keys) / min(others)).item()
    assert ratios["opt"] < 1e-4 and ratios["llama"] > 1e-2, ratios


@law
def biases_and_nothing_else_train():
    model = with_biases()
    every = [name for name, _ in model.named_parameters()]
    names = bitfit.inject(model)
    assert names == [name for name in every if name.endswith(".bias")]
    assert len(names) == 2 * 4 and list(values(model)) == names


@law
def biases_that_no_text_reaches_are_left_alone():
    """A tower for images has biases, and no token's logits depend on them."""
    model = with_biases()
    model.tower = nn.Linear(4, 4)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = [n for n in flags if n.endswith(".bias") and n != "tower.bias"]
    assert list(bitfit.plan(model).base_params) == expected
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert bitfit.inject(model) == expected
    none = build("llama")
    none.tower = nn.Linear(4, 4)
    with refused(none, "no text gives", "tower.bias"):
        bitfit.inject(none)


def first_moves(**changes):
    """{name: how far the first AdamW step moved a tensor, in the median}."""
    model = adapted(dropout=0)
    for layer in adapters(model).values():
        nn.init.normal_(layer.B, std=0.1)  # else A has no gradient in the first step
    before = values(model)
    run(model, recipe(steps=1, warmup=0, weight_decay=0.0, **changes))
    return {n: (t - before[n]).abs().median() for n, t in values(model).items()}


@law
def B_moves_lr_ratio_times_as_far():
    """Adam's first step is the rate itself, whatever the gradient."""
    usual, plus = first_moves(lr=1e-4), first_moves(lr=1e-4, lr_ratio=16)
    for name in usual:
        assert abs(usual[name] / 1e-4 - 1) < 1e-2, name
        ratio = 16 if name.endswith(".B") else 1
        assert abs(plus[name] / usual[name] / ratio - 1) < 1e-2, name


@law
def a_B_of_zero_ends_its_first_step_at_the_rate():
    """As every LoRA starts; and the history tells the recipe's rate."""
    model = adapted(dropout=0)
    history = run(model, recipe(steps=1, warmup=0, lr=1e-4, lr_ratio=16))
    assert history.lr == [1e-4]
    for layer in adapters(model).values():
        assert abs(layer.B.abs().median() / 16e-4 - 1) < 1e-2


@law
def resumed_is_bit_equal(folder):
    settings = recipe(lr_ratio=16)
    whole, half = adapted(), adapted()
    run(whole, settings, checkpoints=folder / "whole")

    class Killed(Exception):
        pass

    def kill(history):
        if history.steps == 6:  # the checkpoint is of step 4
            raise Killed

    with pytest.raises(Killed):
        run(half, settings, checkpoints=folder / "half", on_step=kill)
    again = adapted()
    history = run(again, settings, checkpoints=folder / "half")
    assert history.resumed_from == 4
    assert_same(values(again), values(whole))
    assert not differences(contents(folder / "half"), contents(folder / "whole"))
    with refused(again, "lr_ratio", "16"):
        run(again, recipe(lr_ratio=8), checkpoints=folder / "half")


def a_ratio_without_a_lora_is_refused(method=ia3, **how):
    model = build("llama")
    method.inject(model, **how)
    with refused(model, "lr_ratio=16", "LlamaForCausalLM"):
        run(model, recipe(lr_ratio=16, steps=1, warmup=0))
