# make demo   a real model learns a real task: install, fetch, run, print the table
# make test   the whole test suite
# make check  format, lint, types, import layers, recipes, docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test check docs clean

demo: $(INSTALLED)
	$(BIN)/python replication/fetch_model.py
	$(BIN)/python replication/build_translation.py
	$(BIN)/neft run recipes/demo.yaml

test: $(INSTALLED)
	$(BIN)/pytest -n 2 -m "not real"
	$(BIN)/pytest -m real

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/neft validate recipes
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

docs: $(INSTALLED)
	$(BIN)/mkdocs serve

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

clean:
	rm -rf $(VENV) build
