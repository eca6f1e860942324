"""The frames of a video in the order in which they are seen, as far as they are whole; their times never run backwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappushpop
from itertools import chain, islice
from typing import Any

import av
from av.video.frame import PictureType

from dmdtrain.data.picture import check_size

REORDER = 16  # frames by which codecs reorder at most (H.264, HEVC)
NO_TIMES = "it has no time stamps, which data.fps needs"
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these drop alpha


class Video:
    """A video that is read once, from its start.

    Attributes:
        interval: seconds that a frame lasts on average; None: unknown.
        damage: what is wrong with the frame after those that are whole; None: nothing so far.
    """

    def __init__(self, container: Any, stream: Any):
        self.container, self.stream = container, stream
        rate = stream.average_rate or stream.guessed_rate
        self.interval = float(1 / rate) if rate else None
        self.damage: str | None = None
        self._reorders = stream.codec_context.codec.reorder
        self._ordered = False  # time stamps of packets have run backwards: they say when frames are seen
        self._due = deque[float | None]()  # when packets are to be decoded, of which no frame has come yet
        self._anchor = -1  # the number of the last frame that no later one was needed for

    def _packets(self) -> Iterator[tuple[Any, float | None, float | None]]:
        """Packets as far as the file goes, each with the seconds at which it is seen, and is to be decoded."""
        latest = None
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    seen, due = self._seconds(packet.pts), self._seconds(packet.dts)
                    if seen is not None:
                        self._ordered |= latest is not None and seen < latest
                        latest = seen
                    yield packet, seen, due
        except av.FFmpegError:  # its end is missing
            return

    def stamps(self) -> list[float | None]:
        """The time stamps of frames in the order in which they are seen; decodes nothing."""
        packets = [(seen, due) for _, seen, due in self._packets()]
        due_times = [due for _, due in packets]
        if self._reorders and not self._ordered and None not in due_times:
            return due_times
        known = [seen for seen, _ in packets if seen is not None]
        near, later = known[:REORDER], iter(known[REORDER:])
        heapify(near)

        def earliest() -> float:
            following = next(later, None)
            return heappop(near) if following is None else heappushpop(near, following)

        return [None if seen is None else earliest() for seen, _ in packets]

    def frames(self, threads: bool = False) -> Iterator[Any]:
        """Frames up to the first that is not whole, as FFmpeg tells; what comes before the first key frame may lack its start.

        threads: decode several at once; `damage` may then begin a few frames early.
        """
        decoder = self._decoder()
        decoder.options = {"err_detect": "crccheck+explode"}
        if threads:
            decoder.thread_type = "AUTO"
        keyed, count = False, 0
        for packet, _, due in chain(self._packets(), [(None, None, None)]):  # None: what is left in the decoder
            if packet is not None:
                keyed |= packet.is_keyframe
                self._due.append(due)
            missing = packet is not None and packet.is_corrupt and keyed
            try:
                decoded = decoder.decode(None if missing else packet)
            except av.FFmpegError as error:
                if keyed:
                    self.damage = f"it is damaged: frame {count + 1} can not be decoded ({error.strerror})"
                    return
                continue
            for frame in decoded:
                if missing and (None in (frame.pts, packet.pts) or frame.pts >= packet.pts):
                    break  # it is seen after what is missing
                check_size(frame.width, frame.height)
                if frame.is_corrupt:
                    if keyed:
                        self.damage = f"it is damaged: frame {count + 1} is not whole"
                        return
                    continue
                if frame.pict_type != PictureType.B:
                    self._anchor = count
                count += 1
                yield frame
            if missing:
                self.damage = f"it is damaged: data is missing at frame {count + 1}"
                return

    def _decoder(self) -> Any:
        context = self.stream.codec_context
        if context.name in WITH_ALPHA and self.stream.metadata.get("alpha_mode") == "1":
            return av.CodecContext.create(WITH_ALPHA[context.name], "r")
        return context

    def timed(self, threads: bool = False) -> Iterator[tuple[Any, float]]:
        """`frames` with their seconds since the first."""
        waiting = deque[Any]()

        def stamps() -> Iterator[float | None]:
            for frame, stamp in self._stamped(threads):
                waiting.append(frame)
                yield stamp

        for time in monotone(stamps(), self.interval):
            yield waiting.popleft(), time

    def _stamped(self, threads: bool) -> Iterator[tuple[Any, float | None]]:
        """`frames` with their time stamps; those of decoding if the others are in another order than the frames, as in AVI and
        ASF, which the next frames tell."""
        waiting = deque[tuple[Any, float | None]]()
        latest, wrong = None, False
        for frame in self.frames(threads):
            if frame.pts is not None:
                wrong |= latest is not None and frame.pts < latest
                latest = frame.pts
            waiting.append((frame, self._due.popleft() if self._due else None))
            ahead = REORDER if self._reorders and not self._ordered and not wrong else 0
            while len(waiting) > ahead:
                first, due = waiting.popleft()
                yield first, due if wrong else self._seconds(first.pts)
        for first, due in waiting:
            yield first, due if wrong else self._seconds(first.pts)

    def _seconds(self, stamp: int | None) -> float | None:
        return None if stamp is None else float(stamp * self.stream.time_base)

    def damage_to(self, number: int, rest: Iterator[Any]) -> str | None:
        """What is wrong with frame `number`, which has come, or with a later one that it was decoded from.

        rest: gives the later ones.
        """
        ahead = islice(rest, REORDER)
        while self._anchor < number and next(ahead, None) is not None:
            pass
        return self.damage if self._anchor < number else None


def monotone(stamps: Iterable[float | None], interval: float | None) -> Iterator[float]:
    """Seconds since the first frame that never run backwards, from time stamps in the order of frames. A frame without one, and
    one with which they begin anew, comes an `interval` after the one before it.

    Raises:
        ValueError: there is neither a time stamp nor an interval.
    """
    now, last, shift = 0.0, None, 0.0
    for number, stamp in enumerate(stamps):
        if last is not None and stamp is not None and stamp >= last:
            now = max(now, stamp + shift)
        else:
            if stamp is None and interval is None:
                raise ValueError(NO_TIMES)
            now += (interval or 0.0) if number else 0.0
            shift = now - stamp if stamp is not None else shift
        last = stamp if stamp is not None else last
        yield now
