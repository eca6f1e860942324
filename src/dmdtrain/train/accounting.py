"""What a run holds in memory: its own code goes through one update of each role, and through validation, on fake tensors, which
have a shape and a type but no memory, while every storage that is alive is counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmdtrain.models import offload
from dmdtrain.models.decode import StreamDecoder
from dmdtrain.models.quantize import empty_quantized, multiply_in_int8
from dmdtrain.models.roles import Roles, cast_weights
from dmdtrain.rollout import Denoiser, sample
from dmdtrain.train.render import BATCH_TOKENS, decode_tiled, guided
from dmdtrain.train.setup import Run, adapter_specs, role_options
from dmdtrain.train.step import (
    Distiller,
    Draws,
    block_layout,
    context_timestep,
    for_sampling,
    new_cache,
    num_draws,
    student_denoiser,
)
from dmdtrain.train.warmup_step import WarmupBatch, warmup_backward


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive and were made inside, on the device: now and at their peak. `host` counts those of
    `models.offload` apart, which lie in host memory where there is a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.host = self.host_peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            size, on_host = storage.nbytes(), offload.on_host()
            if on_host:
                self.host += size
            else:
                self.now += size
            self.peak, self.host_peak = max(self.peak, self.now), max(self.host_peak, self.host)
            weakref.finalize(storage, self._drop, size, on_host)

    def _drop(self, size: int, on_host: bool) -> None:
        if on_host:
            self.host -= size
        else:
            self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def _empty_roles(run: Run, num_layers: int) -> tuple[Roles, nn.Module | None]:
    """The run's roles on the meta device, with transformers of `num_layers` blocks; and a teacher of its own."""
    config = run.config
    specs = adapter_specs(config)

    def transformer(shape: dict[str, Any], precision: str) -> Any:
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(shape | {"num_layers": num_layers})
        cast_weights(model, torch.float32 if precision == "fp32" else torch.bfloat16)
        if precision not in ("fp32", "bf16"):
            for name, layer in list(model.blocks.named_modules()):
                if type(layer) is nn.Linear:
                    parent, _, child = name.rpartition(".")
                    setattr(model.blocks.get_submodule(parent), child, empty_quantized(layer, precision))
        if config.model.int8_matmul:
            multiply_in_int8(model)
        return model

    model = config.model
    base = transformer(run.base.transformer, model.precision)
    teacher = None
    if run.own_teacher:
        teacher = transformer(run.teacher.transformer, model.precision_of_teacher)
    options = role_options(config) | {"compile_backend": None}
    with torch.device("meta"):
        roles = Roles(base, teacher=teacher, trained=specs, **options)
    return roles, teacher


