"""Which figures show the same picture: fingerprints of images, and the search for equal and nearly equal ones.

Two pictures are duplicates when their files are equal, or when two independent perceptual hashes agree: the 64-bit
pHash (low frequencies of the cosine transform) within `max_phash_distance` bits and the 256-bit dHash (signs of
horizontal differences on a 17 × 16 grid) within `max_dhash_distance`. pHash alone takes look-alike scans for the same
picture; the finer dHash tells them apart (measured in `benchmarks/medconcept.py`).

The search is exact and its memory bounded. Of d + 3 blocks of bits, two hashes within d bits agree in at least three,
so only pictures that are equal in some three blocks are compared: (d + 3 choose 3) sorts, and at 23 million pictures
few chance pairs. Rows are sorted in parts of at most `max_rows_in_memory`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    from imagehash import dhash, phash
except ImportError as missing:
    raise ImportError("the MedConcept engine needs ImageHash: install medclip-hf[medconcept]") from missing

HASH_SIDE = 256  # pixels; pictures are reduced to this before they are hashed, which makes hashing 5 times faster
FLAT_RANGE = 8  # grey levels of 256: what varies less has no shape that a hash could hold
PHASH_BITS = 64
DHASH_WORDS = 4  # of 64 bits
BLOCKS_THAT_AGREE = 3
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits without pattern: Knuth's multiplicative hashing

FINGERPRINT = np.dtype(
    [
        ("row_id", "<u8"),  # first half of a digest of the row's name
        ("content", "<u8", (2,)),  # 128-bit digest of the file
        ("phash", "<u8"),
        ("dhash", "<u8", (DHASH_WORDS,)),
        ("is_flat", "?"),  # nearly one colour: its perceptual hashes mean nothing
    ]
)

Fingerprints = NDArray[Any]  # of dtype FINGERPRINT
Hashes = NDArray[np.uint64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class DuplicateRules:
    """How alike two pictures must be to be called the same.

    Args:
        max_phash_distance: of 64 bits; at most 8, where the search takes 165 sorts.
        max_dhash_distance: of 256 bits.
        max_rows_in_memory: bounds the memory of the search, some 170 bytes a row.
    """

    max_phash_distance: int = 4
    max_dhash_distance: int = 20
    max_rows_in_memory: int = 4_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.max_phash_distance <= 8 or not 0 <= self.max_dhash_distance <= 256:
            raise ValueError(
                "max_phash_distance must lie in 0 to 8 and max_dhash_distance in 0 to 256, got "
                f"{self.max_phash_distance} and {self.max_dhash_distance}"
            )
        if self.max_rows_in_memory < 1000:
            raise ValueError(f"max_rows_in_memory must be at least 1000, got {self.max_rows_in_memory}")


@dataclass(frozen=True)
class Duplicates:
    """Rows to drop: `rows[i]` shows what `originals[i]`, an earlier row, shows. Ascending in `rows`, each row once.

    `reasons[i]` indexes `REASONS`.
    """

    rows: Rows
    originals: Rows
    reasons: NDArray[np.uint8]


REASONS = ("row id repeated", "image repeated", "image nearly repeated")
_KEPT, _NEAR = 255, REASONS.index("image nearly repeated")


def digest_of(content: bytes) -> tuple[int, int]:
    """A 128-bit digest as two numbers of 64 bits."""
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def fingerprint(row_id: str, content: bytes, image: Image.Image) -> np.void:
    """What is remembered of a picture, 57 bytes.

    Args:
        row_id: name of the row.
        content: the encoded file.
        image: the same, decoded.
    """
    grey = image.convert("RGB").convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    low, high = grey.getextrema()
    record: np.void = np.zeros(1, FINGERPRINT)[0]
    record["row_id"] = digest_of(row_id.encode("utf-8", "replace"))[0]
    record["content"] = digest_of(content)
    record["phash"] = _packed(phash(grey).hash)[0]
    record["dhash"] = _packed(dhash(grey, hash_size=16).hash)
    record["is_flat"] = float(high) - float(low) < FLAT_RANGE  # type: ignore[arg-type]
    return record


def find_duplicates(fingerprints: Fingerprints, rules: DuplicateRules) -> Duplicates:
    """Every row that repeats an earlier one which is itself kept; the first of its kind stays.

    Rows are judged in their order, so of a chain of gradual changes (A like B, B like C, A unlike C) B goes and C
    stays. Beside the part in memory, the search takes some 25 bytes for every row.

    Args:
        fingerprints: one record a row, in the order in which rows are preferred; may be memory-mapped.
        rules: how alike duplicates are.
    """
    original_of = np.arange(len(fingerprints), dtype=np.int64)
    reason_of = np.full(len(fingerprints), _KEPT, np.uint8)
    for reason, fields in enumerate((("row_id",), ("content",), ("phash", "dhash"))):
        rows = np.flatnonzero(reason_of == _KEPT)
        if "phash" in fields:
            rows = rows[~fingerprints["is_flat"][rows]]
        first = _first_of_equals(fingerprints, rows, fields, rules.max_rows_in_memory)
        is_new = first < rows
        reason_of[rows[is_new]], original_of[rows[is_new]] = reason, first[is_new]
    rows = np.flatnonzero(reason_of == _KEPT)
    for earlier, later in _ordered_pairs(fingerprints, rows[~fingerprints["is_flat"][rows]], rules):
        if reason_of[earlier] == reason_of[later] == _KEPT:
            reason_of[later], original_of[later] = _NEAR, earlier
    dropped = np.flatnonzero(reason_of != _KEPT)
    return Duplicates(dropped, _roots(original_of, dropped), reason_of[dropped])


def alike_pairs(phashes: Hashes, max_distance: int, max_rows_in_memory: int) -> Iterator[tuple[Rows, Rows]]:
    """All pairs (earlier, later) of rows whose hashes lie within a distance, in parts; pairs may repeat.

    Args:
        phashes: (num_rows,).
        max_distance: in bits.
        max_rows_in_memory: of one part.
    """
    for mask in _masks(max_distance):
        values = phashes & mask
        for rows in _parts(values, max_rows_in_memory):
            rows = rows[np.argsort(values[rows], kind="stable")]  # ascending within a group
            for first, second in _pairs_of_equal_neighbours(values[rows]):
                is_alike = hamming(phashes[rows[first]], phashes[rows[second]]) <= max_distance
                yield rows[first[is_alike]], rows[second[is_alike]]


def hamming(first: Hashes, second: Hashes) -> NDArray[np.int64]:
    """Number of different bits; hashes of several words have them on the last axis of a (…, words) array."""
    different = np.bitwise_xor(first, second)
    bits = np.zeros(different.shape, np.int64)
    for shift in range(0, 64, 16):
        bits += _BITS_OF_16[((different >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)]
    return bits


_BITS_OF_16 = np.array([number.bit_count() for number in range(2**16)], np.uint8)
_PAIRS_AT_ONCE = 2**20


def save_fingerprints(path: Path, records: Sequence[np.void]) -> None:
    """Write the fingerprints of a unit; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, np.array(records, FINGERPRINT), allow_pickle=False)
    temporary.replace(path)


