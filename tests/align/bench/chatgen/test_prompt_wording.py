"""Stable Diffusion prompts in everyday words."""

import random
import re
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.bench.chatgen import prompt_reading
from align.bench.chatgen.prompt_wording import MOST_WORDS, PromptWording
from align.bench.chatgen.template_player import NothingToSay

WORDING = PromptWording()
GIRL = "masterpiece, best quality, 1girl, solo, long hair, black hair, white dress, beach, sunset, (smile:1.2)"
REAL = (
    "8k, RAW photo, highest quality, portrait, one beautiful mage woman, short red hair, kneeling, mythical cave",
    "masterpiece,best quality,1girl, solo,Majsoul,Yuzu Majsoul,green hair,cat ears,sitting,full body,cloak,black shoes",
    "A post-apocalyptic wasteland with twisted metal ruins and toxic clouds, where scavengers eke out a living",
    "a cauldron made of crystals, by greg rutkowski and thomas kinkade, trending on artstation, 4k. vivid colors",
    "kitchen, fire, lantern, no humans, scenery, pan, pots, table, incense burner, OdinSphereStyle",
    "GasLampFantasyAI helicopter, detailed, intricate",
    "RAW photo, a portrait photo of 25 y.o man in casual clothes, night, city street, high detailed skin, 8k uhd, dslr",
)


def pictures(prompt, count=40):
    return {WORDING.picture(prompt, random.Random(seed)) for seed in range(count)}


def only(prompt):
    """What is said of a prompt with at most one piece beside its subject."""
    (text,) = pictures(prompt)
    return text


@pytest.mark.parametrize(
    ("prompt", "picture"),
    [
        ("1girl", "a girl"),
        ("2girls, solo", "two girls"),
        ("2girl", "two girls"),
        ("1 male", "a man"),
        ("1girl, 1boy", "a girl and a boy"),
        ("one alien", "an alien"),
        ("horse", "a horse"),
        ("crystal skull, 8k, masterpiece", "a crystal skull"),
        ("steampunk axolotl, art by james gurney, graeme base", "a steampunk axolotl"),
        ("mountains with a river running down", "mountains with a river running down"),
        ("(((1girl:1.3))), <lora:epi_noise:0.6>, embedding:bad-hands, BREAK", "a girl"),
        ("1girl, [[from_behind]]", "a girl, seen from behind"),
        ("1girl, looking_at_viewer", "a girl, looking straight at us"),
        ("1girl, blue_eyes", "a girl with blue eyes"),
        ("1girl, ponytail", "a girl with a ponytail"),
        ("1girl, school uniform", {"a girl wearing a school uniform", "a girl in a school uniform"}),
        ("1girl, holding umbrella", {"a girl, holding an umbrella", "a girl, with an umbrella"}),
        ("1girl, night", "a girl at night"),
        ("1girl, flower field", "a girl in a flower field"),
        ("1girl, in winter", "a girl in winter"),
        ("1girl, in server room", "a girl in a server room"),
        ("1girl, red background", "a girl on a red background"),
        ("cat, castle background", {"a cat with a castle in the background"}),
        ("cat, oil painting", "a cat, like an oil painting"),
        ("the girl is reading", {"a girl reading"}),
        ("photo of a truck on road", "a truck on a road, like a real photo"),
        ("25 y.o man", "a 25 year old man"),
        ("SteamPunkAI, Cogpunk spaceship", "a cogpunk spaceship"),
        ("black eyes", "somebody with black eyes"),
        ("sunset", "a scene at sunset"),
        ("city street, atompunk", "a city street"),
    ],
)
def test_tags_become_words(prompt, picture):
    said = {re.sub(r"photograph\b", "photo", text.replace("dressed in", "wearing")) for text in pictures(prompt)}
    said = {re.sub(r"\b(guy|fellow)\b", "man", text).replace("city road", "city street") for text in said}
    assert said <= (picture if isinstance(picture, set) else {picture}) and said


