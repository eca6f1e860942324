"""Real clips for tests, made with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LOSSLESS = ("ffv1", "bgr0")
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"svtav1-params": "tile-columns=0"}}


def scene(number: int, height: int, width: int) -> np.ndarray:
    """Four corners of four colours, and brightness that tells the frame's number: uint8 [H, W, 3]."""
    corners = np.array([[[220, 40, 40], [40, 200, 40]], [[40, 60, 220], [230, 230, 230]]], float)
    rows, columns = (np.arange(edge) * 2 // edge for edge in (height, width))
    return (corners[rows][:, columns] * (0.5 + 0.5 * ((number * 5) % 16) / 15)).round().astype(np.uint8)


def write_clip(
    file: Path,
    count: int = 5,
    size: tuple[int, int] = (32, 48),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int | Fraction = 16,
    times: list[float] | None = None,
    rotation: int | None = None,
    aspect: Fraction | None = None,
    caption: str | None = "a red cat runs",
    frames: list[np.ndarray] | None = None,
    colorspace: str | None = None,
    options: dict[str, str] | None = None,
    matrix: list[int] | None = None,
    colours: dict[str, int] | None = None,
) -> Path:
    """A clip of `scene`s with its caption beside it. size: (height, width). times: of the frames, in seconds, where they are
    not evenly spaced. rotation: degrees counterclockwise by which players turn it; or matrix: FFmpeg's display matrix. aspect: of
    a pixel. frames: uint8 with 3 or 4 channels, or uint16 with 3. colours: what the clip says of them, by FFmpeg's numbers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        options = ({"crf": "4"} if codec == "libx264" else QUIET.get(codec, {})) | (options or {})
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for name, value in (colours or {}).items():
            setattr(stream.codec_context, name, value)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number in range(count):
            image = scene(number, *size) if frames is None else frames[number]
            kind = "rgb48le" if image.dtype == np.uint16 else "rgba" if image.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(image, format=kind)
            if colorspace is not None:
                frame = frame.reformat(format=pixels, dst_colorspace=colorspace)
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)
    return file
