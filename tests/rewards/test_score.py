import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from rewards.score import ScoreConfig, main
from rewards.unified import UnifiedMetric


@pytest.fixture
def table(tmp_path, make_picture):
    """24 rows of 8 pictures and 3 prompts."""
    rows = []
    for i in range(24):
        path = tmp_path / "pictures" / f"{i % 8}.png"
        path.parent.mkdir(exist_ok=True)
        make_picture(40 + i % 8, 40, i % 8).save(path)
        rows.append({"prompt": ["a cat", "a dog", "moon"][i // 8], "image": f"pictures/{i % 8}.png", "call": i // 4})
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "table.jsonl"


@pytest.fixture
def scorers(tmp_path, tiny_clip, tiny_clip_config, tiny_blip, tiny_blip_config, vocabulary):
    """Two scorers as a configuration names them."""
    (tmp_path / "clip.json").write_text(json.dumps(tiny_clip_config))
    (tmp_path / "blip.json").write_text(json.dumps(tiny_blip_config))
    return [
        {"name": "hps_v2", "checkpoint": str(tiny_clip), "config": str(tmp_path / "clip.json")},
        {"name": "image_reward", "checkpoint": str(tiny_blip), "config": str(tmp_path / "blip.json"),
         "tokenizer": str(vocabulary)},
    ]  # fmt: skip


def config(table, default_scorers, **changes):
    options = {"source": str(table), "output": str(table.parent / "out"), "device": "cpu", "num_workers": 1}
    return ScoreConfig(**(options | {"scorers": default_scorers, "rows_per_part": 10} | changes))


def read(table):
    return pq.read_table(table.parent / "out" / "scores.parquet").to_pylist()


def test_every_pair_gets_the_scores_of_a_direct_call(table, scorers, hps, image_reward):
    summary = main(config(table, scorers, keep=["call"]))
    rows = read(table)
    prompts, images = [row["prompt"] for row in rows], [str(table.parent / row["image"]) for row in rows]
    for name, scorer in (("hps_v2", hps), ("image_reward", image_reward)):
        scores = torch.tensor([row[name] for row in rows])
        torch.testing.assert_close(scores, scorer(prompts, images), atol=1e-5, rtol=0)
        entry = summary["scorers"][name]
        assert entry["n"] == 24 and entry["errors"] == 0 and entry["truncated_share"] == 0
        assert entry["mean"] == pytest.approx(scores.mean().item(), abs=1e-6)
        assert entry["sd"] == pytest.approx(scores.std().item(), abs=1e-6)
        assert len(entry["scorer"]["sha256"]) == 64
    assert [row["call"] for row in rows] == [i // 4 for i in range(24)]
    assert json.loads((table.parent / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert yaml.safe_load((table.parent / "out" / "config.yaml").read_text())["rows_per_part"] == 10


def test_a_second_run_computes_nothing_and_a_changed_table_everything(table, scorers):
    assert main(config(table, scorers))["rows_computed"] == 24
    before = read(table)
    assert main(config(table, scorers))["rows_computed"] == 0
    assert read(table) == before
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-1]))
    assert main(config(table, scorers))["rows_computed"] == 23
    for now, then in zip(read(table), before[:23], strict=True):
        assert now["hps_v2"] == pytest.approx(then["hps_v2"], abs=1e-6)


def test_one_bad_image_in_a_large_table_costs_one_row(table, scorers):
    good = [json.loads(line) for line in table.read_text().splitlines()]
    rows = (good * 417)[:10_000]
    rows[5_000] = {"prompt": "a cat", "image": "pictures/broken.png", "call": 0}
    (table.parent / "pictures" / "broken.png").write_bytes((table.parent / "pictures" / "0.png").read_bytes()[:50])
    table.write_text("\n".join(map(json.dumps, rows)))
    summary = main(config(table, scorers[:1], rows_per_part=2_000))
    assert summary["scorers"]["hps_v2"]["n"] == 9_999
    assert summary["scorers"]["hps_v2"]["errors"] == 1
    bad = [(i, row) for i, row in enumerate(read(table)) if row["hps_v2"] is None]
    assert [i for i, _ in bad] == [5_000]
    assert "broken.png can't be decoded" in bad[0][1]["hps_v2_error"]


def test_rows_that_can_not_be_scored_say_why(table, scorers):
    rows = [
        {"prompt": "a", "image": "pictures/0.png"}, {"prompt": "", "image": "pictures/0.png"},
        {"prompt": ["a"], "image": "pictures/0.png"}, {"prompt": "a", "image": None}, {"image": "pictures/0.png"},
    ]  # fmt: skip
    table.write_text("\n".join(map(json.dumps, rows)))
    main(config(table, scorers))
    errors = [row["image_reward_error"] for row in read(table)]
    assert errors[0] is None
    for error, part in zip(errors[1:], ("is empty", "not a text", "no image", "not a text"), strict=True):
        assert part in error


def test_too_many_errors_end_with_exit_code_1(table, scorers):
    table.write_text('{"prompt": "a", "image": "gone.png"}\n{"prompt": "a", "image": "pictures/0.png"}')
    assert main(config(table, scorers, max_error_share=0.5))["error_share"] == 0.5
    with pytest.raises(SystemExit) as caught:
        main(config(table, scorers, max_error_share=0.4))
    assert caught.value.code == 1


def test_adds_the_unified_metric(table, scorers):
    main(config(table, scorers, fit_unified="this table"))
    rows = read(table)
    columns = {name: torch.tensor([row[name] for row in rows]) for name in ("hps_v2", "image_reward")}
    expected = sum((c - c.min()) / (c.max() - c.min()) for c in columns.values()) / 2
    torch.testing.assert_close(torch.tensor([row["unified"] for row in rows]), expected)
    saved = table.parent / "out" / "unified.json"
    assert UnifiedMetric.load(saved).population == "this table"
    main(config(table, scorers, unified=str(saved)))
    assert read(table) == rows


def command(table, default_scorers, **changes):
    path = table.parent / "score.yaml"
    options = vars(config(table, default_scorers, **changes))
    path.write_text(yaml.safe_dump({key: value for key, value in options.items() if value is not None}))
    return [sys.executable, "-m", "rewards.score", "--config", str(path)]


def test_a_killed_run_goes_on_where_it_was(table, tmp_path):
    """The scorer waits for a file before every part, so that the kill falls between the second and the third."""
    (tmp_path / "waiting.py").write_text(
        "import time, torch\n"
        "from pathlib import Path\n"
        "def load(*, checkpoint, config, tokenizer, device, dtype, folder):\n"
        "    def scorer(prompts, images):\n"
        "        calls = len(list(Path(folder).glob('call*')))\n"
        "        Path(folder, f'call{calls}').touch()\n"
        "        while calls >= 2 and not Path(folder, 'go').exists():\n"
        "            time.sleep(0.02)\n"
        "        return torch.arange(len(prompts)).float()\n"
        "    return scorer\n"
    )
    marks = tmp_path / "marks"
    marks.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = command(table, [{"name": "waiting:load", "column": "w", "folder": str(marks)}], rows_per_part=5)
    process = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE)
    while not (marks / "call2").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "scores.parquet").exists()
    (marks / "go").touch()
    subprocess.run(run, env=environment, check=True, capture_output=True)
    assert len(list(marks.glob("call*"))) == 3 + 3  # the part in flight was computed again, the two before were not
    assert [row["w"] for row in read(table)] == [float(i % 5) for i in range(24)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere.jsonl"}, "There is no table or folder nowhere.jsonl"),
        ({"scorers": [{"name": "hps"}]}, "no scorer `hps`"),
        ({"scorers": [{"name": "hps_v2", "checkpoint": "gone.pt"}]}, "no checkpoint at gone.pt"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(table, scorers, changes, message):
    result = subprocess.run(command(table, scorers, **changes), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorers": None}, "Give either `scorers`"),
        ({"scorer": "hps_v2"}, "Give either `scorers`"),
        ({"scorers": [{"checkpoint": "x"}]}, "must hold mappings with a `name`"),
        ({"scorers": [{"name": "hps_v2"}, {"name": "hps_v2"}]}, "written to the column 'hps_v2'"),
        ({"scorers": [{"name": "hps_v2", "column": "prompt"}]}, "written to the column 'prompt'"),
        ({"checkpoint": "x"}, "`checkpoint` belongs to `scorer`"),
        ({"rows_per_part": 0}, "must be at least 1"),
        ({"max_error_share": 2}, r"must lie in \[0, 1\]"),
        ({"unified": "a", "fit_unified": "b"}, "not both"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, scorers, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path / "t.jsonl", scorers, **changes)
