"""The training loop on real tiny models: resuming to the bit, counting, what is not finite, clipping, rates, the average."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from dmdtrain import config as configuration
from dmdtrain.config import Config, ConfigError, build, differences
from dmdtrain.models.encode import TextCache
from dmdtrain.models.wan import find_folder
from dmdtrain.train.checkpoint import list_checkpoints
from dmdtrain.train.ema import Ema
from dmdtrain.train.fit import fit, smaller
from dmdtrain.train.log import MetricsLog
from dmdtrain.train.loop import Diverged, TrainingStopped
from dmdtrain.train.optim import build_optimizer, clip_gradients, learning_rate, moments, trained_dtype
from dmdtrain.train.setup import resolve, student_weights
from dmdtrain.train.step import Distiller
from dmdtrain.train.trainer import Trainer

ROLES = ("student", "fake_score")
QUIET = {"validation.every": 0, "log.tensorboard": False}
MACHINE = ("seconds", "memory_gib", "model_tflops", "model_flop_utilisation")  # how what it decides is called


pytestmark = pytest.mark.usefixtures("one_thread")


def changed(settings: dict, changes: dict) -> Config:
    """settings with {"group.key": value} applied, checked."""
    settings = copy.deepcopy(settings)
    for key, value in (QUIET | changes).items():
        *groups, last = key.split(".")
        values = settings
        for group in groups:
            values = values.setdefault(group, {})
        values[last] = value
    return build(settings)


@pytest.fixture(scope="module")
def encoded(wan_folder, tmp_path_factory) -> Path:
    """A run's `cache` with every prompt of the settings, so that not every run loads the text encoder."""
    folder = tmp_path_factory.mktemp("encoded") / "cache"
    prompts = ["a red cat runs", "a blue dog sleeps", "a cat on grass", "a dog", "a red dog", "a blue cat sleeps", ""]
    found = find_folder(str(wan_folder), "model.base")
    TextCache(found, folder / "text", 8, "fp32", torch.device("cpu")).prepare(prompts)
    return folder


@pytest.fixture
def make(settings, encoded):
    """A Trainer of the settings with changes."""

    def build_trainer(**changes) -> Trainer:
        config = changed(settings, changes)
        if not Path(config.output_dir).exists():
            shutil.copytree(encoded, Path(config.output_dir) / "cache")
        return Trainer(resolve(config), Console(quiet=True))

    return build_trainer


@pytest.fixture
def train(settings, encoded):
    """`fit` of the settings with changes; the run's folder."""

    def run(**changes) -> Path:
        config = changed(settings, changes)
        if not Path(config.output_dir).exists():
            shutil.copytree(encoded, Path(config.output_dir) / "cache")
        fit(config, "auto", Console(quiet=True))
        return Path(config.output_dir)

    return run


