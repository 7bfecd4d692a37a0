"""patch_peft over bases that somebody else computes: quantisers, subclasses, hooks, offloading, sharding.

Each test compares with stock PEFT over the same base. What a library's own base does may be anything; it is the same in
both, so a bound needs only what stands around it: the low-rank term, its roundings and the sum.
"""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import re

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torch_fused_lora as tfl
from tests.emulator import mps_on_linux
from tests.models import two_processes
from tests.models.test_mps_peft import train
from tests.operators.test_quantized_mps import Fused
from tests.reference import HALF, SMALLEST, UNIT, nf4_table
from torch_fused_lora import linear4bit
from torch_fused_lora.affine import Packed

K, N, R, ROWS = 128, 64, 4, 512


# ------------------------------------------------------------------------------------------------------------ libraries


def linear(dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(K, N, dtype=dtype)


def bitsandbytes_4bit(dtype):
    bnb = importlib.import_module("bitsandbytes")
    base = bnb.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4")
    base.load_state_dict(linear(torch.float32).state_dict())
    return base.to("cpu")


def bitsandbytes_8bit(dtype):
    bnb = importlib.import_module("bitsandbytes")
    base = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    base.load_state_dict(linear(torch.float32).state_dict())
    return base.to("cpu")


def torchao(config):
    def build(dtype):
        quantization = importlib.import_module("torchao.quantization")
        model = nn.Sequential(linear(dtype))
        quantization.quantize_(model, getattr(quantization, config)())
        return model[0]

    return build


def quanto(weights):
    def build(dtype):
        library = importlib.import_module("optimum.quanto")
        model = nn.Sequential(linear(dtype))
        library.quantize(model, weights=getattr(library, weights))
        library.freeze(model)
        return model[0]

    return build


def hqq(dtype):
    library = importlib.import_module("hqq.core.quantize")
    options = library.BaseQuantizeConfig(nbits=4, group_size=64)
    return library.HQQLinear(linear(torch.float32), options, compute_dtype=dtype, device="cpu")


def gguf(dtype):
    library = importlib.import_module("gguf")
    utils = importlib.import_module("diffusers.quantizers.gguf.utils")
    kind = library.GGMLQuantizationType.Q8_0
    words = torch.from_numpy(library.quants.quantize(torch.randn(N, K).numpy(), kind))
    base = utils.GGUFLinear(K, N, bias=False, compute_dtype=dtype)
    base.weight = utils.GGUFParameter(words, quant_type=kind)
    return base


def gptqmodel(module, name):
    def build(dtype):
        kind = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
        options = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "bias": True, "register_buffers": True}
        base = kind(in_features=K, out_features=N, **options)
        for words in (base.qweight, base.qzeros):
            words.random_(-(2**31), 2**31 - 1)
        base.scales.uniform_(0, 0.01)
        base.post_init()
        return base

    return build


# By test: the module it needs, how a base is made, and the class that PEFT puts over it.
LIBRARIES = {
    "bitsandbytes-nf4": ("bitsandbytes", bitsandbytes_4bit, "bnb.Linear4bit"),
    "bitsandbytes-int8": ("bitsandbytes", bitsandbytes_8bit, "bnb.Linear8bitLt"),
    "torchao-int8": ("torchao", torchao("Int8WeightOnlyConfig"), "torchao.TorchaoLoraLinear"),
    "torchao-int8-dynamic": (
        "torchao",
        torchao("Int8DynamicActivationInt8WeightConfig"),
        "torchao.TorchaoLoraLinear",
    ),
    "torchao-float8": ("torchao", torchao("Float8WeightOnlyConfig"), "torchao.TorchaoLoraLinear"),
    "quanto-int8": ("optimum.quanto", quanto("qint8"), "layer.Linear"),
    "quanto-int4": ("optimum.quanto", quanto("qint4"), "layer.Linear"),
    "hqq-int4": ("hqq", hqq, "hqq.HqqLoraLinear"),
    "gguf-q8_0": ("gguf", gguf, "layer.Linear"),
    "gptqmodel-gptq": ("gptqmodel", gptqmodel("torch", "TorchLinear"), "gptq.GPTQLoraLinear"),
    "gptqmodel-awq": ("gptqmodel", gptqmodel("torch_awq", "AwqTorchLinear"), "awq.AwqLoraLinear"),
    "nn.Linear": (None, linear, "layer.Linear"),
}


