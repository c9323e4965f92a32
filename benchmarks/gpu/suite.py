"""The tests marked ``gpu``, ended in time to say what failed until then.

python -m benchmarks.gpu.suite --seconds N [PYTEST ARGUMENTS ...]
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time

from benchmarks.gpu.visit import AGAIN, DRY

FILES = ("tests/run/test_gpu.py", "tests/run/test_recompute.py", "tests/test_hardware.py")
WORKERS = 4
ENDING_S = 15
"""What pytest may take to say what failed, once it is interrupted."""


def command(more: list[str]) -> list[str]:
    """Return pytest's command line; dry, of some tests that need no card."""
    chosen = (
        ["-m", "not gpu and not full", "tests/run/test_recompute.py"]
        if DRY
        # A card serves several processes; a warning that only another version gives is printed, and fails nothing.
        else ["-m", "gpu", "-n", str(WORKERS), "--dist", "worksteal", *FILES]
    )
    return [
        sys.executable, "-m", "pytest", "-q", "-rfE", "-W", "default", "-p", "no:cacheprovider", "--tb=short", *chosen,
        *more,
    ]  # fmt: skip


def counts(text: str) -> dict[str, int]:
    """Return how many tests passed, failed and so on, by pytest's last line that says so."""
    found = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)\b", "\n".join(text.splitlines()[-5:]))
    return {kind.removesuffix("s") if kind.startswith("error") else kind: int(number) for number, kind in found}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, required=True)
    given, more = options.parse_known_args()
    began = time.monotonic()
    pytest = subprocess.Popen(command(more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finished = True
    try:
        text, _ = pytest.communicate(timeout=max(1.0, given.seconds - ENDING_S))
    except subprocess.TimeoutExpired:
        finished = False
        pytest.send_signal(signal.SIGINT)
        try:
            text, _ = pytest.communicate(timeout=ENDING_S - 2)
        except subprocess.TimeoutExpired:
            pytest.kill()
            text, _ = pytest.communicate()
    print(text)
    failed = [line for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    result = {"dry": DRY, "finished": finished, "seconds": time.monotonic() - began, **counts(text), "failures": failed}
    print(json.dumps(result))
    if not finished:
        return AGAIN
    # Nothing collected, a usage error: no result, so it is run again.
    return pytest.returncode if pytest.returncode in (0, 1) else 2


if __name__ == "__main__":
    sys.exit(main())
