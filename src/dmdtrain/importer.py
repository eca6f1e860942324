"""From SimpleTuner's config.json to a configuration of ours. Every key ends in one of four lists; none is dropped silently."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dmdtrain import simpletuner as tables
from dmdtrain import strict_yaml
from dmdtrain.config import (
    VAE_TEMPORAL_FACTOR,
    Config,
    ConfigError,
    build,
    groups,
    known_keys,
    latent_frames,
    nested_get,
)

TRANSLATED, SAME, NO_MEANING, REFUSED = "translated", "same by default", "has no meaning here", "refused"
LISTS = (TRANSLATED, SAME, NO_MEANING, REFUSED)
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
MAX_JSON_BYTES = 4 * 1024 * 1024


@dataclass
class Translation:
    """What has been made of a configuration so far."""

    file: Path
    given: dict[str, Any]  # theirs, flat: distillation_config.KEY
    causal: bool
    values: dict[str, Any] = field(default_factory=dict)  # ours, flat: group.key
    sources: dict[str, list[str]] = field(default_factory=dict)  # ours -> what it was, `key = value`
    comments: dict[str, str] = field(default_factory=dict)  # ours -> why it is not simply what it was
    rows: list[tuple[str, str, str]] = field(default_factory=list)  # list, what it was, what is said of it
    captions: list[str] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)

    def put(self, ours: str, value: Any, source: str, comment: str = "") -> None:
        self.values[ours] = value
        self.sources.setdefault(ours, []).append(source)
        if comment:
            self.comments[ours] = comment

    def add(self, ours: str, value: Any, comment: str) -> None:
        """A value that stands for no key of theirs."""
        self.values[ours], self.comments[ours] = value, comment

    def say(self, which: str, source: str, text: str) -> None:
        self.rows.append((which, source, text))

    def find(self, name: str) -> Path | None:
        """A file or folder that their configuration names: from the working directory, or from where that file lies."""
        above = [parent / name for parent in self.file.resolve().parents]
        places = (Path(name), *above, self.file.parent / Path(name).name) if name else ()
        try:
            return next((place for place in places if place.exists()), None)
        except OSError:  # no name of a file
            return None


def translate(file: Path, data: Path | None, out: Path, *, causal: bool) -> tuple[Config, Translation]:
    """Reads SimpleTuner's configuration and its datasets.

    Args:
        data: the multidatabackend.json; None: what the configuration names.
        out: where the YAML will lie; prompts that are gathered from captions will lie beside it.
        causal: whether the student generates block by block, as SimpleTuner's rollout does.

    Raises:
        ConfigError: a file cannot be read, or is not of a DMD run of Wan.
    """
    given = _flatten(_read_json(file))
    _check_run(file, given)
    made = Translation(file, given, causal)
    for key, value in given.items():
        _translate_key(made, key, value, _source(key, value))
    for key, value in tables.THEIR_DEFAULTS.items():
        if key not in given and not (key == "lora_rank" and given.get("model_type") == "full"):
            _translate_key(made, key, value, f"{_source(key, value)} (their default)")
    _datasets(made, data, out)
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
            f"{k} = {_shown(made.values[k])}" + (f" ({made.comments[k]})" if k in made.comments else "") for k in keys
        ]
        made.say(SAME if same else TRANSLATED, source, "-> " + ", ".join(parts))


def _read_json(file: Path) -> Any:
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


def _flatten(raw: Any) -> dict[str, Any]:
    """Keys without dashes and by their newest name, those of the distillation with its prefix."""
    if not isinstance(raw, dict):
        raise ConfigError("a configuration of SimpleTuner is a JSON object of settings")
    flat: dict[str, Any] = {}
    for name, value in raw.items():
        key = name.lstrip("-").replace("-", "_")
        key = tables.ALIASES.get(key, key)
        inner = _distillation(value) if key == "distillation_config" else {key: _plain(value)}
        for part, what in inner.items():
            if part in flat:
                raise ConfigError(f"{part}: it stands twice, as {name} and under another name")
            flat[part] = what
    return flat


def _distillation(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.strip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"distillation_config: not valid JSON: {error}") from None
    if isinstance(value, dict) and set(value) == {"dmd"}:
        value = value["dmd"]
    if not isinstance(value, dict):
        raise ConfigError(f"distillation_config: {_shown(value)}: it must be an object of settings")
    return {tables.DISTILLATION + key: _plain(part) for key, part in value.items()}


def _plain(value: Any) -> Any:
    """Their command line writes true and false as text."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _source(key: str, value: Any) -> str:
    return f"{key if key.isprintable() else json.dumps(key)} = {_shown(value)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= 70 else f"{text[:45]} ... {text[-20:]}"


