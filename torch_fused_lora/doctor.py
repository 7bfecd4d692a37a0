"""``python -m torch_fused_lora doctor``: what is installed, who computes on each device, and does it compute right."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from .affine import Packed
from .mps import core_count, extension
from .ops.dispatch import NAMESPACE, Operator
from .ops.lora_linear import lora_linear
from .ops.lora_linear.reference import lora_linear as plain_lora_linear
from .ops.lora_linear.ways import limits_of, triton_kernels, tuned_layers
from .ops.lora_linear_quantized import lora_linear_quantized
from .ops.rms_norm import rms_norm
from .ops.rms_norm.reference import rms_norm as plain_rms_norm
from .ops.rows import METAL_DTYPES
from .ops.softmax import softmax
from .ops.softmax.reference import softmax as plain_softmax
from .system import System, gpu_family, is_virtual, metal_version, notable_variables

_Answer = TypeVar("_Answer")

PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")
TESTED = {"torch": ("2.11", "2.13"), "peft": ("0.18", "0.21")}  # from, to; others may work


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """The worst error of one dtype's results and gradients against float64, and what is allowed; or what was raised."""

    dtype: str
    passed: bool
    error: str
    allowed: str
    raised: str | None = None

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{verdict}: {self.raised or f'error {self.error}, {self.allowed} allowed'}"


@dataclasses.dataclass(frozen=True)
class Device:
    """Who computes on a device, and whether right. ``backends``: operator to (who, why); ``ways``: which way its calls
    of lora_linear take, and ``tuned`` what overrides that."""

    type: str
    name: str
    backends: dict[str, tuple[str, str]]
    ways: str
    tuned: str
    self_tests: list[SelfTest]


@dataclasses.dataclass(frozen=True)
class Metal:
    """The Apple GPU and the extension, after the self-tests. Times in seconds."""

    gpu: str
    family: str
    virtual: bool
    cores: int
    language: str
    extension: str
    loaded: bool
    compiled_kernels: int
    compile_seconds: float
    contiguous_copies: int

    def __str__(self) -> str:
        family = f"family {self.family}, by its name"
        if self.virtual:
            family = "virtual: it may lack what the kernels need, and its times say nothing of a real one"
        return (
            f"  GPU          {family}\n"
            f"  Metal        {self.language}, as torch compiles it\n"
            f"  extension    {self.extension}; in this process {self.compiled_kernels} kernels compiled in "
            f"{self.compile_seconds:.1f} s\n"
            f"  copies       {self.contiguous_copies} operands of a layout that no kernel reads"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """All that doctor finds. A probe that fails leaves a text that starts with "unknown" in its place."""

    version: str
    python: str
    platform: str
    packages: dict[str, str]
    system: System | str
    without_metal: str | None
    variables: dict[str, str]
    devices: list[Device]
    metal: Metal | str

    @property
    def healthy(self) -> bool:
        """Whether every device that is here computes right."""
        return all(test.passed for device in self.devices for test in device.self_tests)

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"healthy": self.healthy}, indent=2)

    def __str__(self) -> str:
        lines = [f"torch-fused-lora {self.version}", f"  python {self.python} on {self.platform}"]
        for package, version in self.packages.items():
            tested = " (tested with {} to {})".format(*TESTED[package]) if package in TESTED else ""
            lines.append(f"  {package} {version}{tested}")
        lines += [f"  {variable}: {meaning}" for variable, meaning in self.variables.items()]
        if self.without_metal:
            lines.append(f"  {self.without_metal}")
        for device in self.devices:
            (operator, (backend, why)), *others = device.backends.items()
            lines += ["", f"{device.type}: {device.name}", f"  {operator:<12} {backend}: {why}"]
            lines += [f"  {operator:<12} {who}" for operator, (who, _) in others]
            lines.append(f"  ways         {device.ways}")
            lines.append(f"  tuned        {device.tuned}")
            lines.append(f"  dropout      {_dropout_backend(device.type)}")
            lines += [f"  {test.dtype:<12} {test}" for test in device.self_tests]
            if device.type == "mps":
                lines.append(str(self.metal))
        if isinstance(self.metal, str):
            lines += ["", f"mps: {self.metal}"]
        lines += ["", "all is well" if self.healthy else "something is wrong: see FAILED above"]
        return "\n".join(lines)


def doctor(as_json: bool = False) -> int:
    """Print the report, as text or JSON; 0 if every device that is here computes right, else 1."""
    report = examine()
    print(report.json() if as_json else report)
    return 0 if report.healthy else 1


