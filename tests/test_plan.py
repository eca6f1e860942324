"""Plans: what is predicted from shapes against what the real code holds and computes."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from conftest import done, tiny_transformer
from diffusers.models.attention_dispatch import attention_backend
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.config import build
from dmdtrain.models.decode import StreamDecoder
from dmdtrain.models.wan import find_folder
from dmdtrain.train import plan as planning
from dmdtrain.train import setup
from dmdtrain.train.accounting import LiveBytes, PeakPhases, optimizer_bytes
from dmdtrain.train.checkpoint import list_checkpoints
from dmdtrain.train.fit import smaller
from dmdtrain.train.flops import pass_flops, stage_flops, step_flops, update_flops
from dmdtrain.train.plan import GIB, make_plan
from dmdtrain.train.render import Renderer
from dmdtrain.train.step import Distiller
from dmdtrain.train.warmup_step import draw_warmup, warmup_backward

LAYERS = 7
CAUSAL = {"causal": True, "num_frame_per_block": 1}


@pytest.fixture(scope="module")
def deep_folder(wan_folder, tmp_path_factory):
    """The random folder with a transformer of seven blocks, wide enough that activations are most of the memory."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    shutil.copytree(wan_folder, folder)
    model = tiny_transformer(num_layers=LAYERS, attention_head_dim=32, ffn_dim=256)
    model.save_pretrained(folder / "transformer")
    return folder


def resolved(settings: dict, folder, **groups) -> setup.Run:
    values = settings | {"model": {"base": str(folder), "precision": "fp32"}}
    for group, changed in groups.items():
        values[group] = values.get(group, {}) | changed
    return setup.resolve(build(values))


