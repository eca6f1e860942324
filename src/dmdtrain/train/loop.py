"""What both stages of a run share: a guarded optimizer step, and the loop around a stage's steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Protocol

import torch
from rich.console import Console

from dmdtrain.config import Config
from dmdtrain.train.log import Live, MetricsLog
from dmdtrain.train.optim import clip_gradients

Values = dict[str, float]


class TrainingStopped(Exception):
    """Training can not go on; the last checkpoint is intact."""


class Stage(Protocol):
    """Warm-up or distillation: steps that are counted, saved and resumed."""

    step: int
    bad_steps: int
    bad_in_a_row: int

    def train_step(self) -> Values: ...

    def save(self) -> Path: ...


def guarded_step(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    losses: list[torch.Tensor],
    clip: float,
    method: str,
) -> tuple[torch.Tensor, bool]:
    """Clips and steps, unless a loss or the gradient is not finite. Returns the norm before clipping and whether it stepped."""
    norm = clip_gradients(parameters, clip, method)
    finite = bool(torch.isfinite(torch.stack([norm, *losses])).all())
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def count_bad(stage: Stage, bad: bool, limit: int, advice: str) -> None:
    """Counts steps that were skipped because they were not finite; TrainingStopped after `limit` in a row."""
    stage.bad_steps += bad
    stage.bad_in_a_row = stage.bad_in_a_row + 1 if bad else 0
    if stage.bad_in_a_row >= limit:
        raise TrainingStopped(
            f"step {stage.step}: loss or gradient was not finite {stage.bad_in_a_row} steps in a row; {advice}, "
            "then resume from the last checkpoint"
        )


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far: of the GPU, or of the process (Linux counts in KiB)."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    return peak / 2**30


def run_stage(
    stage: Stage,
    total: int,
    folder: Path,
    config: Config,
    console: Console,
    *,
    shown: dict[str, str],
    unit: str = "step",
    validate: Callable[[MetricsLog], None] | None = None,
) -> None:
    """Steps until `total`, with logs in `folder`, checkpoints, a progress line and validation.

    Args:
        shown: label -> name of the value on the progress line.
    """
    log = MetricsLog(folder, stage.step, config.log.tensorboard)
    try:
        with Live(total, stage.step, console, unit) as live:
            save_due = False
            while stage.step < total:
                values = stage.train_step()
                last = stage.step == total
                live.step(stage.step, "  ".join(f"{k} {values[v]:.4f}" for k, v in shown.items() if v in values))
                if stage.step % config.log.every == 0 or last:
                    log.write(stage.step, values)
                save_due |= stage.step % config.checkpoint.every == 0 or last
                if save_due and not stage.bad_in_a_row:  # weights that went bad never replace good ones
                    stage.save()
                    save_due = False
                    live.restart_clock()
                if validate and config.validation.every and (stage.step % config.validation.every == 0 or last):
                    validate(log)
                    live.restart_clock()
    finally:
        log.close()
