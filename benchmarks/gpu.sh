#!/usr/bin/env bash
# All that takes a GPU, in one call: build, parity tests, compute-sanitizer, benchmarks. Logs and JSON go to OUT.
#
#   benchmarks/gpu.sh OUT [STAGE...]   only these of: tests benchmarks memcheck racecheck synccheck initcheck.
#                                      PYTHON=... chooses the Python (python3), which needs torch, triton, pytest and
#                                      pytest-benchmark; nothing is downloaded.
set -u
stages="tests benchmarks memcheck racecheck synccheck initcheck"
if [ $# -eq 0 ]; then
  echo "usage: benchmarks/gpu.sh OUT [STAGE...], of: $stages" >&2
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
for stage in "$@"; do
  if [[ " $stages " != *" $stage "* ]]; then
    echo "no stage $stage, only: $stages" >&2
    exit 2
  fi
done
wanted=" ${*:-$stages} "
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=()

is_wanted() { [[ $wanted == *" $1 "* ]]; }

stage() { # stage NAME SECONDS COMMAND...: the log goes to OUT/NAME.log
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout --signal INT --kill-after 10 "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  echo "$name: exit $status after $((SECONDS - start)) s"
  if [ $status -ne 0 ]; then
    failed+=("$name")
    tail -n 25 "$out/$name.log"
  fi
}

if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "no GPU that torch of $python can use"
  exit 1
fi
# Some six minutes together. What is interrupted still writes what it has.
stage gpu 20 nvidia-smi
stage build 120 "$python" setup.py build_ext --inplace
stage environment 30 "$python" -m gradvac_kernels.env
cat "$out/environment.log"
# What is not timed, all at once. The tools take a subset: they are some hundred times slower. Every tensor its own
# allocation, so that they see their ends.
checks=() running=()
for tool in memcheck racecheck synccheck initcheck; do
  is_wanted $tool || continue
  if ! command -v compute-sanitizer >/dev/null; then
    echo "$tool: not run, compute-sanitizer is not on the PATH"
    failed+=("$tool")
    continue
  fi
  checks+=($tool)
  subset=(-m small)
  [ $tool = memcheck ] || subset+=(-k cuda)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --signal INT --kill-after 10 120 compute-sanitizer --tool $tool \
    --error-exitcode 9 --report-api-errors no "$python" -m pytest tests/test_gpu.py -q -p no:cacheprovider \
    "${subset[@]}" >"$out/$tool.log" 2>&1 &
  running+=($!)
done
if is_wanted tests; then
  workers=() # most of the tests' time is compiling
  "$python" -c "import xdist" 2>/dev/null && workers=(-n 12)
  stage tests 180 "$python" -m pytest tests/test_gpu.py -q -rP -p no:cacheprovider "${workers[@]}"
  grep -E "^error of the Gram|passed|failed" "$out/tests.log"
fi
for i in "${!checks[@]}"; do
  tool=${checks[i]}
  wait "${running[i]}" # what was interrupted, or a run that tests nothing, finds nothing
  status=$?
  echo "$tool: exit $status, $(grep -E "passed|failed|interrupted" "$out/$tool.log" | tail -n 1)"
  tail -n 1 "$out/$tool.log"
  [ $status -eq 0 ] && grep -q "SUMMARY: 0 " "$out/$tool.log" && grep -qE "^[0-9]+ passed" "$out/$tool.log" ||
    failed+=("$tool")
done
if is_wanted benchmarks; then
  stage benchmarks 300 "$python" -m pytest benchmarks/ --benchmark-only -q --device cuda --results "$out/gpu.json" \
    -p no:cacheprovider
  grep -A 200 "time of each implementation" "$out/benchmarks.log"
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
