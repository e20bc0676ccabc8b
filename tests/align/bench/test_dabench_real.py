"""The builder on a real Civitai dump, every kept row re-checked from the raw dump without the builder's code.

Nothing of `align.bench` is imported here: the builder runs as its users run it, and this file reads the dump itself.
"""

import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from datasets import load_from_disk

from rollouts.api import APICall
from rollouts.catalog import Catalog

DUMP = Path(__file__).parents[4] / "shared" / "data" / "civitai" / "models.jsonl.gz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DUMP.is_file(), reason=f"needs a real Civitai dump at {DUMP}"),
]
HASH_KINDS = ("AutoV1", "AutoV2", "SHA256")


def run_builder(output, *flags):
    """Run the builder; returns seconds and the peak of its resident memory in bytes, looked at every 50 ms.

    Not `RUSAGE_CHILDREN`: that counts the moment after the fork, when the child still has this process's memory.
    """
    command = [sys.executable, "-m", "align.bench.dabench", "--source", str(DUMP), "--output", str(output), *flags]
    start = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = psutil.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    time.sleep(0.2)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, process.memory_info().rss)
        time.sleep(0.05)
    assert process.returncode == 0
    return time.perf_counter() - start, peak


def rows_by_split(output):
    return {name: list(part) for name, part in load_from_disk(str(output / "sd15")).items()}


def digest(output):
    rows = sorted(json.dumps(row, sort_keys=True) for part in rows_by_split(output).values() for row in part)
    return hashlib.sha256(("\n".join(rows) + (output / "catalog.jsonl").read_text()).encode()).hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("real") / "dabench"
    return output, *run_builder(output)


@pytest.fixture(scope="module")
def splits(run):
    return rows_by_split(run[0])


@pytest.fixture(scope="module")
def rows(splits):
    return [row for part in splits.values() for row in part]


@pytest.fixture(scope="module")
def catalog(run):
    return Catalog.load(run[0] / "catalog.jsonl")


@pytest.fixture(scope="module")
def raw():
    """The dump: models by id, versions by id (with their model's), images of each version by id or file name."""
    models, versions, images = {}, {}, {}
    with gzip.open(DUMP, "rt", encoding="utf-8") as lines:
        for line in lines:
            model = json.loads(line)
            models[model["id"]] = model
            for version in model["modelVersions"]:
                versions[version["id"]] = version | {"model": model}
                for image in version.get("images") or []:
                    name = (image.get("url") or "").rsplit("/", 1)[-1].rsplit(".", 1)[0]
                    key = str(image["id"]) if image.get("id") is not None else name
                    images.setdefault((version["id"], key), []).append(image)
    return models, versions, images


@pytest.fixture(scope="module")
def evidence(rows, raw):
    """Each row with its raw gallery image (all that share its id) and the version it hung at."""
    _, versions, images = raw
    return [
        (row, versions[row["source"]["gallery_version_id"]],
         images[row["source"]["gallery_version_id"], row["source"]["image_id"]])
        for row in rows
    ]  # fmt: skip


def hashes_of(version):
    return {(f.get("hashes") or {}).get(kind, "").upper() for f in version["files"] for kind in HASH_KINDS} - {""}


def claimed_hashes(meta):
    """All hashes by which an image's data name its checkpoint."""
    hashes, resources = meta.get("hashes"), meta.get("resources")
    found = [meta.get("Model hash"), hashes.get("model") if isinstance(hashes, dict) else None]
    if isinstance(resources, list):
        found += [r.get("hash") for r in resources if isinstance(r, dict) and r.get("type") == "model"]
    return {value.upper() for value in found if isinstance(value, str)}


def loras_of(meta):
    """Names of the LoRAs that the tags of a prompt switch on: all but those of weight 0."""
    tags = re.findall(r"<\s*(?:lora|lyco)\s*:([^:<>]+)((?::[^:<>]*)*)>", meta["prompt"], re.IGNORECASE)
    return {name.strip().lower() for name, weights in tags if not re.fullmatch(r"(?::\s*0?\.?0*\s*)+", weights)}


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def test_under_a_minute_and_a_gigabyte(run):
    _, seconds, peak = run
    assert seconds < 60
    assert 5e7 < peak < 1e9


def test_the_funnel_adds_up(run, rows):
    report = json.loads((run[0] / "funnel.json").read_text())
    assert set(report["funnel"]) == {"models", "versions", "images"}
    for stage in report["funnel"].values():
        assert stage["in"] - sum(stage["removed"].values()) == stage["out"]
    assert report["funnel"]["models"]["in"] == 7489
    assert report["funnel"]["images"]["out"] == len(rows) == report["summary"]["architectures"]["SD 1.5"]["rows"]
    assert len(rows) > 8000


def test_rows_and_names_are_unique(rows, catalog):
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({(row["source"]["version_id"], row["source"]["image_id"]) for row in rows}) == len(rows)
    assert len({name.lower() for name in catalog}) == len(catalog)
    spoken = [" ".join(re.findall(r"\w+", row["instruction"]["prompt"].lower())) for row in rows]
    prompts = Counter(zip((row["source"]["version_id"] for row in rows), spoken, strict=True))
    assert max(prompts.values()) == 1


def test_nothing_is_flagged(evidence, raw):
    _, versions, _ = raw
    for row, gallery, images in evidence:
        assert gallery["model"]["nsfw"] is False and gallery["model"].get("poi") is not True
        assert versions[row["source"]["version_id"]]["model"]["nsfw"] is False
        assert [image for image in images if image["nsfw"] == "None" and image.get("nsfwLevel", 1) <= 1], row["id"]


