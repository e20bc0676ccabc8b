"""The rules for models, versions, files and images, each broken by a record that breaks nothing else."""

import math

import pytest
from pydantic import ValidationError

from align.bench.config import DABenchConfig
from align.bench.filters import availability_rules, first_broken, image_is_nsfw, model_rules, quality_rules
from align.bench.records import ModelRecord, Stats, VersionRecord, file_problems

CONFIG = DABenchConfig(source="-", output="-")
MODEL = {"id": 1, "name": "Fox Style", "type": "LORA"}
FILE = {
    "name": "fox.safetensors",
    "type": "Model",
    "metadata": {"format": "SafeTensor"},
    "pickleScanResult": "Success",
    "virusScanResult": "Success",
    "hashes": {"SHA256": "AB" * 32},
    "downloadUrl": "https://models.example.org/1",
}
VERSION = {"id": 10, "name": "v1", "baseModel": "SD 1.5", "files": [FILE], "stats": {"downloadCount": 500}}


def model(**changes):
    return ModelRecord.model_validate(MODEL | changes)


def version(**changes):
    return VersionRecord.model_validate(VERSION | changes)


def file(**changes):
    return FILE | changes


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"type": "Checkpoint"}, None),
        ({"type": "LoCon"}, "type_out_of_scope"),
        ({"type": "LoRA"}, "type_out_of_scope"),  # our word, not Civitai's
        ({"nsfw": True}, "model_nsfw"),
        ({"nsfw": "true"}, "model_nsfw"),
        ({"poi": True}, "real_person"),
        ({"mode": "Archived"}, "model_archived"),
        ({"mode": "TakenDown"}, "model_archived"),
        ({"availability": "Private"}, "model_private"),
        ({"availability": "Public"}, None),
        ({"name": "/etc/passwd"}, "name_unusable"),
        ({"name": "../../fox"}, "name_unusable"),
        ({"name": "fox/../owl"}, "name_unusable"),
        ({"name": r"C:\fox"}, "name_unusable"),
        ({"name": "~/fox"}, "name_unusable"),
        ({"name": r"\\server\fox"}, "name_unusable"),
        ({"name": " \u200b<b></b>"}, "name_unusable"),
        ({"name": ""}, "name_unusable"),
        ({"name": "&lt;script&gt;"}, "name_unusable"),
        ({"name": "&#47;etc/passwd"}, "name_unusable"),
        ({"name": "Fox / Owl v1.5..."}, None),
        ({"name": "<b>Fox</b>\n\u202eStyle"}, None),
        ({"name": "x" * 99 + " y"}, None),  # the cut at 100 characters leaves a blank at the end
        ({"name": "x" * 50_000}, None),
    ],
)
def test_model_rules(changes, rule):
    assert first_broken(model_rules(CONFIG), model(**changes)) == rule


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("Fox &amp; Owl", "Fox & Owl"),
        ("&lt;b&gt;Fox&lt;/b&gt; &quot;Owl&quot; &#x72D0;", 'Fox "Owl" 狐'),
        ("R&D; AT&T &nbsp; &#99999999999;", "R&D; AT&T \ufffd"),
        (" Fox\u200b\x00 <i>Owl</i>\n", "Fox Owl"),
        ("<script>alert(1)</script>", "alert(1)"),
        ("e\u0301", "é"),
        ("x" * 99 + " y", "x" * 99),
    ],
)
def test_titles_are_clean_and_short(name, title):
    assert model(name=name).title == title
    assert version(name=name).title == title[:50].strip()


