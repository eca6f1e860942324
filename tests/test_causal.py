"""Causal passes through the KV cache against one forward under a block-causal mask, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_transformer

from dmdtrain.models.causal import CausalView, KVCache, install
from dmdtrain.rollout import BlockLayout


def masked_forward(model, x, timesteps, context, layout: BlockLayout, local: int | None = None, sink: int = 0):
    """One stock forward of all frames with a block-causal mask put into attention by hand. timesteps: [B, T]."""
    frame_tokens = (x.shape[3] // 2) * (x.shape[4] // 2)
    frames = layout.num_frames
    sees = torch.zeros(frames, frames, dtype=torch.bool)
    for block in layout.slices:
        for key in range(block.stop):
            if local is None or key < sink or key >= block.stop - local:
                sees[block, key] = True
    mask = sees.repeat_interleave(frame_tokens, 0).repeat_interleave(frame_tokens, 1)
    plain = F.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **kwargs):
        own = mask if query.shape[-2] == key.shape[-2] == len(mask) else None
        return plain(query, key, value, attn_mask=own, **kwargs)

    F.scaled_dot_product_attention = masked
    try:
        return model(x, timesteps.repeat_interleave(frame_tokens, 1), context, return_dict=False)[0]
    finally:
        F.scaled_dot_product_attention = plain


@pytest.mark.parametrize("sizes", [(1, 2, 3), (2, 2, 2), (6,), (1, 1, 4)])
@torch.no_grad()
def test_blocks_through_the_cache_equal_a_block_causal_mask(sizes):
    layout = BlockLayout(sizes)
    x = torch.randn(2, 4, 6, 4, 8, dtype=torch.float64)
    context = torch.randn(2, 9, 16, dtype=torch.float64)
    per_block = torch.tensor([[900.0, 500.0, 20.0], [111.0, 700.0, 333.0]], dtype=torch.float64)[:, : len(sizes)]
    timesteps = per_block.repeat_interleave(torch.tensor(sizes), 1)
    wanted = masked_forward(tiny_transformer().double(), x, timesteps, context, layout)

    model = tiny_transformer().double()
    holder = install(model)
    cache = KVCache()
    parts = []
    for index, frames in enumerate(layout.slices):
        holder.view = CausalView(cache, frames, write=True)
        parts.append(model(x[:, :, frames], per_block[:, index], context, return_dict=False)[0])
    assert torch.allclose(torch.cat(parts, 2), wanted, atol=1e-10, rtol=0)


def _flat(parts):
    return [tensor for pair in parts for tensor in pair]


@pytest.mark.parametrize(("sizes", "local", "sink"), [((1, 2, 2, 1), 3, 0), ((2, 2, 2), 2, 1), ((1,) * 6, 2, 1)])
@torch.no_grad()
def test_rolling_window_with_sinks_equals_its_mask(sizes, local, sink):
    layout = BlockLayout(sizes)
    x = torch.randn(1, 4, 6, 4, 4, dtype=torch.float64)
    context = torch.randn(1, 9, 16, dtype=torch.float64)
    wanted = masked_forward(tiny_transformer().double(), x, torch.full((1, 6), 300.0), context, layout, local, sink)
    model = tiny_transformer().double()
    holder = install(model)
    for evict in (False, True):
        cache = KVCache(local, sink, evict)
        parts, held = [], []
        for frames in layout.slices:
            holder.view = CausalView(cache, frames, write=True)
            parts.append(model(x[:, :, frames], torch.tensor([300.0]), context, return_dict=False)[0])
            held.append(cache.stored_frames())
        assert torch.allclose(torch.cat(parts, 2), wanted, atol=1e-10, rtol=0)
        assert (max(held) < 6) == evict


@torch.no_grad()
def test_without_a_view_it_is_the_stock_model():
    x, t, context = torch.randn(2, 4, 3, 4, 6), torch.tensor([5.0, 800.0]), torch.randn(2, 9, 16)
    plain, model = tiny_transformer(), tiny_transformer()
    install(model)
    assert torch.equal(
        model(x, t, context, return_dict=False)[0],
        plain(x, t, context, return_dict=False)[0],
    )


def test_the_cache_never_sees_a_graph_and_reading_never_writes():
    model = tiny_transformer()
    holder = install(model)
    cache = KVCache()
    x, t, context = torch.randn(1, 4, 2, 4, 6), torch.tensor([300.0]), torch.randn(1, 9, 16)
    holder.view = CausalView(cache, slice(0, 2), write=True)
    with pytest.raises(AssertionError, match="graph"):
        model(x, t, context)
    with torch.no_grad():
        model(x, t, context)
    before = [tensor.clone() for layer in range(2) for tensor in _flat(cache.read(layer, slice(4, 5)))]
    holder.view = CausalView(cache, slice(2, 4))
    model(x, t, context, return_dict=False)[0].sum().backward()
    after = [tensor for layer in range(2) for tensor in _flat(cache.read(layer, slice(4, 5)))]
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, after, strict=True))
    assert model.blocks[0].attn2.to_k.weight.grad.abs().sum() > 0  # not starved by the cross-attention cache


def test_patches_over_several_frames_are_refused():
    with pytest.raises(ValueError, match="patch_size"):
        install(tiny_transformer(patch_size=(2, 2, 2)))
