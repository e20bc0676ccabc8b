"""Reads safetensors files into memory.

Beside the library's own reader because that one maps files, which leaves the reading to whoever first looks at a
tensor, and in version 0.8 loses some 60 bytes per tensor for good, which adds up over thousands of checkpoints.

Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    """Offset of its first byte in the file."""


class Header(NamedTuple):
    """What a file says about itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Names, types and shapes of a file's tensors.

    Raises:
        ValueError: It is no safetensors file, or has a type that PyTorch doesn't know.
        OSError: It can't be read.
    """
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= 100_000_000:  # the format's own limit
            raise ValueError(f"{path} is no safetensors file: its header would take {length} bytes.")
        try:
            content = json.loads(file.read(length))
            metadata = content.pop("__metadata__", {})
            tensors = {
                name: TensorInfo(
                    _DTYPES[entry["dtype"]], torch.Size(entry["shape"]), 8 + length + entry["data_offsets"][0]
                )
                for name, entry in content.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The header of {path} can't be used: {error!r}.") from error
    return Header(tensors, metadata)


def read_tensors(path: str | Path, wanted: Callable[[str], bool] = bool) -> dict[str, Tensor]:
    """Tensors of a file, on the CPU, in memory of their own.

    Args:
        path: The file.
        wanted: Of which names; by default of all.

    Raises:
        ValueError, OSError: As `read_header`, or the file is too short.
    """
    tensors = read_header(path).tensors
    found: dict[str, Tensor] = {}
    with Path(path).open("rb", buffering=0) as file:
        for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
            if not wanted(name):
                continue
            tensor = torch.empty(info.shape.numel() * info.dtype.itemsize, dtype=torch.uint8)
            target = memoryview(tensor.numpy())
            file.seek(info.start)
            while target:
                got = file.readinto(target)
                if not got:
                    raise ValueError(f"{path} ends in the middle of {name}.")
                target = target[got:]
            found[name] = tensor.view(info.dtype).reshape(info.shape)
    return found
