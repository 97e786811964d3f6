"""The profile of a kernel: names a reader knows, and bytes that add up."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from benches import cuda_profile


@pytest.mark.parametrize("kernel", cuda_profile.KERNELS)
def test_a_profile_names_parameters_and_shows_the_source(
    kernel: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_profile", kernel, "--rows", "64", "--columns", "256"])
    cuda_profile.main()
    text = capsys.readouterr().out
    weight = torch.empty(64, 256, dtype=torch.bfloat16)
    needed = cuda_profile.needed_bytes(kernel, weight)
    assert set(needed) < set(cuda_profile.parameters(kernel))
    rows = [line.split() for line in text.splitlines()]
    for name, count in needed.items():
        (row,) = [row for row in rows if row[:1] == [name]]
        # A statistic may fill a part of its sector.
        used = int(row[2].replace(",", "")) + int(row[3].replace(",", ""))
        assert count <= used < count + cuda_profile.SECTOR, name
    assert "argument" not in text
    assert re.search(rf"\n +[\d,]+ +[\d.]+% .*  {kernel}\.cu:\d+  .*\w", text)
