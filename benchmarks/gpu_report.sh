#!/usr/bin/env bash
# Evidence from a GPU, in one go and without a network: build, GPU tests, memory checks, kernel timings.
#   benchmarks/gpu_report.sh OUT
# OUT gets env.txt, tests.txt, sanitizer.txt, kernels.txt and kernels.json.
set -uo pipefail
out=${1:?"usage: benchmarks/gpu_report.sh OUT"}
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=0

DPO_FAST_BUILD=cuda python setup.py build_ext --inplace 2>&1 | tail -n 5 | tee "$out/build.txt" || failed=1
{ python -m dpo_fast.env; nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv; } | tee "$out/env.txt"

python -m pytest -q tests -m gpu 2>&1 | tee "$out/tests.txt" || failed=1
python -m pytest -q tests/kernels/test_triton.py 2>&1 | tee -a "$out/tests.txt" || failed=1
if command -v compute-sanitizer >/dev/null; then
  # the large-tensor test is left out: under the sanitizer it takes hours
  compute-sanitizer --error-exitcode 1 --target-processes all \
    python -m pytest -q tests/kernels -m gpu -k "native and not large" 2>&1 | tee "$out/sanitizer.txt" || failed=1
else
  echo "compute-sanitizer is not installed: memory accesses were not checked" | tee "$out/sanitizer.txt"
fi
python benchmarks/kernels.py --json "$out/kernels.json" 2>&1 | tee "$out/kernels.txt" || failed=1
exit $failed
