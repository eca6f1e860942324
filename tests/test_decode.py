"""Clips and images of many kinds as tensors."""

from __future__ import annotations

import os
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clip_files import LOSSLESS, scene, write_clip
from PIL import Image

from dmdtrain.data.decode import Header, check_length, quiet_images, read_clip, read_header
from dmdtrain.data.frames import monotone
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


# EXIF's number of each of the eight orientations, FFmpeg's display matrix (a, b, c, d), and what is seen.
ORIENTATIONS = {
    1: ((1, 0, 0, 1), lambda p: p),
    2: ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    3: ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    4: ((1, 0, 0, -1), lambda p: p[::-1]),
    5: ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    6: ((0, 1, -1, 0), lambda p: np.rot90(p, 3)),
    7: ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    8: ((0, -1, 1, 0), lambda p: np.rot90(p)),
}


@pytest.mark.parametrize("kind", ["mp4", "interlaced.mp4", "jpg", "webp"])
@pytest.mark.parametrize("number", ORIENTATIONS)
def test_all_eight_orientations_of_clips_and_images(tmp_path, number, kind):
    (a, b, c, d), seen = ORIENTATIONS[number]
    file, wanted = tmp_path / f"a.{kind}", seen(scene(0, 32, 48))
    if kind.endswith("mp4"):
        matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
        options = {"x264-params": "tff=1"} if kind.startswith("interlaced") else {}
        write_clip(file, 2, (32, 48), matrix=matrix, options=options)
    else:
        exif = Image.Exif()
        exif[0x0112] = number
        Image.fromarray(scene(0, 32, 48)).save(file, quality=95, exif=exif)
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


SEEN = np.array([[192, 48, 32], [255, 255, 255], [48, 80, 224], [118, 118, 118]])
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # BT.2087


def pq(nits: np.ndarray) -> np.ndarray:
    """BT.2100, table 4."""
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    """BT.2100, table 5, for a display of 1000 cd/m2."""
    light = nits / 1000
    scene_light = light * (light @ [0.2627, 0.6780, 0.0593])[:, None] ** (1 / 1.2 - 1)
    bright = 0.17883277 * np.log(np.maximum(12 * scene_light - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene_light <= 1 / 12, np.sqrt(3 * scene_light), bright)


def bt2020_sdr(nits: np.ndarray) -> np.ndarray:
    light = nits / 203
    return np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


@pytest.mark.parametrize(("transfer", "encode"), [(16, pq), (18, hlg), (14, bt2020_sdr), (1, None)])
@pytest.mark.parametrize(
    ("codec", "kind"),
    [
        ("ffv1", "gbrp16le"),
        ("ffv1", "yuv420p16le"),
        ("ffv1", "yuva420p10le"),
        ("libx265", "gbrp12le"),
        ("libx265", "yuv420p10le"),
    ],
)
def test_hdr_and_wide_colours_are_seen_as_in_sdr(tmp_path, transfer, encode, codec, kind):
    """White is at 203 cd/m2 (BT.2408); and what is not HDR nor wide stays as it is."""
    code = SEEN / 255
    if encode is not None:
        if encode is bt2020_sdr:
            light = np.where(code < 0.081, code / 4.5, ((code + 0.099) / 1.099) ** (1 / 0.45))
        else:
            light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
        code = encode(203 * light @ TO_BT2020.T)
    picture = np.round(65535 * code).astype(np.uint16).repeat(16, 0)[None].repeat(64, 0)
    said = {"color_trc": transfer, "color_primaries": 1 if encode is None else 9}
    matrix = "BT2020" if "yuv" in kind and encode is not None else None
    file = write_clip(
        tmp_path / "a.mkv", 2, (64, 64), codec, kind, 16, colorspace=matrix, frames=[picture] * 2, colours=said
    )
    found = pixels(read_clip(file, 2, 64, 64))[1, 32, 8::16]
    assert np.abs(found - SEEN).max() <= (2 if codec == "ffv1" else 8), found


def test_what_is_brighter_than_white_keeps_its_hue(tmp_path):
    code = pq(np.array([[812.0, 406.0, 0.0]]))
    picture = np.round(65535 * np.broadcast_to(code, (32, 32, 3))).astype(np.uint16)
    said = {"color_trc": 16, "color_primaries": 1}
    file = write_clip(tmp_path / "a.mkv", 1, (32, 32), "ffv1", "gbrp16le", frames=[picture], colours=said)
    assert np.abs(pixels(read_clip(file, 1, 32, 32))[0, 16, 16] - [255, 188, 0]).max() <= 1  # 188: half of the light


@pytest.mark.parametrize(("kind", "full"), [("yuv420p", 1), ("yuv420p", 2), ("yuvj420p", 2)])
def test_the_full_range_and_the_limited_one(tmp_path, kind, full):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, kind
        stream.codec_context.color_range = full
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), SEEN[0], np.uint8), format="rgb24")
        container.mux(stream.encode(frame.reformat(format=kind, dst_color_range=full)))
        container.mux(stream.encode())
    assert np.abs(pixels(read_clip(tmp_path / "a.mkv", 1, 32, 32))[0, 16, 16] - SEEN[0]).max() <= 3


