"""Template chats: the register's phrases around what the wording says, with the role's habits, giving nothing away."""

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.bench.chatgen.roles import MANNERS, ROLES, Role
from align.bench.chatgen.schema import ChatTask, Demonstration, Reference
from align.bench.chatgen.template_player import MOST_TRIES, NothingToSay, TemplatePlayer, mistype, spelt, with_article

PLAIN = Role("tester", 30, "polite", (), "for a test")


class Plum:
    """A wording that says one thing, or one of several."""

    def __init__(self, *pictures, difference="in winter"):
        self.pictures, self.different = pictures or ("a plum tree in Bonn",), difference

    def picture(self, prompt, rng):
        return rng.choice(self.pictures)

    def change(self, before, after, rng):
        return f"turn {before} into {after}"

    def difference(self, reference_prompt, prompt, rng):
        return self.different

    def turns(self, prompt, number, rng):
        return (prompt,)


class Mute(Plum):
    def picture(self, prompt, rng):
        raise NothingToSay("Only quality\nwords.")


def task(role=PLAIN, targets=("plum, bonn, best quality",), *, name="7", model="Oil Dream - v2", **changes):
    demonstration = Demonstration(name, targets[-1], "", model, {})
    kind = "history" if len(targets) > 1 else "multimodal" if changes.get("reference") else "single"
    return ChatTask(demonstration, changes.pop("number", 0), role, kind, targets, **changes)


def say(the_task, wording=None, seed=0):
    (chat,) = TemplatePlayer(wording or Plum(), seed).play([the_task])
    assert chat.task is the_task and chat.generator == "template"
    return chat


def texts_of(quirk, register="polite", count=40):
    """First messages of two roles that differ in a quirk only."""
    plain = replace(PLAIN, register=register)
    return [
        [say(task(role, number=number)).texts[0] for number in range(count)]
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
        ("greets", r"^(Hello|Good morning|Hello there), (?:I\b|[a-z])"),
        ("hedges", r"not sure how|hope that makes"),
    ],
)
def test_quirks_show(quirk, sign):
    without, with_it = (sum(bool(re.search(sign, text)) for text in some) for some in texts_of(quirk))
    assert without == 0 and with_it > 15


def test_typing_errors_leave_alone_what_counts():
    plain, mistyped = texts_of("typos", "verbose")
    for text, other in zip(plain, mistyped, strict=True):
        assert "plum tree in Bonn" in text and "plum tree in Bonn" in other
        # Praise is drawn before the errors, so both texts have the same words but for them.
        wrong = [(a, b) for a, b in zip(text.split(), other.split(), strict=True) if a != b]
        assert 1 <= len(wrong) <= 2
        for a, b in wrong:
            assert abs(len(a) - len(b)) <= 1 and a[0] == b[0] and set(b) <= set(a)


@given(st.text(alphabet="abc {phrase}.,", max_size=60), st.integers(0, 9))
def test_mistyping_never_touches_a_slot(text, seed):
    mistyped = mistype(text, random.Random(seed))
    assert mistyped.count("{phrase}") == text.count("{phrase}")
    assert abs(len(mistyped) - len(text)) <= 2


def test_registers_differ():
    lengths = {}
    for name in MANNERS:
        some = texts_of("typos", name)[0]
        lengths[name] = sum(len(text.split()) for text in some) / len(some)
    assert lengths["terse"] == min(lengths.values())
    assert lengths["verbose"] == max(lengths.values()) > 1.5 * lengths["polite"]


def test_praise_stands_after_the_article():
    texts = [say(task(number=number)).texts[0] for number in range(60)]
    praised = {re.search(r"an? (?:(\w+) )?plum tree", text)[1] for text in texts}
    assert praised == {None, "nice", "lovely", "beautiful"}
    assert all("two plums" in say(task(number=number), Plum("two plums")).texts[0] for number in range(10))


