"""Planted bugs in our own kernels: each must be refused by the emulator or change a byte.

So the tests beside this one would have caught them. The table that is printed says how each was
found (`pytest -s`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import reference
import torch
from emulated_gpu import EmulatedGPU, sums_of_mantissas
from ptx_emulator import Refusal
from torch import Tensor

import qlora_rs
from qlora_rs import cpu, gpu, kernels
from qlora_rs.cpu import Packed

BYTES = "other bytes"
TAIL_ABSMAX = 1 + 366 / 400


class Mutant(NamedTuple):
    """A change of one kernel's source, and how it must be found ("this or that")."""

    kernel: str
    name: str
    old: str
    new: str
    found_by: str


def quantize(name: str, old: str, new: str, found_by: str = BYTES) -> Mutant:
    return Mutant("quantize_nf4", name, old, new, found_by)


def double(name: str, old: str, new: str, found_by: str = BYTES) -> Mutant:
    return Mutant("double_quantize", name, old, new, found_by)


def dequantize(name: str, old: str, new: str, found_by: str = BYTES) -> Mutant:
    return Mutant("dequantize_nf4", name, old, new, found_by)


def few_rows(name: str, old: str, new: str, found_by: str = BYTES) -> Mutant:
    return Mutant("few_rows_nf4", name, old, new, found_by)


def tensor_cores(name: str, old: str, new: str, found_by: str = BYTES) -> Mutant:
    return Mutant("tensor_cores_nf4", name, old, new, found_by)


