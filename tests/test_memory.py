"""Options that save memory or time: what they compute is the same, and what they hold is less. Sizes by live storages."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import traceback
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import done, refused, run_cli, tiny_transformer
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmdtrain.config import ConfigError, build
from dmdtrain.data.prompts import EpochSampler
from dmdtrain.models import block, encode, offload, quantize, quantized_cache
from dmdtrain.models.attention import norm_queries_and_keys, pick_attention, works
from dmdtrain.models.decode import decode_latents
from dmdtrain.models.offload import HostTensor, StreamedLinear, pinned_empty, stream_blocks
from dmdtrain.models.quantize import Int8Linear, Int8Tensor, int8_matmul, multiply_in_int8, quantized_linear
from dmdtrain.models.roles import AdapterSpec, Roles, cast_weights
from dmdtrain.models.wan import find_folder, load_transformer, load_vae
from dmdtrain.train import setup
from dmdtrain.train.accounting import LiveBytes, PeakPhases
from dmdtrain.train.batches import Batches
from dmdtrain.train.render import Renderer
from dmdtrain.train.setup import attention_dtype, build_roles, resolve, text_cache
from dmdtrain.train.step import Distiller
from dmdtrain.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SPECS = {name: AdapterSpec(4, 8, ("to_q", "to_k", "to_v", "ffn.net.0.proj")) for name in ("student", "fake_score")}
SHAPE = (4, 3, 8, 12)
LAYERS = 5
CONTEXT, UNCOND = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(5)), torch.zeros(1, 8, 16)
CAUSAL = {"causal": True, "num_frame_per_block": 1}
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def make(
    rollout: dict | None = None,
    train: dict | None = None,
    precision: str = "fp32",
    stream: bool = False,
    int8_matmul: bool = False,
    device: str = "cpu",
    **options,
):
    """A Distiller on a model of five blocks, the same weights whatever the options."""
    base = tiny_transformer(num_layers=LAYERS)
    if precision == "bf16":
        cast_weights(base, torch.bfloat16)
    elif precision != "fp32":
        for name, layer in list(base.blocks.named_modules()):
            if type(layer) is nn.Linear:
                parent, _, child = name.rpartition(".")
                made = quantized_linear(layer.weight.data, layer.bias, precision)
                setattr(base.blocks.get_submodule(parent), child, made)
    base.requires_grad_(False).to(device)
    if stream:
        stream_blocks(base, torch.device(device))
    if int8_matmul:
        multiply_in_int8(base)
    values = {"rollout": {"num_training_frames": 3, **(rollout or {})}, "validation": {"num_frames": 9}}
    config = build(values | {"train": {"mixed_precision": "no", **(train or {})}})
    torch.manual_seed(3)
    options = {"gradient_checkpointing": True} | options
    roles = Roles(base, trained=SPECS, init_lora_weights=False, causal=config.rollout.causal, **options)
    return Distiller(roles, config, [1000.0, 757.0, 522.0], SHAPE, UNCOND.to(device))


def gradients(distiller: Distiller, live: LiveBytes | None = None) -> dict[str, torch.Tensor]:
    """Of one update of each role, from the same draws."""
    context = CONTEXT.to(distiller.device)
    draws = distiller.draw(2, torch.Generator().manual_seed(1)).to(distiller.device)
    found = {}
    for name, backward in (("student", distiller.student_backward), ("fake_score", distiller.critic_backward)):
        if live is None:
            backward(context, draws)
        else:
            with live:
                backward(context, draws)
        own = distiller.roles.named_parameters(name)
        found |= {f"{name} {key}": p.grad.clone() for key, p in own.items()}
        assert all(g.any() for g in found.values())
        for p in own.values():
            p.grad = None
    return found


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    square = sum((a[key] - b[key]).double().square().sum() for key in a)
    return float((square / sum(g.double().square().sum() for g in b.values())).sqrt())


# ------------------------------------------------------------------------------------------------- the same numbers

CASES = {
    "checkpoints on the host": (0.0, {}, {"checkpoints_on_host": True}),
    "causal, checkpoints on the host": (0.0, {"rollout": CAUSAL}, {"checkpoints_on_host": True}),
    "autocast, checkpoints on the host": (0.0, {"train": {"mixed_precision": "bf16"}}, {"checkpoints_on_host": True}),
    "replay without recompute": (1e-6, {"rollout": CAUSAL}, {"checkpoint_replay": False}),
    "cache on the host": (0.0, {"rollout": CAUSAL}, {"rollout": CAUSAL | {"kv_cache": "host"}}),
    "cache in int8": (0.02, {"rollout": CAUSAL}, {"rollout": CAUSAL | {"kv_cache": "int8"}}),
    "one guided pass after the other": (1e-5, {}, {"train": {"batched_guidance": False}}),
    "blocks on the host": (0.0, {}, {"stream": True}),
    "causal, blocks on the host": (0.0, {"rollout": CAUSAL}, {"stream": True}),
    "int8 blocks on the host": (0.0, {"precision": "int8"}, {"stream": True}),
    "nf4 blocks on the host": (0.0, {"precision": "nf4"}, {"stream": True}),
    "all on the host": (
        0.0,
        {"rollout": CAUSAL, "precision": "int8"},
        {"rollout": CAUSAL | {"kv_cache": "host"}, "stream": True, "checkpoints_on_host": True},
    ),
    "autocast, no float32 copies for adapters": (
        0.0,
        {"train": {"mixed_precision": "bf16"}},
        {"train": {"mixed_precision": "bf16"}, "autocast": True},
    ),
    "causal, compiled": (1e-5, {"rollout": CAUSAL}, {"compile_backend": "aot_eager"}),
    "int8, causal, compiled": (1e-5, {"rollout": CAUSAL, "precision": "int8"}, {"compile_backend": "aot_eager"}),
    "int8, compiled, checkpoints on the host": (
        1e-5,
        {"precision": "int8"},
        {"compile_backend": "aot_eager", "checkpoints_on_host": True},
    ),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("case", CASES)
def test_an_option_changes_no_gradient_beyond_its_rounding(case, device):
    close, base, changed = CASES[case]
    wanted, found = gradients(make(**base, device=device)), gradients(make(**base | changed, device=device))
    # CUDA adds up some gradients in any order; under autocast in bf16.
    order = 0.0 if device == "cpu" else 0.02 if "train" in base else 1e-4
    assert apart(found, wanted) <= max(close, order)
    if "int8" in case.split():
        assert apart(found, wanted) > 0 or "cache" not in case  # it does round


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout": CAUSAL, "checkpoints_on_host": True},
        {"rollout": CAUSAL, "checkpoint_replay": False},
        {"precision": "int8", "stream": True},
        {"precision": "nf4", "rollout": CAUSAL},
        {"compile_backend": "aot_eager"},
        {"train": {"mixed_precision": "bf16"}, "autocast": True},
    ],
)
def test_pieces_of_the_sequence_change_no_gradient_beyond_the_order_of_its_sums(options, monkeypatch):
    whole = gradients(make(**options))
    monkeypatch.setattr(block, "PIECE", 20)  # of 24 or 72 tokens a video
    # nf4 computes in bf16, as autocast does.
    close = 0.02 if "train" in options or options.get("precision") == "nf4" else 1e-5
    assert 0 < apart(gradients(make(**options)), whole) < close


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("mixed", ["bf16", "no"])
@pytest.mark.parametrize("layers", ["fp32", "bf16", "int8", "int8, rounded products", "nf4"])
def test_blocks_on_the_host_compute_the_same_bits(layers, mixed, device):
    precision, _, rounded = layers.partition(", ")
    options = {"precision": precision, "int8_matmul": bool(rounded), "device": device, "autocast": mixed == "bf16"}
    made = [make(train={"mixed_precision": mixed}, stream=stream, **options) for stream in (False, True)]
    inputs = [x.to(device) for x in (torch.randn(2, *SHAPE), torch.tensor([300.0, 900.0]), CONTEXT)]
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient), made[0].autocast():
            resident, streamed = (distiller.roles.flow("student", *inputs) for distiller in made)
        assert resident.dtype == streamed.dtype and torch.equal(resident, streamed)
    if device == "cpu":  # CUDA adds up some gradients in any order
        resident, streamed = map(gradients, made)
        assert all(torch.equal(streamed[key], resident[key]) for key in resident)


def test_rounded_products_are_rounded_on_the_host_too():
    flows = []
    for options in ({}, {"int8_matmul": True}, {"int8_matmul": True, "stream": True}):
        with torch.no_grad():
            roles = make(precision="int8", **options).roles
            flows.append(roles.flow("teacher", torch.ones(1, *SHAPE), torch.tensor([300.0]), CONTEXT[:1]))
    assert not torch.equal(flows[0], flows[1]) and torch.equal(flows[1], flows[2])


def test_a_growing_cache_compiles_nothing_again():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    distiller = make(CAUSAL, compile_backend="aot_eager")
    short = build({"rollout": {"num_training_frames": 2, **CAUSAL}, "validation": {"num_frames": 9}})
    counts = []
    for config, shape in ((short, (4, 2, 8, 12)), (distiller.config, SHAPE)):
        own = Distiller(distiller.roles, config, [1000.0, 757.0, 522.0], shape, UNCOND)
        own.config = config.model_copy(update={"train": distiller.config.train})
        counters.clear()
        draws = own.draw(2, torch.Generator().manual_seed(1))
        own.student_backward(CONTEXT, draws)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] > 0 and counts[1] == 0  # in rollout, scores and replay: a longer cache, a longer video


def test_all_blocks_share_their_graphs():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    assert apart(gradients(make(compile_backend="aot_eager")), gradients(make())) < 1e-5
    # Of both parts: teacher without gradient, the other two with and without, and the guided batch's larger size once.
    assert 0 < counters["stats"]["unique_graphs"] <= 2 * 10


# --------------------------------------------------------------------------------------------------- what is held


def held(**options) -> LiveBytes:
    distiller, live = make(**options), LiveBytes()
    gradients(distiller, live)
    return live


def test_checkpoints_on_the_host_leave_the_device():
    plain, moved = held(), held(checkpoints_on_host=True)
    checkpoint = 4 * 2 * 3 * 4 * 6 * 24  # float32 [2 videos, 3 x 4 x 6 tokens, 24]
    assert plain.host_peak == 0 and moved.host_peak == LAYERS * checkpoint
    # All but the one at hand and the one that is brought back beside it.
    assert plain.peak - moved.peak == pytest.approx((LAYERS - 3) * checkpoint, abs=2 * checkpoint)


def test_under_autocast_adapters_keep_no_float32_copies_of_activations():
    saved = []
    for autocast in (False, True):
        distiller, kept = make(train={"mixed_precision": "bf16"}, autocast=autocast, gradient_checkpointing=False), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            distiller._roll_out(distiller._student(CONTEXT), distiller.draw(2, torch.Generator()), for_replay=True)
        saved.append(sum(t.nbytes for t in {id(t.untyped_storage()): t for t in kept}.values()))
    assert saved[1] < 0.97 * saved[0]


def test_a_cache_on_the_host_or_in_int8_is_smaller_on_the_device():
    plain, int8, host = (held(rollout=CAUSAL | {"kv_cache": kind}) for kind in ("device", "int8", "host"))
    stored = 2 * 4 * LAYERS * 2 * 2 * 4 * 6 * 24  # keys and values of two of three frames, float32
    assert host.host_peak == stored and plain.host_peak == int8.host_peak == 0
    x = torch.randn(2, 7, 3, 12)
    kept = Int8Tensor.of(x)
    assert kept.values.nbytes + kept.scale.nbytes == x.numel() + 4 * x.numel() // 12

    def rollout_peak(kind: str) -> int:
        distiller, live = make(CAUSAL | {"kv_cache": kind}), LiveBytes()
        draws = distiller.draw(2, torch.Generator().manual_seed(1))
        with live:
            distiller.phases = PeakPhases(live, phases := {})
            distiller.student_backward(CONTEXT, draws)
        return phases["rollout"]

    assert rollout_peak("host") < rollout_peak("int8") < rollout_peak("device")


def test_streamed_blocks_hold_two_of_five():
    weights = sum(
        layer.weight.nbytes for layer in tiny_transformer().blocks[0].modules() if isinstance(layer, nn.Linear)
    )
    base = tiny_transformer(num_layers=LAYERS).requires_grad_(False)
    live = LiveBytes()
    with live, torch.no_grad():
        stream_blocks(base, torch.device("cpu"))
        assert live.host == LAYERS * weights
        for tensor in (*base.parameters(), *base.buffers(), CONTEXT):
            live.add(tensor)
        start = live.now
        for _ in range(2):
            base(torch.randn(1, *SHAPE), torch.tensor([500.0]), CONTEXT[:1])
        kept = live.now - start
    assert kept == 2 * weights
    assert all(isinstance(m, StreamedLinear) for m in base.blocks.modules() if isinstance(m, nn.Linear))
    assert not any(
        isinstance(m, StreamedLinear) for m in (base.proj_out, base.condition_embedder.text_embedder.linear_1)
    )


def test_replay_without_recompute_runs_fewer_forwards():
    counts = []
    for recompute in (True, False):
        distiller = make(CAUSAL, checkpoint_replay=recompute)
        seen = []
        distiller.roles.roles["student"].module.blocks[0].attn1.register_forward_pre_hook(
            lambda *_, seen=seen: seen.append(1)
        )
        distiller.student_backward(CONTEXT, distiller.draw(2, torch.Generator().manual_seed(1)))
        counts.append(len(seen))
    assert counts[0] - counts[1] == 3  # one recompute a block


def test_a_host_tensor_comes_back_whole_as_often_as_wanted():
    x = torch.randn(3, 5)[:, ::2]
    kept = HostTensor(x)
    kept.prefetch()
    for _ in range(2):
        assert torch.equal(kept.get(), x)
    kept.prefetch()
    kept.forget()
    assert torch.equal(kept.get(), x)


def test_pinned_tensors_share_chunks_that_are_gone_with_them(monkeypatch):
    monkeypatch.setattr(offload, "_chunks", {})
    made = [pinned_empty((3, n), torch.bfloat16, "weights", pin=False) for n in (5, 7, 0, 2**18)]
    other = pinned_empty((3, 5), torch.float32, "cache", pin=False)
    for value, tensor in enumerate((*made, other)):
        tensor.fill_(value)
    for value, tensor in enumerate((*made, other)):
        assert (tensor == value).all() and tensor.data_ptr() % 64 == 0
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*made, other)]
    assert storages[0] == storages[1] == storages[2] and len({storages[0], storages[3], storages[4]}) == 3
    gone = weakref.ref(made[0].untyped_storage())
    del made, tensor
    assert gone() is None


@pytest.mark.parametrize("use", ["int8", "bf16", "cache", "checkpoints"])
def test_pinned_memory_of_a_14b_is_little_more_than_its_tensors(monkeypatch, use):
    """As PyTorch counts it: powers of two."""
    monkeypatch.setattr(offload, "_chunks", {})
    block = [(5120, 5120)] * 8 + [(5120, 13824)] * 2
    shapes, dtype = {
        "int8": (block * 40, torch.int8),
        "bf16": (block * 40, torch.bfloat16),
        "cache": ([(1, 3 * 1560, 40, 128)] * 2 * 6 * 40, torch.bfloat16),
        "checkpoints": ([(1, 32760, 5120)] * 40, torch.bfloat16),
    }[use]
    with FakeTensorMode():
        made = [pinned_empty(shape, dtype, use, pin=False) for shape in shapes]
        chunks = {tensor.untyped_storage() for tensor in made}
    taken, wanted = sum(chunk.nbytes() for chunk in chunks), sum(tensor.nbytes for tensor in made)
    assert all(chunk.nbytes().bit_count() == 1 for chunk in chunks)
    assert taken < 1.07 * wanted + offload.CHUNK


# ------------------------------------------------------------------------------------------------------------- int8


def test_int8_products_are_close_and_for_passes_without_gradient_alone():
    layer = Int8Linear.from_weight(torch.randn(32, 64), None)
    x = torch.randn(3, 20, 64) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)  # every token has its own scale
    with torch.no_grad():
        exact = layer(x)
        layer.multiply_in_int8 = True
        rounded = layer(x)
    for a, b in zip(rounded, exact, strict=True):
        assert 0 < (a - b).norm() / b.norm() < 0.02
    assert torch.equal(rounded, int8_matmul(x, layer.weight, layer.scale))
    assert torch.equal(layer(x), exact)  # with gradients on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantizing_makes_no_copy_in_float32(dtype):
    layer = Int8Linear.from_weight(torch.randn(48, 64), None)
    live = LiveBytes()
    with live:
        dense = quantize.dequantize(layer.weight, layer.scale, dtype)
    assert live.peak == dense.nbytes
    assert dense.dtype == dtype and torch.equal(dense, (layer.weight * layer.scale).to(dtype))


def test_int8_products_reach_a_run(settings, tmp_path):
    settings["model"] |= {"precision": "int8"}
    losses = []
    for value in (False, True):
        settings["model"]["int8_matmul"] = value
        settings["output_dir"] = str(tmp_path / f"run-{value}")
        settings["validation"]["every"] = 0
        losses.append([line["dmd_loss"] for line in fit(settings, tmp_path) if "dmd_loss" in line])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


# ------------------------------------------------------------------------------------------- the quantized cache


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_quantized_base_is_found_again_to_the_bit(wan_folder, tmp_path, monkeypatch, kind):
    folder = find_folder(str(wan_folder), "model.base")
    first = load_transformer(folder, kind, quantized_cache=tmp_path / "kept")
    monkeypatch.setattr(quantize, "quantized_linear", lambda *_: pytest.fail("it was quantized again"))
    again = load_transformer(folder, kind, quantized_cache=tmp_path / "kept")
    a, b = first.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    spec = {"student": AdapterSpec(4, 8, ("to_q",))}
    inputs = torch.randn(1, *SHAPE), torch.tensor([300.0]), CONTEXT[:1]
    outs = []
    for model in (first, again):
        torch.manual_seed(0)
        roles = Roles(model, trained=spec, init_lora_weights=False)
        out = roles.flow("student", *inputs)
        out.square().mean().backward()
        outs.append((out, roles.parameters("student")[0].grad))
    assert all(torch.equal(x, y) for x, y in zip(*outs, strict=True))


def stored_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_what_killed_processes_left_of_a_quantized_base_is_removed(settings, tmp_path):
    folder = find_folder(settings["model"]["base"], "model.base")
    load = partial(load_transformer, folder, "int8", quantized_cache=tmp_path / "kept")
    load()
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [
        file.with_name(f".{name}.{pid}.partial")
        for name in (file.name, f".{file.name}.1.partial")
        for pid in (gone.pid, os.getppid())
    ]
    for each in left:
        each.write_bytes(b"half")
    file.unlink()
    load()
    assert file.exists() and [each.exists() for each in left] == [False, True] * 2


def test_an_outdated_quantized_base_is_made_again(wan_folder, tmp_path):
    folder = find_folder(str(wan_folder), "model.base")
    load_transformer(folder, "int8", quantized_cache=tmp_path)
    weights = Path(folder.path / "transformer" / "diffusion_pytorch_model.safetensors")
    weights.touch()
    load_transformer(folder, "int8", quantized_cache=tmp_path)
    assert len(stored_in(tmp_path)) == 2
    load_transformer(folder, "nf4", quantized_cache=tmp_path)
    assert len(stored_in(tmp_path)) == 3


def halved(file: Path) -> None:
    """The second half, which is weights alone, is zeros."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "is damaged (its checksum differs)"),
        (halved, "is damaged (its checksum differs)"),
        (flipped, "is damaged (its checksum differs)"),
        (lambda file: file.with_suffix(".json").unlink(), "has no checksum"),
        (lambda file: file.with_suffix(".json").write_text("[]"), "has a broken checksum"),
        (lambda file: file.with_suffix(".json").write_text(""), "has a broken checksum"),
    ],
)
def test_a_damaged_quantized_base_is_told_and_made_again(wan_folder, tmp_path, damage, says):
    folder = find_folder(str(wan_folder), "model.base")
    told: list[str] = []
    load = partial(load_transformer, folder, "int8", quantized_cache=tmp_path, tell=told.append)
    wanted = load().state_dict()
    (file,) = stored_in(tmp_path)
    whole = file.read_bytes()
    damage(file)
    found = load().state_dict()
    assert told == [f"model.quantized_cache: {file} {says}; it is made again"]
    assert all(torch.equal(found[key], wanted[key]) for key in wanted) and file.read_bytes() == whole
    load()
    assert len(told) == 1 and {f.name for f in tmp_path.iterdir()} == {file.name, file.with_suffix(".json").name}