def join_fingerprints(paths: Sequence[Path], target: Path) -> Fingerprints:
    """The fingerprints of several files one after another, memory-mapped from `target`."""
    counts = [len(np.load(path, mmap_mode="r", allow_pickle=False)) for path in paths]
    total = sum(counts)
    if not total:
        return np.zeros(0, FINGERPRINT)
    joined = np.lib.format.open_memmap(target, mode="w+", dtype=FINGERPRINT, shape=(total,))
    start = 0
    for path, count in zip(paths, counts, strict=True):
        joined[start : start + count] = np.load(path, allow_pickle=False)
        start += count
    joined.flush()
    return np.load(target, mmap_mode="r", allow_pickle=False)


def _packed(bits: NDArray[np.bool_]) -> Hashes:
    return np.packbits(bits.reshape(-1)).view("<u8")


def _first_of_equals(fingerprints: Fingerprints, rows: Rows, fields: tuple[str, ...], max_rows_in_memory: int) -> Rows:
    """For each of `rows`, which ascend, the first of them whose fields are equal."""
    result = rows.copy()
    values = fingerprints[fields[0]][rows]
    for part in _parts(values if values.ndim == 1 else values[:, 0], max_rows_in_memory):
        columns = [fingerprints[name][rows[part]].reshape(len(part), -1) for name in fields]
        keys = np.concatenate(columns, axis=1)
        order = np.lexsort((part, *keys.T))
        is_start = np.ones(len(part), bool)
        is_start[1:] = np.any(keys[order[1:]] != keys[order[:-1]], axis=1)
        first = order[np.flatnonzero(is_start)[np.cumsum(is_start) - 1]]
        result[part[order]] = rows[part[first]]
    return result


