"""wan-tiny's world: captions, clips, and the scorer that everything is judged by."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from dmdtrain.data.prompts import load_prompts
from dmdtrain.miniature import clips, scorer
from dmdtrain.miniature.clips import ALL_CAPTIONS, Caption
from dmdtrain.miniature.frechet import features, frechet_distance

VALUES = {
    "colour": list(clips.COLOURS),
    "shape": list(clips.SHAPES),
    "motion": list(clips.MOTIONS),
    "background": list(clips.BACKGROUNDS),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ground_truth(num_frames: int, count: int, seed: int) -> tuple[torch.Tensor, list[Caption]]:
    """Clips of `count` random captions."""
    drawn = torch.randint(len(ALL_CAPTIONS), (count,), generator=seeded(seed)).tolist()
    captions = [ALL_CAPTIONS[i] for i in drawn]
    return clips.render(captions, num_frames, seeded(seed + 100)), captions


def accuracy(num_frames: int, count: int = 300, batch: int = 60) -> dict[str, float]:
    """As scorer.accuracy over ground truth, a batch at a time to bound memory."""
    parts = [scorer.accuracy(*ground_truth(num_frames, batch, seed)) for seed in range(count // batch)]
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


@pytest.fixture(scope="module")
def truth() -> tuple[torch.Tensor, list[Caption]]:
    """One clip of every caption, 21 frames."""
    return clips.render(list(ALL_CAPTIONS), 21, seeded(5)), list(ALL_CAPTIONS)


# ---------------------------------------------------------------------------------------------------- captions


def test_captions_are_read_back():
    assert len(ALL_CAPTIONS) == len({str(c) for c in ALL_CAPTIONS}) == 6 * 4 * 5 * 2
    for caption in ALL_CAPTIONS:
        assert Caption.parse(str(caption)) == caption
    caption = Caption("red", "circle", "moving left", "dark")
    assert str(caption) == "a red circle moving left on a dark background"
    assert Caption.parse("  A Red  circle moving\nleft on a DARK background ") == caption


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle",
        "a red circle moving left on a dark background, 4k",
        "the red circle moving left on a dark background",
        "a red circle moving left on a grey background",
        "a orange circle moving left on a dark background",
    ],
)
def test_other_text_is_no_caption(text):
    assert Caption.parse(text) is None


def test_split_is_disjoint_and_both_parts_hold_every_value():
    training, validation = clips.split_captions()
    assert not set(training) & set(validation)
    assert set(training) | set(validation) == set(ALL_CAPTIONS)
    assert len(validation) == 48
    for name, values in VALUES.items():
        for part in (training, validation):
            assert {getattr(caption, name) for caption in part} == set(values), name
    assert clips.split_captions() == (training, validation)
    assert clips.split_captions(seed=1)[1] != validation


def test_wan_tiny_prompts_are_the_split():
    training, validation = clips.split_captions()
    assert load_prompts("wan-tiny", "data.prompts", held_out=False) == [str(c) for c in training]
    assert load_prompts("wan-tiny", "validation.prompts", held_out=True) == [str(c) for c in validation]


# ---------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("shape", clips.SHAPES)
def test_masks_have_equal_areas_and_lie_about_their_centre(shape):
    generator = seeded(1)
    centre = torch.rand(40, 2, generator=generator) * clips.SIZE  # many of them reach over the edge
    radius = clips.RADIUS[0] + torch.rand(40, generator=generator) * (clips.RADIUS[1] - clips.RADIUS[0])
    mask = clips.shape_mask(shape, centre, radius)
    assert mask.shape == (40, clips.SIZE, clips.SIZE)
    assert mask.min() == 0 and mask.max() == 1
    area = mask.sum((-1, -2))
    torch.testing.assert_close(area, math.pi * radius**2, rtol=0.03, atol=0)
    axis = torch.arange(clips.SIZE) + 0.5
    for i, profile in enumerate((mask.sum(-2), mask.sum(-1))):  # along x, along y
        offset = (axis - centre[:, i : i + 1] + clips.SIZE / 2) % clips.SIZE - clips.SIZE / 2
        assert ((profile * offset).sum(-1) / area).abs().max() < 0.1


def test_masks_look_like_their_names():
    middle, radius = torch.tensor([16.0, 16.0]), torch.tensor(8.0)
    masks = {shape: clips.shape_mask(shape, middle, radius) for shape in clips.SHAPES}
    widths = {shape: mask.sum(-1) for shape, mask in masks.items()}  # of each row
    assert torch.allclose(widths["circle"].max(), torch.tensor(16.0), atol=0.5)
    assert torch.allclose(masks["circle"], masks["circle"].T) and torch.allclose(masks["square"], masks["square"].T)
    rows = widths["square"][widths["square"] > 0.9 * widths["square"].max()]
    assert len(rows) == pytest.approx(8 * math.sqrt(math.pi), abs=1)  # as high as it is wide
    triangle = widths["triangle"][widths["triangle"] > 0]
    assert (triangle[:-1].diff() > 0).all() and triangle[-2] > 15  # pointing up; the last row is the soft edge
    assert masks["cross"][10, 10] == 0 and masks["cross"][16, 7] == 1 and masks["cross"][7, 16] == 1


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape 'star' is not one of circle, square, triangle, cross"):
        clips.shape_mask("star", torch.zeros(2), torch.tensor(5.0))


def test_clips_are_videos_and_repeat_with_their_seed():
    captions = list(ALL_CAPTIONS[::37])
    videos = clips.render(captions, 9, seeded(3))
    assert videos.shape == (len(captions), 3, 9, clips.SIZE, clips.SIZE)
    assert videos.dtype == torch.float32 and videos.min() >= -1 and videos.max() <= 1
    assert torch.equal(videos, clips.render(captions, 9, seeded(3)))
    assert not torch.equal(videos, clips.render(captions, 9, seeded(4)))
    # A longer clip of a seed begins as the shorter one: the length is not part of the draws.
    assert torch.equal(clips.render(captions, 13, seeded(3))[:, :, :9], videos)


def test_a_caption_has_many_videos():
    caption = Caption("blue", "square", "standing still", "light")
    videos = clips.render([caption] * 6, 2, seeded(0))
    distances = torch.cdist(videos.flatten(1), videos.flatten(1)) + 1e9 * torch.eye(6)
    assert distances.min() > 1


@pytest.mark.parametrize("shape", ["circle", "square"])
@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_objects_move_by_a_constant_speed_around_the_torus(motion, shape):
    frames = 81
    video = (clips.render([Caption("red", shape, motion, "dark")] * 4, frames, seeded(8)) + 1) / 2
    chroma = video.amax(1) - video.amin(1)  # [B, T, H, W]: none in the grey background, so it is the mask
    mask = chroma / chroma.amax((1, 2, 3), keepdim=True)
    area = mask.sum((-1, -2))
    assert (area.std(1) / area.mean(1)).max() < 0.01  # nothing is cut off at the edge
    angle = 2 * math.pi * (torch.arange(clips.SIZE) + 0.5) / clips.SIZE
    centre = torch.stack(
        [
            torch.atan2((profile * angle.sin()).sum(-1), (profile * angle.cos()).sum(-1)) / (2 * math.pi) * clips.SIZE
            for profile in (mask.sum(-2), mask.sum(-1))
        ],
        -1,
    )  # [B, T, 2] (x, y)
    step = (centre.diff(dim=1) + clips.SIZE / 2) % clips.SIZE - clips.SIZE / 2
    along = (step * torch.tensor(clips.MOTIONS[motion])).sum(-1)
    across = (step - along[..., None] * torch.tensor(clips.MOTIONS[motion])).abs()
    assert across.max() < 0.05
    if motion == "standing still":
        return
    speed = along.mean(1)
    assert (speed > clips.SPEED[0] - 0.01).all() and (speed < clips.SPEED[1] + 0.01).all()
    assert speed.std() > 0.05
    assert (speed * (frames - 1) > clips.SIZE).all()  # every one came around
    assert (along - speed[:, None]).abs().max() < 0.1


# ---------------------------------------------------------------------------------------------------- the scorer


@pytest.mark.parametrize("num_frames", [21, 81])
def test_the_scorer_recognises_ground_truth(num_frames):
    right = accuracy(num_frames)
    assert set(right) == {"colour", "shape", "motion", "background", "all"}
    assert min(right.values()) >= 0.97


@pytest.mark.parametrize("attribute", VALUES)
def test_wrong_captions_are_wrong(truth, attribute):
    """Each attribute changed alone, to each of its other values: wrong in that one, right in the others."""
    videos, captions = truth
    sights = scorer.look(videos)
    names = VALUES[attribute]
    for shift in range(1, len(names)):
        rows = []
        for sight, caption in zip(sights, captions, strict=True):
            other = names[(names.index(getattr(caption, attribute)) + shift) % len(names)]
            rows.append(sight.matches(dataclasses.replace(caption, **{attribute: other})))
        share = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        assert share[attribute] <= 0.01 and share["all"] <= 0.01
        assert min(value for name, value in share.items() if name not in (attribute, "all")) >= 0.97


def test_accuracy_counts():
    captions = [Caption("red", "circle", "moving left", "dark"), Caption("cyan", "cross", "moving up", "light")]
    videos = clips.render(captions, 21, seeded(2))
    assert scorer.accuracy(videos, captions) == dict.fromkeys((*scorer.ATTRIBUTES, "all"), 1.0)
    half = [captions[0], dataclasses.replace(captions[1], motion="moving down")]
    assert scorer.accuracy(videos, half) == {"colour": 1, "shape": 1, "motion": 0.5, "background": 1, "all": 0.5}
    assert scorer.accuracy(videos, captions[::-1])["all"] == 0


def unclear(videos: torch.Tensor, *attributes: str) -> float:
    """Share of videos in which every one of the attributes is unclear."""
    sights = scorer.look(videos)
    return sum(all(getattr(sight, name) == scorer.UNCLEAR for name in attributes) for sight in sights) / len(sights)


def test_noise_shows_nothing():
    generator = seeded(0)
    noise = torch.randn(8, 3, 21, 32, 32, generator=generator)
    everything = ("colour", "shape", "motion", "background")
    assert unclear(noise.clamp(-1, 1), *everything) == 1
    assert unclear((noise * 0.1).clamp(-1, 1), *everything) == 1
    assert unclear(torch.rand(8, 3, 21, 32, 32, generator=generator) * 2 - 1, *everything) == 1
    smooth = functional.interpolate(torch.randn(8, 3, 3, 4, 4, generator=generator), (21, 32, 32), mode="trilinear")
    assert unclear(smooth.clamp(-1, 1), "shape") == 1


def test_a_blank_video_shows_a_background_at_most():
    for grey, background in ((0.15, "dark"), (0.5, scorer.UNCLEAR), (0.85, "light")):
        (sight,) = scorer.look(torch.full((1, 3, 5, 32, 32), grey * 2 - 1))
        assert sight == scorer.Sight(scorer.UNCLEAR, scorer.UNCLEAR, scorer.UNCLEAR, background)


def test_a_constant_colour_is_no_object():
    for colour in clips.COLOURS.values():
        video = torch.tensor(colour).view(1, 3, 1, 1, 1).expand(-1, -1, 5, 32, 32) * 2 - 1
        assert unclear(video, "colour", "shape", "motion") == 1


def test_a_blur_of_the_right_colour_is_no_shape(truth):
    videos, captions = truth
    padded = functional.pad(videos.flatten(1, 2), (4, 4, 4, 4), mode="circular").unflatten(1, (3, 21))
    blurred = functional.avg_pool3d(padded, (1, 9, 9), stride=1)
    assert blurred.shape == videos.shape
    right = scorer.accuracy(blurred, captions)
    assert right["background"] > 0.95  # the picture is still there
    sharp = [c.shape != "circle" for c in captions]  # a blurred circle stays round
    sights = scorer.look(blurred)
    wrong = [s.shape != c.shape for s, c, keep in zip(sights, captions, sharp, strict=True) if keep]
    assert sum(wrong) / len(wrong) > 0.9


@pytest.mark.parametrize("outline", ["bar", "ring", "two dots"])
def test_other_shapes_are_unclear(outline):
    """Objects of the right size and colour that are none of the four shapes."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    inside = {
        "bar": (x.abs() < 14) & (y.abs() < 3),
        "ring": (x.hypot(y) < 10) & (x.hypot(y) > 7),
        "two dots": (x.abs() - 9).hypot(y) < 5,
    }[outline]
    red, grey = torch.tensor([0.9, 0.15, 0.15]), torch.tensor([0.2, 0.2, 0.2])
    video = (
        torch.where(inside, red[:, None, None], grey[:, None, None])[None, :, None].expand(-1, -1, 5, -1, -1) * 2 - 1
    )
    assert scorer.look(video) == [scorer.Sight("red", scorer.UNCLEAR, "standing still", "dark")]


