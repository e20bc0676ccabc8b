"""ChatGenBench of the pocket world."""

import gzip
import json

import pytest
from datasets import load_from_disk
from PIL import Image

from align.bench.chatgen.config import ChatGenBenchConfig
from align.bench.chatgen.schema import chat_text
from pocket.chats import main
from pocket.dump import DumpConfig
from pocket.dump import main as write_dump
from pocket.role_player import meant, scene_of
from pocket.wording import mentioned


@pytest.mark.slow
def test_every_chat_asks_for_exactly_its_scene(tmp_path, untrained_world, minilm):
    write_dump(
        DumpConfig(world=str(untrained_world), output=str(tmp_path / "dump"), images_per_model=12, pictures=False)
    )
    (tmp_path / "images").mkdir()
    with gzip.open(tmp_path / "dump/models.jsonl.gz", "rt") as lines:
        for version in (version for line in lines for version in json.loads(line)["modelVersions"]):
            for image in version["images"]:
                Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{image['id']}.png")
    config = ChatGenBenchConfig(
        source=str(tmp_path / "dump/models.jsonl.gz"), output=str(tmp_path / "bench"), encoder=minilm, plots=False,
        min_downloads=0, min_rating=0, chats_per_demonstration=3, spacy_pipeline=None, few_shot_below=4,
        references="folder", images=str(tmp_path / "images"),
    )  # fmt: skip
    main(config)
    rows = [row for split in load_from_disk(str(tmp_path / "bench/chats")).values() for row in split]
    singles = [row for row in rows if row["input_type"] == "single"]
    assert len(singles) > 50
    for row in singles:
        assert meant(chat_text(row["messages"])) == scene_of(row["prompt"]), row
    for row in rows:
        if row["input_type"] == "history":
            wish = scene_of(row["source"]["turns"][0])
            assert mentioned(chat_text(row["messages"][:1]))["subject"] == ({wish.subject} if wish.subject else set())


@pytest.mark.slow
def test_references_are_drawn_by_the_worlds_models(tmp_path, untrained_world, minilm):
    write_dump(
        DumpConfig(world=str(untrained_world), output=str(tmp_path / "dump"), images_per_model=3, pictures=False)
    )
    config = ChatGenBenchConfig(
        source=str(tmp_path / "dump/models.jsonl.gz"), output=str(tmp_path / "bench"), encoder=minilm, plots=False,
        min_downloads=0, min_rating=0, chats_per_demonstration=1, spacy_pipeline=None, base_models=["SD 1.5"],
        references="render", weights=str(untrained_world), native_side=64,
    )  # fmt: skip
    main(config)
    rows = [row for split in load_from_disk(str(tmp_path / "bench/chats")).values() for row in split]
    shown = [row for row in rows if row["input_type"] == "multimodal"]
    assert shown
    for row in shown:
        image = row["messages"][0]["content"][0]["image"]
        assert image == row["source"]["reference"]["image"] and image.startswith("images/")
        with Image.open(tmp_path / "bench" / image) as picture:
            assert 32 <= picture.width <= 160
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "bench/images").iterdir()}
    assert len(drawn) == len({row["source"]["reference"]["image"] for row in shown})
    main(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bench/images").iterdir()} == drawn
