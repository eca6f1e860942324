"""Weight-only int8 linear layers for frozen models.

Each output row has its own scale, made by bitsandbytes. The weight is dequantized inside the matmul, so activations keep
their precision, the gradient by the input is exact for the quantized weight, and autograd saves int8 alone.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import nn


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
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        quantized, row_max, _ = int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
        layer.weight = nn.Parameter(quantized, requires_grad=False)
        layer.register_buffer("scale", row_max.float().view(-1, 1) / 127)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = _Int8Matmul.apply(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantize_linears(module: nn.Module) -> None:
    """Replaces every linear layer inside `module`, one at a time, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear.from_linear(child))
