"""Laws of packed rows, and bugs planted in packing.py that they must catch."""

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from architectures import CONFIGS, GATED, SHARED, build
from model_state import assert_same, largest, refused, snapshot
from packing_table import (
    GROUPS,
    bound,
    cases,
    difference,
    gradients,
    model_of,
    rows_of,
)
from planting import Bug, each_is_caught, law
from small_runs import TASK, TOKENIZER, adapted, recipe, run
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BloomConfig,
    MambaConfig,
    MixtralConfig,
    OlmoeConfig,
    RecurrentGemmaConfig,
)

import peft_from_scratch as pfs
from peft_from_scratch.core import adapter
from peft_from_scratch.core.decoder import DecoderAdapter
from peft_from_scratch.memory import meter
from peft_from_scratch.methods import prefix, prompt
from peft_from_scratch.tasks.templates import IGNORED, encode_rows
from peft_from_scratch.training import batch, loop, loss, packing
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.packing import Packing, pack, packing_for

CPU = torch.device("cpu")
TABLE = {name: (method, architecture) for name, method, architecture in cases()}
ENCODED = encode_rows(TOKENIZER, TASK.instruction, TASK.train, template="chat")
ALL = [[*range(len(rows_of()))]]


# Packed rows are separate rows -----------------------------------------------------


@law
@pytest.mark.parametrize("name", TABLE)
def packed_rows_are_separate_rows(name):
    method, architecture = TABLE[name]
    found = difference(model_of(method, architecture), rows_of())
    assert found.loss < bound(method, architecture)
    assert found.gradients < bound(method, architecture)


def text(row):
    """The row with a label at every token, the first included."""
    return row[0], list(row[0])


KINDS = {
    "nothing shared": rows_of(shared=0),
    "nothing shared, a label everywhere": [*map(text, rows_of(shared=0))],
    "shared text, a label everywhere": [*map(text, rows_of())],
    "labels at once": rows_of(prompt=0),
    "the same row twice": rows_of()[:1] * 5,
    "a row without labels": [
        *rows_of()[:4],
        (rows_of()[4][0], [IGNORED] * len(rows_of()[4][0])),
    ],
    "a row inside another": [(ids[:7], labels[:7]) for ids, labels in rows_of()[:1]]
    + rows_of()[:4],
    "several turns": [
        (ids, [i if place % 3 else IGNORED for place, i in enumerate(ids)])
        for ids, _ in rows_of(own=(9, 8, 12, 10, 9))
    ],
}


@law
@pytest.mark.parametrize("kind", KINDS)
def any_rows_are_their_own(kind="nothing shared, a label everywhere"):
    method, _ = TABLE["lora-gpt2"]
    found = difference(model_of(method, "gpt2"), KINDS[kind])
    assert found.loss < 1e-12 and found.gradients < 1e-12


@law
def what_a_token_sees_is_its_row():
    """Spelled out, place by place."""
    row = torch.tensor([[-1, -1, 0, 0, 2, 2, 2], [-1, -1, 1, -2, -2, -2, -2]])
    found = packing.visible(row)
    for group, i, j in product(range(2), range(7), range(7)):
        mine, other = row[group, i], row[group, j]
        expected = j <= i and (other == -1 or other == mine)
        assert found[group, i, j] == expected, (group, i, j)


@law
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def the_mask_is_of_the_models_dtype(dtype=torch.bfloat16):
    model = build("gpt2", dtype=dtype)
    packed = replace(packing_for(model, rows_of()), per_pair=0).batch(rows_of())
    mask = packed["attention_mask"]
    assert mask.dtype == dtype and mask.min() == torch.finfo(dtype).min
    assert mask.shape == (1, 1, *2 * packed["input_ids"].shape[1:])


@law
def token_losses_are_in_their_rows():
    model = build("opt", dtype=torch.float64)
    for kind in KINDS.values():
        expected, labelled = loss.token_losses(model, batch_of(kind, CPU))
        for groups in GROUPS:
            packed = pack(kind, groups, torch.float64, CPU)
            found, theirs = loss.token_losses(model, packed)
            assert torch.equal(theirs, labelled)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@law
