"""The sweep over architectures: each outcome has its name, and no child can stop it."""

import json
import os
import time
import warnings

import pytest
from planting import planted

import peft_from_scratch as pfs
from peft_from_scratch.core import adapter, decoder
from peft_from_scratch.files import exchange
from peft_from_scratch.methods.ia3 import IA3
from peft_from_scratch.methods.lora import LoRA
from tools.architectures import __main__ as command
from tools.architectures import checks, outcomes, sweep, table, tiny
from tools.architectures.subject import BASE, Subject


@pytest.fixture(scope="module")
def llama():
    return tiny.build("llama")


def outcome(check, subject):
    found = outcomes.judged(check, subject)
    return found.outcome, found.message


def dies(pipe, kind, methods):
    """A child that checks one method well and is killed within the next."""
    pipe.send(("starts", methods[0], "inject"))
    pipe.send(("outcome", {"check": "inject", "outcome": "passed", "message": ""}))
    if len(methods) > 1:
        pipe.send(("starts", methods[1], "merge"))
        os._exit(9)
    pipe.send(("ended", None))


def hangs(pipe, kind, methods):
    pipe.send(("starts", methods[0], "train"))
    time.sleep(60)


# ---------------------------------------------------------------------------- outcomes


def test_two_types_and_two_methods_pass_and_are_not_run_again(tmp_path, capsys):
    out = tmp_path / "deep" / "found.jsonl"
    asked = ["--types", "llama,gpt2", "--methods", "lora,prefix", "--out", str(out)]
    assert command.main(asked) == 0
    rows = sweep.read(out)
    assert [(row["type"], row["method"]) for row in rows] == [
        (kind, method)
        for kind in ("llama", "gpt2")
        for method in (BASE, "lora", "prefix")
    ]
    for row in rows:
        applied = [
            c.__name__ for c in checks.CHECKS if checks.applies(c, row["method"])
        ]
        assert [o["check"] for o in row["outcomes"]] == applied
        for found in row["outcomes"]:
            cannot_merge = (row["method"], found["check"]) == ("prefix", "merge")
            assert found["outcome"] == ("refused" if cannot_merge else "passed"), found

    before = out.read_bytes()
    with out.open("a") as lines:
        lines.write('{"type": "llama", "meth')  # as a kill leaves it
    assert sweep.read(out) == rows
    command.main(asked)
    assert out.read_bytes().startswith(before) and sweep.read(out) == rows
    assert "lora    2/0/0/0" in capsys.readouterr().out


ONE_TOKEN = "y = self.base(x) + (x.shape[1] == 1)"
ONE_ROW = "y = self.base(x) + (len(x) == 1)"
COUNTING = "self.calls = getattr(self, 'calls', 0) + 1; y = self.base(x) * self.calls"
DRIFTING = "y = self.base(x); self.base.weight.data.add_(1e-3)"
TWICE = "2 * tensors[key]"
WRITTEN = "row.written(name, module)"
DOUBLED = "{key: 2 * value for key, value in row.written(name, module).items()}"


