"""Builds the measuring programs in benches/*.rs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(name: str) -> Path:
    """Compile one of the crate's bench targets, optimized like the extension; return it."""
    if shutil.which("cargo") is None:
        raise SystemExit("cargo is not installed: get a Rust toolchain from https://rustup.rs")
    command = ["cargo", "bench", "--no-run", "--locked", "--bench", name]
    messages = subprocess.run(
        [*command, "--message-format=json-render-diagnostics"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if messages.returncode:
        raise SystemExit(f"{name}.rs does not compile; what cargo says stands above")
    artifacts = map(json.loads, messages.stdout.splitlines())
    programs = [a["executable"] for a in artifacts if a.get("executable")]
    return Path(programs[-1])


def compiler() -> str:
    """The compiler's version: it decides which instructions are run."""
    version = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True)
    return version.stdout.strip()
