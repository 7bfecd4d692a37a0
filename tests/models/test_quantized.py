"""QuantLinear, quantize_ and dequantize_: the module by itself, under PEFT, stock and patched, and in tiny LMs."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import torch_fused_lora as tfl
from tests import ROOT
from torch_fused_lora.affine import quantize
from torch_fused_lora.decide import DISABLED, INACTIVE

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256}
KEYS = ["weight", "bias", "scales", "biases"]


def language_model(kind="llama", dtype=torch.float32, **options):
    torch.manual_seed(3)
    if kind == "gemma":
        return GemmaForCausalLM(GemmaConfig(**SIZES | {"head_dim": 32} | options)).to(dtype)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"attention_bias": True} | options)).to(dtype)


def quantized(kind="llama", dtype=torch.float32, bits=4, **options):
    model = language_model(kind, dtype, **options)
    tfl.quantize_(model, bits, group_size=64)
    return model


def with_lora(model, **options):
    """One that does something already."""
    torch.manual_seed(4)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def batch(rows=2, length=12):
    ids = torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


def train(model, steps=20):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, tfl.QuantLinear)}


def linear(K=128, N=24, bias=True, dtype=torch.bfloat16):
    return nn.Linear(K, N, bias).to(dtype)


# ---------------------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_from_linear(bits, bias, monkeypatch):
    monkeypatch.setattr(tfl.quantized, "_BLOCK", 5 * 128)  # of 24 rows
    base = linear(bias=bias).eval()
    layer = tfl.QuantLinear.from_linear(base, bits, 32)
    assert isinstance(layer, nn.Linear)
    assert not layer.training
    assert (layer.in_features, layer.out_features) == (128, 24)
    assert layer.bias is base.bias
    assert (layer.weight.dtype, layer.weight.shape) == (torch.uint32, (24, 128 * bits // 32))
    assert not layer.weight.requires_grad
    assert "weight" not in repr(layer.extra_repr())
    assert layer.extra_repr() == f"in_features=128, out_features=24, bias={bias}, bits={bits}, group_size=32"
    weight = layer.dequantize()
    assert torch.equal(weight, quantize(base.weight.detach(), bits, 32).dequantize(torch.bfloat16))
    x = torch.randn(3, 128).bfloat16()
    torch.testing.assert_close(layer(x), F.linear(x, weight, base.bias))


def test_a_layer_of_zeros_and_its_keys():
    layer = tfl.QuantLinear(128, 5, bits=8, group_size=128, dtype=torch.float16)
    assert list(layer.state_dict()) == KEYS
    assert list(tfl.QuantLinear(64, 5, bias=False).state_dict()) == ["weight", "scales", "biases"]
    assert not layer(torch.randn(2, 128).half()).any()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert tfl.QuantLinear(64, 5, device="meta").weight.is_meta


@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer.half(),
        lambda layer: layer.to(torch.float32),
        lambda layer: layer.double(),
        lambda layer: layer.to("cpu", torch.float16),
        lambda layer: nn.Sequential(layer).float()[0],
    ],
)
def test_a_conversion_changes_what_is_computed_in_and_never_the_weight(convert):
    layer = tfl.QuantLinear.from_linear(linear())
    words, weight = layer.weight.clone(), layer.dequantize(torch.float64)
    dtype = convert(nn.Linear(1, 1)).weight.dtype
    layer = convert(layer)
    assert torch.equal(layer.weight, words)
    assert layer.scales.dtype == layer.biases.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(torch.float64), weight)
    assert layer.bias.dtype == layer.dequantize().dtype == layer(torch.randn(2, 128, dtype=dtype)).dtype == dtype


def test_to_empty_and_meta():
    layer = tfl.QuantLinear.from_linear(linear())
    saved = copy.deepcopy(layer.state_dict())
    layer.to("meta").to_empty(device="cpu").load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in layer.state_dict().items())


def copies(layer, tmp_path):
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    yield torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for save, load in (
        (lambda state: torch.save(state, tmp_path / "state"), lambda: torch.load(tmp_path / "state")),
        (lambda state: save_file(state, tmp_path / "file"), lambda: load_file(tmp_path / "file")),
    ):
        for assign in (False, True):
            other = tfl.QuantLinear(128, 24, dtype=torch.bfloat16)
            save(layer.state_dict())
            other.load_state_dict(load(), assign=assign)
            yield other


def test_copies_and_files(tmp_path):
    layer = tfl.QuantLinear.from_linear(linear())
    x = torch.randn(2, 128).bfloat16()
    for twin in copies(layer, tmp_path):
        assert type(twin) is tfl.QuantLinear
        assert type(twin.weight) is nn.Parameter
        assert not twin.weight.requires_grad
        assert torch.equal(twin.weight, layer.weight)
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(twin(x), layer(x))
    assert layer.weight.dtype == torch.uint32


def test_loading_keeps_the_scales_dtype():
    """Those of half and float32 checkpoints load into each other's models, and W stays what was saved."""
    saved = tfl.QuantLinear.from_linear(linear(dtype=torch.float32))
    layer = tfl.QuantLinear.from_linear(linear())
    layer.load_state_dict(saved.state_dict())
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.dequantize(torch.float64), saved.dequantize(torch.float64))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(linear().state_dict() | {"scales": layer.scales, "biases": layer.biases})


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float16, torch.float32)])
def test_scales_and_biases_that_no_kernel_takes_are_refused_when_loaded(dtypes):
    layer = tfl.QuantLinear.from_linear(linear())
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    both = zip(KEYS[2:], dtypes, strict=True)
    saved = {name: state[name].to(dtype) for name, dtype in both}
    with pytest.raises(RuntimeError, match=rf"0\.scales {dtypes[0]} and 0\.biases {dtypes[1]}"):
        nn.Sequential(layer).load_state_dict({f"0.{name}": value for name, value in (state | saved).items()})
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


