"""The shortest way through a layer: the same bits as the usual way, or no answer at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import qlora_rs
from qlora_rs import shortcut
from qlora_rs.errors import QloraError


def layer(
    shape: tuple[int, int] = (48, 128), r: int = 4, bias: bool = False, **options
) -> qlora_rs.QLoRALinear:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=generator)
    base = qlora_rs.NF4Linear(
        qlora_rs.quantize(weight, **options), torch.randn(shape[0]) if bias else None
    )
    made = qlora_rs.QLoRALinear(base, r=r).eval()
    nn.init.normal_(made.lora_B, generator=generator)
    return made


def usual(made: qlora_rs.QLoRALinear, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(shortcut, "product", lambda *_: None)
        return made(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(), (1, 1), (3,), (0,), (2, 0, 3), (2, 40)])
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"block_size": 256}])
def test_same_bits_as_the_usual_way(dtype, size, options, monkeypatch) -> None:
    made = layer(**options)
    x = torch.randn(*size, 128).to(dtype)
    with torch.no_grad():
        for scaling in (made.scaling, None):
            made.adapter_enabled = scaling is not None
            y = shortcut.product(made, x, scaling)
            assert y is not None
            expected = usual(made, x, monkeypatch)
            assert (y.dtype, y.shape) == (dtype, (*size, 48))
            assert torch.equal(y, expected)
            assert torch.equal(made(x), expected)


def gradients(made: qlora_rs.QLoRALinear, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """y, and the gradients of x, A and B."""
    made.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    y = made(x)
    y.backward(grad)
    return [y.detach(), x.grad, made.lora_A.grad, made.lora_B.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(), (3,), (0,), (2, 40)])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float64])
def test_same_gradients_as_the_usual_way(dtype, size, factors, monkeypatch) -> None:
    made = layer()
    made.lora_A.data, made.lora_B.data = made.lora_A.data.to(factors), made.lora_B.data.to(factors)
    grad = torch.randn(*size, 48).to(dtype)
    for needs_x in (True, False):
        x = torch.randn(*size, 128).to(dtype).requires_grad_(needs_x)
        found = gradients(made, x, grad)
        with monkeypatch.context() as patch:
            patch.setattr(shortcut, "product", lambda *_: None)
            expected = gradients(made, x, grad)
        for got, want in zip(found, expected, strict=True):
            assert (got is None) == (want is None)
            assert got is None or (got.dtype == want.dtype and torch.equal(got, want))


def test_gradients_of_any_layout_and_batches_of_them() -> None:
    made, x = layer(), torch.randn(2, 5, 128, requires_grad=True)
    inputs = (x, made.lora_A, made.lora_B)
    grads = torch.randn(3, 2, 5, 48)
    one_by_one = [torch.autograd.grad(made(x), inputs, grad) for grad in grads]
    strided = grads[0].transpose(0, 1).contiguous().transpose(0, 1)
    for got, want in zip(torch.autograd.grad(made(x), inputs, strided), one_by_one[0], strict=True):
        assert torch.equal(got, want)
    batched = torch.autograd.grad(made(x), inputs, grads, is_grads_batched=True)
    for i, expected in enumerate(one_by_one):
        for got, want in zip(batched, expected, strict=True):
            assert torch.allclose(got[i], want, rtol=1e-4, atol=1e-4)


def test_second_gradients_are_refused_as_everywhere() -> None:
    made, x = layer(), torch.randn(2, 128, requires_grad=True)
    (grad,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(QloraError, match="second gradients of lora_linear"):
        grad.sum().backward()


def test_a_layer_without_outputs_and_gradients_that_are_taken_twice() -> None:
    empty = qlora_rs.QLoRALinear(qlora_rs.NF4Linear(qlora_rs.quantize(torch.zeros(0, 64))), r=2)
    x = torch.randn(3, 64, requires_grad=True)
    empty(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 64))
    assert torch.equal(empty.lora_A.grad, torch.zeros(2, 64))
    made, x = layer(), torch.randn(2, 128, requires_grad=True)
    y = made(x).square().sum()
    inputs = (x, made.lora_A, made.lora_B)
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, inputs)))


def test_errors_of_hooks_are_the_callers() -> None:
    made, x = layer(), torch.randn(2, 128, requires_grad=True)

    def refuse(_: Tensor) -> None:
        raise RuntimeError("no room")

    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
        pytest.raises(RuntimeError, match="no room"),
    ):
        made(x)


def test_factors_of_two_types_keep_their_own() -> None:
    made, x = layer(), torch.randn(2, 128, dtype=torch.bfloat16, requires_grad=True)
    made(x).sum().backward()
    expected = made.lora_B.grad.clone()
    made.zero_grad()
    made.lora_A.data = made.lora_A.data.double()
    made(x).sum().backward()
    assert (made.lora_A.grad.dtype, made.lora_B.grad.dtype) == (torch.float64, torch.float32)
    assert torch.allclose(made.lora_B.grad, expected, rtol=2e-2, atol=1e-3)


def test_a_weight_that_changes_before_backward_is_refused() -> None:
    made, x = layer(), torch.randn(2, 128, requires_grad=True)
    for part in (made.weight, made.absmax, made.nested_absmax):
        y = made(x)
        with torch.no_grad():
            part.zero_()
        with pytest.raises(QloraError, match="modified after the forward pass"):
            y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(), (3,), (0,), (2, 40)])
def test_a_frozen_layer_passes_the_same_gradient_on(dtype, size, monkeypatch) -> None:
    frozen = layer().without_adapter()
    x = torch.randn(*size, 128).to(dtype).requires_grad_()
    grad = torch.randn(*size, 48).to(dtype)
    y = frozen(x)
    assert y.grad_fn.name() == "_FrozenStepBackward"
    (found,) = torch.autograd.grad(y, x, grad)
    with monkeypatch.context() as patch:
        patch.setattr(shortcut, "product", lambda *_: None)
        expected = frozen(x)
        assert torch.equal(y, expected)
        assert torch.equal(found, *torch.autograd.grad(expected, x, grad))


def test_a_frozen_layer_is_differentiated_as_often_as_wanted() -> None:
    frozen, x = layer().without_adapter(), torch.randn(2, 128, requires_grad=True)
    weight = frozen.dequantize(torch.float64)
    (grad,) = torch.autograd.grad(frozen(x).square().sum(), x, create_graph=True)
    assert torch.allclose(grad.double(), 2 * x.double() @ weight.t() @ weight, atol=1e-3)
    (second,) = torch.autograd.grad(grad.sum(), x)
    exact = 2 * torch.ones(2, 128, dtype=torch.float64) @ weight.t() @ weight
    assert torch.allclose(second.double(), exact, atol=1e-3)
    # A gradient with gaps (here: one number for all), and several at once.
    (summed,) = torch.autograd.grad(frozen(x).sum(), x)
    assert torch.allclose(summed.double(), weight.sum(0).expand(2, 128), atol=1e-4)
    grads = torch.randn(3, 2, 48)
    batched = torch.autograd.grad(frozen(x), x, grads, is_grads_batched=True)[0]
    for got, one in zip(batched, grads, strict=True):
        assert torch.allclose(got, *torch.autograd.grad(frozen(x), x, one), atol=1e-4)
    wide = x.detach().double().requires_grad_()
    assert torch.allclose(
        torch.autograd.grad(frozen(wide).sum(), wide)[0], summed.double(), atol=1e-4
    )
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(frozen, x, use_reentrant=reentrant)
        x.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, summed)


def test_a_frozen_weight_that_changes_before_backward_is_refused() -> None:
    frozen, x = layer().without_adapter(), torch.randn(2, 128, requires_grad=True)
    y = frozen(x)
    with torch.no_grad():
        frozen.absmax.add_(0)
    with pytest.raises(QloraError, match="modified after the forward pass"):
        y.sum().backward()


def test_the_packed_weight_is_not_among_the_saved_tensors() -> None:
    made, x = layer(), torch.randn(2, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = made(x)
    assert [tuple(t.shape) for t in kept] == [(2, 128), (2, 4), (4, 128), (48, 4)]
    y.sum().backward()


def test_a_bias_is_added_where_it_has_the_type_of_x(monkeypatch) -> None:
    made = layer(bias=True)
    x = torch.randn(2, 128)
    with torch.no_grad():
        assert torch.equal(shortcut.product(made, x, made.scaling), usual(made, x, monkeypatch))
        assert shortcut.product(made, x.bfloat16(), made.scaling) is None


class Marked(Tensor):
    """A tensor that somebody else's code computes with."""


