"""The Triton kernels on a GPU, against BLAS, torch.compile, PEFT and bitsandbytes.

    python benchmarks/kernel_times.py [--rounds 9] [--record]    the times
    python benchmarks/kernel_times.py --only "8 adapters"        some cases alone
    python benchmarks/kernel_times.py --search                   blocks that are faster
    python benchmarks/kernel_times.py --table                    the page's table

torch and Triton are enough. PEFT, bitsandbytes and transformers are rivals where they
are installed; a row says which are not. All in bfloat16, with the same A and B. Each
candidate's result is held to the spec in float64 (four bits alone and many adapters: in
float32) before its clock runs. A case that fails costs its row, which says why. The
result is written after each row, and no case starts after `--minutes`.

There are two clocks, and two ratios:

    kernels  what the GPU does: the step as a CUDA graph, so that no Python is in it,
             with the L2 cache swept before each replay
    wall     what a caller waits for: steps in a loop, with all that Python does

`--record` writes results/kernel_times-<GPU>.json and renews the table in README.md.
Without a GPU nothing is measured, and the program says so. (A file kernels.py in this
folder would be what transformers finds when it looks for the package of that name.)
"""

import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import side_by_side
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_from_scratch import kernels, nf4
from peft_from_scratch.common.atomic import new_file
from peft_from_scratch.common.marks import between_marks, markdown
from peft_from_scratch.common.provenance import package_version, provenance
from peft_from_scratch.kernels import language, lora
from peft_from_scratch.kernels.gather import gather_spec
from peft_from_scratch.kernels.language import Tiles

RANK, SCALE, SEED = 16, 2.0, 0
DTYPE, GPU = torch.bfloat16, torch.device("cuda")
ADAPTERS = 8  # that the rows of a decoding batch take in turn
CLOSE = 1e-2  # relative norm: a few roundings to bfloat16, each at most 2^-8
LOOP_SECONDS = 0.05  # of the wall clock's loop, at least
CLOCKS = ("kernels", "wall")
OURS, EQUATION, IN_PLACE = "ours", "BLAS, the equation", "BLAS, in place"
COMPILED, PEFT, BNB = "torch.compile", "PEFT", "bitsandbytes"
DENSE = "dequantized, then BLAS"
LOOP, KNOWN_ROWS = "a loop over adapters", "that loop, rows known"
BATCHED = "A and B gathered, bmm"
PAGE = Path(__file__).with_name("README.md")

Step = Callable[[], tuple[Tensor, ...]]
Lap = dict[str, float | None]  # seconds, by CLOCKS; None where a clock cannot run
Clock = Callable[[Step], Callable[[], Lap]]  # prepares a step, to be timed repeatedly


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
    left_out: dict[str, str] = field(default_factory=dict)  # candidate -> the reason


def drawn(
    case: Case, device: torch.device, seed: int = SEED, gradients: bool = False
) -> Drawn:
    """Random numbers of such sizes that x W^T and its update weigh the same.

    With `gradients`, x asks for one, as it does above the first layer of a model.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, width: int = 1) -> Tensor:
        wide = torch.randn(shape, generator=generator, device=device)
        return (wide / width**0.5).to(DTYPE)

    m, d_out, d_in = case.m, case.d_out, case.d_in
    return Drawn(
        draw(m, d_in).requires_grad_(gradients),
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


def products(run, given: Drawn, W: Tensor, makers: dict) -> Rivals:
    """Candidates for a product with W and its update, each run forward, or both ways.

    Exact is what lora.py's spec gives for the same bfloat16 numbers in float64. A maker
    returns its candidate's product; one whose library is not installed is left out.
    """

    def exact() -> tuple[Tensor, ...]:
        leaves = x, A, B = [leaf.detach().double() for leaf in given.leaves]
        for leaf in leaves:
            leaf.requires_grad_()
        wide = W.double()
        return run(lambda: lora.spec(x, wide, A, B, SCALE), leaves, given.dy.double())

    found, left_out = installed(makers)
    steps = {n: partial(run, p, given.leaves, given.dy) for n, p in found.items()}
    return Rivals(exact, steps, left_out)


def installed(makers: dict[str, Callable]) -> tuple[dict, dict[str, str]]:
    """({candidate: what its maker made}, {candidate: the package that is not here})"""
    ready, left_out = {}, {}
    for name, make in makers.items():
        try:
            ready[name] = make()
        except ImportError as error:
            left_out[name] = str(error)
    return ready, left_out


def added(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y += scale · (x Aᵀ) Bᵀ, in the memory of y."""
    return y.addmm_(F.linear(x, A), B.T, alpha=SCALE)


