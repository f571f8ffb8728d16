"""Ctrl-C, SIGTERM and the loss of the terminal (SIGHUP) as a request to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_LOG = logging.getLogger("lungkit")


@contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP call ``stop``; the second one takes its usual effect at once.

    A SIGHUP that is ignored stays ignored: that is what ``nohup`` is for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        caught.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in caught}

    def handle(number: int, frame: FrameType | None) -> None:
        for other, handler in before.items():
            signal.signal(other, handler)
        _LOG.warning("%s: saving; once more to quit at once", signal.Signals(number).name)
        stop()

    for number in caught:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
