"""L1: how many directions a fine-tuning update has, by its energy and by its function.

    ΔW = W_fine-tuned - W0 = U diag(s) Vᵀ          of every projection in the layers
    energy at rank k = (s1² + … + sk²) / ‖ΔW‖²     what the best matrix of rank k holds
    function at rank k = test loss of W0 + U_k diag(s_k) V_kᵀ      what it is good for

The two need not agree: noise has energy in every direction and does nothing. A random
matrix of the same shape is the control of the first, a random update of the same norm
that of the second.

A lesson that fine-tunes live takes `updates` of two models, then `median_share` of
those, whose interval is over the matrices.
"""

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from ...common.statistics import CONFIDENCE, over_seeds
from ...core.adapter import as_matrix
from ...core.targets import kinds, projections
from ...models.load import load_model
from ...tasks.task import load_task
from ...tasks.templates import encode_rows
from ..claim import SMALL_HOLDS, Claim, Invalid, Measured, Rule
from ..runs import Run
from . import finetune

HELD = 0.9  # of the energy
RANKS = (1, 2, 4, 8, 16, 32, 64)  # whose function is measured, where there are as many
QUANTILES = (0.1, 0.5, 0.9)  # over matrices, of the energy at each rank
SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
SETTINGS = {
    "tiny": dict(task="gap-2", lr=3e-3, n=1000, steps=100, batch=16, test=200),
    # The rate that data/results/tuning.json found for it.
    "smollm2": dict(task="orders", lr=1e-4, n=600, steps=50, batch=8, test=100),
}
CONTROL = {"tiny": "gap-2-random"}  # the same rows with labels that say nothing


def config(scale: str, seed: int, **changes) -> dict:
    chosen = dict(base=scale, method="full", seed=seed, validation=20)
    chosen = finetune.config(**(chosen | SETTINGS[scale] | changes))
    return chosen | {"experiment": "spectrum"}


def compute(config: dict) -> dict:
    """Fine-tune fully, and take the update apart.

    Returns  what finetune.compute returns, and
        ranks       1, 2, 4, … up to the largest smaller side
        energy      {"all", "attention", "mlp", "random"}: for each of QUANTILES the
                    energy at each of `ranks`, over the matrices
        shares      {last part of the name: in each layer, the rank that holds 90 % of
                    the energy, in % of the smaller side}; "random" by shape
        median_share, random_share     medians of those over all matrices
        relative_norm                  median of ‖ΔW‖ / ‖W0‖
        function    test loss by what is added to W0: "nothing", "rank 1", …, "update"
                    (all of the projections' ΔW), "random" (of its norms), and
                    "everything", the fine-tuned model with its embeddings and norms
    """
    model, tokenizer, result = finetune.fine_tuned(config)
    if result["diverged"]:
        return result
    base, _ = load_model(config["base"], device="cpu")
    changed = updates(model, base)
    del model
    losses = _test_losses(base, tokenizer, config)
    result["relative_norm"] = _relative_norm(changed, base)
    result |= _spectra(changed, kinds(base))
    function = {"nothing": losses(), **_function(base, changed, losses)}
    return result | {"function": function | {"everything": result["test_loss"]}}


