"""Stable Diffusion at toy size with random weights: the real classes and file formats, drawn in milliseconds.

For tests and benchmarks of everything that only cares that there are checkpoints and LoRAs. Their pictures mean
nothing, but they differ by model, prompt and seed.

    python -c "from pocket.untrained import save_catalog; save_catalog('models')"
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pocket.ldm_layout import clip_to_ldm, clip_to_open_clip, unet_to_ldm, vae_to_ldm
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.weights import weights_sha256

BaseModel = Literal["SD 1.5", "SDXL 1.0"]

_WORDS = """
a an the of in on at by with and red green blue black white fox cat dog bird tree house castle lighthouse
mountain river woman man knight robot old young small large ink oil watercolour photo painting portrait landscape night
day light soft sharp detailed masterpiece best quality blurry lowres bad worst style , . ( ) : 0 1 2 3 4 5
"""
_NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_NO_SAFETY_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
_WIDTHS = {"SD 1.5": (32,), "SDXL 1.0": (32, 48)}  # of the text encoders
# Whether the blocks of the denoiser's way down have cross-attention, and how many layers they have.
_ATTENTION = {"SD 1.5": (True, True, True, False), "SDXL 1.0": (False, True, True)}
_SMALL_ATTENTION = {"SD 1.5": (True, False), "SDXL 1.0": (False, True)}


def save_checkpoint(
    folder: str | Path,
    *,
    base_model: BaseModel = "SD 1.5",
    seed: int = 0,
    width: int = 16,
    full: bool = False,
    ballast_mb: float = 0,
) -> Path:
    """Write a checkpoint as a folder in diffusers' layout.

    Args:
        folder: Is created.
        base_model: Architecture.
        seed: Of the weights.
        width: Channels of the denoiser's first block; a multiple of 8. Time and size grow with its square.
        full: With as many blocks and layers as the original has; a quarter of them otherwise.
        ballast_mb: Megabytes that are read and held but cost no time in drawing: rows of the text encoder's embedding
            table for tokens that do not exist.

    Returns:
        The folder.
    """
    pipeline(base_model, seed=seed, width=width, full=full, ballast_mb=ballast_mb).save_pretrained(folder)
    return Path(folder)


def save_single_file(path: str | Path, *, base_model: BaseModel = "SD 1.5", seed: int = 0, width: int = 16) -> Path:
    """Write what `save_checkpoint` would with `full`, as one safetensors file in the original layout."""
    made = pipeline(base_model, seed=seed, width=width, full=True)
    state = unet_to_ldm(made.unet.state_dict(), _ATTENTION[base_model]) | vae_to_ldm(made.vae.state_dict())
    if base_model == "SD 1.5":
        state |= clip_to_ldm(made.text_encoder.state_dict(), "cond_stage_model.transformer.")
    else:
        state |= clip_to_ldm(made.text_encoder.state_dict(), "conditioner.embedders.0.transformer.")
        state |= clip_to_open_clip(made.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path


def save_config(folder: str | Path, *, base_model: BaseModel = "SD 1.5", width: int = 16) -> Path:
    """Write what single files of an architecture need beside them: everything of a checkpoint but its weights."""
    save_checkpoint(folder, base_model=base_model, width=width, full=True)
    for path in Path(folder).rglob("*.safetensors"):
        path.unlink()
    return Path(folder)


def save_lora(
    path: str | Path,
    *,
    base_model: BaseModel = "SD 1.5",
    seed: int = 0,
    rank: int = 4,
    format: Literal["diffusers", "kohya"] = "diffusers",
    text_encoder: bool = True,
    width: int = 16,
    full: bool = False,
    strength: float = 1.0,
) -> Path:
    """Write a LoRA for the attention of the denoiser and, if asked for, of the text encoders.

    Args:
        path: Safetensors file.
        base_model: Architecture.
        seed: Of the weights.
        rank: Of the matrices.
        format: `kohya` (as on Civitai: other names, and an alpha of half the rank) or `diffusers`.
        text_encoder: Whether text encoders are changed too.
        width: Of the checkpoints it is for.
        full: Likewise.
        strength: How large its change is beside the weights it is added to.

    Returns:
        The path.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = dict(_lora_layers(pipeline(base_model, width=width, full=full), rank, format, text_encoder, strength))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def save_catalog(
    folder: str | Path,
    *,
    sd15: int = 2,
    sdxl: int = 1,
    loras: int = 2,
    sdxl_loras: int = 1,
    seed: int = 0,
    width: int = 16,
    ballast_mb: float = 0,
) -> Catalog:
    """Write checkpoints, LoRAs and `catalog.jsonl`, which lists them with their SHA-256.

    Checkpoints are folders in diffusers' layout, LoRAs are alternately in kohya's (with text encoder) and diffusers'
    format (without) and belong to the checkpoints in turn. Default parameters are cheap: 512x512 pixels, 4 steps.

    Args:
        folder: What `WeightFolder` takes.
        sd15: SD 1.5 checkpoints.
        sdxl: SDXL checkpoints.
        loras: LoRAs for the SD 1.5 checkpoints.
        sdxl_loras: LoRAs for the SDXL checkpoints.
        seed: Of the first checkpoint; the others follow.
        width: See `save_checkpoint`.
        ballast_mb: See `save_checkpoint`.

    Returns:
        The catalogue.
    """
    folder = Path(folder)
    entries: list[CatalogEntry] = []
    architectures: tuple[tuple[BaseModel, str, int, int], ...] = (
        ("SD 1.5", "SD", sd15, loras),
        ("SDXL 1.0", "XL", sdxl, sdxl_loras),
    )
    for base_model, short, num_checkpoints, num_loras in architectures:
        for i in range(num_checkpoints):
            name = f"Toy {short} {i} - v1"
            uri = f"checkpoints/{short.lower()}_{i}"
            number = seed + len(entries)
            save_checkpoint(folder / uri, base_model=base_model, seed=number, width=width, ballast_mb=ballast_mb)
            entries.append(catalog_entry(folder, uri, name=name, number=number, base_model=base_model))
        for i in range(num_loras):
            uri = f"loras/{short.lower()}_{i}.safetensors"
            number = seed + len(entries)
            kohya = i % 2 == 0
            save_lora(
                folder / uri, base_model=base_model, seed=number, width=width, text_encoder=kohya,
                format="kohya" if kohya else "diffusers",
            )  # fmt: skip
            base = f"Toy {short} {i % num_checkpoints} - v1"
            name = f"Toy {short} LoRA {i} - v1"
            entries.append(
                catalog_entry(folder, uri, name=name, number=number, base_model=base_model, base_checkpoint=base)
            )
    catalog = Catalog(entries)
    catalog.save(folder / "catalog.jsonl")
    return catalog


