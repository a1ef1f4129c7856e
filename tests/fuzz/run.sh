#!/usr/bin/env bash
# run.sh SECONDS [TARGET...]: builds the fuzz targets and runs each for so long on its corpus. New inputs go to a
# scratch folder; an input that fails is kept in tests/fuzz/findings/ (run the binary with it to reproduce).
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
seconds=${1:?seconds per target}
shift
targets=("$@")
if ((${#targets[@]} == 0)); then
  targets=(safetensors config tokenizer chat_template step_plan generate_request openai_request cluster_message)
fi
labels=("${targets[@]/#/\/\/tests\/fuzz:}")
bazel build --config=asan --noshow_progress --ui_event_filters=-info "${labels[@]/%/_fuzzer}" || exit 1
bin=$(bazel info --config=asan bazel-bin 2>/dev/null)
status=0
for target in "${targets[@]}"; do
  scratch=$(mktemp -d)
  mkdir -p "tests/fuzz/findings/$target" "tests/fuzz/corpus/$target"
  if "$bin/tests/fuzz/${target}_fuzzer" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 \
    -print_final_stats=1 "-artifact_prefix=tests/fuzz/findings/$target/" "$scratch" "tests/fuzz/corpus/$target" \
    >"$scratch.log" 2>&1; then
    runs=$(awk '/stat::number_of_executed_units/ {print $2}' "$scratch.log")
    cover=$(grep -oE 'cov: [0-9]+' "$scratch.log" | tail -1)
    echo "fuzz $target: passed ($runs runs, $cover)"
    rmdir --ignore-fail-on-non-empty "tests/fuzz/findings/$target"
  else
    tail -40 "$scratch.log"
    echo "fuzz $target: FAILED, see tests/fuzz/findings/$target"
    status=1
  fi
  rm -rf "$scratch" "$scratch.log"
done
rmdir --ignore-fail-on-non-empty tests/fuzz/findings 2>/dev/null
exit "$status"
