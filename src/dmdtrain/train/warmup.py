"""The warm-up of a causal student: it learns to read clean context before DMD makes it read its own."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import ConfigError
from dmdtrain.data.latents import LatentFolder, holds_latents, read_captions, read_latents
from dmdtrain.data.videos import METADATA
from dmdtrain.files import make_folder
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train import synthesize
from dmdtrain.train.alarms import BAD_STEPS, Alarms, drawn_again, dump_bad_step, load_alarms
from dmdtrain.train.checkpoint import WARMUP
from dmdtrain.train.clips import Clips, warmup_key
from dmdtrain.train.flops import warmup_flops
from dmdtrain.train.loop import count_bad, guarded_step, peak_memory_gib, run_stage
from dmdtrain.train.optim import build_optimizer, learning_rate
from dmdtrain.train.plan import throughput
from dmdtrain.train.prepare_videos import ClipLoader
from dmdtrain.train.render import Renderer
from dmdtrain.train.reports import Reports
from dmdtrain.train.same_data import Sampler, load_random, record, warmup_files_of
from dmdtrain.train.setup import Run, encode_text, sampling_json
from dmdtrain.train.step import Stats, as_numbers
from dmdtrain.train.underway import Tensors, Underway, load_underway
from dmdtrain.train.warmup_step import draw_warmup, warmup_backward

COUNTERS = ("step", "bad_steps")


def check_data(run: Run) -> None:
    """ConfigError unless `warmup.data`, where it is given, holds what the warm-up needs."""
    settings = run.config.warmup
    if settings.kind == "none" or settings.data is None:
        return
    path = Path(settings.data).expanduser()
    if not holds_latents(path, "warmup.data"):
        if not path.is_dir() and path.name not in METADATA:
            raise ConfigError(f"warmup.data: {path}: no such folder")
        if settings.kind == "ode_regression":
            raise ConfigError(
                f"warmup.data: {path} holds no trajectories, which ode_regression needs; make them with dmdtrain "
                "synthesize, or set warmup.kind to teacher_forcing"
            )
        return  # clips, at which `clips.scan` looks
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


class Synthesized:
    """What `dmdtrain synthesize` made, in shuffled epochs; states of trajectories at the student's timesteps alone."""

    def __init__(self, folder: LatentFolder, run: Run):
        needs_states = run.config.warmup.kind == "ode_regression"
        self.states = _state_indices(folder, run.timesteps) if needs_states else None
        self.num_frames = synthesize.warmup_shape(run)[1]
        self.files = synthesize.warmup_sampler(run)

    def draw(self, n: int) -> tuple[list[str], torch.Tensor, torch.Tensor | None]:
        """Captions, latents [n, C, T, H, W] and states [S, n, C, T, H, W]."""
        captions, latents, states = read_latents(self.files.draw(n), self.num_frames)
        return captions, latents, None if self.states is None or states is None else states[self.states]


