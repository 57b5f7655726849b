"""The Triton kernels on a GPU, against BLAS, Hugging Face PEFT and bitsandbytes.

    python benchmarks/kernel_times.py [--rounds 9] [--record]    the times
    python benchmarks/kernel_times.py --search                   blocks that are faster
    python benchmarks/kernel_times.py --table                    the page's table

All in bfloat16, with the same A and B. Each candidate's result is held to the spec in
float64 (four bits alone and many adapters: in float32) before any clock runs; one that
is wrong stops the benchmark. The clock is Triton's `do_bench`: events on the GPU around
one call, the L2 cache swept before it. What Python needs to launch a kernel is in the
time where the GPU waits for it.

`--record` writes results/kernel_times-<GPU>.json and renews the table in README.md.
Without a GPU nothing is measured, and the program says so. (A file kernels.py in this
folder would be what transformers finds when it looks for the package of that name.)
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import side_by_side
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_from_scratch import kernels, nf4
from peft_from_scratch.common.atomic import new_file
from peft_from_scratch.common.marks import between_marks
from peft_from_scratch.common.progress import bar
from peft_from_scratch.common.provenance import package_version, provenance
from peft_from_scratch.comparison import reference
from peft_from_scratch.kernels import language, lora
from peft_from_scratch.kernels.gather import gather_spec
from peft_from_scratch.kernels.language import Tiles
from tools.kernels_page import markdown

RANK, SCALE, SEED = 16, 2.0, 0
DTYPE, GPU = torch.bfloat16, torch.device("cuda")
ADAPTERS = 8  # that the rows of a decoding batch take in turn
CLOSE = 1e-2  # relative norm: a few roundings to bfloat16, each at most 2^-8
TIMES = {"median": 0.5, "tenth": 0.1, "ninetieth": 0.9}  # quantiles of a round
OURS, BLAS, PEFT, BNB = "ours", "BLAS and autograd", "PEFT", "bitsandbytes"
LOOP, KNOWN_ROWS = "a loop over adapters", "that loop, rows known"
PAGE = Path(__file__).with_name("README.md")

Step = Callable[[], tuple[Tensor, ...]]
Clock = Callable[[Step], tuple[float, ...]]  # seconds, by TIMES


@dataclass(frozen=True)
class Case:
    """What is computed, for m rows of x, with W (d_out, d_in)."""

    work: str  # a key of WORKS
    m: int
    d_in: int
    d_out: int

    def __str__(self) -> str:
        rows = f"{self.m:,} x " if self.m else ""
        return f"{self.work}: {rows}{self.d_in:,} → {self.d_out:,}"

    def rivals(self, device: torch.device) -> "Rivals":
        return WORKS[self.work].build(self, device)


@dataclass(frozen=True)
class Drawn:
    """The tensors of a case; A and B as they stand in a model that trains them."""

    x: Tensor
    W: Tensor
    A: nn.Parameter
    B: nn.Parameter
    dy: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.A, self.B


@dataclass(frozen=True)
class Rivals:
    """Candidates for the same work, ours last, and what all of them must give."""

    exact: Step
    steps: dict[str, Step]


def drawn(case: Case, device: torch.device, seed: int = SEED) -> Drawn:
    """Random numbers of such sizes that x W^T and its update weigh the same."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, width: int = 1) -> Tensor:
        wide = torch.randn(shape, generator=generator) / width**0.5
        return wide.to(device, DTYPE)

    m, d_out, d_in = case.m, case.d_out, case.d_in
    return Drawn(
        draw(m, d_in).requires_grad_(),
        draw(d_out, d_in, width=d_in),
        nn.Parameter(draw(RANK, d_in, width=d_in)),
        nn.Parameter(draw(d_out, RANK, width=RANK)),
        draw(m, d_out),
    )


# What is compared ---------------------------------------------------------------------


def forward(product: Callable[[], Tensor], leaves, dy) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (product(),)


def forward_and_backward(product, leaves, dy) -> tuple[Tensor, ...]:
    """y, and the gradients for x, A and B."""
    y = product()
    return y, *torch.autograd.grad(y, leaves, dy)


