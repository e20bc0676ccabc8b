"""Pictures that chats point to: files that are there, or downloads of what the community shows."""

import io
import logging
import os
import urllib.parse
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from align.bench.chatgen.schema import Demonstration
from rewards.commandline import ConfigError
from rewards.files import write_atomically

logger = logging.getLogger(__name__)

_FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
MAX_BYTES = 32 << 20
MAX_PIXELS = 64 << 20
_RETRIES = 3


def picture_path(item: Demonstration, folder: Path) -> Path:
    """Where a demonstration's picture is drawn to."""
    return folder / f"{item.source['image_id']}.png"


def from_folder(demonstrations: Iterable[Demonstration], folder: Path, target: Path) -> list[Demonstration]:
    """Demonstrations with the picture `<image id>.<png, jpg, jpeg, webp>` of a folder, as far as it is there.

    Args:
        demonstrations: Named by their image ids.
        folder: Where the pictures are.
        target: Where they are put (as hard links, where the file system can), so that the data set is whole.

    Raises:
        ConfigError: There is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"`images` {folder} is no folder.")
    target.mkdir(parents=True, exist_ok=True)
    suffixes = (*_FORMATS.values(), ".jpeg")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes}
    found = []
    for item in demonstrations:
        path = files.get(str(item.source.get("image_id")))
        found.append(replace(item, image=None if path is None else str(_placed(path, target))))
    return found


def _placed(path: Path, target: Path) -> Path:
    placed = target / path.name
    if not placed.exists():
        try:
            os.link(path.resolve(), placed)
        except OSError:  # another file system
            write_atomically(placed, path.read_bytes())
    return placed


def download(
    demonstrations: Sequence[Demonstration], folder: Path, hosts: Sequence[str], *, workers: int = 4
) -> tuple[list[Demonstration], Counter[str]]:
    """Fetch the demonstrations' pictures into a folder; what is there already is not fetched again.

    Args:
        demonstrations: Their addresses come from the community's records.
        folder: Made if missing; files are named by image id.
        hosts: The only hosts that are asked, as `name` or `name:port`; others count as `host_not_allowed`.
        workers: Downloads at a time.

    Returns:
        The demonstrations with paths (None: no picture), and how many have none, by reason.
    """
    try:
        import httpx
    except ImportError as error:
        raise ImportError('Downloads need httpx: pip install "t2i-align[bench]".') from error
    folder.mkdir(parents=True, exist_ok=True)
    problems: Counter[str] = Counter()
    there = {path.stem: path for path in folder.iterdir() if path.suffix in _FORMATS.values()}

    def fetch(item: Demonstration) -> Path | str:
        name = str(item.source["image_id"])
        return there.get(name) or _fetch(client, item.image, folder / name, hosts)

    result = []
    # No redirects: they could lead to hosts that are not in the list.
    with httpx.Client(timeout=30, follow_redirects=False) as client, ThreadPoolExecutor(workers) as pool:
        for item, found in zip(
            demonstrations, tqdm(pool.map(fetch, demonstrations), total=len(demonstrations), desc="pictures"),
            strict=True,
        ):  # fmt: skip
            if isinstance(found, str):
                problems[found] += 1
            result.append(replace(item, image=str(found) if isinstance(found, Path) else None))
    if problems:
        logger.warning("%d of %d pictures could not be had: %s", problems.total(), len(result), dict(problems))
    return result, problems


def _fetch(client: Any, url: str | None, target: Path, hosts: Sequence[str]) -> Path | str:
    """The file that was written, or why there is none."""
    import httpx

    if url is None:
        return "no_address"
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in hosts or parts.scheme not in ("http", "https"):
        return "host_not_allowed"
    problem = "unreachable"
    for _ in range(_RETRIES):
        try:
            data = _read(client, url)
        except httpx.HTTPStatusError as error:
            problem = f"status_{error.response.status_code}"
            if error.response.status_code not in (408, 429) and error.response.status_code < 500:
                return problem
        except httpx.HTTPError:
            problem = "unreachable"
        else:
            suffix = None if data is None else picture_suffix(data)
            if data is None or suffix is None:
                return "no_picture"
            path = target.with_name(target.name + suffix)
            write_atomically(path, data)
            return path
    return problem


def _read(client: Any, url: str) -> bytes | None:
    """The body, or `None` if it is too long."""
    with client.stream("GET", url) as response:
        response.raise_for_status()
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > MAX_BYTES:
                return None
    return bytes(body)


def picture_suffix(data: bytes) -> str | None:
    """The file name's end for a picture that can be read, `None` for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=list(_FORMATS)) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    return None
                picture.load()
                return _FORMATS[picture.format or ""]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
