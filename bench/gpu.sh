#!/usr/bin/env bash
# What is asked of a machine with a GPU, in three calls of less than ten minutes each, without network, with the Python
# that is on the PATH:
#   bench/gpu.sh tests      builds for this GPU, says what it is, and tests the kernels on it, CUDA's and Triton's apart
#   bench/gpu.sh sanitizer  runs the CUDA kernels under each tool of compute-sanitizer
#   bench/gpu.sh speed      measures every case; each is in cuda.jsonl as soon as it is done
# Several names, or none for all, run one after another; what fails stops nothing that follows. OUT (default:
# bench/results) receives the tables. --dry-run first: says each command with its limit, and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."
dry=0
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; fi
python=${PYTHON:-python3}
out=${OUT:-bench/results}
failed=0
workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8 --dist worksteal" || true)

# limited SECONDS LOG COMMAND...: prints into both; whether it failed is known at the end.
limited() {
  local seconds=$1 log=$2
  shift 2
  if [ $dry = 1 ]; then echo "$seconds s > $log: $*" && return; fi
  timeout "$seconds" "$@" 2>&1 | tee "$out/$log" || { echo "failed, or not done in $seconds s: $*" && failed=1; }
}

tests() {
  limited 180 gpu-build.txt env TOKENRL_CUDA=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$python" -m pip install -q --no-build-isolation --no-deps -e .
  limited 30 device.txt "$python" -m bench.device
  local files="tests/ops/test_product.py tests/ops/test_contract.py tests/logprobs/test_from_logits.py
    tests/logprobs/test_from_logits_options.py tests/logprobs/test_from_logits_in_place.py
    tests/logprobs/test_from_hidden.py tests/losses/test_linear_policy.py"
  limited 170 gpu-tests.txt env TOKENRL_TEST_BACKENDS=cuda "$python" -m pytest -q $workers $files
  limited 170 gpu-tests-triton.txt env TOKENRL_TEST_BACKENDS=triton "$python" -m pytest -q $workers $files
}

# Without torch's cache of memory, or small overruns stay within its blocks. Errors of the API are torch's own.
sanitizer() {
  if [ $dry = 0 ] && ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: skipped" | tee "$out/sanitizer.txt" && return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    limited 140 "sanitizer-$tool.txt" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 3 --report-api-errors no --kernel-regex kns=tokenrl \
      "$python" -m bench --device cuda --backend cuda --check-only
  done
}

speed() {
  limited 590 bench.txt "$python" -m bench --device cuda --no-compile --lines "$out/cuda.jsonl" --out "$out"
}

if [ $dry = 0 ]; then
  "$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU: make gpu needs one"'
  mkdir -p "$out"
  if [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then export CUDA_HOME=/usr/local/cuda; fi
  export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
  export TORCH_CUDA_ARCH_LIST
fi
for step in "${@:-tests sanitizer speed}"; do
  for name in $step; do
    case $name in
      tests | sanitizer | speed) if [ $dry = 1 ]; then echo "call $name"; fi && $name ;;
      *) echo "gpu.sh: got $name, accepted: tests, sanitizer, speed" >&2 && exit 2 ;;
    esac
  done
done
exit $failed
