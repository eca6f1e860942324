"""Export of a trained student: LoRA files for Diffusers and ComfyUI, and the scheduler that samples it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from dmdtrain.config import ConfigError

FORMATS = ("diffusers", "comfyui")
TOLERANCE = 0.05  # timesteps, of 1000

# Diffusers' names of Wan's layers -> the original ones, which ComfyUI uses.
_COMFYUI = [
    (r"\.attn1\.to_out\.0$", ".self_attn.o"),
    (r"\.attn2\.to_out\.0$", ".cross_attn.o"),
    (r"\.attn1\.to_([qkv])$", r".self_attn.\1"),
    (r"\.attn2\.to_([qkv])$", r".cross_attn.\1"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
]


def comfyui_name(module: str) -> str:
    """`blocks.3.attn1.to_q` -> `blocks.3.self_attn.q`."""
    for pattern, replacement in _COMFYUI:
        renamed, count = re.subn(pattern, replacement, module)
        if count and module.startswith("blocks."):
            return renamed
    raise ConfigError(f"--format: comfyui: no name is known there for {module}; valid is diffusers")


def lora_tensors(weights: dict[str, torch.Tensor], scale: float, file_format: str) -> dict[str, torch.Tensor]:
    """A student's adapter under a file format's names, with alpha / rank folded into B.

    Folded, it has the right scale in every loader, also in those that do not read alpha.

    Args:
        weights: `blocks.0.attn1.to_q.lora_A.weight` -> tensor, as checkpoints hold them. scale: alpha / rank.
    """
    prefix = {"diffusers": "transformer.", "comfyui": "diffusion_model."}[file_format]
    tensors = {}
    for key, value in weights.items():
        module, part = key.rsplit(".lora_", 1)
        name = comfyui_name(module) if file_format == "comfyui" else module
        value = value.float() * scale if part.startswith("B") else value.float()
        tensors[f"{prefix}{name}.lora_{part}"] = value.contiguous()
    return tensors


def write_lora(
    file: Path, weights: dict[str, torch.Tensor], scale: float, file_format: str, sampling: dict[str, Any]
) -> None:
    """Writes the LoRA; its metadata holds what is needed to sample it. Refuses to overwrite."""
    if file_format not in FORMATS:
        raise ConfigError(f"--format: {file_format}: valid are {', '.join(FORMATS)}")
    if file.exists():
        raise ConfigError(f"--out: {file} exists; choose another name")
    tensors = lora_tensors(weights, scale, file_format)
    metadata = {"format": "pt", "dmdtrain": json.dumps(sampling)}
    metadata |= {k: str(sampling[k]) for k in ("base_model", "timesteps", "guidance_scale")}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    partial.rename(file)


def stock_scheduler(timesteps: list[float]) -> FlowMatchEulerDiscreteScheduler | None:
    """A stock scheduler that walks exactly `timesteps` when asked for len(timesteps) steps, re-noising with fresh noise.

    `WanPipeline` takes no timesteps, so the list has to come out of the scheduler's configuration alone. Of a list that
    starts at 1000, `shift_terminal` sets the last entry and `shift`, found by bisection, the second; longer lists come
    out right only where they follow such a curve. None where no configuration gives the list to within 0.05 timesteps.
    """
    n = len(timesteps)
    terminal = timesteps[-1] / 1000 if n > 1 else None

    def build(shift: float) -> FlowMatchEulerDiscreteScheduler:
        scheduler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=shift, shift_terminal=terminal, stochastic_sampling=True
        )
        scheduler.set_timesteps(n)
        return scheduler

    low, high = 1e-3, 1e3
    if n > 2:
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if float(build(middle).timesteps[1]) > timesteps[1] else (middle, high)
    scheduler = build(high if n > 2 else 1.0)
    error = (scheduler.timesteps.double() - torch.tensor(timesteps, dtype=torch.float64)).abs().max()
    return scheduler if error < TOLERANCE else None
