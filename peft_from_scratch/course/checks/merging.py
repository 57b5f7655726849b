"""What the exercises of notebook 06, merging, are compared with.

The first is given checkpoints that were made in the ways that its text lists, the
second with dense sums in float64, the third reads what was written as anybody would:
by from_pretrained.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from ...common.quiet import quiet_transformers
from . import Wrong, close, judged, unchanged

DOUBLE = torch.float64

# 6.1 ----------------------------------------------------------------------------------

MERGED, NONE, TWICE, NO_SCALE, OTHER = (
    *("merged", "not merged", "merged twice", "scale forgotten"),
    "none of these",
)
ANSWERS = (MERGED, NONE, TWICE, NO_SCALE, OTHER)
HALF = torch.bfloat16
FORENSIC = (  # d_out, d_in, r, scale, dtype, ‖ΔW‖ / ‖W0‖
    (48, 48, 4, 2.0, torch.float32, 0.3),
    (48, 48, 4, 2.0, HALF, 0.3),
    (40, 64, 8, 0.25, HALF, 0.02),
    (64, 32, 1, 4.0, HALF, 0.005),
    (56, 40, 3, 3.0, torch.float16, 0.005),
    (30, 70, 2, 3.0, torch.float32, 1e-4),
    (33, 65, 5, 0.75, HALF, 1.5),
    (64, 48, 2, 2.0, HALF, 0.001),  # below the rounding of most weights
)


@dataclass(frozen=True)
class Forensic:
    """A checkpoint's weight, and how it was made."""

    lent: dict  # W0, A, B, scale, W
    answer: str
    how: str

    def __str__(self):
        (d_out, d_in), dtype = self.lent["W"].shape, self.lent["W"].dtype
        W0, W = (self.lent[name].double() for name in ("W0", "W"))
        moved = 100 * ((W - W0).norm() / W0.norm()).item()
        return (
            f"W ({d_out}, {d_in}) in {dtype}, scale={self.lent['scale']}, "
            f"‖W - W0‖ {moved:.2g} % of ‖W0‖"
        )


def our_verdict(W0: Tensor, A: Tensor, B: Tensor, scale: float, W: Tensor) -> str:
    """The lesson's own answer to 6.1: the nearest candidate, if it is near."""
    BA = B.double() @ A.double()
    ways = {NONE: 0.0, MERGED: scale, TWICE: 2 * scale, NO_SCALE: 1.0}
    off = {}
    for way, factor in ways.items():
        candidate = (W0.double() + factor * BA).to(W.dtype).double()
        off[way] = (W.double() - candidate).norm().item()
    best = min(off, key=off.get)
    return best if off[best] < 0.3 * abs(scale) * BA.norm().item() else OTHER


def forensics() -> Iterator[Forensic]:
    """Every answer on every size, with other numbers each time."""
    draw = torch.Generator().manual_seed(6)
    for row, sizes in enumerate(FORENSIC):
        for number, how in enumerate(_MADE):
            if (row + number) % 2 == 0 or number < len(ANSWERS):
                yield _forensic(sizes, how, draw, (row + number) % 3 == 0)


def _forensic(sizes, how: str, draw: torch.Generator, single: bool) -> Forensic:
    d_out, d_in, r, scale, dtype, ratio = sizes

    def normal(*shape) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=DOUBLE)

    W0 = (0.05 * normal(d_out, d_in)).to(dtype)
    A, B, other = normal(r, d_in), normal(d_out, r), normal(d_out, r)
    size = ratio * W0.double().norm() / (scale * (B @ A).norm())
    A, B, other = A.float(), (size * B).float(), (size * other).float()
    computed = torch.float32 if single else DOUBLE  # in which the sender merged
    BA, elsewhere = ((X.to(computed) @ A.to(computed)) for X in (B, other))
    answer, update = _MADE[how](scale, BA, elsewhere)
    W = (W0.to(computed) + update).to(dtype)
    lent = {"W0": W0, "A": A, "B": B, "scale": scale, "W": W}
    return Forensic(lent, answer, how)


