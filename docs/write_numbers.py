"""Brings measured and counted numbers into the pages: ``python -m docs.write_numbers``, ``--check`` to only compare.

They stand between ``<!-- numbers: BLOCK -->`` and ``<!-- end -->``, and nowhere else; a block is a function of this
file and, after a colon, the file of docs/benchmarks/ that it is made of. What is not in the file is not filled in.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tests import ROOT
from tests.emulator.metal_on_gpu import times

DATA = ROOT / "docs" / "benchmarks"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "tests" / "emulator" / "metal_on_gpu" / "README.md",
)
BLOCK = re.compile(r"(<!-- numbers: ([\w:]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SAME = 0.03  # within which two times count as the same
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DIRECTIONS = "forward", "forward+backward"
Document = dict[str, Any]


def load(name: str) -> Document:
    return json.loads((DATA / f"{name}.json").read_text())


# --------------------------------------------------------------------------------------------------------- phrases


def source(document: Document) -> str:
    """Who measured, with what, of which commit, by which command."""
    environment, of = document["environment"], document["source"]
    machine = environment.get("machine") or environment["device"]
    threads = f", threads: {environment['threads']}" if "threads" in environment and "machine" in environment else ""
    names = {"torch": "torch", "peft": "PEFT", "triton": "Triton", "python": "Python"}
    versions = ", ".join(
        f"{shown} {environment[name].partition('+')[0]}" for name, shown in names.items() if name in environment
    )
    remark = f" {of['remark']}" if of.get("remark") else ""
    return f"*{machine}{threads}; {versions}; commit {of['commit']}; `{of['command']}`.{remark}*"


def ratio(found: Document | None) -> str:
    """A median and its quartiles; bold where it is no gain."""
    if found is None:
        return "–"
    spread = f" ({found['low']:.2f}–{found['high']:.2f})" if "low" in found else ""
    return f"{bold(found['median'])}{spread}"


def bold(value: float) -> str:
    return f"**{value:.2f}**" if round(value, 2) > 1 else f"{value:.2f}"


def median(found: Document | None) -> str:
    return f"{found['median']:.2f}" if found else "–"


def verdict(ratios: Iterable[float]) -> str:
    """In a word, of their geometric mean; with the best and the worst where these differ."""
    found = [f"{value:.2f}" for value in sorted(ratios)]
    if not found:
        return "*unmeasured*"
    mean = statistics.geometric_mean(map(float, found))
    spread = f" ({found[0]}–{found[-1]})" if found[0] != found[-1] else ""
    return f"{word(mean)} {mean:.2f}{spread}"


def word(value: float) -> str:
    return "faster" if value < 1 - SAME else "**slower**" if value > 1 + SAME else "same"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layer(case: Document) -> str:
    adapters = f" + {SHORT[case['adapters']]}" if case["adapters"] != case["base"] else ""
    dropout = f", dropout {case['dropout']:g}" if case["dropout"] else ""
    format = f", {case['format']}" if case.get("format") else ""
    return f"{case['M']} x {case['K']} x {case['N']}, r {case['r']}, {SHORT[case['base']]}{adapters}{format}{dropout}"


# ---------------------------------------------------------------------------------------------------------- blocks


def tax(name: str) -> str:
    """LoRA layers: the tax of both and their ratio, forward and training."""
    document = load(name)
    by_case: dict[str, dict[str, Document]] = {}
    for result in document["results"]:
        by_case.setdefault(layer(result["case"]), {})[result["direction"]] = result
    rows = [
        [case, *(cell for way in DIRECTIONS for cell in _taxes(results.get(way, {})))]
        for case, results in by_case.items()
    ]
    headings = ["tokens x K x N, rank, base + adapters", *["patched / stock", "tax: stock, patched"] * 2]
    note = "Forward in the first two columns, forward and backward in the last two."
    return f"{table(headings, rows)}\n\n{note} {source(document)}"


def _taxes(result: Document) -> tuple[str, str]:
    both = ", ".join(median(result.get(which)) for which in ("peft_tax", "patched_tax"))
    return ratio(result.get("patched_over_peft")), both


def rows(name: str) -> str:
    """RMS norm and softmax over torch's own and over Llama's module."""
    document = load(name)
    if not document["rows"]:
        return "*unmeasured*"
    lines = [
        [
            f"{case['operator']}, {case['M']} x {case['H']}, {SHORT[case['dtype']]}, {result['direction']}",
            ratio(result["over_torch"]),
            ratio(result["over_module"]) if result["over_module"] else "",
        ]
        for result in document["rows"]
        for case in (result["case"],)
    ]
    headings = ["operator, rows x elements", "ours / torch", "ours / Llama's module"]
    return f"{table(headings, lines)}\n\n{source(document)}"


def model(name: str) -> str:
    """A whole training step."""
    document = load(name)
    lines = []
    for result in document["results"]:
        case = result["case"]
        of = f"{case['lines']} x {case['tokens']}, {SHORT[case['adapters']]}, dropout {case['dropout']:g}"
        for quantity, found in result["compared"].items():
            ratios = [ratio(found["over_stock"].get(who)) for who in ("patched", "patched+norms")]
            lines.append([of, quantity.rpartition("_")[0], *ratios])
    parameters = document["model"]["parameters"] / 1e6
    headings = ["lines x tokens, adapters", "", "patched / stock", "and norms / stock"]
    held = f" in {document['model']['format']}" if document["model"].get("format") else ""
    note = f"{document['model']['name']}, {parameters:.0f} M parameters, bfloat16{held}; no optimizer's step."
    return f"{table(headings, lines)}\n\n{note} {source(document)}"


def encoder(name: str) -> str:
    """The example that trains an encoder."""
    document = load(name)
    rows = [
        [label, *(form.format(scale * document[key][who]) for who in ("stock", "patched"))]
        for label, key, scale, form in (
            ("kept for backward, MB", "kept_bytes", 1e-6, "{:.1f}"),
            ("peak of a step beside the weights, MB", "peak_bytes", 1e-6, "{:.1f}"),
            ("held-out accuracy", "accuracy", 1, "{:.1%}"),
        )
    ]
    both = document["stock_over_patched"]
    apart = max(abs(a - b) for a, b in zip(*document["losses"].values(), strict=True))
    speed = f"A step takes {both['median']:.2f} times as long with stock PEFT (quartiles {both['low']:.2f} to "
    speed += f"{both['high']:.2f}); the two loss curves differ by {apart:.1e} at most."
    return f"{table(['', 'stock', 'patched'], rows)}\n\n{speed} {source(document)}"


def gemma(name: str) -> str:
    """The example that trains over 4 bits."""
    document = load(name)
    names = list(document["losses"])
    before = document["perplexity"]["original"]
    rows = [
        [label, *(form.format(scale * values[who]) for who in names)]
        for label, values, scale, form in (
            (f"held-out perplexity before ({before:.2f} unquantised)", document["perplexity"]["before"], 1, "{:.2f}"),
            ("held-out perplexity after", document["perplexity"]["after"], 1, "{:.2f}"),
            ("training, tokens/s", document["tokens_per_second"], 1, "{:.1f}"),
            ("base weights, MB", document["weight_bytes"], 1e-6, "{:.1f}"),
            ("peak of a step beside the weights, MB", document["peak_bytes"], 1e-6, "{:.1f}"),
        )
    ]
    return f"{table(['', *names], rows)}\n\n{source(document)}"


def versions(name: str) -> str:
    """What the operators' and PEFT's tests were run with, and what they were not."""
    words = {"python": "Python", "torch": "torch", "peft": "PEFT", "transformers": "Transformers"}
    words |= {"outcome": "outcome", "commit": "commit"}
    document = load(name)
    rows = [[cell.get(word, "–") for word in words] for cell in document["cells"].values()]
    return f"{table([*words.values()], rows)}\n\n*`{document['source']['command']}`*"


def kept(name: str) -> str:
    """Bytes kept for backward, counted."""
    rows = [
        [layer(found["case"]), *(f"{found['bytes'][who] / 2**20:.1f}" for who in ("peft", "patched")), f"{share:.2f}"]
        for found in load(name)["kept"]
        for share in [found["bytes"]["patched"] / found["bytes"]["peft"]]
    ]
    return table(["tokens x K x N, rank, base + adapters", "stock, MiB", "patched, MiB", "patched / stock"], rows)


def decoder_layers(name: str) -> str:
    """The same of decoder layers."""
    rows = [
        [
            f"{found['model']}, dropout {found['dropout']:g}",
            *(f"{size / 2**20:.0f}" for size in found["bytes"].values()),
        ]
        for found in load(name)["decoder_layers"]
    ]
    return table(["", "stock, MiB", "patched, MiB"], rows)


def training(name: str) -> str:
    """What fits into a Mac, modelled."""
    found = load(name)["training"]
    rows = [
        [model, f"{base:.1f}", f"{adapters:.2f}", *(f"{step:.1f}" for step in steps)]
        for model, (base, adapters, steps) in found["GiB"].items()
    ]
    return table(["GiB, modelled", "base", "adapters", *(f"{length} tokens" for length in found["tokens"])], rows)


def metal_on_gpu(name: str, part: str = "times") -> str:
    """The Metal kernels on an NVIDIA GPU."""
    return times.table(json.loads((DATA.parent / f"{name}.json").read_text())[part])


def packed_on_gpu(name: str) -> str:
    """And those over packed weights."""
    return metal_on_gpu(name, "packed")


def front(_: str) -> str:
    """README's "Is it for me?"."""
    shares = [found["bytes"]["patched"] / found["bytes"]["peft"] for found in load("counted")["kept"]]
    kept = f"{min(shares):.2f}–{max(shares):.2f}"
    lines = [
        [f"{device}, {tokens} tokens", *_verdicts(f"{device.lower()}_layers", f"{device.lower()}_model", holds), kept]
        for device in ("CPU", "CUDA")
        for tokens, holds in (("1 to 64", lambda n: n <= 64), ("512 and more", lambda n: n >= 512))
    ]
    lines.append(["Mac", *["*unmeasured*"] * 3, kept])
    lines.append(["CUDA, base in bitsandbytes' NF4", *_over_nf4("nf4")])
    lines.append(["CUDA, our 4 bits against NF4", *_over_nf4("4bit")])
    gemma = load("gemma_4bit")
    of_4_bits, twin = gemma["losses"]
    slower = gemma["tokens_per_second"][twin] / gemma["tokens_per_second"][of_4_bits]
    smaller = gemma["weight_bytes"][of_4_bits] / gemma["weight_bytes"][twin]
    lines.append(["CPU, our 4 bits against bf16", "–", "–", verdict([slower]), f"{smaller:.2f}, weights"])
    return table(["patched / stock PEFT", *DIRECTIONS, "a training step", "memory"], lines)