@pytest.mark.parametrize(
    "check, method, function, right, wrong",
    [
        (checks.identity, "lora", LoRA.__init__, "torch.zeros", "torch.ones"),
        (checks.as_read, "prompt", decoder.token_ids, "list(ids)", "list(ids)[::-1]"),
        (checks.train, "ia3", IA3.forward, "(y * l)", "(y * l.detach())"),
        (checks.train, "ia3", IA3.forward, "y = self.base(x)", DRIFTING),
        (checks.merge, "lora", LoRA.merged, "self.delta(", "2 * self.delta("),
        (checks.remove, "lora", adapter._set_flags, "parameter.requires_grad_", "bool"),
        (checks.file, "lora", exchange._written, WRITTEN, DOUBLED),
        (checks.ours_in_peft, "lora", exchange._written, WRITTEN, DOUBLED),
        (checks.peft_in_ours, "lora", exchange._copy, "tensors[key]", TWICE),
        (checks.cache, "ia3", IA3.forward, "y = self.base(x)", ONE_TOKEN),
        (checks.padding, "ia3", IA3.forward, "y = self.base(x)", ONE_ROW),
        (checks.checkpointing, "ia3", IA3.forward, "y = self.base(x)", COUNTING),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_is_wrong(llama, check, method, function, right, wrong):
    assert outcome(check, Subject(llama, method)) == ("passed", "")
    with planted(function, right, wrong):
        assert outcome(check, Subject(llama, method))[0] == "wrong"


def test_a_refusal_is_the_library_s_own_and_touches_nothing(llama, monkeypatch):
    bitfit = Subject(llama, "bitfit")
    found, message = outcome(checks.inject, bitfit)
    assert found == "refused" and "no bias" in message

    def half_done(model):
        model.lm_head.weight.data[0, 0] += 1
        adapter.injected(model)  # a ValueError of the library's

    monkeypatch.setattr(pfs.bitfit, "inject", half_done)
    found, message = outcome(checks.inject, bitfit)
    assert found == "wrong" and "lm_head.weight changed" in message


def test_what_save_warns_of_is_refused(llama, monkeypatch):
    """Also in a child, which shows no warnings."""

    def save(model, folder, save=pfs.save):
        warnings.warn("PEFT reads this otherwise", stacklevel=2)
        save(model, folder)

    monkeypatch.setattr(pfs, "save", save)
    with warnings.catch_warnings(action="ignore"):
        with planted(exchange._written, WRITTEN, DOUBLED):
            found = outcome(checks.ours_in_peft, Subject(llama, "lora"))
        assert found == ("refused", "save() warns: PEFT reads this otherwise")
        assert outcome(checks.ours_in_peft, Subject(llama, "lora"))[0] == "passed"


@pytest.mark.parametrize("error", [ValueError("from outside"), TypeError("no")])
def test_an_error_of_others_is_a_crash(llama, monkeypatch, error):
    def fails(model):
        raise error

    monkeypatch.setattr(pfs.bitfit, "inject", fails)
    assert outcome(checks.inject, Subject(llama, "bitfit"))[0] == "crashed"


def test_no_method_is_blamed_for_what_the_model_cannot(llama, monkeypatch):
    monkeypatch.setattr(type(llama), "supports_gradient_checkpointing", False)
    found = {
        (method, o.check): o.outcome for method, o in outcomes.run(llama, ["bitfit"])
    }
    assert found[BASE, "checkpointing"] == "skipped"
    assert found["bitfit", "inject"] == "refused"
    assert ("bitfit", "train") not in found


# ---------------------------------------------------------------------------- children


def test_a_child_that_dies_is_a_crash_and_the_others_go_on():
    rows = list(sweep.rows("llama", ["lora", "dora", "ia3"], 60, dies))
    assert [row["method"] for row in rows] == ["lora", "dora", "ia3"]
    (found,) = rows[1]["outcomes"]
    assert (found["check"], found["outcome"]) == ("merge", "crashed")
    assert "exit code 9" in found["message"]
    assert rows[2]["outcomes"][0]["outcome"] == "passed"


def test_a_child_that_takes_too_long_is_a_crash():
    (row,) = sweep.rows("llama", ["lora"], 2, hangs)
    (found,) = row["outcomes"]
    assert found["outcome"] == "crashed" and found["message"] == "no end within 2 s"


def test_a_type_that_cannot_be_built_has_the_reason():
    """A gemma4_assistant has no default: it reads another model's activations."""
    (row,) = sweep.rows("gemma4_assistant", ["lora", "dora"], 60)
    assert row["method"] == "build"
    (found,) = row["outcomes"]
    assert found["outcome"] == "crashed" and "must be 0, got 256" in found["message"]


# --------------------------------------------------------------------------- the table


def row(kind, method, **found):
    return {
        "type": kind,
        "method": method,
        "outcomes": [
            {"check": check, "outcome": outcome, "message": f"{outcome} is said"}
            for check, outcome in found.items()
        ],
    }


def test_the_table_counts_and_a_failure_names_its_types():
    text = table.summary(
        [
            row("a", BASE, cache="wrong"),
            row("a", "lora", inject="passed", merge="refused", cache="skipped"),
            row("b", "lora", inject="passed", merge="wrong", train="crashed"),
            row("c", "lora", inject="refused"),
            row("d", "lora", inject="passed", merge="wrong"),
            row("e", "build", build="crashed"),
        ]
    )
    head, line = text.splitlines()[1], text.splitlines()[3]
    cells = dict(zip(head.split(), line.split()[1:], strict=False))
    assert "of 4 types" in text
    assert line.split() == [
        "lora",
        "3/1/0/0",
        "0/0/1/0",
        "0/1/0/2",
        "0/0/0/0",
        "1/1/0/2",
    ]
    assert cells["inject"] == "3/1/0/0"
    failed, itself, not_built = text.split("\n\n")[1:]
    assert "wrong, merge: wrong is said\n      lora: b, d" in failed
    assert "itself: a" in itself and "itself" not in failed
    assert "build: e" in not_built


def test_lines_are_json_that_anyone_can_read(tmp_path):
    kept = row("a", "lora", inject="passed")
    (tmp_path / "rows").write_text(f"{json.dumps(kept)}\n")
    assert sweep.read(tmp_path / "rows") == [kept]
    assert sweep.read(tmp_path / "absent") == []
