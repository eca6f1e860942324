"""What needs CUDA. Skipped without; `make test-gpu` runs it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dmdtrain.cli import app

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def fit(settings: dict, folder, *args: str) -> list[dict]:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["fit", str(file), *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "adamw8bit"])
def test_fit_in_bf16_with_checkpointing(settings, tmp_path, optimizer):
    settings["model"]["precision"] = settings["model"]["text_encoder_precision"] = "bf16"
    settings["optimizer"]["name"] = optimizer
    settings["train"] |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    lines = fit(settings, tmp_path)
    assert len(lines) == 4 and all(line["bad_steps"] == 0 for line in lines)
    assert all(line["memory_gib"] > 0 for line in lines)


def test_the_same_numbers_as_on_the_cpu(settings, tmp_path, monkeypatch):
    settings["validation"]["every"] = 0
    on_gpu = fit(settings, tmp_path)
    (tmp_path / "run").rename(tmp_path / "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = fit(settings, tmp_path)
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        assert gpu["critic_loss"] == pytest.approx(cpu["critic_loss"], rel=1e-3)


def test_resume_is_exact(settings, tmp_path):
    settings["validation"]["every"] = 0
    whole = fit(settings, tmp_path)
    (tmp_path / "run").rename(tmp_path / "whole")
    fit(settings, tmp_path, "--max-steps", "2")
    parts = fit(settings, tmp_path)
    assert [line["critic_loss"] for line in parts] == [line["critic_loss"] for line in whole]
