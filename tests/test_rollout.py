"""The rollout, its replay and the sampler, on real tiny Wan models in float64, against loops written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_transformer

from dmdtrain.dmd import dmd_loss, dmd_loss_gradient
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.rollout import BlockLayout, draw_exit_steps, draw_noise, replay_backward, rollout, sample

SHAPE = (2, 4, 6, 4, 8)  # [B, C, T, H, W]
TIMESTEPS = [1000.0, 757.0, 522.0]
BLOCKS = [(6,), (1, 3, 2), (2, 2, 2)]
EXITS = [(0,), (1,), (2,), (2, 0, 1), (0, 1, 2)]  # per block
CASES = [(sizes, exits) for sizes in BLOCKS for exits in EXITS if len(sizes) == len(exits)]

Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # latents [B, C, T, H, W], timestep [B, T] -> flow


class Student(NamedTuple):
    flow: Flow
    parameters: dict[str, torch.nn.Parameter]

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """What has been accumulated; clears it."""
        grads = {name: p.grad for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.grad = None
        return grads


def per_token(timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, tokens] for patches of 1 x 2 x 2."""
    return timestep.repeat_interleave(latents.shape[3] // 2 * (latents.shape[4] // 2), dim=1)


@pytest.fixture(scope="module")
def context() -> torch.Tensor:
    return normal(2, 7, 16, seed=90)


@pytest.fixture(scope="module")
def full(context) -> Student:
    model = tiny_transformer(3).double()

    def flow(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return model(latents, per_token(timestep, latents), context, return_dict=False)[0]

    return Student(flow, dict(model.named_parameters()))


@pytest.fixture(scope="module")
def lora(context) -> Student:
    """Student and fake score on one base, gradient checkpointing on."""
    spec = AdapterSpec(3, 5.0, ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"))
    torch.manual_seed(4)
    roles = Roles(
        tiny_transformer(3).double(),
        trained={"student": spec, "fake_score": spec},
        adapter_dtype=torch.float64,
        gradient_checkpointing=True,
        init_lora_weights=False,
    )

    def flow(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return roles.flow("student", latents, timestep, context)

    return Student(flow, roles.named_parameters("student"))


class Call(NamedTuple):
    latents: torch.Tensor
    timestep: torch.Tensor
    frames: slice
    write_cache: bool
    with_graph: bool


class Recorder:
    """A denoiser over the real model, which sees what finished blocks wrote and then its block. Keeps every call."""

    def __init__(self, flow: Flow):
        self.flow = flow
        self.calls: list[Call] = []
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []  # latents [B, C, t, H, W], timestep [B, t]

    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, *, frames: slice, write_cache: bool = False
    ) -> torch.Tensor:
        self.calls.append(Call(latents, timestep, frames, write_cache, torch.is_grad_enabled()))
        times = timestep[:, None].expand(-1, latents.shape[2])
        if write_cache:
            self.written.append((latents, times))
            return torch.full_like(latents, float("nan"))  # not to be used
        past = torch.cat([x for x, _ in self.written] + [latents[:, :, :0]], 2)[:, :, : frames.start]
        past_times = torch.cat([t for _, t in self.written] + [times[:, :0]], 1)[:, : frames.start]
        return self.flow(torch.cat([past, latents], 2), torch.cat([past_times, times], 1))[:, :, frames.start :]

    @property
    def steps(self) -> list[Call]:
        return [call for call in self.calls if not call.write_cache]

    @property
    def writes(self) -> list[Call]:
        return [call for call in self.calls if call.write_cache]


def by_hand(
    flow: Flow,
    noise: torch.Tensor,
    sizes: Sequence[int],
    exits: Sequence[int],
    *,
    context_timestep: float = 0.0,
    context_noise: torch.Tensor | None = None,
    through_all_steps: bool = False,
    through_context: bool = False,
) -> torch.Tensor:
    """x0 of the whole video in one graph, with gradients of the exit steps only; the two switches are common mistakes."""
    blocks, past, past_times, start = [], [], [], 0
    for size, last in zip(sizes, exits, strict=True):
        stop = start + size
        x = noise[0, :, :, start:stop]
        for i in range(last + 1):
            with torch.set_grad_enabled(i == last or through_all_steps):
                times = [*past_times, torch.full((2, size), TIMESTEPS[i], dtype=noise.dtype)]
                predicted = flow(torch.cat([*past, x], 2), torch.cat(times, 1))[:, :, start:]
                x0 = x - TIMESTEPS[i] / 1000 * predicted
                if i < last:
                    s = TIMESTEPS[i + 1] / 1000
                    x = (1 - s) * x0 + s * noise[i + 1, :, :, start:stop]
        blocks.append(x0)
        seen = x0 if through_context else x0.detach()
        if context_noise is not None:
            c = context_timestep / 1000
            seen = (1 - c) * seen + c * context_noise[:, :, start:stop]
        past.append(seen)
        past_times.append(torch.full((2, size), context_timestep, dtype=noise.dtype))
        start = stop
    return torch.cat(blocks, 2)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def noise() -> torch.Tensor:
    return normal(len(TIMESTEPS), *SHAPE, seed=91)


# Block layout


def test_a_single_block():
    layout = BlockLayout.single(21)
    assert layout.sizes == (21,) and layout.num_frames == 21 and layout.slices == [slice(0, 21)]


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((21, 3), (3, 3, 3, 3, 3, 3, 3)),
        ((6, 2), (2, 2, 2)),
        ((31, 3, True), (1, *[3] * 10)),
        ((1, 3, True), (1,)),
    ],
)
def test_equal_blocks(arguments, sizes):
    layout = BlockLayout.blocks(*arguments)
    assert layout.sizes == sizes and layout.num_frames == arguments[0]


def test_slices_tile_the_frames():
    layout = BlockLayout((1, 3, 2))
    assert layout.slices == [slice(0, 1), slice(1, 4), slice(4, 6)]
    assert torch.equal(torch.cat([torch.arange(6)[s] for s in layout.slices]), torch.arange(6))


@pytest.mark.parametrize("arguments", [(31, 3), (21, 3, True), (2, 3)])
def test_frames_that_do_not_divide_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{arguments[0]} latent frames do not divide into blocks of 3"):
        BlockLayout.blocks(*arguments)


@pytest.mark.parametrize("sizes", [(), (3, 0, 3), (-1,)])
def test_a_block_without_frames_is_refused(sizes):
    with pytest.raises(ValueError, match="at least one latent frame"):
        BlockLayout(sizes)


# What is drawn


def test_exit_steps_are_drawn_per_block():
    drawn = draw_exit_steps(3000, 3, torch.Generator().manual_seed(0))
    assert len(drawn) == 3000 and all(type(step) is int for step in drawn)
    assert [drawn.count(step) for step in range(3)] == pytest.approx([1000] * 3, rel=0.15)
    assert set(drawn) == {0, 1, 2}


def test_exit_steps_of_one_block_take_all_values():
    generator = torch.Generator().manual_seed(0)
    assert {tuple(draw_exit_steps(1, 3, generator)) for _ in range(50)} == {(0,), (1,), (2,)}


def test_same_step_in_every_block():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_exit_steps(4, 3, generator, same_step=True) for _ in range(50)]
    assert all(len(steps) == 4 and len(set(steps)) == 1 for steps in drawn)
    assert {steps[0] for steps in drawn} == {0, 1, 2}


