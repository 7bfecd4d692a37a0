"""A frozen base in 4 or 8 bits: `nn.Linear` layers in MLX's affine format, with or without PEFT."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .affine import SCALE_DTYPES, Packed, quantize, why_not
from .ops.dispatch import PLAIN_TYPES
from .ops.lora_linear_quantized import quantized_linear
from .ops.rows import DTYPES, DTYPES_TEXT
from .report import pattern

_INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
_BLOCK = 1 << 22  # elements that are quantised at a time


class PackedWeight(nn.Module):
    """Goes before nn.Linear or nn.Embedding in the method resolution order: ``weight`` is packed words, and ``scales``
    and ``biases`` are beside it."""

    weight: Tensor
    bits: int
    group_size: int
    _kind: type[nn.Module]  # what it was

    def _hold(self, packed: Packed, dtype: torch.dtype) -> None:
        words, scales, biases, self.bits, self.group_size = packed
        self.weight = words if isinstance(words, nn.Parameter) else nn.Parameter(words, requires_grad=False)
        # Buffers: PEFT's bias="all" trains every parameter with "bias" in its name.
        self.register_buffer("scales", scales)
        self.register_buffer("biases", biases)
        self._dtype = dtype
        _guard()

    @property
    def packed(self) -> Packed:
        """The weight as the operators take it."""
        buffers: Any = self._buffers
        weight: Any = self._parameters.get("weight")
        if weight is None:  # a replica of DataParallel's, which holds it as a plain attribute
            weight = self.weight
        return Packed(weight, buffers["scales"], buffers["biases"], self.bits, self.group_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out_features, in_features) or (num_embeddings, embedding_dim), by default in the dtype that the
        layer was last moved to."""
        return self.packed.dequantize(dtype or self._dtype)

    def reset_parameters(self) -> None:
        """There is nothing to start anew: what is packed is not trained."""

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """As nn.Module's, but scales and biases keep their dtype: to it they are integers."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            if tensor is self.scales or tensor is self.biases:
                return function(tensor.view(_INTEGERS[tensor.dtype])).view(tensor.dtype)
            moved = function(tensor)
            if tensor is self.weight and moved.dtype is not tensor.dtype:
                raise TypeError(
                    "a packed layer: expected to(dtype), got type(dtype), which converts whole numbers, too"
                )
            return moved

        self._dtype = function(torch.empty(0, dtype=self._dtype, device=self.weight.device)).dtype
        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = {name: state_dict[prefix + name] for name in ("scales", "biases") if prefix + name in state_dict}
        dtypes = {saved.dtype for saved in loaded.values()}
        if len(dtypes) > 1 or not dtypes.issubset(SCALE_DTYPES):
            found = " and ".join(f"{prefix}{name} {saved.dtype}" for name, saved in loaded.items())
            args[-1].append(f"expected scales and biases of one dtype, float16, bfloat16 or float32, got {found}")
            return
        for name, saved in loaded.items():  # in the dtype that they were saved in
            setattr(self, name, getattr(self, name).to(saved.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        words = self.weight
        if id(words) not in memo:  # a head's and its embedding's are one; mps copies no uint32
            copied = words.detach().view(torch.int32).clone().view(torch.uint32)
            memo[id(words)] = nn.Parameter(copied, requires_grad=False)
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        words = self.weight.detach().view(torch.int32)  # pickle alone, without torch.save, fails on uint32
        return self.__dict__ | {"_parameters": self._parameters | {"weight": words}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        words: Any = self._parameters["weight"]
        self._parameters["weight"] = nn.Parameter(words.view(torch.uint32), requires_grad=False)
        _guard()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


class QuantLinear(PackedWeight, nn.Linear):
    """A frozen linear layer in 4 or 8 bits: ``x Wᵀ + b`` by `quantized_linear`, in x's dtype.

    ``weight`` holds W's packed words, ``scales`` and ``biases`` what they stand for (see `lora_linear_quantized`), and
    ``bias`` is as in `torch.nn.Linear`; these are the keys of ``state_dict``. ``to(dtype)``, ``half()`` and the like
    change the bias, and the dtype that `dequantize` gives, but never what W is. A layer is made of zeros, to be loaded
    into, or by `from_linear`.

    Args:
        in_features, out_features: K, a multiple of group_size, and N.
        bias: whether there is one.
        bits: 4 or 8. group_size: 32, 64 or 128 elements of a row that share a scale.
        device, dtype: as in `torch.nn.Linear`; of scales and biases, too, where the dtype is half or float32.

    Raises:
        ValueError: bits, group_size or in_features that the format does not have.
    """

    _kind = nn.Linear
    _tied_weights_keys: ClassVar = {"scales": "", "biases": ""}  # a shared head's, which Transformers need not save

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 4,
        group_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        _check_format(bits, group_size)
        if in_features % group_size:
            raise ValueError(f"in_features: expected a multiple of group_size {group_size}, got {in_features}")
        dtype = dtype or torch.get_default_dtype()
        self.in_features, self.out_features = in_features, out_features
        words = torch.zeros(out_features, in_features * bits // 32, device=device, dtype=torch.uint32)
        shape = out_features, in_features // group_size
        scales, biases = (torch.zeros(shape, device=device, dtype=_scale_dtype(dtype)) for _ in range(2))
        self._hold(Packed(words, scales, biases, bits, group_size), dtype)
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int = 4, group_size: int = 64) -> QuantLinear:
        """``linear`` in ``bits`` bits, the same as `mlx.core.quantize` gives; its bias is shared, not copied.

        Raises:
            TypeError: ``linear`` is not exactly an `nn.Linear`.
            ValueError: as the constructor; a weight that is not finite, or no plain dense tensor.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        _check_format(bits, group_size)
        _check_weight("linear", linear, group_size)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer._hold(_packed(linear.weight, bits, group_size)[0], linear.weight.dtype)
        layer.register_parameter("bias", linear.bias)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        words, scales, biases, bits, group_size = self.packed
        return quantized_linear(x, words, scales, biases, self.bias, bits, group_size)


