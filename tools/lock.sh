#!/usr/bin/env bash
# Writes the versions of an environment into the section [project] of the lock: bash tools/lock.sh .venv-newest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=$1
LOCK=tools/tested_versions.txt
new=$(mktemp)
{
    sed -n '1,/^\[project\]$/p' "$LOCK"
    # torch's build is that of the machine, and so are the libraries of CUDA.
    "$VENV/bin/python" -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$//; /^nvidia-/d; /^cuda-/d'
    sed -n '/^\[vllm\]$/,$p' "$LOCK"
} >"$new"
cat "$new" >"$LOCK"
rm "$new"
git diff --stat -- "$LOCK"
