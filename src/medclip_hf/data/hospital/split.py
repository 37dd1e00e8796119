"""Patients into train, validation and test: disjoint, alike in their labels, the same every time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medclip_hf.data.hospital.pseudonyms import Pseudonyms
from medclip_hf.data.hospital.rows import Labels
from medclip_hf.data.hospital.table import TableRow
from medclip_hf.data.parquet import SPLITS


@dataclass(frozen=True)
class SplitShares:
    """Shares of the patients."""

    train: float = 0.7
    validation: float = 0.15
    test: float = 0.15

    def __post_init__(self) -> None:
        shares = self.as_tuple()
        if min(shares) < 0 or shares[0] == 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares of train, validation and test must be positive and add up to 1, got {shares}")

    def as_tuple(self) -> tuple[float, float, float]:
        """In the order of the splits."""
        return self.train, self.validation, self.test


def split_of_patients(rows: Sequence[TableRow], shares: SplitShares, pseudonyms: Pseudonyms) -> dict[str, str]:
    """Pseudonym of the patient → split: as the table says, or drawn here.

    Raises:
        ValueError: a patient in two splits of the table, a split without rows, too few patients.
    """
    by_patient: dict[str, list[TableRow]] = defaultdict(list)
    for row in rows:
        by_patient[pseudonyms.patient(row.patient)].append(row)
    if rows and rows[0].split:
        return _as_in_the_table(by_patient)
    labels = {patient: [row.labels for row in own] for patient, own in by_patient.items()}
    return stratified_split(labels, shares)


def stratified_split(labels: Mapping[str, Sequence[Labels]], shares: SplitShares) -> dict[str, str]:
    """Pseudonym → split, by iterative stratification over patients.

    The rarest label is dealt out first, to the split that still wants most patients with it (Sechidis, Tsoumakas &
    Vlahavas 2011, algorithm 1, with patients in place of rows). Patients come in the order of their pseudonyms, which
    the key alone decides: nobody can choose who is tested on, and the same table gives the same split. Rows that are
    added later may move patients; keep the splits of a published set by a split column.

    Args:
        labels: pseudonym → labels of each of the patient's rows.
        shares: of the patients.

    Raises:
        ValueError: fewer patients than splits.
    """
    used = [split for split, share in zip(SPLITS, shares.as_tuple(), strict=True) if share > 0]
    if len(labels) < len(used):
        raise ValueError(
            f"{len(labels)} patients cannot fill the splits {', '.join(used)}. Set the shares of those you can do "
            "without to 0."
        )
    wanted_shares = np.array([share for share in shares.as_tuple() if share > 0])
    traits = {patient: _traits(rows) for patient, rows in labels.items()}
    counts = Counter(trait for own in traits.values() for trait in own)
    open_places = wanted_shares * len(labels)
    open_traits = {trait: wanted_shares * count for trait, count in counts.items()}
    remaining = dict.fromkeys(sorted(labels))
    result: dict[str, str] = {}
    while remaining:
        left = Counter(trait for patient in remaining for trait in traits[patient])
        rarest = min(left, key=lambda trait: (left[trait], trait)) if left else None
        for patient in [p for p in remaining if rarest is None or rarest in traits[p]]:
            wish = open_traits[rarest] if rarest is not None else open_places
            best = int(np.lexsort((-open_places, -wish))[0])
            result[patient] = used[best]
            open_places[best] -= 1
            for trait in traits[patient]:
                open_traits[trait][best] -= 1
            del remaining[patient]
    return _without_empty_split(result, used)


def _traits(rows: Sequence[Labels]) -> frozenset[tuple[str, bool]]:
    """What a patient is dealt out by: each finding that is present in a row; those without any are one group."""
    present = {(name, True) for labels in rows for name, is_present in labels if is_present}
    return frozenset(present or {("", False)})


def _without_empty_split(result: dict[str, str], used: Sequence[str]) -> dict[str, str]:
    """With few patients rounding may leave a split empty: the largest gives it its last patient."""
    for split in used:
        if split not in result.values():
            largest = Counter(result.values()).most_common(1)[0][0]
            result[max(patient for patient, own in result.items() if own == largest)] = split
    return result


def _as_in_the_table(by_patient: Mapping[str, Sequence[TableRow]]) -> dict[str, str]:
    torn = [rows for rows in by_patient.values() if len({row.split for row in rows}) > 1]
    if torn:
        numbers = sorted(row.number for rows in torn for row in rows)
        shown = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
        raise ValueError(
            f"{len(torn)} patients stand in two splits (rows {shown}): what is learnt of a patient would be tested on "
            "the same patient. Repair the split column, or leave it out to split here."
        )
    return {patient: rows[0].split for patient, rows in by_patient.items()}
