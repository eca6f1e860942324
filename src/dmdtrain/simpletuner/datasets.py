"""Their datasets: the resolution, the videos, and their captions as prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmdtrain.config import VAE_TEMPORAL_FACTOR, Config, ConfigError, latent_frames
from dmdtrain.data.videos import VIDEOS
from dmdtrain.simpletuner import tables
from dmdtrain.simpletuner.clips import KEYS, VIDEO, ClipSet, clip_set, complete_clips, minimum_size, translate_clips
from dmdtrain.simpletuner.keys import translate_key
from dmdtrain.simpletuner.translation import (
    NO_MEANING,
    REFUSED,
    SAME,
    TRANSLATED,
    Translation,
    plain,
    read_json,
    shown,
    source_of,
)

KINDS = ("pixel_area", "pixel", "area")  # of a resolution
DEFAULT_RESOLUTION = 1024


def translate_datasets(made: Translation, data: Path | None, out: Path) -> None:
    """The resolution, the videos, and their captions as prompts."""
    sets = []
    lengths: dict[str, int] = {}  # what says it -> latent frames of a clip
    others = False  # datasets that say no resolution of their own
    for name, dataset in _read_datasets(made, data):
        if dataset.get("disabled") is True or dataset.get("disable") is True:
            made.say(NO_MEANING, name, "disabled")
            continue
        kind = dataset.get("dataset_type", "image")
        if kind in ("text_embeds", "image_embeds"):
            made.say(NO_MEANING, f"{name} ({kind})", "embeddings and latents are kept in data.cache_dir")
            continue
        if kind != "video":
            made.say(
                REFUSED,
                f"{name} ({kind})",
                "only datasets of videos are read: write captions to a prompts file",
            )
            continue
        made.dataset = name
        others |= not _resolution_of(made, dataset)
        found = clip_set(made, dataset)
        _videos(made, name, dataset, found, lengths)
        sets += [] if found is None else [found]
    made.dataset = ""
    _training_length(made, lengths)
    _resolution_of_all(made, others)
    complete_clips(made, sets)
    _prompts(made, str(out.with_suffix(".prompts.txt")))


def _prompts(made: Translation, file: str) -> None:
    """data.prompts: the captions; else the validation prompts, to begin with; else nothing yet."""
    validated = [" ".join(prompt.split()) for prompt in made.values.get("validation.prompts", [])]
    if made.prompts:
        made.values["data.prompts"] = file
    elif any(validated):
        made.prompts += filter(None, validated)
        made.add("data.prompts", file, "to begin with, those of validation: replace it by your prompts, one a line")
        made.to_do.append(f"{file} holds the validation prompts alone: replace it by your prompts, thousands, varied")
    else:
        made.add("data.prompts", "prompts.txt", "to be made: one prompt a line; the student is trained from prompts")
        made.to_do.append("put prompts into prompts.txt, one a line: thousands, varied")


def _read_datasets(made: Translation, data: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    named = made.given.get("data_backend_config")
    file = data
    if named is not None:
        source = f"data_backend_config = {shown(named)}"
        file = data or made.find(str(named))
        if file is None:
            made.say(REFUSED, source, "no such file: name it with --data FILE")
        else:
            made.say(NO_MEANING, source, f"read {file}; its keys follow")
    if file is None:
        return
    found = read_json(file)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(dataset, dict) for dataset in found):
        raise ConfigError(f"{file}: it must hold a list of datasets")
    for number, dataset in enumerate(found):
        name = f"dataset {number if dataset.get('id') is None else dataset['id']}"
        known = {key: _filled(made, dataset, value) for key, value in _set(made, name, "", dataset).items()}
        if isinstance(dataset.get("video"), dict):
            known["video"] = _set(made, name, "video.", dataset["video"])
        yield name, {key: plain(tables.DATASET + key, value) for key, value in known.items()}


def _set(made: Translation, name: str, prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Without keys that are null, which are told here."""
    for key, value in values.items():
        if value is None:
            translate_key(made, f"{tables.DATASET}{prefix}{key}", None, f"{name}.{prefix}{key} = null")
    return {key: value for key, value in values.items() if value is not None}


