# Everything runs in .venv, which the targets make; nothing else needs to be installed but Python and make.
PYTHON ?= python3
BIN := .venv/bin
quiet := --quiet

.PHONY: demo first study lint test test-all bench tables pictures docs

# Threads that spin while they wait for one another cost minutes where other programs run too.
demo: quiet :=
demo: first .venv/demo
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m demo

first:
	@echo "The demo trains two small models and draws where they look: at most three minutes on two cores."
	@test -e .venv/demo || echo "This first time pip installs PyTorch and Matplotlib before; that depends on the network."

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

# The generated tables of README.md and docs/, from the code and from bench/results; and with them the pictures.
tables: .venv/docs
	$(BIN)/python -m docs_build --tables

pictures: .venv/docs
	$(BIN)/python -m docs_build

# The site, into build/site.
docs: tables
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch comes first and by name: unpinned, it would be the newest build with all of CUDA.
.venv/%: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(quiet) -c constraints.txt torch==2.13.0
	$(BIN)/pip install $(quiet) -c constraints.txt -e '.[$*]'
	touch $@
