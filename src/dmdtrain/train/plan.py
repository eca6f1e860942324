"""Memory and time of a run before a GPU is rented.

What is measured (`accounting`) is what the code does, not a formula that has to follow it. Transformer blocks are all alike,
so two short models give the whole one by a straight line; a peak that would move to another moment of a phase only in a longer
model is underestimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import gt
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dmdtrain.config import Config, ConfigError, changed, nested_get, parse_resolution
from dmdtrain.models.quantize import KINDS
from dmdtrain.models.wan import WanFolder, find_folder
from dmdtrain.train.accounting import measure
from dmdtrain.train.flops import stage_flops, step_flops
from dmdtrain.train.memory import free_memory
from dmdtrain.train.setup import Run, resolve

GIB = 2**30
FITS = "it fits with:"
TEXT_ENCODING = "text encoding"
# Transformer blocks of the models that are run: the first block, whose input needs no gradient, is unlike others, and with two
# it could not be told whether a pass goes up or down.
SHORT = (3, 4)
UTILISATION = 0.4  # of a GPU's dense bf16 rate, for the time estimate
HOST_GIB = 5  # Python, libraries, a layer that is read, a checkpoint that is written
ENCODED_TOGETHER = 16  # prompts, by `TextCache.prepare`
CONTEXT_GIB = 0.8  # CUDA context, cuBLAS workspaces, fragments

# Name -> (GiB that CUDA says there are, dense bf16 TFLOP/s by the maker's data sheet).
GPUS = {
    "3090": (23.6, 71),
    "4090": (23.5, 165),
    "5090": (31.3, 210),
    "a6000": (47.4, 155),
    "l40s": (44.4, 362),
    "a100-40": (39.4, 312),
    "a100-80": (79.1, 312),
    "h100": (79.1, 989),
    "h200": (139.7, 989),
    "b200": (178.3, 2250),
}


@dataclass
class Plan:
    """Bytes by item and the peak of each phase on the device, FLOPs by phase of one step and by stage of the run."""

    items: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)  # on top of the items
    flops: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)  # FLOPs of all that the run does besides its steps
    host: int = 0  # bytes that options put into host memory
    kv_cache: int = 0  # bytes of it, part of the phases, or of the host's where it lies there
    text_encoder: int = 0  # bytes, before everything else
    checkpoint: int = 0  # bytes on disk of one
    warmup_checkpoint: int = 0  # of one of the warm-up's

    @property
    def resident(self) -> int:
        return sum(self.items.values())

    @property
    def training_peak(self) -> int:
        return self.resident + max(self.phases.values()) + int(CONTEXT_GIB * GIB)

    def host_peak(self, config: Config) -> int:
        """Models are read into host memory, one after the other, but for layers that the device quantizes."""
        loaded = [self.items.get("base", 0), self.items.get("teacher", 0)]
        if config.model.quantize_via == "device" and config.model.precision in KINDS:
            loaded = []
        return max(self.host, self.text_encoder, *loaded) + HOST_GIB * GIB

    @property
    def peak(self) -> int:
        return max(self.training_peak, self.text_encoder + int(CONTEXT_GIB * GIB))

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        if self.peak > self.training_peak:
            return TEXT_ENCODING
        return max(self.phases, key=lambda name: self.phases[name])


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
_WAN_5B = _WAN_1_3B | {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_CODEC = {"z_dim": 16, "scale_factor_spatial": 8}
_CODEC_5B = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,  # of this and the next, a plan needs the length alone
    "latents_std": [1.0] * 48,
}
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
PUBLISHED = {
    name: WanFolder(Path(name), name, True, transformer, vae, UMT5_XXL, {"flow_shift": shift})
    for name, transformer, vae, shift in (
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _WAN_1_3B, _CODEC, 3.0),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", _WAN_14B, _CODEC, 3.0),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", _WAN_5B, _CODEC_5B, 5.0),
    )
}


def find_shapes(name: str, key: str) -> WanFolder:
    """As `find_folder`, but published models are known by name."""
    if name in PUBLISHED and not Path(name).is_dir():
        return PUBLISHED[name]
    return find_folder(name, key)


def make_plan(run: Run) -> Plan:
    """The plan of a resolved run; seconds, whatever the model's size."""
    config = run.config
    layers = run.base.transformer["num_layers"]
    low, high = (measure(run, count) for count in SHORT)

    def whole(low: int, high: int, layers: int = layers) -> int:
        return round(low + (high - low) / (SHORT[1] - SHORT[0]) * (layers - SHORT[0]))

    plan = Plan(
        items={name: whole(size, high.items[name]) for name, size in low.items.items()},
        phases={name: whole(size, high.phases[name]) for name, size in low.phases.items()},
        flops=step_flops(config, run.base.transformer, run.teacher.transformer, run.frame_tokens),
        stages=stage_flops(run),
        host=whole(low.host, high.host),
        kv_cache=kv_cache_bytes(run),
        text_encoder=text_encoder_bytes(run),
        checkpoint=whole(low.checkpoint, high.checkpoint),
        warmup_checkpoint=whole(low.warmup_checkpoint, high.warmup_checkpoint),
    )
    if run.own_teacher:  # its number of blocks is its own
        own = run.teacher.transformer["num_layers"]
        plan.items["teacher"] = whole(low.items["teacher"], high.items["teacher"], own)
        of_both = (low.teacher_host, high.teacher_host)
        plan.host += whole(*of_both, own) - whole(*of_both)
    plan.items = {name: size for name, size in plan.items.items() if size}
    return plan


