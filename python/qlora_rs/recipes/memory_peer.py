"""Measures what a training step needs in memory, 4-bit against float, each in a fresh process.

    python -m qlora_rs.recipes.memory_peer CONFIG_DIRECTORY nf4|float TOKENS DTYPE

Memory does not depend on the weights' values, so the model is built from its configuration with
random ones. Both sides take the same steps: the same tokens, LoRA r=16 on all linear layers but
the LM head (ours on NF4, sped up as ``finetune`` does it; peft's on the float model), AdamW. What
is measured, in this order:

    weight_bytes   parameters and buffers of the base, counted exactly
    model_bytes    resident memory that building the model added to the process
    step_bytes     the largest resident memory during two training steps, above the process before
                   the model was built

Resident memory is the operating system's count and includes what the allocator keeps. It is read
from Linux's /proc; elsewhere ``compare_memory`` returns None.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlora_rs.errors import QloraError
from qlora_rs.recipes.process_memory import forget_peak, peak, release, resident

METHODS = ("nf4", "float")


def compare_memory(model: Any, tokens: int, dtype: str) -> dict[str, dict[str, Any]] | None:
    """Measure both methods for a model of this configuration, one fresh process each.

    model: a transformers model; only its configuration is used. tokens: length of the row trained
    on. Returns {"nf4": ..., "float": ...}, or None when a measurement fails (peft missing).
    """
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        results = {}
        for method in METHODS:
            command = [sys.executable, "-m", __name__, directory, method, str(tokens), dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return None
            results[method] = json.loads(done.stdout.strip().split("\n")[-1])
    return results


def measure(directory: Path, method: str, tokens: int, dtype: str) -> dict[str, Any]:
    """Build, train two steps, and report the numbers described at the top of this file."""
    import torch
    import transformers

    from qlora_rs.recipes.report import model_bytes

    if method not in METHODS:
        raise QloraError(f"the method must be one of {', '.join(METHODS)}, got {method!r}")
    # Work done once per process (thread pools, kernels' workspaces) is not the model's memory.
    torch.nn.Linear(64, 64)(torch.zeros(4, 64)).sum().backward()
    before = resident()
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model, base_bytes = _prepare(model, method, model_bytes)
    release()
    built = resident()
    if not forget_peak():
        raise QloraError("the peak memory cannot be reset here (/proc/self/clear_refs)")
    _train(model, tokens, config.vocab_size)
    most = peak()
    known = before is not None and built is not None and most is not None
    return {
        "method": method,
        "weight_bytes": base_bytes,
        "model_bytes": built - before if known else None,  # type: ignore[operator]
        "step_bytes": most - before if known else None,  # type: ignore[operator]
    }


def _prepare(model: Any, method: str, count: Any) -> tuple[Any, int]:
    """Attach LoRA in the way of ``method``; return the model and the bytes of its base."""
    if method == "nf4":
        import qlora_rs

        qlora_rs.quantize_model(model, skip=("lm_head",))
        base_bytes = count(model)
        qlora_rs.speed_up(qlora_rs.add_lora(model, r=16, alpha=32))
        return model, base_bytes
    import peft

    base_bytes = count(model)
    adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return peft.get_peft_model(model, adapter), base_bytes


def _train(model: Any, tokens: int, vocabulary: int) -> None:
    import torch

    from qlora_rs.fusion import deferred_logits

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, tokens), generator=generator)
    answers = torch.arange(0, tokens - 1, 4)  # a quarter of the positions, as in answer-only loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    model.train()
    for _ in range(2):  # the optimizer's moments exist from the second step on
        with deferred_logits(model):  # as finetune asks for its loss
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=answers).logits
        loss = torch.nn.functional.cross_entropy(logits[0].float(), ids[0, answers + 1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])))
