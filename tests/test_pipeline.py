"""`export-pipeline`: folders that make the trainer's videos in a process that has no dmdtrain.

One such process samples all of them, since its imports take longer than its videos.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from conftest import done, refused
from safetensors.torch import load_file

from dmdtrain import config as configuration
from dmdtrain.config import build, latent_frames
from dmdtrain.export import merge, pipeline_source, stock_scheduler
from dmdtrain.models.wan import find_folder, load_transformer
from dmdtrain.train import setup
from dmdtrain.train.checkpoint import write_checkpoint
from dmdtrain.train.render import Renderer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, SEED = ["a blue  cat sleeps", "a red dog runs on grass"], 11
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NO_STOCK = [900, 600, 123, 100]

CASES = {  # what the student is -> changes of the configuration, video frames to make: more than in training
    "stock": ({}, 9),
    "no stock scheduler": ({"dmd.denoising_steps": NO_STOCK}, 9),
    "whole, bidirectional": ({"student.kind": "full"}, 9),
    "blocks": ({"rollout.causal": True}, 29),
    "first frame": (
        {"rollout.causal": True, "rollout.independent_first_frame": True, "rollout.num_training_frames": 5},
        25,
    ),
    "window": ({"rollout.causal": True, "rollout.local_attention_frames": 4, "rollout.sink_frames": 1}, 45),
    "noised context": ({"rollout.causal": True, "rollout.context_noise": 150}, 29),
    "whole, causal": ({"rollout.causal": True, "student.kind": "full", "dmd.denoising_steps": NO_STOCK}, 13),
    "wan-tiny": ({"rollout.causal": True, "model.base": "wan-tiny", "rollout.context_noise": 30}, 13),
}
STOCK = ("stock", "whole, bidirectional")
CAUSAL = [name for name, (changes, _) in CASES.items() if "rollout.causal" in changes]


def values_of(wan_folder: Path, folder: Path, changes: dict) -> dict:
    values = {
        "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
        "student": {"rank": 4, "alpha": 8},
        "rollout": {"num_training_frames": 4, "num_frame_per_block": 2},
        "data": {"prompts": "wan-tiny", "resolution": "32x32", "max_sequence_length": 8},
        "train": {"mixed_precision": "no", "gradient_checkpointing": False},
        "validation": {"every": 0, "resolution": "48x32", "prompts": ["a cat"], "num_frames": 13},
        "log": {"tensorboard": False},
        "output_dir": str(folder),
    }
    for key, value in changes.items():
        group, name = key.split(".")
        values[group] = values.get(group, {}) | {name: value}
    if values["rollout"].get("independent_first_frame"):
        values["validation"]["num_frames"] = 17
    return values


@torch.no_grad()
def write_student(values: dict) -> Path:
    """A checkpoint of a student far from its base, without training: random B, or whole weights moved at random."""
    config = build(values)
    run = setup.resolve(config, for_training=False)
    student = setup.build_roles(run, torch.device("cpu"), trained=("student",)).named_parameters("student")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, value in student.items():
        scale = 0.2 if ".lora_B." in name else 0.05
        moved = value + scale * torch.randn(value.shape, generator=generator)
        tensors[name] = value if ".lora_A." in name else moved
    texts = {"config.yaml": configuration.dump(config), "sampling.json": setup.sampling_json(run)}
    root = run.output_dir / "checkpoints"
    return write_checkpoint(root, 1, {"student": tensors}, texts | {"state.json": '{"stage": "dmd", "step": 1}'}, 1)


@dataclass
class Exported:
    ckpt: Path
    folder: Path
    num_frames: int
    said: str


@pytest.fixture(scope="module")
def exported(wan_folder, tmp_path_factory) -> dict[str, Exported]:
    """A folder of every case."""
    root = tmp_path_factory.mktemp("exported")
    found = {}
    for name, (changes, num_frames) in CASES.items():
        key = re.sub(r"\W+", "-", name)
        ckpt = write_student(values_of(wan_folder, root / "runs" / key, changes))
        folder = root / "pipelines" / key
        found[name] = Exported(ckpt, folder, num_frames, done("export-pipeline", "--ckpt", ckpt, "--out", folder))
    return found


def renderer_of(ckpt: Path) -> Renderer:
    run, cpu = setup.load_run(ckpt), torch.device("cpu")
    text = setup.text_cache(run, cpu)
    text.cache = ckpt.parents[3] / "text"  # one for all runs: its files are named by model and prompt
    return Renderer(run, setup.load_student(run, ckpt, "raw", cpu), text)


def shape_of(renderer: Renderer, num_frames: int) -> tuple[int, int, int, int]:
    channels, _, height, width = renderer.run.validation_latent_shape
    return channels, latent_frames(num_frames), height, width


# ---------------------------------------------------------------------------------------------------- no dmdtrain


SCRIPT = r"""
import sys
sys.modules["dmdtrain"] = None  # importing it fails
import gc, json, os, re, warnings
from pathlib import Path
import diffusers, torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.wan import pipeline_wan  # so that below only the written file's own warnings are errors