def metrics(run: Path) -> list[dict]:
    """What metrics.jsonl says, without what depends on the machine's mood. NaN is no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.jsonl")

    lines = [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MACHINE)} for line in lines]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as file:name."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.stem}:{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_to_the_bit(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]
    assert not different


def weights(trainer: Trainer, name: str) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in trainer.roles.named_parameters(name).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------- resuming


EIGHT_BIT = {"optimizer.name": "adamw8bit", "student.rank": 176, "fake_score.rank": 176}
RESUMED = {
    "adamw, before the student's first update": (1, {}),
    "adamw": (3, {}),
    "adamw_bf16": (3, {"optimizer.name": "adamw_bf16"}),
    "adamw8bit, small tensors": (3, {"optimizer.name": "adamw8bit"}),
    # 176 x 24 weights: from 4096 on bitsandbytes quantizes the moments.
    "adamw8bit": (3, EIGHT_BIT),
    "paged_adamw8bit": (3, EIGHT_BIT | {"optimizer.name": "paged_adamw8bit"}),
    "full roles": (3, {"student.kind": "full", "fake_score.kind": "full", "train.mixed_precision": "bf16"}),
    "checkpointing, causal": (
        3,
        {
            "train.gradient_checkpointing": True,
            "rollout.causal": True,
            "rollout.num_frame_per_block": 1,
            "rollout.context_noise": 100,
        },
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_equals_one_without_a_break(train, tmp_path, case):
    """Killed after its step `at`, with what it logged since then left behind; prompts are in mid-epoch."""
    at, changes = RESUMED[case]
    changes = {
        "train.max_steps": 5,
        "train.batch_size": 3,
        "train.gradient_accumulation": 2,
        "dmd.generator_update_interval": 2,
        "dmd.fake_score_guidance_scale": 2.0,
        "data.caption_dropout": 0.3,
        "schedule.name": "cosine_with_min_lr",
        "schedule.warmup_steps": 1,
        "schedule.min_lr": 1e-4,
        "checkpoint.every": 1,
        "checkpoint.keep": 10,
    } | changes
    run = train(**changes)
    whole = shutil.copytree(run, tmp_path / "whole")
    found = list_checkpoints(run / "checkpoints")
    assert len(found) == 5
    for later in found[at:]:
        shutil.rmtree(later)
    torch.manual_seed(999)  # the global generator plays no part
    train(**changes)

    first, last = tensors(whole / "checkpoints" / f"step-{at:06d}"), tensors(whole / "checkpoints" / "step-000005")
    for step in range(at, 6):
        folder = f"checkpoints/step-{step:06d}"
        assert_same_to_the_bit(tensors(run / folder), tensors(whole / folder))
        names = sorted(f.name for f in (whole / folder).iterdir())
        assert sorted(f.name for f in (run / folder).iterdir()) == names
        for name in names:
            if not name.endswith(".safetensors"):
                assert (run / folder / name).read_bytes() == (whole / folder / name).read_bytes(), name
    assert metrics(run) == metrics(whole)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]
    # All of it moved after the break, so that equal means something.
    for part in ("student", "fake_score", "ema", "optimizer_student", "optimizer_fake_score", "random"):
        keys = [key for key in last if key.startswith(f"{part}:")]
        assert keys and any(key not in first or not torch.equal(last[key], first[key]) for key in keys), part
    if case in ("adamw8bit", "paged_adamw8bit"):
        assert any(value.dtype == torch.uint8 for key, value in last.items() if key.startswith("optimizer_"))
    if case == "adamw_bf16":
        assert {v.dtype for k, v in last.items() if k.startswith("student:")} == {torch.bfloat16}
        assert {v.dtype for k, v in last.items() if k.startswith("ema:")} == {torch.float32}


def test_saving_validating_and_logging_change_nothing(train, tmp_path):
    busy = {
        "checkpoint.every": 1,
        "validation.every": 2,
        "log.tensorboard": True,
        "ema.validate_with": "ema",
        "validation.count": 1,
        "validation.num_frames": 1,
        "train.max_steps": 3,
        "output_dir": str(tmp_path / "busy"),
    }
    lazy = {"checkpoint.every": 100, "log.every": 100, "train.max_steps": 3, "output_dir": str(tmp_path / "lazy")}
    busy, lazy = train(**busy), train(**lazy)
    assert_same_to_the_bit(*(tensors(run / "checkpoints" / "step-000003") for run in (busy, lazy)))
    assert metrics(lazy) == [line for line in metrics(busy) if line["step"] == 3 and "critic_loss" in line]
    assert [f.name for f in (lazy / "checkpoints").iterdir()] == ["step-000003"]


def test_the_seed_decides(make):
    first, again, other = make(), make(), make(**{"train.seed": 1})
    assert same(weights(first, "student"), weights(again, "student"))
    assert not same(weights(first, "student"), weights(other, "student"))
    torch.manual_seed(5)
    loss = first.train_step()["critic_loss"]
    torch.manual_seed(6)
    assert again.train_step()["critic_loss"] == loss
    assert other.train_step()["critic_loss"] != loss


# ---------------------------------------------------------------------------------------------------- counting


def optimizer_steps(trainer: Trainer, name: str) -> int:
    """What the optimizer itself counted."""
    (count,) = {int(state["step"]) for state in trainer.optimizers[name].state.values()} or {0}
    return count


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("interval", "wanted"), [(1, 5), (3, 1)])
def test_updates_are_counted_in_steps_whatever_the_accumulation(make, interval, wanted, accumulation):
    trainer = make(
        **{
            "dmd.generator_update_interval": interval,
            "train.max_steps": 5,
            "train.batch_size": 1,
            "train.gradient_accumulation": accumulation,
        }
    )
    lines = [trainer.train_step() for _ in range(5)]
    assert ["dmd_loss" in line for line in lines] == [step % interval == 0 for step in range(1, 6)]
    assert all("critic_loss" in line for line in lines)
    assert (trainer.step, trainer.student_updates) == (5, wanted) == (5, trainer.config.student_updates)
    assert optimizer_steps(trainer, "student") == wanted
    assert optimizer_steps(trainer, "fake_score") == 5
    for name in ROLES:
        assert all(p.grad is None for p in trainer.roles.parameters(name))


def test_accumulation_only_splits_the_batch(make):
    """Four videos in one, two and four micro-batches: the same videos, the same losses and gradients but for rounding."""
    changes = {"dmd.generator_update_interval": 1, "data.caption_dropout": 0.5}
    lines = []
    for batch in (4, 2, 1):
        trainer = make(**changes, **{"train.batch_size": batch, "train.gradient_accumulation": 4 // batch})
        lines.append(trainer.train_step())
    keys = {k for k in lines[0] if not k.startswith(MACHINE)}
    assert {"critic_loss", "dmd_loss", "student_grad_norm", "fake_score_grad_norm", "fake_real_gap"} <= keys
    assert {"x0_mean", "x0_std", "x0_diversity"} <= keys and lines[0]["x0_diversity"] > 0
    for line in lines[1:]:
        assert all(line[key] == pytest.approx(lines[0][key], rel=1e-3, abs=1e-5) for key in keys)
    one = make(**changes, **{"train.batch_size": 1}).train_step()
    assert one["critic_loss"] != pytest.approx(lines[0]["critic_loss"], rel=1e-3)


def test_every_optimizer_setting_reaches_its_role(make):
    settings = {
        "student": {"lr": 3e-4, "betas": (0.5, 0.7), "eps": 1e-5, "weight_decay": 0.3},
        "fake_score": {"lr": 2e-4, "betas": (0.1, 0.2), "eps": 1e-6, "weight_decay": 0.4},
    }
    changes = {f"optimizer.{k}": v for k, v in settings["student"].items()}
    changes |= {f"fake_score.{k}": v for k, v in settings["fake_score"].items()}
    for name, kind in (
        ("adamw", torch.optim.AdamW),
        ("adamw_bf16", None),
        ("adamw8bit", None),
        ("paged_adamw8bit", None),
    ):
        trainer = make(**changes, **{"optimizer.name": name})
        assert kind is None or type(trainer.optimizers["student"]) is kind
        for role, wanted in settings.items():
            (group,) = trainer.optimizers[role].param_groups
            if name == "adamw_bf16":  # optimi's names
                group["betas"] = (group["beta1"], group["beta2"])
            assert {key: tuple(group[key]) if key == "betas" else group[key] for key in wanted} == wanted
            assert {id(p) for p in group["params"]} == {id(p) for p in trainer.roles.parameters(role)}
            dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
            assert {p.dtype for p in group["params"]} == {dtype}


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "adamw8bit", "paged_adamw8bit"])
def test_an_optimizer_step_is_adamw(name):
    """First step by hand: decay lr wd p, then lr g / (|g| + eps)."""
    dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
    p = torch.nn.Parameter(torch.tensor([2.0, -4.0, 1.0], dtype=dtype))
    optimizer = build_optimizer(name, iter([p]), lr=0.25, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    p.grad = torch.tensor([0.5, 3.0, -0.25], dtype=dtype)
    optimizer.step()
    wanted_types, state = moments(optimizer, p), optimizer.state[p]
    assert state.keys() == wanted_types.keys() and all(type(state[key]) in wanted_types[key] for key in state)
    wanted = torch.tensor([2 * 0.875 - 0.25, -4 * 0.875 - 0.25, 0.875 + 0.25])
    torch.testing.assert_close(p.detach().float(), wanted, rtol=0, atol=0.01 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("adamw", {"fused": True}),
        ("adamw_bf16", {"triton": False, "foreach": None}),  # its Triton kernels are for weights on a GPU
    ],
)
def test_an_optimizer_may_take_its_fused_kernels(name, flags):
    p = torch.nn.Parameter(torch.ones(4, dtype=trained_dtype(name)))
    (group,) = build_optimizer(name, [p], lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).param_groups
    assert {key: group[key] for key in flags} == flags


def test_kahan_summation_keeps_what_bf16_rounds_away():
    """1000 steps of 1e-4 from 1.0, where bf16 steps by 0.0078: plain bf16 would not move."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = build_optimizer("adamw_bf16", [p], lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach().float(), torch.full((4,), 0.9), rtol=0, atol=0.01)


