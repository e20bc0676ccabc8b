"""Regret, worked out by hand."""

import json

import pytest

from align.evaluation.chatgen_draw import ChatGenDrawConfig, DrawingConfig, main
from align.evaluation.plan_regret import ANY_MODEL, DEFAULT, Choice, ScoredPrompts, with_regrets
from align.evaluation.plan_results import GROUND_TRUTH, About, PlanResults, result_row, save_results
from rewards.commandline import ConfigError
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.scored_table import write_scored

DEFAULTS = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0}


@pytest.fixture(scope="module")
def catalog():
    return Catalog(
        CatalogEntry(
            name=name, version_id=i, model_id=i, type="Checkpoint", base_model="SD 1.5", default_parameters=DEFAULTS
        )
        for i, name in enumerate("ABCD")
    )  # fmt: skip


def candidate(catalog, model, reward, **changes):
    call = catalog[model].default_call().to_dict() | changes
    return {"response": "", "call": call, "origin": "given", "seeds": [1], "images": [None], "scores": {"s": [1.0]},
            "image_rewards": [reward], "reward": reward, "reward_standard_error": None, "error": None}  # fmt: skip


@pytest.fixture(scope="module")
def scored(catalog, tmp_path_factory):
    """Of chat 0: A 0.9 with 20 steps and 0.5 with 30, B 0.2, C without a reward; of demo 1: B 0.4."""
    rows = [
        {"prompt_id": "chat/0", "candidates": [
            candidate(catalog, "A", 0.9), candidate(catalog, "A", 0.5, **{"sampling steps": 30}),
            candidate(catalog, "B", 0.2), candidate(catalog, "C", None),
        ]},
        {"prompt_id": "demo/1", "candidates": [candidate(catalog, "B", 0.4)]},
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("scored") / "scored.parquet"
    write_scored(path, [row | {"instruction": {"prompt": "p", "negative prompt": ""}, "policy": None} for row in rows],
                 ["s"])  # fmt: skip
    return path


def test_regret_of_a_choice(scored):
    found = ScoredPrompts(scored)
    assert found.regret("chat/0", Choice("A")) == (pytest.approx(0.9 - 0.7), False)
    assert found.regret("chat/0", Choice("A", DEFAULTS)) == (0.0, True)
    assert found.regret("chat/0", Choice("A", DEFAULTS | {"sampling steps": 30})) == (pytest.approx(0.4), True)
    assert found.regret("chat/0", Choice("A", DEFAULTS | {"sampling steps": 31})) == (pytest.approx(0.2), False)
    assert found.regret("chat/0", Choice("B")) == (pytest.approx(0.7), False)
    assert found.regret("chat/0", Choice("C")) is None and found.regret("chat/9", Choice("A")) is None
    assert found.regret_of_any("chat/0") == (pytest.approx((0.2 + 0.7) / 2), False)
    assert found.regret_of_any("chat/9") is None


@pytest.fixture
def planned(catalog):
    """Three chats; Evo chooses A, B and D, a baseline always A, and the truth is A with 30 steps."""

    def row(number):
        arguments = {"sampler": "Euler a", "steps": 30, "cfg_scale": 7.0, "width": 512, "height": 512}
        source = {"demonstration": f"demo/{number}", "image_id": None}
        return {"id": f"chat/{number}", "prompt": "p", "negative_prompt": "", "model": "A", "arguments": arguments,
                "base_model": "SD 1.5", "setting": "supervised", "input_type": "single", "source": source}  # fmt: skip

    chats, plans = [row(0), row(1), row(2)], ["A", "B", "D"]
    rows = []
    for chat, model in zip(chats, plans, strict=True):
        for stage in ("", "prompt"):
            rows.append(result_row(chat, 1, stage=stage, method="Evo", plan=chat | {"model": model}))
        rows.append(result_row(chat, 1, stage="", method=GROUND_TRUTH, plan=chat))
        rows.append(result_row(chat, 1, stage="", method="tfidf", plan={"model": "A"}))
    default = catalog["B"].default_call().to_dict()
    known = {"parameters": 1, "training_seconds": None, "devices": ["cpu"], "batch_size": 8}
    about = About(["one"], {"Evo": known}, ["tfidf"], ["", "prompt"], ["version"], default_call=default)
    return PlanResults(about, [row | {"run": "one"} for row in rows])


def test_rows(planned, scored, catalog):
    found = with_regrets(planned, ScoredPrompts(scored), catalog)
    regrets = {(r["method"], r["row_id"]): r["regret"] for r in found.rows if not r["stage"]}
    expected = {
        ("Evo", "chat/0"): 0.4, ("Evo", "chat/1"): 0.0, ("tfidf", "chat/0"): 0.2, (GROUND_TRUTH, "chat/0"): 0.4,
        (DEFAULT, "chat/0"): 0.7, (DEFAULT, "chat/1"): 0.0, (ANY_MODEL, "chat/0"): 0.45, (ANY_MODEL, "chat/1"): 0.0,
    }  # fmt: skip
    assert {key: regrets[key] for key in expected} == pytest.approx(expected)
    unknown = {key for key, value in regrets.items() if value is None}
    assert unknown == {(m, "chat/2") for m in ("Evo", "tfidf", GROUND_TRUTH, DEFAULT, ANY_MODEL)} | {
        ("tfidf", "chat/1"), (GROUND_TRUTH, "chat/1")
    }  # fmt: skip
    assert all(r["regret"] is None for r in found.rows if r["stage"])
    again = with_regrets(found, ScoredPrompts(scored), catalog)  # of rows that have regrets already
    assert sorted(json.dumps(r) for r in again.rows) == sorted(json.dumps(r) for r in found.rows)


def test_the_table(planned, scored, catalog, tmp_path):
    save_results(tmp_path, planned)
    catalog.save(tmp_path / "catalog.jsonl")
    drawing = DrawingConfig(candidates=str(scored))
    tables = main(ChatGenDrawConfig(str(tmp_path), str(tmp_path / "catalog.jsonl")), drawing)
    rows = {row["method"]: row for row in tables["regret"]["rows"]}
    assert list(rows) == ["Evo", "tfidf", GROUND_TRUTH, DEFAULT, ANY_MODEL]
    assert rows["Evo"]["regret"]["value"] == pytest.approx(0.2) and rows["Evo"]["regret"]["n"] == 2
    assert (rows["Evo"]["unknown"], rows[GROUND_TRUTH]["unknown"]) == (1, 2)
    assert rows["Evo"]["equal_call"]["value"] == 0.5 and rows[GROUND_TRUTH]["equal_call"]["value"] == 1
    assert "| supervised | Evo | 0.2000 [0.0000, 0.4000] (2) |" in (tmp_path / "regret.md").read_text()


def test_no_prompt_is_known(planned, scored, catalog, caplog):
    rows = [row | {"row_id": f"other/{i}", "demonstration": "x"} for i, row in enumerate(planned.rows)]
    found = with_regrets(PlanResults(planned.about, rows), ScoredPrompts(scored), catalog)
    assert all(row["regret"] is None for row in found.rows) and "no regret is known" in caplog.text


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ConfigError, match="`candidates` .*x.parquet is no table of scored candidates"):
        ScoredPrompts(tmp_path / "x.parquet")
