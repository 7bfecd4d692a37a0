"""``python -m torch_fused_lora doctor``: what is installed, who computes on each device, and does it compute right."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from .mps import extension
from .ops.library import NAMESPACE, has_kernel
from .ops.lora_linear import lora_linear
from .ops.rms_norm import rms_norm
from .ops.softmax import softmax


def doctor() -> int:
    """Print the report; 0 if every device that is here computes right, else 1."""
    print(f"torch-fused-lora {_version('torch-fused-lora')}")
    print(f"  python {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "peft", "transformers", "numpy"):
        print(f"  {package} {_version(package)}")
    healthy = True
    for device in devices():
        print(f"\n{device}: {device_name(device)}")
        backend, why = backend_of("lora_linear", device.type)
        print(f"  lora_linear  {backend}: {why}")
        print(f"  rms_norm     {backend_of('rms_norm', device.type)[0]}")
        print(f"  softmax      {backend_of('softmax', device.type)[0]}")
        print(f"  dropout      {_dropout_backend(device.type)}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            healthy &= _report_self_test(device, dtype)
        if device.type == "mps":
            print(f"  extension    {extension.reason}; in this process {extension.compiled_kernels} kernels compiled")
            print(f"  copies       {extension.contiguous_copies} operands of a layout that no kernel reads")
    if not torch.backends.mps.is_available():
        print(f"\nmps: {_why_no_mps()}")
    print("\nall is well" if healthy else "\nsomething is wrong: see FAILED above")
    return 0 if healthy else 1


def devices() -> list[torch.device]:
    """The CPU, and the accelerator that torch finds."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        found.append(torch.device(torch.accelerator.current_accelerator().type))  # type: ignore[union-attr]
    return found


def backend_of(operator: str, device_type: str) -> tuple[str, str]:
    """(who computes an operator on a device type, why)."""
    private = operator if operator == "softmax" else f"_{operator}"  # the one that kernels are registered for
    if has_kernel(f"{NAMESPACE}::{private}", device_type.upper()):
        return f"{device_type} kernels", "the extension is built and loaded"
    if device_type == "mps":
        return "none, calls raise", f"the Metal extension is missing, {extension.reason}"
    return "portable", "aten calls in the order that touches the full-width output least; no compiler needed"


def _dropout_backend(device_type: str) -> str:
    if device_type == "cpu":
        return "Philox 4x32-10 in NumPy"
    if device_type == "mps":
        return "Philox 4x32-10 inside the Metal kernels"
    if device_type in ("cuda", "xpu") and _version("triton") != "not installed":
        return "Philox 4x32-10 in one Triton kernel"
    return "Philox 4x32-10 on the CPU, masks copied over (slow)"


def _report_self_test(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        with warnings.catch_warnings():  # torch's own, where a process's first cuBLAS call is made in backward
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
            # a backend may treat few rows in another way
            results = [self_test(device, dtype, rows) for rows in (3, 33)]
            results += row_self_test(device, dtype)
    except Exception as exception:
        print(f"  {str(dtype).removeprefix('torch.'):<12} FAILED: {type(exception).__name__}: {exception}")
        return False
    error, allowed = max(results, key=lambda result: math.inf if math.isnan(result[0]) else result[0] / result[1])
    passed = error <= allowed  # NaN is not
    verdict = "ok" if passed else "FAILED"
    print(f"  {str(dtype).removeprefix('torch.'):<12} {verdict}: error {error:.1e}, {allowed:.1e} allowed")
    return passed


def self_test(device: torch.device, dtype: torch.dtype, M: int) -> tuple[float, float]:
    """The worst error of the output and gradients of a layer of M rows against float64, and what is allowed.

    Both are relative to the largest sum of magnitudes that a result is made of. Allowed are the worst case of the
    longest float32 sum, and for a half dtype three roundings (base, low-rank product, sum).
    """
    generator = torch.Generator().manual_seed(0)
    K, N, r = 65, 47, 5
    shapes = ((M, K), (N, K), (N,), (r, K), (N, r))
    exact = [torch.randn(s, generator=generator).to(dtype).double().requires_grad_() for s in shapes]
    ours = [t.detach().to(device, dtype).requires_grad_() for t in exact]
    grad = torch.randn(M, N, generator=generator).to(dtype)

    x, W, b, A, B = exact
    expected = x @ W.T + b + 0.5 * (x @ A.T) @ B.T
    results = [expected.detach(), *torch.autograd.grad(expected, exact, grad.double())]
    magnitudes = [t.detach().abs().requires_grad_() for t in exact]
    x, W, b, A, B = magnitudes
    bound = x @ W.T + b + 0.5 * (x @ A.T) @ B.T
    bounds = [bound.detach(), *torch.autograd.grad(bound, magnitudes, grad.abs().double())]

    x, W, b, A, B = ours
    y = lora_linear(x, W, b, A, B, 0.5)
    found = [y.detach(), *torch.autograd.grad(y, ours, grad.to(device))]
    error = _worst(found, results, bounds)
    rounding = 0.0 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps / 2
    return error, (M + K + N + r) * 2.0**-24 + rounding


def row_self_test(device: torch.device, dtype: torch.dtype) -> list[tuple[float, float]]:
    """The same for rms_norm and for softmax, and what is allowed: the worst case of sums over a row, or over the rows,
    and for a half dtype one rounding, or two where the gradient is made of a rounded result."""
    generator = torch.Generator().manual_seed(0)
    M, H, eps = 40, 65, 1e-6
    x, weight, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((M, H), (H,), (M, H)))
    xd, wd, gd = x.double(), weight.double(), grad.double()
    x, weight = (t.to(device).requires_grad_() for t in (x, weight))
    sums = 4 * (M + H) * 2.0**-24
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2

    y = rms_norm(x, weight, eps)
    rstd = torch.rsqrt(xd.square().mean(-1, keepdim=True) + eps)
    normed, scaled = xd * rstd, gd * wd
    exact = (normed * wd, (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd, (gd * normed).sum(0))
    dx_bound = (scaled.abs() + normed.abs() * (scaled * normed).abs().mean(-1, keepdim=True)) * rstd
    bounds = ((normed * wd).abs(), dx_bound, (gd * normed).abs().sum(0))
    norm_error = _worst((y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(device))), exact, bounds)

    p = softmax(x)
    exact_p = torch.softmax(xd, -1)
    dot, dot_bound = ((exact_p * g).sum(-1, keepdim=True) for g in (gd, gd.abs()))
    found = (p.detach(), *torch.autograd.grad(p, x, grad.to(device)))
    softmax_error = _worst(found, (exact_p, exact_p * (gd - dot)), (exact_p, exact_p * (gd.abs() + dot_bound)))
    return [(norm_error, sums + rounding), (softmax_error, 2 * sums + 3 * rounding)]


def _worst(found: Iterable[Tensor], exact: Iterable[Tensor], bounds: Iterable[Tensor]) -> float:
    """The largest error relative to its bound; NaN if one is. Below the smallest normal number errors are absolute."""
    ratios = [
        (f.cpu().double() - e).abs() / (b + torch.finfo(f.dtype).tiny)
        for f, e, b in zip(found, exact, bounds, strict=True)
    ]
    return float(torch.stack([ratio.max() for ratio in ratios]).max())


def _why_no_mps() -> str:
    if torch.backends.mps.is_built():
        return "none: torch is built for it, but this system offers no Metal device"
    return "none: this torch is built without MPS, as it is everywhere but on a Mac"


def device_name(device: torch.device) -> str:
    """What computes: a GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()}, {torch.backends.mps.get_core_count()} cores"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
