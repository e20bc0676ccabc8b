"""The part of a policy that looks at pictures, and how it is kept as it is."""

import re
from typing import Any

from rewards.commandline import ConfigError

# Parts of the tower that bring its output into the language model; InternVL and LLaVA have them beside it.
_PROJECTOR = re.compile(r"(^|\.)(\w*merger\w*|\w*projector\w*)\.")


def vision_tower(model: Any) -> tuple[str, Any]:
    """Name and module of the vision tower.

    Raises:
        ConfigError: None can be found.
    """
    tower = model.get_encoder(modality="image")
    found = next((name for name, module in model.named_modules() if module is tower and name), None)
    if found is None:
        raise ConfigError(f"No vision tower was found in {type(model).__name__}; set `freeze_vision: false`.")
    return found, tower


def freeze_vision_tower(model: Any) -> int:
    """Freeze the vision tower, but not what projects its output; how many parameters that are.

    Raises:
        ConfigError: None can be found.
    """
    frozen = 0
    for name, parameter in vision_tower(model)[1].named_parameters():
        if not _PROJECTOR.search(name):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


def spare_vision_tower(peft_config: Any, model: Any) -> None:
    """Let an adapter leave the vision tower out.

    Raises:
        ConfigError: None can be found.
    """
    peft_config.exclude_modules = rf"(.*\.)?{re.escape(vision_tower(model)[0])}\..*"
