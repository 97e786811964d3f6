"""NF4Linear and QLoRALinear as stand-ins for nn.Linear."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import bitsandbytes
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import qlora_rs
from qlora_rs import NF4Linear, QloraError, QLoRALinear

STATISTICS = ("absmax", "nested_absmax", "nested_offset", "nested_map")


def base(bias: bool = True, double_quant: bool = True, **options: object) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(96, 40, bias=bias), double_quant=double_quant, **options)


def adapted(**options: object) -> QLoRALinear:
    layer = QLoRALinear(base(), **{"r": 4, "alpha": 8, **options})
    nn.init.normal_(layer.lora_B)
    return layer


def same_bytes(left: NF4Linear, right: NF4Linear) -> bool:
    pairs = zip(left.packed._tensors(), right.packed._tensors(), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.fixture(params=["single", "double", "lora"])
def layer(request: pytest.FixtureRequest) -> NF4Linear:
    return adapted() if request.param == "lora" else base(double_quant=request.param == "double")


def test_a_layer_is_an_nn_linear_with_its_attributes(layer: NF4Linear) -> None:
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (96, 40)
    assert layer.bias.shape == (40,)
    assert base(bias=False).bias is None
    assert "in_features=96, out_features=40, bias=True" in repr(layer)


def test_a_layer_computes_what_its_dequantized_weight_does(layer: NF4Linear) -> None:
    x = torch.randn(3, 96)
    expected = nn.functional.linear(x, layer.dequantize(torch.float32), layer.bias)
    if isinstance(layer, QLoRALinear):
        expected = expected + 2.0 * (x @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(layer(x), expected)


def test_quantizing_a_layer_leaves_the_float_layer_as_it_was() -> None:
    linear = nn.Linear(96, 40)
    before = parameters_to_vector(linear.parameters()).clone()
    layer = NF4Linear.from_linear(linear)
    layer.bias.fill_(7)
    assert linear.weight.requires_grad
    assert torch.equal(linear.weight.flatten(), before[: 96 * 40])


def test_only_the_adapter_of_a_layer_is_trainable(layer: NF4Linear) -> None:
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == ({"lora_A", "lora_B"} if isinstance(layer, QLoRALinear) else set())


def test_a_state_dict_loads_strictly_into_another_layer(layer: NF4Linear) -> None:
    other = adapted() if isinstance(layer, QLoRALinear) else base()
    other.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 96)
    assert same_bytes(layer, other)
    assert torch.equal(layer(x), other(x))


def test_a_state_dict_is_not_consumed_by_loading_it(layer: NF4Linear) -> None:
    state = layer.state_dict()
    keys = set(state)
    copy.deepcopy(layer).load_state_dict(state)
    assert set(state) == keys


def test_a_state_dict_survives_safetensors(layer: NF4Linear) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = safetensors.load(safetensors.save(layer.state_dict()))
    other = copy.deepcopy(layer)
    other.weight.zero_()
    other.load_state_dict(state, strict=True)
    assert same_bytes(layer, other)


def test_layers_share_no_memory_so_that_a_whole_models_state_is_saved() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(base(), base())
    state = safetensors.load(safetensors.save(model.state_dict()))
    assert set(state) == set(model.state_dict())
    other = state["0.weight.nested_quant_map"].flip(0)
    first = {key[2:]: value for key, value in state.items() if key.startswith("0.")}
    model[0].load_state_dict({**first, "weight.nested_quant_map": other})
    assert torch.equal(model[0].nested_map, other)
    for untouched in (model[1], base()):
        assert torch.equal(untouched.nested_map, state["1.weight.nested_quant_map"])


def test_quantizing_first_in_inference_mode_leaves_nothing_behind(run_python: Callable) -> None:
    done = run_python("""
        import torch, qlora_rs
        with torch.inference_mode():
            qlora_rs.quantize(torch.eye(64))
        x = torch.ones(2, 64, requires_grad=True)
        qlora_rs.linear(x, qlora_rs.quantize(torch.eye(64))).sum().backward()
        assert bool((x.grad == 1).all())
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("nested", [False, True])
def test_the_state_dict_of_bitsandbytes_linear4bit_loads_strictly(nested: bool) -> None:
    theirs = bitsandbytes.nn.Linear4bit(96, 64, compress_statistics=nested, quant_type="nf4")
    theirs.to("cpu")  # quantizes
    if theirs.weight.dtype != torch.uint8:
        theirs.weight = theirs.weight._quantize(torch.device("cpu"))
    ours = NF4Linear.from_linear(nn.Linear(96, 64))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.packed.double_quant == nested
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_reads_our_state_dict_as_a_prequantized_weight(nested: bool) -> None:
    layer = NF4Linear.from_linear(nn.Linear(128, 64, bias=False), double_quant=nested)
    state = layer.state_dict()
    codes = state.pop("weight")
    statistics = {key.removeprefix("weight."): value for key, value in state.items()}
    theirs = bitsandbytes.nn.Params4bit.from_prequantized(codes, statistics, device="cpu")
    decoded = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(decoded, layer.dequantize())


