"""Exponential moving average of the student's trained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Ema:
    """Float32 average, updated at every `every`-th student update. `weights` are by the names of `parameters`.

    device: where they lie; None: where the parameters are.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        decay: float,
        every: int,
        device: torch.device | None = None,
    ):
        self.decay, self.every, self.device = decay, every, device
        self._parameters = parameters
        self.weights = {name: self._seen(p).clone() for name, p in parameters.items()}

    def _seen(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return parameter.detach().to(self.device or parameter.device, torch.float32)

    @torch.no_grad()
    def update(self, student_update: int) -> None:
        """student_update: number of student updates done so far, from 1."""
        if student_update % self.every:
            return
        new = [self._seen(p) for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), new, 1 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """From the weights as they are now."""
        self.load(self._parameters)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(weights[name])
