"""The causal rollout: replay backward against one graph over the whole video, in float64, for every parameter."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml
from conftest import tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.config import build as build_config
from dmdtrain.flow import add_noise, sigma_from_timestep
from dmdtrain.models.causal import CausalView, KVCache, TeacherForcingView
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.rollout import BlockLayout, draw_noise, predict_x0, replay_backward, rollout, sample
from dmdtrain.train.step import Distiller, student_denoiser

STEPS = [1000.0, 757.0, 522.0]
SPEC = AdapterSpec(4, 8, ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"))


def build(full: bool, checkpointing: bool) -> Roles:
    return Roles(
        tiny_transformer().double(),
        trained={"student": None if full else SPEC, "fake_score": SPEC},
        full_dtype=torch.float64,
        adapter_dtype=torch.float64,
        causal=True,
        gradient_checkpointing=checkpointing,
        init_lora_weights=False,
    )


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in roles.named_parameters("student").items() if p.grad is not None}
    for p in roles.parameters("student"):
        p.grad = None
    return found


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("sizes", "exits", "context_timestep", "checkpointing"),
    [
        ((2, 2, 2), [2, 0, 1], 0.0, False),
        ((1, 2, 3), [1, 1, 1], 0.0, True),
        ((3, 3), [2, 2], 150.0, False),
        ((6,), [1], 0.0, True),
    ],
)
def test_replay_equals_one_graph_with_constant_context(full, sizes, exits, context_timestep, checkpointing):
    roles = build(full, checkpointing)
    layout = BlockLayout(sizes)
    generator = torch.Generator().manual_seed(3)
    noise = draw_noise(3 + (context_timestep > 0), (2, 4, 6, 4, 6), generator).double()
    context = torch.randn(2, 9, 16, dtype=torch.float64, generator=generator)
    grad_x0 = torch.randn(2, 4, 6, 4, 6, dtype=torch.float64, generator=generator)

    student = student_denoiser(roles, context, KVCache(), nullcontext)
    result = rollout(student, noise, STEPS, layout, exits, context_timestep=context_timestep)
    assert not result.x0.requires_grad
    # Another role runs in between, as in training.
    roles.flow("fake_score", result.x0, torch.full((2,), 500.0), context)
    replay_backward(student, result.records, grad_x0)
    replayed = gradients(roles)

    # One graph: every block's exit step keeps its graph until a single backward over the whole video.
    cache = KVCache()
    blocks = []
    for frames, exit_step in zip(layout.slices, exits, strict=True):

        def denoise(latents, timestep, *, frames, write_cache=False):
            return roles.flow("student", latents, timestep, context, CausalView(cache, frames, write_cache))

        x = noise[0, :, :, frames]
        for step in range(exit_step):
            with torch.no_grad():
                x0 = predict_x0(denoise, x, STEPS[step], frames)
            sigma = torch.full((2,), sigma_from_timestep(STEPS[step + 1]), dtype=torch.float64)
            x = add_noise(x0, noise[step + 1, :, :, frames], sigma)
        x0 = predict_x0(denoise, x, STEPS[exit_step], frames)
        blocks.append(x0)
        with torch.no_grad():
            sigma = torch.full((2,), context_timestep / 1000, dtype=torch.float64)
            seen = add_noise(x0, noise[-1, :, :, frames], sigma) if context_timestep else x0
            denoise(seen, torch.full((2,), context_timestep), frames=frames, write_cache=True)
    video = torch.cat(blocks, 2)
    assert torch.allclose(video, result.x0, atol=1e-12)
    video.backward(grad_x0)
    whole = gradients(roles)

    assert whole.keys() == replayed.keys() and len(whole) == len(roles.parameters("student"))
    for name, wanted in whole.items():
        assert torch.allclose(replayed[name], wanted, rtol=1e-8, atol=1e-11), name


@torch.no_grad()
def test_later_blocks_depend_on_earlier_ones_and_not_the_other_way_round():
    roles = build(False, False)
    noise = draw_noise(3, (1, 4, 6, 4, 6), torch.Generator().manual_seed(0)).double()
    context = torch.randn(1, 9, 16, dtype=torch.float64)

    def run(noise):
        student = student_denoiser(roles, context, KVCache(), nullcontext)
        return torch.cat(list(sample(student, lambda f: noise[:, :, :, f], STEPS, BlockLayout((3, 3)))), 2)

    one = run(noise)
    for changed, first_same, second_same in ((slice(0, 3), False, False), (slice(3, 6), True, False)):
        other = noise.clone()
        other[0, :, :, changed] += 1
        two = run(other)
        assert torch.equal(one[:, :, :3], two[:, :, :3]) == first_same
        assert torch.equal(one[:, :, 3:], two[:, :, 3:]) == second_same


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"independent_first_frame": True, "same_step_across_blocks": True},
        {"local_attention_frames": 3, "sink_frames": 1},
    ],
)
def test_fit_validate_and_go_on_beyond_training(settings, tmp_path, changes):
    frames = 5 if "independent_first_frame" in changes else 4
    settings["rollout"] = {"causal": True, "num_frame_per_block": 2, "num_training_frames": frames, "context_noise": 10}
    settings["rollout"] |= changes
    settings["validation"]["num_frames"] = 17 if frames == 5 else 13
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    runner = CliRunner()
    result = runner.invoke(app, ["fit", str(file)], catch_exceptions=False)
    assert result.exit_code == 0 and "warm-up" in result.output
    ckpt = str(tmp_path / "run" / "checkpoints" / "step-000004")
    video = str(tmp_path / "long.mp4")
    made = runner.invoke(
        app,
        ["generate", "--ckpt", ckpt, "a dog", "--out", video, "--frames", "33" if frames == 5 else "37"],
        catch_exceptions=False,
    )
    assert made.exit_code == 0, made.output
    exported = runner.invoke(app, ["export-lora", "--ckpt", ckpt, "--out", str(tmp_path / "lora.safetensors")])
    assert exported.exit_code == 0 and not (tmp_path / "lora_scheduler").exists()


# Every option of the rollout, through a whole update


def one_graph(roles, draws, context, *, cache, context_timestep) -> torch.Tensor:
    """x0 of the whole video, with a graph from every block's exit step and none from what is seen of earlier blocks."""

    def denoise(latents, timestep, *, frames, write_cache=False):
        return roles.flow("student", latents, timestep, context, CausalView(cache, frames, write_cache))

    def noised(x0, noise, timestep):
        return (1 - timestep / 1000) * x0 + timestep / 1000 * noise

    blocks = []
    for frames, exit_step in zip(draws.layout.slices, draws.exit_steps, strict=True):
        noise = draws.noise[:, :, :, frames]
        x = noise[0]
        for step in range(exit_step):
            with torch.no_grad():
                x = noised(predict_x0(denoise, x, STEPS[step], frames), noise[step + 1], STEPS[step + 1])
        blocks.append(predict_x0(denoise, x, STEPS[exit_step], frames))
        with torch.no_grad():
            seen = noised(blocks[-1], noise[-1], context_timestep)
            denoise(seen, torch.full((len(x),), context_timestep), frames=frames, write_cache=True)
    return torch.cat(blocks, 2)


