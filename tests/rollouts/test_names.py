"""Names of models come from strangers and go into prompts, tables, logs and web pages."""

import random
import unicodedata

import pytest

from rollouts.names import MAX_NAME_LENGTH, clean_name, name_problem


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Pixel Wave - v10", "Pixel Wave - v10"),
        ("  many   spaces\t\nand lines ", "many spaces and lines"),
        ("<b>Bold</b> Model", "Bold Model"),
        ("<script>alert(1)</script>", "alert(1)"),
        ("<<i>x</i>>", "x"),
        ("a < b > c", "a c"),  # what stands between angle brackets reads as markup
        ("5 > 3", "5 3"),
        ("bell\x07 null\x00 esc\x1b[31m", "bell null esc [31m"),
        ("left\u202eright", "left right"),  # right-to-left override: would turn a table's text around
        ("zero\u200bwidth", "zero width"),
        ("e\u0301clair", "\u00e9clair"),  # composed (NFC)
        ("non\u00a0breaking\u3000wide", "non breaking wide"),
        ("水彩画 🦊", "水彩画 🦊"),
        ("../../etc/passwd", "../../etc/passwd"),
        ("", ""),
    ],
)
def test_clean_name(title, expected):
    assert clean_name(title) == expected


@pytest.mark.parametrize(
    "name",
    [
        "Pixel Wave - v10",
        "水彩画 🦊",
        "A/B test",
        "1.5 .. 2.0",
        "C: the movie",
        "Tom & Jerry's | v1",
        "...",
        "m" * 300,
        "-",
    ],
)
def test_usable_names(name):
    assert name_problem(name) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "non-empty"),
        ("<b>Bold</b>", "without markup"),
        ("tab\tname", "control characters"),
        ("line\nname", "control characters"),
        ("two  spaces", "repeated spaces"),
        (" padded", "non-empty text"),
        ("e\u0301clair", "non-empty text"),
        ("m" * (MAX_NAME_LENGTH + 1), "at most 300 characters long, but has 301"),
        ("/etc/passwd", "path"),
        ("\\\\server\\share", "path"),
        ("~/.ssh/id_rsa", "path"),
        ("C:\\Windows", "path"),
        ("c:/Windows", "path"),
        ("..", "path"),
        ("../up", "path"),
        ("models/../../up", "path"),
        ("models\\..\\up", "path"),
    ],
)
def test_names_that_are_refused(name, problem):
    assert problem in str(name_problem(name))


def test_cleaning_is_done_in_one_go():
    rng = random.Random(0)
    awkward = "<>/b \t\n\x00\u0301e\u202e\u200b\u1100\u1161\ue000"
    for _ in range(2000):
        text = "".join(rng.choice(awkward) if rng.random() < 0.7 else chr(rng.randrange(0xD800)) for _ in range(12))
        cleaned = clean_name(text)
        assert clean_name(cleaned) == cleaned
        assert not any(unicodedata.category(c)[0] == "C" or c in "<>" for c in cleaned)
        assert not cleaned or name_problem(cleaned) in (None, "must not look like a path")
