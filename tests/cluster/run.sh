#!/usr/bin/env bash
# Runs a Python test against the soloist binary: run.sh TEST.py. The interpreter is the tree's .venv (install.sh).
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
export SOLOIST=${SOLOIST:-$PWD/cli/soloist} SOLOIST_MODEL=$PWD/models/tiny SOLOIST_CLIENT_DIR=$here/../server
test=$1
shift
exec "$here/../../.venv/bin/python" "$here/$test" "$@"