ALL = {
    "independent_first_frame": True,
    "context_noise": 120,
    "local_attention_frames": 4,
    "sink_frames": 1,
    "num_gradient_frames": 4,
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local_attention_frames": 3, "sink_frames": 1},
        {"local_attention_frames": 2},
        {"same_step_across_blocks": True},
        {"last_step_only": True},
        {"independent_first_frame": True},
        {"context_noise": 150},
        {"num_gradient_frames": 4},
        {"num_gradient_frames": 2, "local_attention_frames": 4},
        ALL,
    ],
    ids=lambda options: "all" if options is ALL else ",".join(options) or "none",
)
def test_an_update_is_the_gradient_of_one_graph_with_every_option(full, options):
    frames = 7 if "independent_first_frame" in options else 6
    config = build_config(
        {
            "train": {"mixed_precision": "no"},
            "dmd": {"real_score_guidance_scale": 1},  # guided flows are float32
            "rollout": {"causal": True, "num_training_frames": frames, "num_frame_per_block": 2} | options,
            "validation": {"num_frames": 4 * frames - 3},
        }
    )
    roles = build(full, checkpointing=not full)
    generator = torch.Generator().manual_seed(8)
    context, uncond = torch.randn(3, 9, 16, generator=generator).double().split([2, 1])
    distiller = Distiller(roles, config, STEPS, (4, frames, 4, 6), uncond)
    draws = distiller.draw(2, generator)
    draws = replace(draws, **{key: getattr(draws, key).double() for key in ("noise", "score_noise", "score_timestep")})
    fixed = "same_step_across_blocks" in options or "last_step_only" in options
    assert (len(set(draws.exit_steps)) == 1) == fixed and draws.layout.sizes == (1,) * (frames - 6) + (2, 2, 2)
    distiller.student_backward(context, draws)
    ours = gradients(roles)

    cache = KVCache(options.get("local_attention_frames"), options.get("sink_frames", 0))
    video = one_graph(roles, draws, context, cache=cache, context_timestep=options.get("context_noise", 0.0))
    scored = video[:, :, -options.get("num_gradient_frames", frames) :]
    t = draws.score_timestep
    s = (t / 1000).view(2, 1, 1, 1, 1)
    with torch.no_grad():
        noisy = (1 - s) * scored + s * draws.score_noise
        real, fake = (noisy - s * roles.flow(name, noisy, t, context) for name in ("teacher", "fake_score"))
        gradient = (fake - real) / (scored - real).abs().mean((1, 2, 3, 4), keepdim=True)
    (scored * gradient).mean().backward()
    wanted = gradients(roles)
    assert wanted.keys() == ours.keys() and len(wanted) == len(roles.parameters("student"))
    for name, grad in wanted.items():
        assert float(grad.abs().max()) > 0, name
        torch.testing.assert_close(ours[name], grad, rtol=1e-7, atol=1e-10 * float(grad.abs().max()))


