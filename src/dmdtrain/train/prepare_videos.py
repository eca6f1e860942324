"""The latents of a run's clips: encoded once, cached, verified, pruned."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dmdtrain.config import ConfigError
from dmdtrain.data.buckets import BucketSampler, streams_of
from dmdtrain.data.decode import quiet_images, read_clip
from dmdtrain.data.latents import LatentCache
from dmdtrain.data.sources import SourceIndex, hash_of
from dmdtrain.data.videos import Dropped, Unreadable, shown
from dmdtrain.models.decode import encode_videos
from dmdtrain.models.wan import WanFolder, codec, part_folder
from dmdtrain.train.clips import (
    REPORT,
    Clips,
    Sample,
    ahead,
    cache_folder,
    for_training,
    how_read,
    num_frames,
    refuse_useless,
    scan,
    source_index,
    write_report,
)
from dmdtrain.train.log import Live
from dmdtrain.train.setup import Run, device_of_this_machine

AHEAD = 2  # clips that are decoded while another is encoded
DECODING = "decoded 2"  # another wherever frames of videos come out otherwise: what was encoded before is not used then
STALE_SECONDS = 3600.0  # after which nobody is taken to write a partial file any more


def latent_cache(run: Run) -> LatentCache:
    return _cache_at(cache_folder(run) / "latents", run.config.data.cache_compress)


@functools.cache
def _cache_at(path: Path, compress: bool) -> LatentCache:
    """One for all of a process, so that it holds its lock to the end."""
    return LatentCache(path, compress)


def codec_identity(folder: WanFolder, index: SourceIndex) -> str:
    """What of the codec decides latents: its configuration and the content of its weights."""
    weights = sorted(part_folder(folder, "vae").glob("*.safetensors"))
    parts = [json.dumps(folder.vae, sort_keys=True), *(hash_of(index, file) for file in weights)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def latent_name(run: Run, codec: str, sample: Sample) -> str:
    """The name of a sample's latents: whatever decides them is in it."""
    height, width = sample.size
    data = run.config.data
    frames = (num_frames(run), data.fps, data.frame_interval)
    decoding = () if sample.still else (DECODING,)  # images are decoded as they were at first
    parts = (sample.sha256, codec, height, width, *frames, data.crop, "float32 to float16", *decoding)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def latent_names(run: Run, found: Iterable[Clips]) -> dict[Sample, str]:
    """The name of every sample's latents."""
    codec = codec_identity(run.base, source_index(run))
    return {sample: latent_name(run, codec, sample) for clips in found for sample in clips.samples}


def prepare_videos(run: Run, console: Console, scanned: dict[str, Clips] | None = None) -> dict[str, Clips]:
    """Encodes what is missing of the latents of a run's clips. A clip that can not be decoded is left out, and remembered;
    one that can not be read is left out this time.

    scanned: what `scan` has found, where that was done already.
    """
    found = scan(run, console) if scanned is None else scanned
    if not found:
        return found
    cache, index = latent_cache(run), source_index(run)
    names = latent_names(run, found.values())
    there = cache.names()
    missing = {name: sample for sample, name in names.items() if name not in there}
    failed = _encode(run, missing, cache, console) if missing else {}
    if not failed:
        return found
    for key, clips in found.items():
        lost = [sample for sample in clips.samples if names[sample] in failed]
        for sample in lost:
            error = failed[names[sample]]
            if not isinstance(error, Unreadable) and (source := index.find(sample.file)):
                source.failed[how_read(run)] = str(error)
                index.add(source)
        used = [sample for sample in clips.samples if names[sample] not in failed]
        dropped = clips.dropped + [Dropped.of(sample.file, failed[names[sample]]) for sample in lost]
        gone = {item.where for item in dropped}
        noted = [note for note in clips.noted if note.where not in gone]
        found[key] = replace(clips, samples=used, dropped=dropped, noted=noted)
    write_report(run, found)
    for clips in found.values():
        refuse_useless(run, clips)
    name, error = next(iter(failed.items()))
    console.print(
        f"{len(failed):,} clips could not be read or decoded and are left out, listed in {run.output_dir / REPORT}; "
        f"the first: {shown(missing[name].file)}: {error}",
        soft_wrap=True,
        markup=False,
    )
    return found


