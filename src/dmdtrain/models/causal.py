"""Block-causal attention for a Wan transformer: a KV cache, RoPE at absolute frame positions, cross-attention K/V per prompt.

A pass with a `CausalView` sees one temporal block: its queries attend to the cached keys and values of earlier frames and to
the block itself. That equals one forward of all frames under a block-causal mask. A pass without a view is the stock model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn


def visible_frames(frames: slice, local_frames: int | None, sink_frames: int) -> list[range]:
    """Earlier frames that a block at `frames` attends to: all, or a window that ends with the block, and the sinks."""
    if local_frames is None:
        return [range(frames.start)]
    first = max(sink_frames, frames.stop - local_frames)
    return [range(min(sink_frames, frames.start)), range(first, frames.start)]


def sampling_window(local_frames: int | None, num_training_frames: int | None, num_frames: int) -> int | None:
    """The window of a video of `num_frames`. One longer than training rolls on in a window of the training length, unless one
    is set: blocks never saw anything further away, and fail where RoPE's phases come round again."""
    if local_frames is None and num_training_frames is not None and num_frames > num_training_frames:
        return num_training_frames
    return local_frames


class Stored(Protocol):
    """Keys or values as a cache keeps them."""

    def get(self) -> torch.Tensor:
        """[B, L, heads, head dim] on the device."""
        ...

    def prefetch(self) -> None:
        """They are wanted soon."""
        ...


@dataclass(frozen=True)
class AsItIs:
    tensor: torch.Tensor

    def get(self) -> torch.Tensor:
        return self.tensor

    def prefetch(self) -> None:
        """Is there already."""


class KVCache:
    """Keys and values of finished blocks, per layer, each [B, frames * tokens per frame, heads, head dim].

    `cross` holds the prompt's keys and values per layer, for passes without gradient.

    Args:
        local_frames: frames that a block attends to, itself included; None: all before it. sink_frames: the video's first
            frames, which stay visible outside the window. evict: forget what no later block can see, so that memory stays
            constant however long the video; not for training, where replay reads the context of every block again.
        store: how keys and values are kept, such as `Int8Tensor` or `HostTensor`.
    """

    def __init__(
        self,
        local_frames: int | None = None,
        sink_frames: int = 0,
        evict: bool = False,
        store: Callable[[torch.Tensor], Stored] = AsItIs,
    ):
        self.local_frames, self.sink_frames, self.evict, self.store = local_frames, sink_frames, evict, store
        self._layers: dict[int, dict[tuple[int, int], tuple[Stored, Stored]]] = {}
        self._last_read = -1
        self.cross: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def visible(self, frames: slice) -> list[range]:
        return visible_frames(frames, self.local_frames, self.sink_frames)

    def _overlaps(self, layer: int, frames: slice) -> list[tuple[Stored, Stored, int, slice]]:
        """(keys, values, their frames, the rows of them that are seen), in order; rows in frames."""
        found = []
        for wanted in self.visible(frames):
            for (start, stop), (keys, values) in self._layers.get(layer, {}).items():
                low, high = max(start, wanted.start), min(stop, wanted.stop)
                if low < high:
                    found.append((keys, values, stop - start, slice(low - start, high - start)))
        return found

    def read(self, layer: int, frames: slice) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the visible frames, in order."""
        parts = []
        for stored_keys, stored_values, held, seen in self._overlaps(layer, frames):
            keys, values = stored_keys.get(), stored_values.get()
            tokens = keys.shape[1] // held
            rows = slice(seen.start * tokens, seen.stop * tokens)
            parts.append((keys[:, rows], values[:, rows]))
        # A pass goes up the layers; the recompute of a backward goes down.
        step = -1 if torch.is_grad_enabled() and layer == self._last_read - 1 else 1
        self._last_read = layer
        for stored_keys, stored_values, _, _ in self._overlaps(layer + step, frames):
            stored_keys.prefetch()
            stored_values.prefetch()
        return parts

    def write(self, layer: int, frames: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert not torch.is_grad_enabled(), "the cache never sees a graph"
        blocks = self._layers.setdefault(layer, {})
        blocks[frames.start, frames.stop] = (self.store(keys), self.store(values))
        if self.evict:
            # The next block ends at least one frame after this one.
            seen = self.visible(slice(frames.stop, frames.stop + 1))
            for start, stop in list(blocks):
                if not any(max(start, r.start) < min(stop, r.stop) for r in seen):
                    del blocks[start, stop]

    def stored_frames(self) -> int:
        """Frames held, in the fullest layer."""
        return max((sum(stop - start for start, stop in blocks) for blocks in self._layers.values()), default=0)


@dataclass(frozen=True)
class CausalView:
    """What one pass sees of the video: its own frames and, through the cache, those before them."""

    cache: KVCache
    frames: slice
    write: bool = False


@dataclass(frozen=True)
class TeacherForcingView:
    """A pass over [clean frames | noisy frames] of one video, each T frames long: clean blocks attend to clean ones up to
    themselves, noisy blocks to earlier clean ones and to themselves. The noisy half's result is what the cache would give.

    Args:
        blocks: of the T frames. local_frames, sink_frames: as of `KVCache`.
    """

    blocks: tuple[slice, ...]
    local_frames: int | None = None
    sink_frames: int = 0


View = CausalView | TeacherForcingView


@dataclass
class ViewHolder:
    """The view of the pass that is running; shared by the processors and the RoPE of one transformer."""

    view: View | None = field(default=None)


@dataclass
class _Processor:
    """An attention processor of one layer; without a view it does what `stock` does."""

    layer: int
    holder: ViewHolder
    stock: WanAttnProcessor


class CausalSelfAttention(_Processor):
    """Of a self-attention layer: attends to the visible cached frames and to its own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        view = self.holder.view
        if view is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        assert rotary_emb is not None
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        query, key = (_rotate(x, *rotary_emb) for x in (query, key))
        if isinstance(view, TeacherForcingView):
            return _project(attn, _teacher_forcing(self.stock, view, query, key, value))
        return _project(attn, _attend_past(self.stock, view, self.layer, query, key, value))


