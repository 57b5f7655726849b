"""Checkpoints: what a killed run needs to end in the same bits as one that was not.

    FOLDER/step-000030/
        trainable.safetensors   the weights that train
        optimizer.safetensors   AdamW's moments and step counts
        best.safetensors        the weights of the lowest validation loss, with patience
        rng.safetensors         the state of the random generators (dropout)
        state.json              the history so far, the configuration, CRCs of it all

The learning rate and the position in the data are functions of the step, so the number
of steps done says both. A checkpoint appears whole or not at all, and two are kept: if
the newest cannot be read, it is put aside and the one before it is used. No pickle:
nothing in these files is ever executed.
"""

import json
import re
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..common import atomic, records
from ..common.digest import file_crc, sampled_crc
from ..common.scoped import rng_state, set_rng_state
from ..core import adapter
from .config import History, TrainConfig
from .state import TrainState

KEPT = 2  # checkpoints that stay on the disk
NAME = re.compile(r"step-(\d{6,})")
FORMAT = 2  # counted up when the meaning of the files changes
NO_MATTER = ("checkpoint_every",)  # of the recipe: changes no bit of the result
# Of the recipe, and not of older runs: left out where they are as they were then.
LATER = ("checkpointing", "chunk", "buckets")

Files = dict[str, dict[str, Tensor]]  # {name of a safetensors file: its tensors}


def configuration(
    model: nn.Module, config: TrainConfig, splits: Iterable[list]
) -> dict:
    """What must be the same for a run to be resumed, as JSON can hold it.

    Args
        splits  the encoded rows of training and of validation
    """
    injection = adapter.injected(model)
    trainable = adapter.trainable(model)
    moving = {id(p) for p in trainable.values()}
    frozen = (p for p in model.parameters() if id(p) not in moving)
    settings = {
        "format": FORMAT,
        "recipe": _recipe(config),
        "rows": zlib.crc32(json.dumps(list(splits)).encode()),
        "method": {"name": injection.method, **injection.config},
        "trainable": {n: f"{p.dtype} {[*p.shape]}" for n, p in trainable.items()},
        "frozen": zlib.crc32(repr([sampled_crc(p) for p in frozen]).encode()),
    }
    return json.loads(json.dumps(settings))


def _recipe(config: TrainConfig) -> dict:
    """What a run records of its configuration."""
    usual = {field.name: field.default for field in fields(config)}
    return {
        name: value
        for name, value in asdict(config).items()
        if name not in NO_MATTER and not (name in LATER and value == usual[name])
    }


def save(state: TrainState, folder: Path, settings: dict) -> Path:
    """Write the run as it stands after a step; older checkpoints go afterwards.

    All ranks call it, and rank 0 writes: what any number of ranks can resume.
    """
    target, files = Path(folder) / f"step-{state.history.steps:06d}", _files(state)
    if state.rank > 0:  # it has given its parts to rank 0
        return target
    with atomic.new_folder(target) as new:
        checks = {}
        for name, tensors in files.items():
            file = new / f"{name}.safetensors"
            save_file({key: _compact(t) for key, t in tensors.items()}, file)
            checks[name] = file_crc(file)
        record = {
            "files": checks,
            "configuration": settings,
            "history": asdict(state.history),
            "made with": {"torch": torch.__version__, "device": str(state.device)},
        }
        record["crc"] = _record_crc(record)
        (new / "state.json").write_text(json.dumps(record, indent=1))
    for old in checkpoints(folder)[:-KEPT]:
        atomic.remove_folder(old)
    return target


def resume(state: TrainState, folder: Path, settings: dict) -> bool:
    """Bring `state` to where the newest readable checkpoint in `folder` left it.

    Returns  whether there was one; the leftovers of killed writes are deleted
    Warns    UserWarning   a checkpoint that cannot be read
    Raises   ValueError    the folder belongs to a run of another configuration, or to
             somebody else; the message says which, and the run is as it was
    """
    with state.rank_0_first():
        newest = _newest(folder, settings)
    if newest is None:
        return False
    _restore(state, *newest)
    return True


def _newest(folder: Path, settings: dict) -> tuple[Files, dict] | None:
    """(files, history) of the newest checkpoint that can be read; see resume."""
    _refuse_strangers(folder)
    atomic.sweep(folder)
    for path in reversed(checkpoints(folder)):
        try:
            files, record = _read(path)
        except (OSError, ValueError, SafetensorError) as error:
            aside = _put_aside(path)
            warnings.warn(
                f"{path} cannot be read ({error}) and is {aside.name} now; the one "
                "before it is used",
                stacklevel=4,
            )
            continue
        _refuse_other(folder, record["configuration"], settings)
        return files, record["history"]
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(filter(_is_ours, Path(folder).glob("step-*")), key=_steps)


def _steps(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def _is_ours(path: Path) -> bool:
    """Whether a path is named like a checkpoint and holds a file of one."""
    files = ("state.json", "trainable.safetensors")
    return bool(NAME.fullmatch(path.name)) and any((path / f).exists() for f in files)


def _refuse_strangers(folder) -> None:
    for path in Path(folder).glob("step-*"):
        if NAME.fullmatch(path.name) and not _is_ours(path):
            raise ValueError(
                f"{path} is no checkpoint of a run of ours, and stands where one would "
                "be written: give this run a folder of its own"
            )


def _put_aside(path: Path) -> Path:
    """Rename what cannot be read, so that it neither counts nor is lost."""
    aside = path.with_name(f"unreadable-{path.name}")
    if aside.exists():
        atomic.remove_folder(aside)
    return path.rename(aside)


def _record_crc(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _files(state: TrainState) -> Files:
    return {
        "trainable": state.weights(),
        "optimizer": {
            f"{name}.{key}": value
            for name, moments in state.moments().items()
            for key, value in moments.items()
        },
        "best": state.best,
        "rng": rng_state(state.device),
    }


def _restore(state: TrainState, files: Files, history: dict) -> None:
    state.load_weights(files["trainable"])
    moments = {}
    for key, value in files["optimizer"].items():
        name, _, kind = key.rpartition(".")
        moments.setdefault(name, {})[kind] = value
    state.load_moments(moments)
    state.best = files["best"]
    state.history = History(**history)
    state.history.validation = [tuple(each) for each in history["validation"]]
    state.history.resumed_from = state.history.steps
    set_rng_state(files["rng"], state.device)


def _read(path: Path) -> tuple[Files, dict]:
    record = records.read_object(path / "state.json")
    if record.pop("crc", None) != _record_crc(record):
        raise ValueError("state.json is not what was written")
    files = {}
    for name, crc in record["files"].items():
        file = path / f"{name}.safetensors"
        if file_crc(file) != crc:
            raise ValueError(f"{file.name} is not what was written")
        files[name] = load_file(file)
    return files, record


def _refuse_other(folder, theirs: dict, ours: dict) -> None:
    theirs, ours = dict(_flat(theirs)), dict(_flat(ours))
    differences = [
        f"{name} is {theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here"
        for name in theirs | ours
        if theirs.get(name, "absent") != ours.get(name, "absent")
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{folder} holds checkpoints of another run: {'; '.join(differences[:3])}"
            f"{more}. Give this run a folder of its own, or delete that one"
        )


def _flat(settings, prefix=""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _compact(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone()