@pytest.mark.parametrize("same_step", [False, True])
def test_last_step_only(same_step):
    assert draw_exit_steps(4, 3, torch.Generator(), same_step=same_step, last_only=True) == [2, 2, 2, 2]


@pytest.mark.parametrize("options", [{}, {"same_step": True}])
def test_exit_steps_follow_their_generator_alone(options):
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [step for _ in range(20) for step in draw_exit_steps(3, 4, generator, **options)]

    state = torch.get_rng_state()
    assert draw(5) == draw(5) != draw(6)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_what_a_seeded_pipeline_draws_step_by_step():
    shape = (2, 16, 3, 4, 5)
    noise = draw_noise(3, shape, torch.Generator().manual_seed(42))
    torch.manual_seed(42)
    assert torch.equal(noise, torch.stack([torch.randn(shape), torch.randn(shape), torch.randn(shape)]))
    assert noise.dtype == torch.float32 and noise.shape == (3, *shape)


# Rollout


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_rollout_of_one_block_step_by_step(context, noise, exit_step):
    model = tiny_transformer(3).double()

    def flow(x: torch.Tensor, t: float) -> torch.Tensor:
        return model(x, torch.tensor([t, t], dtype=torch.float64), context, return_dict=False)[0]

    def denoise(latents, timestep, *, frames, write_cache=False):
        assert frames == slice(0, 6) and not write_cache
        return model(latents, timestep, context, return_dict=False)[0]

    with torch.no_grad():
        x = noise[0]
        x0 = x - 1.0 * flow(x, 1000.0)
        if exit_step >= 1:
            x = 0.243 * x0 + 0.757 * noise[1]
            x0 = x - 0.757 * flow(x, 757.0)
        if exit_step == 2:
            x = 0.478 * x0 + 0.522 * noise[2]
            x0 = x - 0.522 * flow(x, 522.0)
    result = rollout(denoise, noise, TIMESTEPS, BlockLayout.single(6), [exit_step])
    torch.testing.assert_close(result.x0, x0, rtol=0, atol=1e-10)
    (record,) = result.records
    assert record.frames == slice(0, 6) and record.timestep == TIMESTEPS[exit_step]
    torch.testing.assert_close(record.noisy, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("sizes", "exits"), CASES)
