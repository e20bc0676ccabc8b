"""How far a set of images is from a reference set: FID and KID, over Inception or any other features.

    distance = FrechetDistance(load_inception("weights-inception-2015-12-05-6726825d.pth"))
    distance.reference(real_images, cache="coco.safetensors")
    print(distance.compute(generated_images).fid)

FID (https://arxiv.org/abs/1706.08500) compares means and covariances of features, KID (https://arxiv.org/abs/1801.01401)
the features themselves. The layers of Inception and KID are torch-fidelity's (`pip install "t2i-align[fid]"`); other
features need FID's formula only, for which `frechet_distance` says why it is not a library's.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rewards.batching import BatchSize, in_batches, prefetch
from rewards.feature_statistics import (
    FeatureStatistics,
    FIDError,
    Moments,
    image_set_digest,
    read_statistics,
    write_statistics,
)
from rewards.images import ImageError, ImageSource, load_image
from rewards.inception import FeatureExtractor, load_inception

__all__ = [
    "FIDError",
    "FIDResult",
    "FeatureExtractor",
    "FrechetDistance",
    "frechet_distance",
    "kernel_distance",
    "load_inception",
]

logger = logging.getLogger(__name__)

ENOUGH = 10_000
"""Images that FID takes at least, by the advice of its authors (github.com/bioinf-jku/TTUR)."""
_CHUNK = 1_000


class FIDResult(NamedTuple):
    """Distances between a set of images and the reference."""

    fid: float
    """0 for equal sets, lower is better; biased upwards, the more so the fewer images."""
    kid_mean: float
    """Mean over random subsets; unbiased, so that it may be a little below 0. NaN if switched off."""
    kid_std: float
    """Deviation between subsets, which is not an error of the mean; 0 if each set is its only subset."""
    n: int
    """Images compared."""
    n_reference: int
    """Images in the reference."""
    dimension: int
    """Length of a feature vector."""
    errors: dict[int, str]
    """Row -> why the image was left out."""


class FrechetDistance:
    """FID and KID of sets of images against one reference."""

    def __init__(
        self, extractor: FeatureExtractor | Callable[[Tensor], Tensor], *, batch_size: int = 32, num_workers: int = 4,
        progress: bool = False, kid_subsets: int = 100, kid_subset_size: int = 1_000, max_features: int = 10_000,
        seed: int = 2020,
    ):  # fmt: skip
        """Choose the features and how they are computed.

        Args:
            extractor: `load_inception(path)` for the published numbers, or any function from a uint8 batch
                (n, 3, height, width) to features (n, d); a `FeatureExtractor` to resize the images, or for a cache.
            batch_size: Images per forward pass; halved when memory runs out.
            num_workers: Threads that decode and preprocess images; 0: none.
            progress: Show a progress bar of images.
            kid_subsets: Random subsets that KID is averaged over; 0: no KID (which needs torch-fidelity).
            kid_subset_size: Images per subset; as many as the smaller set has, if these are fewer.
            max_features: Images, chosen at random, whose features are kept for KID and cached (10,000 of Inception
                are 80 MB). FID comes from all images in any case.
            seed: Of that choice and of the subsets; the default is torch-fidelity's.

        Raises:
            ValueError: An option out of range.
        """
        least = {"num_workers": (num_workers, 0), "kid_subsets": (kid_subsets, 0)}
        least |= {"kid_subset_size": (kid_subset_size, 2), "max_features": (max_features, 2)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, but got {value}.")
        self.extractor = extractor if isinstance(extractor, FeatureExtractor) else FeatureExtractor(extractor)
        self.num_workers, self.progress = num_workers, progress
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        self.max_features, self.seed = max_features, seed
        self._batch_size = BatchSize(batch_size)
        self._reference: FeatureStatistics | None = None

    def reference(
        self, images: Sequence[ImageSource] | None = None, *, cache: str | Path | None = None
    ) -> FeatureStatistics:
        """Set what `compute` compares with.

        Args:
            images: The reference; None takes the statistics in `cache` for what they are.
            cache: A .safetensors file for the statistics. What it holds is used if it came from the same extractor,
                weights and images (names, sizes and times of files; contents of other images) with the same
                `max_features` and `seed`; otherwise it is computed and replaced, with a warning.

        Raises:
            FIDError: No usable images, a cache that is another file, or (without images) of another extractor.
        """
        key = self._cache_key(images) if cache is not None else {}
        statistics = self._read_cache(Path(cache), key) if cache is not None else None
        if statistics is None:
            if images is None:
                raise FIDError(f"There are no reference images and no statistics in `cache` ({cache}).")
            statistics = self.statistics(images)
            if cache is not None:
                write_statistics(cache, statistics, key)
        self._reference = statistics
        return statistics

    def compute(self, images: Sequence[ImageSource]) -> FIDResult:
        """Compare a set of images with the reference. An image that can't be read is left out and listed.

        Raises:
            FIDError: No reference, fewer than two usable images, or features of a wrong shape.
        """
        if (reference := self._reference) is None:
            raise FIDError("There is nothing to compare with; call `reference(images)` first.")
        found = self.statistics(images)
        dimension = len(found.mean)
        if dimension != len(reference.mean):
            raise FIDError(
                f"The features have dimension {dimension}, but those of the reference {len(reference.mean)}; did the "
                "extractor change under its name?"
            )
        _warn_if_few("", found.n, dimension)
        _warn_if_few("reference ", reference.n, dimension)
        fid = frechet_distance(found.mean, found.covariance, reference.mean, reference.covariance)
        kid_mean, kid_std = math.nan, math.nan
        if self.kid_subsets:
            kid_mean, kid_std = kernel_distance(
                found.features, reference.features,
                subsets=self.kid_subsets, subset_size=self.kid_subset_size, seed=self.seed,
            )  # fmt: skip
        return FIDResult(fid, kid_mean, kid_std, found.n, reference.n, dimension, found.errors)

    def describe(self) -> dict[str, Any]:
        """What a result has to say about where it came from: features and their weights, and KID's subsets."""
        return {
            "extractor": self.extractor.name,
            "sha256": self.extractor.sha256,
            "kid_subsets": self.kid_subsets,
            "kid_subset_size": self.kid_subset_size,
            "seed": self.seed,
        }

    def statistics(self, images: Sequence[ImageSource]) -> FeatureStatistics:
        """Mean, covariance and some of the features of a set of images.

        Raises:
            FIDError: Fewer than two usable images, or features of a wrong shape.
        """
        if isinstance(images, str | bytes | Path | Image.Image):
            raise FIDError("`images` must be a sequence of images; put a single one in a list.")
        keep = set(np.random.default_rng(self.seed).permutation(len(images))[: self.max_features].tolist())
        errors: dict[int, str] = {}
        moments, chunk, kept = Moments(), [], []
        work = in_batches(self._prepared(images, errors), self._batch_size, self._extract)
        for row, vector in tqdm(work, total=len(images), desc="features", unit="image", disable=not self.progress):
            if not vector.isfinite().all():
                errors[row] = "its features are not finite."
                continue
            if row in keep:
                kept.append(vector.float())
            chunk.append(vector)
            if len(chunk) == _CHUNK:
                moments.add(torch.stack(chunk))
                chunk = []
        if chunk:
            moments.add(torch.stack(chunk))
        first = next((f" (row {row}: {reason})" for row, reason in errors.items()), "")
        if moments.n < 2:
            raise FIDError(f"FID takes at least 2 images, but {moments.n} of {len(images)} can be used{first}.")
        if errors:
            logger.warning("%d of %d images are left out of FID%s", len(errors), len(images), first)
        features = torch.stack(kept) if kept else torch.empty(0, len(moments.mean))
        return FeatureStatistics(moments.mean, moments.covariance, moments.n, features, dict(sorted(errors.items())))

    def _prepared(self, images: Sequence[ImageSource], errors: dict[int, str]) -> Iterator[tuple[int, Tensor]]:
        def prepare(row: int) -> Tensor | ImageError:
            try:
                return self.extractor.preprocess(load_image(images[row]))
            except ImageError as error:
                return error

        ahead = 2 * self._batch_size.value
        ready = prefetch(prepare, range(len(images)), num_workers=self.num_workers, ahead=ahead)
        for row, pixels in enumerate(ready):
            if isinstance(pixels, ImageError):
                errors[row] = str(pixels)
            else:
                yield row, pixels

    def _extract(self, batch: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """(row, float64 features on the CPU) of a batch."""
        shapes = {tuple(pixels.shape): row for row, pixels in batch}
        if len(shapes) > 1:
            sizes = " and ".join(f"{shape} (row {row})" for shape, row in list(shapes.items())[:2])
            raise FIDError(
                f"Images of {sizes} don't fit in a batch; give the FeatureExtractor a `preprocess` that resizes."
            )
        with torch.inference_mode():
            features = self.extractor.function(torch.stack([pixels for _, pixels in batch]))
            if not torch.is_tensor(features) or features.ndim != 2 or len(features) != len(batch):
                shape = tuple(features.shape) if torch.is_tensor(features) else type(features).__name__
                raise FIDError(f"The extractor must return (n, d) features, but returned {shape} for n = {len(batch)}.")
            rows = features.cpu().to(torch.float64)
        return [(row, vector) for (row, _), vector in zip(batch, rows, strict=True)]

    def _cache_key(self, images: Sequence[ImageSource] | None) -> dict[str, str]:
        extractor = self.extractor
        if not extractor.name:
            raise FIDError("A cache needs an extractor with a name: FeatureExtractor(function, name=…, sha256=…).")
        key = {"extractor": extractor.name, "sha256": extractor.sha256}
        if images is None:
            return key
        options = {"max_features": str(self.max_features), "seed": str(self.seed)}
        return key | {"images": image_set_digest(images)} | options

    def _read_cache(self, path: Path, key: dict[str, str]) -> FeatureStatistics | None:
        if not path.exists():
            return None
        statistics, found = read_statistics(path)
        other = [name for name in key if found.get(name) != key[name]]
        if not other:
            return statistics
        reasons = ", ".join(
            "images" if name == "images" else f"{name} ({found.get(name)} instead of {key[name]})" for name in other
        )
        if "images" not in key:
            raise FIDError(f"{path} was computed with another {reasons}.")
        logger.warning("%s was computed with other %s; it is computed again and replaced.", path, reasons)
        return None


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|² + Tr(C_a + C_b - 2 (C_a C_b)^½).

    torchmetrics and torch-fidelity take the last trace from the eigenvalues of the product C_a C_b. That is the same
    number, but where covariances are singular, rounding errors of 1e-16 in eigenvalues that should be 0 enter as their
    square roots: 50 vectors of length 2048 get a distance of -2e-4 from themselves. Here it is the sum of the singular
    values of C_a^½ C_b^½, where such errors stay small: 2e-12 there, and agreement to 12 digits elsewhere.

    Args:
        mean_a, mean_b: float64, shape (d,).
        covariance_a, covariance_b: float64, symmetric and positive semi-definite, shape (d, d).

    Returns:
        At least 0.
    """
    root_a, root_b = _root(covariance_a), _root(covariance_b)
    overlap = torch.linalg.svdvals(root_a.T @ root_b).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(0.0, distance.item())


def _root(covariance: Tensor) -> Tensor:
    """R of shape (d, rank) with R Rᵀ = covariance, without the directions that are only rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    real = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    return vectors[:, real] * values[real].sqrt()


def kernel_distance(
    features: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1_000, seed: int = 2020
) -> tuple[float, float]:
    """KID by torch-fidelity: unbiased MMD² with the kernel (x·y / d + 1)³, mean and deviation over random subsets.

    Vectors are sorted first, so that the subsets don't depend on the order of the images. NaN if one set has fewer than
    two vectors.

    Args:
        features, reference: Shapes (n, d) and (m, d).
        subsets: How many; only one if both sets fit into a subset exactly.
        subset_size: Vectors per subset and set, or as many as there are.
        seed: Of the subsets.

    Raises:
        ImportError: torch-fidelity is missing.
    """
    try:
        from torch_fidelity.metric_kid import kid_features_to_metric
    except ImportError as error:
        raise ImportError(
            'KID needs torch-fidelity: pip install "t2i-align[fid]", or set `kid_subsets` to 0.'
        ) from error
    size = min(subset_size, len(features), len(reference))
    if size < 2:
        return math.nan, math.nan
    if size == len(features) == len(reference):
        subsets = 1
    found = kid_features_to_metric(
        _sorted(features), _sorted(reference),
        kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, kid_kernel="poly", verbose=False,
    )  # fmt: skip
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def _sorted(features: Tensor) -> Tensor:
    array = features.to(torch.float64).numpy()
    return torch.from_numpy(array[sorted(range(len(array)), key=lambda row: array[row].tobytes())])


def _warn_if_few(which: str, n: int, dimension: int) -> None:
    if n <= dimension:
        logger.warning(
            "FID over %d %simages with features of dimension %d: their covariance is singular (rank %d at most), and "
            "the value depends more on n than on the images. FID takes %d images or more; KID has no such bias.",
            n, which, dimension, n - 1, ENOUGH,
        )  # fmt: skip
    elif n < ENOUGH:
        logger.warning(
            "FID over %d %simages (dimension %d) is biased upwards: below %d, compare it only between sets of equal "
            "size (https://arxiv.org/abs/1911.07023).",
            n, which, dimension, ENOUGH,
        )  # fmt: skip
