"""`fit` end to end on real tiny models."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from conftest import done, refused, tiny_transformer
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.config import load
from dmdtrain.models.quantize import Int8Linear
from dmdtrain.train.resume import locked
from dmdtrain.train.setup import build_roles, resolve


@pytest.fixture
def run_cli():
    runner = CliRunner()

    def run(*args: str):
        return runner.invoke(app, [str(a) for a in args], catch_exceptions=False)

    return run


@pytest.fixture
def config_file(settings, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_whole_road(run_cli, config_file, tmp_path):
    result = run_cli("fit", config_file)
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    assert [f.name for f in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = lines.pop()
    assert validated.keys() == {"step", "validation_ema_saturation", "validation_ema_diversity"}
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all("critic_loss" in line for line in lines)
    assert ["dmd_loss" in line for line in lines] == [False, True, False, True]
    assert (run / "samples" / "step-000004" / "contact_sheet.png").stat().st_size > 500
    assert len(list((run / "samples" / "step-000004").glob("*.mp4"))) == 2
    ckpt = run / "checkpoints" / "step-000004"
    validated = run_cli("validate", "--ckpt", ckpt, "--compare-teacher", "--teacher-steps", 2)
    assert validated.exit_code == 0 and [n in validated.stdout for n in ("step 2/2 ", "step 3/3 ")] == [True, True]
    generated = run_cli("generate", "--ckpt", ckpt, "a red cat", "--out", tmp_path / "one.mp4")
    assert generated.exit_code == 0 and "step 3/3 " in generated.stdout
    assert (tmp_path / "one.mp4").stat().st_size > 200
    assert run_cli("export-lora", "--ckpt", ckpt, "--out", tmp_path / "lora.safetensors").exit_code == 0
    assert (tmp_path / "lora_scheduler" / "scheduler_config.json").exists()
    assert torch.isfinite(torch.tensor([line["critic_loss"] for line in lines])).all()


def test_a_base_with_other_weights_is_another_model(settings, wan_folder, tmp_path):
    base = shutil.copytree(wan_folder, tmp_path / "base")
    settings["model"]["base"] = str(base)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    done("fit", file, "--max-steps", 2)
    (weights,) = (base / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("ffn.net.2.weight"))
    save_file(tensors | {name: 2 * tensors[name]}, weights, metadata={"format": "pt"})
    refused("fit", file, says=[f"model.base: {base} has other weights than when", "step-000002 was saved"])
    save_file(tensors, weights, metadata={"format": "pt"})
    done("fit", file)


@pytest.mark.parametrize(("own", "shared"), [("nf4", "int8"), ("int8", "nf4"), (None, "int8")])
def test_a_larger_teacher_in_a_precision_of_its_own(settings, wan_folder, tmp_path, own, shared):
    """Three wider blocks beside a student of two: what it teaches is not what the base would have taught."""
    teacher = shutil.copytree(wan_folder, tmp_path / "teacher")
    shutil.rmtree(teacher / "transformer")
    tiny_transformer(num_layers=3, attention_head_dim=32, ffn_dim=256).save_pretrained(teacher / "transformer")
    settings["model"] |= {"precision": shared, "quantize_via": "device"}
    learned = []
    for name, other in (("own", {"teacher": str(teacher), "teacher_precision": own}), ("shared", {})):
        settings |= {"output_dir": str(tmp_path / name)}
        settings["model"] |= other if name == "own" else {"teacher": None, "teacher_precision": None}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        done("fit", file, "--max-steps", 2)
        ckpt = tmp_path / name / "checkpoints" / "step-000002"
        assert "done: " in done("fit", file, "--max-steps", 4)
        learned.append(load_file(ckpt / "student.safetensors"))
    assert learned[0].keys() == learned[1].keys()
    assert not all(torch.equal(value, learned[1][key]) for key, value in learned[0].items())
    ckpt = tmp_path / "own" / "checkpoints" / "step-000004"
    done("validate", "--ckpt", ckpt, "--compare-teacher", "--teacher-steps", 2, "--count", 1)
    run = resolve(load(ckpt / "config.yaml"), for_training=False)
    roles = build_roles(run, torch.device("cpu"))
    layers = {"int8": Int8Linear, "nf4": Linear4bit}
    for role, precision in (("teacher", own or shared), ("student", shared)):
        there = {type(module) for module in roles.roles[role].module.modules()} & {*layers.values()}
        assert there == {layers[precision]}, role


def test_a_second_process_is_kept_out_and_a_dead_one_is_not_in_the_way(run_cli, config_file, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from rich.console import Console; from dmdtrain.train.resume import locked\n"
        f"with locked(Path({str(tmp_path / 'run')!r}), Console()):\n    print('locked', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        result = run_cli("fit", config_file)
        assert result.exit_code == 2 and "run is in use by another process" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "run" / "config.yaml").exists()
    finally:
        other.kill()
        other.wait()
    assert run_cli("fit", config_file, "--max-steps", 2).exit_code == 0


def test_a_folder_that_knows_no_locks_is_told(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    printed = Console(file=io.StringIO(), width=500)
    with locked(tmp_path / "run", printed):
        pass
    said = printed.file.getvalue()  # type: ignore[attr-defined]
    assert "run can not be locked (No locks available): a second process in it would not be noticed" in said
