"""FID and KID against closed forms, naive numpy and two libraries; caches, images that fail, Inception's loading."""

import logging
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.checkpoints import CheckpointError
from rewards.feature_statistics import Moments, image_set_digest, read_statistics
from rewards.fid import FeatureExtractor, FIDError, FrechetDistance, frechet_distance, kernel_distance, load_inception


def naive_fid(a, b):
    """FID of features (n, d) as its definition says it; for covariances of full rank."""
    import scipy.linalg

    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root)


def naive_fid_of_few(a, b):
    """FID without covariances: with C = XᵀX, the trace of (C_a C_b)^½ is the sum of singular values of X_a X_bᵀ."""
    x_a, x_b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    overlap = np.linalg.svd(x_a @ x_b.T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x_a**2).sum() + (x_b**2).sum() - 2 * overlap


def naive_kid(a, b):
    """Unbiased MMD² with two loops; the cross term holds all pairs."""

    def mean(x, y, *, same):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum((x[i] @ y[j] / x.shape[1] + 1) ** 3 for i, j in pairs) / len(pairs)

    return mean(a, a, same=True) + mean(b, b, same=True) - 2 * mean(a, b, same=False)


def pictures(n, seed=0, size=6, low=0, high=256):
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, (size, size, 3), dtype=np.uint8) for _ in range(n)]


def flat(pixels):
    """Every pixel is a feature, in [0, 1]."""
    return pixels.flatten(1).float() / 255


def as_features(images):
    """What `flat` makes of arrays, in the channel order of tensors."""
    return np.stack([image.transpose(2, 0, 1).reshape(-1) for image in images]).astype(np.float32).astype(float) / 255


def few(pixels):
    """Five features that depend on each other."""
    mixing = torch.from_numpy(np.random.default_rng(7).normal(size=(pixels[0].numel(), 5)))
    return (flat(pixels).double() @ mixing).float()


NAMED = FeatureExtractor(flat, name="flat", sha256="0")


@pytest.mark.parametrize("rotation", [0.0, 0.7])
def test_gaussians_with_a_closed_form(rotation):
    # Axes of deviations (2, 3) and (1, 4): |(3, 4)|² + (2 - 1)² + (3 - 4)² = 27, however the plane is turned.
    turn = torch.tensor(
        [[math.cos(rotation), -math.sin(rotation)], [math.sin(rotation), math.cos(rotation)]], dtype=torch.float64
    )
    a, b = (turn @ torch.diag(torch.tensor(v, dtype=torch.float64)) @ turn.T for v in ([4.0, 9.0], [1.0, 16.0]))
    zero, mean = torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert frechet_distance(zero, a, mean, b) == pytest.approx(27, abs=1e-12)
    assert frechet_distance(mean, b, zero, a) == pytest.approx(27, abs=1e-12)
    assert frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-12)


def test_covariances_without_extent():
    # Two points: only their distance counts. A point and a Gaussian: distance and the Gaussian's total variance.
    zero, mean = torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    point, round_ = torch.zeros(2, 2, dtype=torch.float64), torch.diag(torch.tensor([4.0, 9.0], dtype=torch.float64))
    assert frechet_distance(zero, point, mean, point) == 25
    assert frechet_distance(zero, point, mean, round_) == pytest.approx(25 + 13)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_moments_survive_a_large_mean(chunk):
    # Sums of squares around 1e16 would leave a covariance of about 1 no correct digit.
    vectors = np.random.default_rng(0).normal(size=(50, 3)) + 1e8
    moments = Moments()
    for part in torch.from_numpy(vectors).split(chunk):
        moments.add(part)
    assert moments.n == 50
    np.testing.assert_allclose(moments.covariance, np.cov(vectors, rowvar=False), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moments.mean, vectors.mean(0), rtol=1e-14)


def test_kid_is_the_unbiased_mmd():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)) + 0.5
    mean, std = kernel_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert mean == pytest.approx(naive_kid(a, b), rel=1e-12)
    assert std == 0
    # Without enough vectors there is nothing to average over.
    assert all(map(math.isnan, kernel_distance(torch.from_numpy(a), torch.from_numpy(b[:1]))))


