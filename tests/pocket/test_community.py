"""The synthetic community: schema, determinism, and every planned oddity found again by reading the records alone."""

import gzip
import itertools
import json
import math
import re
import subprocess
import sys
import zlib
from collections import Counter

import pytest

from pocket.community import expected_noise, generate_models, main, write_dump
from pocket.vocabulary import ROLES


def keys(text):
    return text.split()


# The keys of the site's records in its order, written down by hand; models flagged NSFW are stubs.
MODEL = keys("id name type poi nsfw allowCommercialUse allowDerivatives stats tags description creator modelVersions")
MODEL_STUB = keys("id name type nsfw poi tags description stats modelVersions")
VERSION = keys("id modelId name createdAt updatedAt trainedWords baseModel description stats files images downloadUrl")
VERSION_STUB = keys("id modelId name baseModel stats files images")
FILE = keys("id name sizeKB type metadata pickleScanResult virusScanResult hashes downloadUrl")
IMAGE = keys("id url nsfw width height hash meta")
IMAGE_STUB = keys("id nsfw width height hash url meta")
META = {"prompt", "negativePrompt", "sampler", "steps", "cfgScale", "seed", "Size", "Model", "Model hash", "hashes"}
META |= {"resources", "Clip skip", "Denoising strength", "Hires upscale", "Hires upscaler", "Hires steps", "ENSD"}
META |= {"Version", "Schedule type"}
# Every sampler name that the webui itself writes.
WEBUI_SAMPLERS = {
    "Euler a",
    "Euler",
    "LMS",
    "Heun",
    "DPM2",
    "DPM2 a",
    "DPM++ 2S a",
    "DPM++ 2M",
    "DPM++ SDE",
    "DPM++ 2M SDE",
}
WEBUI_SAMPLERS |= {f"{name} Karras" for name in WEBUI_SAMPLERS if name.startswith(("LMS", "DPM"))} | {"DDIM", "UniPC"}


@pytest.fixture(scope="module")
def models():
    return list(generate_models())


@pytest.fixture(scope="module")
def noise():
    return expected_noise()


def usable(model):
    """What the availability rules leave over, judged from the record alone."""
    if model["nsfw"] or model["type"] not in ("Checkpoint", "LORA"):
        return False
    version = model["modelVersions"][0]
    primary = next((file for file in version["files"] if file.get("primary")), None)
    return (
        version["baseModel"] in ("SD 1.5", "SDXL 1.0")
        and primary is not None
        and primary["metadata"]["format"] == "SafeTensor"
        and "SHA256" in primary["hashes"]
        and primary["pickleScanResult"] == "Success"
    )


def visible_images(models, kind=None):
    """(model, version, meta) of the usable models' images that say how they were made."""
    return [
        (model, version, image["meta"])
        for model in models
        if usable(model) and kind in (None, model["type"])
        for version in model["modelVersions"]
        for image in version["images"]
        if image["meta"] and "Model hash" in image["meta"]
    ]


def owners_by_hash(models):
    """Lower-case AutoV1 and AutoV2 -> (model, version) over all files of the dump."""
    return {
        file["hashes"][name].lower(): (model, version)
        for model in models
        for version in model["modelVersions"]
        for file in version["files"]
        for name in ("AutoV1", "AutoV2")
        if name in file["hashes"]
    }


def prompt_words(meta):
    return re.findall(r"\w+", re.sub(r"<[^>]*>", " ", meta["prompt"]).lower())


def test_models_versions_and_files_have_the_keys_of_the_site(models):
    for model in models:
        assert list(model) == (MODEL_STUB if model["nsfw"] else MODEL)
        assert set(model["stats"]) == {"downloadCount", "favoriteCount", "commentCount", "ratingCount", "rating"}
        for version in model["modelVersions"]:
            assert list(version) == (VERSION_STUB if model["nsfw"] else VERSION)
            assert version["modelId"] == model["id"]
            assert set(version["stats"]) == {"downloadCount", "ratingCount", "rating"}
            for file in version["files"]:
                assert list(file) in (FILE, [*FILE, "primary"])
                assert set(file["metadata"]) == {"fp", "size", "format"}
                assert isinstance(file["sizeKB"], float)


