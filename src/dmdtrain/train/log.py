"""Metrics: metrics.jsonl, TensorBoard and the live progress line."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dmdtrain.files import write_text

METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Who else gets the numbers; what it raises is told."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def images(self, step: int, name: str, gifs: list[bytes]) -> None: ...


class MetricsLog:
    """One JSON line per logged step, and the same numbers in TensorBoard and for a tracker. A resumed run drops what lies
    after its step.

    Where the folder can not be written, training goes on: lines are kept and written later, TensorBoard begins a new file.
    """

    def __init__(
        self,
        output_dir: Path,
        first_step: int,
        tensorboard: bool,
        console: Console | None = None,
        tracker: Tracker | None = None,
    ):
        self._tracker = tracker
        self._path, self._console = output_dir / METRICS, console
        self._drop_after(first_step)
        self._unwritten = b""
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._failing: set[str] = set()
        self._events = Events(output_dir / "tensorboard", first_step + 1) if tensorboard else None

    def _drop_after(self, step: int) -> None:
        """Lines of steps that will run again, and of the step's own validation; a line that a kill cut short goes too."""
        if not self._path.exists():
            return
        kept, there = [], self._path.read_text(encoding="utf-8", errors="replace")
        for line in there.splitlines():
            try:
                values = json.loads(line)
                validated = any(key.startswith("validation_") for key in values)
                if values["step"] < step + (not validated):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        if "".join(kept) != there:
            write_text(self._path, "".join(kept))

    @contextmanager
    def _told(self, name: str, errors: type[Exception] = OSError) -> Iterator[None]:
        """An error is told when it begins and does not stop training: of the disk, and of a tracker any at all."""
        try:
            yield
        except errors as error:
            if name not in self._failing and self._console is not None:
                reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
                self._console.print(f"{name} can not be written ({reason}); training goes on", soft_wrap=True)
            self._failing.add(name)
        else:
            self._failing.discard(name)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._unwritten += (json.dumps({"step": step} | values) + "\n").encode()
        with self._told(METRICS):
            self._flush()
        if self._events is not None:
            with self._told("tensorboard", Exception):
                self._events.scalars(step, values)
        if self._tracker is not None:
            with self._told("wandb", Exception):
                self._tracker.scalars(step, values)

    def _flush(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._handle, self._unwritten) :]

    def videos(self, step: int, name: str, gifs: list[bytes], size: tuple[int, int]) -> None:
        """Animated GIFs as TensorBoard images, and for the tracker; size: (height, width)."""
        if self._tracker is not None:
            with self._told("wandb", Exception):
                self._tracker.images(step, name, gifs)
        if self._events is not None:
            with self._told("tensorboard", Exception):
                self._events.images(step, name, gifs, size)

    def close(self) -> None:
        with self._told(METRICS):
            self._flush()
        os.close(self._handle)
        if self._events is not None:
            with self._told("tensorboard", Exception):
                self._events.close()


class Events:
    """TensorBoard's event files, written in the thread that calls, so that an error of the disk is an OSError here.

    A record that was cut short makes the rest of its file unreadable: after an error a new file is begun.
    """

    def __init__(self, folder: Path, first_step: int):
        self.folder, self.first_step = folder, first_step
        self._count = 0
        self._writer: Any = None

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        def event(**fields: Any) -> bytes:
            return Event(wall_time=time.time(), **fields).SerializeToString()

        try:
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{self._count}"
                self._writer = RecordWriter((self.folder / name).open("ab"))
                self._count += 1
                self._writer.write(event(file_version="brain.Event:2"))
                # What earlier files say of this step and later ones no longer holds.
                self._writer.write(event(step=self.first_step, session_log=SessionLog(status=SessionLog.START)))
            self._writer.write(event(step=step, **content))
            self._writer.flush()
            self.first_step = step + 1
        except Exception:
            self.close()
            raise

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]))

    def images(self, step: int, name: str, gifs: list[bytes], size: tuple[int, int]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(
                tag=f"{name}/{i}",
                image=Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=gif),
            )
            for i, gif in enumerate(gifs)
        ]
        self._write(step, summary=Summary(value=values))

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class Phases:
    """Time by phase of a step. On a GPU by events, so that measuring does not wait for it; `take` does."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            span = start.elapsed_time(end) / 1000 if self._cuda else end - start
            seconds[f"seconds_{name}"] = seconds.get(f"seconds_{name}", 0.0) + span
        self._spans.clear()
        return seconds


class Live:
    """The progress line: a bar on a terminal, a line at most every ten seconds elsewhere."""

    def __init__(self, total: int, done: int, console: Console, unit: str = "step"):
        self._console, self._total, self._done, self._unit = console, total, done, unit
        self._recent: deque[float] = deque(maxlen=50)
        self._printed = self._last = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(unit, style="bold"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("fit", total=total, completed=done, text="")

    def __enter__(self) -> Live:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def restart_clock(self) -> None:
        """After validation or a checkpoint, which are not step time."""
        self._last = time.monotonic()

    def step(self, step: int, text: str) -> None:
        now = time.monotonic()
        self._recent.append((now - self._last) / max(1, step - self._done))
        self._last, self._done = now, step
        self.within(text)

    def within(self, text: str) -> None:
        """How far the step in hand is."""
        rate = left = ""
        if self._recent:
            seconds = sum(self._recent) / len(self._recent)
            rate = f"{1 / seconds:.0f} {self._unit}s/s" if 0 < seconds < 0.05 else f"{seconds:.2f} s/{self._unit}"
            whole = int(seconds * (self._total - self._done))
            left = f"  {whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} left"
        text = f"{text} {rate}".strip()
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=text)
        elif now - self._printed > 10 or self._done == self._total:
            self._console.print(f"{self._unit} {self._done}/{self._total}  {text}{left}", soft_wrap=True)
            self._printed = now
