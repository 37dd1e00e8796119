"""What a classifier says of a split, and what follows: probabilities, temperature, thresholds, figures, subgroups."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medclip_hf.data.hospital.rows import GROUP_COLUMNS, PatientGroups
from medclip_hf.evaluation.calibration import fit_temperature
from medclip_hf.evaluation.classification import ClassificationFigures, classification_figures
from medclip_hf.evaluation.curves import threshold_at_specificity

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
MIN_PATIENTS = 10  # of a subgroup: figures of fewer say little, and come close to telling of a person


@dataclass(frozen=True)
class FigureOptions:
    """How figures are made.

    Args:
        specificity: at which sensitivity is told.
        num_resamples: of the bootstrap by patient.
        seed: of the bootstrap.
    """

    specificity: float = 0.9
    num_resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class LabelPredictions:
    """What a model says of the N rows of a split, and what is true.

    Args:
        logits: (N, K), NaN where an anatomy is missing.
        labels: (N, K) 1, 0, NaN where unknown.
        patients: (N,).
        row_ids: N.
        classes: K names.
        is_single_label: whether exactly one class is present in a row.
        num_unreadable: rows that could not be read.
    """

    logits: Floats
    labels: Floats
    patients: NDArray[np.str_]
    row_ids: tuple[str, ...]
    classes: tuple[str, ...]
    is_single_label: bool
    num_unreadable: int = 0

    def known(self) -> NDArray[np.bool_]:
        """(N, K): label and logit are both there."""
        return ~np.isnan(self.logits) & ~np.isnan(self.labels)

    def truth(self) -> NDArray[Any]:
        """(N,) the class of each row for a single label; else (N, K), False where unknown."""
        if self.is_single_label:
            return np.nan_to_num(self.labels).argmax(1)
        return np.where(self.known(), self.labels, 0.0).astype(bool)

    def probabilities(self, temperature: float) -> Floats:
        """(N, K) of the logits divided by a temperature."""
        scaled = torch.from_numpy(np.nan_to_num(self.logits) / temperature)
        return (scaled.softmax(dim=1) if self.is_single_label else scaled.sigmoid()).numpy()

    def select(self, kept: NDArray[np.bool_], num_unreadable: int = 0) -> LabelPredictions:
        """Some of the rows.

        Args:
            kept: (N,).
            num_unreadable: to be told of them.
        """
        return replace(
            self,
            logits=self.logits[kept],
            labels=self.labels[kept],
            patients=self.patients[kept],
            row_ids=tuple(row for row, is_kept in zip(self.row_ids, kept, strict=True) if is_kept),
            num_unreadable=num_unreadable,
        )

    def usable(self) -> LabelPredictions:
        """Without the rows of a single-label task that do not have exactly one label.

        Raises:
            ValueError: none is left.
        """
        if not self.is_single_label:
            return self
        kept = np.nansum(self.labels, axis=1) == 1
        if not kept.any():
            raise ValueError("no row has exactly one of the classes.")
        return self.select(kept, self.num_unreadable + int((~kept).sum()))

    def outcomes(self, temperature: float) -> tuple[Floats, NDArray[np.bool_], NDArray[np.str_]]:
        """Probabilities, whether they came true, and patients: of the chosen class, or of every known label."""
        scores = self.probabilities(temperature)
        if self.is_single_label:
            return scores.max(axis=1), scores.argmax(1) == self.truth(), self.patients
        known = self.known()
        return scores[known], self.labels[known] == 1, np.broadcast_to(self.patients[:, None], known.shape)[known]


def label_figures(
    predictions: LabelPredictions, temperature: float, options: FigureOptions, thresholds: list[float] | None = None
) -> ClassificationFigures:
    """All figures of the rows.

    Args:
        predictions: of a split.
        temperature: the logits are divided by.
        options: of the figures.
        thresholds: of each label, chosen elsewhere; for several labels alone.
    """
    scores = predictions.probabilities(temperature)
    common = asdict(options) | {"groups": predictions.patients}
    if predictions.is_single_label:
        return classification_figures(scores, predictions.truth(), predictions.classes, **common)
    known = predictions.known()
    return classification_figures(
        np.where(known, scores, 0.0),
        predictions.truth(),
        predictions.classes,
        known=known,
        thresholds=thresholds,
        **common,
    )


def best_temperature(validation: LabelPredictions) -> float | None:
    """The temperature of the least log loss; None where none can be fitted."""
    try:
        if validation.is_single_label:
            return fit_temperature(validation.logits, validation.truth())
        known = validation.known()
        return fit_temperature(validation.logits[known][:, None], validation.labels[known][:, None].astype(int))
    except ValueError as error:
        logger.warning("no temperature was fitted: %s", error)
        return None


def thresholds_at_specificity(
    validation: LabelPredictions, temperature: float, specificity: float
) -> list[float] | None:
    """For each label the probability that keeps the specificity; None for a single label."""
    if validation.is_single_label:
        return None
    scores, known = validation.probabilities(temperature), validation.known()
    found = []
    for place, name in enumerate(validation.classes):
        truth = validation.labels[known[:, place], place] == 1
        if truth.all():
            logger.warning("%s: no validation row without it, so its threshold is 0.5", name)
            found.append(0.5)
        else:
            chosen = threshold_at_specificity(scores[known[:, place], place], truth, specificity)
            found.append(min(chosen, 1.0))
    return found


def subgroup_figures(
    predictions: LabelPredictions, groups: Mapping[str, PatientGroups], temperature: float, options: FigureOptions
) -> dict[str, dict[str, Any]]:
    """Column → value → figures, for every column with two values or more; groups of few patients are named alone.

    Args:
        predictions: of a split.
        groups: row id → its groups.
        temperature: the logits are divided by.
        options: of the figures.
    """
    found: dict[str, dict[str, Any]] = {}
    for column in GROUP_COLUMNS:
        values = np.array([getattr(groups[row], column) if row in groups else "" for row in predictions.row_ids])
        names = [str(name) for name in np.unique(values) if name]
        if len(names) < 2:
            continue
        found[column] = {}
        for name in names:
            member = predictions.select(values == name)
            if len(np.unique(member.patients)) < MIN_PATIENTS:
                found[column][name] = {"left_out": f"fewer than {MIN_PATIENTS} patients"}
            else:
                found[column][name] = label_figures(member, temperature, options).as_dict()
    return found


def groups_left_out(subgroups: Mapping[str, Mapping[str, Any]]) -> str:
    """The groups of too few patients, in words; empty without any."""
    return ", ".join(
        f"{column} {value}"
        for column, entries in subgroups.items()
        for value, entry in entries.items()
        if "overall" not in entry
    )
