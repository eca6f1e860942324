"""Files that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names where the file system can tell, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """With those above it; nothing where it is there. The new names are on the disk when it returns."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        with suppress(PermissionError):  # a folder that may be written and not be listed
            sync(made.parent)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors inside name the file, as Python does where it is opened and not where it is read."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def sha256(file: Path) -> str:
    with naming(file), file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_room(folder: Path, needed: int) -> None:
    """OSError where the disk is known to be too small for so many bytes: it is not filled to its last byte first."""
    disk = shutil.disk_usage(folder)
    if disk.total > 0 and disk.free < needed:
        raise OSError(f"no space left on device: it needs {needed / 1e9:.3f} GB, {disk.free / 1e9:.3f} GB are free")


class FolderLock:
    """`.lock` in a folder: held in common by those who use it, alone by one who deletes. A process that ends lets go of it.

    problem: why it could not be had alone.
    """

    def __init__(self, folder: Path):
        self.file, self.problem = folder / ".lock", ""
        self._handle: IO[str] | None = None
        self._gate: int | None = None  # the folder itself, locked by whoever has the lock alone or tries to

    @property
    def held(self) -> bool:
        return self._handle is not None

    def take(self, *, alone: bool = False) -> bool:
        """Whether it could be had. In common it waits, and is never refused; alone it is refused where others hold it, and where
        nobody can know: the file system has no locks or can not be written. A folder that is not there is nobody else's."""
        try:
            if self._handle is None:
                self._handle = self.file.open("a")
            if alone:
                self._take_alone(self._handle)
            else:
                fcntl.flock(self._handle, fcntl.LOCK_SH)
                self._close_gate()
        except FileNotFoundError:
            return True
        except BlockingIOError:
            self.problem = "is in use by another process; prune when it has ended"
            return False
        except OSError as error:
            self.problem = f"can not be locked ({error.strerror}), so others may be using it; prune where it can"
            return not alone
        return True

    def _take_alone(self, handle: IO[str]) -> None:
        """BlockingIOError where it is refused. The system then lets go of what was held in common, for a moment: the gate keeps
        others from having it alone in the meantime."""
        self._open_gate()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_SH)
            self._close_gate()
            raise

    def _open_gate(self) -> None:
        """BlockingIOError where another has it; nothing on a file system without locks of folders."""
        if self._gate is not None:
            return
        try:
            self._gate = os.open(self.file.parent, os.O_RDONLY)
            fcntl.flock(self._gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._close_gate()
            if isinstance(error, BlockingIOError):
                raise

    def _close_gate(self) -> None:
        if self._gate is not None:
            os.close(self._gate)
            self._gate = None

    def __del__(self) -> None:
        self._close_gate()


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A name beside `file` to write to, synced and renamed afterwards. What fails leaves `file` as it was and nothing else;
    an error of the disk names `file`."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _name(error, file, partial)
        raise


def _name(error: BaseException, wanted: Path, partial: Path) -> None:
    """An error of the disk names what was to be written: not what lay beside it, or nothing."""
    if isinstance(error, OSError) and (error.filename is None or str(error.filename).startswith(str(partial))):
        error.filename = str(wanted)


def is_partial(file: Path) -> bool:
    """Whether it is a file of `atomic` that was being written when its process was killed."""
    return file.name.startswith(".") and file.suffix == ".partial" and file.is_file()


def remove_partial(folder: Path) -> None:
    for file in folder.glob(".*.partial"):
        if is_partial(file):
            file.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder beside `folder`, which must not exist yet; renamed afterwards. What fails leaves
    nothing; an error of the disk names `folder`."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _name(error, folder, partial)
        raise


def save_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not there; OSError where it can not be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(file) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # it tells of the disk in words alone
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
            raise


def write_text(file: Path, text: str) -> None:
    with atomic(file) as partial:
        partial.write_text(text, encoding="utf-8")
