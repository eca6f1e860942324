"""Scores videos of wan-tiny's world by looking: colour, shape, motion and background, with classical vision alone.

A video that does not show one clear object gets "unclear" for the attribute in doubt, which is right for no caption:
a blur of the right colour does not pass as a circle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dmdtrain.miniature.clips import COLOURS, MOTIONS, SHAPES, Caption, shape_mask

UNCLEAR = "unclear"
ATTRIBUTES = ("colour", "shape", "motion", "background")
MIN_CHROMA = 0.30  # max - min of RGB in [0, 1] above which a pixel belongs to the object
MIN_IOU = 0.74  # mean overlap with the best template below which a shape is unclear
MIN_MARGIN = 0.02  # by which the best template must beat the second
MIN_AREA, MAX_AREA = 60.0, 380.0  # pixels
STILL_SPEED = 0.35  # pixels per frame below which an object stands still


@dataclass(frozen=True)
class Sight:
    """What the scorer saw in one video; each field a caption's word or `UNCLEAR`."""

    colour: str
    shape: str
    motion: str
    background: str

    def matches(self, caption: Caption) -> dict[str, bool]:
        right = {name: getattr(self, name) == getattr(caption, name) for name in ATTRIBUTES}
        return right | {"all": all(right.values())}


def _centroids(mask: torch.Tensor) -> torch.Tensor:
    """Centroids on the torus. mask: [B, T, H, W] -> [B, T, 2] (x, y), in pixels."""
    size = mask.shape[-1]
    axis = torch.arange(size, dtype=mask.dtype) + 0.5
    phase = torch.polar(torch.ones_like(axis), 2 * math.pi * axis / size)
    profiles = torch.stack([mask.sum(-2), mask.sum(-1)], dim=2)  # [B, T, 2, size]: along x, along y
    rough = torch.angle((profiles * phase).sum(-1)) / (2 * math.pi) * size
    # The circular mean is biased for lopsided shapes: take the plain mean in a window centred on it.
    offset = (axis - rough[..., None] + size / 2) % size - size / 2
    return rough + (profiles * offset).sum(-1) / profiles.sum(-1).clamp(min=1e-6)


def look(videos: torch.Tensor) -> list[Sight]:
    """What each video shows. videos: [B, 3, T, H, W] in [-1, 1], T >= 2."""
    rgb = ((videos.float() + 1) / 2).clamp(0, 1)
    size = rgb.shape[-1]
    chroma = rgb.amax(1) - rgb.amin(1)  # [B, T, H, W]
    # Half the object's own chroma is its edge, whatever its brightness; anti-aliased edges then keep their area.
    peak = chroma.flatten(2).topk(48, dim=-1).values.mean(-1)[..., None, None]
    mask = (chroma / peak.clamp(min=MIN_CHROMA)).clamp(0, 1)
    mask = ((mask - 0.5) * 4 + 0.5).clamp(0, 1)
    area = mask.sum((-1, -2))  # [B, T]
    present = ((peak[..., 0, 0] > MIN_CHROMA) & (area > MIN_AREA) & (area < MAX_AREA)).float().mean(1) > 0.9

    weight = mask[:, None] * (mask[:, None] > 0.5)
    mean_colour = (rgb * weight).sum((2, 3, 4)) / weight.sum((2, 3, 4)).clamp(min=1e-6)  # [B, 3]
    names = list(COLOURS)

    def hue_vector(colour: torch.Tensor) -> torch.Tensor:  # grey and brightness removed
        centred = colour - colour.mean(-1, keepdim=True)
        return centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    similarity = hue_vector(mean_colour) @ hue_vector(torch.tensor([COLOURS[n] for n in names])).T
    hue = similarity.max(1)

    centre = _centroids(mask)
    radius = (area / math.pi).sqrt()
    ious = []
    for shape in SHAPES:
        template = shape_mask(shape, centre, radius, size)
        both = torch.minimum(template, mask).sum((-1, -2))
        either = torch.maximum(template, mask).sum((-1, -2))
        ious.append((both / either.clamp(min=1e-6)).mean(1))
    best = torch.stack(ious, 1).topk(2, dim=1)

    step = (centre[:, 1:] - centre[:, :-1] + size / 2) % size - size / 2  # [B, T-1, 2], the shorter way round
    velocity = step.mean(1)
    wobble = (step - velocity[:, None]).norm(dim=-1).mean(1)

    outside = (mask < 0.02).float()[:, None]
    grey = (rgb * outside).sum((1, 2, 3, 4)) / (3 * outside.sum((1, 2, 3, 4))).clamp(min=1e-6)

    sights = []
    for i in range(len(rgb)):
        shape_clear = present[i] and best.values[i, 0] > MIN_IOU and best.values[i, 0] - best.values[i, 1] > MIN_MARGIN
        sights.append(
            Sight(
                colour=names[int(hue.indices[i])] if present[i] and hue.values[i] > 0.9 else UNCLEAR,
                shape=SHAPES[int(best.indices[i, 0])] if shape_clear else UNCLEAR,
                motion=_motion(velocity[i].tolist(), float(wobble[i])) if present[i] else UNCLEAR,
                background="dark" if grey[i] < 0.4 else "light" if grey[i] > 0.6 else UNCLEAR,
            )
        )
    return sights


def _motion(velocity: list[float], wobble: float) -> str:
    speed = math.hypot(*velocity)
    if wobble > max(0.5, speed):
        return UNCLEAR
    if speed < STILL_SPEED:
        return "standing still"
    name, vector = max(MOTIONS.items(), key=lambda item: item[1][0] * velocity[0] + item[1][1] * velocity[1])
    along = vector[0] * velocity[0] + vector[1] * velocity[1]
    return name if along > 0.9 * speed else UNCLEAR


def accuracy(videos: torch.Tensor, captions: list[Caption]) -> dict[str, float]:
    """Share of videos that are right, per attribute and in all of them ("all"). videos: [B, 3, T, H, W] in [-1, 1]."""
    rows = [sight.matches(caption) for sight, caption in zip(look(videos), captions, strict=True)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in (*ATTRIBUTES, "all")}
