"""fuse_attention: every bit of the attention's own results and gradients, in fewer steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import tiny_llama
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GlmConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama

import qlora_rs
from qlora_rs import QloraError, fuse_attention, rotary, shortcut, unfuse_attention
from qlora_rs.attention import FusedAttention, Projection
from qlora_rs.rotary import _Rotation

IDS = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(5))
PADDED = torch.ones_like(IDS).index_fill_(1, torch.arange(4), 0)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of the two parts was taken."""
    counts = {"rotation": 0, "projections": 0}
    rotate, apply = rotary._rotate, shortcut._apply_steps

    def count_rotations(*arguments: object) -> tuple:
        counts["rotation"] += 1
        return rotate(*arguments)

    def count_projections(*arguments: object) -> tuple:
        counts["projections"] += 1
        return apply(*arguments)

    monkeypatch.setattr(rotary, "_rotate", count_rotations)
    monkeypatch.setattr(shortcut, "_apply_steps", count_projections)
    return counts


def step(model: nn.Module, seed: int = 0, **options: Tensor) -> list[Tensor]:
    """The loss, the logits and all gradients of a training step, the embeddings' among them."""
    model.zero_grad()
    torch.manual_seed(seed)
    hidden = model.get_input_embeddings()(IDS).detach().requires_grad_()
    outputs = model(inputs_embeds=hidden, labels=IDS, use_cache=False, **options)
    outputs.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [outputs.loss.detach(), outputs.logits.detach(), hidden.grad, *gradients]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, PADDED])
def test_a_training_step_stays_to_the_bit(
    dtype: torch.dtype, mask: Tensor | None, taken: dict
) -> None:
    model = tiny_llama.with_adapter().to(dtype).train()
    expected = step(model, attention_mask=mask)
    assert taken == {"rotation": 0, "projections": 0}
    assert fuse_attention(model) is model
    taken |= {"rotation": 0}  # the rehearsal's
    assert_same(step(model, attention_mask=mask), expected)
    assert len(expected) == 3 + 2 * 14
    assert taken == {"rotation": 4, "projections": 2}  # forward and backward, two layers


def test_generated_texts_stay(taken: dict) -> None:
    model = tiny_llama.with_adapter()
    ask = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "output_logits": True}
    ask |= {"return_dict_in_generate": True, "attention_mask": PADDED}
    expected = model.generate(input_ids=IDS, **ask)
    fuse_attention(model)
    taken |= {"rotation": 0}
    found = model.generate(input_ids=IDS, **ask)
    assert torch.equal(found.sequences, expected.sequences)
    assert_same(list(found.logits), list(expected.logits))
    assert taken == {"rotation": 24, "projections": 0}


SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 16,
}  # fmt: skip
# What of each is fused: the rotation, the projections.
KINDS = {
    "mistral": (MistralConfig(**SIZES, sliding_window=5), True, True),
    "qwen2": (Qwen2Config(**SIZES), True, False),  # its projections have biases
    "qwen3": (Qwen3Config(**SIZES), True, True),  # norms before the rotation
    "gemma2": (Gemma2Config(**SIZES, sliding_window=5), True, True),
    "olmo2": (Olmo2Config(**SIZES), True, True),  # its attention's x goes on beside it
    "phi3": (Phi3Config(**SIZES), True, False),  # one projection for all
    "phi3 in part": (Phi3Config(**SIZES, partial_rotary_factor=0.5), False, False),
}


def of_kind(config: object) -> nn.Module:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config)
    return tiny_llama.randomize(qlora_rs.add_lora(qlora_rs.quantize_model(model), r=4)).train()


