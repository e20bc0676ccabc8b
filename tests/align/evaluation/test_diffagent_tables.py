"""Tables 1 and 2 on made-up scores, worked out by hand."""

import csv
import json
import math

import pytest

from align.evaluation.comparison import Comparison, load_comparison, unify
from align.evaluation.diffagent_tables import number, table1, table2, write_tables
from align.evaluation.metrics import bootstrap
from rewards.unified import UnifiedMetric


def find(rows, method, **others):
    return next(r for r in rows if r["method"] == method and all(r[k] == v for k, v in others.items()))


def test_table_1(comparison):
    table = table1(comparison)
    assert [row["method"] for row in table["rows"]] == ["SFT", "RRHF"]  # who answers
    assert find(table["rows"], "SFT")["hallucination"] == bootstrap([0, 1, 0])._asdict()
    assert find(table["rows"], "SFT")["reasons"] == {"not_json": 1}
    assert find(table["rows"], "RRHF")["hallucination"]["value"] == 0  # what can't be drawn is no hallucination


def test_table_2(comparison):
    table = table2(unify(comparison, "a test")[0])
    values = {row["method"]: row["unified"]["value"] for row in table["rows"]}
    assert values == pytest.approx({"Baseline": 1.1 / 3, "SFT": 1.1 / 3, "RRHF": 2.275 / 3})
    rrhf = find(table["rows"], "RRHF")
    assert rrhf["clip_score"]["value"] == pytest.approx((1.0 + 0.7 + 0.7) / 3)
    assert rrhf["brightness"]["n"] == 3
    assert rrhf["not_drawn"] == {"missing_file": 1} and rrhf["hallucinated"] == 0
    assert rrhf["baseline_stands_in"] == pytest.approx(1 / 3)
    assert find(table["rows"], "SFT")["hallucinated"] == pytest.approx(1 / 3)
    assert find(table["rows"], "SFT")["not_drawn"] == {}


def test_differences_are_of_the_same_prompt(comparison):
    differences = table2(unify(comparison, "a test")[0])["differences"]
    assert [(row["method"], row["against"]) for row in differences] == [
        ("SFT", "Baseline"), ("RRHF", "Baseline"), ("RRHF", "SFT"),
    ]  # fmt: skip
    sft = find(differences, "SFT")
    assert sft["unified"]["value"] == pytest.approx((0.5 + 0 - 0.5) / 3, abs=1e-6)
    assert (sft["wins"], sft["ties"], sft["losses"]) == (1, 1, 1)
    assert sft["win_rate"] == bootstrap([1, 0])._asdict()
    rrhf = find(differences, "RRHF", against="SFT")
    assert rrhf["unified"]["value"] == pytest.approx((0.175 + 0.5 + 0.5) / 3, abs=1e-6)
    assert rrhf["unified"]["low"] >= 0.17  # no prompt is worse
    assert (rrhf["wins"], rrhf["win_rate"]["value"]) == (3, 1)
    # Paired: other prompts in another order change nothing, prompts without pictures are left out.
    shuffled = Comparison(comparison.about, comparison.rows[::-1])
    again = find(table2(unify(shuffled, "a test")[0])["differences"], "RRHF", against="SFT")
    assert again["unified"]["value"] == pytest.approx(rrhf["unified"]["value"])


def test_only_ties_have_no_win_rate(comparison):
    same = [
        row | {"scores": comparison.rows[0]["scores"], "means": comparison.rows[0]["means"]} for row in comparison.rows
    ]
    sft = find(table2(unify(Comparison(comparison.about, same), "a test")[0])["differences"], "SFT")
    assert sft["win_rate"] is None and sft["ties"] == 3


def test_models_chosen(comparison):
    selection = table2(unify(comparison, "a test")[0])["selection"]
    sft, rrhf = selection
    # SFT: City, (a hallucination), Fox; RRHF: City, City, Fox, of which one can't be drawn.
    assert (sft["calls"], sft["distinct_models"], sft["entropy"]) == (2, 2, pytest.approx(math.log(2)))
    assert sft["effective_models"] == pytest.approx(2)
    expected = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert (rrhf["calls"], rrhf["distinct_models"], rrhf["entropy"]) == (3, 2, pytest.approx(expected))


def test_prompt_sets_are_apart(comparison, by_hand):
    row, about = by_hand
    bright = {"clip_score": [0.5, 0.5], "brightness": [15.0, 15.0]}
    others = [row(method, "x", bright, prompt_set="Parti|Prompts") for method in about().methods]
    rows = [*comparison.rows, *others]
    table = table2(unify(Comparison(about(prompt_sets=["DABench", "Parti|Prompts"]), rows), "a test")[0])
    assert find(table["rows"], "RRHF", prompts="DABench")["unified"]["value"] == pytest.approx(2.275 / 3)
    other = find(table["rows"], "RRHF", prompts="Parti|Prompts")["unified"]
    assert (other["value"], other["n"]) == (pytest.approx(0.5), 1)


def test_files(comparison, tmp_path):
    tables = write_tables(tmp_path, comparison)
    for name in ("table1", "table2"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == tables[name]
    assert UnifiedMetric.load(tmp_path / "unified.json").scales["brightness"].high == 20
    assert load_comparison(tmp_path).rows[6]["unified"] == pytest.approx(0.875)
    text = (tmp_path / "table1.md").read_text()
    assert "| SFT | DABench | 3 | 33.3 [0.0, 100.0] | not_json 33.3% |" in text
    text = (tmp_path / "table2.md").read_text()
    assert "| method | prompts | n | CLIP Score | brightness | Unified | hallucinated | not drawn |" in text
    # RRHF: clip score 0.8, between 0.7 and 1; brightness 17.17; unified 0.758.
    scores = "80.0 [70.0, 100.0] | 17.167 [17.000, 17.500] | 75.8 [70.0, 87.5]"
    assert f"| RRHF | DABench | 3 | {scores} | 0.0% | missing_file 1 |" in text
    assert "| RRHF − SFT | DABench |" in text and "100.0 [100.0, 100.0] (3, 0, 0)" in text
    lines = list(csv.DictReader((tmp_path / "table2.csv").open()))
    assert [line["method"] for line in lines] == ["Baseline", "SFT", "RRHF", "SFT", "RRHF", "RRHF"]
    assert float(lines[2]["clip_score"]) == pytest.approx(0.8) and lines[5]["against"] == "SFT"
    assert lines[2]["n"] == "3" and lines[2]["run"] == ""


@pytest.mark.parametrize(
    ("value", "name", "sign", "text"),
    [
        (0.832, "clip_score", "", "83.2"), (0.26834, "hps_v2", "", "26.83"), (-0.0001, "unified", "+", "0.0"),
        (0.012, "unified", "+", "+1.2"), (5.25, "aesthetic", "", "5.250"), (None, "unified", "", ""),
    ],
)  # fmt: skip
def test_numbers_for_people(value, name, sign, text):
    assert number(value, name, sign=sign) == text
