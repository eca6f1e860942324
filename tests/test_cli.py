"""A mistake of the user's ends in exit code 2 and one line on stderr, before a model is loaded."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from socket import socket

import pytest
import torch
import yaml
from model_edits import WEIGHTS, drop_tensor, edit_json, other_transformer, remove, truncate, write
from typer.testing import CliRunner

from dmdtrain.cli import app


def run_cli(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every file below a folder, with its time of change."""
    return sorted((str(f.relative_to(folder)), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file())


def refused(*args: object, says: list[str]) -> None:
    """The command ends in exit code 2 and one line that holds all of `says`, in this order."""
    result = run_cli(*args)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("dmdtrain: ")
    assert "Traceback" not in result.output
    position = 0
    for part in says:
        assert part in line[position:], (part, line)
        position = line.index(part, position) + len(part)


def with_changes(settings: dict, changes: dict) -> dict:
    """settings with {"group.key": value} applied."""
    settings = copy.deepcopy(settings)
    for key, value in changes.items():
        *groups, last = key.split(".")
        branch = settings
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[last] = value
    return settings


@pytest.fixture
def config_file(settings, tmp_path) -> Callable[..., Path]:
    """Writes the settings with changes such as {"train.max_steps": 2}."""

    def write(changes: dict | None = None) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(with_changes(settings, changes or {})))
        return file

    return write


@pytest.fixture
def refused_fit(config_file, tmp_path):
    """`fit` with changed settings is refused, and leaves nothing behind."""

    def check(changes: dict, *args: object, says: list[str]) -> None:
        refused("fit", config_file(changes), *args, says=says)
        assert not (tmp_path / "run").exists()

    return check


