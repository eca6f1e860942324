"""One fake-score update and one student update: the only place that joins the maths and the models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace

import torch

from dmdtrain import dmd
from dmdtrain.config import Config, ConfigError, Rollout
from dmdtrain.flow import add_noise, sigma_from_timestep, x0_from_flow
from dmdtrain.models.causal import AsItIs, CausalView, KVCache, Stored, sampling_window
from dmdtrain.models.offload import HostTensor, to_device
from dmdtrain.models.quantize import Int8Tensor
from dmdtrain.models.roles import RoleName, Roles
from dmdtrain.rollout import BlockLayout, Denoiser, ExitRecord, draw_exit_steps, draw_noise, replay_backward, rollout
from dmdtrain.train.log import Phases

Stats = dict[str, torch.Tensor]


def as_numbers(stats: Stats) -> dict[str, float]:
    """Scalars for Python; the host waits for the device once."""
    return dict(zip(stats, torch.stack([*stats.values()]).tolist(), strict=True)) if stats else {}


@dataclass(frozen=True)
class Draws:
    """Everything random in one update of n videos, drawn before it is split into micro-batches: how it is split changes
    no number but rounding."""

    layout: BlockLayout  # of T latent frames
    noise: torch.Tensor  # [S, n, C, T, H, W], and one more where finished blocks are noised in the cache
    score_noise: torch.Tensor  # [n, C, t, H, W], for the last t frames: those that are scored
    score_timestep: torch.Tensor  # [n]
    uncaptioned: torch.Tensor  # [n] bool: fake-score samples without their caption
    exit_steps: list[int]  # per block

    def rows(self, start: int, stop: int) -> Draws:
        return replace(
            self,
            noise=self.noise[:, start:stop],
            score_noise=self.score_noise[start:stop],
            score_timestep=self.score_timestep[start:stop],
            uncaptioned=self.uncaptioned[start:stop],
        )

    def to(self, device: torch.device) -> Draws:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Draws(**{k: to_device(v, device) if isinstance(v, torch.Tensor) else v for k, v in moved.items()})


def new_cache(settings: Rollout, evict: bool = False) -> KVCache | None:
    """An empty cache for one video; None for a bidirectional student."""
    if not settings.causal:
        return None
    stores: dict[str, Callable[[torch.Tensor], Stored]]
    stores = {"device": AsItIs, "int8": Int8Tensor.of, "host": HostTensor}
    return KVCache(settings.local_attention_frames, settings.sink_frames, evict, stores[settings.kv_cache])


def for_sampling(settings: Rollout, num_frames: int) -> Rollout:
    """The rollout of a video of `num_frames` latent frames, with the window that `sampling_window` gives it."""
    if not settings.causal:
        return settings
    window = sampling_window(settings.local_attention_frames, settings.num_training_frames, num_frames)
    return settings.model_copy(update={"local_attention_frames": window})


def context_timestep(settings: Rollout) -> float:
    """Timestep of the pass that writes a finished block to the cache."""
    return settings.context_noise if settings.causal else 0.0


def num_draws(settings: Rollout, timesteps: list[float]) -> int:
    """Noises that `roll_out_blocks` wants for every block."""
    return len(timesteps) + (context_timestep(settings) > 0)


def block_layout(settings: Rollout, num_frames: int) -> BlockLayout:
    """Temporal blocks of `num_frames` latent frames."""
    if not settings.causal:
        return BlockLayout.single(num_frames)
    return BlockLayout.blocks(num_frames, settings.num_frame_per_block, settings.independent_first_frame)


def training_layouts(settings: Rollout) -> list[BlockLayout]:
    """What a training rollout draws its layout from: whole blocks, from the least to the most frames."""
    most = settings.num_training_frames
    counts = range(settings.min_training_frames or most, most + 1)
    return [block_layout(settings, n) for n in counts if not settings.causal or settings.nearest_blocks(n) is None]


def student_denoiser(
    roles: Roles, context: torch.Tensor, cache: KVCache | None, autocast: Callable[[], AbstractContextManager]
) -> Denoiser:
    """The student with its prompt. With a cache, each pass sees its block and, through the cache, what came before."""

    def denoise(
        latents: torch.Tensor, timestep: torch.Tensor, *, frames: slice, write_cache: bool = False
    ) -> torch.Tensor:
        view = None if cache is None else CausalView(cache, frames, write_cache)
        with autocast():
            return roles.flow("student", latents, timestep, context, view)

    return denoise


def score_range(config: Config, timesteps: list[float], exit_step: int) -> tuple[int, int]:
    """[low, high) of the score timesteps, before the shift, of a rollout that left at `exit_step`."""
    return dmd.score_timestep_range(
        timesteps[exit_step],
        timesteps[exit_step + 1] if exit_step + 1 < len(timesteps) else 0.0,
        ts_schedule=config.dmd.ts_schedule,
        ts_schedule_max=config.dmd.ts_schedule_max,
        min_score_timestep=config.dmd.min_score_timestep,
        shift=config.dmd.timestep_shift,
    )


def check_score_ranges(config: Config, timesteps: list[float]) -> None:
    """Raises ConfigError where some exit step would leave no score timestep to draw."""
    for exit_step, timestep in enumerate(timesteps):
        try:
            score_range(config, timesteps, exit_step)
        except ValueError as error:
            raise ConfigError(
                f"dmd.min_score_timestep, ts_schedule, ts_schedule_max: {error} before the shift for the student's step at "
                f"{timestep:g}; valid bounds leave at least one"
            ) from None


def mean_distance(videos: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of two videos, over all pairs of [n, ...]: 0 where they are all the same."""
    flat = videos.detach().flatten(1).float()
    return torch.pdist(flat).mean() / flat.shape[1] ** 0.5


