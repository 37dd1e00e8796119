"""A request to stop (SIGTERM, SIGINT) noted for the loop to obey between two steps."""

import ctypes
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def stop_with_launcher() -> None:
    """Ask the system for a SIGTERM when the launcher of a single process ends before it does.

    `accelerate launch` waits for it but passes no signal on, and a launcher that is killed cannot: the training would
    stay behind, and nobody watches it. Several processes notice by themselves that a launcher is gone. Linux alone has
    this.
    """
    is_accelerates = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ
    is_torchruns = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") == "1"
    if (is_accelerates or is_torchruns) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def ignore_stop_signals(worker_id: int) -> None:
    """For processes that read data: the loop tells them when to end, not a signal sent to the whole group."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
