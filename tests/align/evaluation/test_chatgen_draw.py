"""Plans that are drawn, scored and compared end to end with toy models; all numbers are counted again."""

import csv
import dataclasses
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align.evaluation.chatgen_draw import ChatGenDrawConfig, DrawingConfig, chosen_chats, main
from align.evaluation.plan_results import GROUND_TRUTH, About, PlanResults, load_results, result_row, save_results
from pocket.judge import Judge
from pocket.world import WEIGHTS
from rewards.commandline import ConfigError
from rollouts.calls_table import seeds_of
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.store import ImageStore

SCORER = '''
"""How bright a channel is; and a log of what was scored for which prompt."""
from pathlib import Path
import numpy as np, torch

class Channel:
    def __init__(self, channel, log):
        self.channel, self.log = channel, log
    def __call__(self, prompts, images):
        with Path(self.log).open("a") as file:
            file.writelines(f"{prompt}\\n" for prompt in prompts)
        return torch.tensor([float(np.asarray(image)[..., self.channel].mean()) for image in images])
    def describe(self):
        return {"name": "channel", "channel": self.channel}

def load(*, channel, log, checkpoint=None, config=None, tokenizer=None, device=None, dtype=None):
    return Channel(channel, log)
'''
JUDGE = {"kind": "transformers", "checkpoint": str(WEIGHTS / "judge"), "side": 64}
CHATS = 6
ARGUMENTS = {"sampler": "Euler a", "steps": 2, "cfg_scale": 7.0, "width": 512, "height": 512, "clip_skip": None}


def bench_row(number):
    return {
        "id": f"chat/{number}", "prompt": f"a fox {number}", "negative_prompt": "bad", "model": "Toy SD 0 - v1",
        "arguments": ARGUMENTS, "base_model": "SD 1.5", "setting": "supervised" if number < 4 else "few_shot",
        "input_type": "single" if number % 2 else "history",
        "source": {"demonstration": f"demo/{number}", "model_id": 1, "image_id": str(100 + number)},
    }  # fmt: skip


def plan(row, **changes):
    own = {name: row[name] for name in ("prompt", "negative_prompt", "model", "arguments")} | {"trail": []}
    return own | changes


