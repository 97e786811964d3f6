"""On an NVIDIA GPU: quantize, dequantize, 4-bit products and QLoRA steps beside their peers.

    python -m benches.gpu --record

Peers are bitsandbytes' CUDA kernels, peft over them, and torch's dense bfloat16 layer. Answers are
checked first: bitsandbytes' packed tensors must decode to the same bits by both, products stay
within 2 % of the largest result of the float64 product, and gradients within as much of the dense
layer's. Times are the device's (`gpu_measure.py`): "graph" leaves out what the host does between
launches, "call" has it.
"""

from __future__ import annotations

import argparse

import torch
from bitsandbytes import functional
from torch import Tensor, nn

import qlora_rs
from benches import peers
from benches.gpu_measure import (
    copy_bandwidth,
    gpu_machine,
    gpu_slug,
    interleave,
    sets_beyond_cache,
)
from benches.measure import Table
from qlora_rs import NF4Linear, PackedWeight, QLoRALinear

SIZES = ((4096, 4096), (11008, 4096), (16384, 16384))
BLOCK_SIZE = 64
GPU = torch.device("cuda")


def table(name: str, *columns: str) -> Table:
    return Table(f"gpu-{name}", columns, about=gpu_machine(), folder=gpu_slug())


def their_quantize(weight: Tensor) -> tuple[Tensor, functional.QuantState]:
    return functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
    )


def check_same_bytes(weight: Tensor) -> int:
    """How many bytes of codes differ; few may, by one code, at a tie that their kernel rounds.

    Their packed tensors must decode by our kernel to the bits that theirs says.
    """
    ours = qlora_rs.quantize(weight, BLOCK_SIZE)
    codes, state = their_quantize(weight)
    nibbles = [torch.stack((c >> 4, c & 15)).int() for c in (ours.codes, codes)]
    apart = (nibbles[0] - nibbles[1]).abs()
    differing = int((apart > 0).sum())
    entries = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    packed = PackedWeight.from_bitsandbytes({"w": codes, **entries}, "w").to(GPU)
    theirs = functional.dequantize_4bit(codes, state)
    decoded = torch.equal(packed.dequantize(weight.dtype), theirs)
    if differing > weight.numel() * 1e-6 or int(apart.max()) > 1 or not decoded:
        raise SystemExit(
            f"{differing} of {weight.numel()} codes differ from bitsandbytes' by up to "
            f"{int(apart.max())}, decoded values {'equal' if decoded else 'differ'}, for "
            f"{list(weight.shape)} of {weight.dtype}: not timed"
        )
    return differing


def measure_bytes(bandwidth: float) -> Table:
    """Quantize and dequantize: what share of a copy's bandwidth the bytes they need move at."""
    result = table(
        "quantize", "operation", "weight", "dtype", "ours us", "bnb us", "ours call",
        "bnb call", "bnb/ours", "ours GB/s", "of copy",
    )  # fmt: skip
    codes_apart: list[str] = []
    for size in SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            count = size[0] * size[1]
            packed_bytes = count // 2 + count // BLOCK_SIZE + count // BLOCK_SIZE // 256 * 4
            needed = count * dtype.itemsize + packed_bytes
            sets = sets_beyond_cache(packed_bytes)
            weights = [torch.randn(size, device=GPU).to(dtype) for _ in range(min(sets, 8))]
            differing = check_same_bytes(weights[0])
            codes_apart.append(f"{differing} of {count:,}")
            ours = [qlora_rs.quantize(weights[i % len(weights)]) for i in range(sets)]
            theirs = [their_quantize(weights[i % len(weights)]) for i in range(sets)]
            operations = {
                "quantize": (
                    [lambda w=w: qlora_rs.quantize(w, BLOCK_SIZE) for w in weights],
                    [lambda w=w: their_quantize(w) for w in weights],
                ),
                "dequantize": (
                    [lambda p=p, d=dtype: p.dequantize(d) for p in ours],
                    [lambda c=c, s=s: functional.dequantize_4bit(c, s) for c, s in theirs],
                ),
            }
            for name, (us, them) in operations.items():
                contenders = {"ours": us, "bnb": them}
                # bitsandbytes' quantize copies a table from the host, which no graph can hold.
                both = contenders if name == "dequantize" else {"ours": us}
                graph = interleave(both, graphs=True)
                call = interleave(contenders, graphs=False)
                rate = needed / graph["ours"]
                result.row(
                    name, "x".join(map(str, size)), str(dtype).removeprefix("torch."),
                    graph["ours"], graph.get("bnb", "-"), call["ours"], call["bnb"],
                    f"{call['bnb'] / call['ours']:.2f}x", f"{rate / 1e3:.0f}",
                    f"{rate / bandwidth:.0%}",
                )  # fmt: skip
            del weights, ours, theirs, operations, contenders, both, us, them
            torch.cuda.empty_cache()
    result.say("")
    result.say(
        f"copy on this device: {bandwidth / 1e3:.0f} GB/s, read and written both counted; double "
        "quantization; microseconds, medians in turns; us: from a CUDA graph, call: from Python "
        "(our quantize waits there to refuse NaN)"
    )
    result.say("codes that differ from bitsandbytes' by one: " + ", ".join(codes_apart))
    return result


