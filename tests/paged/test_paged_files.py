"""The file behind a paged optimizer: gone at any end, reserved, larger than memory."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from full_disk import files_of_at_most
from torch import nn
from two_optimizers import (
    PAGE,
    assert_equal_bits,
    assert_equal_states,
    feed,
    paged,
    parameters,
)

from peft_from_scratch import PagedAdamW
from peft_from_scratch.paged import stores
from peft_from_scratch.paged.stores import FileStore, reserve

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

LIVES = """
import os, signal, sys
import torch
from peft_from_scratch.paged import PagedAdamW

p = torch.nn.Parameter(torch.zeros(100_000))
p.grad = torch.ones_like(p)
optimizer = PagedAdamW([p], budget_bytes=1 << 17, directory=sys.argv[1])
optimizer.step()
saved = optimizer.state_dict()
assert os.listdir(sys.argv[1]) == [], "the file has a name"
print("alive", flush=True)
end = sys.argv[2]
if end == "SIGKILL":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "error":
    raise KeyError("an error")
"""


@pytest.mark.parametrize("end", ["exit", "error", "SIGKILL"])
def test_no_end_leaves_a_file_behind(end, tmp_path):
    command = [sys.executable, "-c", LIVES, str(tmp_path), end]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    codes = {"exit": 0, "error": 1, "SIGKILL": -signal.SIGKILL}
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == codes[end]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_the_mapping_goes_with_the_optimizer_and_with_the_state_dict(tmp_path):
    def mapped():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line.endswith("(deleted)") for line in lines if str(tmp_path) in line]

    _, optimizer = trained(directory=tmp_path)
    arena = weakref.ref(optimizer.pager.arena.untyped_storage())
    saved = optimizer.state_dict()
    assert mapped() == [True, True]
    del optimizer
    assert mapped() == [True] and arena() is None
    del saved
    assert mapped() == []


def blocks(file):
    """Bytes of the disk that the file has."""
    return os.fstat(file.fileno()).st_blocks * 512


def test_the_blocks_are_reserved_before_anything_is_written(tmp_path):
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        reserve(file, 3_000_001)
        assert blocks(file) >= 3_000_001
        assert os.fstat(file.fileno()).st_size == 3_000_001


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_blocks_cannot_be_reserved_zeros_are_written(
    number, tmp_path, monkeypatch
):
    if number is None:  # macOS and Windows have no such call
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", failing(number), raising=False)
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        reserve(file, 3_000_001)
        assert blocks(file) >= 3_000_001
        assert os.fstat(file.fileno()).st_size == 3_000_001
    store = FileStore(1000, tmp_path)
    assert store.words.count_nonzero() == 0 and len(store.words) == 1000


def failing(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def trained(pages=5, **options):
    ps = parameters()[:6]
    optimizer = paged(ps, pages, **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        feed([ps], generator, skip=0)
        optimizer.step()
    return ps, optimizer


def test_a_full_disk_leaves_the_optimizer_as_it_was(tmp_path, monkeypatch):
    ps, optimizer = trained(directory=tmp_path)
    twin, other = trained()
    saved, table = optimizer.state_dict(), optimizer.page_table()
    more = {"params": [nn.Parameter(torch.ones(1000))]}
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC), raising=False)
        with pytest.raises(OSError) as error:
            PagedAdamW(more["params"], budget_bytes=1 << 20, directory=tmp_path)
        assert error.value.errno == errno.ENOSPC
        for part in ("a file of 8000 bytes", str(tmp_path), "bytes free", "directory="):
            assert part in str(error.value)
        with pytest.raises(OSError, match="No space left"):
            optimizer.add_param_group(dict(more))
        with pytest.raises(OSError, match="No space left"):
            optimizer.load_state_dict(saved)
        with pytest.raises(OSError, match="No space left"):
            optimizer.state_dict()
    assert len(optimizer.param_groups) == 1 and optimizer.page_table() == table
    assert_equal_states(optimizer.state_dict(), saved)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        feed([ps, twin], generator)
        optimizer.step()
        other.step()
    assert_equal_bits(ps, twin)
    optimizer.add_param_group(more)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_file_that_the_system_does_not_allow_is_an_oserror(
    zeros, tmp_path, monkeypatch
):
    """No stand-in: the system itself refuses, at the call and at the write."""
    if zeros:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    p = nn.Parameter(torch.zeros(1_000_000))
    with files_of_at_most(1 << 20), pytest.raises(OSError) as error:
        PagedAdamW([p], budget_bytes=1 << 20, directory=tmp_path)
    assert error.value.errno == errno.EFBIG
    assert "a file of 8000000 bytes" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        paged(parameters(), directory=tmp_path / "nowhere")


def test_states_are_in_the_file_and_not_in_memory(monkeypatch):
    """One store a group, of exactly the words of its pages; and one a state dict."""
    made = []

    class Watched(FileStore):
        def __init__(self, words, directory):
            made.append(words)
            super().__init__(words, directory)

    monkeypatch.setattr("peft_from_scratch.paged.optimizer.FileStore", Watched)
    monkeypatch.setattr("peft_from_scratch.paged.states.FileStore", Watched)
    ps = [nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(7))]
    optimizer = paged(ps, 2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(100))]})
    assert made == [1000 + 7, 100]  # two float32 to a word
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    assert made == [1000 + 7, 100, 1000 + 2 * 4 + 100]
    moments = saved["state"][0]["exp_avg"], saved["state"][2]["exp_avg_sq"]
    assert len({m.untyped_storage().data_ptr() for m in moments}) == 1
    assert optimizer.pager.arena.nbytes == 2 * PAGE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA")
def test_states_beyond_the_memory_limit_train_with_the_bits_of_torch():
    """benchmarks/beyond_memory.py, half as large: torch's AdamW dies, ours does not."""
    command = [sys.executable, str(ROOT / "benchmarks" / "beyond_memory.py")]
    command += ["--layers", "8", "--budget", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    first, free, limited, ours, counted = done.stdout.splitlines()
    assert "states 64 MiB; room beside weights and gradients 32 MiB" in first
    assert free.startswith("torch, no limit finished")
    assert limited.startswith("torch           died: ")
    assert "Memory" in limited or "memory" in limited
    assert ours.startswith("paged           finished") and ours.endswith("same weights")
    assert "64 MiB of states in a file, at most 2.0 MiB of them in the arena" in counted


def test_the_free_bytes_of_an_unknown_folder_are_left_out():
    assert stores._free("/there/is/no/such/folder") == ""
