"""A decoder block of Llama-2-7B's shape, forward and backward: `python -m benches.block`.

Hidden size 4096, 11008 in the MLP, 32 heads, random weights, bfloat16; LoRA of rank 16 on all seven
linear layers; one sequence of 512 tokens. Three of them, with the same weights and adapters: ours;
peft over bitsandbytes' Linear4bit; peft over the dense block. Attention and norms are transformers'
and the same in each, so this is what a layer's speed is worth inside a model.

Before timing, the output and all gradients are compared with those of a dense block in float32: a
contender may be at most twice as far from them as the dense block in bfloat16 is, tensor by tensor.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benches import peers
from benches.measure import Table, arguments, interleave
from qlora_rs.model import replace_module

# Column and its name among the layers of `peers.lora_layers`.
CONTENDERS = {"ours": "ours", "peft on bnb": "bnb autograd", "peft on dense": "torch dense"}
DTYPE = torch.bfloat16
# How much farther from the float32 results than the dense bfloat16 block a contender may be.
TOLERANCE = 2.0

Step = Callable[[], tuple[Tensor, ...]]


def build(hidden: int, ffn: int, rank: int) -> tuple[LlamaConfig, dict[str, nn.Module]]:
    """The configuration, and a block for each contender."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        attn_implementation="sdpa",
        dtype=DTYPE,
    )
    with torch.device("meta"):
        blocks = {name: LlamaDecoderLayer(config, 0).to(DTYPE) for name in CONTENDERS}
    for name, module in list(blocks["ours"].named_modules()):
        if isinstance(module, nn.Linear):
            packed = peers.packed_weight(module.out_features, module.in_features)
            layers = peers.lora_layers(packed, DTYPE, rank)
        elif "norm" in name:
            ones = nn.Parameter(torch.ones(hidden, dtype=DTYPE), requires_grad=False)
        for contender, block in blocks.items():
            if isinstance(module, nn.Linear):
                replace_module(block, name, layers[CONTENDERS[contender]])
            elif "norm" in name:
                block.get_submodule(name).weight = ones
    return config, {name: block.train() for name, block in blocks.items()}


def adapters(block: nn.Module) -> list[Tensor]:
    """Trainable matrices, in the same order in every contender."""
    return [p for p in block.parameters() if p.requires_grad]


def weight_bytes(block: nn.Module) -> int:
    """Bytes of the frozen weights with their statistics."""
    frozen = [p for p in block.parameters() if not p.requires_grad]
    states = [s for p in frozen if (s := getattr(p, "quant_state", None)) is not None]
    kept = [t for s in states for t in s.as_dict(packed=True).values()]
    return sum(t.numel() * t.element_size() for t in (*frozen, *kept))


def forward(block: nn.Module, x: Tensor, positions: tuple[Tensor, Tensor]) -> Callable:
    return lambda: (block(x, position_embeddings=positions),)


def forward_backward(
    block: nn.Module, x: Tensor, positions: tuple[Tensor, Tensor], grad: Tensor
) -> Step:
    """y, dX and the gradients of the adapters."""
    wanted = [x, *adapters(block)]

    def step() -> tuple[Tensor, ...]:
        y = block(x, position_embeddings=positions)
        return (y, *torch.autograd.grad(y, wanted, grad))

    return step


def errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """The length of each tensor's error, divided by the tensor's own."""
    pairs = zip(results, exact, strict=True)
    return [float((r.detach().float() - e).norm() / e.norm()) for r, e in pairs]


def check(steps: dict[str, Step], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """How far each contender is from the float32 results, as a multiple of the dense block's."""
    found = {name: errors(step(), exact) for name, step in steps.items()}
    allowed = found["peft on dense"]
    worst = {n: max(e / a for e, a in zip(es, allowed, strict=True)) for n, es in found.items()}
    for name, multiple in worst.items():
        if not multiple <= TOLERANCE:
            raise SystemExit(
                f"{name} is {multiple:.1f} times as wrong as the dense block: not timed"
            )
    return worst


def measure(options: argparse.Namespace, table: Table) -> None:
    """Fill the table."""
    config, blocks = build(options.hidden, options.ffn, options.rank)
    shape = (1, options.tokens, options.hidden)
    x = torch.randn(shape).to(DTYPE).requires_grad_()
    grad = torch.randn(shape).to(DTYPE)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(options.tokens)[None])
    steps = {n: forward_backward(block, x, positions, grad) for n, block in blocks.items()}
    wide = copy.deepcopy(blocks["peft on dense"]).float()
    wide_positions = positions[0].float(), positions[1].float()
    wide_x = x.detach().float().requires_grad_()
    results = forward_backward(wide, wide_x, wide_positions, grad.float())()
    multiples = check(steps, tuple(result.detach() for result in results))
    del wide, results
    forwards = {name: forward(block, x, positions) for name, block in blocks.items()}
    for name, calls in (("forward", forwards), ("forward+backward", steps)):
        times = interleave(calls, options.seconds)
        ratios = [times[peer] / times["ours"] for peer in CONTENDERS if peer != "ours"]
        table.row(name, *(f"{1e3 * t:.0f}" for t in times.values()), *(f"{r:.2f}x" for r in ratios))
    table.say("")
    table.say(
        f"hidden {options.hidden}, MLP {options.ffn}, {options.tokens} tokens, bfloat16, rank "
        f"{options.rank}; milliseconds, medians of calls in turns; ratios: peer / ours"
    )
    for name, block in blocks.items():
        table.say(
            f"{name}: frozen weights {weight_bytes(block) / 1e6:.1f} MB; errors at most "
            f"{multiples[name]:.2f} times those of dense bfloat16"
        )


def main() -> None:
    parser = arguments("a Llama-2-7B-shaped decoder block beside peft")
    parser.set_defaults(seconds=20.0)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--ffn", type=int, default=11008)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("block", ("pass", *CONTENDERS, "bnb/ours", "dense/ours"))
    measure(options, table)
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
