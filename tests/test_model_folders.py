"""Model folders that are not in order: every command says so in one line, before a model is built where headers can tell."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import done, refused
from model_edits import WEIGHTS, drop_tensor, edit_json, edit_tensors, remove, truncate, write
from safetensors.torch import load_file, save_file

from dmdtrain.config import ConfigError
from dmdtrain.models import wan
from dmdtrain.models.checks import DESCRIPTIONS, empty_model
from dmdtrain.models.wan import find_folder, load_scheduler, load_text_encoder, load_transformer, load_vae
from dmdtrain.train.plan import PUBLISHED, UMT5_XXL

pytestmark = pytest.mark.usefixtures("one_thread")

TRANSFORMER, VAE, TEXT = ("transformer/config.json", "vae/config.json", "text_encoder/config.json")
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
TABLE = f"{WEIGHTS['transformer']}.index.json"
QUERY = "blocks.0.attn1.to_q.weight"  # [24, 24]
SHARED = "shared.weight"

Edit = Callable[[Path], object]


def put(part: str, name: str, value: torch.Tensor) -> Edit:
    return edit_tensors(part, lambda tensors: tensors.update({name: value}))


def cast(part: str, name: str, dtype: torch.dtype) -> Edit:
    return edit_tensors(part, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def shard(part: str, change: Callable[[dict[str, str]], object] = lambda names: None) -> Edit:
    """The weights in two files and an index, which is changed after that."""

    def edit(folder: Path) -> None:
        file = folder / WEIGHTS[part]
        tensors = load_file(file)
        file.unlink()
        names: dict[str, str] = {}
        for number, chosen in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
            piece = f"{file.stem}-{number:05}-of-00002.safetensors"
            save_file({name: tensors[name] for name in chosen}, file.with_name(piece), metadata={"format": "pt"})
            names |= dict.fromkeys(chosen, piece)
        change(names)
        (folder / f"{WEIGHTS[part]}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return edit


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def header(part: str, change: Callable[[bytes], bytes]) -> Edit:
    """The header of a weights file, as it is written."""

    def edit(folder: Path) -> None:
        content = (folder / WEIGHTS[part]).read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        text = change(content[8:end])
        (folder / WEIGHTS[part]).write_bytes(struct.pack("<Q", len(text)) + text + content[end:])

    return edit


def swap(names: dict[str, str]) -> None:
    first, second = sorted(names)[:2]
    names[first], names[second] = names[second], names[first]


def variant(part: str, sharded: bool, old: bool = False) -> Edit:
    """The weights under the names of a variant, as `save_pretrained(variant="fp16")` gives them, lately or in older releases."""

    def edit(folder: Path) -> None:
        if not sharded:
            file = folder / WEIGHTS[part]
            file.rename(file.with_suffix(".fp16.safetensors"))
            return
        shard(part)(folder)
        table = folder / f"{WEIGHTS[part]}.index.json"
        content = json.loads(table.read_text())
        names = {name: re.sub(r"(-\d+-of-\d+)", r"\1.fp16" if old else r".fp16\1", name)
                 for name in content["weight_map"].values()}  # fmt: skip
        for name, new in names.items():
            (table.parent / name).rename(table.parent / new)
        content["weight_map"] = {tensor: names[name] for tensor, name in content["weight_map"].items()}
        table.unlink()
        table.with_name(table.name.replace(".json", ".fp16.json")).write_text(json.dumps(content))

    return edit


BAD = {
    # Weights: types, shapes and names are in the headers.
    "int64": (cast("transformer", QUERY, torch.int64), [WEIGHTS["transformer"], QUERY, "is of type I64; valid are "]),
    "bool": (cast("transformer", QUERY, torch.bool), [QUERY, "is of type BOOL"]),
    "fp8": (cast("transformer", QUERY, torch.float8_e4m3fn), [QUERY, "is of type F8_E4M3"]),
    "vae int8": (cast("vae", "post_quant_conv.bias", torch.int8), [WEIGHTS["vae"], "post_quant_conv.bias", "type I8"]),
    "text uint8": (cast("text_encoder", SHARED, torch.uint8), [WEIGHTS["text_encoder"], SHARED, "type U8"]),
    "shape": (
        put("transformer", QUERY, torch.zeros(3, 3)),
        [WEIGHTS["transformer"], f"{QUERY} is [3, 3]; config.json makes it [24, 24]"],
    ),
    "vae shape": (put("vae", "post_quant_conv.bias", torch.zeros(5)), [WEIGHTS["vae"], "is [5]", "makes it [4]"]),
    "text shape": (put("text_encoder", SHARED, torch.zeros(13, 16)), [WEIGHTS["text_encoder"], "[13, 16]", "[12, 16]"]),
    "missing": (drop_tensor("transformer"), ["transformer lacks weights: blocks.0.attn1.norm_k.weight (1 in all)"]),
    "vae missing": (drop_tensor("vae"), ["vae lacks weights: decoder.conv_in.bias"]),
    "text missing": (drop_tensor("text_encoder"), ["text_encoder lacks weights: encoder.block.0."]),
    "no embedding": (
        edit_tensors("text_encoder", lambda t: [t.pop(n) for n in sorted(t) if "shared" in n or "embed" in n]),
        ["text_encoder lacks weights: encoder.embed_tokens.weight (2 in all)"],
    ),
    "extra": (put("transformer", "vace_blocks.0.x", torch.zeros(1)), ["holds vace_blocks.0.x, which the model of"]),
    "vae extra": (
        put("vae", "decoder.x", torch.zeros(1)),
        ["holds decoder.x, which the model of config.json does not"],
    ),
    "text extra": (put("text_encoder", "x", torch.zeros(1)), ["holds x, which the model of config.json does not have"]),
    "fewer layers": (edit_json(TRANSFORMER, num_layers=1), ["holds blocks.1.", "which the model of config.json"]),
    "more layers": (edit_json(TEXT, num_layers=2), ["text_encoder lacks weights: encoder.block.1."]),
    "cut off": (truncate("transformer"), [WEIGHTS["transformer"], "is broken: "]),
    "cut off vae": (truncate("vae"), [WEIGHTS["vae"], "is broken: "]),
    "empty": (write(WEIGHTS["vae"], ""), [WEIGHTS["vae"], "is broken: "]),
    "text for weights": (
        write(WEIGHTS["transformer"], "version https://git-lfs.github.com/spec/v1\n"),
        ["is broken: "],
    ),
    "header": (
        header("transformer", lambda text: text.replace(b"F32", b"F99")),
        [WEIGHTS["transformer"], "is broken: "],
    ),
    "header's length": (
        lambda folder: (folder / WEIGHTS["vae"]).write_bytes(b"\xff" * 64),
        [WEIGHTS["vae"], "is broken: "],
    ),
    "a folder for weights": (
        both(remove(WEIGHTS["vae"]), lambda folder: (folder / WEIGHTS["vae"]).mkdir()),
        ["vae holds no .safetensors weights"],
    ),
    "pickled": (
        lambda folder: (folder / WEIGHTS["transformer"]).rename(folder / "transformer/diffusion_pytorch_model.bin"),
        ["transformer holds no .safetensors weights: neither diffusion_pytorch_model.safetensors nor"],
    ),
    "shards without an index": (
        both(shard("transformer"), remove(TABLE)),
        ["transformer holds no .safetensors weights: neither diffusion_pytorch_model.safetensors nor"],
    ),
    "a pipe": (
        both(remove(VAE), lambda folder: os.mkfifo(folder / VAE)),
        [f"{VAE} is missing"],
    ),
    "a dangling link": (
        both(remove(WEIGHTS["vae"]), lambda folder: (folder / WEIGHTS["vae"]).symlink_to("/no/where")),
        ["vae holds no .safetensors weights"],
    ),
    # Indices.
    "index outside": (
        shard("transformer", lambda names: names.update({QUERY: "../../x.safetensors"})),
        [TABLE, "names ../../x.safetensors, which is no .safetensors file of transformer"],
    ),
    "index absolute": (shard("transformer", lambda n: n.update({QUERY: "/etc/passwd"})), [TABLE, "names /etc/passwd"]),
    "index of pickles": (shard("transformer", lambda n: n.update({QUERY: "a.bin"})), [TABLE, "names a.bin"]),
    "index of numbers": (shard("transformer", lambda n: n.update({QUERY: 3})), [TABLE, "names 3"]),
    "index of a missing file": (
        shard("transformer", lambda names: names.update({QUERY: "gone.safetensors"})),
        ["transformer/", "safetensors"],
    ),
    "index of one file alone": (
        both(shard("transformer"), lambda f: next((f / "transformer").glob("*-00002-of*")).unlink()),
        ["transformer/diffusion_pytorch_model-00002-of-00002.safetensors is missing"],
    ),
    "index swapped": (
        shard("transformer", swap),
        ["transformer/diffusion_pytorch_model-0000", " lacks blocks.0.attn1.", "index.json says otherwise"],
    ),
    "index of too little": (shard("vae", lambda names: names.pop(min(names))), ["holds", "index.json says otherwise"]),
    "index of too much": (
        shard("vae", lambda names: names.update({"x": names[min(names)]})),
        ["lacks x", "index.json says otherwise"],
    ),
    "index without map": (both(shard("vae"), write(f"{WEIGHTS['vae']}.index.json", "{}")), ["holds no weight_map"]),
    "index of lists": (
        both(shard("vae"), write(f"{WEIGHTS['vae']}.index.json", '{"weight_map": []}')),
        ["holds no weight_map"],
    ),
    "index cut off": (both(shard("vae"), write(f"{WEIGHTS['vae']}.index.json", '{"wei')), ["index.json is broken: "]),
    # JSON.
    "a list": (write(TRANSFORMER, "[]"), [f"{TRANSFORMER} is broken: it must hold an object"]),
    "null": (write(INDEX, "null"), [f"{INDEX} is broken: it must hold an object"]),
    "not UTF-8": (lambda folder: (folder / VAE).write_bytes(b'{"z_dim": "\xff"}'), [f"{VAE} is broken: "]),
    "nested": (write(TEXT, "[" * 100_000), [f"{TEXT} is broken: it is nested too deeply"]),
    "nested index": (write(INDEX, '{"a":' * 100_000), [f"{INDEX} is broken: "]),
    "twice": (
        write(TRANSFORMER, '{"_class_name": "WanTransformer3DModel", "_class_name": "AutoencoderKL"}'),
        [f"{TRANSFORMER} is broken: it holds _class_name twice"],
    ),
    "digits": (write(VAE, f'{{"z_dim": {"9" * 5000}}}'), [f"{VAE} is broken: "]),
    "broken tokenizer": (
        write("tokenizer/tokenizer_config.json", "{"),
        ["tokenizer/tokenizer_config.json is broken: "],
    ),
    # Kinds.
    "another class": (
        edit_json(TRANSFORMER, _class_name="WanVACETransformer3DModel"),
        ["transformer is a WanVACETransformer3DModel; it must be a WanTransformer3DModel"],
    ),
    "no class": (edit_json(VAE, _class_name=None), [f"{VAE} names no class; it must be a AutoencoderKLWan"]),
    "class of numbers": (edit_json(VAE, _class_name={"a": 1}), ["vae is a {'a': 1}; it must be"]),
    "architectures": (
        edit_json(TEXT, architectures="UMT5EncoderModel"),
        [f"{TEXT} names no class; it must be a UMT5Enc"],
    ),
    "no architectures": (edit_json(TEXT, architectures=[]), [f"{TEXT} names no class; it must be a UMT5Enc"]),
    "another pipeline": (
        edit_json(INDEX, _class_name="StableDiffusionPipeline"),
        [f"text to video only: {INDEX} is of a StableDiffusionPipeline; valid are Wan 2.1 T2V (1.3B, 14B) and Wan"],
    ),
    "image to video": (
        edit_json(INDEX, _class_name="WanImageToVideoPipeline"),
        [f"text to video only: {INDEX} is of a WanImageToVideoPipeline; valid are Wan 2.1 T2V"],
    ),
    "no pipeline": (edit_json(INDEX, _class_name=None), [f"{INDEX} names no class; it must be a WanPipeline"]),
    "two transformers": (
        edit_json(INDEX, transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875),
        [f"text to video only: {INDEX} is of two transformers that take turns, as in Wan 2.2 A14B (transformer_2); "],
    ),
    "one of two transformers": (
        edit_json(INDEX, boundary_ratio=0.9),
        [f"text to video only: {INDEX} is of two transformers that take turns, as in Wan 2.2 A14B (boundary_ratio); v"],
    ),
    "an encoder of images": (
        edit_json(INDEX, image_encoder=["transformers", "CLIPVisionModel"]),
        [f"text to video only: {INDEX} is of a model that takes an image (image_encoder); valid are Wan 2.1 T2V"],
    ),
    # Values.
    "layers in words": (edit_json(TRANSFORMER, num_layers="2"), [f"{TRANSFORMER}: num_layers: 2: no int that a Wan"]),
    "layers in halves": (edit_json(TRANSFORMER, num_layers=2.0), [f"{TRANSFORMER}: num_layers: 2.0: "]),
    "true layers": (edit_json(TRANSFORMER, num_layers=True), [f"{TRANSFORMER}: num_layers: True: "]),
    "huge": (edit_json(TRANSFORMER, num_layers=10**9), [f"{TRANSFORMER}: num_layers: 1000000000: "]),
    "no layers": (edit_json(TRANSFORMER, num_layers=0), [f"{TRANSFORMER}: num_layers: 0: "]),
    "layers untold": (edit_json(TRANSFORMER, num_layers=None), [f"{TRANSFORMER} has no num_layers"]),
    "no heads": (edit_json(TRANSFORMER, num_attention_heads=0), [f"{TRANSFORMER}: num_attention_heads: 0: "]),
    "an odd head": (edit_json(TRANSFORMER, attention_head_dim=11), [TRANSFORMER]),
    "patch of 0": (edit_json(TRANSFORMER, patch_size=[1, 0, 2]), [f"{TRANSFORMER}: patch_size: [1, 0, 2]: "]),
    "patch in words": (edit_json(TRANSFORMER, patch_size="122"), [f"{TRANSFORMER}: patch_size: 122: "]),
    "a number for patches": (edit_json(TRANSFORMER, patch_size=2), [f"{TRANSFORMER}: patch_size: 2: "]),
    "flat patches": (edit_json(TRANSFORMER, patch_size=[2, 2]), [TRANSFORMER]),
    "rope": (edit_json(TRANSFORMER, rope_max_seq_len=10**12), [f"{TRANSFORMER}: rope_max_seq_len: 1000000000000: "]),
    "eps of 0": (edit_json(TRANSFORMER, eps=0), [f"{TRANSFORMER}: eps: 0: "]),
    "eps NaN": (edit_json(TRANSFORMER, eps=float("nan")), [f"{TRANSFORMER}: eps: nan: "]),
    "image": (
        edit_json(TRANSFORMER, image_dim=1280),
        [f"text to video only: {TRANSFORMER}: image_dim: 1280: the model"],
    ),
    "keys of an image": (
        edit_json(TRANSFORMER, added_kv_proj_dim=24),
        [f"text to video only: {TRANSFORMER}: added_kv_proj_dim: 24: the model takes an image; valid are Wan 2.1"],
    ),
    "channels of an image": (
        edit_json(TRANSFORMER, in_channels=36),
        ["text to video only: the transformer takes 36 channels, the codec makes 4; valid are Wan 2.1 T2V"],
    ),
    "more channels": (
        edit_json(TRANSFORMER, out_channels=8),
        [f"{TRANSFORMER}: out_channels: 8: it must be in_channels"],
    ),
    "text": (
        edit_json(TRANSFORMER, text_dim=24),
        [f"{TRANSFORMER}: text_dim: 24: it must be d_model of the text encod"],
    ),
    "heads of text": (edit_json(TEXT, num_heads=0), [f"{TEXT}: num_heads: 0: "]),
    "a huge vocabulary": (edit_json(TEXT, vocab_size=10**12), [f"{TEXT}: vocab_size: 1000000000000: "]),
    "activation": (edit_json(TEXT, dense_act_fn="nothing"), [f"{TEXT} makes no UMT5EncoderModel: "]),
    "mean": (edit_json(VAE, latents_mean=[0.1] * 3), [f"{VAE}: latents_mean: 3: it must be 4 entries"]),
    "deviation": (edit_json(VAE, latents_std=[1.0] * 16), [f"{VAE}: latents_std: 16: it must be 4 entries"]),
    "deviation of 0": (
        edit_json(VAE, latents_std=[1.0, 0.0, 1.0, 1.0]),
        [f"{VAE}: latents_std: [1.0, 0.0, 1.0, 1.0]: "],
    ),
    "means in words": (edit_json(VAE, latents_mean="0000"), [f"{VAE}: latents_mean: 0000: "]),
    "space": (edit_json(VAE, scale_factor_spatial=16), [f"{VAE}: scale_factor_spatial: 16: it must be 8 by dim_mult"]),
    "downsampling": (edit_json(VAE, temperal_downsample=[True]), [VAE]),
    "sizes": (edit_json(VAE, dim_mult=[1, 10**9, 2, 2]), [f"{VAE}: dim_mult: [1, 1000000000, 2, 2]: "]),
    # The scheduler.
    "shift in words": (edit_json(SCHEDULER, shift="x"), [f"{SCHEDULER}: shift: x: it must be a number above 0"]),
    "shift NaN": (edit_json(SCHEDULER, shift=float("nan")), [f"{SCHEDULER}: shift: nan: it must be"]),
    "shift of 0": (edit_json(SCHEDULER, shift=0), [f"{SCHEDULER}: shift: 0: it must be a number above 0"]),
    "negative shift": (edit_json(SCHEDULER, flow_shift=-3.0), [f"{SCHEDULER}: flow_shift: -3.0: it must be"]),
    "infinite shift": (edit_json(SCHEDULER, shift=float("inf")), [f"{SCHEDULER}: shift: inf: it must be"]),
    "timesteps": (
        edit_json(SCHEDULER, num_train_timesteps=10**12),
        [f"{SCHEDULER}: num_train_timesteps: 1000000000000: Wan has 1000"],
    ),
    "timesteps in words": (
        edit_json(SCHEDULER, num_train_timesteps="1000"),
        ["num_train_timesteps: 1000: Wan has 1000"],
    ),
    "dynamic": (edit_json(SCHEDULER, use_dynamic_shifting=True), [f"{SCHEDULER} makes no FlowMatchEulerDiscreteSched"]),
    "no scheduler": (edit_json(SCHEDULER, _class_name=None), [f"{SCHEDULER}: _class_name: None: no scheduler of Diff"]),
    "a model": (
        edit_json(SCHEDULER, _class_name="WanPipeline"),
        ["_class_name: WanPipeline: no scheduler of Diffusers"],
    ),
    "a module": (edit_json(SCHEDULER, _class_name="models"), ["_class_name: models: no scheduler of Diffusers"]),
    "another scheduler": (edit_json(SCHEDULER, _class_name="DDIMScheduler"), [f"{SCHEDULER} makes no DDIMScheduler: "]),
    "not of flows": (edit_json(SCHEDULER, _class_name="EulerDiscreteScheduler"), ["gives noise levels of "]),
}


@pytest.fixture
def config_file(settings, tmp_path) -> Callable[..., Path]:
    """The settings with other values in `model`."""

    def write(base: Path, **changes: object) -> Path:
        file = tmp_path / "run.yaml"
        model = settings["model"] | {"base": str(base)} | changes
        file.write_text(yaml.safe_dump(settings | {"model": model, "log": {"tensorboard": False}}))
        return file

    return write


@pytest.mark.parametrize("case", BAD)
def test_what_headers_and_descriptions_tell(broken_folder, config_file, tmp_path, monkeypatch, case):
    edit, says = BAD[case]
    folder = broken_folder(edit)
    file = config_file(folder)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", forbidden)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", forbidden)
    begin = time.monotonic()
    for command in (("fit",), ("fit", "--dry-run"), ("plan",), ("prepare",)):
        refused(command[0], file, *command[1:], says=[f"model.base: {folder}: ", *says])
    assert time.monotonic() - begin < 20
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_checked_too(broken_folder, config_file, wan_folder):
    folder = broken_folder(drop_tensor("vae"))
    file = config_file(wan_folder, teacher=str(folder))
    refused("fit", file, "--dry-run", says=[f"model.teacher: {folder}: ", "vae lacks weights"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", [QUERY, "scale_shift_table", "blocks.1.ffn.net.2.bias"])
def test_weights_that_are_not_finite(broken_folder, precision, value, name):
    folder = broken_folder(edit_tensors("transformer", lambda tensors: tensors[name].view(-1)[-1:].fill_(value)))
    with pytest.raises(ConfigError, match=f"weights that are not finite: {name}$"):
        load_transformer(find_folder(str(folder), "model.base"), precision)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("kind", ["a file", "shards", "older shards"])
def test_a_variant_is_named_and_can_be_used_as_is_told(broken_folder, wan_folder, part, kind):
    folder = broken_folder(variant(part, kind != "a file", kind == "older shards"))
    name = Path(WEIGHTS[part]).name
    with pytest.raises(ConfigError) as caught:
        find_folder(str(folder), "model.base")
    old, new = re.search(
        r"the variant fp16: to use it, rename (\S+) to (\S+), or link it so$", str(caught.value)
    ).groups()
    assert f"{part} holds no .safetensors weights: neither {name} nor {name}.index.json, but" in str(caught.value)
    (folder / part / old).rename(folder / part / new)
    load = {"transformer": lambda f: load_transformer(f, "fp32"), "vae": load_vae}
    load["text_encoder"] = lambda f: load_text_encoder(f, "fp32")[1]
    ours, theirs = (load[part](find_folder(str(f), "model.base")).state_dict() for f in (folder, wan_folder))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_shards_of_a_variant_without_their_index(broken_folder):
    folder = broken_folder(
        both(variant("vae", True), remove(f"{WEIGHTS['vae']}.index.json".replace(".json", ".fp16.json")))
    )
    says = "the variant fp16: to use it, add diffusion_pytorch_model.safetensors.index.json, which lists diffusion_pytorch_"
    with pytest.raises(ConfigError, match=re.escape(says)):
        find_folder(str(folder), "model.base")


@pytest.mark.parametrize("given", ["models--org--name", "models--org--name/snapshots"])
def test_the_root_of_a_hub_cache_names_its_snapshot(wan_folder, config_file, tmp_path, given):
    root = tmp_path / "models--org--name"
    for name in ("blobs", "refs", "snapshots/0123abc"):
        (root / name).mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abc"
    says = f"model.base: {tmp_path / given}: model_index.json is missing"
    if given == root.name:  # also where nothing is in it yet
        refused("fit", config_file(root), "--dry-run", says=f"{says}; the model is in a folder below: give {snapshot}")
    for part in wan_folder.iterdir():
        (snapshot / part.name).symlink_to(part)
    refused(
        "fit",
        config_file(tmp_path / given),
        "--dry-run",
        says=f"{says}; the model is in a folder below: give {snapshot}",
    )
    done("fit", config_file(snapshot), "--dry-run")


@pytest.mark.parametrize(("part", "name"), [("vae", "post_quant_conv.bias"), ("text_encoder", SHARED)])
def test_the_encoders_are_finite(broken_folder, part, name):
    folder = broken_folder(edit_tensors(part, lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan"))))
    found = find_folder(str(folder), "model.base")
    with pytest.raises(ConfigError, match=f"{part} holds weights that are not finite: {name}$"):
        load_vae(found) if part == "vae" else load_text_encoder(found, "fp32")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (write("tokenizer/tokenizer.json", "[" * 100_000), "tokenizer can not be loaded: "),
        (write("tokenizer/tokenizer.json", '{"model": 1}'), "tokenizer can not be loaded: "),
        (edit_json("tokenizer/tokenizer_config.json", pad_token=None), "tokenizer_config.json names no pad_token"),
    ],
)
def test_a_tokenizer_is_told_of_before_the_encoder_is_loaded(broken_folder, config_file, edit, says):
    folder = broken_folder(edit)
    refused("fit", config_file(folder), says=[f"{folder}: ", says])


def test_a_tokenizer_of_another_model(broken_folder, config_file):
    """It knows tokens that the encoder has no row for."""

    def edit(folder: Path) -> None:
        edit_tensors("text_encoder", lambda tensors: tensors.update({SHARED: tensors[SHARED][:9].clone()}))(folder)
        edit_json(TEXT, vocab_size=9)(folder)

    folder = broken_folder(edit)
    refused("fit", config_file(folder), says=f"{folder}: tokenizer knows 12 tokens, the text encoder 9")


def test_a_run_on_weights_that_are_not_finite_ends_in_one_line(broken_folder, config_file, tmp_path):
    folder = broken_folder(put("transformer", QUERY, torch.full((24, 24), float("nan"))))
    refused("fit", config_file(folder), says=f"{folder}: transformer holds weights that are not finite: {QUERY}")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Starts a local hub that serves a folder as org/tiny, or one that takes requests and never answers."""
    servers = []

    def start(folder: Path | None) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if folder is None:
                    let_go.wait(900)
                    return
                files = [f for f in folder.rglob("*") if f.is_file()]
                path = self.path.partition("?")[0]
                asked = folder / path.partition(f"/resolve/{COMMIT}/")[2]
                if path.startswith("/api/models/org/tiny/tree/"):
                    names = [(f, str(f.relative_to(folder))) for f in files]
                    listed = [{"type": "file", "oid": "0", "size": f.stat().st_size, "path": name} for f, name in names]
                    self.reply(json.dumps(listed).encode())
                elif path.startswith("/api/models/org/tiny"):
                    self.reply(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode())
                elif "/resolve/" in path and asked.is_file():
                    self.reply(asked.read_bytes())
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            do_HEAD = do_GET

            def reply(self, body: bytes) -> None:
                self.send_response(200)
                for name, value in {
                    "ETag": f'"{hash(body):x}"',
                    "X-Repo-Commit": COMMIT,
                    "Content-Length": len(body),
                }.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        wan._unreachable.cache_clear()
        return server

    let_go = threading.Event()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield start
    let_go.set()
    for server in servers:
        server.shutdown()
        server.server_close()
    wan._unreachable.cache_clear()


COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_a_model_of_the_hub_is_fetched_in_parts_and_found_again_without_it(hub, wan_folder, monkeypatch):
    server = hub(wan_folder)
    folder = find_folder("org/tiny", "model.base")
    assert folder.hub and folder.path.name == COMMIT and not (folder.path / WEIGHTS["vae"]).exists()
    weights = load_vae(folder).state_dict()
    theirs = load_file(wan_folder / WEIGHTS["vae"])
    assert all(torch.equal(weights[name], value) for name, value in theirs.items())
    assert not (folder.path / WEIGHTS["transformer"]).exists()
    with pytest.raises(ConfigError, match=r"org/none: no such folder here, and the hub did not give it: .*404"):
        find_folder("org/none", "model.base")
    server.shutdown()
    server.server_close()
    wan._unreachable.cache_clear()
    again = find_folder("org/tiny", "model.base")
    assert again.path == folder.path
    assert torch.equal(load_vae(again).state_dict()["post_quant_conv.bias"], weights["post_quant_conv.bias"])


@pytest.mark.parametrize("answers", ["never", "closed"])
def test_a_hub_that_can_not_be_reached_is_told_of_with_what_to_do(hub, tmp_path, monkeypatch, answers):
    monkeypatch.setattr(wan, "CONTACT", 0.5)
    server = hub(None)
    if answers == "closed":
        server.shutdown()
        server.server_close()
    with pytest.raises(ConfigError) as caught:
        find_folder("org/tiny", "model.teacher")
    line = str(caught.value)
    assert line.startswith("model.teacher: org/tiny: no such folder here, and the hub can not be reached (")
    assert "give the path of a folder that holds the model, or set HF_HOME" in line and str(tmp_path / "cache") in line


