"""Trainers: RRHF, a `Trainer` of transformers for ranked candidates, and model tokens, rows of a frozen policy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.trainers.model_token_config import ModelTokenConfig
    from align.trainers.model_token_trainer import ModelTokenTrainer
    from align.trainers.rrhf_config import RRHFConfig
    from align.trainers.rrhf_trainer import RRHFTrainer

__all__ = ["ModelTokenConfig", "ModelTokenTrainer", "RRHFConfig", "RRHFTrainer"]

_MODULES = {
    "ModelTokenConfig": "model_token_config",
    "ModelTokenTrainer": "model_token_trainer",
    "RRHFConfig": "rrhf_config",
    "RRHFTrainer": "rrhf_trainer",
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: what scores log-probabilities here needs no trainer."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"align.trainers.{_MODULES[name]}"), name)
