# Everything a working copy needs; all of it is installed into .venv, nothing else on the machine is touched.
#   make demo    install, start a local cluster on the bundled model, stream two prompts, shut down
#   make test    install, then lint, types, the GPU kernels' compile gate and all tests
#                .venv/bin/pytest --hypothesis-profile=explore tries other examples than those every commit is held to
#   make lint    ruff and mypy alone
#   make compile-gate    compile the GPU kernels for sm_90a, no GPU needed; refuse what breaks the chip's limits
#   make compile-report  what a newer Triton, put into .bench, makes of them; refuses nothing
#   make proto   generate the gRPC stubs from cluster/braid_v1.proto again
#   make bench   Braid beside its rivals, which are installed into .bench, on one checkpoint; about 25 minutes of an idle
#                machine. ARGS=--quick: 4 minutes. bench-growth: cost against size; bench-load: under load made by aiperf
#   make clean   remove .venv, .bench, build output and caches
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test lint compile-gate compile-report proto bench bench-growth bench-load clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The Triton that the GPU kernels are tested with says which torch: of the releases for CUDA that one fits which brings it, where pip
# would take the newest. Where a CPU-only wheel is at hand (PIP_FIND_LINKS, or
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu), which brings no Triton and is several GB smaller, pip prefers it.
CONSTRAINTS := --constraint constraints.txt

# Not started in this folder: with the root on Ray's path our kernels/ would hide the Hugging Face package of that name.
demo: $(VENV)/.installed
	cd $(VENV) && bin/braid demo

test: lint compile-gate
	$(BIN)/pytest

# mypy names modules after their folders, so it must find this one under the name `braid`, whatever the clone is called.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/braid
	cd $(VENV)/types && ../bin/mypy --config-file ../../pyproject.toml braid

proto: $(VENV)/.installed-dev
	$(BIN)/python tests/cluster/make_stubs.py

# Started in .bench, for the reason that demo is started in .venv. What cannot be installed costs its own row only.
BENCH := mkdir -p .bench && cd .bench && ../$(BIN)/python -P -m braid.benchmarks

export TRITON_CACHE_DIR := $(CURDIR)/.bench/triton-cache

# In processes of their own: one either compiles kernels or, as the tests do, interprets them.
compile-gate: $(VENV)/.installed-dev
	$(BENCH).gpu.compile_gate --out compile.json

NEXT_TRITON := triton-3.9.0
compile-report: $(VENV)/.installed-dev
	@if [ -d .bench/$(NEXT_TRITON) ] || $(PIP) --no-deps --target .bench/$(NEXT_TRITON) $(subst -,==,$(NEXT_TRITON)) 2>/dev/null; then \
	  export PYTHONPATH=$(NEXT_TRITON) TRITON_DEFAULT_FP_FUSION=1 && $(BENCH).gpu.compile_gate --report-only --out compile-next.json; \
	else echo "$(NEXT_TRITON) cannot be installed here: nothing to report"; fi

bench: $(VENV)/.installed-dev
	$(BENCH).rivals.install llamacpp vllm
	$(BENCH).compare $(ARGS)

bench-growth: $(VENV)/.installed-dev
	$(BENCH).growth $(ARGS)

bench-load: $(VENV)/.installed-dev
	$(BENCH).rivals.install load
	$(BENCH).load $(ARGS)

clean:
	rm -rf $(VENV) .bench build dist *.egg-info */*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamps make a second call cost nothing; a change of the dependencies or of the native kernels installs again.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard */csrc/*) | $(VENV)/bin/pip
	@echo "Installing braid into $(VENV) (a few minutes the first time)"
	$(PIP) $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools for tests into $(VENV)"
	$(PIP) $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "Braid needs Python 3.11 or 3.12, and \"$(PYTHON)\" is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
