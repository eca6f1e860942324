"""SimpleTuner's configuration, translated: every key ends in a list, and the result trains."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from clip_files import write_clip
from conftest import done, refused, run_cli

from dmdtrain.config import Config, ConfigError, load
from dmdtrain.prompt_library import LIBRARY
from dmdtrain.simpletuner import tables
from dmdtrain.simpletuner.importer import import_config
from dmdtrain.simpletuner.keys import known
from dmdtrain.simpletuner.translation import LISTS

# SimpleTuner's quickstart for DMD, as published.
QUICKSTART = json.loads((Path(__file__).parent / "simpletuner_quickstart.json").read_text(encoding="utf-8"))
DATASET = {
    "dataset_type": "video",
    "cache_dir": "cache/wan-dmd",
    "resolution_type": "pixel_area",
    "crop": False,
    "num_frames": 121,
    "frame_interval": 1,
    "resolution": 480,
    "minimum_image_size": 0,
    "repeats": 0,
}


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """Writes their files as the quickstart lays them out, and imports them from there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "config" / "wan"
    folder.mkdir(parents=True)
    (folder / "validation_prompts_dmd.json").write_text(json.dumps({"fox": "a fox", "owl": "an owl"}))

    class Theirs:
        def write(self, changes: dict | None = None, dataset: object = DATASET) -> None:
            values = {key: value for key, value in (QUICKSTART | (changes or {})).items() if value is not ...}
            (tmp_path / "config" / "config.json").write_text(json.dumps(values))
            (folder / "multidatabackend.json").write_text(json.dumps(dataset))

        def lists(self, *args: str, code: int = 0) -> dict[str, list[str]]:
            """What import-config printed, by list."""
            (tmp_path / "run.yaml").unlink(missing_ok=True)
            (tmp_path / "run.prompts.txt").unlink(missing_ok=True)
            result = run_cli("import-config", "config/config.json", *args)
            assert result.exit_code == code, (result.output, result.exception)
            found, current = {}, None
            for line in result.stdout.splitlines():
                name = line.rpartition(" (")[0]
                if name in LISTS:
                    current = found.setdefault(name, [])
                    count = int(line.rpartition("(")[2].rstrip(")"))
                elif line.startswith("  "):
                    current.append(line.strip())
                    assert len(current) <= count
            assert tuple(found) == LISTS
            return found

        def imported(self, changes: dict | None = None, *args: str, dataset: object = DATASET, code: int = 0):
            self.write(changes, dataset)
            return self.lists(*args, code=code), load(tmp_path / "run.yaml")

    return Theirs()


def keys(values: dict) -> list[str]:
    """Every key, those of groups with dots."""
    return [
        inner
        for key, value in values.items()
        for inner in ([f"{key}.{k}" for k in value] if isinstance(value, dict) else [key])
    ]


def distil(**changes) -> dict:
    return {"distillation_config": QUICKSTART["distillation_config"] | changes}


def test_the_quickstart_is_the_shipped_configuration(theirs):
    lists, config = theirs.imported()
    shipped = load(Path(__file__).parents[1] / "configs" / "wan_3step.yaml")
    assert lists["refused"] == []
    assert (
        config.model_copy(
            update={
                "warmup": shipped.warmup,  # theirs has none
                "ema": shipped.ema,  # theirs does not set the decay
                "optimizer": shipped.optimizer,  # there the eps of adamw_bf16 is 1e-6
                "validation": shipped.validation,  # with the library's prompts
                "data": config.data.model_copy(update={"cache_dir": None, "prompts": shipped.data.prompts}),
            }
        )
        == shipped
    )
    assert config.warmup.kind == "ode_regression" and config.ema == shipped.ema.model_copy(update={"decay": 0.995})
    assert config.optimizer == shipped.optimizer.model_copy(update={"eps": 1e-6})
    assert config.data.cache_dir == "cache/wan-dmd"
    unowned = [
        row.partition(" = ")[0] for row in lists["has no meaning here"] if "set hub.model_id to NAME/REPO" in row
    ]
    assert unowned == ["hub_model_id", "push_checkpoints_to_hub", "push_to_hub"] and config.hub.model_id is None
    prompts = config.validation.prompts
    assert prompts == [QUICKSTART["validation_prompt"], "a fox", "an owl"]
    assert config.validation.model_copy(update={"prompts": shipped.validation.prompts}) == shipped.validation


def test_every_key_ends_in_exactly_one_list(theirs):
    lists, _ = theirs.imported()
    told = [row.partition(" = ")[0] for rows in lists.values() for row in rows if "(their default)" not in row]
    assert sorted(told) == sorted(keys(QUICKSTART) + [f"dataset 0.{key}" for key in DATASET])


@pytest.mark.parametrize("kind", ["value", "another value", "null", "old name"])
def test_every_known_key_is_spelled_in_the_report(theirs, kind):
    """Also under an older name, and as one that a pattern stands for."""
    values = {}
    for key in [*known(), "fsdp_x", "deepspeed_y", "crepa_z", "new_way_enabled"]:
        old = key in tables.ALIASES
        if key.startswith(("dataset.", "distillation_config")) or (old and kind != "old name"):
            continue
        values[key] = {"null": None, "another value": 2}.get(kind, QUICKSTART.get(tables.ALIASES.get(key, key), True))
        if old:
            values.pop(tables.ALIASES[key], None)
    inner = [key.partition(".")[2] for key in known() if key.startswith("distillation_config.")]
    inner = {key: None if kind == "null" else QUICKSTART["distillation_config"].get(key, 0) for key in inner}
    needed = ("model_family", "distillation_method", "pretrained_model_name_or_path")
    values |= {key: QUICKSTART[key] for key in needed} | {"distillation_config": inner}
    if kind == "old name":
        values |= {old: values.pop(new, 1) for old, new in tables.ALIASES.items()}
    theirs.write(dict.fromkeys(QUICKSTART, ...) | values)
    rows = [row for found in theirs.lists(code=0 if kind == "null" else 1).values() for row in found]
    told = [row.partition(" = ")[0] for row in rows if "(their default)" not in row]
    assert not set(keys(values)) - set(told)
    assert not any("unknown key" in row for row in rows)