def layers(size: tuple[int, int], sets: int) -> dict[str, list[nn.Module]]:
    """Distinct layers of one size: packed ours, bitsandbytes' around the same bytes, and dense."""
    made: dict[str, list[nn.Module]] = {"ours": [], "bnb": [], "torch dense": []}
    for _ in range(sets):
        weight = torch.randn(size, device=GPU) * size[1] ** -0.5
        # The dtype of a packed weight is that which bitsandbytes decodes to in backward.
        packed = qlora_rs.quantize(weight.bfloat16())
        dense = nn.Linear(size[1], size[0], bias=False, device="meta")
        dense.weight = nn.Parameter(packed.dequantize(torch.bfloat16), requires_grad=False)
        made["ours"].append(NF4Linear(packed))
        made["bnb"].append(peers.bitsandbytes_layer(packed.to("cpu"), torch.bfloat16).to(GPU))
        made["torch dense"].append(dense)
    return made


def measure_linear() -> Table:
    """Forward without gradients, as generation runs it."""
    names = ("ours", "bnb", "torch dense")
    result = table(
        "linear", "weight", "rows", *(f"{n} us" for n in names), "bnb/ours", "dense/ours",
        *(f"{n} call" for n in names),
    )  # fmt: skip
    for size in SIZES[:2]:
        made = layers(size, sets_beyond_cache(size[0] * size[1] // 2))
        for rows in (1, 2, 4, 8, 32, 128, 512, 4096):
            x = torch.randn(rows, size[1], device=GPU, dtype=torch.bfloat16)
            with torch.no_grad():
                exact = peers.exact_product(x, made["ours"][0].packed)
                for name, kind in made.items():
                    peers.check(name, kind[0](x), exact, x.dtype)
                contenders = {
                    name: [lambda m=m, x=x: m(x) for m in kind] for name, kind in made.items()
                }
                graph = interleave(contenders, graphs=True)
                call = interleave(contenders, graphs=False)
            result.row(
                "x".join(map(str, size)), str(rows), *(graph[n] for n in names),
                f"{graph['bnb'] / graph['ours']:.2f}x",
                f"{graph['torch dense'] / graph['ours']:.2f}x",
                *(call[n] for n in names),
            )  # fmt: skip
        del made, contenders
        torch.cuda.empty_cache()
    result.say("")
    result.say("bfloat16, no gradients; microseconds, medians in turns; us: from a CUDA graph")
    return result


def measure_training(rank: int = 16) -> Table:
    """Forward and backward of a layer with an adapter: a step of QLoRA."""
    names = ("ours", "peft bnb", "peft dense")
    result = table(
        "lora", "weight", "rows", *(f"{n} us" for n in names), "bnb/ours", "dense/ours",
        *(f"{n} MiB" for n in names),
    )  # fmt: skip
    for size in SIZES[:2]:
        plain = layers(size, sets_beyond_cache(size[0] * size[1] // 2))
        made: dict[str, list[nn.Module]] = {name: [] for name in names}
        for base, theirs, dense in zip(*plain.values(), strict=True):
            ours = QLoRALinear(base, r=rank, alpha=2 * rank, dtype=torch.bfloat16).to(GPU)
            nn.init.normal_(ours.lora_B, std=0.1)
            made["ours"].append(ours)
            made["peft bnb"].append(peers.with_peft(theirs, ours))
            made["peft dense"].append(peers.with_peft(dense, ours))
        for rows in (512, 2048, 8192):
            x = torch.randn(rows, size[1], device=GPU, dtype=torch.bfloat16, requires_grad=True)
            grad = torch.randn(rows, size[0], device=GPU, dtype=torch.bfloat16)
            exact = peers.exact_product(x, made["ours"][0].packed, made["ours"][0])
            dense = [peers.forward_backward(m, x, grad) for m in made["peft dense"]]
            contenders, peak = {}, {}
            for name, kind in made.items():
                peers.check(name, kind[0](x), exact, x.dtype)
                contenders[name] = [peers.forward_backward(m, x, grad) for m in kind]
                if name != "peft dense":
                    for found, expected in zip(contenders[name][0](), dense[0](), strict=True):
                        peers.check(f"{name}'s gradient", found, expected.double(), x.dtype)
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                contenders[name][0]()
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            call = interleave(contenders, graphs=False)
            result.row(
                "x".join(map(str, size)), str(rows), *(call[n] for n in names),
                f"{call['peft bnb'] / call['ours']:.2f}x",
                f"{call['peft dense'] / call['ours']:.2f}x", *(peak[n] for n in names),
            )  # fmt: skip
        del plain, made, contenders, dense
        torch.cuda.empty_cache()
    result.say("")
    result.say(
        f"bfloat16, rank {rank}, gradients of x, A and B, calls from Python; MiB: memory in use at "
        "the peak of one forward and backward, above what was there before it"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="GPU kernels beside bitsandbytes, peft and torch")
    parser.add_argument("--record", action="store_true", help="write benches/record/")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use; `qlora-rs doctor` says what is missing")
    torch.manual_seed(0)
    tables = [
        measure_bytes(copy_bandwidth()),
        measure_linear(),
        measure_training(),
    ]
    if options.record:
        for made in tables:
            made.record()


if __name__ == "__main__":
    main()
