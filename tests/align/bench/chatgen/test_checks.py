"""What is wrong with chats that language models write."""

import random
import time

import pytest

from align.bench.chatgen.checks import CHECKS, EXPLANATIONS, longest_common_run, problem_of
from align.bench.chatgen.role_prompts import EXAMPLES, SYSTEM
from align.bench.chatgen.template_player import TemplatePlayer

GOOD = "Could you draw me a little fox out in the cold?"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "yo gimme a foxy thing in winter, thx 😅",
        "Sorry to bother you, but can you make a fox for my kids?",
        "I can't draw myself, so please make me a fox that sits in white woods.",
        "As a nurse I would love a calm picture of a fox for the ward.",
        "A fox, please.",
        "FOX IN SNOW NOW",
        "I'd like a café scene with a fox, à la Monet.",
        "Kitsune in the style of Hokusai",
    ],
)
def test_what_people_say_passes(task, text):
    assert problem_of([text], task()) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty", ""),
        ("empty", " ... !! 🙂"),
        ("refusal", "I'm sorry, but I can't help with that request."),
        ("refusal", "I cannot create content of this kind."),
        ("refusal", "As an AI language model, I have no eyes to see foxes with."),
        ("refusal", "That violates our guidelines. How about a cat?"),
        ("refusal", "Sorry, I am unable to generate images of foxes. " + "More words. " * 100),
        ("too_long", "a fox and another fox " * 20),
        ("leaked_role_prompt", "You are playing the nurse. A fox, please."),
        ("leaked_role_prompt", "Here is a colloquial query: draw me a fox"),
        ("leaked_role_prompt", "Sure! Here's the rewritten prompt: a fox in the cold."),
        ("leaked_role_prompt", "Remove any obvious details that non-professional users would avoid, like foxes"),
        ("leaked_role_prompt", "my query should be colloquial and as brief as possible, a fox"),
        ("leaked_role_prompt", "please convert complex and professional content for non professional folks"),
        ("leaked_role_prompt", "draw <prompt>a fox</prompt>"),
        ("copied_example", EXAMPLES["single"][1].said[0].upper()),
        ("copied_example", EXAMPLES["history"][0].said[1] + " And blue."),
        ("verbatim_prompt", "a red fox in the snow, winter forest, watercolor, soft light, detailed fur"),
        ("verbatim_prompt", "I want a red fox in the snow winter forest watercolor soft light, detailed fur ok"),
        ("names_model", "Use Fox Painter for a fox in white woods"),
        ("names_model", "use fox painter v1 please"),
        ("prompt_syntax", "a (red fox:1.3) in white woods"),
        ("prompt_syntax", "a masterpiece with a fox"),
        ("prompt_syntax", "a fox <lora:fox:0.8>"),
        ("prompt_syntax", "**A fox** in the woods"),
        ("prompt_syntax", "a fox with cfg scale 7 and 20 sampling steps"),
        ("prompt_syntax", "a fox like on https://example.org"),
        ("other_language", "Je voudrais un petit renard roux dans la neige, s'il vous plaît"),
        ("other_language", "quiero una imagen de un zorro en la nieve"),
        ("other_language", "Ich hätte gern ein Bild von einem kleinen Fuchs im Schnee"),
        ("other_language", "请给我画一只雪地里的狐狸"),
        ("other_language", "нарисуй мне лису в снегу"),
        ("repeats_itself", "a fox in the woods, a fox in the woods, a fox in the woods, a fox in the woods"),
    ],
)  # fmt: skip
def test_each_problem_has_its_name(task, name, text):
    problem = problem_of([text], task())
    assert problem is not None and problem.name == name
    assert "\n" not in problem.detail and len(problem.detail) <= 121


def test_every_message_of_a_history_is_checked(task):
    history = task(targets=("a fox", "a red fox"), kind="history")
    assert problem_of([GOOD, "Make it red."], history) is None
    assert problem_of([GOOD, "I cannot help with that."], history).name == "refusal"
    assert problem_of([GOOD], history).name == "wrong_turns"
    assert problem_of([GOOD, "Make it red.", "And blue."], history).detail == "3 messages instead of 2"


def test_a_short_prompt_can_be_said_as_it_is(task, demonstration):
    short = task(targets=("a red fox",), demonstration=demonstration(prompt="a red fox"))
    assert problem_of(["can i have a red fox please"], short) is None


def test_a_title_that_is_an_everyday_word_or_in_the_prompt_can_be_said(task, demonstration):
    assert problem_of([GOOD], task(demonstration=demonstration(model="Fox - v1"))) is None
    wanted = task(demonstration=demonstration(model="Red Fox - v1"))
    assert problem_of(["Please show me one red fox outside."], wanted) is None


def test_all_checks_are_explained():
    assert set(CHECKS) <= set(EXPLANATIONS)


def test_what_the_template_says_passes(task, demonstration):
    from align.bench.chatgen.planning import plan_chats
    from align.bench.chatgen.prompt_wording import PromptWording

    wording = PromptWording()
    tasks = plan_chats([demonstration()], seed=0, per_demonstration=60, wording=wording, references=lambda *_: None)
    chats = [chat for chat in TemplatePlayer(wording).play(tasks) if chat.problem is None]
    problems = [problem_of(chat.texts, chat.task) for chat in chats]
    assert len(chats) >= 55 and problems.count(None) >= 0.95 * len(chats), problems


def test_hostile_texts_take_no_time(task):
    wanted = task()
    started = time.perf_counter()
    for text in ("(" * 50_000, "a:" * 50_000, "<" * 50_000, "here is a " * 5_000, "i am sorry, " * 5_000, "é" * 50_000):
        problem_of([text], wanted)
    assert time.perf_counter() - started < 10


def naive_run(first, second):
    return max(
        (second[i:j] for i in range(len(second)) for j in range(i, len(second) + 1)
         if any(first[k : k + j - i] == second[i:j] for k in range(len(first) + 1))),
        key=len, default=[],
    )  # fmt: skip


def test_longest_common_run_is_the_naive_one():
    rng = random.Random(0)
    for _ in range(200):
        first, second = ([rng.choice("abc") for _ in range(rng.randrange(9))] for _ in range(2))
        assert len(longest_common_run(first, second)) == len(naive_run(first, second))
        found = longest_common_run(first, second)
        assert not found or any(first[k : k + len(found)] == found for k in range(len(first)))


def test_the_papers_prompt_is_word_for_word():
    assert SYSTEM.startswith("You are a professional user experience designer who plays various personas to convert")
    assert SYSTEM.endswith("The converted single-text query should be colloquial and as brief as possible.")
