"""Each row of a gathered batch answers as with its adapter alone."""

import copy
import random

import pytest
import torch
from planting import Bug, each_is_caught, law
from served import adapter_folders, alone
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from peft_from_scratch import AdapterPool, load_model, nf4
from peft_from_scratch.serving import batch as batching
from peft_from_scratch.serving.batch import Batch, Slot, Slots, Stack, class_of

NAMES = ["mlp", None, "square", "attention", "uneven", "mlp", "small", None]
SIZES = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1}


def models():
    """Three shapes of a decoder in float64: Linear, Conv1D, and flattened tokens."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, **SIZES)
    opt = OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        **SIZES,
    )
    for config in (gpt2, opt):
        yield AutoModelForCausalLM.from_config(config).double().eval()
    yield load_model("tiny", device="cpu", dtype="float64")[0].eval()


def kinds_for(model, root):
    """A pool with all kinds of adapters, and their folders."""
    folders = adapter_folders(model, root)
    pool = AdapterPool(model, budget_bytes=10**9)
    for name, folder in folders.items():
        pool.add(name, folder)
    return pool, folders


@law
def each_row_answers_as_with_its_adapter_alone(folder):
    """In float64 to 1e-12, for three shapes of models; and None is the base."""
    for i, model in enumerate(models()):
        root = folder / str(i)
        pool, folders = kinds_for(model, root)
        names = [name for name in NAMES if name is None or name in folders]
        rows = random.Random(0).choices(range(2, 60), k=9 * len(names))
        ids = torch.tensor(rows).view(len(names), 9)
        with torch.no_grad(), pool.batch(names):
            together = model(input_ids=ids).logits
        for name, row, logits in zip(names, ids.tolist(), together, strict=True):
            expected = alone(model, folders.get(name), row)
            assert (logits - expected).abs().max() < 1e-12 * expected.abs().max()


@law
def rows_that_come_and_go_leave_the_others_their_adapters(folder):
    """After every step, the batch is the one that would be gathered anew."""
    model = load_model("tiny", device="cpu", dtype="float64")[0].eval()
    pool, _ = kinds_for(model, folder)
    versions = {name: pool.acquire(name) for name in folders_of(pool)}
    dice, batch, names = random.Random(1), Batch(), []
    for _ in range(60):
        if names and dice.random() < 0.45:
            row = dice.randrange(len(names))
            batch.drop(row)
            names[row] = names[-1]
            names.pop()
        else:
            names.append(dice.choice([None, *versions]))
            batch.append(versions.get(names[-1]))
        assert [v and v.name for v in batch.versions] == names
        for rank, stack in batch.stacks.items():
            assert max(stack.rows) < len(names)
            for place, row in enumerate(stack.rows):
                for module, (A, B) in versions[names[row]].layers.items():
                    assert class_of(versions[names[row]].rank) == rank
                    wide = stack.B[module][place] @ stack.A[module][place]
                    assert torch.equal(wide, B @ A) or torch.allclose(wide, B @ A)
                others = stack.A.keys() - versions[names[row]].layers.keys()
                assert not any(stack.A[m][place].any() for m in others)
        if batch.only is None:
            gathered = sorted(row for s in batch.stacks.values() for row in s.rows)
            assert gathered == [i for i, name in enumerate(names) if name]


@law
def a_batch_out_of_order_answers_as_well(folder):
    """Its one class holds all rows, and not in their order."""
    model = load_model("tiny", device="cpu", dtype="float64")[0].eval()
    pool, folders = kinds_for(model, folder)
    small, square = pool.acquire("small"), pool.acquire("square")
    batch = Batch([None, small, square])
    batch.drop(0)
    assert batch.stacks[4].rows == [1, 0]
    ids = [[5, 9, 33, 8], [7, 8, 11, 2]]
    with torch.no_grad(), pool.slots.using(batch):
        together = model(input_ids=torch.tensor(ids)).logits
    pool.slots.remove()
    for name, row, logits in zip(("square", "small"), ids, together, strict=True):
        assert torch.allclose(logits, alone(model, folders[name], row), atol=1e-11)


def folders_of(pool):
    return [card.name for card in pool.cards()]


@law
def generation_is_that_of_each_row_alone(folder):
    """Left padding and a cache, tokens of transformers' own generate."""
    model, tokenizer = load_model("tiny", device="cpu", dtype="float32")
    pool, folders = kinds_for(model, folder)
    names = ["small", "attention", None, "mlp"]
    prompts = [[5, 9, 33], [7, 8, 11, 12, 13, 99], [4], [120, 6, 6, 30]]
    pad, width = tokenizer.eos_token_id, 6
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": pad}
    with pool.batch(names):
        together = model.generate(ids, attention_mask=mask, **options)[:, width:]
    for name, prompt, tokens in zip(names, prompts, together.tolist(), strict=True):
        for i, token in enumerate(tokens):
            logits = alone(model, folders.get(name), prompt + tokens[:i])[-1]
            assert logits[token] > logits.max() - 1e-3


