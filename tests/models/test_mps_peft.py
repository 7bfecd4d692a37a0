"""A patched PEFT model on device mps: trains as stock PEFT does on the CPU, through the Metal kernels."""

from __future__ import annotations

import copy
import sys
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import torch_fused_lora as tfl
from tests.emulator import mps_on_linux
from torch_fused_lora import peft as tfl_peft

LAYERS = 14  # q, k, v, o, gate, up and down in each of two blocks
TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))  # 24 rows: too many for lora_decode
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def patched(model: PeftModel, device: torch.device) -> PeftModel:
    """A patched copy on ``device``."""
    model = copy.deepcopy(model).to(device)
    report = tfl.patch_peft(model)
    assert (len(report.patched), report.declined) == (LAYERS, {})
    return model


def loss_of(model: nn.Module, autocast: torch.dtype | None = None) -> torch.Tensor:
    device = next(model.parameters()).device
    tokens = TOKENS.to(device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        return model(tokens, labels=tokens).loss


def train(model: nn.Module, steps: int, autocast: torch.dtype | None = None, lr: float = 0.2) -> torch.Tensor:
    """The loss before each step and after the last."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, autocast)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        losses.append(loss_of(model, autocast))
    return torch.stack(losses).cpu().double()


def assert_trains_as_stock(model: PeftModel, device: torch.device, steps: int, autocast: torch.dtype | None = None):
    """Every loss equals that of stock PEFT on the CPU, and of a float64 run, to rounding.

    What rounding does to these losses is measured where no kernel of ours takes part: the most that stock PEFT on the
    CPU departs from float64 at any step, and no less than the last bit of a loss, which is float32 in all runs.
    Another order of summation draws another sample of the same error: ours may be three times as far.
    """
    exact = train(copy.deepcopy(model).double(), steps)
    stock = train(copy.deepcopy(model), steps, autocast)
    ours = train(patched(model, device), steps, autocast)
    rounding = max(float((stock - exact).abs().max()), float(exact.max()) * torch.finfo(torch.float32).eps)
    assert exact[0] - exact[-1] > 100 * rounding  # the model learns more than rounding could feign
    torch.testing.assert_close(ours, exact, rtol=0, atol=3 * rounding)
    torch.testing.assert_close(ours, stock, rtol=0, atol=4 * rounding)


def test_losses_of_twenty_steps(mps):
    assert_trains_as_stock(get_peft_model(llama(), CONFIG), mps, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_under_autocast(dtype, mps):
    assert_trains_as_stock(get_peft_model(llama(), CONFIG), mps, 4, dtype)


def test_losses_with_two_active_adapters(mps):
    model = get_peft_model(llama(), CONFIG)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=3, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_trains_as_stock(model, mps, 4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_redraws_the_same_dropout(use_reentrant, mps):
    """Gradients have the same bits whether activations are kept or computed again."""
    config = LoraConfig(r=4, lora_dropout=0.25, target_modules="all-linear", init_lora_weights=False)
    model = patched(get_peft_model(llama(), config), mps)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        loss_of(model).backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    assert len(grads[0]) == 2 * LAYERS
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_saved_on_mps_loaded_on_cpu(mps, tmp_path):
    """The adapter arrives bit for bit, and stock PEFT on the CPU computes the same loss to the last bits."""
    model = patched(get_peft_model(llama(), CONFIG), mps)
    losses = train(model, 2)
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(llama(), tmp_path)
    saved = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)  # it is trained
    torch.testing.assert_close(get_peft_model_state_dict(restored), saved, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(restored).double(), losses[-1], rtol=4 * 2.0**-23, atol=0)


# --- What ran


def dispatches() -> Counter[str]:
    """Kernels run so far, by family."""
    torch.mps.synchronize()
    families: Counter[str] = Counter()
    for name, count in mps_on_linux.counters().dispatches.items():
        families["_".join(name.split("_")[:2])] += count
    return families


counted = pytest.mark.skipif(sys.platform != "linux", reason="only the emulator counts dispatches")


@counted
def test_every_patched_layer_runs_lora_delta_alone(mps):
    model = patched(get_peft_model(llama(), CONFIG), mps)
    ran: dict[str, Counter[str]] = {}

    def entered(name: str) -> None:
        ran[name] = dispatches()

    def left(name: str) -> None:
        ran[name] = dispatches() - ran[name]

    for name, layer in model.named_modules():
        if type(layer) is tfl_peft.Linear:
            layer.register_forward_pre_hook(lambda *_, name=name: entered(name))
            layer.register_forward_hook(lambda *_, name=name: left(name))
    loss = loss_of(model)
    assert list(ran.values()) == [Counter(lora_delta=2)] * LAYERS

    before = dispatches()
    loss.backward()
    assert dispatches() - before == Counter(lora_delta=2 * LAYERS, lora_grad=LAYERS)

    with torch.no_grad():
        model(TOKENS[:1, :4].to(mps))
    assert list(ran.values()) == [Counter(lora_decode=1)] * LAYERS


@counted
def test_a_chain_of_24_patched_layers_is_encoded_without_waiting(mps):
    model = get_peft_model(nn.Sequential(*(nn.Linear(16, 16) for _ in range(24))), LoraConfig(target_modules=r"\d+"))
    model.to(mps)
    assert len(tfl.patch_peft(model).patched) == 24
    x = torch.randn(12, 16, device=mps)
    model(x)  # compiles
    torch.mps.synchronize()
    mps_on_linux.reset_counters()
    y = model(x)
    seen = mps_on_linux.counters()
    assert (sum(seen.dispatches.values()), seen.synchronisations, seen.commits) == (48, 0, 0)
    y.sum().backward()
    assert mps_on_linux.counters().synchronisations == 0


@counted
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_peak_memory_of_a_training_step_is_at_most_stock_s(dropout, mps):
    """Of 8 layers and 512 rows, whose activations are most of it. Buffers count until the device has used them."""
    config = LoraConfig(r=8, lora_dropout=dropout, target_modules=r"\d+")
    model = get_peft_model(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), config).to(mps)
    x, peaks = torch.randn(512, 64, device=mps), []
    for _ in range(2):
        for _ in range(2):  # the first step compiles
            torch.mps.synchronize()
            mps_on_linux.reset_counters()
            before = mps_on_linux.counters().live_bytes
            model(x).square().mean().backward()
            torch.mps.synchronize()
            peak = mps_on_linux.counters().peak_bytes - before
            model.zero_grad()
        peaks.append(peak)
        tfl.patch_peft(model)
    stock, ours = peaks
    assert ours <= stock


@counted
def test_norms_and_layers_patched_together(mps):
    """patch_peft and patch_norms on one model: the losses of stock PEFT on the CPU, and every norm a Metal kernel."""
    model = get_peft_model(llama(), CONFIG)
    fused = patched(model, mps)
    assert len(tfl.patch_norms(fused).patched) == 5  # two in each block and the last
    loss_of(fused).backward()
    mps_on_linux.reset_counters()
    loss_of(fused).backward()
    seen = mps_on_linux.counters().dispatches
    assert (
        sum(count for name, count in seen.items() if name.startswith("rms_norm_")) == 5 + 4
    )  # the first one's x needs no gradient
    fused.zero_grad()
    torch.testing.assert_close(train(fused, 5), train(model, 5), rtol=1e-5, atol=0)
