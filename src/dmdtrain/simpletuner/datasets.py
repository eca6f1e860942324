"""Their datasets: the resolution, the videos, and their captions as prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmdtrain.config import VAE_TEMPORAL_FACTOR, ConfigError
from dmdtrain.simpletuner import tables
from dmdtrain.simpletuner.clips import KEYS, VIDEO, ClipSet, clip_set, complete_clips, minimum_size, translate_clips
from dmdtrain.simpletuner.keys import translate_key
from dmdtrain.simpletuner.translation import NO_MEANING, REFUSED, SAME, Translation, read_json, shown, source_of

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


def translate_datasets(made: Translation, data: Path | None, out: Path) -> None:
    """The resolution, the videos, and their captions as prompts."""
    sets = []
    resolution = ("resolution", made.given.get("resolution"), made.given.get("resolution_type", "pixel_area"))
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
                    f"resolution = {shown(of_config)}",
                    f"{name} says it",
                )
        found = clip_set(made, dataset)
        _videos(made, name, dataset, found)
        sets += [] if found is None else [found]
    complete_clips(made, sets)
    _resolution(made, *resolution)
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
        yield f"dataset {dataset.get('id', number)}", dataset


def _videos(made: Translation, name: str, dataset: dict[str, Any], found: ClipSet | None) -> None:
    kind = dataset.get("resolution_type", made.given.get("resolution_type", "pixel_area"))
    flat = {key: value for key, value in dataset.items() if key != "video"}
    video = dataset.get("video", {})
    flat |= {f"video.{key}": value for key, value in video.items()} if isinstance(video, dict) else {"video": video}
    for key, value in flat.items():
        source = source_of(f"{name}.{key}", value)
        if key in ("num_frames", "video.num_frames"):
            _training_length(made, value, source)
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
        elif key == "minimum_image_size":
            minimum_size(made, value, source, kind)
        elif key in KEYS or (name_of_video := key.removeprefix("video.")) in VIDEO:
            translate_clips(made, found, key if key in KEYS else name_of_video, value, source)
        elif key not in ("resolution", "resolution_type"):
            translate_key(made, tables.DATASET + key, value, source)


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


def _resolution(made: Translation, name: str, value: Any, kind: Any) -> None:
    if value is None:
        return
    source = f"{name} = {shown(value)} ({kind})"
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
