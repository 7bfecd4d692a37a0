"""``python -m torch_fused_lora bench``: the LoRA tax of stock PEFT and of the patched model, on this machine."""
