"""Other people's tables as a ChatGenBench folder."""

import contextlib
import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from align.bench.chatgen.schema import image_part, message, row_features, text_part
from align.bench.chatgen.table_mapping import MAX_TEXT, _parsed, read_arguments
from align.bench.chatgen.tables import TablesConfig, convert, load_columns, read_table
from align.bench.sources import SourceError
from rewards.commandline import ConfigError
from rollouts.catalog import Catalog, CatalogEntry, CatalogError

REPOSITORY = Path(__file__).parents[4]
PRESETS = REPOSITORY / "configs/chatgen"
PARAMETERS = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0}
# Figure 5 of the paper.
SAID = """Prompt: Fantz cartoon monster|bee design, ultra detailed, no pink

Model: Small_Mostersv2.
A Lora Model that generates funny monsters.
Arguments:
{'sampler': 'DPM++ 2S a Karras',
  'steps': 42, 'cfg_scale': 4, 'width': '600', 'height': '600'
}"""
FLAT = {
    "messages": "chat", "prompt": "prompt", "model": "model", "negative_prompt": ["negative"], "role": ["who"],
    "arguments": {"sampler": "sampler", "steps": "steps", "cfg_scale": "cfg", "size": "size", "clip_skip": ["skip"]},
}  # fmt: skip
ARGUMENTS = {"sampler": "Euler a", "steps": 30, "cfg_scale": 6.5, "width": 512, "height": 768, "clip_skip": None}


def flat(number=0, **fields):
    row = {"chat": f"draw me fox {number}", "prompt": f"a fox, {number}", "model": "Fox", "sampler": "euler a"}
    return row | {"steps": 30, "cfg": 6.5, "size": "512x768"} | fields


@pytest.fixture
def run(tmp_path):
    """`run(rows or path, columns, name=..., catalog=...)`: the report, and rows of the splits."""

    def run(source, columns=FLAT, name="rows.json", catalog=None):
        if not isinstance(source, Path):
            (tmp_path / "theirs").mkdir(exist_ok=True)
            text, source = json.dumps(source), tmp_path / "theirs" / name
            source.write_text(text)
        if not isinstance(columns, Path):
            text, columns = yaml.safe_dump(columns, sort_keys=False), tmp_path / "columns.yaml"
            columns.write_text(text)
        output = tmp_path / "ours"
        config = TablesConfig(source=str(source), columns=str(columns), output=str(output), catalog=catalog)
        report = convert(config)
        data = datasets.load_from_disk(str(output / "chats"))
        assert isinstance(data, datasets.DatasetDict) and list(data) == ["train", "test"]
        assert all(rows.features == row_features() for rows in data.values())
        assert not (output / ".work" / "tables").exists()
        assert json.loads((output / "report.json").read_text())["rows"] == report["rows"]
        return report, {split: list(rows) for split, rows in data.items()}

    return run


@pytest.fixture
def catalog(tmp_path):
    """`Fox` (7, version 70) and `small_mostersv2` (8, version 80), as a file."""
    entries = [
        CatalogEntry(name=name, version_id=model * 10, model_id=model, type="Checkpoint", base_model="SD 1.5",
                     default_parameters=PARAMETERS)
        for name, model in (("Fox", 7), ("small_mostersv2", 8))
    ]  # fmt: skip
    Catalog(entries).save(tmp_path / "catalog.jsonl")
    return str(tmp_path / "catalog.jsonl")


