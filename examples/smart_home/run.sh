#!/bin/sh
# From rows to a served INT8 model that calls the functions of home.py.
#
#     sh run.sh [BASE]        BASE is a checkpoint; without it, the bundled demo model
#
# Needs `pip install 'slm-edge[all]'`. Everything is written below ./runs of the current directory, and the rows beside it.
set -eu
here=$(dirname "$0")
base=${1:-}

python "$here/rows.py" --out .
slm finetune --recipe "$here/recipe.yaml" ${base:+--base "$base"}
adapter=$(ls -d runs/*/adapters/home | tail -1)
run=${adapter%/adapters/home}
slm export --onnx --adapter "$adapter"
slm quantize --int8 "$run/onnx-home"
slm quantize --int4 "$run/onnx-home"
slm eval "$adapter" "$run/onnx-home" "$run/onnx-home-int8" "$run/onnx-home-int4" --task test.jsonl --metric tool-call
slm serve "$run/onnx-home-int8"
