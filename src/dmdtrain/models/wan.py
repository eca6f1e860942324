"""Wan model folders in Diffusers format: finding, checking and loading their parts."""

from __future__ import annotations

import gc
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from dmdtrain.config import ConfigError, reading
from dmdtrain.models.checks import (
    CLASSES,
    BadFolder,
    check_finite,
    check_folder,
    check_weights,
    empty_model,
    make_scheduler,
    weight_files,
)

if TYPE_CHECKING:
    import torch

WAN_TINY = "wan-tiny"
CONTACT = 10.0  # seconds in which the hub has to answer at all


@dataclass(frozen=True)
class WanFolder:
    """A checked model folder and what its configs say; no weights are loaded."""

    path: Path
    name: str  # as the user wrote it
    hub: bool  # `path` is a snapshot from the hub that so far holds configs alone
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def latent_channels(self) -> int:
        return self.transformer["in_channels"]

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent (frames, height, width) of a token."""
        return tuple(self.transformer["patch_size"])  # type: ignore[return-value]

    @property
    def positions(self) -> int:
        """Tokens along each axis that the model has rotary positions for."""
        return self.transformer.get("rope_max_seq_len", 1024)

    @property
    def spatial_factor(self) -> int:
        return self.vae.get("scale_factor_spatial", 8)

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this: codec times patch, and what `WanPipeline` asks for."""
        return math.lcm(16, *(self.spatial_factor * edge for edge in self.patch_size[1:]))

    @property
    def fps(self) -> int:
        """Frames a second that the model makes; its folder does not say. Wan 2.2 5B, known by its codec, was trained at 24."""
        return 24 if self.spatial_factor == 16 else 16

    @property
    def flow_shift(self) -> float:
        """Shift of the folder's own sampling schedule."""
        return self.scheduler.get("flow_shift") or self.scheduler.get("shift") or 1.0

    def latent_shape(self, num_latent_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[C, T, H, W] of a video's latents; height and width in pixels."""
        return (self.latent_channels, num_latent_frames, height // self.spatial_factor, width // self.spatial_factor)


def find_folder(name: str, key: str) -> WanFolder:
    """The checked folder for a path, a hub id or `wan-tiny`.

    Raises:
        ConfigError: not found, not a Wan text-to-video folder, or a part of it is missing or broken.
    """
    path, hub = locate(name, key)
    try:
        configs = check_folder(path, weights=not hub)
    except BadFolder as error:
        raise ConfigError(f"{key}: {name}: {error}") from None
    return WanFolder(path, name, hub, *(configs[part] for part in ("transformer", "vae", "text_encoder", "scheduler")))


def locate(name: str, key: str) -> tuple[Path, bool]:
    """The folder for a path, a hub id or `wan-tiny`, unchecked, and whether it is a snapshot from the hub. Imports nothing heavy.

    Raises:
        ConfigError: not found.
    """
    if name == WAN_TINY:
        return Path(str(files("dmdtrain") / "assets" / WAN_TINY)), False
    path = Path(name).expanduser()
    with reading(key):
        if path.is_dir():
            return path, False
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"{key}: {name}: no such folder; valid are a Diffusers folder, org/name or {WAN_TINY}")
    return _download(name, ["*.json", "tokenizer/*"], key), True


def _download(name: str, patterns: list[str], key: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    unreachable = _unreachable(name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=unreachable is not None))
    except Exception as error:  # the hub raises many kinds; all mean that the model can not be had
        said = f"{key}: {name}: no such folder here, and the hub"
        if unreachable is None:
            raise ConfigError(f"{said} did not give it: {str(error).strip().splitlines()[0]}") from None
        raise ConfigError(
            f"{said} can not be reached ({unreachable}); give the path of a folder that holds the model, or set HF_HOME to that "
            f"of a cache that does (looked in {constants.HF_HUB_CACHE}); HF_HUB_OFFLINE=1 asks no server"
        ) from None


@cache
def _unreachable(name: str) -> str | None:
    """Why the hub gives no answer; None: it does. Asked once, within `CONTACT` in all: a download's own limits are long, and hold
    anew for each address of the host and each try."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    problem: list[str] = [f"no answer in {CONTACT:g} s"]

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=CONTACT)
        except (HfHubHTTPError, HFValidationError):
            pass  # an answer, which the download will get and tell
        except Exception as error:  # of whichever library it connects by
            problem[0] = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return
        problem.clear()

    asking = Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(CONTACT)
    return next(iter(problem), None)


def load_transformer(
    folder: WanFolder,
    precision: str,
    attention: str = "native",
    quantize_on: torch.device | None = None,
    quantized_cache: Path | None = None,
    tell: Callable[[str], None] = print,
) -> Any:
    """A frozen `WanTransformer3DModel`.

    precision: fp32, bf16, or a kind of `models.quantize`, for the blocks' linear layers over bf16. Time embedder, norms and
    modulation stay in float32 whatever it is. quantize_on: where layers are quantized as they are read; None: the CPU.
    quantized_cache: folder in which what was quantized is kept, and found the next time. tell: takes a line for the user where
    that fails.
    """
    from diffusers import WanTransformer3DModel

    if precision in ("fp32", "bf16"):
        model = _loaded(WanTransformer3DModel, folder, "transformer", torch_dtype=_dtype(precision))
    else:
        build = lambda: WanTransformer3DModel.from_config(folder.transformer)  # noqa: E731
        model = _loaded_quantized(build, folder, "transformer", precision, "blocks", quantize_on, quantized_cache, tell)
    model.set_attention_backend(attention)  # native, too: without, it is what the process or its environment says
    return model.requires_grad_(False).eval()


def _dtype(precision: str) -> Any:
    import torch

    return torch.float32 if precision == "fp32" else torch.bfloat16


def load_vae(folder: WanFolder) -> Any:
    """The codec in float32, frozen."""
    import torch
    from diffusers import AutoencoderKLWan

    return _loaded(AutoencoderKLWan, folder, "vae", torch_dtype=torch.float32).requires_grad_(False).eval()


@contextmanager
def codec(folder: WanFolder, device: torch.device) -> Iterator[Any]:
    """The VAE on a device, loaded for the while and freed after it."""
    import torch

    vae = load_vae(folder).to(device)
    try:
        yield vae
    finally:
        vae.to("meta")  # who was given it may still have a name for it
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def load_text_encoder(folder: WanFolder, precision: str, quantize_on: torch.device | None = None) -> tuple[Any, Any]:
    """(tokenizer, frozen UMT5 encoder); precision and quantize_on as in `load_transformer`."""
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it reports of weights in tables, an error says in one line
    tokenizer = _load_tokenizer(folder)
    if precision in ("fp32", "bf16"):
        encoder = _loaded(UMT5EncoderModel, folder, "text_encoder", dtype=_dtype(precision))
    else:
        build = lambda: UMT5EncoderModel(UMT5Config.from_pretrained(folder.path / "text_encoder"))  # noqa: E731
        encoder = _loaded_quantized(build, folder, "text_encoder", precision, "", quantize_on)
    return tokenizer, encoder.requires_grad_(False).eval()


def _load_tokenizer(folder: WanFolder) -> Any:
    """Never runs Python that lies in the folder: Transformers would offer that at a terminal."""
    from transformers import AutoTokenizer

    path = folder.path / "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself; all mean that it can not be had
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = f"{path / 'tokenizer_config.json'} asks for Python of its own (auto_map), which is not run"
        raise ConfigError(f"{folder.name}: tokenizer can not be loaded: {reason}") from None
    rows = folder.text_encoder.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise ConfigError(f"{folder.name}: tokenizer knows {len(tokenizer)} tokens, the text encoder {rows}")
    if tokenizer.pad_token is None:
        raise ConfigError(f"{folder.name}: tokenizer/tokenizer_config.json names no pad_token")
    return tokenizer


def load_scheduler(folder: WanFolder, shift: float | None = None) -> Any:
    """The folder's own sampling scheduler, with another shift where one is given."""
    return make_scheduler(folder.scheduler, shift)


def part_folder(folder: WanFolder, part: str) -> Path:
    """Where a part lies, weights included: those of a hub model are fetched when they are first needed."""
    if folder.hub:
        _download(folder.name, [f"{part}/*"], part)
        if part in CLASSES:
            try:
                check_weights(folder.path / part, empty_model(part, getattr(folder, part)))
            except BadFolder as error:
                raise ConfigError(f"{folder.name}: {error}") from None
    return folder.path / part


def _loaded(cls: Any, folder: WanFolder, part: str, **options: Any) -> Any:
    part_folder(folder, part)
    try:
        model, found = cls.from_pretrained(
            folder.path, subfolder=part, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # NotImplementedError, of missing tensors, is one
        raise ConfigError(f"{folder.name}: {part} can not be loaded: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:  # safetensors' own error has no public base class
        if type(error).__name__ != "SafetensorError":
            raise
        raise ConfigError(f"{folder.name}: {part} holds broken weights: {error}") from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise ConfigError(f"{folder.name}: {part} lacks weights: {missing[0]} ({len(missing)} in all)")
    try:
        for name, value in model.named_parameters():
            check_finite(name, value)
    except BadFolder as error:
        raise ConfigError(f"{folder.name}: {part} holds {error}") from None
    return model


def _loaded_quantized(
    build: Callable[[], Any],
    folder: WanFolder,
    part: str,
    kind: str,
    inside: str,
    device: torch.device | None,
    cache: Path | None = None,
    tell: Callable[[str], None] = print,
) -> Any:
    import torch

    from dmdtrain.models.quantize import load_quantized
    from dmdtrain.models.quantized_cache import cached_quantized

    path = part_folder(folder, part)
    where = device or torch.device("cpu")
    try:
        weights = weight_files(path)
        make = lambda: load_quantized(build, weights, kind, inside, torch.bfloat16, where)  # noqa: E731
        return make() if cache is None else cached_quantized(make, build, weights, kind, cache, where, tell)
    except KeyError as error:
        raise ConfigError(f"{folder.name}: {part} lacks weights: {error.args[0]}") from None
    except ValueError as error:
        raise ConfigError(f"{folder.name}: {part} can not be loaded: {error}") from None
    except Exception as error:  # safetensors' own error has no public base class
        if type(error).__name__ != "SafetensorError":
            raise
        raise ConfigError(f"{folder.name}: {part} holds broken weights: {error}") from None


def update_with_weights(digest: Any, folder: Path) -> None:
    """Adds each safetensors file's size and 256 pieces spread over it: training changes every one of them."""
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as handle:
            for offset in range(0, size, max(4096, size // 256)):
                handle.seek(offset)
                digest.update(handle.read(4096))


def transformer_digest(path: Path) -> str:
    """What the transformer of a model folder is, by its weights, of which pieces are read."""
    digest = hashlib.sha256()
    update_with_weights(digest, path / "transformer")
    return digest.hexdigest()
