"""Checkpoints: written beside their name, synced, then renamed; a manifest holds a checksum of every file.

A checkpoint is a folder of .safetensors and .json files; nothing in it is unpickled.

    student.safetensors  fake_score.safetensors  ema.safetensors   trained weights alone
    optimizer_student.safetensors/.json  optimizer_fake_score.safetensors/.json
    random.safetensors   generators and the position in the prompts
    state.json           stage, step, student updates, counters
    config.yaml          the resolved configuration
    sampling.json        timesteps, sigmas, guidance convention, base model
    manifest.json        format, step, SHA-256 of every file
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dmdtrain.config import ConfigError
from dmdtrain.train.optim import put_back_pages

FORMAT = 1
MANIFEST = "manifest.json"
CHECKPOINTS, WARMUP = "checkpoints", "warmup"  # their folders in a run's


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first. One whose replacement was cut off between two renames is put back."""
    for old in root.glob(".step-*.old"):
        final = root / old.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            old.rename(final)
    found = [f for f in root.glob("step-*") if re.fullmatch(r"step-\d{6,}", f.name) and (f / MANIFEST).exists()]
    return sorted(found, key=lambda f: int(f.name.split("-")[1]))


def set_aside_later(output: Path, checkpoint: Path | None) -> list[Path]:
    """Renames a run's checkpoints that came after the one that is resumed, so that none is taken for the newest later on."""
    stages = [list_checkpoints(output / WARMUP), list_checkpoints(output / CHECKPOINTS)]
    ordered = [folder for stage in stages for folder in stage]
    resolved = [folder.resolve() for folder in ordered]
    if checkpoint is None or checkpoint.resolve() not in resolved:
        return []
    moved = []
    for later in ordered[resolved.index(checkpoint.resolve()) + 1 :]:
        names = (later.with_name(f"replaced-{count}-{later.name}") for count in itertools.count(1))
        moved.append(later.rename(next(name for name in names if not name.exists())))
    return moved


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_checkpoint(
    root: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, str], keep: int
) -> Path:
    """Writes `step`'s checkpoint and then removes the oldest others until `keep` are left.

    Args:
        tensors: file stem -> tensors. texts: file name -> content.
    """
    final = step_folder(root, step)
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for stem, content in tensors.items():
        save_file(_separate(content), partial / f"{stem}.safetensors")
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
    sums = {file.name: sha256(file) for file in sorted(partial.iterdir())}
    manifest = {"format": FORMAT, "step": step, "sha256": sums}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if final.exists():  # a resumed run comes by here again: the old one stays until the new one is complete
        old = root / f".{final.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        partial.rename(final)
        shutil.rmtree(old)
    else:
        partial.rename(final)
    _sync(root)
    others = [folder for folder in list_checkpoints(root) if folder != final]
    for stale in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(stale)
    return final


def _separate(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, each with memory of its own, as safetensors wants them (8-bit moments share code books)."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in content.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def check_checkpoint(folder: Path, key: str = "checkpoint") -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint, or ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{key}: {folder}: no such folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{key}: {folder}: not a checkpoint ({MANIFEST} is missing)") from None
    except ValueError:
        raise ConfigError(f"{key}: {folder}: {MANIFEST} is broken") from None
    if not isinstance(manifest, dict):
        raise ConfigError(f"{key}: {folder}: {MANIFEST} is broken")
    if manifest.get("format", FORMAT) != FORMAT:
        raise ConfigError(f"{key}: {folder}: format {manifest['format']}; this version reads {FORMAT}")
    if not isinstance(manifest.get("sha256"), dict):
        raise ConfigError(f"{key}: {folder}: {MANIFEST} is broken")
    for name, wanted in manifest["sha256"].items():
        file = folder / name
        if not file.exists():
            raise ConfigError(f"{key}: {folder}: {name} is missing")
        if sha256(file) != wanted:
            raise ConfigError(f"{key}: {folder}: {name} is damaged (its checksum differs)")
    return manifest


def stage_of(folder: Path) -> str:
    """`warmup` or `dmd`."""
    return read_json(folder, "state.json").get("stage", "dmd")


def read_tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{stem}.safetensors")


def read_json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def save_optimizer(
    name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, str]
) -> None:
    """Adds an optimizer's state to a checkpoint's files."""
    tensors[f"optimizer_{name}"], tree = split_state(optimizer.state_dict())
    texts[f"optimizer_{name}.json"] = json.dumps(tree)


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    tree = read_json(folder, f"optimizer_{name}.json")
    optimizer.load_state_dict(join_state(read_tensors(folder, f"optimizer_{name}"), tree))
    put_back_pages(optimizer)


def split_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """A nested state dict as named tensors and the rest as JSON, each tensor replaced by {"tensor": name}."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            assert path not in tensors, f"two tensors at {path}"
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [walk(item, f"{path}.{i}") for i, item in enumerate(value)]}
        return {"value": value}

    return tensors, walk(state, "state")


def join_state(tensors: dict[str, torch.Tensor], tree: Any) -> Any:
    """Undoes `split_state`."""
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: join_state(tensors, item) for key, item in content}
    if kind in ("list", "tuple"):
        items = [join_state(tensors, item) for item in content]
        return items if kind == "list" else tuple(items)
    return content
