import hashlib
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollouts.catalog import CatalogEntry
from rollouts.weights import ConvertWeightsConfig, WeightFolder, WeightsError


def entry(*files):
    parameters = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7}
    return CatalogEntry(
        name="Inkwell - v1", version_id=1, model_id=1, type="Checkpoint", base_model="SD 1.5", files=list(files),
        default_parameters=parameters,
    )  # fmt: skip


def file(uri, sha256="AB" * 32):
    return {"uri": uri, "format": "SafeTensor", "sha256": sha256.upper()}


@pytest.fixture
def folder(tmp_path):
    """A folder with ink/model.safetensors; its digest is in the attribute `digest`."""
    (tmp_path / "weights" / "ink").mkdir(parents=True)
    save_file({"a": torch.arange(1000.0)}, tmp_path / "weights" / "ink" / "model.safetensors")
    return tmp_path / "weights"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_path_inside_the_folder_is_found_and_verified(folder):
    path = folder / "ink" / "model.safetensors"
    assert WeightFolder(folder).find(entry(file("ink/model.safetensors", digest(path)))) == path


def test_what_is_downloaded_is_found_by_its_digest(folder):
    path = folder / "ink" / "model.safetensors"
    stored = path.rename(folder / f"{digest(path)}.safetensors")
    found = WeightFolder(folder).find(entry(file("https://example.org/api/download/1", digest(stored))))
    assert found == stored


def test_the_next_file_is_tried_when_one_is_missing(folder):
    path = folder / "ink" / "model.safetensors"
    assert (
        WeightFolder(folder).find(entry(file("gone.safetensors"), file("ink/model.safetensors", digest(path)))) == path
    )


def test_a_diffusers_folder_is_found(folder):
    (folder / "ink" / "model_index.json").write_text("{}")
    (folder / "ink" / "a").mkdir()
    save_file({"b": torch.ones(3)}, folder / "ink" / "a" / "b.safetensors")
    both = digest(folder / "ink" / "a" / "b.safetensors") + digest(folder / "ink" / "model.safetensors")
    files = file("ink", hashlib.sha256(both.encode()).hexdigest())
    assert WeightFolder(folder).find(entry(files)) == folder / "ink"
    (folder / "ink" / "a" / "b.safetensors").write_bytes(b"junk")
    refuse(folder, files, reason="corrupt", match="b.safetensors is truncated")


def refuse(folder, *files, reason, match):
    with pytest.raises(WeightsError, match=match) as caught:
        WeightFolder(folder).find(entry(*files))
    assert caught.value.reason == reason
    assert str(caught.value).startswith("Inkwell - v1: ")


def test_missing_files_say_where_they_should_be(folder):
    refuse(folder, reason="no_file", match="lists no file")
    refuse(folder, file("gone.safetensors"), reason="missing_file", match="there is no .*gone.safetensors")
    url = "https://example.org/api/download/1"
    refuse(folder, file(url), reason="missing_file", match=f"download {url} to .*{'ab' * 32}.safetensors")
    refuse(folder, file("ink"), reason="missing_file", match="no diffusers folder")


@pytest.mark.parametrize(
    "uri", ["../secret.safetensors", "/etc/passwd", "ink/../../secret.safetensors", "link.safetensors"]
)
def test_a_path_that_leads_out_of_the_folder_is_refused(folder, uri):
    save_file({"a": torch.zeros(1)}, folder.parent / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    refuse(folder, file(uri), reason="outside_folder", match="leads out of")


def test_a_wrong_hash_is_refused_and_a_changed_file_is_noticed(folder):
    path = folder / "ink" / "model.safetensors"
    right = digest(path)
    weights = WeightFolder(folder)
    weights.find(entry(file("ink/model.safetensors", right)))
    save_file({"a": torch.zeros(1000)}, path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(WeightsError, match=f"but the catalogue says {right}; download it again") as caught:
        weights.find(entry(file("ink/model.safetensors", right)))
    assert caught.value.reason == "wrong_hash"
    assert WeightFolder(folder, verify=False).find(entry(file("ink/model.safetensors", right))) == path


def test_damaged_files_and_pickles_are_refused(folder):
    path = folder / "ink" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(folder, file("ink/model.safetensors"), reason="corrupt", match="truncated or no safetensors file")
    path.write_bytes(b"junk")
    refuse(folder, file("ink/model.safetensors"), reason="corrupt", match="truncated or no safetensors file")
    torch.save({"a": torch.zeros(1)}, folder / "model.ckpt")
    refuse(folder, file("model.ckpt"), reason="pickle", match="python -m rollouts.weights --source .*model.ckpt")


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_is_converted_without_running_its_code(folder):
    source, output = folder / "model.ckpt", folder / "model.safetensors"
    torch.save({"state_dict": {"a": torch.arange(4.0), "b": torch.ones(2, 2).T}, "epoch": 3}, source)
    command = [sys.executable, "-m", "rollouts.weights", "--source", str(source), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    assert load_file(output)["a"].tolist() == [0, 1, 2, 3]
    torch.save({"a": Evil()}, source)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "code ran" not in done.stdout
    assert done.stderr.startswith("error: ") and "running its code" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [(("a.safetensors", "b.safetensors"), "`source` must end in"), (("a.ckpt", "b.pt"), "`output` must end in")],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvertWeightsConfig(*options)
