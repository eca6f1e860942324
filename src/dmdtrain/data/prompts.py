"""Prompts: reading them, and drawing them in an order that resumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch

from dmdtrain.config import ConfigError
from dmdtrain.miniature.clips import split_captions


def load_prompts(source: str | list[str], key: str, *, held_out: bool) -> list[str]:
    """Prompts of a text file (one a line; empty lines skipped, duplicates dropped), a list, or the miniature's captions.

    Args:
        held_out: of `wan-tiny`'s captions, those that are kept for validation.
    """
    if source == "wan-tiny":
        training, validation = split_captions()
        return [str(caption) for caption in (validation if held_out else training)]
    if isinstance(source, str):
        try:
            source = Path(source).expanduser().read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise ConfigError(f"{key}: {source}: no such file; one prompt a line, or wan-tiny") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}: {source}: cannot be read as text: {error}") from None
    prompts = list(dict.fromkeys(line.strip() for line in source if line.strip()))
    if not prompts:
        raise ConfigError(f"{key}: no prompts in it")
    return prompts


T = TypeVar("T")


class EpochSampler(Generic[T]):
    """Endless items in shuffled epochs; every item once an epoch. Its state resumes in mid-epoch."""

    def __init__(self, items: Sequence[T], seed: int):
        self.items = items
        self.generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []

    def draw(self, n: int) -> list[T]:
        while len(self._order) < n:
            self._order += torch.randperm(len(self.items), generator=self.generator).tolist()
        drawn, self._order = self._order[:n], self._order[n:]
        return [self.items[i] for i in drawn]

    def state_dict(self) -> dict[str, torch.Tensor]:
        order = torch.tensor(self._order, dtype=torch.int64)
        return {"generator": self.generator.get_state(), "order": order, "count": torch.tensor(len(self.items))}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises ValueError where there are more or fewer items than when the state was saved."""
        if int(state["count"]) != len(self.items):
            raise ValueError(f"{len(self.items)} items now, {int(state['count'])} when the checkpoint was saved")
        order = state["order"]
        if order.dtype != torch.int64 or order.ndim != 1 or any(not 0 <= i < len(self.items) for i in order.tolist()):
            raise ValueError(f"the order is no list of numbers below {len(self.items)}")
        self.generator.set_state(state["generator"])
        self._order = order.tolist()