def test_dabench_with_its_preset(bench, run):
    """Our own DABench, whose calls and splits are there again."""
    report, rows = run(bench / "sd15", PRESETS / "columns_dabench.yaml", catalog=str(bench / "catalog.jsonl"))
    theirs = datasets.load_from_disk(str(bench / "sd15"))
    expected = {row["id"]: row for split in theirs.values() for row in split}
    assert report["rows"]["left_out"] == {} and len(rows["train"] + rows["test"]) == len(expected) > 50
    assert {row["id"] for row in rows["test"]} == {row["id"] for row in theirs["eval"]}
    for row in rows["train"] + rows["test"]:
        source = expected[row["id"]]
        call, (chat,) = source["api"], row["messages"]
        assert (row["prompt"], row["negative_prompt"]) == tuple(source["instruction"].values())
        assert chat == message("user", text_part(row["prompt"])) and row["input_type"] == "single"
        assert (row["model"], row["base_model"]) == (call["model"], call["base Model"])
        assert list(row["arguments"].values()) == [
            call[name] for name in ("sampling method", "sampling steps", "cfg scale", "width", "height")
        ] + [None]
        assert row["source"]["version_id"] == source["source"]["version_id"]
    assert report["unread_arguments"] == {} == report["unused_columns"]


def test_a_catalogue_is_made_of_calls(bench, run, tmp_path):
    """As pairs of JSON texts, which is what the paper says that DABench is."""
    rows = [
        {"instruction": json.dumps(row["instruction"]), "output": json.dumps(row["api"])}
        for row in datasets.load_from_disk(str(bench / "sd15"))["sft"]
    ]
    report, ours = run(rows, PRESETS / "columns_dabench.yaml", "train.json")
    given, made = Catalog.load(bench / "catalog.jsonl"), Catalog.load(tmp_path / "ours/catalog.jsonl")
    assert len(ours["train"]) == len(rows) and set(made) == {json.loads(row["output"])["model"] for row in rows}
    assert report["catalog"] == {"models": len(made), "from": "the table", "not_in_it": 0}
    for name, entry in made.items():
        assert (entry.type, entry.base_model, entry.description) == (
            given[name].type, given[name].base_model, given[name].description
        )  # fmt: skip
        assert given[name].default_call().base_model == entry.default_call().base_model
    assert sorted(entry.version_id for entry in made.values()) == list(range(1, len(made) + 1))


def test_a_made_catalogue_of_contradicting_rows(run, tmp_path):
    """LoRAs go with the checkpoint that they name, else with the one that has most rows; ids are never used twice."""
    columns = FLAT | {"type": ["type"], "base_model": ["base"], "version_id": ["v"], "base_checkpoint": ["on"]}
    sd, lora = {"type": "CHECKPOINT", "base": "sd 1.5"}, {"type": "LORA", "base": "SD 1.5"}
    rows = [
        flat(0, model="A", size="2048x1024"), flat(1, model="A", v=5, **sd), flat(2, model="B", v=5, **sd),
        flat(3, model="B", v=5, **sd), flat(4, model="L", v=9, **lora), flat(5, model="M", on="A", **lora),
        flat(6, model="X", type="LoRA", base="SDXL"), flat(7, model="P", type="Checkpoint", base="Pony"),
        flat(8, model="B", **sd),
    ]  # fmt: skip
    report, _ = run(rows, columns)
    made = Catalog.load(tmp_path / "ours/catalog.jsonl")
    assert {name: (entry.version_id, entry.base_checkpoint) for name, entry in made.items()} == {
        "A": (10, None), "B": (11, None), "L": (9, "B"), "M": (12, "A")
    }  # fmt: skip
    assert made["A"].default_parameters.width == 512 and report["catalog"]["not_in_it"] == 2
    run([flat(0)])
    assert not (tmp_path / "ours/catalog.jsonl").exists()


def llava(number, said=SAID, **fields):
    turns = [{"from": "human", "value": f"a funny monster {number}"}, {"from": "gpt", "value": said}]
    return {"id": number, "conversations": turns} | fields


