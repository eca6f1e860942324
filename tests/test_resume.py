"""Everything that shapes the future is in a checkpoint: run 2 steps, resume, run 2 = run 4, to the bit, for every combination."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import write_clip
from conftest import tiny_transformer
from rich.console import Console
from safetensors.torch import load_file

from dmdtrain.config import Config, build
from dmdtrain.models.encode import TextCache
from dmdtrain.models.wan import find_folder
from dmdtrain.train import setup
from dmdtrain.train.checkpoint import list_checkpoints
from dmdtrain.train.fit import fit

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red cat runs", "a blue dog sleeps", "a cat on grass"]
OPTIMIZERS = ("adamw", "adamw_bf16", "adamw8bit")
CASES = [
    *(("lora", *rest) for rest in product(("bidirectional", "causal"), ("fp32", "int8", "nf4"), OPTIMIZERS)),
    *(("full", *rest) for rest in product(("bidirectional", "causal"), ("fp32",), OPTIMIZERS)),
]


@pytest.fixture(scope="module")
def encoded(wan_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "cache"
    found = find_folder(str(wan_folder), "model.base")
    TextCache(found, folder / "text", 8, "fp32", torch.device("cpu")).prepare([*PROMPTS, "", "a dog"])
    return folder


@pytest.fixture(scope="module")
def wide_folder(wan_folder, tmp_path_factory) -> Path:
    """The same but for a transformer with weights of 4096 values and more, whose moments bitsandbytes quantizes."""
    folder = shutil.copytree(wan_folder, tmp_path_factory.mktemp("models") / "wan-wide")
    tiny_transformer(ffn_dim=176).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def values(settings, tmp_path) -> dict:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings["data"] |= {"prompts": str(tmp_path / "prompts.txt"), "resolution": "32x32", "caption_dropout": 0.3}
    settings["rollout"] = {"num_training_frames": 2}
    settings["checkpoint"] = {"every": 1, "keep": 10}
    settings["validation"] = {"every": 0, "prompts": ["a dog"], "num_frames": 5, "resolution": "32x32"}
    settings["log"] = {"tensorboard": False}
    return settings


def configured(values: dict, output: Path, encoded: Path, steps: int) -> Config:
    values = copy.deepcopy(values) | {"output_dir": str(output)}
    values["train"]["max_steps"] = steps
    if not output.exists():
        shutil.copytree(encoded, output / "cache")
    return build(values)


def content(checkpoint: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            found |= {f"{file.stem}:{key}": value for key, value in load_file(file).items()}
        elif file.suffix == ".json" and file.name != "manifest.json":
            found[file.name] = json.loads(file.read_text())
    return found


def assert_same_to_the_bit(a: Path, b: Path) -> None:
    first, second = content(a), content(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key


def assert_two_and_two_are_four(values: dict, encoded: Path, folder: Path) -> Path:
    """Returns the run that was not stopped. One with a warm-up of two steps is stopped after its first, too."""
    quiet, whole, broken = Console(quiet=True), folder / "whole", folder / "broken"
    fit(configured(values, whole, encoded, 4), "auto", quiet)
    if "warmup" in values:
        shutil.copytree(whole, broken)
        shutil.rmtree(broken / "checkpoints")
        shutil.rmtree(broken / "warmup" / "step-000002")
    fit(configured(values, broken, encoded, 2), "auto", quiet)
    torch.manual_seed(5)  # the global generator plays no part
    fit(configured(values, broken, encoded, 4), "auto", quiet)
    assert [f.name for f in list_checkpoints(broken / "checkpoints")] == [f"step-{n:06d}" for n in (1, 2, 3, 4)]
    for stage in ("warmup", "checkpoints"):
        for checkpoint in list_checkpoints(whole / stage):
            assert_same_to_the_bit(broken / stage / checkpoint.name, checkpoint)
    return whole


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_and_two_are_four(case, values, encoded, wide_folder, tmp_path):
    """A causal student is stopped in its warm-up, too. Every second case accumulates."""
    kind, direction, precision, optimizer = case
    values["model"]["precision"] = precision
    if optimizer == "adamw8bit":
        values["model"]["base"] = str(wide_folder)
    rank = 176 if optimizer == "adamw8bit" else 4  # 176 x 24 values
    for role in ("student", "fake_score"):
        values[role] |= {"kind": kind, "rank": rank, "alpha": rank}
    values["optimizer"]["name"] = optimizer
    values["train"] |= {"batch_size": 2, "gradient_accumulation": 1 + CASES.index(case) % 2}
    if direction == "causal":
        values["rollout"] |= {"causal": True, "num_frame_per_block": 1}
        kinds = ("teacher_forcing", "ode_regression")
        values["warmup"] = {"kind": kinds[CASES.index(case) % 2], "steps": 2, "num_samples": 3, "teacher_steps": 3}
    whole = assert_two_and_two_are_four(values, encoded, tmp_path)
    second, last = (content(whole / "checkpoints" / f"step-{n:06d}") for n in (2, 4))
    moved = [
        key for key, value in last.items() if isinstance(value, torch.Tensor) and not torch.equal(value, second[key])
    ]  # type: ignore[arg-type]
    for part in ("student:", "fake_score:", "ema:", "optimizer_student:", "optimizer_fake_score:", "random:"):
        assert any(key.startswith(part) for key in moved), part
    quantized = any(isinstance(v, torch.Tensor) and v.dtype == torch.uint8 for k, v in last.items() if "optimizer" in k)
    assert quantized == (optimizer == "adamw8bit")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Five clips, two of them tall, with captions that are prompts."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        size = (64, 48) if number in (1, 4) else (48, 64)
        write_clip(folder / f"{number}.mp4", 5 + number, size, caption=PROMPTS[number % 3])
    return folder


BLOCKS = {"rollout.causal": True, "rollout.num_frame_per_block": 1}
ON_HOST = {"train.gradient_checkpointing": True, "train.checkpoints_on": "host", "ema.keep_on": "host"}
CLIPS = {"dmd.real_data_loss_weight": 0.3, "data.buckets": True}
REUSED = {"fake_score.reuse_rollout": True, "dmd.generator_update_interval": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "paged moments, all on the host, rollouts that serve twice": ON_HOST
    | REUSED
    | {"optimizer.name": "paged_adamw8bit", "student.rank": 176, "fake_score.rank": 176},
    "clips": CLIPS | {"train.gradient_accumulation": 2},
    "clips in two sets, rollouts that serve twice": CLIPS | REUSED | {"weights": [3.0, 1.0]},
    "blocks, a cache in int8, lengths that are drawn": BLOCKS
    | ON_HOST
    | {"rollout.kv_cache": "int8", "rollout.min_training_frames": 1, "rollout.context_noise": 100},
    "blocks, a cache on the host, clips": BLOCKS | CLIPS | REUSED | {"rollout.kv_cache": "host"},
    "blocks, clips in the warm-up": BLOCKS | {"warmup.kind": "teacher_forcing", "warmup.steps": 2},
    "bf16 passes": {"train.mixed_precision": "bf16"},
    "bf16 passes, blocks": BLOCKS | {"train.mixed_precision": "bf16", "model.precision": "bf16"},
    "int8 activations": {"model.precision": "int8-llm"},
    "paged moments, blocks": BLOCKS
    | {"optimizer.name": "paged_adamw8bit", "student.rank": 176, "fake_score.rank": 176},
    "compiled": {"train.compile": True},
    "blocks of the model on the host": {"model.offload_blocks": True, "train.batched_guidance": False},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_is_resumed(case, values, clips, encoded, tmp_path, monkeypatch):
    if case == "compiled":  # traced alone: what a backend makes of it is its own
        options = setup.role_options
        monkeypatch.setattr(setup, "role_options", lambda *args: options(*args) | {"compile_backend": "eager"})
    values["train"]["batch_size"] = 2
    for key, value in OPTIONS[case].items():
        group, _, name = key.partition(".")
        if name:
            values.setdefault(group, {})[name] = value
    if "clips" in case:
        weights = OPTIONS[case].get("weights", [None])
        values["data"]["videos"] = [{"path": str(clips), "weight": weight} for weight in weights]
    whole = assert_two_and_two_are_four(values, encoded, tmp_path)
    second, last = (content(whole / "checkpoints" / f"step-{n:06d}") for n in (2, 4))
    moved = {k.split(".")[0] for k, v in last.items() if isinstance(v, torch.Tensor) and not torch.equal(v, second[k])}
    assert {"random:draws", "random:prompts"} <= moved
    assert ("random:real" in moved) == ("dmd.real_data_loss_weight" in OPTIONS[case])


def test_a_run_of_deterministic_kernels(values, encoded, tmp_path):
    values["train"]["deterministic"] = True
    try:
        assert_two_and_two_are_four(values, encoded, tmp_path)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_surroundings_change_nothing(values, encoded, tmp_path):
    """Working directory, locale, hash seed, time zone, the terminal's encoding, a clock that jumps, saves in the foreground."""
    values["train"]["batch_size"] = 1
    values["data"]["prompts"] = str(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a red cat runs\nein Kätzchen läuft\n", encoding="utf-8")
    here, there = tmp_path / "here", tmp_path / "läuft 走"
    config = configured(values, here, encoded, 4)
    fit(config, "auto", Console(quiet=True))
    from dmdtrain.config import dump

    (tmp_path / "run.yaml").write_text(dump(config), encoding="utf-8")
    jump = (
        "import itertools, time; real = time.time; jumps = itertools.cycle((0, 1e8, -1e8, 3.5))\n"
        "time.time = lambda: real() + next(jumps)\n"
        "from dmdtrain.cli import main; main()"
    )
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONHASHSEED": "123",
        "TZ": "Asia/Kathmandu",
        "PYTHONIOENCODING": "ascii",
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    overrides = ["--set", "checkpoint.background=false", "--set", "log.tensorboard=true"]
    ran = subprocess.run(
        [sys.executable, "-c", jump, "fit", tmp_path / "run.yaml", "--output-dir", there, *overrides],
        cwd="/",
        env=environment,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert b"done: " in ran.stdout
    for step in (3, 4):
        assert_same_to_the_bit(*(run / "checkpoints" / f"step-{step:06d}" for run in (here, there)))
