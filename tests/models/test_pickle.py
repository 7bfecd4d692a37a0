"""Pickles of a patched model are stock's and load without this package; copies stay patched; a spawned child patches
again."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import torch_fused_lora as tfl


def model():
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(8, 8), LlamaRMSNorm(8)), config)


def patched_model(copy_input=False):
    found = model()
    assert tfl.patch_peft(found, copy_input).patched
    assert tfl.patch_norms(found, copy_input).patched
    return found


def layers(found):
    return list(found.base_model.model)


WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["torch_fused_lora"] = None
model, x, y = torch.load(sys.argv[1], weights_only=False)
assert torch.allclose(model(x), y, rtol=0, atol=1e-5)
print(*(f"{type(layer).__module__}.{type(layer).__name__}" for layer in model.base_model.model))
"""


def test_a_pickle_loads_without_this_package(tmp_path):
    patched, x = patched_model(), torch.randn(3, 8)
    with torch.no_grad():
        torch.save((patched, x, patched(x)), tmp_path / "model.pt")
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, tmp_path / "model.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "peft.tuners.lora.layer.Linear",
        "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    ]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_loaded_is_as_what_was_never_patched(protocol):
    patched, file = patched_model(copy_input=True), io.BytesIO()
    torch.save(patched, file, pickle_protocol=protocol)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    stock = copy.deepcopy(patched)
    tfl.unpatch_peft(stock), tfl.unpatch_norms(stock)
    for ours, theirs in zip(layers(loaded), layers(stock), strict=True):
        assert type(ours) is type(theirs)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert [type(layer) for layer in layers(loaded)] == [lora.Linear, LlamaRMSNorm]
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), stock(x))
    assert tfl.patch_peft(loaded).patched
    assert tfl.patch_norms(loaded).patched
    assert torch.equal(loaded(x), patched(x))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_stay_patched(duplicate):
    for layer in layers(patched_model(copy_input=True)):
        twin, x = duplicate(layer), torch.randn(3, 8)
        assert type(twin) is type(layer)
        assert twin.__dict__.keys() == layer.__dict__.keys()
        assert torch.equal(twin(x), layer(x))


def child(patched, x, queue):
    before = [type(layer) for layer in layers(patched)]
    assert tfl.patch_peft(patched).patched
    assert tfl.patch_norms(patched).patched
    with torch.no_grad():
        queue.put((before == [lora.Linear, LlamaRMSNorm], patched(x).tolist()))


def test_a_spawned_child_patches_again():
    patched, x = patched_model(), torch.randn(3, 8)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(patched, x, queue))
    process.start()
    process.join()
    assert process.exitcode == 0
    was_stock, found = queue.get()
    assert was_stock
    assert torch.equal(torch.tensor(found), patched(x).detach())
