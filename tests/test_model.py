"""quantize_model, add_lora and what switches adapters off and on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qlora_rs
from qlora_rs import NF4Linear, QloraError, QLoRALinear


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(self.attention(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.lm_head = nn.Linear(64, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(12).reshape(2, 6)
QUANTIZED = [
    f"layers.{i}.{name}"
    for i in (0, 1)
    for name in ("attention.q_proj", "attention.k_proj", "attention.o_proj", "mlp.0", "mlp.2")
]


def quantized(**options: object) -> Model:
    return qlora_rs.quantize_model(Model(), **options)


def names(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


def snapshot(model: nn.Module) -> list[tuple]:
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    tensors = [
        (name, id(p), p.requires_grad, p.dtype, hash(p.detach().numpy().tobytes()))
        for name, p in model.named_parameters()
    ]
    return [modules, tensors]


def test_every_linear_layer_but_lm_head_is_quantized_and_all_is_frozen() -> None:
    model = quantized()
    assert names(model, NF4Linear) == QUANTIZED
    assert names(model, nn.Linear) == ["lm_head"]
    assert not any(p.requires_grad for p in model.parameters())


def test_a_quantized_model_computes_what_its_dequantized_copy_does() -> None:
    model = quantized()
    dense = copy.deepcopy(model)
    for name in QUANTIZED:
        layer = dense.get_submodule(name)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data = layer.dequantize()
        if layer.bias is not None:
            linear.bias.data = layer.bias.data
        qlora_rs.model.replace_module(dense, name, linear)
    torch.testing.assert_close(model(IDS), dense(IDS))


def test_many_modules_are_replaced_at_once_wherever_they_stand() -> None:
    tied, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleDict({"a": tied, "b": nn.Sequential(tied, other), "c": other})
    new = {"a": nn.Identity(), "c": nn.Tanh()}
    qlora_rs.model.replace_modules(model, new)
    assert model["a"] is model["b"][0] is new["a"]
    assert model["c"] is model["b"][1] is new["c"]
    # Two that change places.
    qlora_rs.model.replace_modules(model, {"a": model["c"], "c": model["a"]})
    assert model["a"] is model["b"][0] is new["c"]
    assert model["c"] is model["b"][1] is new["a"]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), []),
        (("lm_head", "q_proj"), ["layers.0.attention.q_proj", "layers.1.attention.q_proj"]),
        (("lm_head", "layers.1.mlp.0"), ["layers.1.mlp.0"]),
        ("q_proj", ["layers.0.attention.q_proj", "layers.1.attention.q_proj"]),
    ],
)
def test_layers_are_skipped_by_full_name_or_last_part_only(skip: tuple, left: list) -> None:
    expected = left + (["lm_head"] if "lm_head" in skip else [])
    assert names(quantized(skip=skip), nn.Linear) == expected


def test_a_skip_that_names_no_layer_is_refused() -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(QloraError, match=r"skip names \['proj'\]"):
        qlora_rs.quantize_model(model, skip=["lm_head", "proj"])
    assert snapshot(model) == before


def test_a_model_that_is_itself_a_linear_layer_is_refused() -> None:
    with pytest.raises(QloraError, match=r"NF4Linear\.from_linear"):
        qlora_rs.quantize_model(nn.Linear(64, 64))


def test_adapters_of_a_layer_in_two_places_stay_one_layer() -> None:
    shared = nn.Linear(64, 64)
    model = qlora_rs.add_lora(qlora_rs.quantize_model(nn.Sequential(shared, shared)))
    assert isinstance(model[0], QLoRALinear)
    assert model[0] is model[1]


def test_disabling_acts_at_once_without_a_with_block() -> None:
    model = qlora_rs.add_lora(qlora_rs.quantize_model(nn.Sequential(nn.Linear(64, 64))))
    qlora_rs.disable_adapter(model)
    assert not model[0].adapter_enabled
    qlora_rs.enable_adapter(model)
    assert model[0].adapter_enabled


def test_a_tied_weight_is_left_alone() -> None:
    model = Model()
    model.lm_head.weight = model.embed.weight
    qlora_rs.quantize_model(model, skip=())
    assert names(model, nn.Linear) == ["lm_head"]
    assert model.lm_head.weight is model.embed.weight


def test_a_layer_that_is_used_twice_stays_one_layer_or_is_left_alone() -> None:
    shared = nn.Linear(64, 64)
    model = qlora_rs.quantize_model(
        nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(64, 8)})
    )
    assert model["a"] is model["b"]


def test_subclasses_of_linear_and_quantized_layers_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = qlora_rs.quantize_model(nn.Sequential(nn.Linear(64, 8), Special(8, 8)))
    assert type(model[1]) is Special
    with pytest.raises(QloraError, match=r"no nn\.Linear to quantize .* quantized already"):
        qlora_rs.quantize_model(model)


def test_options_reach_every_layer_and_the_training_mode_stays() -> None:
    model = Model()
    model.layers[1].eval()
    qlora_rs.quantize_model(model, block_size=32, double_quant=False, compute_dtype=torch.bfloat16)
    for name in QUANTIZED:
        layer = model.get_submodule(name)
        assert (layer.block_size, layer.packed.double_quant) == (32, False)
        assert layer.compute_dtype == torch.bfloat16
        assert layer.training == name.startswith("layers.0")


def test_progress_is_told_after_each_layer() -> None:
    seen: list[tuple] = []
    quantized(progress=lambda *step: seen.append(step))
    assert seen == [(i, 10, name) for i, name in enumerate(QUANTIZED, start=1)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_refuses_the_model_and_leaves_it_as_it_was(bad: float) -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].mlp[2].weight[2, [7, 9]] = bad
    before = snapshot(model)
    expected = "layers.1.mlp.2.weight holds 2 NaN .* the first at \\[2, 7\\]; nothing was quantized"
    with pytest.raises(QloraError, match=expected):
        qlora_rs.quantize_model(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "options", [{"block_size": 96}, {"block_size": 0}, {"skip": [*QUANTIZED, "lm_head"]}]
)
def test_options_that_are_refused_leave_the_model_as_it_was(options: dict) -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(QloraError):
        qlora_rs.quantize_model(model, **options)
    assert snapshot(model) == before


def test_a_layer_in_an_unsupported_dtype_refuses_the_model_and_leaves_it_as_it_was() -> None:
    model = Model()
    model.layers[1].mlp[2].double()
    before = snapshot(model)
    with pytest.raises(QloraError, match="float64"):
        qlora_rs.quantize_model(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", QUANTIZED),
        ("attention", [n for n in QUANTIZED if "attention" in n]),
        (["q_proj", "mlp.0"], [n for n in QUANTIZED if n.endswith(("q_proj", "mlp.0"))]),
        (("layers.0.mlp.2",), ["layers.0.mlp.2"]),
        (r".*\.1\..*_proj", [n for n in QUANTIZED if ".1." in n and "_proj" in n]),
    ],
)
def test_adapters_go_where_the_targets_say(targets: object, expected: list) -> None:
    model = qlora_rs.add_lora(quantized(), r=2, target_modules=targets)
    assert names(model, QLoRALinear) == expected
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{m}" for n in expected for m in "AB"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "nothing"]}, r"names \['nothing'\], which match no"),
        ({"target_modules": ["nothing"]}, "matches none of the 10 quantized layers"),
        ({"target_modules": []}, "matches none"),
        ({"target_modules": "lm_head"}, "matches none"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"r": 0}, "r must be at least 1"),
        ({"dropout": 1.5}, "dropout must be in"),
    ],
)
def test_targets_that_are_refused_leave_the_model_as_it_was(options: dict, message: str) -> None:
    model = quantized()
    before = snapshot(model)
    with pytest.raises(QloraError, match=message):
        qlora_rs.add_lora(model, **options)
    assert snapshot(model) == before


def test_adapters_on_a_float_model_are_refused_with_the_remedy() -> None:
    with pytest.raises(QloraError, match="call quantize_model"):
        qlora_rs.add_lora(Model())


def test_a_second_adapter_is_refused_and_the_first_stays() -> None:
    model = qlora_rs.add_lora(quantized(), r=2, target_modules=["q_proj"])
    before = snapshot(model)
    with pytest.raises(QloraError, match="has an adapter already; remove it with remove_lora"):
        qlora_rs.add_lora(model, r=2)
    assert snapshot(model) == before


def with_adapter() -> Model:
    model = qlora_rs.add_lora(quantized(), r=4, alpha=8)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model


def test_disabling_gives_the_base_and_enabling_the_adapter_again() -> None:
    model = with_adapter()
    adapted = model(IDS)
    base = qlora_rs.remove_lora(copy.deepcopy(model))(IDS)
    assert not torch.equal(adapted, base)
    with qlora_rs.disable_adapter(model) as same:
        assert same is model
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), adapted)
    qlora_rs.enable_adapter(model, enabled=False)
    assert torch.equal(model(IDS), base)
    qlora_rs.enable_adapter(model)
    assert torch.equal(model(IDS), adapted)


def test_disabling_restores_each_layer_after_an_exception_and_when_nested() -> None:
    model = with_adapter()
    model.layers[0].mlp[0].adapter_enabled = False
    before = [m.adapter_enabled for m in model.modules() if isinstance(m, QLoRALinear)]

    def fail_inside() -> None:
        with qlora_rs.disable_adapter(model), qlora_rs.disable_adapter(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    assert [m.adapter_enabled for m in model.modules() if isinstance(m, QLoRALinear)] == before


def test_removing_adapters_gives_the_quantized_model_back() -> None:
    model = with_adapter()
    codes = {n: model.get_submodule(n).weight.clone() for n in QUANTIZED}
    assert names(qlora_rs.remove_lora(model), NF4Linear) == QUANTIZED
    assert all(torch.equal(model.get_submodule(n).weight, codes[n]) for n in QUANTIZED)


def test_weights_are_counted_as_weights_and_not_as_bytes() -> None:
    plain = sum(p.numel() for p in Model().parameters())
    assert qlora_rs.trainable_parameters(quantized()) == (0, plain)
    adapters = sum(2 * (64 + 64) for _ in range(6)) + sum(2 * (64 + 96) for _ in range(4))
    model = qlora_rs.add_lora(quantized(), r=2)
    assert qlora_rs.trainable_parameters(model) == (adapters, plain + adapters)


def test_an_adapter_learns_and_its_base_keeps_its_bytes() -> None:
    model = qlora_rs.add_lora(quantized(), r=8, alpha=16)
    codes = {n: model.get_submodule(n).weight.clone() for n in QUANTIZED}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(model.get_submodule(n).weight, codes[n]) for n in QUANTIZED)


@pytest.mark.parametrize(
    "call",
    [
        qlora_rs.quantize_model,
        qlora_rs.add_lora,
        qlora_rs.remove_lora,
        qlora_rs.enable_adapter,
        qlora_rs.disable_adapter,
        qlora_rs.trainable_parameters,
        qlora_rs.fuse_loss,
        qlora_rs.unfuse_loss,
        qlora_rs.fuse_norms,
        qlora_rs.unfuse_norms,
        qlora_rs.fuse_mlps,
        qlora_rs.unfuse_mlps,
        qlora_rs.widen_attention,
        qlora_rs.unwiden_attention,
        qlora_rs.merge_model,
        qlora_rs.unmerge,
        lambda model: qlora_rs.save_adapter(model, "nowhere"),
        lambda model: qlora_rs.load_adapter(model, "nowhere"),
    ],
)
def test_what_is_no_model_is_refused_by_name(call: Callable) -> None:
    for given, named in ((None, "NoneType"), ("model", "str"), (nn.Linear, "the class Linear")):
        with pytest.raises(QloraError, match=f"torch.nn.Module, got {named}; pass the model"):
            call(given)
