"""Draws the pictures of API calls with diffusers: any checkpoints and LoRAs of a catalogue, on one device.

    renderer = DiffusersRenderer(catalog, WeightFolder("models"), RenderSettings(dtype="float16", device_type="cuda"))
    results = renderer.render([resolve(request, catalog, renderer.settings) for request in requests])

The same job gives the same picture, alone or in any batch: every picture has its own random numbers, and prompts are
encoded by themselves. (To one grey level, or to the last bit with `pad_batches`: libraries add up in another order when
shapes differ.)
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.batching import BatchSize, in_batches, is_out_of_memory
from rollouts.catalog import Catalog
from rollouts.loras import read_lora
from rollouts.model_cache import ModelCache, ModelTooLarge
from rollouts.pipelines import (
    Assembled,
    CheckpointFiles,
    PipelineFactory,
    State,
    checkpoint_bytes,
    find_checkpoint,
    make_scheduler,
    read_checkpoint,
)
from rollouts.prompt_encoding import PromptEmbeddings, encode_prompts
from rollouts.requests import BatchKey, RenderError, RenderFailure, RenderJob, RenderResult, RenderSettings, Spent
from rollouts.schedulers import scheduler_spec
from rollouts.weights import WeightFolder, WeightsError

logger = logging.getLogger(__name__)

DEVICE_SHARE = 0.7
"""Of a device's memory for models, if nothing else is said; the rest is for drawing."""