def examine() -> Report:
    """Ask and test everything. No probe that fails keeps the others from being made."""
    system, found = _probe(System.here), _probe(devices)
    no_mps = "this torch is built without MPS, as it is everywhere but on a Mac"
    if torch.backends.mps.is_built():
        no_mps = "torch is built for it, but this system offers no Metal device"
    return Report(
        version=_version("torch-fused-lora"),
        python=platform.python_version(),
        platform=_probe(platform.platform),
        packages={package: _version(package) for package in PACKAGES},
        system=system,
        without_metal=_probe(system.without_metal) if isinstance(system, System) else None,
        variables=notable_variables(os.environ),
        devices=[_examine_device(device) for device in (found if isinstance(found, list) else [torch.device("cpu")])],
        metal=_examine_metal() if torch.backends.mps.is_available() else f"none: {no_mps}",
    )


def _examine_device(device: torch.device) -> Device:
    backends = {operator.name: backend_of(operator.name, device.type) for operator in Operator.made}
    name = str(_probe(lambda: device_name(device)))
    ways = "as `doctor --plan` says" if device.type == "mps" else str(limits_of(device.type))
    tuned = str(_probe(lambda: tuned_on(device)))
    return Device(device.type, name, backends, ways, tuned, [_run_self_test(device, dtype) for dtype in METAL_DTYPES])


def _examine_metal() -> Metal:
    name = str(_probe(torch.backends.mps.get_name))
    return Metal(
        gpu=name,
        family=gpu_family(name),
        virtual=is_virtual(name),
        cores=core_count(),
        language=str(_probe(lambda: metal_version(platform.mac_ver()[0]))),
        extension=extension.reason,
        loaded=extension.library is not None,
        compiled_kernels=extension.compiled_kernels,
        compile_seconds=extension.compile_seconds,
        contiguous_copies=extension.contiguous_copies,
    )


