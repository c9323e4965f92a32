#!/usr/bin/env bash
# Gather into .gpu-wheels/ (which git ignores) what benchmarks/gpu.sh needs beyond a machine's own torch, transformers,
# PEFT, accelerate and pytest: a few small wheels, a megabyte or so each. gpu.sh installs them from there without network.
#
#   bash benchmarks/gpu_wheels.sh
#
# PYTHON_VERSION: of the machine with the card (3.12). CUDA: of its torch, as bitsandbytes names its library (130): the
# others are left out of its wheel. Of two versions of one package pip would refuse both: the folder begins empty.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
cuda=${CUDA:-130}
folder=.gpu-wheels
needed="msgspec platformdirs"
wanted="bitsandbytes diffusers importlib-metadata zipp trainstream block-streamer ramtorch"
rm -rf "$folder"
mkdir -p "$folder"
bad=0
for package in $needed $wanted; do
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d "$folder" "$package" 2>"$folder/error" && continue
    grep '^ERROR' "$folder/error" | tail -n 1
    case " $needed " in
        *" $package "*) echo "$package could not be fetched, and memplan needs it" >&2; bad=1 ;;
        *) echo "$package could not be fetched: what needs it will be skipped" >&2 ;;
    esac
done
rm -f "$folder/error"
"$python" - "$folder" "$cuda" <<'PY'
import pathlib, sys, zipfile

folder, cuda = pathlib.Path(sys.argv[1]), sys.argv[2]
for wheel in folder.glob("bitsandbytes-*.whl"):
    kept = (f"libbitsandbytes_cuda{cuda}.so", "libbitsandbytes_cpu.so")
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as target:
        names = [item for item in source.namelist() if not item.endswith(".so") or item.endswith(kept)]
        if not any(name.endswith(kept[0]) for name in names):
            sys.exit(f"bitsandbytes has no library for CUDA {cuda}; its wheel stays as it is")
        for name in names:
            data = source.read(name)
            if name.endswith("/RECORD"):  # what is not there is not listed
                lines = data.decode().splitlines()
                data = "".join(f"{line}\n" for line in lines if line.split(",")[0] in names).encode()
            target.writestr(name, data)
    slim.replace(wheel)
PY
du -ah "$folder"
exit $bad
