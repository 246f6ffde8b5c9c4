"""A clock that only moves when told to, and a device on which work takes a scripted time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any


class FakeDevice:
    """A device whose work advances the clock by what the work itself says (see :meth:`work`)."""

    def __init__(self, l2_bytes: int = 1000, graphs: bool = True) -> None:
        self.name = "NVIDIA H100 80GB HBM3"
        self.is_cpu = False
        self.l2_bytes = l2_bytes
        self.graphs = graphs
        self.time = 0.0
        self.calls: list[Any] = []
        self.captured: list[tuple[int, int]] = []
        self.active_depth = 0

    def now(self) -> float:
        return self.time

    def synchronize(self) -> None:
        pass

    def elapsed(self, work: Callable[[], Any]) -> float:
        assert self.active_depth > 0
        start = self.time
        work()
        return self.time - start

    def graph(self, calls: Sequence[Callable[[], Any]], keep: int) -> Callable[[], None]:
        if not self.graphs:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.captured.append((len(calls), keep))

        def replay() -> None:
            for call in calls:
                call()

        return replay

    @contextlib.contextmanager
    def active(self):
        self.active_depth += 1
        yield
        self.active_depth -= 1

    def work(self, label: Any, seconds: Sequence[float] | float) -> Callable[[], Any]:
        """A call that is noted as ``label`` and takes ``seconds``; of a list one entry after the other."""
        durations = [seconds] if isinstance(seconds, int | float) else list(seconds)
        count = 0

        def call() -> Any:
            nonlocal count
            self.time += durations[min(count, len(durations) - 1)]
            count += 1
            self.calls.append(label)
            return label

        return call