def test_conversations_with_the_preset(run, catalog, tmp_path):
    picture = tmp_path / "theirs" / "images" / "a.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    answer = {"prompt": "a fox", "model": "Fox", "arguments": {"Sampling steps": "20", "Seed": 3}}
    shown = llava(1, json.dumps(answer), image="images/a.png")
    shown["conversations"][0]["value"] = "<image>\nlike this"
    talk = llava(2, f"Here it is:\n```json\n{json.dumps(answer)}\n```")
    talk["conversations"][:0] = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "What is it to be?"}]
    talk["conversations"].insert(0, {"from": "system", "value": "You draw."})
    report, rows = run([llava(0), shown, talk], PRESETS / "columns_chatgenbench.yaml", "test.json", catalog)
    first, second, third = rows["test"]
    assert first["messages"] == [message("user", text_part("a funny monster 0"))]
    assert first["prompt"] == "Fantz cartoon monster|bee design, ultra detailed, no pink"
    assert (first["model"], first["source"]["version_id"]) == ("small_mostersv2", 80)  # in the catalogue's spelling
    assert first["arguments"] == {
        "sampler": "DPM++ 2S a Karras", "steps": 42, "cfg_scale": 4, "width": 600, "height": 600, "clip_skip": None
    }  # fmt: skip
    assert second["messages"] == [message("user", image_part(str(picture)), text_part("like this"))]
    assert second["source"]["reference"] == {"image": str(picture), "prompt": ""}
    assert [entry["role"] for entry in third["messages"]] == ["user", "assistant", "user"]
    assert [row["input_type"] for row in rows["test"]] == ["single", "multimodal", "history"]
    assert [row["id"] for row in rows["test"]] == ["0", "1", "2"]
    assert {row["setting"] for row in rows["test"]} == {"few_shot"}
    assert report["unread_arguments"] == {"Seed": 2} and report["catalog"]["models"] == 2


