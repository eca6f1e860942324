"""Clips as tensors, through PyAV; images and animations of images through Pillow."""

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
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from PIL import Image, ImageOps, UnidentifiedImageError

from dmdtrain.data.frames import NO_TIMES, Video, monotone
from dmdtrain.data.picture import (
    LARGEST_FRAME,
    UNSAID,
    check_size,
    deinterlaced,
    display_size,
    fitted,
    is_wide,
    picture,
    to_bt709,
)
from dmdtrain.data.videos import IMAGES, Unreadable, shown

# Whatever a file is called, it is opened as one of these: playlists, which can name other files and addresses, are not.
FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg,mxf,dv,rm,nut,ivf,yuv4mpegpipe"
# The same for images: others of Pillow's readers start programs (EPS) or are not what such names promise.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF")
OPTIONS: dict[str, Any] = {"options": {"format_whitelist": FORMATS}, "metadata_errors": "replace"}
# What Pillow's readers raise of broken files, besides its own errors.
BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, SyntaxError, TypeError, struct.error, zlib.error)
SLACK = 0.1  # of a frame that is asked for: some containers round time stamps to milliseconds, GIFs to hundredths
SHORTEST = 10  # milliseconds; a picture of an animation that lasts no longer lasts 100, as in browsers
# How an mp4 of ours begins. If it names no matrix it is of before, and BT.601 at every size; FFmpeg's own command, which may
# begin likewise, leaves its name.
UNTAGGED = re.compile(rb"x264 - core .* rc=crf mbtree=1 crf=12\.0 ", re.DOTALL)


@dataclass(frozen=True)
class Header:
    """What a clip says of itself. Width and height in pixels as it is to be seen: upright, of square pixels."""

    width: int
    height: int
    frames: int
    seconds: float | None  # that its frames last; None: it has no time stamps
    interlaced: bool = False  # its first frame is


def read_header(file: Path) -> Header:
    """Decodes the first frame and counts the others; ValueError where the clip can not be used, and why: `Unreadable` where that
    may pass."""
    if file.suffix.lower() in IMAGES:
        with _image(file) as image:
            lasting = _durations(image)
            return Header(*ImageOps.exif_transpose(image).size, len(lasting), sum(lasting))
    with _video(file) as video:
        frame = next(video.frames(), None)
        if frame is None:
            raise ValueError(video.damage or "it holds no frames that can be decoded")
        width, height = display_size(frame, video.stream)
        interlaced = frame.interlaced_frame
    with _video(file) as video:
        stamps, interval = video.stamps(), video.interval
    count = len(stamps)
    try:
        *_, span = monotone(stamps, interval)
    except ValueError:
        return Header(width, height, count, None, interlaced)
    if interval and None in stamps:  # those that are known may be of frames seen before the last
        span = max(span, (count - 1) * interval)
    return Header(width, height, count, span + (interval or span / max(1, count - 1)), interlaced)


def check_length(header: Header, num_frames: int, fps: float | None, image: bool, interval: int = 1) -> None:
    """ValueError where a clip has fewer than `num_frames` frames at `fps`; None: every `interval`-th of its own."""
    if image and num_frames > 1:
        raise ValueError(f"it is an image; {num_frames} frames are needed, images serve runs on one frame alone")
    if fps is None or num_frames == 1:
        needed = 1 + (num_frames - 1) * interval
        if header.frames < needed:
            raise ValueError(f"it has {header.frames} frames; {needed} are needed")
    elif header.seconds is None:
        raise ValueError(NO_TIMES)
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

    def fit(pixels: np.ndarray, shown_width: int, shown_height: int) -> torch.Tensor:
        return fitted(pixels, shown_width / shown_height, height, width, crop, place)

    def from_image() -> list[torch.Tensor]:
        with _image(file) as image:
            lasting = _durations(image)
            check_length(Header(*image.size, len(lasting), sum(lasting)), num_frames, fps, len(lasting) == 1, interval)
            chosen = _chosen(_pictures(image, lasting), lasting[-1], num_frames, fps, interval)
            return [made for _, seen, times in chosen for made in [fit(_rgb(seen), *seen.size)] * times]

    def from_video(threads: bool) -> tuple[list[torch.Tensor], str | None]:
        """And what is wrong with them or with the one after them."""
        kept, last = list[torch.Tensor](), -1
        with _video(file) as video:
            timed = video.timed(threads) if fps is not None else ((frame, 0.0) for frame in video.frames(threads))
            frames = deinterlaced(timed)
            for number, frame, times in _chosen(frames, video.interval, num_frames, fps, interval):
                made = fit(picture(frame), *display_size(frame, video.stream))
                kept += [to_bt709(made, frame) if is_wide(frame) else made] * times
                last = number
            return kept, video.damage if len(kept) < num_frames else video.damage_to(last, frames)

    damage = None
    if file.suffix.lower() in IMAGES:
        kept = from_image()
    else:
        kept, damage = from_video(threads=True)
        if damage:  # threads tell of it too early
            kept, damage = from_video(threads=False)
    if damage:
        raise ValueError(damage)
    if len(kept) < num_frames:
        at = f" at {fps:g} a second" if fps is not None else f", 1 in {interval}" if interval > 1 else ""
        raise ValueError(f"it has {len(kept)} frames{at}; {num_frames} are needed")
    return torch.stack(kept, 1)


