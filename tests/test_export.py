"""Exported LoRAs and schedulers, sampled by the stock WanPipeline."""

from __future__ import annotations

import ast
import json
import re

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.config import ConfigError, build
from dmdtrain.export import comfyui_sampling, lora_tensors, original_name, stock_scheduler, write_lora
from dmdtrain.flow import shift_timestep
from dmdtrain.train import setup
from dmdtrain.train.render import Renderer

PROMPT, SEED = "a blue cat sleeps on grass", 11
HEIGHT, WIDTH, NUM_FRAMES = 32, 48, 9
ORIGINAL = {  # the layers of a block -> their names in the original Wan
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def run_cli(*args: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def train(settings, tmp_path):
    """Trains two steps with a LoRA of alpha 8 and rank 4 and returns the checkpoint.

    The learning rate is huge: Adam's first steps are as long as it says, so the LoRA does much after two of them.
    """

    def run(causal: bool = False, **dmd):
        changed = settings | {"dmd": {"generator_update_interval": 1, **dmd}}
        changed["rollout"] = {"num_training_frames": 3, "causal": causal}
        changed["optimizer"] = {"lr": 0.3, "weight_decay": 0.0}
        changed["train"] = settings["train"] | {"max_steps": 2}
        changed["validation"] = settings["validation"] | {"every": 0} | ({"num_frames": 9} if causal else {})
        changed["log"] = {"tensorboard": False}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed))
        run_cli("fit", tmp_path / "run.yaml")
        return tmp_path / "run" / "checkpoints" / "step-000002"

    return run


@torch.no_grad()
def stock_video(wan_folder, scheduler_folder, lora=None, num_steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [1, C, T, H, W], video [1, 3, T, H, W] in [0, 1]) of the pipeline that anyone would build."""
    pipeline = WanPipeline.from_pretrained(wan_folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(scheduler_folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    results = []
    for output_type in ("latent", "pt"):
        torch.manual_seed(SEED)  # the pipeline hands no generator to its scheduler
        results.append(
            pipeline(
                PROMPT,
                height=HEIGHT,
                width=WIDTH,
                num_frames=NUM_FRAMES,
                num_inference_steps=num_steps,
                guidance_scale=1.0,
                max_sequence_length=8,
                output_type=output_type,
            ).frames
        )
    return results[0], results[1].permute(0, 2, 1, 3, 4)


def our_video(ckpt, weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from the trainer's own sampler."""
    run = setup.load_run(ckpt)
    cpu = torch.device("cpu")
    renderer = Renderer(run, setup.load_student(run, ckpt, weights, cpu), setup.text_cache(run, cpu))
    shape = run.base.latent_shape(setup.latent_frames(NUM_FRAMES), HEIGHT, WIDTH)
    latents = renderer.student([PROMPT], SEED, shape, run.timesteps)
    return latents, (renderer.decode(latents) / 2 + 0.5).clamp(0, 1)


