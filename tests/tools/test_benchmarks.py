"""What the benchmarks share, its guard against a busy machine, and small runs."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planting import each_is_caught, law

from peft_from_scratch.common.provenance import processor
from peft_from_scratch.serving.requests import Piece

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch, tmp_path):
    """They import each other as scripts do, and write to out/ where they are run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    import side_by_side

    monkeypatch.setattr(side_by_side, "START", 0.0)
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path / "results")


TIMES = {"a": [(1.0, 2.0), (4.0, 4.0), (2.0, 2.0)], "b": [(2.0, 1.0)] * 3}


def test_a_ratio_compares_two_times_of_one_round():
    import side_by_side

    first, second = side_by_side.table(TIMES, "a")
    assert first["ratio"] == first["low"] == first["high"] == 1
    assert second == {
        "name": "b",
        "seconds": 2.0,
        "ratio": 1.0,  # of 2, 0.5 and 1
        "low": 0.5,
        "high": 2.0,
        "processor_ratio": 0.5,  # of 0.5, 0.25 and 0.5
    }
    head, *rows = side_by_side.lines([first, second], 3)
    assert head.startswith("median of 3 rounds")
    assert rows[1].split() == ["b", "2.000", "1.00", "0.50", "2.00", "0.50"]
    assert side_by_side.verdict(1.0, 1.0).endswith("at most 1.00: reached")
    assert side_by_side.verdict(1.1, 1.0).endswith("missed")


def busy(monkeypatch, a_core):
    """As if the machine had this load for each core when the benchmark started."""
    import side_by_side

    monkeypatch.setattr(side_by_side.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(side_by_side, "START", 4 * a_core)
    return side_by_side


@law
def a_busy_machine_records_nothing_unasked(monkeypatch):
    """Above 0.5 a core, not at it; and only where a record was asked for."""
    for a_core, recorded in ((0.0, True), (0.5, True), (0.51, False), (3.0, False)):
        module = busy(monkeypatch, a_core)
        module.parsed(module.parser("A benchmark."), [])
        refused = pytest.raises(SystemExit) if not recorded else nullcontext()
        with refused:
            module.parsed(module.parser("A benchmark."), ["--record"])
        asked = module.parsed(module.parser("A."), ["--record", "--allow-load"])
        assert asked.record and asked.allow_load


def test_the_refusal_says_how_busy_and_what_to_do(monkeypatch, capsys):
    module = busy(monkeypatch, 0.75)
    with pytest.raises(SystemExit):
        module.parsed(module.parser("A benchmark."), ["--record"])
    said = " ".join(capsys.readouterr().err.split())
    assert "the machine is busy, a load of 3.0 on 4 cores, 0.75 a core" in said
    assert "nothing is recorded above 0.5. Wait until it is idle, or record" in said
    assert "ratios of processor time with --allow-load" in said


@law
def beside_other_work_the_ratio_is_of_processor_time(monkeypatch):
    for a_core, clock, ratio in ((0.2, "wall", 1.0), (2.0, "processor", 0.5)):
        module = busy(monkeypatch, a_core)
        _, second = module.table(TIMES, "a")
        assert module.clock() == clock
        assert (second["ratio"], second["processor_ratio"]) == (ratio, 0.5)
        assert second["seconds"] == (2.0 if clock == "wall" else 1.0)
        said = module.lines([second], 3)[-1]
        assert ("all of these times are processor time" in said) == (a_core > 0.5)


@law
def a_record_says_under_which_conditions_it_was_made(monkeypatch):
    module = busy(monkeypatch, 2.0)
    monkeypatch.setattr(module.os, "getloadavg", lambda: (9.126, 0, 0), raising=False)
    provenance = {"machine": "A, 4 cores, 1 GiB"}
    module.write({"benchmark": "x", "provenance": provenance}, record=True)
    (file,) = module.RESULTS.glob("x-*.json")
    assert json.loads(file.read_text())["conditions"] == {
        "clock": "processor",
        "load_before": 8.0,
        "load_after": 9.13,
        "cores": 4,
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }
    module.write({"benchmark": "y"}, record=True, place="a GPU")
    (file,) = module.RESULTS.glob("y-a-gpu.json")
    assert json.loads(file.read_text())["conditions"]["clock"] == "wall"


def test_a_system_without_a_load_is_believed(monkeypatch):
    import side_by_side

    monkeypatch.delattr(side_by_side.os, "getloadavg", raising=False)
    assert side_by_side.load() is None
    monkeypatch.setattr(side_by_side, "START", None)
    assert side_by_side.clock() == "wall"
    asked = side_by_side.parsed(side_by_side.parser("A benchmark."), ["--record"])
    assert asked.record


def guards():
    sys.path.insert(0, str(FOLDER))
    import side_by_side

    return {
        "the load of all cores": (
            side_by_side.clock,
            "BUSY * os.cpu_count()",
            "BUSY * 100",
            a_busy_machine_records_nothing_unasked,
        ),
        "half a load is too much": (
            side_by_side.clock,
            "> BUSY",
            ">= BUSY",
            a_busy_machine_records_nothing_unasked,
        ),
        "nothing is refused": (
            side_by_side.parsed,
            "asked.record and clock() == PROCESSOR",
            "False",
            a_busy_machine_records_nothing_unasked,
        ),
        "refused although it was asked for": (
            side_by_side.parsed,
            " and not asked.allow_load",
            "",
            a_busy_machine_records_nothing_unasked,
        ),
        "the wall's ratio on a busy machine": (
            side_by_side.table,
            ".index(clock())",
            ".index(WALL)",
            beside_other_work_the_ratio_is_of_processor_time,
        ),
        "a GPU's times are called the processor's": (
            side_by_side.write,
            "WALL if elsewhere else clock()",
            "clock()",
            a_record_says_under_which_conditions_it_was_made,
        ),
        "the load of afterwards stands for that of before": (
            side_by_side.conditions,
            '"load_before": START',
            '"load_before": load()',
            a_record_says_under_which_conditions_it_was_made,
        ),
    }


test_a_planted_bug_is_caught = each_is_caught(
    guards(), (AssertionError, SystemExit, pytest.fail.Exception)
)


def test_the_candidates_take_turns_and_the_warm_up_does_not_count():
    import side_by_side

    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "xyz"}
    times = side_by_side.take_turns(steps, 7, torch.device("cpu"))
    assert "".join(calls) == "xyz" * (7 + side_by_side.WARM_UP)
    assert [len(laps) for laps in times.values()] == [7, 7, 7]