_MADE = {  # how: (scale, BA, another adapter's product) -> (answer, update)
    "merged": lambda s, BA, other: (MERGED, s * BA),
    "untouched": lambda s, BA, other: (NONE, 0 * BA),
    "applied twice": lambda s, BA, other: (TWICE, 2 * s * BA),
    "without its scale": lambda s, BA, other: (NO_SCALE, BA),
    "another adapter": lambda s, BA, other: (OTHER, s * other),
    "subtracted": lambda s, BA, other: (OTHER, -s * BA),
    "beside another adapter": lambda s, BA, other: (OTHER, s * (BA + other)),
    "three times": lambda s, BA, other: (OTHER, 3 * s * BA),
}
_LIKELY = {  # (expected, got): the likely mistake
    (MERGED, NONE): "a tolerance that is wider than the update: compare with what the "
    "update changes, and round the candidate as W was rounded",
    (MERGED, OTHER): "the candidate is not rounded to W's dtype before you compare; or "
    "you ask for equal bits, although the sender may have computed in float32",
    (NONE, MERGED): "the order of the tests: the base itself has to be a candidate",
    (OTHER, MERGED): "nothing is left over for another adapter: ask how well the best "
    "candidate fits",
    (OTHER, NONE): "the direction of W - W0 alone is not enough: another adapter has "
    "nearly none of BA, and has changed W all the same",
    (TWICE, OTHER): "2 · scale · BA is no candidate, or it is not rounded",
    (NO_SCALE, OTHER): "BA without the scale is no candidate, or it is not rounded",
    (TWICE, MERGED): "a tolerance that is wider than the update, or one that looks at "
    "its direction alone",
    (NO_SCALE, MERGED): "the scale is left out of your candidate: what you call merged "
    "is BA",
    (MERGED, NO_SCALE): "the scale is left out of your candidate, or the two names are "
    "swapped",
}


@judged
def which_merge(my_verdict: Callable) -> None:
    """6.1: my_verdict(W0, A, B, scale, W): one of ANSWERS."""
    for case in forensics():
        with unchanged(**case.lent):
            got = my_verdict(**case.lent)
        if got == case.answer and isinstance(got, str):
            continue
        if got is None:
            likely = "`return` is missing"
        elif not isinstance(got, str) or got not in ANSWERS:
            likely = f"one of these texts is needed: {', '.join(map(repr, ANSWERS))}"
        else:
            likely = _LIKELY.get(
                (case.answer, got), "two of the ways are taken for each other"
            )
        raise Wrong(
            f"{case}\n  expected  {case.answer!r} (it was made: {case.how})\n"
            f"  got       {got!r}\nLikely mistake: {likely}"
        )


# 6.2 ----------------------------------------------------------------------------------

Adapters = list[tuple[Tensor, Tensor, float]]
SUMS = (  # d_out, d_in, ((r, scale, weight), …)
    (6, 6, ((2, 2.0, 1.0), (2, 0.5, 1.0))),
    (7, 5, ((1, 2.0, 0.7), (3, 4.0, -1.3))),
    (9, 12, ((2, 0.25, 0.5), (1, 3.0, 0.25), (4, 1.0, -2.0))),
    (8, 11, ((3, 2.0, -1.0),)),
    (10, 10, ((2, 2.0, 0.0), (2, 2.0, 1.5))),
    (8, 8, ((2, 1.0, 1e-3), (2, 16.0, 1e3))),
    (9, 7, ((2, 2.0, 1e-3), (2, 1.0, -2e-3))),
    (12, 9, tuple((1, float(i), 1 / i) for i in range(1, 6))),
)


