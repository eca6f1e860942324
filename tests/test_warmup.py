"""The warm-up of a causal student: its loss, its data, and the stage in front of DMD, stopped anywhere."""

from __future__ import annotations

import copy
import io
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from conftest import done, refused, run_cli, tiny_transformer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmdtrain.config import Config, build, load_own
from dmdtrain.data.latents import LatentFolder, read_latents
from dmdtrain.export import lora_tensors
from dmdtrain.flow import shift_timestep
from dmdtrain.models import causal, encode
from dmdtrain.models.causal import CausalView, KVCache
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.train import setup, trainer
from dmdtrain.train.step import block_layout
from dmdtrain.train.trainer import Trainer
from dmdtrain.train.warmup import Warmup
from dmdtrain.train.warmup_step import WarmupBatch, draw_warmup, warmup_backward

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = [1000.0, 757.0, 522.0]
KINDS = ("teacher_forcing", "ode_regression")
SHAPE = (4, 4, 4, 4)  # [C, T, H, W] of the runs below
MACHINE = ("seconds", "memory_gib", "model_tflops", "model_flop_utilisation")  # how what it decides is called


def values_of(wan_folder: Path, folder: Path, changes: dict | None = None) -> dict:
    """The configuration of a run in `folder` / run, with {"group.key": value} applied."""
    values = {
        "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
        "student": {"rank": 4, "alpha": 8},
        "fake_score": {"rank": 4, "alpha": 4, "lr": 1e-3},
        "rollout": {"causal": True, "num_training_frames": 4, "num_frame_per_block": 2},
        "warmup": {"kind": "ode_regression", "steps": 4, "lr": 1e-2, "num_samples": 5, "teacher_steps": 3},
        "data": {"prompts": str(folder / "prompts.txt"), "resolution": "32x32", "max_sequence_length": 8},
        "optimizer": {"lr": 1e-2},
        "train": {"max_steps": 2, "batch_size": 2, "mixed_precision": "no", "gradient_checkpointing": False},
        "ema": {"decay": 0.5},
        "checkpoint": {"every": 2, "keep": 10},
        "validation": {"every": 0, "num_frames": 5, "resolution": "32x32", "prompts": ["a dog"]},
        "log": {"tensorboard": False},
        "output_dir": str(folder / "run"),
    }
    for key, value in (changes or {}).items():
        *groups, name = key.split(".")
        (values.setdefault(groups[0], {}) if groups else values)[name] = value
    return values


@pytest.fixture(scope="module")
def data(wan_folder, tmp_path_factory) -> Path:
    """Five trajectories of the teacher with all their states, four latent frames long."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("a red cat runs\na blue dog sleeps\na cat on grass\na dog\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(values_of(wan_folder, folder)))
    out = folder / "trajectories"
    done("synthesize", folder / "run.yaml", "--out", out, "--count", 5, "--steps", 4, "--every-state")
    return out


def encoded(data: Path, run: Path) -> None:
    """Gives a run the prompts that `synthesize` encoded, so that not every run loads the text encoder."""
    if not run.exists():
        shutil.copytree(data.parent / "run" / "cache" / "text", run / "cache" / "text")


@pytest.fixture
def write(wan_folder, tmp_path, data):
    """Writes the configuration of a run in tmp_path / run."""

    def config_file(changes: dict | None = None) -> Path:
        encoded(data, tmp_path / "run")
        (tmp_path / "prompts.txt").write_text("a red cat runs\na dog\n")
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(values_of(wan_folder, tmp_path, changes)))
        return file

    return config_file


@pytest.fixture
def make(wan_folder, tmp_path, data):
    """A prepared Warmup of a run with changes, on `data` unless they say otherwise."""

    def build_warmup(changes: dict | None = None, name: str = "run") -> Warmup:
        (tmp_path / "prompts.txt").write_text("a red cat runs\na dog\n")
        encoded(data, tmp_path / name)
        changes = {"warmup.data": str(data), "output_dir": str(tmp_path / name)} | (changes or {})
        run = setup.resolve(build(values_of(wan_folder, tmp_path, changes)))
        quiet = Console(quiet=True)
        trainer = Trainer(run, quiet)
        warmup = Warmup(run, trainer.renderer, quiet, trainer.clips)
        warmup.prepare()
        return warmup

    return build_warmup


def metrics(folder: Path) -> list[dict]:
    """What metrics.jsonl says, without what depends on the machine's mood. NaN is no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.jsonl")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MACHINE)} for line in lines]


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.is_dir())


