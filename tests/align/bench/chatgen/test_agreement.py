"""Agreement against worked examples from the literature, and what decisions about a row come to."""

import itertools
import random

import pytest

from align.bench.chatgen.agreement import (
    PairAgreement,
    apply_decisions,
    cohens_kappa,
    disagree,
    krippendorffs_alpha,
    outcome,
    pair_agreements,
    percent_agreement,
)
from align.bench.chatgen.review_store import Decision, content_hash
from align.bench.chatgen.schema import image_part, message, row_features, text_part


def units(*raters):
    """Units of raters' labels, one character each; a dot: not rated."""
    return [
        {str(number): label for number, label in enumerate(labels) if label != "."}
        for labels in zip(*raters, strict=True)
    ]


# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011): sections A, B and C (nominal).
BINARY = units("0100000010", "1110010000")
NOMINAL = units("aabbdcccedda", "babbbccceddd")
MISSING = units("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def test_krippendorffs_own_examples():
    # A: 10 units; observed 8 of 20 coincidences off the diagonal, n0 = 14, n1 = 6: 1 - 19 * 8 / (2 * 14 * 6) = 0.095.
    assert krippendorffs_alpha(BINARY) == pytest.approx(1 - 19 * 8 / (2 * 14 * 6)) == pytest.approx(0.095, abs=5e-4)
    assert krippendorffs_alpha(NOMINAL) == pytest.approx(0.692, abs=5e-4)
    # C: four observers, missing values, one unit with a single label that is left out.
    assert krippendorffs_alpha(MISSING) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_three_coders_with_missing_values():
    # The example of Wikipedia's article on alpha: 15 units, two of them with one label or none.
    table = units(".....34121133.3", "1.213343.......", "..21344.21133.4")
    assert krippendorffs_alpha(table) == pytest.approx(0.691, abs=5e-4)


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        # Both yes, first only, second only, both no. p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5: 0.2 / 0.5.
        ((20, 5, 10, 15), 0.4),
        # The same p_o = 0.6 with other margins: p_e = 0.54 and 0.46.
        ((45, 15, 25, 15), 0.06 / 0.46),
        ((25, 35, 5, 35), 0.14 / 0.54),
    ],
)
def test_cohens_kappa(counts, kappa):
    pairs = [pair for pair, count in zip(["yy", "yn", "ny", "nn"], counts, strict=True) for _ in range(count)]
    first, second = zip(*pairs, strict=True)
    assert cohens_kappa(first, second) == cohens_kappa(second, first) == pytest.approx(kappa)


def test_what_is_not_defined_is_none():
    assert cohens_kappa([], []) is None
    assert cohens_kappa("kkk", "kkk") is None  # 0 / 0: there was nothing to disagree on
    assert cohens_kappa("kkk", "ddd") == 0
    assert cohens_kappa("kd", "dk") == -1
    assert krippendorffs_alpha([]) is percent_agreement([]) is None
    assert krippendorffs_alpha([{"a": "k"}, {"b": "d"}, {}]) is percent_agreement([{"a": "k"}]) is None
    assert krippendorffs_alpha([{"a": "k", "b": "k"}]) is None
    with pytest.raises(ValueError, match="as long as each other, but are 1 and 2"):
        cohens_kappa("k", "kk")


def test_percent_counts_pairs():
    # Three raters k k d: of the pairs one of three is equal; two raters k k: one of one. 2 of 4.
    assert percent_agreement([{"a": "k", "b": "k", "c": "d"}, {"a": "k", "b": "k"}, {"a": "d"}]) == 50
    assert percent_agreement(BINARY) == pytest.approx(60)


def test_pairs_are_of_those_who_rated_the_same():
    table = [{"anna": "k", "ben": "k"}, {"anna": "d", "ben": "k"}, {"anna": "d", "ben": "d"}, {"carl": "k"}]
    # p_o = 2/3; p_e = (1 * 2 + 2 * 1) / 9 = 4/9; kappa = (2/9) / (5/9).
    (pair,) = pair_agreements(table)
    assert pair[:3] == ("anna", "ben", 3) and pair.percent == pytest.approx(200 / 3)
    assert pair.kappa == pytest.approx(0.4)
    assert pair_agreements([{"b": "k", "a": "k"}]) == [PairAgreement("a", "b", 1, 100.0, None)]


