# make demo              a real model learns a real task: install, fetch, run, print the table
# make data              the model and all data sets of the experiments
# make replicate-small   the paper's tables at a size for two cores
# make replicate         the same in six languages, for a GPU
# make test              the whole test suite
# make check             format, lint, types, import layers, recipes, docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo data replicate-small replicate test check docs clean

demo: $(INSTALLED)
	$(BIN)/python replication/fetch_model.py
	$(BIN)/python replication/build_translation.py
	$(BIN)/neft run recipes/demo.yaml

data: $(INSTALLED)
	$(BIN)/python replication/fetch_model.py
	for language in fr zh de hi bs mi; do \
		$(BIN)/python replication/build_translation.py --language $$language || exit; \
	done
	for language in fr zh de; do \
		$(BIN)/python replication/build_summarization.py --language $$language || exit; \
	done
	$(BIN)/python replication/build_general.py

replicate-small: data
	$(BIN)/neft compare replication/small/translation.yaml
	$(BIN)/neft compare replication/small/summarization.yaml
	$(BIN)/neft compare replication/small/discovery.yaml
	$(BIN)/neft compare replication/small/choosing.yaml

JOBS ?= 1
replicate: data
	$(BIN)/neft compare replication/full/translation.yaml --jobs $(JOBS)
	$(BIN)/neft compare replication/full/summarization.yaml --jobs $(JOBS)

# The report's tests need a browser too: `apt-get install --no-install-recommends chromium`, or the like.
AXE := tests/browser/node_modules/.package-lock.json
test: $(INSTALLED) $(AXE)
	$(BIN)/pytest -n 2 -m "not real"
	$(BIN)/pytest -m real

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/neft validate recipes replication
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

docs: $(INSTALLED)
	$(BIN)/mkdocs serve

$(AXE): tests/browser/package-lock.json
	npm ci --no-audit --no-fund --prefix tests/browser
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

clean:
	rm -rf $(VENV) build
