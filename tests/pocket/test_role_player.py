"""Template chats: they mean what was demonstrated, and give nothing away."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pocket.drawing import ATTRIBUTES, STYLES, Scene, random_scenes, vary_caption
from pocket.role_player import (
    ROLES,
    SHARES,
    Demonstration,
    Reference,
    Role,
    draw_reference,
    write_chat,
    write_chats,
)
from pocket.roles import MANNERS, QUIRKS, REPLIES
from pocket.wording import Wish, mentioned, wish_of

FIELDS = [  # a row of ChatGenBench, in this order
    "id", "messages", "input_type", "prompt", "negative_prompt", "model", "arguments", "setting", "split", "source",
    "role", "generator",
]  # fmt: skip
ARGUMENTS = {"sampler": "Euler a", "steps": 20, "cfg_scale": 7, "width": 512, "height": 512}


def demonstration(scene, name="1", **changes):
    options = {
        "prompt": vary_caption(scene, random.Random(name), "masterpiece, best quality"), "negative_prompt": "blurry",
        "model": "Pixel Wave - v10", "arguments": ARGUMENTS,
    }  # fmt: skip
    return Demonstration(name, scene, **options | changes)


@pytest.fixture(scope="module")
def demonstrations():
    """Of 1,000 scenes; the reference differs in the first or in the last two attributes."""
    made = []
    for i, scene in enumerate(random_scenes(1_000, 0)):
        other = Scene("tree" if scene.subject != "tree" else "car", scene.color, scene.background, scene.style)
        if i % 2:
            other = Scene(scene.subject, scene.color, "sky" if scene.background != "sky" else "night",
                          "neon" if scene.style != "neon" else "flat")  # fmt: skip
        made.append(demonstration(scene, str(i), reference=Reference(f"pictures/{i}.png", other)))
    return made


@pytest.fixture(scope="module")
def rows(demonstrations):
    return list(write_chats(demonstrations, 0))


def texts(row):
    """What the user says, message by message."""
    said = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return [text if isinstance(text, str) else text[-1]["text"] for text in said]


def words(text):
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "


def meaning(text):
    """Of each attribute the value that is spoken of; every text has but one."""
    found = mentioned(text)
    assert all(len(values) <= 1 for values in found.values()), text
    return {name: next(iter(values)) for name, values in found.items() if values}


def test_rows_are_chatgenbenchs(rows, demonstrations):
    for number, (row, shown) in enumerate(zip(rows, demonstrations, strict=True)):
        assert list(row) == FIELDS
        assert row["id"] == f"{number}/0" and row["generator"] == "template"
        assert (row["prompt"], row["model"], row["arguments"]) == (shown.prompt, shown.model, ARGUMENTS)
        assert (row["negative_prompt"], row["setting"], row["split"]) == ("blurry", "supervised", "train")
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (
            len(row["messages"]) // 2
        ) + ["user"]
    shares = {kind: sum(row["input_type"] == kind for row in rows) / len(rows) for kind in SHARES}
    assert shares == pytest.approx(SHARES, abs=0.05)


def test_a_single_message_says_everything(rows, demonstrations):
    for row, shown in zip(rows, demonstrations, strict=True):
        if row["input_type"] == "single":
            (text,) = texts(row)
            assert meaning(text) == vars(shown.scene), text
            assert row["source"]["turns"] == [vars(shown.scene)]


def test_a_message_with_a_picture_says_what_differs(rows, demonstrations):
    kinds = set()
    for row, shown in zip(rows, demonstrations, strict=True):
        if row["input_type"] == "multimodal":
            image, part = row["messages"][0]["content"]
            assert image == {"type": "image", "image": shown.reference.image} and part["type"] == "text"
            reference = vars(shown.reference.scene)
            assert row["source"]["reference"] == {"image": shown.reference.image, "scene": reference}
            changes = meaning(part["text"])
            assert reference | changes == vars(shown.scene)
            assert {name for name in ATTRIBUTES if reference[name] != vars(shown.scene)[name]} == set(changes)
            kinds.add(tuple(changes))
    assert kinds == {("subject",), ("background", "style")}


def test_a_history_arrives_at_the_demonstration(rows, demonstrations):
    lengths, replies = [], set()
    for row, shown in zip(rows, demonstrations, strict=True):
        if row["input_type"] != "history":
            continue
        wanted: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)
        turns = row["source"]["turns"]
        for number, (text, turn) in enumerate(zip(texts(row), turns, strict=True)):
            said = meaning(text)
            assert len(said) == 1 or number == 0  # one thing at a time
            wanted |= said
            assert wanted == turn, text
        assert turns[-1] == vars(shown.scene)
        assert all(before != now for before, now in zip(turns, turns[1:], strict=False))
        lengths.append(len(turns))
        replies |= {message["content"] for message in row["messages"] if message["role"] == "assistant"}
    assert {2, 3, 4, 5} == set(lengths) and lengths.count(2) > lengths.count(5)
    assert replies == set(REPLIES)


def test_no_chat_repeats_the_prompt_or_names_the_model(rows):
    for row in rows:
        said = words(" ".join(texts(row)))
        assert words(row["prompt"]) not in said
        assert " pixel wave " not in said


@pytest.mark.parametrize(
    ("scene", "prompt"),
    [
        (Wish("cat"), "a cat"),
        (Wish("cat", "red"), "a red cat"),
        (Wish("house", None, "grass"), "A house on the grass"),
        (Wish("moon", "blue", "sky", "pixel"), "pixel art of a blue moon in the sky"),
    ],
)
def test_short_prompts_are_not_repeated_either(scene, prompt):
    """With the words of the demonstration alone, many a chat would hold one of these."""
    shown = demonstration(
        Scene("cat", "red", "sky", "flat"), reference=Reference("x.png", Scene("tree", "pink", "black", "neon"))
    )
    for row in write_chats([replace(shown, scene=scene, prompt=prompt)], 1, per_demonstration=100):
        assert not any(words(prompt) in words(text) for text in texts(row))
        assert row["source"]["turns"][-1] == vars(scene)
        if row["input_type"] == "single":
            assert meaning(texts(row)[0]) == scene.said()


def test_names_of_models_are_avoided():
    scene = Scene("heart", "red", "white", "pixel")
    shown = demonstration(scene, model="Pixel Art - v3")
    chats = [texts(row)[0] for row in write_chats([shown], 0, {"single": 1}, per_demonstration=100)]
    assert not any(" pixel art " in words(text) for text in chats)
    assert all(meaning(text) == vars(scene) for text in chats)


def test_a_name_that_cannot_be_avoided():
    shown = demonstration(Scene("cat", "brown", "sky", "flat"), model="Brown - v1", prompt="kitten")
    with pytest.raises(ValueError, match=r"1: in 200 tries no chat was found .*: \['kitten', 'brown v1', 'brown'\]"):
        write_chat(shown, ROLES[0], "single", random.Random(0))


def test_chats_are_always_the_same_and_independent_of_each_other(demonstrations, rows):
    some = demonstrations[500:520]
    assert list(write_chats(some, 0)) == rows[500:520]
    others = list(write_chats(some, 1))
    assert sum(one["messages"] == other["messages"] for one, other in zip(others, rows[500:520], strict=True)) == 0


def test_several_chats_of_a_demonstration():
    scene = Scene("fish", "green", "sunset", "watercolor")
    chats = list(write_chats([demonstration(scene)], 0, {"single": 1, "history": 0}, per_demonstration=40))
    assert [row["id"] for row in chats] == [f"1/{i}" for i in range(40)]
    assert len({row["role"] for row in chats}) == 40
    assert len({texts(row)[0] for row in chats}) == 40


def test_without_a_reference_other_types_are_written():
    made = [demonstration(scene, str(i)) for i, scene in enumerate(random_scenes(400, 3))]
    kinds = [row["input_type"] for row in write_chats(made, 0)]
    history = SHARES["history"] / (SHARES["history"] + SHARES["single"])
    assert kinds.count("multimodal") == 0
    assert kinds.count("history") / 400 == pytest.approx(history, abs=0.06)


def test_drawn_references(tmp_path):
    rng, changes = random.Random(0), []
    for i, scene in enumerate(random_scenes(40, 5)):
        shown = draw_reference(demonstration(scene, str(i)), tmp_path / "references" / f"{i}.png", rng)
        picture = Image.open(shown.reference.image)
        assert picture.size == (64, 64) and np.asarray(picture).std() > 5
        changes.append([name for name in ATTRIBUTES if getattr(scene, name) != getattr(shown.reference.scene, name)])
        row = write_chat(shown, rng.choice(ROLES), "multimodal", rng)
        assert set(meaning(texts(row)[0])) == set(changes[-1])
    assert {len(names) for names in changes} == {1, 2}
    assert {name for names in changes for name in names} == set(ATTRIBUTES)


def test_what_a_demonstration_leaves_open_is_drawn_somehow(tmp_path):
    shown = demonstration(Scene("cat", "red", "sky", "flat"))
    shown = draw_reference(replace(shown, scene=Wish("cat", style="comic")), tmp_path / "a.png", random.Random(0))
    differs = [name for name in ("subject", "style") if getattr(shown.reference.scene, name) != vars(shown.scene)[name]]
    assert differs
    row = write_chat(shown, ROLES[0], "multimodal", random.Random(0))
    assert set(meaning(texts(row)[0])) == set(differs)
    assert row["source"]["scene"] == vars(wish_of(Scene("cat", "red", "sky", "comic"), "color", "background"))


def test_roles():
    assert len(ROLES) >= 100 and len({role.trade for role in ROLES}) == len({role.name for role in ROLES}) == len(ROLES)
    assert {role.register for role in ROLES} == set(MANNERS)
    assert {quirk for role in ROLES for quirk in role.quirks} == set(QUIRKS)
    assert min(role.age for role in ROLES) < 6 and max(role.age for role in ROLES) > 75


def test_phrases_of_registers_say_nothing_about_pictures():
    everything = [phrase for manner in MANNERS.values() for phrases in vars(manner).values() for phrase in phrases]
    for phrase in [*everything, *REPLIES, *(role.purpose for role in ROLES), *(role.trade for role in ROLES)]:
        assert not meaning(phrase), phrase


def messages_of(quirk, register="polite", count=40):
    """Single messages of two roles that differ in a quirk only."""
    shown = demonstration(Scene("house", "yellow", "night", "sketch"))
    plain = Role("tester", 30, register, (), "for a test")
    return [
        [write_chat(shown, role, "single", random.Random(seed))["messages"][0]["content"] for seed in range(count)]
        for role in (plain, replace(plain, quirks=(quirk,)))
    ]


@pytest.mark.parametrize(
    ("quirk", "sign"),
    [
        ("lowercase", r"^[^A-Z]+$"),
        ("unpunctuated", r"^[^.,!?]+$"),
        ("ellipsis", r"\.\.\.(?= |$)"),
        ("exclaims", r"!$"),
        ("emoji", r"[^\x00-\x7f]$"),
        ("shouting", r"^[^a-z]+$"),
        ("signs", r", the tester\.$"),
        ("greets", r"^(Hello,|Good morning,|Hello there,) "),
        ("hedges", r"not sure how|hope that makes"),
    ],
)
def test_quirks_show(quirk, sign):
    without, with_it = (sum(bool(re.search(sign, text)) for text in some) for some in messages_of(quirk))
    assert without == 0 and with_it > 15


def test_typing_errors_leave_alone_what_counts():
    plain, mistyped = messages_of("typos", "verbose")
    for text, other in zip(plain, mistyped, strict=True):
        assert meaning(text) == meaning(other)
        wrong = [(a, b) for a, b in zip(text.split(), other.split(), strict=True) if a != b]
        assert len(wrong) <= 2
        for a, b in wrong:
            assert abs(len(a) - len(b)) <= 1 and a[0] == b[0] and set(b) <= set(a)
    assert sum(text != other for text, other in zip(plain, mistyped, strict=True)) > 30


def test_registers_differ():
    lengths = {name: np.mean([len(text.split()) for text in messages_of("typos", name)[0]]) for name in MANNERS}
    assert (
        lengths["terse"] == min(lengths.values())
        and lengths["verbose"] == max(lengths.values()) > 1.5 * lengths["polite"]
    )


def test_every_style_is_asked_for_in_words_of_its_own():
    """The everyday words are more than those of captions."""
    for style, words_of_captions in STYLES.items():
        shown = demonstration(Scene("tree", "pink", "white", style))
        chats = [texts(row)[0].lower() for row in write_chats([shown], 0, {"single": 1}, per_demonstration=60)]
        assert sum(words_of_captions in text for text in chats) < 45


def test_errors(demonstrations):
    shown = demonstration(Scene("cat", "red", "sky", "flat"))
    with pytest.raises(ValueError, match="`input_type` must be one of single, multimodal, history, but is 'poem'"):
        write_chat(shown, ROLES[0], "poem", random.Random(0))
    with pytest.raises(ValueError, match="1: a multimodal chat needs a `reference`"):
        write_chat(shown, ROLES[0], "multimodal", random.Random(0))
    with pytest.raises(ValueError, match="`shares` may hold .* but has poem"):
        next(write_chats([shown], 0, {"poem": 1}))
    with pytest.raises(ValueError, match="1: `shares` .* leave no input type"):
        next(write_chats([shown], 0, {"multimodal": 1}))
    with pytest.raises(ValueError, match="`per_demonstration` must be 1 to"):
        next(write_chats([shown], 0, per_demonstration=1_000))
    with pytest.raises(ValueError, match="of which something is said"):
        write_chat(replace(shown, scene=Wish()), ROLES[0], "history", random.Random(0))
