#!/usr/bin/env bash
# Runs a Python test of chat templates: run.sh TEST.py. The interpreter is the tree's .venv (install.sh).
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
export RENDER=$PWD/tests/chat/render TEMPLATES=$here/../../third_party/.wheels/jinja/templates
exec "$here/../../.venv/bin/python" "$here/$1" "${@:2}"