def test_no_answer_where_the_usual_way_is_needed() -> None:
    made = layer()
    x = torch.randn(2, 128)

    def refused(given: Tensor = x, which: qlora_rs.QLoRALinear = made) -> bool:
        return shortcut.product(which, given, which.scaling) is None

    assert refused(x.requires_grad_(), layer(bias=True))  # its gradient might be wanted
    x = x.detach()
    with torch.no_grad():
        assert not refused()
        assert refused(x.as_subclass(Marked))
        assert refused(x.t().contiguous().t())
        assert refused(x.double())
        assert refused(x[:, :64].contiguous())
        assert refused(torch.tensor(1.0))
        assert refused(torch.randn(2, 128, dtype=torch.complex64).imag)
        assert refused(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert refused()
        assert torch.allclose(torch.func.vmap(lambda row: made(row))(x), made(x), atol=1e-4)
        with forward_ad.dual_level():
            assert refused()
        with FlopCounterMode(display=False):
            assert refused()
        with torch._subclasses.FakeTensorMode() as fake:
            assert refused(fake.from_tensor(x))
        assert refused(which=layer(shape=(48, 100)))
        narrow = layer()
        narrow.compute_dtype = torch.bfloat16
        assert refused(which=narrow)
        elsewhere = layer().to("meta")
        assert refused(which=elsewhere)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_tensor_that_outlived_a_transform_is_what_it_was(rows: int, adapted: bool) -> None:
    made, kept = layer(), []
    made = made if adapted else made.without_adapter()
    x = torch.randn(2, 128)[:rows].requires_grad_()
    torch.func.grad(lambda inside: (kept.append(inside), inside.sum())[1])(x)
    outlived = kept[0]
    with torch.no_grad():
        assert torch.equal(made(outlived), made(x))
    results = []
    for given in (outlived, x):
        y = made(given)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))