def write(path, rows):
    """Rows in the format that the file's name says."""
    path.parent.mkdir(exist_ok=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("csv", "tsv"):
        handle = io.StringIO()
        writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = "\ufeff" + handle.getvalue()
    else:
        keyed = {"version": [1, {"a": "]"}, 2.5][0], "rows": rows, "more": None}
        lines = "\n".join(map(json.dumps, rows))
        text = lines if kind == "jsonl" else json.dumps(keyed if "keyed" in path.name else rows, indent=1)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


FORMATS = "a.json a.json.gz keyed.json a.jsonl a.jsonl.gz a.csv a.csv.gz a.tsv a.parquet saved"


@pytest.mark.parametrize("name", FORMATS.split())
def test_every_format_says_the_same(run, tmp_path, name):
    rows = [flat(number, who='a "quoted",\nperson' if number == 1 else "") for number in range(3)]
    path = tmp_path / "in" / name
    if name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        write(path, rows)
    report, ours = run(path)
    assert report["rows"] == {"in": 3, "left_out": {}, "out": 3, "examples": {}}
    place = "keyed.json rows" if "keyed" in name else name
    assert ours["test"] == [] and [row["id"] for row in ours["train"]] == [f"{place}/{number}" for number in (1, 2, 3)]
    for number, row in enumerate(ours["train"]):
        assert row["arguments"] == ARGUMENTS and row["prompt"] == f"a fox, {number}"
        assert row["messages"] == [message("user", text_part(f"draw me fox {number}"))]
        assert row["role"] == ('a "quoted",\nperson' if number == 1 else "")


@pytest.mark.parametrize("saved", [False, True])
def test_names_say_the_split(run, tmp_path, saved):
    parts = {"train": [flat(0), flat(1)], "eval": [flat(2)]}
    if saved:
        data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
        data.save_to_disk(str(tmp_path / "in"))
    else:
        for name, rows in parts.items():
            write(tmp_path / "in" / f"chats_{name}-00000.parquet", rows)
    _, ours = run(tmp_path / "in")
    assert [row["prompt"] for row in ours["train"]] == ["a fox, 0", "a fox, 1"]
    assert [row["prompt"] for row in ours["test"]] == ["a fox, 2"]
    write(tmp_path / "in" / "more.jsonl", [flat(9)])
    if not saved:
        with pytest.raises(ConfigError, match=r"the name 'more.jsonl' says no split.*columns.yaml"):
            run(tmp_path / "in")
        _, ours = run(tmp_path / "in", FLAT | {"split": {"constant": "train"}})
        assert len(ours["train"]) == 4


def test_lists_of_an_object_by_split(run):
    _, rows = run({"info": {"a": [1]}, "train": [flat(0)], "test": [flat(1)], "empty": []})
    assert [len(rows[split]) for split in rows] == [1, 1]


def test_settings_follow_from_the_training_rows_where_none_are_given(run):
    rows = [flat(n, model=f"M{n % 2 + (n > 5)}", split="train") for n in range(6)]
    rows += [flat(8, model="M0", split="test"), flat(9, model="M7", split="test")]
    columns = FLAT | {"split": "split", "few_shot_below": 3}
    report, ours = run(rows, columns)
    assert {row["model"]: row["setting"] for row in ours["test"]} == {"M0": "supervised", "M7": "few_shot"}
    assert report["counts"]["few_shot"] == {"single": 1}
    _, ours = run([flat(0, kind="Few-Shot"), flat(1, kind="supervised")], FLAT | {"setting": "kind"})
    assert [row["setting"] for row in ours["train"]] == ["few_shot", "supervised"]


def test_our_own_rows_go_round(run, tmp_path, catalog):
    picture = tmp_path / "bench" / "images" / "1.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    source = {
        "demonstration": "d1",
        "model_id": 7,
        "version_id": 70,
        "image_id": "11",
        "reference": None,
        "turns": ["p"],
    }
    row = {
        "id": "d1/0", "messages": [message("user", text_part("a fox"))], "input_type": "single", "prompt": "a fox, 8k",
        "negative_prompt": "bad", "model": "Fox", "arguments": ARGUMENTS | {"clip_skip": 2}, "base_model": "SD 1.5",
        "setting": "supervised", "split": "test", "role": "nurse, 30", "generator": "template", "source": source,
    }  # fmt: skip
    talk = [
        message("user", text_part("a fox")),
        message("assistant", text_part("sure")),
        message("user", text_part("red")),
    ]
    more = row | {"id": "d1/1", "messages": talk, "input_type": "history", "source": source | {"turns": ["a", "b"]}}
    address = "https://i.example.org/9"
    shown = {"image": address, "prompt": "a fox in summer"}
    chat = [message("user", image_part(address), text_part("like it"))]
    seen = row | {"id": "d1/2", "messages": chat, "input_type": "multimodal", "source": source | {"reference": shown}}
    rows = datasets.Dataset.from_list([row, more, seen], features=row_features())
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "bench/chats"))
    same = "input_type prompt negative_prompt model arguments id base_model setting split role generator source"
    columns = {name: name for name in same.split()} | {"messages": {"turns": "messages"}}
    report, ours = run(tmp_path / "bench/chats", columns, catalog=catalog)
    assert ours["test"] == list(rows) and report["unused_columns"] == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"sampler": "dpm++ 2m", "schedule": "karras"}, {"sampler": "DPM++ 2M Karras"}),
        ({"sampler": "DPM++ 2M", "version": "v1.9.3"}, {"sampler": "DPM++ 2M Karras"}),
        ({"sampler": "lucy_(cyberpunk)_v10"}, {}),  # figure 6 of the paper
        ({"steps": "20", "cfg_scale": "7.255", "clip_skip": 2.0}, {"steps": 20, "cfg_scale": 7.25, "clip_skip": 2}),
        ({"steps": 20.5, "cfg_scale": 0.5, "clip_skip": 13}, {}),
        ({"steps": True, "cfg_scale": "nan", "clip_skip": [2]}, {}),
        ({"steps": 10**400, "cfg_scale": "1e999", "size": 512}, {}),
        ({"size": "512x650"}, {"width": 512, "height": 648}),
        ({"width": "512", "height": 650}, {"width": 512, "height": 648}),
        ({"width": 512}, {}),
        ({"width": 512, "height": 80000}, {}),
        ({"size": "512x768", "width": 640, "height": 640}, {"width": 640, "height": 640}),
        ({"width": 2048, "height": 1024}, {"width": 2048, "height": 1024}),  # SDXL can
    ],
)
def test_arguments_within_bounds(given, expected):
    empty = dict.fromkeys(("sampler", "steps", "cfg_scale", "width", "height", "clip_skip"))
    assert read_arguments(given, "") == empty | expected