def library_model(name, dtype, **options):
    """A plain layer, and the library's with LoRA on it."""
    module, build, over = LIBRARIES[name]
    if module:
        top = module.split(".")[0]
        if not importlib.util.find_spec(top) or not importlib.util.find_spec(module):
            pytest.skip(f"{module} is not installed")
    model = nn.Sequential(nn.Linear(K, K, dtype=dtype), build(dtype))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = name == "bitsandbytes-nf4", name == "bitsandbytes-int8"
    model = lora(model, "1", **options)
    kind = type(layer_of(model))
    assert f"{kind.__module__}.{kind.__qualname__}".endswith(over)
    return model


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_librarys_base_gives_stocks_numbers(name, dtype):
    model = library_model(name, dtype)
    x, grad = torch.randn(ROWS, K).to(dtype), torch.randn(ROWS, N).to(dtype)
    stock = step(layer_of(model), x, grad)
    report = tfl.patch_peft(model)
    patched = step(layer_of(model), x, grad)
    assert_all_fused(report, 1)
    for what, bound in bounds(layer_of(model), x, grad, stock).items():
        error = (patched[what].double() - stock[what].double()).abs()
        assert patched[what].dtype == stock[what].dtype
        assert (error <= bound).all(), f"{what}: worst error / bound {(error / bound).max():.3g}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_librarys_base_with_dropout(name):
    """The masks differ from stock's; so it is the same on average, and twice the same for a seed."""
    model = library_model(name, torch.bfloat16, lora_dropout=0.5).train()
    layer, x = layer_of(model), torch.randn(4, K).bfloat16().expand(ROWS, 4, K)
    report = tfl.patch_peft(model)
    delta = layer(x).float() - layer.base_layer(x).float()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first.float() - layer.base_layer(x).float(), delta)
    assert_all_fused(report, 3)
    kept = layer.eval()(x[0]).float() - layer.base_layer(x[0]).float()
    deviation = delta.std(0) / ROWS**0.5
    assert ((delta.mean(0) - kept).abs() <= 6 * deviation + UNIT[torch.bfloat16] * layer(x[0]).float().abs()).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIBRARIES)
