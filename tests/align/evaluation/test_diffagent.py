"""Tables 1 and 2 end to end: real answers, toy models that draw, a scorer of its own; all numbers counted again."""

import dataclasses
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from align.evaluation.answers import PolicyAnswers
from align.evaluation.comparison import ComparisonError, load_comparison
from align.evaluation.diffagent import DiffAgentTablesConfig, main, prompt_ids
from align.evaluation.method_calls import judged_choice
from align.evaluation.prompt_sets import PromptSet, dabench_prompts
from align.evaluation.report import write_report
from align.scratch import ScratchConfig, build_from_scratch
from rewards.commandline import ConfigError, parse_config
from rollouts.catalog import Catalog, CatalogEntry, CatalogError
from rollouts.dialogue import DialogueFormat

SCORER = '''
"""How bright a picture is, or how red; and a log of what was scored."""
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
SIDE = 64
NEVER = "runs/never-loaded"
"""A policy that does not exist: its answers are prepared."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Toy models, one of which has no weights, and a DABench of six prompts."""
    from pocket.untrained import save_catalog

    folder = tmp_path_factory.mktemp("tables")
    catalog = save_catalog(folder / "models", loras=1)
    gone = catalog["Toy SD 1 - v1"].model_dump(by_alias=True) | {
        "name": "Gone - v1", "version_id": 99, "model_id": 99, "stats": {"downloads": 1},
        "files": [{"uri": "gone.safetensors", "format": "SafeTensor", "sha256": "A" * 64}],
    }  # fmt: skip
    catalog = Catalog([*catalog.values(), CatalogEntry.model_validate(gone)])
    catalog.save(folder / "models" / "catalog.jsonl")
    call = catalog["Toy SD 0 - v1"].default_call().to_dict()
    rows = [
        {"id": f"row-{i}", "instruction": {"prompt": f"a fox {i}", "negative prompt": f"bad {i}"}, "api": call}
        for i in range(6)
    ]
    splits = {"sft": datasets.Dataset.from_list(rows), "eval": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(splits).save_to_disk(folder / "dabench" / "sd15")
    (folder / "plugin").mkdir()
    (folder / "plugin" / "channel_scorer.py").write_text(SCORER)
    (folder / "parti.tsv").write_text("Prompt\na red dog\n")
    return folder


def save_lost_policy(folder, tokenizer):
    """Random weights: whatever it says is no call."""
    size = ScratchConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    build_from_scratch(size, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DialogueFormat(system_prompt="Choose.").save(folder)
    return str(folder)


def wanted(catalog, name, **changes):
    names = {"steps": "sampling steps", "sampler": "sampling method", "cfg": "cfg scale"}
    call = catalog[name].default_call().to_dict() | {names.get(key, key): value for key, value in changes.items()}
    return json.dumps(call)


def prepared_answers(catalog):
    """What the agent `Known` says to the six prompts of DABench."""
    return [
        wanted(catalog, "Toy SD LoRA 0 - v1", steps=3, cfg=3.5, sampler="DDIM", width=640, height=768),
        wanted(catalog, "Toy SD 0 - v1", steps=20, cfg=7, sampler="Euler a"),  # the default call
        "Certainly! " + wanted(catalog, "Toy SD 1 - v1"),  # not JSON
        wanted(catalog, "Gone - v1", steps=5),
        wanted(catalog, "Toy XL 0 - v1", steps=6),
        wanted(catalog, "Toy SD 1 - v1").replace("Toy SD 1", "Nobody"),
    ]


def options(world, output, agents, **changes):
    channel = {"name": "channel_scorer:load", "log": str(output) + "-scored.log"}
    rollout = {"native_side": SIDE, "scorers": {"red": channel | {"channel": 0}, "green": channel | {"channel": 1}}}
    plain = {
        "dataset": str(world / "dabench"), "catalog": str(world / "models" / "catalog.jsonl"),
        "weights": str(world / "models"), "output_dir": str(output), "agents": agents, "rollout": rollout,
        "baseline_model": "Toy SD 0 - v1", "num_images": 2, "max_new_tokens": 8, "device": "cpu",
    }  # fmt: skip
    return DiffAgentTablesConfig(**plain | changes)


def eval_rows(world):
    return datasets.load_from_disk(world / "dabench" / "sd15")["eval"]


def write_answers(output, catalog, rows):
    """As a run before would have left them."""
    prompts = dabench_prompts(rows, None, 0)
    origin = PolicyAnswers(NEVER, max_new_tokens=8, max_prompt_tokens=512, batch_size=1).origin
    output.mkdir(parents=True, exist_ok=True)
    with (output / "answers-known-dabench.jsonl").open("w") as file:
        for i, text in enumerate(prepared_answers(catalog)):
            prompt = {"index": i, "prompt": prompts.instructions[i]["prompt"], "text": text, "seconds": 1.0}
            file.write(json.dumps(prompt | origin) + "\n")


@pytest.fixture(scope="module")
def done(world, tokenizer):
    """A finished run: its options, folder, tables and rows by (method, prompt)."""
    sys.path.insert(0, str(world / "plugin"))
    catalog = Catalog.load(world / "models" / "catalog.jsonl")
    output = world / "out"
    write_answers(output, catalog, eval_rows(world))
    agents = {"Lost": save_lost_policy(world / "lost", tokenizer), "Known": NEVER}
    config = options(world, output, agents, baselines=["popular"])
    tables = main(config)
    rows = {(row["method"], row["prompt"]): row for row in load_comparison(output).rows}
    yield config, output, tables, rows
    sys.path.remove(str(world / "plugin"))
    sys.modules.pop("channel_scorer", None)


def drawn(row):
    call = json.loads(row["drawn_call"])
    return call["model"], call["sampling method"], call["sampling steps"], call["cfg scale"]


DEFAULT = ("Toy SD 0 - v1", "Euler a", 20, 7)


@pytest.mark.slow
def test_what_every_method_calls(done):
    _, _, _, rows = done
    assert {row["drawn_call"] for (method, _), row in rows.items() if method in ("Baseline", "Lost")} == {
        rows["Baseline", "a fox 0"]["drawn_call"]
    }
    assert drawn(rows["Baseline", "a fox 0"]) == DEFAULT
    assert drawn(rows["Known", "a fox 0"]) == ("Toy SD LoRA 0 - v1", "DDIM", 3, 3.5)
    assert drawn(rows["Baseline*", "a fox 0"]) == ("Toy SD 0 - v1", "DDIM", 3, 3.5)
    assert drawn(rows["DiffAgent#", "a fox 0"]) == ("Toy SD LoRA 0 - v1", "Euler a", 20, 7)
    # The parameters of a call that can't be drawn are parameters all the same.
    assert drawn(rows["Baseline*", "a fox 3"])[2] == 5 and drawn(rows["Baseline*", "a fox 4"])[2] == 6
    shapes = {
        (json.loads(row["drawn_call"])["width"], json.loads(row["drawn_call"])["height"]) for row in rows.values()
    }
    assert shapes == {(512, 512)}
    assert {Image.open(path).size for row in rows.values() for path in row["images"]} == {(SIDE, SIDE)}
    assert rows["Known", "a fox 2"]["negative_prompt"] == "bad 2"


@pytest.mark.slow
def test_whose_pictures_stand_in(done):
    _, _, _, rows = done
    for method in ("Known", "DiffAgent#"):
        found = [rows[method, f"a fox {i}"] for i in range(6)]
        assert [row["drawn_from"] for row in found] == ["own", "own", "baseline", "baseline", "baseline", "baseline"]
        assert [row["reason"] for row in found] == [None, None, "not_json", None, None, "unknown_model"]
        assert [row["hallucinated"] for row in found] == [False, False, True, False, False, True]
        assert [row["not_drawn"] for row in found] == [None, None, None, "missing_file", "other_architecture", None]
        for i in range(2, 6):
            baseline = rows["Baseline", f"a fox {i}"]
            assert (found[i]["images"], found[i]["scores"]) == (baseline["images"], baseline["scores"])
    assert json.loads(rows["Known", "a fox 3"]["call"])["model"] == "Gone - v1"
    assert rows["Known", "a fox 2"]["call"] is None
    assert all(rows["Lost", f"a fox {i}"]["hallucinated"] for i in range(6))
    assert rows["most popular model", "a fox 0"]["answer"] is None


@pytest.mark.slow
def test_numbers_from_the_pictures_themselves(done):
    _, _, tables, rows = done
    pictures = {path: np.asarray(Image.open(path)) for row in rows.values() for path in row["images"]}
    values, by_method = {}, defaultdict(list)
    for channel, name in enumerate(("red", "green")):
        means = {path: float(picture[..., channel].mean()) for path, picture in pictures.items()}
        low, high = min(means.values()), max(means.values())
        values[name] = {path: (value - low) / (high - low) for path, value in means.items()}
    for (method, _), row in rows.items():
        unified = np.mean([(values["red"][path] + values["green"][path]) / 2 for path in row["images"]])
        assert row["unified"] == pytest.approx(unified, abs=1e-5) and len(row["images"]) == 2
        by_method[method].append(unified)
    for row in tables["table2"]["rows"]:
        assert row["unified"]["value"] == pytest.approx(np.mean(by_method[row["method"]]), abs=1e-5)
        assert row["unified"]["n"] == 6
    known = next(r for r in tables["table2"]["differences"] if (r["method"], r["against"]) == ("Known", "Lost"))
    expected = np.array(by_method["Known"]) - np.array(by_method["Lost"])
    assert known["unified"]["value"] == pytest.approx(expected.mean(), abs=1e-5)
    assert known["ties"] == 5  # the default call, and four of the baseline's pictures
    shares = {row["method"]: row["hallucination"]["value"] for row in tables["table1"]["rows"]}
    assert shares == pytest.approx({"Lost": 1, "Known": 2 / 6, "most popular model": 0})


@pytest.mark.slow
def test_equal_calls_are_drawn_once_and_a_second_run_does_nothing(done):
    config, output, tables, rows = done
    log = output.parent / "out-scored.log"
    pictures = {path for row in rows.values() for path in row["images"]}
    scored = log.read_text().splitlines()
    assert len(scored) == 2 * len(pictures)  # by two scorers
    # Of 6 prompts: the default call and the most popular model's for each, Baseline* for prompts 0, 3 and 4 (its call
    # of prompt 1 is the default one), DiffAgent# and Known for prompt 0.
    assert len(pictures) == 2 * (6 + 6 + 3 + 1 + 1)
    answers = {path: path.read_bytes() for path in output.glob("answers-*.jsonl")}
    assert len(answers) == 2
    times = {path: path.stat().st_mtime_ns for path in (output / "rollout" / "store").rglob("*.png")}
    again = main(config)
    assert again == tables
    assert log.read_text().splitlines() == scored
    assert {path: path.read_bytes() for path in output.glob("answers-*.jsonl")} == answers
    assert {path: path.stat().st_mtime_ns for path in (output / "rollout" / "store").rglob("*.png")} == times


@pytest.mark.slow
def test_an_interrupted_run_goes_on(done, world):
    """Killed while answering; a policy that is gone can't be asked the rest, and the message says which it is."""
    config, output, _, _ = done
    path = output / "answers-known-dabench.jsonl"
    before = path.read_bytes()
    path.write_bytes(before[: before.rindex(b"Nobody")])
    with pytest.raises(ConfigError, match=r"`agents\.Known`: .*runs/never-loaded"):
        main(config)
    assert path.read_bytes().count(b"\n") == 5
    path.write_bytes(before)
    lost = output / "answers-lost-dabench.jsonl"
    full = {json.loads(line)["index"]: json.loads(line)["text"] for line in lost.read_text().splitlines()}
    lost.write_bytes(b"\n".join(lost.read_bytes().split(b"\n")[:2])[:-5])
    main(config)
    assert {json.loads(line)["index"]: json.loads(line)["text"] for line in lost.read_text().splitlines()} == full


@pytest.mark.slow
def test_a_baseline_that_can_not_be_drawn(done, world, tmp_path):
    write_answers(tmp_path, Catalog.load(world / "models" / "catalog.jsonl"), eval_rows(world))
    with pytest.raises(
        ComparisonError, match=r"default call of 'Gone - v1' can't be drawn.*missing_file.*`baseline_model`"
    ):
        main(options(world, tmp_path, {"Known": NEVER}, baseline_model="Gone - v1"))
    with pytest.raises(CatalogError, match="no SD 1.5 checkpoint 'Nobody'"):
        main(options(world, tmp_path, {"Known": NEVER}, baseline_model="Nobody"))


@pytest.mark.slow
def test_prompts_of_table_1_alone_are_not_drawn(done, world, tmp_path):
    config, *_ = done
    for file in Path(config.output_dir).glob("answers-*.jsonl"):  # asked already
        shutil.copy(file, tmp_path)
    store = str(Path(config.output_dir) / "rollout/store")
    few = dataclasses.replace(
        config, output_dir=str(tmp_path), num_drawn=1, num_sampled=2, rollout={**config.rollout, "store": store},
        agents={"Lost": config.agents["Lost"]},
    )  # fmt: skip
    tables = main(few)
    asked = {row["prompts"]: row["hallucination"]["n"] for row in tables["table1"]["rows"]}
    assert all(n > 1 for n in asked.values())
    assert {row["unified"]["n"] for row in tables["table2"]["rows"]} == {1}
    assert all(row["left_out"] == 0 for row in tables["table2"]["rows"])
    rows = load_comparison(tmp_path).rows
    nobody = [row for row in rows if row["drawn_from"] == "nobody"]
    drawn = {row["prompt_id"] for row in rows} - {row["prompt_id"] for row in nobody}
    assert len(drawn) == len(asked) and all(not row["images"] and row["scores"] is None for row in nobody)
    assert {row["hallucinated"] for row in nobody} <= {True, False} and any(row["call"] for row in nobody)
    assert nobody[0]["prompt"] not in write_report(tmp_path).read_text()

    # Sampled answers: two a prompt, of a policy that writes no calls; other ones for the other seed.
    (row,) = [row for row in tables["table1"]["rows"] if row["method"] == "Lost" and row["prompts"] == "DABench"]
    assert (row["sampled_hallucination"]["value"], row["sampled_hallucination"]["n"]) == (
        1.0,
        row["hallucination"]["n"],
    )
    assert "| sampled |" in (tmp_path / "table1.md").read_text()
    assert all(r["sampled_hallucination"] is None for r in tables["table1"]["rows"] if r["method"] != "Lost")
    samples = [(tmp_path / f"answers-lost-dabench-sampled-{i}.jsonl").read_text() for i in (0, 1)]
    assert samples[0] != samples[1]


def test_a_call_in_the_common_shape(world):
    catalog = Catalog.load(world / "models" / "catalog.jsonl")
    default = catalog.default_call("SD 1.5", "Toy SD 0 - v1")
    choice = judged_choice(wanted(catalog, "Toy SD 1 - v1", width=768, height=512, steps=9), catalog, default)
    assert choice.call is not None and (choice.call.width, choice.call.height, choice.call.sampling_steps) == (
        512,
        512,
        9,
    )
    xl = judged_choice(wanted(catalog, "Toy XL 0 - v1"), catalog, default)
    assert (xl.reason, xl.not_drawn) == (None, "other_architecture")
    assert judged_choice("[]", catalog, default)[1:3] == ("[]", "not_an_object")


def test_ids_depend_on_the_instruction_alone():
    one = PromptSet("COCO captions", ["a", "b", "a"], None)
    ids = prompt_ids(one)
    assert len(set(ids)) == 3 and ids[2] == f"{ids[0]}-2" and ids[0].startswith("coco-captions/")
    assert prompt_ids(PromptSet("COCO captions", ["b"], None)) == [ids[1]]
    negative = {"prompt": "b", "negative prompt": "blurry"}
    assert prompt_ids(PromptSet("COCO captions", [negative], None)) != [ids[1]]


RED = {"scorers": {"red": {"name": "channel_scorer:load"}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agents": {}}, "`agents` must name at least one policy"),
        ({"agents": "runs/sft"}, "`agents` must be a mapping, or one as JSON text, but is 'runs/sft'"),
        ({"agents": "[1]"}, r"`agents` must be a mapping, but is \[1\]"),
        ({"agents": {"SFT": 3}}, "`agents`: SFT must be the name or folder of a model, but is 3"),
        ({"agents": {"Baseline*": "a"}}, "'Baseline\\*' can't be the name of an agent"),
        ({"agents": {"most popular model": "a"}}, "'most popular model' can't be the name of an agent"),
        ({"agents": {"../": "a"}}, "'../' can't be the name of an agent"),
        ({"agents": {"A b": "a", "a-B": "b"}}, "several names come to 'a-b'"),
        ({"ours": "RLHF"}, r"`ours` must be one of `agents` \(SFT\), but is 'RLHF'"),
        ({"num_images": 0}, "`num_images` must be at least 1"),
        ({"baselines": ["magic"]}, "`baselines` may hold"),
        ({"baselines": ["embedding"]}, "needs `sentence_encoder`"),
        ({"rollout": None}, "`rollout.scorers` must name at least one scorer"),
        ({"rollout": RED | {"seed": 1}}, "`rollout.seed` is set by this command"),
        ({"rollout": RED | {"batchsize": 1}}, "unknown option `batchsize`. Did you mean `batch_size`"),
        ({"rollout": RED | {"batch_size": "4"}}, "`rollout.batch_size` is '4': Input should be a valid integer"),
        ({"rollout": RED | {"pool": "slurm"}}, "`pool` must be one of in_process, ray, but is 'slurm'"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(changes, message):
    plain = {"dataset": "d", "weights": "w", "output_dir": "o", "agents": {"SFT": "runs/sft"}, "rollout": RED}
    with pytest.raises(ValueError, match=message):
        DiffAgentTablesConfig(**plain | changes)


def test_mappings_on_the_command_line():
    flags = ["--dataset", "d", "--weights", "w", "--output_dir", "o", "--rollout", json.dumps(RED)]
    config = parse_config(DiffAgentTablesConfig, args=[*flags, "--agents", '{"SFT": "a", "RRHF": "b"}'])
    assert config.agents == {"SFT": "a", "RRHF": "b"} and config.run_config().scorers == RED["scorers"]
    assert (config.run_config().catalog, config.run_config().num_images) == ("d/catalog.jsonl", 3)
    with pytest.raises(ConfigError, match="`agents` must be a mapping"):
        parse_config(DiffAgentTablesConfig, args=[*flags, "--agents", "runs/sft"])
