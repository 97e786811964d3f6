"""widen_attention: float32, rounded once, where a half type is trained; else as before."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_llama
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_rs import QloraError, widen_attention
from qlora_rs.integrations.attention import NAME, _attend

IDS = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(5))


class Attention(nn.Module):
    """What transformers' functions ask a module for: four heads over two of keys and values."""

    num_key_value_groups, is_causal = 2, True


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
def test_a_model_trains_as_close_to_its_float32_self(padded: bool) -> None:
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
        got["widened"] = gradients(widen_attention(model), **batch)
        model.set_attn_implementation("sdpa")
        exact = gradients(model.float(), **batch)
        for name, values in got.items():
            pairs = zip(values, exact, strict=True)
            totals[name] += float(sum((g - e).norm() / e.norm() for g, e in pairs)) / len(exact)
    assert totals["widened"] < 1.1 * totals["own"] < 8 * 0.05


def test_without_gradients_in_float32_and_undone_nothing_changes(tmp_path: Path) -> None:
    model = tiny_llama.dense().to(torch.bfloat16)
    before, ids = tiny_llama.logits(model), IDS[:1]
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert widen_attention(model) is model
    assert torch.equal(tiny_llama.logits(model), before)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert copy.deepcopy(model).config._attn_implementation == NAME
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(tiny_llama.logits(again), before)
    own = gradients(tiny_llama.dense().to(torch.bfloat16), input_ids=IDS, labels=IDS)
    model.set_attn_implementation("sdpa")
    for got, expected in zip(gradients(model, input_ids=IDS, labels=IDS), own, strict=True):
        assert torch.equal(got, expected)
    wide = [gradients(m, input_ids=IDS, labels=IDS) for m in
            (tiny_llama.dense(), widen_attention(tiny_llama.dense()))]  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(*wide, strict=True))


def test_nothing_is_kept_but_the_narrow_operands() -> None:
    query, key, value, _ = (t.requires_grad_() for t in operands(torch.bfloat16))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _attend(Attention(), query, key, value, None)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (query, key, value)]


def test_second_batched_and_checkpointed_gradients() -> None:
    given = operands(torch.bfloat16, length=5)
    widened, wide = (lambda *qkv: _attend(Attention(), *qkv, None)[0]), [t.float() for t in given]

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
    function = torch.compile(lambda *qkv: _attend(Attention(), *qkv, None)[0], backend="aot_eager")
    own = sdpa_attention_forward(Attention(), query, key, value, None)[0]
    assert torch.allclose(function(query, key, value), own, atol=1e-2)


def eager() -> nn.Module:
    model = tiny_llama.dense()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (eager, "computes attention by 'eager'.*attn_implementation=\"sdpa\""),
        (lambda: nn.Linear(3, 3), "Linear computes attention by None"),
        (lambda: widen_attention(tiny_llama.dense()), "widened already"),
    ],
)
def test_refusals_name_what_was_found(build: Callable, sentence: str) -> None:
    model = build()
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(QloraError, match=sentence):
        widen_attention(model)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == before
