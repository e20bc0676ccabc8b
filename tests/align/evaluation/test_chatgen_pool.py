"""Several training seeds in one table, worked out by hand."""

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from align.evaluation.chatgen_pool import PoolChatGenConfig, main
from align.evaluation.metrics import bootstrap_runs
from align.evaluation.plan_results import (
    GROUND_TRUTH,
    OWN,
    About,
    PlanResults,
    PlanResultsError,
    load_results,
    result_row,
    save_results,
)
from align.evaluation.plan_tables import write_tables

CALL = {"model": "Fox - v1", "model description": "d"}
FOLDER = "features/abc"


def chat(number):
    return {
        "id": f"chat/{number}", "prompt": "p", "negative_prompt": "", "model": "Fox - v1", "arguments": {},
        "base_model": "SD 1.5", "setting": "supervised", "input_type": "single",
        "source": {"demonstration": str(number), "image_id": None},
    }  # fmt: skip


def write_run(folder, of_method, right, chats, **changes):
    """A run whose pictures all have the score and the one feature of their method, plus the chat's number.

    The references have the chats' numbers, so that FID is the squared shift.
    """
    rows, features = [], {}
    for number in range(chats):
        features[f"ref-{number}"] = [float(number)]
        for method, value in of_method.items():
            steps = {} if method == GROUND_TRUTH else {"version": float(number in right)}
            key = f"{method}-{number}"
            features[key] = [number + value]
            drawn = {"drawn_from": OWN, "pictures": [key], "references": [f"ref-{number}"], "scores": {"s": [value]}}
            row = result_row(chat(number), 1, stage="", method=method, plan=chat(number), steps=steps, seconds=1.0)
            rows.append(row | drawn | {"run": folder.name})
    known = {"parameters": 7, "training_seconds": float(chats), "devices": ["cpu"], "batch_size": 8}
    options = {
        "runs": [folder.name], "agents": {"Evo": known}, "choosers": [], "stages": [""], "steps": ["version"],
        "scorers": ["s"], "num_images": 1, "references": "render", "default_call": CALL,
        "features": {"name": "n", "sha256": "", "folder": FOLDER},
    }  # fmt: skip
    (folder / FOLDER).mkdir(parents=True)
    vectors = np.array(list(features.values()), dtype="f4")
    path = folder / FOLDER / "part-000000.safetensors"
    save_file({"features": vectors}, path, {"keys": json.dumps(list(features))})
    save_results(folder, PlanResults(About(**options | changes), rows))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """Evo is 4 off in the first run, and 2 in the second, which has more chats; the truth is 1 off in both."""
    one = write_run(tmp_path / "seed0" / "tables", {"Evo": 4.0, GROUND_TRUTH: 1.0}, {0}, 4)
    two = write_run(tmp_path / "seed1" / "tables", {"Evo": 2.0, GROUND_TRUTH: 1.0}, {0, 1, 2, 3}, 8)
    return [one, two]


