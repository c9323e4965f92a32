"""Builds the simulated device: one call of g++ against the headers of the installed torch, about 20 s, once."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

_SOURCES = Path(__file__).with_name("sim")
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")


def library() -> Path:
    """Return the built library, kept by torch's version and the sources. Raises RuntimeError where that fails."""
    return build(Path(__file__).parents[2] / ".cache" / "simulated-device")


def build(folder: Path, compiler: str = "g++") -> Path:
    """As :func:`library`, kept in ``folder``."""
    found = hashlib.blake2b(f"{torch.__version__} {_FLAGS}".encode(), digest_size=12)
    for source in sorted(_SOURCES.iterdir()):
        found.update(source.read_bytes())
    built = folder / f"sim-{torch.__version__}-{found.hexdigest()}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one test run start together
        if not built.exists():
            _compile(built, compiler)
    return built


def _compile(built: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"the simulated device needs a C++ compiler, and there is no {compiler} here: install it (Debian, Ubuntu: "
            "apt-get install g++)"
        )
    whole = built.with_suffix(".part")
    includes = [f"-I{path}" for path in include_paths()]
    libraries = Path(torch.__file__).with_name("lib")
    command = [compiler, *_FLAGS, *includes, str(_SOURCES / "device.cpp"), "-o", str(whole), f"-L{libraries}"]
    done = subprocess.run([*command, "-lc10", "-ltorch_cpu", "-ltorch"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError(f"the simulated device did not compile with torch {torch.__version__}: {errors[:8]}")
    whole.rename(built)
