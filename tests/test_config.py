"""The configuration: every mistake is one line that names the key, what it is and what would be valid."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dmdtrain import config as configuration
from dmdtrain.config import (
    Config,
    ConfigError,
    VideoSet,
    apply_override,
    build,
    changed,
    differences,
    dump,
    groups,
    known_keys,
    load,
    load_own,
    nested_get,
    read,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.fixture
def load_text(tmp_path):
    """Loads YAML text with overrides."""

    def run(text: str, *overrides: str) -> Config:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return load(file, list(overrides))

    return run


@pytest.fixture
def refusal(load_text, tmp_path):
    """The one-line message, without what it is about in front, with which YAML text is refused."""

    def run(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_text(text, *overrides)
        message = str(caught.value)
        assert len(message.splitlines()) == 1, message
        assert "pydantic" not in message
        return message.removeprefix(f"{tmp_path / 'run.yaml'}: ").removeprefix("--set: ")

    return run


# Every key with a valid value that is not its default, all of them valid together. A new key has to be added here.
CHANGED = {
    "model.base": "some/where",
    "model.teacher": "org/teacher",
    "model.precision": "fp32",
    "model.teacher_precision": "nf4",
    "model.quantize_via": "device",
    "model.text_encoder_precision": "fp32",
    "model.attention": "flash",
    "model.flow_shift": 8.0,
    "student.kind": "full",
    "student.rank": 16,
    "student.alpha": 8.5,
    "student.targets": ["to_q", "to_v"],
    "fake_score.kind": "full",
    "fake_score.rank": 32,
    "fake_score.alpha": 16.0,
    "fake_score.lr": 3e-6,
    "fake_score.betas": (0.0, 0.99),
    "fake_score.eps": 1e-6,
    "fake_score.weight_decay": 0.0,
    "fake_score.grad_clip": 10.0,
    "fake_score.reuse_rollout": True,
    "dmd.denoising_steps": [1000.0, 937.5, 833.25, 625.0],
    "dmd.warp_denoising_steps": True,
    "dmd.generator_update_interval": 5,
    "dmd.real_score_guidance_scale": 4.5,
    "dmd.fake_score_guidance_scale": 2.5,
    "dmd.min_timestep_ratio": 0.05,
    "dmd.max_timestep_ratio": 0.9,
    "dmd.timestep_shift": 5.0,
    "dmd.ts_schedule": False,
    "dmd.ts_schedule_max": True,
    "dmd.min_score_timestep": 20,
    "dmd.real_data_loss_weight": 0.25,
    "rollout.causal": True,
    "rollout.num_training_frames": 9,
    "rollout.min_training_frames": 5,
    "rollout.num_gradient_frames": 4,
    "rollout.num_frame_per_block": 4,
    "rollout.independent_first_frame": True,
    "rollout.same_step_across_blocks": True,
    "rollout.last_step_only": True,
    "rollout.context_noise": 15.5,
    "rollout.local_attention_frames": 8,
    "rollout.sink_frames": 2,
    "rollout.kv_cache": "int8",
    "warmup.kind": "teacher_forcing",
    "warmup.steps": 300,
    "warmup.lr": 2e-4,
    "warmup.lr_warmup_steps": 10,
    "warmup.data": "latents",
    "warmup.num_samples": 64,
    "warmup.teacher_steps": 20,
    "warmup.context_gradient": False,
    "warmup.timestep_shift": 8.0,
    "data.prompts": "prompts.txt",
    "data.prompt_column": "caption",
    "data.cache_dir": "embeddings",
    "data.cache_compress": True,
    "data.negative_prompt": "色调艳丽: no, 16:9 # 'x'\nsecond line",
    "data.caption_dropout": 0.1,
    "data.resolution": 480,
    "data.aspect_ratio": "9:16",
    "data.max_sequence_length": 226,
    "data.videos": [VideoSet(path="clips", weight=2.0, caption_column="text"), VideoSet(path="more", weight=0.5)],
    "data.fps": 16.0,
    "data.crop": "random",
    "data.buckets": True,
    "data.aspect_bucket_rounding": 1,
    "data.minimum_size": 256,
    "data.on_bad_video": "error",
    "optimizer.name": "adamw_bf16",
    "optimizer.lr": 2e-6,
    "optimizer.betas": (0.0, 0.999),
    "optimizer.eps": 1e-7,
    "optimizer.weight_decay": 0.1,
    "optimizer.grad_clip": 0.5,
    "optimizer.grad_clip_method": "value",
    "schedule.name": "cosine_with_min_lr",
    "schedule.warmup_steps": 20,
    "schedule.min_lr": 1e-7,
    "train.max_steps": 600,
    "train.batch_size": 2,
    "train.gradient_accumulation": 32,
    "train.gradient_checkpointing": False,
    "train.batched_guidance": False,
    "train.compile": True,
    "train.mixed_precision": "no",
    "train.seed": 7,
    "train.max_bad_steps": 3,
    "ema.enabled": False,
    "ema.decay": 0.95,
    "ema.warmup": False,
    "ema.every": 2,
    "ema.keep_on": "host",
    "ema.validate_with": "raw",
    "checkpoint.every": 50,
    "checkpoint.keep": 1,
    "checkpoint.every_minutes": 2.5,
    "checkpoint.background": False,
    "checkpoint.max_failed_saves": 2,
    "validation.every": 0,
    "validation.prompts": ["a cat", "no", "1e5"],
    "validation.count": 2,
    "validation.num_frames": 113,
    "validation.resolution": "480x832",
    "validation.steps": [1000.0, 500.0],
    "validation.guidance_scale": 3.0,
    "validation.negative_prompt": "~",
    "validation.seed": 0,
    "validation.fps": 24,
    "validation.tiled_decoding": True,
    "log.every": 10,
    "log.tensorboard": False,
    "log.wandb": "distilled",
    "log.webhook": "https://example.org/hook?key=secret",
    "alarms.window": 20,
    "alarms.x0_drift": 4.5,
    "alarms.gradient_jump": 0.0,
    "alarms.critic_divergence": 2.5,
    "alarms.diversity": 0.0,
    "alarms.saturation": 0.75,
    "hub.model_id": "me/wan-3step",
    "hub.private": False,
    "hub.push_checkpoints": True,
    "output_dir": "null",
}

# What does not go with the rest of CHANGED.
APART = {
    "data.frame_interval": 2,  # beside data.fps
    "model.quantized_cache": "cache",
    "model.int8_matmul": True,
    "model.offload_blocks": True,
    "train.deterministic": True,
    "train.checkpoints_on": "host",
    "train.checkpoint_replay": False,
    "validation.real_clips": 2,  # beside validation.every: 0
    "validation.held_out_prompts": 2,
}

# What has to be set with a key for it to be valid alone.
NEEDS: dict[str, dict] = {
    "dmd.real_data_loss_weight": {"data.videos": "clips", "rollout.causal": True, "warmup.kind": "teacher_forcing"},
    "data.videos": {"rollout.causal": True, "warmup.kind": "teacher_forcing"},
    "validation.real_clips": {"data.videos": "clips", "rollout.causal": True, "warmup.kind": "teacher_forcing"},
    "ema.enabled": {"ema.validate_with": "raw"},
    "rollout.causal": {"rollout.num_training_frames": 9},
    "rollout.sink_frames": {"rollout.local_attention_frames": 8},
    "rollout.num_gradient_frames": {"rollout.causal": True, "rollout.num_frame_per_block": 1},
    "warmup.kind": {"rollout.causal": True},
    "model.teacher_precision": {"model.teacher": "org/teacher"},
    "rollout.kv_cache": {"rollout.causal": True},
    "model.quantized_cache": {"model.precision": "nf4"},
    "model.int8_matmul": {"model.precision": "int8"},
    "train.checkpoint_replay": {"rollout.causal": True},
    "hub.private": {"hub.model_id": "me/wan-3step"},
    "hub.push_checkpoints": {"hub.model_id": "me/wan-3step"},
}

# What may change when a run goes on, spelled out key by key.
MAY_CHANGE = {
    "train.max_steps",
    "train.max_bad_steps",
    "model.attention",
    "data.cache_dir",
    "data.cache_compress",
    "model.quantize_via",
    "model.quantized_cache",
    "model.offload_blocks",
    "train.gradient_checkpointing",
    "train.checkpoints_on",
    "train.checkpoint_replay",
    "train.batched_guidance",
    "train.compile",
    "train.deterministic",
    "ema.validate_with",
    "ema.keep_on",
    "data.on_bad_video",
    "data.prompts",
    "data.prompt_column",
    "data.videos",
    "output_dir",
    "log.every",
    "log.tensorboard",
    "log.wandb",
    "log.webhook",
    *(key for key in CHANGED if key.startswith(("checkpoint.", "alarms.", "validation."))),
    *(key for key in CHANGED | APART if key.startswith("hub.")),
}


def nested(values: dict) -> dict:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[last] = value
    return tree


def leaves(tree: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


# ---------------------------------------------------------------------------------------------------- what is valid


def test_empty_file_gives_the_defaults(load_text):
    assert load_text("") == load_text("# a comment\n") == Config()


def test_every_leaf_is_a_known_key():
    assert leaves(Config().model_dump()) == known_keys()
    assert set(known_keys()) == set(CHANGED) | set(APART) | {"version"}  # which has one valid value


def test_every_key_reaches_the_config_and_survives_dump_and_load(load_text):
    config = build(nested(CHANGED))
    for key, value in CHANGED.items():
        assert nested_get(config, key) == value, key
        assert nested_get(Config(), key) != value, f"{key}: not changed from its default"
    again = load_text(dump(config))
    assert again == config
    assert dump(again) == dump(config)
    assert load_text(dump(Config())) == Config()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_shipped_configs_load(file, load_text):
    config = load(file)
    assert load_text(dump(config)) == config


def test_steps_as_text_and_as_a_list(load_text):
    as_list = load_text("dmd:\n  denoising_steps: [1000, 757, 522]")
    for text in ("1000,757,522", '"1000, 757,522"', "\n    - 1000\n    - 757\n    - 522"):
        config = load_text(f"dmd:\n  denoising_steps: {text}\nvalidation:\n  steps: {text}")
        assert config.dmd.denoising_steps == as_list.dmd.denoising_steps == [1000.0, 757.0, 522.0]
        assert config.validation.steps == [1000.0, 757.0, 522.0]
    assert load_text("dmd:\n  denoising_steps: '1000'").dmd.denoising_steps == [1000.0]
    assert load_text("dmd: {denoising_steps: [8, 7, 6, 5, 4, 3, 2, 0.5]}").dmd.denoising_steps[-1] == 0.5


@pytest.mark.parametrize("frames", [1, 5, 21, 81, 121])
def test_valid_frames(load_text, frames):
    assert load_text(f"validation: {{num_frames: {frames}}}").validation.num_frames == frames


@pytest.mark.parametrize(
    ("resolution", "aspect", "wanted"),
    [
        ("832x480", "16:9", (480, 832)),  # taken as it is: (height, width)
        ("480X832", "16:9", (832, 480)),
        (480, "16:9", (352, 640)),  # 480 sqrt(9/16) = 360 and 480 sqrt(16/9) = 640, to multiples of 16
        ("480", "9:16", (640, 352)),
        (480, "1:1", (480, 480)),
        (3, "16:9", (16, 16)),  # never nothing
    ],
)
def test_resolution_forms(resolution, aspect, wanted):
    assert configuration.parse_resolution(resolution, aspect, 16, key="data.resolution") == wanted


def test_a_resolution_that_is_no_multiple_names_the_nearest():
    with pytest.raises(ValueError, match=r"^data\.resolution: 830x481: .*multiples of 16.*; the nearest is 832x480$"):
        configuration.parse_resolution("830x481", "16:9", 16, key="data.resolution")


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.max_steps=7", "dmd.denoising_steps=1000,500", "ema.enabled=false", "ema.validate_with=raw"],
        ["dmd.denoising_steps=[1000, 500]", "train={max_steps: 7}", "ema={enabled: false, validate_with: raw}"],
    ],
)
def test_overrides(load_text, overrides):
    config = load_text("train: {max_steps: 9}\noutput_dir: here", *overrides)
    assert config.train.max_steps == 7
    assert config.dmd.denoising_steps == [1000.0, 500.0]
    assert config.ema.enabled is False
    assert config.output_dir == "here"


def test_an_override_keeps_the_rest_of_its_group_and_the_last_one_wins(load_text):
    config = load_text("train: {max_steps: 9, seed: 3}", "train.max_steps=5", "train.max_steps=6")
    assert (config.train.max_steps, config.train.seed) == (6, 3)
    assert load_text("", "data.prompts=a=b.txt").data.prompts == "a=b.txt"
    assert load_text("model: {teacher: x}", "model.teacher=null").model.teacher is None


def test_numbers_as_yaml_writes_them(load_text):
    """PyYAML reads 1e-5 as text; it is a number all the same."""
    assert load_text("optimizer: {lr: 1e-5}").optimizer.lr == 1e-5
    assert load_text("", "fake_score.lr=1e-5").fake_score.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "overrides", "key", "value"),
    [
        pytest.param("data:\n  aspect_ratio: 16:9", [], "data.aspect_ratio", "16:9"),
        pytest.param("", ["data.aspect_ratio=9:16"], "data.aspect_ratio", "9:16"),
        pytest.param("train: {mixed_precision: no}", [], "train.mixed_precision", "no"),
        pytest.param("data: {negative_prompt: no}", [], "data.negative_prompt", "no"),
        pytest.param("validation: {prompts: [16:9, 0400, on]}", [], "validation.prompts", ["16:9", "0400", "on"]),
        pytest.param("output_dir: 0400", [], "output_dir", "0400"),
        pytest.param("ema: {enabled: no, validate_with: raw}", [], "ema.enabled", False),
        pytest.param("ema: {enabled: on}", [], "ema.enabled", True),
        pytest.param("train: {seed: 0x1F, max_steps: 10_000}", [], "train.seed", 31),
        pytest.param("train: {seed: 0x1F, max_steps: 10_000}", [], "train.max_steps", 10_000),
        pytest.param("", ["data.resolution=480"], "data.resolution", 480),
        pytest.param("", ["dmd.denoising_steps=1000"], "dmd.denoising_steps", [1000.0]),
        pytest.param("train:\n  # max_steps: 5\n", [], "train.max_steps", 4000),
        pytest.param("train:\n", ["train.max_steps=5"], "train.max_steps", 5),
    ],
)
def test_what_a_user_writes_is_what_he_means(load_text, text, overrides, key, value):
    assert nested_get(load_text(text, *overrides), key) == value


AS_IT_STANDS = [
    *("worst quality #1, blurry", "#1", "bad: hands", "no", "2024", "0400", "1:30", "1e-5", "@home", "~", "true", "- a", "a,"),
    *("{a}", "[draft] a", "'tis", '"a" and "b"', '"a" # "b"', "!!int 5", "&a", "*a", "%", "`", "|", "a=b", " a ", "色", "Null"),
]  # fmt: skip


@pytest.mark.parametrize("text", AS_IT_STANDS)
@pytest.mark.parametrize(
    "key", ["data.negative_prompt", "data.prompts", "validation.prompts", "log.wandb", "output_dir"]
)
def test_an_override_leaves_text_as_it_stands(load_text, key, text):
    assert nested_get(load_text("", f"{key}={text}"), key) == text


def test_every_key_of_text_takes_it_as_it_stands_and_no_other_does():
    """Found by the model itself: a new key of text is in."""
    takes_text = set()
    for key in known_keys():
        values: dict = {}
        apply_override(values, f"{key}=no #1")
        group, _, name = key.rpartition(".")
        if (values[group] if group else values)[name] == "no #1":
            takes_text.add(key)
    numbers = {"data.resolution", "dmd.denoising_steps", "validation.steps"}  # beside text
    lists = {"validation.prompts", "data.videos"}
    defaults = {key for key in known_keys() if isinstance(nested_get(Config(), key), str)}
    optional = {"model.teacher", "model.teacher_precision", "model.quantized_cache", "warmup.data", "data.prompts",
                "data.prompt_column", "data.cache_dir", "log.wandb", "log.webhook", "hub.model_id"}  # fmt: skip
    assert takes_text == defaults | optional | numbers | lists


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.negative_prompt=", ""),
        ("data.negative_prompt=null", "null"),  # not optional
        ("data.prompt_column=null", None),
        ("data.prompt_column='null'", "null"),
        ("validation.prompts=null", None),
        ('output_dir="a b"', "a b"),
        ("output_dir='it''s'", "it's"),
        ('data.negative_prompt=" a\\n\\"b\\" "', ' a\n"b" '),
        ("""data.negative_prompt='"a"'""", '"a"'),
        ("validation.prompts=[a, 'b #1', no]", ["a", "b #1", "no"]),
        ("data.negative_prompt=[a, b]", "[a, b]"),
        ("warmup.kind=none", "none"),
        ("train.mixed_precision=no", "no"),
        ("data.aspect_ratio=9:16", "9:16"),
        ("data.negative_prompt = a b ", "a b"),  # as in key = value
    ],
)
def test_what_an_override_of_text_can_say_besides(load_text, override, value):
    key = override.partition("=")[0].strip()
    assert nested_get(load_text("", override), key) == value


def test_an_override_of_clips_is_a_path_a_set_or_a_list(load_text):
    for text, paths in (("no #1", ["no #1"]), ("{path: a, repeats: 2}", ["a"]), ("[a, {path: 'b #1'}]", ["a", "b #1"])):
        assert [each.path for each in load_text("", f"data.videos={text}").data.videos] == paths
    assert load_text("data: {videos: a}", "data.videos=null").data.videos is None


# ---------------------------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("0400", "400, or 256 if it is octal"),
        ("0777", "777, or 511 if it is octal"),
        ("-0400", "-400, or -256 if it is octal"),
        ("07", "7"),
        ("0888", "888"),
        ("0_17", "17, or 15 if it is octal"),
        ("0o17", "15"),
        ("1:30", "90, if it is to the base 60"),
        ("-1:30", "-90, if it is to the base 60"),
        ("1:30.5", "90.5, if it is to the base 60"),
        ("190:20:30", "685230, if it is to the base 60"),
    ],
)
@pytest.mark.parametrize(
    "key", ["train.max_steps", "train.seed", "optimizer.lr", "validation.every", "model.flow_shift"]
)
def test_numbers_that_can_be_read_in_two_ways(refusal, key, written, meant):
    group, name = key.split(".")
    says = f"not a plain decimal number; write {meant}"
    assert refusal(f"{group}:\n  # more\n  {name}: {written}") == f"{key}: {written} (line 3): {says}"
    assert refusal("", f"{key}={written}") == f"{key}: {written}: {says}"
    assert refusal(f"{group}: {{{name}: '{written}'}}") == f"{key}: {written}: {says}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dmd:\n  denoising_steps: [1000, 0500]", "dmd.denoising_steps: 0500 (line 2): not a plain"),
        ("dmd:\n  denoising_steps: 0900", "dmd.denoising_steps: 0900 (line 2): not a plain"),
        ("dmd:\n  denoising_steps: 1000, 0500", "dmd.denoising_steps: 0500: not a plain"),
        ("optimizer:\n  betas:\n    - 0.9\n    - 0:59.9", "optimizer.betas: 0:59.9 (line 4): not a plain"),
        ("data:\n  videos:\n    - path: a\n      repeats: 010", "data.videos.0.repeats: 010 (line 4): not a plain"),
        ("data: {resolution: 0480}", "data.resolution: '0480' is neither"),
        ("train: {max_steps: 0x_}", "train.max_steps: '0x_': input should be a valid integer"),
        ("train: {max_steps: 12:99}", "train.max_steps: '12:99': input should be a valid integer"),
        ("train: {max_steps: on}", "train.max_steps: 'on': input should be a valid integer"),
        ("train: {mixed_precision: false}", "train.mixed_precision: false: it must not be true or false"),
    ],
)
def test_numbers_of_lists_sets_and_sizes_are_plain_too(refusal, text, says):
    assert refusal(text).startswith(says)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.max_step", "train.max_steps"),
        ("train.maxsteps", "train.max_steps"),
        ("dmd.denoising_step", "dmd.denoising_steps"),
        ("trainer", "train"),
        ("optimiser", "optimizer"),
        ("output_dirs", "output_dir"),
        ("dmd.context_noise", "rollout.context_noise"),
        ("train.generator_update_interval", "dmd.generator_update_interval"),
        ("max_steps", "train.max_steps"),
        pytest.param("rollout.rank", "student.rank"),
        ("student.batch_size", "train.batch_size"),
        pytest.param("model.resolution", "data.resolution"),
    ],
)
def test_unknown_keys_name_the_nearest(refusal, key, suggestion):
    assert refusal(yaml.safe_dump(nested({key: 1}))) == f"{key}: unknown key; did you mean {suggestion}?"
    assert refusal("", f"{key}=1") == f"{key}: unknown key; did you mean {suggestion}?"


@pytest.mark.parametrize("group", ["dmd", "student", "train"])
def test_a_right_name_in_the_wrong_group_names_a_right_group(refusal, group):
    assert refusal(f"{group}: {{lr: 1}}").rpartition(" ")[2] in ("optimizer.lr?", "fake_score.lr?")


def test_unknown_keys_that_resemble_nothing(refusal):
    assert refusal("zzzzzz: 1") == "zzzzzz: unknown key"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        # wrong type
        ("train.max_steps", "abc", "'abc': input should be a valid integer"),
        ("train.max_steps", 2.5, "2.5: input should be a valid integer"),
        ("train.max_steps", None, "None: input should be a valid integer"),
        ("train.max_steps", [5], "[5]: input should be a valid integer"),
        ("optimizer.lr", "fast", "'fast': input should be a valid number"),
        ("ema.enabled", "maybe", "'maybe': input should be a valid boolean"),
        ("model.base", 5, "5: input should be a valid string"),
        ("student.targets", "to_q", "'to_q': input should be a valid list"),
        ("optimizer.betas", 0.9, "0.9: input should be a valid tuple"),
        ("train", 5, "5: it must be a group of keys"),
        ("train", [1], "[1]: it must be a group of keys"),
        # names
        ("student.kind", "dora", "'dora': valid are lora or full"),
        ("fake_score.kind", "none", "'none': valid are lora or full"),
        ("model.precision", "fp16", "'fp16': valid are fp32, bf16, int8, int8-llm or nf4"),
        ("train.mixed_precision", "fp16", "'fp16': valid are no or bf16"),
        ("optimizer.name", "sgd", "'sgd': valid are adamw, adamw_bf16, adamw8bit or paged_adamw8bit"),
        ("optimizer.grad_clip_method", "l1", "'l1': valid are norm or value"),
        ("schedule.name", "cosine", "'cosine': valid are constant, linear or cosine_with_min_lr"),
        ("ema.validate_with", "mean", "'mean': valid are ema, raw or both"),
        ("warmup.kind", "ode", "'ode': valid are none, teacher_forcing or ode_regression"),
        # out of range
        ("train.max_steps", 0, "0: it must be at least 1"),
        ("train.batch_size", -1, "-1: it must be at least 1"),
        ("train.seed", -1, "-1: it must be at least 0"),
        ("checkpoint.every", 0, "0: it must be at least 1"),
        ("alarms.window", 9, "9: it must be at least 10"),
        ("alarms.x0_drift", -1, "-1: it must be at least 0"),
        ("alarms.diversity", 1, "1: it must be below 1"),
        ("alarms.saturation", 1.5, "1.5: it must be at most 1"),
        ("checkpoint.every_minutes", -1, "-1: it must be at least 0"),
        ("checkpoint.max_failed_saves", 0, "0: it must be at least 1"),
        ("optimizer.lr", 0, "0: it must be above 0"),
        ("optimizer.lr", float("inf"), "inf: input should be a finite number"),
        ("student.alpha", -2, "-2: it must be above 0"),
        ("ema.decay", 1.0, "1.0: it must be below 1"),
        ("data.caption_dropout", 1.0, "1.0: it must be below 1"),
        ("data.cache_dir", "", "'': it must not be empty"),
        ("data.cache_dir", 2024, "2024: input should be a valid string"),
        ("data.prompt_column", 1, "1: input should be a valid string"),
        ("data.cache_compress", "zstd", "'zstd': input should be a valid boolean"),
        ("data.max_sequence_length", 513, "513: it must be at most 512"),
        ("data.max_sequence_length", 7, "7: it must be at least 8"),
        ("rollout.context_noise", 1001, "1001: it must be at most 1000"),
        ("rollout.num_training_frames", 0, "0: it must be at least 1"),
        ("rollout.min_training_frames", 0, "0: it must be at least 1"),
        ("rollout.num_gradient_frames", 0, "0: it must be at least 1"),
        ("warmup.steps", 0, "0: it must be at least 1"),
        ("warmup.lr", 0, "0: it must be above 0"),
        ("warmup.lr_warmup_steps", -1, "-1: it must be at least 0"),
        ("warmup.num_samples", 0, "0: it must be at least 1"),
        ("warmup.teacher_steps", 0, "0: it must be at least 1"),
        ("warmup.timestep_shift", 0, "0: it must be above 0"),
        ("dmd.min_score_timestep", 1000, "1000: it must be below 1000"),
        ("dmd.timestep_shift", 0, "0: it must be above 0"),
        ("dmd.real_score_guidance_scale", -1, "-1: it must be at least 0"),
        # reports
        ("hub.model_id", "wan-3step", "'wan-3step': it must be NAME/REPO"),
        ("hub.model_id", "a/b/c", "'a/b/c': it must be NAME/REPO"),
        ("hub.private", False, "false needs hub.model_id; valid without it is true"),
        ("hub.push_checkpoints", True, "true needs hub.model_id; valid without it is false"),
        ("log.wandb", "", "'': it must not be empty"),
        ("log.webhook", "ftp://user:secret@host/", "no address of the web; valid are http://HOST/"),
        ("log.webhook", "https://", "no address of the web"),
        ("log.webhook", "http://[::1", "no address of the web"),
        ("log.webhook", "http://host:99999/", "no address of the web"),
        # denoising steps
        ("dmd.denoising_steps", [], "0 steps; valid are 1 to 8, such as 1000,757,522"),
        ("dmd.denoising_steps", list(range(9, 0, -1)), "9 steps; valid are 1 to 8, such as 1000,757,522"),
        ("dmd.denoising_steps", [500, 757], "500,757 must descend, such as 1000,757,522"),
        ("dmd.denoising_steps", "1000,757,757", "1000,757,757 must descend, such as 1000,757,522"),
        ("dmd.denoising_steps", 1000, "1000: input should be a valid list"),
        ("validation.steps", [522, 757], "522,757 must descend, such as 1000,757,522"),
        # frames
        ("validation.num_frames", 80, "80 frames; valid are 1 + 4k, the nearest 77 and 81"),
        ("validation.num_frames", 120, "120 frames; valid are 1 + 4k, the nearest 117 and 121"),
        ("validation.num_frames", 0, "0 frames; valid are 1 + 4k, the nearest 1 and 5"),
        # sizes
        ("data.resolution", "wide", "'wide' is neither WIDTHxHEIGHT (such as 832x480) nor a number of pixels (480)"),
        ("data.resolution", "832x", "'832x' is neither WIDTHxHEIGHT"),
        ("data.resolution", "0x480", "'0x480' is neither WIDTHxHEIGHT"),
        ("data.resolution", -480, "'-480' is neither WIDTHxHEIGHT"),
        ("validation.resolution", "832*480", "'832*480' is neither WIDTHxHEIGHT"),
        ("data.aspect_ratio", "wide", "'wide': "),
        ("data.aspect_ratio", "0:9", "'0:9': "),
        ("data.aspect_ratio", "16x9", "'16x9': "),
        # what does not go together
        ("dmd.min_timestep_ratio", 0.98, "0.98 must be below max_timestep_ratio (0.98)"),
        ("dmd.real_score_guidance_scale", 0.5, "0.5 is between 0 and 1; valid are 0 (off) and 1 or more"),
        ("dmd.fake_score_guidance_scale", 0.25, "0.25 is between 0 and 1; valid are 0 (off) and 1 or more"),
        ("dmd.generator_update_interval", 4001, "4001 is above train.max_steps (4000)"),
        ("schedule.min_lr", 1.0, "1.0 is above optimizer.lr (2e-05)"),
    ],
)
def test_bad_values(refusal, key, value, says):
    assert refusal(yaml.safe_dump(nested({key: value}))).startswith(f"{key}: {says}")


@pytest.mark.parametrize("steps", ["[1000, 0]", "[1001, 5]", "[1000, -3]", "[.nan]", "'1000,abc'", "''", "'1000,,5'"])
@pytest.mark.parametrize("key", ["dmd.denoising_steps", "validation.steps"])
def test_steps_outside_0_to_1000(refusal, key, steps):
    group, name = key.split(".")
    message = refusal(f"{group}:\n  {name}: {steps}")
    assert message.startswith(f"{key}.")  # the number of the entry follows
    assert any(says in message for says in ("above 0", "at most 1000", "valid number"))


def test_guidance_of_exactly_0_and_1_is_fine(load_text):
    for scale in (0, 1, 1.5):
        assert load_text(f"dmd: {{real_score_guidance_scale: {scale}}}").dmd.real_score_guidance_scale == scale


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_an_int8_base_can_not_be_trained_whole(refusal, load_text, role):
    message = refusal(f"model: {{precision: int8}}\n{role}: {{kind: full}}")
    assert message.startswith(f"{role}.kind: full can not be trained on model.precision int8; valid is lora")
    assert load_text("model: {precision: int8}").model.precision == "int8"


def test_disabled_ema_can_not_be_validated(refusal, load_text):
    message = refusal("ema: {enabled: false}")
    assert message == "ema.validate_with: ema needs ema.enabled: true; valid without it is raw"
    assert load_text("ema: {enabled: false, validate_with: raw}").ema.validate_with == "raw"


def test_deterministic_kernels_are_native(refusal, load_text):
    message = refusal("{train: {deterministic: true}, model: {attention: flash}}")
    assert message == "model.attention: flash does not go with train.deterministic; valid are auto, native"
    assert load_text("train: {deterministic: true}").model.attention == "auto"


def test_an_interval_beside_fps_is_refused(refusal, load_text):
    assert (
        refusal("data: {fps: 16, frame_interval: 2}") == "data.frame_interval: 2 has no effect beside fps; valid is 1"
    )
    assert load_text("data: {frame_interval: 2}").data.frame_interval == 2


def test_causal_frames_must_fill_their_blocks(refusal, load_text):
    """121 video frames are 31 latent ones: no multiple of 3, but 1 + a multiple of 3."""
    message = refusal("rollout: {causal: true, num_training_frames: 31}")
    assert message == (
        "rollout.num_training_frames: 31 latent frames; it must be a multiple of num_frame_per_block (3), "
        "the nearest are 30 and 33, or set rollout.independent_first_frame if 1 + blocks fits"
    )
    first = (
        "validation: {num_frames: 121}\nrollout: {causal: true, independent_first_frame: true, num_training_frames: %d}"
    )
    assert load_text(first % 31).rollout.num_training_frames == 31
    for frames in (21, 1):
        assert "it must be 1 + a multiple of num_frame_per_block (3)" in refusal(first % frames)
    assert load_text("rollout: {num_training_frames: 31}").rollout.num_training_frames == 31  # one block: any number


def test_the_lengths_of_a_rollout(refusal, load_text):
    causal = "rollout: {causal: true, num_training_frames: 21, "
    rollout = load_text(causal + "min_training_frames: 9, num_gradient_frames: 6}").rollout
    assert (rollout.min_training_frames, rollout.num_gradient_frames, rollout.scored_frames) == (9, 6, 6)
    assert load_text(causal + "num_gradient_frames: 22}").rollout.scored_frames == 21
    assert "min_training_frames: 10 latent frames; it must be a multiple" in refusal(
        causal + "min_training_frames: 10}"
    )
    assert refusal(causal + "min_training_frames: 24}").endswith("24 is above num_training_frames (21)")
    assert "num_gradient_frames: 7 latent frames" in refusal(causal + "num_gradient_frames: 7}")
    assert refusal("rollout: {num_gradient_frames: 6}").endswith("needs causal: true; valid without it is null")
    assert load_text("rollout: {min_training_frames: 10}").rollout.min_training_frames == 10  # one block: any number
    assert "min_training_frames: 22 is above" in refusal("rollout: {min_training_frames: 22}")


def test_validation_in_whole_blocks(refusal, load_text):
    """121 video frames are 31 latent ones: the quickstart's own mistake."""
    message = refusal("rollout: {causal: true}\nvalidation: {num_frames: 121}")
    assert message.startswith("validation.num_frames: 121 frames are 31 latent frames") and "117 and 129" in message
    first = "rollout: {causal: true, num_training_frames: 22, independent_first_frame: true}\n"
    assert load_text(first + "validation: {num_frames: 121}").validation.num_frames == 121
    assert "1 + a multiple" in refusal(first + "validation: {num_frames: 81}")
    assert load_text("validation: {num_frames: 121}").validation.num_frames == 121  # one block: any number


