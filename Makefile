# make demo and make test need Python 3.11 or newer and make; they install everything else into .venv.

.DEFAULT_GOAL := help
BIN := .venv/bin
INSTALLED := .venv/installed
export PYTHON

.PHONY: help setup demo test check bench lock clean

help:  ## What there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(INSTALLED)  ## .venv, from the lock; again only when the lock has changed

$(INSTALLED): infra/locks/cpu.txt infra/setup.sh infra/indexes.sh pyproject.toml
	@infra/setup.sh

demo: $(INSTALLED)  ## The example job on a real model through the real engine, on the CPU
	@$(BIN)/python examples/demo/run.py

test: $(INSTALLED)  ## The whole test suite, real engine included
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope

check: $(INSTALLED)  ## ruff, mypy, import-linter
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(INSTALLED)  ## The ratios of the README, measured here
	@$(BIN)/python -m pytest tests/bench --benchmark-enable --benchmark-only --benchmark-disable-gc -s

lock: $(INSTALLED)  ## Makes infra/locks/cpu.txt anew
	@infra/locks/compile.sh

clean:  ## Removes everything that was made here
	rm -rf .venv .demo .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache dist build