@pytest.mark.parametrize("kind", KINDS)
def test_other_models_keep_what_else_their_attention_does(kind: str, taken: dict) -> None:
    config, rotation, projections = KINDS[kind]
    model = of_kind(config)
    expected = step(model)
    fuse_attention(model)
    taken |= {"rotation": 0}  # the rehearsal's
    found = step(model)
    if kind == "olmo2":  # the gradient of x is a sum of four, in another order
        for got, want in zip(found, expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
        found, expected = found[:2], expected[:2]
    assert_same(found, expected)
    assert (taken["rotation"] > 0, taken["projections"] > 0) == (rotation, projections)


def disabled(model: nn.Module) -> None:
    qlora_rs.disable_adapter(model).__enter__()


def each(name: str, change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def change_all(model: nn.Module) -> None:
        for path, module in list(model.named_modules()):
            if path.endswith(name):
                change(module)

    return change_all


def other_input(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))


def hooked(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda *_: None)


def of_another(layer: nn.Module) -> None:
    layer.__class__ = Other


class Other(qlora_rs.QLoRALinear):
    """What it computes is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


CHANGES: dict[str, Callable] = {
    "dropout": each("q_proj", lambda layer: setattr(layer, "dropout", 0.5)),
    "adapters disabled": disabled,
    "an adapter disabled": each("q_proj", lambda layer: setattr(layer, "adapter_enabled", False)),
    "compute_dtype": each("q_proj", lambda layer: setattr(layer, "compute_dtype", torch.bfloat16)),
    "another input, by a hook": each("q_proj", other_input),
    "a hook for gradients": each("k_proj", hooked),
    "another kind of layer": each("k_proj", of_another),
    "frozen factors": each("q_proj", lambda layer: layer.lora_A.requires_grad_(False)),
    "factors with gaps": each(
        "v_proj",
        lambda layer: setattr(layer.lora_A, "data", layer.lora_A.data.t().contiguous().t()),
    ),
    "float64 factors": each("v_proj", lambda layer: layer.double()),
    "no adapters": qlora_rs.remove_lora,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_it_counts(change: str) -> None:
    model, own = (tiny_llama.with_adapter().train() for _ in range(2))
    fuse_attention(model)
    for changed in (model, own):
        CHANGES[change](changed)
    assert_same(step(model), step(own))


def test_without_gradients_of_the_text_and_with_autocast() -> None:
    model, own = (tiny_llama.with_adapter().train() for _ in range(2))
    fuse_attention(model)
    loss, gradients = tiny_llama.loss_and_gradients(model, IDS)
    expected_loss, expected_gradients = tiny_llama.loss_and_gradients(own, IDS)
    assert_same([loss, *gradients], [expected_loss, *expected_gradients])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(model), step(own))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, taken: dict) -> None:
    model = tiny_llama.with_adapter().train()
    expected = step(model)
    fuse_attention(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model), expected)
    assert taken["projections"] == (2 if reentrant else 4)


def test_compiled_and_vectorized() -> None:
    model, own = (tiny_llama.with_adapter() for _ in range(2))
    fuse_attention(model)
    with torch.no_grad():
        compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
        found, expected = (m(IDS, use_cache=False) for m in (compiled, own.model))
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    q, k = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 2, 5, 8)
    cosine, sine = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    apply = modeling_llama.apply_rotary_pos_emb
    ours = qlora_rs.attention._with_rotation(modeling_llama.LlamaAttention.forward)
    ours = ours.__globals__["apply_rotary_pos_emb"]
    assert ours is not apply
    for function in (ours, apply):
        with torch.no_grad():
            mapped = torch.vmap(function, in_dims=(0, 0, None, None))(q, k, cosine, sine)
        one_by_one = [apply(*pair, cosine, sine) for pair in zip(q, k, strict=True)]
        assert_same(list(mapped), [torch.stack(x) for x in zip(*one_by_one, strict=True)])


def test_second_gradients_of_a_rotation_and_operands_of_any_layout() -> None:
    torch.manual_seed(4)
    q, k = torch.randn(2, 4, 5, 8, dtype=torch.float32), torch.randn(2, 2, 5, 8)
    cosine, sine = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: x[:, :, :1],
    ]
    for layout in layouts:
        results = []
        for function in (rotary.rotate, modeling_llama.apply_rotary_pos_emb):
            x, y = (layout(t).detach().requires_grad_() for t in (q, k))
            places = slice(0, x.shape[2])
            outputs = function(x, y, cosine[:, places], sine[:, places])
            grads = torch.autograd.grad(
                [o.square().sum() for o in outputs], [x, y], create_graph=True
            )
            second = torch.autograd.grad([g.square().sum() for g in grads], [x, y])
            results.append([*(t.detach() for t in (*outputs, *grads)), *second])
        for found, expected in zip(*results, strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, c, s: (q, k, c.double(), s.double()),
        lambda q, k, c, s: (q, k.bfloat16(), c, s),
        lambda q, k, c, s: (q, k, c[..., :4], s[..., :4]),
        lambda q, k, c, s: (q, k[:, :, :3], c, s),
        lambda q, k, c, s: (q, k, c.requires_grad_(), s),
        lambda q, k, c, s: (q.to("meta"), k, c, s),
        lambda q, k, c, s: (q[0], k[0], c, s),
        lambda q, k, c, s: (q.double(), k.double(), c.double(), s.double()),
        lambda q, k, c, s: (q, k, c[0], s[0]),
    ],
)
def test_what_a_rotation_takes(change: Callable) -> None:
    operands = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), *torch.randn(2, 1, 5, 8))
    assert rotary.fits(*operands)
    assert not rotary.fits(*change(*operands))


def test_undone_copied_and_saved() -> None:
    model = tiny_llama.with_adapter().train()
    names, expected = list(model.state_dict()), step(model)
    fuse_attention(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = [m for m in other.modules() if "forward" in m.__dict__]
        assert [m.forward.module is m for m in own] == [True] * 8
        assert {type(m.forward) for m in own} == {FusedAttention, Projection}
        assert list(other.state_dict()) == names
        assert_same(step(other), expected)
    unfuse_attention(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert_same(step(model), expected)
    with pytest.raises(QloraError, match="has no fused attention"):
        unfuse_attention(model)
    assert modeling_llama.LlamaAttention.forward.__globals__ is vars(modeling_llama)
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


def test_a_model_of_peft_gets_the_rotation_alone(taken: dict) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(6)
    model = get_peft_model(tiny_llama.quantized(), config).train()
    expected = step(model)
    fuse_attention(model)
    taken |= {"rotation": 0}
    assert_same(step(model), expected)
    assert taken == {"rotation": 4, "projections": 0}


def replaced() -> nn.Module:
    model = tiny_llama.with_adapter()
    for layer in model.model.layers:
        layer.self_attn.forward = layer.self_attn.forward
    return model


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8)), "Sequential has no module that calls apply_rot"),
        (lambda: of_kind(GlmConfig(**SIZES)), "leave fuse_attention out"),
        (lambda: of_kind(CohereConfig(**SIZES)), "leave fuse_attention out"),
        (replaced, "something replaced its forward"),
        (lambda: fuse_attention(tiny_llama.with_adapter()), "unfuse_attention.model. undoes it"),
        (lambda: "a model", "model must be a torch.nn.Module, got str"),
    ],
)
def test_refusals_leave_the_model_as_it_was(build: Callable, sentence: str) -> None:
    model = build()
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [dict(module.__dict__) for module in modules]
    with pytest.raises(QloraError, match=sentence):
        fuse_attention(model)
    assert [dict(module.__dict__) for module in modules] == before


def test_another_function_put_into_transformers_later_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, own = (tiny_llama.with_adapter() for _ in range(2))
    fuse_attention(model)(IDS)
    other = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, c, s: other(k=k, q=-q, cos=c, sin=s)
    )
    assert torch.equal(model(IDS).logits, own(IDS).logits)
    with pytest.raises(QloraError, match="leave fuse_attention out"):
        fuse_attention(tiny_llama.with_adapter())


def test_rotated_queries_can_be_written_to() -> None:
    q, k = (torch.randn(1, heads, 5, 8, requires_grad=True) for heads in (4, 2))
    cosine, sine = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    turned, _ = rotary.rotate(q, k, cosine, sine)
    turned.mul_(2).sum().backward()
    assert q.grad is not None


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = fuse_attention(tiny_llama.with_adapter().train())
    layer = model.model.layers[0].self_attn
    hook = layer.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model)
    assert qlora_rs.attention._READY.get() is None
    hook.remove()
    assert_same(step(model), step(unfuse_attention(model)))


def test_a_weight_that_changes_before_backward_is_refused() -> None:
    model = fuse_attention(tiny_llama.with_adapter().train())
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.zero_()
    with pytest.raises(QloraError, match="modified after the forward pass"):
        loss.backward()


def test_a_rotation_keeps_cosines_and_sines_alone() -> None:
    q, k = (torch.randn(1, heads, 5, 8, requires_grad=True) for heads in (4, 2))
    cosine, sine = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _Rotation.apply(q, k, cosine, sine)
    assert [t.data_ptr() for t in kept] == [cosine.data_ptr(), sine.data_ptr()]
