"""Barriers and the threads that never come: early returns are right, ways round are not."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Module, Refusal, compile_cuda, output

SCHEDULES = ["ascending", "descending", "ahead", "random:1", "random:2"]
X = np.arange(256, dtype=np.int32)


def run(body: str, n: int = 100, **options):
    """128 threads; a correct body leaves the sum of x[0] to x[99] in y[0]."""
    source = f"""extern "C" __global__ void kernel(const int* x, int* y, int n) {{
        __shared__ int part[128]; const int t = threadIdx.x; {body} }}"""
    module = Module(compile_cuda(source))
    return module.launch("kernel", [X, output(X[:1]), n], grid=1, block=128, **options)


ADD = "if (t == 0) { int sum = 0; for (int i = 0; i < n; i++) sum += part[i]; y[0] = sum; }"
RETURNS = {
    "at once": (f"if (t >= n) return; part[t] = x[t]; __syncthreads(); {ADD}", 1),
    "after a barrier": (
        f"if (t < n) part[t] = x[t]; __syncthreads(); if (t >= n) return; __syncthreads(); {ADD}",
        1,
    ),
    "with a last deed": (
        f"if (t >= n) {{ part[t] = 1; return; }} part[t] = x[t]; __syncthreads(); {ADD}",
        1,
    ),
    "out of a loop": (
        """part[t] = t < n ? x[t] : 0;
        for (int step = 64; step > 0; step /= 2) {
            __syncthreads();
            if (t >= step) return;
            part[t] += part[t + step];
        }
        y[0] = part[0];""",
        6,
    ),
    # Everybody goes round the barrier in the first turn; those that end then are not to blame.
    "after a turn without a barrier": (
        f"""part[t] = t < n ? x[t] : 0; __syncthreads();
        for (int turn = 0; turn < 3; turn++) {{
            if (turn * n >= n) __syncthreads();
            part[t] += turn == 5;
            if (t >= n) return;
        }}
        {ADD}""",
        2,
    ),
}


@pytest.mark.parametrize("name", RETURNS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_that_have_returned_are_not_waited_for(name, schedule):
    body, completed = RETURNS[name]
    result = run(body, schedule=schedule)
    assert result.arrays[0] == X[:100].sum()
    assert result.counters["barriers_completed_by_exits"] == completed


@pytest.mark.parametrize(
    "body",
    [
        f"if (t < n) {{ part[t] = x[t]; __syncthreads(); }} {ADD}",
        f"part[t] = x[t]; if (t < 64) __syncthreads(); __syncthreads(); {ADD}",
        f"part[t] = x[t]; for (int i = t / 32; i < 3; i++) __syncthreads(); {ADD}",
        f"part[t] = x[t]; __syncthreads(); if (t % 2) __syncthreads(); {ADD}",
    ],
    ids=["one condition", "one barrier more", "a loop of unequal turns", "half of each warp"],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_barrier_that_threads_go_round_and_complete_by_ending_is_refused(body, schedule):
    with pytest.raises(
        Refusal, match=r"had gone round a barrier; .* did so at PTX line"
    ) as refused:
        run(body, schedule=schedule, races=False)
    assert refused.value.complaint == "divergent-barrier"
    result = run(body, schedule=schedule, races=False, barriers=False)
    assert result.counters["barriers_completed_by_exits"] > 0


def test_a_guarded_barrier_is_a_condition_too():
    ptx = """.version 8.8
.target sm_90
.address_size 64
.visible .entry kernel() {
    .reg .b32 %t; .reg .pred %p; .shared .b32 cell;
    mov.u32 %t, %tid.x;
    setp.lt.u32 %p, %t, 32;
    @%p barrier.sync 0;
    st.volatile.shared.u32 [cell], 1;
    ret;
}"""
    with pytest.raises(
        Refusal, match=r"`@%p barrier.sync 0;` was completed .* \(32, 0, 0\) did so"
    ):
        Module(ptx).launch("kernel", [], grid=1, block=64)
    early = ptx.replace("    st.volatile.shared.u32 [cell], 1;\n", "")
    counters = Module(early).launch("kernel", [], grid=1, block=64).counters
    assert counters["barriers_completed_by_exits"] == 1