def test_sizes_are_those_of_the_architecture():
    big, small = {"width": 2048, "height": 1024}, {"width": 256, "height": 256}
    assert read_arguments(big, "SD 1.5")["width"] is None and read_arguments(big, "SDXL 1.0")["width"] == 2048
    assert read_arguments(small, "SD 1.5")["width"] == 256 and read_arguments(small, "SDXL 1.0")["width"] is None


@pytest.mark.parametrize(
    "text",
    [
        "Steps: 30, Sampler: Euler a, CFG scale: 6.5, Seed: 1, Size: 512x768",
        "a fox\nNegative prompt: bad\nSteps: 30, Sampler: Euler a, CFG scale: 6.5, Size: 512x768",
        "sampling method: Euler a, sampling steps: 30,\nguidance_scale: 6.5, resolution: 512x768",
        '{"sampler_name": "Euler a", "num_inference_steps": 30, "cfgScale": 6.5, "width": "512", "height": 768}',
        "{'sampler': 'Euler a', 'steps': 30, 'cfg_scale': 6.5, 'size': '512x768', 'clip skip': None}",
    ],
)
def test_arguments_as_text(run, text):
    _, rows = run([flat(0, made=text)], FLAT | {"arguments": "made"})
    assert rows["train"][0]["arguments"] == ARGUMENTS


def test_bad_arguments_become_null_or_leave_the_row_out(run):
    rows = [flat(0, sampler="mine", steps=0), flat(1), flat(2, size="9x9", skip=99)]
    report, ours = run(rows)
    assert [row["arguments"]["steps"] for row in ours["train"]] == [None, 30, 30]
    bad = [f"bad_arguments.{name}" for name in ("sampler", "steps", "size", "clip_skip")]
    assert report["null"]["counts"] == dict.fromkeys(bad, 1)
    assert report["null"]["examples"]["bad_arguments.sampler"] == ["rows.json/1: mine"]
    assert report["arguments_present"]["cfg_scale"] == 3
    report, ours = run(rows, FLAT | {"strict_arguments": True})
    assert len(ours["train"]) == 1 and sum(report["rows"]["left_out"].values()) == 2


def test_rows_that_can_not_be_mapped_are_named_and_counted(run, catalog, tmp_path):
    bad = {
        "missing_prompt": flat(prompt=" "), "missing_model": flat(model=None), "unknown_model": flat(model="Dog|\n"),
        "no_user_message": flat(chat=""), "too_long": flat(prompt="a" * (MAX_TEXT + 1)), "malformed_row": ["x"],
        "duplicate_id": flat(id="fine"), "unknown_split": flat(part="holdout"),
    }  # fmt: skip
    columns = FLAT | {"id": ["id"], "split": ["part"], "version_id": ["version"]}
    fine = [flat(id="fine", other=1), flat(1, model="fOX"), flat(2, model="?", version="80")]
    report, rows = run([*fine, *bad.values()], columns, catalog=catalog)
    assert [row["model"] for row in rows["train"]] == ["Fox", "Fox", "small_mostersv2"]
    assert report["rows"]["left_out"] == dict.fromkeys(bad, 1)
    assert report["rows"]["examples"]["malformed_row"] == ["rows.json/9: a list"]
    assert report["unused_columns"] == {"other": 1} and report["unknown_models"] == {"Dog|": 1}
    card = (tmp_path / "ours/README.md").read_text()
    assert all(f"| {name} | −1 | 9.1% | " in card for name in bad) and "- `Dog`: 1\n" in card


