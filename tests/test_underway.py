"""A signal or an error within a step: a signal is answered after the micro-batch in hand, nothing that is computed is lost, and
the resumed run comes to the same bits."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clip_files import write_clip
from conftest import done, refused, run_cli
from safetensors.torch import load_file, save_file
from test_damaged import signed

from dmdtrain.train import warmup
from dmdtrain.train.checkpoint import check_checkpoint, list_checkpoints
from dmdtrain.train.step import Distiller
from dmdtrain.train.underway import Underway

pytestmark = pytest.mark.usefixtures("one_thread")

MACHINE = ("seconds", "memory_gib", "model_")  # metrics of how fast it went


@pytest.fixture
def write(settings, tmp_path) -> Callable[..., Path]:
    """The configuration of a run of two steps whose updates have three micro-batches of a video."""

    def config_file(changes: dict[str, Any]) -> Path:
        defaults: dict[str, Any] = {"train.max_steps": 2, "train.batch_size": 1, "train.gradient_accumulation": 3}
        defaults |= {"dmd.generator_update_interval": 1, "checkpoint.every": 1, "checkpoint.keep": 99}
        defaults |= {"validation.every": 0, "log.tensorboard": False, "data.resolution": "32x32"}
        defaults |= {"data.caption_dropout": 0.3, "rollout.num_training_frames": 2}
        for key, value in (defaults | changes).items():
            group, name = key.split(".")
            settings.setdefault(group, {})[name] = value
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    return config_file


class MicroBatches:
    """Counts the micro-batches of this process, and does things to the models while some are made."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.count, self.at = 0, dict[int, Callable[[Any], object]]()
        for owner, name in (
            (Distiller, "student_backward"),
            (Distiller, "critic_backward"),
            (warmup, "warmup_backward"),
        ):
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, work: Callable) -> Callable:
        def backward(models: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.at.get(self.count, lambda _: None)(models)
            return work(models, *args, **kwargs)

        return backward


@pytest.fixture
def made(monkeypatch) -> MicroBatches:
    return MicroBatches(monkeypatch)


def interrupted(made: MicroBatches, number: int, *args: object) -> str:
    """What a run said that got a signal in its micro-batch of that number, and left after it."""
    made.count, made.at = 0, made.at | {number: lambda _: os.kill(os.getpid(), signal.SIGTERM)}
    result = run_cli("fit", *args)
    made.at = {}
    assert result.exit_code == 75, (result.output, result.exception)
    assert made.count == number
    assert "interrupted; the last checkpoint is intact" in result.stderr
    return " ".join(result.output.split())


def metrics(run: Path) -> dict[str, list[dict]]:
    """Lines of both stages, but for what the machine decides."""
    logs = {str(f.relative_to(run)): f.read_text().splitlines() for f in run.rglob("metrics.jsonl")}
    plain = {k: [json.loads(line) for line in lines] for k, lines in logs.items()}
    return {k: [{n: v for n, v in x.items() if not n.startswith(MACHINE)} for x in xs] for k, xs in plain.items()}


def content(checkpoint: Path) -> dict[str, object]:
    """Tensors, counters, optimizers: everything but what names the folder."""
    check_checkpoint(checkpoint)
    found: dict[str, object] = {}
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            found |= {f"{file.stem}:{key}": value for key, value in load_file(file).items()}
        elif file.name not in ("manifest.json", "config.yaml"):
            found[file.name] = json.loads(file.read_text())
    return found


def last(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def assert_same_to_the_bit(run: Path, whole: Path) -> None:
    for stage in ("warmup", "checkpoints"):
        for checkpoint in list_checkpoints(whole / stage)[-1:]:
            first, second = content(run / stage / checkpoint.name), content(checkpoint)
            assert first.keys() == second.keys()
            for key, value in first.items():
                same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
                assert same, key
    assert metrics(run) == metrics(whole)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number, size in enumerate(((64, 48), (48, 64), (48, 64))):
        write_clip(folder / f"{number}.mp4", 5 + number, size, caption="a red cat runs")
    return folder


FULL = {"student.kind": "full", "fake_score.kind": "full"}
REUSED = {"fake_score.reuse_rollout": True}
CAUSAL = {"rollout.causal": True, "rollout.num_frame_per_block": 1, "warmup.steps": 2, "warmup.num_samples": 3}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": FULL | {"optimizer.name": "adamw_bf16", "dmd.generator_update_interval": 2},
    "lora, rollouts that serve twice": REUSED | {"optimizer.name": "adamw8bit", "student.rank": 176},
    "full, rollouts that serve twice, clips": FULL | REUSED | {"dmd.real_data_loss_weight": 0.3, "data.buckets": True},
    "clips": {"dmd.real_data_loss_weight": 0.3},
    "no accumulation": {"train.gradient_accumulation": 1, "train.batch_size": 2, "train.max_steps": 3},
    "teacher forcing": CAUSAL | {"warmup.kind": "teacher_forcing", "warmup.teacher_steps": 3, "train.max_steps": 1},
    "trajectories, lengths that are drawn, full": CAUSAL
    | FULL
    | REUSED
    | {"warmup.kind": "ode_regression", "warmup.teacher_steps": 3, "rollout.min_training_frames": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_a_signal_in_every_micro_batch_changes_no_bit(case, write, made, clips, tmp_path):
    """One after another: each process makes a single micro-batch."""
    changes = CASES[case] | ({"data.videos": str(clips)} if "dmd.real_data_loss_weight" in CASES[case] else {})
    file, run, whole = write(changes), tmp_path / "run", tmp_path / "whole"
    done("fit", file, "--output-dir", whole)
    micro_batches, within = made.count, 0
    shutil.copytree(whole / "cache", run / "cache")
    for _ in range(micro_batches - 1):
        said = interrupted(made, 1, file)
        assert ("stopped in " in said) == ("what is done of" in said)
        within += "stopped in " in said
    made.count = 0
    assert "done: " in done("fit", file) and made.count == 1
    assert_same_to_the_bit(run, whole)
    assert within == micro_batches - len([line for lines in metrics(whole).values() for line in lines])


@pytest.fixture
def whole(write, made, tmp_path) -> Path:
    """A run of two steps of two updates of three micro-batches, left alone; `run.yaml` is the same run, not started."""
    done("fit", write({}), "--output-dir", tmp_path / "whole")
    assert made.count == 12
    shutil.copytree(tmp_path / "whole" / "cache", tmp_path / "run" / "cache")
    return tmp_path / "whole"


def test_what_is_said_and_kept(whole, made, tmp_path):
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    assert "stopped in step 1; saved: what is done of step 1 " in interrupted(made, 2, file)
    assert last(run).name == "step-000000"
    assert "stopped at step 1; saved: step 1 " in interrupted(made, 4, file)
    assert "underway.safetensors" not in names(last(run))
    assert "stopped in step 2; saved: step 1 and what is done of step 2 " in interrupted(made, 4, file)
    state = json.loads((last(run) / "state.json").read_text())
    assert (state["step"], state["student_updates"]) == (1, 1)
    assert (state["underway"]["update"], state["underway"]["rows"]) == ("student", 1)
    kept = load_file(last(run) / "underway.safetensors")
    assert {key.partition(".")[0] for key in kept} == {"finished", "gradient", "total"}
    nothing = done("fit", file, "--max-steps", 1)
    assert "nothing to do: the run is at step 1, and train.max_steps is 1" in nothing
    done("fit", file)
    assert_same_to_the_bit(run, whole)


def test_a_branch_makes_the_step_in_hand_anew(whole, made, tmp_path):
    """With a step of other updates: the gradients that are accumulated of it are of no use."""
    file, one = tmp_path / "run.yaml", tmp_path / "one"
    done("fit", file, "--output-dir", one, "--max-steps", 1)
    interrupted(made, 8, file)
    assert "underway.safetensors" in names(last(tmp_path / "run"))
    found = []
    for name, ckpt in (("a", last(tmp_path / "run")), ("b", last(one))):
        changes = ("--max-steps", 3, "--set", "optimizer.lr=1e-4", "--set", "dmd.generator_update_interval=3")
        done("fit", file, "--resume", ckpt, "--output-dir", tmp_path / name, *changes)
        found.append(content(last(tmp_path / name)))
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]) if isinstance(value, torch.Tensor) else value == found[1][key], key


def test_seconds_are_those_of_both_processes(whole, made, tmp_path):
    interrupted(made, 11, tmp_path / "run.yaml")
    ckpt = last(tmp_path / "run")
    seconds = json.loads((ckpt / "state.json").read_text())["underway"]["seconds"]
    assert seconds.keys() == {"fake_score", "student"} and all(0 < value < 60 for value in seconds.values())
    state(seconds={"fake_score": 1000, "student": 2000})(ckpt)
    signed(ckpt)
    done("fit", tmp_path / "run.yaml")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["seconds_fake_score"] == 1000 and 2000 < line["seconds_student"] < 2060


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_the_other_commands_read_such_a_checkpoint(whole, made, tmp_path):
    interrupted(made, 11, tmp_path / "run.yaml")
    ckpt = last(tmp_path / "run")
    assert "underway.safetensors" in names(ckpt)
    done("export-lora", "--ckpt", ckpt, "--out", tmp_path / "a.safetensors")
    done("export-pipeline", "--ckpt", ckpt, "--out", tmp_path / "pipeline")
    done("validate", "--ckpt", ckpt, "--out", tmp_path / "validated", "--frames", 1, "--count", 1)
    done("generate", "--ckpt", ckpt, "a cat", "--out", tmp_path / "a.mp4", "--frames", 1)


@pytest.mark.parametrize("reused", [False, True])
def test_a_resume_with_another_split(reused, write, made, tmp_path):
    """2 + 2 + 2 videos, of which the first two are done, and then 3 + 1."""
    file, run, whole = (
        write({"train.batch_size": 2, "fake_score.reuse_rollout": reused}),
        tmp_path / "run",
        tmp_path / "whole",
    )
    done("fit", file, "--output-dir", whole)
    split = ("--set", "train.batch_size=3", "--set", "train.gradient_accumulation=2")
    assert "what is done of step 2" in interrupted(made, 7, file)
    assert "what is done of step 2" in interrupted(made, 3, file, *split)  # in the other update
    made.count = 0
    done("fit", file, *split)
    assert made.count == 1
    one, other = content(last(run)), content(last(whole))
    assert one["state.json"]["student_updates"] == other["state.json"]["student_updates"] == 2  # type: ignore[index]
    for key, value in one.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-5, msg=key)
    lines = metrics(run)["metrics.jsonl"], metrics(whole)["metrics.jsonl"]
    for name in ("critic_loss", "dmd_loss", "x0_mean", "x0_std", "x0_diversity", "student_grad_norm"):
        assert lines[0][1][name] == pytest.approx(lines[1][1][name], rel=1e-4), name


