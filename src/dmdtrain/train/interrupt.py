"""SIGINT (Ctrl-C), SIGTERM, SIGHUP (a terminal that goes) and SIGUSR1 (batch systems and clouds) ask a command to stop.

The first one raises `Interrupted` wherever the program is, except inside `patiently`: there it is remembered, and the loop
that finishes its micro-batch and saves asks for it. A second SIGINT or SIGTERM leaves at once, which the way files are written
allows at any instant. SIGHUP and SIGUSR1 are notices that come before a SIGTERM: they count as one with what comes next.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NOTICES = (signal.SIGHUP, signal.SIGUSR1)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *NOTICES)
BY_USER, BY_MACHINE = 130, 75  # exit codes: Ctrl-C; EX_TEMPFAIL, after which the same command is to be run again
SHOW_CURSOR = b"\x1b[?25h"

_asked: signal.Signals | None = None
_patient = False


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, asked: signal.Signals):
        super().__init__(asked.name)
        self.asked = asked


def exit_code(asked: signal.Signals) -> int:
    return BY_USER if asked == signal.SIGINT else BY_MACHINE


def asked() -> bool:
    return _asked is not None


def check() -> None:
    """Raises Interrupted where a signal has come."""
    if _asked is not None:
        raise Interrupted(_asked)


def _handle(number: int, _: FrameType | None) -> None:
    global _asked
    now, before = signal.Signals(number), _asked
    if before is None or before in NOTICES:
        _asked = now
        if before is None and not _patient:
            raise Interrupted(now)
        if before is None:
            text = f"dmdtrain: {now.name}: stopping after this micro-batch; a second signal leaves at once\n"
            with suppress(OSError):  # a terminal that has gone
                os.write(2, text.encode())
    elif now not in NOTICES:
        with suppress(OSError):
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
        os._exit(exit_code(now))


@contextmanager
def listening() -> Iterator[None]:
    """Inside, the signals ask; one that the parent had ignored stays ignored."""
    global _asked
    _asked = None
    main = threading.current_thread() is threading.main_thread()
    heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN] if main else []
    before = {number: signal.signal(number, _handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def patiently() -> Iterator[None]:
    """Inside, a signal is remembered and raises nothing."""
    global _patient
    _patient = True
    try:
        yield
    finally:
        _patient = False
