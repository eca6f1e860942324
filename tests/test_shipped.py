"""The configurations that ship, and the quickstart's values in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.config import load

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = {  # our key: the quickstart's value
    "dmd.denoising_steps": [1000, 757, 522],
    "dmd.generator_update_interval": 1,
    "dmd.real_score_guidance_scale": 3.0,
    "dmd.fake_score_guidance_scale": 0.0,
    "dmd.min_timestep_ratio": 0.02,
    "dmd.max_timestep_ratio": 0.98,
    "dmd.timestep_shift": 1.0,
    "dmd.ts_schedule": True,
    "dmd.ts_schedule_max": False,
    "dmd.min_score_timestep": 0,
    "fake_score.lr": 1e-5,
    "fake_score.weight_decay": 0.01,
    "fake_score.betas": (0.9, 0.999),
    "fake_score.eps": 1e-8,
    "fake_score.grad_clip": 1.0,
    "rollout.num_training_frames": 21,
    "rollout.last_step_only": False,
    "data.caption_dropout": 0.1,
    "ema.every": 5,
    "ema.validate_with": "ema",
    "model.flow_shift": 5.0,
    "model.precision": "int8",
    "model.text_encoder_precision": "int8",
    "optimizer.name": "adamw_bf16",
    "optimizer.lr": 2e-5,
    "optimizer.grad_clip": 1.0,
    "optimizer.grad_clip_method": "value",
    "schedule.name": "cosine_with_min_lr",
    "schedule.warmup_steps": 100,
    "student.kind": "lora",
    "student.rank": 128,
    "student.alpha": 128,
    "train.batch_size": 1,
    "train.gradient_accumulation": 1,
    "train.gradient_checkpointing": True,
    "train.max_steps": 4000,
    "train.mixed_precision": "bf16",
    "train.seed": 1000,
    "checkpoint.every": 200,
    "checkpoint.keep": 3,
    "validation.every": 200,
    "validation.guidance_scale": 1.0,
    "validation.seed": 42,
}
CAUSAL = {
    "rollout.causal": True,
    "rollout.num_frame_per_block": 3,
    "rollout.independent_first_frame": False,
    "rollout.same_step_across_blocks": False,
    "rollout.context_noise": 0,
    "data.resolution": 480,
    "validation.num_frames": 117,  # not 121: 31 latent frames are no multiple of 3
    "warmup.kind": "ode_regression",
    "validation.resolution": "1280x704",
}


RECOMMENDED = {
    "dmd.generator_update_interval": 5,
    "dmd.timestep_shift": 5.0,
    "dmd.ts_schedule": False,
    "dmd.real_score_guidance_scale": 4.0,  # cond + 3 (cond - uncond)
    "student.kind": "lora",
    "student.rank": 128,
    "student.alpha": 128,
    "fake_score.rank": 128,
    "fake_score.alpha": 128,
    "optimizer.lr": 1e-5,
    "optimizer.betas": (0.0, 0.999),
    "fake_score.lr": 2e-6,
    "fake_score.betas": (0.0, 0.999),
    "ema.warmup": True,
    "train.gradient_accumulation": 8,
}
WAN22_5B = {
    "model.base": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "model.flow_shift": 5.0,
    "rollout.causal": False,
    "rollout.num_training_frames": 31,
    "data.resolution": "1280x704",
    "data.fps": 24,
    "validation.num_frames": 121,
    "validation.resolution": "1280x704",
    "validation.fps": 24,
}


def value_of(config, key: str):
    group, field = key.split(".")
    return getattr(getattr(config, group), field)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_shipped_config_loads(file):
    load(file)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("wan_3step", QUICKSTART | CAUSAL),
        ("wan_3step_bidirectional", QUICKSTART),
        ("wan_3step_recommended", RECOMMENDED),
        ("wan_3step_causal_recommended", RECOMMENDED | {"rollout.causal": True, "warmup.kind": "ode_regression"}),
        ("wan_14b_single_gpu", RECOMMENDED),
        ("wan22_5b", RECOMMENDED | WAN22_5B),
    ],
)
def test_shipped_values(name, values):
    config = load(CONFIGS / f"{name}.yaml")
    assert {key: value_of(config, key) for key in values} == values
    assert config.student_updates <= (1000 if values["dmd.generator_update_interval"] == 5 else 4000)
    assert config.data.negative_prompt.startswith("色调艳丽") and config.data.negative_prompt.endswith("倒着走")
    assert config.validation.negative_prompt == config.data.negative_prompt


@pytest.mark.parametrize("name", ["wan_tiny", "wan_tiny_causal"])
def test_the_miniature_configs_pass_every_check_before_a_model_is_loaded(tmp_path, name):
    result = CliRunner().invoke(
        app, ["fit", str(CONFIGS / f"{name}.yaml"), "--dry-run", "--output-dir", str(tmp_path / "run")]
    )
    assert result.exit_code == 0, result.output
    assert ("warm-up         ode_regression" in result.output) == (name == "wan_tiny_causal")
    assert "warning" not in result.output
    assert "1000, 757, 522" in result.output and "uncond + w (cond - uncond)" in result.output
    assert not (tmp_path / "run").exists()


def test_score_timesteps_that_no_step_could_draw_are_refused_before_a_model_is_loaded(tmp_path):
    bounds = {"ts_schedule": "false", "ts_schedule_max": "true", "min_score_timestep": "600"}
    args = [part for key, value in bounds.items() for part in ("--set", f"dmd.{key}={value}")]
    result = CliRunner().invoke(
        app, ["fit", str(CONFIGS / "wan_tiny.yaml"), "--dry-run", "--output-dir", str(tmp_path / "run"), *args]
    )
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "dmd.min_score_timestep" in result.stderr and "no integer in [600, 509) before the shift" in result.stderr
