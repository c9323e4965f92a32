"""A skip that nobody allowed fails the run; an allowed one does not; tests for a GPU are left out, not skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("n", [1, 2])
def test_skips(n):
    pytest.skip("no such thing here")

@pytest.mark.xfail(strict=True)
def test_is_known_to_fail():
    assert False

@pytest.mark.gpu
def test_needs_a_gpu():
    raise RuntimeError("this must not run without one")
"""


def run(folder: Path, suite: str, skips: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (folder / "skips.txt").write_text(skips)
    (folder / "test_it.py").write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""},
    )


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.full), "2"])
def test_a_skip_that_is_not_listed_fails_the_run(workers: str, tmp_path: Path) -> None:
    done = run(tmp_path, SUITE, "# none\n", "-n", workers)
    assert done.returncode == 1, done.stdout
    assert "test_it.py::test_skips[2]: Skipped: no such thing here" in done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "failed" not in done.stdout.splitlines()[-1].replace("xfailed", "")


@pytest.mark.full
def test_a_listed_skip_does_not(tmp_path: Path) -> None:
    done = run(tmp_path, SUITE, "test_it.py::test_skips | needs a thing that is nowhere\n", "-n", "2")
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_whole_file_that_is_skipped_fails_the_run(workers: str, tmp_path: Path) -> None:
    suite = "import pytest\npytest.importorskip('a_package_that_is_nowhere')\n"
    done = run(tmp_path, suite, "", "-n", workers)
    assert done.returncode == 1, done.stdout
    assert "test_it.py: Skipped: could not import 'a_package_that_is_nowhere'" in done.stdout


def test_a_line_without_a_reason_stops_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, SUITE, "test_it.py::test_skips\n")
    assert done.returncode not in (0, 1)
    assert "skips.txt, line 1: give a pattern, a bar and a reason" in done.stderr


def test_gpu_tests_are_left_out_and_not_skipped(tmp_path: Path) -> None:
    done = run(tmp_path, SUITE, "test_it.py::test_skips | needs a thing that is nowhere\n")
    assert "1 deselected" in done.stdout
