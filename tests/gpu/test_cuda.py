"""What needs CUDA. Skipped without; `make test-gpu` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.config import build
from dmdtrain.models.attention import CUDA_ORDER, works
from dmdtrain.models.quantize import Int8Linear, int8_matmul
from dmdtrain.train.setup import attention_of, resolve

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "dmd_step.py"

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before any test uses cuBLAS, which looks once

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def fit(settings: dict, folder, *args: str) -> list[dict]:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["fit", str(file), *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "critic_loss" in line]  # others are of validations


OPTIMIZERS = ["adamw", "adamw_bf16", "adamw8bit", "paged_adamw8bit"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_exact(settings, tmp_path, optimizer):
    settings["validation"]["every"] = 0
    settings["optimizer"]["name"] = optimizer
    whole = fit(settings, tmp_path)
    (tmp_path / "run").rename(tmp_path / "whole")
    fit(settings, tmp_path, "--max-steps", "2")
    parts = fit(settings, tmp_path)
    assert [line["critic_loss"] for line in parts] == [line["critic_loss"] for line in whole]


def test_resume_is_exact_with_deterministic_kernels(settings, tmp_path):
    settings["model"] |= {"base": "wan-tiny", "precision": "bf16"}
    settings["data"]["resolution"] = settings["validation"]["resolution"] = "64x64"
    settings["rollout"] = {"causal": True, "num_frame_per_block": 1, "num_training_frames": 3}
    settings["train"] |= {"mixed_precision": "bf16", "deterministic": True}
    try:
        test_resume_is_exact(settings, tmp_path, "adamw")
    finally:
        torch.use_deterministic_algorithms(False)


def test_fit_of_the_miniature_in_float32(settings, tmp_path):
    """Heads of 32 channels, which more backends take than those of `settings`, but not in float32."""
    settings["model"] |= {"base": "wan-tiny", "precision": "fp32"}
    settings["data"]["resolution"] = settings["validation"]["resolution"] = "64x64"
    assert len(fit(settings, tmp_path)) == 4


def test_fit_of_the_miniature_with_the_fastest_attention(settings, tmp_path):
    """cuDNN's or FlashAttention's, in forward and backward, with checkpoints and a KV cache."""
    settings["model"] |= {"base": "wan-tiny", "precision": "bf16"}
    settings["data"]["resolution"] = settings["validation"]["resolution"] = "64x64"
    settings["rollout"] = {"causal": True, "num_frame_per_block": 1, "num_training_frames": 3}
    settings["train"] |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    run = resolve(build(settings))
    assert attention_of(run.config, run.base, torch.device("cuda")) in CUDA_ORDER[:-1]
    fast = fit(settings, tmp_path)
    (tmp_path / "run").rename(tmp_path / "fast")
    settings["model"]["attention"] = "native"
    for a, b in zip(fast, fit(settings, tmp_path), strict=True):
        assert a["critic_loss"] == pytest.approx(b["critic_loss"], rel=0.05) and a["bad_steps"] == 0


@pytest.mark.parametrize("via", ["cpu", "device"])
@pytest.mark.parametrize("precision", ["int8", "int8-llm", "nf4"])
def test_fit_on_a_quantized_base(settings, tmp_path, precision, via):
    settings["model"] |= {"precision": precision, "text_encoder_precision": precision, "quantize_via": via}
    settings["train"] |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    lines = fit(settings, tmp_path)
    assert len(lines) == 4 and all(line["bad_steps"] == 0 for line in lines)


@pytest.mark.parametrize("kind", ["teacher_forcing", "ode_regression"])
def test_a_causal_student_from_its_warm_up_to_its_pipeline(settings, tmp_path, kind):
    settings["rollout"] = {"causal": True, "num_frame_per_block": 1, "num_training_frames": 3, "context_noise": 10}
    settings["warmup"] = {"kind": kind, "steps": 3, "num_samples": 3, "teacher_steps": 2}
    settings["train"] |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    lines = fit(settings, tmp_path)
    assert all(line["seconds_replay"] > 0 for line in lines if line["step"] % 2 == 0)
    ckpt = str(tmp_path / "run" / "checkpoints" / "step-000004")
    for command in (
        ["generate", "--ckpt", ckpt, "a dog", "--out", str(tmp_path / "dog.mp4"), "--frames", "21"],
        ["export-pipeline", "--ckpt", ckpt, "--out", str(tmp_path / "pipeline")],
    ):
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True).to("cuda")
    assert pipe("a dog", num_frames=9).frames[0].shape[0] == 9


def test_compiled_blocks_compute_the_same(settings, tmp_path):
    settings["validation"]["every"] = 0
    settings["rollout"] = {"causal": True, "num_frame_per_block": 1, "num_training_frames": 3}
    settings["validation"]["num_frames"] = 9
    plain = fit(settings, tmp_path)
    (tmp_path / "run").rename(tmp_path / "plain")
    compiled = fit(settings, tmp_path, "--set", "train.compile=true")
    for a, b in zip(compiled, plain, strict=True):
        assert a["critic_loss"] == pytest.approx(b["critic_loss"], rel=1e-3)


def test_too_little_memory_is_one_line(settings, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings | {"data": settings["data"] | {"resolution": "512x512"}}))
    code = (
        "import torch; torch.cuda.set_per_process_memory_fraction(1e-4)\n"
        f"import sys; sys.argv = ['dmdtrain', 'fit', {str(file)!r}]; from dmdtrain.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1 and "dmdtrain: out of memory (CUDA out of memory" in said and "Traceback" not in said


@pytest.mark.parametrize("backend", CUDA_ORDER)
def test_attention_backends_agree(backend):
    device = torch.device("cuda")
    if not works(backend, device, 128, torch.bfloat16):
        pytest.skip(f"{backend} is not here")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, 128, device=device, generator=generator) for n in (300, 700, 700))
    exact = dispatch_attention_fn(q, k, v, backend=AttentionBackendName("native"))
    found = dispatch_attention_fn(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=AttentionBackendName(backend))
    assert (found - exact).norm() / exact.norm() < 0.01


def test_int8_products():
    layer = Int8Linear.from_weight(torch.randn(1536, 1536, device="cuda") / 40, None)
    x = torch.randn(2, 77, 1536, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        exact = layer(x).float()
        rounded = int8_matmul(x, layer.weight, layer.scale).float()
        layer.multiply_in_int8 = True
        few = layer(x[:1, :3]).float()  # fewer rows than the int8 product takes
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02
    assert torch.allclose(few, exact[:1, :3], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_the_plan_is_within_a_tenth_of_the_measured_peak(tmp_path, causal):
    command = [sys.executable, str(BENCHMARK), "--size", "1.3b", "--steps", "1", "--out", str(tmp_path)]
    command += ["--set", f"rollout.causal={str(causal).lower()}", "--set", "data.resolution=416x240"]
    subprocess.run(command, check=True)
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())["settings"]
    assert record["planned_peak_gib"] == pytest.approx(record["allocated_peak_gib"], rel=0.1)