def mean_loss_of_packed_rows_is_that_of_padded_ones():
    model = build("gpt2", dtype=torch.float64)
    packed = packing_for(model, ENCODED)
    assert packed.tokens(ENCODED) < batch_of(ENCODED, CPU)["input_ids"].numel()
    for size in (1, 3, 8):
        found = loss.mean_loss(model, ENCODED, batch=size, collate=packed.batch)
        expected = loss.mean_loss(model, ENCODED, batch=size)
        assert math.isclose(found, expected, rel_tol=1e-12)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_checkpointing_and_both_attentions_change_nothing(implementation):
    model = model_of(TABLE["lora-gpt2"][0], "gpt2")
    model.set_attn_implementation(implementation)
    plain = gradients(model, [pack(rows_of(), ALL, torch.float64, CPU)])[1]
    model.gradient_checkpointing_enable()
    model.train()
    assert largest(gradients(model, [batch_of(rows_of(), CPU)])[1], plain) < 1e-12
    assert difference(model, rows_of()).gradients < 1e-12


def test_autocast_reads_packs():
    model = model_of(TABLE["lora-llama"][0], "llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(model, rows_of()).loss < 0.01


# Virtual tokens --------------------------------------------------------------------


@law
@pytest.mark.parametrize("method", [prompt, prefix])
def other_square_masks_are_refused(method=prompt):
    model = build("gpt2", dtype=torch.float64)
    method.inject(model, n=3)
    packed = pack(rows_of(), ALL, torch.float64, CPU)
    ids, mask = packed["input_ids"], packed["attention_mask"]
    places = packed["position_ids"]
    kept = dict(use_cache=False)
    with refused(model, "attention_mask is of 4 dimensions", "position_ids"):
        model(ids, attention_mask=mask, **kept)
    with refused(model, "use_cache=False"):
        model(ids, attention_mask=mask, position_ids=places, use_cache=True)
    with refused(model, "of 4 dimensions"):
        model(ids, attention_mask=mask[..., 1:], position_ids=places, **kept)
    with refused(model, "of 3 dimensions"):
        model(ids, attention_mask=mask[0], position_ids=places, **kept)
    with refused(model, "Allowed are 253 tokens"):
        model(ids, attention_mask=mask, position_ids=places + 240, **kept)
    if method is prompt:
        more = dict(cu_seq_lens_q=torch.tensor([0, 4, 10]))
        with refused(model, "cu_seq_lens_q", "packed"):
            model(ids, attention_mask=mask, position_ids=places, **more, **kept)


@law
def a_pack_may_be_longer_than_the_table_of_positions():
    """Its rows are not, and they begin anew."""
    rows = rows_of(own=[70] * 5)
    model = build("opt", dtype=torch.float64)
    prompt.inject(model, n=3)
    found = difference(model, rows)
    assert found.loss < 1e-12 and found.gradients < 1e-12


@law
def a_mask_of_truths_is_widened_like_one_of_numbers():
    model = build("llama")
    prompt.inject(model, n=3)
    packed = pack(rows_of(), ALL, torch.float32, CPU)
    mask = packed["attention_mask"]
    given = dict(position_ids=packed["position_ids"], use_cache=False)
    with torch.no_grad():
        expected, found = (
            model(packed["input_ids"], attention_mask=each, **given).logits
            for each in (mask, mask == 0)
        )
    assert largest(found, expected) < 1e-6


# Which models, and which rows ------------------------------------------------------


def odd(config):
    torch.manual_seed(0)
    model = Auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


SIZES = dict(hidden_size=32, num_hidden_layers=2, **SHARED)
MIXTURE = GATED | dict(num_experts_per_tok=2)
ODD = {
    "a state space": (
        lambda: odd(MambaConfig(state_size=8, time_step_rank=4, **SIZES)),
        False,
    ),
    "a recurrence": (
        lambda: odd(
            RecurrentGemmaConfig(
                **SIZES | dict(num_hidden_layers=3),
                num_attention_heads=4,
                intermediate_size=48,
            )
        ),
        False,
    ),
    "alibi": (lambda: odd(BloomConfig(**SIZES, n_head=4)), False),
    "a mixture": (
        lambda: odd(MixtralConfig(**MIXTURE, num_local_experts=4)),
        True,
    ),
    "a mixture of many": (
        lambda: odd(OlmoeConfig(**MIXTURE, num_experts=6)),
        True,
    ),
    "a table of positions": (lambda: build("opt"), True),
}


@law
@pytest.mark.parametrize("kind", ODD)
def a_model_is_packed_if_it_reads_packs(kind="a state space"):
    make, works = ODD[kind]
    model = make()
    asked = packing_for(model, rows_of())
    assert asked.works == works
    found, expected = (
        loss.mean_loss(model, rows_of(), batch=5, **more)
        for more in (dict(collate=asked.batch), {})
    )
    assert math.isclose(found, expected, rel_tol=1e-5)


def forgets(name, value=None):
    """A model that ignores an argument of its forward, without a word."""
    model = build("llama")
    forward = model.forward

    def deaf(input_ids, logits_to_keep=0, **others):
        if name in others:
            others[name] = value and value(others[name])
        return forward(input_ids, logits_to_keep=logits_to_keep, **others)

    model.forward = deaf
    return model


def blind_to_rows(mask):
    """Causal over the whole pack: each row sees the rows before it."""
    return torch.full_like(mask, torch.finfo(mask.dtype).min).triu(1)


@law
@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def what_is_ignored_is_noticed(name="attention_mask"):
    assert not packing_for(forgets(name), ENCODED).works


@law
def rows_that_see_others_are_noticed():
    assert not packing_for(forgets("attention_mask", blind_to_rows), ENCODED).works


@law
def a_window_shorter_than_a_row_is_noticed(monkeypatch):
    """By the config, where it says so; by the logits, where it does not."""
    model = build("gemma")
    longest = model.config.sliding_window
    assert packing_for(model, rows_of(own=(longest - 5, 9, 4))).works
    rows = rows_of(own=(longest - 4, 9, 4))
    with monkeypatch.context() as patch:
        patch.setattr(packing, "reads_packed", lambda *_: True)
        assert not packing_for(model, rows).works
    monkeypatch.setattr(packing, "WINDOWS", ())
    assert not packing_for(model, rows_of(own=(longest + 20, 9, 4))).works


@law
def the_question_changes_nothing():
    model = adapted(dropout=0.5).train()
    before, generator = snapshot(model), torch.get_rng_state()
    assert packing_for(model, ENCODED).works
    assert_same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), generator)


