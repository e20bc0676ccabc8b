"""Trainers: RRHF, a `Trainer` of transformers for ranked candidates."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.trainers.rrhf_config import RRHFConfig
    from align.trainers.rrhf_trainer import RRHFTrainer

__all__ = ["RRHFConfig", "RRHFTrainer"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: what scores log-probabilities here needs no trainer."""
    if name == "RRHFConfig":
        from align.trainers.rrhf_config import RRHFConfig

        return RRHFConfig
    if name == "RRHFTrainer":
        from align.trainers.rrhf_trainer import RRHFTrainer

        return RRHFTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
