"""The claims ledger: every claim, its rule, what was measured, the verdict.

    python -m peft_from_scratch ledger            the table, computed from stored runs
    python -m peft_from_scratch ledger L1 --run   make the runs that L1 lacks first
    python -m peft_from_scratch ledger --page     and out/ledger.html, to read

data/ledger.json has one row for each claim, and is computed, never typed. A claim is
judged on each base model, which the rows call its scale; the row's own verdict is that
of the largest base that has one. A claim settled by arithmetic has no base model: its
run counts for every base.
"""

import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from ..common import atomic, records
from ..common.progress import bar
from ..common.provenance import ROOT
from . import experiments, history, more_runs, runs
from .claim import (
    BASES,
    HOLDS_WHEN,
    NOT_RUN,
    OF_BANDS,
    UNTESTABLE,
    Claim,
    Invalid,
    Measured,
)
from .runs import Run

FILE = ROOT / "data" / "ledger.json"
ERROR = 0.05  # of a verdict by an interval of 95 %, at most


def discover() -> dict[str, Claim]:
    """{id: claim} of every module in experiments/, by notebook and id.

    Raises  ValueError  two claims with one id
    """
    names = [module.name for module in pkgutil.iter_modules(experiments.__path__)]
    modules = [import_module(f"{experiments.__name__}.{name}") for name in names]
    all_claims = [
        claim for module in modules for claim in getattr(module, "CLAIMS", ())
    ]
    all_claims.sort(key=order)
    if len({claim.id for claim in all_claims}) < len(all_claims):
        raise ValueError(
            f"two claims share an id: {[claim.id for claim in all_claims]}"
        )
    return {claim.id: claim for claim in all_claims}


def order(claim) -> tuple[str, str, int, str]:
    """Lesson, then letter, number and half of the id: ("08", "Q", 4, "b") of Q4b."""
    letter, number, half = re.fullmatch(r"([A-Z])(\d+)([a-z]?)", claim.id).groups()
    return claim.notebook, letter, int(number), half


def claims() -> dict[str, Claim]:
    """{id: claim} of all experiments, which are imported at the first call."""
    known = globals()
    if "CLAIMS" not in known:
        known["CLAIMS"] = discover()
    return known["CLAIMS"]


def __getattr__(name: str):
    """`ledger.CLAIMS` is claims(); importing the ledger alone imports no experiment."""
    if name == "CLAIMS":
        return claims()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Judgement:
    """A claim at one scale, from the stored runs."""

    verdict: str
    measured: float | None = None
    interval: tuple[float, float] | None = None
    seeds: tuple[int, ...] = ()
    runs: tuple[str, ...] = ()
    condition: str | None = None
    so: str | None = None
    say_instead: str | None = None
    missing: Sequence[dict] = field(default=(), compare=False)  # configurations
    reason: str | None = None  # why there is no verdict

    def row(self) -> dict:
        """The fields of this judgement in the ledger's file."""
        return {
            "measured": self.measured,
            "interval": list(self.interval) if self.interval else None,
            "seeds": list(self.seeds),
            "verdict": self.verdict,
            "condition": self.condition,
            "so": self.so,
            "say_instead": self.say_instead,
            "runs": list(self.runs),
        }


def claim(id: str) -> Claim:
    """The claim of this id; ValueError names those that there are."""
    if id not in claims():
        raise ValueError(f"no claim is called {id!r}; claims are {', '.join(claims())}")
    return claims()[id]


def verdict_of(id: str, value: float, low: float, high: float) -> str:
    """The verdict of the claim's rule on a measured value and its interval."""
    return claim(id).rule.verdict(value, low, high)


def judge(claim: Claim, scale: str) -> Judgement:
    """Judge a claim at a scale by the runs that are stored."""
    if scale in claim.untestable:
        return _untestable(claim, scale)
    try:
        stored_runs, missing = _runs(claim, scale)
        if missing or not stored_runs:
            return Judgement(NOT_RUN, missing=missing, reason=_lacking(missing))
        measured = claim.measured(stored_runs)
    except Invalid as why:
        return Judgement(NOT_RUN, reason=str(why))
    verdict = claim.rule.verdict(measured.value, measured.low, measured.high)
    interval = _rounded(measured.low), _rounded(measured.high)
    condition = claim.condition if verdict == HOLDS_WHEN else None
    return Judgement(
        verdict,
        _rounded(measured.value),
        None if claim.rule.computed else interval,
        tuple(measured.seeds),
        tuple(dict.fromkeys(run.key for run in stored_runs)),
        _filled(condition, measured),
        _filled(claim.so.get(verdict), measured),
        _filled(claim.say_instead.get(verdict), measured),
    )


def _untestable(claim: Claim, scale: str) -> Judgement:
    """No verdict, for the claim's reason; with figures of runs that are stored."""
    stored_runs, missing = _runs(claim, scale)
    measured = claim.measured(stored_runs) if stored_runs and not missing else None
    return Judgement(
        UNTESTABLE,
        so=_filled(claim.so.get(UNTESTABLE), measured),
        say_instead=_filled(claim.untestable[scale], measured),
        missing=missing,
    )


def _runs(claim: Claim, scale: str) -> tuple[list[Run | None], list[dict]]:
    """(the claim's runs, None where one is missing; configurations that are missing)"""
    configs = claim.configs(scale)
    stored_runs = [runs.stored(config) for config in configs]
    missing = [c for c, run in zip(configs, stored_runs, strict=True) if run is None]
    return stored_runs, missing


def _filled(text: str | None, measured: Measured | None) -> str | None:
    """The text with the figures that it names."""
    return text.format(**measured.figures) if text and measured else text


