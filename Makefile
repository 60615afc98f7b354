# Every target makes its own environment from nothing; the second run reuses it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The environments of the lanes below, one each, beside the one to develop in.
LANES  ?= .lanes
TORCH  ?= torch==2.13.0
TESTS  ?= tests
PYTEST := -m pytest -n auto -m "not slow" -p no:cacheprovider

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format types docs coverage test-wheel test-floor test-latest gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / — /'

# torch first and alone, pinned: an unpinned torch pulls a CUDA build of several GB. What is imported is compiled then.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'pip==26.3'
	$(BIN)/python -m pip install -q --no-compile torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[all,examples,bench]' --group dev --group ecosystem
	@touch $@

demo: $(READY) ## port a trained CIFAR-10 network to Flax and back, offline
	$(BIN)/python -m examples.cifar10.port
	$(BIN)/python -m examples.cifar10.port --others

test: $(READY) ## run the whole test suite but the slow tests
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(READY) ## run the slow tests too
	XLA_FLAGS= $(BIN)/python -m pytest -m slow

lint: $(READY) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## check types
	$(BIN)/mypy

docs: $(LANES)/docs/.ready ## build the manual into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(LANES)/docs/bin/mkdocs build --strict

# Reads the sources without importing them, so it needs neither torch nor jax.
$(LANES)/docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LANES)/docs
	$(LANES)/docs/bin/python -m pip install -q 'pip==26.3'
	$(LANES)/docs/bin/python -m pip install -q -c constraints.txt --group docs
	@touch $@

coverage: $(READY) ## run the tests, measure what they cover, list the holes
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST) $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# TESTS='tests/exchange tests/wrap/test_call.py' narrows any of the lanes; PYTHON=python3.13 TORCH=torch moves them.

test-wheel: $(READY) ## build the wheel and test what it installs, rather than src/
	rm -rf $(LANES)/dist
	$(BIN)/python -m hatchling build -d $(LANES)/dist
	$(call environment,wheel)
	$(LANES)/wheel/bin/python -m pip install -q -c constraints.txt "$$(echo $(LANES)/dist/*.whl)[all,examples,bench]" --group dev
	$(LANES)/wheel/bin/python -m pip install -q --no-deps --force-reinstall $(LANES)/dist/*.whl
	cd $(LANES) && wheel/bin/python -c 'import torchjax_bridge as b; print(b.__file__)' | grep site-packages
	$(LANES)/wheel/bin/python $(PYTEST) $(TESTS)

test-floor: ## test the oldest releases that pyproject.toml admits
	$(call environment,floor)
	$(PYTHON) .ci/floors.py > $(LANES)/floors.txt
	$(LANES)/floor/bin/python -m pip install -q -c $(LANES)/floors.txt -e '.[all,examples]' --group dev
	XLA_FLAGS= $(LANES)/floor/bin/python $(PYTEST) $(TESTS)

test-latest: ## test the newest releases that pip finds
	$(call environment,latest)
	$(LANES)/latest/bin/python -m pip install -q --upgrade --upgrade-strategy eager '$(TORCH)' -e '.[all,examples]' --group dev
	XLA_FLAGS= $(LANES)/latest/bin/python $(PYTEST) $(TESTS)

# A lane's environment: torch first, as above, and which versions the lane is about last.
define environment
test -x $(LANES)/$(1)/bin/python || $(PYTHON) -m venv $(LANES)/$(1)
$(LANES)/$(1)/bin/python -m pip install -q 'pip==26.3'
$(LANES)/$(1)/bin/python -m pip install -q '$(TORCH)'
endef

# On the machine with the GPU, with the Python that has its torch and JAX; makes no environment, needs no network.
# REHEARSE=1 lets the CPU stand in; MINUTES=4 for a shorter run; OUTPUT=DIR for another folder.
MINUTES ?= 8
gpu: ## prove it on a GPU, within MINUTES, with PYTHON as it is (REHEARSE=1: with the CPU in its place)
	$(PYTHON) -m benchmarks gpu --minutes $(MINUTES) $(if $(REHEARSE),--rehearse) $(if $(OUTPUT),--output $(OUTPUT))

clean: ## remove the environments and every cache
	rm -rf $(VENV) $(LANES) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* dist site