def _encode(run: Run, missing: dict[str, Sample], cache: LatentCache, console: Console) -> dict[str, ValueError]:
    """Writes the latents of named samples; the names of those that could not be read or decoded, each with what was wrong.

    Several processes share the work.
    """
    data, device = run.config.data, device_of_this_machine()
    items = list(missing.items())
    if not cache.lock.take(alone=True):  # others may be at work: from another place on, until all have met
        begin = random.randrange(len(items))
        items = items[begin:] + items[:begin]
    cache.lock.take()

    def read(item: tuple[str, Sample]) -> torch.Tensor | None:
        name, sample = item
        if cache.file(name).exists():  # another process was faster
            return None
        return read_sample(run, sample)

    failed: dict[str, ValueError] = {}
    with (
        codec(run.base, device) as vae,
        quiet_images(),
        ThreadPoolExecutor(AHEAD) as pool,
        Live(len(missing), 0, console, unit="clip") as live,
    ):
        for count, ((name, _), reading) in enumerate(ahead(pool, read, items, AHEAD), 1):
            try:
                if (video := reading.result()) is not None:
                    latents = encode_videos(vae, video[None].to(device))[0]
                    if not torch.isfinite(latents).all():
                        raise ValueError("its latents are not finite")
                    cache.write(name, latents)
            except ValueError as error:
                failed[name] = error
                if data.on_bad_video == "error":
                    break
            live.step(count, "")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return failed


def read_sample(run: Run, sample: Sample) -> torch.Tensor:
    """The frames of a clip, as `read_clip`."""
    data, place = run.config.data, int(sample.sha256[:13], 16) / 16**13
    return read_clip(sample.file, num_frames(run), *sample.size, data.fps, data.crop, place, data.frame_interval)


def clip_sampler(run: Run, clips: Clips, seed: int) -> BucketSampler[Sample]:
    """Draws of the clips that are trained on."""
    samples = for_training(run, clips)
    weights, repeats = [s.weight for s in clips.sets], [s.repeats for s in clips.sets]
    streams = streams_of(samples, [s.size for s in samples], [s.data_set for s in samples], weights, repeats)
    return BucketSampler(streams, seed)


class ClipLoader:
    """Encoded clips, a bucket at a time."""

    def __init__(self, run: Run, clips: Clips, seed: int):
        self.cache, self.names = latent_cache(run), latent_names(run, [clips])
        self.sampler = clip_sampler(run, clips, seed)

    def draw(self, n: int) -> tuple[list[str], torch.Tensor, None]:
        """Captions and latents [n, C, T, H, W], all of one size; clips have no states."""
        drawn = self.sampler.draw(n)
        latents = self.cache.read([self.names[sample] for sample in drawn])
        return [sample.caption for sample in drawn], latents, None

    @property
    def items(self) -> Sequence[Sample]:
        return self.sampler.items


# ---------------------------------------------------------------------------------------------------- care of the cache


def verify_videos(run: Run, console: Console) -> tuple[int, int]:
    """Checks every latent file of the run's cache against its checksum: how many there are, how many were damaged and are
    removed."""
    cache, damaged = latent_cache(run), 0
    names = sorted(cache.names())
    if not names:
        return 0, 0
    with Live(len(names), 0, console, unit="file to check") as live:
        for count, name in enumerate(names, 1):
            if problem := cache.check(name):
                damaged += 1
                cache.remove(name)
                console.print(f"removed {cache.file(name)}: {problem}", soft_wrap=True, markup=False)
            live.step(count, "")
    return len(names), damaged


def prune_videos(run: Run, found: dict[str, Clips]) -> tuple[int, int]:
    """Removes latents of other clips than those that were found, and what killed writers left: how many files, and bytes.

    Raises:
        ConfigError: another process uses the cache, or nobody can know; or clips can not be read now, which have latents.
    """
    unread = [dropped for clips in found.values() for dropped in clips.dropped if dropped.unread]
    if unread:
        raise ConfigError(
            f"--prune: {len(unread):,} clips or folders can not be read now, and what belongs to them would be removed; "
            f"the first: {unread[0].where}: {unread[0].reason}"
        )
    cache = latent_cache(run)
    if not cache.lock.take(alone=True):
        raise ConfigError(f"data.cache_dir: {cache.path} {cache.lock.problem}")
    wanted = set(latent_names(run, found.values()).values()) if found else set()
    stale = [cache.file(name) for name in cache.names() - wanted]
    stale += [f for f in cache.leftovers() if time.time() - f.stat().st_mtime > STALE_SECONDS]
    size = sum(file.stat().st_size for file in stale)
    for file in stale:
        file.unlink(missing_ok=True)
    source_index(run).compact()
    cache.lock.take()
    return len(stale), size
