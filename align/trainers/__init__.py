"""Trainers: RRHF, a `Trainer` of transformers for ranked candidates."""

from align.trainers.rrhf_config import RRHFConfig
from align.trainers.rrhf_trainer import RRHFTrainer

__all__ = ["RRHFConfig", "RRHFTrainer"]
