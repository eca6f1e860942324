"""Whether a run still draws from the data that a checkpoint was saved with: decided here, before a model is loaded.

A checkpoint's random.safetensors holds, besides generators and positions:

    prompts.* real.clips.* files.*   what samplers draw from, by its number and SHA-256; also before the stage that draws from it
    known.*                          hashes of each prompt and clip, and of those that validation keeps from training
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dmdtrain.config import BRANCH, ConfigError
from dmdtrain.data.buckets import BucketSampler, OtherItems, Seen, hashes
from dmdtrain.data.decode import quiet_images
from dmdtrain.data.prompts import EpochSampler
from dmdtrain.train.checkpoint import WARMUP, read_tensors, stage_of, understood
from dmdtrain.train.clips import Clips, Sample, for_training, held_out, trains_on, warmup_key
from dmdtrain.train.prepare_videos import clip_sampler, read_sample
from dmdtrain.train.setup import Run, with_prompts
from dmdtrain.train.synthesize import warmup_sampler

Tensors = dict[str, torch.Tensor]
Sampler = EpochSampler[Any] | BucketSampler[Any]


class Drawn(NamedTuple):
    """Something that a run draws from. prefix: of the sampler's state in random.safetensors."""

    prefix: str
    key: str
    noun: str
    sampler: Sampler

    def difference(self, random: Mapping[str, torch.Tensor], *, branch: bool) -> str | None:
        """How its items differ from those of when random.safetensors was saved; None: they are the same.

        Args:
            branch: takes items for others where the checkpoint, of an earlier version, does not say what they were.
        """
        state = under(random, self.prefix)
        try:
            if branch and not {"digest", "items"} & state.keys():
                raise OtherItems("the checkpoint does not say what they were")
            self.sampler.check(state)
        except OtherItems as error:
            now, then = set(hashes(self.sampler.identities or ()).tolist()), random.get(f"known.{self.prefix}")
            if then is None:
                return str(error)
            before = set(then.tolist())
            return f"{error} ({len(now - before):,} added, {len(before - now):,} removed)"
        return None


def under(random: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(f"{prefix}."): value for name, value in random.items() if name.startswith(f"{prefix}.")}


def prompts_of(sampler: Sampler) -> Drawn:
    return Drawn("prompts", "data.prompts", "prompts", sampler)


def real_clips_of(sampler: Sampler) -> Drawn:
    return Drawn("real.clips", "data.videos", "clips", sampler)


def warmup_files_of(run: Run, sampler: Sampler) -> Drawn:
    return Drawn("files", warmup_key(run) or "warmup.data", "samples", sampler)


def _drawn(run: Run, clips: Mapping[str, Clips], warmup: bool) -> list[Drawn]:
    """All that a run draws from, in the warm-up too if it is not over."""
    seed = run.config.train.seed
    found = [prompts_of(EpochSampler(run.prompts, seed))]
    if run.config.dmd.real_data_loss_weight:
        found.append(real_clips_of(clip_sampler(run, clips["data.videos"], seed)))
    if warmup and run.config.warmup.kind != "none":
        key = warmup_key(run)
        found.append(warmup_files_of(run, clip_sampler(run, clips[key], seed) if key else warmup_sampler(run)))
    return found


def record(run: Run, clips: Mapping[str, Clips], *, warmup: bool) -> Tensors:
    """What a checkpoint says of a run's data, for `random.safetensors`; the state of a sampler in use goes over it."""
    found: Tensors = {}
    for drawn in _drawn(run, clips, warmup):
        identity = {name: value for name, value in drawn.sampler.state_dict().items() if name in IDENTITY}
        found |= {f"{drawn.prefix}.{name}": value for name, value in identity.items()}
        found[f"known.{drawn.prefix}"] = hashes(drawn.sampler.identities or ())
    trained = set(run.prompts)
    found["known.kept.prompts"] = hashes(text for text in run.texts if text not in trained)
    if "data.videos" in clips:
        videos = clips["data.videos"]
        found["known.kept.clips"] = hashes(_files(held_out(run, videos)))
        found["known.trained.clips"] = hashes(_files(for_training(run, videos) if trains_on(run, videos.key) else ()))
    return found


