# Every target sets up what it needs first; a second setup costs nothing.
#   make demo ARGS=--keep      arguments for the demo, the benchmarks or pytest
#   make test JOBS=4           processes for the tests that may run side by side

PY    := .venv/bin/python
ARGS  ?=
JOBS  ?= 2
RUFF  := $(PY) -m ruff
QUICK := $(wildcard $(addprefix tests/,core balloon resize sim prealloc contract metrics test_*.py) \
	$(addprefix tests/host/test_,core.py ledger.py overcommit.py anything.py sharing_simulated.py watch.py))
PATHS := $(wildcard storaged lab tests tools demo benchmarks dashboards)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vm quick test test-long test-vm test-vm-long fuzz soak adversary attack lint docs dashboards dashboards-preview format bench sim-sharing proto proto-check \
	lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## Install system packages (as root) and make .venv with everything needed
	@tools/setup.sh $(if $(filter setup,$(MAKECMDGOALS)),,--quiet)

demo: setup ## Run the main job for real: a full host disk, two guests, balloons, resizes
	@$(PY) demo/run.py $(ARGS)

test: setup ## Run the checks and every test that this machine can run
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory proto-check
	@JOBS=$(JOBS) tools/test.sh $(ARGS)

quick: setup ## The checks, and the tests of what decides, without root: for the loop of every day
	@$(RUFF) check --quiet --output-format concise $(PATHS)
	@$(PY) -m mypy --no-error-summary
	@$(PY) -m pytest -q -n $(JOBS) -m "not btrfs and not vm and not slow and not root and not init" $(QUICK) $(ARGS)

test-long: setup ## Run the slow tests too
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory proto-check
	@LONG=1 JOBS=$(JOBS) tools/test.sh $(ARGS)

test-vm: setup ## Run the tests in a virtual machine (QEMU, Debian's kernel), or say in one line why not
	@why=$$(tools/vm.sh --why); if [ -n "$$why" ]; then echo "test-vm: left out: $$why"; else \
		$(PY) -m pytest -q -m "vm and not slow" tests/vm $(ARGS); fi

test-vm-long: setup ## The same with two hundred power cuts of each kind: about an hour
	@why=$$(tools/vm.sh --why); if [ -n "$$why" ]; then echo "test-vm: left out: $$why"; else \
		$(PY) -m pytest -q -m vm -rP tests/vm $(ARGS); fi

demo-vm: setup ## The same with two true virtual machines, over vsock (QEMU, Debian's kernel)
	@why=$$(tools/vm.sh --why); if [ -n "$$why" ]; then echo "demo-vm: left out: $$why"; else $(PY) demo/vm.py $(ARGS); fi

lint: setup ## Check style, formatting, types, who imports whom, and the generated docs
	@$(RUFF) check --quiet --output-format concise $(PATHS)
	@$(RUFF) format --check --output-format concise $(PATHS) >build/format.log 2>&1 || \
		{ cat build/format.log >&2; echo 'lint: run `make format`' >&2; exit 1; }
	@$(PY) -m mypy --no-error-summary
	@.venv/bin/lint-imports --no-logo
	@$(PY) tools/diagrams.py --check
	@$(PY) tools/configuration.py --check
	@$(PY) tools/metrics.py --check
	@$(PY) dashboards/build.py --check
	@echo 'lint: style, formatting, types and imports are fine'

docs: setup ## Write the pages that are made from the code
	@$(PY) tools/diagrams.py
	@$(PY) tools/configuration.py
	@$(PY) tools/metrics.py

dashboards: setup ## Write the dashboards' JSON from dashboards/src (RUNBOOKS=URL: where the runbooks are published)
	@$(PY) dashboards/build.py $(if $(RUNBOOKS),--runbooks $(RUNBOOKS))

dashboards-preview: setup ## Draw the dashboards with Grafana's own widgets, from a live run, into docs/img (npm, chromium)
	@$(PY) dashboards/preview.py $(ARGS)

format: setup ## Format the code, and fix what can be fixed by itself
	@$(RUFF) check --quiet --fix-only --exit-zero $(PATHS)
	@$(RUFF) format --quiet $(PATHS)

fuzz: setup ## Fuzz everything that reads what others wrote (ARGS='--runs 100000 LaunchProcess')
	@$(PY) -m lab.fuzz $(ARGS)

soak: setup ## Mixed calls for four minutes: memory, files and threads stay flat (ARGS='--seconds 600')
	@$(PY) -m lab.soak $(ARGS)

adversary: setup ## Guests, agents and a host that misbehave around one disk (ARGS='--seconds 600 --seed 2', ARGS=--without)
	@$(PY) -m lab.adversary $(ARGS)

attack: setup ## Try to make the balloon's answers false (ARGS='--seconds 600 --seed 3 --only NAME --place shm')
	@$(PY) -m lab.attack $(ARGS)

bench: setup ## Measure against real peers
	@$(PY) benchmarks/run.py $(ARGS)

sim-sharing: setup ## Compare ways to share a host's disk, simulated on the same demands
	@$(PY) -m lab.sharing $(ARGS)

proto: setup ## Generate the Python modules from the .proto files
	@tools/proto.sh

proto-check: setup ## Fail when the generated modules are not those of the .proto files
	@tools/proto.sh --check

lock: setup ## Pin all dependencies again, with hashes (ARGS=--upgrade for the newest)
	@tools/lock.sh $(ARGS)

clean: ## Remove everything that was made: .venv, build, caches
	@rm -rf .venv build dist *.egg-info .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
