"""When checkpoints are written, and that a thread writes what the state was."""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dmdtrain.config import Checkpoint
from dmdtrain.files import atomic, atomic_folder, save_tensors, write_text
from dmdtrain.train import interrupt, saver
from dmdtrain.train.checkpoint import Content, check_checkpoint, list_checkpoints
from dmdtrain.train.memory import free_memory, out_of_memory, ran_out
from dmdtrain.train.saver import Saver, SavesFailed, TrainingStopped, copied, size_of


class Counting:
    """A stage whose weights are its step, changed in place."""

    def __init__(self, root: Path, elements: int = 1000):
        self.root, self.step, self.bad_in_a_row = root, 0, {"student": 0}
        self.weights = torch.zeros(elements)

    def train(self) -> None:
        self.step += 1
        self.weights += 1

    def spoil(self, value: float) -> None:
        self.weights[-1] = value

    def content(self) -> Content:
        return {"student": {"a": self.weights, "b": self.weights}}, {"state.json": "{}"}


def steps(root: Path) -> list[int]:
    return [int(folder.name.split("-")[1]) for folder in list_checkpoints(root)]


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_what_the_state_was(tmp_path, background):
    stage = Counting(tmp_path / "checkpoints", 2_000_000)
    saving = Saver(stage, Checkpoint(every=1, keep=100, background=background), Console(quiet=True))
    for _ in range(6):
        stage.train()
        assert saving.after_step()
        assert saving.busy <= background  # in the foreground it is never busy afterwards
    saving.finish()
    assert steps(stage.root) == [1, 2, 3, 4, 5, 6] and saving.saved_step == 6
    for step in range(1, 7):
        check_checkpoint(stage.root / f"step-{step:06d}")
        found = load_file(stage.root / f"step-{step:06d}" / "student.safetensors")
        assert all(bool((value == step).all()) for value in found.values()) and len(found) == 2


def test_background_means_a_thread(tmp_path):
    stage = Counting(tmp_path / "checkpoints", 5_000_000)
    saving = Saver(stage, Checkpoint(every=1), Console(quiet=True))
    stage.train()
    saving.save()
    assert saving.busy and not list_checkpoints(stage.root)
    saving.wait()
    assert not saving.busy and steps(stage.root) == [1]


def test_a_copy_that_does_not_fit_is_not_made(tmp_path, monkeypatch):
    """The machine's memory is as it is; how much of it may be taken is said to be almost nothing."""
    monkeypatch.setattr(saver, "MEMORY_SHARE", 1e-9)
    printed = Console(file=io.StringIO(), width=500)
    stage = Counting(tmp_path / "checkpoints", 1_000_000)
    saving = Saver(stage, Checkpoint(every=1), printed)
    for _ in range(2):
        stage.train()
        saving.after_step()
        assert not saving.busy and steps(stage.root)[-1] == stage.step
    assert printed.file.getvalue().count("checkpoint.background: a copy of 0.0 GiB does not fit in host memory") == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_without_memory_for_a_copy_or_a_thread_the_save_is_made_at_once(tmp_path, monkeypatch, error):
    def refuse(_: Content) -> Content:
        raise error

    monkeypatch.setattr(saver, "copied", refuse)
    stage = Counting(tmp_path / "checkpoints")
    saving = Saver(stage, Checkpoint(every=1), Console(quiet=True))
    stage.train()
    assert saving.after_step() and not saving.busy and steps(stage.root) == [1]


MEMORY = {
    "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB)": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB"
    ),
    "out of memory (CUDA out of memory)": RuntimeError("CUDA error: CUDA out of memory\n"),
    "out of memory (out of memory Search for `cudaErrorMemoryAllocation')": RuntimeError(
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"
    ),
    "out of memory (CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`)": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "out of memory (can't allocate memory: you tried to allocate 8 bytes.)": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    ),
    "out of memory (Cannot allocate memory (12))": RuntimeError(
        "unable to mmap 70 bytes from file <a.safetensors>: Cannot allocate memory (12)"
    ),
    "out of memory (Cannot allocate memory)": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "out of memory (of the host)": MemoryError(),
}


@pytest.mark.parametrize("told", MEMORY)
def test_what_ran_out(told):
    assert ran_out(MEMORY[told]) and out_of_memory(MEMORY[told]) == told


