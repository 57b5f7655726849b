"""The page of faults of other servers: what it names exists."""

import re
from pathlib import Path

import architectures
import pytest
from safetensors.torch import load_file, save_file
from served import adapter_folder

from peft_from_scratch import AdapterPool
from peft_from_scratch.files.adapter_file import WEIGHTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving_faults.md").read_text("utf-8")
ROWS = [row for row in re.findall(r"^\| (.*) \|$", PAGE, re.M) if "github.com" in row]


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`([\w./]+\.py)::(\w+)`", PAGE)
    assert len(named) > 60
    for file, name in named:
        text = (ROOT / "tests" / "serving" / file).read_text("utf-8")
        assert re.search(rf"^def {name}\(", text, re.M), (file, name)


def test_every_fault_has_a_thread_and_a_test_or_says_that_one_is_to_come():
    assert len(ROWS) > 40
    for row in ROWS:
        _, threads, tests = row.split(" | ")
        for name, number, repository, last in re.findall(
            r"\[([\w./-]+)#(\d+)\]\(https://github\.com/([\w./-]+)/\w+/(\d+)\)", threads
        ):
            assert number == last
            short = repository.rpartition("/")[2]
            assert name in (repository, short, "TGI"), (name, repository)
        assert "::" in tests or "to come: " in tests


def test_each_thread_stands_on_the_page_under_one_title():
    titles = {}
    for thread, title in re.findall(
        r'(\[[\w./-]+#\d+\])\([^)]*\) "([^|]*?)"(?:;| \|)', PAGE
    ):
        assert titles.setdefault(thread, title) == title
    assert len(titles) > 60


@pytest.mark.parametrize(
    ("here", "there"), [(".layers.", ".blocks."), ("model.model.", "model.text.model.")]
)
def test_names_that_the_base_lacks_are_refused_and_not_left_out(here, there, folder):
    """Of all modules, or of one: the base would answer in its place."""
    model = architectures.build("llama")
    for number, which in enumerate(("", "layers.1.mlp.up_proj.")):
        path = adapter_folder(model, folder / str(number), r=2)
        tensors = load_file(path / WEIGHTS)
        moved = {
            k.replace(here, there) if which in k else k: t for k, t in tensors.items()
        }
        save_file(moved, path / WEIGHTS)
        pool = AdapterPool(model, budget_bytes=10**9)
        with pytest.raises(ValueError, match=r"does not have|lacks"):
            pool.add("a", path)
        assert "a" not in pool and pool.bytes == 0
