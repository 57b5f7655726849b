"""Bottleneck adapters: Parameter-Efficient Transfer Learning for NLP. Houlsby et al.,
arXiv:1902.00751v2.

    h = y + U σ(D y + b_D) + b_U        y: what the sublayer's last projection returns

Inside each layer, after attention and after the MLP, before the residual sum. D (m, d)
goes down to m numbers, U (d, m) up again: 2md + d + m parameters, nearly the identity
at the start.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common import check
from ..core import adapter, left_out, targets
from ..core.adapter import Adapter, Plan, factory_kwargs, sizes

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
PLACEMENTS = {"houlsby": ("attention", "mlp"), "pfeiffer": ("mlp",)}
STD = 1e-2  # of the start, "near-identity": section 2.1 and figure 6 of the paper


class Bottleneck(Adapter):
    """A frozen projection with a bottleneck after it.

        y = W0 x + b      h = y + U σ(D y + b_D) + b_U      [1] section 2.1, figure 2

    Args
        base          nn.Linear or Conv1D, frozen here.    W0 (d, d_in)
        m             units of the bottleneck, 1 <= m <= d
        nonlinearity  σ; see HoulsbyConfig
    Returns  (…, d), dtype of the base's output
    Raises   ValueError   m or nonlinearity out of range
    Memory   2md + d + m parameters, in float32 on a half-precision base
    Source   [1] arXiv:1902.00751v2
    """

    cannot_merge = (
        "its nonlinearity stands between the projection and what follows. No single "
        "matrix does the same for every input, which is why it costs time when used"
    )

    def __init__(self, base: nn.Module, m: int = 64, nonlinearity: str = "gelu"):
        d, _ = sizes(base)
        HoulsbyConfig(m, nonlinearity).check_units(d)
        super().__init__(base)
        like = factory_kwargs(base)
        self.down = nn.Linear(d, m, **like)
        self.up = nn.Linear(m, d, **like)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=STD, a=-2 * STD, b=2 * STD)
            nn.init.zeros_(linear.bias)
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor) -> Tensor:
        y, sigma = self.base(x), NONLINEARITIES[self.nonlinearity]
        narrow = sigma(self.down(y.to(self.down.weight.dtype)))  # σ(D y + b_D): (…, m)
        return (y + self.up(narrow)).to(y.dtype)  # y + U … + b_U


@dataclass(frozen=True)
class HoulsbyConfig:
    """What a bottleneck is made of; checked when it is made, but for m's upper end.

    m             units of the bottleneck
    nonlinearity  "relu", "gelu", "silu" or "tanh"
    placement     "houlsby": after attention and after the MLP; "pfeiffer": after the
                  MLP alone, half of the parameters (arXiv:2005.00247)
    """

    m: int = 64
    nonlinearity: str = "gelu"
    placement: str = "houlsby"

    def __post_init__(self):
        check.one_of("placement", self.placement, PLACEMENTS)
        check.one_of("nonlinearity", self.nonlinearity, NONLINEARITIES)

    def check_units(self, d: int) -> None:
        """ValueError unless a hidden size of d allows m units."""
        need = "the bottleneck needs"
        check.whole("m", self.m, 1, d, must=need, of="units", why="the hidden size")


def plan(
    model: nn.Module,
    *,
    targets: Mapping[str, nn.Module] | None = None,
    **options,
) -> Plan:
    """The plan of inject, with its arguments; see adapter.plan."""
    config = HoulsbyConfig(**options)
    if targets is None:
        targets = last_projections(model, PLACEMENTS[config.placement])
        left_out.warn(model)
    return adapter.plan(
        model,
        lambda base: Bottleneck(base, config.m, config.nonlinearity),
        targets,
        method="houlsby",
        config=dict(m=config.m, nonlinearity=config.nonlinearity),
    )


def inject(
    model: nn.Module,
    *,
    m: int = 64,
    nonlinearity: str = "gelu",
    placement: str = "houlsby",
    targets: Mapping[str, nn.Module] | None = None,
) -> list[str]:
    """Freeze the model and put a bottleneck after the sublayers of every layer.

    Args
        m, nonlinearity, placement   see HoulsbyConfig
        targets     a ready {name: module} instead, for load()
    Returns  the names of the wrapped projections, each the last of its sublayer
    Raises   ValueError   an argument out of its range, no such module; the model as it
             was
    """
    options = dict(m=m, nonlinearity=nonlinearity, placement=placement)
    return adapter.apply(model, plan(model, targets=targets, **options))


def last_projections(
    model: nn.Module, kinds: tuple[str, ...], *, needed: bool = True
) -> dict[str, nn.Module]:
    """{name: module}: of each layer and kind the last projection to the hidden size.

    Args
        needed  whether there must be one
    Raises  ValueError  no such projection; a model that carries adapters already
    """
    targets.refuse_unfit(model)
    hidden = targets.hidden_size(model)
    linear = targets.projections(model)
    last: dict[tuple[str, str], str] = {}
    for name, kind in targets.kinds(model).items():
        if kind in kinds and sizes(linear[name])[0] == hidden:
            last[targets.layer_of(model, name), kind] = name
    if not last and needed:
        raise ValueError(
            f"no layer of this {type(model).__name__} has a projection that returns "
            f"{hidden} numbers, the hidden size, behind its {' or '.join(kinds)}"
        )
    names = set(last.values())
    return {name: module for name, module in linear.items() if name in names}
