"""The options of LoRA, and the way from them to one layer for each module.

A module's rank and alpha may depend on its name (rank_pattern, alpha_pattern), and
biases of the model may train as well. LoRA, DoRA, PiSSA, QLoRA and LoftQ share this.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from torch import nn

from ..common import check
from ..core import adapter, left_out
from ..core import targets as targeting
from ..core.adapter import Adapter, Plan, sizes
from ..core.targets import Targets

LARGEST_RANK = 2**16  # beyond any weight's sides: a typo, or a file that means harm
TINIEST, LARGEST = 1e-30, 1e30  # of alpha: its scale and products stay in float32
BIASES = ("none", "lora_only", "all")
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha"}  # -> where none matches


@dataclass(frozen=True)
class LoRAConfig:
    """What a LoRA is made of; checked here.

    r, alpha       > 0, dimensionless; scale = alpha / r. Above min(d_out, d_in), r adds
                   parameters to B A and nothing to its rank. Such ranks are let
                   through: a model's smallest weight may be a gate of 1 x d, and files
                   hold them
    rslora         scale = alpha / sqrt(r) instead, arXiv:2312.03732 section 3
    dropout        probability in [0, 1) on the input of A, in training only
    bias           "none"; "lora_only" also trains the biases of the wrapped modules;
                   "all" every bias of the model
    rank_pattern   {module name, its end, or a regex: rank} where it is not r; the
                   first that matches a module decides
    alpha_pattern  the same for alpha
    """

    r: int = 8
    alpha: float = 16
    rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None

    def __post_init__(self):
        number = "a number above 0 that float32 can hold"
        check.one_of("bias", self.bias, BIASES)
        check.number("alpha", self.alpha, number, above=TINIEST, below=LARGEST)
        chance = "a probability in [0, 1)"
        check.number("dropout", self.dropout, chance, least=0, below=1)
        check.flag("rslora", self.rslora)
        check.whole("r", self.r, 1, LARGEST_RANK, must="the rank must be")


DEFAULTS = asdict(LoRAConfig())
ARGUMENTS = ("targets", "exclude", *DEFAULTS)  # of inject


def plan_layers(
    model: nn.Module,
    layer: type[Adapter],
    method: str,
    targets: Targets,
    exclude: Targets | None,
    options: dict,
) -> Plan:
    """A plan with a `layer`, LoRA or a descendant, beside every target.

    Args
        targets, exclude  see lora.inject
        options           the fields of a LoRAConfig
    Warns    UserWarning  what a preset leaves out: see core/left_out.py
    Raises   ValueError   as lora.inject; the error names the module, where it is one's
             TypeError   an unknown option
    """
    of = "" if method == "lora" else "those of lora.inject(): "
    check.known(f"{method}.inject()", options, ARGUMENTS, of)
    config = LoRAConfig(**options)
    if not isinstance(targets, Mapping):
        left_out.warn_of_preset(model, targets)
        targets = targeting.resolve(model, targets, exclude)
    elif exclude is not None:
        raise ValueError(
            "exclude and a ready {name: module}: leave it out of the latter"
        )
    for name, module in targets.items():
        with check.about(name):
            sizes(module)  # refuses what is no projection
    configs = per_module(config, targets)
    names = {module: name for name, module in targets.items()}
    shared = {name: getattr(config, name) for name in ("rslora", "dropout")}

    def wrap(base: nn.Module) -> Adapter:
        own = configs[names[base]]
        with check.about(names[base]):
            return layer(base, own.r, own.alpha, **shared)

    return adapter.plan(
        model,
        wrap,
        targets,
        method=method,
        config=vars(config) | {p: dict(getattr(config, p) or {}) for p in PATTERNS},
        base_params=_biases(model, config.bias, targets),
    )


def per_module(config: LoRAConfig, modules: Iterable[str]) -> dict[str, LoRAConfig]:
    """{module name: its own config}, by the patterns.

    Raises   ValueError   a rank or alpha out of its range; the error names the module

    All ranks are checked before the first layer is made: a refusal draws no numbers.
    """
    ranks, alphas = (
        targeting.per_module(pattern, getattr(config, pattern), modules, usual)
        for pattern, usual in zip(PATTERNS, (config.r, config.alpha), strict=True)
    )
    configs = {}
    for name in modules:
        with check.about(name):
            configs[name] = replace(config, r=ranks[name], alpha=alphas[name])
    return configs


def _biases(model: nn.Module, bias: str, targets: Mapping) -> list[str]:
    every = [name for name, _ in targeting.named_parameters(model)]
    names = [name for name in every if name.rpartition(".")[2] == "bias"]
    if bias == "lora_only":
        names = [n for n in names if n.rpartition(".")[0] in targets]
    return names if bias != "none" else []
