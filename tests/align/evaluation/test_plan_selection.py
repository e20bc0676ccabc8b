"""Models that are chosen without a language model, and their groups."""

from collections import Counter

import pytest

from align.bench.chatgen.schema import chat_text
from align.chats import demonstrations_per_model, load_chats
from align.evaluation.plan_selection import chosen_rows, make_choosers
from align.pairs import DataError
from rollouts.catalog import Catalog


@pytest.fixture(scope="module")
def data(chat_bench):
    return load_chats(chat_bench)


@pytest.fixture(scope="module")
def catalog(chat_bench):
    return Catalog.load(chat_bench / "catalog.jsonl")


def choosers(names, data, catalog, **options):
    default = catalog["Owl Painter - v2"].default_call()
    return list(make_choosers(names, data["train"], catalog, default, **({"encoder": ""} | options)))


def test_what_each_chooses(data, catalog):
    rows = list(data["test"])
    shots = demonstrations_per_model(data["train"])
    default, popular, tfidf = choosers(["default", "popular", "tfidf"], data, catalog)
    of_default = chosen_rows(default, rows, shots, catalog)
    assert [r["steps"]["version"] for r in of_default] == [float(row["model"] == "Owl Painter - v2") for row in rows]
    assert {r["steps"]["version_top5"] for r in of_default} == {0.0, 1.0} and of_default[0]["shots"] == 8
    first = chosen_rows(popular, rows, shots, catalog)
    # Without downloads all are as popular: the first five of the catalogue, for every chat.
    assert sum(r["steps"]["version_top5"] for r in first) == sum(row["model"] in list(catalog)[:5] for row in rows)
    # Every chat but a multimodal one names its animal, which is the model's alone.
    of_tfidf = chosen_rows(tfidf, rows, shots, catalog)
    for row, found in zip(rows, of_tfidf, strict=True):
        assert found["steps"]["version"] == 1.0, (chat_text(row["messages"]), found["plan"])
    assert {r["method"] for r in of_tfidf} == {"TF-IDF nearest neighbour"}


def test_from_prompts_and_by_meaning(data, catalog, minilm):
    pytest.importorskip("sentence_transformers", reason='needs sentence-transformers: pip install "t2i-align[eval]"')
    rows = list(data["test"])[:6]
    names = ["embedding", "tfidf"]
    embedding, tfidf = choosers(names, data, catalog, encoder=minilm, learn_from="prompt")
    for chooser in (embedding, tfidf):
        found = chosen_rows(chooser, rows, Counter(), catalog)
        assert [r["steps"]["version"] for r in found] == [1.0] * 6
    assert len(embedding.ranked(["a whale"], 5)[0]) == 5 and embedding.ranked(["a whale"], 5)[0][0].startswith("Whale")


def test_models_are_ranked_by_their_nearest_prompt(catalog):
    texts = ["red fox", "blue fox", "red fox in snow", "green owl"]
    models = ["Fox Painter - v0", "Whale Painter - v1", "Whale Painter - v1", "Owl Painter - v2"]
    rows = [
        {"model": m, "prompt": t, "messages": [{"role": "user", "content": [{"type": "text", "text": t}]}]}
        for t, m in zip(texts, models, strict=True)
    ]
    (tfidf,) = make_choosers(["tfidf"], rows, catalog, catalog[models[0]].default_call(), encoder="")
    assert tfidf.ranked(["blue fox", "owl", "red fox"], 2) == [
        ["Whale Painter - v1", "Fox Painter - v0"],
        ["Owl Painter - v2", "Fox Painter - v0"],  # equally far: the one that comes first
        ["Fox Painter - v0", "Whale Painter - v1"],
    ]
    assert tfidf.ranked([], 2) == []
    assert [call.model for call in tfidf.answer(["blue fox", "owl"])] == [models[1], models[3]]


def test_no_neighbours(catalog):
    rows = [{"model": "nobody", "prompt": "p", "messages": []}]
    default = catalog["Owl Painter - v2"].default_call()
    with pytest.raises(DataError, match="No training row's model is in the catalogue"):
        list(make_choosers(["tfidf"], rows, catalog, default, encoder=""))
    assert [c.name for c in make_choosers(["default"], rows, catalog, default, encoder="")] == ["default model"]
