"""Frechet distance between sets of latents, for the miniature: are student samples as varied as the teacher's?"""

from __future__ import annotations

import torch


def features(latents: torch.Tensor, dims: int = 64, seed: int = 0) -> torch.Tensor:
    """Fixed random projection of flattened latents: [N, C, T, H, W] -> [N, dims], float64."""
    flat = latents.flatten(1).double()
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(flat.shape[1], dims, generator=generator, dtype=torch.float64)
    return flat @ matrix / flat.shape[1] ** 0.5


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of Gaussians fitted to features [N, D].

    Heusel et al., arXiv 1706.08500, eq. 6. It falls with the number of samples; compare equal counts.
    """
    root_a = _sqrt(torch.cov(a.T))
    cross = _sqrt(root_a @ torch.cov(b.T) @ root_a)
    spread = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * cross.trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + spread)


def _sqrt(matrix: torch.Tensor) -> torch.Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