def really(run: setup.Run) -> tuple[int, dict[str, int]]:
    """Bytes of what is frozen, and the peak of every phase above the weights, on real tensors."""
    roles = setup.build_roles(run, torch.device("cpu"))
    config = run.config
    modules = {id(role.module): role.module for role in roles.roles.values()}.values()
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    frozen = {id(t): t.numel() * t.element_size() for t in tensors}
    trained = [id(p) for name in ("student", "fake_score") for p in roles.parameters(name)]
    base = sum(size for key, size in frozen.items() if key not in trained)
    live = LiveBytes()
    phases = dict.fromkeys(("rollout", "scores", "replay", "critic"), 0)
    for tensor in tensors:
        live.add(tensor)  # what is there already
    with live:
        uncond = torch.randn(1, config.data.max_sequence_length, 16)
        distiller = Distiller(roles, config, run.timesteps, run.latent_shape, uncond)
        draws = distiller.draw(config.train.batch_size, torch.Generator().manual_seed(0))
        context = torch.randn(config.train.batch_size, config.data.max_sequence_length, 16)
        distiller.phases = PeakPhases(live, phases)
        distiller.student_backward(context, draws)
        for parameter in roles.parameters("student"):
            parameter.grad = None
        distiller.critic_backward(context, draws)
        if config.warmup.kind != "none":
            states = torch.randn(len(run.timesteps), config.train.batch_size, *run.latent_shape)
            generator = torch.Generator().manual_seed(0)
            batch = draw_warmup(config, run.timesteps, 3.0, context, states[0].clone(), states, generator)
            del states
            for parameter in roles.parameters("fake_score"):
                parameter.grad = None
            with distiller.phases("warm-up"):
                warmup_backward(roles, config, batch, 1.0, nullcontext)
    return base, phases


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"train": {"gradient_checkpointing": True}},
        {"rollout": {"causal": True, "num_frame_per_block": 1}, "validation": {"num_frames": 9}},
        {"rollout": {"causal": True, "num_frame_per_block": 1, "local_attention_frames": 2, "context_noise": 100}},
        {"student": {"kind": "full"}, "train": {"gradient_checkpointing": True}},
        {"train": {"mixed_precision": "bf16", "gradient_checkpointing": True}, "data": {"resolution": "128x128"}},
        {"dmd": {"fake_score_guidance_scale": 2.0}, "train": {"batch_size": 3}},
        {"train": {"gradient_checkpointing": True, "checkpoints_on": "host"}},
        {"rollout": {"causal": True, "num_frame_per_block": 1, "kv_cache": "int8"}, "validation": {"num_frames": 9}},
        {"rollout": {"causal": True, "num_frame_per_block": 1, "kv_cache": "host"}, "validation": {"num_frames": 9}},
        {"model": {"offload_blocks": True, "precision": "fp32"}, "train": {"gradient_checkpointing": True}},
        {"train": {"batched_guidance": False}, "fake_score": {"reuse_rollout": True}},
        {
            "rollout": {"causal": True, "num_frame_per_block": 1},
            "train": {"gradient_checkpointing": True, "checkpoint_replay": False},
            "validation": {"num_frames": 9},
        },
        {"model": {"precision": "int8", "int8_matmul": True}, "train": {"gradient_checkpointing": True}},
        {"model": {"precision": "nf4"}, "train": {"gradient_checkpointing": True}},
        {"rollout": CAUSAL, "warmup": {"kind": "ode_regression"}, "validation": {"num_frames": 9}},
        {
            "rollout": CAUSAL,
            "warmup": {"kind": "teacher_forcing", "context_gradient": False},
            "train": {"gradient_checkpointing": True},
            "validation": {"num_frames": 9},
        },
    ],
    ids=[
        "plain",
        "checkpointing",
        "causal",
        "window",
        "full",
        "autocast",
        "guided fake score",
        "checkpoints on the host",
        "cache in int8",
        "cache on the host",
        "blocks on the host",
        "one pass after the other",
        "replay without recompute",
        "products in int8",
        "nf4",
        "warm-up",
        "warm-up block by block",
    ],
)
def test_the_plan_is_what_the_code_holds(settings, deep_folder, groups):
    """Peaks by phase within 5 % of those on real tensors, from models of two and of three blocks.

    Autocast keeps a copy of every trained weight that a pass has seen: at this size they are as large as activations.
    """
    close = 0.2 if groups.get("train", {}).get("mixed_precision") == "bf16" else 0.05
    run = resolved(settings, deep_folder, **groups)
    made = make_plan(run)
    base, phases = really(run)
    assert made.items["base"] == pytest.approx(base, rel=0.02)
    if "warm-up" in phases:
        made.phases["warm-up"] += made.items["fake_score optimizer"]  # which it is before
    for name, peak in phases.items():
        assert made.phases[name] == pytest.approx(peak, rel=close), name


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("rollout", [{}, CAUSAL | {"kv_cache": "int8"}], ids=["bidirectional", "causal"])
def test_the_plan_of_validation_is_what_it_holds(settings, deep_folder, rollout, guidance_scale):
    sizes = {"num_frames": 29, "resolution": "128x128", "count": 2, "guidance_scale": guidance_scale}
    run = resolved(settings, deep_folder, rollout=rollout | {"num_training_frames": 8}, validation=sizes)
    made = make_plan(run)
    roles, text = setup.build_roles(run, torch.device("cpu")), setup.text_cache(run, torch.device("cpu"))
    renderer, live, phases = Renderer(run, roles, text, nullcontext), LiveBytes(), dict[str, int]()
    prompts, negative = run.validation_prompts, run.config.validation.negative_prompt
    text.prepare([*prompts, negative])
    for parameter in roles.roles["student"].module.parameters():
        live.add(parameter)
    with live, torch.no_grad():
        peaks = PeakPhases(live, phases)
        with peaks("sampling"):
            latents = renderer.student(
                prompts, 0, run.validation_latent_shape, run.validation_timesteps, guidance_scale, negative
            )
        with peaks("decoding"), renderer.codec() as vae:
            for tensor in vae.state_dict().values():
                live.add(tensor)
            decoder = StreamDecoder(vae)
            for frame in latents.split(1, dim=2):  # as `Renderer.decode` does, which keeps the videos on the CPU
                decoder(frame)
    for name, peak in phases.items():
        # Beside the student's own weights, while the average is in their place. At this size latents of other steps count.
        assert made.phases[name] - made.items["student weights"] == pytest.approx(peak, rel=0.15), name