def lengths_only(lengths, shared=0):
    """Rows of these lengths, the first tokens shared; the last one has a label."""
    return [
        ([0] * shared + [i + 1] * (n - shared), [IGNORED] * (n - 1) + [1])
        for i, n in enumerate(lengths)
    ]


SMOLLM2 = Packing(CPU, torch.float32, 106_168_320, 3 * 2 * 30 * 576, works=True)


@law
def the_division_is_the_one_of_least_work():
    """Nothing pays for long rows; a long prefix and ragged rows pay."""
    for lengths, shared, groups in (
        ([73] * 8, 24, 2),
        ([400] * 8, 0, 8),
        ([400] * 8, 300, 1),
        ([400, 20, 20, 20, 20, 20, 20, 20], 0, 1),
        ([2000] * 4, 100, 4),
        ([30] * 8, 28, 1),
        ([30], 28, 1),
    ):
        rows = lengths_only(lengths, shared)
        found = SMOLLM2.groups(rows)
        assert len(found) == groups, (lengths, shared, found)
        assert sorted(i for group in found for i in group) == [*range(len(rows))]
        parts = [sum(lengths[i] - shared for i in group) for group in found]
        assert SMOLLM2.tokens(rows) == groups * (shared + max(parts))
        assert SMOLLM2.batch(rows)["input_ids"].numel() == SMOLLM2.tokens(rows)


@law
def work_is_what_the_model_multiplies():
    """Products by the layers' weights, whatever they are stored in."""
    for architecture in CONFIGS:
        model = build(architecture)
        per_token, per_pair = packing.work_of(model)
        shapes = [
            p.shape
            for n, p in model.named_parameters()
            if p.dim() == 2 and any(w in n for w in ("proj", "fc", "attn"))
        ]
        assert per_token == sum(a * b for a, b in shapes)
        assert per_pair == packing.PAIR_COST * 2 * 2 * 32
        pfs.nf4.quantize_model(model)
        pfs.lora.inject(model, r=4)
        assert packing.work_of(model) == (per_token, per_pair)


