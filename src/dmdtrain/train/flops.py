"""Model FLOPs of each phase of a step, from shapes: linear layers and attention, no recompute counted.

A multiply-add is two. A backward pass through a frozen layer is one more forward (the input's gradient), through a trained
one two; attention's backward is two of its forward.
"""

from __future__ import annotations

import math
from typing import Any

from dmdtrain.config import Config, Rollout
from dmdtrain.rollout import BlockLayout
from dmdtrain.train.clips import warmup_key
from dmdtrain.train.setup import Run
from dmdtrain.train.step import Draws, block_layout, for_sampling


def pass_flops(transformer: dict[str, Any], queries: int, keys: int, text: int) -> tuple[float, float]:
    """(linear, attention) FLOPs of one forward of one video: `queries` tokens that attend to `keys`, prompt of `text`."""
    dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers, ffn = transformer["num_layers"], transformer["ffn_dim"]
    linear = layers * (2 * queries * (6 * dim**2 + 2 * dim * ffn) + 2 * text * 2 * dim**2)
    return float(linear), float(layers * 4 * queries * (keys + text) * dim)


def update_flops(
    config: Config, transformer: dict[str, Any], teacher: dict[str, Any], frame_tokens: int, draws: Draws | None = None
) -> dict[str, dict[str, float]]:
    """FLOPs of one update of each role, by phase.

    Args:
        transformer, teacher: configs of the student's base and of the teacher. frame_tokens: tokens of a latent frame.
        draws: the length and the exit steps that were drawn; without, what is expected of rollouts of the longest length.
    """
    rolling, text = config.rollout, config.data.max_sequence_length
    steps = len(config.dmd.denoising_steps)
    if draws is None:
        layout, scored = block_layout(rolling, rolling.num_training_frames), rolling.scored_frames
        passes = [float(steps) if rolling.last_step_only else (steps + 1) / 2] * len(layout.sizes)
    else:
        layout, scored = draws.layout, draws.score_noise.shape[2]
        passes = [exit_step + 1.0 for exit_step in draws.exit_steps]
    blocks = _block_flops(transformer, rolling, layout, frame_tokens, text)
    rollout = _sampling_flops(blocks, passes)
    first_scored = layout.num_frames - scored
    replay = -sum(blocks[-1])  # whose graph is the rollout's own
    for block, (linear, attention) in zip(layout.slices, blocks, strict=True):
        if block.start >= first_scored:
            replay += linear * _with_backward(config.student.kind) + attention * 3
    tokens = scored * frame_tokens
    linear, attention = pass_flops(transformer, tokens, tokens, text)
    real_passes, fake_passes = (
        _passes(scale) for scale in (config.dmd.real_score_guidance_scale, config.dmd.fake_score_guidance_scale)
    )
    scores = real_passes * sum(pass_flops(teacher, tokens, tokens, text)) + fake_passes * (linear + attention)
    critic = linear * _with_backward(config.fake_score.kind) + attention * 3
    student = {"rollout": rollout, "scores": scores, "replay": replay}
    if config.dmd.real_data_loss_weight:
        student["real_data"] = _teaching_flops(config, transformer, frame_tokens)
    n = config.samples_per_update
    return {
        "fake_score": {"rollout": rollout * n, "critic": critic * n},
        "student": {phase: flops * n for phase, flops in student.items()},
    }


def warmup_flops(run: Run) -> float:
    """FLOPs of one update of the warm-up."""
    return run.config.samples_per_update * _teaching_flops(run.config, run.base.transformer, run.frame_tokens)


def stage_flops(run: Run) -> dict[str, float]:
    """FLOPs of what a run does besides its steps, of all transformers: by stage, where there are any."""
    config, transformer = run.config, run.base.transformer
    found = {}
    settings, rolling = config.warmup, config.rollout
    if settings.kind != "none":
        if settings.data is None and warmup_key(run) is None:
            stops = (
                len(run.timesteps) if settings.kind == "ode_regression" else 0
            )  # at most so many are not in its grid
            tokens, text = rolling.warmup_frames * run.frame_tokens, config.data.max_sequence_length
            each = _passes(config.dmd.real_score_guidance_scale) * (settings.teacher_steps + stops)
            one = sum(pass_flops(run.teacher.transformer, tokens, tokens, text))
            found["warm-up videos"] = settings.num_samples * each * one
        found["warm-up"] = settings.steps * warmup_flops(run)
    if config.validation.every:
        times = math.ceil(config.train.max_steps / config.validation.every) + (settings.kind != "none")
        times *= 2 if config.ema.validate_with == "both" else 1
        frames = run.validation_latent_shape[1]
        layout, text = block_layout(rolling, frames), config.data.max_sequence_length
        tokens = run.tokens_of(run.validation_latent_shape)
        blocks = _block_flops(transformer, for_sampling(rolling, frames), layout, tokens, text)
        passes = [float(len(run.validation_timesteps))] * len(blocks)
        one = _passes(config.validation.guidance_scale) * _sampling_flops(blocks, passes)
        unread = 0 if run.prompts else config.validation.held_out_prompts  # a plan reads no prompts
        found["validation"] = times * (len(run.validation_prompts) + unread) * one
    return found


def _block_flops(
    transformer: dict[str, Any], rolling: Rollout, layout: BlockLayout, frame_tokens: int, text: int
) -> list[tuple[float, float]]:
    """(linear, attention) of one forward of each temporal block, with what it sees of those before it."""
    found = []
    for block in layout.slices:
        seen = block.stop
        if rolling.local_attention_frames is not None:
            seen = min(seen, rolling.local_attention_frames + rolling.sink_frames)
        found.append(pass_flops(transformer, (block.stop - block.start) * frame_tokens, seen * frame_tokens, text))
    return found


def _sampling_flops(blocks: list[tuple[float, float]], passes: list[float]) -> float:
    """Of one video: so many passes of each block, and one more that writes to the cache what others read."""
    each = zip(passes, blocks, strict=True)
    return sum((count + (index + 1 < len(blocks))) * sum(block) for index, (count, block) in enumerate(each))


def _teaching_flops(config: Config, transformer: dict[str, Any], frame_tokens: int) -> float:
    """Of one video in the warm-up or the loss on real clips: a pass over context and noisy frames, and its backward."""
    layout = block_layout(config.rollout, config.rollout.warmup_frames)
    blocks = _block_flops(transformer, config.rollout, layout, frame_tokens, config.data.max_sequence_length)
    noisy = sum(linear * _with_backward(config.student.kind) + attention * 3 for linear, attention in blocks)
    if not config.rollout.causal:
        return noisy
    return 2 * noisy if config.warmup.context_gradient else noisy + sum(map(sum, blocks[:-1]))


def _with_backward(kind: str) -> int:
    """Forwards of the linear layers that a forward and its backward amount to."""
    return 2 if kind == "lora" else 3


def _passes(guidance_scale: float) -> int:
    return 1 if guidance_scale in (0, 1) else 2


def step_flops(
    config: Config, transformer: dict[str, Any], teacher: dict[str, Any], frame_tokens: int
) -> dict[str, float]:
    """FLOPs of an average step by phase: a fake-score update, and the student's share of one."""
    found = update_flops(config, transformer, teacher, frame_tokens)
    share = 1 / config.dmd.generator_update_interval
    total = dict(found["fake_score"])
    if config.fake_score.reuse_rollout:
        total["rollout"] *= 1 - share
    for phase, flops in found["student"].items():
        total[phase] = total.get(phase, 0.0) + flops * share
    return total
