"""Several seeds in one table."""

import csv

import pytest

from align.evaluation.comparison import Comparison, ComparisonError, save_comparison
from align.evaluation.diffagent_tables import write_tables
from align.evaluation.pool import PoolTablesConfig, main, pool


@pytest.fixture
def runs(tmp_path, by_hand):
    """Two runs of one prompt each and three methods; alone, each would scale its scores to [0, 1]."""
    row, about = by_hand
    values = {"seed0": {"Baseline": 0.0, "SFT": 1.0, "RRHF": 2.0}, "seed1": {"Baseline": 1.0, "SFT": 1.0, "RRHF": 4.0}}
    folders = []
    for name, of_method in values.items():
        rows = [
            row(method, prompt, {"clip_score": [v, v], "brightness": [v, v]}, hallucinated=v == 1.0 and method == "SFT")
            for method, v in of_method.items()
            for prompt in ("a", "b")[: 1 + (name == "seed1")]
        ]
        folders.append(tmp_path / name / "tables")
        agents = {"SFT": f"{name}/sft", "RRHF": f"{name}/rrhf"}
        write_tables(folders[-1], Comparison(about(agents=agents), rows))
    return folders


def test_scores_are_scaled_jointly_and_runs_count_alike(runs, tmp_path):
    tables = pool(runs, tmp_path / "pooled")
    rows = {row["method"]: row for row in tables["table2"]["rows"]}
    # The range is 0 to 4: RRHF has 0.5 in the first run and 1 in the second, which has two prompts.
    rrhf = rows["RRHF"]["unified"]
    assert (rrhf["value"], rrhf["n"]) == (pytest.approx(0.75), 3)
    assert rrhf["runs"] == pytest.approx({"seed0/tables": 0.5, "seed1/tables": 1.0})
    assert (rrhf["low"], rrhf["high"]) == pytest.approx((0.5, 1.0))  # runs are drawn, too
    difference = next(row for row in tables["table2"]["differences"] if row["against"] == "SFT")
    assert difference["unified"]["runs"] == pytest.approx({"seed0/tables": 0.25, "seed1/tables": 0.75})
    assert difference["wins"] == 3
    assert tables["table2"]["agents"] == {"SFT": "seed0/sft, seed1/sft", "RRHF": "seed0/rrhf, seed1/rrhf"}
    assert tables["table1"]["rows"][0]["hallucination"]["runs"] == {"seed0/tables": 1.0, "seed1/tables": 1.0}
    selection = tables["table2"]["selection"][0]
    assert selection["distinct_models"] == 1 and selection["runs"]["seed1/tables"]["calls"] == 2


def test_every_run_is_shown(runs, tmp_path):
    main(PoolTablesConfig([str(path) for path in runs], str(tmp_path / "pooled")))
    text = (tmp_path / "pooled" / "table2.md").read_text()
    assert "Mean of 2 runs" in text and "| RRHF | DABench | seed0/tables | 200.0 | 2.000 | 50.0 |" in text
    lines = list(csv.DictReader((tmp_path / "pooled" / "table2.csv").open()))
    of_rrhf = [line for line in lines if line["method"] == "RRHF" and not line["against"]]
    assert [(line["run"], float(line["unified"])) for line in of_rrhf] == [
        ("", 0.75), ("seed0/tables", 0.5), ("seed1/tables", 1.0),
    ]  # fmt: skip
    assert "seed1/tables" in (tmp_path / "pooled" / "config.yaml").read_text()


def test_one_run_is_itself(runs, tmp_path):
    tables = pool(runs[:1], tmp_path / "pooled")
    assert "runs" not in tables["table2"]["rows"][0]["unified"]


def test_a_baseline_may_be_described_in_other_words(runs, tmp_path, by_hand, comparison):
    _, about = by_hand
    call = about().baseline_call
    for name, change in (("same", {"model description": "Other tags."}), ("other", {"sampling steps": 21})):
        changed = Comparison(about(baseline_call=call | change), comparison.rows)
        save_comparison(tmp_path / name, changed)
    assert pool([runs[0], tmp_path / "same"], tmp_path / "out")["table1"]
    with pytest.raises(ComparisonError, match=r"`baseline_call` is {.*'sampling steps': 21"):
        pool([runs[0], tmp_path / "other"], tmp_path / "out")


def test_what_can_not_be_pooled(runs, tmp_path, by_hand, comparison):
    row, about = by_hand
    save_comparison(tmp_path / "other", Comparison(about(num_images=9), comparison.rows))
    pool(runs, tmp_path / "pooled")
    for folders, output, message in [
        ([], "out", "must name different folders"),
        ([runs[0], runs[0]], "out", "must name different folders"),
        (runs, runs[1], "is one of `runs`"),
        ([runs[0], tmp_path / "gone"], "out", "There is no .*gone"),
        ([runs[0], tmp_path / "other"], "out", r"other can't be pooled with .*`num_images` is 9 and 2"),
        ([runs[0], tmp_path / "pooled"], "out", "is pooled already"),
    ]:
        with pytest.raises(ComparisonError, match=message):
            pool(folders, tmp_path / output)
