"""widen_attention: float32, rounded once, where a half type is trained; else as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_llama
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import FalconConfig, FalconForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_rs import QloraError, unwiden_attention, widen_attention
from qlora_rs.integrations import attention
from qlora_rs.integrations.attention import _Attend

IDS = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(5))


class Attention(nn.Module):
    """What transformers' functions ask a module for: four heads over two of keys and values."""

    num_key_value_groups, is_causal = 2, True

    def __init__(self) -> None:
        super().__init__()
        setattr(self, attention._MARK, True)


_attend = _Attend(sdpa_attention_forward)


@pytest.fixture(autouse=True, params=["kept", "computed again"])
def _wide_operands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward with the wide operands of short texts, and without, as for long ones."""
    if request.param != "kept":
        monkeypatch.setattr(attention, "_KEPT_BYTES", 0)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The operands of each attention that was widened."""
    seen: list[tuple] = []
    compute = attention._widened

    def count(*operands: Tensor) -> Tensor:
        seen.append(operands)
        return compute(*operands)

    monkeypatch.setattr(attention, "_widened", count)
    return seen


def operands(dtype: torch.dtype, length: int = 33) -> list[Tensor]:
    """Queries, keys, values, and a gradient of the result."""
    generator = torch.Generator().manual_seed(7)
    shapes = (2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 16), (2, length, 4, 16)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(attend: Callable, *given: Tensor) -> list[Tensor]:
    *inputs, grad = given
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    result = attend(*inputs)
    result.backward(grad)
    return [result.detach(), *(t.grad for t in inputs)]


