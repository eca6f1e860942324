"""Tensors compressed without loss: zlib of their bytes, plane by plane.

First the first byte of every number, then the second, and so on: signs and exponents of embeddings and latents repeat themselves,
their fractions do not.
"""

from __future__ import annotations

import math
import zlib

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Shape = tuple[list[int], str]  # sizes, and the name of a dtype


def shape_of(tensor: torch.Tensor) -> Shape:
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def pack(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes] of a contiguous tensor on the CPU."""
    planes = tensor.view(torch.uint8).view(-1, tensor.element_size()).T.contiguous()
    return torch.frombuffer(bytearray(zlib.compress(planes.numpy(), 1)), dtype=torch.uint8)


def unpack(packed: torch.Tensor, shape: list[int], dtype: str) -> torch.Tensor:
    """What was packed; zlib.error, ValueError or RuntimeError where it is damaged."""
    kind = DTYPES[dtype]
    planes = torch.frombuffer(bytearray(zlib.decompress(packed.numpy())), dtype=torch.uint8)
    return planes.view(kind.itemsize, math.prod(shape)).T.contiguous().view(kind).view(shape)