def test_two_adapters_with_biases_under_autocast(name):
    """Whether a library's class rounds then, and to which dtype, is its own affair: the patched layer's is the same."""
    takes_bias = not name.startswith(("torchao", "hqq"))
    model = library_model(name, torch.bfloat16, lora_bias=takes_bias)
    model.add_adapter("second", LoraConfig(r=6, target_modules=["1"], init_lora_weights=False, lora_bias=takes_bias))
    model.base_model.set_adapter(["default", "second"])
    layer, x = layer_of(model), torch.randn(ROWS, K).bfloat16()
    for part in (*layer.lora_B.values(), *([layer.base_layer] if name == "nn.Linear" else [])):
        if part.bias is not None:
            part.bias.data.normal_()
    stock = {}
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stock[autocast] = step(layer, x)
    report = tfl.patch_peft(model)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert_same_step(step(layer, x), stock[autocast], torch.bfloat16)
    assert_all_fused(report, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", LIBRARIES)
def test_half_of_stocks_bytes_are_kept_for_backward(name, dropout):
    model = library_model(name, torch.bfloat16, lora_dropout=dropout).train()
    layer, x = layer_of(model), torch.randn(ROWS, K).bfloat16().requires_grad_()
    own = kept(layer.base_layer, x)
    stock = kept(layer, x) - own
    tfl.patch_peft(model)
    assert kept(layer, x) - own <= stock / 2


def loaded(folder, **options):
    """A Llama, quantised as it is loaded, and prepared for training with checkpoints as PEFT's documents say."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)
    config = LoraConfig(r=R, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(prepare_model_for_kbit_training(quantised), config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "int8", "torchao int8"])
def test_a_model_quantised_as_it_is_loaded(name, tmp_path):
    pytest.importorskip("torchao" if "torchao" in name else "bitsandbytes")
    if name == "torchao int8":
        quantization = transformers.TorchAoConfig(
            importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
        )
    elif name == "int8":
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        nested = name == "nf4 nested"
        quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested, **options)
    model = loaded(tmp_path, quantization_config=quantization, dtype=torch.bfloat16).train()
    batch = dict.fromkeys(("input_ids", "labels"), torch.randint(256, (2, 32)))

    def train():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock = train()
    report = tfl.patch_peft(model)
    patched = train()
    assert_all_fused(report, 2 * 2 * 7)  # each layer's seven, in forward and again for backward
    assert_same_step(patched, stock, torch.bfloat16)


# ---------------------------------------------------------------------- bitsandbytes' bytes, read by the kernels of mps


def on_mps(kind, dtype, compute_dtype=None, K=K, **options):
    """A Linear4bit, quantised on the CPU, with LoRA on it, on mps."""
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(
        K,
        N,
        compute_dtype=compute_dtype or dtype,
        quant_type=kind.split()[0],
        compress_statistics="nested" in kind,
    )
    base.weight.blocksize = options.pop("blocksize", 64)
    base.load_state_dict(nn.Linear(K, N).state_dict())
    base = base.to("cpu")
    base.bias.data = base.bias.data.to(compute_dtype or dtype)
    model = nn.Sequential(nn.Linear(K, K, dtype=dtype), base)
    model.is_loaded_in_4bit = True
    model = lora(model, "1", **options).to("mps")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def exact_of(layer, x):
    """The layer over its bytes, in float64, as the kernels round it."""
    weight = layer.base_layer.weight
    state, words = weight.quant_state, weight.data.cpu().view(torch.uint8).view(N, -1)
    scales = state.absmax.cpu().float()
    if state.nested:
        codes, blocks = state.state2.code.cpu(), state.state2.absmax.cpu().repeat_interleave(state.state2.blocksize)
        scales = codes[state.absmax.cpu().long()] * blocks[: len(scales)] + state.offset.cpu()
    table = nf4_table() if state.quant_type == "nf4" else state.code.cpu()
    torch.testing.assert_close(table, state.code.cpu())
    packed = Packed(words, scales.view(N, -1), state.code.cpu(), 4, state.blocksize)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Fused.over(x, packed, layer.base_layer.bias, A, B, layer.scaling["default"])


def dispatched(*words):
    """Of the kernels that have run, how many are called so."""
    return sum(n for name, n in mps_on_linux.counters().dispatches.items() if all(word in name for word in words))


@pytest.mark.usefixtures("mps")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "dtype", "rows"),
    [
        ("nf4", torch.float16, 1),
        ("nf4 nested", torch.bfloat16, 5),
        ("fp4", torch.float32, 8),
        ("nf4", torch.float32, 20),
        ("nf4 nested", torch.float16, 40),
        ("fp4 nested", torch.bfloat16, 20),
    ],
)
def test_bytes_are_read_on_mps(kind, dtype, rows):
    model = on_mps(kind, dtype)
    layer, x = layer_of(model), torch.randn(rows, K).to(dtype)
    report = tfl.patch_peft(model)
    assert "Linear4bit, which is read" in str(report)
    leaf = x.to("mps").requires_grad_()
    mps_on_linux.reset_counters()
    y = layer(leaf)
    exact, grad = exact_of(layer, x), torch.randn(rows, N).to(dtype)
    exact.output().check(y.detach())
    y.backward(grad.to("mps"))
    assert dispatched("lora_decode" if rows <= 8 else "lora_gemm", "table4") >= 1
    assert dispatched("lora_gemm", "table4", "backward") == 1
    found = {
        "x": leaf.grad,
        "lora_A": layer.lora_A["default"].weight.grad,
        "lora_B": layer.lora_B["default"].weight.grad,
    }
    for name, of in exact.gradients(grad).items():
        if name in found:
            of.check(found[name], name)
    assert_all_fused(report, 1)
    assert tfl.check_peft(model, torch.randn(rows, K, dtype=dtype, device="mps")).ok


@pytest.mark.usefixtures("mps")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "autocast"),
    [
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.bfloat16, True),
        (torch.float16, torch.float32, False),
    ],
)
def test_a_base_that_computes_in_another_dtype(dtype, compute_dtype, autocast, dropout):
    """x goes to its dtype and what comes out to x's, as in its own forward; then the low-rank term is added."""
    model = on_mps("nf4", dtype, compute_dtype, lora_dropout=dropout)
    layer, x = layer_of(model), torch.randn(12, K, dtype=dtype, device="mps")
    with torch.autocast("mps", torch.bfloat16, enabled=autocast):
        stock = layer(x).dtype
        report = tfl.patch_peft(model)
        mps_on_linux.reset_counters()
        assert layer(x).dtype == stock
        assert dispatched("lora_gemm", "table4") == 1
        assert dispatched("lora_delta") == 2
        assert tfl.check_peft(model, x).ok
    assert_all_fused(report, 2)  # the check's, too


@pytest.mark.usefixtures("mps")
@pytest.mark.filterwarnings("ignore")
def test_autocast_to_the_dtype_that_x_has_already():
    model = on_mps("nf4", torch.bfloat16)
    layer, x = layer_of(model), torch.randn(3, K, dtype=torch.bfloat16, device="mps")
    tfl.patch_peft(model)
    mps_on_linux.reset_counters()
    with torch.autocast("mps", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert dispatched("") == dispatched("lora_decode", "table4") == 1
        assert tfl.check_peft(model, x).ok


def first_call_sets_dtype(base):
    base.compute_dtype, base.compute_type_is_set = None, False


def bias_in_another_dtype(base):
    base.bias.data = base.bias.data.half()


def another_forward_of_the_class(base):
    type(base).forward = lambda self, x: -nn.functional.linear(x, x.new_ones(N, x.shape[1]))


CALLED = {  # what is done to the base, what its row and blocks are, and the reason
    "rows that end within blocks": (lambda base: None, {"K": 96}, "a row of 96 elements is no whole number of blocks"),
    "long blocks": (lambda base: None, {"K": 256, "blocksize": 256}, "is no whole number of blocks.*: 256"),
    "dtype to come": (first_call_sets_dtype, {}, "its first call sets its compute_dtype"),
    "bias to be cast": (bias_in_another_dtype, {}, "its next call casts its bias to torch.float32"),
    "hook": (lambda base: with_hook(base), {}, "hooks or a replaced forward"),
    "class": (another_forward_of_the_class, {}, "its forward is replaced for the whole process"),
}


@pytest.mark.usefixtures("mps")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CALLED)
def test_what_is_not_read_is_called(case, monkeypatch):
    change, sizes, reason = CALLED[case]
    model = on_mps("nf4", torch.float32, **sizes)
    layer, x = layer_of(model), torch.randn(3, sizes.get("K", K), device="mps")
    kind = type(layer.base_layer)
    monkeypatch.setattr(kind, "forward", kind.forward)
    report = tfl.patch_peft(model)
    change(layer.base_layer)
    mps_on_linux.reset_counters()
    y = layer(x)
    assert dispatched("table4") == 0
    assert_all_fused(report, 1)
    (calls,) = report.calls().values()
    assert re.search(reason, calls.base)
    assert re.search(f"1 calls fused over a called base: .*{reason}", str(report))
    layer.base_layer.compute_type_is_set = True
    tfl.unpatch_peft(model)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("mps")
@pytest.mark.filterwarnings("ignore")
def test_bytes_that_change_are_read_anew_and_not_kept():
    model = on_mps("nf4 nested", torch.float32)
    layer, x = layer_of(model), torch.randn(3, K)
    tfl.patch_peft(model)
    before = layer(x.to("mps"))
    layer.merge(), layer.unmerge()  # which packs the weight again
    with torch.inference_mode():
        exact_of(layer, x).output().check(layer(x.to("mps")))
    layer(x.to("mps").requires_grad_()).sum().backward()
    twin = copy.deepcopy(model)
    layer.base_layer.weight.data.zero_()
    exact_of(layer, x).output().check(layer(x.to("mps")).detach())
    exact_of(layer_of(twin), x).output().check(layer_of(twin)(x.to("mps")).detach())
    assert not torch.equal(layer(x.to("mps")), before)
    model.to("cpu")
    gc.collect()
    assert len(linear4bit._known) == 1
    del twin
    gc.collect()
    assert len(linear4bit._known) == 0


@pytest.mark.usefixtures("mps")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
def test_a_whole_model_trains_as_over_the_weights_in_float64(nested, tmp_path):
    """Losses of six steps; tolerance: what stock PEFT on the CPU rounds, three times, as in test_mps_peft.py."""
    functional = pytest.importorskip("bitsandbytes.functional")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested, **options)
    model = loaded(tmp_path, quantization_config=quantization, dtype=torch.float32).train()
    ours, stock, exact = copy.deepcopy(model).to("mps"), copy.deepcopy(model), model
    for layer in exact.modules():
        if hasattr(layer, "base_layer"):
            weight = layer.base_layer.weight
            layer.base_layer = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
            layer.base_layer.weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    report = tfl.patch_peft(ours)
    assert (len(report.patched), report.declined) == (2 * 7, {})
    mps_on_linux.reset_counters()
    expected, stocks, found = (train(each, 6, lr=0.02) for each in (exact.double(), stock, ours))
    rounding = max(float((stocks - expected).abs().max()), float(expected.max()) * torch.finfo(torch.float32).eps)
    assert expected[0] - expected[-1] > 100 * rounding
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * rounding)
    assert_all_fused(report, 13 * 2 * 7)  # each layer's seven: a step's twice, with checkpoints
    assert dispatched("lora_gemm", "table4") == 19 * 2 * 7  # and once more for dx


