"""Forked children, spawned children and threads get the parent's answers, and none of them hangs.

Each case runs in its own interpreter, whose forked child has a watchdog: a hung child outlives
pytest's own timeout.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

COMMON = """
    import hashlib, os, select, signal, sys, threading
    import torch, qlora_rs

    torch.manual_seed(0)
    WEIGHT = torch.randn(500, 512)
    PACKED = qlora_rs.quantize(WEIGHT)
    # Below 32,768 elements torch's own operators use one thread. With more of them they hang in
    # the forked child of a process that has used OpenMP: torch's limit, not tested here.
    FEW, MANY = torch.randn(4, 512), torch.randn(60, 512)

    def digest(*tensors):
        result = hashlib.sha256()
        for t in tensors:
            result.update(t.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        return result.hexdigest()

    def gradient():
        x = MANY.clone().requires_grad_()
        qlora_rs.linear(x, PACKED).sum().backward()
        return x.grad

    CALLS = {
        "quantize": lambda: digest(*qlora_rs.quantize(WEIGHT)._tensors()),
        "dequantize": lambda: digest(PACKED.dequantize()),
        "linear, few rows": lambda: digest(qlora_rs.linear(FEW, PACKED)),
        "linear, many rows": lambda: digest(qlora_rs.linear(MANY, PACKED)),
        "linear, bfloat16": lambda: digest(qlora_rs.linear(MANY.bfloat16(), PACKED)),
        "backward": lambda: digest(gradient()),
    }

    def in_child(work, seconds=30):
        '''What work() returns in a forked child, or "hang".'''
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, work().encode())
            except BaseException as error:
                os.write(writer, repr(error).encode())
            os._exit(0)
        ready, _, _ = select.select([reader], [], [], seconds)
        if not ready:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return os.read(reader, 1 << 16).decode() if ready else "hang"
"""


def check(run_python: Callable, code: str) -> None:
    lines = COMMON.splitlines() + code.splitlines()
    done = run_python("\n".join(lines), timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok"), done.stdout + done.stderr


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_forked_child_gives_the_parents_bytes(threads: int, run_python: Callable) -> None:
    check(
        run_python,
        f"""
    torch.set_num_threads({threads})
    expected = {{name: call() for name, call in CALLS.items()}}
    for name, call in CALLS.items():
        found = in_child(call)
        assert found == expected[name], (name, found)
    print("ok")
    """,
    )


def test_a_child_that_calls_first_and_a_grandchild_give_the_same(
    run_python: Callable,
) -> None:
    check(
        run_python,
        """
    torch.set_num_threads(2)
    for name, call in CALLS.items():
        early = in_child(call)
        grandchild = in_child(lambda: call() and in_child(call))
        assert early == grandchild == call(), (name, early, grandchild)
    print("ok")
    """,
    )


def test_a_fork_while_other_threads_compute_does_not_hang(run_python: Callable) -> None:
    check(
        run_python,
        """
    torch.set_num_threads(2)
    call = CALLS["dequantize"]
    expected, stop = call(), threading.Event()

    def busy():
        while not stop.is_set():
            call()

    workers = [threading.Thread(target=busy) for _ in range(2)]
    for worker in workers:
        worker.start()
    children = [in_child(call) for _ in range(10)]
    stop.set()
    for worker in workers:
        worker.join()
    assert children == [expected] * 10, children
    print("ok")
    """,
    )


def test_threads_that_call_at_once_get_the_answers_of_one(run_python: Callable) -> None:
    check(
        run_python,
        """
    torch.set_num_threads(2)
    expected = {name: call() for name, call in CALLS.items()}
    wrong, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(5):
            wrong.extend(name for name, call in CALLS.items() if call() != expected[name])

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers), "hang"
    assert not wrong, wrong
    print("ok")
    """,
    )


WORKER = """
import hashlib, sys, torch, qlora_rs

def work(rows):
    torch.manual_seed(0)
    packed = qlora_rs.quantize(torch.randn(64, 256))
    y = qlora_rs.linear(torch.ones(rows, 256), packed)
    return hashlib.sha256(y.numpy().tobytes() + packed.codes.numpy().tobytes()).hexdigest()

if __name__ == "__main__":
    import multiprocessing
    expected = [work(rows) for rows in (1, 50)]
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(1) as pool:
        found = pool.map_async(work, (1, 50)).get(timeout=60)
    assert found == expected, (found, expected)
    print("ok")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_of_processes_gives_the_parents_bytes(
    method: str, tmp_path: object, run_python: Callable
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    code = f"""
        import runpy, sys
        sys.argv = ["worker.py", {method!r}]
        sys.path.insert(0, {str(tmp_path)!r})
        runpy.run_path({str(tmp_path / "worker.py")!r}, run_name="__main__")
    """
    done = run_python(code, timeout=100)
    assert done.stdout.strip() == "ok", done.stderr


def test_importing_starts_no_thread_and_loads_nothing_of_the_ecosystem(
    run_python: Callable,
) -> None:
    code = """
        import os, sys, torch
        before = len(os.listdir("/proc/self/task"))
        import qlora_rs
        assert len(os.listdir("/proc/self/task")) == before
        found = {"transformers", "peft", "bitsandbytes", "accelerate", "trl"} & set(sys.modules)
        assert not found, found
        assert not torch.cuda.is_initialized()
        print("ok")
    """
    done = run_python(code)
    assert done.stdout.strip() == "ok", done.stderr


ONLY_TORCH_BEFORE_FORK = """
import os, torch, qlora_rs
torch.set_num_threads(2)
weight = torch.ones(2048, 2048)
(weight @ weight).exp()
if os.fork() == 0:
    packed = torch.ops.qlora_rs.quantize(weight, 64, False)
    os._exit(0 if int(packed[0][0, 0]) == 255 else 1)
_, status = os.wait()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


def test_a_child_may_make_the_first_call_after_its_parent_used_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", ONLY_TORCH_BEFORE_FORK], timeout=120, check=False)
    assert done.returncode == 0
