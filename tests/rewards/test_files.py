"""Atomic writes: a kill at any moment leaves the old content or the new."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from rewards.files import write_atomically

# Rewrites one file for ever with 300 kB of one letter, the next letter each time.
REWRITER = """
import itertools, sys
from rewards.files import write_atomically
for letter in itertools.cycle("abcdefgh"):
    write_atomically(sys.argv[1], letter.encode() * 300_000)
"""


def whole(data):
    return len(data) == 300_000 and data[0] in b"abcdefgh" and data == data[:1] * 300_000


def test_killed_in_the_middle_of_many_rewrites(tmp_path):
    """Whoever reads meanwhile, and whoever reads after the kill, finds one whole version."""
    path = tmp_path / "state.json"
    write_atomically(path, b"a" * 300_000)
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", REWRITER, str(path)])
        seen = set()
        try:
            deadline = time.monotonic() + 30
            while len(seen) < 4:
                data = path.read_bytes()
                assert whole(data)
                seen.add(data[:1])
                assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.0037 * attempt)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert whole(path.read_bytes())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_an_ordinary_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        assert os.umask(before) == umask  # and the umask itself was left alone
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_folders_are_made_and_content_is_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"a longer first text")
    write_atomically(str(path), b"")
    assert path.read_bytes() == b""
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text, not bytes")
    assert path.read_bytes() == b"old"
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"can't replace a folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_long_names(tmp_path):
    path = tmp_path / ("n" * 250)  # with a suffix it would be longer than file systems allow
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"