def test_kid_over_subsets_is_near_the_whole_and_repeatable():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(200, 4)) + shift) for shift in (0, 0.4))
    whole, _ = kernel_distance(a, b)
    mean, std = kernel_distance(a, b, subsets=100, subset_size=50, seed=1)
    assert (mean, std) == kernel_distance(a[torch.randperm(200)], b, subsets=100, subset_size=50, seed=1)
    assert (mean, std) != kernel_distance(a, b, subsets=100, subset_size=50, seed=2)
    assert abs(mean - whole) < 5 * std / math.sqrt(100) and std > 0


def test_agrees_with_naive_numpy_and_with_torchmetrics():
    real, fake = pictures(60, seed=0), pictures(50, seed=1, low=40)
    distance = FrechetDistance(few, batch_size=7)
    distance.reference(real)
    found = distance.compute(fake)
    a, b = (few(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2)).double() for x in (real, fake))
    assert found.fid == pytest.approx(naive_fid(a.numpy(), b.numpy()), rel=1e-9)
    assert (found.n, found.n_reference, found.dimension, found.errors) == (50, 60, 5, {})

    fid = pytest.importorskip("torchmetrics.image.fid")
    identity = torch.nn.Identity()
    identity.num_features = 5
    theirs = fid.FrechetInceptionDistance(identity)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert found.fid == pytest.approx(theirs.compute().item(), rel=1e-9)
    from torchmetrics.image.kid import poly_mmd

    again = FrechetDistance(few, kid_subset_size=50)
    again.reference(real[:50])
    found = again.compute(fake)
    assert found.kid_mean == pytest.approx(poly_mmd(a[:50], b).item(), rel=1e-5)


def test_equal_sets_have_distance_zero():
    images = pictures(12)  # 108 features: the covariance is singular
    distance = FrechetDistance(flat)
    distance.reference(images)
    found = distance.compute([image.copy() for image in images])
    assert 0 <= found.fid < 1e-9
    full = FrechetDistance(few)
    full.reference(images)
    assert 0 <= full.compute(images).fid < 1e-9


@pytest.mark.parametrize("n", [2, 30, 108])
def test_fewer_images_than_features(n):
    real, fake = pictures(40, seed=0), pictures(n, seed=1, high=200)
    distance = FrechetDistance(flat)
    distance.reference(real)
    expected = naive_fid_of_few(as_features(fake), as_features(real))
    assert distance.compute(fake).fid == pytest.approx(expected, rel=1e-6) and expected > 1


def test_order_batches_and_threads_change_nothing(monkeypatch):
    real, fake = pictures(40, seed=0), pictures(30, seed=1)
    results = []
    for batch_size, workers, chunk, order in [(32, 0, 1000, 1), (1, 3, 1000, -1), (7, 2, 4, -1)]:
        monkeypatch.setattr("rewards.fid._CHUNK", chunk)
        distance = FrechetDistance(few, batch_size=batch_size, num_workers=workers, kid_subset_size=20)
        distance.reference(real[::order])
        results.append(distance.compute(fake[::order]))
    for result in results[1:]:
        assert result.fid == pytest.approx(results[0].fid, rel=1e-9)
        assert result.kid_mean == pytest.approx(results[0].kid_mean, rel=1e-6)
        assert result.kid_std == pytest.approx(results[0].kid_std, rel=1e-6)


def test_images_of_all_kinds_are_the_same(tmp_path):
    arrays = pictures(5)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for array, path in zip(arrays, paths, strict=True):
        Image.fromarray(array).save(path)
    distance = FrechetDistance(flat, kid_subsets=0)
    distance.reference(arrays)
    for images in (paths, list(map(str, paths)), [path.read_bytes() for path in paths], list(map(Image.open, paths))):
        found = distance.compute(images)
        assert found.fid < 1e-9 and math.isnan(found.kid_mean) and math.isnan(found.kid_std)


