#!/usr/bin/env bash
# Build, tests on the device, sanitizer, benchmarks: about 12 minutes, no network, with the Python that is on the PATH.
# OUT (default: bench/results) receives the tables.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
mkdir -p "$out"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU: make gpu needs one"'
if [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then export CUDA_HOME=/usr/local/cuda; fi
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
export TORCH_CUDA_ARCH_LIST TOKENRL_CUDA=1
timeout 180 "$python" -m pip install -q --no-build-isolation --no-deps -e .
"$python" - <<'PY' | tee "$out/device.txt"
import torch
from tokenrl import _bindings
from tokenrl.ops import backends
print(torch.cuda.get_device_name(), _bindings.build_info())
print(backends.reasons(torch.device("cuda")))
for kernel in _bindings.kernel_attributes():
    print(kernel)
PY
failed=0
timeout 240 "$python" -m pytest -q -x tests/instruments/test_parity.py tests/ops/test_product.py tests/ops/test_contract.py \
  tests/logprobs/test_from_logits.py tests/logprobs/test_from_logits_options.py tests/logprobs/test_from_logits_in_place.py \
  tests/logprobs/test_from_hidden.py tests/losses/test_linear_policy.py \
  2>&1 | tee "$out/gpu-tests.txt" || failed=1
if command -v compute-sanitizer >/dev/null; then
  timeout 90 compute-sanitizer --error-exitcode 3 "$python" -m bench --device cuda --check-only 2>&1 | tee "$out/sanitizer.txt" || failed=1
else
  echo "compute-sanitizer is not installed: skipped" | tee "$out/sanitizer.txt"
fi
timeout 300 "$python" -m bench --device cuda --out "$out" || failed=1
exit $failed
