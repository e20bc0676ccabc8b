"""Stage one: which records, versions and images get through, and parts that survive a kill."""

import json
import math

import pytest

from align.bench.config import DABenchConfig
from align.bench.extract import MAX_DESCRIPTION_CHARS, extract, extract_part, magnitude, read_parts
from align.bench.sources import Item


def config(**options):
    return DABenchConfig(source="-", output="-", **options)


def meta(**changes):
    fields = {"prompt": "a fox <lora:fox:0.8>", "negativePrompt": "blurry", "sampler": "Euler a", "steps": 20,
              "cfgScale": 7, "Size": "512x768", "Model hash": "ab" * 5}  # fmt: skip
    return fields | changes


def image(number=1, **changes):
    return {"id": number, "url": f"https://i.example.org/{number}.jpeg", "nsfw": "None", "meta": meta()} | changes


def version(number=10, *images, **changes):
    file = {
        "name": "Fox_v1.safetensors",
        "type": "Model",
        "sizeKB": 2,
        "metadata": {"format": "SafeTensor"},
        "hashes": {"SHA256": "cd" * 32, "AutoV2": "cd" * 5, "AutoV1": "12345678", "CRC32": "00000000"},
        "downloadUrl": "https://models.example.org/10",
    }
    return {"id": number, "name": "v1", "baseModel": "SD 1.5", "files": [file], "images": list(images)} | changes


def model(number=1, *versions, **changes):
    return {"id": number, "name": "Fox", "type": "LORA", "modelVersions": list(versions)} | changes


def part_of(*records, **options):
    items = [Item(f"dump:{n}", record) for n, record in enumerate(records, start=1)]
    return extract_part(items, config(**options))


def removed(part, stage):
    return part.funnel.to_dict()[stage]["removed"]


def test_a_sound_record_becomes_a_draft():
    record = model(
        1,
        version(10, image(5), trainedWords=["foxy"], stats={"downloadCount": 7, "rating": 4.5, "ratingCount": 2}),
        description="<p>Foxes</p>",
        tags=["animal"],
        stats={"favoriteCount": 3},
        allowCommercialUse=["Image"],
        allowDerivatives=True,
    )
    part = part_of(record)
    [draft] = part.versions
    [made] = draft.pop("images")
    assert draft == {
        "version_id": 10,
        "model_id": 1,
        "model_name": "Fox",
        "version_name": "v1",
        "type": "LoRA",
        "base_model": "SD 1.5",
        "hashes": ["12345678", "CD" * 5, "CD" * 32],
        "sha256": ["CD" * 32],
        "stems": ["fox_v1"],
        "file": {"uri": "https://models.example.org/10", "format": "SafeTensor", "sha256": "CD" * 32, "size": 2 * 1024},
        "trigger_words": ["foxy"],
        "tags": ["animal"],
        "description": "<p>Foxes</p>",
        "version_description": "",
        "stats": {"downloads": 7, "ratings": 2, "rating": 4.5, "likes": 3},
        "license": {"allow_commercial_use": '["Image"]', "allow_derivatives": "true"},
    }
    assert made == {
        "image_id": "5",
        "url": "https://i.example.org/5.jpeg",
        "prompt": "a fox",
        "negative_prompt": "blurry",
        "sampler": "Euler a",
        "steps": 20,
        "cfg_scale": 7.0,
        "width": 512,
        "height": 768,
        "clip_skip": None,
        "checkpoint_hashes": ("AB" * 5,),
        "checkpoint_name": None,
        "checkpoint_version_id": None,
        "loras": (("fox", 0.8, None),),
        "other_networks": (),
    }


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (None, "malformed_record"),
        ([], "malformed_record"),
        ({"message": "hello"}, "malformed_record"),
        (model(nsfw=True), "model_nsfw"),
        (model(type="VAE"), "type_out_of_scope"),
        (model(name="../x"), "name_unusable"),
        (model(modelVersions="none"), "malformed_record"),
    ],
)
def test_models_that_are_left_out_are_counted_with_their_place(record, rule):
    part = part_of(record, model(2))
    assert removed(part, "models") == {rule: 1}
    assert part.funnel.to_dict()["models"]["examples"][rule][0].startswith("dump:1: ")
    assert part.records == 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0.5, 512), (None, None), ("big", None), (-1, None), (math.nan, None), (math.inf, None), (10**400, None)],
)
def test_the_size_of_a_file_is_a_hint(size, expected):
    record = version(10, image(5))
    record["files"][0]["sizeKB"] = size
    [draft] = part_of(model(1, record)).versions
    assert draft["file"]["size"] == expected


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        ("v1", "malformed_version"),
        ({"name": "v1"}, "malformed_version"),
        (version(files=None), "file_missing"),
        (version(files=[{"hashes": {"SHA256": 5}}]), "malformed_version"),
        (version(baseModel="Other"), "base_model_out_of_scope"),
    ],
)
def test_one_bad_version_costs_only_itself(raw, rule):
    part = part_of(model(1, raw, version(11, image())))
    assert removed(part, "versions") == {rule: 1}
    assert [draft["version_id"] for draft in part.versions] == [11]
    assert part.funnel.to_dict()["images"]["in"] == 1


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        ("https://i.example.org/1.jpeg", "malformed_image"),
        (None, "malformed_image"),
        (image(nsfw="Soft"), "image_nsfw"),
        (image(type="video"), "not_a_picture"),
        (image(meta=None), "meta_missing"),
        (image(meta=[]), "meta_missing"),
        (image(meta=[meta()]), "meta_missing"),
        (image(meta=meta(prompt=["a fox"])), "prompt_missing"),
        (image(meta=meta(prompt="fox " * 600)), "prompt_too_long"),
        (image(meta=meta(steps=math.nan)), "steps_invalid"),
        (image(meta=meta(Size="1e9x5")), "size_missing"),
        (image(meta=meta(**{"Denoising strength": "0.5"})), "image_to_image"),
    ],
)
def test_one_bad_image_costs_only_itself(raw, rule):
    part = part_of(model(1, version(10, raw, image(7))))
    assert removed(part, "images") == {rule: 1}
    assert [made["image_id"] for made in part.versions[0]["images"]] == ["7"]


