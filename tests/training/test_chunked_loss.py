"""The loss in chunks: the plain loss and its gradients, and the bytes that it saves."""

import pytest
import torch
from architectures import build
from laws.core.contract import fresh
from laws.methods.table import METHODS
from model_state import assert_same, largest, logits, snapshot, tokens
from planting import each_is_caught, law
from small_runs import ROWS, TOKENIZER
from transformers import AutoModelForCausalLM, LlamaConfig

import peft_from_scratch as pfs
from peft_from_scratch.memory.meta_model import bill, ghost
from peft_from_scratch.memory.meter import measure_step
from peft_from_scratch.tasks.templates import encode_rows
from peft_from_scratch.training import chunked_loss
from peft_from_scratch.training.batch import label_tokens
from peft_from_scratch.training.chunked_loss import ChunkedLoss, summed_loss_in_chunks
from peft_from_scratch.training.loss import summed_loss
from peft_from_scratch.training.packing import packing_for

BY_NAME = {method.name: method for method in METHODS}
CASES = [
    (method.name, architecture)
    for method in METHODS
    for architecture in ("gpt2", "opt", "gemma")
    if architecture in method.architectures
]
VOCABULARY = 49_152  # SmolLM2's


def a_batch():
    """Rows of 10 tokens, 18 of 30 with a label, two of them side by side."""
    ids = tokens()
    labels = ids.clone()
    labels[:, :3] = labels[0, 6:8] = labels[2, 9] = -100
    return {"input_ids": ids, "labels": labels}


def learned(model, loss, *, parts=1):
    """{name: value}: the loss and the gradient of each trainable tensor."""
    batch, total = a_batch(), 0
    count = label_tokens(batch)
    model.zero_grad()
    torch.manual_seed(0)
    for rows in zip(*(batch[name].chunk(parts) for name in batch), strict=True):
        part = loss(model, dict(zip(batch, rows, strict=True))) / count
        part.backward()
        total += part.detach()
    gradients = {n: p.grad.clone() for n, p in pfs.trainable(model).items()}
    return gradients | {"loss": total}


def in_chunks_of(chunk):
    return lambda model, batch: summed_loss_in_chunks(model, batch, chunk=chunk)


@law
@pytest.mark.parametrize("method, architecture", CASES)
def loss_and_gradients_are_the_plain_ones(method="full", architecture="gpt2"):
    """One token a chunk, chunks that end inside a row, all tokens; accumulation."""
    method = BY_NAME[method]
    exact = architecture in ("gpt2", "opt") and not method.prepare
    dtype = torch.float64 if exact else torch.float32
    close = 1e-12 if exact else 0.02 if "bf16" in method.name else 1e-5
    model, _ = fresh(method, architecture, steps=1, dtype=dtype)
    expected = learned(model.train(), summed_loss)
    for chunk, parts in ((1, 1), (5, 1), (5, 3), (100, 1)):
        if parts > 1 and method.random:
            continue  # other rows draw other numbers
        found = learned(model, in_chunks_of(chunk), parts=parts)
        assert largest(found, expected) < close, (chunk, parts)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_trains_tied_and_untied(tied):
    """Against the equation, with all logits at once."""
    config = build("gpt2").config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    pfs.full.inject(model)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied

    def equation(model, batch):
        labels = batch["labels"][:, 1:, None]
        logits = model(batch["input_ids"], use_cache=False).logits[:, :-1]
        log_p = logits.log_softmax(-1).gather(2, labels.clamp(min=0))
        return -log_p[labels != -100].sum()

    expected = learned(model.eval(), equation)
    assert largest(learned(model, in_chunks_of(4)), expected) < 1e-12


def test_an_adapter_on_the_head_trains():
    model = build("llama")
    pfs.lora.inject(model, r=4, alpha=8, targets=["lm_head", "q_proj"])
    expected = learned(model, summed_loss)
    assert "lm_head.B" in expected and expected["lm_head.B"].abs().max() > 0
    assert largest(learned(model, in_chunks_of(5)), expected) < 1e-5


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_packed_rows(method):
    model, _ = fresh(BY_NAME[method], "llama", steps=1)
    rows = encode_rows(TOKENIZER, "Say it.", ROWS, template="chat", max_tokens=512)
    batch = packing_for(model, rows).batch(rows)
    assert "position_ids" in batch, "nothing was packed"
    with torch.no_grad():
        expected = summed_loss(model, batch)
        found = summed_loss_in_chunks(model, batch, chunk=7)
    assert not found.requires_grad
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@law
def no_more_rows_than_a_chunk_have_logits():
    model, _ = fresh(BY_NAME["lora"], "gemma", steps=1)
    rows = []
    model.lm_head.register_forward_hook(lambda m, x, y: rows.append(y[..., 0].numel()))
    learned(model, in_chunks_of(4))
    count = label_tokens(a_batch())
    assert rows[0] == 0 and max(rows) == 4 and sum(rows) == count


