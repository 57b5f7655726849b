"""The layouts of adapter folders as a table: one row a method.

    adapter_config.json          peft_type, and arguments of `inject` in PEFT's terms
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight …

The layout is Hugging Face PEFT's. A method that PEFT lacks (bottleneck adapters,
BitFit, full fine-tuning) is written in the same way, with a peft_type of our own. A new
method that should be saved needs one row in ROWS. No method's own file knows PEFT.

Most of a row is data. Where PEFT stores another thing than `inject` takes, a small
function beside the rows converts it: ranks by module, a prefix whose MLP is computed
once and for all, a PiSSA as a LoRA of twice the rank.

A field of a file that is not in the method's row, and is not at its default, is refused
by name and never ignored: loading without it would give another model.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.check import shortened
from ..core import adapter
from ..core.adapter import Plan
from ..methods import named
from . import patterns

PREFIX = "base_model.model."  # of a key, before the name that the model uses
# Fields that say nothing about the weights.
METADATA = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type"}
METADATA |= {"peft_version", "revision", "task_type"}


@dataclass(frozen=True)
class Format:
    """The layout of one method's adapters.

    Args
        method     its name in the table of methods
        peft_type  what the config calls the method
        tensors    {parameter of an adapter: its name in the file}; empty where the
                   model's own parameters train
        fields     {argument of inject: field of the config}
        ignored    fields that change nothing in what the file holds
        absent     {field: value}, where PEFT's default is not that of inject
        marks      {field: value} that tells this method from others of its peft_type
        supported  {field: (values, reason)}: any other value is refused for the reason
        by_module  whether the keys name modules, which `inject` then gets as targets
        described  model -> further fields to write
        converted  (arguments, names of the adapted modules) -> those arguments that
                   inject takes in another form than the file has
        values     adapter -> {parameter: value to write}
    """

    method: str
    peft_type: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    ignored: Collection[str] = frozenset()
    absent: Mapping[str, object] = field(default_factory=dict)
    marks: Mapping[str, object] = field(default_factory=dict)
    supported: Mapping[str, tuple[tuple, str]] = field(default_factory=dict)
    by_module: bool = True
    described: Callable[[nn.Module], dict] = lambda model: {}
    converted: Callable[[dict, list[str]], dict] = lambda arguments, names: {}
    values: Callable[[nn.Module], dict] | None = None

    def plan(self, model: nn.Module, **arguments) -> Plan:
        """The plan of the method's injection with these arguments."""
        return named(self.method).module.plan(model, **arguments)

    def config(self, model: nn.Module) -> dict:
        """The fields of an injected model's config, the general ones not included."""
        options = adapter.injected(model).config
        written = {theirs: options[ours] for ours, theirs in self.fields.items()}
        return {**written, **self.marks, **self.described(model)}

    def arguments(self, config: Mapping, names: list[str]) -> dict:
        """The arguments of inject, but for the targets, that a config stands for.

        Args
            names  the modules that the file adapts
        Raises   ValueError   a field that is not implemented, a pattern of no use
        """
        for name, (values, reason) in self.supported.items():
            if name in config and config[name] not in values:
                raise ValueError(f"{name}={shortened(config[name])} {reason}")
        known = {*METADATA, *self.fields.values(), *self.ignored}
        refuse_unimplemented(config, {*known, *self.supported, *self.marks})
        given = {**self.absent, **config}
        arguments = {
            ours: given[theirs]
            for ours, theirs in self.fields.items()
            if theirs in given
        }
        return arguments | self.converted(arguments, names)

    def key(self, name: str, tensor: str) -> str:
        """The key of a tensor of the adapter on the module `name`."""
        return f"{PREFIX}{name}.{tensor}" if self.by_module else tensor

    def modules(self, keys: Iterable[str]) -> list[str]:
        """The names of the modules that the keys of a file name, in their order."""
        if not self.by_module:
            return []
        ends = [f".{tensor}" for tensor in self.tensors.values()]
        return list(
            dict.fromkeys(
                key.removeprefix(PREFIX).removesuffix(end)
                for key in keys
                for end in ends
                if key.startswith(PREFIX) and key.endswith(end)
            )
        )

    def parameters(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """{key in a file: parameter} of the adapter on the module `name`."""
        return {
            self.key(name, tensor): module.get_parameter(parameter)
            for parameter, tensor in self.tensors.items()
        }

    def written(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """{key in a file: value to write} of the adapter on the module `name`."""
        if self.values is None:
            return self.parameters(name, module)
        return {
            self.key(name, self.tensors[parameter]): value
            for parameter, value in self.values(module).items()
        }


def of_config(config: object, where: object = "adapter_config.json") -> Format:
    """The row that reads a config: of those of its peft_type, the one with most marks.

    Args
        where  the place of the config, for the error
    Raises   ValueError   a type that is unknown here
    """
    kind = config.get("peft_type") if isinstance(config, Mapping) else None
    rows = [
        row
        for row in FORMATS.values()
        if row.peft_type == kind
        and all(config.get(name) is value for name, value in row.marks.items())
    ]
    if not rows:
        types = dict.fromkeys(row.peft_type for row in FORMATS.values())
        raise ValueError(
            f"{where}: peft_type={shortened(kind)} is not implemented; known are "
            f"{', '.join(types)}"
        )
    return max(rows, key=lambda row: len(row.marks))


def of_method(name: str) -> Format:
    """The row of a method; ValueError for one that has none."""
    if name not in FORMATS:
        raise ValueError(f"adapters of the method {name!r} have no file format")
    return FORMATS[name]


def general_fields(
    peft_type: str, base: str | None, task_type: str | None = "CAUSAL_LM"
) -> dict:
    """What every config says, whatever the method.

    Args
        task_type  PEFT's name of the model's use: what its wrapper looks for in it
        base  name or path of the model that was adapted; None where nobody knows
    """
    return {
        "peft_type": peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }


def refuse_unimplemented(config: Mapping, implemented: Collection[str]) -> None:
    """ValueError naming the first field that asks for something this library lacks."""
    for name, value in config.items():
        default = value is False or value in (None, "", [], {})  # 0 is a layer's index
        if name not in implemented and not default:
            raise ValueError(
                f"adapter_config.json sets {name[:99]}={shortened(value)}, which is "
                "not implemented here; loading without it would give another model"
            )


# -------------------------------------------------------------------- Conversions


def _targets(model: nn.Module) -> dict:
    """The names of the wrapped modules, and whether one of them is a Conv1D."""
    wrapped = adapter.adapters(model)
    return {
        "target_modules": sorted(wrapped),
        "fan_in_fan_out": any(isinstance(m.base, Conv1D) for m in wrapped.values()),
    }


def _lora_targets(model: nn.Module, times: int = 1) -> dict:
    """Targets by PEFT's rule; ranks and alphas that differ, by full module name.

    Args
        times  how often the file holds the rank of the adapter, and its alpha

    Not by the patterns of the injection: the order of patterns that overlap does not
    survive a JSON file.
    """
    options = adapter.injected(model).config
    wrapped = adapter.adapters(model)
    names = {name: patterns.unambiguous(name, wrapped) for name in wrapped}
    ranks = {names[n]: times * len(m.A) for n, m in wrapped.items()}
    alphas = {names[n]: times * m.alpha for n, m in wrapped.items()}
    r, alpha = times * options["r"], times * options["alpha"]
    return _targets(model) | {
        "rank_pattern": {name: own for name, own in ranks.items() if own != r},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": patterns.target_modules_of(model, wrapped),
    }


def _exact_patterns(arguments: dict, names: list[str]) -> dict:
    """rank_pattern and alpha_pattern with one exact pattern a module."""
    return {
        name: patterns.exact_patterns(name, arguments.get(name), names)
        for name in ("rank_pattern", "alpha_pattern")
    }


def _twice_the_rank(model: nn.Module) -> dict:
    """A PiSSA as a LoRA of rank 2r: alpha doubles too, and the scale stays."""
    options = adapter.injected(model).config
    sizes = {"r": 2 * options["r"], "lora_alpha": 2 * options["alpha"]}
    return _lora_targets(model, times=2) | sizes


def _change_since_start(module: adapter.Adapter) -> dict[str, Tensor]:
    """A and B of rank 2r, of the same scale: B A - B0 A0 = [B, -B0] [A; A0]."""
    return {
        "A": torch.cat([module.A, module.A0]),
        "B": torch.cat([module.B, -module.B0], dim=1),
    }


def _feedforward(arguments: dict, names: list[str]) -> dict:
    """The modules whose input is scaled, from a list of ends or a regex."""
    ends = arguments["feedforward"]
    return {"feedforward": patterns.matches_field("feedforward_modules", ends, names)}


def _prompt_sizes(model: nn.Module) -> dict:
    (module,) = adapter.adapters(model).values()
    config = module.base.config
    return {
        "token_dim": module.P.shape[1],
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": _heads(config),
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def _heads(config) -> int:
    """Attention heads, or 1 where no number is all layers': PEFT asks for one.

    A prompt does not use it. Mamba has none; in other models the layers differ.
    """
    try:
        return config.num_attention_heads
    except (AttributeError, RuntimeError):
        return 1


def _prefix_sizes(model: nn.Module) -> dict:
    (module,) = adapter.adapters(model).values()
    layers, heads, size = module.shape
    return {
        "token_dim": heads * size,
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }


def _flat_prefix(module: adapter.Adapter) -> dict[str, Tensor]:
    """P (n, 2 · layers · h_kv · d), computed by the MLP where there is one."""
    return {"P": module.states().flatten(1)}


# -------------------------------------------------------------------------- Table

LORA = Format(
    "lora",
    "LORA",
    tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
    fields=dict(
        r="r",
        alpha="lora_alpha",
        rslora="use_rslora",
        dropout="lora_dropout",
        bias="bias",
        rank_pattern="rank_pattern",
        alpha_pattern="alpha_pattern",
    ),
    # The keys name the modules and a layer knows its own orientation. The others belong
    # to options that are refused.
    ignored={"target_modules", "exclude_modules", "fan_in_fan_out", "eva_config"}
    | {"megatron_core", "qalora_group_size"},
    absent={"lora_alpha": 8},
    supported={
        "init_lora_weights": (
            (True, False, "gaussian", "orthogonal", "eva"),
            "changed the base model, which this file does not hold; convert it to a "
            "plain LoRA with PEFT first",
        )
    },
    described=_lora_targets,
    converted=_exact_patterns,
)
IN_FRONT = Format(  # prompt and prefix: one tensor, which names no module
    "prompt",
    "PROMPT_TUNING",
    tensors={"P": "prompt_embeddings"},
    fields={"n": "num_virtual_tokens"},
    ignored={"token_dim", "num_layers", "num_attention_heads"},  # in P's shape
    absent={"num_virtual_tokens": None},
    by_module=False,
)
# The first row of a peft_type reads its files, unless one with more marks fits.
ROWS = (
    LORA,
    replace(
        LORA,
        method="dora",
        tensors={**LORA.tensors, "m": "lora_magnitude_vector"},
        marks={"use_dora": True},
    ),
    replace(
        LORA, method="pissa", described=_twice_the_rank, values=_change_since_start
    ),
    replace(LORA, method="qlora"),
    Format("full", "FULL", by_module=False),
    Format(
        "houlsby",
        "HOULSBY",
        tensors={n: n for n in ("down.weight", "down.bias", "up.weight", "up.bias")},
        fields={"m": "bottleneck_size", "nonlinearity": "non_linearity"},
        ignored={"target_modules"},
        absent={"bottleneck_size": None},
        described=lambda model: {"target_modules": sorted(adapter.adapters(model))},
    ),
    replace(
        IN_FRONT,
        method="prefix",
        peft_type="PREFIX_TUNING",
        # The others qualify an MLP that files never hold.
        ignored={*IN_FRONT.ignored, "encoder_hidden_size", "prefix_projection"}
        | {"num_transformer_submodules", "init_weights"},
        described=_prefix_sizes,
        values=_flat_prefix,
    ),
    replace(
        IN_FRONT,
        # The others qualify PEFT's own initialization.
        ignored={*IN_FRONT.ignored, "prompt_tuning_init", "prompt_tuning_init_text"}
        | {"tokenizer_name_or_path", "tokenizer_kwargs"},
        supported={
            "num_transformer_submodules": (
                (None, 1),
                "is not implemented: a causal language model has one",
            )
        },
        described=_prompt_sizes,
        converted=lambda arguments, names: {"start": "random"},
    ),
    Format(
        "ia3",
        "IA3",
        tensors={"l": "ia3_l"},
        fields={"feedforward": "feedforward_modules"},
        ignored={"target_modules", "exclude_modules", "fan_in_fan_out"}
        | {"init_ia3_weights"},
        absent={"feedforward_modules": None},
        described=lambda model: _targets(model) | {"init_ia3_weights": True},
        converted=_feedforward,
    ),
    Format("bitfit", "BITFIT", by_module=False),
)
FORMATS = {row.method: row for row in ROWS}