def row(claim: Claim) -> dict:
    """The claim's row of the ledger."""
    scales = {scale: judge(claim, scale).row() for scale in BASES}
    decided = [scale for scale in BASES if scales[scale]["verdict"] != NOT_RUN]
    scale = decided[-1] if decided else None
    own = scales[scale] if scale else Judgement(NOT_RUN).row()
    return {
        "id": claim.id,
        "notebook": claim.notebook,
        "statement": claim.statement,
        "rule": str(claim.rule),
        "rule_hash": claim.rule_hash,
        "scale": scale,
        **own,
        "scales": scales,
    }


def rows() -> list[dict]:
    """The whole ledger, computed from the stored runs."""
    return [row(claim) for claim in claims().values()]


def read(file: Path | None = None) -> list[dict]:
    """The rows of data/ledger.json, as shipped; [] where there is none."""
    file = file or FILE
    return records.read(file) if file.exists() else []


def write(rows: Sequence[dict], file: Path | None = None) -> bool:
    """Whether the ledger differed from the file; if so, the file is written.

    The old row of a rule that was replaced goes to the history beside the file first.
    """
    file = file or FILE
    before = read(file)
    if rows == before:
        return False
    history.append(history.replaced(before, rows), file)
    with atomic.new_file(file) as partial:
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        partial.write_text(text + "\n", "utf-8")
    return True


def make_runs(
    ids: Iterable[str],
    scales: Iterable[str] = BASES,
    mine: Callable[[dict], bool] | None = None,
) -> None:
    """Make every run that these claims lack; each is stored as soon as it is done.

    Args
        mine  whether a configuration is this worker's (workers.part_of); None: all are
    """
    for id in ids:
        for scale in scales:
            _make_runs(claim(id), scale, mine or (lambda config: True))


def _make_runs(claim: Claim, scale: str, mine: Callable[[dict], bool]) -> None:
    missing = list(filter(mine, judge(claim, scale).missing))
    if not missing:
        return
    done = sum(mine(config) for config in claim.configs(scale)) - len(missing)
    total = done + len(missing)
    with bar(f"{claim.id} on {scale}", "run", total, done=done) as progress_bar:
        while missing:
            for config in missing:
                runs.result(config, lambda config=config: experiments.compute(config))
                progress_bar.update()
            # A search asks for more, as results come in.
            missing = list(filter(mine, judge(claim, scale).missing))
            progress_bar.total += len(missing)


def table(rows: Sequence[dict], scales: Sequence[str] = BASES) -> str:
    """The ledger for a terminal, and how sure it is; * marks a row's own scale."""
    lines = [("claim", "notebook", "scale", "measured", "interval", "verdict")]
    for row in rows:
        for scale in reversed(scales):
            lines.append(_line(row, scale))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines]  # fmt: skip
    return "\n".join([*text, "", could_flip(rows)])


def could_flip(rows: Sequence[dict]) -> str:
    """How many verdicts could be wrong by chance alone, in a sentence."""
    decided = [row for row in rows if row["verdict"] in OF_BANDS]
    sampled = sum(row["interval"][0] < row["interval"][1] for row in decided)
    most = next(k for k in range(sampled + 1) if _at_most(k, sampled) >= 1 - ERROR)
    sentence = (
        f"{len(decided)} of {len(rows)} claims are decided, {sampled} of them by "
        f"intervals of {1 - ERROR:.0%}; the others by counts, which chance cannot flip."
    )
    if not sampled:
        return sentence
    return (
        f"{sentence} At an error of {ERROR:.0%} each, {sampled * ERROR:.2g} of the "
        f"{sampled} are expected to be wrong by chance, and with {1 - ERROR:.0%} "
        f"probability no more than {most}."
    )


def replaced_rules(rows: Sequence[dict], file: Path | None = None) -> list[str]:
    """Which rules are not those of the ledger's file, and what to do, a text each."""
    stored_hashes = {row["id"]: row["rule_hash"] for row in read(file)}
    return [
        f"{row['id']}: its rule is not the one of data/ledger.json (hash {old}, now "
        f"{row['rule_hash']}). If that is not meant, find the edit with `git diff` and "
        "take it back. If it is, commit the rule before its runs."
        for row in rows
        if (old := stored_hashes.get(row["id"], row["rule_hash"])) != row["rule_hash"]
    ]


def reasons(claim: Claim, scales: Iterable[str] = BASES) -> list[str]:
    """Why a claim has no verdict at some of these scales, a line each."""
    by_scale = [(scale, judge(claim, scale).reason) for scale in scales]
    return [f"{claim.id} on {scale}: {reason}" for scale, reason in by_scale if reason]


def _line(row: dict, scale: str) -> tuple[str, ...]:
    at, own = row["scales"][scale], row["scale"] == scale
    measured, interval = "", ""
    if at["measured"] is not None:
        measured = f"{at['measured']:,.6g}"
    if at["interval"]:
        interval = "[{:,.6g}, {:,.6g}]".format(*at["interval"])
    verdict = f"{at['verdict']} *" if own else at["verdict"]
    if more := more_runs.in_words(claim(row["id"]).rule, at):
        verdict += f": {more}"
    return row["id"], row["notebook"], scale, measured, interval, verdict


def _lacking(missing: Sequence[dict]) -> str:
    if not missing:
        return "no runs are planned at this scale"
    kinds = ", ".join(sorted({config["experiment"] for config in missing}))
    return f"{len(missing)} runs are missing ({kinds}); make them with --run"


def _at_most(k: int, n: int) -> float:
    """Probability of at most k errors among n verdicts."""
    return sum(
        math.comb(n, i) * ERROR**i * (1 - ERROR) ** (n - i) for i in range(k + 1)
    )


def _rounded(value: float) -> float:
    """Six digits, because the last bits of a sum differ between machines."""
    return float(f"{value:.6g}")