NOISE = """masterpiece; best quality; 8k uhd; trending on artstation; Fujifilm XT3; absurdres; depth of field; by WLOP
extremely detailed CG unity 8k wallpaper; art by greg rutkowski and alphonse mucha; soft cinematic lighting; nvinkpunk
octane render; mh-yk; pureerosface_v1:0.3; intricate details; beautiful detailed eyes; shot on canon 5d; nsfw; (((
OdinSphereStyle; 美しい; an extremely delicate and beautiful; solo; no humans
the most beautiful artwork in the world; no background"""


@pytest.mark.parametrize("tag", re.split(r"; |\n", NOISE))
def test_what_nobody_would_say_is_dropped(tag):
    assert pictures(f"{tag}, cat, {tag}") == {"a cat"}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ,, ",
        "masterpiece, best quality",
        "8k",
        "美しい少女",
        "красивый город",
        "✨",
        ":",
        "((()))",
        "SDArt mth",
        "1.5",
    ],
)
def test_of_some_prompts_nothing_is_left(prompt):
    with pytest.raises(NothingToSay):
        WORDING.picture(prompt, random.Random(0))
    assert WORDING.turns(prompt, 3, random.Random(0)) == (prompt,)


def test_hair_is_one_thing():
    assert any("long black hair" in text for text in pictures(GIRL))
    assert not any("hair, black hair" in text or "black hair and long" in text for text in pictures(GIRL))


def test_the_order_is_that_of_english():
    worn = r"( (wearing|in|dressed in) a white dress)?"
    pattern = rf"a girl( with (long|black|long black) hair)?{worn}(, smiling)?( on a beach)?( at sunset)?"
    texts = pictures(GIRL, 200)
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert len(texts) > 15


@pytest.mark.parametrize("prompt", REAL)
def test_real_prompts_read_like_english(prompt):
    for text in pictures(prompt):
        assert re.fullmatch(r"[a-z0-9][A-Za-z0-9 ,'-]+", text), text
        assert 2 <= len(text.split()) <= MOST_WORDS
        assert not re.search(r"\b(masterpiece|quality|8k|uhd|raw|artstation|by greg|the the|a a|an a|,,)\b", text), text
        assert not re.search(r"\b(a [aeio]|an [bcdfgjklmnpqrstvwxz])", text), text
        assert text.split()[-1] not in ("of", "with", "in", "on", "a", "and", "the"), text


def test_a_handful_of_many_pieces():
    prompt = (
        GIRL + ", cat, umbrella, flowers, gloves, hat, scarf, glasses, winter, garden, from above, anime, castle, book"
    )
    texts = pictures(prompt, 100)
    assert max(len(text.split()) for text in texts) <= MOST_WORDS
    assert len(texts) > 80


def test_changes_name_what_is_new():
    def change(before, after):
        return WORDING.change(before, after, random.Random(0))

    assert change("1girl", "1girl, blue eyes") == "give her blue eyes"
    assert change("1girl, green eyes", "1girl, blue eyes") == "give her blue eyes"
    assert change("1boy", "1boy, red hat") == "have him wear a red hat"
    assert change("cat", "cat, forest") == "put it in a forest"
    assert change("2girls", "2girls, night") == "show them at night"
    assert change("cat", "cat, oil painting") == "make it look like an oil painting"
    assert change("cat", "cat, monochrome") == "do it in black and white"
    assert change("cat", "cat, umbrella, book") == "add an umbrella and add a book"
    assert change("cat", "dog") == "make it a dog instead"
    assert change("cat, umbrella", "cat") == "leave out an umbrella"
    with pytest.raises(NothingToSay, match="nothing differs"):
        change("cat, 8k", "cat, best quality")


