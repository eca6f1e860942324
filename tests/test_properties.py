"""The maths under any numbers: flow.py, dmd.py and the counting of frames."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dmdtrain.config import Rollout, check_num_frames, latent_frames, parse_resolution
from dmdtrain.dmd import (
    critic_loss,
    dmd_gradient,
    dmd_loss,
    dmd_loss_gradient,
    guide,
    sample_score_timesteps,
    score_timestep_range,
)
from dmdtrain.flow import add_noise, flow_from_x0, flow_target, shift_sigma, shift_timestep, x0_from_flow

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
shapes = st.tuples(*(st.integers(1, 3) for _ in range(5)))  # [B, C, T, H, W]
seeds = st.integers(0, 2**31)
shifts = st.floats(0.1, 20)
sigmas = st.floats(0, 1, allow_subnormal=False)
scales = st.floats(1e-3, 1e3)


def draw(shape: tuple[int, ...], seed: int, count: int) -> list[torch.Tensor]:
    """Random tensors of a shape, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def levels(shape: tuple[int, ...], seed: int, per_frame: bool) -> torch.Tensor:
    """sigma in [0.05, 1): [B] or [B, T], float64."""
    size = (shape[0], shape[2]) if per_frame else shape[:1]
    return 0.05 + 0.95 * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@SETTINGS
@given(shape=shapes, seed=seeds, per_frame=st.booleans())
def test_flow_and_x0_are_two_ways_to_say_the_same(shape, seed, per_frame):
    noisy, x0, flow = draw(shape, seed, 3)
    sigma = levels(shape, seed, per_frame)
    close(x0_from_flow(noisy, flow_from_x0(noisy, x0, sigma), sigma), x0)
    close(flow_from_x0(noisy, x0_from_flow(noisy, flow, sigma), sigma), flow)


@SETTINGS
@given(shape=shapes, seed=seeds, per_frame=st.booleans())
def test_noising_is_undone_by_the_true_flow(shape, seed, per_frame):
    x0, noise = draw(shape, seed, 2)
    sigma = levels(shape, seed, per_frame)
    noisy = add_noise(x0, noise, sigma)
    close(x0_from_flow(noisy, flow_target(x0, noise), sigma), x0)
    close(add_noise(noise, x0, 1 - sigma), noisy)  # the two ends change places


@SETTINGS
@given(sigma=sigmas, shift=shifts, other=shifts)
def test_shifts_are_a_group(sigma, shift, other):
    shifted = shift_sigma(sigma, shift)
    assert -1e-12 <= shifted <= 1 + 1e-12
    assert shift_sigma(shifted, 1 / shift) == pytest.approx(sigma, abs=1e-9)
    assert shift_sigma(shifted, other) == pytest.approx(shift_sigma(sigma, shift * other), abs=1e-9)
    assert shift_timestep(1000 * sigma, shift) == pytest.approx(1000 * shifted, abs=1e-6)


@SETTINGS
@given(low=sigmas, high=sigmas, shift=shifts)
def test_a_shift_keeps_the_order(low, high, shift):
    assume(low + 1e-9 < high)
    assert shift_sigma(low, shift) < shift_sigma(high, shift)
    towards_noise = 1 if shift >= 1 else -1
    assert towards_noise * (shift_sigma(high, shift) - high) >= -1e-12


@SETTINGS
@given(seed=seeds, low=st.integers(0, 999), length=st.integers(1, 1000), shift=shifts, bounds=st.tuples(sigmas, sigmas))
def test_score_timesteps_stay_in_their_range(seed, low, length, shift, bounds):
    high = min(low + length, 1000)
    least, most = 1000 * min(bounds), 1000 * max(bounds)
    drawn = sample_score_timesteps(
        50, torch.Generator().manual_seed(seed), low, high, shift=shift, min_timestep=least, max_timestep=most
    )
    assert drawn.shape == (50,) and drawn.dtype == torch.float32
    near = 1e-3  # float32 of numbers up to 1000
    floor, ceiling = max(least, shift_timestep(low, shift)), min(most, shift_timestep(high - 1, shift))
    assert drawn.min() >= min(floor, most) - near
    assert drawn.max() <= max(ceiling, least) + near


@SETTINGS
@given(
    start=st.floats(0.001, 1000),
    end=st.floats(0, 1000, allow_subnormal=False),
    by_exit=st.booleans(),
    by_start=st.booleans(),
    least=st.integers(0, 999),
)
def test_the_range_of_score_timesteps_lies_between_its_bounds(start, end, by_exit, by_start, least):
    assume(end < start)
    bounds = dict(ts_schedule=by_exit, ts_schedule_max=by_start, min_score_timestep=least)
    try:
        low, high = score_timestep_range(start, end, **bounds)
    except (
        ValueError
    ):  # no integer between them: never where nothing but 1000 bounds above and the last step is not there
        assert by_start or (by_exit and end > 999)
        assert not (by_exit and start - end > 1)
        return
    assert 0 <= low < high <= 1000
    assert abs(low - (end if by_exit else least)) <= 0.5
    assert abs(high - (start if by_start else 1000)) <= 0.5


