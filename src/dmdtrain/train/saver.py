"""When a stage's checkpoint is written, in which thread, and what happens where it can not be."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread
from typing import Protocol

import torch
from rich.console import Console

from dmdtrain.config import BRANCH_OFF, Checkpoint
from dmdtrain.files import make_folder
from dmdtrain.train import interrupt
from dmdtrain.train.checkpoint import UNDERWAY, Content, SaveFailed, write_checkpoint
from dmdtrain.train.memory import free_memory, ran_out

MEMORY_SHARE = 0.5  # of the host memory that is free: what a copy for the background may take


class TrainingStopped(Exception):
    """Training can not go on; the last checkpoint is intact."""


class SavesFailed(TrainingStopped):
    """The run's folder can not be written."""


class Saved(Protocol):
    """What a stage is to its saver."""

    step: int
    bad_in_a_row: dict[str, int]  # by role: updates that were skipped
    root: Path

    def content(self) -> Content: ...


def size_of(content: Content) -> int:
    """Bytes of the tensors."""
    return sum(tensor.nbytes for tensors in content[0].values() for tensor in tensors.values())


def sound(content: Content) -> bool:
    """Whether all of it is finite, as a checkpoint that is read must be."""
    found = [t.isfinite().all() for named in content[0].values() for t in named.values() if t.is_floating_point()]
    return all(torch.stack([value.cpu() for value in found]).tolist()) if found else True


def copied(content: Content) -> Content:
    """The same in host memory of its own."""
    tensors, texts = content
    return {s: {n: t.detach().to("cpu", copy=True) for n, t in named.items()} for s, named in tensors.items()}, texts


class Saver:
    """Saves a stage every `settings.every` steps or minutes, and tries again where that failed.

    After a failure it waits 1 step, then 2, 4 ... and at most `every`. In the background, one checkpoint is in flight at most.
    """

    def __init__(self, stage: Saved, settings: Checkpoint, console: Console):
        self.stage, self.settings, self.console = stage, settings, console
        make_folder(stage.root)
        self.saved_step, self.saved_part = stage.step, False
        self.failed = 0
        self._due, self._retry_at, self._told = False, 0, False
        self._clock = time.monotonic()
        self.seconds = 0.0  # that steps have waited for saves
        self._sound = True  # the weights, where they were last to be saved
        self._thread: Thread | None = None
        self._in_flight, self._part = 0, False
        self._keep: int | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def after_step(self, last: bool = False) -> bool:
        """Reports what the thread has done and saves where it is due. True: it took time that is not the step's.

        Raises:
            SavesFailed: too many failures in a row.
        """
        started = time.perf_counter()
        if not self.busy:
            self.wait()
        step, every = self.stage.step, self.settings.every_minutes
        self._due |= step % self.settings.every == 0 or last or 0 < 60 * every <= time.monotonic() - self._clock
        if not self._due or self._skipping or step < self._retry_at:
            return False
        self.save()
        self.seconds += time.perf_counter() - started
        return True

    @property
    def _skipping(self) -> bool:
        """Whether the last update of a role was not finite: its weights may have gone bad and replace no good ones."""
        return any(self.stage.bad_in_a_row.values())

    def save(self) -> None:
        """Starts or does the save of the stage as it is now, unless that could not be read again."""
        self.wait()
        self._due, self._clock = False, time.monotonic()
        content, self._in_flight = self.stage.content(), self.stage.step
        self._keep = None if self._skipping else self.settings.keep
        self._sound = sound(content)
        if not self._sound:
            self.console.print(f"step {self._in_flight}: the weights are not finite and are not saved", soft_wrap=True)
            return
        self._part = UNDERWAY in content[0]
        if not (self.settings.background and self._fits(content) and self._starts(content)):
            self._write(content, self._in_flight)
            self._settle()

    def _starts(self, content: Content) -> bool:
        """Whether a copy and a thread could be had; where not, steps wait for the save."""
        try:
            self._thread = Thread(target=self._write, args=(copied(content), self._in_flight), name="checkpoint")
            self._thread.start()
        except (MemoryError, RuntimeError) as error:
            self._thread = None
            if not ran_out(error) and "can't start new thread" not in str(error):
                raise
            return False
        return True

    def _fits(self, content: Content) -> bool:
        needed = size_of(content)
        fits = needed <= MEMORY_SHARE * free_memory()
        if not fits and not self._told:
            self._told = True
            self.console.print(
                f"checkpoint.background: a copy of {needed / 2**30:.1f} GiB does not fit in host memory; steps wait for saves",
                soft_wrap=True,
            )
        return fits

    def _write(self, content: Content, step: int) -> None:
        try:
            if not self.stage.root.is_dir():  # it was there: a mount that has gone is not replaced by a folder below it
                raise SaveFailed(f"{self.stage.root} has gone")
            write_checkpoint(self.stage.root, step, *content, self._keep)
        except BaseException as error:  # told by the main thread, in `_settle`
            self._error = error

    def wait(self) -> None:
        """Until nothing is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._settle()

    def _settle(self) -> None:
        error, self._error = self._error, None
        if error is None:
            self.failed, self._retry_at = 0, 0
            self.saved_step, self.saved_part = self._in_flight, self._part
            return
        if not isinstance(error, SaveFailed):
            raise error
        self.failed += 1
        self._due = True
        self._retry_at = self.stage.step + min(2 ** (self.failed - 1), self.settings.every)
        most = self.settings.max_failed_saves
        self.console.print(
            f"step {self._in_flight}: the checkpoint could not be saved ({error}); failure {self.failed} of at most {most} "
            "in a row",
            soft_wrap=True,
            highlight=False,
        )
        if self.failed >= most:
            raise SavesFailed(
                f"step {self.stage.step}: {most} saves in a row failed ({error}); "
                f"{'earlier checkpoints are untouched' if self.saved_step else 'nothing is saved yet'}: make room or mend the "
                "folder, then run the same command again"
            )

    def saved(self, unit: str) -> str:
        """What this process has saved last, or gone on from."""
        parts = [f"{unit} {self.saved_step}"] if self.saved_step else []
        parts += [f"what is done of {unit} {self.saved_step + 1}"] if self.saved_part else []
        return " and ".join(parts) or "nothing yet"

    def finish(self, paused: bool = False) -> None:
        """Waits, and saves what is not saved yet: with pauses and until it works at the end, in one attempt when interrupted.

        paused: the stage is within a step, of which no checkpoint knows.

        Raises:
            TrainingStopped: the weights are not finite.
        """
        self.wait()
        while paused or self.saved_step != self.stage.step:
            self.save()
            self.wait()
            if interrupt.asked():
                return
            if not self._sound:
                raise TrainingStopped(
                    f"the weights of step {self.stage.step} are not finite and are not saved; lower the learning rates in a "
                    f"branch: {BRANCH_OFF}"
                )
            if not self.failed:
                return
            end = time.monotonic() + min(60, 2 ** (self.failed - 1))
            while time.monotonic() < end and not interrupt.asked():
                time.sleep(0.1)

    def rescue(self) -> bool:
        """After an error in a step: one attempt to save what is new, which raises nothing. True: it is saved."""
        try:
            self.wait()
            new = self.saved_step != self.stage.step or UNDERWAY in self.stage.content()[0]
            if new:
                self.save()
                self.wait()
                return self.saved_step == self.stage.step
        except Exception:
            pass  # the first error is what is told
        return False

    def close(self) -> None:
        """Waits for what is in flight, after whatever has happened; a failure is told and raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is not None:
                self.console.print(
                    f"step {self._in_flight}: the checkpoint could not be saved ({self._error})", soft_wrap=True
                )
