"""Sampling: the student through the sampler that trained it, the teacher through its folder's own scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch

from dmdtrain.dmd import guide
from dmdtrain.flow import sigma_from_timestep
from dmdtrain.models.decode import StreamDecoder, decode_latents
from dmdtrain.models.encode import TextCache
from dmdtrain.models.roles import Roles
from dmdtrain.models.wan import codec, load_scheduler
from dmdtrain.rollout import Denoiser, draw_noise, sample
from dmdtrain.train.setup import Run
from dmdtrain.train.step import block_layout, context_timestep, for_sampling, new_cache, num_draws, student_denoiser

Autocast = Callable[[], AbstractContextManager]
Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TILED_ABOVE = 832 * 480  # pixels of a frame
BATCH_TOKENS = 8192  # tokens of one sampling batch: many tiny videos, or one large


class Renderer:
    """Samples videos of prompts. Prompt number i starts from noise seeded with `seed + i`, whatever the batch."""

    def __init__(self, run: Run, roles: Roles, text: TextCache, autocast: Autocast = nullcontext):
        self.run, self.roles, self.text, self.autocast = run, roles, text, autocast

    def batch_size(self, shape: tuple[int, ...]) -> int:
        """Videos of latents [C, T, H, W] that are sampled together."""
        _, frames, height, width = shape
        patch = self.run.base.patch_size
        tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
        return max(1, BATCH_TOKENS // tokens)

    def batches(self, count: int, shape: tuple[int, ...]) -> list[range]:
        size = self.batch_size(shape)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def student_steps(self, count: int, shape: tuple[int, ...], timesteps: list[float]) -> int:
        """How often `on_step` is called for `count` videos."""
        blocks = len(block_layout(self.run.config.rollout, shape[1]).sizes)
        return len(self.batches(count, shape)) * blocks * len(timesteps)

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
        shorter one does. What is held does not grow with a video beyond the training length: see `for_sampling`.
        """
        channels, num_frames, *size = shape
        settings = for_sampling(self.run.config.rollout, num_frames)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(frames: slice) -> torch.Tensor:
            block = (1, channels, frames.stop - frames.start, *size)
            drawn = [draw_noise(num_draws(settings, timesteps), block, generator) for generator in generators]
            return torch.cat(drawn, 1).to(self.text.device)

        cond, uncond = (
            student_denoiser(self.roles, context, new_cache(settings, evict=True), self.autocast)
            for context in self._contexts(prompts, negative)
        )
        yield from sample(
            cond if guidance in (0, 1) else guided(cond, uncond, guidance),
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
        videos = []
        for rows in self.batches(len(prompts), shape):
            chunk, seeds = [prompts[i] for i in rows], [seed + i for i in rows]
            videos.append(torch.cat(list(self.student_blocks(chunk, seeds, shape, timesteps, *options)), 2))
        return torch.cat(videos)

    def student_videos(
        self,
        prompts: list[str],
        seed: int,
        shape: tuple[int, int, int, int],
        timesteps: list[float],
        *options: Any,
    ) -> torch.Tensor:
        """Videos [N, 3, T, H, W] in [-1, 1] on the CPU; options as in `student_blocks`. What the sampler holds is gone when they
        are decoded."""
        return self.decode(self.student(prompts, seed, shape, timesteps, *options))

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
        for rows in self.batches(len(prompts), shape):
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

    def codec(self) -> AbstractContextManager[Any]:
        """The VAE, loaded for the while and freed after it."""
        return codec(self.run.base, self.text.device)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Videos [N, 3, T, H, W] in [-1, 1] on the CPU."""
        rows = self.batches(len(latents), tuple(latents.shape[1:]))
        tiled = decode_tiled(self.run, tuple(latents.shape[1:]))
        with self.codec() as vae:
            return torch.cat([_decoded(vae, latents[r.start : r.stop], tiled) for r in rows])


def _decoded(vae: Any, latents: torch.Tensor, tiled: bool) -> torch.Tensor:
    """Videos on the CPU; on the device are, unless they are tiled, those of one latent frame at a time."""
    if tiled:
        return decode_latents(vae, latents, tiled).cpu()
    decoder = StreamDecoder(vae)
    return torch.cat([decoder(frame).cpu() for frame in latents.split(1, dim=2)], 2)


def decode_tiled(run: Run, shape: tuple[int, ...]) -> bool:
    """Whether videos of latents [C, T, H, W] are decoded in tiles."""
    chosen = run.config.validation.tiled_decoding
    pixels = shape[-2] * shape[-1] * run.base.spatial_factor**2
    return pixels > TILED_ABOVE if chosen is None else chosen


def teacher_sigmas(run: Run, steps: int, through: list[float]) -> list[float]:
    """The teacher's own grid of `steps`, descending from 1 to 0, that also stops at the timesteps `through`."""
    scheduler = load_scheduler(run.teacher, run.config.model.flow_shift)
    scheduler.set_timesteps(steps)
    stops = {1.0, 0.0, *(sigma_from_timestep(t) for t in through)}
    # A step that a stop makes needless is dropped: grids of some schedulers start at 0.9997.
    own = (float(sigma) for sigma in scheduler.sigmas)
    return sorted(stops | {s for s in own if min(abs(s - stop) for stop in stops) > 1e-3}, reverse=True)


def guided(cond: Denoiser, uncond: Denoiser, scale: float) -> Denoiser:
    """Both denoisers in standard-form guidance, each with its own cache."""

    def denoise(
        latents: torch.Tensor, timestep: torch.Tensor, *, frames: slice, write_cache: bool = False
    ) -> torch.Tensor:
        flows = [side(latents, timestep, frames=frames, write_cache=write_cache).float() for side in (cond, uncond)]
        return guide(flows[0], flows[1], scale)

    return denoise
