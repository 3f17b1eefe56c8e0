#!/usr/bin/env bash
# Everything that this folder measures on a GPU, in at most five minutes on an H100; on a CPU the same in small.
#
#   benchmarks/gpu.sh FOLDER [DINOV2]      (from the root of the repository; DINOV2: a folder with facebook/dinov2-small)
#
# FOLDER/gpu.md gets a table of each part, FOLDER/gpu.log what was said beside. A part that fails or takes too long
# leaves its error in the table, and the rest goes on. PYTHON names the interpreter (default: .venv's, or python3).
# PARTS="steps waits" measures those alone. Nothing is downloaded.
set -u
out=${1:?usage: benchmarks/gpu.sh FOLDER [DINOV2]}
dinov2=${2:-}
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
table=$out/gpu.md log=$out/gpu.log
: >"$table"
: >"$log"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="${PYTHONPATH:-}:$PWD"
card=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
cores=$(getconf _NPROCESSORS_ONLN)
loaded=$((cores > 4 ? 4 : 0)) # workers of a training loader

# part NAME SECONDS TITLE COMMAND...
part() {
  local name=$1 seconds=$2 title=$3 start=$SECONDS code
  shift 3
  if [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]]; then return; fi
  printf '\n## %s\n\n' "$title" | tee -a "$table"
  echo "== $title: $*" >>"$log"
  timeout --kill-after=5 "$seconds" "$@" 2>"$work/errors" | tee -a "$table"
  code=${PIPESTATUS[0]}
  cat "$work/errors" >>"$log"
  if [ "$code" = 124 ]; then
    printf '\nStopped after %s s.\n' "$seconds" | tee -a "$table"
  elif [ "$code" != 0 ]; then
    printf '\nEnded with %s: %s\n' "$code" "$(grep -v '^\s*$' "$work/errors" | tail -1 | cut -c1-400)" | tee -a "$table"
  fi
  printf '\n(%s s)\n' "$((SECONDS - start))" | tee -a "$table"
}

machine() {
  "$python" - <<'PYTHON'
import os, platform, torch
from importlib.metadata import version
names = ("torch", "transformers", "accelerate", "datasets", "peft", "huggingface_hub", "pyarrow", "numpy")
print("| | |\n|---|---|")
print(f"| Python | {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()} |")
for name in names:
    print(f"| {name} | {version(name)} |")
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    print(f"| GPU | {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()} |")
PYTHON
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv,noheader | sed 's/.*/| driver, clocks, power | & |/'
  fi
}

# run NAME RECIPE [OPTIONS]: a recipe from beginning to end, and the seconds of its phases
run() {
  local name=$1 start=$SECONDS
  shift
  "$python" -m hf_cdl train "$@" --output_dir "$work/$name" >"$work/$name.log" 2>&1 || { tail -5 "$work/$name.log" >&2; return 1; }
  "$python" benchmarks/phases.py "$work/$name" "$((SECONDS - start))"
}
# pair DINOV2: both backbones of recipes/dinov2.yaml, made from it, and its run
pair() {
  "$python" -m hf_cdl shrink "$1" "$work/large" --size 84 >&2 || return 1
  "$python" -m hf_cdl shrink "$1" "$work/small" --layers 8 --size 56 >&2 || return 1
  run dinov2 recipes/dinov2.yaml --teacher.backbone "$work/large" --student.backbone "$work/small" \
    --train.use_cpu "$([ "$card" = 1 ] && echo false || echo true)" --train.dataloader_num_workers "$loaded" --baselines '[ridge_head]'
}
export -f run pair machine
export python work card loaded

recipe="recipes/icons100.yaml --train.dataloader_num_workers $loaded --baselines [ridge_head]"
[ "$loaded" = 0 ] || recipe+=" --train.dataloader_persistent_workers true"
if [ "$card" = 1 ]; then
  limits=(20 80 45 40 45 40 45 110 60 100) quick=() few=(--repeats 1)
else
  limits=(30 300 120 120 120 120 120 600 600 300) quick=(--repeats 3) few=(--repeats 1 --images 400)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  recipe+=" --data.max_classes 20 --train.num_train_epochs 1 --data.max_train_per_class 8"
fi

part machine "${limits[0]}" "Machine" bash -c machine
part waits "${limits[3]}" "Waits for the GPU in a training step" "$python" benchmarks/gpu_probe.py waits --size small
part kernels "${limits[4]}" "Attention kernels of a training step" "$python" benchmarks/gpu_probe.py kernels --prompts coda apt
part steps "${limits[1]}" "Training steps" "$python" benchmarks/step.py "${quick[@]}"
part inference "${limits[2]}" "Inference" "$python" benchmarks/inference.py "${quick[@]}"
part icons100 "${limits[7]}" "Quickstart's pair on ten tasks" bash -c "run icons100 $recipe"
part data "${limits[6]}" "Loaders" "$python" benchmarks/data.py "${few[@]}"
part graphs "${limits[5]}" "Compiled graphs" "$python" benchmarks/gpu_probe.py graphs --size small
if [ -n "$dinov2" ]; then
  part dinov2 "${limits[8]}" "DINOv2's pair" bash -c "pair '$dinov2'"
fi
if [ "$card" = 1 ]; then
  part compiled "${limits[9]}" "Compiled training steps" "$python" benchmarks/step.py --prompts coda \
    --ways bfloat16 "compiled, bfloat16" compiled
fi
cp "$work"/*.log "$out"/ 2>/dev/null
echo "$table"