@pytest.mark.parametrize(("lr", "decay"), [(2e-5, 0.01), (1e-4, 0.1), (1e-3, 0.5)])
@pytest.mark.parametrize("moving", [False, True])
def test_bf16_weights_decay_as_those_of_float32(lr, decay, moving):
    """On 2 000 weights. At the first rates bf16 alone would round each decay away, of 2e-7 of a weight; they are added up for 306
    steps, so that 3 060 are no part of such a sum."""
    torch.manual_seed(0)
    start = (torch.rand(2000) + 0.5).bfloat16()
    weights = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())]
    settings = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay}
    ours, exact = build_optimizer("adamw_bf16", weights[:1], **settings), torch.optim.AdamW(weights[1:], **settings)
    for _ in range(3060):
        gradient = torch.randn(2000).bfloat16() * moving
        for weight in weights:
            weight.grad = gradient.to(weight.dtype)
        ours.step()
        exact.step()
    assert ours.param_groups[0]["weight_decay"] == decay
    got = weights[0].detach().double() + ours.state[weights[0]]["kahan_comp"].double()
    # The random walk of the updates is the same for both: the mean of the change is the decay.
    changes = [float((weight - start.double()).mean()) for weight in (got, weights[1].detach())]
    assert changes[1] < -5e-4 and changes[0] == pytest.approx(changes[1], rel=0.1)


def test_an_unknown_optimizer():
    with pytest.raises(
        ConfigError, match=r"^optimizer.name: adagrad: valid are adamw, adamw_bf16, adamw8bit, paged_adamw8bit$"
    ):
        build_optimizer("adagrad", [], lr=1, betas=(0, 0), eps=1, weight_decay=0)


# ---------------------------------------------------------------------------------------------------- memory


