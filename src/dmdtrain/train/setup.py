"""From a configuration to a run: everything is resolved and checked before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import (
    Config,
    ConfigError,
    FakeScore,
    Student,
    check_writable,
    latent_frames,
    parse_resolution,
    reading,
)
from dmdtrain.data.buckets import NOTHING, Seen
from dmdtrain.data.prompts import Prompts, load_prompts, read_prompts, split
from dmdtrain.flow import shift_timestep, sigma_from_timestep
from dmdtrain.models.attention import AUTO, BACKENDS, pick_attention
from dmdtrain.models.checks import empty_model
from dmdtrain.models.encode import TextCache
from dmdtrain.models.offload import stream_blocks
from dmdtrain.models.quantize import multiply_in_int8
from dmdtrain.models.roles import AdapterSpec, Roles, check_targets, load_parameters
from dmdtrain.models.wan import WAN_TINY, WanFolder, find_folder, load_transformer, transformer_digest
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train.log import Live
from dmdtrain.train.optim import trained_dtype
from dmdtrain.train.step import block_layout

MOST_TOLD = 10  # prompts that are cut, each on a line
GUIDANCE_CONVENTION = "uncond + w (cond - uncond)"


@dataclass(frozen=True)
class Run:
    """A checked configuration with everything that follows from it."""

    config: Config
    base: WanFolder
    teacher: WanFolder
    prompts: list[str]
    validation_prompts: list[str]
    timesteps: list[float]
    validation_timesteps: list[float]
    latent_shape: tuple[int, int, int, int]  # [C, T, H, W] of a training video
    validation_latent_shape: tuple[int, int, int, int]
    left_out: str = ""  # of the prompts' file
    texts: list[str] = field(default_factory=list)  # the prompts with those that validation keeps
    given_prompts: list[str] = field(default_factory=list)  # of validation, without those
    seen_prompts: Seen = NOTHING  # by the run that this one goes on from
    seen_clips: Seen = NOTHING  # as above, by their files' SHA-256

    @property
    def own_teacher(self) -> bool:
        """Whether the teacher is another model than the base, or the same in another precision."""
        model = self.config.model
        return self.teacher.path != self.base.path or model.precision_of_teacher != model.precision

    @property
    def flow_shift(self) -> float:
        """Shift of the teacher's own sampling schedule."""
        return self.config.model.flow_shift or self.teacher.flow_shift

    @property
    def fps(self) -> int:
        """Frames a second of the videos that are written."""
        return self.config.validation.fps or self.base.fps

    @property
    def video_size(self) -> dict[str, int]:
        """height and width in pixels and num_frames of a validation video, as a pipeline is called."""
        height, width = (edge * self.base.spatial_factor for edge in self.validation_latent_shape[2:])
        return {"height": height, "width": width, "num_frames": self.config.validation.num_frames}

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame of a training video."""
        return self.tokens_of(self.latent_shape)

    def tokens_of(self, latent_shape: tuple[int, int, int, int]) -> int:
        """Tokens of a latent frame of a video [C, T, H, W]."""
        _, patch_height, patch_width = self.base.patch_size
        return (latent_shape[2] // patch_height) * (latent_shape[3] // patch_width)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir).expanduser()

    @cached_property
    def weights(self) -> dict[str, str]:
        """What base and teacher are by their weights, which have to be here: those of the hub are when they were loaded."""
        return {"base": transformer_digest(self.base.path), "teacher": transformer_digest(self.teacher.path)}

    def sampling(self) -> dict[str, Any]:
        """What is needed to sample the student; stored with every artefact."""
        return {
            "base_model": self.base.name,
            "timesteps": self.timesteps,
            "sigmas": [sigma_from_timestep(t) for t in self.timesteps],
            "sampler": "x0 prediction, then fresh noise to the next timestep",
            "guidance_scale": 1.0,
            "guidance_convention": GUIDANCE_CONVENTION,
            "causal": self.config.rollout.causal,
            "num_frame_per_block": self.config.rollout.num_frame_per_block if self.config.rollout.causal else None,
            "independent_first_frame": self.config.rollout.causal and self.config.rollout.independent_first_frame,
            "context_noise": self.config.rollout.context_noise if self.config.rollout.causal else None,
            "num_training_frames": self.config.rollout.num_training_frames,
            "local_attention_frames": self.config.rollout.local_attention_frames,
            "sink_frames": self.config.rollout.sink_frames,
            "max_sequence_length": self.config.data.max_sequence_length,
        }


def resolve(config: Config, *, for_training: bool = True, find: Callable[[str, str], WanFolder] = find_folder) -> Run:
    """Checks what the configuration alone can not: model folders, prompts, sizes that depend on the model.

    Args:
        for_training: False leaves the training prompts and folders alone, which sampling a checkpoint does not need.
        find: gives the model folder of a name, by its key.

    Raises:
        ConfigError: with the key, what it is and what would be valid.
    """
    if config.model.attention not in (AUTO, *BACKENDS):
        raise ConfigError(f"model.attention: {config.model.attention}: valid are {', '.join((AUTO, *BACKENDS))}")
    cache = quantized_cache(config)
    if cache is not None and for_training:
        with reading("model.quantized_cache"):
            if not cache.is_dir():  # one that may not be written can hold what is needed
                check_writable(cache, "model.quantized_cache")
    base = find(config.model.base, "model.base")
    teacher = base if config.model.teacher is None else find(config.model.teacher, "model.teacher")
    for name in ("in_channels", "out_channels", "text_dim"):
        if base.transformer.get(name) != teacher.transformer.get(name):
            raise ConfigError(
                f"model.teacher: {teacher.name}: {name} is {teacher.transformer.get(name)}, "
                f"the base has {base.transformer.get(name)}; they must agree"
            )
    frames = config.rollout.num_training_frames
    if config.rollout.causal and base.transformer["patch_size"][0] != 1:
        raise ConfigError(f"rollout.causal: true: {base.name} has patches of several frames; valid is false")
    try:
        size = parse_resolution(
            config.data.resolution, config.data.aspect_ratio, base.size_multiple, key="data.resolution"
        )
        validation_size = parse_resolution(
            config.validation.resolution, config.data.aspect_ratio, base.size_multiple, key="validation.resolution"
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    latent_shape = base.latent_shape(frames, *size)
    validation_shape = base.latent_shape(latent_frames(config.validation.num_frames), *validation_size)
    for shape, frames_key, size_key in (
        (latent_shape, "rollout.num_training_frames", "data.resolution"),
        (validation_shape, "validation.num_frames", "validation.resolution"),
    ):
        for key, edge, patch in zip((frames_key, size_key, size_key), shape[1:], base.patch_size, strict=True):
            if edge // patch > base.positions:
                raise ConfigError(
                    f"{key}: {configuration.nested_get(config, key)}: {edge // patch} positions in latent space; "
                    f"the model has {base.positions}"
                )
    shift = config.model.flow_shift or teacher.flow_shift
    timesteps = resolve_timesteps(config.dmd.denoising_steps, shift if config.dmd.warp_denoising_steps else 1.0)
    given = all_validation_prompts(config)[: config.validation.count]
    prompts, source = Prompts([]), config.data.prompts
    if source is None and config.data.videos is None:
        source = WAN_TINY if config.model.base == WAN_TINY else None
        if source is None and for_training:
            raise ConfigError(
                "data.prompts: not given; valid are a file of prompts, or data.videos, whose captions serve"
            )
    if source is not None and for_training:
        with reading("data.prompts"):
            prompts = read_prompts(source, "data.prompts", held_out=False, column=config.data.prompt_column)
    run = Run(
        config=config,
        base=base,
        teacher=teacher,
        prompts=[],
        validation_prompts=given,
        given_prompts=given,
        timesteps=timesteps,
        validation_timesteps=timesteps if config.validation.steps is None else list(config.validation.steps),
        latent_shape=latent_shape,
        validation_latent_shape=validation_shape,
        left_out=prompts.left_out,
    )
    return with_prompts(run, prompts.texts) if prompts.texts else run


def with_prompts(run: Run, prompts: list[str]) -> Run:
    """A run on prompts, without those that validation.held_out_prompts keeps from training."""
    wanted = run.config.validation.held_out_prompts
    if wanted >= len(prompts):
        raise ConfigError(
            f"validation.held_out_prompts: {wanted}: none of {len(prompts)} prompts would be left to train on; valid are 0 to "
            f"{len(prompts) - 1}"
        )
    trained, kept = split(prompts, wanted, run.seen_prompts)
    shown = list(dict.fromkeys(run.given_prompts + kept))
    return replace(run, texts=prompts, prompts=trained, validation_prompts=shown)


def all_validation_prompts(config: Config) -> list[str]:
    """Those of validation.prompts, not only the first `validation.count`."""
    source = config.validation.prompts
    if source is None:
        source = WAN_TINY if config.model.base == WAN_TINY else "library"
    with reading("validation.prompts"):
        return load_prompts(source, "validation.prompts", held_out=True, column=config.data.prompt_column)


def resolve_timesteps(steps: list[float], shift: float) -> list[float]:
    """The denoising list through a shift; 1 leaves it as it is."""
    return [float(t) if shift == 1 else shift_timestep(float(t), shift) for t in steps]


def device_of_this_machine() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(config: Config, device: torch.device) -> Callable[[], torch.autocast]:
    """The context of every transformer pass."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=config.train.mixed_precision == "bf16")


