"""Ctrl-C and SIGTERM as a request to stop at the next step boundary."""

from __future__ import annotations

import signal
import time
from types import FrameType

PATIENCE = 3.0


class StopRequest:
    """While entered, remembers SIGINT and SIGTERM; a second one after three seconds acts at once.

    torchrun and shells may deliver the same request twice within moments, so an early second one is ignored.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def ignore_in_worker(_: int) -> None:
    """For loader processes: a signal to the whole process group must not take them from the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
