"""The self-forcing rollout over temporal blocks, its replay, and the sampler: one function for training and sampling.

Huang et al., "Self Forcing", arXiv 2506.08009, algorithm 1; multi-step simulation after DMD2, arXiv 2405.14867, sec. 4.5.
The block layout, the exit steps and every noise are data. A bidirectional student is a single block of all frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch

from dmdtrain.flow import add_noise, sigma_from_timestep, x0_from_flow


class Denoiser(Protocol):
    """A flow model with its prompt, seen from the rollout."""

    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, *, frames: slice, write_cache: bool = False
    ) -> torch.Tensor:
        """Flow of one temporal block.

        Args:
            latents: [B, C, t, H, W], the block's noisy latents. timestep: [B] in [0, 1000].
            frames: where in the video the block lies; what comes before it is its context.
            write_cache: this pass is for the block's keys and values, which later blocks read; its flow is not used.

        Returns:
            flow: [B, C, t, H, W].
        """
        ...


@dataclass(frozen=True)
class BlockLayout:
    """Latent frames of each temporal block, in order."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"block sizes {self.sizes}: every block needs at least one latent frame")

    @classmethod
    def single(cls, num_frames: int) -> BlockLayout:
        """One block of all frames: the bidirectional student."""
        return cls((num_frames,))

    @classmethod
    def blocks(cls, num_frames: int, num_frame_per_block: int, independent_first_frame: bool = False) -> BlockLayout:
        """Equal blocks, after a first one of a single frame where `independent_first_frame`; ValueError if they do not fit."""
        first = (1,) if independent_first_frame else ()
        count, rest = divmod(num_frames - len(first), num_frame_per_block)
        if rest:
            raise ValueError(f"{num_frames} latent frames do not divide into blocks of {num_frame_per_block}")
        return cls((*first, *[num_frame_per_block] * count))

    @property
    def num_frames(self) -> int:
        return sum(self.sizes)

    @property
    def slices(self) -> list[slice]:
        ends = list(accumulate(self.sizes))
        return [slice(end - size, end) for size, end in zip(self.sizes, ends, strict=True)]


@dataclass(frozen=True)
class ExitRecord:
    """What a block's exit step saw: enough to run it again with a graph."""

    frames: slice
    noisy: torch.Tensor  # [B, C, t, H, W]
    timestep: float
    x0: torch.Tensor | None = None  # what it gave, with its graph, where that was kept


@dataclass(frozen=True)
class RolloutResult:
    x0: torch.Tensor  # [B, C, T, H, W], detached
    records: list[ExitRecord]


def draw_exit_steps(
    num_blocks: int, num_steps: int, generator: torch.Generator, *, same_step: bool = False, last_only: bool = False
) -> list[int]:
    """Index into the denoising steps at which each block leaves; uniform unless `last_only`."""
    if last_only:
        return [num_steps - 1] * num_blocks
    if same_step:
        return [int(torch.randint(num_steps, (1,), generator=generator))] * num_blocks
    return torch.randint(num_steps, (num_blocks,), generator=generator).tolist()


