"""Y2: whether keys and values that were cached under one adapter can serve another.

A prompt is read under adapter A, and its keys and values are kept. Adapter B then goes
on from them. Counted are the places of the answer at which B now prefers another token
than with keys and values of its own; the tokens before each place are the same.

    cached     n tokens of the prompt, read under A
    under B    the rest of the prompt, and the answer

Three adapters and the base fill the cache: one for another task, a twin (the same task,
other training rows and another start), the base alone, and B itself, which is the
control: then nothing may change. How much the answer changes where A reads everything
shows whether the two adapters differ at all.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import ceil
from statistics import fmean

import torch
from torch import Tensor, nn

from ...common.statistics import nested_bootstrap, over_seeds
from ...models.load import load_model
from ...tasks.task import load_task
from ...tasks.templates import IGNORED, encode_rows
from .. import runs
from ..claim import FAILS, HOLDS, Claim, Invalid, Measured, Rule
from ..runs import Run
from . import finetune

SEEDS = {"tiny": (0, 1, 2, 3, 4), "smollm2": (0, 1, 2)}
TASKS = {"tiny": ("gap-1", "gap-2"), "smollm2": ("kinds", "orders")}  # A's, B's
RECIPE = {
    "tiny": dict(r=8, alpha=16, lr=1e-2, n=1000, steps=100, batch=16),
    "smollm2": dict(r=8, alpha=16, lr=3e-3, n=600, steps=50, batch=8),
}
ROWS, SHARES = 200, (25, 50, 75, 100)  # test rows; % of the prompt that is cached
TWIN = 1000  # added to the seed of B's twin
CLOSE = 1e-4  # of the logits' norm: B with a cache of its own
APART = 10.0  # % of the tokens that must change where A reads everything
OTHER, SAME, ALONE, OWN = "other task", "same task", "base", "own"


def config(base: str, seed: int) -> dict:
    other, task = TASKS[base]
    return {
        "experiment": "wrong_cache",
        "base": base,
        "base_digest": runs.base_digest(base),
        "cached_task": other,
        "task": task,
        **RECIPE[base],
        "shares": list(SHARES),
        "test": ROWS,
        "seed": seed,
    }


def configs(scale: str) -> list[dict]:
    return [config(scale, seed) for seed in SEEDS[scale]]


def compute(config: dict) -> dict:
    """Tokens that change, of each test row.

    Returns  {"tokens": [of each row's answer],
              "changed": {who filled the cache: {share: [of each row]}},
              "error": {who: {share: of the logits' norm, the mean of the rows}},
              "whole": {who: [of each row, where it reads everything]},
              "loss": nats per label token of B on the test rows}
    """
    b, tokenizer, result = trained(config, config["task"], config["seed"])
    fillers = {
        OTHER: trained(config, config["cached_task"], config["seed"])[0],
        SAME: trained(config, config["task"], config["seed"] + TWIN)[0],
        ALONE: load_model(config["base"], device=config.get("device", "cpu"))[0],
        OWN: b,
    }
    task = load_task(config["task"])
    rows = list(task.test.select(range(config["test"])))
    template = "raw" if config["base"] == "tiny" else "chat"
    encoded = encode_rows(tokenizer, task.instruction, rows, template=template)
    return counted(b, fillers, encoded, config["shares"]) | {
        "loss": result["test_loss"]
    }


def trained(config: Mapping, task: str, seed: int) -> tuple[nn.Module, object, dict]:
    """(model with its LoRA, tokenizer, result), as finetune.fine_tuned."""
    recipe = {
        name: config[name] for name in ("r", "alpha", "lr", "n", "steps", "batch")
    }
    asked = dict(base=config["base"], task=task, method="lora", seed=seed, **recipe)
    chosen = finetune.config(**asked, test=config["test"], validation=5)
    model, tokenizer, result = finetune.fine_tuned(chosen)
    return model.eval(), tokenizer, result


@torch.no_grad()
def counted(
    b: nn.Module, fillers: Mapping[str, nn.Module], encoded, shares: Sequence[int]
) -> dict:
    """The parts of compute's result that count tokens.

    Args
        fillers  {who: the model that fills the cache}
        encoded  rows as encode_rows makes them
    """
    tokens = []
    changed = {who: {str(s): [] for s in shares} for who in fillers}
    error = {who: {str(s): [] for s in shares} for who in fillers}
    whole = {who: [] for who in fillers}
    for ids, labels in encoded:
        row = torch.tensor([ids], device=b.device)
        prompt = sum(label == IGNORED for label in labels)
        own = b(input_ids=row).logits[0, prompt - 1 : -1]
        tokens.append(len(own))
        for who, filler in fillers.items():
            out = filler(input_ids=row, use_cache=True)
            whole[who].append(_changed(out.logits[0, prompt - 1 : -1], own))
            for share in shares:
                logits = continued(b, out.past_key_values, row, prompt, share)
                changed[who][str(share)].append(_changed(logits, own))
                error[who][str(share)].append(float((logits - own).norm() / own.norm()))
    means = {
        who: {share: round(fmean(rows), 8) for share, rows in by_share.items()}
        for who, by_share in error.items()
    }
    return {"tokens": tokens, "changed": changed, "error": means, "whole": whole}


def continued(b: nn.Module, cache, row: Tensor, prompt: int, share: int) -> Tensor:
    """B's logits at the answer, after a cache that somebody else has filled.

    Args
        cache   keys and values of the whole row
        prompt  its tokens; of these the first `share` % are taken from the cache, but
                never the last one, which B has to read
    Returns  (tokens of the answer, vocabulary)
    """
    kept = min(prompt - 1, ceil(prompt * share / 100))
    cache = deepcopy(cache)
    cache.crop(kept - row.shape[1])
    logits = b(input_ids=row[:, kept:], past_key_values=cache).logits[0]
    return logits[prompt - 1 - kept : -1]


def _changed(logits: Tensor, own: Tensor) -> int:
    return int((logits.argmax(-1) != own.argmax(-1)).sum())


def shares(run: Run, who: str, share: int) -> list[float]:
    """% of the tokens that change, in each row."""
    counts = run.result["changed"][who][str(share)]
    return _per_cent(counts, run.result["tokens"])


def _per_cent(counts: Sequence[int], tokens: Sequence[int]) -> list[float]:
    return [100 * count / of for count, of in zip(counts, tokens, strict=True)]


def changed(
    all_runs: Sequence[Run], who: str, share: int
) -> tuple[float, float, float]:
    """% of the tokens that change: mean and interval over seeds and rows.

    The wider one at each end of two: by t over the seeds, and over rows within them.
    """
    rows = [shares(run, who, share) for run in all_runs]
    mean, *seeds = over_seeds([fmean(each) for each in rows])
    _, *items = nested_bootstrap(rows)
    return mean, min(seeds[0], items[0]), max(seeds[1], items[1])


def by_share(results: Sequence[Mapping], who: str) -> list[tuple[float, ...]]:
    """[(% of the prompt that is cached, % of the tokens that change, low, high), …]

    Of compute's results, one a seed; the interval as that of `changed`, and over rows
    alone where there is one seed.
    """
    points = []
    for share in results[0]["changed"][who]:
        rows = [_per_cent(r["changed"][who][share], r["tokens"]) for r in results]
        mean, *ends = nested_bootstrap(rows)
        if len(rows) > 1:
            _, low, high = over_seeds([fmean(each) for each in rows])
            ends = min(low, ends[0]), max(high, ends[1])
        points.append((int(share), mean, *ends))
    return points


def measured(all_runs: Sequence[Run]) -> Measured:
    """% of the tokens that change with another task's cache of the whole prompt."""
    for run in all_runs:
        off = max(run.result["error"][OWN].values())
        if off > CLOSE or any(map(any, run.result["changed"][OWN].values())):
            raise Invalid(
                f"{run.key}: with its own cache, B's logits move by {off:.2g} of their "
                f"norm; {CLOSE:g} is allowed, and no changed token"
            )
        whole = fmean(_per_cent(run.result["whole"][OTHER], run.result["tokens"]))
        if whole < APART:
            raise Invalid(
                f"{run.key}: A changes {whole:.1f} % of B's tokens where it reads all: "
                "two adapters that answer alike tell nothing about their caches"
            )
    figures = {
        f"{name}_{share}": f"{changed(all_runs, who, share)[0]:.0f}"
        for name, who in (("other", OTHER), ("same", SAME), ("base", ALONE))
        for share in SHARES
    }
    whole = [_per_cent(r.result["whole"][OTHER], r.result["tokens"]) for r in all_runs]
    figures["whole"] = f"{fmean(map(fmean, whole)):.0f}"
    seeds = tuple(run.config["seed"] for run in all_runs)
    return Measured(*changed(all_runs, OTHER, max(SHARES)), seeds, figures)


INSTEAD = (
    "A cache of the whole prompt that was filled under an adapter for another task "
    "changes {other_100} % of an adapter's tokens, and a cache of a quarter of the "
    "prompt {other_25} %. Filled by the base it changes {base_100} %, and by an "
    "adapter for the same task {same_100} %. Under the other adapter altogether, "
    "{whole} % change"
)
CLAIMS = (
    Claim(
        id="Y2",
        notebook="13",
        source="ours: a mistake of serving engines",
        statement=(
            "Keys and values that were cached under one adapter can be used under "
            "another one"
        ),
        rule=Rule(
            words=(
                "Share of the tokens of the reference answers at which an adapter "
                "prefers another token when the keys and values of the prompt, but for "
                "its last token, were cached under an adapter for another task; the "
                "tokens before are the same; void unless a cache of its own changes "
                "nothing, and the other adapter changes a tenth of the tokens"
            ),
            unit="% of the tokens",
            verdicts=(HOLDS, FAILS),
            edges=(1.0,),
        ),
        configs=configs,
        measured=measured,
        number="tokens that change with another adapter's cache",
        say_instead={"holds": INSTEAD, "does not hold here": INSTEAD},
        so={
            "holds": (
                "Another adapter's keys and values change only {other_100} % of the "
                "tokens."
            ),
            "does not hold here": (
                "Another adapter's keys and values change {other_100} % of the tokens: "
                "key every cache by the adapter's content."
            ),
        },
    ),
)
