"""What both stages of a run share: a guarded optimizer step, and the loop around a stage's steps."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Protocol

import torch
from rich.console import Console

from dmdtrain.config import Config
from dmdtrain.train import interrupt
from dmdtrain.train.alarms import BAD_STEPS
from dmdtrain.train.checkpoint import CHECKPOINTS, WARMUP, list_checkpoints
from dmdtrain.train.log import Live, MetricsLog
from dmdtrain.train.optim import clip_gradients
from dmdtrain.train.reports import Reports
from dmdtrain.train.saver import Saved, Saver, TrainingStopped
from dmdtrain.train.underway import Paused, Underway

Values = dict[str, float]


class Stage(Saved, Protocol):
    """Warm-up or distillation: steps that are counted, saved and resumed."""

    bad_steps: int
    console: Console
    underway: Underway | None  # the step after `step`, if it is begun

    def train_step(self) -> Values:
        """Raises Paused where a signal has come and part of the step is done."""
        ...


class Diverged(TrainingStopped):
    """Too many updates in a row were not finite. `rates`: the learning rates that a branch should lower, by their keys."""

    def __init__(self, what: str, rates: Mapping[str, float]):
        super().__init__(what)
        self.rates = rates


def guarded_step(
    underway: Underway,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    losses: list[torch.Tensor],
    clip: float,
    method: str,
) -> tuple[torch.Tensor, bool]:
    """Clips and steps, unless a loss or the gradient is not finite. Returns the norm before clipping and whether it stepped.

    Inside `underway.optimizing`.
    """
    norm = clip_gradients(parameters, clip, method)
    finite = bool(torch.isfinite(torch.stack([norm, *losses])).all())
    if finite:
        underway.stepping = True
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def count_bad(stage: Stage, bad: Mapping[str, bool], limit: int, rates: Mapping[str, float]) -> None:
    """Counts updates that were skipped because they were not finite; Diverged after `limit` of one role in a row.

    Args:
        bad: the step's updates, and whether each was. rates: of `Diverged`.
    """
    stage.bad_steps += any(bad.values())
    for name, skipped in bad.items():
        count = stage.bad_in_a_row[name] = stage.bad_in_a_row[name] + 1 if skipped else 0
        if count == 1:
            stage.console.print(
                f"step {stage.step}: loss or gradient of {name} was not finite; the update is skipped, {BAD_STEPS} has what "
                "it was made of",
                soft_wrap=True,
            )
        if count >= limit:
            raise Diverged(
                f"step {stage.step}: loss or gradient of {name} was not finite {count} times in a row", rates
            )


def _with_lower(rates: Mapping[str, float], output: Path) -> str:
    """The command that goes on from a run's newest checkpoint, where there is one, with half of these rates."""
    saved = [folder for stage in (WARMUP, CHECKPOINTS) for folder in list_checkpoints(output / stage)]
    resume = f"--resume {saved[-1]} " if saved else ""
    lower = " ".join(f"--set {key}={value / 2:g}" for key, value in rates.items())
    return f"dmdtrain fit CONFIG {resume}--output-dir NEW_FOLDER {lower}"


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far: of the GPU, or of the process (Linux counts in KiB)."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    return peak / 2**30


@contextmanager
def _rescuing(stage: Stage, saver: Saver, console: Console, unit: str) -> Iterator[None]:
    """Saves what is done, where data disappear, memory runs out or anything else ends the steps with an error."""
    try:
        yield
    except TrainingStopped:  # of steps or saves that are not to be tried again
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold the step's activations
        if (stage.underway is None or not stage.underway.stepping) and saver.rescue():
            console.print(f"saved: {saver.saved(unit)}", soft_wrap=True)
        raise


@contextmanager
def telling_unwritten(step: int, console: Console) -> Iterator[None]:
    """Samples that a disk does not take are told of."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        console.print(f"step {step}: the samples could not be written ({reason}); training goes on", soft_wrap=True)


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
    first: Callable[[MetricsLog], None] | None = None,
    reports: Reports | None = None,
) -> None:
    """Steps until `total`, with logs in `folder`, checkpoints, a progress line and validation.

    A signal is answered between two micro-batches, with a checkpoint of the last step and what is done of the next; in
    validation between two denoising steps.

    Args:
        shown: label -> name of the value on the progress line.
        first: what is to be done of the validation of the step that is resumed.
    """

    def run_validation(validate: Callable[[MetricsLog], None]) -> None:
        with suppress(interrupt.Interrupted), telling_unwritten(stage.step, console):  # the loop sees the one, too
            validate(log)
        live.restart_clock()

    reports = reports or Reports()
    log = MetricsLog(folder, stage.step, config.log.tensorboard, console, reports)
    saver, paused, told = Saver(stage, config.checkpoint, console), False, 0.0
    reports.enter(stage.step, unit)
    reports.event("started", f"started at {unit} {stage.step} of {total}")
    try:
        with interrupt.patiently(), Live(total, stage.step, console, unit) as live:
            with _rescuing(stage, saver, console, unit):
                if first is not None:
                    run_validation(first)
                while stage.step < total and not interrupt.asked():
                    try:
                        values = stage.train_step()
                    except Paused:
                        paused = True
                        break
                    last = stage.step == total
                    text = "  ".join(f"{k} {values[v]:.4f}" for k, v in shown.items() if v in values)
                    live.step(stage.step, text + (f"  saves {saver.seconds:.1f} s" if saver.seconds else ""))
                    if stage.step % config.log.every == 0 or last:  # with the saves since the last line
                        log.write(stage.step, values | {"seconds_save": saver.seconds - told})
                        told = saver.seconds
                    if saver.after_step(last):
                        live.restart_clock()
                    reports.saved(stage.root, saver.saved_step)
                    due = config.validation.every and (stage.step % config.validation.every == 0 or last)
                    if validate and due and not interrupt.asked():
                        run_validation(validate)
            saver.finish(paused)
            reports.saved(stage.root, saver.saved_step)
            if interrupt.asked():
                at = f"in {unit} {stage.step + 1}" if paused else f"at {unit} {stage.step}"
                console.print(f"stopped {at}; saved: {saver.saved(unit)}", soft_wrap=True)
        interrupt.check()
    except Diverged as error:
        saver.close()  # what is in flight is the newest checkpoint to branch from
        lower = f"lower {' and '.join(error.rates)} in a branch: {_with_lower(error.rates, stage.root.parent)}"
        raise TrainingStopped(f"{error}; {lower}") from None
    finally:
        saver.close()
        log.close()
