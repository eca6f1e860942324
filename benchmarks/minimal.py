"""The run's own step on wan-tiny against a hand-written script of the same mathematics, in turn in one process.

    python benchmarks/minimal.py --out benchmarks/minimal.json

The script is what one would write without this package: three roles by PEFT's own adapter switch, one graph, no memory saved,
nothing checked, nothing logged. Both start from the same weights and draw the same numbers; the losses must agree. Also the
loop's own share of a step: what is not inside a model call or an optimizer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from rich.console import Console
from torch.nn import functional

from dmdtrain.config import load
from dmdtrain.train.setup import resolve
from dmdtrain.train.trainer import Trainer

ROOT = Path(__file__).parents[1]


class Script:
    """DMD with a bidirectional LoRA student, flat."""

    def __init__(self, trainer: Trainer):
        config = trainer.config
        folder = trainer.run.base.path / "transformer"
        model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
        self.model = model.to(trainer.device).requires_grad_(False)
        for name, settings in (("student", config.student), ("fake_score", config.fake_score)):
            targets = list(config.student.targets)
            self.model.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets), name)
        self.own, self.optimizers = {}, {}
        for name, lr in (("student", config.optimizer.lr), ("fake_score", config.fake_score.lr)):
            self.own[name] = [p for key, p in self.model.named_parameters() if f".{name}." in key]
            with torch.no_grad():
                for mine, theirs in zip(self.own[name], trainer.roles.parameters(name), strict=True):
                    mine.copy_(theirs)
            options = config.optimizer if name == "student" else config.fake_score
            self.optimizers[name] = torch.optim.AdamW(
                self.own[name],
                lr=lr,
                betas=options.betas,
                eps=options.eps,
                weight_decay=options.weight_decay,
                fused=True,
            )
        self.config, self.timesteps = config, trainer.run.timesteps
        self.uncond = trainer.distiller.uncond
        self.ema = [p.detach().clone() for p in self.own["student"]]

    def flow(self, name: str | None, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if name is None:
            self.model.disable_adapters()
        else:
            self.model.enable_adapters()
            self.model.set_adapter(name)
        return self.model(x, t, context, return_dict=False)[0]

    def generate(self, context, noise, exit_step, grad):
        x = noise[0]
        for step in range(exit_step + 1):
            sigma = self.timesteps[step] / 1000
            t = torch.full((len(x),), self.timesteps[step], device=x.device)
            with torch.set_grad_enabled(grad and step == exit_step):
                x0 = x - sigma * self.flow("student", x, t, context)
            if step < exit_step:
                sigma = self.timesteps[step + 1] / 1000
                x = (1 - sigma) * x0 + sigma * noise[step + 1]
        return x0

    def apply(self, name: str, loss: torch.Tensor, limit: float) -> float:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.own[name], limit)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        return float(loss)

    def critic(self, context, draws) -> float:
        x0 = self.generate(context, draws.noise, draws.exit_steps[0], False)
        sigma = (draws.score_timestep / 1000).view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma) * x0 + sigma * draws.score_noise
        seen = torch.where(draws.uncaptioned[:, None, None], self.uncond, context)
        flow = self.flow("fake_score", noisy, draws.score_timestep, seen)
        loss = functional.mse_loss(flow, draws.score_noise - x0)
        return self.apply("fake_score", loss, self.config.fake_score.grad_clip)

    def student(self, context, draws) -> float:
        x0 = self.generate(context, draws.noise, draws.exit_steps[0], True)
        sigma = (draws.score_timestep / 1000).view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            noisy = (1 - sigma) * x0 + sigma * draws.score_noise
            both = torch.cat([context, self.uncond.expand(len(context), -1, -1)])
            flows = self.flow(None, noisy.repeat(2, 1, 1, 1, 1), draws.score_timestep.repeat(2), both)
            cond, uncond = flows.chunk(2)
            real = noisy - sigma * (uncond + self.config.dmd.real_score_guidance_scale * (cond - uncond))
            fake = noisy - sigma * self.flow("fake_score", noisy, draws.score_timestep, context)
            gradient = (fake - real) / (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        # The adapter of the graph has to be active again, or PEFT has turned its gradients off.
        self.model.set_adapter("student")
        loss = 0.5 * functional.mse_loss(x0, (x0 - gradient).detach())
        loss = self.apply("student", loss, self.config.optimizer.grad_clip)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.own["student"], 1 - self.config.ema.decay)
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        settings = ["dmd.generator_update_interval=1", "log.tensorboard=false", "schedule.warmup_steps=0"]
        settings += [
            f"train.batch_size={args.batch}",
            "schedule.name=constant",
            "optimizer.grad_clip_method=norm",
            "ema.every=1",
            "ema.warmup=false",
        ]
        config = load(ROOT / "configs" / "wan_tiny.yaml", [*settings, f"output_dir={folder}/run"])
        trainer = Trainer(resolve(config), Console(quiet=True))
        script = Script(trainer)
        drawn = []
        take = trainer.batches.take
        trainer.batches.take = lambda: drawn.append(take()) or drawn[-1]  # type: ignore[method-assign]
        seconds: dict[str, list[float]] = {"ours": [], "script": [], "inside": []}
        differences = []
        for _ in range(args.steps + 1):
            drawn.clear()
            started = time.perf_counter()
            values = trainer.train_step()
            seconds["ours"].append(time.perf_counter() - started)
            phases = ("rollout", "critic", "scores", "replay", "optimizer")
            seconds["inside"].append(sum(values[f"seconds_{phase}"] for phase in phases))
            started = time.perf_counter()
            (_, seen, draws, _), (_, context, own_draws, _) = drawn
            losses = {"critic_loss": script.critic(seen, draws), "dmd_loss": script.student(context, own_draws)}
            seconds["script"].append(time.perf_counter() - started)
            differences.append(max(abs(values[key] - loss) / abs(loss) for key, loss in losses.items()))
    assert max(differences) < 1e-3, differences
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"][1:], seconds["script"][1:], strict=True)]
    overhead = [1 - inside / ours for inside, ours in zip(seconds["inside"][1:], seconds["ours"][1:], strict=True)]
    record = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": config.samples_per_update,
        "steps": args.steps,
        "seconds_ours": round(statistics.median(seconds["ours"][1:]), 4),
        "seconds_script": round(statistics.median(seconds["script"][1:]), 4),
        "ours_over_script": round(statistics.median(ratios), 4),
        "loop_overhead": round(statistics.median(overhead), 4),
        "largest_relative_difference_of_a_loss": float(f"{max(differences):.2g}"),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
