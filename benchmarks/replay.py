"""Replay backward against one graph over the whole video: memory and time, over the number of blocks.

    python benchmarks/replay.py --out benchmarks/replay.json

Both give the same gradient (tests/test_self_forcing.py, float64). Measured on wan-tiny's own transformer as a causal LoRA
student, side by side in one run: each repetition times one after the other, the ratio is the median's. Peaks are of live
storages, temporaries and recompute included, less the weights and the cache that both ways fill alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from dmdtrain.flow import add_noise, sigma_from_timestep
from dmdtrain.models.causal import KVCache
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.models.wan import find_folder, load_transformer
from dmdtrain.rollout import BlockLayout, Denoiser, draw_noise, predict_x0, replay_backward, rollout
from dmdtrain.train.accounting import LiveBytes
from dmdtrain.train.step import student_denoiser

STEPS = [1000.0, 757.0, 522.0]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def one_graph(
    student: Denoiser, noise: torch.Tensor, layout: BlockLayout, exits: list[int], grad: torch.Tensor
) -> None:
    """The same gradient with every block's exit step kept in one graph until a single backward."""
    blocks = []
    for frames, exit_step in zip(layout.slices, exits, strict=True):
        latents = noise[0, :, :, frames]
        with torch.no_grad():
            for step in range(exit_step):
                x0 = predict_x0(student, latents, STEPS[step], frames)
                sigma = x0.new_full((len(x0),), sigma_from_timestep(STEPS[step + 1]))
                latents = add_noise(x0, noise[step + 1, :, :, frames], sigma)
        x0 = predict_x0(student, latents, STEPS[exit_step], frames)
        blocks.append(x0)
        with torch.no_grad():
            student(x0.detach(), x0.new_zeros(len(x0)), frames=frames, write_cache=True)
    torch.cat(blocks, 2).backward(grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 7, 14, 28])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/replay.json"))
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = find_folder("wan-tiny", "model.base")
    rows = []
    for checkpointing in (True, False):
        for local in (None, 9):
            torch.manual_seed(0)
            spec = AdapterSpec(32, 32, TARGETS)
            roles = Roles(
                load_transformer(base, "fp32").to(device),
                trained={"student": spec},
                causal=True,
                gradient_checkpointing=checkpointing,
                init_lora_weights=False,
            )
            parameters = list(roles.roles["student"].module.parameters())
            for blocks in args.blocks:
                rows.append(measure(roles, parameters, blocks, local, checkpointing, args, device))
                print(json.dumps(rows[-1]), flush=True)
    record = {
        "batch": args.batch,
        "repeats": args.repeats,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}")


def cache_bytes(cache: KVCache) -> int:
    stored = [kept.get() for layer in cache._layers.values() for pair in layer.values() for kept in pair]
    return sum(t.untyped_storage().nbytes() for t in (*stored, *(t for pair in cache.cross.values() for t in pair)))


def measure(roles, parameters, blocks, local, checkpointing, args, device) -> dict:
    layout, trained = BlockLayout((3,) * blocks), roles.parameters("student")
    generator = torch.Generator().manual_seed(blocks)
    noise = draw_noise(3, (args.batch, 16, layout.num_frames, 4, 4), generator).to(device)
    context = torch.randn(args.batch, 16, 64, generator=generator).to(device)
    grad = torch.randn(noise.shape[1:], generator=generator).to(device)
    exits = [i % 3 for i in range(blocks)]

    cache = KVCache(local)

    def student() -> Denoiser:
        cache.__init__(local)
        return student_denoiser(roles, context, cache, nullcontext)

    def replayed() -> None:
        denoise = student()
        replay_backward(denoise, rollout(denoise, noise, STEPS, layout, exits).records, grad)

    ways = {"replay": replayed, "one_graph": lambda: one_graph(student(), noise, layout, exits, grad)}
    found: dict[str, dict] = {}
    for name, way in ways.items():
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)  # so that gradients are there before and after
        cache.__init__(local)
        with LiveBytes() as live:
            for tensor in (*parameters, *(p.grad for p in trained), noise, context, grad):
                live.add(tensor)
            before = live.now
            way()
            live.peak -= before + cache_bytes(cache)
        found[name] = {"peak_mib": round(live.peak / 2**20, 2), "seconds": []}
    for _ in range(args.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name]["seconds"].append(time.perf_counter() - started)
    for value in found.values():
        value["seconds"] = round(statistics.median(value["seconds"]), 4)
    row = {
        "blocks": blocks,
        "latent_frames": layout.num_frames,
        "window": local,
        "checkpointing": checkpointing,
    } | found
    row["time_ratio"] = round(found["replay"]["seconds"] / found["one_graph"]["seconds"], 3)
    return row


if __name__ == "__main__":
    main()
