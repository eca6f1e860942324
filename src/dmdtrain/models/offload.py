"""Host memory for what the device need not hold all the time: gradient checkpoints and the weights of frozen blocks.

Copies go over a stream of their own and are asked for one step ahead, so that the device computes meanwhile. Nothing here
changes a number. On a machine without a GPU the same code copies within host memory, and `on_host` tells an accounting which
side a tensor belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dmdtrain.models.quantize import may_round, unloaded

CHUNK = 2**31  # bytes of pinned memory that are asked for at once, at most
_making_host_tensors = False
_streams: dict[torch.device, torch.cuda.Stream] = {}
_chunks: dict[str, tuple[torch.Tensor, int]] = {}  # the newest one for each use, and where it is free from


@contextmanager
def _host_tensors() -> Iterator[None]:
    global _making_host_tensors
    _making_host_tensors = True
    try:
        yield
    finally:
        _making_host_tensors = False


def on_host() -> bool:
    """Whether the tensors that are made at this moment stand for host memory."""
    return _making_host_tensors


def copy_stream(device: torch.device) -> Any:
    """The stream of copies to and from a device; None without CUDA."""
    if device.type != "cuda":
        return None
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To a GPU from pinned memory, so that the host does not wait for what the GPU still computes."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pinned_empty(shape: Sequence[int], dtype: torch.dtype, use: str, pin: bool = True) -> torch.Tensor:
    """Uninitialised pinned memory. It is cut from chunks, since PyTorch takes a power of two for each tensor: of Wan 14B's it
    would waste a third. A chunk goes back when none of its tensors is left.

    Args:
        use: tensors that live equally long share chunks.
    """
    size = dtype.itemsize * math.prod(shape)
    chunk, start = _chunks.get(use, (None, 0))
    if chunk is None or start + size > chunk.numel():
        room = max(2**20, size, min(8 * size, CHUNK))
        with _host_tensors():
            chunk, start = torch.empty(1 << (room - 1).bit_length(), dtype=torch.uint8, pin_memory=pin), 0
    _chunks[use] = chunk, start + math.ceil(size / 512) * 512  # aligned as PyTorch's own
    return chunk[start : start + size].view(dtype).view(tuple(shape))


class Leash:
    """Keeps the host at most two steps ahead of a device, which frees the memory of a step only when it has come past it."""

    def __init__(self) -> None:
        self._steps: list[Any] = []  # events at the ends of those that the device may not have reached yet

    def step(self, stream: Any) -> None:
        """A step ends with what is queued on `stream`; None without CUDA."""
        if stream is not None:
            self._steps.append(stream.record_event())
            if len(self._steps) > 2:
                self._steps.pop(0).synchronize()


def current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class HostTensor:
    """A copy of a tensor in host memory, pinned where the device is CUDA.

    Args:
        tensor: on the device, or on the host already. device: where `get` brings it; None: where the tensor is.
        use: as `pinned_empty` takes it.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device | None = None, use: str = "cache"):
        self.device = device or tensor.device
        self._ahead: tuple[torch.Tensor, Any] | None = None
        stream = copy_stream(self.device)
        if stream is None:
            with _host_tensors():
                self.host = torch.empty(tensor.shape, dtype=tensor.dtype)
            self.host.copy_(tensor)
            return
        self.host = pinned_empty(tensor.shape, tensor.dtype, use)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            tensor.record_stream(stream)  # its memory is not given to others before it is copied

    def prefetch(self) -> None:
        """Starts the copy to the device."""
        if self._ahead is None:
            stream = copy_stream(self.device)
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                there = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
                there.copy_(self.host, non_blocking=True)
            self._ahead = there, None if stream is None else stream.record_event()

    def forget(self) -> None:
        """Gives up a copy that was asked for."""
        self._ahead = None

    def get(self) -> torch.Tensor:
        """The tensor on the device, for the stream that is current."""
        self.prefetch()
        assert self._ahead is not None
        (there, event), self._ahead = self._ahead, None
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            there.record_stream(current)
        return there


# -------------------------------------------------------------------------------------------------- frozen weights


class BlockStream:
    """Frozen weights of a model's blocks in host memory; on the device are the block that is computed and the next one, in
    whichever direction the pass goes."""

    def __init__(self, device: torch.device):
        self.device = device
        self._blocks: list[list[HostTensor]] = []
        self._here: list[torch.Tensor] = []
        self._leash = Leash()
        self._current = self._next = -1

    def add(self, block: int, weight: torch.Tensor) -> int:
        """Takes a weight over; its place among the block's."""
        while len(self._blocks) <= block:
            self._blocks.append([])
        self._blocks[block].append(HostTensor(weight, self.device, "weights"))
        return len(self._blocks[block]) - 1

    def weight(self, block: int, place: int) -> torch.Tensor:
        """One weight on the device, for use at once."""
        if block != self._current:
            step = -1 if block == self._current - 1 else 1
            if self._next not in (-1, block):  # the pass turned round
                for weight in self._blocks[self._next]:
                    weight.forget()
            self._current, self._next = block, (block + step) % len(self._blocks)
            self._here = []
            self._leash.step(current_stream(self.device))
            self._here = [weight.get() for weight in self._blocks[block]]
            if self._next != block:
                for weight in self._blocks[self._next]:
                    weight.prefetch()
        return self._here[place]


class StreamedLinear(nn.Linear):
    """A frozen linear layer whose weight lies in host memory. Bias, scales and whatever is trained on it stay on the device.

    Its `weight` is empty; it tells PEFT where the layer runs, and to which type it rounds new adapters.
    """

    def __init__(self, linear: nn.Linear, stream: BlockStream, block: int):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.stream, self.block = stream, block
        self.place = stream.add(block, linear.weight.data)
        self.layer = unloaded(linear, stream.device)
        kind = self.layer.dtype or linear.weight.dtype
        self.weight = nn.Parameter(torch.empty(0, dtype=kind, device=stream.device), requires_grad=False)
        self.bias = linear.bias
        self.multiply_in_int8 = getattr(linear, "multiply_in_int8", False)

    def stored(self) -> torch.Tensor:
        """The weight as it was, on the device."""
        return self.stream.weight(self.block, self.place)

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wanted = x.dtype
        if self.layer.dtype is not None:
            x = x.to(self.layer.dtype)
        elif torch.is_autocast_enabled(x.device.type):
            wanted = torch.get_autocast_dtype(x.device.type)
            x = x.to(wanted)
        if self.multiply_in_int8 and self.layer.rounded is not None and may_round(x):
            out = self.layer.rounded(x, self.stored())
            return out if self.bias is None else out + self.bias.to(out.dtype)
        return _StreamedMatmul.apply(x, self).to(wanted)


class _StreamedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: StreamedLinear) -> torch.Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return layer.layer.product(x, layer.stored(), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.layer.dense(ctx.layer.stored(), grad.dtype), None


def stream_blocks(transformer: Any, device: torch.device) -> None:
    """Puts the weights of all frozen linear layers of a transformer's blocks into host memory, in place."""
    stream = BlockStream(device)
    for index, block in enumerate(transformer.blocks):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, StreamedLinear(layer, stream, index))
