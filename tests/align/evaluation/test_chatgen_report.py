"""report.html of ChatGen agents: what stands in it, and that nothing hostile does."""

import json
import shutil

import pytest
from PIL import Image

from align.bench.chatgen.rows import save_rows
from align.bench.chatgen.schema import image_part, message, text_part
from align.chats import load_chats
from align.evaluation.chatgen_report import ChatGenReportConfig, main
from align.evaluation.plan_results import (
    BASELINE,
    GROUND_TRUTH,
    OWN,
    About,
    PlanResults,
    PlanResultsError,
    result_row,
    save_results,
)
from align.evaluation.plan_tables import write_tables
from rewards.commandline import ConfigError

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>\'"</td></svg>&amp;|'
CALL = {"model": "Fox - v1", "model description": "d"}


@pytest.fixture
def bench(chat_bench, tmp_path):
    """The toy ChatGenBench with a picture."""
    folder = tmp_path / "bench"
    shutil.copytree(chat_bench, folder)
    (folder / "images").mkdir()
    Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(folder / "images/1.png")
    return folder


def write(folder, rows, pictures=(), *, changes=None, reason="missing_file", **about):
    """Tables of two agents and the truth on some rows; the second agent's plans can't be drawn."""
    found = []
    for row in rows:
        plan = {name: row[name] for name in ("prompt", "negative_prompt", "model", "arguments")} | {"trail": []}
        other = plan | {"prompt": "something else", "model": "Fox - v9"} | (changes or {})
        for method, own in (("Evo", plan), ("Base", other), (GROUND_TRUTH, plan)):
            steps = {} if method == GROUND_TRUTH else {"version": float(own is plan)}
            found.append(result_row(row, 1, stage="", method=method, plan=own, steps=steps, seconds=0.5) | {"run": "r"})
            if pictures:
                drawn = {"drawn_from": OWN, "images": [pictures[0]], "scores": {"clip_score": [0.25, 0.35]}}
                if method == "Base":
                    drawn |= {
                        "drawn_from": BASELINE,
                        "not_drawn": about.pop("reason", "missing_file"),
                        "images": ["gone"],
                    }
                found[-1] |= drawn
    known = {"parameters": 7, "training_seconds": 9.0, "devices": ["cpu"], "batch_size": 8}
    options = {
        "runs": ["r"], "agents": {"Evo": known, "Base": known}, "choosers": [], "stages": [""], "steps": ["version"],
        "scorers": ["clip_score"] if pictures else [], "num_images": 1 if pictures else 0, "default_call": CALL,
    }  # fmt: skip
    results = PlanResults(About(**options | about), found)
    folder.mkdir()
    save_results(folder, results)
    write_tables(folder, results, [folder])
    return folder


def test_what_stands_in_it(bench, pictures, tmp_path, read_page):
    rows = list(load_chats(bench)["test"])
    folder = write(tmp_path / "tables", rows, pictures)
    path = main(ChatGenReportConfig(str(folder), str(bench), title="Foxes", num_chats=6))
    page = read_page(path.read_text())
    # Two chats of each input type, each with two pictures of plans; the chats of one type show a picture of their own.
    assert page.tags["figure"] == 6 * 3 and page.tags["img"] == 6 * 2 + 2
    assert page.text.count("picture not found") == 6 and "could not be read any more: 6" in page.text
    assert page.tags["svg"] == 1 and page.tags["script"] == 0
    for text in (
        "Foxes", "Agents that make a plan of a chat: Evo, Base. 48 chats", "Could you draw me a fox in a cave?",
        "Human-validated prompt: masterpiece, a fox in a cave, watercolor", "something else", "Fox - v9",
        "sampler Euler a, steps 20, cfg scale 7.0, 512x512", "CLIP Score 30.0", "(ChatGen Table 4)",
        "not drawn (missing_file): default call’s picture", "(ChatGen Table 7)", "input type: history",
        "training demonstrations: 1", "Here you go!",
    ):  # fmt: skip
        assert text in page.text, text
    classes = [value for _, name, value in page.attributes if name == "class"]
    assert classes.count("good") == 6  # Evo chose the very version; the truth is not praised for it


def test_without_pictures_plans_are_shown(bench, tmp_path, read_page):
    folder = write(tmp_path / "tables", list(load_chats(bench)["test"])[:3])
    (folder / "config.yaml").write_text(f"dataset: {bench}\n")
    page = read_page(main(ChatGenReportConfig(str(folder))).read_text())
    assert page.tags["figure"] == 3 * 2 and page.tags["img"] == 1 and page.tags["svg"] == 0
    assert "no picture" not in page.text


def test_nothing_is_fetched_and_nothing_runs(bench, pictures, tmp_path, read_page):
    """Hostile text wherever text comes from outside: chats, their picture parts, prompts, models, arguments."""
    row = dict(load_chats(bench)["test"][0])
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    sources = (HOSTILE, "../secret.png", str(secret), "https://example.org/1.png", "images/1.png")
    chat = [message("user", text_part(HOSTILE), *(image_part(source) for source in sources))]
    row |= {"messages": [*chat, message("assistant", text_part(HOSTILE)), message("user", text_part("and now"))]}
    row |= {"prompt": HOSTILE, "model": HOSTILE, "input_type": HOSTILE}
    bad = tmp_path / "bad"
    shutil.copytree(bench / "images", bad / "images")
    (bad / "rows.jsonl").write_text(json.dumps(row) + "\n")
    save_rows(dict.fromkeys(("train", "test"), bad / "rows.jsonl"), bad / "chats", tmp_path)
    changes = {"prompt": HOSTILE, "model": HOSTILE, "arguments": {"sampler": HOSTILE, "steps": HOSTILE}}
    folder = write(
        tmp_path / "tables", [row], pictures, changes=changes, reason=HOSTILE, default_call={"model": HOSTILE}
    )
    path = main(ChatGenReportConfig(str(folder), str(bad), title=HOSTILE))
    page = read_page(path.read_text())
    assert page.tags["script"] == 0 and not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert [value[:11] for _, name, value in page.attributes if name in ("src", "href")] == ["data:image/"] * 3
    assert page.text.count("[picture]") == 4 and page.text.count(HOSTILE) > 10
    assert "http" not in path.read_text().replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_what_is_missing_is_named(bench, tmp_path):
    with pytest.raises(PlanResultsError, match="There is no .*per_plan.parquet"):
        main(ChatGenReportConfig(str(tmp_path), str(bench)))
    folder = write(tmp_path / "tables", list(load_chats(bench)["test"])[:1])
    with pytest.raises(ConfigError, match=r"config.yaml names no `dataset`; give `dataset`"):
        main(ChatGenReportConfig(str(folder)))
    (folder / "table4.json").write_text(json.dumps({})[:1])
    with pytest.raises(ConfigError, match="table4.json is not JSON"):
        main(ChatGenReportConfig(str(folder), str(bench)))
    with pytest.raises(ValueError, match="`num_chats`"):
        ChatGenReportConfig("o", num_chats=0)
    with pytest.raises(ValueError, match="`max_megabytes`"):
        ChatGenReportConfig("o", max_megabytes=0)
