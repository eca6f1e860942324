"""`dmdtrain synthesize`: the teacher's own videos, latents or trajectories, for the warm-up of a causal student."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from dmdtrain.config import Config, ConfigError, check_writable
from dmdtrain.data.latents import LatentFolder, read_captions
from dmdtrain.data.prompts import EpochSampler
from dmdtrain.files import write_text
from dmdtrain.train import setup
from dmdtrain.train.checkpoint import WARMUP
from dmdtrain.train.clips import scan, with_captions
from dmdtrain.train.log import Live
from dmdtrain.train.render import Renderer, teacher_sigmas
from dmdtrain.train.validation import write_mp4

KINDS = ("trajectories", "latents", "videos")
MOST_TOGETHER = 8  # samples of one batch, which is made as a whole if any of it is missing


def plan_of(
    run: setup.Run, what: str, steps: int, seed: int, every_state: bool = False
) -> tuple[dict[str, Any], list[float]]:
    """What decides the samples but their number (the same facts give the same samples), and the sigmas to go through."""
    sigmas = teacher_sigmas(run, steps, run.timesteps if what == "trajectories" else [])
    kept = [1000 * sigma for sigma in sigmas[:-1]] if every_state else run.timesteps
    facts = {
        "format": 1,
        "what": what,
        "teacher": run.teacher.name,
        "steps": steps,
        "guidance_scale": run.config.dmd.real_score_guidance_scale,
        "guidance_convention": setup.GUIDANCE_CONVENTION,
        "negative_prompt": run.config.data.negative_prompt,
        "flow_shift": run.flow_shift,
        "seed": seed,
        "prompts_sha256": hashlib.sha256("\n".join(run.prompts).encode()).hexdigest(),
        "latent_shape": list(warmup_shape(run)),
        "timesteps": kept if what == "trajectories" else None,
    }
    return facts, sigmas


def warmup_shape(run: setup.Run) -> tuple[int, int, int, int]:
    """[C, T, H, W] of a video as long as the teacher is asked to judge in DMD."""
    channels, _, height, width = run.latent_shape
    return channels, run.config.rollout.warmup_frames, height, width


def own_plan(run: setup.Run) -> tuple[Path, dict[str, Any], list[float]]:
    """Where a run keeps the warm-up's data that its teacher makes, and what `plan_of` says of them."""
    settings = run.config.warmup
    what = "trajectories" if settings.kind == "ode_regression" else "latents"
    facts, sigmas = plan_of(run, what, settings.teacher_steps, run.config.train.seed)
    return run.output_dir / "cache" / WARMUP, facts, sigmas


def warmup_sampler(run: setup.Run) -> EpochSampler[Path]:
    """The warm-up's samples in shuffled epochs, whether the teacher has made its own or has yet to. What they are is told by
    how they were made, their number and their caption."""
    settings = run.config.warmup
    if settings.data is None:
        path, facts, _ = own_plan(run)
        files = [LatentFolder(path, facts).file(index) for index in range(settings.num_samples)]
        captions = EpochSampler(run.prompts, facts["seed"]).draw(settings.num_samples)
    else:
        folder = LatentFolder.open(Path(settings.data).expanduser(), "warmup.data")
        facts, files = folder.facts, folder.files()
        captions = read_captions(files)
    made = json.dumps(facts, sort_keys=True)
    identities = [f"{made} {file.name} {caption}" for file, caption in zip(files, captions, strict=True)]
    return EpochSampler(files, run.config.train.seed, identities=identities)


def make_samples(renderer: Renderer, folder: LatentFolder, sigmas: list[float], count: int, console: Console) -> None:
    """Adds what is missing of samples 0 to count - 1. Number i is of the i-th prompt drawn and starts from seed + i.

    Rounding follows the batch, so that batches are fixed by these numbers: neither what is there nor `count` changes a bit.
    """
    facts = folder.facts
    missing = set(folder.missing(count))
    if not missing:
        return
    shape = tuple(facts["latent_shape"])
    size = min(MOST_TOGETHER, renderer.batch_size(shape))
    batches = [range(first, first + size) for first in sorted({index // size * size for index in missing})]
    drawn = EpochSampler(renderer.run.prompts, facts["seed"]).draw(batches[-1].stop)
    setup.encode_text(renderer.text, [*(drawn[i] for rows in batches for i in rows), facts["negative_prompt"]], console)
    kept = [sigmas.index(t / 1000) for t in facts["timesteps"] or []]
    steps, taken, made = len(sigmas) - 1, itertools.count(), count - len(missing)
    with Live(count, made, console, unit="video") as live:
        for rows in batches:
            states = renderer.teacher_states(
                [drawn[i] for i in rows],
                [facts["seed"] + i for i in rows],
                shape,
                sigmas,
                facts["guidance_scale"],
                facts["negative_prompt"],
                lambda: live.within(f"step {next(taken) % steps + 1}/{steps}"),
            )
            videos = renderer.decode(states[-1]) if facts["what"] == "videos" else None
            wanted = [(column, index) for column, index in enumerate(rows) if index in missing]
            for column, index in wanted:
                if videos is None:
                    folder.write(index, drawn[index], states[-1, column], states[kept, column] if kept else None)
                else:  # a clip with its caption beside it; the clip last, since it is what says that both are there
                    write_text(folder.file(index).with_suffix(".txt"), drawn[index] + "\n")
                    write_mp4(folder.file(index), videos[column], renderer.run.fps, min_edge=1)
            made += len(wanted)
            live.step(made, "")


def synthesize(
    config: Config,
    *,
    out: Path,
    what: str,
    count: int | None,
    steps: int,
    seed: int,
    every_state: bool,
    console: Console,
) -> None:
    """`dmdtrain synthesize`; the prompts are the configuration's."""
    if what not in KINDS:
        raise ConfigError(f"--what: {what}: valid are {', '.join(KINDS)}")
    if every_state and what != "trajectories":
        raise ConfigError(f"--every-state: {what} have no states; valid is --what trajectories")
    if not os.path.isfile(out):  # of which more is told below
        check_writable(out, "--out")
    run = setup.resolve(config)
    if not run.prompts:
        run = with_captions(run, scan(run, console))
    facts, sigmas = plan_of(run, what, steps, seed, every_state)
    folder = LatentFolder.create(out, facts, "--out")
    count = len(run.prompts) if count is None else count
    console.print(
        f"{count} {what} of {run.teacher.name}: {len(sigmas) - 1} steps, guidance {facts['guidance_scale']:g}, "
        f"latents {facts['latent_shape']}; {len(folder.missing(count))} to make",
        soft_wrap=True,
    )
    if folder.missing(count):
        device = setup.device_of_this_machine()
        roles = setup.build_roles(run, device, (), setup.teller(console))
        renderer = Renderer(run, roles, setup.text_cache(run, device), setup.autocast(config, device))
        make_samples(renderer, folder, sigmas, count, console)
    console.print(f"done: {folder.path}, {count} {what}", soft_wrap=True)
