"""``python -m torch_fused_lora doctor``, ``bench`` and ``tune``."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from .plan import DTYPES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_fused_lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="what is installed, which backend each device gets, a numeric self-test"
    )
    doctor.add_argument("--json", action="store_true", help="all of it as JSON, which a bug report attaches")
    doctor.add_argument(
        "--plan", type=_shape, metavar="MxKxN", help="instead: how the Metal kernels of a LoRA layer are launched"
    )
    doctor.add_argument("--rank", type=_positive, default=16, help="of the planned layer (default: 16)")
    doctor.add_argument("--dtype", choices=DTYPES, default="float16", help="of its input and weight (default: float16)")
    doctor.add_argument("--adapter-dtype", choices=DTYPES, help="of lora_A and lora_B (default: as --dtype)")
    doctor.add_argument("--gpu-cores", type=_positive, default=0, help="of the GPU (default: this one's)")
    bench = commands.add_parser("bench", help="the LoRA tax of stock PEFT and of the patched model, on this machine")
    bench.add_argument("--device", default=None, help="cpu, cuda, mps, ... (default: the accelerator if there is one)")
    what = bench.add_mutually_exclusive_group()
    what.add_argument(
        "--shapes",
        nargs="+",
        choices=("small", "medium", "large", "gpu", "packed", "called", "rows"),
        help="LoRA layers by size; gpu: those a card is compared by; packed: over our 4 bits and bitsandbytes' NF4; "
        "called: over a base of a class of its own; rows: RMS norm and softmax (default: gpu rows on CUDA, else small "
        "medium rows). large, up to 8192 x 4096 x 14336, takes half an hour on two CPU cores",
    )
    what.add_argument(
        "--model",
        nargs="?",
        choices=("auto", "small", "1.1B"),
        const="auto",
        help="instead: a whole training step of a Llama with random weights; auto, also if no size is named: 1.1B on "
        "CUDA, else small",
    )
    what.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="JSON",
        help="instead: two files that bench has written, ratio by ratio",
    )
    bench.add_argument("--seconds", type=float, default=3.0, help="time for each row (at least 5 rounds are run)")
    bench.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    bench.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder for bench.json and bench.png, or model.json"
    )
    with_model = bench.add_argument_group("with --model")
    with_model.add_argument(
        "--batches", nargs="+", type=_batch, metavar="LINESxTOKENS", help="(default: 4x1024 1x512; small: 4x128 1x64)"
    )
    with_model.add_argument("--rank", type=_positive, help="of every adapter (default: 16)")
    with_model.add_argument("--dropout", nargs="+", type=float, help="of every adapter (default: 0 0.05)")
    with_model.add_argument(
        "--format", choices=("4bit", "nf4"), default="", help="of the base under the adapters (default: bfloat16)"
    )
    tune = commands.add_parser("tune", help="measure launch configurations on this machine and keep the best")
    of = tune.add_mutually_exclusive_group(required=True)
    of.add_argument("--model", type=Path, metavar="FOLDER", help="with its config.json: its linear layers")
    of.add_argument("--shapes", nargs="+", type=_shape, metavar="MxKxN", help="of layers: rows, features in and out")
    tune.add_argument("--rows", nargs="+", type=_positive, help="with --model, M (default: 1 64 1024)")
    tune.add_argument("--rank", type=_positive, default=16, help="of every adapter (default: 16)")
    tune.add_argument("--dtype", choices=DTYPES, default="float16", help="of the base (default: float16)")
    tune.add_argument("--adapter-dtype", choices=DTYPES, help="of the adapters (default: as --dtype)")
    tune.add_argument("--device", default=None, help="cuda or mps (default: the accelerator)")
    tune.add_argument("--seconds", type=float, default=100.0, help="for all, about (default: 100)")
    options = parser.parse_args(arguments)
    if options.command == "doctor" and options.plan:
        from .plan import print_plan

        return print_plan(options.plan, options.rank, options.dtype, options.adapter_dtype, options.gpu_cores)
    if options.command == "doctor":
        from .doctor import doctor as run_doctor

        return run_doctor(options.json)
    if options.command == "tune" and options.shapes and options.rows:
        tune.error("--rows goes with --model: a shape has its own")
    if options.command == "bench":
        if not options.model and (options.batches or options.rank or options.dropout or options.format):
            bench.error("--batches, --rank, --dropout and --format go with --model")
        wanted = options.format == "nf4" or "packed" in (options.shapes or ())
        if wanted and find_spec("bitsandbytes") is None:
            bench.error("NF4 is bitsandbytes', which is not installed: pip install bitsandbytes")
    try:
        from .bench.report import bench as run_bench

        if options.command == "tune":
            from .bench.tune import shapes_of
            from .bench.tune import tune as run_tune
        elif options.model:
            from .bench.model import bench_model
        elif options.compare:
            from .bench.compare import compare
    except ImportError as error:
        print(
            f"{options.command} needs more packages ({error}): pip install 'torch-fused-lora[bench]'", file=sys.stderr
        )
        return 1
    if options.command == "tune":
        try:
            shapes = options.shapes or shapes_of(options.model, options.rows or [1, 64, 1024])
        except (OSError, ValueError) as error:
            tune.error(f"--model: {error}")
        layers = options.rank, options.dtype, options.adapter_dtype
        return run_tune(options.device, [tuple(shape) for shape in shapes], *layers, options.seconds)
    if options.compare:
        return compare(*options.compare)
    if options.model:
        model = options.model, options.format, options.batches, options.rank or 16, options.dropout or [0.0, 0.05]
        bench_model(options.device, *model, options.seconds, options.threads, options.out)
        return 0
    run_bench(options.device, options.shapes, options.seconds, options.threads, options.out)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _shape(text: str) -> list[int]:
    return _numbers(text, 3, "MxKxN, such as 64x2048x2048")


def _batch(text: str) -> list[int]:
    return _numbers(text, 2, "LINESxTOKENS, such as 4x1024")


def _numbers(text: str, count: int, expected: str) -> list[int]:
    parts = text.split("x")
    if len(parts) != count:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return [_positive(part) for part in parts]


if __name__ == "__main__":
    sys.exit(main())