def test_what_is_written_is_short_and_says_why(theirs, tmp_path):
    theirs.imported()
    text = (tmp_path / "run.yaml").read_text()
    assert len(text.splitlines()) < 50 and "generator_update_interval" not in text
    assert "# not 121: 121 frames are 31 latent frames" in text and "117 and 129" in text
    assert "independent_first_frame" in text
    assert "num_frames: 117" in text
    assert "wandb: null # set it to dmd-training, after pip install 'dmdtrain[wandb]'" in text


SHORT = {"max_train_steps": 2, "validation_step_interval": 2}


@pytest.mark.parametrize("with_clips", [False, True], ids=["prompts", "clips"])
def test_the_result_trains(theirs, tmp_path, with_clips):
    """On the miniature, with sizes to match."""
    if with_clips:
        for number in range(3):
            write_clip(
                tmp_path / "clips" / f"{number}.mp4", 21 + number, (32, 48 - 16 * number), caption=f"a red {number}"
            )
        theirs.imported(SHORT, dataset=[BACKENDS[0]])
    else:
        theirs.imported(SHORT)
        (tmp_path / "run.prompts.txt").write_text("a red circle\na blue cross\n")
    sizes = [
        "model.teacher=wan-tiny",
        "model.precision=fp32",
        "model.text_encoder_precision=fp32",
        "student.rank=4",
        "fake_score.rank=4",
        "rollout.num_training_frames=6",
        "warmup.steps=1",
        "warmup.num_samples=1",
        "warmup.teacher_steps=3",
        "data.resolution=32x32",
        "data.max_sequence_length=16",
        "validation.resolution=32x32",
        "validation.num_frames=21",
        "validation.count=1",
        "schedule.warmup_steps=1",
    ]
    sets = [part for size in sizes for part in ("--set", size)]
    said = done("fit", "run.yaml", "--dry-run", *sets)
    assert "in order" in said and ("3 of them are kept for validation" in said) == with_clips
    done("fit", "run.yaml", *sets)
    rows = [json.loads(line) for line in (tmp_path / "output/wan-dmd/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "critic_loss" in row] == [1, 2]
    assert any("validation_ema_real_loss" in row for row in rows) == with_clips
    assert {file.name for file in (tmp_path / "cache/wan-dmd").iterdir()} == {
        "text",
        *(["videos"] if with_clips else []),
    }


def test_a_place_that_can_not_be_written_is_told_before_anything_is_read(tmp_path):
    says = "--out: /proc/run.prompts.txt can not be written: No such file or directory"
    refused("import-config", tmp_path / "none.json", "-o", "/proc/run.yaml", says=says)


def test_the_bare_quickstart_passes_a_dry_run(tmp_path, monkeypatch):
    """Its configuration alone, without the files that it names: with its validation prompt to begin with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QUICKSTART))
    result = run_cli("import-config", "config.json", "-o", "mine.yaml")
    assert result.exit_code == 1  # the files are refused, and told
    assert (
        "to do: mine.prompts.txt holds the validation prompts alone: replace it by your prompts, thousands, varied"
    ) in result.stdout
    assert load("mine.yaml").data.prompts == "mine.prompts.txt"
    assert "replace it by your prompts" in (tmp_path / "mine.yaml").read_text()
    assert (tmp_path / "mine.prompts.txt").read_text() == f"{QUICKSTART['validation_prompt']}\n"
    tiny = ("--set", "model.teacher=wan-tiny")
    assert "in order" in done("fit", "mine.yaml", "--dry-run", *tiny)


def test_without_any_prompt_the_file_is_to_be_made(theirs, tmp_path):
    none = {"validation_prompt": ..., "validation_prompt_library": ...}
    _, config = theirs.imported(none)
    assert config.data.prompts == "prompts.txt" and not (tmp_path / "run.prompts.txt").exists()


def test_a_bidirectional_student_has_no_blocks(theirs):
    lists, config = theirs.imported(None, "--bidirectional")
    assert not config.rollout.causal and config.warmup.kind == "none"
    assert config.validation.num_frames == 121  # 1 + 4 x 30: no blocks to make up
    told = {row.partition(" = ")[0] for row in lists["has no meaning here"]}
    assert {f"distillation_config.{key}" for key in tables.BLOCKS} <= told


ADAMW = {"name": "adamw_bf16", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("changes", "ours", "value"),
    [
        ({"base_model_precision": "no_change"}, "model.precision", "bf16"),
        ({"base_model_precision": "nf4-bnb"}, "model.precision", "nf4"),
        ({"quantize_via": "accelerator"}, "model.quantize_via", "device"),
        ({"attention_mechanism": "flash-attn-3"}, "model.attention", "_flash_3"),
        ({"optimizer": "bnb-adamw8bit"}, "optimizer.name", "adamw8bit"),
        ({"lr_scheduler": "constant"}, "schedule.warmup_steps", 0),
        ({"lr_scheduler": "constant_with_warmup"}, "schedule.warmup_steps", 100),
        ({"lr_end": 1e-7}, "schedule.min_lr", 1e-7),
        ({"ema_validation": "comparison"}, "ema.validate_with", "both"),
        ({"use_ema": False}, "ema.validate_with", "raw"),
        ({"ema_warmup_steps": 0}, "ema.warmup", True),
        ({"ema_warmup_steps": 200}, "ema.warmup", True),
        ({"ema_warmup_steps": "200", "use_ema": False}, "ema.warmup", True),
        ({"use_ema": "false"}, "ema.enabled", False),
        ({"use_ema": ...}, "ema.enabled", False),
        ({"learning_rate": ...}, "optimizer.lr", 4e-7),
        ({"learning_rate": "1e-6"}, "optimizer.lr", 1e-6),
        ({"train_batch_size": ...}, "train.batch_size", 4),
        ({"lora_rank": 64, "lora_alpha": None}, "student.alpha", 64),
        ({"lora_rank": 64}, "fake_score.rank", 64),
        ({"adam_beta1": 0.0, "optimizer_beta1": 0.5}, "optimizer.betas", (0.5, 0.999)),
        ({"adam_beta1": 0.0, "adam_epsilon": 1e-3, "adam_weight_decay": 0.5}, "optimizer", ADAMW | {"eps": 1e-6}),
        ({"adam_beta1": "0.5", "adam_epsilon": 1e-3, "deepspeed_config": "ds.json"}, "optimizer.betas", (0.5, 0.999)),
        ({"adam_weight_decay": 0.5, "deepspeed_config": "ds.json"}, "optimizer", ADAMW | {"weight_decay": 0.5}),
        ({"optimizer": "torch-adamw"}, "optimizer", ADAMW | {"name": "adamw"}),
        ({"optimizer": "bnb-adamw"}, "optimizer", ADAMW | {"name": "adamw", "eps": 1e-6}),
        ({"optimizer": ...}, "optimizer", ADAMW | {"eps": 1e-6}),
        ({"optimizer": "ao-adamw8bit"}, "optimizer", ADAMW | {"name": "adamw8bit", "eps": 1e-6}),
        (
            {"optimizer": "optimi-adamw"},
            "optimizer",
            ADAMW | {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0},
        ),
        ({"optimizer": "optimi-adamw", "optimizer_beta1": 0.5}, "optimizer.betas", (0.5, 0.99)),
        (
            {"optimizer_config": "weight_decay=0.0,eps=1e-8", "optimizer_beta1": 0.5},
            "optimizer",
            ADAMW | {"weight_decay": 0.0},
        ),
        ({"num_processes": 8}, "train.gradient_accumulation", 8),
        ({"num_processes": "8", "gradient_accumulation_steps": 3}, "train.gradient_accumulation", 24),
        ({"num_processes": 8, "context_parallel_size": 4}, "train.gradient_accumulation", 2),
        ({"num_processes": 1}, "train.gradient_accumulation", 1),
        ({"num_processes": 2, "lr_scale": True, "train_batch_size": 2}, "optimizer.lr", 8e-5),
        ({"num_processes": 4, "lr_scale": True, "lr_scale_sqrt": True}, "optimizer.lr", 4e-5),
        ({"lr_scheduler": "linear", "lr_end": 1e-7}, "schedule.min_lr", 0),
        ({"learning_rate": None}, "optimizer.lr", 4e-7),
        ({"model_type": ..., "base_model_precision": ...}, "student.kind", "full"),
        ({"fsdp_enable": None, "validation_preview": None}, "train.seed", 1000),
        ({"distillation_config": None}, "dmd.denoising_steps", [1000, 757, 522]),
        (distil(dmd_denoising_steps=[1000, 757, 522, 0]), "dmd.denoising_steps", [1000, 757, 522]),
        (distil(dmd_denoising_steps="1000, 757,522,0"), "dmd.denoising_steps", [1000, 757, 522]),
        ({"optimizer_beta2": 0.99}, "optimizer.betas", (0.9, 0.99)),
        ({"report_to": "none"}, "log.tensorboard", False),
        ({"report_to": "tensorboard"}, "log.tensorboard", True),
        ({"push_to_hub": True, "hub_model_id": "me/fox"}, "hub.model_id", "me/fox"),
        ({"push_to_hub": True, "hub_model_id": "me/fox", "model_card_private": False}, "hub.private", False),
        (
            {"push_to_hub": "true", "hub_model_id": "me/fox", "push_checkpoints_to_hub": True},
            "hub.push_checkpoints",
            True,
        ),
        ({"push_to_hub": False, "hub_model_id": "me/fox", "push_checkpoints_to_hub": True}, "hub.model_id", None),
        ({"hub_model_id": "fox"}, "hub.model_id", None),
        ({"validation_disable": True}, "validation.every", 0),
        ({"validation_step_interval": ..., "validation_disable": True}, "validation.every", 0),
        ({"checkpoint_step_interval": ..., "checkpointing_steps": 7}, "checkpoint.every", 7),
        ({"output_dir": ..., "--output_dir": "here"}, "output_dir", "here"),
        ({"pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-14B"}, "model.base", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        (
            {"pretrained_model_name_or_path": ..., "model_flavour": "t2v-480p-14b-2.1"},
            "model.base",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        ),
        (
            {"pretrained_model_name_or_path": ..., "model_flavour": "ti2v-5b-2.2"},
            "model.base",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        ),
        ({"pretrained_model_name_or_path": "Wan-AI/Wan2.2-TI2V-5B"}, "model.base", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ({"peft_lora_target_modules": "to_q, to_v"}, "student.targets", ["to_q", "to_v"]),
        ({"validation_prompt_library": False}, "validation.prompts", [QUICKSTART["validation_prompt"]]),
        ({"validation_prompt": ..., "validation_prompt_library": True}, "validation.prompts", list(LIBRARY)),
        ({"validation_resolution": "832x480,1280x720"}, "validation.resolution", "832x480"),
        (distil(num_training_frames=28), "rollout.num_training_frames", 27),
        (distil(num_training_frames=28, independent_first_frame=True), "rollout.num_training_frames", 28),
        (distil(independent_first_frame=True, num_training_frames=22), "validation.num_frames", 121),
        ({"validation_num_video_frames": 120}, "validation.num_frames", 117),
        (distil(dmd_denoising_steps="1000,666,333"), "dmd.denoising_steps", [1000, 666, 333]),
        ({"validation_num_video_frames": "120"}, "validation.num_frames", 117),
        ({"lora_rank": "64", "lora_alpha": None}, "student.alpha", 64),
        ({"optimizer_beta1": "0.5"}, "optimizer.betas", (0.5, 0.999)),
        ({"train_batch_size": "2"}, "train.batch_size", 2),
        (distil(num_frame_per_block="4", num_training_frames="22"), "rollout.num_training_frames", 20),
        (
            {
                "validation_prompt": ...,
                "validation_prompts": ["a cat", "", "a dog"],
                "validation_prompt_library": False,
            },
            "validation.prompts",
            ["a cat", "a dog"],
        ),
        ({"validation_prompt": "", "validation_prompt_library": False}, "validation.prompts", None),
        ({"validation_prompt": "true", "validation_prompt_library": False}, "validation.prompts", ["true"]),
        ({"output_dir": "2024"}, "output_dir", "2024"),
        (distil(generator_update_interval=4), "dmd.generator_update_interval", 4),
        ({"distillation_config": {"dmd": {"timestep_shift": 7.0}}}, "dmd.timestep_shift", 7.0),
        ({"distillation_config": '{"timestep_shift": 7.0}'}, "dmd.timestep_shift", 7.0),
    ],
    ids=lambda value: json.dumps(value, default=lambda _: "unset")[:60] if isinstance(value, dict) else None,
)
def test_values(theirs, changes, ours, value):
    lists, config = theirs.imported(changes)
    assert lists["refused"] == []
    found = config
    for part in ours.split("."):
        found = getattr(found, part)
    if isinstance(value, dict):
        found = {key: getattr(found, key) for key in value}
    assert found == value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rat": 1}, "learning_rat = 1: unknown key; did you mean learning_rate?"),
        ({"learning_rat": None}, "learning_rat = null: unknown key; did you mean learning_rate?"),
        ({"optimizer_config": "amsgrad=True"}, "only eps and weight_decay can be read"),
        ({"optimizer_config": "eps=small"}, "optimizer.eps: 'small'"),
        ({"num_processes": "all"}, "multiply train.gradient_accumulation by the number of processes"),
        ({"num_processes": 2, "gradient_accumulation_steps": "x"}, "multiply train.gradient_accumulation by it"),
        ({"lr_scale": True, "train_batch_size": "x"}, "lr_scale = true: set optimizer.lr to the scaled rate"),
        (
            {"resolution": ..., "resolution_type": "area", "data_backend_config": ...},
            "resolution = 1024 (area) (their default): set data.resolution",
        ),
        ({"resolution_type": "edge"}, 'resolution_type = "edge": valid are pixel_area, pixel, area'),
        ({"zzz": [1]}, "zzz = [1]: unknown key; remove it if it is not yours"),
        (distil(fake_score_lrr=1), "distillation_config.fake_score_lrr = 1: unknown key; did you mean fake_score_lr?"),
        (distil(adversarial_weight=0.1), "adversarial_weight = 0.1: there is no adversarial loss here"),
        (distil(shift=7.0), "shift = 7.0: set dmd.timestep_shift"),
        ({"base_model_precision": "fp8-torchao"}, 'base_model_precision = "fp8-torchao": valid here are bf16'),
        ({"optimizer": "prodigy"}, 'optimizer = "prodigy": valid here are adamw'),
        ({"lora_type": "lycoris"}, "lora_type"),
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1: adapters have no dropout"),
        ({"crepa_enabled": True}, "crepa_enabled = true: another way to train than DMD"),
        ({"max_train_steps": 0}, "max_train_steps = 0: set train.max_steps"),
        ({"model_flavour": []}, "model_flavour = []: only text-to-video of Wan 2.1 and of Wan 2.2 5B"),
        ({"validation_prompt": [5]}, "validation_prompt = [5]: it is no prompt and no list of them"),
        ({"learning_rate": -1}, "learning_rate = -1: optimizer.lr: -1: it must be above 0"),
        ({"learning_rate": [1]}, "learning_rate = [1]: optimizer.lr: [1]: input should be a valid number"),
        ({"train_batch_size": True}, "train_batch_size = true: train.batch_size: true: it must not be true or false"),
        (distil(num_frame_per_block="x"), "num_frame_per_block = \"x\": rollout.num_frame_per_block: 'x'"),
        (distil(min_timestep_ratio=0.99), "min_timestep_ratio = 0.99: dmd.min_timestep_ratio: 0.99 must be below"),
        ({"validation_num_inference_steps": 4}, "the student runs its own 3 steps: set validation.steps"),
        ({"validation_prompt_library": "none.json"}, 'validation_prompt_library = "none.json": no such file'),
        ({"resume_from_checkpoint": "checkpoint-200"}, "a checkpoint of SimpleTuner can not be gone on from"),
        ({"pretrained_t5_model_name_or_path": "other/t5"}, "put this one into that folder"),
        ({"data_backend_config": "none.json"}, 'data_backend_config = "none.json": no such file: name it with --data'),
        ({"push_to_hub": True, "hub_model_id": ""}, "push_to_hub = true: set hub.model_id to NAME/REPO"),
        ({"hub_model_id": "me/my/fox"}, "hub.model_id: 'me/my/fox': it must be NAME/REPO"),
        ({"model_type": "full"}, "student.kind: full can not be trained on model.precision int8"),
        ({"validation_num_video_frames": -3}, "validation_num_video_frames = -3: validation.num_frames: -3 frames"),
    ],
    ids=lambda value: json.dumps(value, default=lambda _: "unset")[:50] if isinstance(value, dict) else None,
)
def test_what_is_refused_is_told_and_left_out(theirs, tmp_path, changes, says):
    lists, _ = theirs.imported(changes, code=1)
    assert any(says in row for row in lists["refused"]), lists["refused"]
    assert "# Left out: " in (tmp_path / "run.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_family": "flux"}, 'model_family: "flux": dmdtrain only does wan'),
        ({"distillation_method": "dcm"}, 'distillation_method: "dcm": dmdtrain only does dmd'),
        ({"pretrained_model_name_or_path": None}, "pretrained_model_name_or_path: it must name the model"),
        (
            {"pretrained_model_name_or_path": ..., "model_flavour": []},
            "pretrained_model_name_or_path: it must name the",
        ),
        (
            {"pretrained_model_name_or_path": ..., "model_flavour": "i2v-14b-2.1"},
            'model_flavour: "i2v-14b-2.1": dmdtrain does text to video of Wan 2.1 and 2.2 5B only; valid are t2v-480p',
        ),
        ({"distillation_method": ...}, "distillation_method: null: dmdtrain only does dmd"),
        ({"pretrained_model_name_or_path": ...}, "pretrained_model_name_or_path: it must name the model"),
        ({"distillation_config": "x.json"}, "distillation_config"),
        ({"--seed": 5}, "seed: it stands twice, as --seed and under another name"),
        ({"validation_prompt": "a\0b"}, "a character that is no text"),
    ],
)
def test_other_runs_are_not_imported(theirs, tmp_path, changes, says):
    theirs.write(changes)
    refused("import-config", "config/config.json", says=says)
    assert not (tmp_path / "run.yaml").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON object of settings"),
        ('{"seed": 1, "seed": 2}', "'seed' stands twice"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
    ids=lambda text: text[:12],
)
def test_files_that_are_no_configuration(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_bytes(text.encode("latin-1"))
    refused("import-config", "config.json", says=["config.json" if says != "a JSON object of settings" else "", says])
    refused("import-config", "none.json", says="none.json: no such file")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["config.toml", "config.env"])
def test_only_config_json_is_read(theirs, name):
    Path(name).write_text("MODEL_FAMILY=wan")
    refused("import-config", name, says=f"{name}: of SimpleTuner's configurations only config.json is read")


def test_nothing_is_overwritten(theirs, tmp_path):
    theirs.write()
    (tmp_path / "run.yaml").write_text("mine")
    refused("import-config", "config/config.json", says="--out: run.yaml exists; choose another name")
    assert (tmp_path / "run.yaml").read_text() == "mine"
    (tmp_path / "b.prompts.txt").write_text("mine")
    refused("import-config", "config/config.json", "-o", "b.yaml", says="b.prompts.txt exists")
    refused("import-config", "config/config.json", "-o", "b.json", says="it must end in .yaml")
    (tmp_path / "link.yaml").symlink_to("/no/where")
    refused("import-config", "config/config.json", "-o", "link.yaml", says="link.yaml exists")
    bad = os.fsdecode(b"caf\xe9.yaml")
    refused("import-config", "config/config.json", "-o", bad, says="a character that is no text")
    refused("import-config", "config/config.json", "-o", "none/b.yaml", says="none: no such folder")


def test_nothing_is_left_where_the_yaml_can_not_be_written(theirs, tmp_path):
    """The prompts fit, the YAML does not."""
    theirs.write()
    before = {file.name for file in tmp_path.iterdir()}

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    command = [sys.executable, "-B", "-m", "dmdtrain", "import-config", "config/config.json"]
    result = subprocess.run(command, cwd=tmp_path, preexec_fn=small_files, capture_output=True, text=True, timeout=60)
    assert result.returncode == 74
    assert result.stderr == "dmdtrain: run.yaml can not be read or written: File too large\n"
    assert {file.name for file in tmp_path.iterdir()} == before


BACKENDS = [
    DATASET | {"id": "clips", "type": "local", "instance_data_dir": "clips", "caption_strategy": "textfile"},
    {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
]


@pytest.fixture
def clips(tmp_path) -> Path:
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    (folder / "phone.m4v").write_bytes(b"")
    for name, caption in {"a_red__cat": "a red cat\n\na cat\n", "more/dog": "  a   dog \n", "no_caption": None}.items():
        (folder / f"{name}.mp4").write_bytes(b"")
        if caption:
            (folder / f"{name}.txt").write_text(caption)
    (folder / "notes.txt").write_text("not of a video")
    return folder


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["a red cat", "a cat", "a dog"]),
        ({"disable_multiline_split": True}, ["a red cat a cat", "a dog"]),
        ({"caption_strategy": "filename"}, ["a red cat", "dog", "no caption", "phone"]),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "a wug"}, ["a wug"]),
    ],
)
def test_captions_become_prompts(theirs, clips, tmp_path, changes, wanted):
    lists, config = theirs.imported(dataset=[BACKENDS[0] | changes, BACKENDS[1]])
    assert lists["refused"] == []
    assert config.data.prompts == "run.prompts.txt"
    assert (tmp_path / "run.prompts.txt").read_text().splitlines() == wanted
    assert any(
        row.startswith('dataset clips.instance_data_dir = "clips" -> data.prompts') for row in lists["translated"]
    )
    assert any(row.startswith("dataset text (text_embeds)") for row in lists["has no meaning here"])


def test_captions_that_can_not_be_read_are_left_out_and_counted(theirs, clips, tmp_path):
    for name, caption in {"latin": "un été".encode("latin-1"), "binary": b"a\0b"}.items():
        (clips / f"{name}.mp4").write_bytes(b"")
        (clips / f"{name}.txt").write_bytes(caption)
    (clips / "more" / "dog.txt").write_text("\ufeffa dog")
    theirs.write(dataset=BACKENDS)
    said = done("import-config", "config/config.json")
    assert "to do: 2 caption files can not be read and are left out; the first: clips/binary.txt: it is binary" in said
    assert (tmp_path / "run.prompts.txt").read_text().splitlines() == ["a red cat", "a cat", "a dog"]


@pytest.mark.parametrize(
    ("changes", "ours", "value"),
    [
        ({}, "data.videos", [{"path": "clips"}]),
        ({}, "data.buckets", True),
        ({}, "validation.real_clips", 8),
        ({"crop": True}, "data.buckets", False),
        ({"crop": True, "crop_aspect": "preserve"}, "data.buckets", True),
        ({"crop": True, "crop_aspect": "square"}, "data.buckets", False),
        ({"crop_style": "random"}, "data.crop", "random"),
        ({"repeats": 9}, "data.videos", [{"path": "clips", "repeats": 10}]),
        ({"probability": 0.5}, "data.videos", [{"path": "clips", "weight": 0.5}]),
        ({"probability": 0.5, "repeats": 2}, "data.videos", [{"path": "clips", "weight": 0.5}]),
        ({"minimum_image_size": 480}, "data.minimum_size", 480),
        ({"minimum_image_size": 0.25, "resolution_type": "area", "resolution": 0.23}, "data.minimum_size", 500),
        ({"cache_dir_vae": "cache/{model_family}/{id}", "cache_dir": ...}, "data.cache_dir", "cache/wan/dmdtrain"),
        ({"cache_dir": "{output_dir}/cache"}, "data.cache_dir", "output/wan-dmd/cache"),
        ({"crop": None}, "data.buckets", False),
        ({"num_frames": None, "video": {"num_frames": None}}, "rollout.num_training_frames", 21),
        ({"num_frames": 45}, "rollout.num_training_frames", 12),
        ({"video": {"num_frames": 49}}, "rollout.num_training_frames", 12),
        ({"video": {"num_frames": 81}}, "rollout.num_training_frames", 21),
        ({"video": {"num_frames": 125, "min_frames": 125, "bucket_strategy": "aspect_ratio"}}, "data.fps", None),
        ({"caption_strategy": "filename"}, "data.videos", None),
    ],
)
def test_datasets_become_sets_of_clips(theirs, clips, changes, ours, value):
    dataset = {key: found for key, found in (BACKENDS[0] | changes).items() if found is not ...}
    lists, config = theirs.imported(dataset=[dataset])
    assert lists["refused"] == []
    rows = [row for rows in lists.values() for row in rows]
    for key in set(dataset) - {"video", "resolution_type"}:
        assert sum(row.startswith(f"dataset clips.{key} ") for row in rows) == 1, key
    group, name = ours.split(".")
    found = config.model_dump(exclude_defaults=True).get(group, {}).get(name)
    default = getattr(getattr(Config(), group), name)
    assert (default if found is None else found) == value


def test_datasets_by_probability_have_weights_and_without_validation_no_clips(theirs, clips):
    two = [BACKENDS[0] | {"id": "a", "probability": 3}, BACKENDS[0] | {"id": "b", "repeats": 1}]
    _, config = theirs.imported(dataset=two)
    assert [(each.weight, each.repeats) for each in config.data.videos] == [(3, 1), (1, 1)]
    lists, config = theirs.imported({"validation_disable": True}, dataset=two)
    assert config.data.videos is None and config.validation.real_clips == 0 and lists["refused"] == []
    assert "dataset b.repeats = 1: of clips" in " ".join(lists["has no meaning here"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"crop_style": "face"}, 'dataset clips.crop_style = "face": set data.crop to center, random or none'),
        ({"crop_aspect": "closest"}, 'dataset clips.crop_aspect = "closest": valid are data.buckets: true'),
        ({"max_num_samples": 9}, "dataset clips.max_num_samples = 9: there is no such filter: list the clips"),
        ({"metadata_backend": "parquet"}, "list the clips that shall be used in a metadata.jsonl"),
        ({"repeats": -1}, "dataset clips.repeats = -1: set repeats in data.videos, 1 or more"),
        ({"probability": -1}, "dataset clips.probability = -1: set weight in data.videos, above 0"),
        ({"num_frames": "long"}, 'num_frames = "long": it is no number of frames'),
        ({"minimum_image_size": "x"}, "dataset clips.minimum_image_size = \"x\": data.minimum_size: 'x'"),
        ({"instance_data_dir": "none"}, 'dataset clips.instance_data_dir = "none": no such folder'),
        ({"instance_data_dir": ""}, "no such folder"),
        ({"caption_strategy": "parquet"}, "caption_strategy parquet: write the captions to a prompts file"),
        ({"instance_data_dir": "config"}, "no captions in config (0 videos, caption_strategy textfile)"),
        ({"type": "huggingface"}, 'dataset clips.type = "huggingface": videos are read from a local folder'),
        ({"dataset_type": "image"}, "dataset clips (image): only datasets of videos"),
        ({"reslution": 5}, "dataset clips.reslution = 5: unknown key; did you mean resolution?"),
        ({"video": {"num_frame": 5}}, "dataset clips.video.num_frame = 5: unknown key; did you mean num_frames?"),
        ({"video": {"is_i2v": True}}, "dataset clips.video.is_i2v = true: only text-to-video"),
        ({"resolution": "big"}, 'dataset clips.resolution = "big" (pixel_area): set data.resolution'),
    ],
)
def test_datasets_that_can_not_be_taken(theirs, clips, changes, says):
    lists, _ = theirs.imported(dataset=[BACKENDS[0] | changes], code=1)
    assert any(says in row for row in lists["refused"]), lists["refused"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"resolution": 512}, 512),
        ({"resolution": 480, "resolution_type": "pixel"}, "848x480"),
        ({"resolution": 0.23, "resolution_type": "area"}, 480),
    ],
)
def test_the_dataset_says_the_resolution(theirs, clips, changes, wanted):
    _, config = theirs.imported(dataset=[BACKENDS[0] | changes])
    assert config.data.resolution == wanted


def test_what_is_one_for_all_datasets_is_told_in_each_ones_row(theirs, clips):
    first = BACKENDS[0] | {"id": "a", "crop_style": "center", "minimum_image_size": 64}
    second = BACKENDS[0] | {
        "id": "b", "crop": True, "crop_style": "random", "minimum_image_size": 256, "resolution": 720, "resolution_type": "pixel"
    }  # fmt: skip
    lists, config = theirs.imported({"resolution": 512, "minimum_image_size": 32}, dataset=[first, second], code=1)
    told = "one value for all sets: data."
    assert lists["refused"] == [
        f"dataset b.resolution = 720 (pixel): {told}resolution = 480 of dataset a is used",
        f"dataset b.crop = true: {told}buckets = true of dataset a is used",
        f"dataset b.minimum_image_size = 256: {told}minimum_size = 64 of dataset a is used",
        f'dataset b.crop_style = "random": {told}crop = "center" of dataset a is used',
    ]
    assert (config.data.resolution, config.data.buckets, config.data.minimum_size) == (480, True, 64)
    rows = [row for rows in lists.values() for row in rows]
    assert "resolution = 512 (pixel_area): dataset a says it" in lists["has no meaning here"]
    assert "minimum_image_size = 32: dataset a says it" in lists["has no meaning here"]
    for name in (
        "resolution",
        *(f"dataset {i}.{key}" for i in "ab" for key in ("resolution", "crop", "minimum_image_size")),
    ):
        assert sum(row.startswith(f"{name} ") for row in rows) == 1, name
    third = {key: value for key, value in first.items() if not key.startswith("resolution")} | {"id": "c"}
    lists, _ = theirs.imported({"resolution": 512}, dataset=[first, third], code=1)
    assert lists["refused"] == [f"resolution = 512 (pixel_area): {told}resolution = 480 of dataset a is used"]


AREA = 'resolution_type = "pixel_area"'
OF_512 = {"resolution": "512", "resolution_type": "pixel_area"}
PIXEL = {"resolution": ..., "resolution_type": "pixel"}
NEITHER = {"resolution": ..., "resolution_type": ...}


@pytest.mark.parametrize(
    ("changes", "dataset", "row", "wanted"),
    [
        ({"resolution": ...}, NEITHER, f"{AREA}: read with resolution", 1024),
        ({"resolution": ...}, NEITHER, "resolution = 1024 (pixel_area) (their default) -> data.resolution", 1024),
        ({"resolution": ..., "resolution_type": "pixel"}, NEITHER, "1024 (pixel) (their default) ->", "1824x1024"),
        ({"resolution": ...}, {}, f"{AREA}: of the datasets' resolutions", 480),
        ({}, {"resolution": None}, "dataset clips.resolution = null: not set", 480),
        ({}, PIXEL, 'resolution_type = "pixel" (of resolution = 480) -> data', "848x480"),
        ({"resolution": ...}, {"resolution": ...}, f"dataset clips.{AREA} (of resolution = 1024) ->", 1024),
        (OF_512, {"resolution": ..., "resolution_type": ...}, "resolution = 512 (pixel_area) ->", 512),
    ],
)
def test_a_resolution_or_its_type_alone(theirs, clips, changes, dataset, row, wanted):
    values = {key: value for key, value in (BACKENDS[0] | dataset).items() if value is not ...}
    lists, config = theirs.imported(changes, dataset=[values])
    assert any(row in found for rows in lists.values() for found in rows), lists
    assert config.data.resolution == wanted and lists["refused"] == []


ODD = ([], "4", {"a": 1})


def test_every_key_with_any_value_is_translated_or_refused(theirs, clips, tmp_path):
    """Of other types than it has, and text that is not what it should be."""
    inner = QUICKSTART["distillation_config"]
    cases = [
        (QUICKSTART | {key: value}, BACKENDS) for key in [*QUICKSTART, "model_flavour", "lora_dropout"] for value in ODD
    ]
    cases += [(QUICKSTART | distil(**{key: value}), BACKENDS) for key in inner for value in ODD]
    cases += [
        (QUICKSTART, [BACKENDS[0] | {key: value}]) for key in [*BACKENDS[0], "video", "crop_style"] for value in ODD
    ]
    for number, (values, dataset) in enumerate(cases):
        theirs.write(values, dataset)
        out = tmp_path / f"{number}.yaml"
        try:
            import_config(tmp_path / "config" / "config.json", None, out, causal=number % 5 > 0)
        except ConfigError:
            assert not out.exists()
        else:
            load(out)


def test_the_length_of_clips_is_trained_where_it_is_the_smaller(theirs, clips):
    """The longest of several sets, and what a set's own video says before what the set says."""
    first = BACKENDS[0] | {"id": "a", "num_frames": 121, "video": {"num_frames": 33}}
    lists, config = theirs.imported(
        None, "--bidirectional", dataset=[first, BACKENDS[0] | {"id": "b", "num_frames": 49}]
    )
    assert config.rollout.num_training_frames == 13
    says = "-> rollout.num_training_frames = 13 (SimpleTuner trains what clips have, here 13 latent frames, and not 21)"
    for key in ("dataset a.video.num_frames = 33", "dataset b.num_frames = 49"):
        assert f"{key} {says}" in lists["translated"]
    assert "dataset a.num_frames = 121: video.num_frames says it" in lists["has no meaning here"]
    lists, config = theirs.imported(distil(num_training_frames=12), dataset=[first, BACKENDS[0] | {"id": "b"}])
    assert config.rollout.num_training_frames == 12


def test_a_disabled_dataset_is_left(theirs, clips, tmp_path):
    lists, config = theirs.imported(dataset=[BACKENDS[0] | {"disabled": True}])
    assert "dataset clips: disabled" in lists["has no meaning here"]
    assert config.data.prompts == "run.prompts.txt" and config.data.videos is None
    assert "a red cat" not in (tmp_path / "run.prompts.txt").read_text()


def test_datasets_that_are_named_or_lie_elsewhere(theirs, clips, tmp_path, monkeypatch):
    theirs.write({"data_backend_config": "multidatabackend.json"}, BACKENDS)
    assert theirs.lists("--data", "config/wan/multidatabackend.json")["refused"] == []
    (tmp_path / "config/wan/multidatabackend.json").rename(tmp_path / "config/multidatabackend.json")
    assert theirs.lists()["refused"] == []  # beside config.json
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    result = run_cli("import-config", "../config/config.json", "-o", "mine.yaml")
    assert result.exit_code == 0, result.output
    assert (elsewhere / "mine.prompts.txt").read_text().startswith("a red cat\n")
    assert load("mine.yaml").data.prompts == "mine.prompts.txt"


def test_a_model_folder_beside_their_files_is_found_from_anywhere(theirs, wan_folder, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(wan_folder.parent)
    theirs.write({"pretrained_model_name_or_path": "models/wan-random", "pretrained_t5_model_name_or_path": ...})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run_cli("import-config", "../config/config.json").exit_code == 0
    assert load("run.yaml").model.base == str(wan_folder.resolve())


def test_text_of_theirs_can_not_leave_a_comment(theirs, tmp_path):
    odd = {"evil\nmodel: {base: x}": "\u2028train: 5", "\x85key": "\ud800"}
    lists, config = theirs.imported(odd, code=1)
    assert len(lists["refused"]) == 2 and config.model.base == QUICKSTART["pretrained_model_name_or_path"]


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        (
            {"distillation_config": QUICKSTART["distillation_config"] | {"generator_update_interval": 5}},
            "use_ema = true -> ema.enabled = true, ema.warmup = true (min(ema.decay, (1 + n) / (10 + n)), as in SimpleTuner"
            "; n counts steps there, updates of the student here)",
        ),
        (
            {},
            "use_ema = true -> ema.enabled = true, ema.warmup = true (min(ema.decay, (1 + n) / (10 + n)), as in SimpleTuner)",
        ),
        (
            {"ema_warmup_steps": 200},
            "ema_warmup_steps = 200 -> ema.warmup = true (SimpleTuner copies the weights until step 200, then holds the "
            "decay; here it rises to it)",
        ),
    ],
)
def test_how_the_average_starts_is_told(theirs, changes, row):
    lists, _ = theirs.imported(changes)
    assert row in lists["translated"]


def test_guidance_of_a_student_is_told(theirs, tmp_path):
    theirs.write({"validation_guidance": 5.0})
    assert "to do: validation.guidance_scale is 5: is that meant?" in done("import-config", "config/config.json")
    line = next(line for line in (tmp_path / "run.yaml").read_text().splitlines() if "guidance_scale" in line)
    assert line == "  guidance_scale: 5 # the student is trained to be sampled without guidance: 1"


def test_the_tables_hold_together():
    from diffusers.models.attention_dispatch import AttentionBackendName

    from dmdtrain.config import groups, known_keys

    assert {ours for keys_ in tables.COPY.values() for ours in keys_} <= set(known_keys())
    for theirs, choice in tables.CHOICES.items():
        for ours in choice.ours:
            group, name = ours.split(".")
            for value in choice.values.values():
                options = groups()[group].model_fields[name].annotation
                assert name == "attention" or value in str(options), (theirs, value)
    backends = {backend.value for backend in AttentionBackendName}
    assert set(tables.CHOICES["attention_mechanism"].values.values()) <= backends | {"auto"}
    overlap = (set(tables.COPY) | set(tables.CHOICES)) & set(tables.AGREE)
    assert not overlap
    assert set(tables.THEIR_DEFAULTS) <= set(known()) and Config().rollout.causal is False