def chats(*turns, **fields):
    return flat(chat=[{"role": role, "content": content} for role, content in turns]) | fields


def test_chats_that_can_not_be_read(run, tmp_path):
    part = {"type": "image_url", "image_url": {"url": "https://i.example.org/1"}}
    rows = [
        chats(("user", "a"), ("assistant", "b"), ("user", [part, {"type": "text", "text": "c"}]), ("assistant", "d")),
        chats(("assistant", "b")),
        chats(("user", "a"), ("narrator", "b")),
        chats(("user", 5)),
        chats(("user", [{"type": "audio"}])),
        flat(chat=["a"]),
        chats(("user", "<image> a <image>"), pictures="https://i.example.org/1"),
        chats(("user", "<image> a"), pictures=["https://i.example.org/1", "http://i.example.org/2"]),
        chats(("user", [part])),
    ]
    report, ours = run(rows, FLAT | {"messages": {"turns": "chat", "images": ["pictures"]}})
    (row,) = ours["train"]
    assert row["messages"][2] == message("user", image_part("https://i.example.org/1"), text_part("c"))
    assert len(row["messages"]) == 3 and row["input_type"] == "history"
    counts = {"no_user_message": 2, "unknown_role": 1, "malformed_row": 3, "picture_count": 2}
    assert report["rows"]["left_out"] == counts


