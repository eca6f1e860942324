"""What updates see: prompts, and everything random, drawn one update ahead."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dmdtrain.data.prompts import EpochSampler
from dmdtrain.models.encode import TextCache
from dmdtrain.train.step import Distiller, Draws


class Batch(NamedTuple):
    context: torch.Tensor  # [n, L, D]
    draws: Draws  # of the n videos


class Batches:
    """Batches of n videos, the same ones however far ahead they are drawn. `state` is that before the batch that waits."""

    def __init__(self, n: int, prompts: EpochSampler, text: TextCache, distiller: Distiller, seed: int):
        self.n, self.prompts, self.text, self.distiller = n, prompts, text, distiller
        self.generator = torch.Generator().manual_seed(seed)
        self._ahead: Batch | None = None
        self._before = self._now()

    def _now(self) -> dict[str, torch.Tensor]:
        return {"draws": self.generator.get_state()} | {
            f"prompts.{key}": value for key, value in self.prompts.state_dict().items()
        }

    def prefetch(self) -> None:
        """Draws the next batch: while the device computes, and before the host waits for it."""
        if self._ahead is None:
            self._before = self._now()
            context = self.text.get(self.prompts.draw(self.n))
            self._ahead = Batch(context, self.distiller.draw(self.n, self.generator).to(self.distiller.device))

    def take(self) -> Batch:
        self.prefetch()
        batch, self._ahead = self._ahead, None
        assert batch is not None
        return batch

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._now() if self._ahead is None else self._before

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises ValueError where the prompts are others."""
        self._ahead = None
        self.generator.set_state(state["draws"])
        own = {key.removeprefix("prompts."): value for key, value in state.items() if key.startswith("prompts.")}
        self.prompts.load_state_dict(own)
