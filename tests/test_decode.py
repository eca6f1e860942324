"""Clips and images of many kinds as tensors."""

from __future__ import annotations

import os
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from clip_files import LOSSLESS, scene, write_clip
from PIL import Image

from dmdtrain.data.decode import Header, check_length, quiet_images, read_clip, read_header
from dmdtrain.data.videos import SUFFIXES

CODECS = [
    ("a.mp4", "libx264", "yuv420p", (38, 50)),
    ("a.m4v", "libx264", "yuv444p", (38, 50)),
    ("a.MOV", "prores", "yuv422p10le", (38, 50)),
    ("a.mkv", "libx265", "yuv420p10le", (70, 98)),
    ("a.webm", "libvpx-vp9", "yuv420p", (38, 50)),
    ("a.mkv", "libsvtav1", "yuv420p10le", (64, 66)),
    ("a.avi", "mpeg4", "yuv420p", (38, 50)),
    ("a.mkv", *LOSSLESS, (37, 51)),
    ("a.gif", "gif", "rgb8", (37, 51)),
]


def pixels(video: torch.Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, H, W, 3] in [0, 255]."""
    return ((video.permute(1, 2, 3, 0) + 1) * 127.5).numpy()


def numbers(video: torch.Tensor) -> list[int]:
    """Which frames of `scene` a clip's frames are, by their bright corner."""
    bright = pixels(video)[:, -8:, -8:].mean(axis=(1, 2, 3))
    known = np.array([scene(number, 2, 2)[1, 1].mean() for number in range(16)])
    return [int(np.abs(known - value).argmin()) for value in bright]


@pytest.mark.parametrize(("name", "codec", "pixel_format", "size"), CODECS)
def test_codecs_and_pixel_formats(tmp_path, name, codec, pixel_format, size):
    rate = 10 if codec == "gif" else 16  # a GIF counts hundredths of a second
    file = write_clip(tmp_path / name, 6, size, codec, pixel_format, rate)
    header = read_header(file)
    assert (header.height, header.width, header.frames) == (*size, 6)
    assert header.seconds == pytest.approx(6 / rate, abs=0.01)
    found = pixels(read_clip(file, 5, *size))
    assert found.shape == (5, *size, 3)
    wanted = np.stack([scene(number, *size) for number in range(5)]).astype(float)
    away = np.abs(found - wanted)
    # Colours blur where chroma is subsampled and a gif has 256 of them: means tell a wrong matrix or range, turn or order.
    assert away.mean() < (24 if codec == "gif" else 0.01 if codec == "ffv1" else 7), away.mean()


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotated_clips_are_set_upright(tmp_path, rotation, turns):
    file = write_clip(tmp_path / "a.mp4", 2, (32, 48), rotation=rotation)
    wanted = np.rot90(scene(0, 32, 48), turns)
    header = read_header(file)
    assert (header.height, header.width) == wanted.shape[:2]
    found = pixels(read_clip(file, 1, *wanted.shape[:2]))[0]
    assert np.abs(found - wanted).mean() < 7


def test_pixels_that_are_not_square(tmp_path):
    file = write_clip(tmp_path / "a.mp4", 1, (32, 32), aspect=Fraction(2))
    assert read_header(file) == Header(64, 32, 1, pytest.approx(1 / 16))
    found = pixels(read_clip(file, 1, 32, 64))[0]  # nothing is cut off
    assert np.abs(found - scene(0, 32, 64)).mean() < 7


@pytest.mark.parametrize("colorspace", ["ITU601", "ITU709"])
def test_colours_of_large_clips_without_a_tag_are_bt_709(tmp_path, colorspace):
    size = (720, 32)
    file = write_clip(tmp_path / "a.mkv", 1, size, "ffv1", "yuv444p", colorspace=colorspace)
    away = np.abs(pixels(read_clip(file, 1, *size))[0] - scene(0, *size)).mean()
    assert away < 2 if colorspace == "ITU709" else away > 3


# ---------------------------------------------------------------------------------------------------- frames by time


