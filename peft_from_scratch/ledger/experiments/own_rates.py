"""L7, L8: alpha and the rank, each with a learning rate of its own.

The task, the steps, the search and the seeds are those of family.py (X1), and LoRA of
rank 8 with alpha 16 is the same set of runs: quarter decades on three seeds, compared
on eight others, the noise of the search in the interval. An earlier search, on one
seed in half decades, let one lucky seed choose an alpha's rate, and could not have seen
a rate that moves by less than a factor of three.

    L7    alpha 2, 8, 16, 64 at rank 8             about 75 runs beside X1's
    L8    rank 1, 8, 64 at alpha 16, each at its   about 75 runs beside X1's
          own rate and at that of rank 8
"""

from collections.abc import Sequence
from statistics import fmean

from ..claim import (
    FAILS,
    HOLDS,
    HOLDS_WHEN,
    SMALL_HOLDS,
    UNDECIDED,
    Claim,
    Measured,
    Rule,
)
from ..rates import at_own, choices, chosen, lowest
from ..runs import Run
from .family import ALPHA, COMPARED, LORA, RANK, SEARCHED, Pool, compared, search

ALPHAS, USUAL = (2, 8, 16, 64), (RANK, 2 * RANK)  # r/4, r, 2r, 8r
RANKS = (1, 64)  # an eighth of X1's rank, and eight times it
EDGES = (0.02, 0.1)  # nats per token
EVERY = range(len(SEARCHED))


# ------------------------------------------------------------------------ L7: alpha


def alpha_configs(scale: str) -> list[dict]:
    """Each alpha's search, and its comparison at the rates that this chose."""
    if scale != "tiny":
        return []
    known = []
    for alpha in ALPHAS:
        own, table = search(LORA, alpha=alpha)
        known += own
        if table is not None:
            known += compared(LORA, choices(table), alpha=alpha)
    return known


def alpha_pools(all_runs: Sequence[Run]) -> dict[int, Pool]:
    return {alpha: Pool(all_runs, alpha=alpha) for alpha in ALPHAS}


def alpha_measured(all_runs: Sequence[Run]) -> Measured:
    """Test loss of the worse usual alpha over the best's; the search says which."""
    pool = alpha_pools(all_runs)

    def order(drawn):
        return lambda alpha: lowest(pool[alpha].table, drawn)

    def sides(drawn):
        usual = max(USUAL, key=order(drawn))
        best = min(ALPHAS, key=order(drawn))
        return pool[usual].own(drawn), pool[best].own(drawn)

    excess = at_own(sides, len(SEARCHED))
    figures = {
        "best": f"{min(ALPHAS, key=order(EVERY)):g}",
        "usual": f"{max(USUAL, key=order(EVERY)):g}",
        "excess": f"{excess[0]:+.3f}",
        "rates": ", ".join(f"{a}: {chosen(pool[a].table):g}" for a in ALPHAS),
        "losses": ", ".join(f"{a}: {_test_loss(pool[a]):.3f}" for a in ALPHAS),
    }
    return Measured(*excess, COMPARED, figures)


def _test_loss(pool: Pool) -> float:
    return fmean(run.result["test_loss"] for run in pool.own(EVERY))


# ------------------------------------------------------------------------- L8: rank


def rank_configs(scale: str) -> list[dict]:
    """Each rank's search; its comparison at its own rates and at those of rank 8."""
    if scale != "tiny":
        return []
    known, tables = [], {}
    for r in (RANK, *RANKS):
        own, tables[r] = search(LORA, r=r)
        known += own
    if None in tables.values():
        return known
    for r in RANKS:
        known += compared(LORA, choices(tables[r]) | choices(tables[RANK]), r=r)
    return known


def rank_pools(all_runs: Sequence[Run]) -> dict[int, Pool]:
    return {r: Pool(all_runs, r=r, alpha=ALPHA) for r in (RANK, *RANKS)}


def transfer_costs(all_runs: Sequence[Run]) -> dict[int, tuple[float, float, float]]:
    """{rank: test loss at the rate of rank 8 minus that at its own}."""
    pool = rank_pools(all_runs)

    def sides_of(r):
        return lambda drawn: (
            pool[r].at(chosen(pool[RANK].table, drawn)),
            pool[r].own(drawn),
        )

    return {r: at_own(sides_of(r), len(SEARCHED)) for r in RANKS}