def test_options_of_images():
    raw = image(meta=meta(prompt="(fox:1.2) " + "red " * 10, **{"Denoising strength": "0.5"}))
    record = model(1, version(10, raw))
    [draft] = part_of(record, allow_image_to_image=True, keep_attention=True).versions
    assert draft["images"][0]["prompt"].startswith("(fox:1.2) red")
    assert removed(part_of(record, allow_image_to_image=True, max_prompt_chars=20), "images") == {"prompt_too_long": 1}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"id": 5}, "5"),
        ({"id": None}, "1"),  # the file name in its URL
        ({"id": "6", "url": None}, "6"),
        ({"id": "five", "url": "https://i.example.org/ab-c_1/width=450/0a1b.jpeg"}, "0a1b"),
        ({"id": 10**50, "url": "https://i.example.org/2"}, "2"),
        ({"id": None, "url": "https://i.example.org/../../etc/passwd%00.jpeg"}, None),
        ({"id": None, "url": None}, None),
        ({"id": True, "url": ["x/y"]}, None),
    ],
)
def test_image_ids(raw, expected):
    [draft] = part_of(model(1, version(10, image() | raw))).versions
    found = draft["images"][0]["image_id"]
    assert found == expected if expected else len(found) == 16 and set(found) <= set("0123456789abcdef")


def test_hashes_of_versions_that_cannot_be_called_are_remembered():
    part = part_of(model(1, version(10, image(), baseModel="Other")))
    assert part.versions == []
    [unavailable] = part.unavailable
    assert unavailable["hashes"] == ["12345678", "CD" * 5, "CD" * 32]
    assert unavailable["rule"] == "base_model_out_of_scope"


def test_huge_texts_are_cut_and_half_characters_replaced():
    record = model(
        1,
        version(10, image(meta=meta(prompt="a \ud800 fox")), trainedWords=["x" * 10**6] * 100, baseModel="SD 1.5"),
        name="Fox \udfff" + "x" * 10**6,
        description="<p>" + "y" * 20_000_000,
        tags=["t" * 10**6] * 100,
        allowCommercialUse="z" * 10**6,
    )
    stored = part_of(record).to_json()
    assert len(stored) < 32 * 1000 * 2 + MAX_DESCRIPTION_CHARS + 10_000
    [draft] = json.loads(stored)["versions"]
    assert len(draft["description"]) == MAX_DESCRIPTION_CHARS
    assert draft["model_name"] == "Fox " + "x" * 96
    assert draft["images"][0]["prompt"] == "a ? fox"


def test_distributions_of_strange_values_stay_small():
    part = part_of(*(model(n, version(n, baseModel="B" * 10**6)) for n in range(3)), model(type="T" * 10**6))
    assert len(part.to_json()) < 10_000


@pytest.mark.parametrize(
    ("value", "label"),
    [(None, "hidden"), (math.nan, "hidden"), (math.inf, "hidden"), (-5, "0"), (0, "0"), (0.9, "0"), (1, "1e0"),
     (9, "1e0"), (10, "1e1"), (999.9, "1e2"), (1000, "1e3"), (123_456, "1e5")],
)  # fmt: skip
def test_magnitudes(value, label):
    assert magnitude(value) == label


# Parts


class Source:
    """A source that counts how many of its items were read."""

    def __init__(self, count):
        self.count = count
        self.read = 0

    def __call__(self):
        for number in range(1, self.count + 1):
            self.read += 1
            yield Item(f"dump:{number}", model(number, version(number, image(number))))


def versions(paths):
    return [draft["version_id"] for part in read_parts(paths) for draft in part["versions"]]


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])])
def test_parts_cover_the_source(tmp_path, count, sizes):
    paths = extract(Source(count), config(records_per_part=4), tmp_path)
    assert [part["records"] for part in read_parts(paths)] == sizes
    assert versions(paths) == list(range(1, count + 1))


def test_finished_parts_are_not_written_again(tmp_path):
    paths = extract(Source(20), config(records_per_part=3), tmp_path)
    (tmp_path / "done").unlink()
    for path in paths[3:5]:
        path.unlink()
    kept = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if path.exists()}
    again = extract(Source(20), config(records_per_part=3), tmp_path)
    assert again == paths and versions(again) == list(range(1, 21))
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept} == kept


def test_a_finished_extraction_does_not_read_the_source(tmp_path):
    paths = extract(Source(7), config(records_per_part=3), tmp_path)
    source = Source(7)
    assert extract(source, config(records_per_part=3), tmp_path) == paths
    assert source.read == 0


def test_a_source_that_breaks_off_leaves_whole_parts_only(tmp_path):
    def broken():
        yield from list(Source(5)())
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        extract(broken, config(records_per_part=2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-000000.json", "part-000001.json"]
    assert versions(extract(Source(6), config(records_per_part=2), tmp_path)) == [1, 2, 3, 4, 5, 6]