def test_images_that_fail_are_left_out_and_named(tmp_path, caplog):
    images = pictures(6)
    (tmp_path / "half.png").write_bytes(b"\x89PNG")
    white = np.full((6, 6, 3), 255, np.uint8)
    distance = FrechetDistance(lambda pixels: flat(pixels) / (flat(pixels).mean(1, keepdim=True) < 1), batch_size=2)
    distance.reference(images)
    with caplog.at_level(logging.WARNING):
        found = distance.compute([images[0], tmp_path / "half.png", *images[1:], white, tmp_path / "gone.png"])
    assert found.fid < 1e-9 and found.n == 6
    assert list(found.errors) == [1, 7, 8]
    assert "half.png is no image" in found.errors[1] and "gone.png" in found.errors[8]
    assert found.errors[7] == "its features are not finite."
    assert "3 of 9 images are left out of FID (row 1:" in caplog.text
    with pytest.raises(FIDError, match=r"takes at least 2 images, but 1 of 2 can be used \(row 0: .*gone\.png"):
        distance.compute([tmp_path / "gone.png", images[0]])
    with pytest.raises(FIDError, match="but 0 of 0 can be used"):
        distance.compute([])


def test_warnings_say_how_many_images_there_are(caplog):
    distance = FrechetDistance(few)
    distance.reference(pictures(5))
    caplog.clear()
    distance.compute(pictures(6))
    singular, biased = sorted((record.getMessage() for record in caplog.records), key=lambda text: "biased" in text)
    assert "FID over 5 reference images with features of dimension 5: their covariance is singular (rank 4" in singular
    assert "FID over 6 images (dimension 5) is biased upwards: below 10000" in biased


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def limited(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("too much")
        return flat(pixels)

    images = pictures(8)
    distance = FrechetDistance(limited, batch_size=8)
    distance.reference(images)
    assert sizes == [8, 4, 2, 2, 2, 2]
    plain = FrechetDistance(flat)
    plain.reference(images)
    assert distance.compute(pictures(9, seed=1)) == plain.compute(pictures(9, seed=1))


@pytest.mark.parametrize(
    ("function", "images", "message"),
    [
        (flat, "one.png", "put a single one in a list"),
        (flat, pictures(1) + pictures(1, size=7), r"\(3, 6, 6\) \(row 0\) and \(3, 7, 7\) \(row 1\) don't fit"),
        (
            lambda pixels: flat(pixels)[0],
            pictures(3),
            r"must return \(n, d\) features, but returned \(108,\) for n = 3",
        ),
        (lambda pixels: flat(pixels)[:2], pictures(3), r"returned \(2, 108\) for n = 3"),
        (lambda pixels: [pixels], pictures(3), "returned list for n = 3"),
    ],
)
def test_sets_that_can_not_be_compared(function, images, message):
    with pytest.raises(FIDError, match=message):
        FrechetDistance(function).reference(images)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"num_workers": -1}, {"kid_subsets": -1}, {"kid_subset_size": 1}, {"max_features": 1}],
)
def test_options_that_make_no_sense(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"`{name}` must be at least .*, but got {value}"):
        FrechetDistance(flat, **options)


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    for module in ("torch_fidelity", "torch_fidelity.metric_kid"):
        monkeypatch.setitem(sys.modules, module, None)
    distance = FrechetDistance(flat)
    distance.reference(pictures(3))
    with pytest.raises(ImportError, match=r't2i-align\[fid\]", or set `kid_subsets` to 0'):
        distance.compute(pictures(3))
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ImportError, match=r"Inception needs torch-fidelity: pip install .t2i-align\[fid\]"):
        load_inception(tmp_path / "weights.pth")
    without = FrechetDistance(flat, kid_subsets=0)
    without.reference(pictures(3))
    assert without.compute(pictures(3)).fid < 1e-9


