"""Data sets of captioned clips: what is in a folder, before any clip is opened.

clips/a.mp4  clips/a.txt  clips/deeper/b.webm  clips/deeper/b.txt       each clip's caption beside it
clips/metadata.jsonl (or .csv)  clips/a.mp4                             file_name and a caption column, a clip a line
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dmdtrain.config import ConfigError, VideoSet

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
SUFFIXES = (*VIDEOS, *IMAGES)
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
LONGEST_CAPTION = 100_000  # bytes; a longer one is no caption


@dataclass(frozen=True)
class Clip:
    file: Path
    caption: str


class Unreadable(ValueError):
    """A file that could not be read this time, whatever is in it."""


@dataclass(frozen=True)
class Dropped:
    """What can not be used, and why; `unread`: it could not be read this time, and nobody knows."""

    where: str
    reason: str
    unread: bool = False

    @classmethod
    def of(cls, where: object, error: ValueError) -> Dropped:
        return cls(shown(where), str(error), isinstance(error, Unreadable))


def shown(path: object) -> str:
    """A name on one line, whatever characters are in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def list_clips(video_set: VideoSet, key: str) -> tuple[list[Clip], list[Dropped]]:
    """Captioned clips of a data set in order of their names or lines, and what has no usable caption or name.

    Raises:
        ConfigError: naming `key`: there is no such data set, or its metadata can not be read.
    """
    path = Path(video_set.path).expanduser()
    if path.name in METADATA and path.is_file():
        return _listed(path, video_set, key)
    if not path.is_dir():
        raise ConfigError(
            f"{key}: {shown(path)}: no such folder; valid are a folder of clips with captions, or {' or '.join(METADATA)} in one"
        )
    metadata = [path / name for name in METADATA if (path / name).is_file()]
    if len(metadata) > 1:
        raise ConfigError(f"{key}: {shown(path)} holds {' and '.join(METADATA)}; name the one that counts as the path")
    if metadata:
        return _listed(metadata[0], video_set, key)
    if video_set.caption_column is not None:
        raise ConfigError(
            f"{key}.caption_column: {video_set.caption_column}: {shown(path)} holds neither {' nor '.join(METADATA)}"
        )
    return _beside(path, key)


def _walk(folder: Path, dropped: list[Dropped]) -> Iterator[Path]:
    """Files below a folder in order, through links, each folder once; folders that can not be read are added to `dropped`."""
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        dropped.append(Dropped(shown(error.filename), f"the folder can not be read: {error.strerror}", unread=True))

    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _beside(folder: Path, key: str) -> tuple[list[Clip], list[Dropped]]:
    clips: list[Clip] = []
    dropped: list[Dropped] = []
    for file in _walk(folder, dropped):
        if file.suffix.lower() not in SUFFIXES:
            continue
        try:
            clips.append(Clip(file, read_caption(file.with_suffix(".txt"))))
        except ValueError as error:
            dropped.append(Dropped.of(file, error))
    if not clips and not dropped:
        raise ConfigError(f"{key}: {shown(folder)} holds no clips; valid are files such as clip.mp4 with clip.txt")
    return clips, dropped


def read_caption(file: Path) -> str:
    """The text of a file on one line; ValueError with what is wrong with it."""
    try:
        if not file.is_file():
            raise ValueError(f"it has no caption ({shown(file.name)})")
        if file.stat().st_size > LONGEST_CAPTION:
            raise ValueError(f"its caption has {file.stat().st_size} bytes; at most {LONGEST_CAPTION} are read")
        return check_caption(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("its caption is no UTF-8 text") from None
    except OSError as error:
        raise Unreadable(f"its caption can not be read: {error.strerror}") from None


def check_caption(text: Any) -> str:
    """A caption on one line; ValueError where it is none."""
    if not isinstance(text, str):
        raise ValueError("it has no caption" if text is None else f"its caption is no text: {shown(text)[:40]}")
    if "\0" in text:
        raise ValueError("its caption is binary")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("its caption is no UTF-8 text")
    caption = " ".join(text.split())
    if not caption:
        raise ValueError("its caption is empty")
    return caption


def _listed(metadata: Path, video_set: VideoSet, key: str) -> tuple[list[Clip], list[Dropped]]:
    clips, dropped, columns = [], [], set()
    wanted = CAPTION_COLUMNS if video_set.caption_column is None else (video_set.caption_column,)
    for number, row in _rows(metadata, key):
        where = f"{shown(metadata)}, line {number}"
        if not isinstance(row, dict):
            dropped.append(Dropped(where, "it is no JSON object" if row is None else shown(row)))
            continue
        columns |= {str(column) for column in row}
        try:
            file = inside(metadata.parent, row.get("file_name"))
            where = f"{where}: {shown(file)}"
            column = next((column for column in wanted if column in row), None)
            clips.append(Clip(file, check_caption(None if column is None else row[column])))
        except ValueError as error:
            dropped.append(Dropped(where, str(error)))
    for needed in (("file_name",), wanted):
        if not columns & set(needed):
            there = ", ".join(shown(column) for column in sorted(columns)[:20]) or "none"
            where = f"{key}.caption_column" if needed != ("file_name",) else key
            raise ConfigError(f"{where}: {shown(metadata)} has no column {' or '.join(needed)}; its columns: {there}")
    return clips, dropped


def _rows(metadata: Path, key: str) -> Iterator[tuple[int, Any]]:
    """Line numbers and rows: an object, None for a line that is none, or text that says what is wrong."""
    try:
        with metadata.open(encoding="utf-8-sig", newline="") as handle:
            if metadata.suffix == ".csv":
                reader = csv.DictReader(handle)
                for row in reader:
                    yield reader.line_num, row if None not in row else "it has more fields than the first line"
                return
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, _json_object(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{key}: {shown(metadata)} can not be read: {shown(error)}") from None


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def inside(folder: Path, name: Any) -> Path:
    """The file that a metadata line names, relative to its folder; ValueError where it leads out of it."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError("it has no file_name")
    if "\0" in name:
        raise ValueError("its file_name is binary")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"its file_name leads out of the folder: {shown(name)}")
    if PurePosixPath(name).suffix.lower() not in SUFFIXES:
        raise ValueError(f"its file_name is neither a video nor an image: {shown(name)}")
    return folder / name
