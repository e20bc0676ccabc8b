"""A call in the words of the programs that draw: A1111, ComfyUI and diffusers.

    payload = a1111_payload(call, catalog, "a corgi")  # POST it to /sdapi/v1/txt2img
    infotext = a1111_infotext(call, catalog, "a corgi")  # paste it into the prompt field
    workflow = comfyui_workflow(call, catalog, "a corgi")  # POST {"prompt": workflow} to /prompt
    script = diffusers_script(call, catalog, "a corgi")  # python - <<< "$script"

Checkpoints and LoRAs are named by their files: the end of a catalogue file's address where that is a file name, else
the model's name with other signs than letters, digits, `.`, `-` replaced by `_`. A1111 gets the hash of the checkpoint,
by which it finds the file whatever it is called.
"""

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from rollouts.api import APICall
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.requests import with_trigger_words
from rollouts.samplers import SCHEDULES
from rollouts.schedulers import SamplerError, scheduler_spec

_COMFY_SAMPLERS = {
    "Euler a": "euler_ancestral", "Euler": "euler", "LMS": "lms", "Heun": "heun", "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral", "DPM++ 2S a": "dpmpp_2s_ancestral", "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde", "DPM++ 2M SDE": "dpmpp_2m_sde", "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    "DPM++ 3M SDE": "dpmpp_3m_sde", "DPM fast": "dpm_fast", "DPM adaptive": "dpm_adaptive", "DDIM": "ddim",
    "UniPC": "uni_pc", "LCM": "lcm",
}  # fmt: skip
"""https://github.com/comfyanonymous/ComfyUI, comfy/samplers.py: KSAMPLER_NAMES, SAMPLER_NAMES."""
_COMFY_SCHEDULES = {
    "": "normal", "Karras": "karras", "Exponential": "exponential", "Polyexponential": "exponential",
    "SGM Uniform": "sgm_uniform", "KL Optimal": "kl_optimal", "Simple": "simple", "Normal": "normal", "Beta": "beta",
}  # fmt: skip
_COMFY_DDIM_SCHEDULE = "ddim_uniform"
_SUFFIXES = (".safetensors", ".ckpt", ".pt")
_PIPELINES = {"SD 1.5": "StableDiffusionPipeline", "SDXL 1.0": "StableDiffusionXLPipeline"}


class ExportError(ValueError):
    """A call that a program can't express; the message names the program and the field."""


class _Parts(NamedTuple):
    checkpoint: CatalogEntry
    lora: CatalogEntry | None
    weight: float
    prompt: str
    negative: str
    sampler: str
    schedule: str


def a1111_payload(
    call: APICall, catalog: Catalog, prompt: str, negative_prompt: str = "", seed: int = -1
) -> dict[str, Any]:
    """The body of a request to `/sdapi/v1/txt2img` of Stable Diffusion WebUI 1.9 or newer.

    Args:
        call: The call.
        catalog: Where its model is.
        prompt: What to draw.
        negative_prompt: What not.
        seed: -1: a random one.

    Raises:
        ExportError: The catalogue does not have the model.
    """
    parts = _parts(call, catalog, prompt, negative_prompt)
    checkpoint = parts.checkpoint
    return {
        "prompt": _with_lora(parts),
        "negative_prompt": parts.negative,
        "seed": seed,
        "sampler_name": parts.sampler,
        "scheduler": parts.schedule or "Uniform",
        "steps": call.sampling_steps,
        "cfg_scale": call.cfg_scale,
        "width": call.width,
        "height": call.height,
        "override_settings": {"sd_model_checkpoint": _short_hash(checkpoint) or file_name(checkpoint)},
        "override_settings_restore_afterwards": False,
    }


def a1111_infotext(call: APICall, catalog: Catalog, prompt: str, negative_prompt: str = "", seed: int = -1) -> str:
    """Generation data as A1111 writes it into pictures and reads it from its prompt field. See `a1111_payload`."""
    parts = _parts(call, catalog, prompt, negative_prompt)
    fields = {
        "Steps": f"{call.sampling_steps}",
        "Sampler": parts.sampler,
        "Schedule type": parts.schedule or "Uniform",
        "CFG scale": f"{call.cfg_scale:g}",
        "Seed": f"{seed}",
        "Size": f"{call.width}x{call.height}",
        "Model hash": _short_hash(parts.checkpoint),
        "Model": PurePosixPath(file_name(parts.checkpoint)).stem,
    }
    lines = [_one_line(_with_lora(parts))]
    if parts.negative:
        lines.append(f"Negative prompt: {_one_line(parts.negative)}")
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items() if value))
    return "\n".join(lines)