def test_a_reference_is_needed():
    with pytest.raises(FIDError, match="call `reference"):
        FrechetDistance(flat).compute(pictures(3))
    with pytest.raises(FIDError, match="no reference images and no statistics"):
        FrechetDistance(flat).reference()


def refuse(pixels):
    raise AssertionError("computed again")


@pytest.fixture
def folder(tmp_path):
    """Six pictures in files."""
    folder = tmp_path / "real"
    folder.mkdir()
    for i, array in enumerate(pictures(6)):
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


def files(folder):
    return sorted(folder.glob("*.png"))


def test_a_cache_is_used_again(folder, tmp_path):
    cache = tmp_path / "new folder" / "real.safetensors"
    first = FrechetDistance(NAMED)
    statistics = first.reference(files(folder), cache=cache)
    fake = pictures(7, seed=1)

    again = FrechetDistance(FeatureExtractor(refuse, name="flat", sha256="0"))
    shutil.move(folder, tmp_path / "moved")
    for images in (files(tmp_path / "moved"), files(tmp_path / "moved")[::-1], None):
        found = again.reference(images, cache=cache)
        assert torch.equal(found.mean, statistics.mean) and torch.equal(found.covariance, statistics.covariance)
        assert torch.equal(found.features, statistics.features) and (found.n, found.errors) == (6, {})
    second = FrechetDistance(NAMED)
    second.reference(cache=cache)
    assert second.compute(fake) == first.compute(fake)
    assert first.describe()["extractor"] == "flat"


def test_a_cache_of_something_else_is_replaced(folder, tmp_path, caplog):
    cache = tmp_path / "real.safetensors"
    images = files(folder)
    FrechetDistance(NAMED).reference(images, cache=cache)

    def changed(extractor, images, **options):
        caplog.clear()
        statistics = FrechetDistance(extractor, **options).reference(images, cache=cache)
        stored, key = read_statistics(cache)
        assert torch.equal(stored.covariance, statistics.covariance) and key["extractor"] == extractor.name
        return caplog.text

    assert changed(NAMED, images) == ""
    assert "computed with other images; it is computed again" in changed(NAMED, images[:5])
    os.utime(images[0], ns=(0, 0))
    assert "other images" in changed(NAMED, images[:5])
    assert "other sha256 (0 instead of 1)" in changed(FeatureExtractor(flat, name="flat", sha256="1"), images)
    assert "other extractor (flat instead of few)" in changed(FeatureExtractor(few, name="few", sha256="1"), images)
    assert "other max_features (10000 instead of 4)" in changed(
        FeatureExtractor(few, "few", "1"), images, max_features=4
    )
    assert read_statistics(cache)[0].features.shape == (4, 5)
    with pytest.raises(
        FIDError, match=r"real\.safetensors was computed with another extractor \(few instead of flat\)"
    ):
        FrechetDistance(NAMED).reference(cache=cache)
    wider = FrechetDistance(FeatureExtractor(flat, name="few", sha256="1"))
    wider.reference(cache=cache)
    with pytest.raises(FIDError, match="dimension 108, but those of the reference 5"):
        wider.compute(images)


def test_a_cache_keeps_which_images_failed(folder, tmp_path, caplog):
    (folder / "3.png").write_bytes(b"nothing")
    cache = tmp_path / "real.safetensors"
    for _ in range(2):
        found = FrechetDistance(NAMED).reference(files(folder), cache=cache)
        assert found.n == 5 and list(found.errors) == [3] and "3.png is no image" in found.errors[3]


def test_other_files_are_never_overwritten(folder, tmp_path):
    from safetensors.torch import save_file

    cache = tmp_path / "weights.safetensors"
    save_file({"mean": torch.zeros(2)}, cache)
    for content, message in [(cache.read_bytes(), "holds no feature statistics"), (b"half", "can't be read as")]:
        cache.write_bytes(content)
        with pytest.raises(FIDError, match=rf"weights\.safetensors {message}"):
            FrechetDistance(NAMED).reference(files(folder), cache=cache)
        assert cache.read_bytes() == content
    with pytest.raises(FIDError, match="A cache needs an extractor with a name"):
        FrechetDistance(flat).reference(files(folder), cache=tmp_path / "new.safetensors")


