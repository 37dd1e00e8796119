"""ROC and reliability curves of stored results, with bands by patient: what a picture of a task is drawn from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_hf.evaluation.calibration import ReliabilityCurve, reliability_curve
from medclip_hf.evaluation.curves import CurveBand, roc_curve_band
from medclip_hf.evaluation.intervals import group_index
from medclip_hf.evaluation.results import StoredResult

NUM_RESAMPLES = 200  # bands of a picture


def roc_curves(
    of_models: Sequence[StoredResult],
    patients: NDArray[Any] | None,
    num_resamples: int = NUM_RESAMPLES,
    *,
    max_bands: int | None = None,
) -> dict[str, CurveBand]:
    """The ROC curve of every class that has one, by its name; after the model's where there are several.

    Args:
        of_models: results of one classification task.
        patients: (N,) whose image each of the data's is; None: each is its own.
        num_resamples: 0: no bands.
        max_bands: of more curves than these none gets a band, since none is drawn; None: all get theirs.
    """
    arguments = {}
    for stored in of_models:
        scores, truth, known = score_columns(stored)
        groups = _groups(stored, patients)
        for column, name in enumerate(stored.record["figures"]["num_positive"]):
            rows = known[:, column]
            if truth[rows, column].any() and not truth[rows, column].all():
                curve = f"{stored.model}: {name}" if len(of_models) > 1 else name
                arguments[curve] = (scores[rows, column], truth[rows, column], groups[rows])
    if max_bands is not None and len(arguments) > max_bands:
        num_resamples = 0
    curves = {
        name: roc_curve_band(scores, truth, groups=groups, num_resamples=num_resamples)
        for name, (scores, truth, groups) in arguments.items()
    }
    return {name: curve for name, curve in curves.items() if curve is not None}


def reliability_curves(
    of_models: Sequence[StoredResult], patients: NDArray[Any] | None, num_resamples: int = NUM_RESAMPLES
) -> dict[str, ReliabilityCurve]:
    """The reliability of each model over all its classes; arguments as in `roc_curves`."""
    curves = {}
    for stored in of_models:
        scores, truth, known = score_columns(stored)
        curves[stored.model] = reliability_curve(
            np.clip(scores[known], 0.0, 1.0),
            truth[known],
            groups=np.broadcast_to(_groups(stored, patients)[:, None], known.shape)[known],
            num_resamples=num_resamples,
        )
    return curves


def score_columns(stored: StoredResult) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
    """Scores, truth and what is known of both, (N, K) each."""
    scores, labels = stored.arrays["scores"], stored.arrays["labels"]
    truth = labels.astype(bool) if labels.ndim == 2 else labels[:, None] == np.arange(scores.shape[1])
    return scores, truth, stored.arrays.get("known", np.ones(scores.shape, dtype=bool))


def _groups(stored: StoredResult, patients: NDArray[Any] | None) -> NDArray[np.intp]:
    """(N,) number of each image's patient; without patients that of the image, whose classes stay together."""
    rows = stored.arrays["rows"]
    return group_index(None if patients is None else patients[rows], len(rows))
