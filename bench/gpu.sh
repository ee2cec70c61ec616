#!/usr/bin/env bash
# The GPU campaign for LoRA, one step per call so that each ends within ten minutes: bench/gpu.sh STEP [OUT_DIR]
# Steps: ceilings, forward-qkv, forward-o, forward-gate_up, forward-down, decode, backward, mixed,
# mixed-model; `all` runs them one after the other.
# Results: OUT_DIR/gpu-STEP.json, default OUT_DIR is $OUT or bench/results. DRY=1 tries a step on the CPU with tiny sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
step=${1:?"step: ceilings, forward-qkv, forward-o, forward-gate_up, forward-down, decode, backward, mixed, mixed-model or all"}
out=${2:-${OUT:-bench/results}}
python=${PYTHON:-python}
if [ "$step" = all ]; then
    steps="ceilings forward-qkv forward-o forward-gate_up forward-down decode backward mixed mixed-model"
else
    steps=$step
fi
status=0
for step in $steps; do
    # a wrong result fails the step but its file is written all the same, with the reason
    timeout 590 "$python" -m bench run --gpu "$step" --out "$out/gpu-$step.json" ${DRY:+--dry} || status=1
    "$python" -m bench report "$out/gpu-$step.json" --plots "$out" || status=1
done
exit $status