# ---------------------------------------------------------------------------------------------------- what is in order


def linked(folder: Path) -> None:
    """Every file is a link to a blob with a number for a name, as in the hub's cache."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(f for f in folder.rglob("*") if f.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(Path(os.path.relpath(blobs, file.parent)) / str(number))


def embeddings(*names: str) -> Edit:
    """The table under these names, of the two that it has."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors.pop(SHARED)
        tensors.update({name: table.clone() for name in names})

    return edit_tensors("text_encoder", change)


EMBEDDED = "encoder.embed_tokens.weight"
GOOD = {
    "links": linked,
    "linked shards": both(shard("transformer"), shard("text_encoder"), linked),
    "shared": embeddings(SHARED),
    "embedded": embeddings(EMBEDDED),
    "both": embeddings(SHARED, EMBEDDED),
    "untied": both(embeddings(SHARED, EMBEDDED), edit_json(TEXT, tie_word_embeddings=False)),
    "a whole UMT5": edit_tensors(
        "text_encoder",
        lambda t: t.update({"lm_head.weight": torch.zeros(12, 16), "decoder.block.0.x.weight": torch.zeros(3)}),
    ),
    "code of its own": edit_json(INDEX, _class_name=["pipeline", "CausalWanPipeline"]),
    "an older Diffusers": both(edit_json(INDEX, transformer_2=None, expand_timesteps=None, boundary_ratio=None)),
    "another variant beside it": lambda folder: (folder / "vae/diffusion_pytorch_model.fp16.safetensors").touch(),
    "fp16": edit_tensors("transformer", lambda t: t.update({name: value.half() for name, value in t.items()})),
    "expanded timesteps": edit_json(
        INDEX, expand_timesteps=True, image_encoder=[None, None], transformer_2=[None, None]
    ),
    "unknown keys": both(edit_json(TRANSFORMER, window=[-1, -1]), edit_json(TEXT, scalable_attention=True)),
    "large": edit_json(TRANSFORMER, rope_max_seq_len=1 << 20),
}