def test_a_warm_up_is_for_causal_students(refusal):
    message = refusal("warmup: {kind: ode_regression}")
    assert message.startswith("warmup.kind: ode_regression is for causal students")


def test_a_teacher_precision_needs_a_teacher(refusal, load_text):
    assert "needs model.teacher" in refusal("model: {teacher_precision: nf4}")
    assert load_text("model: {teacher: wan-tiny, teacher_precision: nf4}").model.teacher_precision == "nf4"


def test_windows_must_hold_a_block_and_the_sinks(refusal, load_text):
    message = refusal("rollout: {sink_frames: 2}")
    assert message == "rollout.sink_frames: 2 needs local_attention_frames; valid without it is 0"
    message = refusal("rollout: {local_attention_frames: 2, sink_frames: 2}")
    assert message == (
        "rollout.local_attention_frames: 2 is below num_frame_per_block (3): a block attends to all of itself"
    )
    config = load_text("rollout: {local_attention_frames: 3, sink_frames: 3}")  # sinks lie outside the window
    assert (config.rollout.local_attention_frames, config.rollout.sink_frames) == (3, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [("validation.prompts", 5), ("validation.prompts", ["a", 5]), ("data.resolution", 3.5), ("data.resolution", [1])],
)
def test_keys_of_several_types_are_named_as_they_are(refusal, key, value):
    assert refusal(yaml.safe_dump(nested({key: value}))).startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("validation.steps", []),
        pytest.param("validation.steps", list(range(9, 0, -1))),
        pytest.param("validation.guidance_scale", 0.5),
        pytest.param("train.max_steps", True),
        pytest.param("data.resolution", True),
        pytest.param("output_dir", ""),
        pytest.param("student.targets", []),
    ],
)
def test_bad_values_that_pass(refusal, key, value):
    assert refusal(yaml.safe_dump(nested({key: value}))).startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        pytest.param("data.aspect_ratio", "wide", "16:9"),
        pytest.param("optimizer.betas", [0.9], "two numbers"),
    ],
)
def test_messages_say_what_is_valid(refusal, key, value, says):
    assert says in refusal(yaml.safe_dump(nested({key: value})))


