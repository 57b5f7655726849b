"""The kernels' benchmark, with stand-ins for the GPU and its clock; interpreted.

No time is tested, but what stands around it: which values are checked, and when; what
the record and the page say.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planting import law, planted, planted_kernel

from peft_from_scratch.common import provenance
from peft_from_scratch.kernels import gather, language, lora
from peft_from_scratch.kernels import nf4 as on_codes

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
GPU = "Imaginary GPU 9000"
DENSE, BOTH_WAYS = "LoRA, forward", "LoRA, forward and backward"
CODES, ON_CODES = "NF4 to bfloat16", "LoRA on NF4, forward"
DOUBLE, GATHERED = "NF4, double quantization, to bfloat16", "LoRA, 8 adapters"
EVERY = (
    DENSE,
    BOTH_WAYS,
    CODES,
    DOUBLE,
    ON_CODES,
    ON_CODES + " and backward",
    GATHERED,
)

interpreted = pytest.mark.skipif(not language.INSTALLED, reason="Triton: Linux only")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The benchmark as a script imports it; its files and its page are the test's."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    import kernel_times

    page = tmp_path / "README.md"
    page.write_text(kernel_times.PAGE.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(kernel_times, "PAGE", page)
    monkeypatch.setattr(kernel_times.side_by_side, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(kernel_times.side_by_side, "START", 0.0)  # an idle machine
    monkeypatch.setattr(provenance, "device_name", lambda device: GPU)
    monkeypatch.setattr(
        torch, "compile", lambda function: function
    )  # takes half a minute
    return kernel_times


def tiny(bench, work):
    """A case of each work that an interpreter can do; 16 rows, two for an adapter."""
    return bench.Case(work, 0 if work in (CODES, DOUBLE) else 16, 128, 64)


class Clock:
    """Gives out its times, and counts them; the wall's time is a second more."""

    def __init__(self, *seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self, step):
        return self.lap

    def lap(self):
        kernels = self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        return {"kernels": kernels, "wall": kernels + 1}


def never(step):
    raise AssertionError("the clock ran")


# ------------------------------------------------------------------- Values come first


@interpreted
@pytest.mark.parametrize("work", EVERY)
def test_every_candidate_gives_what_is_exact(bench, work):
    case = tiny(bench, work)
    rivals = case.rivals(CPU)
    names = *bench.WORKS[work].against, bench.OURS
    assert tuple(rivals.steps) == names
    apart = bench.check(case, rivals)
    assert tuple(apart) == names
    assert all(0 < error < bench.CLOSE / 2 for error in apart.values())


def test_these_are_all_works(bench):
    assert set(EVERY) == set(bench.WORKS) == {case.work for case in bench.CASES}
    assert len(set(bench.CASES)) == len(bench.CASES)


WRONG_KERNELS = {
    "h without its scale": (
        *(DENSE, planted_kernel, lora, "_product"),
        *("high = low * scale", "high = low"),
    ),
    "half of dA": (
        *(BOTH_WAYS, planted, lora.gradients),
        *("dA = over_rows(dh, x, A.dtype)", "dA = over_rows(dh, x, A.dtype) / 2"),
    ),
    "the low nibble first": (
        *(CODES, planted_kernel, on_codes, "values_of"),
        *("tl.join(first_of(pair), second", "tl.join(second_of(pair), second"),
    ),
    "the next block's constant": (
        *(ON_CODES, planted_kernel, on_codes, "unpacked"),
        *("+ runs) // BLOCK, keep", "+ runs) // BLOCK + 1, keep"),
    ),
    "scale forgotten": (
        *(GATHERED, planted_kernel, gather, "_expand"),
        *("h * tl.load(scale + adapter)", "h"),
    ),
    "the spec itself": (
        *(DENSE, planted, lora.spec),
        *("+ scale * F.linear", "- scale * F.linear"),
    ),
}


@law
@interpreted
@pytest.mark.parametrize("bug", WRONG_KERNELS)
def a_wrong_kernel_is_not_timed(bench, bug="half of dA"):
    """Its row says why, and the case after it has its times."""
    work, plant, *where = WRONG_KERNELS[bug]
    right = tiny(bench, GATHERED if work in (CODES, DOUBLE) else CODES)
    with plant(*where):
        result = bench.measure([tiny(bench, work)], 7, CPU, never)
    (row,) = result["rows"]
    assert "time would mean nothing" in row["failed"] and "seconds" not in row
    result = bench.measure([right], 7, CPU, Clock(1))
    assert result["rows"][0]["seconds"]


