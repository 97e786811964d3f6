"""The counters against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Module, compile_cuda, output

X = np.arange(4096, dtype=np.int32)


def counters(body: str, block: int = 32, **options) -> dict:
    source = f"""extern "C" __global__ void kernel(const int* x, int* y) {{
        int t = threadIdx.x; {body} }}"""
    module = Module(compile_cuda(source))
    arguments = [X, output(np.zeros(4096, np.int32))]
    return module.launch("kernel", arguments, grid=1, block=block, **options).counters


@pytest.mark.parametrize(
    ("index", "requested", "ideal"),
    [
        ("t", 4, 4),
        ("2 * t", 8, 4),
        ("8 * t", 32, 4),
        ("t + 1", 5, 4),
        ("0", 1, 1),
        ("31 - t", 4, 4),
    ],
)
def test_sectors_of_a_warp_of_loads(index, requested, ideal):
    found = counters(f"int v = x[{index}]; y[0] = 1; if (v == -1) y[1] = v;")
    loads = [line for line in found["lines"] if line["class"] == "load_global"]
    assert [line["global_sectors"] for line in loads] == [requested]
    assert [line["global_sectors_ideal"] for line in loads] == [ideal]
    assert found["buffers"]["argument 0"]["unique_sectors_read"] == requested


@pytest.mark.parametrize(
    ("index", "wavefronts"),
    [("t", 1), ("2 * t", 2), ("32 * t % 1024", 32), ("33 * t % 1024", 1), ("0", 1), ("t / 2", 1)],
)
def test_wavefronts_of_a_warp_of_shared_loads(index, wavefronts):
    fill = "__shared__ int cell[1024]; for (int i = t; i < 1024; i += 32) cell[i] = x[i];"
    found = counters(f"{fill} __syncwarp(); y[t] = cell[{index}];")
    loads = [line for line in found["lines"] if line["class"] == "load_shared"]
    assert [line["shared_wavefronts"] for line in loads] == [wavefronts]
    assert [line["shared_wavefronts_ideal"] for line in loads] == [1]


def test_wide_shared_loads_take_a_wavefront_for_each_128_bytes():
    fill = "__shared__ int4 cell[32]; cell[t] = ((int4*)x)[t];"
    found = counters(f"{fill} __syncwarp(); ((int4*)y)[t] = cell[t ^ 1];")
    assert found["shared_wavefronts"] == found["shared_wavefronts_ideal"] == 8
    assert found["global_bytes_read"] == found["global_bytes_written"] == 512
    assert found["global_sectors"] == found["global_sectors_unique"] == 32


def test_every_block_warp_and_lane_is_counted_once_whatever_the_schedule():
    body = "y[t] = t % 2 ? x[t] * 3 : x[t + 1]; __syncthreads();"
    found = [counters(body, block=96, schedule=s) for s in ("ascending", "descending", "random:9")]
    assert {item["classes"]["barrier"] for item in found} == {3}
    assert len({item["thread_instructions"] for item in found}) == 1
    assert found[0]["warp_instructions"] == sum(found[0]["classes"].values())
    by_line = sum(line["warp_instructions"] for line in found[0]["lines"])
    assert by_line == found[0]["warp_instructions"]