def test_only_the_first_of_several_mistakes_is_told(refusal):
    message = refusal("train: {max_steps: 0, batch_size: 0, seed: -1}")
    assert message == "train.max_steps: 0: it must be at least 1 (2 more)"


# ---------------------------------------------------------------------------------------------------- files, --set


@pytest.mark.parametrize("text", ["train: [", "\t- x", "a: b: c"])
def test_broken_yaml(refusal, text):
    assert refusal(text).startswith("not valid YAML: ")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "5\n", "hello\n"])
def test_yaml_that_holds_no_groups(refusal, text):
    assert refusal(text) == "it must hold groups of keys, such as model: and train:"


def test_keys_that_are_no_text(refusal):
    assert refusal("1: 2").startswith("1: ")
    assert refusal("train:\n  true: 1") == "true: a key must be text (line 2)"
    assert refusal("train:\n  on: 1").startswith("train.on: unknown key")
    assert refusal("? [a]\n: 2") == "a key must be text (line 1)"


def test_a_key_that_stands_twice(refusal, load_text):
    text = "train:\n  max_steps: 5\nmodel: {}\ntrain:\n  seed: 1\n"
    assert refusal(text) == "'train' stands twice, in lines 1 and 4"
    assert refusal("train:\n  seed: 5\n  # more\n  seed: 5") == "'seed' stands twice, in lines 2 and 4"
    merged = load_text("student: &lora {rank: 4, alpha: 8}\nfake_score:\n  <<: *lora\n  rank: 2\n")
    assert (merged.fake_score.rank, merged.fake_score.alpha, merged.student.rank) == (2, 8, 4)