# ----------------------------------------------------------------------------------------------------- any other module


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(base):
    base.register_forward_hook(lambda _module, _args, y: y.tanh())


def with_pre_hook(base):
    base.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))


def with_backward_hook(base):
    base.register_full_backward_hook(lambda _module, grads, _: tuple(3 * grad for grad in grads))


def with_another_forward(base):
    forward = base.forward
    base.forward = lambda x: forward(x).relu()


def parametrised(parametrization):
    def act(base):
        parametrization(base)
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    return act


CHANGES = {
    "subclass": lambda base: setattr(base, "__class__", Doubled),
    "hook": with_hook,
    "pre-hook": with_pre_hook,
    "backward hook": with_backward_hook,
    "another forward": with_another_forward,
    "weight_norm": parametrised(parametrizations.weight_norm),
    "orthogonal": parametrised(parametrizations.orthogonal),
    "spectral_norm": parametrised(parametrizations.spectral_norm),
}


NO_BFLOAT16 = ("orthogonal", "spectral_norm")  # of torch's own


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("change", "dtype"),
    [(change, torch.float32) for change in CHANGES]
    + [(change, torch.bfloat16) for change in CHANGES if change not in NO_BFLOAT16],
)
def test_a_base_of_any_kind_gives_stocks_numbers(change, when, dtype):
    model = lora(nn.Sequential(nn.Identity(), linear(dtype)), "1").eval()
    layer, x, grad = layer_of(model), torch.randn(ROWS, K).to(dtype), torch.randn(ROWS, N).to(dtype)
    if when == "after":
        tfl.patch_peft(model)
    CHANGES[change](layer.base_layer)
    report = tfl.patch_peft(model)
    patched = step(layer, x, grad)
    assert_all_fused(report, 1)
    tfl.unpatch_peft(model)
    stock = step(layer, x, grad)
    for what, bound in bounds(layer, x, grad, stock).items():
        error = (patched[what].double() - stock[what].double()).abs()
        assert (error <= bound).all(), f"{what}: worst error / bound {(error / bound).max():.3g}"


