# `make run` and `make test` work on a fresh machine with git, make, pip and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test test-slow lint setup clean

run: setup           ## the main job on the embedded model; ARGS="cache=uniform" changes it
	$(BIN)/python run.py $(ARGS)

test: setup          ## the fast tests
	$(BIN)/python -m pytest

test-slow: setup     ## the slow tests, which CI runs too
	$(BIN)/python -m pytest -m slow

lint: setup          ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.installed  ## the environment; installs nothing when it is up to date

$(VENV)/.installed: requirements.lock requirements-vbench.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements-vbench.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	touch $@

clean:               ## the environment and every cache; outputs/ is kept
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
