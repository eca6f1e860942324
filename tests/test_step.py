"""One update: against DMD written by hand in one graph, and the randomness that goes into it."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from conftest import tiny_transformer
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dmdtrain.config import build
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.train.step import Distiller, Draws, x0_figures

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
SPECS = {"student": AdapterSpec(3, 6.0, TARGETS), "fake_score": AdapterSpec(2, 5.0, TARGETS)}
TIMESTEPS = [1000.0, 757.0, 522.0]
SHAPE = (4, 3, 4, 6)  # [C, T, H, W]
UPDATES = {"student": "student_backward", "fake_score": "critic_backward"}
OTHER = {"student": "fake_score", "fake_score": "student"}

_generator = torch.Generator().manual_seed(11)
CONTEXT = torch.randn(6, 7, 16, generator=_generator)  # [n, L, D]
UNCOND = torch.randn(1, 7, 16, generator=_generator)


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def shared_roles(checkpointing: bool, causal: bool) -> Roles:
    """Two adapters on one base, made once: an update leaves gradients and nothing else."""
    base = tiny_transformer()
    torch.manual_seed(101)
    options = dict(gradient_checkpointing=checkpointing, causal=causal)
    return Roles(base, trained=SPECS, init_lora_weights=False, **options)


def make(
    settings: dict | None = None,
    *,
    uncond: torch.Tensor = UNCOND,
    timesteps: list[float] = TIMESTEPS,
    shape: tuple[int, int, int, int] = SHAPE,
    checkpointing: bool = True,
    **options,
) -> Distiller:
    settings = {"train": {"mixed_precision": "no"}} | (settings or {})
    config = build(settings | {"rollout": {"num_training_frames": shape[1]} | settings.get("rollout", {})})
    if options:
        base = tiny_transformer()
        torch.manual_seed(101)
        options = {"trained": SPECS, "init_lora_weights": False, "gradient_checkpointing": checkpointing} | options
        roles = Roles(base, **options)
    else:
        roles = shared_roles(checkpointing, config.rollout.causal)
        for name in SPECS:
            for p in roles.parameters(name):
                p.grad = None
    return Distiller(roles, config, timesteps, shape, uncond)


def draw(distiller: Distiller, n: int = 6, seed: int = 3) -> Draws:
    return distiller.draw(n, torch.Generator().manual_seed(seed))


def at_exit(distiller: Distiller, exit_step: int, n: int = 6) -> Draws:
    """Draws whose rollout leaves at `exit_step`."""
    seed = next(seed for seed in range(100) if draw(distiller, 1, seed).exit_steps == [exit_step])
    draws = draw(distiller, n, seed)
    assert draws.exit_steps == [exit_step]  # drawn first, whatever the number of videos
    return draws


def gradients(distiller: Distiller, name: str) -> dict[str, torch.Tensor]:
    """The role's gradients, which are there and are not zero; cleared."""
    own = distiller.roles.named_parameters(name)
    assert all(p.grad is not None for p in own.values())
    found = {key: p.grad.clone() for key, p in own.items()}
    for p in own.values():
        p.grad = None
    assert all(g.any() for g in found.values())
    return found


def update(distiller: Distiller, name: str, draws: Draws, weight: float = 1.0, context: torch.Tensor = CONTEXT) -> dict:
    return getattr(distiller, UPDATES[name])(context, draws, weight)[0]