def test_an_override_leaves_the_alias_of_its_group_alone(load_text):
    config = load_text("student: &lora {rank: 4}\nfake_score: *lora\n", "student.rank=8")
    assert (config.student.rank, config.fake_score.rank) == (8, 4)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghij")
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new}\n  <<: [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghij")
)


@pytest.mark.timeout(60)  # seconds would do; the machine may be busy
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"a: [&a {'x' * 50_000}{', *a' * 5}]", "more than 256 KiB of text, with every alias written out"),
        (f"a: &a {'ä' * 70_000}\nb: *a", "more than 256 KiB of text, with every alias written out"),
        (BOMB, "more than 20,000 values, with every alias written out"),
        (MERGE_BOMB, "more than 20,000 values, with every alias written out"),
        ("a: &a [*a]", "nested more than 16 deep (line 1)"),
        ("a: &a {<<: *a}", "nested more than 16 deep (line 1)"),
        ("[" * 100_000, "nested more than 16 deep (line 1)"),
        ("- " * 10_000, "nested more than 16 deep (line 1)"),
        ("a: '" + "x" * 300_000 + "'", "more than 256 KiB; prompts go in a text file of their own"),
        ("train: {seed: " + "9" * 5000 + "}", "a number of 5000 characters (line 1)"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "a number of 5002 characters (line 1)"),
        ("model: {base: !!binary aGk=}", "the tag 'tag:yaml.org,2002:binary' is not for configurations (line 1)"),
        ("train: !!python/object:os.system {}", "the tag 'tag:yaml.org,2002:python/object:os.system' is not for"),
        ("train:\n  seed: !!int 5", "the tag 'tag:yaml.org,2002:int' is not for configurations (line 2)"),
        ("train:\n  seed: =", "'=' must be in quotes (line 2)"),
        ('model: {base: "a\\0b"}', "a character that is no text (line 1)"),
        ('model: {base: "a\\ud800"}', "a character that is no text (line 1)"),
        ("a: 1\n---\nb: 2", "not valid YAML: expected a single document"),
    ],
    ids=lambda value: value[:24],
)
def test_files_that_would_do_harm(refusal, text, says):
    assert refusal(text).startswith(says)


