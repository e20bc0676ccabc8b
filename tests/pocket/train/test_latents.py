"""The latents beside scikit-learn's principal components."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from pocket.drawing import draw, random_scenes
from pocket.train.latents import CELLS, CHANNELS, Latents, encode_all
from pocket.train.pictures import Pictures, draw_pictures

FADING = 0.35  # channel i has size (deviation i / deviation 0) ** FADING


@pytest.fixture(scope="module")
def images():
    return draw(random_scenes(60, 0), 0)


@pytest.fixture(scope="module")
def latents(images):
    return Latents.fit(images)


@pytest.fixture(scope="module")
def pca(images):
    return PCA(CHANNELS, svd_solver="full").fit(patches(images))


def patches(images):
    """(n, 48) 4 x 4 patches in [-1, 1], cut out one by one."""
    cut = [image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] for image in images for i in range(16) for j in range(16)]
    return np.stack(cut).reshape(-1, 48) / 127.5 - 1


def test_projection_is_the_principal_components(latents, pca):
    np.testing.assert_allclose(latents.mean, pca.mean_, atol=1e-5)
    deviations = np.sqrt(pca.explained_variance_)
    for channel in range(CHANNELS):
        scale = (deviations[channel] / deviations[0]) ** FADING / deviations[channel]
        expected = pca.components_[channel] * scale
        expected *= np.sign(expected[np.abs(expected).argmax()])  # the largest entry is positive
        np.testing.assert_allclose(latents.projection[:, channel], expected, rtol=1e-3, atol=1e-4 * scale)


def test_latents_of_pictures(latents, pca, images):
    encoded = latents.encode(images[:7])
    assert encoded.shape == (7, CHANNELS, CELLS, CELLS) and encoded.dtype == torch.float32
    deviations = np.sqrt(pca.explained_variance_)
    expected = pca.transform(patches(images[:7])) / deviations * (deviations / deviations[0]) ** FADING
    signs = np.sign([column[np.abs(column).argmax()] for column in pca.components_])
    expected = (expected * signs).reshape(7, CELLS, CELLS, CHANNELS).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(encoded, expected, atol=1e-3)


def test_size_of_the_channels(latents, images):
    encoded = latents.encode(images)
    sizes = encoded.std((0, 2, 3))
    assert float(sizes[0]) == pytest.approx(1, abs=1e-3)
    assert (sizes.diff() < 0).all() and float(sizes[-1]) > 0.1
    assert encoded.mean((0, 2, 3)).abs().max() < 1e-4
    channels = encoded.permute(1, 0, 2, 3).reshape(CHANNELS, -1)
    correlations = torch.corrcoef(channels) - torch.eye(CHANNELS)
    assert correlations.abs().max() < 1e-3


def test_a_patch_is_one_cell(latents, images):
    changed = images[:1].copy()
    changed[0, 20:24, 40:44] = 255 - changed[0, 20:24, 40:44]
    different = (latents.encode(changed) != latents.encode(images[:1])).any(1)[0]
    assert different.nonzero().tolist() == [[5, 10]]


def test_most_of_a_picture_is_in_them(latents, images):
    """What is lost by going through 8 of 48 numbers a patch, as signal-to-noise ratio."""
    flat = latents.encode(images).permute(0, 2, 3, 1).reshape(-1, CHANNELS).numpy()
    again = flat @ np.linalg.pinv(latents.projection) + latents.mean
    error = np.square(again - patches(images)).mean()
    assert 10 * np.log10(4 / error) > 22


def test_the_same_pictures_give_the_same_latents(latents, images):
    again = Latents.fit(images.copy())
    assert (again.projection == latents.projection).all() and (again.mean == latents.mean).all()


def test_saved_latents(latents, tmp_path):
    latents.save(tmp_path / "latents.safetensors")
    again = Latents.load(tmp_path / "latents.safetensors")
    assert (again.projection == latents.projection).all() and (again.mean == latents.mean).all()
    latents.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "latents.safetensors").read_bytes()


def test_all_latents_of_many_pictures(latents):
    pictures = draw_pictures(20, seed=1)
    many = Pictures(np.tile(pictures.images, (53, 1, 1, 1)), pictures.scenes * 53, pictures.captions * 53)
    encoded = encode_all(latents, many)
    assert encoded.dtype == torch.float16 and encoded.shape == (1_060, CHANNELS, CELLS, CELLS)
    torch.testing.assert_close(encoded[1_040:].float(), latents.encode(pictures.images), atol=2e-3, rtol=1e-3)
