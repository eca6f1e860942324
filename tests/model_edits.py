"""Edits of a model folder, for tests of broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import tiny_transformer
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    """Sets keys of a JSON file of a model folder; None removes one."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(part: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / WEIGHTS[part]).read_bytes()
        (folder / WEIGHTS[part]).write_bytes(content[: len(content) // 2])

    return edit


def other_transformer(**changes) -> Callable[[Path], None]:
    """Another transformer, and a text encoder that goes with it."""

    def edit(folder: Path) -> None:
        tiny_transformer(**changes).save_pretrained(folder / "transformer")
        config = UMT5Config.from_pretrained(folder / "text_encoder")
        config.d_model = changes.get("text_dim", config.d_model)
        UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")

    return edit


def edit_tensors(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS[part])
        change(tensors)
        save_file(tensors, folder / WEIGHTS[part], metadata={"format": "pt"})

    return edit


def drop_tensor(part: str) -> Callable[[Path], None]:
    return edit_tensors(part, lambda tensors: tensors.pop(min(tensors)))