@torch.no_grad()
def updates(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """{name: ΔW (d_out, d_in)} of every projection inside the decoder layers.

    Args
        model  the base, fully fine-tuned; or with its adapters merged
        base   the same model as it was
    """
    before, after = projections(base), projections(model)
    return {n: as_matrix(after[n]) - as_matrix(before[n]) for n in kinds(base)}


def energy(dW: Tensor) -> Tensor:
    """Share of ‖dW‖² that the best approximation of rank k holds, k = 1, 2, …

        (s1² + … + sk²) / (s1² + s2² + …)          s: singular values

    Returns  (min(d_out, d_in),) float64, rising to 1
    Raises   ValueError  an update that is zero, or not finite, has no spectrum
    """
    squares = torch.linalg.svdvals(dW.double()).square()
    total = squares.sum()
    if not (torch.isfinite(total) and total > 0):
        raise ValueError(f"an update of squared norm {total:g} has no spectrum")
    return squares.cumsum(0) / total


def rank_of_energy(dW: Tensor, wanted: float = HELD) -> int:
    """The smallest rank whose singular values hold this share of ‖dW‖²."""
    return int((energy(dW) < wanted).sum()) + 1


def share(dW: Tensor, wanted: float = HELD) -> float:
    """rank_of_energy in % of the smaller side: comparable between shapes."""
    return 100 * rank_of_energy(dW, wanted) / min(dW.shape)


def truncated(dW: Tensor, k: int) -> Tensor:
    """The best approximation of rank k: its k largest singular values, alone."""
    U, s, Vt = torch.linalg.svd(dW, full_matrices=False)
    return (U[:, :k] * s[:k]) @ Vt[:k]


def random_like(dW: Tensor, seed: int = 0) -> Tensor:
    """A Gaussian matrix of the same shape and norm: the control."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(dW.shape, generator=generator)
    return (noise * (dW.norm().cpu() / noise.norm())).to(dW)


def median_share(changed: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """Median of `share` over the matrices of one run, with a bootstrap interval.

    For a single live run; the claim's interval is over seeds instead.
    """
    shares = np.array([share(dW) for dW in changed.values()])
    drawn = np.random.default_rng(0).choice(shares, size=(2000, len(shares)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return float(np.median(shares)), float(low), float(high)


def _spectra(changed: dict[str, Tensor], kind: dict[str, str]) -> dict:
    energies = {name: energy(dW).numpy() for name, dW in changed.items()}
    # The spectrum of a large random matrix is that of its shape: one of each will do.
    shapes = {tuple(dW.shape): dW for dW in changed.values()}
    random = {shape: energy(random_like(dW)).numpy() for shape, dW in shapes.items()}
    control = [random[tuple(dW.shape)] for dW in changed.values()]
    longest = max(map(len, energies.values()))
    ranks = [2**i for i in range(longest.bit_length()) if 2**i < longest] + [longest]
    groups = {"all": list(energies.values())}
    for wanted in ("attention", "mlp"):
        groups[wanted] = [e for name, e in energies.items() if kind[name] == wanted]
    groups["random"] = control
    shares = _shares(energies) | {
        "random": {f"{m} x {n}": _share_of(e) for (m, n), e in random.items()}
    }
    return {
        "ranks": ranks,
        "energy": {name: _quantiles(group, ranks) for name, group in groups.items()},
        "shares": shares,
        "median_share": median(map(_share_of, energies.values())),
        "random_share": median(map(_share_of, control)),
    }


def _share_of(energy: np.ndarray) -> float:
    """The `share` of a matrix whose energy is known."""
    return round(100 * (int((energy < HELD).sum()) + 1) / len(energy), 3)


def _shares(energies) -> dict[str, list[float]]:
    shares = {}
    for name, values in energies.items():
        shares.setdefault(name.rpartition(".")[2], []).append(_share_of(values))
    return shares


def _quantiles(energies: Sequence[np.ndarray], ranks) -> list[list[float]]:
    """[quantile][rank]; past its own number of singular values a matrix has it all."""
    at = [[e[min(k, len(e)) - 1] for k in ranks] for e in energies]
    return np.quantile(at, QUANTILES, axis=0).round(4).tolist()


@torch.no_grad()
def _function(base, changed: dict[str, Tensor], losses) -> dict[str, float]:
    """Test losses of the base with each cut of the update; the base is restored."""
    modules = projections(base)
    before = {name: as_matrix(modules[name]).clone() for name in changed}
    parts = {n: torch.linalg.svd(dW, full_matrices=False) for n, dW in changed.items()}
    cuts = {f"rank {k}": k for k in RANKS if k < max(len(p[1]) for p in parts.values())}

    def loss_with(update) -> float:
        for name, W0 in before.items():
            as_matrix(modules[name]).copy_(W0 + update(name))
        return losses()

    def cut(k):
        def of(name):
            U, s, Vt = parts[name]
            return (U[:, :k] * s[:k]) @ Vt[:k]

        return of

    loss_by_update = {name: loss_with(cut(k)) for name, k in cuts.items()}
    loss_by_update["update"] = loss_with(changed.__getitem__)
    random = {n: random_like(dW, seed) for seed, (n, dW) in enumerate(changed.items())}
    loss_by_update["random"] = loss_with(random.__getitem__)
    for name, W0 in before.items():
        as_matrix(modules[name]).copy_(W0)
    return loss_by_update


def _test_losses(base, tokenizer, config):
    """A function that measures the base's mean loss on the test rows when called."""
    task = load_task(config["task"])
    rows = encode_rows(
        tokenizer,
        task.instruction,
        finetune.chosen_rows(task, config)["test"],
        template=config["template"],
    )

    def losses() -> float:
        row_losses = finetune.item_losses(base, rows)
        return round(sum(row_losses) / len(row_losses), 6)

    return losses


def _relative_norm(changed, base) -> float:
    before = projections(base)
    ratios = [dW.norm() / as_matrix(before[n]).norm() for n, dW in changed.items()]
    return round(median(ratio.item() for ratio in ratios), 6)


def configs(scale: str) -> list[dict]:
    planned = [config(scale, seed) for seed in SEEDS[scale]]
    if scale in CONTROL:
        planned += [
            config(scale, seed, task=CONTROL[scale]) for seed in SEEDS[scale][:3]
        ]
    return planned


def kept(run: Run, k: int) -> float:
    """% of the update's gain in test loss that its cut to rank k has."""
    loss = run.result["function"]
    gain = loss["nothing"] - loss["update"]
    return 100 * (loss["nothing"] - loss[f"rank {k}"]) / gain


def measured(all_runs: Sequence[Run]) -> Measured:
    """Mean over seeds of the median share; Invalid where the update learned nothing."""
    own = [r for r in all_runs if r.config["task"] not in CONTROL.values()]
    for run in own:
        if run.result["diverged"]:
            raise Invalid(f"{run.key} diverged: {run.result['diverged']}")
        loss = run.result["function"]
        if not loss["update"] < min(loss["nothing"], loss["random"]):
            raise Invalid(f"{run.key} learned no more than a random update: {loss}")
    value, low, high = over_seeds([run.result["median_share"] for run in own])
    seeds = tuple(run.config["seed"] for run in own)
    figures = {
        "share": f"{value:.0f}",
        "random": f"{median(run.result['random_share'] for run in own):.0f}",
        "kept": f"{median(kept(run, 8) for run in own):.0f}",
    }
    return Measured(value, max(low, 0.0), min(high, 100.0), seeds, figures)


INSTEAD = (
    "90 % of the update's energy takes {share} % of a matrix's rank, where a random "
    "matrix takes {random} %; cut to rank 8, the update keeps {kept} % of its gain in "
    "test loss. Say which is meant: the update's spectrum, or what it does"
)
CLAIMS = (
    Claim(
        id="L1",
        notebook="04",
        statement="The weight updates of fine-tuning have a low intrinsic rank",
        rule=Rule(
            words=(
                "Smallest rank whose singular values hold 90 % of the squared norm of "
                "W_fine-tuned - W0, in % of the matrix's smaller side; median over the "
                "projections of all decoder layers after full fine-tuning; mean over "
                "seeds; valid only if the update beats a random one of its norm"
            ),
            unit="%",
            verdicts=SMALL_HOLDS,
            edges=(10.0, 30.0),
        ),
        configs=configs,
        measured=measured,
        say_instead={"holds when": INSTEAD, "does not hold here": INSTEAD},
        number="rank that holds 90 % of the energy, as a share of the full rank",
        condition=(
            '"low" means that few directions do the task, and not that the spectrum '
            "is narrow"
        ),
        so={
            "holds when": (
                "A rank-8 part of the update keeps {kept} % of its gain, although 90 %"
                " of the energy takes {share} % of the rank."
            ),
        },
    ),
)