def products(run, given: Drawn, W: Tensor, candidates: dict) -> Rivals:
    """Candidates for a product with W and its update, each run forward, or both ways.

    Exact is what lora.py's spec gives for the same bfloat16 numbers in float64.
    """

    def exact() -> tuple[Tensor, ...]:
        leaves = x, A, B = [leaf.detach().double() for leaf in given.leaves]
        for leaf in leaves:
            leaf.requires_grad_()
        wide = W.double()
        return run(lambda: lora.spec(x, wide, A, B, SCALE), leaves, given.dy.double())

    return Rivals(
        exact,
        {
            name: partial(run, product, given.leaves, given.dy)
            for name, product in candidates.items()
        },
    )


def on_dense_weights(case: Case, device: torch.device, run) -> Rivals:
    given = drawn(case, device)
    x, W, A, B = given.x, given.W, given.A, given.B
    layer = peft_layer(W, A, B)
    candidates = {
        BLAS: lambda: lora.spec(x, W, A, B, SCALE),
        PEFT: lambda: layer(x),
        OURS: lambda: kernels.lora_linear(x, W, A, B, SCALE, backend="triton"),
    }
    return products(run, given, W, candidates)


def on_four_bits(case: Case, device: torch.device, run) -> Rivals:
    given = drawn(case, device)
    x, A, B = given.leaves
    q = nf4.quantize(given.W)
    layer = reference.linear4bit(linear(given.W))
    candidates = {
        BNB: lambda: layer(x) + SCALE * F.linear(F.linear(x, A), B),
        OURS: lambda: kernels.nf4_lora_linear(x, q, A, B, SCALE, backend="triton"),
    }
    return products(run, given, nf4.dequantize(q), candidates)


def dequantized(case: Case, device: torch.device) -> Rivals:
    functional = reference.bitsandbytes().functional
    W = drawn(case, device).W
    q = nf4.quantize(W, double=False)
    packed, state = functional.quantize_4bit(W, blocksize=q.block, quant_type="nf4")
    return Rivals(
        lambda: (nf4.dequantize(q, torch.float32),),
        {
            BNB: lambda: (functional.dequantize_4bit(packed, state),),
            OURS: lambda: (kernels.nf4_dequantize(q, backend="triton"),),
        },
    )


def gathered(case: Case, device: torch.device) -> Rivals:
    """Each candidate adds to a y of its own, which is zero when it is checked."""
    each = [drawn(case, device, seed) for seed in range(ADAPTERS)]
    x = each[0].x.detach()
    triples = [(one.A, one.B, SCALE) for one in each]
    stack = kernels.Stack.of(triples)
    wide = kernels.Stack.of((A.float(), B.float(), scale) for A, B, scale in triples)
    which = torch.arange(case.m) % ADAPTERS
    plan = kernels.Plan.of(which, x, stack)
    rows = [(which == a).nonzero()[:, 0].to(device) for a in range(ADAPTERS)]

    def exact(y: Tensor) -> None:
        gather_spec(y, x.float(), wide, plan.which)

    def loop(y: Tensor) -> None:
        gather_spec(y, x, stack, plan.which)

    def loop_over_rows(y: Tensor) -> None:
        for mine, (A, B, scale) in zip(rows, stack, strict=True):
            y.index_add_(0, mine, scale * F.linear(F.linear(x[mine], A), B))

    def ours(y: Tensor) -> None:
        kernels.gather_lora(y, x, stack, plan, backend="triton")

    def adding(add: Callable[[Tensor], None], dtype: torch.dtype = DTYPE) -> Step:
        y = x.new_zeros(case.m, case.d_out, dtype=dtype)

        def step() -> tuple[Tensor]:
            add(y)
            return (y,)

        return step

    steps = {LOOP: loop, KNOWN_ROWS: loop_over_rows, OURS: ours}
    return Rivals(
        adding(exact, torch.float32),
        {name: adding(add) for name, add in steps.items()},
    )


def linear(W: Tensor) -> nn.Linear:
    """A frozen projection whose weight is W itself."""
    made = nn.Linear(1, 1, bias=False)
    made.out_features, made.in_features = W.shape
    made.weight = nn.Parameter(W, requires_grad=False)
    return made


def peft_layer(W: Tensor, A: nn.Parameter, B: nn.Parameter) -> nn.Module:
    """PEFT's LoRA layer around W, with A and B themselves in it."""
    reference.bitsandbytes()  # PEFT imports it: before it can say anything
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, nn.Sequential(linear(W)))[0]
    (layer.lora_A["default"].weight, layer.lora_B["default"].weight) = A, B
    return layer


