# Each target does the set-up it needs, in .venv, and is quick when nothing changed.
BIN := .venv/bin
PROTOS := $(wildcard protos/sprite_agent/v1/*.proto)
.PHONY: setup demo test check soak format lint protos protos-check protos-baseline bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt tools/setup
	@tools/setup

demo: setup  ## the main job on real input: an agent, a run, an approval, both transports compared
	@$(BIN)/python tools/demo.py

test: setup  ## all the tests
	@$(BIN)/pytest -q -n 3 --dist worksteal -m "not alone"
	@$(BIN)/pytest -q -m alone

check: lint protos-check test  ## what CI runs

soak: setup  ## the fault tests at their nightly figures: hours
	@SOAK=1 $(BIN)/pytest tests/faults tests/properties --timeout 14400

lint: setup
	@$(BIN)/ruff format --check --quiet . tests/standin/superloop
	@$(BIN)/ruff check --quiet . tests/standin/superloop
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: setup
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

protos: setup  ## makes the generated code from protos/
	@$(BIN)/python tools/protos.py generate

protos-check: setup  ## protos are linted, compatible with the baseline, and the generated code is current
	@$(BIN)/python tools/protos.py check

protos-baseline: setup  ## records the present protos as what later ones must stay compatible with
	@$(BIN)/python tools/protos.py baseline

bench: setup  ## benchmarks, all or those of ARGS="replay live --json out.json"; ARGS=--gate: as the tests run them
	@$(BIN)/python -m tools.bench $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