# ------------------------------------------------------------------------------------------- quantize_ and dequantize_


def test_quantize_in_place_and_back():
    model = language_model(dtype=torch.bfloat16)
    q_proj, hooked = model.model.layers[0].self_attn.q_proj, []
    q_proj.register_forward_hook(lambda *_: hooked.append(1))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {name: module.weight.detach().clone() for name, module in linears.items()}
    fields = {name: set(vars(module)) for name, module in linears.items()}
    before = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    report = tfl.quantize_(model)
    assert set(report.errors) == set(layers_of(model)) == weights.keys() - {"lm_head"}
    assert model.model.layers[0].self_attn.q_proj is q_proj
    assert type(model.lm_head) is nn.Linear
    elements = sum(weights[name].numel() for name in report.errors)
    assert report.bytes_before == before
    assert before - report.bytes_after == elements * 2 - elements * 4.5 / 8  # 4.5 / 16 of bfloat16
    for name, layer in layers_of(model).items():
        error = (layer.dequantize(torch.float32) - weights[name]).norm() / weights[name].float().norm()
        assert report.errors[name] == pytest.approx(float(error), rel=1e-4)
    text = str(report)
    assert "14 layers in 4 bits, groups of 64: 0." in text
    assert re.search(r"2 x model\.layers\.\*\.mlp\.down_proj +error up to \d\.\d\d%", text)
    logits = model(**batch()).logits
    assert hooked == [1]
    dequantised = {name: layer.dequantize() for name, layer in layers_of(model).items()}
    tfl.dequantize_(model)
    assert not layers_of(model)
    for name, weight in dequantised.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
        assert list(layer.state_dict()) in (["weight", "bias"], ["weight"])
        assert vars(layer).keys() == fields[name]
    torch.testing.assert_close(model(**batch()).logits, logits)


