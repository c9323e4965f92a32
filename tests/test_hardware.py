"""Hardware profiles: the shipped ones hold, wrong ones say what and where, and this machine's is measured once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from memplan.errors import HardwareError
from memplan.hardware import machine
from memplan.hardware import profile as profiles
from memplan.hardware.calibrate import current, disk
from memplan.hardware.calibrate.cuda import tried_page_locks
from memplan.hardware.calibrate.measure import measure as measured_by
from memplan.hardware.profile import Figure, HardwareProfile
from memplan.units import GIB, MIB

SHIPPED = profiles.names()
RATES = ("memory_bytes_per_s", "host_to_device_bytes_per_s", "device_to_host_bytes_per_s", "disk_bytes_per_s")


def a_profile(**changes: Any) -> HardwareProfile:
    return msgspec.structs.replace(profiles.load("l4"), **changes)


def a_figure(value: float = 1.0, **changes: Any) -> Figure:
    return Figure(**{"value": value, "kind": "measured", "source": "a test", "date": "2026-01-31"} | changes)


# ------------------------------------------------------------------------------------------------------------- shipped


def test_these_are_shipped() -> None:
    assert {"rtx-3060-12gb", "rtx-4090", "a100-80gb", "h100-80gb"} <= {*SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_holds(name: str) -> None:
    profile = profiles.load(name)
    assert profile.name == name
    assert profile.device == "cuda"
    assert not profile.machine
    for figure in (profile.device_bytes, profile.memory_bytes_per_s, *profile.matmul_flops_per_s.values()):
        assert figure.kind == "datasheet"
        assert ("NVIDIA" in figure.source or "AMD" in figure.source) or "×" in figure.source
    # A datasheet says nothing of these; whoever reads the profile must see it.
    for figure in (profile.disk_bytes_per_s, profile.launch_s, profile.load_latency_s, profile.context_bytes):
        assert figure.kind == "assumed"
    assert profile.host_to_device_bytes_per_s.value < profile.memory_bytes_per_s.value
    half = profile.matmul_flops_per_s["float16"].value
    assert profile.matmul_flops_per_s.get("bfloat16", profile.matmul_flops_per_s["float16"]).value == half
    assert profile.matmul_flops_per_s["float32"].value < half


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_as_save_writes_it(name: str, tmp_path: Path) -> None:
    file = Path(profiles.__file__).parents[2] / "profiles" / f"{name}.json"
    profiles.save(profiles.load(name), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


# ---------------------------------------------------------------------------------------------------------------- load


def test_a_name_is_found_in_upper_and_lower_case() -> None:
    assert profiles.load("RTX-4090") == profiles.load("rtx-4090")


def test_a_file_is_read(tmp_path: Path) -> None:
    profile = a_profile(name="mine")
    profiles.save(profile, tmp_path / "mine.json")
    assert profiles.load(tmp_path / "mine.json") == profile
    assert profiles.load(str(tmp_path / "mine.json")) == profile
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_an_unknown_name_lists_those_that_are_near() -> None:
    with pytest.raises(HardwareError, match=r"'rtx4099'; near it: rtx-4090.*h200.*\"auto\""):
        profiles.load("rtx4099")
    with pytest.raises(HardwareError, match=r"'zzzz'; there are: a10, "):
        profiles.load("zzzz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"nothing\.json cannot be read \(No such file"):
        profiles.load(tmp_path / "nothing.json")
    with pytest.raises(HardwareError, match=r"cannot be read \(Is a directory\)"):
        profiles.load(tmp_path)


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = json.loads(msgspec.json.encode(a_profile()))
    change(data)
    return json.dumps(data).encode()


WRONG = {
    "not JSON": (b"{", "truncated"),
    "not text": (b"\xff\xfe\x00", "malformed"),
    "not an object": (b"[]", "Expected `object`"),
    "a field is missing": (edited(lambda data: data.pop("launch_s")), "missing required field `launch_s`"),
    "a field is unknown": (edited(lambda data: data.update(colour="red")), "unknown field `colour`"),
    "a kind is unknown": (
        edited(lambda data: data["launch_s"].update(kind="felt")),
        r"Invalid enum value 'felt'.*launch_s",
    ),
    "a rate is text": (
        edited(lambda data: data["disk_bytes_per_s"].update(value="1")),
        r"Expected `float`.*disk_bytes",
    ),
    "a rate is zero": (
        edited(lambda data: data["disk_bytes_per_s"].update(value=0)),
        "disk_bytes_per_s is 0.0: .*above 0",
    ),
    "a time is negative": (edited(lambda data: data["launch_s"].update(value=-1)), "launch_s is -1.0: .*not negative"),
    "no source": (edited(lambda data: data["device_bytes"].update(source=" ")), "device_bytes names no source"),
    "no date": (edited(lambda data: data["device_bytes"].update(date="May")), "device_bytes is dated 'May'"),
    "another version": (edited(lambda data: data.update(schema_version=2)), "schema_version is 2; .* version 1"),
    "no name": (edited(lambda data: data.update(name="")), "name is empty"),
    "a dtype is unknown": (
        edited(lambda data: data["matmul_flops_per_s"].update(fp8=data["launch_s"])),
        "matmul_flops_per_s has .*fp8",
    ),
    "no float32": (edited(lambda data: data["matmul_flops_per_s"].pop("float32")), "give float32"),
    "a dtype's rate is zero": (
        edited(lambda data: data["matmul_flops_per_s"]["float16"].update(value=0)),
        r"matmul_flops_per_s\.float16 is 0\.0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_says_what_and_where(case: str, tmp_path: Path) -> None:
    data, message = WRONG[case]
    file = tmp_path / "wrong.json"
    file.write_bytes(data)
    with pytest.raises(HardwareError, match=rf"wrong\.json is not a hardware profile: .*{message}"):
        profiles.load(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_rate_is_finite_and_above_zero(value: float) -> None:
    with pytest.raises(HardwareError, match="memory_bytes_per_s is"):
        a_profile(memory_bytes_per_s=a_figure(value))


@pytest.mark.parametrize("field", ["launch_s", "load_latency_s", "context_bytes"])
def test_some_figures_may_be_zero(field: str) -> None:
    assert getattr(a_profile(**{field: a_figure(0.0)}), field).value == 0


@pytest.mark.parametrize("date", ["2024", "2024-02", "2024-02-29"])
def test_a_date_may_be_a_year_or_a_month(date: str) -> None:
    assert a_profile(launch_s=a_figure(date=date)).launch_s.date == date


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.json"
    profiles.save(a_profile(name="old"), file)

    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("memplan.atomic_write.os.replace", fail)
    with pytest.raises(OSError, match="no room"):
        profiles.save(a_profile(name="new"), file)
    assert profiles.load(file).name == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


# -------------------------------------------------------------------------------------------------------- this machine


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> HardwareProfile:
    folder = tmp_path_factory.mktemp("disk")
    parts: list[str] = []
    profile = measured_by("cpu", folder=folder, progress=parts.append)
    assert parts[0] == "disk"
    assert not list(folder.iterdir())
    return profile


def test_what_is_measured_says_so(measured: HardwareProfile) -> None:
    for name in measured.__struct_fields__:
        figure = getattr(measured, name)
        if isinstance(figure, Figure):
            assert (figure.kind, figure.source) == ("measured", "memplan.hardware.calibrate")
    assert measured.machine == machine.machine_key()
    assert measured.device_bytes.value == psutil.virtual_memory().total


def test_what_is_measured_is_sane(measured: HardwareProfile) -> None:
    # Wide bounds: they catch a wrong unit or a part that was not timed, on any machine under any load.
    assert 1e9 < measured.matmul_flops_per_s["float32"].value < 1e14
    for rate in RATES:
        assert 1e7 < getattr(measured, rate).value < 1e13, rate
    assert 1e-8 < measured.launch_s.value < 1e-3
    assert measured.launch_s.value < measured.operator_s.value < 1e-2  # Python and autograd come on top
    assert measured.disk_depth.value in disk.DEPTHS
    assert 1e-7 < measured.load_latency_s.value < 1e-1


def test_a_measured_profile_survives_its_file(measured: HardwareProfile, tmp_path: Path) -> None:
    profiles.save(measured, tmp_path / "here.json")
    assert profiles.load(tmp_path / "here.json") == measured


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(HardwareError, match="torch sees no CUDA device"):
        measured_by("cuda", folder=tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"nowhere cannot be written"):
        measured_by("cpu", folder=tmp_path / "nowhere")


@pytest.mark.gpu
def test_cuda_rates_are_sane(tmp_path: Path) -> None:
    profile = measured_by("cuda", folder=tmp_path)
    assert profile.device == "cuda"
    assert 1e11 < profile.matmul_flops_per_s["float16"].value < 1e16
    assert 1e10 < profile.memory_bytes_per_s.value < 1e14
    assert 5e8 < profile.host_to_device_bytes_per_s.value < profile.memory_bytes_per_s.value
    assert 0 < profile.context_bytes.value < profile.device_bytes.value
    assert 1e8 < profile.pageable_bytes_per_s.value < profile.memory_bytes_per_s.value
    assert 0.3 < profile.duplex_factor.value <= 1
    refused = profile.page_lock_refused_bytes
    assert profile.page_lock_bytes is None or refused is None or profile.page_lock_bytes.value < refused.value


@pytest.mark.each_value
@pytest.mark.parametrize("limit_mib", [0, 100, 128, 500, 1000, 1024, 3000, 5000, 1 << 20])
@pytest.mark.parametrize("most_mib", [0, 200, 4096, 6000])
def test_page_locks_are_tried_until_one_is_refused(limit_mib: int, most_mib: int) -> None:
    """To the 128 MiB; the top of what was tried is no limit."""
    held = 0

    def lock(size_bytes: int) -> object:
        nonlocal held
        assert size_bytes & (size_bytes - 1) == 0
        if held + size_bytes > limit_mib * MIB:
            raise RuntimeError("out of memory")
        held += size_bytes
        assert held <= most_mib * MIB
        return object()

    locked, refused = tried_page_locks(lock, most_mib * MIB)
    assert locked == held
    if refused is None:
        assert 2 * locked > most_mib * MIB - 128 * MIB
    else:
        assert locked <= limit_mib * MIB < refused
        assert refused - locked == 128 * MIB


def test_a_limit_on_page_locking_is_one_that_was_seen() -> None:
    """Profiles of before say how much was tried, which is no limit."""
    tried, refused = a_figure(4.0 * GIB), a_figure(5.0 * GIB)
    assert profiles.page_lock_limit_bytes(a_profile()) is None
    assert profiles.page_lock_limit_bytes(a_profile(page_lock_bytes=tried)) is None
    assert profiles.page_lock_limit_bytes(a_profile(page_lock_bytes=tried, page_lock_refused_bytes=refused)) == 4 * GIB
    assert profiles.page_lock_limit_bytes(a_profile(page_lock_refused_bytes=refused)) == 0
    on_cpu = a_profile(device="cpu", page_lock_bytes=tried, page_lock_refused_bytes=refused)
    assert profiles.page_lock_limit_bytes(on_cpu) is None


# ---------------------------------------------------------------------------------------------------- auto and budgets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: HardwareProfile) -> Path:
    """An empty cache, and a measurement that takes no time and counts itself by its name."""
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path / "cache"))
    calls: list[None] = []

    def measure(progress: object = None) -> HardwareProfile:
        calls.append(None)
        return msgspec.structs.replace(measured, name=f"measurement {len(calls)}")

    monkeypatch.setattr(current, "measure", measure)
    return tmp_path / "cache"


def test_this_machine_is_measured_once(cache: Path) -> None:
    assert current.current().name == "measurement 1"
    assert current.current().name == "measurement 1"
    assert [path.name for path in (cache / "profiles").iterdir()] == [f"{machine.machine_key()}.json"]


def test_a_broken_cache_is_measured_again(cache: Path) -> None:
    current.current()
    (file,) = (cache / "profiles").iterdir()
    file.write_text("{")
    assert current.current().name == "measurement 2"
    assert profiles.load(file).name == "measurement 2"


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file stands in the way")
    assert current.current().name == "measurement 1"
    assert current.current().name == "measurement 2"


def test_the_cache_folder_is_made_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()
    assert machine.cache_folder() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_budgets_on_this_cpu(measured: HardwareProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 8 * GIB)
    assert machine.auto_vram_bytes(measured) == 4 * GIB
    assert machine.auto_ram_bytes(measured) == 2 * GIB


def test_budgets_on_this_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here = a_profile(
        machine=machine.machine_key(), device_bytes=a_figure(24.0 * GIB), context_bytes=a_figure(300.0 * MIB)
    )
    monkeypatch.setattr(machine, "free_device_bytes", lambda _: 10 * GIB)
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 16 * GIB)
    assert machine.auto_vram_bytes(here) == 10 * GIB + 300 * MIB - machine.DEVICE_RESERVE_BYTES
    assert machine.auto_ram_bytes(here) == 16 * GIB - machine.HOST_RESERVE_BYTES


def test_budgets_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 16 * GIB)
    card = profiles.load("rtx-3090")
    assert machine.auto_vram_bytes(card) == 24 * 10**9 - machine.DEVICE_RESERVE_BYTES
    assert machine.auto_ram_bytes(card) == 16 * GIB - machine.HOST_RESERVE_BYTES
    other = a_profile(device_bytes=a_figure(12.0 * GIB), host_bytes=a_figure(64.0 * GIB))
    assert machine.auto_ram_bytes(other) == 64 * GIB - machine.HOST_RESERVE_BYTES
    cpu = a_profile(device="cpu", device_bytes=a_figure(32.0 * GIB), host_bytes=a_figure(32.0 * GIB))
    assert (machine.auto_vram_bytes(cpu), machine.auto_ram_bytes(cpu)) == (16 * GIB, 8 * GIB)


def test_budgets_are_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_host_bytes", lambda: MIB)
    assert machine.auto_ram_bytes(profiles.load("t4")) == 0
    assert machine.auto_vram_bytes(a_profile(device_bytes=a_figure(1.0 * MIB))) == 0


def test_available_memory_is_not_above_the_machines() -> None:
    assert 0 < machine.available_host_bytes() <= psutil.virtual_memory().total
    assert 0 < machine.free_device_bytes("cpu") <= psutil.virtual_memory().total


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
        "/sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GIB}\nactive_file 5\n",
    }

    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(str(path))
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * GIB, "total": 128 * GIB})()
    )
    assert machine.available_host_bytes() == 4 * GIB - 3 * GIB + 2 * GIB
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.available_host_bytes() == 100 * GIB


# ---------------------------------------------------------------------------------------------------- what is peculiar


def test_a_plan_for_wsl2_says_what_binds_there(monkeypatch, tmp_path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sdc / ext4 rw 0 0\ndrvfs {tmp_path}/my\\040drive 9p rw 0 0\n")
    asked = machine._file_system
    monkeypatch.setattr(machine, "_file_system", lambda path: asked(path, mounts))
    here = a_profile(machine=machine.machine_key())
    assert machine.notes(here, tmp_path) == ()
    monkeypatch.setattr(machine.platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    here = a_profile(machine=machine.machine_key())
    (wall,) = machine.notes(here, tmp_path)
    assert "pinned" in wall
    _, slow = machine.notes(here, tmp_path / "my drive" / "model")
    assert "copy it there" in slow
    assert machine.notes(a_profile(), tmp_path) == ()  # a plan for another machine


def test_a_plan_for_windows_says_that_the_card_spills(monkeypatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "win32")
    (spills,) = machine.notes(a_profile(machine=machine.machine_key()), None)
    assert "over budget" in spills
