"""Quantizing and dequantizing a 4096 x 4096 matrix: this library against bitsandbytes.

    python benchmarks/nf4.py [--side 4096] [--rounds 9] [--threads N] [--record]

That both do equal work is checked before any clock runs: the same codes, the same
constants and the same dequantized values, bit for bit. bitsandbytes gets the tensor
flat: it dequantizes a 2-D tensor wrongly on a CPU where a row is no multiple of a
block. side_by_side.py has the clocks and the ratios.
"""

import sys

import side_by_side
import torch

from peft_from_scratch import nf4
from peft_from_scratch.common.provenance import package_version, provenance
from peft_from_scratch.comparison import reference

SEED, BLOCK = 0, 64
TARGETS = {"quantize": 0.7, "dequantize": 1.0}  # of bitsandbytes' time, at most
THEIRS = "bitsandbytes"
KINDS = {"quantize": "float32 to NF4", "dequantize": "NF4 to float32"}


def candidates(w: torch.Tensor) -> dict[str, dict]:
    """For each kind of work, {name: a function that does it}; bitsandbytes first."""
    functional = reference.bitsandbytes().functional
    flat = w.view(-1)
    ours = nf4.quantize(w, BLOCK, double=False)
    packed, state = functional.quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4")
    _check_equal_work(ours, packed, state, functional.dequantize_4bit(packed, state))
    out = torch.empty_like(w)
    half = torch.bfloat16
    return {
        "quantize": {
            THEIRS: lambda: functional.quantize_4bit(
                flat, blocksize=BLOCK, quant_type="nf4"
            ),
            "ours": lambda: nf4.quantize(w, BLOCK, double=False),
            "ours, constants doubled": lambda: nf4.quantize(w, BLOCK),
        },
        "dequantize": {
            THEIRS: lambda: functional.dequantize_4bit(packed, state),
            "ours": lambda: nf4.dequantize(ours),
            "ours, into a buffer": lambda: nf4.dequantize(ours, out=out),
            "ours, to bfloat16": lambda: nf4.dequantize(ours, half),
        },
    }


def _check_equal_work(ours, packed, state, theirs) -> None:
    """RuntimeError unless codes, constants and values are the same bits."""
    pairs = {
        "codes": (ours.packed, packed.view(-1)),
        "constants": (ours.absmax, state.absmax),
        "dequantized values": (nf4.dequantize(ours).view(-1), theirs.view(-1)),
    }
    for what, (a, b) in pairs.items():
        if not torch.equal(a, b):
            raise RuntimeError(
                f"the two sides' {what} differ; their times cannot be compared"
            )


def measure(side: int, rounds: int) -> dict:
    """All of the benchmark, as JSON can hold it."""
    load, device = side_by_side.load(), torch.device("cpu")
    w = torch.randn(side, side, generator=torch.Generator().manual_seed(SEED))
    times = {
        kind: side_by_side.table(side_by_side.take_turns(steps, rounds, device), THEIRS)
        for kind, steps in candidates(w).items()
    }
    return {
        "benchmark": "nf4",
        "dtype": "float32",
        "side": side,
        "block": BLOCK,
        "rounds": rounds,
        "load": load,
        **times,
        "bitsandbytes": package_version(THEIRS),
        "provenance": provenance(seed=SEED, device=device),
    }


def report(result: dict) -> str:
    """The result as text, for a terminal."""
    made = result["provenance"]
    said = [
        f"{result['side']} x {result['side']}, blocks of {result['block']}, "
        f"{made['threads']} threads, {made['device']}, {made['machine']}",
        f"load average before the run: {result['load']}",
        "equal work: codes, constants and values have the same bits",
    ]
    for kind, words in KINDS.items():
        said += ["", words, *side_by_side.lines(result[kind], result["rounds"])]
        ratio = next(r["ratio"] for r in result[kind] if r["name"] == "ours")
        said.append(side_by_side.verdict(ratio, TARGETS[kind]))
    return "\n".join(said)


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--side", type=int, default=4096, help="of the matrix")
    asked = side_by_side.parsed(parser, arguments)
    result = measure(asked.side, asked.rounds)
    print(
        report(result),
        side_by_side.write(result, asked.record, out=asked.out),
        sep="\n",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
