"""`dmdtrain fit`: which checkpoint a run goes on from, whose its folder is, and the run from the check to the end."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import BRANCH_OFF, Config, ConfigError, reading, unwritable
from dmdtrain.files import is_partial, make_folder, remove_partial, write_text
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train.alarms import BAD_STEPS
from dmdtrain.train.checkpoint import CHECKPOINTS, WARMUP, SaveFailed, step_folder, write_checkpoint
from dmdtrain.train.clips import REPORT, Clips, clip_sets, describe_clips, scan, with_captions
from dmdtrain.train.log import METRICS
from dmdtrain.train.memory import out_of_memory, ran_out
from dmdtrain.train.plan import changes, memory_lines
from dmdtrain.train.reports import Reports, check_reports, reporting
from dmdtrain.train.saver import SavesFailed, TrainingStopped
from dmdtrain.train.setup import Run, attention_of, describe, device_of_this_machine, resolve
from dmdtrain.train.step import check_score_ranges
from dmdtrain.train.trainer import Trainer
from dmdtrain.train.warmup import Warmup, check_data

LOCK = ".lock"
BRANCH = "branch.txt"  # of a run that began as a branch: the checkpoint that it went on from


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
    with reading("warmup.data"):
        check_data(run)
    try:
        resume = resume_from(run.output_dir, resume)
        check_output(config, resume)
    except OSError as error:
        raise unwritable("output_dir", Path(error.filename or run.output_dir), error, "read") from None
    check_reports(config)
    with (
        locked(run.output_dir, console) if clip_sets(run) or not dry_run else nullcontext()
    ):  # a scan writes its report
        with reading("data.videos" if run.config.data.videos is not None else "warmup.data"):
            scanned = scan(run, console)
        run = with_captions(run, scanned)
        for line in describe(run) + describe_clips(run, scanned):
            console.print(line, soft_wrap=True, highlight=False)
        for line in describe_branch(config, resume):
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
        anew = bool(describe_branch(config, resume))
        stage = "warm-up step" if warmup else "step"
        if warmup is not None:
            warmup.prepare()
            warmup.load(checkpoint, anew=anew)
        elif warming:
            raise ConfigError(f"--resume: {checkpoint} is of a warm-up, and warmup.kind is none")
        else:
            trainer.load(checkpoint, anew=anew)
        console.print(f"resumed from {checkpoint}, {stage} {(warmup or trainer).step}", soft_wrap=True)
    _claim(run, checkpoint, damaged, console)
    if checkpoint is not None:
        _take_over(warmup or trainer, checkpoint)
    if warmup is not None:
        if checkpoint is None:
            warmup.prepare()
        trainer.warm_up(warmup)
    if trainer.step >= config.train.max_steps and not trainer.lacks_validation():
        at, last = trainer.step, config.train.max_steps
        console.print(f"nothing to do: the run is at step {at}, and train.max_steps is {last}", soft_wrap=True)
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
        if checkpoint is not None and output.resolve() not in checkpoint.resolve().parents:
            write_text(output / BRANCH, f"{checkpoint.resolve()}\n")
        write_text(output / "config.yaml", configuration.dump(run.config))
        for folder, what in damaged.items():
            moved = checkpoints.set_aside(folder, "damaged")
            console.print(f"damaged: {folder}: {what}; it is {moved.name} now", soft_wrap=True)
        later = checkpoints.set_aside_later(output, checkpoint)
        if checkpoint is not None and later:
            later += _set_aside_records(output, checkpoint)
        for moved in later:
            console.print(f"set aside: {moved}, which came after the checkpoint that is resumed", soft_wrap=True)
    except OSError as error:
        raise unwritable("output_dir", output, error) from None


def _set_aside_records(output: Path, checkpoint: Path) -> list[Path]:
    """What a run that goes back leaves besides checkpoints: a copy of its metrics, and the samples of later steps."""
    reached, aside = checkpoints.position(checkpoint), []
    for file in (output / METRICS, output / WARMUP / METRICS):
        if file.exists():
            aside.append(checkpoints.free_name(file, "replaced"))
            shutil.copyfile(file, aside[-1])
    for folder in checkpoints.step_folders(output / "samples"):
        if (True, checkpoints.step_of(folder)) > reached:
            aside.append(checkpoints.set_aside(folder, "replaced"))
    return aside


def _take_over(stage: Trainer | Warmup, checkpoint: Path) -> None:
    """Saves a checkpoint that is not one of the run's own, by its place and name, as one of them: the next `auto` finds it."""
    own = step_folder(stage.root, stage.step)
    if own.resolve() == checkpoint.resolve():
        return
    try:
        write_checkpoint(stage.root, stage.step, *stage.content(), None)
    except SaveFailed as error:
        raise SavesFailed(
            f"{own} could not be saved ({error}); make room or mend the folder, then run it again"
        ) from None


def _branched_from(output: Path) -> Path | None:
    """The checkpoint that a run went on from as a branch."""
    file = output / BRANCH
    return Path(file.read_text(encoding="utf-8", errors="replace").strip()) if file.is_file() else None


