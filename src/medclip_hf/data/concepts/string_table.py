"""Many strings in two arrays that can be memory-mapped, so that processes of a machine share them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class StringTable:
    """Strings by number; only those that are asked for become Python objects.

    Args:
        content: (num_bytes,) all strings, in UTF-8, one after another.
        ends: (n,) where each ends.
    """

    def __init__(self, content: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self._content = content
        self._ends = ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "StringTable":
        """The table of these strings."""
        content = bytearray()
        ends: list[int] = []
        for string in strings:
            content += string.encode("utf-8", "surrogatepass")
            ends.append(len(content))
        return cls(np.frombuffer(bytes(content), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        start = int(self._ends[number - 1]) if number else 0
        return self._content[start : int(self._ends[number])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def save(self, folder: Path, name: str) -> None:
        """Write the two arrays of the table."""
        np.save(folder / f"{name}.npy", self._content, allow_pickle=False)
        np.save(folder / f"{name}_ends.npy", self._ends, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, name: str) -> "StringTable":
        """The table that `save` wrote, memory-mapped."""
        return cls(load_array(folder, name), load_array(folder, f"{name}_ends"))


def load_array(folder: Path, name: str) -> NDArray:
    """A memory-mapped array of a folder; an empty one, which cannot be mapped, is read."""
    path = folder / f"{name}.npy"
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)
