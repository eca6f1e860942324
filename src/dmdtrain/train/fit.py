"""`dmdtrain fit`: which checkpoint a run goes on from, whose its folder is, and the run from the check to the end."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import Config, ConfigError, unwritable
from dmdtrain.files import is_partial, remove_partial, write_text
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train.alarms import BAD_STEPS
from dmdtrain.train.checkpoint import CHECKPOINTS, WARMUP
from dmdtrain.train.clips import REPORT, Clips, clip_sets, describe_clips, scan, with_captions
from dmdtrain.train.memory import out_of_memory, ran_out
from dmdtrain.train.plan import changes, memory_lines
from dmdtrain.train.reports import Reports, check_reports, reporting
from dmdtrain.train.saver import TrainingStopped
from dmdtrain.train.setup import Run, attention_of, describe, device_of_this_machine, resolve
from dmdtrain.train.step import check_score_ranges
from dmdtrain.train.trainer import Trainer
from dmdtrain.train.warmup import Warmup, check_data

LOCK = ".lock"


def fit(config: Config, resume: str, console: Console, *, dry_run: bool = False) -> None:
    """`dmdtrain fit`: resolve, check, build, resume, train."""
    try:
        _check_and_fit(config, resume, console, dry_run)
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
        raise TrainingStopped(f"{out_of_memory(error)}; the last checkpoint is intact; {smaller(config)}") from None


def smaller(config: Config) -> str:
    """What makes the run smaller: first what the same run can go on with."""
    same: list[str] = []
    new: list[str] = []
    after = config
    for change in changes(config):
        before, after = after, configuration.changed(after, change)
        named = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
        (new if configuration.differences(before, after) else same).append(named)
    told = [f"the same run can go on with {'; '.join(same[:3])}"] if same else []
    told += [f"a new one with {'; '.join(new[:3])}"] if new else []
    return f"{', '.join(told) or 'fewer frames or a smaller resolution help'} (dmdtrain plan CONFIG says by how much)"


def _check_and_fit(config: Config, resume: str, console: Console, dry_run: bool) -> None:
    run = resolve(config)
    check_score_ranges(config, run.timesteps)
    for folder in (run.base, run.teacher):
        attention_of(config, folder, device_of_this_machine())
    check_data(run)
    check_output(config, resume)
    check_reports(config)
    with (
        locked(run.output_dir, console) if clip_sets(run) or not dry_run else nullcontext()
    ):  # a scan writes its report
        scanned = scan(run, console)
        run = with_captions(run, scanned)
        for line in describe(run) + describe_clips(run, scanned):
            console.print(line, soft_wrap=True, highlight=False)
        if torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info()
            for line in memory_lines(run, free):
                console.print(line, soft_wrap=True, highlight=False)
        if dry_run:
            console.print("dry run: everything that can be checked without loading a model is in order", soft_wrap=True)
            return
        with reporting(run, console) as reports:
            _fit(run, resume, console, scanned, reports)


def _fit(run: Run, resume: str, console: Console, scanned: dict[str, Clips], reports: Reports) -> None:
    config, output = run.config, run.output_dir
    checkpoint, damaged = pick_checkpoint(config, resume)
    trainer = Trainer(run, console, scanned, reports)
    for line in describe(run, trainer.roles)[-2:]:
        console.print(line, soft_wrap=True, highlight=False)
    warming = checkpoint is not None and checkpoints.stage_of(checkpoint) == WARMUP
    warmup = None
    if config.warmup.kind != "none" and (checkpoint is None or warming):
        warmup = Warmup(run, trainer.renderer, console, trainer.clips, reports)
    if checkpoint is not None:  # before anything is written: what can not be loaded leaves all as it was
        check_models(run, checkpoint)
        stage = "warm-up step" if warmup else "step"
        if warmup is not None:
            warmup.prepare()
            warmup.load(checkpoint)
        elif warming:
            raise ConfigError(f"--resume: {checkpoint} is of a warm-up, and warmup.kind is none")
        else:
            trainer.load(checkpoint)
        console.print(f"resumed from {checkpoint}, {stage} {(warmup or trainer).step}", soft_wrap=True)
    _claim(run, checkpoint, damaged, console)
    if warmup is not None:
        if checkpoint is None:
            warmup.prepare()
        trainer.warm_up(warmup)
    if trainer.step >= config.train.max_steps and not trainer.lacks_validation():
        console.print(f"nothing to do: the run already has its {config.train.max_steps} steps", soft_wrap=True)
        return
    trainer.fit()
    saved = checkpoints.list_checkpoints(output / CHECKPOINTS)
    for name, count in trainer.bad_in_a_row.items():
        if count:
            console.print(f"the last {count} updates of {name} were not finite and were skipped", soft_wrap=True)
    if saved:
        console.print(f"done: {saved[-1]}", soft_wrap=True)


def _claim(run: Run, checkpoint: Path | None, damaged: dict[Path, str], console: Console) -> None:
    """The folder is the run's from here on: what failed before leaves it free."""
    output = run.output_dir
    try:
        for root in (output / CHECKPOINTS, output / WARMUP):
            checkpoints.remove_leftovers(root)
        for folder in (output, output / WARMUP, output / BAD_STEPS, *(output / "samples").glob("*")):
            remove_partial(folder)
        write_text(output / "config.yaml", configuration.dump(run.config))
        for folder, what in damaged.items():
            moved = checkpoints.set_aside(folder, "damaged")
            console.print(f"damaged: {folder}: {what}; it is {moved.name} now", soft_wrap=True)
        for later in checkpoints.set_aside_later(output, checkpoint):
            console.print(f"set aside: {later}, which came after the checkpoint that is resumed", soft_wrap=True)
    except OSError as error:
        raise unwritable("output_dir", output, error) from None


