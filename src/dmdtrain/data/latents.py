"""Latents of captioned videos on disk: what `dmdtrain synthesize` writes and the warm-up reads.

    latents.json                 what they are and how they were made
    samples/000000.safetensors   latents [C, T, H, W] and, of trajectories, states [S, C, T, H, W]; the caption and a checksum in
                                 its header (of videos: 000000.mp4 and 000000.txt)

and, of clips, a cache that is addressed by what is in them:

    ab/ab12...safetensors        latents [C, T, H, W]; the name says from which clip they came and how, the header has a checksum

Latents are normalised (zero mean, unit deviation by the codec's statistics) and stored as float16: at their size that loses
2^-11 of a value, a tenth of what the codec does.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dmdtrain.config import ConfigError, unwritable
from dmdtrain.files import FolderLock, remove_partial, save_tensors, write_text
from dmdtrain.packing import pack, shape_of, unpack

INFO = "latents.json"


class LatentFolder:
    """A folder of latents. `facts` hold at least latent_shape [C, T, H, W] and, of trajectories, timesteps [S]."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts, self.lock = path, facts, FolderLock(path)

    @classmethod
    def open(cls, path: Path, key: str) -> LatentFolder:
        """A folder that is there; ConfigError naming `key` where it is not one."""
        try:
            facts = json.loads((path / INFO).read_text(encoding="utf-8"))
            facts["what"], facts["latent_shape"], facts["timesteps"]
        except FileNotFoundError:
            raise ConfigError(f"{key}: {path}: no {INFO} in it; make one with dmdtrain synthesize") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{key}: {path}: {INFO} is broken: {error}") from None
        return cls(path, facts)

    @classmethod
    def create(cls, path: Path, facts: dict[str, Any], key: str) -> LatentFolder:
        """A new folder, or the same one to go on with, alone or beside others; ConfigError where it holds something else."""
        if (path / INFO).exists():
            found = cls.open(path, key).facts
            other = [name for name in facts if found.get(name) != facts[name]]
            if other:
                name = other[0]
                raise ConfigError(
                    f"{key}: {path} was made otherwise ({name}: {found.get(name)!r}, now {facts[name]!r}); choose another"
                )
        elif path.exists() and (not path.is_dir() or any(not f.name.startswith(f".{INFO}.") for f in path.iterdir())):
            raise ConfigError(f"{key}: {path} exists and holds no latents; choose another")
        folder = cls(path, facts)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / INFO, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
            (path / "samples").mkdir(exist_ok=True)
            if folder.lock.take(alone=True):
                remove_partial(path / "samples")
            folder.lock.take()
        except OSError as error:
            raise unwritable(key, path, error) from None
        return folder

    def file(self, index: int) -> Path:
        suffix = "mp4" if self.facts["what"] == "videos" else "safetensors"
        return self.path / "samples" / f"{index:06d}.{suffix}"

    def missing(self, count: int) -> list[int]:
        return [index for index in range(count) if not self.file(index).exists()]

    def files(self) -> list[Path]:
        return sorted((self.path / "samples").glob("[0-9]*.safetensors"))

    def write(self, index: int, caption: str, latents: torch.Tensor, states: torch.Tensor | None = None) -> None:
        tensors = {"latents": latents} if states is None else {"latents": latents, "states": states}
        halves = {name: value.half().cpu().contiguous() for name, value in tensors.items()}
        save_tensors(
            self.file(index), halves, {"caption": caption, "sha256": _checksum(*halves.values(), caption=caption)}
        )


def holds_latents(path: Path, key: str) -> bool:
    """Whether `dmdtrain synthesize` made latents there; what else a folder can hold are clips."""
    return (path / INFO).exists() and LatentFolder.open(path, key).facts["what"] != "videos"


