"""LoRAs in diffusers pipelines: put in, exchanged, switched off without a trace, refused if they don't fit."""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from rollouts.requests import RenderError
from rollouts.safetensors_reader import read_header, read_tensors

_ADAPTER = "lora"
PARTS = ("unet", "text_encoder", "text_encoder_2")
# What diffusers and transformers say about every LoRA: that it leaves a part of the pipeline alone, that it does not
# have the weights of the pipeline itself.
_HARMLESS = ("No LoRA keys associated to", "LOAD REPORT", "missing keys")
_SPEAKERS = (
    "diffusers.loaders.lora_base",
    "diffusers.loaders.peft",
    "diffusers.utils.peft_utils",
    "transformers.utils.loading_report",
    "transformers.modeling_utils",
)


class Layer(NamedTuple):
    """What a LoRA adds to a layer: weight · alpha / rank · up @ down."""

    down: Tensor
    """(rank, in, ...)"""
    up: Tensor
    """(out, rank, ...)"""
    alpha: float


class Lora(NamedTuple):
    """A LoRA that fits a pipeline.

    Attributes:
        name: In the catalogue.
        path: Its file.
        layers: By name in the pipeline.
        complete: Whether `layers` says all: not for files with a configuration of PEFT's, which may say more.
    """

    name: str
    path: Path
    layers: dict[str, Layer]
    complete: bool


def read_lora(pipeline: Any, path: Path, *, name: str) -> Lora:
    """Read a LoRA in kohya's or diffusers' format and see whether it fits; the pipeline is not changed.

    Args:
        pipeline: Without a LoRA, or with one.
        path: Safetensors file.
        name: In the catalogue.

    Raises:
        RenderError: `wrong_architecture`, if not all of its layers are the pipeline's (diffusers would leave them out),
            `corrupt`, or `error`, if it is of a kind that diffusers can't apply.
    """
    try:
        keys = read_header(path).tensors
        for mark, what in (("dora_scale", "DoRA"), ("hada_w", "LoHa"), ("lokr_w", "LoKr")):
            if any(mark in key for key in keys):
                raise RenderError("error", f"{name}: {path} is a {what}, which diffusers can't apply in full.")
        source = _source(path)
    except (OSError, ValueError) as error:
        raise RenderError("corrupt", f"{name}: {error}") from error
    try:
        state, alphas, metadata = pipeline.lora_state_dict(
            **source, unet_config=pipeline.unet.config, return_lora_metadata=True
        )
    except (ValueError, KeyError, IndexError) as error:
        raise RenderError("wrong_architecture", f"{name}: {path} does not fit: {error}") from error
    layers: dict[str, Layer] = {}
    wrong = [key for key in state if not key.startswith(tuple(f"{part}." for part in PARTS))]
    for part in PARTS:
        module = getattr(pipeline, part, None)
        for layer, found in _layers_of(state, alphas or {}, part, module).items():
            layers[f"{part}.{layer}"] = found
            shape = (found.up.shape[0], found.down.shape[1])
            if (here := _shape_in(module, layer)) != shape:
                wrong.append(f"{part}.{layer}, which is {shape} in it and {here} here")
    if wrong or not layers:
        raise RenderError(
            "wrong_architecture",
            f"{name}: {path} does not fit the {type(pipeline).__name__}: {len(wrong)} of its {len(layers)} layers are "
            f"not there or of other sizes{f', such as {wrong[0]}' if wrong else ''}.",
        )
    return Lora(name, path, layers, metadata is None)


