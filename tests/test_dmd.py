"""DMD maths against the public reference's numbers (tests/golden) and against values derived by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from dmdtrain.dmd import (
    critic_loss,
    dmd_gradient,
    dmd_loss,
    dmd_loss_gradient,
    guide,
    sample_score_timesteps,
    score_timestep_range,
    warp_score_timestep,
)
from dmdtrain.flow import add_noise, sigma_from_timestep, x0_from_flow
from dmdtrain.models.roles import Roles
from dmdtrain.train.setup import resolve_timesteps

GOLDEN = Path(__file__).parent / "golden" / "wan_dmd_reference"
REFERENCE = json.loads(GOLDEN.with_suffix(".json").read_text())
TENSORS = load_file(GOLDEN.with_suffix(".safetensors"))
CASES = ["mid", "clamp", "noshift", "fakecfg", "mid_table5"]
SHAPE = (2, 16, 3, 4, 5)  # [B, C, T, H, W], no two alike
STORED = 2e-7  # rounding of the stored float32, relative


def latents(name: str) -> torch.Tensor:
    """Stored [B, T, C, H, W] -> [B, C, T, H, W], float64."""
    return TENSORS[name].double().permute(0, 2, 1, 3, 4)


class Case:
    """One of the reference's cases, and our numbers for it with a sigma for noising and one for the scores."""

    def __init__(self, name: str):
        self.name = name
        self.x, self.noise = latents("D.x"), latents("D.noise")
        self.guidance = self.scalar("guidance")
        self.k = torch.tensor(self.scalar("k"))
        self.sigma_gen = torch.tensor(self.scalar("sigma_gen"), dtype=torch.float64)
        self.sigma_score = torch.tensor(self.scalar("sigma_score"), dtype=torch.float64)
        self.exact_sigma = sigma_from_timestep(self.timestep(torch.float64))

    def scalar(self, key: str):
        return REFERENCE["scalars"][f"D.{self.name}.{key}"]

    def stored(self, key: str) -> torch.Tensor:
        return latents(f"D.{self.name}.{key}")

    def timestep(self, dtype: torch.dtype) -> torch.Tensor:
        return warp_score_timestep(self.k.to(dtype), shift=self.scalar("timestep_shift"))

    def noisy(self, sigma: torch.Tensor) -> torch.Tensor:
        return add_noise(self.x, self.noise, sigma)

    def x0(self, model: str, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Guided x0 of `real` or `fake`; the reference's `cond + w (cond - uncond)` is w + 1 in standard form."""
        cond, uncond = (x0_from_flow(noisy, latents(f"D.flow_{model}_{which}"), sigma) for which in ("cond", "uncond"))
        return guide(cond, uncond, self.guidance[f"{model}_guidance_scale"] + 1)

    def gradient(self, sigma_gen: torch.Tensor, sigma_score: torch.Tensor) -> torch.Tensor:
        noisy = self.noisy(sigma_gen)
        real, fake = (self.x0(model, noisy, sigma_score) for model in ("real", "fake"))
        return dmd_gradient(self.x, real, fake).gradient


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


def close(ours: torch.Tensor, stored: torch.Tensor, rtol: float = STORED) -> None:
    """Agreement relative to the largest entry."""
    assert ours.shape == stored.shape
    torch.testing.assert_close(ours, stored.to(ours.dtype), rtol=0, atol=rtol * float(stored.abs().max()))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# The reference's numbers


def test_score_timesteps_of_the_reference(case):
    expected = TENSORS[f"D.{case.name}.timestep"]
    close(case.timestep(torch.float32), expected)
    close(warp_score_timestep(case.k, shift=case.scalar("timestep_shift")), expected)  # integers become float32
    assert case.name != "clamp" or expected.tolist() == [20, 980]


@pytest.mark.parametrize("shift", [5, 8])
def test_the_whole_warp_table(shift):
    ours = warp_score_timestep(torch.arange(1000), shift=shift, min_timestep=20, max_timestep=980)
    close(ours, TENSORS[f"D.timestep_warp.shift{shift}"])
    assert float(ours.min()) == 20 and float(ours.max()) == 980


@pytest.mark.parametrize("shift", [1, 5, 8])
@pytest.mark.parametrize("steps", [[1000, 757, 522], [1000, 750, 500, 250]], ids=["3", "4"])
def test_denoising_lists_through_a_shift(shift, steps):
    stored = TENSORS[f"D.warp.shift{shift}.{'_'.join(map(str, steps))}"].tolist()
    assert resolve_timesteps(steps, shift) == pytest.approx(stored, abs=2e-4)  # theirs comes from a float32 table


def test_noisy_latents_to_rounding(case):
    close(case.noisy(case.sigma_gen), case.stored("noisy"))
    close(add_noise(case.x.float(), case.noise.float(), case.sigma_gen).double(), case.stored("noisy"))


def test_exact_sigma_against_the_table(case):
    """The table's entry is the nearest one to the timestep: exactly it where the warp hits the grid."""
    error = (case.noisy(case.exact_sigma) - case.stored("noisy")).abs()
    if case.name in ("mid", "fakecfg", "mid_table5"):
        assert float(error.max()) < 1e-6
    elif case.name == "clamp":  # 20 and 980 lie between entries: sigma is off by up to 3.2e-4
        allowed = 3.2e-4 * (case.noise - case.x).abs() + 1e-6
        assert (error < allowed).all() and float(error.max()) > 1e-4
    else:  # 437 and 871 unwarped
        allowed = 8.1e-4 * (case.noise - case.x).abs() + 1e-6
        assert (error < allowed).all() and float(error.max()) > 1e-4


def test_x0_predictions(case):
    noisy = case.noisy(case.sigma_gen)
    cond = x0_from_flow(noisy, latents("D.flow_real_cond"), case.sigma_score)
    close(cond, case.stored("x0_real_cond"))
    close(case.x0("real", noisy, case.sigma_score), case.stored("x0_real_cfg"))
    close(x0_from_flow(noisy, latents("D.flow_fake_cond"), case.sigma_score), case.stored("x0_fake_cond"))


def test_guidance_on_flow_is_guidance_on_x0(case):
    """The step guides the flow, the reference the x0."""
    noisy = case.noisy(case.sigma_gen)
    flow = guide(latents("D.flow_real_cond"), latents("D.flow_real_uncond"), 4.0)
    close(x0_from_flow(noisy, flow, case.sigma_score), case.stored("x0_real_cfg"))


def test_gradient_loss_and_its_derivative(case):
    gradient = case.gradient(case.sigma_gen, case.sigma_score)
    close(gradient, case.stored("kl_grad"))
    assert float(gradient.abs().mean()) == pytest.approx(case.scalar("dmdtrain_gradient_norm"), rel=1e-7)
    x = case.x.clone().requires_grad_()
    loss = dmd_loss(x, gradient)
    assert float(loss.detach()) == pytest.approx(case.scalar("loss"), rel=1e-7)
    (by_autograd,) = torch.autograd.grad(loss, x)
    close(by_autograd, case.stored("dloss_dx"))
    close(dmd_loss_gradient(gradient), case.stored("dloss_dx"))


def test_gradient_in_float32(case):
    sigma_gen, sigma_score = case.sigma_gen.float(), case.sigma_score.float()
    noisy = add_noise(case.x.float(), case.noise.float(), sigma_gen)
    x0 = {}
    for model in ("real", "fake"):
        cond, uncond = (latents(f"D.flow_{model}_{which}").float() for which in ("cond", "uncond"))
        flow = guide(cond, uncond, case.guidance[f"{model}_guidance_scale"] + 1)
        x0[model] = x0_from_flow(noisy, flow, sigma_score)
    gradient = dmd_gradient(case.x.float(), x0["real"], x0["fake"]).gradient
    assert gap(dmd_loss_gradient(gradient).double(), case.stored("dloss_dx")) < 2e-5


def test_gradient_with_exact_sigma(case):
    """Our step uses one exact sigma for noising and scores. It cancels where the reference's two tables agree."""
    ours = case.gradient(case.exact_sigma, case.exact_sigma)
    assert gap(ours, case.stored("kl_grad")) == pytest.approx(
        case.scalar("rel_diff_if_exact_sigma=t/1000"), rel=1e-2, abs=1e-7
    )


def test_critic_loss_of_the_reference(case):
    plain = case.scalar("critic_flow_loss_plain mean((flow-(noise-x))^2)")
    flow = latents("D.flow_fake_cond")
    ours = critic_loss(flow, case.x, case.noise)
    assert ours.shape == (2,)
    assert float(ours.mean()) == pytest.approx(plain, rel=1e-12)
    # The reference's own number is ours of a flow that its two tables have rescaled.
    by_tables = flow * (case.sigma_score / case.sigma_gen).view(2, 1, 1, 1, 1)
    close(by_tables, case.stored("critic_flow_pred"))
    reference = case.scalar("critic_flow_loss")
    assert float(critic_loss(by_tables, case.x, case.noise).mean()) == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("name", ["real", "student"])
def test_wan_forward_of_the_reference(name):
    model = WanTransformer3DModel(**REFERENCE["diffusers_config"])
    prefix = f"weights.{name}."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in TENSORS.items() if k.startswith(prefix)})
    roles = Roles(model, trained={})
    with torch.no_grad():
        out = roles.flow("teacher", TENSORS["A.x"], TENSORS["A.t"], TENSORS["in.context"])
    torch.testing.assert_close(out, TENSORS[f"A.{name}.out"], rtol=0, atol=3e-5)
    other = TENSORS[f"A.{'student' if name == 'real' else 'real'}.out"]
    assert float((out - other).abs().max()) > 0.1, "the weights make a difference"


