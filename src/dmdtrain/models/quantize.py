"""Quantized linear layers for frozen models, made while the weights are read, one layer at a time.

int8      weight-only: each output row has its own scale, made by bitsandbytes. The weight is dequantized inside the
          matmul, so activations keep their precision, the gradient by the input is exact for the quantized weight, and
          autograd saves int8 alone.
int8-llm  bitsandbytes' Linear8bitLt: activations are int8 too, but for outlier channels (arXiv 2208.07339)
nf4       bitsandbytes' Linear4bit, with doubly quantized scales (arXiv 2305.14314)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from dmdtrain.models.checks import check_finite

KINDS = ("int8", "int8-llm", "nf4")
OUTLIER = 6.0  # activations above it keep their precision in int8-llm, as its paper has it


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ dequantize(weight, scale, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ dequantize(weight, scale, grad.dtype), None, None


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [..., n] and float32 scale [..., 1] -> [..., n], through no copy in float32."""
    if torch.compiler.is_compiling():  # which fuses it
        return (weight * scale).to(dtype)
    return torch.mul(weight, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


def int8_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x @ dequantize(weight).T in int8, x [..., in] rounded with a scale per token (its largest element is 127)."""
    rows = Int8Tensor.of(x.flatten(0, -2))
    product = torch._int_mm(rows.values, weight.T)
    return (product * rows.scale * scale.T).to(x.dtype).unflatten(0, x.shape[:-1])


def may_round(x: torch.Tensor) -> bool:
    """Whether `int8_matmul` serves x: without gradient, and as large as cuBLAS takes it."""
    return not torch.is_grad_enabled() and x.numel() > 16 * x.shape[-1]


def _plus(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return out if bias is None else out + bias.to(out.dtype)


class Int8Linear(nn.Linear):
    """A frozen linear layer with int8 weights [out, in] and a float32 scale per row [out, 1]; the bias is as it was.

    `multiply_in_int8` makes passes without gradient faster at the cost of rounding the activations: see `int8_matmul`.
    """

    scale: torch.Tensor
    multiply_in_int8 = False

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: nn.Parameter | None) -> Int8Linear:
        layer = cls(weight.shape[1], weight.shape[0], bias=False, device="meta")
        quantized, row_max, _ = int8_vectorwise_quant(weight.to(torch.float16))
        layer.weight = nn.Parameter(quantized, requires_grad=False)
        layer.register_buffer("scale", row_max.float().view(-1, 1) / 127)
        layer.bias = bias
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.multiply_in_int8 and may_round(x):
            out = int8_matmul(x, self.weight, self.scale)
        else:
            out = _Int8Matmul.apply(x, self.weight, self.scale)
        return _plus(out, self.bias)


@dataclass(frozen=True)
class Int8Tensor:
    """A tensor in int8 with a float32 scale for each vector of its last axis."""

    values: torch.Tensor
    scale: torch.Tensor  # [..., 1]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor) -> Int8Tensor:
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return cls((x / scale).round().to(torch.int8), scale, x.dtype)

    def get(self) -> torch.Tensor:
        return dequantize(self.values, self.scale, self.dtype)

    def prefetch(self) -> None:
        """Is there already."""


def multiply_in_int8(model: nn.Module) -> None:
    """Passes without gradient of a model's int8 layers multiply in int8 from now on, those of streamed ones, too."""
    for layer in model.modules():
        if hasattr(layer, "multiply_in_int8"):
            layer.multiply_in_int8 = True  # type: ignore[assignment]


@dataclass(frozen=True)
class Unloaded:
    """A frozen layer without its stored weight, which is given for each use: what it computes is the layer's own to the bit."""

    dense: Callable[[torch.Tensor, torch.dtype], torch.Tensor]  # stored -> [out, in] of a dtype
    product: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
    ]  # of x, stored and bias, as x's dtype
    rounded: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None  # `int8_matmul` of x and stored
    dtype: torch.dtype | None = None  # that it computes in, whatever x is; None: in x's