def test_alpha_against_its_definition_written_out():
    """Alpha by its matrix of coincidences."""
    choose = random.Random(7)
    for _ in range(30):
        table = [
            {rater: choose.choice("kde") for rater in "abcd" if choose.random() < 0.7}
            for _ in range(choose.randint(2, 30))
        ]
        matrix = {pair: 0.0 for pair in itertools.product("kde", repeat=2)}
        for unit in table:
            for one, other in itertools.permutations(unit.values(), 2):
                matrix[one, other] += 1 / (len(unit) - 1)
        n_of = {label: sum(matrix[label, other] for other in "kde") for label in "kde"}
        n = sum(n_of.values())
        observed = sum(count for (one, other), count in matrix.items() if one != other)
        expected = sum(n_of[one] * n_of[other] for one, other in matrix if one != other) / (n - 1) if n > 1 else 0
        alpha = krippendorffs_alpha(table)
        assert alpha == (pytest.approx(1 - observed / expected) if expected else None)


def test_kappa_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra `eval`")
    choose = random.Random(3)
    for _ in range(20):
        first, second = (choose.choices("kde", [5, 2, 1], k=choose.randint(25, 40)) for _ in range(2))
        size = min(len(first), len(second))
        expected = metrics.cohen_kappa_score(first[:size], second[:size])
        assert cohens_kappa(first[:size], second[:size]) == pytest.approx(expected)


# What comes of a row


def row(number=0, text="a fox pls", **other):
    messages = [
        message("user", text_part(text), image_part("a.png"), text_part("thx")),
        message("assistant", text_part("Here it is.")),
    ]
    return {"id": f"d/{number}", "messages": messages, "prompt": "fox, 8k", "model": "Pixel", "role": "cook"} | other


def says(chat, reviewer, verdict, reason=None, texts=None, *, settles=False, number=1):
    return Decision(chat["id"], content_hash(chat), reviewer, verdict, reason, texts, settles, number=number)


KEEP, DROP, EDIT = ("keep",), ("drop", "irrelevant"), ("edit", None, ("a fox", "thx"))
OTHER_EDIT = ("edit", None, ("the fox", "thx"))


@pytest.mark.parametrize(
    ("votes", "reviews", "state"),
    [
        ([], 1, "unreviewed"),
        ([KEEP], 1, "keep"),
        ([KEEP], 2, "unreviewed"),
        ([KEEP, KEEP], 2, "keep"),
        ([DROP, ("drop", "other")], 2, "drop"),
        ([KEEP, DROP], 2, "conflict"),
        ([KEEP, DROP], 1, "conflict"),
        ([KEEP, EDIT], 2, "conflict"),
        ([EDIT, EDIT], 2, "edit"),
        ([EDIT, OTHER_EDIT], 2, "conflict"),
        ([KEEP, KEEP, DROP], 2, "keep"),
        ([EDIT, OTHER_EDIT, EDIT], 3, "edit"),
        ([KEEP, DROP, EDIT], 3, "conflict"),
    ],
)
def test_outcome(votes, reviews, state):
    opinions = [says(row(), f"r{i}", *vote, number=i + 1) for i, vote in enumerate(votes)]
    found = outcome(opinions, reviews=reviews)
    assert found.state == state and not found.settled
    assert (found.texts == EDIT[2]) == (state == "edit")
    assert disagree(opinions) == (len({vote[0::2] for vote in votes}) > 1)
    settled = outcome(opinions, says(row(), "x", *DROP, settles=True), reviews=reviews)
    assert settled == ("drop", "irrelevant", None, True)


