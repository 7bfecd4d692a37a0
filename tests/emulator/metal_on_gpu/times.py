"""How long the kernels take on an NVIDIA GPU, beside torch's own for the same work. No time of an Apple GPU follows.

Each time is the median over replays of a CUDA graph that holds the work many times, its buffers in rotation, so that
together they exceed the L2 cache where 32 sets of them can.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.emulator.metal_on_gpu.driver import driver
from tests.emulator.metal_on_gpu.library import Dispatches, Modules
from tests.kernels.launch_plan import Launch
from torch_fused_lora.affine import Packed

LABEL = "Metal source on an NVIDIA GPU, not Apple"
HALF, SCALING, EPS = torch.float16, 0.5, 1e-6
Operands = SimpleNamespace


Planned = list[tuple[Launch, list[Tensor | bytes | None]]]  # dispatches, each with its arguments


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel of ours and one problem. `ours` plans it and returns the result, `exact` is that in float64."""

    kernel: str
    shape: str
    make: Callable[[], Operands]
    ours: Callable[[Dispatches, Operands], Tensor | None]
    exact: Callable[[Operands], Tensor]
    peers: Mapping[str, Callable[[Operands], object]]
    moved: Sequence[str]  # operands, each once; one that is read and written stands twice

    def bytes(self, operands: Operands) -> int:
        return sum(getattr(operands, name).nbytes for name in self.moved)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=HALF)


def layer(M: int, K: int, N: int, r: int) -> Operands:
    operands = {"x": (M, K), "W": (N, K), "A": (r, K), "B": (N, r), "y": (M, N), "dy": (M, N), "h": (M, r), "z": (M, r)}
    return Operands(**{name: randn(*shape) / max(shape[1], 1) ** 0.25 for name, shape in operands.items()})


def peft(o: Operands, base: Tensor) -> Tensor:
    return base + F.linear(F.linear(o.x, o.A), o.B) * SCALING


def addmm(o: Operands, base: Tensor) -> Tensor:
    return base.addmm_(F.linear(o.x, o.A), o.B.T, alpha=SCALING)


def low_rank(o: Operands) -> Tensor:
    return SCALING * o.x.double() @ o.A.double().T @ o.B.double().T


def decode(M: int, K: int, N: int, r: int) -> Case:
    return Case(
        "lora_decode",
        f"{M} x {K} x {N}, r {r}",
        lambda: layer(M, K, N, r),
        lambda kernels, o: kernels.decode(o.x, o.W, None, o.A, o.B, SCALING)[0],
        lambda o: o.x.double() @ o.W.double().T + low_rank(o),
        {
            "linear": lambda o: F.linear(o.x, o.W),
            "linear + addmm_": lambda o: addmm(o, F.linear(o.x, o.W)),
            "PEFT": lambda o: peft(o, F.linear(o.x, o.W)),
        },
        ("x", "W", "A", "B", "y"),
    )


