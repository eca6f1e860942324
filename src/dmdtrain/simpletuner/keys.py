"""The keys of config.json: each is put into one of ours, or said to be of another list."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dmdtrain.prompt_library import LIBRARY
from dmdtrain.simpletuner import clips, optimizer, tables
from dmdtrain.simpletuner.translation import NO_MEANING, REFUSED, SAME, Translation, is_on, read_json


def translate_key(made: Translation, key: str, value: Any, source: str) -> None:
    distillation = key.removeprefix(tables.DISTILLATION) if key.startswith(tables.DISTILLATION) else None
    if value is None:
        is_known = key in known() or any(_fits(key, names) for names in patterns())
        made.say(SAME if is_known else REFUSED, source, "not set" if is_known else _unknown(key))
    elif not made.causal and distillation in tables.BLOCKS:
        made.say(NO_MEANING, source, "a bidirectional student makes all frames as one block")
    elif key in HANDLERS:
        HANDLERS[key](made, value, source)
    elif key in tables.COPY:
        for ours in tables.COPY[key]:
            made.put(ours, value, source, tables.NOTES.get(ours, ""))
    elif key in tables.CHOICES:
        _choose(made, tables.CHOICES[key], value, source)
    else:
        _leave(made, key, value, source)


def _choose(made: Translation, choice: tables.Choice, value: Any, source: str) -> None:
    found = choice.values.get(value) if isinstance(value, str) else None
    if found is None:
        made.say(REFUSED, source, choice.otherwise)
        return
    for ours in choice.ours:
        made.put(ours, found, source)


def _leave(made: Translation, key: str, value: Any, source: str) -> None:
    """A key that is translated into nothing: says why."""
    if key in tables.AGREE:
        agreeing, otherwise = tables.AGREE[key]
        agrees = any(type(value) is type(ours) and value == ours for ours in agreeing)
        made.say(SAME if agrees else REFUSED, source, "as it is done here" if agrees else otherwise)
    elif _fits(key, tables.SWITCHES):
        on = is_on(value)
        made.say(REFUSED if on else NO_MEANING, source, "another way to train than DMD" if on else "off")
    elif _fits(key, tables.SWITCHED):
        made.say(NO_MEANING, source, "of another way to train, which another key switches on")
    else:
        why = next((why for names, why in tables.NO_MEANING if _fits(key, names)), None)
        made.say(REFUSED if why is None else NO_MEANING, source, _unknown(key) if why is None else why)


def _fits(key: str, names: str) -> bool:
    return any(fnmatchcase(key, name) for name in names.split())


def _unknown(key: str) -> str:
    scope = [name for name in known() if name.rpartition(".")[0] == key.rpartition(".")[0]]
    near = difflib.get_close_matches(key, scope, 1, 0.6)
    return "unknown key" + (
        f"; did you mean {near[0].rpartition('.')[2]}?" if near else "; remove it if it is not yours"
    )


def _base(made: Translation, value: Any, source: str) -> None:
    name, comment = str(value), ""
    if re.fullmatch(r"Wan-AI/Wan2\.(1-T2V-(1\.3B|14B)|2-TI2V-5B)", name):
        name, comment = f"{name}-Diffusers", f"{name} is not in Diffusers' format"
    elif (found := made.find(name)) is not None and found != Path(name):
        name, comment = str(found.resolve()), f"was {name}"
    made.put("model.base", name, source, comment)


def _flavour(made: Translation, value: Any, source: str) -> None:
    if value in list(tables.FLAVOURS) and made.given.get("pretrained_model_name_or_path") is None:
        made.put("model.base", tables.FLAVOURS[value], source)
    else:
        _leave(made, "model_flavour", value, source)


def _text_encoder(made: Translation, value: Any, source: str) -> None:
    same = value == made.given.get("pretrained_model_name_or_path") or str(value).startswith("Wan-AI/Wan2.")
    what = "the text encoder is the base folder's" + ("" if same else ": put this one into that folder")
    made.say(SAME if same else REFUSED, source, what)


def _kind(made: Translation, value: Any, source: str) -> None:
    _choose(made, tables.CHOICES["model_type"], value, source)
    if value == "full":
        made.put("fake_score.kind", "full", source)


def _lora(made: Translation, value: Any, source: str) -> None:
    for ours in tables.COPY["lora_rank"]:
        made.put(ours, value, source, tables.NOTES.get(ours, ""))
    if made.given.get("lora_alpha") is None:
        for ours in tables.COPY["lora_alpha"]:
            made.put(ours, value, source, "alpha is the rank where it is not set")


def _targets(made: Translation, value: Any, source: str) -> None:
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    made.put("student.targets", names, source)


def _warmup_steps(made: Translation, value: Any, source: str) -> None:
    if made.given.get("lr_scheduler") == "constant":
        made.say(NO_MEANING, source, "lr_scheduler: constant has no warm-up; constant_with_warmup has")
        return
    every = made.given.get("distillation_config.generator_update_interval")
    note = "of the student's updates" if isinstance(every, int) and every > 1 else ""
    made.put("schedule.warmup_steps", value, source, note)


def _use_ema(made: Translation, value: Any, source: str) -> None:
    made.put("ema.enabled", value, source)
    if value is False:
        made.put("ema.validate_with", "raw", source)
    elif not is_on(made.given.get("ema_warmup_steps")):
        interval = made.given.get("distillation_config.generator_update_interval", 1)
        counted = "" if interval == 1 else "; n counts steps there, updates of the student here"
        made.put("ema.warmup", True, source, f"min(ema.decay, (1 + n) / (10 + n)), as in SimpleTuner{counted}")


def _ema_warmup(made: Translation, value: Any, source: str) -> None:
    if made.given.get("use_ema", False) is not True:
        made.say(NO_MEANING, source, "use_ema is off")
    elif is_on(value):
        why = f"SimpleTuner copies the weights until step {value}, then holds the decay; here it rises to it"
        made.put("ema.warmup", True, source, why)
    else:
        made.say(SAME, source, "the decay ramps up: ema.warmup")


def _ema_setting(key: str) -> Callable[[Translation, Any, str], None]:
    def handle(made: Translation, value: Any, source: str) -> None:
        if made.given.get("use_ema", False) is not True:
            made.say(NO_MEANING, source, "use_ema is off")
        elif key in tables.CHOICES:
            _choose(made, tables.CHOICES[key], value, source)
        else:
            made.put(tables.COPY[key][0], value, source)

    return handle


def _wandb(project: Any) -> str:
    """Off: the result runs where the package is missing."""
    return f"set it to {project}, after pip install 'dmdtrain[wandb]'"


def _report(made: Translation, value: Any, source: str) -> None:
    if value in ("tensorboard", "none"):
        made.put("log.tensorboard", value == "tensorboard", source)
    elif value == "wandb":
        made.put("log.wandb", None, source, _wandb(made.given.get("tracker_project_name") or "dmdtrain"))
    else:
        made.say(NO_MEANING, source, "metrics go to OUTPUT_DIR/metrics.jsonl, TensorBoard and log.wandb")


def _project(made: Translation, value: Any, source: str) -> None:
    if made.given.get("report_to") == "wandb" and value:
        made.put("log.wandb", None, source, _wandb(value))
    else:
        made.say(NO_MEANING, source, "report_to is not wandb")


def _webhook(made: Translation, value: Any, source: str) -> None:
    made.say(NO_MEANING, source, "set log.webhook to its address, which gets dmdtrain's own JSON")


NO_OWNER = "a repository is named with its owner: set hub.model_id to NAME/REPO"


def _push(made: Translation, value: Any, source: str) -> None:
    if value is not True:
        made.say(SAME, source, "nothing is uploaded unless hub.model_id is set")
    elif not (repo := made.given.get("hub_model_id")):
        made.say(REFUSED, source, "set hub.model_id to NAME/REPO")
    elif "/" in str(repo):
        made.put("hub.model_id", repo, source)
    else:
        made.say(NO_MEANING, source, NO_OWNER)


def _of_hub(ours: str) -> Callable[[Translation, Any, str], None]:
    def handle(made: Translation, value: Any, source: str) -> None:
        if made.given.get("push_to_hub") is not True:
            made.say(NO_MEANING, source, "push_to_hub is off")
        elif "/" not in str(made.given.get("hub_model_id")):
            made.say(NO_MEANING, source, NO_OWNER)
        else:
            made.put(ours, value, source)

    return handle


def _resume(made: Translation, value: Any, source: str) -> None:
    if value in ("latest", False, ""):
        made.say(SAME, source, "fit goes on from the run's newest checkpoint; --resume never refuses to")
    else:
        made.say(REFUSED, source, "a checkpoint of SimpleTuner can not be gone on from: start anew")


def _epochs(made: Translation, value: Any, source: str) -> None:
    if made.given.get("max_train_steps"):
        made.say(NO_MEANING, source, "train.max_steps decides")
    else:
        made.say(REFUSED, source, "the length is counted in steps: set train.max_steps")


def _max_steps(made: Translation, value: Any, source: str) -> None:
    if value:
        made.put("train.max_steps", value, source)
    else:
        made.say(REFUSED, source, "set train.max_steps, the number of steps")


def _no_validation(made: Translation, value: Any, source: str) -> None:
    if value:
        made.put("validation.every", 0, source)
    else:
        made.say(SAME, source, "validation.every says when")


def _validation_interval(made: Translation, value: Any, source: str) -> None:
    if made.given.get("validation_disable"):
        made.say(NO_MEANING, source, "validation_disable is on")
    else:
        made.put("validation.every", value, source)


def _student_steps(value: Any) -> Any:
    """Without blanks, and without a 0 at the end, as SimpleTuner reads them."""
    steps = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(steps, list) or not steps:
        return value
    steps = steps[:-1] if steps[-1] in (0, "0") and len(steps) > 1 else steps
    return ",".join(steps) if isinstance(value, str) else steps


def _denoising_steps(made: Translation, value: Any, source: str) -> None:
    steps = _student_steps(value)
    note = "the 0 at the end is dropped, as SimpleTuner does" if steps != value else ""
    made.put("dmd.denoising_steps", steps, source, note)


def _validation_steps(made: Translation, value: Any, source: str) -> None:
    steps = _student_steps(made.given.get("distillation_config.dmd_denoising_steps", "1000,757,522"))
    count = len(steps.split(",")) if isinstance(steps, str) else len(steps) if isinstance(steps, list) else 0
    if str(value) == str(count):
        made.say(SAME, source, "validation runs the student's denoising steps")
    else:
        made.say(
            REFUSED, source, f"the student runs its own {count} steps: set validation.steps to a list of timesteps"
        )


def _validation_prompt(made: Translation, value: Any, source: str) -> None:
    prompts = value if isinstance(value, list) else [value]
    if not all(isinstance(prompt, str) for prompt in prompts):
        made.say(REFUSED, source, "it is no prompt and no list of them: set validation.prompts")
    elif not any(prompt.strip() for prompt in prompts):
        made.say(NO_MEANING, source, "no prompt; what validation.prompts says is rendered")
    else:
        filled = [prompt for prompt in prompts if prompt.strip()]
        made.put("validation.prompts", [*filled, *made.values.get("validation.prompts", [])], source)


def _validation_resolution(made: Translation, value: Any, source: str) -> None:
    first, *more = str(value).split(",")
    made.put("validation.resolution", first.strip(), source, f"the first of {value}" if more else "")


def _prompt_library(made: Translation, value: Any, source: str) -> None:
    if value is False:
        made.say(SAME, source, "no library of prompts")
    elif value is True:
        made.put("validation.prompts", [*made.values.get("validation.prompts", []), *LIBRARY], source)
    elif (file := made.find(str(value))) is None:
        made.say(REFUSED, source, "no such file: put its prompts into validation.prompts")
    else:
        library = read_json(file)
        prompts = list(library.values()) if isinstance(library, dict) else library
        prompts = [p.get("prompt") if isinstance(p, dict) else p for p in prompts] if isinstance(prompts, list) else []
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            made.say(REFUSED, source, f"{file} is no object of names and prompts: put them into validation.prompts")
            return
        made.put("validation.prompts", [*made.values.get("validation.prompts", []), *prompts], source)


def _agreed(made: Translation, value: Any, source: str) -> None:
    made.say(SAME, source, "what dmdtrain does")


def _minimum_size(made: Translation, value: Any, source: str) -> None:
    clips.minimum_size(made, value, source, made.given.get("resolution_type", "pixel_area"))


def _no_distillation(made: Translation, value: Any, source: str) -> None:
    made.say(SAME, source, "no settings")


def _elsewhere(made: Translation, value: Any, source: str) -> None:
    """Read with the datasets."""


HANDLERS: dict[str, Callable[[Translation, Any, str], None]] = {
    "model_family": _agreed,
    "distillation_method": _agreed,
    "pretrained_model_name_or_path": _base,
    "model_flavour": _flavour,
    "pretrained_t5_model_name_or_path": _text_encoder,
    "model_type": _kind,
    "lora_rank": _lora,
    "peft_lora_target_modules": _targets,
    "lr_warmup_steps": _warmup_steps,
    "use_ema": _use_ema,
    "ema_decay": _ema_setting("ema_decay"),
    "ema_warmup_steps": _ema_warmup,
    "ema_update_interval": _ema_setting("ema_update_interval"),
    "ema_validation": _ema_setting("ema_validation"),
    "report_to": _report,
    "tracker_project_name": _project,
    "webhook_config": _webhook,
    "push_to_hub": _push,
    "hub_model_id": _of_hub("hub.model_id"),
    "push_checkpoints_to_hub": _of_hub("hub.push_checkpoints"),
    "model_card_private": _of_hub("hub.private"),
    "resume_from_checkpoint": _resume,
    "num_train_epochs": _epochs,
    "max_train_steps": _max_steps,
    "validation_disable": _no_validation,
    "validation_step_interval": _validation_interval,
    "validation_num_inference_steps": _validation_steps,
    "validation_prompt": _validation_prompt,
    "validation_prompt_library": _prompt_library,
    "user_prompt_library": _prompt_library,
    "validation_resolution": _validation_resolution,
    "minimum_image_size": _minimum_size,
    "resolution": _elsewhere,
    "resolution_type": _elsewhere,
    "data_backend_config": _elsewhere,
    "distillation_config": _no_distillation,
    "distillation_config.dmd_denoising_steps": _denoising_steps,
    **optimizer.HANDLERS,
}

OF_DATASETS = (
    "instance_data_dir",
    "caption_strategy",
    "num_frames",
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "video",
)


def patterns() -> list[str]:
    """Words of names and shell patterns of keys that are not translated."""
    return [*(names for names, _ in tables.NO_MEANING), tables.SWITCHES, tables.SWITCHED]


def known() -> list[str]:
    """Names of theirs that are told apart here, without patterns."""
    words = " ".join(patterns()).split()
    of_datasets = [tables.DATASET + key for key in (*OF_DATASETS, *clips.KEYS)]
    of_datasets += [f"{tables.DATASET}video.{key}" for key in ("num_frames", *clips.VIDEO)]
    tabled = (*tables.COPY, *tables.CHOICES, *tables.AGREE, *tables.ALIASES)
    return [*tabled, *HANDLERS, *of_datasets, *(word for word in words if "*" not in word)]
