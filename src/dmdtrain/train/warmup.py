"""The warm-up of a causal student: it learns to read clean context before DMD makes it read its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import VAE_TEMPORAL_FACTOR, ConfigError
from dmdtrain.data.latents import INFO, LatentFolder, read_captions, read_latents
from dmdtrain.data.prompts import EpochSampler
from dmdtrain.data.videos import list_clips, read_clip
from dmdtrain.models.decode import encode_videos
from dmdtrain.models.roles import load_parameters
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train import synthesize
from dmdtrain.train.checkpoint import WARMUP
from dmdtrain.train.log import Live
from dmdtrain.train.loop import count_bad, guarded_step, peak_memory_gib, run_stage
from dmdtrain.train.optim import build_optimizer, learning_rate
from dmdtrain.train.render import Renderer
from dmdtrain.train.setup import Run, encode_text, sampling_json
from dmdtrain.train.step import Stats
from dmdtrain.train.warmup_step import draw_warmup, warmup_backward


def holds_latents(path: Path) -> bool:
    """Whether `dmdtrain synthesize` made latents there; what else a folder can hold are clips."""
    return (path / INFO).exists() and LatentFolder.open(path, "warmup.data").facts["what"] != "videos"


def check_data(run: Run) -> None:
    """ConfigError unless `warmup.data`, where it is given, holds what the warm-up needs."""
    settings = run.config.warmup
    if settings.kind == "none" or settings.data is None:
        return
    path = Path(settings.data).expanduser()
    if not holds_latents(path):
        if not path.is_dir():
            raise ConfigError(f"warmup.data: {path}: no such folder")
        if settings.kind == "ode_regression":
            raise ConfigError(
                f"warmup.data: {path} holds no trajectories, which ode_regression needs; make them with dmdtrain "
                "synthesize, or set warmup.kind to teacher_forcing"
            )
        if not list_clips(path):
            raise ConfigError(f"warmup.data: {path} holds neither synthesized latents nor clips with .txt captions")
        return
    folder = LatentFolder.open(path, "warmup.data")
    wanted, found = synthesize.warmup_shape(run), folder.facts["latent_shape"]
    if (found[0], *found[2:]) != (wanted[0], *wanted[2:]) or found[1] < wanted[1]:
        raise ConfigError(
            f"warmup.data: {folder.path} holds latents {found}; this run needs {list(wanted)} (or more frames)"
        )
    if settings.kind == "ode_regression":
        _state_indices(folder, run.timesteps)
    if not folder.files():
        raise ConfigError(f"warmup.data: {folder.path} holds no samples; run dmdtrain synthesize to its end")


def encode_clips(path: Path, folder: LatentFolder, renderer: Renderer, console: Console) -> None:
    """Adds what is missing of the latents of a folder's captioned clips; unusable ones are told and skipped."""
    _, num_frames, height, width = folder.facts["latent_shape"]
    factor = renderer.run.base.spatial_factor
    size = (1 + VAE_TEMPORAL_FACTOR * (num_frames - 1), height * factor, width * factor)
    clips = list_clips(path)
    missing = folder.missing(len(clips))
    with renderer.codec() as vae, Live(len(clips), len(clips) - len(missing), console, unit="clip") as live:
        for index in missing:
            try:
                caption, video = read_clip(clips[index], *size)
            except ValueError as error:
                console.print(f"skipped {clips[index]}: {error}", soft_wrap=True)
            else:
                folder.write(index, caption, encode_videos(vae, video[None].to(renderer.text.device))[0])
            live.step(index + 1, "")
    if not folder.files():
        raise ConfigError(f"warmup.data: no clip of {path} can be used; they need {size[0]} frames and a caption")


def _state_indices(folder: LatentFolder, timesteps: list[float]) -> list[int]:
    """Which of a folder's states are those at the student's denoising steps."""
    there = folder.facts["timesteps"] or []
    indices = [next((i for i, t in enumerate(there) if abs(t - wanted) < 1e-3), None) for wanted in timesteps]
    if None in indices:
        listed = ", ".join(f"{t:g}" for t in there) or "none"
        raise ConfigError(
            f"warmup.data: {folder.path} holds states at {listed}; ode_regression needs them at "
            f"{', '.join(f'{t:g}' for t in timesteps)} (dmdtrain synthesize --what trajectories)"
        )
    return indices  # type: ignore[return-value]