def on_dense_weights(case: Case, device: torch.device, run) -> Rivals:
    given = drawn(case, device, gradients=run is forward_and_backward)
    x, W, A, B = given.x, given.W, given.A, given.B
    compiled = torch.compile(lora.spec)

    makers = {
        EQUATION: lambda: lambda: lora.spec(x, W, A, B, SCALE),
        IN_PLACE: lambda: lambda: added(F.linear(x, W), x, A, B),
        COMPILED: lambda: lambda: compiled(x, W, A, B, SCALE),
        PEFT: lambda: partial(peft_layer(W, A, B), x),
        OURS: lambda: lambda: kernels.lora_linear(x, W, A, B, SCALE, backend="triton"),
    }
    return products(run, given, W, makers)


def on_four_bits(case: Case, device: torch.device, run) -> Rivals:
    given = drawn(case, device, gradients=run is forward_and_backward)
    x, A, B = given.leaves
    q = nf4.quantize(given.W)

    def beside_bitsandbytes() -> Callable[[], Tensor]:
        layer = linear4bit(given.W)
        return lambda: added(layer(x), x, A, B)

    def dequantized_once() -> Tensor:
        return added(F.linear(x, nf4.dequantize(q)), x, A, B)

    makers = {
        BNB: beside_bitsandbytes,
        DENSE: lambda: dequantized_once,
        OURS: lambda: partial(
            kernels.nf4_lora_linear, x, q, A, B, SCALE, backend="triton"
        ),
    }
    return products(run, given, nf4.dequantize(q), makers)


def dequantized(case: Case, device: torch.device, double: bool) -> Rivals:
    W = drawn(case, device).W
    q = nf4.quantize(W, double=double)

    def of_bitsandbytes() -> Step:
        functional = reference().bitsandbytes().functional
        options = {"blocksize": q.block, "compress_statistics": double}
        packed, state = functional.quantize_4bit(W, quant_type="nf4", **options)
        return lambda: (functional.dequantize_4bit(packed, state),)

    makers = {
        BNB: of_bitsandbytes,
        OURS: lambda: lambda: (kernels.nf4_dequantize(q, backend="triton"),),
    }
    exact = partial(nf4.dequantize, q, torch.float32)
    return Rivals(lambda: (exact(),), *installed(makers))


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
    on_device = which.to(device)
    A_of, B_of = (torch.stack([t[i].detach() for t in triples]) for i in (0, 1))

    def exact(y: Tensor) -> None:
        gather_spec(y, x.float(), wide, plan.which)

    def loop(y: Tensor) -> None:
        gather_spec(y, x, stack, plan.which)

    def loop_over_rows(y: Tensor) -> None:
        for mine, (A, B, scale) in zip(rows, stack, strict=True):
            y.index_add_(0, mine, scale * F.linear(F.linear(x[mine], A), B))

    def batched(y: Tensor) -> None:
        h = torch.bmm(A_of[on_device], x[:, :, None])
        y.add_(torch.bmm(B_of[on_device], h)[:, :, 0], alpha=SCALE)

    def ours(y: Tensor) -> None:
        kernels.gather_lora(y, x, stack, plan, backend="triton")

    def adding(add: Callable[[Tensor], None], dtype: torch.dtype = DTYPE) -> Step:
        y = x.new_zeros(case.m, case.d_out, dtype=dtype)

        def step() -> tuple[Tensor]:
            add(y)
            return (y,)

        return step

    steps = {LOOP: loop, KNOWN_ROWS: loop_over_rows, BATCHED: batched, OURS: ours}
    return Rivals(
        adding(exact, torch.float32),
        {name: adding(add) for name, add in steps.items()},
    )


def linear(W: Tensor) -> nn.Linear:
    """A frozen projection whose weight is W itself."""
    module = nn.Linear(1, 1, bias=False)
    module.out_features, module.in_features = W.shape
    module.weight = nn.Parameter(W, requires_grad=False)
    return module


def reference():
    """The comparison's module around bitsandbytes, which needs transformers."""
    from peft_from_scratch.comparison import reference

    return reference


def linear4bit(W: Tensor) -> nn.Module:
    return reference().linear4bit(linear(W))


