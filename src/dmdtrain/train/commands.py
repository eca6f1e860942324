"""What the commands other than `fit` do with a checkpoint."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dmdtrain.config import (
    VAE_TEMPORAL_FACTOR,
    ConfigError,
    build,
    check_blocks,
    check_steps,
    check_writable,
    unwritable,
)
from dmdtrain.data.prompts import load_prompts
from dmdtrain.export import (
    StudentError,
    comfyui_sampling,
    lora_format,
    stock_scheduler,
    write_lora,
    write_pipeline,
)
from dmdtrain.models.decode import StreamDecoder, decode_latents
from dmdtrain.strict_yaml import NO_TEXT, is_text
from dmdtrain.train import setup
from dmdtrain.train.checkpoint import check_checkpoint, config_of, has_file, read_json
from dmdtrain.train.log import Live
from dmdtrain.train.render import Renderer, decode_tiled
from dmdtrain.train.validation import Mp4Writer, write_samples


def _pick_weights(ckpt: Path, weights: str) -> str:
    return weights or ("ema" if has_file(ckpt, "ema.safetensors") else "raw")


def _renderer(run: setup.Run, ckpt: Path, weights: str, prompts: list[str], console: Console) -> Renderer:
    """A renderer of the checkpoint's student, with the prompts encoded."""
    device = setup.device_of_this_machine()
    roles = setup.load_student(run, ckpt, weights, device, setup.teller(console))
    text = setup.text_cache(run, device)
    setup.encode_text(text, [*prompts, run.config.validation.negative_prompt], console)
    return Renderer(run, roles, text, setup.autocast(run.config, device))


def _timesteps(text: str | None, run: setup.Run) -> list[float]:
    """--steps, checked by the rules of validation.steps."""
    if text is None:
        return run.validation_timesteps
    checked = build({"validation": {"steps": text}}, "--steps").validation.steps
    assert checked is not None
    return [float(t) for t in checked]


def _shape(run: setup.Run, frames: int | None) -> tuple[int, int, int, int]:
    """[C, T, H, W] of the videos: the run's validation size, in `--frames` video frames where given."""
    channels, latent_frames, height, width = run.validation_latent_shape
    if frames is not None:
        try:
            check_blocks(run.config.rollout, frames, "--frames")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        latent_frames = setup.latent_frames(frames)
        positions = run.base.positions
        if latent_frames > positions:
            raise ConfigError(
                f"--frames: {frames}: the model has positions for {1 + VAE_TEMPORAL_FACTOR * (positions - 1)} frames at most"
            )
    return channels, latent_frames, height, width


@contextmanager
def _steps_live(total: int, console: Console) -> Iterator[Callable[[], None]]:
    """Progress in denoising steps of batches; what it gives is called after each."""
    with Live(total, 0, console) as live:
        done = itertools.count(1)
        yield lambda: live.step(next(done), "")


