"""Removes each private name of torch in turn and checks the operators without it:
``python -m tests.packaging.private_names``.

Prints {name: what went wrong, "" for nothing} as JSON. The package binds its names when it is imported: each has a
process of its own, forked from one in which torch is warm.
"""

from __future__ import annotations

import json
import operator
import os
import sys
import traceback

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close


def plain(x, weight, bias, lora_A, lora_B):
    return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_A), lora_B) * 0.5


def with_eps(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def check(function, reference, *operands):
    """Forward, gradients, gradients of gradients, one by one and batched, vmap, autocast and compiled."""
    leaves = [t.clone().requires_grad_() for t in operands]
    assert_close(function(*operands), reference(*operands))
    with torch.inference_mode():
        assert_close(function(*operands), reference(*operands))

    def gradients(call, compiled=False):
        y = call(*leaves)
        cotangent = torch.linspace(-1, 1, y.numel()).view_as(y)
        found = [torch.autograd.grad(y, leaves, cotangent, retain_graph=True)]
        if not compiled:
            found.append(torch.autograd.grad(y, leaves, torch.stack([cotangent, cotangent + 1]), is_grads_batched=True))
            first = torch.autograd.grad(call(*leaves), leaves, cotangent, create_graph=True)
            squares = sum(g.square().sum() for g in first)
            found.append(torch.autograd.grad(squares, leaves, materialize_grads=True))
        return found

    expected = gradients(reference)
    assert_close(gradients(function), expected)
    assert_close(gradients(torch.compile(function, backend="aot_eager"), compiled=True), expected[:1])
    rows = torch.stack([operands[0], -operands[0]])
    in_dims = (0, *[None] * (len(operands) - 1))
    assert_close(
        torch.vmap(function, in_dims)(rows, *operands[1:]), torch.vmap(reference, in_dims)(rows, *operands[1:])
    )
    assert_close(torch.func.jvp(function, operands, operands), torch.func.jvp(reference, operands, operands))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = function(*leaves), reference(*leaves)
        assert y.dtype == expected.dtype
        grads = [torch.autograd.grad(out.float().sum(), leaves) for out in (y, expected)]
    assert_close(y, expected, rtol=0.05, atol=0.05)
    assert_close(*grads, rtol=0.05, atol=0.05)


def checks():
    import torch_fused_lora as tfl

    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    lora_A, lora_B = torch.randn(2, 8), torch.randn(5, 2)
    check(lambda *operands: tfl.lora_linear(*operands, 0.5), plain, x, weight, bias, lora_A, lora_B)
    check(lambda x, w: tfl.rms_norm(x, w, 1e-6), with_eps, x, torch.randn(8))
    check(lambda x: tfl.softmax(x), lambda x: torch.softmax(x, -1), x)
    dropped = torch.compile(lambda *operands: tfl.lora_linear(*operands, 0.5, 0.5, True), backend="aot_eager")
    dropped(x, weight, bias, lora_A.clone().requires_grad_(), lora_B).sum().backward()

    linear = nn.Sequential(nn.Linear(8, 5))
    model = get_peft_model(linear, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    leaves = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).sum(), leaves)
    tfl.patch_peft(model)
    assert_close(torch.autograd.grad(model(x).sum(), leaves), expected)
    changed = x.clone()
    y = model(changed)
    changed.add_(1)
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a changed input went unnoticed")


def start(name: str) -> int:
    """Import the package without a name, in a fork of this process, and check it; returns where `finish` reads."""
    read, write = os.pipe()
    if os.fork() == 0:
        asked, failure, found = [], "", operator.attrgetter

        def attrgetter(path):
            asked.append(path)
            return found("a name that nothing has" if path == name else path)

        try:
            operator.attrgetter = attrgetter
            import torch_fused_lora.torch_private  # noqa: F401

            operator.attrgetter = found
            checks()
        except BaseException:
            failure = traceback.format_exc()
        with open(write, "w") as pipe:
            json.dump((failure, asked), pipe)
        os._exit(0)
    os.close(write)
    return read


def finish(read: int) -> tuple[str, list[str]]:
    """What went wrong, and the names asked for."""
    with open(read) as pipe:
        failure, asked = json.load(pipe)
    os.wait()
    return failure, asked


def main() -> None:
    torch.set_num_threads(1)
    check(plain, plain, *torch.ones(5, 1, 1).unbind())  # what torch does at first use, it does once for all forks
    found = {}
    found[""], names = finish(start(""))
    names = list(dict.fromkeys(names))
    for i in range(0, len(names), 2):
        reads = {name: start(name) for name in names[i : i + 2]}
        found |= {name: finish(read)[0] for name, read in reads.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
