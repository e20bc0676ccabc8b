"""Stage three: quality, duplicates, names, defaults, catalogue entries, rows and splits."""

import json
import random

import pytest

from align.bench import assemble
from align.bench.config import DABenchConfig
from align.bench.descriptions import Description
from align.bench.funnel import Funnel
from rollouts.api import APICall
from rollouts.catalog import Catalog
from rollouts.names import MAX_NAME_LENGTH, name_problem

FOXES = Description("", "Foxes.", "extractive")


def config(**options):
    return DABenchConfig(source="-", output="-", **options)


def draft(version_id, model_name="Fox", version_name="v1", **changes):
    fields = {
        "version_id": version_id,
        "model_id": version_id // 10,
        "model_name": model_name,
        "version_name": version_name,
        "type": "Checkpoint",
        "base_model": "SD 1.5",
        "hashes": [f"{version_id:010X}"],
        "sha256": [f"{version_id:064X}"],
        "stems": [f"stem_{version_id}"],
        "file": {"uri": "https://models.example.org/1", "format": "SafeTensor", "sha256": f"{version_id:064X}"},
        "trigger_words": ["<b>foxy</b>\nred"],
        "tags": [],
        "description": "",
        "version_description": "",
        "stats": {"downloads": 500.0, "ratings": None, "rating": None, "likes": 3.0},
        "license": {"allow_commercial_use": "null"},
        "images": [],
    }
    return fields | changes


def image(number, prompt, *hashes, **changes):
    fields = {"image_id": str(number), "prompt": prompt, "negative_prompt": "", "sampler": "Euler a", "steps": 20,
              "cfg_scale": 7.0, "width": 512, "height": 512, "checkpoint_hashes": hashes, "checkpoint_name": None,
              "checkpoint_version_id": None, "loras": [], "other_networks": []}  # fmt: skip
    return fields | changes


def part(*drafts, unavailable=()):
    return {"versions": list(drafts), "unavailable": list(unavailable)}


def rows_of(drafts, **options):
    """Demonstrations of these drafts, and the funnel."""
    funnel = Funnel()
    funnel.enter("images", sum(len(d["images"]) for d in drafts))
    index = assemble.index_versions([part(*drafts)], config(**options), {}, funnel)
    return list(assemble.demonstrations([part(*drafts)], index, config(**options), funnel)), funnel.to_dict()


# Rows


def test_repeats_of_a_prompt_for_a_version_are_dropped():
    hash_1, hash_2 = f"{11:010X}", f"{12:010X}"
    first = draft(
        11, images=[image(1, "A fox, red", hash_1), image(2, "a fox: RED!", hash_1), image(3, "a hen", hash_1)]
    )
    second = draft(12, images=[image(4, "a fox, red", hash_2), image(5, "a fox red", hash_1)])
    rows, funnel = rows_of([first, second])
    assert [(row["version_id"], row["image_id"]) for row in rows] == [(11, "1"), (11, "3"), (12, "4")]
    assert [row["gallery_version_id"] for row in rows] == [11, 11, 12]
    assert funnel["images"] == {
        "in": 5,
        "removed": {"duplicate": 2},
        "out": 3,
        "examples": {"duplicate": ["image 2: 'a fox: RED!'", "image 5: 'a fox red'"]},
    }


def test_an_image_gives_one_row_whatever_it_says_the_second_time():
    images = [image(1, "a fox", f"{11:010X}"), image(1, "a hen", f"{11:010X}")]
    rows, funnel = rows_of([draft(11, images=images)])
    assert [row["prompt"] for row in rows] == ["a fox"]
    assert funnel["images"]["removed"] == {"duplicate": 1}


def test_versions_below_quality_give_no_rows_but_serve_as_bases():
    lora_image = image(1, "a fox", f"{11:010X}", loras=[("stem_21", 0.5, None)])
    drafts = [
        draft(11, stats={"downloads": 99, "ratings": None, "rating": None, "likes": None},
              images=[image(2, "a hen", f"{11:010X}")]),
        draft(21, type="LoRA", images=[lora_image]),
    ]  # fmt: skip
    rows, funnel = rows_of(drafts)
    assert [(row["version_id"], row["base_version_id"], row["lora_weight"]) for row in rows] == [(21, 11, 0.5)]
    assert funnel["versions"]["removed"] == {"few_downloads": 1}
    assert funnel["images"]["removed"] == {"below_quality": 1}


