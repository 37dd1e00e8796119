"""A request to stop (SIGTERM, SIGINT) noted for the loop to obey between two steps."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, SIGTERM and SIGINT only set `received`; the third of them acts as it did before.

    A launcher passes the signal on to processes that the terminal has already told, so the second one is no sign of
    impatience. Outside of the main thread, where Python allows no handlers, signals keep their meaning.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count >= 3:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self.received = number


def ignore_stop_signals(worker_id: int) -> None:
    """For processes that read data: the loop tells them when to end, not a signal sent to the whole group."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
