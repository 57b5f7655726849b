"""Several LoRA adapters of one base model into one.

Adapter i adds a low-rank update to a weight, and w_i says how much of it is wanted:

    ΔW_i = s_i B_i A_i        the exact sum  S = Σ_i w_i ΔW_i        s = alpha / r

The trap is to add the factors, as one adds the weights of whole models:

    (Σ_i B_i) (Σ_j A_j) = Σ_i B_i A_i + Σ_{i≠j} B_i A_j

In the second sum, the cross terms, the B of one task reads the A of another. They mean
nothing, and with n adapters whose factors are independent they are √(n - 1) times as
large as S (`cross_terms`). What works adds the products:

    "linear"         the factors added all the same: rank r, wrong by the cross terms
    "concatenation"  [B_1 … B_n] [A_1; …; A_n] = S exactly, of rank Σ_i r_i
    "svd"            of all matrices of rank r the nearest to S (Eckart and Young)
    "ties"           only large entries, and of each only the values of one sign
    "dare"           only random entries, enlarged so that their expectation is S

The last three end in a singular value decomposition that is cut to rank r. "svd" forms
no d_out x d_in matrix: with B = Q_B R_B and Aᵀ = Q_A R_A, that of the small R_B R_Aᵀ
gives that of B A. Entries have to exist to be dropped: "ties" and "dare" form every
ΔW_i of a module, 8 bytes a value, one module at a time.

No model is needed. Files are read as those of strangers, and what is written is a plain
LoRA for `pfs.load` and PEFT. A module that a file lacks counts as zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..common.check import about, is_finite, is_whole, shortened
from ..core.matrices import relative_error, svd_halves
from ..core.targets import exact_regex
from ..methods.lora_config import LoRAConfig, per_module
from . import formats
from .adapter_file import WEIGHTS, AdapterFile
from .base_notes import BASE_BITS, NOTES, VOCAB_SIZE
from .formats import LORA

TRIMS = ("ties", "dare")  # take a density
CUTS = ("svd", *TRIMS)  # take a rank
WAYS = ("linear", "concatenation", *CUTS)
LARGEST_WEIGHT = 1e30  # of an adapter: its products stay in float32


@dataclass(frozen=True)
class LowRank:
    """The update of one module's weight, ΔW = scale · B A, in float64."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    scale: float = 1.0

    def delta(self) -> Tensor:
        return self.scale * (self.B @ self.A)  # (d_out, d_in)

    def weighted(self, w: float) -> "LowRank":
        """w ΔW with scale 1: √|w s| on either side, and the sign of w on A."""
        root = math.sqrt(abs(w * self.scale))
        return LowRank(math.copysign(root, w) * self.A, root * self.B)


@dataclass(frozen=True)
class _Lora:
    """A plain LoRA on disk."""

    file: AdapterFile
    updates: dict[str, LowRank]  # by module


