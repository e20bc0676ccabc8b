"""Chats that are written, compared and written anew."""

from dataclasses import replace

import pytest

from align.bench.chatgen.role_play import RolePlayReport, chat_words, drop_duplicates, write_chats
from align.bench.chatgen.schema import Chat
from align.evaluation.bert_score import BertScorer

SAID = [
    "Could you draw me a little fox out in the cold?",
    "could you draw me a little fox out in the cold please?",  # the same again
    "yo i want some red animal sitting around in winter, make it look hand painted",
    "Need a poster for our hiking club. Something with trees covered in ice!",
]


@pytest.fixture(scope="module")
def scorer(minilm):
    return BertScorer.from_pretrained(minilm, device="cpu")


class Scripted:
    """Says what the script has for (chat, attempt)."""

    def __init__(self, script):
        self.script, self.played = script, []

    def play(self, tasks):
        for task in tasks:
            self.played.append((task.id, task.attempt))
            said = self.script[task.id][task.attempt]
            yield Chat(task, (), "script", said[1:], "it broke") if said[0] == "!" else Chat(task, (said,), "script")


def again(task):
    return replace(task, attempt=task.attempt + 1)


def f1(peer, a, b):
    return peer([a], [b]).f1.item()


def test_near_copies_of_the_same_demonstration_are_dropped_the_later_one(scorer, task, demonstration):
    assert f1(scorer, SAID[0], SAID[1]) > 0.8 > max(f1(scorer, SAID[0], other) for other in SAID[2:])
    chats = [Chat(task(n), (text,), "script") for n, text in enumerate(SAID)]
    elsewhere = Chat(task(0, demonstration=demonstration("8-1")), (SAID[0],), "script")
    accepted = {}
    found = drop_duplicates([*chats, elsewhere], accepted, scorer, 0.8)
    assert [chat.problem for chat in found] == [None, "duplicate", None, None, None]
    assert "to chat 7-1/0" in found[1].detail
    assert [chat.task.number for chat in accepted["7-1"]] == [0, 2, 3] and accepted["8-1"] == [elsewhere]
    # Later rounds are compared with what was accepted before.
    (late,) = drop_duplicates([Chat(task(5), (SAID[1],), "script")], accepted, scorer, 0.8)
    assert late.problem == "duplicate"


def test_the_decision_is_that_of_a_naive_loop(scorer, task):
    texts = [
        f"{SAID[n % 4]} {word}" for n, word in enumerate(["now", "", "please", "thanks", "x", "in blue", "", "ok"])
    ]
    chats = [Chat(task(n), (text,), "script") for n, text in enumerate(texts)]
    kept = []
    for chat in chats:
        if all(f1(scorer, chat_words(other), chat_words(chat)) <= 0.7 for other in kept):
            kept.append(chat)
    accepted = {}
    drop_duplicates(chats, accepted, scorer, 0.7)
    assert accepted["7-1"] == kept and 1 < len(kept) < 8


def test_what_fails_is_written_anew_and_given_up_in_the_end(scorer, task):
    tasks = [task(n) for n in range(4)]
    script = {
        "7-1/0": [SAID[0]],
        "7-1/1": [SAID[1], "!refusal", SAID[2]],
        "7-1/2": ["!empty", "!empty", "!refusal"],
        "7-1/3": ["!other_language", SAID[3]],
    }
    player = Scripted(script)
    chats, report = write_chats(tasks, player, scorer, again, max_attempts=3)
    assert [(chat.task.id, chat.texts[0]) for chat in chats] == [
        ("7-1/0", SAID[0]), ("7-1/1", SAID[2]), ("7-1/3", SAID[3]),
    ]  # fmt: skip
    assert len(player.played) == 4 + 3 + 2
    assert report.to_dict() | {"examples": {}} == {
        "asked": 4,
        "written": {"script": 3},
        "problems": {"duplicate": 1, "empty": 2, "other_language": 1, "refusal": 2},
        "examples": {},
        "given_up": 1,
    }
    assert report.examples["refusal"] == ["7-1/1 by script: it broke", "7-1/2 by script: it broke"]


def test_nothing_is_asked_without_tasks_and_one_attempt_is_one(scorer, task):
    assert write_chats([], Scripted({}), scorer, again)[0] == []
    player = Scripted({"7-1/0": ["!empty"]})
    chats, report = write_chats([task(0)], player, scorer, again, max_attempts=1)
    assert (chats, report.given_up, player.played) == ([], 1, [("7-1/0", 0)])


def test_reports_add_up():
    total = RolePlayReport()
    for _ in range(3):
        one = RolePlayReport(asked=5, given_up=1, examples={"empty": ["a", "b"]})
        one.written["template"] = 4
        one.problems["empty"] = 2
        total.add(one.to_dict())
    assert total.to_dict() == {
        "asked": 15, "written": {"template": 12}, "problems": {"empty": 6}, "given_up": 3,
        "examples": {"empty": ["a", "b", "a"]},
    }  # fmt: skip
