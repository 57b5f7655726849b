"""The doctor: what it calls right, wrong and missing, and that it can be read."""

import json
import re
import shutil
import tomllib
from email.message import Message
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from peft_from_scratch.cli import doctor
from peft_from_scratch.comparison import estimate
from peft_from_scratch.models import minilm, smollm2, wheels

RATES = estimate.Rates(many=80e9, some=50e9, one=8e9)
PROJECT = tomllib.loads(doctor.PYPROJECT.read_text("utf-8"))["project"]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """One whose speed is known: nothing is timed here."""
    monkeypatch.setattr(estimate, "measured_rates", lambda device, dtype: RATES)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_FROM_SCRATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / smollm2.WHEEL.folder


def text_of(findings, mark):
    return [finding.text for finding in findings if finding.mark == mark]


@pytest.mark.parametrize(
    ("version", "mark"),
    [
        ("4.0", "ok"),
        ("5.9.1", "ok"),
        ("5.1.0+cpu", "ok"),
        ("5.0rc1", "ok"),
        ("3.9.9", "WRONG"),
        ("6.0", "WRONG"),
        (None, "WRONG"),
    ],
)
def test_a_needed_package_is_right_inside_its_range_only(version, mark):
    found = doctor.needed_package(Requirement("thing>=4.0,<6"), version)
    assert found.mark == mark
    if mark == "WRONG":
        (command,) = re.findall(r'pip install "(.*)"', found.text)
        assert Requirement(command) == Requirement("thing>=4.0,<6")
        assert (version or "missing") in found.text


def test_an_optional_package_is_never_wrong():
    for version in ("1.0", "3.0", None):
        found = doctor.optional_package(Requirement("thing<2"), version, "its use")
        assert found.mark == ("ok" if version == "1.0" else "note")
        assert "its use" in found.text


def test_every_declared_package_is_looked_at_once():
    listed = [f.text.split()[0] for f in doctor.packages()]
    needed = [Requirement(line).name for line in PROJECT["dependencies"]]
    assert listed == ["Python", *needed, *doctor.OPTIONAL]


def test_an_installed_copy_declares_what_the_checkout_does(monkeypatch, tmp_path):
    python, needed, optional = doctor.declared()
    extras = PROJECT["optional-dependencies"].items()
    lines = [
        f'{r}{" and" if ";" in r else ";"} extra == "{name}"'
        for name, rs in extras
        for r in rs
    ]
    head = Message()
    head["Requires-Python"] = PROJECT["requires-python"]
    monkeypatch.setattr(doctor, "PYPROJECT", tmp_path / "none")
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: [*PROJECT["dependencies"], *lines]
    )
    monkeypatch.setattr(doctor.metadata, "metadata", lambda _: head)
    assert doctor.declared()[:2] == (python, needed)
    assert [r.name for r in doctor.declared()[2]] == [r.name for r in optional]


def test_a_missing_package_ends_in_status_1_and_says_what_to_do(monkeypatch, capsys):
    there = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: None if name == "gguf" else there(name)
    )
    assert doctor.run() == 1
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if line.startswith("  WRONG")]
    assert 'gguf is missing: pip install "gguf' in line
    assert "Estimated costs" not in told, "the rest needs the packages"


def test_a_python_out_of_range_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.4")
    (wrong,) = text_of(doctor.packages(), "WRONG")
    assert wrong == f"Python 3.10.4, where {PROJECT['requires-python']} is needed"


def test_only_needed_packages_count(monkeypatch, capsys):
    there = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: None if name == "peft" else there(name)
    )
    assert doctor.run() == 0
    assert "peft is missing" in capsys.readouterr().out


def test_the_report_has_every_section_and_fits_a_terminal():
    told = doctor.report()
    for title in ("Packages", "This machine", "Base model", "Estimated costs"):
        assert f"{title}\n" in told
    for line in told.splitlines():
        assert len(line) <= 79 or str(wheels.cache_folder()) in line


def test_a_model_that_is_there_is_read_to_the_last_byte(cache):
    cache.mkdir(parents=True)
    (cache / "weights").write_bytes(b"right")
    files = {"weights": (5, sha256(b"right").hexdigest())}
    (cache / wheels.COMPLETE).write_text(json.dumps(files))
    assert doctor.base_model().mark == "ok"
    assert str(cache) in doctor.base_model().text
    (cache / "weights").write_bytes(b"wrong")
    assert doctor.base_model().mark == "note"
    assert "is damaged" in doctor.base_model().text


def test_a_model_that_is_not_there_says_what_having_it_costs(cache):
    found = doctor.base_model()
    assert found.mark == "note"
    for cost in ("0.093 GB", "25 s", "0.54 GB", str(cache)):
        assert cost in found.text


def test_a_model_without_room_is_wrong(cache, monkeypatch):
    usage = shutil.disk_usage(cache.parents[1])._replace(free=3e8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = doctor.base_model()
    assert found.mark == "WRONG"
    for told in ("0.3 GB", "0.75 GB", "PEFT_FROM_SCRATCH_CACHE"):
        assert told in found.text


@pytest.mark.parametrize("fetched", [smollm2, minilm], ids=["smollm2", "minilm"])
def test_the_sizes_that_are_told_are_those_of_what_is_fetched(fetched):
    wheel, folder = fetched.WHEEL, fetched.folder()
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size == pytest.approx(wheel.folder_bytes, rel=0.01)
    assert wheel.work_bytes > wheel.wheel_bytes + wheel.folder_bytes


def test_every_device_is_listed_with_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device: f"GPU at {device}"
    )
    size = SimpleNamespace(total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    listed = {finding.mark: finding.text for finding in doctor.machine()}
    assert listed["cuda:0"] == "GPU at cuda:0; 24 GB"
    assert listed["cuda:1"] == "GPU at cuda:1; 24 GB"
    assert "cores" in listed["cpu"]


@pytest.mark.parametrize("full", [False, True])
def test_a_step_that_does_not_fit_is_told(monkeypatch, full):
    needed, cpu = estimate.step_bytes(8, full=full), torch.device("cpu")
    for there, fits in ((needed, False), (2 * needed, True), (float("nan"), True)):
        monkeypatch.setattr(doctor, "memory_bytes", lambda _, there=there: there)
        text = doctor.training(RATES, cpu, full=full).text
        assert ("--accumulate" not in text) == fits


def test_a_busy_machine_is_told(monkeypatch):
    for load, told in ((99.0, 1), (0.1, 0)):
        monkeypatch.setattr(
            doctor.os, "getloadavg", lambda load=load: (load, 0, 0), raising=False
        )
        assert len(doctor.busy()) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.4234, "0.42 s"),
        (7.0, "7 s"),
        (75.4, "75 s"),
        (97, "1.6 min"),
        (730, "12 min"),
        (5700, "95 min"),
        (11000, "3.1 h"),
    ],
)
def test_durations_have_two_digits_and_a_fitting_unit(seconds, told):
    assert estimate.duration(seconds) == told