@pytest.mark.parametrize("wrong", [["--rounds", "6"], ["--threads", "0"]])
def test_too_few_rounds_or_threads_are_refused(wrong, capsys):
    import side_by_side

    with pytest.raises(SystemExit):
        side_by_side.parsed(side_by_side.parser("A benchmark."), wrong)
    assert "--rounds: at least 7; --threads: at least 1" in capsys.readouterr().err


def test_the_paged_benchmark_runs_and_records_nothing_unasked(tmp_path, capsys):
    import paged_adamw

    before = sorted(FOLDER.rglob("*"))
    paged_adamw.main(["--millions", "1", "--rounds", "7"])
    said = capsys.readouterr().out
    assert "written to out/paged_adamw.json" in said
    assert "paged, a quarter, target, at most 2.00: " in said
    assert "paged, fused, a quarter, target, at most 3.00: " in said
    result = json.loads((tmp_path / "out" / "paged_adamw.json").read_text())
    assert result["parameters"] == 1024 * 1024 + 1024
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "torch, foreach" and len(names) == 11
    assert result["rows"][0]["ratio"] == 1
    rivals = [row["name"] for row in result["over_fused"]]
    assert rivals[0] == "torch, fused" and len(rivals) == 5
    assert result["over_fused"][0]["ratio"] == 1
    assert [p for p in sorted(FOLDER.rglob("*")) if "__pycache__" not in str(p)] == [
        p for p in before if "__pycache__" not in str(p)
    ]