WITH_ALPHA = [
    ("a.mov", "prores_ks", "yuva444p10le"),
    ("a.mov", "qtrle", "argb"),
    ("a.mov", "png", "rgba"),
    ("a.mkv", "ffv1", "bgra"),
    ("a.mkv", "ffv1", "yuva420p"),
    ("a.mkv", "ffv1", "gbrap16le"),
    ("a.webm", "libvpx-vp9", "yuva420p"),
    ("a.webm", "libvpx", "yuva420p"),
]


@pytest.mark.parametrize(("name", "codec", "kind"), WITH_ALPHA)
def test_what_is_transparent_in_a_clip_is_white_as_in_an_image(tmp_path, name, codec, kind):
    picture = np.full((32, 48, 4), (200, 0, 0, 255), np.uint8)
    picture[:, 16:, 3], picture[:, 32:, 3] = 128, 0
    options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    file = write_clip(tmp_path / name, 5, (32, 48), codec, kind, frames=[picture] * 5, options=options)
    Image.fromarray(picture).save(tmp_path / "a.png")
    still = pixels(read_clip(tmp_path / "a.png", 1, 32, 48))[0]
    assert np.allclose(still[16, [8, 24, 40]], [[200, 0, 0], [227, 127, 127], [255, 255, 255]], atol=1)
    found = pixels(read_clip(file, 5, 32, 48, 16))[:, 16, [8, 24, 40]]
    assert np.abs(found - still[16, [8, 24, 40]]).max() <= 3, found[0]


