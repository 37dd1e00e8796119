"""Measured figures of a model: as rows of its card's table, and as `.eval_results/*.yaml` that the Hub shows."""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id


@dataclass(frozen=True)
class MeasuredFigure:
    """One figure of an evaluation, with its interval.

    Args:
        metric: what was measured, as "AUROC, mean of 10 findings".
        value: on the test set itself; None where it is undefined.
        low: lower end of the interval; None where there is none.
        high: upper end.
        data: the test set in words, as "BCCD, test patients".
        num_samples: images or scans measured.
        num_patients: the interval is by patient where this is given.
        protocol: how the answer was obtained, as "zero-shot" or "LoRA, rank 8".
        dataset_id: `owner/name` of the test set on the Hub, where it is there; needed by `.eval_results`.
        dataset_revision: commit of that data set.
        task_id: name of the task within the data set.

    Raises:
        ValueError: an interval of one end, ends in the wrong order, a figure that is not finite, no repository id.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    data: str = ""
    num_samples: int | None = None
    num_patients: int | None = None
    protocol: str = ""
    dataset_id: str | None = None
    dataset_revision: str | None = None
    task_id: str = "default"

    def __post_init__(self) -> None:
        given = [figure for figure in (self.value, self.low, self.high) if figure is not None]
        if not all(math.isfinite(figure) for figure in given):
            raise ValueError(f"{self.metric}: {given} must be finite. An undefined figure is None.")
        if (self.low is None) != (self.high is None) or (self.low or 0.0) > (self.high or 0.0):
            raise ValueError(f"{self.metric}: an interval has two ends in order, not ({self.low}, {self.high}).")
        if self.dataset_id is not None:
            checked_repository_id(self.dataset_id, f"{self.metric}: dataset_id")

    def as_text(self) -> str:
        """The figure and its interval for a reader, as in "0.905 (0.894 to 0.915)"."""
        if self.value is None:
            return "undefined"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def size_as_text(self) -> str:
        """How much was measured, as in "459 samples of 300 patients"."""
        if self.num_samples is None:
            return ""
        return f"{self.num_samples:,} samples" + (f" of {self.num_patients:,} patients" if self.num_patients else "")


def checked_repository_id(name: str, what: str) -> str:
    """The name itself, once it is a repository's `owner/name` on the Hub.

    Raises:
        ValueError: for anything else, above all a path of the own disk, which must not be published.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{what} must be 'owner/name' on the Hub, not {name!r}.") from error
    if name.count("/") != 1:
        raise ValueError(f"{what} must be 'owner/name' on the Hub, not {name!r}: a name alone or a path is none.")
    return name


def eval_results(
    figures: Sequence[MeasuredFigure],
    *,
    date: datetime.date | None = None,
    source_url: str | None = None,
    source_name: str | None = None,
) -> str | None:
    """YAML for `.eval_results/<name>.yaml` of the figures whose test set is on the Hub; None where there is none.

    A private test set has no page that could list the result: its figures stand in the card alone.

    Args:
        figures: the value is written as measured, the interval and the size as a note.
        date: of the measurement; the day of the commit where absent.
        source_url: page that tells how it was measured.
        source_name: what that page is called.

    Raises:
        ValueError: a name of a source without its address.
    """
    entries = [
        EvalResultEntry(
            dataset_id=figure.dataset_id,
            dataset_revision=figure.dataset_revision,
            task_id=figure.task_id,
            value=figure.value,
            date=None if date is None else date.isoformat(),
            source_url=source_url,
            source_name=source_name,
            notes=_notes(figure),
        )
        for figure in figures
        if figure.dataset_id is not None and figure.value is not None
    ]
    if not entries:
        return None
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


def _notes(figure: MeasuredFigure) -> str:
    parts = [figure.metric, figure.protocol]
    if figure.low is not None and figure.high is not None:
        by = "patient" if figure.num_patients else "sample"
        parts.append(f"95 % bootstrap interval by {by} {figure.low:.4f} to {figure.high:.4f}")
    parts.append(figure.size_as_text())
    return "; ".join(part for part in parts if part)
