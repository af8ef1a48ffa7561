# Two commands on a fresh machine: make quickstart, make test. Both set up .venv first, and do nothing twice.
PYTHON ?= python3
# Another wheel index for torch, such as PyTorch's own CPU or ROCm index; empty = the default one.
TORCH_INDEX ?=
BIN := .venv/bin
SOURCES := platform telemetry gnn dashboards tests

.PHONY: help setup setup-dev setup-bench quickstart check test dashboards demo bench clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make .venv with what a run needs
	@$(PYTHON) .ci/setup.py platform "$(TORCH_INDEX)"

setup-dev: ## the same, with the tools of the tests
	@$(PYTHON) .ci/setup.py dev "$(TORCH_INDEX)"

quickstart: setup ## run the whole funnel on the sample corpus, into runs/quickstart
	@echo "wattier quickstart: search, selection, training, report; a few minutes on two cores"
	@$(BIN)/wattier run configs/quickstart.yaml

check: setup-dev ## lint, types, import layers
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy platform/wattier telemetry/wattier_telemetry gnn/wattier_gnn dashboards/build.py dashboards/demo.py
	$(BIN)/lint-imports

test: check ## everything that must hold: check, then all tests
	@$(BIN)/python .ci/test.py

dashboards: setup-dev ## regenerate the Grafana dashboards
	$(BIN)/python dashboards/build.py

demo: setup-dev ## a replayed campaign under a real Prometheus: no GPU, no Docker
	@$(BIN)/python dashboards/demo.py

setup-bench: setup-dev ## the same, with the searches that ours is held against
	@$(PYTHON) .ci/setup.py bench "$(TORCH_INDEX)"

bench: setup-bench ## side-by-side timings; they gate nothing
	$(BIN)/python tests/bench.py
	$(BIN)/python tests/bench_model.py
	$(BIN)/python tests/bench_training.py
	$(BIN)/python tests/bench_data.py --structures 200000
	$(BIN)/python tests/bench_telemetry.py
	$(BIN)/python tests/bench_energy_model.py
	$(BIN)/python tests/bench_scale.py
	$(BIN)/python tests/bench_search.py --cache .bench-search # an hour or so; what has run is kept

clean: ## remove what the other targets made, but no run
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
