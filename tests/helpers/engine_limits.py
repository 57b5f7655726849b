"""What other engines ask of an adapter's folder, as a table: see docs/other_engines.md.

Each row was read in the source of one version; the guide names the lines. No engine is
imported here, and none was run. What becomes of a folder has two bad ends:

    refused  an error while the adapter is loaded, or converted
    wrong    loaded without an error; then it fails, or the answers are another model's
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SERVED, REFUSED, WRONG = "served", "refused", "wrong"
DTYPES = {"F32", "F16", "BF16"}  # cast to the base's, whichever of these it is

Ranks = Mapping[str, int]  # of the tensor A, by module
Scales = dict[str, float]  # of B A, by module


@dataclass(frozen=True)
class Saved:
    """A folder, and the model that it was saved from.

    Args
        scales  {module: factor of B A in the model's forward}
        layers  of the model
    """

    folder: Path
    scales: Scales
    layers: int


@dataclass(frozen=True)
class Engine:
    """What one version of an engine asks of a folder.

    Args
        needs      {field of the config: its type}: an error without one
        values     {field: (values that are served, what becomes of others)}
        key        of a tensor; the group "module" is what names the module
        whole      whether that is the module's whole name, or the end of it
        other_key  what becomes of a key of another form
        stranger   what becomes of a key that names no module of the base
        kinds      the last parts of module names that are served; None: all
        partners   {kind: (another one that its layer needs, what becomes without)}
        every      whether a kind of module must be adapted in all layers
        listed     whether target_modules must be a list
        all_files  whether each .safetensors of the folder is read
        ranks      the values of the option that limits the rank; empty: any rank
        usual      the option's default
        scales     (config, ranks) -> the factors of B A that the engine computes
    """

    name: str
    version: str
    scales: Callable[[Mapping, Ranks], Scales]
    key: str
    other_key: str
    stranger: str
    whole: bool = True
    needs: Mapping[str, type | tuple] = field(default_factory=dict)
    values: Mapping[str, tuple[Collection, str]] = field(default_factory=dict)
    kinds: Collection[str] | None = None
    partners: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    every: bool = False
    listed: bool = False
    all_files: bool = False
    ranks: tuple[int, ...] = ()
    usual: int | None = None

    def outcome(self, saved: Saved) -> str:
        """SERVED, perhaps with an option; REFUSED; or WRONG."""
        ends = {end for end, _ in self.objections(saved)}
        if ends:
            return REFUSED if REFUSED in ends else WRONG
        rank = max(_ranks(_shapes(saved.folder)).values())
        if self.usual is None or rank <= self.usual:
            return SERVED
        return f"{SERVED}, {min(r for r in self.ranks if r >= rank)}"

    def objections(self, saved: Saved) -> list[tuple[str, str]]:
        """(REFUSED or WRONG, why) of everything that is not as the engine wants it."""
        files = {path.name for path in saved.folder.iterdir()}
        if missing := {CONFIG, WEIGHTS} - files:
            return [(REFUSED, f"no {sorted(missing)}")]
        config = json.loads((saved.folder / CONFIG).read_text("utf-8"))
        shapes = _shapes(saved.folder)
        return [
            *self._of_files(files),
            *self._of_config(config),
            *self._of_keys(shapes, saved),
            *self._of_kinds(_ranks(shapes), saved),
            *self._of_scales(config, _ranks(shapes), saved),
        ]

    def _of_files(self, files: Collection[str]) -> Iterator[tuple[str, str]]:
        others = {f for f in files if f.endswith(".safetensors")} - {WEIGHTS}
        if self.all_files and others:
            yield WRONG, f"reads {sorted(others)} as well"

    def _of_config(self, config: Mapping) -> Iterator[tuple[str, str]]:
        for name, kind in self.needs.items():
            if not isinstance(config.get(name), kind):
                yield REFUSED, f"{name}={config.get(name)!r}"
        for name, (served, end) in self.values.items():
            if name in config and config[name] not in served:
                yield end, f"{name}={config[name]!r}"
        if self.listed and not isinstance(config.get("target_modules"), list):
            yield REFUSED, f"target_modules={config.get('target_modules')!r}"
        ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
        if self.ranks and max(ranks) > max(self.ranks):
            yield REFUSED, f"rank {max(ranks)}"

    def _of_keys(self, shapes: Mapping, saved: Saved) -> Iterator[tuple[str, str]]:
        for key, (dtype, _) in shapes.items():
            if dtype not in DTYPES:
                yield REFUSED, f"{key} is {dtype}"
            match = re.fullmatch(self.key, key)
            if match is None:
                yield self.other_key, key
                continue
            module, names = match["module"], saved.scales
            ends = not self.whole and any(n.endswith(f".{module}") for n in names)
            if module not in names and not ends:
                yield self.stranger, key

    def _of_kinds(self, ranks: Ranks, saved: Saved) -> Iterator[tuple[str, str]]:
        for name in ranks:
            parent, _, kind = name.rpartition(".")
            partner, end = self.partners.get(kind, (None, None))
            if self.kinds is not None and kind not in self.kinds:
                yield WRONG, f"{kind} is not served"
            if partner and f"{parent}.{partner}" not in ranks:
                yield end, f"{name} without {partner}"
        kinds = [name.rpartition(".")[2] for name in ranks]
        for kind in set(kinds):
            if self.every and kinds.count(kind) != saved.layers:
                yield WRONG, f"{kind} in {kinds.count(kind)} of {saved.layers} layers"

    def _of_scales(self, config, ranks, saved: Saved) -> Iterator[tuple[str, str]]:
        if not self.needs.keys() <= config.keys():
            return  # it was refused already
        for name, scale in self.scales(config, ranks).items():
            true = saved.scales.get(name, scale)
            if not math.isclose(scale, true, rel_tol=1e-6):
                yield WRONG, f"{name}: factor {scale:.4g} instead of {true:.4g}"


def _shapes(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """{key: (dtype, shape)}"""
    with safe_open(folder / WEIGHTS, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {k: (s.get_dtype(), s.get_shape()) for k, s in slices.items()}


def _ranks(shapes: Mapping) -> dict[str, int]:
    """{module: rows of its A}, by the names that PEFT gives to keys."""
    ranks = {}
    for key, (_, shape) in shapes.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            ranks[name] = shape[0]
    return ranks


# ----------------------------------------------------------- Factors, as each computes


def _by_patterns(config: Mapping, ranks: Ranks) -> Scales:
    """vLLM: PEFT's patterns and rslora."""

    def value(pattern, name, usual):
        matches = (v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name))
        return next(matches, usual)

    def scale(name):
        r = value(config.get("rank_pattern") or {}, name, config["r"])
        alpha = value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        return alpha / (math.sqrt(r) if config.get("use_rslora") else r)

    return {name: scale(name) for name in ranks}


