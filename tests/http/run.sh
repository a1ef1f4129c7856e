#!/usr/bin/env bash
# Runs a Python test of this folder against the soloist binary: run.sh TEST.py. The interpreter is the tree's .venv.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
export SOLOIST=$PWD/cli/soloist SOLOIST_MODEL=$PWD/models/tiny PYTHONPATH=$here/../server
exec "$here/../../.venv/bin/python" "$here/$1" "${@:2}"