def _materialise(module: nn.Module) -> None:
    """Meta parameters and buffers as (fake) CPU tensors, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass
class Measured:
    """Bytes on the device by item, and above them at the peak of each phase; bytes in host memory at their peak."""

    items: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    host: int = 0
    checkpoint: int = 0  # bytes of what one holds
    warmup_checkpoint: int = 0  # and one of the warm-up's
    teacher_host: int = 0  # of a teacher of its own, part of `host`


def measure(run: Run, num_layers: int) -> Measured:
    """Of a run whose transformers have `num_layers` blocks."""
    config = run.config
    roles, teacher = _empty_roles(run, num_layers)
    live, found = LiveBytes(), Measured()
    items = found.items
    n, paged = config.train.batch_size, 0
    channels, frames, height, width = run.latent_shape
    # Diffusers keeps one backend for the whole process: that of a model which has run on a GPU can not take fake tensors.
    with attention_backend("native"), FakeTensorMode(allow_non_fake_inputs=True), live:
        modules = {id(role.module): role.module for role in roles.roles.values()}
        for module in modules.values():
            _materialise(module)
            before = live.host
            if config.model.offload_blocks:
                offload.stream_blocks(module, torch.device("cpu"))
            if module is teacher:
                found.teacher_host = live.host - before
        trained = {name: roles.parameters(name) for name in ("student", "fake_score")}
        sizes = {name: sum(p.numel() * p.element_size() for p in found) for name, found in trained.items()}
        held = () if teacher is None else (*teacher.parameters(), *teacher.buffers())
        items["teacher"] = sum(t.numel() * t.element_size() for t in held)
        items["base"] = live.now - sum(sizes.values()) - items["teacher"]
        for name, size in sizes.items():
            items[f"{name} weights"] = size
            moments = optimizer_bytes(config.optimizer.name, trained[name])
            found.checkpoint += size + moments
            if name == "student" and config.warmup.kind != "none":
                found.warmup_checkpoint = size + moments
            if config.optimizer.name.startswith("paged"):
                paged += moments
            else:
                items[f"{name} optimizer"] = moments
        average = sum(4 * p.numel() for p in trained["student"]) if config.ema.enabled else 0
        found.checkpoint += average
        if config.ema.keep_on == "device":
            items["average"] = average
        distiller = Distiller(roles, config, run.timesteps, run.latent_shape, torch.empty(1, *_context(run)))
        layout = distiller.layouts[-1]
        draws = Draws(
            layout,
            torch.empty(num_draws(config.rollout, run.timesteps), n, channels, frames, height, width),
            torch.empty(n, channels, config.rollout.scored_frames, height, width),
            torch.full((n,), 500.0),
            torch.zeros(n, dtype=torch.bool),
            [0] * len(layout.sizes),  # every exit costs the same memory, and this one the least time
        )
        context = torch.empty(n, *_context(run))
        peaks = PeakPhases(live, found.phases)
        distiller.phases = peaks  # type: ignore[assignment]

        def accumulated(name: str) -> None:
            """What earlier micro-batches of an update left."""
            if config.train.gradient_accumulation > 1:
                for parameter in trained[name]:
                    parameter.grad = torch.empty_like(parameter)

        accumulated("student")
        _, videos = distiller.student_backward(context, draws)
        if config.dmd.real_data_loss_weight:
            with peaks("real_data"):
                _teach(run, distiller, flow=True)
        for parameter in trained["student"]:
            parameter.grad = None
        accumulated("fake_score")
        distiller.critic_backward(context, draws, x0=videos)  # a rollout of its own would be like the student's
        for parameter in trained["fake_score"]:
            parameter.grad = None
        if config.warmup.kind != "none":
            accumulated("student")
            with peaks("warm-up"):
                _teach(run, distiller, flow=config.warmup.kind == "teacher_forcing")
            for parameter in trained["student"]:
                parameter.grad = None
            # The fake score has no moments yet.
            found.phases["warm-up"] = max(0, found.phases["warm-up"] - items.get("fake_score optimizer", 0))
        if config.validation.every:
            # The average takes the place of the student's own weights, which are kept meanwhile.
            kept = torch.empty(sizes["student"], dtype=torch.uint8)
            _validate(run, distiller, peaks)
            del kept
    found.host = live.host_peak + paged
    if config.ema.keep_on == "host":
        found.host += 2 * average  # and the weights that it is updated from
    return found


def _teach(run: Run, distiller: Distiller, *, flow: bool) -> None:
    """A micro-batch of the warm-up, or of the loss on real clips. flow: its target, else x0."""
    config, (channels, _, *size) = run.config, run.latent_shape
    n, frames = config.train.batch_size, config.rollout.warmup_frames
    clean, seen, noisy, target = (torch.empty(n, channels, frames, *size) for _ in range(4))
    timestep, context = torch.full((n, frames), 500.0), torch.empty(n, *_context(run))
    batch = WarmupBatch(context, clean, seen, noisy, timestep, target if flow else None)
    warmup_backward(distiller.roles, config, batch, 1.0, distiller.autocast)


@torch.no_grad()
def _validate(run: Run, distiller: Distiller, peaks: PeakPhases) -> None:
    """A batch of validation videos as they are sampled, and their first frames, or a tile of them, as they are decoded."""
    config, (channels, num_frames, *size) = run.config, run.validation_latent_shape
    settings = for_sampling(config.rollout, num_frames)
    tokens = num_frames * size[0] * size[1] // (run.base.patch_size[1] * run.base.patch_size[2])
    n = min(len(run.validation_prompts), max(1, BATCH_TOKENS // tokens))
    context = torch.empty(n, *_context(run))

    def denoiser() -> Denoiser:
        return student_denoiser(distiller.roles, context, new_cache(settings, evict=True), distiller.autocast)

    scale = config.validation.guidance_scale
    last = run.validation_timesteps[-1:]
    drawn, used = num_draws(settings, run.validation_timesteps), num_draws(settings, last)
    with peaks("sampling"):
        blocks = sample(
            denoiser() if scale in (0, 1) else guided(denoiser(), denoiser(), scale),
            lambda frames: torch.empty(drawn, n, channels, frames.stop - frames.start, *size)[:used],
            last,
            block_layout(settings, num_frames),
            context_timestep=context_timestep(settings),
        )
        latents = torch.cat(list(blocks), 2)
    with peaks("decoding"):
        with torch.device("meta"):
            vae: Any = AutoencoderKLWan.from_config(run.base.vae)
        _materialise(vae)
        decoder = StreamDecoder(vae)
        if decode_tiled(run, run.validation_latent_shape):
            # All tiles' frames, which overlap by a quarter of each edge, and the frames that are put together of them.
            factor = run.base.spatial_factor
            pixels = 3 * (4 * num_frames - 3) * size[0] * size[1] * factor**2
            whole = torch.empty(round((16 / 9 + 1) * pixels))
            decoder(torch.empty(1, channels, 3, *(min(256 // factor, edge) for edge in size)))
            del whole
        else:
            for frame in latents[:, :, :3].split(1, dim=2):  # what the decoder remembers of frames is full then
                decoder(frame)


class PeakPhases:
    """In place of the timer: the peak of every phase above what was there at the start."""

    def __init__(self, live: LiveBytes, phases: dict[str, int]):
        self.live, self.phases, self.start = live, phases, live.now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.live.peak = self.live.now
        yield
        self.phases[name] = max(self.phases.get(name, 0), self.live.peak - self.start)


def _context(run: Run) -> tuple[int, int]:
    return run.config.data.max_sequence_length, run.base.transformer["text_dim"]


def optimizer_bytes(name: str, parameters: list[nn.Parameter]) -> int:
    """State of an optimizer."""
    eight_bit = name.endswith("8bit")
    per_weight = 2 if eight_bit else {"adamw": 8, "adamw_bf16": 6}[name]
    small = 8 if eight_bit else per_weight  # bitsandbytes keeps moments of small tensors in float32
    return sum(p.numel() * (per_weight if p.numel() >= 4096 else small) for p in parameters)
