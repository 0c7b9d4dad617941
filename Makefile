# `make run` and `make test` work on a fresh machine with git, make, pip and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
RUNS ?=
NOTEBOOKS ?=

.PHONY: run notebooks report test test-slow lint setup vbench-env clean

run: setup           ## the main job on the embedded model; ARGS="cache=uniform" changes it
	$(BIN)/python run.py $(ARGS)

report: setup        ## the results page, outputs/report/index.html; RUNS="outputs/…" adds run folders to what is kept
	$(BIN)/python -m analysis.page $(RUNS)

notebooks: setup     ## the notebooks, executed, as pages in outputs/notebooks; NOTEBOOKS="one.ipynb" renders that one
	$(BIN)/python -m analysis.notebook_pages $(NOTEBOOKS)

test: setup          ## the fast tests
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: setup     ## the slow tests, which CI runs too
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

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

# VBench pins numpy<2 and transformers 4.33.2, which do not go with diffusers, so all it asks for fits only into an
# environment of its own. This one installs torch, torchvision, vbench 0.1.5 with its dependencies (its CLIP package,
# pyiqa, timm, fairscale among them) and a setuptools that still has pkg_resources: 7 GB, about 5 minutes.
# transformers 4.33.2 needs tokenizers 0.13, whose wheels end at Python 3.11. detectron2, which object_class,
# multiple_objects, color and spatial_relationship need, is not on the package index: build it from its source with
# this environment's pip. It holds no weights; those belong into VBENCH_CACHE_DIR.
# Then: python run.py bench=vbench_standard bench.python=.venv-vbench/bin/python
VBENCH_VENV := .venv-vbench

vbench-env: $(VBENCH_VENV)/.installed  ## an environment for the VBench worker (7 GB); PYTHON must be a Python 3.11

$(VBENCH_VENV)/.installed:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "VBench needs Python 3.11: make vbench-env PYTHON=python3.11")'
	test -x $(VBENCH_VENV)/bin/python || $(PYTHON) -m venv $(VBENCH_VENV)
	$(VBENCH_VENV)/bin/python -m pip install --disable-pip-version-check -q torch==2.14.1 torchvision==0.29.1 vbench==0.1.5
	$(VBENCH_VENV)/bin/python -m pip install --disable-pip-version-check -q "setuptools<81"
	touch $@

clean:               ## the environments and every cache; outputs/ is kept
	rm -rf $(VENV) $(VBENCH_VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
