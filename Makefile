# One command each for newcomers and developers. Needs Linux, Python >= 3.11, pip and make.
#
#   make demo                                   in .venv, which is made on first use
#   make demo VENV=~/venvs/mc                   in a virtual environment of your choice
#   make demo DEMO_FLAGS="--processes 4"        flags of the demo (see DEMO_FLAGS="--help")
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"   the small CPU build of PyTorch

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.megachameleon-runtime
DEVELOPMENT := $(VENV)/.megachameleon-development
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS)

# This checkout comes first, whatever else the environment has installed.
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
TRIALS ?= 200

.PHONY: help demo test test-slow test-faults test-slurm test-gpu ablations check format lint types clean clean-demo

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(RUNTIME)  ## from raw text and pictures to a model that writes and draws (about 15 minutes on 2 cores)
	$(BIN)/python -m examples.demo.run_demo $(DEMO_FLAGS)

test: $(DEVELOPMENT)  ## the tests (a few minutes)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

test-slow: $(DEVELOPMENT)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

test-faults: $(DEVELOPMENT)  ## kill, signal, starve and damage runs at random moments (200 trials; TRIALS=20 for a look)
	$(BIN)/python tests/faults/harness.py --trials $(TRIALS)

test-slurm: $(DEVELOPMENT)  ## training on a real SLURM cluster, installed under /tmp and stopped again (root, Debian or Ubuntu)
	MEGACHAMELEON_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm -rs $(PYTEST_FLAGS)

test-gpu: $(DEVELOPMENT)  ## the tests that need a GPU; they say what they lack
	MEGACHAMELEON_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu -rs $(PYTEST_FLAGS)

check: lint types test  ## what CI runs: format, lint, types, tests

format: $(DEVELOPMENT)  ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(DEVELOPMENT)  ## formatting and lint, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEVELOPMENT)  ## static types
	$(BIN)/mypy

ablations: $(DEVELOPMENT)  ## small models without what keeps them stable, and what the early warning was worth
	$(BIN)/python -m examples.ablations.run --pictures docs/images

clean:  ## remove caches and build leftovers; runs/ and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

clean-demo:  ## remove what the demo made
	rm -rf runs/demo

$(RUNTIME): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "error: no virtual environment at $(VENV); install Python's venv module (Debian: python3-venv)"; exit 2; }
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(DEVELOPMENT): requirements-dev.txt $(RUNTIME)
	$(PIP) -r requirements-dev.txt
	@touch $@