def test_unequal_work_is_not_timed():
    import paged_adamw

    for name in ("paged, a half", "paged, fused, a half"):
        made = paged_adamw.optimizers(1)
        made[name].param_groups[0]["lr"] = 2e-3
        with pytest.raises(RuntimeError, match=f"{name}: weights differ"):
            paged_adamw.check_equal_work(made)


def test_the_nf4_benchmark_checks_the_bits_first(tmp_path, capsys, monkeypatch):
    import nf4 as benchmark

    benchmark.main(["--side", "128", "--rounds", "7"])
    said = capsys.readouterr().out
    assert "codes, constants and values have the same bits" in said
    assert said.count("target, at most") == 2
    result = json.loads((tmp_path / "out/nf4.json").read_text())
    assert [row["name"] for row in result["quantize"]][:2] == ["bitsandbytes", "ours"]
    right = benchmark.nf4.dequantize
    monkeypatch.setattr(benchmark.nf4, "dequantize", lambda *a, **k: -right(*a, **k))
    with pytest.raises(RuntimeError, match="dequantized values differ"):
        benchmark.measure(128, 7)


def test_the_qlora_benchmark_compares_equal_work(tmp_path, capsys, monkeypatch):
    import qlora_step as benchmark

    monkeypatch.setattr(benchmark, "resident", lambda base, name: None)
    benchmark.main(["--model", "tiny", "--rounds", "7"])
    assert "peak over LoRA's: ours -" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/qlora_step.json").read_text())
    held = result["memory"]
    assert held["QLoRA"]["peak"] <= held["QLoRA on bitsandbytes"]["peak"]
    assert held["QLoRA"]["weights"] < 0.5 * held["LoRA"]["weights"]
    decoded = result["decoding"]
    assert list(decoded["by_rows"]) == ["1", "16"]
    for tables in decoded["by_rows"].values():
        names = [row["name"] for row in tables["rows"]]
        assert names == [benchmark.BASE, benchmark.THEIRS, "QLoRA", benchmark.KEPT]
        assert tables["over_bitsandbytes"][0]["ratio"] == 1
    assert 0 < decoded["unpacked_bytes"] < held["LoRA"]["weights"]
    other = benchmark.lora.inject
    monkeypatch.setitem(benchmark.INJECT, benchmark.OURS, other)
    with pytest.raises(RuntimeError, match="cannot be compared"):
        benchmark.measure("tiny", 7)


def test_the_lora_benchmark_compares_equal_work_in_both_dtypes(tmp_path, monkeypatch):
    import lora_step as benchmark

    benchmark.main(["--model", "tiny", "--rounds", "7"])
    result = json.loads((tmp_path / "out/lora_step.json").read_text())
    assert [case["dtype"] for case in result["cases"]] == ["float32", "bfloat16"]
    for case in result["cases"]:
        names = [row["name"] for row in case["rows"]]
        assert names[0] == "peft" and names[-1] == "ours" and len(names) == 4
    scale = benchmark.ALPHA
    monkeypatch.setattr(
        benchmark.lora,
        "inject",
        lambda model, r, alpha, inject=benchmark.lora.inject: inject(
            model, r=r, alpha=1.1 * scale
        ),
    )
    with pytest.raises(RuntimeError, match="cannot be compared"):
        benchmark.measure("tiny", 7, ["float32"])


def test_the_benchmark_of_many_adapters_compares_equal_work(tmp_path, monkeypatch):
    import many_adapters as benchmark

    benchmark.main(["--model", "tiny", "--rounds", "7"])
    result = json.loads((tmp_path / "out/many_adapters.json").read_text())
    names = [row["name"] for row in result["steps"]]
    assert names[0] == benchmark.BASE and len(names) == 1 + 2 * len(benchmark.COUNTS)
    assert [row["name"] for row in result["ranks"]] == list(benchmark.RANKS)
    assert 0 < result["apart"] < 1e-5
    monkeypatch.setattr(benchmark, "COUNTS", (4,))
    steps = {"ours, 4 adapters": lambda: torch.ones(3)}
    steps["PEFT, 4 adapters"] = lambda: torch.full((3,), 0.999)
    with pytest.raises(RuntimeError, match="logits differ"):
        benchmark.check_equal(steps)


