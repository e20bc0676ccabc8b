"""Calls in other programs' words: read back by our own parser of A1111's infotext, and by diffusers itself."""

import ast
import json
import subprocess
import sys

import pytest

from align.agents.exports import (
    EXPORTS,
    ExportError,
    a1111_infotext,
    a1111_payload,
    comfyui_workflow,
    diffusers_script,
    file_name,
)
from align.bench.infotext import read_generation
from rollouts.catalog import CatalogEntry
from rollouts.samplers import KNOWN_SAMPLERS, normalize_sampler

HOSTILE = 'a "fox"\\ \'s\nSteps: 1, Sampler: LMS\nNegative prompt: x """ {y} <b>'


def call_of(shop, name="Pixel Wave - v1", **changes):
    return shop.reconstruct(name, shop[name].default_call().to_dict() | changes)


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M Karras", "DPM++ SDE", "DDIM", "DPM++ 2M SDE Exponential"])
def test_infotext_is_read_back(shop, sampler):
    changes = {"width": 640, "height": 768, "sampling method": sampler, "sampling steps": 33, "cfg scale": 4.5}
    call = call_of(shop, **changes)
    text = a1111_infotext(call, shop, "a fox (red:1.2)", "blurry, bad", seed=7)
    found = read_generation(text)
    assert (found.sampler, found.steps, found.cfg_scale, found.width, found.height) == (sampler, 33, 4.5, 640, 768)
    assert found.prompt.startswith("a fox") and "blurry" in found.negative_prompt


def test_infotext_and_payload_name_checkpoint_and_lora(shop):
    call = call_of(shop, "水彩 - v1")
    digest = shop["Pixel Wave - v1"].files[0].sha256
    payload = a1111_payload(call, shop, "a lake", "blurry", seed=3)
    assert payload["prompt"] == "a lake, wet paint <lora:file-8:0.8>"
    assert payload["override_settings"] == {"sd_model_checkpoint": digest[:10].lower()}
    expected = {"negative_prompt": "blurry", "seed": 3, "sampler_name": "Euler a", "scheduler": "Uniform", "steps": 20,
                "cfg_scale": 7.0, "width": 512, "height": 512}  # fmt: skip
    assert expected.items() <= payload.items()
    found = read_generation(a1111_infotext(call, shop, "a lake"))
    assert [(lora.name, lora.weight) for lora in found.loras] == [("file-8", 0.8)]


def test_infotext_can_not_be_broken_out_of(shop):
    found = read_generation(a1111_infotext(call_of(shop), shop, HOSTILE, HOSTILE, seed=1))
    assert (found.sampler, found.steps) == ("Euler a", 20)


def test_every_sampler_is_one_that_the_programs_know_or_is_refused(shop):
    comfy = {
        "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive",
        "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "ddim",
        "uni_pc", "lcm",
    }  # fmt: skip
    refused = {"comfyui": set(), "diffusers": set()}
    for sampler in sorted(KNOWN_SAMPLERS):
        call = call_of(shop, **{"sampling method": sampler})
        payload = a1111_payload(call, shop, "a")
        assert normalize_sampler(payload["sampler_name"], payload["scheduler"]) == sampler
        try:
            inputs = comfyui_workflow(call, shop, "a")["sampler"]["inputs"]
            assert inputs["sampler_name"] in comfy and inputs["scheduler"]
        except ExportError:
            refused["comfyui"].add(sampler.split(" ")[0])
        try:
            ast.parse(diffusers_script(call, shop, "a"))
        except ExportError:
            refused["diffusers"].add(sampler)
    assert refused["comfyui"] == {"Restart", "PLMS", "DDIM"}  # the last is DDIM CFG++
    assert refused["diffusers"] >= {"Restart", "DPM fast", "DPM adaptive", "DDIM CFG++"}


def test_workflow_is_connected(shop):
    call = call_of(shop, "水彩 - v1", **{"sampling method": "DPM++ 2M Karras"})
    nodes = comfyui_workflow(call, shop, HOSTILE, "blurry", seed=5)
    for node in nodes.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in nodes and isinstance(value[1], int)
    sampler = nodes["sampler"]["inputs"]
    assert (sampler["seed"], sampler["sampler_name"], sampler["scheduler"], sampler["steps"]) == (
        5, "dpmpp_2m", "karras", 20,
    )  # fmt: skip
    assert sampler["model"] == ["lora", 0] and nodes["prompt"]["inputs"]["clip"] == ["lora", 1]
    assert nodes["lora"]["inputs"]["lora_name"] == "file-8.safetensors"
    assert nodes["prompt"]["inputs"]["text"].startswith(HOSTILE)
    assert "lora" not in comfyui_workflow(call_of(shop), shop, "a")
    json.dumps(nodes)


def test_script_says_nothing_but_what_it_should(shop):
    script = diffusers_script(call_of(shop, "水彩 - v1"), shop, HOSTILE, HOSTILE, seed=9)
    calls = {ast.unparse(node.func): node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Call)}
    drawn = {keyword.arg: keyword.value for keyword in calls["pipeline"].keywords}
    assert ast.literal_eval(drawn["prompt"]) == f"{HOSTILE}, wet paint"
    assert ast.literal_eval(drawn["negative_prompt"]) == HOSTILE
    assert ast.literal_eval(calls["pipeline.load_lora_weights"].args[0]) == "file-8.safetensors"


@pytest.mark.slow
def test_script_draws_with_diffusers(tmp_path):
    """The script as it is, for a toy checkpoint in a single file's place."""
    pytest.importorskip("diffusers", reason="needs the extra `render`")
    from pocket.untrained import save_catalog

    catalog = save_catalog(tmp_path)
    entry = next(e for e in catalog.values() if e.type == "Checkpoint" and e.base_model == "SD 1.5")
    call = catalog.reconstruct(entry.name, {"width": 256, "height": 256, "sampling steps": 2})
    script = diffusers_script(call, catalog, "a fox")
    folder = tmp_path / entry.files[0].uri
    loaded = f"StableDiffusionPipeline.from_single_file({file_name(entry)!r}, torch_dtype=dtype)"
    assert loaded in script
    (tmp_path / "draw.py").write_text(
        script.replace(loaded, f"StableDiffusionPipeline.from_pretrained({str(folder)!r}, torch_dtype=dtype)")
    )
    done = subprocess.run([sys.executable, "draw.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "picture.png").stat().st_size > 100


def test_unknown_models_and_files_that_are_paths(shop):
    call = call_of(shop).model_copy(update={"model": "nobody"})
    for export in EXPORTS.values():
        with pytest.raises(ExportError, match="`model` 'nobody' can't be called with this catalogue: unknown_model"):
            export(call, shop, "a")
    entry = shop["Back\\slash \\n [y], {z}: - v1"].model_dump(by_alias=True)
    for uri, name in [
        ("https://civitai.com/api/download/models/12", "Back_slash_n_y_z_-_v1.safetensors"),
        ("../../etc/passwd.safetensors", "passwd.safetensors"),
        ("x/a b;rm -rf.safetensors", "Back_slash_n_y_z_-_v1.safetensors"),
        ("x/%2e%2e%2fevil.safetensors", "Back_slash_n_y_z_-_v1.safetensors"),
        ("models/Good-1.5_x.safetensors?download=1", "Good-1.5_x.safetensors"),
    ]:
        file = {"uri": uri, "format": "SafeTensor", "sha256": "A" * 64}
        assert file_name(CatalogEntry.model_validate(entry | {"files": [file]})) == name
