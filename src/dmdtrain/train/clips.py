"""The real clips of a run: what there is, and what can be used."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from dmdtrain.config import VAE_TEMPORAL_FACTOR, ConfigError, VideoSet, unwritable
from dmdtrain.data.buckets import Size, bucket_size
from dmdtrain.data.decode import SLACK, check_length, quiet_images
from dmdtrain.data.latents import holds_latents
from dmdtrain.data.sources import Source, SourceIndex, header_of, inspect
from dmdtrain.data.videos import IMAGES, Clip, Dropped, Noted, Unreadable, list_clips, shown
from dmdtrain.files import write_text
from dmdtrain.train.log import Live
from dmdtrain.train.setup import Run, cache_root, with_prompts

REPORT = "data_report.jsonl"
READERS = min(8, os.cpu_count() or 1)  # files that are opened at once


@dataclass(frozen=True)
class Sample:
    """A clip that can be used. What it is made of, and not where it lies, says whether two are the same."""

    sha256: str  # of the file
    caption: str
    size: Size  # (height, width) in pixels, of what is encoded
    data_set: int
    file: Path = field(repr=False, compare=False)
    seconds: float = field(repr=False, compare=False)  # of the whole clip
    rate: float = field(repr=False, compare=False)  # frames a second as they come; 0: unknown
    interlaced: bool = field(default=False, repr=False, compare=False)  # and deinterlaced when it is decoded

    @property
    def still(self) -> bool:
        """Whether it is an image; those that are animated are videos."""
        return self.file.suffix.lower() in IMAGES and not self.seconds


@dataclass(frozen=True)
class Clips:
    """The samples of the data sets that one key of the configuration names."""

    key: str
    sets: list[VideoSet]
    samples: list[Sample]
    dropped: list[Dropped]
    captions: list[str] = field(default_factory=list)  # of all that validation does not keep, usable or not
    noted: list[Noted] = field(default_factory=list)


def clip_sets(run: Run) -> dict[str, list[VideoSet]]:
    """The data sets of clips that a run uses, by their key."""
    config, found = run.config, {}
    data = config.warmup.data
    if config.warmup.kind == "teacher_forcing" and data and not holds_latents(Path(data).expanduser(), "warmup.data"):
        found["warmup.data"] = [VideoSet(path=data)]
    if config.data.videos is not None:
        found["data.videos"] = config.data.videos
    return found


def warmup_key(run: Run) -> str | None:
    """Whose clips the warm-up takes; None where it takes what the teacher made."""
    if run.config.warmup.kind != "teacher_forcing":
        return None
    wanted = "data.videos" if run.config.warmup.data is None else "warmup.data"
    return wanted if wanted in clip_sets(run) else None


def trains_on(run: Run, key: str) -> bool:
    """Whether clips are trained on; else they serve validation alone."""
    return key == warmup_key(run) or (key == "data.videos" and run.config.dmd.real_data_loss_weight > 0)


def num_frames(run: Run) -> int:
    """Video frames of a clip: as many as the teacher is asked to judge in DMD."""
    return 1 + VAE_TEMPORAL_FACTOR * (run.config.rollout.warmup_frames - 1)


def cache_folder(run: Run) -> Path:
    return cache_root(run) / "videos"


def source_index(run: Run) -> SourceIndex:
    return SourceIndex(cache_folder(run) / "sources.jsonl")


# ---------------------------------------------------------------------------------------------------- what there is


def scan(run: Run, console: Console) -> dict[str, Clips]:
    """Lists and inspects the clips of a run; loads no model. What was inspected before is not opened again.

    Raises:
        ConfigError: a data set is missing or holds nothing usable; or, with data.on_bad_video error, a clip is bad.
    """
    sets = clip_sets(run)
    if not sets:
        return {}
    index = source_index(run)
    found = {}
    for key, listed in sets.items():
        samples: list[Sample] = []
        dropped: list[Dropped] = []
        noted: list[Noted] = []
        captions: list[tuple[str, str]] = []  # each with the hash of its clip
        for number, video_set in enumerate(listed):
            name = key if key == "warmup.data" else f"{key}.{number}"
            path = Path(video_set.path).expanduser()
            if holds_latents(path, name):
                raise ConfigError(f"{name}: {shown(path)} holds latents, not clips; valid as warmup.data")
            clips, unlisted = list_clips(video_set, name, noted)
            sources = _inspect([clip.file for clip in clips], index, console)
            used, unused = _sort_out(run, number, clips, sources)
            samples += used
            dropped += unlisted + unused
            noted += _repeating(run, used)
            captions += [(clip.caption, source.sha256) for clip, source in zip(clips, sources, strict=True)]
        # In an order that names and places of the files have no part in: a run goes on when they have changed.
        samples.sort(key=lambda sample: (sample.data_set, sample.sha256, sample.caption))
        whole = Clips(key, listed, samples, dropped, noted=noted)
        kept = held_out(run, whole)
        hashes = {sample.sha256 for sample in kept}
        texts = sorted({caption for caption, sha256 in captions if sha256 not in hashes})
        found[key] = replace(whole, samples=samples if trains_on(run, key) else kept, captions=texts)
    write_report(run, found)
    for clips_found in found.values():
        refuse_useless(run, clips_found)
    return found


def _inspect(files: list[Path], index: SourceIndex, console: Console) -> list[Source]:
    known = {file: index.find(file) for file in files}
    new = [file for file, source in known.items() if source is None or not (source.header or source.bad)]
    if new:
        done = len(known) - len(new)
        with (
            quiet_images(),
            ThreadPoolExecutor(READERS) as pool,
            Live(len(known), done, console, unit="scanned clip") as live,
        ):
            for count, (file, source) in enumerate(ahead(pool, inspect, new, 4 * READERS), done + 1):
                known[file] = source.result()
                if source.result().size >= 0:
                    index.add(source.result())
                live.step(count, "")
    return [known[file] for file in files]  # type: ignore[misc]


A = TypeVar("A")
B = TypeVar("B")


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A], depth: int
) -> Iterator[tuple[A, Future[B]]]:
    """Each item with its work, of which so many are under way."""
    waiting: deque[tuple[A, Future[B]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()


def _sort_out(run: Run, number: int, clips: list[Clip], sources: list[Source]) -> tuple[list[Sample], list[Dropped]]:
    samples: dict[Sample, Sample] = {}
    dropped = []
    for clip, source in zip(clips, sources, strict=True):
        try:
            sample = _sample(run, number, clip, source)
            if sample in samples:
                raise ValueError(f"it is the same as {shown(samples[sample].file)}")
            samples[sample] = sample
        except ValueError as error:
            dropped.append(Dropped.of(clip.file, error))
    return list(samples), dropped


def _sample(run: Run, number: int, clip: Clip, source: Source) -> Sample:
    data = run.config.data
    if reason := source.bad or source.failed.get(how_read(run)):
        raise (Unreadable if source.size < 0 else ValueError)(reason)
    header = header_of(source)
    image = clip.file.suffix.lower() in IMAGES and header.frames == 1
    check_length(header, num_frames(run), data.fps, image, data.frame_interval)
    if min(header.width, header.height) < data.minimum_size:
        raise ValueError(f"it has {header.width} x {header.height} pixels; data.minimum_size is {data.minimum_size}")
    height, width = (edge * run.base.spatial_factor for edge in run.latent_shape[2:])
    if data.buckets:
        area, multiple = height * width, run.base.size_multiple
        height, width = bucket_size(header.width, header.height, area, multiple, data.aspect_bucket_rounding)
    seconds = header.seconds or 0.0
    rate = header.frames / seconds / data.frame_interval if seconds else 0.0
    return Sample(source.sha256, clip.caption, (height, width), number, clip.file, seconds, rate, header.interlaced)


def _repeating(run: Run, samples: list[Sample]) -> list[Noted]:
    """Clips some of whose frames `read_clip` takes several times, by their average rate."""
    fps, frames, noted = run.config.data.fps, num_frames(run), []
    if fps is None:
        return []
    kind = "clips of fewer frames a second than data.fps, which repeat frames"
    for sample in samples:
        taken = {int((number + SLACK) * sample.rate / fps) for number in range(frames)}
        if sample.rate and (repeats := frames - len(taken)):
            reason = f"it has {sample.rate:.4g} frames a second; at {fps:g}, {repeats} of {frames} frames are repeats"
            noted.append(Noted(shown(sample.file), reason, kind))
    return noted


def how_read(run: Run) -> str:
    """How a clip is read; where that has failed, it is not tried again."""
    data = run.config.data
    every = f", 1 in {data.frame_interval}" if data.frame_interval > 1 else ""
    return f"{num_frames(run)} frames at {data.fps}{every}"


def held_out(run: Run, clips: Clips) -> list[Sample]:
    """The samples that validation keeps from training: those of validation.real_clips files, whose content chooses them."""
    wanted = run.config.validation.real_clips if clips.key == "data.videos" else 0
    files = set(run.seen_clips.keep(sorted({sample.sha256 for sample in clips.samples}), wanted))
    return sorted((s for s in clips.samples if s.sha256 in files), key=lambda s: (s.sha256, s.data_set, s.caption))


def for_training(run: Run, clips: Clips) -> list[Sample]:
    kept = set(held_out(run, clips))
    return [sample for sample in clips.samples if sample not in kept]


def with_captions(run: Run, found: dict[str, Clips]) -> Run:
    """A run without prompts of its own has the captions of data.videos."""
    if run.prompts:
        return run
    captions = found["data.videos"].captions
    if not captions:
        raise ConfigError("data.prompts: not given, and validation.real_clips leaves no clip whose caption could serve")
    return with_prompts(run, captions)


def refuse_useless(run: Run, clips: Clips) -> None:
    if clips.dropped and run.config.data.on_bad_video == "error":
        first = clips.dropped[0]
        raise ConfigError(f"{clips.key}: {first.where}: {first.reason}; mend it, or set data.on_bad_video: skip")
    trained, of_training = trains_on(run, clips.key), {sample.data_set for sample in for_training(run, clips)}
    there = {sample.data_set for sample in clips.samples}
    used = trained or run.config.validation.real_clips > 0 or not clips.captions  # else for its captions alone
    for number, video_set in enumerate(clips.sets):
        if number not in there and used and (trained or not there):
            why = next((f"; the first: {d.where}: {d.reason}" for d in clips.dropped), "")
            name = clips.key if clips.key == "warmup.data" else f"{clips.key}.{number}"
            raise ConfigError(
                f"{name}: no clip of {shown(video_set.path)} can be used; they need a caption and {_needed(run)}{why}"
            )
        if trained and number not in of_training:
            raise ConfigError(
                f"validation.real_clips: {run.config.validation.real_clips} clips of validation leave none of "
                f"{clips.key}.{number} to training; {clips.key} has {len(clips.samples)} clips in all"
            )


def _needed(run: Run) -> str:
    fps, every = run.config.data.fps, run.config.data.frame_interval
    how = f", 1 in {every}" if every > 1 else "" if fps is None else f" at {fps:g} a second"
    return f"{num_frames(run)} frame{'s' * (num_frames(run) > 1)}{how}"


def write_report(run: Run, found: dict[str, Clips]) -> None:
    """Lists what is not used, with reasons, and what is noted, with its kind; a report of before goes if there is nothing to
    list."""
    file = run.output_dir / REPORT
    lines = []
    for clips in found.values():
        lines += [{"key": clips.key, "where": d.where, "reason": d.reason} for d in clips.dropped]
        lines += [{"key": clips.key, **asdict(note)} for note in clips.noted]
    if not lines:
        file.unlink(missing_ok=True)
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise unwritable("output_dir", file, error) from None


def describe_clips(run: Run, found: dict[str, Clips]) -> list[str]:
    """What there is, for the user to read: samples by size, hours, what was dropped and mostly why."""
    lines = []
    for clips in found.values():
        sizes = Counter(sample.size for sample in clips.samples)
        each = ", ".join(f"{width}x{height} {count:,}" for (height, width), count in sizes.most_common(8))
        more = f", and {len(sizes) - 8} sizes more" if len(sizes) > 8 else ""
        hours = sum(sample.seconds for sample in clips.samples) / 3600
        rates = sorted(sample.rate for sample in clips.samples if sample.rate)
        own = (
            f" as they are ({rates[0]:.4g} to {rates[-1]:.4g} a second)"
            if rates and run.config.data.fps is None
            else ""
        )
        if clips.samples:
            lines.append(
                f"{clips.key:<15} {len(clips.samples):,} clips, {hours:.2f} hours, {_needed(run)}{own} of each; {each}{more}"
            )
        else:
            lines.append(f"{clips.key:<15} {len(clips.captions):,} captions, which serve as prompts")
        if kept := held_out(run, clips):
            lines.append(f"{'':<15} {len(kept):,} of them are kept for validation")
        if interlaced := sum(sample.interlaced for sample in clips.samples):
            lines.append(f"{'':<15} {interlaced:,} of them are interlaced, and are deinterlaced")
        if clips.dropped:
            first = clips.dropped[0]
            lines.append(
                f"{'':<15} {len(clips.dropped):,} left out, listed in {run.output_dir / REPORT}; the first: "
                f"{first.where}: {first.reason}"
            )
        for kind, count in Counter(note.kind for note in clips.noted).items():
            one = next(note for note in clips.noted if note.kind == kind)
            lines.append(
                f"{'':<15} {count:,} {kind}, listed in {run.output_dir / REPORT}; the first: {one.where}: {one.reason}"
            )
    return lines
