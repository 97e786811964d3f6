"""fuse_mlps: the MLPs' own results and gradients up to rounding; the own way everywhere else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import tiny_llama
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import qlora_rs
from qlora_rs import QloraError, fuse_loss, fuse_mlps, fuse_norms, unfuse_mlps
from qlora_rs.mlp import LAYERS, FusedMlp, _Mlp

IDS = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(5))


def mlp(activation: str = "silu", bias: bool = False, **options: object) -> LlamaMLP:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, hidden_act=activation, mlp_bias=bias
    )
    made = qlora_rs.add_lora(qlora_rs.quantize_model(LlamaMLP(config)), r=4, **options)
    return tiny_llama.randomize(made).train()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The operand of each MLP that was computed in one step."""
    seen: list[Tensor] = []
    apply = _Mlp.apply

    def count(x: Tensor, *others: object) -> Tensor:
        y = apply(x, *others)
        seen.append(x)
        return y

    monkeypatch.setattr(_Mlp, "apply", count)
    return seen


def textbook(made: nn.Module, x: Tensor) -> Tensor:
    """In float64, from the decoded weights."""

    def product(layer: qlora_rs.QLoRALinear, x: Tensor) -> Tensor:
        low_rank = layer.lora_B.double() @ layer.lora_A.double()
        return x @ (layer.dequantize(torch.float32).double() + layer.scaling * low_rank).t()

    gate, up, down = (getattr(made, name) for name in LAYERS)
    gated = product(gate, x)
    return product(down, gated / (1 + torch.exp(-gated)) * product(up, x))


def answers(module: Callable, made: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """y, and the gradients of x and of all factors."""
    made.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in made.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1, 64), (2, 20, 64), (64,), (0, 64)])
def test_results_and_gradients_are_the_mlps_own(
    dtype: torch.dtype, size: tuple, fused: list
) -> None:
    made = mlp()
    x, grad = (torch.randn(size).to(dtype) for _ in range(2))
    exact = answers(lambda x: textbook(made, x), made, x.double(), grad.double())
    theirs = answers(made, made, x, grad)
    ours = answers(fuse_mlps(made), made, x, grad)
    assert len(fused) == 1
    assert len(ours) == 8
    for got, own, expected in zip(ours, theirs, exact, strict=True):
        assert (got.dtype, got.shape) == (own.dtype, own.shape)
        if x.numel():
            bound = (own.double() - expected).abs().max()
            unit = torch.finfo(dtype).eps * expected.abs().max()
            assert (got.double() - expected).abs().max() <= 1.5 * bound + unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_loss_and_gradients_stay(dtype: torch.dtype, fused: list) -> None:
    model = tiny_llama.with_adapter().to(dtype).train()

    loss, gradients = tiny_llama.loss_and_gradients(model, IDS)
    assert fuse_mlps(fuse_norms(fuse_loss(model))) is model
    fused_loss, fused_gradients = tiny_llama.loss_and_gradients(model, IDS)
    assert len(fused) == 2
    unit = torch.finfo(dtype).eps
    assert (loss - fused_loss).abs() <= 4 * unit * loss.abs()
    for got, expected in zip(fused_gradients, gradients, strict=True):
        assert (got - expected).abs().max() <= 40 * unit * expected.abs().max()


def test_what_is_kept_is_x_and_both_products() -> None:
    x = torch.randn(30, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    made = fuse_mlps(mlp())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x)
    rows = sum(t.shape[1] for t in kept if t.shape[0] == 30)
    assert rows == 64 + 2 * 160 + 3 * 4
    assert len([t for t in kept if t.shape[0] != 30]) == 6  # the factors themselves


