"""Numbers that are watched while a run trains, and what is kept of a step that was not finite. Neither changes training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmdtrain.config import Alarms as Settings
from dmdtrain.config import ConfigError
from dmdtrain.files import save_tensors, write_text
from dmdtrain.train.step import Draws, mean_distance

# Which rule watches which number of a step.
WATCHED = {
    "x0_mean": "x0_drift",
    "x0_std": "x0_drift",
    "student_grad_norm": "gradient_jump",
    "fake_score_grad_norm": "gradient_jump",
    "warmup_grad_norm": "gradient_jump",
    "critic_loss": "critic_divergence",
    "fake_real_gap": "critic_divergence",
    "x0_diversity": "diversity",
}
ADVICE = {
    "x0_drift": "the student may be collapsing: look at the next samples, lower optimizer.lr",
    "gradient_jump": "if it goes on, lower the role's lr or grad_clip",
    "critic_divergence": "the fake score does not follow the student: raise dmd.generator_update_interval, or lower optimizer.lr",
    "diversity": "the videos of different prompts and seeds become alike: go back to an earlier checkpoint, lower optimizer.lr",
    "saturation": "colours burn out: lower dmd.real_score_guidance_scale or optimizer.lr",
}
BAD_STEPS, MAX_DUMPS = "bad_steps", 5  # their folder in a run's, and how many are kept


@dataclass
class Running:
    """Exponential means of a number: over the window, of its square's deviation, and over a tenth of the window."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    recent: float = 0.0

    def add(self, value: float, window: int) -> None:
        """The first values count equally, as in a plain mean."""
        self.count += 1
        share, quick = 1 / min(self.count, window), 1 / min(self.count, max(1, window // 10))
        difference = value - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)
        self.recent += quick * (value - self.recent)


class Alarms:
    """Alarms of one stage. `state` is in its checkpoints, so that a resumed run has the same ones."""

    def __init__(self, settings: Settings, tell: Callable[[str], None]):
        self.settings, self.tell = settings, tell
        self.running: dict[str, Running] = {}
        self.counts = {rule: 0 for rule in ADVICE if getattr(settings, rule) > 0}
        self.active: set[str] = set()

    def step(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Looks at a step's numbers; returns how often each alarm has begun so far."""
        for name, value in values.items():
            if name in WATCHED and math.isfinite(value):
                self._look(step, name, value)
        return {f"alarms_{rule}": count for rule, count in self.counts.items()}

    def _look(self, step: int, name: str, value: float) -> None:
        rule, running = WATCHED[name], self.running.setdefault(name, Running())
        limit = getattr(self.settings, rule)
        mean, deviation = running.mean, math.sqrt(running.variance)
        known = running.count >= self.settings.window // 5
        running.add(value, self.settings.window)
        if rule == "x0_drift":
            bad = abs(value - mean) > limit * max(deviation, 1e-6)
            text = f"{name} is {value:.4g}, {abs(value - mean) / max(deviation, 1e-6):.1f} deviations from {mean:.4g}"
        elif rule == "gradient_jump":
            bad, text = value > limit * mean, f"{name} is {value:.4g}, its running mean {mean:.4g}"
        else:
            now = running.recent
            bad = now < limit * mean if rule == "diversity" else now > limit * mean
            text = f"{name} is {now:.4g} of late, its running mean {mean:.4g}"
        self._set(step, rule, name, known and bad, text)

    def validation(self, step: int, name: str, measured: dict[str, float]) -> None:
        """Looks at what `measure` found in a validation; the same one for a second time changes nothing."""
        share = measured["saturation"]
        text = f"{share:.0%} of the colour values of {name} are black or full"
        self._set(step, "saturation", name, share > self.settings.saturation, text)
        if "diversity" in measured:
            distance = measured["diversity"]
            first = self.running.setdefault(f"{name}_diversity", Running(1, distance)).mean
            text = f"the distance between the videos of {name} is {distance:.4g}, at first it was {first:.4g}"
            self._set(step, "diversity", name, distance < self.settings.diversity * first, text)

    def _set(self, step: int, rule: str, name: str, bad: bool, text: str) -> None:
        """An alarm is told where it begins, and can begin again when it is over."""
        key = f"{rule}:{name}"
        if not bad or rule not in self.counts:
            self.active.discard(key)
        elif key not in self.active:
            self.active.add(key)
            self.counts[rule] += 1
            self.tell(f"alarm at step {step}: {text} (alarms.{rule}: {getattr(self.settings, rule):g}); {ADVICE[rule]}")

    def state(self) -> dict[str, Any]:
        running = {name: list(vars(value).values()) for name, value in self.running.items()}
        return {"running": running, "counts": self.counts, "active": sorted(self.active)}

    def load(self, state: Any) -> None:
        """Raises KeyError, TypeError or ValueError where it is no state."""
        for name, (count, *means) in state["running"].items():
            self.running[str(name)] = Running(int(count), *(float(mean) for mean in means))
        self.counts |= {rule: int(state["counts"][rule]) for rule in self.counts if rule in state["counts"]}
        self.active = {str(key) for key in state["active"]}


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
    draws: Draws | None = None,
) -> str | None:
    """Keeps what a non-finite update was made of, of the last few: step-000123-student.json and .safetensors.

    Args:
        generator_state: of the trainer's generator before the update drew from it: with it the noise comes out again.

    Returns:
        why it could not be written, if so.
    """
    facts: dict[str, Any] = {"step": step, "role": role, "prompts": prompts}
    facts["statistics"] = {name: _plain(value) for name, value in statistics.items()}
    facts["gradient_norms"] = {name: _plain(value) for name, value in gradient_norms.items()}
    tensors = {"generator": generator_state}
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
        return error.strerror or str(error)
    return None


def load_alarms(alarms: Alarms, state: dict[str, Any], folder: Path) -> None:
    """From a checkpoint's state.json; one from before there were alarms has none."""
    try:
        if "alarms" in state:
            alarms.load(state["alarms"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"checkpoint: {folder}: state.json: alarms: {type(error).__name__}: {error}") from None
