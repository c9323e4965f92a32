"""The one writer: what is pointed at is never lost, whatever it is."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memplan import atomic_write as files
from memplan.atomic_write import require_writable, write, write_whole
from memplan.cli import main
from memplan.errors import InputError, PlanFormatError
from memplan.hardware import profile as profiles
from memplan.program.schema import Plan
from memplan.show.csv import write_csv
from memplan.show.html import render
from memplan.show.trace import write_trace
from tests.show.plans import make_record, solve_plan
from tests.test_hardware import a_profile

ROOT = Path(__file__).parents[1]
WRITERS: dict[str, Callable[[Path], object]] = {
    "plan": lambda path: solve_plan().save(path),
    "record": lambda path: make_record(solve_plan(), pass_s=1.0).save(path),
    "page": lambda path: render.write(path, solve_plan()),
    "table": lambda path: write_csv(solve_plan(), path),
    "trace": lambda path: write_trace(path, solve_plan()),
    "profile": lambda path: profiles.save(a_profile(), path),
}
each_writer = pytest.mark.parametrize("save", WRITERS.values(), ids=WRITERS)


def written(save: Callable[[Path], object], folder: Path) -> bytes:
    """What a writer writes to a file of its own."""
    path = folder / "reference"
    save(path)
    data = path.read_bytes()
    path.unlink()
    return data


@each_writer
def test_a_link_stays_a_link(save: Callable[[Path], object], tmp_path: Path) -> None:
    expected = written(save, tmp_path)
    (tmp_path / "there").mkdir()
    target, link, second = tmp_path / "there" / "target", tmp_path / "link", tmp_path / "second"
    link.symlink_to(target)  # leads nowhere yet
    second.symlink_to("link")
    save(second)
    assert (link.readlink(), second.readlink()) == (target, Path("link"))
    assert target.read_bytes() == expected
    target.write_bytes(b"old")
    target.chmod(0o640)
    save(second)
    assert link.is_symlink()
    assert target.read_bytes() == expected
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "second", "target", "there"]


@each_writer
def test_a_pipe_and_a_device_are_written_to(save: Callable[[Path], object], tmp_path: Path) -> None:
    expected = written(save, tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    save(fifo)
    reader.join()
    assert read == [expected]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    save(Path(os.devnull))
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@each_writer
def test_what_is_no_file_is_refused(save: Callable[[Path], object], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "folder").mkdir()
        (tmp_path / "round").symlink_to("round")
        for name, reason in (("socket", "a socket"), ("folder", "a directory"), ("round", "symbolic links")):
            with pytest.raises((InputError, PlanFormatError, OSError), match=reason):
                save(tmp_path / name)
    assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "round", "socket"]


def test_an_own_device_node_is_no_file(tmp_path: Path) -> None:
    node = tmp_path / "node"
    try:
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        node.write_bytes(b"x")  # where devices are not let through
    except PermissionError:
        pytest.skip("making a device node needs root")
    write_whole(node, b"data")
    assert stat.S_ISCHR(node.stat().st_mode)
    os.unlink(node)
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(7, 250))
    with pytest.raises(OSError, match="a block device"):
        write_whole(node, b"data")
    assert stat.S_ISBLK(node.stat().st_mode)


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args: object) -> None:
        raise full

    if fails == "write":
        resource = pytest.importorskip("resource")
        signal = pytest.importorskip("signal")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # the system's own refusal
        try:
            with pytest.raises(InputError, match=r"plan\.json cannot be written: File too large; give another path"):
                write(path, b"x" * 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
    else:
        monkeypatch.setattr(files.os, fails, fail)
        with pytest.raises(InputError, match=r"plan\.json cannot be written: No space left on device"):
            write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_device_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    solve_plan().save(tmp_path / "plan.json")
    with pytest.raises(PlanFormatError, match="/dev/full cannot be written: No space left on device"):
        solve_plan().save("/dev/full")
    assert main(["report", str(tmp_path / "plan.json"), "--html", "/dev/full"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_access_is_kept_and_a_new_file_has_the_umasks(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)  # as long as a name may be, nearly
    before = os.umask(0o027)
    try:
        write_whole(path, b"one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o4751)
    with contextlib.suppress(OSError):
        os.setxattr(path, "user.note", b"mine")
    with contextlib.suppress(OSError):
        os.chown(path, 12345, 12345)
    about = path.stat()
    write_whole(path, b"two")
    now = path.stat()
    assert (now.st_mode, now.st_uid, now.st_gid) == (about.st_mode, about.st_uid, about.st_gid)
    with contextlib.suppress(OSError):
        assert os.listxattr(path) == [] or os.getxattr(path, "user.note") == b"mine"
    assert path.read_bytes() == b"two"


@pytest.fixture
def no_root() -> Iterator[Path]:
    """Give a folder to a user who is not root, whom nothing is refused, and be that user."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_what_may_not_be_written_is_refused(no_root: Path) -> None:
    path = no_root / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(InputError, match="the file is read-only"):
        write(path, b"new")
    path.chmod(0o644)
    no_root.chmod(0o555)
    for name in ("file", "new"):
        with pytest.raises(InputError, match="files cannot be created in"):
            write(no_root / name, b"new")
    no_root.chmod(0o755)
    assert path.read_bytes() == b"old"
    assert [one.name for one in no_root.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["no/such/plan.json", "file/plan.json", "link", "with\0zero", ""])
