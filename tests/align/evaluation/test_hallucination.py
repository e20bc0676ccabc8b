"""DiffAgent Table 1 end to end on a toy DABench: numbers, files, resuming, and what is refused."""

import csv
import json
import subprocess
import sys

import datasets
import pytest

from align.agents.calibration import Calibration
from align.evaluation.hallucination import HallucinationConfig, main
from align.pairs import DataError
from align.scratch import ScratchConfig, build_from_scratch
from rewards.commandline import ConfigError
from rollouts.catalog import CatalogError
from rollouts.dialogue import Dialogue, DialogueFormat
from rollouts.responses import generate_responses

DEFAULTS = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0}
# name, version, model, downloads
MODELS = [("Fox - v1", 1, 1, 10), ("Fox - v2", 2, 1, 90), ("City - v1", 3, 2, 50)]
# prompt, model, changes to the defaults
SFT = [
    ("a red fox in the snow", "Fox - v1", {}),
    ("neon city at night", "City - v1", {"sampling steps": 30, "cfg scale": 5.0}),
    ("portrait of a fox", "Fox - v2", {"sampling method": "DPM++ 2M Karras"}),
]
EVAL = [
    ("fox, red, snow", "Fox - v1", {}),  # TF-IDF: row 0, everything right
    ("city in neon", "City - v1", {"sampling steps": 25, "cfg scale": 5.0}),  # row 1: right model, 4 of 5 arguments
    ("a fox portrait", "Fox - v1", {"width": 640, "height": 640}),  # row 2: right model, other version, 2 of 5
    ("füchsin 狐", "City - v1", {}),  # nothing in common: row 0, wrong model, 5 of 5
]


def rows(pairs):
    return [
        {
            "id": f"row-{i}",
            "instruction": {"prompt": prompt, "negative prompt": "ugly"},
            "api": {"model": model, "type": "Checkpoint", "base Model": "SD 1.5", **DEFAULTS, "model description": "d"}
            | changes,
        }
        for i, (prompt, model, changes) in enumerate(pairs)
    ]