def check_output(config: Config, resume: str) -> None:
    """ConfigError unless output_dir is free or this run's own, and `resume`, where it is a folder, a checkpoint of it."""
    output = Path(config.output_dir)
    above = next(folder for folder in (output, *output.parents) if folder.exists())
    if not above.is_dir():
        where = f"{output}: {above}" if above != output else output
        raise ConfigError(f"output_dir: {where} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(f"output_dir: {output} can not be written: {above} is read-only or another user's")
    owned = output / "config.yaml"
    there = [f.name for f in output.iterdir() if not is_partial(f)] if output.exists() else []
    if not owned.exists() and not {"cache", LOCK, REPORT}.issuperset(there):
        raise ConfigError(f"output_dir: {output} is not empty and holds no run of dmdtrain; choose another")
    if resume not in ("auto", "never"):
        folder = Path(resume)
        checkpoints.check_checkpoint(folder, "--resume")
        file = checkpoints.file_of(folder, "config.yaml")
        _refuse_other(file, config, f"--resume: {folder} is a checkpoint of another configuration")
        if owned.exists() and folder.resolve().parents[1] != output.resolve():
            raise ConfigError(f"output_dir: {output} belongs to another run; choose another with --output-dir")
    elif owned.exists():
        if resume == "never":
            raise ConfigError(
                f"output_dir: {output} already holds a run; choose another with --output-dir, or --resume auto"
            )
        _refuse_other(owned, config, f"output_dir: {output} belongs to another run")


def pick_checkpoint(config: Config, resume: str) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from: `auto` (the newest undamaged one), `never`, or a folder; and what is wrong with newer ones.

    Raises:
        ConfigError: none is undamaged, or it is of another configuration.
    """
    if resume not in ("auto", "never"):
        return Path(resume), {}
    found, damaged = checkpoints.newest_good(Path(config.output_dir))
    if found is None and damaged:
        folder, what = next(iter(damaged.items()))
        raise ConfigError(
            f"--resume: {folder}: {what}; no undamaged checkpoint is left (train anew with another --output-dir)"
        )
    if found is not None:
        file = checkpoints.file_of(found, "config.yaml")
        _refuse_other(file, config, f"--resume: {found} is a checkpoint of another configuration")
    return found, damaged


def check_models(run: Run, checkpoint: Path) -> None:
    """ConfigError where base or teacher have other weights than when the checkpoint was saved."""
    with checkpoints.understood(checkpoint, "sampling.json"):
        known = dict(checkpoints.read_json(checkpoint, "sampling.json").get("weights", {}))
    for role, digest in run.weights.items():
        if known.get(role, digest) != digest:
            name = getattr(run, role).name
            raise ConfigError(f"model.{role}: {name} has other weights than when {checkpoint} was saved")


def _refuse_other(file: Path, config: Config, what: str) -> None:
    different = configuration.differences(configuration.load(file), config)
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise ConfigError(f"{what}: {different[0]}{more}")


@contextmanager
def locked(output: Path, console: Console) -> Iterator[None]:
    """Keeps a second process out of a run's folder; a process that dies lets go of it by itself.

    Raises:
        ConfigError: another process has it, or nothing can be written there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable("output_dir", output, error) from None
    with os.fdopen(handle, "r+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = " ".join(file.read(200).split()) or "unknown"
            raise ConfigError(
                f"output_dir: {output} is in use by another process ({owner}); choose another, or stop that one"
            ) from None
        except OSError as error:
            console.print(
                f"warning: {output} can not be locked ({error.strerror}): a second process in it would not be noticed",
                soft_wrap=True,
            )
        with suppress(OSError):  # a full disk: the lock itself needs no room
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
