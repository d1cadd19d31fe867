# `make demo` and `make test` work on a fresh clone with Python >= 3.11 and nothing else. Neither needs root.
# Stamps in .venv remember what is installed: a second call installs nothing, until pyproject.toml or constraints.txt
# changes. Settings: PYTHON=python3.12 VENV=.venv JOBS=2 ARGS="tests/ops -k gate" TORCH=cpu

VENV ?= .venv
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
# The first Python that is new enough and able to make a virtual environment.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# On Linux PyPI's torch brings CUDA's libraries, gigabytes of them; TORCH=cpu takes the same version without them.
INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)
PIP = $(BIN)/python -m pip install --disable-pip-version-check $(INDEX) -c constraints.txt
# Two test processes of one thread each are faster here than one of two; spinning threads would fight over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format bench hooks install install-dev clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: install  ## train two small models on the standard library's source, compare them, write runs/demo/report.html
	$(BIN)/kimi-linear demo $(ARGS)

test: install-dev  ## the whole test suite
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: install-dev  ## formatting, style, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: install-dev  ## the type checker
	$(BIN)/pyright

format: install-dev  ## rewrite the files as `make lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install-dev  ## every benchmark of this machine; writes benchmarks/results/
	for script in $$(grep -l __main__ benchmarks/[a-z]*/[a-z]*.py | grep -v /tune); do module=$$(echo "$${script%.py}" | tr / .); \
	  echo "== python -m $$module"; $(BIN)/python -m "$$module" || exit 1; done

hooks: install-dev  ## run the cheap checks at every commit
	$(BIN)/pre-commit install

install: $(VENV)/.core  ## what it takes to run
install-dev: $(VENV)/.dev  ## what it takes to test

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "make: expected Python >= 3.11 with the venv module, found: $$(python3 --version 2>&1);" \
	  "install one (Debian: apt-get install python3-venv) or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: PYTHON: expected Python >= 3.11," \
	  "got $$("$(PYTHON)" --version 2>&1) from $(PYTHON)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) -e .
	@touch $@

# The dev extra includes the core, so one stamp vouches for both. fla stays outside the environment: transformers would
# call its GPU kernels on a CPU; one test puts it on the path of a process of its own.
$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) -e '.[dev]'
	$(PIP) --quiet --upgrade --no-deps --target $(VENV)/oracles fla-core einops
	@touch $(VENV)/.core $@