def test_a_picture_that_differs():
    reference = Reference("x.png", "pear")
    texts = {say(task(reference=reference, number=number)).texts[0] for number in range(30)}
    assert all("in winter" in text and "plum tree" not in text for text in texts)
    assert any("something like this picture, but in winter?" in text for text in texts)


def test_the_same_picture_is_described():
    the_task = task(reference=Reference("x.png", "plum, bonn, best quality"))
    texts = {say(replace(the_task, number=number), Plum(difference="")).texts[0] for number in range(30)}
    assert all("a plum tree in Bonn" in text for text in texts) and len(texts) > 5


def test_a_history_asks_first_and_changes_then():
    first, second, third = say(task(targets=("plum", "plum, snow", "plum, snow, night"))).texts
    assert "plum tree in Bonn" in first
    assert "turn plum into plum, snow" in second
    assert "turn plum, snow into plum, snow, night" in third


def test_what_a_chat_becomes_depends_on_seed_task_and_attempt_only():
    tasks = [task(role, name=str(number)) for number, role in enumerate(ROLES)]
    chats = [chat.texts for chat in TemplatePlayer(Plum(), 3).play(tasks)]
    assert [chat.texts for chat in TemplatePlayer(Plum(), 3).play(reversed(tasks))] == chats[::-1]
    again = TemplatePlayer(Plum(), 3).play(replace(item, attempt=1) for item in tasks)
    other_seed = TemplatePlayer(Plum(), 4).play(tasks)
    for others in (again, other_seed):
        assert sum(chat.texts == texts for chat, texts in zip(others, chats, strict=True)) < 10
    assert list(TemplatePlayer(Plum()).play([])) == []


def test_the_prompt_and_the_models_name_are_avoided():
    wording = Plum("an oil dream of a cat", "a red cat", "a scarlet kitten")
    for number in range(100):
        said = spelt(say(task(targets=("red cat",), number=number), wording).texts[0])
        assert " scarlet kitten " in said and " red cat " not in said and " oil dream " not in said


def test_a_word_that_is_the_prompt_or_the_name_is_said_where_nothing_else_can_be():
    chat = say(task(targets=("horse",), model="Horse - v1"), Plum("a horse"))
    assert "horse" in chat.texts[0] and chat.problem is None


@pytest.mark.parametrize(
    ("wording", "targets", "problem"),
    [
        (Plum("an oil dream of a cat"), ("cat",), "names_model"),
        (Plum("a small cat on a big blue mat"), ("small cat on a big blue mat, 8k",), "verbatim_prompt"),
        (Mute(), ("masterpiece",), "nothing_to_say"),
    ],
)
def test_where_no_text_can_be_found_the_chat_says_why(wording, targets, problem):
    chat = say(task(targets=targets), wording)
    assert (chat.texts, chat.problem) == ((), problem)
    assert chat.detail and "\n" not in chat.detail
    assert (str(MOST_TRIES) in chat.detail) == (problem != "nothing_to_say")
    after = list(TemplatePlayer(wording).play([chat.task, task()]))
    assert len(after) == 2  # the others are written all the same


@settings(max_examples=50)
@given(st.text(min_size=1, max_size=40), st.sampled_from(ROLES))
def test_whatever_the_picture_is_called_no_error(picture, role):
    chat = say(task(role), Plum(picture))
    assert bool(chat.texts) == (chat.problem is None)


@pytest.mark.parametrize(
    ("phrase", "article"),
    [("cat", "a"), ("orange cat", "an"), ("unicorn", "a"), ("European", "a"), ("hour", "an"), ("18 year old", "an"),
     ("ugly duck", "an"), ("uninvited guest", "an"), ("one-eyed man", "a")],
)  # fmt: skip
def test_articles(phrase, article):
    assert with_article(phrase) == f"{article} {phrase}"


def test_spelt_compares_words():
    assert spelt("A red, (cat:1.2)!") == " a red cat 1 2 " and spelt("!") == "  "
