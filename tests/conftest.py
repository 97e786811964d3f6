"""Hypothesis profiles, and a way to run code in a fresh process on a chosen CPU path."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

# Before transformers is imported anywhere: no test may look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, register_random, settings

SLOW_IS_FINE = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],
    # Not `explain`: lines of torch that only a failing example reached say nothing about ours.
    "phases": [phase for phase in Phase if phase is not Phase.explain],
}
settings.register_profile("dev", max_examples=50, **SLOW_IS_FINE)
# The same examples each time, so that a run says something about the change it tests; new ones are
# looked for by HYPOTHESIS_PROFILE=night.
settings.register_profile("ci", max_examples=100, derandomize=True, **SLOW_IS_FINE)
settings.register_profile("night", max_examples=1_000, print_blob=True, **SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class TorchRandom:
    """torch's generator, so that an example that fails once fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
register_random(TORCH_RANDOM)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--beside-gpu",
        action="store_true",
        help="repeat launches of the PTX emulator on this machine's GPU and compare the bytes",
    )


@pytest.fixture(scope="session", autouse=True)
def _beside_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--beside-gpu"):
        yield
        return
    import beside_gpu
    from ptx_emulator import Module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "launch", beside_gpu.beside(Module.launch))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--beside-gpu"):
        import beside_gpu

        counts = f"{beside_gpu.compared} launches compared with the GPU"
        terminalreporter.write_line(f"{counts}, {beside_gpu.left_out} left out")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run source text in a fresh interpreter; kill it, and fail, when it takes too long."""

    def run(code: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
            check=False,
        )

    return run


@pytest.fixture
def cpu_path(run_python: Callable) -> Callable[[str, str], str]:
    """What source text prints when it runs with QLORA_RS_CPU set to a path."""

    def run(path: str, code: str) -> str:
        done = run_python(code, QLORA_RS_CPU=path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def torch_threads() -> object:
    """Give the test a free hand with torch.set_num_threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
