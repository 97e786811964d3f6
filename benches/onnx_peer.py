"""onnxruntime's 4-bit product as a contender: `MatMulNBits`, computing in f32.

Its weights are integers with one scale per block, so it cannot hold our bytes: the same matrix is
rounded to its grid, and its answer is checked against that one's float64 product.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from benches import peers
from qlora_rs import PackedWeight

# com.microsoft.MatMulNBits: 0 leaves the choice open, 1 is f32, 4 rounds activations to int8.
COMPUTE_IN_F32 = 1
# The integer that stands for zero where no zero points are given.
ZERO = 8


def rounded(packed: PackedWeight) -> tuple[np.ndarray, np.ndarray]:
    """The weight as integers 0..15 [out, in] and a scale per block [out, in / block size]."""
    weight = packed.dequantize(torch.float32)
    blocks = weight.view(weight.shape[0], -1, packed.block_size)
    scales = (blocks.abs().amax(-1) / (ZERO - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    integers = (blocks / scales[..., None]).round() + ZERO
    return integers.view_as(weight).numpy().astype(np.uint8), scales.numpy()


def session(packed: PackedWeight, threads: int) -> tuple[onnxruntime.InferenceSession, Tensor]:
    """A session of one such product, and its weight in float64."""
    out_features, in_features = packed.shape
    integers, scales = rounded(packed)
    blocks = integers.reshape(out_features, -1, packed.block_size)
    # The first weight of a byte lies in its low half.
    codes = blocks[..., ::2] | (blocks[..., 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=in_features,
        N=out_features,
        bits=4,
        block_size=packed.block_size,
        accuracy_level=COMPUTE_IN_F32,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out_features])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads wait busily within a call, as they do by default, but not during others' turns.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    weight = (integers.astype(np.float64) - ZERO) * np.repeat(scales, packed.block_size, axis=1)
    providers = ["CPUExecutionProvider"]
    serialized = model.SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, providers), torch.from_numpy(weight)


class OnnxProduct:
    """The product of one packed weight's nearest integers, for any number of rows."""

    def __init__(self, packed: PackedWeight, threads: int) -> None:
        self.session, self.weight = session(packed, threads)

    def forward(self, x: Tensor) -> Callable[[], object]:
        """A call that multiplies x; it is checked once before."""
        values = x.numpy()

        def call() -> np.ndarray:
            return self.session.run(None, {"x": values})[0]

        exact = x.double() @ self.weight.t()
        peers.check("onnxruntime", torch.from_numpy(call()), exact, torch.float32)
        return call
