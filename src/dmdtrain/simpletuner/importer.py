"""From SimpleTuner's config.json to a configuration of ours. Every key ends in one of four lists; none is dropped silently."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from dmdtrain import strict_yaml
from dmdtrain.config import (
    VAE_TEMPORAL_FACTOR,
    Config,
    ConfigError,
    VideoSet,
    build,
    check_writable,
    groups,
    known_keys,
    latent_frames,
    nested_get,
    unwritable,
)
from dmdtrain.files import write_text
from dmdtrain.simpletuner import tables
from dmdtrain.simpletuner.datasets import translate_datasets
from dmdtrain.simpletuner.keys import translate_key
from dmdtrain.simpletuner.optimizer import complete_optimizer
from dmdtrain.simpletuner.translation import (
    LISTS,
    REFUSED,
    SAME,
    TRANSLATED,
    Translation,
    check_run,
    flatten,
    read_json,
    shown,
    source_of,
)


def translate(file: Path, data: Path | None, out: Path, *, causal: bool) -> tuple[Config, Translation]:
    """Reads SimpleTuner's configuration and its datasets.

    Args:
        data: the multidatabackend.json; None: what the configuration names.
        out: where the YAML will lie; prompts will lie beside it.
        causal: whether the student generates block by block, as SimpleTuner's rollout does.

    Raises:
        ConfigError: a file cannot be read, or is not of a DMD run of Wan.
    """
    if file.suffix in (".toml", ".env"):
        raise ConfigError(f"{file}: of SimpleTuner's configurations only config.json is read: write it as one")
    raw, spelled = flatten(read_json(file))
    check_run(file, raw)
    given = {key: value for key, value in raw.items() if value is not None}
    made = Translation(file, given, causal, spelled=spelled)
    for key, value in raw.items():
        translate_key(made, key, value, source_of(spelled[key], value))
    for key, value in tables.THEIR_DEFAULTS.items():
        if key not in given and not (key == "lora_rank" and given.get("model_type", "full") == "full"):
            translate_key(made, key, value, f"{source_of(key, value)} (their default)")
    translate_datasets(made, data, out)
    _complete(made)
    config = _checked(made)
    _say_translated(made, config)
    return config, made


def _say_translated(made: Translation, config: Config) -> None:
    """A row for every key that has become one or several of ours."""
    default = Config()
    targets: dict[str, list[str]] = {}
    for ours, sources in made.sources.items():
        for source in sources:
            targets.setdefault(source, []).append(ours)
    for source, keys in targets.items():
        same = all(nested_get(config, k) == nested_get(default, k) and k not in made.comments for k in keys)
        parts = [
            f"{k} = {shown(made.values[k])}" + (f" ({made.comments[k]})" if k in made.comments else "") for k in keys
        ]
        made.say(SAME if same else TRANSLATED, source, "-> " + ", ".join(parts))


def _complete(made: Translation) -> None:
    """What hangs on several keys of theirs, and what a run of ours needs beyond."""
    complete_optimizer(made)
    if made.causal:
        made.add("rollout.causal", True, "blocks of frames, as SimpleTuner's rollout makes them")
        made.add("warmup.kind", "ode_regression", "not in SimpleTuner: DMD does not repair a causal student without it")
    guidance = made.values.get("validation.guidance_scale")
    if isinstance(guidance, int | float) and guidance > 1:
        made.comments["validation.guidance_scale"] = "the student is trained to be sampled without guidance: 1"
        made.to_do.append(
            f"validation.guidance_scale is {guidance:g}: is that meant? A student of few steps is trained to be sampled at 1"
        )
    prompts = made.values.get("validation.prompts")
    if prompts is not None and len(prompts) > Config().validation.count:
        made.add("validation.count", len(prompts), "all of them")


def _checked(made: Translation) -> Config:
    """The checked configuration. A value that it refuses is brought to a near one, or refused and left out."""
    for _ in range(2 * len(known_keys())):
        try:
            return build(nested(made.values), "")
        except ConfigError as error:
            message = re.sub(r" \(\d+ more\)$", "", str(error).removeprefix(": "))
        ours = next((key for key in made.values if re.match(rf"{re.escape(key)}[.:]", message)), None)
        if ours is None:
            raise ConfigError(f"{made.file}: {message}")
        why = message.removeprefix(f"{ours}: ")
        near = _near(made, ours)
        if near is not None:
            reason = f"; {made.comments[ours]}" if ours in made.comments else ""
            made.comments[ours] = f"not {made.values[ours]}: {why}{reason}"
            made.values[ours] = near
            continue
        del made.values[ours]
        made.comments.pop(ours, None)
        for source in made.sources.pop(ours, []):
            made.say(REFUSED, source, f"{ours}: {why}")
    raise AssertionError("every round removes or mends a value")


def _near(made: Translation, ours: str) -> int | None:
    """The nearest length below one that temporal blocks do not make up; None for any other mistake."""
    frames = made.values[ours]
    if ours not in ("rollout.num_training_frames", "validation.num_frames") or type(frames) is not int or frames < 1:
        return None
    if ours in made.comments and made.comments[ours].startswith("not "):
        return None
    told = {key: made.values.get(f"rollout.{key}", 0) for key in ("num_frame_per_block", "independent_first_frame")}
    numbers = {key: value for key, value in told.items() if type(value) in (int, bool) and value > 0}
    rollout = Config().rollout.model_copy(update=numbers)
    video = ours == "validation.num_frames"
    latent = latent_frames(frames) if video else frames
    blocks = rollout.nearest_blocks(latent) if made.causal else None
    latent = blocks[0] if blocks else latent
    near = 1 + VAE_TEMPORAL_FACTOR * (latent - 1) if video else latent
    return near if near != frames else None


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Flat keys as groups, in the configuration's order."""
    tree: dict[str, Any] = {}
    for key in known_keys():
        if key in values:
            group, _, name = key.rpartition(".")
            (tree.setdefault(group, {}) if group else tree)[name] = values[key]
    return tree


