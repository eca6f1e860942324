"""Quantized models kept in a folder: quantizing 14B takes minutes, reading it again seconds.

<kind>-<what it was made of>.safetensors    the model's tensors
<kind>-<what it was made of>.json           that file's size and SHA-256
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dmdtrain.files import atomic, check_room, make_folder, save_tensors, sha256, write_text
from dmdtrain.models.quantize import read_quantized

KEY = "model.quantized_cache"


def cached_quantized(
    make: Callable[[], nn.Module],
    build: Callable[[], nn.Module],
    files: list[Path],
    kind: str,
    folder: Path,
    device: torch.device,
    tell: Callable[[str], None],
) -> nn.Module:
    """What `make` makes of `files`, kept in `folder` to the bit.

    The same files by resolved name, size and time are taken to be the same. What is kept is hashed before it is used, at 1 to 2
    GB a second: damage is told, and it is made again. Where it can not be kept, that is told too.

    Args:
        build: as in `load_quantized`. tell: takes a line for the user.
    """
    facts = [kind, device.type]
    for file in files:
        real = file.resolve()
        facts += [str(real), str(real.stat().st_size), str(real.stat().st_mtime_ns)]
    stored = folder / f"{kind}-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:32]}.safetensors"
    try:
        problem = _problem(stored)
    except OSError as error:  # which says nothing of what is in it
        tell(f"{KEY}: {stored} can not be read ({error.strerror}); the run goes on without it")
        return make()
    if problem is None:
        try:
            return read_quantized(build, load_file(stored, device=str(device)), kind)
        except (SafetensorError, KeyError):
            problem = "is of another version"
    if problem:
        tell(f"{KEY}: {stored} {problem}; it is made again")
        _remove(stored)
    model = make()
    try:
        _write(stored, model)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        tell(f"{KEY}: {stored} can not be written ({reason}); the run goes on without it")
    return model


def _sums(stored: Path) -> Path:
    return stored.with_suffix(".json")


def _problem(stored: Path) -> str | None:
    """None: the file is as it was written. "": there is none. Else what is wrong with it; OSError where nobody can know."""
    try:
        size = stored.stat().st_size
        wanted = json.loads(_sums(stored).read_text(encoding="utf-8"))
        same = size == wanted["bytes"] and sha256(stored) == wanted["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return "has no checksum" if stored.exists() else ""
    except (ValueError, RecursionError, KeyError, TypeError):
        return "has a broken checksum"
    return None if same else "is damaged (its checksum differs)"


def _write(stored: Path, model: nn.Module) -> None:
    """The checksum is there before the file is: another process that starts meanwhile finds none, or a whole one."""
    # nf4's code books, of 16 and 256 numbers, are shared by all layers; a file wants them apart.
    apart = {name: value.clone() if value.numel() <= 256 else value for name, value in model.state_dict().items()}
    make_folder(stored.parent)
    _remove_abandoned(stored)
    check_room(stored.parent, sum(value.nbytes for value in apart.values()))
    with atomic(stored) as partial:
        save_tensors(partial, apart)
        sums = {"bytes": partial.stat().st_size, "sha256": sha256(partial)}
        write_text(_sums(stored), json.dumps(sums) + "\n")


def _remove_abandoned(stored: Path) -> None:
    """What processes of this machine that were killed have left of it. One of another machine, whose number is nobody's here,
    would tell that it can not write and go on."""
    for file in stored.parent.glob(f".*{stored.name}.*.partial"):
        try:
            os.kill(int(file.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            file.unlink(missing_ok=True)
        except OSError:  # another user's process
            pass


def _remove(stored: Path) -> None:
    for file in (stored, _sums(stored)):
        with suppress(OSError):
            file.unlink()
