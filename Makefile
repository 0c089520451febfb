# Everything runs in .venv, which the targets make; nothing else needs to be installed but Python and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo study lint test test-all bench

demo: .venv/demo
	$(BIN)/python -m demo
	$(BIN)/python -m attn_n

study: .venv/demo
	$(BIN)/python -m examples.study

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# All but the big matrices, of which one of each kind is left.
test: lint
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

# With what no other target needs: TRL and its data sets (200 MB).
test-all: .venv/trainers lint
	$(BIN)/pytest -n auto --dist worksteal

bench: .venv/dev
	$(BIN)/pytest bench

# torch comes first and by name: unpinned, it would be the newest build with all of CUDA.
.venv/%: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@