def test_two_tables_that_differ_are_read_alike(broken_folder):
    """Where the encoder has another table than the decoder's, quantized or not, it is its own that it reads."""
    other = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    found = find_folder(str(broken_folder(put("text_encoder", EMBEDDED, other))), "model.base")
    for precision in ("fp32", "int8"):
        encoder = load_text_encoder(found, precision)[1]
        torch.testing.assert_close(encoder.encoder.embed_tokens.weight.float(), other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("case", GOOD)
def test_folders_that_are_in_order_load_as_before(wan_folder, broken_folder, capfd, case, precision):
    folder = find_folder(str(broken_folder(GOOD[case])), "model.base")
    plain = find_folder(str(wan_folder), "model.base")
    models = [load_transformer(f, precision) for f in (folder, plain)]
    models += [load_text_encoder(f, precision)[1] for f in (folder, plain)] + [load_vae(f) for f in (folder, plain)]
    for ours, theirs in zip(models[::2], models[1::2], strict=True):
        found, wanted = ours.state_dict(), theirs.state_dict()
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            near = 1e-2 if case == "fp16" and value.is_floating_point() else 0
            if value.dtype != torch.int8 or case != "fp16":
                torch.testing.assert_close(found[name], value, rtol=near, atol=near)
    assert "REPORT" not in capfd.readouterr().err


def test_a_run_on_links(broken_folder, config_file):
    assert "dry run: everything" in done("fit", config_file(broken_folder(linked)), "--dry-run")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_are_in_order(broken_folder, name):
    """Their descriptions as they are on the hub, with headers of the right size and holes for weights."""
    published = PUBLISHED[name]
    vae = {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": 96,
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    } | published.vae
    text = UMT5_XXL | {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "tie_word_embeddings": False,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "num_decoder_layers": 24,
        "scalable_attention": True,
    }
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": published.flow_shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    configs = {"transformer": published.transformer, "vae": vae, "text_encoder": text}

    def edit(folder: Path) -> None:
        for part, config in configs.items():
            (folder / DESCRIPTIONS[part]).write_text(json.dumps(config))
            holes(folder / WEIGHTS[part], empty_model(part, config), leave_out=EMBEDDED)
        (folder / SCHEDULER).write_text(json.dumps(scheduler))

    begin = time.monotonic()
    folder = find_folder(str(broken_folder(edit)), "model.base")
    assert time.monotonic() - begin < 10
    assert (folder.flow_shift, folder.size_multiple) == ((5.0, 32) if "5B" in name else (3.0, 16))
    assert load_scheduler(folder, 8.0).config.flow_shift == 8.0


def holes(file: Path, model: torch.nn.Module, leave_out: str) -> None:
    """A sparse file of a model's size."""
    entries, end = {}, 0
    for name, value in model.state_dict().items():
        if name != leave_out:
            entries[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + 4 * value.numel()]}
            end += 4 * value.numel()
    text = json.dumps(entries).encode()
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)