def test_what_is_skipped():
    model = language_model()
    model.visual = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.other = nn.MultiheadAttention(64, 2)
    report = tfl.quantize_(model, skip=("lm_head", "visual", "mlp.up_proj", "layers.1"))
    assert set(report.errors) == {
        f"model.layers.0.{name}"
        for name in ("mlp.gate_proj", "mlp.down_proj", *(f"self_attn.{part}_proj" for part in "qkvo"))
    }
    assert set(tfl.quantize_(model, skip="lm_head").errors) >= {"visual.0", "model.layers.1.mlp.up_proj"}
    assert type(model.other.out_proj) is not tfl.QuantLinear  # its owner reads its weight
    assert tfl.quantize_(model, skip="lm_head").errors == {}
    assert set(tfl.quantize_(model, 8, skip=()).errors) == {"lm_head"}


def test_after_peft_the_bases_are_quantised_and_the_adapters_are_not():
    model = with_lora(language_model())
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    report = tfl.quantize_(model)
    assert all(name.endswith("base_layer") for name in report.errors)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert len(tfl.patch_peft(model).patched) == len(report.errors) == 14
    model(**batch()).loss.backward()


def test_merged_adapters_are_refused():
    model = with_lora(language_model())
    model.merge_adapter()
    with pytest.raises(ValueError, match="q_proj: adapters are merged into its base: unmerge them first"):
        tfl.quantize_(model)
    assert not layers_of(model)


def test_a_lora_linear_is_not_made_of_words():
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got QuantLinear"):
        tfl.LoRALinear.from_linear(tfl.QuantLinear(64, 2))


def spoil(model, how):
    layer = model.model.layers[1].mlp.down_proj
    if how == "nan":
        layer.weight.data[3, 5] = float("nan")
    elif how == "infinite":
        layer.weight.data[0, 0] = float("inf")
    elif how == "columns":
        model.model.layers[1].mlp.down_proj = nn.Linear(100, 128)
    elif how == "integers":
        layer.weight = nn.Parameter(torch.ones(128, 192, dtype=torch.int8), requires_grad=False)
    elif how == "meta":
        layer.to("meta")
    elif how == "shared":
        model.model.layers[0].mlp.down_proj.weight = layer.weight
    elif how == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("nan", r"model\.layers\.1\.mlp\.down_proj\.weight: expected finite numbers"),
        ("infinite", r"model\.layers\.1\.mlp\.down_proj\.weight: expected finite numbers"),
        ("columns", r"down_proj\.weight: expected a multiple of group_size 64 columns, got shape \(128, 100\)"),
        ("integers", r"down_proj\.weight: expected a floating dtype, got torch\.int8"),
        ("meta", r"down_proj\.weight: expected a plain dense tensor, got a Parameter on meta"),
        ("shared", r"model\.layers\.0\.mlp\.down_proj\.weight: shared with model\.layers\.1\.mlp\.down_proj; skip"),
        ("tied", r"lm_head\.weight: shared with model\.embed_tokens; skip the layer, or untie"),
    ],
)
def test_what_is_refused_has_changed_nothing(how, expected):
    model = language_model()
    spoil(model, how)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=expected):
        tfl.quantize_(model, skip=())
    assert not layers_of(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


def test_a_tied_head_is_skipped_by_default():
    model = quantized("gemma", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 16])
def test_other_formats_are_refused_by_name(bits):
    model = language_model()
    for call in (
        lambda: tfl.quantize_(model, bits),
        lambda: tfl.QuantLinear(64, 2, bits=bits),
        lambda: tfl.QuantLinear.from_linear(linear(), bits),
    ):
        with pytest.raises(ValueError, match=rf"bits: expected 4 or 8 \(2, 3, 5 and 6 are not supported\), got {bits}"):
            call()
    with pytest.raises(ValueError, match="group_size: expected 32, 64 or 128, got 48"):
        tfl.quantize_(model, group_size=48)
    with pytest.raises(ValueError, match="in_features: expected a multiple of group_size 64, got 100"):
        tfl.QuantLinear(100, 2)
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got Conv1d"):
        tfl.QuantLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        tfl.quantize_({})