def test_paths_that_lead_nowhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("away/plan.json")
    for act in (require_writable, lambda path: write_whole(path, b"x")):
        with pytest.raises((OSError, ValueError)):
            act(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def python(code: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.each_value
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "-"])
@pytest.mark.parametrize("mode", ["w", "a"])
def test_a_file_that_standard_output_goes_to_is_not_replaced_under_it(path: str, mode: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"before\n")
    inode = out.stat().st_ino
    code = (
        "from pathlib import Path; from memplan.atomic_write import write_whole; print('one')\n"
        f"write_whole(Path({path!r}), b'two\\n'); print('three')"
    )
    with out.open(mode) as file:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=file).returncode == 0
    assert out.read_bytes() == (b"before\n" if mode == "a" else b"") + b"one\ntwo\nthree\n"
    assert out.stat().st_ino == inode


def test_an_open_descriptor_is_written_to() -> None:
    read_end, write_end = os.pipe()
    write_whole(Path(f"/dev/fd/{write_end}"), b"through")
    os.write(write_end, b" and open")  # it is the caller's still
    os.close(write_end)
    assert os.read(read_end, 100) == b"through and open"
    os.close(read_end)
    done = python(
        "from pathlib import Path; from memplan.atomic_write import write_whole; write_whole(Path('-'), b'\\xff\\0')"
    )
    assert done.stdout == b"\xff\0"


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    solve_plan().save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_minus_is_standard_output_and_nothing_else_goes_there(
    plans: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for option, save in (("--html", WRITERS["page"]), ("--trace", WRITERS["trace"])):
        for name in ("-", "/dev/stdout"):
            assert main(["report", "plan.json", option, name]) == 0
            assert capfdbinary.readouterr().out == written(save, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert main(["report", "plan.json", "--trace", "./-"]) == 0
    assert (tmp_path / "-").is_file()


def test_plan_to_standard_output(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    solved = solve_plan()
    monkeypatch.setattr("memplan.api.plan", lambda *args, **options: solved)
    monkeypatch.chdir(tmp_path)
    for option, save in (("--out", WRITERS["plan"]), ("--csv", WRITERS["table"])):
        assert main(["plan", "gpt2", option, "-"]) == 0
        out, err = capfdbinary.readouterr()
        assert out == written(save, tmp_path)
        assert b"Fits" in err  # the first screen
    assert main(["plan", "gpt2", "--out", "-", "--json"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_standard_input(plans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(plans)]) == 0
    expected = capsys.readouterr().out
    with plans.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["report", "-"]) == 0
    assert capsys.readouterr().out == expected
    assert main(["report", "-", "-"]) == 2
    assert "standard input can be read once" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "plan.json", "--html", "link.json"], "PLAN is read from this file"),
        (["report", "plan.json", "--trace", "./plan.json"], "PLAN is read from this file"),
        (["report", "plan.json", "plan.json", "--html", "plan.json"], "is read from this file"),
        (["report", "plan.json", "--html", "x", "--trace", "./x"], "--trace names the same file"),
        (["plan", "gpt2", "--out", "x", "--csv", "x"], "--csv names the same file"),
        (["plan", "gpt2", "--out", "-", "--csv", "-"], "--csv names the same file"),
        (["plan", "gpt2", "--hardware", "plan.json", "--csv", "plan.json"], "--hardware is read from this file"),
        (["plan", ".", "--out", "config.json"], "MODEL is read from this file"),
        (["plan", "config.json", "--out", "./config.json"], "MODEL is read from this file"),
        (["run", "--report", "plan.json", "--", "cat", "plan.json"], "plan.json is read from this file"),
        (["plan", "gpt2", "--out", "."], "it is a directory"),
        (["plan", "gpt2", "--out", "no/plan.json"], "the folder"),
        (["calibrate", "--out", "no/rates.json"], "the folder"),
        (["run", "--report", "no/report.txt", "--", "true"], "the folder"),
        (["run", "--plan", "plan.json", "--report", "plan.json", "--", "true"], "--plan is read from this file"),
    ],
)
def test_what_would_be_lost_is_refused_before_the_work(
    plans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    def never(*args: object, **options: object) -> Plan:
        raise AssertionError("it was planned")

    monkeypatch.setattr("memplan.api.plan", never)
    monkeypatch.chdir(plans.parent)
    (plans.parent / "link.json").symlink_to("plan.json")
    (plans.parent / "config.json").write_text("{}")
    before = plans.read_bytes()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in " ".join(err.split())
    assert plans.read_bytes() == before
    assert sorted(path.name for path in plans.parent.iterdir()) == ["config.json", "link.json", "plan.json"]
