# Two commands on a fresh machine with Python >= 3.11 and git: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUTPUT ?= demo_output

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs app format clean

help:
	@echo "make demo     install, train both models on the embedded data, print tables and where the pictures are"
	@echo "make test     install, run all tests"
	@echo "make lint     install, check format, lint, types"
	@echo "make docs     install, build the documentation into build/site/, a warning is an error"
	@echo "make app      install, open both models in a browser"
	@echo "make format   rewrite the code in the project's format"
	@echo "make clean    remove what the commands above made, $(VENV) included"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, {v.major}.{v.minor} came: run make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/python scripts/demo_conceptclip.py --output $(DEMO_OUTPUT)/conceptclip
	$(BIN)/python scripts/demo_fvlm.py --output $(DEMO_OUTPUT)/fvlm

# One thread a worker: the tests are many and small.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install
	$(BIN)/mkdocs build --strict

app: install
	$(BIN)/python app/app.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) site build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
