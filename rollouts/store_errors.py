"""What can go wrong with an image store, in words that say what to do."""

import errno
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal, get_args

Reason = Literal[
    "no_store",  # there is none at this path
    "not_a_folder",
    "read_only",
    "disk_full",
    "locked",  # another process holds the index for longer than is waited
    "newer_version",  # written by a later version of this package
    "corrupt",  # the index is no SQLite database, or a broken one
    "not_stored",  # no picture under this key: never drawn, failed, or dropped
    "missing_file",  # the index has it, the folder has not
    "corrupt_file",  # the file is no intact picture, or another one
    "io",  # any other error of the file system or of the object store
]
REASONS: tuple[str, ...] = get_args(Reason)


class StoreError(Exception):
    """The store can't do what was asked; nothing that was in it is lost by that.

    Attributes:
        reason: One of `REASONS`, for counting and for deciding what to do.
    """

    def __init__(self, reason: Reason, message: str):
        super().__init__(message)
        self.reason: Reason = reason


_OF_ERRNO: dict[int | None, tuple[Reason, str]] = {
    errno.ENOSPC: ("disk_full", "free some space (`python -m rollouts.store prune`) and run the same command again"),
    errno.EDQUOT: ("disk_full", "your quota is used up: free some space and run the same command again"),
    errno.EFBIG: ("disk_full", "the limit on the size of a file is reached (`ulimit -f`): raise it and run again"),
    errno.EROFS: ("read_only", "the file system is read-only: choose another place, or open the store read-only"),
    errno.EACCES: ("read_only", "this user has no permission: change it, or choose another place"),
    errno.EPERM: ("read_only", "this user has no permission: change it, or choose another place"),
    errno.ENOTDIR: ("not_a_folder", "a part of the path is a file: choose another place"),
    errno.EEXIST: ("not_a_folder", "there is a file of this name: choose another place"),
    errno.EISDIR: ("not_a_folder", "there is a folder where a file is expected: choose another place"),
}  # fmt: skip
_REBUILD = "build it again from the pictures by `python -m rollouts.store verify --repair true`"
_UNWRITABLE = "make the file and its folder readable and writable, choose another place, or open the store read-only"
_WAIT = "another process is writing: wait for it, or end it, and try again"
_OF_SQLITE: dict[int, tuple[Reason, str]] = {
    sqlite3.SQLITE_FULL: _OF_ERRNO[errno.ENOSPC],
    sqlite3.SQLITE_BUSY: ("locked", _WAIT),
    sqlite3.SQLITE_LOCKED: ("locked", _WAIT),
    sqlite3.SQLITE_READONLY: ("read_only", _UNWRITABLE),
    sqlite3.SQLITE_CANTOPEN: ("read_only", _UNWRITABLE),
    sqlite3.SQLITE_IOERR: ("io", "the disk is full or gone, or is a network drive, on which SQLite can't work"),
    sqlite3.SQLITE_CORRUPT: ("corrupt", _REBUILD),
    sqlite3.SQLITE_NOTADB: ("corrupt", _REBUILD),
}  # fmt: skip


@contextmanager
def translated(what: object) -> Generator[None]:
    """Errors of SQLite and of the operating system become StoreErrors that begin with `what`."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the class, the rest is detail
        if code not in _OF_SQLITE:
            raise
        reason, advice = _OF_SQLITE[code]
        raise StoreError(reason, f"{what}: {error}; {advice}.") from error
    except OSError as error:
        reason, advice = _OF_ERRNO.get(error.errno, ("io", "see the error before this one"))
        raise StoreError(reason, f"{what}: {error.strerror or error}; {advice}.") from error
