#!/usr/bin/env bash
# Collect what the package needs and a machine with torch, lightning, timm and pytest-xdist lacks, as wheels in .whl:
#     bash benchmarks/gpu_wheels.sh [folder] [requirement ...]
# Without requirements: jsonargparse, in the version that pyproject.toml asks for, and what that needs.
# For Python 3.12 on Linux x86-64, which PYTHON_VERSION changes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-.whl}
shift || true
if (($#)); then
    wanted=("$@")
else
    mapfile -t wanted < <(grep -oE '"jsonargparse[^"]*"' pyproject.toml | tr -d '"')
fi
platforms=()
for glibc in 2_28 2_27 2_17; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64)
python3 -m pip download -q --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" -d "$folder" "${wanted[@]}"
ls "$folder"