class DiffusersRenderer:
    """Draws jobs, and keeps checkpoints in memory for the next ones.

    Attributes:
        settings: How it draws.
        spent: What it has cost so far.
    """

    def __init__(
        self,
        catalog: Catalog,
        weights: WeightFolder,
        settings: RenderSettings,
        *,
        configs: Mapping[str, str | Path] | None = None,
        device: str | torch.device | None = None,
        device_bytes: int | None = None,
        cpu_bytes: int | None = None,
    ):
        """No weights are read yet.

        Args:
            catalog: What the jobs were resolved with.
            weights: Where its files are.
            settings: What the jobs were resolved with.
            configs: Base model -> folder in diffusers' layout whose configuration its single files have.
            device: Such as `cuda:1`; by default the settings' device type.
            device_bytes: Most that checkpoints take on the device; by default 70% of its memory. On a CPU those that
                are read ahead are counted too.
            cpu_bytes: Most that checkpoints take in CPU memory beside those on the device. By default none stay there,
                but the next one is read ahead.

        Raises:
            ValueError: A device of another type than the settings', which are part of every picture's key.
        """
        self.catalog, self.settings = catalog, settings
        self.device = torch.device(device or settings.device_type)
        if self.device.type != settings.device_type:
            raise ValueError(f"`device` is {device}, but `device_type` of the settings is {settings.device_type}.")
        self._weights, self._configs = weights, dict(configs or {})
        self._unverified = WeightFolder(weights.folder, verify=False)
        self._factory = PipelineFactory(settings, self.device)
        on_cpu = self.device.type == "cpu"
        self._cache: ModelCache[tuple[CheckpointFiles, dict[str, State]], Assembled] = ModelCache(
            read=self._read,
            build=self._build,
            size=lambda name: checkpoint_bytes(self._find(name, self._unverified), settings),
            free=self._factory.free,
            device_bytes=_default_budget(self.device) if device_bytes is None else device_bytes,
            host_bytes=None if on_cpu else sys.maxsize if cpu_bytes is None else cpu_bytes,
            keep_weights=cpu_bytes is not None,
        )
        self._batch_size = BatchSize(settings.batch_size)
        self._embeddings: dict[tuple[Any, ...], PromptEmbeddings] = {}
        self._lock = Lock()
        self._spent = Spent()

    @property
    def spent(self) -> Spent:
        """What drawing has cost so far."""
        with self._lock:
            return self._spent

    def render(self, jobs: Sequence[RenderJob], *, prefetch: str | None = None) -> list[RenderResult]:
        """Draw jobs, those of a batch key together, in order of first appearance.

        Args:
            jobs: Any, in any order.
            prefetch: Checkpoint to read in the background once that of the first job is there (`prefetch`).

        Returns:
            A result for each, in their order. What can't be drawn has a `failure`, and the others are drawn.

        Raises:
            RuntimeError: The device itself has failed, and with it this process.
        """
        groups: dict[BatchKey, list[int]] = {}
        for index, job in enumerate(jobs):
            groups.setdefault(job.batch_key, []).append(index)
        results: dict[int, RenderResult] = {}
        broken: dict[str, RenderFailure] = {}
        self._embeddings = {}
        for key, indices in groups.items():
            failure = broken.get(key.checkpoint) or broken.get(key.lora)
            if failure is None:
                drawn, culprit = self._render_group(key, [jobs[index] for index in indices], prefetch)
                prefetch = None
                if culprit:
                    broken[culprit] = drawn[0].failure or RenderFailure("error", "")
            else:
                drawn = [RenderResult(jobs[index].key, failure=failure) for index in indices]
            results |= dict(zip(indices, drawn, strict=True))
        self._embeddings = {}
        return [results[index] for index in range(len(jobs))]

    def prefetch(self, checkpoint: str) -> None:
        """Begin to read a checkpoint in the background, if there is room for it; what fails does so when it is drawn.

        Args:
            checkpoint: Its name in the catalogue.
        """
        try:
            self._cache.prefetch(checkpoint)
        except (RenderError, WeightsError, KeyError):
            logger.debug("%s can't be read ahead.", checkpoint, exc_info=True)

    def cached(self) -> set[str]:
        """Checkpoints in memory, on the device or beside it."""
        return self._cache.names()

    def close(self) -> None:
        """Free all memory. The renderer is of no use afterwards."""
        self._cache.close()

    def _render_group(
        self, key: BatchKey, jobs: list[RenderJob], prefetch: str | None
    ) -> tuple[list[RenderResult], str]:
        """Results, and the name of the model that could not be loaded, if it is for that that there are none."""
        culprit = key.checkpoint
        try:
            loaded = self._checkpoint(key.checkpoint)
            if prefetch is not None:
                self.prefetch(prefetch)
            culprit = key.lora
            self._apply_lora(loaded, key)
            culprit = ""
            return self._draw_group(loaded, key, jobs), ""
        except Exception as error:
            failure = _failure_of(error)
        return [RenderResult(job.key, failure=failure) for job in jobs], culprit

    def _find(self, name: str, weights: WeightFolder) -> CheckpointFiles:
        entry = self.catalog[name]
        return find_checkpoint(weights.find(entry), name=name, base_model=entry.base_model, configs=self._configs)

    def _read(self, name: str) -> tuple[CheckpointFiles, dict[str, State]]:
        """Verify and read a checkpoint; runs on the drawing or on the reading thread."""
        start = time.perf_counter()
        files = self._find(name, self._weights)
        states = read_checkpoint(files, self.settings)
        size = sum(path.stat().st_size for path in {path for paths in files.weights.values() for path in paths})
        self._add(Spent(loads=1, loaded_bytes=size, read_seconds=time.perf_counter() - start))
        return files, states

    def _build(self, name: str, weights: tuple[CheckpointFiles, dict[str, State]]) -> Assembled:
        start = time.perf_counter()
        files, states = weights
        loaded = self._factory.build(files, states)
        self._add(Spent(build_seconds=time.perf_counter() - start))
        return loaded

    def _checkpoint(self, name: str) -> Assembled:
        start = time.perf_counter()
        try:
            return self._cache.get(name)
        except ModelTooLarge as error:
            raise RenderError("out_of_memory", f"{error} Raise `device_bytes` or use a smaller `dtype`.") from error
        finally:
            self._add(Spent(load_seconds=time.perf_counter() - start))

    def _apply_lora(self, loaded: Assembled, key: BatchKey) -> None:
        """Make the LoRA in a pipeline the one that is asked for, which may be none."""
        start = time.perf_counter()
        if loaded.lora.name == key.lora:
            loaded.lora.set_weight(key.lora_weight)
        elif not key.lora:
            loaded.lora.disable()
        else:
            path = self._weights.find(self.catalog[key.lora])
            loaded.lora.use(read_lora(loaded.pipeline, path, name=key.lora), key.lora_weight)
            self._add(Spent(lora_loads=1))
        self._add(Spent(lora_seconds=time.perf_counter() - start))

    @torch.inference_mode()
    def _draw_group(self, loaded: Assembled, key: BatchKey, jobs: list[RenderJob]) -> list[RenderResult]:
        """Draw jobs of one batch key with everything loaded, those with equally long prompts together."""
        results: dict[int, RenderResult] = {}
        by_length: dict[int, list[tuple[int, RenderJob, PromptEmbeddings]]] = {}
        for index, job in enumerate(jobs):
            try:
                embeddings = self._encode(loaded, key, job)
            except Exception as error:
                results[index] = RenderResult(job.key, failure=_failure_of(error))
            else:
                by_length.setdefault(embeddings.prompt_embeds.shape[1], []).append((index, job, embeddings))
        for members in by_length.values():
            drawn = in_batches(members, self._batch_size, lambda batch: self._draw_batch(loaded, key, batch))
            results |= {index: result for (index, *_), result in zip(members, drawn, strict=True)}
        return [results[index] for index in range(len(jobs))]

    def _encode(self, loaded: Assembled, key: BatchKey, job: RenderJob) -> PromptEmbeddings:
        """By itself, so that it does not depend on what else is drawn."""
        models = (key.checkpoint, key.lora, key.lora_weight, key.clip_skip)
        if self._embeddings and next(iter(self._embeddings))[:4] != models:
            self._embeddings = {}
        known = (*models, job.prompt, job.negative_prompt)
        if known not in self._embeddings:
            start = time.perf_counter()
            self._embeddings[known] = encode_prompts(
                loaded.pipeline, [job.prompt], [job.negative_prompt], clip_skip=key.clip_skip
            )
            self._add(Spent(draw_seconds=time.perf_counter() - start))
        return self._embeddings[known]

    def _draw_batch(
        self, loaded: Assembled, key: BatchKey, batch: list[tuple[int, RenderJob, PromptEmbeddings]]
    ) -> list[RenderResult]:
        """One call of the pipeline. Raises only if memory ran out and fewer at a time could help."""
        start = time.perf_counter()
        padded = batch
        if self.settings.pad_batches:
            padded = batch + batch[-1:] * (self.settings.batch_size - len(batch))
        try:
            pictures = _draw(loaded, key, [job.seed for _, job, _ in padded], [e for *_, e in padded])
        except Exception as error:
            if is_out_of_memory(error) and len(batch) > 1 and not self.settings.pad_batches:
                raise
            failure = _failure_of(error)
            return [RenderResult(job.key, failure=failure) for _, job, _ in batch]
        outcomes = [_to_image(picture) for picture in pictures[: len(batch)]]
        seconds = time.perf_counter() - start
        self._add(Spent(batches=1, images=len(batch), draw_seconds=seconds))
        return [
            RenderResult(job.key, image=image, failure=failure, seconds=seconds / len(batch))
            for (_, job, _), (image, failure) in zip(batch, outcomes, strict=True)
        ]

    def _add(self, spent: Spent) -> None:
        with self._lock:
            self._spent = self._spent.plus(spent)


