"""The pocket world's dump: what was posted, what records say of it, what the DABench builder makes of it, pictures."""

import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean, median

import numpy as np
import pytest
from PIL import Image

from align.bench.infotext import Generation, read_generation
from pocket.catalogue import BY_SLUG, MODELS, catalog_entry, usable_models, version_id
from pocket.drawing import BACKGROUNDS, STYLES, SUBJECTS, is_held_out
from pocket.dump import DumpConfig, generate_models, main, read_weights, write_dump
from pocket.dump_posts import OTHER_SAMPLERS, pictures_of
from pocket.dump_prompts import popular_subjects, prompt_key
from rewards.commandline import ConfigError
from rollouts.api import APICall
from rollouts.catalog import Catalog
from rollouts.rendering import DiffusersRenderer
from rollouts.requests import RenderRequest, RenderSettings, resolve
from rollouts.samplers import normalize_sampler
from rollouts.store import ImageStore
from rollouts.weights import WeightFolder, WeightsError


def keys(text):
    return text.split()


# The site's keys in its order, written down by hand.
MODEL = keys("id name type poi nsfw allowCommercialUse allowDerivatives stats tags description creator modelVersions")
VERSION = keys("id modelId name createdAt updatedAt trainedWords baseModel description stats files images downloadUrl")
FILE = keys("id name sizeKB type metadata pickleScanResult virusScanResult hashes downloadUrl primary")
IMAGE = keys("id url nsfw width height hash postId stats meta")
META = set(keys("prompt negativePrompt sampler steps cfgScale seed Size Model resources")) | {"Model hash"}
POSTED = [model for model in MODELS if model.defect != "nsfw"]


@pytest.fixture(scope="module")
def records(untrained_world):
    return list(generate_models(untrained_world))


@pytest.fixture(scope="module")
def galleries():
    return {model.slug: pictures_of(model, 40) for model in POSTED}


@pytest.fixture(scope="module")
def built(untrained_world, tmp_path_factory):
    """The folder of the DABench that the real builder makes of the dump with its default options."""
    from align.bench.config import DABenchConfig
    from align.bench.dabench import build

    folder = tmp_path_factory.mktemp("built")
    write_dump(folder / "models.jsonl.gz", untrained_world)
    build(DABenchConfig(source=str(folder / "models.jsonl.gz"), output=str(folder / "dabench"), plots=False))
    return folder / "dabench"


def images_of(records):
    return [
        (model, image)
        for model, record in zip(MODELS, records, strict=True)
        for image in record["modelVersions"][0]["images"]
    ]


# What was posted


def test_settings_follow_habits_but_for_one_picture_in_eight(galleries):
    for model in POSTED:
        odd = Counter()
        for picture in galleries[model.slug]:
            settings, habits = picture.settings, model.habits
            odd["steps"] += settings.steps not in habits.steps
            odd["cfg"] += settings.cfg not in habits.cfg
            odd["sampler"] += settings.sampler not in habits.samplers
        # five of forty; some habits have 50 steps or low cfg themselves
        assert 3 <= odd.total() <= 5, (model.slug, odd)
    every = [picture.settings for pictures in galleries.values() for picture in pictures]
    # each kind once per model with 40 pictures
    assert sum(settings.cfg == 15 for settings in every) == len(POSTED)
    assert sum(settings.steps == 4 for settings in every) == len(POSTED)
    assert sum(settings.sampler in OTHER_SAMPLERS for settings in every) == len(POSTED)
    assert all(normalize_sampler(sampler) == sampler for sampler in OTHER_SAMPLERS)


@pytest.mark.parametrize("count", [10, 40, 97])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_habit_is_the_most_frequent_one(count, seed):
    for model in usable_models():
        pictures = pictures_of(model, count, seed)
        assert len(pictures) == count
        first = (model.habits.samplers[0], model.habits.steps[0], model.habits.cfg[0])
        for i, name in enumerate(("sampler", "steps", "cfg")):
            counted = Counter(getattr(picture.settings, name) for picture in pictures)
            assert counted[first[i]] == max(counted.values()), (model.slug, name, counted)


