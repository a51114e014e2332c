#!/usr/bin/env bash
# What ten minutes of a GPU can tell, in one call of at most 590 seconds:
#     OUT=results bash benchmarks/gpu.sh
#     OUT=results bash benchmarks/gpu.sh --dry     the same code without a GPU, on little and without bounds
# Needs torch, triton, lightning, timm and pytest-xdist; what else the package needs comes as wheels in .whl, which
# benchmarks/gpu_wheels.sh collects where there is a network. Nothing is downloaded here.
# Each part is ended by `timeout` and writes every row at once, so what was measured is there whatever happens:
# $OUT/rows.jsonl, $OUT/report.md, $OUT/log.txt, $OUT/sanitizer.txt.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry=()
[[ ${1:-} == --dry ]] && dry=(--dry)
total=590 # seconds
export OUT=${OUT:-gpu_out} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/{rows.jsonl,report.md,log.txt,sanitizer.txt}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" .whl/*.whl || exit
    export PYTHONPATH=$PYTHONPATH:$scratch/site
fi

report() {
    "$python" -m benchmarks.gpu.report "$@" >>"$OUT/log.txt" 2>&1
}

part() { # part <name> <seconds> <command...>: the command gets the time at which to end by itself, a little earlier
    local name=$1 seconds=$2 start=$SECONDS status=0
    shift 2
    ((seconds > total - 15 - SECONDS)) && seconds=$((total - 15 - SECONDS)) # 15: for the bars
    ((${#dry[@]})) && seconds=36000
    if ((seconds < 10)); then
        return
    fi
    timeout -k 3 "$seconds" "$@" --until $(($(date +%s) + seconds - 8)) "${dry[@]}" >>"$OUT/log.txt" 2>&1 || status=$?
    report --ended "$name" --status "$status" --seconds $((SECONDS - start))
    printf '%s: status %d, %d s\n' "$name" "$status" $((SECONDS - start))
}

report --begin "$([[ ${#dry[@]} == 0 ]] && echo gpu || echo dry)"
sanitized=()
if command -v compute-sanitizer >/dev/null && ((${#dry[@]} == 0)); then
    # Memory straight from the driver: in PyTorch's own blocks a stray access would hit a neighbour unseen.
    sanitized=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 99 --log-file "$OUT/sanitizer.txt")
fi
((${#dry[@]})) && export TRITON_INTERPRET=1
for slice in 0 1 2 3; do # four of sixteen cores: values has twelve
    end=$((${#dry[@]} ? 36000 : 145))
    timeout -k 3 "$end" "$python" -m benchmarks.gpu.odd_shapes --slice "$slice/4" --until $(($(date +%s) + end - 5)) "${dry[@]}" >>"$OUT/log.txt" 2>&1 &
done
part values 150 "$python" -m benchmarks.gpu.values
wait
part odd_shapes 45 "${sanitized[@]}" "$python" -m benchmarks.gpu.odd_shapes
unset TRITON_INTERPRET
report --sanitizer "$OUT/sanitizer.txt"
part ratios 170 "$python" -m benchmarks.gpu.ratios
part host 120 "$python" -m benchmarks.gpu.host
part switches "$total" "$python" -m benchmarks.gpu.switches
"$python" -m benchmarks.gpu.report --final 2>>"$OUT/log.txt"