def test_numbers_that_some_micro_batches_lack_are_none_of_the_update():
    def backward(rows: slice, share: float) -> dict[str, torch.Tensor]:
        stats = {"loss": torch.tensor(float(rows.start))}
        return stats | ({"diversity": torch.tensor(1.0)} if rows.stop - rows.start > 1 else {})

    # Rows 0 and 1 start at 0, row 2 at 2: the mean is 2/3. After row 0, which came to 6 so far, rows 1 and 2 start at 1.
    for rows, total, wanted in ((0, {}, 2 / 3), (1, {"loss": torch.tensor(6.0)}, 6 + 2 / 3)):
        came_to = Underway({}, "student", rows=rows, total=total).accumulate(3, 2, backward)
        assert came_to.keys() == {"loss"} and float(came_to["loss"]) == pytest.approx(wanted)


# ---------------------------------------------------------------------------------------------------- not finite


def spoil(role: str) -> Callable[[Any], object]:
    """From now on, a gradient of a role is not finite."""
    return lambda distiller: distiller.roles.parameters(role)[1].register_hook(lambda g: g * math.nan)


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("at", [8, 10, 11])
def test_what_is_not_finite_is_computed_again(reused, at, write, made, tmp_path):
    """In the second step: the signal comes in the first update; after it, and it was skipped; and in the second one."""
    file, run, whole = write({"fake_score.reuse_rollout": reused}), tmp_path / "run", tmp_path / "whole"
    done("fit", file, "--output-dir", whole)
    order = ("student", "fake_score") if reused else ("fake_score", "student")
    made.at = {7: spoil(order[0])} if at < 11 else {10: spoil(order[1])}
    said = interrupted(made, at, file)
    if at < 11:
        assert "stopped in step 2; saved: step 1 " in said and "what is done" not in said
        assert "underway.safetensors" not in names(last(run))
    else:
        assert "stopped in step 2; saved: step 1 and what is done of step 2" in said
        kept = load_file(last(run) / "underway.safetensors")
        assert {key.partition(".")[0] for key in kept} == {"finished"} | ({"videos"} if reused else set())
        assert json.loads((last(run) / "state.json").read_text())["underway"]["rows"] == 0
    shutil.rmtree(run / "bad_steps", ignore_errors=True)
    done("fit", file)  # without the fault
    assert_same_to_the_bit(run, whole)


