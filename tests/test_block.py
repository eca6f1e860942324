"""Split blocks against the stock ones: the same numbers and gradients, and less memory. Sizes by live storages."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_transformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmdtrain.models import block as blocks
from dmdtrain.models.block import BlockCheckpoints, SplitBlock, pieces, split_blocks
from dmdtrain.models.causal import TeacherForcingView
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.train.accounting import LiveBytes

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES, TOKENS, WIDTH, TEXT = 3, 5, 24, 7


def pair() -> tuple[nn.Module, SplitBlock]:
    """A stock block and the same one split, with random modulation and weights that are trained."""
    stock = tiny_transformer().blocks[0].requires_grad_(True)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    model = nn.Module()
    model.blocks = nn.ModuleList([copy.deepcopy(stock)])
    split_blocks(model)
    return stock, model.blocks[0]


def inputs(runs: int | None) -> list[torch.Tensor]:
    """hidden, context, temb of two videos; runs: timesteps of a video, None for one."""
    generator = torch.Generator().manual_seed(2)
    temb = (2, 6, WIDTH) if runs is None else (2, runs, 6, WIDTH)
    shapes = [(2, FRAMES * TOKENS, WIDTH), (2, TEXT, WIDTH), temb]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def rotary() -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(1, FRAMES * TOKENS, 1, 6, generator=torch.Generator().manual_seed(4)).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def per_token(temb: torch.Tensor) -> torch.Tensor:
    return temb.repeat_interleave(TOKENS, 1) if temb.ndim == 4 else temb


def all_gradients(block: nn.Module, out: torch.Tensor, given: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    torch.autograd.backward(out, probe)
    found = {"hidden": given[0].grad, "context": given[1].grad, "temb": given[2].grad}
    found |= {name: parameter.grad for name, parameter in block.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in found.values()), found.keys()
    return found


@pytest.fixture(params=[8192, 12, 1], ids=["one piece", "pieces of six tokens", "tokens"])
def piece(request, monkeypatch) -> int:
    monkeypatch.setattr(blocks, "PIECE", request.param)
    return request.param


@pytest.mark.parametrize("runs", [None, FRAMES, FRAMES * TOKENS], ids=["one timestep", "per frame", "per token"])
@pytest.mark.parametrize("how", ["whole", "checkpoint", "host", "no grad"])
def test_a_split_block_is_the_stock_block(runs, how, piece):
    stock, split = pair()
    wanted_in, found_in = inputs(runs), inputs(runs)
    hidden, context, temb = wanted_in
    wanted = stock(hidden, context, per_token(temb) if runs == FRAMES else temb, rotary())
    hidden, context, temb = found_in
    if how == "no grad":
        with torch.no_grad():
            found = split(*found_in, rotary())
    elif how == "whole":
        found = split(*found_in, rotary())
    else:
        found = BlockCheckpoints(how == "host")(split, torch.enable_grad, *found_in, rotary())
    if piece == 8192:
        assert torch.equal(found, wanted)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    if how == "no grad":
        return
    assert torch.equal(hidden, inputs(runs)[0])  # what is checkpointed is left as it was
    right, got = all_gradients(stock, wanted, wanted_in), all_gradients(split, found, found_in)
    assert right.keys() == got.keys()
    for name, gradient in right.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 2e-6, (name, float(error))


def test_backward_computes_under_the_autocast_of_the_forward(piece):
    """One piece: as without checkpoints. Were it computed in float32, gradients would be a bf16 rounding apart."""
    found = []
    for how in ("whole", "checkpoint"):
        _, split = pair()
        given = inputs(None)
        with torch.autocast("cpu", torch.bfloat16):
            checkpoints = BlockCheckpoints(False)
            call = split if how == "whole" else lambda *args, s=split, c=checkpoints: c(s, torch.enable_grad, *args)
            out = call(*given, rotary())
        found.append(all_gradients(split, out, given))
    for name, gradient in found[0].items():
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert error < (1e-6 if piece == 8192 else 3e-2), (name, float(error))


@pytest.mark.parametrize(
    ("length", "runs", "batch"), [(15, None, 2), (15, 3, 2), (15, 15, 1), (32760, None, 1), (7, 1, 3)]
)
def test_pieces_cover_every_token_once(length, runs, batch, piece):
    temb = torch.arange(float(runs or 1)).view(1, -1, 1, 1).expand(batch, -1, 6, 2)
    temb = temb if runs else temb[:, 0]
    of_token = torch.arange(length) // (length // (runs or 1))
    covered = torch.zeros(length)
    for rows, own in pieces(torch.empty(batch, length, 1), temb):
        covered[rows] += 1
        if runs:
            assert torch.equal(own[0, :, 0, 0], of_token[rows].unique())
            assert batch * (rows.stop - rows.start) <= max(piece, batch * length // runs)
        else:
            assert own is temb and batch * (rows.stop - rows.start) <= max(piece, batch)
    assert torch.equal(covered, torch.ones(length))


# --------------------------------------------------------------------------------------------------- what is held


def roles_of(**options) -> Roles:
    """A student whose feed-forward is 16 times as wide as the rest, so that what it holds shows."""
    torch.manual_seed(0)
    base = tiny_transformer(ffn_dim=384, num_layers=2)
    spec = AdapterSpec(2, 2, ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"))
    return Roles(base, trained={"student": spec}, causal=True, gradient_checkpointing=True, **options)


LATENTS = torch.randn(1, 4, 6, 16, 16, generator=torch.Generator().manual_seed(3))  # 384 tokens
CONTEXT = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(4))


def peak_of_a_pass(backward: bool, per_frame: bool = False) -> int:
    roles, live = roles_of(), LiveBytes()
    timestep = torch.full((1, 6) if per_frame else (1,), 500.0)
    view = TeacherForcingView((slice(0, 1), slice(1, 3))) if per_frame else None
    with live, torch.set_grad_enabled(backward):
        out = roles.flow("student", LATENTS, timestep, CONTEXT, view)
        if backward:
            out.sum().backward()
    return live.peak


@pytest.mark.parametrize("backward", [True, False])
def test_pieces_hold_the_wide_activations_of_one(backward, monkeypatch):
    whole = peak_of_a_pass(backward)
    monkeypatch.setattr(blocks, "PIECE", 48)
    wide = 4 * 384 * 384  # float32 of all tokens
    assert whole - peak_of_a_pass(backward) > (3 if backward else 1) * wide


def test_a_timestep_for_each_frame_is_not_written_out_for_each_token():
    """It would take six rows of the width of every token, in float32 and in the model's type."""
    extra = peak_of_a_pass(True, per_frame=True) - peak_of_a_pass(True)
    assert extra < 6 * 4 * 384 * 24


def test_pieces_take_no_more_operations(monkeypatch):
    """But for the keys and values of the prompt, which every piece has for itself."""
    counts = []
    for size in (8192, 128):
        monkeypatch.setattr(blocks, "PIECE", size)
        roles = roles_of()
        with FlopCounterMode(display=False) as counter:
            roles.flow("student", LATENTS, torch.full((1,), 500.0), CONTEXT).sum().backward()
        counts.append(counter.get_total_flops())
    prompt = 2 * 7 * 2 * 24 * 24  # keys and values of 7 tokens
    extra = counts[1] - counts[0]
    assert 0 < extra <= 2 * 2 * 4 * 1.5 * prompt  # two blocks, two pieces more, forward, recompute and backward
