"""Real signals, full disks, vanished folders and kills, on real processes of a tiny run."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from clip_files import write_clip
from safetensors.torch import load_file

from dmdtrain.data.decode import read_clip
from dmdtrain.train.checkpoint import check_checkpoint, list_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dmdtrain.train.fit", "dmdtrain.train.commands", "dmdtrain.train.synthesize"])
UNLIMITED = resource.RLIM_INFINITY


def obey_modes() -> None:
    """From here on the modes of files hold for root's process, too: it gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, version = ctypes.CDLL(None, use_errno=True), struct.pack("Ii", 0x20080522, 0)
    capabilities = ctypes.create_string_buffer(24)
    assert libc.capget(version, capabilities) == 0
    effective, *others = struct.unpack("6I", capabilities.raw)
    assert libc.capset(version, struct.pack("6I", effective & ~0b110, *others)) == 0


def command(args: list[str], out: Connection, file_limit: int, terminal: str | None) -> None:
    """In a process of its own, forked from one that has imported everything: what the shell would call."""
    from dmdtrain.cli import main

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # a compiled module that is cut short by the limit would break every later import
    obey_modes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, UNLIMITED))
    os.dup2(out.fileno() if terminal is None else os.open(terminal, os.O_WRONLY), 1)
    os.dup2(out.fileno(), 2)
    sys.argv = ["dmdtrain", *args]
    main()


