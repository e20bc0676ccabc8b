"""report.html: what stands in it, and that nothing hostile does."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from align.evaluation.comparison import Comparison, ComparisonError
from align.evaluation.diffagent_tables import write_tables
from align.evaluation.report import ReportConfig, ReportError, main, write_report
from rollouts.scored_table import write_scored

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>\'"</td></svg>&amp;'


@pytest.fixture
def folder(tmp_path, comparison, pictures):
    """Tables of the comparison with pictures."""
    rows = [row | {"images": [pictures[number % 2], "gone.png"]} for number, row in enumerate(comparison.rows)]
    write_tables(tmp_path / "tables", Comparison(comparison.about, rows))
    return tmp_path / "tables"


def test_what_stands_in_it(read_page, folder):
    path = main(ReportConfig(str(folder), title="Nine pictures"))
    page = read_page(path.read_text())
    assert page.tags["img"] == 9 and page.tags["svg"] == 1 and page.tags["script"] == 0
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert Counter(source[:15] for source in sources) == {"data:image/png;": 5, "data:image/jpeg": 4}
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
    assert page.tags["h1"] == 1 and page.tags["caption"] == page.tags["table"] == 4
    for text in (
        "Nine pictures", "Table 1: hallucination", "not_json 33.3%", "missing_file 1", "RRHF − SFT", "75.8",
        "70.0 to 87.5", "won 3, tied 0, lost 0", "prompt a", "hallucination (not_json): baseline’s picture",
        "Fox - v1 not drawn (missing_file): baseline’s picture", "Euler a, 20 steps, cfg 7", "unified 87.5 best",
    ):  # fmt: skip
        assert text in page.text, text
    # Prompt a: RRHF; b: RRHF; c: Baseline and RRHF, whose pictures are the same.
    assert [value for _, name, value in page.attributes if name == "class"].count("picture best") == 4


def test_nothing_is_fetched_and_nothing_runs(read_page, folder, tmp_path, comparison, pictures):
    """Hostile text wherever text comes from outside: prompts, models, agents, reasons, sets, titles, candidates."""
    names = {"SFT": f"SFT{HOSTILE}", "RRHF": "RRHF", "Baseline": "Baseline"}
    call = json.dumps(comparison.about.baseline_call | {"model": f"M{HOSTILE}", "sampling method": HOSTILE})
    bad = {"prompt": HOSTILE, "prompt_set": HOSTILE, "drawn_call": call, "call": call, "images": [pictures[0]]}
    rows = [row | bad | {"method": names[row["method"]]} for row in comparison.rows]
    rows[4] |= {"reason": HOSTILE, "call": None}
    rows[8] |= {"not_drawn": HOSTILE}
    about = replace(
        comparison.about, prompt_sets=[HOSTILE], methods=[*names.values()][::-1], answering=[names["SFT"], "RRHF"],
        agents={names["SFT"]: HOSTILE, "RRHF": "b"}, ours=names["SFT"],
        baseline_call=comparison.about.baseline_call | {"model": HOSTILE},
    )  # fmt: skip
    write_tables(folder, Comparison(about, rows))
    candidate = {
        "response": HOSTILE,
        "call": json.loads(call),
        "origin": HOSTILE,
        "seeds": [1],
        "images": [pictures[0]],
    }
    candidate |= {"scores": {"red": [1.0]}, "reward": 0.5, "reward_standard_error": 0.1, "error": HOSTILE}
    scored = {"prompt_id": "a", "instruction": {"prompt": HOSTILE, "negative prompt": ""}, "candidates": [candidate]}
    write_scored(tmp_path / "scored.parquet", [scored], ["red"])
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, f"loss{HOSTILE}": step}) + "\n" for step in (1, 2)))
    path = write_report(folder, title=HOSTILE, scored=tmp_path / "scored.parquet", metrics=[metrics])
    page = read_page(path.read_text())
    assert page.tags["script"] == 0 and page.tags["img"] == 10
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("data:image/")
    assert "http:" not in path.read_text().replace("http://www.w3.org/2000/svg", "") and "url(" not in path.read_text()
    assert page.text.count(HOSTILE) > 20
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and name == "content")
    assert policy.startswith("default-src 'none'")


def test_candidates_are_ranked_by_reward(read_page, folder, tmp_path, comparison, pictures):
    def candidate(model, reward, error=None):
        call = comparison.about.baseline_call | {"model": model} if model else None
        return {
            "response": "", "call": call, "origin": "multinomial", "seeds": [1],
            "images": [pictures[0]] if model else [], "scores": {"red": [reward]},
            "reward": reward, "reward_standard_error": 0.01, "error": error,
        }  # fmt: skip

    row = {
        "prompt_id": "a", "instruction": {"prompt": "a castle", "negative prompt": ""},
        "candidates": [candidate("Low", 0.2), candidate(None, None, "not_json: x"), candidate("High", 0.9)],
    }  # fmt: skip
    write_scored(tmp_path / "scored.parquet", [row], ["red"])
    text = read_page(write_report(folder, scored=tmp_path / "scored.parquet").read_text()).text
    assert text.index("1. High") < text.index("2. Low") < text.index("3. no call")
    assert text.rindex("not_json") > text.index("3. no call")
    assert "reward 0.900 ± 0.010" in text and "a castle" in text


def test_curves(read_page, folder, tmp_path):
    lines = [{"step": s, "loss": 1 / s, "rewards/accuracy": "nan", "eval_loss": 0.5, "lr": s} for s in (1, 2, 3)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read_page(write_report(folder, metrics=[metrics]).read_text())
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels[1:] == ["loss over training steps", "eval_loss over training steps"]


def test_a_report_of_limited_size(read_page, folder):
    whole = write_report(folder).read_text()
    path = write_report(folder, max_megabytes=0.05)
    page = read_page(path.read_text())
    assert 0 < page.tags["img"] < 9 and "left out: the report would be too large" in page.text
    assert f"all in all they may take 0.05 MB (option max_megabytes): {9 - page.tags['img']}." in page.text
    assert len(path.read_text()) < len(whole) - 100_000
    whole_page = read_page(whole)
    few = read_page(write_report(folder, num_prompts=1).read_text())
    assert few.tags["img"] == 3 and few.tags["h3"] == whole_page.tags["h3"] - 2


def test_pictures_that_are_gone_are_said(read_page, folder, pictures, tmp_path):
    (tmp_path / "small.png").unlink()
    page = read_page(write_report(folder).read_text())
    assert page.tags["img"] == 4 and "could not be read any more: 5." in page.text


def test_several_runs(read_page, tmp_path, comparison, pictures):
    rows = [
        row
        | {
            "run": run,
            "images": [pictures[0]],
            "scores": {name: [v + shift for v in values] for name, values in row["scores"].items()},
        }
        for run, shift in (("seed0", 0.0), ("seed1", 1.0))
        for row in comparison.rows
    ]
    write_tables(tmp_path, Comparison(replace(comparison.about, runs=["seed0", "seed1"]), rows))
    page = read_page(write_report(tmp_path).read_text())
    assert "The unified metric of each run.methodseed0seed1" in page.text and "of run seed0" in page.text
    assert page.tags["img"] == 9  # of the first run
    # Ranges are 0 to 2 and 10 to 21: RRHF's 1, 1 and 20, 15 of prompt a in the first run, and so on for b and c.
    a, b = (0.5 + 10 / 11 + 0.5 + 5 / 11) / 4, (0.3 + 6 / 11 + 0.4 + 8 / 11) / 4
    assert f"RRHF{100 * (a + 2 * b) / 3:.1f}" in page.text


def test_what_is_missing(tmp_path, folder):
    with pytest.raises(ComparisonError, match=r"There is no .*gone/per_prompt\.parquet"):
        write_report(tmp_path / "gone")
    with pytest.raises(ReportError, match="`metrics`: there is no file at"):
        write_report(folder, metrics=[tmp_path / "gone.jsonl"])
    with pytest.raises(ReportError, match=r"`scored` .*per_prompt\.parquet can't be read as scored candidates"):
        write_report(folder, scored=folder / "per_prompt.parquet")
    (folder / "table2.json").write_text("{")
    with pytest.raises(ReportError, match=r"table2\.json is not JSON"):
        write_report(folder)
    (folder / "table1.json").unlink()
    with pytest.raises(ReportError, match=r"Can't read .*table1\.json"):
        write_report(folder)
    for changes, message in [({"num_prompts": 0}, "`num_prompts`"), ({"max_megabytes": 0.0}, "`max_megabytes`")]:
        with pytest.raises(ValueError, match=message):
            ReportConfig("out", **changes)
