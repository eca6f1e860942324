"""Numbers that are watched while a run trains, and what is kept of a step that was not finite. Neither changes training."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from dmdtrain.config import BRANCH_OFF, ConfigError
from dmdtrain.config import Alarms as Settings
from dmdtrain.files import save_tensors, write_text
from dmdtrain.train.step import Draws, mean_distance

# Which rule watches which number of a step.
WATCHED = {
    "x0_mean": "x0_drift",
    "x0_std": "x0_drift",
    "student_grad_norm": "gradient_jump",
    "fake_score_grad_norm": "gradient_jump",
    "warmup_grad_norm": "gradient_jump",
    "critic_unexplained": "critic_divergence",
    "x0_diversity": "diversity",
}
ADVICE = {
    "x0_drift": "the student may be collapsing: look at the next samples, lower optimizer.lr or dmd.real_score_guidance_scale",
    "gradient_jump": "if it goes on, lower the role's lr or grad_clip",
    "critic_divergence": "the fake score does not follow the student: raise dmd.generator_update_interval or fake_score.lr, or "
    "lower optimizer.lr; where its gradient norm jumps, lower fake_score.lr",
    "diversity": "the videos of different prompts and seeds become alike: go back to an earlier checkpoint, lower optimizer.lr",
    "saturation": "colours burn out: lower dmd.real_score_guidance_scale or optimizer.lr",
}
BAD_STEPS, MAX_DUMPS = "bad_steps", 5  # their folder in a run's, and how many are kept


@dataclass
class Running:
    """Means of a number: over the window, over a tenth of it, and over the first fifth of a window that there was."""

    count: int = 0
    mean: float = 0.0
    recent: float = 0.0
    first: float = 0.0

    def add(self, value: float, window: int) -> None:
        """Exponential means, of which the first values count equally, as in plain ones."""
        self.count += 1
        self.mean += (value - self.mean) / min(self.count, window)
        self.recent += (value - self.recent) / min(self.count, window // 10)
        if self.count <= window // 5:
            self.first = self.mean


class Alarms:
    """Alarms of one stage. `state` is in its checkpoints, so that a resumed run has the same ones."""

    def __init__(self, settings: Settings, tell: Callable[[str], None]):
        self.settings, self.tell = settings, tell
        self.running: dict[str, Running] = {}
        self.counts = {rule: 0 for rule in ADVICE if getattr(settings, rule) > 0}
        self.active: dict[str, int] = {}  # the last step at which each was bad

    def step(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Looks at a step's numbers; returns how often each alarm has begun so far."""
        for name, value in values.items():
            if name in WATCHED and math.isfinite(value):
                self._look(step, name, value)
        return {f"alarms_{rule}": count for rule, count in self.counts.items()}

    def _look(self, step: int, name: str, value: float) -> None:
        rule, window, running = WATCHED[name], self.settings.window, self.running.setdefault(name, Running())
        limit, before = getattr(self.settings, rule), running.mean
        running.add(value, window)
        recent, first = running.recent, running.first
        text = f"{name} is {recent:.4g} of late, it was {first:.4g} at first"
        if rule == "gradient_jump":
            bad, text = value > limit * before, f"{name} is {value:.4g}, its running mean {before:.4g}"
        elif rule == "critic_divergence":
            bad, text = recent > limit, f"{name} is {recent:.4g} of late"
        elif rule == "diversity":
            bad = recent < limit * first
        else:
            deviation = self.running["x0_std"].first if "x0_std" in self.running else math.inf
            bad = abs(recent - first) > limit * deviation
        known = running.count > window // (5 if rule in ("x0_drift", "diversity") else 10)
        self._set(step, rule, name, known and bad, text)

    def validation(self, step: int, name: str, measured: dict[str, float]) -> None:
        """Looks at what `measure` found in a validation; the same one for a second time changes nothing."""

        def at_first(key: str) -> float:
            now = measured[key]
            return self.running.setdefault(f"{name}_{key}", Running(1, now, now, now)).first

        now, first = measured["saturation"], at_first("saturation")
        text = f"{now:.1%} of the colour values of {name} are black or full, at first it was {first:.1%}"
        self._set(step, "saturation", name, now - first > self.settings.saturation, text)
        if "diversity" in measured:
            now, first = measured["diversity"], at_first("diversity")
            text = f"the distance between the videos of {name} is {now:.4g}, at first it was {first:.4g}"
            self._set(step, "diversity", name, now < self.settings.diversity * first, text)

    def _set(self, step: int, rule: str, name: str, bad: bool, text: str) -> None:
        """An alarm is told where it begins; it can begin again after a window without it."""
        key = f"{rule}:{name}"
        if step - self.active.get(key, step) > self.settings.window:
            del self.active[key]
        if bad and rule in self.counts:
            if key not in self.active:
                self.counts[rule] += 1
                self.tell(
                    f"alarm at step {step}: {text} (alarms.{rule}: {getattr(self.settings, rule):g}); {ADVICE[rule]}"
                    f"; changes go into a branch: {BRANCH_OFF}"
                )
            self.active[key] = step

    def state(self) -> dict[str, Any]:
        return {
            "running": {name: vars(self.running[name]) for name in sorted(self.running)},
            "counts": self.counts,
            "active": self.active,
        }

    def load(self, state: Any) -> None:
        """Raises KeyError, TypeError or ValueError where it is no state."""
        for name, means in state["running"].items():
            count, *others = (float(means[field.name]) for field in fields(Running))
            if not (0 < count < 2**53 and count.is_integer()):
                raise ValueError(f"{name}: count {count:g}")
            self.running[name] = Running(int(count), *others)
        self.counts |= {rule: int(state["counts"][rule]) for rule in self.counts if rule in state["counts"]}
        self.active = {key: int(step) for key, step in state["active"].items()}


