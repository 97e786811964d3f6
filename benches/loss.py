"""linear_cross_entropy beside torch's and trl's on a CPU: `python -m benches.loss`.

torch: logits, a float32 copy, cross_entropy, as transformers computes its loss. trl: the function
behind its trainers' fused head. Before timing, every loss must be within 1e-3 of the float64 one,
and every gradient of the hidden states within 1e-2 of it (of its norm).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

from benches.measure import Table, arguments, interleave
from qlora_rs import linear_cross_entropy

# tokens, vocabulary, width: SmolLM2-135M's head, Qwen2.5-0.5B's.
SHAPES = ((512, 49152, 576), (512, 151936, 896))


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.t()).float(), targets)


def of_trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    chunk, outputs = _CHUNKED_LOGPROB_CHUNK_SIZE, ("log_probs",)
    operands = (hidden, weight, None, targets, 1.0, chunk, None, 1.0, outputs)
    return -_ChunkedLogProbFunction.apply(*operands)[0].mean()


CONTENDERS = {"ours": linear_cross_entropy, "torch": of_torch, "trl": of_trl}


def step(compute: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple:
    loss = compute(hidden, weight, targets)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    wide = hidden.detach().double().requires_grad_()
    loss = cross_entropy(wide @ weight.double().t(), targets)
    gradient = torch.autograd.grad(loss, wide)[0]
    for name, compute in CONTENDERS.items():
        found = step(compute, hidden, weight, targets)
        assert abs(found[0] - loss) < 1e-3 * loss, f"{name}: loss {found[0]} for {loss}"
        assert (found[1] - gradient).norm() < 1e-2 * gradient.norm(), f"{name}: gradient"


def main() -> None:
    options = arguments("linear_cross_entropy beside torch and trl").parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    columns = ("tokens x vocabulary x width", "dtype", "pass", *(f"{c} ms" for c in CONTENDERS))
    table = Table("loss", columns)
    for tokens, vocabulary, width in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
            weight = (torch.randn(vocabulary, width) * width**-0.5).to(dtype)
            operands = (hidden, weight, torch.randint(vocabulary, (tokens,)))
            check(*operands)
            frozen = (hidden.detach(), *operands[1:])
            passes = {
                "both": {n: partial(step, c, *operands) for n, c in CONTENDERS.items()},
                "forward": {n: partial(c, *frozen) for n, c in CONTENDERS.items()},
            }
            for name, contenders in passes.items():
                times = interleave(contenders, options.seconds)
                kind = str(dtype).removeprefix("torch.")
                row = f"{tokens} x {vocabulary} x {width}"
                table.row(row, kind, name, *(1e3 * times[contender] for contender in CONTENDERS))
    table.say("")
    table.say(
        "both: forward and backward; dense weight without gradient; medians of interleaved calls"
    )
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
