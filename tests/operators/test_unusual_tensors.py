"""Inputs made in inference mode, and nested ones."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import torch_fused_lora as tfl

LAYOUTS = pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])


def peft_layer(dtype=torch.float32, **options):
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6, dtype=dtype)), config)
    tfl.patch_peft(model)
    return model


def lora_layer(dtype=torch.float32):
    layer = tfl.LoRALinear.from_linear(nn.Linear(8, 6, dtype=dtype), r=4)
    nn.init.normal_(layer.lora_B)
    return layer


def lora_call():
    W, A, B = torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
    return lambda x: tfl.lora_linear(x, W, None, A, B, 0.5)


def delta_call():
    W, A, B = torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
    return lambda x: tfl.lora_delta(nn.functional.linear(x, W), x, A, B, 0.5)


def norm(dtype=torch.float32):
    layer = nn.RMSNorm(8, eps=1e-6)
    tfl.patch_norms(layer)
    return layer


# ------------------------------------------------------------------------------------------- made in inference mode

TRAINED = {
    "peft": peft_layer,
    "peft, dropout": lambda dtype: peft_layer(dtype, lora_dropout=0.5),
    "LoRALinear": lora_layer,
    "norm": norm,
}


@pytest.mark.parametrize("layer", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["alone", "profiled"])
def test_an_input_made_in_inference_mode_trains(device, layer, dtype, mode):
    layer = layer(dtype).to(device)
    normal = torch.randn(5, 8, device=device, dtype=dtype)
    with torch.inference_mode():
        x = normal.clone()
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def gradients(x):
        torch.manual_seed(2)
        with torch.profiler.profile() if mode == "profiled" else torch.enable_grad():
            return torch.autograd.grad(layer(x).float().square().sum(), parameters, create_graph=True)

    first, expected = gradients(x), gradients(normal)
    torch.testing.assert_close(first, expected)
    total = lambda grads: sum(g.square().sum() for g in grads)  # noqa: E731
    second, expected = (torch.autograd.grad(total(grads), parameters) for grads in (first, expected))
    torch.testing.assert_close(second, expected)


# ---------------------------------------------------------------------------------------------------------- nested

ON_NESTED = {
    "peft": lambda: peft_layer().eval(),
    "peft, half base": lambda: peft_layer(torch.bfloat16).eval(),
    "LoRALinear": lora_layer,
    "lora_linear": lora_call,
    "lora_delta": delta_call,
    "softmax": lambda: tfl.softmax,
}


@LAYOUTS
@pytest.mark.parametrize("build", ON_NESTED.values(), ids=ON_NESTED)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_each_sequence_of_a_nested_input_is_as_alone(build, layout, grad):
    function = build()
    dtype = torch.bfloat16 if build is ON_NESTED["peft, half base"] else torch.float32
    sequences = [torch.randn(rows, 8, dtype=dtype) for rows in (3, 5)]
    with torch.set_grad_enabled(grad):
        found = function(torch.nested.nested_tensor(sequences, layout=layout)).unbind()
        for y, x in zip(found, sequences, strict=True):
            tolerance = {"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(y, function(x), **tolerance)


@pytest.mark.parametrize("build", [lambda: tfl.rms_norm, norm], ids=["rms_norm", "patched norm"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_rms_norm_of_nested_tensors(build):
    function, sequences = build(), [torch.randn(rows, 8) for rows in (3, 5)]
    found = function(torch.nested.nested_tensor(sequences, layout=torch.jagged)).unbind()
    for y, x in zip(found, sequences, strict=True):
        torch.testing.assert_close(y, function(x))
    with pytest.raises(RuntimeError, match="Nested"):  # torch's own refuses them, too
        function(torch.nested.nested_tensor(sequences, layout=torch.strided))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_gradients_through_a_jagged_input():
    model, sequences = peft_layer(), [torch.randn(rows, 8, requires_grad=True) for rows in (3, 5)]
    leaves = [*sequences, *(p for p in model.parameters() if p.requires_grad)]
    nested = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    found = torch.autograd.grad(model(nested).values().sin().sum(), leaves)
    expected = torch.autograd.grad(sum(model(x).sin().sum() for x in sequences), leaves)
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------- sparse


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_patched_layer_takes_what_stock_takes(layout, name):
    """`lora_linear` itself refuses them by name: test_errors.py."""
    model, x = peft_layer().eval(), torch.randn(3, 8).relu()
    base = model.base_model.model[0].base_layer
    if name == "x":
        x = x.to_sparse(layout=layout)
    else:
        base.weight, base.bias = nn.Parameter(base.weight.detach().to_sparse(layout=layout)), None
    with torch.no_grad():
        found = model(x)
        tfl.unpatch_peft(model)
        assert torch.equal(found, model(x))
