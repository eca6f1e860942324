"""Rendering: the student through the sampler that trained it, the teacher through its folder's own scheduler."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dmdtrain.dmd import guide
from dmdtrain.miniature import clips, scorer
from dmdtrain.models.encode import TextCache, decode_latents
from dmdtrain.models.roles import Roles
from dmdtrain.models.wan import load_scheduler, load_vae
from dmdtrain.rollout import Denoiser, draw_noise, sample
from dmdtrain.train.setup import Run, block_layout
from dmdtrain.train.step import new_cache, student_denoiser

Autocast = Callable[[], AbstractContextManager]
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

    def student(
        self,
        prompts: list[str],
        seed: int,
        shape: tuple[int, int, int, int],
        timesteps: list[float],
        guidance: float = 1.0,
        negative: str = "",
        on_step: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Normalised latents [N, *shape] of the few-step student."""
        parts = []
        for rows in self._batches(len(prompts), shape):
            noise = torch.cat(
                [draw_noise(len(timesteps), (1, *shape), torch.Generator().manual_seed(seed + i)) for i in rows], 1
            ).to(self.text.device)
            layout = block_layout(self.run.config, shape[1])
            contexts = self._contexts([prompts[i] for i in rows], negative)
            cond, uncond = (self._student(context) for context in contexts)
            denoise = cond if guidance in (0, 1) else _guided(cond, uncond, guidance)
            settings = self.run.config.rollout
            # The noise of the cached context is the block's own starting noise: fixed by the seed like everything else.
            parts.append(
                sample(
                    denoise,
                    noise,
                    timesteps,
                    layout,
                    context_timestep=settings.context_noise,
                    context_noise=noise[0],
                    on_step=on_step,
                )
            )
        return torch.cat(parts)

    def _student(self, context: torch.Tensor) -> Denoiser:
        return student_denoiser(self.roles, context, new_cache(self.run.config.rollout, evict=True), self.autocast)

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
            latents = torch.cat(
                [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed + i)) for i in rows]
            ).to(self.text.device)
            cond, uncond = self._contexts([prompts[i] for i in rows], negative)
            scheduler = load_scheduler(self.run.teacher, self.run.config.model.flow_shift)
            grid = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
            scheduler.set_timesteps(device=self.text.device, **grid)
            for timestep in scheduler.timesteps:
                t = timestep.expand(len(latents)).float()
                with self.autocast():
                    flow = self.roles.flow("teacher", latents, t, cond).float()
                    if guidance not in (0, 1):
                        flow = guide(flow, self.roles.flow("teacher", latents, t, uncond).float(), guidance)
                latents = scheduler.step(flow, timestep, latents, return_dict=False)[0]
                if on_step is not None:
                    on_step()
            parts.append(latents)
        return torch.cat(parts)

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