def test_pictures_of_a_post_share_their_settings(galleries):
    for pictures in galleries.values():
        posts = {}
        for picture in pictures:
            assert posts.setdefault(picture.post_id, picture.settings) == picture.settings
        assert 12 <= len(posts) <= 30


def test_sizes_are_the_architectures(galleries):
    sd = Counter(p.settings.size for m in POSTED if m.base_model == "SD 1.5" for p in galleries[m.slug])
    assert set(sd) == {(512, 512), (512, 768)}
    assert 0.75 < sd[512, 512] / sd.total() < 0.85
    assert {p.settings.size for m in POSTED if m.base_model == "SDXL 1.0" for p in galleries[m.slug]} == {(1024, 1024)}


def test_loras_are_used_mostly_with_their_base_and_at_full_weight(galleries):
    for model in POSTED:
        bases = Counter(picture.settings.base for picture in galleries[model.slug])
        if model.base is None:
            assert bases == {model.slug: 40}
            assert all(picture.settings.weight is None for picture in galleries[model.slug])
            continue
        assert bases.most_common(1)[0][0] == model.base
        assert all(BY_SLUG[slug].base_model == model.base_model and not BY_SLUG[slug].base for slug in bases)
        assert median(picture.settings.weight for picture in galleries[model.slug]) == model.weight


def test_nothing_that_is_held_out_is_posted(galleries):
    scenes = [picture.scene for pictures in galleries.values() for picture in pictures]
    assert len(scenes) == 800 and not any(map(is_held_out, scenes))


def test_prompts_say_what_is_in_the_picture(galleries):
    pictures = [picture for pictures in galleries.values() for picture in pictures]
    for picture in pictures:
        named = [subject for subject in SUBJECTS if subject in re.findall(r"\w+", picture.prompt)]
        assert named == [picture.scene.subject], picture.prompt
    said = Counter()
    for picture in pictures:
        said["color"] += picture.scene.color in picture.prompt
        said["background"] += BACKGROUNDS[picture.scene.background] in picture.prompt
        said["style"] += STYLES[picture.scene.style] in picture.prompt
        said["weight"] += bool(re.search(r"\([\w ]+:\d\.\d\)|\(\([\w ]+\)\)", picture.prompt))
        said["quality"] += "quality" in picture.prompt or "sharp" in picture.prompt
    for name, (low, high) in {
        "color": (0.9, 0.99), "background": (0.9, 0.99), "style": (0.8, 0.97), "weight": (0.05, 0.2),
        "quality": (0.3, 0.5),
    }.items():  # fmt: skip
        assert low < said[name] / len(pictures) < high, (name, said[name])


def test_every_word_is_one_the_models_know():
    from pocket.tokenizer import words

    known = set(words())
    for model in POSTED:
        for picture in pictures_of(model, 100, seed=3):
            text = f"{picture.prompt} {picture.settings.negative_prompt}".lower()
            assert set(re.findall("[a-z]+", text)) <= known, text


def test_models_are_asked_for_their_own_style_and_popular_subjects():
    for model in POSTED:
        scenes = [picture.scene for picture in pictures_of(model, 400)]
        subjects = Counter(scene.subject for scene in scenes)
        assert set(subjects) == set(SUBJECTS)
        if not model.style:
            styles = Counter(scene.style for scene in scenes)
            assert set(styles) == set(STYLES) and max(styles.values()) < 0.3 * 400, model.slug
            continue
        assert sum(scene.style == model.style for scene in scenes) > 0.8 * 400
        # 0.6 on purpose, and a third of the rest by chance
        assert 0.6 < sum(subjects[subject] for subject in popular_subjects(model)) / 400 < 0.85


