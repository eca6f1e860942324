"""Synthetic captioned clips: one coloured shape moving over a grey background, in a world that wraps around.

The world is a torus, so that a motion is the same at any clip length: an object that leaves on the right comes back on
the left. Position, size, speed, brightness and the background's tone and gradient vary freely and are in no caption,
so a caption has many right videos: that is what makes few-step sampling hard without distillation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

SIZE = 32  # pixels, height and width
COLOURS = {  # RGB in [0, 1]
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.85, 0.20, 0.85),
    "cyan": (0.10, 0.80, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {  # unit vector (x to the right, y down)
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "standing still": (0.0, 0.0),
}
BACKGROUNDS = {"dark": (0.08, 0.28), "light": (0.72, 0.92)}  # range of the mean grey level
RADIUS = (6.5, 8.5)  # pixels, of the circle of equal area
SPEED = (0.8, 1.5)  # pixels per frame
GRADIENT = 0.08  # largest deviation of the background's grey level from its mean
CROSS_ARM = 0.36  # half width of an arm in units of the cross's half length


@dataclass(frozen=True)
class Caption:
    """What a clip shows; `str()` of it is the prompt."""

    colour: str
    shape: str
    motion: str
    background: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} on a {self.background} background"

    @classmethod
    def parse(cls, prompt: str) -> Caption | None:
        """The caption that `prompt` spells, or None where it is not one of this world's."""
        return _BY_PROMPT.get(" ".join(prompt.lower().split()))


ALL_CAPTIONS: tuple[Caption, ...] = tuple(
    Caption(*parts) for parts in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
)
_BY_PROMPT = {str(caption): caption for caption in ALL_CAPTIONS}


def split_captions(validation_share: float = 0.2, seed: int = 0) -> tuple[list[Caption], list[Caption]]:
    """Training and validation captions, disjoint; every attribute value occurs in both."""
    order = torch.randperm(len(ALL_CAPTIONS), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(len(order) * validation_share)
    held_out = {ALL_CAPTIONS[i] for i in order[:cut]}
    return [c for c in ALL_CAPTIONS if c not in held_out], [c for c in ALL_CAPTIONS if c in held_out]


def shape_mask(
    shape: str, centre: torch.Tensor, radius: torch.Tensor, size: int = SIZE, softness: float = 0.5
) -> torch.Tensor:
    """Anti-aliased mask of a shape on the torus.

    Args:
        centre: [..., 2] centroid (x, y) in pixels. radius: [...] in pixels: the radius of the circle of equal area.
        softness: half width in pixels of the edge's ramp.

    Returns:
        [..., size, size] in [0, 1].
    """
    axis = torch.arange(size, dtype=centre.dtype, device=centre.device) + 0.5
    dx = (axis - centre[..., 0:1] + size / 2) % size - size / 2  # [..., size]
    dy = (axis - centre[..., 1:2] + size / 2) % size - size / 2
    dx, dy = dx.unsqueeze(-2), dy.unsqueeze(-1)
    r = radius[..., None, None]
    if shape == "circle":
        inside = r - torch.sqrt(dx * dx + dy * dy)
    elif shape == "square":
        inside = r * math.sqrt(math.pi) / 2 - torch.maximum(dx.abs(), dy.abs())
    elif shape == "triangle":  # equilateral, pointing up, about its centroid; apothem a, area 3 sqrt(3) a^2
        apothem = r * math.sqrt(math.pi / (3 * math.sqrt(3)))
        slanted = dx.abs() * (math.sqrt(3) / 2) - dy * 0.5
        inside = apothem - torch.maximum(dy, slanted)
    elif shape == "cross":  # two bars of half length a and half width k a: area 4 a^2 (2 k - k^2)
        half = r * math.sqrt(math.pi / (4 * (2 * CROSS_ARM - CROSS_ARM**2)))
        bar_x = torch.minimum(half - dx.abs(), half * CROSS_ARM - dy.abs())
        bar_y = torch.minimum(half - dy.abs(), half * CROSS_ARM - dx.abs())
        inside = torch.maximum(bar_x, bar_y)
    else:
        raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    return (inside / (2 * softness) + 0.5).clamp(0, 1)


def render(captions: list[Caption], num_frames: int, generator: torch.Generator) -> torch.Tensor:
    """Clips for `captions` with everything that a caption leaves open drawn from `generator`.

    Returns:
        videos: [B, 3, num_frames, SIZE, SIZE] in [-1, 1].
    """
    n = len(captions)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    start = uniform(0, SIZE, 2)
    radius = uniform(*RADIUS)
    speed = uniform(*SPEED)
    brightness = uniform(0.85, 1.05)
    grey_unit = uniform(0, 1)
    angle = uniform(0, 2 * math.pi)
    slope = uniform(0, GRADIENT)

    direction = torch.tensor([MOTIONS[c.motion] for c in captions])
    steps = torch.arange(num_frames, dtype=torch.float32)
    centre = start[:, None] + (direction * speed[:, None])[:, None] * steps[None, :, None]  # [B, T, 2]
    mask = torch.zeros(n, num_frames, SIZE, SIZE)
    for shape in SHAPES:
        rows = [i for i, c in enumerate(captions) if c.shape == shape]
        if rows:
            mask[rows] = shape_mask(shape, centre[rows], radius[rows, None].expand(-1, num_frames))

    low_high = torch.tensor([BACKGROUNDS[c.background] for c in captions])
    grey = low_high[:, 0] + grey_unit * (low_high[:, 1] - low_high[:, 0])
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    ramp = angle.cos()[:, None, None] * axis[None, None, :] + angle.sin()[:, None, None] * axis[None, :, None]
    background = grey[:, None, None] + slope[:, None, None] * ramp / math.sqrt(2)  # [B, H, W]
    colour = torch.tensor([COLOURS[c.colour] for c in captions]) * brightness[:, None]

    mask = mask[:, None]
    video = background[:, None, None] * (1 - mask) + colour[:, :, None, None, None] * mask
    return video.clamp(0, 1) * 2 - 1