def write_plans(folder, catalog):
    """Evo writes prompts of its own and takes a LoRA; Base has the truth, but thrice no usable model."""
    rows = [bench_row(number) for number in range(CHATS)]
    results = []
    for i, row in enumerate(rows):
        evo = plan(row, prompt=f"castle {i}", model="Toy SD LoRA 0 - v1", arguments=ARGUMENTS | {"clip_skip": 2})
        base = plan(row, model={0: "Nobody", 1: "Gone - v1", 4: "Gone - v1"}.get(i, row["model"]))
        plans = {"Evo": evo, "Base": base, GROUND_TRUTH: plan(row)}
        for method, of_method in plans.items():
            steps = {"prompt": 0.5, "version": float(i % 2)} if method != GROUND_TRUTH else {}
            results.append(
                result_row(row, i, stage="", method=method, plan=of_method, steps=steps, seconds=float(i))
            )  # fmt: skip
        for method in ("Evo", "Base"):
            given = plan(row, prompt=f"castle {i}")
            results.append(result_row(row, i, stage="prompt", method=method, plan=given, steps={"prompt": 0.25}))
    known = {"parameters": 10, "training_seconds": 5.0, "devices": ["cpu"], "batch_size": 8}
    default = catalog.default_call("SD 1.5", "Toy SD 1 - v1").to_dict()
    about = About(["one"], {"Evo": known, "Base": known}, [], ["", "prompt"], ["prompt", "version"],
                  default_call=default | {"sampling steps": 3})  # fmt: skip
    save_results(folder, PlanResults(about, [row | {"run": "one"} for row in results]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from pocket.untrained import save_catalog

    folder = tmp_path_factory.mktemp("drawn")
    catalog = save_catalog(folder / "models", loras=1, sdxl=0, sdxl_loras=0)
    gone = catalog["Toy SD 1 - v1"].model_dump(by_alias=True) | {
        "name": "Gone - v1", "version_id": 99, "model_id": 99,
        "files": [{"uri": "gone.safetensors", "format": "SafeTensor", "sha256": "A" * 64}],
    }  # fmt: skip
    catalog = Catalog([*catalog.values(), CatalogEntry.model_validate(gone)])
    catalog.save(folder / "models" / "catalog.jsonl")
    (folder / "plugin").mkdir()
    (folder / "plugin" / "prompted_scorer.py").write_text(SCORER)
    sys.path.insert(0, str(folder / "plugin"))
    yield folder, catalog
    sys.path.remove(str(folder / "plugin"))
    sys.modules.pop("prompted_scorer", None)


def options(world, output, **changes):
    folder, _ = world
    channel = {"name": "prompted_scorer:load", "log": str(folder / "scored.log")}
    scorers = {"red": channel | {"channel": 0}, "green": channel | {"channel": 1}}
    drawing: dict = {
        "weights": str(folder / "models"), "rollout": {"native_side": 64, "scorers": scorers}, "num_images": 2,
        "fid": JUDGE, "fid_resamples": 5,
    }  # fmt: skip
    catalog = str(folder / "models" / "catalog.jsonl")
    return ChatGenDrawConfig(str(output), catalog, "cpu"), DrawingConfig(**drawing | changes)


@pytest.fixture(scope="module")
def done(world):
    folder, catalog = world
    output = folder / "out"
    write_plans(output, catalog)
    configs = options(world, output)
    tables = main(*configs)
    rows = {(row["stage"], row["method"], row["row_id"]): row for row in load_results(output).rows}
    return configs, output, tables, rows


def request_of(output, key):
    with ImageStore(output / "rollout" / "store") as store:
        found = store.get(key)
    assert found is not None and found.metadata is not None
    return found.metadata["request"]


@pytest.mark.slow
def test_every_plan_is_drawn_as_it_says(done):
    _, output, _, rows = done
    asked = request_of(output, rows["", "Evo", "chat/3"]["pictures"][1])
    assert (asked["prompt"], asked["negative_prompt"], asked["clip_skip"]) == ("castle 3", "bad", 2)
    assert (asked["call"]["model"], asked["call"]["sampling steps"]) == ("Toy SD LoRA 0 - v1", 2)
    # All methods have the chat's seeds; FID's reference has others.
    for method in ("Evo", "Base", GROUND_TRUTH):
        seeds = [request_of(output, key)["seed"] for key in rows["", method, "chat/3"]["pictures"]]
        assert seeds == seeds_of("chat/3", 2)
    references = [request_of(output, key) for key in rows["", "Evo", "chat/3"]["references"]]
    assert not {request["seed"] for request in references} & set(seeds_of("chat/3", 2))
    assert {request["prompt"] for request in references} == {"a fox 3"}
    # Equal requests are one picture: Base's plan is the truth.
    assert rows["", "Base", "chat/3"]["pictures"] == rows["", GROUND_TRUTH, "chat/3"]["pictures"]
    assert json.loads(rows["", "Evo", "chat/3"]["drawn_call"])["sampling steps"] == 2


@pytest.mark.slow
def test_the_default_call_stands_in_and_is_counted(done):
    _, output, tables, rows = done
    lost = rows["", "Base", "chat/4"]
    assert (lost["drawn_from"], lost["not_drawn"]) == ("baseline", "missing_file")
    asked = request_of(output, lost["pictures"][0])
    assert (asked["call"]["model"], asked["call"]["sampling steps"]) == ("Toy SD 1 - v1", 3)
    assert asked["prompt"] == "a fox 4" and asked["seed"] == seeds_of("chat/4", 2)[0]
    line = next(r for r in tables["table4"]["rows"] if r["method"] == "Base" and r["setting"] == "all")
    assert (line["not_drawn"], line["stood_in"]) == ({"missing_file": 2, "unknown_model": 1}, 3)
    assert (line["left_out"], rows["", "Base", "chat/0"]["not_drawn"]) == (0, "unknown_model")
    assert "missing_file 2" in (output / "table4.md").read_text()


@pytest.mark.slow
def test_scores_are_for_the_prompt_that_people_validated(done, world):
    scored = Counter((world[0] / "scored.log").read_text().splitlines())
    assert set(scored) == {f"a fox {i}" for i in range(CHATS)}
    # Of a chat: Evo's, the truth's, and those of the ablation, which differ from the truth by the prompt; of three
    # chats also those that stand in. Two pictures, two scorers.
    assert [scored[f"a fox {i}"] for i in range(CHATS)] == [4 * (4 if i in (0, 1, 4) else 3) for i in range(CHATS)]


def naive_fid(features, references):
    """By the definition: |m_a - m_b|² + Tr(C_a + C_b - 2 (C_a C_b)^1/2), from the eigenvalues of the product."""
    (m_a, c_a), (m_b, c_b) = [(x.mean(0), np.cov(x.T)) for x in (features, references)]
    values = np.linalg.eigvals(c_a @ c_b).real.clip(min=0)
    return ((m_a - m_b) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * np.sqrt(values).sum()


def judged(paths):
    extractor = Judge.load(WEIGHTS / "judge").feature_extractor()
    pixels = torch.stack([extractor.preprocess(Image.open(path)) for path in paths])
    return extractor.function(pixels).double().numpy()


@pytest.mark.slow
def test_table_4_and_6_from_the_pictures_themselves(done):
    _, output, tables, rows = done
    store = output / "rollout" / "store" / "images"
    path_of = {path.stem: path for path in store.rglob("*.png")}
    channels, fids = {}, {}
    for stage, method in (("", "Evo"), ("", "Base"), ("", GROUND_TRUTH), ("prompt", "Evo"), ("prompt", "Base")):
        for setting in ("supervised", "few_shot", "all"):
            of = [rows[stage, method, f"chat/{i}"] for i in range(CHATS)]
            of = [row for row in of if setting in ("all", row["setting"])]
            means = [[np.asarray(Image.open(path))[..., :2].mean((0, 1)) for path in row["images"]] for row in of]
            channels[stage, method, setting] = np.array(means)  # chats, pictures, channels
            features = judged([path for row in of for path in row["images"]])
            references = judged([path_of[key] for row in of for key in row["references"]])
            fids[stage, method, setting] = naive_fid(features, references)
            scores = [[row["scores"][name] for name in ("red", "green")] for row in of]
            assert np.array(scores).transpose(0, 2, 1) == pytest.approx(np.array(means), abs=1e-4)
    # Eq. 6 by hand: ranges of all pictures, and of FID from 0 to the largest in the tables.
    pictures = np.concatenate([found.reshape(-1, 2) for found in channels.values()])
    low, high = pictures.min(0), pictures.max(0)
    saved = json.loads((output / "unified.json").read_text())["scales"]
    assert saved["fid"]["lower_is_better"] and saved["fid"]["low"] == 0
    assert saved["fid"]["high"] >= max(fids.values()) * (1 - 1e-5)
    assert [saved[name]["low"] for name in ("red", "green")] == pytest.approx(low.tolist(), abs=1e-4)
    for name, stage in (("table4", ""), ("table6", "prompt")):
        for line in tables[name]["rows"]:
            cell = (stage, line["method"], line["setting"])
            assert line["fid"]["value"] == pytest.approx(fids[cell], rel=1e-4, abs=1e-4)
            assert line["fid"]["n"] == line["unified"]["n"] == len(channels[cell])
            means = channels[cell].mean((0, 1))
            assert [line["red"]["value"], line["green"]["value"]] == pytest.approx(means.tolist(), abs=1e-3)
            norms = [1 - fids[cell] / saved["fid"]["high"], *(means - low) / (high - low)]
            assert line["unified"]["value"] == pytest.approx(sum(norms) / 3, abs=1e-4)
            assert line["unified"]["low"] <= line["unified"]["value"] <= line["unified"]["high"]
    assert fids["", GROUND_TRUTH, "all"] < fids["", "Evo", "all"]
    steps = {line["step"]["value"] for line in tables["table6"]["rows"]}
    assert steps == {0.25} and "| supervised | prompt | Evo |" in (output / "table6.md").read_text()


@pytest.mark.slow
def test_files(done):
    _, output, tables, _ = done
    for name, table in tables.items():
        assert json.loads((output / f"{name}.json").read_text()) == table
    lines = list(csv.DictReader((output / "table7.csv").open()))
    assert [(line["input_type"], line["method"]) for line in lines] == [
        (kind, method) for kind in ("single", "history") for method in ("Evo", "Base", GROUND_TRUTH)
    ]
    assert float(lines[0]["red"]) == pytest.approx(tables["table7"]["rows"][0]["red"]["value"])
    assert lines[0]["version_n"] == "3" and lines[2]["version_n"] == ""  # the truth chooses nothing
    five = tables["table5"]["rows"][0]
    assert (five["parameters"], five["seconds"]["value"], five["device"]) == (10, 2.5, "cpu")


@pytest.mark.slow
def test_a_second_run_does_nothing_and_an_interrupted_one_goes_on(done, world):
    configs, output, tables, _ = done
    log = world[0] / "scored.log"
    before = log.read_text()
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    parts = {path: path.stat().st_mtime_ns for path in output.glob("features/*/part-*")}
    assert main(*configs) == tables and log.read_text() == before
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.png")} == times
    assert {path: path.stat().st_mtime_ns for path in output.glob("features/*/part-*")} == parts

    # Killed while it scored (half a line), while it drew (a picture is lost), and before the last features.
    scores = (output / "scores.jsonl").read_bytes()
    (output / "scores.jsonl").write_bytes(scores[: len(scores) // 2])
    shutil.rmtree(next(iter(parts)).parent)
    with ImageStore(output / "rollout" / "store") as store:
        store.forget(load_results(output).rows[0]["pictures"])
    assert main(*configs) == tables
    again = log.read_text()[len(before) :].splitlines()
    assert 0 < len(again) < len(before.splitlines())
    assert sorted((output / "scores.jsonl").read_bytes().splitlines()) == sorted(scores.splitlines())


@pytest.mark.slow
def test_references_of_a_folder(done, world, tmp_path):
    (config, _), output, tables, rows = done
    shutil.copytree(output, tmp_path / "out")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(CHATS - 1):  # the last chat has none
        shutil.copy(rows["", GROUND_TRUTH, f"chat/{i}"]["images"][0], pictures / f"{100 + i}.png")
    changed = dataclasses.replace(config, output_dir=str(tmp_path / "out"))
    _, drawing = options(world, output, references=str(pictures))
    found = main(changed, drawing)
    truth = next(r for r in found["table4"]["rows"] if r["method"] == GROUND_TRUTH and r["setting"] == "all")
    of = [rows["", GROUND_TRUTH, f"chat/{i}"] for i in range(CHATS - 1)]
    expected = naive_fid(judged([p for row in of for p in row["images"]]), judged([row["images"][0] for row in of]))
    assert truth["fid"]["value"] == pytest.approx(expected, rel=1e-4) and truth["fid"]["n"] == CHATS - 1
    assert truth["red"] == next(
        r["red"] for r in tables["table4"]["rows"] if r["method"] == GROUND_TRUTH and r["setting"] == "all"
    )
    assert "the demonstrations' own pictures" in (tmp_path / "out" / "table4.md").read_text()
    (pictures / "100.png").rename(pictures / "x.png")
    for i in range(1, CHATS - 1):
        (pictures / f"{100 + i}.png").unlink()
    with pytest.raises(ConfigError, match="no picture that is named by an image id"):
        main(changed, drawing)


@pytest.mark.slow
def test_a_part_of_the_chats(done, world, tmp_path):
    (config, _), output, _, _ = done
    shutil.copytree(output, tmp_path / "out")
    changed = dataclasses.replace(config, output_dir=str(tmp_path / "out"))
    _, drawing = options(world, output, max_drawn=3, fid=None)
    found = main(changed, drawing)
    line = next(r for r in found["table4"]["rows"] if r["method"] == "Evo" and r["setting"] == "all")
    assert (line["red"]["n"], line["version"]["n"], line["drawn"]) == (3, CHATS, 3)
    assert "fid" not in found["table4"]["estimates"]
    rows = load_results(tmp_path / "out").rows
    assert {row["row_id"] for row in rows if row["pictures"]} == chosen_chats([r["row_id"] for r in rows], 3)
    with pytest.raises(ConfigError, match="`unified: paper` is of clip_score, fid, .* but there are green, red"):
        main(changed, dataclasses.replace(drawing, unified="paper"))


def test_the_choice_of_chats_does_not_depend_on_the_rest():
    names = [f"chat/{i}" for i in range(50)]
    some = chosen_chats(names, 10)
    assert len(some) == 10 and chosen_chats(names[::-1], 20) > some and chosen_chats(names, None) == set(names)
    assert chosen_chats(names, 10, seed=1) != some


RED = {"scorers": {"red": {"name": "prompted_scorer:load"}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {}}, "`rollout.scorers` must name at least one scorer"),
        ({"rollout": RED | {"seed": 1}}, "`rollout.seed` is set by this command"),
        ({"rollout": RED | {"batchsize": 1}}, "unknown option `batchsize`. Did you mean `batch_size`"),
        ({"num_images": 0}, "`num_images` must be at least 1"),
        ({"fid": {"kind": "transformers"}}, "`fid` needs `checkpoint`"),
        ({"fid": {"checkpoint": "x", "kind": "clip"}}, "`fid.kind` must be inception or transformers, but is 'clip'"),
        ({"fid": {"checkpoint": "x", "sides": 3}}, "unknown option `sides`. Did you mean `side`"),
        ({"references": "pictures"}, "`references` are for FID, which needs `fid`"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        DrawingConfig(**{"weights": "w", "rollout": RED} | changes)


def test_nothing_to_do(tmp_path):
    with pytest.raises(ConfigError, match="Give `weights` to draw pictures, or `candidates`"):
        main(ChatGenDrawConfig(str(tmp_path), "catalog.jsonl"), DrawingConfig())
    assert not list(Path(tmp_path).iterdir())