@torch.no_grad()
def combine(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    how: str,
    weights: Sequence[float] | None = None,
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Write to `out` one LoRA that stands for the weighted sum of several.

        W ≈ S = Σ_i w_i ΔW_i              computed in float64, written in float32

    Args
        folders  of plain LoRA adapters, ours or PEFT's; ranks and modules may differ
        out      folder of the result; may be one of `folders`
        how      "linear", "concatenation", "svd", "ties", "dare": see combine.py
        weights  w_i for each folder, of either sign; where left out, 1 each
        r        rank of the result, for the last three ways; "svd" stores no more than
                 Σ_i r_i
        density  share of the entries in (0, 1] that "ties" and "dare" keep
        seed     of the entries that "dare" drops
    Returns  {module: ‖W - S‖ / ‖S‖}, Frobenius, of W as written; inf where only S is
             zero. Large for "ties", which takes means and not sums: weights of n
             instead of 1 make up for it where n adapters agree
    Raises   ValueError   an argument out of its range, a file that is broken or is no
             plain LoRA, adapters of different bases; `out` is then as it was
             FileNotFoundError   a folder without one of its two files
    Departs  peft applies the weights of "ties" after the vote on signs, here before it:
             weight 0 is no vote, and -1 a vote for the opposite. [1] trims over the
             whole model; here, as in peft, each module by itself.
    Source   [1] arXiv:2306.01708 (TIES)   [2] arXiv:2311.03099 (DARE)
    """
    _refuse_options(how, r, density, seed)
    adapters, modules = _read_all(folders, weights, how, r)
    generator = torch.Generator().manual_seed(seed)
    results, errors = {}, {}
    for name, parts in modules.items():
        W = _combined(parts, how, r, density, generator)
        results[name] = _rounded(name, W)
        errors[name] = _relative(results[name], stacked(parts))
    _file([each.file for each in adapters], results).write(out)
    return errors


def updates(folder: str | Path) -> dict[str, LowRank]:
    """{module: its update} of an adapter folder, checked as `combine` checks it."""
    return _read(folder).updates


@torch.no_grad()
def cross_terms(
    folders: Sequence[str | Path], weights: Sequence[float] | None = None
) -> dict[str, float]:
    """How wrong it is to add the factors: the error of "linear", but for rounding.

        ‖Σ_{i≠j} B_i A_j‖ / ‖Σ_i B_i A_i‖            with √|w_i s_i| in A_i and in B_i

    Args     those of `combine`
    Returns  {module: ratio}, dimensionless; 1: as large as the sum that was wanted
    Raises   those of `combine`
    """
    modules = _read_all(folders, weights, "linear", None)[1]
    return {n: _relative(added(parts), stacked(parts)) for n, parts in modules.items()}


def added(parts: Sequence[LowRank]) -> LowRank:
    """B = Σ_i B_i and A = Σ_i A_i, for updates of scale 1: S and the cross terms."""
    return LowRank(sum(part.A for part in parts), sum(part.B for part in parts))


def stacked(parts: Sequence[LowRank]) -> LowRank:
    """[B_1 … B_n] [A_1; …; A_n] = Σ_i B_i A_i, for updates of scale 1."""
    B = torch.cat([part.B for part in parts], dim=1)
    return LowRank(torch.cat([part.A for part in parts]), B)


def nearest(update: LowRank, r: int) -> LowRank:
    """The nearest matrix of rank r to B A, from the factors."""
    Q_B, R_B = torch.linalg.qr(update.B)
    Q_A, R_A = torch.linalg.qr(update.A.T)
    A, B = svd_halves(R_B @ R_A.T, r)
    return LowRank(A @ Q_A.T, Q_B @ B)


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect signs, take the mean of those that agree. arXiv:2306.01708, 3.2.

    trim   of each ΔW_i the density · d_out d_in largest entries, the others to 0
    elect  γ = sgn(Σ_i ΔW_i)
    merge  the mean of those ΔW_i that are not 0 and have the sign γ; 0 without any
    """
    trimmed = torch.stack([_trimmed(delta, density) for delta in deltas])
    gamma = trimmed.sum(0).sign()  # (d_out, d_in)
    agree = (trimmed.sign() == gamma) & (trimmed != 0)  # (n, d_out, d_in)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop entries with probability p = 1 - density, enlarge the others by 1 / (1 - p).

    The expectation is ΔW.                                 arXiv:2311.03099, section 3.2
    """
    share = torch.full(delta.shape, density)  # float32: the draws that peft would make
    return delta * torch.bernoulli(share, generator=generator) / density


def _combined(parts, how, r, density, generator) -> LowRank:
    match how:
        case "linear":
            return added(parts)
        case "concatenation":
            return stacked(parts)
        case "svd":
            return nearest(stacked(parts), r)
        case "ties":
            W = ties([part.delta() for part in parts], density)
            return LowRank(*svd_halves(W, r))
        case "dare":
            W = sum(dare(part.delta(), density, generator) for part in parts)
            return LowRank(*svd_halves(W, r))


def _trimmed(delta, density) -> Tensor:
    kept = max(1, int(density * delta.numel()))
    chosen = delta.abs().flatten().topk(kept).indices
    mask = torch.zeros_like(delta).flatten().index_fill(0, chosen, 1)
    return delta * mask.view_as(delta)


def _rounded(name, W) -> LowRank:
    """As float32 holds it."""
    rounded = LowRank(W.A.float().double(), W.B.float().double())
    if not (rounded.A.isfinite().all() and rounded.B.isfinite().all()):
        raise ValueError(f"{name}: the result is beyond float32; take smaller weights")
    return rounded


def _norm(update: LowRank) -> float:
    """‖B A‖ = ‖R_B R_Aᵀ‖, which takes no d_out x d_in matrix."""
    R_B, R_A = (torch.linalg.qr(X, mode="r").R for X in (update.B, update.A.T))
    return (R_B @ R_A.T).norm().item()


def _relative(result: LowRank, exact: LowRank) -> float:
    """‖W - S‖ / ‖S‖ of a result W and the exact sum S."""
    return relative_error(_norm(stacked([result, exact.weighted(-1)])), _norm(exact))


def _refuse_options(how, r, density, seed) -> None:
    if how not in WAYS:
        raise ValueError(f"how={shortened(how)}: allowed are {', '.join(WAYS)}")
    share = is_finite(density) and 0 < density <= 1
    for name, value, ways, good, allowed in (
        ("r", r, CUTS, is_whole(r, 1), "a whole number of at least 1"),
        ("density", density, TRIMS, share, "a share in (0, 1]"),
        ("seed", seed, WAYS, is_whole(seed, 0, 2**63 - 1), "a whole number < 2**63"),
    ):
        if how in ways and not good:
            raise ValueError(f"{name}={shortened(value)}: {how=} needs {allowed}")
        if how not in ways and value is not None:
            raise ValueError(
                f"{name}={shortened(value)}: {how=} has none; leave it out"
            )


def _read_all(folders, weights, how, r) -> tuple[list[_Lora], dict[str, list[LowRank]]]:
    """(the adapters, {module: the weighted updates of those that have it})."""
    if isinstance(folders, str | Path) or not folders:
        raise ValueError(
            f"folders={shortened(folders)}: give a list of adapter folders"
        )
    weights = [1.0] * len(folders) if weights is None else list(weights)
    if len(weights) != len(folders):
        raise ValueError(
            f"weights={shortened(weights)} are not {len(folders)}, one a folder"
        )
    if not all(is_finite(w) and abs(w) < LARGEST_WEIGHT for w in weights):
        raise ValueError(
            f"weights={shortened(weights)}: allowed are numbers within "
            f"±{LARGEST_WEIGHT:.0e}"
        )
    adapters = [_read(folder) for folder in folders]
    _refuse_other_bases(adapters)
    modules = {n: [] for n in sorted(set().union(*(a.updates for a in adapters)))}
    for adapter, w in zip(adapters, weights, strict=True):
        for name, update in adapter.updates.items():
            modules[name].append(update.weighted(w))
    for name, parts in sorted(modules.items(), key=lambda item: _bound(item[1])):
        _refuse_ranks(name, parts, how, r)
    return adapters, modules


def _refuse_other_bases(adapters: Sequence[_Lora]) -> None:
    """ValueError where a weight's shape or a note of the base differs between two."""
    first = {}  # what -> (fact, folder)
    for adapter in adapters:
        facts = {n: (len(u.B), u.A.shape[1]) for n, u in adapter.updates.items()}
        notes, folder = adapter.file.notes, adapter.file.folder
        for note, what in (
            (VOCAB_SIZE, "the vocabulary"),
            (BASE_BITS, "the bits of the base"),
        ):
            facts |= {what: notes[note]} if note in notes else {}
        for what, fact in facts.items():
            before, place = first.setdefault(what, (fact, folder))
            if before != fact:
                raise ValueError(
                    f"{what} is of {shortened(before)} in {place} and of "
                    f"{shortened(fact)} in {folder}: adapters of different base models "
                    "have no sum"
                )


def _bound(parts) -> int:
    """The largest rank that a module's weight can have."""
    return min(len(parts[0].B), parts[0].A.shape[1])


def _refuse_ranks(name, parts, how, r) -> None:
    ranks, bound = [len(part.A) for part in parts], _bound(parts)
    if how == "linear" and len(set(ranks)) > 1:
        raise ValueError(
            f"{name} has the ranks {ranks}, and {how=} needs equal ones: take "
            "'concatenation' or 'svd'"
        )
    if how in CUTS and r > bound:
        raise ValueError(
            f"r={shortened(r)}: {name} allows a rank of at most {bound}, the smaller "
            "side of its weight"
        )


def _read(folder: str | Path) -> _Lora:
    """The updates of a folder that holds a plain LoRA."""
    file = AdapterFile.read(folder)
    config, names = _config_of(file), file.modules
    ends = LORA.tensors.values()
    file.refuse_other_keys([LORA.key(name, end) for name in names for end in ends])
    with about(str(file.folder)):
        configs = per_module(config, {name: _sizes(file, name) for name in names})
    return _Lora(file, {name: _update(file, name, configs[name]) for name in names})


def _config_of(file: AdapterFile) -> LoRAConfig:
    """The options of a plain LoRA; ValueError for a file of another method."""
    if file.format is not LORA:
        raise ValueError(
            f"{file.folder}: peft_type={file.format.peft_type!r} with "
            f"use_dora={shortened(file.config.get('use_dora', False))}: only plain "
            "LoRA is a sum of products; merge the others into a model"
        )
    with about(str(file.folder)):
        config = LoRAConfig(**file.arguments())
    if config.bias != "none":
        raise ValueError(
            f"{file.folder}: bias={shortened(config.bias)}: trained biases cannot be "
            "combined, only adapters with bias='none'"
        )
    if not file.modules:
        raise ValueError(
            f"{file.folder / WEIGHTS} holds no A and no B: there is nothing to combine"
        )
    return config


def _sizes(file: AdapterFile, name: str) -> tuple[int, int]:
    """(d_out, d_in) of the weight that one module's A and B were made for."""
    A, B = (file.tensors[LORA.key(name, end)] for end in LORA.tensors.values())
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(f"{name}: A has {A.dim()} and B {B.dim()} dimensions, not 2")
    return B.shape[0], A.shape[1]


def _update(file: AdapterFile, name: str, config: LoRAConfig) -> LowRank:
    """One module's update; ValueError where A and B are not of the config's rank."""
    r, (d_out, d_in) = config.r, _sizes(file, name)
    key_A, key_B = (LORA.key(name, end) for end in LORA.tensors.values())
    fitting = {
        key_A: torch.empty(r, d_in, device="meta"),
        key_B: torch.empty(d_out, r, device="meta"),
    }
    file.refuse_other_shapes(fitting, "the config needs")
    scale = config.alpha / (math.sqrt(r) if config.rslora else r)
    return LowRank(file.tensors[key_A].double(), file.tensors[key_B].double(), scale)


def _file(files: Sequence[AdapterFile], results: dict[str, LowRank]) -> AdapterFile:
    """The file of the result, with the notes that one of the files has."""
    tensors = {}
    for name, update in results.items():
        for parameter, end in LORA.tensors.items():
            value = getattr(update, parameter).float().contiguous()
            tensors[LORA.key(name, end)] = value
    notes = {note: f.notes[note] for note in NOTES for f in files if note in f.notes}
    return AdapterFile(_config(files, results), tensors, notes)


def _config(files: Sequence[AdapterFile], results: dict[str, LowRank]) -> dict:
    """PEFT's fields for a scale of 1: alpha = r, by module where r differs."""
    ranks = {exact_regex(name): len(update.A) for name, update in results.items()}
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    base, *different = (file.config.get("base_model_name_or_path") for file in files)
    same = isinstance(base, str) and all(other == base for other in different)
    return formats.general_fields(LORA.peft_type, base if same else None) | {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "fan_in_fan_out": any(f.config.get("fan_in_fan_out") is True for f in files),
        "target_modules": "|".join(map(exact_regex, results)),
    }
