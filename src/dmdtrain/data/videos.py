"""Captioned clips: `clip.mp4` with its caption in `clip.txt` beside it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


def list_clips(folder: Path) -> list[Path]:
    """Clips of a folder and those below it that have a caption, in order."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    return [file for file in files if file.with_suffix(".txt").is_file()]


def read_caption(file: Path) -> str:
    """The caption beside a clip, on one line."""
    return " ".join(file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").split())


def read_clip(file: Path, num_frames: int, height: int, width: int) -> tuple[str, torch.Tensor]:
    """Caption and the first `num_frames` frames [3, T, H, W] in [-1, 1], scaled to cover the size and cropped to its middle.

    Raises:
        ValueError: the clip is broken, too short, or has no caption, and why.
    """
    caption = read_caption(file)
    if not caption:
        raise ValueError("its caption is empty")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == num_frames:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"it can not be decoded: {error}") from None
    if len(frames) < num_frames:
        raise ValueError(f"it has {len(frames)} frames; {num_frames} are needed")
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1  # [T, 3, H, W]
    scale = max(height / video.shape[2], width / video.shape[3])
    covering = [max(edge, round(scale * size)) for edge, size in zip((height, width), video.shape[2:], strict=True)]
    if tuple(covering) != tuple(video.shape[2:]):
        video = F.interpolate(video, covering, mode="bilinear", antialias=True)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return caption, video[:, :, top : top + height, left : left + width].permute(1, 0, 2, 3)
