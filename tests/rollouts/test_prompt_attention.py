import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.prompt_attention import parse_attention


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("unbalanced)", [("unbalanced)", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"back\slash \\(", [(r"back\slash " + "\\", 1)]),
        ("(unnecessary)(brackets)", [("unnecessarybrackets", 1.1)]),
        ("[less] (more:1.5)", [("less", 1 / 1.1), (" ", 1), ("more", 1.5)]),
        ("(half:.5) (minus:-1) (space: 2 )", [("half", 0.5), (" ", 1), ("minus", -1), (" ", 1), ("space", 2)]),
        ("time: 12:30) (no number:x)", [("time: 12:30) ", 1), ("no number:x", 1.1)]),
        ("(1.2.3:1.2.3)", [("1.2.3:1.2.3", 1.1)]),
        (  # A1111's own example; its first bracket is never closed
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
                ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("", []),
    ],
)  # fmt: skip
def test_weights(prompt, expected):
    (section,) = parse_attention(prompt)
    assert [text for text, _ in section] == [text for text, _ in expected]
    assert [weight for _, weight in section] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("(a BREAK b:1.2) c", [["a"], ["b", " c"]]),
        ("aBREAK BREAKb breaks", [["aBREAK BREAKb breaks"]]),
        ("a BREAK", [["a"]]),
        ("BREAK a", [[], ["a"]]),
        ("a BREAK BREAK b", [["a"], [], ["b"]]),
        ("BREAK", [[]]),
    ],
)
def test_break_begins_a_section(prompt, expected):
    assert [[text for text, _ in section] for section in parse_attention(prompt)] == expected


@given(st.text(alphabet="ab ()[]:\\.12,", max_size=40))
def test_any_text_is_read_and_no_letter_is_lost(prompt):
    sections = parse_attention(prompt)
    letters = "".join(text for section in sections for text, _ in section)
    assert [c for c in letters if c in "ab,"] == [c for c in prompt if c in "ab,"]
    assert all(weight == weight and abs(weight) < float("inf") for section in sections for _, weight in section)
