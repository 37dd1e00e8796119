"""The linear probe: logistic regression on frozen features, at several shares of the training data and several seeds.

Three splits go in. Classifiers are fitted on a stratified share of the training samples, the strength of the penalty is
chosen on validation, and the test samples are scored once. Features are those of clean images; the published protocol
augments its training images once, leaves its shares unstratified and fixes C (`PUBLISHED_C`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from medclip_hf.evaluation.intervals import Floats, Interval, group_index, percentile_interval
from medclip_hf.evaluation.logistic import LogisticFit, fit_sigmoid, fit_softmax
from medclip_hf.evaluation.weighted_figures import ClassifiedSamples

Bools = NDArray[np.bool_]

PUBLISHED_C = 0.316  # of ConceptCLIP's release, for features that are not normalised
FRACTIONS = (0.01, 0.1, 1.0)
C_GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
_LEAST_PROBABILITY = 1e-12  # a class that no training sample had costs this much, not infinity


@dataclass(frozen=True)
class ProbeSplit:
    """Features and labels of one split.

    Args:
        features: (N, D), finite.
        labels: (N,) integers: one class each; or (N, K) bool or 0 and 1: several findings.
        groups: (N,) patient of each sample; None: every sample is its own.
        known: (N, K) bool, findings that count; None: all.

    Raises:
        ValueError: shapes that differ, no sample, values that are not finite.
    """

    features: Floats
    labels: NDArray[np.generic]
    groups: NDArray[np.generic] | None = None
    known: Bools | None = None

    def __post_init__(self) -> None:
        features, labels = np.asarray(self.features), np.asarray(self.labels)
        if features.ndim != 2 or not len(features) or labels.ndim not in (1, 2) or len(labels) != len(features):
            raise ValueError(f"expected features (N, D) and N labels, N > 0, got {features.shape} and {labels.shape}")
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        if bad:
            raise ValueError(f"{bad} of {len(features)} rows of features are not finite: leave these samples out")
        if labels.ndim == 1 and not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels of one class per sample must be integers, got {labels.dtype}")
        if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
            raise ValueError("labels of several findings must be 0 or 1; mark unknown ones in `known` and set them 0")
        if self.groups is not None and np.shape(self.groups) != (len(features),):
            raise ValueError(f"expected one group per sample, ({len(features)},), got {np.shape(self.groups)}")
        if self.known is not None and np.shape(self.known) != labels.shape:
            raise ValueError(f"known must have the labels' shape {labels.shape}, got {np.shape(self.known)}")

    @property
    def is_single_label(self) -> bool:
        """Whether each sample has one class."""
        return np.ndim(self.labels) == 1

    def taken(self, rows: NDArray[np.intp]) -> "ProbeSplit":
        """Some of the samples."""
        return ProbeSplit(
            np.asarray(self.features)[rows],
            np.asarray(self.labels)[rows],
            None if self.groups is None else np.asarray(self.groups)[rows],
            None if self.known is None else np.asarray(self.known)[rows],
        )


@dataclass(frozen=True)
class ProbeRun:
    """One probe: what it was fitted on, what was chosen, and its probabilities of the test samples.

    Args:
        fraction: of the training samples.
        seed: that drew them.
        num_train: samples it was fitted on.
        inverse_penalty: C.
        validation_log_loss: of each C tried; empty where C was fixed.
        probabilities: (N, K) of the test samples; NaN for findings of `undefined`.
        undefined: classes that the training samples do not show (both ways, for findings).
        is_converged: whether the optimiser met its tolerance.
    """

    fraction: float
    seed: int
    num_train: int
    inverse_penalty: float
    validation_log_loss: dict[float, float]
    probabilities: Floats
    undefined: tuple[int, ...]
    is_converged: bool


@dataclass(frozen=True)
class ProbeFigure:
    """A figure of the probes of several seeds.

    Args:
        mean: over the seeds, with the interval that the choice of test patients gives it.
        deviation: standard deviation over the seeds; None for a single one.
        seeds: that drew the training samples.
    """

    mean: Interval
    deviation: float | None
    seeds: tuple[int, ...]

    def as_dict(self) -> dict[str, object]:
        """The fields, ready for JSON."""
        return asdict(self)


def run_linear_probe(
    train: ProbeSplit,
    validation: ProbeSplit | None,
    test: ProbeSplit,
    num_classes: int,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0, 1, 2),
    inverse_penalties: Sequence[float] = C_GRID,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
    device: str = "cpu",
) -> list[ProbeRun]:
    """A run for each fraction and seed; all of the training samples are used by one run, as no seed changes it.

    C is the one with the least log loss on validation, of equal ones the first; with a single C validation is not
    needed. The probe is not fitted again on train and validation together.

    Args:
        train: its labels say whether samples have one class or several findings.
        validation: other patients than in `train`.
        test: other patients again.
        num_classes: K.
        fractions: of the training samples, in (0, 1].
        seeds: of the draws.
        inverse_penalties: values of C to choose from; one: fixed.
        tolerance: of the optimiser, as scikit-learn's.
        max_steps: of the optimiser.
        device: of the optimiser.

    Raises:
        ValueError: splits that do not fit together, a patient in two of them, several C without validation.
    """
    splits = {"train": train, "validation": validation, "test": test}
    _check_splits({name: split for name, split in splits.items() if split is not None}, num_classes)
    if len(set(inverse_penalties)) < len(inverse_penalties):
        raise ValueError(f"each C once, got {list(inverse_penalties)}")
    if validation is None and len(inverse_penalties) > 1:
        raise ValueError("to choose C from several there must be a validation split; or fix C to one value")
    if not fractions or not all(0.0 < fraction <= 1.0 for fraction in fractions) or not seeds:
        raise ValueError(f"expected fractions in (0, 1] and seeds, got {list(fractions)} and {list(seeds)}")
    runs = []
    for fraction in fractions:
        for seed in seeds if fraction < 1.0 else seeds[:1]:
            rows = stratified_subset(train.labels, fraction, seed, groups=train.groups, known=train.known)
            part = train.taken(rows)
            probe = fit_probe(
                part, num_classes, inverse_penalties, tolerance=tolerance, max_steps=max_steps, device=device
            )
            chosen, figures = 0, dict[float, float]()
            if validation is not None and len(inverse_penalties) > 1:
                figures = {float(c): _log_loss(probe, i, validation) for i, c in enumerate(inverse_penalties)}
                chosen = int(np.argmin(list(figures.values())))
            runs.append(
                ProbeRun(
                    fraction=fraction,
                    seed=seed,
                    num_train=len(rows),
                    inverse_penalty=float(inverse_penalties[chosen]),
                    validation_log_loss=figures,
                    probabilities=probe.probabilities(test.features, chosen),
                    undefined=probe.undefined,
                    is_converged=probe.is_converged(chosen),
                )
            )
    return runs


@dataclass(frozen=True)
class LinearProbe:
    """Probes of the same samples, one for each C.

    Args:
        fit: their weights: (C, classes) for one class per sample, (C · findings, 1) for several.
        is_single_label: which of the two.
        num_classes: K.
        columns: classes that could be fitted.
    """

    fit: LogisticFit
    is_single_label: bool
    num_classes: int
    columns: tuple[int, ...]

    @property
    def undefined(self) -> tuple[int, ...]:
        """Classes that could not be fitted: the training samples do not show them."""
        return tuple(k for k in range(self.num_classes) if k not in self.columns)

    def is_converged(self, which: int) -> bool:
        """Whether the probe with this C met the tolerance."""
        return bool(self.fit.is_converged[self._problems(which)].all())

    def probabilities(self, features: ArrayLike, which: int) -> Floats:
        """(N, K) of the probe with the `which`-th C.

        A class that no training sample had gets probability 0, a finding that could not be fitted NaN.
        """
        weight = self.fit.weight[self._problems(which)].flatten(0, 1)
        bias = self.fit.bias[self._problems(which)].flatten()
        values = torch.from_numpy(np.asarray(features, dtype=np.float64)).to(weight.device)
        logits = values @ weight.T + bias
        filled = np.full((len(values), self.num_classes), 0.0 if self.is_single_label else np.nan)
        if self.is_single_label and len(bias) == 1:  # two classes: one logit
            logits = torch.cat([-0.5 * logits, 0.5 * logits], dim=1)
        said = torch.softmax(logits, dim=1) if self.is_single_label else torch.sigmoid(logits)
        filled[:, list(self.columns)] = said.cpu().numpy()
        return filled

    def _problems(self, which: int) -> slice:
        width = 1 if self.is_single_label else len(self.columns)
        return slice(which * width, (which + 1) * width)


def fit_probe(
    train: ProbeSplit,
    num_classes: int,
    inverse_penalties: Sequence[float],
    *,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
    device: str = "cpu",
) -> LinearProbe:
    """Probes of all training samples given, one for each C: multinomial for one class each, else one per finding.

    Two classes share one logit, as in scikit-learn, whose C this is.

    Raises:
        ValueError: fewer than two classes, or no finding, that the samples show.
    """
    features = torch.from_numpy(np.asarray(train.features, dtype=np.float64)).to(device)
    labels = np.asarray(train.labels)
    if train.is_single_label:
        present = np.unique(labels)
        if len(present) < 2:
            raise ValueError(f"the training samples show {len(present)} class: a probe needs two")
        places = torch.from_numpy(np.searchsorted(present, labels)).to(device)
        if len(present) == 2:
            fit = fit_sigmoid(
                features, places[:, None] == 1, inverse_penalties, tolerance=tolerance, max_steps=max_steps
            )
        else:
            fit = fit_softmax(
                features, places, len(present), inverse_penalties, tolerance=tolerance, max_steps=max_steps
            )
        return LinearProbe(fit, True, num_classes, tuple(present.tolist()))
    truth = labels.astype(bool)
    known = np.ones(truth.shape, bool) if train.known is None else np.asarray(train.known, dtype=bool)
    shown = (truth & known).any(axis=0) & (~truth & known).any(axis=0)
    columns = np.flatnonzero(shown)
    if not len(columns):
        raise ValueError("no finding is both present and absent among the training samples: nothing to fit")
    targets, counted = (torch.from_numpy(table[:, columns]).to(device) for table in (truth & known, known))
    fit = fit_sigmoid(features, targets, inverse_penalties, known=counted, tolerance=tolerance, max_steps=max_steps)
    return LinearProbe(fit, False, num_classes, tuple(columns.tolist()))


def probe_figures(
    runs: Sequence[ProbeRun],
    test: ProbeSplit,
    class_names: Sequence[str],
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[float, dict[str, ProbeFigure]]:
    """For each fraction, each overall figure (as in `classification_figures`) as its mean over the seeds.

    The interval is that of the mean: every resample of the test patients scores the runs of all seeds. Findings that
    a run could not fit are left out of all figures of its fraction.
    """
    by_fraction: dict[float, list[ProbeRun]] = {}
    for run in runs:
        by_fraction.setdefault(run.fraction, []).append(run)
    return {
        fraction: _figures_of_seeds(of_fraction, test, class_names, num_resamples, confidence, seed)
        for fraction, of_fraction in by_fraction.items()
    }


def _figures_of_seeds(
    runs: Sequence[ProbeRun],
    test: ProbeSplit,
    class_names: Sequence[str],
    num_resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, ProbeFigure]:
    columns = list(range(len(class_names)))
    if not test.is_single_label:
        columns = [k for k in columns if not any(k in run.undefined for run in runs)]
    labels = test.labels if test.is_single_label else np.asarray(test.labels)[:, columns]
    known = None if test.known is None else np.asarray(test.known, dtype=bool)[:, columns]
    names = [class_names[k] for k in columns]
    points, drawn = [], []
    for run in runs:
        samples = ClassifiedSamples(run.probabilities[:, columns], labels, names, known=known)
        points.append(samples.point().overall)
        drawn.append(samples.resampled(test.groups, num_resamples, seed).overall)
    figures = {}
    for name in points[0]:
        values = np.array([point[name][0] for point in points])
        mean = None if np.isnan(values).any() else float(values.mean())
        interval = percentile_interval(mean, np.mean([one[name] for one in drawn], axis=0), confidence)
        deviation = float(values.std(ddof=1)) if len(values) > 1 and mean is not None else None
        figures[name] = ProbeFigure(interval, deviation, tuple(run.seed for run in runs))
    return figures


def stratified_subset(
    labels: ArrayLike,
    fraction: float,
    seed: int,
    *,
    groups: ArrayLike | None = None,
    known: ArrayLike | None = None,
) -> NDArray[np.intp]:
    """Rows (n,), rising, of a share of the samples that keeps the share of every class.

    Groups are drawn whole, the rarest class first: as many of its positives as its share asks for, then others until
    the share of samples is reached (Sechidis et al. 2011). Each class has at least one sample and one without it;
    labels that are not known count as neither.

    Args:
        labels: (N,) integers or (N, K) bool or 0 and 1.
        fraction: in (0, 1].
        seed: of the draw.
        groups: (N,) patient of each sample; None: every sample is its own.
        known: (N, K) bool; None: all.
    """
    truth = np.asarray(labels)
    if truth.ndim == 1:
        truth = truth[:, None] == np.unique(truth)
    is_known = np.ones(truth.shape, dtype=bool) if known is None else np.asarray(known, dtype=bool)
    truth = truth.astype(bool) & is_known
    if fraction >= 1.0:
        return np.arange(len(truth))
    group_of = group_index(groups, len(truth))
    num_groups = int(group_of.max()) + 1
    positives, negatives = (
        np.stack([np.bincount(group_of, weights=column, minlength=num_groups) for column in side.T], axis=1)
        for side in (truth, ~truth & is_known)
    )
    sizes = np.bincount(group_of, minlength=num_groups)
    order = np.random.default_rng(seed).permutation(num_groups)
    totals = positives.sum(axis=0)
    wanted = np.where(totals > 0, np.maximum(1, np.round(fraction * totals)), 0)
    taken = np.zeros(num_groups, dtype=bool)
    for k in np.argsort(totals, kind="stable"):
        _take(taken, order, positives[:, k], wanted[k])
        _take(taken, order, negatives[:, k], 1)
    _take(taken, order, sizes, max(1, round(fraction * len(truth))))
    return np.flatnonzero(taken[group_of])


def _take(taken: Bools, order: NDArray[np.intp], amounts: NDArray[Any], wanted: float) -> None:
    """Mark groups that amount to something, in their order, until what is marked amounts to what is wanted."""
    lacking = wanted - amounts[taken].sum()
    if lacking <= 0:
        return
    candidates = order[(amounts[order] > 0) & ~taken[order]]
    taken[candidates[: np.searchsorted(np.cumsum(amounts[candidates]), lacking) + 1]] = True


def _log_loss(probe: LinearProbe, which: int, split: ProbeSplit) -> float:
    """Mean −log of the probability given to what was so, over samples, or over the known findings that were fitted.

    Raises:
        ValueError: no such finding is known in the split.
    """
    said = probe.probabilities(split.features, which)
    if split.is_single_label:
        given = said[np.arange(len(said)), np.asarray(split.labels, dtype=np.int64)]
    else:
        columns = list(probe.columns)
        truth = np.asarray(split.labels)[:, columns].astype(bool)
        counted = np.ones(truth.shape, bool) if split.known is None else np.asarray(split.known, dtype=bool)[:, columns]
        given = np.where(truth, said[:, columns], 1.0 - said[:, columns])[counted]
    if not len(given):
        raise ValueError("C cannot be chosen: the validation split knows none of the findings that were fitted")
    return float(-np.log(np.maximum(given, _LEAST_PROBABILITY)).mean())


def _check_splits(splits: dict[str, ProbeSplit], num_classes: int) -> None:
    width, is_single = np.shape(splits["train"].features)[1], splits["train"].is_single_label
    seen: dict[object, str] = {}
    for name, split in splits.items():
        if np.shape(split.features)[1] != width or split.is_single_label != is_single:
            raise ValueError(f"the {name} split has other features or another kind of labels than the training split")
        labels = np.asarray(split.labels, dtype=np.int64)
        if is_single and not ((labels >= 0) & (labels < num_classes)).all():
            raise ValueError(f"labels of the {name} split must lie in 0 to {num_classes - 1}")
        if not is_single and labels.shape[1] != num_classes:
            raise ValueError(f"the {name} split has labels of {labels.shape[1]} findings, not {num_classes}")
        for group in set() if split.groups is None else set(np.asarray(split.groups).tolist()):
            if seen.setdefault(group, name) != name:
                raise ValueError(f"patients of the {name} split are in the {seen[group]} split too: split by patient")
