"""Checkpoints: written beside their name, synced, then renamed; a manifest holds a checksum of every file.

A checkpoint is a folder of .safetensors and .json files; nothing in it is unpickled.

    student.safetensors  fake_score.safetensors  ema.safetensors   trained weights alone
    optimizer_student.safetensors/.json  optimizer_fake_score.safetensors/.json
    random.safetensors   generators and the position in the prompts, between two steps
    underway.safetensors of a run that was stopped within a step: gradients, numbers and videos of what is done of it
    state.json           stage, step, student updates, counters, alarms, and what is done of the next step
    config.yaml          the resolved configuration
    sampling.json        timesteps, sigmas, guidance convention, base model
    manifest.json        format, step, size and SHA-256 of every file
    KEEP                 put there by the user: this one is never removed
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmdtrain.config import Config, ConfigError, load_own
from dmdtrain.files import check_room, make_folder, naming, sha256
from dmdtrain.files import sync as _sync
from dmdtrain.models.roles import load_parameters
from dmdtrain.train.optim import moments, restore

FORMAT = 1
MANIFEST, KEEP = "manifest.json", "KEEP"
QUANTIZED = ("qmap1", "qmap2", "absmax1", "absmax2")  # what bitsandbytes keeps of 8-bit moments beside them
LEFTOVERS = (".step-*.partial", ".step-*.old", ".step-*.removed")  # of a run that was killed while it saved
Content = tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]  # file stem -> tensors; file name -> text
CHECKPOINTS, WARMUP = "checkpoints", "warmup"  # their folders in a run's
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # errors that tell what is there; after others nobody knows
UNDERWAY = "underway"  # of the step after: its tensors, and its object in state.json


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


class SaveFailed(OSError):
    """A checkpoint could not be written; those before it are untouched."""


class Forbidden(ConfigError):
    """There is something, and nobody can say here and now whether it is a good checkpoint."""


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first. One whose replacement was cut off between two renames is put back."""
    for old in _named(root, r"\.step-\d+\.old"):
        final = root / old.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            old.rename(final)
    return [folder for folder in step_folders(root) if (folder / MANIFEST).exists()]


def step_folders(root: Path) -> list[Path]:
    return sorted((folder for folder in _named(root, r"step-\d{6,}") if folder.is_dir()), key=step_of)


