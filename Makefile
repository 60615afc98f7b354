# Every target makes its own environment from nothing; the second run reuses it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format types clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / — /'

# torch first and alone, pinned: an unpinned torch pulls a CUDA build of several GB.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'pip==26.3'
	$(BIN)/python -m pip install -q torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all,examples,bench]' --group dev
	@touch $@

demo: $(READY) ## port a trained CIFAR-10 network to Flax and back, offline
	$(BIN)/python -m examples.cifar10.port

test: $(READY) ## run the whole test suite but the slow tests
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(READY) ## run the slow tests too
	$(BIN)/python -m pytest -m slow

lint: $(READY) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## check types
	$(BIN)/mypy

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist site
