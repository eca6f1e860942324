"""Settings of their video datasets that decide which clips are read, and at which sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmdtrain.simpletuner.translation import NO_MEANING, REFUSED, SAME, Translation

VALIDATED = 8  # clips that an imported run looks at in validation
LIST_THEM = "list the clips that shall be used in a metadata.jsonl"
ClipSet = dict[str, Any]  # the values of a `VideoSet`


def clip_set(made: Translation, dataset: dict[str, Any]) -> ClipSet | None:
    """A dataset's clips as one of data.videos; None where it names no folder of clips with captions beside them."""
    folder = dataset.get("instance_data_dir")
    found = None if folder is None else made.find(str(folder))
    strategy = dataset.get("caption_strategy", made.given.get("caption_strategy"))
    return {"path": str(found)} if found is not None and found.is_dir() and strategy == "textfile" else None


def translate_clips(made: Translation, clips: ClipSet | None, key: str, value: Any, source: str) -> None:
    """One of `KEYS`."""
    if key in ("cache_dir", "cache_dir_vae"):
        _cache(made, key, value, source)
    elif clips is None:
        made.say(
            NO_MEANING, source, "of clips, and no folder of clips with text files is named: prompts alone are used"
        )
    elif isinstance(why := KEYS[key], str):
        made.say(NO_MEANING, source, why)
    else:
        why(made, clips, value, source)


def complete_clips(made: Translation, sets: list[ClipSet]) -> None:
    """data.videos, and what uses them."""
    if not sets:
        return
    if made.values.get("validation.every") == 0:
        for source in made.sources.pop("data.videos"):
            if source not in made.sources.get("data.prompts", []):
                made.say(NO_MEANING, source, "of clips, which validation would use: it is off; DMD needs prompts alone")
        return
    if any("weight" in clips for clips in sets):
        for clips in sets:
            clips.setdefault("weight", 1.0)
            if clips.pop("repeats", 1) > 1:
                made.comments["data.videos"] = "weights alone: they decide beside repeats"
    made.values["data.videos"] = sets
    made.add(
        "validation.real_clips",
        VALIDATED,
        "clips that validation measures the student on; DMD needs prompts alone. dmd.real_data_loss_weight and warmup.kind: "
        "teacher_forcing train on the others",
    )


def _cache(made: Translation, key: str, value: Any, source: str) -> None:
    there, note = made.values.get("data.cache_dir"), "of text embeddings and latents"
    if key == "cache_dir_vae" and isinstance(value, str):
        value, note = str(Path(value).parent / "dmdtrain"), f"{note}: beside SimpleTuner's, which is for latents alone"
    if there is None or there == value:
        made.put("data.cache_dir", value, source, note)
    else:
        made.say(NO_MEANING, source, f"data.cache_dir serves all: {there}")


def _crop(made: Translation, clips: ClipSet, value: Any, source: str) -> None:
    if value is False:
        made.put_for_all("data.buckets", True, source, "each clip at its own aspect ratio")
    else:
        made.put_for_all("data.buckets", False, source, "all clips are cut to data.resolution, in data.aspect_ratio")


def _crop_aspect(made: Translation, clips: ClipSet, value: Any, source: str) -> None:
    if value == "square":
        made.say(NO_MEANING, source, "clips are cut to data.resolution; a square one is such as 480x480")
    elif value == "preserve":
        made.put_for_all("data.buckets", True, source, "each clip at its own aspect ratio")
    else:
        made.say(
            REFUSED, source, "valid are data.buckets: true (each clip's own aspect ratio) and false (data.resolution)"
        )


def _crop_style(made: Translation, clips: ClipSet, value: Any, source: str) -> None:
    if value in ("center", "random"):
        made.put_for_all("data.crop", value, source)
    else:
        made.say(REFUSED, source, "set data.crop to center, random or none")


def _repeats(made: Translation, clips: ClipSet, value: Any, source: str) -> None:
    if type(value) is not int or value < 0:
        made.say(REFUSED, source, "set repeats in data.videos, 1 or more")
    elif value == 0:
        made.say(SAME, source, "an epoch holds each clip once")
    else:
        clips["repeats"] = value + 1
        made.sources.setdefault("data.videos", []).append(source)


def _probability(made: Translation, clips: ClipSet, value: Any, source: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        made.say(REFUSED, source, "set weight in data.videos, above 0")
        return
    clips["weight"] = value
    made.sources.setdefault("data.videos", []).append(source)


def minimum_size(made: Translation, value: Any, source: str, kind: Any) -> None:
    """Their smallest size: an edge, or the area in megapixels or as the edge of a square."""
    if kind == "area" and isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e4:
        edge = round(math.sqrt(value * 1e6))
        made.put_for_all("data.minimum_size", edge, source, "of the shorter edge; theirs is an area")
    else:
        note = (
            "of the shorter edge; theirs is the edge of a square of that area" if value and kind == "pixel_area" else ""
        )
        made.put_for_all("data.minimum_size", value, source, note)


def _metadata(made: Translation, clips: ClipSet, value: Any, source: str) -> None:
    if value == "discovery":
        made.say(SAME, source, "each clip is looked at once")
    else:
        made.say(REFUSED, source, LIST_THEM)


def _filter(made: Translation, clips: ClipSet, value: Any, source: str) -> None:
    made.say(REFUSED, source, f"there is no such filter: {LIST_THEM}")


Handler = Callable[[Translation, ClipSet, Any, str], None]
SCALED = "a clip is scaled to its size before it is cut, however large it is"
BY_FRAMES = "every clip gives as many frames as a training video has"
# Keys of a dataset (of its `video`, by the same names), or why they have no meaning.
KEYS: dict[str, Handler | str] = {
    "cache_dir": "",
    "cache_dir_vae": "",
    "crop": _crop,
    "crop_aspect": _crop_aspect,
    "crop_aspect_buckets": "data.buckets makes the sizes that the clips need",
    "crop_style": _crop_style,
    "repeats": _repeats,
    "probability": _probability,
    "maximum_image_size": SCALED,
    "target_downsample_size": SCALED,
    "min_frames": "clips that are too short for a training video are left out, and listed",
    "max_frames": "a clip gives its first frames, however long it is",
    "frame_interval": BY_FRAMES,
    "bucket_strategy": BY_FRAMES,
    "vae_batch_size": "clips are encoded one at a time",
    "metadata_backend": _metadata,
    "minimum_aspect_ratio": _filter,
    "maximum_aspect_ratio": _filter,
    "max_num_samples": _filter,
    "max_upscale_threshold": _filter,
}
VIDEO = ("bucket_strategy", "frame_interval", "min_frames", "max_frames")