@law
def the_model_is_the_same_between_batches(folder):
    model = load_model("tiny", device="cpu", dtype="float32")[0]
    before = {n: type(m) for n, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    pool, _ = kinds_for(model, folder)
    with pytest.raises(RuntimeError, match="on purpose"), pool.batch(["mlp", None]):
        slots = [m for m in model.modules() if isinstance(m, Slot)]
        assert slots and not any(
            p.requires_grad for slot in slots for p in slot.base.parameters()
        )  # so that each sum is one step, rounded once
        raise RuntimeError("on purpose")
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert not model._forward_pre_hooks
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert not any(card.users for card in pool.cards())


def test_a_base_in_four_bits_and_in_half_precision(folder):
    for change, bound in ((nf4.quantize_model, 1e-5), (nn.Module.bfloat16, 0.03)):
        model = load_model("tiny", device="cpu", dtype="float32")[0]
        change(model)
        root = folder / change.__name__
        pool, folders = kinds_for(model, root)
        ids = [[5, 9, 33, 8], [7, 8, 11, 2], [4, 4, 100, 3]]
        names = ["mlp", "small", None]
        with torch.no_grad(), pool.batch(names):
            together = model(input_ids=torch.tensor(ids)).logits
        for name, row, logits in zip(names, ids, together, strict=True):
            expected = alone(model, folders.get(name), row)
            assert (logits - expected).abs().mean() < bound * expected.abs().max()


def test_half_precision_rounds_the_sum_once(folder):
    """Closer to the sum in float64 than base and change that are rounded apart."""
    torch.manual_seed(0)
    base = nn.Linear(64, 48, bias=False).bfloat16().requires_grad_(False)
    model = nn.ModuleDict({"p": base})
    slots = Slots(model)
    layers = [(torch.randn(4, 64) / 8, torch.randn(48, 4) / 64) for _ in range(2)]
    versions = [
        batching.Version(str(i), str(i), {"p": ab}) for i, ab in enumerate(layers)
    ]
    x = torch.randn(2, 40, 64).bfloat16()
    slot = Slot(base, slots, "p")
    slots.batch, slots._called_with = Batch(versions), (2, 40)
    with torch.no_grad():
        once = slot(x).double()
    exact, apart = [], []
    for row, (A, B) in zip(x, layers, strict=True):
        change = row.double() @ (B @ A).double().T
        exact.append(row.double() @ base.weight.double().T + change)
        apart.append((base(row) + change.bfloat16()).double())
    exact, apart = torch.stack(exact), torch.stack(apart)
    assert (once - exact).abs().mean() < 0.85 * (apart - exact).abs().mean()


def test_a_call_with_other_rows_is_refused(folder):
    model = load_model("tiny", device="cpu", dtype="float32")[0]
    pool, _ = kinds_for(model, folder)
    for rows in (1, 3):
        with (
            pytest.raises(ValueError, match=r"2 rows.*called with"),
            pool.batch(["mlp", "small"]),
        ):
            model(input_ids=torch.ones(rows, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="each is a row"), pool.batch(["mlp"]):
        model.generate(torch.ones(1, 3, dtype=torch.long), num_beams=2)


def test_a_layer_that_gets_some_of_the_tokens_is_refused():
    """As an expert of a mixture would: its rows are not those of the batch."""
    slots = Slots(nn.Module())
    slots._called_with = (2, 3)
    with pytest.raises(ValueError, match="which token belongs to which row"):
        slots.by_row(torch.zeros(4, 8))
    assert slots.by_row(torch.zeros(6, 8)).shape == (2, 3, 8)


def test_a_row_pays_for_twice_its_rank_at_most():
    assert [class_of(r) for r in (1, 4, 5, 8, 9, 33, 64)] == [4, 4, 8, 8, 16, 64, 64]


BUGS = {
    "rows in the order of their classes": Bug(
        Stack.add_change,
        "if self._in_order and places == len(x)",
        "if places == len(x)",
        a_batch_out_of_order_answers_as_well,
    ),
    "every row has the first adapter": Bug(
        Batch._compare,
        "all(v is first for v in self.versions)",
        "first",
        each_row_answers_as_with_its_adapter_alone,
    ),
    "the last row keeps its old number": Bug(
        Batch.drop,
        "self.stacks[class_of(moved.rank)].rename(last, row)",
        "pass",
        rows_that_come_and_go_leave_the_others_their_adapters,
    ),
    "the row that left stays in its place": Bug(
        Stack.drop,
        "tensor[place] = tensor[last]",
        "tensor[last] = tensor[place]",
        rows_that_come_and_go_leave_the_others_their_adapters,
    ),
    "what a place held before shines through": Bug(
        Stack._put,
        "here[place].zero_()",
        "pass",
        rows_that_come_and_go_leave_the_others_their_adapters,
    ),
    "slots that stay": Bug(
        Slots.remove,
        "{slot: slot.base for slot in slots}",
        "{}",
        the_model_is_the_same_between_batches,
    ),
    "all rows have the adapter of the first row": Bug(
        Stack.add_change,
        "x.index_select(0, self._index)",
        "x[:places]",
        each_row_answers_as_with_its_adapter_alone,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