def checkpoints(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint of both stages, but what holds the folder's name."""
    found = [f for stage in ("warmup", "checkpoints") for f in sorted((run / stage).glob("step-*/*"))]
    return {str(f.relative_to(run)): f.read_bytes() for f in found if f.name not in ("config.yaml", "manifest.json")}


# ---------------------------------------------------------------------------------------------------- the draws


def config_of(kind: str = "teacher_forcing", **changes) -> Config:
    rollout = {"causal": True, "num_training_frames": 5, "num_frame_per_block": 2, "independent_first_frame": True}
    options = {key: changes.pop(key) for key in [*changes] if key.startswith("timestep")}
    return build(
        {
            "rollout": rollout | changes,
            "warmup": {"kind": kind} | options,
            "validation": {"num_frames": 17, "resolution": "32x32"},
        }
    )


def drawn(config: Config, n: int = 512, flow_shift: float = 1.0, seed: int = 0) -> tuple[WarmupBatch, torch.Tensor]:
    """A batch, and the states it was made of."""
    generator = torch.Generator().manual_seed(1)
    clean, states = (torch.randn(*sizes, 2, 5, 2, 2, generator=generator) for sizes in ((n,), (3, n)))
    context = torch.zeros(n, 1, 1)
    generator.manual_seed(seed)
    return draw_warmup(config, STEPS, flow_shift, context, clean, states, generator), states


def assert_independent(columns: torch.Tensor) -> None:
    """columns: [n, blocks], each row a sample."""
    correlation = torch.corrcoef(columns.double().T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 0.15, correlation
    shifted = torch.corrcoef(torch.stack([columns[1:].flatten(), columns[:-1].flatten()]).double())  # of other samples
    assert abs(float(shifted[0, 1])) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_are_constant_in_a_block_and_independent_across_blocks_and_samples(kind):
    timestep = drawn(config_of(kind))[0].timestep
    assert timestep.shape == (512, 5)
    assert torch.equal(timestep[:, 1], timestep[:, 2]) and torch.equal(timestep[:, 3], timestep[:, 4])
    blocks = timestep[:, [0, 1, 3]]
    assert_independent(blocks)
    if kind == "ode_regression":
        for block in blocks.T:  # all steps, about as often
            values, counts = block.unique(return_counts=True)
            assert values.tolist() == sorted(STEPS) and counts.min() > 512 / 3 * 0.75
    else:
        assert blocks.unique().numel() == blocks.numel()
        for quantile in (0.1, 0.5, 0.9):
            assert float(blocks.quantile(quantile)) == pytest.approx(1000 * quantile, abs=40)


def test_the_shift_of_the_noise_levels():
    plain = drawn(config_of(timestep_shift=1.0), flow_shift=9.0)[0].timestep
    shifted = drawn(config_of(timestep_shift=5.0), flow_shift=9.0)[0].timestep
    models = drawn(config_of(), flow_shift=5.0)[0].timestep
    assert plain.median() < 550 and shifted.median() > 800
    torch.testing.assert_close(shifted, shift_timestep(plain, 5.0))
    assert torch.equal(models, shifted)


def test_teacher_forcing_is_flow_matching():
    batch, _ = drawn(config_of())
    sigma = batch.timestep[:, None, :, None, None] / 1000
    noise = batch.clean + batch.flow
    torch.testing.assert_close(batch.noisy, (1 - sigma) * batch.clean + sigma * noise)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), batch.clean.flatten()]))[0, 1])) < 0.02
    assert torch.equal(batch.seen, batch.clean)


def test_ode_regression_takes_the_teachers_states():
    batch, states = drawn(config_of("ode_regression"))
    assert batch.flow is None
    for step, timestep in enumerate(STEPS):
        here = (batch.timestep == timestep)[:, None, :, None, None].expand_as(batch.clean)
        assert torch.equal(batch.noisy[here], states[step][here]) and here.any()
    assert torch.equal(batch.seen, batch.clean)


@pytest.mark.parametrize("kind", KINDS)
def test_context_noise_changes_what_is_seen_alone(kind):
    batch, _ = drawn(config_of(kind, context_noise=200))
    plain, _ = drawn(config_of(kind))
    for name in ("context", "clean", "noisy", "timestep", "flow"):
        a, b = getattr(batch, name), getattr(plain, name)
        assert a is b is None or torch.equal(a, b), name
    noise = (batch.seen - 0.8 * batch.clean) / 0.2
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    others = [batch.clean] if batch.flow is None else [batch.clean, batch.clean + batch.flow]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.02


def test_draws_are_the_generators():
    for kind in KINDS:
        config = config_of(kind, context_noise=100)
        one, same, other = (drawn(config, 4, seed=seed)[0] for seed in (3, 3, 4))
        for name in ("seen", "noisy", "timestep"):
            assert torch.equal(getattr(one, name), getattr(same, name))
            assert not torch.equal(getattr(one, name), getattr(other, name))


