#!/usr/bin/env bash
# One visit of twelve minutes to a machine with a CUDA card and no network: seven parts, each with a limit of its own,
# each kept as it ends, and a page of all for people.
#
#   bash benchmarks/gpu.sh [PART ...]
#   GPU_DRY=cpu bash benchmarks/gpu.sh
#
# tests        pytest -m gpu
# cards-bf16   an 8B in bfloat16, 2,048 and 512 tokens, on emulated cards of 8, 12 and 4 GiB, beside checkpointing only
# cards-nf4    the same in nf4, where bitsandbytes is
# peers        who else streams, on the first of these cases
# calibrate    the card's measured profile
# truth        predicted memory and times beside measured ones, small models
# timeline     one micro-batch by torch's profiler: copies beside compute, gaps
# any other    a part of benchmarks.versus (its --list)
#
# A call ends what an earlier one began: a part that this commit has ended is not run again, rows that had no turn have
# one. What is between calls lies in GPU_STATE (.gpu/: results, checkpoints, installed wheels). Of a commit with
# uncommitted changes, delete it after each change.
# OUT: where results go (benchmarks/results). GPU_SECONDS: after which nothing begins (700). CHECKPOINTS: where random
# weights are until all parts have ended (/dev/shm where it has room). COMMIT: of a copy without its history. PYTHON.
# Wheels are installed from .gpu-wheels/ (benchmarks/gpu_wheels.sh gathers them). GPU_DRY=cpu: every part on a CPU with
# tiny shapes, so that a visit does not fail on a typo; its figures mean nothing and stay in .gpu-dry/.
# Unproven until results of it are in benchmarks/results/.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dry=${GPU_DRY:-}
began=$SECONDS
if [ "$dry" = cpu ]; then
    state=${GPU_STATE:-.gpu-dry} scale=${GPU_SCALE:-2} out=${OUT:-${GPU_STATE:-.gpu-dry}/results}
    export CUDA_VISIBLE_DEVICES=
else
    state=${GPU_STATE:-.gpu} scale=${GPU_SCALE:-1} out=${OUT:-benchmarks/results}
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "benchmarks/gpu.sh needs a CUDA device, and torch sees none (or there is no torch); GPU_DRY=cpu tries it without" >&2
        exit 1
    }
fi
seconds=${GPU_SECONDS:-$((700 * scale))}
mkdir -p "$out" "$state"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${CHECKPOINTS:-}" ]; then
    CHECKPOINTS=$state/checkpoints
    free=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }')
    [ "$dry" = cpu ] || [ "${free:-0}" -lt $((28 << 20)) ] || CHECKPOINTS=/dev/shm/memplan-gpu
fi
export CHECKPOINTS GPU_STATE=$state PYTHONPATH="$PWD/$state/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export MEMPLAN_CACHE=${MEMPLAN_CACHE:-$PWD/$state/cache}
bad=0

# The wheels, all at once; one that does not fit this Python then only lacks itself.
if compgen -G ".gpu-wheels/*.whl" >/dev/null && [ ! -d "$state/site" ]; then
    install=("$python" -m pip install -q --no-index --find-links .gpu-wheels --no-deps --no-compile --target "$state/site" --upgrade)
    "${install[@]}" .gpu-wheels/*.whl >"$work/pip" 2>&1 || for wheel in .gpu-wheels/*.whl; do
        "${install[@]}" "$wheel" >"$work/pip" 2>&1 || echo "not installed: ${wheel##*/}: $(grep -m 1 ERROR "$work/pip")"
    done
    mkdir -p "$state/site"
fi
"$python" -c 'import memplan.api, memplan.run.attach, peft, accelerate, transformers' || {
    echo "memplan cannot be imported here; benchmarks/gpu_wheels.sh gathers what a bare machine lacks" >&2
    exit 1
}

# part NAME SECONDS COMMAND...: run it within what is left, and keep its exit code and the last JSON that it printed.
part() {
    local name=$1 limit=$(($2 * scale)) left=$((seconds - SECONDS + began)) from=$SECONDS code
    shift 2
    if "$python" -m benchmarks.gpu.keep done "$name"; then
        echo "== $name: done before"
        return
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 20 ]; then
        echo "== $name: no time is left; another call goes on here"
        bad=1
        return
    fi
    echo "== $name: at most $limit s"
    # It is told when to end by itself; the limit is for what hangs.
    timeout -k 10 "$limit" "${@//LIMIT/$((limit > 50 ? limit - 12 : limit * 3 / 4))}" >"$work/$name" 2>"$work/$name.err"
    code=$?
    grep -vE 'Loading weights|^\{' "$work/$name.err" | tail -n 12 | cut -c1-300
    "$python" -m benchmarks.gpu.keep keep "$name" $code $((SECONDS - from)) "$work/$name" "$out" || code=1
    cp "$work/$name" "$work/$name.err" "$state/" 2>/dev/null
    echo "== $name: exit code $code after $((SECONDS - from)) s"
    [ $code -eq 0 ] || bad=1
}

[ $# -gt 0 ] || set -- tests cards-bf16 cards-nf4 peers calibrate truth timeline
for name in "$@"; do
    case $name in
        tests) part tests 100 "$python" -m benchmarks.gpu.suite --seconds LIMIT ;;
        cards-bf16 | cards-nf4) part "$name" $([ "$name" = cards-bf16 ] && echo 160 || echo 110) "$python" -m benchmarks.gpu.cards --model "${name#cards-}" --seconds LIMIT ;;
        peers) part peers 160 "$python" -m benchmarks.gpu.peers --seconds LIMIT ;;
        calibrate) part calibrate 35 "$python" -m memplan calibrate --json ;;
        truth) part truth 80 "$python" -m benchmarks.truth --few --times --seconds LIMIT ;;
        timeline) part timeline 55 "$python" -m benchmarks.gpu.timeline ;;
        *)
            timeout -k 15 $((520 * scale)) "$python" -m benchmarks.versus --part "$name" --out "$out" --profile \
                --seconds $((390 * scale)) --folder "$CHECKPOINTS" || bad=1
            ;;
    esac
done
"$python" -m benchmarks.gpu.keep collect "$out"
"$python" -m benchmarks.gpu.table "$out"
for name in tests cards-bf16 cards-nf4 peers calibrate truth timeline; do
    "$python" -m benchmarks.gpu.keep done "$name" || { echo "$name has not ended: $CHECKPOINTS stays for the next call"; exit $bad; }
done
rm -rf "$CHECKPOINTS"
exit $bad