def _chosen(
    frames: Iterator[tuple[Any, float]], interval: float | None, num_frames: int, fps: float | None, every: int
) -> Iterator[tuple[int, Any, int]]:
    """The frames that are taken, each with its number and how often: one that is seen for long stands for several.

    Args:
        frames: with seconds since the first, which never run backwards. interval: seconds that the last one is seen for.
    """
    if fps is None:
        for number, (frame, _) in islice(enumerate(frames), 0, 1 + (num_frames - 1) * every, every):
            yield number, frame, 1
        return
    taken, held, time, number = 0, None, 0.0, -1
    for number, (frame, now) in enumerate(frames):
        if held is not None:
            due = min(num_frames, max(taken, math.ceil(now * fps - SLACK)))
            if due > taken:
                yield number - 1, held, due - taken
                taken = due
            interval = now - time if interval is None else interval
        if taken == num_frames:
            return
        held, time = frame, now
    if held is not None:
        due = max(1, min(num_frames, math.ceil((time + (interval or 0.0)) * fps - SLACK)))
        if due > taken:
            yield number, held, due - taken


@contextmanager
def _video(file: Path) -> Iterator[Video]:
    """An open video; whatever is wrong with it as ValueError."""
    # Through a handle: names of any bytes, and none that FFmpeg takes for an address.
    with _opened(file) as handle, _decodable():
        ours = UNTAGGED.search(handle.read(2048))
    with _opened(file) as handle, _decodable(), av.open(handle, **OPTIONS) as container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise ValueError("it holds no video")
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        check_size(stream.codec_context.width, stream.codec_context.height)
        if ours and "encoder" not in stream.metadata and stream.codec_context.colorspace == UNSAID:
            stream.codec_context.colorspace = Colorspace.ITU601
        yield Video(container, stream)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        if not file.is_file():  # a pipe would be waited for
            raise Unreadable("it is no file" if file.exists() else "there is no such file")
        if not file.stat().st_size:
            raise ValueError("it is an empty file")
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


def _durations(image: Image.Image) -> list[float]:
    """Seconds that each picture of an animation lasts; of an image that is none: one of 0."""
    numbers = _numbers(image)
    if len(numbers) == 1:
        return [0.0]
    found = []
    for number in numbers:
        image.seek(number)
        image.load()  # WebP tells its duration then
        lasting = image.info.get("duration", 0)
        found.append((lasting if lasting > SHORTEST else 100) / 1000)
    return found


def _numbers(image: Image.Image) -> range:
    """Of the pictures of an animation; without that which APNG has for those who cannot show it."""
    if image.format not in ("PNG", "WEBP", "AVIF"):  # in JPEG they are other views of the picture
        return range(1)
    return range(int(getattr(image, "default_image", False)), getattr(image, "n_frames", 1))


def _pictures(image: Image.Image, lasting: list[float]) -> Iterator[tuple[Image.Image, float]]:
    """The pictures of an animation, upright, with their seconds since the first."""
    for number, start in zip(_numbers(image), accumulate(lasting, initial=0.0), strict=False):
        image.seek(number)
        yield ImageOps.exif_transpose(image), start  # a copy, which stays as it is


@contextmanager
def _image(file: Path) -> Iterator[Image.Image]:
    """An open image; whatever is wrong with it as ValueError."""
    with _opened(file) as handle:
        try:
            with Image.open(handle, formats=IMAGE_FORMATS) as image:
                check_size(*image.size)
                yield image
        except UnidentifiedImageError:
            raise ValueError(f"it can not be decoded: it is broken, or none of {', '.join(IMAGE_FORMATS)}") from None
        except Image.DecompressionBombError:
            raise ValueError(f"it has more than {LARGEST_FRAME} pixels") from None
        except OSError as error:
            raise _unreadable(error) from None
        except BROKEN as error:
            raise _undecodable(error) from None