@pytest.mark.parametrize("training", [False, True])
def test_an_activation_recorder_sees_stocks_values(training):
    """A hook may keep what the base returned: it is neither changed afterwards nor the layer's output."""
    model, seen = lora(nn.Sequential(nn.Identity(), linear(torch.float32)), "1"), []
    layer, x = layer_of(model), torch.randn(ROWS, K)
    layer.base_layer.register_forward_hook(lambda _module, _args, y: seen.append(y))
    with torch.set_grad_enabled(training):
        expected = layer.base_layer(x)
        report = tfl.patch_peft(model)
        y = layer(x)
    assert_all_fused(report, 1)
    assert torch.equal(seen[1], expected)
    assert not torch.equal(seen[1], y)


@pytest.mark.parametrize("returned", ["x", "weight", "view", "kept"])
def test_what_a_base_returns_is_left_as_it_is(returned):
    """Whatever it is: x, a parameter, a view or something it keeps."""
    model = lora(nn.Sequential(nn.Identity(), nn.Linear(K, K)), "1")
    layer, x = layer_of(model), torch.randn(K, K)
    big = torch.randn(2 * K, K)
    results = {"x": x, "weight": layer.base_layer.weight, "view": big[:K], "kept": torch.randn(K, K)}
    layer.base_layer.forward = lambda _: results[returned]
    before = results[returned].detach().clone()
    stock = layer(x)
    report = tfl.patch_peft(model)
    with torch.no_grad():
        patched = layer(x)
    assert_all_fused(report, 1)
    assert torch.equal(results[returned], before)
    torch.testing.assert_close(patched, stock)


