#!/usr/bin/env bash
# Installs what is missing, builds (optimised) and runs soloist with the given arguments. Without arguments: a story by the bundled model, on
# 16 ranks that own one expert per layer each.
set -euo pipefail
top=$(cd "$(dirname "$0")" && pwd)
"$top/third_party/install.sh"
(cd "$top" && echo "soloist.sh: building (the first time takes some minutes)" >&2 && bazel build --noshow_progress --ui_event_filters=-info //cli:soloist >&2)
if (($# == 0)); then
  set -- generate "--model=$top/models/tiny" --ranks=16 --prompt="Once upon a time" --temperature=0.8 --top-p=0.95 --max-tokens=300
  echo "soloist.sh: soloist $*" >&2
fi
exec "$top/bazel-bin/cli/soloist" "$@"
