"""What a checkpoint costs the steps, with and without `checkpoint.background`: `python benchmarks/save.py --gib 1`.

The steps are matrix products on the device; the state is as large as asked for, in 800 tensors, on the same device.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from dmdtrain.config import Checkpoint
from dmdtrain.train.checkpoint import Content
from dmdtrain.train.saver import Saver
from dmdtrain.train.setup import device_of_this_machine


class Stage:
    def __init__(self, root: Path, gib: float):
        self.root, self.step, self.bad_in_a_row = root, 0, {"student": 0}
        self.device = device_of_this_machine()
        elements = int(gib * 2**30 / 4 / 800)
        self.tensors = {f"{i:03d}": torch.randn(elements, device=self.device) for i in range(800)}
        self.matrix = torch.randn(1024, 1024, device=self.device)

    def train_step(self) -> None:
        self.step += 1
        for _ in range(4):
            self.matrix @ self.matrix
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def content(self) -> Content:
        return {"student": self.tensors}, {"state.json": "{}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="a folder on the disk to be measured; default: a temporary one")
    arguments = parser.parse_args()
    for background in (False, True):
        with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
            stage = Stage(Path(folder), arguments.gib)
            saver = Saver(stage, Checkpoint(every=1, keep=1, background=background), Console())
            alone, beside, waits = [], [], []
            for _ in range(3):
                for _ in range(20):
                    started = time.perf_counter()
                    stage.train_step()
                    alone.append(time.perf_counter() - started)
                started = time.perf_counter()
                saver.save()
                waits.append(time.perf_counter() - started)
                begun = time.perf_counter()
                while saver.busy:
                    started = time.perf_counter()
                    stage.train_step()
                    beside.append(time.perf_counter() - started)
                writing = time.perf_counter() - begun
                saver.wait()
            slower = statistics.mean(beside) / statistics.mean(alone) - 1 if beside else 0.0
            print(
                f"background {str(background).lower():5}  steps wait {statistics.median(waits):.2f} s for {arguments.gib:g} GiB"
            )
            if background:
                print(f"                  and are {slower:.0%} slower for the {writing:.2f} s in which it is written")


if __name__ == "__main__":
    main()
