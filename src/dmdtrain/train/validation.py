"""What validation leaves: videos, contact sheets, scores."""

from __future__ import annotations

import io
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageDraw, ImageFont

from dmdtrain.data.picture import EXACT
from dmdtrain.files import atomic, sync, write_text
from dmdtrain.miniature import clips, scorer

RESULTS = "results.json"


def score(videos: torch.Tensor, prompts: list[str]) -> dict[str, float] | None:
    """Accuracy per attribute where the prompts are the miniature's captions and the videos its size; else None."""
    captions = [clips.Caption.parse(prompt) for prompt in prompts]
    known = [caption for caption in captions if caption is not None]
    if len(known) < len(captions) or videos.shape[-1] != clips.SIZE or videos.shape[2] < 2:
        return None
    return scorer.accuracy(videos, known)


def to_frames(video: torch.Tensor, min_edge: int = 128) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]; small videos enlarged by a whole factor, to be seen at all."""
    frames = ((video.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    factor = -(-min_edge // min(frames.shape[1:3]))
    return frames.repeat(factor, 1).repeat(factor, 2)


class Mp4Writer:
    """H.264, written frame by frame beside its name and renamed when it is whole. `min_edge` as in `to_frames`.

    It is BT.709 in limited range and says so: players guess by the size what a file does not say.
    """

    def __init__(self, file: Path, fps: int, min_edge: int = 128):
        self.file, self.min_edge = file, min_edge
        self.partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        self.container = av.open(str(self.partial), "w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12"})
        self.stream.pix_fmt = "yuv420p"
        codec = self.stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def write(self, video: torch.Tensor) -> None:
        """The next frames: [3, t, H, W] in [-1, 1]."""
        frames = to_frames(video, self.min_edge)
        if not self.stream.codec_context.is_open:  # the first frames tell the size
            self.stream.height, self.stream.width = frames.shape[1:3]
        for frame in frames:
            image = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT,
            )
            self.container.mux(self.stream.encode(image))

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                self.container.mux(self.stream.encode())
            self.container.close()
            if error is None:
                sync(self.partial)
                self.partial.rename(self.file)
        finally:
            self.partial.unlink(missing_ok=True)


def write_mp4(file: Path, video: torch.Tensor, fps: int, min_edge: int = 128) -> None:
    """A whole video: [3, T, H, W] in [-1, 1]."""
    with Mp4Writer(file, fps, min_edge) as writer:
        writer.write(video)


def gif_bytes(video: torch.Tensor, fps: int) -> bytes:
    """An animated GIF, which is what TensorBoard shows. video: [3, T, H, W] in [-1, 1]."""
    images = [Image.fromarray(frame) for frame in to_frames(video)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def contact_sheet(columns: dict[str, torch.Tensor], prompts: list[str], num_shown: int = 5) -> Image.Image:
    """One row a prompt, one column a model, each with frames evenly spread over the video.

    Args:
        columns: heading -> videos [N, 3, T, H, W] in [-1, 1].
    """
    rows = {name: [to_frames(video, 64) for video in videos] for name, videos in columns.items()}
    total, height, width = next(iter(rows.values()))[0].shape[:3]
    scale = max(1, -(-max(height, width) // 192))
    height, width = height // scale, width // scale
    shown = np.linspace(0, total - 1, min(num_shown, total)).round().astype(int)
    font = ImageFont.load_default()
    gap, line, between = 8, 16, 2
    strip = (width + between) * len(shown) - between
    sheet = Image.new("RGB", (gap + (strip + gap) * len(rows), line + (height + line + gap) * len(prompts)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (name, videos) in enumerate(rows.items()):
        left = gap + c * (strip + gap)
        draw.text((left, 2), name, "black", font)
        for r, frames in enumerate(videos):
            top = line + r * (height + line + gap)
            if c == 0:
                draw.text((left, top), prompts[r], "black", font)
            for i, index in enumerate(shown):
                image = Image.fromarray(frames[index]).resize((width, height))
                sheet.paste(image, (left + i * (width + between), top + line))
    return sheet


def write_samples(
    folder: Path,
    columns: dict[str, torch.Tensor],
    prompts: list[str],
    facts: dict[str, Any],
    fps: int,
    max_shown: int = 16,
) -> dict[str, Any]:
    """mp4s, `contact_sheet.png` and `results.json` (facts, prompts, scores where the scorer fits) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, videos in columns.items():
        for i, video in enumerate(videos):
            write_mp4(folder / f"{i:03d}_{name.replace(' ', '_')}.mp4", video, fps)
    shown = {name: videos[:max_shown] for name, videos in columns.items()}
    with atomic(folder / "contact_sheet.png") as partial:
        contact_sheet(shown, prompts[:max_shown]).save(partial, "PNG")
    scores = {name: score(videos, prompts) for name, videos in columns.items()}
    results = facts | {"prompts": prompts, "scores": {k: v for k, v in scores.items() if v is not None}}
    write_text(
        folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    )  # last: the folder is complete
    return results