def run(settings: dict | None, name: str, draws: Draws | None = None, **options) -> dict[str, torch.Tensor]:
    """Gradients of one update of a fresh Distiller."""
    distiller = make(settings, **options)
    update(distiller, name, draw(distiller) if draws is None else draws)
    return gradients(distiller, name)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Distance in units of b."""
    assert a.keys() == b.keys()
    square = sum((a[key] - b[key]).double().square().sum() for key in a)
    return float((square / sum(b[key].double().square().sum() for key in b)).sqrt())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def dmd(**values) -> dict:
    return {"dmd": values}


# ---------------------------------------------------------------------------------------------------- the reference


class ByHand:
    """DMD as the papers write it: models of their own, one graph, no micro-batches, no closed form."""

    def __init__(self, distiller: Distiller):
        self.models: dict[str, nn.Module] = {"teacher": tiny_transformer()}
        self.own: dict[str, dict[str, nn.Parameter]] = {}
        for name, spec in SPECS.items():
            model = tiny_transformer().requires_grad_(False)
            config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))
            inject_adapter_in_model(config, model)
            self.models[name] = model
            self.own[name] = {k.replace(".default.", "."): p for k, p in model.named_parameters() if ".lora_" in k}
            for key, value in distiller.roles.named_parameters(name).items():
                self.own[name][key].data.copy_(value.data)

    def x0(self, name: str, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x - (t / 1000).view(-1, 1, 1, 1, 1) * self.models[name](x, t, context, return_dict=False)[0]

    def guided_x0(self, name: str, x: torch.Tensor, t: torch.Tensor, scale: float) -> torch.Tensor:
        cond = self.models[name](x, t, CONTEXT, return_dict=False)[0]
        uncond = self.models[name](x, t, UNCOND.repeat(len(x), 1, 1), return_dict=False)[0]
        return x - (t / 1000).view(-1, 1, 1, 1, 1) * (uncond + scale * (cond - uncond))

    def generate(self, draws: Draws) -> torch.Tensor:
        """Student samples, with a graph at the exit step."""
        x = draws.noise[0]
        for step in range(draws.exit_steps[0] + 1):
            last = step == draws.exit_steps[0]
            with torch.set_grad_enabled(last):
                x0 = self.x0("student", x, torch.full((len(x),), TIMESTEPS[step]), CONTEXT)
            if not last:
                sigma = TIMESTEPS[step + 1] / 1000
                x = (1 - sigma) * x0 + sigma * draws.noise[step + 1]
        return x0

    def student_loss(self, draws: Draws, real_scale: float, fake_scale: float) -> torch.Tensor:
        x0 = self.generate(draws)
        with torch.no_grad():
            s = (draws.score_timestep / 1000).view(-1, 1, 1, 1, 1)
            noisy = (1 - s) * x0 + s * draws.score_noise
            real = self.guided_x0("teacher", noisy, draws.score_timestep, real_scale)
            fake = self.guided_x0("fake_score", noisy, draws.score_timestep, fake_scale)
            gradient = (fake - real) / (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        return 0.5 * functional.mse_loss(x0, (x0 - gradient).detach())

    def critic_loss(self, draws: Draws) -> torch.Tensor:
        x0 = self.generate(draws).detach()
        s = (draws.score_timestep / 1000).view(-1, 1, 1, 1, 1)
        noisy = (1 - s) * x0 + s * draws.score_noise
        seen = torch.stack([UNCOND[0] if u else c for u, c in zip(draws.uncaptioned, CONTEXT, strict=True)])
        flow = self.models["fake_score"](noisy, draws.score_timestep, seen, return_dict=False)[0]
        return functional.mse_loss(flow, draws.score_noise - x0)

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        return {key: p.grad for key, p in self.own[name].items()}


@pytest.mark.parametrize("exit_step", [0, 1, 2])
@pytest.mark.parametrize(("real", "fake"), [(3.0, 0.0), (4.5, 2.0)])
def test_the_student_gradient_is_that_of_one_graph(real, fake, exit_step):
    distiller = make(dmd(real_score_guidance_scale=real, fake_score_guidance_scale=fake))
    draws = at_exit(distiller, exit_step)
    stats = update(distiller, "student", draws)
    by_hand = ByHand(distiller)
    loss = by_hand.student_loss(draws, real, fake or 1.0)
    loss.backward()
    assert apart(gradients(distiller, "student"), by_hand.gradients("student")) < 1e-5
    torch.testing.assert_close(stats["dmd_loss"], loss.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_the_fake_score_gradient_is_that_of_one_graph(exit_step):
    distiller = make({"data": {"caption_dropout": 0.4}})
    draws = at_exit(distiller, exit_step)
    assert 0 < draws.uncaptioned.sum() < 6
    stats = update(distiller, "fake_score", draws)
    by_hand = ByHand(distiller)
    loss = by_hand.critic_loss(draws)
    loss.backward()
    assert apart(gradients(distiller, "fake_score"), by_hand.gradients("fake_score")) < 1e-5
    torch.testing.assert_close(stats["critic_loss"], loss.detach(), rtol=1e-5, atol=0)


def test_what_the_student_reports():
    distiller = make()
    draws = draw(distiller)
    stats = update(distiller, "student", draws)
    by_hand = ByHand(distiller)
    with torch.no_grad():
        x0 = by_hand.generate(draws)
        s = (draws.score_timestep / 1000).view(-1, 1, 1, 1, 1)
        noisy = (1 - s) * x0 + s * draws.score_noise
        real = by_hand.guided_x0("teacher", noisy, draws.score_timestep, 3.0)
        fake = by_hand.x0("fake_score", noisy, draws.score_timestep, CONTEXT)
        normaliser = (x0 - real).abs().flatten(1).mean(1)
    wanted = {
        "dmd_normaliser": normaliser.mean(),
        "dmd_gradient_norm": ((fake - real).flatten(1).norm(dim=1) / normaliser).mean(),
        "fake_real_gap": (fake - real).square().mean(),
        "x0_mean": x0.mean(),
        "x0_std": x0.std(),
        "x0_diversity": torch.cdist(*[x0.flatten(1)] * 2).square().sum().div(6 * 5 * x0[0].numel()).sqrt(),
    }
    stats = x0_figures(stats, 6)
    for key, value in wanted.items():
        torch.testing.assert_close(stats[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert all(value.ndim == 0 for value in stats.values())
    assert not any(value.requires_grad for value in stats.values())


# ---------------------------------------------------------------------------------------------------- micro-batches


CAUSAL = {"rollout": {"causal": True, "num_training_frames": 3, "num_frame_per_block": 1, "context_noise": 150}}


@pytest.mark.parametrize("rollout", ["one block", "causal"])
@pytest.mark.parametrize("micro", [1, 2, 3, 4])
@pytest.mark.parametrize("name", UPDATES)
def test_micro_batches_equal_one_batch(name, micro, rollout):
    """4 does not divide 6: a smaller last micro-batch counts by its share."""
    settings = dmd(fake_score_guidance_scale=2.0) | {"data": {"caption_dropout": 0.4}}
    distiller = make(settings | (CAUSAL if rollout == "causal" else {}))
    draws = draw(distiller)
    assert 0 < draws.uncaptioned.sum() < 6
    whole = update(distiller, name, draws)
    wanted = gradients(distiller, name)
    loss = torch.zeros(())
    for start in range(0, 6, micro):
        stop = min(6, start + micro)
        weight = (stop - start) / 6
        stats = update(distiller, name, draws.rows(start, stop), weight, CONTEXT[start:stop])
        loss += weight * stats["dmd_loss" if name == "student" else "critic_loss"]
    got = gradients(distiller, name)
    assert apart(got, wanted) < 2e-6
    for key in wanted:
        assert (got[key] - wanted[key]).norm() < 1e-5 * wanted[key].norm(), key
    torch.testing.assert_close(loss, whole["dmd_loss" if name == "student" else "critic_loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", UPDATES)
def test_the_weight_scales_the_gradient_and_adds_to_what_is_there(name):
    distiller = make()
    draws = draw(distiller)
    whole = update(distiller, name, draws)
    wanted = gradients(distiller, name)
    quarter = update(distiller, name, draws, 0.25)
    assert apart(gradients(distiller, name), {key: g / 4 for key, g in wanted.items()}) < 1e-6
    assert all(torch.equal(quarter[key], whole[key]) for key in whole)  # what is reported is not weighted
    update(distiller, name, draws)
    update(distiller, name, draws, 0.5)
    assert apart(gradients(distiller, name), {key: 1.5 * g for key, g in wanted.items()}) < 1e-6


def test_rows_of_draws():
    draws = draw(make({"data": {"caption_dropout": 0.5}}))
    part = draws.rows(1, 3)
    assert part.exit_steps == draws.exit_steps and part.layout == draws.layout
    assert part.noise.shape == (3, 2, *SHAPE)
    for name, axis in (("noise", 1), ("score_noise", 0), ("score_timestep", 0), ("uncaptioned", 0)):
        whole = getattr(draws, name)
        assert torch.equal(getattr(part, name), whole.narrow(axis, 1, 2)), name
        parts = [getattr(draws.rows(start, start + 2), name) for start in (0, 2, 4)]
        assert torch.equal(torch.cat(parts, axis), whole), name


# ---------------------------------------------------------------------------------------------------- who is trained


KINDS = {
    "two adapters": {},
    "another teacher": {"teacher": 3},
    "full student": {"trained": SPECS | {"student": None}},
    "full fake score": {"trained": SPECS | {"fake_score": None}},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_gives_gradients_to_its_role_alone(name, kind, checkpointing):
    options = dict(KINDS[kind])
    if "teacher" in options:
        options["teacher"] = tiny_transformer(9, num_layers=options["teacher"])
    distiller = make(dmd(fake_score_guidance_scale=2.0), checkpointing=checkpointing, **options)
    update(distiller, name, draw(distiller))
    roles = distiller.roles
    assert all(p.grad is not None and p.grad.any() for k, p in roles.named_parameters(name).items() if "lora_" in k)
    assert any(p.grad is not None and p.grad.any() for p in roles.parameters(name))
    mine = {id(p) for p in roles.parameters(name)}
    for role in roles.roles.values():
        assert all(p.grad is None for p in role.module.parameters() if id(p) not in mine)


def test_another_teacher_is_what_the_student_follows():
    wanted = run(None, "student")
    assert apart(run(None, "student", teacher=tiny_transformer(9, num_layers=3)), wanted) > 0.1
    assert apart(run(None, "student", teacher=tiny_transformer()), wanted) < 1e-5
    critic = run(None, "fake_score")
    assert equal(run(None, "fake_score", teacher=tiny_transformer(9, num_layers=3)), critic)


@pytest.mark.parametrize("name", UPDATES)
def test_checkpointing_changes_no_gradient(name):
    assert apart(run(None, name, checkpointing=True), run(None, name, checkpointing=False)) < 1e-6


def test_mixed_precision_is_close_and_not_the_same():
    for name in UPDATES:
        exact = run(None, name)
        mixed = run({"train": {"mixed_precision": "bf16"}}, name)
        assert all(g.dtype == torch.float32 for g in mixed.values())
        assert 1e-4 < apart(mixed, exact) < 0.2, name


# ---------------------------------------------------------------------------------------------------- guidance, captions


@pytest.mark.parametrize("key", ["real_score_guidance_scale", "fake_score_guidance_scale"])
def test_guidance_of_0_and_1_is_off(key):
    """At 0 and 1 the negative prompt does not matter either."""
    off = run(dmd(**{key: 0.0}), "student")
    assert equal(run(dmd(**{key: 1.0}), "student"), off)
    assert apart(run(dmd(**{key: 1.000001}), "student"), off) < 1e-3  # standard form: 1 is the conditional flow
    assert apart(run(dmd(**{key: 1.5}), "student"), off) > 0.01
    other = {"real_score_guidance_scale": 1.0, "fake_score_guidance_scale": 1.0}
    assert equal(run(dmd(**other), "student", uncond=2 * UNCOND), run(dmd(**other), "student"))
    on = other | {key: 3.0}
    assert apart(run(dmd(**on), "student", uncond=2 * UNCOND), run(dmd(**on), "student")) > 0.01


def test_real_and_fake_guidance_are_two_settings():
    real = run(dmd(real_score_guidance_scale=3.0, fake_score_guidance_scale=1.0), "student")
    fake = run(dmd(real_score_guidance_scale=1.0, fake_score_guidance_scale=3.0), "student")
    assert apart(real, fake) > 0.1


def test_guidance_is_no_part_of_the_fake_scores_own_update():
    wanted = run(dmd(fake_score_guidance_scale=1.0), "fake_score")
    assert equal(run(dmd(fake_score_guidance_scale=3.0, real_score_guidance_scale=1.0), "fake_score"), wanted)


def with_uncaptioned(draws: Draws, rows: list[bool]) -> Draws:
    return replace(draws, uncaptioned=torch.tensor(rows))


def test_uncaptioned_rows_see_the_negative_prompt():
    """The fake score alone: the student that made the sample was given the caption."""
    distiller = make()
    draws = draw(distiller)
    rows = [False, True, True, False, False, True]
    update(distiller, "fake_score", with_uncaptioned(draws, rows))
    mixed = gradients(distiller, "fake_score")
    # Row by row; each caption or none, by hand.
    by_hand = ByHand(distiller)
    by_hand.critic_loss(with_uncaptioned(draws, rows)).backward()
    assert apart(mixed, by_hand.gradients("fake_score")) < 1e-5
    for other in ([False] * 6, [True] * 6, [not row for row in rows]):
        update(distiller, "fake_score", with_uncaptioned(draws, other))
        assert apart(gradients(distiller, "fake_score"), mixed) > 1e-3
    distiller.uncond = 2 * UNCOND
    update(distiller, "fake_score", with_uncaptioned(draws, [False] * 6))
    captioned = gradients(distiller, "fake_score")
    distiller.uncond = UNCOND
    update(distiller, "fake_score", with_uncaptioned(draws, [False] * 6))
    assert equal(gradients(distiller, "fake_score"), captioned)


def test_the_student_is_always_given_its_caption():
    distiller = make()
    draws = draw(distiller)
    update(distiller, "student", with_uncaptioned(draws, [False] * 6))
    wanted = gradients(distiller, "student")
    update(distiller, "student", with_uncaptioned(draws, [True] * 6))
    assert equal(gradients(distiller, "student"), wanted)
    update(distiller, "student", draws, context=CONTEXT.flip(0))
    assert apart(gradients(distiller, "student"), wanted) > 0.01


# ---------------------------------------------------------------------------------------------------- draws


POINT = (1, 1, 2, 2)  # [C, T, H, W] where only the draws count


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_caption_dropout_is_a_share(share):
    drawn = draw(make({"data": {"caption_dropout": share}}, shape=POINT), 4000).uncaptioned
    assert drawn.dtype == torch.bool
    assert float(drawn.float().mean()) == pytest.approx(share, abs=0.03 if share else 0)


def timesteps_by_exit(distiller: Distiller) -> dict[int, torch.Tensor]:
    return {step: at_exit(distiller, step, 3000).score_timestep for step in range(len(distiller.timesteps))}


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({}, [(757, 980), (522, 980), (20, 980)]),
        ({"ts_schedule_max": True}, [(757, 980), (522, 756), (20, 521)]),
        ({"ts_schedule": False}, [(20, 980)] * 3),
        ({"ts_schedule": False, "min_score_timestep": 300}, [(300, 980)] * 3),
        ({"ts_schedule": False, "ts_schedule_max": True, "min_score_timestep": 300}, [(300, 980), (300, 756), (300, 521)]),
        ({"min_timestep_ratio": 0.6, "max_timestep_ratio": 0.9}, [(757, 900), (600, 900), (600, 900)]),
        # Before the shift of 5, s / (5 - 4 s): 757 -> 384, 522 -> 179. 384, 383, 179, 178 -> 757.1, 756.3, 521.6, 519.9.
        ({"timestep_shift": 5.0}, [(757.1, 980), (521.56, 980), (20, 980)]),
        ({"timestep_shift": 5.0, "ts_schedule_max": True}, [(757.1, 980), (521.56, 756.32), (20, 519.86)]),
        ({"timestep_shift": 0.5, "ts_schedule_max": True}, [(757, 980), (522, 756.9), (20, 521.9)]),
        # The bound that is no timestep of the student stays one before the shift: 300 -> 681.82.
        ({"timestep_shift": 5.0, "ts_schedule": False, "min_score_timestep": 300}, [(681.82, 980)] * 3),
    ],
)  # fmt: skip
def test_the_exit_step_bounds_the_score_timesteps(settings, bounds):
    drawn = timesteps_by_exit(make(dmd(**settings), shape=POINT))
    for exit_step, (low, high) in enumerate(bounds):
        found = drawn[exit_step]
        assert found.dtype == torch.float32
        # The shift makes steps at its low end wider than 1.
        assert low - 0.01 <= found.min() <= low + 5, exit_step
        assert high - 5 <= found.max() <= high + 0.01, exit_step
        if settings.get("timestep_shift", 1.0) == 1.0:
            torch.testing.assert_close(found, found.round(), rtol=1e-6, atol=0)


def test_a_warped_list_is_scored_as_the_reference_scores_it():
    """Self-Forcing with 1000/757/522 warped by 5, score shift 5 and both schedules: its integers lie between 757 and 522."""
    distiller = make(dmd(timestep_shift=5.0, ts_schedule_max=True), shape=POINT)
    distiller.timesteps = [1000.0, 939.6723, 845.2073]
    for exit_step, (low, high) in enumerate([(939.7, 980), (845.2, 939.4), (20, 844.7)]):
        found = at_exit(distiller, exit_step, 30000).score_timestep
        assert (float(found.min()), float(found.max())) == pytest.approx((low, high), abs=0.05), exit_step


def test_score_timesteps_are_uniform_before_the_shift():
    drawn = at_exit(make(shape=POINT), 2, 3000).score_timestep  # 0 ... 999, clamped to 20 ... 980
    counts = torch.histc(drawn, 5, 0, 1000)
    assert counts.min() > 500 and counts.max() < 700
    drawn = at_exit(make(dmd(timestep_shift=5.0), shape=POINT), 2, 3000).score_timestep
    assert float((drawn < 5 / 6 * 1000).float().mean()) == pytest.approx(0.5, abs=0.04)  # sigma 1/2 goes to 5/6


def test_every_video_has_its_own_score_timestep_and_noise():
    draws = draw(make())
    assert len(set(draws.score_timestep.tolist())) > 1
    assert draws.noise.shape == (3, 6, *SHAPE) and draws.score_noise.shape == (6, *SHAPE)
    flat = torch.cat([draws.noise.flatten(0, 1), draws.score_noise]).flatten(1)
    assert len(set(flat[:, 0].tolist())) == len(flat) == 24
    assert float(flat.std()) == pytest.approx(1, abs=0.05)


def test_exit_steps():
    distiller = make(shape=POINT)
    generator = torch.Generator().manual_seed(0)
    drawn = [distiller.draw(1, generator).exit_steps for _ in range(300)]
    assert all(len(steps) == 1 for steps in drawn)  # one block
    counts = [drawn.count([i]) for i in range(3)]
    assert sum(counts) == 300 and min(counts) > 70
    last = make({"rollout": {"last_step_only": True}}, shape=POINT)
    assert all(last.draw(1, generator).exit_steps == [2] for _ in range(50))
    one = make(timesteps=[1000.0], shape=POINT)
    assert one.draw(1, generator).exit_steps == [0]


@pytest.mark.parametrize(
    ("settings", "layouts"),
    [
        # One block: any number of frames, and nothing to noise in a cache.
        ({"min_training_frames": 2, "context_noise": 100}, {(2,), (3,), (4,), (5,)}),
        ({"causal": True, "min_training_frames": 3}, {(1, 2), (1, 2, 2)}),
        ({"causal": True, "min_training_frames": 3, "num_gradient_frames": 4}, {(1, 2), (1, 2, 2)}),
        ({"causal": True, "num_gradient_frames": 2, "context_noise": 100}, {(1, 2, 2)}),
    ],
    ids=lambda p: ", ".join(p) if isinstance(p, dict) else "",
)
def test_lengths_are_drawn_in_whole_blocks(settings, layouts):
    blocks = {"num_frame_per_block": 2, "independent_first_frame": True}
    distiller = make({"rollout": blocks | settings, "validation": {"num_frames": 17}}, shape=(1, 5, 2, 2))
    generator = torch.Generator().manual_seed(0)
    drawn = [distiller.draw(2, generator) for _ in range(200)]
    sizes = [draws.layout.sizes for draws in drawn]
    assert set(sizes) == layouts
    assert min(sizes.count(each) for each in layouts) > 100 / len(layouts)
    for draws in drawn:
        frames = draws.layout.num_frames
        scored = min(frames, settings.get("num_gradient_frames", frames))
        assert draws.noise.shape == (3 + (settings.keys() >= {"causal", "context_noise"}), 2, 1, frames, 2, 2)
        assert draws.score_noise.shape == (2, 1, scored, 2, 2)
        assert len(draws.exit_steps) == len(draws.layout.sizes)


def identical(a: Draws, b: Draws) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Draws)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_draws_come_from_the_generator_alone():
    settings = {"data": {"caption_dropout": 0.5}}
    distiller = make(settings)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(distiller, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # and take nothing from the global one
    torch.manual_seed(2)
    assert identical(draw(make(settings, timesteps=list(TIMESTEPS)), seed=3), first)
    assert not identical(draw(distiller, seed=4), first)
    generator = torch.Generator().manual_seed(3)
    assert identical(distiller.draw(6, generator), first)
    assert not identical(distiller.draw(6, generator), first)
    # Settings that scale what is drawn do not move what comes after it.
    guided = draw(make(settings | dmd(real_score_guidance_scale=7.0, timestep_shift=5.0)), seed=3)
    assert torch.equal(guided.score_noise, first.score_noise)
    assert torch.equal(guided.uncaptioned, first.uncaptioned)


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_deterministic_and_takes_no_randomness(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    distiller = make()
    draws = draw(distiller)
    torch.set_rng_state(state)
    update(distiller, name, draws)
    assert torch.equal(torch.get_rng_state(), state)
    first = gradients(distiller, name)
    update(distiller, OTHER[name], draws)  # what the other role does in between leaves no trace
    gradients(distiller, OTHER[name])
    torch.manual_seed(7)
    update(distiller, name, draws)
    assert equal(gradients(distiller, name), first)


class _Waits(TorchDispatchMode):
    """What makes a host wait for a device: numbers that Python sees, and results whose size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().removeprefix("aten::").split(".")[0] in self.NAMES:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rollout", [{}, {"causal": True, "num_frame_per_block": 1}], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", SPECS)
def test_the_host_waits_for_nothing_within_an_update(name, rollout):
    distiller = make({"rollout": rollout})
    draws = draw(distiller)
    with _Waits() as waits:
        getattr(distiller, UPDATES[name])(CONTEXT, draws)
    assert waits.found == []
    with _Waits() as waits:
        float(CONTEXT.sum())
    assert waits.found == ["aten::_local_scalar_dense"]  # it would be seen


def test_a_prompts_keys_and_values_are_computed_once_in_a_rollout():
    distiller = make({"rollout": {"causal": True, "num_frame_per_block": 1}})
    student = distiller.roles.roles["student"].module
    calls: list[bool] = []
    hook = student.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    try:
        distiller._roll_out(distiller._student(CONTEXT), draw(distiller))
    finally:
        hook.remove()
    assert calls == [False]  # of three blocks, two passes each and one that writes the cache
