"""Which attention backend runs here, and what its queries and keys are normalised by."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn
from torch.nn import functional

from dmdtrain.config import ConfigError
from dmdtrain.models.block import by_piece

AUTO = "auto"
BACKENDS = tuple(
    backend.value for backend in AttentionBackendName if "sage" not in backend.value
)  # that has no backward
# The fastest first: FlashAttention 3 (as soon as Diffusers gives it a backward), cuDNN's, FlashAttention 2, PyTorch's choice.
CUDA_ORDER = ("_flash_3", "_native_cudnn", "flash", "native")


def pick_attention(name: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> str:
    """`name` itself, or for auto the first of `CUDA_ORDER` that gets through a small problem in `dtype`; native on a CPU.

    Raises:
        ConfigError: `name` does not get through it.
    """
    if name == AUTO:
        order = CUDA_ORDER if device.type == "cuda" else ("native",)
        return next((backend for backend in order if works(backend, device, head_dim, dtype)), "native")
    if reason := why_not(name, device, head_dim, dtype):
        kind = f"{device.type} in {str(dtype).removeprefix('torch.')} with heads of {head_dim}"
        raise ConfigError(f"model.attention: {name} can not train on {kind}: {reason}; auto takes what can")
    return name


def works(backend: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    return why_not(backend, device, head_dim, dtype) is None


def why_not(backend: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """What keeps a backend from a forward and a backward, in a line: it shows in many ways. None: both run."""
    shapes = [(1, length, 2, head_dim) for length in (64, 96, 96)]
    own = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(s, generator=own, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    try:
        with attention_backend(backend):  # it says which package is missing, and fetches kernels of the hub
            out = dispatch_attention_fn(*inputs)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out)) if out.requires_grad else ()
        if gradients and all(torch.isfinite(gradient).all() for gradient in gradients):
            return None
        return "its gradient is not finite" if gradients else "it has no backward"
    except Exception as error:  # each library has its own kinds
        return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")


class QueryKeyNorm(nn.RMSNorm):
    """RMSNorm in its input's type. Autocast on CUDA computes it in float32 (from PyTorch 2.12 on): queries and keys would differ
    from the values in type, and cached keys take twice the memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # CUDA's fused kernel keeps x alone for backward; what serves on a CPU would keep float32 copies of it.
        return self._norm(x) if x.is_cuda else by_piece(self._norm, x)

    def _norm(self, x: torch.Tensor, _: Any = None) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def norm_queries_and_keys(model: nn.Module) -> None:
    """Makes the norms of a Wan's queries and keys `QueryKeyNorm`s, in place, with the weights that they have."""
    for attention in (m for m in model.modules() if isinstance(m, WanAttention)):
        for name in ("norm_q", "norm_k"):
            old = getattr(attention, name)
            norm = QueryKeyNorm(old.normalized_shape, old.eps, device="meta")
            norm.weight = old.weight
            setattr(attention, name, norm)
