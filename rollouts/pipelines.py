"""Checkpoints, from files to diffusers pipelines: folders and single files, SD 1.5 and SDXL, without the network.

In two steps, so that the slow one can run beside drawing: `read_checkpoint` gets the weights into memory and touches
nothing else; a `PipelineFactory` makes modules of them, which changes PyTorch's global state for a moment.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils as original
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rollouts.loras import LoraSlot, base_parameters
from rollouts.requests import RenderError, RenderSettings
from rollouts.safetensors_reader import read_header, read_tensors
from rollouts.schedulers import SchedulerSpec, time_steps

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Architecture:
    """What a base model is made of.

    Attributes:
        pipeline: Its class.
        components: Folders with weights, and the classes expected in them.
        prefixes: Beginnings of the names of each component's weights in a single file.
    """

    pipeline: Any
    components: dict[str, Any]
    prefixes: dict[str, str]


_UNET_AND_VAE = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
_ARCHITECTURES = {
    "SD 1.5": _Architecture(
        StableDiffusionPipeline,
        {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel},
        _UNET_AND_VAE | {"text_encoder": "cond_stage_model.transformer."},
    ),
    "SDXL 1.0": _Architecture(
        StableDiffusionXLPipeline,
        {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
        },
        _UNET_AND_VAE
        | {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    ),
}
_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
_PROVENANCE = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype")
# Of attention in the autoencoders of early checkpoints, Stable Diffusion 1.5's own among them.
_EARLY_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class CheckpointFiles:
    """Where the parts of a checkpoint are.

    Attributes:
        name: For messages.
        base_model: `SD 1.5` or `SDXL 1.0`.
        path: Folder or single file.
        config: Folder with the configuration of every component and the tokenizers.
        weights: Safetensors files of each component.
    """

    name: str
    base_model: str
    path: Path
    config: Path
    weights: dict[str, list[Path]]


def find_checkpoint(path: Path, *, name: str, base_model: str, configs: Mapping[str, str | Path]) -> CheckpointFiles:
    """Look at a checkpoint without reading its weights.

    Args:
        path: Folder in diffusers' layout, or a safetensors file in the original one.
        name: For messages.
        base_model: What the catalogue says it is.
        configs: By base model, a folder in diffusers' layout, whose weights are not needed: for single files.

    Raises:
        RenderError: It is of another architecture, or a single file without a folder in `configs`.
    """
    parts = _ARCHITECTURES[base_model]
    if path.is_dir():
        config, weights = path, {part: _folder_weights(path / part) for part in parts.components}
    elif base_model in configs:
        config, weights = Path(configs[base_model]), dict.fromkeys(parts.components, [path])
        _check_single_file(path, name, base_model)
    else:
        raise RenderError(
            "error",
            f"{name}: {path} is a single file. Name in `configs` a folder with the configuration of {base_model} in "
            "diffusers' layout (model_index.json, */config.json, tokenizer; no weights).",
        )
    if missing := [part for part, files in weights.items() if not files]:
        raise RenderError("wrong_architecture", f"{name}: {path} has no weights for its {', '.join(missing)}.")
    try:
        index = json.loads((config / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise RenderError("error", f"{name}: {config / 'model_index.json'} can't be read: {error}.") from error
    expected = {"": parts.pipeline.__name__} | {part: cls.__name__ for part, cls in parts.components.items()}
    found = {"": index.get("_class_name")} | {part: (index.get(part) or ["", None])[1] for part in parts.components}
    if found != expected:
        what = {part or "pipeline": value for part, value in found.items() if value != expected[part]}
        raise RenderError("wrong_architecture", f"{name}: {config} is not {base_model}: its parts are {what}.")
    return CheckpointFiles(name, base_model, path, config, weights)


def checkpoint_bytes(files: CheckpointFiles, settings: RenderSettings) -> int:
    """Memory that a checkpoint takes, from the headers of its files."""
    return sum(
        _dtype(settings, files.base_model, part).itemsize * info.shape.numel()
        for part, paths in files.weights.items()
        for path in paths
        for key, info in read_header(path).tensors.items()
        if key.startswith(_prefix(files, part))
    )


def read_checkpoint(files: CheckpointFiles, settings: RenderSettings) -> dict[str, State]:
    """The weights of each component in the settings' dtype, in host memory, named as in the files.

    Raises:
        RenderError: `corrupt`, if a file can't be read.
    """
    states: dict[str, State] = {}
    for part, paths in files.weights.items():
        dtype, prefix = _dtype(settings, files.base_model, part), _prefix(files, part)
        states[part] = {}
        for path in paths:
            try:
                tensors = read_tensors(path, lambda key, prefix=prefix: key.startswith(prefix))
            except (OSError, ValueError) as error:
                raise RenderError("corrupt", f"{files.name}: {error}") from error
            while tensors:  # one by one, lest all of them be there in both precisions
                key, tensor = tensors.popitem()
                states[part][key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return states


@dataclass
class Assembled:
    """A pipeline with weights.

    Attributes:
        pipeline: StableDiffusionPipeline or StableDiffusionXLPipeline.
        noise_schedule: Configuration of the checkpoint's own scheduler.
        kind: What it has in common with checkpoints that only differ in their weights.
        shapes: Of the weights of each component.
        lora: The place for a LoRA in it.
    """

    pipeline: Any
    noise_schedule: dict[str, Any]
    kind: str
    shapes: dict[str, dict[str, torch.Size]]
    lora: LoraSlot


class PipelineFactory:
    """Makes pipelines of weights, and gives the modules of those that are freed to the next checkpoint of their kind.

    Thousands of modules take longer to make than their weights to be put in, and compiled ones minutes.
    """

    def __init__(self, settings: RenderSettings, device: torch.device, *, max_spares: int = 4):
        """Nothing is made yet.

        Args:
            settings: Precision, tiling and compilation.
            device: Where pipelines are.
            max_spares: Pipelines without weights that are kept, one of a kind.
        """
        self.settings, self.device, self.max_spares = settings, device, max_spares
        self._spares: dict[str, Assembled] = {}

    def build(self, files: CheckpointFiles, states: Mapping[str, State]) -> Assembled:
        """A pipeline from weights, which it takes over where they are on its device already.

        Raises:
            RenderError: `wrong_architecture`, if weights don't fit the configuration.
        """
        kind = _kind(files)
        made = self._spares.pop(kind, None) or self._assemble(files, kind)
        try:
            fitting = {part: _fitting(files, part, state, made) for part, state in states.items()}
            for part, state in fitting.items():
                for name, parameter in base_parameters(getattr(made.pipeline, part)):
                    # In place: whatever refers to the parameters, such as compiled code, stays valid.
                    parameter.data = state[name].to(self.device)
        except BaseException:
            self.free(made)
            raise
        return made

    def free(self, made: Assembled) -> None:
        """Give back the memory of a pipeline's weights, now: pipelines hold cycles, which outlive their last name."""
        made.lora.disable()
        for part in made.shapes:
            for parameter in getattr(made.pipeline, part).parameters():
                parameter.data = parameter.data.new_empty(0)
        self._spares[made.kind] = made
        while len(self._spares) > self.max_spares:
            del self._spares[next(iter(self._spares))]

    def _assemble(self, files: CheckpointFiles, kind: str) -> Assembled:
        parts = _ARCHITECTURES[files.base_model]
        modules: dict[str, Any] = {}
        for part, cls in parts.components.items():
            with init_empty_weights():
                if part in ("unet", "vae"):
                    module = cls.from_config(cls.load_config(files.config, subfolder=part, local_files_only=True))
                else:
                    module = cls(CLIPTextConfig.from_pretrained(files.config / part, local_files_only=True))
            modules[part] = module.eval().requires_grad_(False)
        shapes = {part: {key: value.shape for key, value in m.named_parameters()} for part, m in modules.items()}
        for part, module in modules.items():
            _materialize(module, _dtype(self.settings, files.base_model, part), self.device)
            module.to(self.device)
        index = json.loads((files.config / "model_index.json").read_text())
        options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        tokenizers = ["tokenizer"]
        if files.base_model == "SDXL 1.0":
            tokenizers.append("tokenizer_2")
            zeros = index.get("force_zeros_for_empty_prompt", True)
            options = {"add_watermarker": False, "force_zeros_for_empty_prompt": zeros}
        for name in tokenizers:
            modules[name] = CLIPTokenizer.from_pretrained(files.config / name, local_files_only=True)
        pipeline = parts.pipeline(**modules, scheduler=_own_scheduler(files, index), **options)
        pipeline.set_progress_bar_config(disable=True)
        if self.settings.vae_tiling:
            pipeline.vae.enable_tiling()
        if self.settings.compile_unet:
            pipeline.unet.compile()
        return Assembled(pipeline, dict(pipeline.scheduler.config), kind, shapes, LoraSlot(pipeline))


