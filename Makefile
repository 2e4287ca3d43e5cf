# Everything runs in .venv, which is made on first use. `make help` lists the targets.
#
#   PYTHON=...  the Python to make .venv with, tried before the usual names
#   ARGS=...    arguments for what a target runs: make demo ARGS="--seconds 3"
#   CC=...      the C compiler for the KVM extension; without one there is no KVM

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Targets share .venv, and two pips in one environment are one too many.
.NOTPARALLEL:

PYTHON ?=
ARGS ?=
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

# What the installed package is made of, apart from Python files: those are used
# from where they are.
BUILT_FROM := pyproject.toml setup.py $(wildcard src/memlistener/kvm/_build.py \
	src/memlistener/kvm/*.h src/memlistener/kvm/*.c)
# cffi writes this one itself.
BUILT_FROM := $(filter-out src/memlistener/kvm/_kvm.c,$(BUILT_FROM))
CHECKED := $(wildcard src tests benchmarks docs/examples)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: .venv/.has-cli ## Run a guest whose memory map changes under it
	@.venv/bin/memlistener demo $(ARGS)

.PHONY: mirror
mirror: .venv/.has-cli ## Copy a running guest's RAM while its map changes, and compare
	@.venv/bin/memlistener mirror $(ARGS)

.PHONY: test
test: .venv/.has-test ## Run the tests
	@$(PY) -m pytest $(ARGS)

.PHONY: bench
bench: .venv/.has-test ## Measure
	@test -e benchmarks/__main__.py || { echo "there are no benchmarks yet"; exit 1; }
	@$(PY) -m benchmarks $(ARGS)

.PHONY: docs
docs: .venv/.has-docs ## Build the documentation into docs/_build/html
	@$(PY) -m sphinx -n -W --keep-going -q -b html docs docs/_build/html $(ARGS)
	@echo "docs/_build/html/index.html"

.PHONY: lint
lint: .venv/.has-dev ## Check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

.PHONY: typecheck
typecheck: .venv/.has-dev ## Check types
	@$(PY) -m mypy $(CHECKED)

.PHONY: clean
clean: ## Remove all that make made
	rm -rf .venv build dist docs/_build src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -f src/memlistener/kvm/_kvm.c src/memlistener/kvm/_kvm*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# ---- the environment -------------------------------------------------------------

# A name that is found need not run (version managers leave such behind), and
# some systems take venv or ensurepip out of Python.
.venv/.made:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	            >/dev/null 2>&1; then \
	        echo "making .venv with $$("$$python" --version)"; \
	        "$$python" -m venv --clear .venv && touch $@ && exit 0; \
	    fi; \
	done; \
	echo "memlistener needs Python 3.11 or later with its venv module, and none of these is one:" \
	    "$(strip $(PYTHON) python3 python3.13 python3.12 python3.11)." \
	    "Install one (Debian and Ubuntu: apt install python3 python3-venv)," \
	    "or say where it is: make PYTHON=/path/to/python3 ..." >&2; \
	exit 1

# Another compiler is a reason to build again.
.venv/.compiler: FORCE | .venv/.made
	@echo '$(CC)' | cmp -s - $@ || echo '$(CC)' >$@

.PHONY: FORCE
FORCE:

# .venv/.has-EXTRA: the package, editable, with one of pyproject.toml's extras. What
# an extra includes is there with it.
INCLUDED-test := cli
INCLUDED-dev := test cli
.venv/.has-%: $(BUILT_FROM) .venv/.compiler | .venv/.made
	@echo "installing memlistener[$*] into .venv"
	@rm -f src/memlistener/kvm/_kvm*.so
	@$(PIP) install --editable '.[$*]'
	@$(PY) -c 'from memlistener.kvm import bindings as b; why = b.missing(); why and print("memlistener: no KVM:", why)'
	@touch $@ $(INCLUDED-$*:%=.venv/.has-%)
