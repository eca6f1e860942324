"""Sizes of clips, and the order in which they are drawn: each draw from clips of one size."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch

WIDEST = 4.0  # long to short edge of a bucket; what is wider still is cropped to it
Size = tuple[int, int]


def bucket_size(width: int, height: int, area: int, multiple: int, rounding: int) -> Size:
    """(height, width) in pixels for a clip: about `area` pixels in its aspect ratio (long to short edge, rounded to so many
    decimals), each edge a multiple of `multiple`."""
    aspect = min(WIDEST, round(max(width, height) / min(width, height), rounding))
    edges = math.sqrt(area / aspect), math.sqrt(area * aspect)
    short, long = (max(multiple, round(edge / multiple) * multiple) for edge in edges)
    return (short, long) if width >= height else (long, short)


class OtherItems(ValueError):
    """A sampler has other items than when its state was saved."""


def hashes(texts: Iterable[str]) -> torch.Tensor:
    """[n] int64: the first 8 bytes of each text's SHA-256, by which data are known again."""
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64) if digests else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Seen:
    """What the run that is gone on from kept from training and what it trained on, by their `hashes`."""

    kept: frozenset[int] = frozenset()
    trained: frozenset[int] = frozenset()

    def keep(self, texts: list[str], wanted: int) -> list[str]:
        """The first `wanted` of different texts for validation: those that were kept before, and otherwise none that was
        trained on."""
        known = dict(zip(texts, hashes(texts).tolist(), strict=True))
        before = [text for text in texts if known[text] in self.kept]
        new = [text for text in texts if known[text] not in self.kept | self.trained]
        return before + new[: max(0, wanted - len(before))] if wanted else []


NOTHING = Seen()


T = TypeVar("T")


@dataclass(frozen=True)
class Stream(Generic[T]):
    """The items of one data set in one bucket; `share` of all draws falls on them."""

    bucket: Hashable
    share: float
    items: Sequence[T]


def streams_of(
    items: Sequence[T],
    buckets: Sequence[Hashable],
    sets: Sequence[int],
    weights: Sequence[float | None],
    repeats: Sequence[int],
) -> list[Stream[T]]:
    """Streams of items, each with its bucket and the number of its data set.

    Args:
        weights, repeats: of every data set, as `VideoSet`: all weights are None, or none is.
    """
    grouped: dict[tuple[int, Hashable], list[T]] = defaultdict(list)
    sizes = [0] * len(weights)
    for item, bucket, number in zip(items, buckets, sets, strict=True):
        grouped[number, bucket] += [item] * repeats[number]
        sizes[number] += repeats[number]
    mass = [size if weight is None else weight * (size > 0) for size, weight in zip(sizes, weights, strict=True)]
    total = sum(mass)
    return [
        Stream(bucket, mass[number] / total * len(listed) / sizes[number], listed)
        for (number, bucket), listed in grouped.items()
    ]


class BucketSampler(Generic[T]):
    """Endless draws, each from one bucket, by shares that are kept exactly: whoever is furthest behind is next. Every item
    of a stream comes once before one comes again, in an order that `seed` decides. Its state resumes in mid-epoch.

    Args:
        rank, world: this process, of so many that draw together: all take parts of the same draw, from the same bucket.
    """

    def __init__(self, streams: Sequence[Stream[T]], seed: int, rank: int = 0, world: int = 1):
        self.streams, self.seed, self.rank, self.world = list(streams), seed, rank, world
        self.generator = torch.Generator().manual_seed(seed)
        self._orders: list[list[int]] = [[] for _ in self.streams]
        self._buckets = list(dict.fromkeys(stream.bucket for stream in self.streams))
        self._shares = {b: sum(s.share for s in self.streams if s.bucket == b) for b in self._buckets}
        self._behind = torch.zeros(len(self._buckets), dtype=torch.float64)  # draws that a bucket is owed
        self._owed = torch.zeros(
            len(self.streams), dtype=torch.float64
        )  # items that a stream is owed within its bucket

    def shard(self, rank: int, world: int) -> BucketSampler[T]:
        """A fresh sampler for one process of `world`."""
        return BucketSampler(self.streams, self.seed, rank, world)

    def draw(self, n: int) -> list[T]:
        """The next n items, all of one bucket."""
        self._behind += torch.tensor([self._shares[bucket] for bucket in self._buckets], dtype=torch.float64)
        bucket = int(self._behind.argmax())
        self._behind[bucket] -= 1
        inside = [i for i, stream in enumerate(self.streams) if stream.bucket == self._buckets[bucket]]
        whole = self._shares[self._buckets[bucket]]
        drawn = [self._next(inside, whole) for _ in range(n * self.world)]
        return drawn[self.rank * n : (self.rank + 1) * n]

    def _next(self, inside: list[int], whole: float) -> T:
        for i in inside:
            self._owed[i] += self.streams[i].share / whole
        chosen = max(inside, key=lambda i: float(self._owed[i]))
        self._owed[chosen] -= 1
        stream, order = self.streams[chosen], self._orders[chosen]
        if not order:
            order += torch.randperm(len(stream.items), generator=self.generator).tolist()
        return stream.items[order.pop()]

    @cached_property
    def items(self) -> Sequence[T]:
        return [item for stream in self.streams for item in stream.items]

    @cached_property
    def _fingerprint(self) -> torch.Tensor:
        digest = hashlib.sha256()
        for stream in self.streams:
            digest.update(repr((stream.bucket, stream.share, list(stream.items))).encode())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def state_dict(self) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(order) for order in self._orders])
        orders = torch.tensor([i for order in self._orders for i in order], dtype=torch.int64)
        state = {"generator": self.generator.get_state(), "orders": orders, "lengths": lengths}
        state |= {"behind": self._behind.clone(), "owed": self._owed.clone()}
        return state | {"items": self._fingerprint.clone(), "count": torch.tensor(len(self.items))}

    @property
    def identities(self) -> list[str]:
        """What each item is, whatever its file is called."""
        return [repr(item) for item in self.items]

    def check(self, state: dict[str, torch.Tensor]) -> None:
        """OtherItems unless they are those of when the state was saved, in the same buckets and shares."""
        saved = state.get("items")  # a sampler of other kind has none
        if saved is None or int(state["count"]) != len(self.items) or not torch.equal(saved, self._fingerprint):
            raise OtherItems(f"{len(self.items)} items now, which are not those of when the checkpoint was saved")

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises OtherItems as `check`, ValueError where it is no state."""
        self.check(state)
        orders = [order.tolist() for order in state["orders"].split(state["lengths"].tolist())]
        for order, stream in zip(orders, self.streams, strict=True):
            if any(not 0 <= i < len(stream.items) for i in order):
                raise ValueError(f"an order is no list of numbers below {len(stream.items)}")
        if state["behind"].shape != self._behind.shape or state["owed"].shape != self._owed.shape:
            raise ValueError("what buckets are owed is of other buckets")
        self.generator.set_state(state["generator"])
        self._orders, self._behind, self._owed = orders, state["behind"].clone(), state["owed"].clone()
