"""Q5, M4: adapters in bfloat16 beside four bits, and what merging does to them.

    Q5   A and B in bfloat16 round away optimizer steps below 1/512 of a value, and some
         up to 1/256. Their loss against that of float32 ones, each at its searched rate
    M4   the table of the textbook says of QLoRA: overhead none (merged), merging yes.
         There are three merges (methods/qlora.py), and none has everything:

             onto            the trained model          in four bits
             "dequantized"   exactly                    no
             "original"      nearly                     no
             "requantized"   where the update is large  yes

The runs of M4 are the QLoRA runs of four_bit_training.py, each merged in all three.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from ...common.statistics import mean_of
from ..claim import FAILS, HOLDS, SMALL_HOLDS, UNDECIDED, Claim, Measured, Rule
from ..intervals import paired
from ..rates import best_inside
from ..runs import Run, matches
from .four_bit_training import SEEDS, TASKS, config, merged_config, rate, tasks_of

HALF = "qlora-bf16"


# ---------------------------------------------------------------------- M4: merging


def merge_configs(scale: str) -> list[dict]:
    known = []
    for task in TASKS[scale]:
        searched, lr = rate(scale, "qlora", task)
        known += searched
        if lr is not None:
            known += [merged_config(scale, task, lr, seed) for seed in SEEDS[scale]]
    return known


def trained(all_runs: Sequence[Run], task: str) -> list[Run]:
    return [
        r for r in all_runs if matches(r, experiment="four_bit_training", task=task)
    ]


def cost(all_runs: Sequence[Run], onto: str) -> tuple[float, float, float]:
    """Test loss after a merge minus that before it, paired; the mean of the tasks."""
    triples = []
    for task in tasks_of(all_runs):
        before = trained(all_runs, task)
        after = [replace(r, result=r.result | r.result["merges"][onto]) for r in before]
        triples.append(paired(after, before))
    return mean_of(triples)


def merge_measured(all_runs: Sequence[Run]) -> Measured:
    triple = cost(all_runs, "requantized")
    seeds = tuple(sorted({run.config["seed"] for run in all_runs}))
    return Measured(*triple, seeds, _merge_figures(all_runs))


def _merge_figures(all_runs: Sequence[Run]) -> dict[str, str]:
    merged = [r for r in all_runs if matches(r, experiment="four_bit_training")]
    bytes_ = {
        onto: fmean(
            r.result["merges"][onto]["bytes"] / r.result["bytes"] for r in merged
        )
        for onto in ("dequantized", "requantized")
    }
    update = {
        onto: 100 * median(r.result["merges"][onto]["update"] for r in merged)
        for onto in ("original", "requantized")
    }
    costs = {
        onto: f"{round(cost(all_runs, onto)[0], 4) + 0.0:+.4f}"  # -0.0 is 0
        for onto in ("dequantized", "original", "requantized")
    }
    return {
        **costs,
        "grown": f"{bytes_['dequantized']:.1f}",
        "same": f"{bytes_['requantized']:.2f}",
        "of_original": f"{update['original']:.0f}",
        "of_requantized": f"{update['requantized']:.0f}",
    }


# ------------------------------------------------------------------------- Q5: bfloat16


def half_configs(scale: str) -> list[dict]:
    """Searches of both dtypes, then all seeds; of SmolLM2, none: too slow for it."""
    if scale != "tiny":
        return []
    known = merge_configs(scale)
    for task in TASKS[scale]:
        searched, lr = rate(scale, HALF, task)
        known += searched
        if lr is not None:
            known += [config(scale, HALF, task, lr, s) for s in SEEDS[scale][1:]]
    return known


def half(all_runs: Sequence[Run], task: str) -> list[Run]:
    """The bfloat16 runs at the rate that their search chose; Invalid at an end."""
    own = [run for run in all_runs if matches(run, method=HALF, task=task)]
    first = min(run.config["seed"] for run in own)
    losses = {
        run.config["lr"]: run.result["validation_loss"]
        for run in own
        if matches(run, seed=first)
    }
    best = best_inside(losses)
    return [run for run in own if matches(run, lr=best)]


def behind(all_runs: Sequence[Run]) -> tuple[float, float, float]:
    """Test loss of bfloat16 adapters minus that of float32 ones; mean of the tasks."""
    return mean_of(
        [
            paired(half(all_runs, task), trained(all_runs, task))
            for task in tasks_of(all_runs)
        ]
    )


def half_measured(all_runs: Sequence[Run]) -> Measured:
    triple = behind(all_runs)
    rates = [
        f"{task}: {half(all_runs, task)[0].config['lr']:g} and "
        f"{trained(all_runs, task)[0].config['lr']:g}"
        for task in tasks_of(all_runs)
    ]
    figures = _merge_figures(all_runs) | {
        "behind": "{:+.3f} [{:+.3f}, {:+.3f}]".format(*triple),
        "rates": ", ".join(rates),
    }
    seeds = tuple(sorted({run.config["seed"] for run in all_runs}))
    return Measured(*triple, seeds, figures)


MERGES = (
    "Merged onto the dequantized weights the model is the trained one (loss "
    "{dequantized} nats) and has left four bits: {grown} times the bytes in float32, "
    "half of that in 16 bits. Requantized it takes {same} times the bytes; the error "
    "is {of_requantized} % of the update, and the loss {requantized} nats. Onto the "
    "original weights it is {of_original} % of the update, and {original} nats"
)
HALVES = (
    "Adapters in bfloat16 end {behind} nats from those in float32, at the best rates "
    "of each ({rates}). " + MERGES
)
EVERY = (*SMALL_HOLDS, UNDECIDED)
CLAIMS = (
    Claim(
        id="Q5",
        notebook="08",
        statement="QLoRA's adapters are applied in bf16 beside the 4-bit base",
        rule=Rule(
            words=(
                "Test loss of QLoRA with A and B in bfloat16 minus that with float32, "
                "all else in float32, r = 8: mean of three tasks, a new format, new "
                "words, a new language; 100 steps of 16 rows, the rate searched for "
                "each dtype and task with the same budget, paired over seeds and rows"
            ),
            unit="nats per token",
            verdicts=SMALL_HOLDS,
            edges=(0.02, 0.1),
        ),
        configs=half_configs,
        measured=half_measured,
        say_instead=dict.fromkeys(EVERY, HALVES),
        number="loss with bfloat16 adapters above that with float32",
        so={
            "holds": (
                "Adapters may be kept in bfloat16: the loss changes by {behind} nats."
            ),
        },
    ),
    Claim(
        id="M4",
        notebook="08",
        statement=(
            "QLoRA can be merged, and then has no inference overhead (and still its "
            "4-bit base)"
        ),
        rule=Rule(
            words=(
                "Test loss of a QLoRA whose merged weights were rounded to four bits "
                "again, minus its test loss before merging; tiny on three tasks, "
                "SmolLM2 on order sentences; paired over seeds and test rows"
            ),
            unit="nats per token",
            verdicts=(HOLDS, FAILS),
            edges=(0.02,),
        ),
        configs=merge_configs,
        measured=merge_measured,
        say_instead=dict.fromkeys(EVERY, MERGES),
        number="loss after requantizing above that before merging",
        so={
            "does not hold here": (
                "Merge into 16-bit weights, or keep the adapter separate. Rounding the "
                "merged weights to four bits changes the loss by {requantized} nats."
            ),
            "holds": (
                "On this model even rounding the merged weights to four bits changes "
                "the loss by only {requantized} nats."
            ),
        },
    ),
)
