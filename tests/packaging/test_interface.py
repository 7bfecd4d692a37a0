"""What other code is written against stays as it was released: public names, the operators' schemas and the keys of
state_dict."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import torch_fused_lora as tfl

NAMES = [
    "LoRALinear",
    "QuantEmbedding",
    "QuantLinear",
    "dequantize_",
    "keep_operators",
    "load_mlx",
    "load_mlx_adapters",
    "lora_delta",
    "lora_linear",
    "lora_linear_quantized",
    "patch_norms",
    "patch_peft",
    "quantize_",
    "quantized_linear",
    "rms_norm",
    "save_mlx_adapters",
    "softmax",
    "unpatch_norms",
    "unpatch_peft",
]
SCHEMAS = {
    "lora_delta": "(Tensor y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, float dropout_p=0., "
    "Tensor? seed=None) -> Tensor",
    "lora_delta_backward": "(Tensor grad, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? h, "
    "Tensor? seed, float[] dropout_p, SymInt[] ranks, bool[] needs) -> Tensor[]",
    "lora_linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "float dropout_p=0., Tensor? seed=None) -> Tensor",
    "lora_linear_backward": "(Tensor grad, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "Tensor? h, Tensor? seed, float[] dropout_p, SymInt[] ranks, bool[] needs) -> Tensor[]",
    "lora_linear_quantized_forward": "(Tensor x, Tensor weight, Tensor scales, Tensor biases, Tensor? bias, "
    "Tensor? lora_A, Tensor? lora_B, Tensor scaling, Tensor? seed, float[] dropout_p, SymInt[] ranks, int bits, "
    "int group_size, bool save_h) -> (Tensor, Tensor)",
    "lora_linear_quantized_backward": "(Tensor grad, Tensor? x, Tensor weight, Tensor scales, Tensor biases, "
    "Tensor? lora_A, Tensor? lora_B, Tensor scaling, Tensor? h, Tensor? seed, float[] dropout_p, SymInt[] ranks, "
    "int bits, int group_size, bool[] needs) -> Tensor[]",
    "rms_norm": "(Tensor x, Tensor? weight, float eps=9.9999999999999995e-07) -> Tensor",
    "rms_norm_backward": "(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, bool[2] needs) -> Tensor[]",
    "softmax": "(Tensor x, int dim=-1) -> Tensor",
    "softmax_backward": "(Tensor grad, Tensor y, int dim) -> Tensor",
    "dropout_mask": "(Tensor seed, int stream, SymInt rows, SymInt columns, float p, Device device) -> Tensor",
}


def test_public_names():
    assert set(NAMES) <= set(tfl.__all__)
    assert all(getattr(tfl, name).__doc__ for name in tfl.__all__)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    operator = getattr(torch.ops.torch_fused_lora, name).default
    assert str(operator._schema) == f"torch_fused_lora::{name}{SCHEMAS[name]}"


def test_a_layers_keys():
    layer = tfl.LoRALinear(4, 3, r=2)
    keys = ["weight", "bias", "lora_A", "lora_B"]
    assert list(layer.state_dict()) == keys
    layer.merge()
    assert list(layer.state_dict()) == keys
    assert list(tfl.LoRALinear(4, 3, r=2, bias=False).state_dict()) == ["weight", "lora_A", "lora_B"]


def test_a_quantised_layers_keys():
    assert list(tfl.QuantLinear(64, 3).state_dict()) == ["weight", "bias", "scales", "biases"]


def test_a_patched_models_keys():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3), nn.RMSNorm(3)), LoraConfig(r=2, target_modules=["0"]))
    keys = [
        "base_model.model.0.base_layer.weight",
        "base_model.model.0.base_layer.bias",
        "base_model.model.0.lora_A.default.weight",
        "base_model.model.0.lora_B.default.weight",
        "base_model.model.1.weight",
    ]
    tfl.patch_peft(model), tfl.patch_norms(model)
    assert list(model.state_dict()) == keys