def resume_from(output: Path, resume: str) -> str:
    """`auto`, `never`, or the path of a checkpoint, which may be given by its name or step where it is the run's own.

    A branch whose first command is given again goes on by itself; one without a checkpoint of its own, from where it branched.
    """
    if resume == "never":
        return resume
    begun, own = _branched_from(output), output / CHECKPOINTS
    if resume != "auto" and Path(os.path.realpath(resume)) != begun:
        names = [Path(resume), own / resume] + ([step_folder(own, int(resume))] if resume.isdecimal() else [])
        try:
            folder = next((folder for folder in names if folder.is_dir()), None)
        except OSError as error:
            raise ConfigError(f"--resume: {error.filename} can not be read: {error.strerror}") from None
        if folder is None:
            raise ConfigError(
                f"--resume: {resume}: no such folder; valid are auto, never and a checkpoint: its folder or, of this run, its "
                "name (step-000200) or step"
            )
        return str(folder)
    saved = checkpoints.list_checkpoints(own) or checkpoints.list_checkpoints(output / WARMUP)
    return "auto" if saved or begun is None else str(begun)


def own_config(output: Path) -> Config | None:
    """The configuration of the run whose folder it is: of config.yaml or, where that is lost or damaged, of the newest good
    checkpoint. None: the folder is no run's."""
    file, lost = output / "config.yaml", None
    try:
        if file.exists():
            return configuration.load_own(file)
    except ConfigError as error:
        lost = error
    found, damaged = checkpoints.newest_good(output)
    if found is not None:
        return configuration.load_own(checkpoints.file_of(found, "config.yaml"))
    if lost is not None or damaged:
        raise ConfigError(
            f"output_dir: {lost or f'{file} is missing'}, and no undamaged checkpoint is left; choose another"
        )
    return None


def _check_place(output: Path, config: Config) -> Config | None:
    """What `own_config` says of a folder that is free or a run's, and can be written."""
    above = next(folder for folder in (output, *output.parents) if folder.exists())
    if not above.is_dir():
        where = f"{output}: {above}" if above != output else output
        raise ConfigError(f"output_dir: {where} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(f"output_dir: {output} can not be written: {above} is read-only or another user's")
    for folder in (output / CHECKPOINTS, output / WARMUP):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output_dir: {folder} is not a folder")
    if (output / METRICS).is_dir():
        raise ConfigError(f"output_dir: {output / METRICS} is not a file")
    owned = own_config(output)
    there = {f.name for f in output.iterdir() if not is_partial(f)} if output.exists() else set()
    strange = there - {"cache", LOCK, REPORT, BRANCH} - _inside(output, config)
    if owned is None and any(Path(name).suffix not in (".log", ".out") for name in strange):
        raise ConfigError(f"output_dir: {output} is not empty and holds no run of dmdtrain; choose another")
    return owned


def _inside(output: Path, config: Config) -> set[str]:
    """Names in output_dir that are, or lead to, caches which the configuration has put there."""
    names = set()
    for given, part in (
        (config.data.cache_dir, "text"),
        (config.data.cache_dir, "videos"),
        (config.model.quantized_cache, ""),
    ):
        if given is not None:
            path = Path(os.path.abspath(Path(given).expanduser() / part))
            if path.is_relative_to(home := os.path.abspath(output)):
                names |= set(path.relative_to(home).parts[:1])
    return names


def check_output(config: Config, resume: str) -> None:
    """ConfigError unless output_dir is free or this run's own, and `resume`, where it is a folder, a checkpoint of it or, for an
    output_dir that is free, of a run that this one may branch off from."""
    output = Path(config.output_dir)
    owned = _check_place(output, config)
    if resume not in ("auto", "never"):
        folder = Path(resume)
        checkpoints.check_checkpoint(folder, "--resume")
        own = owned is not None and folder.resolve() != _branched_from(output)
        what = f"--resume: {folder} is a checkpoint of another configuration"
        _refuse_other(_config_of(folder), config, what, branch=not own)
        if own and folder.resolve().parent.parent != output.resolve():
            raise ConfigError(f"output_dir: {output} belongs to another run; choose another with --output-dir")
    if owned is not None:
        if resume == "never":
            raise ConfigError(
                f"output_dir: {output} already holds a run; choose another with --output-dir, or --resume auto"
            )
        _refuse_other(owned, config, f"output_dir: {output} belongs to another run")


def _config_of(checkpoint: Path) -> Config:
    return configuration.load_own(checkpoints.file_of(checkpoint, "config.yaml"))


def describe_branch(config: Config, resume: str) -> list[str]:
    """What a checkpoint's run could not change and this one does."""
    if resume in ("auto", "never"):
        return []
    changes = configuration.branch_changes(_config_of(Path(resume)), config)
    return [f"branch          of {resume}", *(f"changed         {change}" for change in changes)] if changes else []


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
        _refuse_other(_config_of(found), config, f"--resume: {found} is a checkpoint of another configuration")
    return found, damaged


def check_models(run: Run, checkpoint: Path) -> None:
    """ConfigError where base or teacher have other weights than when the checkpoint was saved."""
    with checkpoints.understood(checkpoint, "sampling.json"):
        known = dict(checkpoints.read_json(checkpoint, "sampling.json").get("weights", {}))
    for role, digest in run.weights.items():
        if known.get(role, digest) != digest:
            name = getattr(run, role).name
            raise ConfigError(f"model.{role}: {name} has other weights than when {checkpoint} was saved")


def _refuse_other(old: Config, new: Config, what: str, branch: bool = False) -> None:
    different = configuration.differences(old, new, branch=branch)
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        hint = (
            ""
            if branch or configuration.differences(old, new, branch=True)
            else f"; a branch may change it: {BRANCH_OFF}"
        )
        raise ConfigError(f"{what}: {different[0]}{more}{hint}")


@contextmanager
def locked(output: Path, console: Console) -> Iterator[None]:
    """Keeps a second process out of a run's folder; a process that dies lets go of it by itself.

    Raises:
        ConfigError: another process has it, or nothing can be written there.
    """
    try:
        make_folder(output)
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
