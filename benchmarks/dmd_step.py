"""Time, memory and model-FLOP utilisation of full DMD steps on random weights, for any size of Wan.

    python benchmarks/dmd_step.py --size 1.3b --set rollout.causal=true --set model.precision=int8 --out benchmarks/records/
    python benchmarks/dmd_step.py --size tiny --compare train.gradient_checkpointing=false

A step is what training does: a rollout and an update of the fake score, and a rollout, the scores, the replay and an update of
the student. Times are medians of the parts of such full steps; utilisation is model FLOPs (no recompute counted) over the rate
of bf16 matrix products that was measured in the same run; samples_per_hour is of training, where the student has its part at
every generator_update_interval-th step alone. --compare runs a second setting in the same process, step by step in turn with
the first. model.teacher, where it is one of its own, is a size too. --profile says where one more step's time on the device
went.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dmdtrain.config import Config, ConfigError, apply_override, build
from dmdtrain.models.offload import stream_blocks
from dmdtrain.models.quantize import multiply_in_int8, quantized_linear
from dmdtrain.models.roles import Roles
from dmdtrain.models.wan import WanFolder
from dmdtrain.train import setup
from dmdtrain.train.accounting import LiveBytes
from dmdtrain.train.ema import Ema
from dmdtrain.train.flops import step_flops
from dmdtrain.train.loop import guarded_step
from dmdtrain.train.optim import build_optimizer
from dmdtrain.train.plan import CONTEXT_GIB, GIB, PUBLISHED, UMT5_XXL, make_plan
from dmdtrain.train.step import Distiller, Stats
from dmdtrain.train.underway import Underway

SIZES = {size.lower(): PUBLISHED[f"Wan-AI/Wan2.1-T2V-{size}-Diffusers"].transformer for size in ("1.3B", "14B")}
SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 4, "text_dim": 64}
SIZES["tiny"] = SIZES["1.3b"] | SMALL
WARMUP_STEPS = 2
DEFAULTS = {
    "train.batch_size": 1,
    "optimizer.name": "adamw_bf16",
    "data.resolution": "832x480",
    "rollout.num_training_frames": 21,
    "validation.every": 0,
}
TINY = {
    "data.resolution": "64x64",
    "data.max_sequence_length": 16,
    "rollout.num_training_frames": 6,
    "student.rank": 16,
}


def settings(size: str, overrides: list[str]) -> Config:
    """ConfigError where an override is none, or would not reach the steps."""
    flat = DEFAULTS | {"model.base": size}
    flat |= TINY | {"fake_score.rank": 16, "validation.num_frames": 21} if size == "tiny" else {}
    values: dict = {}
    for key, value in flat.items():
        group, name = key.split(".")
        values.setdefault(group, {})[name] = value
    for override in overrides:
        apply_override(values, override)
    config = build(values, "--set", overrides)
    if config.model.base != size:
        raise ConfigError(f"model.base: {config.model.base}: the base is that of --size")
    if "output_dir" in values:
        raise ConfigError(f"output_dir: {config.output_dir}: there is no run here; --out is the folder of the record")
    if config.dmd.real_data_loss_weight:
        raise ConfigError(
            f"dmd.real_data_loss_weight: {config.dmd.real_data_loss_weight}: no clips are read here; valid is 0"
        )
    return config


def random_folder(name: str, key: str) -> WanFolder:
    """What a folder with such a model would be."""
    if name not in SIZES:
        raise ConfigError(f"{key}: {name}: weights are random here; valid are {', '.join(sorted(SIZES))}")
    vae = {"z_dim": 16, "scale_factor_spatial": 8}
    return WanFolder(Path(name), name, True, SIZES[name], vae, UMT5_XXL, {"shift": 5.0})


def random_transformer(shape: dict, precision: str, device: torch.device) -> WanTransformer3DModel:
    """A Wan with random weights, quantized layer by layer where `precision` asks for it."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(shape)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    wide = set(model._keep_in_fp32_modules or [])

    def filled(name: str, like: torch.Tensor) -> nn.Parameter:
        kind = torch.float32 if wide & set(name.split(".")) else dtype
        if like.ndim == 1:
            return nn.Parameter(torch.ones(like.shape, device=device, dtype=kind), requires_grad=False)
        value = torch.randn(like.shape, device=device, dtype=kind) * (0.5 / like[0].numel() ** 0.5)
        return nn.Parameter(value, requires_grad=False)

    for path in [path for path, _ in model.named_modules()]:  # a list of layers would keep those that are replaced
        layer = model.get_submodule(path)
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None:
                layer._parameters[name] = filled(f"{path}.{name}", parameter)
        quantize = precision not in ("fp32", "bf16") and path.startswith("blocks.") and type(layer) is nn.Linear
        if quantize:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized_linear(layer.weight.data, layer.bias, precision))
    model.rope = type(model.rope)(
        shape["attention_head_dim"], tuple(shape["patch_size"]), shape["rope_max_seq_len"]
    ).to(device)
    return model.eval()


