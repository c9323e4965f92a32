"""What the machine has, and what was measured of it."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from memplan import doctor
from memplan.cli import main
from memplan.hardware import machine, numa
from memplan.hardware import profile as profiles
from memplan.hardware.calibrate import current
from memplan.units import GIB


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def told():
    return {one.what: one for one in doctor.findings()}


def test_a_machine_that_is_well(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "available of" in text
    assert "memplan calibrate" in text  # nothing was measured yet
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [one["what"] for one in found][:2] == ["machine", "RAM"]
    assert not any(one["is_problem"] for one in found)


def test_what_is_measured_is_kept_and_told(capsys, tmp_path, cache):
    assert main(["calibrate", "--out", str(tmp_path / "mine.json"), "--json"]) == 0
    told_profile = json.loads(capsys.readouterr().out)
    profile = profiles.load(tmp_path / "mine.json")
    assert told_profile["name"] == profile.name
    assert current.current() == machine.cached() == profile
    assert f"measured {profile.disk_bytes_per_s.date}" in told()["rates"].found
    assert {name for name, _, _ in profiles.as_rows(profile)} >= {
        "memory",
        "host to device",
        "disk",
        "products in float32",
    }


@pytest.mark.full
def test_a_spoilt_profile_is_measured_again(cache):
    profile = current.current()
    (file,) = (cache / "profiles").iterdir()
    file.write_text("{")
    assert told()["rates"].found == "not measured yet"
    again = current.current()
    assert again.machine == profile.machine
    assert machine.cached() == again


def test_no_folder_for_the_cache(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path / "file"))
    assert told()["cache"].is_problem
    assert main(["doctor"]) == 2
    assert "MEMPLAN_CACHE" in capsys.readouterr().out
    assert main(["calibrate", "--out", str(tmp_path / "nowhere" / "p.json")]) == 2


def test_what_is_not_installed(monkeypatch):
    version = doctor.version

    def without(name):
        if name in ("accelerate", "trl"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without)
    found = told()
    assert found["libraries"].is_problem
    assert "pip install accelerate" in found["libraries"].meaning
    assert not found["trainers"].is_problem
    assert "trl" in found["trainers"].meaning


def test_a_containers_limit(monkeypatch):
    monkeypatch.setattr(machine, "_container_room_bytes", lambda: [GIB // 4])
    assert "container" in told()["RAM"].meaning
    assert told()["RAM"].found.startswith("256.0 MiB")


def test_where_a_gpu_is_is_told_where_there_are_several_nodes(monkeypatch):
    properties = SimpleNamespace(name="a card", major=9, minor=0, pci_domain_id=0, pci_bus_id=193, pci_device_id=0)
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_properties": properties, "mem_get_info": (GIB, 2 * GIB),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(numa, "advice", lambda address: (f"{address} is near node 1 of 2", "numactl"))
    found = [one for one in doctor.findings() if one.what == "GPU 0"]
    assert [one.found for one in found][1:] == ["0000:c1:00.0 is near node 1 of 2"]
    assert found[-1].meaning == "numactl"


@pytest.mark.parametrize("setting", ["", "expandable_segments:True"])
def test_the_allocators_setting_is_told_where_there_is_a_gpu(setting, monkeypatch):
    """A stand-in for torch's answers."""
    properties = SimpleNamespace(name="a card", major=9, minor=0)
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_properties": properties, "mem_get_info": (GIB, 2 * GIB),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", setting)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    found = told()
    assert found["GPU 0"].found.startswith("a card, 1.00 GiB free of 2.00 GiB")
    assert ("allocator" in found) == (not setting)
    assert "GPUs" not in found
