"""Throughput of prompts and clips as data: reading, looking at them, starting again, decoding, the cache, drawing. Prints JSON.

python benchmarks/data.py --out benchmarks/data.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console

from dmdtrain.config import build
from dmdtrain.data.buckets import BucketSampler, streams_of
from dmdtrain.data.decode import read_clip
from dmdtrain.data.latents import LatentCache
from dmdtrain.train import setup
from dmdtrain.train.clips import scan
from dmdtrain.train.prepare_videos import prepare_videos, verify_videos

SIZE = (480, 832)
LATENTS = (16, 21, 60, 104)  # [C, T, H, W] of 81 frames of 832 x 480


@contextmanager
def timed(results: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    results[name] = time.perf_counter() - started


def clip_bytes(frames: int, size: tuple[int, int]) -> bytes:
    """An H.264 clip of a moving gradient, 16 frames a second. size: (height, width)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        rows, columns = np.mgrid[: size[0], : size[1]]
        for number in range(frames):
            image = np.stack([rows + 3 * number, columns + 5 * number, rows + columns], -1) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def many_prompts(folder: Path, count: int) -> dict[str, float]:
    """A file of prompts: reading it, encoding by the miniature's encoder, a second start, and rows as a step takes them."""
    file, results = folder / "prompts.jsonl", {}
    lines = (json.dumps({"prompt": f"a fox of kind {number} runs over the snow at dawn"}) for number in range(count))
    file.write_text("\n".join(lines), encoding="utf-8")
    # Short ones, because the encoder is not what is measured.
    values = {"data": {"prompts": str(file), "max_sequence_length": 32}, "output_dir": str(folder / "run")}
    resident = resident_mib()
    with timed(results, "resolve_seconds"):
        run = setup.resolve(build(values))
    results["resident_mib"] = resident_mib() - resident
    console, text = Console(quiet=True), setup.text_cache(run, torch.device("cpu"))
    with timed(results, "encoding_seconds"):
        setup.encode_text(text, run.prompts, console)
    results["prompts_encoded_per_second"] = count / results["encoding_seconds"]
    text = setup.text_cache(run, torch.device("cpu"))
    with timed(results, "second_start_seconds"):
        setup.encode_text(text, run.prompts, console)
    drawn = random.Random(0).choices(run.prompts, k=1000)
    with timed(results, "seconds"):
        for prompt in drawn:
            text.get([prompt])
    results["rows_read_per_second"] = len(drawn) / results.pop("seconds")
    return {"prompts": count} | results


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def many_clips(folder: Path, count: int) -> dict[str, float]:
    """A data set of many small clips: the first look, encoding by the miniature's codec, and a second start."""
    content = clip_bytes(9, (32, 48))
    (folder / "clips").mkdir()
    for number in range(count):
        free = number.to_bytes(8, "big")  # an atom that says nothing makes each file another
        (folder / "clips" / f"{number:06d}.mp4").write_bytes(content + (16).to_bytes(4, "big") + b"free" + free)
        (folder / "clips" / f"{number:06d}.txt").write_text(f"clip number {number}")
    values = {
        "rollout": {"num_training_frames": 3},
        "dmd": {"real_data_loss_weight": 1.0},
        "data": {"videos": str(folder / "clips"), "resolution": "48x32"},
        "validation": {"num_frames": 9, "resolution": "32x32"},
        "output_dir": str(folder / "run"),
    }
    run, console, results = setup.resolve(build(values)), Console(quiet=True), {}
    with timed(results, "first_scan_seconds"):
        scan(run, console)
    with timed(results, "second_scan_seconds"):
        scanned = scan(run, console)
    with timed(results, "encoding_seconds"):
        prepare_videos(run, console, scanned)
    with timed(results, "second_start_seconds"):
        prepare_videos(run, console)
    with timed(results, "verify_seconds"):
        verify_videos(run, console)
    return results | {"clips": count, "scanned_clips_per_second": count / results["first_scan_seconds"]}


def decoding(folder: Path, frames: int) -> dict[str, float]:
    """Clips decoded, resized and cropped to 832 x 480."""
    results: dict[str, float] = {}
    for name, size in (("480p", (480, 832)), ("1080p", (1080, 1920))):
        file = folder / f"{name}.mp4"
        file.write_bytes(clip_bytes(frames, size))
        with timed(results, f"{name}_seconds_per_clip"):
            read_clip(file, frames, *SIZE)
        results[f"{name}_frames_per_second"] = frames / results[f"{name}_seconds_per_clip"]
    return results


def loading(folder: Path, count: int = 32) -> dict[str, float]:
    """Latents of 81 frames of 832 x 480: written with sync, read with their checksum."""
    cache, results = LatentCache(folder / "latents"), {}
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0))
    names = [f"{number:064x}" for number in range(count)]
    with timed(results, "write_seconds"):
        for name in names:
            cache.write(name, latents)
    with timed(results, "read_seconds"):
        for name in names:
            cache.read([name])
    mib = cache.file(names[0]).stat().st_size / 2**20
    return {
        "mib_per_clip": mib,
        "written_clips_per_second": count / results["write_seconds"],
        "read_clips_per_second": count / results["read_seconds"],
        "read_mib_per_second": mib * count / results["read_seconds"],
    }


def drawing(count: int = 100_000, buckets: int = 20, n: int = 4) -> dict[str, float]:
    """Draws of n from many items in two data sets, and the state that a checkpoint holds."""
    items, results = list(range(count)), {}
    with timed(results, "build_seconds"):
        streams = streams_of(items, [i % buckets for i in items], [i % 2 for i in items], [None, None], [1, 3])
        sampler = BucketSampler(streams, 0)
    with timed(results, "seconds"):
        for _ in range(1000):
            sampler.draw(n)
    with timed(results, "state_seconds"):
        state = sampler.state_dict()
    size = sum(value.numel() * value.element_size() for value in state.values())
    draws = 1000 / results["seconds"]
    return {
        "items": count,
        "draws_per_second": draws,
        "build_seconds": results["build_seconds"],
        "state_seconds": results["state_seconds"],
        "state_mib": size / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--frames", type=int, default=81, help="of a clip that is decoded")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        record = {
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "prompts": many_prompts(folder / "texts", options.prompts),
            "clips": many_clips(folder, options.clips),
            "decoding_to_832x480": decoding(folder, options.frames),
            "latents_of_81_frames_832x480": loading(folder),
            "sampler": drawing(),
        }
    text = json.dumps(record, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