# By hand


def test_guide_is_in_standard_form():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert [float(guide(cond, uncond, scale)) for scale in (0, 1, 3, 4.5)] == [1, 3, 7, 10]


def test_gradient_by_hand():
    x0 = torch.tensor([[1.0, -1.0], [0.0, 8.0]]).view(2, 1, 2, 1, 1)
    real = torch.tensor([[0.0, 2.0], [4.0, 0.0]]).view(2, 1, 2, 1, 1)  # |x0 - real|: 1, 3 and 4, 8
    fake = torch.tensor([[1.0, 0.0], [4.0, -12.0]]).view(2, 1, 2, 1, 1)  # fake - real: 1, -2 and 0, -12
    gradient, normaliser = dmd_gradient(x0, real, fake)
    assert normaliser.tolist() == [2, 6]
    assert gradient.view(2, 2).tolist() == [[0.5, -1], [0, -2]]
    assert float(dmd_loss(x0, gradient)) == 0.5 * (0.25 + 1 + 0 + 4) / 4
    assert dmd_loss_gradient(gradient).view(2, 2).tolist() == [[0.125, -0.25], [0, -0.5]]


@pytest.fixture
def three() -> tuple[torch.Tensor, ...]:
    """x0, x0_real, x0_fake."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))


def test_every_sample_has_its_own_normaliser(three):
    before = dmd_gradient(*three)
    scaled = [x.clone() for x in three]
    for x in scaled:
        x[0] *= 100
    after = dmd_gradient(*scaled)
    torch.testing.assert_close(after.gradient, before.gradient)  # both samples: the gradient is scale free
    torch.testing.assert_close(after.normaliser, before.normaliser * torch.tensor([100, 1], dtype=torch.float64))
    scaled[1][0] += 7  # the teacher's prediction for sample 0 alone
    other = dmd_gradient(*scaled).gradient
    assert not torch.allclose(other[0], before.gradient[0])
    torch.testing.assert_close(other[1], before.gradient[1])


def test_gradient_points_from_real_to_fake(three):
    """A step against the gradient brings the sample from the fake score's prediction towards the teacher's."""
    x0, real, fake = three
    gradient = dmd_gradient(x0, real, fake).gradient
    assert ((gradient * (fake - real)) >= 0).all() and float(gradient.abs().max()) > 0
    assert torch.equal(dmd_gradient(x0, real, real).gradient, torch.zeros(SHAPE, dtype=torch.float64))


def test_the_normaliser_has_a_floor(three):
    x0, _, fake = three
    real = x0.clone()
    real[1] += 0.5
    gradient, normaliser = dmd_gradient(x0, real, fake)
    assert float(normaliser[0]) == 0
    torch.testing.assert_close(gradient[0], (fake - real)[0] / 1e-8)
    torch.testing.assert_close(gradient[1], (fake - real)[1] / 0.5)
    torch.testing.assert_close(dmd_gradient(x0, real, fake, eps=2.0).gradient, (fake - real) / 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x0", "x0_real", "x0_fake"])
def test_non_finite_numbers_are_not_hidden(three, which, bad):
    three[which][1, 3, 2, 1, 4] = bad
    gradient, normaliser = dmd_gradient(*three)
    assert torch.isfinite(gradient[0]).all() and torch.isfinite(normaliser[0])
    assert not torch.isfinite(dmd_loss(three[0], gradient))
    if which == 2:  # only the numerator
        assert not torch.isfinite(gradient[1, 3, 2, 1, 4])
    else:
        assert not torch.isfinite(normaliser[1])
    if bad != bad and which != 2:
        assert gradient[1].isnan().all()


def test_dmd_loss_has_no_graph_to_the_gradient(three):
    x0, gradient, _ = (x.clone().requires_grad_() for x in three)
    dmd_loss(x0, gradient).backward()
    assert gradient.grad is None
    torch.testing.assert_close(x0.grad, gradient.detach() / gradient.numel())


def test_critic_loss_per_sample_and_only_through_the_prediction(three):
    x0, noise, pred = (x.clone().requires_grad_() for x in three)
    loss = critic_loss(pred, x0, noise)
    for b in range(2):
        torch.testing.assert_close(loss[b], (pred[b] - noise[b] + x0[b]).square().mean())
    loss.sum().backward()
    assert x0.grad is None
    torch.testing.assert_close(pred.grad, 2 * (pred - noise + x0).detach() / pred[0].numel())
    zero = critic_loss((noise - x0).detach(), x0, noise)
    assert zero.tolist() == [0, 0]


# Score timesteps

SCHEDULE = [  # ts_schedule, ts_schedule_max, expected for the exit steps of 1000, 757, 522
    (False, False, [(40, 1000), (40, 1000), (40, 1000)]),
    (True, False, [(757, 1000), (522, 1000), (0, 1000)]),
    (False, True, [(40, 1000), (40, 757), (40, 522)]),
    (True, True, [(757, 1000), (522, 757), (0, 522)]),
]


@pytest.mark.parametrize(("ts_schedule", "ts_schedule_max", "expected"), SCHEDULE)
def test_range_of_score_timesteps(ts_schedule, ts_schedule_max, expected):
    for (start, end), bounds in zip([(1000.0, 757.0), (757.0, 522.0), (522.0, 0.0)], expected, strict=True):
        ours = score_timestep_range(
            start, end, ts_schedule=ts_schedule, ts_schedule_max=ts_schedule_max, min_score_timestep=40
        )
        assert ours == bounds and all(isinstance(bound, int) for bound in ours)


def test_range_of_warped_timesteps_is_rounded():
    bounds = score_timestep_range(939.672, 845.207, ts_schedule=True, ts_schedule_max=True, min_score_timestep=0)
    assert bounds == (845, 940)


@pytest.mark.parametrize(
    ("start", "end", "settings"),
    [
        (522.0, 0.0, dict(ts_schedule=False, ts_schedule_max=True, min_score_timestep=522)),
        (500.4, 499.6, dict(ts_schedule=True, ts_schedule_max=True, min_score_timestep=0)),
        (1000.0, 757.0, dict(ts_schedule=False, ts_schedule_max=False, min_score_timestep=1000)),
    ],
)
def test_an_empty_range_is_an_error(start, end, settings):
    with pytest.raises(ValueError, match=r"no integer in \[\d+, \d+\)"):
        score_timestep_range(start, end, **settings)


def draw(n: int, low: int, high: int, *, seed: int = 0, **changes) -> torch.Tensor:
    settings = dict(shift=1.0, min_timestep=20.0, max_timestep=980.0) | changes
    return sample_score_timesteps(n, torch.Generator().manual_seed(seed), low, high, **settings)


def test_unshifted_score_timesteps_are_the_integers_of_the_range():
    drawn = draw(500, 522, 530)
    assert drawn.shape == (500,) and drawn.is_floating_point()
    assert sorted(set(drawn.tolist())) == [522, 523, 524, 525, 526, 527, 528, 529]


def test_score_timesteps_are_clamped():
    drawn = draw(20_000, 0, 1000)
    assert float(drawn.min()) == 20 and float(drawn.max()) == 980
    at_ends = [int((drawn == t).sum()) for t in (20, 980)]
    assert at_ends == pytest.approx([420, 400], rel=0.25)  # 0..20 are 21 integers, 980..999 are 20, of 1000
    wide = draw(20_000, 0, 1000, min_timestep=0.0, max_timestep=1000.0)
    assert float(wide.min()) == 0 and float(wide.max()) == 999


def test_score_timesteps_follow_their_generator_alone():
    torch.manual_seed(1)
    first = draw(64, 0, 1000, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw(64, 0, 1000, seed=3), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(draw(64, 0, 1000, seed=4), first)
    generator = torch.Generator().manual_seed(3)
    settings = dict(shift=1.0, min_timestep=20.0, max_timestep=980.0)
    twice = [sample_score_timesteps(64, generator, 0, 1000, **settings) for _ in range(2)]
    assert torch.equal(twice[0], first) and not torch.equal(twice[1], first)


def test_samples_of_a_batch_have_their_own_timesteps():
    assert len(set(draw(16, 0, 1000).tolist())) > 10


def test_the_shift_moves_score_timesteps_up():
    """Quantile q of a uniform k in [0, 1000) is at 5q / (1 + 4q)."""
    drawn = draw(20_000, 0, 1000, shift=5.0)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75])
    expected = 5 * quantiles / (1 + 4 * quantiles) * 1000  # 357, 625, 833, 938
    torch.testing.assert_close(drawn.quantile(quantiles), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(draw(20_000, 0, 1000).quantile(quantiles), quantiles * 1000, rtol=0.05, atol=0)


def test_the_shift_comes_before_the_clamp():
    # k = 4 -> 20 k / (1 + 4 * .004) = 19.69 -> 20; clamped first it would be 20 -> 92.6
    assert warp_score_timestep(torch.tensor([4]), shift=5.0).tolist() == [20]
    assert float(warp_score_timestep(torch.tensor([500]), shift=5.0)) == pytest.approx(2500 / 3, rel=1e-6)
