"""A step of PagedAdamW, at several budgets, against torch's AdamW.

    python benchmarks/paged_adamw.py [--millions 20] [--rounds 9] [--threads N]

Every candidate updates its own copy of the same float32 parameters, matrices of 1024 x
1024 and a bias for each, with the same gradients. That this is equal work is checked
first: after three steps the paged ones have the bits of torch's plain loop, and its
foreach loop is within rounding. side_by_side.py has the clocks and the ratios.

    torch, foreach          whole tensors, all parameters at once
    torch, plain            whole tensors, one parameter after the other
    torch, fused            one kernel
    paged, …                the budget, as a share of the bytes of the states

Needs about 60 bytes a parameter, files included.
"""

import sys

import side_by_side
import torch
from torch import nn

from peft_from_scratch import PagedAdamW
from peft_from_scratch.common.provenance import provenance

SEED, SIDE = 0, 1024
FIRST, EXACT = "torch, foreach", "torch, plain"
SHARES = {"all": 1.0, "a half": 0.5, "a quarter": 0.25, "a twentieth": 0.05}
TARGETS = {"paged, all": 1.1, "paged, a quarter": 2.0}  # of foreach's time, at most
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
        "torch, fused": torch.optim.AdamW(fed(), fused=True),
    }
    everything = PagedAdamW(fed(), budget_bytes=1 << 40)
    whole = len(everything.page_table()) * everything.page_bytes
    made["paged, all"] = everything
    for share, part in list(SHARES.items())[1:]:
        budget = max(int(part * whole), everything.page_bytes)
        made[f"paged, {share}"] = PagedAdamW(fed(), budget_bytes=budget)
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
    exact = weights(made[EXACT])
    for name, optimizer in made.items():
        pairs = list(zip(weights(optimizer), exact, strict=True))
        apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        allowed = 0 if name.startswith("paged") else CLOSE
        if not apart <= allowed:  # a NaN as well
            raise RuntimeError(
                f"{name}: weights differ by {apart:.2g} of their norm from those of "
                f"{EXACT}, allowed is {allowed}; their times cannot be compared"
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
        "page_bytes": made["paged, all"].page_bytes,
        "rounds": rounds,
        "load": load,
        "apart": apart,
        "rows": side_by_side.table(times, FIRST),
        "provenance": provenance(seed=SEED, device=device),
    }


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    made = result["provenance"]
    ratios = {row["name"]: row["ratio"] for row in result["rows"]}
    return "\n".join(
        [
            f"{result['parameters']} parameters in float32, pages of "
            f"{result['page_bytes']} bytes, {made['threads']} threads, "
            f"{made['device']}, {made['machine']}",
            f"load average before the run: {result['load']}",
            "equal work: paged and plain have the same bits; foreach differs by "
            f"{result['apart']:.1g} of the norm",
            *side_by_side.lines(result["rows"], result["rounds"]),
            *(
                f"{name}, {side_by_side.verdict(ratios[name], target)}"
                for name, target in TARGETS.items()
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
