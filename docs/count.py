"""Counts what the pages say of bytes, and models what they say of Apple's GPUs; no clock is read.

``python -m docs.count`` writes docs/benchmarks/counted.json. Everything is made on the meta device, so it takes no
memory and comes out the same on every machine:

- ``operators``: each operator of a layer's forward in training, with the bytes of its operands and its result, each
  once. Stock PEFT's as torch dispatches them; ours on `mps` from the launches, by the formulas of
  tests/kernels/traffic.py, which tests hold to what the emulator counts.
- ``kept``: what a layer keeps for its backward. ``decoder_layers``: the same of a decoder layer of 7 to 8B models.
- ``training``: examples/memory_of_training.py.

``python -m docs.count --time-model`` writes docs/benchmarks/time_model.json, by tests/kernels/time_model.py: the
kernels are executed on the emulator for it, which takes minutes where they are not in its cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from importlib.metadata import version

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

import torch_fused_lora as tfl
from examples import memory_of_training as memory
from tests import ROOT
from tests.kernels import time_model, traffic
from torch_fused_lora.bench.measure import Case, layers, saved_bytes

DATA = ROOT / "docs" / "benchmarks"
LAYER = Case(4096, 4096, 4096, 16, "bfloat16", "float32", dropout=0.05)
KEPT = [
    Case(4096, 4096, 4096, 16, base, adapters, dropout)
    for base, adapters in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
    for dropout in (0.0, 0.05)
]


class Operators(TorchDispatchMode):
    """Notes what torch dispatches, and the bytes that it reads and writes. Views and allocations move none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view and "empty" not in operator.name():
            both = tree_leaves((args, kwargs)), tree_leaves(result)
            moved = [sum(t.nbytes for t in leaves if isinstance(t, Tensor)) for leaves in both]
            name = operator.overloadpacket.__name__
            draws = name.startswith("bernoulli")  # writes its operand and reads none
            self.found.append((name, moved[1] if draws else sum(moved)))
        return result


def stock_operators(case: Case) -> list[tuple[str, int]]:
    x = torch.empty(case.M, case.K, dtype=getattr(torch, case.base), device="meta", requires_grad=True)
    layer = layers(case, x.device)["peft"]
    with Operators() as operators:
        layer(x)
    return operators.found


def our_operators(case: Case) -> list[tuple[str, int]]:
    """torch's product, then lora_delta's two dispatches, each operand once."""
    dtypes = getattr(torch, case.base), getattr(torch, case.adapters)
    shape = traffic.Case(case.M, case.K, case.N, case.r, *dtypes)
    moved = traffic.model_delta(shape)
    partial = moved["partial"][1]
    once = {name: shape.bytes(name) for name in ("x", "weight", "bias", "lora_A", "lora_B", "y")}
    return [
        ("linear", once["x"] + once["weight"] + once["bias"] + once["y"]),
        ("lora_delta, down", once["x"] + once["lora_A"] + partial),
        ("lora_delta, up", partial + once["lora_B"] + 2 * once["y"]),
    ]


def kept(case: Case) -> dict[str, int]:
    x = torch.empty(case.M, case.K, dtype=getattr(torch, case.base), device="meta", requires_grad=True)
    found = layers(case, x.device)
    return {name: saved_bytes(lambda name=name: found[name](x)) for name in ("peft", "patched")}


def decoder_layer(name: str, length: int, dropout: float) -> dict[str, int]:
    model, _ = memory.adapted(name, 16, dropout)
    stock = memory.kept_by_a_layer(model, length)
    tfl.patch_peft(model)
    return {"peft": stock, "patched": memory.kept_by_a_layer(model, length)}


def count() -> dict[str, object]:
    lengths = memory.LENGTHS
    return {
        "environment": {name: version(name) for name in ("torch", "peft", "transformers")},
        "operators": {
            "case": dataclasses.asdict(LAYER),
            "stock": stock_operators(LAYER),
            "ours": our_operators(LAYER),
        },
        "kept": [{"case": dataclasses.asdict(case), "bytes": kept(case)} for case in KEPT],
        "decoder_layers": [
            {"model": name, "tokens": 2048, "dropout": dropout, "bytes": decoder_layer(name, 2048, dropout)}
            for name in memory.MODELS
            for dropout in (0.0, 0.05)
        ],
        "training": {"tokens": lengths, "GiB": {name: memory.modelled(name, lengths, 16) for name in memory.MODELS}},
    }


def model_times() -> dict[str, object]:
    """Microseconds of a forward, by GPU, rank and tokens."""
    gpus, ranks, width = ("M1 Max", "M3 Ultra", "M4 Max"), (16, 64), 4096
    chips = time_model.chips()
    return {
        "width": width,
        "forward_us": {
            gpu: {
                rank: {M: time_model.Layer(chips[gpu], M, width, rank).forward() for M in time_model.TOKENS}
                for rank in ranks
            }
            for gpu in gpus
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--time-model", action="store_true", help="model times instead")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file, found = ("time_model", model_times) if options.time_model else ("counted", count)
    (DATA / f"{file}.json").write_text(json.dumps(found(), indent=1) + "\n")
    print(f"wrote docs/benchmarks/{file}.json")


if __name__ == "__main__":
    main()
