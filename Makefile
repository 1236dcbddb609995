# Every target sets up what it needs in .venv; nothing else on the machine is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-distill test test-slow lint format bench clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run ## stylize photographs with the embedded model, on a local Ray (6 minutes with installation)
	@$(BIN)/smsbatch run manifests/demo.yaml

demo-distill: $(VENV)/.run ## distill the style into a generator and stylize others with it, on a local Ray (9 minutes with installation)
	@$(BIN)/smsbatch run manifests/demo-distill.yaml
	@$(BIN)/smsbatch run manifests/demo-stylize.yaml

test: $(VENV)/.dev ## the tests, on the CPU, without network (8 minutes on two cores)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev ## the long ones: repeated crashes, whole demos, more seeds (half an hour or more)
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff write what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## measure and print ratios
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/where_time_goes.py
	$(BIN)/python benchmarks/cheaper.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/distill.py
	$(BIN)/python benchmarks/stylize.py

clean: ## remove the environment, caches and the demo's output
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis out

$(VENV)/bin/python:
	@echo "Setting up $(VENV): a few minutes and 6 GB, once."
	@$(PYTHON) -c 'import sys; sys.exit("smsbatch needs Python 3.11 or later; make PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	@$(PIP) --editable '.[ray]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.run