def test_scope_and_persons_are_options():
    config = DABenchConfig(source="-", output="-", types=["Checkpoint"], exclude_real_persons=False)
    assert first_broken(model_rules(config), model()) == "type_out_of_scope"
    assert first_broken(model_rules(config), model(type="Checkpoint", poi=True)) is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"baseModel": "SDXL 1.0"}, None),
        ({"baseModel": "SD 2.1"}, "base_model_out_of_scope"),
        ({"baseModel": None}, "base_model_out_of_scope"),
        ({"status": "Published"}, None),
        ({"status": "Draft"}, "version_unpublished"),
        ({"name": "../v1"}, "version_name_unusable"),
        ({"name": ""}, None),
        ({"name": "<br>"}, None),  # as good as empty
        ({"name": "x" * 49 + " " + "y" * 49}, None),
        ({"files": None}, "file_missing"),
        ({"files": []}, "file_missing"),
        ({"files": [file(downloadUrl=None)]}, "file_missing"),
        ({"files": [file(downloadUrl="")]}, "file_missing"),
        ({"files": [file(type="VAE")]}, "file_missing"),
        ({"files": [file(type="Pruned Model")]}, None),
        ({"files": [file(metadata={"format": "PickleTensor"})]}, "file_not_safetensors"),
        ({"files": [file(metadata=None)]}, "file_not_safetensors"),
        ({"files": [file(hashes=None)]}, "file_without_hash"),
        ({"files": [file(hashes={"AutoV2": "ABABABABAB"})]}, "file_without_hash"),
        ({"files": [file(hashes={"SHA256": "AB"})]}, "file_without_hash"),
        ({"files": [file(hashes={"SHA256": "XY" * 32})]}, "file_without_hash"),
        ({"files": [file(hashes={"SHA256": "ab" * 32})]}, None),
        ({"files": [file(pickleScanResult="Danger")]}, "file_scan_failed"),
        ({"files": [file(virusScanResult="Pending")]}, "file_scan_failed"),
        ({"files": [file(virusScanResult=None)]}, None),
        ({"files": [file(metadata={"format": "PickleTensor"}), file()]}, None),
        # One file lacks the hash and the other one the scan: the rule that the last of them breaks.
        ({"files": [file(hashes=None), file(virusScanResult="Danger")]}, "file_scan_failed"),
        ({"files": [file(type="VAE"), file(metadata=None)]}, "file_not_safetensors"),
    ],
)
def test_availability_rules(changes, rule):
    found = version(**changes)
    assert first_broken(availability_rules(CONFIG), model(), found) == rule
    assert (found.best_file() is not None) == (rule is None or not rule.startswith("file"))


def test_the_primary_file_is_called_if_it_can_be():
    other, primary, pruned = (
        file(name=name, **changes)
        for name, changes in {"other": {}, "primary": {"primary": True}, "pruned": {"type": "Pruned Model"}}.items()
    )
    assert version(files=[pruned, other, primary]).best_file().name == "primary"
    assert version(files=[pruned, other]).best_file().name == "other"
    broken = primary | {"virusScanResult": "Danger"}
    assert version(files=[broken, pruned]).best_file().name == "pruned"
    assert file_problems(version(files=[broken]).files[0]) == ["file_scan_failed"]


@pytest.mark.parametrize(
    ("stats", "rule"),
    [
        ({"downloadCount": 100}, None),
        ({"downloadCount": 99}, "few_downloads"),
        ({"downloadCount": None}, "few_downloads"),
        ({"downloadCount": math.nan}, "few_downloads"),
        ({"downloadCount": math.inf}, "few_downloads"),
        ({"downloadCount": "100"}, None),
        ({}, "few_downloads"),
        (None, "few_downloads"),
        ({"downloadCount": 100, "ratingCount": 3, "rating": 3.99}, "low_rating"),
        ({"downloadCount": 100, "ratingCount": 3, "rating": 4}, None),
        ({"downloadCount": 100, "ratingCount": 0, "rating": 0}, None),
        ({"downloadCount": 100, "ratingCount": 3, "rating": None}, "low_rating"),
    ],
)
def test_quality_rules(stats, rule):
    assert first_broken(quality_rules(CONFIG, {}), model(), version(stats=stats)) == rule


