"""Features of images: any function, or the Inception v3 that FID is defined with (torch-fidelity's layers)."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rewards.checkpoints import find_checkpoint, load_state_dict, load_strictly
from rewards.images import to_rgb
from rewards.scorer import pick_device

SIZE = 299
"""Side in pixels of what Inception sees."""


def to_pixels(image: Image.Image) -> Tensor:
    """Decoded image of any mode -> uint8 RGB (3, height, width) of its own size.

    Raises:
        ImageError: No conversion to RGB.
    """
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


@dataclass(frozen=True)
class FeatureExtractor:
    """What turns images into the vectors that are compared.

    Attributes:
        function: A batch (n, …) of what `preprocess` returns, on the CPU -> features (n, d) on any device.
        name: Network, layer and preprocessing: whatever the features depend on. A cache needs it.
        sha256: Of the weights; empty if there are none.
        preprocess: Decoded image -> tensor, of the same shape for all images; runs on threads.
    """

    function: Callable[[Tensor], Tensor]
    name: str = ""
    sha256: str = ""
    preprocess: Callable[[Image.Image], Tensor] = to_pixels


def load_inception(
    checkpoint: str | Path, *, device: str | torch.device | None = None, antialias: bool = False
) -> FeatureExtractor:
    """The Inception v3 of 2015 that FID is defined with: 2048 features of the last pooling layer.

    Args:
        checkpoint: weights-inception-2015-12-05-6726825d.pth of torch-fidelity (pytorch-fid's pt_inception file has
            the same weights), a safetensors version of it, or `org/repo/file@revision` on the Hub.
        device: The GPU if there is one, by default.
        antialias: How images are resized to 299x299: False as the original TensorFlow graph and torch-fidelity do,
            True as torchmetrics does by default. The two can't be compared.

    Raises:
        CheckpointError: No such file, or keys that don't fit.
        ImportError: torch-fidelity is missing.
    """
    from accelerate import init_empty_weights

    found = find_checkpoint(checkpoint)
    with init_empty_weights(include_buffers=False):
        network = _inception()
    # The classifier is not used, and neither are counters of training steps, which files of old PyTorch lack.
    state = {name: value.float() for name, value in load_state_dict(found.path).items() if not name.startswith("fc.")}
    counters = {name: value for name, value in network.state_dict().items() if name.endswith(".num_batches_tracked")}
    load_strictly(network, state | counters, found.path)
    device = pick_device(device)
    network.eval().requires_grad_(False).to(device)
    return FeatureExtractor(
        lambda pixels: network(pixels.to(device)),
        name=f"inception-v3-compat, 2048, {'antialiased' if antialias else 'TensorFlow 1'} bilinear",
        sha256=found.sha256,
        preprocess=_resize_antialiased if antialias else _resize_like_tensorflow,
    )


def _resize_antialiased(image: Image.Image) -> Tensor:
    size = (SIZE, SIZE)
    pixels = to_pixels(image)[None].float()
    resized = nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    return (resized[0] - 128) / 128


def _resize_like_tensorflow(image: Image.Image) -> Tensor:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as interpolate

    size = (SIZE, SIZE)
    return (interpolate(to_pixels(image)[None].float(), size=size, align_corners=False)[0] - 128) / 128


def _inception() -> nn.Module:
    """torch-fidelity's FeatureExtractorInceptionV3 up to the last pooling layer, with the same names of weights.

    That class itself unpickles its weights without restriction and resizes on the device, image sizes all alike.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as blocks
    except ImportError as error:
        raise ImportError('Inception needs torch-fidelity: pip install "t2i-align[fid]".') from error
    conv = blocks.BasicConv2d
    return nn.Sequential(
        OrderedDict(
            Conv2d_1a_3x3=conv(3, 32, kernel_size=3, stride=2),
            Conv2d_2a_3x3=conv(32, 32, kernel_size=3),
            Conv2d_2b_3x3=conv(32, 64, kernel_size=3, padding=1),
            MaxPool_1=nn.MaxPool2d(kernel_size=3, stride=2),
            Conv2d_3b_1x1=conv(64, 80, kernel_size=1),
            Conv2d_4a_3x3=conv(80, 192, kernel_size=3),
            MaxPool_2=nn.MaxPool2d(kernel_size=3, stride=2),
            Mixed_5b=blocks.InceptionA(192, pool_features=32),
            Mixed_5c=blocks.InceptionA(256, pool_features=64),
            Mixed_5d=blocks.InceptionA(288, pool_features=64),
            Mixed_6a=blocks.InceptionB(288),
            Mixed_6b=blocks.InceptionC(768, channels_7x7=128),
            Mixed_6c=blocks.InceptionC(768, channels_7x7=160),
            Mixed_6d=blocks.InceptionC(768, channels_7x7=160),
            Mixed_6e=blocks.InceptionC(768, channels_7x7=192),
            Mixed_7a=blocks.InceptionD(768),
            Mixed_7b=blocks.InceptionE_1(1280),
            Mixed_7c=blocks.InceptionE_2(2048),
            AvgPool=nn.AdaptiveAvgPool2d(output_size=(1, 1)),
            Flatten=nn.Flatten(),
        )
    )
