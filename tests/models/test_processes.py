"""A patched model beside other processes: DataLoader workers, DDP as torchrun starts it, a notebook's launcher."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torch_fused_lora as tfl
from torch_fused_lora.originals import Patched

ROOT = Path(__file__).parents[2]


def build(dropout=0.5):
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 1)), config)


class Rows(Dataset):
    """Rows, or what a model makes of them in the worker."""

    def __init__(self, model=None):
        self.rows, self.model = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), model

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if self.model is None:
            return self.rows[index]
        with torch.no_grad():
            return self.model(self.rows[index])


def losses(model, workers, context=None):
    torch.manual_seed(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    found = []
    for batch in DataLoader(Rows(), batch_size=4, num_workers=workers, multiprocessing_context=context):
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_training_beside_dataloader_workers(context):
    """The same losses as without workers, masks of dropout included."""
    alone, beside = build(), build()
    tfl.patch_peft(alone), tfl.patch_peft(beside)
    assert losses(beside, 1, context) == losses(alone, 0)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_patched_model_in_dataloader_workers(context):
    model = build().eval()
    tfl.patch_peft(model)
    loader = DataLoader(Rows(model), batch_size=4, num_workers=1, multiprocessing_context=context)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(loader)), model(Rows().rows))


@pytest.mark.parametrize("patched_first", [False, True])
def test_layers_sharded_each_for_itself(patched_first, tmp_path):
    """FSDP2 gives each a class of its own, over the patched one or under it."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    x, model = torch.randn(4, 8), build(dropout=0.0)
    expected = model(x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fsdp, mesh = importlib.import_module("torch.distributed.fsdp"), dist.init_device_mesh("cpu", (1,))
        layers = [model.base_model.model[0], model.base_model.model[2]]
        if patched_first:
            report = tfl.patch_peft(model)
        for layer in layers:
            fsdp.fully_shard(layer, mesh=mesh)
        if not patched_first:
            report = tfl.patch_peft(model)
        torch.testing.assert_close(model(x), expected)
        assert all((calls.fused, calls.declined) == (1, 0) for calls in report.calls().values())
        tfl.unpatch_peft(model)
        assert all(isinstance(layer, fsdp.FSDPModule) and not isinstance(layer, Patched) for layer in layers)
        assert torch.equal(model(x), expected)
    finally:
        dist.destroy_process_group()


SCRIPT = """
import sys, torch
import torch.distributed as dist
import torch_fused_lora as tfl
from tests.models.test_processes import build, losses
from torch.nn.parallel import DistributedDataParallel

def train():
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found = []
    for patched in (False, True):
        model = build(dropout=0.0)
        if patched:
            report = tfl.patch_peft(model)
        found.append(losses(DistributedDataParallel(model), 0))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert all(calls.fused and not calls.declined for calls in report.calls().values())
    sys.stdout.write(f"as stock {dist.get_world_size()}\\n")
"""


def test_ddp_by_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + "\ntrain()\ndist.destroy_process_group()\n")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    assert _output(run).count("as stock 2") == 2


def test_ddp_by_a_notebooks_launcher(tmp_path):
    """Which forks a process that has torch loaded."""
    pytest.importorskip("accelerate")
    script = tmp_path / "train.py"
    launch = "from accelerate import debug_launcher\ndebug_launcher(train, num_processes=2)\n"
    script.write_text(f"{SCRIPT}\n{launch}")
    assert _output([sys.executable, script]).count("as stock 2") == 2


def _output(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
