"""The GPU part of ``qlora-rs doctor``: what the CUDA kernels need, and what adds it."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any

CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
# What the kernels are compiled for on a machine without a GPU, to see whether they compile.
SOME_ARCHITECTURE = 80


def gpu_report() -> dict[str, Any]:
    """Everything about the GPU; raises for nothing that is merely missing.

    Returns name and compute capability of the GPU (None without one), a sentence about it, and for
    each of torch, nvrtc, cupy and kernels {"found", "add"}: what is there, and the command that
    adds what is not (None where nothing is needed).

    >>> sorted(gpu_report()["needs"])
    ['cupy', 'kernels', 'nvrtc', 'torch']
    """
    import torch

    name, capability = None, None
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        capability = torch.cuda.get_device_capability(0)
    cuda = torch.version.cuda
    extra = "cuda12" if (cuda or "13").split(".")[0] == "12" else "cuda13"
    command = f'pip install "qlora_rs[{extra}]"'
    needs = {
        "torch": _torch(cuda),
        "nvrtc": _nvrtc(command),
        "cupy": _cupy(command),
    }
    needs["kernels"] = _kernels(capability, needs)
    return {"name": name, "capability": capability, "detail": _detail(name, cuda), "needs": needs}


def _need(found: str | None, add: str | None = None) -> dict[str, str | None]:
    return {"found": found, "add": add}


def _detail(name: str | None, cuda: str | None) -> str:
    if name is not None:
        return "matrices on it are packed and multiplied there"
    if not Path("/proc/driver/nvidia/version").exists():
        return "no NVIDIA GPU; everything runs on the CPU"
    if cuda is None:
        return "an NVIDIA driver is present, but this torch is built without CUDA"
    return (
        f"an NVIDIA driver is present, but torch cannot use it: CUDA {cuda} may need a newer "
        "driver, or CUDA_VISIBLE_DEVICES hides the GPU"
    )


def _torch(cuda: str | None) -> dict[str, str | None]:
    if cuda is None:
        return _need(None, "pip install --force-reinstall torch  # PyPI's Linux wheel has CUDA")
    return _need(f"built for CUDA {cuda}")


def _nvrtc(command: str) -> dict[str, str | None]:
    from qlora_rs import nvrtc

    if nvrtc.library() is None:
        return _need(None, command)
    return _need(".".join(map(str, nvrtc.version())))


def _cupy(command: str) -> dict[str, str | None]:
    for package in CUPY_PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        try:
            import cupy  # noqa: F401
        except ImportError as error:
            return _need(f"{package} {version} is installed but not importable: {error}", command)
        return _need(f"{package} {version}")
    return _need(None, command)


def _kernels(
    capability: tuple[int, int] | None, needs: dict[str, dict[str, str | None]]
) -> dict[str, str | None]:
    """Compile the kernels of the usual layer; on a GPU, run them and compare with the CPU."""
    import torch

    from qlora_rs import kernel_cache, kernels
    from qlora_rs.errors import QloraError

    if needs["nvrtc"]["found"] is None:
        return _need(None, needs["nvrtc"]["add"])
    started = time.monotonic()
    try:
        if capability is not None and needs["cupy"]["add"] is None:
            return _need(_self_test())
        launch = kernels.dequantize_nf4(64, torch.bfloat16, 64, True)
        kernels.compile_kernel(launch.kernel, launch.constants, SOME_ARCHITECTURE)
    except QloraError as error:
        return _need(f"FAILED: {error}")
    seconds = time.monotonic() - started
    return _need(
        f"compile for sm_{SOME_ARCHITECTURE} in {seconds:.2f} s; kept in {kernel_cache.folder()}"
    )


def _self_test() -> str:
    """Pack and decode one matrix on the GPU and on the CPU."""
    import torch

    import qlora_rs

    weight = torch.randn(512, 520, generator=torch.Generator().manual_seed(0))
    ours, theirs = qlora_rs.quantize(weight), qlora_rs.quantize(weight.to("cuda"))
    pairs = [
        *zip(ours.arguments()[:5], theirs.arguments()[:5], strict=True),
        (ours.dequantize(), theirs.dequantize()),
    ]
    same = all(torch.equal(cpu, gpu.cpu()) for cpu, gpu in pairs)
    return "run, with the CPU's bytes" if same else "FAILED: other bytes than on the CPU"


def gpu_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as lines of a table; without a GPU, what one would need stays short."""
    capability = report["capability"]
    name = report["name"] or "none"
    if capability is not None:
        name += f" (compute capability {capability[0]}.{capability[1]})"
    rows = [("gpu", name), ("", report["detail"])]
    for need, state in report["needs"].items():
        found, add = state["found"], state["add"]
        missing = f"{found or 'missing'}: {add}" if add else (found or "missing")
        if add and report["name"] is None and need in ("nvrtc", "cupy", "kernels"):
            missing = f"{found or 'missing'}; matters only with a GPU, where this adds it: {add}"
        rows.append((f"gpu {need}", missing))
    return rows