def damaged(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    other = NF4Linear.from_linear(nn.Linear(96, 48)).state_dict()
    return {
        "another shape": lambda: {**other, "bias": state["bias"]},
        "no codes": lambda: {k: v for k, v in state.items() if k != "weight"},
        "no absmax": lambda: {k: v for k, v in state.items() if k != "weight.absmax"},
        "short codes": lambda: {**state, "weight": state["weight"][:-1]},
        "no weight at all": lambda: {"bias": state["bias"]},
        "no bias": lambda: {k: v for k, v in state.items() if k != "bias"},
        "an extra tensor": lambda: {**state, "lora_C": torch.zeros(1)},
        "a float weight": lambda: {"weight": torch.zeros(40, 96), "bias": state["bias"]},
    }[change]()


@pytest.mark.parametrize(
    "change",
    [
        "another shape", "no codes", "no absmax", "short codes", "no weight at all", "no bias",
        "an extra tensor", "a float weight",
    ],
)  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_refused_and_the_weight_stays(change: str) -> None:
    layer = base()
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="Error\\(s\\) in loading state_dict for NF4Linear"):
        layer.load_state_dict(damaged(base().state_dict(), change), strict=True)
    # torch loads what it can of a refused dict; the packed weight is one piece and stays whole.
    if change not in ("no bias", "an extra tensor"):
        assert same_bytes(layer, before)


def test_a_deep_copy_is_equal_and_shares_no_memory(layer: NF4Linear) -> None:
    copied = copy.deepcopy(layer)
    assert same_bytes(layer, copied)
    copied.weight.zero_()
    assert not torch.equal(copied.weight, layer.weight)


def test_a_layer_survives_torch_save_and_load(layer: NF4Linear) -> None:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(3, 96)
    assert same_bytes(layer, loaded)
    assert torch.equal(layer(x), loaded(x))


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casting_a_layer_keeps_its_codes_and_statistics(layer: NF4Linear, cast: str) -> None:
    before = copy.deepcopy(layer)
    cast_layer = CASTS[cast](layer)
    assert same_bytes(before, cast_layer)
    assert cast_layer.weight.dtype == torch.uint8
    assert cast_layer.bias.dtype != torch.float32
    x = torch.randn(2, 96).to(cast_layer.bias.dtype)
    torch.testing.assert_close(cast_layer(x).float(), before(x.float()), rtol=0.05, atol=0.1)


def test_a_cast_reaches_layers_inside_a_model() -> None:
    model = nn.Sequential(nn.Sequential(base()), adapted())
    before = copy.deepcopy(model)
    model.to(torch.bfloat16)
    assert same_bytes(model[0][0], before[0][0])
    assert same_bytes(model[1], before[1])
    assert model[1].lora_A.dtype == torch.bfloat16