@pytest.mark.parametrize("precision", ["bf16", "int8", "int8-llm", "nf4"])
def test_the_base_has_the_bytes_of_the_loaded_one(settings, deep_folder, precision):
    run = resolved(settings, deep_folder, model={"precision": precision})
    model = setup.load_transformer(find_folder(str(deep_folder), "model.base"), precision)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in model.state_dict().items():  # what bitsandbytes keeps beside its weights
        tensors.setdefault(name, tensor)
    wanted = sum(t.numel() * t.element_size() for name, t in tensors.items() if "quant_map" not in name)
    assert make_plan(run).items["base"] == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "adamw8bit", "paged_adamw8bit"])
def test_bytes_of_an_optimizer_are_those_of_its_state(name):
    from dmdtrain.train.optim import build_optimizer, trained_dtype

    parameters = [torch.nn.Parameter(torch.randn(n, 64, dtype=trained_dtype(name))) for n in (256, 8)]
    optimizer = build_optimizer(name, parameters, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    shared = {v.data_ptr(): v.numel() * v.element_size() for v in state if v.numel() != 256}  # not 8-bit code books
    assert optimizer_bytes(name, parameters) == pytest.approx(sum(shared.values()), rel=0.05)


def test_flops_of_a_pass_are_those_counted():
    model = tiny_transformer(attention_head_dim=32, ffn_dim=256, num_layers=4)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(1, 4, 5, 8, 12), torch.tensor([500.0]), torch.randn(1, 7, 16))
    tokens = 5 * 4 * 6
    linear, attention = pass_flops(dict(model.config), tokens, tokens, 7)
    # The embedders and the head, which are left out, are what is more in the count.
    assert linear + attention <= counter.get_total_flops() < 1.05 * (linear + attention)


def test_flops_of_a_step_follow_the_settings(settings, deep_folder):
    def flops(**groups) -> dict[str, float]:
        run = resolved(settings, deep_folder, dmd={"generator_update_interval": 1} | groups.pop("dmd", {}), **groups)
        return step_flops(run.config, run.base.transformer, run.teacher.transformer, run.frame_tokens)

    plain = flops()
    assert flops(train={"batch_size": 4}) == pytest.approx({k: 2 * v for k, v in plain.items()})
    assert flops(train={"gradient_accumulation": 3}) == pytest.approx({k: 3 * v for k, v in plain.items()})
    unguided = flops(dmd={"real_score_guidance_scale": 1.0})
    assert unguided["scores"] == pytest.approx(plain["scores"] * 2 / 3)
    half = flops(dmd={"generator_update_interval": 2})
    assert half["scores"] == plain["scores"] / 2 and half["critic"] == plain["critic"]
    assert half["rollout"] == plain["rollout"] * 3 / 4
    last = flops(rollout={"last_step_only": True})
    assert last["rollout"] == pytest.approx(plain["rollout"] * 3 / 2) and last["replay"] == plain["replay"]
    full = flops(student={"kind": "full"})
    assert full["replay"] > plain["replay"] and full["critic"] == plain["critic"]


LAST, DRAWN = {"last_step_only": True}, {"min_training_frames": 1}


@pytest.mark.parametrize("rollout", [LAST, CAUSAL | LAST, CAUSAL | DRAWN], ids=["bidirectional", "causal", "drawn"])
def test_flops_of_the_updates_are_those_counted(settings, deep_folder, rollout):
    """With adapters so small that they are nothing beside the layers; the embedders and the head are more in the count."""
    run = resolved(
        settings,
        deep_folder,
        rollout=rollout,
        train={"batch_size": 1},
        student={"rank": 1},
        fake_score={"rank": 1},
        data={"resolution": "128x128"},
        validation={"num_frames": 9},
    )
    roles = setup.build_roles(run, torch.device("cpu"))
    uncond, context = torch.randn(2, 1, run.config.data.max_sequence_length, 16).split(1)
    distiller = Distiller(roles, run.config, run.timesteps, run.latent_shape, uncond[0])
    counter, counted = FlopCounterMode(display=False), dict[str, int]()

    @contextmanager
    def count(name: str) -> Iterator[None]:
        before = counter.get_total_flops()
        yield
        counted[name] = counted.get(name, 0) + counter.get_total_flops() - before

    distiller.phases = count
    draws = distiller.draw(1, torch.Generator().manual_seed(4))
    if rollout == CAUSAL | DRAWN:
        assert draws.layout.num_frames == 2 and draws.exit_steps[0] != draws.exit_steps[1]
    said = update_flops(run.config, run.base.transformer, run.teacher.transformer, run.frame_tokens, draws)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for name, update in (("student", distiller.student_backward), ("fake_score", distiller.critic_backward)):
            counted.clear()
            update(context[0], draws)
            for phase, flops in said[name].items():
                assert flops == pytest.approx(counted[phase], rel=0.1), (name, phase)


