"""`dmdtrain prepare`: what a run needs from its frozen encoders, made ahead and kept in its cache."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dmdtrain.config import Config
from dmdtrain.data.latents import LatentFolder, holds_latents, read_captions
from dmdtrain.models.encode import SHARD_PROMPTS
from dmdtrain.train.clips import describe_clips, with_captions
from dmdtrain.train.log import Live
from dmdtrain.train.prepare_videos import prepare_videos, prune_videos, verify_videos
from dmdtrain.train.resume import check_output
from dmdtrain.train.setup import Run, device_of_this_machine, encode_text, resolve, size_text, text_cache
from dmdtrain.train.warmup import check_data


def prepare(config: Config, *, verify: bool, prune: bool, console: Console) -> None:
    """Every stage in turn; each adds what is missing."""
    run = resolve(config)
    check_data(run)
    check_output(config, "auto")
    if verify:
        files, damaged = verify_videos(run, console)
        if files:
            console.print(
                f"verified        {files:,} latent files, {damaged:,} damaged", soft_wrap=True, highlight=False
            )
    clips = prepare_videos(run, console)
    run = with_captions(run, clips)
    for line in describe_clips(run, clips):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if prune:
        count, size = prune_videos(run, clips)
        if count or clips:
            console.print(f"pruned          {count:,} latent files, {size_text(size)}", soft_wrap=True, highlight=False)
    captions = [sample.caption for found in clips.values() for sample in found.samples]
    prepare_text(run, console, captions, verify=verify, prune=prune)


def prepare_text(run: Run, console: Console, captions: list[str], *, verify: bool, prune: bool) -> None:
    """Embeddings of every text of the run, clips' captions among them; verify and prune as the command's options."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    text = text_cache(run, device_of_this_machine())
    if verify:
        text.shards.refresh()
        files, size = text.shards.size()
        with Live(files, 0, console, unit="file") as live:
            for count, (file, problem) in enumerate(text.shards.verify(), 1):
                live.step(count, "verified")
                if problem is not None:
                    say(f"damaged         {file}: {problem}; deleted, what this run needs of it is made again")
        say(f"verified        {files:,} files, {size_text(size)}")
    groups = needed_text(run, captions)
    needed = [prompt for prompts in groups.values() for prompt in prompts]
    listed = ", ".join(f"{len(prompts):,} {name}" for name, prompts in groups.items() if prompts)
    left_out = f"; {run.left_out}" if run.left_out else ""
    say(f"text            {listed}{left_out}")
    encoded = encode_text(text, needed, console)
    rows = text.rows(needed)
    say(f"embeddings      {len(rows):,} needed, {len(rows) - encoded:,} were there, {encoded:,} added")
    if prune:
        with console.status("pruning"):
            deleted, freed = text.shards.prune(rows, SHARD_PROMPTS)
        say(f"pruned          {deleted:,} embeddings that this configuration does not need, {size_text(freed)}")
    files, size = text.shards.size()
    say(f"cache           {text.cache}: {len(text.shards.rows):,} embeddings in {files:,} files, {size_text(size)}")


def needed_text(run: Run, captions: list[str]) -> dict[str, list[str]]:
    """What is encoded in a run, by what it is for."""
    config = run.config
    groups = {"training prompts": run.prompts, "validation prompts": run.validation_prompts}
    groups["negative prompts"] = list(dict.fromkeys([config.data.negative_prompt, config.validation.negative_prompt]))
    groups["clips' captions"] = list(dict.fromkeys(captions))
    if config.warmup.kind != "none" and config.warmup.data is not None:  # else the teacher's videos are of the prompts
        path = Path(config.warmup.data).expanduser()
        if holds_latents(path, "warmup.data"):
            files = LatentFolder.open(path, "warmup.data").files()
            groups["warm-up captions"] = list(dict.fromkeys(read_captions(files)))
    return groups