def _verdicts(layers: str, steps: str, holds: Callable[[int], bool]) -> list[str]:
    """Of a layer each way and of a whole step, over the cases whose tokens it holds for."""
    results = [r for r in load(layers)["results"] if holds(r["case"]["M"]) and not r["case"]["format"]]
    cells = [verdict(r["patched_over_peft"]["median"] for r in results if r["direction"] == way) for way in DIRECTIONS]
    found = [r for r in load(steps)["results"] if holds(r["case"]["lines"] * r["case"]["tokens"])]
    return [*cells, verdict(r["compared"]["wall_ms"]["over_stock"]["patched"]["median"] for r in found)]


def _over_nf4(format: str) -> list[str]:
    """A patched model with its base in a format, over stock PEFT's with it in NF4: both are known over bfloat16."""

    def taxes(of: str, which: str, way: str) -> list[float]:
        results = load("cuda_packed")["results"]
        return [r[which]["median"] for r in results if (r["case"]["format"], r["direction"]) == (of, way)]

    def steps(of: str, who: str, quantity: str) -> list[float]:
        results = load(f"cuda_{of}_model")["results"]
        return [r["compared"][quantity]["over_floor"][who]["median"] for r in results]

    def over(ours: list[float], stock: list[float]) -> list[float]:
        return [a / b for a, b in zip(ours, stock, strict=True)]

    layers = [verdict(over(taxes(format, "patched_tax", way), taxes("nf4", "peft_tax", way))) for way in DIRECTIONS]
    wall, peak = (over(steps(format, "patched", q), steps("nf4", "stock", q)) for q in ("wall_ms", "peak_MiB"))
    return [*layers, verdict(wall), f"{min(peak):.2f}–{max(peak):.2f}, peak"]


BLOCKS: dict[str, Callable[[str], str]] = {
    block.__name__: block
    for block in (
        *(front, tax, rows, model, encoder, gemma, kept, decoder_layers, training),
        *(metal_on_gpu, packed_on_gpu, versions),
    )
}


def written(text: str) -> str:
    """A page with its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        function, _, name = match[2].partition(":")
        return f"{match[1]}{BLOCKS[function](name)}\n{match[4]}"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    options = parser.parse_args()
    different = [page for page in PAGES if written(text := page.read_text()) != text]
    for page in different:
        print(f"{page.relative_to(ROOT)}: {'differs from its data: make numbers' if options.check else 'written'}")
        if not options.check:
            page.write_text(written(page.read_text()))
    return int(options.check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