def packed_layer(M: int, K: int, N: int, r: int, bits: int) -> Operands:
    """As ``layer``, of random words in groups of 64 instead of W; of elements where there are no bits."""
    o = layer(M, K, N, r)
    o.h, o.z = o.h / 2, o.z / 2
    if bits:
        o.words = torch.randint(-(2**31), 2**31 - 1, (N, K * bits // 32), dtype=torch.int32).view(torch.uint32)
        o.scales, o.biases = randn(N, K // 64) / 2 ** (bits + 4), randn(N, K // 64) / 32
        o.W = Packed(o.words, o.scales, o.biases, bits, 64)
    return o


def whole(o: Operands) -> Tensor:
    return o.W.double() if isinstance(o.W, Tensor) else o.W.dequantize(torch.float64)


def packed_case(
    kernel: str,
    sizes: tuple[int, int, int, int],
    bits: int,
    ours: Callable[[Dispatches, Operands], Tensor | None],
    exact: Callable[[Operands], Tensor],
    moved: Sequence[str],
) -> Case:
    M, K, N, r = sizes
    return Case(
        kernel,
        f"{M} x {K} x {N}, r {r}, {f'{bits}-bit' if bits else 'plain'}",
        lambda: packed_layer(*sizes, bits),
        ours,
        exact,
        {},
        (*moved, *(("words", "scales", "biases") if bits else ("W",))),
    )


def packed_decode(*sizes: int, bits: int) -> Case:
    return packed_case(
        "lora_decode",
        sizes,
        bits,
        lambda kernels, o: kernels.decode(o.x, o.W, None, o.A, o.B, SCALING)[0],
        lambda o: o.x.double() @ whole(o).T + low_rank(o),
        ("x", "A", "B", "y"),
    )


def gemm(*sizes: int, bits: int) -> Case:
    return packed_case(
        "lora_gemm",
        sizes,
        bits,
        lambda kernels, o: kernels.gemm(o.x, o.W, None, o.B, o.h, SCALING),
        lambda o: o.x.double() @ whole(o).T + SCALING * o.h.double() @ o.B.double().T,
        ("x", "h", "B", "y"),
    )


def gemm_dx(*sizes: int, bits: int) -> Case:
    return packed_case(
        "lora_gemm, backward",
        sizes,
        bits,
        lambda kernels, o: kernels.gemm_dx(o.dy, o.W, o.A, o.z, SCALING),
        lambda o: o.dy.double() @ whole(o) + SCALING * o.z.double() @ o.A.double(),
        ("dy", "z", "A", "x"),
    )


def delta(M: int, K: int, N: int, r: int) -> Case:
    def ours(kernels: Dispatches, o: Operands) -> Tensor:
        kernels.delta(o.y, o.x, o.A, o.B, SCALING)
        return o.y

    return Case(
        "lora_delta",
        f"{M} x {K} x {N}, r {r}",
        lambda: layer(M, K, N, r),
        ours,
        lambda o: o.y.double() + low_rank(o),
        {
            "linear": lambda o: F.linear(o.x, o.W),
            "addmm_": lambda o: addmm(o, o.y),
            "PEFT": lambda o: peft(o, o.y),
        },
        ("x", "A", "B", "y", "y"),
    )


def grad(M: int, K: int, N: int, r: int) -> Case:
    return Case(
        "lora_grad",
        f"{M} x {K} x {N}, r {r}",
        lambda: layer(M, K, N, r),
        lambda kernels, o: kernels.grad(o.x, o.z, o.dy, o.h, o.A, o.B, SCALING)[0],
        lambda o: SCALING * o.z.double().T @ o.x.double(),
        {"two mm": lambda o: (torch.mm(o.z.T, o.x), torch.mm(o.dy.T, o.h))},
        ("x", "z", "dy", "h", "A", "B"),
    )


def rows(M: int, H: int) -> Operands:
    o = Operands(x=randn(M, H), weight=randn(1, H)[0], grad=randn(M, H), y=randn(M, H).softmax(1))
    o.rstd = (o.x.float().square().mean(1) + EPS).rsqrt()
    return o


def rms_norm(M: int, H: int) -> Case:
    return Case(
        "rms_norm",
        f"{M} x {H}",
        lambda: rows(M, H),
        lambda kernels, o: kernels.rms_norm(o.x, o.weight, EPS)[0],
        lambda o: F.rms_norm(o.x.double(), (H,), o.weight.double(), EPS),
        {"F.rms_norm": lambda o: F.rms_norm(o.x, (H,), o.weight, EPS)},
        ("x", "y", "weight"),
    )


def rms_norm_backward(M: int, H: int) -> Case:
    backward = torch.ops.aten._fused_rms_norm_backward

    def exact(o: Operands) -> Tensor:
        normal, scaled = o.x.double() * o.rstd.double()[:, None], o.grad.double() * o.weight.double()
        return o.rstd.double()[:, None] * (scaled - normal * (scaled * normal).mean(1, keepdim=True))

    return Case(
        "rms_norm_backward",
        f"{M} x {H}",
        lambda: rows(M, H),
        lambda kernels, o: kernels.rms_norm_backward(o.grad, o.x, o.weight, o.rstd)[0],
        exact,
        {"F.rms_norm's": lambda o: backward(o.grad, o.x, [H], o.rstd[:, None], o.weight, [True, True])},
        ("x", "grad", "y", "weight", "weight"),
    )


def softmax(M: int, H: int) -> Case:
    return Case(
        "softmax",
        f"{M} x {H}",
        lambda: rows(M, H),
        lambda kernels, o: kernels.softmax(o.x),
        lambda o: o.x.double().softmax(1),
        {"torch.softmax": lambda o: o.x.softmax(1)},
        ("x", "y"),
    )


def softmax_backward(M: int, H: int) -> Case:
    return Case(
        "softmax_backward",
        f"{M} x {H}",
        lambda: rows(M, H),
        lambda kernels, o: kernels.softmax_backward(o.grad, o.y),
        lambda o: o.y.double() * (o.grad.double() - (o.y.double() * o.grad.double()).sum(1, keepdim=True)),
        {"torch.softmax's": lambda o: torch.ops.aten._softmax_backward_data(o.grad, o.y, 1, HALF)},
        ("x", "grad", "y"),
    )


CASES = [
    *[decode(M, 4096, 4096, 16) for M in (1, 2, 4, 8)],
    *[decode(M, 4096, 4096, 64) for M in (1, 4, 8)],
    *[decode(M, 8192, 8192, 16) for M in (1, 4, 8)],
    *[delta(M, 4096, 4096, 16) for M in (9, 32, 128, 512, 1024, 4096, 8192)],
    *[delta(M, 4096, 4096, 64) for M in (9, 128, 1024, 4096, 8192)],
    *[delta(4096, 4096, 4096, r) for r in (128, 256)],
    *[grad(M, 4096, 4096, r) for M in (512, 4096) for r in (16, 64)],
    grad(4096, 4096, 4096, 256),
    *[
        kind(*shape)
        for shape in ((8192, 4096), (64, 2048))
        for kind in (rms_norm, rms_norm_backward, softmax, softmax_backward)
    ],
]


# Over packed weights, which torch has no product for: part "packed" of `run`.
PACKED_CASES = [
    *[packed_decode(M, 4096, 4096, 16, bits=4) for M in (1, 2, 4, 8)],
    packed_decode(1, 4096, 4096, 16, bits=8),
    *[gemm(M, 4096, 4096, 16, bits=bits) for M in (32, 512, 4096) for bits in (4, 0)],
    *[gemm_dx(M, 4096, 4096, 16, bits=bits) for M in (512, 4096) for bits in (4, 0)],
]


def plan(case: Case, operands: Operands, gpu_cores: int) -> tuple[Planned, Tensor | None]:
    """What is to be launched, and where the result will be."""
    planned: Planned = []
    result = case.ours(Dispatches(gpu_cores, run=lambda *dispatch: planned.append(dispatch)), operands)
    return planned, result


def sources(cores: Sequence[int]) -> set[str]:
    """Of all that is launched for GPUs of these cores."""
    with torch.device("meta"):
        planned = [plan(case, case.make(), count)[0] for case in (*CASES, *PACKED_CASES) for count in cores]
    return {launch.source.decode() for dispatches in planned for launch, _ in dispatches}


def launcher(planned: Planned, modules: Modules, variant: str) -> Callable[[], None]:
    """What launches them on torch's current stream."""
    prepared = []
    for launch, arguments in planned:
        kernel = modules.kernel(launch.source.decode(), launch.kernel.decode(), variant)
        slots = [
            value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else kernel.slot(index, value)
            for index, value in enumerate(arguments)
        ]
        prepared.append((kernel.function, kernel.groups(launch.threads, launch.group), list(launch.group), slots))

    def launch_all() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for function, groups, group, slots in prepared:
            driver().launch(function, groups, group, slots, stream)

    return launch_all


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 11) -> float:
    """Of one call."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    found = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(found)


def copy_bandwidth() -> float:
    """GB/s, of what is read and written, by the faster of the driver's copy and a kernel of torch's."""
    target, source = torch.randn(2, 1 << 28)
    ways = (lambda: target.copy_(source)), (lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / min(microseconds([way] * 4) for way in ways) / 1e3


def measure(modules: Modules, cases: Sequence[Case] = CASES) -> dict[str, object]:
    """These cases, as what the JSON file holds."""
    properties = torch.cuda.get_device_properties(0)
    cores, cache = properties.multi_processor_count, properties.L2_cache_size
    with torch.device("cuda"):
        copy = copy_bandwidth()
        found = [measure_case(case, modules, cores, cache, copy) for case in cases]
    return {
        "label": LABEL,
        "card": properties.name,
        "torch": torch.__version__,
        "multiprocessors": cores,
        "copy_gb_per_s": round(copy),
        "cases": found,
    }


def measure_case(case: Case, modules: Modules, cores: int, cache: int, copy: float) -> dict[str, object]:
    torch.manual_seed(0)
    operands = [case.make()]
    moved = case.bytes(operands[0])
    operands += [case.make() for _ in range(min(max(2 * cache // moved + 1, 2), 32) - 1)]
    exact = case.exact(operands[0])
    found: dict[str, object] = {"kernel": case.kernel, "shape": case.shape, "bytes": moved, "sets": len(operands)}
    for column, variant, count in (("us", "fast", cores), ("us_for_40_cores", "fast", 40), ("us_fma", "fma", cores)):
        planned = [plan(case, o, count) for o in operands]
        calls = [launcher(dispatches, modules, variant) for dispatches, _ in planned]
        if column == "us":
            calls[0]()
            error = (planned[0][1].double() - exact).norm() / exact.norm()
            found["relative_error"] = float(f"{float(error):.2g}")
            found["launches"] = [describe(launch, modules, variant) for launch, _ in planned[0][0]]
        found[column] = round(microseconds(calls), 2)
    found["share_of_copy_bandwidth"] = round(moved / found["us"] / 1e3 / copy, 4)
    found["torch_us"] = {
        name: round(microseconds([lambda o=o, peer=peer: peer(o) for o in operands]), 2)
        for name, peer in case.peers.items()
    }
    return found


def describe(launch: Launch, modules: Modules, variant: str) -> dict[str, object]:
    name = launch.kernel.decode()
    entry = modules.entry(launch.source.decode(), name, variant)
    groups = [a // b for a, b in zip(launch.threads, launch.group, strict=True)]
    return {"kernel": name, "groups": groups, "threads": launch.group[0], **dataclasses.asdict(entry)}


def table(found: Mapping[str, object]) -> str:
    """As Markdown."""
    lines = [
        f"{found['label']}: {found['card']}, copies at {found['copy_gb_per_s']} GB/s, fp16, microseconds.",
        "",
        "| kernel | problem | ours | for 40 cores | FMA | bandwidth | groups | registers, local bytes | torch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        torch_us = ", ".join(f"{name} {us:g}" for name, us in case["torch_us"].items())
        first = case["launches"][0]
        groups = " x ".join(str(count) for count in first["groups"] if count > 1) or "1"
        lines.append(
            f"| {case['kernel']} | {case['shape']} | {case['us']:g} | {case['us_for_40_cores']:g} | {case['us_fma']:g} "
            f"| {case['share_of_copy_bandwidth']:.1%} | {groups} | {first['registers']}, {first['local_bytes']} "
            f"| {torch_us} |"
        )
    return "\n".join(lines)