def textbook(visible: Tensor) -> Callable:
    """softmax(q kᵀ / √d) v, over what is visible."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2)

    return attend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", ["causal", "mask", "added mask"])
def test_results_and_gradients_are_float32s_rounded_once(dtype: torch.dtype, masked: str) -> None:
    given = operands(dtype)
    length = given[0].shape[2]
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    mask = None
    if masked != "causal":
        visible[1, :, :, 3:9] = False
        mask = visible
        if masked == "added mask":
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -1e4)
    ours = with_gradients(lambda *qkv: _attend(Attention(), *qkv, mask)[0], *given)
    exact = with_gradients(textbook(visible), *(t.double() for t in given))
    for got, expected, like in zip(ours, exact, (given[3], *given[:3]), strict=True):
        assert (got.dtype, got.shape) == (dtype, like.shape)
        unit = torch.finfo(dtype).eps * expected.abs() / 2
        assert ((got.double() - expected).abs() <= 1.01 * unit + 2e-6).all()


def test_it_errs_less_than_attention_in_bfloat16() -> None:
    given = operands(torch.bfloat16)
    visible = torch.ones(33, 33, dtype=torch.bool).tril()
    exact = with_gradients(textbook(visible), *(t.double() for t in given))

    def error(function: Callable) -> float:
        got = with_gradients(lambda *qkv: function(Attention(), *qkv, None)[0], *given)
        pairs = zip(got, exact, strict=True)
        return sum(float((g.double() - e).norm() / e.norm()) for g, e in pairs)

    assert error(_attend) < error(sdpa_attention_forward)


def gradients(model: nn.Module, **batch: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_trains_as_close_to_its_float32_self(padded: bool, widened: list) -> None:
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, 9:] = 0
    totals = {"own": 0.0, "widened": 0.0}
    # Most of a distance is that of all other layers: one batch says little.
    for seed in range(8):
        ids = torch.randint(3, 64, IDS.shape, generator=torch.Generator().manual_seed(seed))
        labels = ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        model = tiny_llama.with_adapter().to(torch.bfloat16).train()
        got = {"own": gradients(model, **batch)}
        assert not widened
        got["widened"] = gradients(widen_attention(model), **batch)
        assert len(widened) == model.config.num_hidden_layers
        widened.clear()
        unwiden_attention(model)
        exact = gradients(model.float(), **batch)
        for name, values in got.items():
            pairs = zip(values, exact, strict=True)
            totals[name] += float(sum((g - e).norm() / e.norm() for g, e in pairs)) / len(exact)
    assert totals["widened"] < 1.1 * totals["own"] < 8 * 0.05


def test_without_gradients_in_float32_and_undone_nothing_changes(widened: list) -> None:
    model = tiny_llama.dense().to(torch.bfloat16)
    before, ids = tiny_llama.logits(model), IDS[:1]
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    own = gradients(tiny_llama.dense().to(torch.bfloat16), input_ids=IDS, labels=IDS)
    assert widen_attention(model) is model
    assert torch.equal(tiny_llama.logits(model), before)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
    gradients(tiny_llama.dense().to(torch.bfloat16), input_ids=IDS, labels=IDS)  # another model
    gradients(widen_attention(tiny_llama.dense()), input_ids=IDS, labels=IDS)  # in float32
    assert not widened
    assert unwiden_attention(model) is model
    for got, expected in zip(gradients(model, input_ids=IDS, labels=IDS), own, strict=True):
        assert torch.equal(got, expected)
    assert not widened


def test_copies_are_widened_and_files_know_nothing(
    tmp_path: Path, widened: list, run_python: Callable
) -> None:
    model = widen_attention(tiny_llama.dense().to(torch.bfloat16))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        gradients(other, input_ids=IDS, labels=IDS)
        assert len(widened) == 2
        widened.clear()
    model.save_pretrained(tmp_path / "saved")
    assert "widened" not in (tmp_path / "saved" / "config.json").read_text()
    (tmp_path / "pickled").write_bytes(pickle.dumps(model))
    code = f"""
        import pickle, torch
        from pathlib import Path
        from qlora_rs import widen_attention
        model = pickle.loads(Path({str(tmp_path / "pickled")!r}).read_bytes())
        ids = torch.arange(12)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        from qlora_rs.integrations import attention
        calls, compute = [], attention._widened
        attention._widened = lambda *operands: calls.append(1) or compute(*operands)
        widen_attention(model)(input_ids=ids, labels=ids).loss.backward()
        assert len(calls) == 2, calls
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_autocast_leaves_what_is_wide_wide() -> None:
    given = operands(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(lambda *qkv: _attend(Attention(), *qkv, None)[0], *given)
    outside = with_gradients(lambda *qkv: _attend(Attention(), *qkv, None)[0], *given)
    assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_one_of_three_operands_is_trained(trained: int) -> None:
    *inputs, grad = operands(torch.bfloat16, length=5)
    given = [t.requires_grad_(i == trained) for i, t in enumerate(inputs)]
    every = with_gradients(lambda *qkv: _attend(Attention(), *qkv, None)[0], *inputs, grad)
    result = _attend(Attention(), *given, None)[0]
    (once,) = torch.autograd.grad(result, given[trained], grad, retain_graph=True)
    assert torch.equal(once, every[1 + trained])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.autograd.grad(result, given[trained], grad, create_graph=True)


def test_operands_that_are_one_tensor_and_a_gradient_of_one_number() -> None:
    shared = torch.randn(1, 2, 7, 16).to(torch.bfloat16)
    grads = []
    for function in (_attend, sdpa_attention_forward):
        x = shared.clone().requires_grad_()
        module = Attention()
        module.num_key_value_groups = 1
        function(module, x, x, x, None)[0].sum().backward()
        grads.append(x.grad.float())
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"cache": object()}, {"learned": True}])
def test_what_is_not_torchs_plain_attention_stays_so(options: dict, widened: list) -> None:
    query, key, value, _ = (t.requires_grad_() for t in operands(torch.bfloat16))
    if options.pop("learned", False):
        options["position_bias"] = torch.zeros(1, 4, 33, 33, dtype=torch.bfloat16).requires_grad_()
    _attend(Attention(), query, key, value, None, **options)
    assert not widened