# ---------------------------------------------------------------------------------------------------- the loss


def wide_roles() -> Roles:
    """In float64, with adapters that do something."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    return Roles(
        tiny_transformer().double(),
        trained={"student": AdapterSpec(4, 8, targets)},
        adapter_dtype=torch.float64,
        causal=True,
        init_lora_weights=False,
    )


def wide_batch(config: Config, n: int) -> WarmupBatch:
    generator = torch.Generator().manual_seed(5)
    frames = config.rollout.num_training_frames
    context, clean, states = (
        torch.randn(*sizes, generator=generator)
        for sizes in ((n, 9, 16), (n, 4, frames, 4, 6), (3, n, 4, frames, 4, 6))
    )
    batch = draw_warmup(config, STEPS, 3.0, context, clean, states, generator)
    return WarmupBatch(*(None if value is None else value.double() for value in vars(batch).values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"context_noise": 150}, {"local_attention_frames": 3, "sink_frames": 1, "context_noise": 80}],
    ids=lambda options: ",".join(options) or "none",
)
def test_the_loss_is_that_of_the_rollouts_own_passes(kind, options):
    """Block by block through a cache that holds what is seen: what one pass over [seen | noisy] stands for."""
    config = config_of(kind, **options)
    roles, batch = wide_roles(), wide_batch(config, 2)
    loss = warmup_backward(roles, config, batch, 1.0, nullcontext)["warmup_loss"]
    cache = KVCache(options.get("local_attention_frames"), options.get("sink_frames", 0))
    context_timestep = torch.full((2,), float(options.get("context_noise", 0)), dtype=torch.float64)
    flows = []
    with torch.no_grad():
        for frames in block_layout(config.rollout, 5).slices:
            t = batch.timestep[:, frames.start]
            flows.append(
                roles.flow("student", batch.noisy[:, :, frames], t, batch.context, CausalView(cache, frames, False))
            )
            write = CausalView(cache, frames, True)
            roles.flow("student", batch.seen[:, :, frames], context_timestep, batch.context, write)
    flow = torch.cat(flows, 2)
    if kind == "teacher_forcing":
        wanted = (flow - batch.flow).square().mean()
    else:
        x0 = batch.noisy - batch.timestep[:, None, :, None, None] / 1000 * flow
        wanted = (x0 - batch.clean).square().mean()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)  # some of the model's own passes are in float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"context_noise": 150, "local_attention_frames": 3, "sink_frames": 1}], ids=["all", "window"]
)
def test_block_by_block_only_the_gradient_of_the_context_is_missing(kind, options, monkeypatch):
    config = config_of(kind, **options)
    roles, batch = wide_roles(), wide_batch(config, 2)

    def gradients(context_gradient: bool) -> tuple[float, dict[str, torch.Tensor]]:
        warmup = config.warmup.model_copy(update={"context_gradient": context_gradient})
        chosen = config.model_copy(update={"warmup": warmup})
        loss = float(warmup_backward(roles, chosen, batch, 0.5, nullcontext)["warmup_loss"])
        found = {name: p.grad.clone() for name, p in roles.named_parameters("student").items()}
        for p in roles.parameters("student"):
            p.grad = None
        return loss, found

    whole_loss, whole = gradients(True)
    loss, found = gradients(False)

    def of_constant_context(stock, view, query, *read):
        half = query.shape[1] // 2
        return in_one_pass(stock, view, query, *(torch.cat([x[:, :half].detach(), x[:, half:]], 1) for x in read))

    in_one_pass = causal._teacher_forcing
    monkeypatch.setattr(causal, "_teacher_forcing", of_constant_context)
    _, wanted = gradients(True)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert any((whole[name] - found[name]).norm() > 0.01 * found[name].norm() for name in found)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_whole(kind):
    config = config_of(kind, context_noise=100)
    roles, batch = wide_roles(), wide_batch(config, 4)

    def gradients(*parts: slice) -> tuple[float, dict[str, torch.Tensor]]:
        loss = 0.0
        for part in parts:
            share = (part.stop - part.start) / 4
            rows = batch.rows(part.start, part.stop)
            loss += share * float(warmup_backward(roles, config, rows, share, nullcontext)["warmup_loss"])
        parameters = roles.named_parameters("student")
        found = {name: p.grad for name, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        return loss, found

    loss, whole = gradients(slice(0, 4))
    for parts in ([slice(0, 2), slice(2, 4)], [slice(0, 1), slice(1, 4)]):
        split_loss, split = gradients(*parts)
        assert split_loss == pytest.approx(loss, rel=1e-9)
        for name, wanted in whole.items():
            assert wanted.abs().max() > 0
            torch.testing.assert_close(split[name], wanted, rtol=1e-6, atol=1e-8 * float(wanted.abs().max()))


def test_gradient_accumulation_changes_no_number_but_rounding(make):
    split = make({"train.batch_size": 2, "train.gradient_accumulation": 2}, "split")
    whole = make({"train.batch_size": 4}, "whole")
    for _ in range(2):
        one, other = split.train_step(), whole.train_step()
        for key in ("warmup_loss", "warmup_grad_norm", "lr_warmup"):
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert [f.name for f in split.samples.files.draw(3)] == [f.name for f in whole.samples.files.draw(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_on_a_fixed_batch(make, data, tmp_path, kind):
    two = tmp_path / "two"
    (two / "samples").mkdir(parents=True)
    for name in ("latents.json", "samples/000000.safetensors", "samples/000001.safetensors"):
        shutil.copy(data / name, two / name)
    warmup = make({"warmup.kind": kind, "warmup.data": str(two), "warmup.lr": 0.02})
    captions, clean, states = read_latents(LatentFolder.open(two, "x").files(), warmup.samples.num_frames)
    states = None if warmup.samples.states is None else states[warmup.samples.states]
    context = warmup.text.get(captions)

    def mean_loss() -> float:
        generator, losses = torch.Generator().manual_seed(77), []
        for _ in range(8):
            batch = draw_warmup(warmup.config, STEPS, 3.0, context, clean, states, generator)
            stats = warmup_backward(warmup.roles, warmup.config, batch, 0.0, nullcontext)
            losses.append(float(stats["warmup_loss"]))
        warmup.optimizer.zero_grad(set_to_none=True)
        return sum(losses) / len(losses)

    before = mean_loss()
    for _ in range(40):
        values = warmup.train_step()
    assert values["bad_steps"] == 0
    after = mean_loss()
    assert after < 0.9 * before, (before, after)


# ---------------------------------------------------------------------------------------------------- the data


def test_the_states_at_the_students_steps_are_found_among_all(make, data):
    there = json.loads((data / "latents.json").read_text())["timesteps"]
    assert [there[i] for i in make().samples.states] == STEPS
    assert [there[i] for i in make({"dmd.denoising_steps": [757]}, "one").samples.states] == [757]


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """One entry each time the text encoder is loaded: of Wan it is the largest part."""
    work, calls = encode.load_text_encoder, []

    def load(folder, precision, quantize_on):
        calls.append(precision)
        return work(folder, precision, quantize_on)

    monkeypatch.setattr(encode, "load_text_encoder", load)
    return calls


def test_the_text_encoder_is_not_loaded_in_mid_training(make, data, tmp_path, loads):
    """Captions of the data that are not the run's prompts are encoded before the first step."""
    other = shutil.copytree(data, tmp_path / "other")
    for number, file in enumerate(sorted((other / "samples").iterdir())):
        save_file(load_file(file), file, metadata={"caption": " ".join(["a", "cat"][number % 2 :] * (number + 1))})
    warmup = make({"warmup.data": str(other), "train.batch_size": 1})
    loads.clear()
    for _ in range(5):
        warmup.train_step()
    assert loads == []


