"""A Wan transformer block that holds little: the stock block's mathematics in two parts, and its gradient checkpoint.

Self-attention sees the whole sequence; cross-attention and feed-forward see each token alone, so they go through the sequence
piece by piece. In the backward of a checkpoint, each piece is computed again and gone through backwards at once, before
self-attention is: no more operations than for the whole sequence, with the wide activations of one piece. What norms compute
in float32 is computed again rather than kept, and the modulation of a timestep that each frame has for its own is never
written out for every token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dmdtrain.models.offload import HostTensor, Leash, copy_stream, current_stream

PIECE = 8192  # tokens: enough to fill a GPU, and to make little of dequantizing the weights for each piece

Tokenwise = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # of a piece and what is its own, as the piece

# Whether what runs at this moment is in a checkpoint, in its forward or its recompute.
_in_checkpoint = ContextVar("_in_checkpoint", default=False)


def by_piece(function: Tokenwise, hidden: torch.Tensor, of_runs: torch.Tensor | None = None) -> torch.Tensor:
    """`function` of each piece of hidden [B, L, D], for what is cheap: in a checkpoint backward keeps hidden alone and computes
    the rest again, piece by piece. Where activations are kept anyway all goes at once; a compiler decides for itself."""
    if torch.compiler.is_compiling():
        return function(hidden, of_runs)
    if not torch.is_grad_enabled():
        return _each(function, hidden, of_runs)
    return _ByPiece.apply(function, hidden, of_runs) if _in_checkpoint.get() else function(hidden, of_runs)


def _each(
    function: Tokenwise, hidden: torch.Tensor, of_runs: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Without a graph; out may be hidden."""
    parts = list(pieces(hidden, of_runs))
    if len(parts) == 1:
        return function(hidden, of_runs).detach()
    out = torch.empty_like(hidden) if out is None else out
    for rows, own in parts:
        out[:, rows] = function(hidden[:, rows], own).detach()
    return out


def _each_backward(
    function: Tokenwise, hidden: torch.Tensor, of_runs: torch.Tensor | None, grad: torch.Tensor
) -> torch.Tensor:
    """The gradient of hidden, which is detached; those of of_runs, if it needs one, and of weights are added to their `grad`."""
    found = torch.empty_like(hidden)
    with torch.enable_grad():  # rows of it lead to it
        for rows, own in pieces(hidden, of_runs):
            piece = hidden[:, rows].requires_grad_()
            torch.autograd.backward(function(piece, own), grad[:, rows])
            found[:, rows] = piece.grad
    return found


class _ByPiece(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Tokenwise, hidden: torch.Tensor, of_runs: torch.Tensor | None) -> torch.Tensor:
        ctx.function, ctx.as_then = function, _as_now(hidden.device)
        ctx.save_for_backward(hidden, of_runs)
        return _each(function, hidden.detach(), of_runs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor | None]:
        hidden, of_runs = ctx.saved_tensors
        if of_runs is not None:
            of_runs = of_runs.detach().requires_grad_(ctx.needs_input_grad[2])
        found = _each_backward(ctx.as_then(ctx.function), hidden.detach(), of_runs, grad)
        return None, found, None if of_runs is None else of_runs.grad


