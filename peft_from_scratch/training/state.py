"""TrainState: everything that the next step depends on, and the optimizer in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.adapter import adapters, trainable
from ..paged import PAGE_BYTES, PagedAdamW
from .config import History, TrainConfig
from .guards import refuse_other_flags


@dataclass
class TrainState:
    """Everything that the next step depends on, configuration and rows apart."""

    trainable: dict[str, nn.Parameter]  # in the order in which the optimizer has them
    optimizer: torch.optim.Optimizer
    device: torch.device
    history: History = field(default_factory=History)
    best: dict[str, Tensor] = field(default_factory=dict)  # copies on the CPU

    def copies(self) -> dict[str, Tensor]:
        """The trainable weights as they are now, on the CPU."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.trainable.items()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy `weights` into the trainable parameters of the same names."""
        for name, parameter in self.trainable.items():
            parameter.copy_(weights[name])

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """No gradient stays behind when the block ends, not even by an error."""
        try:
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """{parameter's name: AdamW's tensors of it}, of those that have some."""
        names = list(self.trainable)  # as the optimizer numbers them
        numbered = self.optimizer.state_dict()["state"]
        return {names[number]: state for number, state in numbered.items()}


def new_state(model: nn.Module, config: TrainConfig) -> TrainState:
    """The state of a run that has done no step yet.

    Raises  ValueError   nothing to train, or flags that inject() did not set
    """
    parameters = trainable(model)
    refuse_other_flags(model, parameters)
    groups = parameter_groups(model, parameters, config)
    optimizer = new_optimizer(groups, config)
    optimizer.zero_grad(set_to_none=True)  # what a backward pass of the caller's left
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [p for group in groups for p in group["params"]]  # as AdamW numbers them
    trained = {names[id(parameter)]: parameter for parameter in ordered}
    return TrainState(trained, optimizer, ordered[0].device)


def parameter_groups(
    model: nn.Module, parameters: dict[str, nn.Parameter], config: TrainConfig
) -> list[dict]:
    """AdamW's groups, each with the `ratio` of its learning rate to the config's.

    LoRA+ has two: the B of each LoRA learns lr_ratio times as fast as everything else.

    Raises  ValueError   an lr_ratio for a model without LoRA
    """
    if config.lr_ratio == 1:
        return [{"params": list(parameters.values()), "ratio": 1.0}]
    modules = adapters(model).values()
    fast = {
        id(m.get_parameter(name)) for m in modules for name in m.loraplus_parameters
    }
    if not fast:
        raise ValueError(
            f"lr_ratio={config.lr_ratio} is for the B of a LoRA, and this "
            f"{type(model).__name__} has none: leave it at 1"
        )
    slow = [p for p in parameters.values() if id(p) not in fast]
    quick = [p for p in parameters.values() if id(p) in fast]
    return [
        {"params": slow, "ratio": 1.0},
        {"params": quick, "ratio": config.lr_ratio},
    ]


def new_optimizer(groups: list[dict], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW for these groups, paged if the config says so: either has the same bits."""
    settings = dict(lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    settings["fused"] = True
    if config.paged is None:
        return torch.optim.AdamW(groups, **settings)
    paged = PagedAdamW(groups, **settings, budget_bytes=PAGE_BYTES)
    paged.budget_bytes = max(PAGE_BYTES, int(config.paged * paged.states_bytes))
    return paged