def test_the_thresholds_are_options():
    config = DABenchConfig(source="-", output="-", min_downloads=0, min_rating_count=2, min_likes=5)
    rules = quality_rules(config, {"SD 1.5": 600})
    rated = {"downloadCount": 700, "ratingCount": 2, "rating": 5}
    assert first_broken(rules, model(stats={"favoriteCount": 5}), version(stats=rated)) is None
    assert first_broken(rules, model(stats={"thumbsUpCount": 5}), version(stats=rated)) is None
    assert first_broken(rules, model(stats={"favoriteCount": 4}), version(stats=rated)) == "few_likes"
    assert first_broken(rules, model(), version(stats=rated)) == "few_likes"
    assert first_broken(rules, model(), version(stats=rated | {"ratingCount": 1})) == "few_ratings"
    assert first_broken(rules, model(), version(stats=rated | {"downloadCount": 599})) == "few_downloads"
    other = version(stats=rated | {"downloadCount": 599}, baseModel="SDXL 1.0")  # the floor is the other architecture's
    assert first_broken(rules, model(stats={"favoriteCount": 5}), other) is None


@pytest.mark.parametrize(
    ("image", "flagged"),
    [
        ({}, False),
        ({"nsfw": False}, False),
        ({"nsfw": "None"}, False),
        ({"nsfw": None, "nsfwLevel": None}, False),
        ({"nsfw": "None", "nsfwLevel": 1}, False),
        ({"nsfwLevel": "PG"}, False),
        ({"nsfw": True}, True),
        ({"nsfw": "Soft"}, True),
        ({"nsfw": "Mature"}, True),
        ({"nsfw": "X"}, True),
        ({"nsfw": "none of your business"}, True),
        ({"nsfw": False, "nsfwLevel": 2}, True),
        ({"nsfw": False, "nsfwLevel": 5}, True),
        ({"nsfw": "None", "nsfwLevel": "PG13"}, True),
        ({"nsfwLevel": True}, True),
        ({"nsfw": ["X"]}, True),
        ({"nsfwLevel": ["X"]}, True),
        ({"nsfwLevel": math.nan}, True),
    ],
)
def test_images_flagged_in_any_way_are_nsfw(image, flagged):
    assert image_is_nsfw(image) is flagged


@pytest.mark.parametrize(
    "changes",
    [{"id": "x"}, {"id": None}, {"id": 2**63}, {"id": -1}, {"id": 1.5}, {"name": None}, {"name": 5}, {"name": ["Fox"]},
     {"type": None}, {"nsfw": "maybe"}, {"modelVersions": {}}, {"description": {"html": ""}}, {"tags": "fox"},
     {"stats": []}, {"stats": {"downloadCount": "many"}}],
)  # fmt: skip
def test_models_of_another_shape_are_refused(changes):
    with pytest.raises(ValidationError):
        model(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"id": [1]}, {"files": {}}, {"files": ["fox.safetensors"]}, {"files": [file(hashes={"SHA256": 5})]},
     {"files": [file(hashes=["AB"])]}, {"images": "none"}, {"trainedWords": "fox"}, {"trainedWords": [None]},
     {"baseModel": 1.5}],
)  # fmt: skip
def test_versions_of_another_shape_are_refused(changes):
    with pytest.raises(ValidationError):
        version(**changes)


def test_records_may_lack_or_stringify_much():
    bare = ModelRecord.model_validate({"id": "7", "name": "Fox", "type": "LORA", "stats": None, "tags": None})
    assert (bare.id, bare.modelVersions, bare.tag_names, bare.stats) == (7, [], (), Stats())
    tags = model(tags=["fox", {"name": "style"}, {"name": 5}, 3, None]).tag_names
    assert tags == ("fox", "style")
    empty = VersionRecord.model_validate({"id": 1, "images": None, "files": None, "trainedWords": None, "stats": None})
    assert (empty.images, empty.files, empty.trainedWords) == ([], [], [])
