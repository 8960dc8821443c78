# Everything a clone needs: Python >= 3.11 and make. Every target sets up .venv first, if it is not there yet.
#   make test PYTHON=python3.12     another interpreter (run `make clean` first if .venv has a different one)
#   make test WORKERS=1             processes that share the test files; each takes 2 GB

PYTHON ?= python3
EXTRAS := notebooks,figures,images,log,docs,dev

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

# What `make reproduce` runs: som, nclql, prior_guidance or adaptive_timesteps; smoke, cpu or paper; all rows.
PAPER ?= som
PRESET ?= cpu
ROWS ?=

# One process per core the tests may use; past four, the longest file decides.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# They have commands of their own.
NOT_BENCHED := benchmarks/measure.py benchmarks/check.py benchmarks/faults.py benchmarks/peers.py benchmarks/race.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test slow smoke coverage lint notebooks figures bench check reproduce docs lab clean

help:  ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
	  while IFS='|' read -r target text; do printf '%-18s%s\n' "$$target" "$$text"; done

setup: $(READY)  ## Set up .venv (with uv if it is installed, else with pip; once, 2 GB)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "eqgen needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV): a minute or two, once"
	@if uv --version >/dev/null 2>&1; then \
	  set -x; test -x $(BIN)/python || uv venv --python "$$(command -v $(PYTHON))" --allow-existing $(VENV); \
	  uv pip install --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'; \
	else \
	  set -x; $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'; \
	fi
	@touch $@

demo: $(READY)  ## Train SOM on Pendulum (a few minutes); goes on where an earlier demo stopped
	@if [ -e $(DEMO)/settings.json ]; then set -x; $(BIN)/eqgen resume $(DEMO); \
	else set -x; $(BIN)/eqgen train som --env gymnax/Pendulum-v1 --preset cpu --agent.hidden 64 64 --settings.eval-every 1000 --settings.total-steps 14000 --out $(DEMO); fi
	$(BIN)/eqgen plot $(DEMO)
	$(BIN)/eqgen render $(DEMO)
	@echo && ls -l $(DEMO)

test: $(READY)  ## Run the tests
	$(PYTEST)

slow: $(READY)  ## Run the tests that take minutes each
	$(PYTEST) -m slow --optimize

# Its own command, since one file's tests share one process in the suite, and this one's take a core each.
smoke: $(READY)  ## Run the notebooks with small values (minutes)
	$(PYTEST) --dist load -m slow tests/test_notebooks.py -k smoke_values

coverage: $(READY)  ## Run the tests and list the lines that none of them runs
	$(PYTEST) --cov=eqgen --cov-report=term-missing:skip-covered

lint: $(READY)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

notebooks: $(READY)  ## Execute the notebooks again (ONLY=01: those whose name begins so)
	$(BIN)/python notebooks/build.py $(ONLY)

figures: $(READY)  ## Draw the figures and tables of the papers from the committed results
	@set -e; for script in paper_figures/*/fig_*.py paper_figures/*/table_*.py; do \
	  test -e "$$script" || continue; echo "$$script"; $(BIN)/python "$$script"; done

bench: $(READY)  ## Measure the cost of updates and actions
	@set -e; for script in $(filter-out $(NOT_BENCHED),$(wildcard benchmarks/*.py)); do \
	  test -e "$$script" || continue; echo "$$script"; $(BIN)/python "$$script"; done

check: $(READY)  ## Measure whether anything got slower, as ratios to the committed benchmarks
	$(BIN)/python benchmarks/check.py

reproduce: $(READY)  ## Run a paper's experiments again (PAPER=som PRESET=cpu ROWS="S4 S6")
	$(BIN)/python paper_figures/reproduce.py $(PAPER) --preset $(PRESET) $(if $(ROWS),--rows $(ROWS))

docs: $(READY)  ## Build the documentation in site/
	$(BIN)/python -m mkdocs build --strict

# The kernel "python3" of the notebooks has to be that of .venv, and a user may have another of this name.
lab: $(READY)  ## Open the notebooks in JupyterLab
	JUPYTER_PREFER_ENV_PATH=1 JUPYTER_PATH= $(BIN)/jupyter lab notebooks

clean:  ## Remove .venv and every cache; keeps runs/
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
