#!/usr/bin/env bash
# Runs the tests and benchmarks that need a GPU, with the python that is named or else python3.
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
"$python" -c 'import torch, transformers; print(torch.cuda.get_device_name(), torch.__version__, transformers.__version__)'
"$python" -m pytest -q -W default tests/test_gpu.py
for script in pruning masklora retraining reconstruction; do
    echo "== benchmarks/$script.py"
    timeout 150 "$python" "benchmarks/$script.py"
done
