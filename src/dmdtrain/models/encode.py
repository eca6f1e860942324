"""Text embeddings, exactly as `WanPipeline` makes them. The encoder is not resident during steps."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from dmdtrain.config import ConfigError
from dmdtrain.models.offload import to_device
from dmdtrain.models.shards import Shards
from dmdtrain.models.wan import WanFolder, load_text_encoder, update_with_weights

# A file of embeddings ends at the first of these; a kill costs what is not in one yet.
SHARD_PROMPTS, SHARD_BYTES, SHARD_SECONDS = 256, 256 << 20, 60
RECENT_BYTES = 64 << 20


class TextCache:
    """Embeddings of prompts, kept on disk up to each prompt's true length; the encoder is loaded only for missing ones.

    An embedding is found by the cleaned prompt, the content of encoder and tokenizer, length and precision.

    Args:
        folder: of the model. cache: where the files go. length: tokens, zero-padded (L below). precision: of the encoder.
        compress: what is written; both kinds are read. quantize_on: where the encoder is quantized; None: the CPU.
    """

    def __init__(
        self,
        folder: WanFolder,
        cache: Path,
        length: int,
        precision: str,
        device: torch.device,
        compress: bool = False,
        quantize_on: torch.device | None = None,
    ):
        self.folder, self.cache, self.length, self.precision, self.device = folder, cache, length, precision, device
        self.quantize_on = quantize_on
        self.shards = Shards(cache, "data.cache_dir", compress)
        self._names: dict[str, str] = {}
        self._returned: set[str] = set()  # by `newly_cut`
        self._recent: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._recent_bytes = 0

    @cached_property
    def _model(self) -> str:
        return encoder_digest(self.folder)

    def _name(self, kind: str, text: str) -> str:
        parts = (kind, self._model, str(self.length), self.precision, text)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def _row(self, prompt: str) -> str:
        """The name of a prompt's embedding. Cleaning takes 0.1 ms: a prompt that was encoded is known as it was given."""
        if prompt not in self._names:
            known = self.shards.aliases.get(self._name("given", prompt))
            self._names[prompt] = known or self._name("cleaned", prompt_clean(prompt))
        return self._names[prompt]

    def rows(self, prompts: Iterable[str]) -> dict[str, str]:
        """Name of the embedding -> its prompt, whether it is there or not."""
        rows: dict[str, str] = {}
        collects = gc.isenabled()
        gc.disable()  # an index of 100 000 rows is a million objects that stay; to look through them takes a second
        try:
            self.shards.refresh()
            for prompt in dict.fromkeys(prompts):
                rows.setdefault(self._row(prompt), prompt)
        finally:
            if collects:
                gc.enable()
        return rows

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The prompts that would have to be encoded."""
        return [prompt for name, prompt in self.rows(prompts).items() if name not in self.shards.rows]

    def newly_cut(self, prompts: Iterable[str]) -> dict[str, int]:
        """Embedded prompts that are longer than `length`, of which the rest was cut, with their tokens; each is returned once."""
        found = {}
        for name, prompt in self.rows(prompts).items():
            row = self.shards.rows.get(name)
            if row is not None and row.note is not None and name not in self._returned:
                self._returned.add(name)
                found[prompt] = row.note
        return found

    def prepare(
        self, prompts: Iterable[str], batch_size: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Encodes the prompts that are not cached yet, then frees the encoder. Several processes share the work.

        progress: told after each batch how many prompts are done and how many bytes were written.
        """
        missing = self.missing(prompts)
        if not missing:
            return
        if not self.shards.open_for_writing():  # others may be at work: from another place on, until all have met
            begin = random.randrange(len(missing))
            missing = missing[begin:] + missing[:begin]
        tokenizer, encoder = load_text_encoder(self.folder, self.precision, self.quantize_on)
        encoder.to(self.device)
        rows: dict[str, torch.Tensor] = {}
        aliases: dict[str, str] = {}
        cut: dict[str, int] = {}
        total, written, last = len(missing), 0, time.monotonic()
        while missing:
            chunk, missing = missing[:batch_size], missing[batch_size:]
            hidden, lengths = encode_prompts(tokenizer, encoder, chunk, self.length)
            for prompt, embedding, length in zip(chunk, hidden, lengths, strict=True):
                name = self._row(prompt)
                if not embedding[:length].isfinite().all():
                    raise ConfigError(
                        f"model.text_encoder_precision: {self.precision}: the embedding of {prompt[:80]!r} is not finite; "
                        "are the text encoder's weights whole? valid are fp32, bf16, int8, int8-llm, nf4"
                    )
                rows[name] = embedding[:length].cpu().clone()
                aliases[self._name("given", prompt)] = name
                if length == self.length and (whole := count_tokens(tokenizer, prompt)) > length:
                    cut[name] = whole
            held = sum(row.nbytes for row in rows.values())
            late = time.monotonic() - last > SHARD_SECONDS
            if len(rows) >= SHARD_PROMPTS or held >= SHARD_BYTES or late or not missing:
                written += self.shards.write(rows, aliases, cut).stat().st_size
                rows, aliases, cut, last = {}, {}, {}, time.monotonic()
                known = len(self.shards.rows)
                self.shards.refresh()
                if len(self.shards.rows) > known:
                    missing = [prompt for prompt in missing if self._row(prompt) not in self.shards.rows]
            if progress is not None:
                progress(total - len(missing), written)
        del encoder, tokenizer
        gc.collect()
        if self.device.type == "cuda":  # what it took is free for all, and no part of the run's peak
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def get(self, prompts: list[str]) -> torch.Tensor:
        """[B, L, D] float32 on the device; zeros past each prompt's end. Prompts must have been prepared."""
        rows = []
        for prompt in prompts:
            row = self._read(prompt).float()
            rows.append(torch.cat([row, row.new_zeros(self.length - len(row), row.shape[1])]))
        return to_device(torch.stack(rows), self.device)

    def _read(self, prompt: str) -> torch.Tensor:
        """[tokens, D] as the encoder gave it; the last 64 MiB that were asked for stay in memory."""
        if prompt in self._recent:
            self._recent.move_to_end(prompt)
            return self._recent[prompt]
        name = self._row(prompt)
        if name not in self.shards.rows:
            self.shards.refresh()
            if name not in self.shards.rows:
                raise ConfigError(
                    f"{self.shards.key}: {self.cache} has no embedding of {prompt[:80]!r}; the same command makes it again"
                )
        row = self._recent[prompt] = self.shards.read(name)
        self._recent_bytes += row.nbytes
        while self._recent_bytes > RECENT_BYTES and len(self._recent) > 1:
            self._recent_bytes -= self._recent.popitem(last=False)[1].nbytes
        return row


def encoder_digest(folder: WanFolder) -> str:
    """What text encoder and tokenizer are, by content: neither names nor times of their files matter.

    Of the weights' gigabytes, each file's size and 256 pieces spread over it are read: training changes every one of them.
    A model from the hub, whose weights may not be here yet, is known by its commit.
    """
    if folder.hub:
        return folder.path.name
    digest = hashlib.sha256()
    config = json.loads((folder.path / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    noted = {
        k: v
        for k, v in config.items()
        if not k.startswith("_") and k not in ("transformers_version", "dtype", "torch_dtype")
    }
    digest.update(json.dumps(noted, sort_keys=True).encode())
    for file in sorted((folder.path / "tokenizer").iterdir()):
        if file.is_file() and not file.name.startswith("."):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    update_with_weights(digest, folder.path / "text_encoder")
    return digest.hexdigest()


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """Tokens of a whole prompt, with the end token."""
    return len(tokenizer(prompt_clean(prompt), add_special_tokens=True, verbose=False).input_ids)


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
