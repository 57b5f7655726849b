"""Laws of the training loop, and bugs planted in it that they must catch."""

import io
import math
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import CONFIGS, build
from model_state import assert_same, largest, refused, snapshot, values
from planting import each_is_caught, law, planted
from small_runs import ROWS, TASK, TOKENIZER, adapted, recipe, run
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from peft_from_scratch.common import scoped
from peft_from_scratch.core import adapter
from peft_from_scratch.methods import lora
from peft_from_scratch.tasks.templates import IGNORED, encode_rows
from peft_from_scratch.training import guards, loop, loss
from peft_from_scratch.training.batch import batch_of, collate, label_tokens
from peft_from_scratch.training.config import (
    History,
    TrainConfig,
    learning_rate,
    rows_of_step,
)
from peft_from_scratch.training.state import TrainState

ENCODED = encode_rows(TOKENIZER, TASK.instruction, ROWS, template="chat")
CPU = torch.device("cpu")


def batches(size):
    return [batch_of(ENCODED[i : i + size], CPU) for i in range(0, len(ENCODED), size)]


def gradients(model, parts):
    model.zero_grad()
    mean, _ = loss.accumulate_gradients(model, parts)
    return mean, {n: p.grad.clone() for n, p in adapter.trainable(model).items()}


def moved(model):
    """With B = 0, A has no gradient and dropout no effect."""
    for parameter in adapter.trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


def reference_loss(model, rows=ENCODED):
    """transformers' own: full logits, its shift, its mean over labels, and a mask."""
    return model(**collate(rows, 0)).loss


# The loss ----------------------------------------------------------------------------


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def loss_is_the_reference(architecture):
    model = adapted("full", architecture, dropout=0)
    mean, ours = gradients(model, batches(len(ENCODED)))
    model.zero_grad()
    theirs = reference_loss(model)
    theirs.backward()
    assert math.isclose(mean, theirs.item(), rel_tol=1e-6)
    grads = {name: p.grad for name, p in adapter.trainable(model).items()}
    assert largest(ours, grads) < 2e-6


@law
@pytest.mark.parametrize("architecture", CONFIGS)
def splitting_a_step_changes_nothing(architecture):
    exact = architecture in ("gpt2", "opt")  # the others' norms compute in float32
    dtype = torch.float64 if exact else torch.float32
    model = moved(adapted("lora", architecture, dropout=0, dtype=dtype))
    whole_loss, whole = gradients(model, batches(len(ENCODED)))
    split_loss, split = gradients(model, batches(1))
    assert math.isclose(whole_loss, split_loss, rel_tol=1e-12 if exact else 1e-6)
    assert largest(split, whole) < (1e-12 if exact else 2e-6)


def test_logits_are_computed_at_labelled_positions_only():
    model, seen = adapted(), []
    hook = model.lm_head.register_forward_hook(lambda *a: seen.append(a[2].shape))
    (batch,) = batches(len(ENCODED))
    loss.summed_loss(model, batch)
    hook.remove()
    assert [shape[:-1].numel() for shape in seen] == [label_tokens(batch)]


