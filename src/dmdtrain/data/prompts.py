"""Prompts: reading them, and drawing them in an order that resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch

from dmdtrain.config import ConfigError
from dmdtrain.data.buckets import NOTHING, OtherItems, Seen
from dmdtrain.data.prompt_files import clean, read_file
from dmdtrain.miniature.clips import split_captions
from dmdtrain.prompt_library import LIBRARY


@dataclass(frozen=True)
class Prompts:
    """Different prompts in the order of their source, and what was left out of it."""

    texts: list[str]
    blank: int = 0
    duplicates: int = 0

    @property
    def left_out(self) -> str:
        """Such as `2 duplicates and 1 blank left out of 9`; empty where nothing was."""
        counts = [(self.duplicates, "duplicate" + "s" * (self.duplicates > 1)), (self.blank, "blank")]
        listed = " and ".join(f"{count} {name}" for count, name in counts if count)
        return listed and f"{listed} left out of {len(self.texts) + self.blank + self.duplicates}"


def read_prompts(source: str | list[str], key: str, *, held_out: bool, column: str | None = None) -> Prompts:
    """Prompts of a file (see `prompt_files`), of a list, the miniature's captions, or for validation `LIBRARY`.

    Args:
        held_out: those of validation: `wan-tiny`'s captions that are not trained on. column: of a table, as `data.prompt_column`.

    Raises:
        ConfigError: naming `key`, where they can not be read or there is none.
    """
    if source == "wan-tiny":
        training, validation = split_captions()
        return Prompts([str(caption) for caption in (validation if held_out else training)])
    if source == "library" and held_out:
        return Prompts(list(LIBRARY))
    if isinstance(source, str):
        try:
            source = read_file(Path(source).expanduser(), column)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    cleaned = [clean(text) for text in source]
    filled = [text for text in cleaned if text]
    texts = list(dict.fromkeys(filled))
    if not texts:
        raise ConfigError(f"{key}: no prompts in it")
    return Prompts(texts, len(cleaned) - len(filled), len(filled) - len(texts))


def load_prompts(source: str | list[str], key: str, *, held_out: bool, column: str | None = None) -> list[str]:
    """The texts of `read_prompts`."""
    return read_prompts(source, key, held_out=held_out, column=column).texts


def split(prompts: list[str], held_out: int, seen: Seen = NOTHING) -> tuple[list[str], list[str]]:
    """Prompts without so many that their content chooses, whatever their order, and those. seen: by the run before."""
    kept = seen.keep(sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest()), held_out)
    without = set(kept)
    return [prompt for prompt in prompts if prompt not in without], kept


T = TypeVar("T")


class EpochSampler(Generic[T]):
    """Endless items in shuffled epochs; every item once an epoch. Its state, the same in every process, resumes in mid-epoch.

    Args:
        rank, world: this process, of so many that draw together: all take parts of the same draw.
        identities: what items that are not texts are, whatever their files are called; None: that is not known.
    """

    def __init__(
        self, items: Sequence[T], seed: int, rank: int = 0, world: int = 1, identities: list[str] | None = None
    ):
        self.items, self.rank, self.world, self._identities = items, rank, world, identities
        self.generator = torch.Generator().manual_seed(seed)
        self._order, self._position = torch.empty(0, dtype=torch.int64), 0

    def draw(self, n: int) -> list[T]:
        left, together = self._order[self._position :], n * self.world
        while len(left) < together:
            left = torch.cat([left, torch.randperm(len(self.items), generator=self.generator)])
            self._order, self._position = left, 0
        self._position += together
        return [self.items[i] for i in left[self.rank * n : (self.rank + 1) * n].tolist()]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Generator, what is left of the epoch, and number and SHA-256 of the items: 4 bytes an item at most."""
        state = {"generator": self.generator.get_state(), "count": torch.tensor(len(self.items))}
        state["order"] = self._order[self._position :].to(torch.int32)
        return state if self._digest is None else state | {"digest": self._digest}

    def check(self, state: dict[str, torch.Tensor]) -> None:
        """OtherItems where the items are others than when the state was saved."""
        if int(state["count"]) != len(self.items):
            raise OtherItems(f"{len(self.items)} items now, {int(state['count'])} when the checkpoint was saved")
        saved = state.get("digest", state.get("items"))  # the latter of a sampler of clips
        if self._digest is not None and saved is not None and not torch.equal(self._digest, saved):
            raise OtherItems("they are not the same, or not in the same order, as when the checkpoint was saved")

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises OtherItems as `check`, ValueError where it is no state."""
        self.check(state)
        order = state["order"]
        wrong = order.dtype not in (torch.int32, torch.int64) or order.ndim != 1
        if wrong or any(not 0 <= i < len(self.items) for i in order.tolist()):
            raise ValueError(f"the order is no list of numbers below {len(self.items)}")
        self.generator.set_state(state["generator"])
        self._order, self._position = order.to(torch.int64), 0

    @cached_property
    def identities(self) -> list[str] | None:
        """What each item is; None: not known, as files may have moved."""
        if not all(isinstance(item, str) for item in self.items):
            return self._identities
        return [str(item) for item in self.items]

    @cached_property
    def _digest(self) -> torch.Tensor | None:
        """SHA-256 of what the items are, as 32 bytes."""
        if self.identities is None:
            return None
        hashed = hashlib.sha256("".join(f"{text}\n" for text in self.identities).encode())
        return torch.tensor(list(hashed.digest()), dtype=torch.uint8)
