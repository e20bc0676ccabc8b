"""Reading dumps, folders and APIs, whole and damaged."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
import zstandard

from align.bench.sources import MAX_DEPTH, SourceError, open_source, source_fingerprint

RECORDS = [{"id": i, "name": f"Model {i} 狐", "noise": random.Random(i).random()} for i in range(2000)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def records(source):
    items = list(open_source(str(source))())
    assert [item.problem for item in items] == [None] * len(items)
    return [item.record for item in items]


def write(path, data):
    path.write_bytes(data)
    return path


def zst(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


def streamed_zst(data):
    """A frame whose header does not tell the size of its content, as `zstd` makes of a pipe."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain.jsonl", LINES),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("blank.jsonl", b"\n \n" + LINES + b"\n\n"),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES),
        ("open_end.jsonl", LINES[:-1]),
        ("one.jsonl.gz", gzip.compress(LINES)),
        ("two.jsonl.gz", gzip.compress(LINES[:5000]) + gzip.compress(LINES[5000:])),
        ("one.jsonl.zst", zst(LINES)),
        ("streamed.jsonl.zst", streamed_zst(LINES)),
        ("checked.jsonl.zst", zst(LINES, write_checksum=True)),
        ("frames.jsonl.zst", b"".join(zst(LINES[i : i + 700]) for i in range(0, len(LINES), 700))),
        ("empty_frame.jsonl.zst", zst(b"") + zst(LINES) + zst(b"")),
    ],
)
def test_dumps_are_read_whole_and_again(tmp_path, name, data):
    path = write(tmp_path / name, data)
    opener = open_source(str(path))
    first, again = ([item.record for item in opener()] for _ in range(2))
    assert first == again == RECORDS


