"""Processes that watch each other, so that an end of the run names the process that died, failed or hangs.

A collective operation fails or waits where one process is gone, and tells the others nothing but that. So every process
has a thread that writes to the store they share where its process stands, every two seconds; it goes on writing while
the process itself waits. A process without new signs of life is dead. One with them hangs if it is at an earlier stage
than the rest, or at the same one but in its own work while others wait for a message.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from medclip_hf.training.processes import in_words

logger = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start it again
_VERDICT = "verdict"
_BEATS_TO_BE_SURE = 3
_GRACE_BEATS = 5  # for a process to raise its own error before it is ended from its thread


class LostProcessError(RuntimeError):
    """The run cannot go on because another process is dead, has failed, or did not come."""


class Watch:
    """Where every process stands, and what is known once one of them is lost.

    Args:
        store: that all processes share; None watches nothing.
        rank: of this process.
        num_processes: of the run.
        timeout_seconds: of a collective operation; shortly before it is over, the log names who is waited for.
        beat_seconds: between two signs of life; None: `BEAT_SECONDS`.
        silence_seconds: without a sign of life until a process is held for dead.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int = 0,
        num_processes: int = 1,
        *,
        timeout_seconds: float = 1800.0,
        beat_seconds: float | None = None,
        silence_seconds: float = 120.0,
    ) -> None:
        self.store, self.rank, self.num_processes = store, rank, num_processes
        self.timeout_seconds, self.silence_seconds = timeout_seconds, silence_seconds
        self.beat_seconds = BEAT_SECONDS if beat_seconds is None else beat_seconds
        self._stage, self._num_stages, self._since = "starting", 0, time.monotonic()
        self._num_beats = 0
        self._verdict: str | None = None  # as read last, for when the store is gone
        self._has_ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        self._since = time.monotonic()
        if self.store is not None:
            self._beat(self.store)
            self._thread = threading.Thread(target=self._live, args=(self.store,), daemon=True, name="watch")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.beat_seconds)

    def enter(self, stage: str) -> None:
        """This process now does `stage`; all processes go through the same ones in the same order."""
        self._stage, self._since = stage, time.monotonic()
        self._num_stages += 1

    def report(self, error: BaseException) -> None:
        """Tell the others that this process fails, and why."""
        if self.store is not None and isinstance(error, Exception) and not is_collective_error(error):
            told = f"{type(error).__name__}: {error}"[:1000]
            self._give_verdict(f"process {self.rank} failed while it was {self._stage}: {told}")
            self._let_others_read()

    def explain(self, error: BaseException) -> LostProcessError | None:
        """Who is the cause of a failed collective operation; None if `error` is none, or nobody is to blame.

        It takes a few beats: a dead process differs from a slow one by giving no sign in that time.
        """
        if self.store is None or not is_collective_error(error):
            return None
        try:
            verdict = self._find_cause(self.store)
        except RuntimeError:
            verdict = self._store_is_gone()
        if verdict is None:
            return None
        self._give_verdict(verdict)
        self._let_others_read()
        return LostProcessError(f"{verdict} This process was {self._stage}.")

    def _find_cause(self, store: dist.Store) -> str | None:
        """The verdict of another process, or one from who gives signs of life and where they are."""
        before = _read(store, self.num_processes)
        deadline = time.monotonic() + _BEATS_TO_BE_SURE * self.beat_seconds
        while time.monotonic() < deadline:
            verdict = _verdict_in(store)
            if verdict is not None:
                return verdict
            time.sleep(min(0.2, self.beat_seconds))
        now = _read(store, self.num_processes)
        dead = [rank for rank in now if rank != self.rank and now[rank]["beat"] == before[rank]["beat"]]
        if dead:
            return _is_dead(dead, now[dead[0]])
        never_seen = [rank for rank in range(self.num_processes) if rank not in now]
        if never_seen:
            return f"{in_words(never_seen)} ended before the training began: its own output says why."
        return self._who_is_behind(now)

    def _who_is_behind(self, beats: dict[int, dict[str, Any]]) -> str | None:
        furthest = max(beat["num_stages"] for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat["num_stages"] < furthest]
        if not behind and any(beat["waits"] for beat in beats.values()):
            behind = [rank for rank, beat in beats.items() if not beat["waits"]]
        if not behind:
            return None
        first = beats[behind[0]]
        return (
            f"{in_words(behind)} did not come: it has been {first['stage']} for {first['seconds']:.0f} s, in "
            f"{first['place']}, while the others waited. If it only needs longer, raise training.timeout_seconds."
        )

    def _store_is_gone(self) -> str:
        return self._verdict or "process 0 no longer answers, or the launcher that keeps the store of the processes."

    def _give_verdict(self, verdict: str) -> None:
        """The first verdict counts: what follows from it says less about the cause."""
        try:
            if self.store is not None and not self.store.check([_VERDICT]):
                self.store.set(_VERDICT, verdict)
        except RuntimeError:
            logger.debug("the store is gone", exc_info=True)

    def _let_others_read(self) -> None:
        """Wait until the others have seen the verdict: the store may end with the first process."""
        if self.rank == 0 and self.num_processes > 1:
            time.sleep(1.5 * self.beat_seconds)

    def _live(self, store: dist.Store) -> None:
        """What the thread does: give signs of life, look after one neighbour, end where the run has to end."""
        neighbour = (self.rank + 1) % self.num_processes
        last_beat, seen_at, has_warned = -1, time.monotonic(), False
        while not self._has_ended.wait(self.beat_seconds):
            try:
                self._beat(store)
                verdict = self._verdict = _verdict_in(store)
                beats = _read(store, self.num_processes, [neighbour])
                if verdict is None and neighbour in beats:
                    if beats[neighbour]["beat"] != last_beat:
                        last_beat, seen_at = beats[neighbour]["beat"], time.monotonic()
                    elif time.monotonic() - seen_at > self.silence_seconds and not beats[neighbour]["has_ended"]:
                        verdict = _is_dead([neighbour], beats[neighbour])
                        self._give_verdict(verdict)
                if not has_warned and time.monotonic() - self._since > 0.9 * self.timeout_seconds:
                    has_warned = True
                    self._warn(store)
            except RuntimeError:
                verdict = self._store_is_gone()
            if verdict is not None:
                self._end(verdict)
                return
        self._say_goodbye(store)

    def _beat(self, store: dist.Store, has_ended: bool = False) -> None:
        self._num_beats += 1
        place, waits = _place_of(threading.main_thread())
        sign = {
            "beat": self._num_beats,
            "stage": self._stage,
            "num_stages": self._num_stages,
            "seconds": time.monotonic() - self._since,
            "place": place,
            "waits": waits,
            "has_ended": has_ended,
        }
        store.set(f"beat/{self.rank}", json.dumps(sign))

    def _say_goodbye(self, store: dist.Store) -> None:
        try:
            self._beat(store, has_ended=True)
        except RuntimeError:
            logger.debug("the store was closed before this process", exc_info=True)

    def _warn(self, store: dist.Store) -> None:
        late = self._who_is_behind(_read(store, self.num_processes))
        logger.error(
            "process %d has been %s for %.0f s. %s",
            self.rank,
            self._stage,
            time.monotonic() - self._since,
            late or "All processes are there.",
        )

    def _end(self, verdict: str) -> None:
        """End the process if it does not end itself: an operation on a GPU waits for a dead process for long."""
        if self._has_ended.wait(_GRACE_BEATS * self.beat_seconds):
            return
        logger.critical("%s This process was %s and ends now; start again with --resume.", verdict, self._stage)
        logging.shutdown()
        os._exit(EXIT_CODE)