def _draw(loaded: Assembled, key: BatchKey, seeds: list[int], embeddings: list[PromptEmbeddings]) -> Tensor:
    """Pictures (n, 3, height, width), float32 on the CPU; 0 is black, 1 is white, and nothing is cut off."""
    pipeline = loaded.pipeline
    pipeline.scheduler = make_scheduler(scheduler_spec(key.sampler), loaded.noise_schedule, key.steps, seeds)
    together: dict[str, Tensor] = {}
    for name in embeddings[0].arguments():
        together[name] = torch.cat([one.arguments()[name] for one in embeddings])
    with warnings.catch_warnings():
        # Of a rounding error in torchsde's time, which it corrects.
        warnings.filterwarnings("ignore", message="Should have t[ab]", module="torchsde")
        latents = pipeline(
            **together,
            width=key.width,
            height=key.height,
            num_inference_steps=key.steps,
            guidance_scale=key.cfg,
            # On the CPU, whose random numbers are the same everywhere.
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
    return _decode(pipeline.vae, latents)


def _decode(vae: Any, latents: Tensor) -> Tensor:
    """As pipelines do it at their end, but in the autoencoder's own precision, and what is not finite stays so."""
    latents = latents.to(vae.dtype)
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        latents = latents * std / vae.config.scaling_factor + mean
    else:
        latents = latents / vae.config.scaling_factor
    return (vae.decode(latents, return_dict=False)[0] * 0.5 + 0.5).float().cpu()


def _to_image(picture: Tensor) -> tuple[Image.Image | None, RenderFailure | None]:
    """(3, height, width) as an image, or why it is none."""
    if not picture.isfinite().all():
        num_bad = int((~picture.isfinite()).sum())
        return None, RenderFailure(
            "not_finite", f"{num_bad} of {picture.numel()} values are not finite; float32 or bfloat16 may help."
        )
    pixels = (picture.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    if not pixels.any():
        return None, RenderFailure("black", "All of the picture is black.")
    return Image.fromarray(pixels), None


def _failure_of(error: Exception) -> RenderFailure:
    """What is recorded.

    Raises:
        Exception: The error itself, if it leaves the device unusable.
    """
    if isinstance(error, RenderError):
        return error.failure
    if isinstance(error, WeightsError):
        return RenderFailure(error.reason, str(error))
    if is_out_of_memory(error):
        return RenderFailure("out_of_memory", f"Memory ran out ({error}); lower `batch_size` or set `vae_tiling`.")
    if "CUDA error" in str(error):
        raise error
    where = traceback.extract_tb(error.__traceback__)[-1]
    logger.warning("A batch could not be drawn.", exc_info=error)
    return RenderFailure("error", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")


def _default_budget(device: torch.device) -> int:
    if device.type == "cuda":
        return int(DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(DEVICE_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