def attention_dtype(config: Config) -> torch.dtype:
    """The widest type that any role attends in. Autocast gives all of them bf16; without, each has its weights'."""
    if config.train.mixed_precision == "bf16":
        return torch.bfloat16
    whole = "full" in (config.student.kind, config.fake_score.kind)
    if whole and trained_dtype(config.optimizer.name) == torch.float32:
        return torch.float32
    return torch.float32 if "fp32" in (config.model.precision, config.model.teacher_precision) else torch.bfloat16


def adapter_specs(config: Config) -> dict[str, AdapterSpec | None]:
    """What each trained role is: an adapter, or None where it is trained whole."""
    targets = tuple(config.student.targets)

    def spec(settings: Student | FakeScore) -> AdapterSpec | None:
        return AdapterSpec(settings.rank, settings.alpha, targets) if settings.kind == "lora" else None

    return {"student": spec(config.student), "fake_score": spec(config.fake_score)}


def attention_of(config: Config, folder: WanFolder, device: torch.device) -> str:
    """The attention backend of a folder's transformer. ConfigError where the one that is set can not train here."""
    # cuDNN's and FlashAttention's backward is not deterministic.
    wanted = "native" if config.train.deterministic else config.model.attention
    return pick_attention(wanted, device, folder.transformer["attention_head_dim"], attention_dtype(config))


