"""Opening images that come from anywhere, so that what reaches a scorer is a decoded 8-bit picture of sane size."""

import sys
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray | torch.Tensor"

MAX_PIXELS = 89_478_485
"""Largest width x height that is decoded: Pillow's own limit for decompression bombs (a 256 MB RGB picture)."""

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class ImageError(ValueError):
    """An image that can't be scored; the message names it and says why."""


def describe_image(source: ImageSource) -> str:
    """A short name of an image for messages: its path, or what kind of object it is."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<{source.mode} image {source.width}x{source.height}>"
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return f"<{type(source).__name__} {source.dtype} {tuple(source.shape)}>"
    return f"<{len(source):,} bytes>" if isinstance(source, bytes) else f"<{type(source).__name__}>"


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image; its mode stays as it is, since scorers differ in when they convert to RGB.

    The first frame of an animation is taken and EXIF orientation is ignored, as the official scorers do.

    Args:
        source: Path, encoded file as bytes, PIL image, array (height, width[, 3 or 4]) or tensor (1, 3 or 4, height,
            width); these of uint8 or of floats in [0, 1].
        max_pixels: Refuse what has more; looked at before anything is decoded.

    Raises:
        ImageError: Missing, truncated, no image, too large, deeper than 8 bits a channel, or NaN.
    """
    name = describe_image(source)
    if isinstance(source, np.ndarray):
        image = _from_array(source, name)
    elif _is_tensor(source):
        tensor = source.detach().cpu()
        if tensor.ndim != 3:
            raise ImageError(
                f"{name}: a tensor must be (channels, height, width), as diffusers and torchvision have it."
            )
        # numpy has no bfloat16.
        array = (tensor.float() if tensor.is_floating_point() else tensor).permute(1, 2, 0).numpy()
        image = _from_array(array, name)
    elif isinstance(source, Image.Image):
        image = source
    elif isinstance(source, bytes):
        image = _open(BytesIO(source), name)
    elif isinstance(source, str | Path):
        image = _open(Path(source), name)
    else:
        raise ImageError(f"{name} is no image: give a path, bytes, a PIL image, an array or a tensor.")
    if image.width * image.height > max_pixels:
        raise ImageError(f"{name}: {image.width}x{image.height} is more than {max_pixels:,} pixels; make it smaller.")
    if image.width * image.height == 0:
        raise ImageError(f"{name}: {image.width}x{image.height} has no pixels.")
    if image.mode in _DEEP_MODES:
        raise ImageError(f"{name}: mode {image.mode} is deeper than 8 bits and would be clipped; convert it first.")
    try:
        with warnings.catch_warnings():  # a warning about metadata is nothing a score depends on
            warnings.simplefilter("ignore")
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise ImageError(f"{name} can't be decoded: {error}.") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """`image.convert("RGB")`: alpha is dropped, not blended, as all official scorers do.

    Raises:
        ImageError: Pillow knows no way from this mode to RGB.
    """
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{describe_image(image)}: mode {image.mode} has no conversion to RGB.") from error


def crop_to_square(image: Image.Image, size: int, *, corner: Callable[[int], int] | None = None) -> Image.Image:
    """Resize the short side to `size` (bicubic, antialiased, in the image's own mode) and cut out the centre.

    The long side is truncated to whole pixels, as torchvision's and transformers' `Resize` both do.

    Args:
        image: Decoded image of any mode.
        size: Side of the square in pixels.
        corner: Offset of the crop from the surplus in pixels; torchvision's rounding half to even by default.

    Raises:
        ImageError: So long and thin that its enlarged version would not fit in memory.
    """
    short, long = sorted(image.size)
    new_long = int(size * long / short)
    refuse_thin(image, size)
    width, height = (size, new_long) if image.width <= image.height else (new_long, size)
    if (width, height) != image.size:
        try:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        except ValueError as error:
            raise ImageError(
                f"{describe_image(image)}: mode {image.mode} can't be resized; convert it first."
            ) from error
    corner = corner or (lambda surplus: round(surplus / 2))
    left, top = corner(width - size), corner(height - size)
    return image.crop((left, top, left + size, top + size))


def refuse_thin(image: Image.Image, size: int) -> None:
    """Raise ImageError if scaling the short side to `size` would make a picture of more than MAX_PIXELS."""
    short, long = sorted(image.size)
    if (pixels := size * int(size * long / short)) > MAX_PIXELS:
        raise ImageError(
            f"{describe_image(image)}: {image.width}x{image.height} is too thin; with {size} pixels on its short side "
            f"it would have {pixels:,}."
        )


def to_tensor(image: Image.Image) -> "torch.Tensor":
    """RGB image -> float32 tensor (3, height, width) in [0, 1]."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(255)


def _is_tensor(source: Any) -> "TypeGuard[torch.Tensor]":
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    return torch is not None and isinstance(source, torch.Tensor)


def _open(file: Path | BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked by the caller
            return Image.open(file)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is no image that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is larger than any picture to score: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageError(f"Can't open the image {name}: {reason}.") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ImageError(f"{name}: an array must be (height, width), (height, width, 3) or (height, width, 4).")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ImageError(f"{name} holds NaN or infinite values.")
        if array.size and (array.min() < 0 or array.max() > 1):
            raise ImageError(f"{name}: floats must lie in [0, 1], but go from {array.min():g} to {array.max():g}.")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"{name}: an array must be uint8, or floats in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(array))