def catalog_entry(
    folder: str | Path, uri: str, *, name: str, number: int, base_model: BaseModel, base_checkpoint: str | None = None
) -> CatalogEntry:
    """The catalogue's row for weights that lie in a folder.

    Args:
        folder: What `WeightFolder` takes.
        uri: Path inside it.
        name: Unique.
        number: Unique; its version and model id.
        base_model: Architecture.
        base_checkpoint: Given for a LoRA: the name of what it is used with.
    """
    samplers = ("Euler a", "DPM++ 2M Karras", "DDIM")
    return CatalogEntry.model_validate(
        {
            "name": name,
            "version_id": number + 1,
            "model_id": number + 1,
            "type": "LoRA" if base_checkpoint else "Checkpoint",
            "base_model": base_model,
            "base_checkpoint": base_checkpoint,
            "files": [{"uri": uri, "format": "SafeTensor", "sha256": weights_sha256(Path(folder) / uri)}],
            "trigger_words": ["ink style"] if base_checkpoint else [],
            "lora_weight": 0.8 if base_checkpoint else None,
            "description": f"{name}: untrained weights.",
            "default_parameters": {
                "width": 512,
                "height": 512,
                "sampling method": samplers[number % len(samplers)],
                "sampling steps": 4,
                "cfg scale": 5.0,
            },
            "stats": {"downloads": 100.0 - number},
        }
    )


