"""Other data than a checkpoint was saved with: a resume refuses them before it loads a model, a branch begins a new epoch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from clip_files import write_clip
from conftest import done, refused
from safetensors.torch import load_file, save_file
from test_real_clips import spoil
from test_resume import assert_same_to_the_bit
from test_underway import signed

from dmdtrain.data.buckets import Seen, hashes
from dmdtrain.data.prompts import split

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["a red cat runs", "a blue dog sleeps", "a cat on grass", "a dog"]
BRANCH = "a branch takes others: dmdtrain fit CONFIG --resume CHECKPOINT --output-dir NEW_FOLDER"
CLIPS = {"data.videos": "CLIPS", "dmd.real_data_loss_weight": 0.5}
WARM = {
    "rollout.causal": True,
    "rollout.num_frame_per_block": 1,
    "warmup.kind": "teacher_forcing",
    "warmup.steps": 4,
    "warmup.num_samples": 3,
    "warmup.teacher_steps": 2,
}


@pytest.fixture
def write(settings, tmp_path) -> Callable[..., Path]:
    """The configuration of a run of four steps, on clips and prompts in tmp_path, with changes."""
    settings["rollout"] = {"num_training_frames": 2}
    settings["data"] |= {"resolution": "32x32", "cache_dir": str(tmp_path / "cache")}
    settings["validation"] |= {"every": 0}
    settings["checkpoint"] = {"every": 1, "keep": 10}
    settings["log"] = {"tensorboard": False}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def config_file(changes: dict | None = None) -> Path:
        for key, value in (changes or {}).items():
            group, _, name = key.partition(".")
            settings.setdefault(group, {})[name] = str(tmp_path / "clips") if value == "CLIPS" else value
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    return config_file


def clip(folder: Path, number: int, caption: str | None = None) -> Path:
    frames = list(np.random.default_rng(number).integers(0, 256, (5, 32, 32, 3), np.uint8))
    return write_clip(folder / f"{number}.mp4", 5, (32, 32), caption=caption or f"a cat {number}", frames=frames)


@pytest.fixture
def clips(tmp_path) -> Path:
    for number in range(3):
        clip(tmp_path / "clips", number)
    return tmp_path / "clips"


@pytest.fixture
def without_models() -> Iterator[Callable[[], pytest.MonkeyPatch]]:
    """From then on, until it is undone, loading a model fails."""
    patch = pytest.MonkeyPatch()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    def closed() -> pytest.MonkeyPatch:
        for name in ("train.setup.load_transformer", "models.encode.load_text_encoder", "train.prepare_videos.codec"):
            patch.setattr(f"dmdtrain.{name}", refuse)
        return patch

    yield closed
    patch.undo()


def write_prompts(*lines: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "prompts.txt").write_text("\n".join(lines))


def replace_clip(folder: Path) -> None:
    clip(folder / "clips", 1).rename(folder / "other.mp4")
    clip(folder / "clips", 7).rename(folder / "clips" / "1.mp4")
    (folder / "clips" / "7.txt").unlink()


def synthesize_more(folder: Path) -> None:
    done("synthesize", folder / "run.yaml", "--out", folder / "made", "--count", 4, "--steps", 2)


def recaption(folder: Path) -> None:
    (folder / "clips" / "1.txt").write_text("a dog on grass")


def add_clip(folder: Path) -> None:
    clip(folder / "clips", 3)


def remove_clip(folder: Path) -> None:
    for suffix in ("mp4", "txt"):
        (folder / "clips" / f"1.{suffix}").unlink()


def told(now: int, before: int, added: int, removed: int) -> str:
    return f"{now} items now, {before} when the checkpoint was saved ({added} added, {removed} removed)"


ADDED, REMOVED, BOTH = "(1 added, 0 removed)", "(0 added, 1 removed)", "(1 added, 1 removed)"
VIDEOS, FOLDER = {"data.videos": "CLIPS"}, {"warmup.data": "MADE"}
more_prompts = write_prompts(*PROMPTS, "a cat")
# What a run takes, what is done to it, and what is told of it; those with a warm-up are gone on from within it.
CASES: dict[str, tuple[dict, Callable[[Path], object], list[str]]] = {
    "a prompt added": ({}, more_prompts, [f"data.prompts: {told(5, 4, 1, 0)}"]),
    "a prompt removed": ({}, write_prompts(*PROMPTS[1:]), [f"data.prompts: {told(3, 4, 0, 1)}"]),
    "a prompt changed": ({}, write_prompts(*PROMPTS[1:], "a red cat"), ["data.prompts: ", BOTH]),
    "another order": ({}, write_prompts(*PROMPTS[::-1]), ["data.prompts: ", "not in the same order"]),
    "a clip added": (CLIPS, add_clip, ["data.videos: 4 items now", ADDED]),
    "a clip removed": (CLIPS, remove_clip, ["data.videos: 2 items now", REMOVED]),
    "a clip replaced under its name": (CLIPS, replace_clip, ["data.videos: 3 items now", BOTH]),
    "a caption changed": (CLIPS, recaption, ["data.videos: 3 items now", BOTH]),
    "a prompt that is a caption": (CLIPS | {"data.prompts": None}, recaption, ["data.prompts: ", "; data.videos: "]),
    "a clip of the warm-up": (WARM | VIDEOS, add_clip, ["data.videos: 4 items now", ADDED]),
    "a clip of warmup.data": (WARM | {"warmup.data": "CLIPS"}, add_clip, ["warmup.data: 4 items now", ADDED]),
    "a clip of the stage after": (WARM | CLIPS | FOLDER, add_clip, ["data.videos: 4 items now", ADDED]),
    "the teacher's prompts": (WARM, more_prompts, ["data.prompts: 5 items now", "; warmup.data: "]),
    "samples of a folder": (WARM | FOLDER, synthesize_more, [f"warmup.data: {told(4, 3, 1, 0)}"]),
}


def random_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "random.safetensors")


def only(checkpoint: Path) -> None:
    """Removes a run's other checkpoints."""
    for folder in checkpoint.parents[1].glob("*/step-*"):
        if folder != checkpoint and folder.parent.name in ("warmup", "checkpoints"):
            shutil.rmtree(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_resume_refuses_other_data_and_a_branch_begins_a_new_epoch(case, write, clips, tmp_path, without_models):
    changes, edit, says = CASES[case]
    stage = "warmup" if "warmup.kind" in changes else "checkpoints"
    made = str(tmp_path / "made")
    changes = {key: made if value == "MADE" else value for key, value in changes.items()}
    file = write(changes | {"warmup.data": None} if "warmup.data" in changes else changes)
    if made in changes.values():
        done("synthesize", file, "--out", made, "--count", 3, "--steps", 2)
    file, run, branch = write(changes), tmp_path / "run", tmp_path / "branch"
    steps = ("--max-steps", 3)
    done("fit", file, *steps)
    ckpt = run / stage / "step-000002"
    only(ckpt)
    edit(tmp_path)
    listing = sorted(run.rglob("*"))
    patch = without_models()
    for more in ((), ("--dry-run",)):
        refused("fit", file, *steps, *more, says=[*says, "an exact resume needs the same", BRANCH])
    assert sorted(run.rglob("*")) == listing
    branching = ("fit", file, *steps, "--resume", ckpt, "--output-dir", branch)
    said = done(*branching, "--dry-run")
    patch.undo()
    for printed in (said, done(*branching)):
        assert f"branch of {ckpt} changed {says[0]}" in printed and "a new epoch of the " in printed
    # Its samplers begin anew over the new data; the generators go on, and so does its own resume, to the bit.
    before, after = random_of(ckpt), random_of(branch / stage / "step-000002")
    assert torch.equal(before["draws"], after["draws"])
    keys = {says[0].partition(":")[0]} | {part[2:].partition(":")[0] for part in says if part.startswith("; ")}
    prefixes = {"data.prompts": "prompts", "data.videos": "files" if "of the warm-up" in case else "real.clips"}
    for key in keys:
        prefix = prefixes.get(key, "files")
        if f"{prefix}.generator" in after:
            assert after.get(f"{prefix}.order", after.get(f"{prefix}.orders")).numel() == 0
            assert not torch.equal(before[f"known.{prefix}"], after[f"known.{prefix}"])
    whole = branch.rename(tmp_path / "whole")
    shutil.copytree(whole, branch)
    only(branch / stage / "step-000002")
    assert "resumed from" in done("fit", file, *steps, "--output-dir", branch)
    for step in [*whole.glob("warmup/step-*"), *whole.glob("checkpoints/step-*")]:
        if stage == "warmup" or step.name > "step-000002":
            assert_same_to_the_bit(step, branch / step.relative_to(whole))


def test_what_was_kept_from_training_stays_apart():
    texts = [f"prompt {number}" for number in range(40)]
    trained, kept = split(texts, 5)
    seen = Seen(frozenset(hashes(kept).tolist()), frozenset(hashes(trained).tolist()))
    more = [*texts, *(f"new {number}" for number in range(40))]
    assert set(kept) - set(split(more, 5)[1])  # what content alone would choose is trained on
    assert split(more, 5, seen)[1] == kept and set(kept).isdisjoint(split(more, 5, seen)[0])
    fewer = [text for text in more if text not in kept[:2]]
    now = split(fewer, 5, seen)[1]
    assert now[:3] == kept[2:] and len(now) == 5 and set(now).isdisjoint(texts[:0] + trained)
    assert split(texts[:0] + trained + kept[:1], 5, seen)[1] == kept[:1]  # nothing else is new
    assert split(texts, 0, seen) == (texts, [])


@pytest.mark.parametrize("kind", ["prompts", "clips"])
def test_a_branch_trains_on_nothing_that_was_held_out(kind, write, clips, tmp_path, without_models):
    """Where the content of what is added would take its place; also when the branch is resumed, and branched off again."""
    held = {"validation.every": 2}
    held |= {"validation.held_out_prompts": 1} if kind == "prompts" else CLIPS | {"validation.real_clips": 1}
    file, name = write(held), f"known.kept.{kind}"
    done("fit", file, "--max-steps", 2)
    ckpt = tmp_path / "run" / "checkpoints" / "step-000002"
    (kept,) = random_of(ckpt)[name].tolist()
    if kind == "prompts":
        more = next(text for n in range(99) if split([*PROMPTS, text := f"a dog {n}"], 1)[1] == [text])
        write_prompts(*PROMPTS, more)(tmp_path)
        assert int(hashes(split(PROMPTS, 1)[1])) == kept
    else:
        for number in range(3, 8):  # one of them has the smallest hash of all
            clip(clips, number)
    first, second = tmp_path / "first", tmp_path / "second"
    done("fit", file, "--resume", ckpt, "--output-dir", first, "--max-steps", 3)
    done("fit", file, "--output-dir", first, "--max-steps", 4)
    newest = first / "checkpoints" / "step-000004"
    assert "changed" not in done("fit", file, "--resume", newest, "--output-dir", second, "--max-steps", 5)
    for found in (random_of(newest), random_of(second / "checkpoints" / "step-000005")):
        assert found[name].tolist() == [kept]
        trained = "known.prompts" if kind == "prompts" else "known.trained.clips"
        assert kept not in found[trained].tolist() and len(found[trained]) == (4 if kind == "prompts" else 7)
    if kind == "prompts":
        results = (first / "samples" / "step-000004" / "results.json").read_text()
        assert split(PROMPTS, 1)[1][0] in results and more not in results


def earlier(checkpoint: Path, *names: str) -> None:
    """As an earlier version saved it, without what is known of the data."""
    kept = {key: value for key, value in random_of(checkpoint).items() if not key.startswith(("known.", *names))}
    save_file(kept, checkpoint / "random.safetensors")
    signed(checkpoint)


def test_a_checkpoint_that_does_not_say_what_each_prompt_was(write, tmp_path, without_models):
    file, ckpt = write(), tmp_path / "run" / "checkpoints" / "step-000002"
    done("fit", file, "--max-steps", 2)
    earlier(ckpt)
    done("fit", file, "--dry-run")
    write_prompts(*PROMPTS, "a cat")(tmp_path)
    patch = without_models()
    refused("fit", file, says=["data.prompts: 5 items now, 4 when the checkpoint was saved; an exact resume", BRANCH])
    patch.undo()
    said = done("fit", file, "--resume", ckpt, "--output-dir", tmp_path / "branch")
    assert "changed data.prompts: 5 items now, 4 when the checkpoint was saved; a new epoch" in said


def test_a_branch_of_a_warm_up_that_does_not_say_what_its_samples_were(write, tmp_path):
    """It is resumed as ever; a branch can not know, and begins a new epoch."""
    file, ckpt = write(WARM), tmp_path / "run" / "warmup" / "step-000002"
    done("fit", file, "--max-steps", 2)
    only(ckpt)
    earlier(ckpt, "files.digest", "prompts.")
    assert "dry run" in done("fit", file, "--max-steps", 2, "--dry-run")
    said = done("fit", file, "--max-steps", 2, "--resume", ckpt, "--output-dir", tmp_path / "branch", "--dry-run")
    assert "changed warmup.data: the checkpoint does not say what they were; a new epoch of the samples" in said
    assert "changed" not in done("fit", file, "--max-steps", 2)


def test_a_clip_that_can_not_be_decoded_is_no_other_data_where_the_cache_is_lost(write, clips, tmp_path):
    spoil(clip(clips, 9))
    file, ckpt = write(CLIPS), tmp_path / "run" / "checkpoints" / "step-000002"
    assert "1 clips could not be read or decoded and are left out" in done("fit", file, "--max-steps", 2)
    shutil.rmtree(tmp_path / "cache")
    assert "changed" not in done("fit", file, "--resume", ckpt, "--output-dir", tmp_path / "a", "--dry-run")
    shutil.rmtree(tmp_path / "cache")
    assert "resumed from" in done("fit", file, "--max-steps", 3)
    clip(clips, 5)
    shutil.rmtree(tmp_path / "cache")
    refused("fit", file, says=["data.videos: ", " added, 0 removed)", BRANCH])
