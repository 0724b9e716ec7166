#!/usr/bin/env bash
# Runs the tests and benchmarks that need a GPU, with the python that is named or else python3. Rows of
# `perpkit bench` go to out/gpu/; remove a file there to measure its rows anew. Ends with 1 when something
# has failed, and says what.
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=()

# seconds, then the command
try() {
    echo "== ${*:2}"
    timeout "$1" "${@:2}" || failed+=("${*:2} (exit code $?)")
}

# a file's name, then what is asked of bench
measure() {
    try 400 "$python" -m perpkit bench --device cuda --out "out/gpu/$1.csv" "${@:2}"
}

try 60 "$python" -c 'import torch, transformers; print(torch.cuda.get_device_name(), torch.__version__, transformers.__version__)'
try 600 "$python" -m pytest -q -W default tests/test_gpu.py tests/test_fused.py
for script in pruning masklora retraining reconstruction; do
    try 150 "$python" "benchmarks/$script.py"
done
measure train-opt-2.7b --model opt-2.7b
measure prune-opt-6.7b --model opt-6.7b --what prune --methods wanda,sparsegpt
measure prune-llama-2-7b --model llama-2-7b --what prune --methods wanda,sparsegpt
measure reconstruct-opt-2.7b --model opt-2.7b --what reconstruct
measure biases-opt-30b --model opt-30b --methods biases --checkpointing --batch 1

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