def _plain(config: Mapping, ranks: Ranks) -> Scales:
    """SGLang: one factor for all modules."""
    return dict.fromkeys(ranks, config["lora_alpha"] / config["r"])


def _by_tensor(config: Mapping, ranks: Ranks) -> Scales:
    """llama.cpp: the rank of each tensor."""
    return {name: config["lora_alpha"] / rank for name, rank in ranks.items()}


ORDER = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()


def _padded(config: Mapping, ranks: Ranks, rslora: bool = False) -> Scales:
    """LoRAX: by the config's r, which is the padded rank after the first kind."""
    r, scales = config.get("r", 8), {}
    for kind in ORDER:
        names = [name for name in ranks if name.rpartition(".")[2] == kind]
        root = rslora and config.get("use_rslora")
        factor = config.get("lora_alpha", 8) / (math.sqrt(r) if root else r)
        scales |= dict.fromkeys(names, factor)
        if names:
            r = 8 if ranks[names[0]] <= 8 else math.ceil(ranks[names[0]] / 16) * 16
    return scales


def _padded_by_roots(config: Mapping, ranks: Ranks) -> Scales:
    """TGI: the same, with rslora."""
    return _padded(config, ranks, rslora=True)


# ------------------------------------------------------------------------- The engines

PEFT_KEY = r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight"
NUMBER, EMPTY = (int, float), (None, [])
# Initializations that leave the base alone: A and B are then all there is.
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")

VLLM = Engine(
    "vLLM",
    "0.33.0",
    _by_patterns,
    key=PEFT_KEY,
    other_key=REFUSED,
    stranger=WRONG,
    needs={"r": int, "lora_alpha": NUMBER, "target_modules": (list, str)},
    values={
        "bias": (("none",), REFUSED),
        "use_dora": ((False, None), REFUSED),
        "lora_bias": ((False, None), REFUSED),
        "modules_to_save": (EMPTY, REFUSED),
        "init_lora_weights": (PLAIN, REFUSED),
    },
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    usual=16,
)
SGLANG = Engine(
    "SGLang",
    "0.5.23",
    _plain,
    key=r"(?:.*?\.)?(?P<module>layers\.\d+\..+_proj)\.lora_[AB]\.weight",
    whole=False,
    other_key=WRONG,
    stranger=WRONG,
    needs={"r": int, "lora_alpha": NUMBER, "peft_type": str},
    values={
        "peft_type": (("LORA", "lora"), REFUSED),
        "use_dora": ((False, None), REFUSED),
        "init_lora_weights": (PLAIN, WRONG),
    },
    kinds=ORDER,
    partners={
        "q_proj": ("v_proj", REFUSED),
        "k_proj": ("q_proj", WRONG),
        "v_proj": ("q_proj", WRONG),
        "up_proj": ("gate_proj", WRONG),
    },
    listed=True,
    all_files=True,
)
LORAX = Engine(
    "LoRAX",
    "a7394ba",
    _padded,
    key=PEFT_KEY,
    other_key=WRONG,
    stranger=WRONG,
    values={
        "bias": (("none",), WRONG),
        "use_dora": ((False, None), WRONG),
        "init_lora_weights": (PLAIN, WRONG),
    },
    kinds=ORDER,
    every=True,
    all_files=True,
)
TGI = replace(
    LORAX,
    name="TGI",
    version="3.3.7",
    scales=_padded_by_roots,
    values={**LORAX.values, "peft_type": (("LORA",), REFUSED)},
)
LLAMA_CPP = Engine(
    "llama.cpp",
    "0b03ada",
    _by_tensor,
    key=PEFT_KEY,
    other_key=REFUSED,
    stranger=REFUSED,
    needs={"lora_alpha": NUMBER},
    values={"init_lora_weights": (PLAIN, WRONG)},
)
ENGINES = {e.name: e for e in (VLLM, SGLANG, LORAX, TGI, LLAMA_CPP)}
