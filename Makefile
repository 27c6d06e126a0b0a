# tsclust_ooc: `make help` is the table of contents. Every target sets up what it needs.
PYTHON    ?= python3
SRC       ?= out/demo
DATASET   ?= out/dataset
K         ?= 6
VIEW      ?= flatten
OUT       ?= out/run-k$(K)-$(VIEW)
SCHEDULER ?= threads
MEMORY    ?=
BATCH     ?= slurm
PRINT     ?= --print
ARGS      ?=

UV      := 0.13.9
BIN     := .venv/bin
TSCLUST := $(BIN)/tsclust
READY   := .venv/.ready
LIMITS  := $(if $(MEMORY),--memory $(MEMORY))

# Byte-code is kept whatever the environment says: without it every command compiles its libraries anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo inspect consolidate verify cluster distances submit report test lint check bench lock clean

help: ## this table of contents
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: SRC=$(SRC) DATASET=$(DATASET) OUT=$(OUT) K=$(K) VIEW=$(VIEW) SCHEDULER=$(SCHEDULER) MEMORY=$(MEMORY) ARGS=$(ARGS)"
	@echo "  SRC is a folder of .h5 shards; without one, a labelled demo source is made. ARGS go to the command as they are."

setup: $(READY) ## install exact versions into .venv (once)

$(READY): pyproject.toml requirements.lock
	@echo "setting up .venv (once; about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV)
	@$(BIN)/uv pip sync -q --compile-bytecode --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $(READY)

demo: $(READY) ## a labelled demo source in out/demo (nothing if it is there)
	@$(TSCLUST) demo out/demo $(ARGS)

inspect: $(READY) ## what is in SRC; changes nothing
	@$(if $(filter out/demo,$(SRC)),$(TSCLUST) demo out/demo --quiet)
	$(TSCLUST) inspect '$(SRC)' $(ARGS)

consolidate: $(READY) ## SRC -> DATASET
	@$(if $(filter out/demo,$(SRC)),$(TSCLUST) demo out/demo)
	$(TSCLUST) consolidate '$(SRC)' '$(DATASET)' $(LIMITS) $(ARGS)

verify: $(READY) ## every byte of DATASET, and every sample against SRC
	$(TSCLUST) verify '$(DATASET)' --against '$(SRC)' $(ARGS)

cluster: $(READY) ## DATASET (made from SRC if it is not there) -> OUT: K clusters of VIEW, and a report
	@test -f '$(DATASET)/manifest.json' || $(MAKE) --no-print-directory consolidate ARGS=
	@set -e; truth=; test '$(SRC)|$(DATASET)' != 'out/demo|out/dataset' || truth='--truth out/demo/truth.parquet'; set -x; \
	$(TSCLUST) cluster '$(DATASET)' '$(OUT)' -k $(K) --view $(VIEW) --scheduler $(SCHEDULER) $(LIMITS) $$truth $(ARGS)

distances: $(READY) ## DATASET (made from SRC if it is not there) -> out/distances: all rows of a split to all (ARGS='--split val')
	@test -f '$(DATASET)/manifest.json' || $(MAKE) --no-print-directory consolidate ARGS=
	$(TSCLUST) distances '$(DATASET)' out/distances --view $(VIEW) --scheduler $(SCHEDULER) $(LIMITS) $(ARGS)

submit: $(READY) ## the jobs that make DATASET of SRC, printed (ARGS='--queue cpu'); really submitted: make submit PRINT=
	@$(if $(filter out/demo,$(SRC)),$(TSCLUST) demo out/demo --quiet)
	$(TSCLUST) submit consolidate '$(SRC)' '$(DATASET)' --scheduler $(BATCH) $(PRINT) $(ARGS)

report: $(READY) ## the report of OUT, rendered again beside it
	$(TSCLUST) report '$(OUT)' $(ARGS)

test: $(READY) ## all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY) ## ruff
	$(BIN)/ruff check . $(ARGS)
	$(BIN)/ruff format --check .

check: $(READY) ## mypy
	$(BIN)/mypy $(ARGS)

bench: $(READY) ## measure against the peers, at the sizes the README names (minutes)
	$(BIN)/python benchmarks/consolidate.py $(ARGS)
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/distances.py

lock: $(READY) ## write requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra hpc --extra report --extra s3 --group dev \
	  --no-header --upgrade -q -o requirements.lock
	@sed -i '1i # Exact versions that `make setup` installs. Made by: make lock' requirements.lock

clean: ## remove .venv, caches and out/
	rm -rf .venv out .pytest_cache .mypy_cache .ruff_cache .hypothesis
