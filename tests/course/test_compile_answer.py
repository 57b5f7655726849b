"""A learner's kernel for a GPU that is not here: its source, and what is refused."""

import json
import linecache
import subprocess

import pytest

from peft_from_scratch.course import compile_answer
from peft_from_scratch.course.checks import triton_lora_kernel as checks
from peft_from_scratch.course.compile_answer import Refused, compiled, source_of

CELL = """\
import triton
import triton.language as tl
from peft_from_scratch.kernels.language import load as lade
DEPTH = tl.constexpr(3)
TIMES = 2

@triton.jit
def helper(x):
    return x * TIMES

@triton.jit
def my_lora(x, BM: tl.constexpr):
    return helper(lade(x, 0, 0, True))
"""


def cell(source):
    """The names that a notebook's cell defines; IPython too keeps its lines."""
    name, names = "cell 7", {"__name__": "__main__"}
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    exec(compile(source, name, "exec"), names)
    return names


def test_the_source_has_all_that_the_kernel_uses_and_no_more():
    names = cell(CELL)
    source = source_of(names["my_lora"])
    assert source.index("TIMES = 2") < source.index("def helper")
    assert source.index("def helper") < source.index("def my_lora")
    assert "from peft_from_scratch.kernels.language import load as lade" in source
    assert "import triton.language as tl" in source and "DEPTH" not in source


def answered(monkeypatch, answer, stderr=""):
    """As if the second process had written `answer`; None: nothing."""

    def run(command, **_):
        if answer is not None:
            folder = compile_answer.Path(command[3])
            (folder / compile_answer.RESULT).write_text(json.dumps(answer))
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(compile_answer.subprocess, "run", run)
    return compiled(cell(CELL)["my_lora"])


def test_what_compiles_is_told(monkeypatch):
    facts = {"sm_80": {"registers": 1}, "sm_90": {"registers": 2}}
    assert answered(monkeypatch, facts) == facts


@pytest.mark.parametrize(
    "reason, remedy",
    [
        ("Both operands must be same dtype. Got fp32 and bf16", "rounded(low * scale"),
        ("Input shapes should have M >= 1, N >= 1 and K >= 16", "at least 16"),
        ("Cannot access global variable TIMES from within @jit", "tl.constexpr"),
        ("anything else", "does not know it"),
    ],
)
def test_a_refusal_names_the_target_the_line_and_the_remedy(
    monkeypatch, reason, remedy
):
    answer = {"target": "sm_90", "line": "total = dot(a, b)", "reason": reason}
    with pytest.raises(Refused) as caught:
        answered(monkeypatch, answer)
    text = str(caught.value)
    assert all(part in text for part in ("sm_90, the H100", "total = dot(a, b)"))
    assert reason in text and remedy in text.partition("Likely mistake: ")[2]


def test_a_process_that_fails_is_told(monkeypatch):
    with pytest.raises(RuntimeError, match="that compiles has failed: no memory"):
        answered(monkeypatch, None, "Traceback\nno memory\n")


def test_the_process_does_not_interpret(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kept = compile_answer._environment("/folder")
    assert "TRITON_INTERPRET" not in kept and kept["TRITON_CACHE_DIR"] == "/folder"


def test_the_lessons_own_kernel_compiles_without_a_spill():
    facts = compiled(checks.our_lora)
    assert set(facts) == set(compile_answer.TARGETS)
    for target, fact in facts.items():
        assert 0 < fact["registers"] <= 255 and fact["spilled"] == 0, target
        assert all("bf16" in name for name in fact["instructions"])
        assert fact["instructions"], target


def test_a_number_from_outside_is_refused_with_its_remedy():
    with pytest.raises(Refused, match=r"constexpr") as caught:
        compiled(cell(NUMBER)["my_lora"])
    assert "tl.constexpr argument" in str(caught.value)


NUMBER = """\
import triton
import triton.language as tl
TIMES = 2

@triton.jit
def my_lora(x, W, A, B, y, m_size, n_size, k_size, r, scale, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr,
            SWEEP: tl.constexpr):
    tl.store(y[0], TIMES * 1.0)
"""
