# make quickstart   environment and the main job: four experts on the embedded base, a few minutes on a laptop, and its report
# make test         environment and all tests that need no long run
# make check        format, lint, types, import layers, tests: what CI runs
# make slow         the long tests, too
# make docs         the pages of docs/ as a site, build/docs/index.html
# make links        asks every other site that the pages link to
# make newcomer     every command of README.md and the tutorials, in order, on a fresh clone; about an hour

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart test slow check docs links newcomer clean

quickstart: $(VENV)/.installed
	$(BIN)/dylora train recipes/quickstart.yaml
	$(BIN)/dylora report runs/quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(MAKE) test

docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

links: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -q -b linkcheck docs build/links

newcomer:
	$(PYTHON) scripts/newcomer.py

# torch first and alone: where a CPU build of the pinned version is at hand, pip takes it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e ".[dev,docs,harness]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
