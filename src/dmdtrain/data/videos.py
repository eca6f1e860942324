"""Data sets of captioned clips: what is in a folder, before any clip is opened.

clips/a.mp4  clips/a.txt  clips/deeper/b.webm  clips/deeper/b.txt       each clip's caption beside it
clips/metadata.jsonl (or .csv, .parquet)  clips/a.mp4                   file_name and a caption column, a clip a line
clips/train/metadata.jsonl  clips/train/a.mp4                           the same in folders below, as the hub's VideoFolder
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from dmdtrain.config import ConfigError, VideoSet
from dmdtrain.data.prompt_files import clean, long_fields, open_parquet

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
SUFFIXES = (*VIDEOS, *IMAGES)
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
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
    if path.is_file() and path.suffix.lower() in (Path(name).suffix for name in METADATA):
        return _listed(path, video_set, key)
    if not path.is_dir():
        what = "it is a file" if path.is_file() else "no such folder"
        raise ConfigError(
            f"{key}: {shown(path)}: {what}; valid are a folder of clips with captions, or a file as {' or '.join(METADATA)}"
        )
    clips, dropped, listed = _below(path, video_set, key)
    if video_set.caption_column is not None and not listed:
        raise ConfigError(
            f"{key}.caption_column: {video_set.caption_column}: {shown(path)} holds neither {' nor '.join(METADATA)}"
        )
    if not clips and not dropped:
        raise ConfigError(f"{key}: {shown(path)} holds no clips; valid are files such as clip.mp4 with clip.txt")
    return clips, dropped


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


def _below(folder: Path, video_set: VideoSet, key: str) -> tuple[list[Clip], list[Dropped], set[Path]]:
    """Clips with captions beside them; below a folder with a metadata file, those that it lists. And the folders with one."""
    clips: list[Clip] = []
    dropped: list[Dropped] = []
    listed: set[Path] = set()
    for parent, files in groupby(_walk(folder, dropped), lambda file: file.parent):
        there = list(files)
        metadata = [file for file in there if file.name in METADATA]
        if len(metadata) > 1:
            names = " and ".join(file.name for file in metadata)
            raise ConfigError(f"{key}: {shown(parent)} holds {names}; name the one that counts as the path")
        if metadata:
            listed.add(parent)
            found, lost = _listed(metadata[0], video_set, key)
            clips += found
            dropped += lost
        elif listed.isdisjoint((parent, *parent.parents)):
            _beside(there, clips, dropped)
    return clips, dropped, listed


def _beside(files: list[Path], clips: list[Clip], dropped: list[Dropped]) -> None:
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            continue
        try:
            clips.append(Clip(file, read_caption(file.with_suffix(".txt"))))
        except ValueError as error:
            dropped.append(Dropped.of(file, error))


def read_caption(file: Path) -> str:
    """The text of a file on one line; ValueError with what is wrong with it."""
    try:
        if not file.is_file():
            raise ValueError(f"it has no caption ({shown(file.name)})")
        size = file.stat().st_size
        if size > LONGEST_CAPTION + 3:  # a mark that it is UTF-8, which is not of the caption
            raise ValueError(f"its caption has {size} bytes; at most {LONGEST_CAPTION} are read")
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
    size = len(text.encode())
    if size > LONGEST_CAPTION:
        raise ValueError(f"its caption has {size} bytes; at most {LONGEST_CAPTION} are read")
    caption = clean(text)
    if not caption:
        raise ValueError("its caption is empty")
    return caption


def _listed(metadata: Path, video_set: VideoSet, key: str) -> tuple[list[Clip], list[Dropped]]:
    clips, dropped, columns = [], [], set[str]()
    wanted = CAPTION_COLUMNS if video_set.caption_column is None else (video_set.caption_column,)
    names = [name.strip().lower() for name in wanted]
    try:
        for number, row in _rows(metadata, columns, {"file_name", *names}):
            where = f"{shown(metadata)}, line {number}"
            if isinstance(row, str):
                dropped.append(Dropped(where, row))
                continue
            try:
                file = inside(metadata.parent, row.get("file_name"))
                where = f"{where}: {shown(file)}"
                clips.append(Clip(file, check_caption(next((row[name] for name in names if name in row), None))))
            except ValueError as error:
                dropped.append(Dropped.of(where, error))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{key}: {shown(metadata)} can not be read: {shown(error)}") from None
    for needed, where in ((("file_name",), key), (wanted, f"{key}.caption_column")):
        if columns.isdisjoint(name.strip().lower() for name in needed):
            there = ", ".join(shown(name) for name in sorted(columns)[:20]) or "none"
            raise ConfigError(f"{where}: {shown(metadata)} has no column {' or '.join(needed)}; its columns: {there}")
    return clips, dropped


def _rows(metadata: Path, columns: set[str], needed: set[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line numbers and rows, or what is wrong with a line; ValueError or csv.Error with what is wrong with the file.

    Args:
        columns: gets the names of all that there are, in small letters, as the rows have them. needed: the others may lack.
    """
    kind = metadata.suffix.lower()
    with metadata.open("rb") as handle:
        if kind != ".parquet" and handle.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("it is UTF-16; save it as UTF-8")
    if kind == ".parquet":
        with open_parquet(metadata) as file:
            names = file.schema_arrow.names
            columns.update(_fold(dict.fromkeys(names)))
            batches = file.iter_batches(columns=[name for name in names if name.strip().lower() in needed])
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield number, _fold(row)
    elif kind == ".csv":
        # Bytes that are no UTF-8 spoil the captions that they are in, and no others.
        with long_fields(), metadata.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield from _csv_rows(csv.reader(text, strict=True), columns)
    else:
        with metadata.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    row = _json_object(line)
                    columns.update(row if isinstance(row, dict) else ())
                    yield number, row


def _csv_rows(reader: Any, columns: set[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    names: list[str] = next(reader, [])
    columns.update(_fold(dict.fromkeys(names)))
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, f"it can not be read: {error}"
            continue
        if row is None:
            return
        if len(row) > len(names):
            yield reader.line_num, "it has more fields than the first line"
        elif row:
            yield reader.line_num, _fold(dict(zip(names, row, strict=False)))


def _fold(row: dict[str, Any]) -> dict[str, Any]:
    return {name.strip().lower(): value for name, value in row.items()}


def _json_object(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "it is no UTF-8 text"
    except (ValueError, RecursionError):
        row = None
    return _fold(row) if isinstance(row, dict) else "it is no JSON object"


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
