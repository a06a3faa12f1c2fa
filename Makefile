# Every target prepares what it needs: Python >= 3.11, make and the package index are enough.
#   make test ARGS="-k cancel -x"    PYTHON=/path/to/python3.12 make demo

PYTHON ?=
ARGS   ?=
MARKS  ?= not long
WORKERS ?= 2
SCALE  :=

VENV   := .venv
OLDEST := .venv-oldest
PEERS  := .venv-bench
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TOOLED := $(VENV)/.tooled
PIN     = $$(sh tools/bootstrap.sh) pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
          --no-emit-index-url --no-emit-find-links --custom-compile-command "make pins"

export PYTHON
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test test-all oldest coverage check format-check lint types floors docs bench bench-full pins changelog clean

help: ## What can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

demo: $(READY) ## A shop on stanch and a real PostgreSQL, under fire (ARGS="--serve" keeps it running)
	@$(BIN)/python -m stanch.demo $(ARGS)

test: $(READY) ## The tests, without those that take long
	@$(BIN)/python -m pytest -n $(WORKERS) -m "$(MARKS)" $(ARGS)

test-all: MARKS =
test-all: test ## All tests

# Without the fault runs: the bad subject beside each, a commit after `yield`, loses nothing before FastAPI 0.118.
oldest: $(OLDEST)/.ready ## The tests on the oldest SQLAlchemy, FastAPI and drivers we promise to work with
	@$(OLDEST)/bin/python -m pytest -n $(WORKERS) -m "$(MARKS)" --ignore=tests/faults $(ARGS)

coverage: $(READY) ## The tests, with a list of the lines none of them reached
	@$(BIN)/coverage run -m pytest -m "$(MARKS)" $(ARGS)
	@$(BIN)/coverage report

check: format-check lint types floors docs ## Everything that reads the code without running it

format-check: $(TOOLED)
	@$(BIN)/ruff format --check .

lint: $(TOOLED)
	@$(BIN)/ruff check .

types: $(TOOLED)
	@$(BIN)/mypy
	@$(BIN)/pyright

floors: $(TOOLED)
	@$(BIN)/lint-imports --no-cache

docs: $(TOOLED) ## The documentation, into site/
	@$(BIN)/mkdocs build --quiet --strict

# The page is made of whole runs only, and also of one in which a case has failed.
bench: $(PEERS)/.ready ## stanch beside every peer (ARGS="rates --subjects stanch,article")
	@$(PEERS)/bin/python -m bench $(SCALE) $(ARGS); status=$$?; \
	    $(if $(strip $(ARGS)),,[ $$status -gt 1 ] || $(PEERS)/bin/python -m bench.report bench/results/latest.json || status=1;) \
	    exit $$status

bench-full: SCALE = --full
bench-full: bench ## The same, as thorough as it gets, which takes hours

changelog: $(TOOLED) ## What the next entry of the changelog would say
	@$(BIN)/towncrier build --draft --version next

pins: ## Compile the pinned requirements anew, at the newest releases
	@$(PIN) --group tools --output-file requirements/tools.txt
	@$(PIN) --all-extras --group dev --output-file requirements/dev.txt pyproject.toml
	@$(PIN) --all-extras --group test --constraints requirements/dev.txt \
	    --output-file requirements/test.txt pyproject.toml
	@$(PIN) --all-extras --group test --group bench --constraints requirements/dev.txt \
	    --output-file requirements/bench.txt pyproject.toml
	@$(PIN) --all-extras --group test --constraints requirements/oldest.in \
	    --output-file requirements/oldest.txt pyproject.toml

clean: ## Remove what make has made
	@rm -rf $(VENV) $(OLDEST) $(PEERS) .tools site dist .coverage .mypy_cache .pytest_cache .ruff_cache
	@find src tests tools docs bench -type d -name __pycache__ -prune -exec rm -rf {} +

# The demo and the tests need half of what the checks need, so that is all they fetch.
$(READY): tools/bootstrap.sh requirements/test.txt requirements/tools.txt pyproject.toml
	@sh tools/bootstrap.sh $(VENV) requirements/test.txt
	@touch $@

$(TOOLED): requirements/dev.txt | $(READY)
	@sh tools/bootstrap.sh $(VENV) requirements/dev.txt
	@touch $@

$(OLDEST)/.ready: tools/bootstrap.sh requirements/oldest.txt requirements/tools.txt pyproject.toml
	@sh tools/bootstrap.sh $(OLDEST) requirements/oldest.txt
	@touch $@

# Of its own: the tests never see the session layers that stanch is measured beside.
$(PEERS)/.ready: tools/bootstrap.sh requirements/bench.txt requirements/tools.txt pyproject.toml
	@sh tools/bootstrap.sh $(PEERS) requirements/bench.txt
	@touch $@
