"""`dmdtrain fit`: a run from the check to the end."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import Config, ConfigError, reading, unwritable
from dmdtrain.files import remove_partial, write_text
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train.alarms import BAD_STEPS
from dmdtrain.train.checkpoint import CHECKPOINTS, WARMUP, SaveFailed, step_folder, write_checkpoint
from dmdtrain.train.clips import Clips, clip_sets, describe_clips, scan, with_captions
from dmdtrain.train.log import METRICS
from dmdtrain.train.memory import out_of_memory, ran_out
from dmdtrain.train.plan import changes, memory_lines
from dmdtrain.train.reports import Reports, check_reports, reporting
from dmdtrain.train.resume import BRANCH, changes_of, check_output, is_branch, locked, pick_checkpoint, resume_from
from dmdtrain.train.same_data import going_on
from dmdtrain.train.saver import SavesFailed, TrainingStopped
from dmdtrain.train.setup import Run, attention_of, check_adapters, describe, device_of_this_machine, resolve
from dmdtrain.train.step import check_score_ranges
from dmdtrain.train.trainer import Trainer
from dmdtrain.train.warmup import Warmup, check_data


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
    for change in changes(config):
        named = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
        (new if configuration.differences(config, configuration.changed(config, change)) else same).append(named)
    told = [f"the same run can go on with {'; '.join(same[:3])}"] if same else []
    told += [f"a new one with {'; '.join(new[:3])}"] if new else []
    return f"{', '.join(told) or 'fewer frames or a smaller resolution help'} (dmdtrain plan CONFIG says by how much)"


def _check_and_fit(config: Config, resume: str, console: Console, dry_run: bool) -> None:
    if config.train.deterministic:  # cuBLAS looks once, when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run = resolve(config)
    check_score_ranges(config, run.timesteps)
    for folder in (run.base, run.teacher):
        attention_of(config, folder, device_of_this_machine())
    check_adapters(run)
    with reading("warmup.data"):
        check_data(run)
    resume = resume_from(run.output_dir, resume)
    check_output(config, resume)
    check_reports(config)
    with (
        locked(run.output_dir, console) if clip_sets(run) or not dry_run else nullcontext()
    ):  # a scan writes its report
        checkpoint, damaged = pick_checkpoint(config, resume)
        run = going_on(run, checkpoint)
        with reading("data.videos" if run.config.data.videos is not None else "warmup.data"):
            scanned = scan(run, console)
        run = with_captions(run, scanned)
        branched = changes_of(run, scanned, checkpoint)
        for line in describe(run) + describe_clips(run, scanned):
            console.print(line, soft_wrap=True, highlight=False)
        for line in [f"branch          of {checkpoint}"] * bool(branched) + [f"changed         {c}" for c in branched]:
            console.print(line, soft_wrap=True, highlight=False)
        if torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info()
            for line in memory_lines(run, free):
                console.print(line, soft_wrap=True, highlight=False)
        if dry_run:
            console.print("dry run: everything that can be checked without loading a model is in order", soft_wrap=True)
            return
        with reporting(run, console) as reports:
            _fit(run, checkpoint, damaged, console, scanned, reports, anew=bool(branched))


def _fit(
    run: Run,
    checkpoint: Path | None,
    damaged: dict[Path, str],
    console: Console,
    scanned: dict[str, Clips],
    reports: Reports,
    *,
    anew: bool,
) -> None:
    config, output = run.config, run.output_dir
    trainer = Trainer(run, console, scanned, reports)
    for line in describe(run, trainer.roles)[-2:]:
        console.print(line, soft_wrap=True, highlight=False)
    warming = checkpoint is not None and checkpoints.stage_of(checkpoint) == WARMUP
    warmup = None
    if config.warmup.kind != "none" and (checkpoint is None or warming):
        warmup = Warmup(run, trainer.renderer, console, trainer.clips, reports)
    if checkpoint is not None:  # before anything is written: what can not be loaded leaves all as it was
        check_models(run, checkpoint)
        branch = is_branch(output, checkpoint)
        stage = "warm-up step" if warmup else "step"
        if warmup is not None:
            warmup.prepare()
            warmup.load(checkpoint, anew=anew, branch=branch)
        elif warming:
            raise ConfigError(f"--resume: {checkpoint} is of a warm-up, and warmup.kind is none")
        else:
            trainer.load(checkpoint, anew=anew, branch=branch)
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
        if checkpoint is not None and is_branch(output, checkpoint):
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


def check_models(run: Run, checkpoint: Path) -> None:
    """ConfigError where base or teacher have other weights than when the checkpoint was saved."""
    with checkpoints.understood(checkpoint, "sampling.json"):
        known = dict(checkpoints.read_json(checkpoint, "sampling.json").get("weights", {}))
    for role, digest in run.weights.items():
        if known.get(role, digest) != digest:
            name = getattr(run, role).name
            raise ConfigError(f"model.{role}: {name} has other weights than when {checkpoint} was saved")