class LatentCache:
    """Latents by name. Files are complete or not there, whenever a writer is killed and however many write.

    Args:
        compress: what is written from here on; both kinds are read.
    """

    def __init__(self, path: Path, compress: bool = False):
        self.path, self.compress, self.lock = path, compress, FolderLock(path)

    def file(self, name: str) -> Path:
        return self.path / name[:2] / f"{name}.safetensors"

    def names(self) -> set[str]:
        """What is there, and from here on stays: nobody else can prune it while this process runs."""
        if not self.lock.held:
            self.lock.take()
        return {file.stem for file in self.path.glob("[0-9a-f][0-9a-f]/*.safetensors")}

    def write(self, name: str, latents: torch.Tensor) -> None:
        """Where it can not be written, the error is that of `unwritable`."""
        half, file = latents.half().cpu().contiguous(), self.file(name)
        metadata = {"sha256": _checksum(half)}
        if self.compress:
            metadata |= {"packed": json.dumps(shape_of(half))}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not self.lock.held:
                self.lock.take()
            save_tensors(file, {"latents": pack(half) if self.compress else half}, metadata)
        except OSError as error:
            raise unwritable("data.cache_dir", file, error) from None

    def read(self, names: list[str]) -> torch.Tensor:
        """[B, C, T, H, W] in float32.

        Raises:
            ConfigError: a file has gone, can not be read, or was damaged and is removed.
        """
        found: list[torch.Tensor] = []
        for name in names:
            if problem := self.check(name, found):
                self.remove(name)
                raise ConfigError(
                    f"{self.file(name)}: {problem}; it was removed, and the same command encodes it again; `dmdtrain "
                    "prepare CONFIG --verify` finds and remakes all that are damaged"
                )
        return torch.stack(found).float()

    def check(self, name: str, found: list[torch.Tensor] | None = None) -> str | None:
        """What is wrong with a file, or None; its latents are added to `found`.

        Raises:
            ConfigError: it has gone or can not be read, which says nothing of what is in it.
        """
        file = self.file(name)
        try:
            file.open("rb").close()  # safetensors takes every refusal of the system for a missing file
            with safe_open(file, "pt") as handle:
                latents, metadata = handle.get_tensor("latents"), handle.metadata()
                wanted = metadata["sha256"]
                if "packed" in metadata:
                    latents = unpack(latents, *json.loads(metadata["packed"]))
        except FileNotFoundError:
            raise ConfigError(f"data.cache_dir: {file} has gone; the same command makes it again") from None
        except OSError as error:
            raise ConfigError(f"data.cache_dir: {file} can not be read ({error.strerror or error})") from None
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, zlib.error) as error:
            return f"it can not be read: {error}"
        if _checksum(latents) != wanted:
            return "it is damaged (its checksum differs)"
        if found is not None:
            found.append(latents)
        return None

    def remove(self, name: str) -> None:
        self.file(name).unlink(missing_ok=True)

    def leftovers(self) -> list[Path]:
        """What writers that were killed have left, and those that write just now."""
        return sorted(self.path.glob("[0-9a-f][0-9a-f]/.*.partial"))


def _checksum(*tensors: torch.Tensor, caption: str = "") -> str:
    digest = hashlib.sha256(caption.encode())
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise _broken(file, error) from None


def _broken(file: Path, what: object) -> ConfigError:
    return ConfigError(f"{file} is broken: {what}; delete it and run dmdtrain synthesize again")


def read_captions(files: list[Path]) -> list[str]:
    captions = []
    for file in files:
        with _opened(file) as handle:
            captions.append(handle.metadata()["caption"])
    return captions


def read_latents(files: list[Path], num_frames: int) -> tuple[list[str], torch.Tensor, torch.Tensor | None]:
    """Captions, latents [B, C, T, H, W] and states [S, B, C, T, H, W] in float32, of the first `num_frames` frames.

    Raises:
        ConfigError: a file is broken, or not what was written.
    """
    captions, latents, states = [], [], []
    for file in files:
        with _opened(file) as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in ("latents", "states") if name in handle.keys()}  # noqa: SIM118
            captions.append(metadata["caption"])
            latents.append(tensors["latents"][:, :num_frames].float())
            wanted = metadata.get("sha256")  # samples of earlier versions have none
        if wanted is not None and _checksum(*tensors.values(), caption=captions[-1]) != wanted:
            raise _broken(file, "its checksum differs")
        if "states" in tensors:
            states.append(tensors["states"][:, :, :num_frames].float())
    return captions, torch.stack(latents), torch.stack(states, 1) if states else None
