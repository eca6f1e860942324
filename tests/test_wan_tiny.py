"""The built-in miniature: a genuine Wan folder whose teacher obeys prompts in many steps and fails in three."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import WanPipeline
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.config import build
from dmdtrain.data.prompts import load_prompts
from dmdtrain.miniature import clips, scorer
from dmdtrain.models.decode import decode_latents
from dmdtrain.models.roles import Roles
from dmdtrain.models.wan import find_folder, load_transformer, load_vae
from dmdtrain.train import setup
from dmdtrain.train.render import Renderer
from dmdtrain.train.validation import score

SETTINGS = {
    "model": {"precision": "fp32", "text_encoder_precision": "fp32"},
    "data": {"resolution": "32x32", "max_sequence_length": 16},
    "validation": {"resolution": "32x32", "num_frames": 21},
}


@pytest.fixture(scope="module")
def folder():
    return find_folder("wan-tiny", "model.base")


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    run = setup.resolve(build(SETTINGS | {"output_dir": str(tmp_path_factory.mktemp("run"))}))
    device = torch.device("cpu")
    roles = Roles(load_transformer(run.base, "fp32"), trained={})
    roles.roles["student"] = roles.roles["teacher"]  # the undistilled base under the student's sampler
    return Renderer(run, roles, setup.text_cache(run, device))


def test_folder_is_small_and_has_its_training_record(folder):
    assert sum(f.stat().st_size for f in folder.path.rglob("*")) < 20e6
    record = json.loads((folder.path / "training_record.json").read_text())
    assert record["seed"] == 0 and record["teacher"]["log"][-1]["seconds"] > 0
    losses = [line["loss"] for line in record["teacher"]["log"] if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_codec_rebuilds_what_the_scorer_sees(folder):
    vae = load_vae(folder)
    generator = torch.Generator().manual_seed(11)
    captions = [clips.ALL_CAPTIONS[i] for i in torch.randint(240, (48,), generator=generator).tolist()]
    videos = clips.render(captions, 21, generator)
    latents = vae.encode(videos).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    normalised = (latents - mean) / std
    assert normalised.mean().abs() < 0.1 and 0.9 < normalised.std() < 1.1
    assert scorer.accuracy(decode_latents(vae, normalised), captions)["all"] >= 0.95


def test_stock_pipeline_makes_what_the_renderer_makes(folder, renderer):
    prompt = load_prompts("wan-tiny", "prompts", held_out=True)[0]
    pipeline = WanPipeline.from_pretrained(folder.path)
    pipeline.set_progress_bar_config(disable=True)
    shape = renderer.run.validation_latent_shape
    video = pipeline(
        prompt,
        height=32,
        width=32,
        num_frames=21,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=16,
        output_type="pt",
    ).frames
    ours = renderer.decode(renderer.teacher([prompt], 5, shape, 8, 3.0))
    assert torch.allclose(video.permute(0, 2, 1, 3, 4) * 2 - 1, ours, atol=2e-4)


def test_teacher_obeys_in_many_steps_and_fails_in_three(renderer):
    prompts = load_prompts("wan-tiny", "prompts", held_out=True)[:40]
    shape = renderer.run.validation_latent_shape
    right = {}
    for steps, guidance in ((30, 3.0), (3, 3.0), (3, 1.0)):
        videos = renderer.decode(renderer.teacher(prompts, 0, shape, steps, guidance))
        right[steps, guidance] = score(videos, prompts)["all"]
    assert right[30, 3.0] >= 0.8
    assert max(right[3, 3.0], right[3, 1.0]) <= right[30, 3.0] - 0.2


def test_default_text_length_of_the_pipeline_works_too(folder):
    prompts = load_prompts("wan-tiny", "prompts", held_out=True)[:6]
    pipeline = WanPipeline.from_pretrained(folder.path)
    pipeline.set_progress_bar_config(disable=True)
    videos = pipeline(
        prompts,
        height=32,
        width=32,
        num_frames=21,
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert score(videos.permute(0, 2, 1, 3, 4) * 2 - 1, prompts)["all"] >= 0.5


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_distillation_learns(tmp_path):
    """The run of `make demo`: the student in 3 steps beats the teacher in 3 steps, on captions it was not trained on."""
    run = tmp_path / "run"
    runner = CliRunner()
    assert runner.invoke(app, ["fit", "configs/wan_tiny.yaml", "--output-dir", str(run)]).exit_code == 0
    ckpt = sorted((run / "checkpoints").iterdir())[-1]
    args = ["validate", "--ckpt", str(ckpt), "--compare-teacher", "--teacher-steps", "3", "--count", "48"]
    assert runner.invoke(app, args).exit_code == 0
    scores = json.loads((run / "validate" / ckpt.name / "results.json").read_text())["scores"]
    assert scores["student"]["all"] > scores["teacher 3 steps"]["all"] + 0.15
