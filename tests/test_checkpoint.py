"""Headers of safetensors files are read as they are, and not believed where they cannot be true."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from memplan.errors import CheckpointError
from memplan.model.checkpoint import read_checkpoint, read_header


def write(path, header, data=b""):
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_extents_are_those_that_safetensors_wrote(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2).bfloat16()}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    raw = path.read_bytes()
    for name, stored in read_checkpoint(tmp_path).items():
        held = raw[stored.file_offset_bytes : stored.file_offset_bytes + stored.size_bytes]
        expected = tensors[name]
        assert stored.shape == tuple(expected.shape)
        assert f"torch.{stored.dtype}" == str(expected.dtype)
        assert held == expected.contiguous().view(torch.uint8).numpy().tobytes()


def test_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(64)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated: the tensor a ends at byte"):
        read_checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:4])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": None},
        [],
    ],
)
def test_headers_that_cannot_be_true(tmp_path, entry):
    path = tmp_path / "x.safetensors"
    write(path, {"a": entry}, bytes(16))
    with pytest.raises(CheckpointError):
        read_header(path)


def test_a_length_that_is_not_there(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "a/../../b", ".."])
def test_an_index_may_not_leave_its_folder(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_checkpoint(tmp_path)


def test_an_index_that_promises_too_much(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="the tensor b"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "two.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not an index"):
        read_checkpoint(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither"):
        read_checkpoint(tmp_path)