class LoraSlot:
    """The place for one LoRA in a pipeline.

    PEFT takes long to put its layers around hundreds of others (seconds, for SDXL), so they stay: a LoRA that changes
    the same layers as the one before only brings its numbers, and without one they are switched off, which leaves
    nothing but the layers they are around. Memory is that of one LoRA, whatever came before.

    Attributes:
        name: Of the LoRA that is in effect; empty if there is none.
    """

    def __init__(self, pipeline: Any):
        """An empty slot.

        Args:
            pipeline: Without LoRAs.
        """
        self.pipeline, self.name = pipeline, ""
        self._weight = 0.0
        self._has_layers = False

    def use(self, lora: Lora, weight: float) -> None:
        """Put a LoRA in the place of what is there, if anything; if that fails there is none.

        Args:
            lora: That fits the pipeline.
            weight: Strength; 1 is what it was trained for.
        """
        if not (self._has_layers and self._exchange(lora, weight)):
            self.clear()
            try:
                with _without_harmless_messages():
                    self.pipeline.load_lora_weights(**_source(lora.path), adapter_name=_ADAPTER)
                self.pipeline.set_adapters([_ADAPTER], [weight])
            except BaseException:
                self.clear()
                raise
        elif not self.name:
            self.pipeline.enable_lora()
        self.name, self._weight, self._has_layers = lora.name, weight, True

    def set_weight(self, weight: float) -> None:
        """Change the strength of the LoRA in effect, if there is one."""
        if self.name and weight != self._weight:
            self.pipeline.set_adapters([_ADAPTER], [weight])
            self._weight = weight

    def disable(self) -> None:
        """Draw without a LoRA, bit for bit as if there had never been one."""
        if self.name:
            self.pipeline.disable_lora()
            self.name = ""

    def clear(self) -> None:
        """Take everything out again."""
        self.pipeline.unload_lora_weights()
        self.name, self._has_layers = "", False

    def _exchange(self, lora: Lora, weight: float) -> bool:
        """Whether the LoRA changes the same layers as the one before, and if so, bring its numbers.

        Not diffusers' `hotswap`, which refuses LoRAs with text encoders and, in 0.42 and not compiled, goes on with the
        rank and alpha of the one before.
        """
        wrapped = {
            f"{part}.{layer}": module
            for part in PARTS
            for layer, module in (getattr(self.pipeline, part, None) or nn.Module()).named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        if not lora.complete or wrapped.keys() != lora.layers.keys():
            return False
        for name, layer in lora.layers.items():
            module: Any = wrapped[name]
            rank = layer.down.shape[0]
            for matrices, value in ((module.lora_A, layer.down), (module.lora_B, layer.up)):
                parameter = matrices[_ADAPTER].weight
                parameter.data = value.to(parameter)
            module.r[_ADAPTER], module.lora_alpha[_ADAPTER] = rank, layer.alpha
            module.scaling[_ADAPTER] = weight * layer.alpha / rank
        return True


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a module by the names they have without a LoRA around them; those of the LoRA are left out."""
    for name, parameter in module.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            yield name.replace(".base_layer.", "."), parameter


def _source(path: Path) -> dict[str, Any]:
    """What diffusers loads: it reads a file itself only where that says something about alphas beside the weights."""
    if LORA_ADAPTER_METADATA_KEY in read_header(path).metadata:
        return {
            "pretrained_model_name_or_path_or_dict": str(path.parent),
            "weight_name": path.name,
            "local_files_only": True,
        }
    return {"pretrained_model_name_or_path_or_dict": read_tensors(path)}


def _layers_of(state: dict[str, Tensor], alphas: dict[str, float], part: str, module: Any) -> dict[str, Layer]:
    """What a LoRA adds to the layers of one part, by their names in it."""

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        values = {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
        if part == "unet" and not any("lora_A" in key for key in values):
            values = convert_unet_state_dict_to_peft(values)
        elif part != "unet":
            values = convert_state_dict_to_peft(convert_state_dict_to_diffusers(values)) if values else {}
            if not hasattr(module, "text_model"):  # transformers 5 has taken this level out of CLIPTextModel
                values = {key.removeprefix("text_model."): value for key, value in values.items()}
        return values

    matrices = renamed(state)
    scales = renamed({key.removesuffix(".alpha"): value for key, value in alphas.items()})
    layers: dict[str, Layer] = {}
    for key, down in matrices.items():
        layer, _, rest = key.partition(".lora_A.")
        up = matrices.get(f"{layer}.lora_B.weight")
        if rest == "weight" and up is not None:
            layers[layer] = Layer(down, up, float(scales.get(key, down.shape[0])))
    return layers


def _shape_in(module: Any, layer: str) -> tuple[int, int] | None:
    """(out, in) of a layer, or None if there is none."""
    try:
        found = module.get_submodule(layer)
        weight = getattr(found, "base_layer", found).weight
    except AttributeError:
        return None
    return tuple(weight.shape[:2])


@contextmanager
def _without_harmless_messages() -> Generator[None]:
    def not_harmless(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _HARMLESS)

    speakers = [logging.getLogger(name) for name in _SPEAKERS]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for speaker in speakers:
        speaker.addFilter(not_harmless)
    try:
        yield
    finally:
        for speaker in speakers:
            speaker.removeFilter(not_harmless)
        if bars:
            transformers_logging.enable_progress_bar()
