"""Text embeddings, exactly as `WanPipeline` makes them. The encoder is not resident during steps."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors import SafetensorError
from safetensors.torch import load_file

from dmdtrain.config import ConfigError
from dmdtrain.files import save_tensors
from dmdtrain.models.wan import WanFolder, load_text_encoder


class TextCache:
    """Embeddings of prompts, kept on disk up to each prompt's true length; the encoder is loaded only for missing ones.

    Args:
        folder: of the model. cache: where the files go. length: tokens, zero-padded (L below). precision: of the encoder.
    """

    def __init__(self, folder: WanFolder, cache: Path, length: int, precision: str, device: torch.device):
        self.folder, self.cache, self.length, self.precision, self.device = folder, cache, length, precision, device
        weights = sorted((folder.path / "text_encoder").glob("*.safetensors"))
        self._model_id = ":".join(f"{f.name}-{f.stat().st_size}" for f in weights)
        self._memory: dict[str, torch.Tensor] = {}

    def _file(self, prompt: str) -> Path:
        parts = (self._model_id, str(self.length), self.precision, prompt_clean(prompt))
        return self.cache / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.safetensors"

    def prepare(self, prompts: Iterable[str], batch_size: int = 16) -> None:
        """Encodes the prompts that are not cached yet, then frees the encoder."""
        missing = [p for p in dict.fromkeys(prompts) if not self._file(p).exists()]
        if not missing:
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        tokenizer, encoder = load_text_encoder(self.folder, self.precision)
        encoder.to(self.device)
        for start in range(0, len(missing), batch_size):
            chunk = missing[start : start + batch_size]
            hidden, lengths = encode_prompts(tokenizer, encoder, chunk, self.length)
            for prompt, row, length in zip(chunk, hidden, lengths, strict=True):
                save_tensors(self._file(prompt), {"embedding": row[:length].cpu().contiguous()})
        del encoder, tokenizer
        gc.collect()

    def _read(self, file: Path) -> torch.Tensor:
        try:
            return load_file(file)["embedding"].float()
        except (OSError, SafetensorError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{file} can not be read ({reason}); delete it where it is broken: the same command makes it again"
            ) from None

    def get(self, prompts: list[str]) -> torch.Tensor:
        """[B, L, D] float32 on the device; zeros past each prompt's end. Prompts must have been prepared."""
        rows = []
        for prompt in prompts:
            if prompt not in self._memory:
                if len(self._memory) >= 1024:
                    self._memory.clear()
                self._memory[prompt] = self._read(self._file(prompt))
            row = self._memory[prompt]
            rows.append(torch.cat([row, row.new_zeros(self.length - len(row), row.shape[1])]))
        return torch.stack(rows).to(self.device)


@torch.no_grad()
def encode_prompts(tokenizer: Any, encoder: Any, prompts: list[str], length: int) -> tuple[torch.Tensor, list[int]]:
    """UMT5 embeddings of cleaned prompts [B, length, D] and each prompt's number of tokens; truncated to `length`."""
    tokens = tokenizer(
        [prompt_clean(p) for p in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    device = next(encoder.parameters()).device
    hidden = encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state
    return hidden, tokens.attention_mask.gt(0).sum(dim=1).tolist()