def test_a_layer_moves_to_the_meta_device_and_is_made_real_by_loading(layer: NF4Linear) -> None:
    state, x = layer.state_dict(), torch.randn(2, 96)
    expected = layer(x)
    meta = copy.deepcopy(layer).to("meta")
    assert meta(x.to("meta")).shape == expected.shape
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    real = meta.to_empty(device="cpu")
    real.load_state_dict(state, strict=True)
    assert torch.equal(real(x), expected)


def test_requires_grad_and_zero_grad_work_as_on_any_module(layer: NF4Linear) -> None:
    layer.requires_grad_(False)
    layer.zero_grad(set_to_none=True)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_of_the_product(layer: NF4Linear, dtype: torch.dtype) -> None:
    x = torch.randn(5, 96)
    expected = layer(x.to(dtype).float())
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compute_dtype_rounds_x_and_the_result_comes_back_in_xs(x_dtype: torch.dtype) -> None:
    layer = base(compute_dtype=torch.bfloat16)
    x = torch.randn(4, 96).to(x_dtype)
    y = layer(x)
    assert y.dtype == x_dtype
    packed = layer.packed
    rounded = qlora_rs.linear(x.bfloat16(), packed, layer.bias.bfloat16())
    assert torch.equal(y, rounded.to(x_dtype))


def test_an_adapter_starts_as_its_base() -> None:
    layer, x = QLoRALinear(base(), r=4), torch.randn(3, 96)
    assert torch.equal(layer(x), layer.without_adapter()(x))
    assert layer.lora_A.abs().max() <= math.sqrt(1 / 96)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 32 / 16), (True, 32 / 4)])
def test_the_scaling_is_alpha_over_r_or_over_its_root(rslora: bool, scaling: float) -> None:
    assert QLoRALinear(base(), r=16, alpha=32, use_rslora=rslora).scaling == scaling


@pytest.mark.parametrize("training", [False, True])
def test_dropout_acts_on_the_adapters_input_as_in_peft(training: bool) -> None:
    linear, x = nn.Linear(96, 40), torch.randn(64, 96)
    ours = QLoRALinear(NF4Linear.from_linear(linear), r=4, alpha=8, dropout=0.3)
    nn.init.normal_(ours.lora_B)
    linear.weight.data = ours.dequantize(torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(linear), config)
    theirs.base_model.model[0].lora_A["default"].weight.data = ours.lora_A.data
    theirs.base_model.model[0].lora_B["default"].weight.data = ours.lora_B.data
    results = []
    for module in (ours.train(training), theirs.train(training)):
        torch.manual_seed(7)
        results.append(module(x))
    torch.testing.assert_close(*results)


def test_dropout_trains_x_a_and_b() -> None:
    layer, x = adapted(dropout=0.5).train(), torch.randn(64, 96, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": -3}, "r must be at least 1, got -3"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"dropout": float("nan")}, "dropout must be in"),
    ],
)
def test_adapter_options_without_meaning_are_refused(options: dict, message: str) -> None:
    with pytest.raises(QloraError, match=message):
        QLoRALinear(base(), **options)


def test_a_layer_takes_xs_of_any_leading_shape_and_no_rows(layer: NF4Linear) -> None:
    for shape in ((96,), (0, 96), (2, 3, 96), (1, 1, 1, 96)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 40)


def test_a_loaded_layer_shares_no_memory_with_the_state_dict() -> None:
    layer, other = base(), base()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    assert other.absmax.data_ptr() != layer.absmax.data_ptr()


def test_assigning_a_state_dict_makes_a_meta_layer_real() -> None:
    layer = base()
    meta = copy.deepcopy(layer).to("meta")
    meta.load_state_dict(layer.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 96)
    assert torch.equal(meta(x), layer(x))


def test_an_entry_that_no_weight_has_is_unexpected() -> None:
    layer = base()
    state = layer.state_dict() | {"weight.junk": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.junk"):
        layer.load_state_dict(state, strict=True)
