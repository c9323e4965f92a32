#!/usr/bin/env bash
# The one entry for a CUDA machine without network. Each part takes at most nine minutes and writes a JSON file of its own;
# one whose file lies there already is not run again.
#
#   bash benchmarks/gpu.sh [PART ...]
#
# tests        pytest -m gpu
# calibrate    this card's measured profile (a copy for profiles/ lies beside the result)
# demo         the demo, whole and under a plan
# truth-LLAMA  predicted memory and times beside measured ones, small models of an architecture: llama, qwen3, gemma2,
#              gpt2, t5 or mixtral
# any other    a part of benchmarks.versus (its --list): memplan side by side with the peers. What had no turn in a call has
#              one in the next, beside the whole model again
#
# Without any: tests, calibrate, demo and a short llama-3.1-8b-bf16-2048, nine minutes in all. OUT: where results lie (default:
# benchmarks/results). CHECKPOINTS: where random weights are kept between parts (default: they go). COMMIT: of a copy
# without its history. Unproven until a results file of it stands in benchmarks/results/.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "benchmarks/gpu.sh needs a CUDA device, and torch sees none (or there is no torch)" >&2
    exit 1
}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export MEMPLAN_CACHE=${MEMPLAN_CACHE:-$work/cache}
bad=0

# part NAME SECONDS COMMAND...: run it, keep its exit code and the JSON that it printed: all of it, or the last such line.
# With that it is done, whatever it says; without it only if nothing failed.
part() {
    local name=$1 seconds=$2
    shift 2
    if compgen -G "$out/*-gpu-$name.json" >/dev/null; then
        echo "$name: done before"
        return
    fi
    timeout -k 15 "$seconds" "$@" >"$work/$name" 2>"$work/$name.err"
    local code=$?
    tail -n 25 "$work/$name.err" "$work/$name" | cut -c1-400
    "$python" - "$work/$name" "$out" "$name" $code <<'PY' || code=1
import json, pathlib, sys
from benchmarks.about import keep

path, out, name, code = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
text, found = path.read_text(errors="replace").strip(), None
lines = text.splitlines()
for part in (*lines, text):
    try:
        found = json.loads(part) if part.startswith("{") else found
    except ValueError:
        pass
result = {"part": name, "exit_code": code, "result": found, "last_lines": lines[-40:] if found is None else []}
print(keep(result, f"gpu-{name}" if code == 0 or found is not None else f"gpu-{name}-failed", out))
PY
    [ $code -eq 0 ] || bad=1
}

# versus NAME SECONDS [LIMIT]: it keeps its own file, and knows by it what is done.
versus() {
    local folder=()
    [ -n "${CHECKPOINTS:-}" ] && folder=(--folder "$CHECKPOINTS")
    timeout -k 15 "$2" "$python" -m benchmarks.versus --part "$1" --out "$out" --profile --seconds "$3" "${folder[@]}" || bad=1
}

short=0
[ $# -gt 0 ] || { short=1; set -- tests calibrate demo llama-3.1-8b-bf16-2048; }
for name in "$@"; do
    case $name in
        tests)
            part tests $((short ? 100 : 520)) "$python" -m pytest -q -rf -m gpu -p no:cacheprovider \
                tests/run/test_gpu.py tests/run/test_recompute.py tests/test_hardware.py
            ;;
        calibrate)
            part calibrate 110 "$python" -m memplan calibrate --json --out "$work/profile.json"
            [ ! -f "$work/profile.json" ] || cp "$work/profile.json" "$out/profile.json"
            ;;
        demo) part demo 85 "$python" -m memplan demo --json ;;
        truth-*) part "$name" 520 "$python" -m benchmarks.truth --times --only "${name#truth-}" ;;
        *) versus "$name" $((short ? 210 : 520)) $((short ? 150 : 390)) ;;
    esac
done
exit $bad
