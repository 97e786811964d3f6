"""SmolLM2-135M end to end: training and decoding, ours beside peft + bitsandbytes.

    python -m benches.smollm2 [--record]

Each side runs in processes of its own (so that peak memory is its own, libraries included), in
turn, the same loop on the same tokens: forward, the loss, backward, torch's AdamW on the adapter,
bf16, r=16 on all linear layers, from the same 4-bit folder. Ours calls `speed_up`, as the README
advises. Before timing, the first losses of both sides must agree: the same base and adapters that
start at zero. A third side, `rest`, is ours with layers that take no time, called one by one
(`smollm2_sides.py`): the ratio that it reaches bounds whoever replaces these layers alone. Memory
has a bound, too: a process that imports torch and transformers' model class (to train, also makes a
torch optimizer, which imports torch's compiler) and does nothing else, plus the tensors that must
be there: weights, the adapter, its gradients and the optimizer's state, without any activation.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

# A worker imports what its side needs and nothing else; benches.measure imports every peer.
if TYPE_CHECKING:
    from torch import Tensor, nn

    from benches.measure import Table

SHAPES = ((2, 256), (1, 64))
SIDES = ("ours", "bitsandbytes", "rest")
DECODED = 24


def train(side: str, folder: str, rows: int, tokens: int, steps: int) -> dict:
    """Seconds of each step, the first loss, and the process's peak memory."""
    import torch

    from benches.smollm2_sides import build

    model = build(side, Path(folder)).train()
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
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    gradients = sum(p.nbytes for p in trainable)
    return {
        "seconds": statistics.median(seconds[2:]),
        "loss": losses[0],
        "peak_bytes": _peak_bytes(),
        "peak_bytes_before": before,
        "held_bytes": _bytes(*_tensors(model), *state) + gradients,
    }


def decode(side: str, folder: str) -> dict:
    """Greedy tokens per second with the adapter on, after a prompt of 16 tokens."""
    import torch

    from benches.smollm2_sides import build

    model = build(side, Path(folder)).eval()
    ids = torch.arange(100, 116)[None]
    ask = {"do_sample": False, "min_new_tokens": DECODED, "max_new_tokens": DECODED}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=mask, **ask)
        start = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=mask, **ask)
    seconds = (time.perf_counter() - start) / (out.shape[1] - ids.shape[1])
    return {
        "seconds": seconds,
        "text": out[0].tolist(),
        "peak_bytes": _peak_bytes(),
        "held_bytes": _bytes(*_tensors(model)),
    }


def libraries(kind: str) -> dict:
    """The peak memory of a process that imports what all sides need, and computes nothing."""
    import torch
    from transformers import LlamaForCausalLM

    assert issubclass(LlamaForCausalLM, torch.nn.Module)
    if kind == "train":
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    return {"peak_bytes": _peak_bytes()}


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers; tied ones once."""
    return [*model.parameters(), *model.buffers()]


def _bytes(*tensors: Tensor) -> int:
    """Of the memory behind tensors, which some may share."""
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(stores.values())


def _peak_bytes() -> int:
    """Of this program; getrusage's figure has that of the process that started it in it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


def _worker(*arguments: str) -> dict:
    command = [sys.executable, "-m", "benches.smollm2", "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, table: Table, folder: str) -> None:
    """Fill the table."""
    tasks = [("train", *map(str, shape), str(options.steps)) for shape in SHAPES] + [("decode",)]
    for kind, *numbers in tasks:
        runs: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                runs[side].append(_worker(kind, side, folder, *numbers))
        ours, peer, _ = (runs[side] for side in SIDES)
        if kind == "train":
            assert abs(ours[0]["loss"] - peer[0]["loss"]) < 0.05, (ours[0], peer[0])
        count = int(numbers[0]) * int(numbers[1]) if kind == "train" else 1
        speeds = [count / statistics.median(r["seconds"] for r in runs[side]) for side in SIDES]
        peaks = [statistics.median(r["peak_bytes"] for r in side) / 1e6 for side in (ours, peer)]
        least = (_worker("libraries", kind)["peak_bytes"] + ours[0]["held_bytes"]) / 1e6
        table.row(
            " ".join([kind, "x".join(numbers[:2])]).strip(),
            f"{speeds[0]:.1f}",
            f"{speeds[1]:.1f}",
            f"{speeds[0] / speeds[1]:.2f}x",
            f"{speeds[2] / speeds[1]:.2f}x",
            f"{peaks[0]:.0f}",
            f"{peaks[1]:.0f}",
            f"{peaks[0] / peaks[1]:.2f}x",
            f"{least / peaks[1]:.2f}x",
        )


def main() -> None:
    """Run both sides in turn and print a table with ratios (peer / ours for time and memory)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worker", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.worker and options.worker[0] == "write":
        from benches.smollm2_sides import write_folder

        return write_folder(Path(options.worker[1]))
    if options.worker and options.worker[0] == "libraries":
        print(json.dumps(libraries(options.worker[1])))
        return
    if options.worker:
        kind, side, folder, *numbers = options.worker
        steps = map(int, numbers)
        work = train(side, folder, *steps) if kind == "train" else decode(side, folder)
        print(json.dumps(work))
        return
    from benches.measure import Table

    table = Table(
        "smollm2",
        (
            "task",
            "ours tokens/s",
            "bnb tokens/s",
            "speed ratio",
            "its bound",
            "ours MB",
            "bnb MB",
            "memory ratio",
            "its least",
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "benches.smollm2", "--worker", "write", folder], check=True
        )
        measure(options, table, folder)
    table.say(
        "speed ratio: ours / peer; its bound: with adapted layers that take no time; "
        "memory ratio: peak resident size, ours / peer; its least: with imports and lasting "
        "tensors alone"
    )
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