def unloaded(linear: nn.Linear, device: torch.device) -> Unloaded:
    """What a layer computes on `device` with its stored weight."""
    if isinstance(linear, Linear4bit):
        state = linear.weight.quant_state
        state.to(device)
        return Unloaded(
            lambda weight, dtype: dequantize_4bit(weight, state).to(dtype),
            lambda x, weight, bias: matmul_4bit(x, weight, state, bias=bias),
            dtype=torch.bfloat16,
        )
    if isinstance(linear, Int8Linear):
        scale = linear.scale.to(device)
        return Unloaded(
            lambda weight, dtype: dequantize(weight, scale, dtype),
            lambda x, weight, bias: _plus(x @ dequantize(weight, scale, x.dtype).T, bias),
            lambda x, weight: int8_matmul(x, weight, scale),
        )
    if isinstance(linear, _EmptyNf4):
        shape = linear.shape
        return Unloaded(
            lambda weight, dtype: torch.empty(shape, dtype=dtype),
            lambda x, weight, bias: _plus(x @ torch.empty(shape, dtype=x.dtype).T, bias),
            dtype=torch.bfloat16,
        )
    return Unloaded(
        lambda weight, dtype: weight.to(dtype),
        lambda x, weight, bias: functional.linear(x, weight.to(x.dtype), bias),
    )


def quantized_linear(weight: torch.Tensor, bias: nn.Parameter | None, kind: str) -> nn.Module:
    """A frozen layer of `kind` on the weight's device. weight: [out, in]; the bias stays what it is, also if it is meta."""
    if kind == "int8":
        return Int8Linear.from_weight(weight, bias)
    size = {"input_features": weight.shape[1], "output_features": weight.shape[0], "bias": False}
    layer: nn.Module
    if kind == "nf4":
        layer = _empty_linear4bit(size)
        packed = Params4bit(weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        codes, row_max, _ = int8_vectorwise_quant(weight.to(torch.float16))
        layer = LlmInt8Linear(**size, device="meta", has_fp16_weights=False, threshold=OUTLIER)
        packed = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=row_max)
    layer.weight = packed.to(weight.device)  # this is what quantizes to nf4
    layer.bias = bias
    return layer