def _filled(made: Translation, dataset: dict[str, Any], value: Any) -> Any:
    """A text with the names in braces that SimpleTuner fills in."""
    given = made.given | {"id": dataset.get("id") or ""}
    for name in ("model_family", "output_dir", "id") if isinstance(value, str) else ():
        value = value.replace(f"{{{name}}}", str(given.get(name, f"{{{name}}}")))
    return value


def _videos(
    made: Translation, name: str, dataset: dict[str, Any], found: ClipSet | None, lengths: dict[str, int]
) -> None:
    kind = _kind(made, dataset)
    flat = {key: value for key, value in dataset.items() if key != "video"}
    video = dataset.get("video", {})
    flat |= {f"video.{key}": value for key, value in video.items()} if isinstance(video, dict) else {"video": video}
    for key, value in flat.items():
        source = source_of(f"{name}.{key}", value)
        if key == "num_frames" and "video.num_frames" in flat:
            made.say(NO_MEANING, source, "video.num_frames says it")
        elif key in ("num_frames", "video.num_frames") and type(value) is int and value > 0:
            lengths[source] = latent_frames(value)
        elif key in ("num_frames", "video.num_frames"):
            made.say(REFUSED, source, "it is no number of frames: set rollout.num_training_frames")
        elif key == "instance_data_dir":
            _captions(made, dataset, value, source)
            if found is not None:
                made.sources.setdefault("data.videos", []).append(source)
        elif key == "caption_strategy":
            if "instance_data_dir" not in dataset:
                made.say(
                    REFUSED, source, "no instance_data_dir, so there are no captions: write them to a prompts file"
                )
            else:
                made.say(NO_MEANING, source, "with instance_data_dir")
        elif key == "crop" and found is not None and value is True and dataset.get("crop_aspect") == "preserve":
            made.say(SAME, source, "clips are cut; crop_aspect says to which size")
        elif key == "minimum_image_size":
            minimum_size(made, value, source, kind)
        elif key in KEYS or (name_of_video := key.removeprefix("video.")) in VIDEO:
            translate_clips(made, found, key if key in KEYS else name_of_video, value, source)
        elif key not in ("resolution", "resolution_type"):
            translate_key(made, tables.DATASET + key, value, source)


def _training_length(made: Translation, lengths: dict[str, int]) -> None:
    """SimpleTuner generates as many frames as a clip has, whatever num_training_frames says: the smaller holds."""
    ours = "rollout.num_training_frames"
    longest, frames = max(lengths.values(), default=0), made.values.get(ours, Config().rollout.num_training_frames)
    shorter = type(frames) is int and longest < frames
    length = f"{frames} latent frames"
    if type(frames) is int:
        length += f", {1 + VAE_TEMPORAL_FACTOR * (frames - 1)} video frames"
    why = f"SimpleTuner trains what clips have, here {longest} latent frames, and not {frames}"
    for source in lengths:
        if shorter:
            made.put(ours, longest, source, why)
        else:
            made.say(NO_MEANING, source, f"rollout.num_training_frames is the length that is trained: {length}")


def _captions(made: Translation, dataset: dict[str, Any], value: Any, source: str) -> None:
    strategy = dataset.get("caption_strategy", made.given.get("caption_strategy", "filename"))
    folder = made.find(str(value))
    if folder is None or not folder.is_dir():
        made.say(REFUSED, source, "no such folder: write its captions to a prompts file, one a line")
        return
    videos = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEOS)
    if strategy == "textfile":
        whole = dataset.get("disable_multiline_split", made.given.get("disable_multiline_split")) is True
        found, unread = [], []
        for video in videos:
            try:
                found += _caption_file(video.with_suffix(".txt"), whole)
            except ValueError as error:
                unread.append(f"{video.with_suffix('.txt')}: {error}")
        if unread:
            made.to_do.append(f"{len(unread)} caption files can not be read and are left out; the first: {unread[0]}")
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
    made.prompts += found
    made.sources.setdefault("data.prompts", []).append(source)
    made.comments["data.prompts"] = "captions of the videos, one a line"


