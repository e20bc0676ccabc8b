"""Chats about the pocket world mean exactly what was demonstrated."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from align.bench.chatgen.planning import plan_chats, retry_task
from align.bench.chatgen.roles import MANNERS, REPLIES, ROLES, Role
from align.bench.chatgen.schema import SHARES, ChatTask, Demonstration, Reference
from align.bench.chatgen.template_player import NothingToSay, TemplatePlayer
from pocket.catalogue import MODELS
from pocket.drawing import ATTRIBUTES, STYLES, Scene, random_scenes, vary_caption
from pocket.dump_prompts import write_prompt
from pocket.role_player import DrawnReferences, SceneWording, prompt_of, scene_of
from pocket.wording import Wish, mentioned

WORDING = SceneWording()


def demonstration(scene, name="1", **changes):
    prompt = vary_caption(scene, random.Random(name), "masterpiece, best quality")
    return replace(Demonstration(name, prompt, "blurry", "Pixel Wave - v10", {}), **changes)


def other_scene(item, rng):
    """A reference that differs in the first or in the last two attributes."""
    wish = scene_of(item.prompt)
    scene = Scene(*(value or ATTRIBUTES[name][0] for name, value in vars(wish).items()))
    other = replace(scene, subject="tree" if scene.subject != "tree" else "car")
    if int(item.id) % 2:
        other = replace(scene, background="sky" if scene.background != "sky" else "night",
                        style="neon" if scene.style != "neon" else "flat")  # fmt: skip
    return Reference(f"{item.id}.png", prompt_of(other))


def play(items, seed=0, references=other_scene, **options):
    options = {"per_demonstration": 1, "wording": WORDING} | options
    return list(TemplatePlayer(WORDING, seed).play(plan_chats(items, seed=seed, references=references, **options)))


@pytest.fixture(scope="module")
def chats():
    """Of 1,000 scenes."""
    return play([demonstration(scene, str(number)) for number, scene in enumerate(random_scenes(1_000, 0))])


def words(text):
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "


def meaning(text):
    """Of each attribute the value that is spoken of; every text has but one."""
    found = mentioned(text)
    assert all(len(values) <= 1 for values in found.values()), text
    return {name: next(iter(values)) for name, values in found.items() if values}


def of_type(chats, kind):
    some = [chat for chat in chats if chat.task.input_type == kind]
    assert len(some) > 100
    return some


def test_every_chat_can_be_written(chats):
    assert not any(chat.problem for chat in chats)
    shares = {kind: len(of_type(chats, kind)) / len(chats) for kind in SHARES}
    assert shares == pytest.approx(SHARES, abs=0.05)


def test_a_single_message_says_everything(chats):
    for chat in of_type(chats, "single"):
        (text,) = chat.texts
        assert meaning(text) == scene_of(chat.task.demonstration.prompt).said(), text


def test_a_message_with_a_picture_says_what_differs(chats):
    kinds = set()
    for chat in of_type(chats, "multimodal"):
        (text,) = chat.texts
        shown, wanted = (meaning(prompt) for prompt in (chat.task.reference.prompt, chat.task.demonstration.prompt))
        changes = meaning(text)
        assert shown | changes == shown | wanted
        assert set(changes) == {name for name, value in wanted.items() if shown[name] != value}
        kinds.add(tuple(changes))
    assert {("subject",), ("background", "style")} <= kinds


def test_a_history_arrives_at_the_demonstration(chats):
    lengths = []
    for chat in of_type(chats, "history"):
        wanted = {}
        for number, (text, target) in enumerate(zip(chat.texts, chat.task.targets, strict=True)):
            said = meaning(text)
            assert len(said) == 1 or number == 0  # one thing at a time
            wanted |= said
            assert wanted == meaning(target), text
        assert chat.task.targets[-1] == chat.task.demonstration.prompt
        lengths.append(len(chat.texts))
    assert {2, 3, 4, 5} == set(lengths) and lengths.count(2) > lengths.count(5)


def test_no_chat_repeats_the_prompt_or_names_the_model(chats):
    for chat in chats:
        said = words(" ".join(chat.texts))
        assert words(chat.task.demonstration.prompt) not in said and " pixel wave " not in said


def test_typing_errors_and_other_habits_change_no_meaning():
    item = demonstration(Scene("house", "yellow", "night", "sketch"), "no caption left anything out")
    assert len(scene_of(item.prompt).said()) == 4
    for chat in play([item], shares={"single": 1}, per_demonstration=len(ROLES)):
        assert meaning(chat.texts[0]) == vars(Scene("house", "yellow", "night", "sketch"))


@pytest.mark.parametrize(
    "prompt", ["a cat", "a red cat", "A house on the grass", "pixel art of a blue moon in the sky"]
)
def test_short_prompts_are_not_repeated_either(prompt):
    """With the words of the demonstration alone, many a chat would hold one of these."""
    tree = Reference("x.png", "pink tree, on a black background, neon glow")
    item = Demonstration("1", prompt, "", "Pixel Wave - v10", {})
    for chat in play([item], per_demonstration=100, references=lambda item, rng: tree):
        assert not any(words(prompt) in words(text) for text in chat.texts)
        if chat.task.input_type == "single":
            assert meaning(chat.texts[0]) == meaning(prompt)


def test_names_of_models_are_avoided():
    item = demonstration(Scene("heart", "red", "white", "pixel"), model="Pixel Art - v3")
    chats = play([item], shares={"single": 1}, per_demonstration=100)
    assert not any(" pixel art " in words(text) for chat in chats for text in chat.texts)


def test_prompts_of_the_community_are_understood():
    """As they stand in the dump: weights, tags of quality, trigger words. What they say is of their scene."""
    rng = random.Random(0)
    told = 0
    for model in MODELS:
        for scene in random_scenes(20, 1):
            wish = scene_of(write_prompt(rng, scene, model))
            assert wish.subject == scene.subject
            told += wish.allows(scene)
    # "pixel art style" asks for a style that the model's trigger words need not be of.
    assert told > 0.9 * 20 * len(MODELS)


def test_phrases_of_registers_say_nothing_about_pictures():
    everything = [phrase for manner in MANNERS.values() for phrases in vars(manner).values() for phrase in phrases]
    for phrase in [*everything, *REPLIES, *(role.purpose for role in ROLES), *(role.trade for role in ROLES)]:
        assert not meaning(phrase), phrase


def test_every_style_is_asked_for_in_words_of_its_own():
    """The everyday words are more than those of captions."""
    for style, words_of_captions in STYLES.items():
        prompt = prompt_of(Scene("tree", "pink", "white", style))
        pictures = [WORDING.picture(prompt, random.Random(seed)) for seed in range(60)]
        assert sum(words_of_captions in text for text in pictures) < 45


def test_prompts_and_scenes():
    scene = Scene("moon", "blue", "sky", "pixel")
    assert prompt_of(scene) == "blue moon, in the sky, pixel art" and scene_of(prompt_of(scene)) == Wish(
        *vars(scene).values()
    )
    assert scene_of("((red:1.2)) cat, sharp") == Wish("cat", "red")
    assert scene_of("a cat or a tree") == Wish("cat")  # of two subjects the first
    assert prompt_of(Wish(style="comic")) == "comic book"


@pytest.mark.parametrize("prompt", ["at night", "red", "comic book, at sunset"])
def test_what_names_no_subject_can_be_said_too(prompt):
    for seed in range(20):
        rng = random.Random(seed)
        assert meaning(WORDING.picture(prompt, rng)) == meaning(prompt)
        turns = WORDING.turns(prompt, 4, rng)
        assert 2 <= len(turns) <= 3
        assert all(meaning(turn) for turn in turns)  # there is always something to ask for first


def test_nothing_to_say():
    rng = random.Random(0)
    item = Demonstration("1", "masterpiece", "", "Pixel Wave - v10", {})
    assert WORDING.turns("masterpiece", 3, rng) == ("masterpiece",)
    for ask in (WORDING.picture, scene_of):
        with pytest.raises(NothingToSay, match="nothing that can be drawn: 'masterpiece'"):
            ask("masterpiece", rng) if ask is not scene_of else ask("masterpiece")
    with pytest.raises(NothingToSay, match="says nothing that"):
        WORDING.change("red cat", "a cat", rng)
    assert WORDING.difference("masterpiece", "cat", rng).startswith("with ")
    assert WORDING.difference("red cat", "a red cat", rng) == ""
    (chat,) = TemplatePlayer(WORDING).play(
        [ChatTask(item, 0, Role("tester", 30, "polite", (), ""), "single", ("masterpiece",))]
    )
    assert chat.problem == "nothing_to_say"


def test_drawn_references(tmp_path):
    references, changes = DrawnReferences(tmp_path / "references"), []
    for number, scene in enumerate(random_scenes(40, 5)):
        item = replace(demonstration(scene, f"{number}/a"), prompt=prompt_of(scene))
        reference = references(item, random.Random(number))
        picture = Image.open(reference.image)
        assert picture.size == (64, 64) and np.asarray(picture).std() > 5
        shown = meaning(reference.prompt)
        changes.append([name for name in ATTRIBUTES if getattr(scene, name) != shown[name]])
        text = WORDING.difference(reference.prompt, item.prompt, random.Random(number))
        assert set(meaning(text)) == set(changes[-1])
    assert {len(names) for names in changes} == {1, 2}
    assert {name for names in changes for name in names} == set(ATTRIBUTES)
    assert len(list((tmp_path / "references").iterdir())) == 40
    assert references(replace(item, prompt="masterpiece"), random.Random(0)) is None


def test_what_a_demonstration_leaves_open_is_drawn_somehow(tmp_path):
    item = Demonstration("1", "cat, comic book", "", "Pixel Wave - v10", {})
    shown = meaning(DrawnReferences(tmp_path)(item, random.Random(0)).prompt)
    assert set(shown) == set(ATTRIBUTES)
    differs = {name for name in ("subject", "style") if shown[name] != meaning(item.prompt)[name]}
    assert (
        differs
        and meaning(WORDING.difference(prompt_of(Scene(**shown)), item.prompt, random.Random(0))).keys() == differs
    )


def test_a_history_can_be_written_anew(chats):
    again = [retry_task(chat.task, seed=0, wording=WORDING) for chat in of_type(chats, "history")]
    for chat in TemplatePlayer(WORDING).play(again):
        assert chat.problem is None and len(chat.texts) == len(chat.task.targets)
        assert meaning(chat.texts[0]) == meaning(chat.task.targets[0])
