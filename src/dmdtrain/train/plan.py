"""Memory and time of a run before a GPU is rented.

The run's own code goes through one update of each role on fake tensors, which have a shape and a type but no memory, while
every storage that is alive is counted: what is measured is what the code does, not a formula that has to follow it.
Transformer blocks are all alike, so two short models give the whole one by a straight line; a peak that would move to another
moment of a phase only in a longer model is underestimated.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmdtrain.config import Config, ConfigError, build
from dmdtrain.models.quantize import empty_quantized
from dmdtrain.models.roles import Roles, cast_weights
from dmdtrain.models.wan import WanFolder, find_folder
from dmdtrain.train.flops import step_flops
from dmdtrain.train.optim import trained_dtype
from dmdtrain.train.setup import Run, adapter_specs, resolve
from dmdtrain.train.step import Distiller, Draws, num_draws

GIB = 2**30
SHORT = (
    2,
    3,
)  # transformer blocks of the models that are run: the first block, whose input needs no gradient, is unlike others
UTILISATION = 0.4  # of a GPU's dense bf16 rate, for the time estimate
CONTEXT_GIB = 0.8  # CUDA context, cuBLAS workspaces, fragments

# Name -> (GiB of memory, dense bf16 TFLOP/s), by the makers' data sheets.
GPUS = {
    "3090": (24, 71),
    "4090": (24, 165),
    "5090": (32, 210),
    "a6000": (48, 155),
    "l40s": (48, 362),
    "a100-40": (40, 312),
    "a100-80": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
    "b200": (180, 2250),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive and were made inside: now and at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


@dataclass
class Plan:
    """Bytes by item and the peak of each phase on the device, FLOPs by phase of one step."""

    items: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)  # on top of the items
    flops: dict[str, float] = field(default_factory=dict)
    checkpoint: int = 0  # bytes on disk of one

    @property
    def resident(self) -> int:
        return sum(self.items.values())

    @property
    def peak(self) -> int:
        return self.resident + max(self.phases.values()) + int(CONTEXT_GIB * GIB)


# Published models, so that planning needs no download.
_WAN_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
_WAN_14B = _WAN_1_3B | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
PUBLISHED = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _WAN_1_3B, "Wan-AI/Wan2.1-T2V-14B-Diffusers": _WAN_14B}


def find_shapes(name: str, key: str) -> WanFolder:
    """As `find_folder`, but published models are known by name."""
    if name in PUBLISHED and not Path(name).is_dir():
        return WanFolder(
            Path(name), name, True, PUBLISHED[name], {"z_dim": 16, "scale_factor_spatial": 8}, {"flow_shift": 3.0}
        )
    return find_folder(name, key)


def _empty_roles(run: Run, num_layers: int) -> tuple[Roles, nn.Module | None]:
    """The run's roles on the meta device, with transformers of `num_layers` blocks; and a teacher of its own."""
    config = run.config
    specs = adapter_specs(config)

    def transformer(shape: dict[str, Any], precision: str) -> Any:
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(shape | {"num_layers": num_layers})
        cast_weights(model, torch.float32 if precision == "fp32" else torch.bfloat16)
        if precision not in ("fp32", "bf16"):
            for name, layer in list(model.blocks.named_modules()):
                if type(layer) is nn.Linear:
                    parent, _, child = name.rpartition(".")
                    setattr(model.blocks.get_submodule(parent), child, empty_quantized(layer, precision))
        return model

    model = config.model
    base = transformer(run.base.transformer, model.precision)
    teacher = None
    teacher_precision = model.teacher_precision or model.precision
    if run.teacher.name != run.base.name or teacher_precision != model.precision:
        teacher = transformer(run.teacher.transformer, teacher_precision)
    weights = trained_dtype(config.optimizer.name)
    with torch.device("meta"):
        roles = Roles(
            base,
            teacher=teacher,
            trained=specs,
            full_dtype=weights,
            adapter_dtype=weights,
            causal=config.rollout.causal,
            gradient_checkpointing=config.train.gradient_checkpointing,
        )
    return roles, teacher