@dataclass(frozen=True)
class Work:
    """How the candidates are made, whom ours stands against, and (m, d_in, d_out)."""

    build: Callable[[Case, torch.device], Rivals]
    against: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]


LARGE, SMOLLM2 = (4096, 4096, 4096), (2048, 576, 1536)
TRAINING = LARGE, SMOLLM2
DECODING = (1, 4096, 4096), (16, 4096, 4096)
WEIGHTS = tuple((0, *shape) for _, *shape in TRAINING)
WORKS = {
    "LoRA, forward": Work(
        partial(on_dense_weights, run=forward), (BLAS, PEFT), TRAINING + DECODING
    ),
    "LoRA, forward and backward": Work(
        partial(on_dense_weights, run=forward_and_backward), (BLAS, PEFT), TRAINING
    ),
    "NF4 to bfloat16": Work(dequantized, (BNB,), WEIGHTS),
    "LoRA on NF4, forward": Work(
        partial(on_four_bits, run=forward), (BNB,), TRAINING + DECODING
    ),
    "LoRA on NF4, forward and backward": Work(
        partial(on_four_bits, run=forward_and_backward), (BNB,), TRAINING
    ),
    "LoRA, 8 adapters": Work(gathered, (LOOP, KNOWN_ROWS), DECODING[1:]),
}
CASES = tuple(
    Case(name, *shape) for name, work in WORKS.items() for shape in work.shapes
)


# Values first, then clocks ------------------------------------------------------------


def check(what: object, rivals: Rivals) -> dict[str, float]:
    """RuntimeError unless every candidate gives what is exact, within CLOSE.

    Returns  the largest relative norm of an error, for each candidate
    """
    exact, apart = rivals.exact(), {}
    for name, step in rivals.steps.items():
        pairs = zip(step(), exact, strict=True)
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        wrong = [error for error in errors if not error <= CLOSE]  # a NaN as well
        if wrong:
            raise RuntimeError(
                f"{what}: {name} is off by {wrong[0]:.2g} of the norm, allowed is "
                f"{CLOSE}; its time would mean nothing"
            )
        apart[name] = max(errors)
    return apart


def gpu_clock(step: Step) -> tuple[float, ...]:
    """Seconds of a step on the GPU, by TIMES."""
    from triton.testing import do_bench

    return tuple(ms / 1000 for ms in do_bench(step, quantiles=list(TIMES.values())))


def timed(steps: dict[str, Step], rounds: int, clock: Clock) -> dict:
    """Each candidate's seconds, and our ratio to each of the others, by round."""
    laps = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            laps[name].append(clock(step))
    medians = {name: [lap[0] for lap in each] for name, each in laps.items()}
    return {
        "seconds": {
            name: {what: median(lap[i] for lap in each) for i, what in enumerate(TIMES)}
            for name, each in laps.items()
        },
        "against": {
            name: side_by_side.ratios(medians, name)[-1]
            for name in steps
            if name != OURS
        },
    }


def measure(
    cases: Iterable[Case], rounds: int, device: torch.device, clock: Clock
) -> dict:
    """All of the benchmark, as JSON can hold it. Every value is checked first."""
    load = side_by_side.load()
    made = {case: case.rivals(device) for case in cases}
    apart = {case: check(case, rivals) for case, rivals in made.items()}
    rows = []
    for case, rivals in _shown(made.items(), "timing", "cases", len(made)):
        times = timed(rivals.steps, rounds, clock)
        rows.append({"case": asdict(case), "apart": apart[case], **times})
    return {
        "benchmark": "kernel_times",
        "dtype": str(DTYPE).removeprefix("torch."),
        "rank": RANK,
        "rounds": rounds,
        "load": load,
        "rows": rows,
        "versions": {name: package_version(name) for name in ("triton", "peft", BNB)},
        "provenance": provenance(seed=SEED, device=device),
    }


def obstacle() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if not language.INSTALLED:
        return "Triton is not installed"
    if language.INTERPRETED:
        return (
            "TRITON_INTERPRET is set, and an interpreter's times say nothing of a GPU"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} does not multiply bfloat16"
    return None


# Faster blocks ------------------------------------------------------------------------


