# One door for developers; `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct

.DEFAULT_GOAL := help
.PHONY: help setup lock model corpus protos demo serve test paper test-unit test-conformance test-nightly test-versions test-prometheus check bench bench-trainers

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: .venv/.done ## everything for CPU, from the lock, into .venv

.venv/.done: requirements/cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lock is for Python 3.11; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# torch's CPU build is not on the default index: UV_FIND_LINKS or UV_EXTRA_INDEX_URL must lead to it.
lock: ## resolve requirements/cpu.in anew (needs uv)
	uv pip compile --quiet --python-version 3.11 --override requirements/overrides.txt \
		--no-header --no-annotate --no-emit-package steer requirements/cpu.in -o requirements/cpu.lock

model: setup ## SmolLM2-135M-Instruct as a Hugging Face folder
	$(BIN)/python -m trainer model --out $(MODEL)

corpus: setup ## the Brown Corpus and the State of the Union addresses
	$(BIN)/python -m trainer corpus --out corpora

protos: setup ## regenerate the stubs
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=steer_server/pb --pyi_out=steer_server/pb \
		--grpc_python_out=steer_server/pb protos/steer/v1/*.proto

demo: model ## start the server, look at features, edit them, stop
	$(BIN)/python examples/demo.py

paper: model corpus ## the founding paper's experiments on the shipped dictionaries: build/paper/report.html; SMALL=1 in minutes
	$(BIN)/python -m trainer report examples/paper/$(if $(SMALL),small/)smollm2-135m.toml

serve: model ## the demo's server, until Ctrl-C
	$(BIN)/steer-server --config examples/server.toml

E2E := OMP_NUM_THREADS=1 $(BIN)/pytest tests/e2e -m "e2e and not prometheus and not gpu and not nightly"

# To start an engine takes longer than to ask it, and no more than one core: two processes with an engine of one core each
# are quicker than one with two. 6 GB each. WITH=test-prometheus adds what is to run once the unit tests have.
test: model corpus ## unit tests, and beside them end-to-end tests with the real model in real vLLM
	mkdir -p build
	@$(MAKE) --no-print-directory test-unit $(WITH) > build/unit-tests.log 2>&1 & unit=$$!; \
	$(E2E) --lane 2/2 > build/e2e-tests.log 2>&1 & second=$$!; trap 'kill $$unit $$second' INT TERM; \
	$(E2E) --lane 1/2; first=$$?; \
	wait $$second; second=$$?; cat build/e2e-tests.log; \
	wait $$unit; unit=$$?; cat build/unit-tests.log; exit $$((first || second || unit))

test-unit: model ## what needs no engine
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not e2e and not prometheus and not gpu and not nightly"
	TRITON_INTERPRET=1 STEER_TEST_PRETENDED_GPU=1 $(BIN)/pytest tests/unit/test_runtime.py

test-conformance: setup ## every RPC, bound and error of the API
	OMP_NUM_THREADS=1 $(BIN)/pytest -m conformance

test-nightly: model ## what takes hours: 200 random batches, 5,000 requests, the V2 model runner, more model families
	$(BIN)/pytest -m "nightly and not gpu"
	STEER_TEST_PRETENDED_GPU=1 $(BIN)/pytest tests/unit/test_runtime.py
	TRITON_INTERPRET=1 $(BIN)/pytest tests/unit/test_runtime.py

test-versions: model ## the tests of the engine, what vLLM does around it, adapters and random batches with the other supported vLLM versions, each in its own environment
	$(BIN)/python tests/versions.py

test-prometheus: model ## a real Prometheus scrapes a real server (needs Debian's prometheus package)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m prometheus

check: setup ## formatting, lint, types, import rules, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code --exclude-path google
	@# A clone without history has nothing to compare with.
	! git rev-parse -q --verify HEAD~1 >/dev/null || (cd protos && ../$(BIN)/buf breaking --against '../.git#ref=HEAD~1,subdir=protos')
	$(MAKE) protos && git diff --exit-code steer_server/pb

bench: model ## benchmarks; results as JSON in build/
	mkdir -p build
	$(BIN)/python benchmarks/serving_overhead.py --json build/serving_overhead.json
	$(BIN)/python benchmarks/serving_overhead.py --compiled --json build/serving_overhead_compiled.json
	$(BIN)/python benchmarks/cpu_paths.py --json build/cpu_paths.json
	$(BIN)/python benchmarks/growth.py --json build/growth.json --plot build/growth.svg
	$(BIN)/python benchmarks/live_update.py --json build/live_update.json
	$(BIN)/python benchmarks/api_overhead.py --json build/api_overhead.json
	$(BIN)/python benchmarks/api_message_cost.py --json build/api_message_cost.json

bench-trainers: model corpus ## the trainer against SAELens, sparsify and dictionary_learning (5 GB, hours)
	$(BIN)/python benchmarks/trainer_throughput.py --json build/trainer_throughput.json
	$(BIN)/python benchmarks/trainer_profile.py --json build/trainer_profile.json
	$(BIN)/python benchmarks/trainer_end_to_end.py --json build/trainer_end_to_end.json
	$(BIN)/python benchmarks/trainer_quality.py --json build/trainer_quality.json
