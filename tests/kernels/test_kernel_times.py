"""The kernels' benchmark, with stand-ins for the GPU and its clock; interpreted.

No time is tested, but what stands around it: which values are checked, and when; what
the record and the page say.
"""

import json
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
GATHERED = "LoRA, 8 adapters"

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
    monkeypatch.setattr(provenance, "device_name", lambda device: GPU)
    return kernel_times


def tiny(bench, work):
    """A case of each work that an interpreter can do; 16 rows, two for an adapter."""
    return bench.Case(work, 0 if work == CODES else 16, 128, 64)


class Clock:
    """Gives out what it was told to, and counts the steps that it was asked about."""

    def __init__(self, *seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self, step):
        said = self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        return said, 0.5, said * 2


def never(step):
    raise AssertionError("the clock ran")


# ------------------------------------------------------------------- Values come first


@interpreted
@pytest.mark.parametrize(
    "work", [DENSE, BOTH_WAYS, CODES, ON_CODES, ON_CODES + " and backward", GATHERED]
)
def test_every_candidate_gives_what_is_exact(bench, work):
    case = tiny(bench, work)
    rivals = case.rivals(CPU)
    names = *bench.WORKS[work].against, bench.OURS
    assert tuple(rivals.steps) == names
    apart = bench.check(case, rivals)
    assert tuple(apart) == names
    assert all(0 < error < bench.CLOSE / 2 for error in apart.values())


def test_these_are_all_works(bench):
    works = {DENSE, BOTH_WAYS, CODES, ON_CODES, ON_CODES + " and backward", GATHERED}
    assert works == set(bench.WORKS) == {case.work for case in bench.CASES}
    assert len(set(bench.CASES)) == len(bench.CASES)


WRONG_KERNELS = {
    "h without its scale": (
        *(DENSE, planted_kernel, lora, "_product"),
        *("rounded(low * scale, dtype)", "rounded(low, dtype)"),
    ),
    "half of dA": (
        *(BOTH_WAYS, planted, lora.gradients),
        *("dA = over_rows(dh, x, A.dtype)", "dA = over_rows(dh, x, A.dtype) / 2"),
    ),
    "the low nibble first": (
        *(CODES, planted_kernel, on_codes, "codes_of"),
        *("tl.join(pair >> 4, pair & 15)", "tl.join(pair & 15, pair >> 4)"),
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
def a_wrong_kernel_stops_it(bench, bug="half of dA"):
    """Even the case before it, whose values are right, is not timed."""
    work, plant, *where = WRONG_KERNELS[bug]
    right = tiny(bench, GATHERED if work == CODES else CODES)
    with plant(*where), pytest.raises(RuntimeError, match="time would mean nothing"):
        bench.measure([right, tiny(bench, work)], 7, CPU, never)


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
    clock = Clock(4, 1, 8, 4, 2, 1, *[3] * 6)
    cases = [tiny(bench, CODES), tiny(bench, ON_CODES)]
    result = bench.measure(cases, 3, CPU, clock)
    assert clock.calls == 12
    return result


@law
@interpreted
def the_record_has_ratios_by_round(bench):
    result = json.loads(json.dumps(measured(bench)))
    assert result["provenance"]["device"] == GPU
    assert result["versions"].keys() == {"triton", "peft", "bitsandbytes"}
    row = result["rows"][0]
    assert row["case"] == {"work": CODES, "m": 0, "d_in": 128, "d_out": 64}
    assert row["seconds"] == {
        "bitsandbytes": {"median": 4, "tenth": 0.5, "ninetieth": 8},
        "ours": {"median": 1, "tenth": 0.5, "ninetieth": 2},
    }
    ratio = row["against"]["bitsandbytes"]
    assert ratio["name"] == "ours"
    assert (ratio["ratio"], ratio["low"], ratio["high"]) == (0.5, 0.25, 0.5)


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
    assert len(lines) == 3 and all("| not measured |" in line for line in lines)

    bench.main([])
    assert "written to out/kernel_times.json" in capsys.readouterr().out
    assert bench.PAGE.read_text("utf-8") == before

    bench.main(["--record"])
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == "kernel_times-imaginary-gpu-9000.json"
    after = bench.PAGE.read_text("utf-8")
    assert GPU in after and "not measured |" not in after
    assert after.count("128 → 64") == 3 and " ms |" in after

    monkeypatch.setattr(bench, "CASES", [*bench.CASES, tiny(bench, GATHERED)])
    at_another = provenance.device_name(CPU).replace("9000", "9001")
    other = json.loads(file.read_text("utf-8"))
    other["provenance"]["device"] = at_another
    file.with_name("kernel_times-other.json").write_text(json.dumps(other))
    bench.main(["--table"])
    head, _, *rows = bench.table(bench.recorded()).splitlines()
    assert head.endswith(f"| {GPU} | {at_another} |")
    assert rows[-1].endswith("| that loop, rows known | not measured | not measured |")
    assert bench.table(bench.recorded()) in bench.PAGE.read_text("utf-8")


@law
@interpreted
def a_cell_is_the_ratio_its_spread_and_our_time(bench):
    result = measured(bench)
    cell = bench.cell(result, tiny(bench, CODES), "bitsandbytes")
    assert cell == "0.50 (0.25 to 0.50), 1e+03 ms"


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
    assert len(set(bench.space(17))) == len(bench.space(4096)) == 48
    assert "the 36 or 48 ways" in bench.PAGE.read_text("utf-8")
    for shape in bench.TRAINING + bench.DECODING:
        case = bench.Case(DENSE, *shape)
        assert bench.shipped(case) in bench.space(case.m)


@interpreted
def test_the_search_says_what_is_shipped_and_what_is_faster(bench, monkeypatch, capsys):
    at_a_gpu(bench, monkeypatch)
    shape = (16, 128, 64)
    monkeypatch.setattr(bench, "TRAINING", (shape,))
    monkeypatch.setattr(bench, "DECODING", ())
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
        a_wrong_kernel_stops_it,
    ),
    "nothing is checked": (
        *("measure", "check(case, rivals) for", "{} for"),
        a_wrong_kernel_stops_it,
    ),
    "ratios of another quantile": (
        *("timed", "lap[0] for", "lap[1] for"),
        the_record_has_ratios_by_round,
    ),
    "a time of another quantile": (
        *("timed", "lap[i] for", "lap[-i] for"),
        the_record_has_ratios_by_round,
    ),
    "another work's figures": (
        *("cell", 'row["case"] == asdict(case)', 'row is result["rows"][-1]'),
        a_cell_is_the_ratio_its_spread_and_our_time,
    ),
    "their time": (
        *("cell", '["seconds"][OURS]', '["seconds"][other]'),
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