def test_a_causal_rollout_counts_its_cache_passes(settings, deep_folder):
    rollout = {"causal": True, "num_frame_per_block": 1}
    run = resolved(settings, deep_folder, rollout=rollout, train={"batch_size": 1})
    shape, tokens, text = run.base.transformer, run.frame_tokens, 8
    found = update_flops(run.config, shape, shape, tokens)["fake_score"]["rollout"]
    blocks = [sum(pass_flops(shape, tokens, (i + 1) * tokens, text)) for i in range(3)]
    assert found == pytest.approx(3 * blocks[0] + 3 * blocks[1] + 2 * blocks[2])  # two steps on average, two writes


def test_flops_of_the_warm_up_and_of_validation(settings, deep_folder):
    settings["dmd"] |= {"real_score_guidance_scale": 3.0}
    validation = {"every": 2, "count": 2, "num_frames": 9, "resolution": "32x48"}
    warmup = {"kind": "ode_regression", "steps": 10, "num_samples": 4, "teacher_steps": 6}

    def resolve(**groups) -> setup.Run:
        train = {"batch_size": 3, "max_steps": 5}
        plain = {"rollout": CAUSAL, "train": train, "warmup": warmup, "validation": validation}
        return resolved(settings, deep_folder, **plain | groups)

    run = resolve()
    shape, tokens = run.base.transformer, run.frame_tokens
    blocks = [pass_flops(shape, tokens, (i + 1) * tokens, 8) for i in range(3)]
    forwards = [sum(block) for block in blocks]
    backwards = sum(2 * linear + 3 * attention for linear, attention in blocks)  # and their forwards
    found = stage_flops(run)
    assert (
        found
        == pytest.approx(
            {
                # Guided, at the steps of its grid and at the student's.
                "warm-up videos": 4 * 2 * (6 + 3) * sum(pass_flops(shape, 3 * tokens, 3 * tokens, 8)),
                "warm-up": 10 * 3 * 2 * backwards,  # context and noisy frames
                # After the warm-up and at steps 2, 4 and 5; three steps a block, and one more of each that others read.
                "validation": 4 * 2 * (3 * sum(forwards) + sum(forwards[:2])),
            }
        )
    )
    by_block = stage_flops(resolve(warmup=warmup | {"context_gradient": False}))
    assert by_block["warm-up"] == pytest.approx(10 * 3 * (backwards + sum(forwards[:2])))
    assert stage_flops(resolve(warmup={})).keys() == {"validation"}
    both = stage_flops(resolve(ema={"validate_with": "both"}, validation=validation | {"guidance_scale": 2.0}))
    assert both["validation"] == pytest.approx(4 * found["validation"])
    assert "validation" not in stage_flops(resolve(validation=validation | {"every": 0}))


def run_plan(settings: dict, tmp_path, *args: str):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return CliRunner().invoke(app, ["plan", str(file), *args])


def test_plan_says_what_fits_and_what_would_make_it(settings, deep_folder, tmp_path, monkeypatch):
    settings["model"]["base"] = str(deep_folder)
    settings["train"] |= {"batch_size": 4, "gradient_checkpointing": True}
    settings["validation"] = {"every": 0}
    result = run_plan(settings, tmp_path, "--gpu", "4090")
    assert result.exit_code == 0 and re.search(r"fits in 23.5 GiB +yes", result.output), result.output
    assert (
        "TFLOP" in result.output
        and "h for the run of 4 steps" in result.output
        and re.search(r"\n +rollout \d", result.output)
    )
    # As it is it does not fit, with the first change of what is at the peak it does.
    monkeypatch.setattr(planning, "CONTEXT_GIB", 0.0)
    made = make_plan(setup.resolve(build(settings)))
    monkeypatch.setattr(planning, "GPUS", {"small": (0.9 * made.peak / GIB, 1)})
    result = run_plan(settings, tmp_path, "--gpu", "small")
    fits = "it fits with: --set train.batch_size=1 --set train.gradient_accumulation=4\n"
    assert result.exit_code == 0 and fits in result.output, result.output