class Command:
    """A running command and its output so far. terminal: what its standard output is, instead."""

    def __init__(self, args: tuple[object, ...], file_limit: int = UNLIMITED, terminal: str | None = None):
        reader, writer = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=command, args=([str(a) for a in args], writer, file_limit, terminal))
        self.process.start()
        writer.close()
        self._parts: list[bytes] = []
        self._reading = Thread(target=self._read, args=(reader,), daemon=True)
        self._reading.start()

    def _read(self, reader: Connection) -> None:
        while part := os.read(reader.fileno(), 65536):
            self._parts.append(part)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def limit_files(self, size: int) -> None:
        """No file grows beyond `size` bytes from now on: what a full disk is like, without one."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, UNLIMITED))

    @property
    def output(self) -> str:
        return b"".join(self._parts).decode()

    def until(self, true: Callable[[], object], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert self.process.is_alive() and time.monotonic() < end, self.output
            time.sleep(0.005)

    def until_it_says(self, text: str) -> None:
        self.until(lambda: text in " ".join(self.output.split()))

    def code(self, seconds: float = 240) -> int:
        self.process.join(seconds)
        assert not self.process.is_alive(), self.output
        self._reading.join(5)
        assert "Traceback" not in self.output
        return self.process.exitcode


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def launch(*args: object, **options: Any) -> Command:
        started.append(Command(args, **options))
        return started[-1]

    yield launch
    for each in started:
        each.process.kill()
        each.process.join()


@pytest.fixture
def write(settings, tmp_path) -> Callable[..., Path]:
    """The configuration of a run that would go on for long."""

    def config_file(**changes: object) -> Path:
        defaults = {
            "train.max_steps": 100_000,
            "train.batch_size": 1,
            "checkpoint.every": 100_000,
            "validation.every": 0,
            "dmd.generator_update_interval": 1,
        }
        defaults |= {"log.tensorboard": False}
        for key, value in (defaults | changes).items():
            *groups, last = key.split(".")
            branch = settings
            for group in groups:
                branch = branch.setdefault(group, {})
            branch[last] = value
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    return config_file


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def lines(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder) if "critic_loss" in line or "warmup_loss" in line]


def half_written(folder: Path) -> list[str]:
    return [str(f) for f in folder.rglob(".*") if f.name != ".lock"]


def newest(root: Path) -> Path:
    """The newest checkpoint, which must be whole."""
    found = list_checkpoints(root)[-1]
    check_checkpoint(found)
    return found


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.stem}:{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_to_the_bit(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]
    assert (a / "state.json").read_text() == (b / "state.json").read_text()


# ---------------------------------------------------------------------------------------------------- signals

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGUSR1: 75}


SLOW = {"data.resolution": "256x256"}  # half a second a video


def test_a_terminal_that_takes_nothing_stops_nothing(start, write, tmp_path):
    """Output to a full disk: every line is lost."""
    running = start("fit", write(**{"train.max_steps": 2}), terminal="/dev/full")
    assert running.code() == 0, running.output
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirect", "code", "says"),
    [
        ("> /dev/full", 0, "dmdtrain: the last lines of the output are lost: No space left on device\n"),
        ("| true", 0, ""),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_an_output_that_is_lost_changes_no_exit_code(write, unbuffered, redirect, code, says):
    command = f"set -o pipefail; {sys.executable} -m dmdtrain fit {write()} --dry-run {redirect}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    run = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == code, run.stderr
    assert run.stderr == ("" if unbuffered else says)


def test_a_pipe_that_nobody_reads_any_more_stops_nothing(start, write, run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    running = start("fit", write(**{"train.max_steps": 6}), terminal=tmp_path / "pipe")
    running.until(lambda: len(steps(run)) >= 1)
    os.close(reader)
    assert running.code() == 0, running.output
    assert newest(run / "checkpoints").name == "step-000006"


@pytest.mark.parametrize("number", CODES)
def test_a_signal_finishes_the_micro_batch_saves_and_leaves(start, write, run, tmp_path, number):
    file = write()
    fit = start("fit", file)
    fit.until(lambda: len(steps(run)) >= 3)
    fit.send(number)
    assert fit.code() == CODES[number]
    assert "interrupted; the last checkpoint is intact, the same command goes on from it" in fit.output
    step = steps(run)[-1]
    assert newest(run / "checkpoints").name == f"step-{step:06d}"
    assert steps(run) == list(range(1, step + 1)) and not half_written(run)
    # The same command goes on; what it comes to is what a run without a break comes to.
    goes_on, whole = start("fit", file, "--max-steps", step + 2), tmp_path / "whole"
    assert goes_on.code() == 0
    assert start("fit", file, "--max-steps", step + 2, "--output-dir", whole).code() == 0
    assert_same_to_the_bit(newest(run / "checkpoints"), newest(whole / "checkpoints"))
    assert steps(run) == list(range(1, step + 3))


def test_a_notice_and_the_signal_after_it_are_one(start, write, run):
    fit = start("fit", write(**SLOW, **{"train.batch_size": 4, "train.gradient_accumulation": 1000}))
    fit.until(lambda: (run / "config.yaml").exists())
    time.sleep(0.3)
    fit.send(signal.SIGUSR1)
    fit.until_it_says("SIGUSR1: stopping after this micro-batch")
    fit.send(signal.SIGTERM)
    fit.send(signal.SIGUSR1)
    assert fit.code() == 75
    assert "stopped in step 1; saved: what is done of step 1" in fit.output
    assert not steps(run) and newest(run / "checkpoints").name == "step-000000"


def test_a_second_signal_leaves_at_once(start, write, run):
    fit = start("fit", write(**SLOW, **{"train.batch_size": 1000}))
    fit.until(lambda: (run / "config.yaml").exists())
    time.sleep(0.3)
    fit.send(signal.SIGTERM)
    fit.until_it_says("SIGTERM: stopping after this micro-batch; a second signal leaves at once")
    fit.send(signal.SIGTERM)
    assert fit.code(60) == 75
    assert not list_checkpoints(run / "checkpoints") and not half_written(run)


def answering(process: subprocess.Popen) -> bool:
    """Whether it has a handler for SIGUSR1."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGTERM, 0), (signal.SIGINT, 0.3), (signal.SIGUSR1, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_while_a_command_starts_is_one_line(write, number, after):
    """While it imports and loads: in libraries that take no exception there."""
    args = [sys.executable, "-m", "dmdtrain", "fit", write()]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as fit:
        while not answering(fit):
            assert fit.poll() is None
            time.sleep(0.001)
        time.sleep(after)
        fit.send_signal(number)
        _, errors = fit.communicate(timeout=600)
    assert fit.returncode == CODES[number], errors
    *before, last = errors.splitlines()
    assert last == "dmdtrain: interrupted; the last checkpoint is intact, the same command goes on from it"
    assert not before or before == [
        f"dmdtrain: {number.name}: stopping after this micro-batch; a second signal leaves at once"
    ]


