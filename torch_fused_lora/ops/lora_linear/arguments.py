"""What lora_linear, lora_linear_quantized and lora_delta check, and convert, of the arguments that they share."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ...torch_private import dispatch_modes
from ..dispatch import BY_DISPATCHER, BY_PORTABLE, Floats, Ints, Maybe, Route, Seed
from ..dropout import draw_seed
from ..rows import DTYPES, DTYPES_TEXT, HALF, wide_dtype

_FLOAT32 = torch.float32  # read faster


def check_types(dropout_p: float, **tensors: Tensor) -> None:
    """Raise TypeError for what is no tensor or no number, ValueError for what is no probability of dropping."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if not isinstance(dropout_p, (float, numbers.Real)):  # float first: to ask an abstract class is slow
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def call_options(
    x: Tensor, way: Route, scaling: float | Tensor, dropout_p: Floats, ranks: Ints
) -> tuple[float | Tensor, Seed, Floats, Ints]:
    """Scaling, a fresh seed if anything drops, probabilities and ranks of a call. A portable kernel takes numbers as
    they are."""
    portable = way is BY_PORTABLE
    if type(scaling) is not float or way is BY_DISPATCHER:
        scaling = as_scaling(scaling, x)
    elif not portable:  # no mode watches, no compiler
        scaling = _cached_scalar(scaling, wide_dtype(x.dtype))
    return (scaling, draw_seed(x, portable), dropout_p, ranks) if any(dropout_p) else (scaling, None, (), ())


def as_scaling(scaling: float | Tensor, x: Tensor) -> Tensor:
    """`scaling` as the operator takes it: a 0-dim float32 tensor (float64 beside float64)."""
    wanted = wide_dtype(x.dtype)
    if isinstance(scaling, Tensor):
        return scaling if scaling.dtype == wanted or not scaling.is_floating_point() else scaling.to(wanted)
    if not isinstance(scaling, (float, numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scaling: expected a number or a 0-dim Tensor, got {type(scaling).__name__}")
    if torch.compiler.is_compiling():
        # `full` keeps a float that changes from call to call symbolic, torch.tensor(scaling) recompiles. A CPU tensor
        # would keep CUDA graphs from being captured; the kernels of mps read one while they are encoded.
        return torch.full((), scaling, dtype=wanted, device=x.device if x.device.type == "cuda" else "cpu")
    if dispatch_modes() > 0:  # a mode may wrap new tensors: keep them out of the cache
        return torch.tensor(scaling, dtype=wanted, device="cpu")
    return _cached_scalar(scaling, wanted)


@functools.lru_cache(maxsize=1024)
def _cached_scalar(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def check_adapters(refuse: Callable[..., NoReturn], name: str, like: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Their dtypes beside that of ``like``, the operand of the full width."""
    dtype, adapter_dtype = like.dtype, lora_A.dtype
    if adapter_dtype is not dtype and not (adapter_dtype is _FLOAT32 and dtype in HALF):
        refuse("lora_A", lora_A, f"{name}'s dtype {dtype}" + (" or torch.float32" if dtype in HALF else ""))
    if lora_B.dtype is not adapter_dtype:
        refuse("lora_B", lora_B, f"lora_A's dtype {adapter_dtype}")


def check_options(
    refuse: Callable[..., NoReturn],
    name: str,
    like: Tensor,
    scaling: float | Tensor,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    r: int,
) -> None:
    """Scaling and what concerns dropout, of rank r in all."""
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0 or not scaling.is_floating_point():
            refuse("scaling", scaling, "a 0-dim floating tensor")
        if not scaling.is_cpu and scaling.device != like.device:
            refuse("scaling", scaling, f"a tensor on the CPU or on {name}'s device {like.device}")
    if seed is None:
        return
    if isinstance(seed, Tensor) and (
        seed.shape != () or seed.dtype != torch.int64 or not (seed.is_cpu or seed.device == like.device)
    ):
        refuse("seed", seed, f"a 0-dim int64 tensor on the CPU or on {name}'s device {like.device}")
    if not all(0.0 <= p < 1.0 for p in dropout_p):
        refuse("dropout_p", list(dropout_p), "probabilities in [0, 1)")
    got_ranks = list(ranks) or [r]
    if sum(got_ranks) != r or len(got_ranks) != len(dropout_p):
        refuse("ranks", got_ranks, f"one rank for each of the {len(dropout_p)} dropout_p, {r} in all")


def check_low_rank(
    refuse: Callable[..., NoReturn], grad: Tensor, lora_A: Tensor, lora_B: Tensor
) -> tuple[int, int, int]:
    """N, K and r of a backward: the shapes of the adapters, and grad's beside them."""
    if grad.dtype not in DTYPES:
        refuse("grad", grad, DTYPES_TEXT)
    if lora_A.dim() != 2 or lora_A.shape[0] < 1:
        refuse("lora_A", lora_A, "shape (r, K) with r >= 1")
    r, K = lora_A.shape
    if lora_B.dim() != 2 or lora_B.shape[1] != r:
        refuse("lora_B", lora_B, f"shape (N, {r}), since lora_A is ({r}, {K})")
    N = lora_B.shape[0]
    if grad.dim() < 1 or grad.shape[-1] != N:
        refuse("grad", grad, f"shape (..., {N}), since lora_B is ({N}, {r})")
    return N, K, r


def check_saved(
    refuse: Callable[..., NoReturn], name: str, value: Maybe, shape: Sequence[int], like_name: str, like: Tensor
) -> None:
    """An operand of a backward that was saved for it: its dtype and device are those of ``like``."""
    if value is None or value.shape != shape or value.dtype != like.dtype or value.device != like.device:
        refuse(name, value, f"shape {tuple(shape)}, {like_name}'s dtype {like.dtype} and device {like.device}")


def check_devices(refuse: Callable[..., NoReturn], name: str, like: Tensor, **tensors: Maybe) -> None:
    for other, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            refuse(other, tensor, f"{name}'s device {like.device}")
