"""The builder on a real Civitai dump; what it promises is checked again from the raw dump, without the builder's code.

Nothing of `align.bench` is imported here. A data set that was built before is checked, all of it, with
`T2I_ALIGN_CHATGENBENCH=folder pytest tests/align/bench/chatgen/test_build_real.py`.
"""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk

DUMP = Path(__file__).parents[5] / "shared" / "data" / "civitai" / "models.jsonl.gz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DUMP.is_file(), reason=f"needs a real Civitai dump at {DUMP}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, minilm):
    """A ChatGenBench of the dump's SD 1.5 models: the popular ones, or the one that was built before."""
    if "T2I_ALIGN_CHATGENBENCH" in os.environ:
        return Path(os.environ["T2I_ALIGN_CHATGENBENCH"])
    folder = tmp_path_factory.mktemp("real")
    options = {
        "source": str(DUMP), "output": str(folder / "bench"), "encoder": minilm, "base_models": ["SD 1.5"],
        "min_downloads": 5000, "chats_per_demonstration": 1, "spacy_pipeline": None,
    }  # fmt: skip
    (folder / "bench.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", "align.bench.chatgen", "--config", str(folder / "bench.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "bench"


@pytest.fixture(scope="module")
def rows(folder):
    return {split: list(part) for split, part in load_from_disk(str(folder / "chats")).items()}


@pytest.fixture(scope="module")
def prompts(folder, rows):
    """Prompt of each demonstration, by model; also of those for which no chat could be written."""
    found, sides = defaultdict(dict), {}
    with (folder / "demonstrations.jsonl").open() as lines:
        for given in map(json.loads, lines):
            found[given["model"]][given["id"]] = given["prompt"]
            sides[given["id"]] = given["split"]
    for row in rows["train"] + rows["test"]:
        demonstration = row["source"]["demonstration"]
        assert found[row["model"]][demonstration] == row["prompt"] and sides[demonstration] == row["split"]
    return found


@pytest.fixture(scope="module")
def tested(folder):
    """Ids of the demonstrations that are for testing; chats could not be written of all."""
    with (folder / "demonstrations.jsonl").open() as lines:
        return {given["id"] for given in map(json.loads, lines) if given["split"] == "test"}


def words(text):
    return frozenset(re.findall(r"\w+", text.lower()))


def test_every_row_is_an_image_of_the_dump_that_anybody_may_see(rows):
    wanted = {row["source"]["image_id"]: row for row in rows["train"] + rows["test"]}
    found = 0
    with gzip.open(DUMP, "rt") as lines:
        models = [json.loads(line) for line in lines]
    for model in models:
        for image in (image for version in model["modelVersions"] for image in version["images"]):
            row = wanted.get(str(image["id"]))
            if row is None or not image["meta"]:
                continue
            found += 1
            assert not model["nsfw"] and image["nsfw"] == "None"
            meta, arguments = image["meta"], row["arguments"]
            assert (arguments["steps"], arguments["cfg_scale"]) == (
                int(float(meta["steps"])), round(float(meta["cfgScale"]), 2)
            )  # fmt: skip
            width, height = map(int, meta["Size"].lower().split("x"))
            assert (arguments["width"], arguments["height"]) == (width // 8 * 8, height // 8 * 8)
            skip = str(meta.get("Clip skip", "")).strip(" ,")
            assert arguments["clip_skip"] == (int(skip) if skip else None)
            assert words(row["prompt"]) <= words(meta["prompt"])
            shown = [part["image"] for m in row["messages"] for part in m["content"] if part["image"]]
            assert all(address.startswith("https://") for address in shown)
    assert found >= len(wanted) > 500


def test_no_demonstration_is_on_both_sides_and_no_tested_prompt_has_a_near_duplicate(rows, prompts):
    sides = {split: {row["source"]["demonstration"] for row in part} for split, part in rows.items()}
    assert not sides["train"] & sides["test"] and sides["test"]
    everything = {prompt for group in prompts.values() for prompt in group.values()}
    sets = {prompt: words(prompt) for prompt in everything}
    tested = sorted({row["prompt"] for row in rows["test"]})
    for prompt in random.Random(0).sample(tested, min(300, len(tested))):
        own = sets[prompt]
        for other, theirs in sets.items():
            assert other == prompt or len(own & theirs) < 0.8 * len(own | theirs), (prompt, other)


def test_tested_are_the_most_distinct_fifth(tested, prompts, minilm):
    bert_score = pytest.importorskip("bert_score", reason="needs the peer: pip install bert-score")
    peer = bert_score.BERTScorer(model_type=minilm, num_layers=6, device="cpu")
    by_words = Counter(words(prompt) for group in prompts.values() for prompt in group.values())
    models = [m for m, group in prompts.items() if 5 <= len(group) <= 12 and tested & set(group)]
    assert len(models) >= 20
    for model in random.Random(0).sample(models, 20):
        group = prompts[model]
        pairs = list(combinations(group, 2))
        nearest = dict.fromkeys(group, -1.0)
        for a, b in pairs:  # one by one: in a batch, the package's scores depend on the others
            f1 = peer.score([group[a]], [group[b]])[2].item()
            nearest[a], nearest[b] = max(nearest[a], f1), max(nearest[b], f1)
        chosen = tested & set(group)
        assert len(chosen) <= int(0.2 * len(group) + 0.5)
        # Whoever was not chosen is nearer to another one, or has a near duplicate somewhere.
        limit = max(nearest[name] for name in chosen)
        for name in set(group) - chosen:
            if nearest[name] < limit - 1e-5:
                own = words(group[name])
                near = [other for other in by_words if len(own & other) >= 0.8 * len(own | other)]
                assert len(near) > 1 or by_words[own] > 1, (model, name)


def test_settings_follow_from_the_number_of_training_demonstrations(folder, rows):
    below = yaml.safe_load((folder / "config.yaml").read_text())["few_shot_below"]
    trained = defaultdict(set)
    for row in rows["train"]:
        trained[row["model"]].add(row["source"]["demonstration"])
    for row in rows["train"] + rows["test"]:
        assert row["setting"] == ("few_shot" if len(trained[row["model"]]) < below else "supervised")
    assert {row["setting"] for row in rows["test"]} == {"few_shot", "supervised"}


def test_the_tables_count_what_is_there(folder, rows):
    summary = json.loads((folder / "funnel.json").read_text())["summary"]
    for split, part in rows.items():
        assert summary["rows"][split] == Counter(row["input_type"] for row in part)
    for setting in ("few_shot", "supervised"):
        part = [row for row in rows["test"] if row["setting"] == setting]
        assert summary["rows"][setting] == Counter(row["input_type"] for row in part)