def test_plan_says_where_nothing_makes_it_fit(settings, deep_folder, tmp_path, monkeypatch):
    settings["model"]["base"] = str(deep_folder)
    settings["validation"]["every"] = 0
    monkeypatch.setattr(planning, "changes", lambda config: [{"model.precision": "int8"}])
    result = run_plan(settings, tmp_path, "--vram", "1")
    assert result.exit_code == 0  # CUDA alone is 0.8
    monkeypatch.setattr(planning, "CONTEXT_GIB", 1.0)
    result = run_plan(settings, tmp_path, "--vram", "1")
    assert result.exit_code == 1 and "fewer frames or a smaller resolution" in result.output


def test_the_order_of_changes_is_by_what_they_cost():
    config = build({"train": {"gradient_checkpointing": False, "batch_size": 4}, "student": {"kind": "full"}})
    keys = [next(iter(change)) for change in planning.changes(config)]
    assert keys == [
        "validation.tiled_decoding",
        "train.gradient_checkpointing",
        "train.batch_size",
        "train.batched_guidance",
        "ema.keep_on",
        "optimizer.name",
        "optimizer.name",
        "student.kind",
        "model.text_encoder_precision",
    ]
    assert planning.changes(config)[2] == {"train.batch_size": 1, "train.gradient_accumulation": 4}
    config = build({"model": {"teacher": "wan-tiny"}, "rollout": {"causal": True}})
    steps = planning.changes(config)
    assert [key for step in steps for key in step if key.startswith(("model.", "rollout."))] == [
        "rollout.kv_cache",
        "model.offload_blocks",  # which changes no number
        "model.teacher_precision",
        "model.precision",
        "model.teacher_precision",
        "model.precision",
        "model.int8_matmul",
        "model.text_encoder_precision",
    ]
    assert {"model.precision": "int8"} in steps and {"model.teacher_precision": "nf4"} in steps


def test_only_what_can_be_set_is_suggested(settings, deep_folder, tmp_path):
    """Blocks of a teacher in int8-llm are not streamed, and gradient checkpoints are moved where there are any."""
    teacher = {"teacher": str(deep_folder), "teacher_precision": "int8-llm"}
    run = resolved(settings, deep_folder, model=teacher, validation={"every": 0})
    *tried, last = planning.suggestions(run, make_plan(run), 1)
    assert last.startswith("none of these makes it fit")

    def place(what: str) -> int:
        (found,) = [index for index, line in enumerate(tried) if what in line]
        return found

    assert place("model.teacher_precision=nf4") < place("model.offload_blocks=true")
    assert place("train.gradient_checkpointing=true") < place("train.checkpoints_on=host")
    assert smaller(run.config).startswith("the same run can go on with ")


def test_a_graph_that_is_there_from_the_rollout_on_is_checkpointed(settings, deep_folder, monkeypatch):
    monkeypatch.setattr(planning, "CONTEXT_GIB", 0.0)
    plain = {"data": {"resolution": "256x256"}, "validation": {"every": 0}}
    run, small = (
        resolved(settings, deep_folder, **plain, train={"gradient_checkpointing": on}) for on in (False, True)
    )
    made = make_plan(run)
    assert made.worst == "scores"
    told = list(planning.suggestions(run, made, make_plan(small).peak))
    assert told[-1] == "it fits with: --set train.gradient_checkpointing=true"


def test_an_attention_backend_that_runs_in_the_process_does_not_matter(settings, deep_folder):
    """Diffusers keeps the last one; this one takes no fake tensors."""
    run = resolved(settings, deep_folder)
    made = make_plan(run)
    with attention_backend("_native_cudnn"):
        assert make_plan(run) == made


