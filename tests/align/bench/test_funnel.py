"""Counting what each rule removes."""

import json

from align.bench.funnel import MAX_EXAMPLES, Funnel


def counted():
    """Ten models of which two are NSFW and one is private; five images, all removed."""
    funnel = Funnel()
    funnel.enter("models", 10)
    for name in ("a", "b"):
        funnel.remove("models", "model_nsfw", name)
    funnel.remove("models", "model_private")
    for i in range(5):
        funnel.enter("images")
        funnel.remove("images", "image_nsfw", f"image {i}")
    return funnel


def test_in_minus_removed_is_out():
    assert counted().to_dict() == {
        "models": {
            "in": 10,
            "removed": {"model_nsfw": 2, "model_private": 1},
            "out": 7,
            "examples": {"model_nsfw": ["a", "b"], "model_private": []},
        },
        "images": {
            "in": 5,
            "removed": {"image_nsfw": 5},
            "out": 0,
            "examples": {"image_nsfw": ["image 0", "image 1", "image 2"]},
        },
    }


def test_funnels_add_up():
    total = counted()
    total.merge(counted())
    more = Funnel()
    more.enter("versions", 3)
    more.remove("models", "model_archived", "z")
    total.merge(more)
    found = total.to_dict()
    assert found["models"]["in"] == 20 and found["models"]["out"] == 20 - 4 - 2 - 1
    assert found["models"]["removed"] == {"model_nsfw": 4, "model_private": 2, "model_archived": 1}
    assert found["models"]["examples"]["model_nsfw"] == ["a", "b", "a"]
    assert found["versions"] == {"in": 3, "removed": {}, "out": 3, "examples": {}}
    assert list(found) == ["models", "images", "versions"]


def test_merging_changes_only_the_receiver():
    one, other = Funnel(), counted()
    one.merge(other)
    one.remove("models", "model_nsfw", "c")
    assert other.to_dict() == counted().to_dict()


def test_stored_and_read_again():
    stored = json.loads(json.dumps(counted().to_dict()))
    again = Funnel.from_dict(stored)
    assert again.to_dict() == stored
    again.remove("images", "image_nsfw", "too much")
    assert len(again.to_dict()["images"]["examples"]["image_nsfw"]) == MAX_EXAMPLES


def test_examples_are_short():
    funnel = Funnel()
    funnel.remove("models", "model_nsfw", "x" * 1000)
    assert funnel.to_dict()["models"]["examples"]["model_nsfw"] == ["x" * 120]


def test_markdown_has_every_count():
    text = counted().to_markdown({"model_nsfw": "flagged"})
    assert text.splitlines()[:8] == [
        "### Models",
        "",
        "| rule | removed | share | meaning |",
        "|---|---:|---:|---|",
        "| *in* | 10 | | |",
        "| model_nsfw | −2 | 20.0% | flagged |",
        "| model_private | −1 | 10.0% |  |",
        "| **out** | **7** | | |",
    ]
    assert "| image_nsfw | −5 | 100.0% |  |\n| **out** | **0** | | |" in text
