"""SmolLM2-135M end to end: training and decoding, ours beside peft + bitsandbytes.

    python -m benches.smollm2 [--record]

Each side runs in processes of its own (so that peak memory is its own), in turn, the same loop on
the same tokens: forward, the model's loss, backward, torch's AdamW on the adapter, bf16, r=16 on
all linear layers. Ours calls `qlora_rs.fuse_loss`, as the README advises. Before timing, the first
losses of both sides must agree: the same base and adapters that start at zero.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from benches.measure import Table

SHAPES = ((2, 256), (1, 64))
SIDES = ("ours", "bitsandbytes")
DECODED = 24


def build(side: str):
    """The model with adapters, as a user of either library builds it."""
    import torch

    from qlora_rs.recipes.base_model import demo_model_path, load_base_model

    torch.manual_seed(0)
    model = load_base_model(demo_model_path(), "bfloat16").model
    if side == "ours":
        import qlora_rs

        qlora_rs.add_lora(qlora_rs.quantize_model(model), r=16, alpha=32)
        return qlora_rs.fuse_loss(model)
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            layer.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.to("cpu"))
    model.requires_grad_(False)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(side: str, rows: int, tokens: int, steps: int) -> dict:
    """Seconds of each step, the first loss, and the process's peak memory."""
    import torch

    model = build(side).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4)
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    before = _peak_bytes()
    for _ in range(steps + 2):
        ids = torch.randint(0, 49152, (rows, tokens), generator=generator)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {
        "seconds": statistics.median(seconds[2:]),
        "loss": losses[0],
        "peak_bytes": _peak_bytes(),
        "peak_bytes_before": before,
    }


def decode(side: str) -> dict:
    """Greedy tokens per second with the adapter on, after a prompt of 16 tokens."""
    import torch

    model = build(side).eval()
    ids = torch.arange(100, 116)[None]
    ask = {"do_sample": False, "min_new_tokens": DECODED, "max_new_tokens": DECODED}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=mask, **ask)
        start = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=mask, **ask)
    seconds = (time.perf_counter() - start) / (out.shape[1] - ids.shape[1])
    return {"seconds": seconds, "text": out[0].tolist(), "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _worker(*arguments: str) -> dict:
    command = [sys.executable, "-m", "benches.smollm2", "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run both sides in turn and print a table with ratios (peer / ours for time and memory)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worker", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.worker:
        kind, side, *numbers = options.worker
        work = train(side, *map(int, numbers)) if kind == "train" else decode(side)
        print(json.dumps(work))
        return
    table = Table(
        "smollm2",
        (
            "task",
            "ours tokens/s",
            "bnb tokens/s",
            "speed ratio",
            "ours MB",
            "bnb MB",
            "memory ratio",
        ),
    )
    tasks = [("train", *map(str, shape), str(options.steps)) for shape in SHAPES] + [("decode",)]
    for kind, *numbers in tasks:
        runs: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                runs[side].append(_worker(kind, side, *numbers))
        ours, peer = (runs[side] for side in SIDES)
        if kind == "train":
            assert abs(ours[0]["loss"] - peer[0]["loss"]) < 0.05, (ours[0], peer[0])
        count = int(numbers[0]) * int(numbers[1]) if kind == "train" else 1
        speeds = [count / statistics.median(r["seconds"] for r in side) for side in (ours, peer)]
        peaks = [statistics.median(r["peak_bytes"] for r in side) / 1e6 for side in (ours, peer)]
        table.row(
            " ".join([kind, "x".join(numbers[:2])]).strip(),
            f"{speeds[0]:.1f}",
            f"{speeds[1]:.1f}",
            f"{speeds[0] / speeds[1]:.2f}x",
            f"{peaks[0]:.0f}",
            f"{peaks[1]:.0f}",
            f"{peaks[0] / peaks[1]:.2f}x",
        )
    table.say("speed ratio: ours / peer; memory ratio: peak resident size, ours / peer")
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
