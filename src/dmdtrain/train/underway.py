"""The step in hand: what is done of it, so that a signal waits for one micro-batch and nothing that is computed is lost, also
where data disappear or memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmdtrain.config import ConfigError
from dmdtrain.train import interrupt
from dmdtrain.train.checkpoint import UNDERWAY, check_like, read_json, read_tensors
from dmdtrain.train.step import Stats

Tensors = dict[str, torch.Tensor]


class Paused(Exception):
    """A signal has come; the step stays as far as it is, to be saved."""


@dataclass
class Underway:
    """What is done of a step. The gradients of the update in hand are where they are accumulated: in the parameters."""

    random: Tensors  # generators and positions in the data, from before the step
    update: str  # the one in hand, or the next
    finished: dict[str, Stats | None] = field(default_factory=dict)  # update -> numbers; None: skipped, as not finite
    rows: int = 0  # videos of it that are accumulated
    total: Stats = field(default_factory=dict)  # their share of its numbers
    videos: list[torch.Tensor] = field(default_factory=list)  # [b, C, t, H, W]: the student's, where it leaves them
    seconds: dict[str, float] = field(default_factory=dict)  # by update
    torn: bool = False  # a micro-batch or clipping has begun and not ended: the gradients are of no use
    stepping: bool = False  # the optimizer has begun and not ended: nor are the weights

    def begin(self, update: str) -> None:
        """The next update; nothing where it is in hand already."""
        if self.update != update:
            self.update, self.rows, self.total = update, 0, {}

    @contextmanager
    def optimizing(self) -> Iterator[None]:
        """Clipping, the optimizer's step and what goes with it."""
        self.torn = True
        yield
        self.torn = self.stepping = False

    @contextmanager
    def timed(self, update: str) -> Iterator[None]:
        """Adds to the update's seconds, also where it is paused."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[update] = self.seconds.get(update, 0.0) + time.perf_counter() - started

    def accumulate(self, n: int, micro: int, backward: Callable[[slice, float], Stats]) -> Stats:
        """The micro-batches of the update in hand, of n videos, that are not done yet.

        Args:
            backward: accumulates the gradient of these rows, which are that share of the update; returns their means.

        Returns:
            means over the update, of numbers that all micro-batches have: a checkpoint of another version may lack some.

        Raises:
            Paused: a signal has come. Before the first micro-batch of a step there is nothing to keep, and it is made.
        """
        while self.rows < n:
            if (self.rows or self.finished) and interrupt.asked():
                raise Paused
            rows = slice(self.rows, min(self.rows + micro, n))
            share = (rows.stop - rows.start) / n
            self.torn = True
            stats = backward(rows, share)
            self.torn = False
            before = self.total if self.rows else dict.fromkeys(stats, 0)
            self.total = {key: before[key] + value * share for key, value in stats.items() if key in before}
            self.rows = rows.stop
        return self.total

    def add_to(
        self, tensors: dict[str, Tensors], state: dict[str, Any], parameters: Mapping[str, torch.nn.Parameter]
    ) -> None:
        """Adds what is done to a checkpoint's tensors and state.json.

        What is not finite or not whole is left out, to be computed again to the same end: the update in hand, or, after one
        that was skipped and has left the weights as they were, the step.

        Args:
            parameters: those that the update in hand trains.
        """
        rows, content = self.rows, {f"total.{key}": value for key, value in self.total.items()}
        content |= {f"gradient.{name}": p.grad for name, p in parameters.items() if p.grad is not None}
        if self.torn or not all(bool(torch.isfinite(value).all()) for value in content.values()):
            rows, content = 0, {}
        if None in self.finished.values() or not (rows or self.finished):
            return
        for update, stats in self.finished.items():
            content |= {f"finished.{update}.{key}": value for key, value in (stats or {}).items()}
        if self.videos:
            content["videos"] = torch.cat(self.videos)
        tensors[UNDERWAY] = content
        state[UNDERWAY] = {"update": self.update, "rows": rows, "seconds": self.seconds}


def load_underway(
    folder: Path,
    random: Tensors,
    updates: Sequence[str],
    n: int,
    parameters: Callable[[str], Mapping[str, torch.nn.Parameter]],
    videos: Callable[[], torch.Tensor] | None = None,
) -> Underway | None:
    """What a checkpoint holds of the step after its own, with the gradients put into the parameters; None: nothing.

    Args:
        random: the state that the checkpoint was loaded to. updates: of the step, in their order, each of n videos.
        parameters: of an update. videos: one like those that the first update leaves to the second, if it does.

    Raises:
        ConfigError: it does not fit this run or itself.
    """
    state = read_json(folder, "state.json").get(UNDERWAY)
    if state is None:
        return None

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"checkpoint: {folder}: state.json: {UNDERWAY}: {what}")

    if not isinstance(state, dict):
        raise refuse(f"{state!r:.100}; it must be an object")
    update, rows, seconds = (state.get(key) for key in ("update", "rows", "seconds"))
    if not isinstance(update, str) or update not in updates:
        raise refuse(f"update {update!r:.100}; valid in this step are {', '.join(updates)}")
    finished = updates[: updates.index(update)]
    if type(rows) is not int or not 0 <= rows <= n or not (rows or finished):
        raise refuse(f"rows {rows!r:.100}; valid are {0 if finished else 1} to {n}")
    if not isinstance(seconds, dict) or not seconds.keys() <= set(updates):
        raise refuse(f"seconds {seconds!r:.100}; valid are those of {', '.join(updates)}")
    if not all(type(value) in (int, float) and 0 <= value < 1e9 for value in seconds.values()):
        raise refuse(f"seconds {seconds!r:.100}; they must be numbers from 0 on")

    values, named = read_tensors(folder, UNDERWAY), parameters(update)
    needed = [f"finished.{name}." for name in finished] + (["total.", "gradient."] if rows else [])
    for prefix in needed:
        if not any(name.startswith(prefix) for name in values):
            raise ConfigError(f"checkpoint: {folder}: {UNDERWAY}.safetensors lacks {prefix}*")
    numbers = tuple(prefix for prefix in needed if prefix != "gradient.")
    wanted = {name: torch.zeros(()) for name in values if name.startswith(numbers)}
    average = "total.x0_average"
    if average in wanted and values[average].ndim == 4:  # [C, T, H, W], of the drawn length
        wanted[average] = values[average].float()
    if rows:
        wanted |= {f"gradient.{k}": p for k, p in named.items() if f"gradient.{k}" in values}
    if videos is not None:
        like = videos()
        wanted["videos"] = torch.empty(n if finished else rows, *like.shape[1:], dtype=like.dtype, device="meta")
    check_like(folder, UNDERWAY, values, wanted)

    device = next(iter(named.values())).device

    def numbers_of(prefix: str) -> Stats:
        return {k.removeprefix(prefix): v.to(device) for k, v in values.items() if k.startswith(prefix)}

    for name, parameter in named.items():
        if rows and (gradient := values.get(f"gradient.{name}")) is not None:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
    done: dict[str, Stats | None] = {name: numbers_of(f"finished.{name}.") for name in finished}
    left = [values["videos"].to(device)] if videos is not None else []
    return Underway(random, update, done, rows, numbers_of("total."), left, {k: float(v) for k, v in seconds.items()})
