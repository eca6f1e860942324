"""`dmdtrain synthesize`: the teacher's ODE, what of it is kept, and going on with a folder."""

from __future__ import annotations

import copy
import hashlib
import json
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from conftest import refused, run_cli
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmdtrain.config import ConfigError
from dmdtrain.data.latents import LatentFolder, read_latents
from dmdtrain.models import encode
from dmdtrain.models.decode import decode_latents
from dmdtrain.train import render, setup

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red cat runs", "a blue dog sleeps", "a cat on grass"]
SHAPE, SEED, STEPS, SCALE, NEGATIVE = (4, 3, 4, 6), 5, 4, 2.5, "a dog"
ULP = 2**-10  # of float16, of a value: at least one


def write_config(folder: Path, wan_folder: Path, changes: dict | None = None) -> Path:
    settings = {
        "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
        "student": {"rank": 4, "alpha": 8},
        "dmd": {"real_score_guidance_scale": SCALE},
        "rollout": {"causal": True, "num_training_frames": 3},
        "data": {
            "prompts": str(folder / "prompts.txt"),
            "negative_prompt": NEGATIVE,
            "resolution": "48x32",
            "max_sequence_length": 8,
        },
        "train": {"mixed_precision": "no", "max_steps": 1, "gradient_checkpointing": False},
        "validation": {"every": 0, "num_frames": 9, "resolution": "48x32", "prompts": ["a cat"]},
        "log": {"tensorboard": False},
        "output_dir": str(folder / "run"),
    }
    for key, value in (changes or {}).items():
        group, name = key.split(".")
        settings.setdefault(group, {})[name] = value
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def synthesize(config: Path, out: Path, *options: object) -> str:
    result = run_cli("synthesize", config, "--out", out, "--steps", STEPS, "--seed", SEED, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output.replace("\n", " ")


@pytest.fixture(scope="module")
def whole(wan_folder, tmp_path_factory) -> Path:
    """config in run.yaml; all states of 5 trajectories in `all`, those of the student in `some`, and latents."""
    folder = tmp_path_factory.mktemp("synthesize")
    config = write_config(folder, wan_folder)
    synthesize(config, folder / "all", "--count", 5, "--every-state")
    synthesize(config, folder / "some")
    synthesize(config, folder / "latents", "--what", "latents")
    return folder


@pytest.fixture
def config(whole) -> Path:
    return whole / "run.yaml"


def sample(folder: Path, index: int) -> tuple[str, dict[str, torch.Tensor]]:
    file = folder / "samples" / f"{index:06d}.safetensors"
    with safe_open(file, "pt") as opened:
        caption = opened.metadata()["caption"]
    return caption, load_file(file)


def facts(folder: Path) -> dict:
    return json.loads((folder / "latents.json").read_text())


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything below a folder, with its time of change."""
    found = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in found}


def copied(folder: Path, to: Path) -> Path:
    (to / "samples").mkdir(parents=True)
    for file in (f for f in folder.rglob("*") if f.is_file()):
        (to / file.relative_to(folder)).write_bytes(file.read_bytes())
    return to


@pytest.fixture(scope="module")
def teacher(wan_folder):
    """The flow of the stock transformer, guided by hand, of one prompt."""
    pipeline = WanPipeline.from_pretrained(wan_folder)

    @torch.no_grad()
    def flow(caption: str, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        context, negative = pipeline.encode_prompt([caption], NEGATIVE, max_sequence_length=8)
        t = torch.tensor([1000.0 * sigma])
        cond, uncond = (pipeline.transformer(latents, t, c, return_dict=False)[0] for c in (context, negative))
        return uncond + SCALE * (cond - uncond)

    return flow


def own_sigmas(wan_folder: Path) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(wan_folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    return [float(s) for s in scheduler.sigmas]


def by_hand(flow, caption: str, index: int, sigmas: list[float]) -> list[torch.Tensor]:
    states = [torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(SEED + index))]
    for sigma, following in pairwise(sigmas):
        states.append(states[-1] + (following - sigma) * flow(caption, states[-1], sigma))
    return states


def assert_as_stored(stored: torch.Tensor, wanted: torch.Tensor) -> None:
    assert stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), wanted.float(), rtol=ULP, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- what is made


def test_the_states_are_the_teachers_ode(whole, wan_folder, teacher):
    kept = facts(whole / "all")["timesteps"]
    own = own_sigmas(wan_folder)
    assert kept == sorted(kept, reverse=True) and kept[0] == 1000
    # Its own grid, cut where the student's steps lie.
    assert sorted({*own[:-1], 0.757, 0.522}, reverse=True) == pytest.approx([t / 1000 for t in kept], abs=1e-6)
    for index in (0, 4):
        caption, stored = sample(whole / "all", index)
        states = by_hand(teacher, caption, index, [*(t / 1000 for t in kept), 0.0])
        assert stored["states"].shape == (len(kept), *SHAPE) and stored["latents"].shape == SHAPE
        assert torch.equal(stored["states"][0], states[0][0].half())  # at t = 1000: the seeded noise
        for state, wanted in zip([*stored["states"], stored["latents"]], states, strict=True):
            assert_as_stored(state, wanted[0])
        # Guidance and the caption matter, or the comparison above would say little.
        other = by_hand(teacher, "a cat", index, [*(t / 1000 for t in kept), 0.0])
        assert (other[-1] - states[-1]).abs().mean() > 0.05


def test_a_trajectory_keeps_the_states_that_the_student_starts_from(whole):
    kept = facts(whole / "all")["timesteps"]
    assert facts(whole / "some")["timesteps"] == [1000, 757, 522]
    assert facts(whole / "all")["latent_shape"] == list(SHAPE)
    at = [kept.index(t) for t in (1000, 757, 522)]
    assert len(LatentFolder.open(whole / "some", "x").files()) == len(PROMPTS)  # one a prompt
    for index in range(len(PROMPTS)):
        (caption, every), (same_caption, some) = (sample(whole / name, index) for name in ("all", "some"))
        assert caption == same_caption
        assert_as_stored(some["states"], every["states"][at])
        assert_as_stored(some["latents"], every["latents"])


def test_latents_are_the_teachers_own_samples(whole, wan_folder, teacher):
    assert facts(whole / "latents")["timesteps"] is None
    for index in (0, 2):
        caption, stored = sample(whole / "latents", index)
        assert set(stored) == {"latents"}
        assert_as_stored(stored["latents"], by_hand(teacher, caption, index, own_sigmas(wan_folder))[-1][0])


def test_every_prompt_comes_once_an_epoch(whole):
    captions = [sample(whole / "all", index)[0] for index in range(5)]
    assert sorted(captions[:3]) == sorted(PROMPTS) and len(set(captions[3:])) == 2


def test_videos_with_their_captions(whole, config, wan_folder, tmp_path):
    synthesize(config, tmp_path / "videos", "--what", "videos", "--count", 2)
    names = sorted(f.name for f in (tmp_path / "videos" / "samples").iterdir())
    assert names == ["000000.mp4", "000000.txt", "000001.mp4", "000001.txt"]
    vae = WanPipeline.from_pretrained(wan_folder, transformer=None, text_encoder=None, tokenizer=None).vae
    shown = []
    for index in range(2):
        caption, stored = sample(whole / "latents", index)
        clip = tmp_path / "videos" / "samples" / f"{index:06d}.mp4"
        assert clip.with_suffix(".txt").read_text() == caption + "\n"
        with av.open(str(clip)) as container:
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        assert frames.shape == (9, 32, 48, 3)
        wanted = decode_latents(vae, stored["latents"][None].float())[0].permute(1, 2, 3, 0)
        luma = torch.tensor([0.299, 0.587, 0.114])  # colours are stored at half the size
        shown.append(((torch.from_numpy(frames) / 127.5 - 1) @ luma, wanted @ luma))
    apart = [[float((a - b).abs().mean()) for _, b in shown] for a, _ in shown]
    assert apart[0][0] < apart[0][1] / 4 and apart[1][1] < apart[1][0] / 4, apart


def test_another_file_of_prompts(config, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a cat runs on grass\n\n a red dog \n")
    synthesize(config, tmp_path / "made", "--prompts", other, "--what", "latents")
    captions = [sample(tmp_path / "made", index)[0] for index in range(2)]
    assert sorted(captions) == ["a cat runs on grass", "a red dog"]
    sums = [facts(tmp_path / "made")["prompts_sha256"]]
    assert sums == [hashlib.sha256(b"a cat runs on grass\na red dog").hexdigest()]
    made = files(tmp_path / "made")
    says = ["--out: ", "was made otherwise", "prompts_sha256"]
    refused("synthesize", config, "--out", tmp_path / "made", "--what", "latents", "--steps", 4, "--seed", 5, says=says)
    assert files(tmp_path / "made") == made


# ---------------------------------------------------------------------------------------------------- going on


def test_what_is_missing_is_made_again_and_nothing_else(whole, config, tmp_path):
    folder = copied(whole / "all", tmp_path / "all")
    before = files(folder)
    lost = [f"samples/{index:06d}.safetensors" for index in (1, 4)]
    for name in lost:
        (folder / name).unlink()
    (folder / "samples" / ".000001.4711.partial").write_bytes(b"of a killed process")
    output = synthesize(config, folder, "--count", 5, "--every-state")
    assert "2 to make" in output
    after = files(folder)
    assert after.keys() == before.keys()
    for name in after.keys() - {*lost, "latents.json"}:
        assert after[name] == before[name], name
    assert after["latents.json"][0] == before["latents.json"][0]
    for index in (1, 4):  # to the bit, as rounding follows the batch
        (caption, stored), (same_caption, wanted) = sample(folder, index), sample(whole / "all", index)
        assert caption == same_caption and stored.keys() == wanted.keys()
        assert all(torch.equal(stored[key], wanted[key]) for key in wanted)


def test_more_samples_begin_with_the_same(whole, config, tmp_path):
    folder = copied(whole / "some", tmp_path / "some")
    before = files(folder)
    assert "2 to make" in synthesize(config, folder, "--count", 5)
    after = files(folder)
    assert len(after) == len(before) + 2
    for name in before.keys() - {"latents.json"}:
        assert after[name] == before[name], name
    kept = facts(whole / "all")["timesteps"]
    at = [kept.index(t) for t in (1000, 757, 522)]
    for index in (3, 4):  # the same as if five had been asked for at once
        (caption, stored), (same_caption, wanted) = sample(folder, index), sample(whole / "all", index)
        assert caption == same_caption and torch.equal(stored["states"], wanted["states"][at])


def test_fewer_samples_leave_the_others_alone(whole, config):
    before = {k: v for k, v in files(whole / "all").items() if k != "latents.json"}
    assert "0 to make" in synthesize(config, whole / "all", "--count", 2, "--every-state")
    assert {k: v for k, v in files(whole / "all").items() if k != "latents.json"} == before


def test_a_finished_folder_needs_no_models(whole, config, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup, "load_transformer", forbidden)
    before = {k: v for k, v in files(whole / "some").items() if k != "latents.json"}
    assert "0 to make" in synthesize(config, whole / "some")
    assert {k: v for k, v in files(whole / "some").items() if k != "latents.json"} == before


def test_the_text_encoder_is_loaded_once(wan_folder, tmp_path, monkeypatch):
    """Of Wan it is the largest part; batches of one video are what a large teacher makes."""
    work, calls = encode.load_text_encoder, []

    def load(folder, precision, quantize_on):
        calls.append(precision)
        return work(folder, precision, quantize_on)

    monkeypatch.setattr(encode, "load_text_encoder", load)
    monkeypatch.setattr(render, "BATCH_TOKENS", 1)
    config = write_config(tmp_path, wan_folder)
    synthesize(config, tmp_path / "made", "--what", "latents")
    assert len(calls) == 1


def test_what_another_is_writing_is_left_alone(tmp_path):
    facts = {"what": "latents", "latent_shape": list(SHAPE), "timesteps": None}
    writer = LatentFolder.create(tmp_path / "made", facts, "--out")
    half = writer.file(0).with_name(f".{writer.file(0).name}.1.partial")
    half.write_bytes(b"half")
    LatentFolder.create(tmp_path / "made", facts, "--out")
    assert half.exists()
    del writer
    LatentFolder.create(tmp_path / "made", facts, "--out")
    assert not half.exists()


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def no_models(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup, "load_transformer", forbidden)


OTHERWISE = [  # options, changes of the configuration -> the fact that differs
    (["--steps", 5], {}, "steps: 4, now 5"),
    (["--seed", 6], {}, "seed: 5, now 6"),
    (["--what", "latents"], {}, "what: 'trajectories', now 'latents'"),
    (["--every-state"], {}, "timesteps: [1000.0, 757.0, 522.0], now [1000.0, "),
    ([], {"dmd.real_score_guidance_scale": 4}, "guidance_scale: 2.5, now 4"),
    ([], {"data.negative_prompt": "a cat"}, "negative_prompt: 'a dog', now 'a cat'"),
    ([], {"model.flow_shift": 5}, "flow_shift: 3.0, now 5"),
    ([], {"data.resolution": "32x32"}, "latent_shape: [4, 3, 4, 6], now [4, 3, 4, 4]"),
    ([], {"rollout.num_training_frames": 6}, "latent_shape: [4, 3, 4, 6], now [4, 6, 4, 6]"),
    ([], {"dmd.denoising_steps": [1000, 500]}, "timesteps: [1000.0, 757.0, 522.0], now [1000.0, 500.0]"),
]


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(("options", "changes", "says"), OTHERWISE, ids=lambda v: v if isinstance(v, str) else "")
def test_other_settings_in_the_same_folder(whole, wan_folder, tmp_path, options, changes, says):
    before = files(whole / "some")
    file = write_config(tmp_path, wan_folder, changes)
    base = ["synthesize", file, "--out", whole / "some", "--steps", STEPS, "--seed", SEED]
    refused(*base, *options, says=["--out: ", "was made otherwise", says, "choose another"])
    assert files(whole / "some") == before


@pytest.mark.usefixtures("no_models")
def test_folders_that_are_no_latents(config, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    refused("synthesize", config, "--out", foreign, says=[f"--out: {foreign} exists and holds no latents"])
    assert [f.name for f in foreign.iterdir()] == ["thesis.txt"]
    file = foreign / "thesis.txt"
    refused("synthesize", config, "--out", file, says=[f"--out: {file} exists and holds no latents"])
    refused("synthesize", config, "--out", file / "below", says=[f"--out: {file / 'below'}"])
    for text in ("{", "[]", '{"what": "latents"}', "\x00"):
        (foreign / "latents.json").write_text(text)
        refused("synthesize", config, "--out", foreign, says=[f"--out: {foreign}: latents.json is broken"])


@pytest.mark.usefixtures("no_models")
def test_options_that_do_not_fit(config, tmp_path):
    out = tmp_path / "out"
    says = ["--what: films: valid are trajectories, latents, videos"]
    refused("synthesize", config, "--out", out, "--what", "films", says=says)
    for what in ("latents", "videos"):
        says = [f"--every-state: {what} have no states; valid is --what trajectories"]
        refused("synthesize", config, "--out", out, "--what", what, "--every-state", says=says)
    refused("synthesize", config, "--out", out, "--prompts", tmp_path / "none.txt", says=["none.txt: no such file"])
    (tmp_path / "empty.txt").write_text("\n \n")
    refused("synthesize", config, "--out", out, "--prompts", tmp_path / "empty.txt", says=["no prompts in it"])
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------- broken samples


@pytest.mark.parametrize("damage", ["cut short", "a bit", "another caption"])
def test_a_broken_sample_is_told_by_the_warm_up_that_reads_it(whole, wan_folder, tmp_path, damage):
    folder = copied(whole / "some", tmp_path / "some")
    broken = folder / "samples" / "000001.safetensors"
    content = bytearray(broken.read_bytes())
    content[content.index(b"caption") + 10 if damage == "another caption" else -100] ^= damage != "cut short"
    broken.write_bytes(content[:-100] if damage == "cut short" else content)
    changes = {"warmup.kind": "ode_regression", "warmup.steps": 3, "warmup.data": str(folder)}
    file = write_config(tmp_path, wan_folder, changes)
    refused("fit", file, says=[f"{broken} is broken: ", "delete it and run dmdtrain synthesize again"])


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"latents": torch.zeros(SHAPE)}, None),
        ({"latents": torch.zeros(SHAPE)}, {"text": "a cat"}),
        ({"states": torch.zeros(3, *SHAPE)}, {"caption": "a cat"}),
    ],
    ids=["no header", "no caption", "no latents"],
)
def test_samples_that_lack_something(tmp_path, tensors, metadata):
    save_file(copy.deepcopy(tensors), tmp_path / "000000.safetensors", metadata=metadata)
    with pytest.raises(ConfigError, match=r"000000\.safetensors is broken: [^\n]*; delete it"):
        read_latents([tmp_path / "000000.safetensors"], 3)
