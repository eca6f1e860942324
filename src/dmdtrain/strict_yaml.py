"""YAML as a configuration needs it: plain values, every key once, nothing that grows when it is read."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000  # with every alias written out
MAX_DEPTH = 16
MAX_DIGITS = 100
NO_TEXT = "a character that is no text"
TAG = "tag:yaml.org,2002:"
SCALARS = {TAG + kind for kind in ("str", "int", "float", "bool", "null", "merge")}
# What a bare word is besides text, and how it begins. Narrower than YAML 1.1, for which `no` is false, 0400 is 256, 16:9 is 969
# and 2026-01-31 is a date. 1e-5 stays text, as the files that PyYAML writes have it; keys of numbers take it all the same.
BARE = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?(?:0|[1-9][0-9_]*|0b[01]+|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
# Numbers that are read in one way here and in another one there: with a leading 0, to the base 8 or to the base 60.
AMBIGUOUS = re.compile(r"[-+]?(?:0[0-9_]{1,99}|0o[0-7]{1,99}|[0-9]{1,20}(?::[0-5]?[0-9]){1,9}(?:\.[0-9]{0,20})?)")


class Placed(str):
    """A bare word that is text here and could be meant as a number; line: where it stands."""

    line: int


class _Loader(yaml.SafeLoader):
    """SafeLoader without tags and deep nesting, and with the bare words of `BARE` alone."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{TAG}null", f"{TAG}merge", f"{TAG}value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: bytes | str):
        super().__init__(text)
        self.depth = 0

    def get_event(self):
        event = super().get_event()
        if getattr(event, "tag", None) is not None:
            raise _mistake(f"the tag {event.tag!r} is not for configurations", event)
        if isinstance(event, yaml.CollectionStartEvent):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise _mistake(f"nested more than {MAX_DEPTH} deep", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.depth -= 1
        return event


for _kind, (_pattern, _first) in BARE.items():
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(f"(?:{_pattern})$"), list(_first))


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    if node.style is not None or not AMBIGUOUS.fullmatch(node.value):
        return node.value
    assert node.start_mark is not None
    placed = Placed(node.value)
    placed.line = node.start_mark.line + 1
    return placed


_Loader.add_constructor(f"{TAG}str", _text)


def check_number(text: str) -> None:
    """Raises ValueError, with what may have been meant, where a number is written in a way that is read differently elsewhere."""
    if not AMBIGUOUS.fullmatch(text):
        return
    digits = text.replace("_", "")
    if ":" in digits:
        sign = -1 if digits.startswith("-") else 1
        value = 0.0
        for part in digits.lstrip("-+").split(":"):
            value = 60 * value + float(part)
        meant = f"{sign * value:.15g}, if it is to the base 60"
    elif "o" in digits:
        meant = f"{int(digits, 8)}"
    else:
        octal = None if {"8", "9"} & set(digits) else int(digits, 8)
        meant = f"{int(digits)}" + (f", or {octal} if it is octal" if octal not in (None, int(digits)) else "")
    where = f" (line {text.line})" if isinstance(text, Placed) else ""
    raise ValueError(f"{text}{where}: not a plain decimal number; write {meant}")


def _mistake(what: str, place: yaml.Event | yaml.Node) -> ValueError:
    assert place.start_mark is not None
    return ValueError(f"{what} (line {place.start_mark.line + 1})")


def parse(text: bytes | str, most: int = MAX_BYTES) -> Any:
    """The value of one YAML document; bytes are UTF-8, or UTF-16 with its mark. No two parts of it are the same object.

    Raises:
        ValueError: with what is wrong and its line. It is too large or too deep, a key stands twice, aliases blow it up,
            or it holds tags, unprintable characters or absurd numbers.
    """
    if len(text) > most:
        raise ValueError(f"more than {most // 1024} KiB; prompts go in a text file of their own")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check(most).walk(node, 1)
        return _copy(loader.construct_document(node))
    except yaml.reader.ReaderError as error:
        raise ValueError(f"cannot be read: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).replace(' in "<unicode string>"', "").replace(' in "<byte string>"', "").split())


class _Check:
    """Counts the values of a document and their text with every alias written out, and looks at each."""

    def __init__(self, most: int) -> None:
        self.most, self.values, self.bytes = most, 0, 0

    def walk(self, node: yaml.Node, depth: int) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, with every alias written out")
        if depth > MAX_DEPTH:  # through an alias, perhaps to itself
            raise _mistake(f"nested more than {MAX_DEPTH} deep", node)
        if isinstance(node, yaml.ScalarNode):
            self.bytes += len(node.value.encode(errors="surrogatepass"))
            if self.bytes > self.most:
                raise ValueError(f"more than {self.most // 1024} KiB of text, with every alias written out")
            _check_scalar(node)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.walk(item, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            for key, value in node.value:
                self.walk(key, depth + 1)
                self.walk(value, depth + 1)


def _check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag not in SCALARS:  # a bare `=` is YAML 1.1's "value"
        raise _mistake(f"{node.value!r} must be in quotes", node)
    if node.tag in (f"{TAG}int", f"{TAG}float") and len(node.value) > MAX_DIGITS:
        raise _mistake(f"a number of {len(node.value)} characters", node)
    if not is_text(node.value):
        raise _mistake(NO_TEXT, node)


def is_text(value: str) -> bool:
    """Whether it can be written in UTF-8: what a command is given in another encoding cannot."""
    return "\0" not in value and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _mistake("a key must be text", key)
        assert key.start_mark is not None
        if key.tag not in (f"{TAG}str", f"{TAG}merge"):
            raise _mistake(f"{key.value}: a key must be text", key)
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ValueError(f"{key.value!r} stands twice, in lines {seen[key.value]} and {line}")
        seen[key.value] = line


def _copy(value: Any) -> Any:
    """Without shared parts, so that a change to one group is not a change to its alias."""
    if isinstance(value, dict):
        return {key: _copy(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_copy(part) for part in value]
    return value


def inline(value: Any) -> str:
    """A plain value as YAML on one line."""
    width = float("inf")
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=width)
    text = text.removesuffix("\n").removesuffix("\n...")
    if text.isprintable():
        return text
    # Text with line breaks and the like, in double quotes with escapes.
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', width=width).removesuffix("\n")