cases, prompts, seed, out = json.loads(sys.argv[1])
results = {}

def error_of(call, kind):
    try:
        call()
    except kind as error:
        return str(error)
    return None

def generators(first, count):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]

for name, case in cases.items():
    folder, frames, stock = case["folder"], case["frames"], case["stock"]
    trust = {} if stock else {"trust_remote_code": True}
    pipe = DiffusionPipeline.from_pretrained(folder, **trust)
    pipe.set_progress_bar_config(disable=True)
    found = results[name] = {"class": type(pipe).__name__, "module": type(pipe).__module__}
    size = dict(height=32, width=48, num_frames=frames)
    if stock:
        torch.manual_seed(seed)  # the pipeline hands no generator to its scheduler
        options = dict(num_inference_steps=3, guidance_scale=1.0, max_sequence_length=8, output_type="pt")
        found["one"] = pipe(prompts[0], **size, **options).frames
        continue
    blocks = []
    (one,) = generators(seed, 1)
    found["one"] = pipe(prompts[0], **size, generator=one, output_type="pt", on_block=blocks.append).frames
    found["blocks"] = [block.clone() for block in blocks]
    two = generators(seed, 2)
    found["two"] = pipe(prompts, **size, generator=two, output_type="latent", return_dict=False)[0]
    if name != "blocks":
        continue
    gc.collect()
    found["caches"] = sum(type(thing).__name__ == "KVCache" for thing in gc.get_objects())
    # Its own size, and everything else that a call can be.
    found["default"] = pipe(prompts[0], generator=generators(seed, 1), num_inference_steps=3).frames
    assert pipe(prompts[0], output_type="pil", num_frames=5).frames[0][0].size == (48, 32)
    found["free"] = [pipe(prompts[0], output_type="latent", num_frames=5).frames for _ in range(2)]
    found["config"] = {key: pipe.config[key] for key in ("timesteps", "num_frame_per_block", "height", "width", "num_frames")}
    logger = diffusers.utils.logging.get_logger(type(pipe).__module__)
    logger.addFilter(told := found.setdefault("told", []).append)
    pipe([prompts[0], "a cat " * 20], generator=generators(seed, 2), output_type="latent", num_frames=5)
    logger.removeFilter(told)
    found["told"] = [record.getMessage() for record in found["told"]]
    found["errors"] = {
        "steps": error_of(lambda: pipe(prompts[0], num_inference_steps=4), ValueError),
        "guidance": error_of(lambda: pipe(prompts[0], guidance_scale=3.0), ValueError),
        "generators": error_of(lambda: pipe(prompts, generator=generators(seed, 1)[0]), ValueError),
        "generators of one": error_of(lambda: pipe(prompts[0], generator=generators(seed, 2)), ValueError),
        "size": error_of(lambda: pipe(prompts[0], height=33), ValueError),
        "frames": error_of(lambda: pipe(prompts[0], num_frames=9), ValueError),
        "trust": error_of(lambda: DiffusionPipeline.from_pretrained(folder), ValueError),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sys.path.insert(0, folder)
        import few_step_pipeline
    assert few_step_pipeline.FewStepWanPipeline.__mro__[1] is diffusers.WanPipeline

# Word for word, but for the device and for the file, which wants OpenCV.
for name in ("stock", "blocks"):
    folder = Path(cases[name]["folder"])
    os.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert '.to("cuda")' in code and "export_to_video(video" in code
    code = re.sub(r"export_to_video\(.*", "", code.replace('.to("cuda")', ""))
    shared = {}
    try:
        exec(code, shared)
        results[name]["readme"] = str((shared["pipe"].transformer.dtype, shared["video"].shape))
        assert (shared["video"] == shared["video"]).all()
    except Exception as error:
        results[name]["readme"] = repr(error)
torch.save(results, out)
"""


@pytest.fixture(scope="module")
def sampled(exported, tmp_path_factory) -> dict[str, dict]:
    """What SCRIPT found, by case: dmdtrain can not be imported there, and the hub is out of reach."""
    home = tmp_path_factory.mktemp("home")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environment |= {"HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    cases = {
        name: {"folder": str(case.folder), "frames": case.num_frames, "stock": name in STOCK}
        for name, case in exported.items()
    }
    command = [sys.executable, "-B", "-c", SCRIPT, json.dumps([cases, PROMPTS, SEED, str(home / "results.pt")])]
    result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(home / "results.pt", weights_only=False)


def assert_same_pixels(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """theirs: [N, T, 3, H, W] in [0, 1]; ours: [N, 3, T, H, W] in [-1, 1]."""
    torch.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1).transpose(1, 2), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_makes_the_trainers_videos(exported, sampled, name):
    case, found = exported[name], sampled[name]
    stock = name in STOCK
    kind = "WanPipeline" if stock else "FewStepWanPipeline"
    assert found["class"] == kind and f"gives a {kind}" in case.said
    assert ("trust_remote_code=True" in case.said) != stock
    assert ("diffusers_modules" in found["module"]) != stock
    renderer = renderer_of(case.ckpt)
    shape, steps = shape_of(renderer, case.num_frames), renderer.run.timesteps
    ours = renderer.student_videos(PROMPTS[:1], SEED, shape, steps)
    assert ours.shape == (1, 3, case.num_frames, 32, 48)
    assert_same_pixels(found["one"], ours)
    latents = renderer.student(PROMPTS, SEED, shape, steps)
    if not stock:
        torch.testing.assert_close(found["two"], latents, atol=5e-5, rtol=1e-4)
    # What was trained matters, and the prompt and its seed, so equal means something.
    assert (latents[0] - latents[1]).abs().mean() > 0.1
    with torch.no_grad():
        for parameter in renderer.roles.parameters("student"):
            parameter.zero_()
    assert (renderer.student(PROMPTS[:1], SEED, shape, steps) - latents[:1]).abs().mean() > 0.05


@pytest.mark.parametrize("name", CAUSAL)
def test_blocks_are_handed_over_as_they_are_decoded(exported, sampled, name):
    first = "first frame" in name
    latents = latent_frames(exported[name].num_frames)
    sizes = ([1] if first else []) + [2] * ((latents - first) // 2)
    blocks = sampled[name]["blocks"]
    assert len(blocks) > 1
    assert [block.shape[2] for block in blocks] == [4 * size - 3 * (i == 0) for i, size in enumerate(sizes)]
    assert_same_pixels(sampled[name]["one"], torch.cat(blocks, 2))


def test_a_call_without_a_size_is_the_validations(exported, sampled):
    found = sampled["blocks"]
    assert found["config"] == {
        "timesteps": [1000.0, 757.0, 522.0],
        "num_frame_per_block": 2,
        "height": 32,
        "width": 48,
        "num_frames": 13,
    }
    video = torch.from_numpy(found["default"]).permute(0, 1, 4, 2, 3)
    assert video.shape == (1, 13, 3, 32, 48)
    torch.testing.assert_close(video, found["one"][:, :13], atol=5e-5, rtol=0)  # a longer video begins as a shorter one


def test_without_generators_every_call_is_another(sampled):
    one, other = sampled["blocks"]["free"]
    assert one.shape == other.shape and not torch.equal(one, other)


def test_a_finished_call_holds_no_cache(sampled):
    """Gigabytes of keys and values, in a large model."""
    assert sampled["blocks"]["caches"] == 0


def test_a_call_says_which_prompt_it_cuts(sampled):
    assert sampled["blocks"]["told"] == [f"{'a cat ' * 10!r} ...: 41 tokens, the first 8 are read"]


def test_calls_that_the_student_can_not_answer(sampled):
    errors = sampled["blocks"]["errors"]
    assert errors["steps"] == errors["guidance"] == "this student runs in 3 steps with guidance_scale 1"
    assert errors["generators"] == "2 prompts need as many generators, not 1"
    assert errors["generators of one"] == "1 prompts need as many generators, not 2"
    assert "divisible by 16" in errors["size"]
    assert errors["frames"] == "3 latent frames do not divide into blocks of 2"
    assert "trust_remote_code=True" in errors["trust"]


@pytest.mark.parametrize("name", ["stock", "blocks"])
def test_the_readmes_call_works(sampled, name):
    """In bf16, as it says."""
    assert sampled[name]["readme"] == "(torch.bfloat16, (13, 32, 48, 3))"


# ---------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("name", ["stock", "blocks", "whole, causal"])
def test_the_folder_holds_all_that_a_call_needs(exported, wan_folder, name):
    folder = exported[name].folder
    assert not list(folder.parent.glob(".*.partial"))
    assert not any(f.is_symlink() for f in folder.rglob("*"))
    parts = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    rest = {"model_index.json", "sampling.json", "README.md"}
    source = set() if name in STOCK else {"few_step_pipeline.py"}
    assert {f.name for f in folder.iterdir()} == parts | rest | source
    for part in ("vae", "text_encoder"):
        (ours,), (theirs,) = ((root / part).glob("*.safetensors") for root in (folder, wan_folder))
        assert ours.read_bytes() == theirs.read_bytes()
    said = json.loads((folder / "sampling.json").read_text())
    assert said["timesteps"] == ([1000, 757, 522] if name != "whole, causal" else NO_STOCK)
    assert (said["height"], said["width"], said["num_frames"]) == (32, 48, 13)
    readme = (folder / "README.md").read_text()
    assert ", ".join(f"{t:g}" for t in said["timesteps"]) in readme
    assert ("num_inference_steps=3, guidance_scale=1.0" in readme) == (name in STOCK)
    assert ("trust_remote_code=True" in readme) != (name in STOCK)
    assert ("with any other number the scheduler walks timesteps that were never trained" in readme) == (name in STOCK)


def test_the_written_source_needs_no_dmdtrain(exported):
    source = (exported["blocks"].folder / "few_step_pipeline.py").read_text()
    assert source == pipeline_source()
    compile(source, "few_step_pipeline.py", "exec")
    defined = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("dmdtrain") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not (node.module or "").startswith("dmdtrain")
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0:
            assert node.name not in defined, f"{node.name} is defined twice"
            defined.add(node.name)
    assert {"FewStepWanPipeline", "StreamDecoder", "KVCache", "sample", "x0_from_flow"} <= defined


def test_no_stock_scheduler_walks_that_list():
    assert stock_scheduler([float(t) for t in NO_STOCK]) is None


# ---------------------------------------------------------------------------------------------------- the weights


def merged_by_hand(base: dict[str, torch.Tensor], student: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wanted = dict(base)
    for name in (key.removesuffix(".lora_A.weight") for key in student if key.endswith(".lora_A.weight")):
        a, b = student[f"{name}.lora_A.weight"], student[f"{name}.lora_B.weight"]
        wanted[f"{name}.weight"] = base[f"{name}.weight"] + 8 / 4 * b @ a
    return wanted


@pytest.mark.parametrize("name", ["stock", "window"])
def test_a_lora_is_added_to_the_base(exported, wan_folder, name):
    base, student = load_file(wan_folder / WEIGHTS), load_file(exported[name].ckpt / "student.safetensors")
    merged, wanted = load_file(exported[name].folder / WEIGHTS), merged_by_hand(base, student)
    assert merged.keys() == base.keys()
    changed = set()
    for key, value in wanted.items():
        assert merged[key].dtype == torch.float32
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-7)
        changed |= {key} if not torch.equal(merged[key], base[key]) else set()
    assert len(changed) == 2 * (2 * 4 + 2)  # two blocks, two attentions with four layers each, two of feed-forward


def test_a_student_that_was_trained_whole_is_copied(exported):
    case = exported["whole, causal"]
    merged, student = load_file(case.folder / WEIGHTS), load_file(case.ckpt / "student.safetensors")
    assert merged.keys() == student.keys() and all(torch.equal(merged[key], student[key]) for key in student)


def test_in_bf16(exported, wan_folder, tmp_path):
    """The sum is rounded once; what Wan keeps in float32 stays there."""
    ckpt = exported["blocks"].ckpt
    done("export-pipeline", "--ckpt", ckpt, "--out", tmp_path / "out", "--precision", "bf16")
    merged = load_file(tmp_path / "out" / WEIGHTS)
    loaded = load_transformer(find_folder(str(wan_folder), "x"), "bf16")
    base, student = loaded.state_dict(), load_file(ckpt / "student.safetensors")
    assert {value.dtype for value in base.values()} == {torch.float32, torch.bfloat16}
    wanted = merged_by_hand({key: value.float() for key, value in base.items()}, student)
    for key, value in merged.items():
        assert value.dtype == base[key].dtype, key
        assert torch.equal(value, wanted[key].to(value.dtype)), key
    before = {key: value.clone() for key, value in base.items()}
    merge(loaded, {}, 2.0)
    assert all(torch.equal(before[key], value) for key, value in loaded.state_dict().items())


def test_the_average_is_what_is_exported_unless_told_otherwise(wan_folder, tmp_path):
    values = values_of(wan_folder, tmp_path / "run", {"optimizer.lr": 0.1, "ema.decay": 0.5})
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    values["data"]["prompts"] = str(tmp_path / "prompts.txt")
    values["train"] |= {"max_steps": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    done("fit", tmp_path / "run.yaml")
    ckpt, base = tmp_path / "run" / "checkpoints" / "step-000002", load_file(wan_folder / WEIGHTS)
    for out, options, stem in (("a", [], "ema"), ("b", ["--weights", "raw"], "student")):
        done("export-pipeline", "--ckpt", ckpt, "--out", tmp_path / out, *options)
        merged, wanted = (
            load_file(tmp_path / out / WEIGHTS),
            merged_by_hand(base, load_file(ckpt / f"{stem}.safetensors")),
        )
        assert all(torch.allclose(merged[key], wanted[key], rtol=1e-6, atol=1e-7) for key in wanted)
    a, b = (load_file(tmp_path / out / WEIGHTS) for out in "ab")
    assert any((a[key] - b[key]).abs().max() > 1e-3 for key in a)


# ---------------------------------------------------------------------------------------------------- refusals


def test_refusals_leave_nothing(exported, tmp_path):
    ckpt, out = exported["stock"].ckpt, tmp_path / "out"
    command = ["export-pipeline", "--ckpt", ckpt, "--out", out]
    refused(*command, "--precision", "fp16", says="--precision: fp16: valid are fp32, bf16")
    refused(*command, "--weights", "best", says="--weights: best: valid are ema, raw")
    refused(*command, "--weights", "ema", says=f"--weights: ema: {ckpt} was trained without an average; valid is raw")
    none = ckpt.parent / "step-000099"
    refused("export-pipeline", "--ckpt", none, "--out", out, says=f"--ckpt: {none}: no such folder")
    refused("export-pipeline", "--ckpt", tmp_path, "--out", out, says="not a checkpoint (manifest.json is missing)")
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    refused(*command, says=f"--out: {out} exists; choose another name")
    (tmp_path / "file").write_text("x")
    refused(*command[:-1], tmp_path / "file", says=f"--out: {tmp_path / 'file'} exists; choose another name")
    refused(*command[:-1], tmp_path / "file" / "below", says="--out: ")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "out"] and list(out.iterdir()) == []
