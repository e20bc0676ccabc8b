"""What travels between the reward service and its clients: MessagePack or JSON, pictures as PNG or lossless WebP.

A request is `{"prompts": [text], "images": [file contents], "image_index": [int]}`; pair i is `prompts[i]` with
`images[image_index[i]]`, and without `image_index` there are as many images as prompts. In JSON, file contents are
base64. An answer is `{"scores": [number or null], "errors": {"row": reason}, "scorer": {…}}`, a refusal
`{"error": reason}`. Nothing is ever unpickled, and nothing is decoded before its size was checked.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rewards.images import MAX_PIXELS, ImageError, ImageSource, describe_image, load_image, to_rgb

JSON = "application/json"
MSGPACK = "application/msgpack"
_MEDIA_TYPES = {
    JSON: JSON,
    MSGPACK: MSGPACK,
    "application/vnd.msgpack": MSGPACK,  # the registered name
    "application/x-msgpack": MSGPACK,
}

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_KEYS = 16


class MessageError(ValueError):
    """A message that can't be used; the text names the field and says why.

    Attributes:
        status: The HTTP status that says the same: 400 malformed, 413 too large, 422 wrong content.
    """

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """How large a request may be."""

    max_body_bytes: int
    max_pixels: int
    max_images: int
    max_pairs: int


class Picture(NamedTuple):
    """An encoded image."""

    digest: bytes
    """SHA-256 of `data`."""
    data: bytes
    """PNG or lossless WebP."""


class ScoreRequest(NamedTuple):
    """Pairs to score: `prompts[i]` with `pictures[i]`; a picture sent once for many prompts is one object."""

    prompts: list[str]
    pictures: list[Picture]


def media_type(header: str | None) -> str | None:
    """The format that a Content-Type or Accept header names first, or None if it names neither of ours."""
    for part in (header or "").split(","):
        if found := _MEDIA_TYPES.get(part.split(";")[0].strip().lower()):
            return found
    return None


def pack(message: Mapping[str, Any], media: str) -> bytes:
    """A message as the body of a request or answer.

    Raises:
        ImportError: MessagePack is not installed.
    """
    if media == JSON:
        return json.dumps(message, allow_nan=False, default=_base64).encode()
    return import_msgpack().packb(message)


def unpack(body: bytes, media: str, *, max_items: int = 2**20) -> dict[str, Any]:
    """The message in a body.

    Args:
        body: As received.
        media: JSON or MSGPACK.
        max_items: Longest list that a MessagePack body may announce; it is allocated before it is read.

    Raises:
        MessageError: Malformed, not a mapping, or a list that is too long.
        ImportError: MessagePack is not installed.
    """
    message = _load_json(body) if media == JSON else _load_msgpack(body, max_items)
    if not isinstance(message, dict):
        raise MessageError(f"the body must be a mapping, but is of type {type(message).__name__}.", 400)
    return message


def read_request(body: bytes, media: str, limits: Limits) -> ScoreRequest:
    """Check a request's body and take it apart.

    Raises:
        MessageError: Naming the field, the row and the limit.
    """
    message = unpack(body, media, max_items=max(limits.max_pairs, limits.max_images))
    if unknown := [key for key in message if key not in ("prompts", "images", "image_index")]:
        raise MessageError(f"unknown key {unknown[0]!r:.50}; a request has prompts, images and image_index.")
    prompts, images = _list(message, "prompts", limits.max_pairs), _list(message, "images", limits.max_images)
    if "image_index" in message:
        index = _list(message, "image_index", limits.max_pairs)
    elif len(images) == len(prompts):
        index = list(range(len(images)))
    else:
        raise MessageError(f"need one image per prompt or `image_index`, but got {len(prompts)} and {len(images)}.")
    if len(index) != len(prompts):
        raise MessageError(f"`image_index` has {len(index)} entries for {len(prompts)} prompts.")
    for row, (prompt, image) in enumerate(zip(prompts, index, strict=True)):
        if type(image) is not int or not 0 <= image < len(images):
            raise MessageError(f"`image_index[{row}]` is {image!r:.50}, which is none of the {len(images)} images.")
        if not is_text(prompt):
            raise MessageError(f"`prompts[{row}]` is {prompt!r:.50}, not a text.")
    pictures = [_picture(image, number, media, limits) for number, image in enumerate(images)]
    return ScoreRequest(prompts, [pictures[number] for number in index])


def answer_message(scores: Sequence[float], errors: Mapping[int, str], scorer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request; scores that are no numbers become null."""
    return {
        "scores": [score if math.isfinite(score) else None for score in scores],
        "errors": {str(row): reason for row, reason in errors.items()},  # JSON has no other keys
        "scorer": dict(scorer),
    }


