"""Export of a trained student: LoRA files, schedulers, and whole pipelines."""

from __future__ import annotations

import ast
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dmdtrain.config import ConfigError
from dmdtrain.files import atomic_folder, save_tensors
from dmdtrain.models.wan import WanFolder, load_transformer, part_folder

# Formats of a LoRA file by their prefixes. original: the names of Wan's own code, which ComfyUI, the programs around it and
# Diffusers itself read; diffusers: read by Diffusers alone, the others load nothing of it.
FORMATS = {"original": "diffusion_model.", "diffusers": "transformer."}
FORMAT_ALIASES = {"comfyui": "original"}
TOLERANCE = 0.05  # timesteps, of 1000

# Diffusers' names of Wan's linear layers -> the original ones.
_ORIGINAL = [
    (r"\.attn1\.to_out\.0$", ".self_attn.o"),
    (r"\.attn2\.to_out\.0$", ".cross_attn.o"),
    (r"\.attn1\.to_([qkv])$", r".self_attn.\1"),
    (r"\.attn2\.to_([qkv])$", r".cross_attn.\1"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
]
_ORIGINAL_OUTSIDE_BLOCKS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}


class StudentError(Exception):
    """A student's weights are of another model."""


def original_name(module: str) -> str:
    """`blocks.3.attn1.to_q` -> `blocks.3.self_attn.q`. ConfigError if no original name is known."""
    if module in _ORIGINAL_OUTSIDE_BLOCKS:
        return _ORIGINAL_OUTSIDE_BLOCKS[module]
    for pattern, replacement in _ORIGINAL:
        renamed, count = re.subn(pattern, replacement, module)
        if count and module.startswith("blocks."):
            return renamed
    raise ConfigError(f"--format: original: no name is known there for {module}; valid is diffusers")


def lora_format(name: str) -> str:
    """The format that --format names; ConfigError if it names none."""
    name = FORMAT_ALIASES.get(name, name)
    if name not in FORMATS:
        raise ConfigError(f"--format: {name}: valid are original (or comfyui, the same), diffusers")
    return name


def lora_tensors(weights: dict[str, torch.Tensor], scale: float, file_format: str) -> dict[str, torch.Tensor]:
    """A student's adapter under a file format's names, with alpha / rank folded into B.

    Folded, it has the right scale in every loader, also in those that do not read alpha.

    Args:
        weights: `blocks.0.attn1.to_q.lora_A.weight` -> tensor, as checkpoints hold them. scale: alpha / rank.
        file_format: one of `FORMATS`.
    """
    tensors = {}
    for key, value in weights.items():
        module, part = key.rsplit(".lora_", 1)
        name = original_name(module) if file_format == "original" else module
        value = value.float() * scale if part.startswith("B") else value.float()
        tensors[f"{FORMATS[file_format]}{name}.lora_{part}"] = value.contiguous()
    return tensors


def write_lora(
    file: Path, weights: dict[str, torch.Tensor], scale: float, file_format: str, sampling: dict[str, Any]
) -> None:
    """Writes the LoRA; its metadata holds what is needed to sample it. Refuses to overwrite."""
    file_format = lora_format(file_format)
    if file.exists():
        raise ConfigError(f"--out: {file} exists; choose another name")
    tensors = lora_tensors(weights, scale, file_format)
    metadata = {"format": "pt", "dmdtrain": json.dumps(sampling), "comfyui": comfyui_sampling(sampling)}
    metadata |= {k: str(sampling[k]) for k in ("base_model", "timesteps", "guidance_scale")}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(file, tensors, metadata)


def comfyui_sampling(sampling: dict[str, Any]) -> str:
    """How ComfyUI samples a student, or why it cannot.

    Its sampler lcm predicts x0 and noises it again with fresh noise, as the student was trained; its schedules walk other
    timesteps, so the sigmas are given. It scales the starting noise by the first sigma, which is right at 1 alone.
    """
    sigmas = [round(t / 1000, 7) for t in sampling["timesteps"]]
    if sampling.get("causal"):
        return "no sampler there makes videos block by block, as this causal student does"
    if sigmas[0] != 1:
        return f"no sampler there starts from whole noise at sigma {sigmas[0]}, as this student does"
    return f"sampler lcm, CFG 1, sigmas {', '.join(map(str, [*sigmas, 0.0]))}"


def only_these_steps(number: int) -> str:
    """What a user of the exported scheduler has to know, in Markdown."""
    return (
        f"Keep `num_inference_steps={number}`: with any other number the scheduler walks timesteps that were never trained, "
        "without a warning. Diffusers has to be 0.34 or newer; 0.33 ignores `stochastic_sampling`."
    )


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


# What the exported pipeline is made of, in an order in which each only needs those before it.
PIPELINE_SOURCES = ("flow.py", "rollout.py", "models/causal.py", "models/decode.py", "pipeline.py")
PIPELINE_MODULE, PIPELINE_CLASS = "few_step_pipeline", "FewStepWanPipeline"


