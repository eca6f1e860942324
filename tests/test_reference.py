"""What the configuration says about itself: `config show`, `config schema`, `config docs`, and the pages made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import done, refused, run_cli

from dmdtrain.config import Config, build, groups, known_keys, load, nested_get, read
from dmdtrain.reference import derived, page, schema, schema_text, show

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def shown(text: str) -> dict[str, str]:
    """`group.key` -> what stands behind the last `#` of its line."""
    found, group = {}, ""
    for line in text.splitlines():
        if line.endswith(":"):
            group = line[:-1]
            continue
        key = line.split(":")[0]
        found[f"{group}.{key.strip()}" if key.startswith(" ") else key] = line.rpartition("# ")[2]
    return found


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_what_is_shown_is_a_configuration(tmp_path, file):
    values, origins = read(file)
    text = show(build(values), origins)
    (tmp_path / "shown.yaml").write_text(text)
    assert load(tmp_path / "shown.yaml") == load(file)
    assert set(shown(text)) == set(known_keys())


def test_origins_beside_the_values(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {max_steps: 5, seed: 1}\nvalidation: {steps: [900, 100]}\n")
    result = run_cli("config", "show", tmp_path / "run.yaml", "--set", "train.seed=2", "--set", "output_dir=there")
    assert result.exit_code == 0
    origin = shown(result.stdout)
    assert (origin["train.max_steps"], origin["train.seed"], origin["output_dir"]) == ("file", "--set", "--set")
    assert origin["train.batch_size"] == "default"
    assert origin["model.teacher_precision"] == "derived: as model.precision, bf16"
    assert origin["validation.steps"] == "file"
    assert "  seed: 2 " in result.stdout and "output_dir: there " in result.stdout


def test_the_miniature_as_teacher_is_the_base_too(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {base: Wan-AI/Wan2.1-T2V-1.3B-Diffusers, precision: int8}\n")
    result = run_cli("config", "show", tmp_path / "run.yaml", "--set", "model.teacher=wan-tiny")
    assert result.exit_code == 0 and "  base: wan-tiny " in result.stdout
    origin = shown(result.stdout)
    assert (origin["model.base"], origin["model.teacher"]) == ("derived: as model.teacher", "--set")


def test_every_null_says_what_it_stands_for():
    config = Config()
    assert set(derived(config)) == {key for key in known_keys() if nested_get(config, key) is None}
    changed = build(
        {
            "model": {"precision": "nf4", "flow_shift": 5},
            "rollout": {"causal": True, "num_training_frames": 12},
            "validation": {"num_frames": 45},
            "warmup": {"kind": "ode_regression"},
            "dmd": {"denoising_steps": [1000, 500]},
            "output_dir": "here",
        }
    )
    means = derived(changed)
    assert means["model.teacher_precision"].endswith("nf4") and means["warmup.timestep_shift"].endswith(", 5")
    assert means["rollout.min_training_frames"].endswith("12") and means["rollout.num_gradient_frames"] == "all, 12"
    assert means["warmup.data"] == "here/cache/warmup" and means["validation.steps"].endswith("1000,500")
    assert "model.flow_shift" not in means


@pytest.mark.parametrize("prompt", ["a\nb", "a: b # c", "'\"", "null", "16:9", "x" * 400, "色調 \t\x07 ", ""])
def test_any_text_is_shown_on_one_line(tmp_path, prompt):
    config = build({"data": {"negative_prompt": prompt}, "validation": {"prompts": [prompt, "b"]}})
    (tmp_path / "shown.yaml").write_text(show(config, {}))
    assert load(tmp_path / "shown.yaml") == config


def test_a_mistake_is_not_shown(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {steps: 5}")
    refused("config", "show", tmp_path / "run.yaml", says="train.steps: unknown key")
    refused("config", "show", tmp_path / "none.yaml", says="no such file")


def test_the_schema_has_every_key_with_its_description_and_bounds():
    whole = schema()
    assert set(whole["properties"]) == set(Config.model_fields)
    for name, kind in groups().items():
        part = whole["$defs"][kind.__name__]
        assert part["additionalProperties"] is False and part["description"]
        assert set(part["properties"]) == {key.split(".")[1] for key in known_keys(name)}
        assert all(field["description"] for field in part["properties"].values())
    dmd = whole["$defs"]["Dmd"]["properties"]
    assert {option["type"] for option in dmd["denoising_steps"]["anyOf"]} == {"array", "string"}
    videos = whole["$defs"]["Data"]["properties"]["videos"]["anyOf"]
    text, one_set = {"type": "string", "minLength": 1}, {"$ref": "#/$defs/VideoSet"}
    assert videos == [
        text,
        one_set,
        {"type": "array", "items": {"anyOf": [text, one_set]}, "minItems": 1},
        {"type": "null"},
    ]
    assert (dmd["min_timestep_ratio"]["minimum"], dmd["min_timestep_ratio"]["exclusiveMaximum"]) == (0, 1)
    assert whole["$defs"]["Model"]["properties"]["precision"]["enum"] == ["fp32", "bf16", "int8", "int8-llm", "nf4"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("grad_clip_method", "| `norm`, `value` | `norm` |"),
        ("betas", "| list of 2 numbers, at least 0 and below 1 | `[0.9, 0.999]` |"),
        ("flow_shift", "| number, above 0 or null | `null` |"),
        ("generator_update_interval", "| integer, at least 1 | `1` |"),
        ("version", "| `1` | `1` |"),
        ("max_sequence_length", "| integer, at least 8 and at most 512 | `512` |"),
        ("denoising_steps", "| list of numbers, above 0 and at most 1000 or text | `[1000, 757, 522]` |"),
    ],
)
def test_rows_of_the_page(row, says):
    line = next(line for line in page().splitlines() if line.startswith(f"| `{row}` |"))
    assert says in line


def test_the_pages_are_fresh():
    for file, text in (("config.schema.json", schema_text()), ("configuration.md", page())):
        assert (ROOT / "docs" / file).read_text(encoding="utf-8") == text, f"docs/{file} is stale: make docs"
    assert "docs/configuration.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_print_the_pages():
    assert json.loads(run_cli("config", "schema").stdout) == schema()
    assert run_cli("config", "docs").stdout == page()
    assert "show" in done("config", "--help")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_shipped_configurations_name_the_schema(file):
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (file.parent / first.partition("=")[2]).resolve() == ROOT / "docs" / "config.schema.json"
