"""fuse_loss: the model's own loss and gradients, without logits; what cannot be, is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import one_thread, tiny_model, tiny_tokenizer  # noqa: F401
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import qlora_rs
from qlora_rs import QloraError, fuse_loss, unfuse_loss

IDS = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(5))
LABELS = IDS.clone()
LABELS[0, :6] = -100
LABELS[2, 9:] = -100


def step(model: nn.Module, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one batch."""
    model.zero_grad()
    options = {"input_ids": IDS, "labels": LABELS, "use_cache": False, **options}
    loss = model(**options).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return loss.detach(), gradients


def assert_same(found: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    assert abs(found[0] - expected[0]) <= tolerance * expected[0].abs()
    largest = max(gradient.abs().max() for gradient in expected[1])
    for got, gradient in zip(found[1], expected[1], strict=True):
        assert (got - gradient).abs().max() <= tolerance * largest


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_loss_and_gradients_are_the_models_own(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_llama.with_adapter().to(dtype).train()
    expected = step(model)
    assert_same(step(fuse_loss(model)), expected, tolerance)


@pytest.mark.parametrize("options", [
    {"num_items_in_batch": torch.tensor(11)}, {"num_items_in_batch": 5},
    {"shift_labels": LABELS.roll(-2, 1)}, {"labels": IDS, "ignore_index": int(IDS[0, 3])},
    {"logits_to_keep": 17},
])  # fmt: skip
def test_options_of_the_models_loss_mean_what_they_meant(options: dict) -> None:
    model = tiny_llama.with_adapter()
    expected = step(model, **options)
    assert_same(step(fuse_loss(model), **options), expected)


def test_a_trained_head_tied_to_the_embedding_gets_its_gradient() -> None:
    model = tiny_model()
    expected = step(model)
    assert_same(step(fuse_loss(model)), expected)


def test_a_quantized_head_works() -> None:
    model = qlora_rs.quantize_model(tiny_llama.dense(), skip=())
    qlora_rs.add_lora(model, r=4, target_modules="attention")
    expected = step(tiny_llama.randomize(model))
    assert_same(step(fuse_loss(model)), expected)


def test_logits_are_none_with_labels_and_as_before_without() -> None:
    model = tiny_llama.with_adapter()
    before = model(IDS).logits
    generated = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    fuse_loss(model)
    outputs = model(IDS, labels=LABELS, output_hidden_states=True)
    assert outputs.logits is None
    assert "logits" not in outputs
    assert len(outputs.hidden_states) == 3
    assert len(model(IDS, None, None, None, None, LABELS, return_dict=False)) == 2  # loss, cache
    assert torch.equal(model(IDS).logits, before)  # with gradients
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=5, do_sample=False), generated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 9])
def test_logits_of_few_tokens_without_gradients(
    dtype: torch.dtype, bias: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama.dense()
    head = model.lm_head = nn.Linear(64, 64, bias=bias)
    model = fuse_loss(model.to(dtype))
    calls, direct = [], qlora_rs.cpu.multiply_dense
    monkeypatch.setattr(
        qlora_rs.cpu, "multiply_dense", lambda *operands: calls.append(1) or direct(*operands)
    )
    hidden = torch.randn(1, tokens, 64).to(dtype)
    with torch.no_grad():
        ours = head(hidden)
    own = nn.functional.linear(hidden, head.weight, head.bias)
    wide = (None if t is None else t.double() for t in (hidden, head.weight, head.bias))
    exact = nn.functional.linear(*wide)
    assert (ours.dtype, ours.shape) == (own.dtype, own.shape)
    assert len(calls) == (tokens <= 8)
    unit = torch.finfo(dtype).eps * exact.abs() / 2
    assert ((ours.double() - exact).abs() <= 1.01 * unit + 2e-6).all() or tokens > 8
    if tokens > 8:
        assert torch.equal(ours, own)


def test_an_output_layer_that_is_looked_at_is_torchs_own() -> None:
    model = fuse_loss(tiny_llama.dense())
    head, hidden = model.lm_head, torch.randn(1, 2, 64)
    own = nn.functional.linear(hidden, head.weight)
    assert torch.equal(head(hidden), own)  # with gradients
    with torch.no_grad():
        assert torch.allclose(torch.func.vmap(head)(hidden), own, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert head(hidden).dtype == torch.bfloat16
        gaps = torch.randn(1, 2, 128)[..., ::2]
        expected = nn.functional.linear(gaps, head.weight)
        assert torch.allclose(head(gaps), expected, atol=1e-6)
        head.weight.data = head.weight.t().contiguous().t()
        assert torch.allclose(head(gaps), expected, atol=1e-6)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            head(hidden[..., :32])


def test_unfusing_leaves_nothing_behind() -> None:
    model = tiny_llama.dense()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    signature = inspect.signature(model.forward)
    state = torch.get_rng_state()
    assert fuse_loss(model) is model
    assert inspect.signature(model.forward) == signature
    assert torch.equal(torch.get_rng_state(), state)
    assert unfuse_loss(model) is model
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert model(IDS, labels=LABELS).logits is not None
    with pytest.raises(QloraError, match="has no fused loss"):
        unfuse_loss(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_fused_and_independent(copied: Any) -> None:
    model = fuse_loss(tiny_llama.with_adapter())
    other = copied(model)
    assert_same(step(other), step(model))
    unfuse_loss(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert other(IDS, labels=LABELS).logits is None
    assert other(IDS).logits.abs().max() > 0


def test_the_state_dict_is_the_same() -> None:
    model = tiny_llama.with_adapter()
    names = list(model.state_dict())
    assert list(fuse_loss(model).state_dict()) == names


def test_gradient_checkpointing_gives_the_same() -> None:
    model = fuse_loss(tiny_llama.with_adapter().train())
    expected = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(step(model), expected)


def test_a_model_wrapped_by_peft_works() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_llama.dense(), config).train()
    expected = step(model)
    assert fuse_loss(model) is model
    assert_same(step(model), expected)
    assert_same(step(unfuse_loss(model)), expected)


def test_peft_may_wrap_a_fused_model() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(fuse_loss(tiny_llama.dense()), config)
    assert model(input_ids=IDS, labels=LABELS).logits is None


def test_threads_with_and_without_labels_do_not_meet() -> None:
    model = fuse_loss(tiny_llama.dense())
    outputs: list[Any] = []

    def without_labels() -> None:
        outputs.append(model(IDS).logits)

    def in_the_middle(module: nn.Module, inputs: Any, output: Any) -> None:
        thread = threading.Thread(target=without_labels)
        thread.start()
        thread.join()

    handle = model.model.layers[0].mlp.register_forward_hook(
        lambda *hooked: handle.remove() or in_the_middle(*hooked)
    )
    assert model(IDS, labels=LABELS).logits is None
    assert isinstance(outputs[0], Tensor)


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Scaled logits, an auxiliary loss, a bias, a float32 cast, an own cross_entropy, and no extras.
HONOURED = {
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "Phi": {},
    "Mamba": {},
    "Bart": {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4},
    "Qwen3": {"head_dim": 8},
}


def tiny(family: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", HONOURED)
def test_what_families_add_to_their_loss_is_honoured(family: str) -> None:
    model = tiny(family, **HONOURED[family])
    expected = step(model)
    assert_same(step(fuse_loss(model)), expected)


def test_a_model_that_needs_its_logits_is_refused_and_left_alone() -> None:
    model = tiny("Gemma2", head_dim=8)
    expected = step(model)
    with pytest.raises(QloraError, match="applies 'tanh' to its logits"):
        fuse_loss(model)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert_same(step(model), expected, 0.0)


def with_adapter_on_the_head() -> nn.Module:
    return qlora_rs.add_lora(qlora_rs.quantize_model(tiny_llama.dense(), skip=()), r=4)


def with_peft_on_the_head() -> nn.Module:
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    return get_peft_model(tiny_llama.dense(), config)


class Ignorant(transformers.LlamaForCausalLM):
    """Takes labels and does nothing with them."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        return super().forward(input_ids, **options)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (with_adapter_on_the_head, "is QLoRALinear, .* leave it out of target_modules"),
        (with_peft_on_the_head, "leave it out of target_modules"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential.forward takes no labels"),
        (lambda: transformers.LlamaModel(tiny_llama.dense().config), "takes no labels"),
        (lambda: tiny_llama.dense().to("meta"), "is on meta"),
        (lambda: Ignorant(tiny_llama.dense().config), "Ignorant does not compute its loss from"),
        (lambda: fuse_loss(tiny_llama.dense()), "has the fused loss already"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_a_sentence(build: Any, sentence: str) -> None:
    with pytest.raises(QloraError, match=sentence):
        fuse_loss(build())


def test_a_head_replaced_later_is_noticed() -> None:
    model = fuse_loss(tiny_llama.dense())
    model.resize_token_embeddings(70)
    with pytest.raises(QloraError, match="output layer was replaced"):
        model(IDS, labels=LABELS)
    assert model(IDS).logits.shape[-1] == 70
    assert fuse_loss(unfuse_loss(model))(IDS, labels=LABELS).logits is None


def test_trls_own_fused_head_works_beside_it() -> None:
    expected = tiny_llama.dense()(input_ids=IDS, labels=LABELS).loss
    model = fuse_loss(tiny_llama.dense())
    add_fused_lm_head(model)
    for options in ({}, {"fused_lm_head": True}):
        assert torch.allclose(model(input_ids=IDS, labels=LABELS, **options).loss, expected)
    with pytest.raises(QloraError, match="forward was replaced since"):
        unfuse_loss(model)


class FusedTrainer(SFTTrainer):
    """As fuse_loss's docstring has it."""

    compute_loss = transformers.Trainer.compute_loss


def test_trls_trainer_trains_with_it(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": LABELS.tolist()})
    losses = []
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    every = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
    for fused in (True, False):
        model = qlora_rs.add_lora(qlora_rs.quantize_model(tiny_model()), r=4)
        trainer = FusedTrainer(
            model=fuse_loss(model) if fused else model,
            args=SFTConfig(output_dir=str(tmp_path), max_steps=2, **options, **every),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        history = trainer.state.log_history
        losses.append([value for log in history for key, value in log.items() if "loss" in key])
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
