"""linear_cross_entropy: against torch's in float64, on hostile logits, its refusals, its memory."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import strategies as given_strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.profiler import ProfilerActivity, profile

import qlora_rs
from qlora_rs import QloraError, cpu, linear_cross_entropy, loss

MIB = 1 << 20
IGNORED = -100


@st.composite
def problems(draw: Callable, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """hidden, weight, bias or none, and targets of which some are ignored."""
    dtype = dtype or draw(given_strategies.dtypes)
    leading = draw(st.sampled_from(((), (1,), (7,), (2, 5), (3, 0), (40,))))
    features, vocabulary = (
        draw(st.sampled_from((1, 3, 64))),
        draw(st.sampled_from((1, 2, 33, 2100))),
    )
    generator = torch.Generator().manual_seed(draw(given_strategies.seeds))
    scale = draw(st.sampled_from((0.0, 0.1, 1.0, 30.0)))
    hidden = torch.randn(*leading, features, generator=generator) * scale
    targets = torch.randint(vocabulary, leading, generator=generator)
    ignored = torch.rand(leading, generator=generator) < draw(st.sampled_from((0.0, 0.4, 1.0)))
    bias = torch.randn(vocabulary, generator=generator) if draw(st.booleans()) else None
    return {
        "hidden": hidden.to(dtype),
        "weight": torch.randn(vocabulary, features, generator=generator).to(dtype),
        "bias": None if bias is None else bias.to(dtype),
        "targets": targets.masked_fill(ignored, IGNORED),
    }


def differentiate(
    compute: Callable, problem: dict, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and bias; the operands cast to dtype before."""
    operands = [
        None if problem[name] is None else problem[name].to(dtype).detach().requires_grad_()
        for name in ("hidden", "weight", "bias")
    ]
    result = compute(*operands, problem["targets"])
    given = [operand for operand in operands if operand is not None]
    return [result, *torch.autograd.grad(result, given)]


def of_torch(reduction: str) -> Callable:
    """The loss as transformers computes it: logits in their dtype, the rest in float32 at least."""

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logits = linear(hidden, weight, bias).flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, targets.flatten(), reduction=reduction)

    return compute


def ours(reduction: str) -> Callable:
    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias, reduction=reduction)

    return compute


@given(problems(), st.sampled_from(("mean", "sum")), st.sampled_from((1, 3, 128)))
def test_loss_and_gradients_are_as_near_to_float64_as_torchs(
    problem: dict, reduction: str, chunk: int
) -> None:
    if problem["hidden"].dim() == 1:  # torch wants a batch of one
        problem = {
            **problem,
            "hidden": problem["hidden"][None],
            "targets": problem["targets"][None],
        }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_BYTES", 1)
        patch.setattr(loss, "CHUNK_TOKENS", chunk)
        found = differentiate(ours(reduction), problem)
    if not (problem["targets"] != IGNORED).any():
        assert found[0].isnan() if reduction == "mean" else found[0] == 0
        assert all((gradient == 0).all() for gradient in found[1:])
        return
    exact = differentiate(of_torch(reduction), problem, torch.float64)
    peers = differentiate(of_torch(reduction), problem)
    # Sums of terms of this size cancel to gradients of any size.
    terms = 1 + largest(problem["hidden"]) + largest(problem["weight"])
    # The sum over chunks that is the weight's gradient is rounded after each: one token at worst.
    sums = largest(problem["hidden"]) * problem["targets"].numel() if chunk < 128 else 0
    for got, peer, value in zip(found, peers, exact, strict=True):
        allowed = 4 * torch.finfo(got.dtype).eps * (largest(value) + sums) + 1e-6 * terms
        assert largest(got - value) <= 2 * largest(peer - value) + allowed


def largest(values: Tensor) -> float:
    return values.detach().abs().max().item()


@given(problems())
def test_losses_of_single_tokens_equal_torchs(problem: dict) -> None:
    hidden = problem["hidden"].requires_grad_()
    found = linear_cross_entropy(
        hidden, problem["weight"], problem["targets"], problem["bias"], reduction="none"
    )
    logits = linear(hidden, problem["weight"], problem["bias"]).float()
    rows, targets = logits.reshape(-1, logits.shape[-1]), problem["targets"].flatten()
    expected = cross_entropy(rows, targets, reduction="none").reshape(targets.shape)
    assert found.shape == problem["targets"].shape
    assert torch.allclose(found.flatten(), expected, rtol=1e-5, atol=1e-3)
    upstream = torch.randn(found.shape)
    (gradient,) = torch.autograd.grad(found, hidden, upstream)
    assert (gradient[problem["targets"] == IGNORED] == 0).all()