def space(m: int) -> list[Tiles]:
    """The blocks that a search tries for m rows: 36 of them for decoding, 48 else."""
    if m <= 16:
        sizes = itertools.product((16,), (32, 64, 128), (4, 8))
        others = (64, 128), (1,), (3, 4, 5)
    else:
        four_warps = (64, 128, 4), (128, 64, 4)  # that spill with larger blocks
        sizes = *four_warps, (64, 128, 8), (128, 64, 8), (128, 128, 8), (128, 256, 8)
        others = (32, 64), (1, 4), (3, 4)
    return [
        Tiles(m=tall, n=wide, k=k, sweep=sweep, warps=warps, stages=stages)
        for (tall, wide, warps), k, sweep, stages in itertools.product(sizes, *others)
    ]


def search(
    case: Case, device: torch.device, clock: Clock, tried: list[Tiles]
) -> list[tuple[float, Tiles]]:
    """(seconds, blocks) of the product with its update, forward: the fastest first.

    Blocks that need more shared memory or registers than the GPU has are left out; any
    that give a wrong product stop the search.
    """
    given, found = drawn(case, device), []
    exact = products(forward, given, given.W, {}).exact()

    def product(tiles: Tiles) -> Tensor:
        W, A, B = language.matrix(given.W), given.A, given.B
        options = {"A": A, "B": B, "scale": SCALE, "tiles": tiles}
        return lora.product(given.x, W, case.d_out, **options)[0]

    for tiles in _shown(tried, str(case), "blocks", len(tried)):
        step = partial(forward, partial(product, tiles), given.leaves, given.dy)
        try:
            check(tiles, Rivals(lambda: exact, {OURS: step}))
        except language.triton.OutOfResources:
            continue
        found.append((clock(step)[0], tiles))
    return sorted(found, key=lambda pair: pair[0])


def shipped(case: Case) -> Tiles:
    """The blocks that the library takes."""
    return lora.tiles_for(case.m, case.d_out, RANK, DTYPE)


def verdict(case: Case, found: list[tuple[float, Tiles]]) -> str:
    """The fastest blocks beside the shipped ones, for a terminal."""
    (best, tiles), now = found[0], {t: seconds for seconds, t in found}[shipped(case)]
    return (
        f"{case}\n  shipped {1e3 * now:8.3f} ms  {shipped(case)}\n"
        f"  fastest {1e3 * best:8.3f} ms  {tiles}"
    )


# The page -----------------------------------------------------------------------------


def recorded() -> list[dict]:
    """What was measured so far, a result a GPU."""
    files = sorted(side_by_side.RESULTS.glob("kernel_times-*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


def table(results: list[dict]) -> str:
    """Every case against every other candidate, on each GPU of the results."""
    names = [result["provenance"]["device"] for result in results]
    heads = ("work, rows x d_in → d_out", "against", *(names or ["on a GPU"]))
    lines = [
        (case, other, *(cell(result, case, other) for result in results or [{}]))
        for case in CASES
        for other in WORKS[case.work].against
    ]
    return markdown(heads, lines) + "\n"


def cell(result: dict, case: Case, other: str) -> str:
    """Our ratio to the other's time, its spread, and our milliseconds."""
    for row in result.get("rows", ()):
        if row["case"] == asdict(case):
            ratio, ours = row["against"][other], row["seconds"][OURS]["median"]
            spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
            return f"{ratio['ratio']:.2f} ({spread}), {1e3 * ours:.3g} ms"
    return "not measured"


def write_table() -> None:
    page = between_marks(PAGE.read_text("utf-8"), table(recorded()))
    with new_file(PAGE) as partial_page:
        partial_page.write_text(page, encoding="utf-8")


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--search", action="store_true", help="for faster blocks")
    parser.add_argument("--table", action="store_true", help="only renew the page")
    asked = side_by_side.parsed(parser, arguments)
    if asked.table:
        write_table()
    elif reason := obstacle():
        print(f"nothing was measured: {reason}")
    elif asked.search:
        for case in (Case("LoRA, forward", *shape) for shape in TRAINING + DECODING):
            tried = list(dict.fromkeys([shipped(case), *space(case.m)]))
            print(verdict(case, search(case, GPU, gpu_clock, tried)))
    else:
        result = measure(CASES, asked.rounds, GPU, gpu_clock)
        device = result["provenance"]["device"]
        print(table([result]), side_by_side.write(result, asked.record, device))
        if asked.record:
            write_table()


def _shown(items: Iterable, what: str, unit: str, total: int) -> Iterable:
    """The items, and a bar of how many are done."""
    with bar(what, unit, total) as progress:
        for item in items:
            yield item
            progress.update()


if __name__ == "__main__":
    main(sys.argv[1:])