@interpreted
def test_a_case_that_fails_costs_its_row_alone(bench, monkeypatch, capsys):
    broken = bench.Work(lambda case, device: 1 / 0, (), ())
    monkeypatch.setitem(bench.WORKS, BOTH_WAYS, broken)
    cases, kept = [tiny(bench, BOTH_WAYS), tiny(bench, GATHERED)], []
    result = bench.measure(
        cases, 7, CPU, Clock(1), keep=lambda result: kept.append(len(result["rows"]))
    )
    assert result["rows"][0]["failed"] == "ZeroDivisionError: division by zero"
    assert result["rows"][1]["seconds"][bench.OURS] == {"kernels": 1, "wall": 2}
    assert kept == [1, 2]
    assert "division by zero" in capsys.readouterr().out
    assert bench.cell(result, cases[0], "PEFT") == "not measured"


@interpreted
def test_no_case_starts_when_the_minutes_are_over(bench):
    cases = [tiny(bench, CODES), tiny(bench, GATHERED)]
    result = bench.measure(cases, 7, CPU, never, minutes=0)
    expected = "not started: 0 minutes were over"
    assert [row["failed"] for row in result["rows"]] == [expected] * 2


BARE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {absent!r}
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
sys.path[:0] = {path!r}
import torch, kernel_times as bench

torch.compile = lambda function: function
clock = lambda step: lambda: {{"kernels": 1.0, "wall": 2.0}}
shapes = {{work: (0 if "to bfloat16" in work else 16, 128, 64) for work in bench.WORKS}}
cases = [bench.Case(work, *shape) for work, shape in shapes.items()]
result = bench.measure(cases, 7, torch.device("cpu"), clock)
for row in result["rows"]:
    print("row", sorted(row.get("left_out", ())), sorted(row.get("seconds", ())))
"""


@interpreted
def test_torch_and_triton_are_enough():
    """No other package is there; the rivals that need one are left out by name."""
    absent = {"transformers", "peft", "bitsandbytes", "datasets", "safetensors"}
    absent |= {"accelerate", "matplotlib", "tokenizers", "huggingface_hub", "tqdm"}
    script = BARE.format(absent=absent, path=[str(FOLDER), str(FOLDER.parent)])
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    rows = [line for line in run.stdout.splitlines() if line.startswith("row")]
    assert len(rows) == len(EVERY), run.stderr
    assert all("'ours'" in row for row in rows), run.stdout
    assert rows[0].startswith("row ['PEFT'] ['BLAS, in place', 'BLAS, the equation'")
    assert rows[2].startswith("row ['bitsandbytes'] ['ours']")


@pytest.mark.parametrize("wrong", [1.02, float("nan")])
def test_one_wrong_tensor_of_several_is_enough(bench, wrong):
    exact = torch.ones(4), torch.ones(2)
    near = torch.full((4,), 1.005), torch.ones(2)
    rivals = bench.Rivals(lambda: exact, {"a": lambda: near})
    assert bench.check("x", rivals) == {"a": pytest.approx(0.005, rel=1e-4)}
    far = torch.ones(4), torch.full((2,), wrong)
    rivals = bench.Rivals(lambda: exact, {"a": lambda: near, "b": lambda: far})
    with pytest.raises(RuntimeError, match=r"x: b is off by .*allowed is 0\.01"):
        bench.check("x", rivals)


# -------------------------------------------------------------- The record and the page


def measured(bench):
    """A run of two cases; in the first bitsandbytes takes 4, 8, 2 s, ours 1, 4, 1."""
    clock = Clock(4, 1, 8, 4, 2, 1, *[3] * 9)
    cases = [tiny(bench, CODES), tiny(bench, ON_CODES)]
    result = bench.measure(cases, 3, CPU, clock)
    assert clock.calls == 15
    return result


@law
@interpreted
def the_record_has_ratios_by_round(bench):
    result = json.loads(json.dumps(measured(bench)))
    assert result["provenance"]["device"] == GPU
    assert result["versions"].keys() == {"triton", "peft", "bitsandbytes"}
    row = result["rows"][0]
    assert row["case"] == {"work": CODES, "m": 0, "d_in": 128, "d_out": 64}
    assert row["left_out"] == {}
    assert row["seconds"] == {
        "bitsandbytes": {"kernels": 4, "wall": 5},
        "ours": {"kernels": 1, "wall": 2},
    }
    for clock, (middle, low, high) in {
        "kernels": (0.5, 0.25, 0.5),
        "wall": (5 / 9, 2 / 5, 2 / 3),
    }.items():
        ratio = row["against"]["bitsandbytes"][clock]
        assert ratio["name"] == "ours"
        assert (ratio["ratio"], ratio["low"], ratio["high"]) == (middle, low, high)


def test_a_clock_that_cannot_run_leaves_the_other(bench):
    laps = iter([1.0, 2.0, 3.0, 4.0])
    clock = lambda step: lambda: {"kernels": None, "wall": next(laps)}  # noqa: E731
    steps = {"PEFT": None, bench.OURS: None}
    times = bench.timed(steps, 2, clock)
    assert times["against"]["PEFT"]["kernels"] is None
    assert times["against"]["PEFT"]["wall"]["ratio"] == (2 + 4 / 3) / 2


def at_a_gpu(bench, monkeypatch, name=GPU):
    """As if there were a GPU: tiny cases in place of the table's, on the CPU."""
    cases = [tiny(bench, CODES), tiny(bench, DENSE)]
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench, "obstacle", lambda: None)
    monkeypatch.setattr(bench, "gpu_clock", Clock(0.004, 0.001, 0.001))
    monkeypatch.setattr(bench, "GPU", CPU)
    monkeypatch.setattr(provenance, "device_name", lambda device: name)