def test_cat_lovers_ask_for_cats():
    assert popular_subjects(BY_SLUG["cat_lover"]) == ["cat"]
    scenes = [picture.scene for picture in pictures_of(BY_SLUG["cat_lover"], 400)]
    assert 0.55 < sum(scene.subject == "cat" for scene in scenes) / 400 < 0.75
    assert popular_subjects(BY_SLUG["pocket_diffusion"]) == list(SUBJECTS)


def test_repeats_are_rare_and_have_seeds_of_their_own():
    for model in POSTED:
        pictures = pictures_of(model, 100)
        distinct = {prompt_key(picture.prompt) for picture in pictures}
        assert 97 <= len(distinct) <= 99, model.slug  # 2% are repeats
        assert len({picture.seed for picture in pictures}) == 100


def test_galleries_need_no_global_random_state_and_change_with_the_seed():
    model = BY_SLUG["glow_up"]
    random.seed(1)
    first = pictures_of(model, 12, seed=5)
    random.seed(2)
    assert pictures_of(model, 12, seed=5) == first
    other = pictures_of(model, 12, seed=6)
    assert [p.id for p in other] == [p.id for p in first] and [p.prompt for p in other] != [p.prompt for p in first]
    assert not {p.seed for p in other} & {p.seed for p in first}


@pytest.mark.parametrize("count", [0, 10_000])
def test_a_number_of_images_out_of_range_is_refused(count, untrained_world):
    with pytest.raises(ValueError, match=f"between 1 and 9999, but got {count}"):
        pictures_of(MODELS[0], count)
    with pytest.raises(ValueError, match=f"`images_per_model` must be between 1 and 9999, but got {count}"):
        DumpConfig(world="w", output="o", images_per_model=count)


# Records


def test_records_have_the_sites_keys(records):
    assert [(r["id"], r["name"]) for r in records] == [(version_id(m) - 1000, m.name) for m in MODELS]
    for model, record in zip(MODELS, records, strict=True):
        version = record["modelVersions"][0]
        assert len(record["modelVersions"]) == 1 and version["id"] == version_id(model)
        assert (record["type"], version["baseModel"]) == ("LORA" if model.base else "Checkpoint", model.base_model)
        if model.defect == "nsfw":
            assert record["nsfw"] is True and version["files"] == version["images"] == []
            continue
        assert list(record) == MODEL and list(version) == VERSION and record["nsfw"] is False
        assert record["stats"]["downloadCount"] == version["stats"]["downloadCount"] == model.downloads
        assert record["stats"]["thumbsUpCount"] == model.thumbs_up and record["stats"]["rating"] == model.rating
        assert version["trainedWords"] == list(model.trigger_words) and record["description"] == model.card
        (file,) = version["files"]
        assert list(file) == FILE
        assert (file["pickleScanResult"], file["virusScanResult"]) == ("Success", "Success")
        assert len(version["images"]) == 40
        for image in version["images"]:
            assert list(image) == IMAGE
            assert META <= set(image["meta"]) <= META | {"hashes", "Version", "Schedule type"}
            assert image["url"] == f"images/{image['id']}.png"
            assert image["meta"]["Size"] == f"{image['width']}x{image['height']}"


def test_hashes_are_those_of_the_files(records, untrained_world):
    for model, record in zip(MODELS, records, strict=True):
        if model.defect in ("nsfw", "missing_file"):
            continue
        path = untrained_world / model.uri
        parts = [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))
        digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
        expected = digests[0] if path.is_file() else hashlib.sha256("".join(digests).encode()).hexdigest()
        file = record["modelVersions"][0]["files"][0]
        assert file["hashes"]["SHA256"] == expected.upper()
        assert file["hashes"]["AutoV2"] == expected.upper()[:10]
        assert file["sizeKB"] * 1024 == sum(part.stat().st_size for part in parts)
        assert file["downloadUrl"] == model.uri