# ---------------------------------------------------------------------------------------------------------- under PEFT


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_twenty_steps_have_stock_s_losses(kind, bits):
    """Of the patched model, of stock PEFT over the same layers, and of stock PEFT over the dequantised ones; in
    float64, so that twenty steps of training leave no rounding to be seen."""
    stock = with_lora(quantized(kind, bits=bits)).double()
    fused, floats = copy.deepcopy(stock), copy.deepcopy(stock)
    report = tfl.patch_peft(fused)
    tfl.dequantize_(floats)
    losses = [train(model) for model in (fused, stock, floats)]
    assert losses[0][-1] < 0.9 * losses[0][0]
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, rel=1e-9)
    assert {(calls.fused, calls.declined) for calls in report.calls().values()} == {(20, 0)}
    assert f"fused over {bits} bits" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layer_is_within_the_roundings_of_stock(dtype):
    model = with_lora(quantized(dtype=dtype))
    tfl.patch_peft(model)
    report = tfl.check_peft(model, **batch())
    assert report.ok
    assert all(check.reason is None for check in report.values())


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.2}, {"lora_bias": True}, {"bias": "all"}, {"use_rslora": True}]
)
def test_a_step_of_each_kind_of_adapter(options):
    model = with_lora(quantized(), **options).train()
    for name, parameter in model.named_parameters():
        assert "biases" not in name
        assert parameter.dtype != torch.uint32 or not parameter.requires_grad
    report = tfl.patch_peft(model)
    model(**batch()).loss.backward()
    assert {calls.fused for calls in report.calls().values()} == {1}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if not options.get("lora_dropout"):
        assert tfl.check_peft(model, **batch()).ok


class Operators(TorchDispatchMode):
    """Collects the names of this package's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "torch_fused_lora":
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_layer_is_one_operator_unless_its_base_has_to_be_called():
    model = with_lora(quantized())
    tfl.patch_peft(model)
    with Operators() as operators:
        model(**batch())
    assert operators.names == ["lora_linear_quantized_forward"] * 14
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").register_forward_hook(lambda *_: None)
    with Operators() as operators:
        model(**batch())
    assert operators.names.count("lora_linear_quantized_forward") == 14  # one of them the base, without an adapter
    assert operators.names.count("lora_delta_forward") == 1


@pytest.mark.parametrize("keep", [True, False])
def test_a_patched_model_compiles(keep):
    model = with_lora(
        nn.Sequential(tfl.QuantLinear.from_linear(linear(64, 64, dtype=torch.float32))), target_modules=["0"]
    )
    tfl.patch_peft(model)
    x = torch.randn(3, 64)
    expected = model(x)
    leaves = [p for p in model.parameters() if p.requires_grad]
    torch.compiler.reset()
    with tfl.keep_operators() if keep else contextlib.nullcontext():
        found = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    for both in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (found, expected)), strict=True):
        torch.testing.assert_close(*both)


def test_several_adapters_switched_disabled_and_saved(tmp_path):
    model = with_lora(quantized())
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    stock = copy.deepcopy(model)
    report = tfl.patch_peft(model)
    for active in ("second", "default", ["default", "third"]):
        for each in (model, stock):
            each.base_model.set_adapter(active)
        torch.testing.assert_close(model(**batch()).logits, stock(**batch()).logits)
    assert {calls.reason for calls in report.calls().values()} == {None, INACTIVE}
    with model.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, stock(**batch()).logits)
    assert {calls.reason for calls in report.calls().values()} == {DISABLED}
    model.base_model.set_adapter("second")
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path / "second")
    torch.testing.assert_close(loaded(**batch()).logits, expected)


def test_a_quantised_model_is_saved_and_loaded_elsewhere(tmp_path):
    model = quantized(dtype=torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = LlamaForCausalLM(model.config).to(torch.bfloat16)
    tfl.quantize_(other)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("patched", [True, False])
def test_merging_is_refused_until_the_base_is_dequantised(patched):
    model = with_lora(quantized())
    if patched:
        tfl.patch_peft(model)
    expected = model(**batch()).logits
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(
            ValueError, match=r"q_proj: its base holds packed words.*torch_fused_lora\.dequantize_\(model\)"
        ):
            merge()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"Linear over QuantLinear\(.*packed words.*dequantize_\(model\)"):
            layer.merge(safe_merge=safe)
    assert not layer.merged
    torch.testing.assert_close(model(**batch()).logits, expected)
    tfl.dequantize_(model)
    torch.testing.assert_close(model(**batch()).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(**batch()).logits, expected)
    kept = with_lora(quantized(), target_modules=["lm_head"])  # whose base is not packed
    kept.merge_and_unload()


def test_a_loaded_layer_is_guarded_in_a_new_process(tmp_path):
    (tmp_path / "model").write_bytes(pickle.dumps(nn.Sequential(tfl.QuantLinear.from_linear(linear(64, 8)))))
    script = """