def test_every_model_of_the_catalogue_is_available(catalog, raw):
    _, versions, _ = raw
    for entry in catalog.values():
        version = versions[entry.version_id]
        model = version["model"]
        assert model["nsfw"] is False and model.get("mode") is None and model["id"] == entry.model_id
        assert {"Checkpoint": "Checkpoint", "LORA": "LoRA"}[model["type"]] == entry.type
        assert version["baseModel"] == entry.base_model == "SD 1.5"
        [file] = entry.files
        matching = [f for f in version["files"] if (f["hashes"].get("SHA256") or "").upper() == file.sha256]
        assert any(
            f["metadata"]["format"] == "SafeTensor" and f["downloadUrl"] == file.uri
            and f["pickleScanResult"] == f["virusScanResult"] == "Success" and round(f["sizeKB"] * 1024) == file.size
            for f in matching
        ), entry.name  # fmt: skip


def test_no_tags_are_left_in_prompts(rows):
    left = re.compile(r"<[^<>]*(?:lora|lyco|hypernet)[^<>]*>|<\s*(?:lora|lyco)|\b(?:lora|lyco)\s*:\S", re.IGNORECASE)
    weights = re.compile(r"\([^()]*:\s*\d+(\.\d+)?\)|\bBREAK\b")
    for row in rows:
        for text in row["instruction"].values():
            assert not left.search(text), (row["id"], text)
            assert not weights.search(text), (row["id"], text)
        assert row["instruction"]["prompt"].strip()


def test_prompts_are_the_images_own(evidence):
    for row, _, images in evidence:
        theirs = set().union(*(words(image["meta"]["prompt"]) for image in images if image["meta"]))
        assert words(row["instruction"]["prompt"]) <= theirs, row["id"]


def test_parameters_are_the_images_own(evidence):
    for row, _, images in evidence:
        call = row["api"]
        metas = [image["meta"] for image in images if image["meta"] and "Size" in image["meta"]]
        made = {(int(m["steps"]), round(float(m["cfgScale"]), 2)) for m in metas}
        assert (call["sampling steps"], call["cfg scale"]) in made
        sizes = {tuple(int(side) // 8 * 8 for side in m["Size"].split("x")) for m in metas}
        assert (call["width"], call["height"]) in sizes
        samplers = {m["sampler"].lower().removesuffix(" karras") for m in metas}
        assert any(call["sampling method"].lower().startswith(sampler) for sampler in samplers)


def test_every_call_validates(rows, catalog):
    for row in rows:
        call = APICall.from_dict(row["api"])
        assert catalog.validate(call) == []
        assert catalog[call.model].version_id == row["source"]["version_id"]
        assert call.to_dict() == row["api"]


def test_every_lora_has_a_base_that_was_really_used(evidence, catalog, raw):
    _, versions, _ = raw
    count = 0
    for row, gallery, images in evidence:
        if row["api"]["type"] != "LoRA":
            assert row["source"]["base_version_id"] is None and row["source"]["lora_weight"] is None
            continue
        count += 1
        entry = catalog[row["api"]["model"]]
        base = catalog[entry.base_checkpoint]
        assert (base.type, base.base_model) == ("Checkpoint", entry.base_model)
        used = versions[row["source"]["base_version_id"]]
        assert used["model"]["type"] == "Checkpoint" and used["baseModel"] == row["base_model"]
        assert any(hashes_of(used) & claimed_hashes(image["meta"]) for image in images if image["meta"]), row["id"]
        assert gallery["model"]["type"] == "LORA" and gallery["model"]["id"] == row["source"]["model_id"]
        assert any(len(loras_of(image["meta"])) <= 1 for image in images if image["meta"]), row["id"]
    assert count > 4000


def test_every_checkpoint_image_was_made_with_that_checkpoint(evidence, raw):
    _, versions, _ = raw
    count = 0
    for row, gallery, images in evidence:
        if row["api"]["type"] != "Checkpoint":
            continue
        count += 1
        version = versions[row["source"]["version_id"]]
        made = [image["meta"] for image in images if image["meta"]]
        assert any(hashes_of(version) & claimed_hashes(meta) for meta in made), row["id"]
        assert any(not loras_of(meta) for meta in made), row["id"]
        assert gallery["model"]["type"] == "Checkpoint"
    assert count > 1000


def test_shares_are_eight_to_one_to_one(splits, rows):
    assert list(splits) == ["sft", "rrhf", "eval"]
    for name, share in (("sft", 0.8), ("rrhf", 0.1), ("eval", 0.1)):
        assert abs(len(splits[name]) / len(rows) - share) < 0.01
        assert {row["split"] for row in splits[name]} == {name}


@pytest.mark.parametrize(("one", "other"), [("eval", "sft"), ("rrhf", "sft"), ("eval", "rrhf")])
def test_no_near_duplicates_across_splits(splits, one, other):
    """Every pair of a sample of one split and the whole other one: fewer than 80% of their words in common."""
    sample = random.Random(0).sample(splits[one], 400)
    others = [words(row["instruction"]["prompt"]) for row in splits[other]]
    for row in sample:
        mine = words(row["instruction"]["prompt"])
        for theirs in others:
            assert len(mine & theirs) < 0.8 * len(mine | theirs) - 1e-9, row["id"]


def test_a_second_build_with_another_unit_of_work_is_the_same(run, tmp_path):
    run_builder(tmp_path / "again", "--records_per_part", "211", "--plots", "false")
    assert digest(tmp_path / "again") == digest(run[0])