def test_a_model_that_cannot_choose_logits_has_the_same_loss():
    class AllLogits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, use_cache):
            return self.model(input_ids, use_cache=use_cache)

    model, (batch,) = adapted(dropout=0), batches(len(ENCODED))
    theirs = loss.summed_loss(AllLogits(model), batch)
    ours = loss.summed_loss(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def written_out(model, batch):
    """The statements that stored runs were made with: (summed loss, per example)."""
    labels = batch["labels"][:, 1:]
    labelled = labels != IGNORED
    keep = F.pad(labelled, (0, 1))
    logits = model(
        input_ids=batch["input_ids"], use_cache=False, logits_to_keep=keep
    ).logits
    logits = logits[keep] if logits.dim() == 3 else logits
    total = F.cross_entropy(logits.float(), labels[labelled], reduction="sum")
    each = torch.zeros(labels.shape)
    each[labelled] = F.cross_entropy(logits.float(), labels[labelled], reduction="none")
    return total, each.sum(1) / labelled.sum(1)


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def losses_are_bit_equal_to_those_written_out(dtype=torch.float32):
    model, (batch,) = adapted(dtype=dtype, dropout=0), batches(len(ENCODED))
    total, per_example = written_out(model, batch)
    losses, labelled = loss.token_losses(model, batch)
    assert torch.equal(loss.summed_loss(model, batch), total)
    assert torch.equal(losses.sum(1) / labelled.sum(1), per_example)


def test_half_precision_logits_are_widened_for_the_loss():
    model, (batch,) = adapted(dtype=torch.bfloat16, dropout=0), batches(len(ENCODED))
    assert loss.summed_loss(model, batch).dtype == torch.float32


@law
def mean_loss_weighs_every_label_token_the_same():
    model = moved(adapted()).train()
    mean = loss.mean_loss(model, ENCODED, batch=4)
    assert model.training, "the mode is the caller's"
    model.eval()
    with torch.no_grad():
        total = sum(
            reference_loss(model, [row]).item() * sum(i >= 0 for i in row[1])
            for row in ENCODED
        )
    tokens = sum(map(label_tokens, batches(1)))
    assert math.isclose(mean, total / tokens, rel_tol=1e-6)


# The loop ----------------------------------------------------------------------------


def exact_loss(model, rows):
    """transformers casts its logits to float32; here in the model's own dtype."""
    batch = collate(rows, 0)
    labels = batch.pop("labels")[:, 1:]
    return F.cross_entropy(model(**batch).logits[:, :-1].mT, labels)


def plain_loop(model, settings):
    """The same training in other words: full logits, a mask, a clip by hand."""
    parameters = list(adapter.trainable(model).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        foreach=False,
    )
    model.train()
    for step in range(settings.steps):
        rows = [ENCODED[i] for i in rows_of_step(settings, step, len(TASK.train))]
        optimizer.zero_grad()
        exact_loss(model, rows).backward()
        norm = sum((p.grad**2).sum() for p in parameters) ** 0.5
        for parameter in parameters:
            parameter.grad *= min(1.0, settings.clip / (norm.item() + 1e-6))
        p = max(0, step - settings.warmup) / (settings.steps - settings.warmup)
        rise = min(1, (step + 1) / settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rise * (0.5 + 0.5 * np.cos(np.pi * p))
        optimizer.step()
    return values(model)


@law
def training_equals_a_plain_loop():
    """float64, where two orders of summing agree to many digits."""
    settings = recipe(clip=0.3)
    model = adapted(architecture="gpt2", dropout=0, dtype=torch.float64)
    history = run(model, settings)
    other = adapted(architecture="gpt2", dropout=0, dtype=torch.float64)
    assert largest(values(model), plain_loop(other, settings)) < 1e-11
    assert min(history.norm) > settings.clip, "the clip was never at work"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_paging_changes_no_bit_whatever_the_share(method):
    """Nor does it, in float64, leave the plain loop."""
    for dtype in (torch.float32, torch.float64):
        ends = []
        for share in (None, 1.0, 0.3, 1e-9):
            model = adapted(method, "gpt2", dropout=0, dtype=dtype)
            run(model, recipe(clip=0.3, paged=share))
            ends.append(values(model))
        for end in ends[1:]:
            assert_same(end, ends[0])
    other = adapted(method, "gpt2", dropout=0, dtype=torch.float64)
    assert largest(ends[0], plain_loop(other, recipe(clip=0.3))) < 1e-11


def test_paged_groups_have_their_own_rates():
    models = [adapted(), adapted()]
    for model, share in zip(models, (None, 0.5), strict=True):
        run(model, recipe(lr_ratio=4.0, paged=share))
    assert_same(*map(values, models))


def test_the_base_keeps_its_bits():
    model = adapted()
    moving = adapter.trainable(model)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n not in moving}
    run(model, recipe())
    state = model.state_dict()
    assert_same({n: state[n] for n in frozen}, frozen)


def test_history_tells_what_happened():
    seen = []
    history = run(adapted(), recipe(), on_step=lambda h: seen.append(h.steps))
    assert seen == list(range(1, 13)) and history.steps == 12
    assert history.lr == [learning_rate(recipe(), step) for step in range(12)]
    labels = [sum(i >= 0 for i in row[1]) for row in ENCODED]
    for step, tokens in enumerate(history.tokens):
        rows = rows_of_step(recipe(), step, len(TASK.train))
        assert tokens == sum(labels[i] for i in rows)
    assert history.seconds >= sum(history.step_seconds) > 0
    assert history.resumed_from is None and not history.stopped_early


def test_the_caller_gets_everything_back():
    model = adapted()
    model.model.layers[0].train()  # flags that differ from module to module
    for parameter in adapter.trainable(model).values():
        parameter.grad = torch.ones_like(parameter)  # must not enter the first step
    moving = values(model)
    before, generator = snapshot(model), torch.get_rng_state()
    history = run(model, recipe(validate_every=5))
    after = snapshot(model)
    for name in moving:
        del before[name], after[name]
    assert_same(after, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    assert history.loss == run(adapted(), recipe()).loss


@law
def looking_at_the_validation_rows_changes_nothing():
    looked, blind = adapted(), adapted()
    history = run(looked, recipe(validate_every=1))
    run(blind, recipe())
    assert_same(values(looked), values(blind))
    assert [step for step, _ in history.validation] == list(range(1, 13))


@law
def early_stopping_brings_back_the_best_weights(monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 9.0, 1.0])  # an equal loss is no improvement
    monkeypatch.setattr(loop, "mean_loss", lambda *_, **__: next(losses))
    model, seen = adapted(), {}

    def remember(history):
        seen[history.steps] = values(model)

    settings = recipe(validate_every=2, patience=3)
    history = run(model, settings, on_step=remember)
    assert history.stopped_early and history.steps == 10 and history.best_step == 4
    assert_same(values(model), seen[4])
    assert largest(seen[4], seen[10]) > 1e-3


def test_without_patience_the_last_weights_stay(monkeypatch):
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(loop, "mean_loss", lambda *_, **__: next(losses))
    model, last = adapted(), adapted()
    history = run(model, recipe(validate_every=4))
    run(last, recipe())
    assert not history.stopped_early and history.best_step == 4
    assert_same(values(model), values(last))


# The schedule and the order of the rows ----------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_learning_rate_is_that_of_transformers(schedule, warmup):
    """Except in warm-up, where theirs wastes the first step on a rate of 0."""
    settings = TrainConfig(steps=30, lr=3e-4, warmup=warmup, schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.lr)
    if schedule == "constant":
        theirs = get_constant_schedule_with_warmup(optimizer, warmup)
    elif schedule == "linear":
        theirs = get_linear_schedule_with_warmup(optimizer, warmup, settings.steps)
    else:
        theirs = get_cosine_schedule_with_warmup(optimizer, warmup, settings.steps)
    (multiply,) = theirs.lr_lambdas
    for step in range(settings.steps):
        shifted = step + 1 if step < warmup else step
        expected = settings.lr * multiply(shifted)
        assert math.isclose(learning_rate(settings, step), expected, rel_tol=1e-12)
        assert expected > 0


def test_every_epoch_is_another_permutation():
    settings = TrainConfig(steps=100, batch=7)
    order = [i for step in range(100) for i in rows_of_step(settings, step, 20)]
    epochs = [tuple(order[start : start + 20]) for start in range(0, 700, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)
    other_seed = TrainConfig(steps=100, batch=7, seed=1)
    assert [i for s in range(100) for i in rows_of_step(other_seed, s, 20)] != order
    wide = TrainConfig(batch=50)  # a step of more rows than there are
    assert set(Counter(rows_of_step(wide, 0, 20)).values()) == {2, 3}


# What is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 2.0),
        ("batch", True),
        ("accumulate", 3),
        ("lr", 0),
        ("lr", math.nan),
        ("warmup", 50),
        ("schedule", "exponential"),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("paged", 0.0),
        ("paged", 1.01),
        ("paged", "0.5"),
        ("clip", 0),
        ("clip", math.inf),
        ("seed", -1),
        ("template", "alpaca"),
        ("patience", 1),
        ("checkpoint_every", 0),
    ],
)
def test_recipe_refuses(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        TrainConfig(**{field: value})
    assert repr(value) in str(caught.value) and "allowed is" in str(caught.value)


@law
def a_nan_stops_the_run_before_the_step():
    model, last = adapted(), {}

    def poison(history):
        last.update(values(model))
        if history.steps == 4:
            model.model.norm.weight.fill_(math.nan)

    settings = recipe()
    with pytest.raises(guards.Diverged) as caught:
        run(model, settings, on_step=poison)
    assert_same(values(model), last)
    assert "step 5 of 12" in str(caught.value) and "nan" in str(caught.value)
    assert f"learning rate {learning_rate(settings, 4):.3g}" in str(caught.value)


def test_an_infinite_gradient_stops_the_run_before_the_step():
    model = adapted()
    before = values(model)
    next(iter(adapter.trainable(model).values())).register_hook(lambda g: g * math.inf)
    with pytest.raises(guards.Diverged, match="step 1 of 12"):
        run(model, recipe())
    assert_same(values(model), before)


def test_a_validation_loss_that_is_no_number_stops_the_run(monkeypatch):
    monkeypatch.setattr(loop, "mean_loss", lambda *_, **__: math.nan)
    with pytest.raises(guards.Diverged, match=r"step 2 of 12.*validation loss"):
        run(adapted(), recipe(validate_every=2, patience=1))


@law
def an_adapter_behind_a_zero_is_noticed():
    model = adapted()
    broken = model.model.layers[1].mlp.up_proj
    broken.scale = 0.0
    with pytest.raises(RuntimeError, match=r"2 of 28 .* did not move") as caught:
        run(model, recipe())
    assert "layers.1.mlp.up_proj.A: its gradient is zero" in str(caught.value)


@law
def an_adapter_that_is_not_used_is_noticed():
    model = adapted()
    unused = model.model.layers[0].self_attn.q_proj
    unused.forward = unused.base.forward
    with pytest.raises(RuntimeError, match=r"2 of 28 .* did not move") as caught:
        run(model, recipe())
    assert "q_proj.B: no gradient reached it" in str(caught.value)


@law
def updates_that_vanish_are_noticed():
    model = adapted("full", dtype=torch.bfloat16)
    nn.init.ones_(model.model.norm.weight)  # where bfloat16's neighbour is 0.4 % away
    with pytest.raises(RuntimeError, match=r"norm\.weight: its updates vanish in"):
        run(model, recipe(lr=1e-5, weight_decay=0.0))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_reentrant_checkpointing_is_noticed():
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()  # transformers' own remedy, off again
    with pytest.raises(RuntimeError, match="reentrant"):
        run(model, recipe())


def test_a_model_without_adapters_is_refused():
    model = adapted()
    adapter.remove(model)
    with refused(model, "lora.inject(model)"):
        run(model, recipe())


def test_flags_against_the_injection_are_refused():
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    with refused(model, "lm_head.weight", "requires_grad=True"):
        run(model, recipe())
    model = adapted()
    model.model.layers[1].mlp.up_proj.B.requires_grad_(False)
    with refused(model, "up_proj.B", "requires_grad=False"):
        run(model, recipe())


@pytest.mark.parametrize("compiled", [False, True])
def test_biases_train_beside_the_adapters(compiled):
    """Their names change when a module is wrapped, and when a model is compiled."""
    model = build("opt")
    run_on = torch.compile(model, backend="eager") if compiled else model
    lora.inject(run_on, r=4, bias="lora_only")
    before = values(model)
    run(run_on, recipe(steps=4))
    after = values(model)
    assert any(name.endswith("fc1.bias") for name in after)
    assert not [name for name in after if torch.equal(after[name], before[name])]


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_an_empty_split_is_refused(empty):
    task = SimpleNamespace(**(vars(TASK) | {empty: []}))
    with pytest.raises(ValueError, match=f"no {empty}"):
        loop.train(adapted(), TOKENIZER, task, recipe(validate_every=2))


# Ctrl-C and the bar ------------------------------------------------------------------


def test_ctrl_c_waits_for_the_step_and_its_checkpoint(tmp_path):
    model = adapted()

    def press(history):
        if history.steps == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after step 6; call again") as caught:
        run(model, recipe(), checkpoints=tmp_path, on_step=press)
    assert str(tmp_path) in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is before
    history, straight = run(adapted(), recipe(), checkpoints=tmp_path), adapted()
    assert history.resumed_from == 6
    assert history.loss == run(straight, recipe()).loss


def test_a_second_ctrl_c_does_not_wait_and_none_is_swallowed():
    with pytest.raises(KeyboardInterrupt), scoped.held_ctrl_c():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second Ctrl-C waited")
    reached = False
    with pytest.raises(KeyboardInterrupt), scoped.held_ctrl_c() as pressed:
        signal.raise_signal(signal.SIGINT)
        reached = pressed.is_set()
    assert reached


def test_the_bar_shows_loss_rate_and_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        loop.train(adapted(), TOKENIZER, TASK, recipe(validate_every=4))
        text = stream.getvalue()
        assert bool(text) == shown == ("loss" in text and "12/12" in text)
        assert "\n" not in text.strip()
    last = loop._figures(History(loss=[1.25], lr=[1e-3], validation=[(1, 2.5)]))
    assert last == "loss 1.250, lr 1.0e-03, validation 2.500"


# Planted bugs ------------------------------------------------------------------------

BUGS = {
    "a mean of the micro-batches' means": (
        loss.accumulate_gradients,
        "micro_batch_loss(model, batch, tokens)",
        "micro_batch_loss(model, batch, label_tokens(batch)) / len(batches)",
        lambda: splitting_a_step_changes_nothing("gpt2"),
    ),
    "a mean of the micro-batches' means, in the loop": (
        loop.optimizer_steps,
        "micro_batch_loss(model, batch, step_tokens, summed)",
        "micro_batch_loss(model, batch, label_tokens(batch)) / len(batches)",
        training_equals_a_plain_loop,
    ),
    "labels not shifted": (
        loss.label_logits,
        "F.pad(labels != IGNORED, (0, 1))",
        "F.pad(labels != IGNORED, (1, 0))",
        lambda: loss_is_the_reference("llama"),
    ),
    "losses in another order": (
        loss.token_losses,
        "losses[labelled] = each",
        "losses[labelled] = each.flip(0)",
        losses_are_bit_equal_to_those_written_out,
    ),
    "padding counted": (
        label_tokens,
        'int((batch["labels"][:, 1:] != IGNORED).sum())',
        'batch["labels"].numel()',
        lambda: loss_is_the_reference("llama"),
    ),
    "prompts learned": (
        batch_of,
        "right_pad([labels for _, labels in rows]",
        "right_pad([ids for ids, _ in rows]",
        lambda: loss_is_the_reference("opt"),
    ),
    "dropout on while validating": (
        loss.mean_loss,
        "training=False",
        "training=True",
        mean_loss_weighs_every_label_token_the_same,
    ),
    "validation moves the generators": (
        loss.mean_loss,
        "training=False",
        "training=True",
        looking_at_the_validation_rows_changes_nothing,
    ),
    "clipping after the step": (
        TrainState.clip,
        "nn.utils.clip_grad_norm_(parameters, max_norm).item()",
        "1.0",
        training_equals_a_plain_loop,
    ),
    "each tensor clipped by itself": (
        TrainState.clip,
        "nn.utils.clip_grad_norm_(parameters, max_norm).item()",
        "max(nn.utils.clip_grad_norm_([p], max_norm).item() for p in parameters)",
        training_equals_a_plain_loop,
    ),
    "gradients never cleared": (
        loop.optimizer_steps,
        "optimizer.zero_grad(set_to_none=True)",
        "pass",
        training_equals_a_plain_loop,
    ),
    "the rate of the step never set": (
        loop.optimizer_steps,
        'group["lr"] = lr * group["ratio"]',
        "pass",
        training_equals_a_plain_loop,
    ),
    "one micro-batch left out": (
        loop.micro_batches,
        "range(0, config.batch, size)",
        "range(0, config.batch - size, size)",
        training_equals_a_plain_loop,
    ),
    "NaN ignored": (
        guards.refuse_not_finite,
        "if not (math.isfinite(loss) and math.isfinite(norm)):",
        "if False:",
        a_nan_stops_the_run_before_the_step,
    ),
    "a tensor without gradient not noticed": (
        guards.refuse_unmoved,
        "if moment is None:",
        "if moment is None and (moment := parameter.new_ones(1)) is None:",
        an_adapter_that_is_not_used_is_noticed,
    ),
    "a zero gradient not noticed": (
        guards.refuse_unmoved,
        "elif not moment.any():",
        "elif False:",
        an_adapter_behind_a_zero_is_noticed,
    ),
    "vanishing updates not noticed": (
        guards.refuse_unmoved,
        "elif now[name] == before[name]:",
        "elif False:",
        updates_that_vanish_are_noticed,
    ),
}

CAUGHT = (AssertionError, pytest.fail.Exception)  # the second: nothing was raised


test_a_planted_bug_is_caught = each_is_caught(BUGS, errors=CAUGHT)


def test_the_last_weights_in_place_of_the_best_are_caught(monkeypatch):
    bug = planted(loop.train, "if config.patience:", "if False:")
    with bug, pytest.raises(AssertionError):
        early_stopping_brings_back_the_best_weights(monkeypatch)
