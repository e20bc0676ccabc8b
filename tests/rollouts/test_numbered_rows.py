"""Rows with their numbers, from both formats, and what can't be read."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollouts.numbered_rows import read_rows


class OwnError(ValueError):
    pass


def test_both_formats_give_the_same_rows(tmp_path):
    rows = [{"a": 1}, {"a": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    found = [list(read_rows(tmp_path / name, OwnError)) for name in ("x.parquet", "x.jsonl")]
    assert found == [list(enumerate(rows, start=1))] * 2


@pytest.mark.parametrize("line", [b"{", b"", b'"\xff"', b"[" * 100_000])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(b"1\n" + line + b"\n")
    with pytest.raises(OwnError, match=r"x\.jsonl, row 2: not JSON"):
        list(read_rows(tmp_path / "x.jsonl", OwnError))


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(OwnError, match=r"x\.parquet: not a Parquet file"):
        list(read_rows(tmp_path / "x.parquet", OwnError))
