"""The engines by their names on the command line."""

from importlib.util import find_spec

from ..common import check
from ..training.state import Engine
from .fsdp2 import FSDP2
from .zero_engine import Zero

NAMES = ("zero", "fsdp2", "deepspeed")


def engine_of(name: str, stage: int | None = None) -> Engine:
    """The engine of this name.

    Args
        stage  of ZeRO; None: 1 for zero, 2 for deepspeed. FSDP2 has none
    Raises   ValueError  no such engine, a stage that it has not, or it is not installed
    """
    check.one_of("engine", name, NAMES)
    if name == "zero":
        return Zero(1 if stage is None else stage)
    if name == "fsdp2":
        if stage is not None:
            raise ValueError(
                f"stage={stage}: fsdp2 has no stages, it cuts weights, gradients and "
                "states, as ZeRO's stage 3 does; leave --stage out"
            )
        return FSDP2()
    refuse_missing_deepspeed()
    from .deepspeed_engine import DeepSpeed

    return DeepSpeed(2 if stage is None else stage)


def refuse_missing_deepspeed() -> None:
    """ValueError where DeepSpeed is not installed."""
    if find_spec("deepspeed") is None:
        raise ValueError(
            "engine='deepspeed' needs DeepSpeed, which is not installed: pip install "
            "'peft-from-scratch[deepspeed]', or use --engine zero or fsdp2"
        )