def measure(videos: torch.Tensor) -> dict[str, float]:
    """Of [N, 3, T, H, W] in [-1, 1]: the share of colour values that are black or full, and the mean distance of two videos."""
    measured = {"saturation": float((videos.abs() > 0.98).float().mean())}
    return measured | ({"diversity": float(mean_distance(videos))} if len(videos) > 1 else {})


def _plain(value: Any) -> Any:
    """As JSON, which knows no NaN."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def dump_bad_step(
    folder: Path,
    step: int,
    role: str,
    *,
    generator_state: torch.Tensor,
    prompts: list[str],
    statistics: dict[str, Any],
    gradient_norms: dict[str, Any],
    console: Console,
    draws: Draws | None = None,
    clips: Sequence[str] = (),
    more: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Keeps what a non-finite update was made of, of the last few: step-000123-student.json and .safetensors; where it can not be
    written, that is told.

    Args:
        generator_state: of the trainer's generator before the update drew from it: with it the noise comes out again.
        clips: files that it was trained on. more: tensors by name.
    """
    facts: dict[str, Any] = {"step": step, "role": role, "prompts": prompts, "clips": list(clips)}
    facts["statistics"] = {name: _plain(value) for name, value in statistics.items()}
    facts["gradient_norms"] = {name: _plain(value) for name, value in gradient_norms.items()}
    tensors = {"generator": generator_state, **more}
    if draws is not None:
        facts |= {"exit_steps": draws.exit_steps, "blocks": list(draws.layout.sizes)}
        facts["score_timesteps"] = draws.score_timestep.tolist()
        tensors |= {"score_timestep": draws.score_timestep.cpu(), "uncaptioned": draws.uncaptioned.cpu()}
    try:
        folder.mkdir(exist_ok=True)
        name = f"step-{step:06d}-{role}"
        save_tensors(folder / f"{name}.safetensors", {key: value.contiguous() for key, value in tensors.items()})
        write_text(folder / f"{name}.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        for old in sorted(folder.glob("step-*.json"))[:-MAX_DUMPS]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)
    except OSError as error:
        console.print(f"step {step}: {BAD_STEPS} can not be written ({error.strerror or error})", soft_wrap=True)


def drawn_again(sampler: Any, state: Mapping[str, torch.Tensor], prefix: str, n: int) -> list[Any]:
    """What a sampler drew from a state of the past on, which is in `state` under a prefix."""
    again = copy.deepcopy(sampler)
    again.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    return again.draw(n)


def load_alarms(alarms: Alarms, state: dict[str, Any], folder: Path) -> None:
    """From a checkpoint's state.json; one from before there were alarms has none."""
    try:
        if "alarms" in state:
            alarms.load(state["alarms"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"checkpoint: {folder}: state.json: alarms: {type(error).__name__}: {error}") from None