@pytest.fixture(scope="module")
def trained(wan_folder, tmp_path_factory) -> dict[str, Path]:
    """Folders of one-step runs by the student's kind; the checkpoint is checkpoints/step-000001."""
    runs = {}
    for kind in ("lora", "full"):
        folder = tmp_path_factory.mktemp(f"trained-{kind}")
        (folder / "prompts.txt").write_text("a red cat\na dog\n")
        settings = {
            "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
            "student": {"kind": kind, "rank": 2, "alpha": 4},
            "fake_score": {"rank": 2, "alpha": 2},
            "rollout": {"num_training_frames": 2},
            "data": {"prompts": str(folder / "prompts.txt"), "resolution": "32x32", "max_sequence_length": 8},
            "train": {"max_steps": 1, "mixed_precision": "no", "gradient_checkpointing": False},
            "ema": {"enabled": kind == "lora", "validate_with": "ema" if kind == "lora" else "raw"},
            "validation": {"every": 0, "prompts": ["a cat"], "num_frames": 5, "resolution": "32x32"},
            "log": {"tensorboard": False},
            "output_dir": str(folder / "run"),
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        result = run_cli("fit", folder / "run.yaml")
        assert result.exit_code == 0, result.output
        runs[kind] = folder
    return runs


@pytest.fixture
def ckpt(trained) -> Path:
    return trained["lora"] / "run" / "checkpoints" / "step-000001"


# ---------------------------------------------------------------------------------------------------- processes


def in_process(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"], ["fit", "none.yaml"]], ids=" ".join)
def test_help_and_config_errors_need_no_torch(args):
    """Seconds of imports would stand before every answer."""
    code = (
        "import sys\n"
        "from dmdtrain.cli import app\n"
        f"try:\n    app({args!r})\n"
        "except SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'av'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy), 'code', code)\n"
    )
    result = in_process(sys.executable, "-c", code)
    assert result.stdout.splitlines()[-1] == f"heavy [] code {2 if 'none.yaml' in args else 0}", result.stderr


@pytest.mark.parametrize("base", ["/no/where", "org/name"])
def test_a_model_that_is_not_there_is_told_before_anything_heavy_is_imported(config_file, tmp_path, monkeypatch, base):
    """The hub is a port of this machine that nobody listens at."""
    with socket() as one:
        one.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{one.getsockname()[1]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    args = ["fit", str(config_file({"model.base": base})), "--dry-run"]
    code = f"import sys\nfrom dmdtrain.cli import app\ntry:\n    app({args!r})\nfinally:\n    print('torch' in sys.modules)"
    result = in_process(sys.executable, "-c", code)
    assert (result.returncode, result.stdout) == (2, "False\n"), result.stderr
    (line,) = result.stderr.splitlines()
    where = f"looked in {tmp_path / 'home' / 'hub'}" if base == "org/name" else "no such folder; valid are"
    assert line.startswith(f"dmdtrain: model.base: {base}: no such folder") and where in line


# A CPU with AVX512-BF16, for which bitsandbytes looks for a kernel as it is imported, and warns if it has none.
LARGE_CPU = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes.backends.cpu.ops":
            import bitsandbytes.functional
            bitsandbytes.functional.has_avx512bf16 = lambda: True
            sys.modules["kernels"] = None
sys.meta_path.insert(0, Finder())
"""


def test_what_bitsandbytes_says_of_a_kernel_of_the_cpu_is_not_on_the_console(config_file):
    """Its own message is there without a command, so that this can fail."""
    noise = "Failed to load CPU gemm_4bit_forward"
    assert noise in in_process(sys.executable, "-c", f"{LARGE_CPU}import bitsandbytes").stderr
    args = ["fit", str(config_file({"model.precision": "nf4"})), "--dry-run"]
    result = in_process(sys.executable, "-c", f"{LARGE_CPU}from dmdtrain.cli import app\napp({args!r})")
    assert result.returncode == 0 and noise not in result.stdout + result.stderr, result.stderr


def test_help_names_every_command():
    result = run_cli("--help")
    assert result.exit_code == 0
    for command in ("fit", "prepare", "plan", "synthesize", "validate", "generate", "export-lora", "export-pipeline"):
        assert f" {command} " in result.stdout


def test_a_config_error_of_the_installed_command(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {max_step: 5}")
    result = in_process(sys.executable, "-m", "dmdtrain", "fit", str(tmp_path / "run.yaml"))
    assert result.returncode == 2
    assert result.stdout == ""
    line = f"dmdtrain: {tmp_path / 'run.yaml'}: train.max_step: unknown key; did you mean train.max_steps?\n"
    assert result.stderr == line


def test_a_late_error_of_the_installed_command(wan_folder, tmp_path):
    """A mistake that shows only after models were loaded; their libraries have nothing to add to the line."""
    settings = {
        "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
        "student": {"targets": ["nowhere"]},
        "data": {"prompts": "wan-tiny", "resolution": "32x32", "max_sequence_length": 8},
        "validation": {"num_frames": 5, "resolution": "32x32"},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = in_process(sys.executable, "-m", "dmdtrain", "fit", str(tmp_path / "run.yaml"))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("dmdtrain: student.targets: nowhere: ")


# ---------------------------------------------------------------------------------------------------- fit


def test_dry_run_prints_everything_and_leaves_nothing(config_file, tmp_path):
    before = torch.get_rng_state()
    result = run_cli("fit", config_file(), "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for line in (
        "timesteps       1000, 757, 522 (sigmas 1.0000, 0.7570, 0.5220)",
        "flow shift      3 (the teacher's own sampling schedule)",
        "latents         [C, T, H, W] = [4, 3, 6, 4], 3 latent frames in 1 block",
        "update          2 videos (2 x 1); fake score every step, student every 2 steps",
        "prompts         4 for training, 2 for validation; 1 duplicate and 1 blank left out of 6",
    ):
        assert line in result.stdout
    assert not (tmp_path / "run").exists()
    assert torch.equal(torch.get_rng_state(), before)  # building a model draws its first weights


def test_a_causal_student_is_described_with_its_warm_up_or_warned_without(config_file):
    causal = {"rollout.causal": True, "rollout.num_training_frames": 6, "validation.num_frames": 9}
    lengths = {"rollout.min_training_frames": 3, "rollout.num_gradient_frames": 3}
    result = run_cli("fit", config_file(causal | lengths), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "6 latent frames in 2 blocks, drawn from 3, the last 3 of them scored and trained" in result.stdout
    assert "a causal student that starts from a bidirectional base without a warm-up stays poor" in result.stdout
    warmup = {"warmup.kind": "teacher_forcing", "warmup.steps": 7, "warmup.num_samples": 5, "warmup.teacher_steps": 4}
    result = run_cli("fit", config_file(causal | warmup), "--dry-run")
    assert "warm-up         teacher_forcing, 7 steps at lr 0.0001, on 5 videos of the teacher in 4" in result.stdout
    assert "warning" not in result.stdout
    assert "warning" not in run_cli("fit", config_file(), "--dry-run").stdout


def test_settings_that_a_short_run_makes_nothing_of_are_told(config_file):
    """No mistake: a file for 4,000 steps is tried with --max-steps 10."""
    causal = {
        "rollout.causal": True,
        "rollout.num_frame_per_block": 1,
        "warmup.kind": "teacher_forcing",
        "warmup.steps": 5,
    }
    file = config_file(causal | {"warmup.lr_warmup_steps": 5, "ema.every": 3, "schedule.warmup_steps": 3})
    told = [
        line.partition("warning ")[2].strip()
        for line in run_cli("fit", file, "--dry-run", "--max-steps", 4).stdout.splitlines()
    ]
    assert [text.split(":")[0] for text in told if text] == [
        "ema.every",
        "schedule.warmup_steps",
        "warmup.lr_warmup_steps",
    ]
    quiet = config_file(causal | {"warmup.lr_warmup_steps": 4, "ema.every": 2, "schedule.warmup_steps": 1})
    assert "warning" not in run_cli("fit", quiet, "--dry-run", "--max-steps", 4).stdout


def test_options_are_overrides(config_file, tmp_path):
    result = run_cli(
        *("fit", config_file(), "--dry-run", "--set", "dmd.denoising_steps=1000,500", "--set", "train.batch_size=3"),
        *("--set", "dmd.generator_update_interval=1"),
    )
    assert "timesteps       1000, 500 (sigmas 1.0000, 0.5000)" in result.stdout
    assert "update          3 videos (3 x 1); fake score every step, student every step" in result.stdout
    refused("fit", config_file(), "--max-steps", 0, says=["train.max_steps: 0: it must be at least 1"])


def test_resolution_is_checked_against_the_model(refused_fit):
    refused_fit({"data.resolution": "40x48"}, says=["data.resolution: 40x48", "multiples of 16", "32x48"])
    refused_fit({"validation.resolution": "32x33"}, says=["validation.resolution: 32x33", "multiples of 16", "32x32"])


def test_warped_steps_are_resolved_with_the_models_shift(config_file):
    """Shift 3 of the model's scheduler: 500 -> 3 * 0.5 / (1 + 2 * 0.5) = 750."""
    file = config_file({"dmd.denoising_steps": [1000, 500], "dmd.warp_denoising_steps": True})
    result = run_cli("fit", file, "--dry-run")
    assert "timesteps       1000, 750 (sigmas 1.0000, 0.7500)" in result.stdout


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.max_step": 5}, ["run.yaml: train.max_step: unknown key; did you mean train.max_steps?"]),
        ({"model.base": "/no/where"}, ["model.base: /no/where: no such folder; valid are", "wan-tiny"]),
        ({"model.teacher": "/no/where"}, ["model.teacher: /no/where: no such folder; valid are"]),
        (
            {"rollout.causal": True, "rollout.num_training_frames": 31},
            ["rollout.num_training_frames: 31 latent frames; it must be a multiple of num_frame_per_block (3)"],
        ),
        ({"rollout.num_training_frames": 2000}, ["rollout.num_training_frames: 2000", "the model has 1024"]),
        ({"data.prompts": "/no/prompts.txt"}, ["data.prompts: /no/prompts.txt: no such file"]),
        ({"data.prompts": "/tmp"}, ["data.prompts: /tmp: it is a folder; valid is a file: .txt, .jsonl"]),
        ({"validation.prompts": "/no/prompts.txt"}, ["validation.prompts: /no/prompts.txt: no such file"]),
        ({"validation.prompts": []}, ["validation.prompts: no prompts in it"]),
        pytest.param({"validation.num_frames": 8001}, ["validation.num_frames: 8001"]),
        pytest.param({"data.resolution": "32768x32"}, ["data.resolution: 32768x32"]),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_fit_refuses(refused_fit, changes, says):
    refused_fit(changes, says=says)


def test_fit_refuses_a_prompts_file_without_prompts(refused_fit, tmp_path):
    (tmp_path / "blank.txt").write_text("\n   \n\t\n")
    refused_fit({"data.prompts": str(tmp_path / "blank.txt")}, says=["data.prompts: ", "no prompts in it"])


def test_fit_refuses_a_prompts_file_that_is_no_text(refused_fit, tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    refused_fit({"data.prompts": str(tmp_path / "binary.txt")}, says=["data.prompts: ", "cannot be read as text"])


def test_fit_refuses_a_file_in_place_of_a_folder(refused_fit, tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    refused_fit({"model.base": str(tmp_path / "model.safetensors")}, says=["model.base: ", "no such folder"])


def test_a_hub_id_that_can_not_be_had(refused_fit, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused_fit(
        {"model.base": "no-org/no-model"}, says=["model.base: no-org/no-model: no such folder here, and the hub"]
    )


@pytest.mark.parametrize("role", ["base", "teacher"])
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (remove("model_index.json"), ["model_index.json is missing; is it a Diffusers folder of Wan?"]),
        (remove("vae/config.json"), ["vae/config.json is missing"]),
        (remove("tokenizer/tokenizer_config.json"), ["tokenizer/tokenizer_config.json is missing"]),
        (remove("scheduler/scheduler_config.json"), ["scheduler/scheduler_config.json is missing"]),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), ["text_encoder/config.json is missing"]),
        (write("transformer/config.json", '{"in_channels": '), ["transformer/config.json is broken: "]),
        (
            edit_json("transformer/config.json", _class_name="FluxTransformer2DModel"),
            ["transformer is a FluxTransformer2DModel; it must be a WanTransformer3DModel"],
        ),
        (
            edit_json("vae/config.json", _class_name="AutoencoderKL"),
            ["vae is a AutoencoderKL; it must be a AutoencoderKLWan"],
        ),
        (
            edit_json("text_encoder/config.json", architectures=["T5EncoderModel"]),
            ["text_encoder is a T5EncoderModel; it must be a UMT5EncoderModel"],
        ),
        (edit_json("transformer/config.json", in_channels=36), ["text to video only: ", "36 channels", "makes 4"]),
        (edit_json("vae/config.json", scale_factor_temporal=8), ["does not compress time by 4"]),
        (remove(WEIGHTS["transformer"]), ["transformer holds no .safetensors weights"]),
        (remove(WEIGHTS["text_encoder"]), ["text_encoder holds no .safetensors weights"]),
        (remove(WEIGHTS["vae"]), ["vae holds no .safetensors weights"]),
        pytest.param(write("transformer/config.json", "[]"), ["transformer/config.json"]),
        pytest.param(edit_json("transformer/config.json", in_channels=None), ["transformer", "in_channels"]),
    ],
)
def test_broken_model_folders(refused_fit, broken_folder, edit, says, role):
    folder = broken_folder(edit)
    refused_fit({f"model.{role}": str(folder)}, says=[f"model.{role}: {folder}: ", *says])
    refused_fit({f"model.{role}": str(folder)}, "--dry-run", says=[f"model.{role}: {folder}: ", *says])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (truncate("transformer"), ["transformer/", "is broken: "]),
        (truncate("text_encoder"), ["text_encoder/", "is broken: "]),
        (
            edit_json("transformer/config.json", ffn_dim=64),
            ["transformer/", "ffn", "is [32]; config.json makes it [64]"],
        ),
        pytest.param(drop_tensor("transformer"), ["transformer"]),
        pytest.param(drop_tensor("text_encoder"), ["text_encoder"]),
        pytest.param(truncate("vae"), ["vae"]),
        pytest.param(remove("tokenizer/tokenizer.json"), ["tokenizer"]),
        pytest.param(write("tokenizer/tokenizer.json", "{"), ["tokenizer"]),
    ],
)
def test_broken_weights(config_file, broken_folder, edit, says):
    folder = broken_folder(edit)
    changes = {"model.base": str(folder), "train.max_steps": 1, "validation.every": 0, "log.tensorboard": False}
    changes["dmd.generator_update_interval"] = 1
    refused("fit", config_file(changes), says=[f"{folder}: ", *says])