class CachedCrossAttention(_Processor):
    """Of a cross-attention layer: keeps the prompt's K/V for passes without gradient."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        view = self.holder.view
        # With gradients the weights of to_k and to_v need their own pass: a cache would starve them.
        if not isinstance(view, CausalView) or torch.is_grad_enabled():
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        return _project(attn, _attend(self.stock, query, *self._prompt(attn, view.cache, encoder_hidden_states)))

    @torch.compiler.disable
    def _prompt(self, attn: Any, cache: KVCache, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layer not in cache.cross:
            key = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
            value = attn.to_v(context).unflatten(2, (attn.heads, -1))
            cache.cross[self.layer] = (key, value)
        return cache.cross[self.layer]


class OffsetRope(nn.Module):
    """The model's own rotary embedding, at the frames of the view instead of at frame 0."""

    def __init__(self, rope: nn.Module, holder: ViewHolder):
        super().__init__()
        self.rope, self.holder = rope, holder

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view = self.holder.view
        if view is None:
            return self.rope(hidden_states)
        if isinstance(view, TeacherForcingView):
            cos, sin = self.rope(hidden_states[:, :, : hidden_states.shape[2] // 2])
            return torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)
        # At frame 0, then the part that tells time is put in place: only the shape of what is given is read, and one token
        # a frame stands for those before, so that memory does not grow with the video.
        tables = self.rope(hidden_states)
        _, height, width = self.rope.patch_size
        columns = hidden_states[:1, :, :1, :height, :width].expand(-1, -1, view.frames.stop, -1, -1)
        for table, times in zip(tables, self.rope(columns), strict=True):
            rows = table.view(hidden_states.shape[2], -1, table.shape[-1])  # [t, tokens per frame, head dim]
            rows[..., : self.rope.t_dim] = times[0, view.frames][..., : self.rope.t_dim]
        return tables


def install(transformer: Any) -> ViewHolder:
    """Puts the processors and the RoPE into a `WanTransformer3DModel`; what they do depends on the returned holder.

    Raises:
        ValueError: the model's patches span several frames.
    """
    if transformer.config.patch_size[0] != 1:
        raise ValueError(f"patch_size {transformer.config.patch_size}: causal students need patches of one frame")
    holder = ViewHolder()
    for layer, block in enumerate(transformer.blocks):
        block.attn1.set_processor(CausalSelfAttention(layer, holder, block.attn1.processor))
        block.attn2.set_processor(CachedCrossAttention(layer, holder, block.attn2.processor))
    transformer.rope = OffsetRope(transformer.rope, holder)
    return holder


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, L, heads, head dim]: pairs (2i, 2i + 1) turned by the angle of their position."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


def _attend(stock: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention by the backend that the stock processor was given; all [B, L, heads, head dim]."""
    return dispatch_attention_fn(query, key, value, backend=stock._attention_backend)


@torch.compiler.disable  # so that a growing cache compiles nothing again
def _attend_past(
    stock: Any, view: CausalView, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attention to the visible cached frames and to the block's own, which is written where the view says so."""
    past = view.cache.read(layer, view.frames)
    if view.write:
        view.cache.write(layer, view.frames, key, value)
    key = torch.cat([*(k for k, _ in past), key], 1)
    value = torch.cat([*(v for _, v in past), value], 1)
    return _attend(stock, query, key, value)


def _project(attn: Any, out: torch.Tensor) -> torch.Tensor:
    """Heads joined, then the output projection. out: [B, L, heads, head dim]."""
    return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))


def _teacher_forcing(
    stock: Any, view: TeacherForcingView, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Block by block instead of under a mask: no mask of L^2 entries, no wasted products, any backend."""
    num_frames = view.blocks[-1].stop
    tokens = query.shape[1] // (2 * num_frames)

    def rows(x: torch.Tensor, *parts: range) -> torch.Tensor:
        found = [x[:, part.start * tokens : part.stop * tokens] for part in parts if part]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    clean, noisy = [], []
    for block in view.blocks:
        past = visible_frames(block, view.local_frames, view.sink_frames)
        own = range(block.start, block.stop)
        # Without a window all that a clean block sees is in one place.
        seen = [range(block.stop)] if len(past) == 1 else [*past, own]
        clean.append(_attend(stock, rows(query, own), rows(key, *seen), rows(value, *seen)))
        later = range(own.start + num_frames, own.stop + num_frames)
        noisy.append(_attend(stock, rows(query, later), rows(key, *past, later), rows(value, *past, later)))
    return torch.cat([*clean, *noisy], 1)
