#!/usr/bin/env bash
# Runs the CUDA backend's tests on a machine with a GPU, from a folder of carried binaries (see bundle.sh), with the
# repository's models/ and tests/gpu/data/ beside it or in the working directory.
#   run.sh [ops] [parity] [memcheck] [racecheck]     default: all
# Each suite is a process of its own, so that a fault of one kernel does not hide the others. Logs: $OUT or ./logs.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
parts="${*:-ops parity memcheck racecheck}"
logs=${OUT:-$here/logs}
mkdir -p "$logs"

# The repository's root: models/ and tests/gpu/data/ are found from there.
root=$PWD
until [[ -e $root/models/tiny/config.json || $root == / ]]; do root=$(dirname "$root"); done
cd "$root" || exit 2

# cuBLASLt and cuDNN of the toolkit, else those that came with PyTorch.
libraries=$here/lib:/usr/local/cuda/lib64
for wanted in libcublasLt.so.13 libcudnn.so.9; do
  [[ -e /usr/local/cuda/lib64/$wanted ]] && continue
  found=$(find / -xdev -name "$wanted" -not -path '/proc/*' 2>/dev/null | sort | head -n 1)
  [[ -n $found ]] && libraries+=:$(dirname "$found")
done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
nvidia-smi -L
echo "binaries in $here, models in $root, LD_LIBRARY_PATH=$LD_LIBRARY_PATH"
for binary in cuda_ops_test cuda_parity_test; do
  ldd "$here/$binary" | grep 'not found'
done

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)

passed=0
failed=0
table=""
# suite NAME SECONDS COMMAND...: runs it; adds its tests to the totals, and one failure if it did not end by itself.
suite() {
  local name=$1 limit=$2 log="$logs/${1// /_}.log" begin=$SECONDS status ok bad note=""
  shift 2
  timeout -k 5 "$limit" "$@" >"$log" 2>&1
  status=$?
  ok=$(grep -cE '^\[       OK \]' "$log")
  bad=$(grep -cE '^\[  FAILED  \] [A-Za-z0-9_]+\.[A-Za-z0-9_]+ \(' "$log")
  if ((status == 124 || status == 137)); then note="ran longer than $limit s"; fi
  if ((status != 0 && bad == 0)); then
    bad=1
    note="${note:-exit status $status}: $(grep -E 'DEVICE ERROR|CHECK failed|ERROR SUMMARY|RACECHECK SUMMARY|error while loading' "$log" | tail -n 1 | cut -c 1-180)"
  fi
  passed=$((passed + ok))
  failed=$((failed + bad))
  local line
  line=$(printf '%-34s %4d passed %3d failed %4d s  %s' "$name" "$ok" "$bad" $((SECONDS - begin)) "$note")
  table+=$line$'\n'
  echo "== $line"
  grep -E '^  |^inputs:' "$log" | cut -c 1-240 | head -n 60
  if ((bad > 0)); then
    echo "-- $name: failures"
    grep -vE '^  |^\[ RUN|^\[       OK|^\[---|^\[===|^Note' "$log" | cut -c 1-400 | head -n 45
  fi
}

ops_suites="PrepareTest EmbedTest AddRmsNormTest GatherRowsTest FillUniformTest CopyBytesTest RopeAppendKvTest LinearTest
  PagedAttentionTest RouteTest DispatchRowsTest CombineRowsTest ExpertMlpTest SampleTest RowIndependenceTest"

# sanitize TOOL OPTION...: the small tests under compute-sanitizer, in short runs: one that hangs loses its own log only.
# First a plain run, which finds the matrix algorithms: a search under a sanitizer takes too long.
sanitize() {
  local tool=$1 name
  shift
  "$here/cuda_ops_test" --gtest_filter='*Small*' --tuning-file=/tmp/soloist_tuning >"$logs/tuning.log" 2>&1
  for name in Embed,AddRmsNorm,GatherRows,FillUniform,CopyBytes,RopeAppendKv Route,DispatchRows,CombineRows Sample Linear \
    ExpertMlp PagedAttention RowIndependence; do
    suite "$tool ${name%%,*}" 40 "$sanitizer" --tool "$tool" "$@" --error-exitcode 9 --print-limit 10 \
      "$here/cuda_ops_test" --tuning-file=/tmp/soloist_tuning --gtest_filter="${name//,/Test.*Small*:}Test.*Small*"
  done
}

for part in $parts; do
  case $part in
    ops)
      for name in $ops_suites; do suite "ops $name" 180 "$here/cuda_ops_test" --gtest_filter="$name.*"; done
      ;;
    parity)
      for name in GoldenParityTest LikelihoodTest ModelParityTest BatchingParityTest SamplingParityTest; do
        suite "parity $name" 90 "$here/cuda_parity_test" --gtest_filter="$name.*"
      done
      ;;
    memcheck)
      sanitize memcheck
      ;;
    racecheck)
      sanitize racecheck --racecheck-report all
      ;;
    *)
      echo "unknown part $part: ops, parity, memcheck, racecheck" >&2
      exit 2
      ;;
  esac
done
echo "== summary ($SECONDS s)"
printf '%s' "$table"
nvidia-smi -L
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
