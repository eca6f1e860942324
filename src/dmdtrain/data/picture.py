"""A decoded frame as it is to be seen: upright, progressive, on white, in the colours of BT.709."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation

LARGEST_FRAME = 2**26  # pixels: 8192 x 8192
NARROWEST = 32  # long to short edge; what is cut off beyond that would fill the memory first
# Between RGB and YUV, to be named wherever one becomes the other: without it colours come out 1 to 3 levels too dark.
EXACT = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
)
UNSAID = 2  # the matrix of a video that names none
HD = 720  # lines from which video that does not say so is BT.709
WHITE_NITS = 203  # of HDR: what SDR shows as white (BT.2408)
# What white is coded as, from 0 to 1, of transfer functions of HDR.
HDR_WHITE = {ColorTrc.SMPTE2084: 0.58069, ColorTrc.ARIB_STD_B67: 0.75}
BT2020_TO_BT709 = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))  # linear RGB


def check_size(width: int, height: int) -> None:
    if not (0 < width * height <= LARGEST_FRAME):
        raise ValueError(f"its frames have {width} x {height} pixels; valid are 1 to {LARGEST_FRAME}")


def display_size(frame: Any, stream: Any) -> tuple[int, int]:
    """(width, height) in pixels as a frame is to be seen; ValueError where that is no picture."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = max(1, round(frame.width * aspect)), frame.height
    if max(width, height) > NARROWEST * min(width, height):
        raise ValueError(f"it is {width} wide and {height} high; at most {NARROWEST} to 1 is read")
    return (height, width) if _orientation(frame)[0] else (width, height)


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """How a frame is set upright: whether rows become columns, and then whether it is mirrored from left to right, and upside
    down. From FFmpeg's display matrix, the nearest of the eight."""
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    # (x, y) is seen at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return (True, c < 0, b < 0) if abs(b) + abs(c) > abs(a) + abs(d) else (False, a < 0, d < 0)


def picture(frame: Any) -> np.ndarray:
    """[H, W, 3], upright and on white: uint8 in BT.709, or uint16 where `to_bt709` is still to be applied."""
    alpha = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
    # FFmpeg's packed kinds of 16 bits come out wrong of halved chroma: green is lost.
    kind = ("gbrap16le" if alpha else "gbrp16le") if is_wide(frame) else ("rgba" if alpha else "rgb24")
    guess = Colorspace.BT2020 if is_wide(frame) else Colorspace.ITU709 if frame.height >= HD else None
    matrix = guess if frame.colorspace == UNSAID else None
    pixels = frame.to_ndarray(format=kind, src_colorspace=matrix, interpolation=EXACT)
    if alpha:
        pixels = _on_white(pixels, HDR_WHITE.get(frame.color_trc, 1.0))
    turned, mirrored, upside_down = _orientation(frame)
    pixels = pixels.swapaxes(0, 1) if turned else pixels
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _on_white(pixels: np.ndarray, white: float) -> np.ndarray:
    """[H, W, 4] with straight alpha -> [H, W, 3] of the same integers; white: its code, from 0 to 1."""
    most = np.iinfo(pixels.dtype).max
    alpha = pixels[..., 3:].astype(np.uint32)
    ground = np.uint32(round(white * most)) * (most - alpha)
    return ((pixels[..., :3] * alpha + ground + most // 2) // most).astype(pixels.dtype)


def is_wide(frame: Any) -> bool:
    """Whether its colours are others than SDR shows: HDR, or of the primaries of BT.2020."""
    return frame.color_trc in HDR_WHITE or frame.color_primaries == ColorPrimaries.BT2020


def to_bt709(rgb: torch.Tensor, frame: Any) -> torch.Tensor:
    """Colours [3, H, W] in [-1, 1], of a frame that `is_wide`, as SDR shows them. HDR by BT.2100 for a display of 1000 cd/m2, as
    far as its white and with sRGB's curve; what is brighter keeps its hue. SDR by the curve of BT.709."""
    rgb, transfer, primaries = (rgb + 1) / 2, frame.color_trc, frame.color_primaries
    if transfer == ColorTrc.SMPTE2084:
        power = rgb ** (32 / 2523)
        linear = ((power - 0.8359375).clamp(min=0) / (18.8515625 - 18.6875 * power)) ** (16384 / 2610)
        linear = 10_000 / WHITE_NITS * linear
    elif transfer == ColorTrc.ARIB_STD_B67:
        scene = torch.where(rgb <= 0.5, rgb**2 / 3, (((rgb - 0.55991073) / 0.17883277).exp() + 0.28466892) / 12)
        luminance = (scene * scene.new_tensor((0.2627, 0.6780, 0.0593))[:, None, None]).sum(-3, keepdim=True)
        linear = 1000 / WHITE_NITS * scene * luminance**0.2
    else:
        linear = torch.where(rgb < 0.081, rgb / 4.5, ((rgb + 0.099) / 1.099) ** (1 / 0.45))
    if primaries != ColorPrimaries.BT709:  # HDR that does not say is of BT.2020
        linear = torch.einsum("ij,...jhw->...ihw", linear.new_tensor(BT2020_TO_BT709), linear)
    linear = (linear / linear.amax(-3, keepdim=True).clamp(min=1)).clamp(min=0)
    if transfer in HDR_WHITE:
        coded = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    else:
        coded = torch.where(linear < 0.018, 4.5 * linear, 1.099 * linear**0.45 - 0.099)
    return coded * 2 - 1


def fitted(pixels: np.ndarray, aspect: float, height: int, width: int, crop: str, place: float) -> torch.Tensor:
    """A picture [h, w, 3] of unsigned integers that is seen at `aspect` (width / height), as [3, height, width] in [-1, 1]."""
    covering = height, width
    if crop != "none":
        covering = max(height, round(width / aspect)), max(width, round(height * aspect))
    most = np.iinfo(pixels.dtype).max
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    if covering != tuple(pixels.shape[:2]):
        # In 8 bits: a level off at most, and eight times as fast as in floating point.
        image = F.interpolate(image, covering, mode="bilinear", antialias=True)
    place = place if crop == "random" else 0.5
    top, left = (int(place * (edge - size + 1)) for edge, size in zip(covering, (height, width), strict=True))
    return image[0, :, top : top + height, left : left + width].float() / (most / 2) - 1


def deinterlaced(frames: Iterator[tuple[Any, float]]) -> Iterator[tuple[Any, float]]:
    """The same number of frames, each with its time: those that are flagged as interlaced are made progressive."""
    graph, kind, inside = None, None, deque[float]()
    for frame, time in frames:
        now = frame.width, frame.height, frame.format.name
        if graph is not None and kind != now:
            yield from _pulled(graph, None, inside)
            graph = None
        if graph is None:
            if not frame.interlaced_frame:
                yield frame, time
                continue
            graph, kind = _deinterlacer(frame), now
        inside.append(time)
        yield from _pulled(graph, frame, inside)
    if graph is not None:
        yield from _pulled(graph, None, inside)


def _deinterlacer(frame: Any) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    # One frame for each that goes in, and those that are not flagged as they are.
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: av.filter.Graph, frame: Any, inside: deque[float]) -> Iterator[tuple[Any, float]]:
    """What a graph gives for one frame more; None: for the end."""
    graph.vpush(frame)
    while True:
        try:
            made = graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        yield made, inside.popleft()
