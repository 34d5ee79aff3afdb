# Two commands do all set-up on a fresh machine with Python 3.11 to 3.13: `make serve` and `make test`.

PYTHON ?= python3
PORT ?= 3000
DATA ?= sonar
VENV := .venv
SERVING_VENV := .venv-serving
BIN := $(VENV)/bin
LOCK := requirements/all.lock
SERVING_LOCK := requirements/serving.lock
GPU_LOCK := requirements/serving-gpu.lock
# Empty files that say "this environment holds what its lock file says".
READY := $(VENV)/.ready
SERVING_READY := $(SERVING_VENV)/.ready

# Every package comes from a lock file, as a wheel: nothing is built, nothing is resolved.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --require-virtualenv
FROM_LOCK := --require-hashes --no-deps --only-binary :all:
UV_COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header

export BENTOML_DO_NOT_TRACK ?= True
export DROPSERVE_REPOSITORY ?= artifacts

.DEFAULT_GOAL := help
.PHONY: help install serve train test check format lock loadtest bench bento bento-gpu serving-env clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## create .venv from the lock file

serve: $(READY) ## train the default (Sonar) if there is no model yet, then serve on PORT (3000)
	@ls $(DROPSERVE_REPOSITORY)/*/*/manifest.json >/dev/null 2>&1 || $(BIN)/dropserve train $(DATA)
	$(BIN)/dropserve serve --port $(PORT)

train: $(READY) ## train DATA (sonar) and publish its next version
	$(BIN)/dropserve train $(DATA)

test: $(READY) ## run the tests, two processes side by side
	$(BIN)/python -m tests.suite

check: $(READY) ## lint, format check, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format and fix what can be fixed mechanically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY) ## write the lock files anew from pyproject.toml and requirements/*.in
	$(UV_COMPILE) --extra dev --extra ray --extra otel pyproject.toml -o $(LOCK)
	$(UV_COMPILE) requirements/serving.in -c $(LOCK) -o $(SERVING_LOCK)
	$(UV_COMPILE) requirements/serving-gpu.in -c $(SERVING_LOCK) -o $(GPU_LOCK)

loadtest: $(READY) ## put load on the server at PORT (3000) and give a verdict
	$(BIN)/dropserve loadtest --host http://127.0.0.1:$(PORT)

bench: $(READY) ## measure the server on this machine, as ratios (needs wrk)
	$(BIN)/python -m benchmarks.http

bento: $(READY) ## build a Bento of the server with the newest Sonar model in it
	@$(BIN)/bentoml models get sonar:latest >/dev/null 2>&1 || $(BIN)/dropserve train sonar
	$(BIN)/bentoml build

bento-gpu: $(READY) ## the same with CUDA's packages, one worker for each GPU
	@$(BIN)/bentoml models get sonar:latest >/dev/null 2>&1 || $(BIN)/dropserve train sonar
	$(BIN)/bentoml build -f bentofile-gpu.yaml

serving-env: $(SERVING_READY) ## create .venv-serving: what the server needs, without what training needs

clean: ## remove the environments and what the tools left behind (models stay)
	rm -rf $(VENV) $(SERVING_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
		.hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One line on an unsuitable Python, before anything is downloaded.
define require_python
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	found=$$($(PYTHON) --version 2>/dev/null) || found="not there"; \
	echo "$(PYTHON) is $$found; wanted Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 2; }
endef

$(READY): $(LOCK) pyproject.toml
	$(require_python)
	@echo "creating $(VENV) from $(LOCK): a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) $(FROM_LOCK) -r $(LOCK)
	@$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation --no-index --editable .
	@touch $@

$(SERVING_READY): $(SERVING_LOCK)
	$(require_python)
	@echo "creating $(SERVING_VENV) from $(SERVING_LOCK)"
	@test -x $(SERVING_VENV)/bin/python || $(PYTHON) -m venv $(SERVING_VENV)
	@$(SERVING_VENV)/bin/python $(PIP_INSTALL) $(FROM_LOCK) -r $(SERVING_LOCK)
	@touch $@
