"""Data sets of captioned clips: what is in a folder, before any clip is opened.

clips/a.mp4  clips/a.txt  clips/deeper/b.webm  clips/deeper/b.txt       each clip's caption beside it
clips/metadata.jsonl (or .csv, .parquet)  clips/a.mp4                   file_name and a caption column, a clip a line
clips/train/metadata.jsonl  clips/train/a.mp4                           the same in folders below, as the hub's VideoFolder
"""

from __future__ import annotations

import functools
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dmdtrain.config import ConfigError, VideoSet
from dmdtrain.data.prompt_files import clean, csv_records, long_fields, open_parquet

VIDEO_KINDS = """mp4 m4v mp4v mov qt 3gp 3g2 f4v mj2 mkv webm avi divx gif mpg mpeg mpe m2p vob ts m2t mts m2ts flv wmv asf
    ogv ogg ogm mxf dv rm rmvb y4m ivf nut"""
IMAGE_KINDS = "png apng jpg jpeg jpe jfif webp bmp avif"
# What `decode` refuses by its content: told, and not passed over.
UNREAD_VIDEO_KINDS = "m1v m2v h264 264 h265 265 hevc obu mjpeg mjpg wtv swf bik braw r3d"
UNREAD_IMAGE_KINDS = "tif tiff heic heif jxl jp2"
VIDEOS = tuple(f".{kind}" for kind in f"{VIDEO_KINDS} {UNREAD_VIDEO_KINDS}".split())
IMAGES = tuple(f".{kind}" for kind in f"{IMAGE_KINDS} {UNREAD_IMAGE_KINDS}".split())
SUFFIXES = (*VIDEOS, *IMAGES)
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "prompt")
NO_CAPTIONS = ("readme", "license", "licence", "notice", "changelog", "requirements")  # whatever lies beside them
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


@dataclass(frozen=True)
class Noted:
    """What is to be told though nothing is wrong with a clip; `kind`: what several such are called."""

    where: str
    reason: str
    kind: str


