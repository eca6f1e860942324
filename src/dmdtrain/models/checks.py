"""What is wrong with a model folder, as its JSON files and the headers of its weights tell it: no weight is read for it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from dmdtrain.config import VAE_TEMPORAL_FACTOR

if TYPE_CHECKING:
    import torch
    from torch import nn

# Part -> class; file that describes it; name of its weights; what the code takes from the description.
CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}
DESCRIPTIONS = {part: f"{part}/config.json" for part in CLASSES}
DESCRIPTIONS |= {"tokenizer": "tokenizer/tokenizer_config.json", "scheduler": "scheduler/scheduler_config.json"}
STEMS = dict.fromkeys(CLASSES, "diffusion_pytorch_model") | {"text_encoder": "model"}
NEEDED = {
    "transformer": [
        *("in_channels", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim"),
        *("ffn_dim", "text_dim"),
    ],
    "vae": [],
    "text_encoder": ["d_model", "num_heads"],
}
LARGEST, MOST = 1 << 20, 256  # sizes; layers, heads and entries of a list
FLOATS = ("F64", "F32", "F16", "BF16")
WHOLE_UMT5 = ("decoder.", "lm_head.")  # beside the encoder
VALID = "valid are Wan 2.1 T2V (1.3B, 14B) and Wan 2.2 TI2V-5B, in Diffusers' format"
TRAIN_TIMESTEPS = 1000


class BadFolder(ValueError):
    """The message begins with the file, or the part, of the folder."""


def check_folder(path: Path, weights: bool) -> dict[str, dict[str, Any]]:
    """The description of each part of a folder that is in order; weights: whether they have to be there.

    Raises:
        BadFolder: not a Wan text-to-video folder, or a part of it is missing or broken.
    """
    _check_place(path)
    _check_index(_read_json(path, "model_index.json"))
    configs = {part: _read_json(path, file) for part, file in DESCRIPTIONS.items()}
    for part, wanted in CLASSES.items():
        architectures = configs[part].get("architectures")
        listed = architectures[:1] if isinstance(architectures, list) else []
        found = configs[part].get("_class_name") or next(iter(listed), None)
        if found != wanted:
            other = f"{DESCRIPTIONS[part]} names no class" if found is None else f"{part} is a {_short(found)}"
            raise BadFolder(f"{other}; it must be a {wanted}")
        for name in NEEDED[part]:
            if name not in configs[part]:
                raise BadFolder(f"{DESCRIPTIONS[part]} has no {name}")
    models = {part: empty_model(part, config) for part, config in configs.items() if part in CLASSES}
    _check_sizes(models)
    make_scheduler(configs["scheduler"])
    if weights:
        for part, model in models.items():
            check_weights(path / part, model)
    return configs


def _check_place(path: Path) -> None:
    """BadFolder where the model lies in a folder below, such as a snapshot of the hub's cache."""
    if (path / "model_index.json").exists():
        return
    snapshots = [folder for folder in path.glob("snapshots/*") if folder.is_dir()]
    if below := snapshots or [file.parent for file in path.glob("*/model_index.json")]:
        newest = max(below, key=lambda folder: folder.stat().st_mtime)
        raise BadFolder(f"model_index.json is missing; the model is in a folder below: give {newest}")


def _check_index(index: dict[str, Any]) -> None:
    """`expand_timesteps` may be either: without an image, a timestep for each token is the same one for all of them."""
    kind = index.get("_class_name")  # a list: a pipeline with code of its own, such as `export-pipeline` writes
    if kind != "WanPipeline" and not isinstance(kind, list):
        other = "names no class; it must be a WanPipeline" if kind is None else f"is of a {_short(kind)}"
        raise _not_text_to_video(f"model_index.json {other}")
    two = "of two transformers that take turns, as in Wan 2.2 A14B"
    others = {"image_encoder": "of a model that takes an image", "transformer_2": two, "boundary_ratio": two}
    for key, what in others.items():
        value = index.get(key)
        if any(value) if isinstance(value, list) else value is not None:
            raise _not_text_to_video(f"model_index.json is {what} ({key})")