def check_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Make sure that encoded data are a PNG or lossless WebP of sane size; pixels are not decoded.

    Raises:
        MessageError: Another format, lossy, animated, damaged at the beginning, or too many pixels.
    """
    if data.startswith(_PNG):
        kind = "PNG"
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "WEBP"
        _refuse_lossy(data)
    else:
        raise MessageError(f"is neither PNG nor WebP; it begins with {data[:8]!r}.")
    try:
        with Image.open(BytesIO(data), formats=(kind,)) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise MessageError(f"is too large: {error}", 413) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MessageError(f"is a damaged {kind}.") from error
    if width * height > max_pixels:
        raise MessageError(f"has {width}x{height} pixels, more than the {max_pixels:,} allowed.", 413)


def encode_image(source: ImageSource, max_pixels: int) -> bytes:
    """A PNG or lossless WebP file of an image, pixel for pixel and in its own mode where PNG has that mode.

    Args:
        source: See `rewards.images.load_image`. Files that are PNG or lossless WebP already are passed on as they are.
        max_pixels: Width x height that the service takes.

    Raises:
        ImageError: Can't be read, or too many pixels.
    """
    if (data := _file_content(source)) is not None:
        try:
            check_picture(data, max_pixels)
        except MessageError:
            pass  # another format, or something that `load_image` says better
        else:
            return data
    image = load_image(source, max_pixels=max_pixels)
    if image.mode not in PNG_MODES:
        image = to_rgb(image)
    if image.mode == "P":
        # PNG cuts a palette that is short, and pixels that point behind its end (Pillow shows them black) with it.
        image = image.copy()
        image.putpalette(bytes(image.getpalette() or ()).ljust(768, b"\0"))
    file = BytesIO()
    # Run lengths only, which zlib has for PNG: a noisy picture gets as small as by default in less than half the time.
    # A colour profile changes no score.
    image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE, icc_profile=None)
    return file.getvalue()


def is_text(value: Any) -> bool:
    """Whether a value is a string that UTF-8 can hold; JSON's escapes can make others (half a surrogate pair)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def import_msgpack() -> Any:
    """The module `msgpack`, or an ImportError that says how to get it."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError('MessagePack needs `pip install "t2i-align[serve]"`.') from error
    return msgpack


def _load_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the body is not JSON: {_one_line(error)}.", 400) from error


def _load_msgpack(body: bytes, max_items: int) -> Any:
    msgpack = import_msgpack()
    try:
        return msgpack.unpackb(body, max_array_len=max_items, max_map_len=max(_MAX_KEYS, max_items), max_ext_len=0)
    except (ValueError, RecursionError, OverflowError, MemoryError, msgpack.UnpackException) as error:
        if "max_array_len" in str(error):
            raise MessageError(f"a list of the body has more than the {max_items:,} entries allowed.", 413) from error
        raise MessageError(f"the body is not MessagePack: {_one_line(error)}.", 400) from error


def _list(message: dict[str, Any], key: str, most: int) -> list[Any]:
    if key not in message:
        raise MessageError(f"`{key}` is missing.")
    value = message[key]
    if not isinstance(value, list):
        raise MessageError(f"`{key}` must be a list, but is of type {type(value).__name__}.")
    if not value:
        raise MessageError(f"`{key}` is empty.")
    if len(value) > most:
        raise MessageError(f"`{key}` has {len(value):,} entries, more than the {most:,} allowed.", 413)
    return value


def _picture(image: Any, number: int, media: str, limits: Limits) -> Picture:
    where = f"`images[{number}]`"
    if media == JSON:
        if not isinstance(image, str):
            raise MessageError(f"{where} must be base64 text, but is of type {type(image).__name__}.")
        try:
            image = base64.b64decode(image, validate=True)
        except ValueError as error:
            raise MessageError(f"{where} is not base64: {_one_line(error)}.") from error
    elif not isinstance(image, bytes):
        raise MessageError(f"{where} must be binary, but is of type {type(image).__name__}.")
    try:
        check_picture(image, limits.max_pixels)
    except MessageError as error:
        raise MessageError(f"{where} {error}", error.status) from error
    return Picture(hashlib.sha256(image).digest(), image)


def _refuse_lossy(data: bytes) -> None:
    """Walk a WebP file's chunks up to the one that holds pixels."""
    start = 12
    while start + 8 <= len(data):
        name = data[start : start + 4]
        if name == b"VP8L":
            return
        if name == b"VP8 ":
            raise MessageError("is lossy WebP; scores of it would not be those of the picture. Send PNG.")
        if name in (b"ANIM", b"ANMF"):
            raise MessageError("is an animation; send one frame.")
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        start += 8 + size + size % 2
    raise MessageError("is a damaged WEBP.")


def _file_content(source: ImageSource) -> bytes | None:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        try:
            return Path(source).read_bytes()
        except OSError as error:
            raise ImageError(f"Can't open the image {describe_image(source)}: {error.strerror}.") from error
    return None


def _base64(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"JSON has no {type(value).__name__}.")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