SYNC = "    __syncthreads();\n"
MUTANTS = (
    quantize(
        "no barrier after the table",
        f"= CELLS[threadIdx.x];\n{SYNC}",
        "= CELLS[threadIdx.x];\n",
        "race",
    ),
    quantize(
        "no barrier before the absmax are stored",
        f"    }}\n{SYNC}\n    const long long block",
        "    }\n    const long long block",
        "race",
    ),
    quantize(
        "no barrier after the bins are cleared",
        f"bins[threadIdx.x] = 0;\n{SYNC}",
        "bins[threadIdx.x] = 0;\n",
        "uninitialised",
    ),
    quantize("bins not cleared", "    bins[threadIdx.x] = 0;\n", "", "uninitialised"),
    quantize("half of the maximum's shuffles", "distance = LANES / 2;", "distance = LANES / 4;"),
    quantize(
        "a mask without half of the warp",
        "__shfl_xor_sync(0xffffffffu",
        "__shfl_xor_sync(0x0000ffffu",
        "collective",
    ),
    quantize("ties go up", "(x > __uint_as_float", "(x >= __uint_as_float"),
    quantize("cells off by one", "offset / 4;", "(offset + 4 & 0x7cu) / 4;"),
    quantize(
        "a zero block divides by zero",
        "__frcp_rn(fmaxf(scale, SMALLEST_ABSMAX))",
        "__frcp_rn(scale)",
    ),
    quantize(
        "the tail multiplies",
        "__fdiv_rn(widen(weights[2 * byte + i]), absmax)",
        "__fmul_rn(widen(weights[2 * byte + i]), __frcp_rn(absmax))",
    ),
    quantize(
        "a tiny tail keeps its absmax",
        "if (largest < 0x7f800000u) scale =",
        "if (largest > 0x7f800000u) scale =",
    ),
    quantize("nibbles swapped", "(i % 2 ? 0 : 4)", "(i % 2 ? 4 : 0)"),
    quantize(
        "the tail is read as a whole block",
        "whole = first + BLOCK_SIZE <= count",
        "whole = first < count",
        "out-of-bounds",
    ),
    quantize("one byte too many", "2 * byte < count;", "2 * byte <= count;", "out-of-bounds"),
    quantize("the padding nibble is zero", "{ZERO_CODE, ZERO_CODE}", "{0, 0}"),
    quantize(
        "one absmax too many",
        "mine = threadIdx.x < BLOCKS && block * BLOCK_SIZE < count",
        "mine = threadIdx.x < BLOCKS && block * BLOCK_SIZE <= count + BLOCK_SIZE",
        "out-of-bounds",
    ),
    quantize(
        "subnormal absmax not summed",
        "exponent ? exponent - 1 : 0]",
        "exponent ? exponent - 1 : 1]",
    ),
    double("no barrier after the bins are read", ": 0;\n    __syncthreads();", ": 0;", "race"),
    double(
        "no barrier before the offset is read",
        f"    }}\n{SYNC}    const float offset",
        "    }\n    const float offset",
        "race",
    ),
    double(
        "ties are not even", "rest == half && (sticky || mantissa & 1u)", "rest == half && sticky"
    ),
    double("the remainder is forgotten", "bool sticky = remainder != 0;", "bool sticky = false;"),
    double("a limb's carry is lost", "(low < shifted ? 1 : 0)", "0u"),
    double("the largest ignores signs", "fabsf(centred[i])", "centred[i]"),
    double(
        "the last group is read as whole",
        "if (at + 4 <= blocks) {\n            const float4",
        "if (at < blocks) {\n            const float4",
        "out-of-bounds",
    ),
    dequantize(
        "fused multiply-add",
        "__fadd_rn(__fmul_rn(entry, nested), offset)",
        "__fmaf_rn(entry, nested, offset)",
    ),
    dequantize("the tile's first group for all", "block / NESTED_BLOCK - first_group]", "0]"),
    dequantize(
        "no barrier after the map",
        f"offset_shared = nested_offset[0];\n{SYNC}",
        "offset_shared = nested_offset[0];\n",
        "race",
    ),
    dequantize("no barrier after the absmax", f"#endif\n{SYNC}", "#endif\n", "uninitialised"),
    dequantize(
        "lanes leave before the shuffle",
        "i - lane < BLOCKS;",
        "i < BLOCKS;",
        "divergent-barrier or divergent-collective",
    ),
    dequantize("half of the map", "map[j], code % 32", "map[j], code % 16"),
    dequantize("nibbles swapped", "(i % 2 ? 0 : 4)) & 15u", "(i % 2 ? 4 : 0)) & 15u"),
    dequantize(
        "the last tile is read as a whole one",
        "if (left >= TILE)",
        "if (left > 0)",
        "out-of-bounds",
    ),
    dequantize(
        "the last vector is stored as a whole one",
        "if (at + VECTOR <= left)",
        "if (at < left)",
        "out-of-bounds",
    ),
    dequantize(
        "the last odd weight is not stored",
        "for (int i = at; i < left; ++i)",
        "for (int i = at; i + 1 < left; ++i)",
        "unwritten",
    ),
    dequantize(
        "a group beyond the last is read",
        " && first_group + threadIdx.x <= last_block / NESTED_BLOCK",
        "",
        "out-of-bounds",
    ),
    few_rows("no barrier after the tables", f"#endif\n{SYNC}", "#endif\n", "race"),
    few_rows("nibbles swapped", "offsets[j % 2]", "offsets[1 - j % 2]"),
    few_rows("bytes in another order", "0x7650 + j / 2", "0x7653 - j / 2"),
    few_rows(
        "fused multiply-add of the absmax",
        "__fadd_rn(__fmul_rn(nested.map[absmax[block]], row.nested[group]), nested.offset)",
        "__fmaf_rn(nested.map[absmax[block]], row.nested[group], nested.offset)",
    ),
    few_rows("the first group for all", "row.nested[group]", "row.nested[0]"),
    few_rows("every row begins a group", "(row.blocks_before + column", "(column"),
    few_rows(
        "steps together beyond the columns",
        "done + UNROLL * STEP <= width",
        "done < width",
        "out-of-bounds",
    ),
    few_rows(
        "lanes beyond the columns work",
        "begin + done < width",
        "done < width",
        "out-of-bounds",
    ),
    few_rows(
        "rows beyond the last are read",
        "min(m, last_row) * width",
        "m * width",
        "out-of-bounds",
    ),
    few_rows("rows beyond the last are written", "(row <= last_row && ", "(", "out-of-bounds"),
    few_rows(
        "features beyond the last are written",
        "row <= last_row && feature <= last_feature",
        "row <= last_row",
        "out-of-bounds",
    ),
    few_rows(
        "features beyond the last are read",
        "min(first + i, last_feature)) * width",
        "first + i) * width",
        "out-of-bounds",
    ),
    few_rows("half of the sum's shuffles", "distance = 16;", "distance = 8;"),
    few_rows(
        "a mask without half of the warp",
        "__shfl_xor_sync(0xffffffffu",
        "__shfl_xor_sync(0x0000ffffu",
        "collective",
    ),
    few_rows("half of the rank", "r < rank; r += 32", "r < rank; r += 64"),
    few_rows("another row's bias", "widen(bias[feature])", "widen(bias[first])"),
    tensor_cores(
        "no barrier after the tables", f"#endif\n{SYNC}", "#endif\n", "race or uninitialised"
    ),
    tensor_cores(
        "no barrier before the sums replace the tables",
        f"each thread adds some up.\n{SYNC}",
        "each thread adds some up.\n",
        "race",
    ),
    tensor_cores(
        "no barrier before sums are added up",
        f"__float_as_uint(sums[i][n][k]);\n{SYNC}",
        "__float_as_uint(sums[i][n][k]);\n",
        "race or uninitialised",
    ),
    tensor_cores(
        "nibbles swapped",
        "narrow(__fmul_rn(LEVEL_SCALE, high)",
        "narrow(__fmul_rn(LEVEL_SCALE, low)",
    ),
    tensor_cores("bytes in another order", "word >> (8 * i - 7)", "word >> (8 * (4 - i) - 7)"),
    tensor_cores("rows of a tile swapped", "byte % 2 * 2 + j]", "byte % 2 * 2 + 1 - j]"),
    tensor_cores(
        "columns in another order",
        "xs[2 * step], xs[2 * step + 1]",
        "xs[2 * step + 1], xs[2 * step]",
    ),
    tensor_cores(
        "absmax of another chunk of the run",
        "4 * at.group + chunk % RUN",
        "4 * at.group + (chunk + 1) % RUN",
    ),
    tensor_cores("absmax of another row", "scale[i][k / 2]", "scale[i][k % 2]"),
    tensor_cores(
        "absmax of the first run for all", "if (first % RUN == 0)", "if (first < WARPS * RUN)"
    ),
    tensor_cores(
        "the first group for all", "nested_absmax[block / NESTED_BLOCK]", "nested_absmax[0]"
    ),
    tensor_cores("chunks past the end are added", "if (chunk < chunks) {", "{"),
    tensor_cores("half of the runs", "? 0 : (WARPS - 1) * RUN", "? 0 : (2 * WARPS - 1) * RUN"),
    tensor_cores(
        "rows beyond the last are read",
        "min(at.row + 8 * n + at.group, last_row)",
        "(at.row + 8 * n + at.group)",
        "out-of-bounds",
    ),
    tensor_cores(
        "features beyond the last are read",
        "min(at.feature + 16 * i + 8 * j + at.group, last_feature)",
        "(at.feature + 16 * i + 8 * j + at.group)",
        "out-of-bounds",
    ),
    tensor_cores("rows beyond the last are written", "(row <= last_row && ", "(", "out-of-bounds"),
    tensor_cores(
        "features beyond the last are written",
        "row <= last_row && feature <= last_feature",
        "row <= last_row",
        "other bytes or out-of-bounds",
    ),
    tensor_cores(
        "the next row's factors",
        "first < end ? matrix[first] : 0u",
        "matrix[first]",
        "out-of-bounds",
    ),
    tensor_cores("half of the turns of ranks", "first += WARPS * 16", "first += 2 * WARPS * 16"),
    tensor_cores(
        "codes past the end are asked for",
        "following, chunks - 1)",
        "following, chunks + 64)",
        "out-of-bounds",
    ),
    tensor_cores("warps share ranks", "first = end.warp * 16", "first = end.warp * 8"),
    tensor_cores("another row's bias", "widen(bias[feature])", "widen(bias[end.feature])"),
    tensor_cores(
        "one warp's sums left out", "other = 1; other < WARPS", "other = 2; other < WARPS"
    ),
)


