"""Distribution matching distillation. Pure functions on tensors; the models are called elsewhere.

Yin et al., "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828 (DMD);
Yin et al., "Improved Distribution Matching Distillation", arXiv 2405.14867 (DMD2: two time scales, multi-step simulation);
Huang et al., "Self Forcing", arXiv 2506.08009 (score timesteps bound to the exit step).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dmdtrain.flow import NUM_TRAIN_TIMESTEPS, flow_target, shift_timestep


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance in standard form, `uncond + scale (cond - uncond)` (arXiv 2207.12598).

    scale 1 is the conditional prediction. Codes that write `cond + w (cond - uncond)` mean scale = w + 1.
    """
    return uncond + scale * (cond - uncond)


class DMDGradient(NamedTuple):
    gradient: torch.Tensor  # [B, C, T, H, W], per sample normalised
    normaliser: torch.Tensor  # [B]


def dmd_gradient(x0: torch.Tensor, x0_real: torch.Tensor, x0_fake: torch.Tensor, *, eps: float = 1e-8) -> DMDGradient:
    """Distribution-matching gradient, eq. 7 of arXiv 2311.18828, normalised per sample as in its eq. 8.

    `(x0_fake - x0_real) / mean|x0 - x0_real|`, the mean over everything but the batch. A sample whose normaliser is
    below `eps` is divided by `eps`. Non-finite inputs stay non-finite: the step refuses them.

    Args:
        x0: [B, C, T, H, W] student samples. x0_real, x0_fake: predictions of teacher (guided) and fake score from the
            same noised x0.
    """
    normaliser = (x0 - x0_real).abs().mean(dim=tuple(range(1, x0.ndim)))
    divisor = normaliser.clamp(min=eps).view(-1, *[1] * (x0.ndim - 1))
    return DMDGradient((x0_fake - x0_real) / divisor, normaliser)


def dmd_loss(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """0.5 mse(x0, stopgrad(x0 - gradient)): a scalar whose derivative by x0 is `dmd_loss_gradient`."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def dmd_loss_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """d dmd_loss / d x0 in closed form: gradient / numel. Same shape as `gradient`."""
    return gradient / gradient.numel()


def critic_loss(flow_pred: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Flow-matching loss of the fake score on detached student samples, `mean((flow_pred - (noise - x0))^2)`.

    Args:
        flow_pred, x0, noise: [B, C, T, H, W].

    Returns:
        [B]: the mean over everything but the batch.
    """
    error = flow_pred - flow_target(x0.detach(), noise)
    return error.square().mean(dim=tuple(range(1, error.ndim)))


def score_timestep_range(
    denoised_from: float,
    denoised_to: float,
    *,
    ts_schedule: bool,
    ts_schedule_max: bool,
    min_score_timestep: int,
    shift: float = 1.0,
) -> tuple[int, int]:
    """Half-open range [low, high) of the integers from which score timesteps are drawn, before `shift` is applied.

    The exit step's own timesteps are final, so they are taken back through the shift: once the drawn integer is shifted, it
    lies between what the step denoises to and what it denoises from, to the nearest integer before the shift.

    Args:
        denoised_from: timestep at which the exit step started. denoised_to: timestep that it would go on to; 0 after
            the last step. Both as the student uses them, in [0, 1000].
        ts_schedule: bound below by `denoised_to` instead of `min_score_timestep`.
        ts_schedule_max: bound above by `denoised_from` instead of 1000.
        min_score_timestep: before the shift. shift: of the score timesteps.

    Raises:
        ValueError: the range is empty.
    """
    low = round(shift_timestep(denoised_to, 1 / shift)) if ts_schedule else min_score_timestep
    high = round(shift_timestep(denoised_from, 1 / shift)) if ts_schedule_max else NUM_TRAIN_TIMESTEPS
    if low >= high:
        raise ValueError(f"score timesteps: no integer in [{low}, {high})")
    return low, high


def warp_score_timestep(
    k: torch.Tensor, *, shift: float, min_timestep: float = 20.0, max_timestep: float = 980.0
) -> torch.Tensor:
    """Integer timesteps `k` through the shift, then clamped. float32 or wider, same shape as `k`."""
    dtype = k.dtype if k.dtype.is_floating_point else torch.float32
    return shift_timestep(k.to(dtype), shift).clamp(min_timestep, max_timestep)


def sample_score_timesteps(
    n: int,
    generator: torch.Generator,
    low: int,
    high: int,
    *,
    shift: float,
    min_timestep: float,
    max_timestep: float,
) -> torch.Tensor:
    """[n] score timesteps, one per sample and the same for every frame: uniform integers in [low, high), shifted, clamped."""
    k = torch.randint(low, high, (n,), generator=generator)
    return warp_score_timestep(k, shift=shift, min_timestep=min_timestep, max_timestep=max_timestep)