def test_a_codec_that_is_broken_when_it_is_needed(wan_folder, trained, ckpt, tmp_path, broken_folder):
    """A checkpoint's model folder that broke after the training."""
    folder = broken_folder(truncate("vae"))
    moved = edited_checkpoint(ckpt, tmp_path, lambda text: text.replace(str(wan_folder), str(folder)))
    refused(
        *("generate", "--ckpt", moved, "a cat", "--out", tmp_path / "a.mp4"),
        says=[f"{folder}: vae/", "is broken: "],
    )
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_dim": 24}, "text_dim is 24, the base has 16; they must agree"),
        ({"in_channels": 8, "out_channels": 8}, "text to video only: the transformer takes 8 channels"),
        ({"out_channels": 8}, "transformer/config.json: out_channels: 8: it must be in_channels, 4"),
    ],
)
def test_a_teacher_that_does_not_fit(refused_fit, broken_folder, changes, says):
    folder = broken_folder(other_transformer(**changes))
    refused_fit({"model.teacher": str(folder)}, says=[f"model.teacher: {folder}: {says}"])


def test_a_causal_student_needs_patches_of_one_frame(refused_fit, broken_folder):
    folder = broken_folder(other_transformer(patch_size=(2, 2, 2)))
    refused_fit(
        {
            "model.base": str(folder),
            "rollout.causal": True,
            "rollout.num_training_frames": 6,
            "validation.num_frames": 9,
        },
        says=[f"rollout.causal: true: {folder} has patches of several frames; valid is false"],
    )


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(given, wanted):
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os, sys, dmdtrain.__main__; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    environment = others | ({} if given is None else {"OMP_WAIT_POLICY": given})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == wanted, done.stderr


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_targets_that_match_nothing(config_file, option):
    refused(
        *("fit", config_file({"student.targets": ["nowhere", "to_z"]}), *option),
        says=["student.targets: nowhere, to_z: ", "nowhere is the end of no linear layer"],
    )