def test_differences_follow_but():
    def differences(reference, prompt):
        return {WORDING.difference(reference, prompt, random.Random(seed)) for seed in range(20)}

    assert differences("1girl", "1girl, winter") == {"in winter"}
    assert differences("1girl, red eyes", "1girl, blue eyes, 8k") == {"with blue eyes"}
    assert differences("cat", "dog, night") == {"showing a dog at night", "showing a dog"} - (
        set() if "showing a dog" in differences("cat", "dog, night") else {"showing a dog"}
    )
    assert differences("cat, umbrella", "cat") == {"without an umbrella"}
    assert differences(GIRL, GIRL) == {""}
    assert differences("masterpiece", "cat") == {"showing a cat"}
    with pytest.raises(NothingToSay):
        WORDING.difference("cat", "masterpiece", random.Random(0))


def test_turns_arrive_at_the_prompt():
    wrong = 0
    for seed in range(100):
        rng = random.Random(seed)
        turns = WORDING.turns(GIRL, 4, rng)
        assert 2 <= len(turns) <= 4 and turns[-1] == GIRL and len(set(turns)) == len(turns)
        for before, after in zip(turns, turns[1:], strict=False):
            assert WORDING.change(before, after, rng)
        assert all("1girl" not in turn and "a girl" in turn for turn in turns[:-1])  # plain words, without weights
        assert not any(":" in turn or "(" in turn for turn in turns[:-1])
        wrong += any(re.search("short hair|night|street|angry", turn) for turn in turns[:-1])
        assert re.match("(a|an angry) girl", WORDING.picture(turns[0], rng))
    assert 20 < wrong < 100


@pytest.mark.parametrize("prompt", ["1girl", "a photo of a truck on a road", "masterpiece, horse, 8k"])
def test_a_prompt_of_one_piece_can_not_be_taken_apart(prompt):
    assert WORDING.turns(prompt, 4, random.Random(0)) == (prompt,)


@pytest.mark.parametrize("prompt", [*REAL, "Feena, straw hat", "umbrella, white dress, smile", "hat, cat, night"])
def test_steps_never_change_the_subject(prompt):
    for seed in range(20):
        rng = random.Random(seed)
        turns = WORDING.turns(prompt, 5, rng)
        changes = [WORDING.change(before, after, rng) for before, after in pairwise(turns)]
        assert not any(re.match("make it .* instead|leave out", change) for change in changes)


def test_turns_of_one_message():
    assert WORDING.turns(GIRL, 1, random.Random(0)) == (GIRL,)


def test_the_generator_decides_everything():
    for prompt in (GIRL, *REAL):
        first, second = (WORDING.picture(prompt, random.Random(5)) for _ in range(2))
        assert first == second


LONG = (
    "a|(|((((a:|<|<lora:|\\(|:1|- |a |a of |by |photo of |style of |b, |1girl, |a photo a |the |in |é|'|a'|1|1y|.| |\n"
)


@pytest.mark.parametrize("piece", [*LONG.split("|"), "in a hat ", "x_v1", "A. ", "in style "])
def test_no_prompt_takes_long(piece, monkeypatch):
    """All of 20,000 characters; a pattern that is quadratic in them takes a minute."""
    monkeypatch.setattr(prompt_reading, "_MOST_LETTERS", 10**6)
    prompt = (piece * 20_000)[:20_000]
    start = time.perf_counter()
    try:
        text = WORDING.picture(prompt, random.Random(0))
        WORDING.turns(prompt, 5, random.Random(0))
    except NothingToSay:
        text = "nothing"
    assert time.perf_counter() - start < 2
    assert len(text.split()) <= MOST_WORDS and len(text) < 1_000


TAGS = [*GIRL.split(", "), *REAL, "(", ":", "<lora:", "\x00", "\u2028", "\ud800"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | st.lists(st.sampled_from(TAGS)).map(", ".join))
def test_one_line_of_plain_text_or_a_named_error(prompt):
    rng = random.Random(0)
    try:
        texts = [WORDING.picture(prompt, rng), WORDING.difference(GIRL, prompt, rng)]
    except NothingToSay:
        texts = ["nothing"]
    for text in texts:
        assert re.fullmatch(r"[^\W_][\w ,'’-]*|", text), text
        assert text.isprintable() and "_" not in text
    assert WORDING.turns(prompt, 3, rng)[-1] == prompt
