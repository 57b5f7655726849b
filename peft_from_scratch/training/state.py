"""TrainState: everything that the next step depends on, and the optimizer in it.

Some of its methods are questions to which a run on several ranks has other answers:
what is my share, what do all of us have together, who writes. Here one process answers,
for which most of them are nothing to do. parallel/ has the answers of many.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.adapter import adapters, trainable
from ..paged import PAGE_BYTES, PagedAdamW
from .batch import Row
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
    rank: int = 0  # of this process among those that train together; rank 0 writes
    ranks: int = 1

    def share(self, micro_batches: list[list[Row]]) -> list[list[Row]]:
        """This rank's rows of a step's micro-batches."""
        return micro_batches

    def begin_step(self, config: TrainConfig) -> None:
        """Called before each step: a place to set this rank's random generators."""

    def total(self, value):
        """The sum over all ranks of a number, the same on each."""
        return value

    def backward(self, part: Tensor) -> None:
        """Add to the gradients those of a part of the step's loss.

        Over all ranks and micro-batches the parts add up to the loss of the step.
        """
        part.backward()

    def clip(self, max_norm: float) -> float:
        """Scale the gradient of the whole step; its norm over all ranks, before."""
        parameters = list(self.trainable.values())
        return nn.utils.clip_grad_norm_(parameters, max_norm).item()

    def rank_0_first(self) -> AbstractContextManager[None]:
        """Rank 0 runs the block, and then the other ranks do."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """The trainable weights, whole, on rank 0; all ranks call it."""
        return dict(self.trainable)

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

    def load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        """Give the optimizer what `moments` of any number of ranks has returned."""
        number = {name: i for i, name in enumerate(self.trainable)}
        numbered = {number[name]: state for name, state in moments.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})


# What `train` asks for the model that steps, and the state of its run: `alone`, or an
# engine of parallel/, which takes the model apart and puts it together at the end.
Engine = Callable[
    [nn.Module, TrainState, TrainConfig],
    AbstractContextManager[tuple[nn.Module, TrainState]],
]


def alone(model: nn.Module, state: TrainState, config: TrainConfig):
    """The Engine of one process: the model and the state as they are."""
    return nullcontext((model, state))


def new_state(
    model: nn.Module,
    config: TrainConfig,
    optimizer_of: Callable[[list[dict], TrainConfig], torch.optim.Optimizer]
    | None = None,
    kind: type[TrainState] = TrainState,
    **more,
) -> TrainState:
    """The state of a run that has done no step yet.

    Args
        optimizer_of  makes the optimizer of groups and config; None: new_optimizer
        kind, more    class of the state, and the fields that it has besides
    Raises  ValueError   nothing to train, or flags that inject() did not set
    """
    parameters = trainable(model)
    refuse_other_flags(model, parameters)
    groups = parameter_groups(model, parameters, config)
    optimizer = (optimizer_of or new_optimizer)(groups, config)
    optimizer.zero_grad(set_to_none=True)  # what a backward pass of the caller's left
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [p for group in groups for p in group["params"]]  # as AdamW numbers them
    trained = {names[id(parameter)]: parameter for parameter in ordered}
    return kind(trained, optimizer, ordered[0].device, **more)


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
