"""Flow-matching algebra. Pure functions.

Notation (Lipman et al., arXiv 2210.02747, with the time of Esser et al., arXiv 2403.03206): sigma in [0, 1],
`x_t = (1 - sigma) x0 + sigma noise`, `flow = noise - x0` (= d x_t / d sigma), `timestep = 1000 sigma`.
sigma is computed from the timestep exactly, never looked up in a rounded table.
"""

from __future__ import annotations

from typing import TypeVar

import torch

NUM_TRAIN_TIMESTEPS = 1000

Number = TypeVar("Number", float, torch.Tensor)


def sigma_from_timestep(timestep: Number) -> Number:
    """timestep in [0, 1000] -> sigma in [0, 1]."""
    return timestep / NUM_TRAIN_TIMESTEPS


def shift_sigma(sigma: Number, shift: float) -> Number:
    """sigma' = s sigma / (1 + (s - 1) sigma): s > 1 spends more of the range at high noise (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_timestep(timestep: Number, shift: float) -> Number:
    """`shift_sigma` on the timestep's scale."""
    return shift_sigma(sigma_from_timestep(timestep), shift) * NUM_TRAIN_TIMESTEPS


def _per_sample(sigma: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] or [B, T] -> broadcastable against latents [B, C, T, H, W]; never in less than float32."""
    sigma = sigma.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    if sigma.ndim == 1:
        return sigma.view(-1, 1, 1, 1, 1)
    if sigma.ndim == 2:
        return sigma.view(sigma.shape[0], 1, sigma.shape[1], 1, 1)
    raise ValueError(f"sigma has shape {tuple(sigma.shape)}; it must be [B] or [B, T]")


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - sigma) x0 + sigma noise.

    Args:
        x0, noise: [B, C, T, H, W]. sigma: [B], or [B, T] for a sigma of its own in every latent frame.

    Returns:
        [B, C, T, H, W] in x0's dtype (computed in float32 or wider).
    """
    s = _per_sample(sigma, x0)
    return ((1 - s) * x0 + s * noise).to(x0.dtype)


def x0_from_flow(noisy: torch.Tensor, flow: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x0 = x_t - sigma flow. Shapes as in `add_noise`; computed and returned in float32 or wider."""
    s = _per_sample(sigma, noisy)
    return noisy.to(s.dtype) - s * flow.to(s.dtype)


def flow_from_x0(noisy: torch.Tensor, x0: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """flow = (x_t - x0) / sigma; sigma must not be 0. Shapes as in `add_noise`."""
    s = _per_sample(sigma, noisy)
    return (noisy.to(s.dtype) - x0.to(s.dtype)) / s


def flow_target(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """noise - x0: what a flow model is trained to predict."""
    return noise - x0
