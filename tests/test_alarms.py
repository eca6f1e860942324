"""Alarms: when they begin, what they say, that they are resumed and change nothing; and what a bad step leaves."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from clip_files import write_clip
from rich.console import Console
from safetensors.torch import load_file

from dmdtrain.config import BRANCH_OFF, ConfigError, build
from dmdtrain.config import Alarms as Settings
from dmdtrain.train.alarms import ADVICE, WATCHED, Alarms, Running, load_alarms, measure
from dmdtrain.train.fit import fit
from dmdtrain.train.setup import resolve
from dmdtrain.train.step import mean_distance
from dmdtrain.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = {  # name: a quiet value, a loud one; the loud one is far from what each rule allows
    "x0_mean": (0.1, 1.6),
    "x0_std": (1.0, 0.1),
    "student_grad_norm": (0.5, 30.0),
    "fake_score_grad_norm": (2.0, 100.0),
    "warmup_grad_norm": (1.0, 40.0),
    "critic_unexplained": (0.2, 0.9),
    "x0_diversity": (1.2, 0.0),
}


def feed(alarms: Alarms, name: str, values: list[float], first: int = 1) -> dict[str, float]:
    for step, value in enumerate(values, start=first):
        counts = alarms.step(step, {"x0_std": 1.0, name: value})
    return counts


def noisy(value: float, count: int) -> list[float]:
    drawn = random.Random(0)
    return [value * (1 + 0.05 * drawn.gauss(0, 1)) for _ in range(count)]


def test_running_means_by_hand():
    running = Running()
    for value in (1.0, 3.0, 2.0, 6.0):
        running.add(value, window=10)
    assert running.mean == pytest.approx(3.0) and running.recent == 6.0
    assert running.first == pytest.approx(2.0)  # of the first two
    running = Running()
    for value in (2.0, 4.0, *[8.0] * 19):
        running.add(value, window=20)
    assert running.mean == pytest.approx((2 + 4 + 8 * 18) / 20 * 19 / 20 + 8 / 20)
    assert running.recent == pytest.approx(8 - 5 / 2**19) and running.first == pytest.approx((2 + 4 + 8 + 8) / 4)


def test_every_number_has_a_rule_and_every_rule_a_threshold_and_advice():
    assert set(WATCHED) == set(BASE)
    assert set(WATCHED.values()) | {"saturation"} == set(ADVICE) == set(Settings.model_fields) - {"window"}


@pytest.mark.parametrize("name", BASE)
def test_an_alarm_begins_once_names_its_key_and_can_begin_again(name):
    told: list[str] = []
    alarms = Alarms(Settings(window=50), told.append)
    rule, (quiet, loud) = WATCHED[name], BASE[name]
    assert feed(alarms, name, noisy(quiet, 60))[f"alarms_{rule}"] == 0 and not told
    assert feed(alarms, name, [loud] * 8, 61)[f"alarms_{rule}"] == 1
    assert len(told) == 1 and told[0].startswith("alarm at step 6") and f"{name} is " in told[0]
    assert told[0].endswith(
        f"(alarms.{rule}: {getattr(Settings(), rule):g}); {ADVICE[rule]}; changes go into a branch: {BRANCH_OFF}"
    )
    feed(alarms, name, noisy(quiet, 30), 69)
    feed(alarms, name, [loud] * 8, 99)  # within a window it is the same one
    assert len(told) == 1
    feed(alarms, name, noisy(quiet, 200), 107)
    assert not alarms.active
    assert feed(alarms, name, [loud] * 8, 307)[f"alarms_{rule}"] == 2 and len(told) == 2


@pytest.mark.parametrize("name", BASE)
def test_zero_is_off_and_a_threshold_decides(name):
    rule, (quiet, loud) = WATCHED[name], BASE[name]
    values = [*noisy(quiet, 60), *[loud] * 8]
    off = Alarms(Settings(window=50, **{rule: 0}), pytest.fail)
    assert f"alarms_{rule}" not in feed(off, name, values)
    lax = 1e-9 if rule == "diversity" else 1e9
    if loud:
        assert feed(Alarms(Settings(window=50, **{rule: lax}), pytest.fail), name, values)[f"alarms_{rule}"] == 0


def test_the_window_decides_when_alarms_begin():
    for window, count in ((120, 1), (130, 0)):
        values = [*noisy(0.5, 12), 50.0]
        alarms = Alarms(Settings(window=window), lambda text: None)
        assert feed(alarms, "student_grad_norm", values)["alarms_gradient_jump"] == count


def test_numbers_that_are_not_finite_or_not_watched_are_passed_over():
    alarms = Alarms(Settings(), pytest.fail)
    alarms.step(1, {"critic_unexplained": math.nan, "x0_mean": math.inf, "lr_student": 1.0})
    assert not alarms.running


def test_what_is_measured_of_videos():
    videos = torch.zeros(3, 3, 2, 4, 5)
    videos[1] = 0.5
    videos[2, :, :, :2] = 1.0
    measured = measure(videos)
    assert measured["saturation"] == pytest.approx(1 / 6)
    # 0.5; sqrt(1 / 2); sqrt((0.25 + 0.25) / 2)
    assert measured["diversity"] == pytest.approx((0.5 + 0.5**0.5 + 0.5) / 3)
    assert set(measure(videos[:1])) == {"saturation"}
    assert float(mean_distance(videos[:1].expand(4, -1, -1, -1, -1))) == 0


def test_alarms_of_validation():
    told: list[str] = []
    alarms = Alarms(Settings(), told.append)
    for step, (saturation, diversity) in enumerate([(0.3, 1.0), (0.34, 0.7), (0.45, 0.4), (0.5, 0.2)], start=1):
        for _ in range(2):  # looked at twice, it is the same
            alarms.validation(step, "validation_ema", {"saturation": saturation, "diversity": diversity})
    assert [text.split(":")[0] for text in told] == ["alarm at step 3"] * 2
    assert (
        "45.0% of the colour values of validation_ema are black or full, at first it was 30.0% (alarms.sat" in told[0]
    )
    assert "is 0.4, at first it was 1 (alarms.diversity: 0.6)" in told[1]


def test_a_resumed_watch_goes_on_exactly(tmp_path):
    drawn = random.Random(1)
    steps = [{name: drawn.lognormvariate(0, 1.5) for name in BASE} for _ in range(400)]
    told: list[str] = []
    again: list[str] = []
    whole, parts = Alarms(Settings(window=20), told.append), Alarms(Settings(window=20), again.append)
    for step, values in enumerate(steps, start=1):
        if step % 50 == 0:
            before, parts = parts, Alarms(Settings(window=20), again.append)
            load_alarms(parts, {"alarms": json.loads(json.dumps(before.state()))}, tmp_path)
        assert whole.step(step, values) == parts.step(step, values)
    assert parts.state() == whole.state() and again == told and len(told) > 5


def state_with(**changes: object) -> dict:
    means = {"count": 3, "mean": 1.0, "recent": 1.0, "first": 1.0}
    return {"running": {"x0_std": means | changes}, "counts": {}, "active": {}}


def test_that_state_is_one():
    load_alarms(Alarms(Settings(), pytest.fail), {"alarms": state_with()}, Path())


@pytest.mark.parametrize(
    "state",
    [
        *([], {"running": {}}, {"running": {"a": 3}, "counts": {}, "active": {}}, None, 4),
        *({"running": {}, "counts": {}, "active": []}, {"running": {}, "counts": {}, "active": {"a": "x"}}),
        *(
            state_with(count=-1),
            state_with(count=0),
            state_with(count=1.5),
            state_with(mean="x"),
            state_with(mean=None),
        ),
    ],
)
def test_a_state_that_is_none_is_one_line(tmp_path, state):
    with pytest.raises(ConfigError, match=r"state.json: alarms: "):
        load_alarms(Alarms(Settings(), pytest.fail), {"alarms": state}, tmp_path)


# ---------------------------------------------------------------------------------------------------- in a run


@pytest.fixture
def values(settings) -> dict:
    settings["validation"] |= {"every": 0}
    settings["checkpoint"]["keep"] = 9
    settings["log"] = {"tensorboard": False}
    settings["dmd"]["generator_update_interval"] = 1
    return settings


def test_alarms_are_told_counted_and_change_nothing(values, tmp_path):
    """Thresholds so low that every rule raises its alarm, and none at all."""
    printed = Console(file=io.StringIO(), width=1000)
    values["train"]["max_steps"] = 8
    values["validation"] |= {"every": 4, "num_frames": 1}
    loud = {"window": 10, "x0_drift": 1e-6, "gradient_jump": 1e-6, "critic_divergence": 1e-6, "saturation": 1e-9}
    loud["diversity"] = 0.999
    off = dict.fromkeys(("x0_drift", "gradient_jump", "critic_divergence", "saturation", "diversity"), 0)
    runs = []
    for name, alarms in (("loud", loud), ("off", off)):
        run = tmp_path / name
        fit(build(values | {"alarms": alarms, "output_dir": str(run)}), "auto", printed)
        runs.append(run)
    text = printed.file.getvalue()
    for rule in ("x0_drift", "gradient_jump", "critic_divergence"):
        assert f"(alarms.{rule}: 1e-06); {ADVICE[rule]}" in text
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].keys() == {"step", "validation_ema_saturation", "validation_ema_diversity"}
    trained = [line for line in lines if "critic_loss" in line]
    assert trained[-1]["alarms_gradient_jump"] >= 2 and trained[0]["alarms_gradient_jump"] == 0
    other = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert not [key for line in other for key in line if key.startswith("alarms_")]
    for stem in ("student", "fake_score", "ema"):
        a, b = (load_file(run / "checkpoints" / "step-000008" / f"{stem}.safetensors") for run in runs)
        assert all(torch.equal(a[key], b[key]) for key in a)
    # What the checkpoint of step 8 lacks of its own validation is recalled.
    resumed = Trainer(resolve(build(values | {"alarms": loud, "output_dir": str(runs[0])})), printed)
    resumed.load(runs[0] / "checkpoints" / "step-000004")
    assert resumed.alarms.running["validation_ema_diversity"].count == 1
    assert resumed.alarms.counts["gradient_jump"] == 2


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_a_bad_step_leaves_what_it_was_made_of(values, tmp_path, role):
    values["train"]["max_bad_steps"] = 100
    config = build(values)
    trainer = Trainer(resolve(config), Console(quiet=True))
    trainer.train_step()
    trainer.roles.parameters(role)[1].register_hook(lambda g: g * math.nan)
    for _ in range(8):
        trainer.train_step()
    folder = Path(config.output_dir) / "bad_steps"
    names = sorted(f.name for f in folder.iterdir())
    assert names == [f"step-{n:06d}-{role}.{kind}" for n in range(5, 10) for kind in ("json", "safetensors")]
    facts = json.loads((folder / f"step-000009-{role}.json").read_text())
    assert (facts["step"], facts["role"], len(facts["prompts"])) == (9, role, 2)
    assert facts["gradient_norms"][role] == "nan"
    other = ({"student", "fake_score"} - {role}).pop()
    assert facts["gradient_norms"][other] > 0
    assert facts["blocks"] == [3] and len(facts["exit_steps"]) == 1 and len(facts["score_timesteps"]) == 2
    assert {"student": "dmd_loss", "fake_score": "critic_loss"}[role] in facts["statistics"]
    # From the generator's state the same noise comes out again.
    kept = load_file(folder / f"step-000009-{role}.safetensors")
    generator = torch.Generator()
    generator.set_state(kept["generator"])
    again = trainer.distiller.draw(2, generator)
    assert torch.equal(again.score_timestep, kept["score_timestep"]) and again.exit_steps == facts["exit_steps"]


def test_a_bad_step_on_a_full_disk_is_only_told(values):
    printed = Console(file=io.StringIO(), width=1000)
    trainer = Trainer(resolve(build(values)), printed)
    (trainer.run.output_dir / "bad_steps").write_text("in the way")
    trainer.roles.parameters("student")[1].register_hook(lambda g: g * math.nan)
    trainer.train_step()
    assert "step 1: bad_steps can not be written (" in printed.file.getvalue()


def test_a_bad_step_names_its_clips(values, tmp_path):
    for number in range(5):
        write_clip(tmp_path / "clips" / f"{number}.mp4", 9, caption="a dog")
    values["data"]["videos"], values["dmd"]["real_data_loss_weight"] = str(tmp_path / "clips"), 0.5
    trainer = Trainer(resolve(build(values)), Console(quiet=True))
    trainer.train_step()
    trainer.roles.parameters("student")[1].register_hook(lambda g: g * math.nan)
    drawn, before = copy.deepcopy(trainer.real.clips.sampler).draw(2), trainer.real.generator.get_state()
    trainer.train_step()
    name = trainer.run.output_dir / "bad_steps" / "step-000002-student"
    assert json.loads(name.with_suffix(".json").read_text())["clips"] == [str(sample.file) for sample in drawn]
    assert torch.equal(load_file(name.with_suffix(".safetensors"))["real.generator"], before)