# What the gradient does not go through, and what it costs


def rolled_out(roles, sizes, exits, cache, *, size=(4, 6), batch=2):
    """The student, its rollout and a gradient of the rollout's x0."""
    generator = torch.Generator().manual_seed(9)
    shape = (batch, 4, sum(sizes), *size)
    noise = draw_noise(3, shape, generator).double()
    context, grad_x0 = (torch.randn(x, generator=generator).double() for x in ((batch, 9, 16), shape))
    student = student_denoiser(roles, context, cache, nullcontext)
    return student, context, rollout(student, noise, STEPS, BlockLayout(sizes), exits), grad_x0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("sizes", "exits"), [((1, 2, 3), [1, 2, 0]), ((6,), [1])])
def test_a_gradient_through_the_cached_context_would_be_seen(full, sizes, exits):
    """One pass over [clean | noisy] makes the same video, and keeps the graph of the context's keys and values."""
    roles = build(full, checkpointing=not full)
    student, context, result, grad_x0 = rolled_out(roles, sizes, exits, KVCache())
    replay_backward(student, result.records, grad_x0)
    ours = gradients(roles)

    noisy = torch.cat([record.noisy for record in result.records], 2)
    timestep = torch.tensor([STEPS[exit_step] for exit_step in exits], dtype=torch.float64)
    timestep = timestep.repeat_interleave(torch.tensor(sizes)).expand(2, -1)
    both = torch.cat([result.x0, noisy], 2), torch.cat([torch.zeros_like(timestep), timestep], 1)
    view = TeacherForcingView(tuple(BlockLayout(sizes).slices))
    x0 = noisy - timestep[:, None, :, None, None] / 1000 * roles.flow("student", *both, context, view)[:, :, 6:]
    assert torch.allclose(x0, result.x0, atol=1e-10, rtol=0)
    x0.backward(grad_x0)
    leaking = gradients(roles)
    for name in (name for name in ours if "attn1.to_k" in name or "attn1.to_v" in name):
        apart = float((leaking[name] - ours[name]).norm() / ours[name].norm())
        assert apart > 1e-2 if len(sizes) > 1 else apart < 1e-8, (name, apart)