def test_the_download_floor_is_a_quantile_per_architecture():
    drafts = [draft(n, stats={"downloads": n}) for n in range(1, 12)]
    drafts += [draft(n, base_model="SDXL 1.0", stats={"downloads": None}) for n in (20, 21)]
    assert assemble.download_floor([part(*drafts)], 0.0) == {"SD 1.5": 1, "SDXL 1.0": 0}
    assert assemble.download_floor([part(*drafts)], 0.5)["SD 1.5"] == 6
    assert assemble.download_floor([part(*drafts)], 1.0)["SD 1.5"] == 11


def test_rows_are_spooled_as_they_are(tmp_path):
    rows, _ = rows_of([draft(11, images=[image(n, f"fox {n} 狐", f"{11:010X}") for n in range(9)])])
    usage = assemble.write_rows(rows, tmp_path / "rows.jsonl", config(sample_prompts=2))
    assert list(assemble.read_rows(tmp_path / "rows.jsonl")) == json.loads(json.dumps(rows))
    assert usage[11].rows == 9 and usage[11].prompts == ["fox 0 狐", "fox 1 狐"]


# Names


def test_equal_names_carry_the_version_id_but_for_the_oldest():
    drafts = [draft(30, "FOX", "V1"), draft(10), draft(20), draft(40, "Fox", ""), draft(50, "Fox", "v2")]
    assert assemble.unique_names(drafts) == {
        10: "Fox - v1",
        20: "Fox - v1 (20)",
        30: "FOX - V1 (30)",
        40: "Fox",
        50: "Fox - v2",
    }


def test_a_name_that_looks_numbered_is_still_unique():
    drafts = [draft(5, "Fox (7)", ""), draft(6, "Fox", ""), draft(7, "Fox", ""), draft(8, "Fox (7) (7)", "")]
    names = assemble.unique_names(drafts)
    assert names == {5: "Fox (7)", 6: "Fox", 7: "Fox (7) (7)", 8: "Fox (7) (7) (8)"}


def test_long_equal_names_keep_within_the_limit():
    ids = [1, 1_234_567, 2**62]
    names = assemble.unique_names([draft(i, "x" * 100, "y" * 50) for i in ids])
    assert len(set(names.values())) == 3
    assert [name_problem(name) for name in names.values()] == [None] * 3
    assert all(name.endswith(f" ({i})") and len(name) <= MAX_NAME_LENGTH for i, name in list(names.items())[1:])


def test_names_do_not_depend_on_the_order_of_the_source():
    drafts = [draft(n, random.Random(n).choice(["Fox", "Owl"])) for n in range(10, 40)]
    expected = assemble.unique_names(drafts)
    random.Random(0).shuffle(drafts)
    assert assemble.unique_names(drafts) == expected


# The catalogue


def usage_of(*rows):
    usage = assemble.Usage()
    for row in rows:
        usage.add(image(1, "a fox") | {"base_version_id": None, "lora_weight": None} | row, max_prompts=3)
    return usage


def test_defaults_are_the_most_frequent_values_each():
    usage = usage_of(
        {"width": 768, "sampler": "DDIM", "steps": 30, "cfg_scale": 5.0},
        {"width": 768, "sampler": "DDIM", "steps": 40, "cfg_scale": 7.0},
        {"width": 512, "sampler": "Euler", "steps": 40, "cfg_scale": 9.0},
    )
    # Of three cfg scales used once each, the smallest.
    assert assemble.default_parameters("SD 1.5", usage) == {
        "width": 768,
        "height": 512,
        "sampling method": "DDIM",
        "sampling steps": 40,
        "cfg scale": 5.0,
    }


@pytest.mark.parametrize(("base_model", "side"), [("SD 1.5", 512), ("SDXL 1.0", 1024)])
def test_defaults_without_images_are_the_architectures(base_model, side):
    for usage in (None, assemble.Usage()):
        found = assemble.default_parameters(base_model, usage)
        assert (found["width"], found["height"]) == (side, side)
        assert (found["sampling method"], found["sampling steps"], found["cfg scale"]) == ("Euler a", 20, 7.0)