def assert_same_video(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_stock_pipeline_makes_the_same_video(train, wan_folder, tmp_path):
    ckpt = train()
    ours = our_video(ckpt, "ema")
    for file_format in ("diffusers", "default"):
        file = tmp_path / "out" / f"{file_format}.safetensors"
        chosen = () if file_format == "default" else ("--format", file_format)
        output = run_cli("export-lora", "--ckpt", ckpt, "--out", file, *chosen)
        assert "1000, 757, 522 (num_inference_steps=3, guidance_scale=1.0)" in output.replace("\n", " ")
        assert "with another number of steps it walks others, which were never trained" in output
        assert ("only Diffusers reads it" in output) == (file_format == "diffusers")
        assert ("in ComfyUI: sampler lcm, CFG 1, sigmas 1.0, 0.757, 0.522, 0.0\n" in output) == (not chosen)
        assert_same_video(ours, stock_video(wan_folder, tmp_path / "out" / f"{file_format}_scheduler", file))
    assert ours[1].shape == (1, 3, NUM_FRAMES, HEIGHT, WIDTH)
    # Neither the LoRA nor the scheduler is idle.
    latents, video = stock_video(wan_folder, tmp_path / "out" / "diffusers_scheduler")
    assert (latents - ours[0]).abs().mean() > 0.05
    assert (video - ours[1]).abs().mean() > 0.01
    own = stock_video(wan_folder, wan_folder / "scheduler", file)
    assert (own[0] - ours[0]).abs().mean() > 0.05


def test_warped_steps_are_exported_as_they_were_trained(train, wan_folder, tmp_path):
    """Shift 3 of the model folder: 1000/750/500/250 -> 1000/900/750/500."""
    ckpt = train(denoising_steps=[1000, 750, 500, 250], warp_denoising_steps=True)
    file = tmp_path / "lora.safetensors"
    output = run_cli("export-lora", "--ckpt", ckpt, "--out", file, "--weights", "raw")
    assert "1000, 900, 750, 500 (num_inference_steps=4, guidance_scale=1.0)" in output.replace("\n", " ")
    assert_same_video(our_video(ckpt, "raw"), stock_video(wan_folder, tmp_path / "lora_scheduler", file, 4))


def test_files_hold_the_trained_weights_and_how_to_sample_them(train, wan_folder, tmp_path):
    ckpt = train()
    files = {}
    for weights in ("raw", "ema"):
        for file_format in ("diffusers", "original"):
            file = files[weights, file_format] = tmp_path / f"{weights}-{file_format}.safetensors"
            run_cli("export-lora", "--ckpt", ckpt, "--out", file, "--weights", weights, "--format", file_format)
    assert not list(tmp_path.glob(".*.partial"))

    for weights, stem in (("raw", "student"), ("ema", "ema")):
        trained = load_file(ckpt / f"{stem}.safetensors")
        exported = load_file(files[weights, "diffusers"])
        # Two blocks, two attentions with four layers and two feed-forward layers each, A and B.
        assert len(exported) == len(trained) == 2 * (2 * 4 + 2) * 2
        for key, value in trained.items():
            factor = 8 / 4 if ".lora_B." in key else 1
            torch.testing.assert_close(exported[f"transformer.{key}"], value * factor, rtol=0, atol=0)
            assert value.abs().max() > 0.01
        original = load_file(files[weights, "original"])
        assert len(original) == len(exported)
        for key, value in exported.items():
            block, module, part = re.fullmatch(r"transformer\.(blocks\.[01])\.(.*)\.(lora_[AB]\.weight)", key).groups()
            assert torch.equal(original[f"diffusion_model.{block}.{ORIGINAL[module]}.{part}"], value)

    raw, ema = (load_file(files[w, "diffusers"]) for w in ("raw", "ema"))
    assert any(not torch.equal(raw[key], ema[key]) for key in raw)
    run_cli("export-lora", "--ckpt", ckpt, "--out", tmp_path / "default.safetensors")
    run_cli("export-lora", "--ckpt", ckpt, "--out", tmp_path / "comfyui.safetensors", "--format", "comfyui")
    for same in ("default", "comfyui"):
        found = load_file(tmp_path / f"{same}.safetensors")
        assert found.keys() == original.keys() and all(torch.equal(found[key], original[key]) for key in original)

    for file in files.values():
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["base_model"] == str(wan_folder)
        assert ast.literal_eval(metadata["timesteps"]) == [1000.0, 757.0, 522.0]
        assert float(metadata["guidance_scale"]) == 1.0
        assert metadata["comfyui"] == "sampler lcm, CFG 1, sigmas 1.0, 0.757, 0.522, 0.0"
        sampling = json.loads(metadata["dmdtrain"])
        assert sampling["sigmas"] == [1.0, 0.757, 0.522]
        assert sampling["max_sequence_length"] == 8
        assert sampling == json.loads((ckpt / "sampling.json").read_text())


def test_steps_that_no_stock_scheduler_walks(train, tmp_path):
    ckpt = train(denoising_steps=[900, 500])
    output = run_cli("export-lora", "--ckpt", ckpt, "--out", tmp_path / "lora.safetensors")
    assert "no stock scheduler configuration gives the timesteps 900, 500: none was written" in output
    assert "in ComfyUI: no sampler there starts from whole noise at sigma 0.9" in output
    assert (tmp_path / "lora.safetensors").exists()
    assert not (tmp_path / "lora_scheduler").exists()


def test_a_causal_student_gets_no_scheduler(train, tmp_path):
    """The stock pipeline denoises all frames at once: it would sample something else."""
    output = run_cli("export-lora", "--ckpt", train(causal=True), "--out", tmp_path / "lora.safetensors")
    assert "a causal student is sampled block by block" in output and "export-pipeline writes one" in output
    assert "in ComfyUI: no sampler there makes videos block by block" in output
    assert not (tmp_path / "lora_scheduler").exists()
    with safe_open(tmp_path / "lora.safetensors", "pt") as opened:
        sampling = json.loads(opened.metadata()["dmdtrain"])
        assert "block by block" in opened.metadata()["comfyui"]
    assert (sampling["causal"], sampling["num_frame_per_block"]) == (True, 3)


def test_a_windowed_student_says_how_it_is_sampled(settings):
    rollout = {"causal": True, "num_training_frames": 6, "local_attention_frames": 5, "sink_frames": 1}
    settings["validation"]["num_frames"] = 9
    sampling = setup.resolve(build(settings | {"rollout": rollout})).sampling()
    assert (sampling.get("local_attention_frames"), sampling.get("sink_frames")) == (5, 1)


# ---------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("module", ORIGINAL)
def test_original_names(module):
    for number in (0, 29):
        assert original_name(f"blocks.{number}.{module}") == f"blocks.{number}.{ORIGINAL[module]}"


def test_every_linear_layer_has_an_original_name_that_diffusers_reads(wan_folder):
    transformer = WanTransformer3DModel.from_pretrained(wan_folder / "transformer")
    weights = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            weights[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features)
            weights[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2)
    assert {"proj_out.lora_A.weight", "condition_embedder.time_proj.lora_B.weight"} < set(weights)
    read = WanPipeline.lora_state_dict(lora_tensors(weights, 0.5, "original"))
    wanted = lora_tensors(weights, 0.5, "diffusers")
    assert read.keys() == wanted.keys() and all(torch.equal(read[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("module", ["norm_out", "blocks.0.attn1.norm_q", "to_q", "xblocks.0.ffn.net.2"])
def test_modules_that_have_no_original_name(module):
    with pytest.raises(ConfigError, match=rf"^--format: original: .*{re.escape(module)}; valid is diffusers$"):
        original_name(module)
    assert list(lora_tensors({f"{module}.lora_A.weight": torch.ones(2, 3)}, 1.0, "diffusers"))


def test_alpha_over_rank_is_folded_into_b_alone():
    a, b = torch.randn(2, 5), torch.randn(3, 2).bfloat16()
    weights = {"blocks.0.attn1.to_q.lora_A.weight": a, "blocks.0.attn1.to_q.lora_B.weight": b}
    exported = lora_tensors(weights, 0.5, "original")
    assert torch.equal(exported["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], a)
    assert torch.equal(exported["diffusion_model.blocks.0.self_attn.q.lora_B.weight"], b.float() * 0.5)
    assert all(t.dtype == torch.float32 for t in exported.values())


def test_files_are_not_overwritten(tmp_path):
    weights = {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 3)}
    sampling = {"base_model": "m", "timesteps": [1000.0], "guidance_scale": 1.0}
    file = tmp_path / "below" / "lora.safetensors"
    with pytest.raises(ConfigError, match=r"^--format: kohya: valid are original \(or comfyui, the same\), diffusers$"):
        write_lora(file, weights, 1.0, "kohya", sampling)
    write_lora(file, weights, 1.0, "diffusers", sampling)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"^--out: .*lora\.safetensors exists; choose another name$"):
        write_lora(file, {k: v * 2 for k, v in weights.items()}, 1.0, "diffusers", sampling)
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize(
    ("timesteps", "says"),
    [
        ([1000.0, 900.0, 750.0, 500.0], "sampler lcm, CFG 1, sigmas 1.0, 0.9, 0.75, 0.5, 0.0"),
        ([1000], "sampler lcm, CFG 1, sigmas 1.0, 0.0"),
        ([1000, 10000 / 11], "sampler lcm, CFG 1, sigmas 1.0, 0.9090909, 0.0"),
    ],
)
def test_the_sigmas_for_comfyui_are_the_students_own(timesteps, says):
    assert comfyui_sampling({"timesteps": timesteps, "causal": False}) == says


SELF_FORCING = [1000.0, 750.0, 500.0, 250.0]


@pytest.mark.parametrize(
    "timesteps",
    [
        [1000, 757, 522],
        [1000],
        [1000, 500],
        [1000, 20],
        [1000, 750, 500, 250],
        [1000, 937.5, 833.33, 625],
        [shift_timestep(t, 8.0) for t in SELF_FORCING],
        [1000, 500, 250],
        [1000, 909.09, 714.29],
    ],
    ids=lambda steps: ",".join(f"{t:g}" for t in steps),
)
def test_stock_scheduler_walks_the_list(timesteps, tmp_path):
    scheduler = stock_scheduler(timesteps)
    assert scheduler is not None
    scheduler.save_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(len(timesteps))
    wanted = torch.tensor(timesteps, dtype=torch.float32)
    assert torch.allclose(scheduler.timesteps, wanted, rtol=0, atol=0.05)
    assert torch.allclose(scheduler.sigmas[:-1] * 1000, wanted, rtol=0, atol=0.05) and scheduler.sigmas[-1] == 0

    # One step: to x0, then fresh noise to the next sigma.
    torch.manual_seed(0)
    sample, flow = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.manual_seed(3)
    stepped = scheduler.step(flow, scheduler.timesteps[0], sample, return_dict=False)[0]
    torch.manual_seed(3)
    following = timesteps[1] / 1000 if len(timesteps) > 1 else 0.0
    expected = (1 - following) * (sample - timesteps[0] / 1000 * flow) + following * torch.randn(2, 3, 4)
    assert torch.allclose(stepped, expected, atol=5e-4)


@pytest.mark.parametrize("timesteps", [[1000, 990, 500, 10], [900, 500], [900], [999, 500], [1000, 750, 501, 250]])
def test_stock_scheduler_gives_up(timesteps):
    assert stock_scheduler(timesteps) is None