@pytest.mark.parametrize("dtype", given_strategies.FLOATS)
@pytest.mark.parametrize("kind", ["equal", "one large", "all large", "masked", "overflow", "nan"])
def test_hostile_logits_give_what_torch_gives(kind: str, dtype: torch.dtype) -> None:
    hidden, bias = torch.zeros(3, 4), torch.zeros(50)
    hidden[1, 0] = {"one large": 2e4, "overflow": 6e4, "nan": float("nan")}.get(kind, 1.0)
    bias += 3e4 if kind == "all large" else 0
    bias[10:] = -torch.inf if kind == "masked" else 0.0
    weight = torch.eye(50, 4) * (3.0 if kind == "overflow" else 1.0)
    bias[3] = torch.finfo(dtype).max if kind == "overflow" else bias[3]
    targets = torch.tensor([3, 0, 7])
    operands = [operand.to(dtype) for operand in (hidden, weight, bias)]
    operands[0].requires_grad_()
    found = linear_cross_entropy(operands[0], operands[1], targets, operands[2], reduction="none")
    expected = cross_entropy(linear(*operands).float(), targets, reduction="none")
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    (got,) = torch.autograd.grad(found.sum(), operands[0], retain_graph=True)
    (peer,) = torch.autograd.grad(expected.sum(), operands[0])
    assert torch.allclose(got, peer, rtol=2e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_gradients_are_those_of_finite_differences(reduction: str, with_bias: bool) -> None:
    hidden = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.tensor([[1, IGNORED, 10], [0, 0, IGNORED]])
    divisor = 7 if reduction == "mean" else None

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 3 * linear_cross_entropy(
            hidden, weight, targets, bias, reduction=reduction, num_items=divisor
        )

    assert torch.autograd.gradcheck(compute, (hidden, weight, bias))
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight.detach(), targets, reduction="none"), hidden
    )


@pytest.mark.parametrize("dtype", [*given_strategies.FLOATS, torch.float64])
def test_a_packed_weight_gives_what_its_dequantized_matrix_gives(dtype: torch.dtype) -> None:
    packed = qlora_rs.quantize(torch.randn(96, 64))
    hidden = torch.randn(40, 64).to(dtype).requires_grad_()
    bias, targets = torch.randn(96).to(dtype), torch.randint(96, (40,))
    found = linear_cross_entropy(hidden, packed, targets, bias)
    expected = linear_cross_entropy(hidden, packed.dequantize(dtype), targets, bias)
    gradients = [torch.autograd.grad(value, hidden)[0] for value in (found, expected)]
    tolerance = 30 * torch.finfo(dtype).eps
    assert abs(found - expected) <= tolerance * expected
    assert (gradients[0] - gradients[1]).abs().max() <= tolerance * gradients[1].abs().max()


def test_backward_scales_and_can_be_repeated() -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    value = linear_cross_entropy(hidden, weight, torch.arange(6))
    once = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(value * 4, (hidden, weight))
    assert all(torch.allclose(4 * a, b) for a, b in zip(once, again, strict=True))


def test_second_gradients_are_refused() -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    value = linear_cross_entropy(hidden, torch.randn(20, 8), torch.arange(6))
    with pytest.raises(QloraError, match=r"second gradients .* not implemented"):
        torch.autograd.grad(value, hidden, create_graph=True)


def test_no_gradient_is_computed_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    compute = cpu.cross_entropy
    monkeypatch.setattr(
        cpu,
        "cross_entropy",
        lambda *operands, gradient: asked.append(gradient) or compute(*operands, gradient=gradient),
    )
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, torch.arange(4)).requires_grad
    assert not linear_cross_entropy(hidden.detach(), weight, torch.arange(4)).requires_grad
    assert linear_cross_entropy(hidden, weight, torch.arange(4)).requires_grad
    assert asked == [False, False, True]


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, torch.arange(4))
        expected = cross_entropy(linear(hidden, weight), torch.arange(4))
    assert torch.allclose(found, expected, rtol=1e-5)
    found.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", given_strategies.FLOATS)