def test_the_largest_file_is_read_back_as_it_is_dumped(tmp_path):
    """Many short prompts and a long one: a dump has a line for each."""
    prompts = [f'"{n % 10}"' for n in range(18_000)] + ["x" * 170_000]
    text = f"data: {{prompts: x}}\nvalidation: {{prompts: [{','.join(prompts)}]}}"
    assert len(text.encode()) < 256 * 1024
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = load(tmp_path / "run.yaml")
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert (tmp_path / "config.yaml").stat().st_size > 256 * 1024
    assert load_own(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_the_encodings_of_a_file(tmp_path, encoding):
    text = "data: {negative_prompt: 色调艳丽}"
    data = text.encode(encoding)
    (tmp_path / "run.yaml").write_bytes(b"\xfe\xff" + data if encoding == "utf-16-be" else data)
    assert load(tmp_path / "run.yaml").data.negative_prompt == "色调艳丽"


def test_a_date_is_text(load_text):
    assert load_text("output_dir: 2026-01-31").output_dir == "2026-01-31"


def test_the_version_of_the_format(refusal, load_text):
    assert load_text("version: 1").version == load_text("").version == 1
    assert "version: 1\n" in dump(Config())
    message = "version: 2 is newer than this dmdtrain reads; valid is 1"
    assert refusal("version: 2\nnew_group: {key: 1}") == message
    assert refusal("version: 0") == "version: 0: it must be at least 1"
    assert refusal("version: true") == "version: true: it must not be true or false"


def test_long_and_odd_values_are_named_on_one_line(refusal):
    message = refusal(f"train: {{max_steps: '{'x' * 9000}'}}")
    assert len(message) < 250 and "..." in message
    assert refusal('"a\\nb": 1') == r"'a\nb': unknown key"
    assert len(refusal(f"train: {{{'k' * 9000}: 1}}")) < 250


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {max_steps: 10000000000}", "train.max_steps: 10000000000: it must be at most 1000000000"),
        ("train: {seed: 4294967296}", "train.seed: 4294967296: it must be below 4294967296"),
        ("data: {resolution: 999999}", "data.resolution: '999999' is neither WIDTHxHEIGHT"),
        (f"data: {{resolution: '{'9' * 400}'}}", "data.resolution: '9999"),
        (f"data: {{aspect_ratio: '{'9' * 400}:1'}}", "data.aspect_ratio: '9999"),
        ("validation: {num_frames: 4000000001}", "validation.num_frames: 4000000001: it must be at most 1000000000"),
    ],
    ids=lambda value: value[:30],
)
def test_numbers_that_no_machine_holds(refusal, text, says):
    assert refusal(text).startswith(says)