# ----------------------------------------------------------------------------------------------- weights that come late


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def blocks():
    torch.manual_seed(0)
    return lora(nn.Sequential(Block(), Block()), "first", "second", lora_dropout=0.1).eval()


def cpu_offload(model, _folder):
    importlib.import_module("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offload(model, folder):
    importlib.import_module("accelerate").disk_offload(model, folder, execution_device=torch.device("cpu"))


def device_map(model, folder):
    places = {"base_model.model.0": "cpu", "base_model.model.1": "disk"}
    options = {"main_device": "cpu", "offload_dir": folder, "force_hooks": True}
    importlib.import_module("accelerate").dispatch_model(model, places, **options)


def one_device(model, _folder):
    importlib.import_module("accelerate").dispatch_model(model, {"": "cpu"}, force_hooks=True)


def group_offload(kind):
    def act(model, _folder):
        hooks = pytest.importorskip("diffusers.hooks")
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        hooks.apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type=kind, **options)

    return act


def layerwise_casting(storage):
    def act(model, _folder):
        hooks = pytest.importorskip("diffusers.hooks")
        hooks.apply_layerwise_casting(model, storage, torch.float32)

    return act


def casting_and_offload(model, folder):
    layerwise_casting(torch.bfloat16)(model, folder)
    group_offload("leaf_level")(model, folder)


OFFLOADS = {
    "accelerate cpu_offload": cpu_offload,
    "accelerate disk_offload": disk_offload,
    "accelerate device map": device_map,
    "accelerate one device": one_device,
    "diffusers leaf offload": group_offload("leaf_level"),
    "diffusers block offload": group_offload("block_level"),
    "diffusers layerwise bfloat16": layerwise_casting(torch.bfloat16),
    "diffusers layerwise float8": layerwise_casting(torch.float8_e4m3fn),
    "diffusers layerwise and offload": casting_and_offload,
}