def test_a_lora_gets_its_most_used_base_and_its_median_weight():
    usage = usage_of(
        *({"base_version_id": base, "lora_weight": weight}
          for base, weight in [(12, 0.4), (11, 0.6), (12, 0.9), (11, None), (10, 0.7)])
    )  # fmt: skip
    assert assemble.base_of(usage) == 11  # as often as 12, and older
    assert assemble.catalogue_versions({21: usage, 11: usage_of({})}) == {11, 21}
    names = {21: "Fox - v1", 11: "Dream - v1"}
    entry = assemble.catalogue_entry(draft(21, type="LoRA"), names, usage, FOXES)
    assert entry.base_checkpoint == "Dream - v1"
    assert entry.lora_weight == 0.65  # of 0.4, 0.6, 0.7, 0.9
    assert entry.trigger_words == ["foxy red"]
    assert entry.stats == {"downloads": 500.0, "likes": 3.0}


def test_a_lora_whose_images_name_no_weight_has_one():
    usage = usage_of({"base_version_id": 11})
    entry = assemble.catalogue_entry(draft(21, type="LoRA"), {21: "Fox", 11: "Dream"}, usage, FOXES)
    assert entry.lora_weight == 1.0


def test_drafts_of_the_catalogue_come_once_and_without_images():
    parts = [part(draft(11), draft(12)), part(draft(11, model_name="Copy"), draft(13))]
    found = list(assemble.catalogue_drafts(parts, {11, 13}))
    assert [(d["version_id"], d["model_name"]) for d in found] == [(11, "Fox"), (13, "Fox")]
    assert all("images" not in d for d in found)


def test_a_row_is_a_valid_call_with_its_provenance():
    [entry] = [assemble.catalogue_entry(draft(11), {11: "Fox - v1"}, None, FOXES)]
    made = image(5, "a fox", negative_prompt="text", width=640, cfg_scale=7.5)
    made |= {"version_id": 11, "base_version_id": None, "lora_weight": None, "gallery_version_id": 12}
    row = assemble.dabench_row(made, entry, "eval")
    assert row["id"] == "11-5" and row["split"] == "eval" and row["base_model"] == "SD 1.5"
    assert row["instruction"] == {"prompt": "a fox", "negative prompt": "text"}
    assert list(row["api"]) == ["model", "type", "base Model", "width", "height", "sampling method", "sampling steps",
                                "cfg scale", "model description"]  # fmt: skip
    assert Catalog([entry]).validate(APICall.from_dict(row["api"])) == []
    assert row["source"] == {"model_id": 1, "version_id": 11, "image_id": "5", "gallery_version_id": 12,
                             "base_version_id": None, "lora_weight": None, "description": "extractive"}  # fmt: skip


def test_each_architecture_is_split_on_its_own(tmp_path):
    drafts = [draft(11), draft(12, base_model="SDXL 1.0")]
    names = assemble.unique_names(drafts)
    catalog = Catalog([assemble.catalogue_entry(d, names, None, FOXES) for d in drafts])
    rows = [image(n, f"fox number {n}") | {"version_id": 11 + n % 2, "base_version_id": None, "lora_weight": None}
            for n in range(400)]  # fmt: skip
    assemble.write_rows(rows, tmp_path / "rows.jsonl", config())
    splits = assemble.split_rows(tmp_path / "rows.jsonl", catalog, config())
    assert len(splits) == 400
    for version in ("11", "12"):
        mine = [name for key, name in splits.items() if key.startswith(version)]
        assert [mine.count(name) for name in ("sft", "rrhf", "eval")] == [160, 20, 20]


def test_outdated_are_all_but_the_newest_versions_of_a_model_and_architecture():
    drafts = [draft(v, model_id=m, base_model=b) for v, m, b in (
        (1, 1, "SD 1.5"), (2, 1, "SD 1.5"), (3, 1, "SD 1.5"), (4, 1, "SDXL 1.0"), (5, 2, "SD 1.5"),
    )]  # fmt: skip
    parts = [part(*drafts[:2]), part(*drafts[2:])]
    assert assemble.outdated_versions(parts, 1) == {1, 2}
    assert assemble.outdated_versions(parts, 2) == {1}
    assert assemble.outdated_versions(parts, 3) == assemble.outdated_versions(parts, None) == frozenset()


def test_outdated_versions_demonstrate_nothing():
    funnel = Funnel()
    index = assemble.index_versions([part(draft(11), draft(12))], config(), {}, funnel, frozenset({11}))
    assert not index.known[11].good and index.known[12].good
    assert funnel.to_dict()["versions"]["removed"] == {"outdated": 1}
