"""The comparison's job: every candidate measured once, kept, and summed up.

Each candidate gets the same base model, task, test rows and seeds, and the settings
that an equal tuning budget found for it (tuning.py); measure.py takes its figures. A
finished candidate is written at once and kept, and one in training has checkpoints: an
interrupted comparison goes on where it was. What counts as the same candidate includes
the base's weights, the task's rows and the code: an edited lora.py is measured again.
"""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ..common import atomic, records
from ..common.digest import digest
from ..common.provenance import provenance
from ..models.load import pick_dtype
from ..tasks import scorers
from . import estimate, own_rows, report, shots
from .candidates import Candidate
from .measure import measure
from .plan import Plan
from .setup import Setup, load_setup
from .summary import summary
from .tuning import Setting, search, settings_for


def compare(plan: Plan, *, tune: bool = False) -> dict:
    """Measure every candidate of the plan, write the result to `plan.out`, return it.

    Writes compare.json, compare.png and compare.html; each candidate's own figures go
    to `plan.out`/rows as soon as they are there, and are not measured again.

    Args
        tune  search the settings first (tuning.py)
    """
    setup = own_rows.checked(load_setup(_without_missing(plan)))
    notes = own_rows.notes(setup)
    _announce(setup, notes, tune)
    if tune:
        search(setup)
    settings = {
        candidate.key: _fitted(
            setup, settings_for(setup.plan, candidate, setup.templates)
        )
        for candidate in setup.plan.chosen()
    }
    result = summary(setup, settings, _measured(setup, settings))
    result |= own_rows.data(setup, notes)
    report.write(result, Path(plan.out))
    return result


def _without_missing(plan: Plan) -> Plan:
    """The plan without the candidates whose library is not installed; prints which."""
    missing = [c for c in plan.chosen() if c.library and not find_spec(c.library)]
    for candidate in missing:
        print(
            f"left out: {candidate.label}, since {candidate.library} is not installed"
        )
    keys = {candidate.key for candidate in missing}
    return replace(plan, methods=tuple(m for m in plan.methods if m not in keys))


def _announce(setup: Setup, notes: list[str], tune: bool) -> None:
    """Print what is compared and, for the usual base, how long it will take."""
    print(setup.description)
    if setup.why_dtype:
        print(f"{setup.dtype}, since {setup.why_dtype}; DTYPE= names another one")
    for sentence in notes:
        print(sentence)
    if setup.plan.base == Plan.base:
        rates = estimate.measured_rates(setup.device, pick_dtype(setup.dtype))
        sizes = own_rows.sizes(setup)
        seconds = estimate.compare_seconds(rates, setup.plan, sizes)
        search = estimate.tuning_seconds(rates, setup.plan, sizes)
        before = f", after a search of {estimate.duration(search)}" if tune else ""
        print(
            f"This takes about {estimate.duration(seconds)} on this machine{before}; "
            "Ctrl-C keeps what is done."
        )


def _fitted(setup: Setup, setting: Setting) -> Setting:
    """The setting with as many examples as fit; its warning says where these are fewer.

    Raises  ValueError  not even one fits
    """
    values = shots.fitted(setup, setting.values)
    if values == setting.values:
        return setting
    if not values["k"]:
        raise ValueError(
            "few-shot: not one example fits before these rows; leave it out of "
            "--methods, or make the rows shorter"
        )
    fewer = f"k {values['k']} and not {setting.values['k']}, since more do not fit"
    print(f"few-shot: {fewer}")
    warning = "; ".join(filter(None, [setting.warning, fewer]))
    return replace(setting, values=values, warning=warning)


def _measured(setup: Setup, settings: dict[str, Setting]) -> dict[str, list[dict]]:
    """{key: figures for each seed} of every candidate of the plan."""
    plan, measured = setup.plan, {}
    chosen = plan.chosen()
    for number, candidate in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {candidate.label}")
        # Without training nothing is random: one seed is enough.
        seeds = plan.seeds if candidate.trains else plan.seeds[:1]
        setting = settings[candidate.key]
        measured[candidate.key] = [
            _measured_once(setup, candidate, setting, seed) for seed in seeds
        ]
    return measured


def _measured_once(
    setup: Setup, candidate: Candidate, setting: Setting, seed: int
) -> dict:
    """The figures, from their file where the same configuration was measured before."""
    configuration = _configuration(setup, candidate, setting, seed)
    name = f"{candidate.key}-{seed}-{digest(configuration)}"
    out = Path(setup.plan.out)
    file = out / "rows" / f"{name}.json"
    # Not the scorer: with another one, the same training goes on and only scores anew.
    trained = digest({**configuration, "scorer": None})
    checkpoints = out / "checkpoints" / f"{candidate.key}-{seed}-{trained}"
    if file.exists():
        print(f"  seed {seed}: measured before, kept from {file}")
        return records.read_object(file)
    print(f"  seed {seed}: {_in_words(setting.values)}")
    figures = measure(candidate, setup, setting.values, seed, checkpoints)
    figures |= {
        "key": candidate.key,
        "label": candidate.label,
        "library": candidate.library,
        "settings": setting.values | figures.pop("injected"),
        "settings_from": setting.warning,
        "tried": [list(rate) for rate in setting.tried],
        "configuration": configuration,
        "provenance": provenance(seed=seed, device=setup.device),
    }
    with atomic.new_file(file) as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return figures


def _configuration(
    setup: Setup, candidate: Candidate, setting: Setting, seed: int
) -> dict:
    """All that decides the candidate's figures."""
    plan = setup.plan
    return {
        "base": plan.base,
        "task": plan.task,
        "method": candidate.key,
        "setting": setting.values,
        "seed": seed,
        "rows": plan.rows,
        "steps": plan.steps_of(candidate),
        "batch": plan.batch if candidate.trains else 0,
        "paged": plan.paged if candidate.trains else None,
        "device": setup.device.type,
        "dtype": setup.dtype,
        "fingerprint": setup.fingerprint,
        "scorer": scorers.identity(setup.task.score),
    }


def _in_words(setting: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())
