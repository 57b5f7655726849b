"""Laws of LoRA: its closed form, its start, its precisions, and who may watch it."""

import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from model_state import largest, logits, loss, refused
from planting import law
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.modules import module as hooks
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.methods import lora_fast
from peft_from_scratch.methods.lora import LoRA
from peft_from_scratch.methods.lora_fast import low_rank_sum

DOUBLE = dict(dtype=torch.float64)


def adapted(d_in, d_out, r, *, kind=nn.Linear, bias=True, dtype=torch.float64, **how):
    """A LoRA with random B, its base an nn.Linear or a Conv1D of (d_in, d_out)."""
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out, bias) if kind is nn.Linear else Conv1D(d_out, d_in)
    lora = LoRA(base.to(dtype), r, **how)
    nn.init.normal_(lora.B)
    nn.init.normal_(base.bias) if base.bias is not None else None
    return lora


def closed_form(lora, x, scale):
    W = lora.base.weight if isinstance(lora.base, nn.Linear) else lora.base.weight.T
    bias = 0 if lora.base.bias is None else lora.base.bias
    return x @ (W + scale * lora.B @ lora.A).T + bias


def forward_is_the_equation(
    d_in=4, d_out=5, leading=(2, 3), r=2, kind=nn.Linear, bias=True, transposed=False
):
    lora = adapted(d_in, d_out, r, kind=kind, bias=bias, alpha=5)
    if transposed and len(leading) > 1 and kind is nn.Linear:  # Conv1D wants no view
        x = torch.randn(*leading[::-1], d_in, **DOUBLE)
        x = x.permute(*reversed(range(len(leading))), -1)
    else:
        x = torch.randn(*leading, d_in, **DOUBLE)
    expected = closed_form(lora, x, 5 / r)
    assert lora(x).shape == expected.shape
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)


def gradients_are_those_of_the_equation(
    d_in=4, d_out=5, leading=(2, 3), r=2, *, kind=nn.Linear
):
    """dx, dA and dB, against autograd on the plain expression."""
    lora = adapted(d_in, d_out, r, kind=kind, alpha=3)
    x = torch.randn(*leading, d_in, **DOUBLE).requires_grad_()
    dy = torch.randn(*leading, d_out, **DOUBLE)
    wanted = (x, lora.A, lora.B)
    ours = torch.autograd.grad(lora(x), wanted, dy)
    expected = torch.autograd.grad(closed_form(lora, x, 3 / r), wanted, dy)
    for got, right in zip(ours, expected, strict=True):
        assert torch.allclose(got, right, rtol=1e-11, atol=1e-12)


@law
@pytest.mark.parametrize("kind", ["Linear", "NF4Linear"])
@pytest.mark.parametrize("needs", ["xdABb", "xAB", "dAB", "AB", "xd", "xA", "A", "b"])
def both_derivatives_are_those_of_finite_differences(needs="xdABb", kind="Linear"):
    """Of x, x with dropout (d), A, B and the bias (b), alone and together."""
    torch.manual_seed(0)
    shapes = dict(x=(2, 3, 4), d=(2, 3, 4), A=(2, 4), B=(5, 2), b=(5,))
    inputs = [
        torch.randn(shape, **DOUBLE).requires_grad_(name in needs)
        for name, shape in shapes.items()
    ]
    base = nn.Linear(4, 5, **DOUBLE).requires_grad_(False)
    if kind == "NF4Linear":
        base = nf4.NF4Linear(nf4.quantize(base.weight.float()))
    del base.bias

    def update(x, d, A, B, b):
        base.bias = b
        return low_rank_sum(base, x, d if "d" in needs else x, A, B, 1.7)

    assert torch.autograd.gradcheck(update, inputs, raise_exception=False)
    assert torch.autograd.gradgradcheck(update, inputs, raise_exception=False)


@law
def every_argument_reaches_every_module():
    model = build("gpt2")
    pfs.lora.inject(
        model,
        r=4,
        alpha=3,
        rslora=True,
        dropout=0.25,
        rank_pattern={"c_fc": 9, r".*\.1\..*": 2},  # the first match decides
        alpha_pattern={"transformer.h.0.attn.c_proj": 5},
    )
    for name, module in adapters(model).items():
        r = 9 if "c_fc" in name else 2 if ".1." in name else 4
        alpha = 5 if name == "transformer.h.0.attn.c_proj" else 3
        assert module.A.shape[0] == module.B.shape[1] == r, name
        assert module.scale == alpha / math.sqrt(r)
        assert getattr(module.dropout, "p", 0.0) == 0.25


