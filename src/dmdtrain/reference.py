"""What the configuration says about itself: a resolved one with origins, its JSON Schema, the reference page."""

from __future__ import annotations

import json
from typing import Any

from pydantic.fields import FieldInfo

from dmdtrain import strict_yaml
from dmdtrain.config import MOST, Config, VideoSet, groups, known_keys, nested_get

COMMENT_COLUMN = 44
PAGE_HEAD = """\
# The configuration

Every key of a run's YAML file. This page is made from `src/dmdtrain/config.py` (`make docs`).

- `dmdtrain config show CONFIG` says what a file resolves to, and where each value is from.
- `dmdtrain config schema` is the JSON Schema with which editors complete and check a file: `docs/config.schema.json`,
  which a first line `# yaml-language-server: $schema=PATH` names.
- `--set group.key=value` overrides any key. A key that takes text takes the value as it stands (`worst quality #1`, `no`, nothing
  at all); `null` unsets one that may be null, and a value in quotes is read without them, so `"null"` is text. Lists in brackets
  and the values of all other keys are YAML.
- Unknown keys are refused. Numbers are finite and decimal; one that is read differently elsewhere (0400, 1:30) is refused.
- `dmdtrain import-config config.json` translates a configuration of SimpleTuner.
"""


def derived(config: Config) -> dict[str, str]:
    """What keys stand for that are null or follow another one, by key."""
    shift = config.model.flow_shift
    means = {
        "model.teacher": "the base",
        "model.teacher_precision": f"as model.precision, {config.model.precision}",
        "model.flow_shift": "what the model folder's scheduler says",
        "rollout.min_training_frames": f"as num_training_frames, {config.rollout.num_training_frames}",
        "rollout.num_gradient_frames": f"all, {config.rollout.num_training_frames}",
        "rollout.local_attention_frames": "all before the block",
        "warmup.data": f"{config.output_dir}/cache/warmup" if config.warmup.kind != "none" else "no warm-up",
        "warmup.timestep_shift": f"as model.flow_shift{'' if shift is None else f', {shift:g}'}",
        "model.quantized_cache": "quantized at every start",
        "data.prompts": "the captions of data.videos; without, wan-tiny's on wan-tiny",
        "data.prompt_column": "the only one, or prompt, caption or text",
        "data.cache_dir": f"{config.output_dir}/cache",
        "data.videos": "no clips",
        "data.fps": "the clips' own",
        "log.wandb": "not used",
        "log.webhook": "not used",
        "hub.model_id": "nothing is uploaded",
        "validation.fps": "the model's own",
        "validation.prompts": "wan-tiny's held-out captions" if config.model.base == "wan-tiny" else "library",
        "validation.tiled_decoding": "for frames above 832 x 480 pixels",
        "validation.steps": f"as dmd.denoising_steps, {','.join(f'{t:g}' for t in config.dmd.denoising_steps)}",
    }
    known = {"model.base": "as model.teacher"} if config.model.teacher == "wan-tiny" else {}
    return known | {key: text for key, text in means.items() if nested_get(config, key) is None}


def show(config: Config, origins: dict[str, str]) -> str:
    """The resolved configuration as YAML that `load` reads back, with the origin of each value beside it.

    Args:
        origins: of the keys that were given, as `config.read` has them.
    """
    kinds, means, lines = groups(), derived(config), []
    values = config.model_dump(mode="json")
    for key in known_keys():
        group, _, name = key.rpartition(".")
        if group and known_keys(group)[0] == key:
            lines.append(f"{group}:")
        value = values[group][name] if group in kinds else values[name]
        origin = origins.get(key, "default") if key not in means else f"derived: {means[key]}"
        text = f"{'  ' if group else ''}{name}: {strict_yaml.inline(value)}"
        lines.append(f"{text:<{COMMENT_COLUMN}}  # {' '.join(origin.split())}")
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """JSON Schema of a configuration file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Config.model_json_schema()


def schema_text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    """The reference page in Markdown: a table for every group, a row for every key."""
    whole = schema()
    properties = {name: part["properties"] for name, part in whole["$defs"].items()}
    lines = [PAGE_HEAD, *_table([(n, f, whole["properties"][n]) for n, f in _loose_fields()])]
    for name, kind in groups().items():
        fields = [(key, field, properties[kind.__name__][key]) for key, field in kind.model_fields.items()]
        lines += [f"\n## {name}\n", " ".join((kind.__doc__ or "").split()) + "\n", *_table(fields)]
    items = [(key, field, properties["VideoSet"][key]) for key, field in VideoSet.model_fields.items()]
    lines += ["\n## VideoSet\n", "An item of data.videos.\n", *_table(items)]
    return "\n".join(lines) + "\n"


def _loose_fields() -> list[tuple[str, FieldInfo]]:
    return [(name, field) for name, field in Config.model_fields.items() if name not in groups()]


def _table(fields: list[tuple[str, FieldInfo, dict[str, Any]]]) -> list[str]:
    rows = ["| key | valid | default | meaning |", "|---|---|---|---|"]
    for name, field, part in fields:
        cells = (f"`{name}`", _valid(part), f"`{strict_yaml.inline(part.get('default'))}`", _meaning(field))
        rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return rows


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("None:", "null:")


def _valid(part: dict[str, Any]) -> str:
    """What a JSON Schema allows, in words."""
    if "$ref" in part:
        return f"`{part['$ref'].rpartition('/')[2]}` (below)"
    if "anyOf" in part:
        return " or ".join(_valid(option) for option in part["anyOf"])
    if "enum" in part or "const" in part:
        return ", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    kind = part["type"]
    if kind == "array":
        items = part.get("items") or part["prefixItems"][0]
        count = f"{part['minItems']} " if part.get("maxItems") == part.get("minItems", -1) else ""
        return f"list of {count}{_plural(_valid(items))}"
    if "minimum" in part and part["minimum"] == part.get("maximum"):
        return f"`{part['minimum']}`"
    word = {"string": "text", "boolean": "`true`, `false`"}.get(kind, kind)
    low = _bound(part, "at least", "minimum", "above", "exclusiveMinimum")
    high = _bound(part, "at most", "maximum", "below", "exclusiveMaximum")
    return ", ".join(filter(None, [word, " and ".join(filter(None, [low, high]))]))


def _plural(valid: str) -> str:
    word, comma, rest = valid.partition(",")
    return (f"{word}s" if word in ("number", "integer") else word) + comma + rest


def _bound(part: dict[str, Any], closed: str, closed_key: str, open_: str, open_key: str) -> str:
    for word, key in ((closed, closed_key), (open_, open_key)):
        if key in part and part[key] != MOST:
            return f"{word} {part[key]}"
    return ""