def test_runs_count_alike_and_have_one_unified_metric(runs, tmp_path):
    tables = main(PoolChatGenConfig(runs, str(tmp_path / "pooled"), fid_resamples=30))
    evo, truth = tables["table4"]["rows"]
    # FIDs are 16 and 4 (shifts of 4 and 2 at equal deviations); norms of FID by 0 to 16, of s by 1 to 4.
    assert evo["fid"]["runs"] == pytest.approx({"seed0/tables": 16, "seed1/tables": 4})
    assert evo["fid"]["value"] == pytest.approx(10) and evo["fid"]["n"] == 12
    assert evo["s"]["runs"] == {"seed0/tables": 4, "seed1/tables": 2}
    # Eq. 6: ((1 - 1) + 1) / 2 and ((1 - 1/4) + 1/3) / 2; the truth has ((1 - 1/16) + 0) / 2 in both.
    assert evo["unified"]["runs"] == pytest.approx({"seed0/tables": 0.5, "seed1/tables": (3 / 4 + 1 / 3) / 2})
    assert evo["unified"]["value"] == pytest.approx((0.5 + (3 / 4 + 1 / 3) / 2) / 2)
    assert truth["unified"]["value"] == pytest.approx(15 / 32)
    chats = [[f"r{i}" for i in range(n)] for n in (4, 8)]  # the second run has those of the first, and more
    assert evo["version"] == bootstrap_runs([[1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]], items=chats)._asdict() | {
        "runs": {"seed0/tables": 0.25, "seed1/tables": 0.5}
    }
    assert evo["s"]["low"] == 2 and evo["s"]["high"] == 4  # runs are drawn: some resamples hold one of them alone
    (five,) = tables["table5"]["rows"]
    assert (five["parameters"], five["training_seconds"], five["seconds"]["n"]) == (7, 6.0, 12)
    saved = json.loads((tmp_path / "pooled" / "unified.json").read_text())["scales"]
    assert (saved["fid"]["low"], saved["fid"]["high"]) == (0, pytest.approx(16))
    assert [saved["s"][part] for part in ("low", "high", "n")] == [1, 4, 24]


def test_every_run_is_shown(runs, tmp_path):
    main(PoolChatGenConfig(runs, str(tmp_path / "pooled"), fid_resamples=5))
    text = (tmp_path / "pooled" / "table4.md").read_text()
    assert "Mean of 2 runs" in text and "| supervised | Evo | seed0/tables | 25.0 | 4.000 | 16.00 | 50.0 |" in text
    lines = list(csv.DictReader((tmp_path / "pooled" / "table4.csv").open()))
    evo = [(line["run"], float(line["s"])) for line in lines if line["method"] == "Evo"]
    assert evo == [("", 3.0), ("seed0/tables", 4.0), ("seed1/tables", 2.0)]
    assert load_results(tmp_path / "pooled").about.runs == ["seed0/tables", "seed1/tables"]


def test_one_run_is_what_it_is_alone(runs, tmp_path):
    pooled = main(PoolChatGenConfig(runs[:1], str(tmp_path / "pooled"), fid_resamples=20))
    alone = write_tables(tmp_path / "alone", load_results(runs[0]), [tmp_path / "seed0" / "tables"], resamples=20)
    assert pooled["table4"]["rows"] == alone["table4"]["rows"]


def test_runs_that_can_not_be_pooled(runs, tmp_path):
    output = str(tmp_path / "pooled")
    other = write_run(tmp_path / "seed2" / "tables", {"Evo": 1.0, GROUND_TRUTH: 0.0}, {0}, 3, num_images=2)
    with pytest.raises(PlanResultsError, match=r"seed2.tables can't be pooled with .*seed0.*`num_images` is 2 and 1"):
        main(PoolChatGenConfig([*runs, other], output))
    with pytest.raises(PlanResultsError, match="must name different folders"):
        main(PoolChatGenConfig([runs[0], runs[0]], output))
    with pytest.raises(PlanResultsError, match="is one of `runs`, which would be overwritten"):
        main(PoolChatGenConfig(runs, runs[0]))
    with pytest.raises(PlanResultsError, match="There is no .*per_plan.parquet; write it with"):
        main(PoolChatGenConfig([*runs, str(tmp_path)], output))
    main(PoolChatGenConfig(runs, output, fid_resamples=2))
    with pytest.raises(PlanResultsError, match="is pooled already; name the folders of its runs"):
        main(PoolChatGenConfig([output, runs[0]], str(tmp_path / "again")))
    with pytest.raises(ValueError, match="`fid_resamples` must be at least 1"):
        PoolChatGenConfig(runs, output, fid_resamples=0)


def test_a_file_of_something_else(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "per_plan.parquet")
    with pytest.raises(PlanResultsError, match="was not written by align.evaluation.chatgen"):
        load_results(tmp_path)
    (tmp_path / "per_plan.parquet").write_text("x")
    with pytest.raises(PlanResultsError, match="is not a Parquet file"):
        load_results(tmp_path)