def is_collective_error(error: BaseException) -> bool:
    """Whether an operation over several processes failed, and not this process's own work."""
    if isinstance(error, dist.DistError):
        return True
    words = str(error).lower()
    told = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "processgroup")
    return type(error) is RuntimeError and any(word in words for word in told)


def _read(store: dist.Store, num_processes: int, ranks: Sequence[int] | None = None) -> dict[int, dict[str, Any]]:
    """The newest sign of life of each process that has given one."""
    given = [rank for rank in (ranks or range(num_processes)) if store.check([f"beat/{rank}"])]
    signs = store.multi_get([f"beat/{rank}" for rank in given]) if given else []
    return {rank: json.loads(sign) for rank, sign in zip(given, signs, strict=True)}


def _place_of(thread: threading.Thread) -> tuple[str, bool]:
    """The innermost line of a thread outside of torch, and whether torch waits for other processes there, or may."""
    frame = sys._current_frames().get(thread.ident or 0)
    place, waits = "", False
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/torch/" in path:
            waits = waits or "/torch/distributed/" in path or name == "_engine_run_backward"
        elif not place:
            place = f"{name} ({Path(path).name}:{frame.f_lineno})"
        frame = frame.f_back
    return place, waits


def _verdict_in(store: dist.Store) -> str | None:
    return store.get(_VERDICT).decode() if store.check([_VERDICT]) else None


def _is_dead(ranks: list[int], last: dict[str, Any]) -> str:
    return (
        f"{in_words(ranks)} no longer answers (killed, out of memory, or its machine is gone): it was last seen "
        f"{last['stage']}."
    )