@interpreted
def test_a_record_turns_the_page_from_not_measured_to_figures(
    bench, monkeypatch, tmp_path, capsys
):
    at_a_gpu(bench, monkeypatch)
    bench.main(["--table"])
    before = bench.PAGE.read_text("utf-8")
    lines = [line for line in before.splitlines() if "128 → 64" in line]
    assert len(lines) == 5 and all("| not measured |" in line for line in lines)

    bench.main([])
    assert "written to out/kernel_times.json" in capsys.readouterr().out
    bench.main(["--out", "elsewhere", "--only", "nf4 TO"])
    elsewhere = json.loads(
        (tmp_path / "elsewhere/kernel_times.json").read_text("utf-8")
    )
    assert [row["case"]["work"] for row in elsewhere["rows"]] == [CODES]
    with pytest.raises(SystemExit):
        bench.main(["--only", "no such case"])
    assert bench.PAGE.read_text("utf-8") == before

    bench.main(["--record"])
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == "kernel_times-imaginary-gpu-9000.json"
    after = bench.PAGE.read_text("utf-8")
    assert GPU in after and "not measured |" not in after
    assert after.count("128 → 64") == 5 and " ms |" in after

    monkeypatch.setattr(bench, "CASES", [*bench.CASES, tiny(bench, GATHERED)])
    at_another = provenance.device_name(CPU).replace("9000", "9001")
    other = json.loads(file.read_text("utf-8"))
    other["provenance"]["device"] = at_another
    file.with_name("kernel_times-other.json").write_text(json.dumps(other))
    bench.main(["--table"])
    head, _, *rows = bench.table(bench.recorded()).splitlines()
    assert head.endswith(f"| {GPU} | {at_another} |")
    assert rows[-1].endswith("| A and B gathered, bmm | not measured | not measured |")
    assert bench.table(bench.recorded()) in bench.PAGE.read_text("utf-8")


@law
@interpreted
def a_cell_is_the_ratio_its_spread_and_our_time(bench):
    result = measured(bench)
    cell = bench.cell(result, tiny(bench, CODES), "bitsandbytes")
    assert cell == (
        "kernels 0.50 (0.25 to 0.50), 1e+03 ms; wall 0.56 (0.40 to 0.67), 2e+03 ms"
    )


def test_the_table_in_git_is_that_of_the_files_in_git(bench, monkeypatch):
    monkeypatch.setattr(bench.side_by_side, "RESULTS", FOLDER / "results")
    page = bench.PAGE.read_text("utf-8")
    table = bench.table(bench.recorded())
    assert bench.between_marks(page, table) == page and table in page


# ------------------------------------------------------------------------ Without a GPU


def test_without_a_gpu_nothing_is_measured_or_written(bench, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    before = sorted(tmp_path.rglob("*"))
    for arguments in ([], ["--record"], ["--search"]):
        bench.main(arguments)
        said = capsys.readouterr().out
        assert said == "nothing was measured: torch finds no GPU here\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interpreter_or_an_old_gpu_is_no_gpu(bench, monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(language, "INSTALLED", False)
    assert bench.obstacle() == "Triton is not installed"
    monkeypatch.setattr(language, "INSTALLED", True)
    monkeypatch.setattr(language, "INTERPRETED", True)
    assert "TRITON_INTERPRET is set" in bench.obstacle()
    monkeypatch.setattr(language, "INTERPRETED", False)
    assert bench.obstacle() == "Tesla T4 does not multiply bfloat16"
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (8, 0))
    assert bench.obstacle() is None


# --------------------------------------------------------------------------- The search

