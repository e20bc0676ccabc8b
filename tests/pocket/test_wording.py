"""Phrases for what is in a picture: each means one thing, and is read again."""

import random

import pytest

from pocket.drawing import ATTRIBUTES, Scene, all_scenes, vary_caption
from pocket.wording import PHRASES, Wish, in_known_words, mentioned, say, spans, wish_of, with_article

NOTHING = {name: set() for name in ATTRIBUTES}


def test_every_value_has_phrases():
    for attribute, values in ATTRIBUTES.items():
        assert set(PHRASES[attribute]) == set(values)
        for phrases in PHRASES[attribute].values():
            assert phrases.plain and len(phrases.everyday) >= 2


def test_each_phrase_means_one_thing():
    for attribute, table in PHRASES.items():
        for value, phrases in table.items():
            for phrase in (*phrases.plain, *phrases.everyday):
                for text in (phrase, phrase.upper(), f"So: {phrase}!"):
                    assert mentioned(text) == NOTHING | {attribute: {value}}, phrase


def test_plain_phrases_are_in_known_words():
    for table in PHRASES.values():
        for phrases in table.values():
            assert all(in_known_words(phrase) for phrase in phrases.plain)
    assert not in_known_words("a red dragon") and in_known_words("A red cat, on the grass.")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a kitty on a lawn, in pencil", {"subject": {"cat"}, "background": {"grass"}}),
        ("starfish, caterpillar, darkred", {}),  # inside of other words
        ("an orange car at night", {"subject": {"car"}, "color": {"orange"}, "background": {"night"}}),
        ("under a dark night sky", {"background": {"night"}}),
        ("a red or a blue moon", {"subject": {"moon"}, "color": {"red", "blue"}}),
        ("", {}),
    ],
)
def test_mentioned(text, meaning):
    assert mentioned(text) == NOTHING | meaning


def test_captions_mean_their_scene():
    rng = random.Random(0)
    for scene in all_scenes():
        text = vary_caption(scene, rng, rng.choice(["", "low quality", "masterpiece, best quality"]))
        for name, values in mentioned(text).items():
            assert values <= {getattr(scene, name)}
            assert values or name != "subject"


def test_spans_are_where_the_phrases_are():
    text = "A Red pussycat in the dark night"
    assert [text[span.start : span.end] for span in spans(text)] == ["Red", "pussycat", "in the dark night"]
    assert [(span.attribute, span.value) for span in spans(text)] == [
        ("color", "red"), ("subject", "cat"), ("background", "night"),
    ]  # fmt: skip


def test_say_uses_all_phrases():
    rng = random.Random(0)
    phrases = PHRASES["style"]["sketch"]
    assert {say("style", "sketch", rng) for _ in range(300)} == {*phrases.plain, *phrases.everyday}
    assert {say("style", "sketch", rng, everyday=False) for _ in range(100)} == set(phrases.plain)


def test_articles():
    assert [with_article(phrase) for phrase in ("cat", "orange cat", "pixel art")] == [
        "a cat", "an orange cat", "pixel art",
    ]  # fmt: skip


def test_wishes():
    scene = Scene("cat", "red", "sky", "comic")
    wish = wish_of(scene, "color", "style")
    assert wish == Wish("cat", None, "sky", None) and wish.said() == {"subject": "cat", "background": "sky"}
    assert wish.allows(scene) and wish.allows(Scene("cat", "blue", "sky", "neon"))
    assert not wish.allows(Scene("cat", "red", "night", "comic"))
    assert wish_of(wish, "subject") == Wish(background="sky")
    assert Wish().allows(scene)