def test_the_longest_group_is_no_longer_than_need_be():
    rows = lengths_only([9, 8, 7, 6, 5, 4])
    assert packing.divided(rows, 0, 2) == [[0, 3, 4], [1, 2, 5]]
    assert packing.divided(rows, 0, 6) == [[0], [1], [2], [3], [4], [5]]


def test_who_does_not_ask_is_padded():
    rows, model = rows_of(), build("gpt2")
    assert set(Packing(CPU, torch.float32).batch(rows)) == {"input_ids", "labels"}
    assert not packing_for(model.to("meta"), rows).works
    one_token = [([5], [5]), *rows]
    assert not packing_for(build("gpt2"), one_token).works


# The loop --------------------------------------------------------------------------


def always(works, ask=packing_for):
    """packing_for, whatever the model answers."""
    return lambda *asked: replace(ask(*asked), works=works)


@law
def training_is_that_of_padded_rows(monkeypatch):
    """Apart from rounding: losses, norms, validations and weights."""
    ends, histories = [], []
    for works in (True, False):
        monkeypatch.setattr(loop, "packing_for", always(works))
        model = adapted(architecture="gpt2", dropout=0, dtype=torch.float64)
        histories.append(run(model, recipe(validate_every=5)))
        ends.append({n: p.detach() for n, p in adapter.trainable(model).items()})
    assert largest(*ends) < 1e-11
    packed, padded = histories
    assert packed.tokens == padded.tokens
    for name in ("loss", "norm", "validation"):
        ours, theirs = (torch.tensor(getattr(h, name)) for h in histories)
        assert largest(ours, theirs) < 1e-11
    assert padded.packing == "padded: 594 tokens in the first step"
    words = "packed behind 23 shared tokens: 428 tokens in place of 594"
    assert packed.packing == f"{words} in the first step"


@law
def the_model_reads_what_is_told():
    model, read = adapted(), {True: [], False: []}
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: read[model.training].append(args[0].numel())
    )
    history = run(model, recipe(steps=1, warmup=0, validate_every=1))
    assert sum(read[True]) == int(history.packing.split()[5])
    validation = encode_rows(
        TOKENIZER, TASK.instruction, TASK.validation, template="chat"
    )
    assert read[False][-1] == packing_for(adapted(), ENCODED).tokens(validation)
    assert read[False][-1] < batch_of(validation, CPU)["input_ids"].numel()


def test_the_meter_counts_the_packed_step(monkeypatch):
    settings = recipe(batch=8, accumulate=1)
    packed = meter.measured_step(adapted(), TOKENIZER, TASK, settings)
    monkeypatch.setattr(meter, "packing_for", always(False))
    padded = meter.measured_step(adapted(), TOKENIZER, TASK, settings)
    assert packed.activations < 0.9 * padded.activations


# Planted bugs ----------------------------------------------------------------------

LORA, PROMPT = (
    partial(packed_rows_are_separate_rows, name)
    for name in ("lora-gpt2", "prompt-gpt2")
)
OWN, VISIBLE = packing._own_part, packing.visible

