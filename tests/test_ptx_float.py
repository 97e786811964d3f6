"""Floating point: hand-computed values, and exact arithmetic as the oracle of every rounding mode."""

# ruff: noqa: E501 (tables of values)
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_emulator import Refusal
from ptx_snippets import bits, evaluate, rounded

NAN = 0x7FFFFFFF
ONE, TWO, THREE = bits(1.0), bits(2.0), bits(3.0)
TINY = 1  # the smallest subnormal f32
INFINITY = 0x7F800000
SIGN = 0x80000000

CASES = [
    ("add.f32", "b32", [(ONE, TWO, THREE), (INFINITY, INFINITY | SIGN, NAN), (TINY, TINY, 2)]),
    ("add.ftz.f32", "b32", [(TINY, TINY, 0), (TINY | SIGN, 0, 0), (ONE, TINY, ONE)]),
    ("add.sat.f32", "b32", [(ONE, ONE, ONE), (ONE, bits(-3.0), 0), (NAN, ONE, 0)]),
    ("mul.ftz.sat.f32", "b32", [(bits(2.0**-100), bits(2.0**-40), 0), (TWO, TWO, ONE)]),
    ("mul.sat.f32", "b32", [(bits(2.0**-100), bits(2.0**-40), bits(2.0**-140))]),
    ("add.rm.f32", "b32", [(ONE, bits(-1.0), SIGN)]),
    ("sub.f32", "b32", [(THREE, ONE, TWO)]),
    ("mul.f32", "b32", [(TWO, THREE, bits(6.0)), (0, INFINITY, NAN)]),
    ("mul.ftz.f32", "b32", [(bits(2.0**-100), bits(2.0**-40), 0), (SIGN | TINY, ONE, SIGN)]),
    ("div.rn.f32", "b32", [(ONE, THREE, 0x3EAAAAAB), (ONE, 0, INFINITY), (0, 0, NAN)]),
    ("div.rz.f32", "b32", [(ONE, THREE, 0x3EAAAAAA)]),
    ("div.approx.f32", "b32", [(bits(6.0), TWO, THREE), (bits(2.0**127), bits(-(2.0**127)), SIGN),
                               (INFINITY, bits(2.0**127), NAN)]),
    ("div.full.f32", "b32", [(bits(2.0**127), bits(2.0**127), ONE)]),
    ("min.f32", "b32", [(NAN, ONE, ONE), (0, SIGN, SIGN), (ONE, TWO, ONE)]),
    ("max.f32", "b32", [(NAN, ONE, ONE), (0, SIGN, 0), (ONE, TWO, TWO)]),
    ("min.NaN.f32", "b32", [(NAN, ONE, NAN)]),
    ("copysign.f32", "b32", [(bits(-1.0), TWO, bits(-2.0))]),
    ("add.f64", "b64", [(bits(1.0, "f64"), bits(2.0**-60, "f64"), bits(1.0, "f64"))]),
    ("add.rp.f64", "b64", [(bits(1.0, "f64"), bits(2.0**-60, "f64"), bits(1.0, "f64") + 1)]),
    ("div.rz.f64", "b64", [(bits(1.0, "f64"), bits(3.0, "f64"), bits(1 / 3, "f64"))]),
    ("add.f16", "b16", [(0x3C00, 0x3C00, 0x4000), (0x7BFF, 0x7BFF, 0x7C00), (0x7C00, 0xFC00, 0x7FFF)]),
    ("mul.sat.f16", "b16", [(0x4000, 0x4000, 0x3C00)]),
    ("add.f16x2", "b32", [(0x3C004000, 0x40003C00, 0x42004200)]),
    ("min.bf16x2", "b32", [(0x3F80FFFF, 0x40004000, 0x3F804000)]),
    ("max.NaN.bf16", "b16", [(0x7FC0, 0x3F80, 0x7FFF)]),
    ("add.rn.bf16", "b16", [(0x3F80, 0x3B80, 0x3F80), (0x3F81, 0x3B80, 0x3F82)]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_binary_float_instruction_follows_the_isa(case):
    code, kind, rows = case
    a, b, expected = zip(*rows, strict=True)
    assert evaluate(f"{code} %d, %a, %b;", kind, (kind, a), (kind, b)) == list(expected)


def test_minima_and_maxima_of_three():
    rows = [(ONE, TWO, THREE), (THREE, ONE, TWO), (TWO, THREE, ONE), (NAN, TWO, ONE)]
    operands = [("b32", column) for column in zip(*rows, strict=True)]
    for code, expected in {
        "min.f32": [ONE, ONE, ONE, ONE],
        "max.f32": [THREE, THREE, THREE, TWO],
        "max.NaN.f32": [THREE, THREE, THREE, NAN],
    }.items():
        found = evaluate(f"{code} %d, %a, %b, %c;", "b32", *operands, target="sm_100")
        assert found == expected


@pytest.mark.parametrize(
    "code",
    ["add.f32 %d, %a, %a, %a;", "fma.rn.f32 %d, %a, %a;", "min.s32 %d, %a, %a, %a;",
     ".reg .b64 x; .reg .b128 y; mov.b64 x, {%a, %a}; mov.b128 y, {x, x};"],
)  # fmt: skip
def test_an_unknown_form_of_a_known_instruction_is_refused(code):
    with pytest.raises(Refusal, match="unknown-instruction"):
        evaluate(code, "b32", ("b32", [ONE]))


UNARY = [
    ("sqrt.rn.f32", "b32", [(bits(2.0), bits(np.sqrt(np.float32(2)))), (bits(-1.0), NAN)]),
    ("rcp.rn.f32", "b32", [(bits(3.0), 0x3EAAAAAB), (0, INFINITY)]),
    ("ex2.approx.ftz.f32", "b32", [(bits(3.0), bits(8.0)), (bits(-1.0), bits(0.5))]),
    ("lg2.approx.f32", "b32", [(bits(8.0), THREE), (0, INFINITY | SIGN)]),
    ("rsqrt.approx.f32", "b32", [(bits(4.0), bits(0.5))]),
    ("abs.ftz.f32", "b32", [(SIGN | TINY, 0), (bits(-2.0), TWO)]),
    ("neg.f32", "b32", [(ONE, bits(-1.0))]),
    ("neg.f64", "b64", [(bits(1.0, "f64"), bits(-1.0, "f64"))]),
    ("abs.f16x2", "b32", [(0xBC00C000, 0x3C004000)]),
    ("neg.bf16", "b16", [(0x3F80, 0xBF80)]),
    ("ex2.approx.f16", "b16", [(0x4000, 0x4400)]),
]


@pytest.mark.parametrize("case", UNARY, ids=lambda case: case[0])
def test_a_unary_float_instruction_follows_the_isa(case):
    code, kind, rows = case
    a, expected = zip(*rows, strict=True)
    assert evaluate(f"{code} %d, %a;", kind, (kind, a)) == list(expected)


COMPARISONS = [
    ("lt", [1, 0, 0, 0]), ("ltu", [1, 0, 0, 1]), ("eq", [0, 1, 0, 0]), ("ne", [1, 0, 1, 0]),
    ("neu", [1, 0, 1, 1]), ("geu", [0, 1, 1, 1]), ("num", [1, 1, 1, 0]), ("nan", [0, 0, 0, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), COMPARISONS)
def test_a_comparison_knows_nan(name, expected):
    a, b = [ONE, ONE, TWO, NAN], [TWO, ONE, ONE, ONE]
    code = f"setp.{name}.f32 %d, %a, %b;"
    assert evaluate(code, "pred", ("b32", a), ("b32", b)) == expected


CONVERSIONS = [
    ("cvt.rni.s32.f32", "b32", "b32", [(bits(2.5), 2), (bits(-2.5), 2**32 - 2), (bits(3e9), 2**31 - 1), (NAN, 0)]),
    ("cvt.rzi.s64.f32", "b64", "b32", [(NAN, 2**63), (bits(-2.5), 2**64 - 2)]),
    ("cvt.rzi.s64.f16", "b64", "b16", [(0x7FFF, 2**63)]),
    ("cvt.rzi.u16.f64", "b16", "b64", [(0x7FF8 << 48, 2**15), (bits(7.9, "f64"), 7)]),
    ("cvt.rzi.u16.f32", "b16", "b32", [(NAN, 0)]),
    ("cvt.rzi.u32.f32", "b32", "b32", [(bits(2.9), 2), (bits(-1.0), 0)]),
    ("cvt.rmi.s32.f32", "b32", "b32", [(bits(-2.1), 2**32 - 3)]),
    ("cvt.rpi.s32.f32", "b32", "b32", [(bits(2.1), 3)]),
    ("cvt.rn.f32.s32", "b32", "b32", [(2**32 - 1, bits(-1.0)), (2**24 + 1, bits(2.0**24))]),
    ("cvt.rp.f32.u32", "b32", "b32", [(2**24 + 1, bits(2.0**24 + 2))]),
    ("cvt.rn.f32.u64", "b32", "b64", [(2**40 + 2**16 + 1, bits(2.0**40 + 2.0**17))]),
    ("cvt.rn.f64.s64", "b64", "b64", [(2**64 - 3, bits(-3.0, "f64"))]),
    ("cvt.s32.s8", "b32", "b32", [(0x80, 2**32 - 128), (0x17F, 127)]),
    ("cvt.u32.u8", "b32", "b32", [(0x1FF, 255)]),
    ("cvt.s64.s32", "b64", "b32", [(2**32 - 1, 2**64 - 1)]),
    ("cvt.u64.u32", "b64", "b32", [(2**32 - 1, 2**32 - 1)]),
    ("cvt.sat.u8.s32", "b32", "b32", [(300, 255), (2**32 - 5, 0)]),
    ("cvt.s16.s8", "b16", "b16", [(0xFF, 0xFFFF)]),
    ("cvt.s32.s16", "b32", "b16", [(0x8000, 2**32 - 32768)]),
    ("cvt.f32.f16", "b32", "b16", [(0x3C00, ONE), (1, bits(2.0**-24)), (0xFC00, INFINITY | SIGN)]),
    ("cvt.rn.f16.f32", "b16", "b32", [(bits(65519.0), 0x7BFF), (bits(65520.0), 0x7C00), (NAN, 0x7FFF)]),
    ("cvt.rz.f16.f32", "b16", "b32", [(bits(1e6), 0x7BFF)]),
    ("cvt.f32.bf16", "b32", "b16", [(0x3F80, ONE)]),
    ("cvt.rn.bf16.f32", "b16", "b32", [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82)]),
    ("cvt.rz.bf16.f32", "b16", "b32", [(0x3F81FFFF, 0x3F81)]),
    ("cvt.rn.relu.bf16.f32", "b16", "b32", [(bits(-1.0), 0), (ONE, 0x3F80)]),
    ("cvt.rna.tf32.f32", "b32", "b32", [(0x3F801000, 0x3F802000), (0x3F800FFF, ONE)]),
    ("cvt.rni.f32.f32", "b32", "b32", [(bits(2.5), TWO), (bits(-0.2), SIGN)]),
    ("cvt.rzi.ftz.f32.f32", "b32", "b32", [(bits(2.9), TWO)]),
    ("cvt.sat.f32.f32", "b32", "b32", [(TWO, ONE), (NAN, 0)]),
    ("cvt.rn.f32.f64", "b32", "b64", [(bits(1 / 3, "f64"), 0x3EAAAAAB)]),
    ("cvt.ftz.f64.f32", "b64", "b32", [(TINY, 0)]),
]  # fmt: skip


@pytest.mark.parametrize("case", CONVERSIONS, ids=lambda case: case[0])
def test_a_conversion_follows_the_isa(case):
    code, result, kind, rows = case
    a, expected = zip(*rows, strict=True)
    assert evaluate(f"{code} %d, %a;", result, (kind, a)) == list(expected)


def test_a_packed_conversion_puts_its_first_source_into_the_high_half():
    code = "cvt.rn.bf16x2.f32 %d, %a, %b;"
    assert evaluate(code, "b32", ("b32", [ONE]), ("b32", [TWO])) == [0x3F804000]
    code = "cvt.rn.f16x2.f32 %d, %a, %b;"
    assert evaluate(code, "b32", ("b32", [ONE]), ("b32", [TWO])) == [0x3C004000]


# Finite floats with exponents close enough to collide, ties and subnormals included.
FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.builds(lambda m, e: m * 2.0**e, st.integers(-(2**24) + 1, 2**24 - 1), st.integers(-149, 60)),
    st.sampled_from([1.0, -1.0, 2.0**-126, 2.0**-149, 3.4028234663852886e38]),
)
MODES = ["rn", "rz", "rm", "rp"]


@given(st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=8, max_size=32), st.sampled_from(MODES))
def test_sums_products_and_fma_are_rounded_once_in_every_mode(rows, mode):
    columns = [[bits(x) for x in column] for column in zip(*rows, strict=True)]
    operands = [("b32", column) for column in columns]
    exact = {
        f"add.{mode}.f32 %d, %a, %b;": lambda a, b, c: a + b,
        f"mul.{mode}.f32 %d, %a, %b;": lambda a, b, c: a * b,
        f"fma.{mode}.f32 %d, %a, %b, %c;": lambda a, b, c: a * b + c,
    }
    for code, formula in exact.items():
        found = evaluate(code, "b32", *operands)
        for row, value in zip(rows, found, strict=True):
            expected = formula(*map(Fraction, row))
            if expected != 0:
                assert value == rounded(expected, "f32", mode), (code, row)


HALVES = st.integers(0, 2**16 - 1)


@given(st.lists(st.tuples(HALVES, HALVES, HALVES), min_size=8, max_size=32))
def test_half_precision_fma_is_rounded_once(rows):
    def value(pattern: int, kind: str) -> Fraction | None:
        if kind == "f16":
            number = float(np.uint16(pattern).view(np.float16))
        else:
            number = float(np.uint32(pattern << 16).view(np.float32))
        return Fraction(number) if np.isfinite(number) else None

    operands = [("b16", list(column)) for column in zip(*rows, strict=True)]
    for kind in ("f16", "bf16"):
        found = evaluate(f"fma.rn.{kind} %d, %a, %b, %c;", "b16", *operands)
        for row, result in zip(rows, found, strict=True):
            a, b, c = (value(pattern, kind) for pattern in row)
            if None not in (a, b, c) and a * b + c != 0:
                assert result == rounded(a * b + c, kind, "rn"), (kind, row)
