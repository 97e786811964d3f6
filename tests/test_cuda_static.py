"""The committed table of the assembler's facts against a fresh compile, and what it must say."""

from __future__ import annotations

import pytest

from benches import cuda_static
from benches.measure import newest_record

PRODUCTS = ("few_rows_nf4", "tensor_cores_nf4")


@pytest.fixture(scope="module")
def fresh() -> list[dict[str, str]]:
    return cuda_static.rows()


def test_the_table_is_what_a_fresh_compile_gives(fresh: list[dict[str, str]]) -> None:
    recorded = newest_record(cuda_static.FOLDER, cuda_static.NAME)
    assert recorded is not None
    changed = [row for row in fresh if row not in recorded[1]]
    assert not changed, "run python -m benches.cuda_static --record, and explain the change"
    assert len(fresh) == len(recorded[1]) == 16 * len(cuda_static.ARCHITECTURES)


def test_no_kernel_spills_on_any_architecture(fresh: list[dict[str, str]]) -> None:
    assert {row["sm"] for row in fresh} == {"80", "86", "89", "90", "100", "120"}
    for row in fresh:
        assert (row["spill_bytes"], row["stack_bytes"], row["local"]) == ("0", "0", "0"), row


def test_the_kernels_of_the_usual_block_fill_the_multiprocessor(
    fresh: list[dict[str, str]],
) -> None:
    for row in fresh:
        # Products hide latency by loads in flight, which take the registers of warps.
        if row["kernel"].split()[0] not in PRODUCTS and row["kernel"] != "quantize_nf4 f32 4096":
            resident, most = row["warps_of"].split("/")
            assert resident == most, row


def test_dequantizing_converts_and_stores_nothing_twice(fresh: list[dict[str, str]]) -> None:
    # An iteration decodes four vectors of 16 bytes: one load each for codes and absmax, then the
    # levels.
    for row in fresh:
        if row["kernel"].startswith("dequantize_nf4"):
            weights = 16 if row["kernel"].endswith("f32") else 32
            conversions = 0 if row["kernel"].endswith("f32") else 16
            found = tuple(int(row[key]) for key in ("ldg", "stg", "lds", "float", "convert"))
            assert found == (4, 4, weights + 4, weights, conversions), row


def test_a_spill_would_be_seen() -> None:
    source = """
    extern "C" __global__ void __launch_bounds__(1024) spill(float* x) {
        float held[160];
        for (int i = 0; i < 160; ++i) held[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < 160; ++i) x[i * 1024 + threadIdx.x] = held[i] * held[159 - i];
    }
    """
    options = ("--gpu-architecture=sm_80",)
    compiled = cuda_static.nvrtc.compile_program("spill.cu", source, {}, options)
    found = cuda_static.resources(compiled, 80)
    names = [cuda_static.opcode(line) for line in cuda_static.instructions(compiled.cubin)]
    assert found["spill_bytes"] + found["stack_bytes"] > 0
    assert any(name.startswith("STL") for name in names)
