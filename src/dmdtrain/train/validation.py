"""Rendering: the student through the sampler that trained it, the teacher through its folder's own scheduler."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dmdtrain.dmd import guide
from dmdtrain.flow import sigma_from_timestep
from dmdtrain.miniature import clips, scorer
from dmdtrain.models.encode import TextCache, decode_latents
from dmdtrain.models.roles import Roles
from dmdtrain.models.wan import load_scheduler, load_vae
from dmdtrain.rollout import Denoiser, draw_noise, sample
from dmdtrain.train.setup import Run
from dmdtrain.train.step import block_layout, context_timestep, new_cache, num_draws, student_denoiser

Autocast = Callable[[], AbstractContextManager]
Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BATCH_TOKENS = 8192  # tokens of one sampling batch: many tiny videos, or one large


class Renderer:
    """Samples videos of prompts. Prompt number i starts from noise seeded with `seed + i`, whatever the batch."""

    def __init__(self, run: Run, roles: Roles, text: TextCache, autocast: Autocast = nullcontext):
        self.run, self.roles, self.text, self.autocast = run, roles, text, autocast

    def _batches(self, count: int, shape: tuple[int, ...]) -> list[range]:
        _, frames, height, width = shape
        patch = self.run.base.patch_size
        tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
        size = max(1, BATCH_TOKENS // tokens)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _contexts(self, prompts: list[str], negative: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the prompts and of the negative prompt, each [N, L, D]."""
        self.text.prepare([*prompts, negative])
        return self.text.get(prompts), self.text.get([negative]).expand(len(prompts), -1, -1)

    def student_blocks(
        self,
        prompts: list[str],
        seeds: list[int],
        shape: tuple[int, int, int, int],
        timesteps: list[float],
        guidance: float = 1.0,
        negative: str = "",
        on_step: Callable[[], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Normalised latents [N, C, t, H, W] of the few-step student, block by block as they are finished.

        Every prompt has a generator of its own seed, from which each block draws in turn: a longer video starts as the
        shorter one does. What is held does not grow with the video where a window limits what blocks attend to.
        """
        channels, num_frames, *size = shape
        settings = self.run.config.rollout
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(frames: slice) -> torch.Tensor:
            block = (1, channels, frames.stop - frames.start, *size)
            drawn = [draw_noise(num_draws(settings, timesteps), block, generator) for generator in generators]
            return torch.cat(drawn, 1).to(self.text.device)

        cond, uncond = (self._student(context) for context in self._contexts(prompts, negative))
        yield from sample(
            cond if guidance in (0, 1) else _guided(cond, uncond, guidance),
            noise,
            timesteps,
            block_layout(settings, num_frames),
            context_timestep=context_timestep(settings),
            on_step=on_step,
        )

    def student(
        self, prompts: list[str], seed: int, shape: tuple[int, int, int, int], timesteps: list[float], *options: Any
    ) -> torch.Tensor:
        """Normalised latents [N, *shape] of the few-step student; options as in `student_blocks`."""
        parts = []
        for rows in self._batches(len(prompts), shape):
            chunk, seeds = [prompts[i] for i in rows], [seed + i for i in rows]
            parts.append(torch.cat(list(self.student_blocks(chunk, seeds, shape, timesteps, *options)), 2))
        return torch.cat(parts)

    def _student(self, context: torch.Tensor) -> Denoiser:
        return student_denoiser(self.roles, context, new_cache(self.run.config.rollout, evict=True), self.autocast)

    def _teacher_flow(self, prompts: list[str], guidance: float, negative: str) -> Flow:
        cond, uncond = self._contexts(prompts, negative)

        def flow(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                found = self.roles.flow("teacher", latents, timestep, cond).float()
                if guidance not in (0, 1):
                    found = guide(found, self.roles.flow("teacher", latents, timestep, uncond).float(), guidance)
            return found

        return flow

    def _teacher_noise(self, seeds: list[int], shape: tuple[int, int, int, int]) -> torch.Tensor:
        noise = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(noise).to(self.text.device)

    @torch.no_grad()
    def teacher(
        self,
        prompts: list[str],
        seed: int,
        shape: tuple[int, int, int, int],
        steps: int,
        guidance: float,
        negative: str = "",
        on_step: Callable[[], None] | None = None,
        sigmas: list[float] | None = None,
    ) -> torch.Tensor:
        """Normalised latents [N, *shape] of the teacher in `steps` steps of its folder's own scheduler.

        sigmas: a grid instead of the scheduler's own for `steps`, before its shift.
        """
        parts = []
        for rows in self._batches(len(prompts), shape):
            latents = self._teacher_noise([seed + i for i in rows], shape)
            flow = self._teacher_flow([prompts[i] for i in rows], guidance, negative)
            scheduler = load_scheduler(self.run.teacher, self.run.config.model.flow_shift)
            grid = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
            scheduler.set_timesteps(device=self.text.device, **grid)
            for timestep in scheduler.timesteps:
                t = timestep.expand(len(latents)).float()
                latents = scheduler.step(flow(latents, t), timestep, latents, return_dict=False)[0]
                if on_step is not None:
                    on_step()
            parts.append(latents)
        return torch.cat(parts)

    def teacher_sigmas(self, steps: int, through: list[float]) -> list[float]:
        """The teacher's own grid of `steps`, descending from 1 to 0, that also stops at the timesteps `through`."""
        scheduler = load_scheduler(self.run.teacher, self.run.config.model.flow_shift)
        scheduler.set_timesteps(steps)
        stops = {1.0, 0.0, *(sigma_from_timestep(t) for t in through)}
        # A step that a stop makes needless is dropped: grids of some schedulers start at 0.9997.
        own = (float(sigma) for sigma in scheduler.sigmas)
        return sorted(stops | {s for s in own if min(abs(s - stop) for stop in stops) > 1e-3}, reverse=True)

    @torch.no_grad()
    def teacher_states(
        self,
        prompts: list[str],
        seeds: list[int],
        shape: tuple[int, int, int, int],
        sigmas: list[float],
        guidance: float,
        negative: str = "",
        on_step: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """States of the teacher's probability-flow ODE at every sigma, by Euler's method: [len(sigmas), N, *shape]."""
        states = [self._teacher_noise(seeds, shape)]
        flow = self._teacher_flow(prompts, guidance, negative)
        for sigma, following in pairwise(sigmas):
            t = states[-1].new_full((len(prompts),), 1000 * sigma)
            states.append(states[-1] + (following - sigma) * flow(states[-1], t))
            if on_step is not None:
                on_step()
        return torch.stack(states)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Videos [N, 3, T, H, W] in [-1, 1] on the CPU. The codec is loaded for the call and freed after it."""
        vae = load_vae(self.run.base).to(latents.device)
        rows = self._batches(len(latents), tuple(latents.shape[1:]))
        videos = [decode_latents(vae, latents[r.start : r.stop]).cpu() for r in rows]
        del vae
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return torch.cat(videos)


def _guided(cond: Denoiser, uncond: Denoiser, scale: float) -> Denoiser:
    """Both denoisers in standard-form guidance, each with its own cache."""

    def denoise(
        latents: torch.Tensor, timestep: torch.Tensor, *, frames: slice, write_cache: bool = False
    ) -> torch.Tensor:
        flows = [side(latents, timestep, frames=frames, write_cache=write_cache).float() for side in (cond, uncond)]
        return guide(flows[0], flows[1], scale)

    return denoise


def score(videos: torch.Tensor, prompts: list[str]) -> dict[str, float] | None:
    """Accuracy per attribute where the prompts are the miniature's captions and the videos its size; else None."""
    captions = [clips.Caption.parse(prompt) for prompt in prompts]
    known = [caption for caption in captions if caption is not None]
    if len(known) < len(captions) or videos.shape[-1] != clips.SIZE or videos.shape[2] < 2:
        return None
    return scorer.accuracy(videos, known)


def to_frames(video: torch.Tensor, min_edge: int = 128) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]; small videos enlarged by a whole factor, to be seen at all."""
    frames = ((video.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    factor = -(-min_edge // min(frames.shape[1:3]))
    return frames.repeat(factor, 1).repeat(factor, 2)


def write_mp4(file: Path, video: torch.Tensor, fps: int) -> None:
    """H.264, written beside its name and renamed. video: [3, T, H, W] in [-1, 1]."""
    frames = to_frames(video)
    partial = file.with_name(f".{file.name}.partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    partial.rename(file)


def gif_bytes(video: torch.Tensor, fps: int) -> bytes:
    """An animated GIF, which is what TensorBoard shows. video: [3, T, H, W] in [-1, 1]."""
    images = [Image.fromarray(frame) for frame in to_frames(video)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def contact_sheet(columns: dict[str, torch.Tensor], prompts: list[str], num_shown: int = 5) -> Image.Image:
    """One row a prompt, one column a model, each with frames evenly spread over the video.

    Args:
        columns: heading -> videos [N, 3, T, H, W] in [-1, 1].
    """
    rows = {name: [to_frames(video, 64) for video in videos] for name, videos in columns.items()}
    total, height, width = next(iter(rows.values()))[0].shape[:3]
    scale = max(1, -(-max(height, width) // 192))
    height, width = height // scale, width // scale
    shown = np.linspace(0, total - 1, min(num_shown, total)).round().astype(int)
    font = ImageFont.load_default()
    gap, line, between = 8, 16, 2
    strip = (width + between) * len(shown) - between
    sheet = Image.new("RGB", (gap + (strip + gap) * len(rows), line + (height + line + gap) * len(prompts)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (name, videos) in enumerate(rows.items()):
        left = gap + c * (strip + gap)
        draw.text((left, 2), name, "black", font)
        for r, frames in enumerate(videos):
            top = line + r * (height + line + gap)
            if c == 0:
                draw.text((left, top), prompts[r], "black", font)
            for i, index in enumerate(shown):
                image = Image.fromarray(frames[index]).resize((width, height))
                sheet.paste(image, (left + i * (width + between), top + line))
    return sheet


def write_samples(
    folder: Path,
    columns: dict[str, torch.Tensor],
    prompts: list[str],
    facts: dict[str, Any],
    fps: int,
    max_shown: int = 16,
) -> dict[str, Any]:
    """mp4s, `contact_sheet.png` and `results.json` (facts, prompts, scores where the scorer fits) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, videos in columns.items():
        for i, video in enumerate(videos):
            write_mp4(folder / f"{i:03d}_{name.replace(' ', '_')}.mp4", video, fps)
    shown = {name: videos[:max_shown] for name, videos in columns.items()}
    contact_sheet(shown, prompts[:max_shown]).save(folder / "contact_sheet.png")
    scores = {name: score(videos, prompts) for name, videos in columns.items()}
    results = facts | {"prompts": prompts, "scores": {k: v for k, v in scores.items() if v is not None}}
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return results
