"""Scores students of wan-tiny beside their teacher: prompt accuracy and Frechet distance, on captions not trained on.

    python benchmarks/wan_tiny.py --ckpt output/wan-tiny/checkpoints/step-000400 [--ckpt ...] --out benchmarks/wan_tiny.json

Rows: the teacher at many steps; the teacher at 3 steps with and without guidance, on the pipeline's grid and on an even one;
the undistilled base under the student's own sampler; and every student, by its average and by its trained weights. The Frechet
distance is to fresh samples of the teacher at many steps; the teacher's own distance between two such sets is the floor.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from dmdtrain.data.prompts import load_prompts
from dmdtrain.miniature.frechet import features, frechet_distance
from dmdtrain.train import setup
from dmdtrain.train.render import Renderer
from dmdtrain.train.validation import score

FAR_SEED = 1_000_000  # the reference set's seeds, apart from all others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, action="append", required=True)
    parser.add_argument("--samples", type=int, default=288)
    parser.add_argument("--teacher-steps", type=int, default=40)
    parser.add_argument("--frames", type=int, default=None, help="latent frames; default: as trained")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/wan_tiny.json"))
    args = parser.parse_args()
    torch.set_flush_denormal(True)

    run = setup.load_run(args.ckpt[0])
    device = setup.device_of_this_machine()
    held_out = load_prompts("wan-tiny", "prompts", held_out=True)
    prompts = [held_out[i % len(held_out)] for i in range(args.samples)]
    channels, trained_frames, height, width = run.latent_shape
    shape = (channels, args.frames or trained_frames, height, width)
    guidance = run.config.dmd.real_score_guidance_scale
    rows: list[dict] = []
    renderer = Renderer(run, setup.load_student(run, args.ckpt[0], "raw", device), setup.text_cache(run, device))

    started = time.monotonic()
    reference = features(renderer.teacher(prompts, FAR_SEED, shape, args.teacher_steps, guidance))
    print(f"reference: {args.samples} samples in {time.monotonic() - started:.0f} s", flush=True)

    def add(name: str, latents: torch.Tensor, seconds: float, passes: int) -> None:
        right = score(renderer.decode(latents), prompts)
        row = {
            "name": name,
            "passes": passes,
            "seconds": round(seconds, 1),
            "frechet": round(frechet_distance(features(latents), reference), 3),
            "right": {k: round(v, 4) for k, v in (right or {}).items()},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)

    thirds = [1.0, 2 / 3, 1 / 3]  # before the scheduler's shift; its own grid for 3 steps ends near sigma 0
    for steps, scale, sigmas in (
        (args.teacher_steps, guidance, None),
        (3, guidance, None),
        (3, 1.0, None),
        (3, guidance, thirds),
        (3, 1.0, thirds),
    ):
        started = time.monotonic()
        latents = renderer.teacher(prompts, 0, shape, steps, scale, sigmas=sigmas)
        name = f"teacher, {steps} steps{', even grid' if sigmas else ''}, guidance {scale:g}"
        add(name, latents, time.monotonic() - started, steps * (2 if scale != 1 else 1))
    # What distillation starts from: the base under the student's sampler, adapters off.
    renderer.roles.roles["student"] = renderer.roles.roles["teacher"]
    started = time.monotonic()
    latents = renderer.student(prompts, 0, shape, run.timesteps)
    add(f"undistilled base, {len(run.timesteps)} steps, student's sampler", latents, time.monotonic() - started, 3)
    for ckpt in args.ckpt:
        run = setup.load_run(ckpt)
        for weights in ("ema", "raw") if (ckpt / "ema.safetensors").exists() else ("raw",):
            renderer = Renderer(run, setup.load_student(run, ckpt, weights, device), setup.text_cache(run, device))
            started = time.monotonic()
            latents = renderer.student(prompts, 0, shape, run.timesteps)
            name = f"student, {len(run.timesteps)} steps ({weights}, seed {run.config.train.seed})"
            add(name, latents, time.monotonic() - started, len(run.timesteps))

    record = {
        "samples": args.samples,
        "prompts": len(held_out),
        "latent_shape": list(shape),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
