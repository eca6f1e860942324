"""The student's flow-matching loss on real clips: beside DMD, and in validation on clips that are kept from training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from dmdtrain.models.encode import TextCache
from dmdtrain.models.roles import Roles
from dmdtrain.train.clips import Clips, held_out
from dmdtrain.train.prepare_videos import ClipLoader, latent_cache, latent_names
from dmdtrain.train.setup import Run
from dmdtrain.train.step import Stats
from dmdtrain.train.warmup_step import WarmupBatch, draw_warmup, warmup_backward, warmup_loss


class RealData:
    """Clips and randomness of its own: what DMD draws is the same with it and without.

    Bidirectional students: flow matching at a uniform timestep, shifted as the warm-up's. Causal students: the loss of teacher
    forcing.
    """

    def __init__(
        self, run: Run, clips: ClipLoader, roles: Roles, text: TextCache, autocast: Callable[[], AbstractContextManager]
    ):
        self.run, self.clips, self.roles, self.text, self.autocast = run, clips, roles, text, autocast
        self.generator = torch.Generator().manual_seed(run.config.train.seed + 3)

    def draw(self) -> WarmupBatch:
        """An update's clips, on the host."""
        config = self.run.config
        captions, clean, _ = self.clips.draw(config.samples_per_update)
        context = self.text.get(captions)
        return draw_warmup(config, self.run.timesteps, self.run.flow_shift, context, clean, None, self.generator)

    def backward(self, batch: WarmupBatch, weight: float) -> Stats:
        """Accumulates the student's gradient of a micro-batch, scaled by dmd.real_data_loss_weight; the loss is not.

        weight: the micro-batch's share of the update.
        """
        config, batch = self.run.config, batch.to(self.text.device)
        weight *= config.dmd.real_data_loss_weight
        return {"real_data_loss": warmup_backward(self.roles, config, batch, weight, self.autocast)["warmup_loss"]}

    def state_dict(self) -> dict[str, torch.Tensor]:
        position = {f"clips.{key}": value for key, value in self.clips.sampler.state_dict().items()}
        return {"draws": self.generator.get_state()} | position


class HeldOut:
    """The loss of `RealData` on validation.real_clips: the same clips, noise and timesteps every time, so that only the student
    makes the difference."""

    def __init__(
        self, run: Run, clips: Clips, roles: Roles, text: TextCache, autocast: Callable[[], AbstractContextManager]
    ):
        self.run, self.roles, self.text, self.autocast = run, roles, text, autocast
        self.samples = held_out(run, clips)
        self.cache, self.names = latent_cache(run), latent_names(run, [clips])

    @torch.no_grad()
    def loss(self, check: Callable[[], None]) -> float:
        """Mean over the clips, one at a time. check: called before each; may raise."""
        config, losses = self.run.config, []
        generator = torch.Generator().manual_seed(config.validation.seed)
        for sample in self.samples:
            check()
            context, clean = self.text.get([sample.caption]), self.cache.read([self.names[sample]])
            batch = draw_warmup(config, self.run.timesteps, self.run.flow_shift, context, clean, None, generator)
            losses.append(warmup_loss(self.roles, config.rollout, batch.to(self.text.device), self.autocast))
        return float(torch.stack(losses).mean())
