"""Packed blocks are written once, found by what they hold, and never taken for others."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from memplan.cache import BlockCache
from memplan.cli import main
from memplan.errors import InputError, TransferError
from memplan.run.attach import attach
from memplan.run.handle import handle_of
from tests.run.test_parity import plan_for
from tests.support.training import assert_equal, make, train, whole_run


def files(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (folder / "blocks").iterdir()}


@pytest.fixture
def cache(tmp_path):
    return BlockCache(tmp_path)


def data(seed, size=4096):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def put(cache, whole, about, twice=True):
    """In pieces of no round size."""
    return cache.put(lambda: iter([whole[:1000], whole[1000:]]), whole.nbytes, about, twice=twice)


@pytest.mark.parametrize("twice", [True, False])
def test_the_same_bytes_are_written_once(cache, tmp_path, twice):
    path, checksum = put(cache, data(1), "a block")
    assert path.read_bytes() == data(1).tobytes()
    before = files(tmp_path)
    assert put(cache, data(1), "a block of another model", twice) == (path, checksum)
    assert files(tmp_path) == before
    other, _ = put(cache, data(2), "a block")
    assert other != path
    assert sum(e.size_bytes for e in cache.entries()) == 8192


def test_a_file_of_the_wrong_size_is_written_anew(cache):
    path, _ = put(cache, data(1), "a block")
    os.truncate(path, 100)
    put(cache, data(1), "a block")
    assert path.read_bytes() == data(1).tobytes()


def test_an_error_of_what_gives_the_pieces_leaves_nothing(cache, tmp_path):
    def pieces():
        yield data(1)
        raise ValueError("a short read")

    with pytest.raises(ValueError, match="a short read"):
        cache.put(pieces, 8192, "a block", twice=False)
    assert files(tmp_path) == {}


def test_an_interrupted_write_leaves_nothing(cache, tmp_path, monkeypatch):
    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(cache, data(1), "a block")
    assert files(tmp_path) == {}


def test_what_a_dead_process_left_goes_and_a_living_ones_stays(cache):
    cache.folder.mkdir()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone, there = (cache.folder / f".{pid}-x.part" for pid in (int(dead.stdout), os.getpid()))
    gone.touch(), there.touch()
    cache.require_room(10)
    assert not gone.exists()
    assert there.exists()


def test_no_room(cache):
    with pytest.raises(InputError, match="MEMPLAN_CACHE"):
        cache.require_room(1 << 60)


def test_strange_files_are_left_alone(cache, tmp_path):
    put(cache, data(1), "a block")
    kept = tmp_path / "kept"
    kept.write_text("mine")
    (cache.folder / ("0" * 40 + ".block")).symlink_to(kept)
    (cache.folder / "notes.block").write_text("mine")
    assert len(cache.entries()) == 1
    assert cache.clear() == 4096
    assert kept.read_text() == "mine"
    assert sorted(p.name for p in cache.folder.iterdir()) == ["0" * 40 + ".block", "notes.block"]


def test_a_second_run_finds_the_first_ones_files(tmp_path):
    whole = whole_run("llama")
    model = make("llama")
    plan = plan_for(model, "llama")
    for _ in range(2):
        before = files(tmp_path) if (tmp_path / "blocks").exists() else {}
        model = make("llama")
        with attach(model, plan, cache=tmp_path, verify=True):
            assert_equal(whole, train(model, "llama"))
        assert not before or files(tmp_path) == before
    disk = sum(item.size_bytes for item in plan.items if item.home == "disk")
    assert sum(e.size_bytes for e in BlockCache(tmp_path).entries()) == disk


def test_changed_weights_are_other_files(tmp_path):
    model = make("llama")
    plan = plan_for(model, "llama")
    attach(model, plan, cache=tmp_path).detach()
    count = len(BlockCache(tmp_path).entries())
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.add_(1)
    whole = train(make_like(model), "llama")
    with attach(model, plan, cache=tmp_path, verify=True):
        assert_equal(whole, train(model, "llama"))
    assert len(BlockCache(tmp_path).entries()) == 2 * count


def make_like(model):
    other = make("llama")
    other.load_state_dict(model.state_dict())
    return other


def test_a_flipped_bit_is_found(tmp_path):
    model = make("llama")
    plan = plan_for(model, "llama")
    attach(model, plan, cache=tmp_path).detach()
    entry = BlockCache(tmp_path).entries()[1]
    path = tmp_path / "blocks" / entry.name
    held = bytearray(path.read_bytes())
    held[1000] ^= 1
    path.write_bytes(held)
    handle = attach(model, plan, cache=tmp_path, verify=True)
    with pytest.raises(TransferError, match="not those") as caught:
        train(model, "llama")
    assert entry.name in str(caught.value)
    with pytest.raises(
        TransferError, match="not those"
    ):  # nor are damaged weights given back as though they were right
        handle.detach()
    assert handle_of(model) is None


def test_clearing_does_not_touch_a_run(tmp_path):
    whole = whole_run("llama")
    model = make("llama")
    with attach(model, plan_for(model, "llama"), cache=tmp_path):
        assert BlockCache(tmp_path).clear() > 0
        assert_equal(whole, train(model, "llama"))


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))
    assert main(["cache", "list"]) == 0
    assert "No packed blocks" in capsys.readouterr().out
    put(BlockCache(tmp_path), data(1), "the block model.layers.3 of X")
    assert main(["cache", "list"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.3" in shown
    assert "4.0 KiB" in shown
    assert main(["cache", "list", "--json"]) == 0
    (block,) = json.loads(capsys.readouterr().out)["blocks"]
    assert block["size_bytes"] == 4096
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "x.json").write_bytes(bytes(100))
    assert main(["cache", "clear", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == 4196
    assert not list((tmp_path / "graphs").iterdir())
    assert BlockCache(tmp_path).entries() == ()


def test_the_command_line_is_light():
    code = "import sys; from memplan.cli import main; main(['cache', 'list']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
