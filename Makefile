# Everything from a bare Python >= 3.11 and a C++ compiler: make builds its own environment.
#
#   make demo    compress MiniLM-L6 for this processor and compare
#   make test    lint, types, import contracts, tests
#   make lint    the first three alone
#   make test-slow   the tests that take long: by hand, and before a release
#   make bench   write the tables of benchmarks/results
#   make clean   remove caches and outputs; make distclean removes .venv too

PYTHON ?= python3
# Installed first and by itself: a bare range would fetch a CUDA build of several GB.
# For another build: make test TORCH='torch==2.13.0 --index-url URL'
TORCH ?= torch==2.13.0
# pytest-xdist workers
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Errors only: pip's warnings about index locations fill the screen and stop nobody.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Many tests start processes, which would compile the package anew without its bytecode.
# In the order of the folders: whole runs first, so that the workers end with short files together.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) \
	--dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow lint bench clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/tersor demo

test: lint
	$(PYTEST) -m "not zoo and not gpu and not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not zoo and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.first_light

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "found Python " + sys.version.split()[0] + ", wanted 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.dev $(VENV)/.demo $(VENV)/.bench: $(VENV)/.%: pyproject.toml $(VENV)/.torch
	$(PIP) install -e '.[$*]'
	@touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage* dist out
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