def shown(path: object) -> str:
    """A name on one line, whatever characters are in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def list_clips(video_set: VideoSet, key: str, noted: list[Noted] | None = None) -> tuple[list[Clip], list[Dropped]]:
    """Captioned clips of a data set in order of their names or lines, and what has no usable caption or name.

    Args:
        noted: gets captions without a clip, and clips that a metadata file beside them does not list.

    Raises:
        ConfigError: naming `key`: there is no such data set, or its metadata can not be read.
    """
    path = Path(video_set.path).expanduser()
    noted = [] if noted is None else noted
    if path.is_file() and path.suffix.lower() in (Path(name).suffix for name in METADATA):
        clips, dropped, named = _listed(path, video_set, key)
        folders = {path.parent, *(file.parent for file in named)}
        there = (folder / name for folder in folders for names in _alike(folder).values() for name in names)
        noted += _unlisted(sorted(file for file in there if not file.name.startswith(".")), path, named)
        return clips, dropped
    if not path.is_dir():
        what = "it is a file" if path.is_file() else "no such folder"
        raise ConfigError(
            f"{key}: {shown(path)}: {what}; valid are a folder of clips with captions, or a file as {' or '.join(METADATA)}"
        )
    clips, dropped, listed = _below(path, video_set, key, noted)
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


def _below(
    folder: Path, video_set: VideoSet, key: str, noted: list[Noted]
) -> tuple[list[Clip], list[Dropped], dict[Path, Path]]:
    """Clips with captions beside them; below a folder with a metadata file, those that it lists. And those files by folder."""
    clips: list[Clip] = []
    dropped: list[Dropped] = []
    listed: dict[Path, Path] = {}
    named: set[Path] = set()
    covered: dict[Path, list[Path]] = {}  # by a metadata file: the files beside it and below
    look = functools.cache(_alike)
    for parent, files in groupby(_walk(folder, dropped), lambda file: file.parent):
        there = list(files)
        metadata = [file for file in there if file.name in METADATA]
        if len(metadata) > 1:
            names = " and ".join(file.name for file in metadata)
            raise ConfigError(f"{key}: {shown(parent)} holds {names}; name the one that counts as the path")
        if metadata:
            listed[parent] = metadata[0]
            found, lost, told = _listed(metadata[0], video_set, key)
            clips += found
            dropped += lost
            named |= told
        if nearest := next((listed[above] for above in (parent, *parent.parents) if above in listed), None):
            covered.setdefault(nearest, []).extend(there)
        else:
            _beside(there, clips, dropped, noted, look)
    for file, there in covered.items():
        noted += _unlisted(there, file, named)
    return clips, dropped, listed


def _unlisted(files: list[Path], metadata: Path, named: set[Path]) -> list[Noted]:
    left = [file for file in files if file.suffix.lower() in SUFFIXES and file not in named]
    if left:  # a link may lead to what is listed
        real = {os.path.realpath(file) for file in named}
        left = [file for file in left if os.path.realpath(file) not in real]
    kind = f"clips that {shown(metadata.name)} does not list"
    return [Noted(shown(file), f"{shown(metadata)} does not list it", kind) for file in left]


def _beside(
    files: list[Path], clips: list[Clip], dropped: list[Dropped], noted: list[Noted], look: Callable[[Path], Alike]
) -> None:
    """Sorts the files of a folder: clips with a caption, clips without a usable one, captions without a clip."""
    media, texts, others = [], [], {}
    for file in files:
        if file.suffix.lower() in SUFFIXES:
            media.append(file)
        elif file.suffix.lower() != ".txt":
            others[_folded(file.stem)] = file.name
        elif file.stem.lower() not in NO_CAPTIONS:
            texts.append(file)
    for file in media:
        try:
            clips.append(Clip(file, read_caption(on_disk(file.parent, file.with_suffix(".txt").name, look))))
        except ValueError as error:
            dropped.append(Dropped.of(file, error))
    captioned = {_folded(file.stem) for file in media}
    for text in texts:
        if (stem := _folded(text.stem)) not in captioned:
            only = f", only {shown(others[stem])}, which is of no kind that is read" if stem in others else ""
            noted.append(Noted(shown(text), f"there is no clip beside it{only}", "captions without a clip"))


Alike = dict[str, list[str]]  # names that differ in nothing but case and Unicode form


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold())


def _alike(folder: Path) -> Alike:
    """The names in a folder."""
    found: Alike = {}
    with suppress(OSError):  # told where a clip in it is opened
        for name in os.listdir(folder):
            found.setdefault(_folded(name), []).append(name)
    return found


def on_disk(folder: Path, name: str, look: Callable[[Path], Alike]) -> Path:
    """The file `name` in or below a folder, in the Unicode form that its name has there; as it is named if there is none.

    Args:
        look: `_alike`, or a cache of it.

    Raises:
        ValueError: the folder has it in another case alone, or in several forms.
    """
    if os.path.lexists(folder / name):
        return folder / name
    place = folder
    for part in PurePosixPath(name).parts:
        if not os.path.lexists(place / part):
            there = look(place).get(_folded(part), [])
            same = [other for other in there if _composed(other) == _composed(part)]
            if len(same) != 1:
                if not there:
                    break
                names, by = " and ".join(shown(other) for other in there), "Unicode form" if same else "case"
                raise ValueError(f"{shown(part)} is not there; the folder has {names}; file names differ by {by}")
            part = same[0]
        place /= part
    else:
        return place
    return folder / name


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


def _listed(metadata: Path, video_set: VideoSet, key: str) -> tuple[list[Clip], list[Dropped], set[Path]]:
    """The captioned clips of a metadata file, what of it can not be used, and all files that it names."""
    clips, dropped, named, columns, lost = [], [], set[Path](), set[str](), set[str]()
    look = functools.cache(_alike)
    wanted = CAPTION_COLUMNS if video_set.caption_column is None else (video_set.caption_column,)
    names = [name.strip().lower() for name in wanted]
    try:
        for number, row in _rows(metadata, columns, {"file_name", *names}, lost):
            where = f"{shown(metadata)}, line {number}"
            if isinstance(row, str):
                dropped.append(Dropped(where, row))
                continue
            try:
                name = inside(metadata.parent, row.get("file_name"))
                where = f"{where}: {shown(metadata.parent / name)}"
                file = on_disk(metadata.parent, name, look)
                named.add(file)
                clips.append(Clip(file, check_caption(next((row[name] for name in names if name in row), None))))
            except ValueError as error:
                dropped.append(Dropped.of(where, error))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {shown(metadata)} can not be read: {shown(error)}") from None
    for needed, where in ((("file_name",), key), (wanted, f"{key}.caption_column")):
        if columns.isdisjoint(name.strip().lower() for name in needed):
            there = ", ".join(shown(name) for name in sorted(columns)[:20]) or "none"
            raise ConfigError(f"{where}: {shown(metadata)} has no column {' or '.join(needed)}; its columns: {there}")
    return clips, dropped, named | {metadata.parent / name for name in lost}


def _rows(
    metadata: Path, columns: set[str], needed: set[str], lost: set[str]
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line numbers and rows, or what is wrong with a line; ValueError with what is wrong with the file.

    Args:
        columns: gets the names of all that there are, in small letters, as the rows have them. needed: the others may lack.
        lost: gets clips that lines of a .csv name which can not be read.
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
            yield from _csv_rows(text, columns, lost)
    else:
        with metadata.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    row = _json_object(line)
                    columns.update(row if isinstance(row, dict) else ())
                    yield number, row


def _csv_rows(text: Iterable[str], columns: set[str], lost: set[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """As `_rows`. A quote that is not closed takes in the rows after it, as one caption or as none: none of them is used."""
    records = csv_records(text)
    _, lines, names = next(records, (1, [], []))
    if isinstance(names, str):
        raise ValueError(names)
    if len(lines) > 1:
        raise ValueError("a quote in its first line is not closed there")
    columns.update(_fold(dict.fromkeys(names)))
    for begin, lines, row in records:
        taken = rows_within(lines)
        if isinstance(row, str) or taken or len(row) != len(names):
            lost.update(name for line in lines for name in _clip_names(line))
        if isinstance(row, str) or taken:
            problem = f"it can not be read: {row}" if isinstance(row, str) else "it is several rows"
            if len(lines) > 1:
                problem += f"; a quote in it is not closed before line {begin + len(lines) - 1}"
            yield begin, problem
            yield from ((begin + number, f"it is within the quote that opens in line {begin}") for number in taken)
        elif len(row) > len(names):
            yield begin, "it has more fields than the first line; captions with commas in them need double quotes"
        elif len(row) < len(names) and row:
            above = "" if _clip_names(lines[0]) else "; if it is the rest of a caption, that needs double quotes"
            yield begin, f"it has fewer fields than the first line{above}"
        elif row:
            yield begin, _fold(dict(zip(names, row, strict=True)))


def rows_within(lines: list[str], delimiter: str = ",") -> list[int]:
    """Which lines of a record look like rows of their own: they name a clip, as one before them does."""
    if len(lines) == 1:
        return []
    return [number for number, line in enumerate(lines) if _clip_names(line, delimiter)][1:]


def _clip_names(line: str, delimiter: str = ",") -> list[str]:
    fields = (field.strip(' \t\r\n"') for field in line.split(delimiter))
    return [field for field in fields if field.lower().endswith(SUFFIXES)]


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


def inside(folder: Path, name: Any) -> str:
    """What a metadata line names, relative to its folder and with slashes; ValueError if it leads out of it."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError("it has no file_name")
    if "\0" in name:
        raise ValueError("its file_name is binary")
    if "\\" in name and not os.path.lexists(folder / name):
        name = name.replace("\\", "/")
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in path.parts:
        raise ValueError(f"its file_name leads out of the folder: {shown(name)}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"its file_name is neither a video nor an image: {shown(name)}")
    return name