class Warmup:
    """The first stage of a run. It trains the student's weights in `renderer.roles`, on `clips` where it takes real ones."""

    def __init__(
        self,
        run: Run,
        renderer: Renderer,
        console: Console,
        clips: dict[str, Clips],
        reports: Reports | None = None,
    ):
        self.reports = reports or Reports()
        self.run, self.config, self.console = run, run.config, console
        self.renderer, self.roles, self.text = renderer, renderer.roles, renderer.text
        self.root, self.clips = run.output_dir / WARMUP, clips
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
        self.alarms = Alarms(self.config.alarms, self._alarm)
        self.step = self.bad_steps = 0
        self.bad_in_a_row = {WARMUP: 0}
        self.underway: Underway | None = None  # the step after `step`, if it is begun

    def _alarm(self, text: str) -> None:
        self.console.print(f"warm-up: {text}", soft_wrap=True)
        self.reports.event("alarm", f"warm-up: {text}", self.step)

    def prepare(self) -> None:
        """Opens the data, or has the teacher make them."""
        self.samples: ClipLoader | Synthesized
        if key := warmup_key(self.run):
            self.samples = ClipLoader(self.run, self.clips[key], self.config.train.seed)
            return
        folder = self._folder()
        self.samples = Synthesized(folder, self.run)
        encode_text(self.text, read_captions(folder.files()), self.console)

    def _folder(self) -> LatentFolder:
        settings = self.config.warmup
        if settings.data is None:
            own, facts, sigmas = synthesize.own_plan(self.run)
            folder = LatentFolder.create(own, facts, "warmup")
            if missing := folder.missing(settings.num_samples):
                self.console.print(f"warm-up: the teacher makes {len(missing)} videos in {own}", soft_wrap=True)
            synthesize.make_samples(self.renderer, folder, sigmas, settings.num_samples, self.console)
            return folder
        return LatentFolder.open(Path(settings.data).expanduser(), "warmup.data")

    def train_step(self) -> dict[str, float]:
        """The next step, or what is left of it; Paused where a signal comes within it."""
        self.underway = underway = self.underway or Underway(self._random(), WARMUP)
        with underway.timed(WARMUP):
            values = self._update(underway)
        seconds, device = underway.seconds[WARMUP], self.text.device
        values |= throughput(warmup_flops(self.run), seconds, device)
        return values | {"seconds": seconds, "memory_gib": peak_memory_gib(device)}

    def _update(self, underway: Underway) -> dict[str, float]:
        config, parameters = self.config, self.roles.parameters("student")
        n = config.samples_per_update
        captions, clean, states = self.samples.draw(n)
        batch = draw_warmup(
            config,
            self.run.timesteps,
            self.run.flow_shift,
            self.text.get(captions),
            clean,
            states,
            self.generator,
        ).to(self.text.device)

        def backward(rows: slice, share: float) -> Stats:
            part = batch.rows(rows.start, rows.stop)
            return warmup_backward(self.roles, config, part, share, self.renderer.autocast)

        total = underway.accumulate(n, config.train.batch_size, backward)
        lr = learning_rate(
            self.step,
            config.warmup.steps,
            peak=config.warmup.lr,
            name="constant",
            warmup_steps=config.warmup.lr_warmup_steps,
            min_lr=0.0,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clip, method = config.optimizer.grad_clip, config.optimizer.grad_clip_method
        with underway.optimizing():
            norm, finite = guarded_step(underway, self.optimizer, parameters, [*total.values()], clip, method)
        self.step, self.underway = self.step + 1, None
        if not finite:
            dump_bad_step(
                *(self.run.output_dir / BAD_STEPS, self.step, WARMUP),
                generator_state=underway.random["draws"],
                prompts=captions,
                statistics=total,
                gradient_norms={"student": norm},
                console=self.console,
                clips=[str(getattr(sample, "file", sample)) for sample in self._drawn(underway)],
                more={"timestep": batch.timestep.cpu()},
            )
        count_bad(self, {WARMUP: not finite}, config.train.max_bad_steps, {"warmup.lr": config.warmup.lr})
        values = as_numbers(total | {"warmup_grad_norm": norm}) if finite else {}
        values |= self.alarms.step(self.step, values)
        return values | {"lr_warmup": lr, "bad_steps": self.bad_steps}

    def _drawn(self, underway: Underway) -> list[Any]:
        """The samples of the step in hand."""
        return drawn_again(self._sampler, underway.random, "files.", self.config.samples_per_update)

    @property
    def _sampler(self) -> Sampler:
        return self.samples.files if isinstance(self.samples, Synthesized) else self.samples.sampler

    @cached_property
    def _data(self) -> Tensors:
        return record(self.run, self.clips, warmup=True)

    def _random(self) -> Tensors:
        """Generator and position in the data, between two steps."""
        position = {f"files.{key}": value for key, value in self._sampler.state_dict().items()}
        return {"draws": self.generator.get_state()} | position

    def content(self) -> checkpoints.Content:
        parameters = self.roles.named_parameters("student")
        tensors: dict[str, Tensors] = {"student": dict(parameters)}  # type: ignore[arg-type]
        texts = {"config.yaml": configuration.dump(self.config), "sampling.json": sampling_json(self.run)}
        checkpoints.save_optimizer("student", self.optimizer, tensors, texts)
        tensors["random"] = self._data | (self._random() if self.underway is None else self.underway.random)
        counters = {name: getattr(self, name) for name in COUNTERS}
        state = {"stage": WARMUP} | counters | {"bad_in_a_row": self.bad_in_a_row, "alarms": self.alarms.state()}
        if self.underway is not None:
            self.underway.add_to(tensors, state, parameters)
        texts["state.json"] = json.dumps(state) + "\n"
        return tensors, texts

    def load(self, folder: Path, *, anew: bool = False, branch: bool = False) -> None:
        """Everything that `content` saved; ConfigError where it is not this run's. Args as `Trainer.load`."""
        checkpoints.load_weights(folder, "student", self.roles.named_parameters("student"))
        checkpoints.load_optimizer("student", self.optimizer, folder)
        same = load_random(folder, self.generator, warmup_files_of(self.run, self._sampler), branch=branch)
        for name, value in checkpoints.read_counters(folder, COUNTERS).items():
            setattr(self, name, value)
        self.bad_in_a_row = checkpoints.read_counts(folder, "bad_in_a_row", (WARMUP,))
        n = self.config.samples_per_update
        if same and not anew:
            self.underway = load_underway(
                folder, self._random(), (WARMUP,), n, lambda _: self.roles.named_parameters("student")
            )
        load_alarms(self.alarms, checkpoints.read_json(folder, "state.json"), folder)

    def fit(self) -> None:
        shown = {"loss": "warmup_loss", "grad": "warmup_grad_norm"}
        make_folder(self.root)
        run_stage(
            *(self, self.config.warmup.steps, self.root, self.config, self.console),
            shown=shown,
            unit="warm-up step",
            reports=self.reports,
        )