def kv_cache_bytes(run: Run) -> int:
    """Keys and values of a whole training rollout, and of its prompt."""
    config, shape = run.config, run.base.transformer
    if not config.rollout.causal:
        return 0
    bytes_per_number = 2 if "bf16" in (config.train.mixed_precision, config.model.precision) else 4
    tokens = (config.rollout.num_training_frames - config.rollout.num_frame_per_block) * run.frame_tokens
    dim = shape["attention_head_dim"]
    stored = bytes_per_number * dim if config.rollout.kv_cache != "int8" else dim + 4
    per_token = 2 * shape["num_layers"] * shape["num_attention_heads"]
    prompt = config.data.max_sequence_length * bytes_per_number * dim
    return config.train.batch_size * per_token * (tokens * stored + prompt)


def text_encoder_bytes(run: Run) -> int:
    """Weights of the text encoder, which is gone before the transformer is loaded, and its attention's scores: in its own
    precision and, for the softmax, in float32."""
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    with init_empty_weights():
        model = UMT5EncoderModel(UMT5Config.from_dict(run.base.text_encoder))
    model.tie_weights()  # within, it ties nothing
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    rest = sum(p.numel() for p in model.parameters()) - linear
    precision = run.config.model.text_encoder_precision
    each = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int8-llm": 1.0, "nf4": 0.53}[precision]
    scores = ENCODED_TOGETHER * run.base.text_encoder["num_heads"] * run.config.data.max_sequence_length**2
    return round(linear * each + rest * (4 if precision == "fp32" else 2) + 6 * scores)


def report(run: Run, plan: Plan, vram: float | None, gpu: str | None) -> list[str]:
    """The plan for the user to read."""
    config = run.config
    lines = [f"{name:<24}{size / GIB:8.2f} GiB" for name, size in plan.items.items()]
    lines += [f"during {name:<17}{size / GIB:8.2f} GiB" for name, size in plan.phases.items()]
    lines.append(f"{'CUDA and fragments':<24}{CONTEXT_GIB:8.2f} GiB")
    if plan.kv_cache:
        where = "in host memory" if config.rollout.kv_cache == "host" else "in rollout, scores and replay"
        lines.append(f"{'of which KV cache':<24}{plan.kv_cache / GIB:8.2f} GiB, {where}")
    gradients = max(plan.items["student weights"], plan.items["fake_score weights"])
    lines.append(f"{'of which gradients':<24}{gradients / GIB:8.2f} GiB, in replay and critic")
    lines.append(f"{TEXT_ENCODING:<24}{plan.text_encoder / GIB:8.2f} GiB, before all that")
    lines.append(f"{'peak':<24}{plan.peak / GIB:8.2f} GiB, in {plan.worst}")
    needed = plan.host_peak(config)
    options = f", {plan.host / GIB:.1f} of it for what lies there instead of on the GPU" if plan.host else ""
    lines.append(f"{'host memory':<24}{needed / GIB:8.2f} GiB{options}")
    keep = config.checkpoint.keep
    disk = plan.checkpoint * (keep + 1) + plan.warmup_checkpoint * keep
    of_both = f", {keep} of the warm-up" if plan.warmup_checkpoint else ""
    lines.append(f"{'disk':<24}{disk / GIB:8.2f} GiB: {keep} checkpoints, and one more while it is written{of_both}")
    total = sum(plan.flops.values())
    shares = ", ".join(f"{name} {flops / 1e12:.1f}" for name, flops in plan.flops.items())
    lines.append(f"{'a step':<24}{total / 1e12:8.1f} TFLOP ({shares})")
    if gpu is not None:
        rate = GPUS[gpu][1] * 1e12 * UTILISATION
        whole = {name: flops * config.train.max_steps for name, flops in plan.flops.items()} | plan.stages
        hours = {name: flops / rate / 3600 for name, flops in whole.items()}
        lines.append(
            f"{'time on ' + gpu:<24}{total / rate:8.1f} s a step, {sum(hours.values()):.1f} h for the run of "
            f"{config.train.max_steps} steps (at {UTILISATION:.0%} of {GPUS[gpu][1]} TFLOP/s)"
        )
        lines.append(f"{'':<24}{'':8} " + ", ".join(f"{name} {time:.1f} h" for name, time in hours.items()))
    if vram is not None:
        room = vram - plan.peak / GIB
        verdict = f"yes, {room:.1f} GiB to spare" if room >= 0 else f"no, {-room:.1f} GiB too much"
        lines.append(f"{'fits in ' + format(vram, 'g') + ' GiB':<24}{verdict}")
    return lines


