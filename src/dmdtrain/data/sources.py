"""What is known of source files, so that a second start opens none of them: a line of JSON each, the last of a file counts.

    {"path": ..., "size": ..., "mtime_ns": ..., "sha256": ..., "header": [width, height, frames, seconds, interlaced],
     "bad": null, "failed": {"81 frames at 16": "it has 40 frames ..."}, "version": 2}

Lines are only ever added: a kill can cut the last one short, which is then read again; two processes may write at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

from dmdtrain.config import unwritable
from dmdtrain.data.decode import Header, read_header
from dmdtrain.data.videos import Unreadable
from dmdtrain.files import sha256, write_text

VERSION = 2  # of what is found in files: what an earlier version found is looked for again


@dataclass
class Source:
    path: str
    size: int
    mtime_ns: int
    sha256: str = ""
    header: list | None = None  # of a `Header`
    bad: str | None = None  # why the file can not be used at all
    failed: dict[str, str] = field(default_factory=dict)  # how it was to be read -> why that did not work
    version: int = VERSION

    def check(self) -> None:
        """TypeError or ValueError unless it is as it was written."""
        if self.header is not None:
            width, height, frames, seconds, interlaced = self.header
            Header(
                int(width), int(height), int(frames), seconds if seconds is None else float(seconds), bool(interlaced)
            )
        if not isinstance(self.path + self.sha256 + (self.bad or ""), str) or not isinstance(self.failed, dict):
            raise TypeError


class SourceIndex:
    """The sources that a file lists, by their absolute paths."""

    def __init__(self, file: Path):
        self.file = file
        self._known: dict[str, Source] = {}
        if file.exists():
            for line in file.read_bytes().splitlines():
                try:
                    source = Source(**({"version": 1} | json.loads(line)))  # lines of the first had none
                    if source.version != VERSION:
                        source = Source(source.path, source.size, source.mtime_ns, source.sha256)
                    source.check()
                    self._known[source.path] = source
                except (ValueError, TypeError, AttributeError):
                    continue

    def find(self, file: Path) -> Source | None:
        """What is known of a file; None where that is nothing, or the file has changed since."""
        source = self._known.get(os.path.abspath(file))
        if source is None:
            return None
        try:
            now = file.stat()
        except OSError:
            return None
        return source if (source.size, source.mtime_ns) == (now.st_size, now.st_mtime_ns) else None

    def add(self, source: Source) -> None:
        self._known[source.path] = source
        try:
            self._append(json.dumps(asdict(source)) + "\n")
        except OSError as error:
            raise unwritable("data.cache_dir", self.file, error) from None

    def _append(self, line: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # a kill left half a line
            os.write(handle, (b"\n" if cut else b"") + line.encode())
        finally:
            os.close(handle)

    def compact(self) -> None:
        """Rewrites the file with the last line of every source: of what is not there too, which a mount may have."""
        if self.file.exists():
            write_text(self.file, "".join(json.dumps(asdict(source)) + "\n" for source in self._known.values()))


def inspect(file: Path) -> Source:
    """Opens a file: its content's hash, and its header or what is wrong with it. Of one that could not be read this time the
    size is -1, which is that of no file."""
    path = os.path.abspath(file)
    try:
        now = file.stat()
        if not file.is_file():
            return Source(path, now.st_size, now.st_mtime_ns, bad="it is no file")
        digest = sha256(file)
    except OSError as error:
        return Source(path, -1, -1, bad=f"it can not be read: {error.strerror}")
    source = Source(path, now.st_size, now.st_mtime_ns, digest)
    try:
        header = read_header(file)
        source.header = list(astuple(header))
    except Unreadable as error:
        return Source(path, -1, -1, bad=str(error))
    except ValueError as error:
        source.bad = str(error)
    return source


def header_of(source: Source) -> Header:
    assert source.header is not None
    return Header(*source.header)


def hash_of(index: SourceIndex, file: Path) -> str:
    """SHA-256 of any file's content, computed again only where its size or time has changed."""
    source = index.find(file)
    if source is None or not source.sha256:
        now = file.stat()
        digest = sha256(file)
        source = Source(os.path.abspath(file), now.st_size, now.st_mtime_ns, digest)
        index.add(source)
    return source.sha256
