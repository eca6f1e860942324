"""One warm-up update of a causal student: what is drawn for it, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from dmdtrain.config import Config, Rollout
from dmdtrain.flow import add_noise, shift_timestep, sigma_from_timestep, x0_from_flow
from dmdtrain.models.causal import TeacherForcingView
from dmdtrain.models.offload import to_device
from dmdtrain.models.roles import Roles
from dmdtrain.train.step import Stats, block_layout, context_timestep, new_cache, student_denoiser


@dataclass(frozen=True)
class WarmupBatch:
    """Videos on which a causal student learns to read clean context, with everything random in it drawn."""

    context: torch.Tensor  # [n, L, D]
    clean: torch.Tensor  # [n, C, T, H, W]: what the student shall make
    seen: torch.Tensor  # the same, as the cache will hold it: clean, or noised to the context timestep
    noisy: torch.Tensor  # the same size, each block at its own timestep
    timestep: torch.Tensor  # [n, T], constant in a block
    flow: torch.Tensor | None  # the size of clean; None: x0 is regressed instead

    def rows(self, start: int, stop: int) -> WarmupBatch:
        return WarmupBatch(*(None if v is None else v[start:stop] for v in vars(self).values()))

    def frames(self, frames: slice) -> WarmupBatch:
        clean, seen, noisy, flow = (
            None if v is None else v[:, :, frames] for v in (self.clean, self.seen, self.noisy, self.flow)
        )
        return WarmupBatch(self.context, clean, seen, noisy, self.timestep[:, frames], flow)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> WarmupBatch:
        return WarmupBatch(*(None if v is None else to_device(v, device) for v in vars(self).values()))


def draw_warmup(
    config: Config,
    timesteps: list[float],
    flow_shift: float,
    context: torch.Tensor,
    clean: torch.Tensor,
    states: torch.Tensor | None,
    generator: torch.Generator,
) -> WarmupBatch:
    """The randomness of a warm-up update.

    teacher_forcing: flow matching at a shifted uniform timestep of each block's own (arXiv 2412.07772's diffusion forcing,
    on clean context). ode_regression: each block from the teacher's state at a random denoising step to the end of the
    trajectory (ibid., sec. 4.3, on clean context).

    Args:
        clean: [n, C, T, H, W]. states: [S, n, C, T, H, W], the teacher's at `timesteps`, for ode_regression; None:
            teacher_forcing (of a bidirectional student's single block: plain flow matching).
    """
    layout = block_layout(config.rollout, clean.shape[2])
    sizes = torch.tensor(layout.sizes)
    shape = (len(clean), len(sizes))
    flow = None
    if config.warmup.kind == "ode_regression" and states is not None:
        steps = torch.randint(len(timesteps), shape, generator=generator).repeat_interleave(sizes, 1)
        timestep = torch.tensor(timesteps)[steps]
        noisy = states.gather(0, steps[None, :, None, :, None, None].expand_as(clean[None]))[0]
    else:
        timestep = 1000 * torch.rand(shape, generator=generator).repeat_interleave(sizes, 1)
        timestep = shift_timestep(timestep, config.warmup.timestep_shift or flow_shift)
        noise = torch.randn(clean.shape, generator=generator)
        noisy, flow = add_noise(clean, noise, sigma_from_timestep(timestep)), noise - clean
    seen, cached = clean, context_timestep(config.rollout)
    if cached > 0:
        noise = torch.randn(clean.shape, generator=generator)
        seen = add_noise(clean, noise, clean.new_full((len(clean),), sigma_from_timestep(cached)))
    return WarmupBatch(context, clean, seen, noisy, timestep, flow)


def warmup_backward(
    roles: Roles, config: Config, batch: WarmupBatch, weight: float, autocast: Callable[[], AbstractContextManager]
) -> Stats:
    """Accumulates the student's gradient of one micro-batch; weight: its share of the update."""
    if config.rollout.causal and not config.warmup.context_gradient:
        return {"warmup_loss": _backward_by_block(roles, config.rollout, batch, weight, autocast)}
    loss = warmup_loss(roles, config.rollout, batch, autocast)
    (loss * weight).backward()
    return {"warmup_loss": loss.detach()}


def warmup_loss(
    roles: Roles, settings: Rollout, batch: WarmupBatch, autocast: Callable[[], AbstractContextManager]
) -> torch.Tensor:
    """The student's mean squared error, of the flow or (ode_regression) of x0.

    One pass over [context | noisy]: unlike in the rollout, gradient reaches what the context is read through. A bidirectional
    student has no context.
    """
    if not settings.causal:
        with autocast():
            flow = roles.flow("student", batch.noisy, batch.timestep[:, 0], batch.context)
        return _error(flow, batch)
    blocks = tuple(block_layout(settings, batch.clean.shape[2]).slices)
    view = TeacherForcingView(blocks, settings.local_attention_frames, settings.sink_frames)
    cached = torch.full_like(batch.timestep, context_timestep(settings))
    with autocast():
        both = roles.flow(
            "student",
            torch.cat([batch.seen, batch.noisy], 2),
            torch.cat([cached, batch.timestep], 1),
            batch.context,
            view,
        )
    return _error(both[:, :, batch.clean.shape[2] :], batch)


def _backward_by_block(
    roles: Roles, settings: Rollout, batch: WarmupBatch, weight: float, autocast: Callable[[], AbstractContextManager]
) -> torch.Tensor:
    """The loss of `warmup_loss`, block by block through a cache, each with its backward at once: without the gradient of what
    the context is read through, and with the activations of one block."""
    denoise = student_denoiser(roles, batch.context, new_cache(settings, evict=True), autocast)
    cached = torch.full_like(batch.timestep[:, 0], context_timestep(settings))
    num_frames, total = batch.clean.shape[2], batch.clean.new_zeros(())
    for frames in block_layout(settings, num_frames).slices:
        part = batch.frames(frames)
        share = (frames.stop - frames.start) / num_frames
        loss = share * _error(denoise(part.noisy, part.timestep[:, 0], frames=frames), part)
        (loss * weight).backward()
        total += loss.detach()
        if frames.stop < num_frames:
            with torch.no_grad():
                denoise(part.seen, cached, frames=frames, write_cache=True)
    return total


def _error(flow: torch.Tensor, batch: WarmupBatch) -> torch.Tensor:
    """Mean square, of the flow or, where the batch has none, of x0."""
    if batch.flow is not None:
        return (flow.float() - batch.flow).square().mean()
    return (x0_from_flow(batch.noisy, flow.float(), sigma_from_timestep(batch.timestep)) - batch.clean).square().mean()
