"""Their configuration as it is read, and what has been made of it so far."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmdtrain.config import ConfigError, groups
from dmdtrain.simpletuner import tables

TRANSLATED, SAME, NO_MEANING, REFUSED = "translated", "same by default", "has no meaning here", "refused"
LISTS = (TRANSLATED, SAME, NO_MEANING, REFUSED)
MAX_JSON_BYTES = 4 * 1024 * 1024


@dataclass
class Translation:
    """What has been made of a configuration so far."""

    file: Path
    given: dict[str, Any]  # theirs, flat: distillation_config.KEY; without those that are null
    causal: bool
    values: dict[str, Any] = field(default_factory=dict)  # ours, flat: group.key
    sources: dict[str, list[str]] = field(default_factory=dict)  # ours -> what it was, `key = value`
    comments: dict[str, str] = field(default_factory=dict)  # ours -> why it is not simply what it was
    rows: list[tuple[str, str, str]] = field(default_factory=list)  # list, what it was, what is said of it
    prompts: list[str] = field(default_factory=list)  # of the file beside the YAML
    to_do: list[str] = field(default_factory=list)
    dataset: str = ""  # whose keys are being translated; none: the configuration's
    spelled: dict[str, str] = field(default_factory=dict)  # theirs -> as it stands in the file
    # Ours, one for all datasets -> the dataset that said it first.
    said_by: dict[str, str] = field(default_factory=dict)

    def put(self, ours: str, value: Any, source: str, comment: str = "") -> None:
        self.values[ours] = value
        self.sources.setdefault(ours, []).append(source)
        if comment:
            self.comments[ours] = comment

    def put_for_all(self, ours: str, value: Any, source: str, comment: str = "") -> None:
        """A setting of a dataset of which there is one for all: that of the first dataset with it, else the configuration's."""
        if not self.dataset:
            self.put(ours, value, source, comment)
            return
        if ours not in self.said_by:
            for other in self.sources.pop(ours, []):
                self.say(SAME if self.values[ours] == value else NO_MEANING, other, f"{self.dataset} says it")
            self.comments.pop(ours, None)
        elif self.said_by[ours] != self.dataset and self.values[ours] != value:
            self.say(REFUSED, source, self.one_for_all(ours))
            return
        self.said_by.setdefault(ours, self.dataset)
        self.put(ours, value, source, comment)

    def one_for_all(self, ours: str) -> str:
        return f"one value for all sets: {ours} = {shown(self.values[ours])} of {self.said_by[ours]} is used"

    def add(self, ours: str, value: Any, comment: str) -> None:
        """A value that stands for no key of theirs."""
        self.values[ours], self.comments[ours] = value, comment

    def say(self, which: str, source: str, text: str) -> None:
        self.rows.append((which, source, text))

    def source(self, key: str) -> str:
        """What the row of one of their keys begins with."""
        return source_of(self.spelled.get(key, key), self.given[key])

    def find(self, name: str) -> Path | None:
        """A file or folder that their configuration names: from the working directory, or from where that file lies."""
        above = [parent / name for parent in self.file.resolve().parents]
        places = (Path(name), *above, self.file.parent / Path(name).name) if name else ()
        try:
            return next((place for place in places if place.exists()), None)
        except (OSError, ValueError):  # no name of a file
            return None


def read_json(file: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{file}: {twice!r} stands twice")
        return dict(pairs)

    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ConfigError(f"{file}: too large for a configuration")
        return json.loads(text, object_pairs_hook=once)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None


def flatten(raw: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Keys without dashes and by their newest name, those of the distillation with its prefix; and how each is spelled."""
    if not isinstance(raw, dict):
        raise ConfigError("a configuration of SimpleTuner is a JSON object of settings")
    flat: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in raw.items():
        key = name.lstrip("-").replace("-", "_")
        key = tables.ALIASES.get(key, key)
        inner = _distillation(value) if key == "distillation_config" and value else {key: plain(key, value)}
        for part, what in inner.items():
            if part in flat:
                raise ConfigError(f"{part}: it stands twice, as {name} and under another name")
            flat[part], spelled[part] = what, name if part == key else part
    return flat, spelled


def _distillation(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.strip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"distillation_config: not valid JSON: {error}") from None
    if isinstance(value, dict) and set(value) == {"dmd"}:
        value = value["dmd"]
    if not isinstance(value, dict):
        raise ConfigError(f"distillation_config: {shown(value)}: it must be an object of settings")
    return {(name := tables.DISTILLATION + key): plain(name, part) for key, part in value.items()}


def plain(key: str, value: Any) -> Any:
    """Their command line writes true, false and numbers as text."""
    if not isinstance(value, str) or key.removeprefix(tables.DATASET) in tables.TEXTS:
        return value
    if is_number(key) and re.fullmatch(r"\s*[+-]?\d{1,20}(\.\d{0,20})?(e[+-]?\d{1,3})?\s*", value, re.IGNORECASE):
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    return {"true": True, "false": False}.get(value.lower(), value)


def is_number(key: str) -> bool:
    """Whether a key of theirs is one of ours that is a number, or is read as one."""
    kinds = groups()
    fields = [
        kinds[group].model_fields[name]
        for group, _, name in (o.partition(".") for o in tables.COPY.get(key, ()))
        if name
    ]
    return key in tables.NUMBERS or any(f.annotation in (int, float, int | None, float | None) for f in fields)


def is_on(value: Any) -> bool:
    """Whether a setting of theirs is in use."""
    return value not in (None, False, 0, "", "none", "None", [], {})


def source_of(key: str, value: Any) -> str:
    return f"{key if key.isprintable() else json.dumps(key)} = {shown(value)}"


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= 70 else f"{text[:45]} ... {text[-20:]}"


def check_run(file: Path, given: dict[str, Any]) -> None:
    """Refuses what is no DMD run of Wan text-to-video."""
    for key, wanted in (("model_family", "wan"), ("distillation_method", "dmd")):
        found = given.get(key)
        if found != wanted:
            raise ConfigError(f"{file}: {key}: {shown(found)}: dmdtrain only does {wanted}")
    flavour = given.get("model_flavour")
    if given.get("pretrained_model_name_or_path") is None and flavour not in list(tables.FLAVOURS):
        if flavour and isinstance(flavour, str):
            raise ConfigError(
                f"{file}: model_flavour: {shown(flavour)}: dmdtrain does text to video of Wan 2.1 and 2.2 5B only; "
                f"valid are {', '.join(tables.FLAVOURS)}"
            )
        raise ConfigError(f"{file}: pretrained_model_name_or_path: it must name the model")
