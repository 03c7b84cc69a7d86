# Each target sets up what it needs, so any of them can be the first command in a fresh checkout.
# PYTHON=/path/to/python chooses the interpreter, TORCH=cpu the smaller build of torch.
BIN := .venv/bin
FAST := not slow and not gpu and not network and not ray and not browser
CODE := src tests scripts benchmarks

.PHONY: help setup clients fmt check test test-slow test-all quickstart docs bench clean

help:             ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' Makefile

setup:            ## build .venv with everything, or do nothing if it is current
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh scripts/setup.sh

clients:          ## install what the tests of clients in other languages need
	@sh scripts/clients.sh

fmt: setup        ## format the code and sort its imports
	$(BIN)/ruff check --select I --fix $(CODE)
	$(BIN)/ruff format $(CODE)

check: setup      ## format, lint, types, layers, changelog
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_changelog.py

test: setup       ## the fast tests: unit and contract, on all cores
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --durations=10 -m "$(FAST)" tests/unit tests/contract

test-slow: setup clients  ## what `make test` leaves out, except for the longest
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --durations=30 -m "slow and not long and not gpu and not network"

test-all: setup clients   ## every test but those that need a GPU or the internet
	$(BIN)/python -m pytest --durations=10 -m "not gpu and not network"

quickstart: setup ## from images to a verified classifier, on this machine, in minutes
	$(BIN)/fieldmark quickstart

docs: setup       ## write docs/reference/cli.md and run the examples in the documentation
	$(BIN)/python scripts/make_cli_reference.py docs/reference/cli.md
	test ! -e tests/contract/test_docs.py || $(BIN)/python -m pytest tests/contract/test_docs.py

bench: setup      ## the benchmarks, each against its rival
	$(BIN)/python benchmarks/train_step.py

clean:            ## remove what the other targets made, .venv included
	rm -rf .venv .clients dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
