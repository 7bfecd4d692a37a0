"""What fine-tuning a 7 to 8B model over a 4-bit base takes, modelled: bytes counted, not measured, and on no Mac.

    python examples/memory_of_training.py

The model is built without memory, one of its layers is run without memory, and what autograd keeps of it is counted.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

import torch_fused_lora as tfl
from torch_fused_lora.bench.measure import saved_bytes

GIB = 2**30
LENGTHS = (512, 1024, 2048, 4096)
# The sizes that their config.json have.
MODELS = {
    "Mistral 7B": ("mistral", 32000, 4096, 14336, 32, 32, 8, 128),
    "Llama 3.1 8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 128),
    "Qwen3 8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
}
# Of each logit, at once: itself and its gradient in bfloat16, its log-softmax and that one's gradient in float32. A
# CPU's allocator counts as many for Transformers' own loss.
LOSS_BYTES = 2 + 2 + 4 + 4


def config_of(name: str) -> PreTrainedConfig:
    family, *sizes = MODELS[name]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip((*names, "num_key_value_heads", "head_dim"), sizes, strict=True))
    return AutoConfig.for_model(family, **sizes, attn_implementation="eager")


def base_bytes(model: nn.Module, bits: int, group_size: int) -> int:
    """Matrices in ``bits`` bits with two bfloat16 a group, the rest in bfloat16."""
    total = 0
    for parameter in model.parameters():
        packed = parameter.numel() * bits // 8 + parameter.numel() // group_size * 4
        total += packed if parameter.dim() == 2 else 2 * parameter.numel()
    return total


def kept_by_a_layer(model: PeftModel, length: int) -> int:
    """Bytes that a decoder layer of ``model`` keeps for its backward, of one sequence."""
    x = torch.empty(1, length, model.config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    inner = model.get_base_model().model
    angles = inner.rotary_emb(x, torch.arange(length, device="meta")[None])
    mask = torch.empty(1, 1, length, length, dtype=torch.bfloat16, device="meta")
    return saved_bytes(lambda: inner.layers[0](x, attention_mask=mask, position_embeddings=angles))


def adapted(name: str, rank: int, dropout: float = 0.0) -> tuple[PeftModel, int]:
    """Stock PEFT's model, without memory, and the bytes of its base in 4 bits."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    base = base_bytes(model, bits=4, group_size=64)
    config = LoraConfig(r=rank, target_modules="all-linear", lora_dropout=dropout)
    return get_peft_model(model, config, low_cpu_mem_usage=True), base


def modelled(name: str, lengths: tuple[int, ...], rank: int) -> tuple[float, float, list[float]]:
    """GiB of the base, of the adapters with their gradients and AdamW's two moments, and of a step at each length:
    batches of one sequence, gradient checkpointing, attention that keeps its probabilities. At its most, a step holds
    every layer's input and either the loss's tensors, or what one layer keeps and as much again in gradients."""
    model, base = adapted(name, rank)
    tfl.patch_peft(model)
    config = model.config
    adapters = 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = []
    for length in lengths:
        inputs = config.num_hidden_layers * length * config.hidden_size * 2
        loss = length * config.vocab_size * LOSS_BYTES
        steps.append((base + adapters + inputs + max(2 * kept_by_a_layer(model, length), loss)) / GIB)
    return base / GIB, adapters / GIB, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"modelled, GiB: 4 bits in groups of 64, rank {args.rank} on every linear layer, batches of one sequence")
    print(f"{'':<14}{'base':>7}{'adapters':>10}" + "".join(f"{length:>7}" for length in LENGTHS) + "  tokens")
    for name in MODELS:
        base, adapters, steps = modelled(name, LENGTHS, args.rank)
        print(f"{name:<14}{base:>7.1f}{adapters:>10.2f}" + "".join(f"{step:>7.1f}" for step in steps))


if __name__ == "__main__":
    main()
