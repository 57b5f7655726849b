"""One adapter folder: read and checked without a model, and written whole.

adapter_config.json          the method and its options
adapter_model.safetensors    the tensors, and in its metadata notes of the base model
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..common import atomic
from . import base_notes, foreign, formats
from .formats import Format
from .untrusted import read_json, refuse_unusable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter folder.

    Args
        config   the fields of adapter_config.json
        tensors  {key: tensor}, on the CPU
        notes    what the file says of its base, as text: see base_notes.py
        folder   where it was read; None for one that is to be written
    """

    config: dict
    tensors: dict[str, Tensor]
    notes: dict[str, str]
    folder: Path | None = None

    @classmethod
    def read(cls, folder: str | Path) -> "AdapterFile":
        """The content of a folder, ours or PEFT's, under PEFT's names: see foreign.py.

        Raises  FileNotFoundError   one of the two files is not there
                ValueError          a file that is broken, of an unknown type, with a
                dtype that is not allowed, NaN, infinity, or a note that is none of ours
        """
        folder = Path(folder)
        config = _read_config(folder / CONFIG)
        tensors, metadata = foreign.read_weights(folder / WEIGHTS)
        refuse_unusable(tensors, folder / WEIGHTS)
        row = formats.of_config(config)
        tensors = foreign.plain_keys(tensors, row, folder / WEIGHTS)
        notes = {n: metadata[n] for n in base_notes.NOTES if n in metadata}
        base_notes.read_bits(notes.get(base_notes.BASE_BITS))
        return cls(config, tensors, notes, folder)

    def write(self, folder: str | Path) -> None:
        """Write the folder, whole or not at all."""
        atomic.sweep(folder)  # what a killed save left
        with atomic.new_files(folder, (CONFIG, WEIGHTS)) as new:
            save_file(self.tensors, new / WEIGHTS, {"format": "pt"} | self.notes)
            text = json.dumps(self.config, indent=2, sort_keys=True)
            (new / CONFIG).write_text(text + "\n", encoding="utf-8")

    @property
    def format(self) -> Format:
        """The row of the method that reads this file."""
        return formats.of_config(self.config)

    @property
    def modules(self) -> list[str]:
        """The modules that the keys name: patterns of the config are not asked."""
        return self.format.modules(self.tensors)

    def arguments(self) -> dict:
        """The arguments of the method's inject, but for the targets.

        Raises  ValueError  a field that is not implemented, a pattern of no use
        """
        return self.format.arguments(self.config, self.modules)

    def refuse_other_keys(
        self, expected: Collection[str], ignored: Collection[str] = ()
    ) -> None:
        """ValueError for a missing key, or one neither expected nor ignored."""
        missing = [key for key in expected if key not in self.tensors]
        extra = [k for k in self.tensors if k not in expected and k not in ignored]
        for word, keys in (
            ("lacks", missing),
            ("holds, beyond what its config says,", extra),
        ):
            if keys:
                raise ValueError(
                    f"{self._weights} {word} {keys[0]} ({len(keys)} such tensors)"
                )

    def refuse_other_shapes(
        self, expected: Mapping[str, Tensor], needed_by: str
    ) -> None:
        """ValueError for a tensor that does not fit in one of a shape and a dtype.

        Args
            expected   {key: tensor of the shape and dtype}; its values do not count
            needed_by  who needs them, for the error: "the config needs"
        """
        for key, wanted in expected.items():
            tensor = self.tensors[key]
            if tensor.shape != wanted.shape:
                raise ValueError(
                    f"{self._weights}: {key} has shape {tuple(tensor.shape)}, "
                    f"{needed_by} {tuple(wanted.shape)}"
                )
            if not tensor.to(wanted.dtype).isfinite().all():
                raise ValueError(
                    f"{self._weights}: {key} holds values beyond the range of "
                    f"{wanted.dtype}"
                )

    @property
    def _weights(self) -> Path:
        return self.folder / WEIGHTS


def _read_config(path: Path) -> dict:
    """The config of a file, of a type that is known here."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist as a file: name the folder that holds {CONFIG} and "
            f"{WEIGHTS}{foreign.folders_inside(path.parent, CONFIG)}"
        )
    config = read_json(path)
    formats.of_config(config, path)
    return config
