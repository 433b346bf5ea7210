# Puyu: two commands to begin with.
#   make chain     set up .venv, run recipes/nano.yaml, end with a model you can talk to
#   make test      set up what tests need, run all of them

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
RECIPE ?= recipes/nano.yaml
ROOM   ?= spine
PY     := $(VENV)/bin/python
export VENV PYTHON TORCH

.PHONY: help chain test lint setup dev bench bench-table clean
help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1	/' | expand -t 22
chain: setup     ## the whole chain: documents in, an agent that answers out
	@$(PY) -m puyu chain $(RECIPE)
test: dev        ## all tests, by up to four processes of one thread each
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile
lint: dev        ## ruff, mypy, the layer law
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check -q .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-cache >$(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log; exit 1; }
setup:           ## .venv for running
	@scripts/setup
dev:             ## .venv for tests, too
	@scripts/setup dev
bench: dev       ## measure one room: make bench ROOM=spine
	@for script in bench/$(ROOM)_*.py; do $(PY) $$script --save || exit 1; done
bench-table: dev ## newest result of every bar
	@$(PY) bench/harness.py table
clean:           ## remove .venv and runs
	rm -rf $(VENV) runs build dist *.egg-info