@law
def starts_gaussian_of_variance_one_third_over_d_in():
    torch.manual_seed(0)
    lora = LoRA(nn.Linear(400, 300), r=64)
    A = lora.A.detach().double()
    deviation = 1 / math.sqrt(3 * 400)
    n = A.numel()
    assert abs(A.mean()) < 5 * deviation / math.sqrt(n)
    assert abs(A.var() / deviation**2 - 1) < 5 * math.sqrt(2 / n)
    kurtosis = (A / deviation).pow(4).mean()  # 3 for a Gaussian, 1.8 for a uniform draw
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / n)
    assert torch.count_nonzero(lora.B) == 0


@law
def dropout_falls_on_the_input_of_A_in_training_only():
    lora = adapted(6, 5, 3, alpha=3, dropout=0.5)
    x = torch.randn(40, 6, **DOUBLE)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.5)
    torch.manual_seed(3)
    trained = lora.train()(x)
    assert torch.allclose(trained, lora.base(x) + (x * mask) @ (lora.B @ lora.A).T)
    assert torch.allclose(lora.eval()(x), closed_form(lora, x, 1.0))


@law
def a_failed_injection_leaves_no_trace():
    """k_proj comes second: q_proj had been wrapped by then."""
    model = build("llama")
    next(model.parameters()).requires_grad_(False)
    with refused(model, "k_proj", "r=0"):
        pfs.lora.inject(model, rank_pattern={"k_proj": 0})