def build_roles(
    run: Run,
    device: torch.device,
    trained: tuple[str, ...] = ("student", "fake_score"),
    tell: Callable[[str], None] = print,
) -> Roles:
    """Loads the models and builds the roles, those in `trained` beside the teacher. tell: as in `load_transformer`."""
    config = run.config
    model = config.model

    def load(folder: WanFolder, precision: str) -> Any:
        attention, where = attention_of(config, folder, device), _quantize_on(config, device)
        transformer = load_transformer(folder, precision, attention, where, quantized_cache(config), tell)
        if model.offload_blocks:
            stream_blocks(transformer, device)
        if model.int8_matmul:
            multiply_in_int8(transformer)
        return transformer.to(device)

    base = load(run.base, model.precision)
    teacher = None
    if run.own_teacher:
        teacher = load(run.teacher, model.precision_of_teacher)
    specs = adapter_specs(config)
    # Adapters draw their first values from the global generator: seed it here, and nowhere else.
    torch.manual_seed(config.train.seed)
    with _of_targets(config):
        return Roles(base, teacher=teacher, trained={n: specs[n] for n in trained}, **role_options(config, trained))


@contextmanager
def _of_targets(config: Config) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            f"student.targets: {', '.join(config.student.targets)}: {str(error).splitlines()[0]}"
        ) from None


def check_adapters(run: Run) -> None:
    """ConfigError where student.targets has none in the base; no weights are loaded."""
    specs = [spec for spec in adapter_specs(run.config).values() if spec is not None]
    if specs:
        with _of_targets(run.config):
            check_targets(empty_model("transformer", run.base.transformer), specs[0].targets)


def quantized_cache(config: Config) -> Path | None:
    given = config.model.quantized_cache
    return None if given is None else Path(given).expanduser()


def _quantize_on(config: Config, device: torch.device) -> torch.device | None:
    """None: the CPU."""
    return device if config.model.quantize_via == "device" else None


def role_options(config: Config, trained: tuple[str, ...] = ("student", "fake_score")) -> dict[str, Any]:
    """What the configuration says of `Roles`."""
    weights = trained_dtype(config.optimizer.name)
    return {
        "full_dtype": weights,
        "adapter_dtype": weights,
        "causal": config.rollout.causal and "student" in trained,
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "checkpoints_on_host": config.train.checkpoints_on == "host",
        "checkpoint_replay": config.train.checkpoint_replay,
        "autocast": config.train.mixed_precision == "bf16",
        "compile_backend": "inductor" if config.train.compile else None,
    }


