"""Tensors kept by name in a folder: hundreds a file, written once, found by every process.

    <SHA-256 of the file>.safetensors    rows, and a header that is their index
    .lock                                held in common by those who use the folder, alone by one who deletes

A file is written beside its name, synced and renamed: a kill at any instant leaves whole files and perhaps a leftover. Two
processes that write at once write files of their own, or the same one; what is read is all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dmdtrain.config import ConfigError, unwritable
from dmdtrain.files import FolderLock, sha256
from dmdtrain.packing import Shape, pack, shape_of, unpack

FORMAT = 1
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.partial")
INFO = "dmdtrain"  # one entry of the header, since safetensors writes several in any order


class Row(NamedTuple):
    """Where a tensor lies. packed: shape and dtype of one that is compressed."""

    file: Path
    packed: Shape | None
    note: int | None


class Shards:
    """A folder of named tensors.

    rows: name -> where it lies. aliases: another name of a row -> its name. damaged: file -> what is wrong with it.

    Args:
        key: of the configuration, for errors. compress: what is written from here on; both kinds are read.
    """

    def __init__(self, path: Path, key: str, compress: bool = False):
        self.path, self.key, self.compress = path, key, compress
        self.rows: dict[str, Row] = {}
        self.aliases: dict[str, str] = {}
        self.damaged: dict[Path, str] = {}
        self._files: dict[Path, set[str]] = {}
        self._lock = FolderLock(path)

    def refresh(self) -> None:
        """Reads the headers of files that are new; forgets those that have gone."""
        try:
            found = {self.path / name for name in os.listdir(self.path) if NAME.fullmatch(name)}
        except (FileNotFoundError, NotADirectoryError):
            found = set()
        except OSError as error:
            raise ConfigError(f"{self.key}: {self.path} cannot be read: {error.strerror}") from None
        known = self._files.keys() | self.damaged.keys()
        if known - found:
            known = set()
            for index in (self.rows, self.aliases, self.damaged, self._files):
                index.clear()
        for file in sorted(found - known):
            self._add(file)
        if found and not self._lock.held:
            self._lock.take()

    def _add(self, file: Path) -> None:
        try:
            names, info = _read_header(file)
            packed, notes = info["packed"], info["notes"]
            rows = {name: Row(file, packed.get(name), notes.get(name)) for name in names}
            aliases = dict(info["aliases"])
        except FileNotFoundError:
            return  # deleted since it was listed
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.damaged[file] = str(error) if type(error) is ValueError else "its header is broken"
            return
        self.aliases |= aliases
        for name, row in rows.items():
            self.rows.setdefault(name, row)
        self._files[file] = set(rows)

    def read(self, name: str) -> torch.Tensor:
        """A row as it was written, on the CPU. KeyError where there is none."""
        row = self.rows[name]
        for retry in (False, True):
            try:
                with safe_open(row.file, "pt") as handle:
                    tensor = handle.get_tensor(name).clone()  # else it would hold the whole file's memory map
                return tensor if row.packed is None else unpack(tensor, *row.packed)
            except (SafetensorError, OSError, ValueError, RuntimeError, zlib.error) as error:
                if row.file.exists():
                    raise ConfigError(
                        f"{self.key}: {row.file} is damaged: {str(error).splitlines()[0]}; dmdtrain prepare CONFIG --verify "
                        "makes its content again"
                    ) from None
            gone = row.file  # someone deleted it; what he needs still is in another one
            self.refresh()
            if retry or name not in self.rows:
                raise ConfigError(f"{self.key}: {gone} has gone; the same command makes it again")
            row = self.rows[name]
        raise AssertionError

    # ------------------------------------------------------------------------------------------------ writing

    def open_for_writing(self) -> bool:
        """Makes the folder, and removes what killed processes left in it unless another process uses it. Whether none did."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.key, self.path, error, "made") from None
        alone = self._lock.take(alone=True)
        if alone:
            for name in os.listdir(self.path):
                if LEFTOVER.fullmatch(name):
                    self._delete(self.path / name)
        self._lock.take()
        return alone

    def write(self, rows: dict[str, torch.Tensor], aliases: dict[str, str], notes: dict[str, int]) -> Path:
        """A new file of rows; where it can not be written, the error is that of `unwritable`."""
        packed = {}
        tensors = {name: row.cpu().contiguous() for name, row in rows.items()}
        if self.compress:
            packed = {name: shape_of(row) for name, row in tensors.items()}
            tensors = {name: pack(row) for name, row in tensors.items()}
        info = {"format": FORMAT, "packed": packed, "aliases": aliases, "notes": notes}
        data = save(tensors, metadata={INFO: json.dumps(info)})
        file = self.path / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        partial = self.path / f".{uuid.uuid4().hex}.partial"
        try:
            try:
                with partial.open("wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
                partial.rename(file)
            finally:
                partial.unlink(missing_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except OSError as error:
            raise unwritable(self.key, self.path, error) from None
        self.damaged.pop(file, None)
        self._add(file)
        return file

    def _delete(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.key}: {file} can not be deleted: {error.strerror}") from None

    # ------------------------------------------------------------------------------------------------ care

    def size(self) -> tuple[int, int]:
        """(files, bytes), damaged ones included."""
        sizes = [file.stat().st_size for file in (*self._files, *self.damaged)]
        return len(sizes), sum(sizes)

    def verify(self) -> Iterator[tuple[Path, str | None]]:
        """Every file and what is wrong with it, if anything; what is damaged is deleted and its rows are missing from then on."""
        self.refresh()
        for file in sorted([*self._files, *self.damaged]):
            problem = self.damaged.get(file)
            if problem is None:
                try:
                    problem = None if sha256(file) == file.stem else "its checksum differs"
                except OSError as error:
                    problem = f"it cannot be read: {error.strerror}"
            if problem is not None:
                self._delete(file)
            yield file, problem
        self.refresh()

    def prune(self, keep: Collection[str], batch: int) -> tuple[int, int]:
        """Deletes every row but those in `keep`; what shared a file with others is written again, `batch` rows a file.

        Returns:
            Rows deleted and bytes freed.
        """
        if not self._lock.take(alone=True):
            raise ConfigError(f"{self.key}: {self.path} {self._lock.problem}")
        self.refresh()
        (_, before), count = self.size(), sum(len(names) for names in self._files.values())
        kept = {name: self.rows[name] for name in keep if name in self.rows}
        used: dict[Path, set[str]] = {}
        for name, row in kept.items():
            used.setdefault(row.file, set()).add(name)
        stale = {file for file, names in self._files.items() if not names or used.get(file) != names}
        moved = sorted(name for name, row in kept.items() if row.file in stale)
        stale |= self.damaged.keys()
        targets: dict[str, dict[str, str]] = {}
        for alias, name in self.aliases.items():
            targets.setdefault(name, {})[alias] = name
        for start in range(0, len(moved), batch):
            names = moved[start : start + batch]
            aliases = {alias: name for n in names for alias, name in targets.get(n, {}).items()}
            notes = {n: note for n in names if (note := kept[n].note) is not None}
            stale.discard(self.write({n: self.read(n) for n in names}, aliases, notes))
        for file in stale:
            self._delete(file)
        self.refresh()
        self._lock.take()
        return count - len(self.rows), before - self.size()[1]


def _read_header(file: Path) -> tuple[list[str], dict[str, Any]]:
    """Names of a whole file's tensors and what was said of them."""
    with file.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        if length > size - 8:
            raise ValueError("it is cut off")
        header = json.loads(handle.read(length))
    info = json.loads(header.pop("__metadata__")[INFO])
    if info["format"] != FORMAT:
        return [], {"packed": {}, "notes": {}, "aliases": {}}  # whole, but of another version's
    if 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0) != size:
        raise ValueError("it is cut off")
    return list(header), info
