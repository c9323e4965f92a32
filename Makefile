# Each target sets itself up: nothing is needed but Python 3.11, 3.12 or 3.13, the package registry and, for tests, g++.

PYTHONS := python3.11 python3.12 python3.13 python3 python
PYTHON ?= $(firstword $(foreach one,$(PYTHONS),$(shell $(one) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) and print("$(one)")' 2>/dev/null)))
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A stamp for each of what is installed: the demo does not wait for the tests' packages.
CORE := .venv/.core
DEV := .venv/.dev

# Nothing is downloaded by a test.
TEST_ENV := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test quick test-full check schemas docs help

help:
	@echo "make demo       plan and train a small model under a budget, and print the report"
	@echo "make test       format, types, import rules, tests"
	@echo "make test-full  the slow and large tests, one process a file; picks up where it stopped"
	@echo "make schemas    write schemas/*.json anew"
	@echo "make docs       write what is generated anew, and build the documents into docs/_build"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "memplan needs Python 3.11, 3.12 or 3.13, and none was found." \
	    "Install one (such as: apt-get install python3.11 python3.11-venv, or: uv python install 3.11)," \
	    "or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module." \
	    "Install it (such as: apt-get install python3-venv), or name another Python with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	touch $(CORE) $@

demo: $(CORE)
	$(BIN)/memplan demo

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Side by side: mypy, which knows nothing yet on a fresh machine, takes most of a minute of one processor.
test: $(DEV)
	$(MAKE) --no-print-directory -j2 check quick

quick: $(DEV)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(TEST_ENV) \
	    $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 --timeout=300 -m "not gpu and not full"

test-full: $(DEV)
	$(TEST_ENV) $(BIN)/python tests/support/full.py

schemas: $(DEV)
	$(BIN)/python tests/support/schemas.py

docs: $(DEV)
	$(PIP) -e ".[docs]"
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/gains.py
	$(BIN)/sphinx-build --fail-on-warning --quiet docs docs/_build