def x0_moments(x0: torch.Tensor) -> Stats:
    """What `x0_figures` needs of a micro-batch [b, C, T, H, W]: means over it, of which an update's are the weighted means."""
    x0 = x0.detach().float()
    return {"x0_mean": x0.mean(), "x0_square": x0.square().mean(), "x0_average": x0.mean(0)}


def x0_figures(stats: Stats, n: int) -> Stats:
    """Statistics of a whole update of n videos, its moments turned into `x0_std`, over all values, and, from two videos on, into
    `x0_diversity`: the root mean square difference of two videos, over all values and pairs."""
    if "x0_average" not in stats:
        return stats
    stats = dict(stats)
    square, average = stats.pop("x0_square"), stats.pop("x0_average")
    values = n * average.numel()
    stats["x0_std"] = ((square - stats["x0_mean"].square()) * values / (values - 1)).clamp(min=0).sqrt()
    if n > 1:
        # Mean square of what sets a video apart from the average.
        within = (square - average.square().mean()).clamp(min=0)
        stats["x0_diversity"] = (2 * n / (n - 1) * within).sqrt()
    return stats


class Distiller:
    """The DMD losses of one run.

    Args:
        roles: teacher, student, fake score.
        config: dmd, rollout, data.caption_dropout and train.mixed_precision are read.
        timesteps: the student's denoising steps, resolved. latent_shape: [C, T, H, W] of the longest training video.
        uncond: [1, L, D], the encoded negative prompt.
    """

    def __init__(
        self,
        roles: Roles,
        config: Config,
        timesteps: list[float],
        latent_shape: tuple[int, int, int, int],
        uncond: torch.Tensor,
    ):
        self.roles, self.config, self.timesteps = roles, config, timesteps
        self.latent_shape, self.uncond, self.device = latent_shape, uncond, uncond.device
        self.layouts = training_layouts(config.rollout)
        self.phases = Phases(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.mixed_precision == "bf16")

    def draw(self, n: int, generator: torch.Generator) -> Draws:
        """All randomness of an update of n videos, on the CPU: the same numbers on every device."""
        rolling = self.config.rollout
        several = len(self.layouts) > 1
        layout = self.layouts[int(torch.randint(len(self.layouts), (1,), generator=generator)) if several else 0]
        exit_steps = draw_exit_steps(
            len(layout.sizes),
            len(self.timesteps),
            generator,
            same_step=rolling.same_step_across_blocks,
            last_only=rolling.last_step_only,
        )
        channels, _, *size = self.latent_shape
        noise = draw_noise(num_draws(rolling, self.timesteps), (n, channels, layout.num_frames, *size), generator)
        scored = min(layout.num_frames, rolling.num_gradient_frames or layout.num_frames)
        return Draws(
            layout, noise, *self._draw_scores((n, channels, scored, *size), exit_steps[-1], generator), exit_steps
        )

    def redraw_scores(self, draws: Draws, generator: torch.Generator) -> Draws:
        """The same rollout, to be scored elsewhere: for a second update on its videos."""
        drawn = self._draw_scores(tuple(draws.score_noise.shape), draws.exit_steps[-1], generator)
        fresh = dict(zip(("score_noise", "score_timestep", "uncaptioned"), drawn, strict=True))
        return replace(draws, **fresh).to(self.device)

    def _draw_scores(
        self, shape: tuple[int, ...], exit_step: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(noise, timesteps, which samples lose their caption) of videos [n, C, t, H, W] whose last block left at `exit_step`.

        One score timestep serves all frames, since the teacher is bidirectional.
        """
        settings = self.config.dmd
        low, high = score_range(self.config, self.timesteps, exit_step)
        score_timestep = dmd.sample_score_timesteps(
            shape[0],
            generator,
            low,
            high,
            shift=settings.timestep_shift,
            min_timestep=1000 * settings.min_timestep_ratio,
            max_timestep=1000 * settings.max_timestep_ratio,
        )
        score_noise = torch.randn(shape, generator=generator)
        uncaptioned = torch.rand(shape[0], generator=generator) < self.config.data.caption_dropout
        return score_noise, score_timestep, uncaptioned

    def _roll_out(
        self, student: Denoiser, draws: Draws, for_replay: bool = False
    ) -> tuple[torch.Tensor, list[ExitRecord]]:
        """The scored frames [b, C, t, H, W] of a rollout, and what its replay needs."""
        result = rollout(
            student,
            draws.noise,
            self.timesteps,
            draws.layout,
            draws.exit_steps,
            context_timestep=context_timestep(self.config.rollout),
            keep_last_graph=for_replay,
        )
        return result.x0[:, :, -draws.score_noise.shape[2] :], result.records

    def _student(self, context: torch.Tensor) -> Denoiser:
        return student_denoiser(self.roles, context, new_cache(self.config.rollout), self.autocast)

    def _score(
        self, name: RoleName, noisy: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """x0 of a score model, guided in standard form; one pass where guidance is off."""
        uncond = self.uncond.expand(len(context), -1, -1)
        with self.autocast():
            if scale in (0, 1):
                flow = self.roles.flow(name, noisy, timestep, context)
            elif self.config.train.batched_guidance:
                both = torch.cat([context, uncond])
                flows = self.roles.flow(name, noisy.repeat(2, 1, 1, 1, 1), timestep.repeat(2), both)
                cond_flow, uncond_flow = flows.float().chunk(2)
                flow = dmd.guide(cond_flow, uncond_flow, scale)
            else:
                cond_flow = self.roles.flow(name, noisy, timestep, context).float()
                flow = dmd.guide(cond_flow, self.roles.flow(name, noisy, timestep, uncond).float(), scale)
        return x0_from_flow(noisy, flow, sigma_from_timestep(timestep))

    def student_backward(self, context: torch.Tensor, draws: Draws, weight: float = 1.0) -> tuple[Stats, torch.Tensor]:
        """Accumulates the student's gradient over one micro-batch.

        Args:
            context: [b, L, D]. draws: of the b videos. weight: the micro-batch's share of the update, b / n.

        Returns:
            statistics, each the micro-batch's mean; the videos' scored frames [b, C, t, H, W].
        """
        settings = self.config.dmd
        student = self._student(context)
        with self.phases("rollout"):
            x0, records = self._roll_out(student, draws, for_replay=True)
        with torch.no_grad(), self.phases("scores"):
            noisy = add_noise(x0, draws.score_noise, sigma_from_timestep(draws.score_timestep))
            score_args = (noisy, draws.score_timestep, context)
            x0_real = self._score("teacher", *score_args, settings.real_score_guidance_scale)
            x0_fake = self._score("fake_score", *score_args, settings.fake_score_guidance_scale)
            gradient, normaliser = dmd.dmd_gradient(x0, x0_real, x0_fake)
            loss = dmd.dmd_loss(x0, gradient)
        stats = {
            "dmd_loss": loss,
            "dmd_gradient_norm": gradient.flatten(1).norm(dim=1).mean(),
            "dmd_normaliser": normaliser.mean(),
            "fake_real_gap": (x0_fake - x0_real).square().mean(),
            **x0_moments(x0),
        }
        with self.phases("replay"):
            replay_backward(student, records, dmd.dmd_loss_gradient(gradient) * weight)
        return stats, x0

    def critic_backward(
        self, context: torch.Tensor, draws: Draws, weight: float = 1.0, x0: torch.Tensor | None = None
    ) -> tuple[Stats, torch.Tensor]:
        """Accumulates the fake score's gradient over one micro-batch; otherwise as `student_backward`.

        x0: the videos, where they are there already; None: the student makes them.
        """
        if x0 is None:
            with self.phases("rollout"):
                x0, _ = self._roll_out(self._student(context), draws)
        with self.phases("critic"):
            noisy = add_noise(x0, draws.score_noise, sigma_from_timestep(draws.score_timestep))
            seen = torch.where(draws.uncaptioned[:, None, None], self.uncond, context)
            with self.autocast():
                flow = self.roles.flow("fake_score", noisy, draws.score_timestep, seen)
            losses = dmd.critic_loss(flow.float(), x0, draws.score_noise)
            (losses.mean() * weight).backward()
            losses = losses.detach()
            unexplained = losses / (draws.score_noise - x0).flatten(1).var(dim=1)  # of the flow's variance
        return {"critic_loss": losses.mean(), "critic_unexplained": unexplained.mean()}, x0