def memory_lines(run: Run, free: int) -> Iterator[str]:
    """What `fit` says of a device on which so many bytes are free: whether the run fits, and what would make it."""
    made = make_plan(run)
    yield f"memory          {made.peak / GIB:.1f} GiB planned, {free / GIB:.1f} free on the device"
    if made.peak > free:
        yield "warning: it will probably not fit"
        yield from suggestions(run, made, free)
    needed, there = made.host_peak(run.config), free_memory()
    if needed > there > 0:
        yield f"warning: {needed / GIB:.1f} GiB of host memory planned, {there / GIB:.1f} free"


def throughput(flops: float, seconds: float, device: torch.device) -> dict[str, float]:
    """What a line of the metrics says of so many FLOPs: the rate and, on a GPU that is known, its share of the GPU's."""
    peak = known_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    found = {"model_tflops_per_second": flops / seconds / 1e12}
    return found if peak is None else found | {"model_flop_utilisation": flops / seconds / peak}


def known_rate(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name that CUDA gives it."""
    plain = device_name.lower().replace(" ", "")
    rates = [rate * 1e12 for name, (_, rate) in GPUS.items() if name.split("-")[0] in plain]
    return rates[0] if rates else None


def changes(config: Config) -> list[dict[str, Any]]:
    """What makes a run smaller, the cheapest in quality and time first; each alone can be made."""
    steps: list[dict[str, Any]] = []
    model, train = config.model, config.train
    if config.validation.every and config.validation.tiled_decoding is not True:
        steps.append({"validation.tiled_decoding": True})
    sizes = (config.validation.resolution, config.data.resolution)
    width_and_height = (parse_resolution(size, config.data.aspect_ratio, 1, "resolution") for size in sizes)
    if config.validation.every and gt(*map(math.prod, width_and_height)):
        steps.append({"validation.resolution": config.data.resolution})
    if not train.gradient_checkpointing:
        steps.append({"train.gradient_checkpointing": True})
    if not train.checkpoint_replay:
        steps.append({"train.checkpoint_replay": True})
    if train.batch_size > 1:
        steps.append({"train.batch_size": 1, "train.gradient_accumulation": config.samples_per_update})
    # The same numbers.
    if train.checkpoints_on == "device":
        steps.append({"train.checkpoints_on": "host"})
    if config.rollout.causal and config.rollout.kv_cache != "host":
        steps.append({"rollout.kv_cache": "host"})
    if train.batched_guidance:
        steps.append({"train.batched_guidance": False})
    if not model.offload_blocks:
        steps.append({"model.offload_blocks": True})
    if config.ema.enabled and config.ema.keep_on == "device":
        steps.append({"ema.keep_on": "host"})
    # Other numbers.
    if config.optimizer.name in ("adamw", "adamw_bf16"):
        steps.append({"optimizer.name": "adamw8bit"})
    steps += [{key: "int8"} for key, precision in _precisions(config) if precision in ("fp32", "bf16")]
    if config.optimizer.name != "paged_adamw8bit":
        steps.append({"optimizer.name": "paged_adamw8bit"})
    taught = config.warmup.kind != "none" or config.dmd.real_data_loss_weight > 0
    if config.rollout.causal and taught and config.warmup.context_gradient:
        steps.append({"warmup.context_gradient": False})
    steps += [{f"{name}.kind": "lora"} for name in ("student", "fake_score") if getattr(config, name).kind == "full"]
    for key, precision in _precisions(config):
        if precision != "nf4":
            steps.append({key: "nf4"} | ({"model.int8_matmul": False} if key == "model.precision" else {}))
    smaller = {"fp32": "int8", "bf16": "int8", "int8": "nf4", "int8-llm": "nf4"}
    if model.text_encoder_precision in smaller:
        steps.append({"model.text_encoder_precision": smaller[model.text_encoder_precision]})
    return [step for step in steps if _possible(config, step)]


def _precisions(config: Config) -> list[tuple[str, str]]:
    """Of the base and of a teacher of its own, by their keys."""
    model = config.model
    own = [("model.teacher_precision", model.precision_of_teacher)] if model.teacher else []
    return [*own, ("model.precision", model.precision)]


def _possible(config: Config, change: dict[str, Any]) -> bool:
    try:
        changed(config, change)
    except ConfigError:
        return False
    return True


# What a change makes smaller, where it is not all that is trained. What the replay of a rollout's last block needs is there
# from the rollout on.
_REPLAYED = ("rollout", "scores", "replay")
RELIEVES = {
    "train.batch_size": (*_REPLAYED, "critic", "real_data", "warm-up"),
    "train.gradient_checkpointing": (*_REPLAYED, "critic", "real_data", "warm-up"),
    "train.checkpoints_on": (*_REPLAYED, "critic", "real_data", "warm-up"),
    "train.checkpoint_replay": _REPLAYED,
    "train.batched_guidance": ("scores",),
    "rollout.kv_cache": (*_REPLAYED, "real_data", "sampling", "warm-up"),
    "warmup.context_gradient": ("real_data", "warm-up"),
    "validation.tiled_decoding": ("decoding",),
    "validation.resolution": ("sampling", "decoding"),
    "model.text_encoder_precision": (TEXT_ENCODING,),
}


def relieves(change: dict[str, Any], phase: str) -> bool:
    return phase in RELIEVES.get(next(iter(change)), () if phase == TEXT_ENCODING else (phase,))


def plan(config: Config, vram: float | None, gpu: str | None, console: Console) -> bool:
    """`dmdtrain plan`: prints the plan and, where it does not fit, what would make it. Returns whether it fits."""
    gpu = None if gpu is None else gpu.lower()
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu: {gpu}: valid are {', '.join(GPUS)}, or give --vram")
    if vram is not None and not math.isfinite(vram):
        raise ConfigError(f"--vram: {vram}: it must be a number of GiB")
    vram = vram or (GPUS[gpu][0] if gpu else None)
    run = resolve(config, for_training=False, find=find_shapes)
    made = make_plan(run)
    for line in report(run, made, vram, gpu):
        console.print(line, soft_wrap=True, highlight=False)
    if vram is None or made.peak <= vram * GIB:
        return True
    fits = False
    for line in suggestions(run, made, round(vram * GIB)):
        console.print(line, soft_wrap=True, highlight=False)
        fits = line.startswith(FITS)
    return fits


def suggestions(run: Run, made: Plan, vram: int) -> Iterator[str]:
    """From the plan of a run on, the peak with one change after the other, each of what is at the peak, until it is at most
    `vram` bytes; then all of them, as --set."""
    smaller, needed = run, dict[str, Any]()
    tried: list[dict[str, Any]] = []
    while made.peak > vram:
        left = (c for c in changes(smaller.config) if c not in tried and relieves(c, made.worst))
        change = next(left, None)
        if change is None:
            validated = "validation." if made.worst in ("sampling", "decoding") else ""
            what = (
                "another text encoder"
                if made.worst == TEXT_ENCODING
                else f"fewer frames or a smaller {validated}resolution"
            )
            yield f"none of these makes it fit, in {made.worst}: {what} would"
            return
        tried.append(change)
        there = _with(smaller, change)
        plan = make_plan(there)
        yield f"with {_as_set(smaller.config, change):<40} {plan.peak / GIB:8.2f} GiB"
        if plan.peak < made.peak:
            smaller, made, needed = there, plan, needed | change
    yield f"{FITS} {_as_set(run.config, needed)}"


def _with(run: Run, change: dict[str, Any]) -> Run:
    shape = run.validation_latent_shape
    if "validation.resolution" in change:
        shape = (*shape[:2], *run.latent_shape[2:])
    return replace(run, config=changed(run.config, change), validation_latent_shape=shape)


def _as_set(config: Config, change: dict[str, Any]) -> str:
    return " ".join(f"--set {key}={_yaml(value)}" for key, value in change.items() if nested_get(config, key) != value)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