def test_rollout_of_blocks_equals_the_loop_by_hand(full, noise, sizes, exits):
    with torch.no_grad():
        wanted = by_hand(full.flow, noise, sizes, exits)
    result = rollout(Recorder(full.flow), noise, TIMESTEPS, BlockLayout(sizes), exits)
    assert result.x0.shape == SHAPE
    torch.testing.assert_close(result.x0, wanted, rtol=0, atol=1e-10)


def test_blocks_depend_on_their_context_and_not_on_what_follows(full, noise):
    """Without this the comparisons above could not see a context that is lost."""

    def run(noise: torch.Tensor) -> torch.Tensor:
        return rollout(Recorder(full.flow), noise, TIMESTEPS, BlockLayout((1, 3, 2)), (0, 1, 2)).x0

    changed = noise.clone()
    changed[:, :, :, 1:4] += 0.5  # the middle block
    difference = (run(changed) - run(noise)).abs().amax(dim=(0, 1, 3, 4))
    assert difference[0] == 0
    assert (difference[1:] > 1e-3).all()


def test_every_block_but_the_last_writes_its_clean_latents_once(full, noise):
    recorder = Recorder(full.flow)
    layout = BlockLayout((1, 3, 2))
    result = rollout(recorder, noise, TIMESTEPS, layout, (2, 0, 1))
    assert [(c.frames, c.write_cache) for c in recorder.calls] == [
        *[(slice(0, 1), False)] * 3,
        (slice(0, 1), True),
        (slice(1, 4), False),
        (slice(1, 4), True),
        *[(slice(4, 6), False)] * 2,
    ]
    for write in recorder.writes:
        assert write.timestep.tolist() == [0, 0]
        assert torch.equal(write.latents, result.x0[:, :, write.frames])


def test_the_model_is_given_the_resolved_timesteps(full, noise):
    recorder = Recorder(full.flow)
    rollout(recorder, noise, TIMESTEPS, BlockLayout((1, 3, 2)), (2, 0, 1))
    assert [c.timestep.tolist() for c in recorder.steps] == [[t, t] for t in (1000, 757, 522, 1000, 1000, 757)]


