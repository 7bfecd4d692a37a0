"""The executor on Metal that nobody here wrote: kernels of MLX, instantiated from the headers of its macOS wheel.

The wheel is downloaded to the executor's cache and never becomes part of this repository. Bounds are those of rounding,
with u = 2^-24 of float sums: a sum of K products in any order is off by at most (K + 1) u sum |a b|; the result is
rounded once more to its own type.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.emulator import metal_on_cpu as moc
from tests.emulator.metal_on_cpu.toolchain import cache_folder

WHEEL = "mlx-metal==0.32.4"
KERNELS = "mlx/backend/metal/kernels"
# Metal's own bfloat functions, written with builtins of Apple's compiler: those of the shim stand in.
LEFT_OUT = {f"{KERNELS}/bf16_math.h"}
TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16_t"}
FLOAT_ROUNDING = 2.0**-24


@cache
def include_folder() -> Path:
    """The wheel's headers, downloaded once; skips the test where the package index cannot be reached."""
    folder = cache_folder() / WHEEL.replace("==", "-")
    if not folder.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            platform = ["--only-binary=:all:", "--platform", "macosx_14_0_arm64"]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform, "-d", scratch, WHEEL]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"pip cannot download {WHEEL}: {done.stderr.strip().splitlines()[-1]}")
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                wheel.extractall(f"{scratch}/wheel", [name for name in wheel.namelist() if name.endswith(".h")])
            shutil.move(f"{scratch}/wheel", folder)
    return folder / "mlx/include"


def inlined(header: str, seen: set[str]) -> str:
    """A header with those it includes in their places; Metal's compiler reads ASCII only."""
    if header in seen:
        return ""
    seen.add(header)
    text = (include_folder() / header).read_text().encode("ascii", "replace").decode()
    text = re.sub(r"^#pragma once$", "", text, flags=re.MULTILINE)
    return re.sub(r'^#include "(.*)"$', lambda match: inlined(match[1], seen), text, flags=re.MULTILINE)


def kernel(headers: list[str], function: str, dtype: torch.dtype, arguments: str) -> moc.Kernel:
    """The kernel ``function<dtype, arguments>`` with all function constants false."""
    seen = set(LEFT_OUT)
    source = "\n".join(inlined(f"{KERNELS}/{header}", seen) for header in ["utils.h", *headers])
    source = re.sub(r"\[\[function_constant\(\d+\)\]\];", "= false;", source)
    source = re.sub(r", function_constant\(\w+\)\]\]", "]]", source)
    source += f'\ninstantiate_kernel("{function}", {function}, {TYPES[dtype]}, {arguments})\n'
    return moc.compile(source, "mlx")[function]


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within(y: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """|y - expected| is at most ``bound`` (of the float sums) and one rounding to y's type."""
    info = torch.finfo(y.dtype)
    rounding = info.eps / 2 * (expected.abs() + bound) + info.smallest_normal * info.eps / 2
    error = (y.double() - expected).abs()
    assert bool((error <= bound + rounding).all()), f"error is {(error / (bound + rounding)).max():.3g} of its bound"


def product_bound(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.shape[-1] + 1) * FLOAT_ROUNDING * (a.double().abs() @ b.double().abs())


def integers(*values: int) -> bytes:
    return struct.pack(f"{len(values)}i", *values)


each_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)


@each_dtype
def test_steel_gemm(dtype: torch.dtype) -> None:
    """a bᵀ in tiles of 32 x 32 x 16 by 2 x 2 simdgroups; no extent is a multiple of its tile."""
    M, N, K = 70, 45, 37
    a, b, y = numbers(M, K, dtype=dtype, seed=1), numbers(N, K, dtype=dtype, seed=2), torch.empty(M, N, dtype=dtype)
    tiles_n, tiles_m = -(-N // 32), -(-M // 32)
    parameters = struct.pack("8i3q3i4x", M, N, K, K, K, N, tiles_n, tiles_m, 0, 0, 0, 0, K // 16, 0)
    headers = ["steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"]
    gemm = kernel(headers, "gemm", dtype, "32, 32, 16, 2, 2, false, true, float")
    gemm.dispatch(
        threads=(tiles_n * 32, tiles_m * 2, 2),
        group=(32, 2, 2),
        arguments=[a, b, None, y, parameters, None, None, None],
    )
    assert_within(y, a.double() @ b.double().T, product_bound(a, b.T))


@each_dtype
def test_gemv(dtype: torch.dtype) -> None:
    """A matrix times a vector, sixteen rows a threadgroup; neither extent is a multiple of its tile."""
    M, K = 101, 333
    a, x, y = numbers(M, K, dtype=dtype, seed=3), numbers(K, dtype=dtype, seed=4), torch.empty(M, dtype=dtype)
    no_stride = struct.pack("q", 0)
    arguments = [a, x, None, y, integers(K), integers(M), integers(K), None, None, integers(1), integers(1)]
    gemv = kernel(["gemv.h"], "gemv", dtype, "4, 1, 1, 32, 4, 4, false, false")
    gemv.dispatch(
        threads=(-(-M // 16) * 32, 1, 4), group=(32, 1, 4), arguments=[*arguments, no_stride, no_stride, None, None]
    )
    assert_within(y, a.double() @ x.double(), product_bound(a, x))


@each_dtype
def test_softmax(dtype: torch.dtype) -> None:
    """A row a threadgroup, four elements a thread, exponentials and sums in float.

    exp(x - max) is off by the rounding of x - max, up to |x - max| u, and by the exponential's own error, 2 u. The sum
    of positive terms adds one u an addition on the way of a term, here 4 in a thread, 5 and 5 in two simdgroup sums;
    its reciprocal and the product with it add 2 u.
    """
    rows, columns = 5, 1001
    x, y = 4 * numbers(rows, columns, dtype=dtype, seed=5), torch.empty(rows, columns, dtype=dtype)
    group = -(-columns // 128) * 32
    softmax = kernel(["softmax.h"], "softmax_single_row", dtype, "float")
    softmax.dispatch(threads=(rows * group, 1, 1), group=(group, 1, 1), arguments=[x, y, integers(columns)])
    expected = x.double().softmax(-1)
    spread = (x.amax(-1, keepdim=True) - x).double().amax(-1, keepdim=True)
    assert_within(y, expected, (2 * (spread + 2) + 14 + 2) * FLOAT_ROUNDING * expected)
