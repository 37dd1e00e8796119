"""The same picture in two splits: found by perceptual hash among the prepared rows, reported by pseudonym."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medclip_hf.data.parquet import SPLITS


@dataclass(frozen=True)
class CrossSplitPair:
    """Two rows of different splits that show the same picture; `first` stands in the smaller part of the two."""

    first: str
    second: str
    first_split: str
    second_split: str
    same_patient: bool


def pairs_across_splits(
    fingerprints: Sequence[np.void], row_ids: Sequence[str], splits: Sequence[str], patients: Sequence[str]
) -> list[CrossSplitPair]:
    """All pairs of rows of different splits that `data.engine.dedup` calls the same picture.

    Args:
        fingerprints: of `data.engine.dedup.fingerprint`, one a row.
        row_ids: of the rows.
        splits: of the rows.
        patients: pseudonyms.
    """
    from medclip_hf.data.engine.dedup import DuplicateRules, alike_pairs, hamming

    if len(fingerprints) < 2:
        return []
    rules = DuplicateRules()
    records = np.array(fingerprints)
    usable = np.flatnonzero(~records["is_flat"])
    found: set[tuple[int, int]] = set()
    for first, second in alike_pairs(records["phash"][usable], rules.max_phash_distance, rules.max_rows_in_memory):
        one, other = usable[first], usable[second]
        distance = hamming(records["dhash"][one], records["dhash"][other]).sum(-1)
        is_near = distance <= rules.max_dhash_distance
        found.update(
            (int(a), int(b)) for a, b in zip(one[is_near], other[is_near], strict=True) if splits[a] != splits[b]
        )
    pairs = []
    for a, b in sorted(found):
        if SPLITS.index(splits[a]) < SPLITS.index(splits[b]):
            a, b = b, a
        same = patients[a] == patients[b]
        pairs.append(CrossSplitPair(row_ids[a], row_ids[b], splits[a], splits[b], same))
    return pairs