class Steps:
    """Full steps of one configuration."""

    def __init__(self, run: setup.Run, device: torch.device):
        self.run, self.config, self.device = run, run.config, device
        config, precision = run.config, run.config.model.precision
        base, teacher = self._model(run.base, precision), None
        if run.own_teacher:
            teacher = self._model(run.teacher, config.model.precision_of_teacher)
        specs, options = setup.adapter_specs(config), setup.role_options(config)
        self.roles = Roles(base, teacher=teacher, trained=specs, **options)
        generator = torch.Generator().manual_seed(0)
        text = (config.data.max_sequence_length, run.base.transformer["text_dim"])
        self.context = torch.randn(config.samples_per_update, *text, generator=generator).to(device)
        self.distiller = Distiller(self.roles, config, self.run.timesteps, self.run.latent_shape, self.context[:1])
        self.generator = generator
        self.optimizers = {
            name: build_optimizer(
                config.optimizer.name,
                self.roles.parameters(name),
                lr=1e-6,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=0.0,
            )
            for name in ("fake_score", "student")
        }
        ema, self.average = config.ema, None
        if ema.enabled:
            where = torch.device("cpu") if ema.keep_on == "host" else None
            self.average = Ema(self.roles.named_parameters("student"), ema.decay, ema.every, where, ema.warmup)
        self.records: list[dict[str, float]] = []

    def _model(self, folder: WanFolder, precision: str) -> WanTransformer3DModel:
        model = random_transformer(folder.transformer, precision, self.device)
        model.set_attention_backend(setup.attention_of(self.config, folder, self.device))
        if self.config.model.offload_blocks:
            stream_blocks(model, self.device)
        if self.config.model.int8_matmul:
            multiply_in_int8(model)
        return model

    def step(self) -> None:
        start = time.perf_counter()
        self.videos: list[torch.Tensor] = []  # that the student leaves to the fake score
        student = partial(self._update, "student", self.distiller.student_backward)
        critic = partial(self._update, "fake_score", self.distiller.critic_backward)
        order = {"student": student, "fake_score": critic}
        times = {}
        for name in order if self.config.fake_score.reuse_rollout else reversed(order):
            before = time.perf_counter()
            order[name]()
            times[f"{name}_update"] = time.perf_counter() - before
        phases = self.distiller.phases.take()
        self.records.append({"seconds": time.perf_counter() - start} | times | phases)

    def profile(self, most: int = 12) -> dict[str, float]:
        """Operation -> its own share of a step's time on the device, the largest first."""
        cuda = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=kinds) as measured:
            self.step()
        self.records.pop()

        def own(event: Any) -> float:
            return event.self_device_time_total if cuda else event.self_cpu_time_total

        # Operations and the kernels they start are listed both: on CUDA the kernels are counted.
        events = [e for e in measured.key_averages() if not cuda or e.device_type == DeviceType.CUDA]
        total = sum(map(own, events))
        events.sort(key=own, reverse=True)
        return {event.key[:100]: round(own(event) / total, 4) for event in events[:most]}

    def _update(self, name: str, backward: Callable) -> None:
        n, underway = self.config.samples_per_update, Underway({}, name)
        draws = self.distiller.draw(n, self.generator).to(self.device)
        left = torch.cat(self.videos) if self.videos else None

        def micro_batch(rows: slice, share: float) -> Stats:
            given = {} if left is None else {"x0": left[rows]}
            stats, x0 = backward(self.context[rows], draws.rows(rows.start, rows.stop), share, **given)
            if name == "student" and self.config.fake_score.reuse_rollout:
                self.videos.append(x0)
            return stats

        underway.accumulate(n, self.config.train.batch_size, micro_batch)
        with self.distiller.phases("optimizer"):
            guarded_step(underway, self.optimizers[name], self.roles.parameters(name), [], 1.0, "norm")
            if name == "student" and self.average is not None:
                self.average.update(self.average.every)

    def summary(self, rate: float) -> dict:
        """Medians over all steps but those of `main` that make the optimizers' state and whatever is compiled."""
        later = self.records[2 * WARMUP_STEPS :]
        medians = {key: round(statistics.median(r[key] for r in later), 4) for key in later[0]}
        shapes = self.run.base.transformer, self.run.teacher.transformer
        interval = self.config.dmd.generator_update_interval
        full = self.config.model_copy(
            update={"dmd": self.config.dmd.model_copy(update={"generator_update_interval": 1})}
        )
        flops = sum(step_flops(full, *shapes, self.run.frame_tokens).values())
        training = medians["fake_score_update"] + medians["student_update"] / interval
        inside = sum(value for key, value in medians.items() if key.startswith("seconds_"))
        plan = make_plan(self.run)
        return {
            **medians,
            "overhead": round(1 - inside / medians["seconds"], 4),
            "samples_per_hour": round(3600 * self.config.samples_per_update / training, 1),
            "model_tflop": round(flops / 1e12, 2),
            "utilisation": round(flops / medians["seconds"] / rate, 4),
            "planned_peak_gib": round(plan.training_peak / GIB - CONTEXT_GIB, 4),  # as allocators count
            "planned_host_gib": round(plan.host / GIB, 4),
        }


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 product, the best of ten."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * n**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--compare", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: {args.steps}: it must be at least 1")
    try:
        record = measure(args)
    except ConfigError as error:
        parser.exit(2, f"dmd_step: {error}\n")
    text = json.dumps(record, indent=1)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        label = "-".join([args.size, *(o.split(".")[-1].replace("=", "_") for o in args.set)])
        label += "".join(f"-vs-{o.split('.')[-1].replace('=', '_')}" for o in args.compare)
        (args.out / f"{record['device'].replace(' ', '_')}-{label}.json").write_text(text + "\n")