def _named(root: Path, pattern: str) -> list[Path]:
    """OSError where a folder is there and can not be read, which is not the same as an empty one."""
    try:
        return [root / name for name in os.listdir(root) if re.fullmatch(pattern, name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def newest_good(output: Path) -> tuple[Path | None, dict[Path, str]]:
    """A run's newest undamaged checkpoint, and what is wrong with those that are newer.

    Raises:
        Forbidden: there are some that may not be read.
    """
    folders: list[Path] = []
    for root in (output / WARMUP, output / CHECKPOINTS):
        try:
            list_checkpoints(root)  # puts back what a kill left between two names
            folders += step_folders(root)
        except OSError as error:
            raise Forbidden(f"output_dir: {error.filename} can not be read: {error.strerror}") from None
    damaged: dict[Path, str] = {}
    for folder in reversed(folders):
        try:
            step = check_checkpoint(folder).get("step")
            if step != step_of(folder):
                raise ConfigError(f"it is of step {step}")
        except Forbidden:
            raise
        except ConfigError as error:
            damaged[folder] = str(error).removeprefix(f"checkpoint: {folder}: ")
        else:
            return folder, damaged
    return None, damaged


def set_aside(folder: Path, why: str) -> Path:
    """Renames a checkpoint so that it is not taken for one of the run's: `damaged-1-step-000200`."""
    return folder.rename(free_name(folder, why))


def free_name(path: Path, why: str) -> Path:
    names = (path.with_name(f"{why}-{count}-{path.name}") for count in itertools.count(1))
    return next(name for name in names if not name.exists())


def set_aside_later(output: Path, checkpoint: Path | None) -> list[Path]:
    """Renames a run's checkpoints that came after the one that is resumed, so that none is taken for the newest later on; where
    that one has another name, also the run's own of its step."""
    if checkpoint is None:
        return []
    resumed, moved = position(checkpoint), []
    for stage in (WARMUP, CHECKPOINTS):
        for folder in list_checkpoints(output / stage):
            at = (stage != WARMUP, step_of(folder))
            if at > resumed or (at == resumed and folder.resolve() != checkpoint.resolve()):
                moved.append(set_aside(folder, "replaced"))
    return moved


def position(checkpoint: Path) -> tuple[bool, int]:
    """Whether it is of the second stage, and its step there."""
    return stage_of(checkpoint) != WARMUP, _manifest_of(checkpoint)["step"]


def write_checkpoint(
    root: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, str], keep: int | None
) -> Path:
    """Writes `step`'s checkpoint and then removes the oldest others until `keep` are left, besides those marked KEEP.

    Args:
        tensors: file stem -> tensors. texts: file name -> content. keep: None removes none.

    Raises:
        SaveFailed: disk full, folder gone, no permission ...; nothing half-written is left.
    """
    final = step_folder(root, step)
    partial, old = root / f".{final.name}.partial", root / f".{final.name}.old"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(root)
        partial.mkdir()
        check_room(root, sum(tensor.nbytes for content in tensors.values() for tensor in content.values()))
        for stem, content in tensors.items():
            save_file(_separate(content), partial / f"{stem}.safetensors")
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        files = sorted(partial.iterdir())
        manifest = {"format": FORMAT, "step": step, "bytes": {file.name: file.stat().st_size for file in files}}
        manifest["sha256"] = {file.name: sha256(file) for file in files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if (final / KEEP).exists():
            (partial / KEEP).touch()
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if final.exists():  # a resumed run comes by here again: the old one stays until the new one is complete
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        partial.rename(final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        if old.exists() and not final.exists():
            old.rename(final)
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveFailed(_reason(error)) from error
    with suppress(OSError):
        if (old / KEEP).exists():  # since the new one was begun
            (final / KEEP).touch()
    shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):
        others = [folder for folder in list_checkpoints(root) if folder != final and not (folder / KEEP).exists()]
        for stale in others[: 0 if keep is None else max(0, len(others) - (keep - 1))]:
            _remove(stale)
    return final


def _reason(error: Exception) -> str:
    """`No space left on device`, of an error of Python's or of safetensors'."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return re.sub(r"^.*I/O error: | \(os error \d+\)$", "", text)


def _remove(folder: Path) -> None:
    """Under another name first: a kill, or a disk that fails, leaves no folder that looks like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.removed")
    with suppress(OSError):  # it stays, and is removed after the next save
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """What a run left that was killed while it saved."""
    list_checkpoints(root)  # puts back what is between two names
    for pattern in LEFTOVERS:
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _separate(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, each with memory of its own, as safetensors wants them (8-bit moments share code books)."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in content.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def check_checkpoint(folder: Path, key: str = "checkpoint") -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint, or ConfigError."""

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"{key}: {folder}: {what}")

    try:
        if not folder.is_dir():
            raise refuse("no such folder")
        manifest = _read_manifest(folder, refuse)
        for name in manifest["sha256"]:
            if not (folder / name).is_file():
                raise refuse(f"{name} is missing")
            size = (folder / name).stat().st_size
            if size != manifest["bytes"].get(name, size):
                raise refuse(f"{name} is damaged (its size differs)")
        for name, wanted in manifest["sha256"].items():
            if sha256(folder / name) != wanted:
                raise refuse(f"{name} is damaged (its checksum differs)")
    except OSError as error:
        kind = ConfigError if error.errno in MISSING else Forbidden
        raise kind(f"{key}: {error.filename} can not be read: {error.strerror}") from None
    return manifest


def _read_manifest(folder: Path, refuse: Callable[[str], ConfigError]) -> dict[str, Any]:
    """A manifest of the right format, whose names are those of files in its folder."""
    try:
        with naming(folder / MANIFEST):
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refuse(f"not a checkpoint ({MANIFEST} is missing)") from None
    except (ValueError, RecursionError):
        raise refuse(f"{MANIFEST} is broken") from None
    if not isinstance(manifest, dict):
        raise refuse(f"{MANIFEST} is broken")
    version, sums = manifest.get("format"), manifest.get("sha256")
    if type(version) is int and version > FORMAT:
        raise Forbidden(f"{refuse(f'format {version} is newer than this dmdtrain reads; valid is {FORMAT}')}")
    if type(version) is not int or version != FORMAT or not isinstance(manifest.get("bytes"), dict):
        raise refuse(f"{MANIFEST} is broken")
    if not isinstance(sums, dict) or not sums or not all(isinstance(value, str) for value in sums.values()):
        raise refuse(f"{MANIFEST} is broken")
    for name in sums:
        if not re.fullmatch(r"\w[\w.-]*", name) or name == MANIFEST:
            raise refuse(f"{MANIFEST} names {name!r}, which is no file of a checkpoint")
    return manifest


def _manifest_of(folder: Path) -> dict[str, Any]:
    return _read_manifest(folder, lambda what: ConfigError(f"checkpoint: {folder}: {what}"))


def has_file(folder: Path, name: str) -> bool:
    """Whether the manifest vouches for a file; others in the folder are not read."""
    return name in _manifest_of(folder)["sha256"]


def file_of(folder: Path, name: str) -> Path:
    if not has_file(folder, name):
        raise ConfigError(f"checkpoint: {folder}: {name} is not in its {MANIFEST}")
    return folder / name


def config_of(folder: Path) -> Config:
    """The configuration of the run that a checkpoint is of."""
    return load_own(file_of(folder, "config.yaml"))


@contextmanager
def understood(folder: Path, name: str) -> Iterator[None]:
    """What a file holds is used inside; where it is not what it should be, ConfigError names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        *(KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError),
        *(OSError, RecursionError, SafetensorError),
    ) as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"checkpoint: {folder}: {name} does not hold what it should ({type(error).__name__}: {text})"
        ) from None


def stage_of(folder: Path) -> str:
    """`warmup` or `dmd`."""
    stage = read_json(folder, "state.json").get("stage", "dmd")
    if stage not in ("dmd", WARMUP):
        raise ConfigError(f"checkpoint: {folder}: state.json: stage {stage!r}; valid are dmd, {WARMUP}")
    return stage


def read_counters(folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Whole numbers from state.json; the step is the manifest's."""
    state = read_json(folder, "state.json")
    for name in names:
        _check_count(folder, name, state.get(name))
    step = _manifest_of(folder).get("step")
    if step != state.get("step"):
        raise ConfigError(f"checkpoint: {folder}: state.json is of step {state.get('step')}, {MANIFEST} of {step!r}")
    return {name: state[name] for name in names}


def read_counts(folder: Path, key: str, names: tuple[str, ...]) -> dict[str, int]:
    """Whole numbers by name, all of which are one of state.json's objects."""
    counts = read_json(folder, "state.json").get(key)
    if not isinstance(counts, dict):
        raise ConfigError(f"checkpoint: {folder}: state.json: {key}: {counts!r:.100}; it must be an object")
    for name in names:
        _check_count(folder, f"{key}.{name}", counts.get(name))
    return {name: counts[name] for name in names}


def _check_count(folder: Path, key: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ConfigError(f"checkpoint: {folder}: state.json: {key}: {value!r:.100}; it must be a whole number")


def read_tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """Finite tensors by name."""
    file = file_of(folder, f"{stem}.safetensors")
    with understood(folder, file.name):
        tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(f"checkpoint: {folder}: {file.name}: {name} holds numbers that are not finite")
    return tensors


def read_json(folder: Path, name: str) -> dict[str, Any]:
    file = file_of(folder, name)
    with understood(folder, name):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    return content


def check_like(
    folder: Path,
    stem: str,
    values: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    *,
    exact: bool = True,
) -> None:
    """ConfigError unless the same names have the same shapes and data types; inexact: any floating type."""
    what = f"checkpoint: {folder}: {stem}.safetensors"
    if other := sorted(values.keys() ^ wanted.keys()):
        verb = "lacks" if other[0] in wanted else "holds"
        raise ConfigError(f"{what} {verb} {other[0]}: it belongs to another model or another student")
    for name, tensor in wanted.items():
        value = values[name]
        if value.shape != tensor.shape:
            raise ConfigError(f"{what}: {name} is {list(value.shape)}, this run's is {list(tensor.shape)}")
        if value.dtype != tensor.dtype if exact else not value.is_floating_point():
            raise ConfigError(f"{what}: {name} is {value.dtype}, this run's is {tensor.dtype}")


def load_weights(folder: Path, stem: str, parameters: dict[str, torch.nn.Parameter]) -> None:
    values = read_tensors(folder, stem)
    check_like(folder, stem, values, parameters)
    load_parameters(parameters, values)


def save_optimizer(
    name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, str]
) -> None:
    """Adds an optimizer's state to a checkpoint's files."""
    tensors[f"optimizer_{name}"], tree = split_state(optimizer.state_dict())
    texts[f"optimizer_{name}.json"] = json.dumps(tree)


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    tree = read_json(folder, f"optimizer_{name}.json")
    tensors = read_tensors(folder, f"optimizer_{name}")
    with understood(folder, f"optimizer_{name}.json"):
        state = join_state(tensors, tree)
        _check_optimizer(optimizer, state)
        restore(optimizer, state)


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raises an error where a state is none of this optimizer: its kernels check no sizes."""
    groups = optimizer.state_dict()["param_groups"]
    if set(state) != {"state", "param_groups"} or len(state["param_groups"]) != len(groups):
        raise ValueError("it is the state of another optimizer")
    for own, read in zip(groups, state["param_groups"], strict=True):
        for key, value in own.items():
            both = [[item] if not isinstance(item, (list, tuple)) else list(item) for item in (value, read[key])]
            numbers = [[type(item) in (int, float) for item in items] for items in both]
            if numbers[0] != numbers[1]:
                raise ValueError(f"{key} is {read[key]!r}, this run's is {value!r}")
            if key in ("betas", "eps", "weight_decay") and both[0] != both[1]:
                raise ValueError(f"{key} is {read[key]!r}, this run's is {value!r}")
        if read["params"] != own["params"]:
            raise ValueError("it is the state of other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {index: _flat(values) for index, values in state["state"].items()}
    for index, values in states.items():
        dtypes = {value.dtype for key, value in values.items() if key.startswith("state")}
        if len(dtypes) > 1:
            raise ValueError(f"its moments are of the data types {dtypes}")
        quantized = dict.fromkeys(QUANTIZED if torch.uint8 in dtypes else (), (torch.Tensor,))
        wanted = moments(optimizer, parameters[index]) | quantized
        if values.keys() != wanted.keys():
            raise ValueError(f"a parameter's moments are {', '.join(values)}; this optimizer's are {', '.join(wanted)}")
        for key, value in values.items():
            if type(value) not in wanted[key]:
                raise ValueError(f"{key} is a {type(value).__name__}")
            if wanted[key] == (torch.Tensor,):
                _check_moment(key, value, parameters[index])


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes nests what belongs to quantized moments."""
    nested = [value for value in values.values() if isinstance(value, dict)]
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    return flat | {key: value for inner in nested for key, value in inner.items()}


def _check_moment(key: str, value: torch.Tensor, parameter: torch.nn.Parameter) -> None:
    """Moments have their parameter's shape; bitsandbytes adds a code book of 256 and a scale for each 256 values."""
    if key == "step":
        shape = torch.Size()
    elif key.startswith("qmap"):
        shape = torch.Size([256])
    elif key.startswith("absmax"):
        shape = torch.Size([-(-parameter.numel() // 256)])
    else:
        shape = parameter.shape
    if key in ("step", "exp_avg_sq") and bool((value < 0).any()):
        raise ValueError(f"{key} is negative")
    if value.shape != shape:
        raise ValueError(f"{key} is {list(value.shape)} for a parameter of {list(parameter.shape)}")
    quantized = value.dtype == torch.uint8 and key.startswith("state")
    if not value.is_floating_point() and not quantized:
        raise ValueError(f"{key} is {value.dtype}")


def split_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """A nested state dict as named tensors and the rest as JSON, each tensor replaced by {"tensor": name}."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            assert path not in tensors, f"two tensors at {path}"
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [walk(item, f"{path}.{i}") for i, item in enumerate(value)]}
        return {"value": value}

    return tensors, walk(state, "state")


def join_state(tensors: dict[str, torch.Tensor], tree: Any) -> Any:
    """Undoes `split_state`."""
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: join_state(tensors, item) for key, item in content}
    if kind in ("list", "tuple"):
        items = [join_state(tensors, item) for item in content]
        return items if kind == "list" else tuple(items)
    return content
