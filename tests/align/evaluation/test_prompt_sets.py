"""Prompt files in the shapes they are published in."""

from pathlib import Path

import pytest

from align.evaluation.prompt_sets import PromptFileError, dabench_prompts, read_prompts

PROMPTS = Path(__file__).parents[4] / "shared" / "data" / "prompts"


def test_tsv_of_parti_prompts(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        "Prompt\tCategory\tChallenge\tNote\n"
        "bond\tAbstract\tBasic\tx\n"
        'a sign that says "Deep Learning"\tWorld\tWriting\t\n'
        '"quoted" and, with a comma\tWorld\tBasic\t\n'
        "\tEmpty\tBasic\t\n"
        "  padded  \tWorld\tBasic\t\n",
        encoding="utf-8",
    )
    found = read_prompts("PartiPrompts", path, None, 0)
    assert found.name == "PartiPrompts" and found.references is None
    assert found.instructions == [
        "bond",
        'a sign that says "Deep Learning"',
        '"quoted" and, with a comma',
        "padded",
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "coco.tsv",
            b"id\timage_id\tcaption\n70\t9\tA city at night.\r\n71\t9\tA clock.\r\n",
            ["A city at night.", "A clock."],
        ),
        ("short.tsv", b"id\tcaption\n1\n2\tA cat.\n", ["A cat."]),  # a row that is cut off has no prompt
        ("p.csv", b'text,source\n"a fox, red","x"\n"two\nlines",y\n', ["a fox, red", "two\nlines"]),
        ("P.CSV", b"\xef\xbb\xbfPROMPT \r\nfox\r\n", ["fox"]),  # byte order mark of a spreadsheet
        ("P.TSV", b"Prompt\tNote\nfox\tx\n", ["fox"]),
        ("p.txt", b"\xef\xbb\xbffox\r\n\n  cat \nlast", ["fox", "cat", "last"]),
        ("p.jsonl", b'{"id": 1, "caption": "a fox"}\n\n{"Prompt": " cat\\n"}\n{"text": null}\n', ["a fox", "cat"]),
        ("p.prompts", "füchsin\nline\u2028separator\n".encode(), ["füchsin", "line\u2028separator"]),
    ],
)
def test_other_shapes(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert read_prompts("x", tmp_path / name, None, 0).instructions == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            b"Title\tCategory\nfox\tx\n",
            r"a\.tsv has no column Prompt, caption or text, but \['Title', 'Category'\]",
        ),
        ("a.tsv", b"", r"a\.tsv has no column Prompt.* but None"),
        ("a.csv", b"prompt\n\n \n", r"a\.csv holds no prompt"),
        ("a.txt", b"\n  \n", r"a\.txt holds no prompt"),
        ("a.txt", b"caf\xe9\n", r"a\.txt can't be read as UTF-8"),
        ("a.jsonl", b'{"title": "fox"}\n', r"a\.jsonl has a line without a text Prompt.*: \{'title': 'fox'\}"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl has a line without a text"),
        ("a.jsonl", b'{"text": "fox"}\nfox\n', r"a\.jsonl can't be read as JSON Lines"),
        ("a.csv", b'prompt\n"' + b"x" * 200_000 + b'"\n', r"a\.csv can't be read .*field larger"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptFileError, match=message):
        read_prompts("x", tmp_path / name, None, 0)


def test_missing_file(tmp_path):
    with pytest.raises(PromptFileError, match=r"no prompt file at .*nowhere\.tsv"):
        read_prompts("x", tmp_path / "nowhere.tsv", None, 0)


def test_a_seeded_choice(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(100)))
    everything = read_prompts("x", path, None, 0).instructions
    ten = read_prompts("x", path, 10, 0).instructions
    assert len(set(ten)) == 10 and set(ten) < set(everything)
    assert read_prompts("x", path, 10, 0).instructions == ten
    assert read_prompts("x", path, 10, 1).instructions != ten
    assert read_prompts("x", path, 100, 0).instructions == read_prompts("x", path, 500, 0).instructions == everything


def test_dabench_rows():
    rows = [{"id": str(i), "instruction": {"prompt": f"p{i}"}, "api": {"model": f"m{i}"}} for i in range(20)]
    whole = dabench_prompts(rows, None, 0)
    assert whole.name == "DABench"
    assert whole.instructions == [{"prompt": f"p{i}"} for i in range(20)]
    some = dabench_prompts(rows, 5, 3)
    assert len(some.instructions) == 5 == len(some.references)
    for instruction, reference in zip(some.instructions, some.references, strict=True):
        assert instruction["prompt"][1:] == reference["model"][1:]  # still belong together
    assert dabench_prompts(rows, 5, 3) == some != dabench_prompts(rows, 5, 4)
    assert dabench_prompts(rows, 20, 0) == whole


@pytest.mark.parametrize(
    ("file", "count", "first"),
    [
        ("PartiPrompts.tsv", 1632, "bond"),
        ("coco2014_captions_5k.tsv", 5000, "A city at night with people walking around."),
    ],
)
def test_published_files(file, count, first):
    path = PROMPTS / file
    if not path.is_file():
        pytest.skip(f"the published {file} is not here")
    whole = read_prompts("x", path, None, 0).instructions
    assert (len(whole), whole[0]) == (count, first)
    assert all(prompt == prompt.strip() != "" and "\t" not in prompt for prompt in whole)
    chosen = read_prompts("x", path, 1000, 0).instructions  # as many as DiffAgent Sec. 4.1 takes
    assert len(chosen) == 1000 and set(chosen) <= set(whole)
    assert read_prompts("x", path, 1000, 0).instructions == chosen