def test_the_most_frequent_reason_counts_and_of_equals_the_first():
    reasons = ["other", "irrelevant", "irrelevant"]
    drops = [
        says(row(), name, "drop", reason, number=i) for i, (name, reason) in enumerate(zip("abc", reasons, strict=True))
    ]
    assert outcome(drops).reason == "irrelevant"
    assert outcome([drops[1], drops[0]]).reason == "other"


def test_apply_decisions():
    chats = [row(number) for number in range(8)]
    decisions = [
        says(chats[0], "anna", *KEEP), says(chats[0], "ben", *KEEP),
        says(chats[1], "anna", *DROP), says(chats[1], "ben", *DROP),
        says(chats[2], "anna", *EDIT), says(chats[2], "ben", *EDIT),
        says(chats[3], "anna", *KEEP), says(chats[3], "ben", *DROP),
        says(chats[4], "anna", *KEEP), says(chats[4], "ben", *DROP), says(chats[4], "carl", *OTHER_EDIT, settles=True),
        says(chats[5], "anna", *DROP),
        says(row(6, "another text"), "anna", *DROP), says(row(6, "another text"), "ben", *DROP),
        says(row(99), "anna", *DROP),
    ]  # fmt: skip
    before = [row(number) for number in range(8)]
    kept, counts = apply_decisions(chats, decisions, reviews=2)
    assert [chat["id"] for chat in kept] == ["d/0", "d/2", "d/4", "d/5", "d/6", "d/7"]
    assert counts == {
        "rows": 8, "kept": 6, "settled": 1, "changed": 1, "reasons": {"irrelevant": 1},
        "states": {"keep": 1, "edit": 2, "drop": 1, "conflict": 1, "unreviewed": 3},
    }  # fmt: skip
    assert chats == before  # nothing was changed in place
    edited = kept[1]["messages"]
    assert [part["text"] for part in edited[0]["content"]] == ["a fox", None, "thx"]
    assert edited[0]["content"][1] == image_part("a.png") and edited[1] == chats[2]["messages"][1]
    assert kept[2]["messages"][0]["content"][0]["text"] == "the fox"
    assert kept[0] == chats[0] and kept[1] | {"messages": chats[2]["messages"]} == chats[2]
    kept, _ = apply_decisions(chats, decisions, reviews=2, unreviewed="drop")
    assert [chat["id"] for chat in kept] == ["d/0", "d/2", "d/4"]
    kept, counts = apply_decisions(chats, decisions)  # one review is enough for row 5
    assert counts["states"]["drop"] == 2 and "d/5" not in {chat["id"] for chat in kept}
    with pytest.raises(ValueError, match="`unreviewed` must be keep or drop, but is 'maybe'"):
        apply_decisions(chats, decisions, unreviewed="maybe")


def test_a_row_is_the_same_in_json_and_in_arrow():
    from datasets import Dataset

    arguments = {"sampler": "Euler a", "steps": 20, "cfg_scale": 7, "width": 512, "height": 512}
    chat = row(arguments=arguments, input_type="single", generator="template")
    names = row_features()
    (stored,) = Dataset.from_list([{name: chat.get(name) for name in names}], features=names)
    assert stored["arguments"]["cfg_scale"] == 7.0 and stored["arguments"]["clip_skip"] is None
    assert content_hash(stored) == content_hash(chat)
    kept, _ = apply_decisions([stored], [says(chat, "anna", *EDIT)])
    assert kept[0]["messages"][0]["content"][2] == text_part("thx")
    assert kept[0]["messages"][0]["content"][0] == text_part("a fox")


def test_the_split_may_change_and_the_content_may_not():
    chat = row(arguments={"steps": 20, "cfg_scale": 7.0, "clip_skip": None})
    same = row(arguments={"cfg_scale": 7, "steps": 20}, split="test", setting="few_shot", source={"demonstration": "d"})
    assert content_hash(chat) == content_hash(same)
    for other in ({"prompt": "cat"}, {"model": "P2"}, {"role": "baker"}, {"arguments": {"steps": 21}}):
        assert content_hash(chat | other) != content_hash(chat)