def test_the_shift_of_a_scheduler_that_leaves_it_out(broken_folder):
    """UniPC calls it flow_shift, whether its description names it or not."""
    unipc = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "shift": None}
    folder = find_folder(
        str(broken_folder(edit_json(SCHEDULER, _class_name="UniPCMultistepScheduler", **unipc))), "model.base"
    )
    scheduler = load_scheduler(folder, 8.0)
    assert scheduler.config.flow_shift == 8.0


@pytest.mark.parametrize("case", ["text missing", "nested", "header's length", "a module"])
def test_the_installed_command(broken_folder, config_file, case):
    """Nothing of what libraries say of a broken model reaches the terminal."""
    edit, says = BAD[case]
    file = config_file(broken_folder(edit))
    command = [sys.executable, "-m", "dmdtrain", "fit", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert says[0] in line and not result.stdout


@pytest.mark.parametrize("known", [True, False], ids=["a class that is known", "a class of its own"])
def test_python_that_lies_in_a_model_folder_is_never_run(broken_folder, config_file, tmp_path, known):
    """At a terminal Transformers would offer to run it."""
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}} | ({} if known else {"tokenizer_class": "Own"})
    code = write(
        "tokenizer/own.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import T5Tokenizer as Own\n"
    )
    folder = broken_folder(both(edit_json("tokenizer/tokenizer_config.json", **own), code))
    if known:
        assert load_text_encoder(find_folder(str(folder), "model.base"), "fp32")
    else:
        refused(
            "fit",
            config_file(folder),
            says="tokenizer_config.json asks for Python of its own (auto_map), which is not run",
        )
    assert not (tmp_path / "ran").exists()