def _masks(max_distance: int) -> list[np.uint64]:
    """Masks of some three blocks of bits each: hashes within the distance agree under at least one of them."""
    num_blocks = max_distance + BLOCKS_THAT_AGREE
    edges = [PHASH_BITS * block // num_blocks for block in range(num_blocks + 1)]
    blocks = [2**end - 2**start for start, end in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(blocks, BLOCKS_THAT_AGREE)]


def _parts(values: Hashes, max_rows: int) -> Iterator[Rows]:
    """Index arrays of at most about `max_rows`, ascending, with equal values in the same one; a lone index in none."""
    num_parts = max(1, -(-len(values) // max_rows))
    for number in range(num_parts):
        # The product spreads values that differ in their high bits only.
        part = np.flatnonzero((values * _SPREAD >> np.uint64(32)) % np.uint64(num_parts) == number)
        if len(part) > 1:
            yield part


def _pairs_of_equal_neighbours(ordered: Hashes) -> Iterator[tuple[Rows, Rows]]:
    """All pairs of positions with equal values in a sorted array, about a million pairs at a time."""
    num_rows = len(ordered)
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.repeat(np.append(starts[1:], num_rows), np.diff(np.append(starts, num_rows)))  # of each row's group
    num_partners = ends - np.arange(num_rows) - 1
    before = np.concatenate([[0], np.cumsum(num_partners)])
    start = 0
    while start < num_rows:
        stop = max(int(np.searchsorted(before, before[start] + _PAIRS_AT_ONCE, side="right")) - 1, start + 1)
        counts = num_partners[start:stop]
        first = np.repeat(np.arange(start, stop), counts)
        if len(first):
            step = np.arange(len(first)) - np.repeat(before[start:stop] - before[start], counts)
            yield first, first + 1 + step
        start = stop


def _ordered_pairs(fingerprints: Fingerprints, rows: Rows, rules: DuplicateRules) -> Iterator[tuple[int, int]]:
    """All pairs (earlier, later) of `rows` that satisfy the rules, by their later row, then by the earlier."""
    found = [np.zeros((0, 2), np.int64)]
    phashes = fingerprints["phash"][rows]
    for first, second in alike_pairs(phashes, rules.max_phash_distance, rules.max_rows_in_memory):
        earlier, later = rows[first], rows[second]
        distance = hamming(fingerprints["dhash"][earlier], fingerprints["dhash"][later]).sum(-1)
        is_near = distance <= rules.max_dhash_distance
        found.append(np.stack([earlier[is_near], later[is_near]], axis=1))
    pairs = np.concatenate(found)
    for earlier, later in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]:
        yield int(earlier), int(later)


def _roots(original_of: Rows, rows: Rows) -> Rows:
    """The kept row at the end of each row's chain of originals."""
    originals = original_of[rows]
    while np.any(original_of[originals] != originals):
        originals = original_of[originals]
    return originals
