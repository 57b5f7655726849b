"""A disk that takes no more: a sentence, nothing half written, the old files intact."""

import errno
import json
import os
import subprocess
from contextlib import suppress

import pytest
from adapter_files import contents, saved, trained
from architectures import build, byte_tokenizer
from full_disk import files_of_at_most
from invented_comparisons import comparison
from planting import each_is_caught, law
from safetensors import SafetensorError
from small_runs import adapted, recipe

import peft_from_scratch as pfs
from peft_from_scratch.cli.command_line import main
from peft_from_scratch.common import atomic, provenance
from peft_from_scratch.comparison import report
from peft_from_scratch.files import combine
from peft_from_scratch.ledger import runs
from peft_from_scratch.training import checkpoint, state


def quantized():
    model = build("llama")
    pfs.nf4.quantize_model(model)
    return model


def write_checkpoint(folder):
    model, config = adapted(), recipe()
    settings = checkpoint.configuration(model, config, ([], []))
    checkpoint.save(state.new_state(model, config), folder, settings)


def writers(adapter):
    """{what writes: (a function of the folder, what the error says cannot be written)}

    Each writes a file of more than a thousand bytes.
    """
    return {
        "save": (lambda folder: pfs.save(trained(), folder), ""),
        "nf4.save": (lambda f: pfs.nf4.save(quantized(), f, byte_tokenizer()), None),
        "combine": (lambda f: combine.combine([adapter], f, how="concatenation"), ""),
        "a checkpoint": (write_checkpoint, "step-000000"),
        "a comparison": (lambda f: report.write(comparison(), f), "compare.json"),
        "a run": (
            lambda f: runs.write({"experiment": "x"}, {"losses": [1.5] * 999}, f),
            None,
        ),
        "a file": (lambda f: written(f / "file"), "file"),
    }


def written(file):
    with atomic.new_file(file) as new:
        new.write_bytes(b"x" * 2000)


@law
def a_full_disk_is_an_oserror_that_names_the_place_and_leaves_all_as_it_was(folder):
    for name, (write, place) in writers(saved(folder / "adapter")).items():
        for old in (False, True):
            there = folder / name / str(old)
            there.mkdir(parents=True)
            if old and name != "a checkpoint":  # which is never written over
                write(there)
            before = contents(there)
            with files_of_at_most(1000), pytest.raises(OSError) as refused:
                write(there)
            assert contents(there) == before, name
            assert refused.value.errno == errno.EFBIG
            told = str(refused.value)
            assert "File too large" in told and "make room" in told
            assert atomic.TEMPORARY not in told
            if place is not None:
                new = place and not (there / place).exists()
                left = "was not made" if new else "is as it was"
                assert f"{there / place} cannot be written and {left}" in told


# What libraries raise where a system call fails: the words are theirs.
OF_LIBRARIES = (
    SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    Exception("No space left on device (os error 28)"),  # tokenizers
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.ENOSPC, "No space left on device", "/x/.partial-1/file"),
)


@law
def every_librarys_full_disk_is_the_same_error(folder):
    for error in OF_LIBRARIES:
        for write in (atomic.new_file, atomic.new_folder, new_files):
            place = folder / "new" / "it"
            with pytest.raises(OSError) as refused, write(place):
                raise error
            assert refused.value.errno == errno.ENOSPC
            assert refused.value.__cause__ is error
            assert str(refused.value) == (
                f"[Errno 28] No space left on device: {place} cannot be written and "
                "was not made; make room, or name another place"
            )
            assert contents(folder) == {}


def new_files(path):
    return atomic.new_files(path, ("one", "two"))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        OSError("planted"),
        PermissionError(errno.EACCES, "Permission denied", "/x"),
        SafetensorError("Error while deserializing header: header too large"),
        RuntimeError("CUDA out of memory"),
    ],
)
def test_another_error_stays_what_it_is(error, tmp_path):
    with pytest.raises(type(error)) as raised, atomic.new_file(tmp_path / "it"):
        raise error
    assert raised.value is error


def test_an_error_that_is_clear_already_is_not_told_twice(tmp_path):
    with (
        pytest.raises(OSError) as raised,
        atomic.new_folder(tmp_path / "out"),
        atomic.new_file(tmp_path / "in"),
    ):
        raise OF_LIBRARIES[0]
    assert str(raised.value).count("cannot be written") == 1
    assert str(tmp_path / "in") in str(raised.value)


