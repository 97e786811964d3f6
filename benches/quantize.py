"""Quantize and dequantize beside bitsandbytes on a CPU: `python -m benches.quantize`.

Codes must be equal before anything is timed, and decoded values bit for bit. The bars of this
project: quantize at least 20 times faster, dequantize at least twice.
"""

from __future__ import annotations

import bitsandbytes.functional as bitsandbytes
import torch
from torch import Tensor

import qlora_rs
from benches.measure import Table, arguments, interleave

BARS = {"quantize": 20.0, "dequantize": 2.0}


def check(weight: Tensor, double_quant: bool) -> None:
    """Same codes; and their tensors decode to their values."""
    ours = qlora_rs.quantize(weight, 64, double_quant)
    codes, state = their_quantize(weight, double_quant)
    assert torch.equal(ours.codes, codes), "codes differ"
    entries = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    packed = qlora_rs.PackedWeight.from_bitsandbytes({"w": codes, **entries}, "w")
    decoded = bitsandbytes.dequantize_4bit(codes, state)
    assert torch.equal(packed.dequantize(weight.dtype), decoded), "decoded values differ"


def their_quantize(weight: Tensor, double_quant: bool) -> tuple:
    return bitsandbytes.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )


def main() -> None:
    parser = arguments("quantize and dequantize beside bitsandbytes")
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table("quantize", ("operation", "dtype", "statistics", "ours ms", "bnb ms", "ratio"))
    worst = dict.fromkeys(BARS, float("inf"))
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(tuple(options.size)).to(dtype)
        for double_quant in (True, False):
            check(weight, double_quant)
            ours = qlora_rs.quantize(weight, 64, double_quant)
            codes, state = their_quantize(weight, double_quant)
            operations = {
                "quantize": {
                    "ours": lambda w=weight, d=double_quant: qlora_rs.quantize(w, 64, d),
                    "bnb": lambda w=weight, d=double_quant: their_quantize(w, d),
                },
                "dequantize": {
                    "ours": ours.dequantize,
                    "bnb": lambda c=codes, s=state: bitsandbytes.dequantize_4bit(c, s),
                },
            }
            for name, contenders in operations.items():
                times = interleave(contenders, options.seconds)
                ratio = times["bnb"] / times["ours"]
                worst[name] = min(worst[name], ratio)
                statistics = "8 bits" if double_quant else "float32"
                milliseconds = (1e3 * times["ours"], 1e3 * times["bnb"])
                kind = str(dtype).removeprefix("torch.")
                table.row(name, kind, statistics, *milliseconds, f"{ratio:.1f}x")
    table.say("")
    table.say(f"weight {list(options.size)}, blocks of 64; medians; ratio: bitsandbytes / ours")
    for name, bar in BARS.items():
        verdict = "met" if worst[name] >= bar else "NOT met"
        table.say(f"{name}: at least {worst[name]:.1f}x in every row (bar {bar:g}x: {verdict})")
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
