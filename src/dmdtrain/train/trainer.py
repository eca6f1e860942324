"""The training loop."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import Config, ConfigError
from dmdtrain.data.prompts import EpochSampler
from dmdtrain.models.roles import load_parameters
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train import validation
from dmdtrain.train.batches import Batch, Batches
from dmdtrain.train.checkpoint import CHECKPOINTS, WARMUP
from dmdtrain.train.ema import Ema
from dmdtrain.train.flops import update_flops
from dmdtrain.train.log import MetricsLog
from dmdtrain.train.loop import count_bad, guarded_step, peak_memory_gib, run_stage
from dmdtrain.train.optim import build_optimizer, learning_rate
from dmdtrain.train.plan import known_rate, memory_line
from dmdtrain.train.render import Renderer
from dmdtrain.train.setup import (
    Run,
    build_roles,
    describe,
    device_of_this_machine,
    encode_text,
    resolve,
    sampling_json,
    text_cache,
)
from dmdtrain.train.step import Distiller, Stats, check_score_ranges
from dmdtrain.train.warmup import Warmup, check_data

LOCK = ".lock"
COUNTERS = ("step", "student_updates", "bad_steps", "bad_in_a_row")


def find_resume(config: Config, resume: str) -> Path | None:
    """The checkpoint to go on from: `auto` (the newest of the run in output_dir), `never`, or a folder.

    Raises:
        ConfigError: output_dir belongs to another run, or the checkpoint to another configuration.
    """
    output = Path(config.output_dir)
    above = next(folder for folder in (output, *output.parents) if folder.exists())
    if not above.is_dir():
        where = f"{output}: {above}" if above != output else output
        raise ConfigError(f"output_dir: {where} is not a folder")
    owned = output / "config.yaml"
    if not owned.exists() and output.exists() and any(f.name not in ("cache", LOCK) for f in output.iterdir()):
        raise ConfigError(f"output_dir: {output} is not empty and holds no run of dmdtrain; choose another")
    if resume not in ("auto", "never"):
        folder = Path(resume)
        checkpoints.check_checkpoint(folder, "--resume")
        _refuse_other(folder / "config.yaml", config, f"--resume: {folder} is a checkpoint of another configuration")
        if owned.exists() and folder.resolve().parents[1] != output.resolve():
            raise ConfigError(f"output_dir: {output} belongs to another run; choose another with --output-dir")
        return folder
    if owned.exists():
        if resume == "never":
            raise ConfigError(
                f"output_dir: {output} already holds a run; choose another with --output-dir, or --resume auto"
            )
        _refuse_other(owned, config, f"output_dir: {output} belongs to another run")
    found = checkpoints.list_checkpoints(output / WARMUP) + checkpoints.list_checkpoints(output / CHECKPOINTS)
    if not found:
        return None
    checkpoints.check_checkpoint(found[-1], "--resume")
    return found[-1]


def _refuse_other(file: Path, config: Config, what: str) -> None:
    different = configuration.differences(configuration.load(file), config)
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise ConfigError(f"{what}: {different[0]}{more}")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps a second process out of a run's folder; a process that dies lets go of it by itself.

    Raises:
        ConfigError: another process has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir: {output} is in use by another process; choose another, or stop that one"
            ) from None
        except OSError:
            pass  # the file system knows no locks
        yield


class Trainer:
    """One run: builds everything, then `fit`."""

    def __init__(self, run: Run, console: Console):
        self.run, self.config, self.console = run, run.config, console
        run.output_dir.mkdir(parents=True, exist_ok=True)
        self.device = device_of_this_machine()
        if self.device.type == "cpu":
            torch.set_flush_denormal(True)
        self.text = text_cache(run, self.device)
        negatives = [self.config.data.negative_prompt, self.config.validation.negative_prompt]
        encode_text(self.text, [*run.prompts, *run.validation_prompts, *negatives], console)
        self.roles = build_roles(run, self.device)
        uncond = self.text.get([self.config.data.negative_prompt])
        self.distiller = Distiller(self.roles, self.config, run.timesteps, run.latent_shape, uncond)

        student, critic, chosen = self.config.optimizer, self.config.fake_score, self.config.optimizer.name
        self.optimizers = {
            "student": build_optimizer(
                chosen,
                self.roles.parameters("student"),
                lr=student.lr,
                betas=student.betas,
                eps=student.eps,
                weight_decay=student.weight_decay,
            ),
            "fake_score": build_optimizer(
                chosen,
                self.roles.parameters("fake_score"),
                lr=critic.lr,
                betas=critic.betas,
                eps=critic.eps,
                weight_decay=critic.weight_decay,
            ),
        }
        ema, averaged = self.config.ema, self.roles.named_parameters("student")
        where = torch.device("cpu") if ema.keep_on == "host" else None
        self.ema = Ema(averaged, ema.decay, ema.every, where) if ema.enabled else None
        sampler = EpochSampler(run.prompts, self.config.train.seed)
        n = self.config.samples_per_update
        self.batches = Batches(n, sampler, self.text, self.distiller, self.config.train.seed + 1)
        self.renderer = Renderer(run, self.roles, self.text, self.distiller.autocast)
        self.flops = update_flops(self.config, run.base.transformer, run.teacher.transformer, run.frame_tokens)
        self.rate = known_rate(torch.cuda.get_device_name()) if self.device.type == "cuda" else None
        self._seconds: dict[str, float] = {}  # of the updates of this step
        self.step = self.student_updates = self.bad_steps = self.bad_in_a_row = 0

    # ------------------------------------------------------------------------------------------------ one step

    def _update(self, name: str, batch: Batch, videos: torch.Tensor | None = None) -> tuple[Stats | None, torch.Tensor]:
        """One update of `student` or `fake_score` over all micro-batches.

        videos: of the batch, for the fake score, where they are there already.

        Returns:
            statistics, or None where the update was not finite and was skipped; the videos [n, C, t, H, W].
        """
        started = time.perf_counter()
        config, parameters = self.config, self.roles.parameters(name)
        n, micro = config.samples_per_update, config.train.batch_size
        total: Stats = {}
        made = []
        for start in range(0, n, micro):
            rows = slice(start, start + micro)
            part = (batch.context[rows], batch.draws.rows(rows.start, rows.stop), micro / n)
            if name == "student":
                stats, x0 = self.distiller.student_backward(*part)
            else:
                stats, x0 = self.distiller.critic_backward(*part, x0=None if videos is None else videos[rows])
            made.append(x0)
            for key, value in stats.items():
                total[key] = total.get(key, 0) + value * (micro / n)
        self.batches.prefetch()
        clip, method = (
            (config.optimizer.grad_clip, config.optimizer.grad_clip_method)
            if name == "student"
            else (config.fake_score.grad_clip, "norm")
        )
        losses = [value for key, value in total.items() if key.endswith("loss")]
        with self.distiller.phases("optimizer"):
            norm, finite = guarded_step(self.optimizers[name], parameters, losses, clip, method)
        self._seconds[name] = time.perf_counter() - started
        return total | {f"{name}_grad_norm": norm} if finite else None, torch.cat(made)

    def _learning_rate(self) -> float:
        schedule = self.config.schedule
        return learning_rate(
            self.student_updates,
            self.config.student_updates,
            peak=self.config.optimizer.lr,
            name=schedule.name,
            warmup_steps=schedule.warmup_steps,
            min_lr=schedule.min_lr,
        )

    def _student_update(self, batch: Batch, lr: float) -> tuple[Stats | None, torch.Tensor]:
        for group in self.optimizers["student"].param_groups:
            group["lr"] = lr
        stats, videos = self._update("student", batch)
        # Counted even where it was skipped, so that the schedule keeps its length.
        self.student_updates += 1
        if stats is not None and self.ema is not None:
            self.ema.update(self.student_updates)
        return stats, videos

    def train_step(self) -> dict[str, float]:
        """The fake score's update, and at every generator_update_interval-th step the student's.

        With fake_score.reuse_rollout, at such a step, the student's comes first and leaves its videos to the fake score.
        """
        self.step += 1
        lr = self._learning_rate()
        due = self.step % self.config.dmd.generator_update_interval == 0
        reused = due and self.config.fake_score.reuse_rollout
        student: Stats | None = {}
        if reused:
            batch = self.batches.take()
            again = batch._replace(draws=self.distiller.redraw_scores(batch.draws, self.batches.generator))
            student, videos = self._student_update(batch, lr)
            critic, _ = self._update("fake_score", again, videos)
        else:
            critic, _ = self._update("fake_score", self.batches.take())
            if due:
                student, _ = self._student_update(self.batches.take(), lr)
        bad = critic is None or student is None
        values = (critic or {}) | (student or {})
        seconds, self._seconds = self._seconds, {}
        count_bad(self, bad, self.config.train.max_bad_steps, "lower optimizer.lr and fake_score.lr")
        numbers = {key: float(value) for key, value in values.items()}
        numbers |= {"lr_student": lr, "lr_fake_score": self.config.fake_score.lr, "bad_steps": self.bad_steps}
        numbers |= {
            f"seconds_{name}": seconds.get(name, 0.0) for name in self.optimizers
        } | self.distiller.phases.take()
        flops = sum(sum(self.flops[name].values()) for name in seconds)
        flops -= self.flops["fake_score"]["rollout"] if reused else 0.0
        numbers["model_tflops_per_second"] = flops / sum(seconds.values()) / 1e12
        if self.rate is not None:
            numbers["model_flop_utilisation"] = numbers["model_tflops_per_second"] * 1e12 / self.rate
        return numbers | {"memory_gib": peak_memory_gib(self.device)}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> Path:
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        texts = {"config.yaml": configuration.dump(self.config), "sampling.json": sampling_json(self.run)}
        for name, optimizer in self.optimizers.items():
            tensors[name] = dict(self.roles.named_parameters(name))  # type: ignore[arg-type]
            checkpoints.save_optimizer(name, optimizer, tensors, texts)
        if self.ema is not None:
            tensors["ema"] = self.ema.weights
        tensors["random"] = self.batches.state_dict()
        counters = {name: getattr(self, name) for name in COUNTERS}
        texts["state.json"] = json.dumps({"stage": "dmd"} | counters) + "\n"
        root = self.run.output_dir / CHECKPOINTS
        return checkpoints.write_checkpoint(root, self.step, tensors, texts, self.config.checkpoint.keep)

    def load(self, folder: Path) -> None:
        for name, optimizer in self.optimizers.items():
            load_parameters(self.roles.named_parameters(name), checkpoints.read_tensors(folder, name))
            checkpoints.load_optimizer(name, optimizer, folder)
        if self.ema is not None:
            self.ema.load(checkpoints.read_tensors(folder, "ema"))
        try:
            self.batches.load_state_dict(checkpoints.read_tensors(folder, "random"))
        except ValueError as error:
            raise ConfigError(f"data.prompts: {error}; an exact resume needs the same prompts") from None
        state = checkpoints.read_json(folder, "state.json")
        for name in COUNTERS:
            setattr(self, name, state[name])

    # ------------------------------------------------------------------------------------------------ validation

    def validate(self, log: MetricsLog) -> None:
        settings = self.config.validation
        choice = self.config.ema.validate_with
        prompts = self.run.validation_prompts
        columns = {}
        for weights in ("ema", "raw") if choice == "both" else (choice,):
            values = self.ema.weights if weights == "ema" and self.ema is not None else None
            with self.roles.weights("student", values):
                videos = self.renderer.student_videos(
                    prompts,
                    settings.seed,
                    self.run.validation_latent_shape,
                    self.run.validation_timesteps,
                    settings.guidance_scale,
                    settings.negative_prompt,
                )
            columns["student" if weights == choice else f"student {weights}"] = videos
            gifs = [validation.gif_bytes(video, settings.fps) for video in videos]
            log.videos(self.step, f"validation_{weights}", gifs, tuple(videos.shape[-2:]))  # type: ignore[arg-type]
        folder = self.run.output_dir / "samples" / f"step-{self.step:06d}"
        facts = self.run.sampling() | {"step": self.step, "seed": settings.seed}
        results = validation.write_samples(folder, columns, prompts, facts, settings.fps)
        for name, scores in results["scores"].items():
            log.write(self.step, {f"{name}_right_{key}": value for key, value in scores.items()})
            self.console.print(
                f"step {self.step}: {name} right: " + ", ".join(f"{k} {v:.0%}" for k, v in scores.items()),
                soft_wrap=True,
            )

    # ------------------------------------------------------------------------------------------------ the loop

    def warm_up(self, checkpoint: Path | None) -> None:
        """The warm-up, from its start or its checkpoint; afterwards the average starts from what it learned."""
        warmup = Warmup(self.run, self.renderer, self.console)
        warmup.prepare()
        if checkpoint is not None:
            warmup.load(checkpoint)
            self.console.print(f"resumed from {checkpoint}, warm-up step {warmup.step}", soft_wrap=True)
        warmup.fit()
        if self.ema is not None:
            self.ema.restart()
        if self.config.validation.every:
            log = MetricsLog(self.run.output_dir, 0, self.config.log.tensorboard)
            try:
                self.validate(log)
            finally:
                log.close()

    def fit(self) -> None:
        shown = {"dmd": "dmd_loss", "critic": "critic_loss", "grad": "student_grad_norm"}
        steps, folder = self.config.train.max_steps, self.run.output_dir
        run_stage(self, steps, folder, self.config, self.console, shown=shown, validate=self.validate)


def fit(config: Config, resume: str, console: Console, *, dry_run: bool = False) -> None:
    """`dmdtrain fit`: resolve, check, build, resume, train."""
    run = resolve(config)
    check_score_ranges(config, run.timesteps)
    check_data(run)
    checkpoint = find_resume(config, resume)
    for line in describe(run):
        console.print(line, soft_wrap=True, highlight=False)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        console.print(memory_line(run, total), soft_wrap=True, highlight=False)
    if dry_run:
        console.print("dry run: everything that can be checked without loading a model is in order", soft_wrap=True)
        return
    with locked(run.output_dir):
        _fit(run, checkpoint, console)


def _fit(run: Run, checkpoint: Path | None, console: Console) -> None:
    config = run.config
    trainer = Trainer(run, console)
    for line in describe(run, trainer.roles)[-2:]:
        console.print(line, soft_wrap=True, highlight=False)
    output = run.output_dir
    for root in (output / CHECKPOINTS, output / WARMUP):
        checkpoints.list_checkpoints(root)  # puts back what a kill left between two names
        for pattern in (".step-*.partial", ".step-*.old"):  # of a run that was killed while it saved
            for leftover in root.glob(pattern):
                shutil.rmtree(leftover)
    # The folder is the run's from here on: what failed before leaves it free.
    partial = output / ".config.yaml.partial"
    partial.write_text(configuration.dump(config), encoding="utf-8")
    partial.rename(output / "config.yaml")
    for later in checkpoints.set_aside_later(output, checkpoint):
        console.print(f"set aside: {later}, which came after the checkpoint that is resumed", soft_wrap=True)
    warming = checkpoint is not None and checkpoints.stage_of(checkpoint) == WARMUP
    if config.warmup.kind != "none" and (checkpoint is None or warming):
        trainer.warm_up(checkpoint)
    elif checkpoint is not None:
        trainer.load(checkpoint)
        console.print(f"resumed from {checkpoint}, step {trainer.step}", soft_wrap=True)
    if trainer.step >= config.train.max_steps:
        console.print(f"nothing to do: the run already has its {config.train.max_steps} steps", soft_wrap=True)
        return
    trainer.fit()
    saved = checkpoints.list_checkpoints(output / CHECKPOINTS)
    if trainer.bad_in_a_row:
        kept = f"the newest checkpoint is {saved[-1].name}" if saved else "there is no checkpoint"
        console.print(
            f"the last {trainer.bad_in_a_row} steps were not finite and were not saved; {kept}", soft_wrap=True
        )
    if saved:
        console.print(f"done: {saved[-1]}", soft_wrap=True)