@law
def bytes_fall_as_predicted():
    """By 3 (tokens - c) V values, at SmolLM2's vocabulary, of a head that is frozen.

    Where it trains, the sum of dW is there from the first chunk on. A chunk's own part
    is so later, when of three tables one is left.
    """
    tokens, d = 128, 8
    shape = dict(vocab_size=VOCABULARY, hidden_size=d, intermediate_size=d)
    heads = dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    ids = torch.randint(0, VOCABULARY, (1, tokens + 1))
    batch = {"input_ids": ids, "labels": ids}
    for method, of_head in ((pfs.lora, 0), (pfs.full, d)):
        config = LlamaConfig(**shape, **heads, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_config(config)
        method.inject(model)

        def activations(loss, model=model):
            model.zero_grad()
            step = measure_step(model, lambda: loss(model, batch).backward())
            return step.activations / (VOCABULARY * 4)

        plain = activations(summed_loss)
        assert plain == pytest.approx(3 * tokens, rel=0.01)
        for chunk in (8, 32):
            saved = plain - activations(in_chunks_of(chunk))
            assert saved == pytest.approx(3 * (tokens - chunk) - of_head, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_the_share_of_the_logits_is_what_the_page_says():
    """Of SmolLM2's shapes, without its numbers: a third, and nine tenths."""
    shape = dict(vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536)
    heads = dict(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    model = ghost(LlamaConfig(**shape, **heads, tie_word_embeddings=True), "float32")
    pfs.lora.inject(model)
    tables, shares = 3 * 1000 * VOCABULARY * 4, []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        counted = bill(model, "fp32", length=1001)
        shares.append(tables / counted["activations"])
    assert round(tables / 1e6) == 590
    assert shares == pytest.approx([1 / 3, 0.9], abs=0.02)


@law
def the_model_is_as_it_was_afterwards():
    """Also where a chunk fails."""
    model, _ = fresh(BY_NAME["prompt"], "opt", steps=1)
    before, expected = snapshot(model), logits(model)
    summed_loss_in_chunks(model, a_batch(), chunk=5)
    assert_same(snapshot(model), before)
    hook = model.lm_head.register_forward_hook(_fail)
    with pytest.raises(KeyError):
        summed_loss_in_chunks(model, a_batch(), chunk=5)
    hook.remove()
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), expected)


def _fail(module, args, output):
    if output.numel():
        raise KeyError


def test_rows_without_a_label_have_no_loss():
    model, _ = fresh(BY_NAME["lora"], "llama", steps=1)
    batch = a_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = summed_loss_in_chunks(model, batch)
    loss.backward()
    assert loss.item() == 0


def test_what_cannot_be_is_refused(monkeypatch):
    model, _ = fresh(BY_NAME["lora"], "llama")
    for chunk in (0, 2.0, True):
        with pytest.raises(ValueError, match=r"chunk=.*label tokens from 1 on"):
            summed_loss_in_chunks(model, a_batch(), chunk=chunk)
    monkeypatch.setattr(chunked_loss, "can_choose_logits", lambda model: False)
    with pytest.raises(ValueError, match="LlamaForCausalLM computes the logits of all"):
        summed_loss_in_chunks(model, a_batch())


BUGS = {
    "labels shifted at a chunk's end": (
        ChunkedLoss.forward,
        "targets.split(chunk)",
        "[part.roll(1) for part in targets.split(chunk)]",
        loss_and_gradients_are_the_plain_ones,
    ),
    "the head's gradient is that of the last chunk": (
        ChunkedLoss.forward,
        "sum_of.add_(g)",
        "sum_of.copy_(g)",
        loss_and_gradients_are_the_plain_ones,
    ),
    "what comes from above is ignored": (
        ChunkedLoss.backward,
        "above * dH",
        "dH",
        loss_and_gradients_are_the_plain_ones,
    ),
    "a head that trains is forgotten": (
        chunked_loss._behind,
        "id(p) in own or",
        "",
        loss_and_gradients_are_the_plain_ones,
    ),
    "positions without a label are read": (
        summed_loss_in_chunks,
        "[keep]",
        "[keep.roll(1, 1)]",
        loss_and_gradients_are_the_plain_ones,
    ),
    "the head computes all logits first": (
        chunked_loss._of_layers,
        "torch.zeros_like(",
        "torch.ones_like(",
        no_more_rows_than_a_chunk_have_logits,
    ),
    "all tokens are one chunk": (
        summed_loss_in_chunks,
        "ChunkedLoss.apply(chunk_loss, chunk,",
        "ChunkedLoss.apply(chunk_loss, len(H),",
        bytes_fall_as_predicted,
    ),
    "the trunk is left without its forward": (
        chunked_loss._trunk_returns,
        'vars(module).pop("forward")',
        "pass",
        the_model_is_as_it_was_afterwards,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