@pytest.fixture
def dabench(tmp_path):
    folder = tmp_path / "dabench"
    splits = {"sft": rows(SFT), "rrhf": rows(SFT), "eval": rows(EVAL)}
    datasets.DatasetDict({name: datasets.Dataset.from_list(r) for name, r in splits.items()}).save_to_disk(
        folder / "sd15"
    )
    entries = (
        {"name": name, "version_id": version, "model_id": model, "type": "Checkpoint", "base_model": "SD 1.5"}
        | {"stats": {"downloads": downloads}, "description": "d", "default_parameters": DEFAULTS}
        for name, version, model, downloads in MODELS
    )
    (folder / "catalog.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def save_policy(folder, tokenizer, seed=0):
    """Random weights; the layers are scaled up so that answers depend on the prompt."""
    size = ScratchConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    policy = build_from_scratch(size, tokenizer, seed=seed)
    for weight in policy.model.layers.parameters():
        weight.data.mul_(8 if weight.ndim == 2 else 1)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DialogueFormat(system_prompt="Choose.").save(folder)
    return str(folder)


@pytest.fixture
def parti(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text("Prompt\tCategory\n" + "".join(f"{p}\tx\n" for p in ("city", "snow", "fox portrait")))
    return str(path)


def options(dabench, **changes):
    plain = {"dataset": str(dabench), "output_dir": str(dabench.parent / "out"), "max_new_tokens": 10}
    return HallucinationConfig(**plain | {"batch_size": 3, "latency_prompts": 1, "device": "cpu"} | changes)


def value(row, name):
    return row[f"{name}_accuracy"]["value"]


def without_times(report):
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in report["rows"]]


def test_numbers_of_the_baselines(dabench, parti):
    report = main(options(dabench, parti_prompts=parti))
    assert (report["architecture"], report["catalog"]) == ("SD 1.5", 3)
    assert [(row["method"], row["prompts"]) for row in report["rows"]] == [
        ("most popular model", "DABench"),
        ("most popular model", "PartiPrompts"),
        ("TF-IDF nearest neighbour", "DABench"),
        ("TF-IDF nearest neighbour", "PartiPrompts"),
    ]
    popular, _, tfidf, elsewhere = report["rows"]
    for row in report["rows"]:
        assert row["hallucination"]["value"] == 0 and row["reasons"] == {}
    # Most popular: always Fox v2 with the defaults. Models: Fox, City, Fox, City; arguments 5, 3, 3, 5 of 5.
    assert (value(popular, "version"), value(popular, "model")) == (0.0, 0.5)
    assert value(popular, "argument") == pytest.approx(16 / 20)
    assert popular["distinct_models"] == 1
    # Nearest neighbour: rows 0, 1, 2, 0 of SFT; arguments 5, 4, 2, 5 of 5.
    assert (value(tfidf, "version"), value(tfidf, "model")) == (0.5, 0.75)
    assert value(tfidf, "argument") == pytest.approx(16 / 20)
    assert tfidf["distinct_models"] == 3
    assert elsewhere["hallucination"]["n"] == 3 and "version_accuracy" not in elsewhere
    assert not list((dabench.parent / "out").glob("answers-*"))  # a policy's only


def test_agents_of_a_policy_never_hallucinate(dabench, parti, tokenizer, tmp_path):
    name = save_policy(tmp_path / "policy", tokenizer)
    Calibration(retrieval_weight=1e5).save(name)
    agents = ["constrained", "hybrid", "retrieval"]
    report = main(options(dabench, parti_prompts=parti, model_name_or_path=name, agents=agents, baselines=[]))
    assert [(row["method"], row["prompts"]) for row in report["rows"][2:]] == [
        (f"{name}, {kind}", prompts)
        for kind in ("constrained", "constrained, with retrieval", "model by retrieval")
        for prompts in ("DABench", "PartiPrompts")
    ]
    assert [row["hallucination"]["value"] for row in report["rows"]] == [1.0] * 2 + [0.0] * 6
    # Words find Fox v1, City and Fox v2, which are right, right, and right but for the version; the last prompt has
    # no word in common with anything, so that the policy decides.
    for row in (report["rows"][4], report["rows"][6]):
        assert value(row, "version") in (0.5, 0.75) and value(row, "model") in (0.75, 1.0)
    Calibration().save(name)
    with pytest.raises(ConfigError, match="`agents` hybrid needs the weight of retrieval.*align.agents.calibrate"):
        main(options(dabench, model_name_or_path=name, agents=["hybrid"], baselines=[]))


def test_a_policy_beside_the_baselines(dabench, parti, tokenizer, tmp_path):
    name = save_policy(tmp_path / "policy", tokenizer)
    report = main(options(dabench, parti_prompts=parti, model_name_or_path=name))
    out = tmp_path / "out"
    assert len(report["rows"]) == 6
    first, second = report["rows"][:2]
    for row, n in ((first, 4), (second, 3)):
        assert row["method"] == name
        assert row["hallucination"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": n}  # it has learned nothing
        assert sum(row["reasons"].values()) == n and row["distinct_models"] == 0
        assert row["seconds"] > 0 and row["one_at_a_time_seconds"] > 0
    assert value(first, "model") == value(first, "version") == value(first, "argument") == 0
    assert json.loads((out / "table.json").read_text()) == report
    table = list(csv.DictReader((out / "table.csv").open()))
    assert [float(row["hallucination"]) for row in table] == [1, 1, 0, 0, 0, 0]
    assert (out / "table.md").read_text().count("| DABench |") == 4
    assert "max_new_tokens: 10" in (out / "config.yaml").read_text()

    # The answers are the policy's, under the dialogue format it was saved with.
    from rollouts.policy import load_policy

    dialogue = Dialogue(tokenizer, DialogueFormat(system_prompt="Choose."))
    prompts = [prompt for prompt, _, _ in EVAL]
    alone = generate_responses(load_policy(name), dialogue, prompts, max_new_tokens=10, batch_size=1, progress=False)
    expected = {r.index: r.text for r in alone}
    lines = [json.loads(line) for line in (out / "answers-dabench.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert {line["index"]: line["text"] for line in lines} == expected
    assert {line["index"]: line["prompt"] for line in lines} == dict(enumerate(prompts))
    assert len(set(expected.values())) > 1


def test_going_on_after_a_kill_in_the_middle_of_a_line(dabench, tokenizer, tmp_path):
    config = options(dabench, model_name_or_path=save_policy(tmp_path / "policy", tokenizer), batch_size=1)
    first = main(config)
    path = tmp_path / "out" / "answers-dabench.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1]
    broken = next(i for i, line in enumerate(lines) if "狐".encode() in line)
    assert broken > 0
    # What was answered is kept, told from a new answer by a time that nothing takes. A line separator is no new line.
    kept = json.loads(lines[0]) | {"seconds": 1234.5, "extra": "a\u2028b\u0085c"}
    half = lines[broken][: lines[broken].index("狐".encode()) + 1]
    path.write_bytes(json.dumps(kept, ensure_ascii=False).encode() + b"\n" + half)

    assert without_times(main(config)) == without_times(first)
    again = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert again[0] == kept
    assert sorted(row["index"] for row in again) == [0, 1, 2, 3]
    texts = {json.loads(line)["index"]: json.loads(line)["text"] for line in lines}
    assert {row["index"]: row["text"] for row in again} == texts
    # A finished run asks nothing again.
    before = path.read_bytes()
    main(config)
    assert path.read_bytes() == before


def test_answers_of_something_else_are_refused(dabench, tokenizer, tmp_path):
    name = save_policy(tmp_path / "policy", tokenizer)
    main(options(dabench, model_name_or_path=name))
    path = tmp_path / "out" / "answers-dabench.jsonl"
    before = path.read_bytes()
    other = save_policy(tmp_path / "other", tokenizer, seed=1)
    for changes, message in [
        ({"num_dabench": 2}, "answers to other prompts"),
        ({"model_name_or_path": other}, "answers of another policy or with other options"),
        ({"model_name_or_path": name, "max_new_tokens": 11}, "answers of another policy or with other options"),
    ]:
        with pytest.raises(ConfigError, match=rf"answers-dabench\.jsonl holds {message}.*Choose another `output_dir`"):
            main(options(dabench, **{"model_name_or_path": name} | changes))
        assert path.read_bytes() == before
    save_policy(tmp_path / "policy", tokenizer, seed=2)  # trained further, in the same folder
    with pytest.raises(ConfigError, match="another policy"):
        main(options(dabench, model_name_or_path=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ["popular", "magic"]}, r"`baselines` may hold .* but got \['magic'\]"),
        ({"baselines": ["embedding"]}, "needs `sentence_encoder`"),
        ({"num_prompts": 0}, "`num_prompts` must be at least 1, but got 0"),
        ({"num_dabench": -1}, "`num_dabench` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"latency_prompts": -1}, "`latency_prompts` must be 0 or more"),
    ],
)
def test_options_that_make_no_sense(dabench, changes, message):
    with pytest.raises(ValueError, match=message):
        options(dabench, **changes)


def test_inputs_that_are_not_there(dabench, tmp_path):
    for changes, error, message in [
        ({"architecture": "SD 3"}, DataError, "`architecture` must be one of SD 1.5, SDXL 1.0, but is 'SD 3'"),
        ({"architecture": "SDXL 1.0"}, DataError, "no DABench for SDXL 1.0 .it has: SD 1.5"),
        ({"catalog": str(tmp_path / "gone.jsonl")}, CatalogError, r"no catalogue file at .*gone\.jsonl"),
        ({"model_name_or_path": str(tmp_path / "gone")}, ConfigError, "`model_name_or_path`: No model directory at"),
        ({"model_name_or_path": str(tmp_path)}, ConfigError, "`model_name_or_path`: "),
    ]:
        with pytest.raises(error, match=message):
            main(options(dabench, **changes))


def test_rows_that_can_not_be_used(dabench):
    data = datasets.load_from_disk(dabench / "sd15")
    bad = data["sft"].to_list()
    bad[1]["api"]["sampling method"] = "magic"
    broken = datasets.DatasetDict(sft=datasets.Dataset.from_list(bad), eval=data["eval"])
    broken.save_to_disk(dabench.parent / "broken")
    catalog = str(dabench / "catalog.jsonl")
    with pytest.raises(DataError, match="split sft: unknown_sampler: .*'magic'"):
        main(options(dabench, dataset=str(dabench.parent / "broken"), catalog=catalog))
    empty = datasets.DatasetDict(sft=data["sft"], eval=data["eval"].select([]))
    empty.save_to_disk(dabench.parent / "empty", num_shards={"sft": 1, "eval": 1})
    with pytest.raises(DataError, match="the split eval has no rows"):
        main(options(dabench, dataset=str(dabench.parent / "empty"), catalog=catalog))


def test_the_command(dabench, tmp_path):
    """As in the module's docstring, without a policy; an error is one line and exit code 2."""
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"dataset: {dabench}\noutput_dir: {tmp_path / 'from_file'}\nbaselines: [popular]\n")
    command = [sys.executable, "-m", "align.evaluation.hallucination", f"--config={config}"]
    out = tmp_path / "from_flag"
    done = subprocess.run([*command, "--output_dir", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| most popular model | DABench | 4 |" in done.stderr  # the table is shown
    assert len(json.loads((out / "table.json").read_text())["rows"]) == 1
    assert not (tmp_path / "from_file").exists()
    bad = subprocess.run([*command, "--parti_prompts", "gone.tsv"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (2, "error: There is no prompt file at gone.tsv.\n")
