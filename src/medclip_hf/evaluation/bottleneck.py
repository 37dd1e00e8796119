"""A classifier that can be read: scores of named concepts, then one sparse linear layer whose weights explain it.

The classes see nothing but the concept scores, so a weight means what its concept's name says, and switching a concept
shows what the class would be without it. (Koh et al., "Concept bottleneck models", 2020; with scores of a
vision-language model: Yang et al., "LaBo", 2023.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from medclip_hf.data.parquet import write_text_atomically

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the data against the L1 penalty: scikit-learn's C
SPARSITY_TOLERANCE = 0.005  # of validation accuracy that is given up for fewer concepts
_SWITCHES = (0.05, 0.95)  # quantiles of a concept's training scores that stand for "absent" and "present"
_FORMAT_VERSION = 1
_ARRAYS = ("weights", "bias", "score_mean", "score_scale", "score_absent", "score_present")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ConceptBottleneck:
    """A sparse linear classifier over standardised concept scores.

    Args:
        concept_names: C names.
        class_names: K names.
        weights: (K, C), of standardised scores; most are 0.
        bias: (K,).
        score_mean: (C,), of the training scores.
        score_scale: (C,), their standard deviation.
        score_absent: (C,), score that stands for the concept being absent: a low quantile of training.
        score_present: (C,), the same for being present.
        strength: scikit-learn's C that was chosen.
    """

    concept_names: tuple[str, ...]
    class_names: tuple[str, ...]
    weights: Floats = field(repr=False)
    bias: Floats = field(repr=False)
    score_mean: Floats = field(repr=False)
    score_scale: Floats = field(repr=False)
    score_absent: Floats = field(repr=False)
    score_present: Floats = field(repr=False)
    strength: float

    @property
    def num_concepts_used(self) -> int:
        """Concepts with a weight for some class."""
        return int((self.weights != 0).any(axis=0).sum())

    def probabilities(self, scores: ArrayLike) -> Floats:
        """Softmax over classes, (N, K).

        Args:
            scores: (N, C), as the bottleneck was fitted on.

        Raises:
            ValueError: another number of concepts, or scores that are not finite.
        """
        values = _checked_scores(scores, len(self.concept_names))
        logits = self._standardised(values) @ self.weights.T + self.bias
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    def contributions(self, scores: ArrayLike, class_name: str) -> Floats:
        """What each concept adds to the logit of a class, (N, C); with the bias they sum to it.

        Raises:
            ValueError: as `probabilities`; unknown class.
        """
        values = _checked_scores(scores, len(self.concept_names))
        return self._standardised(values) * self.weights[self._class(class_name)]

    def switch(self, scores: ArrayLike, concept_name: str, *, to_present: bool) -> Floats:
        """The same scores (N, C) with one concept set to what stands for present or absent.

        Raises:
            ValueError: as `probabilities`; unknown concept.
        """
        values = _checked_scores(scores, len(self.concept_names)).copy()
        if concept_name not in self.concept_names:
            raise ValueError(f"no concept {concept_name!r} in the bottleneck of {len(self.concept_names)} concepts")
        place = self.concept_names.index(concept_name)
        values[:, place] = (self.score_present if to_present else self.score_absent)[place]
        return values

    def as_text(self, top: int = 8) -> str:
        """The weights as sentences, one paragraph a class, strongest concepts first: the classifier, to be read."""
        paragraphs = []
        for name, weights, bias in zip(self.class_names, self.weights, self.bias, strict=True):
            order = [place for place in np.argsort(-np.abs(weights), kind="stable")[:top] if weights[place] != 0]
            lines = [f"  {weights[place]:+.2f}  {self.concept_names[place]}" for place in order]
            num_used = int((weights != 0).sum())
            more = [f"  and {num_used - len(order)} weaker ones"] if num_used > len(order) else []
            head = f"{name}: {num_used} of {len(weights)} concepts, bias {bias:+.2f}"
            paragraphs.append("\n".join([head, *lines, *more]))
        return "\n\n".join(paragraphs)

    def save(self, folder: str | Path) -> Path:
        """The folder, with `bottleneck.safetensors` and `bottleneck.json` written in it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        partial = target / ".bottleneck.safetensors.tmp"
        save_file({name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}, partial)
        partial.replace(target / "bottleneck.safetensors")
        names = {"concept_names": self.concept_names, "class_names": self.class_names, "strength": self.strength}
        text = json.dumps({"format_version": _FORMAT_VERSION, **names}, indent=2, ensure_ascii=False)
        write_text_atomically(target / "bottleneck.json", text + "\n")
        return target

    @classmethod
    def load(cls, folder: str | Path) -> ConceptBottleneck:
        """The bottleneck that `save` wrote.

        Raises:
            ValueError: the folder holds none, or one whose parts do not fit together.
        """
        source = Path(folder)
        try:
            described = json.loads((source / "bottleneck.json").read_text(encoding="utf-8"))
            arrays = load_file(source / "bottleneck.safetensors")
            found = cls(
                concept_names=tuple(described["concept_names"]),
                class_names=tuple(described["class_names"]),
                strength=float(described["strength"]),
                **{name: arrays[name] for name in _ARRAYS},
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{source} holds no concept bottleneck that can be read: {error}") from error
        if found.weights.shape != (len(found.class_names), len(found.concept_names)):
            raise ValueError(
                f"{source}: weights of shape {found.weights.shape} for {len(found.class_names)} classes and "
                f"{len(found.concept_names)} concepts"
            )
        return found

    def _standardised(self, values: Floats) -> Floats:
        return (values - self.score_mean) / self.score_scale

    def _class(self, class_name: str) -> int:
        if class_name not in self.class_names:
            raise ValueError(f"no class {class_name!r}; known are {', '.join(self.class_names)}")
        return self.class_names.index(class_name)


@dataclass(frozen=True)
class SwitchEffect:
    """What switching a concept does to the classes: mean change of each probability from absent to present.

    Args:
        concept: switched in every case.
        change: class → mean over cases of p(present) − p(absent), in [−1, 1].
        num_flipped: cases whose predicted class changes.
        num_cases: of them all.
    """

    concept: str
    change: dict[str, float]
    num_flipped: int
    num_cases: int

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def fit_bottleneck(
    scores: ArrayLike,
    labels: ArrayLike,
    concept_names: Sequence[str],
    class_names: Sequence[str],
    *,
    validation_scores: ArrayLike,
    validation_labels: ArrayLike,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> ConceptBottleneck:
    """The sparsest classifier whose balanced validation accuracy is within `SPARSITY_TOLERANCE` of the best.

    Logistic regression with an L1 penalty (scikit-learn) on standardised scores, one fit a strength.

    Args:
        scores: (N, C), of concepts; any real numbers, cosines or logits rather than saturated probabilities.
        labels: (N,), class numbers.
        concept_names: C names, each once.
        class_names: K names, each once, K ≥ 2.
        validation_scores: (M, C), of other cases: the strength is chosen on them.
        validation_labels: (M,).
        strengths: to choose from, positive.
        seed: of the solver.

    Raises:
        ValueError: shapes or names that do not fit, labels outside the classes, a class without a training case,
            scores that are not finite.
        ImportError: without scikit-learn.
    """
    _check_names(concept_names, class_names)
    values, truth = _checked_scores(scores, len(concept_names)), _checked_labels(labels, scores, class_names)
    held_out = _checked_scores(validation_scores, len(concept_names))
    held_out_truth = _checked_labels(validation_labels, validation_scores, class_names)
    empty = [name for number, name in enumerate(class_names) if not (truth == number).any()]
    if empty or not len(held_out) or not strengths or min(strengths) <= 0:
        raise ValueError(
            f"expected a training case of every class (none of {empty}), validation cases ({len(held_out)}) and "
            f"positive strengths ({list(strengths)})"
        )
    mean, spread = values.mean(axis=0), values.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    absent, present = np.quantile(values, _SWITCHES, axis=0)
    candidates = []
    for strength in sorted(strengths):
        weights, bias = _fit((values - mean) / scale, truth, strength, seed)
        names = tuple(concept_names), tuple(class_names)
        candidates.append(ConceptBottleneck(*names, weights, bias, mean, scale, absent, present, strength))
    accuracies = [balanced_accuracy(model.probabilities(held_out), held_out_truth) for model in candidates]
    good = [
        m
        for m, accuracy in zip(candidates, accuracies, strict=True)
        if accuracy >= max(accuracies) - SPARSITY_TOLERANCE
    ]
    return min(good, key=lambda model: model.num_concepts_used)


def balanced_accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes that occur of the share of their cases that get the greatest probability."""
    predicted, truth = np.asarray(probabilities).argmax(axis=1), np.asarray(labels)
    return float(np.mean([(predicted[truth == number] == number).mean() for number in np.unique(truth)]))


def switch_effect(bottleneck: ConceptBottleneck, scores: ArrayLike, concept_name: str) -> SwitchEffect:
    """What the classes do when a concept is switched from absent to present in every case, all else as it is.

    Args:
        bottleneck: fitted.
        scores: (N, C).
        concept_name: which.

    Raises:
        ValueError: as `ConceptBottleneck.switch`; no case.
    """
    absent = bottleneck.probabilities(bottleneck.switch(scores, concept_name, to_present=False))
    present = bottleneck.probabilities(bottleneck.switch(scores, concept_name, to_present=True))
    change = (present - absent).mean(axis=0)
    return SwitchEffect(
        concept_name,
        {name: float(value) for name, value in zip(bottleneck.class_names, change, strict=True)},
        int((present.argmax(axis=1) != absent.argmax(axis=1)).sum()),
        len(present),
    )


def accuracy_with_corrections(
    bottleneck: ConceptBottleneck, scores: ArrayLike, labels: ArrayLike, concept_truth: ArrayLike
) -> list[float]:
    """Balanced accuracy with 0, 1, 2, … concepts set to what is true of each image: the test of Koh et al., 2020.

    If the concepts carry the decision, telling the model the truth about them must help. They are corrected from the
    one with the greatest weights to the least; those without weight change nothing and are left out.

    Args:
        bottleneck: fitted.
        scores: (N, C).
        labels: (N,), class numbers.
        concept_truth: (N, C) bool: whether each image shows each concept.

    Raises:
        ValueError: shapes that do not fit.
    """
    values = _checked_scores(scores, len(bottleneck.concept_names)).copy()
    truth = _checked_labels(labels, scores, bottleneck.class_names)
    is_shown = np.asarray(concept_truth)
    if is_shown.shape != values.shape or not np.isin(is_shown, (0, 1)).all():
        raise ValueError(f"concept_truth must be bool of shape {values.shape}, got shape {is_shown.shape}")
    importance = np.abs(bottleneck.weights).sum(axis=0)
    accuracies = [balanced_accuracy(bottleneck.probabilities(values), truth)]
    for place in np.argsort(-importance, kind="stable")[: bottleneck.num_concepts_used]:
        values[:, place] = np.where(is_shown[:, place], bottleneck.score_present[place], bottleneck.score_absent[place])
        accuracies.append(balanced_accuracy(bottleneck.probabilities(values), truth))
    return accuracies


def _fit(standardised: Floats, labels: NDArray[np.int64], strength: float, seed: int) -> tuple[Floats, Floats]:
    """Weights (K, C) and bias (K,) of one L1 fit."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("a concept bottleneck needs scikit-learn: pip install 'medclip-hf[evaluation]'") from error
    model = LogisticRegression(C=strength, l1_ratio=1.0, solver="saga", max_iter=3000, tol=1e-3, random_state=seed)
    model.fit(standardised, labels)
    if len(model.classes_) > 2:
        return model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    # Of two classes scikit-learn gives the second's logit alone; half of it each way is the same softmax.
    halves = np.array([[-0.5], [0.5]])
    return halves * model.coef_, halves[:, 0] * model.intercept_


def _check_names(concept_names: Sequence[str], class_names: Sequence[str]) -> None:
    if len(class_names) < 2 or len(set(class_names)) != len(class_names):
        raise ValueError(f"expected at least two different class names, got {list(class_names)}")
    if not concept_names or len(set(concept_names)) != len(concept_names):
        raise ValueError(f"expected different concept names, at least one, got {len(concept_names)}")


def _checked_scores(scores: ArrayLike, num_concepts: int) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != num_concepts or not len(values):
        raise ValueError(f"scores must be (N, {num_concepts}), one column a concept and N ≥ 1, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite, but {int((~np.isfinite(values)).sum())} are not")
    return values


def _checked_labels(labels: ArrayLike, scores: ArrayLike, class_names: Sequence[str]) -> NDArray[np.int64]:
    truth = np.asarray(labels)
    if truth.shape != (len(np.asarray(scores)),) or not np.issubdtype(truth.dtype, np.integer):
        raise ValueError(f"labels must be one class number per case, got {truth.dtype} of shape {truth.shape}")
    if len(truth) and (truth.min() < 0 or truth.max() >= len(class_names)):
        raise ValueError(f"labels must lie in 0..{len(class_names) - 1}, got {truth.min()} to {truth.max()}")
    return truth.astype(np.int64)
