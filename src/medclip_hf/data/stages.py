"""Stages keep a record or drop it with a reason; what was dropped is counted and kept here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Drop:
    """What a stage returns instead of a record.

    Args:
        reason: short and countable, the same words for the same cause (``"image unreadable"``).
        detail: what is particular to this record (file name, exception text); may be empty.
    """

    reason: str
    detail: str = ""