@pytest.mark.parametrize(
    "key", ["model.base", "model.teacher", "warmup.data", "data.prompts", "validation.prompts", "output_dir"]
)
def test_names_that_no_file_has(refusal, key):
    assert refusal("", f"{key}={'x' * 300}").startswith(f"{key}: 'xxx")
    assert "too long for the name of a file or folder" in refusal("", f"{key}={'x/' * 3000}")
    assert refusal("", f"{key}=~no-such-user/a") == f"{key}: '~no-such-user/a': no such user's folder"
    assert refusal("", f"{key}={'' if key == 'output_dir' else quoted_nothing}") == f"{key}: '': it must not be empty"


quoted_nothing = '""'


def test_the_path_of_a_set_that_no_file_has(refusal):
    assert refusal("", "data.videos=~no-such-user/a") == "data.videos.0.path: '~no-such-user/a': no such user's folder"


def test_where_values_come_from(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {max_steps: 5, seed: 1}\nstudent: {rank: 4, alpha: 4}\nema:\n")
    values, origins = read(tmp_path / "run.yaml", ["train.seed=2", "ema.every=3", "student={rank: 8}", "output_dir=x"])
    assert build(values).student.alpha == 128
    assert origins == {
        "train.max_steps": "file",
        "train.seed": "--set",
        "ema.every": "--set",
        "student.rank": "--set",
        "output_dir": "--set",
    }


def test_every_key_says_what_it_is():
    described = {
        **{f"{name}.{key}": field for name, group in groups().items() for key, field in group.model_fields.items()}
    }
    described |= {key: field for key, field in Config.model_fields.items() if key not in groups()}
    assert [key for key, field in described.items() if not field.description] == []
    assert [name for name, group in groups().items() if not group.__doc__] == []


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file$"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: "):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"train\x00\x01\xff")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read: "):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.max_steps", "--set train.max_steps: it must be key=value, such as train.max_steps=100"),
        ("=5", "--set =5: it must be key=value, such as train.max_steps=100"),
        ("", "--set : it must be key=value, such as train.max_steps=100"),
        ("train.max_steps=[", "--set train.max_steps=[: the value is not valid YAML"),
        ("train.max_steps.x=5", "--set train.max_steps.x=5: max_steps is not a group of keys"),
        ("output_dir.x=5", "--set output_dir.x=5: output_dir is not a group of keys"),
        ("train=5", "train: 5: it must be a group of keys"),
        ("train=", "--set train=: a group of keys; set one of them, such as train.max_steps=VALUE"),
        ("a.b.c.d=1", "--set a.b.c.d=1: a.b.c.d: unknown key"),
        ("train.seed=!!python/name:os.system", "--set train.seed=!!python/name:os.system: the tag"),
        ("validation.prompts=[a,\nb #]", "--set validation.prompts=[a,\\nb #]: the value is not valid YAML"),
        ("data.negative_promt=bad: hands", "data.negative_promt: unknown key; did you mean data.negative_prompt?"),
        ("train.max_steps=", "train.max_steps: None: input should be a valid integer"),
        ("a.b.c=1", "a: unknown key"),
        ("train.=5", "train.: unknown key"),
    ],
)
def test_bad_overrides(refusal, override, says):
    assert refusal("train: {max_steps: 9}\noutput_dir: here", override).startswith(says)


