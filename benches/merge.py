"""Merges beside peft's and beside quantizing the 16-bit merge: `python -m benches.merge`.

For each task of `merge_tasks.py`: an adapter is trained by `qlora-rs finetune`, merged by
`qlora-rs merge` with every method, and all merged models are scored on held-out text against the
unmerged one, whose KL to them is the figure. Rows:

    base        the adapter dropped
    nearest     peft's merge (byte for byte: tests/test_merge.py)
    float       NF4 of the original float weights plus the update: needs the 16-bit base
    calibrated, distilled
    bf16        the unmerged model's weights in 16 bits: not 4-bit, the limit of what is possible

Stages may be run one at a time (`--stage`, `--task`, `--method`); finished ones in `--work` are
kept, so the whole can be interrupted. It takes some half an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import qlora_rs
from benches.measure import Table, arguments
from benches.merge_tasks import TASKS, Task, write_task
from qlora_rs.merging import solve
from qlora_rs.merging.adapted import find_adapted
from qlora_rs.merging.evaluate import compare
from qlora_rs.recipes.base_model import demo_model_path, load_base_model
from qlora_rs.recipes.merge_text import read_calibration
from qlora_rs.recipes.quantized_folder import load_quantized_folder

METHODS = ("nearest", "calibrated", "distilled")
COLUMNS = (
    "task", "merge", "loss", "gain kept", "KL", "KL removed", "same token", "layer ratio",
    "layers worse", "seconds", "CPU seconds", "extra MB",
)  # fmt: skip


def command(*options: str) -> float:
    """Run `qlora-rs`; return the CPU seconds it took."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "qlora_rs", *options, "--quiet"], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before[3]


def train(task: Task, folder: Path) -> None:
    text, _ = write_task(task.name, folder)
    if (folder / "run" / "adapter").exists():
        return
    options = [part for option in task.options.items() for part in option]
    paths = ("--data", str(text), "--output", str(folder / "run"))
    command("finetune", "--model", str(demo_model_path()), *paths, *options)


def merge(folder: Path, method: str) -> None:
    output = folder / method
    if output.exists():
        return
    text = ("--calibration", str(folder / "train.jsonl"))
    held_out = ("--evaluation", str(folder / "held-out.jsonl"))
    paths = (str(demo_model_path()), str(folder / "run" / "adapter"), str(output))
    seconds = command("merge", *paths, "--method", method, *text, *held_out)
    (output / "cpu.json").write_text(json.dumps(seconds))


def score(task: Task, folder: Path, table: Table, tokens: int) -> None:
    original = load_base_model(demo_model_path(), "float32")
    model = load_base_model(demo_model_path(), "float32").model
    qlora_rs.load_adapter(qlora_rs.quantize_model(model), folder / "run" / "adapter").eval()
    held_out = read_calibration(folder / "held-out.jsonl", original.tokenizer, tokens, 512)
    layers = find_adapted(model)
    variants = {"base": {m.name: m.merged(m.packed) for m in layers}}
    for method in METHODS:
        if not (folder / method).exists():
            table.say(f"{task.name}: {method} was not merged (--stage merge)")
            continue
        merged = load_quantized_folder(folder / method, "float32").model
        variants[method] = {m.name: merged.get_submodule(m.name) for m in layers}
    variants["float"] = {
        m.name: m.merged(
            solve.quantize_like(
                m.packed, original.model.get_submodule(m.name).weight.detach() + m.delta()
            )
        )
        for m in layers
    }
    variants["bf16"] = {m.name: sixteen_bits(m.target()) for m in layers}
    loss, scores, count = compare(model, variants, held_out)
    gain, plain = scores["base"].loss - loss, scores["nearest"].kl
    table.say(f"{task.name}: {count} held-out answer tokens, loss of the unmerged model {loss:.4f}")
    for name, found in scores.items():
        kept = (scores["base"].loss - found.loss) / gain
        report = folder / name / "merge.json"
        rest = costs(report) if report.exists() else ("", "", "", "", "")
        removed = 1.0 - found.kl / plain
        row = (found.loss, kept, found.kl, removed, found.top1_agreement, *rest)
        table.row(task.name, name, *row)


def costs(report: Path) -> tuple:
    held = json.loads(report.read_text())
    summary, seconds = held["summary"], held["seconds"]
    spent = sum(seconds.get(stage, 0.0) for stage in ("round", "calibrate", "distill"))
    return (
        summary["mean_ratio_to_nearest"],
        str(summary["layers_worse_than_nearest"]),
        spent,
        json.loads((report.parent / "cpu.json").read_text()),
        held["extra_bytes"] / 1e6,
    )


def sixteen_bits(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.bfloat16().float(), requires_grad=False)
    return linear


def one_layer(table: Table, width: int = 4096) -> None:
    """A layer of a 7 B model: statistics given, everything else timed."""
    torch.manual_seed(0)
    inputs = torch.randn(8192, width) * torch.rand(width)
    moment = inputs.t() @ inputs / inputs.shape[0]
    packed = qlora_rs.quantize(torch.randn(width, width) * 0.02)
    target = packed.dequantize() + torch.randn(width, 16) @ torch.randn(16, width) * 4e-5
    start = time.perf_counter()
    nearest = solve.quantize_like(packed, target)
    result = solve.calibrate(target, nearest, solve.Curvature.of(moment, 64))
    seconds = time.perf_counter() - start
    errors = [solve.energy(target - p.dequantize(), moment) for p in (result, nearest)]
    assert errors[0] < errors[1]
    ratio = (errors[0] / errors[1]) ** 0.5
    table.say(f"one layer of {width} x {width}: {seconds:.1f} s, error {ratio:.3f} of nearest's")


def main() -> None:
    parser = arguments("merges beside peft's")
    parser.add_argument("--work", type=Path, default=Path("merge-bench"), help="%(default)s")
    parser.add_argument("--stage", choices=("train", "merge", "score"))
    parser.add_argument("--task", choices=[task.name for task in TASKS])
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--tokens", type=int, default=6000, help="held out (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("merge", COLUMNS) if options.stage in (None, "score") else None
    for task in TASKS:
        folder = options.work / task.name
        if options.task not in (None, task.name):
            continue
        if options.stage in (None, "train"):
            train(task, folder)
        if options.stage in (None, "merge"):
            for method in METHODS:
                if options.method in (None, method):
                    merge(folder, method)
        if table is not None:
            score(task, folder, table, options.tokens)
    if table is not None:
        one_layer(table)
        table.say("")
        table.say("KL(unmerged ‖ merged) in nats per token; scored in float32, merged in bfloat16.")
        table.say("layer ratio: output error / nearest's, mean over layers, on the held-out text.")
        table.say("seconds: wall clock of solving; CPU seconds: of the whole command.")
        if options.record:
            table.record()


if __name__ == "__main__":
    main()