def _caption_file(file: Path, whole: bool) -> list[str]:
    """The captions of a video, none where it has no file; ValueError with what is wrong with the file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8 text") from None
    except OSError as error:
        raise ValueError(error.strerror) from None
    if "\0" in text:
        raise ValueError("it is binary")
    lines = text.splitlines()
    captions = [" ".join(lines)] if whole else lines
    return [" ".join(caption.split()) for caption in captions if caption.strip()]


def _kind(made: Translation, dataset: dict[str, Any]) -> Any:
    """What a resolution is of."""
    return dataset.get("resolution_type", made.given.get("resolution_type", "pixel_area"))


def _sized(value: Any, kind: Any) -> str:
    return f"{shown(value)} ({kind if kind in KINDS else shown(kind)})"


def _resolution_of(made: Translation, dataset: dict[str, Any]) -> bool:
    """A dataset's own resolution; whether it says one."""
    source, kind = f"{made.dataset}.resolution", _kind(made, dataset)
    if "resolution" in dataset:
        _resolution(made, f"{source} = {_sized(dataset['resolution'], kind)}", dataset["resolution"], kind)
        _resolution_type(made, dataset, f"{made.dataset}.")
    elif "resolution_type" in dataset:
        value = made.given.get("resolution", DEFAULT_RESOLUTION)
        _resolution(made, f"{source_of(f'{source}_type', kind)} (of resolution = {shown(value)})", value, kind)
    return "resolution" in dataset or "resolution_type" in dataset


def _resolution_type(made: Translation, values: dict[str, Any], name: str = "") -> None:
    """The row of a resolution_type that stands beside its resolution."""
    kind = values.get("resolution_type")
    if kind is not None:
        valid, otherwise = kind in KINDS, tables.AGREE["resolution_type"][1]
        which = (SAME if kind == KINDS[0] else TRANSLATED) if valid else REFUSED
        made.say(which, source_of(f"{name}resolution_type", kind), "read with resolution" if valid else otherwise)


def _resolution_of_all(made: Translation, others: bool) -> None:
    """The configuration's resolution, which holds for datasets that say none. others: whether there are such."""
    value, kind, ours = made.given.get("resolution"), _kind(made, {}), "data.resolution"
    if value is None and ours in made.said_by and not others:
        if "resolution_type" in made.given:
            made.say(NO_MEANING, made.source("resolution_type"), "of the datasets' resolutions")
        return
    is_default, value = value is None, DEFAULT_RESOLUTION if value is None else value
    source = f"resolution = {_sized(value, kind)}{' (their default)' * is_default}"
    _resolution_type(made, made.given)
    if ours not in made.said_by:
        _resolution(made, source, value, kind)
    elif (size := _size(value, kind)) is not None and size[0] == made.values[ours]:
        made.say(SAME, source, f"{made.said_by[ours]} says it")
    elif others:
        made.say(REFUSED, source, made.one_for_all(ours))
    else:
        made.say(NO_MEANING, source, f"{made.said_by[ours]} says it")


def _resolution(made: Translation, source: str, value: Any, kind: Any) -> None:
    size = _size(value, kind)
    if size is not None:
        made.put_for_all("data.resolution", size[0], source, size[1])
    elif kind in KINDS:
        made.say(REFUSED, source, "set data.resolution, WIDTHxHEIGHT or a number of pixels")
    else:
        made.say(REFUSED, source, tables.AGREE["resolution_type"][1])


def _size(value: Any, kind: Any) -> tuple[int | str, str] | None:
    """Our resolution for theirs, and what there is to say of it; None where it is none."""
    most = 100 if kind == "area" else 16384  # megapixels, pixels
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
        return None
    if kind == "pixel":
        return f"{16 * round(value * 16 / 9 / 16)}x{16 * round(value / 16)}", "the shorter edge, in 16:9"
    if kind == "area":
        return round(math.sqrt(value * 1e6)), "the edge of a square of that area"
    return (int(value), "") if kind == "pixel_area" else None
