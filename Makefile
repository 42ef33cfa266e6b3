# `make train` runs the main job on the embedded world, `make test` lints and tests; both set up
# .venv first. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
# Threads of torch that spin while they wait starve whatever else runs on the machine.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: train test test-slow test-faults clean

train: .venv/installed
	$(BIN)/python -m experiments.train --flagfile=grpo.flags

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-slow: .venv/installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# LEVER_SOAK_MINUTES sets how long each of the two soaks lasts.
test-faults: .venv/installed-test
	HF_HUB_OFFLINE=1 LEVER_SOAK_MINUTES=$${LEVER_SOAK_MINUTES:-30} \
	  $(BIN)/python -m pytest tests/faults tests/store tests/bridge/test_ray.py -m "faults or not faults"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv
