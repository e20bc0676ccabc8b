"""(prompt, image) -> score. Ground floor: imports nothing of the other packages."""

from rewards.registry import load_scorer, scorer_names

__all__ = ["load_scorer", "scorer_names"]