def test_old_hash_is_of_64_kb_after_the_first_megabyte(tmp_path):
    model = BY_SLUG["comic_ink"]
    content = random.Random(0).randbytes(2**20 + 2**16 + 5)
    (tmp_path / "loras").mkdir()
    (tmp_path / model.uri).write_bytes(content)
    expected = hashlib.sha256(content[1_048_576 : 1_048_576 + 65_536]).hexdigest()[:8].upper()
    assert read_weights(tmp_path, model).auto_v1 == expected
    (tmp_path / model.uri).write_bytes(content[:1000])
    assert read_weights(tmp_path, model).auto_v1 == "E3B0C442"  # SHA-256 of nothing


def test_old_hash_of_a_folder_runs_over_all_its_files(tmp_path):
    model = BY_SLUG["pixel_wave"]
    first, second = random.Random(1).randbytes(2**20 - 100), random.Random(2).randbytes(2**17)
    for name, content in (("text_encoder", first), ("unet", second)):
        (tmp_path / model.uri / name).mkdir(parents=True)
        (tmp_path / model.uri / name / "w.safetensors").write_bytes(content)
    expected = hashlib.sha256((first + second)[2**20 : 2**20 + 2**16]).hexdigest()[:8].upper()
    assert read_weights(tmp_path, model).auto_v1 == expected


def test_a_file_that_is_missing_has_hashes_nevertheless(tmp_path, records):
    known = read_weights(tmp_path, BY_SLUG["lost_mosaic"])
    assert re.fullmatch("[0-9A-F]{64}", known.sha256) and re.fullmatch("[0-9A-F]{8}", known.auto_v1)
    others = [r["modelVersions"][0]["files"][0]["hashes"]["SHA256"] for r in records if not r["nsfw"]]
    assert Counter(others)[known.sha256] == 1


def test_a_world_without_weights_is_named(tmp_path):
    with pytest.raises(ConfigError, match="has no weights of Pocket Diffusion at checkpoints/pocket_diffusion"):
        write_dump(tmp_path / "models.jsonl.gz", tmp_path)
    assert not list(tmp_path.iterdir())


def test_data_of_an_image_say_what_was_posted(records, galleries):
    """Read back with the builder's own reader, which knows nothing of the plan."""
    for model, image in images_of(records):
        picture = next(p for p in galleries[model.slug] if p.id == image["id"])
        found = read_generation(image["meta"], keep_attention=True)
        assert isinstance(found, Generation)
        settings = picture.settings
        assert found.prompt == picture.prompt and found.negative_prompt == settings.negative_prompt
        assert (found.sampler, found.steps, found.cfg_scale) == (settings.sampler, settings.steps, settings.cfg)
        assert (found.width, found.height) == settings.size and image["meta"]["seed"] == picture.seed
        assert [lora.weight for lora in found.loras] == ([] if settings.weight is None else [settings.weight])


def test_a_few_images_name_their_checkpoint_by_its_old_hash(records):
    lengths = Counter(len(image["meta"]["Model hash"]) for _, image in images_of(records))
    assert set(lengths) == {8, 10} and 0.02 < lengths[8] / lengths.total() < 0.09


def test_likes_follow_popularity_and_a_little_care(records):
    likes = {"careful": [], "careless": []}
    means = []
    for model, record in zip(MODELS, records, strict=True):
        images = record["modelVersions"][0]["images"]
        for image in images:
            careless = image["meta"]["steps"] == 4 or image["meta"]["cfgScale"] == 15
            # per root of downloads, so that models can be compared
            likes["careless" if careless else "careful"].append(image["stats"]["likeCount"] / model.downloads**0.5)
        if images:
            means.append((model.downloads, fmean(image["stats"]["likeCount"] for image in images)))
    ranks = [np.argsort(np.argsort(column)) for column in np.array(means).T]
    assert np.corrcoef(ranks)[0, 1] > 0.9  # Spearman's
    assert 0.4 < fmean(likes["careless"]) / fmean(likes["careful"]) < 0.95


def test_same_arguments_same_bytes(untrained_world, tmp_path):
    assert write_dump(tmp_path / "a.gz", untrained_world, 6, seed=4) == {"models": 21, "images": 120}
    write_dump(tmp_path / "b.gz", untrained_world, 6, seed=4)
    write_dump(tmp_path / "c.gz", untrained_world, 6, seed=5)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) != gzip.decompress((tmp_path / "c.gz").read_bytes())


