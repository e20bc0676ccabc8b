import csv
import json

import datasets
import pytest

from rewards.pairs_table import TableError, read_pairs

COLUMNS = {"prompt_column": "prompt", "image_column": "image"}


@pytest.fixture
def folder(tmp_path, make_picture):
    for i in range(3):
        make_picture(seed=i).save(tmp_path / f"{i}.png")
    return tmp_path


ROWS = [{"prompt": f"thing {i}, really", "image": f"{i}.png", "id": i} for i in range(3)]


def write_jsonl(path):
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    datasets.Dataset.from_list(ROWS).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("t.jsonl", write_jsonl), ("t.csv", write_csv), ("t.tsv", write_csv), ("t.parquet", write_parquet)],
)
def test_tables_of_every_kind_say_the_same(folder, name, write):
    write(folder / name)
    pairs = read_pairs(folder / name, **COLUMNS, keep=["id"])
    assert pairs.prompts == [row["prompt"] for row in ROWS]
    assert pairs.images == [str(folder / f"{i}.png") for i in range(3)]
    assert pairs.names == ["0.png", "1.png", "2.png"]
    assert [int(value) for value in pairs.kept["id"]] == [0, 1, 2]


def test_images_inside_a_parquet_file_as_datasets_writes_them(folder, make_picture):
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    rows = {"prompt": ["a", "b"], "image": [str(folder / "0.png"), make_picture(seed=1)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "t.parquet")
    pairs = read_pairs(folder / "t.parquet", **COLUMNS)
    assert pairs.images[0] == str(folder / "0.png")
    assert pairs.images[1].startswith(b"\x89PNG")


def test_a_folder_with_metadata(folder):
    rows = [{"file_name": "1.png", "prompt": "one"}, {"file_name": "0.png", "prompt": "zero"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = read_pairs(folder, **COLUMNS)
    assert (pairs.prompts, pairs.names) == (["one", "zero"], ["1.png", "0.png"])


def test_a_folder_with_texts_beside_the_images(folder):
    (folder / "0.txt").write_text(" zero \n")
    (folder / "2.txt").write_text("two")
    pairs = read_pairs(folder, **COLUMNS)
    assert pairs.prompts == ["zero", None, "two"]


def test_the_digest_notices_a_changed_image(folder, make_picture):
    write_jsonl(folder / "t.jsonl")
    before = read_pairs(folder / "t.jsonl", **COLUMNS).digest()
    assert read_pairs(folder / "t.jsonl", **COLUMNS).digest() == before
    make_picture(99, 99).save(folder / "1.png")
    assert read_pairs(folder / "t.jsonl", **COLUMNS).digest() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"prompt": "a"', "line 1 is not JSON"),
        ("t.jsonl", "[1]", "line 1 must be an object, but is list"),
        ("t.jsonl", "", "has no rows"),
        ("t.jsonl", '{"text": "a", "image": "x"}', "has no column `prompt`; it has image, text"),
        ("t.parquet", "junk", "is broken|can't be read"),
        ("t.xlsx", "junk", "must be .jsonl, .csv, .tsv or .parquet"),
        ("t.csv", "\udcff", "can't be read"),
    ],
)
def test_a_table_that_can_not_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(TableError, match=message):
        read_pairs(tmp_path / name, **COLUMNS)


def test_missing_and_empty_folders_are_named(tmp_path, make_picture):
    with pytest.raises(TableError, match="There is no table or folder"):
        read_pairs(tmp_path / "none", **COLUMNS)
    with pytest.raises(TableError, match="holds no images"):
        read_pairs(tmp_path, **COLUMNS)
    make_picture().save(tmp_path / "a.png")
    with pytest.raises(TableError, match="has no prompts: add metadata.jsonl"):
        read_pairs(tmp_path, **COLUMNS)
