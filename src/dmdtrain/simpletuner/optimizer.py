"""The optimizer and the size of an update: what holds in SimpleTuner hangs on several keys, and on the optimizer's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dmdtrain.config import Config
from dmdtrain.simpletuner import tables
from dmdtrain.simpletuner.translation import NO_MEANING, REFUSED, SAME, Translation, is_on

OF_DEEPSPEED = "SimpleTuner reads it under DeepSpeed alone"


def _deepspeed(made: Translation) -> bool:
    return is_on(made.given.get("deepspeed_config"))


def _own(made: Translation) -> tables.AdamW:
    """What holds where no key says it."""
    name = made.given.get("optimizer", tables.THEIR_DEFAULTS["optimizer"])
    plain = tables.OPTIMIZERS["torch-adamw"]  # as DeepSpeed's, whose settings are adam_*
    return plain if _deepspeed(made) else tables.OPTIMIZERS.get(str(name), plain)


def _name(made: Translation, value: Any, source: str) -> None:
    found = tables.OPTIMIZERS.get(value) if isinstance(value, str) else None
    if found is None:
        made.say(REFUSED, source, tables.OPTIMIZER_HELP)
    else:
        made.put("optimizer.name", found.name, source)


def _put_betas(made: Translation, kind: str, source: str) -> None:
    own = _own(made).betas
    made.put("optimizer.betas", [made.given.get(f"{kind}_beta{i + 1}", own[i]) for i in (0, 1)], source)


def _betas(made: Translation, value: Any, source: str) -> None:
    """optimizer_beta1 or optimizer_beta2."""
    if _deepspeed(made):
        made.say(NO_MEANING, source, "DeepSpeed reads adam_beta1 and adam_beta2")
    elif is_on(made.given.get("optimizer_config")):
        made.say(NO_MEANING, source, "SimpleTuner does not read it beside optimizer_config")
    else:
        _put_betas(made, "optimizer", source)


def _of_deepspeed(ours: str) -> Callable[[Translation, Any, str], None]:
    def handle(made: Translation, value: Any, source: str) -> None:
        if _deepspeed(made) and ours == "optimizer.betas":
            _put_betas(made, "adam", source)
        elif _deepspeed(made):
            made.put(ours, value, source)
        else:
            made.say(NO_MEANING, source, f"{OF_DEEPSPEED}; set {ours}")

    return handle


def _settings(made: Translation, value: Any, source: str) -> None:
    """optimizer_config, such as "weight_decay=0.0,eps=1e-8"."""
    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()] if isinstance(value, str) else []
    settings = {name.strip(): number.strip() for name, _, number in pairs}
    if not is_on(value):
        made.say(SAME, source, "no settings")
    elif _deepspeed(made):
        made.say(NO_MEANING, source, "SimpleTuner does not read it under DeepSpeed")
    elif not settings or not settings.keys() <= {"weight_decay", "eps"}:
        made.say(REFUSED, source, "only eps and weight_decay can be read: set optimizer.eps, weight_decay and betas")
    else:
        for name, number in settings.items():
            made.put(f"optimizer.{name}", _number(number), source)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _lr_end(made: Translation, value: Any, source: str) -> None:
    schedule = made.given.get("lr_scheduler", "constant_with_warmup")
    if schedule == "cosine_with_min_lr":
        made.put("schedule.min_lr", value, source)
    else:
        made.say(NO_MEANING, source, f"SimpleTuner does not read it with lr_scheduler: {schedule}; linear ends at 0")


def _processes(made: Translation, value: Any, source: str) -> None:
    if type(value) is not int or value < 1:
        made.say(REFUSED, source, "multiply train.gradient_accumulation by the number of processes")
    elif value == 1:
        made.say(SAME, source, "one process")


def _lr_scale(made: Translation, value: Any, source: str) -> None:
    if made.given.get("lr_scale") is not True:
        made.say(NO_MEANING, source, "the learning rate is not scaled")


def complete_optimizer(made: Translation) -> None:
    """The defaults that go by the optimizer's name; the videos of an update on several processes; a scaled learning rate."""
    default, own = Config().optimizer, _own(made)
    for setting in ("betas", "eps", "weight_decay"):
        ours, value = f"optimizer.{setting}", getattr(own, setting)
        if ours not in made.values and value != getattr(default, setting):
            for source in made.sources.get("optimizer.name", [])[:1]:
                value = list(value) if setting == "betas" else value
                made.put(ours, value, source, "the default of that optimizer in SimpleTuner")
    processes = made.given.get("num_processes", 1)
    processes = processes if type(processes) is int and processes > 0 else 1
    each = made.values.get("train.gradient_accumulation", 1)
    if made.given.get("lr_scale") is True:
        _scale(made, [made.values.get("train.batch_size", 1), each, processes])
    if processes > 1 and type(each) is int:
        shared = made.given.get("context_parallel_size", 1)  # processes that share a video
        videos = processes // shared if type(shared) is int and 0 < shared <= processes else processes
        why = f"there {videos} processes bring {each} a step each, here one brings all"
        made.put("train.gradient_accumulation", each * videos, made.source("num_processes"), why)
    elif processes > 1:
        made.say(REFUSED, made.source("num_processes"), "multiply train.gradient_accumulation by it")


def _scale(made: Translation, sizes: list[Any]) -> None:
    """lr_scale. sizes: whose product is the number of videos of a step."""
    rate = made.values.get("optimizer.lr")
    for key in [key for key in ("lr_scale", "lr_scale_sqrt") if key in made.given]:
        if all(type(size) is int for size in sizes) and isinstance(rate, int | float):
            factor = math.prod(sizes) ** (0.5 if made.given.get("lr_scale_sqrt") is True else 1)
            why = f"{rate} x {factor:g}: SimpleTuner scales it by the videos of a step"
            made.put("optimizer.lr", rate * factor, made.source(key), why)
        else:
            made.say(REFUSED, made.source(key), "set optimizer.lr to the scaled rate")


HANDLERS: dict[str, Callable[[Translation, Any, str], None]] = {
    "optimizer": _name,
    "optimizer_config": _settings,
    "optimizer_beta1": _betas,
    "optimizer_beta2": _betas,
    "adam_beta1": _of_deepspeed("optimizer.betas"),
    "adam_beta2": _of_deepspeed("optimizer.betas"),
    "adam_epsilon": _of_deepspeed("optimizer.eps"),
    "adam_weight_decay": _of_deepspeed("optimizer.weight_decay"),
    "lr_end": _lr_end,
    "lr_scale": _lr_scale,
    "lr_scale_sqrt": _lr_scale,
    "num_processes": _processes,
}
