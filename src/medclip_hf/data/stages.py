"""Stages keep a record or drop it with a reason; what was dropped is counted and kept here."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Drop:
    """What a stage returns instead of a record.

    Args:
        reason: short and countable, the same words for the same cause (``"image unreadable"``).
        detail: what is particular to this record (file name, exception text); may be empty.
        row_id: which record it was, where its name was known by then; may be empty.
    """

    reason: str
    detail: str = ""
    row_id: str = ""


@dataclass
class Tally:
    """How many records were kept and how many dropped for each reason."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def seen(self) -> int:
        """Number of records, kept or dropped."""
        return self.kept + self.dropped.total()

    @property
    def kept_share(self) -> float:
        """Kept records among those seen, in [0, 1]; 0 before the first."""
        return self.kept / self.seen if self.seen else 0.0

    def add(self, other: Tally) -> None:
        """Count the records of another tally as well."""
        self.kept += other.kept
        self.dropped.update(other.dropped)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, reasons from the most frequent to the rarest."""
        return asdict(self) | {"dropped": dict(sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        """The tally that `as_dict` wrote."""
        return cls(kept=int(values["kept"]), dropped=Counter(values["dropped"]))

    def table(self, what: str) -> str:
        """Lines for people: kept, dropped and each reason with its share of `what` (``"rows"``)."""
        lines = [("kept", self.kept), ("dropped", self.dropped.total())]
        lines += [(f"  {reason}", count) for reason, count in self.as_dict()["dropped"].items()]
        return "\n".join(
            f"{what + ' ' + name:<52} {count:>12,} {count / self.seen if self.seen else 0:>8.2%}"
            for name, count in lines
        )


def run_stages(record: Any, stages: Iterable[Callable[[Any], Any]]) -> Any:
    """The record after all stages, or the `Drop` of the first stage that refused it."""
    for stage in stages:
        if isinstance(record, Drop):
            break
        record = stage(record)
    return record


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int = 0, chunk_size: int = 16
) -> Iterator[Result]:
    """Results of `function` in the order of `items`, computed by `num_workers` processes (0: by this one).

    Memory stays bounded however long `items` is: at most four chunks a worker are in flight, which
    `multiprocessing.Pool.imap` does not promise (it reads its whole input ahead).
    """
    if num_workers <= 0:
        yield from map(function, items)
        return
    remaining = iter(items)
    in_flight: deque[Future[list[Result]]] = deque()
    with ProcessPoolExecutor(num_workers) as pool:
        try:
            while True:
                while len(in_flight) < 4 * num_workers and (chunk := list(islice(remaining, chunk_size))):
                    in_flight.append(pool.submit(_map_chunk, function, chunk))
                if not in_flight:
                    return
                yield from in_flight.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _map_chunk(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]
