"""Causal passes and attention patterns against the public reference's numbers (tests/golden, `C.*`)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load_file

from dmdtrain.flow import x0_from_flow
from dmdtrain.models.causal import CausalSelfAttention, CausalView, KVCache, TeacherForcingView, ViewHolder, install
from dmdtrain.rollout import BlockLayout

GOLDEN = Path(__file__).parent / "golden" / "wan_dmd_reference"
REFERENCE = json.loads(GOLDEN.with_suffix(".json").read_text())
TENSORS = load_file(GOLDEN.with_suffix(".safetensors"))
LAYOUT = BlockLayout((3, 3, 3))
TOKENS = 24  # per frame
TOLERANCE = 3e-5  # Diffusers embeds timesteps in float32

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(name: str) -> torch.Tensor:
    """Stored [B, T, C, H, W] -> [B, C, T, H, W], float64."""
    return TENSORS[name].double().permute(0, 2, 1, 3, 4)


TIMESTEP = TENSORS["C.t"].double()  # [B, T]
NOISY = latents("C.causal.x0") + (TIMESTEP / 1000)[:, None, :, None, None] * latents("C.causal.flow")


def reference_draws() -> dict[str, torch.Tensor]:
    """Inputs that the file leaves out. The reference drew its inputs from one stream, in this order; [B, C, T, H, W]."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        torch.randn(2, 16, 32, generator=generator)  # in.context, in.context_uncond
    a = torch.randn(2, 4, 9, 8, 12, generator=generator)
    noise, clean = (torch.randn(2, 9, 4, 8, 12, generator=generator).permute(0, 2, 1, 3, 4) for _ in range(2))
    return {"A.x": a, "B.noise": noise, "B.clean": 0.7 * clean}


def student(dtype: torch.dtype) -> tuple[WanTransformer3DModel, ViewHolder]:
    model = WanTransformer3DModel(**REFERENCE["diffusers_config"])
    prefix = "weights.student."
    model.load_state_dict({key.removeprefix(prefix): v for key, v in TENSORS.items() if key.startswith(prefix)})
    return model.to(dtype).eval(), install(model)


def largest(error: torch.Tensor) -> float:
    return float(error.abs().max())


def test_the_noisy_latents_are_found_from_the_outputs():
    """Both outputs are of the same latents: flow and x0 of the two tell sigma, and sigma tells the latents."""
    flow, x0, flow_tf, x0_tf = (latents(f"C.{kind}") for kind in ("causal.flow", "causal.x0", "tf.flow", "tf.x0"))
    later = slice(3, None)  # the first block has no context: there the two agree
    assert largest((flow - flow_tf)[:, :, :3]) < 1e-6 and largest((x0 - x0_tf)[:, :, :3]) < 1e-6
    d_flow, d_x0 = (flow - flow_tf)[:, :, later], (x0 - x0_tf)[:, :, later]
    assert (d_flow.abs().amax((1, 3, 4)) > 0.1).all()  # what the context is shows in every later frame
    sigma = -(d_flow * d_x0).sum((1, 3, 4)) / d_flow.square().sum((1, 3, 4))
    assert largest(sigma - TIMESTEP[:, later] / 1000) < 1e-6
    assert (TIMESTEP[:, :3] == 1000).all()  # so that sigma is 1 where it cannot be found
    assert largest(x0_tf + (TIMESTEP / 1000)[:, None, :, None, None] * flow_tf - NOISY) < 2e-6


