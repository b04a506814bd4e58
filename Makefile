# Fanfare. `make demo` shows a campaign, `make test` shows that it is right.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup check test demo chaos chaos-quick bench bench-quick down up format clean
help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/:/' | column -t -s:

setup: $(STAMP)  ## make .venv with everything in it
$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo "Python 3.11 is missing: apt-get install python3.11 python3.11-venv, or pyenv install 3.11; then make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'setuptools<80' wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

check: $(STAMP)  ## format, lint, types and layers: what CI runs
	$(BIN)/ruff format --check . || { echo "run: make format"; exit 1; }
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format the code and fix what can be fixed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

test: $(STAMP)   ## all tests, on real servers
	@# What needs no Flink runs beside what does; its words come after the others'.
	@$(BIN)/python -m pytest -m 'not engine' >.pytest-beside.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest -m engine; engine=$$?; \
	wait $$beside; rest=$$?; cat .pytest-beside.log; rm -f .pytest-beside.log; \
	test $$engine -eq 0 -a $$rest -eq 0

up: $(STAMP)     ## start the embedded stack
	$(BIN)/fanfare up

demo: $(STAMP)   ## a campaign of 100,000 people, end to end
	$(BIN)/fanfare demo

chaos: $(STAMP)  ## kill everything during campaigns; SEED=n repeats a schedule
	$(BIN)/fanfare chaos $(if $(SEED),--seed $(SEED))

chaos-quick: $(STAMP) ## the same, in a few minutes
	$(BIN)/fanfare chaos --quick $(if $(SEED),--seed $(SEED))

bench: $(STAMP)  ## what every part costs; SECTION=name measures one
	$(BIN)/python -m bench $(SECTION)

bench-quick: $(STAMP) ## what has become dearer since bench/results.json
	$(BIN)/python -m bench.quick

down: $(STAMP)   ## stop the embedded stack
	$(BIN)/fanfare down

clean:           ## remove the virtual environment and all data of the stack
	-test ! -x $(BIN)/fanfare || $(BIN)/fanfare down
	rm -rf $(VENV) .fanfare build dist *.egg-info
