"""The configuration of a run: every key with its unit, range and meaning. Imports no torch.

Unknown keys, wrong types and impossible combinations are refused here, each with one line that names the key.
"""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dmdtrain import strict_yaml

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MOST = 1_000_000_000
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]

Precision = Literal["fp32", "bf16", "int8", "int8-llm", "nf4"]

VERSION = 1  # of the configuration's format
VAE_TEMPORAL_FACTOR = 4  # of every Wan codec; checked against the model's own config when it is loaded


class ConfigError(Exception):
    """A mistake of the user's, told in one line."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unwritable(key: str, path: Path, error: OSError, done: str = "written") -> Exception:
    """What to raise where `path` can not be written, or made: a mistake in `key`; an error of the disk where there is no room."""
    if error.errno in NO_ROOM:
        return OSError(error.errno, error.strerror, str(path))
    return ConfigError(f"{key}: {path} can not be {done}: {error.strerror}")


def check_writable(folder: Path, key: str, name: str = "") -> None:
    """A mistake in `key` unless a folder can be written, or made if it is not there. name: of a file that it is to hold."""
    try:
        check_length(str(folder / name))
        above = next(each for each in (folder, *folder.parents) if each.is_symlink() or each.exists())
        if not above.is_dir():
            where = f"{folder}: {above}" if above != folder else folder
            raise ConfigError(f"{key}: {where} is not a folder")
        if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
            raise ConfigError(f"{key}: {folder} can not be written: {above} is read-only or another user's")
        with NamedTemporaryFile(dir=above, prefix=f".{name}", suffix=".partial"):  # permissions do not tell all: /proc
            pass
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    except OSError as error:
        raise unwritable(key, folder / name, error) from None


@contextmanager
def reading(key: str) -> Iterator[None]:
    """What may not be read inside is a mistake in `key`."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(f"{key}: {error.filename or 'a file'} can not be read: {error.strerror}") from None


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """A group with everything commented out is empty; true and false are no numbers, nor are 0400 and 1:30."""
        if values is None:
            return {}
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(str(name))
            if field is None:
                continue
            if isinstance(value, bool) and field.annotation not in (bool, bool | None):
                raise ValueError(f"{name}: {str(value).lower()}: it must not be true or false")
            if _holds_numbers(field.annotation):
                _check_numbers(value, str(name))
        return values


def _holds_numbers(kind: Any) -> bool:
    """Whether an annotation is of numbers: alone, in lists, or null."""
    parts = get_args(kind)[: 1 if hasattr(kind, "__metadata__") else None]  # of Annotated, the type
    return all(_holds_numbers(part) for part in parts) if parts else kind in (int, float, type(None))


def _check_numbers(value: Any, name: str) -> None:
    """ValueError where numbers, also those of a list or a text with commas, can be read in two ways."""
    for item in value if isinstance(value, list) else ():
        _check_numbers(item, name)
    for part in value.split(",") if isinstance(value, str) else ():
        try:
            strict_yaml.check_number(value if part == value else part.strip())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _short(value: Any) -> str:
    """A value as an error names it: on one line, whatever it is."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 100
    shortened.maxlevel, shortened.maxdict, shortened.maxlist = 2, 4, 8
    return shortened.repr(value)


def _join(steps: list[float]) -> str:
    return ",".join(f"{s:g}" for s in steps)


def check_steps(steps: list[float], key: str) -> None:
    """Raises ValueError unless there are 1 to 8 and they descend."""
    if not 1 <= len(steps) <= 8:
        raise ValueError(f"{key}: {len(steps)} steps; valid are 1 to 8, such as 1000,757,522")
    if any(b >= a for a, b in pairwise(steps)):
        raise ValueError(f"{key}: {_join(steps)} must descend, such as 1000,757,522")


def check_guidance(scale: float, key: str) -> None:
    """Raises ValueError between 0 and 1, where standard form would be neither off nor guidance."""
    if 0 < scale < 1:
        raise ValueError(f"{key}: {scale} is between 0 and 1; valid are 0 (off) and 1 or more")


def check_num_frames(num_frames: int, key: str = "num_frames") -> None:
    """Raises ValueError unless num_frames = 1 + 4k."""
    if num_frames < 1 or (num_frames - 1) % VAE_TEMPORAL_FACTOR:
        below = max(1, (num_frames - 1) // VAE_TEMPORAL_FACTOR * VAE_TEMPORAL_FACTOR + 1)
        raise ValueError(
            f"{key}: {num_frames} frames; valid are 1 + 4k, the nearest {below} and {below + VAE_TEMPORAL_FACTOR}"
        )


def latent_frames(num_frames: int) -> int:
    """Latent frames of 1 + 4k video frames."""
    return 1 + (num_frames - 1) // VAE_TEMPORAL_FACTOR


def parse_resolution(resolution: int | str, aspect_ratio: str, multiple: int, key: str) -> tuple[int, int]:
    """(height, width) in pixels.

    WIDTHxHEIGHT is taken as it is and must be divisible by `multiple`; a number N gives about N x N pixels in the
    aspect ratio, each edge rounded to the multiple.
    """
    text = str(resolution)
    if match := re.fullmatch(r"([1-9]\d{0,4})[xX]([1-9]\d{0,4})", text):
        width, height = int(match[1]), int(match[2])
        if height % multiple or width % multiple:
            valid = [max(multiple, round(edge / multiple) * multiple) for edge in (width, height)]
            raise ValueError(
                f"{key}: {text}: both edges must be multiples of {multiple} for this model; "
                f"the nearest is {valid[0]}x{valid[1]}"
            )
        return height, width
    if re.fullmatch(r"[1-9]\d{0,4}", text):
        wide, high = (int(part) for part in aspect_ratio.split(":"))
        scale = int(text) / math.sqrt(wide * high)
        height, width = (max(multiple, round(scale * edge / multiple) * multiple) for edge in (high, wide))
        return height, width
    raise ValueError(f"{key}: {_short(text)} is neither WIDTHxHEIGHT (such as 832x480) nor a number of pixels (480)")


def check_length(path: str) -> None:
    """Raises ValueError if a file system would not take it, which it tells only of a folder that is there."""
    if any(len(os.fsencode(part)) > 255 for part in path.split("/")) or len(os.fsencode(path)) > 4000:
        raise ValueError(f"{_short(path)}: too long for the name of a file or folder")


def _file_name(value: str) -> str:
    """A path that the file system can be asked for."""
    check_length(value)
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{_short(value)}: no such user's folder") from None
    return value


PathText = Annotated[str, Field(min_length=1), AfterValidator(_file_name)]


def _web_address(value: str) -> str:
    """An http or https address with a host. Errors do not repeat it: it may hold a secret."""
    try:
        parts = urlsplit(value)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        right = False
    if not right or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("no address of the web; valid are http://HOST/... and https://HOST/...")
    return value


def _repository(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII):
        raise ValueError(f"{_short(value)}: it must be NAME/REPO, such as me/wan-3step")
    return value


def _split_numbers(value: Any) -> Any:
    """ "1000,757,522" -> a list, as the field writes it."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Timestep = Annotated[float, Field(gt=0, le=1000)]
