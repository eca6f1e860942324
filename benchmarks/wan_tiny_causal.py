"""Causal students of wan-tiny beside the bidirectional one and the teacher: accuracy, Frechet distance, and drift by block.

    python benchmarks/wan_tiny_causal.py --ckpt "self-forcing=RUN/checkpoints/step-000150" --ckpt "warm-up=RUN/warmup/step-000300"

Every row is 3-latent-frame blocks of one video length: the whole video's accuracy, then accuracy and Frechet distance of each
block on its own. Blocks after the first are compared with the same blocks (2 to 7, pooled) of fresh teacher samples of 21
latent frames; the teacher's own distance between two such sets is the floor. Beyond 21 frames causal students roll on in a
window of the training length, the first one also with all of its context.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from dmdtrain.data.prompts import load_prompts
from dmdtrain.miniature.frechet import features, frechet_distance
from dmdtrain.train import setup
from dmdtrain.train.render import Renderer
from dmdtrain.train.validation import score

FAR_SEED = 1_000_000  # the reference set's seeds, apart from all others
BLOCK = 3


def block_features(latents: torch.Tensor) -> list[torch.Tensor]:
    return [features(block) for block in latents.split(BLOCK, dim=2)]


def block_accuracy(videos: torch.Tensor, prompts: list[str]) -> list[float]:
    """The share of videos that are right in all, looking at one block's frames alone."""
    ends = range(BLOCK, (videos.shape[2] + 3) // 4 + 1, BLOCK)
    clips = [videos[:, :, max(0, 4 * (end - BLOCK) - 3) : 4 * end - 3] for end in ends]
    return [round(score(clip, prompts)["all"], 4) for clip in clips]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", action="append", required=True, metavar="NAME=CHECKPOINT")
    parser.add_argument("--samples", type=int, default=144)
    parser.add_argument("--teacher-steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/wan_tiny_causal.json"))
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    device = setup.device_of_this_machine()
    named = [(name, Path(ckpt)) for name, ckpt in (text.split("=", 1) for text in args.ckpt)]

    held_out = load_prompts("wan-tiny", "prompts", held_out=True)
    prompts = [held_out[i % len(held_out)] for i in range(args.samples)]
    run = setup.load_run(named[0][1])
    shape, guidance = run.latent_shape, run.config.dmd.real_score_guidance_scale
    renderer = Renderer(run, setup.load_student(run, named[0][1], "raw", device), setup.text_cache(run, device))
    rows: list[dict] = []

    started = time.monotonic()
    reference = block_features(renderer.teacher(prompts, FAR_SEED, shape, args.teacher_steps, guidance))
    pooled = torch.cat(reference[1:])
    print(f"reference: {args.samples} samples in {time.monotonic() - started:.0f} s", flush=True)

    def add(name: str, latents: torch.Tensor, seconds: float, trained: dict | None = None) -> None:
        videos = renderer.decode(latents)
        found = block_features(latents)
        # One block's set is compared with as many of the pooled ones; the distance depends on the count.
        chosen = torch.randperm(len(pooled), generator=torch.Generator().manual_seed(0))[: args.samples]
        row = {
            "name": name,
            "latent_frames": latents.shape[2],
            "seconds": round(seconds, 1),
            "right": score(videos, prompts),
            "right_by_block": block_accuracy(videos, prompts),
            "frechet": round(frechet_distance(torch.cat(found[1:7]), pooled), 3),
            "frechet_by_block": [
                round(frechet_distance(f, reference[0] if i == 0 else pooled[chosen]), 3) for i, f in enumerate(found)
            ],
            "x0_std_by_block": [round(float(block.std()), 4) for block in latents.split(BLOCK, dim=2)],
        } | (trained or {})
        rows.append(row)
        print(json.dumps(row), flush=True)

    started = time.monotonic()
    add(
        f"teacher, {args.teacher_steps} steps, guidance {guidance:g}",
        renderer.teacher(prompts, 0, shape, args.teacher_steps, guidance),
        time.monotonic() - started,
    )
    for name, ckpt in named:
        run = setup.load_run(ckpt)
        weights = "ema" if (ckpt / "ema.safetensors").exists() else "raw"
        roles = setup.load_student(run, ckpt, weights, device)
        config = run.config
        facts = {"warmup": config.warmup.kind, "steps": config.train.max_steps, "seed": config.train.seed}
        channels, trained_frames, height, width = run.latent_shape
        lengths: list[tuple[int, int | None]] = [(trained_frames, config.rollout.local_attention_frames)]
        if config.rollout.causal:
            lengths += [(factor * trained_frames, trained_frames) for factor in (2, 4)]
            if ckpt == named[0][1]:
                lengths += [(factor * trained_frames, factor * trained_frames) for factor in (2, 4)]
        for frames, window in lengths:
            rollout = config.rollout.model_copy(update={"local_attention_frames": window})
            changed = config.model_copy(update={"rollout": rollout})
            run = replace(run, config=changed)
            renderer = Renderer(run, roles, setup.text_cache(run, device))
            started = time.monotonic()
            latents = renderer.student(prompts, 0, (channels, frames, height, width), run.timesteps)
            label = name if window is None else f"{name}, {'all context' if window == frames else f'window {window}'}"
            add(label, latents, time.monotonic() - started, facts | {"window": window})

    record = {
        "samples": args.samples,
        "prompts": len(held_out),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
