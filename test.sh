#!/usr/bin/env bash
# Installs what is missing, builds and runs all tests. Ends with a line "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")" || exit

passed=0
failed=0
stage() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }
result() {  # NAME STATUS
  if (($2 == 0)); then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    echo "FAILED: $1"
  fi
}

# bazel_test NAME ARGS...: adds one per test target, and one failure if the build itself broke.
bazel_test() {
  local name=$1 log status ok bad
  shift
  stage "$name"
  log=$(mktemp)
  bazel test --keep_going --noshow_progress --test_summary=short "$@" 2>&1 | tee "$log" | grep -vE '^(INFO|Loading|Analyzing)|__asan_extra_spill_area'
  status=${PIPESTATUS[0]}
  ok=$(grep -cE '^//.* PASSED in ' "$log")
  bad=$(grep -cE '^//.* (FAILED|TIMEOUT|NO STATUS)' "$log")
  if ((status != 0 && bad == 0)) || ((ok + bad == 0)); then bad=1; fi
  passed=$((passed + ok))
  failed=$((failed + bad))
  rm -f "$log"
}

stage "install"
third_party/install.sh
result "install" $?

stage "format"
git ls-files '*.h' '*.cc' | xargs -r clang-format-19 --dry-run -Werror
result "format" $?

stage "structure: who includes whom, file sizes, visibility"
python3 tests/structure/check_structure.py --self-test .
result "structure" $?

stage "shell scripts"
git ls-files '*.sh' .ci/run | xargs -r shellcheck
result "shellcheck" $?

stage "network namespaces, for tests/cluster"
python3 tests/cluster/netns.py

bazel_test "optimised" //...

stage "CUDA backend: compiles and links (runs on a machine with a GPU: tests/gpu/run.sh)"
if [[ -x /usr/local/cuda/bin/nvcc ]]; then
  # In the folder of the optimised build: what does not see CUDA is not compiled again.
  bazel build --config=cuda --platform_suffix= --noshow_progress --ui_event_filters=-info //cli:soloist //deploy:bundle \
    //tests/gpu:cuda_ops_test //tests/gpu:cuda_parity_test
  result "CUDA build" $?
else
  echo "no CUDA Toolkit in /usr/local/cuda: not built"
fi

stage "image: built, and a request answered from inside it"
tests/deploy/image_test.sh
result "image" $?

stage "clang-tidy (some minutes the first time)"
tests/tidy.py
result "clang-tidy" $?

stage "fuzz: eight targets, 20 s each"
tests/fuzz/run.sh 20
result "fuzz" $?

bazel_test "address and undefined behaviour" --config=asan --build_tests_only --test_tag_filters=-processes,-gpu //...
bazel_test "threads" --config=tsan --build_tests_only --test_tag_filters=threaded,-gpu //...

stage "done"
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