@pytest.mark.parametrize(
    ("text", "override", "says"),
    [
        ("train: {max_steps: 0}", "train.seed=3", "run.yaml: train.max_steps: 0: it must"),
        ("train: {max_steps: 9}", "train.max_steps=0", "--set: train.max_steps: 0: it must"),
        ("train: {max_steps: 9}", "a.b.c=1", "--set: a: unknown key"),
        ("train: {max_steps: 9}", "train={max_stepz: 3}", "--set: train.max_stepz: unknown key"),
        ("train: {max_stepz: 9}", "data={resolution: 480}", "run.yaml: train.max_stepz: unknown key"),
        ("data: {videos: [{path: a, wight: 1}]}", "train.seed=3", "run.yaml: data.videos.0.wight: unknown key"),
    ],
)
def test_who_made_the_mistake(load_text, text, override, says):
    with pytest.raises(ConfigError, match=f"(^|/){says}"):
        load_text(text, override)


# ---------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("key", CHANGED | APART)
def test_differences_of_every_key(key):
    base = build(nested(NEEDS.get(key, {})))
    found = differences(base, build(nested(NEEDS.get(key, {}) | {key: (CHANGED | APART)[key]})))
    if key in MAY_CHANGE:
        assert found == []
    else:
        before, after = nested_get(base, key), (CHANGED | APART)[key]
        assert found == [f"{key}: {before!r} -> {after!r}"]