@pytest.mark.parametrize("warmup", ["none", "ode_regression"])
def test_a_checkpoint_takes_the_same_room_on_disk_wherever_its_parts_lie(settings, deep_folder, warmup):
    plans = [
        make_plan(
            resolved(
                settings,
                deep_folder,
                rollout=CAUSAL,
                warmup={"kind": warmup},
                optimizer={"name": f"{paged}adamw8bit"},
                ema={"enabled": True, "keep_on": where},
            )
        )
        for paged, where in (("", "device"), ("paged_", "host"))
    ]
    assert plans[0].checkpoint == plans[1].checkpoint > 0
    assert plans[0].warmup_checkpoint == plans[1].warmup_checkpoint
    assert (plans[0].warmup_checkpoint > 0) == (warmup != "none")


def test_the_disk_line_is_what_checkpoints_take(settings, tmp_path):
    """Of wan-tiny, whose weights are most of its checkpoints."""
    settings["model"]["base"] = "wan-tiny"
    settings["data"]["resolution"] = settings["validation"]["resolution"] = "64x64"
    settings["student"] = {"kind": "full"}
    settings["validation"]["every"] = 0
    planned = make_plan(setup.resolve(build(settings))).checkpoint
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done("fit", tmp_path / "run.yaml")
    folder = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert sum(file.stat().st_size for file in folder.iterdir()) == pytest.approx(planned, rel=0.02)


def test_what_is_at_the_peak_is_what_is_changed(settings, deep_folder, monkeypatch):
    monkeypatch.setattr(planning, "CONTEXT_GIB", 0.0)
    large = {"validation": {"num_frames": 9, "resolution": "256x256"}, "warmup": {"kind": "ode_regression"}}
    run = resolved(settings, deep_folder, rollout=CAUSAL, **large)
    made = make_plan(run)
    assert made.worst == "decoding"
    small = resolved(settings, deep_folder, rollout=CAUSAL, validation={"num_frames": 9}, warmup=large["warmup"])
    told = list(planning.suggestions(run, made, round(1.1 * make_plan(small).peak)))
    assert told[0].startswith("with --set validation.tiled_decoding=true")
    assert told[-1].endswith("--set validation.resolution=32x48") and len(told) == 3
    assert make_plan(small).worst == "warm-up"
    told = list(planning.suggestions(small, make_plan(small), make_plan(small).peak - 1))
    assert told[0].startswith("with --set train.gradient_checkpointing=true")


def test_a_text_encoder_that_is_the_peak_is_made_smaller(settings, tmp_path):
    settings["model"] |= {
        "base": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "text_encoder_precision": "bf16",
        "precision": "bf16",
    }
    settings["data"] |= {"max_sequence_length": 512}
    result = run_plan(settings, tmp_path, "--vram", "10")
    assert "peak" in result.output and "in text encoding" in result.output
    assert result.output.splitlines()[-1] == "it fits with: --set model.text_encoder_precision=int8"
    result = run_plan(settings, tmp_path, "--vram", "3")
    assert result.exit_code == 1 and "none of these makes it fit, in text encoding" in result.output


def test_gradients_of_earlier_micro_batches_are_there(settings, deep_folder):
    groups = {"student": {"kind": "full"}, "train": {"gradient_checkpointing": True, "batch_size": 1}}
    one = make_plan(resolved(settings, deep_folder, **groups))
    groups["train"] |= {"gradient_accumulation": 2}
    more = make_plan(resolved(settings, deep_folder, **groups))
    assert more.phases["rollout"] - one.phases["rollout"] == pytest.approx(one.items["student weights"], rel=0.02)
    assert more.items == one.items


def test_a_teacher_of_its_own_has_blocks_of_its_own_on_the_host(settings, deep_folder, wan_folder):
    """Seven blocks beside a base of two."""
    model = {"offload_blocks": True, "precision": "fp32"}
    groups = {"train": {"gradient_checkpointing": True}}
    alone = make_plan(resolved(settings, wan_folder, model=model, **groups))
    deep = make_plan(resolved(settings, deep_folder, model=model, **groups))
    wide = copy.deepcopy(settings)
    both = make_plan(resolved(wide, wan_folder, model=model | {"teacher": str(deep_folder)}, **groups))
    assert both.host == pytest.approx(alone.host + deep.host, rel=0.05)


