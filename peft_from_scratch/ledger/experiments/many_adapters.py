"""M3: one base answers for many adapters at once. What the choice of adapters costs.

Sixteen rows of one decoding step, with m different LoRA adapters among them:

    gather m   all rows in one pass, each with its own A and B (serving/batch.py)
    loop m     m passes, one for each adapter, over the rows that have it
    base       all rows in one pass, without an adapter
    again      a copy of the base: the control, whose true ratio is one

Before a clock runs, the gathered logits are compared with those of each row alone, on a
model with that row's LoRA injected. With its neighbor's adapter a row must answer
differently: else equality would show nothing. The candidates take turns, in an order
that is shuffled in each round. With one adapter, gather and loop are the same pass.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from random import Random
from statistics import median

import torch
from torch import Tensor, nn

from ...common.statistics import of_median
from ...core.adapter import adapters, sizes
from ...core.targets import resolve
from ...methods import lora
from ...models.load import load_model
from ...models.speed import synchronize
from ...serving.batch import Batch, Slots, Version
from .. import runs
from ..claim import LARGE_HOLDS, Claim, Invalid, Measured, Rule
from ..runs import Run

SEEDS = (0, 1, 2)  # the whole measurement, again
ROWS, COUNTS = 16, (1, 2, 4, 8, 16)  # adapters among the rows
RANK, SIZE = 8, 0.1  # standard deviation of A and B
ROUNDS, STEPS, PROMPT = 7, 8, 32  # decoding steps in a turn; tokens behind each row
CLOSE, FAR = 1e-4, 1e-2  # of the logits' norm: equal; told apart
STEADY = 1.1  # the largest ratio of the base to its copy
BASE, AGAIN = "base", "again"


def config(base: str, seed: int) -> dict:
    return {
        "experiment": "many_adapters",
        "base": base,
        "base_digest": runs.base_digest(base),
        "rows": ROWS,
        "adapters": list(COUNTS),
        "r": RANK,
        "size": SIZE,
        "rounds": ROUNDS,
        "steps": STEPS,
        "prompt": PROMPT,
        "seed": seed,
    }


def configs(scale: str) -> list[dict]:
    return [config(scale, seed) for seed in SEEDS]


def compute(config: dict) -> dict:
    """Milliseconds of a decoding step, for each candidate and round.

    Returns  {"ms": {"base": […], "again": […], "gather 1": […], "loop 2": […], …},
              "apart": distance of the mixed batch from its rows one by one, the largest
              of the rows; "swapped": from the same with the neighbors' adapters, the
              smallest; both in units of the logits' norm}
    """
    torch.manual_seed(config["seed"])
    model, _ = load_model(config["base"], device=config.get("device", "cpu"))
    plain, again = deepcopy(model).eval(), deepcopy(model).eval()
    slots = Slots(model.eval())
    shape = config["rows"], config["prompt"] + 1
    ids = torch.randint(3, model.config.vocab_size, shape, device=model.device)
    versions = [random_lora(plain, config) for _ in range(max(config["adapters"]))]
    steps = {
        BASE: step_of(plain, ids, {None: range(len(ids))}),
        AGAIN: step_of(again, ids, {None: range(len(ids))}),
    }
    for count in config["adapters"]:
        of_rows = [versions[row % count] for row in range(len(ids))]
        steps[f"gather {count}"] = gathered(slots, ids, of_rows)
        if count > 1:
            steps[f"loop {count}"] = looped(slots, ids, of_rows)
    apart, swapped = distances(plain, slots, ids, versions)
    seconds = in_turn(
        steps,
        rounds=config["rounds"],
        repeat=config["steps"],
        ready=lambda: synchronize(model.device),
    )
    return {
        "ms": {
            name: [round(1e3 * s, 4) for s in each] for name, each in seconds.items()
        },
        "apart": apart,
        "swapped": swapped,
    }


def random_lora(model: nn.Module, config: Mapping) -> Version:
    """A LoRA at every projection of the model, with random A and B."""
    layers, like = {}, next(model.parameters())
    for name, module in resolve(model, "all-linear").items():
        d_out, d_in = sizes(module)
        A = torch.randn(config["r"], d_in) * config["size"]
        B = torch.randn(d_out, config["r"]) * config["size"]
        layers[name] = A.to(like), B.to(like)
    return Version("random", "", layers)


def gathered(slots: Slots, ids: Tensor, of_rows: Sequence[Version]) -> Callable:
    """A step of all rows in one pass; row i has the adapter of_rows[i]."""
    return step_of(slots.model, ids, {Batch(of_rows): range(len(ids))}, slots)


def looped(slots: Slots, ids: Tensor, of_rows: Sequence[Version]) -> Callable:
    """A step in as many passes as there are adapters, each over its own rows."""
    groups = {}
    for row, version in enumerate(of_rows):
        groups.setdefault(version, []).append(row)
    passes = {Batch([version] * len(rows)): rows for version, rows in groups.items()}
    return step_of(slots.model, ids, passes, slots)


@torch.no_grad()
def step_of(
    model: nn.Module,
    ids: Tensor,
    passes: Mapping[Batch | None, Sequence[int]],
    slots: Slots | None = None,
) -> Callable[[], Tensor]:
    """A function that decodes one token of each row: the last one of ids.

    Args
        ids     (rows, tokens); all but the last token are in the cache before
        passes  {the adapters of a pass: its rows}
    Returns  a function () -> logits (rows, vocabulary), which may be called again
    """
    ready = []
    for batch, rows in passes.items():
        own = ids[list(rows)]
        with _using(slots, batch):
            cache = model(input_ids=own[:, :-1], use_cache=True).past_key_values
        ready.append((batch, own[:, -1:], cache))
    order = torch.tensor([row for rows in passes.values() for row in rows]).argsort()

    @torch.no_grad()
    def step() -> Tensor:
        logits = []
        for batch, last, cache in ready:
            with _using(slots, batch):
                out = model(input_ids=last, past_key_values=cache, use_cache=True)
            cache.crop(-1)
            logits.append(out.logits[:, -1])
        return torch.cat(logits)[order]

    return step


def _using(slots: Slots | None, batch: Batch | None):
    """The model's rows have these adapters inside; without slots, it has none."""
    return torch.no_grad() if slots is None else slots.using(batch)


def distances(
    plain: nn.Module, slots: Slots, ids: Tensor, versions: Sequence[Version]
) -> tuple[float, float]:
    """How far a mixed batch is from its rows one by one; see compute."""
    of_rows = [versions[row % len(versions)] for row in range(len(ids))]
    expected = torch.cat(
        [alone(plain, row, v) for row, v in zip(ids, of_rows, strict=True)]
    )
    neighbors = [*of_rows[1:], of_rows[0]]
    mixed, swapped = (gathered(slots, ids, each)() for each in (of_rows, neighbors))
    norm = expected.norm(dim=1)
    return (
        float(((mixed - expected).norm(dim=1) / norm).max()),
        float(((swapped - expected).norm(dim=1) / norm).min()),
    )


@torch.no_grad()
def alone(plain: nn.Module, row: Tensor, version: Version) -> Tensor:
    """The last logits (1, vocabulary) of a row, with its LoRA injected in a copy."""
    model = deepcopy(plain)
    rank = version.rank
    lora.inject(model, r=rank, alpha=rank, targets=list(version.layers))
    for name, module in adapters(model).items():
        for parameter, value in zip(
            (module.A, module.B), version.layers[name], strict=True
        ):
            parameter.copy_(value)
    return model.eval()(input_ids=row[None]).logits[:, -1]


def in_turn(
    calls: Mapping[str, Callable],
    *,
    rounds: int,
    repeat: int = 1,
    ready: Callable = lambda: None,
) -> dict[str, list[float]]:
    """{name: seconds of a call, in each round}; in a round each has its turn.

    The order is shuffled in each round, and is the same whenever this is called.

    Args
        rounds  counted ones, after one that warms up
        repeat  calls in a turn, of which the mean counts
        ready   waits for what a device still has to do
    """
    seconds, dice = {name: [] for name in calls}, Random(0)
    for _ in range(rounds + 1):
        for name in dice.sample(list(calls), len(calls)):
            ready()
            start = time.perf_counter()
            for _ in range(repeat):
                calls[name]()
            ready()
            seconds[name].append((time.perf_counter() - start) / repeat)
    return {name: times[1:] for name, times in seconds.items()}


def ratio(all_runs: Sequence[Run], name: str, other: str) -> tuple[float, float, float]:
    """Time of one candidate in units of another's, in the same round: the median."""
    return of_median(
        [
            mine / theirs
            for run in all_runs
            for mine, theirs in zip(
                run.result["ms"][name], run.result["ms"][other], strict=True
            )
        ]
    )


def throughput(all_runs: Sequence[Run], way: str) -> list[tuple[float, ...]]:
    """[(adapters, throughput in % of that with one, low, high), …] of gather or loop.

    Args
        way  "gather" or "loop"
    """
    points = []
    for count in COUNTS:
        name = f"{way if count > 1 else 'gather'} {count}"
        shares = (100 * each for each in ratio(all_runs, "gather 1", name))
        points.append((count, *shares))
    return points


def relative(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, tuple]:
    """{name: (ratio, low, high)} of the others' times to this one's, round by round."""
    return {
        name: of_median([a / b for a, b in zip(own, seconds[to], strict=True)])
        for name, own in seconds.items()
        if name != to
    }


def measured(all_runs: Sequence[Run]) -> Measured:
    """Throughput with the most adapters, in % of that with one adapter for all rows."""
    apart = max(run.result["apart"] for run in all_runs)
    swapped = min(run.result["swapped"] for run in all_runs)
    if apart > CLOSE:
        raise Invalid(
            f"a mixed batch is {apart:.2g} away from its rows one by one, of the "
            f"logits' norm; {CLOSE:g} is allowed"
        )
    if swapped < FAR:
        raise Invalid(
            f"with its neighbor's adapter a row's logits move by {swapped:.2g} only: "
            "that the batch equals its rows then shows nothing"
        )
    steady, _, _ = ratio(all_runs, AGAIN, BASE)
    if not 1 / STEADY <= steady <= STEADY:
        raise Invalid(f"the base takes {steady:.2f} times the time of its own copy")
    most = max(COUNTS)
    value, low, high = (
        100 * each for each in ratio(all_runs, "gather 1", f"gather {most}")
    )
    figures = {
        "kept": f"{value:.0f}",
        "loop": f"{100 * ratio(all_runs, 'gather 1', f'loop {most}')[0]:.0f}",
        "over_base": f"{ratio(all_runs, f'gather {most}', BASE)[0]:.2f}",
        "one": f"{ratio(all_runs, 'gather 1', BASE)[0]:.2f}",
        "again": f"{steady:.2f}",
        "ms": f"{median(ms for run in all_runs for ms in run.result['ms'][BASE]):.1f}",
    }
    return Measured(value, low, high, SEEDS, figures)


INSTEAD = (
    "One gathered pass over sixteen rows with sixteen adapters keeps {kept} % of the "
    "throughput of one adapter for all rows; a loop over the adapters keeps {loop} %. "
    "A step takes {over_base} times the base's time with sixteen adapters, and {one} "
    "times with one; the base's copy takes {again} times"
)
CLAIMS = (
    Claim(
        id="M3",
        notebook="13",
        statement=(
            "Many LoRA adapters can be served at the same time on one shared base, "
            "with another adapter for each request"
        ),
        rule=Rule(
            words=(
                "Throughput of a decoding step of sixteen rows that have sixteen "
                "different LoRA adapters, in one gathered batch, as a share of the "
                "throughput with one adapter for all rows; median of the rounds; void "
                "unless every row's logits are those of the row alone with its adapter"
            ),
            unit="%",
            verdicts=LARGE_HOLDS,
            edges=(50.0, 75.0),
        ),
        configs=configs,
        measured=measured,
        number="throughput of sixteen adapters, as a share of that of one",
        condition="a decoding step may take up to twice as long as with one adapter",
        say_instead={
            "holds": INSTEAD,
            "holds when": INSTEAD,
            "does not hold here": INSTEAD,
        },
        so={
            "holds": (
                "One gathered pass serves sixteen adapters at {kept} % of the "
                "throughput of one; a loop over the adapters keeps {loop} %."
            ),
            "holds when": (
                "One gathered pass serves sixteen adapters at {kept} % of the "
                "throughput of one; a loop over the adapters keeps {loop} %."
            ),
            "does not hold here": (
                "Even gathered, sixteen adapters keep only {kept} % of the throughput "
                "of one; a loop over the adapters keeps {loop} %."
            ),
        },
    ),
)