@pytest.mark.parametrize("dense", [False, True])
def test_the_bytes_do_not_depend_on_threads(
    dtype: torch.dtype, dense: bool, torch_threads: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On every CPU and for every type by our own product, also where torch's would be chosen: torch
    # sums in an order that depends on threads.
    monkeypatch.setattr(cpu, "is_faster_in_float32", lambda dtype: True)
    hidden, weight = (torch.randn(n, 64).to(dtype) for n in (37, 3000))
    weight, targets = weight if dense else qlora_rs.quantize(weight), torch.randint(3000, (37,))
    hidden.requires_grad_()

    def run(threads: int) -> tuple[Tensor, Tensor]:
        torch_threads(threads)
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
        return losses, torch.autograd.grad(losses.sum(), hidden)[0]

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


REFUSALS = {
    "needs targets": ({"targets": torch.zeros(4, dtype=torch.int64)}, r"\[5\].*got \[4\]"),
    "int targets": ({"targets": torch.zeros(5, dtype=torch.int32)}, "torch.int64.*torch.int32"),
    "above": ({"targets": torch.tensor([0, 20, 0, 21, 0])}, r"2 target.* of 20.*index 1: 20"),
    "below": ({"targets": torch.tensor([0, 0, -1, 0, 0])}, "index 2: -1.*ignore_index, -100"),
    "features": ({"hidden": torch.zeros(5, 9)}, r"must be 8 .*\[5, 9\]"),
    "scalar": ({"hidden": torch.tensor(1.0)}, "must be 8"),
    "dtype": ({"hidden": torch.zeros(5, 8, dtype=torch.int32)}, "torch.int32; convert"),
    "two dtypes": ({"weight": torch.zeros(20, 8).half()}, "float16 and torch.float32; convert"),
    "vector": ({"weight": torch.zeros(20)}, r"2 dimensions .*\[20\]"),
    "bias shape": ({"bias": torch.zeros(8)}, r"\[20\] .*got \[8\]"),
    "bias dtype": ({"bias": torch.zeros(20).half()}, "float32, got .*float16"),
    "reduction": ({"reduction": "median"}, "mean, sum, none, got 'median'"),
    "num_items": ({"reduction": "sum", "num_items": 3}, "reduction is 'sum'; drop"),
    "trained": ({"weight": torch.zeros(20, 8, requires_grad=True), "reduction": "none"}, "detach"),
    "device": ({"hidden": torch.zeros(5, 8, device="meta")}, "hidden is on meta .* move one"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_by_a_sentence(case: str) -> None:
    fitting = {
        "hidden": torch.zeros(5, 8),
        "weight": torch.zeros(20, 8),
        "targets": torch.zeros(5, dtype=torch.int64),
    }
    changed, sentence = REFUSALS[case]
    with pytest.raises(QloraError, match=sentence):
        linear_cross_entropy(**{**fitting, **changed})


def test_no_allocation_is_larger_than_a_chunk() -> None:
    hidden, weight = torch.randn(512, 64, requires_grad=True), torch.randn(32768, 64)
    targets = torch.randint(32768, (512,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        linear_cross_entropy(hidden, weight, targets).backward()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    large = [event.nbytes() for event in events if event.nbytes() > MIB]
    assert large == [16 * MIB]  # one buffer; logits of all tokens would take 64 MiB


PEAK = """
    import json, re, torch
    from qlora_rs import linear_cross_entropy
    from torch.nn.functional import cross_entropy

    def status(name):
        return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

    hidden = torch.randn(2048, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32768, 64, dtype=torch.bfloat16)
    targets = torch.randint(32768, (2048,))
    compute = {
        "ours": lambda h, t: linear_cross_entropy(h, weight, t),
        "torch": lambda h, t: cross_entropy((h @ weight.t()).float(), t),
    }[SIDE]
    compute(hidden[:4], targets[:4]).backward()  # what libraries allocate once
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # start VmHWM again from here
    compute(hidden, targets).backward()
    print(json.dumps(status("VmHWM") - before))
"""


def test_the_peak_of_a_step_is_a_chunk_not_the_logits(run_python: Callable) -> None:
    peaks = {}
    for side in ("ours", "torch"):
        done = run_python(PEAK.replace("SIDE", repr(side)))
        assert done.returncode == 0, done.stderr
        peaks[side] = json.loads(done.stdout)
    # Logits: 128 MiB in bfloat16. Ours: the chunk, small gradients, and what the matmul packs.
    assert peaks["ours"] <= (16 + 12) * MIB < 3 * 128 * MIB <= peaks["torch"]
