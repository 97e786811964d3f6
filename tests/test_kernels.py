"""How kernels are compiled, kept and found again; no GPU is needed for any of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_rs import QloraError, _rust, kernel_cache, kernels, nvrtc

LAUNCH = kernels.dequantize_nf4(4096, torch.bfloat16, 64, True)

FETCH = """
import torch
from qlora_rs import kernels
launch = kernels.dequantize_nf4(4096, torch.bfloat16, 64, True)
print(kernels.binary(launch, (8, 0)))
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "cache"))


def fetch() -> Path:
    return Path(kernels.binary(LAUNCH, (8, 0)))


def test_a_kernel_is_compiled_once_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch()
    assert first.read_bytes()[:4] == b"\x7fELF"

    def compiles(*_: object) -> None:
        raise AssertionError("compiled although it was cached")

    monkeypatch.setattr(kernels, "compile_kernel", compiles)
    assert fetch() == first


def test_processes_that_race_leave_one_whole_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FETCH]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    found = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 6
    assert [str(path) for path in (tmp_path / "cache").iterdir()] == list(found)
    assert Path(found.pop()).read_bytes() == kernels.compile_kernel(*LAUNCH[:2], 80).cubin


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: bytes([*data[:99], data[99] ^ 1, *data[100:]]),
        lambda data: data + b"\0",
    ],
    ids=["empty", "one byte short", "half", "one bit", "one byte more"],
)
def test_a_damaged_file_is_built_again(damage: Callable[[bytes], bytes]) -> None:
    file = fetch()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert fetch().read_bytes() == whole
    assert list(file.parent.iterdir()) == [file]


def test_a_file_of_another_content_under_the_same_key_is_replaced() -> None:
    file = fetch()
    imposter = file.rename(file.with_name(file.name.replace(file.stem[-8:], "0" * 8)))
    assert fetch() == file
    assert not imposter.exists()


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    assert fetch().read_bytes()[:4] == b"\x7fELF"
    assert tmp_path not in fetch().parents


def test_everything_that_shapes_the_code_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {kernels.binary(LAUNCH, capability) for capability in ((8, 0), (9, 0), (13, 9))}
    found.add(kernels.binary(kernels.dequantize_nf4(4096, torch.float16, 64, True), (8, 0)))
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "version", lambda: (99, 0))
        found.add(str(fetch()))
    text, headers = kernels._source(LAUNCH.kernel)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_source", lambda _: (text + "// changed\n", headers))
        found.add(str(fetch()))
    keys = {Path(file).stem.split("-")[2] for file in found}
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), (80, True)),
        ((8, 7), (87, True)),
        ((9, 0), (90, True)),
        ((10, 0), (100, True)),
        ((12, 0), (120, True)),
        ((12, 9), (121, True)),
        ((13, 0), (121, False)),
    ],
)
def test_a_device_gets_the_newest_code_that_it_can_run(
    capability: tuple[int, int], expected: tuple[int, bool]
) -> None:
    known = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
    assert kernels.target(capability, known) == expected


def test_a_gpu_that_is_too_old_is_refused_with_both_numbers() -> None:
    with pytest.raises(QloraError, match=r"capability 8\.0 .* this one has 7\.5; use the CPU"):
        kernels.target((7, 5), nvrtc.architectures())


def test_code_for_an_unknown_architecture_is_ptx_that_ends_where_the_driver_looks() -> None:
    data = Path(kernels.binary(LAUNCH, (13, 9))).read_bytes()
    assert b".visible .entry dequantize_nf4" in data
    assert data.endswith(b"\0")


def test_an_edited_source_is_compiled_without_building_the_extension(
    tmp_path: Path, run_python: Callable
) -> None:
    cuda = tmp_path / "cuda"
    shutil.copytree(Path(__file__).parent.parent / "cuda", cuda)
    header = cuda / "floats.cuh"
    header.write_text(header.read_text() + '#error "edited"\n')
    code = """
        import torch
        from qlora_rs import kernels
        kernels.binary(kernels.dequantize_nf4(64, torch.float32, 64, True), (8, 0))
    """
    assert run_python(code).returncode == 0
    done = run_python(code, QLORA_RS_CUDA=str(cuda))
    assert "floats.cuh" in done.stderr
    assert "edited" in done.stderr
    (cuda / "codebook.cuh").unlink()
    done = run_python(code, QLORA_RS_CUDA=str(cuda))
    assert "holds no readable codebook.cuh" in done.stderr


def test_the_embedded_sources_are_the_folders() -> None:
    for path in (Path(__file__).parent.parent / "cuda").glob("*.cu*"):
        assert _rust.cuda_source(path.name) == path.read_text(), "run make setup"


def test_the_snippet_of_the_cuda_readme_runs_as_pasted(run_python: Callable) -> None:
    text = (Path(__file__).parent.parent / "cuda" / "README.md").read_text()
    (code,) = re.findall(r"<<'END'\n(.*?)\n *END\n", text, re.DOTALL)
    done = run_python(code, PYTHONPATH=str(Path(__file__).parent))
    assert done.returncode == 0, done.stderr
    assert "warp instructions" in done.stdout


def test_a_source_that_does_not_compile_names_file_and_line() -> None:
    with pytest.raises(QloraError, match=r"(?s)broken\.cu does not compile.*broken\.cu\(2\)"):
        nvrtc.compile_program("broken.cu", "int good;\nint x = y;\n", {}, ())


def test_a_launch_without_cupy_says_how_to_add_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(QloraError, match=r'CuPy, .* pip install "qlora_rs\[cuda13\]"'):
        kernels._load(LAUNCH.kernel, LAUNCH.constants, 0)


def test_a_missing_compiler_says_how_to_add_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    with pytest.raises(QloraError, match=r'NVRTC, .* pip install "qlora_rs\[cuda13\]"'):
        kernels.compile_kernel(LAUNCH.kernel, LAUNCH.constants, 80)


def test_doctor_names_what_is_missing_and_the_command_that_adds_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_rs.cli import main

    monkeypatch.setattr(nvrtc, "library", lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["doctor"]) == 0
    lines = {line[:14].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}
    assert lines["gpu nvrtc"].strip().startswith("missing; matters only with a GPU")
    assert 'pip install "qlora_rs[cuda' in lines["gpu nvrtc"]
    assert 'pip install "qlora_rs[cuda' in lines["gpu cupy"]
    assert 'pip install "qlora_rs[cuda' in lines["gpu kernels"]


def test_importing_the_package_loads_neither_cupy_nor_the_compiler(run_python: Callable) -> None:
    done = run_python("""
        import sys, qlora_rs
        from qlora_rs import nvrtc
        print("cupy" in sys.modules, nvrtc.library.cache_info().currsize)
    """)
    assert done.stdout.split() == ["False", "0"], done.stderr


@pytest.mark.parametrize("count", [1, 63, 64, 4096, 1 << 24, (1 << 24) + 1, 1 << 40])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_grids_cover_every_weight_once(count: int, block_size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        launch = kernels.quantize_nf4(count, dtype, block_size, True)
        per_cta = int(dict(launch.constants)["BLOCKS_PER_CTA"]) * block_size
        assert 0 <= launch.grid * per_cta - count < per_cta
        launch = kernels.dequantize_nf4(count, dtype, block_size, True)
        tile = int(dict(launch.constants)["TILE"])
        assert 0 <= launch.grid * tile - count < tile
