"""Scorers by name. Importing this is cheap: a scorer's module, and torch with it, is loaded when it is asked for.

Others add a scorer without forking: an entry point in the group `t2i_align.scorers` that names a function with the
keyword arguments of `load_scorer`, or that function's dotted name given to `load_scorer` itself.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from rewards.images import ImageSource

GROUP = "t2i_align.scorers"

BUILT_IN = {
    "aesthetic": "rewards.aesthetic:load",
    "clip_score": "rewards.clip_score:load",
    "hps_v2": "rewards.hps:load",
    "image_reward": "rewards.image_reward:load",
    "pick_score": "rewards.pick_score:load",
    "remote": "rewards.client:load",
}


class ScorerCall(Protocol):
    """What every scorer is: anything that can be called like this."""

    def __call__(self, prompts: Sequence[str], images: "Sequence[ImageSource]") -> "torch.Tensor":
        """Score `images[i]` for `prompts[i]`: float32 on the CPU, shape (n,), higher is better."""
        ...


class UnknownScorerError(ValueError):
    """A name nobody registered, or options its scorer does not have."""


def load_scorer(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    tokenizer: Any = None,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    **options: Any,
) -> ScorerCall:
    """Load a scorer with its weights, ready to be called with prompts and images.

    Args:
        name: `clip_score`, `image_reward`, `hps_v2`, `pick_score`, `aesthetic`, `remote`, a registered name, or
            `package.module:function`.
        checkpoint: Local file or folder, or `org/repo/file@revision` on the Hub; the official weights by default.
        config: Sizes of the model, as mapping or JSON file; the official ones by default.
        tokenizer: Local folder or Hub id; the official one by default.
        device: The GPU if there is one, by default.
        dtype: Precision of weights and arithmetic; float32 by default. On a GPU bfloat16 is several times as fast.
        options: See `rewards.scorer.ScoringOptions`, and the scorer's own `load`.

    Raises:
        UnknownScorerError: Unknown name or option.
        CheckpointError: Weights that are missing or don't fit.
    """
    load = find_scorer(name)
    accepted = inspect.signature(load).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        for option in options:
            if option not in accepted:
                raise UnknownScorerError(f"{name} has no option `{option}`; it has {', '.join(accepted)}.")
    return load(checkpoint=checkpoint, config=config, tokenizer=tokenizer, device=device, dtype=dtype, **options)


def find_scorer(name: str) -> Callable[..., ScorerCall]:
    """The function that loads a scorer.

    Raises:
        UnknownScorerError: Unknown name, with the nearest one.
    """
    if target := BUILT_IN.get(name, name if ":" in name else None):
        module, _, function = target.partition(":")
        try:
            return getattr(import_module(module), function)
        except AttributeError as error:
            raise UnknownScorerError(f"The module {module} has no `{function}`.") from error
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(f"{error.name}.")):
                raise UnknownScorerError(f"There is no module {module} for the scorer {name}.") from error
            raise
    for entry in entry_points(group=GROUP, name=name):
        return entry.load()
    near = difflib.get_close_matches(name, scorer_names(), n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise UnknownScorerError(f"There is no scorer `{name}`; there are {', '.join(scorer_names())}.{hint}")


@cache
def scorer_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))}))
