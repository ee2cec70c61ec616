#!/usr/bin/env bash
# The GPU campaign, one step per call so that each ends within ten minutes: bench/gpu.sh STEP [OUT_DIR]
# `all` runs the steps one after the other. prefix-check: the tests that need a GPU, before anything of prefixes is timed.
# Results: OUT_DIR/gpu-STEP.json, default OUT_DIR is $OUT or bench/results. DRY=1 tries a step on the CPU with tiny sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
all="ceilings forward-qkv forward-o forward-gate_up forward-down decode backward mixed mixed-model \
prefix-check prefix-fwd prefix-train prefix-decode prefix-model \
quant-dequant quant-linear quant-step"
step=${1:?"step: $all, or all"}
out=${2:-${OUT:-bench/results}}
python=${PYTHON:-python}
[ "$step" = all ] && steps=$all || steps=$step
status=0
for step in $steps; do
    if [ "$step" = prefix-check ]; then
        # without a GPU every one of them is skipped
        timeout 590 "$python" -m pytest tests -q -m gpu || status=1
        continue
    fi
    # a wrong result fails the step but its file is written all the same, with the reason
    timeout 590 "$python" -m bench run --gpu "$step" --out "$out/gpu-$step.json" ${DRY:+--dry} || status=1
    "$python" -m bench report "$out/gpu-$step.json" --plots "$out" || status=1
done
exit $status