def _probe(ask: Callable[[], _Answer]) -> _Answer | str:
    """An answer; or, where asking fails, that it is unknown, and why."""
    try:
        return ask()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def devices() -> list[torch.device]:
    """The CPU, and the accelerator that torch finds."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        found.append(torch.device(torch.accelerator.current_accelerator().type))  # type: ignore[union-attr]
    return found


def backend_of(operator: str, device_type: str) -> tuple[str, str]:
    """(who computes an operator on a device type, why)."""
    forward = f"{operator}_forward"  # kernels are registered for it
    registered = getattr(getattr(torch.ops, NAMESPACE), forward).default.has_kernel_for_dispatch_key(
        device_type.upper()
    )
    if device_type == "mps" and extension.library is None:
        who = "mps kernels of an extension that is not ours" if registered else "none, calls raise"
        return who, f"the Metal extension is missing, {extension.reason}"
    if registered:
        return f"{device_type} kernels", "the extension is built and loaded"
    return "portable", "aten calls in the order that touches the full-width output least; no compiler needed"


def tuned_on(device: torch.device) -> str:
    """Which launch configurations are in force, and why."""
    if device.type == "cuda" and triton_kernels() is not None:
        table = tuned_layers(torch.cuda.current_device()).table
    elif device.type == "mps" and extension.tuned is not None:
        table = extension.tuned
    else:
        return "TORCH_FUSED_LORA_PLAN instead" if device.type == "mps" and extension.overrides else "nothing to tune"
    if table.entries and torch.are_deterministic_algorithms_enabled():
        return "nothing, torch.use_deterministic_algorithms(True) ignores it"
    return str(table)


def _dropout_backend(device_type: str) -> str:
    if device_type == "cpu":
        return "NumPy's Philox 4x64-10"
    if device_type == "mps":
        return "Philox 4x32-7 inside the Metal kernels"
    if device_type in ("cuda", "xpu") and _version("triton") != "not installed":
        return "Philox 4x32-7 in one Triton kernel"
    return "Philox 4x32-7 on the CPU, masks copied over (slow)"


def _run_self_test(device: torch.device, dtype: torch.dtype) -> SelfTest:
    name = str(dtype).removeprefix("torch.")
    try:
        with warnings.catch_warnings():  # torch's own, where a process's first cuBLAS call is made in backward
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
            # a backend may treat few rows in another way
            results = [self_test(device, dtype, rows, bits) for bits in (0, 4, 8) for rows in (3, 33)]
            results += row_self_test(device, dtype)
    except Exception as exception:
        return SelfTest(name, False, "unknown", "unknown", f"{type(exception).__name__}: {exception}")
    error, allowed = max(results, key=lambda result: math.inf if math.isnan(result[0]) else result[0] / result[1])
    return SelfTest(name, error <= allowed, f"{error:.1e}", f"{allowed:.1e}")  # NaN is not


def self_test(device: torch.device, dtype: torch.dtype, M: int, bits: int = 0) -> tuple[float, float]:
    """The worst error of the output and gradients of a layer of M rows against float64, and what is allowed. With bits,
    of one over packed words, which stand for numbers that every dtype holds.

    Both are relative to the largest sum of magnitudes that a result is made of. Allowed are the worst case of the
    longest float32 sum, and for a half dtype three roundings (base, low-rank product, sum).
    """
    generator = torch.Generator().manual_seed(0)
    K, N, r = 64 if bits else 65, 47, 5
    shapes = ((M, K), (N, K), (N,), (r, K), (N, r))
    exact = [torch.randn(s, generator=generator).to(dtype).double() for s in shapes]
    packed = _packed(N, K, bits, generator) if bits else None
    if packed:
        exact[1] = packed.dequantize(torch.float64)
    grad = torch.randn(M, N, generator=generator).to(dtype)

    def layer(operands: list[Tensor], call: Callable[..., Tensor], grad: Tensor) -> list[Tensor]:
        """The output, and the gradients of all operands but a packed weight."""
        leaves = [t.requires_grad_() for i, t in enumerate(operands) if not (packed and i == 1)]
        y = call(*operands, 0.5)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    def ours(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        if not packed:
            return lora_linear(x, W, b, A, B, scaling)
        words, scales, biases = (t.to(device) for t in (packed.words.view(torch.int32), packed.scales, packed.biases))
        weight = Packed(words.view(torch.uint32), scales, biases, bits, packed.group_size)  # mps copies no uint32
        return lora_linear_quantized(x, *weight[:3], b, A, B, scaling, bits=weight.bits, group_size=weight.group_size)

    found = layer([t.to(device, dtype) for t in exact], ours, grad.to(device))
    magnitudes = [t.abs() for t in exact]
    results = layer(exact, plain_lora_linear, grad.double())
    bounds = layer(magnitudes, plain_lora_linear, grad.double().abs())
    rounding = 0.0 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps / 2
    return _worst(found, results, bounds), (M + K + N + r) * 2.0**-24 + rounding


def _packed(N: int, K: int, bits: int, generator: torch.Generator) -> Packed:
    """Of random words, in groups of 32: whole numbers of few bits times a power of two."""
    words = torch.randint(256, (N, K * bits // 8), generator=generator).to(torch.uint8).view(torch.uint32)
    scales = 2.0 ** -torch.randint(bits, bits + 3, (N, K // 32), generator=generator)
    return Packed(words, scales.half(), (-(2 ** (bits - 1)) * scales).half(), bits, 32)


def row_self_test(device: torch.device, dtype: torch.dtype) -> list[tuple[float, float]]:
    """The same for rms_norm and for softmax, and what is allowed: the worst case of sums over a row, or over the rows,
    and for a half dtype one rounding, or two where the gradient is made of a rounded result."""
    generator = torch.Generator().manual_seed(0)
    M, H = 40, 65
    x, weight, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((M, H), (H,), (M, H)))
    xd, wd, gd = x.double().requires_grad_(), weight.double().requires_grad_(), grad.double()
    x, weight = (t.to(device).requires_grad_() for t in (x, weight))
    sums = 4 * (M + H) * 2.0**-24
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2

    def error(
        of: Callable, plain: Callable, ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], bounds: tuple
    ) -> float:
        y, expected = of(*ours), plain(*exact)
        found = (y.detach(), *torch.autograd.grad(y, ours, grad.to(device)))
        return _worst(found, (expected.detach(), *torch.autograd.grad(expected, exact, gd)), bounds)

    with torch.no_grad():
        rstd = torch.rsqrt(xd.square().mean(-1, keepdim=True) + 1e-6)
        normed, scaled = (xd * rstd).abs(), (gd * wd).abs()
        dx_bound = (scaled + normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
        norm_bounds = (normed * wd.abs(), dx_bound, (gd.abs() * normed).sum(0))
        p = plain_softmax(xd)
        softmax_bounds = (p, p * (gd.abs() + (p * gd.abs()).sum(-1, keepdim=True)))
    norm_error = error(rms_norm, plain_rms_norm, (x, weight), (xd, wd), norm_bounds)
    softmax_error = error(softmax, plain_softmax, (x,), (xd,), softmax_bounds)
    return [(norm_error, sums + rounding), (softmax_error, 2 * sums + 3 * rounding)]


def _worst(found: Iterable[Tensor], exact: Iterable[Tensor], bounds: Iterable[Tensor]) -> float:
    """The largest error relative to its bound; NaN if one is. Below the smallest normal number errors are absolute."""
    ratios = [
        (f.cpu().double() - e).abs() / (b + torch.finfo(f.dtype).tiny)
        for f, e, b in zip(found, exact, bounds, strict=True)
    ]
    return float(torch.stack([ratio.max() for ratio in ratios]).max())


def device_name(device: torch.device) -> str:
    """What computes: a GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()}, {core_count() or 'unknown'} cores"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
