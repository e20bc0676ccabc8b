"""Checkpoints of the official size and layout with reproducible random weights, where the real ones can't be had.

Scores mean nothing, but equality and time do not depend on what the weights mean.
"""

import hashlib
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

RESIDUAL = ("output.dense.weight", "attn.proj.weight", "mlp.fc2.weight", "attn.out_proj.weight", "mlp.c_proj.weight")
"""Layers that write to the residual stream: with full gain, dozens of random layers forget the text."""


def pseudo_image_reward(path: Path) -> Path:
    """ImageReward.pt: a plain state dict, 1.8 GB."""
    from rewards.blip import TextConfig, VisionConfig
    from rewards.image_reward import ImageRewardModel

    with init_empty_weights(include_buffers=False):
        model = ImageRewardModel(VisionConfig(), TextConfig(), TextConfig().hidden_size)
    return _save(pseudo_state(model), path)


def pseudo_hps_v2(path: Path) -> Path:
    """HPS_v2_compressed.pt: {"state_dict": …}, 3.9 GB."""
    import open_clip

    with init_empty_weights(include_buffers=False):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    return _save({"state_dict": pseudo_state(model)}, path)


def pseudo_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict that depends on names and shapes only; buffers keep their values."""
    return {
        name: value if not value.is_floating_point() else pseudo_tensor(name, value.shape)
        for name, value in model.state_dict().items()
    }


def pseudo_tensor(name: str, shape: torch.Size) -> Tensor:
    """Normal values whose scale keeps activations of order 1."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if "norm" in name.lower() or "ln_" in name:
        return 1 + 0.05 * values if name.endswith("weight") else 0.02 * values
    if "embed" in name and "patch" not in name or "token" in name:
        return 0.5 * values
    if values.ndim < 2:
        return 0.02 * values
    fan_in = shape[0] if name.endswith((".proj", "text_projection")) else values[0].numel()
    return (0.35 if name.endswith(RESIDUAL) else 1.6) * fan_in**-0.5 * values


def _save(content: dict, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.rename(path)
    return path