def _as_now(
    device: torch.device, entered: Callable[[], AbstractContextManager] = nullcontext
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Makes functions run, in backward, with a graph, inside `entered`, and under autocast as it is at this moment."""
    kind = device.type
    autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def as_then(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any) -> torch.Tensor:
            with torch.enable_grad(), autocast(), entered(), _as_checkpoint():
                return function(*args)

        return run

    return as_then


@contextmanager
def _as_checkpoint() -> Iterator[None]:
    token = _in_checkpoint.set(True)
    try:
        yield
    finally:
        _in_checkpoint.reset(token)


class SplitBlock(WanTransformerBlock):
    """The stock block: the same weights by the same names, the same numbers to the bit while the sequence is one piece.

    hidden: [B, L, D]. temb: [B, 6, D], or [B, G, 6, D] for G equal runs of tokens (such as frames) with a timestep each.
    """

    def attend(self, hidden: torch.Tensor, temb: torch.Tensor, rotary: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Self-attention, which sees all tokens."""
        modulation = self._modulation(temb, slice(0, 3))
        normed = by_piece(lambda piece, own: _modulated(self.norm1, piece, own), hidden, modulation)
        return _gated(hidden, self.attn1(normed, None, None, rotary), modulation)

    def transform(self, hidden: torch.Tensor, temb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Cross-attention and feed-forward, which see each token alone: of a piece [B, l, D] of what `attend` gives, with its
        rows of temb."""
        normed = by_piece(lambda piece, _: self.norm2(piece.float()).type_as(piece), hidden)
        hidden = hidden + self.attn2(normed, context, None, None)
        modulation = self._modulation(temb, slice(3, 6))
        return _gated(hidden, self.ffn(_modulated(self.norm3, hidden, modulation)), modulation)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        hidden = self.attend(hidden_states, temb, rotary_emb)
        if torch.is_grad_enabled():
            return self.transform(hidden, temb, encoder_hidden_states)
        return _each(partial(self.transform, context=encoder_hidden_states), hidden, temb, out=hidden)

    def _modulation(self, temb: torch.Tensor, rows: slice) -> torch.Tensor:
        """float32 [B, G, 3, D]: shift, scale and gate."""
        temb = temb if temb.ndim == 4 else temb.unsqueeze(1)
        return self.scale_shift_table[:, rows] + temb[:, :, rows].float()


def _modulated(norm: Any, hidden: torch.Tensor, modulation: Any) -> torch.Tensor:
    shift, scale, _ = modulation.unsqueeze(2).unbind(3)  # [B, G, 1, D] each
    runs = hidden.unflatten(1, (shift.shape[1], -1))
    return (norm(runs.float()) * (1 + scale) + shift).type_as(hidden).flatten(1, 2)


def _gated(hidden: torch.Tensor, change: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
    gate, runs = modulation[:, :, None, 2], (modulation.shape[1], -1)
    return (hidden.unflatten(1, runs).float() + change.unflatten(1, runs) * gate).type_as(hidden).flatten(1, 2)


def pieces(hidden: torch.Tensor, of_runs: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Tokens of about `PIECE` in a batch, the same number each, and the rows of of_runs that are theirs."""
    length, most = hidden.shape[1], max(1, PIECE // hidden.shape[0])
    runs = 1 if of_runs is None or of_runs.ndim == 3 else of_runs.shape[1]
    if of_runs is None or runs == 1:
        size = -(-length // -(-length // most))
        yield from ((slice(start, min(start + size, length)), of_runs) for start in range(0, length, size))
        return
    tokens = length // runs
    size = max(1, most // tokens)
    for start in range(0, runs, size):
        stop = min(start + size, runs)
        yield slice(start * tokens, stop * tokens), of_runs[:, start:stop]


def split_blocks(model: Any) -> None:
    """Makes the blocks of a Wan `SplitBlock`s, in place: they differ in nothing but what they do."""
    for block in model.blocks:
        block.__class__ = SplitBlock


def compile_blocks(transformer: Any, backend: str) -> None:
    """torch.compile of each block's parts. All blocks share their graphs: one for each role and grad mode, and one more once
    a size is seen to vary."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in transformer.blocks:
        block.attend = torch.compile(block.attend, backend=backend)
        block.transform = torch.compile(block.transform, backend=backend)


# ------------------------------------------------------------------------------------------- gradient checkpoints


class BlockCheckpoints:
    """Gradient checkpointing of a model's `SplitBlock`s: of each, its input is kept, on the device or in host memory. From
    there it is brought back, in backward, while the block after it is computed.

    Backward adds to the `grad` of weights, so that it is for `backward`, not for `autograd.grad`.
    """

    def __init__(self, on_host: bool) -> None:
        self._on_host = on_host
        self._last: weakref.ref[_OnHost] | None = None
        self._leash = Leash()

    def __call__(
        self,
        block: SplitBlock,
        entered: Callable[[], AbstractContextManager],
        hidden: torch.Tensor,
        context: torch.Tensor,
        temb: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """The block's output. entered: makes a context in which its forward runs, then and in backward; the other arguments
        are the block's, shared by all blocks but for `hidden`."""
        saved: _OnDevice | _OnHost
        if self._on_host:
            saved = _OnHost(hidden, None if self._last is None else self._last(), self._leash)
            self._last = weakref.ref(saved)
            self._leash.step(copy_stream(hidden.device))
        else:
            saved = _OnDevice(hidden)
        # Where no input needs a gradient the trained weights inside still do.
        anchor = torch.empty(0, device=hidden.device, requires_grad=True)
        return _Checkpoint.apply(block, entered, saved, rotary, anchor, hidden, context, temb)


class _OnDevice:
    def __init__(self, hidden: torch.Tensor):
        self.tensor: torch.Tensor | None = hidden.detach()

    def take(self) -> torch.Tensor:
        assert self.tensor is not None, "a graph is gone through backwards once"
        hidden, self.tensor = self.tensor, None
        return hidden


class _OnHost:
    def __init__(self, hidden: torch.Tensor, before: _OnHost | None, leash: Leash):
        self.tensor: HostTensor | None = HostTensor(hidden.detach(), use="checkpoints")
        self.leash = leash
        self.before = None if before is None else weakref.ref(before)

    def take(self) -> torch.Tensor:
        assert self.tensor is not None, "a graph is gone through backwards once"
        self.leash.step(current_stream(self.tensor.device))
        hidden, self.tensor = self.tensor.get(), None
        before = self.before() if self.before is not None else None
        if before is not None and before.tensor is not None:
            before.tensor.prefetch()
        return hidden


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: SplitBlock,
        entered: Callable[[], AbstractContextManager],
        saved: _OnDevice | _OnHost,
        rotary: tuple[torch.Tensor, ...],
        anchor: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.block, ctx.saved, ctx.rotary, ctx.shared = block, saved, rotary, inputs[1:]
        ctx.as_then = _as_now(inputs[0].device, entered)
        hidden, context, temb = (value.detach() for value in inputs)
        # As in the recompute: what looks at the grad mode must find the same.
        with torch.enable_grad(), entered(), _as_checkpoint():
            hidden = block.attend(hidden, temb, rotary).detach()
            return _each(partial(block.transform, context=context), hidden, temb, out=hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[5:]
        inputs = [value.detach() for value in (ctx.saved.take(), *ctx.shared)]
        for value, wanted in zip(inputs, needed, strict=True):
            value.requires_grad_(wanted)
        hidden, context, temb = inputs
        middle = ctx.as_then(ctx.block.attend)(hidden, temb, ctx.rotary)
        transform = ctx.as_then(partial(ctx.block.transform, context=context))
        grad = _each_backward(transform, middle.detach(), temb, grad)
        torch.autograd.backward(middle, grad)
        return None, None, None, None, None, *(value.grad for value in inputs)
