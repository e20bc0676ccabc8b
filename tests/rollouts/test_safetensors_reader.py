import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollouts.safetensors_reader import read_header, read_tensors

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """A tensor of every type, one without dimensions, one without numbers."""
    tensors = {str(dtype): (torch.arange(6).reshape(2, 3) % 2).to(dtype) for dtype in TYPES}
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"made": "here"})
    return tmp_path / "a.safetensors"


def test_tensors_are_what_the_library_reads(path):
    found, expected = read_tensors(path), load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    found["scalar"].zero_()
    assert load_file(path)["scalar"] == 3


def test_only_wanted_tensors_are_read(path):
    assert read_tensors(path, lambda name: name.startswith("s")).keys() == {"scalar"}


def test_the_header_says_what_is_there(path):
    header = read_header(path)
    assert header.metadata == {"made": "here"}
    assert header.tensors["torch.float16"][:2] == (torch.float16, torch.Size([2, 3]))


def test_a_file_that_is_too_short_is_refused(path):
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="a.safetensors ends in the middle of "):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file: its header would take 0 bytes"),
        (b"PK\x03\x04 and so on, a pickle", "is no safetensors file"),
        (b"\x05" + b"\0" * 7 + b"junk!", "can't be used: JSONDecodeError"),
        (b"\x04" + b"\0" * 7 + b"[{}]", "can't be used: TypeError|can't be used: AttributeError"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_a_type_that_pytorch_does_not_know_is_refused(path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match="header of .* can't be used: KeyError\\('F4'\\)"):
        read_header(path)