def _materialise(module: nn.Module) -> None:
    """Meta parameters and buffers as (fake) CPU tensors, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _measure(run: Run, num_layers: int) -> tuple[dict[str, int], dict[str, int]]:
    """(items, phases) of a model of `num_layers` blocks."""
    config = run.config
    roles, teacher = _empty_roles(run, num_layers)
    live = LiveBytes()
    items: dict[str, int] = {}
    n = config.train.batch_size
    channels, frames, height, width = run.latent_shape
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        modules = {id(role.module): role.module for role in roles.roles.values()}
        for module in modules.values():
            _materialise(module)
        trained = {name: roles.parameters(name) for name in ("student", "fake_score")}
        sizes = {name: sum(p.numel() * p.element_size() for p in found) for name, found in trained.items()}
        frozen_teacher = 0 if teacher is None else sum(p.numel() * p.element_size() for p in teacher.parameters())
        items["teacher"] = frozen_teacher
        items["base"] = live.now - sum(sizes.values()) - frozen_teacher
        for name, size in sizes.items():
            items[f"{name} weights"] = size
            items[f"{name} optimizer"] = optimizer_bytes(config.optimizer.name, trained[name])
        if config.ema.enabled:
            items["average"] = sum(4 * p.numel() for p in trained["student"])
        distiller = Distiller(roles, config, run.timesteps, run.latent_shape, torch.empty(1, *_context(run)))
        layout = distiller.layouts[-1]
        draws = Draws(
            layout,
            torch.empty(num_draws(config.rollout, run.timesteps), n, channels, frames, height, width),
            torch.empty(n, channels, config.rollout.scored_frames, height, width),
            torch.full((n,), 500.0),
            torch.zeros(n, dtype=torch.bool),
            [0] * len(layout.sizes),  # every exit costs the same memory, and this one the least time
        )
        context = torch.empty(n, *_context(run))
        start = live.now
        phases = {}
        for phase in ("rollout", "scores", "replay", "critic"):
            phases[phase] = 0
        distiller.phases = _PeakPhases(live, phases, start)  # type: ignore[assignment]
        distiller.student_backward(context, draws)
        for parameter in trained["student"]:
            parameter.grad = None
        distiller.critic_backward(context, draws)
    return items, phases


class _PeakPhases:
    """In place of the timer: the peak of every phase above what was there at the start."""

    def __init__(self, live: LiveBytes, phases: dict[str, int], start: int):
        self.live, self.phases, self.start = live, phases, start

    @contextmanager
    def __call__(self, name: str) -> Any:
        self.live.peak = self.live.now
        yield
        self.phases[name] = max(self.phases[name], self.live.peak - self.start)


def _context(run: Run) -> tuple[int, int]:
    return run.config.data.max_sequence_length, run.base.transformer["text_dim"]


def optimizer_bytes(name: str, parameters: list[nn.Parameter]) -> int:
    """State of an optimizer."""
    per_weight = {"adamw": 8, "adamw_bf16": 6, "adamw8bit": 2}[name]
    small = 8 if name == "adamw8bit" else per_weight  # bitsandbytes keeps moments of small tensors in float32
    return sum(p.numel() * (per_weight if p.numel() >= 4096 else small) for p in parameters)


def make_plan(run: Run) -> Plan:
    """The plan of a resolved run; seconds, whatever the model's size."""
    config = run.config
    layers = run.base.transformer["num_layers"]
    (low_items, low_phases), (high_items, high_phases) = (_measure(run, count) for count in SHORT)

    def whole(low: int, high: int) -> int:
        return round(low + (high - low) / (SHORT[1] - SHORT[0]) * (layers - SHORT[0]))

    plan = Plan(
        items={name: whole(low_items[name], high_items[name]) for name in low_items},
        phases={name: whole(low_phases[name], high_phases[name]) for name in low_phases},
        flops=step_flops(config, run.base.transformer, run.teacher.transformer, run.frame_tokens),
    )
    if run.teacher.name != run.base.name:  # its number of blocks is its own
        own = run.teacher.transformer["num_layers"]
        slope = (high_items["teacher"] - low_items["teacher"]) / (SHORT[1] - SHORT[0])
        plan.items["teacher"] = round(low_items["teacher"] + slope * (own - SHORT[0]))
    kept = ("student weights", "fake_score weights", "student optimizer", "fake_score optimizer", "average")
    plan.checkpoint = sum(plan.items.get(name, 0) for name in kept)
    plan.items = {name: size for name, size in plan.items.items() if size}
    return plan


