"""The Makefile's set-up of .venv/, with a stand-in for Python: it installs nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READY, MODEL_READY = ".venv/ready", ".venv/model-ready"

# Stands in for Python: writes down each call, and does what the set-up looks at.
PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$*" in
    *version_info*) test -z "$OLD" ;;
    --version) echo 'Python 3.9.1' ;;
    '-m venv --clear .venv')
        rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    '-m pip install --constraint'*) test -z "$FAIL" ;;
esac
"""


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """set_up(**environment): run the set-up; (exit status, output, calls)."""
    if not shutil.which("make"):
        pytest.skip("there is no make here")
    for variable in ("CPU", "TORCH_INDEX", "MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(**environment):
        for variable in ("OLD", "FAIL", "CPU"):
            monkeypatch.setenv(variable, environment.get(variable, ""))
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        command = ["make", "PYTHON=./python", MODEL_READY]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        made = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stdout, made

    return run


def test_set_up_happens_once_and_again_after_a_change(set_up, tmp_path):
    status, output, calls = set_up()
    assert status == 0 and "Set-up, once" in output and "Set-up is done" in output
    install, model = calls[-2:]
    assert "constraints.txt" in install
    assert "[test,lab,reference,kernels,serve]" in install
    assert "prepare" in model
    assert not any("index-url" in call for call in calls)
    assert set_up()[2] == []
    (tmp_path / "constraints.txt").touch()
    assert install in set_up()[2]


def test_a_set_up_that_failed_does_not_look_finished(set_up, tmp_path):
    status, _, calls = set_up(FAIL="1")
    assert status != 0 and "prepare" not in calls[-1]
    assert not (tmp_path / READY).exists() and not (tmp_path / MODEL_READY).exists()
    status, _, calls = set_up()
    assert status == 0
    assert not any("venv" in call for call in calls), "what was there could be used"


def test_a_broken_environment_is_made_anew(set_up, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(tmp_path / "gone")
    status, _, calls = set_up()
    assert status == 0 and "-m venv --clear .venv" in calls


def test_cpu_takes_torch_alone_from_the_index_of_cpu_builds(set_up):
    _, _, calls = set_up(CPU="1")
    (torch,) = [call for call in calls if "index-url" in call]
    assert re.search(r"--no-deps .*/whl/cpu .*constraints.txt torch$", torch)
    assert calls.index(torch) == len(calls) - 3


def test_a_python_that_is_too_old_is_refused_in_a_sentence(set_up, tmp_path):
    status, output, _ = set_up(OLD="1")
    assert status != 0 and not (tmp_path / ".venv").exists()
    assert "3.11 or later" in output and "3.9.1" in output and "PYTHON=" in output


@pytest.fixture
def compared(set_up, tmp_path):
    """compared(*variables): the arguments that `make compare` hands over."""
    set_up()

    def run(*variables):
        (tmp_path / "calls").unlink(missing_ok=True)
        echo = tmp_path / ".venv" / "bin" / "python"
        echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        command = ["make", "compare", *variables]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[2:]

    return run


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ((), []),
        (("DATA=my rows.jsonl",), ["--data", "my rows.jsonl"]),
        (
            ("DATA=a.jsonl", "SCORER=b c.py"),
            ["--data", "a.jsonl", "--scorer", "b c.py"],
        ),
        (("SEEDS=3", "ROWS=300"), ["--seeds", "0,1,2", "--rows", "300"]),
        (("SEEDS=1",), ["--seeds", "0"]),
        (("SEEDS=12",), ["--seeds", ",".join(map(str, range(12)))]),
        (("SEEDS=many",), ["--seeds", ""]),  # which compare refuses
    ],
)
def test_the_variables_of_a_comparison_reach_it(compared, variables, options):
    assert compared(*variables) == ["compare", *options]
