"""One instruction of PTX over lists of operands: lane i computes with the i-th values."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from ptx_emulator import Module, inout

HEADER = ".version 8.8\n.target sm_90\n.address_size 64\n"
BITS = {"pred": 32, "b8": 8}


def _bits(kind: str) -> int:
    return BITS.get(kind) or (32 if kind.endswith("x2") else int(kind.lstrip("busf")))


def evaluate(
    code: str,
    result: str,
    *operands: tuple[str, Sequence[int]],
    target: str = "sm_90",
    **options,
) -> list[int]:
    """Run `code`, which computes `%d` from `%a`, `%b`, ... in each lane.

    `result` and the operands' first parts are register types such as "b32"; operands are bit
    patterns. Further registers of the code go between its own braces.
    """
    count = len(operands[0][1])
    assert 0 < count <= 32
    names = "abcefgh"
    registers = [f".reg .{result} %d;"]
    loads = []
    for name, (kind, _) in zip(names, operands, strict=False):
        bits = max(_bits(kind), 16)
        registers.append(f".reg .{kind if kind != 'b8' else 'b16'} %{name};")
        if kind == "pred":
            registers.append(f".reg .b32 %p{name};")
            loads.append(f"ld.global.b32 %p{name}, [%at_{name}]; setp.ne.b32 %{name}, %p{name}, 0;")
        else:
            loads.append(f"ld.global.b{bits} %{name}, [%at_{name}];")
        registers.append(f".reg .b64 %at_{name};")
    pointers = [
        f"ld.param.b64 %at_{name}, [{name}]; add.s64 %at_{name}, %at_{name}, %offset;"
        for name, _ in zip(names, operands, strict=False)
    ]
    if result == "pred":
        store = "selp.b32 %word, 1, 0, %d; st.global.b32 [%out], %word;"
    else:
        store = f"st.global.b{max(_bits(result), 16)} [%out], %d;"
    parameters = ", ".join(
        f".param .b64 {name}"
        for name in ["out", *(n for n, _ in zip(names, operands, strict=False))]
    )
    ptx = f"""{HEADER.replace("sm_90", target)}
.visible .entry kernel({parameters}) {{
    .reg .b64 %out, %offset; .reg .b32 %lane, %word;
    {" ".join(registers)}
    mov.u32 %lane, %tid.x;
    mul.wide.u32 %offset, %lane, 8;
    ld.param.b64 %out, [out]; add.s64 %out, %out, %offset;
    {" ".join(pointers)}
    {" ".join(loads)}
    {{ {code} }}
    {store}
    ret;
}}"""
    arrays = [
        np.array([value % 2**64 for value in values], dtype=np.uint64) for _, values in operands
    ]
    launched = Module(ptx).launch(
        "kernel", [inout(np.zeros(count, np.uint64)), *arrays], grid=1, block=count, **options
    )
    mask = (1 << (32 if result == "pred" else max(_bits(result), 16))) - 1
    return [int(value) & mask for value in launched.arrays[0]]


def bits(value: float, kind: str = "f32") -> int:
    """The bit pattern of a number."""
    floats = {"f16": (np.float16, np.uint16), "f32": (np.float32, np.uint32),
              "f64": (np.float64, np.uint64)}  # fmt: skip
    real, unsigned = floats[kind]
    return int(real(value).view(unsigned))


FORMATS = {"f16": (10, -14, 15), "bf16": (7, -126, 127), "f32": (23, -126, 127),
           "tf32": (10, -126, 127)}  # fmt: skip


def rounded(value: Fraction, kind: str, mode: str) -> int:
    """The bits of an exact number in a format: the definition of rounding, in exact arithmetic.

    Not for zero, whose sign a fraction does not hold.
    """
    fraction_bits, lowest, highest = FORMATS[kind]
    exponent_bits = highest.bit_length() + 1
    magnitude, negative = abs(value), value < 0
    exponent = lowest
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    unit = Fraction(2) ** (exponent - fraction_bits)
    kept, rest = divmod(magnitude, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and kept % 2 == 1),
        "rna": rest * 2 >= unit,
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    kept += up
    if kept == 2 ** (fraction_bits + 1):
        kept, exponent = kept // 2, exponent + 1
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    sign = int(negative) << (exponent_bits + fraction_bits)
    if exponent > highest:
        grows = {"rn": True, "rna": True, "rz": False, "rm": negative, "rp": not negative}[mode]
        return sign | (infinity if grows else infinity - 1)
    if kept < 2**fraction_bits:
        return sign | int(kept)
    return sign | ((exponent - lowest + 1) << fraction_bits) | int(kept - 2**fraction_bits)
