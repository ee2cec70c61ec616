#!/usr/bin/env bash
# Hours of a GPU, the second part of docs/gpu_campaign.md: OUT=DIR bench/gpu.sh STEP..., each step within ten minutes.
# Results: OUT/STEP.json, default bench/results/gpu. A step whose result is there is passed over; AGAIN=1 measures it anew.
# DRY=1 tries steps on the CPU with tiny sizes. PYTHON: default python.
set -euo pipefail
cd "$(dirname "$0")/.."
steps="check tune-configs tune-choices ceilings forward-qkv forward-o forward-gate_up forward-down backward mixed \
prefix-fwd prefix-train prefix-decode quant-dequant quant-linear train-lora train-prefix train-quant \
decode-mixed decode-prefix decode-quant"
[ $# -gt 0 ] || { echo "which steps? $steps, or all, in this order" >&2; exit 2; }
[ "$*" = all ] && set -- $steps
for step in "$@"; do
    case " $steps " in *" $step "*) ;; *) echo "there is no step $step; steps: $steps" >&2; exit 2 ;; esac
done
out=${OUT:-bench/results/gpu}
python=${PYTHON:-python}
tables=${TABLES:-csrc_triton/tables}
mkdir -p "$out"
status=0
for step in "$@"; do
    echo "== $step"
    case $step in
        check) # the kernels' own tests on the device, before anything is timed; without one all of it is skipped
            timeout 590 "$python" -m pytest tests/interpreter tests/routing/test_mixed_gpu.py -n 8 -q 2>&1 | tee "$out/check.log" || status=1 ;;
        tune-*) # goes on where it stopped: repeat it until it says that nothing is left
            dry=(); [ -z "${DRY:-}" ] || { dry=(--dry); tables="$out/tables"; }
            timeout 590 "$python" -m bench tune --only "${step#tune-}" --seconds 540 --tables "$tables" "${dry[@]}" || status=1
            [ "$tables" -ef "$out/tables" ] || cp -r "$tables" "$out/" ;;
        *)
            if [ -e "$out/$step.json" ] && [ -z "${AGAIN:-}" ]; then
                echo "$out/$step.json is there: passed over"
                continue
            fi
            timeout 590 "$python" -m bench run --step "$step" --out "$out" ${DRY:+--dry} || status=1 ;;
    esac
done
exit $status