def measure(args: argparse.Namespace) -> dict:
    """The record; ConfigError before anything is measured."""
    given = {"settings": args.set} | ({"compared": [*args.set, *args.compare]} if args.compare else {})
    runs = {
        name: setup.resolve(settings(args.size, overrides), for_training=False, find=random_folder)
        for name, overrides in given.items()
    }
    device = setup.device_of_this_machine()
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    rate = matmul_rate(device)
    results: dict[str, dict] = {}
    steps: dict[str, Steps] = {}
    for name, run in runs.items():
        others = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        # Every storage that is alive, exact on a CPU too. What is compiled under it would never be compiled again.
        with torch.compiler.set_stance("force_eager"), LiveBytes() as live:
            steps[name] = Steps(run, device)
            weights = live.now
            for _ in range(WARMUP_STEPS):  # the second one has the optimizers' moments
                steps[name].step()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARMUP_STEPS):
            steps[name].step()
        sizes = {"live_peak_gib": live.peak, "live_host_gib": live.host_peak, "weights_gib": weights}
        results[name] = {"overrides": given[name]} | {key: round(size / GIB, 4) for key, size in sizes.items()}
        if device.type == "cuda":
            results[name]["allocated_peak_gib"] = round((torch.cuda.max_memory_allocated() - others) / GIB, 3)
            results[name]["reserved_peak_gib"] = round((torch.cuda.max_memory_reserved() - others) / GIB, 3)
    for _ in range(args.steps):
        for each in steps.values():
            each.step()
    for name, each in steps.items():
        results[name] |= each.summary(rate)
        if args.profile:
            results[name]["profile"] = each.profile()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "size": args.size,
        "matmul_tflops": round(rate / 1e12, 2),
        "steps": args.steps,
    } | results


if __name__ == "__main__":
    main()