@SETTINGS
@given(shape=shapes, seed=seeds, scale=scales, sign=st.sampled_from([1, -1]))
def test_the_gradient_knows_no_scale_and_no_origin(shape, seed, scale, sign):
    x0, real, fake, origin = draw(shape, seed, 4)
    plain = dmd_gradient(x0, real, fake)
    scaled = dmd_gradient(*(sign * scale * x for x in (x0, real, fake)))
    close(scaled.gradient, sign * plain.gradient)
    close(scaled.normaliser / scale, plain.normaliser)
    close(dmd_gradient(x0 + origin, real + origin, fake + origin).gradient, plain.gradient)
    assert dmd_gradient(x0, real, real).gradient.abs().max() == 0


@SETTINGS
@given(shape=shapes, seed=seeds)
def test_samples_of_a_batch_do_not_mix(shape, seed):
    x0, real, fake = draw((3, *shape[1:]), seed, 3)
    order = torch.tensor([2, 0, 1])
    close(dmd_gradient(x0[order], real[order], fake[order]).gradient, dmd_gradient(x0, real, fake).gradient[order])
    close(critic_loss(fake[order], x0[order], real[order]), critic_loss(fake, x0, real)[order])
    assert critic_loss(flow_target(x0, real), x0, real).max() == 0


@SETTINGS
@given(shape=shapes, seed=seeds)
def test_the_loss_has_the_closed_form_as_its_derivative(shape, seed):
    x0, gradient = draw(shape, seed, 2)
    x0.requires_grad_(True)
    dmd_loss(x0, gradient).backward()
    close(x0.grad, dmd_loss_gradient(gradient))


@SETTINGS
@given(shape=shapes, seed=seeds, scale=st.floats(0, 20, allow_subnormal=False), per_frame=st.booleans())
def test_guidance_of_flows_is_guidance_of_x0(shape, seed, scale, per_frame):
    noisy, cond, uncond = draw(shape, seed, 3)
    sigma = levels(shape, seed, per_frame)
    of_flow = x0_from_flow(noisy, guide(cond, uncond, scale), sigma)
    of_x0 = guide(x0_from_flow(noisy, cond, sigma), x0_from_flow(noisy, uncond, sigma), scale)
    close(of_flow, of_x0)
    close(guide(cond, cond, scale), cond)


@SETTINGS
@given(frames=st.integers(-5, 400))
def test_the_nearest_video_lengths_are_valid(frames):
    try:
        check_num_frames(frames)
    except ValueError as error:
        below, above = (int(word) for word in str(error).split("nearest ")[1].split(" and "))
        check_num_frames(below)
        check_num_frames(above)
        assert above - below == 4 and (below < frames < above or frames < 1)
    else:
        assert 4 * (latent_frames(frames) - 1) + 1 == frames


@SETTINGS
@given(frames=st.integers(1, 200), size=st.integers(1, 12), first=st.booleans())
def test_the_nearest_block_counts_are_whole_blocks(frames, size, first):
    rollout = Rollout(num_frame_per_block=size, independent_first_frame=first)
    near = rollout.nearest_blocks(frames)
    if near is None:
        assert (frames - first) % size == 0 and frames > first
    else:
        assert [rollout.nearest_blocks(count) for count in near] == [None, None]
        assert near[1] - near[0] == size and near[0] > 0
        assert near[0] < frames < near[1] or frames < size + first


@SETTINGS
@given(
    pixels=st.integers(64, 4096),
    wide=st.integers(1, 30),
    high=st.integers(1, 30),
    multiple=st.sampled_from([8, 16, 32]),
)
def test_a_resolution_is_near_its_area_and_aspect(pixels, wide, high, multiple):
    height, width = parse_resolution(pixels, f"{wide}:{high}", multiple, key="resolution")
    assert height % multiple == width % multiple == 0 and min(height, width) >= multiple
    exact = pixels * math.sqrt(high / wide), pixels * math.sqrt(wide / high)
    for edge, wanted in zip((height, width), exact, strict=True):
        assert abs(edge - wanted) <= multiple / 2 + 1e-6 or edge == multiple
    assert parse_resolution(f"{width}x{height}", "16:9", multiple, key="resolution") == (height, width)
