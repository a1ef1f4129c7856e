#!/usr/bin/env bash
# Runs a Python test against the soloist binary: run.sh TEST.py [FLAG...]. The interpreter is the tree's .venv (install.sh).
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
export SOLOIST=$PWD/cli/soloist SOLOIST_MODEL=$PWD/models/tiny
exec "$here/../../.venv/bin/python" "$here/$1" "${@:2}"
