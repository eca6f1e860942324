"""The training loop: what a run holds, one step, its checkpoints and its validation."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.data.prompts import EpochSampler
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train import interrupt, validation
from dmdtrain.train.alarms import BAD_STEPS, Alarms, drawn_again, dump_bad_step, load_alarms, measure
from dmdtrain.train.batches import Batch, Batches
from dmdtrain.train.checkpoint import CHECKPOINTS
from dmdtrain.train.clips import Clips, held_out
from dmdtrain.train.ema import Ema
from dmdtrain.train.flops import update_flops
from dmdtrain.train.log import MetricsLog
from dmdtrain.train.loop import count_bad, guarded_step, peak_memory_gib, run_stage, telling_unwritten
from dmdtrain.train.optim import build_optimizer, learning_rate
from dmdtrain.train.plan import throughput
from dmdtrain.train.prepare_videos import ClipLoader, prepare_videos
from dmdtrain.train.real_data import HeldOut, RealData
from dmdtrain.train.render import Renderer
from dmdtrain.train.reports import Reports
from dmdtrain.train.same_data import load_random, prompts_of, real_clips_of, record
from dmdtrain.train.setup import (
    Run,
    build_roles,
    device_of_this_machine,
    encode_text,
    sampling_json,
    teller,
    text_cache,
)
from dmdtrain.train.step import Distiller, Stats, as_numbers, x0_figures
from dmdtrain.train.underway import Tensors, Underway, load_underway
from dmdtrain.train.warmup import Warmup
from dmdtrain.train.warmup_step import WarmupBatch

COUNTERS = ("step", "student_updates", "bad_steps")


class Trainer:
    """One run: builds everything, then `fit`. scanned: the run's clips, where they were looked at already."""

    def __init__(
        self, run: Run, console: Console, scanned: dict[str, Clips] | None = None, reports: Reports | None = None
    ):
        self.reports = reports or Reports()
        self.run, self.config, self.console = run, run.config, console
        run.output_dir.mkdir(parents=True, exist_ok=True)
        self.device = device_of_this_machine()
        if self.device.type == "cpu":
            torch.set_flush_denormal(True)
        if self.config.train.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
        self.text = text_cache(run, self.device)
        negatives = [self.config.data.negative_prompt, self.config.validation.negative_prompt]
        self.clips = prepare_videos(run, console, scanned)
        captions = [sample.caption for clips in self.clips.values() for sample in clips.samples]
        encode_text(self.text, [*run.prompts, *run.validation_prompts, *negatives, *captions], console)
        self.roles = build_roles(run, self.device, tell=teller(console))
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
        self.ema = Ema(averaged, ema.decay, ema.every, where, ema.warmup) if ema.enabled else None
        sampler = EpochSampler(run.prompts, self.config.train.seed)
        n = self.config.samples_per_update
        self.batches = Batches(n, sampler, self.text, self.distiller, self.config.train.seed + 1)
        self.real: RealData | None = None
        if self.config.dmd.real_data_loss_weight:
            clips = ClipLoader(run, self.clips["data.videos"], self.config.train.seed + 3)
            self.real = RealData(run, clips, self.roles, self.text, self.distiller.autocast)
        self.held_out: HeldOut | None = None
        videos = self.clips.get("data.videos")
        if videos is not None and held_out(run, videos):  # a branch may have none left of validation.real_clips
            self.held_out = HeldOut(run, videos, self.roles, self.text, self.distiller.autocast)
        self.renderer = Renderer(run, self.roles, self.text, self.distiller.autocast)
        self._flops: dict[str, dict[str, float]] = {}  # of the last update of each role
        self.root = run.output_dir / CHECKPOINTS
        self.alarms = Alarms(self.config.alarms, self._alarm)
        self.norms: Stats = {}  # the last gradient norm of each role
        self.step = self.student_updates = self.bad_steps = 0
        self.bad_in_a_row = dict.fromkeys(self.optimizers, 0)
        self.underway: Underway | None = None  # the step after `step`, if it is begun

    # ------------------------------------------------------------------------------------------------ one step

    def _update(self, underway: Underway, name: str, batch: Batch | None = None) -> Stats | None:
        """What is left of an update of `student` or `fake_score`; the fake score takes over the videos that the student left.

        Args:
            batch: the next one where it is None.

        Returns:
            statistics, or None where the update was not finite and was skipped.
        """
        if name not in underway.finished:
            underway.begin(name)
        batch = batch or self.batches.take()
        run = self.run
        shapes = (run.base.transformer, run.teacher.transformer, run.frame_tokens)
        self._flops[name] = update_flops(self.config, *shapes, batch.draws)[name]
        clips = self.real.draw() if name == "student" and self.real is not None else None
        if name not in underway.finished:
            with underway.timed(name):
                underway.finished[name] = self._accumulate_and_step(underway, name, batch, clips)
        return underway.finished[name]

    def _accumulate_and_step(
        self, underway: Underway, name: str, batch: Batch, clips: WarmupBatch | None
    ) -> Stats | None:
        config, parameters = self.config, self.roles.parameters(name)
        videos = torch.cat(underway.videos) if name == "fake_score" and underway.videos else None

        def backward(rows: slice, share: float) -> Stats:
            part = (batch.context[rows], batch.draws.rows(rows.start, rows.stop), share)
            if name == "fake_score":
                return self.distiller.critic_backward(*part, x0=None if videos is None else videos[rows])[0]
            stats, x0 = self.distiller.student_backward(*part)
            if config.fake_score.reuse_rollout:
                underway.videos.append(x0)
            if self.real is not None and clips is not None:
                with self.distiller.phases("real_data"):
                    stats |= self.real.backward(clips.rows(rows.start, rows.stop), share)
            return stats

        n = config.samples_per_update
        total = x0_figures(underway.accumulate(n, config.train.batch_size, backward), n)
        self.batches.prefetch()
        clip, method = (
            (config.optimizer.grad_clip, config.optimizer.grad_clip_method)
            if name == "student"
            else (config.fake_score.grad_clip, "norm")
        )
        losses = [value for key, value in total.items() if key.endswith("loss")]
        with self.distiller.phases("optimizer"), underway.optimizing():
            norm, finite = guarded_step(underway, self.optimizers[name], parameters, losses, clip, method)
            if finite and name == "student" and self.ema is not None:
                self.ema.update(self.student_updates + 1)
        self.norms[name] = norm
        if finite:
            return total | {f"{name}_grad_norm": norm}
        dump_bad_step(
            *(self.run.output_dir / BAD_STEPS, self.step + 1, name),
            generator_state=batch.generator_state,
            prompts=batch.prompts,
            statistics=total,
            gradient_norms=self.norms,
            draws=batch.draws,
            console=self.console,
            **self._real_of(underway, name),
        )
        return None

    def _real_of(self, underway: Underway, name: str) -> dict[str, Any]:
        """The clips of an update that takes some, and the generator's state from before their noise."""
        if self.real is None or name != "student":
            return {}
        state = {k.removeprefix("real."): value for k, value in underway.random.items() if k.startswith("real.")}
        clips = drawn_again(self.real.clips.sampler, state, "clips.", self.config.samples_per_update)
        return {"clips": [str(sample.file) for sample in clips], "more": {"real.generator": state["draws"]}}

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

    def _updates(self) -> tuple[str, ...]:
        """Those of the next step: the fake score's, and at every generator_update_interval-th step the student's.

        With fake_score.reuse_rollout, at such a step, the student's comes first and leaves its videos to the fake score.
        """
        if (self.step + 1) % self.config.dmd.generator_update_interval:
            return ("fake_score",)
        return ("student", "fake_score") if self.config.fake_score.reuse_rollout else ("fake_score", "student")

    def train_step(self) -> dict[str, float]:
        """The next step, or what is left of it; Paused where a signal comes within it."""
        lr, names = self._learning_rate(), self._updates()
        due, reused = "student" in names, names[0] == "student"
        self.underway = underway = self.underway or Underway(self._random(), names[0])
        if due:
            for group in self.optimizers["student"].param_groups:
                group["lr"] = lr
        if reused:
            batch = self.batches.take()
            again = batch._replace(draws=self.distiller.redraw_scores(batch.draws, self.batches.generator))
            student = self._update(underway, "student", batch)
            critic = self._update(underway, "fake_score", again)
        else:
            critic = self._update(underway, "fake_score")
            student = self._update(underway, "student") if due else {}
        bad = {name: underway.finished[name] is None for name in names}
        values = (critic or {}) | (student or {})
        seconds, self.underway = underway.seconds, None
        self.step += 1
        self.student_updates += due  # even where it was skipped, so that the schedule keeps its length
        rates = {"optimizer.lr": self.config.optimizer.lr, "fake_score.lr": self.config.fake_score.lr}
        count_bad(self, bad, self.config.train.max_bad_steps, rates)
        with underway.timed(names[-1]):  # it waits for what the device has left to do
            numbers = as_numbers(values)
        numbers |= self.alarms.step(self.step, numbers)
        numbers |= {"lr_student": lr, "lr_fake_score": self.config.fake_score.lr, "bad_steps": self.bad_steps}
        numbers |= {
            f"seconds_{name}": seconds.get(name, 0.0) for name in self.optimizers
        } | self.distiller.phases.take()
        if reused:
            del self._flops["fake_score"]["rollout"]
        flops = sum(sum(self._flops[name].values()) for name in seconds)
        numbers |= throughput(flops, sum(seconds.values()), self.device)
        return numbers | {"memory_gib": peak_memory_gib(self.device)}

    def _alarm(self, text: str) -> None:
        teller(self.console)(text)
        self.reports.event("alarm", text, self.step)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _random(self) -> Tensors:
        """Generators and positions in the data, between two steps."""
        real = {} if self.real is None else self.real.state_dict()
        return self.batches.state_dict() | {f"real.{key}": value for key, value in real.items()}

    @cached_property
    def _data(self) -> Tensors:
        return record(self.run, self.clips, warmup=False)

    def content(self) -> checkpoints.Content:
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        texts = {"config.yaml": configuration.dump(self.config), "sampling.json": sampling_json(self.run)}
        for name, optimizer in self.optimizers.items():
            tensors[name] = dict(self.roles.named_parameters(name))  # type: ignore[arg-type]
            checkpoints.save_optimizer(name, optimizer, tensors, texts)
        if self.ema is not None:
            tensors["ema"] = self.ema.weights
        tensors["random"] = self._data | (self._random() if self.underway is None else self.underway.random)
        counters = {name: getattr(self, name) for name in COUNTERS}
        state = {"stage": "dmd"} | counters | {"bad_in_a_row": self.bad_in_a_row, "alarms": self.alarms.state()}
        if self.underway is not None:
            self.underway.add_to(tensors, state, self.roles.named_parameters(self.underway.update))
        texts["state.json"] = json.dumps(state) + "\n"
        return tensors, texts

    def save(self) -> Path:
        return checkpoints.write_checkpoint(self.root, self.step, *self.content(), self.config.checkpoint.keep)

    def load(self, folder: Path, *, anew: bool = False, branch: bool = False) -> None:
        """Everything that `content` saved; ConfigError where it is not this run's.

        Args:
            anew: without the gradients of the next step, which a branch with other settings makes from its beginning. An update
                that is done of it stays in the weights.
            branch: begins a new epoch of data that are others, instead of refusing them; then, too, without those gradients.
        """
        for name, optimizer in self.optimizers.items():
            checkpoints.load_weights(folder, name, self.roles.named_parameters(name))  # type: ignore[arg-type]
            checkpoints.load_optimizer(name, optimizer, folder)
        # A branch's may differ; the student's is set at every update.
        for group in self.optimizers["fake_score"].param_groups:
            group["lr"] = self.config.fake_score.lr
        if self.ema is not None:
            average = checkpoints.read_tensors(folder, "ema")
            checkpoints.check_like(folder, "ema", average, self.ema.weights)
            self.ema.load(average)
        batches = self.batches
        same = load_random(folder, batches.generator, prompts_of(batches.sampler), branch=branch)
        batches.forget()
        if self.real is not None:
            clips = real_clips_of(self.real.clips.sampler)
            same &= load_random(folder, self.real.generator, clips, "real.draws", branch=branch)
        for name, value in checkpoints.read_counters(folder, COUNTERS).items():
            setattr(self, name, value)
        self.bad_in_a_row = checkpoints.read_counts(folder, "bad_in_a_row", tuple(self.optimizers))
        names, n = self._updates(), self.config.samples_per_update
        left = (lambda: batches.ahead().draws.score_noise) if names[0] == "student" else None
        if same and not anew:
            self.underway = load_underway(folder, self._random(), names, n, self.roles.named_parameters, left)
        load_alarms(self.alarms, checkpoints.read_json(folder, "state.json"), folder)
        self._recall_validation()

    # ------------------------------------------------------------------------------------------------ validation

    def validate(self, log: MetricsLog) -> None:
        settings = self.config.validation
        choice = self.config.ema.validate_with
        prompts = self.run.validation_prompts
        columns, measured = {}, {}
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
                    interrupt.check,
                )
                real = {} if self.held_out is None else {"real_loss": self.held_out.loss(interrupt.check)}
            columns["student" if weights == choice else f"student {weights}"] = videos
            measured[f"validation_{weights}"] = measure(videos) | real
            gifs = [validation.gif_bytes(video, self.run.fps) for video in videos]
            log.videos(self.step, f"validation_{weights}", gifs, tuple(videos.shape[-2:]))  # type: ignore[arg-type]
        interrupt.check()
        for name, found in measured.items():
            self.alarms.validation(self.step, name, found)
        folder = self._samples()
        facts = self.run.sampling() | {"step": self.step, "seed": settings.seed, "measured": measured}
        results = validation.write_samples(folder, columns, prompts, facts, self.run.fps)
        self._log_validation(log, results)
        self.reports.event("validation", f"validated step {self.step}: {folder}", self.step)
        for name, scores in results["scores"].items():
            self.console.print(
                f"step {self.step}: {name} right: " + ", ".join(f"{k} {v:.0%}" for k, v in scores.items()),
                soft_wrap=True,
            )

    def _log_validation(self, log: MetricsLog, results: dict[str, Any]) -> None:
        """One line of numbers."""
        found = {f"{name}_{key}": value for name, each in results["measured"].items() for key, value in each.items()}
        scores = {f"{name}_right_{key}": v for name, each in results["scores"].items() for key, v in each.items()}
        log.write(self.step, found | scores)

    def _samples(self) -> Path:
        return self.run.output_dir / "samples" / f"step-{self.step:06d}"

    def _results(self) -> dict[str, Any]:
        """Of this step's validation; empty where there is none, or it is damaged."""
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            results = json.loads((self._samples() / validation.RESULTS).read_text(encoding="utf-8"))
            found = [*results["measured"].values(), *results["scores"].values()]
            if all(type(n) in (int, float) and math.isfinite(n) for each in found for n in each.values()):
                return results
        return {}

    def _recall_validation(self, log: MetricsLog | None = None) -> None:
        """What the alarms saw of this step's validation, which came after its save, and its line in the metrics."""
        results = self._results()
        with suppress(KeyError, TypeError, AttributeError):  # of another version
            for name, found in results["measured"].items():
                self.alarms.validation(self.step, name, found)
            if log is not None:
                self._log_validation(log, results)

    def lacks_validation(self) -> bool:
        """Whether the run was stopped after this step was saved and before it was validated."""
        every = self.config.validation.every
        due = every and self.step and (self.step % every == 0 or self.step == self.config.train.max_steps)
        return bool(due) and not self._results()

    # ------------------------------------------------------------------------------------------------ the loop

    def warm_up(self, warmup: Warmup) -> None:
        """The warm-up to its end; afterwards the average starts from what it learned."""
        warmup.fit()
        if self.ema is not None:
            self.ema.restart()
        self.reports.enter(self.step)
        if self.config.validation.every:
            with telling_unwritten(self.step, self.console):
                log = MetricsLog(self.run.output_dir, -1, self.config.log.tensorboard, self.console, self.reports)
                try:
                    self.validate(log)
                finally:
                    log.close()

    def fit(self) -> None:
        shown = {"dmd": "dmd_loss", "critic": "critic_loss", "real": "real_data_loss", "grad": "student_grad_norm"}
        steps, folder = self.config.train.max_steps, self.run.output_dir
        run_stage(
            *(self, steps, folder, self.config, self.console),
            shown=shown,
            validate=self.validate,
            first=self.validate if self.lacks_validation() else self._recall_validation,
            reports=self.reports,
        )