def rank_measured(all_runs: Sequence[Run]) -> Measured:
    """The larger of the costs, by its mean and by each end of its interval."""
    costs, pool = transfer_costs(all_runs), rank_pools(all_runs)
    worst = max(costs, key=lambda r: costs[r][0])
    figures = {
        "worst": str(worst),
        "cost": f"{costs[worst][0]:+.3f}",
        "costs": ", ".join(f"rank {r}: {c[0]:+.3f}" for r, c in costs.items()),
        "rates": ", ".join(f"{r}: {chosen(p.table):g}" for r, p in pool.items()),
    }
    return Measured(*(max(c[i] for c in costs.values()) for i in range(3)), COMPARED,
                    figures)  # fmt: skip


ALPHA_INSTEAD = (
    "At rank 8 the best alpha is {best}; alpha {usual}, the worse of the usual two, "
    "costs {excess} nats with learning rates of their own. Best rates by alpha: "
    "{rates}. Test losses at these: {losses}"
)
TRANSFER = (
    "What the learning rate of rank 8 costs against the rank's own, in nats: {costs}. "
    "Best rates by rank: {rates}"
)
CLAIMS = (
    Claim(
        id="L7",
        notebook="05",
        statement="alpha is typically the rank or twice the rank",
        rule=Rule(
            words=(
                "Test loss at alpha = r or alpha = 2r, the worse one, minus that of "
                "the best alpha of r/4, r, 2r, 8r; r = 8, a new language. Rates and "
                "alphas are chosen by three seeds in quarter decades, the same search "
                "for all; the loss is that of eight other seeds, paired over seeds "
                "and test rows, and the interval has the noise of the search"
            ),
            unit="nats per token",
            verdicts=SMALL_HOLDS,
            edges=EDGES,
        ),
        configs=alpha_configs,
        measured=alpha_measured,
        say_instead=dict.fromkeys((HOLDS_WHEN, FAILS, UNDECIDED), ALPHA_INSTEAD),
        condition="{excess} nats more than at the best alpha, {best}, are no matter",
        number="loss of the usual alphas above that of the best",
        so={
            HOLDS: (
                "Keep alpha at the rank or twice the rank, and search the learning "
                "rate: no other alpha was better by much."
            ),
            FAILS: (
                "The usual alphas are not the best here: alpha {best} ended lower "
                "with its own learning rate. Search alpha, too."
            ),
            UNDECIDED: (
                "Search the learning rate for the alpha that you use. These runs "
                "cannot tell the usual alphas from the best one."
            ),
        },
    ),
    Claim(
        id="L8",
        notebook="05",
        statement="Thanks to alpha / r, hyperparameters transfer across ranks",
        rule=Rule(
            words=(
                "What a learning rate searched at rank 8 costs at ranks 1 and 64, "
                "where it costs more: test loss at that rate minus that at the rank's "
                "own; alpha = 16, a new language. Rates are chosen by three seeds in "
                "quarter decades; the loss is that of eight other seeds, paired over "
                "seeds and test rows, and the interval has the noise of the search"
            ),
            unit="nats per token",
            verdicts=SMALL_HOLDS,
            edges=EDGES,
        ),
        configs=rank_configs,
        measured=rank_measured,
        say_instead=dict.fromkeys((HOLDS_WHEN, FAILS, UNDECIDED), TRANSFER),
        condition="{cost} nats at rank {worst} are no matter",
        number="loss at another rank's learning rate above that at one's own",
        so={
            HOLDS: (
                "From rank 1 to 64 at one alpha, the learning rate of rank 8 was "
                "nearly as good as the rank's own."
            ),
            FAILS: (
                "Search the learning rate again when you change the rank: that of "
                "rank 8 was wrong at rank {worst}."
            ),
            UNDECIDED: (
                "Search the learning rate again when you change the rank: these runs "
                "cannot rule out that the old one costs much."
            ),
        },
    ),
)
