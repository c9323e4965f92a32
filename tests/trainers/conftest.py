"""Checkpoints on disk, and the Pythons that run scripts: one as it is, one under ``memplan run``."""

from __future__ import annotations

import re
import shutil
import sys

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from memplan.trainers.launch import VARIABLE, Settings, environment
from tests.support.graphs import traced_once
from tests.support.training import CPU
from tests.trainers.forked import Forked
from tests.trainers.small import (
    align,
    save_small_dit,
    save_small_llama,
    save_small_t5,
    save_small_unet,
    save_texts,
    save_tokenizer,
)


@pytest.fixture(autouse=True)
def planned_again_it_is_not_traced_again():
    """Within a test: for the least that works, and for what is between that and all."""
    with traced_once({}):
        yield


@pytest.fixture(scope="session")
def hardware(tmp_path_factory):
    file = tmp_path_factory.mktemp("profile") / "cpu.json"
    file.write_bytes(msgspec.json.encode(CPU))
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Llama with a tokenizer; in ``other`` another, of which each weight begins with the same 4096 bytes."""
    folder = tmp_path_factory.mktemp("model")
    shards = save_small_llama(folder)
    align(folder)
    (folder / "other").mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder / "other")
    for shard in shards:
        tensors = load_file(shard)
        for tensor in tensors.values():
            tensor.view(-1)[1024:] += 0.01
        save_file(tensors, folder / "other" / shard.name, metadata={"format": "pt"})
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    save_small_t5(folder)
    align(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    save_small_unet(folder)
    align(folder)
    return folder


@pytest.fixture(scope="session")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    save_small_dit(folder)
    align(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_texts(folder)
    return folder


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Runs a script as it is."""
    python = Forked(tmp_path_factory.mktemp("alone"))
    yield python.run
    python.close()


@pytest.fixture(scope="session")
def under(tmp_path_factory, hardware):
    """Runs a script under ``memplan run`` with a budget of vram."""
    python = Forked(tmp_path_factory.mktemp("under"), sys.executable, "-m", "memplan", "run", "--")

    def run(vram, script, *arguments, report=None, plan=None, trace=None, **environ):
        settings = Settings(
            options={"vram": str(vram), "ram": "64MiB", "hardware": str(hardware)},
            report=None if report is None else str(report),
            plan=None if plan is None else str(plan),
            trace=None if trace is None else str(trace),
        )
        return python.run(script, *arguments, **{VARIABLE: environment(settings, {})[VARIABLE]}, **environ)

    yield run
    python.close()


def least_vram(done):
    """Return the bytes that a run that did not fit says it needs."""
    found = re.search(r"vram \((\d+) bytes\)", done.stderr)
    assert found is not None, done.stderr[-3000:]
    return int(found[1])


def exact(done):
    """What a script printed that does not change from run to run."""
    return [line for line in done.stdout.splitlines() if line.startswith(("loss", "eval", "made", "sum"))]
