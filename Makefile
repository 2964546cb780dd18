# Every target works as the only command in a fresh clone: `.ci/setup` makes .venv first, and the servers
# the tests need are fetched on first use. `make help` lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PY := .venv/bin/python
READY := .venv/.ready
SOURCES := producers consumers schemas shared tests bench

# Narrow any pytest target: make test-short ARGS="-k merkle -x"
ARGS ?=
# make test-faults SEED=1 RUNS=100 SECONDS=60; AGAIN=1 repeats runs of this commit
SEED ?= 1
RUNS ?= 10
AGAIN ?=
# … of each fault run; and make fuzz SECONDS=3600, for all parsers together
SECONDS ?= 60
# … or for some of them: make fuzz PARSERS="pack entry"
PARSERS ?=

# Tests that use servers mostly wait: more run at once than there are processors. JOBS=0 runs them one by one.
JOBS ?= 3

PYTEST := $(PY) -m pytest
PARALLEL := -n $(JOBS) --dist loadscope
# The order is random; the seed that repeats it is printed at the top of each run.
NOT_LONG := not long

.PHONY: help
help:  ## Print this list
	@echo "vsql-sync: make TARGET"
	@echo
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | sort | awk -F '\t' '{printf "  %-18s %s\n", $$1, $$2}'
	@echo
	@echo "Pytest targets take ARGS, for example: make test-short ARGS=\"-k merkle -x\""
	@echo "Tests run three at a time: JOBS=6 suits a larger machine, JOBS=0 runs them one by one"
	@echo "Start with: make demo, then make test"

$(READY): pyproject.toml .ci/setup
	@.ci/setup
	@touch $@

.PHONY: setup
setup: $(READY)  ## Make .venv with everything the other targets need

.PHONY: fetch
fetch: $(READY)  ## Download Kafka, a schema registry and PostgreSQL 15 to 18 into the cache (about 220 MB, once)
	@$(PY) -m tests.stack fetch

# --- checks -----------------------------------------------------------------------------------------------

.PHONY: check
check: lint types contracts test-short  ## Lint, types, import contracts, unit tests: no server, about a minute

.PHONY: lint
lint: $(READY)  ## Check style and format
	@echo "==> lint"
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m ruff format --check $(SOURCES)

.PHONY: types
types: $(READY)  ## Check types
	@echo "==> types"
	@$(PY) -m mypy

.PHONY: contracts
contracts: $(READY)  ## Check who may import whom
	@echo "==> contracts"
	@.venv/bin/lint-imports

.PHONY: fix
fix: $(READY)  ## Format, and mend what ruff can mend
	@$(PY) -m ruff check --fix $(SOURCES) || true
	@$(PY) -m ruff format $(SOURCES)

.PHONY: docs-check
docs-check: $(READY)  ## Check that help texts and links in the documentation are true
	@echo "==> docs"
	@$(PY) -m tests.docs_check

# --- tests ------------------------------------------------------------------------------------------------

# Databases are made and dropped by the hundred, which is file system work: in memory where 16 GB of it are free.
.PHONY: test
test: export VSQL_TEST_FILES ?= $(shell df --output=avail,target -BG /dev/shm 2>/dev/null \
	| awk -v free="$$(awk '/^MemAvailable/ {print $$2}' /proc/meminfo)" '$$1 + 0 >= 16 && free >= 16777216 && $$2 == "/dev/shm" {print $$2}')
test: check docs-check fuzz fetch  ## Everything but the long tests
	@echo "==> tests against real servers"
	@$(PYTEST) $(PARALLEL) tests/services tests/topology tests/chaos tests/extension -m "$(NOT_LONG)" $(ARGS)
	@echo
	@echo "All checks and tests passed."

.PHONY: fuzz
fuzz: $(READY)  ## Fuzz the parsers for a minute, guided by coverage; SECONDS=3600 for longer
	@echo "==> fuzzing the parsers"
	@$(PY) -m tests.fuzz --seconds $(SECONDS) $(PARSERS)

.PHONY: test-short
test-short: $(READY)  ## Unit tests only
	@echo "==> unit tests"
	@$(PYTEST) $(PARALLEL) tests/unit -m "$(NOT_LONG)" $(ARGS)

.PHONY: test-integration
test-integration: fetch  ## Each component against real servers
	@echo "==> service tests"
	@$(PYTEST) $(PARALLEL) tests/services -m "$(NOT_LONG)" $(ARGS)

.PHONY: test-topology
test-topology: fetch  ## Whole streams between databases
	@echo "==> topology tests"
	@$(PYTEST) $(PARALLEL) tests/topology -m "$(NOT_LONG)" $(ARGS)

.PHONY: test-extension
test-extension: fetch  ## The schema installed by CREATE EXTENSION vsql_sync, on every PostgreSQL version
	@echo "==> extension tests"
	@$(PYTEST) tests -m "extension and not long" $(ARGS)

.PHONY: test-faults
test-faults: fetch  ## Seeded mixes of faults under load, added to docs/faults.md; SEED=1 RUNS=100
	@echo "==> fault runs: make test-faults SEED=$(SEED) RUNS=$(RUNS) SECONDS=$(SECONDS)"
	@$(PY) -m tests.chaos --seed $(SEED) --runs $(RUNS) --seconds $(SECONDS) $(if $(AGAIN),--again)

.PHONY: test-long
test-long: fetch  ## The long tests at full length (hours)
	@echo "==> long tests"
	@$(PYTEST) tests -m long --timeout=14400 $(ARGS)

.PHONY: test-coverage
test-coverage: fetch  ## All but the long tests, with line coverage; fails below the limits
	@echo "==> tests with coverage"
	@$(PY) -m coverage erase
	@$(PY) -m coverage run -m pytest $(PARALLEL) tests -m "$(NOT_LONG)" --timeout=900 $(ARGS)
	@$(PY) -m coverage combine --quiet
	@$(PY) -m coverage json --quiet --fail-under=0 -o coverage.json
	@status=0; $(PY) -m coverage report || status=1; $(PY) -m tests.coverage_gate coverage.json || status=1; exit $$status

# --- seeing it run ----------------------------------------------------------------------------------------

.PHONY: demo
demo: fetch  ## Two databases, Kafka between them, in about three minutes, explained on the terminal
	@$(PY) -m tests.demo $(ARGS)

.PHONY: stack-up
stack-up: fetch  ## Start Kafka and PostgreSQL 15 to 18 and print their addresses; tests then use them
	@$(PY) -m tests.stack up $(ARGS)

.PHONY: stack-down
stack-down: $(READY)  ## Stop what stack-up started and delete its data
	@$(PY) -m tests.stack down

.PHONY: bench
bench: fetch  ## Measure against native logical replication
	@$(PY) -m bench.drain $(ARGS)

.PHONY: bench-quick
bench-quick: fetch  ## The same with less data
	@$(PY) -m bench.drain --rows 100000 --runs 1 $(ARGS)

.PHONY: bench-members
bench-members: fetch  ## Apply one backlog with one member and with two
	@$(PY) -m bench.members $(ARGS)

.PHONY: clean
clean:  ## Delete what tools and tests left behind; .venv and the download cache stay
	rm -rf .fuzz .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist build .coverage .coverage.* coverage.json
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