@pytest.mark.parametrize(
    ("rate", "fps", "wanted"),
    [
        (16, None, [0, 1, 2, 3, 4]),
        (16, 16, [0, 1, 2, 3, 4]),
        (16, 8, [0, 2, 4, 6, 8]),
        (24, 16, [0, 1, 3, 4, 6]),
        (Fraction(30000, 1001), 15, [0, 2, 4, 6, 8]),  # a little slower than 30
        (8, 16, [0, 0, 1, 1, 2]),
        (16, 0.5, None),
    ],
)
def test_frames_are_those_seen_at_their_times(tmp_path, rate, fps, wanted):
    file = write_clip(tmp_path / "a.mkv", 10, (32, 32), *LOSSLESS, rate=rate)
    if wanted is None:
        with pytest.raises(ValueError, match=r"it has 1 frames at 0.5 a second; 5 are needed"):
            read_clip(file, 5, 32, 32, fps)
        with pytest.raises(ValueError, match=r"it lasts 0.6. s; 5 frames at 0.5 a second need more than 8.00"):
            check_length(read_header(file), 5, fps, image=False)
    else:
        assert numbers(read_clip(file, 5, 32, 32, fps)) == wanted
        check_length(read_header(file), 5, fps, image=False)


def test_every_other_frame(tmp_path):
    file = write_clip(tmp_path / "a.mkv", 9, (32, 32), *LOSSLESS)
    assert numbers(read_clip(file, 3, 32, 32, interval=4)) == [0, 4, 8]
    assert numbers(read_clip(file, 4, 32, 32, interval=2)) == [0, 2, 4, 6]
    check_length(read_header(file), 3, None, image=False, interval=4)
    with pytest.raises(ValueError, match="it has 9 frames; 10 are needed"):
        check_length(read_header(file), 4, None, image=False, interval=3)
    with pytest.raises(ValueError, match="it has 3 frames, 1 in 4; 4 are needed"):
        read_clip(file, 4, 32, 32, interval=4)


def test_a_variable_frame_rate_goes_by_time_stamps(tmp_path):
    times = [0.0, 0.05, 0.5, 0.53, 0.56, 1.2]  # seconds
    file = write_clip(tmp_path / "a.mkv", 6, (32, 32), *LOSSLESS, times=times)
    # seen at 0, 0.25, 0.5, 0.75, 1, 1.25
    assert numbers(read_clip(file, 5, 32, 32, 4)) == [0, 1, 2, 4, 4]
    assert numbers(read_clip(file, 6, 32, 32, None)) == [0, 1, 2, 3, 4, 5]


def test_a_clip_that_starts_late_and_one_that_is_exactly_long_enough(tmp_path):
    late = write_clip(tmp_path / "a.mkv", 5, (32, 32), *LOSSLESS, times=[7 + n / 16 for n in range(5)])
    assert numbers(read_clip(late, 5, 32, 32, 16)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="it has 5 frames; 6 are needed"):
        read_clip(late, 6, 32, 32)


# ---------------------------------------------------------------------------------------------------- cutting


def test_crops_by_hand(tmp_path):
    columns = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (32, 64, 3)).copy()
    file = write_clip(tmp_path / "a.mkv", 1, (32, 64), *LOSSLESS, frames=[columns])
    first = lambda crop, place=0.5: pixels(read_clip(file, 1, 32, 32, None, crop, place))[0, 0, :, 0]  # noqa: E731
    assert np.allclose(first("center"), 4 * np.arange(16, 48), atol=0.01)
    assert np.allclose(first("center", 0.0), 4 * np.arange(16, 48), atol=0.01)
    assert np.allclose(first("random", 0.0), 4 * np.arange(32), atol=0.01)
    assert np.allclose(first("random", 0.999), 4 * np.arange(32, 64), atol=0.01)
    squeezed = first("none")
    assert squeezed[0] < 8 and squeezed[-1] > 244 and (np.diff(squeezed) > 0).all()


def test_small_clips_are_enlarged_and_large_ones_averaged(tmp_path):
    file = write_clip(tmp_path / "a.mkv", 1, (16, 16), *LOSSLESS)
    assert np.abs(pixels(read_clip(file, 1, 64, 64))[0] - scene(0, 64, 64)).mean() < 7
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    file = write_clip(tmp_path / "b.mkv", 1, (256, 256), *LOSSLESS, frames=[noise])
    assert pixels(read_clip(file, 1, 16, 16)).std() < 10  # of 74: no aliasing


# ---------------------------------------------------------------------------------------------------- images


