"""Rules about the sources: examples that run, sizes, unsafe code, threads, pickles, tables."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import reference
import torch
from torch import nn

import qlora_rs

ROOT = Path(__file__).parent.parent
PYTHON = sorted((ROOT / "python/qlora_rs").rglob("*.py"))
RUST = sorted((ROOT / "rust").rglob("*.rs"))
MODULES = sorted(m.name for m in pkgutil.walk_packages(qlora_rs.__path__, "qlora_rs."))
CORE = [name for name in MODULES if ".recipes" not in name and not name.endswith("__main__")]


def identified(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", CORE)
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    public = {key: getattr(qlora_rs, key) for key in qlora_rs.__all__}
    outcome = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn, **public})
    assert outcome.failed == 0


def test_the_examples_in_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(import .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    assert capsys.readouterr().out == "(25600, 321088)\n"
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


def test_dir_lists_the_public_names() -> None:
    assert dir(qlora_rs) == sorted(qlora_rs.__all__)


@pytest.mark.parametrize("name", qlora_rs.__all__)
def test_a_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(qlora_rs, name)
    assert name == "__version__" or value.__doc__.strip()


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "lora_linear",
        "quantize",
        "quantize_model",
        "add_lora",
        "linear_cross_entropy",
        "fuse_loss",
        "fuse_norms",
        "fuse_mlps",
        "widen_attention",
    ],
)
def test_a_public_function_shows_an_example(name: str) -> None:
    assert ">>> " in getattr(qlora_rs, name).__doc__


def test_the_version_is_the_crates() -> None:
    manifest = (ROOT / "Cargo.toml").read_text()
    assert f'version = "{qlora_rs.__version__}"' in manifest


SOURCES = [
    *PYTHON,
    *RUST,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "benches").glob("*.py")),
    *sorted((ROOT / "benches").glob("*.rs")),
]


@pytest.mark.parametrize("path", SOURCES, ids=identified)
def test_a_source_file_has_at_most_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=identified)
def test_a_source_file_opens_with_what_it_is(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(("//!", '"""')) or path.name.endswith("tests.rs")


@pytest.mark.parametrize("path", RUST, ids=identified)
def test_every_unsafe_block_is_argued_just_above_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if not re.search(r"\bunsafe (\{|impl\b)", code) and "| unsafe {" not in code:
            continue
        above = lines[max(number - 8, 0) : number + 1]
        assert any("SAFETY" in text for text in above), f"line {number + 1}: {line.strip()}"


def test_only_the_files_that_may_use_unsafe_code() -> None:
    allowed = re.compile(r"rust/(simd|simd/.*|python/.*|parallel|memory|gemm/tile)\.rs")
    users = {identified(p) for p in RUST if re.search(r"\bunsafe\b", without_comments(p))}
    assert not {user for user in users if not allowed.fullmatch(user)}


def without_comments(path: Path) -> str:
    return "\n".join(line.split("//")[0] for line in path.read_text().splitlines())


def test_threads_are_used_in_one_file() -> None:
    word = re.compile(r"\b(rayon|std::thread|thread::spawn|GOMP_parallel|crossbeam|tokio)\b")
    users = {identified(path) for path in RUST if word.search(without_comments(path))}
    assert users == {"rust/parallel.rs"}


def test_nothing_panics_by_unwrap_outside_tests() -> None:
    for path in RUST:
        code = without_comments(path).split("#[cfg(test)]\nmod tests {")[0]
        if not path.name.endswith("tests.rs"):
            assert not re.search(r"\.unwrap\(\)|\bunimplemented!|\btodo!", code), identified(path)


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}
FORBIDDEN_CALLS = {"torch.load", "eval", "exec", "os.system", "np.load", "numpy.load"}


def called_names(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", PYTHON, ids=identified)
def test_the_package_never_unpickles_nor_runs_text(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not imported_modules(tree) & FORBIDDEN_MODULES
    assert not called_names(tree) & FORBIDDEN_CALLS


CORE_FILES = [path for path in PYTHON if path.parent.name == "qlora_rs"]


@pytest.mark.parametrize("path", CORE_FILES, ids=identified)
def test_the_core_imports_neither_transformers_nor_bitsandbytes(path: Path) -> None:
    outside = {"transformers", "peft", "bitsandbytes", "accelerate", "trl", "datasets"}
    if path.name not in ("cli.py", "__main__.py"):
        assert not imported_modules(ast.parse(path.read_text())) & outside


def mentions_level(text: str, level: float) -> bool:
    """Whether the text holds the level as a decimal of at least six digits."""
    digits = f"{abs(level):.6f}"[:-1]
    return digits in text.replace("_", "")


def test_the_16_levels_are_written_in_one_file_of_ours() -> None:
    sources = [p for p in [*PYTHON, *RUST, *(ROOT / "cuda").rglob("*.cu*")] if p.is_file()]
    levels = [level for level in reference.NF4 if level not in (-1.0, 0.0, 1.0)]
    holders = {
        identified(path)
        for path in sources
        if sum(mentions_level(path.read_text(), level) for level in levels) > 3
    }
    assert holders == {"rust/codebook.rs"}