def test_digest_of_a_set(folder):
    arrays, paths = pictures(3), files(folder)
    digests = {image_set_digest(images) for images in (arrays, arrays[:2], paths, paths[:2], [*paths, folder / "gone"])}
    assert len(digests) == 5
    assert image_set_digest(arrays[::-1]) == image_set_digest(arrays)
    assert image_set_digest([Image.fromarray(array) for array in arrays]) == image_set_digest(arrays)
    other = [arrays[0], arrays[1], arrays[2] ^ 1]
    assert image_set_digest(other) != image_set_digest(arrays)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights under the names of torch-fidelity's network, as the PyTorch file that it loads."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):  # the constructor insists on loading a file
            pass

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    network = Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    path = folder / "weights-inception.pth"
    torch.save(network.state_dict(), path)
    return path


def pixels_of(images):
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])


def test_inception_is_that_of_torch_fidelity_and_torchmetrics(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = pictures(2, size=64)
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    (expected,) = theirs(pixels_of(images))
    extractor = load_inception(weights, device="cpu")
    found = extractor.function(torch.stack([extractor.preprocess(Image.fromarray(image)) for image in images]))
    assert found.shape == (2, 2048) and expected.std(0).max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    fid = pytest.importorskip("torchmetrics.image.fid")
    large = pictures(1, size=400)  # antialiasing differs where images are made smaller
    (expected,) = fid.NoTrainInceptionV3("i", ["2048"], str(weights))._torch_fidelity_forward(pixels_of(large))
    antialiased = load_inception(weights, device="cpu", antialias=True)
    (image,) = map(Image.fromarray, large)
    smooth = antialiased.function(antialiased.preprocess(image)[None])
    torch.testing.assert_close(smooth, expected, rtol=1e-5, atol=1e-5)
    assert (smooth - extractor.function(extractor.preprocess(image)[None])).abs().max() > 0.01
    assert extractor.name != antialiased.name and extractor.sha256 == antialiased.sha256


def test_inception_reads_images_of_different_sizes(weights, caplog):
    images = [pictures(1, size=size)[0] for size in (8, 32, 33)]
    distance = FrechetDistance(load_inception(weights, device="cpu"), kid_subsets=0)
    with caplog.at_level(logging.WARNING):
        assert distance.reference(images).mean.shape == (2048,)
        found = distance.compute(images)
    assert found.dimension == 2048 and 0 <= found.fid < 1e-6
    assert "FID over 3 images with features of dimension 2048" in caplog.text


def test_inception_refuses_weights_that_do_not_fit(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    path = tmp_path / "weights.pth"

    def load(**changes):
        torch.save({k: v for k, v in (state | changes).items() if v is not None}, path)
        return load_inception(path, device="cpu")

    with pytest.raises(CheckpointError, match="1 missing: Mixed_6a.branch3x3.conv.weight.") as error:
        load(**{"Mixed_6a.branch3x3.conv.weight": None})
    assert error.value.missing == ["Mixed_6a.branch3x3.conv.weight"]
    with pytest.raises(CheckpointError, match="1 unexpected: AuxLogits.conv0.weight"):
        load(**{"AuxLogits.conv0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"Conv2d_1a_3x3.conv.weight \(1,\) instead of \(32, 3, 3, 3\)"):
        load(**{"Conv2d_1a_3x3.conv.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_inception(tmp_path / "gone.pth")
    torch.save({"a": print}, path)
    with pytest.raises(CheckpointError, match="can't be read without running its code"):
        load_inception(path)
    # Neither the classifier nor counters of training steps matter.
    optional = {name: None for name in state if name.startswith("fc.") or name.endswith("num_batches_tracked")}
    small = torch.zeros(1, 3, 75, 75)
    assert torch.equal(load(**optional).function(small), load_inception(weights, device="cpu").function(small))