class QuantEmbedding(PackedWeight, nn.Embedding):
    """A frozen embedding in 4 or 8 bits, of whose rows those that are looked up are dequantised, to the dtype that it
    was last moved to. `quantize_` and `load_mlx` make them, and `QuantLinear` heads that share their weight.
    """

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether a module is one that can become a `QuantEmbedding`: a plain one, or Gemma's, with ``embed_scale``."""
        plain = type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"))
        return plain and module.max_norm is None and not isinstance(module, cls)

    def forward(self, input: Tensor) -> Tensor:
        """Indices of any shape -> (..., embedding_dim)."""
        words, scales, biases, bits, group_size = self.packed
        words = words.view(torch.int32)[input].view(torch.uint32)  # mps copies no uint32
        rows = Packed(words, scales[input], biases[input], bits, group_size).dequantize(self._dtype)
        scale: Any = getattr(self, "embed_scale", 1.0)  # Gemma's is a buffer, BART's and its kin's a number
        return rows * scale.to(rows.dtype) if isinstance(scale, Tensor) else rows if scale == 1 else rows * scale


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_` did: the relative error of each layer's weight, ‖Ŵ - W‖ / ‖W‖, and the bytes of all of the
    model's parameters and buffers before and after. ``print`` shows it with a line for each kind of layer."""

    errors: dict[str, float]
    bytes_before: int
    bytes_after: int
    bits: int
    group_size: int

    def __str__(self) -> str:
        sizes = " -> ".join(f"{size / 1e6:,.1f} MB" for size in (self.bytes_before, self.bytes_after))
        first = f"{len(self.errors)} layers in {self.bits} bits, groups of {self.group_size}: {sizes}"
        kinds: dict[str, list[float]] = {}
        for name, error in self.errors.items():
            kinds.setdefault(pattern(name), []).append(error)
        width = max(map(len, kinds), default=0)
        lines = [f"  {len(of):>4} x {kind:<{width}}  error up to {max(of):.2%}" for kind, of in kinds.items()]
        return "\n".join([first, *lines])


def quantize_(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 64,
    skip: Sequence[str] = ("lm_head",),
    embeddings: bool = False,
) -> QuantizeReport:
    """Quantise, in place, every plain `nn.Linear` of ``model`` but those whose names ``skip`` has, as `QuantLinear`.

    A layer stays the object that it was, with its hooks. What PEFT adds to a layer stays as it is; a base that it has
    wrapped is quantised. All is checked first: what is refused has changed nothing.

    Args:
        model: of any kind; before or after `get_peft_model`.
        bits: 4 or 8. group_size: 32, 64 or 128, of which each layer's in_features is a multiple.
        skip: names of modules, or their last or inner parts, such as "lm_head" or "vision_tower".
        embeddings: whether embeddings become `QuantEmbedding`, and heads that share their weight a `QuantLinear` that
            shares it still, whatever ``skip`` says of these.

    Returns:
        A `QuantizeReport`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a format that is not supported; a weight, which is named, that is not finite, is shared with another
            module, has adapters merged into it, or does not divide into groups.
    """
    _check_format(bits, group_size)
    tables = dict(_layers(model, QuantEmbedding.takes, skip)) if embeddings else {}
    shared = {id(table.weight) for table in tables.values()}
    tied = tables | {name: head for name, head in _layers(model, _is_linear, ()) if id(head.weight) in shared}
    layers: dict[str, Any] = dict(_layers(model, _is_linear, skip)) | tied
    _check_shared(model, layers, tied)
    for name, layer in layers.items():
        _check_weight(name, layer, group_size)
    by_weight: dict[int, list[str]] = {}
    for name, layer in layers.items():
        by_weight.setdefault(id(layer.weight), []).append(name)
    before = _bytes(model)
    errors: dict[str, float] = {}
    for names in by_weight.values():
        weight = layers[names[0]].weight
        packed, error = _packed(weight, bits, group_size)
        packed = packed._replace(words=nn.Parameter(packed.words, requires_grad=False))
        errors |= dict.fromkeys(names, error)
        for name in names:
            become_packed(layers[name], packed, weight.dtype)
    return QuantizeReport(errors, before, _bytes(model), bits, group_size)


def become_packed(layer: Any, packed: Packed, dtype: torch.dtype) -> None:
    """Make a linear layer or an embedding a packed one, in place."""
    if isinstance(layer, nn.Linear):
        layer.__class__ = QuantLinear
    else:
        layer._kind, layer.__class__ = type(layer), QuantEmbedding
    layer._hold(packed, dtype)


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Undo `quantize_`, in place, but for what rounding took: every `QuantLinear` of ``model`` becomes an `nn.Linear`,
    and every `QuantEmbedding` what it was, with a frozen weight of ``dtype``, by default the one that the layer was
    last moved to. Layers that share their weight still do.

    Raises:
        TypeError: ``model`` is not a module.
    """
    layer: Any
    shared: dict[int, tuple[Tensor, nn.Parameter]] = {}  # by the words, which are kept so that no others get their id
    for layer in _modules(model).values():
        if type(layer) in (QuantLinear, QuantEmbedding):
            words = layer.weight
            if id(words) not in shared:
                shared[id(words)] = words, nn.Parameter(layer.dequantize(dtype), requires_grad=False)
            for name in ("scales", "biases", "bits", "group_size", "_dtype"):
                delattr(layer, name)
            layer.__class__ = layer._kind
            layer.__dict__.pop("_kind", None)
            layer.weight = shared[id(words)][1]


def _modules(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return dict(model.named_modules())


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _layers(
    model: nn.Module, takes: Callable[[nn.Module], bool], skip: Sequence[str]
) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    """The layers to quantise, by name."""
    modules = _modules(model)
    skipped = [f".{part}." for part in ([skip] if isinstance(skip, str) else skip)]
    adapters: list[str] = []  # what PEFT adds to layers that it has wrapped
    for name, module in modules.items():
        if hasattr(module, "adapter_layer_names"):  # or in their place, as modules_to_save
            if any(getattr(module, "use_dora", {}).values()):
                raise ValueError(f"{name}: DoRA reads its base's weight, which cannot be packed words: skip the layer")
            if getattr(module, "merged", False):
                raise ValueError(f"{name}: adapters are merged into its base: unmerge them first")
            adapters += [f"{name}.{part}." for part in module.adapter_layer_names]
    for name, module in modules.items():
        if takes(module) and "forward" not in module.__dict__:
            within = any(f"{name}.".startswith(prefix) for prefix in adapters)
            if not within and not any(part in f".{name}." for part in skipped):
                yield name, module


def _guard() -> None:
    from .guards import guard  # which needs this module

    guard()


def _check_format(bits: int, group_size: int) -> None:
    if (unsupported := why_not(bits, group_size)) is not None:
        name, value, expected = unsupported
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_weight(name: str, layer: nn.Linear | nn.Embedding, group_size: int) -> None:
    weight, name = layer.weight, f"{name}.weight".lstrip(".")
    if layer._parameters.get("weight") is None:
        raise ValueError(
            f"{name}: expected a parameter, got what hooks make, as of pruning or weight_norm: skip the layer"
        )
    if type(weight) not in PLAIN_TYPES or weight.layout is not torch.strided or weight.is_meta:
        raise ValueError(f"{name}: expected a plain dense tensor, got a {type(weight).__name__} on {weight.device}")
    if not weight.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {weight.dtype}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"{name}: expected {DTYPES_TEXT}, got {weight.dtype}")
    if weight.shape[1] % group_size:
        raise ValueError(
            f"{name}: expected a multiple of group_size {group_size} columns, got shape {tuple(weight.shape)}; "
            "skip the layer or choose another group_size"
        )
    if weight.numel() == 0:
        raise ValueError(f"{name}: expected elements, got shape {tuple(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    low, high = map(float, weight.detach().aminmax())
    if high - low > torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: expected a range that float32 has, got {low} to {high}")


def _check_shared(model: nn.Module, layers: dict[str, Any], tied: Iterable[str]) -> None:
    """Refuse weights that another module holds, too, but for those that are tied and quantised as one."""
    owners: dict[int, set[str]] = {}
    for name, module in _modules(model).items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(name)
    for name, layer in layers.items():
        others = owners.get(id(layer.weight), set()) - {name, *tied}
        if others:
            raise ValueError(f"{name}.weight: shared with {', '.join(sorted(others))}; skip the layer, or untie them")


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in SCALE_DTYPES else torch.float32


def _packed(weight: Tensor, bits: int, group_size: int) -> tuple[Packed, float]:
    """As `quantize`, a block of rows at a time; and ‖Ŵ - W‖ / ‖W‖."""
    blocks: list[Packed] = []
    difference = total = 0.0
    for block in weight.detach().split(max(_BLOCK // max(weight.shape[1], 1), 1)):
        blocks.append(quantize(block.to(_scale_dtype(block.dtype)), bits, group_size))
        block = block.float()
        difference += float((blocks[-1].dequantize(torch.float32) - block).square().sum())
        total += float(block.square().sum())
    words = torch.cat([block.words.view(torch.int32) for block in blocks]).view(torch.uint32)  # few take uint32
    scales, biases = (torch.cat([getattr(block, name) for block in blocks]) for name in ("scales", "biases"))
    return Packed(words, scales, biases, bits, group_size), (difference / total) ** 0.5 if total else 0.0


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
