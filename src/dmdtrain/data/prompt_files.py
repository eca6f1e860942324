"""Files of prompts: .txt (one a line), .jsonl, .json, .csv, .tsv and .parquet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmdtrain.config import ConfigError

MAX_BYTES = 2 << 30
MAX_CHARACTERS = 100_000
COLUMNS = ("prompt", "caption", "text")  # by which a table's prompts are found, in this order
# What the only column of a .csv may be called: any other first line could be a prompt.
LONE = (*COLUMNS, "prompts", "captions", "texts", "description", "descriptions")
KINDS = ".txt, .jsonl, .json, .csv, .tsv, .parquet"
# C0, C1 and halves of surrogate pairs. Right-to-left marks and joiners are no control characters and stay.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    """On one line, with single spaces and without control characters; empty where nothing of it can be seen."""
    words = " ".join(CONTROL.sub(" ", text).split())
    return words if any(letter != " " and letter.isprintable() for letter in words) else ""


def read_file(path: Path, column: str | None) -> list[str]:
    """Every prompt as it stands in the file, empty ones included.

    Args:
        column: of a table. None: the only one, or prompt, caption or text. Files without columns do not look at it.

    Raises:
        ConfigError: what is wrong, without the key it was given under.
    """
    try:
        if path.is_dir():
            raise ConfigError(
                f"{path}: it is a folder; valid is a file: {KINDS}, or wan-tiny; clips are for data.videos"
            )
        if not path.exists():
            raise ConfigError(f"{path}: no such file; valid are {KINDS}, or wan-tiny")
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise ConfigError(f"{path}: {path.suffix} is no known kind of file; valid are {KINDS}")
        if not path.is_file() and not path.is_fifo():
            raise ConfigError(f"{path}: it is no regular file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size / 2**30:.1f} GiB; a file of prompts has at most {MAX_BYTES >> 30} GiB")
        prompts = list(reader(path, column))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > MAX_CHARACTERS:
            raise ConfigError(
                f"{path}: prompt {number} has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are valid"
            )
    return prompts


def _text(path: Path) -> str:
    """UTF-8, with or without a byte order mark."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("cannot be read as text: it is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"cannot be read as text: line {line} is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("cannot be read as text: it is binary")
    return text


def _lines(path: Path, column: str | None) -> list[str]:
    lines = re.split("\r\n|\n|\r", _text(path))
    return lines if lines[-1] else lines[:-1]


def _json_lines(path: Path, column: str | None) -> Iterator[str]:
    chosen = None
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = _parse(line, f"line {number}: ")
        if isinstance(row, dict):
            chosen = chosen or _choose(list(row), column)
        yield _from_json(row, chosen, f"line {number}")


def _json(path: Path, column: str | None) -> Iterator[str]:
    values = _parse(_text(path), "")
    if isinstance(values, dict) and len(values) == 1 and isinstance(lone := next(iter(values.values())), list):
        values = lone  # {"prompts": [...]}
    if isinstance(values, dict):
        for name, value in values.items():
            yield _from_json(value, None, f"{name!r}")
    elif isinstance(values, list):
        first = next((row for row in values if isinstance(row, dict)), None)
        chosen = None if first is None else _choose(list(first), column)
        for number, row in enumerate(values, 1):
            yield _from_json(row, chosen, f"entry {number}")
    else:
        raise ValueError("it must hold a list of prompts, a list of objects, or an object of names and prompts")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"{where}not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}not valid JSON: it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _from_json(row: Any, column: str | None, where: str) -> str:
    value = row
    if column is not None and isinstance(row, dict):
        if column not in row:
            raise ValueError(f"{where} has no {column!r}; it has {_list(list(row))}")
        value, where = row[column], f"{where}: {column!r}"
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where} is no text but {_shortened(json.dumps(value, ensure_ascii=False))}")
    return value


@contextmanager
def long_fields() -> Iterator[None]:
    """Fields of any length in tables."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def csv_records(text: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, list[str], list[str] | str]]:
    """Each record of a table: the number of the line at which it begins, its lines, and its fields or what is wrong with it.

    A quote that is not closed makes all that follows, up to the next quote, one record.
    """
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in text:
            taken.append(line)
            yield line

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        begin = rows.line_num + 1
        taken.clear()
        try:
            fields: list[str] | str | None = next(rows, None)
        except csv.Error as error:
            fields = str(error)
        if fields is None:
            return
        yield begin, list(taken), fields


def _table(path: Path, column: str | None, delimiter: str) -> Iterator[str]:
    with long_fields():
        yield from _table_rows(path, column, delimiter)


def _table_rows(path: Path, column: str | None, delimiter: str) -> Iterator[str]:
    from dmdtrain.data.videos import rows_within  # which imports this module

    names: list[str] = []
    index = 0
    for begin, lines, row in csv_records(io.StringIO(_text(path), newline=""), delimiter):
        if isinstance(row, str):
            end = f"; a quote in it is not closed before line {begin + len(lines) - 1}" if len(lines) > 1 else ""
            raise ValueError(f"line {begin}: {row}{end}")
        if taken := rows_within(lines, delimiter):
            raise ValueError(f"line {begin}: its quotes take in line {begin + taken[0]}, which names another clip")
        if not names:
            if names := [name.strip() for name in row]:
                index = _index_of_prompts(names, column, delimiter)
            continue
        if row and len(row) != len(names):
            raise ValueError(
                f"line {begin} has {len(row)} columns, the first line {len(names)}; "
                "put prompts with separators in them in double quotes"
            )
        yield row[index] if row else ""


def _index_of_prompts(names: list[str], column: str | None, delimiter: str) -> int:
    if len(names) == 1 and column is None and re.search(r"[\s,;]", names[0]):
        raise ValueError(
            f"its first line must name the columns, with {'commas' if delimiter == ',' else 'tabs'} between them; "
            f"it is {_shortened(names[0])!r}"
        )
    if len(names) == 1 and column is None and names[0].lower() not in LONE:
        raise ValueError(
            f"is its first line, {_shortened(names[0])!r}, a prompt or the name of the column? Put `prompt` above it, or "
            "name the column in data.prompt_column"
        )
    return names.index(_choose(names, column))


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile; ValueError where it is none."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{path}: .parquet needs pyarrow: pip install 'dmdtrain[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise ValueError(f"not valid parquet: {str(error).splitlines()[0]}") from None


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    with open_parquet(path) as file:
        chosen = _choose(file.schema_arrow.names, column)
        kind = file.schema_arrow.field(chosen).type
        kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
        if str(kind) not in ("string", "large_string", "string_view"):
            raise ValueError(f"column {chosen!r} is no text but {kind}")
        for batch in file.iter_batches(columns=[chosen]):
            yield from (value or "" for value in batch.column(0).to_pylist())


def _choose(names: list[str], column: str | None) -> str:
    """The column of a table's prompts."""
    if column is not None:
        if column in names:
            return column
        raise ValueError(f"there is no column {column!r}; it has {_list(names)} (data.prompt_column)")
    if len(names) == 1:
        return names[0]
    for wanted in COLUMNS:
        for name in names:
            if name.lower() == wanted:
                return name
    raise ValueError(f"which column holds the prompts? It has {_list(names)}; name it in data.prompt_column")


def _list(names: list[str]) -> str:
    return _shortened(", ".join(names)) or "none"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + " ..."


READERS: dict[str, Callable[[Path, str | None], Any]] = {
    "": _lines,
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": lambda path, column: _table(path, column, ","),
    ".tsv": lambda path, column: _table(path, column, "\t"),
    ".parquet": _parquet,
}