def draw_noise(num_steps: int, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """[S, *shape] float32: noise 0 starts the rollout, noise i is what step i is re-noised with.

    One draw per step, in the order in which a Diffusers pipeline draws them from a seeded global generator.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator) for _ in range(num_steps)])


@torch.no_grad()
def roll_out_blocks(
    denoise: Denoiser,
    noise: Callable[[slice], torch.Tensor],
    timesteps: Sequence[float],
    layout: BlockLayout,
    exit_steps: Sequence[int],
    *,
    context_timestep: float = 0.0,
    keep_last_graph: bool = False,
    on_step: Callable[[], None] | None = None,
) -> Iterator[tuple[torch.Tensor, ExitRecord]]:
    """Denoises block by block, without a graph; yields each block's x0 [B, C, t, H, W] as it is finished, detached.

    Each block starts from noise 0 and walks down `timesteps`; after every step but its exit step it is noised again, with
    fresh noise, to the next timestep. A finished block that others follow gets one more pass that writes its keys and
    values: clean at timestep 0, or noised to `context_timestep`.

    Args:
        noise: a block's frames -> [S, B, C, t, H, W] as `draw_noise` makes it, S = len(timesteps); with one more where
            `context_timestep` is above 0, for the cache.
        timesteps: descending, in (0, 1000]. exit_steps: per block, an index into `timesteps`.
        keep_last_graph: the last block's exit step runs with a graph, which its record holds, so that its replay need not
            run it again.
        on_step: called after every denoising step, for a progress display.
    """
    slices = layout.slices
    for index, (frames, exit_step) in enumerate(zip(slices, exit_steps, strict=True)):
        drawn = noise(frames)
        assert len(drawn) == len(timesteps) + (context_timestep > 0), "one noise a step, and one for a noisy context"
        latents = drawn[0]
        x0 = latents
        for step in range(exit_step + 1):
            timestep = timesteps[step]
            keep = keep_last_graph and step == exit_step and index + 1 == len(slices)
            with torch.set_grad_enabled(keep):
                x0 = predict_x0(denoise, latents, timestep, frames)
            if step == exit_step:
                record = ExitRecord(frames, latents, timestep, x0 if keep else None)
                x0 = x0.detach()
            else:
                latents = _noised(x0, drawn[step + 1], timesteps[step + 1])
            if on_step is not None:
                on_step()
        yield x0, record
        if index + 1 < len(slices):
            seen = _noised(x0, drawn[len(timesteps)], context_timestep) if context_timestep > 0 else x0
            denoise(seen, x0.new_full((len(x0),), context_timestep), frames=frames, write_cache=True)


def rollout(
    denoise: Denoiser,
    noise: torch.Tensor,
    timesteps: Sequence[float],
    layout: BlockLayout,
    exit_steps: Sequence[int],
    **options: Any,
) -> RolloutResult:
    """`roll_out_blocks` of a whole video. noise: [S, B, C, T, H, W] of all blocks; the other arguments are the same."""
    needed = len(timesteps) + (options.get("context_timestep", 0) > 0)
    if noise.shape[0] != needed or noise.shape[3] != layout.num_frames:
        raise ValueError(
            f"noise {tuple(noise.shape)} does not fit {needed} draws and {layout.num_frames} latent frames"
        )
    blocks = roll_out_blocks(denoise, lambda frames: noise[:, :, :, frames], timesteps, layout, exit_steps, **options)
    x0s, records = zip(*blocks, strict=True)
    return RolloutResult(torch.cat(x0s, dim=2), list(records))


def _noised(x0: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
    return add_noise(x0, noise, x0.new_full((len(x0),), sigma_from_timestep(timestep)))


def predict_x0(denoise: Denoiser, latents: torch.Tensor, timestep: float, frames: slice) -> torch.Tensor:
    """x0 of one block at one step, in float32 or wider; with a graph where gradients are on."""
    t = latents.new_full((len(latents),), timestep)
    return x0_from_flow(latents, denoise(latents, t, frames=frames), sigma_from_timestep(t))


def replay_backward(denoise: Denoiser, records: Sequence[ExitRecord], grad_x0: torch.Tensor) -> None:
    """Accumulates the generator's gradient: each block's exit step once more, with a graph, and its slice of d loss / d x0.

    What a block saw of its context is constant, so the gradient is a sum over blocks and equals the one of a single graph
    over the whole video; activations of one block are held at a time.

    Args:
        records: of the video's blocks. The last one comes first, since it may hold a graph, which is freed by that.
        grad_x0: [B, C, t, H, W], d loss / d x0 of the video's last t frames. Blocks before them get no gradient.

    Raises:
        ValueError: the last t frames are no whole blocks.
    """
    first = records[-1].frames.stop - grad_x0.shape[2]
    if first not in [record.frames.start for record in records]:
        raise ValueError(f"the gradient of the last {grad_x0.shape[2]} frames begins inside a block")
    for record in reversed(records):
        if record.frames.start >= first:
            x0 = record.x0
            if x0 is None:
                x0 = predict_x0(denoise, record.noisy, record.timestep, record.frames)
            grad = grad_x0[:, :, record.frames.start - first : record.frames.stop - first]
            torch.autograd.backward(x0, grad.to(x0.dtype))


def sample(
    denoise: Denoiser,
    noise: Callable[[slice], torch.Tensor],
    timesteps: Sequence[float],
    layout: BlockLayout,
    **options: Any,
) -> Iterator[torch.Tensor]:
    """Few-step sampling: the rollout in which every block goes through all steps. Yields x0 [B, C, t, H, W] block by block.

    Arguments and options are `roll_out_blocks`'.
    """
    exit_steps = [len(timesteps) - 1] * len(layout.sizes)
    for x0, _ in roll_out_blocks(denoise, noise, timesteps, layout, exit_steps, **options):
        yield x0