Steps = Annotated[list[Timestep], BeforeValidator(_split_numbers, json_schema_input_type=list[Timestep] | str)]


class Model(Group):
    """The models: all roles start from one base."""

    base: PathText = "wan-tiny"
    """Diffusers folder, hub id (org/name), or `wan-tiny`, the built-in miniature."""
    teacher: PathText | None = None
    """Another teacher than the base (same latents and text encoder). None: the base itself. wan-tiny goes with no other base
    and stands for both: a way to try any configuration on the miniature."""
    precision: Precision = "bf16"
    """Of the frozen base. int8: its blocks' linear layers, weight-only, a scale per row; int8-llm: bitsandbytes' LLM.int8, with
    int8 activations; nf4: bitsandbytes' 4 bits. Embedders, norms, modulation and head keep bf16 or float32."""
    teacher_precision: Precision | None = None
    """Of a teacher of its own. None: as the base."""
    quantize_via: Literal["cpu", "device"] = "cpu"
    """Where layers are quantized, one by one as they are read: device is faster, and both give the same weights but for
    rounding."""
    quantized_cache: PathText | None = None
    """Folder in which quantized transformers are kept, with checksums, and found the next time: one that is damaged is made
    again, and where none can be written the run goes on without. None: quantized at every start."""
    int8_matmul: bool = False
    """precision int8: passes without gradient (rollout, scores, sampling) multiply in int8, activations rounded with a scale
    per token. Worth trying with train.compile, which fuses the scaling; benchmarks/README.md has its error."""
    offload_blocks: bool = False
    """Keep the weights of frozen blocks in host memory; the block that is computed and the next are on the device. Changes no
    number. For LoRA runs on precision fp32, bf16, int8 or nf4."""
    text_encoder_precision: Precision = "bf16"
    """Of the text encoder, which runs once per prompt and is then freed."""
    attention: str = "auto"
    """Attention backend by Diffusers' name: native, flash, flash_hub, _native_cudnn, xformers ...; one whose backward does
    not run here is refused. auto: the fastest that does, of FlashAttention 3, cuDNN's, FlashAttention 2 and PyTorch's own."""
    flow_shift: Positive | None = None
    """Shift of the teacher's own sampling schedule. None: what the model folder's scheduler says."""

    @property
    def precision_of_teacher(self) -> str:
        return self.teacher_precision or self.precision

    @model_validator(mode="before")
    @classmethod
    def _miniature(cls, values: Any) -> Any:
        whole = isinstance(values, dict) and values.get("teacher") == "wan-tiny"
        return values | {"base": "wan-tiny"} if whole else values


class Student(Group):
    """The student, which generates."""

    kind: Literal["lora", "full"] = "lora"
    """lora: an adapter on the frozen base. full: a trained copy of the base."""
    rank: Count = 128
    """Of the adapter's two matrices."""
    alpha: Positive = 128
    """Adapter output is scaled by alpha / rank."""
    targets: Annotated[list[str], Field(min_length=1)] = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    ]
    """Linear layers that get an adapter, by the ends of their names."""


class FakeScore(Group):
    """The fake score, which follows the student's distribution, and its AdamW."""

    kind: Literal["lora", "full"] = "lora"
    """As `student.kind`. It starts from the student's base, whoever the teacher is."""
    rank: Count = 128
    """As `student.rank`."""
    alpha: Positive = 128
    """As `student.alpha`."""
    lr: Positive = 1e-5
    """Constant: the fake score follows the student and has no schedule."""
    betas: Betas = (0.9, 0.999)
    """Of AdamW: decay of its averages of the gradient and of the gradient's square."""
    eps: Positive = 1e-8
    """Of AdamW's divisor."""
    weight_decay: NonNegative = 0.01
    """Decoupled, as AdamW has it."""
    grad_clip: Positive = 1.0
    """Largest norm of the fake score's gradient."""
    reuse_rollout: bool = False
    """At steps that update the student, train the fake score on the very videos of the student's update, after it, instead
    of on a rollout of its own: saves that rollout. The two updates then share prompts and noise."""


class Dmd(Group):
    """Distribution matching: the student's steps, guidance, and the noise levels of the scores."""

    denoising_steps: Steps = [
        1000,
        757,
        522,
    ]
    """Timesteps at which the student denoises, used as they are: they must descend and lie in (0, 1000]."""
    warp_denoising_steps: bool = False
    """Take denoising_steps through `model.flow_shift` first, as Self-Forcing's lists want it (1000/750/500/250 at 5)."""
    generator_update_interval: Count = 1
    """The student is updated at every Nth step, the fake score at every step."""
    real_score_guidance_scale: NonNegative = 3.0
    """Guidance of the teacher in standard form `uncond + w (cond - uncond)`. 0 or 1: off."""
    fake_score_guidance_scale: NonNegative = 0.0
    """Guidance of the fake score, same form. 0 or 1: off."""
    min_timestep_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Score timesteps are clamped to at least 1000 times this, after the shift."""
    max_timestep_ratio: Annotated[float, Field(gt=0, le=1)] = 0.98
    """Score timesteps are clamped to at most 1000 times this, after the shift."""
    timestep_shift: Positive = 1.0
    """Shift s of the score timesteps, `s t / (1 + (s - 1) t)` with t in [0, 1]: an integer is drawn uniformly, shifted, then
    clamped. Above 1: towards high noise."""
    ts_schedule: bool = True
    """Bound the final score timestep, after the shift, below by the timestep that the exit step denoises to."""
    ts_schedule_max: bool = False
    """Bound the final score timestep, after the shift, above by the timestep that the exit step denoises from. With both, steps
    1000,757,522 and any shift, a rollout that left at 757 is scored between 522 and 757."""
    min_score_timestep: Annotated[int, Field(ge=0, lt=1000)] = 0
    """Lower bound of score timesteps before the shift, if ts_schedule is off."""
    real_data_loss_weight: NonNegative = 0.0
    """Adds so much of a flow-matching loss on data.videos to every update of the student (causal: teacher forcing), at
    timesteps that are shifted as the warm-up's. 0: off."""

    @model_validator(mode="after")
    def _check(self):
        check_steps(self.denoising_steps, "denoising_steps")
        if self.min_timestep_ratio >= self.max_timestep_ratio:
            raise ValueError(
                f"min_timestep_ratio: {self.min_timestep_ratio} must be below max_timestep_ratio "
                f"({self.max_timestep_ratio})"
            )
        for name in ("real_score_guidance_scale", "fake_score_guidance_scale"):
            check_guidance(getattr(self, name), name)
        return self


