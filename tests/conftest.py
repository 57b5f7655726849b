"""What every test stands on: fixed seeds, one thread, no model hub, one SmolLM2."""

import os

# Read when Triton is imported: kernels run on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

# Before torch is imported. One thread: two test processes share two cores, and sums
# come out the same on every machine. Offline: a test that asks a hub is a mistake.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import functools
import logging
import random
from pathlib import Path

import architectures
import numpy
import pytest
import torch

from peft_from_scratch import load_model
from peft_from_scratch.ledger import runs

TESTS = Path(__file__).parent

# At import it asks for a package that would fetch kernels from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config, items):
    """Tests get the markers of their folders, and run in the markers' order."""
    rooms = [line.partition(":")[0] for line in config.getini("markers")]
    rooms = [room for room in rooms if (TESTS / room).is_dir()]
    for item in items:
        for folder in item.path.relative_to(TESTS).parts[:-1]:
            if folder in rooms:
                item.add_marker(folder)
    first = {room: place for place, room in enumerate(rooms)}
    items.sort(key=lambda item: first.get(item.path.relative_to(TESTS).parts[0], -1))


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path):
    """An empty folder; the name under which laws ask for one."""
    return tmp_path


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The ledger keeps its runs in a folder of the test's own.

    Where they were made is asked once: it takes two calls of git.
    """
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "runs")
    once = functools.cache(runs.provenance.provenance)
    monkeypatch.setattr(runs.provenance, "provenance", once)


@pytest.fixture(scope="session")
def loaded_smollm2():
    return load_model("smollm2", device="cpu")


@pytest.fixture
def smollm2(loaded_smollm2):
    """(model, tokenizer), shared by all tests of a process: to look at only."""
    model, tokenizer = loaded_smollm2
    before = state(model)
    yield model, tokenizer
    assert state(model) == before, "the test changed smollm2; take fresh_smollm2()"


@pytest.fixture
def fresh_smollm2(loaded_smollm2):
    """fresh_smollm2() is a (model, tokenizer) of the caller's own."""
    model, tokenizer = loaded_smollm2
    return lambda: (copy.deepcopy(model), tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The path of a folder with a random two-layer model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    architectures.build("llama").save_pretrained(folder)
    architectures.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def state(model):
    """What a test could have changed: modules, modes, flags, and any write to a weight.

    `_version` counts the in-place writes to a tensor.
    """
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    parameters = [
        (name, p.data_ptr(), p._version, p.requires_grad, p.grad is None)
        for name, p in model.named_parameters()
    ]
    return modules, parameters