def teller(console: Console) -> Callable[[str], None]:
    """Prints a line as it is."""
    return partial(console.print, soft_wrap=True, highlight=False)


def cache_root(run: Run) -> Path:
    """Folder of what the frozen encoders gave: `text` and `videos`."""
    given = run.config.data.cache_dir
    return run.output_dir / "cache" if given is None else Path(given).expanduser()


def text_cache(run: Run, device: torch.device) -> TextCache:
    config = run.config
    length, precision = config.data.max_sequence_length, config.model.text_encoder_precision
    where = cache_root(run) / "text"
    return TextCache(
        run.base, where, length, precision, device, config.data.cache_compress, _quantize_on(config, device)
    )


def encode_text(text: TextCache, prompts: Iterable[str], console: Console) -> int:
    """Encodes what is not in the cache yet, with progress, and tells what is cut; the number of prompts that were encoded."""
    prompts = list(prompts)
    with console.status("looking up prompts"):
        missing = text.missing(prompts)
    if missing:
        console.print(f"text: {len(missing):,} prompts to encode, to {text.cache}", soft_wrap=True, highlight=False)
        _encode(text, missing, console)
    if cut := text.newly_cut(prompts):
        are = "prompts are" if len(cut) > 1 else "prompt is"
        lines = [f"  {prompt[:60]!r} ...: {n:,} tokens, the first {text.length} are read" for prompt, n in cut.items()]
        if len(lines) > MOST_TOLD:
            lines[MOST_TOLD:] = [f"  and {len(lines) - MOST_TOLD:,} more"]
        lines.insert(
            0,
            f"warning: {len(cut):,} {are} longer than data.max_sequence_length ({text.length} tokens; the longest has "
            f"{max(cut.values()):,}): the rest of them is cut",
        )
        console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return len(missing)


def _encode(text: TextCache, missing: list[str], console: Console) -> None:
    size, total = 0, 0.0

    def progress(done: int, written: int) -> None:
        nonlocal size, total
        if written > size:  # just now, so that it is of all that is done
            if not size and (written / done) * (len(missing) - done) > (free := shutil.disk_usage(text.cache).free):
                console.print(f"warning: {size_text(free)} are free on the disk, which will not do", soft_wrap=True)
            size, total = written, written / done * len(missing)
        live.step(done, f"{size_text(size)} of about {size_text(total)} written" if size else "")

    with Live(len(missing), 0, console, unit="prompt") as live:
        text.prepare(missing, progress=progress)


def size_text(size: float) -> str:
    """Bytes as B, KiB, MiB, GiB or TiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def load_run(ckpt: Path) -> Run:
    """The run that a checkpoint belongs to."""
    checkpoints.check_checkpoint(ckpt, "--ckpt")
    config = checkpoints.config_of(ckpt)
    if ckpt.resolve().parent.name in (
        checkpoints.CHECKPOINTS,
        checkpoints.WARMUP,
    ):  # the run's folder may have moved since
        config = config.model_copy(update={"output_dir": str(ckpt.resolve().parents[1])})
    return resolve(config, for_training=False)


def student_weights(ckpt: Path, weights: str) -> dict[str, torch.Tensor]:
    """A checkpoint's student, `ema` or `raw`."""
    if weights == "raw":
        return checkpoints.read_tensors(ckpt, "student")
    if weights == "ema":
        if not checkpoints.has_file(ckpt, "ema.safetensors"):
            raise ConfigError(f"--weights: ema: {ckpt} was trained without an average; valid is raw")
        return checkpoints.read_tensors(ckpt, "ema")
    raise ConfigError(f"--weights: {weights}: valid are ema, raw")


def load_student(
    run: Run, ckpt: Path, weights: str, device: torch.device, tell: Callable[[str], None] = print
) -> Roles:
    """Teacher and student of a checkpoint, for sampling. tell: as in `load_transformer`."""
    values = student_weights(ckpt, weights)
    roles = build_roles(run, device, ("student",), tell)
    parameters = roles.named_parameters("student")
    checkpoints.check_like(ckpt, "ema" if weights == "ema" else "student", values, parameters, exact=False)
    load_parameters(parameters, values)
    return roles


