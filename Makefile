# Each target sets itself up: nothing is needed but Python 3.11, the package registry and, for tests, g++.

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed

# Nothing is downloaded by a test.
TEST_ENV := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test quick test-full check schemas docs help

help:
	@echo "make demo       plan and train a small model under a budget, and print the report"
	@echo "make test       format, types, import rules, tests"
	@echo "make test-full  the slow and large tests, one process a file; picks up where it stopped"
	@echo "make schemas    write schemas/*.json anew"
	@echo "make docs       build the documents into docs/_build"

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,hf]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/memplan demo

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Side by side: mypy, which knows nothing yet on a fresh machine, takes most of a minute of one processor.
test: $(INSTALLED)
	$(MAKE) --no-print-directory -j2 check quick

quick: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(TEST_ENV) \
	    $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 --timeout=300 -m "not gpu and not full"

test-full: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python tests/support/full.py

schemas: $(INSTALLED)
	$(BIN)/python tests/support/schemas.py

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/options.py
	$(BIN)/sphinx-build --fail-on-warning --quiet docs docs/_build