def yaml_text(config: Config, made: Translation) -> str:
    """A short configuration: what differs from the defaults, and what was changed or added, with why."""
    lines = [
        f"# From {made.file.name} of SimpleTuner, by dmdtrain import-config. Paths hold from where dmdtrain is run."
    ]
    lines += [f"# Left out: {_comment(f'{source}: {text}')}" for which, source, text in made.rows if which == REFUSED]
    default, dumped, group = Config(), config.model_dump(mode="json"), ""
    for key in known_keys():
        if nested_get(config, key) == nested_get(default, key) and key not in made.comments:
            continue
        parent, _, name = key.rpartition(".")
        if parent and parent != group:
            lines.append(f"{parent}:")
            group = parent
        value = _tidy(dumped[parent][name] if parent in groups() else dumped[name])
        indent, comment = "  " if parent else "", _comment(made.comments.get(key, ""))
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        line = f"{indent}{name}:" if texts else f"{indent}{name}: {strict_yaml.inline(value)}"
        if comment and len(line) + len(comment) > 118:
            lines.append(f"{indent}# {comment}")
        elif comment:
            line += f" # {comment}"
        lines.append(line)
        lines += [f"{indent}  - {strict_yaml.inline(item)}" for item in value] if texts else []
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Text that does not end a comment of YAML."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _tidy(value: Any) -> Any:
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if isinstance(value, dict):  # one of data.videos: what it says
        return {
            key: _tidy(part) for key, part in value.items() if part not in (None, VideoSet.model_fields[key].default)
        }
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e9 else value


def report(made: Translation) -> str:
    """The four lists, and what is left to do."""
    lines = []
    for which in LISTS:
        rows = [(source, text) for found, source, text in made.rows if found == which]
        lines.append(f"{which} ({len(rows)})")
        lines += [f"  {source}{' ' if text.startswith('->') else ': '}{text}" for source, text in rows]
    return "\n".join([*lines, *(f"to do: {what}" for what in made.to_do)]) + "\n"


def import_config(file: Path, data: Path | None, out: Path, *, causal: bool) -> tuple[str, bool]:
    """Translates, and writes the YAML and the prompts file beside it.

    Returns:
        The report, and whether nothing was refused.
    """
    prompts = out.with_suffix(".prompts.txt")
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out: {out}: it must end in .yaml")
    if not strict_yaml.is_text(str(out)):  # the YAML names the prompts file
        raise ConfigError(f"--out: {shown(str(out))}: {strict_yaml.NO_TEXT}")
    if not os.path.isdir(out.parent):
        raise ConfigError(f"--out: {out.parent}: no such folder")
    check_writable(out.parent, "--out", prompts.name)
    for path in (out, prompts):
        if os.path.lexists(path):
            raise ConfigError(f"--out: {path} exists; choose another name")
    config, made = translate(file, data, out, causal=causal)
    text = yaml_text(config, made)
    try:
        same = build(strict_yaml.parse(text)) == config
    except ValueError as error:  # letters that a configuration of ours may not hold
        raise ConfigError(f"{file}: {error}") from None
    assert same, "what is written is what was checked"
    written: list[Path] = []
    try:
        for path, content in ((prompts, "".join(f"{prompt}\n" for prompt in dict.fromkeys(made.prompts))), (out, text)):
            if content:
                write_text(path, content)
                written.append(path)
    except OSError as error:
        for path in written:
            path.unlink()
        raise unwritable("--out", out if prompts in written else prompts, error) from None
    return report(made), not any(which == REFUSED for which, _, _ in made.rows)
