"""Whose a run's folder is, which checkpoint a run goes on from, and one process at a time in it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import BRANCH_OFF, Config, ConfigError, check_writable, unwritable
from dmdtrain.files import is_partial, make_folder
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train.checkpoint import CHECKPOINTS, WARMUP, step_folder
from dmdtrain.train.clips import REPORT, Clips
from dmdtrain.train.log import METRICS
from dmdtrain.train.same_data import other_data
from dmdtrain.train.setup import Run

LOCK = ".lock"
BRANCH = "branch.txt"  # of a run that began as a branch: the checkpoint that it went on from


def _branched_from(output: Path) -> Path | None:
    """The checkpoint that a run went on from as a branch."""
    try:
        return Path((output / BRANCH).read_text(encoding="utf-8", errors="replace").strip())
    except OSError:
        return None


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
    if begun is None or checkpoints.list_checkpoints(own) or checkpoints.list_checkpoints(output / WARMUP):
        return "auto"
    return str(begun)


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
        return checkpoints.config_of(found)
    if lost is not None or damaged:
        raise ConfigError(
            f"output_dir: {lost or f'{file} is missing'}, and no undamaged checkpoint is left; choose another"
        )
    return None


def _check_place(output: Path, config: Config) -> Config | None:
    """What `own_config` says of a folder that is free or a run's, and can be written."""
    check_writable(output, "output_dir")
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
    output = Path(config.output_dir).expanduser()
    try:
        owned = _check_place(output, config)
    except OSError as error:
        raise unwritable("output_dir", Path(error.filename or output), error, "read") from None
    if resume not in ("auto", "never"):
        folder = Path(resume)
        checkpoints.check_checkpoint(folder, "--resume")
        own = owned is not None and folder.resolve() != _branched_from(output)
        what = f"--resume: {folder} is a checkpoint of another configuration"
        _refuse_other(checkpoints.config_of(folder), config, what, branch=not own)
        if own and folder.resolve().parent.parent != output.resolve():
            raise ConfigError(f"output_dir: {output} belongs to another run; choose another with --output-dir")
    if owned is not None:
        if resume == "never":
            raise ConfigError(
                f"output_dir: {output} already holds a run; choose another with --output-dir, or --resume auto"
            )
        _refuse_other(owned, config, f"output_dir: {output} belongs to another run")


def is_branch(output: Path, checkpoint: Path | None) -> bool:
    """Whether the checkpoint is another run's."""
    return checkpoint is not None and output.resolve() not in checkpoint.resolve().parents


def changes_of(run: Run, clips: dict[str, Clips], checkpoint: Path | None) -> list[str]:
    """What a branch changes that the checkpoint's run itself could not: of its configuration and its data.

    Raises:
        ConfigError: the data are others, and it is no branch.
    """
    branch = is_branch(run.output_dir, checkpoint)
    found = configuration.branch_changes(checkpoints.config_of(checkpoint), run.config) if branch and checkpoint else []
    return found + other_data(run, clips, checkpoint, branch=branch)


def pick_checkpoint(config: Config, resume: str) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from: `auto` (the newest undamaged one), `never`, or a folder; and what is wrong with newer ones.

    Raises:
        ConfigError: none is undamaged, or it is of another configuration.
    """
    if resume not in ("auto", "never"):
        return Path(resume), {}
    found, damaged = checkpoints.newest_good(Path(config.output_dir).expanduser())
    if found is None and damaged:
        folder, what = next(iter(damaged.items()))
        raise ConfigError(
            f"--resume: {folder}: {what}; no undamaged checkpoint is left (train anew with another --output-dir)"
        )
    if found is not None:
        _refuse_other(
            checkpoints.config_of(found), config, f"--resume: {found} is a checkpoint of another configuration"
        )
    return found, damaged


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
