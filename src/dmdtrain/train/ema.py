"""Exponential moving average of the student's trained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dmdtrain.models.offload import pinned_empty


class Ema:
    """Float32 average, updated at every `every`-th student update. `weights` are by the names of `parameters`.

    Args:
        decay: of the old average at each update. device: where the weights lie; None: where the parameters are.
        warmup: begin with a smaller decay, see `decay_at`.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        decay: float,
        every: int,
        device: torch.device | None = None,
        warmup: bool = False,
    ):
        self.decay, self.every, self.device, self.warmup = decay, every, device, warmup
        self._parameters = parameters
        self.weights = {name: seen.clone() for name, seen in zip(parameters, self._seen(), strict=True)}

    def _seen(self) -> list[torch.Tensor]:
        """The parameters in float32, where the average lies. From a GPU to the host: copied all at once, then waited for."""
        own = [p.detach() for p in self._parameters.values()]
        if self.device is None or self.device.type != "cpu" or not any(p.is_cuda for p in own):
            return [p.to(self.device or p.device, torch.float32) for p in own]
        there = [pinned_empty(p.shape, torch.float32, "average").copy_(p, non_blocking=True) for p in own]
        torch.cuda.current_stream().synchronize()
        return there

    def decay_at(self, student_update: int) -> float:
        """Decay after student update number `student_update` (from 1): with `warmup`, min(decay, (1 + n) / (10 + n)) of the n
        updates before it, so that the start leaves the average as fast as the weights leave it."""
        n = student_update - 1
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, student_update: int) -> None:
        """student_update: number of student updates done so far, from 1."""
        if student_update % self.every:
            return
        torch._foreach_lerp_(list(self.weights.values()), self._seen(), 1 - self.decay_at(student_update))

    @torch.no_grad()
    def restart(self) -> None:
        """From the weights as they are now."""
        self.load(self._parameters)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(weights[name])