def test_context_noise(full, noise):
    noisy = torch.cat([noise, normal(1, *SHAPE, seed=92)])
    recorder = Recorder(full.flow)
    result = rollout(recorder, noisy, TIMESTEPS, BlockLayout((1, 3, 2)), (2, 0, 1), context_timestep=100.0)
    assert len(recorder.writes) == 2
    for write in recorder.writes:
        assert write.timestep.tolist() == [100, 100]
        expected = 0.9 * result.x0[:, :, write.frames] + 0.1 * noisy[-1, :, :, write.frames]
        torch.testing.assert_close(write.latents, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        settings = dict(context_timestep=100.0, context_noise=noisy[-1])
        wanted = by_hand(full.flow, noise, (1, 3, 2), (2, 0, 1), **settings)
        clean = by_hand(full.flow, noise, (1, 3, 2), (2, 0, 1))
    torch.testing.assert_close(result.x0, wanted, rtol=0, atol=1e-10)
    assert float((wanted - clean)[:, :, 1:].abs().max()) > 1e-3


def test_noisy_context_needs_its_noise_and_clean_context_none(full, noise):
    layout = BlockLayout((3, 3))
    with pytest.raises(ValueError, match="does not fit 4 draws"):
        rollout(Recorder(full.flow), noise, TIMESTEPS, layout, (0, 0), context_timestep=100.0)
    with pytest.raises(ValueError, match="does not fit 3 draws"):
        rollout(Recorder(full.flow), torch.cat([noise, noise[:1]]), TIMESTEPS, layout, (0, 0))


def test_records_hold_what_the_exit_steps_saw(full, noise):
    recorder = Recorder(full.flow)
    layout = BlockLayout((1, 3, 2))
    result = rollout(recorder, noise, TIMESTEPS, layout, (2, 0, 1))
    assert [(r.frames, r.timestep) for r in result.records] == list(
        zip(layout.slices, [522.0, 1000.0, 757.0], strict=True)
    )
    for record in result.records:
        at_exit = [c for c in recorder.steps if c.frames == record.frames][-1]
        assert torch.equal(record.noisy, at_exit.latents)
    assert torch.equal(result.records[1].noisy, noise[0, :, :, 1:4])


def test_the_rollout_makes_no_graph(full, noise):
    recorder = Recorder(full.flow)
    result = rollout(recorder, noise, TIMESTEPS, BlockLayout((1, 3, 2)), (2, 0, 1))
    assert not result.x0.requires_grad and not any(r.noisy.requires_grad for r in result.records)
    assert not any(call.with_graph for call in recorder.calls)
    assert torch.is_grad_enabled()


def test_bf16_models_are_rolled_out_in_float32(context):
    roles = Roles(tiny_transformer(3).to(torch.bfloat16), trained={})

    def denoise(latents, timestep, *, frames, write_cache=False):
        assert latents.dtype == timestep.dtype == torch.float32
        flow = roles.flow("teacher", latents, timestep, context)
        assert flow.dtype == torch.bfloat16
        return flow

    noise = draw_noise(3, SHAPE, torch.Generator().manual_seed(1))
    result = rollout(denoise, noise, TIMESTEPS, BlockLayout.single(6), [2])
    assert result.x0.dtype == result.records[0].noisy.dtype == torch.float32


def test_progress_is_told_of_every_step(full, noise):
    ticks = []
    rollout(
        Recorder(full.flow), noise, TIMESTEPS, BlockLayout((1, 3, 2)), (2, 0, 1), on_step=lambda: ticks.append(None)
    )
    assert len(ticks) == 3 + 1 + 2


@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)])
def test_sample_is_the_rollout_through_all_steps(full, noise, sizes):
    layout = BlockLayout(sizes)
    blocks = list(sample(Recorder(full.flow), lambda frames: noise[:, :, :, frames], TIMESTEPS, layout))
    assert [block.shape[2] for block in blocks] == list(sizes)
    sampled = torch.cat(blocks, 2)
    rolled = rollout(Recorder(full.flow), noise, TIMESTEPS, layout, [2] * len(sizes)).x0
    assert torch.equal(sampled, rolled) and not sampled.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(sampled, by_hand(full.flow, noise, sizes, [2] * len(sizes)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("steps", "sizes", "exits", "message"),
    [
        (2, (6,), [0], "does not fit 2 draws"),
        (3, (5,), [0], "and 5 latent frames"),
        (3, (3, 2), [0, 0], "and 5 latent frames"),
        (3, (3, 3), [0], None),
        (3, (6,), [0, 0], None),
    ],
)
def test_sizes_that_do_not_fit_are_refused(full, noise, steps, sizes, exits, message):
    with pytest.raises(ValueError, match=message):
        rollout(Recorder(full.flow), noise, TIMESTEPS[:steps], BlockLayout(sizes), exits)


# Replay


def gradients_by_hand(student: Student, gradient: torch.Tensor, noise, sizes, exits, **mistakes) -> dict:
    """Autograd of the scalar loss over one graph of the whole video."""
    dmd_loss(by_hand(student.flow, noise, sizes, exits, **mistakes), gradient).backward()
    return student.gradients()


def gradients_by_replay(student: Student, gradient: torch.Tensor, noise, sizes, exits) -> dict:
    denoise = Recorder(student.flow)
    result = rollout(denoise, noise, TIMESTEPS, BlockLayout(sizes), exits)
    assert all(grad is None for grad in student.gradients().values()), "nothing is accumulated before the replay"
    replay_backward(denoise, result.records, dmd_loss_gradient(gradient))
    return student.gradients()


def largest_error(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Over all parameters, relative to each one's largest entry."""
    assert ours.keys() == wanted.keys()
    return max(float((ours[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("sizes", "exits"), CASES)
def test_replay_is_autograd_over_one_graph(request, noise, kind, sizes, exits):
    student = request.getfixturevalue(kind)
    gradient = normal(*SHAPE, seed=93)
    wanted = gradients_by_hand(student, gradient, noise, sizes, exits)
    assert all(float(grad.abs().max()) > 0 for grad in wanted.values()), "every parameter takes part"
    ours = gradients_by_replay(student, gradient, noise, sizes, exits)
    assert largest_error(ours, wanted) < 1e-9


@pytest.mark.parametrize("mistake", ["through_all_steps", "through_context"])
def test_a_gradient_through_earlier_steps_or_the_context_would_be_seen(full, noise, mistake):
    gradient = normal(*SHAPE, seed=93)
    ours = gradients_by_replay(full, gradient, noise, (1, 3, 2), (1, 2, 1))
    assert largest_error(ours, gradients_by_hand(full, gradient, noise, (1, 3, 2), (1, 2, 1))) < 1e-9
    wrong = gradients_by_hand(full, gradient, noise, (1, 3, 2), (1, 2, 1), **{mistake: True})
    assert largest_error(ours, wrong) > 1e-2


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_the_gradient_is_the_exit_steps_alone(full, noise, exit_step):
    """One forward of the exit step's input, taken as a constant, has all of the gradient."""
    gradient = normal(*SHAPE, seed=94)
    ours = gradients_by_replay(full, gradient, noise, (6,), (exit_step,))
    (record,) = rollout(Recorder(full.flow), noise, TIMESTEPS, BlockLayout.single(6), [exit_step]).records
    timestep = torch.full((2, 6), TIMESTEPS[exit_step], dtype=torch.float64)
    x0 = record.noisy - TIMESTEPS[exit_step] / 1000 * full.flow(record.noisy.detach(), timestep)
    (x0 * gradient / gradient.numel()).sum().backward()
    assert largest_error(ours, full.gradients()) < 1e-9


def test_each_block_gets_its_own_slice_of_the_gradient(full, noise):
    """Where d loss / d x0 is zero outside a block, the other blocks add nothing."""
    sizes, exits = (1, 3, 2), (1, 2, 0)
    gradient = normal(*SHAPE, seed=95)
    whole = gradients_by_replay(full, gradient, noise, sizes, exits)
    total = {name: torch.zeros_like(grad) for name, grad in whole.items()}
    for frames in BlockLayout(sizes).slices:
        alone = torch.zeros_like(gradient)
        alone[:, :, frames] = gradient[:, :, frames]
        part = gradients_by_replay(full, alone, noise, sizes, exits)
        assert largest_error(part, whole) > 1e-2
        for name, grad in part.items():
            total[name] += grad
    assert largest_error(total, whole) < 1e-9


def test_replay_goes_block_by_block_and_adds_to_what_is_there(full, noise):
    """Each block's backward is over before the next block's forward: the graph of one block is held at a time."""
    gradient = normal(*SHAPE, seed=96)
    once = gradients_by_replay(full, gradient, noise, (1, 3, 2), (2, 0, 1))
    denoise = Recorder(full.flow)
    result = rollout(denoise, noise, TIMESTEPS, BlockLayout((1, 3, 2)), (2, 0, 1))
    denoise.calls.clear()
    accumulated = []

    def watched(latents, timestep, *, frames, write_cache=False):
        accumulated.append([None if p.grad is None else p.grad.clone() for p in full.parameters.values()])
        return denoise(latents, timestep, frames=frames, write_cache=write_cache)

    replay_backward(watched, result.records, dmd_loss_gradient(gradient))
    assert [call.frames for call in denoise.calls] == [slice(4, 6), slice(1, 4), slice(0, 1)]
    assert all(call.with_graph and not call.write_cache for call in denoise.calls)
    assert all(grad is None for grad in accumulated[0])
    assert all(grad is not None for grad in accumulated[1])
    assert any(not torch.equal(a, b) for a, b in zip(accumulated[1], accumulated[2], strict=True))
    replay_backward(denoise, result.records, dmd_loss_gradient(gradient))
    assert largest_error(full.gradients(), {name: 2 * grad for name, grad in once.items()}) < 1e-9


def test_a_gradient_of_the_last_frames_leaves_earlier_blocks_out(full, noise):
    """As if it were zero before them; and nothing is run for those blocks."""
    sizes, exits = (1, 3, 2), (1, 2, 0)
    gradient = normal(*SHAPE, seed=97)
    padded = gradient.clone()
    padded[:, :, :4] = 0
    wanted = gradients_by_replay(full, padded, noise, sizes, exits)
    recorder = Recorder(full.flow)
    result = rollout(recorder, noise, TIMESTEPS, BlockLayout(sizes), exits)
    recorder.calls.clear()
    replay_backward(recorder, result.records, dmd_loss_gradient(padded)[:, :, 4:])
    assert [call.frames for call in recorder.calls] == [slice(4, 6)]
    assert largest_error(full.gradients(), wanted) < 1e-9


@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)])
def test_a_kept_graph_gives_the_same_gradient_with_one_forward_less(full, noise, sizes):
    exits = (1, 2, 0)[-len(sizes) :]
    gradient = normal(*SHAPE, seed=98)
    wanted = gradients_by_replay(full, gradient, noise, sizes, exits)
    recorder = Recorder(full.flow)
    result = rollout(recorder, noise, TIMESTEPS, BlockLayout(sizes), exits, keep_last_graph=True)
    assert not result.x0.requires_grad
    assert [record.x0 is not None for record in result.records] == [False] * (len(sizes) - 1) + [True]
    assert [call.with_graph for call in recorder.calls].count(True) == 1
    recorder.calls.clear()
    replay_backward(recorder, result.records, dmd_loss_gradient(gradient))
    assert [call.frames for call in recorder.calls] == BlockLayout(sizes).slices[-2::-1]
    assert largest_error(full.gradients(), wanted) < 1e-9