class Warmup:
    """The first stage of a run. It trains the student's weights in `renderer.roles`."""

    def __init__(self, run: Run, renderer: Renderer, console: Console):
        self.run, self.config, self.console = run, run.config, console
        self.renderer, self.roles, self.text = renderer, renderer.roles, renderer.text
        self.root = run.output_dir / WARMUP
        settings, optimizer = run.config.warmup, run.config.optimizer
        self.optimizer = build_optimizer(
            optimizer.name,
            self.roles.parameters("student"),
            lr=settings.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.generator = torch.Generator().manual_seed(run.config.train.seed + 2)
        self.step = self.bad_steps = self.bad_in_a_row = 0

    def prepare(self) -> None:
        """Opens the data, or has the teacher make them."""
        folder = self._folder()
        needs_states = self.config.warmup.kind == "ode_regression"
        self.states = _state_indices(folder, self.run.timesteps) if needs_states else None
        files = folder.files()
        encode_text(self.text, read_captions(files), self.console)
        self.files = EpochSampler(files, self.config.train.seed)
        self.num_frames = synthesize.warmup_shape(self.run)[1]

    def _folder(self) -> LatentFolder:
        settings, run = self.config.warmup, self.run
        own = run.output_dir / "cache" / WARMUP
        if settings.data is None:
            what = "trajectories" if settings.kind == "ode_regression" else "latents"
            facts, sigmas = synthesize.plan_of(run, what, settings.teacher_steps, self.config.train.seed)
            folder = LatentFolder.create(own, facts, "warmup")
            if missing := folder.missing(settings.num_samples):
                self.console.print(f"warm-up: the teacher makes {len(missing)} videos in {own}", soft_wrap=True)
            synthesize.make_samples(self.renderer, folder, sigmas, settings.num_samples, self.console)
            return folder
        path = Path(settings.data).expanduser()
        if holds_latents(path):
            return LatentFolder.open(path, "warmup.data")
        listed = hashlib.sha256("\n".join(str(clip) for clip in list_clips(path)).encode()).hexdigest()
        facts = {"what": "clips", "from": str(path), "clips_sha256": listed, "base": run.base.name}
        facts |= {"latent_shape": list(synthesize.warmup_shape(run)), "timesteps": None}
        folder = LatentFolder.create(own, facts, "warmup.data")
        encode_clips(path, folder, self.renderer, self.console)
        return folder

    def train_step(self) -> dict[str, float]:
        self.step += 1
        started = perf_counter()
        config, parameters = self.config, self.roles.parameters("student")
        n, micro = config.samples_per_update, config.train.batch_size
        captions, clean, states = read_latents(self.files.draw(n), self.num_frames)
        batch = draw_warmup(
            config,
            self.run.timesteps,
            self.run.flow_shift,
            self.text.get(captions),
            clean,
            None if self.states is None or states is None else states[self.states],
            self.generator,
        ).to(self.text.device)
        total: Stats = {}
        for start in range(0, n, micro):
            rows = batch.rows(start, start + micro)
            stats = warmup_backward(self.roles, config.rollout, rows, micro / n, self.renderer.autocast)
            total = {key: total.get(key, 0) + value * (micro / n) for key, value in stats.items()}
        lr = learning_rate(
            self.step - 1,
            config.warmup.steps,
            peak=config.warmup.lr,
            name="constant",
            warmup_steps=config.warmup.lr_warmup_steps,
            min_lr=0.0,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm, finite = guarded_step(
            self.optimizer, parameters, [*total.values()], config.optimizer.grad_clip, config.optimizer.grad_clip_method
        )
        count_bad(self, not finite, config.train.max_bad_steps, "lower warmup.lr")
        values = {key: float(value) for key, value in (total | {"warmup_grad_norm": norm}).items()} if finite else {}
        return values | {
            "lr_warmup": lr,
            "bad_steps": self.bad_steps,
            "seconds": perf_counter() - started,
            "memory_gib": peak_memory_gib(self.text.device),
        }

    def save(self) -> Path:
        tensors = {"student": dict(self.roles.named_parameters("student")), "random": {}}
        texts = {"config.yaml": configuration.dump(self.config), "sampling.json": sampling_json(self.run)}
        checkpoints.save_optimizer("student", self.optimizer, tensors, texts)
        tensors["random"] = {"draws": self.generator.get_state()}
        tensors["random"] |= {f"files.{k}": v for k, v in self.files.state_dict().items()}
        counters = {name: getattr(self, name) for name in ("step", "bad_steps", "bad_in_a_row")}
        texts["state.json"] = json.dumps({"stage": WARMUP} | counters) + "\n"
        return checkpoints.write_checkpoint(self.root, self.step, tensors, texts, self.config.checkpoint.keep)

    def load(self, folder: Path) -> None:
        load_parameters(self.roles.named_parameters("student"), checkpoints.read_tensors(folder, "student"))
        checkpoints.load_optimizer("student", self.optimizer, folder)
        random = checkpoints.read_tensors(folder, "random")
        self.generator.set_state(random.pop("draws"))
        try:
            self.files.load_state_dict({k.removeprefix("files."): v for k, v in random.items()})
        except ValueError as error:
            raise ConfigError(f"warmup.data: {error}; an exact resume needs the same samples") from None
        state = checkpoints.read_json(folder, "state.json")
        for name in ("step", "bad_steps", "bad_in_a_row"):
            setattr(self, name, state[name])

    def fit(self) -> None:
        shown = {"loss": "warmup_loss", "grad": "warmup_grad_norm"}
        self.root.mkdir(parents=True, exist_ok=True)
        run_stage(
            self, self.config.warmup.steps, self.root, self.config, self.console, shown=shown, unit="warm-up step"
        )