def report(run: Run, plan: Plan, vram: float | None, gpu: str | None) -> list[str]:
    """The plan for the user to read."""
    config = run.config
    lines = [f"{name:<24}{size / GIB:8.2f} GiB" for name, size in plan.items.items()]
    lines += [f"during {name:<17}{size / GIB:8.2f} GiB" for name, size in plan.phases.items()]
    lines.append(f"{'CUDA and fragments':<24}{CONTEXT_GIB:8.2f} GiB")
    worst = max(plan.phases, key=lambda name: plan.phases[name])
    lines.append(f"{'peak':<24}{plan.peak / GIB:8.2f} GiB, in the {worst}")
    disk = plan.checkpoint * (config.checkpoint.keep + 1) / GIB
    lines.append(f"{'disk':<24}{disk:8.2f} GiB: {config.checkpoint.keep} checkpoints, and one more while it is written")
    total = sum(plan.flops.values())
    shares = ", ".join(f"{name} {flops / 1e12:.1f}" for name, flops in plan.flops.items())
    lines.append(f"{'a step':<24}{total / 1e12:8.1f} TFLOP ({shares})")
    if gpu is not None:
        rate = GPUS[gpu][1] * 1e12 * UTILISATION
        hours = total * config.train.max_steps / rate / 3600
        lines.append(
            f"{'time on ' + gpu:<24}{total / rate:8.1f} s a step, {hours:.1f} h for {config.train.max_steps} steps "
            f"(at {UTILISATION:.0%} of {GPUS[gpu][1]} TFLOP/s)"
        )
    if vram is not None:
        room = vram - plan.peak / GIB
        verdict = f"yes, {room:.1f} GiB to spare" if room >= 0 else f"no, {-room:.1f} GiB too much"
        lines.append(f"{'fits in ' + format(vram, 'g') + ' GiB':<24}{verdict}")
    return lines


def memory_line(run: Run, total: int) -> str:
    """What `fit` says of a device with `total` bytes."""
    peak = make_plan(run).peak
    verdict = "" if peak <= total else "; it will probably not fit: dmdtrain plan says what would"
    return f"memory          {peak / GIB:.1f} GiB planned of the device's {total / GIB:.1f}{verdict}"


def known_rate(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name that CUDA gives it."""
    plain = device_name.lower().replace(" ", "")
    rates = [rate * 1e12 for name, (_, rate) in GPUS.items() if name.split("-")[0] in plain]
    return rates[0] if rates else None


def changes(config: Config) -> list[dict[str, Any]]:
    """What makes a run smaller, the cheapest in quality and time first; each one on top of those before it."""
    steps: list[dict[str, Any]] = []
    if not config.train.gradient_checkpointing:
        steps.append({"train.gradient_checkpointing": True})
    if config.train.batch_size > 1:
        accumulation = config.samples_per_update
        steps.append({"train.batch_size": 1, "train.gradient_accumulation": accumulation})
    if config.optimizer.name == "adamw":
        steps.append({"optimizer.name": "adamw8bit"})
    for name in ("student", "fake_score"):
        if getattr(config, name).kind == "full":
            steps.append({f"{name}.kind": "lora"})
    if config.model.precision in ("fp32", "bf16"):
        steps.append({"model.precision": "int8"})
    if config.model.precision != "nf4":
        steps.append({"model.precision": "nf4"})
    if config.ema.enabled:
        steps.append({"ema.enabled": False, "ema.validate_with": "raw"})
    return steps


def plan(config: Config, vram: float | None, gpu: str | None, console: Console) -> bool:
    """`dmdtrain plan`: prints the plan and, where it does not fit, what would make it. Returns whether it fits."""
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu: {gpu}: valid are {', '.join(GPUS)}, or give --vram")
    vram = vram or (GPUS[gpu][0] if gpu else None)
    run = resolve(config, for_training=False, find=find_shapes)
    made = make_plan(run)
    for line in report(run, made, vram, gpu):
        console.print(line, soft_wrap=True, highlight=False)
    if vram is None or made.peak <= vram * GIB:
        return True
    applied: list[str] = []
    for change in changes(config):
        config = build(_set(config.model_dump(), change), "plan")
        applied += [
            f"--set {key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()
        ]
        peak = make_plan(replace(run, config=config)).peak
        console.print(f"with {applied[-1]:<40} {peak / GIB:8.2f} GiB", soft_wrap=True, highlight=False)
        if peak <= vram * GIB:
            console.print(f"it fits with: {' '.join(applied)}", soft_wrap=True, highlight=False)
            return True
    console.print(
        "no change of precision, optimizer or batch makes it fit: fewer frames or a smaller resolution would",
        soft_wrap=True,
    )
    return False


def _set(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    for key, value in change.items():
        group, name = key.split(".")
        values[group][name] = value
    return values