# What the DABench builder makes of it


def test_builder_keeps_all_models_but_the_withheld_one(built):
    catalog = Catalog.load(built / "catalog.jsonl")
    assert set(catalog) == {model.catalog_name for model in POSTED}
    funnel = json.loads((built / "funnel.json").read_text())["funnel"]
    assert funnel["models"]["removed"] == {"model_nsfw": 1} and funnel["versions"]["removed"] == {}
    assert set(funnel["images"]["removed"]) == {"duplicate"}
    assert funnel["images"]["removed"]["duplicate"] <= 20  # one planned repeat per model


def test_built_catalogue_is_the_worlds(built):
    catalog = Catalog.load(built / "catalog.jsonl")
    for model in POSTED:
        found, known = catalog[model.catalog_name], catalog_entry(model, "0" * 64, 1)
        for name in ("version_id", "model_id", "type", "base_model", "base_checkpoint", "trigger_words"):
            assert getattr(found, name) == getattr(known, name), (model.slug, name)
        # most frequent values, and the median of the weights
        assert found.default_parameters == known.default_parameters, model.slug
        assert found.lora_weight == known.lora_weight
        assert found.stats["downloads"] == model.downloads and found.stats["likes"] == model.thumbs_up


def test_weights_of_the_built_catalogue_are_found_and_verified(built, untrained_world):
    catalog, folder = Catalog.load(built / "catalog.jsonl"), WeightFolder(untrained_world)
    for model in POSTED:
        if model.defect != "missing_file":
            assert folder.find(catalog[model.catalog_name]) == untrained_world / model.uri
    with pytest.raises(WeightsError) as error:
        folder.find(catalog[BY_SLUG["lost_mosaic"].catalog_name])
    assert error.value.reason == "missing_file"


def test_rows_are_split_and_belong_to_their_models(built, galleries):
    from datasets import load_from_disk

    planned = {picture.id: (model, picture) for model in POSTED for picture in galleries[model.slug]}
    num_rows = 0
    for slug in ("sd15", "sdxl"):
        data = load_from_disk(str(built / slug))
        total = sum(len(data[name]) for name in data)
        assert len(data["sft"]) / total == pytest.approx(0.8, abs=0.01)
        assert len(data["eval"]) == pytest.approx(0.1 * total, abs=2)
        num_rows += total
        for row in (row for name in data for row in data[name]):
            model, picture = planned[int(row["source"]["image_id"])]
            assert row["api"]["model"] == model.catalog_name
            assert row["api"]["sampling method"] == picture.settings.sampler
            assert row["api"]["cfg scale"] == picture.settings.cfg
            if model.base:
                assert row["source"]["base_version_id"] == version_id(BY_SLUG[picture.settings.base])
                assert row["source"]["lora_weight"] == picture.settings.weight
    assert 780 <= num_rows < 800


# Pictures


@pytest.fixture(scope="module")
def drawn(untrained_world, tmp_path_factory):
    """The folder of a dump with one picture per model, and the summary."""
    output = tmp_path_factory.mktemp("drawn")
    return output, main(DumpConfig(world=str(untrained_world), output=str(output), images_per_model=1))


def read_records(output):
    return [json.loads(line) for line in gzip.decompress((output / "models.jsonl.gz").read_bytes()).splitlines()]


def drawable(output):
    return [(model, image) for model, image in images_of(read_records(output)) if not model.defect]


