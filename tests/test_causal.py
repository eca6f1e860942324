"""Causal passes through the KV cache against one forward under a block-causal mask, in float64."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_transformer

from dmdtrain.models.causal import CausalView, KVCache, TeacherForcingView, install
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.rollout import BlockLayout

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def under_mask(sees: torch.Tensor, frame_tokens: int):
    """Inside, self-attention of a stock forward is masked. sees: [T, T] bool, queries by keys."""
    mask = sees.repeat_interleave(frame_tokens, 0).repeat_interleave(frame_tokens, 1)
    plain = F.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **kwargs):
        own = mask if query.shape[-2] == key.shape[-2] == len(mask) else None
        return plain(query, key, value, attn_mask=own, **kwargs)

    F.scaled_dot_product_attention = masked
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def masked_forward(model, x, timesteps, context, layout: BlockLayout, local: int | None = None, sink: int = 0):
    """One stock forward of all frames with a block-causal mask put into attention by hand. timesteps: [B, T]."""
    frame_tokens = (x.shape[3] // 2) * (x.shape[4] // 2)
    frames = layout.num_frames
    sees = torch.zeros(frames, frames, dtype=torch.bool)
    for block in layout.slices:
        for key in range(block.stop):
            if local is None or key < sink or key >= block.stop - local:
                sees[block, key] = True
    with under_mask(sees, frame_tokens):
        return model(x, timesteps.repeat_interleave(frame_tokens, 1), context, return_dict=False)[0]


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


# Teacher forcing: one pass over [clean | noisy]


SPEC = AdapterSpec(3, 5.0, ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"))
WINDOWS = [
    ((1, 2, 3), None, 0),
    ((2, 2, 2), None, 0),
    ((1, 2, 3), 4, 1),
    ((2, 2, 2), 3, 0),
    ((2, 2, 2), 4, 1),
    ((1,) * 6, 3, 2),
]


def lora_student(checkpointing: bool) -> Roles:
    """Two adapters on one base; what else runs must not matter."""
    return Roles(
        tiny_transformer().double(),
        trained={"student": SPEC, "fake_score": SPEC},
        adapter_dtype=torch.float64,
        causal=True,
        gradient_checkpointing=checkpointing,
        init_lora_weights=False,
    )


def halves(cached: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """clean, noisy [2, C, 6, H, W]; their timesteps [2, 6], the noisy one's another in every frame; the prompt."""
    generator = torch.Generator().manual_seed(5)
    clean, noisy = torch.randn(2, 2, 4, 6, 4, 6, dtype=torch.float64, generator=generator)
    context = torch.randn(2, 9, 16, dtype=torch.float64, generator=generator)
    timestep = 1000 * torch.rand(2, 6, dtype=torch.float64, generator=generator)
    return clean, noisy, torch.full_like(timestep, cached), timestep, context


def of_blocks(timestep: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The same in every frame of a block: its first frame's."""
    sizes = torch.tensor(layout.sizes)
    return timestep[:, [s.start for s in layout.slices]].repeat_interleave(sizes, 1)


@pytest.mark.parametrize("cached", [0.0, 120.0])
@pytest.mark.parametrize(("sizes", "local", "sink"), WINDOWS)
@torch.no_grad()
def test_one_pass_over_clean_and_noisy_frames_equals_blocks_through_the_cache(sizes, local, sink, cached):
    roles, layout = lora_student(False), BlockLayout(sizes)
    clean, noisy, of_clean, of_noisy, context = halves(cached)
    of_noisy = of_blocks(of_noisy, layout)
    view = TeacherForcingView(tuple(layout.slices), local, sink)
    both = torch.cat([clean, noisy], 2), torch.cat([of_clean, of_noisy], 1)
    one_pass = roles.flow("student", *both, context, view)

    cache, parts = KVCache(local, sink), ([], [])
    for frames in layout.slices:
        for half, (x, t) in enumerate([(clean, of_clean), (noisy, of_noisy)]):
            view = CausalView(cache, frames, write=half == 0)  # a block sees itself once, whether or not it is written
            parts[half].append(roles.flow("student", x[:, :, frames], t[:, frames.start], context, view))
    assert torch.allclose(one_pass, torch.cat([*parts[0], *parts[1]], 2), atol=1e-10, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("sizes", "local", "sink"), WINDOWS)
def test_its_gradient_is_that_of_a_stock_forward_under_a_mask(monkeypatch, sizes, local, sink, checkpointing):
    """Through the noisy half and, unlike in a rollout, through the clean one that it reads."""
    roles, layout = lora_student(checkpointing), BlockLayout(sizes)
    clean, noisy, of_clean, of_noisy, context = halves(0.0)
    both = torch.cat([clean, noisy], 2), torch.cat([of_clean, of_blocks(of_noisy, layout)], 1)
    weight = torch.randn(noisy.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    own = roles.named_parameters("student")

    def gradients(view: TeacherForcingView | None) -> dict[str, torch.Tensor]:
        flow = roles.flow("student", *both, context, view)[:, :, 6:]
        with torch.no_grad():  # another role runs before the backward, as in training
            roles.flow("fake_score", noisy, torch.full((2,), 500.0), context)
        (flow * weight).sum().backward()
        assert all(p.grad is None for p in roles.parameters("fake_score"))
        found = {name: p.grad for name, p in own.items()}
        for p in own.values():
            p.grad = None
        return found

    ours = gradients(TeacherForcingView(tuple(layout.slices), local, sink))

    sees = torch.zeros(12, 12, dtype=torch.bool)
    for block in layout.slices:
        for key in range(block.stop):
            if local is None or key < sink or key >= block.stop - local:
                sees[block, key] = True
                sees[6 + block.start : 6 + block.stop, key if key < block.start else 6 + key] = True
    rope = roles.roles["student"].module.rope.rope
    plain = rope.forward

    def twice(hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:  # both halves at frames 0 to 5
        if hidden_states.shape[2] != 12:
            return plain(hidden_states)
        return tuple(torch.cat([x, x], 1) for x in plain(hidden_states[:, :, :6]))

    monkeypatch.setattr(rope, "forward", twice)
    with under_mask(sees, 6):
        wanted = gradients(None)
    for name, gradient in wanted.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_checkpointing_changes_no_gradient_of_it():
    layout = BlockLayout((1, 2, 3))
    clean, noisy, of_clean, of_noisy, context = halves(0.0)
    found = []
    for checkpointing in (False, True):
        roles = lora_student(checkpointing)
        view = TeacherForcingView(tuple(layout.slices), 4, 1)
        both = torch.cat([clean, noisy], 2), torch.cat([of_clean, of_blocks(of_noisy, layout)], 1)
        roles.flow("student", *both, context, view)[:, :, 6:].square().mean().backward()
        found.append([p.grad for p in roles.parameters("student")])
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.any() and torch.equal(plain, checkpointed)