def test_the_benchmark_of_traffic_answers_every_request(tmp_path, monkeypatch):
    import serving_traffic as benchmark

    monkeypatch.setattr(benchmark, "MEMORY", 3)
    benchmark.main(["--model", "tiny", "--requests", "12", "--adapters", "1,8"])
    result = json.loads((tmp_path / "out/serving_traffic.json").read_text())
    assert [(c["adapters"], c["traffic"]) for c in result["cells"]] == [
        (1, "uniform"),
        (8, "uniform"),
        (8, "Zipf"),
        (6, "uniform"),  # twice as many as fit
    ]
    assert all(cell["tokens_a_second"] > 0 for cell in result["cells"])
    assert result["switch"]["in memory"] < result["switch"]["on disk"]
    names = benchmark.traffic("abcdefgh", benchmark.ZIPF, 3000)
    assert 1.5 < names.count("a") / names.count("b") < 2.7
    engine = SimpleNamespace(turn=lambda: True)
    engine.submit = lambda request, listen: listen(Piece(reason="error"))
    with pytest.raises(RuntimeError, match="not all requests were answered"):
        benchmark.answered(engine, [None])


def test_the_rounding_benchmark_finds_what_two_roundings_lose(tmp_path, monkeypatch):
    import rounding as benchmark

    monkeypatch.setattr(benchmark, "SHAPES", [(64, 64, 512)])
    benchmark.main(["--model", "tiny", "--rounds", "7", "--steps", "2"])
    result = json.loads((tmp_path / "out/rounding.json").read_text())
    small = {row["name"]: row["shares"][0] for row in result["projections"][0]["rows"]}
    assert small[benchmark.PLAIN] == 0 < small[benchmark.TWICE] < 0.2
    for name in (benchmark.OURS, benchmark.WIDE, benchmark.ONE, benchmark.FLOAT32):
        assert 0.95 < small[name] < 1.05, name
    gained = {
        row["series"]: row["losses"][0] - row["losses"][-1]
        for row in result["curves"]
        if row["rate"] == 1e-4
    }
    full = gained.pop(benchmark.FULL)
    assert gained[benchmark.OUR_CURVE] > 0.9 * full
    assert gained[benchmark.EQUATION] < 0.5 * full > gained[benchmark.PEFT]
    assert "<svg" in (tmp_path / "out/rounding.svg").read_text()


def test_the_benchmark_of_long_sequences_compares_equal_work(monkeypatch):
    import long_sequences as benchmark

    sizes, shapes = (2, 33, 8), ((2,), (32,))
    result = benchmark.measure(benchmark.RANDOM, 7, ["float32"], sizes, 257, shapes)
    (case,) = result["cases"]
    names = [row["name"] for row in case["times"]]
    assert names == list(benchmark.WAYS) and case["times"][0]["ratio"] == 1
    for each in case["bytes"].values():
        assert each["measured"] == pytest.approx(each["predicted"], rel=0.05)
    if limit := result["limit"]:
        assert "memory" in limit["outcomes"][benchmark.PLAIN]["died"]
        assert len(limit["outcomes"][benchmark.BOTH]["losses"]) == benchmark.STEPS
        assert limit["apart"] < 1e-5
    (cell,) = result["depth"]
    held = cell["bytes"]
    assert held["all"] < held["every second"] < held["none"]
    padded = [c["share"] for c in result["padding"] if c["way"] == "padded"]
    assert padded[0] > padded[1] > padded[2] and padded[3] > padded[4] > padded[5]
    text = benchmark.report(result)
    assert "chunks, target, at most 1.00: " in text and "16 buckets" in text
    right = benchmark.loss_of
    monkeypatch.setattr(
        benchmark, "loss_of", lambda chunk: lambda *a: right(chunk)(*a) * (chunk or 1)
    )
    with pytest.raises(RuntimeError, match="chunks: loss or gradients differ"):
        benchmark.step_times(benchmark.RANDOM, "float32", 7, sizes)