def _make_folder(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(key, folder, error, "made") from None


def _free_name(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3 ... that is not there yet."""
    names = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2))
    return next(name for name in itertools.chain([folder], names) if not name.exists())


def validate(
    *,
    ckpt: Path,
    prompts: Path | None,
    steps: str | None,
    compare_teacher: bool,
    teacher_steps: int,
    count: int | None,
    seed: int | None,
    frames: int | None,
    weights: str,
    out: Path | None,
    console: Console,
) -> None:
    run = setup.load_run(ckpt)
    timesteps = _timesteps(steps, run)
    settings = run.config.validation
    texts = run.validation_prompts
    if prompts is not None:
        texts = load_prompts(str(prompts), "--prompts", held_out=True, column=run.config.data.prompt_column)
    elif count is not None:
        texts = setup.all_validation_prompts(run.config)
    texts = texts[:count]
    seed = settings.seed if seed is None else seed
    weights = _pick_weights(ckpt, weights)
    folder = out or _free_name(run.output_dir / "validate" / ckpt.name)
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} exists and is not an empty folder; choose another")
    check_writable(folder, "--out")

    shape = _shape(run, frames)
    renderer = _renderer(run, ckpt, weights, texts, console)
    columns, facts = {}, run.sampling() | {"checkpoint": str(ckpt), "weights": weights, "seed": seed}
    facts |= {"timesteps": timesteps, "sigmas": [t / 1000 for t in timesteps], "seconds": {}}
    if compare_teacher:
        guidance = run.config.dmd.real_score_guidance_scale
        name = f"teacher {teacher_steps} steps"
        console.print(f"teacher: {len(texts)} videos in {teacher_steps} steps, guidance {guidance:g}", soft_wrap=True)
        started = time.monotonic()
        with _steps_live(len(renderer.batches(len(texts), shape)) * teacher_steps, console) as on_step:
            latents = renderer.teacher(texts, seed, shape, teacher_steps, guidance, settings.negative_prompt, on_step)
        facts["seconds"][name] = round(time.monotonic() - started, 2)
        columns[name] = renderer.decode(latents)
    console.print(f"student ({weights}): {len(texts)} videos in {len(timesteps)} steps", soft_wrap=True)
    started = time.monotonic()
    with _steps_live(renderer.student_steps(len(texts), shape, timesteps), console) as on_step:
        columns["student"] = renderer.student_videos(
            texts, seed, shape, timesteps, settings.guidance_scale, settings.negative_prompt, on_step
        )
    facts["seconds"]["student"] = round(time.monotonic() - started, 2)
    results = write_samples(folder, columns, texts, facts, run.fps)
    for name, scores in results["scores"].items():
        console.print(f"{name}: right: " + ", ".join(f"{k} {v:.0%}" for k, v in scores.items()), soft_wrap=True)
    console.print(f"videos and numbers: {folder}\ncontact sheet:      {folder / 'contact_sheet.png'}", soft_wrap=True)


def generate(
    *, ckpt: Path, prompt: str, out: Path, seed: int, frames: int | None, weights: str, console: Console
) -> None:
    if out.suffix != ".mp4":
        raise ConfigError(f"--out: {out}: the name must end in .mp4")
    check_writable(out.parent, "--out", out.name)
    if os.path.lexists(out):
        raise ConfigError(f"--out: {out} exists; choose another name")
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    if not is_text(prompt):
        raise ConfigError(f"the prompt holds {NO_TEXT}")
    run = setup.load_run(ckpt)
    shape = _shape(run, frames)
    renderer = _renderer(run, ckpt, _pick_weights(ckpt, weights), [prompt], console)
    _make_folder(out.parent, "--out")
    settings, timesteps = run.config.validation, run.validation_timesteps
    tiled = decode_tiled(run, shape)
    with (
        _steps_live(renderer.student_steps(1, shape, timesteps), console) as on_step,
        renderer.codec() as vae,
        Mp4Writer(out, run.fps) as writer,
    ):
        decoder, latents = StreamDecoder(vae), []
        options = (settings.guidance_scale, settings.negative_prompt, on_step)
        for block in renderer.student_blocks([prompt], [seed], shape, timesteps, *options):
            if tiled:
                latents.append(block)
            else:
                writer.write(decoder(block)[0].cpu())
        if tiled:
            writer.write(decode_latents(vae, torch.cat(latents, 2), tiled=True)[0].cpu())
    console.print(f"wrote {out}", soft_wrap=True)


def _check_sampling(ckpt: Path, sampling: dict[str, Any]) -> None:
    """ConfigError unless sampling.json holds what an export writes down."""
    try:
        timesteps = [float(t) for t in sampling["timesteps"]]
        check_steps(timesteps, "timesteps")
        if not all(0 < t <= 1000 for t in timesteps) or not all(type(t) in (int, float) for t in sampling["timesteps"]):
            raise ValueError("timesteps: they must lie in (0, 1000]")
        float(sampling["guidance_scale"]), str(sampling["base_model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--ckpt: {ckpt}: sampling.json does not hold what it should ({error})") from None


def _check_adapter(ckpt: Path, values: dict[str, torch.Tensor], rank: int) -> None:
    """ConfigError unless the tensors are pairs A [rank, in] and B [out, rank] of one adapter."""
    modules = {name.removesuffix(f".lora_{part}.weight") for name in values for part in "AB"} - set(values)
    wanted = {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    if not modules or wanted != set(values):
        odd = sorted(wanted ^ set(values))
        raise ConfigError(f"--ckpt: {ckpt}: its student is no LoRA of pairs A and B{f' ({odd[0]})' if odd else ''}")
    for name, value in values.items():
        side = 0 if name.endswith("A.weight") else 1
        if value.ndim != 2 or value.shape[side] != rank or not value.is_floating_point():
            raise ConfigError(
                f"--ckpt: {ckpt}: {name} is {value.dtype} {list(value.shape)}, not of a LoRA of rank {rank}"
            )


def export_lora(*, ckpt: Path, out: Path, file_format: str, weights: str, console: Console) -> None:
    check_checkpoint(ckpt, "--ckpt")
    config, sampling = config_of(ckpt), read_json(ckpt, "sampling.json")
    _check_sampling(ckpt, sampling)
    student = config.student
    if student.kind != "lora":
        raise ConfigError(f"--ckpt: {ckpt}: its student was trained whole (student.kind: full); it has no LoRA")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out: {out}: the name must end in .safetensors")
    check_writable(out.parent, "--out", out.name)
    scheduler_folder = out.with_name(f"{out.stem}_scheduler")
    for path in (out, scheduler_folder):
        if os.path.lexists(path):
            raise ConfigError(f"--out: {path} exists; choose another name")
    values = setup.student_weights(ckpt, _pick_weights(ckpt, weights))
    _check_adapter(ckpt, values, student.rank)
    _make_folder(out.parent, "--out")
    write_lora(out, values, student.alpha / student.rank, file_format, sampling)
    console.print(f"wrote {out}", soft_wrap=True)
    if lora_format(file_format) == "original":
        console.print(f"in ComfyUI: {comfyui_sampling(sampling)}", soft_wrap=True)
    else:
        console.print("only Diffusers reads it; --format original is read by ComfyUI and others, too", soft_wrap=True)
    if config.rollout.causal:
        console.print(
            "a causal student is sampled block by block: no scheduler for the stock pipeline; "
            "export-pipeline writes one that samples it",
            soft_wrap=True,
        )
        return
    timesteps = sampling["timesteps"]
    scheduler = stock_scheduler(timesteps)
    listed = ", ".join(f"{t:g}" for t in timesteps)
    if scheduler is None:
        console.print(
            f"no stock scheduler configuration gives the timesteps {listed}: none was written", soft_wrap=True
        )
        return
    scheduler.save_pretrained(scheduler_folder)
    console.print(
        f"wrote {scheduler_folder}: with it WanPipeline samples at {listed} "
        f"(num_inference_steps={len(timesteps)}, guidance_scale=1.0); with another number of steps it walks others, "
        "which were never trained",
        soft_wrap=True,
    )


def export_pipeline(*, ckpt: Path, out: Path, weights: str, precision: str | None, console: Console) -> None:
    run = setup.load_run(ckpt)
    precision = precision or ("fp32" if run.config.model.precision == "fp32" else "bf16")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"--precision: {precision}: valid are fp32, bf16")
    check_writable(out.parent, "--out", out.name)
    if os.path.lexists(out):
        raise ConfigError(f"--out: {out} exists; choose another name")
    student = run.config.student
    facts = run.sampling() | run.video_size | {"fps": run.fps}
    scale = student.alpha / student.rank if student.kind == "lora" else None
    values = setup.student_weights(ckpt, _pick_weights(ckpt, weights))
    if student.kind == "lora":
        _check_adapter(ckpt, values, student.rank)
    _make_folder(out.parent, "--out")
    try:
        name = write_pipeline(out, run.base, precision, values, scale, facts)
    except StudentError as error:
        raise ConfigError(f"--ckpt: {ckpt}: {error}") from None
    remote = "" if name == "WanPipeline" else ", trust_remote_code=True"
    console.print(
        f'wrote {out}: DiffusionPipeline.from_pretrained("{out}"{remote}) gives a {name}; {out / "README.md"} shows its call',
        soft_wrap=True,
    )