def test_no_room_for_the_temporary_folder_is_the_same_error(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", full)
    place = tmp_path / "file"
    with pytest.raises(OSError, match=f"{place} cannot be written and was not made"):
        written(place)


# The command line


ROWS = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(40)]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_a_train_on_a_full_disk_ends_in_a_sentence_and_goes_on(
    base, data, tmp_path, capsys
):
    """At each file that it writes: answers, checkpoints, adapter, picture, record."""

    def command(out):
        command = ["train", "--data", data, "--base", base, "--out", tmp_path / out]
        return [*map(str, command), "--steps", "6", "--r", "2"]

    def record(out):
        return json.loads((tmp_path / out / "training.json").read_text())

    assert main(command("whole")) == 0
    stopped = []
    for most in (10, 5_000, 30_000):
        capsys.readouterr()
        with files_of_at_most(most):
            assert main(command("out")) == 1
        error = capsys.readouterr().err
        assert error.startswith("OSError: [Errno 27] File too large: ")
        assert "cannot be written and was not made" in error
        assert "Traceback" not in error
        stopped.append(error.split("File too large: ")[1].split(" cannot")[0])
        assert not (tmp_path / "out" / "training.json").exists()
    names = [os.path.relpath(place, tmp_path / "out") for place in stopped]
    assert names[0] == "checkpoints/answers-before.json"
    assert names[1].startswith("checkpoints/step-")
    assert names[2] == "training.png"
    assert main(command("out")) == 0
    assert record("out") == record("whole")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_merge_on_a_full_disk_ends_in_a_sentence(base, tmp_path, capsys):
    model, _ = pfs.load_model(base)
    pfs.lora.inject(model, r=2)
    pfs.save(model, tmp_path / "adapter")
    out = tmp_path / "merged"
    command = ["merge", "--base", base, "--adapter", str(tmp_path / "adapter")]
    for most in (10, 1_000, 10_000):  # config, tokenizer, weights
        with files_of_at_most(most):
            assert main([*command, "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert f"{out} cannot be written and was not made" in error
        assert sorted(contents(tmp_path)) == [
            "adapter",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        ]


@law
def asking_git_writes_nothing_to_the_repository(folder, monkeypatch):
    """On a full disk `git status` would leave a lock that stops every later command."""
    (folder / "file").write_text("one")
    for command in (["init"], ["add", "file"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    os.utime(folder / "file", (1, 1))  # git would note that it is unchanged
    monkeypatch.setattr(provenance, "ROOT", folder)
    before = contents(folder)
    for most in (10, 10**9):
        with files_of_at_most(most), suppress(subprocess.CalledProcessError):
            provenance._git("status", "--porcelain")
    assert contents(folder) == before


BUGS = {
    "folders that were made for it stay": (
        atomic._beside,
        "each.rmdir()",
        "pass",
        every_librarys_full_disk_is_the_same_error,
    ),
    "a limit on files is no full disk": (
        atomic._refusal,
        "error.errno not in FULL",
        "error.errno != errno.ENOSPC",
        a_full_disk_is_an_oserror_that_names_the_place_and_leaves_all_as_it_was,
    ),
    "the error of safetensors is passed on": (
        atomic._refusal,
        "if match is None:",
        "if True:",
        every_librarys_full_disk_is_the_same_error,
    ),
    "an old file is said to be gone": (
        atomic.clear_about_disk,
        "path.exists()",
        "False",
        a_full_disk_is_an_oserror_that_names_the_place_and_leaves_all_as_it_was,
    ),
    "many files are not watched": (
        atomic.new_files,
        "with clear_about_disk(folder), _beside",
        "with _beside",
        every_librarys_full_disk_is_the_same_error,
    ),
    "a folder is not watched": (
        atomic.new_folder,
        "with clear_about_disk(path), _beside",
        "with _beside",
        every_librarys_full_disk_is_the_same_error,
    ),
    "git takes a lock": (
        provenance._git,
        '"GIT_OPTIONAL_LOCKS": "0"',
        '"GIT_OPTIONAL_LOCKS": "1"',
        asking_git_writes_nothing_to_the_repository,
    ),
    "a file is not watched": (
        atomic.new_file,
        "with clear_about_disk(path), _beside",
        "with _beside",
        every_librarys_full_disk_is_the_same_error,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(
    BUGS, (AssertionError, pytest.fail.Exception, SafetensorError)
)
