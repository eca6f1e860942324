"""Optimizers, learning-rate schedules and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from dmdtrain.config import ConfigError


def trained_dtype(name: str) -> torch.dtype:
    """Data type of trained weights under an optimizer."""
    return torch.bfloat16 if name == "adamw_bf16" else torch.float32


def build_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """An optimizer by its name in the configuration.

    adamw: PyTorch's. adamw_bf16: `KahanAdamW` for bf16 weights; Kahan summation keeps what rounding would lose, of updates and
    decay, and, unlike stochastic rounding, needs no randomness. adamw8bit: bitsandbytes', with 8-bit moments;
    paged_adamw8bit: in memory that the driver moves to the host when the device is full.
    """
    parameters = list(parameters)
    options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=True)
    if name == "adamw_bf16":
        from optimi.utils import HAS_TRITON

        from dmdtrain.train.kahan import KahanAdamW

        triton = HAS_TRITON and all(parameter.is_cuda for parameter in parameters)
        return KahanAdamW(parameters, **options, kahan_sum=True, triton=triton)
    if name in ("adamw8bit", "paged_adamw8bit"):
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        return (AdamW8bit if name == "adamw8bit" else PagedAdamW8bit)(parameters, **options)
    raise ConfigError(f"optimizer.name: {name}: valid are adamw, adamw_bf16, adamw8bit, paged_adamw8bit")


def moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, tuple[type, ...]]:
    """What an optimizer of `build_optimizer` keeps of a parameter that it has stepped, but for code books of 8-bit moments."""
    tensor = (torch.Tensor,)
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": tensor, "exp_avg": tensor, "exp_avg_sq": tensor}
    if hasattr(optimizer, "is_paged"):  # bitsandbytes'
        return {"step": (int,), "state1": tensor, "state2": tensor}
    # optimi compensates bf16 alone; of others it keeps nothing, or, with its kernels for CUDA, a byte.
    compensation = tensor if parameter.dtype == torch.bfloat16 else (torch.Tensor, type(None))
    return {"exp_avg": tensor, "exp_avg_sq": tensor, "kahan_comp": compensation}


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `state_dict` gave, perhaps on another device: with the kernels, and in the memory, that are this one's."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group.update({key: optimizer.defaults[key] for key in ("fused", "triton") if key in optimizer.defaults})
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            if parameter.is_cuda and key in state:
                buffer = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)  # type: ignore[attr-defined]
                torch.cuda.synchronize()  # it is filled with zeros on the device
                state[key] = buffer.copy_(state[key])


def learning_rate(update: int, total: int, *, peak: float, name: str, warmup_steps: int, min_lr: float) -> float:
    """Learning rate of student update number `update` (from 0) of `total`."""
    if update < warmup_steps:
        return peak * (update + 1) / (warmup_steps + 1)
    if name == "constant":
        return peak
    progress = min(1.0, (update - warmup_steps) / max(1, total - warmup_steps))
    if name == "linear":
        return peak + (min_lr - peak) * progress
    if name == "cosine_with_min_lr":
        return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ConfigError(f"schedule.name: {name}: valid are constant, linear, cosine_with_min_lr")


def clip_gradients(parameters: list[torch.nn.Parameter], limit: float, method: str) -> torch.Tensor:
    """Clips in place and returns the gradient norm from before, a scalar.

    method "norm": scale all to a norm of at most `limit`. "value": clamp each element to [-limit, limit].
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if method == "norm":
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif method == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
    else:
        raise ConfigError(f"optimizer.grad_clip_method: {method}: valid are norm, value")
    return norm