@pytest.mark.parametrize("patched_first", [False, True], ids=["hooked first", "patched first"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_weights_that_hooks_bring(offload, patched_first, tmp_path):
    x = torch.randn(ROWS, K)
    stock = blocks()
    OFFLOADS[offload](stock, str(tmp_path / "stock"))
    expected = step(stock, x)
    model = blocks()
    report = tfl.patch_peft(model) if patched_first else None
    OFFLOADS[offload](model, str(tmp_path / "patched"))
    report = report or tfl.patch_peft(model)
    found = step(model, x)
    assert_all_fused(report, 4)
    assert_same_step(found, expected, torch.float32)
    assert {name: p.device for name, p in model.named_parameters()} == {
        name: p.device for name, p in stock.named_parameters()
    }
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: p.dtype for name, p in stock.named_parameters()
    }


# -------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each case of `two_processes` came to, by its name."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo here")
    return two_processes.run(tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", two_processes.CASES, ids="-".join)
def test_two_processes(case, two):
    stock, patched, calls, reasons = two[case]
    assert_same_step(patched, stock, torch.bfloat16 if "bfloat16" in case else torch.float32)
    if "apart" not in case[0]:
        assert len(calls) == 4
        assert all((fused, declined) == (two_processes.STEPS, 0) for fused, declined, _ in calls.values()), calls
        return
    # Adapters that are sharded as groups of their own get their weights when they are called: PEFT has to.
    assert len(reasons) + len(calls) == 4
    assert all((fused, declined) == (0, two_processes.STEPS) for fused, declined, _ in calls.values()), calls
    assert all("FSDPLinear" in reason for reason in (*reasons.values(), *(reason for *_, reason in calls.values())))


# ---------------------------------------------------------------------------------------------------------------- tools


def lora(model: nn.Module, *targets: str, **options) -> nn.Module:
    config = {"r": R, "lora_alpha": 8, "target_modules": [*targets], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**config))


def layer_of(model):
    return model.base_model.model[1]


def step(model: nn.Module, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(grad if grad is not None else torch.ones_like(y))
    gradients = {
        n.removesuffix(".default.weight"): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    return {"y": y.detach(), "x": x.grad} | gradients


def bounds(layer, x: Tensor, grad: Tensor, stock: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far apart two evaluations of a layer may be whose base is the same (tests/reference.py).

    Both sums of n products are within n u of the exact one. Over a half base, PEFT's classes round the term once or
    twice more, before or after its scaling, and then the sum; the operator rounds the sum.
    """
    A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    x, grad, A, B = (t.detach().double() for t in (x, grad, A, B))
    single, unit = UNIT[torch.float32], UNIT[stock["y"].dtype]
    half = unit if stock["y"].dtype in HALF else 0.0  # of what is rounded on the way
    ha, za = x.abs() @ A.abs().T, s * grad.abs() @ B.abs()
    magnitudes = {
        "y": (s * ha @ B.abs().T, K + R),
        "x": (za @ A.abs(), N + R),
        "lora_A": (za.T @ x.abs(), ROWS + N),
        "lora_B": (s * grad.abs().T @ ha, ROWS + K),
    }
    result = {}
    for what, (magnitude, terms) in magnitudes.items():
        bound = 2 * (terms + 8) * single * magnitude + 2 * half * magnitude
        if what in ("y", "x"):  # rounded, both times, to its dtype
            bound = bound + 2 * unit * (stock[what].double().abs() + bound) + 2 * SMALLEST[stock[what].dtype]
        result[what] = bound
    return result


def assert_same_step(patched: dict[str, Tensor], stock: dict[str, Tensor], dtype: torch.dtype) -> None:
    """A net's two evaluations; tolerance: the sums of its layers, each relative to the largest element, four deep, or
    the roundings of its half activations."""
    assert patched.keys() == stock.keys()
    unit = UNIT[dtype] * (4 if dtype in HALF else ROWS + K)
    for what, expected in stock.items():
        assert patched[what].dtype == expected.dtype
        error = (patched[what] - expected).abs().max()
        assert error <= 4 * unit * expected.abs().max(), f"{what}: {error / (4 * unit * expected.abs().max()):.3g}"


def assert_all_fused(report, calls: int) -> None:
    """All calls so far are fused, and there were so many."""
    found = report.calls()
    assert found
    assert not any(record.declined for record in found.values()), [record.reason for record in found.values()]
    assert sum(record.fused for record in found.values()) == calls


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes that a call of a module keeps for backward, beside x, parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in (x, *inner(module.parameters()), *inner(module.buffers()))}
    found = {}

    def pack(t):
        for part in inner([t]):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = (storage.nbytes(), storage)  # kept, so that the address is not used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    total = sum(size for size, _ in found.values())
    del y
    return total


def inner(tensors):
    """Tensors, with those inside tensor subclasses."""
    for t in tensors:
        if hasattr(t, "__tensor_flatten__"):
            names, _ = t.__tensor_flatten__()
            yield from inner(getattr(t, name) for name in names)
        else:
            yield t