def test_the_references_inputs_can_be_drawn_again():
    drawn = reference_draws()
    assert torch.equal(drawn["A.x"], TENSORS["A.x"])
    assert largest(drawn["B.noise"] - NOISY) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_blocks_through_the_cache_equal_the_references_block_causal_forward(dtype):
    """There, blocks see the noisy ones before them, each at its own timestep: what each pass writes of itself."""
    model, holder = student(dtype)
    cache, context = KVCache(), TENSORS["in.context"].to(dtype)
    parts = []
    for frames in LAYOUT.slices:
        holder.view = CausalView(cache, frames, write=True)
        timestep = TIMESTEP[:, frames.start].to(dtype)
        parts.append(model(NOISY[:, :, frames].to(dtype), timestep, context, return_dict=False)[0])
    flow = torch.cat(parts, 2).double()
    assert largest(flow - latents("C.causal.flow")) < TOLERANCE
    assert largest(x0_from_flow(NOISY, flow, TIMESTEP / 1000) - latents("C.causal.x0")) < TOLERANCE


@pytest.mark.parametrize("through", ["one pass", "cache"])
@torch.no_grad()
def test_noisy_blocks_on_clean_context_equal_the_references_teacher_forcing(through):
    model, holder = student(torch.float32)
    context, noisy, clean = TENSORS["in.context"], NOISY.float(), reference_draws()["B.clean"]
    if through == "one pass":
        holder.view = TeacherForcingView(tuple(LAYOUT.slices))
        timestep = torch.cat([torch.zeros(2, 9), TIMESTEP.float()], 1).repeat_interleave(TOKENS, 1)
        flow = model(torch.cat([clean, noisy], 2), timestep, context, return_dict=False)[0][:, :, 9:]
    else:
        cache, parts = KVCache(), []
        for frames in LAYOUT.slices:
            holder.view = CausalView(cache, frames)
            timestep = TIMESTEP[:, frames.start].float()
            parts.append(model(noisy[:, :, frames], timestep, context, return_dict=False)[0])
            holder.view = CausalView(cache, frames, write=True)
            model(clean[:, :, frames], torch.zeros(2), context)
        flow = torch.cat(parts, 2)
    assert largest(flow - latents("C.tf.flow")) < TOLERANCE
    assert largest(x0_from_flow(NOISY, flow, TIMESTEP / 1000) - latents("C.tf.x0")) < TOLERANCE


# What attends to what


class Uniform(SimpleNamespace):
    """An attention layer whose queries weigh all keys alike and whose values pass through: one-hot rows come out as the
    share of each key."""

    heads, to_out = 1, (torch.nn.Identity(), torch.nn.Identity())
    norm_q = norm_k = to_v = torch.nn.Identity()

    def to_q(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)

    to_k = to_q


def attended(views: list, rows: list[slice]) -> torch.Tensor:
    """[L, L] of 0 and 1: queries by keys, of passes one after another over `rows` of a sequence of L tokens."""
    holder = ViewHolder()
    processor = CausalSelfAttention(0, holder, WanAttnProcessor())
    one_hot = torch.eye(rows[-1].stop)[None]
    parts = []
    for holder.view, own in zip(views, rows, strict=True):
        states = one_hot[:, own]
        rotary = torch.ones(1, states.shape[1], 1, states.shape[2])
        parts.append(processor(Uniform(), states, rotary_emb=(rotary, torch.zeros_like(rotary))))
    return (torch.cat(parts, 1)[0] > 0).to(torch.uint8)


@torch.no_grad()
def test_the_cache_shows_what_the_references_mask_shows():
    wanted, cache = TENSORS["C.causal.mask"], KVCache()
    rows = [slice(f.start * TOKENS, f.stop * TOKENS) for f in LAYOUT.slices]
    assert torch.equal(attended([CausalView(cache, f, write=True) for f in LAYOUT.slices], rows), wanted)
    visible = torch.zeros_like(wanted)
    for frames, own in zip(LAYOUT.slices, rows, strict=True):
        visible[own, own] = 1
        for seen in cache.visible(frames):
            visible[own, seen.start * TOKENS : seen.stop * TOKENS] = 1
    assert torch.equal(visible, wanted)


@torch.no_grad()
def test_teacher_forcing_shows_what_the_references_mask_shows():
    view = TeacherForcingView(tuple(LAYOUT.slices))
    assert torch.equal(attended([view], [slice(0, 2 * 9 * TOKENS)]), TENSORS["C.tf.mask"])