def pipeline(
    base_model: BaseModel = "SD 1.5", *, seed: int = 0, width: int = 16, full: bool = False, ballast_mb: float = 0
) -> Any:
    """A StableDiffusionPipeline or StableDiffusionXLPipeline with random weights, on the CPU in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, *second = _WIDTHS[base_model]
        # 4 bytes a number
        encoder = _text_encoder(CLIPTextModel, first, int(ballast_mb * 1e6 / (4 * first)))
        parts: dict[str, Any] = {
            "vae": _vae(2 if full else 1),
            "unet": _unet(base_model, width, full),
            "tokenizer": _tokenizer(),
            "text_encoder": encoder,
        }
        if not second:
            return StableDiffusionPipeline(
                **parts, **_NO_SAFETY_CHECKER,
                scheduler=cast(Any, DDIMScheduler(**_NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)),
            )  # fmt: skip
        return StableDiffusionXLPipeline(
            **parts, tokenizer_2=_tokenizer(), scheduler=cast(Any, EulerDiscreteScheduler(**_NOISE_SCHEDULE)),
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection, second[0]),
        )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    """CLIP's, but it knows few words and spells the others. Made by hand, since training numbers tokens at random."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[Any] = []
    for word in _WORDS.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        for length in range(1, len(pieces)):
            pair = ("".join(pieces[:length]), pieces[length])
            if pair not in merges:
                merges.append(pair)
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *(a + b for a, b in merges), start, end]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=77, bos_token=start, eos_token=end, pad_token=end
    )


def _text_encoder(cls: type, width: int, num_unused: int = 0) -> Any:
    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=width, vocab_size=len(tokenizer) + num_unused, max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = cls(config).eval()
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2:  # so that words are told apart: CLIP begins with a hundredth of it
            nn.init.normal_(parameter, std=1.0 if "embedding" in name else parameter.shape[1] ** -0.5)
    return encoder


def _vae(num_layers: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=num_layers, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, sample_size=64,
    ).eval()  # fmt: skip
    # What comes here is normalised, so this decides the contrast: mid grey, +- a third of the range.
    nn.init.normal_(vae.decoder.conv_out.weight, std=0.06)
    return vae


def _unet(base_model: BaseModel, width: int, full: bool) -> UNet2DConditionModel:
    attention = (_ATTENTION if full else _SMALL_ATTENTION)[base_model]
    options: dict[str, Any] = {"attention_head_dim": 2}
    if base_model == "SDXL 1.0":
        options = {
            "attention_head_dim": (1, 2, 4)[: len(attention)],
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1, 2)[-len(attention) :],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + _WIDTHS[base_model][1],
        }
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2 if full else 1, norm_num_groups=8,
        block_out_channels=(width, *[2 * width] * (len(attention) - 1)), cross_attention_dim=sum(_WIDTHS[base_model]),
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        **options,
    ).eval()  # fmt: skip
    for name, module in unet.named_modules():
        # So that the prompt is seen in the picture: attention that picks words, and what they say is heard.
        if name.endswith("attn2.to_k"):
            nn.init.normal_(module.weight, std=2 * module.in_features**-0.5)
        if name.endswith("attn2.to_out.0"):
            nn.init.normal_(module.weight, std=8 * module.in_features**-0.5)
    nn.init.normal_(unet.conv_out.weight, std=0.5 * (9 * width) ** -0.5)
    return unet


def _lora_layers(
    made: Any, rank: int, format: str, text_encoder: bool, strength: float
) -> Iterator[tuple[str, torch.Tensor]]:
    kohya = format == "kohya"
    parts: dict[str, tuple[str, nn.Module]] = {"unet": ("lora_unet_", made.unet)}
    if text_encoder:
        second = getattr(made, "text_encoder_2", None)
        parts["text_encoder"] = ("lora_te_" if second is None else "lora_te1_", made.text_encoder)
        if second is not None:
            parts["text_encoder_2"] = ("lora_te2_", second)
    for part, (prefix, model) in parts.items():
        for name, module in model.named_modules():
            if not (isinstance(module, nn.Linear) and ("attn" in name)):
                continue
            if part != "unet":  # transformers 5 dropped this from some of its names, files keep it
                name = "text_model." + name.removeprefix("text_model.")
            down = torch.randn(rank, module.in_features) * module.in_features**-0.5
            up = torch.randn(module.out_features, rank) * strength * rank**-0.5
            if kohya:
                key = prefix + name.replace(".", "_")
                yield f"{key}.lora_down.weight", down
                yield f"{key}.lora_up.weight", 2 * up
                yield f"{key}.alpha", torch.tensor(rank / 2)
            else:
                yield f"{part}.{name}.lora_A.weight", down
                yield f"{part}.{name}.lora_B.weight", up