def _not_text_to_video(what: str) -> BadFolder:
    return BadFolder(f"text to video only: {what}; {VALID}")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        raise BadFolder(f"{name} is missing; is it a Diffusers folder of Wan?")
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError) as error:
        raise BadFolder(f"{name} is broken: {error}") from None
    except RecursionError:
        raise BadFolder(f"{name} is broken: it is nested too deeply") from None
    if not isinstance(values, dict):
        raise BadFolder(f"{name} is broken: it must hold an object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"it holds {_short(twice)} twice")
    return dict(pairs)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def empty_model(part: str, config: dict[str, Any]) -> nn.Module:
    """The model that a description is of, on the meta device."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    file = DESCRIPTIONS[part]
    described: Any = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5Config}[part]
    for name, argument in inspect.signature(described).parameters.items():
        if name in config and not _fits(name, config[name], argument.annotation):
            wanted = getattr(argument.annotation, "__name__", None) or str(argument.annotation)
            raise BadFolder(f"{file}: {name}: {_short(config[name])}: no {wanted} that a Wan has")
    build: Callable[[], Any] = lambda: described.from_config(config)  # noqa: E731
    if described is UMT5Config:
        build = lambda: UMT5EncoderModel(UMT5Config.from_dict(config))  # noqa: E731
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # constructors raise many kinds; all mean that the values do not go together
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadFolder(f"{file} makes no {CLASSES[part]}: {reason}") from None


def _fits(name: str, value: Any, hint: Any) -> bool:
    """Whether a value is of an argument's type, and none with which building the model takes all time or memory."""
    if get_origin(hint) in (list, tuple):
        items = isinstance(value, list) and len(value) <= MOST
        return items and all(_fits(name, item, get_args(hint)[0]) for item in value)
    if isinstance(hint, UnionType):
        return any(_fits(name, value, each) for each in get_args(hint))
    if hint is int:
        least, most = 0 if name.endswith("_token_id") else 1, MOST if name.startswith("num_") else LARGEST
        return type(value) is int and least <= value <= most
    if hint is float:
        return type(value) in (int, float) and (1e-30 if "eps" in name or "std" in name else -1e30) <= value <= 1e30
    return not isinstance(hint, type) or isinstance(value, hint)


def _check_sizes(models: dict[str, nn.Module]) -> None:
    """What the parts have to agree on, and what the code takes a Wan to be."""
    transformer, vae, text_encoder = (models[part].config for part in CLASSES)
    for name in ("image_dim", "added_kv_proj_dim"):
        if transformer[name] is not None:
            raise _not_text_to_video(f"transformer/config.json: {name}: {transformer[name]}: the model takes an image")
    if transformer.in_channels != vae.z_dim:
        raise _not_text_to_video(
            f"the transformer takes {transformer.in_channels} channels, the codec makes {vae.z_dim}"
        )
    if transformer.out_channels != transformer.in_channels:
        raise BadFolder(
            f"transformer/config.json: out_channels: {transformer.out_channels}: it must be in_channels, "
            f"{transformer.in_channels}"
        )
    if len(transformer.patch_size) != 3:
        raise BadFolder(f"transformer/config.json: patch_size: {list(transformer.patch_size)}: it must be of three")
    if transformer.text_dim != text_encoder.d_model:
        raise BadFolder(
            f"transformer/config.json: text_dim: {transformer.text_dim}: it must be d_model of the text encoder, "
            f"{text_encoder.d_model}"
        )
    if vae.scale_factor_temporal != VAE_TEMPORAL_FACTOR:
        raise BadFolder(f"the codec does not compress time by {VAE_TEMPORAL_FACTOR}; not a Wan")
    patch = vae.patch_size or 1
    wanted = {
        "latents_mean": (len(vae.latents_mean), vae.z_dim, "entries"),
        "latents_std": (len(vae.latents_std), vae.z_dim, "entries"),
        "temperal_downsample": (len(vae.temperal_downsample), len(vae.dim_mult) - 1, "entries"),
        "scale_factor_temporal": (
            vae.scale_factor_temporal,
            2 ** sum(vae.temperal_downsample),
            "by temperal_downsample",
        ),
        "scale_factor_spatial": (vae.scale_factor_spatial, patch * 2 ** (len(vae.dim_mult) - 1), "by dim_mult"),
        "in_channels": (vae.in_channels, 3 * patch**2, "by patch_size"),
        "out_channels": (vae.out_channels, 3 * patch**2, "by patch_size"),
    }
    for name, (found, right, what) in wanted.items():
        if found != right:
            raise BadFolder(f"vae/config.json: {name}: {found}: it must be {right} {what}")


def weight_files(folder: Path) -> list[Path]:
    """The files of a part's weights: those that its index names, or the only one."""
    return list(_weight_map(folder)) or [folder / f"{STEMS[folder.name]}.safetensors"]


def _weight_map(folder: Path) -> dict[Path, set[str]]:
    """File -> the tensors that the part's index puts there; empty where there is no index."""
    single = f"{STEMS[folder.name]}.safetensors"
    if not (folder / f"{single}.index.json").is_file():
        return {}
    name = f"{folder.name}/{single}.index.json"
    listed = _read_json(folder.parent, name).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise BadFolder(f"{name} is broken: it holds no weight_map")
    files: dict[Path, set[str]] = {}
    for tensor, file in listed.items():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise BadFolder(f"{name} names {_short(file)}, which is no .safetensors file of {folder.name}")
        files.setdefault(folder / file, set()).add(tensor)
    return files


def _no_weights(folder: Path) -> str:
    """That a part's weights are not there under the names that are read, and what to do where a variant of them is."""
    stem = STEMS[folder.name]
    name = f"{stem}.safetensors"
    said = f"{folder.name} holds no .safetensors weights: neither {name} nor {name}.index.json"
    for pattern, wanted in (("safetensors.index.*.json", f"{name}.index.json"), ("*safetensors", name)):
        for file in sorted(folder.glob(f"{stem}[.-]{pattern}")):
            whole = re.sub(r"-\d+-of-\d+", "", file.name)  # a shard's number stands before or after the variant
            if found := re.fullmatch(rf"{stem}\.(?:safetensors\.index\.)?(\w+)\.(?:json|safetensors)", whole):
                shard = f"add {name}.index.json, which lists {file.name} and the others"
                use = f"rename {file.name} to {wanted}, or link it so" if whole == file.name else shard
                return f"{said}, but the variant {found[1]}: to use it, {use}"
    return said


def check_weights(folder: Path, model: nn.Module) -> None:
    """BadFolder unless a part's files hold each tensor of the model, in its shape, and no others."""
    part = folder.name
    mapped = _weight_map(folder)
    if not mapped and not weight_files(folder)[0].is_file():
        raise BadFolder(_no_weights(folder))
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    found: set[str] = set()
    for file in weight_files(folder):
        where, header = f"{part}/{file.name}", _read_header(file)
        for name in sorted(mapped.get(file, set()) ^ header.keys() if mapped else ()):
            lacks = "lacks" if name not in header else "holds"
            raise BadFolder(f"{where} {lacks} {_short(name)}, and {STEMS[part]}.safetensors.index.json says otherwise")
        for name, (dtype, shape) in header.items():
            if name not in wanted:
                if any(pattern.search(name) for pattern in expected):
                    continue
                if part == "text_encoder" and name.startswith(WHOLE_UMT5):
                    continue
                raise BadFolder(f"{where} holds {_short(name)}, which the model of config.json does not have")
            if shape != wanted[name]:
                raise BadFolder(f"{where}: {name} is {shape}; config.json makes it {wanted[name]}")
            if dtype not in FLOATS:
                raise BadFolder(f"{where}: {name} is of type {dtype}; valid are {', '.join(FLOATS)}")
        found |= header.keys()
    tied = dict(getattr(model, "_tied_weights_keys", None) or {})  # either name stands for both
    tied |= {source: name for name, source in tied.items()}
    missing = sorted(name for name in wanted.keys() - found if tied.get(name) not in found)
    if missing:
        raise BadFolder(f"{part} lacks weights: {missing[0]} ({len(missing)} in all)")


def _read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> type and shape of a whole file's tensors."""
    from safetensors import SafetensorError, safe_open

    where = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        raise BadFolder(f"{where} is missing")
    try:
        with safe_open(file, "np") as handle:  # "pt" asks for memory of the file's size
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it is no dict)
            return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise BadFolder(f"{where} is broken: {error}") from None