SMALL = language.Tiles(m=16, n=32, k=32, warps=4)
WIDE = language.Tiles(m=16, n=64, k=64, warps=4)


@interpreted
def test_the_search_puts_the_fastest_blocks_first(bench):
    found = bench.search(tiny(bench, DENSE), CPU, Clock(2.0, 1.0), [SMALL, WIDE])
    assert found == [(1.0, WIDE), (2.0, SMALL)]


@interpreted
def test_the_search_leaves_out_blocks_that_do_not_fit(bench, monkeypatch):
    sound = language.launch

    def launch(kernel, grid, arguments, constants, warps=4, stages=1):
        if constants["BN"] == WIDE.n:
            raise language.triton.OutOfResources(300_000, 232_448, "shared memory")
        sound(kernel, grid, arguments, constants, warps, stages)

    monkeypatch.setattr(lora, "launch", launch)
    found = bench.search(tiny(bench, DENSE), CPU, Clock(2.0), [WIDE, SMALL])
    assert found == [(2.0, SMALL)]


@interpreted
def test_blocks_with_a_wrong_product_stop_the_search(bench):
    _, plant, *where = WRONG_KERNELS["h without its scale"]
    with plant(*where), pytest.raises(RuntimeError, match=r"Tiles\(m=16, n=32.* ours"):
        bench.search(tiny(bench, DENSE), CPU, never, [SMALL])


def test_the_space_has_the_size_that_is_spoken_of_and_the_shipped_blocks(bench):
    assert len(set(bench.space(1))) == len(bench.space(16)) == 36
    assert len(set(bench.space(17))) == len(bench.space(4096)) == 56
    assert "the 36 or 56 ways" in bench.PAGE.read_text("utf-8")
    for shape in bench.FORWARD:
        case = bench.Case(DENSE, *shape)
        assert bench.shipped(case) in bench.space(case.m)


@interpreted
def test_the_search_says_what_is_shipped_and_what_is_faster(bench, monkeypatch, capsys):
    at_a_gpu(bench, monkeypatch)
    shape = (16, 128, 64)
    monkeypatch.setattr(bench, "FORWARD", (shape,))
    monkeypatch.setattr(bench, "space", lambda m: [SMALL])
    bench.main(["--search"])
    head, now, best = capsys.readouterr().out.splitlines()
    assert head == "LoRA, forward: 16 x 128 → 64"
    shipped = bench.shipped(bench.Case(DENSE, *shape))
    assert now == f"  shipped    4.000 ms  {shipped}"
    assert best == f"  fastest    1.000 ms  {SMALL}"


# ------------------------------------------------------------------------- Planted bugs


def nan_is_no_value(bench):
    nothing = {"a": lambda: (torch.tensor([float("nan")]),)}
    with pytest.raises(RuntimeError):
        bench.check("x", bench.Rivals(lambda: (torch.ones(1),), nothing))


def failure(law, bench) -> type | None:
    """What the law fails with: `pytest.raises` has an exception of its own."""
    try:
        law(bench)
    except (AssertionError, pytest.fail.Exception) as error:
        return type(error)
    return None


BUGS = {
    "NaN passes": ("check", "not error <= CLOSE", "error > CLOSE", nan_is_no_value),
    "only y is checked": (
        *("forward_and_backward", "*torch.autograd.grad(y, leaves, dy)", "y"),
        a_wrong_kernel_is_not_timed,
    ),
    "nothing is checked": (
        *("measured", "check(case, rivals)", "{}"),
        a_wrong_kernel_is_not_timed,
    ),
    "ratios of the other clock": (
        *("timed", "[lap[which] for lap", "[lap['wall'] for lap"),
        the_record_has_ratios_by_round,
    ),
    "the fastest lap for the median": (
        *("middle", "median(laps)", "min(laps)"),
        the_record_has_ratios_by_round,
    ),
    "another work's figures": (
        *("cell", 'row["case"] == asdict(case)', 'row is not result["rows"][0]'),
        a_cell_is_the_ratio_its_spread_and_our_time,
    ),
    "their time": (
        *("cell", 'row["seconds"][OURS]', 'row["seconds"][other]'),
        a_cell_is_the_ratio_its_spread_and_our_time,
    ),
}


@interpreted
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bench, bug):
    name, right, wrong, law = BUGS[bug]
    assert failure(law, bench) is None
    with planted(getattr(bench, name), right, wrong):
        assert failure(law, bench)


@interpreted
def test_a_ratio_is_ours_to_theirs(bench):
    where = bench.side_by_side.ratios, "a / b for a, b", "b / a for a, b"
    with planted(*where):
        assert failure(the_record_has_ratios_by_round, bench)
