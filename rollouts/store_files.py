"""Where the files of an image store are: a local folder, or anywhere fsspec reaches (s3://, gs://, memory://, ...)."""

import os
import re
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from rewards.files import write_atomically
from rollouts.store_errors import Reason, StoreError, translated

NAME = re.compile(r"images/([0-9a-f]{2})/(\1[0-9a-f]{62})\.png")
"""Of a picture's file; the second group is its key."""
_TEMPORARY = re.compile(r"images/[0-9a-f]{2}/\.[0-9a-f]{64}\.png\.[0-9a-f]{16}\.tmp")


def file_name(key: str) -> str:
    """Where the picture of a key is, relative to the store."""
    return f"images/{key[:2]}/{key}.png"


class StoreFiles(Protocol):
    """Files by their names relative to the store. All methods raise StoreError, and may run on several threads."""

    def uri(self, name: str) -> str:
        """Under which other programs find a file: a path, or a URL."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file; a kill leaves the old content or the new, never half of it."""
        ...

    def settle(self, names: Iterable[str]) -> None:
        """Make sure that the names of files just written outlive a power failure."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a file; StoreError with the reason `missing_file` if it is not there."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; those that are gone already are fine."""
        ...

    def sizes(self) -> dict[str, int]:
        """All files below `images/` with their bytes, temporary ones left out."""
        ...

    def temporary(self, older_than: float) -> list[str]:
        """What kills have left behind, older than so many seconds: younger ones may be some writer's."""
        ...


def open_files(path: str) -> StoreFiles:
    """Files at a local path or at an fsspec URL. Nothing is created or asked yet.

    Raises:
        StoreError: The kind of URL is unknown, or needs a package that is not installed.
    """
    if path.startswith(("file://", "local://")):
        path = path.split("://", 1)[1]
    return RemoteFiles(path) if "://" in path else LocalFiles(Path(path))


class LocalFiles:
    """See `StoreFiles`."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def uri(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, name: str, data: bytes) -> None:
        with translated(self.folder / name):
            write_atomically(self.folder / name, data)

    def settle(self, names: Iterable[str]) -> None:
        folders = {os.path.dirname(name) for name in names}
        for folder in [*folders, *(["images"] if folders else [])]:
            with translated(self.folder / folder):
                handle = os.open(self.folder / folder, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)

    def read(self, name: str) -> bytes:
        try:
            with translated(self.folder / name):
                return (self.folder / name).read_bytes()
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise StoreError("missing_file", f"There is no file {self.folder / name}.") from error
            raise

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with translated(self.folder / name):
                (self.folder / name).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        return {name: stat.st_size for name, stat in self._scan() if not _TEMPORARY.fullmatch(name)}

    def temporary(self, older_than: float) -> list[str]:
        before = time.time() - older_than
        return [name for name, stat in self._scan() if _TEMPORARY.fullmatch(name) and stat.st_mtime <= before]

    def _scan(self) -> Iterator[tuple[str, os.stat_result]]:
        with translated(self.folder / "images"):
            folders = ["images"] if (self.folder / "images").is_dir() else []
            while folders:
                folder = folders.pop()
                for entry in os.scandir(self.folder / folder):
                    name = f"{folder}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                        continue
                    try:
                        yield name, entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # renamed or deleted since


class RemoteFiles:
    """See `StoreFiles`. Access rights come from where the file system's package finds them: environment, files."""

    def __init__(self, url: str):
        import fsspec

        try:
            self.system, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:  # unknown protocol, package not installed
            raise StoreError("io", f"`path` {url}: {error}.") from error
        self.url, self.root = url, root.rstrip("/")

    def uri(self, name: str) -> str:
        return self.system.unstrip_protocol(f"{self.root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        with self._asked(name, absent="io"):  # what is absent is the bucket
            self.system.pipe_file(f"{self.root}/{name}", data)  # one PUT: all or nothing

    def settle(self, names: Iterable[str]) -> None:
        """Nothing to do: a PUT that has returned lasts."""

    def read(self, name: str) -> bytes:
        with self._asked(name):
            return self.system.cat_file(f"{self.root}/{name}")

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        with self._asked(f"{len(names)} files"):
            try:
                if names:
                    self.system.rm([f"{self.root}/{name}" for name in names])
            except FileNotFoundError:
                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(self._delete_one, names))

    def _delete_one(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.system.rm_file(f"{self.root}/{name}")

    def sizes(self) -> dict[str, int]:
        with self._asked("images/"):
            self.system.invalidate_cache()  # other processes write, too
            found: dict[str, Any] = self.system.find(f"{self.root}/images", detail=True)
        start = len(self.root.lstrip("/")) + 1 if self.root else 0
        return {path.lstrip("/")[start:]: int(info["size"] or 0) for path, info in found.items()}

    def temporary(self, older_than: float) -> list[str]:
        return []

    @contextmanager
    def _asked(self, what: str, *, absent: Reason = "missing_file") -> Generator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(absent, f"{self.url} has no {what} ({error}).") from error
        except PermissionError as error:
            raise StoreError("read_only", f"{self.url}: {error}; check the access rights.") from error
        # Each file system has errors of its own (botocore, aiohttp, google.auth, ...).
        except Exception as error:
            kind = type(error).__name__
            raise StoreError("io", f"{self.url}: {kind}: {error}; check address, access rights and network.") from error