@functools.cache
def weights() -> list[tuple[Tensor, int]]:
    """Small matrices with every kind of block, each with a block size."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(9, 1003, generator=generator)
    plain[3, :300] = 0.0
    plain[8, 900:] *= 1e-42
    levels = torch.tensor(cpu._rust.levels())
    ties = torch.cat([torch.ones(1), (levels[1:] + levels[:-1]) / 2])
    # In an incomplete block of this absmax, a quotient and a product with 1/absmax differ.
    tail = ties * TAIL_ABSMAX
    near = torch.cat([tail, tail.nextafter(tail - 1), tail.nextafter(tail + 1)])[None]
    return [
        (plain.bfloat16(), 64),
        (torch.cat([plain, plain * 1e-39]), 32),
        (plain.repeat(3, 1).half(), 1024),
        (ties.repeat(33)[None, :523], 64),
        (near[:, near[0] <= TAIL_ABSMAX], 64),
        (torch.randn(300, 64, generator=generator) * 1e-44, 64),
        (torch.randn(1100, 32, generator=generator), 32),
        (torch.ones(1, 1), 64),
    ]


@functools.cache
def expected() -> list[tuple[Tensor, ...]]:
    return [cpu.quantize(weight, block_size, True) for weight, block_size in weights()]


@functools.cache
def hard_means() -> list[Tensor]:
    """absmax whose mean is a tie, or one but for the last bit of the sum; sums with carries."""
    one, ulp, unit = 1.0, 2.0**-23, 2.0**-149
    generator = torch.Generator().manual_seed(0)
    ties = [[one, one + ulp, one + 2 * ulp, one + ulp], [one + ulp, one + 2 * ulp]]
    lifted = [[one, one + ulp, 2.0**-60], [2**39 * unit, 2**38 * unit, (3 * 2**14 + 1) * unit]]
    large = [torch.rand(2000, generator=generator) * 3 + 1 for _ in range(4)]
    return [*map(torch.tensor, ties + lifted), torch.full((1000,), 3.4e38), *large]


def checked(kernel: str) -> str | None:
    """How a wrong kernel shows, or None if it does not."""
    device = EmulatedGPU()
    try:
        if kernel == "few_rows_nf4":
            return check_products(device, torch.float32, ((1, 67), (3, 67), (7, 13)))
        if kernel == "tensor_cores_nf4":
            shapes = ((3, 13), (9, 67), (17, 37), (33, 35))
            return check_products(device, torch.float16, shapes, rank=300)
        for (weight, block_size), parts in zip(weights(), expected(), strict=True):
            if kernel != "dequantize_nf4":
                found = gpu.quantize(weight, block_size, True, device)
                if not all(map(torch.equal, found, parts)):
                    return BYTES
            else:
                table = torch.tensor(cpu._rust.dynamic_map())
                packed = Packed(*parts, table, *weight.shape, block_size)
                found = gpu.dequantize(packed, weight.dtype, device)
                if not torch.equal(found, cpu.dequantize(packed, weight.dtype)):
                    return BYTES
                if gpu.row_step(packed) < weight.shape[0] and check_rows(packed, device):
                    return BYTES
        if kernel == "double_quantize":
            return check_means(device)
    except Refusal as refusal:
        return refusal.complaint
    return None


def check_means(device: EmulatedGPU) -> str | None:
    """The second level for absmax that no small matrix has."""
    for absmax in hard_means():
        blocks = absmax.numel()
        sums = torch.from_numpy(sums_of_mantissas(absmax.numpy()))
        codes, nested = torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256))
        offset, refused = torch.empty(()), torch.zeros(2, dtype=torch.int64)
        launch = kernels.double_quantize(blocks)
        device(launch, absmax, blocks, refused, sums, codes, nested, offset)
        if offset.numpy() != reference.exact_mean(absmax.numpy()):
            return BYTES
    return None


def check_rows(packed: Packed, device: EmulatedGPU) -> str | None:
    """Rows whose first block lies in the middle of a group of 256."""
    step = gpu.row_step(packed)
    found = gpu.dequantize_rows(packed, step, packed.out_features, torch.float32, device)
    return None if torch.equal(found, cpu.dequantize(packed, torch.float32)[step:]) else BYTES


def check_products(
    device: EmulatedGPU, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...], rank: int = 40
) -> str | None:
    """Single weights, picked by a one in x, to the bit in float32; and whole products."""
    generator = torch.Generator().manual_seed(0)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    columns = {torch.float32: 320, torch.float16: 2368}[dtype]
    for rows, features in shapes:
        weight = torch.randn(features, columns, generator=generator)
        packed = Packed(*qlora_rs.quantize(weight).arguments())
        picked = torch.eye(columns)[torch.randperm(columns, generator=generator)[:rows]]
        values = cpu.dequantize(packed, torch.float32)
        found, exact = gpu.linear(picked.to(dtype), packed, None, device), picked @ values.t()
        close = {"rtol": 0 if dtype == torch.float32 else 1.5e-3, "atol": 0}
        if not torch.allclose(found.float(), exact, **close):
            return BYTES
        x, bias, lora_a, lora_b = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((rows, columns), (features,), (rank, columns), (features, rank))
        )
        # Not so large a share that a bias does not show beside it.
        low_rank = cpu.LowRank(lora_a, lora_b, columns**-0.5)
        found, hidden = gpu.lora_linear(x, packed, low_rank, bias, device)
        exact = x.double() @ values.double().t() + hidden.double() @ lora_b.double().t() + bias
        atol = tolerance * float(exact.abs().max())
        if not torch.allclose(found.double(), exact, rtol=0, atol=atol):
            return BYTES
    return None


@pytest.mark.parametrize(
    "kernel",
    ["quantize_nf4", "double_quantize", "dequantize_nf4", "few_rows_nf4", "tensor_cores_nf4"],
)
def test_the_kernels_themselves_pass(kernel: str) -> None:
    assert checked(kernel) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.kernel}: {m.name}")
def test_a_planted_bug_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kernels._source

    def mutated(kernel: str) -> tuple[str, dict[str, str]]:
        text, headers = source(kernel)
        if kernel != mutant.kernel:
            return text, headers
        assert text.count(mutant.old) == 1, "the kernel has changed: plant this bug anew"
        return text.replace(mutant.old, mutant.new), headers

    monkeypatch.setattr(kernels, "_source", mutated)
    found = checked(mutant.kernel)
    print(f"{mutant.kernel:16} {mutant.name:44} {found}")
    assert found in mutant.found_by.split(" or ")
