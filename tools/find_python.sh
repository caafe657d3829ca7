#!/usr/bin/env bash
# Prints the path of an installed Python of a version, or ends with 1: bash tools/find_python.sh 3.12
#
# Looks on PATH, then among pyenv's and uv's. A program of pyenv's on PATH may be there and not run.
set -euo pipefail

version=$1
runs() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; }

for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python3; do
    if runs "$candidate"; then
        command -v "$candidate"
        exit
    fi
done
command -v uv >/dev/null && uv python find --no-python-downloads "$version" 2>/dev/null