def test_a_quantized_base_that_is_being_written_is_not_there_yet(wan_folder, tmp_path, monkeypatch):
    folder = find_folder(str(wan_folder), "model.base")
    told: list[str] = []
    load = partial(load_transformer, folder, "int8", quantized_cache=tmp_path, tell=told.append)
    hashed = quantized_cache.sha256

    def meanwhile(file: Path) -> str:
        monkeypatch.setattr(quantized_cache, "sha256", hashed)
        with monkeypatch.context() as another:
            another.setattr(os, "getpid", lambda: 1)
            load()
        return hashed(file)

    monkeypatch.setattr(quantized_cache, "sha256", meanwhile)
    load()
    load()
    assert not told and len(stored_in(tmp_path)) == 1


def test_a_quantized_base_that_can_not_be_read_stays(wan_folder, tmp_path, monkeypatch):
    folder = find_folder(str(wan_folder), "model.base")
    told: list[str] = []
    load = partial(load_transformer, folder, "int8", quantized_cache=tmp_path, tell=told.append)
    load()
    (file,) = stored_in(tmp_path)
    written = file.stat().st_mtime_ns

    def fails(_: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(quantized_cache, "sha256", fails)
    load()
    assert told == [f"model.quantized_cache: {file} can not be read (Input/output error); the run goes on without it"]
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("limit", [1000, 40], ids=["the tensors", "their checksum"])
def test_a_full_disk_stops_no_run_and_blames_no_model(settings, tmp_path, limit):
    """The one file does not fit, or it does and the one after it does not."""
    settings["model"] |= {"precision": "int8", "quantized_cache": str(tmp_path / "kept")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    script = """if True:
        import resource, sys, torch
        from pathlib import Path
        from dmdtrain import config
        from dmdtrain.models import quantized_cache
        from dmdtrain.train import setup

        file, limit = Path(sys.argv[1]), int(sys.argv[2])
        save, hard = quantized_cache.save_tensors, resource.RLIM_INFINITY

        def saves(*args):
            if limit == 1000:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            save(*args)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

        quantized_cache.save_tensors = saves
        roles = setup.build_roles(setup.resolve(config.load(file, [])), torch.device("cpu"))
        print(len(roles.parameters("student")) > 0)
    """
    command = [sys.executable, "-B", "-c", script, str(file), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    line, trained = result.stdout.splitlines()
    assert line.startswith(f"model.quantized_cache: {tmp_path / 'kept'}/int8-"), line
    assert line.endswith(" can not be written (File too large); the run goes on without it") and trained == "True"
    assert not list((tmp_path / "kept").iterdir())


def test_a_disk_with_too_little_room_is_not_filled(wan_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(quantized_cache, "save_tensors", lambda *_: pytest.fail("a write was begun"))
    told: list[str] = []
    folder = find_folder(str(wan_folder), "model.base")
    load_transformer(folder, "nf4", quantized_cache=tmp_path, tell=told.append)
    (line,) = told
    assert "can not be written (no space left on device: it needs 0.000 GB" in line


@pytest.mark.parametrize("command", [("fit",), ("fit", "--dry-run"), ("synthesize", "--out", "made"), ("prepare",)])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_place_of_the_cache_is_refused(settings, tmp_path, monkeypatch, command, below):
    taken = tmp_path / "file"
    taken.write_text("mine")
    for module in (setup, encode):
        monkeypatch.setattr(module, "load_transformer", lambda *_: pytest.fail("a model was loaded"), raising=False)
    cache = taken / below
    settings["model"] |= {"precision": "int8", "quantized_cache": str(cache)}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    says = f"model.quantized_cache: {cache}: {taken} is not a folder" if below else f"{cache} is not a folder"
    refused(command[0], file, *command[1:], says=[says, "model.quantized_cache: "])
    assert taken.read_text() == "mine" and not (tmp_path / "run").exists() and not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------------------------------- attention


def test_auto_picks_what_runs():
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        assert pick_attention("auto", cpu, 12, dtype) == "native"
        assert pick_attention("_native_math", cpu, 12, dtype) == "_native_math"
        assert works("native", cpu, 12, dtype) and not works("flash", cpu, 12, dtype)


@pytest.mark.parametrize(("backend", "says"), [("flex", "does not support backward on CPU"), ("flash", "flash-attn")])
@pytest.mark.parametrize("args", [(), ("--dry-run",)])
def test_a_backend_that_can_not_train_here_is_refused(settings, tmp_path, backend, says, args):
    settings["model"]["attention"] = backend
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    refused("fit", file, *args, says=[f"model.attention: {backend} can not train on cpu in float32", says])
    with pytest.raises(ConfigError, match=says):
        build_roles(resolve(build(settings)), torch.device("cpu"))


def test_the_processs_default_backend_changes_nothing(wan_folder):
    from diffusers import attention_backend

    folder = find_folder(str(wan_folder), "model.base")
    with attention_backend("flex"):  # as DIFFUSERS_ATTN_BACKEND sets it; it has no backward on a CPU
        model = load_transformer(folder, "fp32")
        with attention_backend("flex"):
            model(torch.randn(1, *SHAPE).requires_grad_(), torch.tensor([300.0]), CONTEXT[:1])[0].sum().backward()
    assert {block.attn1.processor._attention_backend for block in model.blocks} == {"native"}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model": {"precision": "fp32"}}, torch.float32),
        ({"model": {"precision": "bf16"}}, torch.bfloat16),
        ({"model": {"precision": "nf4"}}, torch.bfloat16),
        ({"model": {"precision": "bf16", "teacher": "t", "teacher_precision": "fp32"}}, torch.float32),
        ({"model": {"precision": "bf16"}, "student": {"kind": "full"}}, torch.float32),
        ({"model": {"precision": "bf16"}, "fake_score": {"kind": "full"}, "optimizer": {"name": "adamw_bf16"}}, None),
    ],
)
def test_auto_chooses_for_the_widest_type_that_a_role_attends_in(changes, wanted):
    for mixed in ("no", "bf16"):
        found = attention_dtype(build({"train": {"mixed_precision": mixed}} | changes))
        assert found == (wanted if mixed == "no" and wanted is not None else torch.bfloat16)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_roles_attend_in_the_type_that_is_told(settings, monkeypatch, weights, mixed):
    """Of a bf16 base with LoRA, and a teacher of its own."""
    from diffusers.models.transformers import transformer_wan

    teacher = {"teacher": settings["model"]["base"], "teacher_precision": weights}
    settings["model"] |= {"precision": "bf16"} | teacher
    settings["train"]["mixed_precision"] = mixed
    config = build(settings)
    roles = build_roles(resolve(config), torch.device("cpu"))
    seen, work = set(), transformer_wan.dispatch_attention_fn
    monkeypatch.setattr(
        transformer_wan,
        "dispatch_attention_fn",
        lambda q, k, v, **rest: seen.update({q.dtype, v.dtype}) or work(q, k, v, **rest),
    )
    for name in ("teacher", "student", "fake_score"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed == "bf16"):
            roles.flow(name, torch.randn(1, *SHAPE), torch.tensor([300.0]), CONTEXT[:1])
    assert max(seen, key=lambda dtype: dtype.itemsize) == attention_dtype(config)


def test_sage_attention_is_valid_nowhere(settings):
    """It has no backward on any machine."""
    settings["model"]["attention"] = "sage"
    with pytest.raises(ConfigError, match=r"model.attention: sage: valid are auto, (?!.*sage)"):
        resolve(build(settings))


def test_norms_of_queries_and_keys_keep_their_inputs_type():
    model = tiny_transformer()
    names, old = dict(model.named_parameters()).keys(), model.blocks[0].attn1.norm_q
    norm_queries_and_keys(model)
    norm = model.blocks[0].attn1.norm_q
    assert dict(model.named_parameters()).keys() == names and norm.weight is old.weight
    x = torch.randn(2, 5, len(old.weight))
    assert torch.equal(norm(x), old(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x.bfloat16())
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), old(x), rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------------------------------------- the codec


def test_a_codec_is_gone_after_its_use_though_it_still_has_a_name(settings):
    run, cpu = resolve(build(settings)), torch.device("cpu")
    with Renderer(run, build_roles(run, cpu, trained=()), text_cache(run, cpu)).codec() as vae:
        assert not any(p.is_meta for p in vae.parameters())
    assert all(p.is_meta for p in vae.parameters())


def test_tiles_are_the_codecs_own_and_close_to_the_whole(wan_folder):
    vae = load_vae(find_folder(str(wan_folder), "model.base"))
    vae.tile_sample_min_height = vae.tile_sample_min_width = 64
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 48
    latents = torch.randn(2, 4, 2, 10, 12)
    whole, tiled = decode_latents(vae, latents), decode_latents(vae, latents, tiled=True)
    assert whole.shape == tiled.shape and not torch.equal(whole, tiled)
    assert (whole - tiled).square().mean() < 0.1 * whole.var()


@pytest.mark.parametrize(("chosen", "tiled"), [(None, False), (True, True)])
def test_tiles_where_they_are_wanted(settings, tmp_path, monkeypatch, chosen, tiled):
    from diffusers import AutoencoderKLWan

    calls, work = [], AutoencoderKLWan.tiled_decode
    monkeypatch.setattr(AutoencoderKLWan, "tiled_decode", lambda *a, **k: calls.append(1) or work(*a, **k))
    settings["validation"]["tiled_decoding"] = chosen
    fit(settings, tmp_path)
    ckpt = tmp_path / "run" / "checkpoints" / "step-000004"
    done("generate", "--ckpt", ckpt, "a dog", "--out", tmp_path / "dog.mp4")
    assert len(calls) == (3 if tiled else 0)  # two of validation, and the one that was generated


def test_large_frames_are_decoded_in_tiles_by_themselves(settings):
    from dmdtrain.train.render import decode_tiled

    run = resolve(build(settings))
    assert not decode_tiled(run, (4, 3, 60, 104)) and decode_tiled(run, (4, 3, 88, 160))


# ------------------------------------------------------------------------------------------------ waits in a step


class Waits(TorchDispatchMode):
    """Lines of the package at which the host reads a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            source = Path(quantize.__file__).parents[1]
            own = [frame for frame in traceback.extract_stack() if source in Path(frame.filename).parents]
            self.lines.append(f"{Path(own[-1].filename).name}: {own[-1].name}")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_once_an_update(settings):
    settings["dmd"]["generator_update_interval"] = 1
    settings["train"] |= {"batch_size": 1, "gradient_accumulation": 2}
    trainer = Trainer(resolve(build(settings)), Console(quiet=True))
    trainer.train_step()
    with Waits() as waits:
        trainer.train_step()
    # Embeddings of the prompts are read from disk, on the host.
    assert [line for line in waits.lines if not line.startswith("shards.py")] == ["loop.py: guarded_step"] * 2


# --------------------------------------------------------------------------------------------------- whole runs


def fit(settings: dict, folder, *args: str) -> list[dict]:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    result = run_cli("fit", file, *args)
    assert result.exit_code == 0, (result.output, result.exception)
    lines = (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "critic_loss" in line]


def test_a_run_with_everything_on_the_host_is_the_same_run(settings, tmp_path):
    settings["validation"]["every"] = 0
    settings["rollout"] |= CAUSAL
    settings["validation"]["num_frames"] = 9
    settings["train"]["gradient_checkpointing"] = True
    wanted = fit(settings, tmp_path)
    settings["model"]["offload_blocks"] = True
    settings["train"]["checkpoints_on"] = settings["ema"]["keep_on"] = settings["rollout"]["kv_cache"] = "host"
    settings["output_dir"] = str(tmp_path / "host")
    fit(settings, tmp_path, "--max-steps", "2")
    found = fit(settings, tmp_path)
    for a, b in zip(found, wanted, strict=True):
        for key in ("critic_loss", "fake_score_grad_norm", "dmd_loss", "student_grad_norm"):
            assert a.get(key) == b.get(key), key


def test_what_only_moves_memory_may_change_when_a_run_goes_on(settings, tmp_path):
    settings["validation"]["every"] = 0
    wanted = fit(settings, tmp_path)
    settings["output_dir"] = str(tmp_path / "other")
    fit(settings, tmp_path, "--max-steps", "2")
    found = fit(
        settings,
        tmp_path,
        *("--set", "model.offload_blocks=true", "--set", "train.gradient_checkpointing=true"),
        *("--set", "train.checkpoints_on=host"),
    )
    assert [line["critic_loss"] for line in found] == [line["critic_loss"] for line in wanted]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"gradient_checkpointing": False, "checkpoints_on": "host"}}, "train.checkpoints_on: host needs"),
        ({"train": {"checkpoint_replay": False}}, "train.checkpoint_replay: false is for causal students"),
        ({"rollout": {"kv_cache": "int8"}}, "rollout.kv_cache: int8 needs causal: true"),
        ({"model": {"offload_blocks": True}, "student": {"kind": "full"}}, "needs student.kind: lora"),
        ({"model": {"offload_blocks": True, "precision": "int8-llm"}}, "does not go with int8-llm"),
        ({"model": {"int8_matmul": True, "precision": "nf4"}}, "model.int8_matmul: true needs model.precision int8"),
        ({"model": {"quantized_cache": "kept"}}, "nothing is quantized at model.precision fp32"),
    ],
)
def test_what_does_not_go_together(settings, tmp_path, changes, says):
    for group, values in changes.items():
        settings[group] |= values
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    refused("fit", file, says=says)


# ------------------------------------------------------------------------------------------------ a shared rollout


def test_a_reused_rollout_is_the_students_own(settings, tmp_path, monkeypatch):
    """At steps of both updates the fake score sees the student's videos, with noise and timesteps of its own."""
    seen: list[tuple[str, torch.Tensor | None, torch.Tensor]] = []
    student, critic = Distiller.student_backward, Distiller.critic_backward

    def watch_student(self, context, draws, weight=1.0):
        stats, x0 = student(self, context, draws, weight)
        seen.append(("student", x0, draws.score_noise))
        return stats, x0

    def watch_critic(self, context, draws, weight=1.0, x0=None):
        seen.append(("critic", x0, draws.score_noise))
        return critic(self, context, draws, weight, x0)

    monkeypatch.setattr(Distiller, "student_backward", watch_student)
    monkeypatch.setattr(Distiller, "critic_backward", watch_critic)
    settings["fake_score"]["reuse_rollout"] = True
    settings["validation"]["every"] = 0
    settings["train"] |= {"batch_size": 1, "gradient_accumulation": 2}
    lines = fit(settings, tmp_path)
    assert [name for name, *_ in seen] == ["critic"] * 2 + ["student"] * 2 + ["critic"] * 4 + ["student"] * 2 + [
        "critic"
    ] * 2
    alone, shared = seen[:2], seen[2:6]
    assert all(x0 is None for _, x0, _ in alone)
    for (_, made, noise), (_, given, other) in zip(shared[:2], shared[2:], strict=True):
        assert torch.equal(made, given) and not torch.equal(noise, other)
    assert "seconds_rollout" in lines[0] and lines[1]["dmd_loss"] is not None


def test_a_run_that_reuses_rollouts_resumes_exactly(settings, tmp_path):
    settings["fake_score"]["reuse_rollout"] = True
    settings["validation"]["every"] = 0
    wanted = fit(settings, tmp_path)
    settings["output_dir"] = str(tmp_path / "parts")
    fit(settings, tmp_path, "--max-steps", "3")
    found = fit(settings, tmp_path)
    assert [line["critic_loss"] for line in found] == [line["critic_loss"] for line in wanted]
    settings["output_dir"], settings["fake_score"]["reuse_rollout"] = str(tmp_path / "own"), False
    own = fit(settings, tmp_path)
    assert own[0]["critic_loss"] == wanted[0]["critic_loss"] and own[1]["critic_loss"] != wanted[1]["critic_loss"]


def test_batches_are_the_same_however_far_ahead_they_are_drawn(settings):
    trainer = Trainer(resolve(build(settings)), Console())
    new = partial(Batches, 2, text=trainer.text, distiller=trainer.distiller, seed=9)
    lazy, eager = (new(sampler=EpochSampler(trainer.run.prompts, 4)) for _ in range(2))
    states, batches = [], []
    for _ in range(3):
        states.append(lazy.state_dict())
        batches.append(lazy.take())
        eager.prefetch()
        eager.prefetch()
        assert all(torch.equal(value, states[-1][key]) for key, value in eager.state_dict().items())
        ahead = eager.take()
        assert torch.equal(ahead.draws.noise, batches[-1].draws.noise)
        assert torch.equal(ahead.context, batches[-1].context)
    eager.prefetch()
    eager.generator.set_state(states[1]["draws"])
    eager.sampler.load_state_dict({k.removeprefix("prompts."): v for k, v in states[1].items() if k != "draws"})
    eager.forget()
    assert torch.equal(eager.take().draws.noise, batches[1].draws.noise)
