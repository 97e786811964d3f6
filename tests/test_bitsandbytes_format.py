"""bitsandbytes' entries in both directions, and what is refused on the way in."""

from __future__ import annotations

import json
from collections.abc import Callable

import bitsandbytes.functional as bitsandbytes
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BLOCK_SIZES, FLOATS
from torch import Tensor

import qlora_rs
from qlora_rs import PackedWeight, QloraError

STATE = "w.quant_state.bitsandbytes__nf4"


def their_entries(
    weight: Tensor, block_size: int, nested: bool, storage: torch.dtype = torch.uint8
) -> tuple[dict[str, Tensor], Tensor]:
    """What bitsandbytes saves for a weight, and what it decodes it to.

    It decodes the flattened matrix here. Given the matrix, its AVX-512 kernel (0.50.2) takes each
    row to start at a block boundary, which is wrong for in_features like 96 with blocks of 64.
    """
    codes, state = bitsandbytes.quantize_4bit(
        weight,
        blocksize=block_size,
        quant_type="nf4",
        compress_statistics=nested,
        quant_storage=storage,
    )
    entries = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    state.shape = torch.Size((1, weight.numel()))
    return {"w": codes, **entries}, decoded_by_bitsandbytes(codes, state).view(weight.shape)


def decoded_by_bitsandbytes(codes: Tensor, state: bitsandbytes.QuantState) -> Tensor:
    # Odd sizes go through torch.compile, once per size, unless that is switched off.
    with torch.compiler.set_stance("force_eager"):
        return bitsandbytes.dequantize_4bit(codes, state)


@given(strategies.weights(), strategies.block_sizes, st.booleans())
def test_we_decode_its_tensors_to_its_values_bit_for_bit(
    weight: Tensor, block_size: int, nested: bool
) -> None:
    if weight.numel() == 0:
        return
    entries, decoded = their_entries(weight, block_size, nested)
    if not decoded.isfinite().all():
        return  # Its mean of huge absmax overflows float32.
    packed = PackedWeight.from_bitsandbytes(entries, "w")
    ours = packed.dequantize()
    assert (packed.shape, ours.dtype) == (weight.shape, weight.dtype)
    # The one exception: where the CPU converts to bf16 itself, it takes subnormal float32 for zero.
    subnormal = (packed.dequantize(torch.float32).abs() < 2.0**-126) & (decoded == 0)
    kept = ~subnormal if ours.dtype == torch.bfloat16 else slice(None)
    assert torch.equal(ours[kept], decoded[kept])


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_codes_stored_as_another_dtype_are_the_same_bytes(storage: torch.dtype) -> None:
    entries, decoded = their_entries(torch.randn(64, 64), 64, True, storage)
    assert entries["w"].dtype == storage
    assert torch.equal(PackedWeight.from_bitsandbytes(entries, "w").dequantize(), decoded)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bitsandbytes_decodes_our_entries_to_our_values(
    block_size: int, nested: bool, dtype: torch.dtype
) -> None:
    packed = qlora_rs.quantize(torch.randn(67, 129).to(dtype), block_size, nested)
    entries = packed.to_bitsandbytes("layer.w")
    codes = entries.pop("layer.w")
    state = bitsandbytes.QuantState.from_dict(entries, torch.device("cpu"))
    decoded = decoded_by_bitsandbytes(codes, state)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, packed.dequantize())


@given(strategies.weights(), strategies.block_sizes, st.booleans())
def test_our_entries_come_back_as_the_same_bytes(
    weight: Tensor, block_size: int, nested: bool
) -> None:
    packed = qlora_rs.quantize(weight, block_size, nested)
    again = PackedWeight.from_bitsandbytes(packed.to_bitsandbytes("w"), "w")
    assert (again.shape, again.dtype, again.block_size) == (weight.shape, weight.dtype, block_size)
    for ours, other in zip(packed._tensors(), again._tensors(), strict=True):
        assert ours is other is None or torch.equal(ours, other)


def edited(change: Callable[[dict, dict], object], nested: bool = True) -> dict[str, Tensor]:
    """Valid entries after `change(entries, state)`; what it returns replaces the state's bytes."""
    entries = qlora_rs.quantize(torch.randn(64, 64), 64, nested).to_bitsandbytes("w")
    state = json.loads(bytes(entries[STATE].tolist()))
    raw = change(entries, state)
    text = raw if isinstance(raw, bytes) else json.dumps(state).encode()
    if STATE in entries:
        entries[STATE] = torch.tensor(list(text), dtype=torch.uint8)
    return entries


def refusal(entries: dict[str, Tensor]) -> str:
    with pytest.raises(QloraError) as caught:
        PackedWeight.from_bitsandbytes(entries, "w")
    return str(caught.value)


ENTRIES = ("w", "w.absmax", "w.quant_map", "w.nested_absmax", "w.nested_quant_map", STATE)


