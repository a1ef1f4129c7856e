#!/usr/bin/env bash
# Runs a Python test of what is in deploy/: run.sh TEST.py. The interpreter is the tree's .venv (install.sh).
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
export SOLOIST=$PWD/cli/soloist SOLOIST_MODEL=$PWD/models/tiny TOP=$here/../..
exec "$here/../../.venv/bin/python" "$here/$1"