def comfyui_workflow(
    call: APICall, catalog: Catalog, prompt: str, negative_prompt: str = "", seed: int = 0
) -> dict[str, dict[str, Any]]:
    """A workflow in ComfyUI's API format: nodes by id.

    Raises:
        ExportError: The catalogue does not have the model, or ComfyUI has no such sampler.
    """
    parts = _parts(call, catalog, prompt, negative_prompt)
    sampler = _COMFY_SAMPLERS.get(parts.sampler)
    if sampler is None:
        raise ExportError(f"ComfyUI has no `sampling method` {call.sampling_method!r}.")
    schedule = _COMFY_DDIM_SCHEDULE if parts.sampler == "DDIM" else _COMFY_SCHEDULES[parts.schedule]
    nodes = {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name=file_name(parts.checkpoint)),
        "prompt": _node("CLIPTextEncode", text=parts.prompt, clip=["checkpoint", 1]),
        "negative": _node("CLIPTextEncode", text=parts.negative, clip=["checkpoint", 1]),
        "size": _node("EmptyLatentImage", width=call.width, height=call.height, batch_size=1),
        "sampler": _node(
            "KSampler", model=["checkpoint", 0], positive=["prompt", 0], negative=["negative", 0],
            latent_image=["size", 0], seed=seed, steps=call.sampling_steps, cfg=call.cfg_scale, sampler_name=sampler,
            scheduler=schedule, denoise=1.0,
        ),
        "decoder": _node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": _node("SaveImage", images=["decoder", 0], filename_prefix="t2i-align"),
    }  # fmt: skip
    if parts.lora is not None:
        nodes["lora"] = _node(
            "LoraLoader", model=["checkpoint", 0], clip=["checkpoint", 1], lora_name=file_name(parts.lora),
            strength_model=parts.weight, strength_clip=parts.weight,
        )  # fmt: skip
        nodes["sampler"]["inputs"]["model"] = ["lora", 0]
        for name in ("prompt", "negative"):
            nodes[name]["inputs"]["clip"] = ["lora", 1]
    return nodes


def diffusers_script(call: APICall, catalog: Catalog, prompt: str, negative_prompt: str = "", seed: int = 0) -> str:
    """A Python script that draws the call with diffusers, from files in its folder, into `picture.png`.

    Raises:
        ExportError: The catalogue does not have the model, or diffusers has no such sampler.
    """
    parts = _parts(call, catalog, prompt, negative_prompt)
    try:
        spec = scheduler_spec(call.sampling_method)
    except SamplerError as error:
        raise ExportError(str(error)) from error
    pipeline = _PIPELINES[call.base_model]
    options = "".join(f", {key}={value!r}" for key, value in spec.config.items())
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted([pipeline, str(spec.scheduler)]))}",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float16 if device == "cuda" else torch.float32',
        f"pipeline = {pipeline}.from_single_file({file_name(parts.checkpoint)!r}, torch_dtype=dtype).to(device)",
        f"pipeline.scheduler = {spec.scheduler}.from_config(pipeline.scheduler.config{options})",
    ]
    if parts.lora is not None:
        lines.append(f"pipeline.load_lora_weights({file_name(parts.lora)!r})")
        lines.append(f"pipeline.fuse_lora(lora_scale={parts.weight!r})")
    lines += [
        "picture = pipeline(",
        f"    prompt={parts.prompt!r},",
        f"    negative_prompt={parts.negative!r},",
        f"    width={call.width},",
        f"    height={call.height},",
        f"    num_inference_steps={call.sampling_steps},",
        f"    guidance_scale={call.cfg_scale!r},",
        f"    generator=torch.Generator(device).manual_seed({seed}),",
        ").images[0]",
        'picture.save("picture.png")',
    ]
    return "\n".join(lines) + "\n"


def file_name(entry: CatalogEntry) -> str:
    """What a model's file is called; never a path."""
    for file in entry.files:
        name = unquote(PurePosixPath(urlsplit(file.uri).path).name)
        if name.endswith(_SUFFIXES) and _plain(name) == name:
            return name
    return _plain(entry.name) + ".safetensors"


EXPORTS: dict[str, Callable[..., Any]] = {
    "a1111": a1111_payload,
    "infotext": a1111_infotext,
    "comfyui": comfyui_workflow,
    "diffusers": diffusers_script,
}
"""By the name that options and requests have for them."""


def _parts(call: APICall, catalog: Catalog, prompt: str, negative_prompt: str) -> _Parts:
    if problems := catalog.validate(call):
        raise ExportError(f"`model` {call.model!r} can't be called with this catalogue: {problems[0]}.")
    entry = catalog[call.model]
    checkpoint = catalog[entry.base_checkpoint] if entry.base_checkpoint is not None else entry
    lora = entry if entry.type == "LoRA" else None
    weight = 1.0 if lora is None or lora.lora_weight is None else lora.lora_weight
    schedule = next((s for s in SCHEDULES if call.sampling_method.endswith(f" {s}")), "")
    sampler = call.sampling_method.removesuffix(f" {schedule}") if schedule else call.sampling_method
    return _Parts(
        checkpoint, lora, weight, with_trigger_words(prompt, entry.trigger_words, "first"), negative_prompt, sampler,
        schedule,
    )  # fmt: skip


def _with_lora(parts: _Parts) -> str:
    if parts.lora is None:
        return parts.prompt
    return f"{parts.prompt} <lora:{PurePosixPath(file_name(parts.lora)).stem}:{parts.weight:g}>"


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _short_hash(entry: CatalogEntry) -> str:
    """A1111's: the first ten digits of the file's SHA-256."""
    return entry.files[0].sha256[:10].lower() if entry.files else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "model"
