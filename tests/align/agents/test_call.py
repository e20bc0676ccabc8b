"""`python -m align.agents.call`: what it prints, draws and refuses."""

import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from align.agents.call import CallConfig, main
from rollouts.api import APICall


@pytest.fixture
def config(agent_folder):
    def make(**options):
        given = {"model_name_or_path": str(agent_folder), "catalog": str(agent_folder.parent / "catalog.jsonl")}
        return CallConfig(**given | {"device": "cpu"} | options)

    return make


@pytest.mark.slow
def test_as_people_type_it(agent_folder, shop):
    command = [sys.executable, "-m", "align.agents.call", "a fox in pixel art", "--top_k", "2", "--device", "cpu"]
    command += ["--model_name_or_path", str(agent_folder), "--catalog", str(agent_folder.parent / "catalog.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)  # and nothing else is printed there
    assert answer["prompt"] == "a fox in pixel art"
    assert answer["call"] == shop["Pixel Wave - v10"].default_call().to_dict() and len(answer["alternatives"]) == 2
    command[command.index("--catalog") + 1] = "none.jsonl"
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: There is no catalogue file at none.jsonl."


def test_prompts_from_standard_input(config, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("letters\n\na fox in pixel art\nletters\n"))
    main(config(format="call", batch_size=2))
    models = [APICall.from_json(line).model for line in capsys.readouterr().out.splitlines()]
    assert models == ["שלום - v2", "Pixel Wave - v10", "שלום - v2"]


@pytest.mark.parametrize(
    ("format", "expected"),
    [("a1111", '"sampler_name": "Euler a"'), ("infotext", "Steps: 20"), ("comfyui", '"class_type"'),
     ("diffusers", "import torch")],
)  # fmt: skip
def test_formats(config, capsys, format, expected):
    main(config(format=format, filter='{"type": "LoRA"}', negative_prompt="blurry"), ["a watercolour of a lake"])
    printed = capsys.readouterr().out
    assert expected in printed and "blurry" in printed and "a watercolour of a lake, wet paint" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "{"}, "`filter` must be a JSON object"),
        ({"filter": '{"typ": 1}'}, r"`filter` has no \['typ'\]"),
        ({"filter": {"allow": ["no"]}}, r"`allow` names \['no'\], which the catalogue does not have"),
        ({"format": "png"}, "`format` must be one of answer, call, a1111"),
        ({"render": "x.png"}, "`render` needs `weights`"),
        ({"render": "x.jpg", "weights": "w"}, "`render` must be a .png file"),
        ({"catalog": "none.jsonl"}, "There is no catalogue file at none.jsonl"),
        ({"catalog": None}, "`catalog` or `dataset` is needed"),
        ({"architecture": "SD 9"}, "`architecture` must be one of"),
        ({"costs": "none.json"}, "Can't read the costs none.json"),
        ({"model_name_or_path": "/none"}, "`model_name_or_path`: No model directory"),
        ({"top_k": -1}, "`top_k` must be at least 0"),
    ],
)
def test_errors(config, options, message):
    with pytest.raises(ValueError, match=message):
        main(config(**options), ["a"])


def test_nothing_to_ask(config, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ValueError, match="No prompt: python -m align.agents.call"):
        main(config())


@pytest.mark.slow
def test_calls_are_drawn(config, toy_world, tmp_path, capsys):
    pytest.importorskip("diffusers", reason="needs the extra `render`")
    options = {
        "catalog": str(toy_world.folder / "catalog.jsonl"),
        "render": str(tmp_path / "out.png"),
        "format": "call",
    }
    options |= {"weights": str(toy_world.folder), "native_side": 64}
    main(config(**options, filter={"max_steps": 2, "samplers": ["Euler a", "DDIM"]}), ["a fox", "a house"])
    for number, line in enumerate(capsys.readouterr().out.splitlines()):
        call, picture = APICall.from_json(line), Image.open(tmp_path / f"out-{number}.png")
        assert picture.size == tuple(max(8, round(side / 8 / 8) * 8) for side in (call.width, call.height))