class Spy(KVCache):
    def __init__(self):
        super().__init__()
        self.writes: list[tuple[int, slice]] = []

    def write(self, layer, frames, keys, values):
        assert not (torch.is_grad_enabled() or keys.requires_grad or values.requires_grad)
        self.writes.append((layer, frames))
        super().write(layer, frames, keys, values)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_finished_blocks_are_written_once_and_never_by_the_replay(full, checkpointing):
    roles, cache = build(full, checkpointing), Spy()
    student, _, result, grad_x0 = rolled_out(roles, (1, 2, 3), [1, 2, 0], cache)
    assert cache.writes == [(layer, frames) for frames in (slice(0, 1), slice(1, 3)) for layer in range(2)]

    def held():
        return [x for layer in range(2) for pair in cache.read(layer, slice(6, 7)) for x in pair]

    before = [x.clone() for x in held()]
    replay_backward(student, result.records, grad_x0)
    assert len(cache.writes) == 4 and len(before) == 2 * 2 * 2
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, held(), strict=True))


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that were made inside and are still held: by graphs, by recomputed layers, by anything.

    Hooks on saved tensors would not do: gradient checkpoints have hooks of their own, which take their place.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}  # 0: there before
        self.now = self.peak = 0

    def _see(self, values, made: bool) -> None:
        for storage in (x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)):
            if (key := storage._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes() if made else 0
                self.now += self.sizes[key]
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._see((args, kwargs), made=False)
        result = function(*args, **(kwargs or {}))
        self._see(result, made=True)
        self.peak = max(self.peak, self.now)
        return result


def finished(roles, blocks: int, local: int | None, sink: int):
    """A student with its context written, its records and a gradient."""
    student, _, result, grad_x0 = rolled_out(
        roles, (2,) * blocks, [0] * blocks, KVCache(local, sink), size=(8, 12), batch=1
    )
    return student, result.records, grad_x0


def bytes_of_replay(student, records, grad_x0) -> int:
    with LiveBytes() as live:
        replay_backward(student, records, grad_x0)
    return live.peak


def bytes_of_one_graph(student, records, grad_x0) -> tuple[int, int]:
    """What is held when the backward begins, and the most."""
    with LiveBytes() as live:
        video = torch.cat([predict_x0(student, r.noisy, r.timestep, r.frames) for r in records], 2)
        held = live.now
        video.backward(grad_x0)
    return held, live.peak


@pytest.fixture(scope="module")
def measured() -> Roles:
    """Gradients are there before anything is measured, and small."""
    roles = build(full=False, checkpointing=True)
    for p in roles.parameters("student"):
        p.grad = torch.zeros_like(p)
    return roles


BLOCKS = (3, 7, 14, 28)


@pytest.mark.usefixtures("one_thread")
def test_memory_of_the_replay_does_not_grow_with_the_video_in_a_rolling_window(measured):
    replay, held, most = [], [], []
    for blocks in BLOCKS:
        case = finished(measured, blocks, local=5, sink=1)
        replay.append(bytes_of_replay(*case))
        for values, value in zip((held, most), bytes_of_one_graph(*case), strict=True):
            values.append(value)
    assert held[-1] > 7 * held[0], held
    assert most[-1] > 3 * most[0], most  # one layer's recompute is in both
    assert max(replay) < 1.05 * min(replay), replay


@pytest.mark.usefixtures("one_thread")
def test_without_a_window_it_grows_by_one_layers_context(measured):
    replay = [bytes_of_replay(*finished(measured, blocks, local=None, sink=0)) for blocks in BLOCKS]
    copy = 2 * 24 * (2 * 24) * 8  # keys and values of a block: dim 24, 2 frames of 24 tokens, float64
    for (fewer, less), (more, most) in pairwise(zip(BLOCKS, replay, strict=True)):
        assert (most - less) / (more - fewer) < 1.3 * 2 * copy, replay  # the copy and, in the backward, its gradient