def test_a_device_without_memory_is_told_with_what_helps(train, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23 GiB"
        )

    monkeypatch.setattr(Distiller, "critic_backward", refuse)
    with pytest.raises(TrainingStopped) as stopped:
        train()
    line = str(stopped.value)
    assert line.startswith("out of memory (CUDA out of memory. Tried to allocate 20.00 MiB.") and "\n" not in line
    assert "the last checkpoint is intact; the same run can go on with train.gradient_checkpointing=true; " in line
    assert (
        "train.batch_size=1 train.gradient_accumulation=2; " in line and ", a new one with optimizer.name=adam" in line
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_the_same_run_can_go_on_with_is_let_through(settings, kind):
    """And what is said to need a new run is not."""
    config = changed(settings, {"student.kind": kind, "train.batch_size": 4, "train.gradient_accumulation": 3})
    advice = smaller(config).removesuffix(" (dmdtrain plan CONFIG says by how much)")
    same, new = (
        part.split("; ") for part in advice.removeprefix("the same run can go on with ").split(", a new one with ")
    )
    assert len(same) == 3 and len(new) == 3
    for changes in [*same, *new]:
        values = {key: yaml.safe_load(value) for key, value in (change.split("=") for change in changes.split())}
        if "model.precision" in values:
            values["student.kind"] = "lora"
        assert bool(differences(config, configuration.changed(config, values))) == (changes in new), changes


def test_a_run_goes_on_in_smaller_batches(train, tmp_path):
    """The same videos in other parts: the same but for rounding."""
    common = {"checkpoint.every": 1, "checkpoint.keep": 9}
    whole = train(**common, **{"train.batch_size": 4, "output_dir": str(tmp_path / "whole")})
    train(**common, **{"train.batch_size": 4, "train.max_steps": 2})
    split = train(**common, **{"train.batch_size": 1, "train.gradient_accumulation": 4})
    for name in ("student", "fake_score", "random"):
        a, b = (load_file(run / "checkpoints" / "step-000004" / f"{name}.safetensors") for run in (whole, split))
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=1e-2, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- not finite


def poison(trainer: Trainer, name: str, value: float = math.nan) -> None:
    with torch.no_grad():
        trainer.roles.parameters(name)[-1].fill_(value)


def count_steps(trainer: Trainer) -> dict[str, int]:
    """Counts the optimizers' steps while it is filled."""
    counts = dict.fromkeys(ROLES, 0)
    for name in ROLES:

        def count(*_: object, name: str = name) -> None:
            counts[name] += 1

        trainer.optimizers[name].register_step_pre_hook(count)
    return counts


def test_nan_weights_of_the_student_stop_the_run_before_they_spread(make):
    trainer = make(**{"train.max_bad_steps": 3, "dmd.generator_update_interval": 1})
    trainer.train_step()
    counts = count_steps(trainer)
    poison(trainer, "student")
    before = {name: weights(trainer, name) for name in ROLES}
    average = {key: value.clone() for key, value in trainer.ema.weights.items()}
    states = copy.deepcopy([optimizer.state_dict()["state"] for optimizer in trainer.optimizers.values()])
    for bad in (1, 2):
        line = trainer.train_step()
        assert line["bad_steps"] == bad
        assert all(math.isfinite(value) for value in line.values())
        assert not {"critic_loss", "dmd_loss", "student_grad_norm"} & line.keys()
    with pytest.raises(Diverged, match=r"^step 4: .* not finite 3 times in a row$") as told:
        trainer.train_step()
    assert list(told.value.rates) == ["optimizer.lr", "fake_score.lr"]
    assert counts == {"student": 0, "fake_score": 0}
    assert same(weights(trainer, "fake_score"), before["fake_score"])
    assert all(torch.isfinite(value).all() for value in before["fake_score"].values())
    student = weights(trainer, "student")
    assert all(torch.equal(student[key], value) or value.isnan().all() for key, value in before["student"].items())
    assert same(trainer.ema.weights, average)
    assert all(torch.isfinite(value).all() for value in average.values())
    for state, optimizer in zip(states, trainer.optimizers.values(), strict=True):
        now = optimizer.state_dict()["state"]
        assert all(torch.equal(now[i][key], value) for i in state for key, value in state[i].items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ROLES)
def test_one_bad_gradient_skips_its_update_alone(make, name, value):
    """One element of one micro-batch of three: the loss is finite, the gradient is not. The other role goes on."""
    other = ROLES[1 - ROLES.index(name)]
    trainer = make(**{"train.batch_size": 1, "train.gradient_accumulation": 3, "dmd.generator_update_interval": 1})
    for _ in range(2):
        trainer.train_step()
    counts = count_steps(trainer)
    before = {role: weights(trainer, role) for role in ROLES}
    average = {key: v.clone() for key, v in trainer.ema.weights.items()}
    calls = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        gradient = gradient.clone()
        if calls == 2:
            gradient.view(-1)[1] = value
        return gradient

    handle = trainer.roles.parameters(name)[3].register_hook(spoil)
    line = trainer.train_step()
    handle.remove()
    assert calls == 3
    assert counts == {name: 0, other: 1}
    assert same(weights(trainer, name), before[name])
    assert not same(weights(trainer, other), before[other])
    assert same(trainer.ema.weights, average) == (name == "student")
    assert f"{name}_grad_norm" not in line and f"{other}_grad_norm" in line
    assert (line["bad_steps"], trainer.bad_steps, trainer.bad_in_a_row) == (1, 1, {name: 1, other: 0})
    assert trainer.student_updates == 3  # counted where it was skipped, so that the schedule keeps its length
    assert all(p.grad is None for role in ROLES for p in trainer.roles.parameters(role))

    line = trainer.train_step()
    assert (line["bad_steps"], trainer.bad_in_a_row) == (1, {name: 0, other: 0})
    assert counts == {name: 1, other: 2}
    assert not same(weights(trainer, name), before[name])
    assert all(torch.isfinite(v).all() for role in ROLES for v in weights(trainer, role).values())


def test_bad_steps_that_are_not_in_a_row_do_not_stop_it(make):
    trainer = make(**{"train.max_bad_steps": 2, "train.max_steps": 7})
    bad = (2, 4, 6)
    parameter = trainer.roles.parameters("fake_score")[1]
    parameter.register_hook(lambda g: g * math.nan if trainer.step + 1 in bad else g)
    lines = [trainer.train_step() for _ in range(7)]
    assert [line["bad_steps"] for line in lines] == [0, 1, 1, 2, 2, 3, 3]


def test_updates_of_the_student_are_counted_though_most_steps_have_none(make):
    """It comes every second step: steps 2, 4 and 6, with good ones of the fake score between them."""
    printed = Console(file=io.StringIO(), width=1000)
    trainer = make(**{"train.max_bad_steps": 3, "dmd.generator_update_interval": 2, "train.max_steps": 9})
    trainer.console = printed
    trainer.roles.parameters("student")[1].register_hook(lambda g: g * math.nan)
    with pytest.raises(TrainingStopped, match=r"^step 6: loss or gradient of student .* 3 times in a row"):
        trainer.fit()
    assert trainer.bad_in_a_row == {"student": 3, "fake_score": 0} and trainer.bad_steps == 3
    told = [line for line in printed.file.getvalue().splitlines() if "skipped" in line]  # type: ignore[attr-defined]
    assert len(told) == 1 and told[0].startswith("step 2: loss or gradient of student was not finite")


def test_a_stopped_run_keeps_its_checkpoint_and_can_go_on(make, train, settings):
    changes = {"train.max_steps": 6, "train.max_bad_steps": 2, "checkpoint.every": 2}
    config = changed(settings, changes)
    train(**(changes | {"train.max_steps": 2}))
    run = Path(config.output_dir)
    trainer = make(**changes)
    (last,) = list_checkpoints(run / "checkpoints")
    trainer.load(last)
    poison(trainer, "fake_score", math.inf)
    with pytest.raises(TrainingStopped, match=r"^step 4: "):
        trainer.fit()
    assert list_checkpoints(run / "checkpoints") == [last]
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["bad_steps"] == 1
    train(**changes)
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["bad_steps"] == 0 and math.isfinite(line["critic_loss"]) for line in lines)