def _check_run(file: Path, given: dict[str, Any]) -> None:
    """Refuses what is no DMD run of Wan 2.1 text-to-video."""
    for key, wanted in (("model_family", "wan"), ("distillation_method", "dmd")):
        found = given.get(key)
        if found != wanted:
            raise ConfigError(f"{file}: {key}: {_shown(found)}: dmdtrain only does {wanted}")
    if "pretrained_model_name_or_path" not in given and given.get("model_flavour") not in tables.FLAVOURS:
        raise ConfigError(f"{file}: pretrained_model_name_or_path: it must name the model")


# ------------------------------------------------------------------------------------------------ keys of config.json


def _translate_key(made: Translation, key: str, value: Any, source: str) -> None:
    distillation = key.removeprefix(tables.DISTILLATION) if key.startswith(tables.DISTILLATION) else None
    if value is None:
        known = key in tables.known()
        made.say(SAME if known else REFUSED, source, "not set" if known else _unknown(key))
    elif not made.causal and distillation in tables.BLOCKS:
        made.say(NO_MEANING, source, "a bidirectional student makes all frames as one block")
    elif key in HANDLERS:
        HANDLERS[key](made, value, source)
    elif key in tables.COPY:
        for ours in tables.COPY[key]:
            made.put(ours, value, source, tables.NOTES.get(ours, ""))
    elif key in tables.CHOICES:
        _choose(made, tables.CHOICES[key], value, source)
    else:
        _leave(made, key, value, source)


def _choose(made: Translation, choice: tables.Choice, value: Any, source: str) -> None:
    found = choice.values.get(value) if isinstance(value, str) else None
    if found is None:
        made.say(REFUSED, source, choice.otherwise)
        return
    for ours in choice.ours:
        made.put(ours, found, source)


def _leave(made: Translation, key: str, value: Any, source: str) -> None:
    """A key that is translated into nothing: says why."""
    if key in tables.AGREE:
        agreeing, otherwise = tables.AGREE[key]
        agrees = any(type(value) is type(ours) and value == ours for ours in agreeing)
        made.say(SAME if agrees else REFUSED, source, "as it is done here" if agrees else otherwise)
    elif key in tables.LATER:
        made.say(NO_MEANING, source, f"not yet: {tables.VIDEOS}")
    elif _fits(key, tables.SWITCHES):
        on = value not in (False, 0, "", "none", "None", [], {})
        made.say(REFUSED if on else NO_MEANING, source, "another way to train than DMD" if on else "off")
    elif _fits(key, tables.SWITCHED):
        made.say(NO_MEANING, source, "of another way to train, which another key switches on")
    else:
        why = next((why for names, why in tables.NO_MEANING if _fits(key, names)), None)
        made.say(REFUSED if why is None else NO_MEANING, source, _unknown(key) if why is None else why)


def _fits(key: str, names: str) -> bool:
    return any(fnmatchcase(key, name) for name in names.split())


def _unknown(key: str) -> str:
    scope = [known for known in tables.known() if known.rpartition(".")[0] == key.rpartition(".")[0]]
    near = difflib.get_close_matches(key, scope, 1, 0.6)
    return "unknown key" + (
        f"; did you mean {near[0].rpartition('.')[2]}?" if near else "; remove it if it is not yours"
    )


def _base(made: Translation, value: Any, source: str) -> None:
    name, comment = str(value), ""
    if re.fullmatch(r"Wan-AI/Wan2\.1-T2V-(1\.3B|14B)", name):
        name, comment = f"{name}-Diffusers", f"{name} is not in Diffusers' format"
    elif (found := made.find(name)) is not None and found != Path(name):
        name, comment = str(found.resolve()), f"was {name}"
    made.put("model.base", name, source, comment)


def _flavour(made: Translation, value: Any, source: str) -> None:
    if value in tables.FLAVOURS and "pretrained_model_name_or_path" not in made.given:
        made.put("model.base", tables.FLAVOURS[value], source)
    else:
        _leave(made, "model_flavour", value, source)


def _text_encoder(made: Translation, value: Any, source: str) -> None:
    same = value == made.given.get("pretrained_model_name_or_path") or str(value).startswith("Wan-AI/Wan2.1-")
    what = "the text encoder is the base folder's" + ("" if same else ": put this one into that folder")
    made.say(SAME if same else REFUSED, source, what)


def _kind(made: Translation, value: Any, source: str) -> None:
    _choose(made, tables.CHOICES["model_type"], value, source)
    if value == "full":
        made.put("fake_score.kind", "full", source)