def test_images_have_the_keys_of_the_site(models):
    images = [image for model in models for version in model["modelVersions"] for image in version["images"]]
    for image in images:
        assert list(image) == (IMAGE if image["nsfw"] == "None" else IMAGE_STUB)
        if image["nsfw"] != "None":
            assert (image["meta"], image["url"], image["hash"]) == (None, None, None)
        meta = image["meta"] or {}
        assert set(meta) <= META
        if "Model hash" in meta:
            assert meta["resources"][-1]["hash"] == meta["Model hash"] and meta["resources"][-1]["type"] == "model"
            assert meta.get("hashes", {"model": meta["Model hash"]}) == {"model": meta["Model hash"]}
    assert set().union(*(image["meta"] or {} for image in images)) == META


def test_ids_are_unique(models):
    versions = [version for model in models for version in model["modelVersions"]]
    for records in (
        models,
        versions,
        [file for version in versions for file in version["files"]],
        [image for version in versions for image in version["images"]],
    ):
        assert len({record["id"] for record in records}) == len(records)


def test_same_seed_same_bytes_also_in_another_process(tmp_path):
    write_dump(tmp_path / "a.jsonl.gz", 14, 5, seed=3)
    write_dump(tmp_path / "other.jsonl.gz", 14, 5, seed=4)
    command = [sys.executable, "-m", "pocket.community", "--output", tmp_path / "b.jsonl.gz"]
    subprocess.run([*command, "--num_models", "14", "--images_per_version", "5", "--seed", "3"], check=True)
    first, again, other = ((tmp_path / f"{name}.jsonl.gz").read_bytes() for name in ("a", "b", "other"))
    assert first == again
    assert first != other
    assert first[4:8] == bytes(4)  # the time field of the gzip header


def test_plain_and_gzipped_dump_hold_the_same_lines_and_replace_what_was_there(tmp_path):
    (tmp_path / "a.jsonl").write_text("old")
    counts = write_dump(tmp_path / "a.jsonl", 14, 5)
    write_dump(tmp_path / "new" / "a.jsonl.gz", 14, 5)
    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert gzip.decompress((tmp_path / "new" / "a.jsonl.gz").read_bytes()).decode() == text
    assert [json.loads(line) for line in text.splitlines()] == list(generate_models(14, 5))
    assert counts["models"] == 14 == len(text.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "new"]


