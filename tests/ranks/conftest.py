"""Checkpoints on disk, and the Pythons that run scripts on several ranks: as they are, and under ``memplan run``."""

from __future__ import annotations

import sys

import pytest

from memplan.trainers.launch import VARIABLE, Settings, environment
from tests.ranks.spawned import Spawned
from tests.trainers.conftest import checkpoint, data, hardware  # noqa: F401


@pytest.fixture(scope="session")
def ranks(tmp_path_factory, hardware):  # noqa: F811
    """Runs a script on several ranks as it is."""
    python = Spawned(tmp_path_factory.mktemp("ranks"))

    def run(*arguments, **more):
        return python.run(*arguments, **{"PROFILE": str(hardware)} | more)

    yield run
    python.close()


@pytest.fixture(scope="session")
def ranks_under(tmp_path_factory, hardware):  # noqa: F811
    """Runs a script on several ranks under ``memplan run`` with a budget of vram."""
    python = Spawned(tmp_path_factory.mktemp("ranks under"), sys.executable, "-m", "memplan", "run", "--")

    def run(vram, *arguments, ram="64MiB", **more):
        settings = Settings(options={"vram": str(vram), "ram": ram, "hardware": str(hardware)})
        return python.run(*arguments, **{VARIABLE: environment(settings, {})[VARIABLE]} | more)

    yield run
    python.close()
