#!/usr/bin/env bash
# The one entry for a CUDA machine without network: GPU tests, the demo, and whole against memplan against FSDP2's CPU
# offload on one 8B-shaped model. At most 8 minutes; writes one JSON file and prints its path.
# Unproven until a results file of it stands in benchmarks/results/.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "benchmarks/gpu.sh needs a CUDA device, and torch sees none (or there is no torch)" >&2
    exit 1
}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export MEMPLAN_CACHE=${MEMPLAN_CACHE:-$(mktemp -d)}
work=$(mktemp -d)
timeout 110 "$python" -m pytest -q -m gpu -p no:cacheprovider tests >"$work/tests" 2>&1
echo $? >"$work/tests.rc"
tail -n 25 "$work/tests"
timeout 90 "$python" -m memplan demo --json >"$work/demo" 2>"$work/demo.err"
echo $? >"$work/demo.rc"
tail -n 3 "$work/demo.err"
timeout 270 "$python" benchmarks/versus.py --steps 5 --seconds 60 --tokens 2048 >"$work/versus" 2>&1
echo $? >"$work/versus.rc"
cat "$work/versus"
"$python" - "$work" "$out" <<'PY'
import json, pathlib, sys
from benchmarks.about import keep

work, out = map(pathlib.Path, sys.argv[1:])

def last(name):
    lines = [line for line in (work / name).read_text().splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None

codes = {part: int((work / f"{part}.rc").read_text()) for part in ("tests", "demo", "versus")}
tests = (work / "tests").read_text().strip().splitlines()[-1:]
print(keep({"exit_codes": codes, "tests": tests, "demo": last("demo"), "versus": last("versus")}, "gpu", out))
sys.exit(1 if any(codes.values()) else 0)
PY