def _materialize(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give parameters that were made without memory a device, but still no memory."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            nothing = torch.empty(0, dtype=dtype, device=device)
            setattr(owner, name, torch.nn.Parameter(nothing, requires_grad=parameter.requires_grad))


def make_scheduler(spec: SchedulerSpec, trained: Mapping[str, Any], num_steps: int, seeds: Sequence[int]) -> Any:
    """A fresh scheduler for one batch.

    Args:
        spec: The sampler's row.
        trained: Configuration of the checkpoint's own scheduler; only its noise schedule is taken over.
        num_steps: Of the call.
        seeds: One per picture, for samplers with a noise source of their own.

    Returns:
        The scheduler. Its `set_timesteps` takes the row's explicit time steps, whatever number it is given.
    """
    cls = getattr(diffusers, spec.scheduler or "")
    accepted = inspect.signature(cls.__init__).parameters
    config = {key: trained[key] for key in _NOISE_SCHEDULE if key in accepted and key in trained} | dict(spec.config)
    if spec.seeded:
        config["noise_sampler_seed"] = list(seeds)
    scheduler = cls(**config)
    set_timesteps = scheduler.set_timesteps

    # Pipelines look at the signature.
    @wraps(set_timesteps)
    def set_row_timesteps(num_inference_steps: int | None = None, device: Any = None, **options: Any) -> None:
        if spec.time_steps:
            set_timesteps(timesteps=time_steps(spec.time_steps, num_steps), device=device)
        else:
            set_timesteps(num_inference_steps, device=device, **options)
        # Where rounded time steps repeat, as those of Beta schedules do, it would begin at the second of two.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    scheduler.set_timesteps = set_row_timesteps
    return scheduler


def _own_scheduler(files: CheckpointFiles, index: Mapping[str, Any]) -> Any:
    """The checkpoint's own: its class does not matter, its noise schedule does."""
    cls = getattr(diffusers, str((index.get("scheduler") or ["", ""])[1]), diffusers.DDIMScheduler)
    return cls.from_pretrained(files.config / "scheduler", local_files_only=True)


def _folder_weights(folder: Path) -> list[Path]:
    """A component's files, in one precision if they are there in two."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if "." not in file.stem] or [file for file in files if ".fp16" in file.stem]


def _check_single_file(path: Path, name: str, base_model: str) -> None:
    keys = read_header(path).tensors

    def complete(architecture: _Architecture) -> bool:
        return all(any(key.startswith(prefix) for key in keys) for prefix in architecture.prefixes.values())

    fitting = [other for other, architecture in _ARCHITECTURES.items() if complete(architecture)]
    if base_model not in fitting:
        what = f"is {fitting[0]}" if fitting else f"lacks a denoiser, an autoencoder or a text encoder of {base_model}"
        raise RenderError("wrong_architecture", f"{name}: the catalogue says {base_model}, but {path} {what}.")


def _prefix(files: CheckpointFiles, part: str) -> str:
    """What the names of a component's tensors begin with."""
    return "" if files.path.is_dir() else _ARCHITECTURES[files.base_model].prefixes[part]


def _dtype(settings: RenderSettings, base_model: str, part: str) -> torch.dtype:
    # SDXL's autoencoder overflows in float16.
    keep = settings.dtype == "float16" and base_model == "SDXL 1.0" and part == "vae"
    return torch.float32 if keep else getattr(torch, settings.dtype)


def _fitting(files: CheckpointFiles, part: str, state: State, made: Assembled) -> State:
    """The weights of a component under its names, all there and in the right shapes."""
    module, expected = getattr(made.pipeline, part), made.shapes[part]
    try:
        state = _as_diffusers(state, module, part) if files.path.is_file() else _as_now(state, module)
    except KeyError as error:
        raise RenderError(
            "wrong_architecture", f"{files.name}: {files.path} has no {error.args[0]}, which {files.base_model} has."
        ) from error
    wrong = [key for key, shape in expected.items() if key not in state or state[key].shape != shape]
    if wrong:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "missing"
        raise RenderError(
            "wrong_architecture",
            f"{files.name}: {len(wrong)} of {len(expected)} weights of the {part} in {files.path} don't fit the "
            f"configuration in {files.config}: {wrong[0]} should be {tuple(expected[wrong[0]])}, but is {found}.",
        )
    return state


def _kind(files: CheckpointFiles) -> str:
    """Digest of all that decides what a pipeline is but for its weights."""
    digest = hashlib.sha256(files.base_model.encode())
    for path in sorted(files.config.rglob("*")):
        if path.suffix not in (".json", ".txt") or path.name.endswith(".index.json"):
            continue
        content = path.read_bytes()
        if path.name in ("config.json", "model_index.json", "scheduler_config.json"):
            # Without who wrote it, and when.
            config = {key: value for key, value in json.loads(content).items() if key not in _PROVENANCE}
            content = json.dumps(config, sort_keys=True).encode()
        digest.update(f"{path.relative_to(files.config)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _as_diffusers(state: State, module: Any, part: str) -> State:
    """Weights from a single file, renamed."""
    if part == "unet":
        return original.convert_ldm_unet_checkpoint(state, module.config)
    if part == "vae":
        return original.convert_ldm_vae_checkpoint(state, module.config)
    if part == "text_encoder":
        return _as_now(original.convert_ldm_clip_checkpoint(state), module)
    return original.convert_open_clip_checkpoint(module, state, prefix="conditioner.embedders.1.model.")


def _as_now(state: State, module: Any) -> State:
    """Weights from a folder that an earlier version of the libraries may have written."""
    renamed: State = {}
    for key, value in state.items():
        for then, now in _EARLY_NAMES.items():
            key = key.replace(then, now) if "attentions" in key else key
        # transformers 5 has taken this level out of CLIPTextModel.
        renamed[key if hasattr(module, "text_model") else key.removeprefix("text_model.")] = value
    return renamed