def test_host_memory_that_is_too_little_is_told(settings, deep_folder, monkeypatch):
    run = resolved(settings, deep_folder, model={"offload_blocks": True, "precision": "fp32"})
    monkeypatch.setattr(planning, "free_memory", lambda: GIB)
    assert list(planning.memory_lines(run, 80 * GIB))[-1].endswith("of host memory planned, 1.0 free")
    monkeypatch.setattr(planning, "free_memory", lambda: 100 * GIB)
    assert len(list(planning.memory_lines(run, 80 * GIB))) == 1


def test_published_models_are_planned_without_a_download(settings, tmp_path):
    settings["data"] |= {"resolution": "832x480", "max_sequence_length": 512}
    settings["rollout"] = {"num_training_frames": 21}
    settings["validation"]["resolution"] = "832x480"
    settings["model"] = {"base": "Wan-AI/Wan2.1-T2V-14B-Diffusers", "precision": "nf4"}
    settings["train"]["gradient_checkpointing"] = True
    settings["train"]["batch_size"] = 1
    result = run_plan(settings, tmp_path, "--vram", "80")
    assert result.exit_code == 0, result.output
    base = float(re.search(r"base +([\d.]+) GiB", result.output)[1])
    assert 6.8 < base < 8.2  # 14.3e9 weights at half a byte, and what stays in bf16


def test_bad_input_of_plan(settings, tmp_path):
    result = run_plan(settings, tmp_path, "--gpu", "voodoo2")
    assert result.exit_code == 2 and "--gpu: voodoo2: valid are" in result.output + result.stderr


def test_fit_says_what_was_planned(settings, deep_folder, monkeypatch):
    run = resolved(settings, deep_folder)
    (line,) = planning.memory_lines(run, 80 * GIB)
    assert "GiB planned, 80.0 free" in line
    monkeypatch.setattr(planning, "CONTEXT_GIB", 0.0)
    small = round(0.9 * make_plan(run).peak)
    lines = list(planning.memory_lines(run, small))
    assert "not fit" in lines[1] and "GiB" in lines[2] and lines[-1].startswith("it fits with: --set train.")


def test_every_logged_line_has_the_rate_of_model_flops(settings, tmp_path):
    file = tmp_path / "run.yaml"
    settings["validation"] = settings["validation"] | {"every": 0, "num_frames": 9}
    settings |= {
        "rollout": CAUSAL,
        "warmup": {"kind": "ode_regression", "steps": 2, "num_samples": 2, "teacher_steps": 2},
    }
    settings["rollout"] = settings["rollout"] | {"num_training_frames": 3}
    file.write_text(yaml.safe_dump(settings))
    assert CliRunner().invoke(app, ["fit", str(file)]).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["model_tflops_per_second"] > 0
        spans = [line[f"seconds_{phase}"] for phase in ("rollout", "critic")]
        assert 0 < sum(spans) <= line["seconds_fake_score"] + line["seconds_student"]
    assert all(("seconds_replay" in line) == (line["step"] % 2 == 0) for line in lines)
    warming = [json.loads(line) for line in (tmp_path / "run" / "warmup" / "metrics.jsonl").read_text().splitlines()]
    assert len(warming) == 2 and all(line["model_tflops_per_second"] > 0 for line in warming)


@pytest.mark.parametrize(
    ("device", "rate"), [("NVIDIA H200", 989e12), ("NVIDIA GeForce RTX 4090", 165e12), ("Quadro FX", None)]
)
def test_the_rate_of_known_devices(device, rate):
    assert planning.known_rate(device) == rate


# ------------------------------------------------------------------------------------------------------ the records

RECORDS = sorted((Path(__file__).parents[1] / "benchmarks" / "records").glob("*.json"))


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_the_plan_of_every_record_is_within_a_tenth_of_what_was_measured(file, monkeypatch):
    """Of full steps, on GPUs as their allocator counts, on CPUs by the storages that were alive."""
    monkeypatch.syspath_prepend(file.parents[1])
    import dmd_step

    record = json.loads(file.read_text())
    for part in (record[name] for name in ("settings", "compared") if name in record):
        run = setup.resolve(
            dmd_step.settings(record["size"], part["overrides"]), for_training=False, find=dmd_step.random_folder
        )
        planned = make_plan(run).training_peak / GIB - planning.CONTEXT_GIB
        measured = part.get("allocated_peak_gib", part["live_peak_gib"])
        assert planned == pytest.approx(measured, rel=0.1), part["overrides"]
