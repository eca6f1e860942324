"""The benchmark scripts run, and the hand-written one comes to the trainer's losses."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str, out: Path) -> dict:
    command = [sys.executable, BENCHMARKS / script, *arguments, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_a_script_of_the_same_mathematics_has_the_same_losses(tmp_path):
    record = run("minimal.py", "--steps", "1", "--batch", "2", out=tmp_path / "minimal.json")
    assert record["largest_relative_difference_of_a_loss"] < 1e-5
    assert 0 < record["loop_overhead"] < 0.5 and record["ours_over_script"] > 0


def test_the_record_says_that_the_loop_costs_next_to_nothing():
    record = json.loads((BENCHMARKS / "minimal.json").read_text(encoding="utf-8"))
    assert record["steps"] >= 8 and record["largest_relative_difference_of_a_loss"] < 1e-5
    assert 0 < record["loop_overhead"] < 0.03 and 0.9 < record["ours_over_script"] <= 1.02
    assert record["seconds_ours"] / record["seconds_script"] <= 1.02


def test_throughput_of_data(tmp_path):
    record = run("data.py", "--prompts", "50", "--clips", "5", "--frames", "5", out=tmp_path / "data.json")
    assert record["prompts"]["prompts"] == 50 and record["clips"]["clips"] == 5
    rates = [value for part in record.values() if isinstance(part, dict) for value in part.values()]
    assert len(rates) > 20 and min(rates) >= 0


def in_process(monkeypatch, script: str, *arguments: str) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        importlib.import_module(script).main()
    finally:
        torch.set_flush_denormal(False)


def test_replay_holds_less_than_one_graph(monkeypatch, tmp_path):
    out = tmp_path / "replay.json"
    in_process(monkeypatch, "replay", "--blocks", "2", "--batch", "1", "--repeats", "1", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [(row["checkpointing"], row["window"]) for row in rows] == [(c, w) for c in (True, False) for w in (None, 9)]
    assert all(0 < row["replay"]["peak_mib"] < row["one_graph"]["peak_mib"] for row in rows)


def test_a_block_by_piece_holds_less_than_the_stock_one(monkeypatch, tmp_path):
    from dmdtrain.models import block

    monkeypatch.setattr(block, "PIECE", 64)
    out = tmp_path / "block.json"
    in_process(monkeypatch, "block", "--size", "tiny", "--tokens", "512", "--repeats", "1", "--out", str(out))
    one, per_frame = json.loads(out.read_text())["rows"]
    assert one["peak_gib_split"] < one["peak_gib_stock"] < per_frame["peak_gib_stock"]
    assert per_frame["peak_gib_split"] < 0.7 * per_frame["peak_gib_stock"]


def test_full_steps_of_a_tiny_model(monkeypatch, tmp_path):
    changes = ("--compare", "train.gradient_checkpointing=false")
    in_process(monkeypatch, "dmd_step", "--size", "tiny", "--steps", "1", *changes, "--out", str(tmp_path))
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert record["settings"]["live_peak_gib"] < record["compared"]["live_peak_gib"]
    for found in (record["settings"], record["compared"]):
        assert found["seconds"] > 0 and found["seconds_replay"] > 0
        assert found["live_peak_gib"] == pytest.approx(found["planned_peak_gib"], rel=0.1)


def steps_of(monkeypatch, out: Path, *arguments: str) -> tuple[dict, dict]:
    """The records of a setting and of the one that it is compared with."""
    in_process(monkeypatch, "dmd_step", "--size", "tiny", "--steps", "1", *arguments, "--out", str(out))
    (file,) = out.iterdir()
    record = json.loads(file.read_text())
    return record["settings"], record["compared"]


@pytest.mark.parametrize("reused", [False, True])
def test_an_update_of_full_steps_has_its_micro_batches(monkeypatch, tmp_path, reused):
    from dmdtrain.train.step import Distiller

    made = {"student": [], "critic": []}
    for name, calls in made.items():
        backward = getattr(Distiller, f"{name}_backward")

        def counted(self, context, draws, *share, calls=calls, backward=backward, **given):
            if share:  # not the plan's
                calls.append((len(context), draws.noise.shape[1], *share, "x0" in given))
            return backward(self, context, draws, *share, **given)

        monkeypatch.setattr(Distiller, f"{name}_backward", counted)
    shared = ("--set", f"fake_score.reuse_rollout={str(reused).lower()}", "--set", "train.batch_size=2")
    one, three = steps_of(monkeypatch, tmp_path, *shared, "--compare", "train.gradient_accumulation=3")
    steps = 5  # four that are not measured
    for name, calls in made.items():
        x0 = reused and name == "critic"
        assert calls.count((2, 2, 1.0, x0)) == steps and calls.count((2, 2, 2 / 6, x0)) == 3 * steps
        assert len(calls) == 4 * steps
    assert three["model_tflop"] == pytest.approx(3 * one["model_tflop"], abs=0.02)
    assert three["live_peak_gib"] < 1.3 * one["live_peak_gib"]  # that of one micro-batch


def test_full_steps_have_a_teacher_of_its_own_where_it_is_asked_for(monkeypatch, tmp_path):
    teacher = ("--compare", "model.teacher=tiny", "--compare", "model.teacher_precision=fp32")
    shared, own = steps_of(monkeypatch, tmp_path, *teacher)
    assert own["weights_gib"] > 1.5 * shared["weights_gib"]
    assert own["live_peak_gib"] == pytest.approx(own["planned_peak_gib"], rel=0.1)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("foo", "--set foo: it must be key=value"),
        ("output_dir=x", "output_dir: x: there is no run here"),
        ("train.batch_size=0", "--set: train.batch_size: 0: it must be at least 1"),
        ("model.base=14b", "model.base: 14b: the base is that of --size"),
        ("model.teacher=mine", "model.teacher: mine: weights are random here; valid are 1.3b, 14b, tiny"),
        ("model.teacher=14b", "model.teacher: 14b: text_dim is 4096, the base has 64"),
        ("model.attention=slow", "model.attention: slow: valid are "),
    ],
)
@pytest.mark.parametrize("option", ["--set", "--compare"])
def test_a_mistake_in_a_setting_of_full_steps_is_one_line(monkeypatch, capsys, option, override, says):
    with pytest.raises(SystemExit) as end:
        in_process(monkeypatch, "dmd_step", "--size", "tiny", option, override)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"dmd_step: {says}")


def test_settings_of_full_steps_that_would_change_nothing_are_refused(monkeypatch, capsys):
    clips = ("--set", "data.videos=clips", "--set", "dmd.real_data_loss_weight=0.5", "--set", "rollout.causal=true")
    with pytest.raises(SystemExit):
        in_process(monkeypatch, "dmd_step", "--size", "tiny", *clips)
    assert "dmd.real_data_loss_weight: 0.5: no clips are read here; valid is 0" in capsys.readouterr().err


def test_the_page_of_records_is_made_of_them(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import table

    assert (BENCHMARKS / "README.md").read_text(encoding="utf-8") == table.page(), "stale: python benchmarks/table.py"
