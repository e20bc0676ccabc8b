"""Pictures of chats, opened safely: upright, RGB, of bounded size, from where they may come from.

    pictures = ChatPictures("data/chatgenbench")
    pictures.open("images/1.png")               # of a row: a path inside the folder, and nowhere else
    pictures.open(Path("/home/me/corgi.jpg"))   # of the caller's own program, as is a PIL image

What stands in data is text, and a `pathlib.Path` can't come from JSON or Arrow. So text never names a file outside the
data set's folder, and addresses are not fetched.
"""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from rewards.images import MAX_PIXELS

LONGEST_SIDE = 1024
# Encoders cut pictures into patches of 14 to 28 pixels, and some refuse those over 200 times longer than wide.
SHORTEST_SIDE, MOST_ELONGATED = 28, 50
# Those of the web. Others (EPS, for one, starts Ghostscript) only make what a stranger's file can do larger.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_LONGEST_NAME = 200


class PictureError(ValueError):
    """A picture that can't be shown to a policy; the message names it, says why and what to do."""


class ChatPictures:
    """Opens what stands in a chat's image parts.

    Args:
        folder: Of the data set that the chats are from; `None`: text names no file at all.
        longest_side: Larger pictures are made smaller, to so many pixels.
    """

    def __init__(self, folder: str | Path | None = None, longest_side: int = LONGEST_SIDE) -> None:
        if longest_side < SHORTEST_SIDE:
            raise ValueError(f"`longest_side` must be at least {SHORTEST_SIDE} pixels, but is {longest_side}.")
        self.folder = None if folder is None else Path(folder).resolve()
        self.longest_side = longest_side

    def open(self, source: Any) -> Image.Image:
        """A picture as RGB: upright by its EXIF orientation, on white where it is transparent, the first of several.

        Neither side is shorter than 28 pixels (very small ones are enlarged, very thin ones get a white margin).

        Args:
            source: Text: a path relative to `folder`. A `pathlib.Path` or PIL image: from the caller's own program.

        Raises:
            PictureError: Missing, outside of the folder, an address, no picture, damaged, or too large to decode.
        """
        if isinstance(source, Image.Image):
            return self._prepared(source.copy(), picture_name(source))
        if isinstance(source, str):
            path = self._inside(source)
        elif isinstance(source, Path):
            path = source.expanduser()
        else:
            raise PictureError(f"A picture must be a path or a PIL image, but is a {type(source).__name__}.")
        name = picture_name(source)
        try:
            is_file = path.is_file()  # a pipe or a device would be waited for
        except (OSError, ValueError) as error:
            raise PictureError(f"The picture {name} can't be read: {_cut(str(error))}.") from error
        if not is_file:
            where = f" in {self.folder}" if isinstance(source, str) else ""
            raise PictureError(f"The picture {name} is missing{where}; is it the right folder, and a whole copy?")
        return self._prepared(path, name)

    def _inside(self, source: str) -> Path:
        """The file that a row names."""
        name = picture_name(source)
        if _ADDRESS.match(source):
            raise PictureError(
                f"The picture {name} is an address, and those are not fetched; build the data set with pictures "
                "(`references` of align.bench.chatgen), or download it and give a pathlib.Path."
            )
        if self.folder is None:
            raise PictureError(
                f"The picture {name} is a path in a data set, but no folder was named; name it, or give a pathlib.Path."
            )
        try:
            path = (self.folder / source).resolve()  # follows symbolic links
        except (OSError, ValueError, RuntimeError) as error:
            raise PictureError(f"The picture {name} is no path: {_cut(str(error))}.") from error
        if not path.is_relative_to(self.folder) or Path(source).is_absolute():
            raise PictureError(
                f"The picture {name} is outside of the data set's folder {self.folder}, where it must be; give a "
                "pathlib.Path if it is yours."
            )
        return path

    def _prepared(self, source: Path | Image.Image, name: str) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of metadata, and Pillow's own limit: ours is below
                if isinstance(source, Image.Image):
                    return self._decoded(source, name)
                with Image.open(source, formats=FORMATS) as image:
                    return self._decoded(image, name)
        except PictureError:
            raise
        # Decoders meet bytes that a stranger chose, and what they raise is not documented.
        except Exception as error:
            why = "no picture that can be read" if isinstance(error, Image.UnidentifiedImageError) else "damaged"
            raise PictureError(
                f"The picture {name} is {why} ({type(error).__name__}: {_cut(str(error))}); replace it with a "
                f"whole one ({', '.join(FORMATS)})."
            ) from error

    def _decoded(self, image: Image.Image, name: str) -> Image.Image:
        side = self.longest_side
        image.draft(None, (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
        if image.width * image.height > MAX_PIXELS:
            raise PictureError(
                f"The picture {name} has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}; "
                "make it smaller."
            )
        if not image.width * image.height:
            raise PictureError(f"The picture {name} has no pixels; replace it.")
        image.load()
        image = ImageOps.exif_transpose(image)
        image = _eight_bit(image, name)
        if image.mode not in ("RGB", "RGBA", "L", "LA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        return _not_too_thin(_on_white(image))


def picture_name(source: Any) -> str:
    """What a picture is called in messages; on one line and not long, whatever a row holds."""
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<{source.mode} image {source.width}x{source.height}>"
    name = ascii(str(source)) if not str(source).isprintable() else str(source)
    return _cut(name)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Pictures of 16 bits in 8; Pillow's own conversion would clip them."""
    if image.mode == "F":
        raise PictureError(f"The picture {name} holds floats, whose range nobody knows; convert it to 8 bits.")
    if image.mode == "I" or image.mode.startswith("I;"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((deep // 257).astype(np.uint8))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _not_too_thin(image: Image.Image) -> Image.Image:
    """Enlarge what is tiny, and put what is thin on a wider white ground."""
    factor = math.ceil(SHORTEST_SIDE / max(image.size))
    if factor > 1:
        image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    shortest = max(SHORTEST_SIDE, math.ceil(max(image.size) / MOST_ELONGATED))
    size = (max(image.width, shortest), max(image.height, shortest))
    if size == image.size:
        return image
    ground = Image.new("RGB", size, "white")
    ground.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return ground
