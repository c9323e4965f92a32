"""How a command ends: 1 means that something does not fit, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.show.plans import solve_plan

ROOT = Path(__file__).parents[1]
MEMPLAN = [sys.executable, "-m", "memplan"]
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("endings") / "plan.json"
    solve_plan().save(path)
    return str(path)


def ends(*arguments: str, code: str = "", broken: str = "", **variables: str) -> tuple[int, str, str]:
    """Return the exit code, what is on standard output and on standard error. ``code``: run before the command does.

    ``broken``: ``"full"`` or ``"closed"``, what standard output is.
    """
    command = [
        sys.executable,
        "-c",
        f"import sys\nsys.argv[0] = 'memplan'\n{code}\nfrom memplan.cli import main\nsys.exit(main())",
    ]
    read_end, write_end = os.pipe()
    os.close(read_end)
    out = {"": subprocess.PIPE, "closed": write_end}.get(broken)
    try:
        with FULL.open("wb") as full:
            done = subprocess.run(
                [*command, *arguments],
                cwd=ROOT,
                stdout=full if out is None else out,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **variables},
            )
    finally:
        os.close(write_end)
    return done.returncode, done.stdout or "", done.stderr


WAYS = {"help": ["--help"], "text": ["report"], "json": ["report", "--json"], "page": ["report", "--html", "-"]}


@pytest.mark.each_value
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_that_cannot_be_written(way: str, buffered: str, plan: str) -> None:
    arguments = [*WAYS[way], *([] if way == "help" else [plan])]
    assert ends(*arguments, broken="closed", PYTHONUNBUFFERED=buffered) == (141, "", "")
    code, _, err = ends(*arguments, broken="full", PYTHONUNBUFFERED=buffered)
    assert (code, err) == (74, "memplan: the output cannot be written: No space left on device\n")


def test_an_error_that_nobody_reads() -> None:
    """Both streams closed or full, and an error to print: still not 1."""
    for stream, expected in (("/dev/full", 74), (None, 141)):
        if stream is None:
            read_end, out = os.pipe()
            os.close(read_end)
        else:
            out = os.open(stream, os.O_WRONLY)
        done = subprocess.run([*MEMPLAN, "report", "nowhere.json"], cwd=ROOT, stdout=out, stderr=out)
        os.close(out)
        assert done.returncode == expected


def test_what_the_encoding_lacks_is_written_out(tmp_path: Path, plan: str) -> None:
    path = tmp_path / "日本\udcff.html"
    code, out, err = ends("report", plan, "--html", str(path), PYTHONIOENCODING="iso8859-1")
    assert (code, err) == (0, "")
    assert out == f"The report is in {tmp_path}/\\u65e5\\u672c\\udcff.html.\n"
    assert path.is_file()


RAISE = "import memplan.api\ndef fail(*a, **k): raise {}\nmemplan.api.plan = fail"


def test_an_internal_error() -> None:
    code, out, err = ends("plan", "gpt2", code=RAISE.format("KeyError('x')"))
    assert code == 70
    assert out == ""
    assert "Traceback" in err
    assert err.endswith("memplan: internal error: 'x'. Please report it with the lines that stand above it\n")
    code, out, err = ends("plan", "gpt2", "--json", code=RAISE.format("OSError(28, 'full', 'file')"))
    assert code == 70
    assert json.loads(out)["error"] == "OSError"


@pytest.mark.quick("KeyboardInterrupt()-130", "SystemExit(1)-70", "MemoryError()-70")
@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("KeyboardInterrupt()", 130),
        ("SystemExit(1)", 70),
        ("MemoryError()", 70),
        ("RecursionError()", 70),
        ("EOFError()", 70),
    ],
)
def test_no_other_way_ends_with_1(raised: str, code: int) -> None:
    assert ends("plan", "gpt2", code=RAISE.format(raised))[0] == code


def test_interrupted_while_it_imports() -> None:
    process = subprocess.Popen([*MEMPLAN, "plan", "gpt2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.wait(0.7)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize("code", [0, 1, 2, 7, 141])
def test_run_passes_on_the_scripts_own_code(code: int, tmp_path: Path) -> None:
    done = subprocess.run([*MEMPLAN, "run", "--", "sh", "-c", f"exit {code}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")


def test_run_leaves_signals_as_they_were() -> None:
    """A script that writes to a closed pipe is ended by it, as without memplan."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    script = "trap 'echo late >&2' EXIT; echo x; echo x"
    done = subprocess.run(
        [*MEMPLAN, "run", "--", "sh", "-c", script], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert done.returncode == -signal.SIGPIPE


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train.py"], "'train.py' is a file, not a program: give python train.py."),
        (["./train.py"], "'./train.py' is not executable: give python ./train.py."),
        (["./no-shebang"], "cannot be started: Exec format error."),
        (["no-such-program"], "there is no program 'no-such-program'."),
    ],
)
def test_run_cannot_start_it(command: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "no-shebang").write_bytes(b"\0\1\2")
    (tmp_path / "no-shebang").chmod(0o755)
    done = subprocess.run(
        [*MEMPLAN, "run", "--", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [("-I", "-I"), ("-uE", "-E"), ("-W ignore -S", "-S"), ("", None), ("-X dev -Bs", None), ("-m this -I", None)],
)
def test_run_says_where_python_keeps_it_out(flags: str, told: str | None) -> None:
    command = [Path(sys.executable).name, *flags.split(), *([] if "-m" in flags else ["-c", "pass"])]
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*MEMPLAN, "run", "--", *command], cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0
    assert ("inactive" in done.stderr) == (told is not None)
    assert told is None or f"{told} imports nothing at its start: leave {told} out" in done.stderr
