"""Model FLOPs of each phase of a step, from shapes: linear layers and attention, no recompute counted.

A multiply-add is two. A backward pass through a frozen layer is one more forward (the input's gradient), through a trained
one two; attention's backward is two of its forward.
"""

from __future__ import annotations

from typing import Any

from dmdtrain.config import Config
from dmdtrain.train.step import block_layout


def pass_flops(transformer: dict[str, Any], queries: int, keys: int, text: int) -> tuple[float, float]:
    """(linear, attention) FLOPs of one forward of one video: `queries` tokens that attend to `keys`, prompt of `text`."""
    dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers, ffn = transformer["num_layers"], transformer["ffn_dim"]
    linear = layers * (2 * queries * (6 * dim**2 + 2 * dim * ffn) + 2 * text * 2 * dim**2)
    return float(linear), float(layers * 4 * queries * (keys + text) * dim)


def update_flops(
    config: Config, transformer: dict[str, Any], teacher: dict[str, Any], frame_tokens: int
) -> dict[str, dict[str, float]]:
    """Expected FLOPs of one update of each role, by phase.

    Exit steps are uniform unless last_step_only; rollouts have their longest length.

    Args:
        transformer, teacher: configs of the student's base and of the teacher. frame_tokens: tokens of a latent frame.
    """
    rolling, text = config.rollout, config.data.max_sequence_length
    blocks = block_layout(rolling, rolling.num_training_frames).slices
    scored = rolling.scored_frames
    steps = len(config.dmd.denoising_steps)
    passes = steps if rolling.last_step_only else (steps + 1) / 2
    rollout = replay = 0.0
    for index, block in enumerate(blocks):
        seen = block.stop
        if rolling.local_attention_frames is not None:
            seen = min(seen, rolling.local_attention_frames + rolling.sink_frames)
        size = (block.stop - block.start) * frame_tokens
        linear, attention = pass_flops(transformer, size, seen * frame_tokens, text)
        rollout += (passes + (index + 1 < len(blocks))) * (linear + attention)
        if block.start >= rolling.num_training_frames - scored:
            replay += linear * (2 if config.student.kind == "lora" else 3) + attention * 3
    tokens = scored * frame_tokens
    linear, attention = pass_flops(transformer, tokens, tokens, text)
    real_passes, fake_passes = (
        1 if scale in (0, 1) else 2
        for scale in (config.dmd.real_score_guidance_scale, config.dmd.fake_score_guidance_scale)
    )
    scores = real_passes * sum(pass_flops(teacher, tokens, tokens, text)) + fake_passes * (linear + attention)
    critic = linear * (2 if config.fake_score.kind == "lora" else 3) + attention * 3
    n = config.samples_per_update
    return {
        "fake_score": {"rollout": rollout * n, "critic": critic * n},
        "student": {"rollout": rollout * n, "scores": scores * n, "replay": replay * n},
    }


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