def peft_layer(W: Tensor, A: nn.Parameter, B: nn.Parameter) -> nn.Module:
    """PEFT's LoRA layer around W, with A and B themselves in it."""
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
PROMPTS = (64, 4096, 4096), (512, 4096, 4096)
BATCHES = DECODING[1], (128, 4096, 4096), PROMPTS[1]
WEIGHTS = tuple((0, *shape) for _, *shape in TRAINING)
FORWARD = TRAINING + DECODING + PROMPTS
BLAS, CODED = (EQUATION, IN_PLACE, COMPILED, PEFT), (BNB, DENSE)
WORKS = {
    "LoRA, forward": Work(partial(on_dense_weights, run=forward), BLAS, FORWARD),
    "LoRA, forward and backward": Work(
        partial(on_dense_weights, run=forward_and_backward), BLAS, TRAINING
    ),
    "NF4 to bfloat16": Work(partial(dequantized, double=False), (BNB,), WEIGHTS),
    "NF4, double quantization, to bfloat16": Work(
        partial(dequantized, double=True), (BNB,), WEIGHTS
    ),
    "LoRA on NF4, forward": Work(partial(on_four_bits, run=forward), CODED, FORWARD),
    "LoRA on NF4, forward and backward": Work(
        partial(on_four_bits, run=forward_and_backward), CODED, TRAINING
    ),
    "LoRA, 8 adapters": Work(gathered, (LOOP, KNOWN_ROWS, BATCHED), BATCHES),
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


def gpu_clock(step: Step) -> Callable[[], Lap]:
    """Both clocks of a step on the GPU."""
    replay = captured(step)
    return lambda: {
        "kernels": kernel_seconds(replay) if replay else None,
        "wall": wall_seconds(step),
    }


def captured(step: Step) -> Callable[[], None] | None:
    """The step as a CUDA graph; None where it does what a graph cannot hold."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the allocator's pools
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def kernel_seconds(replay: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return do_bench(replay, return_mode="median") / 1000


def wall_seconds(step: Step) -> float:
    """Seconds a step, of as many in a row as take LOOP_SECONDS."""
    steps = 1
    while True:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds >= LOOP_SECONDS:
            return seconds / steps
        steps *= 2


def timed(steps: dict[str, Step], rounds: int, clock: Clock) -> dict:
    """Each candidate's seconds, and our ratio to each of the others, by round."""
    watches = {name: clock(step) for name, step in steps.items()}
    laps = {name: [] for name in steps}
    for _ in range(rounds):
        for name, watch in watches.items():
            laps[name].append(watch())
    by_clock = {
        which: {name: [lap[which] for lap in each] for name, each in laps.items()}
        for which in CLOCKS
    }
    return {
        "seconds": {
            name: {which: middle(by_clock[which][name]) for which in CLOCKS}
            for name in steps
        },
        "against": {
            name: {which: ratio(by_clock[which], name) for which in CLOCKS}
            for name in steps
            if name != OURS
        },
    }


def middle(laps: list[float | None]) -> float | None:
    return None if None in laps else median(laps)


def ratio(laps: dict[str, list], other: str) -> dict | None:
    """Ours over the other's, by round; None where one of both has no time."""
    if None in laps[OURS] or None in laps[other]:
        return None
    return side_by_side.ratios({other: laps[other], OURS: laps[OURS]}, other)[-1]


def measured(case: Case, rounds: int, device: torch.device, clock: Clock) -> dict:
    """A case's row: its times, or why it has none. Every value is checked first."""
    try:
        rivals = case.rivals(device)
        apart = check(case, rivals)
        times = timed(rivals.steps, rounds, clock)
    except Exception as error:
        return {"case": asdict(case), "failed": f"{type(error).__name__}: {error}"}
    return {
        "case": asdict(case),
        "apart": apart,
        "left_out": rivals.left_out,
        **times,
    }


def measure(
    cases: Iterable[Case],
    rounds: int,
    device: torch.device,
    clock: Clock,
    *,
    minutes: float = math.inf,
    keep: Callable[[dict], object] = lambda result: None,
) -> dict:
    """All of the benchmark, as JSON can hold it.

    Args
        minutes  after which no case is started; its row says so
        keep     called with the result so far, after each row
    """
    end = time.monotonic() + 60 * minutes
    result = {
        "benchmark": "kernel_times",
        "dtype": str(DTYPE).removeprefix("torch."),
        "rank": RANK,
        "rounds": rounds,
        "load": side_by_side.load(),
        "gpu_before": gpu_state(),
        "rows": [],
        "versions": {name: package_version(name) for name in ("triton", "peft", BNB)},
        "provenance": provenance(seed=SEED, device=device),
    }
    for case in cases:
        if time.monotonic() < end:
            row = measured(case, rounds, device, clock)
        else:
            late = f"not started: {minutes:g} minutes were over"
            row = {"case": asdict(case), "failed": late}
        result["rows"].append(row)
        print(f"{case}: {row.get('failed', 'measured')}", flush=True)
        keep(result | {"gpu_after": gpu_state()})
    return result | {"gpu_after": gpu_state()}


def gpu_state() -> str | None:
    """Clocks, temperature and power, from the driver's tool; None without it."""
    if not shutil.which("nvidia-smi"):
        return None
    asked = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


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
    """The blocks that a search tries for m rows: 36 of them for decoding, 56 else."""
    if m <= 16:
        sizes = itertools.product((16,), (32, 64, 128), (4, 8))
        others = (64, 128), (1,), (3, 4, 5)
    else:
        four_warps = (64, 128, 4), (128, 64, 4)  # that spill with larger blocks
        sizes = (
            *four_warps,
            (64, 64, 8),
            (64, 128, 8),
            (128, 64, 8),
            (128, 128, 8),
            (128, 256, 8),
        )
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
    given, times = drawn(case, device), []
    exact = products(forward, given, given.W, {}).exact()

    def product(tiles: Tiles) -> Tensor:
        W, A, B = language.matrix(given.W), given.A, given.B
        options = {"A": A, "B": B, "scale": SCALE, "tiles": tiles}
        return lora.product(given.x, W, case.d_out, **options)[0]

    for tiles in tried:
        step = partial(forward, partial(product, tiles), given.leaves, given.dy)
        try:
            check(tiles, Rivals(lambda: exact, {OURS: step}))
        except language.triton.OutOfResources:
            continue
        times.append((clock(step)()["kernels"], tiles))
    return sorted(times, key=lambda pair: pair[0])


def shipped(case: Case) -> Tiles:
    """The blocks that the library takes."""
    return lora.tiles_for(case.m, case.d_out, RANK, DTYPE)


def verdict(case: Case, times: list[tuple[float, Tiles]]) -> str:
    """The fastest blocks beside the shipped ones, for a terminal."""
    (best, tiles), now = times[0], {t: seconds for seconds, t in times}[shipped(case)]
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
    """Our ratio to the other's time by both clocks, and our time."""
    for row in result.get("rows", ()):
        if row["case"] == asdict(case) and other in row.get("against", ()):
            seconds, against = row["seconds"][OURS], row["against"][other]
            return "; ".join(
                "{} {ratio:.2f} ({low:.2f} to {high:.2f}), {:.3g} ms".format(
                    which, 1e3 * seconds[which], **against[which]
                )
                for which in CLOCKS
                if against[which]
            )
    return "not measured"


def write_table() -> None:
    page = between_marks(PAGE.read_text("utf-8"), table(recorded()))
    with new_file(PAGE) as partial_page:
        partial_page.write_text(page, encoding="utf-8")


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--search", action="store_true", help="for faster blocks")
    parser.add_argument("--table", action="store_true", help="only renew the page")
    parser.add_argument("--only", default="", help="a part of the cases' names")
    parser.add_argument("--minutes", type=float, default=8, help="no case starts after")
    asked = side_by_side.parsed(parser, arguments)
    cases = [case for case in CASES if asked.only.lower() in str(case).lower()]
    if not cases:
        names = "\n".join(map(str, CASES))
        parser.error(f"--only {asked.only!r} is in none of the cases:\n{names}")
    if asked.table:
        write_table()
    elif reason := obstacle():
        print(f"nothing was measured: {reason}")
    elif asked.search:
        for case in (Case("LoRA, forward", *shape) for shape in FORWARD):
            tried = list(dict.fromkeys([shipped(case), *space(case.m)]))
            print(verdict(case, search(case, GPU, gpu_clock, tried)), flush=True)
    else:
        device = provenance(seed=SEED, device=GPU)["device"]
        keep = partial(
            side_by_side.write, record=asked.record, place=device, out=asked.out
        )
        clocks = {"minutes": asked.minutes, "keep": keep}
        result = measure(cases, asked.rounds, GPU, gpu_clock, **clocks)
        print(table([result]), keep(result))
        if asked.record:
            write_table()


if __name__ == "__main__":
    main(sys.argv[1:])
