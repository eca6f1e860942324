"""Videos made, decoded and written block by block: the same as all at once, in memory that does not grow."""

from __future__ import annotations

import json
import shutil
from itertools import cycle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from conftest import done, refused, run_cli

from dmdtrain import config as configuration
from dmdtrain.config import Rollout, build
from dmdtrain.models.causal import KVCache
from dmdtrain.models.decode import StreamDecoder, decode_latents
from dmdtrain.models.wan import find_folder, load_vae
from dmdtrain.train import commands, render, setup
from dmdtrain.train.checkpoint import write_checkpoint
from dmdtrain.train.render import Renderer
from dmdtrain.train.step import for_sampling
from dmdtrain.train.validation import Mp4Writer, to_frames, write_mp4

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, SEED = ["a blue cat", "a red dog runs", "a dog"], 4
STEPS = [1000.0, 757.0, 522.0]
CPU = torch.device("cpu")
ROLLOUTS = {  # all with blocks of two latent frames
    "blocks": {},
    "first frame": {"independent_first_frame": True, "num_training_frames": 5},
    "window": {"local_attention_frames": 3},
    "window and sink": {"local_attention_frames": 4, "sink_frames": 1, "context_noise": 120},
    "bidirectional": {"causal": False},
}


def read_mp4(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ---------------------------------------------------------------------------------------------------- decoding


@pytest.fixture(scope="module", params=["wan_folder", "wan-tiny"])
def vae(request, wan_folder):
    """The random codec and the miniature's, which works on patches of pixels."""
    name = "wan-tiny" if request.param == "wan-tiny" else str(wan_folder)
    return load_vae(find_folder(name, "model.base"))


def random_latents(vae, num_frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, vae.config.z_dim, num_frames, 4, 3, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def at_once(vae, latents: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode(latents * std + mean).sample


def assert_same_video(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_blocks_decode_to_what_the_whole_does(vae):
    latents = random_latents(vae, 7)
    wanted = at_once(vae, latents)
    assert wanted.shape[2] == 25
    assert_same_video(decode_latents(vae, latents), wanted)
    for sizes in ([1, 2, 2, 2], [3, 4], [1] * 7, [6, 1]):
        decoder = StreamDecoder(vae)
        parts = [decoder(block) for block in latents.split(sizes, 2)]
        assert [part.shape[2] for part in parts] == [4 * size - 3 * (i == 0) for i, size in enumerate(sizes)]
        assert_same_video(torch.cat(parts, 2), wanted)


def test_decoders_in_turn_on_one_codec(vae):
    """And beside them whoever else decodes or encodes with it."""
    one, other = random_latents(vae, 5, 1), random_latents(vae, 5, 2)
    wanted = [at_once(vae, latents) for latents in (one, other)]
    decoders, parts = [StreamDecoder(vae), StreamDecoder(vae)], ([], [])
    for blocks in zip(one.split([1, 2, 2], 2), other.split([1, 2, 2], 2), strict=True):
        for decoder, block, found in zip(decoders, blocks, parts, strict=True):
            found.append(decoder(block))
            assert_same_video(at_once(vae, one), wanted[0])
            vae.encode(wanted[1][:, :, :5])
    for found, video in zip(parts, wanted, strict=True):
        assert_same_video(torch.cat(found, 2), video)


def test_a_codec_in_bf16(wan_folder):
    """As a pipeline is loaded in bf16."""
    vae = load_vae(find_folder(str(wan_folder), "x"))
    latents = random_latents(vae, 3)
    wanted = at_once(vae, latents)
    found = decode_latents(vae.to(torch.bfloat16), latents)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert (found - wanted).abs().mean() < 0.02


# ---------------------------------------------------------------------------------------------------- sampling


def values_of(wan_folder: Path, folder: Path, rollout: dict) -> dict:
    rollout = {"causal": True, "num_training_frames": 4, "num_frame_per_block": 2} | rollout
    return {
        "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
        "student": {"rank": 4, "alpha": 8},
        "rollout": rollout,
        "data": {"prompts": "wan-tiny", "resolution": "32x32", "max_sequence_length": 8},
        "train": {"mixed_precision": "no", "gradient_checkpointing": False},
        "validation": {
            "every": 0,
            "resolution": "32x32",
            "prompts": PROMPTS[:1],
            "num_frames": 4 * rollout["num_training_frames"] - 3,
        },
        "log": {"tensorboard": False},
        "output_dir": str(folder),
    }


@pytest.fixture(scope="module")
def students(wan_folder, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each rollout: a student far from its base, without training."""
    root, found = tmp_path_factory.mktemp("students"), {}
    for name, rollout in ROLLOUTS.items():
        config = build(values_of(wan_folder, root / name.replace(" ", "-"), rollout))
        run = setup.resolve(config, for_training=False)
        student = setup.build_roles(run, CPU, trained=("student",)).named_parameters("student")
        generator = torch.Generator().manual_seed(3)
        tensors = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in student.items()}
        texts = {"config.yaml": configuration.dump(config), "sampling.json": setup.sampling_json(run)}
        texts |= {"state.json": json.dumps({"stage": "dmd", "step": 1})}
        found[name] = write_checkpoint(run.output_dir / "checkpoints", 1, {"student": tensors}, texts, 1)
        if name == "blocks":  # the text encoder is loaded once for all
            setup.text_cache(run, CPU).prepare([*PROMPTS, "a cat", ""])
        else:
            shutil.copytree(found["blocks"].parents[1] / "cache", run.output_dir / "cache")
    return found


@pytest.fixture(scope="module")
def renderers(students) -> dict[str, Renderer]:
    found = {}
    for name, ckpt in students.items():
        run = setup.load_run(ckpt)
        found[name] = Renderer(run, setup.load_student(run, ckpt, "raw", CPU), setup.text_cache(run, CPU))
    return found


def shape_of(name: str, blocks: int) -> tuple[int, int, int, int]:
    return 4, 2 * blocks + (name == "first frame"), 4, 4


@pytest.mark.parametrize("name", [name for name in ROLLOUTS if name != "bidirectional"])
def test_a_longer_video_begins_as_the_shorter_one(renderers, name):
    renderer = renderers[name]
    short, long = (
        list(renderer.student_blocks(PROMPTS, [5, 6, 9], shape_of(name, blocks), STEPS)) for blocks in (2, 6)
    )
    assert len(long) == len(short) + 4
    for one, other in zip(short, long, strict=False):
        assert torch.equal(one, other)
    # Every prompt has a seed of its own, whoever is in the batch with it.
    alone = list(renderer.student_blocks(PROMPTS[1:2], [6], shape_of(name, 2), STEPS))
    torch.testing.assert_close(torch.cat(alone, 2), torch.cat(short, 2)[1:2], atol=1e-5, rtol=1e-4)
    other = torch.cat(list(renderer.student_blocks(PROMPTS[1:2], [7], shape_of(name, 2), STEPS)), 2)
    assert (other - torch.cat(alone, 2)).abs().mean() > 0.05


@pytest.mark.parametrize("name", ROLLOUTS)
def test_videos_are_the_decoded_latents(renderers, name, monkeypatch):
    renderer, shape, ticks = renderers[name], shape_of(name, 3), []
    latents = renderer.student(PROMPTS, SEED, shape, STEPS)
    assert latents.shape == (3, *shape)
    # Batches of two prompts: 2 x 2 tokens a frame.
    monkeypatch.setattr(render, "BATCH_TOKENS", 2 * 4 * shape[1])
    videos = renderer.student_videos(PROMPTS, SEED, shape, STEPS, 1.0, "", lambda: ticks.append(None))
    blocks = 1 if name == "bidirectional" else 3 + (name == "first frame")
    assert len(ticks) == renderer.student_steps(3, shape, STEPS) == 2 * blocks * len(STEPS)
    assert videos.shape == (3, 3, 4 * shape[1] - 3, 32, 32)
    torch.testing.assert_close(videos, renderer.decode(latents), atol=2e-5, rtol=0)


def test_guidance_keeps_two_caches(renderers):
    """Guided, a longer video begins as the shorter one, too; unguided it is another."""
    renderer, options = renderers["window and sink"], (2.5, "a dog")
    short, long, unguided = (
        renderer.student(PROMPTS[:1], SEED, shape_of("", blocks), STEPS, *guided)
        for blocks, guided in ((2, options), (4, options), (4, ()))
    )
    assert torch.equal(long[:, :, :4], short)
    assert (long - unguided).abs().mean() > 0.05


# ---------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """Frames in the cache after every write of a layer."""
    work, found = KVCache.write, []

    def write(self, layer, frames, keys, values):
        work(self, layer, frames, keys, values)
        kept = [k.get() for k, _ in self._layers[layer].values()]
        assert {k.shape for k in kept} == {(1, 2 * 4, 2, 12)}  # no views into something larger
        assert all(k.untyped_storage().nbytes() == k.nbytes for k in kept)
        found.append(self.stored_frames())

    monkeypatch.setattr(KVCache, "write", write)
    return found


@pytest.mark.parametrize(("name", "most"), [("window", 2), ("window and sink", 6), ("blocks", 4)])
def test_the_cache_does_not_grow_with_the_video_in_a_rolling_window(students, held, tmp_path, name, most):
    """In a window of three frames a block of two sees one before it; of four, with a sink, two and the first. Whole blocks
    are kept, and one more while it is written. Without a window, what is longer than training has one of its length."""
    peaks = []
    for frames in (29, 4 * 29 + 1):
        held.clear()
        file = tmp_path / f"{frames}.mp4"
        done("generate", "--ckpt", students[name], "a cat", "--out", file, "--frames", frames)
        assert len(read_mp4(file)) == frames
        assert len(held) > 2 * (frames // 8 - 1)
        peaks.append(max(held))
    assert peaks[0] == peaks[1] <= most, peaks


def test_a_window_of_the_training_length_is_for_longer_videos_alone():
    settings = Rollout(causal=True, num_training_frames=6)
    assert for_sampling(settings, 6) == settings and for_sampling(settings, 3) == settings
    assert for_sampling(settings, 9).local_attention_frames == 6
    windowed = Rollout(causal=True, num_training_frames=6, local_attention_frames=12, sink_frames=2)
    assert for_sampling(windowed, 60) == windowed
    bidirectional = Rollout(num_training_frames=6)
    assert for_sampling(bidirectional, 60) == bidirectional


@pytest.mark.parametrize("name", ["window", "window and sink", "blocks"])
def test_what_is_forgotten_was_not_needed(renderers, name, monkeypatch):
    forgetful = renderers[name].student(PROMPTS[:2], SEED, shape_of(name, 7), STEPS)
    new_cache = render.new_cache
    monkeypatch.setattr(render, "new_cache", lambda settings, evict: new_cache(settings, evict=False))
    assert torch.equal(renderers[name].student(PROMPTS[:2], SEED, shape_of(name, 7), STEPS), forgetful)


# ---------------------------------------------------------------------------------------------------- --frames


@pytest.mark.parametrize(
    ("name", "valid", "others"),
    [
        ("blocks", (5, 21), {9: "5 and 13", 17: "13 and 21", 1: "5 and 13"}),
        ("first frame", (9, 25), {13: "9 and 17", 21: "17 and 25", 1: "9 and 17"}),
        ("bidirectional", (1, 17), {}),
    ],
)
def test_how_many_frames(students, tmp_path, monkeypatch, name, valid, others):
    ckpt = students[name]
    for frames in valid:
        file = tmp_path / f"{frames}.mp4"
        done("generate", "--ckpt", ckpt, "a cat", "--out", file, "--frames", frames)
        assert len(read_mp4(file)) == frames
    done("validate", "--ckpt", ckpt, "--out", tmp_path / "v", "--frames", valid[1], "--prompts", prompts_file(tmp_path))
    assert [len(read_mp4(file)) for file in sorted((tmp_path / "v").glob("*.mp4"))] == [valid[1]] * 2

    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup, "load_transformer", forbidden)
    rule = {number: f"the nearest valid counts are {near}" for number, near in others.items()}
    commands = cycle([["validate", "--out", tmp_path / "no"], ["generate", "a cat", "--out", tmp_path / "no.mp4"]])
    for frames, says in (rule | {10: "9 and 13", 0: "--frames: 0", -3: "--frames: -3"}).items():
        command = next(commands)
        refused(command[0], "--ckpt", ckpt, *command[1:], "--frames", frames, says=says)
    too_long = 4 * 1024 + (1 if name == "bidirectional" else 5)
    too_long += 4 * (name == "first frame")
    says = f"--frames: {too_long}: the model has positions for 4093 frames at most"
    refused("generate", "--ckpt", ckpt, "a cat", "--out", tmp_path / "no.mp4", "--frames", too_long, says=says)
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.mp4").exists()


def prompts_file(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder / "prompts.txt"


def test_the_runs_own_length_must_fit_its_blocks(wan_folder, tmp_path):
    values = values_of(wan_folder, tmp_path / "run", {})
    values["validation"]["num_frames"] = 9
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    refused("fit", tmp_path / "run.yaml", says="the nearest valid counts are 5 and 13")


# ---------------------------------------------------------------------------------------------------- files


def moving(num_frames: int) -> torch.Tensor:
    """[3, T, 32, 48] in [-1, 1], smooth."""
    t, y, x = torch.meshgrid(torch.arange(num_frames), torch.arange(32), torch.arange(48), indexing="ij")
    return torch.stack([torch.sin(0.2 * (x + t)), torch.cos(0.3 * y), torch.sin(0.1 * (x - y) + 0.5 * t)])


@pytest.mark.parametrize("min_edge", [1, 128])
def test_a_file_written_in_chunks_is_the_file_written_at_once(tmp_path, min_edge):
    video = moving(13)
    write_mp4(tmp_path / "once.mp4", video, 16, min_edge)
    with Mp4Writer(tmp_path / "chunks.mp4", 16, min_edge) as writer:
        for chunk in video.split([1, 4, 8], 1):
            writer.write(chunk)
            assert not (tmp_path / "chunks.mp4").exists()  # a file with that name is whole
    assert sorted(f.name for f in tmp_path.iterdir()) == ["chunks.mp4", "once.mp4"]
    frames, once = (read_mp4(tmp_path / f"{name}.mp4").astype(int) for name in ("chunks", "once"))
    wanted = to_frames(video, min_edge)
    assert frames.shape == once.shape == wanted.shape
    assert np.abs(frames - wanted).mean() < 8
    assert np.abs(frames - once).mean() < 1.5  # no two files of the encoder are alike to the bit


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_was_not_finished_is_not_there(tmp_path, error):
    def write(fails_after: int) -> None:
        with Mp4Writer(tmp_path / "one.mp4", 16) as writer:
            for chunk in moving(9).split([1] * fails_after + [9 - fails_after], 1)[:fails_after]:
                writer.write(chunk)
            raise error

    for fails_after in (0, 1, 3):
        with pytest.raises(error):
            write(fails_after)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "one.mp4").write_bytes(b"what was there")
    with pytest.raises(error):
        write(2)
    assert (tmp_path / "one.mp4").read_bytes() == b"what was there"


def test_generate_that_is_interrupted_leaves_no_file(students, tmp_path, monkeypatch):
    class Interrupted(StreamDecoder):
        calls = 0

        def __call__(self, latents):
            Interrupted.calls += 1
            if Interrupted.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(latents)

    monkeypatch.setattr(commands, "StreamDecoder", Interrupted)
    out = tmp_path / "out" / "one.mp4"
    result = run_cli("generate", "--ckpt", students["blocks"], "a cat", "--out", out, "--frames", 13)
    assert result.exit_code == 130 and Interrupted.calls == 2
    assert list(out.parent.iterdir()) == []