@pytest.mark.parametrize("fps", [None, 16])
@pytest.mark.parametrize("interlaced", [True, False])
def test_what_is_flagged_as_interlaced_is_made_progressive(tmp_path, interlaced, fps):
    """A bar that moves between the two fields of a frame; as many frames, at their times."""
    moving = np.zeros((8, 64, 64, 3), np.uint8)
    for field in range(16):
        moving[field // 2, field % 2 :: 2, 3 * field : 3 * field + 12] = 255
    options = {"crf": "1"} | ({"x264-params": "tff=1"} if interlaced else {})
    file = write_clip(tmp_path / "a.mkv", 8, (64, 64), frames=list(moving), options=options)
    header = read_header(file)
    assert (header.interlaced, header.frames) == (interlaced, 8)
    found = pixels(read_clip(file, 8, 64, 64, fps)).mean(-1)
    combs = np.abs(found[:, 1:-1] - (found[:, :-2] + found[:, 2:]) / 2).mean()
    assert combs < 2 if interlaced else combs > 15
    places = [(frame.mean(0) * np.arange(64)).sum() / frame.mean(0).sum() for frame in found]
    assert np.allclose(places, [6 * number + 7 for number in range(8)], atol=2.5)  # of one field or the other


# ---------------------------------------------------------------------------------------------------- frames by time


REORDERED = [
    ("a.avi", "libx264"),
    ("a.asf", "libx264"),
    ("a.wmv", "mpeg2video"),
    ("a.mp4", "libx264"),
]


@pytest.mark.parametrize(("name", "codec"), REORDERED)
def test_frames_that_are_decoded_in_another_order_come_in_their_own(tmp_path, name, codec):
    """Time stamps of AVI and ASF are those of decoding."""
    options = {"bf": "3", "b_strategy": "0"}  # three frames in four come out later than they are decoded
    noise = np.random.default_rng(0).integers(0, 120, (32, 48, 3))
    frames = [np.roll(noise, number, 0).astype(np.uint8) + np.uint8(8 * number) for number in range(16)]
    file = write_clip(tmp_path / name, 16, codec=codec, rate=25, frames=frames, options=options)
    with av.open(str(file)) as container:
        assert container.streams.video[0].codec_context.has_b_frames
    check_length(read_header(file), 16, 25, image=False)
    for fps, count, wanted in ((25, 16, range(16)), (12.5, 8, range(0, 16, 2)), (50, 31, [n // 2 for n in range(31)])):
        found = pixels(read_clip(file, count, 32, 48, fps)).mean(axis=(1, 2, 3))
        assert np.abs(found - [59.5 + 8 * number for number in wanted]).max() < 4, (fps, found)


@pytest.mark.parametrize("fps", [25, 12.5])
def test_a_stamp_on_some_frames_alone(tmp_path, fps):
    file = write_clip(tmp_path / "a.mpg", 40, rate=25)
    with av.open(str(file)) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps[0] and 1 < stamps.count(None) < len(stamps) == 40
    step = round(25 / fps)
    wanted = [number % 16 for number in range(0, 40, step)]
    assert numbers(read_clip(file, len(wanted), 32, 48, fps)) == wanted
    check_length(read_header(file), 40, 25, image=False)


@pytest.mark.parametrize(
    ("stamps", "wanted"),
    [
        ([0.56, None, None, None], [0, 1, 2, 3]),
        ([None, None, 9.0, 10.0], [0, 1, 2, 3]),
        ([4.0, None, 6.0, None, 8.5, None], [0, 1, 2, 3, 4.5, 5.5]),
        ([4.0, None, 4.5, 5.0, 8.0], [0, 1, 1, 1, 4]),
        ([5.0, 6.0, 0.0, 1.0, None], [0, 1, 2, 3, 4]),  # they begin anew
        ([5.0, 5.0, 7.0], [0, 0, 2]),
        ([None, None, None], [0, 1, 2]),
    ],
)
def test_times_never_run_backwards_whatever_stamps_there_are(stamps, wanted):
    assert list(monotone(stamps, 1.0)) == pytest.approx(wanted)
    if None in stamps[1:]:
        with pytest.raises(ValueError, match="it has no time stamps"):
            list(monotone(stamps, None))


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


# ---------------------------------------------------------------------------------------------------- damage


def damaged(tmp_path, kind: str, number: int) -> tuple[Path, Path]:
    """A clip of 24 frames, whole and with packet `number` damaged or lost."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    frames = [np.roll(noise, 2 * number, 1) for number in range(24)]
    codec, options = ("mpeg4", {}) if kind == "avi" else ("libx264", {"bf": "0"})
    file = write_clip(tmp_path / f"whole.{kind}", 24, (96, 128), codec, frames=frames, options=options)
    with av.open(str(file)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data, (start, size) = bytearray(file.read_bytes()), packets[number]
    if kind == "mp4":
        data[start : start + 4] = bytes([0, 255, 255, 255])  # how long a part is
    elif kind == "ts":
        del data[start + 188 : start + 5 * 188]
    else:
        data[start + size // 3 : start + size // 2] = bytes(size // 2 - size // 3)
    (tmp_path / f"a.{kind}").write_bytes(data)
    return file, tmp_path / f"a.{kind}"


@pytest.mark.parametrize("fps", [None, 16])
@pytest.mark.parametrize("kind", ["avi", "ts", "mp4"])
def test_damage_is_told_where_it_is_in_what_is_taken(tmp_path, kind, fps):
    whole, file = damaged(tmp_path, kind, 12)
    for count in (13, 20):
        with pytest.raises(ValueError, match="it is damaged: "):
            read_clip(file, count, 96, 128, fps)
    assert torch.equal(read_clip(file, 9, 96, 128, fps), read_clip(whole, 9, 96, 128, fps))
    with pytest.raises(ValueError, match=r"it is damaged: .*frame 1\b|it holds no frames"):
        read_header(damaged(tmp_path, kind, 0)[1])


def test_frames_before_missing_data_are_read_whatever_is_decoded_ahead(tmp_path):
    frames = [np.full((96, 128, 3), 60 + 4 * number, np.uint8) for number in range(24)]
    options = {"bf": "2", "x264-params": "b-adapt=0:b-pyramid=none"}
    whole = write_clip(tmp_path / "whole.ts", 24, (96, 128), frames=frames, options=options)
    content = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    content[starts[14] + 3] ^= 8  # a counter that tells that the packet before it is not whole
    (tmp_path / "a.ts").write_bytes(content)
    for count in (10, 12):
        assert torch.equal(read_clip(tmp_path / "a.ts", count, 96, 128), read_clip(whole, count, 96, 128))
    with pytest.raises(ValueError, match="it is damaged: data is missing at frame 13"):
        read_clip(tmp_path / "a.ts", 13, 96, 128)


@pytest.mark.parametrize("kind", ["avi", "ts", "mkv"])
def test_a_clip_whose_end_is_missing_is_read_as_far_as_it_goes(tmp_path, kind):
    file, _ = damaged(tmp_path, kind, 0)
    whole = read_clip(file, 6, 32, 48)
    with av.open(str(file)) as container:
        cut = [packet.pos + packet.size // 2 for packet in container.demux(video=0) if packet.size][14]
    file.write_bytes(file.read_bytes()[:cut])
    assert 13 <= read_header(file).frames <= 15
    assert torch.equal(read_clip(file, 6, 32, 48), whole)
    with pytest.raises(ValueError, match=r"it is damaged|it has \d+ frames; 24 are needed"):
        read_clip(file, 24, 32, 48)


def test_a_recording_that_begins_between_key_frames_begins_with_the_first(tmp_path):
    file = write_clip(tmp_path / "a.ts", 32, options={"g": "16", "keyint_min": "16", "bf": "0"})
    with av.open(str(file)) as container:
        start = [packet.pos for packet in container.demux(video=0) if packet.size][3]
    file.write_bytes(file.read_bytes()[: 2 * 188] + file.read_bytes()[start:])
    assert numbers(read_clip(file, 8, 32, 48, 16)) == list(range(8))


# ---------------------------------------------------------------------------------------------------- animations


@pytest.mark.parametrize("kind", ["webp", "png", "png with another picture", "avif"])
def test_animated_images_are_videos_with_their_times(tmp_path, kind):
    file = tmp_path / f"a.{kind[:4].strip()}"
    pictures = [Image.fromarray(scene(number, 32, 48)) for number in (2, 4, 6, 8)]
    options = {"save_all": True, "duration": [100, 200, 100, 300]} | ({"lossless": True} if kind == "webp" else {})
    if kind == "png with another picture":  # for those who cannot show an animation
        Image.fromarray(scene(0, 32, 48)).save(file, append_images=pictures, default_image=True, **options)
    else:
        pictures[0].save(file, append_images=pictures[1:], **options)
    assert read_header(file) == Header(48, 32, 4, pytest.approx(0.7))
    assert numbers(read_clip(file, 7, 32, 48, 10)) == [2, 4, 4, 6, 8, 8, 8]
    assert numbers(read_clip(file, 4, 32, 48)) == [2, 4, 6, 8]
    with pytest.raises(ValueError, match=r"it lasts 0.70 s; 8 frames at 10 a second need more than 0.70"):
        read_clip(file, 8, 32, 48, 10)
    pictures[0].save(file, **({"save_all": True} if kind == "webp" else {}))
    assert read_header(file) == Header(48, 32, 1, 0.0)
    with pytest.raises(ValueError, match="it is an image"):
        read_clip(file, 2, 32, 48)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_told_as_one(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    for read in (read_header, lambda file: read_clip(file, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"^it is an empty file$"):
            read(tmp_path / f"a{suffix}")
