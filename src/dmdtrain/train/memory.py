"""Memory of the host that is free, and errors that say that memory ran out, of the host or a device."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import torch

# How PyTorch, CUDA's libraries, safetensors and the operating system put it.
SAID = re.compile(r"(CUDA )?out of memory|can't allocate memory|cannot allocate memory|\w+_ALLOC_FAILED", re.IGNORECASE)


def free_memory() -> int:
    """Bytes of host memory that can still be taken, within the limit of a container; 0 where it is not known."""
    try:
        pages = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
        free = 1024 * int(pages["MemAvailable"])
    except (OSError, KeyError):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, max(0, limit - used))


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no more memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and SAID.search(str(error)) is not None
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def out_of_memory(error: BaseException) -> str:
    """`out of memory (CUDA out of memory. Tried to allocate 2.00 GiB ...)`."""
    text = " ".join(str(error).split())
    said = SAID.search(text)
    reason = (text[said.start() :] if said else text)[:120]
    return f"out of memory ({reason or 'of the host'})"