def check_finite(name: str, value: torch.Tensor) -> None:
    """BadFolder where a weight, once it is read, holds NaN or infinity."""
    if value.is_floating_point() and value.numel():
        low, high = value.aminmax()  # one pass without a mask of the weight's size; NaN goes through it
        if not (low.isfinite() and high.isfinite()):
            raise BadFolder(f"weights that are not finite: {name}")


def make_scheduler(config: dict[str, Any], shift: float | None = None) -> Any:
    """A flow-matching scheduler that gives timesteps, with another shift where one is given."""
    import diffusers

    file, name = DESCRIPTIONS["scheduler"], config.get("_class_name")
    make: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if diffusers.SchedulerMixin not in getattr(make, "__mro__", ()):
        raise BadFolder(f"{file}: _class_name: {_short(name)}: no scheduler of Diffusers")
    for key in ("shift", "flow_shift"):
        value = config.get(key, 1.0)
        if type(value) not in (int, float) or not 1e-3 <= value <= 1e3:
            raise BadFolder(f"{file}: {key}: {_short(value)}: it must be a number above 0")
    if config.get("num_train_timesteps", TRAIN_TIMESTEPS) != TRAIN_TIMESTEPS:
        found = _short(config["num_train_timesteps"])
        raise BadFolder(f"{file}: num_train_timesteps: {found}: Wan has {TRAIN_TIMESTEPS}")
    key = "flow_shift" if "flow_shift" in inspect.signature(make).parameters else "shift"
    values = config if shift is None else config | {key: shift}
    try:
        tried, made = (make.from_config(values) for _ in range(2))
        tried.set_timesteps(4)
        sigmas = [float(sigma) for sigma in tried.sigmas]
    except Exception as error:  # schedulers raise many kinds; all mean that the values do not go together
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadFolder(f"{file} makes no {name}: {reason}") from None
    if not all(0 <= sigma <= 1 for sigma in sigmas):
        raise BadFolder(f"{file}: {name} gives noise levels of {max(sigmas):.4g}; flow matching's lie between 0 and 1")
    return made