import pickle, sys
model = pickle.loads(open(sys.argv[1], "rb").read())
from peft import LoraConfig, get_peft_model
try:
    get_peft_model(model, LoraConfig(target_modules=["0"])).merge_and_unload()
except ValueError as error:
    assert "packed words" in str(error)
else:
    raise AssertionError("merged")
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "model"], check=True, cwd=ROOT)


LOFTQ = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        LOFTQ,
        *({"init_lora_weights": name} for name in ("pissa", "pissa_niter_4", "olora", "orthogonal")),
    ],
)
def test_what_reads_the_weight_is_refused_by_name(options):
    first = next(iter(options))
    named = "use_dora" if first == "use_dora" else f"init_lora_weights='{options['init_lora_weights']}'"
    model = quantized()
    with pytest.raises(ValueError, match=rf"{named}: .*packed words.*torch_fused_lora\.dequantize_"):
        get_peft_model(model, LoraConfig(target_modules="all-linear", **options))
    with pytest.raises(ValueError, match=named):
        with_lora(quantized()).add_adapter("second", LoraConfig(target_modules="all-linear", **options))
    assert len(layers_of(model)) == 14
    floats = language_model()
    if "loftq" not in named:
        get_peft_model(floats, LoraConfig(target_modules="all-linear", **options))  # elsewhere PEFT is as it was


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_starts_that_read_no_weight(start):
    model = get_peft_model(quantized(), LoraConfig(target_modules="all-linear", init_lora_weights=start))
    model(**batch()).loss.backward()


def test_prepare_model_for_kbit_training():
    """It widens what floats there are but the scales; the layers compute in what they are given."""
    model = quantized(dtype=torch.bfloat16)
    words = {name: layer.dequantize(torch.float64) for name, layer in layers_of(model).items()}
    prepare_model_for_kbit_training(model)
    model = with_lora(model)
    report = tfl.patch_peft(model)
    loss = model(**batch()).loss
    loss.backward()
    assert loss.dtype == model(**batch()).logits.dtype == torch.float32
    assert {calls.declined for calls in report.calls().values()} == {0}
    for name, layer in layers_of(model.get_base_model()).items():
        assert layer.scales.dtype == torch.bfloat16
        assert torch.equal(layer.dequantize(torch.float64), words[name.replace(".base_layer", "")])


def test_resize_token_embeddings():
    """Right where the head is skipped; over a quantised head refused, with nothing half done."""
    model = quantized()
    model.resize_token_embeddings(104)
    assert model(**batch()).logits.shape[-1] == 104
    model = language_model()
    tfl.quantize_(model, skip=())
    refusal = r"lm_head: holds packed words, which cannot be resized: .*torch_fused_lora\.dequantize_\(model\)"
    for arguments in ({"new_num_tokens": 104}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ValueError, match=refusal):
            model.resize_token_embeddings(**arguments)
        assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 96
    model.resize_token_embeddings(96, mean_resizing=False)  # as many as there are
    tfl.dequantize_(model)
    model.resize_token_embeddings(104)
    assert model(**batch()).logits.shape[-1] == 104


