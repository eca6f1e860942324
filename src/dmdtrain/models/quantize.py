"""Quantized linear layers for frozen models, made while the weights are read, one layer at a time.

int8      weight-only: each output row has its own scale, made by bitsandbytes. The weight is dequantized inside the
          matmul, so activations keep their precision, the gradient by the input is exact for the quantized weight, and
          autograd saves int8 alone.
int8-llm  bitsandbytes' Linear8bitLt: activations are int8 too, but for outlier channels (arXiv 2208.07339)
nf4       bitsandbytes' Linear4bit, with doubly quantized scales (arXiv 2305.14314)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import nn

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
    """int8 [out, in] and float32 scale [out, 1] -> [out, in]."""
    return (weight * scale).to(dtype)


class Int8Linear(nn.Linear):
    """A frozen linear layer with int8 weights [out, in] and a float32 scale per row [out, 1]; the bias is as it was."""

    scale: torch.Tensor

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
        out = _Int8Matmul.apply(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantized_linear(weight: torch.Tensor, bias: nn.Parameter | None, kind: str) -> nn.Module:
    """A frozen layer of `kind` on the weight's device. weight: [out, in]; the bias stays what it is, also if it is meta."""
    if kind == "int8":
        return Int8Linear.from_weight(weight, bias)
    size = {"input_features": weight.shape[1], "output_features": weight.shape[0], "bias": False, "device": "meta"}
    layer: nn.Module
    if kind == "nf4":
        layer = Linear4bit(**size, compute_dtype=torch.bfloat16, quant_type="nf4")
        # On some CPUs a pass without gradient would repack the weight into a form that has no backward.
        layer.support_avx512bf16_for_cpu = False
        packed = Params4bit(weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        layer = Linear8bitLt(**size, has_fp16_weights=False, threshold=OUTLIER)
        packed = Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    layer.weight = packed.to(weight.device)  # this is what quantizes
    layer.bias = bias
    return layer


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
        out = _EmptyMatmul.apply(x, self.weight, self.shape)
        return out if self.bias is None else out + self.bias.to(out.dtype)


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
        KeyError: a weight is in no file, with its name. ValueError: it has another shape than the model's.
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
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    empty = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if empty:
        raise KeyError(f"{empty[0]} ({len(empty)} in all)")
    return model.requires_grad_(False)