def test_an_object_that_comes_and_goes_is_unclear(truth):
    videos, _ = truth
    flicker = videos.clone()
    flicker[:, :, ::4] = flicker[:, :, ::4].mean(1, keepdim=True)  # grey in every fourth frame
    assert unclear(flicker, "colour", "shape", "motion") == 1


def test_an_object_that_jumps_has_no_motion():
    captions = [c for c in ALL_CAPTIONS if c.motion == "moving right"]
    videos = clips.render(captions, 21, seeded(4))
    shuffled = videos[:, :, torch.randperm(21, generator=seeded(1))]
    right = scorer.accuracy(shuffled, captions)
    assert min(right["colour"], right["shape"], right["background"]) >= 0.95
    assert right["motion"] <= 0.02
    assert scorer.accuracy(videos.flip(2), captions)["motion"] == 0
    reverse = [dataclasses.replace(c, motion="moving left") for c in captions]
    assert scorer.accuracy(videos.flip(2), reverse)["motion"] >= 0.97


def test_two_objects_are_no_one_object(truth):
    videos, captions = truth
    still = [i for i, c in enumerate(captions) if c.motion == "standing still"]
    right = scorer.accuracy(videos[still], [captions[i] for i in still])
    assert right["all"] >= 0.97
    both = videos[still].clone()
    other = both.roll((16, 16), (-2, -1))
    chroma = other.amax(1, keepdim=True) - other.amin(1, keepdim=True)
    both = torch.where(chroma > 0.6, other, both)
    assert scorer.accuracy(both, [captions[i] for i in still])["shape"] <= 0.02


# ---------------------------------------------------------------------------------------------------- variety


def test_frechet_distance_of_known_gaussians():
    """Scaled by s and moved by m: |m|^2 + (1 - s)^2 tr C."""
    a = torch.randn(500, 5, generator=seeded(0), dtype=torch.float64) @ torch.randn(
        5, 5, generator=seeded(1), dtype=torch.float64
    )
    a -= a.mean(0)
    move = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.25], dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    wanted = float(move.square().sum() + 0.3**2 * torch.cov(a.T).trace())
    assert frechet_distance(a, 0.7 * a + move) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(0.7 * a + move, a) == pytest.approx(wanted, rel=1e-6)


def test_features_do_not_depend_on_the_batch():
    latents = torch.randn(4, 2, 3, 4, 5, generator=seeded(2))
    assert features(latents).shape == (4, 64)
    assert torch.allclose(features(latents)[1:2], features(latents[1:2]))
    assert not torch.allclose(features(latents), features(latents, seed=1))
