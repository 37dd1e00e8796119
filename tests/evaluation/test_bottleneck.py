"""A bottleneck fitted where the classes are made of known concepts: found, sparse, readable, and moved by switches."""

import numpy as np
import pytest

from medclip_hf.evaluation.bottleneck import (
    ConceptBottleneck,
    accuracy_with_corrections,
    balanced_accuracy,
    fit_bottleneck,
    switch_effect,
)

CONCEPTS = [f"concept {number}" for number in range(12)]
CLASSES = ["benign", "malignant", "normal"]


def drawn(count, seed, noise=0.3):
    """Scores of 12 concepts: the first makes a case malignant, else the second benign; the rest say nothing."""
    rng = np.random.default_rng(seed)
    shown = rng.random((count, 12)) < 0.5
    labels = np.where(shown[:, 0], 1, np.where(shown[:, 1], 0, 2))
    return shown + noise * rng.standard_normal(shown.shape), labels, shown


@pytest.fixture(scope="module")
def fitted():
    train, validation = drawn(400, 0), drawn(200, 1)
    return fit_bottleneck(
        train[0], train[1], CONCEPTS, CLASSES, validation_scores=validation[0], validation_labels=validation[1]
    )


def test_it_finds_the_concepts_that_make_the_classes(fitted):
    scores, labels, _ = drawn(300, 2)
    assert balanced_accuracy(fitted.probabilities(scores), labels) > 0.85
    importance = np.abs(fitted.weights).sum(axis=0)
    assert set(np.argsort(-importance)[:2]) == {0, 1}
    assert fitted.num_concepts_used < 12


def test_its_weights_are_its_explanation(fitted):
    scores = drawn(5, 3)[0]
    text = fitted.as_text(top=1)
    assert "malignant:" in text
    assert "concept 0" in text.split("\n\n")[1]
    logits = np.stack(
        [
            fitted.contributions(scores, name).sum(axis=1) + bias
            for name, bias in zip(CLASSES, fitted.bias, strict=True)
        ],
        1,
    )
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert fitted.probabilities(scores) == pytest.approx(shifted / shifted.sum(axis=1, keepdims=True))


def test_switching_a_concept_moves_the_class_it_makes_and_one_without_weight_moves_nothing(fitted):
    scores = drawn(200, 4)[0]
    effect = switch_effect(fitted, scores, "concept 0")
    assert effect.change["malignant"] > 0.5
    assert sum(effect.change.values()) == pytest.approx(0.0, abs=1e-9)
    assert effect.num_flipped > 100
    unused = CONCEPTS[int(np.abs(fitted.weights).sum(axis=0).argmin())]
    if not fitted.weights[:, CONCEPTS.index(unused)].any():
        assert switch_effect(fitted, scores, unused).num_flipped == 0


def test_telling_it_the_truth_about_its_concepts_makes_it_right():
    train, validation, test = (drawn(count, seed, noise=1.0) for count, seed in ((400, 5), (200, 6), (300, 7)))
    model = fit_bottleneck(
        train[0], train[1], CONCEPTS, CLASSES, validation_scores=validation[0], validation_labels=validation[1]
    )
    accuracies = accuracy_with_corrections(model, *test)
    assert len(accuracies) == model.num_concepts_used + 1
    assert accuracies[2] > accuracies[0] + 0.2


def test_two_classes_are_a_sigmoid_of_their_difference():
    scores, labels, _ = drawn(200, 8)
    binary = (labels == 1).astype(int)
    model = fit_bottleneck(
        scores, binary, CONCEPTS, ["other", "malignant"], validation_scores=scores, validation_labels=binary
    )
    assert model.weights[0] == pytest.approx(-model.weights[1])
    assert balanced_accuracy(model.probabilities(scores), binary) > 0.9


def test_a_saved_bottleneck_is_the_same_and_a_damaged_one_refused(fitted, tmp_path):
    scores = drawn(20, 9)[0]
    folder = fitted.save(tmp_path / "bottleneck")
    assert ConceptBottleneck.load(folder).probabilities(scores) == pytest.approx(fitted.probabilities(scores))
    (folder / "bottleneck.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="no concept bottleneck"):
        ConceptBottleneck.load(folder)
    with pytest.raises(ValueError, match="no concept bottleneck"):
        ConceptBottleneck.load(tmp_path)


def test_what_cannot_be_fitted_is_refused(fitted):
    scores, labels, shown = drawn(30, 10)
    held_out = {"validation_scores": scores, "validation_labels": labels}
    with pytest.raises(ValueError, match="one column a concept"):
        fit_bottleneck(scores[:, :5], labels, CONCEPTS, CLASSES, **held_out)
    with pytest.raises(ValueError, match="finite"):
        fit_bottleneck(scores * np.nan, labels, CONCEPTS, CLASSES, **held_out)
    with pytest.raises(ValueError, match="labels must lie in"):
        fit_bottleneck(scores, labels + 1, CONCEPTS, CLASSES, **held_out)
    with pytest.raises(ValueError, match=r"none of \['unseen'\]"):
        fit_bottleneck(scores, labels, CONCEPTS, [*CLASSES, "unseen"], **held_out)
    with pytest.raises(ValueError, match="no concept 'rash'"):
        switch_effect(fitted, scores, "rash")
    with pytest.raises(ValueError, match="no class 'other'"):
        fitted.contributions(scores, "other")
    with pytest.raises(ValueError, match="concept_truth"):
        accuracy_with_corrections(fitted, scores, labels, shown[:5])