def test_factors_that_outlived_a_transform_are_what_they_were() -> None:
    made, x, kept = layer(), torch.randn(2, 128), []
    torch.func.grad(lambda inside: (kept.append(inside), inside.sum())[1])(made.lora_A)
    swapped = {"lora_A": kept[0]}
    y = torch.func.functional_call(made, swapped, (x,))
    (expected,) = torch.autograd.grad(made(x).square().sum(), made.lora_A)
    (found,) = torch.autograd.grad(y.square().sum(), made.lora_A)
    assert torch.equal(found, expected)


def test_an_adapter_that_does_not_fit_is_left_to_the_usual_way_which_refuses() -> None:
    # As many numbers as a fitting one, lying otherwise.
    made = layer()
    made.lora_B.data = made.lora_B.data.t().contiguous()
    with torch.no_grad():
        assert shortcut.product(made, torch.randn(1, 128), made.scaling) is None
        with pytest.raises(QloraError, match=r"lora_b \[48, r\]"):
            made(torch.randn(1, 128))


def test_no_answer_for_factors_that_are_not_plain_memory() -> None:
    made, x = layer(), torch.randn(1, 128)
    with torch.no_grad():
        expected = made(x)
        made.lora_A.data = made.lora_A.data.t().contiguous().t()
        assert shortcut.product(made, x, made.scaling) is None
        assert torch.equal(made(x), expected)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "bias"])
def test_lazily_negated_tensors_keep_their_sign(name: str) -> None:
    made, x = layer(bias=True), torch.randn(1, 128)
    with torch.no_grad():
        expected = made(x)
        tensor = getattr(made, name)
        tensor.data = torch._neg_view(-tensor.data)
        assert torch.equal(made(x), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda made: setattr(made.bias, "data", made.bias.data[None]), "bias must have shape"),
        (lambda made: setattr(made.lora_A, "data", made.lora_A.data[0, 0]), "lora_a must be"),
        (lambda made: setattr(made, "lora_A", nn.Parameter(made.lora_A.to("meta"))), "is on meta"),
    ],
)
def test_the_usual_way_refuses_by_sentence(change, sentence: str) -> None:
    made = layer(bias=True)
    change(made)
    with torch.no_grad(), pytest.raises(QloraError, match=sentence):
        made(torch.randn(1, 128))


def test_rank_zero_is_left_to_the_usual_way() -> None:
    made = layer()
    made.lora_A.data, made.lora_B.data = torch.empty(0, 128), torch.empty(48, 0)
    with torch.no_grad(), pytest.raises(QloraError, match="r must be at least 1"):
        made(torch.randn(1, 128))


class Doubled(qlora_rs.QLoRALinear):
    """Changes a step that the shortcut passes by."""

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().inputs(2 * x)


def test_a_subclass_goes_its_own_way() -> None:
    made, x = layer(), torch.randn(1, 128)
    doubled = Doubled(made.without_adapter(), r=4)
    doubled.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(doubled(x), made(2 * x))


def test_dropout_is_not_passed_by() -> None:
    made = layer()
    made.dropout = 0.5
    with torch.no_grad():
        torch.manual_seed(0)
        dropped = made.train()(torch.ones(1, 128))
        assert not torch.equal(dropped, made.eval()(torch.ones(1, 128)))


def test_weights_replaced_in_place_are_seen() -> None:
    made, other = layer(), layer()
    other.lora_A.data = made.lora_A.data
    other.weight.data = other.weight.data.flip(0).contiguous()
    x = torch.randn(1, 128)
    with torch.no_grad():
        before = made(x)
        made.weight.data = other.weight.data
        assert torch.equal(made(x), other(x))
        assert not torch.equal(made(x), before)
