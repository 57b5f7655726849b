"""The hash of a rule: free for what is tidied, another one for what is computed.

A small experiment of two modules is edited, text by text. Then the shipped claims: by
changed constants, and by a whole copy of the experiments whose text is another.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from planting import planted

import peft_from_scratch
from peft_from_scratch import methods
from peft_from_scratch.common import statistics
from peft_from_scratch.kernels import cases
from peft_from_scratch.ledger import experiments, rule_hash, runs, verdicts
from peft_from_scratch.ledger.experiments import (
    family,
    finetune,
    own_rates,
    rank_and_place,
    scaling,
)
from peft_from_scratch.ledger.rule_hash import content_hash

PACKAGE = Path(peft_from_scratch.__file__).parent
EXPERIMENT = '''
from dataclasses import dataclass
from functools import partial

import numpy as np

import RUNS as runs
from EXPERIMENTS import OTHER
from EXPERIMENTS.OTHER import share, worth
from peft_from_scratch.methods import dora, lora

RATES = (1e-3, 1e-2)
METHODS = {"lora": (partial(lora.inject, r=8), {"alpha": 16})}
LIMITS = {0, 8}


@dataclass
class Row:
    """One line."""

    loss: float
    rate: float = 0.5

    def better(self, other):
        return self.loss < other.loss


def config(rate: float, *, seed: int = 0) -> dict:
    return {"experiment": "MODULE", "rate": rate, "seed": seed}


def compute(config):
    """Train."""
    inject, options = METHODS["lora"]
    return {"loss": inject(config["rate"], **options)}


def grid(seeds):
    def configs(scale):
        """Every rate."""
        return [config(rate, seed=s) for rate in RATES for s in range(seeds)]

    return configs


configs = grid(3)
first, second = (lambda x: x + 1), (lambda x: x + 2)


def measured(found):
    """The share of runs that are worth it."""
    losses = [run.result["loss"] for run in found]  # nats
    if not losses:
        raise ValueError(f"{len(losses)} runs are too few")
    best = min(losses, key=first)
    rows = [Row(loss, rate=best) for loss in losses if worth(loss, least=best)]
    matching = [run for run in found if runs.matches(run, seed=0)]
    if best in LIMITS:
        return None
    return share(rows), float(np.median(losses)), OTHER.spread(losses), matching
'''
OTHER = '''
from math import comb

WORTH = 5.0


def worth(loss: float, least: float = 0.0) -> bool:
    """Whether a saving is one."""
    return loss - least >= WORTH


def share(rows):
    total = 0
    for row in rows:
        total += row.loss
    return _percent(total, comb(len(rows), 2))


def _percent(part, whole):
    return 100 * part / (whole + 1)


def spread(losses):
    return max(losses) - min(losses) if losses else down(3)


def down(n):
    return up(n - 1) if n else 0


def up(n):
    return down(n - 2)
'''
# Each is (text, other text) once or more; a text must occur exactly once.
FREE = {
    "a docstring": [("The share of runs that are worth it.", "Percent of good runs.")],
    "no docstring": [('    """Whether a saving is one."""\n', "")],
    "the docstring of a class": [("One line.", "A loss and its rate.")],
    "a comment": [("  # nats", "  # per token\n    # of the label")],
    "empty lines": [("    inject, options", "\n\n    inject, options")],
    "an annotation": [("rate: float, *, seed: int = 0", "rate, *, seed=0")],
    "a local": [("total = 0", "sum_ = 0"), ("total += row.loss", "sum_ += row.loss"),
                ("_percent(total", "_percent(sum_")],
    "the local of a comprehension": [
        ("(loss, rate=best) for loss in", "(x, rate=best) for x in"),
        ("worth(loss, least", "worth(x, least")],
    "a parameter": [("(part, whole)", "(some, all_)"),
                    ("100 * part / (whole", "100 * some / (all_")],
    "a parameter that is passed by its name": [
        ("least: float = 0.0", "floor: float = 0.0"), ("loss - least", "loss - floor"),
        ("least=best", "floor=best")],
    "a function": [("return _percent", "return _in_percent"),
                   ("def _percent", "def _in_percent")],
    "a recursive function": [
        ("else down(3)", "else below(3)"), ("def down", "def below"),
        ("return down(n", "return below(n")],
    "an inner function": [("def configs(scale)", "def known(scale)"),
                          ("return configs\n", "return known\n")],
    "a class": [("class Row", "class Entry"), ("[Row(", "[Entry(")],
    "a constant": [("WORTH = 5.0", "ENOUGH = 5.0"), (">= WORTH", ">= ENOUGH")],
    "a number that gets a name": [("WORTH = 5.0", "WORTH, ALL = 5.0, 100"),
                                  ("100 * part", "ALL * part")],
    "a table that is built": [('{"alpha": 16}', "dict(alpha=2 * 8)")],
    "the text of an error": [("runs are too few", "runs decide nothing")],
    "an import under another name": [
        ("import share, worth", "import share as part_of, worth"),
        ("return share(rows)", "return part_of(rows)")],
    "a function from another module": [
        ('def worth(loss: float, least: float = 0.0) -> bool:\n'
         '    """Whether a saving is one."""\n    return loss - least >= WORTH\n', ""),
        ("import share, worth\n", "import WORTH, share\n"),
        ("def config(", "def worth(loss, least=0.0):\n"
         "    return loss - least >= WORTH\n\n\ndef config(")],
    "the order of a set": [("{0, 8}", "{8, 0}")],
}  # fmt: skip
CHANGES = {
    "a constant": [("WORTH = 5.0", "WORTH = 5.5")],
    "an operator two calls deep": [("(whole + 1)", "(whole - 1)")],
    "a comparison": [(">= WORTH", "> WORTH")],
    "a sign": [("loss - least", "least - loss")],
    "the rates of a grid": [("(1e-3, 1e-2)", "(1e-3, 3e-2)")],
    "fewer rates": [("(1e-3, 1e-2)", "(1e-3,)")],
    "the seeds of a grid": [("grid(3)", "grid(2)")],
    "a default": [("least: float = 0.0", "least: float = 0.1")],
    "a keyword's default": [("seed: int = 0", "seed: int = 1")],
    "the default of a field": [("rate: float = 0.5", "rate: float = 0.6")],
    "a field of a result": [('run.result["loss"]', 'run.result["test_loss"]')],
    "an attribute": [("total += row.loss", "total += row.rate")],
    "the method of a class": [("self.loss < other", "self.loss > other")],
    "swapped arguments": [("_percent(total, comb(len(rows), 2))",
                           "_percent(comb(len(rows), 2), total)")],
    "swapped parameters and their names": [
        ("loss: float, least: float = 0.0", "least: float, loss: float = 0.0"),
        ("loss - least", "least - loss")],
    "another instrument": [("partial(lora.inject", "partial(dora.inject")],
    "an option of the instrument": [("inject, r=8", "inject, r=4")],
    "another function of the library": [("runs.matches(run", "runs.stored(run")],
    "another function of numpy": [("np.median", "np.mean")],
    "another function of Python's": [
        ("comb(len", "perm(len"), ("import comb", "import perm")],
    "what an experiment computes": [('inject(config["rate"]', 'inject(config["seed"]')],
    "a lambda of two on a line": [("key=first", "key=second")],
    "the body of that lambda": [("x + 1)", "x + 3)")],
    "a condition": [("if not losses", "if losses")],
    "the recursion": [("down(n - 2)", "down(n - 3)")],
    "who is called back": [("down(n - 2)", "up(n - 2)")],
    "the kind of error": [("raise ValueError", "raise KeyError")],
}  # fmt: skip
numbers = count()


def texts(edits=()):
    """(the experiment, the other module), edited."""
    both = [EXPERIMENT, OTHER]
    for right, wrong in edits:
        places = [i for i, text in enumerate(both) if right in text]
        assert [both[i].count(right) for i in places] == [1], right
        both[places[0]] = both[places[0]].replace(right, wrong)
    return both


def hash_of(folder, edits=()):
    """The hash of the small experiment, as two modules that nobody has seen before."""
    name = f"trial_{next(numbers)}"
    names = name, f"{name}_other"
    words = {"OTHER": names[1], "MODULE": "trial", "RUNS": runs.__name__}
    words["EXPERIMENTS"] = experiments.__name__
    for own, text in zip(names, texts(edits), strict=True):
        text = re.sub(r"\b[A-Z]+\b", lambda m: words.get(m[0], m[0]), text)
        (folder / f"{own}.py").write_text(text)
    (folder / "trial.py").write_text((folder / f"{name}.py").read_text())
    known = experiments.__path__
    experiments.__path__ = [*known, str(folder)]
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(f"{experiments.__name__}.{name}")
        return content_hash(module.configs, module.measured)
    finally:
        experiments.__path__ = known
        for own in (*names, "trial"):
            sys.modules.pop(f"{experiments.__name__}.{own}", None)


def what_is_tidied_is_free(folder):
    before = hash_of(folder)
    changed = [name for name, edits in FREE.items() if hash_of(folder, edits) != before]
    assert not changed


def what_is_computed_counts(folder):
    hashes = {name: hash_of(folder, edits) for name, edits in CHANGES.items()}
    hashes["nothing"] = hash_of(folder)
    assert len(set(hashes.values())) == len(hashes)


@pytest.mark.parametrize("what", FREE)
def test_what_is_tidied_is_free(tmp_path, what):
    assert hash_of(tmp_path, FREE[what]) == hash_of(tmp_path)


def test_what_is_computed_counts(tmp_path):
    what_is_computed_counts(tmp_path)


REDUCTION, CODE = rule_hash._Reduction, rule_hash._Code
UNTIDY = [  # bugs that make a tidied experiment another one …
    (rule_hash._does_nothing, "ast.Constant)", "int)"),
    (CODE.binding, "scope.numbers[name]]", "name]"),
    (CODE.write_Raise, "error.func if", "error if"),
    (CODE.write_Call, "k.arg in parameters", "not k"),
    (
        REDUCTION.value,
        "sorted(self.values(value), key=json.dumps)",
        "self.values(value)",
    ),
]
BLIND = [  # … and bugs that overlook a change
    (REDUCTION.definition, "depth - place", "0"),
    (REDUCTION.is_inside, "package == PACKAGE", "not package"),
    (REDUCTION.named, '".methods." in module', "False"),
    (CODE.write_Dict, 'texts.get("experiment")', "None"),
    (CODE.function, "self.statements(body)", "[]"),
    (CODE.__init__, "reduction.values(defaults)", "None"),
    (rule_hash._node_of, "_holds(n.body, code)", "True"),
    (rule_hash._names_around, "name: cell.cell_contents", "name: 0"),
]


@pytest.mark.parametrize(
    ("function", "right", "wrong", "law"),
    [(*bug, what_is_tidied_is_free) for bug in UNTIDY]
    + [(*bug, what_is_computed_counts) for bug in BLIND],
)
def test_a_planted_bug_is_caught(function, right, wrong, law, tmp_path):
    with planted(function, right, wrong), pytest.raises(AssertionError):
        law(tmp_path)  # on sound code the laws have tests of their own


def test_an_instrument_that_was_renamed_keeps_the_hash(tmp_path, monkeypatch):
    """`FORMER_NAMES` says how it was called; another instrument stays another one."""
    monkeypatch.setitem(rule_hash.FORMER_NAMES, "stored", "matches")
    renamed = CHANGES["another function of the library"]
    assert hash_of(tmp_path, renamed) == hash_of(tmp_path)
    assert hash_of(tmp_path, CHANGES["another instrument"]) != hash_of(tmp_path)


@pytest.mark.parametrize(
    ("value", "why"),
    [(object(), "no stable description"), (iter(()), "no stable description")],
)
def test_a_value_without_a_description_is_refused(value, why):
    with pytest.raises(TypeError, match=why):
        content_hash(lambda: value)


def test_an_import_inside_a_function_is_refused():
    def measured(found):
        from math import comb

        return comb(found, 2)

    with pytest.raises(TypeError, match="at the top of the module"):
        content_hash(measured)


# ------------------------------------------------------------------- Shipped claims


def hashes():
    return {id: claim.rule_hash for id, claim in verdicts.CLAIMS.items()}


def changed(before):
    now = hashes()
    return {id for id in now if now[id] != before[id]}


# What these measure is counted, or is the worst of some runs: no interval is computed.
COUNTED = {"F1", "F5", "L2", "L4", "Q2", "Q3", "P1", "Q6", "K1", "T1", "F3", "Y3"}


def test_the_level_of_confidence_is_part_of_every_rule_with_an_interval(monkeypatch):
    before = hashes()
    monkeypatch.setattr(statistics, "CONFIDENCE", 0.5)
    assert changed(before) == set(before) - COUNTED


@pytest.mark.parametrize(
    ("module", "name", "ids"),
    [
        (scaling, "SIZED", {"L3"}),
        (own_rates, "RANKS", {"L8"}),
        (family, "RATES", {"L7", "L8", "X1"}),
        (rank_and_place, "GAPS", {"L5", "L6"}),
    ],
)
def test_a_grid_that_is_cut_changes_its_claims(monkeypatch, module, name, ids):
    before = hashes()
    monkeypatch.setattr(module, name, getattr(module, name)[:-1])
    assert changed(before) == ids


def test_a_grid_from_the_kernels_counts_too(monkeypatch):
    from peft_from_scratch.ledger.experiments import fusing

    before = hashes()
    monkeypatch.setattr(fusing, "RANKS", cases.RANKS[:-1])
    assert changed(before) == {"K1"}


def test_an_option_of_a_variant_changes_all_that_fine_tune(monkeypatch):
    before = hashes()
    half = replace(finetune.VARIANTS["qlora-bf16"], options={"dtype": torch.float16})
    monkeypatch.setitem(finetune.VARIANTS, "qlora-bf16", half)
    assert {"L3", "L5", "L6", "L7", "L8", "F4", "Q4", "A2"} <= changed(before)
    assert not changed(before) & {"F1", "L4", "Q3", "K1", "A1"}


def test_a_new_method_and_another_color_change_no_rule(monkeypatch):
    before, lora = hashes(), methods.named("lora")
    rows = *methods.METHODS, replace(lora, name="shift"), replace(lora, color="green")
    monkeypatch.setattr(methods, "METHODS", rows)
    monkeypatch.setattr(finetune, "METHODS", rows)
    assert not changed(before)


class Tidied(ast.NodeTransformer):
    """Other text, same code: no docstrings, comments, annotations; other locals."""

    def visit_FunctionDef(self, node):
        inner = [n for n in ast.walk(node) if isinstance(n, ast.arg)]
        stored = {
            n.id
            for n in ast.walk(node)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        for name in stored - {arg.arg for arg in inner}:
            for each in ast.walk(node):
                if isinstance(each, ast.Name) and each.id == name:
                    each.id = f"renamed_{name}"
        for arg in inner:
            arg.annotation = None
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


def test_the_hashes_of_a_tidied_copy_are_equal_in_a_fresh_process(tmp_path):
    """Every function of the rules has another text there."""
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    names = ("claim", "rates", "intervals", "statistics", "grid", "experiments/*")
    files = {file for name in names for file in copy.rglob(f"{name}.py")}
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        tidied = ast.unparse(Tidied().visit(ast.parse(text)))
        assert tidied != text
        file.write_text(tidied)
    code = (
        f"import json; from importlib import import_module as get;"
        f"claims = get({verdicts.__name__!r}).CLAIMS.values();"
        "print(json.dumps({claim.id: claim.rule_hash for claim in claims}))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == hashes()