def test_no_checkpoint_is_made_of_a_run_that_has_gone_bad(make):
    """Weights that went bad after step 2: what step 4 saves can not be resumed from."""
    trainer = make(**{"train.max_steps": 9, "train.max_bad_steps": 4, "checkpoint.every": 2, "checkpoint.keep": 1})
    for _ in range(2):
        trainer.train_step()
    good = trainer.save()
    poison(trainer, "student", 1e30)  # finite, as a far too high learning rate makes them
    with pytest.raises(
        TrainingStopped, match=r"^step 6: .* lower optimizer.lr and fake_score.lr in a branch: "
    ) as told:
        trainer.fit()
    assert str(told.value).endswith(
        f"dmdtrain fit CONFIG --resume {good} --output-dir NEW_FOLDER --set optimizer.lr=0.0005 --set fake_score.lr=0.0005"
    )
    assert list_checkpoints(good.parent) == [good]


def test_weights_that_are_not_finite_at_the_end_are_no_success(settings, monkeypatch):
    """After the last step's update, so that nothing but the save sees it."""
    config, step = changed(settings, {"train.max_steps": 3, "checkpoint.every": 2}), Trainer.train_step

    def last_spoils(self: Trainer) -> dict[str, float]:
        values = step(self)
        if self.step == 3:
            with torch.no_grad():
                self.roles.parameters("student")[0].fill_(math.nan)
        return values

    monkeypatch.setattr(Trainer, "train_step", last_spoils)
    with pytest.raises(
        TrainingStopped, match=r"^the weights of step 3 are not finite and are not saved; lower the learn"
    ):
        fit(config, "auto", Console(quiet=True))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"measured": 3}', '{"measured": {"validation_ema": {"saturation": "x"}}, "scores": {}}']
)
def test_results_of_a_validation_that_are_damaged_are_made_again(settings, text):
    config = changed(settings, {"train.max_steps": 4, "validation.every": 4, "checkpoint.every": 4})
    fit(config, "auto", Console(quiet=True))
    results = Path(config.output_dir) / "samples" / "step-000004" / "results.json"
    good = results.read_text()
    results.write_text(text)
    fit(config, "auto", Console(quiet=True))
    assert results.read_text() == good


def test_the_time_that_steps_wait_for_saves_is_logged(settings):
    config = changed(
        settings, {"train.max_steps": 4, "checkpoint.every": 2, "validation.every": 0, "checkpoint.background": False}
    )
    printed = Console(file=io.StringIO(), width=1000)
    fit(config, "auto", printed)
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    waited = [line["seconds_save"] for line in lines]
    own = [False, False, True, False]  # step 4's own is not over when it is logged
    assert [seconds > 0 for seconds in waited] == own
    assert re.search(r"  saves \d+\.\d s", printed.file.getvalue())  # type: ignore[attr-defined]