def describe(run: Run, roles: Roles | None = None) -> list[str]:
    """What was resolved, for the user to read before the first step."""
    config = run.config
    sigmas = ", ".join(f"{sigma_from_timestep(t):.4f}" for t in run.timesteps)
    teacher = "the base with adapters off" if not run.own_teacher else run.teacher.name
    updates = (
        f"every {config.dmd.generator_update_interval} steps"
        if config.dmd.generator_update_interval > 1
        else "every step"
    )
    lines = [
        f"base model      {run.base.name}; teacher: {teacher}",
        f"timesteps       {', '.join(f'{t:g}' for t in run.timesteps)} (sigmas {sigmas})",
        f"guidance        real score {config.dmd.real_score_guidance_scale:g}, fake score "
        f"{config.dmd.fake_score_guidance_scale:g}, in the form {GUIDANCE_CONVENTION}; 0 or 1 is off",
        f"score timesteps shift {config.dmd.timestep_shift:g}, clamped to "
        f"[{1000 * config.dmd.min_timestep_ratio:g}, {1000 * config.dmd.max_timestep_ratio:g}]; "
        f"ts_schedule {str(config.dmd.ts_schedule).lower()}, ts_schedule_max {str(config.dmd.ts_schedule_max).lower()}",
        f"flow shift      {run.flow_shift:g} (the teacher's own sampling schedule)",
        f"latents         [C, T, H, W] = {list(run.latent_shape)}, {_blocks_text(config)}",
        f"update          {config.samples_per_update} videos ({config.train.batch_size} x "
        f"{config.train.gradient_accumulation}); fake score every step, student {updates}",
        f"prompts         {len(run.prompts)} for training, {len(run.validation_prompts)} for validation"
        + (f"; {run.left_out}" if run.left_out else ""),
    ]
    if both := set(run.validation_prompts) & set(run.prompts):
        lines.append(f"{'':<15} {len(both)} of those for validation are trained on too")
    warmup = config.warmup
    if warmup.kind != "none":
        clips = "data.videos" if config.data.videos is not None and warmup.kind == "teacher_forcing" else None
        data = warmup.data or clips or f"{warmup.num_samples} videos of the teacher in {warmup.teacher_steps} steps"
        lines.append(f"warm-up         {warmup.kind}, {warmup.steps} steps at lr {warmup.lr:g}, on {data}")
    elif config.rollout.causal:
        lines.append(
            "warning         a causal student that starts from a bidirectional base without a warm-up stays poor: "
            "set warmup.kind"
        )
    lines += [f"warning         {text}" for text in _without_effect(config)]
    if roles is not None:
        for name in ("student", "fake_score"):
            kind = getattr(config, name).kind
            count = sum(p.numel() for p in roles.parameters(name))
            lines.append(f"{name.replace('_', ' '):<15} {kind}, {count:,} trained parameters")
    return lines


def _without_effect(config: Config) -> list[str]:
    """Settings that a run as short as this one makes nothing of; a short one of a long run's file is tried all the same."""
    updates, told = config.student_updates, []
    if config.ema.enabled and config.ema.every > updates:
        told.append(
            f"ema.every: {config.ema.every} is above the student's {updates} updates: the average stays where it began"
        )
    if config.schedule.warmup_steps >= updates:
        steps = config.schedule.warmup_steps
        told.append(f"schedule.warmup_steps: {steps} of the student's {updates} updates: optimizer.lr is not reached")
    if config.warmup.kind != "none" and config.warmup.lr_warmup_steps >= config.warmup.steps:
        steps = config.warmup.lr_warmup_steps
        told.append(f"warmup.lr_warmup_steps: {steps} of warmup.steps {config.warmup.steps}: warmup.lr is not reached")
    return told


def _blocks_text(config: Config) -> str:
    settings = config.rollout
    blocks = len(block_layout(settings, settings.num_training_frames).sizes)
    text = f"{settings.num_training_frames} latent frames in {blocks} block{'s' if blocks > 1 else ''}"
    if settings.min_training_frames is not None:
        text += f", drawn from {settings.min_training_frames}"
    if settings.num_gradient_frames is not None:
        text += f", the last {settings.scored_frames} of them scored and trained"
    return text


def sampling_json(run: Run) -> str:
    return json.dumps(run.sampling() | {"weights": run.weights}, indent=1) + "\n"