def test_all_models_but_the_broken_ones_draw_their_pictures(drawn):
    output, summary = drawn
    expected = {output / image["url"] for _, image in drawable(output)}
    assert set((output / "images").iterdir()) == expected and len(expected) == 18
    assert summary == {"models": 21, "images": 20, "drawn": 18, "failed": 2}
    for model, image in drawable(output):
        with Image.open(output / image["url"]) as picture:
            # 64 pixels for 512 or 1024
            scale = 8 if model.base_model == "SD 1.5" else 16
            assert picture.size == (image["width"] // scale, image["height"] // scale)
            assert np.asarray(picture).std() > 5


@pytest.mark.parametrize("slug", ["pixel_wave", "watercolor_wash", "xl_aqua"])
def test_a_picture_is_drawn_from_its_data(slug, drawn, untrained_world):
    """The same picture once more, by the renderer itself from the records alone."""
    output, _ = drawn
    files = [(m, r["modelVersions"][0]["files"][0]) for m, r in zip(MODELS, read_records(output), strict=True)
             if m.defect != "nsfw"]  # fmt: skip
    by_stem = {file["name"].removesuffix(".safetensors"): (model, file["hashes"]["SHA256"]) for model, file in files}
    model, image = next(pair for pair in drawable(output) if pair[0].slug == slug)
    meta, found = image["meta"], read_generation(image["meta"], keep_attention=True)
    checkpoint = catalog_entry(*by_stem[meta["Model"]], 1)
    entries = [checkpoint]
    for lora in found.loras:
        changes = {"base_checkpoint": checkpoint.name, "lora_weight": lora.weight}
        entries.append(catalog_entry(*by_stem[lora.name], 1).model_copy(update=changes))
    assert entries[-1].name == model.catalog_name
    catalog = Catalog(entries)
    parameters = {
        "width": found.width, "height": found.height, "sampling method": found.sampler,
        "sampling steps": found.steps, "cfg scale": found.cfg_scale,
    }  # fmt: skip
    call = APICall.from_dict(entries[-1].default_call().to_dict() | parameters)
    request = RenderRequest(call, found.prompt, found.negative_prompt, meta["seed"])
    settings = RenderSettings(batch_size=2, pad_batches=True, native_side=64, trigger_words="none")
    renderer = DiffusersRenderer(catalog, WeightFolder(untrained_world), settings)
    (result,) = renderer.render([resolve(request, catalog, settings)])
    renderer.close()
    assert result.image is not None, result.failure
    with Image.open(output / image["url"]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(result.image))


def test_dump_is_the_same_with_and_without_pictures(drawn, untrained_world, tmp_path):
    config = DumpConfig(world=str(untrained_world), output=str(tmp_path), images_per_model=1, pictures=False)
    assert main(config) == {"models": 21, "images": 20}
    assert [path.name for path in tmp_path.iterdir()] == ["models.jsonl.gz"]
    assert (tmp_path / "models.jsonl.gz").read_bytes() == (drawn[0] / "models.jsonl.gz").read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_draws_the_same(drawn, untrained_world, tmp_path):
    command = [sys.executable, "-m", "pocket.dump", "--world", str(untrained_world), "--output", str(tmp_path)]
    process = subprocess.Popen([*command, "--images_per_model", "1"], stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / ".work" / "store", time.monotonic() + 120
    while len(list(folder.glob("images/*/*.png"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    with ImageStore(folder) as store:
        before = {row.key: row.created for row in store.everything() if row.failure is None}
    assert 0 < len(before) < 18 and not (tmp_path / "images").exists()

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7.png").write_bytes(b"of another dump")
    main(DumpConfig(world=str(untrained_world), output=str(tmp_path), images_per_model=1))
    with ImageStore(folder) as store:
        after = {row.key: row.created for row in store.everything()}
    assert before.items() <= after.items()  # none of them was drawn again
    expected = {path.name: path.read_bytes() for path in (drawn[0] / "images").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()} == expected


def test_an_output_that_is_a_file_is_refused(untrained_world, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken is a file; name a folder"):
        main(DumpConfig(world=str(untrained_world), output=str(tmp_path / "taken")))


def test_command_line_names_what_the_world_lacks(tmp_path):
    command = [sys.executable, "-m", "pocket.dump", "--world", str(tmp_path / "none"), "--output", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert "has no weights of Pocket Diffusion" in done.stderr and "Traceback" not in done.stderr