def test_pictures_stay_inside_the_folder(run, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in (folder / "in.png", tmp_path / "secret.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    outside = ["../secret.png", "/etc/passwd", str(tmp_path / "secret.png"), "link.png", "in/../../secret.png"]
    missing = ["no.png", "a\0b", "x" * 5000, {"bytes": None, "path": "gone.png"}, 7, "."]
    kept = ["in.png", "./in.png", str(folder / "in.png"), "https://i.example.org/a b.png", {"path": "in.png"}]
    rows = [flat(n, picture=picture) for n, picture in enumerate(kept + outside + missing)]
    report, ours = run(rows, FLAT | {"messages": {"text": "chat", "images": "picture"}})
    assert report["rows"]["left_out"] == {"picture_outside": len(outside), "picture_not_found": len(missing)}
    images = [row["messages"][0]["content"][0]["image"] for row in ours["train"]]
    assert images == [str(folder / "in.png")] * 3 + ["https://i.example.org/a b.png", str(folder / "in.png")]


def test_pictures_that_the_table_holds_are_written(run, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    rows = [flat(n, picture={"bytes": data, "path": "x.png"}) for n, data in enumerate([buffer.getvalue(), b"no"])]
    data = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
    data.save_to_disk(str(tmp_path / "in"))
    report, ours = run(tmp_path / "in", FLAT | {"messages": {"text": "chat", "images": "picture"}})
    assert report["rows"]["left_out"] == {"picture_not_found": 1}
    image = ours["train"][0]["source"]["reference"]["image"]
    assert (tmp_path / "ours" / image).read_bytes() == buffer.getvalue() and image.startswith("images/")


def test_steps_read_texts(run):
    rows = [{"text": "[u] draw a fox [p] a fox, 8k [m] Fox [a] Steps: 30, Sampler: Euler a, Seed: 1"}]
    pattern = r"\[u\] (?P<chat>.+?) \[p\] (?P<prompt>.+?) \[m\] (?P<model>.+?) \[a\] (?P<rest>.+)"
    columns = {
        "steps": {"parts": {"text": "text", "parse": "regex", "pattern": pattern},
                  "made": {"text": "$parts.rest", "parse": "infotext"}},
        "messages": "$parts.chat", "prompt": "$parts.prompt", "model": "$parts.model", "arguments": "$made",
        "generator": {"constant": "gpt-4o"}, "role": ["nobody", {"constant": "nurse"}],
    }  # fmt: skip
    report, ours = run([*rows, {"text": "other"}, {"text": "[" * (MAX_TEXT + 1)}], columns)
    (row,) = ours["train"]
    assert (row["prompt"], row["model"], row["arguments"]["steps"]) == ("a fox, 8k", "Fox", 30)
    assert (row["generator"], row["role"], row["messages"][0]["content"][0]["text"]) == (
        "gpt-4o",
        "nurse",
        "draw a fox",
    )
    assert report["rows"]["left_out"] == {"no_user_message": 2}
    assert report["unreadable_texts"] == {"$parts": "`pattern` does not match: 'other'"}


@pytest.mark.parametrize("kind", ["json", "infotext", "regex"])
@pytest.mark.parametrize(
    "piece",
    [
        "Prompt: a Negative prompt: b Model: c\n",
        "Model: a.\n",
        " ",
        "\n",
        "{",
        "[",
        "-",
        "{1:",
        "a+",
        "'",
        '"',
        "(",
        "a,b:",
    ],
)
def test_no_text_takes_long(kind, piece):
    given = load_columns(PRESETS / "columns_chatgenbench.yaml").steps["said"]
    for head in ("", "{", "Prompt: ", "Prompt: a Model: b"):
        text = (head + piece * MAX_TEXT)[: MAX_TEXT - 1] + "}"
        start = time.perf_counter()
        with contextlib.suppress(ValueError):
            _parsed(text, kind, re.compile(given["pattern"]))
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"promt": "prompt"}, r"columns.yaml: unknown key `promt`. Did you mean `prompt`\?"),
        ({"messages": {"text": "chat", "image": "a"}}, "`messages`: unknown option `image`. Did you mean `images`"),
        ({"arguments": {"step": "steps"}}, "unknown option `step`. Did you mean `steps`"),
        ({"messages": {"users": ["human"]}}, "`messages` needs a `text` or `turns`"),
        ({"messages": None}, "`messages`"),
        ({"prompt": 5}, r"`prompt` must be a path like a.b\[0\].*not 5"),
        ({"prompt": "a..b"}, r"`prompt` must be a path .*'a..b'"),
        (
            {"prompt": "$anser.prompt", "steps": {"answer": {"text": "a", "parse": "json"}}},
            r"Did you mean `\$answer`\?",
        ),
        ({"prompt": "$answer"}, r"there is no step `\$answer`. Name it in `steps`"),
        ({"steps": {"a": {"text": "b", "parse": "regexp"}}}, "`steps.a.parse` is 'regexp'"),
        ({"steps": {"a": {"text": "b", "parse": "regex"}}}, "`steps.a`: `pattern` with a"),
        ({"steps": {"a": {"text": "b", "parse": "regex", "pattern": "(?P<x>"}}}, "columns.yaml: .*missing"),
        ({"steps": {"a": {"parse": "json"}}}, "`steps.a` lacks something: .*text"),
        ({"splits": {"dev": "validation"}}, "`columns.splits` is"),
        ({"few_shot_below": "10"}, "few_shot_below"),
        (
            {"prompt": "promt"},
            r"`prompt` is promt, which none of 2 rows of .*rows.json has. There are the columns chat,",
        ),
        ({"role": "persona"}, "`role` is persona, which none of 2 rows .*columns chat, prompt"),
        ({"prompt": ["$a.p"], "steps": {"a": {"text": "chat", "parse": "json"}}}, r"\$a read nothing: no object"),
        ({"model": ["name"], "version_id": ["id"]}, "`model` is name or id, which none"),
    ],
)
def test_columns_that_can_not_be_meant(run, columns, problem):
    with pytest.raises(ConfigError, match=problem):
        run([flat(0), flat(1)], FLAT | columns)


def test_a_path_in_a_list_need_not_be_there(run):
    _, rows = run([flat(0)], FLAT | {"role": ["persona", "who"]})
    assert rows["train"][0]["role"] == ""


