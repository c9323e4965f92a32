"""A folder of safetensors read as a table of extents, without torch and without believing a size unchecked."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from msgspec import Struct

from memplan.errors import CheckpointError
from memplan.units import format_bytes

_HEADER_LIMIT_BYTES = 100_000_000
"""As safetensors' own limit."""

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}


class StoredTensor(Struct, frozen=True, kw_only=True):
    """One tensor of a checkpoint and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    file_offset_bytes: int
    size_bytes: int


def read_checkpoint(folder: str | Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder's ``model.safetensors`` or sharded index (or diffusers' own names), by name.

    Raises CheckpointError for a missing, truncated or inconsistent file, and for an index that leads out of its folder.
    """
    folder = Path(folder)
    found = next((file for file in _weight_files(folder) if file.is_file()), None)
    if found is not None and found.suffix == ".safetensors":
        return read_header(found)
    if found is not None:
        index = found
        try:
            weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors ({error}): fetch it again") from None
        for shard in shards:
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise CheckpointError(f"{index} names the file {shard!r}, which is outside its folder: refused")
        tensors = {name: tensor for shard in shards for name, tensor in read_header(folder / shard).items()}
        missing = sorted(set(weight_map) - set(tensors))
        if missing:
            raise CheckpointError(
                f"{index} promises the tensor {missing[0]}, which no shard holds: fetch the files again"
            )
        return tensors
    raise CheckpointError(
        f"{folder} holds neither model.safetensors nor its index: give a folder with safetensors weights"
    )


def has_checkpoint(folder: str | Path | None) -> bool:
    """Whether the folder holds safetensors weights under their usual names."""
    if not folder:
        return False
    return any(file.is_file() for file in _weight_files(Path(folder)))


def _weight_files(folder: Path) -> list[Path]:
    """Return the index and the single file that a checkpoint may have, in the order in which its library looks for
    them.
    """
    single, index = ".safetensors", ".safetensors.index.json"
    names = f"model{single}", f"model{index}", f"diffusion_pytorch_model{index}", f"diffusion_pytorch_model{single}"
    return [folder / name for name in names]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file. Raises CheckpointError."""
    try:
        size_bytes = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 0 < length <= min(_HEADER_LIMIT_BYTES, size_bytes - 8):
                raise CheckpointError(
                    f"{path} is no safetensors file or is truncated ({format_bytes(size_bytes)}): fetch it again"
                )
            header: dict[str, Any] = json.loads(file.read(length))
        data = 8 + length
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, item_bytes = DTYPES[entry["dtype"]]
            shape = tuple(int(size) for size in entry["shape"])
            elements = 1
            for size in shape:
                elements *= size
            if min(shape, default=0) < 0 or begin < 0 or end - begin != elements * item_bytes:
                raise CheckpointError(
                    f"{path}: the tensor {name} does not have the bytes of its shape {shape}: fetch it again"
                )
            if data + end > size_bytes:
                raise CheckpointError(
                    f"{path} is truncated: the tensor {name} ends at byte {data + end}, the file at {size_bytes}; "
                    "fetch it again"
                )
            tensors[name] = StoredTensor(
                name=name,
                dtype=dtype,
                shape=shape,
                path=str(path),
                file_offset_bytes=data + begin,
                size_bytes=end - begin,
            )
        return tensors
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check that the shard is there") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({type(error).__name__}: {error}): fetch it again"
        ) from None