def test_a_signal_after_a_skipped_update_saves_it_too_and_removes_nothing(whole, made, tmp_path):
    """The student's of step 2; its count goes on."""
    run, keep = tmp_path / "run", ("--set", "checkpoint.keep=1", "--max-steps", 3)
    made.at = {7: spoil("student")}
    said = interrupted(made, 14, tmp_path / "run.yaml", *keep)
    assert "stopped in step 3; saved: step 2 and what is done of step 3 " in said
    assert [folder.name for folder in list_checkpoints(run / "checkpoints")] == ["step-000001", "step-000002"]
    state = json.loads((last(run) / "state.json").read_text())
    assert state["bad_in_a_row"] == {"student": 1, "fake_score": 0} and state["bad_steps"] == 1
    made.count = 0
    done("fit", tmp_path / "run.yaml", *keep)
    assert made.count == 4 and [folder.name for folder in list_checkpoints(run / "checkpoints")] == ["step-000003"]
    state = json.loads((last(run) / "state.json").read_text())
    assert state["bad_in_a_row"] == {"student": 0, "fake_score": 0} and state["bad_steps"] == 1


# ---------------------------------------------------------------------------------------------------- errors


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def failed(made: MicroBatches, number: int, fault: Callable[[Any], object], *args: object) -> str:
    """What a run said in which something broke when the micro-batch of that number began."""
    made.count, made.at = 0, {number: fault}
    result = run_cli("fit", *args)
    made.at = {}
    assert result.exit_code in (1, 2), (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize(("at", "saved", "left"), [(3, "", 12), (5, "what is done of step 1", 9), (9, "step 1", 6)])
def test_memory_that_runs_out_loses_the_update_in_hand_alone(at, saved, left, reused, write, made, tmp_path):
    """In the middle of a backward pass, which leaves some gradients with the micro-batch and some without."""
    file, run, whole = write({"fake_score.reuse_rollout": reused}), tmp_path / "run", tmp_path / "whole"
    done("fit", file, "--output-dir", whole)

    def fault(distiller: Distiller) -> None:
        for role in ("student", "fake_score"):
            distiller.roles.parameters(role)[3].register_hook(no_memory)

    said = failed(made, at, fault, file, "--set", "checkpoint.every=99")
    assert (f" saved: {saved} dmdtrain: out of memory" if saved else "dmdtrain: out of memory") in said
    assert saved or "saved: " not in said
    made.count = 0
    done("fit", file)
    assert made.count == left
    assert_same_to_the_bit(run, whole)


def test_memory_that_runs_out_in_the_optimizer_saves_nothing_of_it(whole, made, tmp_path, monkeypatch):
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    step = torch.optim.AdamW.step

    def breaks(_: Distiller) -> None:
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: (step(*args, **kwargs), no_memory()))

    said = failed(made, 7, breaks, file)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert "saved: " not in said and names(last(run)) == names(last(tmp_path / "whole"))
    done("fit", file)
    assert_same_to_the_bit(run, whole)