def pipeline_source() -> str:
    """The pipeline as one file that needs no dmdtrain: the modules it is made of, with their imports gathered at the top."""
    imports: dict[str, None] = {"from __future__ import annotations": None}
    bodies = []
    for name in PIPELINE_SOURCES:
        text = files("dmdtrain").joinpath(name).read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dmdtrain")):
                    imports[ast.unparse(node)] = None
                for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[number] = ""
        body = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip()
        bodies.append(f"# {'-' * 20} {name}\n\n{body}")
    head = '"""Written by dmdtrain export-pipeline: the sampler of a few-step Wan student, made of dmdtrain\'s own modules."""'
    return "\n\n".join([head, "\n".join(imports), *bodies]) + "\n"


def merge(transformer: Any, weights: dict[str, torch.Tensor], scale: float | None) -> None:
    """Puts a student into a plain transformer: B A * scale added in float32, or (scale None) whole weights copied."""
    own = dict(transformer.named_parameters())
    _check_merge(own, weights, whole=scale is None)
    with torch.no_grad():
        for key, value in weights.items():
            if scale is None:
                own[key].copy_(value)
            elif key.endswith(".lora_A.weight"):
                module = key.removesuffix(".lora_A.weight")
                delta = weights[f"{module}.lora_B.weight"].float() @ value.float() * scale
                own[f"{module}.weight"].copy_(own[f"{module}.weight"].float() + delta)


def _check_merge(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], *, whole: bool) -> None:
    """StudentError unless a student's tensors are those of this transformer."""
    for key, value in weights.items():
        module, _, part = key.rpartition(".lora_")
        target = own.get(key if whole else f"{module}.weight")
        if target is None:
            raise StudentError(f"its student holds {key}, which the base model lacks")
        right = value.shape == target.shape
        if not whole:
            right = value.shape[-1] == target.shape[1] if part == "A.weight" else value.shape[0] == target.shape[0]
        if not right:
            raise StudentError(f"its student's {key} is {list(value.shape)}, the base's is {list(target.shape)}")


def write_pipeline(
    folder: Path, base: WanFolder, precision: str, weights: dict[str, torch.Tensor], scale: float | None, facts: dict
) -> str:
    """A self-contained Diffusers folder of the student. Returns the name of its pipeline's class.

    The stock `WanPipeline` where the student is bidirectional and a stock scheduler walks its timesteps, else
    `FewStepWanPipeline` with its source.

    Args:
        precision: fp32 or bf16, of the merged transformer. scale: alpha / rank, or None for a student trained whole.
        facts: as `Run.sampling` gives them, with height, width and num_frames of a call, and fps.
    """
    scheduler = None if facts["causal"] else stock_scheduler(facts["timesteps"])
    transformer = load_transformer(base, precision)
    merge(transformer, weights, scale)
    with atomic_folder(folder) as partial:
        _fill_pipeline(partial, folder.name, base, transformer, scheduler, facts)
    return "WanPipeline" if scheduler is not None else PIPELINE_CLASS


def _fill_pipeline(
    partial: Path,
    name: str,
    base: WanFolder,
    transformer: Any,
    scheduler: FlowMatchEulerDiscreteScheduler | None,
    facts: dict,
) -> None:
    transformer.save_pretrained(partial / "transformer")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(part_folder(base, part), partial / part)
    stock = scheduler or FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    stock.save_pretrained(partial / "scheduler")
    index = json.loads((base.path / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_class_name": "WanPipeline", "scheduler": ["diffusers", type(stock).__name__]}
    index = {k: v for k, v in index.items() if k.startswith(("_", "expand_timesteps")) or isinstance(v, list)}
    if scheduler is None:
        index.pop("transformer_2", None)
        index["_class_name"] = [PIPELINE_MODULE, PIPELINE_CLASS]
        index |= {key: facts[key] for key in ("timesteps", "num_frame_per_block", "independent_first_frame")}
        index |= {key: facts[key] for key in ("num_training_frames", "local_attention_frames", "sink_frames")}
        index["max_sequence_length"] = facts["max_sequence_length"]
        index |= {key: facts[key] for key in ("height", "width", "num_frames")}
        index["context_noise"] = facts["context_noise"] or 0.0
        (partial / f"{PIPELINE_MODULE}.py").write_text(pipeline_source(), encoding="utf-8")
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (partial / "sampling.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(_usage(name, facts, scheduler is not None), encoding="utf-8")


def _usage(name: str, facts: dict[str, Any], stock: bool) -> str:
    steps = ", ".join(f"{t:g}" for t in facts["timesteps"])
    size = f"height={facts['height']}, width={facts['width']}, num_frames={facts['num_frames']}"
    if stock:
        load, call = f'"{name}"', f"num_inference_steps={len(facts['timesteps'])}, guidance_scale=1.0, {size}"
        call += f", max_sequence_length={facts['max_sequence_length']}"
    else:
        load, call = f'"{name}", trust_remote_code=True', size
    return f"""# {name}

A {len(facts["timesteps"])}-step student of {facts["base_model"]}, distilled with dmdtrain. Timesteps {steps}; no guidance.

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

pipe = DiffusionPipeline.from_pretrained({load}, torch_dtype=torch.bfloat16).to("cuda")
video = pipe("a prompt", {call}).frames[0]
export_to_video(video, "video.mp4", fps={facts["fps"]})
```
""" + (f"\n{only_these_steps(len(facts['timesteps']))}\n" if stock else "")