BUGS = {
    "positions not restarted": Bug(
        OWN,
        "positions = range(shared, len(ids))",
        "positions = range(shared + number, len(ids) + number)",
        LORA,
    ),
    "a row sees the one before it": Bug(
        VISIBLE, "seen == seen_from", "seen <= seen_from", LORA
    ),
    "a row sees the one before it, in words": Bug(
        VISIBLE, "seen == seen_from", "seen <= seen_from", what_a_token_sees_is_its_row
    ),
    "a row does not see the prefix": Bug(
        VISIBLE, "| (seen == PREFIX)", "| (seen == PADDING)", LORA
    ),
    "the prefix sees the rows": Bug(
        VISIBLE, ".tril()", ".tril() | (seen_from == PREFIX)", LORA
    ),
    "tokens see later ones": Bug(VISIBLE, ".tril()", "", LORA),
    "one label lost": Bug(
        packing.shared_length,
        "_first_label(labels) - 1",
        "_first_label(labels)",
        partial(any_rows_are_their_own, "labels at once"),
    ),
    "the first token of a row predicted from the row before": Bug(
        OWN,
        "[IGNORED, *labels[shared + 1 :]]",
        "labels[shared:]",
        any_rows_are_their_own,
    ),
    "labels of the prefix's place": Bug(
        OWN, "*labels[shared + 1 :]", "*labels[shared:-1]", LORA
    ),
    "a label on padding": Bug(pack, "labels=IGNORED", "labels=rows[0][0][0]", LORA),
    "the mask in float32": Bug(
        pack, "dtype=dtype", "dtype=torch.float32", the_mask_is_of_the_models_dtype
    ),
    "the mask not read": Bug(
        loss.label_logits,
        "if name in batch",
        "if name in batch and name != 'attention_mask'",
        LORA,
    ),
    "losses of tokens in another row": Bug(
        batch.unpacked,
        "row[own], ",
        "row[own].flip(0), ",
        token_losses_are_in_their_rows,
    ),
    "losses of tokens one place on": Bug(
        batch.unpacked,
        "position[own] - 1",
        "position[own] % longest",
        token_losses_are_in_their_rows,
    ),
    "rows do not see P": Bug(
        prompt.in_front_of_square, "value=shown", "value=hidden", PROMPT
    ),
    "P sees the rows": Bug(prompt.in_front_of_square, ".triu(1)", ".triu(n)", PROMPT),
    "numbers in a mask of truths": Bug(
        prompt.in_front_of_square,
        "(True, False) if true else",
        "(0.0, 1.0) if true else",
        a_mask_of_truths_is_widened_like_one_of_numbers,
    ),
    "a square mask with a cache": Bug(
        DecoderAdapter.is_packed,
        "square and alone and",
        "square and",
        other_square_masks_are_refused,
    ),
    "a mask that is not square": Bug(
        DecoderAdapter.is_packed,
        "attention_mask.shape[2] == attention_mask.shape[3]",
        "True",
        other_square_masks_are_refused,
    ),
    "positions behind the table": Bug(
        DecoderAdapter.is_packed,
        "self.refuse_beyond_table(int(position_ids.max()) + 1)",
        "pass",
        other_square_masks_are_refused,
    ),
    "a pack counted like a row": Bug(
        DecoderAdapter.refuse_lengths,
        "attention_mask.dim() == 4",
        "False",
        a_pack_may_be_longer_than_the_table_of_positions,
    ),
    "every model is believed": Bug(
        packing.reads_packed,
        "bool((distance < bound).all())",
        "True",
        what_is_ignored_is_noticed,
    ),
    "positions are not looked at": Bug(
        packing.reads_packed,
        "bool((distance < bound).all())",
        "bool((distance < bound).any())",
        partial(what_is_ignored_is_noticed, "position_ids"),
    ),
    "a state carried over": Bug(
        packing.reads_packed,
        "return False",
        "return True",
        a_model_is_packed_if_it_reads_packs,
    ),
    "dropout while asking": Bug(
        packing.reads_packed,
        "training=False",
        "training=True",
        the_question_changes_nothing,
    ),
    "a window not looked at": Bug(
        packing_for,
        "> window(model)",
        "> 10**9",
        a_window_shorter_than_a_row_is_noticed,
    ),
    "asked with a short row": Bug(
        packing_for,
        "reads_packed(model, by_length[-1], by_length[0])",
        "reads_packed(model, by_length[0], by_length[0])",
        a_window_shorter_than_a_row_is_noticed,
    ),
    "attention for nothing": Bug(
        Packing.work,
        "tokens * self.per_pair",
        "self.per_pair",
        the_division_is_the_one_of_least_work,
    ),
    "the most work": Bug(
        Packing.groups,
        "return min(",
        "return max(",
        the_division_is_the_one_of_least_work,
    ),
    "all rows in one group": Bug(
        packing.divided,
        "heapreplace(shortest, (length + len(rows[i][0]) - shared, number))",
        "pass",
        the_division_is_the_one_of_least_work,
    ),
    "bytes for weights": Bug(
        packing.work_of,
        "prod(sizes(modules[name]))",
        "sum(b.numel() for b in modules[name].state_dict().values())",
        work_is_what_the_model_multiplies,
    ),
    "validation padded": Bug(
        loop._validate, "collate=packing.batch,", "", the_model_reads_what_is_told
    ),
    "training padded": Bug(
        Packing.batch,
        "if len(groups) == len(rows)",
        "if True",
        the_model_reads_what_is_told,
    ),
}
CAUGHT = (AssertionError, IndexError, RuntimeError, ValueError)  # torch's among them


test_a_planted_bug_is_caught = each_is_caught(BUGS, errors=CAUGHT)