def our_sum(adapters: Adapters, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The lesson's own answer to 6.2: factors that are stacked."""
    A = torch.cat([A for A, _, _ in adapters])
    pairs = zip(adapters, weights, strict=True)
    return A, torch.cat([w * scale * B for (_, B, scale), w in pairs], dim=1)


def sums() -> Iterator[tuple[Adapters, list[float]]]:
    draw = torch.Generator().manual_seed(62)
    for d_out, d_in, parts in (*SUMS, SUMS[0], SUMS[1]):
        adapters, weights = [], []
        for r, scale, weight in parts:
            A = torch.randn(r, d_in, generator=draw)
            adapters.append((A, torch.randn(d_out, r, generator=draw), scale))
            weights.append(weight)
        yield adapters, weights


@judged
def exact_sum(my_sum: Callable) -> None:
    """6.2: my_sum(adapters, weights): (A, B) with B A the weighted sum."""
    for adapters, weights in sums():
        shapes = [(tuple(A.shape), tuple(B.shape)) for A, B, _ in adapters]
        scales = [scale for *_, scale in adapters]
        where = f"for A, B of {shapes}, {scales=}, {weights=}"
        with unchanged(adapters=adapters, weights=weights):
            answer = my_sum(adapters, weights)
        A, B = _two_factors(answer, adapters, where)
        expected = _dense(adapters, weights)
        wrong = _wrong_sums(adapters, weights)
        kept = {text: value.float() for text, value in wrong.items()}
        close(
            (B.double() @ A.double()).float(),
            expected.float(),
            what=f"B @ A, {where}",
            mistakes=kept,
            tolerance=1e-4,
        )


def _dense(adapters: Adapters, weights: Sequence[float]) -> Tensor:
    pairs = zip(adapters, weights, strict=True)
    return sum(w * s * (B.double() @ A.double()) for (A, B, s), w in pairs)


def _two_factors(answer, adapters: Adapters, where: str) -> tuple[Tensor, Tensor]:
    pair = isinstance(answer, tuple | list) and len(answer) == 2
    if not pair or not all(isinstance(X, Tensor) for X in answer):
        got = type(answer).__name__
        likely = "`return` is missing" if answer is None else "return A, B"
        raise Wrong(
            f"{where}\n  expected  (A, B), two tensors\n  got       {got}\n"
            f"Likely mistake: {likely}"
        )
    A, B = answer
    d_in, d_out = adapters[0][0].shape[1], adapters[0][1].shape[0]
    most = sum(A.shape[0] for A, _, _ in adapters)
    shapes = tuple(A.shape), tuple(B.shape)
    k = A.shape[0] if A.ndim == 2 else 0
    if shapes != ((k, d_in), (d_out, k)) or k > most:
        likely = "A has k rows and B has k columns"
        rows = B.shape[0] if B.ndim == 2 else 0
        if shapes == ((k, d_in), (d_out, k)):
            likely = "the sum of the ranks is enough: you return a dense sum"
        elif shapes == ((d_out, rows), (rows, d_in)):
            likely = "A and B are swapped"
        raise Wrong(
            f"the shapes of A and B, {where}\n  expected  (k, {d_in}) and "
            f"({d_out}, k), k at most {most}\n  got       {shapes[0]} and {shapes[1]}\n"
            f"Likely mistake: {likely}"
        )
    for name, X in (("A", A), ("B", B)):
        if X.dtype != torch.float32:
            raise Wrong(
                f"{name}, {where}\n  expected  a tensor of torch.float32\n"
                f"  got       {X.dtype}\nLikely mistake: a dtype of your own"
            )
    return A, B


def _wrong_sums(adapters: Adapters, weights: Sequence[float]) -> dict[str, Tensor]:
    bare = [(A, B, 1.0) for A, B, _ in adapters]
    ones, n = [1.0] * len(weights), len(weights)
    right = _dense(adapters, weights)
    wrong = {
        "the scales are missing": _dense(bare, weights),
        "the weights are missing": _dense(adapters, ones),
        "scales and weights are missing": _dense(bare, ones),
        "each weight is in A and in B": _dense(adapters, [w * w for w in weights]),
        "each scale is in A and in B": _dense(
            [(A, B, s * s) for A, B, s in adapters], weights
        ),
        "the sign of a weight is lost: √|w| on both sides needs it on one of them": (
            _dense(adapters, [abs(w) for w in weights])
        ),
    }
    if n > 1:
        wrong["the mean in place of the sum"] = right / n
        wrong["only the first adapter is there"] = _dense(adapters[:1], weights[:1])
    if len({A.shape for A, _, _ in adapters}) == 1 and n > 1:
        scaled = [w * s * B for (_, B, s), w in zip(adapters, weights, strict=True)]
        plain = sum(B for _, B, _ in adapters).double()
        summed_A = sum(A for A, _, _ in adapters).double()
        cross = "the factors were added: that adds the cross terms B_i A_j"
        wrong[cross] = sum(scaled).double() @ summed_A
        wrong[f"{cross}; and weights and scales are missing"] = plain @ summed_A
    return wrong


# 6.3 ----------------------------------------------------------------------------------

VOCABULARY = 60
LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
TIED = (
    ("Llama", lambda: LlamaConfig(**LLAMA), 2, 2.0),
    ("Qwen", lambda: Qwen3Config(**LLAMA | dict(vocab_size=44)), 3, 0.5),
    (
        "GPT-2",
        lambda: GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        4,
        4.0,
    ),
)


def our_export(model, A: Tensor, B: Tensor, scale: float, folder) -> None:
    """The lesson's own answer to 6.3: the head gets a tensor of its own."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() + scale * B @ A)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Tied:
    """A model whose head is its embedding, and a LoRA at the head."""

    name: str
    model: nn.Module
    A: Tensor  # (r, hidden size)
    B: Tensor  # (vocabulary, r)
    scale: float
    ids: Tensor  # (1, t)

    @torch.no_grad()
    def logits(self, *, head: float = 1.0, embedding: float = 0.0) -> Tensor:
        """The logits with so much of the update in the head and in the embedding."""
        model, update = deepcopy(self.model), self.scale * self.B @ self.A
        E = model.get_input_embeddings().weight.detach()
        model.get_output_embeddings().weight = nn.Parameter(E + head * update)
        model.get_input_embeddings().weight = nn.Parameter(E + embedding * update)
        return model(self.ids).logits


def tied_models() -> Iterator[Tied]:
    for seed, (name, config, r, scale) in enumerate((*TIED, TIED[0])):
        draw = torch.Generator().manual_seed(630 + seed)
        settings = config()
        with quiet_transformers():
            model = AutoModelForCausalLM.from_config(settings).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3, generator=draw)
        A = 0.3 * torch.randn(r, 16, generator=draw)
        B = torch.randn(settings.vocab_size, r, generator=draw)
        ids = torch.randint(settings.vocab_size, (1, 7), generator=draw)
        yield Tied(name, model, A, B, scale, ids)


@judged
def tied_export(my_export: Callable) -> None:
    """6.3: my_export(model, A, B, scale, folder): a folder for from_pretrained."""
    for case in tied_models():
        with tempfile.TemporaryDirectory() as place:
            got, ties = _exported(my_export, case, Path(place))
        update = case.scale * case.B @ case.A
        mistakes = {
            "the update is lost: the head was not changed, or was tied to the "
            "embedding again": case.logits(head=0.0),
            "the embedding was changed too: head and embedding were one tensor": (
                case.logits(embedding=1.0)
            ),
            "the update is in the embedding alone": case.logits(
                head=0.0, embedding=1.0
            ),
            "the scale is missing": case.logits(head=1 / case.scale),
            "the update is there twice": case.logits(head=2.0),
            "the sign of the update": case.logits(head=-1.0),
            "the head is the update alone, without the weight that was there": (
                case.logits() - case.logits(head=0.0)
            ),
        }
        what = (
            f"logits of the reloaded {case.name} (vocabulary {len(update)}, "
            f"r={len(case.A)}, scale={case.scale})"
        )
        expected = case.logits()
        close(got, expected, what=what, mistakes=mistakes, tolerance=1e-4)
        if ties:
            raise Wrong(
                f"{case.name}: the logits are right, but the saved config says "
                "tie_word_embeddings=True\n  expected  False\n  got       True\n"
                "Likely mistake: the config is not changed before it is saved. "
                "transformers sees two tensors in the file; other programs trust the "
                "config, tie them again and lose the update"
            )


def _exported(my_export: Callable, case: Tied, place: Path) -> tuple[Tensor, bool]:
    """(its logits, whether its config ties); Wrong where nothing can be loaded."""
    first, second = place / "written", place / "moved"
    model = deepcopy(case.model)
    with quiet_transformers(), unchanged(A=case.A, B=case.B, ids=case.ids):
        my_export(model, case.A, case.B, case.scale, first)
    if not first.is_dir() or not any(first.iterdir()):
        raise Wrong(
            f"{case.name}: nothing was written to `folder`\n  expected  the files of "
            "model.save_pretrained(folder)\n  got       none\nLikely mistake: the "
            "model is changed, and never saved"
        )
    shutil.move(first, second)  # nothing but the files may count
    try:
        with quiet_transformers():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                second, output_loading_info=True
            )
            config = AutoConfig.from_pretrained(second)
    except (OSError, ValueError, RuntimeError) as error:
        raise Wrong(
            f"{case.name}: from_pretrained(folder) failed: {error}\nLikely mistake: "
            "save the whole model by model.save_pretrained(folder)"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise Wrong(
            f"{case.name}: the file holds no {missing[0]}, which transformers then "
            "draws at random\nLikely mistake: the config says that nothing is tied, "
            "but head and embedding still were one tensor, which is written once"
        )
    with torch.no_grad():
        return loaded.eval()(case.ids).logits.float(), config.tie_word_embeddings
