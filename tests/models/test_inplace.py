"""A layer's input that is changed in place after it: the error says where and what to do; copy_input=True does it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import torch_fused_lora as tfl
from torch_fused_lora.ops import dispatch


class Block(nn.Module):
    """An in-place residual around a layer."""

    def __init__(self, layer, dtype=torch.float32):
        super().__init__()
        self.inp, self.mlp = nn.Linear(16, 16, dtype=dtype), layer

    def forward(self, x):
        x = self.inp(x)
        y = self.mlp(x)
        x += y
        return x


def lora_block(dtype, dropout):
    config = LoraConfig(r=4, target_modules=["mlp"], lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(Block(nn.Linear(16, 16, dtype=dtype), dtype), config)


def gradients(model, dtype):
    torch.manual_seed(1)
    model.zero_grad()
    model(torch.randn(20, 16).to(dtype)).float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


KINDS = pytest.mark.parametrize(
    ("dtype", "dropout"), [(torch.float32, 0.0), (torch.float32, 0.5), (torch.bfloat16, 0.0)], ids=str
)


@KINDS
def test_the_error_names_the_layer_and_the_remedy(dtype, dropout):
    model = lora_block(dtype, dropout)
    tfl.patch_peft(model)
    expected = (
        r"base_model\.model\.mlp: .*the input,? was changed in place .*: patch_peft\(model, copy_input=True\)\. one of"
    )
    with pytest.raises(RuntimeError, match=expected):
        gradients(model, dtype)


@KINDS
def test_copied_inputs_give_the_gradients_of_out_of_place_code(dtype, dropout):
    torch.manual_seed(0)
    model = lora_block(dtype, dropout)
    other = copy.deepcopy(model)
    tfl.patch_peft(model, copy_input=True)
    tfl.patch_peft(other)
    other.base_model.model.forward = lambda x: (y := other.base_model.model.inp(x)) + other.base_model.model.mlp(y)
    found, expected = gradients(model, dtype), gradients(other, dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_norms():
    for copies in (False, True):
        block = Block(LlamaRMSNorm(16))
        assert tfl.patch_norms(block, copy_input=copies).patched == ["mlp"]
        if copies:
            assert gradients(block, torch.float32).keys() == {"inp.weight", "inp.bias", "mlp.weight"}
        else:
            expected = r"mlp: .*the input,? was changed in place .*: patch_norms\(model, copy_input=True\)\. one of"
            with pytest.raises(RuntimeError, match=expected):
                gradients(block, torch.float32)


def test_a_call_without_a_module_names_the_operator():
    W, A, B = torch.randn(16, 16), torch.randn(4, 16).requires_grad_(), torch.randn(16, 4)
    for name, call in (
        ("lora_linear", lambda x: tfl.lora_linear(x, W, None, A, B)),
        ("lora_delta", lambda x: tfl.lora_delta(W[:2], x, A, B)),
        ("rms_norm", lambda x: tfl.rms_norm(x, A[0])),
    ):
        x = torch.randn(2, 16)
        y = call(x)
        x.zero_()
        with pytest.raises(RuntimeError, match=f"{name}: .*the input,? was changed in place .*: give it x.clone()"):
            y.sum().backward()


def test_other_errors_of_saved_tensors_stay_torchs():
    model = lora_block(torch.float32, 0.0)
    tfl.patch_peft(model)
    model.base_model.model.forward = model.base_model.model.mlp.forward
    y = model(torch.randn(2, 16)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"^Trying to backward through the graph a second time"):
        y.backward()


@pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack"), reason="torch 2.11 tells no saved tensors apart"
)
def test_another_saved_tensor_that_was_changed():
    model = lora_block(torch.float32, 0.0)
    tfl.patch_peft(model)
    model.base_model.model.forward = model.base_model.model.mlp.forward
    y = model(torch.randn(2, 16)).sum()
    with torch.no_grad():
        model.base_model.model.mlp.lora_B["default"].weight.zero_()
    with pytest.raises(RuntimeError, match=r"^one of the variables needed for gradient computation has been modified"):
        y.backward()


@pytest.mark.parametrize("raw", [(), (None,)])
def test_a_torch_that_cannot_tell_says_so(monkeypatch, raw):
    monkeypatch.setattr(dispatch, "raw_saved_tensors", lambda ctx: raw)
    model = lora_block(torch.float32, 0.0)
    tfl.patch_peft(model)
    with pytest.raises(
        RuntimeError, match=r"mlp: what it saved, most likely the input, was changed .* copy_input=True"
    ):
        gradients(model, torch.float32)


def test_the_layer_is_named_by_the_dispatchers_way_too():
    model, norm = lora_block(torch.float32, 0.0), Block(LlamaRMSNorm(16))
    tfl.patch_peft(model), tfl.patch_norms(norm)
    for block, name in ((model, "mlp"), (norm, "mlp")):
        with torch.profiler.profile():
            y = block(torch.randn(20, 16))
        with pytest.raises(RuntimeError, match=f"{name}: .*the input,? was changed in place"):
            y.sum().backward()


def test_nothing_is_left_on_an_unpatched_layer():
    model = lora_block(torch.float32, 0.0)
    before = set(model.base_model.model.mlp.__dict__)
    tfl.patch_peft(model, copy_input=True)
    assert model.state_dict().keys() == lora_block(torch.float32, 0.0).state_dict().keys()
    tfl.unpatch_peft(model)
    assert set(model.base_model.model.mlp.__dict__) == before