@law
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def half_precision_keeps_the_adapter_in_fp32(dtype=torch.bfloat16):
    model = build("llama", dtype=dtype)
    pfs.lora.inject(model)
    assert all(p.dtype == torch.float32 for p in pfs.trainable(model).values())
    before = {n: p.detach().clone() for n, p in pfs.trainable(model).items()}
    optimizer = torch.optim.Adam(pfs.trainable(model).values(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        total = loss(model.train())
        total.backward()
        optimizer.step()
    assert total.isfinite()
    assert logits(model).dtype == dtype
    for name, parameter in pfs.trainable(model).items():
        # 1e-4 on entries of 1e-1 is below bf16's resolution: it must not be lost
        moved = (parameter != before[name]).double().mean()
        assert moved > 0.99, name


def keep_nothing(module, args, out):
    """A hook on the base: with one, LoRA computes its equation as it is written."""


@law
def fast_equals_plain():
    """Values and gradients of both ways, in every precision and with dropout."""
    close = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
    for dtype, bound in close.items():
        for kind in (nn.Linear, Conv1D):
            how = dict(kind=kind, dtype=dtype, alpha=5, dropout=0.3)
            fast, plain = (adapted(6, 5, 3, **how).train() for _ in range(2))
            plain.base.register_forward_hook(keep_nothing)
            x = torch.randn(2, 6, dtype=dtype)
            assert lora_fast.is_safe(fast.base, x)
            assert not lora_fast.is_safe(plain.base, x)
            outcomes = []
            for lora in (fast, plain):
                torch.manual_seed(1)
                x = torch.randn(2, 4, 6, dtype=dtype).requires_grad_()
                y = lora(x)
                wanted = (x, lora.A, lora.B)
                grads = torch.autograd.grad(y, wanted, torch.randn_like(y))
                outcomes.append(dict(zip("yxAB", (y.detach(), *grads), strict=True)))
            ours, theirs = outcomes
            for key, right in theirs.items():
                assert ours[key].dtype == right.dtype
                assert largest(ours[key], right) < bound, (dtype, key)


class Keeping(nn.Linear):
    """A projection that keeps its last output."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def patched(lora, kept):
    """The base with a forward of its own, as accelerate puts one in."""
    forward = lora.base.forward
    lora.base.forward = lambda x: kept.append(forward(x)) or kept[-1]


def globally_hooked(lora, kept):
    return hooks.register_module_forward_hook(
        lambda module, args, out: kept.append(out) if module is lora.base else None
    )


# Ways to keep what the base returns: (adapter, list to keep it in) -> what to take off.
KEEPERS = {
    "a hook": lambda lora, kept: lora.base.register_forward_hook(
        lambda module, args, out: kept.append(out)
    ),
    "a hook of all modules": globally_hooked,
    "a forward of its own": patched,
}


@law
@pytest.mark.parametrize("keeper", KEEPERS)
def what_is_kept_of_the_base_is_not_written_into(keeper="a hook"):
    lora, kept = adapted(8, 8, 2), []
    x = torch.randn(3, 8, **DOUBLE)
    expected = F.linear(x, *lora.base.parameters())
    handle = KEEPERS[keeper](lora, kept)
    y = lora(x)
    if handle is not None:
        handle.remove()
    assert len(kept) == 1 and torch.equal(kept[0], expected)
    assert largest(y, closed_form(lora, x, lora.scale)) < 1e-12


@law
def what_a_projection_keeps_itself_is_whole():
    lora = LoRA(Keeping(8, 8), 2)
    nn.init.normal_(lora.B)
    x = torch.randn(3, 8)
    lora(x)
    kept = getattr(lora.base, "last", None)
    assert kept is not None
    assert torch.equal(kept, F.linear(x, *lora.base.parameters()))


@law
@pytest.mark.parametrize("everywhere", [False, True])
def backward_hooks_of_every_sort_run(everywhere=False):
    """A full one makes the output a view, which torch lets nobody write into."""
    lora, seen = adapted(8, 8, 2), []
    x, dy = torch.randn(3, 8, **DOUBLE), torch.randn(3, 8, **DOUBLE)

    def note(module, *gradients):
        seen.append(module)

    if everywhere:
        handles = [
            hooks.register_module_full_backward_hook(note),
            hooks.register_module_full_backward_pre_hook(note),
        ]
    else:
        handles = [
            register(note)
            for module in (lora, lora.base)
            for register in (
                module.register_full_backward_hook,
                module.register_full_backward_pre_hook,
            )
        ]
    ours = torch.autograd.grad(lora(x.requires_grad_()), (x, lora.A, lora.B), dy)
    for handle in handles:
        handle.remove()
    assert seen.count(lora) == seen.count(lora.base) == 2
    wanted = (x, lora.A, lora.B)
    theirs = torch.autograd.grad(closed_form(lora, x, lora.scale), wanted, dy)
    for got, right in zip(ours, theirs, strict=True):
        assert largest(got, right) < 1e-12


@law
def torch_func_goes_through():
    """Gradients of each row by themselves, a Jacobian times a vector, a Hessian."""
    lora, x = adapted(6, 5, 2), torch.randn(3, 6, **DOUBLE)
    own = {"A": lora.A.detach(), "B": lora.B.detach()}
    B = own["B"]

    def total(own, x):
        return functional_call(lora, own, (x,)).pow(3).sum()

    rows = vmap(grad(total), in_dims=(None, 0))(own, x)
    for i, row in enumerate(x):
        one = closed_form(lora, row, lora.scale).pow(3).sum()
        right = dict(zip("AB", torch.autograd.grad(one, (lora.A, lora.B)), strict=True))
        assert largest({name: g[i] for name, g in rows.items()}, right) < 1e-12
    _, tangent = jvp(lambda B: functional_call(lora, {"B": B}, (x,)), (B,), (B,))
    assert largest(tangent, lora.scale * x @ (B @ lora.A).T) < 1e-12
    second = hessian(lambda B: total({"B": B}, x))(B)
    assert second.shape == (5, 2, 5, 2) and second.abs().max() > 0


@law
def a_tangent_goes_through():
    """Forward-mode AD: the tangent of h is W times the tangent of x."""
    lora = adapted(6, 5, 2)
    x, dx = torch.randn(3, 6, **DOUBLE), torch.randn(3, 6, **DOUBLE)
    W = (lora.base.weight + lora.scale * lora.B @ lora.A).detach()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(lora(forward_ad.make_dual(x, dx))).tangent
    assert largest(tangent, dx @ W.T) < 1e-12


@law
def a_trace_can_be_saved():
    lora, x, file = adapted(6, 5, 2), torch.randn(3, 6, **DOUBLE), io.BytesIO()
    torch.jit.save(torch.jit.trace(lora, x, check_trace=False), file)
    file.seek(0)
    again = torch.randn(7, 6, **DOUBLE)
    assert largest(torch.jit.load(file)(again), lora(again)) < 1e-12


class Recorder(TorchFunctionMode):
    """Keeps what every function of torch returns."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.kept = [*getattr(self, "kept", []), out]
        return out


@law
def modes_and_their_caches_are_not_written_into():
    """A recorder keeps outputs; so does checkpointing that recomputes a part only."""
    lora, x = adapted(6, 5, 2), torch.randn(3, 6, **DOUBLE).requires_grad_()
    expected = F.linear(x, *lora.base.parameters()).detach()
    with Recorder() as recorder:
        lora(x)
    assert any(
        out.equal(expected)
        for out in recorder.kept
        if getattr(out, "shape", None) == (3, 5)
    )
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, products)
    y = checkpoint(lora, x, use_reentrant=False, context_fn=contexts)
    ours = torch.autograd.grad(y.sum(), (x, lora.A))
    theirs = torch.autograd.grad(closed_form(lora, x, lora.scale).sum(), (x, lora.A))
    assert largest(ours[0], theirs[0]) < 1e-12 > largest(ours[1], theirs[1])


@law
def a_ragged_batch_goes_through():
    """A NestedTensor is a subclass of Tensor; it has no rows of tokens to view."""
    lora = adapted(6, 5, 2)
    rows = [torch.randn(n, 6, **DOUBLE) for n in (2, 4)]
    out = lora(torch.nested.nested_tensor(rows, layout=torch.jagged)).unbind()
    for y, x in zip(out, rows, strict=True):
        assert largest(y, lora(x)) < 1e-12


@law
def the_last_product_frees_the_buffer():
    """Of dequantized weights: the logits come next, where a step's bytes peak."""
    model, sizes = build("llama"), []
    pfs.qlora.inject(model)
    buffer = next(iter(adapters(model).values())).base.buffer

    def note(*_):
        sizes.append(len(vars(buffer._of_thread)))

    model.model.layers[1].mlp.register_forward_pre_hook(note)
    model.lm_head.register_forward_pre_hook(note)
    loss(model.train()).backward()
    assert sizes == [1, 0]


@law
@pytest.mark.parametrize("computed", [False, True])
def a_weight_that_trains_gets_its_gradient(computed=False):
    """One that is computed from parameters, as weight_norm does, does so too."""
    lora, x = adapted(6, 5, 2), torch.randn(3, 6, **DOUBLE)
    if computed:
        weight_norm(lora.base)
    lora.base.requires_grad_(True)
    wanted = [p for p in lora.parameters() if p.requires_grad]
    ours = torch.autograd.grad(lora(x).sum(), wanted, materialize_grads=True)
    theirs = torch.autograd.grad(closed_form(lora, x, lora.scale).sum(), wanted)
    for got, right in zip(ours, theirs, strict=True):
        assert largest(got, right) < 1e-12


@law
def another_dtype_is_refused_as_the_base_refuses_it():
    lora = adapted(6, 5, 2, dtype=torch.float32)
    x = torch.randn(3, 6, **DOUBLE)
    messages = []
    for layer in (lora.base, lora):
        try:
            layer(x)
        except RuntimeError as error:
            messages.append(str(error))
    assert len(messages) == 2 and messages[0] == messages[1], messages


@law
def what_nobody_sees_is_summed_in_place():
    """Each projection that stands alone; one that was hooked once is again."""
    linear = nn.Linear(64, 8)
    bases = [linear, Conv1D(8, 64), nf4.NF4Linear(nf4.quantize(linear.weight))]
    bases[0].register_forward_hook(keep_nothing).remove()
    for base in bases:
        base.requires_grad_(False)
        assert lora_fast.is_safe(base, torch.randn(2, 64)), base
    view = LoRA(linear, 2)(torch.randn(2, 64)).grad_fn
    ((made_by, _),) = view.next_functions
    assert made_by.name() == "LowRankSumBackward"