def test_a_run_whose_last_step_is_bad_names_a_checkpoint_that_is_there(settings, monkeypatch):
    """Step 3 of 3; step 2 was saved."""
    config = changed(settings, {"train.max_steps": 3, "checkpoint.every": 2})
    step = Trainer.train_step

    def last_is_bad(self: Trainer) -> dict[str, float]:
        parameter = self.roles.parameters("fake_score")[1]
        handle = parameter.register_hook(lambda g: g * math.nan if self.step + 1 == 3 else g)
        values = step(self)
        handle.remove()
        return values

    monkeypatch.setattr(Trainer, "train_step", last_is_bad)
    printed = Console(record=True, file=io.StringIO(), width=1000)
    fit(config, "auto", printed)
    (done,) = [line for line in printed.export_text().splitlines() if line.startswith("done: ")]
    assert Path(done.removeprefix("done: ")).is_dir()


# ---------------------------------------------------------------------------------------------------- clipping


def with_gradients(*values: list[float] | None) -> list[torch.nn.Parameter]:
    parameters = []
    for value in values:
        p = torch.nn.Parameter(torch.zeros(1 if value is None else len(value)))
        p.grad = None if value is None else torch.tensor(value)
        parameters.append(p)
    return parameters


@pytest.mark.parametrize(
    ("method", "limit", "wanted"),
    [
        ("norm", 6.5, [[1.5, -2.0], [6.0]]),  # the norm over both is 13
        ("norm", 13.5, [[3.0, -4.0], [12.0]]),
        ("value", 3.5, [[3.0, -3.5], [3.5]]),
        ("value", 12.0, [[3.0, -4.0], [12.0]]),
    ],
)
def test_clipping_by_hand(method, limit, wanted):
    parameters = with_gradients([3.0, -4.0], None, [12.0])
    norm = clip_gradients(parameters, limit, method)
    assert float(norm) == 13.0  # from before
    assert parameters[1].grad is None
    for p, value in zip((parameters[0], parameters[2]), wanted, strict=True):
        torch.testing.assert_close(p.grad, torch.tensor(value), rtol=1e-6, atol=0)


def test_clipping_shows_what_is_not_finite():
    for bad in (math.nan, math.inf):
        for method in ("norm", "value"):
            assert not math.isfinite(clip_gradients(with_gradients([1.0, bad], [2.0]), 1.0, method))
    with pytest.raises(ConfigError, match=r"^optimizer.grad_clip_method: mean: valid are norm, value$"):
        clip_gradients(with_gradients([1.0]), 1.0, "mean")