@pytest.mark.parametrize("key", ENTRIES)
def test_a_missing_entry_is_refused_by_its_name(key: str) -> None:
    entries = edited(lambda *_: None)
    del entries[key]
    assert f"{key} is missing" in refusal(entries)


@pytest.mark.parametrize("field", ["quant_type", "blocksize", "dtype", "shape", "nested_offset"])
def test_a_state_without_a_field_is_refused_by_its_name(field: str) -> None:
    assert field in refusal(edited(lambda _, state: state.pop(field)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_type", "fp4"),
        ("dtype", "float8_e4m3fn"),
        ("dtype", []),
        ("shape", [4096]),
        ("shape", [-64, -64]),
        ("shape", None),
        ("shape", [64, 65]),
        ("shape", [2**70, 1]),
        ("shape", [2**32, 2**32]),
        # The product is 4096 more than 2**64: it must not pass for the 4096 codes that are there.
        ("shape", [4096, 2**52 + 1]),
        ("blocksize", 0),
        ("blocksize", 2**64),
        ("blocksize", "64"),
        ("blocksize", 128),
        ("blocksize", True),
        ("nested_blocksize", 128),
        ("nested_blocksize", [256]),
        ("nested_offset", "1"),
        ("nested_offset", float("nan")),
        ("nested_offset", float("inf")),
        ("nested_offset", 1e300),
    ],
    ids=str,
)
def test_a_state_that_lies_is_refused(field: str, value: object) -> None:
    assert refusal(edited(lambda _, state: state.update({field: value})))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b'"x"', b"1", b"null", b'{"quant_type":', b"\xff\xfe{}", b"[" * 100_000,
        b'{"blocksize":' + b"9" * 5000 + b"}",
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_a_state_that_is_not_the_expected_json_is_refused(text: bytes) -> None:
    assert "quant_state of w" in refusal(edited(lambda *_: text))


WRONG_ENTRIES: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "codes cut short": ("w", lambda t: t[:-1]),
    "codes as int64": ("w", lambda t: t.long()),
    "codes as a scalar": ("w", lambda t: torch.tensor(1.0)),
    "codes as float16 in rows of one byte": ("w", lambda t: t.to(torch.float16)),
    "codes as None": ("w", lambda t: None),
    "another table": ("w.quant_map", lambda t: t + 1e-3),
    "half a table": ("w.quant_map", lambda t: t[:8]),
    "a table of NaN": ("w.quant_map", lambda t: t * float("nan")),
    "a table of None": ("w.quant_map", lambda t: None),
    "absmax cut short": ("w.absmax", lambda t: t[:-1]),
    "absmax as float32": ("w.absmax", lambda t: t.float()),
    "absmax as None": ("w.absmax", lambda t: None),
    "nested absmax twice": ("w.nested_absmax", lambda t: torch.cat([t, t])),
    "nested absmax as float16": ("w.nested_absmax", lambda t: t.half()),
    "nested absmax as None": ("w.nested_absmax", lambda t: None),
    "nested map cut short": ("w.nested_quant_map", lambda t: t[:255]),
    "nested map as None": ("w.nested_quant_map", lambda t: None),
}


@pytest.mark.parametrize("lie", WRONG_ENTRIES)
def test_an_entry_of_the_wrong_kind_is_refused(lie: str) -> None:
    key, change = WRONG_ENTRIES[lie]
    assert refusal(edited(lambda entries, _: entries.update({key: change(entries[key])})))


@pytest.mark.parametrize(
    ("key", "nested"),
    [("w.absmax", False), ("w.nested_absmax", True), ("w.nested_quant_map", True)],
)
def test_statistics_that_are_not_finite_are_refused(key: str, nested: bool) -> None:
    entries = edited(lambda *_: None, nested)
    entries[key] = entries[key].clone()
    entries[key][0] = float("nan")
    assert "finite" in refusal(entries) or "NaN" in refusal(entries)


def test_statistics_in_any_memory_layout_decode_the_same() -> None:
    entries = edited(lambda *_: None)
    expected = PackedWeight.from_bitsandbytes(entries, "w").dequantize()
    for key in ("w", "w.absmax", "w.nested_quant_map"):
        entries[key] = entries[key].repeat_interleave(2, dim=0)[::2]
    assert torch.equal(PackedWeight.from_bitsandbytes(entries, "w").dequantize(), expected)


def test_strided_codes_stored_as_float16_decode_the_same() -> None:
    entries = edited(lambda *_: None)
    expected = PackedWeight.from_bitsandbytes(entries, "w").dequantize()
    halves = entries["w"].view(-1).view(torch.float16)
    entries["w"] = halves.repeat_interleave(2)[::2]
    assert torch.equal(PackedWeight.from_bitsandbytes(entries, "w").dequantize(), expected)


def test_an_fp4_weight_is_refused_with_the_remedy() -> None:
    codes, state = bitsandbytes.quantize_4bit(torch.randn(64, 64), quant_type="fp4")
    entries = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert "only NF4 is supported" in refusal({"w": codes, **entries})