class Rollout(Group):
    """How the student generates in training: length and temporal blocks."""

    causal: bool = False
    """Generate block by block through a KV cache. False: the bidirectional student, one block of all frames."""
    num_training_frames: Count = 21
    """Latent frames of a training rollout, at most. 21 latent frames are 81 video frames."""
    min_training_frames: Count | None = None
    """Latent frames of a training rollout, at least: each update draws a length, in whole blocks. None: always the most."""
    num_gradient_frames: Count | None = None
    """Only the last so many latent frames of a rollout are scored and trained, in whole blocks; those before are context.
    For rollouts longer than what the teacher knows. None: all (causal students)."""
    num_frame_per_block: Count = 3
    """Latent frames of a temporal block (causal students)."""
    independent_first_frame: bool = False
    """The first latent frame is a block of its own (causal students)."""
    same_step_across_blocks: bool = False
    """All blocks of a rollout leave at the same step (causal students). On the miniature it learned far better than false:
    see benchmarks/wan_tiny_causal.md."""
    last_step_only: bool = False
    """Always leave at the last denoising step instead of a random one."""
    context_noise: Annotated[float, Field(ge=0, le=1000)] = 0
    """Timestep to which finished blocks are noised in the cache; 0: clean (causal students)."""
    local_attention_frames: Count | None = None
    """Latent frames that a block attends to, itself included and the sinks not; None: all before it (causal students)."""
    sink_frames: CountOrZero = 0
    """The video's first latent frames, visible to every block outside its window (causal students)."""
    kv_cache: Literal["device", "int8", "host"] = "device"
    """How finished blocks' keys and values are kept (causal students). int8: rounded with a scale per token and head, half
    the memory; host: in host memory, brought back a layer ahead, no number changes."""

    @model_validator(mode="after")
    def _check(self):
        local = self.local_attention_frames
        if local is None and self.sink_frames:
            raise ValueError(f"sink_frames: {self.sink_frames} needs local_attention_frames; valid without it is 0")
        if local is not None and local < self.num_frame_per_block:
            raise ValueError(
                f"local_attention_frames: {local} is below num_frame_per_block ({self.num_frame_per_block}): a block attends to "
                "all of itself"
            )
        least, gradient = self.min_training_frames, self.num_gradient_frames
        if least is not None and least > self.num_training_frames:
            raise ValueError(f"min_training_frames: {least} is above num_training_frames ({self.num_training_frames})")
        if not self.causal:
            if gradient is not None:
                raise ValueError(f"num_gradient_frames: {gradient} needs causal: true; valid without it is null")
            if self.kv_cache != "device":
                raise ValueError(f"kv_cache: {self.kv_cache} needs causal: true; valid without it is device")
            return self
        for key, frames in (("num_training_frames", self.num_training_frames), ("min_training_frames", least)):
            if frames is not None and (near := self.nearest_blocks(frames)):
                raise ValueError(
                    f"{key}: {frames} latent frames; it must be {self.block_rule}, the nearest are {near[0]} and {near[1]}"
                    f"{self.first_frame_hint}"
                )
        if gradient is not None and gradient < self.num_training_frames and gradient % self.num_frame_per_block:
            raise ValueError(
                f"num_gradient_frames: {gradient} latent frames; below num_training_frames it must be a multiple of "
                f"num_frame_per_block ({self.num_frame_per_block})"
            )
        return self

    def nearest_blocks(self, latent_frames: int) -> tuple[int, int] | None:
        """None where a causal student's blocks make up so many latent frames, else the nearest counts that they do."""
        first, size = int(self.independent_first_frame), self.num_frame_per_block
        if latent_frames > first and (latent_frames - first) % size == 0:
            return None
        blocks = max(1, (latent_frames - first) // size)
        return first + blocks * size, first + (blocks + 1) * size

    @property
    def block_rule(self) -> str:
        return f"{'1 + ' * self.independent_first_frame}a multiple of num_frame_per_block ({self.num_frame_per_block})"

    @property
    def first_frame_hint(self) -> str:
        return "" if self.independent_first_frame else ", or set rollout.independent_first_frame if 1 + blocks fits"

    @property
    def scored_frames(self) -> int:
        """Latent frames that the scores see, of the longest rollout."""
        return min(self.num_training_frames, self.num_gradient_frames or self.num_training_frames)

    @property
    def warmup_frames(self) -> int:
        """Latent frames of a warm-up video: as many of the scored ones as are whole blocks from the video's start."""
        near = self.nearest_blocks(self.scored_frames) if self.causal else None
        return self.scored_frames if near is None else min(near[0], self.num_training_frames)


def check_blocks(rollout: Rollout, num_frames: int, key: str) -> None:
    """Raises ValueError unless a student's temporal blocks make up `num_frames` video frames."""
    check_num_frames(num_frames, key)
    near = rollout.nearest_blocks(latent_frames(num_frames)) if rollout.causal else None
    if near is not None:
        counts = " and ".join(str(1 + VAE_TEMPORAL_FACTOR * (count - 1)) for count in near)
        raise ValueError(
            f"{key}: {num_frames} frames are {latent_frames(num_frames)} latent frames; they must be {rollout.block_rule}; "
            f"the nearest valid counts are {counts}{rollout.first_frame_hint}"
        )


class Warmup(Group):
    """What a causal student learns before DMD, which does not repair one that starts from a bidirectional base."""

    kind: Literal["none", "teacher_forcing", "ode_regression"] = "none"
    """teacher_forcing: flow matching of each block on clean earlier ones. ode_regression: from the teacher's own trajectory
    at the student's denoising steps to its end, on clean earlier blocks."""
    steps: Count = 1000
    """Updates of the student, each of as many videos as later; then DMD starts at step 0."""
    lr: Positive = 1e-4
    """After a linear rise over lr_warmup_steps; otherwise `optimizer` holds here too."""
    lr_warmup_steps: CountOrZero = 0
    """Updates of linear rise to `lr`."""
    data: PathText | None = None
    """Folder made by `dmdtrain synthesize` or, for teacher_forcing, of clips as in data.videos. None: teacher_forcing takes
    data.videos; without them fit makes num_samples in output_dir/cache/warmup, and goes on there when it was interrupted."""
    num_samples: Count = 1000
    """Teacher videos that fit makes."""
    teacher_steps: Count = 50
    """Steps of the teacher in them."""
    context_gradient: bool = True
    """Gradient also reaches what the context is read through, here and in the loss on real clips, in one pass over the video's
    context and its noisy frames. false: block by block through the KV cache, as in DMD; the same loss, the memory of a block."""
    timestep_shift: Positive | None = None
    """teacher_forcing: shift of the noise levels, one a block. None: model.flow_shift."""


class VideoSet(Group):
    """Captioned clips."""

    path: PathText
    """Folder with `clip.mp4` and `clip.txt` at any depth; or with `metadata.jsonl`, `.csv` or `.parquet` (file_name and a
    caption column) in it or in folders below; or such a file itself. Names may differ from the folder's in Unicode form, not in
    case. Images are videos of one frame, for runs that need no more; what is transparent in them is white."""
    weight: Positive | None = None
    """Share of the draws relative to the other sets' weights, whatever their sizes. None (in all sets): in proportion to
    clips times repeats."""
    repeats: Count = 1
    """How often an epoch holds each clip of the set."""
    caption_column: Annotated[str, Field(min_length=1)] | None = None
    """Of the metadata file. None: text, caption or prompt."""


def _one_set(value: Any) -> Any:
    """A path or one set is a list of one."""
    if isinstance(value, (str, dict)):
        value = [value]
    return [{"path": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


class Data(Group):
    """What the student is trained on."""

    prompts: PathText | None = None
    """.txt (one a line), .jsonl, .json, .csv, .tsv or .parquet; `wan-tiny`: the miniature's training captions. Blank lines and
    duplicates are left out. None: the captions of `videos`, or on the miniature, without videos, its own."""
    prompt_column: str | None = None
    """Column of the prompts, here and in validation.prompts, where they are a table. None: the only one (which in a .csv must
    be called so, or description), or the one called prompt, caption or text."""
    cache_dir: PathText | None = None
    """Folder of text embeddings and latents of clips, which runs may share. None: output_dir/cache."""
    cache_compress: bool = False
    """Store text embeddings and latents as zlib (level 1, lossless) of their byte planes."""
    negative_prompt: str = ""
    """What the unconditional passes of teacher and fake score are given."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of fake-score samples that are trained without their caption (for fake_score_guidance_scale)."""
    resolution: int | str = "832x480"
    """Training size in pixels: WIDTHxHEIGHT, or a number N for about N x N pixels in `aspect_ratio`."""
    aspect_ratio: str = "16:9"
    """width:height, where `resolution` is a number."""
    max_sequence_length: Annotated[int, Field(ge=8, le=512)] = 512
    """Text tokens, zero-padded. `WanPipeline` uses 512 unless told otherwise."""
    videos: Annotated[
        Annotated[list[VideoSet], Field(min_length=1)] | None,
        BeforeValidator(
            _one_set,
            json_schema_input_type=PathText
            | VideoSet
            | Annotated[list[PathText | VideoSet], Field(min_length=1)]
            | None,
        ),
    ] = None
    """Data sets of real clips, for the warm-up, dmd.real_data_loss_weight and validation.real_clips, and without `prompts` for
    their captions: a path, or a list of paths or of `path`, `weight`, `repeats`, `caption_column`. Each clip gives its first
    frames, as many as a training video has."""
    fps: Positive | None = None
    """Frames a second that are taken from a clip, by its time stamps; Wan 2.1 makes 16, Wan 2.2 5B 24. A clip that has fewer
    repeats frames, and is told. None: every frame as it comes."""
    frame_interval: Count = 1
    """Without fps: every so many-th frame of a clip as it comes; 2 halves its rate."""
    crop: Literal["center", "random", "none"] = "center"
    """center, random: a clip is scaled to cover its size, then cut; random: at a place that its content decides, the same one
    every time. none: scaled to its size, which distorts what has another aspect ratio."""
    buckets: bool = False
    """Each clip at the size of its own aspect ratio with as many pixels as `resolution`; false: all at `resolution`."""
    aspect_bucket_rounding: Annotated[int, Field(ge=0, le=9)] = 2
    """Decimals to which the aspect ratio of a clip is rounded before its size is computed: fewer give fewer sizes."""
    minimum_size: Annotated[int, Field(ge=0)] = 0
    """Pixels of the shorter edge below which a clip is left out."""
    on_bad_video: Literal["skip", "error"] = "skip"
    """skip: clips that can not be used are counted, and listed with their reasons in output_dir/data_report.jsonl. error: the
    first one ends the command. Captions without a clip, and clips that a metadata file does not list, are told in both."""

    @model_validator(mode="after")
    def _check(self):
        sets = self.videos or []
        for position, video_set in enumerate(sets):
            if (video_set.weight is None) != (sets[0].weight is None):
                raise ValueError(
                    f"videos.{position}.weight: {video_set.weight}: valid is a weight in all sets, or in none"
                )
            if video_set.weight is not None and video_set.repeats > 1:
                raise ValueError(
                    f"videos.{position}.repeats: {video_set.repeats} has no effect beside weight; valid is one of them"
                )
        if self.fps is not None and self.frame_interval > 1:
            raise ValueError(f"frame_interval: {self.frame_interval} has no effect beside fps; valid is 1")
        if not re.fullmatch(r"[1-9]\d{0,3}:[1-9]\d{0,3}", self.aspect_ratio):
            raise ValueError(f"aspect_ratio: {_short(self.aspect_ratio)}: it must be WIDTH:HEIGHT, such as 16:9")
        parse_resolution(self.resolution, self.aspect_ratio, 1, key="resolution")
        return self


class Optimizer(Group):
    """The student's optimizer; `name` holds for the fake score too."""

    name: Literal["adamw", "adamw_bf16", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """adamw: float32 weights. adamw_bf16: bf16 weights with Kahan summation. adamw8bit: bitsandbytes, float32 weights and
    8-bit moments; paged_adamw8bit: the moments move to host memory when the device is full. For both roles."""
    lr: Positive = 2e-5
    """The student's, before `schedule`."""
    betas: Betas = (0.9, 0.999)
    """As `fake_score.betas`, of the student."""
    eps: Positive = 1e-8
    """As `fake_score.eps`, of the student."""
    weight_decay: NonNegative = 0.01
    """As `fake_score.weight_decay`, of the student."""
    grad_clip: Positive = 1.0
    """Bound of the student's gradient, in the way of `grad_clip_method`."""
    grad_clip_method: Literal["norm", "value"] = "norm"
    """norm: scale the student's gradient to at most grad_clip; value: clamp every element to +- grad_clip."""


class Schedule(Group):
    """The student's learning rate over its updates."""

    name: Literal["constant", "linear", "cosine_with_min_lr"] = "constant"
    """The student's learning rate after warm-up, over its own updates."""
    warmup_steps: CountOrZero = 0
    """Student updates of linear warm-up."""
    min_lr: NonNegative = 0.0
    """Where linear and cosine_with_min_lr end."""


class Train(Group):
    """The run: length, batch, precision."""

    max_steps: Count = 4000
    """Steps; each updates the fake score, every generator_update_interval-th the student too."""
    batch_size: Count = 1
    """Videos in memory at once."""
    gradient_accumulation: Count = 1
    """Micro-batches per update: the update sees batch_size x gradient_accumulation videos, the same ones either way."""
    gradient_checkpointing: bool = True
    """Of a pass with gradient keep the input of every block alone, and compute the block again in backward."""
    checkpoints_on: Literal["device", "host"] = "device"
    """Where those inputs are kept; host: in host memory, copied while the device computes."""
    checkpoint_replay: bool = True
    """false: the replay of a causal student's block keeps its activations and computes nothing twice; more memory."""
    batched_guidance: bool = True
    """Guided scores take the prompt and the negative prompt in one batch; false: one after the other, in less memory."""
    compile: bool = False
    """torch.compile of every transformer block: minutes at the start, faster steps."""
    deterministic: bool = False
    """On a GPU: kernels that add in the same order each time, so that a resumed run comes to the same bits there too; slower.
    Needs model.attention auto or native. On a CPU every run does."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Autocast of the transformer passes."""
    seed: Seed = 0
    """Of adapters, noise, timesteps and the order of prompts."""
    max_bad_steps: Count = 10
    """Consecutive steps with a non-finite loss or gradient (each is skipped and counted) after which the run stops."""


class Ema(Group):
    """The average of the student's weights."""

    enabled: bool = True
    """Keep a moving average of the student's trained weights."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Weight of the old average in the new one, at each update of it."""
    warmup: bool = True
    """Start with a smaller decay, (1 + n) / (10 + n) after n student updates, until that reaches `decay`. Without it the average
    keeps its untrained start for long: at decay 0.995 and every 5, 82 % of it after 200 updates instead of 0.2 %."""
    every: Count = 1
    """Student updates between two updates of the average."""
    keep_on: Literal["device", "host"] = "device"
    """Where the average lies; host: updates take longer, the device is free of it."""
    validate_with: Literal["ema", "raw", "both"] = "ema"
    """Weights that validation renders: the average, the trained ones, or both."""


class Checkpoint(Group):
    """When checkpoints are saved, and how many stay."""

    every: Count = 200
    """Steps. The last step is always saved."""
    every_minutes: NonNegative = 0.0
    """Minutes since the last save after which a step is saved as well; 0: by steps alone."""
    keep: Count = 3
    """Checkpoints that stay; older ones are removed after a new one is complete. One with a file `KEEP` in it stays as well."""
    background: bool = True
    """Write in a thread, from a copy in host memory, where that fits; steps go on meanwhile. The same files either way."""
    max_failed_saves: Count = 8
    """Consecutive saves that may fail (disk full, folder gone) before the run stops. Each is tried again 1, 2, 4 ... steps
    later, at most `every`."""


class Validation(Group):
    """Videos that are rendered during the run, from fixed prompts and seeds."""

    every: CountOrZero = 200
    """Steps; 0: never."""
    prompts: PathText | list[str] | None = None
    """File as `data.prompts`, list of prompts, `library`: twelve varied ones that come with dmdtrain, or `wan-tiny`: the
    miniature's held-out captions. None: `wan-tiny` where that is model.base, else `library`."""
    count: Count = 8
    """At most so many of them."""
    held_out_prompts: CountOrZero = 0
    """So many of the training prompts are kept from training, and fit renders them after those of `prompts`: chosen by their
    content, so that their order does not matter and prompts that are added replace few of them."""
    num_frames: Annotated[int, Field(le=MOST)] = 81
    """Video frames, 1 + 4k."""
    resolution: int | str = "832x480"
    """As `data.resolution`."""
    steps: Steps | None = None
    """Timesteps of the student in validation. None: dmd.denoising_steps."""
    guidance_scale: NonNegative = 1.0
    """Of the student, standard form; 0 or 1: off, as it was trained."""
    negative_prompt: str = ""
    """For a guidance_scale above 1, and for the teacher that --compare-teacher runs."""
    seed: Seed = 42
    """Prompt number i starts from seed + i."""
    fps: Count | None = None
    """Frames a second of the videos that are written. None: the model's own: Wan 2.1 makes 16, Wan 2.2 5B 24."""
    real_clips: CountOrZero = 0
    """Clips of data.videos that are kept from training. At every validation the student's flow-matching loss on them is logged
    (`validation_ema_real_loss`), with the same noise and timesteps each time."""
    tiled_decoding: bool | None = None
    """Decode videos in overlapping tiles of 256 pixels, blended: less memory for large ones, and slightly other pixels. None:
    where a frame has more than 832 x 480 pixels."""

    @model_validator(mode="after")
    def _check(self):
        check_num_frames(self.num_frames)
        parse_resolution(self.resolution, "16:9", 1, key="resolution")
        check_guidance(self.guidance_scale, "guidance_scale")
        if self.steps is not None:
            check_steps(self.steps, "steps")
        return self


class Log(Group):
    """Metrics."""

    every: Count = 1
    """Steps between two lines of metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard's files to output_dir/tensorboard, besides metrics.jsonl."""
    wandb: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Project of Weights & Biases that gets the same numbers and videos (`pip install 'dmdtrain[wandb]'`); WANDB_MODE and
    its other variables hold. A resumed run goes on in the same run there. None: not used."""
    webhook: Annotated[str, AfterValidator(_web_address)] | None = None
    """Address that gets a JSON POST when the run starts, saves, validates, raises an alarm, stops and is done; Slack shows its
    `text`, Discord its `content`. It is in the run's config.yaml, and neither printed nor uploaded. None: not used."""


class Alarms(Group):
    """What is watched while it trains. An alarm is a line on the console when it begins and a count in the metrics
    (`alarms_...`); it never changes training."""

    window: Annotated[int, Field(ge=10)] = 100
    """Updates over which running means forget; "of late" is a tenth of it, "at first" the run's first fifth. An alarm is over
    after a window without it."""
    x0_drift: NonNegative = 0.6
    """How far the mean or the deviation of the student's x0 may be of late from what it was at first, in shares of the
    deviation at first; 0: off."""
    gradient_jump: NonNegative = 10.0
    """Times its running mean that a gradient norm may be, before clipping; 0: off."""
    critic_divergence: NonNegative = 0.6
    """Share of the flow's variance that the fake score may leave unexplained of late (its loss over that variance; 1: it knows
    nothing); 0: off."""
    diversity: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Share of what it was at first below which the distance between the videos of an update (of 2 or more), and of what it was
    in the first validation below which that between its prompts, must not fall; 0: off."""
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of a validation's colour values that may be black or full (within 1 %), beyond the first validation's; 0: off."""


class Hub(Group):
    """Upload of the student to the Hugging Face hub. It needs `hf auth login` or HF_TOKEN; a failure never stops training."""

    model_id: Annotated[str, AfterValidator(_repository)] | None = None
    """Repository, NAME/REPO, that gets the last checkpoint's student when the run is done: the LoRA or the whole transformer,
    the configuration, sampling.json and a model card. None: nothing is uploaded."""
    private: bool = True
    """Whether a repository that does not exist yet is made private."""
    push_checkpoints: bool = False
    """Upload after complete checkpoints too, one at a time: those that are saved meanwhile are passed over."""

    @model_validator(mode="after")
    def _check(self):
        if self.model_id is None:
            if not self.private:
                raise ValueError("private: false needs hub.model_id; valid without it is true")
            if self.push_checkpoints:
                raise ValueError("push_checkpoints: true needs hub.model_id; valid without it is false")
        return self


class Config(Group):
    version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION
    """Of this format. A file without it is of the version that dmdtrain reads."""
    model: Model = Model()
    student: Student = Student()
    fake_score: FakeScore = FakeScore()
    dmd: Dmd = Dmd()
    rollout: Rollout = Rollout()
    warmup: Warmup = Warmup()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    ema: Ema = Ema()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    log: Log = Log()
    alarms: Alarms = Alarms()
    hub: Hub = Hub()
    output_dir: PathText = "output/dmdtrain"
    """Folder of the run: config.yaml, checkpoints, samples, metrics. It must be new, empty or this run's own."""

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, values: Any) -> Any:
        """Before all else: a newer file may hold anything."""
        version = values.get("version") if isinstance(values, dict) else None
        if type(version) is int and version > VERSION:
            raise ValueError(f"version: {version} is newer than this dmdtrain reads; valid is {VERSION}")
        return values

    @model_validator(mode="after")
    def _check(self):
        if self.dmd.generator_update_interval > self.train.max_steps:
            raise ValueError(
                f"dmd.generator_update_interval: {self.dmd.generator_update_interval} is above train.max_steps "
                f"({self.train.max_steps}): the student would never be updated"
            )
        for name in ("student", "fake_score"):
            if self.model.precision not in ("fp32", "bf16") and getattr(self, name).kind == "full":
                raise ValueError(
                    f"{name}.kind: full can not be trained on model.precision {self.model.precision}; valid is lora, or bf16"
                )
        if self.train.deterministic and self.model.attention not in ("auto", "native"):
            raise ValueError(
                f"model.attention: {self.model.attention} does not go with train.deterministic; valid are auto, native"
            )
        if self.model.int8_matmul and self.model.precision != "int8":
            raise ValueError(f"model.int8_matmul: true needs model.precision int8; it is {self.model.precision}")
        if self.model.quantized_cache is not None and self.model.precision in ("fp32", "bf16"):
            raise ValueError(
                f"model.quantized_cache: {self.model.quantized_cache}: nothing is quantized at model.precision "
                f"{self.model.precision}; valid is null"
            )
        if self.model.offload_blocks:
            precisions = {self.model.precision, self.model.teacher_precision}
            if "int8-llm" in precisions:
                raise ValueError(
                    "model.offload_blocks: true does not go with int8-llm; valid are fp32, bf16, int8, nf4"
                )
            for name in ("student", "fake_score"):
                if getattr(self, name).kind == "full":
                    raise ValueError(f"model.offload_blocks: true needs {name}.kind: lora")
        if self.train.checkpoints_on == "host" and not self.train.gradient_checkpointing:
            raise ValueError("train.checkpoints_on: host needs train.gradient_checkpointing: true")
        if not self.train.checkpoint_replay and not (self.rollout.causal and self.train.gradient_checkpointing):
            raise ValueError(
                "train.checkpoint_replay: false is for causal students with train.gradient_checkpointing: true; "
                "valid without is true"
            )
        if self.warmup.kind != "none" and not self.rollout.causal:
            raise ValueError(
                f"warmup.kind: {self.warmup.kind} is for causal students (rollout.causal: true); valid without is none"
            )
        if self.dmd.real_data_loss_weight and self.data.videos is None:
            raise ValueError(
                f"dmd.real_data_loss_weight: {self.dmd.real_data_loss_weight} needs data.videos; valid without is 0"
            )
        if self.validation.real_clips and self.data.videos is None:
            raise ValueError(
                f"validation.real_clips: {self.validation.real_clips} needs data.videos; valid without is 0"
            )
        if self.validation.real_clips and not self.validation.every:
            raise ValueError(
                f"validation.real_clips: {self.validation.real_clips} needs validation; validation.every is 0"
            )
        if self.validation.held_out_prompts and not self.validation.every:
            raise ValueError(
                f"validation.held_out_prompts: {self.validation.held_out_prompts} needs validation; validation.every is 0"
            )
        warms_up = self.warmup.kind == "teacher_forcing" and self.warmup.data is None
        if self.data.videos is not None and not (
            warms_up or self.dmd.real_data_loss_weight or self.validation.real_clips or self.data.prompts is None
        ):
            raise ValueError(
                "data.videos: nothing in this run uses them; they are for warmup.kind teacher_forcing without warmup.data, "
                "for dmd.real_data_loss_weight above 0, for validation.real_clips above 0, and for their captions without "
                "data.prompts"
            )
        check_blocks(self.rollout, self.validation.num_frames, "validation.num_frames")
        if self.model.teacher is None and self.model.teacher_precision is not None:
            raise ValueError(
                f"model.teacher_precision: {self.model.teacher_precision} needs model.teacher: the teacher is the base"
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr: {self.schedule.min_lr} is above optimizer.lr ({self.optimizer.lr})")
        if not self.ema.enabled and self.ema.validate_with != "raw":
            raise ValueError(
                f"ema.validate_with: {self.ema.validate_with} needs ema.enabled: true; valid without it is raw"
            )
        return self

    @property
    def samples_per_update(self) -> int:
        return self.train.batch_size * self.train.gradient_accumulation

    @property
    def student_updates(self) -> int:
        """Student updates of the whole run."""
        return self.train.max_steps // self.dmd.generator_update_interval


# Keys that may change when a run goes on from its checkpoint: they do not touch what was trained so far.
RESUMABLE = (
    "train.max_steps",
    "train.max_bad_steps",
    "checkpoint",
    "validation",
    "log",
    "alarms",
    "hub",
    "ema.validate_with",
    "ema.keep_on",
    "data.on_bad_video",
    # Where prompts and clips lie: that they are the same is held by their content.
    "data.prompts",
    "data.prompt_column",
    "data.videos",
    # Where things are kept and how they are computed, in other roundings at most.
    "model.attention",
    "data.cache_dir",
    "data.cache_compress",
    "model.quantize_via",
    "model.quantized_cache",
    "model.offload_blocks",
    "train.gradient_checkpointing",
    "train.checkpoints_on",
    "train.checkpoint_replay",
    "train.batched_guidance",
    "train.compile",
    "train.deterministic",
    "output_dir",
)

# Keys that a branch may change besides: a run in a folder of its own that goes on from another one's checkpoint. What the
# tensors of the checkpoint mean stays.
BRANCHABLE = (
    *("optimizer.lr", "optimizer.grad_clip", "optimizer.grad_clip_method", "fake_score.lr", "fake_score.grad_clip"),
    *("schedule", "warmup.lr", "warmup.lr_warmup_steps", "warmup.steps", "warmup.data", "warmup.num_samples"),
    *("ema.decay", "ema.warmup", "ema.every"),
    *("dmd.generator_update_interval", "dmd.real_score_guidance_scale", "dmd.fake_score_guidance_scale"),
    *("dmd.min_timestep_ratio", "dmd.max_timestep_ratio", "dmd.timestep_shift", "dmd.min_score_timestep"),
    *("dmd.ts_schedule", "dmd.ts_schedule_max", "data.caption_dropout"),
    *("train.batch_size", "train.gradient_accumulation"),
)
BRANCH = "dmdtrain fit CONFIG --resume CHECKPOINT --output-dir NEW_FOLDER"
BRANCH_OFF = f"{BRANCH} --set KEY=VALUE"
TRAINS = ("validation.real_clips", "validation.held_out_prompts")  # are kept from training
SPLIT = ("train.batch_size", "train.gradient_accumulation")  # may change where their product does not


def nested_get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def groups() -> dict[str, type[Group]]:
    """The groups of keys, by name."""
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Group)}


def known_keys(group: str = "") -> list[str]:
    """Every key, with dots; or those of a group."""
    keys: list[str] = []
    kinds = groups()
    for name in Config.model_fields:
        keys += [f"{name}.{field}" for field in kinds[name].model_fields] if name in kinds else [name]
    return [key for key in keys if not group or key.startswith(f"{group}.")]


def _where(error: Any) -> list[str]:
    """The parts of the key that a pydantic error is about, without its names of a field's several types."""
    where = [text if (text := str(part)).isprintable() and len(text) <= 60 else _short(text) for part in error["loc"]]
    depth = next((n for n in (1, 2) if ".".join(where[:n]) in known_keys()), 0)
    if not depth:
        return where
    in_a_set = where[:2] == ["data", "videos"]
    return where[:depth] + [part for part in where[depth:] if part.isdigit() or (in_a_set and part.isidentifier())]


def _describe(error: Any) -> str:
    """One pydantic error as `key: what it is; what would be valid`."""
    where = _where(error)
    key = ".".join(where)
    value = error.get("input")
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        names = known_keys() if len(where) > 1 else known_keys() + list(Config.model_fields)
        if where[:2] == ["data", "videos"]:  # a key of a list's item
            names = [".".join([*where[:-1], name]) for name in VideoSet.model_fields]
        near = [k for k in names if k.split(".")[-1] == where[-1]][:1]  # the right name in the wrong group
        near = near or difflib.get_close_matches(key, names, 1, 0.5)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "value_error":
        message = str(context["error"])
        in_a_set = where[:2] == ["data", "videos"] and where[-1] in VideoSet.model_fields
        if key in known_keys() or in_a_set:  # of the value itself
            return f"{key}: {message}"
        return f"{key}.{message}" if key and not message.startswith(f"{key}.") else message
    wanted = {
        "literal_error": f"valid are {str(context.get('expected', '')).replace(chr(39), '')}",
        "greater_than": f"it must be above {context.get('gt')}",
        "greater_than_equal": f"it must be at least {context.get('ge')}",
        "less_than": f"it must be below {context.get('lt')}",
        "less_than_equal": f"it must be at most {context.get('le')}",
        "model_type": "it must be a group of keys",
        "missing": "it must be two numbers" if where and where[-1].isdigit() else "it must be given",
        "too_short": "it must not be empty",
        "string_too_short": "it must not be empty",
    }.get(kind, error["msg"][0].lower() + error["msg"][1:])
    return f"{key or 'a key'}: {_short(value)}: {wanted}"


def build(values: dict[str, Any], source: str = "config", overrides: Sequence[str] = ()) -> Config:
    """A checked `Config`, or ConfigError with one line for the first thing that is wrong.

    The line begins with `source`, or with `--set` where one of the `overrides` gave the key.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        others = len({tuple(_where(error)) for error in errors}) - 1
        more = f" ({others} more)" if others else ""
        said = _describe(errors[0])
        key = f"{said.partition(':')[0]}."
        given = [f"{_key_of(override)}." for override in overrides]
        if any(each.startswith(key) or key.startswith(each) for each in given):
            source = "--set"
        raise ConfigError(f"{source}: {said}{more}") from None


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """With other values of keys (with dots), checked again."""
    values = config.model_dump()
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    return build(values)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies `key=value` overrides, as `apply_override` reads them."""
    return build(read(path, overrides)[0], str(path), overrides or ())


def load_own(path: Path) -> Config:
    """Reads a config.yaml that `dump` wrote, in more bytes than the file that it was made from."""
    values, _ = read(path, most=4 * strict_yaml.MAX_BYTES)
    if "output_dir" not in values:
        raise ConfigError(f"{path}: it is empty or ends early")
    return build(values, str(path))


def read(
    path: str | Path, overrides: list[str] | None = None, most: int = strict_yaml.MAX_BYTES
) -> tuple[dict[str, Any], dict[str, str]]:
    """What a YAML file and overrides give, unchecked, and where each known key in it is from: `file` or `--set`."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            values = strict_yaml.parse(file.read(most + 1), most)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: it must hold groups of keys, such as model: and train:")
    origins = {key: "file" for key in known_keys() if _given(values, key)}
    for override in overrides or []:
        apply_override(values, override)
        changed = _key_of(override)
        for key in known_keys():
            if key == changed or key.startswith(f"{changed}."):  # a group is replaced as a whole
                origins.pop(key, None)
                origins |= {key: "--set"} if _given(values, key) else {}
    return values, origins


def _given(values: dict[str, Any], key: str) -> bool:
    group, _, name = key.rpartition(".")
    inner = values.get(group) if group else values
    return isinstance(inner, dict) and name in inner


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip()


@cache
def _takes() -> dict[str, set[str]]:
    """Kinds of values that each key takes, as JSON Schema names them: string, null, array ..."""
    whole = Config.model_json_schema()

    def kinds(part: dict[str, Any]) -> set[str]:
        options = part.get("anyOf")
        return set().union(*map(kinds, options)) if options else {part.get("type", "object")}

    def of(key: str) -> dict[str, Any]:
        group, _, name = key.rpartition(".")
        return (whole["$defs"][groups()[group].__name__] if group else whole)["properties"][name]

    return {key: kinds(of(key)) for key in known_keys()}


QUOTED = re.compile(r"""(?s)"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""")


def _is_yaml(text: str, takes: set[str]) -> bool:
    """Whether an override's value is read as YAML by a key that takes these kinds of values."""
    return (
        "string" not in takes
        or ("null" in takes and text == "null")
        or ("integer" in takes and text.isdecimal())
        or ("array" in takes and text[:1] + text[-1:] == "[]")
        or ("object" in takes and text[:1] + text[-1:] == "{}")
        or QUOTED.fullmatch(text) is not None
    )


def apply_override(values: dict[str, Any], override: str) -> None:
    """Puts the value of `key=value` into unchecked values; ConfigError where it is none.

    A key that takes text takes its value as it stands, whatever YAML would make of it: `a #1`, `no`, nothing at all. What can
    be told apart from text is YAML there, too: `null` where the key may be null, a list in brackets where it may be one, and a
    value that stands in quotes as a whole. Any other key's value is YAML.
    """
    key, sign, text = override.partition("=")
    text = text.strip() if key != key.rstrip() else text  # key = value
    key = key.strip()
    shown = _short(override)[1:-1]
    if not sign or not key:
        raise ConfigError(f"--set {shown}: it must be key=value, such as train.max_steps=100")
    if not strict_yaml.is_text(override):
        raise ConfigError(f"--set {shown}: {strict_yaml.NO_TEXT}")
    takes = {"object"} if key in groups() else _takes().get(key, {"string"})
    try:
        value = strict_yaml.parse(text) if _is_yaml(text, takes) else text
        value = str(value) if isinstance(value, str) else value  # without a line: a command has none
    except ValueError as error:
        reason = "the value is not valid YAML" if str(error).startswith("not valid YAML") else str(error)
        raise ConfigError(f"--set {shown}: {reason}") from None
    if value is None and key in groups():
        raise ConfigError(f"--set {shown}: a group of keys; set one of them, such as {known_keys(key)[0]}=VALUE")
    *parents, last = key.split(".")
    if len(parents) > 2:
        raise ConfigError(f"--set {shown}: {key}: unknown key")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {shown}: {parent} is not a group of keys")
    values[last] = value


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load_own` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Config, new: Config, *, branch: bool = False) -> list[str]:
    """Keys that differ and may not when a run goes on, or when one branches off, each as `key: old -> new`."""
    found, free = [], RESUMABLE + (BRANCHABLE if branch else ())
    for key in known_keys():
        if (key in free or key.split(".")[0] in free) and key not in TRAINS:
            continue
        if key in SPLIT and old.samples_per_update == new.samples_per_update:
            continue
        before, after = nested_get(old, key), nested_get(new, key)
        if before != after:
            found.append(f"{key}: {before!r} -> {after!r}")
    # Under a decaying schedule the length of the run is part of every learning rate so far.
    if not branch and new.schedule.name != "constant" and old.student_updates != new.student_updates:
        found.append(f"train.max_steps: {old.train.max_steps} -> {new.train.max_steps} (the schedule depends on it)")
    return found


def branch_changes(old: Config, new: Config) -> list[str]:
    """What a branch changes that the run itself could not, each as `key: old -> new`."""
    refused = differences(old, new, branch=True)
    return [change for change in differences(old, new) if change not in refused]
