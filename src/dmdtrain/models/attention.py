"""Which attention backend runs here, and what its queries and keys are normalised by."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn
from torch.nn import functional

AUTO = "auto"
# The fastest first: FlashAttention 3 (as soon as Diffusers gives it a backward), cuDNN's, FlashAttention 2, PyTorch's choice.
CUDA_ORDER = ("_flash_3", "_native_cudnn", "flash", "native")


def pick_attention(name: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> str:
    """`name` itself, or for auto the first of `CUDA_ORDER` that gets through a small problem in `dtype`; native on a CPU."""
    if name != AUTO:
        return name
    order = CUDA_ORDER if device.type == "cuda" else ("native",)
    return next((backend for backend in order if works(backend, device, head_dim, dtype)), "native")


def works(backend: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a forward and a backward run: what is missing shows in many ways."""
    query, key = (torch.randn(1, length, 2, head_dim, device=device, dtype=dtype) for length in (64, 96))
    query.requires_grad_()
    try:
        dispatch_attention_fn(query, key, key, backend=AttentionBackendName(backend)).sum().backward()
        return query.grad is not None and bool(torch.isfinite(query.grad).all())
    except Exception:  # each library has its own kinds
        return False


class QueryKeyNorm(nn.RMSNorm):
    """RMSNorm in its input's type. Autocast on CUDA computes it in float32 (from PyTorch 2.12 on): queries and keys would differ
    from the values in type, and cached keys take twice the memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
