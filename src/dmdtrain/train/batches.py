"""What updates see: prompts, and everything random, drawn one update ahead."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dmdtrain.data.prompts import EpochSampler
from dmdtrain.models.encode import TextCache
from dmdtrain.train.step import Distiller, Draws


class Batch(NamedTuple):
    prompts: list[str]
    context: torch.Tensor  # [n, L, D]
    draws: Draws  # of the n videos
    generator_state: torch.Tensor  # from before they were drawn


class Batches:
    """Batches of n videos, the same ones however far ahead they are drawn. `state` is that before the batch that waits."""

    def __init__(self, n: int, sampler: EpochSampler, text: TextCache, distiller: Distiller, seed: int):
        self.n, self.sampler, self.text, self.distiller = n, sampler, text, distiller
        self.generator = torch.Generator().manual_seed(seed)
        self._ahead: Batch | None = None
        self._before = self._now()

    def _now(self) -> dict[str, torch.Tensor]:
        position = {f"prompts.{key}": value for key, value in self.sampler.state_dict().items()}
        return {"draws": self.generator.get_state()} | position

    def prefetch(self) -> None:
        """Draws the next batch: while the device computes, and before the host waits for it."""
        if self._ahead is None:
            self._before = self._now()
            prompts = self.sampler.draw(self.n)
            draws = self.distiller.draw(self.n, self.generator).to(self.distiller.device)
            self._ahead = Batch(prompts, self.text.get(prompts), draws, self._before["draws"])

    def ahead(self) -> Batch:
        """The batch that `take` will return."""
        self.prefetch()
        assert self._ahead is not None
        return self._ahead

    def take(self) -> Batch:
        batch, self._ahead = self.ahead(), None
        return batch

    def forget(self) -> None:
        """What was drawn ahead: generator and sampler were put somewhere else."""
        self._ahead = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._now() if self._ahead is None else self._before
