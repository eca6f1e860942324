"""Wan 2.2 TI2V-5B, text to video: a random tiny model of its layout through all that is done with a Wan 2.1."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from clip_files import write_clip
from conftest import done, refused, tiny_transformer
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from model_edits import edit_json
from rich.console import Console
from safetensors.torch import load_file

from dmdtrain.config import build, latent_frames
from dmdtrain.data.decode import read_clip
from dmdtrain.models.decode import decode_latents
from dmdtrain.models.encode import encoder_digest
from dmdtrain.models.roles import Roles
from dmdtrain.models.wan import find_folder, load_vae
from dmdtrain.train import setup
from dmdtrain.train.plan import find_shapes
from dmdtrain.train.prepare_videos import ClipLoader, prepare_videos
from dmdtrain.train.render import Renderer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, SEED = "a blue cat sleeps on grass", 11
WIDTH, HEIGHT, NUM_FRAMES = 64, 32, 9
CAPTIONS = ("a red cat runs", "a blue dog sleeps", "a cat on grass", "a dog")
HUB_ID = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@pytest.fixture(scope="module")
def folder(wan_folder, tmp_path_factory) -> Path:
    """The random folder with a codec, a transformer, a scheduler and an index as the 5B has them: 48 channels, 16 x 16 x 4."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(9)
    path = tmp_path_factory.mktemp("models") / "wan22-random"
    shutil.copytree(wan_folder, path)
    AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=torch.randn(48, generator=generator).tolist(),
        latents_std=(0.5 + torch.rand(48, generator=generator)).tolist(),
    ).eval().save_pretrained(path / "vae")
    tiny_transformer(in_channels=48, out_channels=48).save_pretrained(path / "transformer")
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0).save_pretrained(
        path / "scheduler"
    )
    edit_json("model_index.json", expand_timesteps=True, scheduler=["diffusers", "UniPCMultistepScheduler"])(path)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Four clips of 9 frames at 24 a second: three wide, one tall."""
    path = tmp_path_factory.mktemp("clips")
    for number, caption in enumerate(CAPTIONS):
        size = (96, 48) if number == 3 else (48, 96)
        frames = list(np.random.default_rng(number).integers(0, 256, (9, *size, 3), np.uint8))
        write_clip(path / f"{number}.mp4", 9, size, rate=24, caption=caption, frames=frames)
    return path


def changed(values: dict, changes: dict) -> dict:
    values = {group: dict(value) if isinstance(value, dict) else value for group, value in values.items()}
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[name] = value
    return values


@pytest.fixture
def values(settings, folder) -> dict:
    own = {
        "model.base": str(folder),
        "data.resolution": "64x32",
        "validation.resolution": "64x32",
        "log.tensorboard": False,
    }
    return changed(settings, own | {"validation.num_frames": NUM_FRAMES})


CAUSAL = {
    "rollout.causal": True,
    "rollout.num_frame_per_block": 2,
    "rollout.independent_first_frame": True,  # 1 + 2: as 31 latent frames are 1 + 30
}
WARMED = {"warmup.kind": "ode_regression", "warmup.steps": 1, "warmup.num_samples": 2, "warmup.teacher_steps": 2}
FROM_CLIPS = {"data.fps": 24, "data.buckets": True, "validation.every": 0}
STUDENTS = {
    "bidirectional": FROM_CLIPS | {"dmd.real_data_loss_weight": 0.5},
    "causal": FROM_CLIPS | CAUSAL | {"warmup.kind": "teacher_forcing", "warmup.steps": 2, "warmup.lr": 1e-2},
}


# ---------------------------------------------------------------------------------------------------- the model


@torch.no_grad()
def test_our_flow_is_the_one_with_a_timestep_for_each_token(folder):
    """Ours is given one for a video, or in causal students one for a frame, of 2 x 3 tokens."""
    model = tiny_transformer(in_channels=48, out_channels=48)  # seeds what follows
    x, context = torch.randn(2, 48, 3, 4, 6), torch.randn(2, 8, 16)
    alike, apart = torch.tensor([757.0, 522.0]), torch.tensor([[0.0, 757.0, 522.0], [1000.0, 20.0, 0.0]])
    expanded = [alike[:, None].expand(2, 18), apart.repeat_interleave(6, 1)]
    theirs = [model(x, timestep, context, return_dict=False)[0] for timestep in expanded]
    roles = Roles(model, trained={"student": None})
    for given, wanted in ((alike, theirs[0]), (alike[:, None].expand(2, 3), theirs[0]), (apart, theirs[1])):
        torch.testing.assert_close(roles.flow("teacher", x, given, context), wanted, atol=1e-6, rtol=1e-6)
    assert (theirs[0] - theirs[1]).abs().mean() > 0.01 < theirs[0].std()


def test_what_the_folder_says(folder, wan_folder):
    found, plain = find_folder(str(folder), "model.base"), find_folder(str(wan_folder), "model.base")
    assert found.latent_shape(31, 704, 1280) == (48, 31, 44, 80)
    assert (found.size_multiple, found.flow_shift, found.fps) == (32, 5.0, 24)
    assert (plain.size_multiple, plain.fps) == (16, 16)
    assert encoder_digest(found) == encoder_digest(plain)  # one cache of embeddings serves both


@torch.no_grad()
def test_videos_go_through_its_codec_as_it_does_it(folder):
    vae = load_vae(find_folder(str(folder), "model.base"))
    torch.manual_seed(0)
    latents = torch.randn(1, 48, 3, 4, 6)
    mean, std = (
        torch.tensor(values).view(1, 48, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    theirs = vae.decode(latents * std + mean).sample
    assert theirs.shape == (1, 3, 9, 64, 96)
    torch.testing.assert_close(decode_latents(vae, latents), theirs, atol=1e-5, rtol=0)
    large = torch.randn(1, 48, 2, 17, 2)
    whole, tiles = (decode_latents(vae, large, tiled) for tiled in (False, True))
    assert whole.shape == tiles.shape == (1, 3, 5, 272, 32)
    assert (tiles - whole).abs().mean() < 0.3 * whole.std()  # a tile's decoder does not see beyond it


@torch.no_grad()
def test_latents_of_clips_are_the_codecs_by_its_own_mean_and_deviation(values, clips):
    run = setup.resolve(build(changed(values, STUDENTS["bidirectional"] | {"data.videos": str(clips)})))
    found = prepare_videos(run, Console(quiet=True))["data.videos"]
    assert {sample.size for sample in found.samples} == {(32, 64), (64, 32)}
    vae, loader = load_vae(run.base), ClipLoader(run, found, 0)
    mean, std = (torch.tensor(v).view(1, 48, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    captions, latents, _ = loader.draw(3)  # of one bucket
    for caption, row in zip(captions, latents, strict=True):
        number = CAPTIONS.index(caption)
        video = read_clip(clips / f"{number}.mp4", NUM_FRAMES, *((64, 32) if number == 3 else (32, 64)), 24)
        wanted = (vae.encode(video[None]).latent_dist.mode() - mean) / std
        assert wanted.shape[:3] == (1, 48, 3)
        torch.testing.assert_close(row, wanted[0], atol=1e-3, rtol=1e-3)  # kept in half precision


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_run_on_clips_goes_on_to_the_same_bits(values, clips, tmp_path, kind):
    file, steps = tmp_path / "run.yaml", {}
    file.write_text(yaml.safe_dump(changed(values, STUDENTS[kind] | {"data.videos": str(clips)})))
    done("fit", file)
    done("fit", file, "--output-dir", tmp_path / "halted", "--max-steps", 2)
    done("fit", file, "--output-dir", tmp_path / "halted")
    for name in ("run", "halted"):
        ckpt = tmp_path / name / "checkpoints" / "step-000004"
        steps[name] = {part.name: load_file(part) for part in sorted(ckpt.glob("*.safetensors"))}
    assert steps["run"].keys() == steps["halted"].keys() and "student.safetensors" in steps["run"]
    for part, tensors in steps["run"].items():
        assert all(torch.equal(steps["halted"][part][key], value) for key, value in tensors.items()), part
    lora = steps["run"]["student.safetensors"]
    assert any(value.abs().max() > 0 for key, value in lora.items() if ".lora_B." in key)
    assert (tmp_path / "run" / "warmup").exists() == (kind == "causal")


@pytest.mark.parametrize("resolution", ["1280x720", "832x464", "48x32"])
def test_sizes_are_multiples_of_codec_times_patch(values, tmp_path, resolution):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed(values, {"data.resolution": resolution})))
    refused("fit", tmp_path / "run.yaml", "--dry-run", says=[f"data.resolution: {resolution}", "multiples of 32"])


# ---------------------------------------------------------------------------------------------------- what comes out


@pytest.fixture
def trained(values, tmp_path):
    """A checkpoint after two updates of so large a rate that the LoRA does much."""

    def train(changes: dict) -> Path:
        own = {"validation.every": 0, "dmd.generator_update_interval": 1, "optimizer.lr": 0.3, "train.max_steps": 2}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed(values, own | changes)))
        done("fit", tmp_path / "run.yaml")
        return Path(changes.get("output_dir", tmp_path / "run")) / "checkpoints" / "step-000002"

    return train


def renderer_of(ckpt: Path) -> Renderer:
    run, cpu = setup.load_run(ckpt), torch.device("cpu")
    return Renderer(run, setup.load_student(run, ckpt, "ema", cpu), setup.text_cache(run, cpu))


SHAPE = (48, latent_frames(NUM_FRAMES), HEIGHT // 16, WIDTH // 16)
SIZE = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES}


@torch.no_grad()
def our_latents(ckpt: Path) -> torch.Tensor:
    renderer = renderer_of(ckpt)
    return renderer.student([PROMPT], SEED, SHAPE, renderer.run.timesteps)


@torch.no_grad()
def test_the_teacher_samples_as_the_stock_pipeline_does(trained, folder):
    """With the scheduler of the folder, which is a UniPC of shift 5."""
    with torch.enable_grad():
        renderer = renderer_of(trained({}))
    ours = renderer.teacher([PROMPT], SEED, SHAPE, 4, 5.0, "a dog")
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = SIZE | {"num_inference_steps": 4, "guidance_scale": 5.0, "max_sequence_length": 8}
    generator = torch.Generator().manual_seed(SEED)
    theirs = pipeline(PROMPT, "a dog", **options, generator=generator, output_type="latent").frames
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("file_format", ["diffusers", "comfyui"])
def test_the_stock_pipeline_makes_the_same_video_with_the_lora(trained, folder, tmp_path, file_format):
    ckpt, file = trained({}), tmp_path / "lora.safetensors"
    done("export-lora", "--ckpt", ckpt, "--out", file, "--format", file_format)
    ours = our_latents(ckpt)
    found = {}
    for expand in (True, False):
        pipeline = WanPipeline.from_pretrained(folder, expand_timesteps=expand)
        assert pipeline.config.expand_timesteps is expand
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "lora_scheduler")
        for lora in (False, True):
            if lora:
                pipeline.load_lora_weights(str(file))
            torch.manual_seed(SEED)  # the pipeline hands no generator to its scheduler
            options = SIZE | {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 8}
            found[expand, lora] = pipeline(PROMPT, **options, output_type="latent").frames
        torch.testing.assert_close(found[expand, True], ours, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found[True, True], found[False, True], atol=1e-5, rtol=1e-5)
    assert (found[True, False] - ours).abs().mean() > 0.05


SCRIPT = """
import json, sys
sys.modules["dmdtrain"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline

folders, prompt, seed, size, out = json.loads(sys.argv[1])
found = []
for folder in folders:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    stock, error = type(pipe).__name__ == "WanPipeline", None
    options = {"max_sequence_length": 8, "num_inference_steps": 3, "guidance_scale": 1.0} if stock else {}
    options |= {} if stock else {"generator": torch.Generator().manual_seed(seed)}
    torch.manual_seed(seed)
    latents = pipe(prompt, **size, **options, output_type="latent").frames
    try:
        pipe(prompt, height=48, width=64, num_frames=1, **options, output_type="latent")
    except ValueError as raised:
        error = str(raised)
    found.append((type(pipe).__name__, pipe.config.expand_timesteps, error, latents))
torch.save(found, out)
"""


def test_exported_pipelines_make_the_same_video_without_dmdtrain(trained, tmp_path):
    wanted = []
    for name, changes in (("WanPipeline", {}), ("FewStepWanPipeline", CAUSAL)):
        ckpt, out = trained(changes | {"output_dir": str(tmp_path / f"run {name}")}), tmp_path / name
        assert f"gives a {name}" in done("export-pipeline", "--ckpt", ckpt, "--out", out)
        assert "fps=24" in (out / "README.md").read_text()
        # The stock pipeline makes another size smaller, as it does with every model.
        error = None if name == "WanPipeline" else "height and width must be multiples of 32; they are 48 and 64"
        wanted.append((name, True, error, our_latents(ckpt)))  # expand_timesteps stays what it is in the base
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    folders = [str(tmp_path / name) for name, *_ in wanted]
    command = [
        sys.executable,
        "-B",
        "-c",
        SCRIPT,
        json.dumps([folders, PROMPT, SEED, SIZE, str(tmp_path / "found.pt")]),
    ]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for ours, theirs in zip(wanted, torch.load(tmp_path / "found.pt"), strict=True):
        assert theirs[:3] == ours[:3]
        torch.testing.assert_close(theirs[3], ours[3], atol=2e-5, rtol=1e-5)


def rate_and_size(file: Path) -> tuple[int, int, int, int]:
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        return int(stream.average_rate), stream.frames, stream.width, stream.height


@pytest.mark.parametrize(("changes", "fps"), [({}, 24), (CAUSAL | WARMED, 24), ({"validation.fps": 12}, 12)])
def test_videos_are_written_at_the_models_rate(trained, tmp_path, changes, fps):
    ckpt = trained(changes | {"validation.every": 2})
    files = [tmp_path / "run" / "samples" / "step-000002" / "000_student.mp4", tmp_path / "out" / "000_student.mp4"]
    done("validate", "--ckpt", ckpt, "--compare-teacher", "--teacher-steps", 2, "--out", tmp_path / "out")
    files += [tmp_path / "out" / "000_teacher_2_steps.mp4", tmp_path / "one.mp4"]
    done("generate", "--ckpt", ckpt, PROMPT, "--out", files[-1])
    # Small videos are enlarged by a whole factor.
    assert [rate_and_size(file) for file in files] == [(fps, NUM_FRAMES, 4 * WIDTH, 4 * HEIGHT)] * 4


def test_a_wan_21_still_makes_16_frames_a_second(settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done(
        "synthesize", tmp_path / "run.yaml", "--out", tmp_path / "made", "--what", "videos", "--count", 1, "--steps", 1
    )
    (file,) = (tmp_path / "made").rglob("*.mp4")
    assert rate_and_size(file)[0] == 16


# ---------------------------------------------------------------------------------------------------- the real one


def test_the_published_shape_is_planned_without_a_download():
    config = Path(__file__).parents[1] / "configs" / "wan22_5b.yaml"
    said = done("plan", config, "--gpu", "h100", "--set", "data.resolution=256x128", "--set", "validation.every=0")
    assert 9.2 < float(re.search(r"base +([\d.]+) GiB", said)[1]) < 9.5  # 5.0e9 weights in bf16
    assert "fits in 79.1 GiB yes" in said
    found = find_shapes(HUB_ID, "model.base")
    assert found.latent_shape(31, 704, 1280) == (48, 31, 44, 80) and (found.flow_shift, found.fps) == (5.0, 24)


def test_a_causal_student_of_31_latent_frames_needs_an_independent_first_frame(tmp_path):
    config = Path(__file__).parents[1] / "configs" / "wan22_5b.yaml"
    causal = ["--set", "rollout.causal=true", "--set", "rollout.num_frame_per_block=3"]
    refused(
        "config", "show", config, *causal, says=["rollout.num_training_frames: 31", "30 and 33", "independent_first_"]
    )
    done("config", "show", config, *causal, "--set", "rollout.independent_first_frame=true")
