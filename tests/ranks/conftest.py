"""Checkpoints on disk, and the Pythons that run scripts on several ranks: as they are, and under ``memplan run``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from memplan.trainers.launch import VARIABLE, Settings, environment
from tests.ranks.spawned import Nodes, Spawned
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


@pytest.fixture(scope="session")
def nodes():
    """Two network namespaces and a link between them."""
    if shutil.which("ip") is None:
        pytest.skip("there is no iproute2 to make network namespaces with")
    names = [f"memplan-{os.getpid()}-{number}" for number in range(2)]
    subnet = f"10.231.{os.getpid() % 250}"

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "ranks", "netns", names[0], "type", "veth", "peer", "name", "ranks", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{subnet}.{number + 1}/24", "dev", "ranks")
            for link in ("lo", "ranks"):
                ip("-n", name, "link", "set", link, "up")
        yield Nodes(networks=names, link="ranks", address=f"{subnet}.1")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this user may not make network namespaces: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