def test_a_wrong_path_is_found_before_a_long_table_ends(run, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps(flat(n)) for n in range(1_100)) + "\n{")
    with pytest.raises(ConfigError, match="none of 1,000 rows"):
        run(path, FLAT | {"prompt": ["text"]})
    report, _ = run(path)
    assert report["rows"]["left_out"] == {"malformed_row": 1}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'[{"a": 1}, {"a": ', "a.json is no JSON near character 11"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "`,` is missing at character 10"),
        ("a.json", b"5", "must be a JSON list"),
        ("a.json", b"[" * 100_000, "no JSON near"),
        ("a.json.gz", gzip.compress(b"[" + b" " * 10_000)[:-12], "a.json.gz can't be read on"),
        ("a.parquet", b"PAR1", "is no Parquet file"),
        ("a.csv", b"a,b,a\n1,2,3", "the column 'a' stands more than once"),
        ("a.pkl", b"", "must be a file, or a folder of files, of .json"),
        ("dataset_dict.json", b"{}", "can't be loaded by datasets"),
    ],
)
def test_sources_that_can_not_be_read(run, tmp_path, name, content, problem):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(SourceError, match=problem):
        run(tmp_path / "in" if name.startswith("dataset") else tmp_path / "in" / name)


def test_other_ways_to_fail(run, tmp_path):
    with pytest.raises(SourceError, match="nowhere must be a file"):
        run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no row could be mapped with .*columns.yaml.*bad_model_name.*rows.json/2"):
        run([flat(0, model=None), flat(1, model="../x")])
    with pytest.raises(CatalogError, match="no catalogue file"):
        run([flat(0)], catalog=str(tmp_path / "no.jsonl"))
    (tmp_path / "ours").mkdir(exist_ok=True)
    (tmp_path / "ours" / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match="is in `output`"):
        run(tmp_path / "ours" / "a.json")


def test_a_run_that_fails_leaves_what_was_there(run, tmp_path):
    run([flat(0)])
    (tmp_path / "ours/.work").mkdir()
    (tmp_path / "ours/.work/answers.sqlite").write_text("paid for")
    before = {path: path.read_bytes() for path in (tmp_path / "ours").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError):
        run([flat(1)], FLAT | {"prompt": "text"})
    assert all(path.read_bytes() == content for path, content in before.items())
    _, rows = run([flat(2)])
    assert (tmp_path / "ours/.work/answers.sqlite").is_file()
    assert [row["prompt"] for row in rows["train"]] == ["a fox, 2"]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=3), st.lists(PLAIN), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.integers(0, 70_000))
def test_json_is_read_in_pieces_as_it_would_be_whole(tmp_path_factory, values, indent, blanks):
    """Wherever the border between two pieces (65,536 characters) falls."""
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(" " * blanks + json.dumps(["x" * (65_530 - blanks % 100), *values], indent=indent), newline="")
    assert [place.row for place in read_table(path)][1:] == values
    path.write_text(json.dumps({"a": 1, "b": values, "c": "x"}, indent=indent))
    assert [(place.name, place.row) for place in read_table(path)] == [("a.json b", value) for value in values]


@pytest.mark.parametrize("path", sorted(PRESETS.glob("columns_*.yaml")), ids=lambda path: path.name)
def test_presets_load_and_say_how_they_are_used(path):
    load_columns(path)
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"--columns configs/chatgen/{path.name}" in head and "not seen" in head.replace(
        "were not\n# seen", "not seen"
    )


def test_the_command(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([flat(0), flat(1, prompt=None)]))
    (tmp_path / "columns.yaml").write_text(yaml.safe_dump(FLAT))
    command = [sys.executable, "-m", "align.bench.chatgen.tables", "--source", "a.json", "--columns", "columns.yaml"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ran = [
        subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for more in ([], ["--output", "out"], ["--output", "out", "--catalog", "no.jsonl"])
    ]
    assert [done.returncode for done in ran] == [2, 0, 2], ran
    assert "1 of 2 rows; left out: {'missing_prompt': 1}" in ran[1].stderr
    assert ran[2].stderr.splitlines()[-1].startswith("error: There is no catalogue file at no.jsonl")
