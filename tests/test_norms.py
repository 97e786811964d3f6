"""fuse_norms: the model's own results and gradients up to rounding; what is no RMS norm, stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_llama
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_rs import QloraError, fuse_loss, fuse_norms, unfuse_norms
from qlora_rs.norms import FusedNorm

IDS = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(5))


def norm(columns: int = 96, dtype: torch.dtype = torch.float32) -> LlamaRMSNorm:
    made = LlamaRMSNorm(columns, eps=1e-5)
    made.weight.data = torch.randn(columns, generator=torch.Generator().manual_seed(1))
    return made.to(dtype).requires_grad_(False)


class Textbook(nn.Module):
    """In float64 throughout; transformers' own rounds to float32 on the way."""

    def __init__(self, like: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.epsilon = like.weight.double(), like.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


def both(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """y and dX."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1, 96), (2, 40, 96), (700, 96), (96,), (0, 96)])
def test_results_and_gradients_are_the_norms_own(dtype: torch.dtype, size: tuple) -> None:
    x, grad = (torch.randn(size).to(dtype) for _ in range(2))
    exact = both(Textbook(norm(dtype=dtype)), x.double(), grad.double())
    theirs = both(norm(dtype=dtype), x, grad)
    ours = both(fuse_norms(norm(dtype=dtype)), x, grad)
    for got, own, expected in zip(ours, theirs, exact, strict=True):
        assert (got.dtype, got.shape) == (own.dtype, own.shape)
        if expected.numel():
            bound = (own.double() - expected).abs().max()
            unit = torch.finfo(dtype).eps * expected.abs().max()
            assert (got.double() - expected).abs().max() <= 2 * bound + unit / 2


def test_rows_with_gaps_and_gradients_that_are_views() -> None:
    fused, own = fuse_norms(norm()), norm()
    x, grad = torch.randn(96, 10).t(), torch.randn(1, 96).expand(10, 96)
    for got, expected in zip(both(fused, x, grad), both(own, x, grad), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_loss_and_gradients_stay(dtype: torch.dtype) -> None:
    model = tiny_llama.with_adapter().to(dtype).train()

    loss, gradients = tiny_llama.loss_and_gradients(model, IDS)
    assert fuse_norms(fuse_loss(model)) is model
    fused_loss, fused_gradients = tiny_llama.loss_and_gradients(model, IDS)
    unit = torch.finfo(dtype).eps
    assert (loss - fused_loss).abs() <= 4 * unit * loss.abs()
    largest = max(gradient.abs().max() for gradient in gradients)
    for got, expected in zip(fused_gradients, gradients, strict=True):
        assert (got - expected).abs().max() <= 20 * unit * largest


def test_undone_copied_and_saved() -> None:
    model = tiny_llama.dense().requires_grad_(False)
    names, expected = list(model.state_dict()), model(IDS).logits
    fuse_norms(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fused = [m.forward.module is m for m in other.modules() if "forward" in m.__dict__]
        assert fused == [True] * 5
        assert list(other.state_dict()) == names
        assert torch.allclose(other(IDS).logits, expected, atol=1e-5)
    assert torch.equal(unfuse_norms(model)(IDS).logits, expected)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_no_root_mean_square_stays_and_its_neighbours_do_not() -> None:
    gemma = GemmaRMSNorm(96).requires_grad_(False)
    nn.init.normal_(gemma.weight)
    model = nn.Sequential(gemma, norm(), nn.LayerNorm(96), nn.RMSNorm(96, eps=1e-6))
    fuse_norms(model)
    assert [isinstance(m.__dict__.get("forward"), FusedNorm) for m in model] == [
        False, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(8)), "no RMS norm of the usual formula.*none"),
        (lambda: nn.Sequential(GemmaRMSNorm(8)), "GemmaRMSNorm"),
        (lambda: norm().to("meta"), "on the CPU"),
        (lambda: fuse_norms(norm()), "has fused norms already; unfuse_norms"),
    ],
)
def test_refusals_name_what_was_found(build, sentence: str) -> None:
    model = build()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(QloraError, match=sentence):
        fuse_norms(model)
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_unfusing_what_is_not_fused_is_refused() -> None:
    with pytest.raises(QloraError, match="has no fused norms to undo; if they were fused"):
        unfuse_norms(norm())


def test_the_norms_own_way_where_ours_does_not_lead() -> None:
    fused, own = fuse_norms(norm()), norm()
    x = torch.randn(4, 96)
    assert torch.equal(fused(x.double()), own(x.double()))
    assert torch.equal(fused(x.bfloat16()), own(x.bfloat16()))
    assert torch.allclose(torch.func.vmap(fused)(x), own(x), atol=1e-6)
    assert torch.equal(fused(hidden_states=x), own(x))
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
            for f in (fused, own)
        ]
    assert torch.equal(*tangents)
    fused.weight.requires_grad_(True)
    fused(x).sum().backward()
    own.weight.requires_grad_(True)
    own(x).sum().backward()
    assert torch.equal(fused.weight.grad, own.weight.grad)


def test_a_compiler_follows_a_fused_norm_whole() -> None:
    fused, x = fuse_norms(norm()), torch.randn(4, 96)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), norm()(x), atol=1e-6)


def test_second_and_batched_gradients_are_the_norms_own() -> None:
    x = torch.randn(3, 96, requires_grad=True)
    directions = torch.randn(5, 3, 96)

    def gradients(layer: nn.Module) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        (many,) = torch.autograd.grad(layer(x), x, directions, is_grads_batched=True)
        return second, many

    for got, expected in zip(gradients(fuse_norms(norm())), gradients(norm()), strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing() -> None:
    layer, x = fuse_norms(norm()), torch.randn(5, 96, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.allclose(x.grad, both(norm(), x, torch.ones(5, 96))[1], atol=1e-6)


@pytest.mark.parametrize("view", ["negated lazily", "transposed"])
def test_a_weight_that_is_not_what_lies_in_memory(view: str) -> None:
    made, own, x = norm(), norm(), torch.randn(4, 96)
    weight = made.weight.data
    views = {
        "negated lazily": lambda: torch._neg_view(-weight),
        "transposed": lambda: torch.stack([weight, weight]).t().contiguous()[:, 0],
    }
    made.weight.data = views[view]()
    assert torch.allclose(fuse_norms(made)(x), own(x), atol=1e-6)


class OtherRMSNorm(nn.Module):
    """Named so, and something else."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(96)), 1e-6
        self.answer = answer

    def forward(self, x: Tensor, *more: Tensor) -> object:
        return self.answer(x, *more)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x, scale: x * scale,
        lambda x: (x, x),
        lambda x: x.double(),
        lambda x: nn.functional.rms_norm(x, (1,)),
        lambda x: x / x.square().mean(0, keepdim=True).sqrt(),
    ],
)
def test_what_only_has_the_name_stays(answer) -> None:
    model = nn.Sequential(OtherRMSNorm(answer), norm())
    fuse_norms(model)
    assert ["forward" in module.__dict__ for module in model] == [False, True]


def test_a_forward_that_somebody_replaced_stays_theirs() -> None:
    model = nn.Sequential(norm(), norm())
    model[0].forward = lambda x: x
    fuse_norms(model)
    x = torch.randn(2, 96)
    assert torch.equal(model[0](x), x)
    assert isinstance(model[1].forward, FusedNorm)


def test_a_frozen_norm_keeps_nothing_but_its_input() -> None:
    x = torch.randn(64, 96, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    layer = fuse_norms(norm(dtype=torch.bfloat16))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert sum(t.numel() * t.element_size() for t in kept) == (64 + 1) * 96 * 2