def test_an_image_is_a_video_of_one_frame(tmp_path):
    file = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    Image.fromarray(scene(0, 32, 48)).save(file, quality=95, exif=exif)
    header = read_header(file)
    assert (header.height, header.width, header.frames) == (48, 32, 1)
    found = read_clip(file, 1, 48, 32)
    assert found.shape == (3, 1, 48, 32)
    assert np.abs(pixels(found)[0] - np.rot90(scene(0, 32, 48), 3)).mean() < 7
    with pytest.raises(ValueError, match="it is an image; 5 frames are needed, images serve runs on one frame alone"):
        read_clip(file, 5, 48, 32)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_images_of_other_modes(tmp_path, mode):
    values = np.full((32, 48), 200, np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(values) if mode in ("L", "I;16") else Image.fromarray(values).convert(mode)
    image.save(tmp_path / "a.png")
    found = read_clip(tmp_path / "a.png", 1, 32, 48)
    assert found.shape == (3, 1, 32, 48) and found.abs().max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P", "RGB"])
def test_grey_of_16_bits_and_what_is_transparent(tmp_path, mode):
    """Half of the range in grey; hidden colours are white, half-hidden ones half so."""
    file = tmp_path / "a.png"
    if mode == "I;16":
        Image.fromarray(np.full((32, 32), 32768, np.uint16)).save(file)
        wanted = [128, 128, 128]
    elif mode == "P":
        image = Image.new("P", (32, 32), 3)
        image.putpalette([255, 0, 0] * 4)
        image.save(file, transparency=3)
        wanted = [255, 255, 255]
    elif mode == "RGB":
        Image.new("RGB", (32, 32), "red").save(file, transparency=(255, 0, 0))
        wanted = [255, 255, 255]
    else:
        Image.new(mode, (32, 32), (255, 0, 0, 128) if mode == "RGBA" else (0, 128)).save(file)
        wanted = [255, 127, 127] if mode == "RGBA" else [127, 127, 127]
    found = read_clip(file, 1, 32, 32)
    assert np.abs(pixels(found)[0] - np.array(wanted)).max() <= 1


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "ICO", "PDF", "PPM"])
def test_an_image_is_opened_as_what_its_suffix_may_be(tmp_path, kind, monkeypatch):
    """EPS in the clothes of a PNG would start Ghostscript."""
    started, tools = tmp_path / "started", tmp_path / "tools"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    file = tmp_path / "a.png"
    Image.new("RGB", (32, 32), "red").save(file, kind)
    for read in (read_header, lambda file: read_clip(file, 1, 32, 32)):
        with pytest.raises(ValueError, match="it is broken, or none of PNG, JPEG, WEBP, BMP"):
            read(file)
    assert not started.exists()


@pytest.mark.parametrize("suffix", ["mpg", "mpeg", "ts", "flv", "wmv"])
def test_older_containers(tmp_path, suffix):
    codec = {"flv": "flv1", "wmv": "wmv2"}.get(suffix, "mpeg2video")
    file = write_clip(tmp_path / f"a.{suffix}", 25, codec=codec, rate=25)
    assert read_header(file).frames == 25 and file.suffix in SUFFIXES
    found = pixels(read_clip(file, 5, 32, 48))
    assert np.abs(found[2] - scene(2, 32, 48)).mean() < 20


def test_files_with_flipped_bytes_are_refused_in_one_way(tmp_path):
    """Whatever is wrong with a file, it is a ValueError with a reason."""
    draw, wrong = random.Random(0), Counter[str]()
    turned = Image.Exif()
    turned[0x0112], turned[0x010E] = 6, "a"  # orientation, description
    picture = Image.fromarray(scene(0, 32, 48))
    files = {kind: tmp_path / f"a.{kind}" for kind in ("jpg", "png", "webp", "gif", "mp4", "mkv")}
    for kind in ("jpg", "png", "webp"):
        picture.save(files[kind], exif=turned)
    for kind in ("gif", "mp4", "mkv"):
        write_clip(
            files[kind], 3, codec="gif" if kind == "gif" else "libx264", pixels="rgb8" if kind == "gif" else "yuv420p"
        )
    broken, reasons = [], []
    for kind, file in files.items():
        content = file.read_bytes()
        for _ in range(60):
            changed = bytearray(content)
            for at in draw.sample(range(len(content)), 3):
                changed[at] = draw.randrange(256)
            broken.append((kind, changed))
    content = files["jpg"].read_bytes()
    for at in range(content.index(b"Exif"), content.index(b"Exif") + 60):
        for value in (0, 1, 26, 255):
            broken.append(("jpg", bytearray(content[:at] + bytes([value]) + content[at + 1 :])))
    for kind, changed in broken:
        files[kind].write_bytes(changed)
        try:
            with quiet_images():
                read_header(files[kind])
                read_clip(files[kind], 1, 32, 32)
        except ValueError as error:
            wrong[kind] += 1
            reasons.append(str(error))
    assert all(reason.startswith("it") and reason.isprintable() for reason in reasons)
    assert sum(wrong.values()) > 50 and wrong["jpg"] > 20