def clipped(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradients that the optimizers saw in one step, and what was logged."""
    seen: dict[str, torch.Tensor] = {}
    for name in ROLES:

        def keep(optimizer: torch.optim.Optimizer, *_: object, name: str = name) -> None:
            seen[name] = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])

        trainer.optimizers[name].register_step_pre_hook(keep)
    return seen, trainer.train_step()


def test_each_role_has_its_own_limit(make):
    wide = {"optimizer.grad_clip": 1e6, "fake_score.grad_clip": 1e6, "dmd.generator_update_interval": 1}
    free, line = clipped(make(**wide))
    norms = {name: float(free[name].norm()) for name in ROLES}
    for name in ROLES:
        assert line[f"{name}_grad_norm"] == pytest.approx(norms[name], rel=1e-5)

    # Half the student's norm, a quarter of the fake score's; its own update comes first and does not see them.
    limits = {"optimizer.grad_clip": norms["student"] / 2, "fake_score.grad_clip": norms["fake_score"] / 4}
    seen, line = clipped(make(**(wide | limits)))
    torch.testing.assert_close(seen["fake_score"], free["fake_score"] / 4, rtol=1e-4, atol=1e-9)
    assert float(seen["student"].norm()) == pytest.approx(norms["student"] / 2, rel=1e-2)
    assert line["fake_score_grad_norm"] == pytest.approx(norms["fake_score"], rel=1e-5)  # from before clipping

    # By value: the student alone. The fake score is always clipped by its norm.
    limit = float(free["student"].abs().max()) / 3
    by_value = {"optimizer.grad_clip": limit, "optimizer.grad_clip_method": "value"}
    seen, line = clipped(make(**(wide | by_value)))
    torch.testing.assert_close(seen["student"], free["student"].clamp(-limit, limit), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(seen["fake_score"], free["fake_score"], rtol=0, atol=0)
    assert line["student_grad_norm"] == pytest.approx(norms["student"], rel=1e-4)
    seen, _ = clipped(make(**(wide | by_value | {"fake_score.grad_clip": norms["fake_score"] / 4})))
    torch.testing.assert_close(seen["fake_score"], free["fake_score"] / 4, rtol=1e-4, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("constant", {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 1.0, 9: 1.0}),
        ("linear", {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.775, 6: 0.55, 8: 0.325, 10: 0.1, 12: 0.1}),
        (
            "cosine_with_min_lr",
            # 0.1 + 0.45 (1 + cos(pi / 4)) a quarter of the way
            {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.868198, 6: 0.55, 8: 0.231802, 10: 0.1, 12: 0.1},
        ),
    ],
)
def test_learning_rates_by_hand(name, wanted):
    """Peak 1, at least 0.1, 10 updates of which 2 warm up."""
    for update, value in wanted.items():
        lr = learning_rate(update, 10, peak=1.0, name=name, warmup_steps=2, min_lr=0.1)
        assert lr == pytest.approx(value, rel=1e-5), update


def test_learning_rates_at_the_edges():
    def rate(update: int, total: int, name: str, warmup: int = 0) -> float:
        return learning_rate(update, total, peak=2.0, name=name, warmup_steps=warmup, min_lr=0.0)

    for name in ("constant", "linear", "cosine_with_min_lr"):
        assert rate(0, 5, name) == 2.0  # without a warm-up the first update has the peak
        assert rate(3, 4, name, warmup=10) == pytest.approx(2 * 4 / 11)  # a warm-up longer than the run
        assert rate(0, 1, name) == 2.0
    assert 0 < rate(4, 5, "linear") < rate(4, 5, "constant")  # the last update still trains
    with pytest.raises(ConfigError, match=r"^schedule.name: step: valid are constant, linear, cosine_with_min_lr$"):
        rate(0, 5, "step")


def test_the_schedule_runs_over_student_updates(make):
    """4 updates in 8 steps, 1 of warm-up, then linear from 8e-4 to 2e-4: 4, 8, 6, 4 (e-4)."""
    trainer = make(
        **{
            "train.max_steps": 8,
            "train.batch_size": 1,
            "dmd.generator_update_interval": 2,
            "optimizer.lr": 8e-4,
            "schedule.name": "linear",
            "schedule.min_lr": 2e-4,
            "schedule.warmup_steps": 1,
            "fake_score.lr": 3e-4,
        }
    )
    used: dict[str, list[float]] = {name: [] for name in ROLES}
    for name in ROLES:

        def keep(optimizer: torch.optim.Optimizer, *_: object, name: str = name) -> None:
            used[name] += [group["lr"] for group in optimizer.param_groups]

        trainer.optimizers[name].register_step_pre_hook(keep)
    lines = [trainer.train_step() for _ in range(8)]
    assert used["student"] == pytest.approx([4e-4, 8e-4, 6e-4, 4e-4])
    assert used["fake_score"] == [3e-4] * 8
    assert [line["lr_student"] for line in lines[1::2]] == used["student"]
    assert {line["lr_fake_score"] for line in lines} == {3e-4}


# ---------------------------------------------------------------------------------------------------- the average


def test_the_average_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    q = torch.nn.Parameter(torch.tensor([4.0], dtype=torch.bfloat16))
    ema = Ema({"p": p, "q": q}, 0.75, 2)
    assert ema.weights["q"].dtype == torch.float32
    for update, value in ((1, 100.0), (2, 5.0), (3, 200.0), (4, 9.0)):
        p.data.fill_(value)
        q.data.fill_(value)
        ema.update(update)
        if update == 1:
            assert ema.weights["p"].tolist() == [1.0, -2.0]
    # 1 -> 0.75 + 1.25 = 2 -> 1.5 + 2.25 = 3.75;  -2 -> -0.25 -> 2.0625;  4 -> 4.25 -> 5.4375
    torch.testing.assert_close(ema.weights["p"], torch.tensor([3.75, 2.0625]))
    torch.testing.assert_close(ema.weights["q"], torch.tensor([5.4375]))
    assert p.tolist() == [9.0, 9.0]  # the student is not touched
    ema.load({"p": torch.tensor([7.0, 8.0]), "q": torch.tensor([1.0])})
    ema.update(6)
    torch.testing.assert_close(ema.weights["p"], torch.tensor([7.5, 8.25]))


def test_the_average_counts_student_updates(make):
    """Every second update at decay 0.7, an update at every second step: after steps 4 and 8."""
    changes = {"train.max_steps": 8, "train.batch_size": 1, "ema.decay": 0.7, "ema.every": 2, "ema.warmup": False}
    trainer = make(**changes, **{"dmd.generator_update_interval": 2})
    wanted = weights(trainer, "student")
    for step in range(1, 9):
        trainer.train_step()
        student = weights(trainer, "student")
        if step in (4, 8):
            wanted = {key: 0.7 * value + 0.3 * student[key] for key, value in wanted.items()}
        for key, value in wanted.items():
            torch.testing.assert_close(trainer.ema.weights[key], value, rtol=1e-5, atol=1e-7)
    assert not same(trainer.ema.weights, student)


def average_of(updates: int, **settings) -> float:
    """Of a weight that is 1 from the first update on and was 0 before."""
    p = torch.nn.Parameter(torch.zeros(1))
    ema = Ema({"p": p}, 0.995, 5, **settings)
    p.data.fill_(1.0)
    for update in range(1, updates + 1):
        ema.update(update)
    return float(ema.weights["p"])


def test_the_start_leaves_the_average_early():
    """With the ramp of SimpleTuner: 0.2 % of the start are left after 200 updates, and not the 82 % of a constant decay."""
    assert average_of(200) == pytest.approx(1 - 0.995**40) and average_of(1000) == pytest.approx(1 - 0.995**200)
    assert average_of(200, warmup=True) == pytest.approx(0.998, abs=1e-3)
    ema = Ema({}, 0.995, 5, warmup=True)
    assert [ema.decay_at(n) for n in (1, 2, 11, 1790)] == pytest.approx([1 / 10, 2 / 11, 11 / 20, 1790 / 1799])
    assert ema.decay_at(1791) == ema.decay_at(10**6) == 0.995


@pytest.mark.parametrize("warmup", [True, False])
def test_the_ramp_of_the_average_is_a_setting(make, warmup):
    trainer = make(
        **{"train.batch_size": 1, "dmd.generator_update_interval": 1, "ema.decay": 0.9, "ema.warmup": warmup}
    )
    wanted = weights(trainer, "student")
    for decay in (1 / 10, 2 / 11) if warmup else (0.9, 0.9):
        trainer.train_step()
        student = weights(trainer, "student")
        wanted = {key: decay * value + (1 - decay) * student[key] for key, value in wanted.items()}
    for key, value in wanted.items():
        torch.testing.assert_close(trainer.ema.weights[key], value, rtol=1e-5, atol=1e-7)


def test_validation_of_average_and_raw_weights(make, tmp_path):
    changes = {"dmd.generator_update_interval": 1, "optimizer.lr": 0.1, "ema.decay": 0.9, "validation.num_frames": 1}
    trainer = make(**changes, **{"train.batch_size": 1})
    for _ in range(2):
        trainer.train_step()
    student, average = weights(trainer, "student"), {k: v.clone() for k, v in trainer.ema.weights.items()}
    videos = {}
    for step, choice in enumerate(("both", "ema", "raw"), start=10):
        ema = trainer.config.ema.model_copy(update={"validate_with": choice})
        trainer.config, trainer.step = trainer.config.model_copy(update={"ema": ema}), step
        log = MetricsLog(trainer.run.output_dir, step, tensorboard=False)
        trainer.validate(log)
        log.close()
        folder = trainer.run.output_dir / "samples" / f"step-{step:06d}"
        videos[choice] = {f.stem: f.read_bytes() for f in sorted(folder.glob("*.mp4"))}
        assert json.loads((folder / "results.json").read_text())["prompts"] == ["a red dog", "a blue cat sleeps"]
        assert same(weights(trainer, "student"), student)
        assert same(trainer.ema.weights, average)
    assert list(videos["both"]) == ["000_student_ema", "000_student_raw", "001_student_ema", "001_student_raw"]
    for choice in ("ema", "raw"):
        assert list(videos[choice]) == ["000_student", "001_student"]
        for i in ("000", "001"):
            assert videos[choice][f"{i}_student"] == videos["both"][f"{i}_student_{choice}"]
    assert videos["ema"]["000_student"] != videos["raw"]["000_student"]
    assert videos["raw"]["000_student"] != videos["raw"]["001_student"]


def test_without_an_average(train):
    changes = {
        "ema.enabled": False,
        "ema.validate_with": "raw",
        "validation.every": 2,
        "train.max_steps": 2,
        "dmd.generator_update_interval": 1,
    }
    run = train(**changes)
    assert [f.name for f in sorted((run / "samples" / "step-000002").glob("*.mp4"))] == [
        "000_student.mp4",
        "001_student.mp4",
    ]
    train(**(changes | {"train.max_steps": 3, "validation.every": 0}))  # it goes on without one
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    assert checkpoint.name == "step-000003"
    assert not list(run.rglob("ema.safetensors"))
    assert student_weights(checkpoint, "raw").keys() == load_file(checkpoint / "student.safetensors").keys()
    with pytest.raises(ConfigError, match=r"^--weights: ema: .* was trained without an average; valid is raw$"):
        student_weights(checkpoint, "ema")
    with pytest.raises(ConfigError, match=r"^--weights: best: valid are ema, raw$"):
        student_weights(checkpoint, "best")


# ---------------------------------------------------------------------------------------------------- the loop


def test_steps_that_are_logged_saved_and_validated(train, tmp_path):
    """Every 2nd, 3rd and 4th of 7, and always the last."""
    run = train(
        **{
            "train.max_steps": 7,
            "train.batch_size": 1,
            "log.every": 2,
            "checkpoint.every": 3,
            "checkpoint.keep": 9,
            "validation.every": 4,
            "validation.count": 1,
        }
    )
    assert [line["step"] for line in metrics(run) if "critic_loss" in line] == [2, 4, 6, 7]
    assert [line["step"] for line in metrics(run) if "validation_ema_saturation" in line] == [4, 7]
    assert [f.name for f in list_checkpoints(run / "checkpoints")] == ["step-000003", "step-000006", "step-000007"]
    assert sorted(f.name for f in (run / "samples").iterdir()) == ["step-000004", "step-000007"]
    assert len(list((run / "samples" / "step-000004").glob("*.mp4"))) == 1


def test_a_longer_run_goes_on_and_a_finished_one_does_nothing(train):
    changes = {"train.max_steps": 2, "train.batch_size": 1}
    run = train(**changes)
    before = tensors(run / "checkpoints" / "step-000002")
    stamp = (run / "metrics.jsonl").stat().st_mtime_ns
    train(**changes)
    assert (run / "metrics.jsonl").stat().st_mtime_ns == stamp
    train(**(changes | {"train.max_steps": 3}))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert_same_to_the_bit(tensors(run / "checkpoints" / "step-000002"), before)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(train):
    run = train(**{"train.max_steps": 2, "train.batch_size": 1})
    stored = load_file(run / "checkpoints" / "step-000002" / "student.safetensors")
    assert len(stored) == 2 * 20
    assert all(".lora_" in key for key in stored)
    assert load_file(run / "checkpoints" / "step-000002" / "ema.safetensors").keys() == stored.keys()
