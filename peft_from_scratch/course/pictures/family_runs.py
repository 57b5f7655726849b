"""The stored runs of LoRA's relatives, as figures with their finding in words.

    lesson.show(*valleys(trial))     validation loss by learning rate, a curve a method
    lesson.show(*leads(trial))       who is ahead of LoRA, at its rate and at the own

The runs are those of ledger/experiments/family.py; tuning_pictures.py draws.
"""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from ...ledger.experiments import family
from ...ledger.rates import chosen
from ...ledger.runs import Run
from . import tuning_pictures

NAMES = {family.LORA: "LoRA", **family.RELATIVES}


def valleys(trial: Sequence[Run]) -> tuple[Figure, str]:
    """Validation loss by learning rate: the search of each method, all its seeds.

    Args
        trial  runs of family.configs
    """
    pools = family.pools(trial)
    curves = {
        name: [
            (lr, fmean(losses), min(losses), max(losses))
            for lr, losses in sorted(pools[method].table.items())
            if max(losses) < float("inf")
        ]
        for method, name in NAMES.items()
    }
    own = {name: chosen(pools[method].table) for method, name in NAMES.items()}
    figure = tuning_pictures.panels(
        {"": curves},
        x=("Learning rate",),
        y=("Validation loss, nats per token",),
        log=("xy",),
        title="rsLoRA and LoRA+ have their valleys at lower learning rates",
        subtitle=(
            f"tiny on {family.TASK}, {family.STEPS} steps. Bars: "
            f"{len(family.SEARCHED)} seeds of the search."
        ),
    )
    lowest = ", ".join(
        f"{name} {lr:g} ({fmean(pools[method].table[lr]):.2f})"
        for (method, name), lr in zip(NAMES.items(), own.values(), strict=True)
    )
    return figure, f"Lowest at learning rate (validation loss): {lowest}."


def leads(trial: Sequence[Run]) -> tuple[Figure, str]:
    """LoRA's test loss minus each relative's, at LoRA's learning rate and at the own.

    Args
        trial  runs of family.configs
    """
    pools = family.pools(trial)
    shared = chosen(pools[family.LORA].table)
    groups = {f"All at {shared:g}": {}, "Each at its own": {}}
    for method, name in family.RELATIVES.items():
        at_one = family.lead_at_loras(pools, method)
        own = family.lead_at_own(pools, method)
        for group, lead in zip(groups.values(), (at_one, own), strict=True):
            if lead:
                group[name] = lead
    figure = tuning_pictures.forest(
        groups,
        x="LoRA's test loss minus the relative's, nats per token",
        sides=("← LoRA is ahead", "the relative is ahead →"),
        title="A shared learning rate decides who looks better",
        subtitle=(
            f"Means of {len(family.COMPARED)} paired seeds that no search saw, with "
            "95 % intervals."
        ),
    )
    phrases = (
        f"{group}: "
        + ", ".join(f"{n} {lead[0]:+.2f}" for n, lead in rows.items())
        + f", spread {family.spread(rows):.2f}"
        for group, rows in groups.items()
    )
    return figure, f"Lead over LoRA, nats per token. {'; '.join(phrases)}."