@pytest.mark.parametrize("what", ["text", "videos", "reused", "warmup"])
def test_data_that_disappear_lose_nothing(what, write, made, clips, tmp_path):
    """One micro-batch an update: after it the next batch's embeddings are missing, or the clips of the next update, or before
    it those of the first."""
    changes = {"train.gradient_accumulation": 1, "train.max_steps": 4, "checkpoint.every": 99}
    changes |= {"videos": CASES["clips"] | {"data.videos": str(clips)}, "reused": REUSED}.get(what, {})
    if what == "warmup":
        changes |= CAUSAL | {"warmup.kind": "teacher_forcing", "warmup.data": str(clips), "warmup.steps": 4}
    file, run, whole = write(changes), tmp_path / "run", tmp_path / "whole"
    done("fit", file, "--output-dir", whole)
    total = made.count
    shutil.copytree(whole / "cache", run / "cache")
    cache = run / "cache" / ("videos" if what in ("videos", "warmup") else "text")
    said = failed(made, 3, lambda _: shutil.move(cache, tmp_path / "away"), file)
    assert " saved: " in said and "dmdtrain: data.cache_dir: " in said, said
    if what != "warmup":  # which needs the clips that are gone
        shutil.rmtree(cache, ignore_errors=True)
    made.count = 0
    done("fit", file)
    assert made.count == total - 3
    assert_same_to_the_bit(run, whole)