def _lora(made: Translation, value: Any, source: str) -> None:
    for ours in tables.COPY["lora_rank"]:
        made.put(ours, value, source, tables.NOTES.get(ours, ""))
    if made.given.get("lora_alpha") is None:
        for ours in tables.COPY["lora_alpha"]:
            made.put(ours, value, source, "alpha is the rank where it is not set")


def _targets(made: Translation, value: Any, source: str) -> None:
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    made.put("student.targets", names, source)


def _betas(made: Translation, value: Any, source: str) -> None:
    made.put("optimizer.betas", [made.given.get("adam_beta1", 0.9), made.given.get("adam_beta2", 0.999)], source)


def _warmup_steps(made: Translation, value: Any, source: str) -> None:
    if made.given.get("lr_scheduler") == "constant":
        made.say(NO_MEANING, source, "lr_scheduler: constant has no warm-up; constant_with_warmup has")
        return
    every = made.given.get("distillation_config.generator_update_interval")
    note = "of the student's updates" if isinstance(every, int) and every > 1 else ""
    made.put("schedule.warmup_steps", value, source, note)


def _use_ema(made: Translation, value: Any, source: str) -> None:
    made.put("ema.enabled", value, source)
    if value is False:
        made.put("ema.validate_with", "raw", source)


def _ema_setting(key: str) -> Callable[[Translation, Any, str], None]:
    def handle(made: Translation, value: Any, source: str) -> None:
        if made.given.get("use_ema", False) is not True:
            made.say(NO_MEANING, source, "use_ema is off")
        elif key in tables.CHOICES:
            _choose(made, tables.CHOICES[key], value, source)
        else:
            made.put(tables.COPY[key][0], value, source)

    return handle


def _report(made: Translation, value: Any, source: str) -> None:
    if value in ("tensorboard", "none"):
        made.put("log.tensorboard", value == "tensorboard", source)
    else:
        made.say(NO_MEANING, source, "metrics go to OUTPUT_DIR/metrics.jsonl and TensorBoard")


def _resume(made: Translation, value: Any, source: str) -> None:
    if value in ("latest", False, ""):
        made.say(SAME, source, "fit goes on from the run's newest checkpoint; --resume never refuses to")
    else:
        made.say(REFUSED, source, "a checkpoint of SimpleTuner can not be gone on from: start anew")


def _epochs(made: Translation, value: Any, source: str) -> None:
    if made.given.get("max_train_steps"):
        made.say(NO_MEANING, source, "train.max_steps decides")
    else:
        made.say(REFUSED, source, "the length is counted in steps: set train.max_steps")


def _max_steps(made: Translation, value: Any, source: str) -> None:
    if value:
        made.put("train.max_steps", value, source)
    else:
        made.say(REFUSED, source, "set train.max_steps, the number of steps")


def _no_validation(made: Translation, value: Any, source: str) -> None:
    if value:
        made.values.pop("validation.every", None)
        made.put("validation.every", 0, source)
    else:
        made.say(SAME, source, "validation.every says when")


def _validation_steps(made: Translation, value: Any, source: str) -> None:
    steps = made.given.get("distillation_config.dmd_denoising_steps", "1000,757,522")
    count = len(steps.split(",")) if isinstance(steps, str) else len(steps) if isinstance(steps, list) else 0
    if str(value) == str(count):
        made.say(SAME, source, "validation runs the student's denoising steps")
    else:
        made.say(
            REFUSED, source, f"the student runs its own {count} steps: set validation.steps to a list of timesteps"
        )


def _validation_prompt(made: Translation, value: Any, source: str) -> None:
    made.put("validation.prompts", [str(value), *made.values.get("validation.prompts", [])], source)


def _validation_resolution(made: Translation, value: Any, source: str) -> None:
    first, *more = str(value).split(",")
    made.put("validation.resolution", first.strip(), source, f"the first of {value}" if more else "")


def _prompt_library(made: Translation, value: Any, source: str) -> None:
    if value is False:
        made.say(SAME, source, "no library of prompts")
    elif value is True:
        made.say(NO_MEANING, source, "there is no built-in library of prompts: list them in validation.prompts")
    elif (file := made.find(str(value))) is None:
        made.say(REFUSED, source, "no such file: put its prompts into validation.prompts")
    else:
        library = _read_json(file)
        prompts = list(library.values()) if isinstance(library, dict) else library
        prompts = [p.get("prompt") if isinstance(p, dict) else p for p in prompts] if isinstance(prompts, list) else []
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            made.say(REFUSED, source, f"{file} is no object of names and prompts: put them into validation.prompts")
            return
        made.put("validation.prompts", [*made.values.get("validation.prompts", []), *prompts], source)


