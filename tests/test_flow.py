"""Flow-matching algebra against values derived by hand."""

from __future__ import annotations

import pytest
import torch

from dmdtrain.flow import (
    add_noise,
    flow_from_x0,
    flow_target,
    shift_sigma,
    shift_timestep,
    sigma_from_timestep,
    x0_from_flow,
)

SHAPE = (2, 16, 3, 4, 5)  # [B, C, T, H, W], no two alike
PER_SAMPLE = torch.tensor([0.25, 0.875])
PER_FRAME = torch.tensor([[0.5, 0.25, 0.125], [1.0, 0.75, 0.375]])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def sigma_at(sigma: torch.Tensor, b: int, t: int) -> float:
    return float(sigma[b] if sigma.ndim == 1 else sigma[b, t])


def test_sigma_is_a_thousandth_of_the_timestep():
    assert [sigma_from_timestep(t) for t in (0.0, 757.0, 1000.0)] == [0.0, 0.757, 1.0]
    assert torch.equal(sigma_from_timestep(torch.tensor([522.0, 20.0])), torch.tensor([0.522, 0.02]))


def test_shift_of_a_half_by_five():
    assert shift_sigma(0.5, 5.0) == pytest.approx(5 / 6, rel=1e-15)  # 2.5 / 3


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_shift_keeps_both_ends(shift):
    assert shift_sigma(0.0, shift) == 0.0
    assert shift_sigma(1.0, shift) == 1.0


def test_shift_of_one_changes_nothing():
    sigma = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)


def test_shift_is_undone_by_its_inverse():
    sigma = torch.linspace(0, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 8.0), 1 / 8), sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(5.0, [1000, 10000 / 11, 5000 / 7]), (8.0, [1000, 16000 / 17, 800])],  # 1000/909/714 and 1000/941/800
)
def test_uniform_three_step_lists(shift, expected):
    assert [shift_timestep(t, shift) for t in (1000.0, 2000 / 3, 1000 / 3)] == pytest.approx(expected, rel=1e-14)
    shifted = shift_timestep(torch.tensor([1000.0, 2000 / 3, 1000 / 3], dtype=torch.float64), shift)
    assert shifted.tolist() == pytest.approx(expected, rel=1e-14)


def test_noising_by_hand():
    x0 = torch.full((2, 1, 1, 1, 1), 4.0)
    noise = torch.full((2, 1, 1, 1, 1), -8.0)
    noisy = add_noise(x0, noise, torch.tensor([0.25, 0.75]))
    assert noisy.flatten().tolist() == [1.0, -5.0]  # .75 * 4 - .25 * 8 and .25 * 4 - .75 * 8


@pytest.mark.parametrize("sigma", [PER_SAMPLE, PER_FRAME], ids=["per_sample", "per_frame"])
def test_noising_takes_each_sigma_to_its_own_sample_and_frame(pair, sigma):
    x0, noise = pair
    noisy = add_noise(x0, noise, sigma)
    for b in range(SHAPE[0]):
        for t in range(SHAPE[2]):
            s = sigma_at(sigma, b, t)
            torch.testing.assert_close(noisy[b, :, t], (1 - s) * x0[b, :, t] + s * noise[b, :, t])


def test_noising_at_the_ends(pair):
    x0, noise = pair
    assert torch.equal(add_noise(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(add_noise(x0, noise, torch.ones(2)), noise)


def test_flow_target_is_the_derivative_of_the_noised_latents(pair):
    x0, noise = (p.double() for p in pair)
    sigma = PER_SAMPLE.double()
    slope = (add_noise(x0, noise, sigma + 0.125) - add_noise(x0, noise, sigma)) / 0.125
    torch.testing.assert_close(flow_target(x0, noise), slope)
    assert float(flow_target(torch.tensor(3.0), torch.tensor(1.0))) == -2.0


@pytest.mark.parametrize("sigma", [PER_SAMPLE, PER_FRAME], ids=["per_sample", "per_frame"])
def test_the_true_flow_leads_back_to_x0(pair, sigma):
    x0, noise = pair
    noisy = add_noise(x0, noise, sigma)
    torch.testing.assert_close(x0_from_flow(noisy, flow_target(x0, noise), sigma), x0, rtol=0, atol=2e-6)
    torch.testing.assert_close(flow_from_x0(noisy, x0, sigma), flow_target(x0, noise), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma", [PER_SAMPLE, PER_FRAME], ids=["per_sample", "per_frame"])
def test_x0_and_flow_round_trip_for_any_prediction(pair, sigma):
    noisy, flow = (p.double() for p in pair)
    x0 = x0_from_flow(noisy, flow, sigma.double())
    for b in range(SHAPE[0]):
        for t in range(SHAPE[2]):
            torch.testing.assert_close(x0[b, :, t], noisy[b, :, t] - sigma_at(sigma, b, t) * flow[b, :, t])
    torch.testing.assert_close(flow_from_x0(noisy, x0, sigma.double()), flow, rtol=1e-12, atol=1e-12)


def test_bf16_latents_are_noised_in_float32_and_rounded_once(pair):
    x0, noise = (p.bfloat16() for p in pair)
    sigma = torch.tensor([0.757, 0.522])
    noisy = add_noise(x0, noise, sigma)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, add_noise(x0.float(), noise.float(), sigma).bfloat16())
    s = sigma.bfloat16().view(2, 1, 1, 1, 1)
    assert not torch.equal(noisy, (1 - s) * x0 + s * noise), "rounding at every operation gives other numbers"


def test_predictions_of_bf16_models_become_float32(pair):
    noisy, flow = pair
    low = flow.bfloat16()
    sigma = torch.tensor([0.757, 0.522])
    assert torch.equal(x0_from_flow(noisy, low, sigma), x0_from_flow(noisy, low.float(), sigma))
    both_low = x0_from_flow(noisy.bfloat16(), low, sigma.bfloat16())
    assert both_low.dtype == flow_from_x0(noisy.bfloat16(), low, sigma).dtype == torch.float32


def test_float64_stays_float64(pair):
    x0, noise = (p.double() for p in pair)
    sigma = torch.tensor([0.757, 0.522], dtype=torch.float64)
    noisy = add_noise(x0, noise, sigma)
    assert noisy.dtype == x0_from_flow(noisy, noise, sigma).dtype == flow_from_x0(noisy, x0, sigma).dtype == x0.dtype
    expected = x0[1] * (1 - 0.522) + noise[1] * 0.522
    torch.testing.assert_close(noisy[1], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (2, 3, 1)])
def test_a_sigma_of_another_shape_is_refused(pair, shape):
    x0, noise = pair
    for function in (add_noise, x0_from_flow, flow_from_x0):
        with pytest.raises(ValueError, match=r"must be \[B\] or \[B, T\]"):
            function(x0, noise, torch.full(shape, 0.5))
