# Each target sets itself up: a virtual environment in .venv, installed once, again when pyproject.toml changes.
# PYTHON=python3.12 make test     another interpreter (3.11 or newer)
# make quickstart ARGS="--data FOLDER --method pixcontrast"
# make test ARGS="-k losses"

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: help quickstart test lint types docs bench clean

help:
	@echo "make quickstart   train a small backbone, figures and report in runs/quickstart"
	@echo "make test         the whole test suite"
	@echo "make lint         ruff check and ruff format --check"
	@echo "make types        mypy"
	@echo "make docs         the docs site, into site/"
	@echo "make bench        time and memory of every part, into docs/performance.md; minutes"
	@echo "make clean        remove .venv, site, dist, build and caches"

quickstart: .venv/installed
	$(BIN)/python examples/quickstart/quickstart.py $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/installed
	$(BIN)/python benchmarks/performance/bench.py $(ARGS)
	$(BIN)/python benchmarks/performance/page.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "densessl needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --editable '.[tests]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
