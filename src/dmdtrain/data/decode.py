"""Clips as tensors, through PyAV; images through Pillow."""

from __future__ import annotations

import errno
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Colorspace, Interpolation
from PIL import Image, ImageOps, UnidentifiedImageError

from dmdtrain.data.videos import IMAGES, Unreadable, shown

LARGEST_FRAME = 2**26  # pixels: 8192 x 8192
NARROWEST = 32  # long to short edge; what is cut off beyond that would fill the memory first
# Whatever a file is called, it is opened as one of these: playlists, which can name other files and addresses, are not.
FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg,mxf,dv,rm,nut,ivf,yuv4mpegpipe"
# The same for images: others of Pillow's readers start programs (EPS) or are not what such names promise.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF")
OPTIONS: dict[str, Any] = {"options": {"format_whitelist": FORMATS}, "metadata_errors": "replace"}
# What Pillow's readers raise of broken files, besides its own errors.
BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, SyntaxError, TypeError, struct.error, zlib.error)
SLACK = 0.1  # of a frame that is asked for: some containers round time stamps to milliseconds, GIFs to hundredths
# Between RGB and YUV, to be named wherever one becomes the other: without it colours come out 1 to 3 levels too dark.
EXACT = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
)
UNSAID = 2  # the matrix of a video that names none
# How an mp4 of ours begins. If it names none it is of before, and BT.601 at every size; FFmpeg's own command, which may
# begin likewise, leaves its name.
UNTAGGED = re.compile(rb"x264 - core .* rc=crf mbtree=1 crf=12\.0 ", re.DOTALL)
HD = 720  # lines from which video that does not say so is BT.709


@dataclass(frozen=True)
class Header:
    """What a clip says of itself. Width and height in pixels as it is to be seen: upright, of square pixels."""

    width: int
    height: int
    frames: int
    seconds: float | None  # that its frames last; None: it has no time stamps


def read_header(file: Path) -> Header:
    """Decodes the first frame and counts the others; ValueError where the clip can not be used, and why: `Unreadable` where that
    may pass."""
    if file.suffix.lower() in IMAGES:
        with _image(file) as image:
            return Header(*image.size, 1, 0.0)
    with _stream(file) as (container, stream):
        frame = next(_frames(container, stream), None)
        if frame is None:
            raise ValueError("it holds no frames")
        width, height = display_size(frame, stream)
    times, count = [], 0
    with _stream(file) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size:
                    count += 1
                    times.append(None if packet.pts is None else float(packet.pts * packet.time_base))
        except av.FFmpegError:  # its end is missing: as far as it goes
            pass
        interval = _interval(stream)
    known = [time for time in times if time is not None]
    if not known or len(known) < len(times):
        return Header(width, height, count, count * interval if interval else None)
    span = max(known) - min(known)
    return Header(width, height, count, span + (interval or span / max(1, count - 1)))


def check_length(header: Header, num_frames: int, fps: float | None, image: bool, interval: int = 1) -> None:
    """ValueError where a clip has fewer than `num_frames` frames at `fps`; None: every `interval`-th of its own."""
    if image and num_frames > 1:
        raise ValueError(f"it is an image; {num_frames} frames are needed, images serve runs on one frame alone")
    if fps is None or num_frames == 1:
        needed = 1 + (num_frames - 1) * interval
        if header.frames < needed:
            raise ValueError(f"it has {header.frames} frames; {needed} are needed")
    elif header.seconds is None:
        raise ValueError("it has no time stamps, which data.fps needs")
    elif header.seconds * fps - SLACK <= num_frames - 1:
        wanted = f"{num_frames} frames at {fps:g} a second need more than {(num_frames - 1) / fps:.2f}"
        raise ValueError(f"it lasts {header.seconds:.2f} s; {wanted}")


def read_clip(
    file: Path,
    num_frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    crop: str = "center",
    place: float = 0.5,
    interval: int = 1,
) -> torch.Tensor:
    """The first frames [3, T, H, W] in [-1, 1] of a clip.

    Args:
        height, width: in pixels.
        fps: frames a second, by time stamps: each the one that is seen at its time. None: every `interval`-th frame.
        crop: center, random or none, as `data.crop`. place: of a random crop, in [0, 1).

    Raises:
        ValueError: the clip can not be used, and why; `Unreadable` where that may pass.
    """
    if file.suffix.lower() in IMAGES:
        with _image(file) as image:
            pixels = _rgb(image)
        video = _fitted(pixels, pixels.shape[1] / pixels.shape[0], height, width, crop, place)[:, None]
        check_length(Header(width, height, 1, 0.0), num_frames, fps, image=True)
        return video
    with _stream(file) as (container, stream):
        stream.thread_type = "AUTO"  # several frames at once
        kept: list[torch.Tensor] = []
        for frame, times in _chosen(_frames(container, stream), stream, num_frames, fps, interval):
            shown_width, shown_height = display_size(frame, stream)
            fitted = _fitted(_upright(frame), shown_width / shown_height, height, width, crop, place)
            kept += [fitted] * times
    if len(kept) < num_frames:
        at = f" at {fps:g} a second" if fps is not None else f", 1 in {interval}" if interval > 1 else ""
        raise ValueError(f"it has {len(kept)} frames{at}; {num_frames} are needed")
    return torch.stack(kept, 1)