LATE = {
    "as the command ends": "from dmdtrain import cli; drain = cli._drain; cli._drain = lambda: (late(), drain())",
    "as the process ends": "import atexit; atexit.register(late)",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", LATE)
@pytest.mark.parametrize("code", [0, 2])
def test_a_signal_that_comes_late_changes_no_exit_code(write, tmp_path, number, when, code):
    late = f"import os, sys\ndef late(): os.kill(os.getpid(), {int(number)})\n{LATE[when]}\n"
    file = write() if code == 0 else tmp_path / "none.yaml"
    script = f"{late}\nfrom dmdtrain.__main__ import main\nsys.argv[0] = 'dmdtrain'\nmain()"
    run = subprocess.run(
        [sys.executable, "-c", script, "config", "show", file], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == code, run.stderr
    assert len(run.stdout.splitlines()) > 100 if code == 0 else run.stderr == f"dmdtrain: {file}: no such file\n"


def test_a_notice_and_a_signal_after_the_save_are_one(start, write, run):
    fit = start("fit", write())
    fit.until(lambda: len(steps(run)) >= 2)
    fit.send(signal.SIGUSR1)
    fit.until_it_says("SIGUSR1: stopping")
    with contextlib.suppress(ProcessLookupError):  # it may end between the question and the signal
        while fit.process.is_alive():
            fit.send(signal.SIGTERM)
            time.sleep(0.002)
    assert fit.code() == 75


def test_a_signal_that_the_parent_ignores_stays_ignored():
    """As in `nohup` and in jobs of a shell's background."""
    code = """if True:
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from dmdtrain.train import interrupt
        with interrupt.listening():
            signal.raise_signal(signal.SIGINT)
            try:
                signal.raise_signal(signal.SIGTERM)
            except interrupt.Interrupted as error:
                print("asked", error.asked.name)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "asked SIGTERM\n"


def test_a_signal_in_validation_leaves_promptly_and_is_made_up_for(start, write, run):
    prompts = [
        f"a {a} {b} {c}" for a in ("red", "blue") for b in ("cat", "dog") for c in ("runs", "sleeps", "on grass")
    ]
    changes = {"validation.every": 1, "validation.count": 12, "validation.prompts": prompts}
    file = write(**changes, **{"validation.num_frames": 9})
    fit = start("fit", file)
    fit.until(lambda: len(steps(run)) == 1)
    time.sleep(0.1)
    fit.send(signal.SIGTERM)
    assert fit.code() == 75
    step = steps(run)[-1]
    samples = run / "samples" / f"step-{step:06d}"
    assert newest(run / "checkpoints").name == f"step-{step:06d}" and not half_written(run)
    lacking = not (samples / "results.json").exists()
    assert lacking, "it was too quick"
    # The step is validated by the next process, though it has nothing to train.
    assert start("fit", file, "--max-steps", step).code() == 0
    assert len(list(samples.glob("*.mp4"))) == 12 and (samples / "results.json").exists()
    finished = start("fit", file, "--max-steps", step)
    assert finished.code() == 0 and "nothing to do" in finished.output


def test_signals_in_the_warm_up_and_while_its_data_are_made(start, write, run, tmp_path):
    changes = {"rollout.causal": True, "rollout.num_frame_per_block": 1, "warmup.kind": "ode_regression"}
    changes |= {
        "warmup.steps": 100_000,
        "warmup.num_samples": 200,
        "warmup.teacher_steps": 30,
        "checkpoint.every": 100_000,
    }
    file = write(**changes)
    made = run / "cache" / "warmup" / "samples"
    making = start("fit", file)
    making.until(lambda: made.exists() and len(list(made.iterdir())) > 2)
    making.send(signal.SIGTERM)
    assert making.code(60) == 75
    assert not half_written(run)
    before = len(list(made.iterdir()))
    assert before < 200 and not steps(run / "warmup")
    training = start("fit", file)
    training.until(lambda: len(steps(run / "warmup")) >= 3)
    training.send(signal.SIGTERM)
    assert training.code() == 75
    assert before <= len(list(made.iterdir())) == 200
    step = steps(run / "warmup")[-1]
    assert newest(run / "warmup").name == f"step-{step:06d}" and not half_written(run)
    again = start("fit", file)
    again.until_it_says(f"resumed from {run / 'warmup' / f'step-{step:06d}'}, warm-up step {step}")
    again.until(lambda: steps(run / "warmup")[-1] > step)
    # A sample that disappears is one line.
    shutil.rmtree(made)
    assert again.code() == 2
    assert "saved: warm-up step" in again.output
    last = again.output.splitlines()[-1]
    assert last.startswith(f"dmdtrain: {made}") and "No such file" in last


def test_embeddings_that_disappear_are_one_line_and_made_again(start, write, run, tmp_path):
    words = ["red", "blue", "cat", "dog", "runs", "sleeps", "on", "grass"]
    (tmp_path / "prompts.txt").write_text("\n".join(" ".join(p) for p in itertools.permutations(words, 4)))
    file, text = write(**{"checkpoint.every": 1}), run / "cache" / "text"
    fit = start("fit", file)
    fit.until(lambda: list_checkpoints(run / "checkpoints"))
    shards = sorted(text.glob("*.safetensors"))
    assert len(shards) > 5
    for shard in shards:
        shard.unlink()
    assert fit.code() == 2
    last = fit.output.splitlines()[-1]
    assert last.endswith(" has gone; the same command makes it again")
    assert last.startswith(f"dmdtrain: data.cache_dir: {text}") and Path(last.split()[2]) in shards
    step = int(newest(run / "checkpoints").name.split("-")[1])
    again = start("fit", file, "--max-steps", step + 2)
    assert again.code() == 0 and sorted(text.glob("*.safetensors"))
    assert newest(run / "checkpoints").name == f"step-{step + 2:06d}"


def test_a_signal_while_the_teacher_makes_samples(start, write, tmp_path):
    file, out = write(**{"data.resolution": "64x64"}), tmp_path / "made"
    first = start("synthesize", file, "--out", out, "--what", "videos", "--count", 60, "--steps", 4)
    first.until(lambda: list((out / "samples").glob("*.mp4")))
    first.send(signal.SIGTERM)
    assert first.code(60) == 75
    made = list((out / "samples").glob("*.mp4"))
    assert 0 < len(made) < 60 and not half_written(out)
    assert (
        start("synthesize", file, "--out", out, "--what", "videos", "--count", len(made) + 1, "--steps", 4).code() == 0
    )


@pytest.mark.parametrize("what", ["latents", "videos"])
def test_the_teacher_makes_samples_in_two_processes_at_once(start, write, tmp_path, what):
    file, out = write(**{"data.resolution": "64x64"}), tmp_path / "made"
    args = ("synthesize", file, "--what", what, "--count", 12, "--steps", 4, "--out")
    first = start(*args, out)
    first.until(lambda: (out / "samples").is_dir())
    second = start(*args, out)
    assert first.code() == second.code() == 0
    assert not half_written(out)
    assert start(*args, tmp_path / "alone").code() == 0
    made, alone = ({f.name: f for f in (folder / "samples").iterdir()} for folder in (out, tmp_path / "alone"))
    assert made.keys() == alone.keys() and len(made) == (24 if what == "videos" else 12)
    for name, file in made.items():  # batches may be cut otherwise, which rounds otherwise
        if what == "latents":
            torch.testing.assert_close(load_file(file), load_file(alone[name]), rtol=0.01, atol=0.01)
        elif name.endswith(".mp4"):
            assert read_clip(file, 9, 64, 64).shape == (3, 9, 64, 64)


def test_a_signal_while_prompts_are_encoded(start, write, run, tmp_path):
    words = ["red", "blue", "cat", "dog", "runs", "sleeps", "on", "grass"]
    (tmp_path / "prompts.txt").write_text("\n".join(" ".join(p) for p in itertools.permutations(words, 6)))
    fit = start("fit", write())
    cache = run / "cache" / "text"
    fit.until(lambda: list(cache.glob("*.safetensors")))
    fit.send(signal.SIGINT)
    assert fit.code(60) == 130
    assert not half_written(run) and not (run / "config.yaml").exists()
    made = sum(len(load_file(file)) for file in cache.glob("*.safetensors"))
    assert 0 < made < 20_000


# ---------------------------------------------------------------------------------------------------- the disk


def test_a_disk_that_is_full_for_a_while_costs_nothing(start, write, run):
    """Checkpoints, metrics, TensorBoard, samples: none can be written; then all can."""
    changes = {
        "checkpoint.every": 2,
        "checkpoint.keep": 3,
        "log.tensorboard": True,
        "checkpoint.max_failed_saves": 1000,
    }
    fit = start("fit", write(**changes, **{"validation.every": 5, "validation.num_frames": 1, "validation.count": 1}))
    fit.until(lambda: list_checkpoints(run / "checkpoints"))
    fit.limit_files(1)
    time.sleep(1.5)
    assert fit.process.is_alive()
    stuck = steps(run)[-1]
    kept = newest(run / "checkpoints")  # the last good one is untouched
    assert not list((run / "checkpoints").glob(".*"))
    fit.limit_files(UNLIMITED)
    fit.until(lambda: list_checkpoints(run / "checkpoints")[-1] != kept and steps(run)[-1] > stuck + 2)
    fit.send(signal.SIGTERM)
    assert fit.code() == 75
    assert steps(run) == list(range(1, steps(run)[-1] + 1))  # every line was kept
    assert newest(run / "checkpoints").name == f"step-{steps(run)[-1]:06d}" and not half_written(run)
    assert len(list((run / "tensorboard").iterdir())) >= 2
    assert tensorboard_steps(run)[-1] == steps(run)[-1]


def tensorboard_steps(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("critic_loss")]


def test_what_is_said_of_a_full_disk(start, write, run):
    file = write(**{"checkpoint.every": 1, "checkpoint.max_failed_saves": 4, "log.tensorboard": True})
    fit = start("fit", file)
    fit.until(lambda: list_checkpoints(run / "checkpoints"))
    fit.limit_files(1)
    assert fit.code() == 74
    said = [line for line in fit.output.splitlines() if "File too large" in line]
    saves = [line for line in said if "the checkpoint could not be saved" in line]
    assert [line.split("failure ")[1] for line in saves] == [f"{n} of at most 4 in a row" for n in (1, 2, 3, 4)]
    assert sum("tensorboard can not be written" in line for line in said) <= 1
    assert said[-1].startswith("dmdtrain: step ") and "4 saves in a row failed (File too large)" in said[-1]
    good = newest(run / "checkpoints")
    assert not half_written(run)
    again = start("fit", file, "--max-steps", int(good.name.split("-")[1]) + 3)
    assert again.code() == 0 and f"resumed from {good}" in again.output


@pytest.mark.parametrize("background", [True, False])
def test_failures_wait_longer_each_time(start, write, run, background):
    fit = start(
        "fit", write(**{"checkpoint.every": 4, "checkpoint.max_failed_saves": 5, "checkpoint.background": background})
    )
    fit.until(lambda: list_checkpoints(run / "checkpoints"))
    good = list_checkpoints(run / "checkpoints")
    fit.limit_files(2000)
    assert fit.code() == 74
    at = [int(line.split()[1].rstrip(":")) for line in fit.output.splitlines() if "could not be saved" in line]
    assert len(at) == 5 and list_checkpoints(run / "checkpoints")[: len(good)] == good
    least = [1, 2, 4, 4]  # a thread is seen to have failed a step later
    waits = [b - a for a, b in itertools.pairwise(at)]
    assert all(wait == want if not background else wait >= want for wait, want in zip(waits, least, strict=True)), at


def test_the_last_step_is_saved_as_soon_as_it_can_be(start, write, run):
    """The run has its steps, and the disk is full."""
    fit = start("fit", write(**{"train.max_steps": 100, "checkpoint.every": 100, "checkpoint.max_failed_saves": 10}))
    fit.until(lambda: len(steps(run)) >= 2)
    fit.limit_files(3000)
    fit.until_it_says("could not be saved")
    fit.limit_files(UNLIMITED)
    assert fit.code() == 0
    assert newest(run / "checkpoints").name == "step-000100"
    assert steps(run) == list(range(1, 101))


def test_a_folder_that_vanishes_and_comes_back(start, write, run):
    """As a mount does. Nothing is written to where it was meanwhile."""
    fit = start("fit", write(**{"checkpoint.every": 1, "checkpoint.max_failed_saves": 1000}))
    fit.until(lambda: list_checkpoints(run / "checkpoints"))
    fit.until(lambda: len(steps(run)) >= 5)  # every prompt's embedding has been read
    away = run.rename(run.with_name("away"))
    fit.until_it_says("has gone); failure 2 of at most 1000")
    assert not run.exists()
    kept = newest(away / "checkpoints")
    away.rename(run)
    fit.until(lambda: list_checkpoints(run / "checkpoints")[-1] != kept)
    fit.send(signal.SIGTERM)
    assert fit.code() == 75
    assert steps(run) == list(range(1, steps(run)[-1] + 1))
    assert newest(run / "checkpoints").name == f"step-{steps(run)[-1]:06d}"


def test_files_in_place_of_folders_do_not_stop_training(start, write, run):
    changes = {"train.max_steps": 4, "log.tensorboard": True, "validation.every": 2, "validation.num_frames": 1}
    file = write(**changes)
    assert (
        start("fit", file, "--max-steps", 1, "--set", "log.tensorboard=false", "--set", "validation.every=0").code()
        == 0
    )
    for name in ("tensorboard", "samples"):
        (run / name).write_text("in the way")
    fit = start("fit", file)
    assert fit.code() == 0
    assert fit.output.count("tensorboard can not be written (File exists); training goes on") == 1
    assert fit.output.count("the samples could not be written (") == 2
    assert steps(run) == [1, 2, 3, 4] and newest(run / "checkpoints").name == "step-000004"


def test_commands_on_a_full_disk_end_in_one_line_and_leave_nothing(start, write, run, tmp_path):
    file = write(**{"train.max_steps": 1, "validation.num_frames": 1})
    assert start("fit", file).code() == 0
    ckpt, out = run / "checkpoints" / "step-000001", tmp_path / "out"
    out.mkdir()
    write_clip(tmp_path / "clips" / "a.mp4", 9)
    videos = (f"data.videos={tmp_path / 'clips'}", "dmd.real_data_loss_weight=0.5", f"data.cache_dir={out / 'shared'}")
    with_clips = [part for change in videos for part in ("--set", change)]
    quickstart = Path(__file__).parent / "simpletuner_quickstart.json"
    for args in (
        ("fit", file, "--output-dir", out / "fit"),
        ("validate", "--ckpt", ckpt, "--out", out / "validate"),
        ("generate", "--ckpt", ckpt, "a cat", "--out", out / "a.mp4"),
        ("export-lora", "--ckpt", ckpt, "--out", out / "a.safetensors"),
        ("export-pipeline", "--ckpt", ckpt, "--out", out / "pipeline"),
        ("synthesize", file, "--out", out / "made", "--count", 1, "--steps", 3),
        ("prepare", file, "--set", f"output_dir={out / 'prepare'}"),
        ("prepare", file, "--set", f"output_dir={out / 'clips'}", *with_clips),
        ("import-config", quickstart, "--out", out / "run.yaml"),
    ):
        full = start(*args, file_limit=900 if args[0] == "synthesize" else 300)
        assert full.code() == 74, full.output
        last = full.output.splitlines()[-1]
        assert last.startswith(f"dmdtrain: {tmp_path}") and "File too large" in last, (args, last)
        assert not [f for f in half_written(out) if "partial" in f], args[0]
        assert not [f for f in out.iterdir() if f.suffix or f.name == "pipeline"]


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_folder_that_may_not_be_written_any_more(start, write, run):
    fit = start("fit", write(**{"checkpoint.every": 1, "checkpoint.max_failed_saves": 1000}))
    root = run / "checkpoints"
    fit.until(lambda: list_checkpoints(root))
    root.chmod(0o555)
    fit.until_it_says("could not be saved (Permission denied")
    kept, trained = list_checkpoints(root), steps(run)[-1]
    fit.until(lambda: steps(run)[-1] > trained + 2)  # training goes on
    assert list_checkpoints(root) == kept and not half_written(run)
    root.chmod(0o755)
    fit.until(lambda: list_checkpoints(root)[-1] > kept[-1])
    root.chmod(0o555)
    fit.send(signal.SIGTERM)
    assert fit.code() == 75 and "saved: step" in fit.output
    run.chmod(0o555)
    for more in ((), ("--dry-run",)):
        refused = start("fit", write(), *more)
        assert refused.code() == 2
        assert f"dmdtrain: output_dir: {run} can not be written: {run} is read-only" in refused.output
    run.chmod(0o755)
    kept, logged = list_checkpoints(root), lines(run)
    for closed in (root, newest(root), newest(root) / "ema.safetensors"):
        was = closed.stat().st_mode
        closed.chmod(0)  # neither an empty folder nor a damaged checkpoint
        refused = start("fit", write())
        assert refused.code() == 2
        assert refused.output.splitlines()[-1].endswith("can not be read: Permission denied"), refused.output
        assert str(closed) in refused.output.splitlines()[-1]
        closed.chmod(was)
    assert list_checkpoints(root) == kept and lines(run) == logged
    again = start("fit", write())
    again.until_it_says("resumed from ")


def test_folders_that_may_not_be_entered_are_named_by_their_keys(start, write, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    causal = {"rollout.causal": True, "rollout.num_frame_per_block": 1, "warmup.kind": "teacher_forcing"}
    for changes in (
        {"output_dir": str(locked / "run")},
        {"model.base": str(locked / "wan")},
        {"model.quantized_cache": str(locked / "kept"), "model.precision": "int8"},
        {"data.prompts": str(locked / "prompts.txt")},
        {"validation.prompts": str(locked / "prompts.txt")},
        {"data.videos": str(locked / "clips"), "dmd.real_data_loss_weight": 0.1},
        {"warmup.data": str(locked / "made")} | causal,
    ):
        values = yaml.safe_load(write().read_text())
        for key, value in changes.items():
            group, _, name = key.rpartition(".")
            (values.setdefault(group, {}) if group else values)[name] = value
        file = tmp_path / "changed.yaml"
        file.write_text(yaml.safe_dump(values))
        refused = start("fit", file)
        assert refused.code() == 2, (changes, refused.output)
        key = next(iter(changes))
        last = refused.output.splitlines()[-1]
        assert last.startswith(f"dmdtrain: {key}: {locked}/"), (changes, last)
        assert last.endswith("Permission denied"), (changes, last)
    refused = start("fit", write(), "--resume", locked / "step-000002")
    assert refused.code() == 2
    assert f"dmdtrain: --resume: {locked / 'step-000002'} can not be read: Permission denied" in refused.output


def test_a_quantized_cache_that_may_not_be_written(start, write, tmp_path):
    """No folder where none can be made is a mistake; one that is there may hold what is needed, and is done without otherwise."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    kept = {"model.precision": "int8", "model.quantized_cache": str(closed / "kept"), "train.max_steps": 1}
    refused = start("fit", write(**kept), "--dry-run")
    assert refused.code() == 2
    last = refused.output.splitlines()[-1]
    assert last.startswith(
        f"dmdtrain: model.quantized_cache: {closed / 'kept'} can not be written: {closed} is read-only"
    )
    fit = start("fit", write(**kept | {"model.quantized_cache": str(closed)}))
    assert fit.code() == 0, fit.output
    (line,) = [line for line in fit.output.splitlines() if line.startswith("model.quantized_cache: ")]
    assert line.endswith(" can not be written (Permission denied); the run goes on without it")
    assert not list(closed.iterdir())


def test_a_file_system_that_is_full_read_only_and_gone(start, write, tmp_path):
    with mounted(tmp_path / "disk", "3m") as disk:
        run = disk / "run"
        changes = {
            "output_dir": str(run),
            "checkpoint.every": 1,
            "checkpoint.keep": 1,
            "checkpoint.max_failed_saves": 1000,
        }
        fit = start("fit", write(**changes))
        fit.until(lambda: list_checkpoints(run / "checkpoints"))
        with contextlib.suppress(OSError), (disk / "ballast").open("wb") as ballast:
            while True:
                ballast.write(bytes(4096))
                ballast.flush()
        fit.until_it_says("could not be saved (no space left on device")
        kept = newest(run / "checkpoints")
        (disk / "ballast").unlink()
        fit.until(lambda: list_checkpoints(run / "checkpoints")[-1] != kept)
        # Read-only. The metrics file is open for writing: the kernel refuses to remount before it is closed, unless forced.
        subprocess.run(["umount", "-l", disk], check=True)
        fit.until_it_says("has gone)")
        assert not any(disk.iterdir())
        fit.send(signal.SIGTERM)
        assert fit.code() == 75
        assert not any(disk.iterdir())
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,ro", "tmpfs", disk], check=True)
        refused = start("fit", write(**changes))
        assert refused.code() == 2
        last = refused.output.splitlines()[-1]
        assert last.startswith(f"dmdtrain: output_dir: {run} can not be written: {disk} is read-only")


def test_memory_that_runs_out_is_one_line(start, write, run):
    """A real refusal of the host's allocator: the noise of one step would take more than a machine has."""
    file = write(**{"data.resolution": "8192x8192", "rollout.num_training_frames": 1000, "train.batch_size": 1000})
    fit = start("fit", file)
    assert fit.code() == 1
    (line,) = [line for line in fit.output.splitlines() if line.startswith("dmdtrain: ")]
    assert "out of memory (can't allocate memory" in line
    assert "train.gradient_checkpointing=true" in line and "train.batch_size=1" in line and "dmdtrain plan" in line


# ---------------------------------------------------------------------------------------------------- which checkpoint


def test_a_damaged_newest_checkpoint_is_told_set_aside_and_passed_over(start, write, run, tmp_path):
    file = write(**{"train.max_steps": 6, "checkpoint.every": 2, "checkpoint.keep": 9})
    assert start("fit", file).code() == 0
    whole = shutil.copytree(run, tmp_path / "whole")
    root = run / "checkpoints"
    content = bytearray((root / "step-000006" / "student.safetensors").read_bytes())
    content[-1] ^= 1
    (root / "step-000006" / "student.safetensors").write_bytes(content)
    (root / "step-000004" / "ema.safetensors").unlink()
    again = start("fit", file)
    assert again.code() == 0
    told = [line for line in again.output.splitlines() if line.startswith("damaged: ")]
    assert told == [
        f"damaged: {root / 'step-000006'}: student.safetensors is damaged (its checksum differs); it is "
        "damaged-1-step-000006 now",
        f"damaged: {root / 'step-000004'}: ema.safetensors is missing; it is damaged-1-step-000004 now",
    ]
    assert f"resumed from {root / 'step-000002'}" in again.output
    assert (root / "damaged-1-step-000006" / "student.safetensors").read_bytes() == content
    assert_same_to_the_bit(root / "step-000006", whole / "checkpoints" / "step-000006")


def test_minutes_decide_as_well(start, write, run):
    fit = start("fit", write(**{"checkpoint.every_minutes": 0.3 / 60, "checkpoint.keep": 100}))
    fit.until(lambda: len(list_checkpoints(run / "checkpoints")) >= 3)
    fit.send(signal.SIGTERM)
    assert fit.code() == 75
    seconds = [f.stat().st_mtime for f in list_checkpoints(run / "checkpoints")[:-1]]
    assert all(0.2 < b - a < 60 for a, b in itertools.pairwise(seconds))


def test_the_owner_of_a_folder_is_named(start, write, run):
    fit = start("fit", write())
    fit.until(lambda: len(steps(run)) >= 1)
    second = start("fit", write())
    assert second.code() == 2
    assert f"is in use by another process (pid {fit.process.pid} on {os.uname().nodename})" in second.output
    fit.send(signal.SIGKILL)
    fit.process.join()
    assert start("fit", write(), "--max-steps", 2).code() == 0  # a dead one is no obstacle


def test_a_second_process_leaves_the_report_of_clips_alone(start, write, run, tmp_path):
    for name, count in (("good", 9), ("short", 2)):
        write_clip(tmp_path / "clips" / f"{name}.mp4", count)
    file = write(**{"data.videos": str(tmp_path / "clips"), "dmd.real_data_loss_weight": 0.5})
    fit = start("fit", file)
    fit.until(lambda: len(steps(run)) >= 1)
    report = (run / "data_report.jsonl").read_bytes()
    assert len(report.splitlines()) == 1
    write_clip(tmp_path / "clips" / "later.mp4", 3)
    for more in ((), ("--dry-run",)):
        second = start("fit", file, *more)
        assert second.code() == 2 and "is in use by another process" in second.output
    assert (run / "data_report.jsonl").read_bytes() == report


@pytest.mark.timeout(3600)  # a minute or two, on a machine that has nothing else to do
def test_random_kills_come_to_the_same_bits(tmp_path):
    """`make torture` does it for longer."""
    script = Path(__file__).parents[1] / "scripts" / "torture.py"
    args = [sys.executable, script, "--runs", "6", "--seed", str(os.getpid()), "--out", tmp_path / "torture"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert " 6 runs killed, " in last and last.endswith(": all came to the same bits")