def test_nothing_differs_from_itself():
    config = build(nested(CHANGED))
    assert differences(config, config) == []


def test_how_an_update_is_split_may_differ():
    def config(batch_size: int, accumulation: int) -> Config:
        return build({"train": {"batch_size": batch_size, "gradient_accumulation": accumulation}})

    assert differences(config(6, 2), config(3, 4)) == []
    assert differences(config(6, 2), config(3, 2)) == ["train.batch_size: 6 -> 3"]


def test_values_that_are_changed_are_checked():
    config = changed(Config(), {"train.seed": 5, "output_dir": "there"})
    assert (config.train.seed, config.output_dir, Config().train.seed) == (5, "there", 0)
    with pytest.raises(ConfigError, match=r"train.seed: -1"):
        changed(config, {"train.seed": -1})


def test_a_decaying_schedule_fixes_the_length():
    def config(name: str, steps: int) -> Config:
        return build({"schedule": {"name": name}, "train": {"max_steps": steps}})

    assert differences(config("constant", 10), config("constant", 20)) == []
    for name in ("linear", "cosine_with_min_lr"):
        (found,) = differences(config(name, 10), config(name, 20))
        assert found == "train.max_steps: 10 -> 20 (the schedule depends on it)"
        assert differences(config(name, 10), config(name, 10)) == []