def test_a_corrected_mistake_can_start(config_file):
    refused("fit", config_file({"student.targets": ["nowhere"]}), says=["student.targets: nowhere: "])
    result = run_cli("fit", config_file(), "--dry-run")
    assert result.exit_code == 0, result.output


def test_an_attention_backend_that_does_not_exist(config_file):
    refused("fit", config_file({"model.attention": "slow"}), says=["model.attention: slow: valid are ", "native"])


def test_output_folders_that_are_taken(settings, config_file, tmp_path):
    taken = tmp_path / "photos"
    taken.mkdir()
    (taken / "holiday.jpg").write_text("x")
    file = config_file({"output_dir": str(taken)})
    refused("fit", file, says=[f"output_dir: {taken} is not empty and holds no run of dmdtrain; choose another"])
    file = config_file({"output_dir": str(taken / "holiday.jpg")})
    refused("fit", file, says=[f"output_dir: {taken / 'holiday.jpg'} is not a folder"])
    assert [f.name for f in taken.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("name", ["null", "2024", "a #1", "bad: hands", '"quoted"', "it's", "[a]"])
def test_options_that_are_paths_are_taken_as_they_stand(config_file, tmp_path, name):
    (tmp_path / name).write_text("a file in the way")
    refused(
        "fit", config_file(), "--output-dir", tmp_path / name, says=f"output_dir: {tmp_path / name} is not a folder"
    )
    out = ("--out", tmp_path / "made")
    refused("synthesize", config_file(), *out, "--prompts", name, says=f"data.prompts: {name}: ")


def test_what_a_killed_fit_left_is_no_obstacle_and_goes(config_file, tmp_path):
    """A kill while config.yaml is written leaves half of it, and nothing else that tells whose the folder is."""
    run = tmp_path / "run"
    left = [run / name for name in (".config.yaml.1.partial", ".data_report.jsonl.2.partial")]
    run.mkdir()
    for file in left:
        file.write_text("ver")
    file = config_file()
    assert run_cli("fit", file).exit_code == 0
    assert not [f for f in left if f.exists()]
    left = [run / ".metrics.jsonl.3.partial", run / "samples" / "step-000004" / ".results.json.4.partial"]
    left.append(run / "samples" / "step-000004" / ".000_student.mp4.partial")
    for each in left:
        each.write_text("half")
    assert run_cli("fit", file).exit_code == 0
    assert not [f for f in run.rglob(".*") if f.name != ".lock"]


def test_an_output_folder_below_a_file(config_file, tmp_path):
    (tmp_path / "file").write_text("x")
    refused("fit", config_file({"output_dir": str(tmp_path / "file" / "run")}), says=["output_dir: "])


def test_output_folder_of_another_run(trained, ckpt, tmp_path):
    run = trained["lora"]
    before = listing(run)
    other = "fake_score.lr: 1e-05 -> 0.5"
    lr = ("--set", "fake_score.lr=0.5")
    refused("fit", run / "run.yaml", *lr, says=["output_dir: ", f"belongs to another run: {other}"])
    refused(
        *("fit", run / "run.yaml", *lr, "--set", "optimizer.lr=0.5"), says=["output_dir: ", other.split()[0], "1 more"]
    )
    refused("fit", run / "run.yaml", "--resume", "never", says=["output_dir: ", "already holds a run", "--output-dir"])
    refused(
        *("fit", run / "run.yaml", *lr, "--set", "train.seed=5", "--output-dir", tmp_path / "new", "--resume", ckpt),
        says=[f"--resume: {ckpt} is a checkpoint of another configuration: train.seed: 0 -> 5"],
    )
    refused(
        *("fit", trained["full"] / "run.yaml", "--resume", ckpt),
        says=[f"--resume: {ckpt} is a checkpoint of another configuration: student.kind: 'lora' -> 'full'"],
    )
    refused("fit", run / "run.yaml", "--resume", tmp_path / "none", says=["--resume: ", "no such folder"])
    refused("fit", run / "run.yaml", "--resume", run, says=[f"--resume: {run}: not a checkpoint"])
    assert listing(run) == before
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------- checkpoints


def edited_checkpoint(ckpt: Path, folder: Path, edit: Callable[[str], str]) -> Path:
    """A copy of a checkpoint whose config.yaml was edited and is in order all the same."""
    from dmdtrain.train.checkpoint import sha256

    copied = folder / "moved" / "checkpoints" / ckpt.name
    shutil.copytree(ckpt, copied)
    (copied / "config.yaml").write_text(edit((copied / "config.yaml").read_text()))
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["sha256"]["config.yaml"] = sha256(copied / "config.yaml")
    manifest["bytes"]["config.yaml"] = (copied / "config.yaml").stat().st_size
    (copied / "manifest.json").write_text(json.dumps(manifest))
    return copied


COMMANDS = {
    "validate": ["--out", "OUT"],
    "generate": ["a cat", "--out", "OUT/a.mp4"],
    "export-lora": ["--out", "OUT/a.safetensors"],
    "export-pipeline": ["--out", "OUT/a"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_what_is_no_checkpoint(command, trained, ckpt, tmp_path):
    args = [a.replace("OUT", str(tmp_path / "out")) for a in COMMANDS[command]]
    run = trained["lora"] / "run"

    def check(folder: Path, *says: str) -> None:
        refused(command, "--ckpt", folder, *args, says=[f"--ckpt: {folder}: ", *says])

    def damaged(edit: Callable[[Path], object]) -> Path:
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(ckpt, tmp_path / "damaged")
        edit(tmp_path / "damaged")
        return tmp_path / "damaged"

    def flip(folder: Path) -> None:
        content = bytearray((folder / "student.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "student.safetensors").write_bytes(content)

    check(tmp_path / "none", "no such folder")
    check(run, "not a checkpoint (manifest.json is missing)")
    check(damaged(remove("manifest.json")), "not a checkpoint")
    check(damaged(flip), "student.safetensors is damaged (its checksum differs)")
    check(damaged(remove("ema.safetensors")), "ema.safetensors is missing")
    check(damaged(write("manifest.json", '{"format": 1, "sha')), "manifest.json is broken")
    check(damaged(write("manifest.json", '{"format": 2}')), "format 2 is newer than this dmdtrain reads; valid is 1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", '{"format": 1}'])
def test_a_manifest_that_is_none(ckpt, tmp_path, text):
    shutil.copytree(ckpt, tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text(text)
    refused(
        *("generate", "--ckpt", tmp_path / "damaged", "a cat", "--out", tmp_path / "a.mp4"),
        says=["manifest.json is broken"],
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["generate", "a cat", "--out", "OUT.avi"], ["--out: ", "OUT.avi: the name must end in .mp4"]),
        (["generate", "a cat", "--out", "TAKEN.mp4"], ["--out: ", "TAKEN.mp4 exists; choose another name"]),
        (["generate", "  ", "--out", "OUT.mp4"], ["the prompt is empty"]),
        (
            ["generate", "a cat", "--out", "OUT.mp4", "--frames", "6"],
            ["--frames: 6 frames; valid are 1 + 4k, the nearest 5 and 9"],
        ),
        (["generate", "a cat", "--out", "OUT.mp4", "--weights", "mean"], ["--weights: mean: valid are ema, raw"]),
        (["validate", "--steps", "1000,abc"], ["--steps: ", "'abc': input should be a valid number"]),
        (["validate", "--steps", "500,1000"], ["--steps: ", "500,1000 must descend, such as 1000,757,522"]),
        (["validate", "--steps", "1001"], ["--steps: ", "1001", "it must be at most 1000"]),
        (["validate", "--steps", ""], ["--steps: ", "input should be a valid number"]),
        (["validate", "--weights", "mean"], ["--weights: mean: valid are ema, raw"]),
        (["validate", "--prompts", "/no/prompts.txt"], ["--prompts: /no/prompts.txt: no such file"]),
        (["validate", "--prompts", "BLANK.txt"], ["--prompts: ", "no prompts in it"]),
        (["validate", "--out", "RESULTS"], ["--out: ", "RESULTS exists and is not an empty folder; choose another"]),
        (["export-lora", "--out", "OUT.bin"], ["--out: ", "OUT.bin: the name must end in .safetensors"]),
        (
            ["export-lora", "--out", "OUT.safetensors", "--format", "kohya"],
            ["--format: kohya: valid are original (or comfyui, the same), diffusers"],
        ),
        (["export-lora", "--out", "OUT.safetensors", "--weights", "mean"], ["--weights: mean: valid are ema, raw"]),
        (["export-lora", "--out", "TAKEN.safetensors"], ["--out: ", "TAKEN.safetensors exists; choose another name"]),
        (["export-lora", "--out", "BESIDE.safetensors"], ["--out: ", "BESIDE_scheduler exists; choose another name"]),
        pytest.param(["generate", "a cat", "--out", "TAKEN.mp4/a.mp4"], ["--out: "]),
        (["validate", "--out", "TAKEN.mp4"], ["--out: ", "TAKEN.mp4 exists and is not an empty folder"]),
        (
            ["generate", "a cat", "--out", "OUT.mp4", "--frames", "8001"],
            ["--frames: 8001: the model has positions for 4093 frames at most"],  # 1024 latent ones
        ),
    ],
    ids=lambda p: " ".join(p) if p[0] in COMMANDS else "",
)
def test_commands_refuse(command, says, trained, ckpt, tmp_path):
    (tmp_path / "TAKEN.mp4").write_text("x")
    (tmp_path / "TAKEN.safetensors").write_text("x")
    (tmp_path / "BESIDE_scheduler").mkdir()
    (tmp_path / "BLANK.txt").write_text(" \n\n")
    (tmp_path / "RESULTS").mkdir()
    (tmp_path / "RESULTS" / "results.json").write_text("{}")
    before = listing(tmp_path), listing(trained["lora"])
    names = ("OUT", "TAKEN", "BESIDE", "BLANK", "RESULTS")
    args = [str(tmp_path / a) if a.startswith(names) else a for a in command]
    refused(args[0], "--ckpt", ckpt, *args[1:], says=says)
    assert (listing(tmp_path), listing(trained["lora"])) == before


@pytest.mark.parametrize(
    ("below", "says"),
    [
        ("/proc", "No such file or directory"),  # where nobody can write, whatever its permissions say
        ("FILE/deep", "FILE is not a folder"),
        ("LINK", "LINK is not a folder"),
        ("LONG", "too long"),
        ("NEW/LONG", "too long"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "validate", "export-lora", "export-pipeline", "synthesize", "fit"])
def test_an_output_that_can_not_be_written_is_found_before_a_model_is_loaded(
    command, below, says, config_file, ckpt, tmp_path, monkeypatch
):
    (tmp_path / "FILE").write_text("in the way")
    (tmp_path / "LINK").symlink_to("/no/where")
    config = config_file()
    before = listing(tmp_path)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("something is loaded")

    monkeypatch.setattr("dmdtrain.train.setup.build_roles", forbidden)
    monkeypatch.setattr("dmdtrain.train.setup.student_weights", forbidden)
    monkeypatch.setattr("dmdtrain.train.trainer.Trainer.__init__", forbidden)
    name = {"generate": "a.mp4", "export-lora": "a.safetensors"}.get(command, "a")
    out = tmp_path / below.replace("LONG", "x" * 256) / name
    option = "output_dir" if command == "fit" else "--out"
    source = [config] if command in ("fit", "synthesize") else ["--ckpt", ckpt]
    prompt = ["a cat"] if command == "generate" else []
    refused(
        command, *source, *prompt, f"--{option.removeprefix('--').replace('_', '-')}", out, says=[f"{option}: ", says]
    )
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", [["generate", "a cat", "--out", ".mp4"], ["export-lora", "--out", ".safetensors"]])
def test_a_name_too_long_for_what_is_written_beside_it_first(command, ckpt, tmp_path):
    out = tmp_path / ("x" * (255 - len(command[-1])) + command[-1])
    refused(command[0], "--ckpt", ckpt, *command[1:-1], out, says=["--out: ", "File name too long"])


@pytest.mark.parametrize(
    ("command", "name", "link"),
    [
        (["generate", "a cat"], "a.mp4", "a.mp4"),
        (["export-lora"], "a.safetensors", "a.safetensors"),
        (["export-lora"], "a.safetensors", "a_scheduler"),
        (["export-pipeline"], "a", "a"),
    ],
)
def test_a_link_that_leads_nowhere_is_in_the_way_as_a_file_is(command, name, link, ckpt, tmp_path):
    (tmp_path / link).symlink_to("/no/where")
    says = [f"--out: {tmp_path / link} exists; choose another name"]
    refused(command[0], "--ckpt", ckpt, *command[1:], "--out", tmp_path / name, says=says)
    assert [(file.name, file.is_symlink()) for file in tmp_path.iterdir()] == [(link, True)]


def test_text_of_the_command_line_that_is_not_utf_8(config_file, ckpt, tmp_path):
    text = os.fsdecode(b"a caf\xe9")
    refused(
        "fit", config_file(), "--set", f"data.negative_prompt={text}", says=["--set data.negative_prompt=", "no text"]
    )
    refused(
        "generate", "--ckpt", ckpt, text, "--out", tmp_path / "a.mp4", says=["the prompt holds a character that is no"]
    )


def test_a_home_folder_in_output_dir_is_that_folder(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "run").mkdir(parents=True)
    (tmp_path / "home" / "run" / "mine.txt").write_text("x")
    refused(
        "fit", config_file(), "--output-dir=~/run", "--dry-run", says=[f"output_dir: {tmp_path}/home/run is not empty"]
    )


def test_commands_on_a_student_that_was_trained_whole(trained, tmp_path):
    ckpt = trained["full"] / "run" / "checkpoints" / "step-000001"
    refused(
        *("export-lora", "--ckpt", ckpt, "--out", tmp_path / "a.safetensors"),
        says=[f"--ckpt: {ckpt}: its student was trained whole (student.kind: full); it has no LoRA"],
    )
    refused(
        *("generate", "--ckpt", ckpt, "a cat", "--out", tmp_path / "a.mp4", "--weights", "ema"),
        says=["--weights: ema: ", "was trained without an average; valid is raw"],
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "export-lora"])  # which needs no model
def test_a_model_folder_that_has_gone(command, wan_folder, ckpt, tmp_path):
    moved = edited_checkpoint(ckpt, tmp_path, lambda text: text.replace(str(wan_folder), "/no/where"))
    args = [a.replace("OUT", str(tmp_path / "out")) for a in COMMANDS[command]]
    refused(command, "--ckpt", moved, *args, says=["model.base: /no/where: no such folder"])


def test_export_needs_no_training_prompts(trained, ckpt, tmp_path):
    prompts = str(trained["lora"] / "prompts.txt")
    moved = edited_checkpoint(ckpt, tmp_path, lambda text: text.replace(prompts, "/no/prompts.txt"))
    result = run_cli("export-lora", "--ckpt", moved, "--out", tmp_path / "a.safetensors")
    assert result.exit_code == 0, result.output