def test_other_errors_are_none_of_memory():
    for error in (RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left on device"), ValueError("a")):
        assert not ran_out(error)


def test_sizes_and_memory():
    content: Content = ({"a": {"x": torch.zeros(3, 4)}, "b": {"y": torch.zeros(5, dtype=torch.uint8)}}, {})
    assert size_of(content) == 53
    assert 2**20 < free_memory() < 2**50
    (tensors, _) = copied(content)
    tensors["a"]["x"] += 1
    assert float(content[0]["a"]["x"].sum()) == 0


def test_bad_steps_are_not_saved_but_as_soon_as_they_are_over(tmp_path):
    stage = Counting(tmp_path / "checkpoints")
    saving = Saver(stage, Checkpoint(every=2, background=False), Console(quiet=True))
    for bad in (0, 1, 2, 0, 0):
        stage.train()
        stage.bad_in_a_row["student"] = bad
        saving.after_step()
    assert steps(stage.root) == [4]
    stage.bad_in_a_row["student"] = 1
    saving.finish()
    assert steps(stage.root) == [4, 5]


def test_what_is_saved_of_skipped_updates_removes_nothing(tmp_path):
    stage = Counting(tmp_path / "checkpoints")
    saving = Saver(stage, Checkpoint(every=1, keep=1, background=False), Console(quiet=True))
    for _ in range(2):
        stage.train()
        saving.after_step()
    assert steps(stage.root) == [2]
    stage.train()
    stage.bad_in_a_row["student"] = 1
    assert saving.rescue() and steps(stage.root) == [2, 3]
    stage.train()
    stage.bad_in_a_row["student"] = 0
    saving.after_step()
    assert steps(stage.root) == [4]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value, background):
    """Nobody could read them, and they would push out what is good."""
    printed = Console(file=io.StringIO(), width=500)
    stage = Counting(tmp_path / "checkpoints")
    saving = Saver(stage, Checkpoint(every=1, keep=1, background=background), printed)
    stage.train()
    saving.after_step()
    stage.train()
    stage.spoil(value)
    saving.after_step()
    for failed in (0, 1):  # an earlier save may have failed, too
        saving.failed = failed
        with pytest.raises(
            TrainingStopped, match=r"^the weights of step 2 are not finite and are not saved; lower the "
        ):
            saving.finish()
    assert not saving.rescue()
    saving.close()
    assert steps(stage.root) == [1] and "step 2: the weights are not finite" in printed.file.getvalue()  # type: ignore[attr-defined]


def test_minutes(tmp_path):
    stage = Counting(tmp_path / "checkpoints")
    saving = Saver(stage, Checkpoint(every=1000, every_minutes=1e-9, background=False), Console(quiet=True))
    stage.train()
    assert saving.after_step() and steps(stage.root) == [1]
    never = Saver(stage, Checkpoint(every=1000, every_minutes=0), Console(quiet=True))
    stage.train()
    assert not never.after_step()


def test_a_folder_that_has_gone_is_not_made_again(tmp_path):
    printed = Console(file=io.StringIO(), width=500)
    stage = Counting(tmp_path / "run" / "checkpoints")
    saving = Saver(stage, Checkpoint(every=1, max_failed_saves=2, background=False), printed)
    stage.root.rmdir()
    stage.train()
    saving.after_step()
    stage.train()
    with pytest.raises(
        SavesFailed, match=r"^step 2: 2 saves in a row failed \(.* has gone\); nothing is saved yet: make"
    ):
        saving.after_step()
    assert not stage.root.exists()
    saving.close()


# ---------------------------------------------------------------------------------------------------- files


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "first")
    with pytest.raises(UnicodeEncodeError), atomic(file) as partial:
        partial.write_text("sec\udc80", encoding="utf-8")
    assert file.read_text() == "first" and [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "folder") as partial:
        shutil.copytree(tmp_path / "none", partial / "half")
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "b.txt").write_text("whole")
    assert (tmp_path / "folder" / "b.txt").read_text() == "whole"


def test_tensors_that_can_not_be_written_are_an_error_of_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        save_tensors(tmp_path / "none" / "a.safetensors", {"a": torch.zeros(3)})
    assert caught.value.errno == 2
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3)}, {"caption": "x"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(3))


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_outside_of_steps_a_signal_raises_where_the_program_is(number):
    before = signal.getsignal(number)
    with interrupt.listening():
        assert not interrupt.asked()
        with pytest.raises(interrupt.Interrupted) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.asked == number and interrupt.asked()
    assert signal.getsignal(number) == before


def test_within_steps_it_is_remembered(capfd):
    with interrupt.listening():
        interrupt.check()
        with interrupt.patiently():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.asked()
        with pytest.raises(interrupt.Interrupted, match="SIGTERM"):
            interrupt.check()
    assert (
        capfd.readouterr().err == "dmdtrain: SIGUSR1: stopping after this micro-batch; a second signal leaves at once\n"
    )
    with interrupt.listening():
        assert not interrupt.asked()  # the next command starts afresh
