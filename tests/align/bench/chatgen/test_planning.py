"""Which chats are planned: shares, roles, turns, and that nobody's depend on others."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from align.bench.chatgen.planning import plan_chats, retry_task
from align.bench.chatgen.roles import ROLES
from align.bench.chatgen.schema import SHARES, TURNS, Demonstration, Reference


class Tags:
    """A wording for comma-separated prompts: what is missing is asked for."""

    def picture(self, prompt, rng):
        return prompt

    def change(self, before, after, rng):
        return after

    def difference(self, reference_prompt, prompt, rng):
        return prompt

    def turns(self, prompt, number, rng):
        tags = prompt.split(", ")
        last = rng.sample(tags[1:], min(number, len(tags)) - 1)
        return tuple(", ".join(tag for tag in tags if tag not in last[at:]) for at in range(len(last) + 1))


def demonstrations(count, prompt="a, b, c, d, e, f"):
    return [Demonstration(str(number), prompt, "", "Model - v1", {}) for number in range(count)]


def a_reference(demonstration, rng):
    return Reference(f"{demonstration.id}-{rng.randrange(1000)}.png", "x")


def no_reference(demonstration, rng):
    return None


def plan(items, seed=0, per_demonstration=1, references=a_reference, **options):
    return list(plan_chats(items, seed=seed, per_demonstration=per_demonstration, wording=Tags(),
                           references=references, **options))  # fmt: skip


def shares_of(tasks):
    return {kind: count / len(tasks) for kind, count in Counter(task.input_type for task in tasks).items()}


def test_input_types_have_the_papers_shares():
    # Of 3,000: a standard deviation of 0.009 at most, so 0.03 is more than three.
    assert shares_of(plan(demonstrations(3_000))) == pytest.approx(
        {"single": 0.576, "multimodal": 0.271, "history": 0.153}, abs=0.03
    )


def test_what_is_not_possible_leaves_its_share_to_the_others():
    without = shares_of(plan(demonstrations(3_000), references=no_reference))
    # 0.576 / (0.576 + 0.153) and 0.153 / (0.576 + 0.153)
    assert without == pytest.approx({"single": 0.790, "history": 0.210}, abs=0.03)
    short = shares_of(plan(demonstrations(3_000, "a")))
    # 0.576 / (0.576 + 0.271)
    assert short == pytest.approx({"single": 0.680, "multimodal": 0.320}, abs=0.03)
    assert shares_of(plan(demonstrations(50, "a"), references=no_reference)) == {"single": 1}


def test_where_nothing_is_possible_there_is_no_chat():
    assert plan(demonstrations(5), shares={"multimodal": 1}, references=no_reference) == []
    assert len(plan(demonstrations(5), shares={"multimodal": 1, "history": 0})) == 5


def test_targets_and_references_are_those_of_the_type():
    for task in plan(demonstrations(300)):
        assert task.targets[-1] == task.demonstration.prompt and task.attempt == 0
        assert (len(task.targets) > 1) == (task.input_type == "history")
        assert (task.reference is not None) == (task.input_type == "multimodal")


def test_lengths_of_histories():
    tasks = plan(demonstrations(2_000), shares={"history": 1})
    lengths = Counter(len(task.targets) for task in tasks)
    assert {number: count / 2_000 for number, count in lengths.items()} == pytest.approx(dict(TURNS), abs=0.04)
    short = plan(demonstrations(200, "a, b"), shares={"history": 1})
    assert {len(task.targets) for task in short} == {2}  # fewer pieces than messages
    long = plan(demonstrations(20), shares={"history": 1}, turns={6: 1})
    assert {len(task.targets) for task in long} == {6}


def test_each_chat_of_a_demonstration_is_by_another_role():
    tasks = plan(demonstrations(3), per_demonstration=len(ROLES))
    for number in range(3):
        own = [task for task in tasks if task.demonstration.id == str(number)]
        assert [task.id for task in own] == [f"{number}/{i}" for i in range(len(ROLES))]
        assert {task.role for task in own} == set(ROLES)
    first = {task.role for task in plan(demonstrations(400))}
    assert len(first) > 0.9 * len(ROLES)  # 114 * (1 - e^(-400/114)) = 111 are expected


def test_chats_of_a_demonstration_depend_on_no_other():
    items = demonstrations(60)
    tasks = plan(items, per_demonstration=3)
    shuffled = random.Random(1).sample(items, 20)
    some = plan(shuffled, per_demonstration=3)
    by_id = {task.id: task for task in tasks}
    assert len(some) == 60 and all(by_id[task.id] == task for task in some)
    assert plan(items, per_demonstration=3) == tasks
    assert sum(task == other for task, other in zip(tasks, plan(items, seed=1, per_demonstration=3), strict=True)) < 10


def test_retry_keeps_all_but_words_and_steps():
    for task in plan(demonstrations(100)):
        again = retry_task(task, seed=0, wording=Tags())
        assert again == replace(task, attempt=1, targets=again.targets)
        assert len(again.targets) == len(task.targets) and again.targets[-1] == task.targets[-1]
        assert retry_task(task, seed=0, wording=Tags()) == again
        assert retry_task(again, seed=0, wording=Tags()).attempt == 2
    histories = plan(demonstrations(50), shares={"history": 1})
    changed = [retry_task(task, seed=0, wording=Tags()).targets != task.targets for task in histories]
    assert sum(changed) > 30


def test_retry_keeps_the_steps_where_there_are_no_others():
    (task,) = plan(demonstrations(1), shares={"history": 1})

    class Whole(Tags):
        def turns(self, prompt, number, rng):
            return (prompt,)

    assert retry_task(task, seed=0, wording=Whole()) == replace(task, attempt=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": {"single": 1, "poem": 1}}, "`shares` may hold single, multimodal, history, but has poem"),
        ({"shares": {}}, "`shares` must be 0 or more and not all 0"),
        ({"shares": {"single": 0}}, "`shares` must be 0 or more and not all 0"),
        ({"shares": {"single": 2, "history": -1}}, "`shares` must be 0 or more"),
        ({"shares": {"single": float("nan")}}, "`shares` must be 0 or more"),
        ({"turns": {}}, "`turns` must be 0 or more"),
        ({"turns": {1: 0.5, 2: 0.5}}, r"A history has 2 messages or more, but `turns` has \[1\]"),
        ({"per_demonstration": 0}, "`per_demonstration` must be 1 to 114 roles, but is 0"),
        ({"per_demonstration": 115}, "`per_demonstration` must be 1 to 114 roles, but is 115"),
    ],
)
def test_errors_come_at_once(options, message):
    arguments = {"seed": 0, "per_demonstration": 1, "shares": SHARES, "wording": Tags(), "references": a_reference}
    with pytest.raises(ValueError, match=message):
        plan_chats(demonstrations(1), **arguments | options)  # nothing was asked of the iterator