def test_packed_texts_and_windows(widened: list) -> None:
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None].expand(3, -1)
    batch = {"input_ids": IDS, "labels": IDS, "position_ids": positions, "use_cache": False}
    model = widen_attention(tiny_llama.dense().to(torch.bfloat16))
    got, exact = gradients(model, **batch), gradients(tiny_llama.dense(), **batch)
    assert len(widened) == 2
    for ours, expected in zip(got, exact, strict=True):
        assert (ours - expected).norm() < 0.1 * expected.norm()


def test_of_long_texts_nothing_is_kept_but_the_narrow_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_KEPT_BYTES", 0)
    query, key, value, _ = (t.requires_grad_() for t in operands(torch.bfloat16))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _attend(Attention(), query, key, value, None)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (query, key, value)]


@pytest.mark.parametrize("length", [200, 1200])
def test_only_of_short_texts_more_is_kept(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_KEPT_BYTES", 1 << 20)
    query, key, value, _ = (t.requires_grad_() for t in operands(torch.bfloat16, length))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _attend(Attention(), query, key, value, None)
    wide = 4 * sum(t.numel() for t in (query, key, value))
    assert (wide > 1 << 20) == (length == 1200)
    assert any(t.dtype == torch.float32 for t in kept) == (length == 200)


def test_second_batched_and_checkpointed_gradients() -> None:
    given = operands(torch.bfloat16, length=5)
    wide = [t.float() for t in given]

    def widened(*qkv: Tensor) -> Tensor:
        return _attend(Attention(), *qkv, None)[0]

    def answers(attend: Callable, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list:
        inputs = [t.detach().clone().requires_grad_() for t in (query, key, value)]
        firsts = torch.autograd.grad(attend(*inputs), inputs, grad, create_graph=True)
        second = torch.autograd.grad(sum(f.float().square().sum() for f in firsts), inputs)
        directions = torch.stack([grad, 2 * grad, -grad])
        many = torch.autograd.grad(attend(*inputs), inputs, directions, is_grads_batched=True)
        checkpoint(attend, *inputs, use_reentrant=False).backward(grad)
        return [*second, *many, *(t.grad for t in inputs)]

    # torch's fused attention has no second gradients, ours are those of what it is made of.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        ours = answers(widened, *given)
        exact = answers(textbook(torch.ones(5, 5).tril() > 0), *wide)
    for got, expected in zip(ours, exact, strict=True):
        assert (got - expected).abs().max() <= 0.05 * expected.abs().max()


def test_peft_and_a_compiler() -> None:
    model = tiny_llama.dense().to(torch.bfloat16)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    assert len(gradients(widen_attention(get_peft_model(model, config)), input_ids=IDS, labels=IDS))
    query, key, value, _ = (t.requires_grad_() for t in operands(torch.bfloat16))
    module = Attention()
    function = torch.compile(
        lambda *qkv: _attend(module, *qkv, None)[0], fullgraph=True, backend="aot_eager"
    )
    own = sdpa_attention_forward(Attention(), query, key, value, None)[0]
    assert torch.allclose(function(query, key, value), own, atol=1e-2)


def eager() -> nn.Module:
    model = tiny_llama.dense()
    model.set_attn_implementation("eager")
    return model


def falcon() -> nn.Module:
    """Of those that choose among classes of layers, and do not ask the registry."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return FalconForCausalLM(FalconConfig(vocab_size=64, **sizes))


class Wrapped(nn.Module):
    """Shows a configuration, and is no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama.dense()
        self.config = self.model.config


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (eager, "computes attention by 'eager'.*attn_implementation=\"sdpa\""),
        (lambda: nn.Linear(3, 3), "Linear does not say how it computes attention"),
        (falcon, "does not take its attention from transformers' registry"),
        (Wrapped, "Wrapped does not take its attention from transformers' registry"),
        (lambda: widen_attention(tiny_llama.dense()), "widened already; unwiden_attention"),
    ],
)
def test_refusals_name_what_was_found(build: Callable, sentence: str) -> None:
    model = build()
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(QloraError, match=sentence):
        widen_attention(model)
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_undoing_what_was_not_done_is_refused() -> None:
    with pytest.raises(QloraError, match="has no widened attention"):
        unwiden_attention(tiny_llama.dense())
