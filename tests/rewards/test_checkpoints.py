import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rewards.checkpoints import CheckpointError, find_checkpoint, load_state_dict, load_strictly, read_config


@pytest.fixture
def state():
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2), "steps": torch.tensor(3)}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_the_layouts_people_publish(tmp_path, state, wrap, prefix, zipped):
    named = {prefix + name: value for name, value in state.items()}
    torch.save(wrap(named), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_state_dict(tmp_path / "w.pt")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_reads_safetensors(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    assert torch.equal(load_state_dict(tmp_path / "w.safetensors")["weight"], state["weight"])


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, state: torch.save({"a": Evil()}, path), "without running its code, which is refused"),
        (lambda path, state: torch.save(nn.Linear(2, 2), path), "without running its code, which is refused"),
        (lambda path, state: torch.save([1, 2], path), "no plain mapping"),
        (lambda path, state: torch.save({"a": "text"}, path), "no plain mapping"),
        (lambda path, state: torch.save({}, path), "no plain mapping"),
        (lambda path, state: path.write_bytes(b"junk" * 100), "truncated or no weight file|refused"),
        (lambda path, state: path.write_bytes(b""), "truncated or no weight file"),
        (lambda path, state: torch.save(state | {"bias": torch.tensor([1, torch.nan])}, path), "bias holds NaN"),
        (lambda path, state: torch.save(state | {"bias": torch.tensor([1, torch.inf])}, path), "bias holds NaN or inf"),
    ],
)
def test_what_can_not_be_trusted_is_refused(tmp_path, state, capsys, write, message):
    write(tmp_path / "w.pt", state)
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / "w.pt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_says_so(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    state = {"weight": torch.randn(100, 100)}
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match=f"w{suffix}.*(truncated|refused)"):
        load_state_dict(path)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be .safetensors or one of .pt"):
        load_state_dict(tmp_path / "w.onnx")


def test_every_key_that_does_not_fit_is_listed(state):
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError) as caught:
        load_strictly(model, {"weight": torch.zeros(3, 3), "scale": torch.ones(1)}, "some.pt")
    error = caught.value
    assert "some.pt does not fit" in str(error)
    assert (error.missing, error.unexpected) == (["bias"], ["scale"])
    assert error.mismatched == ["weight (3, 3) instead of (2, 3)"]
    del state["steps"]
    load_strictly(model, state, "some.pt")
    assert torch.equal(model.weight, state["weight"])


def test_weights_take_the_precision_of_the_model():
    stored = {"weight": torch.full((2, 3), 1 / 3).half(), "bias": torch.ones(2, dtype=torch.bfloat16)}
    model = nn.Linear(3, 2)
    load_strictly(model, stored, "some.pt")
    assert model.weight.dtype == model.bias.dtype == torch.float32
    assert model.weight[0, 0].item() == 0.333251953125  # the float16 nearest to a third
    assert stored["weight"].dtype == torch.float16


def test_weights_of_the_right_precision_are_not_copied(state):
    del state["steps"]
    model = nn.Linear(3, 2)
    load_strictly(model, state, "some.pt")
    assert model.weight.data_ptr() == state["weight"].data_ptr()


def test_a_long_list_of_keys_is_shortened_in_the_message_only():
    with pytest.raises(CheckpointError) as caught:
        load_strictly(nn.Linear(1, 1), {f"k{i}": torch.zeros(1) for i in range(200)}, "x")
    assert len(caught.value.unexpected) == 200
    assert "k49 …" in str(caught.value) and "k50" not in str(caught.value)


def test_a_local_checkpoint_is_described_by_its_digest(tmp_path, state):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    found = find_checkpoint(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.describe() == {"checkpoint": str(path), "revision": None, "sha256": digest}
    assert found.settings == {}


def test_a_converted_folder_brings_its_settings(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "scorer.json").write_text(json.dumps({"config": {"a": 1}}))
    found = find_checkpoint(tmp_path)
    assert found.path == tmp_path / "model.safetensors"
    assert found.settings == {"config": {"a": 1}}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.pt", "no checkpoint at missing.pt.*`org/repo/file@revision`"),
        ("org/repo/file.pt", "no checkpoint at org/repo/file.pt.*revision is a commit"),
        ("org/repo/file.pt@1234abcd", "Can't get org/repo/file.pt@1234abcd from the Hub.*give the path"),
    ],
)
def test_a_checkpoint_that_is_not_there_says_what_to_do(source, message):
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(source)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path, folder_of="transformers").path == tmp_path


def test_configurations_come_as_mapping_file_or_default(tmp_path):
    (tmp_path / "c.json").write_text('{"a": 1}')
    assert read_config(tmp_path / "c.json", {}) == read_config({"a": 1}, {}) == read_config(None, {"a": 1}) == {"a": 1}
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a JSON object, but holds list"):
        read_config(tmp_path / "c.json", {})
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_config(tmp_path / "c.json", {})
    with pytest.raises(CheckpointError, match="Can't read .*: No such file"):
        read_config(tmp_path / "none.json", {})
