"""The causal rollout: replay backward against one graph over the whole video, in float64, for every parameter."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import yaml
from conftest import tiny_transformer
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.flow import add_noise, sigma_from_timestep
from dmdtrain.models.causal import CausalView, KVCache
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.rollout import BlockLayout, draw_noise, predict_x0, replay_backward, rollout, sample
from dmdtrain.train.step import student_denoiser

STEPS = [1000.0, 757.0, 522.0]
SPEC = AdapterSpec(4, 8, ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"))


def build(full: bool, checkpointing: bool) -> Roles:
    return Roles(
        tiny_transformer().double(),
        trained={"student": None if full else SPEC, "fake_score": SPEC},
        full_dtype=torch.float64,
        adapter_dtype=torch.float64,
        causal=True,
        gradient_checkpointing=checkpointing,
        init_lora_weights=False,
    )


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in roles.named_parameters("student").items() if p.grad is not None}
    for p in roles.parameters("student"):
        p.grad = None
    return found


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("sizes", "exits", "context_timestep", "checkpointing"),
    [
        ((2, 2, 2), [2, 0, 1], 0.0, False),
        ((1, 2, 3), [1, 1, 1], 0.0, True),
        ((3, 3), [2, 2], 150.0, False),
        ((6,), [1], 0.0, True),
    ],
)
def test_replay_equals_one_graph_with_constant_context(full, sizes, exits, context_timestep, checkpointing):
    roles = build(full, checkpointing)
    layout = BlockLayout(sizes)
    generator = torch.Generator().manual_seed(3)
    noise = draw_noise(3 + (context_timestep > 0), (2, 4, 6, 4, 6), generator).double()
    context = torch.randn(2, 9, 16, dtype=torch.float64, generator=generator)
    grad_x0 = torch.randn(2, 4, 6, 4, 6, dtype=torch.float64, generator=generator)

    student = student_denoiser(roles, context, KVCache(), nullcontext)
    result = rollout(student, noise, STEPS, layout, exits, context_timestep=context_timestep)
    assert not result.x0.requires_grad
    # Another role runs in between, as in training.
    roles.flow("fake_score", result.x0, torch.full((2,), 500.0), context)
    replay_backward(student, result.records, grad_x0)
    replayed = gradients(roles)

    # One graph: every block's exit step keeps its graph until a single backward over the whole video.
    cache = KVCache()
    blocks = []
    for frames, exit_step in zip(layout.slices, exits, strict=True):

        def denoise(latents, timestep, *, frames, write_cache=False):
            return roles.flow("student", latents, timestep, context, CausalView(cache, frames, write_cache))

        x = noise[0, :, :, frames]
        for step in range(exit_step):
            with torch.no_grad():
                x0 = predict_x0(denoise, x, STEPS[step], frames)
            sigma = torch.full((2,), sigma_from_timestep(STEPS[step + 1]), dtype=torch.float64)
            x = add_noise(x0, noise[step + 1, :, :, frames], sigma)
        x0 = predict_x0(denoise, x, STEPS[exit_step], frames)
        blocks.append(x0)
        with torch.no_grad():
            sigma = torch.full((2,), context_timestep / 1000, dtype=torch.float64)
            seen = add_noise(x0, noise[-1, :, :, frames], sigma) if context_timestep else x0
            denoise(seen, torch.full((2,), context_timestep), frames=frames, write_cache=True)
    video = torch.cat(blocks, 2)
    assert torch.allclose(video, result.x0, atol=1e-12)
    video.backward(grad_x0)
    whole = gradients(roles)

    assert whole.keys() == replayed.keys() and len(whole) == len(roles.parameters("student"))
    for name, wanted in whole.items():
        assert torch.allclose(replayed[name], wanted, rtol=1e-8, atol=1e-11), name


@torch.no_grad()
def test_later_blocks_depend_on_earlier_ones_and_not_the_other_way_round():
    roles = build(False, False)
    noise = draw_noise(3, (1, 4, 6, 4, 6), torch.Generator().manual_seed(0)).double()
    context = torch.randn(1, 9, 16, dtype=torch.float64)

    def run(noise):
        student = student_denoiser(roles, context, KVCache(), nullcontext)
        return torch.cat(list(sample(student, lambda f: noise[:, :, :, f], STEPS, BlockLayout((3, 3)))), 2)

    one = run(noise)
    for changed, first_same, second_same in ((slice(0, 3), False, False), (slice(3, 6), True, False)):
        other = noise.clone()
        other[0, :, :, changed] += 1
        two = run(other)
        assert torch.equal(one[:, :, :3], two[:, :, :3]) == first_same
        assert torch.equal(one[:, :, 3:], two[:, :, 3:]) == second_same


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"independent_first_frame": True, "same_step_across_blocks": True},
        {"local_attention_frames": 3, "sink_frames": 1},
    ],
)
def test_fit_validate_and_go_on_beyond_training(settings, tmp_path, changes):
    frames = 5 if "independent_first_frame" in changes else 4
    settings["rollout"] = {"causal": True, "num_frame_per_block": 2, "num_training_frames": frames, "context_noise": 10}
    settings["rollout"] |= changes
    settings["validation"]["num_frames"] = 13
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    runner = CliRunner()
    result = runner.invoke(app, ["fit", str(file)], catch_exceptions=False)
    assert result.exit_code == 0 and "warm-up" in result.output
    ckpt = str(tmp_path / "run" / "checkpoints" / "step-000004")
    video = str(tmp_path / "long.mp4")
    made = runner.invoke(
        app, ["generate", "--ckpt", ckpt, "a dog", "--out", video, "--frames", "33"], catch_exceptions=False
    )
    assert made.exit_code == 0, made.output
    exported = runner.invoke(app, ["export-lora", "--ckpt", ckpt, "--out", str(tmp_path / "lora.safetensors")])
    assert exported.exit_code == 0 and not (tmp_path / "lora_scheduler").exists()
