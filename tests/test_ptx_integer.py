"""Integer and bit instructions against values worked out by hand from the PTX ISA."""

# ruff: noqa: E501 (tables of values)
from __future__ import annotations

import pytest
from ptx_snippets import evaluate

M = 0xFFFFFFFF
M64 = 0xFFFFFFFFFFFFFFFF

# instruction, result type, operand types, [(operands..., expected)]
CASES = [
    ("add.s32", "b32", "b32 b32", [(M, 1, 0), (2**31 - 1, 1, 2**31)]),
    ("add.sat.s32", "b32", "b32 b32", [(2**31 - 1, 1, 2**31 - 1), (2**31, M, 2**31)]),
    ("sub.s32", "b32", "b32 b32", [(0, 1, M), (5, 3, 2)]),
    ("sub.sat.s32", "b32", "b32 b32", [(2**31, 1, 2**31)]),
    ("add.s64", "b64", "b64 b64", [(M64, 2, 1)]),
    ("add.u16", "b16", "b16 b16", [(0xFFFF, 2, 1)]),
    ("mul.lo.u32", "b32", "b32 b32", [(0x10001, 0x10001, 0x20001)]),
    ("mul.hi.u32", "b32", "b32 b32", [(M, M, M - 1)]),
    ("mul.hi.s32", "b32", "b32 b32", [(M, M, 0), (2**31, 2, M)]),
    ("mul.hi.u64", "b64", "b64 b64", [(M64, M64, M64 - 1)]),
    ("mul.hi.s64", "b64", "b64 b64", [(M64, 3, M64)]),
    ("mul.wide.s32", "b64", "b32 b32", [(M, 2, M64 - 1)]),
    ("mul.wide.u32", "b64", "b32 b32", [(M, 2, 2 * M)]),
    ("mul.wide.s16", "b32", "b16 b16", [(0xFFFF, 5, M - 4)]),
    ("mul.wide.u16", "b32", "b16 b16", [(0xFFFF, 0xFFFF, 0xFFFE0001)]),
    ("mul24.lo.s32", "b32", "b32 b32", [(0xFFFFFF, 5, M - 4)]),
    ("mul24.hi.u32", "b32", "b32 b32", [(0xFFFFFF, 0xFFFFFF, 0xFFFFFE00)]),
    ("mad24.hi.u32", "b32", "b32 b32 b32", [(0xFFFFFF, 0xFFFFFF, 0x201, 1)]),
    ("mad24.hi.s32", "b32", "b32 b32 b32", [(0xFFFFFF, 0x10000, 7, 6), (0x7FFFFF, 2, 0, 255)]),
    ("mad.lo.s32", "b32", "b32 b32 b32", [(3, 4, 5, 17), (M, M, M, 0)]),
    ("mad.hi.u32", "b32", "b32 b32 b32", [(M, M, 1, M)]),
    ("mad.wide.u32", "b64", "b32 b32 b64", [(M, M, M, M * M + M)]),
    ("mad.wide.s32", "b64", "b32 b32 b64", [(M, 1, 1, 0)]),
    ("sad.s32", "b32", "b32 b32 b32", [(M, 1, 10, 12), (2**31, 2**31 - 1, 0, M)]),
    ("sad.u32", "b32", "b32 b32 b32", [(1, 4, 10, 13)]),
    ("div.s32", "b32", "b32 b32", [(M - 6, 2, M - 2), (7, M - 1, M - 2)]),
    ("div.u32", "b32", "b32 b32", [(M, 2, 2**31 - 1)]),
    ("rem.s32", "b32", "b32 b32", [(M - 6, 2, M), (7, M - 1, 1)]),
    ("rem.u64", "b64", "b64 b64", [(M64, 10, 5)]),
    ("abs.s32", "b32", "b32", [(M, 1), (2**31, 2**31)]),
    ("neg.s16", "b16", "b16", [(1, 0xFFFF)]),
    ("min.s32", "b32", "b32 b32", [(M, 1, M)]),
    ("min.u32", "b32", "b32 b32", [(M, 1, 1)]),
    ("max.s64", "b64", "b64 b64", [(M64, 1, 1)]),
    ("max.s16", "b16", "b16 b16", [(0xFFFF, 1, 1)]),
    ("min.relu.s32", "b32", "b32 b32", [(M, 1, 0)]),
    ("min.relu.s16x2", "b32", "b32 b32", [(0xFFFF_0003, 0x0001_0002, 2)]),
    ("max.relu.s16x2", "b32", "b32 b32", [(0xFFFF_0003, 0xFFFE_0002, 3)]),
    ("and.b32", "b32", "b32 b32", [(0xF0F0, 0xFF00, 0xF000)]),
    ("or.b64", "b64", "b64 b64", [(1 << 40, 1, (1 << 40) + 1)]),
    ("xor.b32", "b32", "b32 b32", [(0xFF, 0x0F, 0xF0)]),
    ("not.b32", "b32", "b32", [(0, M)]),
    ("not.b16", "b16", "b16", [(1, 0xFFFE)]),
    ("cnot.b32", "b32", "b32", [(0, 1), (7, 0)]),
    ("shl.b32", "b32", "b32 b32", [(1, 31, 2**31), (1, 32, 0), (3, 4, 48)]),
    ("shl.b64", "b64", "b64 b32", [(1, 63, 2**63), (1, 64, 0)]),
    ("shr.u32", "b32", "b32 b32", [(M, 31, 1), (M, 40, 0)]),
    ("shr.s32", "b32", "b32 b32", [(2**31, 31, M), (2**31, 99, M)]),
    ("shr.s16", "b16", "b16 b32", [(0x8000, 3, 0xF000)]),
    ("shf.l.wrap.b32", "b32", "b32 b32 b32", [(0x80000000, 1, 1, 3), (5, 7, 32, 7)]),
    ("shf.r.wrap.b32", "b32", "b32 b32 b32", [(2, 1, 1, 0x80000001), (5, 7, 33, 0x80000002)]),
    ("shf.l.clamp.b32", "b32", "b32 b32 b32", [(5, 7, 40, 5)]),
    ("shf.r.clamp.b32", "b32", "b32 b32 b32", [(5, 7, 40, 7)]),
    ("clz.b32", "b32", "b32", [(0, 32), (1, 31), (M, 0)]),
    ("clz.b64", "b32", "b64", [(1, 63)]),
    ("popc.b32", "b32", "b32", [(0xF0F, 8)]),
    ("popc.b64", "b32", "b64", [(M64, 64)]),
    ("brev.b32", "b32", "b32", [(1, 2**31), (0xF0, 0x0F000000)]),
    ("bfind.u32", "b32", "b32", [(0, M), (1, 0), (0x1000, 12)]),
    ("bfind.s32", "b32", "b32", [(M, M), (M - 1, 0), (0x80000000, 30)]),
    ("bfind.shiftamt.u32", "b32", "b32", [(0x1000, 19), (0, M)]),
    ("bfe.u32", "b32", "b32 b32 b32",
     [(0xABCD1234, 8, 8, 0x12), (0xFF, 4, 0, 0), (M, 28, 8, 0xF), (M, 32, 4, 0)]),
    ("bfe.s32", "b32", "b32 b32 b32",
     [(0xABCD1234, 16, 8, M - 0x32), (0x80000000, 28, 8, 0xFFFFFFF8), (0x7F, 0, 8, 0x7F)]),
    ("bfe.u64", "b64", "b64 b32 b32", [(0xABCD << 40, 40, 16, 0xABCD)]),
    ("bfi.b32", "b32", "b32 b32 b32 b32",
     [(0xFF, 0, 8, 4, 0xF00), (0, M, 4, 8, 0xFFFFF00F), (M, 0, 30, 9, 0xC0000000), (1, 5, 0, 0, 5)]),
    ("szext.wrap.s32", "b32", "b32 b32", [(0xFF, 8, M), (0x7F, 8, 0x7F)]),
    ("szext.clamp.u32", "b32", "b32 b32", [(M, 8, 0xFF), (M, 40, M)]),
    ("bmsk.clamp.b32", "b32", "b32 b32", [(4, 8, 0xFF0), (40, 3, 0), (28, 9, 0xF0000000)]),
    ("lop3.b32 %d, %a, %b, %c, 0x96;", "b32", "b32 b32 b32", [(0xFF00, 0xF0F0, 0xCCCC, 0xC33C)]),
    ("lop3.b32 %d, %a, %b, %c, 0xE8;", "b32", "b32 b32 b32", [(0xFF00, 0xF0F0, 0xCCCC, 0xFCC0)]),
    # prmt: byte picks, and the top bit of a selector nibble repeats the byte's sign.
    ("prmt.b32", "b32", "b32 b32 b32",
     [(0x33221100, 0x77665544, 0x7531, 0x77553311), (0x33229100, 0, 0x9999, M),
      (0x33221100, 0, 0x9999, 0), (0x80FF0012, 0x0081, 0xC8BA, 0xFF00FFFF)]),
    ("prmt.b32.f4e", "b32", "b32 b32 b32", [(0x33221100, 0x77665544, 1, 0x44332211)]),
    ("prmt.b32.b4e", "b32", "b32 b32 b32", [(0x33221100, 0x77665544, 1, 0x66770011)]),
    ("prmt.b32.rc8", "b32", "b32 b32 b32", [(0x33221100, 0, 2, 0x22222222)]),
    ("prmt.b32.rc16", "b32", "b32 b32 b32", [(0x33221100, 0, 1, 0x33223322)]),
    ("prmt.b32.ecl", "b32", "b32 b32 b32", [(0x33221100, 0, 1, 0x33221111)]),
    ("prmt.b32.ecr", "b32", "b32 b32 b32", [(0x33221100, 0, 1, 0x11111100)]),
    ("dp4a.s32.s32", "b32", "b32 b32 b32", [(0xFF020304, 0x01010101, 10, 18)]),
    ("dp4a.u32.u32", "b32", "b32 b32 b32", [(0xFF020304, 0x01010101, 10, 274)]),
    ("dp4a.u32.s32", "b32", "b32 b32 b32", [(0x000000FF, 0x000000FF, 0, M - 254)]),
    ("dp2a.lo.s32.s32", "b32", "b32 b32 b32", [(0xFFFF0002, 0x0403_0201, 0, 0)]),
    ("dp2a.hi.s32.s32", "b32", "b32 b32 b32", [(0xFFFF0002, 0x0403_0201, 0, 2)]),
    ("add.cc.u32 %d, %a, %b; addc.u32 %d, %a, %b;", "b32", "b32 b32", [(M, 1, 1), (1, 1, 2)]),
    ("sub.cc.u32 %d, %a, %b; subc.u32 %d, %a, %b;", "b32", "b32 b32", [(0, 1, M - 1), (5, 1, 4)]),
    ("mad.lo.cc.u32 %d, %a, %b, %c; madc.hi.u32 %d, %a, %b, %c;", "b32", "b32 b32 b32",
     [(M, M, M, M - 1 + M + 1 - 2**32)]),
    ("slct.b32.s32", "b32", "b32 b32 b32", [(1, 2, 0, 1), (1, 2, M, 2)]),
    ("slct.b32.f32", "b32", "b32 b32 b32", [(1, 2, 0x80000001, 2), (1, 2, 0x80000000, 1)]),
    ("slct.ftz.b32.f32", "b32", "b32 b32 b32", [(1, 2, 0x80000001, 1), (1, 2, 0xBF800000, 2)]),
    ("cvt.s16.s32 %d, %a;", "b32", "b32", [(0x18000, M - 0x7FFF), (0x7FFF, 0x7FFF)]),
    ("selp.b32", "b32", "b32 b32 pred", [(1, 2, 1, 1), (1, 2, 0, 2)]),
    ("setp.lt.s32", "pred", "b32 b32", [(M, 0, 1), (0, M, 0)]),
    ("setp.lt.u32", "pred", "b32 b32", [(M, 0, 0), (0, M, 1)]),
    ("setp.hs.u32", "pred", "b32 b32", [(M, 0, 1), (5, 5, 1)]),
    ("setp.ge.s16", "pred", "b16 b16", [(0xFFFF, 0, 0)]),
    ("setp.gt.s64", "pred", "b64 b64", [(M64, 0, 0), (1, 0, 1)]),
    ("setp.eq.and.b32 %d, %a, %b, !%c;", "pred", "b32 b32 pred", [(1, 1, 0, 1), (1, 1, 1, 0)]),
    ("setp.ne.xor.b32", "pred", "b32 b32 pred", [(1, 2, 1, 0), (1, 1, 1, 1)]),
    (".reg .pred q; setp.lt.s32 q|%d, %a, %b;", "pred", "b32 b32", [(1, 2, 0), (2, 1, 1)]),
    ("set.gt.u32.s32", "b32", "b32 b32", [(1, M, M), (M, 1, 0)]),
    ("mov.b32 %d, {%a, %b};", "b32", "b16 b16", [(0x1234, 0xABCD, 0xABCD1234)]),
    (".reg .b32 x; mov.b64 {x, %d}, %a;", "b32", "b64", [(0x1122334455667788, 0x11223344)]),
    ("vote.sync.ballot.b32 %d, %a, 0x3;", "b32", "pred", [(1, 1), (0, 1)]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_an_integer_instruction_follows_the_isa(case):
    code, result, kinds, rows = case
    if "%" not in code:
        operands = ", ".join(f"%{name}" for name in "abce"[: len(kinds.split())])
        code = f"{code} %d, {operands};"
    columns = list(zip(*rows, strict=True))
    operands = [(kind, column) for kind, column in zip(kinds.split(), columns, strict=False)]
    assert evaluate(code, result, *operands) == list(columns[-1])
