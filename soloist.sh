#!/usr/bin/env bash
# Installs what is missing, builds (optimised) and runs soloist with the given arguments. Without arguments: a
# server on the bundled model with 16 ranks that own one expert per layer each, and a story that it streams over gRPC.
set -euo pipefail
top=$(cd "$(dirname "$0")" && pwd)
"$top/third_party/install.sh"
(cd "$top" && echo "soloist.sh: building (the first time takes some minutes)" >&2 && bazel build --noshow_progress --ui_event_filters=-info //cli:soloist >&2)
if (($# == 0)); then
  set -- demo "--model=$top/models/tiny" --ranks=16
  echo "soloist.sh: soloist $*" >&2
fi
exec "$top/bazel-bin/cli/soloist" "$@"
