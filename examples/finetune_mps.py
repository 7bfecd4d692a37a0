"""Fine-tune all-MiniLM-L6-v2 with PEFT LoRA on a Mac's GPU, every LoRA layer by the Metal kernels.

    pip install ".[examples]"  # in the source folder, on the Mac
    python examples/finetune_mps.py

The task, the model and the data are those of finetune_encoder.py. When the adapter is trained, it is saved, and stock
PEFT reads it back on the CPU: there it has to tell the same topics by the same logits, up to float32 rounding.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from pathlib import Path

import torch
from finetune_encoder import Batches, TopicClassifier, accuracy, adamw, load_lines, lora_config, predict, train_step
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers.utils import logging

from torch_fused_lora import patch_peft
from torch_fused_lora.mps import extension


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
    parser.add_argument("--held-out", type=int, help="how many of the held-out lines to test on (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out/finetune_mps"))
    args = parser.parse_args()
    if not torch.backends.mps.is_available():
        raise SystemExit("this machine has no device mps: python examples/finetune_encoder.py trains on others")
    device = torch.device("mps")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"{torch.backends.mps.get_name()}, {torch.backends.mps.get_core_count()} cores; extension {extension.reason}")

    topics, train, test = load_lines()
    test = random.Random(0).sample(test, min(args.held_out or len(test), len(test)))
    print(f"{len(train)} lines to train on, {len(test)} held out, {len(topics)} topics")
    batches, cpu_batches = Batches(args.batch_size, device), Batches(32, torch.device("cpu"))
    test_batches = batches.short_first(test)

    classifier = TopicClassifier(len(topics))
    classifier.set_head_to_centroids(cpu_batches.short_first(train))
    model = get_peft_model(classifier.to(device), lora_config(args.dropout))
    print(patch_peft(model))

    before = accuracy(predict(model, test_batches), test_batches)
    optimizer = adamw(model)
    losses, seconds = [], []
    for batch in tqdm(itertools.islice(batches.shuffled(train), args.steps), total=args.steps, unit="step"):
        started = time.perf_counter()
        losses.append(train_step(model, optimizer, batch))
        seconds.append(time.perf_counter() - started)
    logits = predict(model, test_batches)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, step {1e3 * statistics.median(seconds):.0f} ms (median)")
    print(f"held-out accuracy {before:.1%} -> {accuracy(logits, test_batches):.1%}")

    model.save_pretrained(args.out / "adapter")
    on_cpu = PeftModel.from_pretrained(TopicClassifier(len(topics)), args.out / "adapter", torch_device="cpu")
    expected = predict(on_cpu, cpu_batches.short_first(test))
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)
    difference = (logits.cpu() - expected).abs().max().item()
    print(f"adapter read back by stock PEFT on the CPU: logits within {difference:.1e}")
    print(f"{extension.compiled_kernels} Metal kernels compiled, {extension.contiguous_copies} operands copied")
    print(f"written: {args.out / 'adapter'}")


if __name__ == "__main__":
    main()