# ------------------------------------------------------------------------------------------ Trainer, generate, memory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    def run(patched):
        model = with_lora(quantized())
        report = tfl.patch_peft(model) if patched else None
        row = {name: value[0] for name, value in batch(1).items()}
        arguments = TrainingArguments(
            tmp_path / str(patched),
            max_steps=4,
            per_device_train_batch_size=2,
            logging_steps=1,
            gradient_checkpointing=checkpointing,
            report_to=[],
            save_steps=2,
            use_cpu=True,
            learning_rate=1e-3,
        )
        trainer = Trainer(model, arguments, train_dataset=[row] * 8)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.train(resume_from_checkpoint=str(tmp_path / str(patched) / "checkpoint-2"))
        return losses, report

    losses, report = run(True)
    assert losses == pytest.approx(run(False)[0], rel=1e-4)
    assert losses[-1] < losses[0]
    assert all(calls.fused >= 4 and calls.declined == 0 for calls in report.calls().values())


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_generate_two_hundred_tokens(kind):
    stock = with_lora(quantized(kind)).eval()
    model = copy.deepcopy(stock)
    report = tfl.patch_peft(model)
    ids = batch(1, 5)["input_ids"]
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    found, expected = (each.generate(input_ids=ids, **options) for each in (model, stock))
    assert found.shape == (1, 205)
    assert torch.equal(found, expected)
    assert {(calls.fused, calls.declined) for calls in report.calls().values()} == {(200, 0)}


def peak_bytes(step):
    """The most that a step allocates beyond what was there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_memory_of_a_training_step():
    """Beyond the weights nothing grows but by what one block of one weight is dequantised in: 4 bytes an element, 2 of
    the half dtype, and 1 of whole numbers."""
    model = with_lora(language_model(dtype=torch.bfloat16))
    packed = copy.deepcopy(model)
    report = tfl.quantize_(packed)
    layers = layers_of(packed)
    largest = max(layer.in_features * layer.out_features for layer in layers.values())
    weights = sum(t.nbytes for layer in layers.values() for t in layer.packed[:3])
    assert weights == sum(layer.in_features * layer.out_features for layer in layers.values()) * 2 * 4.5 / 16
    assert report.bytes_before - report.bytes_after == weights * (16 / 4.5 - 1)
    peaks = []
    for each in (model, packed):
        tfl.patch_peft(each)
        each(**batch(4, 64)).loss.backward()
        each.zero_grad()
        peaks.append(peak_bytes(lambda each=each: each(**batch(4, 64)).loss.backward()))
    assert peaks[0] > 50 * largest
    assert peaks[1] <= peaks[0] + 7 * largest


# --------------------------------------------------------------------------------- what is beside the usual of a layer


def test_what_peft_trains_in_a_module_s_place_stays():
    model = get_peft_model(language_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tfl.quantize_(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_dora_s_base_is_not_quantised():
    model = with_lora(language_model(), use_dora=True)
    with pytest.raises(ValueError, match="q_proj: DoRA reads its base's weight"):
        tfl.quantize_(model)
    assert not layers_of(model)


def test_a_replica_of_data_parallel():
    layer = tfl.QuantLinear.from_linear(linear(dtype=torch.float32))
    replica = layer._replicate_for_data_parallel()
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        setattr(replica, name, tensor.detach().clone())
    x = torch.randn(3, 128)
    assert torch.equal(replica(x), layer(x))


def test_type_is_refused():
    layer = tfl.QuantLinear.from_linear(linear())
    words = layer.weight.detach().clone()
    with pytest.raises(TypeError, match=r"expected to\(dtype\), got type\(dtype\)"):
        layer.type(torch.float16)
    assert torch.equal(layer.weight.view(torch.int32), words.view(torch.int32))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[3e38, -3e38] * 32]), "a range that float32 has"),
        (torch.tensor([[1e300] + [0.0] * 63], dtype=torch.float64), "a range that float32 has"),
        (torch.zeros(0, 64), "elements"),
        (torch.zeros(1, 64).to(torch.float8_e4m3fn), "float16, bfloat16, float32 or float64"),
    ],
)
def test_weights_that_the_format_does_not_have(weight, message):
    model = nn.Sequential(linear(), linear(64, 1))
    model[1].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=rf"1\.weight: expected {message}"):
        tfl.quantize_(model)
    assert type(model[0]) is nn.Linear


def test_a_pruned_weight_is_refused_by_name():
    model = nn.Sequential(linear())
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"0\.weight: expected a parameter"):
        tfl.quantize_(model)
