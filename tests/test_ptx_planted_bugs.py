"""The emulator accepts correct kernels under every schedule and rejects every planted bug."""

from __future__ import annotations

import numpy as np
import pytest
from planted_bugs import KERNELS, Bug, Kernel
from ptx_emulator import Refusal

SCHEDULES = ["ascending", "descending", "ahead", "random:1", "random:2"]
ALL_BUGS = [(kernel, bug) for kernel in KERNELS for bug in kernel.bugs]
VERDICTS: list[tuple[str, str, str]] = []


@pytest.fixture(scope="module", autouse=True)
def _table(request):
    """Print the table of verdicts when the module has run."""
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        for kernel, bug, said in VERDICTS:
            print(f"  {kernel:<28} {bug:<48} {said}")


def verdict(kernel: Kernel, module, **options) -> str:
    """What is said of one launch: a complaint, what gives the bug away, or "accepted"."""
    try:
        result = kernel.launch(module, instruction_limit=20_000_000, **options)
    except Refusal as refusal:
        return refusal.complaint
    pairs = zip(result.arrays, kernel.expected(), strict=True)
    if not all(np.array_equal(array, expected) for array, expected in pairs):
        return "wrong-result"
    counters = result.counters
    conflicts = counters["shared_wavefronts"] > counters["shared_wavefronts_ideal"]
    return "bank-conflicts" if conflicts else "accepted"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_correct_kernel_is_accepted_under_every_schedule(kernel):
    for arch in ("sm_80", "sm_90", "sm_120"):
        module = kernel.module(arch=arch)
        for schedule in SCHEDULES:
            for timing in ("latest", "earliest"):
                said = verdict(kernel, module, schedule=schedule, async_timing=timing)
                assert said == "accepted", f"{arch} {schedule} {timing}"


@pytest.mark.parametrize(("kernel", "bug"), ALL_BUGS, ids=lambda item: item.name)
def test_a_planted_bug_is_rejected_with_its_complaint(kernel: Kernel, bug: Bug):
    module = kernel.module(bug)
    said = [
        verdict(kernel, module, schedule=schedule, async_timing=timing)
        for schedule, timing in [
            ("ascending", "latest"),
            ("descending", "latest"),
            ("random:1", "latest"),
            ("ascending", "earliest"),
        ]
    ]
    VERDICTS.append((kernel.name, bug.name, ", ".join(dict.fromkeys(said))))
    assert bug.complaint in said
    assert set(said) <= {bug.complaint, *bug.also}


def test_at_least_25_bugs_are_planted():
    assert len({(kernel.name, bug.name) for kernel, bug in ALL_BUGS}) >= 25
