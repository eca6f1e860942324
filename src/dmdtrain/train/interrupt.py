"""SIGINT (Ctrl-C), SIGTERM, SIGHUP (a terminal that goes) and SIGUSR1 (batch systems and clouds) ask a command to stop.

Until a command is at work, and while anything is imported, where nothing is half-written and a library could break, the first
one ends the process at once, with the documented exit code. In a command at work it raises `Interrupted` wherever the program
is, except inside `patiently`: there it is remembered, and the loop that finishes its micro-batch and saves asks for it. A second
SIGINT or SIGTERM leaves at once, which the way files are written allows at any instant. SIGHUP and SIGUSR1 are notices that come
before a SIGTERM: they count as one with what comes next. Once the exit code is decided, none changes it.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

NOTICES = (signal.SIGHUP, signal.SIGUSR1)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *NOTICES)
BY_USER, BY_MACHINE = 130, 75  # exit codes: Ctrl-C; EX_TEMPFAIL, after which the same command is to be run again
SHOW_CURSOR = b"\x1b[?25h"
TEXT = "interrupted; the last checkpoint is intact, the same command goes on from it"

_asked: signal.Signals | None = None
_decided: int | None = None  # the exit code
_working = _patient = False


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


def decide(code: int) -> None:
    """The command's exit code: signals that come later end the process with it."""
    global _decided
    _decided = code


def _write(number: int, text: bytes) -> None:
    with suppress(OSError):  # a terminal that has gone
        os.write(number, text)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the signal may have come within a write
            stream.flush()
    with suppress(OSError):
        if os.isatty(1):
            _write(1, SHOW_CURSOR)
    os._exit(code)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    now, before = signal.Signals(number), _asked
    if _decided is not None:
        _leave(_decided)
    if before is None and not _patient and (not _working or _importing(frame)):
        _write(2, f"dmdtrain: {TEXT}\n".encode())
        _leave(exit_code(now))
    if before is None or before in NOTICES:
        _asked = now
        if before is None and not _patient:
            raise Interrupted(now)
        if before is None:
            text = f"dmdtrain: {now.name}: stopping after this micro-batch; a second signal leaves at once\n"
            _write(2, text.encode())
    elif now not in NOTICES:
        _leave(exit_code(now))


def _heard() -> list[signal.Signals]:
    main = threading.current_thread() is threading.main_thread()
    return [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN] if main else []


def listen() -> None:
    """From here to the process's end the signals are answered; one that the parent had ignored stays ignored."""
    for number in _heard():
        signal.signal(number, _handle)
    # Registered first, it is called last: what is left of the exit restores the system's own answers, which are other codes.
    atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, SIGNALS)


@contextmanager
def listening() -> Iterator[None]:
    """Inside, a command is at work: the signals ask it to stop."""
    global _asked, _decided, _working
    _asked, _decided, _working = None, None, True
    before = {number: signal.signal(number, _handle) for number in _heard()}
    try:
        yield
    finally:
        _working = False
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