def _agreed(made: Translation, value: Any, source: str) -> None:
    made.say(SAME, source, "what dmdtrain does")


def _elsewhere(made: Translation, value: Any, source: str) -> None:
    """Read with the datasets."""


HANDLERS: dict[str, Callable[[Translation, Any, str], None]] = {
    "model_family": _agreed,
    "distillation_method": _agreed,
    "pretrained_model_name_or_path": _base,
    "model_flavour": _flavour,
    "pretrained_t5_model_name_or_path": _text_encoder,
    "model_type": _kind,
    "lora_rank": _lora,
    "peft_lora_target_modules": _targets,
    "adam_beta1": _betas,
    "adam_beta2": _betas,
    "lr_warmup_steps": _warmup_steps,
    "use_ema": _use_ema,
    "ema_decay": _ema_setting("ema_decay"),
    "ema_update_interval": _ema_setting("ema_update_interval"),
    "ema_validation": _ema_setting("ema_validation"),
    "report_to": _report,
    "resume_from_checkpoint": _resume,
    "num_train_epochs": _epochs,
    "max_train_steps": _max_steps,
    "validation_disable": _no_validation,
    "validation_num_inference_steps": _validation_steps,
    "validation_prompt": _validation_prompt,
    "validation_prompt_library": _prompt_library,
    "user_prompt_library": _prompt_library,
    "validation_resolution": _validation_resolution,
    "resolution": _elsewhere,
    "resolution_type": _elsewhere,
    "data_backend_config": _elsewhere,
}


# ------------------------------------------------------------------------------------------------------------ datasets


def _datasets(made: Translation, data: Path | None, out: Path) -> None:
    """The resolution, and the captions of the videos as prompts."""
    resolution = ("resolution", made.given.get("resolution"), made.given.get("resolution_type", "pixel_area"))
    for name, dataset in _read_datasets(made, data):
        if dataset.get("disabled") is True or dataset.get("disable") is True:
            made.say(NO_MEANING, name, "disabled")
            continue
        kind = dataset.get("dataset_type", "image")
        if kind in ("text_embeds", "image_embeds"):
            made.say(NO_MEANING, f"{name} ({kind})", "text embeddings are kept in OUTPUT_DIR/cache")
            continue
        if kind != "video":
            made.say(
                REFUSED,
                f"{name} ({kind})",
                "only datasets of videos, for their captions: write captions to a prompts file",
            )
            continue
        if dataset.get("resolution") is not None:
            of_config = made.given.get("resolution")
            resolution = (
                f"{name}.resolution",
                dataset["resolution"],
                dataset.get("resolution_type", made.given.get("resolution_type", "pixel_area")),
            )
            if of_config is not None:
                made.say(
                    SAME if of_config == dataset["resolution"] else NO_MEANING,
                    f"resolution = {_shown(of_config)}",
                    f"{name} says it",
                )
        _videos(made, name, dataset)
    _resolution(made, *resolution)
    if made.captions:
        made.values["data.prompts"] = str(out.with_suffix(".prompts.txt"))
    else:
        made.add("data.prompts", "prompts.txt", "to be made: one prompt a line; the student is trained from prompts")
        made.to_do.append("put prompts into prompts.txt, one a line: thousands, varied")


def _read_datasets(made: Translation, data: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    named = made.given.get("data_backend_config")
    file = data
    if named is not None:
        source = f"data_backend_config = {_shown(named)}"
        file = data or made.find(str(named))
        if file is None:
            made.say(REFUSED, source, "no such file: name it with --data FILE")
        else:
            made.say(NO_MEANING, source, f"read {file}; its keys follow")
    if file is None:
        return
    found = _read_json(file)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(dataset, dict) for dataset in found):
        raise ConfigError(f"{file}: it must hold a list of datasets")
    for number, dataset in enumerate(found):
        yield f"dataset {dataset.get('id', number)}", dataset


def _videos(made: Translation, name: str, dataset: dict[str, Any]) -> None:
    flat = {key: value for key, value in dataset.items() if key != "video"}
    video = dataset.get("video", {})
    flat |= {f"video.{key}": value for key, value in video.items()} if isinstance(video, dict) else {"video": video}
    for key, value in flat.items():
        source = _source(f"{name}.{key}", value)
        if key in ("num_frames", "video.num_frames"):
            _training_length(made, value, source)
        elif key == "instance_data_dir":
            _captions(made, dataset, value, source)
        elif key == "caption_strategy":
            if "instance_data_dir" not in dataset:
                made.say(
                    REFUSED, source, "no instance_data_dir, so there are no captions: write them to a prompts file"
                )
            else:
                made.say(NO_MEANING, source, "with instance_data_dir")
        elif key not in ("resolution", "resolution_type"):
            _translate_key(made, tables.DATASET + key, value, source)