# ---------------------------------------------------------------------------------------------------- the disk


def test_a_save_that_fails_leaves_the_older_checkpoint_of_the_step(whole, made, tmp_path, monkeypatch):
    """No file may grow beyond a few bytes from the signal on: what a full disk is like, without one."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # no compiled module is cut short
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    made.at = {7: lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))}
    try:
        said = interrupted(made, 8, file, "--set", "checkpoint.background=false")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step 1: the checkpoint could not be saved (File too large" in said
    assert "stopped in step 2; saved: step 1 " in said and "what is done" not in said
    check_checkpoint(last(run))
    assert last(run).name == "step-000001" and "underway.safetensors" not in names(last(run))
    done("fit", file)
    assert_same_to_the_bit(run, whole)


# ---------------------------------------------------------------------------------------------------- damage


def state(**changes: object) -> Callable[[Path], None]:
    def edit(ckpt: Path) -> None:
        found = json.loads((ckpt / "state.json").read_text())
        found["underway"] |= changes
        (ckpt / "state.json").write_text(json.dumps(found))

    return edit


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def edit(ckpt: Path) -> None:
        found = load_file(ckpt / "underway.safetensors")
        save_file({k: v.contiguous() for k, v in change(found).items()}, ckpt / "underway.safetensors")

    return edit


def whole_state(value: object) -> Callable[[Path], None]:
    def edit(ckpt: Path) -> None:
        found = json.loads((ckpt / "state.json").read_text())
        (ckpt / "state.json").write_text(json.dumps(found | {"underway": value}))

    return edit


def without(prefix: str) -> Callable[[dict], dict]:
    return lambda t: {key: value for key, value in t.items() if not key.startswith(prefix)}


def one(prefix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    def edit(t: dict) -> dict:
        name = next(key for key in sorted(t) if key.startswith(prefix))
        return t | {name: change(t[name])}

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    **{
        f"update {v!r}": (state(update=v), "valid in this step are student, fake_score")
        for v in ("teacher", "", 3, None, [])
    },
    "an update that comes first": (state(update="student"), "holds finished.student."),
    **{f"rows {v!r}": (state(rows=v), "rows ") for v in (4, -1, 10**30, 1.0, True, "1", None, [1])},
    "fewer rows": (state(rows=0), "holds gradient."),
    **{
        f"seconds {v!r}": (state(seconds=v), "seconds ")
        for v in (None, 3, {"x": 1}, {"student": -1}, {"student": math.nan})
    },
    **{f"it is {v!r}": (whole_state(v), "it must be an object") for v in (3, [], "x", True)},
    "it is empty": (whole_state({}), "update None"),
    "a gradient of another shape": (tensors(one("gradient.", lambda v: v[:1])), "gradient."),
    "a gradient that would be broadcast": (tensors(one("gradient.", lambda v: v.sum())), "gradient."),
    "a gradient of another type": (tensors(one("gradient.", lambda v: v.half())), "torch.float16"),
    "a gradient that is not finite": (tensors(one("gradient.", lambda v: v * math.nan)), "not finite"),
    "a gradient of something else": (tensors(lambda t: t | {"gradient.x": torch.zeros(3)}), "holds gradient.x"),
    "no gradient": (tensors(without("gradient.")), "lacks gradient.*"),
    "no numbers": (tensors(without("total.")), "lacks total.*"),
    "a number that is not finite": (tensors(one("total.", lambda v: v * math.inf)), "not finite"),
    "numbers that are several": (tensors(one("finished.", lambda v: v.repeat(2))), "finished."),
    "none of what is finished": (tensors(without("finished.")), "lacks finished.student.*"),
    "what is not finished": (tensors(lambda t: t | {"finished.x.loss": torch.zeros(())}), "holds finished.x.loss"),
    "no videos": (tensors(without("videos")), "lacks videos"),
    "one video less": (tensors(one("videos", lambda v: v[:2])), "videos is [2,"),
    "shorter videos": (tensors(one("videos", lambda v: v[:, :, :1])), "videos is [3, 4, 1,"),
    "videos of another type": (tensors(one("videos", lambda v: v.half())), "videos is torch.float16"),
    "videos that are not finite": (tensors(one("videos", lambda v: v - math.inf)), "not finite"),
    "no file": (
        lambda ckpt: unlisted(ckpt, "underway.safetensors"),
        "underway.safetensors is not in its manifest.json",
    ),
}


def unlisted(ckpt: Path, name: str) -> None:
    manifest = json.loads((ckpt / "manifest.json").read_text())
    manifest["sha256"].pop(name)
    (ckpt / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def paused(wan_folder, tmp_path_factory) -> Path:
    """The folder of a configuration and its run that was stopped in the fake score's update, which takes over videos."""
    folder = tmp_path_factory.mktemp("paused")
    (folder / "prompts.txt").write_text("a red cat\na dog\na cat on grass\n")
    values = {
        "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
        "student": {"rank": 2, "alpha": 4},
        "fake_score": {"rank": 2, "alpha": 2, "reuse_rollout": True},
        "dmd": {"generator_update_interval": 1},
        "rollout": {"num_training_frames": 2},
        "data": {"prompts": str(folder / "prompts.txt"), "resolution": "32x32", "max_sequence_length": 8},
        "train": {"max_steps": 1, "batch_size": 1, "gradient_accumulation": 3, "mixed_precision": "no"},
        "validation": {"every": 0, "prompts": ["a cat"], "num_frames": 1, "resolution": "32x32"},
        "log": {"tensorboard": False},
        "output_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        interrupted(MicroBatches(patch), 5, folder / "run.yaml")
    return folder


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_is_refused_in_one_line(case, paused, tmp_path):
    edit, says = DAMAGES[case]
    run = shutil.copytree(paused / "run", tmp_path / "run")
    edit(last(run))
    signed(last(run))
    before = {str(f): f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != ".lock"}
    refused("fit", paused / "run.yaml", "--output-dir", run, says=[says, "checkpoint: ", "step-000000"])
    assert {str(f): f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != ".lock"} == before


def test_one_that_is_not_damaged_is_not_refused(paused, tmp_path):
    run = shutil.copytree(paused / "run", tmp_path / "run")
    done("fit", paused / "run.yaml", "--output-dir", run)
    assert last(run).name == "step-000001"