def test_longer_data_are_cut_to_the_run(make, data):
    warmup = make({"rollout.num_training_frames": 2})
    assert warmup.samples.num_frames == 2
    assert warmup.train_step()["bad_steps"] == 0
    assert make({"rollout.num_gradient_frames": 2}, "scored").samples.num_frames == 2


def changed_facts(data: Path, to: Path, **changes) -> Path:
    shutil.copytree(data, to)
    info = to / "latents.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | changes))
    return to


@pytest.fixture
def no_models(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("load_transformer", "build_roles"):
        monkeypatch.setattr(setup, name, forbidden)
    monkeypatch.setattr("dmdtrain.models.encode.load_text_encoder", forbidden)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("kind", KINDS)
def test_data_that_do_not_fit_are_refused_before_a_model_is_loaded(write, data, tmp_path, kind):
    def check(folder: Path, says: str, changes: dict | None = None) -> None:
        file = write({"warmup.kind": kind, "warmup.data": str(folder)} | (changes or {}))
        for command in (["fit", file], ["fit", file, "--dry-run"]):
            refused(*command, says=["warmup.data: ", str(folder), says])
        assert {f.name for f in (tmp_path / "run").iterdir()} <= {"cache", ".lock"}

    check(tmp_path / "none", "no such folder")
    (tmp_path / "file").write_text("x")
    check(tmp_path / "file", "no such folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    check(empty, "no trajectories" if kind == "ode_regression" else "holds no clips")
    unfinished = changed_facts(data, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "samples")
    check(unfinished, "holds no samples; run dmdtrain synthesize to its end")
    broken = changed_facts(data, tmp_path / "broken")
    (broken / "latents.json").write_text("{")
    check(broken, "latents.json is broken")
    check(data, "holds latents [4, 4, 4, 4]; this run needs [4, 4, 6, 4]", {"data.resolution": "32x48"})
    check(data, "holds latents [4, 4, 4, 4]; this run needs [4, 6, 4, 4]", {"rollout.num_training_frames": 6})
    says = "ode_regression needs them at 1000, 700"
    if kind == "ode_regression":
        check(data, says, {"dmd.denoising_steps": [1000, 700]})
        check(changed_facts(data, tmp_path / "latents", what="latents", timesteps=None), "holds states at none")
        check(changed_facts(data, tmp_path / "videos", what="videos", timesteps=None), "holds no trajectories")
    else:  # which needs no states
        done("fit", write({"warmup.kind": kind, "warmup.data": str(data), "dmd.denoising_steps": [1000]}), "--dry-run")


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("kind", KINDS)
def test_a_bidirectional_student_has_no_warm_up(write, kind):
    file = write({"warmup.kind": kind, "rollout.causal": False})
    refused("fit", file, says=[f"warmup.kind: {kind} is for causal students", "valid without is none"])


# Clips


@pytest.fixture(scope="module")
def videos(wan_folder, tmp_path_factory) -> Path:
    """Three videos of the teacher with their captions, 13 frames long."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "prompts.txt").write_text("a red cat runs\na blue dog sleeps\na cat on grass\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(values_of(wan_folder, folder)))
    done("synthesize", folder / "run.yaml", "--out", folder / "made", "--what", "videos", "--steps", 2)
    return folder / "made"


def test_videos_are_encoded_once(write, videos, tmp_path, monkeypatch):
    clips = tmp_path / "clips"
    shutil.copytree(videos / "samples", clips)
    (clips / "000001.txt").write_text("  \n")
    shutil.copy(clips / "000000.mp4", clips / "uncaptioned.mp4")
    changes = {"warmup.kind": "teacher_forcing", "warmup.steps": 2, "warmup.data": str(clips)}
    file = write(changes)
    output = done("fit", file)
    assert f"2 left out, listed in {tmp_path / 'run' / 'data_report.jsonl'}" in output
    assert f"{clips / '000001.mp4'}: its caption is empty" in output
    latents = sorted((tmp_path / "run" / "cache" / "videos" / "latents").glob("*/*"))
    assert len(latents) == 2
    for made in latents:
        with safe_open(made, "pt") as opened:
            assert opened.get_tensor("latents").shape == SHAPE
    times = {f: f.stat().st_mtime_ns for f in latents}
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "warmup")
    done("fit", file)
    assert {f: f.stat().st_mtime_ns for f in latents[0].parents[1].glob("*/*")} == times


def test_a_folder_of_synthesized_videos_will_do(write, videos, tmp_path):
    output = done("fit", write({"warmup.kind": "teacher_forcing", "warmup.steps": 1, "warmup.data": str(videos)}))
    assert f"on {videos}" in output and names(tmp_path / "run" / "warmup") == ["step-000001"]


# ---------------------------------------------------------------------------------------------------- the stage


BUSY = {
    "warmup.steps": 5,
    "checkpoint.every": 2,
    "train.max_steps": 3,
    "log.every": 1,
    "train.gradient_accumulation": 2,
}


@pytest.fixture(scope="module")
def whole(wan_folder, data, tmp_path_factory) -> Path:
    """A run of both stages without a break."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.txt").write_text("a red cat runs\na dog\n")
    changes = BUSY | {"warmup.data": str(data)}
    (folder / "run.yaml").write_text(yaml.safe_dump(values_of(wan_folder, folder, changes)))
    done("fit", folder / "run.yaml")
    return folder / "run"


@pytest.fixture
def busy(write, data, whole) -> Path:
    """The same run, not started."""
    return write(BUSY | {"warmup.data": str(data), "data.prompts": str(whole.parent / "prompts.txt")})


def test_the_warm_up_comes_first_and_keeps_its_own_books(whole):
    assert names(whole / "warmup") == ["step-000002", "step-000004", "step-000005"]
    assert names(whole / "checkpoints") == ["step-000002", "step-000003"]
    lines = metrics(whole / "warmup")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert {"warmup_loss", "warmup_grad_norm", "lr_warmup", "bad_steps"} <= line.keys()
        assert line["warmup_loss"] > 0 and line["lr_warmup"] == 1e-2
    assert [line["step"] for line in metrics(whole)] == [1, 2, 3]
    assert all("dmd_loss" in line and "warmup_loss" not in line for line in metrics(whole))
    states = [
        json.loads((whole / f / "state.json").read_text()) for f in ("warmup/step-000005", "checkpoints/step-000002")
    ]
    assert [(state["stage"], state["step"]) for state in states] == [("warmup", 5), ("dmd", 2)]
    assert not list(whole.rglob("*.partial"))


def test_the_average_starts_from_the_warmed_student(write, data, tmp_path):
    done("fit", write({"warmup.data": str(data), "warmup.steps": 2, "checkpoint.every": 1, "train.max_steps": 1}))
    run = tmp_path / "run"
    warmed = load_file(run / "warmup" / "step-000002" / "student.safetensors")
    student, ema = (load_file(run / "checkpoints" / "step-000001" / f"{n}.safetensors") for n in ("student", "ema"))
    for name, value in ema.items():
        # After the first update the decay is 1 / 10, and not yet 1 / 2.
        torch.testing.assert_close(value, 0.1 * warmed[name] + 0.9 * student[name], rtol=1e-6, atol=1e-7)
    moved = [name for name in ema if (warmed[name] - student[name]).abs().max() > 1e-3]
    assert moved and any(warmed[name].abs().max() > 5e-3 for name in warmed if "lora_B" in name)


def test_the_rate_rises_and_steps_are_validated_before_dmd(write, data, tmp_path):
    changes = {"warmup.lr_warmup_steps": 3, "validation.every": 2, "warmup.data": str(data)}
    done("fit", write(changes))
    run = tmp_path / "run"
    rates = [line["lr_warmup"] for line in metrics(run / "warmup")]
    assert rates == sorted(rates) and 0 < rates[0] < rates[1] < rates[2] <= rates[3] == 1e-2
    assert names(run / "samples") == ["step-000000", "step-000002"]  # what DMD starts from, and its end


def test_a_validation_that_can_not_be_written_is_told(write, data, tmp_path):
    (tmp_path / "run").mkdir()
    file = write({"validation.every": 2, "warmup.data": str(data), "train.max_steps": 2})
    samples = tmp_path / "run" / "samples"
    done("fit", file, "--set", "validation.every=0", "--set", "warmup.steps=4", "--max-steps", 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    samples.write_text("in the way")
    told = done("fit", file)
    assert told.count("the samples could not be written (Not a directory); training goes on") == 2
    assert "step 0: the samples could not" in told and names(tmp_path / "run" / "checkpoints") == ["step-000002"]


def test_a_folder_in_place_of_the_metrics_is_one_line(write, data, tmp_path):
    file, metrics = write({"warmup.data": str(data)}), tmp_path / "run" / "warmup" / "metrics.jsonl"
    done("fit", file)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    metrics.unlink()
    metrics.mkdir()
    result = run_cli("fit", file)
    assert result.exit_code == 74
    assert result.stderr == f"dmdtrain: {metrics} can not be read or written: Is a directory\n"


def interrupt(monkeypatch, owner: type, step: int) -> None:
    """Ctrl-C in the train_step of that number."""
    work = owner.train_step

    def train_step(self):
        if self.step + 1 == step:
            raise KeyboardInterrupt
        return work(self)

    monkeypatch.setattr(owner, "train_step", train_step)


@pytest.mark.parametrize(
    ("stage", "step", "goes_on"),
    [
        (Warmup, 1, None),
        (Warmup, 4, "warmup/step-000002, warm-up step 2"),
        (Trainer, 1, "warmup/step-000005, warm-up step 5"),
        (Trainer, 3, "checkpoints/step-000002, step 2"),
    ],
    ids=["before the first checkpoint", "in the warm-up", "between the stages", "in DMD"],
)
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(
    whole, busy, tmp_path, monkeypatch, stage, step, goes_on
):
    with monkeypatch.context() as patch:
        interrupt(patch, stage, step)
        result = run_cli("fit", busy)
        assert result.exit_code == 130 and "interrupted; the last checkpoint is intact" in result.stderr
    if stage is Trainer and step > 1:  # the warm-up is over

        def forbidden(*args):
            raise AssertionError("the warm-up ran again")

        monkeypatch.setattr(trainer, "Warmup", forbidden)
    torch.manual_seed(999)  # the global generator plays no part
    output = done("fit", busy)
    assert ("resumed from" in output) == (goes_on is not None)
    if goes_on:
        assert f"resumed from {tmp_path / 'run' / goes_on}" in output
    found = checkpoints(tmp_path / "run")
    assert found.keys() == checkpoints(whole).keys()
    assert [name for name, content in checkpoints(whole).items() if found[name] != content] == []
    assert metrics(tmp_path / "run") == metrics(whole)
    assert metrics(tmp_path / "run" / "warmup") == metrics(whole / "warmup")


def test_a_finished_run_has_nothing_to_do(whole, wan_folder):
    before = checkpoints(whole)
    assert "nothing to do: the run is at step 3, and train.max_steps is 3" in done("fit", whole.parent / "run.yaml")
    assert checkpoints(whole) == before


def test_going_back_into_the_warm_up(whole, busy, tmp_path):
    """A checkpoint that is named: here, and from the folder of another run into a new one."""
    shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
    elsewhere = tmp_path / "elsewhere"
    for output in (tmp_path / "run", elsewhere):
        shutil.rmtree(tmp_path / "run" / "warmup" / "step-000005", ignore_errors=True)
        ckpt = tmp_path / "run" / "warmup" / "step-000002"
        told = done("fit", busy, "--resume", ckpt, "--output-dir", output)
        assert f"resumed from {ckpt}, warm-up step 2" in told
        last = [name for name in checkpoints(whole) if name.startswith(("warmup/step-000005", "checkpoints/"))]
        assert len(last) > 20
        for name in last:
            assert checkpoints(output)[name] == checkpoints(whole)[name], name
        assert [line["step"] for line in metrics(output)] == [1, 2, 3]


def test_a_branch_of_the_warm_up_has_another_rate(whole, busy, tmp_path):
    ckpt, branch = whole / "warmup" / "step-000002", tmp_path / "branch"
    told = done("fit", busy, "--resume", ckpt, "--output-dir", branch, "--set", "warmup.lr=1e-5")
    assert f"branch of {ckpt}" in told and "changed warmup.lr: " in told
    assert [line["lr_warmup"] for line in metrics(branch / "warmup")] == [1e-5] * 3


def test_a_run_with_another_warm_up_is_another_run(whole, write, data, tmp_path):
    shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
    for changes, says in (
        ({"warmup.steps": 6}, "warmup.steps: 5 -> 6"),
        ({"warmup.kind": "teacher_forcing"}, "warmup.kind: 'ode_regression' -> 'teacher_forcing'"),
        ({"warmup.lr": 1e-3}, "warmup.lr: 0.01 -> 0.001"),
    ):
        same = {"warmup.data": str(data), "data.prompts": str(whole.parent / "prompts.txt")}
        file = write(BUSY | same | changes)
        refused("fit", file, says=[f"output_dir: {tmp_path / 'run'} belongs to another run", says])


def test_the_commands_on_a_checkpoint_of_the_warm_up(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    ckpt = run / "warmup" / "step-000004"
    output = done("validate", "--ckpt", ckpt, "--frames", 13)
    assert "student (raw): 1 videos in 3 steps" in output
    assert (run / "validate" / "step-000004" / "contact_sheet.png").exists()
    done("generate", "--ckpt", ckpt, "a cat runs", "--out", tmp_path / "one.mp4")
    assert (tmp_path / "one.mp4").stat().st_size > 200
    done("export-lora", "--ckpt", ckpt, "--out", tmp_path / "lora.safetensors")
    trained = load_file(ckpt / "student.safetensors")
    exported = load_file(tmp_path / "lora.safetensors")
    assert exported.keys() == lora_tensors(trained, 1.0, "original").keys()
    says = [f"--weights: ema: {ckpt} was trained without an average; valid is raw"]
    for command in (
        ["validate", "--out", tmp_path / "refused"],
        ["generate", "a cat", "--out", tmp_path / "two.mp4"],
        ["export-lora", "--out", tmp_path / "two.safetensors"],
        ["export-pipeline", "--out", tmp_path / "refused"],
    ):
        refused(command[0], "--ckpt", ckpt, "--weights", "ema", *command[1:], says=says)
    assert not (tmp_path / "refused").exists() and not list(tmp_path.glob("two.*"))


# The run's own data


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_makes_its_own_data_and_goes_on_with_them(write, tmp_path, monkeypatch, kind):
    file = write({"warmup.kind": kind, "warmup.steps": 2, "train.max_steps": 1})
    own = tmp_path / "run" / "cache" / "warmup"
    work, written = LatentFolder.write, []

    def stop_at_the_fourth(self, index, *args):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(index)
        work(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LatentFolder, "write", stop_at_the_fourth)
        result = run_cli("fit", file)
    assert result.exit_code == 130 and "the teacher makes 5 videos" in " ".join(result.output.split())
    before = {f.name: f.stat().st_mtime_ns for f in (own / "samples").iterdir()}
    assert sorted(before) == [f"{index:06d}.safetensors" for index in range(3)]
    assert "the teacher makes 2 videos" in done("fit", file)
    after = {f.name: f.stat().st_mtime_ns for f in (own / "samples").iterdir()}
    assert len(after) == 5 and before.items() <= after.items()
    assert names(tmp_path / "run" / "checkpoints") == ["step-000001"]
    facts = json.loads((own / "latents.json").read_text())
    assert (facts["timesteps"], facts["steps"]) == (STEPS if kind == "ode_regression" else None, 3)
    assert facts["latent_shape"] == list(SHAPE)
    # They are as good as what `synthesize` makes: another run can be pointed at them.
    other = write({"warmup.kind": kind, "warmup.steps": 1, "warmup.data": str(own), "output_dir": str(tmp_path / "b")})
    done("fit", other, "--max-steps", 1)


# ---------------------------------------------------------------------------------------------------- not finite


def with_nan(data: Path, to: Path, indices: list[int]) -> Path:
    shutil.copytree(data, to)
    for index in indices:
        file = to / "samples" / f"{index:06d}.safetensors"
        tensors = copy.deepcopy(load_file(file))
        tensors["latents"][0, 0, 0, 0] = float("nan")
        save_file(tensors, file, metadata={"caption": "a cat"})
    return to


def test_a_loss_that_is_not_finite_is_skipped_and_counted(make, data, tmp_path):
    """Five samples, one of them bad, in updates of one."""
    bad = with_nan(data, tmp_path / "bad", [3])
    warmup = make({"warmup.data": str(bad), "train.batch_size": 1, "warmup.steps": 10})
    counted = []
    for _ in range(10):
        before = [p.detach().clone() for p in warmup.roles.parameters("student")]
        values = warmup.train_step()
        moved = any(not torch.equal(a, p) for a, p in zip(before, warmup.roles.parameters("student"), strict=True))
        assert moved == ("warmup_loss" in values)
        counted.append(not moved)
        assert all(p.isfinite().all() and p.grad is None for p in warmup.roles.parameters("student"))
        assert values["bad_steps"] == sum(counted)
    assert sum(counted) == 2 and warmup.bad_in_a_row == {"warmup": 0}  # once an epoch


def test_metrics_of_skipped_steps_are_json(write, data, tmp_path):
    bad = with_nan(data, tmp_path / "bad", [0, 2])
    done("fit", write({"warmup.data": str(bad), "train.batch_size": 1, "warmup.steps": 5}))
    lines = metrics(tmp_path / "run" / "warmup")
    assert lines[-1]["bad_steps"] == 2 and sum("warmup_loss" in line for line in lines) == 3


def test_too_many_in_a_row_stop_the_run(write, data, tmp_path):
    bad = with_nan(data, tmp_path / "bad", list(range(5)))
    result = run_cli("fit", write({"warmup.data": str(bad), "warmup.steps": 9, "train.max_bad_steps": 3}))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "dmdtrain: step 3: loss or gradient of warmup was not finite 3 times in a row; lower warmup.lr"
    )
    assert names(tmp_path / "run" / "warmup") == []  # nothing bad was saved
    facts = json.loads((tmp_path / "run" / "bad_steps" / "step-000003-warmup.json").read_text())
    assert facts["gradient_norms"] == {"student": "nan"} and facts["statistics"] == {"warmup_loss": "nan"}
    # What it was made of: the samples by name, in their order, the generator and what it gave.
    kept = load_file(tmp_path / "run" / "bad_steps" / "step-000003-warmup.safetensors")
    captions, clean, states = read_latents([Path(name) for name in facts["clips"]], 4)
    assert captions == facts["prompts"] and len(facts["clips"]) == 2
    generator = torch.Generator()
    generator.set_state(kept["generator"])
    config = load_own(tmp_path / "run" / "config.yaml")
    run = setup.resolve(config)
    again = draw_warmup(config, run.timesteps, run.flow_shift, torch.zeros(2, 8, 16), clean, states, generator)
    assert torch.equal(again.timestep, kept["timestep"])


def test_a_bad_step_of_the_warm_up_that_can_not_be_kept_is_told(make, data, tmp_path):
    warmup = make({"warmup.data": str(with_nan(data, tmp_path / "bad", list(range(5))))})
    warmup.console = Console(file=io.StringIO(), width=1000)
    warmup.run.output_dir.mkdir(exist_ok=True)
    (warmup.run.output_dir / "bad_steps").write_text("in the way")
    warmup.train_step()
    assert "step 1: bad_steps can not be written (File exists)" in warmup.console.file.getvalue()