def _training_length(made: Translation, value: Any, source: str) -> None:
    frames = made.given.get("distillation_config.num_training_frames", 21)
    length = f"{frames} latent frames"
    if isinstance(frames, int):
        length += f", {1 + VAE_TEMPORAL_FACTOR * (frames - 1)} video frames"
    made.say(NO_MEANING, source, f"rollout.num_training_frames is the length that is trained: {length}")


def _captions(made: Translation, dataset: dict[str, Any], value: Any, source: str) -> None:
    strategy = dataset.get("caption_strategy", made.given.get("caption_strategy", "filename"))
    folder = made.find(str(value))
    if folder is None or not folder.is_dir():
        made.say(REFUSED, source, "no such folder: write its captions to a prompts file, one a line")
        return
    videos = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
    if strategy == "textfile":
        whole = dataset.get("disable_multiline_split", made.given.get("disable_multiline_split")) is True
        found = [caption for video in videos for caption in _caption_file(video.with_suffix(".txt"), whole)]
    elif strategy == "filename":
        found = [" ".join(video.stem.replace("_", " ").split()) for video in videos]
    elif strategy == "instanceprompt":
        prompt = dataset.get("instance_prompt", made.given.get("instance_prompt"))
        found = [prompt] if isinstance(prompt, str) else []
    else:
        made.say(REFUSED, source, f"caption_strategy {strategy}: write the captions to a prompts file, one a line")
        return
    if not found:
        made.say(REFUSED, source, f"no captions in {folder} ({len(videos)} videos, caption_strategy {strategy})")
        return
    made.captions += found
    made.sources.setdefault("data.prompts", []).append(source)
    made.comments["data.prompts"] = "captions of the videos, one a line"


def _caption_file(file: Path, whole: bool) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as text: {error}") from None
    captions = [" ".join(lines)] if whole else lines
    return [" ".join(caption.split()) for caption in captions if caption.strip()]


def _resolution(made: Translation, name: str, value: Any, kind: Any) -> None:
    if value is None:
        return
    source = f"{name} = {_shown(value)} ({kind})"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 16384:
        made.say(REFUSED, source, "set data.resolution, WIDTHxHEIGHT or a number of pixels")
    elif kind == "pixel":
        width = 16 * round(value * 16 / 9 / 16)
        made.put("data.resolution", f"{width}x{16 * round(value / 16)}", source, "the shorter edge, in 16:9")
    elif kind == "area":
        made.put("data.resolution", round(math.sqrt(value * 1e6)), source, "the edge of a square of that area")
    elif kind == "pixel_area":
        made.put("data.resolution", int(value), source)
    else:
        made.say(REFUSED, source, tables.AGREE["resolution_type"][1])


# ------------------------------------------------------------------------------------------------------ what is checked


def _complete(made: Translation) -> None:
    """What a run of ours needs beyond theirs."""
    if made.causal:
        made.add("rollout.causal", True, "blocks of frames, as SimpleTuner's rollout makes them")
        made.add("warmup.kind", "ode_regression", "not in SimpleTuner: DMD does not repair a causal student without it")
    guidance = made.values.get("validation.guidance_scale")
    if isinstance(guidance, int | float) and guidance > 1:
        made.comments["validation.guidance_scale"] = "the student is trained to be sampled without guidance: 1"
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
            made.comments[ours] = f"not {made.values[ours]}: {why}"
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
    settings = {k.partition(".")[2]: v for k, v in made.values.items() if k.startswith("rollout.")}
    rollout = Config().rollout.model_copy(update=settings)
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


# --------------------------------------------------------------------------------------------------- what is written


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
    for path in (out, prompts):
        if path.exists():
            raise ConfigError(f"--out: {path} exists; choose another name")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: {out.parent}: no such folder")
    config, made = translate(file, data, out, causal=causal)
    text = yaml_text(config, made)
    try:
        same = build(strict_yaml.parse(text)) == config
    except ValueError as error:  # letters that a configuration of ours may not hold
        raise ConfigError(f"{file}: {error}") from None
    assert same, "what is written is what was checked"
    if made.captions:
        _write(prompts, "\n".join(dict.fromkeys(caption.strip() for caption in made.captions)) + "\n")
    _write(out, text)
    return report(made), not any(which == REFUSED for which, _, _ in made.rows)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
