"""Stock PEFT and patched in two gloo processes: FSDP2 in several ways, and DDP."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import torch_fused_lora as tfl

STEPS = 2
WAYS = ("fsdp2 by block", "fsdp2 whole", "fsdp2 adapters apart", "ddp")
CASES = [
    (way, dtype, order)
    for way, dtype, order in itertools.product(WAYS, ("float32", "bfloat16"), ("patched first", "patched last"))
    if way != "ddp" or dtype == "float32"
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(128, 64), nn.Linear(64, 128)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def build() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(Block(), Block()), config)


def spread(model: nn.Module, way: str, dtype: str) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if dtype == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if way == "fsdp2 adapters apart":
        for layer in [layer for layer in model.modules() if hasattr(layer, "lora_A")]:
            for part in (layer.lora_A, layer.lora_B):
                fully_shard(part["default"], **options)
    if way != "fsdp2 whole":
        for block in model.base_model.model:
            fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def train(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Each step's loss on this rank, and the first one's gradients, gathered."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = model(torch.randn(64, 128, generator=generator)).float().square().mean()
        loss.backward()
        found[f"loss {number}"] = loss.detach()
        if number == 0:
            for name, parameter in model.named_parameters():
                if (grad := parameter.grad) is not None:
                    found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
        optimizer.step()
    return found


def compare(rank: int, way: str, dtype: str, order: str) -> tuple[dict, ...]:
    stock = train(spread(build(), way, dtype), rank)
    model = build()
    report = tfl.patch_peft(model) if order == "patched first" else None
    spreaded = spread(model, way, dtype)
    report = report or tfl.patch_peft(spreaded)
    patched = train(spreaded, rank)
    calls = {name: (record.fused, record.declined, record.reason) for name, record in report.calls().items()}
    return stock, patched, calls, report.declined


def work(rank: int, world: int, port: int, file: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = {case: compare(rank, *case) for case in CASES}
    torch.save(results, file.with_suffix(f".{rank}"))
    dist.destroy_process_group()


def run(folder: Path, world: int = 2) -> dict[tuple[str, ...], tuple[dict, ...]]:
    """The results of all cases, on the last rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (world, port, folder / "results"), nprocs=world)
    return torch.load(folder / f"results.{world - 1}")
