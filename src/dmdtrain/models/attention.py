"""Which attention backend runs here."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

AUTO = "auto"
# The fastest first: FlashAttention 3, cuDNN's, FlashAttention 2, PyTorch's choice.
CUDA_ORDER = ("_flash_3", "_native_cudnn", "flash", "native")


def pick_attention(name: str, device: torch.device, head_dim: int) -> str:
    """`name` itself, or for auto the first of `CUDA_ORDER` that gets through a small problem; native on a CPU."""
    if name != AUTO:
        return name
    order = CUDA_ORDER if device.type == "cuda" else ("native",)
    return next((backend for backend in order if works(backend, device, head_dim)), "native")


def works(backend: str, device: torch.device, head_dim: int) -> bool:
    """Whether a forward and a backward in bf16 run: what is missing shows in many ways."""
    query, key = (torch.randn(1, length, 2, head_dim, device=device, dtype=torch.bfloat16) for length in (64, 96))
    query.requires_grad_()
    try:
        dispatch_attention_fn(query, key, key, backend=AttentionBackendName(backend)).sum().backward()
        return query.grad is not None and bool(torch.isfinite(query.grad).all())
    except Exception:  # each library has its own kinds
        return False
