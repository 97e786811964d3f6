"""Products beside torch's dense layer and bitsandbytes' Linear4bit: `python -m benches.linear`.

Plain layers, and layers with LoRA of rank 16 (the peer is peft over Linear4bit). bitsandbytes has
two paths on a CPU: the autograd path dequantizes the matrix and multiplies; the eval path, taken in
eval mode where x wants no gradient and the CPU multiplies bf16, repacks the weight in place and
computes in bf16 whatever x is. Ours and torch's are timed in both modes. onnxruntime's 4-bit
product in f32 (of other bytes, see `onnx_peer.py`) stands beside plain layers of f32. Answers are
checked first. What the adapter adds to forward and backward of a layer is measured in turns with
the plain layer.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from torch import nn

from benches import peers
from benches.measure import Table, arguments, interleave
from benches.onnx_peer import OnnxProduct
from qlora_rs import PackedWeight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = (
    "ours", "ours eval", "torch dense", "dense eval", "bnb autograd", "bnb eval", "onnxruntime"
)  # fmt: skip
# Each peer against us in the same mode.
RATIOS = (
    ("torch dense", "ours"),
    ("dense eval", "ours eval"),
    ("bnb autograd", "ours"),
    ("bnb eval", "ours eval"),
    ("onnxruntime", "ours eval"),
)
# onnxruntime and torch have threads of their own, and torch's wait busily for some milliseconds
# after a call: turns are longer where both run, so that this weighs little.
TWO_POOLS_SAMPLE = 0.05
ADAPTER_ROWS = 512


def contenders(
    layers: dict[str, nn.Module],
    packed: PackedWeight,
    rows: int,
    dtype: torch.dtype,
    backward: bool,
) -> dict[str, Callable[[], object]]:
    """The calls to time, by column, each one checked."""
    x = torch.randn(rows, packed.shape[1]).to(dtype)
    exact = peers.exact_product(x, packed, layers["ours"])
    seed = torch.randn(rows, packed.shape[0]).to(dtype)
    calls: dict[str, Callable[[], object]] = {}
    for name, layer in layers.items():
        evaluation = "eval" in name
        if evaluation and backward:
            continue  # no gradients there
        inputs = x.clone().requires_grad_(not evaluation)
        peers.check(name, layer(inputs), exact, dtype)
        if backward:
            calls[name] = peers.forward_backward(layer, inputs, seed)
        else:
            calls[name] = peers.forward(layer, inputs, training=not evaluation)
    return calls


def measure(options: argparse.Namespace, table: Table) -> list[str]:
    """Fill the table; return where bitsandbytes is the faster one."""
    packed = peers.packed_weight(*options.size)
    build = {
        "linear": lambda dtype: peers.linear_layers(packed, dtype),
        "lora": lambda dtype: peers.lora_layers(packed, dtype, options.rank),
    }
    in_features = packed.shape[1]
    plain_f32 = "linear" in options.layers and "float32" in options.dtypes
    onnx = OnnxProduct(packed, options.threads) if plain_f32 else None
    slower = []
    for kind, dtype, backward, rows in itertools.product(
        options.layers, options.dtypes, (False, True), options.rows
    ):
        layers = build[kind](DTYPES[dtype])
        calls = contenders(layers, packed, rows, DTYPES[dtype], backward)
        times = interleave(calls, options.seconds)
        both: dict[str, float] = {}
        if onnx is not None and (kind, dtype, backward) == ("linear", "float32", False):
            pair = {
                "ours eval": calls["ours eval"],
                "onnxruntime": onnx.forward(torch.randn(rows, in_features)),
            }
            both = interleave(pair, options.seconds, TWO_POOLS_SAMPLE)
            times["onnxruntime"] = both["onnxruntime"]
        cells = [f"{1e3 * times[name]:.3g}" if name in times else "-" for name in COLUMNS]
        ratios = {peer: times[peer] / times[us] for peer, us in RATIOS if peer in times}
        if both:
            ratios["onnxruntime"] = both["onnxruntime"] / both["ours eval"]
        shown = [f"{ratios[peer]:.2f}x" if peer in ratios else "-" for peer, _ in RATIOS]
        step = "forward+backward" if backward else "forward"
        table.row(kind, dtype, step, str(rows), *cells, *shown)
        slower += [
            f"{kind} {dtype} {step}, {rows} rows: {peer} takes {ratio:.2f} of our time"
            for peer, ratio in ratios.items()
            if ratio < 1 and peer.startswith("bnb")
        ]
    return slower


def adapter_cost(options: argparse.Namespace, table: Table) -> None:
    """What LoRA adds to forward and backward (dX, dA, dB beside dX), base and adapter in turns."""
    packed = peers.packed_weight(*options.size)
    for dtype in options.dtypes:
        layers = peers.lora_layers(packed, DTYPES[dtype], options.rank)
        plain = peers.linear_layers(packed, DTYPES[dtype])
        x = torch.randn(ADAPTER_ROWS, packed.shape[1]).to(DTYPES[dtype]).requires_grad_()
        seed = torch.randn(ADAPTER_ROWS, packed.shape[0]).to(DTYPES[dtype])
        pairs = {"ours": "ours", "peft over bitsandbytes": "bnb autograd"}
        calls = {
            (who, adapter): peers.forward_backward(kind[name], x, seed)
            for who, name in pairs.items()
            for adapter, kind in ((False, plain), (True, layers))
        }
        times = interleave(calls, 4 * options.seconds)
        added = {who: times[who, True] / times[who, False] - 1 for who in pairs}
        table.say(
            f"LoRA of rank {options.rank} adds to forward and backward of {ADAPTER_ROWS} rows of "
            f"{dtype}: " + ", ".join(f"{who} {share:+.1%}" for who, share in added.items())
        )


def main() -> None:
    parser = arguments("linear and lora_linear beside torch, bitsandbytes and peft")
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 8, 32, 128, 512, 2048))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--layers", nargs="+", choices=("linear", "lora"), default=("linear", "lora")
    )
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ratios = [f"{peer.removeprefix('torch ').removeprefix('bnb ')}/{us}" for peer, us in RATIOS]
    size = "x".join(map(str, options.size))
    name = "linear" if size == "4096x4096" else f"linear-{size}"
    table = Table(name, ("layer", "dtype", "pass", "rows", *COLUMNS, *ratios))
    slower = measure(options, table)
    table.say("")
    table.say(
        f"weight {list(options.size)}, NF4 with double quantization, rank {options.rank}; "
        "milliseconds, medians of calls in turns; lora: torch dense and bitsandbytes under peft"
    )
    if "lora" in options.layers:
        adapter_cost(options, table)
    table.say("slower than bitsandbytes: " + (f"{len(slower)} rows" if slower else "nowhere"))
    for line in slower:
        table.say("  " + line)
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
