"""Metrics: metrics.jsonl, TensorBoard and the live progress line."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"


class MetricsLog:
    """One JSON line per logged step, and the same numbers in TensorBoard. A resumed run drops what lies after its step."""

    def __init__(self, output_dir: Path, first_step: int, tensorboard: bool):
        self._path = output_dir / METRICS
        self._drop_after(first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1)

    def _drop_after(self, step: int) -> None:
        """Lines of steps that will run again; a line that a kill cut short goes too."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self._path)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def videos(self, step: int, name: str, gifs: list[bytes], size: tuple[int, int]) -> None:
        """Animated GIFs as TensorBoard images; size: (height, width)."""
        if self._writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(
                tag=f"{name}/{i}",
                image=Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=gif),
            )
            for i, gif in enumerate(gifs)
        ]
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


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
                TextColumn(f"[bold]{unit}"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
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
        seconds = sum(self._recent) / len(self._recent)
        rate = f"{1 / seconds:.0f} {self._unit}s/s" if 0 < seconds < 0.05 else f"{seconds:.2f} s/{self._unit}"
        text = f"{text} {rate}".strip()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._printed > 10 or step == self._total:
            left = int(seconds * (self._total - step))
            self._console.print(
                f"{self._unit} {step}/{self._total}  {text}  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
                soft_wrap=True,
            )
            self._printed = now