def test_command_line_prints_one_line(tmp_path, capsys):
    main(["--output", str(tmp_path / "c.jsonl"), "--num_models", "12", "--images_per_version", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Wrote 12 models, ")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_models": 11}, "`num_models` must be at least 12, one per role, but got 11"),
        ({"images_per_version": 0}, "`images_per_version` must be at least 1, but got 0"),
        ({"path": "dump.json"}, r"must end in .jsonl or .jsonl.gz, but got .*dump\.json'"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_file(tmp_path, capsys, arguments, match):
    arguments = dict(arguments)
    path = tmp_path / arguments.pop("path", "dump.jsonl")
    with pytest.raises(ValueError, match=match):
        write_dump(path, **arguments)
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(path), *(f"--{name}={value}" for name, value in arguments.items())])
    assert re.search(match, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_hashes_are_consistent_and_unique(models):
    files = [file for model in models for version in model["modelVersions"] for file in version["files"]]
    hashed = [file["hashes"] for file in files if file["hashes"]]
    lengths = {"AutoV1": 8, "AutoV2": 10, "SHA256": 64, "CRC32": 8, "BLAKE3": 64}
    for hashes in hashed:
        assert {name: len(value) for name, value in hashes.items()} == lengths
        assert all(re.fullmatch("[0-9A-F]+", value) for value in hashes.values())
        assert hashes["AutoV2"] == hashes["SHA256"][:10]
        assert int(hashes["CRC32"], 16) == zlib.crc32(hashes["SHA256"].lower().encode())
    for name in ("AutoV1", "AutoV2", "SHA256"):
        assert len({hashes[name] for hashes in hashed}) == len(hashed)


def test_default_size_and_totals(models, noise):
    assert noise["models"] == len(models) == 60
    assert noise["versions"] == sum(len(model["modelVersions"]) for model in models)
    num_images = sum(len(version["images"]) for model in models for version in model["modelVersions"])
    assert noise["images"] == num_images
    assert 1500 <= num_images <= 2500
    kinds = Counter((model["type"], model["modelVersions"][0]["baseModel"]) for model in models if usable(model))
    expected = {("Checkpoint", "SD 1.5"): 13, ("LORA", "SD 1.5"): 22, ("Checkpoint", "SDXL 1.0"): 4}
    assert kinds == expected | {("LORA", "SDXL 1.0"): 5}


def test_noise_models(models, noise):
    def count(rule):
        return sum(any(map(rule, model["modelVersions"])) for model in models if not model["nsfw"])

    def file_rule(rule):
        return lambda version: any(rule(file) for file in version["files"] if file.get("primary"))

    stubs = [model for model in models if model["nsfw"]]
    assert all(re.fullmatch(r"withheld-\d+", model["name"]) for model in stubs)
    assert not any(version["files"] or version["images"] for model in stubs for version in model["modelVersions"])
    types = Counter(model["type"] for model in models)
    found = {
        "nsfw_stub": len(stubs),
        "textual_inversion": types["TextualInversion"],
        "controlnet": types["Controlnet"],
        "base_sd21": count(lambda version: version["baseModel"] == "SD 2.1 768"),
        "base_other": count(lambda version: version["baseModel"] == "Other"),
        "pickle_only": count(file_rule(lambda file: file["metadata"]["format"] == "PickleTensor")),
        "missing_hashes": count(file_rule(lambda file: not file["hashes"])),
        "failed_scan": count(file_rule(lambda file: file["pickleScanResult"] == "Danger")),
    }
    assert found == {name: noise[f"models/{name}"] for name in found}
    # Each is alone: what is left over are exactly the 44 usable models.
    assert sum(found.values()) == 16 == 60 - sum(map(usable, models))


def test_odd_names(models, noise):
    names = Counter(model["name"] for model in models)
    assert sum(n - 1 for n in names.values()) == noise["models/duplicate_name"] == 2
    assert sum(bool(re.search("<(b|script)>", name)) for name in names) == noise["models/html_name"] == 2
    assert sum(".." in name for name in names) == noise["models/path_name"] == 2
    for model in models:
        escapes = [file["name"].startswith("../") for version in model["modelVersions"] for file in version["files"]]
        assert any(escapes) == (".." in model["name"])
        assert "<script" not in (model["description"] or "")


def test_visibility_shares(models, noise):
    images = [i for model in models if usable(model) for version in model["modelVersions"] for i in version["images"]]
    found = Counter()
    for image in images:
        if image["nsfw"] != "None":
            found[f"flagged_{image['nsfw'].lower()}"] += 1
        elif image["meta"] is None:
            found["meta_null"] += 1
        elif set(image["meta"]) == {"prompt", "negativePrompt"}:
            found["prompt_only"] += 1
    assert found == {name: noise[f"images/{name}"] for name in found}
    for name, share in {"flagged_soft": 0.04, "flagged_x": 0.01, "meta_null": 0.05, "prompt_only": 0.02}.items():
        assert found[name] == pytest.approx(share * len(images), abs=1)


def test_format_shares(models, noise):
    found = Counter()
    metas = [meta for _, _, meta in visible_images(models)]
    for meta in metas:
        minor = re.match(r"v1\.(\d+)", meta.get("Version", ""))
        found["split_sampler"] += "Schedule type" in meta
        assert ("Schedule type" in meta) == (minor is not None and int(minor[1]) >= 9)
        found["string_numbers"] += all(isinstance(meta[name], str) for name in ("steps", "cfgScale", "seed"))
        found["missing_size"] += "Size" not in meta
        found["extension_sampler"] += meta["sampler"] not in WEBUI_SAMPLERS
        wild_size = meta.get("Size") in ("16x16", "9999x9999")
        found["absurd"] += wild_size or int(meta["steps"]) in (0, 999) or float(meta["cfgScale"]) == 200
    assert found == {name: noise[f"images/{name}"] for name in found}
    shares = {"split_sampler": 0.10, "string_numbers": 0.04, "missing_size": 0.03, "extension_sampler": 0.03}
    for name, share in (shares | {"absurd": 0.01}).items():
        assert found[name] == pytest.approx(share * len(metas), abs=1)


def test_lora_provenance_and_every_clean_base_resolves(models, noise):
    owners = owners_by_hash(models)
    found = Counter()
    for _, version, meta in visible_images(models, "LORA"):
        tags = re.findall(r"<(\w+):([^:>]+):([\d.]+)>", meta["prompt"])
        stem = re.split(r"[/.]", version["files"][0]["name"])[-2]
        owner, base = owners.get(meta["Model hash"], (None, None))
        if owner is None:
            found["unknown_base"] += 1
        elif not usable(owner):
            found["unavailable_base"] += 1
        elif len(tags) == 2:
            found["two_loras"] += 1
            assert stem in {name for _, name, _ in tags}
        elif not tags:
            found["no_tag"] += 1
            assert meta["resources"][0]["name"] == stem and meta["resources"][0]["weight"] is None
        elif tags[0][0] == "lyco":
            found["lyco"] += 1
        else:
            found["clean"] += 1
            assert tags[0][:2] == ("lora", stem)
            assert meta["resources"][0] == {"name": stem, "type": "lora", "weight": float(tags[0][2])}
        if owner is not None:
            assert (owner["type"], base["baseModel"]) == ("Checkpoint", version["baseModel"])
    total = noise["lora_images"]
    assert found == {name: noise[f"lora_images/{name}"] for name in found} and found.total() == total
    for name, share in {"unknown_base": 0.30, "two_loras": 0.09, "no_tag": 0.05, "lyco": 0.02}.items():
        assert found[name] == pytest.approx(share * total, abs=1)


def test_checkpoint_provenance(models, noise):
    owners = owners_by_hash(models)
    found = Counter()
    for model, version, meta in visible_images(models, "Checkpoint"):
        owner, made_with = owners.get(meta["Model hash"], (None, None))
        if owner is None:
            found["unknown_checkpoint"] += 1
        elif owner is not model:
            found["other_checkpoint"] += 1
        else:
            found["clean" if made_with is version else "other_version"] += 1
    assert found == {name: noise[f"checkpoint_images/{name}"] for name in found}
    total = noise["checkpoint_images"]
    assert found.total() == total
    assert (found["other_checkpoint"] + found["unknown_checkpoint"]) / total == pytest.approx(0.20, abs=0.01)


def test_only_the_planned_prompts_are_repeated(models, noise):
    seen: dict[tuple, list[tuple[int, int]]] = {}
    for model, version, meta in visible_images(models):
        seen.setdefault(tuple(prompt_words(meta)), []).append((model["id"], version["id"]))
    repeats = sum(len(places) - 1 for places in seen.values())
    across = sum(len(set(places)) - 1 for places in seen.values())
    assert repeats == noise["images/repeat"] + noise["images/cross_version_repeat"]
    # A prompt taken over from the newest version may itself be repeated in the older one.
    assert 0 < across <= noise["images/cross_version_repeat"]
    assert all(len({model for model, _ in places}) == 1 for places in seen.values())


def test_most_prompts_have_no_near_duplicate(models, noise):
    prompts = [set(prompt_words(meta)) for _, _, meta in visible_images(models)]
    bit = {word: 1 << i for i, word in enumerate(sorted(set().union(*prompts)))}
    masks = [sum(bit[word] for word in prompt) for prompt in prompts]
    similarities = [0.0] * len(masks)
    for (i, one), (j, other) in itertools.combinations(enumerate(masks), 2):
        jaccard = (one & other).bit_count() / (one | other).bit_count()
        similarities[i] = max(similarities[i], jaccard)
        similarities[j] = max(similarities[j], jaccard)
    assert sum(s < 0.8 for s in similarities) / len(prompts) > 0.85
    assert sum(s < 0.5 for s in similarities) / len(prompts) > 0.80
    # Those that are near are the planned ones: each has at least itself and at most its source besides.
    planned = sum(noise[f"images/{name}"] for name in ("repeat", "near_duplicate", "cross_version_repeat"))
    assert planned <= sum(s >= 0.7 for s in similarities) <= 2 * planned


def test_prompts_use_the_webui_syntax(models):
    prompts = [meta["prompt"] for _, _, meta in visible_images(models)]
    patterns = {r"\(\w[^()]*:1\.[1-4]\)": 0.3, r"\(\(\w[^()]*\)\)": 0.1, r" BREAK ": 0.02, r"\n": 0.02}
    for pattern, at_least in patterns.items():
        assert sum(bool(re.search(pattern, prompt)) for prompt in prompts) / len(prompts) > at_least


def test_prompts_tell_models_apart_but_not_always(models):
    """Naive Bayes on words: far better than chance (1 in 35), and never certain."""
    counts: dict[int, Counter] = {}
    held_out = []
    for model in (m for m in models if usable(m) and m["modelVersions"][0]["baseModel"] == "SD 1.5"):
        for i, (_, _, meta) in enumerate(visible_images([model])):
            if i % 4:
                counts.setdefault(model["id"], Counter()).update(prompt_words(meta))
            else:
                held_out.append((model["id"], set(prompt_words(meta))))
    num_words = len(set().union(*counts.values()))

    def score(model_id, prompt):
        words = counts[model_id]
        return sum(math.log((words[word] + 0.1) / (words.total() + 0.1 * num_words)) for word in prompt)

    right = sum(max(counts, key=lambda m: score(m, prompt)) == model_id for model_id, prompt in held_out)
    assert len(counts) == 35
    assert 0.5 < right / len(held_out) < 0.95


@pytest.mark.parametrize("kind", ["Checkpoint", "LORA"])
@pytest.mark.parametrize("seed", [0, 1])
def test_popularity_does_not_follow_rating(kind, seed):
    community = generate_models(images_per_version=1, seed=seed)
    stats = [model["stats"] for model in community if usable(model) and model["type"] == kind]
    by_rating = sorted(stats, key=lambda s: s["rating"])
    by_downloads = sorted(stats, key=lambda s: s["downloadCount"])
    n = len(stats)
    squares = sum((rank - by_downloads.index(s)) ** 2 for rank, s in enumerate(by_rating))
    assert 1 - 6 * squares / (n**3 - n) < 0.3  # Spearman's correlation
    assert by_rating[-1]["rating"] - by_rating[0]["rating"] > 1
    assert by_downloads[-1]["downloadCount"] > 50 * by_downloads[0]["downloadCount"]


def test_versions_share_the_downloads_of_their_model(models):
    for model in models:
        parts = [version["stats"]["downloadCount"] for version in model["modelVersions"]]
        assert sum(parts) == model["stats"]["downloadCount"]
    assert max(len(model["modelVersions"]) for model in models if model["type"] == "Checkpoint") >= 3


def test_descriptions_are_html_and_some_are_missing(models):
    texts = [model["description"] for model in models if not model["nsfw"]]
    written = [text for text in texts if text]
    assert 0 < len(texts) - len(written) < len(texts) / 2
    assert all(text.startswith("<p><strong>") and text.endswith(("</p>", "</ul>")) for text in written)
    for part in ("&amp;", "&nbsp;", "&ndash;", 'href="https://ko-fi.', "<code>", "<br />"):
        assert any(part in text for text in written)


# With seed 3 an older version begins with a prompt taken over from the newest one.
@pytest.mark.parametrize(
    ("num_models", "images_per_version", "seed"), [(12, 1, 5), (13, 7, 5), (40, 3, 5), (150, 4, 5), (60, 40, 3)]
)
def test_other_sizes_keep_their_promises(num_models, images_per_version, seed):
    models = list(generate_models(num_models, images_per_version, seed))
    noise = expected_noise(num_models, images_per_version, seed)
    assert len(models) == noise["models"] == num_models
    assert {model["type"] for model in models} == {role.type for role in ROLES}
    assert noise["lora_images"] == len(visible_images(models, "LORA"))
    assert noise["checkpoint_images"] == len(visible_images(models, "Checkpoint"))
    owners = owners_by_hash(models)
    unknown = [meta for _, _, meta in visible_images(models) if meta["Model hash"] not in owners]
    planned = ("lora_images/unknown_base", "checkpoint_images/unknown_checkpoint")
    assert len(unknown) == sum(noise.get(name, 0) for name in planned)
