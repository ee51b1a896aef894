# `make demo`, `make test` and `make docs` set themselves up on a machine with Python (3.10 or later) and make; run
# again they start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export TOKENIZERS_PARALLELISM = false

.PHONY: demo test guards lint docs format hashes clean

demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/geolora demo --output demo-output --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

guards: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m guard

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# needs neither torch nor the other packages
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# requirements-demo.txt: constraints.txt with all that the demo needs, on any system, and the hash of every file
hashes: $(VENV)/.demo
	$(PIP) uv
	echo hatchling | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command 'make hashes' -c constraints.txt --extra demo pyproject.toml - -o requirements-demo.txt

# torch first: whatever depends on it then keeps this version
$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): the first time takes a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) datasets diffusers hypothesis pillow "pyright[nodejs]" pytest pytest-xdist ruff shtab torchao trl
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) mkdocs-material "mkdocstrings[python]" ruff
	touch $@

clean:
	rm -rf $(VENV) demo-output site