def test_undone_copied_and_saved() -> None:
    model = tiny_llama.with_adapter().train()
    names, expected = list(model.state_dict()), model(input_ids=IDS, labels=IDS).loss
    fuse_mlps(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        owners = [m.forward.module is m for m in other.modules() if "forward" in m.__dict__]
        assert owners == [True] * 2
        assert list(other.state_dict()) == names
        assert torch.allclose(other(input_ids=IDS, labels=IDS).loss, expected, rtol=1e-5)
    assert torch.equal(unfuse_mlps(model)(input_ids=IDS, labels=IDS).loss, expected)
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(QloraError, match="has no fused MLPs to undo; if they were fused"):
        unfuse_mlps(model)


def dense_up(made: nn.Module) -> None:
    made.up_proj = nn.Linear(64, 160, bias=False)


def seen_activation(made: nn.Module) -> None:
    made.act_fn.register_forward_hook(lambda *_: made.seen.append(1))
    made.seen = []


CHANGES: dict[str, Callable] = {
    "dropout": lambda made: setattr(made.up_proj, "dropout", 0.5),
    "an adapter disabled": lambda made: setattr(made.gate_proj, "adapter_enabled", False),
    "compute_dtype": lambda made: setattr(made.down_proj, "compute_dtype", torch.bfloat16),
    "a hook": lambda made: made.up_proj.register_forward_hook(lambda *_: None),
    "a replaced forward": lambda made: setattr(made.up_proj, "forward", made.up_proj.forward),
    "a dense layer": dense_up,
    "another activation": lambda made: setattr(made, "act_fn", nn.GELU()),
    "an activation with a hook": seen_activation,
    "factors with gaps": lambda made: setattr(
        made.up_proj.lora_A, "data", made.up_proj.lora_A.data.t().contiguous().t()
    ),
    "negated lazily": lambda made: setattr(
        made.up_proj.lora_B, "data", torch._neg_view(made.up_proj.lora_B.data)
    ),
    "float64 factors": lambda made: made.up_proj.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_mlps_own_way_after_a_change(change: str, fused: list) -> None:
    made = fuse_mlps(mlp())
    x, grad = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    CHANGES[change](made)
    torch.manual_seed(1)
    found = answers(made, made, x, grad)
    unfuse_mlps(made)
    torch.manual_seed(1)
    for got, expected in zip(found, answers(made, made, x, grad), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    assert not fused
    assert change != "an activation with a hook" or len(made.seen) == 2


def test_the_mlps_own_way_for_other_calls(fused: list) -> None:
    made, own = fuse_mlps(mlp()), mlp()
    x = torch.randn(2, 5, 64, requires_grad=True)
    assert torch.equal(made(x.detach()), own(x.detach()))
    with torch.no_grad():
        assert torch.equal(made(x), own(x))
    with pytest.raises(QloraError, match="must be 64"):
        made(torch.randn(0, 99, requires_grad=True))
    assert torch.equal(made(x.double()), own(x.double()))
    strided = x.transpose(0, 1)
    assert torch.equal(made(strided), own(strided))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), own(x))
    assert torch.allclose(torch.func.vmap(made)(x), own(x), atol=1e-4)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert torch.equal(made(x), own(x))
    assert not fused
    compiled = torch.compile(made, backend="aot_eager")
    assert torch.allclose(compiled(x), own(x), atol=1e-5)


def test_gradients_with_gaps_second_ones_and_batches_of_them() -> None:
    made, own = fuse_mlps(mlp()), mlp()
    x = torch.randn(2, 5, 64, requires_grad=True)
    directions = torch.randn(3, 2, 5, 64)
    strided = torch.randn(64, 5, 2).permute(2, 1, 0)

    def gradients(module: nn.Module) -> list[Tensor]:
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        first = torch.autograd.grad(module(x), inputs, strided)
        many = torch.autograd.grad(module(x), inputs, directions, is_grads_batched=True)
        return [*first, *many]

    for got, expected in zip(gradients(made), gradients(own), strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    (grad,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(QloraError, match="second gradients of lora_linear"):
        grad.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_mlp_that_is_called_twice_and_gradients_that_are_taken_twice(create_graph: bool) -> None:
    made, own = fuse_mlps(mlp()), mlp()
    made.up_proj.lora_A = made.gate_proj.lora_A
    own.up_proj.lora_A = own.gate_proj.lora_A
    x = torch.randn(3, 64, requires_grad=True)
    found, expected = [], []
    for module, gradients in ((made, found), (own, expected)):
        y = module(module(x)).sum()
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        first = torch.autograd.grad(y, inputs, retain_graph=True, create_graph=create_graph)
        again = torch.autograd.grad(y, inputs)
        assert all(map(torch.equal, first, again)) or create_graph
        gradients += [*first, *again]
    for got, want in zip(found, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_a_frozen_factor_and_gradient_checkpointing(fused: list) -> None:
    made, x, grad = mlp(), torch.randn(5, 64), torch.randn(5, 64)
    made.up_proj.lora_A.requires_grad_(False)
    expected = answers(made, made, x, grad)
    fuse_mlps(made)
    found = answers(made, made, x, grad)
    again = answers(lambda x: checkpoint(made, x, use_reentrant=False), made, x, grad)
    assert len(fused) >= 2  # a checkpoint's second pass ends where all is known
    for got, other, want in zip(found, again, expected, strict=True):
        assert torch.equal(got, other)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_weight_that_changes_before_backward_is_refused() -> None:
    made, x = fuse_mlps(mlp()), torch.randn(2, 64, requires_grad=True)
    y = made(x)
    with torch.no_grad():
        made.down_proj.weight.zero_()
    with pytest.raises(QloraError, match="modified after the forward pass"):
        y.sum().backward()


class Residual(LlamaMLP):
    """Named so, and something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Forgetful(LlamaMLP):
    """With a dropout of its own, while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Limited(LlamaMLP):
    """Limits large values."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=10.0)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x).clamp(-10.0, 10.0))


def of_kind(kind: type) -> nn.Module:
    made = mlp().eval()
    made.__class__ = kind
    return made


def of_peft() -> nn.Module:
    return get_peft_model(tiny_llama.quantized(), LoraConfig(target_modules="all-linear"))


def replaced() -> nn.Module:
    made = mlp()
    made.forward = lambda x: x
    return made


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: nn.Sequential(nn.Linear(8, 8)),
            "no MLP to fuse: no module has gate_proj, up_proj",
        ),
        (lambda: mlp("gelu"), r"LlamaMLP \(it computes something else than down\(silu"),
        (lambda: of_kind(Residual), r"Residual \(it computes something else"),
        (lambda: of_kind(Forgetful), r"Forgetful \(it computes something else"),
        (lambda: of_kind(Limited), r"Limited \(it computes something else"),
        (lambda: mlp(bias=True), "gate_proj has a bias"),
        (lambda: mlp().to("meta"), "gate_proj is on meta and not on the CPU"),
        (replaced, "something replaced its forward"),
        (lambda: LlamaMLP(LlamaConfig()), "gate_proj is Linear: quantize_model and add_lora come"),
        (of_peft, "gate_proj has peft's adapter"),
        (tiny_llama.quantized, "gate_proj has no adapter: call add_lora.model. first"),
        (lambda: fuse_mlps(mlp()), "has fused MLPs already; unfuse_mlps"),
    ],
)
def test_refusals_name_what_was_found(build: Callable, sentence: str) -> None:
    model = build()
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(QloraError, match=sentence):
        fuse_mlps(model)
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_a_rehearsal_leaves_modes_and_random_numbers_alone() -> None:
    made = mlp(dropout=0.5)
    made.up_proj.eval()
    modes = [module.training for module in made.modules()]
    state = torch.get_rng_state()
    fuse_mlps(made)  # whose adapters' dropout is not the MLP's
    assert [module.training for module in made.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_mlps_of_another_kind_stay_and_their_neighbours_do_not() -> None:
    model = nn.Sequential(mlp("gelu"), mlp(), mlp(bias=True))
    fuse_mlps(model)
    assert [isinstance(m.__dict__.get("forward"), FusedMlp) for m in model] == [False, True, False]
