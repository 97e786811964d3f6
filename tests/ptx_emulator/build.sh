#!/usr/bin/env bash
# Builds the emulator's Python face and puts it beside the package; quick when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release --locked --quiet --package ptx-emulator --features python,pyo3/extension-module
target=${CARGO_TARGET_DIR:-target}/release/libptx_emulator.so
# Replaced atomically: another process may have the old one loaded.
cp "$target" tests/ptx_emulator/_native.new
mv tests/ptx_emulator/_native.new tests/ptx_emulator/_native.abi3.so
