"""DeepSpeed: the ranks train by DeepSpeed's ZeRO, where it is installed.

    pip install 'peft-from-scratch[deepspeed]'

DeepSpeed joins the tensors that train into one flat buffer, and cuts that in N equal
parts. Its engine wraps the model, has its own backward pass and its own step, and clips
within the step. It holds float32 models here: in half precision it rounds what trains
as well, and this library's recipes keep that in float32 (training/precision.py).

Its own checkpoints fit the number of ranks that wrote them. Ours are read through its
functions for whole tensors (safe_get_full_…), and load on any number.

Source   DeepSpeed 0.19; ZeRO, arXiv:1910.02054
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common import check
from ..training.config import TrainConfig
from ..training.state import TrainState, new_state
from . import twin
from .group import Group
from .state import RankState, refuse_chunks, refuse_recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class DeepSpeedState(RankState):
    """A rank whose model, optimizer and step are DeepSpeed's."""

    engine: Any = field(kw_only=True)

    def backward(self, part: Tensor) -> None:
        """DeepSpeed counts its micro-batches by calls of step: of all but the last."""
        self.engine.backward(part * self.ranks, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def clip(self, max_norm: float) -> float:
        """The norm of the gradient; DeepSpeed clips by its configuration, in step()."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self.engine.optimizer
        if hasattr(zero, "scaled_global_norm"):  # stages 1 and 2
            return float(zero.scaled_global_norm())
        return float(combine_grad_norm_groups(zero._get_norm_groups()))

    def whole(self, name: str) -> Tensor:
        return whole(self.trainable[name])

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for name, p in self.trainable.items():
            value = weights[name].to(p.device)
            safe_set_full_fp32_param(p, value)
            with gathered(p, writer=0):
                if not hasattr(p, "ds_id") or self.rank == 0:
                    p.data.copy_(value)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states, moments = self._states(), {}
        if not states:
            return {}
        step = next(iter(states))["step"].clone()
        for name, p in self.trainable.items():
            full = {key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}
            if self.rank == 0:
                copies = {
                    key: value.to("cpu", copy=True) for key, value in full.items()
                }
                moments[name] = copies | {"step": step}
        return moments

    def load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not moments:
            return
        step = next(iter(moments.values()))["step"]
        zero = self.engine.optimizer
        for flat in _flat_parts(zero):
            empty = {key: torch.zeros_like(flat) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": step.clone(), **empty}
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
            zero._lazy_init_hp_params_optimizer_state()
        for name, values in moments.items():
            for key in MOMENTS:
                p = self.trainable[name]
                safe_set_full_optimizer_state(p, values[key].to(p.device), key)

    def _states(self) -> list[dict[str, Tensor]]:
        return [s for s in self.engine.optimizer.optimizer.state.values() if s]


@dataclass(frozen=True)
class DeepSpeed:
    """The engine: `train(model, …, engine=DeepSpeed(stage=2))` on every rank.

    Args
        stage  1, 2 or 3 of ZeRO
    Raises   ValueError  in train(): a model that is not in float32, LoRA+'s lr_ratio
    """

    stage: int = 2

    def __post_init__(self):
        check.whole("stage", self.stage, 1, 3)

    @contextmanager
    def __call__(
        self, model: nn.Module, state: TrainState, config: TrainConfig
    ) -> Iterator[tuple[nn.Module, DeepSpeedState]]:
        group = Group()
        refuse_recipe(config, group.ranks)
        refuse_chunks(config, "DeepSpeed")
        _refuse(model, config)
        theirs = twin.twin(model)
        if self.stage == 3:
            twin.lend(model)
        engine = self._engine(theirs, config, group.ranks)
        own = new_state(
            theirs,
            config,
            lambda groups, config: _Stepper(engine),
            DeepSpeedState,
            group=group,
            engine=engine,
        )
        try:
            yield engine, own
            twin.give_back(model, [whole(p) for p in theirs.parameters()])
        finally:
            engine.destroy()

    def _engine(self, model: nn.Module, config: TrainConfig, ranks: int):
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is imported
            os.environ.setdefault(
                "LOCAL_RANK", "0"
            )  # without a launcher nobody says it
        import deepspeed

        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        return deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=parameters,
            config=self._settings(config, ranks),
            dist_init_required=False,
        )[0]

    def _settings(self, config: TrainConfig, ranks: int) -> dict:
        return {
            "train_batch_size": config.batch,
            "gradient_accumulation_steps": config.accumulate,
            "gradient_clipping": config.clip or 0.0,
            "zero_optimization": {
                "stage": self.stage,
                # Cut and gathered one by one, however small.
                "stage3_param_persistence_threshold": 0,
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }


class _Stepper:
    """The loop's optimizer: DeepSpeed's groups, and the step of its engine."""

    def __init__(self, engine):
        self.engine = engine
        for group in self.param_groups:
            group["ratio"] = 1.0

    @property
    def param_groups(self) -> list[dict]:
        return self.engine.optimizer.param_groups

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.optimizer.zero_grad(set_to_none=set_to_none)


def whole(p: nn.Parameter) -> Tensor:
    """The values of a parameter that may be cut; all ranks ask for it together."""
    with gathered(p):
        return p.data.clone()


def gathered(p: nn.Parameter, writer: int | None = None):
    """Inside, the parameter is whole; what rank `writer` writes there stays."""
    if not hasattr(p, "ds_id"):  # stages 1 and 2
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([p], modifier_rank=writer)


def _flat_parts(zero) -> list[Tensor]:
    """This rank's float32 parts, which are what the optimizer inside has states of."""
    if hasattr(zero, "single_partition_of_fp32_groups"):  # stages 1 and 2
        return list(zero.single_partition_of_fp32_groups)
    return list(zero.fp32_partitioned_groups_flat)


def _refuse(model: nn.Module, config: TrainConfig) -> None:
    for name, p in model.named_parameters():
        if p.dtype != torch.float32:
            raise ValueError(
                f"engine='deepspeed', and {name} is {p.dtype}: DeepSpeed takes float32 "
                "models here; use --dtype float32, or --engine zero or fsdp2"
            )
    check.require(
        config.lr_ratio == 1,
        "lr_ratio",
        config.lr_ratio,
        "DeepSpeed has one group of parameters here; leave it at 1, or use --engine "
        "zero or fsdp2",
    )
