"""What a base's weight is held in, where it is not a plain one: another module in a linear layer's place."""

from __future__ import annotations

from torch import nn

from ..quantized import QuantLinear


class Called(nn.Linear):
    """Computes what `nn.Linear` does; but its class is not that, so that patched layers call it."""


def called(linear: nn.Linear) -> nn.Linear:
    base = Called(linear.in_features, linear.out_features, device="meta")
    base.weight, base.bias = linear.weight, linear.bias
    return base


def nf4(linear: nn.Linear) -> nn.Linear:
    """bitsandbytes', with its statistics nested, as QLoRA has it."""
    import bitsandbytes as bnb

    dtype = linear.weight.dtype
    base = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=dtype, device="meta")
    base.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    base.bias = linear.bias
    return base.to(linear.weight.device)  # which quantises


FORMATS = {"4bit": QuantLinear.from_linear, "nf4": nf4, "called": called}


def held(model: nn.Module, format: str) -> nn.Module:
    """The model with every linear layer but its head in a format, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, FORMATS[format](module))
    return model
