"""A step of PagedAdamW, at several budgets, against torch's AdamW.

    python benchmarks/paged_adamw.py [--millions 20] [--rounds 9] [--threads N]

Every candidate updates its own copy of the same float32 parameters, matrices of 1024 x
1024 and a bias for each, with the same gradients. That this is equal work is checked
first: after three steps the paged ones have the bits of torch's plain loop, or if fused
of its fused one, and torch's foreach loop is within rounding. side_by_side.py has the
clocks and the ratios.

    torch, foreach          whole tensors, all parameters at once
    torch, plain            whole tensors, one parameter after the other
    torch, fused            one kernel
    paged, …                the budget, as a share of the bytes of the states
    paged, fused, …         pages of 4 MiB, each a call of torch's fused kernel

Needs about 60 bytes a parameter, files included.
"""

import sys

import side_by_side
import torch
from torch import nn

from peft_from_scratch import PagedAdamW
from peft_from_scratch.common.provenance import provenance

SEED, SIDE = 0, 1024
FIRST, EXACT, FUSED = "torch, foreach", "torch, plain", "torch, fused"
KINDS = {"paged": {}, "paged, fused": dict(fused=True, page_bytes=1 << 22)}
SHARES = {"all": 1.0, "a half": 0.5, "a quarter": 0.25, "a twentieth": 0.05}
# At most, of the time of foreach, and of torch's fused loop.
TARGETS = {
    FIRST: {"paged, all": 1.1, "paged, a quarter": 2.0},
    FUSED: {"paged, fused, all": 1.3, "paged, fused, a quarter": 3.0},
}
CLOSE = 1e-5  # relative norm of a weight: rounding in float32
CHECKED = 3  # steps before the clocks run


def parameters(millions: int) -> list[nn.Parameter]:
    """The same ones at every call."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = [shape for _ in range(millions) for shape in ((SIDE, SIDE), (SIDE,))]
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def optimizers(millions: int) -> dict[str, torch.optim.Optimizer]:
    """Each on parameters of its own; the gradients are the same tensors."""
    gradients = [torch.randn_like(p) * 1e-2 for p in parameters(millions)]

    def fed() -> list[nn.Parameter]:
        own = parameters(millions)
        for p, gradient in zip(own, gradients, strict=True):
            p.grad = gradient
        return own

    made = {
        FIRST: torch.optim.AdamW(fed(), foreach=True),
        EXACT: torch.optim.AdamW(fed(), foreach=False),
        FUSED: torch.optim.AdamW(fed(), fused=True),
    }
    for kind, options in KINDS.items():
        for share, part in SHARES.items():
            paged = PagedAdamW(fed(), budget_bytes=1 << 40, **options)
            budget = max(int(part * paged.states_bytes), paged.page_bytes)
            paged.budget_bytes = budget if part < 1 else 1 << 40
            made[f"{kind}, {share}"] = paged
    return made


def weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.detach() for p in optimizer.param_groups[0]["params"]]


def check_equal_work(made: dict[str, torch.optim.Optimizer]) -> float:
    """RuntimeError unless the candidates have computed the same weights.

    Returns  how far foreach's are from the plain loop's: the largest relative norm
    """
    for optimizer in made.values():
        for _ in range(CHECKED):
            optimizer.step()
    for name, optimizer in made.items():
        exact = FUSED if name.startswith("paged, fused") else EXACT
        pairs = list(zip(weights(optimizer), weights(made[exact]), strict=True))
        apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        allowed = 0 if name.startswith("paged") else CLOSE
        if not apart <= allowed:  # a NaN as well
            raise RuntimeError(
                f"{name}: weights differ by {apart:.2g} of their norm from those of "
                f"{exact}, allowed is {allowed}; their times cannot be compared"
            )
        if name == FIRST:
            found = apart
    return found


def measure(millions: int, rounds: int) -> dict:
    """All of the benchmark, as JSON can hold it."""
    load = side_by_side.load()
    torch.manual_seed(SEED)
    made = optimizers(millions)
    apart = check_equal_work(made)
    device = torch.device("cpu")
    steps = {name: optimizer.step for name, optimizer in made.items()}
    times = side_by_side.take_turns(steps, rounds, device)
    return {
        "benchmark": "paged_adamw",
        "parameters": sum(w.numel() for w in weights(made[EXACT])),
        "dtype": "float32",
        "page_bytes": {kind: made[f"{kind}, all"].page_bytes for kind in KINDS},
        "rounds": rounds,
        "load": load,
        "apart": apart,
        "rows": side_by_side.table(times, FIRST),
        "over_fused": side_by_side.table(_fused(times), FUSED),
        "provenance": provenance(seed=SEED, device=device),
    }


def _fused(times: side_by_side.Times) -> side_by_side.Times:
    """The times of those whose rival is torch's fused loop."""
    return {name: laps for name, laps in times.items() if "fused" in name}


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    made = result["provenance"]
    tables = {FIRST: result["rows"], FUSED: result["over_fused"]}
    ratios = {t: {row["name"]: row["ratio"] for row in tables[t]} for t in tables}
    return "\n".join(
        [
            f"{result['parameters']} parameters in float32, pages of "
            f"{', '.join(map(str, result['page_bytes'].values()))} bytes, "
            f"{made['threads']} threads, "
            f"{made['device']}, {made['machine']}",
            f"load average before the run: {result['load']}",
            "equal work: paged and torch have the same bits; foreach differs by "
            f"{result['apart']:.1g} of the norm",
            *side_by_side.lines(result["rows"], result["rounds"]),
            "",
            *side_by_side.lines(result["over_fused"], result["rounds"]),
            *(
                f"{name}, {side_by_side.verdict(ratios[rival][name], target)}"
                for rival, targets in TARGETS.items()
                for name, target in targets.items()
            ),
        ]
    )


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--millions", type=int, default=20, help="of parameters")
    asked = side_by_side.parsed(parser, arguments)
    if asked.millions < 1:
        parser.error("--millions: at least 1")
    result = measure(asked.millions, asked.rounds)
    print(
        report(result),
        side_by_side.write(result, asked.record, out=asked.out),
        sep="\n",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