def _chosen(
    frames: Iterator[Any], stream: Any, num_frames: int, fps: float | None, every: int
) -> Iterator[tuple[Any, int]]:
    """The frames that are taken, each with how often: one that is seen for long stands for several."""
    if fps is None:
        for frame in islice(frames, 0, 1 + (num_frames - 1) * every, every):
            yield frame, 1
        return
    interval = _interval(stream)
    taken, start, held, time = 0, None, None, 0.0
    for count, frame in enumerate(frames):
        now = frame.time
        if now is None:
            if interval is None:
                raise ValueError("it has no time stamps, which data.fps needs")
            now = count * interval
        start = now if start is None else start
        if held is not None:
            due = min(num_frames, max(taken, math.ceil((now - start) * fps - SLACK)))
            if due > taken:
                yield held, due - taken
                taken = due
            interval = now - start - time if interval is None else interval
        if taken == num_frames:
            return
        held, time = frame, now - start
    if held is not None:  # the last frame is seen for as long as one lasts
        due = min(num_frames, math.ceil((time + (interval or 0.0)) * fps - SLACK))
        if max(due, 1) > taken:
            yield held, max(due, 1) - taken


def _interval(stream: Any) -> float | None:
    """Seconds that a frame lasts on average; None where the stream says nothing sensible."""
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else None


def display_size(frame: Any, stream: Any) -> tuple[int, int]:
    """(width, height) in pixels as a frame is to be seen; ValueError where that is no picture."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = max(1, round(frame.width * aspect)), frame.height
    if max(width, height) > NARROWEST * min(width, height):
        raise ValueError(f"it is {width} wide and {height} high; at most {NARROWEST} to 1 is read")
    return (height, width) if _quarters(frame) % 2 else (width, height)


def _quarters(frame: Any) -> int:
    """Quarter turns to the left that set a frame upright."""
    return round(frame.rotation / 90) % 4


def _upright(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3]."""
    colorspace = "ITU709" if frame.colorspace == UNSAID and frame.height >= HD else None
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=colorspace, interpolation=EXACT)
    return np.rot90(pixels, _quarters(frame))


def _fitted(pixels: np.ndarray, aspect: float, height: int, width: int, crop: str, place: float) -> torch.Tensor:
    """A frame uint8 [h, w, 3] that is seen at `aspect` (width / height), as [3, height, width] in [-1, 1]."""
    covering = height, width
    if crop != "none":
        covering = max(height, round(width / aspect)), max(width, round(height * aspect))
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    if covering != tuple(pixels.shape[:2]):
        # In 8 bits: a level off at most, and eight times as fast as in floating point.
        image = F.interpolate(image, covering, mode="bilinear", antialias=True)
    place = place if crop == "random" else 0.5
    top, left = (int(place * (edge - size + 1)) for edge, size in zip(covering, (height, width), strict=True))
    return image[0, :, top : top + height, left : left + width].float() / 127.5 - 1


@contextmanager
def _stream(file: Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its video stream; whatever is wrong with a clip as ValueError."""
    # Through a handle: names of any bytes, and none that FFmpeg takes for an address.
    with _opened(file) as handle, _decodable():
        ours = UNTAGGED.search(handle.read(2048))
    with _opened(file) as handle, _decodable(), av.open(handle, **OPTIONS) as container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise ValueError("it holds no video")
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        _check_size(stream.codec_context.width, stream.codec_context.height)
        if ours and "encoder" not in stream.metadata and stream.codec_context.colorspace == UNSAID:
            stream.codec_context.colorspace = Colorspace.ITU601
        yield container, stream


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        if not file.is_file():  # a pipe would be waited for
            raise Unreadable("it is no file" if file.exists() else "there is no such file")
        handle = file.open("rb")
    except OSError as error:
        raise _unreadable(error) from None
    with handle:
        yield handle


def _unreadable(error: OSError) -> ValueError:
    """Pillow's own errors have no number; PyAV's of an empty file is EINVAL."""
    if error.errno in (None, errno.EINVAL):
        return _undecodable(error)
    return Unreadable(f"it can not be read: {error.strerror}")


def _undecodable(error: Exception) -> ValueError:
    return ValueError(
        f"it can not be decoded: {shown(getattr(error, 'strerror', None) or error or type(error).__name__)}"
    )


@contextmanager
def _decodable() -> Iterator[None]:
    try:
        yield
    except (av.error.ArgumentError, av.error.InvalidDataError):
        raise ValueError(f"it can not be decoded: it is broken, or none of {FORMATS}") from None
    except av.FFmpegError as error:
        raise _undecodable(error) from None
    except OSError as error:  # of the handle that FFmpeg reads from
        raise _unreadable(error) from None
    except (ArithmeticError, IndexError) as error:
        raise _undecodable(error) from None


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    for frame in container.decode(stream):
        _check_size(frame.width, frame.height)
        yield frame


def _check_size(width: int, height: int) -> None:
    if not (0 < width * height <= LARGEST_FRAME):
        raise ValueError(f"its frames have {width} x {height} pixels; valid are 1 to {LARGEST_FRAME}")


@contextmanager
def quiet_images() -> Iterator[None]:
    """Keeps Pillow from warning of odd images. Around threads, not in them: filters are the whole process's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]: grey of 16 bits scaled to 8, what is transparent on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 257
        return np.repeat(grey.round().clip(0, 255).astype(np.uint8)[..., None], 3, -1)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return np.array(image.convert("RGB"))


@contextmanager
def _image(file: Path) -> Iterator[Image.Image]:
    """An upright image; whatever is wrong with it as ValueError."""
    with _opened(file) as handle:
        try:
            with Image.open(handle, formats=IMAGE_FORMATS) as image:
                _check_size(*image.size)
                yield ImageOps.exif_transpose(image)
        except UnidentifiedImageError:
            raise ValueError(f"it can not be decoded: it is broken, or none of {', '.join(IMAGE_FORMATS)}") from None
        except Image.DecompressionBombError:
            raise ValueError(f"it has more than {LARGEST_FRAME} pixels") from None
        except OSError as error:
            raise _unreadable(error) from None
        except BROKEN as error:
            raise _undecodable(error) from None