def test_items_say_where_they_stood(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"id": 1}\n\n{"id": \n{"id": 3}\n')
    items = list(open_source(str(path))())
    assert [item.location for item in items] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert [item.record for item in items] == [{"id": 1}, None, {"id": 3}]
    assert items[1].problem.startswith("not JSON: Expecting value")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("pack", [gzip.compress, zst, streamed_zst], ids=["gz", "zst", "streamed_zst"])
def test_a_truncated_dump_is_an_error_after_what_it_holds(tmp_path, pack, share):
    packed = pack(LINES)
    suffix = "gz" if pack is gzip.compress else "zst"
    path = write(tmp_path / f"cut.jsonl.{suffix}", packed[: int(share * len(packed))])
    found = []
    with pytest.raises(
        SourceError, match=r"cut\.jsonl.* breaks off after line \d+ .*truncated or damaged. Get it again"
    ):
        for item in open_source(str(path))():
            found.append(item.record)
    assert found == RECORDS[: len(found)] and len(found) < len(RECORDS)


def test_a_dump_truncated_between_frames_of_zstd_cannot_be_told_but_within_one_can(tmp_path):
    frames = [zst(LINES[: len(LINES) // 2]), zst(LINES[len(LINES) // 2 :])]
    path = write(tmp_path / "cut.jsonl.zst", frames[0] + frames[1][:5])
    with pytest.raises(SourceError, match="truncated or damaged"):
        list(open_source(str(path))())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("kind", ["other", "flipped", "tail"])
def test_a_damaged_dump_is_an_error(tmp_path, name, kind):
    packed = gzip.compress(LINES) if name.endswith("gz") else zst(LINES, write_checksum=True)
    middle = len(packed) // 2
    data = {
        "other": b'{"id": 1}\n' * 100,
        "flipped": packed[:middle]
        + bytes(256 - b if b else 1 for b in packed[middle : middle + 50])
        + packed[middle + 50 :],
        "tail": packed + b"not packed",
    }[kind]
    with pytest.raises(SourceError, match=rf"{name} breaks off after line \d+"):
        list(open_source(str(write(tmp_path / name, data)))())


def test_reading_a_packed_dump_takes_constant_memory(tmp_path):
    line = json.dumps({"text": "fox " * 250}).encode() + b"\n"
    write(tmp_path / "large.jsonl.zst", zst(line * 200_000))  # 200 MB unpacked
    code = (
        "import resource, sys; from align.bench.sources import open_source\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"  # kB
        "before = peak(); print(sum(1 for _ in open_source(sys.argv[1])()), peak() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.jsonl.zst")], capture_output=True, text=True, check=True
    )
    count, kilobytes = map(int, run.stdout.split())
    assert count == 200_000
    assert kilobytes < 100_000


def test_bytes_that_are_no_text_are_replaced(tmp_path):
    assert records(write(tmp_path / "a.jsonl", b'{"name": "f\xffx"}\n')) == [{"name": "f\ufffdx"}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("{'id': 1}", "not JSON"),
        ("\0", "not JSON"),
        ("[" * 900 + "]" * 900, "nested more than 100 levels"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 100 levels"),
        ('{"a": ' * 101 + "1" + "}" * 101, "nested more than 100 levels"),
    ],
)
def test_lines_that_are_no_record_are_items_with_a_problem(tmp_path, line, problem):
    [item, after] = open_source(str(write(tmp_path / "a.jsonl", f'{line}\n{{"id": 1}}\n'.encode())))()
    assert item.record is None and item.problem.startswith(problem)
    assert after.record == {"id": 1}


def test_nesting_up_to_the_limit_is_fine(tmp_path):
    line = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert len(records(write(tmp_path / "a.jsonl", line.encode()))) == 1


def test_a_folder_holds_objects_lists_and_pages(tmp_path):
    write(tmp_path / "b.json", json.dumps({"items": RECORDS[1:3], "metadata": {}}).encode())
    write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps(RECORDS[0]).encode())
    write(tmp_path / "c.json", json.dumps(RECORDS[3:5]).encode())
    write(tmp_path / "d.json", b"[]")
    write(tmp_path / "e.txt", b"not read")
    (tmp_path / "f.json").mkdir()
    write(tmp_path / "g.json", b"{")
    items = list(open_source(str(tmp_path))())
    assert [item.record for item in items] == [*RECORDS[:5], None]
    assert [item.location for item in items] == ["a.json", "b.json[1]", "b.json[2]", "c.json[1]", "c.json[2]", "g.json"]
    assert items[-1].problem.startswith("not JSON")


def test_an_unreadable_file_of_a_folder_is_named(tmp_path):
    write(tmp_path / "a.json", b"{}")
    opener = open_source(str(tmp_path))
    (tmp_path / "b.json").symlink_to("b.json")  # a link to itself
    write(tmp_path / "c.json", b"{}").chmod(0)
    if os.geteuid() == 0:  # root may read everything
        assert len(list(opener())) == 2
    else:
        with pytest.raises(SourceError, match=r"Can't read .*c\.json: Permission denied"):
            list(opener())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p / "missing.jsonl", "is neither a file, nor a folder, nor a URL"),
        (lambda p: write(p / "models.csv", b"id"), r"must end in .jsonl, .jsonl.gz or .jsonl.zst"),
        (lambda p: write(p / "models.json", b"{}"), r"must end in .jsonl"),
        (lambda p: p, "is a folder without a single .json file"),
        (lambda p: "https://civitai.com/api/v1", "is a URL, but no API client was given"),
    ],
)
def test_what_cannot_be_a_source_is_said_at_once(tmp_path, make, match):
    source = str(make(tmp_path))
    with pytest.raises(SourceError, match=match) as caught:
        open_source(source)
    assert source in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_an_empty_file_holds_nothing(tmp_path, name):
    assert records(write(tmp_path / name, b"")) == []


def test_an_api_is_streamed_each_time_and_its_records_are_checked():
    deep = json.loads("[" * 500 + "]" * 500)
    asked = []

    def api(url):
        asked.append(url)
        yield from ({"id": 1}, {"id": 2, "meta": deep})

    opener = open_source("http://127.0.0.1:9/api/v1", api)
    assert asked == []
    for _ in range(2):
        first, second = opener()
        assert first == ("http://127.0.0.1:9/api/v1 model 1", {"id": 1}, None)
        assert second.record is None and second.problem.startswith("nested more than")
    assert asked == ["http://127.0.0.1:9/api/v1"] * 2


def test_a_fingerprint_changes_with_the_files(tmp_path):
    path = write(tmp_path / "a.jsonl", b"1")
    first = source_fingerprint(str(path))
    assert source_fingerprint(str(path)) == first
    os.utime(path, ns=(1, 1))
    touched = source_fingerprint(str(path))
    write(path, b"12")
    os.utime(path, ns=(1, 1))
    assert len({json.dumps(f) for f in (first, touched, source_fingerprint(str(path)))}) == 3
    folder = source_fingerprint(str(tmp_path))
    write(tmp_path / "b.json", b"{}")
    assert source_fingerprint(str(tmp_path)) != folder
    assert source_fingerprint("https://x/api") == {"source": "https://x/api", "files": []}


def test_without_zstandard_the_extra_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl.zst", zst(LINES))
    code = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from align.bench.sources import open_source, SourceError\n"
        "try: list(open_source(sys.argv[1])())\n"
        "except SourceError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert 'needs zstandard: pip install "t2i-align[bench]"' in run.stdout