IDENTITY = ("count", "digest", "items")  # of a sampler's state: what it draws from


def _files(samples: Iterable[Sample]) -> list[str]:
    return sorted({sample.sha256 for sample in samples})


def going_on(run: Run, checkpoint: Path | None) -> Run:
    """A run that goes on from a checkpoint: what was kept from training stays so, whatever data were added or removed."""
    if checkpoint is None:
        return run
    random = read_tensors(checkpoint, "random")

    def seen(kept: str, trained: str) -> Seen:
        return Seen(*(frozenset(random[name].tolist() if name in random else ()) for name in (kept, trained)))

    with understood(checkpoint, "random.safetensors"):
        prompts = seen("known.kept.prompts", "known.prompts")
        run = replace(run, seen_prompts=prompts, seen_clips=seen("known.kept.clips", "known.trained.clips"))
    return with_prompts(run, run.texts) if run.texts else run


def other_data(run: Run, clips: Mapping[str, Clips], checkpoint: Path | None, *, branch: bool) -> list[str]:
    """What a branch draws from that is not as it was when the checkpoint was saved, each for a line.

    Raises:
        ConfigError: something is not, and it is no branch.
    """
    if checkpoint is None:
        return []
    random, found = read_tensors(checkpoint, "random"), []
    with understood(checkpoint, "random.safetensors"):
        for drawn in _drawn(run, _with_readable(run, clips, random), stage_of(checkpoint) == WARMUP):
            if under(random, drawn.prefix) and (what := drawn.difference(random, branch=branch)):
                found.append((drawn, what))
    if found and not branch:
        raise ConfigError(_refusal(found))
    return [f"{drawn.key}: {what}; a new epoch of the {drawn.noun} begins" for drawn, what in found]


def _with_readable(run: Run, clips: Mapping[str, Clips], random: Tensors) -> dict[str, Clips]:
    """Clips without new ones that can not be decoded, looked at until one can: a lost cache has forgotten which they were."""
    found = dict(clips)
    for prefix, key in (("real.clips", "data.videos"), ("files", warmup_key(run) or "")):
        if key in clips and (then := random.get(f"known.{prefix}")) is not None:
            known, lost = set(then.tolist()), set[Sample]()
            with quiet_images():
                for sample in for_training(run, clips[key]):
                    if int(hashes([repr(sample)])) not in known:
                        try:
                            read_sample(run, sample)
                            break
                        except ValueError:
                            lost.add(sample)
            found[key] = replace(found[key], samples=[sample for sample in found[key].samples if sample not in lost])
    return found


def load_random(
    folder: Path, generator: torch.Generator, drawn: Drawn, draws: str = "draws", *, branch: bool = False
) -> bool:
    """A generator's state and a sampler's position. Of a branch with other data the sampler stays at its beginning.

    Returns:
        whether the sampler is where it was.

    Raises:
        ConfigError: the sampler has other items now, and it is no branch.
    """
    random = read_tensors(folder, "random")
    with understood(folder, "random.safetensors"):
        generator.set_state(random[draws])
        what = drawn.difference(random, branch=branch)
        if what is None:
            drawn.sampler.load_state_dict(under(random, drawn.prefix))
    if what is not None and not branch:
        raise ConfigError(_refusal([(drawn, what)]))
    return what is None


def _refusal(found: list[tuple[Drawn, str]]) -> str:
    listed = "; ".join(f"{drawn.key}: {what}" for drawn, what in found)
    nouns = " and ".join(dict.fromkeys(drawn.noun for drawn, _ in found))
    return f"{listed}; an exact resume needs the same {nouns}; a branch takes others: {BRANCH}"
