"""QLoRA on one ordinary machine: 4-bit linear layers with LoRA, fast on a plain CPU.

packed = qlora_rs.quantize(weight)            # NF4 with double quantization
y = qlora_rs.linear(x, packed)                # never dequantizes the matrix
qlora_rs.quantize_model(model)                # every nn.Linear but lm_head
qlora_rs.add_lora(model, r=16, alpha=32)
qlora_rs.save_adapter(model, "adapter")       # peft loads it
"""

from qlora_rs._rust import __version__
from qlora_rs.adapter_io import load_adapter, save_adapter
from qlora_rs.attention import fuse_attention, unfuse_attention
from qlora_rs.errors import QloraError
from qlora_rs.functional import linear, lora_linear
from qlora_rs.fusion import fuse_loss, unfuse_loss
from qlora_rs.integrations.attention import unwiden_attention, widen_attention
from qlora_rs.layers import NF4Linear, QLoRALinear
from qlora_rs.loss import linear_cross_entropy
from qlora_rs.merging.model import merge_model, unmerge
from qlora_rs.merging.report import MergeReport
from qlora_rs.merging.solve import MergeResult, merge
from qlora_rs.mlp import fuse_mlps, unfuse_mlps
from qlora_rs.model import (
    add_lora,
    disable_adapter,
    enable_adapter,
    quantize_model,
    remove_lora,
    trainable_parameters,
)
from qlora_rs.norms import fuse_norms, unfuse_norms
from qlora_rs.quantize import PackedWeight, quantize
from qlora_rs.speed_ups import speed_up, undo_speed_up

__all__ = [
    "MergeReport",
    "MergeResult",
    "NF4Linear",
    "PackedWeight",
    "QLoRALinear",
    "QloraError",
    "__version__",
    "add_lora",
    "disable_adapter",
    "enable_adapter",
    "fuse_attention",
    "fuse_loss",
    "fuse_mlps",
    "fuse_norms",
    "linear",
    "linear_cross_entropy",
    "load_adapter",
    "lora_linear",
    "merge",
    "merge_model",
    "quantize",
    "quantize_model",
    "remove_lora",
    "save_adapter",
    "speed_up",
    "trainable_parameters",
    "undo_speed_up",
    "unfuse_attention",
    "unfuse_loss",
    "unfuse_mlps",
    "unfuse_norms",
    "unmerge",
    "unwiden_attention",
    "widen_attention",
]


def __dir__() -> list[str]:
    return __all__
