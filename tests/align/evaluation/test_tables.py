"""Tables for people and for programs say the same numbers."""

import csv
import io
import json
import re

from align.evaluation.tables import to_csv, to_markdown, write_table


def estimate(value, low, high, n=200):
    return {"value": value, "low": low, "high": high, "n": n}


REPORT = {
    "architecture": "SD 1.5",
    "catalog": 2424,
    "rows": [
        {
            "method": 'runs/a|b, "best"',
            "prompts": "DABench",
            "hallucination": estimate(0.125, 0.08, 0.1750001),
            "reasons": {"unknown_model": 20, "not_json": 5},
            "distinct_models": 1234,
            "seconds": 0.04321,
            "version_accuracy": estimate(1 / 3, 0.25, 0.42),
            "model_accuracy": estimate(0.5, 0.4, 0.6),
            "argument_accuracy": estimate(0.75, 0.7, 0.8),
            "one_at_a_time_seconds": 123.4,
        },
        {
            "method": "most popular model",
            "prompts": "PartiPrompts",
            "hallucination": estimate(0.0, 0.0, 0.0, 1000),
            "reasons": {},
            "distinct_models": 1,
            "seconds": None,
        },
    ],
}


def cells(line):
    """Cells of a Markdown table row; `\\|` is a character, not a border."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown():
    lines = to_markdown(REPORT).splitlines()
    assert lines[0] == "SD 1.5, 2,424 callable versions. Per cent, [95% bootstrap interval]."
    head, rule, first, second = lines[2:6]
    assert cells(head) == [
        "method",
        "prompts",
        "n",
        "hallucination",
        "right version",
        "right model",
        "arguments",
        "distinct models",
        "s/answer (batched)",
        "s (alone)",
    ]
    assert len(cells(rule)) == len(cells(first)) == len(cells(second)) == 10
    assert cells(first) == [
        'runs/a\\|b, "best"',
        "DABench",
        "200",
        "12.5 [8.0, 17.5]",
        "33.3 [25.0, 42.0]",
        "50.0 [40.0, 60.0]",
        "75.0 [70.0, 80.0]",
        "1,234",
        "0.043",
        "123",
    ]
    assert cells(second) == ["most popular model", "PartiPrompts", "1,000", "0.0 [0.0, 0.0]", "", "", "", "1", "", ""]
    # Of all 200 answers, and only for rows that have any.
    assert [cells(line) for line in lines[11:]] == [
        ['runs/a\\|b, "best"', "DABench", "unknown_model 10.0%, not_json 2.5%"]
    ]


def test_csv_gives_the_numbers_back():
    first, second = csv.DictReader(io.StringIO(to_csv(REPORT)))
    assert first["method"] == 'runs/a|b, "best"'
    row = REPORT["rows"][0]
    for name in ("hallucination", "version_accuracy", "model_accuracy", "argument_accuracy"):
        read = [float(first[name]), float(first[f"{name}_low"]), float(first[f"{name}_high"])]
        assert read == [row[name]["value"], row[name]["low"], row[name]["high"]]  # every digit
    assert (int(first["n"]), int(first["distinct_models"]), float(first["seconds"])) == (200, 1234, 0.04321)
    assert second["hallucination"] == "0.0" and second["version_accuracy"] == "" and second["seconds"] == ""


def test_three_files_are_written(tmp_path):
    write_table(tmp_path / "new", REPORT)
    assert json.loads((tmp_path / "new" / "table.json").read_text(encoding="utf-8")) == REPORT
    assert (tmp_path / "new" / "table.md").read_text(encoding="utf-8") == to_markdown(REPORT)
    assert (tmp_path / "new" / "table.csv").read_bytes().decode() == to_csv(REPORT)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["table.csv", "table.json", "table.md"]