class LlmInt8Linear(Linear8bitLt):
    """bitsandbytes' layer, whose weight can be moved in place, as `Module.to` does it: the tensors that the kernel reads go
    with it."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LlmInt8Linear:
        super()._apply(fn, recurse)
        for holder in (self.weight, self.state):
            if holder.CB is not None:
                holder.CB, holder.SCB = self.weight.data, fn(holder.SCB)
        return self


class _EmptyNf4(nn.Linear):
    """The size and the memory behaviour of nf4, without values: for plans."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        count, blocks = linear.weight.numel(), -(-linear.weight.numel() // 64)
        self.shape = linear.weight.shape
        self.weight = nn.Parameter(torch.empty(-(-count // 2), dtype=torch.uint8, device="meta"), requires_grad=False)
        self.register_buffer("absmax", torch.empty(blocks + 4 * -(-blocks // 256), dtype=torch.uint8, device="meta"))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _plus(_EmptyMatmul.apply(x, self.weight, self.shape), self.bias)


class _EmptyMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = shape
        return x @ torch.empty(shape, dtype=x.dtype, device=x.device).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device), None, None


def empty_quantized(linear: nn.Linear, kind: str) -> nn.Module:
    """A layer as `quantized_linear` would make it, on the meta device: sizes without values."""
    if kind == "nf4":
        return _EmptyNf4(linear)
    layer = Int8Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.int8, device="meta"), requires_grad=False)
    layer.register_buffer("scale", torch.empty(linear.out_features, 1, device="meta"))
    layer.bias = linear.bias
    return layer


def load_quantized(
    build: Callable[[], nn.Module],
    files: list[Path],
    kind: str,
    inside: str,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """A model whose linear layers inside a submodule are quantized as they are read: the whole of it in `dtype` never exists.

    Args:
        build: makes the model; its weights stay empty. files: safetensors. inside: the submodule's name; "": all of it.
        dtype: of what is not quantized, but for what a `WanTransformer3DModel` keeps in float32. device: where layers are
            quantized and stay.

    Raises:
        KeyError: a weight is in no file, with its name. ValueError: it has another shape than the model's, or is not finite.
    """
    with init_empty_weights():
        model = build()
    special = set(getattr(model, "_keep_in_fp32_modules", None) or [])
    # Transformers means float16 by that list and loads those layers in bf16 as they are; UMT5 casts by their weight's type.
    special_dtype = torch.float32 if isinstance(model, WanTransformer3DModel) else dtype
    for file in files:
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (it is no dict)
                owner, _, name = key.rpartition(".")
                try:
                    layer = model.get_submodule(owner)
                    wanted = getattr(layer, name).shape
                except AttributeError:
                    continue  # of a part that this model does not have
                value = handle.get_tensor(key)
                check_finite(key, value)
                if value.shape != wanted:
                    raise ValueError(f"{key} is {list(value.shape)}; the model wants {list(wanted)}")
                is_special = bool(special & set(key.split(".")))
                chosen = type(layer) is nn.Linear and name == "weight" and owner.startswith(inside)
                if chosen and not is_special:
                    parent, _, child = owner.rpartition(".")
                    quantized = quantized_linear(value.to(device), layer.bias, kind)
                    setattr(model.get_submodule(parent), child, quantized)
                else:
                    kept = special_dtype if is_special else dtype
                    set_module_tensor_to_device(model, key, device, value, dtype=kept)
    if hasattr(model, "tie_weights"):  # either of two names may be in the files
        model.tie_weights(
            missing_keys={name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
        )
    empty = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if empty:
        raise KeyError(f"{empty[0]} ({len(empty)} in all)")
    return model.requires_grad_(False)


def read_quantized(build: Callable[[], nn.Module], tensors: dict[str, torch.Tensor], kind: str) -> nn.Module:
    """A model from the state dict of one that `load_quantized` made."""
    with init_empty_weights():
        model = build()
    for name, layer in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        mine = {key: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        beside = {key: value for key, value in tensors.items() if key.startswith(f"{prefix}weight.")}
        weight = mine.get(f"{prefix}weight")
        if type(layer) is nn.Linear and weight is not None and (beside or weight.dtype == torch.int8):
            parent, _, child = name.rpartition(".")
            layer = stored_linear(layer, kind, weight, {k.removeprefix(prefix): v for k, v in (mine | beside).items()})
            setattr(model.get_submodule(parent), child, layer)
        for own in list(layer._parameters):
            if layer._parameters[own] is not None and layer._parameters[own].is_meta:  # type: ignore[union-attr]
                layer._parameters[own] = nn.Parameter(tensors[f"{prefix}{own}"], requires_grad=False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.requires_grad_(False)


def stored_linear(linear: nn.Linear, kind: str, weight: torch.Tensor, beside: dict[str, torch.Tensor]) -> nn.Module:
    """The quantized layer whose state dict was `weight` and what is `beside` it."""
    size = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": False}
    layer: nn.Module
    if kind == "int8":
        layer = Int8Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_buffer("scale", beside["scale"])
    elif kind == "nf4":
        layer = _empty_linear4bit(size)
        stats = {key.removeprefix("weight."): value for key, value in beside.items() if key.startswith("weight.")}
        layer.weight = Params4bit.from_prequantized(weight, stats, device=weight.device)
    else:
        layer = LlmInt8Linear(**size, device="meta", has_fp16_weights=False, threshold=OUTLIER)
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=beside["SCB"])
    layer.bias = linear.bias
    return layer


def _empty_linear4bit(size: dict[str, Any]) -> Linear4bit:
    layer = Linear4bit(**size, device="meta", compute_dtype=torch.bfloat16, quant_type="nf4")
    # On some CPUs a pass without gradient would repack the weight into a form that has no backward.
    layer.support_avx512bf16_for_cpu = False
    return layer
