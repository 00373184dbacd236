PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/demo
	@$(BIN)/ldm txt2img --prompt "a large red circle on a blue background" --seed 1

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "python3 cannot make a virtual environment: install your system's python3-venv package" >&2; exit 1; }

# Each stamp is as new as its installation.
.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv: minutes, most of them for torch"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt k-diffusion  # whose samplers need little of it
	@touch $@
